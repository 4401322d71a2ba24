"""The plain resizings: the same update on a base of other widths, from its shape alone.

    ΔW' = R_out ΔW R_inᵀ        (out', out) (out, in) (in, in')

with R the first rows of the identity, zero rows below them (`truncate`, `svd`), or the matrix of
linear interpolation (`interpolate`). R acts on B's rows and on A's columns, so nothing depends on
the gauge and no (out, in) matrix is built: O((out + in) r²) for what a dense decomposition takes
O(out · in · min(out, in)) to do.

What to expect: coordinates of two bases have nothing to do with each other unless one was made of
the other. For a base that was permuted, rotated or trained anew, what these make is as good as
random; they are for bases that were widened or pruned in place, and to compare with.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import replace

import torch
from torch import Tensor

from ...errors import RefusedError
from ...lowrank import LowRank
from ...parts import Layout
from ..job import Job, Moved

Resize = Callable[
    [Tensor, int, int], Tensor
]  # (r, n·k), n' and k: to (r, n'·k), k numbers a channel


def truncate(job: Job) -> Moved:
    """A's columns and B's rows cut, or followed by zeros: bit for bit where both have them."""
    return _each(job, _padded)


def interpolate(job: Job) -> Moved:
    """The bilinear interpolation of ΔW: along A's columns and B's rows, in float32 at least.

    Channel i of n lies at (i + ½)/n; before the first and after the last it is constant, and
    nothing is smoothed where there are fewer.
    """
    return _each(job, _interpolated)


def svd(job: Job) -> Moved:
    """The update of `truncate`, by its singular values: every rank prefix is the best one."""
    moved = _each(job, _padded)
    kept = {p: _balanced(u, job.rank) for p, u in moved.modules.items()}
    return replace(moved, modules=kept)


def _each(job: Job, resize: Resize) -> Moved:
    modules, sources, layouts = {}, {}, {}
    for k, (path, place) in enumerate(job.places.items()):
        if job.progress is not None:
            job.progress(k, len(job.places), path)
        u, layout = job.adapter.modules[path], job.adapter.layout(path)
        if layout.kind == "embedding" and resize is _interpolated and place.shape[1] != u.shape[1]:
            raise RefusedError(
                f"{path!r} is an embedding: nothing lies between two tokens, so its {u.shape[1]} "
                "columns can't be interpolated; use method 'svd', or 'vocabulary' between bases"
            )
        modules[place.path] = _resized(u, place.shape, resize, _taps(layout))
        if job.options["rescale"]:
            modules[place.path] *= (math.prod(u.shape) / math.prod(place.shape)) ** 0.25
        sources[place.path], layouts[place.path] = (path,), place.layout
    return Moved(modules, sources, layouts)


def _taps(layout: Layout) -> int:
    """How many columns of an update one input channel has."""
    return math.prod(layout.kernel[1:]) if layout.kind == "conv" else 1


def _resized(u: LowRank, shape: tuple[int, int], resize: Resize, taps: int) -> LowRank:
    out, inner = shape
    A = u.A if inner == u.shape[1] else resize(u.A, inner, taps)
    B = u.B if out == u.shape[0] else resize(u.B.T, out, 1).T
    if A.dtype != B.dtype:  # one side was interpolated
        dtype = torch.promote_types(A.dtype, B.dtype)
        A, B = A.to(dtype), B.to(dtype)
    return LowRank(A, B, u.scale)


def _padded(rows: Tensor, n: int, taps: int) -> Tensor:
    new = rows.new_zeros(len(rows), n)
    both = min(n, rows.shape[1])
    new[:, :both] = rows[:, :both]
    return new


def _interpolated(rows: Tensor, n: int, taps: int) -> Tensor:
    wide = rows.to(torch.promote_types(rows.dtype, torch.float32))
    channels = wide.reshape(len(wide), -1, taps).transpose(1, 2)
    new = torch.nn.functional.interpolate(channels, n // taps, mode="linear", align_corners=False)
    return new.transpose(1, 2).reshape(len(wide), n)


def _balanced(u: LowRank, rank: int | None) -> LowRank:
    """The balanced update, with zeros up to a rank that was asked for and that it had."""
    found = u.balanced()
    more = min(rank or 0, u.rank) - found.rank
    if more <= 0:
        return found
    A = torch.cat([found.A, found.A.new_zeros(more, found.A.shape[1])])
    return LowRank(A, torch.cat([found.B, found.B.new_zeros(len(found.B), more)], 1))
