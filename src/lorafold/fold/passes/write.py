"""Writing a collection into shards: budgets, then one pass over the modules.

From a survey's singular values each adapter's bits are water-filled over all of its modules, which
fixes what each module may lose. Then every module is coded to its budget and measured on what was
written; what a module leaves of its budget goes to the next, and one that overshoots is coded
again. So the sum holds, and nothing but one module's block is ever in memory.

A shard holds the records of so many adapters at most, so that to lose one, or to write one anew
when most of it has left, costs the same in a library of any size.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field

import numpy as np

from ...collection.stack import Stack, batches, parts_of
from ...errors import ToleranceError
from ...scale.engine import Task
from ...scale.work import Filed, Pieces
from ...thin import threads
from ..coding.record import Coded, exact_record
from ..planning.budget import Ledger, module_budgets
from ..planning.plan import ModulePlan
from ..store.catalog import index_of, write_cards
from ..store.entries import ModuleEntry, Piece, Rows
from ..store.shard_writer import ShardWriter, sealed
from ..store.store import Transaction
from .coder import Coder
from .survey import Survey
from .tasks import Block, CodedPart, coded_block, coded_parts

_ROWS = 4096  # adapters whose records are in one shard
Ahead = Callable[[Ledger], Mapping[str, Coded]]


@dataclass
class Written:
    """A collection in shards.

    Args:
        squared_error, squared_norm: (N,) over the folded adapters.
        payload: (N,) bytes of packed codes. modules: what the manifest says of each module.
        extras: of each adapter, file key → tensor.
        holds: the shards, with the ids of whose records they hold. nbytes: of all shards.
    """

    squared_error: np.ndarray
    squared_norm: np.ndarray
    payload: np.ndarray
    modules: list[ModuleEntry] = field(default_factory=list)
    extras: list[dict[str, str]] = field(default_factory=list)
    holds: dict[str, Rows] = field(default_factory=dict)
    nbytes: int = 0


class Builder:
    """Writes a collection that has been surveyed.

    Args:
        survey: of the adapters. first: the id of the first of them; the others' follow.
    """

    def __init__(self, survey: Survey, first: int = 0) -> None:
        self._survey = survey
        self._first = first
        self._collection, self._options = survey.collection, survey.options
        known: dict[str, str] = {}  # many have one card, a template's
        cards = [h.card for h in self._collection.handles]
        self._cards = [None if text is None else known.setdefault(text, text) for text in cards]

    def write(self, transaction: Transaction) -> Written:
        """Plan, write, and keep the smallest of the plans that were predicted to be near."""
        with threads(1):  # what needs more has workers
            self._survey.measure()
            plans = list(self._survey.plans())
            written: list[tuple[list[ShardWriter], Written]] = []
            for chosen in plans:
                writers = self.writers(transaction, chosen)
                written.append((writers, self.write_plans(writers, chosen)))
        best = min(range(len(written)), key=lambda k: written[k][1].nbytes)
        for k, (writers, _) in enumerate(written):
            for writer in writers if k != best else ():
                writer.abort()
        return written[best][1]

    def writers(
        self, transaction: Transaction, plans: Mapping[str, ModulePlan]
    ) -> list[ShardWriter]:
        """New shards for the collection, `_ROWS` of its adapters each."""
        count = -(-len(self._collection.names) // _ROWS)
        return [
            transaction.new_shard(header_capacity=self._header_capacity(plans, k))
            for k in range(count)
        ]

    def write_plans(
        self,
        writers: Sequence[ShardWriter],
        plans: Mapping[str, ModulePlan],
        ahead: Ahead | None = None,
    ) -> Written:
        """Code every module as planned into shards, measured as it is written.

        Args:
            writers: as `writers` makes them; the first takes what is shared, too.
            ahead: from the ledger, modules of a single block that are coded and booked already.
        """
        c, n = self._collection, self._collection.folded
        survey, bounds = self._survey, self._survey.tolerances
        budgets = module_budgets(
            self._options, bounds, survey.stacks, survey.singular_values, plans
        )
        ledger = Ledger(budgets, bounds, survey.totals())
        coder = Coder(survey.costs)
        sizes = np.zeros((len(c.paths), len(c.names)), np.int64)
        result = Written(np.zeros(n), ledger.total, np.zeros(n))
        bases: list[dict[str, tuple[str, int]]] = []
        spread = survey.engine.spread
        coded = self._coded_elsewhere if spread else self._coded_here
        parts_at = coded(coder, plans, ledger, ahead)
        for j, path in enumerate(c.paths):
            if not spread:
                survey.progress(len(c.paths) + j, 2 * len(c.paths), "writing")
            plan, stack = plans.get(path), survey.stacks.get(path)
            with contextlib.ExitStack() as open_streams:
                streams = [open_streams.enter_context(w.stream(f"m{j}")) for w in writers]
                for part, records in parts_at(path):
                    result.squared_error[part.members] += part.squared_error
                    result.payload[part.members] += part.payload
                    sizes[j, part.members] = part.sizes
                    for k, some in _by_shard(part, records):
                        streams[k].write(some)
                if stack is not None:
                    stack.forget()
                for i in range(n, len(c.names)):
                    if path in c.handles[i].shapes:
                        record = sealed(exact_record(c.read(i, path)))
                        sizes[j, i] = streams[i // _ROWS].write(record)
            if plan is not None:
                plan.release()
            bases.append({} if plan is None else _write_bases(j, plan, writers[0]))
        for k, writer in enumerate(writers):
            self._close(k, writer, sizes, result)
        shared = writers[0].close().name
        for path, fresh in zip(c.paths, bases, strict=True):
            pieces = {name: (Piece(shared, *piece),) for name, piece in fresh.items()}
            result.modules.append(self._module_entry(path, plans.get(path), pieces))
        return result

    def _close(self, k: int, writer: ShardWriter, sizes: np.ndarray, result: Written) -> None:
        """Write what shard k has beside the records, and name it."""
        rows = range(k * _ROWS, min((k + 1) * _ROWS, len(self._collection.names)))
        ids = [self._first + i for i in rows]
        for name, array in index_of(ids, sizes[:, rows.start : rows.stop]).items():
            writer.add(name, array)
        for i, number in zip(rows, ids, strict=True):
            extras = self._collection.handles[i].read_extras()
            names = {key: f"x{number}.{x}" for x, key in enumerate(extras)}
            for key, tensor in extras.items():
                writer.add(names[key], tensor)
            result.extras.append(names)
        cards = [self._cards[i] for i in rows]
        write_cards(writer, [card.encode() if card else None for card in cards])
        info = writer.close()
        result.holds[info.name] = Rows(ids[0], ids[-1], len(ids))
        result.nbytes += info.nbytes

    def _batches(self, coder: Coder, plans: Mapping[str, ModulePlan]) -> list[list[Stack]]:
        """All modules by what is coded together, in the order of the first ones."""
        stacks = self._survey.stacks
        own = batches(s for path, s in stacks.items() if coder.batched(plans[path]))
        others = [[s] for path, s in stacks.items() if not coder.batched(plans[path])]
        place = {path: k for k, path in enumerate(stacks)}
        return sorted([*own, *others], key=lambda batch: place[batch[0].path])

    def _coded_together(
        self,
        coder: Coder,
        stacks: Sequence[Stack],
        plans: Mapping[str, ModulePlan],
        ledger: Ledger,
    ) -> dict[str, list[Coded]]:
        """Every block at some modules: path → what the blocks became."""
        found: dict[str, list[Coded]] = {stack.path: [] for stack in stacks}
        for *_, parts in parts_of(stacks, self._collection.blocks):
            rows = self._first_rows(parts)
            for path, coded in coder.together(parts, plans, ledger, rows).items():
                found[path].append(coded)
        for stack in stacks:
            stack.forget()
        return found

    def _first_rows(self, parts: Mapping[str, Stack]) -> dict[str, int]:
        """Path → the row of a block's first adapter among all that have the module."""
        stacks = self._survey.stacks
        return {
            path: int(np.searchsorted(stacks[path].members, part.members[0]))
            for path, part in parts.items()
        }

    def _coded_here(
        self,
        coder: Coder,
        plans: Mapping[str, ModulePlan],
        ledger: Ledger,
        ahead: Ahead | None,
    ) -> Callable[[str], Iterable[tuple[CodedPart, bytes]]]:
        """What codes a module when it is asked for, in the order of modules."""
        known: dict[str, Sequence[Coded]] = {}
        if ahead is not None and not coder.fine:
            known = {path: [coded] for path, coded in ahead(ledger).items()}
        together = [] if ahead else self._batches(coder, plans)
        batch_of = {s.path: batch for batch in together if len(batch) > 1 for s in batch}

        def parts_at(path: str) -> Iterable[tuple[CodedPart, bytes]]:
            plan, stack = plans.get(path), self._survey.stacks.get(path)
            if plan is None or stack is None:
                return ()
            if path in batch_of and path not in known:
                known.update(self._coded_together(coder, batch_of[path], plans, ledger))
            return coded_parts(coder, stack, plan, ledger, known.pop(path, None))

        return parts_at

    def _coded_elsewhere(
        self,
        coder: Coder,
        plans: Mapping[str, ModulePlan],
        ledger: Ledger,
        _: Ahead | None,
    ) -> Callable[[str], Iterable[tuple[CodedPart, bytes]]]:
        """What gives a module of every block of adapters, which all are coded now."""
        survey = self._survey
        shared = {path: survey.engine.share(plan.bare()) for path, plan in plans.items()}
        together = [[stack.path for stack in batch] for batch in self._batches(coder, plans)]

        def tasks() -> Iterator[Task]:
            for first, end, parts in survey.blocks():
                starts = self._first_rows(parts)
                spans = {path: (row, row + len(parts[path])) for path, row in starts.items()}
                there = {path: shared[path] for path in parts}
                own = ledger.part(first, end, spans)
                block = Block(parts, starts, there, together, own)
                yield Task(survey.collection.called(first, end), (coder, block))

        count = len(survey.collection.blocks)
        found: list[Pieces | Filed] = []
        for k, one in enumerate(survey.engine.map(coded_block, tasks())):
            survey.progress(count + k, 2 * count, "writing")
            found.append(one)

        def parts_at(path: str) -> Iterable[tuple[CodedPart, bytes]]:
            for one in found:
                part = one.value.get(path)
                if part is not None:
                    yield part, one.read(part.begin, part.begin + int(part.sizes.sum()))

        return parts_at

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

    def _header_capacity(self, plans: Mapping[str, ModulePlan], k: int) -> int:
        """Bytes to reserve for the header of shard k."""
        c, rows = self._collection, slice(k * _ROWS, (k + 1) * _ROWS)
        bases = sum(len(s.bases) for p in plans.values() for s in (p.U, p.V) if s is not None)
        bases += 2 * sum(p.flat is not None for p in plans.values())
        extras = sum(len(getattr(h, "extra_keys", ())) for h in c.handles[rows])
        cards = len(set(self._cards[rows]))
        return 256 + 120 * (len(c.paths) + (bases if k == 0 else 0) + extras + cards)


def _by_shard(part: CodedPart, records: bytes) -> Iterator[tuple[int, bytes]]:
    """A part's records, split among the shards that its adapters are in."""
    shards = part.members // _ROWS
    if shards[0] == shards[-1]:
        yield int(shards[0]), records
        return
    ends = np.concatenate([[0], np.cumsum(part.sizes)])
    for k in np.unique(shards).tolist():
        first, last = np.searchsorted(shards, [k, k + 1]).tolist()
        yield k, records[int(ends[first]) : int(ends[last])]


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
