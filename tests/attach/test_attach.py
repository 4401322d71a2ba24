"""Attaching is in place and exactly reversible, and a failed attach is no attach."""

import copy
import pickle
import re

import pytest
import torch
from torch import nn

import lorafold as lf
from lorafold.errors import FileError, MismatchError, RefusedError, UnknownNameError

TIGHT = {"rtol": 1e-11, "atol": 1e-11}


def test_a_single_adapter_is_named_default_and_does_not_run_by_itself(net, base, three, x):
    live = lf.attach(net, three["a"])
    assert live.names == ["default"]
    assert live.active == {}
    assert torch.equal(net(x), base(x))


def test_what_runs_can_be_said_at_once(make_net, three, x):
    model = make_net()
    before = model(x)
    live = lf.attach(model, three, use={"a": 1.0, "b": -0.5})
    now = model(x)
    live.detach()
    with lf.attach(model, three).use({"a": 1.0, "b": -0.5}):
        assert torch.equal(model(x), now)
    lf.Live.of(model).detach()
    with pytest.raises(UnknownNameError, match="did you mean"):
        lf.attach(model, {"roman": three["a"]}, use="romann")
    assert torch.equal(model(x), before)
    with pytest.raises(MismatchError, match="nothing is attached"):
        lf.Live.of(model)


def test_what_waits_is_told(make_net, three, caplog, monkeypatch):
    monkeypatch.setattr("lorafold.words._hinted", set())

    def said():
        found = [record.message for record in caplog.records]
        caplog.clear()
        return found

    lf.attach(make_net(), lf.LoRA(rank=2))
    live = lf.attach(make_net(), three, use="a")
    assert re.fullmatch(r"Live\(\d+ layers, 3 adapters, 'a' in use\)", repr(live))
    live.use(["a", None, "b"])
    assert repr(live).endswith("'a' and 'b' in use)") or "'a', 'b' in use" in repr(live)
    assert not said()
    live = lf.attach(make_net(), {"a": three["a"]})
    assert re.fullmatch(r"Live\(\d+ layers, 1 adapter, none in use: live.use\('a'\)\)", repr(live))
    assert [text for text in said() if "wait" in text and "use=name" in text]
    lf.attach(make_net(), three)
    assert not said()  # once
    live.keep("a")
    assert "none in use" not in repr(live)


def test_outputs_by_the_definition(net, base, three, x, expected):
    live = lf.attach(net, three)
    for name, adapter in three.items():
        with live.use(name):
            torch.testing.assert_close(net(x), expected(base, [(adapter, 1)], x), **TIGHT)
    mix = {"a": 1.0, "b": -0.3, "c": 0.5}
    with live.use(mix, c=2):
        wanted = expected(base, [(three[name], 2 * w) for name, w in mix.items()], x)
        torch.testing.assert_close(net(x), wanted, **TIGHT)
    assert torch.equal(net(x), base(x))


def test_a_path_is_loaded(net, base, three, x, expected, tmp_path):
    lf.save(three["a"], tmp_path / "a")
    live = lf.attach(net, {"one": tmp_path / "a", "two": str(tmp_path / "a")})
    for name in ("one", "two"):
        with live.use(name):
            torch.testing.assert_close(net(x), expected(base, [(three["a"], 1)], x), **TIGHT)


def test_base_parameter_names_and_classes(net, base, three):
    before = list(net.state_dict())
    lf.attach(net, three)
    assert list(net.state_dict()) == before
    assert [n for n, _ in net.named_parameters()] == [n for n, _ in base.named_parameters()]
    layer = net.layers[0].q
    assert isinstance(layer, nn.Linear)
    assert type(layer) is type(net.layers[1].up)  # one cached subclass per base class
    assert (type(layer).__name__, type(layer).__module__) == ("Linear", nn.Linear.__module__)


@pytest.mark.parametrize("what", ["adapters", "lora", "pissa", "trainable"])
def test_detach_gives_everything_back(net, three, x, fingerprint, what):
    net.layers[0].q.register_forward_hook(lambda *_: None)
    net.layers[1].q.weight.requires_grad_(False)
    net.layers[2].train()
    before = fingerprint(net)
    specs = {
        "adapters": three,
        "lora": lf.LoRA(rank=2),
        "pissa": lf.PiSSA(rank=2, mean=0.1),
        "trainable": three,
    }
    live = lf.attach(net, specs[what], trainable=what == "trainable")
    live.use(live.names[0], c=0.5)
    net(x)
    live.use([live.names[0], None])
    net(x)
    assert live.detach() is net
    assert fingerprint(net) == before


def test_the_fingerprint_sees_what_attaching_changes(net, three, fingerprint):
    before = fingerprint(net)
    lf.attach(net, three)
    assert fingerprint(net) != before


def test_attach_again_after_detach(net, base, three, x, expected):
    lf.attach(net, three).detach()
    live = lf.attach(net, three["b"])
    live.use("default")
    torch.testing.assert_close(net(x), expected(base, [(three["b"], 1)], x), **TIGHT)


def test_a_specification_freezes_the_base_and_runs(net, x):
    live = lf.attach(net, lf.LoRA(rank=2))
    assert live.active == {"default": 1.0}
    trained = {id(p) for p in live.parameters()}
    assert {id(p) for p in net.parameters() if p.requires_grad} == trained
    assert len(trained) == 2 * 12


def test_a_loaded_adapter_can_be_trained(net, base, three, x, expected):
    live = lf.attach(net, three["a"], trainable=True)
    live.use("default")
    torch.testing.assert_close(net(x).detach(), expected(base, [(three["a"], 1)], x), **TIGHT)
    trained = list(live.parameters())
    assert sum(p.numel() for p in trained) == three["a"].num_parameters
    given = three["a"]["layers.0.q"].A.clone()
    net(x).square().sum().backward()
    assert all(p.grad is not None and p.grad.abs().sum() > 0 for p in trained)
    torch.optim.SGD(trained, lr=0.1).step()
    assert torch.equal(three["a"]["layers.0.q"].A, given)  # the argument is not mutated
    moved = live.adapter("default")
    assert moved.distance(three["a"]) > 0
    torch.testing.assert_close(net(x).detach(), expected(base, [(moved, 1)], x), **TIGHT)


def test_frozen_adapters_have_no_parameters(net, three):
    live = lf.attach(net, three)
    assert list(live.parameters()) == []
    assert all(p.requires_grad for p in net.parameters())


def test_a_lone_layer_and_a_module_dict(make_adapter, make_update, dense):
    layer = nn.Linear(6, 4)
    u = make_update(4, 6, 2)
    x = torch.randn(3, 6)
    before = layer(x)
    live = lf.attach(layer, lf.Adapter({"": u}))
    with live.use("default"):
        torch.testing.assert_close(layer(x), before + x @ dense(u).float().T)
    live.detach()
    assert type(layer) is nn.Linear
    assert torch.equal(layer(x), before)
    lone = lf.attach(nn.Linear(6, 4), lf.LoRA(rank=2))
    assert list(lone._state.slots.patches) == [""]

    layers = nn.ModuleDict({"q": nn.Linear(6, 4), "v": nn.Linear(6, 4)})
    before = layers["v"](x)
    live = lf.attach(layers, lf.Adapter({"v": u}))
    with live.use("default"):
        torch.testing.assert_close(layers["v"](x), before + x @ dense(u).float().T)
    assert type(layers["q"]) is nn.Linear


def test_fresh_and_given_adapters_side_by_side(net, base, three, x, expected):
    spec = lf.LoRA(rank=2, seed=0, dtype=torch.float64)
    live = lf.attach(net, {"a": three["a"], "new": spec})
    assert live.active == {"new": 1.0}
    assert torch.equal(net(x), base(x))
    for p in live.parameters():
        p.data = torch.randn_like(p) / 5
    with live.use({"a": 0.5, "new": -1}):
        wanted = expected(base, [(three["a"], 0.5), (live.adapter("new"), -1)], x)
        torch.testing.assert_close(net(x).detach(), wanted, **TIGHT)


@pytest.mark.parametrize(
    ("model", "adapter", "wanted"),
    [
        (torch.bfloat16, torch.bfloat16, torch.bfloat16),
        (torch.bfloat16, torch.float32, torch.float32),
        (torch.float32, torch.float16, torch.float32),
        (torch.float16, torch.float64, torch.float64),
    ],
)
def test_the_factors_dtype_is_the_widest_or_the_one_asked_for(
    make_net, three, model, adapter, wanted
):
    given = {name: a.to(dtype=adapter) for name, a in three.items()}
    live = lf.attach(make_net(model), given)
    assert live._state.slots.patches["layers.0.q"].bank("own").A.dtype == wanted
    live = lf.attach(make_net(model), given, dtype=torch.float16)
    assert live._state.slots.patches["layers.0.q"].bank("own").A.dtype == torch.float16
    live.add(three["a"], "late")
    assert live._state.slots.patches["layers.0.q"].bank("own").A.dtype == torch.float16


def test_it_computes_in_the_factors_dtype_and_adds_in_the_outputs(make_net, three, x, expected):
    net, half = make_net(torch.bfloat16), make_net(torch.bfloat16)
    live = lf.attach(net, three["a"])  # float64 factors
    layer, u = net.layers[0].q, three["a"]["layers.0.q"]
    h = torch.randn(5, 8, dtype=torch.bfloat16)
    delta = u.scale * (h.double() @ u.A.T) @ u.B.T
    with live.use("default"):
        found = layer(h)
    assert found.dtype == torch.bfloat16
    assert torch.equal(found, half.layers[0].q(h) + delta.to(torch.bfloat16))


# What is refused; the model is as before then


BAD = {
    "wrong shape": ({"layers.0.q": (8, 9)}, MismatchError, r"'layers.0.q'.*\(8, 8\).*\(8, 9\)"),
    "another architecture": (
        {"model.layers.0.self_attn.q_proj": (8, 8)},
        MismatchError,
        r"'model.layers.0.self_attn.q_proj'.*model e\.g\. 'layers.0.q'",
    ),
    "half of it fits": (
        {"layers.0.q": (8, 8), "layers.1.up": (8, 8)},
        MismatchError,
        r"'layers.1.up'.*\(16, 8\)",
    ),
    "no layer": ({"layers.0": (8, 8)}, RefusedError, "'layers.0' is a Block"),
}


@pytest.mark.parametrize("case", BAD)
def test_a_bad_adapter_leaves_the_model_unchanged(net, three, make_adapter, fingerprint, case):
    shapes, error, message = BAD[case]
    before = fingerprint(net)
    with pytest.raises(error, match=message):
        lf.attach(net, {"good": three["a"], "bad": make_adapter(shapes, 2)})
    assert fingerprint(net) == before


def test_missing_modules_are_listed(net, three, make_adapter):
    some = make_adapter({"layers.0.q": (8, 8), "layers.9.q": (8, 8)}, 2)
    with pytest.warns(UserWarning, match=r"1 parts of adapter 'default'.*'layers.9.q'"):
        live = lf.attach(net, some)
    assert list(live._state.slots.patches) == ["layers.0.q"]


@pytest.mark.parametrize(
    ("x", "options", "message"),
    [
        ({}, {}, "nothing to attach"),
        (3, {}, "not a int"),
        ({"": lf.LoRA()}, {}, "non-empty text"),
        ({1: lf.LoRA()}, {}, "non-empty text"),
        (lf.LoRA(rank=2), {"slots": 0}, "slots must be a whole number of at least 1"),
        (lf.LoRA(rank=2), {"max_rank": 0}, "max_rank must be a whole number of at least 1"),
        (lf.LoRA(rank=2), {"rank_scaling": "cubic"}, "constant, linear, sqrt; found 'cubic'"),
        (lf.LoRA(rank=9), {}, r"rank 9 is above min\(out, in\) = 8 of module 'layers.0.q'"),
        (lf.LoRA(rank=2, targets="k"), {}, "targets 'k' match no module"),
        ({"a": lf.LoRA(rank=2), "b": lf.PiSSA(select="wanda")}, {}, "needs calibration="),
    ],
)
def test_bad_arguments(net, fingerprint, x, options, message):
    before = fingerprint(net)
    with pytest.raises(MismatchError, match=message):
        lf.attach(net, x, **options)
    assert fingerprint(net) == before


def test_bad_models_and_paths(net, three, tmp_path):
    with pytest.raises(MismatchError, match="a torch module, not a dict"):
        lf.attach({}, three)
    with pytest.raises(FileError):
        lf.attach(net, tmp_path / "nothing")


def test_nan_factors_are_refused(make_update):
    u = make_update(8, 8, 2)
    with pytest.raises(MismatchError, match="NaN"):
        lf.LowRank(u.A.clone().fill_(float("nan")), u.B)


def test_nan_from_a_file_is_refused_and_the_model_unchanged(net, three, tmp_path, fingerprint):
    from safetensors.torch import load_file, save_file

    lf.save(three["b"], tmp_path / "b")
    path = tmp_path / "b" / "adapter_model.safetensors"
    tensors = load_file(path)
    tensors[next(iter(tensors))][0, 0] = float("nan")
    save_file(tensors, path)
    before = fingerprint(net)
    with pytest.raises(lf.LorafoldError, match="NaN"):
        lf.attach(net, {"a": three["a"], "b": tmp_path / "b"})
    assert fingerprint(net) == before


def test_a_second_attach_is_refused(net, base, three, x, expected):
    live = lf.attach(net, three["a"])
    for second in (three["b"], lf.LoRA(rank=2)):
        with pytest.raises(RefusedError, match=r"attached to this model already: .*live\.add"):
            lf.attach(net, second)
    with live.use("default"):
        torch.testing.assert_close(net(x), expected(base, [(three["a"], 1)], x), **TIGHT)


def test_a_rank_above_the_maximum(net, three):
    with pytest.raises(MismatchError, match=r"'a' has rank 4.*room for 3.*max_rank=4"):
        lf.attach(net, three, max_rank=3)
    live = lf.attach(net, three["b"], max_rank=3)
    with pytest.raises(MismatchError, match=r"'late' has rank 4.*room for 3"):
        live.add(three["a"], "late")
    assert live.names == ["default"]


def test_adapters_that_algebra_is_wrong_for_are_refused(net, three, fingerprint):
    from dataclasses import replace

    before = fingerprint(net)
    with pytest.raises(RefusedError, match="'default'.*DoRA"):
        lf.attach(net, replace(three["a"], config={"use_dora": True}))
    bias = {"base_model.model.layers.0.q.bias": torch.zeros(8)}
    with pytest.raises(RefusedError, match=r"layers\.0\.q\.bias"):
        lf.attach(net, replace(three["a"], extras=bias, config={"bias": "lora_only"}))
    assert fingerprint(net) == before


def test_unknown_names_come_with_near_ones(net, three):
    live = lf.attach(net, {"sql-expert": three["a"], "polite": three["b"]})
    for ask in (
        lambda: live.use("sql-expret"),
        lambda: live.use({"sql-expret": 1}),
        lambda: live.use(["polite", "sql-expret"]),
        lambda: live.remove("sql-expret"),
        lambda: live.adapter("sql-expret"),
        lambda: live.merge("sql-expret"),
        lambda: live.keep("sql-expret"),
    ):
        with pytest.raises(UnknownNameError, match="did you mean 'sql-expert'"):
            ask()
    assert live.active == {}


def test_nothing_is_used_after_detach(net, base, three, x):
    live = lf.attach(net, three)
    live.use("a")
    copy_of = copy.copy(live)
    live.detach()
    assert torch.equal(net(x), base(x))
    for ask in (
        live.detach,
        lambda: live.use("a"),
        lambda: live.use(None),
        lambda: live.add(three["b"], "new"),
        lambda: live.remove("a"),
        lambda: live.merge("a"),
        live.unmerge,
        live.summary,
        lambda: live.adapter("a"),
        lambda: live.verify(x),
        lambda: live.keep("a"),
        lambda: live.drop("a"),
        lambda: live.guard(None),
    ):
        with pytest.raises(MismatchError, match="detached"):
            ask()
    del copy_of
    assert re.fullmatch(r"Live\(detached.*\)", repr(live))
    with pytest.raises(MismatchError, match="nothing is attached"):
        lf.Live.of(net)


def test_pickles_are_of_the_model_with_its_adapters(net, base, three, x):
    live = lf.attach(net, three)
    live.use("a")
    again = pickle.loads(pickle.dumps(net))
    assert torch.equal(again(x), net(x))
    assert lf.Live.of(again).names == live.names


@pytest.mark.parametrize(
    "options", [{"dtype": torch.int8}, {"slots": "3"}, {"slots": 2.5}, {"rank_scaling": []}]
)
def test_options_of_another_type(net, three, options):
    with pytest.raises(lf.MismatchError, match="must be"):
        lf.attach(net, three, **options)


def test_a_module_is_updated_or_replaced_by_a_copy_not_both(make_net, three, fingerprint):
    """Refused before anything is done, whichever comes first."""
    whole = lf.LoRA(rank=2, targets="q", modules_to_save=["down"])
    updated = lf.LoRA(rank=2, targets="down")
    for first, second in ((whole, updated), (updated, whole), (three["a"], whole)):
        net = make_net()
        live = lf.attach(net, {"first": first})
        before, parameters = fingerprint(net), len(list(live.parameters()))
        with pytest.raises(lf.RefusedError, match=r"layers\.0\.down"):
            live.add(second, "second")
        assert live.names == ["first"]
        assert fingerprint(net) == before
        assert len(list(live.parameters())) == parameters
        net = make_net()
        before = fingerprint(net)
        with pytest.raises(lf.RefusedError, match=r"layers\.0\.down"):
            lf.attach(net, {"first": first, "second": second})
        assert fingerprint(net) == before


def test_parameters_of_one_adapter(net, three):
    specs = {
        "one": lf.LoRA(rank=2, targets="q"),
        "two": lf.LoRA(rank=3, targets=["q", "down"], modules_to_save=["lm_head"]),
        "three": three["a"],
    }
    live = lf.attach(net, specs)
    one, two = set(live.parameters("one")), set(live.parameters("two"))
    assert len(one) == 2 * 4
    assert len(two) == 2 * 8 + len(list(net.lm_head.lorafold.copies.parameters()))
    assert one | two == set(live.parameters())
    assert not one & two
    with pytest.raises(lf.UnknownNameError):
        live.parameters("nobody")
    with pytest.raises(MismatchError, match="'three' is not trained"):
        live.parameters("three")
    live.remove("one")
    assert set(live.parameters()) == two


def test_what_a_handle_shows(net, three):
    live = lf.attach(net, three)
    shown = {name for name in dir(live) if not name.startswith("_")}
    assert len(shown) <= 23
    assert shown >= {"use", "add", "remove", "names", "parameters", "adapter", "merge", "unmerge"}
    assert shown >= {"verify", "detach", "model", "active", "merged", "kept", "keep", "drop"}
    assert shown >= {"trained", "gate", "save", "resume", "guard", "summary"}
    assert not [name for name in dir(live) if name.startswith("_") and not name.endswith("__")]
    for name in shown | {"of"}:
        getattr(live, name)


def test_modules_that_are_missing_are_listed_where_the_caller_stands(net, three):
    more = {**three["b"].modules, "nowhere.q": lf.LowRank(torch.ones(1, 8), torch.ones(8, 1))}
    for attached in (lambda: lf.attach(net, lf.Adapter(more)), lambda: add(net, more)):
        with pytest.warns(UserWarning, match=r"1 parts .* not in the model: 'nowhere\.q'") as seen:
            attached()
        assert [warning.filename for warning in seen] == [__file__]


def add(net, modules):
    lf.Live.of(net).add(lf.Adapter(modules), "more")


@pytest.mark.parametrize(
    ("mistake", "message"),
    [
        (lambda net, a: lf.attach(net, a, dtype="float32"), "dtype must be a float of 16 bits"),
        (
            lambda net, a: lf.attach(net, lf.LoRA(rank=1, targets="0", modules_to_save="0")),
            "modules_to_save= leaves none of the layers",
        ),
        (lambda net, a: lf.attach(net, a).guard(3), "guard takes a torch optimiser, not a int"),
        (lambda net, a: lf.attach(net, a).resume("x"), "no adapter is trained here: add one"),
    ],
)
def test_mistakes_are_named(mistake, message, make_adapter):
    net = nn.Sequential(nn.Linear(4, 3))
    with pytest.raises(MismatchError, match=message) as found:
        mistake(net, make_adapter({"0": (3, 4)}, rank=1))
    assert "\n" not in str(found.value)
