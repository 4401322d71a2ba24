"""How a training run fares, from its losses: stress, calm, or neither.

    φ = |loss − EMA| + w · max(0, loss − the loss before)

is compared with its own mean μ and deviation σ over a window of readings. A reading above μ + 6σ is
hot and stays out of the window, so that a shock doesn't raise the threshold that is to find it. Two
hot readings in a row are stress; a single one may be one bad batch. Readings that stay hot for half
a window are how things are now: the window begins anew with them.

Calm is a mean of the last readings below μ − kσ; it ends above μ.

Given up: what changes more slowly than the window is long is not seen, as the average follows it.
"""

from __future__ import annotations

import math
from collections import deque
from dataclasses import dataclass, field
from typing import Any

from ...errors import MismatchError


@dataclass(frozen=True)
class Tuning:
    """How a sensor judges.

    Args:
        decay: of the moving average of the loss, in [0, 1). rise: w. window: readings of μ and σ.
        warmup: readings before anything is judged. hot: σ above μ of stress. cool: σ above μ below
            which stress ends. calm: σ below μ of calm.
        stable: readings that calm, and the end of stress, are judged by.

    Raises:
        MismatchError: one out of range, naming it.
    """

    decay: float = 0.9
    rise: float = 0.5
    window: int = 64
    warmup: int = 32
    hot: float = 6.0
    cool: float = 2.0
    calm: float = 0.5
    stable: int = 8

    def __post_init__(self) -> None:
        ranges = {"decay": (0, 1), "rise": (0, 1e6), "hot": (0, 1e6), "cool": (0, 1e6)}
        for name, (low, high) in {**ranges, "calm": (0, 1e6)}.items():
            value = getattr(self, name)
            if not isinstance(value, int | float) or not low <= value < high:
                raise MismatchError(f"{name} must lie in [{low}, {high:g}), found {value!r}")
        if self.cool > self.hot:
            raise MismatchError(f"cool ({self.cool}) must not be above hot ({self.hot})")
        for name, least in (("window", 8), ("warmup", 2), ("stable", 1)):
            value = getattr(self, name)
            if isinstance(value, bool) or not isinstance(value, int) or value < least:
                raise MismatchError(
                    f"{name} must be a whole number of at least {least}, found {value!r}"
                )


@dataclass
class Sensor:
    """What was read so far, and how the run fares.

    Args:
        tuning: how it judges.

    Attributes:
        phi: the last reading; None before the second loss.
    """

    tuning: Tuning = field(default_factory=Tuning)
    phi: float | None = None

    def __post_init__(self) -> None:
        self._average: float | None = None
        self._before = 0.0
        self._window: deque[float] = deque(maxlen=self.tuning.window)
        self._hot: list[float] = []
        self._recent: deque[float] = deque(maxlen=self.tuning.stable)
        self._read = 0

    def read(self, loss: float) -> None:
        """Take one finite loss down."""
        t = self.tuning
        if self._average is None:
            self._average = self._before = loss
            return
        self.phi = abs(loss - self._average) + t.rise * max(0.0, loss - self._before)
        self._average = t.decay * self._average + (1 - t.decay) * loss
        self._before = loss
        self._read += 1
        self._recent.append(self.phi)
        if self._read > t.warmup and self.phi > self.above(t.hot):
            self._hot.append(self.phi)
            if 2 * len(self._hot) < t.window:
                return
            self._window.clear()
            self._window.extend(self._hot)
        else:
            self._window.append(self.phi)
        self._hot.clear()

    def above(self, k: float) -> float:
        """μ + kσ."""
        n = len(self._window)
        if not n:
            return math.inf
        mean = math.fsum(self._window) / n
        spread = math.sqrt(math.fsum((x - mean) ** 2 for x in self._window) / n)
        return mean + k * spread

    @property
    def stressed(self) -> bool:
        """Whether the last two readings were hot."""
        return len(self._hot) >= 2

    @property
    def cooled(self) -> bool:
        """Whether all of the last readings are unremarkable."""
        return self._full and max(self._recent) <= self.above(self.tuning.cool)

    @property
    def calm(self) -> bool:
        """Whether the last readings lie clearly below their mean."""
        return self._full and self._lately < self.above(-self.tuning.calm)

    @property
    def stirred(self) -> bool:
        """Whether the last readings lie above their mean."""
        return self._full and self._lately > self.above(0)

    @property
    def _full(self) -> bool:
        return self._read > self.tuning.warmup and len(self._recent) == self.tuning.stable

    @property
    def _lately(self) -> float:
        return math.fsum(self._recent) / len(self._recent)

    def state(self) -> dict[str, Any]:
        """All of it, in JSON's types."""
        return {
            "phi": self.phi,
            "average": self._average,
            "before": self._before,
            "window": list(self._window),
            "hot": list(self._hot),
            "recent": list(self._recent),
            "read": self._read,
        }

    def restore(self, state: dict[str, Any]) -> None:
        """Go on from what `state` gave."""
        self.phi, self._average = state["phi"], state["average"]
        self._before, self._read = state["before"], state["read"]
        self._hot = list(state["hot"])
        for held, key in ((self._window, "window"), (self._recent, "recent")):
            held.clear()
            held.extend(state[key])
