"""Writing a collection into shards: budgets, then one pass over the modules.

From a survey's singular values each adapter's bits are water-filled over all of its modules, which
fixes what each module may lose. Then every module is coded to its budget and measured on what was
written; what a module leaves of its budget goes to the next, and one that overshoots is coded
again. So the sum holds, and nothing but one module's block is ever in memory.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field

import numpy as np

from ...errors import ToleranceError
from ...scale.engine import Task
from ...scale.work import Filed, Pieces
from ...thin import threads
from ..coding.record import Coded, exact_record
from ..planning.budget import Ledger, module_budgets
from ..planning.plan import ModulePlan
from ..store.entries import ModuleEntry, Piece
from ..store.shard_writer import ShardWriter, sealed
from ..store.store import Transaction
from .coder import Coder
from .survey import Survey
from .tasks import Block, CodedPart, coded_block, coded_parts

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
        with threads(1):  # what needs more has workers
            self._survey.measure()
            plans = list(self._survey.plans())
            written: list[tuple[ShardWriter, Written]] = []
            for chosen in plans:
                writer = transaction.new_shard(header_capacity=self.header_capacity(chosen))
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
        coder = Coder(survey.costs)
        known: Mapping[str, Coded] = {} if ahead is None or coder.fine else ahead(ledger)
        at = np.zeros((len(c.paths), len(c.names) + 1), np.int64)
        result = Written(np.zeros(n), ledger.total, np.zeros(n))
        bases: list[dict[str, tuple[str, int]]] = []
        blocks = self._coded_elsewhere(coder, plans, ledger) if survey.engine.spread else None
        for j, path in enumerate(c.paths):
            if blocks is None:
                survey.progress(len(c.paths) + j, 2 * len(c.paths), "writing")
            plan, stack = plans.get(path), survey.stacks.get(path)
            sizes = np.zeros(len(c.names), np.int64)
            with writer.stream(f"m{j}") as stream:
                if blocks is not None:
                    parts: Iterable[tuple[CodedPart, bytes]] = (
                        (part, found.read(part.begin, part.begin + int(part.sizes.sum())))
                        for found in blocks
                        if (part := found.value.get(path)) is not None
                    )
                elif plan is not None and stack is not None:
                    parts = coded_parts(coder, stack, plan, ledger, known.get(path))
                else:
                    parts = ()
                for part, records in parts:
                    result.squared_error[part.members] += part.squared_error
                    result.payload[part.members] += part.payload
                    sizes[part.members] = part.sizes
                    stream.write(records)
                if stack is not None:
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

    def _coded_elsewhere(
        self, coder: Coder, plans: Mapping[str, ModulePlan], ledger: Ledger
    ) -> list[Pieces | Filed]:
        """Every block of adapters coded at all of its modules."""
        survey = self._survey
        shared = {path: survey.engine.share(plan.bare()) for path, plan in plans.items()}
        tasks = []
        for first, end, parts in survey.blocks():
            if not parts:
                continue
            starts = {
                path: int(np.searchsorted(survey.stacks[path].members, part.members[0]))
                for path, part in parts.items()
            }
            spans = {path: (row, row + len(parts[path])) for path, row in starts.items()}
            there = {path: shared[path] for path in parts}
            block = Block(parts, starts, there, ledger.part(first, end, spans))
            tasks.append(Task(survey.collection.called(first, end), (coder, block)))
        found: list[Pieces | Filed] = []
        for k, one in enumerate(survey.engine.map(coded_block, tasks)):
            survey.progress(len(tasks) + k, 2 * len(tasks), "writing")
            found.append(one)
        return found

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
