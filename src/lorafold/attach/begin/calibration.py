"""How strongly inputs excite the singular directions of each layer's weight: `lf.calibrate`.

The batches are streamed with Vh at hand, and a few sums per direction are all that is kept.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from ...errors import MismatchError, UnknownNameError
from ...layers.kinds import kind_of
from ...layers.modes import called, evaluating
from ...layers.swap import input_of
from ...layers.targets import ALL_LINEAR, DEFAULT_EXCLUDE, as_targets, found_layers
from ...lowrank import same_bits
from ...words import Keyed, Table, did_you_mean


@dataclass(frozen=True, eq=False)
class DirectionStats:
    """Statistics of v_i · x at one layer.

    Args:
        mean_abs: (k,) mean|v_i · x| over all inputs. std: (k,) of the (first) set of inputs.
        other_std: (k,) of the second set.
    """

    mean_abs: Tensor
    std: Tensor
    other_std: Tensor | None = None

    def __eq__(self, other: object) -> bool:
        if not isinstance(other, DirectionStats):
            return NotImplemented
        mine, theirs = ((x.mean_abs, x.std, x.other_std) for x in (self, other))
        return all(
            a is b if a is None or b is None else same_bits(a, b)
            for a, b in zip(mine, theirs, strict=True)
        )

    __hash__ = None  # type: ignore[assignment]


@dataclass(frozen=True)
class Calibration(Keyed, Table, Mapping[str, DirectionStats]):
    """{path: statistics} of a model's layers; made by `lf.calibrate`."""

    stats: Mapping[str, DirectionStats]

    @property
    def contrasted(self) -> bool:
        """Whether there were two sets of inputs."""
        return all(s.other_std is not None for s in self.stats.values())

    def __getitem__(self, path: str) -> DirectionStats:
        try:
            return self.stats[path]
        except KeyError:
            hint = did_you_mean(str(path), self.stats)
            raise UnknownNameError(f"no layer {path!r} in this calibration; {hint}") from None

    def __contains__(self, path: object) -> bool:
        return path in self.stats

    def __repr__(self) -> str:
        return f"Calibration({len(self)} layers, {1 + self.contrasted} sets of inputs)"

    def rows(self) -> list[dict[str, Any]]:
        """A record of each layer: its path, how many directions, and the largest of each figure."""
        figures = ("mean_abs", "std", "other_std")
        return [
            {"path": path, "directions": len(s.std)}
            | {f"largest_{name}": _largest(getattr(s, name)) for name in figures}
            for path, s in self.stats.items()
        ]

    def __iter__(self) -> Iterator[str]:
        return iter(self.stats)

    def __len__(self) -> int:
        return len(self.stats)


def _largest(values: Tensor | None) -> float | None:
    return None if values is None else float(values.max())


def both_sets(x: Any) -> tuple[Any, Any] | None:
    """Chosen and rejected of {"cho": X, "rej": X}, or of the whole words; None of anything else."""
    for names in (("cho", "rej"), ("chosen", "rejected")):
        if isinstance(x, Mapping) and x.keys() == set(names):
            return x[names[0]], x[names[1]]
    return None


def by_path(calibration: Any) -> Any:
    """A calibration by layers, the sets of each a tuple; what is none comes back as it is.

    Raises:
        MismatchError: layers of which it has one set only.
    """
    if isinstance(calibration, Calibration) or not isinstance(calibration, Mapping):
        return calibration
    sets = both_sets(calibration)
    if sets is None or not all(isinstance(s, Mapping) for s in sets):
        return {path: both_sets(X) or X for path, X in calibration.items()}
    chosen, rejected = sets
    if apart := sorted(chosen.keys() ^ rejected.keys()):
        raise MismatchError(f"the calibration has one set only of layer {apart[0]!r}")
    return {path: (X, rejected[path]) for path, X in chosen.items()}


class _Sums:
    """Running sums of z = Vh x, in float64."""

    def __init__(self, Vh: Tensor) -> None:
        self.Vh, self.n = Vh, 0
        self.absolute, self.first, self.second = (
            torch.zeros(len(Vh), dtype=torch.float64, device=Vh.device) for _ in range(3)
        )
        self.shift: Tensor | None = None

    def add(self, x: Tensor) -> None:
        z = (x.detach().reshape(-1, x.shape[-1]).to(self.Vh) @ self.Vh.T).double()
        if self.shift is None:  # near the mean, so that the difference below keeps its digits
            self.shift = z.mean(0)
        self.n += len(z)
        self.absolute += z.abs().sum(0)
        self.first += (z - self.shift).sum(0)
        self.second += (z - self.shift).square().sum(0)

    def std(self) -> Tensor:
        spread = self.second - self.first**2 / max(self.n, 1)
        return (spread.clamp_min(0) / max(self.n - 1, 1)).sqrt().float()


def stats_of(sets: Sequence[Tensor], Vh: Tensor) -> DirectionStats:
    """Statistics of one or two sets of inputs (n, in)."""
    sums = [_Sums(Vh) for _ in sets]
    for s, X in zip(sums, sets, strict=True):
        s.add(X.to(Vh.device))
    return _joined(sums)


def _joined(sums: Sequence[_Sums]) -> DirectionStats:
    n = sum(s.n for s in sums)
    total = torch.stack([s.absolute for s in sums]).sum(0)
    other = sums[1].std() if len(sums) > 1 else None
    return DirectionStats((total / max(n, 1)).float(), sums[0].std(), other)


def calibrate(
    model: nn.Module,
    batches: Iterable[Any],
    rejected: Iterable[Any] | None = None,
    *,
    targets: Any = ALL_LINEAR,
    exclude: Any = DEFAULT_EXCLUDE,
    layers: tuple[float, float] = (0, 1),
) -> Calibration:
    """Run batches through a model, in evaluation mode, and measure its singular directions.

    Args:
        batches: what the model is called with: tensors, tuples of arguments, or mappings of
            keyword arguments. rejected: a second set, to tell apart from the first; both may be
            given at once, as {"cho": batches, "rej": batches}.
        targets, exclude, layers: as for `lf.LoRA`.

    Returns:
        {path: `DirectionStats`}, to be given to `lf.PiSSA(calibration=…)`.

    Raises:
        MismatchError: no batch, a layer that no batch reached, or targets that match nothing.
    """
    if (both := both_sets(batches)) is not None:
        if rejected is not None:
            raise MismatchError("the second set is given twice: leave out rejected=")
        batches, rejected = both
    found = found_layers(
        model, as_targets(targets, "targets"), as_targets(exclude, "exclude"), layers
    )
    sides = {}
    for path, layer in found.items():
        kind = kind_of(layer, path)
        if not kind.linear:
            raise MismatchError(f"module {path!r} is no linear layer: calibrate takes those only")
        sides[path] = torch.linalg.svd(kind.matrix(layer, path), full_matrices=False)[2]
    sets = [_run(model, found, sides, batches)]
    if rejected is not None:
        sets.append(_run(model, found, sides, rejected))
    return Calibration({path: _joined([s[path] for s in sets]) for path in found})


def _run(
    model: nn.Module,
    layers: Mapping[str, nn.Module],
    sides: Mapping[str, Tensor],
    batches: Iterable[Any],
) -> dict[str, _Sums]:
    sums = {path: _Sums(Vh) for path, Vh in sides.items()}

    def hook_of(path: str) -> Any:
        def hook(_: Any, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> None:
            sums[path].add(input_of(args, kwargs))

        return hook

    handles = [
        layer.register_forward_pre_hook(hook_of(path), with_kwargs=True)
        for path, layer in layers.items()
    ]
    try:
        with evaluating(model):
            for batch in batches:
                called(model, batch)
    finally:
        for handle in handles:
            handle.remove()
    silent = [path for path, s in sums.items() if s.n < 2]
    if silent:
        raise MismatchError(f"no batch reached module {silent[0]!r}: there is nothing to measure")
    return sums
