"""One update in factored form, ΔW = scale · B A, and its exact algebra.

Nothing here builds the (out, in) matrix except `dense`. Everything follows from two thin QRs,
B = Q_B R_B and Aᵀ = Q_A R_A, which turn any question on ΔW into one on the small core
scale · R_B R_Aᵀ: O((out + in) r²) instead of O(out · in · r). (Golub & Van Loan, Matrix
Computations, ch. 5; optimality of truncation: Eckart & Young 1936.)

A and B by themselves mean nothing: (B G, G⁻¹ A) is the same update for every invertible G.
"""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from dataclasses import dataclass
from numbers import Integral, Real
from typing import Any, TypeVar

import torch
from torch import Tensor

from .errors import MismatchError
from .thin import thin

_DTYPES = (torch.float16, torch.bfloat16, torch.float32, torch.float64)
# ‖ΔW‖ below this share of Σ ‖b_k‖ ‖a_k‖: the terms cancel, and float32 loses what is left.
_CANCELS = 1e-3
_NOISE = 1e-14  # a share of that sum that is rounding in float64 too
_LOW, _HIGH = 2.0**-112, 2.0**120  # largest numbers of a factor between keep float32's precision


V = TypeVar("V", bound="Vector")


class Vector(ABC):
    """Differences, multiples and sums of many, from `+` and a product with a number."""

    __slots__ = ()
    # NumPy would take a mapping for an array; its scalars leave `c * x` to `__rmul__`.
    __array_ufunc__ = None

    @abstractmethod
    def __add__(self: V, other: V) -> V: ...

    @abstractmethod
    def __mul__(self: V, c: float) -> V: ...

    def __radd__(self: V, other: int) -> V:
        """So that `sum` adds them: it begins with 0."""
        if type(other) is int and other == 0:
            return self
        return NotImplemented

    def __sub__(self: V, other: V) -> V:
        return self + -other

    def __rmul__(self: V, c: float) -> V:
        return self.__mul__(c)

    def __truediv__(self: V, c: float) -> V:
        if not isinstance(c, Real):
            return NotImplemented
        return self.__mul__(1 / float(c))

    def __neg__(self: V) -> V:
        return self.__mul__(-1.0)


@dataclass(frozen=True, eq=False)
class LowRank(Vector):
    """An update ΔW = scale · B @ A of shape (out, in), kept as its factors.

    Not for: many updates of one shape at once, which `collection.batch` takes in one product each.

    Args:
        A: (r, in), float16, bfloat16, float32 or float64.
        B: (out, r), same device as A.
        scale: the number that multiplies the product, α/r for a plain LoRA.

    Raises:
        MismatchError: factors that are not 2-D, disagree on r or device, are of another dtype, or
            hold NaN or infinity; a scale that is no finite number.

    Examples:
        >>> import torch
        >>> u = LowRank(torch.ones(1, 3), torch.ones(2, 1), scale=2.0)
        >>> u.shape, u.rank, round(u.norm(), 3)
        ((2, 3), 1, 4.899)
    """

    A: Tensor
    B: Tensor
    scale: float = 1.0

    def __post_init__(self) -> None:
        A, B = self.A, self.B
        for letter, t in (("A", A), ("B", B)):
            if not isinstance(t, Tensor):
                raise MismatchError(f"{letter} must be a torch tensor, not {type(t).__name__}")
            if t.ndim != 2 or 0 in t.shape:
                raise MismatchError(
                    f"{letter} must be a non-empty matrix (A (r, in), B (out, r)), "
                    f"found shape {tuple(t.shape)}"
                )
            if t.dtype not in _DTYPES:
                raise MismatchError(
                    f"{letter} must be float16, bfloat16, float32 or float64, found {t.dtype}; "
                    "convert it first"
                )
        if A.shape[0] != B.shape[1]:
            raise MismatchError(
                f"ranks disagree: A {tuple(A.shape)} has {A.shape[0]} rows, "
                f"B {tuple(B.shape)} has {B.shape[1]} columns"
            )
        if A.device != B.device:
            raise MismatchError(f"A is on {A.device}, B on {B.device}; move one of them")
        if not isinstance(self.scale, Real | Tensor) or not math.isfinite(self.scale):
            raise MismatchError(f"scale must be a finite number, found {self.scale!r}")
        for letter, t in (("A", A), ("B", B)):
            if not t.is_meta and not _is_finite(t):
                raise MismatchError(f"{letter} holds NaN or infinite values")
        object.__setattr__(self, "scale", float(self.scale))

    # What it is

    @property
    def rank(self) -> int:
        """Number of rows of A and columns of B (an upper bound on the rank of ΔW)."""
        return int(self.A.shape[0])

    @property
    def shape(self) -> tuple[int, int]:
        """(out, in)."""
        return int(self.B.shape[0]), int(self.A.shape[1])

    @property
    def num_parameters(self) -> int:
        """Numbers in A and B together."""
        return self.A.numel() + self.B.numel()

    @property
    def _work_dtype(self) -> torch.dtype:
        dtype = torch.promote_types(self.A.dtype, self.B.dtype)
        return torch.promote_types(dtype, torch.float32)

    def __repr__(self) -> str:
        dtype = str(self.A.dtype).removeprefix("torch.")
        size = f"{self.shape[0]}×{self.shape[1]}, rank {self.rank}"
        return f"LowRank({size}, scale {self.scale:g}, {dtype})"

    # Measures

    @thin
    def norm(self) -> float:
        """Frobenius norm of ΔW.

        Raises:
            MismatchError: it is too large for float64.
        """
        core = _core(self)[1]
        top = _largest(core) or 1.0  # of whose entries the squares need not overflow
        found = top * float(torch.linalg.matrix_norm(core / top).item())
        if not math.isfinite(found):
            raise MismatchError("the norm of an update is too large for float64")
        return found

    @thin
    def inner(self, other: LowRank) -> float:
        """Frobenius inner product ⟨ΔW, ΔW'⟩ = tr(ΔWᵀ ΔW').

        Raises:
            MismatchError: shapes differ, or the product is too large for float64.
        """
        _same_shape(self, other)
        dtype = torch.promote_types(self._work_dtype, other._work_dtype)
        BB, AA = _product(self.B.T, other.B, dtype), _product(self.A, other.A.T, dtype)
        found = self.scale * other.scale * float((BB * AA).sum().item())
        if not math.isfinite(found):
            raise MismatchError("the numbers of two updates are too large to multiply")
        return found

    @thin
    def svd(self) -> tuple[Tensor, Tensor, Tensor]:
        """Singular value decomposition of ΔW from its factors.

        Returns:
            U (out, k), S (k,) descending, Vh (k, in), with k = min(r, out, in); float32, or
            float64 where a factor is. S is float64, too, where float32 can't hold it.

        Raises:
            MismatchError: numbers too large for products in float64.
        """
        (Q_B, Q_A), core = _core(self)
        U, S, Vh = torch.linalg.svd(core, full_matrices=False)
        dtype = self._work_dtype
        return Q_B @ U.to(dtype), _held(S, dtype), Vh.to(dtype) @ Q_A.T

    @thin
    def spectrum(self) -> Tensor:
        """Singular values of ΔW, (min(r, out, in),), descending; as in `svd`."""
        return _held(torch.linalg.svdvals(_core(self)[1]), self._work_dtype)

    # Other forms of the same update, and lower-rank ones

    @thin
    def truncate(
        self,
        rank: int | None = None,
        energy: float | None = None,
        tolerance: float | None = None,
    ) -> LowRank:
        """The best update of lower rank (Eckart–Young), balanced. Give exactly one of:

        Args:
            rank: keep this many directions, at least 1; more than there are keeps all.
            energy: keep the fewest directions with this share of ‖ΔW‖², in (0, 1].
            tolerance: keep the fewest directions with ‖ΔŴ − ΔW‖ ≤ tolerance · ‖ΔW‖, in [0, 1).

        Returns:
            A `LowRank` with scale 1 and rank at least 1.

        Raises:
            MismatchError: not exactly one option, or one out of range.
        """
        U, S, Vh = self.svd()
        k = kept_directions(S, rank=rank, energy=energy, tolerance=tolerance)
        return from_svd(U[:, :k], S[:k], Vh[:k])

    @thin
    def balanced(self) -> LowRank:
        """The same update in the gauge A Aᵀ = Bᵀ B = diag(S): every rank prefix is the best one.

        Returns:
            A `LowRank` with scale 1 and rank min(r, out, in).
        """
        return from_svd(*self.svd())

    @thin
    def unscaled(self, dtype: torch.dtype | None = None) -> LowRank:
        """The same update with its scale multiplied into B, in `dtype` (float32 at least if None).

        Numbers that float32 can't hold well are evened out: A and B are both brought to the square
        root of their product's size, by a power of two, which is exact.
        """
        dtype = dtype or self._work_dtype
        A, B = self.A.to(dtype), self.B.to(dtype) * self.scale
        if A.is_meta or all(_LOW < _largest(t) < _HIGH for t in (A, B)):
            return LowRank(A, B)
        (_, e_A), (_, e_B) = (math.frexp(_largest(t)) for t in (self.A, self.B))
        scale, e = math.frexp(self.scale)
        half = (e_A + e_B + e) // 2
        A = _times_power(self.A.double(), half - e_A)
        B = _times_power(self.B.double() * scale, e_A + e - half)
        return LowRank(A.to(dtype), B.to(dtype))

    def prefix(self, rank: int) -> LowRank:
        """The first `rank` rows of A and columns of B, at the same scale.

        Raises:
            MismatchError: rank not in 1 … r.
        """
        if not 1 <= rank <= self.rank:
            raise MismatchError(f"rank prefix must lie in 1 … {self.rank}, found {rank}")
        return LowRank(self.A[:rank], self.B[:, :rank], self.scale)

    def to(self, device: Any = None, dtype: torch.dtype | None = None) -> LowRank:
        """A copy on `device` in `dtype` (each left as it is when None).

        Raises:
            MismatchError: the dtype can't hold how large A or B is.
        """
        A = self.A.to(device=device, dtype=dtype)
        B = self.B.to(device=device, dtype=dtype)
        try:
            return LowRank(A, B, self.scale)
        except MismatchError as e:
            largest = max(float(t.abs().max()) for t in (self.A, self.B))
            if dtype is None or not dtype.is_floating_point or largest <= torch.finfo(dtype).max:
                raise
            name = str(dtype).removeprefix("torch.")
            raise MismatchError(
                f"it has numbers up to {largest:.3g}, which {name} can't hold; bfloat16 and "
                "float32 go up to 3e38"
            ) from e

    def dense(self) -> Tensor:
        """ΔW itself, (out, in), float32 at least: the one place where the full matrix is built."""
        dtype = self._work_dtype
        return (self.B.to(dtype) @ self.A.to(dtype)).mul_(self.scale)  # in place: it may be large

    # Equal means identical, to the bit of each number

    def __eq__(self, other: object) -> bool:
        if not isinstance(other, LowRank):
            return NotImplemented
        same = self.scale == other.scale
        return same and same_bits(self.A, other.A) and same_bits(self.B, other.B)

    def __hash__(self) -> int:
        return hash((self.shape, self.rank, self.scale))

    # Algebra

    def __call__(self, x: Tensor) -> Tensor:
        """x ΔWᵀ through the factors.

        Args:
            x: (..., in), floating point.

        Returns:
            (..., out) in x's dtype; computed in float32 at least.

        Raises:
            MismatchError: x does not end in `in` entries, or is not floating point.
        """
        if x.ndim == 0 or x.shape[-1] != self.A.shape[1]:
            raise MismatchError(f"x {tuple(x.shape)} must end in {self.A.shape[1]} entries")
        if not x.is_floating_point():  # the result would be cut to whole numbers
            raise MismatchError(f"x must be floating point, found {x.dtype}")
        dtype = torch.promote_types(self._work_dtype, x.dtype)
        y = (x.to(dtype) @ self.A.to(dtype).T) @ self.B.to(dtype).T
        return (self.scale * y).to(x.dtype)

    def __add__(self, other: LowRank) -> LowRank:
        """Exact sum: the factors are concatenated, so ranks add and no cross terms appear."""
        if not isinstance(other, LowRank):
            return NotImplemented
        _same_shape(self, other)
        dtype = torch.promote_types(self._work_dtype, other._work_dtype)
        if self.scale == other.scale:
            pair, scale = (self, other), self.scale
        else:
            pair, scale = (self.unscaled(dtype), other.unscaled(dtype)), 1.0
        A = torch.cat([u.A.to(dtype) for u in pair])
        B = torch.cat([u.B.to(dtype) for u in pair], 1)
        return LowRank(A, B, scale)

    def __mul__(self, c: float) -> LowRank:
        """c · ΔW: only the scale changes."""
        if not isinstance(c, Real):
            return NotImplemented
        return LowRank(self.A, self.B, self.scale * float(c))


def _core(u: LowRank) -> tuple[tuple[Tensor, Tensor], Tensor]:
    """Q_B (out, p), Q_A (in, q) and the float64 core (p, q) with ΔW = Q_B core Q_Aᵀ.

    Where the factors cancel so far that their dtype loses digits, or are so large that their
    lengths overflow it, from float64 throughout; what is no more than rounding in that is 0.
    """
    dtype = u._work_dtype
    sides, core, size = _core_in(u, dtype)
    length = torch.linalg.matrix_norm(core)
    if u.A.is_meta or bool((length >= _CANCELS * size) & length.isfinite()):
        return sides, u.scale * core
    (Q_B, Q_A), core, size = _core_in(u, torch.float64)
    noise = (torch.linalg.matrix_norm(core) <= _NOISE * size) & size.isfinite()
    core = u.scale * torch.where(noise, 0.0, core)
    if not bool(core.isfinite().all()):
        raise MismatchError(
            f"its numbers are too large to multiply: A up to {_largest(u.A):.3g}, B up to "
            f"{_largest(u.B):.3g}, scale {u.scale:.3g}"
        )
    return (Q_B.to(dtype), Q_A.to(dtype)), core


def _core_in(u: LowRank, dtype: torch.dtype) -> tuple[tuple[Tensor, Tensor], Tensor, Tensor]:
    """The same without the scale, from QRs in `dtype`, and Σ ‖b_k‖ ‖a_k‖."""
    Q_B, R_B = torch.linalg.qr(u.B.to(dtype))
    Q_A, R_A = torch.linalg.qr(u.A.to(dtype).T)
    R_B, R_A = R_B.double(), R_A.double()
    size = torch.linalg.vector_norm(R_B, dim=0) @ torch.linalg.vector_norm(R_A, dim=0)
    return (Q_B, Q_A), R_B @ R_A.T, size


def same_bits(a: Tensor, b: Tensor) -> bool:
    """Whether two tensors have the same dtype, shape and bits, wherever they are."""
    if a.dtype != b.dtype or a.shape != b.shape:
        return False
    a, b = (t.detach().cpu().contiguous().reshape(-1).view(torch.uint8) for t in (a, b))
    return torch.equal(a, b)


def _product(X: Tensor, Y: Tensor, dtype: torch.dtype) -> Tensor:
    """X Y in float64, from a product in `dtype` where that holds it: a gauge may be of any size."""
    product = (X.to(dtype) @ Y.to(dtype)).double()
    largest = product.detach().abs().max().item()
    if 1e-20 < largest < 1e30 or dtype == torch.float64:
        return product
    return X.double() @ Y.double()


def _largest(t: Tensor) -> float:
    # Ten times as fast as the norm of order infinity, or as looking at every number; NaN stays.
    return float(t.detach().abs().amax()) if t.numel() else 0.0


@thin
def _is_finite(t: Tensor) -> bool:
    # A finite sum has finite terms, and is found without a second tensor.
    return math.isfinite(t.sum().item()) or bool(torch.isfinite(t).all())


def _times_power(t: Tensor, k: int) -> Tensor:
    """2^k · t: in two steps, as a power that float64 can't hold may lead to what it can."""
    k = min(max(k, -2_000), 2_000)
    return t * 2.0 ** (k // 2) * 2.0 ** (k - k // 2)


def _held(S: Tensor, dtype: torch.dtype) -> Tensor:
    """Float64 numbers in a dtype, unless they overflow it."""
    found = S.to(dtype)
    return found if S.is_meta or bool(found.isfinite().all()) else S


def from_svd(U: Tensor, S: Tensor, Vh: Tensor) -> LowRank:
    """The balanced update U diag(S) Vh with √S on either side.

    Args:
        U: (out, k) orthonormal columns. S: (k,) ≥ 0. Vh: (k, in) orthonormal rows.
    """
    root = S.clamp_min(0).sqrt().to(U.dtype)
    return LowRank(root[:, None] * Vh, U * root)


def kept_directions(
    S: Tensor,
    *,
    rank: int | None = None,
    energy: float | None = None,
    tolerance: float | None = None,
) -> int:
    """How many leading directions of the spectrum S a truncation keeps: between 1 and len(S).

    Args:
        S: (k,) singular values, descending.
        rank, energy, tolerance: as in `LowRank.truncate`; exactly one.
    """
    given = {"rank": rank, "energy": energy, "tolerance": tolerance}
    named = [name for name, value in given.items() if value is not None]
    if len(named) != 1:
        found = " and ".join(named) if named else "none"
        raise MismatchError(f"give exactly one of rank, energy, tolerance; found {found}")
    if rank is not None:
        if isinstance(rank, bool) or not isinstance(rank, Integral) or rank < 1:
            raise MismatchError(f"rank must be a whole number of at least 1, found {rank!r}")
        return min(int(rank), len(S))
    square = S.double() ** 2
    tail = square.flip(0).cumsum(0).flip(0)  # tail[k] = Σ_{i ≥ k} σ², summed from the small end
    if energy is not None:
        if not 0 < energy <= 1:
            raise MismatchError(f"energy must lie in (0, 1], found {energy}")
        allowed = (1 - energy) * tail[0]
    else:
        assert tolerance is not None
        if not 0 <= tolerance < 1:
            raise MismatchError(f"tolerance must lie in [0, 1), found {tolerance}")
        allowed = tolerance**2 * tail[0]
    return max(1, int((tail > allowed).sum()))


def cosine(inner: float, norm: float, other: float) -> float:
    """Cosine from an inner product and the two norms; 0 when either is zero."""
    scale = norm * other
    return max(-1.0, min(1.0, inner / scale)) if scale > 0 else 0.0


def _same_shape(u: LowRank, v: LowRank) -> None:
    if u.shape != v.shape:
        raise MismatchError(f"shapes differ: {u.shape} and {v.shape}")
