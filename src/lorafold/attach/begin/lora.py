"""How fresh factors begin.

"kaiming" and "orthogonal" leave the model unchanged: B = 0. "pissa" (arXiv 2404.02948) begins with
the leading singular directions of the weight, W ≈ U S Vh: s · B₀ A₀ = U S Vh with √S on either
side, which is subtracted beside: here, too, nothing changes at first, and W is never altered.
"""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ...errors import MismatchError
from ...layers.kinds import LayerKind
from ...layers.swap import device_of
from ...prefixes import Prefixes
from ..run.factors import Pair
from .specs import LoRA


def fresh_factors(
    spec: LoRA,
    path: str,
    layer: nn.Module,
    kind: LayerKind,
    generator: torch.Generator,
    prefixes: Prefixes,
) -> Pair:
    """The factors that a specification means at one layer.

    Raises:
        MismatchError: a rank above min(out, in), naming the module.
    """
    out, inner = kind.dims(layer)
    r, scale = spec.rank_at(path), spec.scale_at(path)
    if r > min(out, inner):
        raise MismatchError(
            f"rank {r} is above min(out, in) = {min(out, inner)} of module {path!r}: lower rank=, "
            "leave it out by exclude=, or give it one of its own by rank_pattern="
        )
    device = device_of(layer)
    start = None
    if spec.init.startswith("pissa"):
        U, S, Vh = leading_directions(kind.matrix(layer, path), r, spec.niter, generator)
        root = (S / scale).sqrt()
        A, B = root[:, None] * Vh, U * root
        # In one layout, so that the products of start and factors cancel to the bit at first.
        A, B = (t.to(device, spec.dtype).contiguous() for t in (A, B))
        start = (A.clone(), B.clone())
    else:
        A = torch.empty(r, inner, dtype=torch.float32)
        if spec.init == "orthogonal":
            nn.init.orthogonal_(A, generator=generator)
        else:
            nn.init.kaiming_uniform_(A, a=math.sqrt(5), generator=generator)
        A = A.to(device, spec.dtype)
        B = torch.zeros(out, r, device=device, dtype=spec.dtype)
    A, B = A.contiguous(), B.contiguous()
    return Pair(kind, A, B, scale, spec.dropout, start, prefixes)


def leading_directions(
    W: Tensor, r: int, niter: int | None, generator: torch.Generator | None = None
) -> tuple[Tensor, Tensor, Tensor]:
    """U (out, r), S (r,), Vh (r, in) of the r largest singular values.

    Args:
        niter: subspace iterations of a randomised SVD (Halko et al. 2011); None for the exact one.
    """
    if niter is None:
        U, S, Vh = torch.linalg.svd(W, full_matrices=False)
        return U[:, :r], S[:r], Vh[:r]
    # Eight more than asked for make the first r good; QR keeps them apart between the products.
    # They are kept as rows: products with thin matrices are much faster in that layout.
    rows = min(r + 8, *W.shape)
    sketch = torch.randn(rows, W.shape[0], generator=generator, dtype=torch.float32).to(W)
    Q = _orthonormal_rows(sketch @ W)
    for _ in range(niter):
        Q = _orthonormal_rows(_orthonormal_rows(F.linear(Q, W)) @ W)
    U, S, Vh = torch.linalg.svd(F.linear(Q, W).mT, full_matrices=False)
    Vh = Vh @ Q
    return U[:, :r], S[:r], Vh[:r]


def _orthonormal_rows(M: Tensor) -> Tensor:
    Q: Tensor = torch.linalg.qr(M.mT)[0]
    return Q.mT
