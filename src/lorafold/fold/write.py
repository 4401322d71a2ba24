"""Writing a collection into shards: budgets, then one pass over the modules.

From a survey's singular values each adapter's bits are water-filled over all of its modules, which
fixes what each module may lose. Then every module is coded to its budget and measured on what was
written; what a module leaves of its budget goes to the next, and one that overshoots is coded
again. So the sum holds, and nothing but one module's block is ever in memory.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field

import numpy as np
import torch
from torch import Tensor

from ..collection.batch import (
    Block,
    Factors,
    squared_residuals,
)
from ..collection.stack import Stack
from ..errors import ToleranceError
from ..thin import threads
from ..words import note
from .coding.flat_part import code_parts
from .coding.record import NOTHING, Coded, Target, code, decode, exact_record
from .planning.budget import Ledger, module_budgets
from .planning.plan import FlatBases, ModulePlan, basis_at, side_pairs
from .store.entries import ModuleEntry, Piece
from .store.shard_writer import ShardWriter, sealed
from .store.store import Transaction
from .survey import Survey

_ATTEMPTS = 5  # more, to get a module within its bound, before it is stored exactly
_FINE = 1e-4  # a bound below which float32 itself counts: what is read back is what is measured
_ROUNDING = 5e-8  # of Σ ‖b_k‖ ‖a_k‖: what another order of the decoder's sums may change
_WORSE = 4.0  # times ‖ΔW‖²: a flat part that misses more is left out
Ahead = Callable[[Ledger], Mapping[str, Coded]]


@dataclass
class Written:
    """A collection in one shard.

    Args:
        squared_error, squared_norm: (N,) over the folded adapters.
        payload: (N,) bytes of packed codes. modules: what the manifest says of each module.
        extras: of each adapter, file key → tensor. cards: of each, the tensor with its card.
        shard: its name. nbytes: of the shard.
    """

    squared_error: np.ndarray
    squared_norm: np.ndarray
    payload: np.ndarray
    modules: list[ModuleEntry] = field(default_factory=list)
    extras: list[dict[str, str]] = field(default_factory=list)
    cards: list[str | None] = field(default_factory=list)
    shard: str = ""
    nbytes: int = 0


class Builder:
    """Writes a collection that has been surveyed.

    Args:
        survey: of the adapters.
    """

    def __init__(self, survey: Survey) -> None:
        self._survey = survey
        self._collection, self._options = survey.collection, survey.options
        known: dict[str, str] = {}  # many have one card, a template's
        cards = [h.card for h in self._collection.handles]
        self._cards = [None if text is None else known.setdefault(text, text) for text in cards]

    def write(self, transaction: Transaction) -> Written:
        """Plan, write, and keep the smallest of the plans that were predicted to be near."""
        # Only flat sides are large products; all else is thin.
        many = 1 if self._collection.small else torch.get_num_threads()
        with threads(1):
            self._survey.measure()
            plans = list(self._survey.plans(many))
        written: list[tuple[ShardWriter, Written]] = []
        for chosen in plans:
            writer = transaction.new_shard(header_capacity=self.header_capacity(chosen))
            flat = any(plan.flat is not None for plan in chosen.values())
            with threads(many if flat else 1):
                written.append((writer, self.write_plans(writer, chosen)))
        best = min(range(len(written)), key=lambda k: written[k][1].nbytes)
        for k, (writer, _) in enumerate(written):
            if k != best:
                writer.abort()
        return written[best][1]

    def write_plans(
        self, writer: ShardWriter, plans: Mapping[str, ModulePlan], ahead: Ahead | None = None
    ) -> Written:
        """Code every module as planned into one shard, measured as it is written.

        Args:
            ahead: from the ledger, modules of a single block that are coded and booked already.
        """
        c, n = self._collection, self._collection.folded
        survey, bounds = self._survey, self._survey.tolerances
        budgets = module_budgets(
            self._options, bounds, survey.stacks, survey.singular_values, plans
        )
        ledger = Ledger(budgets, bounds, survey.totals())
        known: Mapping[str, Coded] = {} if ahead is None or self._fine else ahead(ledger)
        at = np.zeros((len(c.paths), len(c.names) + 1), np.int64)
        result = Written(np.zeros(n), ledger.total, np.zeros(n))
        bases: list[dict[str, tuple[str, int]]] = []
        for j, path in enumerate(c.paths):
            self._survey.progress(len(c.paths) + j, 2 * len(c.paths), "writing")
            plan, stack = plans.get(path), self._survey.stacks.get(path)
            sizes = np.zeros(len(c.names), np.int64)
            with writer.stream(f"m{j}") as stream:
                if plan is not None and stack is not None:
                    for members, coded in self._coded(stack, plan, ledger, known.get(path)):
                        result.squared_error[members] += coded.squared_error
                        result.payload[members] += coded.payload
                        for i, record in zip(members.tolist(), coded.records, strict=True):
                            sizes[i] = stream.write(sealed(record or bytes([NOTHING])))
                    stack.forget()
                for i in range(n, len(c.names)):
                    if path in c.handles[i].shapes:
                        sizes[i] = stream.write(sealed(exact_record(c.read(i, path))))
            at[j, 1:] = np.cumsum(sizes)
            if plan is not None:
                plan.release()
            bases.append({} if plan is None else _write_bases(j, plan, writer))
        writer.add("at", at if at.max(initial=0) >= 1 << 32 else at.astype(np.uint32))
        result.extras = self._write_extras(writer)
        result.cards = self._write_cards(writer)
        info = writer.close()
        result.shard, result.nbytes = info.name, info.nbytes
        for path, fresh in zip(c.paths, bases, strict=True):
            pieces = {name: (Piece(info.name, *piece),) for name, piece in fresh.items()}
            result.modules.append(self._module_entry(path, plans.get(path), pieces))
        return result

    def _coded(
        self, stack: Stack, plan: ModulePlan, ledger: Ledger, known: Coded | None
    ) -> Iterator[tuple[np.ndarray, Coded]]:
        start = 0
        for f, decomposed in stack.pairs():
            rows = np.arange(start, start + len(f.members))
            start += len(f.members)
            target = ledger.target(stack.path, rows, f.members)
            if known is not None:
                coded = known
            else:
                block = decomposed
                if self._survey.cuts and plan.flat is None:
                    block = self._survey.cut(decomposed or f.decomposed())
                coded = code_as_planned(f, rows, plan, target, block)
            if self._fine and target.kind == "error":
                coded = self._as_read(f, plan, stack, coded)
            if target.kind == "error":
                if known is None:
                    coded = self._enforced(f, rows, plan, target, coded, ledger, stack)
                coded = self._not_bulky(f, stack.ranks[rows], stack.path, coded)
                if known is None:
                    ledger.book(stack.path, rows, f.members, coded.squared_error)
            yield f.members, coded

    def _enforced(
        self,
        f: Factors,
        rows: np.ndarray,
        plan: ModulePlan,
        target: Target,
        coded: Coded,
        ledger: Ledger,
        stack: Stack,
    ) -> Coded:
        """Code again what overshot; at last store it exactly."""
        factor, limit = np.ones(len(rows)), ledger.limit(stack.path, rows, f.members)
        for _ in range(_ATTEMPTS):
            over = np.flatnonzero(coded.squared_error > limit)
            if not len(over):
                return coded
            # On top of what earlier attempts asked for, which was not enough.
            factor[over] *= 0.97 * limit[over] / coded.squared_error[over]
            again = f.take(over)
            redone = code_as_planned(again, rows[over], plan, target.take(over, factor[over]))
            if self._fine:
                redone = self._as_read(again, plan, stack, redone)
            coded = coded.replaced(over, redone)
        over = np.flatnonzero(coded.squared_error > limit)
        return self._exact_rows(f, over, stack.path, coded)

    @property
    def _fine(self) -> bool:
        bounded = self._options.tolerance is not None
        return bounded and self._survey.tolerances.min(initial=1.0) < _FINE

    def _as_read(self, f: Factors, plan: ModulePlan, stack: Stack, coded: Coded) -> Coded:
        """The same, its errors measured in float64 on what the records decode to.

        What codes many at once multiplies in another order than what reads one, and small errors
        are no larger than what that changes.
        """

        def basis(side: str, number: int, count: int) -> Tensor:
            if side in "AB":
                assert plan.flat is not None
                return (plan.flat.A if side == "A" else plan.flat.B).rows
            found = basis_at(plan.U if side == "U" else plan.V, number)
            assert found is not None
            return found.columns[:, :count]

        error = np.zeros(len(coded.records))
        for k, record in enumerate(coded.records):
            source = self._collection.read(int(f.members[k]), stack.path)
            stored = decode(record, stack.shape, basis, stack.device)
            wide = [u.to(stack.device, torch.float64) for u in (source, stored)]
            lost = (wide[0] - wide[1]).norm()
            size = float((wide[1].B.norm(dim=0) * wide[1].A.norm(dim=1)).sum())
            rounded = _ROUNDING * size if lost > 0 else 0.0
            error[k] = lost**2 + rounded**2
        return Coded(coded.records, error, coded.payload)

    def _not_bulky(self, f: Factors, ranks: np.ndarray, path: str, coded: Coded) -> Coded:
        """Records that outgrew the tensors that they stand for give way to these."""
        itemsize = 4  # float32 at most; smaller dtypes are caught by their own record's length
        raw = f.B.shape[1] + f.A.shape[2]
        bulky = np.array([len(r) for r in coded.records]) > itemsize * raw * ranks
        return self._exact_rows(f, np.flatnonzero(bulky), path, coded, only_smaller=True)

    def _exact_rows(
        self, f: Factors, rows: np.ndarray, path: str, coded: Coded, only_smaller: bool = False
    ) -> Coded:
        found = {}
        for k in rows.tolist():
            record = exact_record(self._collection.read(int(f.members[k]), path))
            if not only_smaller or len(record) < len(coded.records[k]):
                found[k] = record
        sizes = np.array([len(record) for record in found.values()], float)
        by = Coded(list(found.values()), np.zeros(len(found)), sizes)
        return coded.replaced(np.array(list(found), int), by)

    # Manifest and extras

    def _module_entry(
        self, path: str, plan: ModulePlan | None, bases: Mapping[str, tuple[Piece, ...]]
    ) -> ModuleEntry:
        c = self._collection
        out, inner = c.shapes[path]
        layout = c.layouts.get(path)
        if plan is None:
            return ModuleEntry(path, (out, inner), "exact", layout=layout)
        certificate = plan.certificate or {}
        return ModuleEntry(
            path,
            (out, inner),
            plan.form,
            bases,
            plan.flat is not None and plan.flat.wide,
            layout,
            {k: round(v, 9) for k, v in certificate.items()},
            self._clamped(path, plan),
        )

    def _clamped(self, path: str, plan: ModulePlan) -> int | None:
        """How many directions there are, where a rank asks for more."""
        if plan.flat is not None:
            available = max(plan.flat.A.count, plan.flat.B.count)
        elif plan.U is not None or plan.V is not None:
            available = max(
                b.rank for s in (plan.U, plan.V) if s is not None for b in s.bases.values()
            )
        else:
            stack = self._survey.stacks[path]
            available = min(int(stack.ranks.max()), *stack.shape)
        asked = self._options.rank
        return available if asked is not None and asked > available else None

    def _write_extras(self, writer: ShardWriter) -> list[dict[str, str]]:
        found = []
        for i, handle in enumerate(self._collection.handles):
            names = {}
            for k, (key, tensor) in enumerate(handle.read_extras().items()):
                names[key] = f"x{i}.{k}"
                writer.add(names[key], tensor)
            found.append(names)
        return found

    def _write_cards(self, writer: ShardWriter) -> list[str | None]:
        names = {text: f"card{k}" for k, text in enumerate(dict.fromkeys(self._cards)) if text}
        for text, name in names.items():
            with writer.stream(name) as stream:
                stream.write(text.encode())
        return [names.get(text or "") for text in self._cards]

    def header_capacity(self, plans: Mapping[str, ModulePlan]) -> int:
        """Bytes to reserve for a shard's header."""
        c = self._collection
        bases = sum(len(s.bases) for p in plans.values() for s in (p.U, p.V) if s is not None)
        bases += 2 * sum(p.flat is not None for p in plans.values())
        extras = sum(len(getattr(h, "extra_keys", ())) for h in c.handles)
        return 256 + 120 * (len(c.paths) + bases + extras + len(set(self._cards)))


def _write_bases(j: int, plan: ModulePlan, writer: ShardWriter) -> dict[str, tuple[str, int]]:
    """Write what is new of a plan's bases; basis → (tensor, columns)."""
    fresh: dict[str, tuple[bytes, int]] = {}
    for side, shared in (("U", plan.U), ("V", plan.V)):
        for g, basis in shared.bases.items() if shared else ():
            if basis.fresh:
                fresh[f"{side}{g}"] = basis.record, basis.fresh
    if plan.flat is not None:
        for side, half in (("A", plan.flat.A), ("B", plan.flat.B)):
            if half.record:
                fresh[f"{side}0"] = half.record, half.count + 1
    for name, (record, _) in fresh.items():
        with writer.stream(f"b{j}.{name}") as stream:
            stream.write(record)
    return {name: (f"b{j}.{name}", columns) for name, (_, columns) in fresh.items()}


def check_contract(names: list[str], error: np.ndarray, tolerances: np.ndarray) -> None:
    """Before anything is committed: every measured error within its bound."""
    for name, e, t in zip(names, error, tolerances, strict=True):
        if e > t * (1 + 1e-9):
            raise ToleranceError(f"{name!r} came out at error {e:.4g}, above its tolerance {t:.4g}")


def code_as_planned(
    f: Factors, rows: np.ndarray, plan: ModulePlan, target: Target, block: Block | None = None
) -> Coded:
    """Code some updates, each with the sides it has.

    Args:
        f: as they came. rows: of the stack. block: their decomposition where it is known; without
            it only those that share nothing are decomposed, and those in a bad gauge.
    """
    if plan.flat is not None:
        return _code_flat(f, rows, plan, plan.flat, target)
    result = Coded.nothing(len(rows))
    for (u, v), members in side_pairs(rows, plan.U, plan.V).items():
        U, V = basis_at(plan.U, u), basis_at(plan.V, v)
        numbers = [(u if U else None, v if V else None)] * len(members)
        known = None if block is None else block.take(members)
        some, wanted = f.take(members), target.take(members)
        try:
            part = code(some, wanted, numbers, U, V, block=known)
        except torch.linalg.LinAlgError as e:  # type: ignore[attr-defined]
            if U is None and V is None:
                raise
            note(f"form {plan.form!r}: {len(members)} updates get sides of their own: {e}")
            part = code(some, wanted, block=known)
        result = result.replaced(members, part)
    return result


def _code_flat(
    f: Factors, rows: np.ndarray, plan: ModulePlan, flat: FlatBases, target: Target
) -> Coded:
    """Flat parts, and where these miss the target a residual of the adapter's own."""
    parts = code_parts(f, flat.A, flat.B, 0, flat.wide, rows)
    error = squared_residuals(f.B, f.A, parts.B, parts.A).cpu().numpy()
    # What is tiny beside the mean comes out far worse than as nothing.
    assert plan.squares is not None
    nothing = plan.squares[rows]
    worse = ~(error <= _WORSE * nothing)
    parts.forget(np.flatnonzero(worse))
    error = np.where(worse, nothing, error)
    payload = np.array([plan.fixed if record else 0.0 for record in parts.records])
    coded = Coded(parts.records, error, payload)
    over = np.flatnonzero(error > target.amount) if target.kind == "error" else np.zeros(0, int)
    if len(over):
        B, A = torch.cat([f.B[over], -parts.B[over]], 2), torch.cat([f.A[over], parts.A[over]], 1)
        rest = code(Factors(f.members[over], B, A), target.take(over))
        records = [coded.records[k] + r for k, r in zip(over.tolist(), rest.records, strict=True)]
        more = Coded(records, rest.squared_error, rest.payload + payload[over])
        coded = coded.replaced(over, more)
    return coded
