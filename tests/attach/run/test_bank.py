"""Rows of a batch, each with its own mix, rank and coefficient, against a dense weight per row."""

import copy

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import nn

import lorafold as lf
from lorafold.attach.run import patch
from lorafold.attach.run.bank import Bank
from lorafold.attach.run.grouping import Grouping
from lorafold.layers.kinds import LINEAR

TIGHT = {"rtol": 1e-10, "atol": 1e-10}
NAMES = ["a", "b", "c", "d", "e"]
LAYERS = {"linear": nn.Linear(6, 4).double(), "embedding": nn.Embedding(9, 4).double()}


def updates(inner, dtype=torch.float64):
    g = torch.Generator().manual_seed(0)
    found = {}
    for i, name in enumerate(NAMES):
        A = torch.randn(1 + i % 3, inner, generator=g, dtype=torch.float64)
        B = torch.randn(4, 1 + i % 3, generator=g, dtype=torch.float64)
        found[name] = lf.LowRank(A.to(dtype), B.to(dtype), 0.5 + i)
    return found


MODELS = {}
for kind, layer in LAYERS.items():
    UPDATES = updates(9 if kind == "embedding" else 6)
    model = copy.deepcopy(layer)
    MODELS[kind] = model, lf.attach(model, {n: lf.Adapter({"": u}) for n, u in UPDATES.items()})

mixes = st.one_of(
    st.none(),
    st.sampled_from(NAMES),
    st.dictionaries(st.sampled_from(NAMES), st.sampled_from([-1.0, 0.0, 0.5, 2.0]), max_size=3),
)
batches = st.lists(
    st.tuples(mixes, st.sampled_from([0.0, 1.0, -0.5]), st.sampled_from([None, 0, 1])),
    min_size=1,
    max_size=9,
)


def by_definition(kind, rows, x):
    """The base's output plus c · B[:, :k] A[:k] x for each row, built densely."""
    base, found = LAYERS[kind], []
    for (what, c, k), part in zip(rows, x.chunk(len(rows)), strict=True):
        mix = {} if what is None else {what: 1.0} if isinstance(what, str) else what
        W = base.weight.detach().clone()
        for name, weight in mix.items():
            u = updates(9 if kind == "embedding" else 6)[name]
            delta = c * weight * u.scale * u.B[:, :k] @ u.A[:k]
            W += delta.T if kind == "embedding" else delta
        found.append(torch.func.functional_call(base, {"weight": W}, (part,)))
    return torch.cat(found).detach()


@pytest.mark.parametrize("recorded", [False, True], ids=["eager", "as in a graph"])
@pytest.mark.parametrize("kind", LAYERS)
@given(rows=batches, each=st.integers(1, 3), length=st.sampled_from([1, 4]))
def test_rows_by_the_definition(kind, recorded, rows, each, length):
    model, live = MODELS[kind]
    g = torch.Generator().manual_seed(1)
    if kind == "embedding":
        x = torch.randint(0, 9, (len(rows) * each, length), generator=g)
    else:
        x = torch.randn(len(rows) * each, length, 6, generator=g, dtype=torch.float64)
    what, c, rank = zip(*rows, strict=True)
    rank = [0 if w is None and k == 1 else k for w, k in zip(what, rank, strict=True)]
    rows = list(zip(what, c, rank, strict=True))
    with pytest.MonkeyPatch.context() as monkeypatch:
        monkeypatch.setattr(patch, "_is_recorded", lambda y: recorded)
        with live.use(list(what), c=list(c), rank=rank), torch.no_grad():
            found = model(x)
            off = [not live_row for live_row in live.active]
    torch.testing.assert_close(found, by_definition(kind, rows, x), **TIGHT)
    for i, chunk in enumerate(found.chunk(len(rows))):  # rows of the base, to the bit
        if off[i]:
            assert torch.equal(chunk, LAYERS[kind](x).chunk(len(rows))[i])


@pytest.mark.parametrize("recorded", [False, True], ids=["eager", "as in a graph"])
def test_rows_of_the_base_are_selected_and_not_added_to(monkeypatch, recorded):
    # 0 · ∞ would be no number.
    monkeypatch.setattr(patch, "_is_recorded", lambda y: recorded)
    model, live = MODELS["linear"]
    x = torch.full((3, 6), 1e308, dtype=torch.float64)
    x[2] = 1.0
    with live.use(["e", None, "e"], c=[0, 1, 1]), torch.no_grad():
        found = model(x)
    assert torch.equal(found[:2], LAYERS["linear"](x)[:2])
    assert not torch.equal(found[2], LAYERS["linear"](x)[2])
    assert found[2].isfinite().all()


def test_one_row_of_a_list_is_the_whole_batch():
    model, live = MODELS["linear"]
    x = torch.randn(5, 6, dtype=torch.float64)
    with live.use(["b"]):
        listed = model(x)
    with live.use("b"):
        torch.testing.assert_close(listed, model(x), **TIGHT)


def test_the_order_of_the_slots_is_taken_where_they_lie_together():
    entries = [(0, 0), (1, 1), (2, 2)]
    assert Grouping(entries, 3, 1, {}).dense
    assert Grouping(entries, 3, 1, {}).in_order
    shuffled = Grouping([(2, 0), (0, 1), (1, 2)], 3, 1, {})
    assert shuffled.dense
    assert not shuffled.in_order
    assert not Grouping([(0, 0), (60, 1)], 2, 1, {}).dense  # 61 slots for two rows
    assert Grouping([], 2, 1, {}).segments == []


def test_gradients_of_rows_reach_the_input_alike_on_both_ways(monkeypatch):
    model, live = MODELS["linear"]
    x = torch.randn(6, 3, 6, dtype=torch.float64)
    grads = []
    for recorded in (False, True):
        monkeypatch.setattr(patch, "_is_recorded", lambda y, recorded=recorded: recorded)
        given_x = x.clone().requires_grad_()
        with live.use(["a", None, "c", "c", "b", {"a": 1, "e": -1}]):
            model(given_x).square().sum().backward()
        grads.append(given_x.grad)
    torch.testing.assert_close(grads[0], grads[1], **TIGHT)
    assert grads[0].abs().min() > 0


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_precision_rows(dtype):
    base = nn.Linear(6, 4).to(dtype)
    model = copy.deepcopy(base)
    live = lf.attach(model, {n: lf.Adapter({"": u}) for n, u in updates(6, dtype).items()})
    x = torch.randn(5, 3, 6).to(dtype)
    with live.use([*NAMES[:4], None], c=0.1):
        found = model(x)
    assert found.dtype == dtype
    assert torch.equal(found[4], base(x)[4])
    for i, name in enumerate(NAMES[:4]):
        u = updates(6, dtype)[name]
        W = base.weight.double() + 0.1 * u.scale * u.B.double() @ u.A.double()
        wanted = x[i].double() @ W.T + base.bias.double()
        error = (found[i].double() - wanted).norm() / wanted.norm()
        assert error < 20 * torch.finfo(dtype).eps


def test_reading_what_was_written(make_update):
    bank = Bank(LINEAR, (4, 6), 3, 4, device=None, dtype=torch.float32)
    u = make_update(4, 6, 2)
    bank.write(1, u)
    again = bank.read(1, 2, u.scale)
    assert torch.equal(again.A, u.A)
    assert torch.equal(again.B, u.B)
    assert bank.nbytes == 4 * 3 * 4 * (4 + 6)
    bank.grow(5, torch.float64, 8)
    assert torch.equal(bank.read(1, 2, 1.0).A, u.A.double())
    assert bank.A.shape == (5, 8, 6)
