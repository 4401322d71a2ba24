"""What is done with a block of adapters, or with a module: pure functions, wherever they run."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace

import numpy as np

from ...collection.batch import norms, singular_values
from ...collection.elsewhere import Elsewhere
from ...collection.stack import Stack, alike, joint, parts_of
from ...scale.engine import Held
from ...scale.work import Pieces, Shared
from ..coding.record import NOTHING, Coded
from ..planning.budget import Ledger
from ..planning.costs import Costs
from ..planning.forms import Planner
from ..planning.plan import ModulePlan
from ..store.shard_writer import sealed
from .coder import Coder

_EXACT_BELOW = 1e-4  # squared tolerances below this need float64 Grams

Measured = tuple[dict[str, np.ndarray], dict[tuple[int, str], bytes]]


def measured(
    costs: Costs, batches: Sequence[Sequence[Stack]], blocks: Sequence[tuple[int, int]]
) -> Measured:
    """Singular values (n, r) by module path, and digests of what was read elsewhere; where no bits
    depend on them, instead of singular values what has their norm, (n, 1).

    Args:
        batches: modules that are worked on together. blocks: see `Collection`.
    """
    o = costs.options
    norms_only = o.tolerance is None and o.form == "flat"
    exact = o.tolerance is not None and costs.budgets.min(initial=1.0) < _EXACT_BELOW
    found: dict[str, np.ndarray] = {}
    digests: dict[tuple[int, str], bytes] = {}
    for stacks in batches:
        read = {s.path: s.read for s in stacks if isinstance(s.read, Elsewhere)}
        taken = {path: reader.take_digests() for path, reader in read.items()}
        values: dict[str, list[np.ndarray]] = {s.path: [] for s in stacks}
        for *_, parts in parts_of(stacks, blocks):
            for some in alike(parts.values()):
                f, _ = joint(some)
                S = (norms(f) if norms_only else singular_values(f, exact)).cpu().numpy()
                ends = np.cumsum([len(part) for part in some])
                for part, own in zip(some, np.split(S, ends[:-1]), strict=True):
                    values[part.path].append(own)
        for stack in stacks:
            stack.forget()
        for path, several in values.items():
            width = max(S.shape[1] for S in several)
            found[path] = np.concatenate([wide(S, width) for S in several])
        digests |= {(i, path): d for path, ones in taken.items() for i, d in ones.items()}
    return found, digests


def wide(S: np.ndarray, width: int) -> np.ndarray:
    """(n, r) singular values with zeros to (n, width)."""
    return np.pad(S, ((0, 0), (0, width - S.shape[1])))


def candidates(
    planner: Planner, stack: Stack, S: np.ndarray, forms: Sequence[str]
) -> list[ModulePlan]:
    """The plans of a module in each of `forms` that applies, cheapest first."""
    plans = planner.candidates(stack, S, forms)
    for plan in plans:
        plan.release()
    stack.forget()
    return plans


@dataclass(frozen=True)
class CodedPart:
    """What a block of adapters has become at one module.

    Args:
        members: (n,) positions. sizes: (n,) bytes of their records.
        squared_error, payload: (n,) as in `Coded`.
        begin: of the first record in the bytes of a block of all modules.
    """

    members: np.ndarray
    sizes: np.ndarray
    squared_error: np.ndarray
    payload: np.ndarray
    begin: int = 0


@dataclass(frozen=True)
class Block:
    """A block of adapters to be coded.

    Args:
        parts: path → their updates. rows: path → the row of the first in the module's plan.
        plans: path → plan, of the modules' all. ledger: of these adapters.
        batches: all modules that there are, in the order in which they are coded; several together.
    """

    parts: Mapping[str, Stack]
    rows: Mapping[str, int]
    plans: Mapping[str, Held | Shared]
    batches: Sequence[Sequence[str]]
    ledger: Ledger


def coded_parts(
    coder: Coder,
    stack: Stack,
    plan: ModulePlan,
    ledger: Ledger,
    known: Sequence[Coded] | None = None,
    first: int = 0,
) -> Iterator[tuple[CodedPart, bytes]]:
    """A module's updates coded, block by block, and their records as they are written; arguments
    as in `Coder.coded`.
    """
    for members, coded in coder.coded(stack, plan, ledger, known, first):
        records = [sealed(record or bytes([NOTHING])) for record in coded.records]
        sizes = np.array([len(record) for record in records], np.int64)
        yield CodedPart(members, sizes, coded.squared_error, coded.payload), b"".join(records)


def coded_block(coder: Coder, block: Block) -> Pieces:
    """Records of a block, module after module; its value is path → `CodedPart`."""
    found: dict[str, CodedPart] = {}
    data: list[bytes] = []
    end = 0
    for batch in block.batches:
        parts = {path: block.parts[path] for path in batch if path in block.parts}
        plans = {path: block.plans[path].get() for path in parts}
        known: Mapping[str, Coded] = {}
        if len(batch) > 1:
            known = coder.together(parts, plans, block.ledger, block.rows)
        for path, stack in parts.items():
            own = [known[path]] if path in known else None
            first = block.rows[path]
            for part, records in coded_parts(coder, stack, plans[path], block.ledger, own, first):
                found[path] = replace(part, begin=end)
                data.append(records)
                end += len(records)
            plans[path].release()
            stack.forget()
    return Pieces(found, data)
