"""Factors of what kohya-ss's and LyCORIS's files hold of a module; `reading` says of which keys.

Products of factors are factors. A Hadamard product has the row-wise Kronecker product of its left
factors and the column-wise one of its right ones (Khatri–Rao): (w1a w1b) ∘ (w2a w2b) = B A with
B[o, (j, k)] = w1a[o, j] w2a[o, k]. A Kronecker product has those of each side: (P Q) ⊗ (R S) =
(P ⊗ R)(Q ⊗ S), where a full w is I w or w I, the smaller of both. So nothing is decomposed or
rounded, except once to float32, in which products of narrower numbers are exact.
(LyCORIS: Yeh et al. 2024, arXiv 2309.14859.)
"""

from __future__ import annotations

import functools
from collections.abc import Mapping

import torch
from torch import Tensor

from ....lowrank import LowRank, from_svd, kept_directions
from ..reading import common_dtype
from .keys import what_of, wide


def kohya_factors(tensors: Mapping[str, Tensor]) -> tuple[Tensor, Tensor]:
    """A (r, in) or (r, in, kh, kw), and B (out, r, …) of what a file holds for one module.

    Args:
        tensors: {key: tensor}; those of products, and of three factors, come in float32 at least.
    """
    t = {what_of(key): value for key, value in tensors.items()}
    if "lora_down" in t and "lora_mid" not in t:
        return t["lora_down"], t["lora_up"]
    dtype = wide(functools.reduce(common_dtype, (value.dtype for value in t.values())))
    t = {what: value.double() for what, value in t.items()}
    if "lora_mid" in t:
        A, B = _contracted(t["lora_mid"], t["lora_down"].flatten(1)), t["lora_up"]
    elif "hada_w1_a" in t:
        A, B = _hadamard(*(_pair(t, f"hada_w{n}", f"hada_t{n}") for n in (1, 2)))
    else:
        A, B = _kronecker(*(_pair(t, f"lokr_w{n}", f"lokr_t{n}") for n in (1, 2)))
    return A.to(dtype), B.to(dtype)


def kohya_cut(tensors: Mapping[str, Tensor], tolerance: float) -> LowRank:
    """What LoHa or LoKr stands for before its scale, by the fewest directions within `tolerance`.

    The singular values of w1 ⊗ w2 are the products of theirs, so that each is decomposed alone.
    """
    t = {what_of(key): value.double() for key, value in tensors.items()}
    if "hada_w1_a" in t:
        A, B = _hadamard(*(_pair(t, f"hada_w{n}", f"hada_t{n}") for n in (1, 2)))
        return LowRank(A.flatten(1), B).truncate(tolerance=tolerance)
    pairs = (_pair(t, f"lokr_w{n}", f"lokr_t{n}") for n in (1, 2))
    (U1, S1, V1), (U2, S2, V2) = (LowRank(A.flatten(1), B.flatten(1)).svd() for A, B in pairs)
    S, order = (S1[:, None] * S2).flatten().sort(descending=True)
    k = kept_directions(S, tolerance=tolerance)
    i, j = order[:k] // len(S2), order[:k] % len(S2)
    U = (U1[:, None, i] * U2[:, j]).flatten(0, 1)
    return from_svd(U, S[:k], (V1[i, :, None] * V2[j, None]).flatten(1))


def _contracted(core: Tensor, down: Tensor) -> Tensor:
    return torch.einsum("ij...,jp->ip...", core, down)


def _pair(t: Mapping[str, Tensor], w: str, core: str) -> tuple[Tensor, Tensor]:
    """Right and left factor of one side of a product."""
    if w not in t:
        a, b = t[f"{w}_a"], t[f"{w}_b"]
        return (b, a) if core not in t else (_contracted(t[core], b), a.T)
    whole = t[w]
    flat = whole.flatten(1)
    out, inner = flat.shape
    if out <= inner:
        return whole, torch.eye(out, dtype=whole.dtype, device=whole.device)
    one = torch.eye(inner, dtype=whole.dtype, device=whole.device)
    return one.reshape(inner, *whole.shape[1:]), flat


def _hadamard(first: tuple[Tensor, Tensor], second: tuple[Tensor, Tensor]) -> tuple[Tensor, Tensor]:
    (A1, B1), (A2, B2) = first, second
    if A1.shape[1:] != A2.shape[1:] or len(B1) != len(B2):
        raise RuntimeError("the two sides of its product are of different sizes")
    return (A1[:, None] * A2).flatten(0, 1), (B1[:, :, None] * B2[:, None]).flatten(1)


def _kronecker(
    first: tuple[Tensor, Tensor], second: tuple[Tensor, Tensor]
) -> tuple[Tensor, Tensor]:
    (A1, B1), (A2, B2) = ((A.contiguous(), B.contiguous()) for A, B in (first, second))
    return torch.kron(A1.reshape(*A1.shape, *[1] * (A2.ndim - A1.ndim)), A2), torch.kron(B1, B2)
