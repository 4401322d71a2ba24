"""Slots: a fixed number of adapters on the device; the least recently used one leaves."""

import pytest
import torch

import lorafold as lf
from lorafold.errors import MismatchError

TIGHT = {"rtol": 1e-11, "atol": 1e-11}


@pytest.fixture(scope="module")
def many(make_adapter, make_net, shapes_of):
    shapes = shapes_of(make_net(), ("q", "down"))
    options = {"dtype": torch.float64, "scale": 0.5}
    return {f"n{i}": make_adapter(shapes, 1 + i % 4, seed=i, **options) for i in range(9)}


def bank_of(live, path="layers.0.q"):
    return live._state.slots.patches[path].bank("own")


def test_slots_are_made_as_adapters_come(net, many):
    live = lf.attach(net, {"n0": many["n0"]}, max_rank=4)
    sizes = []
    for i in range(1, 9):
        live.add(many[f"n{i}"], f"n{i}")
        sizes.append(len(bank_of(live).A))
    assert all(size > i for i, size in enumerate(sizes, 1))
    assert len(set(sizes)) < 5  # by doubling: seldom
    assert len(live._state.slots.places) == 9


def test_a_number_reserves_them(net, many):
    live = lf.attach(net, {"n0": many["n0"]}, slots=5, max_rank=4)
    before = bank_of(live).A.data_ptr()
    assert bank_of(live).A.shape == (5, 4, 8)
    for i in range(1, 9):
        live.add(many[f"n{i}"], f"n{i}")
    assert bank_of(live).A.shape == (5, 4, 8)
    assert bank_of(live).A.data_ptr() == before


def test_the_least_recently_used_leaves(net, base, many, x, expected):
    live = lf.attach(net, many, slots=3)
    assert list(live._state.slots.places) == ["n0", "n1", "n2"]
    live.use("n0")
    live.use("n5")
    assert list(live._state.slots.places) == ["n2", "n0", "n5"]  # n1 was used longest ago
    live.use({"n2": 1, "n7": 1})
    assert set(live._state.slots.places) == {"n5", "n2", "n7"}
    live.use("n5")
    live.use("n1")
    assert list(live._state.slots.places) == ["n7", "n5", "n1"]
    # Whoever left and came back is the same, however small or large its forerunner's rank was.
    for name in [*many, *reversed(many)]:
        with live.use(name, c=0.5):
            wanted = expected(base, [(many[name], 0.5)], x)
            torch.testing.assert_close(net(x), wanted, **TIGHT)
        with live.use([name, None, "n4"]):
            found = net(x)
        torch.testing.assert_close(found[:2], expected(base, [(many[name], 1)], x)[:2], **TIGHT)
        torch.testing.assert_close(found[4:], expected(base, [(many["n4"], 1)], x)[4:], **TIGHT)


def test_what_leaves_while_it_is_in_use_outside_a_context_comes_back(net, base, many, x, expected):
    live = lf.attach(net, many, slots=1)
    live.use("n3")
    with live.use("n8"):
        assert list(live._state.slots.places) == ["n8"]
        torch.testing.assert_close(net(x), expected(base, [(many["n8"], 1)], x), **TIGHT)
    torch.testing.assert_close(net(x), expected(base, [(many["n3"], 1)], x), **TIGHT)


def test_more_at_once_than_there_are_slots(net, base, many, x, expected):
    live = lf.attach(net, many, slots=2)
    live.use("n1")
    for what in ({"n1": 1, "n2": 1, "n3": 1}, ["n1", "n2", "n3"]):
        with pytest.raises(MismatchError, match=r"3 adapters at once do not fit in 2 slots"):
            live.use(what)
    assert live.active == {"n1": 1.0}
    torch.testing.assert_close(net(x), expected(base, [(many["n1"], 1)], x), **TIGHT)
    with live.use(["n1", "n2", "n1"]):
        pass
    with live.use({"n1": 1, "n2": 1, "n3": 0}):  # what doesn't run needs no slot
        pass


def test_removing_frees_a_slot(net, many):
    live = lf.attach(net, many, slots=2)
    live.remove("n0")
    live.use("n5")
    assert set(live._state.slots.places) == {"n1", "n5"}


def test_a_module_that_an_adapter_lacks_gets_nothing_from_its_slots_forerunner(
    net, base, three, x, expected
):
    live = lf.attach(net, three, slots=1)
    live.use("a")
    for what in ("b", ["b"]):  # q only, in the slot where "a" was, which has everything
        with live.use(what):
            torch.testing.assert_close(net(x), expected(base, [(three["b"], 1)], x), **TIGHT)


def test_trained_adapters_take_no_slot(net, many):
    live = lf.attach(net, {"n0": many["n0"], "new": lf.LoRA(rank=2)}, slots=1)
    live.use({"n0": 1, "new": 1})
    assert list(live._state.slots.places) == ["n0"]


def test_the_64th_adapter_makes_no_new_banks(net, many):
    live = lf.attach(net, {"n0": many["n0"]}, slots=64)
    pointers = {p.bank("own").A.data_ptr() for p in live._state.slots.patches.values()}
    for i in range(1, 64):
        live.add(many["n4" if i % 2 else "n0"], f"m{i}")
    assert {p.bank("own").A.data_ptr() for p in live._state.slots.patches.values()} == pointers


@pytest.mark.parametrize("spec", [lf.LoRA(rank=2), lf.PiSSA(rank=2, mean=0.5)], ids=type)
def test_layers_that_come_with_trained_adapters(net, base, three, x, expected, spec):
    live = lf.attach(net, three["b"])  # q only
    live.use("default")
    live.add(spec, "everywhere")
    for what in ("default", ["default", None]):
        with live.use(what):
            wanted = expected(base, [(three["b"], 1)], x)
            torch.testing.assert_close(net(x)[:3].detach(), wanted[:3], **TIGHT)
    live.add(three["a"], "given", trainable=True)
    live.add(lf.LoRA(rank=2, targets=["lm_head"], exclude=()), "head")
    for what in ("given", ["given", None], {"given": 1, "head": 1}):
        with live.use(what):
            wanted = expected(base, [(three["a"], 1)], x)
            torch.testing.assert_close(net(x)[:3].detach(), wanted[:3], **TIGHT)


def test_what_runs_goes_on_where_another_can_t_be_loaded(net, three, x, monkeypatch):
    live = lf.attach(net, three, slots=1)
    live.use("a")
    y = net(x)
    source = live._state.sources["b"]
    load = source.load

    def broken(slots, slot):
        load(slots, slot)
        raise OSError("the disk is gone")

    monkeypatch.setattr(source, "load", broken)
    with pytest.raises(OSError, match="disk"):
        live.use("b")
    assert live.active == {"a": 1.0}
    assert torch.equal(net(x), y)


def _alike(net, shapes_of, rank, a, b):
    return lf.Adapter(
        {
            path: lf.LowRank(torch.full((rank, inner), a), torch.full((out, rank), b))
            for path, (out, inner) in shapes_of(net, ("q",)).items()
        }
    )


def test_nothing_of_who_left_reaches_who_comes(net, shapes_of, x):
    """Products with what is left may overflow, and 0 · ∞ is no number."""
    wide, small = (_alike(net, shapes_of, *of) for of in ((4, 6e4, 1.0), (1, 0.01, 0.01)))
    live = lf.attach(net, {"wide": wide, "small": small}, slots=1, dtype=torch.float16)
    live.use("wide")
    live.use(["small", None, None])
    assert torch.isfinite(net(x)).all()


def test_what_a_dtype_cannot_hold_is_refused(net, shapes_of, x):
    small = _alike(net, shapes_of, 1, 0.01, 0.01)
    live = lf.attach(net, {"small": small}, dtype=torch.float16)
    with live.use("small"):
        before = net(x)
    with pytest.raises(MismatchError, match="q.*1e\\+05, which float16 can't hold.*bfloat16"):
        live.add(_alike(net, shapes_of, 1, 1e5, 1.0), "huge")
        live.use("huge")
    with live.use("small"):
        assert torch.equal(net(x), before)
