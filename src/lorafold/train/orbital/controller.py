"""Rank and learning rate of a training run by how its loss behaves.

Three states: HIGH where all is calm (the largest rank), BASE, and LOW under stress (the smallest
rank and a lower rate), entered at once and left when the readings have been unremarkable for a
while. What the state pauses is held still, weight decay and momentum notwithstanding. On entering
LOW the adapter is kept as it is; on leaving it comes back where it has moved little, for then the
steps under stress were noise. A loss that is not finite is a state of its own: no step is taken,
and what was last known to be good comes back, at the LOW rank and rate.

The losses are read at full rank, whatever rank trains: a sensor that saw the rank's own effect
would take the controller's doing for the run's. The rate is changed for the length of a step alone,
so that schedules don't know of it.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from numbers import Integral
from typing import Any

import torch
from torch import Tensor

from ...attach import Live
from ...errors import MismatchError
from ..many import finite, the_trained
from .sensor import Sensor, Tuning

LOW, BASE, HIGH = "LOW", "BASE", "HIGH"
BROKEN = "NON_FINITE"


@dataclass(frozen=True)
class Event:
    """What the controller did.

    Args:
        step: how many losses it had been given. what: "state", "restored" or "kept".
        state: after it. rank: that trains. phi: the reading; None where the loss was not finite.
        drift: ‖ΔW − ΔW before‖ / ‖ΔW before‖ of what might come back, where that was asked.
    """

    step: int
    what: str
    state: str
    rank: int
    phi: float | None
    drift: float | None = None


@dataclass(frozen=True)
class _Snapshot:
    """A trained adapter with its optimiser's numbers, as copies."""

    values: list[Tensor]
    moments: list[dict[str, Tensor]]


class OrbitalController:
    """See above.

    A run in a loop of your own:

        loss = controller.read(lambda: model(**batch).loss)  # at full rank, every second step
        controller.step(loss)
        with controller.running():
            model(**batch).loss.backward()
        optimizer.step()

    Not for: finding a good rank, which `resize` and `lf.plot.rank_curve` show after training.

    Args:
        live: the handle. optimizer: of its parameters.
        levels: ranks of LOW, BASE and HIGH, ascending. rates: what the learning rate is multiplied
            by in each.
        every: a loss is read every so many steps, 1 or 2. drift: the largest movement in LOW that
            is taken back on leaving it. keep: every so many steps in BASE or HIGH the adapter is
            kept, for a loss that is not finite.
        name: of the adapter; the only trained one when None.
        tuning: of the sensor, see `Tuning`.

    Attributes:
        state: "LOW", "BASE", "HIGH" or "NON_FINITE". events: all it did.

    Raises:
        MismatchError: an option out of range, naming it.
    """

    def __init__(
        self,
        live: Live,
        optimizer: torch.optim.Optimizer,
        levels: Sequence[int] = (4, 8, 16),
        *,
        rates: Sequence[float] = (0.3, 1.0, 1.0),
        every: int = 2,
        drift: float = 0.05,
        keep: int = 16,
        name: str | None = None,
        tuning: Tuning | None = None,
    ) -> None:
        self.live, self.optimizer = live, optimizer
        self.name = the_trained(live) if name is None else name
        most = live.adapter(self.name).rank
        _check(levels, rates, every, keep, most)
        self.levels = dict(zip((LOW, BASE, HIGH), map(int, levels), strict=True))
        self.rates = dict(zip((LOW, BASE, HIGH), map(float, rates), strict=True))
        self.every, self.drift, self.keep = int(every), float(drift), int(keep)
        self.sensor = Sensor(tuning or Tuning())
        self.state, self.events = BASE, list[Event]()
        self._steps = self._readings = 0
        self._skip = False  # the optimiser's next step
        self._rates: list[float] = []  # of the optimiser, while it steps
        self._good: _Snapshot | None = None
        self._entered: _Snapshot | None = None
        self._hooks: list[Any] = [
            optimizer.register_step_pre_hook(self._before_step),
            optimizer.register_step_post_hook(self._after_step),
            live.guard(optimizer),
        ]

    @property
    def rank(self) -> int:
        """The rank prefix that trains now."""
        return self.levels[LOW if self.state == BROKEN else self.state]

    @property
    def due(self) -> bool:
        """Whether this step's loss is to be read."""
        return self._steps % self.every == 0

    def running(self) -> Any:
        """A context in which the model runs what trains now."""
        return self.live.use(self.name, rank=self.rank)

    def read(self, forward: Callable[[], Any]) -> float | None:
        """A loss at full rank, without gradients; None where none is due.

        Args:
            forward: gives the loss, a number or a scalar tensor; the model runs at full rank then.
        """
        if not self.due:
            return None
        with torch.no_grad(), self.live.use(self.name):
            return float(forward())

    def step(self, loss: float | Tensor | None) -> str:
        """Take a loss at full rank down and set rank and rate; before the optimiser's step.

        Args:
            loss: a number, or None where none was due.

        Returns:
            The state.
        """
        self._steps += 1
        if loss is None:
            return self.state
        value = float(loss)
        self._readings += 1
        if not math.isfinite(value):
            self._broken()
            return self.state
        self.sensor.read(value)
        after = self._next()
        if after != self.state:
            self._enter(after)
        elif self.state in (BASE, HIGH) and self._readings % max(1, self.keep // self.every) == 0:
            self._good = self._snapshot()
        return self.state

    def close(self) -> None:
        """Let the optimiser go."""
        for hook in self._hooks:
            hook.remove()

    # What there is to go on from

    def state_dict(self) -> dict[str, Any]:
        """All of it in JSON's types; the kept tensors are `tensors()`."""
        return {
            "state": self.state,
            "steps": self._steps,
            "readings": self._readings,
            "sensor": self.sensor.state(),
            "events": [asdict(event) for event in self.events],
        }

    def tensors(self) -> dict[str, Tensor]:
        """The tensors of what is kept, by name."""
        found: dict[str, Tensor] = {}
        for label, kept in (("good", self._good), ("entered", self._entered)):
            if kept is None:
                continue
            for i, (value, moments) in enumerate(zip(kept.values, kept.moments, strict=True)):
                found[f"{label}.{i}.value"] = value
                found.update({f"{label}.{i}.state.{key}": t for key, t in moments.items()})
        return found

    def load_state_dict(
        self, state: Mapping[str, Any], tensors: Mapping[str, Tensor] | None = None
    ) -> None:
        """Go on from `state_dict()` and `tensors()`."""
        self.state = state["state"]
        self._steps, self._readings = state["steps"], state["readings"]
        self.sensor.restore(state["sensor"])
        self.events = [Event(**event) for event in state["events"]]
        self._good = _snapshot_of(tensors or {}, "good")
        self._entered = _snapshot_of(tensors or {}, "entered")

    # How it goes from state to state

    def _next(self) -> str:
        if self.sensor.stressed:
            return LOW
        if self.state in (LOW, BROKEN):
            return BASE if self.sensor.cooled else self.state
        if self.state == HIGH:
            return BASE if self.sensor.stirred else HIGH
        return HIGH if self.sensor.calm else BASE

    def _enter(self, after: str) -> None:
        before, self.state = self.state, after
        if after == LOW and before != BROKEN:
            self._entered = self._snapshot()
        elif before == LOW and self._entered is not None:
            drift = self._drift(self._entered)
            if drift <= self.drift:
                self._restore(self._entered)
            self._log("restored" if drift <= self.drift else "kept", drift)
            self._entered = None
        self._log("state")

    def _broken(self) -> None:
        self.state, self._entered = BROKEN, None
        self.sensor.phi = None
        if self._good is not None:
            drift = self._drift(self._good)
            self._restore(self._good)
            self._log("restored", drift)
        self._log("state")
        self._skip = True

    def _before_step(self, *_: Any) -> None:
        """None is taken after a loss that is not finite, nor with such gradients."""
        parameters = list(self.live.parameters(self.name))
        grads = [p.grad for p in parameters if p.grad is not None]
        if self._skip or not finite(grads):
            for p in parameters:
                p.grad = None
        self._skip = False
        groups = self.optimizer.param_groups
        self._rates = [group["lr"] for group in groups]
        for group in groups:
            group["lr"] = group["lr"] * self.rates[LOW if self.state == BROKEN else self.state]

    def _after_step(self, *_: Any) -> None:
        for group, rate in zip(self.optimizer.param_groups, self._rates, strict=True):
            group["lr"] = rate

    def _log(self, what: str, drift: float | None = None) -> None:
        event = Event(self._steps, what, self.state, self.rank, self.sensor.phi)
        self.events.append(event if drift is None else replace(event, drift=drift))

    def _snapshot(self) -> _Snapshot:
        parameters = list(self.live.parameters(self.name))
        moments = []
        for p in parameters:
            own = self.optimizer.state.get(p, {})
            moments.append({k: t.clone() for k, t in own.items() if isinstance(t, Tensor)})
        return _Snapshot([p.detach().clone() for p in parameters], moments)

    @torch.no_grad()
    def _restore(self, kept: _Snapshot) -> None:
        for p, value, moments in zip(
            self.live.parameters(self.name), kept.values, kept.moments, strict=True
        ):
            p.copy_(value)
            own = self.optimizer.state.get(p)
            for key, t in (own or {}).items():
                if isinstance(t, Tensor):
                    t.copy_(moments[key]) if key in moments else t.zero_()

    def _drift(self, kept: _Snapshot) -> float:
        """How far the adapter is from a kept one, in ΔW."""
        present = [p.detach().clone() for p in self.live.parameters(self.name)]
        if not finite(present):
            return math.inf
        now = self.live.adapter(self.name)
        with torch.no_grad():
            for p, value in zip(self.live.parameters(self.name), kept.values, strict=True):
                p.copy_(value)
            then = self.live.adapter(self.name)
            for p, value in zip(self.live.parameters(self.name), present, strict=True):
                p.copy_(value)
        size = then.norm()
        moved = now.distance(then)
        return moved / size if size > 0 else (0.0 if moved == 0 else math.inf)


def _snapshot_of(tensors: Mapping[str, Tensor], label: str) -> _Snapshot | None:
    count = sum(key.startswith(f"{label}.") and key.endswith(".value") for key in tensors)
    if not count:
        return None
    moments = []
    for i in range(count):
        head = f"{label}.{i}.state."
        moments.append({k.removeprefix(head): t for k, t in tensors.items() if k.startswith(head)})
    return _Snapshot([tensors[f"{label}.{i}.value"] for i in range(count)], moments)


def _check(levels: Sequence[int], rates: Sequence[float], every: int, keep: int, most: int) -> None:
    if len(levels) != 3 or not all(isinstance(k, Integral) and k >= 1 for k in levels):
        raise MismatchError(f"levels must be three ranks, of LOW, BASE and HIGH; found {levels!r}")
    if list(levels) != sorted(levels) or levels[2] > most:
        raise MismatchError(
            f"levels must ascend up to the adapter's rank, {most}; found {tuple(levels)}"
        )
    if len(rates) != 3 or not all(0 < float(f) < math.inf for f in rates):
        raise MismatchError(f"rates must be three factors above 0, found {rates!r}")
    if every not in (1, 2):
        raise MismatchError(
            f"every must be 1 or 2, found {every!r}: what is read less often is seen too late"
        )
    if not isinstance(keep, Integral) or keep < 1:
        raise MismatchError(f"keep must be a whole number of at least 1, found {keep!r}")
