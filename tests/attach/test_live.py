"""The handle: what runs, what comes and goes, and that an error changes nothing."""

import pytest
import torch
from torch import nn

import lorafold as lf
from lorafold.errors import MismatchError, UnknownNameError

TIGHT = {"rtol": 1e-11, "atol": 1e-11}


@pytest.fixture
def live(net, three):
    return lf.attach(net, three)


@pytest.fixture
def gives(net, base, three, x, expected):
    """gives({name: c}): whether the attached model's output is that of the mix."""

    def check(mix):
        if not mix:
            return torch.equal(net(x), base(x))
        wanted = expected(base, [(three[name], c) for name, c in mix.items()], x)
        torch.testing.assert_close(net(x).detach(), wanted, **TIGHT)
        return True

    return check


def test_a_plain_call_stays(live, gives):
    live.use("a")
    assert gives({"a": 1})
    live.use("b", c=-0.5)
    assert gives({"b": -0.5})
    assert live.active == {"b": -0.5}
    live.use(None)
    assert gives({})
    live.use("a")
    live.use()
    assert live.active == {}


def test_contexts_nest_and_restore(live, gives):
    live.use("a")
    with live.use({"b": 2}) as handle:
        assert handle is live
        assert gives({"b": 2})
        with live.use(None):
            assert gives({})
            with live.use("c", c=0.5):
                assert gives({"c": 0.5})
            assert gives({})
        assert gives({"b": 2})
        with pytest.raises(ZeroDivisionError), live.use("c"):
            raise ZeroDivisionError
        assert gives({"b": 2})
    assert gives({"a": 1})


def test_active_says_what_runs(live):
    for what, options, active in [
        ("a", {}, {"a": 1.0}),
        ({"a": 1, "b": -0.3}, {"c": 2}, {"a": 2.0, "b": -0.6}),
        ("a", {"c": 0}, {}),
        ("a", {"rank": 0}, {}),
        (["a", None, {"b": 0.5}], {"c": [1, 1, 2]}, [{"a": 1.0}, {}, {"b": 1.0}]),
        (["a"], {}, [{"a": 1.0}]),
        (None, {}, {}),
    ]:
        live.use(what, **options)
        assert live.active == active


def test_the_dial_is_linear_and_zero_is_the_base(live, net, base, x):
    layer, alone = net.layers[2].up, base.layers[2].up
    h = torch.randn(7, 8, dtype=torch.float64)
    zero = alone(h)
    with live.use("a"):
        one = layer(h) - zero
    for c in (-2.0, -0.5, 1e-3, 0.25, 3):
        with live.use("a", c=c):
            torch.testing.assert_close(layer(h) - zero, c * one, **TIGHT)
    for what in ("a", {"a": 0.0}, {"a": 1, "b": 2}):
        with live.use(what, c=0):
            assert torch.equal(net(x), base(x))
    # Not even an infinity in the delta shows.
    huge = torch.full((1, 8), 1e308, dtype=torch.float64)
    with live.use(["a", "b"], c=[0, 0]):
        assert torch.equal(layer(torch.cat([huge, huge])), alone(torch.cat([huge, huge])))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_zero_is_the_base_bit_for_bit_in_every_dtype(make_net, three, x, dtype):
    net, base = make_net(dtype), make_net(dtype)
    live = lf.attach(net, {**three, "new": lf.PiSSA(rank=2, mean=0.5)})
    for what, options in [
        ("a", {"c": 0}),
        ("a", {"rank": 0}),
        ("new", {"c": 0}),
        ({"a": 0, "new": 0}, {}),
        (["a", "b", "new"], {"c": [0, 0, 0]}),
        (["a", "b", "new"], {"rank": 0}),
        (None, {}),
    ]:
        with live.use(what, **options):
            assert torch.equal(net(x), base(x))
    with live.use(["a", "b", "new", None, "a", "a"], c=[1, 0, 0, 1, 1, 0]):
        found = net(x)
    same = [torch.equal(found[i], base(x)[i]) for i in range(6)]
    assert same == [False, True, True, True, False, True]


# Coming and going


def test_adding(live, make_adapter, shapes_of, base, net, x, expected):
    more = make_adapter(shapes_of(base, ("q", "lm_head")), 3, seed=9, dtype=torch.float64)
    live.use("a")
    live.add(more, "more")
    assert live.names == ["a", "b", "c", "more"]
    assert live.active == {"a": 1.0}
    assert "lm_head" in live._state.slots.patches
    with live.use("more"):
        torch.testing.assert_close(net(x), expected(base, [(more, 1)], x), **TIGHT)
    live.detach()
    assert type(net.lm_head) is nn.Linear


def test_a_taken_name(live, three, gives):
    with pytest.raises(MismatchError, match=r"'a' is attached already.*replace=True"):
        live.add(three["b"], "a")
    live.use("a")
    assert gives({"a": 1})


def test_replacing_exchanges_the_factors(live, three, gives, net, base, x, expected):
    live.use({"a": 0.5, "b": 1})
    live.add(three["c"], "a", replace=True)
    assert set(live.names) == {"a", "b", "c"}
    assert live.active == {"a": 0.5, "b": 1.0}
    wanted = expected(base, [(three["c"], 0.5), (three["b"], 1)], x)
    torch.testing.assert_close(net(x), wanted, **TIGHT)
    assert live.adapter("a") is three["c"]


def test_replacing_checks_shapes_first(live, make_adapter, gives, net, fingerprint):
    live.use("a")
    before = fingerprint(net)
    with pytest.raises(MismatchError, match=r"'layers\.0\.q' takes updates of shape \(8, 8\)"):
        live.add(make_adapter({"layers.0.q": (8, 16)}, 2), "a", replace=True)
    assert live.active == {"a": 1.0}
    assert gives({"a": 1})
    assert fingerprint(net) == before


def test_replacing_what_is_kept(live, three, net, base, x, expected):
    live.keep("a", 0.5)
    live.add(three["c"], "a", replace=True)
    assert live.kept == {"a": 0.5}
    with live.use("b"):
        wanted = expected(base, [(three["b"], 1), (three["c"], 0.5)], x)
        torch.testing.assert_close(net(x), wanted, **TIGHT)


def test_one_at_a_time(live, three, gives):
    with pytest.raises(MismatchError, match="add takes one adapter at a time, not a dict"):
        live.add({"x": three["a"]}, "x")
    with pytest.raises(MismatchError, match="not a int"):
        live.add(3, "x")
    assert gives({})


@pytest.mark.parametrize("name", ["", 3, None])
def test_names_are_texts(live, three, name):
    with pytest.raises(MismatchError, match="non-empty text"):
        live.add(three["a"], name)


def test_odd_names_are_data(net, base, three, x, expected):
    # Names that fall together as file names, or that PyTorch forbids for modules.
    names = ["a/b", "a_b", "a.b", "../x", "forward", "ü", " "]
    live = lf.attach(net, {name: three["b" if i % 2 else "a"] for i, name in enumerate(names)})
    live.add(lf.LoRA(rank=2), "weight.data")
    for i, name in enumerate(names):
        with live.use(name):
            wanted = expected(base, [(three["b" if i % 2 else "a"], 1)], x)
            torch.testing.assert_close(net(x).detach(), wanted, **TIGHT)


def test_removing(live, gives, net):
    live.use({"a": 1, "b": 2})
    live.remove("a")
    assert live.names == ["b", "c"]
    assert live.active == {"b": 2.0}
    assert gives({"b": 2})
    with pytest.raises(UnknownNameError, match="no adapter 'a'"):
        live.use("a")
    live.remove("b")
    assert gives({})
    live.remove("c")
    assert live.names == []
    assert gives({})


def test_removing_what_rows_run(live, net, base, three, x, expected):
    live.use(["a", "b"])
    live.remove("a")
    assert live.active == [{}, {"b": 1.0}]
    assert torch.equal(net(x)[:3], base(x)[:3])
    wanted = expected(base, [(three["b"], 1)], x)
    torch.testing.assert_close(net(x)[3:], wanted[3:], **TIGHT)


def test_removing_within_a_context(live, gives):
    live.use({"a": 1, "b": 2})
    with live.use("c"):
        live.remove("a")
        live.remove("c")
        assert gives({})
    assert live.active == {"b": 2.0}
    assert gives({"b": 2})


def test_removing_a_trained_one_takes_its_parameters(net, three, x):
    live = lf.attach(net, {"one": lf.LoRA(rank=2), "two": lf.LoRA(rank=3), "a": three["a"]})
    assert len(list(live.parameters())) == 2 * 12 * 2
    live.remove("one")
    assert [p.shape[0] for p in live.parameters()][::2] == [3] * 12
    assert live.active == {}
    live.add(lf.LoRA(rank=4), "one")
    assert sorted({min(p.shape) for p in live.parameters()}) == [3, 4]
    with live.use({"one": 1, "two": 1, "a": 1}):
        net(x)


def test_detaching_within_a_context(live, gives):
    with live.use("a"):
        live.detach()
        assert gives({})
    assert gives({})


def test_an_adapter_comes_back_as_it_was_given(live, three):
    for name, adapter in three.items():
        assert live.adapter(name) is adapter


def test_only_what_is_trained_has_factors_to_train(live):
    with pytest.raises(MismatchError, match="'a' is not trained"):
        live.parameters("a")


def test_the_argument_is_not_changed(net, three, x):
    digests = {name: a.digest for name, a in three.items()}
    live = lf.attach(net, dict(three))
    live.use({"a": 2, "b": 1})
    net(x)
    live.merge()
    live.unmerge()
    live.keep("c", 3)
    live.detach()
    assert {name: a.digest for name, a in three.items()} == digests
