"""Coding one block of adapters as its module's plan says."""

from __future__ import annotations

import numpy as np
import torch

from . import flat
from .module_plan import ModulePlan, basis_at, side_pairs
from .record import Coded, Target, code_block
from .stack import Block, Factors, decompose, squared_residuals, tamed


def code_own_or_shared(
    f: Factors, rows: np.ndarray, plan: ModulePlan, target: Target, block: Block | None = None
) -> Coded:
    """Code some updates, each with the sides it has.

    Args:
        f: as they came. rows: of the stack. block: their decomposition where it is known; without
            it only those that share nothing are decomposed, and those in a bad gauge.
    """
    n = len(rows)
    result = Coded([b""] * n, np.zeros(n), np.zeros(n))
    for (u, v), members in side_pairs(rows, plan.U, plan.V).items():
        U, V = basis_at(plan.U, u), basis_at(plan.V, v)
        ids = (u if U else None, v if V else None)
        own = f.take(members)
        x: Block | Factors = own
        if block is not None:
            x = block.take(members)
        elif U is not None or V is not None:
            x = tamed(own, exact=False)[0]
        part = code_block(x, target.take(members), ids, U, V, own)
        result = result.replaced(members, part)
    return result


def code_flat(f: Factors, rows: np.ndarray, plan: ModulePlan, target: Target) -> Coded:
    """Flat parts, and where these miss the target a residual of the adapter's own."""
    assert plan.flat is not None
    parts = flat.code_parts(f, plan.flat.A, plan.flat.B, 0, plan.flat.wide, rows)
    error = squared_residuals(f.B, f.A, parts.B, parts.A).cpu().numpy()
    coded = Coded(parts.records, error, np.full(len(error), float(plan.fixed)))
    over = np.flatnonzero(error > target.amount) if target.kind == "error" else np.zeros(0, int)
    if len(over):
        B, A = torch.cat([f.B[over], -parts.B[over]], 2), torch.cat([f.A[over], parts.A[over]], 1)
        block = Block(f.members[over], *decompose(B, A))
        rest = code_block(block, target.take(over), against=Factors(block.members, B, A))
        records = [coded.records[k] + r for k, r in zip(over.tolist(), rest.records, strict=True)]
        coded = coded.replaced(over, Coded(records, rest.squared_error, rest.payload + plan.fixed))
    return coded
