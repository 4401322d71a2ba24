"""Kept rounds: a frozen background beside what is current, and when it runs."""

import copy

import pytest
import torch
from torch import nn

import lorafold as lf
from lorafold.errors import MismatchError, RefusedError, UnknownNameError

TIGHT = {"rtol": 1e-10, "atol": 1e-10}


@pytest.fixture
def live(net, three):
    return lf.attach(net, three)


@pytest.fixture
def gives(net, base, three, x, expected):
    """gives({name: c}, rows): the output, or rows of it, is that of the mix."""

    def check(mix, rows=slice(None)):
        wanted = expected(base, [(three[name], c) for name, c in mix.items()], x)[rows]
        torch.testing.assert_close(net(x).detach()[rows], wanted, **TIGHT)
        return True

    return check


def test_the_default_gate_is_current(live, gives, net, base, x):
    assert live.gate == "current"
    live.keep("b", 0.5)
    live.keep("c", -0.25)
    assert live.kept == {"b": 0.5, "c": -0.25}
    assert torch.equal(net(x), base(x))  # nothing is current: the pristine base
    with live.use("a", c=2):
        assert gives({"a": 2, "b": 0.5, "c": -0.25})
    with live.use("a", c=0):
        assert torch.equal(net(x), base(x))
    with live.use("a", rank=0):
        assert torch.equal(net(x), base(x))
    with live.use(None):
        assert torch.equal(net(x), base(x))


def test_the_gate_of_each_row_is_its_own(live, gives, net, base, x):
    live.keep("b", 0.5)
    with live.use(["a", None, "c", "a", "a", {"a": 0, "c": 0}], c=[1, 1, -1, 0, 0.5, 1]):
        assert gives({"a": 1, "b": 0.5}, slice(0, 1))
        assert gives({"c": -1, "b": 0.5}, slice(2, 3))
        assert gives({"a": 0.5, "b": 0.5}, slice(4, 5))
        for i in (1, 3, 5):
            assert torch.equal(net(x)[i], base(x)[i])


def test_always(live, gives, net, base, x):
    live.keep("b", 0.5)
    live.gate = "always"
    assert gives({"b": 0.5})
    with live.use("a", c=0):
        assert gives({"b": 0.5})
    with live.use(["a", "c", "a"], c=[1, 0, -1]):
        assert gives({"a": 1, "b": 0.5}, slice(0, 2))
        assert gives({"b": 0.5}, slice(2, 4))
        assert gives({"a": -1, "b": 0.5}, slice(4, 6))
    with live.use(None):  # who asks for the base gets it
        assert torch.equal(net(x), base(x))
    with live.use(["a", None]):
        assert torch.equal(net(x)[3:], base(x)[3:])


def test_a_gate_of_ones_own(live, gives, net, base, x):
    live.keep("b", 0.5)
    seen = []

    def half_where_negative(c):
        seen.append(tuple(c.shape))
        return torch.where(c.sum(1) < 0, 0.5, 0.0)

    live.gate = half_where_negative
    assert live.gate is half_where_negative
    with live.use("a", c=-1):
        assert gives({"a": -1, "b": 0.25})
    with live.use("a"):
        assert gives({"a": 1})
    with live.use([{"a": 1, "c": -2}, "a"]):
        assert gives({"a": 1, "c": -2, "b": 0.25}, slice(0, 3))
        assert gives({"a": 1}, slice(3, 6))
    assert (1, 1) in seen
    assert (2, 2) in seen
    live.gate = lambda c: 2.0  # one for all
    with live.use(["a", "c"]):
        assert gives({"a": 1, "b": 1}, slice(0, 3))


@pytest.mark.parametrize("gate", ["sometimes", None, 1.0])
def test_bad_gates(live, gives, gate):
    live.keep("b")
    live.use("a")
    with pytest.raises(MismatchError, match="gate must be 'current', 'always' or a function"):
        live.gate = gate
    assert live.gate == "current"
    assert gives({"a": 1, "b": 1})


def test_a_gate_of_the_wrong_size_changes_nothing(live, gives):
    live.keep("b")
    live.use(["a", "a"])
    with pytest.raises(MismatchError, match="the gate gave 3 values for 2 rows"):
        live.gate = lambda c: [1.0, 2.0, 3.0]
    assert live.gate == "current"
    assert gives({"a": 1, "b": 1})


def test_a_gate_that_gives_nan_changes_nothing(live, gives):
    live.keep("b")
    live.use("a")
    with pytest.raises(MismatchError, match=r"the gate gave \[nan\], which is not finite"):
        live.gate = lambda c: float("nan")
    assert gives({"a": 1, "b": 1})


def test_dropping(live, gives, net, base, x):
    live.keep("b", 0.5)
    live.keep("c")
    live.use("a")
    live.drop("b")
    assert live.kept == {"c": 1.0}
    assert gives({"a": 1, "c": 1})
    with pytest.raises(UnknownNameError, match="'b' is not kept; there are 1: 'c'"):
        live.drop("b")
    live.drop("c")
    assert gives({"a": 1})
    assert set(live.names) == {"a", "b", "c"}
    live.use("b")
    assert gives({"b": 1})


def test_keeping_again_changes_the_coefficient(live, gives):
    live.keep("b", 0.5)
    live.keep("b", -1)
    live.use("a")
    assert live.kept == {"b": -1.0}
    assert gives({"a": 1, "b": -1})


def test_what_is_kept_is_no_longer_current(live, net, base, x, gives):
    live.use("b")
    live.keep("b")
    assert live.active == {}
    assert torch.equal(net(x), base(x))
    live.use({"b": 0.5, "a": 1})  # asked for again: on top
    assert gives({"a": 1, "b": 1.5})


def test_removing_takes_it_out_of_the_background(live, gives):
    live.keep("b")
    live.use("a")
    live.remove("b")
    assert live.kept == {}
    assert gives({"a": 1})


@pytest.mark.parametrize("c", ["1", None, float("nan"), [1.0], True])
def test_bad_coefficients(live, gives, c):
    live.use("a")
    if c is None:
        live.keep("b", c)  # as for `use`: 1
        assert live.kept == {"b": 1.0}
        return
    with pytest.raises(MismatchError, match=r"c"):
        live.keep("b", c)
    assert live.kept == {}
    assert gives({"a": 1})


def test_rounds_commute(make_net, three, x):
    outputs = []
    for order in (("b", "c"), ("c", "b")):
        net = make_net()
        live = lf.attach(net, three)
        for name in order:
            live.keep(name, 0.5)
        live.use("a")
        outputs.append(net(x))
    torch.testing.assert_close(*outputs, **TIGHT)


def test_pissa_rounds_mix_with_lora_rounds_and_commute(make_net, base, x, expected):
    lora = lf.LoRA(rank=3, seed=1, dtype=torch.float64)
    pissa = lf.PiSSA(rank=2, seed=1, mean=0.3, std=0.2, dtype=torch.float64)
    outputs = []
    for rounds in ({"one": lora, "two": pissa}, {"two": pissa, "one": lora}):
        net = make_net()
        live = lf.attach(net, {**rounds, "now": lf.LoRA(rank=2, seed=3, dtype=torch.float64)})
        g = torch.Generator().manual_seed(0)
        for name in ("one", "now"):
            for m in live._state.trained(name).fresh.values():
                m.B.data = torch.randn(m.B.shape, generator=g, dtype=torch.float64) / 9
        for name in rounds:
            live.keep(name, -0.5)
        live.use("now", c=2)
        wanted = [
            (live.adapter(name), c) for name, c in {"one": -0.5, "two": -0.5, "now": 2}.items()
        ]
        torch.testing.assert_close(net(x).detach(), expected(base, wanted, x), **TIGHT)
        outputs.append(net(x).detach())
    torch.testing.assert_close(*outputs, **TIGHT)


def test_a_later_round_picks_among_the_directions_that_are_left(net):
    live = lf.attach(net, {"one": lf.PiSSA(rank=3)})
    live.keep("one")
    live.add(lf.PiSSA(rank=3), "two")
    live.keep("two")
    live.add(lf.PiSSA(rank=3, niter=20), "three")
    chosen = {n: live._state.trained(n).fresh["layers.0.q"].index.tolist() for n in live.names}
    assert chosen == {"one": [0, 1, 2], "two": [3, 4, 5], "three": [6, 7]}
    live.keep("three")
    with pytest.raises(MismatchError, match="kept rounds have taken every direction of module"):
        live.add(lf.PiSSA(rank=1), "four")
    assert live.names == ["one", "two", "three"]
    live.drop("two")
    live.add(lf.PiSSA(rank=9), "four")
    assert live._state.trained("four").fresh["layers.0.q"].index.tolist() == [3, 4, 5]


def test_what_is_kept_is_frozen_as_it_was(net, x):
    live = lf.attach(net, {n: lf.LoRA(rank=2, seed=i) for i, n in enumerate(("one", "two", "now"))})
    for p in live.parameters():
        p.data = torch.randn(p.shape, generator=torch.Generator().manual_seed(p.numel())) / 5
    live.keep("one")
    live.use("now")
    before = net(x).detach()
    for m in live._state.trained("one").fresh.values():
        m.B.data += 1  # what training on would do
    assert torch.equal(net(x).detach(), before)
    live.keep("two", 0)  # nothing more in the background
    live.use("now")
    torch.testing.assert_close(net(x).detach(), before, rtol=1e-3, atol=1e-3)
    live.keep("one")  # as it is now
    live.use("now")
    assert (net(x).detach() - before).abs().max() > 1


def test_the_background_has_no_gradient_and_the_current_round_has(net, x, three):
    live = lf.attach(net, {"one": lf.LoRA(rank=2), "two": lf.LoRA(rank=2)})
    live.keep("one", 0.5)
    live.use("two")
    net(x).square().sum().backward()
    assert all(
        p.grad is None for m in live._state.trained("one").fresh.values() for p in m.parameters()
    )
    assert all(m.B.grad.abs().sum() > 0 for m in live._state.trained("two").fresh.values())


def test_no_dense_update_appears(make_update, shape_watch):
    layer = nn.Linear(300, 200)
    adapters = {n: lf.Adapter({"": make_update(200, 300, 3, seed=i)}) for i, n in enumerate("abc")}
    live = lf.attach(layer, adapters)
    x = torch.randn(4, 300)
    with shape_watch() as watch:
        live.keep("a")
        live.keep("b", 0.5)
        live.use("c")
        # Not the layer itself, whose own product has the weight's size.
        kept, y = live._state.slots.patches[""].fresh["kept"], torch.zeros(4, 200)
        kept.uniform(layer, y, x, 1.0, kept.rank)
        kept.rows(layer, y, x, torch.ones(2, kept.rank))
    assert watch.largest < 200 * 300 / 4


def test_mixed_ranks_and_dtypes_join_in_the_widest(make_update, dense):
    layer = nn.Linear(6, 4).double()
    base = copy.deepcopy(layer)
    parts = {
        "half": (make_update(4, 6, 1, seed=1, dtype=torch.float16), 0.5),
        "brain": (make_update(4, 6, 3, seed=2, dtype=torch.bfloat16), -1.0),
        "whole": (make_update(4, 6, 2, seed=3, dtype=torch.float64), 2.0),
    }
    now = make_update(4, 6, 2, seed=4, dtype=torch.float64)
    live = lf.attach(layer, {**{n: lf.Adapter({"": u}) for n, (u, _) in parts.items()},
                             "now": lf.Adapter({"": now})})  # fmt: skip
    for name, (_, c) in parts.items():
        live.keep(name, c)
    kept = live._state.slots.patches[""].fresh["kept"]
    assert (kept.A.dtype, kept.A.shape, kept.B.shape) == (torch.float64, (6, 6), (4, 6))
    x = torch.randn(3, 6, dtype=torch.float64)
    wanted = base(x) + x @ (dense(now) + sum(c * dense(u) for u, c in parts.values())).T
    with live.use("now"):
        torch.testing.assert_close(layer(x), wanted, rtol=1e-9, atol=1e-9)


def test_copies_keep_their_background(live, net, x, gives):
    live.keep("b", 0.5)
    live.use("a")
    twin = copy.deepcopy(net)
    assert torch.equal(twin(x), net(x))
    other = lf.Live.of(twin)
    other.drop("b")
    assert gives({"a": 1, "b": 0.5})


def test_convolutions_have_a_background_too(make_update, dense):
    layer = nn.Conv1d(3, 4, 2).double()
    u, v = (make_update(4, 6, 2, seed=i, dtype=torch.float64) for i in (1, 2))
    base = copy.deepcopy(layer)
    live = lf.attach(layer, {"u": lf.Adapter({"": u}), "v": lf.Adapter({"": v})})
    live.keep("u", 0.5)
    x = torch.randn(4, 3, 5, dtype=torch.float64)
    W = base.weight + (0.5 * dense(u) + dense(v)).reshape(4, 3, 2)
    wanted = nn.functional.conv1d(x, W, base.bias)
    with live.use("v"):
        torch.testing.assert_close(layer(x), wanted, **TIGHT)
    with live.use(["v", None]):
        torch.testing.assert_close(layer(x)[:2], wanted[:2], **TIGHT)
        assert torch.equal(layer(x)[2:], base(x)[2:])


def test_more_than_updates_can_t_be_kept(net, three, x, base):
    live = lf.attach(net, {"a": three["a"], "new": lf.LoRA(rank=2, modules_to_save=["lm_head"])})
    before = live.active
    with pytest.raises(RefusedError, match=r"'new' also holds 'lm_head'.*live\.merge"):
        live.keep("new")
    assert live.kept == {}
    assert live.active == before
    live.keep("a")
    assert live.kept == {"a": 1.0}


@pytest.mark.parametrize("used", [True, False])
def test_always_runs_once_the_only_current_one_is_kept(make_net, x, used):
    net = make_net()
    live = lf.attach(net, lf.PiSSA(rank=3, std=0.5, seed=0))
    y = net(x)
    if not used:
        live._state.running.forget("default")
    live.keep("default")
    live.gate = "always"
    torch.testing.assert_close(net(x), y, rtol=1e-4, atol=1e-4)


def test_what_can_t_be_kept_does_not_replace_what_is(live, net, three, x, fingerprint):
    live.keep("a", 0.5)
    live.gate = "always"
    y = net(x)
    spec = lf.LoRA(rank=2, targets="q", modules_to_save=["lm_head"])
    with pytest.raises(lf.RefusedError, match="can't run in the background"):
        live.add(spec, "a", replace=True)
    assert live.kept == {"a": 0.5}
    assert torch.equal(net(x), y)
