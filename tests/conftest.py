"""What several tests build on: seeded updates with a known spectrum, adapters, a dense reference.

All of it is session-scoped, so that hypothesis may use it too.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import pytest
import torch
from hypothesis import settings
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from lorafold.adapter import Adapter
from lorafold.lowrank import LowRank

settings.register_profile(
    "lorafold", deadline=None, derandomize=True, max_examples=40, database=None
)
settings.load_profile("lorafold")

# The tests are many small operations: threads that wait for one another make them several times
# slower as soon as anything else runs.
torch.set_num_threads(1)


def _update(
    out: int,
    inn: int,
    rank: int,
    *,
    seed: int = 0,
    spectrum: Sequence[float] | None = None,
    scale: float = 1.0,
    dtype: torch.dtype = torch.float32,
) -> LowRank:
    g = torch.Generator().manual_seed(seed)
    if spectrum is None:
        A = torch.randn(rank, inn, generator=g, dtype=torch.float64)
        B = torch.randn(out, rank, generator=g, dtype=torch.float64)
        return LowRank((A / inn**0.5).to(dtype), B.to(dtype), scale)
    assert len(spectrum) == rank <= min(out, inn)
    U = torch.linalg.qr(torch.randn(out, rank, generator=g, dtype=torch.float64))[0]
    V = torch.linalg.qr(torch.randn(inn, rank, generator=g, dtype=torch.float64))[0]
    # A random gauge, so that no test leans on factors that happen to be orthogonal.
    G = torch.randn(rank, rank, generator=g, dtype=torch.float64) + 3 * torch.eye(rank)
    root = torch.tensor(spectrum, dtype=torch.float64).sqrt()
    A = torch.linalg.solve(G, root[:, None] * V.T)
    return LowRank(A.to(dtype), (U * root @ G / scale).to(dtype), scale)


def _adapter(
    shapes: Mapping[str, tuple[int, int]],
    rank: int | Mapping[str, int] = 4,
    *,
    seed: int = 0,
    scale: float = 2.0,
    dtype: torch.dtype = torch.float32,
    **parts: Any,
) -> Adapter:
    ranks = rank if isinstance(rank, Mapping) else dict.fromkeys(shapes, rank)
    modules = {
        path: _update(*shape, ranks[path], seed=1000 * seed + i, scale=scale, dtype=dtype)
        for i, (path, shape) in enumerate(shapes.items())
    }
    return Adapter(modules, **parts)


def _dense(u: LowRank) -> Tensor:
    return u.scale * (u.B.double() @ u.A.double())


class _ShapeWatch(TorchDispatchMode):
    """Remembers the largest tensor that any operation under it returned."""

    largest = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):  # type: ignore[no-untyped-def]
        result = func(*args, **(kwargs or {}))
        sizes = [t.numel() for t in tree_leaves(result) if isinstance(t, Tensor)]
        self.largest = max([self.largest, *sizes])
        return result


@pytest.fixture(scope="session")
def make_update() -> Callable[..., LowRank]:
    """make_update(out, inn, rank, seed=, spectrum=, scale=, dtype=) -> LowRank."""
    return _update


@pytest.fixture(scope="session")
def make_adapter() -> Callable[..., Adapter]:
    """make_adapter({path: (out, in)}, rank or {path: rank}, seed=, scale=, dtype=, extras=, …)."""
    return _adapter


@pytest.fixture(scope="session")
def dense() -> Callable[[LowRank], Tensor]:
    """dense(update) -> ΔW (out, in) in float64, from the definition."""
    return _dense


@pytest.fixture(scope="session")
def shape_watch() -> type[_ShapeWatch]:
    """`with shape_watch() as watch:` … `watch.largest` numbers in the largest tensor made."""
    return _ShapeWatch
