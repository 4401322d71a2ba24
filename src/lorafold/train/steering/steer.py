"""A run of steering: rounds of training, each calibrated and kept, and what came of them.

Each round trains by the loss of both signs, looks at the held-out pairs every so many steps, keeps
the best state and stops early where that gets no better. Then the strength is found at which greedy
text moves by so much, and all rounds together are scaled by it: c = 1 is that strength.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from ...adapter import Adapter
from ...attach import Live, attach
from ...errors import MismatchError
from ...layers.modes import evaluating
from ..many import finite
from .calibrate import Calibration, calibrate_c
from .loss import Steering, steer_backward, steering_loss
from .options import Options
from .pairs import pairs_of
from .rounds import joined_rounds, named, proportional, rescale
from .sweep import Progress
from .tokens import batch_of, batches, context_of, device_of, encoded, prompts_for, split

CLIP = 1.0  # norm of the gradient


@dataclass(frozen=True)
class Judged:
    """The held-out pairs at one step.

    Args:
        step: how many were made. loss: of both signs. margins: at +c and −c, nats a token.
        kl: mean over all predicted tokens and both signs. nll: of chosen at +c, rejected at −c.
    """

    step: int
    loss: float
    margins: tuple[float, float]
    kl: float
    nll: tuple[float, float]


@dataclass(frozen=True)
class Round:
    """What a round was.

    Args:
        name: it had. rank: of its adapter. steps: made in all. judged: the held-out pairs, from
            before the first step on. best: the step whose state is kept; 0 where none was better
            than not having the round, which is left out then. calibration: of all rounds so far.
    """

    name: str
    rank: int
    steps: int
    judged: tuple[Judged, ...]
    best: int
    calibration: Calibration | None

    def to_dict(self) -> dict[str, Any]:
        """As JSON has it."""
        return asdict(self)


@dataclass
class Now:
    """The round that is being trained.

    Args:
        number: from 0. optimizer: of its parameters. step: how many were made. best: parameters at
            the best step. judged: see `Round`.
    """

    number: int
    optimizer: torch.optim.Optimizer
    step: int = 0
    best: list[Tensor] = field(default_factory=list)
    judged: list[Judged] = field(default_factory=list)

    @property
    def best_judged(self) -> Judged:
        """The best so far, the first of equal ones."""
        return min(self.judged, key=lambda j: j.loss)

    def go_on(self, step: int, best: list[Tensor], judged: list[Judged]) -> None:
        """Stand where an earlier run of this round was left."""
        self.step, self.best, self.judged = step, best, judged

    def tired(self, patience: int) -> bool:
        """Whether the last looks were no better than the best before."""
        if not self.judged:
            return False
        return len(self.judged) - 1 - self.judged.index(self.best_judged) >= patience


@dataclass(frozen=True)
class Dial:
    """What a run made.

    Args:
        adapter: all rounds as one; it runs at c, from −2 to 2 or so. live: the model's handle, with
            the adapter under the name "dial". rounds: in order.
    """

    adapter: Adapter
    live: Live
    rounds: tuple[Round, ...]


class Run:
    """A run that can be left between two steps, and gone on with (`state.py`).

    Args:
        model: to steer, which nothing is attached to. tokenizer: its own. pairs: see `steer`.
        options: of the run.

    Attributes:
        encoded: the pairs as tokens. train, held: those trained on, and held out. done: rounds that
            have ended. now: the round that is being trained; None between rounds. live: the handle;
            None before the first.
    """

    def __init__(
        self, model: nn.Module, tokenizer: Any, pairs: Sequence[Any], options: Options
    ) -> None:
        self.model, self.tokenizer, self.options = model, tokenizer, options
        self.encoded = encoded(pairs_of(pairs), tokenizer, context_of(model))
        self.train, self.held = split(self.encoded.pairs, options.heldout, options.seed)
        prompts_for(model, self.held, options.tokens)  # now, and not after a round
        self.done: list[Round] = []
        self.now: Now | None = None
        self.live: Live | None = None

    @property
    def ended(self) -> bool:
        """Whether there is no round to come."""
        return len(self.done) >= self.options.rounds or any(r.best == 0 for r in self.done)

    def go(
        self, progress: Progress | None = None, stop: Callable[[], bool] = lambda: False
    ) -> bool:
        """Train until the last round has ended, or between two steps or rounds `stop()` is true.

        Returns:
            Whether the last round has ended.

        Raises:
            MismatchError: a loss that is not finite, or a first round that brings nothing.
        """
        while not self.ended:
            if self.now is None:
                self.begin()
            if not self._trained(progress, stop):
                return False
            self._end()
            if stop():
                return False
        return True

    def restore(self, kept: Mapping[str, tuple[Adapter, float]], done: Sequence[Round]) -> None:
        """Stand behind rounds of an earlier run: {name: (adapter, c)}, and what each was."""
        for name, (adapter, c) in kept.items():
            if self.live is None:
                self.live = attach(self.model, {name: adapter})
            else:
                self.live.add(adapter, name)
            self.live.keep(name, c)
        self.done += done

    def begin(self) -> Now:
        """Attach the next round's adapter."""
        number = len(self.done)
        spec, name = self.options.spec(number), named(number)
        if self.live is None:
            self.live = attach(self.model, {name: spec})
        else:
            self.live.add(spec, name)
        self.live.gate = proportional
        self.now = Now(number, torch.optim.Adam(self.live.parameters(name), self.options.lr))
        return self.now

    def finished(self) -> Dial:
        """The rounds as one adapter, attached in place of them."""
        assert self.live is not None
        adapter = joined_rounds(self.live)
        if self.options.tolerance is not None:
            adapter = adapter.resize(tolerance=self.options.tolerance)
        self.live.detach()
        self.live = attach(self.model, {"dial": adapter})
        return Dial(adapter, self.live, tuple(self.done))

    # A round

    def _trained(self, progress: Progress | None, stop: Callable[[], bool]) -> bool:
        """Make the round's steps that are left; whether it was not stopped before."""
        now, o = self._current, self.options
        rows = batches(self.train, o.batch, o.seed + now.number, skip=now.step)
        with evaluating(self.model), torch.enable_grad():  # dropout would count as movement
            while now.step < o.steps and not now.tired(o.patience):
                if not now.judged:
                    self._judge()
                if stop():
                    return False
                if progress is not None:
                    done = now.number * o.steps + now.step
                    progress(done, o.rounds * o.steps, f"round {now.number + 1}")
                self._step(batch_of(next(rows), device_of(self.model)))
                if now.step % o.every == 0 or now.step == o.steps:
                    self._judge()
        return True

    def _step(self, batch: Any) -> None:
        now, o = self._current, self.options
        name = named(now.number)
        found = self._loss(batch)
        now.optimizer.zero_grad()
        steer_backward(found, self._live, name=name)
        parameters = list(self._live.parameters(name))
        if not finite([*found.losses, *(p.grad for p in parameters if p.grad is not None)]):
            raise MismatchError(
                f"the loss is not finite at step {now.step + 1} of {name}: give a smaller lr=, or "
                "a base in float32"
            )
        torch.nn.utils.clip_grad_norm_(parameters, CLIP)
        for group in now.optimizer.param_groups:
            group["lr"] = o.lr * (1 - now.step / o.steps)
        now.optimizer.step()
        now.step += 1

    def _loss(self, batch: Any) -> Steering:
        o, name = self.options, named(self._current.number)
        own: dict[str, Any] = {"barrier": o.barrier, "cap": o.cap, "reference": o.reference}
        return steering_loss(self.model, self._live, batch, o.c, name=name, **own)

    def _judge(self) -> None:
        """Look at the held-out pairs, and remember the parameters where they are the best."""
        now, total = self._current, torch.zeros(6, dtype=torch.float64)
        size = self.options.batch
        with evaluating(self.model):
            for k in range(0, len(self.held), size):
                part = self.held[k : k + size]
                found = self._loss(batch_of(part, device_of(self.model)))
                numbers = (float(found.loss), *found.margins, float(found.kl.mean()), *found.nll)
                total += len(part) / len(self.held) * torch.tensor(numbers, dtype=torch.float64)
        loss, up, down, kl, *nll = total.tolist()
        if not math.isfinite(loss):
            raise MismatchError(
                f"the held-out loss is not finite after {now.step} steps: give a smaller lr=, or a "
                "base in float32"
            )
        now.judged.append(Judged(now.step, loss, (up, down), kl, (nll[0], nll[1])))
        if now.best_judged is now.judged[-1]:
            now.best = [p.detach().clone() for p in self._live.parameters(named(now.number))]

    def _end(self) -> None:
        """Go back to the best step, calibrate, and keep the round."""
        now, o, live = self._current, self.options, self._live
        name, best = named(now.number), now.best_judged.step
        calibration: Calibration | None = None
        if best == 0 and now.number == 0:
            raise MismatchError(
                f"no step of the first round made the held-out loss less than "
                f"{now.judged[0].loss:.3g}, which it is without an adapter: give another lr=, more "
                "steps= or other pairs"
            )
        with torch.no_grad():
            for p, value in zip(live.parameters(name), now.best, strict=True):
                p.copy_(value)
        if best == 0:
            live.remove(name)
        else:
            c = o.c
            if o.kl is not None:
                prompts = prompts_for(self.model, self.held, o.tokens)
                own: dict[str, Any] = {"name": name, "tokens": o.tokens, "start": o.c}
                calibration = calibrate_c(live, prompts, o.kl, **own)
                c = calibration.c
            live.keep(name)
            rescale(live, c)
        rank, judged = o.spec(now.number).rank, tuple(now.judged)
        self.done.append(Round(name, rank, now.step, judged, best, calibration))
        self.now = None

    @property
    def _current(self) -> Now:
        assert self.now is not None
        return self.now

    @property
    def _live(self) -> Live:
        assert self.live is not None
        return self.live


def steer(
    model: nn.Module,
    tokenizer: Any,
    pairs: Sequence[Any],
    kind: Any = None,
    *,
    progress: Progress | None = None,
    **options: Any,
) -> Dial:
    """Train a dial from pairs of answers: +c raises the chosen, −c the rejected ones.

    Args:
        model: that nothing is attached to, in a float type that trains (float32). tokenizer: of it.
        pairs: `Pair`s, or rows with the columns prompt, chosen and rejected.
        kind: `lf.LoRA` or `lf.PiSSA`, or a list with one for each round; LoRA of rank 8 when None.
        progress: is called with (done, total, stage).
        options: rounds (1), steps (of each round, at most; 100), batch (8), lr (5e-3, falling to
            0; PiSSA takes about four times as much), c (at which it is trained; 1), cap (of the
            margin, nats a token; 1), barrier, reference ("base" or "kept"), kl (that c = 1 is
            calibrated to: 1 nat at the 95th percentile of greedy text; None for no calibration),
            heldout (share of the prompts, of 128 at most; 0.2), every (steps between looks at them;
            10), patience (looks that may bring nothing; 3), tokens (of a continuation; 32),
            tolerance (of `resize`, for the result; None: exact), seed (0).

    Raises:
        MismatchError: pairs or options that are not these; a loss that is not finite; a first round
            that brings nothing. The model is as it was then.

    Not for: training on chosen answers alone, nor ranking by preferences of people (DPO and the
    like, which TRL has): what is trained here is a direction, run at both signs.
    """
    if kind is not None:
        options["kind"] = kind
    try:
        chosen = Options(**options)
    except TypeError as e:
        raise MismatchError(f"steer: {str(e).removeprefix('Options.__init__() ')}") from None
    run = Run(model, tokenizer, pairs, chosen)
    try:
        run.go(progress)
        return run.finished()
    except BaseException:
        if run.live is not None and not run.live.detached:
            run.live.detach()
        raise
