"""What fresh adapters are to be: `LoRA` and `PiSSA`, records that `attach` turns into factors."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field, fields
from numbers import Integral, Real
from typing import Any, Literal, TypeAlias, get_args

import torch

from ...errors import MismatchError
from ...layers.targets import (
    ALL_LINEAR,
    DEFAULT_EXCLUDE,
    Target,
    as_targets,
    matches,
    pattern_hint,
    shown,
)
from ...prefixes import Prefixes
from .calibration import by_path
from .records import Recorded
from .spelled import from_peft

INITS = ("kaiming", "orthogonal", "pissa")
Selection: TypeAlias = Literal["s_only", "wanda", "act_only", "min_std"]
SELECTIONS = get_args(Selection)


@dataclass(frozen=True)
class Spec(Recorded):
    """What both kinds have in common; see `LoRA` and `PiSSA`."""

    rank: int = 16
    targets: Any = ALL_LINEAR
    exclude: Any = DEFAULT_EXCLUDE
    layers: tuple[float, float] = (0, 1)
    modules_to_save: Any = ()
    dtype: torch.dtype = torch.float32
    seed: int | None = None

    def __post_init__(self) -> None:
        _check_whole(self.rank, "rank")
        for name in ("targets", "exclude", "modules_to_save"):
            object.__setattr__(self, name, as_targets(getattr(self, name), name))
        if not self.targets:
            raise MismatchError("targets= names no module")
        band = self.layers
        if not isinstance(band, list | tuple) or len(band) != 2 or not 0 <= band[0] < band[1] <= 1:
            raise MismatchError(f"layers must be a band 0 ≤ lo < hi ≤ 1, found {band!r}")
        if not isinstance(self.dtype, torch.dtype) or not self.dtype.is_floating_point:
            raise MismatchError(f"dtype must be a floating point type, found {self.dtype!r}")
        if self.seed is not None and not isinstance(self.seed, Integral):
            raise MismatchError(f"seed must be a whole number, found {self.seed!r}")


@dataclass(frozen=True)
class LoRA(Spec):
    """A fresh low-rank adapter, s · B A with s = α/r (α/√r with `rslora`).

    Not for: training on from factors that are there (`attach(model, adapter, trainable=True)`), nor
    3-D experts, which PEFT trains.

    Args:
        rank: r; or a LoraConfig of PEFT's, which says this and the rest. alpha: α.
        targets: "all-linear", module names (the path's last components) or compiled patterns.
        exclude: the same, for modules and all inside them.
        layers: a band (lo, hi) of the depth: layers ⌊n · lo⌋ ≤ i < ⌊n · hi⌋ of each stack.
        dropout: of the input while training, in [0, 1].
        rslora: scale α/√r.
        init: "kaiming" (A uniform, B = 0: nothing changes at first), "orthogonal" (A with
            orthonormal rows, B = 0), "pissa" (the leading singular directions of the weight, which
            are subtracted beside it), or "pissa_niter_4" for a randomised SVD of 4 iterations.
        rank_pattern, alpha_pattern: {target: rank or α} for modules of their own.
        modules_to_save: modules that train whole, and are saved with the adapter.
        nested: ranks, ascending, at all of which the adapter is trained to run: a training forward
            at full rank gives the mean of their updates. r itself always is one of them. Not the
            best way to such an adapter: plain training and `Adapter.nested()`, or
            `lf.train.RandomRank`, keep more at every rank (docs/nested.md).
        dtype: of the factors. seed: of A.

    Raises:
        MismatchError: an option out of range, or one that is called otherwise here, naming it.

    Examples:
        >>> import torch, lorafold as lf
        >>> model = torch.nn.Sequential(torch.nn.Linear(32, 64))
        >>> live = lf.attach(model, lf.LoRA(rank=8, targets="0"))
        >>> sum(p.numel() for p in live.parameters())
        768
    """

    alpha: float = 32
    dropout: float = 0.0
    rslora: bool = False
    init: str = "kaiming"
    rank_pattern: Mapping[Target, int] = field(default_factory=dict)
    alpha_pattern: Mapping[Target, float] = field(default_factory=dict)
    nested: tuple[int, ...] | None = None

    def __post_init__(self) -> None:
        if hasattr(self.rank, "peft_type"):
            self._take_over(self.rank)
        super().__post_init__()
        _check_positive(self.alpha, "alpha")
        if not isinstance(self.dropout, int | float) or not 0 <= self.dropout <= 1:
            raise MismatchError(f"dropout must lie in [0, 1], found {self.dropout!r}")
        if self.init not in INITS and self.niter is None:
            raise MismatchError(
                f"init must be one of {', '.join(INITS)} or pissa_niter_<n>, found {self.init!r}"
            )
        for target, r in self.rank_pattern.items():
            _check_whole(r, f"rank_pattern[{target!r}]")
        for target, alpha in self.alpha_pattern.items():
            _check_positive(alpha, f"alpha_pattern[{target!r}]")
        if self.nested is not None:
            object.__setattr__(self, "nested", _nested(self.nested, self.rank))
            if self.init.startswith("pissa"):
                raise MismatchError(
                    f"nested= can't begin with init={self.init!r}, which is saved with its start "
                    "beside it, at twice the rank: choose 'kaiming' or 'orthogonal'"
                )

    def _take_over(self, config: Any) -> None:
        found = from_peft(config)
        usual = {f.name: f.default for f in fields(self)}
        for name, value in found.items():
            mine = None if name == "rank" else getattr(self, name) or None
            if mine not in (None, usual[name]):
                raise MismatchError(f"{name}= is the config's word already: leave it out")
            object.__setattr__(self, name, value)

    @property
    def niter(self) -> int | None:
        """Iterations of the randomised SVD that `init` asks for; None for none."""
        head, _, count = self.init.rpartition("_")
        return int(count) if head == "pissa_niter" and count.isdecimal() else None

    def check_patterns(self, paths: Iterable[str]) -> None:
        """Raise a `MismatchError` for a key of a pattern that means none of the paths."""
        paths = list(paths)
        for label in ("rank_pattern", "alpha_pattern"):
            for target in getattr(self, label):
                if not any(matches(target, path) for path in paths):
                    raise MismatchError(
                        f"{label} names {shown(target)}, which matches no module attached to"
                        f"{pattern_hint(target)}"
                    )

    def rank_at(self, path: str) -> int:
        """r of the module at `path`."""
        return next((r for t, r in self.rank_pattern.items() if matches(t, path)), self.rank)

    def scale_at(self, path: str) -> float:
        """s of the module at `path`."""
        alpha = next((a for t, a in self.alpha_pattern.items() if matches(t, path)), self.alpha)
        r = self.rank_at(path)
        return alpha / (math.sqrt(r) if self.rslora else r)


@dataclass(frozen=True)
class PiSSA(Spec):
    """A trainable change Δs of chosen singular values of the weights: W + U diag(Δs) Vh.

    The weight is never altered; r numbers a layer are trained.

    Not for: PEFT's initialisation of that name, which trains whole factors: `LoRA(init="pissa")`.

    Args:
        rank: r, how many directions; clamped to what a layer has.
        select: by which score they are chosen: "s_only" S_i; "wanda" S_i · mean|v_i · x|;
            "act_only" mean|v_i · x|; "min_std" min(std₁, std₂) of v_i · x over two sets of inputs.
            By default "s_only", or "min_std" when the calibration has two sets.
        calibration: what `lf.calibrate` returned, or inputs X (n, in) of each layer: {path: X},
            {path: (X₁, X₂)}, {path: {"cho": X₁, "rej": X₂}} or {"cho": {path: X₁}, "rej": …}.
        niter: a randomised SVD of that many iterations instead of the exact one ("s_only" only).
        mean, std: of Δs at the start. A small positive mean breaks the symmetry of ±c.
        targets, exclude, layers, modules_to_save, dtype, seed: as for `LoRA`; Δs is float32.

    Raises:
        MismatchError: an option out of range, naming it.
    """

    rank: int = 256
    select: Selection | None = None
    calibration: Any = None
    niter: int | None = None
    mean: float = 0.0
    std: float = 0.0

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.select is not None and self.select not in SELECTIONS:
            longer = [name for name in SELECTIONS if name in str(self.select)]
            hint = f"; it is {longer[0]!r} here" if longer else ""
            raise MismatchError(
                f"select must be one of {', '.join(SELECTIONS)}, found {self.select!r}{hint}"
            )
        object.__setattr__(self, "calibration", by_path(self.calibration))
        start = (self.mean, self.std)
        if not all(isinstance(v, Real) and math.isfinite(v) for v in start) or self.std < 0:
            raise MismatchError(f"mean and std must be finite, std ≥ 0; found {start}")
        if self.niter is not None:
            _check_whole(self.niter, "niter")
            if self.select not in (None, "s_only"):
                raise MismatchError("niter= finds the leading directions only: select 's_only'")


def _nested(ranks: Any, rank: int) -> tuple[int, ...]:
    """Ranks to train at, the adapter's own among them."""
    found = Prefixes(ranks).ranks
    if found and found[-1] > rank:
        raise MismatchError(f"nested= names rank {found[-1]}, above the adapter's own, {rank}")
    return found if found and found[-1] == rank else (*found, rank)


def _check_whole(value: Any, label: str) -> None:
    if isinstance(value, bool) or not isinstance(value, Integral) or value < 1:
        raise MismatchError(f"{label} must be a whole number of at least 1, found {value!r}")


def _check_positive(value: Any, label: str) -> None:
    if isinstance(value, bool) or not isinstance(value, Real) or not 0 < float(value) < math.inf:
        raise MismatchError(f"{label} must be a positive number, found {value!r}")
