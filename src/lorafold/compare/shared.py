"""`shared_spectrum`: how much of a collection a few shared directions explain, beside chance.

At each module, k directions of the outputs hold at most the share Σ_{j≤k} λ_j / Σ λ_j of the energy
Σ_i ‖ΔW_i‖², λ the eigenvalues of Σ_i ΔW_i ΔW_iᵀ (Eckart–Young on the stack); the inputs likewise. A
share is high where there are few adapters of low rank, whatever they hold. So beside it stands the
same of random adapters: the singular values of the real ones with random singular vectors. What
lies above that is shared; what does not is arithmetic.

In `space="factors"` the same is asked of the flattened factors less their mean, which is what vLoRA
calls variance explained: a common start is in it, and the gauge.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterator
from dataclasses import dataclass
from numbers import Integral
from typing import Any, Literal, TypeAlias, get_args

import numpy as np
import torch
from torch import Tensor

from ..collection.batch import decompose, gram
from ..collection.sources import named_handles
from ..errors import MismatchError
from ..words import one_of
from .pairs import Pairs, Progress

_WHOLE = 1024  # a Gram of no more rows is diagonalised; of a larger one the first directions found
_MOST = 64  # directions found of a larger one
Space: TypeAlias = Literal["delta", "factors"]
_SPACES = get_args(Space)


@dataclass(frozen=True, eq=False)
class SharedSide:
    """One side of one module.

    Args:
        path: the module. side: "out" or "in"; "B" or "A" in the space of factors.
        adapters: how many have it. rank: their ranks, summed.
        size: the energy Σ ‖ΔW_i‖² (of the factors, less their mean) that shares are of.
        energy: (K,) share of it that the first 1 … K directions explain. control: (K,) the same of
            random adapters.
    """

    path: str
    side: str
    adapters: int
    rank: int
    size: float
    energy: np.ndarray
    control: np.ndarray


@dataclass(frozen=True, eq=False)
class SharedSpectrum:
    """What a collection shares, per module and side. Made by `shared_spectrum`.

    Not for: the bases themselves (`fold` finds and stores those).

    Args:
        names: the adapters. space: "delta" or "factors". rows: two for each module.
    """

    names: tuple[str, ...]
    space: str
    rows: tuple[SharedSide, ...]

    def __repr__(self) -> str:
        return (
            f"SharedSpectrum({len(self.names)} adapters, {len(self.rows)} sides, 8 directions "
            f"explain {self.share(8):.1%}, {self.control(8):.1%} of random ones)"
        )

    def share(self, k: int) -> float:
        """Share of all energy that k directions of every side explain.

        Raises:
            MismatchError: k below 1.
        """
        return self._mean(k, "energy")

    def control(self, k: int) -> float:
        """The same of random adapters."""
        return self._mean(k, "control")

    def _mean(self, k: int, which: str) -> float:
        if isinstance(k, bool) or not isinstance(k, Integral) or k < 1:
            raise MismatchError(f"k must be a whole number of at least 1, found {k!r}")
        weights = np.array([row.size for row in self.rows])
        if not weights.sum() > 0:
            return 0.0
        # Of fewer directions than k, all that there are (or were looked for).
        shares = np.array([getattr(r, which)[min(k, len(r.energy)) - 1] for r in self.rows])
        return float((weights / weights.sum()) @ shares)


def shared_spectrum(
    sources: Any,
    *,
    space: Space = "delta",
    seed: int = 0,
    memory: str | int = "1GiB",
    progress: Progress | None = None,
) -> SharedSpectrum:
    """The share of a collection's energy that k shared directions explain, and that of chance.

    Args:
        sources: paths, globs, `Adapter`s, a `Library`, or {name: either}; read module by module.
        space: "delta", or "factors" for what vLoRA calls variance explained (smaller ranks are
            padded with zeros there).
        seed: of the random adapters.
        memory: limit for what is read of the collection at once, in "delta".
        progress: called with (done, total, module).

    Returns:
        A `SharedSpectrum`.

    Raises:
        MismatchError: no sources, adapters over different bases, an unknown space.
        RefusedError: ΔW algebra would be wrong for a source; naming it and the remedy.

    Not for: how many bytes sharing saves (`fold` tries that).

    Examples:
        >>> import torch, lorafold as lf
        >>> a = lf.Adapter({"q": lf.LowRank(torch.randn(2, 32), torch.randn(16, 2))})
        >>> found = lf.shared_spectrum({"one": a, "two": 3 * a})
        >>> round(found.share(2), 4), found.control(2) < 0.999
        (1.0, True)
    """
    if space not in _SPACES:
        raise MismatchError(f"space must be {one_of(_SPACES)}, found {space!r}")
    pairs = Pairs(named_handles(sources), memory, progress)
    rows = _delta_rows if space == "delta" else _factor_rows
    found = tuple(row for path in pairs.modules() for row in rows(pairs, path, seed))
    return SharedSpectrum(tuple(pairs.collection.names), space, found)


def _delta_rows(pairs: Pairs, path: str, seed: int) -> Iterator[SharedSide]:
    shape = pairs.collection.shapes[path]
    rank = pairs.total_rank(path)
    generator = _generator(seed, path)
    real = [_Gram(d, rank) for d in shape]
    random = [_Gram(d, rank) for d in shape]
    adapters, size, unit = 0, 0.0, 0.0
    for x in pairs.units(path):
        f = x.factors()
        U, S, V = decompose(f.B, f.A)
        largest = float(x.norms.max())
        if largest > unit:  # the largest so far has norm 1, so that all squares are float32's
            for one in (*real, *random):
                one.shrink(unit / largest)
            unit = largest
        S = S * torch.as_tensor(abs(x.scales) / (unit or 1.0), device=S.device)[:, None]
        adapters, size = adapters + len(x.members), size + float((x.norms**2).sum())
        for k, vectors in enumerate((U, V)):
            real[k].add(vectors, S)
            random[k].add(_orthonormal(vectors, generator), S)
    for k, side in enumerate(("out", "in")):
        share = size / unit**2 if unit else 0.0
        energy, control = (g[k].energy(share, generator) for g in (real, random))
        yield SharedSide(path, side, adapters, rank, size, energy, control)


def _factor_rows(pairs: Pairs, path: str, seed: int) -> Iterator[SharedSide]:
    generator = _generator(seed, path)
    f = pairs.factors(path)
    for side, X in (("B", f.B), ("A", f.A)):
        flat = X.flatten(1).double()
        random = torch.randn(flat.shape, generator=generator, dtype=torch.float32).to(flat)
        random *= flat.norm(dim=1, keepdim=True) / random.norm(dim=1, keepdim=True)
        spectra = [_variances(t) for t in (flat, random)]
        energy, control = (
            np.cumsum(s) / s.sum() if s.sum() > 0 else np.zeros_like(s) for s in spectra
        )
        yield SharedSide(
            path,
            side,
            len(f.members),
            pairs.total_rank(path),
            float(spectra[0].sum()),
            energy,
            control,
        )


def _variances(flat: Tensor) -> np.ndarray:
    """Eigenvalues, descending, of the Gram of rows less their mean."""
    centred = flat - flat.mean(0)
    values: np.ndarray = torch.linalg.eigvalsh(centred @ centred.T).flip(0).clamp_min(0).numpy()
    return values


class _Gram:
    """XᵀX of columns that come in pieces, or X Xᵀ where that is smaller.

    Args:
        d: length of a column. count: how many there will be.
    """

    def __init__(self, d: int, count: int) -> None:
        self._whole = torch.zeros(d, d, dtype=torch.float64) if count > d else None
        self._pieces: list[Tensor] = []

    def add(self, vectors: Tensor, S: Tensor) -> None:
        """Take in columns (n, d, k), each times its S (n, k)."""
        X = (vectors * S.to(vectors.dtype)[:, None, :]).mT.flatten(0, 1).cpu()
        if self._whole is None:
            self._pieces.append(X)
        else:
            self._whole += X.T @ X

    def shrink(self, factor: float) -> None:
        """Multiply all columns so far."""
        self._pieces = [factor * piece for piece in self._pieces]
        if self._whole is not None:
            self._whole *= factor**2

    def energy(self, size: float, generator: torch.Generator) -> np.ndarray:
        """Cumulative share of `size` of the leading eigenvalues."""
        G = self._whole
        if G is None:
            X = torch.cat(self._pieces)
            G = (X @ X.T).double()
        shares = _leading(G, generator).flip(0).clamp_min(0).cumsum(0).cpu().numpy()
        result: np.ndarray = (shares / size).clip(max=1) if size > 0 else 0 * shares
        return result


def _leading(G: Tensor, generator: torch.Generator) -> Tensor:
    """Eigenvalues, ascending: all, or of a large matrix the largest by subspace iteration."""
    if len(G) > _WHOLE:
        Q = torch.randn(len(G), _MOST + 16, generator=generator, dtype=G.dtype)
        for _ in range(4):
            Q = torch.linalg.qr(G @ Q)[0]
        found: Tensor = torch.linalg.eigvalsh(Q.T @ G @ Q)[-_MOST:]
        return found
    values: Tensor = torch.linalg.eigvalsh(G)
    return values


def _orthonormal(like: Tensor, generator: torch.Generator) -> Tensor:
    """Random orthonormal columns, batched, of the same shape (n, d, k)."""
    Z = torch.randn(like.shape, generator=generator, dtype=torch.float32).to(like)
    R = torch.linalg.cholesky(gram(Z), upper=True)
    eye = torch.eye(Z.shape[2], dtype=R.dtype, device=R.device)
    inverse: Tensor = torch.linalg.solve_triangular(R, eye.expand_as(R), upper=True)
    return Z @ inverse.to(Z.dtype)


def _generator(seed: int, path: str) -> torch.Generator:
    digest = hashlib.sha256(f"control\0{seed}\0{path}".encode("utf-8", "surrogatepass")).digest()
    return torch.Generator().manual_seed(int.from_bytes(digest[:7], "big"))
