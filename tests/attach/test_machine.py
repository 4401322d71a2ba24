"""Any order of verbs, against a model of what should run: W + Σ c ΔW, dense, after every step."""

import copy

import torch
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, precondition, rule
from torch import nn

import lorafold as lf

NAMES = ["a", "b", "c", "d"]
SHAPES = {"0": (5, 6), "2": (4, 5)}
RANKS = 3
names = st.sampled_from(NAMES)
cs = st.sampled_from([0.0, 1.0, -0.5, 2.0])
ranks = st.sampled_from([None, 0, 1, 2])
seeds = st.integers(0, 5)


def adapter(seed):
    g = torch.Generator().manual_seed(seed)
    modules = {}
    for path, (out, inner) in SHAPES.items():
        r = 1 + (seed + int(path)) % RANKS
        A = torch.randn(r, inner, generator=g, dtype=torch.float64)
        modules[path] = lf.LowRank(A, torch.randn(out, r, generator=g, dtype=torch.float64), 0.5)
    if seed == 5:
        del modules["2"]
    return lf.Adapter(modules)


def delta(u, c, rank):
    k = u.rank if rank is None else min(rank, u.rank)
    return c * u.scale * u.B[:, :k] @ u.A[:k]


class Machine(RuleBasedStateMachine):
    @initialize(slots=st.sampled_from([None, 2, 3]), seed=seeds, trainable=st.booleans())
    def attach(self, slots, seed, trainable):
        torch.manual_seed(0)
        self.base = nn.Sequential(nn.Linear(6, 5), nn.Tanh(), nn.Linear(5, 4)).double()
        self.model = copy.deepcopy(self.base)
        self.x = torch.randn(4, 6, dtype=torch.float64)
        self.room = slots or 64
        self.there, self.trained = {"a": adapter(seed)}, {"a"} if trainable else set()
        self.rows = [({"a": 1.0}, None)] if trainable else None  # None: nothing was chosen yet
        self.kept, self.merged, self.gate = {}, None, "current"
        self.live = lf.attach(
            self.model, {"a": adapter(seed)}, slots=slots, max_rank=RANKS, trainable=trainable
        )

    def fits(self, mixes):
        wanted = {n for mix in mixes for n, c in mix.items() if c != 0} - self.trained
        return len(wanted) <= self.room

    def largest(self, mix):
        return max((max(u.rank for u in self.there[n].values()) for n in mix), default=0)

    def allowed(self, mix, rank):
        return rank is None or not mix or rank <= self.largest(mix)

    @rule(mix=st.dictionaries(names, cs, max_size=3), c=cs, rank=ranks)
    def use(self, mix, c, rank):
        mix = {n: w for n, w in mix.items() if n in self.there}
        chosen = {n: c * w for n, w in mix.items()}
        if not self.allowed(mix, rank) or not self.fits([chosen]):
            return
        if self.merged is not None and (not chosen or set(chosen) & set(self.merged[0])):
            return
        self.live.use(mix or None, c=c, rank=rank)
        self.rows = [(chosen, rank)]

    @rule(
        entries=st.lists(st.tuples(st.one_of(st.none(), names), cs, ranks), min_size=2, max_size=2)
    )
    def use_rows(self, entries):
        rows = [({} if n is None or n not in self.there else {n: c}, k) for n, c, k in entries]
        if self.merged is not None or not self.fits(mix for mix, _ in rows):
            return
        if not all(self.allowed(mix, k) for mix, k in rows):
            return
        what = [next(iter(mix), None) for mix, _ in rows]
        self.live.use(what, c=[c for _, c, _ in entries], rank=[k for _, k in rows])
        self.rows = rows

    @rule(mix=names, c=cs)
    def use_for_a_while(self, mix, c):
        if mix not in self.there or self.merged is not None:
            return
        with self.live.use(mix, c=c):
            self.compare([({mix: c}, None)])

    @rule(name=names, seed=seeds, trainable=st.booleans())
    def add(self, name, seed, trainable):
        if self.merged is not None and name in self.merged[0]:
            return
        self.live.add(adapter(seed), name, replace=True, trainable=trainable)
        self.there[name] = adapter(seed)
        (self.trained.add if trainable else self.trained.discard)(name)
        if name in self.kept:
            self.kept[name] = (self.kept[name][0], adapter(seed))
        if trainable and self.rows is None and self.merged is None:
            self.rows = [({name: 1.0}, None)]  # what is to be trained runs

    @rule(name=names)
    def remove(self, name):
        if name not in self.there or (self.merged is not None and name in self.merged[0]):
            return
        self.live.remove(name)
        del self.there[name]
        self.trained.discard(name)
        self.kept.pop(name, None)
        self.forget(name)

    def forget(self, name):
        if self.rows is None:
            return
        left = [({n: c for n, c in mix.items() if n != name}, k) for mix, k in self.rows]
        emptied = any(mix for mix, _ in self.rows) and not any(mix for mix, _ in left)
        self.rows = None if emptied else left

    @rule(name=names, c=cs)
    def keep(self, name, c):
        if name not in self.there or self.merged is not None:
            return
        self.live.keep(name, c)
        self.kept[name] = (c, self.there[name])
        self.forget(name)

    @rule(name=names)
    def drop(self, name):
        if name in self.kept:
            self.live.drop(name)
            del self.kept[name]

    @rule(gate=st.sampled_from(["current", "always"]))
    def change_gate(self, gate):
        self.live.gate = self.gate = gate

    @precondition(lambda self: self.merged is None)
    @rule(mix=st.dictionaries(names, cs, min_size=1, max_size=2), keep=st.booleans())
    def merge(self, mix, keep):
        mix = {n: c for n, c in mix.items() if n in self.there}
        if not mix or (self.rows and len(self.rows) > 1 and not all(m for m, _ in self.rows)):
            return
        self.live.merge(mix, keep=keep)
        if keep:
            self.merged = (mix, copy.deepcopy(self.base))
        for path in SHAPES:
            layer = self.base.get_submodule(path)
            for n, c in mix.items():
                if path in self.there[n]:
                    layer.weight.data = layer.weight + delta(self.there[n][path], c, None)
        if not keep:
            for n in (n for n, c in mix.items() if c != 0):
                del self.there[n]
                self.trained.discard(n)
                self.kept.pop(n, None)
                self.forget(n)

    @precondition(lambda self: self.merged is not None)
    @rule()
    def unmerge(self):
        self.live.unmerge()
        self.base, self.merged = self.merged[1], None

    @rule()
    def copied(self):
        self.model = copy.deepcopy(self.model)
        self.live = lf.Live.of(self.model)

    def expected(self, mix, rank, x, gate):
        merged = {} if self.merged is None else self.merged[0]
        weights = {}
        for path in SHAPES:
            W = self.base.get_submodule(path).weight.detach().clone()
            for n, c in mix.items():
                if n not in merged and path in self.there[n]:
                    W += delta(self.there[n][path], c, rank)
            for c, a in self.kept.values() if gate else ():
                if path in a:
                    W += delta(a[path], c, None)
            weights[f"{path}.weight"] = W
        return torch.func.functional_call(self.base, weights, (x,)).detach()

    def opens(self, mix, rank):
        """Whether the background runs beside a mix that was asked for."""
        if self.gate == "always":
            return bool(mix)
        return rank != 0 and any(c != 0 for c in mix.values())

    def compare(self, rows):
        if rows is None:
            wanted = self.expected({}, None, self.x, self.gate == "always")
        else:
            parts = zip(rows, self.x.chunk(len(rows)), strict=True)
            wanted = torch.cat([self.expected(*row, x, self.opens(*row)) for row, x in parts])
        with torch.no_grad():
            torch.testing.assert_close(self.model(self.x), wanted, rtol=1e-9, atol=1e-9)

    @invariant()
    def outputs_are_those_of_the_definition(self):
        if hasattr(self, "live"):
            assert set(self.live.names) == set(self.there)
            assert self.live.kept == {n: c for n, (c, _) in self.kept.items()}
            assert self.live.merged == (self.merged[0] if self.merged else {})
            self.compare(self.rows)

    def teardown(self):
        if hasattr(self, "live"):
            self.live.detach()
            base = self.base if self.merged is None else self.merged[1]
            for p, q in zip(self.model.parameters(), base.parameters(), strict=True):
                torch.testing.assert_close(p, q, rtol=1e-12, atol=1e-12)


Machine.TestCase.settings = settings(
    max_examples=40, stateful_step_count=15, deadline=None, derandomize=True, database=None
)
TestAnyOrder = Machine.TestCase
