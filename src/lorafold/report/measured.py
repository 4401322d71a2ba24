"""What a collection looks like module by module: norms, spectra, energies, common starts.

One pass over opened adapters, in blocks under a memory limit. All of it is taken from the singular
values of ΔW, so no gauge of the factors shows; what is kept is a few numbers an adapter and module,
and medians over the adapters where there would be more.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass

import numpy as np

from ..collection.batch import singular_values
from ..collection.collection import Collection
from ..collection.groups import init_groups
from ..collection.limits import block_bytes
from ..collection.sources import Handle
from ..compare.anatomy import families_of
from ..errors import RefusedError
from ..thin import threads
from ..words import warn

Advance = Callable[[int, int, str], None]


@dataclass(frozen=True, eq=False)
class Measured:
    """A collection in numbers.

    Args:
        names: (N,) of the adapters. refused: {name: why ΔW algebra would be wrong}, left out.
        paths: (M,) of the modules. shapes: {path: (out, in)}.
        norms: (N, M) ‖ΔW‖_F; nan where an adapter lacks the module.
        energies: (N, R) Σ σ_k² over the modules, by k.
        spectra: {path: (r,) median over the adapters of σ_k / ‖σ‖}.
        ranks: (N,) the largest of any module. parameters: (N,) in all factors.
        groups: side ("V" for A, "U" for B) → (N,) number of the group with one start, −1 for none.
    """

    names: list[str]
    refused: dict[str, str]
    paths: list[str]
    shapes: dict[str, tuple[int, int]]
    norms: np.ndarray
    energies: np.ndarray
    spectra: dict[str, np.ndarray]
    ranks: np.ndarray
    parameters: np.ndarray
    groups: dict[str, np.ndarray]

    def norm(self) -> np.ndarray:
        """(N,) ‖ΔW‖_F over all modules."""
        norms: np.ndarray = np.sqrt(self.energies.sum(1))
        return norms

    def unusual(self) -> np.ndarray:
        """(N,) how far a module's share of an adapter is from what it is in the median adapter.

        In logarithms of ‖ΔW‖ at the module over all of ‖ΔW‖, the largest of any module.
        """
        with np.errstate(divide="ignore", invalid="ignore"):
            shares = np.log(self.norms / self.norm()[:, None])
        shares[~np.isfinite(shares)] = np.nan
        known = ~np.isnan(shares).all(0)
        off = np.abs(shares[:, known] - np.nanmedian(shares[:, known], axis=0))
        largest: np.ndarray = np.nan_to_num(off).max(1, initial=0.0)
        return largest

    def kept(self) -> np.ndarray:
        """(N, R) share of ‖ΔW‖² that the best k directions a module keep, k = 1 … R; nan for 0."""
        whole = self.energies.sum(1, keepdims=True)
        with np.errstate(invalid="ignore"):
            shares: np.ndarray = self.energies.cumsum(1) / whole
        return shares

    def rank_for(self, share: float) -> np.ndarray:
        """(N,) directions a module that keep that share; 0 for a zero update."""
        ranks: np.ndarray = 1 + (self.kept() < share - 1e-9).sum(1)
        return np.where(self.norm() > 0, np.minimum(ranks, self.energies.shape[1]), 0)


def measured(
    handles: Mapping[str, Handle], memory: str | int = "1GiB", progress: Advance | None = None
) -> Measured:
    """Measure opened adapters.

    Args:
        handles: name → handle. Those refused for ΔW algebra are left out, and listed.
        memory: limit for what is held of the collection at once.
        progress: called with (done, total, module).

    Raises:
        MismatchError: adapters that disagree on a shape or on the base.
        RefusedError: all of them are refused.
    """
    refused = {n: str(h.refusal) for n, h in handles.items() if h.refusal is not None}
    used = {n: h for n, h in handles.items() if n not in refused}
    if not used:
        name, reason = next(iter(refused.items()))
        raise RefusedError(f"there is nothing to measure: {name!r}: {reason}")
    c = Collection(used, exact=(), block_bytes=block_bytes(memory))
    for name, reason in refused.items():
        warn(f"{name!r} is left out: {reason}")
    with threads(1 if c.small else None):
        return _measured(c, refused, progress or (lambda done, total, stage: None))


def _measured(c: Collection, refused: dict[str, str], progress: Advance) -> Measured:
    top = max((r for h in c.handles for _, _, r in h.shapes.values()), default=0)
    norms = np.full((len(c.names), len(c.paths)), np.nan)
    energies = np.zeros((len(c.names), max(top, 1)))
    spectra: dict[str, np.ndarray] = {}
    for j, path in enumerate(c.paths):
        progress(j, len(c.paths), path)
        stack = c.stack(path)
        if stack is None:
            continue
        S = np.zeros((len(stack), int(stack.ranks.max())))
        done = 0
        for f in stack.factors():
            found = singular_values(f).cpu().numpy()
            S[done : done + len(found), : found.shape[1]] = found
            done += len(found)
        stack.forget()
        squares = S**2
        norms[stack.members, j] = np.sqrt(squares.sum(1))
        energies[stack.members, : S.shape[1]] += squares
        spectra[path] = _typical(S, norms[stack.members, j])
    return Measured(
        c.names,
        refused,
        c.paths,
        c.shapes,
        norms,
        energies,
        spectra,
        np.array([max((r for *_, r in h.shapes.values()), default=0) for h in c.handles]),
        np.array([sum(r * (m + n) for m, n, r in h.shapes.values()) for h in c.handles]),
        _groups(c),
    )


def _typical(S: np.ndarray, norms: np.ndarray) -> np.ndarray:
    """The median over rows of σ_k / ‖σ‖, 0 beyond a row's rank; zero updates don't count."""
    alive = norms > 0
    if not alive.any():
        return np.zeros(S.shape[1])
    median: np.ndarray = np.median(S[alive] / norms[alive, None], axis=0)
    return median


def _groups(c: Collection) -> dict[str, np.ndarray]:
    stacks = [s for s in map(c.stack, c.paths) if s is not None]
    if c.folded < 2 or not stacks:
        return {}
    return {side: init_groups(stacks, c.folded, side) for side in "VU"}


def by_family(paths: list[str]) -> dict[str, list[tuple[int | None, int]]]:
    """{kind of module: (layer, position in `paths`) of each, by layer}."""
    found: dict[str, list[tuple[int | None, int]]] = {}
    known = families_of(paths)
    for j, path in enumerate(paths):
        family, depth = known[path]
        found.setdefault(family, []).append((depth, j))
    for modules in found.values():
        modules.sort(key=lambda m: (-1 if m[0] is None else m[0], m[1]))
    return found
