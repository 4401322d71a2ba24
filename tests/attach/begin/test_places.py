"""A running model is a base like others: attach, apply_to and check find the same places."""

import copy
import dataclasses
import json
import warnings

import pytest
import torch
from safetensors.torch import save_file
from torch import nn

import lorafold as lf
from lorafold.cli import main
from lorafold.errors import MismatchError, RefusedError
from lorafold.parts import PREFIX, Layout

Q, V = "layers.{}.self_attn.q_proj", "layers.{}.self_attn.v_proj"


def several(*patterns, count=2):
    return [p.format(i) for p in patterns for i in range(count)]


def tree(paths, shape=(4, 4)):
    """A model of linear layers at these paths; what it gives is their products, one by one."""
    torch.manual_seed(0)
    model = nn.Module()
    for path in paths:
        above, at = model, path.split(".")
        for name in at[:-1]:
            if name not in dict(above.named_children()):
                above.add_module(name, nn.Module())
            above = above.get_submodule(name)
        above.add_module(at[-1], nn.Linear(*shape[::-1], bias=False))
    return model


def adapter_of(paths, shape=(4, 4), **more):
    g = torch.Generator().manual_seed(1)
    out, inner = shape
    return lf.Adapter(
        {
            p: lf.LowRank(torch.randn(2, inner, generator=g), torch.randn(out, 2, generator=g))
            for p in paths
        },
        **more,
    )


# name: (modules of the model, of the adapter, those of the adapter that have no place)
ZOO = {
    "the same names": (several(Q, V), several(Q, V), []),
    "an inner model": (several(Q, V), several(f"model.{Q}", f"model.{V}"), []),
    "an outer model": (several(f"model.{Q}", f"model.{V}"), several(Q, V), []),
    "an inner model, and a head": (
        several(Q, V),
        [*several(f"model.{Q}", f"model.{V}"), "lm_head"],
        ["lm_head"],
    ),
    "two towers": (
        several(f"model.language_model.{Q}", f"model.vision_tower.vision_model.encoder.{Q}"),
        several(f"language_model.model.{Q}", f"vision_tower.vision_model.encoder.{Q}"),
        [],
    ),
    "towers as transformers 5 has them": (
        several(f"model.language_model.{Q}", "model.visual.blocks.{}.attn.proj"),
        several(f"model.{Q}", "visual.blocks.{}.attn.proj"),
        [],
    ),
    "other words": (
        several("encoder.layer.{}.attention.attention.query", "encoder.layer.{}.output.dense"),
        several("layers.{}.attention.q_proj", "layers.{}.mlp.fc2"),
        [],
    ),
    "in parallel": (several(f"module.{Q}", f"module.{V}"), several(Q, V), []),
    "in parallel, inside out": (several(Q), several(f"module.{Q}"), []),
    "compiled layer by layer": (
        several("model.layers.{}._orig_mod.self_attn.q_proj"),
        several(f"model.{Q}"),
        [],
    ),
    "compiled, and an inner model": (
        several("_orig_mod.layers.{}.self_attn.q_proj"),
        several(f"model.{Q}"),
        [],
    ),
    "more layers than there are": (
        several(Q),
        several(Q, count=4),
        [Q.format(2), Q.format(3)],
    ),
    "one tower only": (
        several(f"model.language_model.{Q}"),
        several(f"model.language_model.{Q}", f"model.vision_tower.{Q}"),
        several(f"model.vision_tower.{Q}"),
    ),
    "one of two that are called alike": (["fc", "module.fc"], ["fc"], []),
    "the other of the two": (["fc", "module.fc"], ["module.fc"], []),
    "both of them": (["module.fc", "fc"], ["fc", "module.fc"], []),
}
NOWHERE = {
    "as good as each other": (several(f"encoder.{Q}", f"decoder.{Q}"), several(Q)),
    "another tower": (several(f"model.{Q}"), several(f"model.vision_model.{Q}")),
    "another architecture": (several("h.{}.attn.c_attn"), several(Q)),
}


def listed(call):
    """What a call gives, and which parts of an adapter it says have no place."""
    with warnings.catch_warnings(record=True) as seen:
        warnings.simplefilter("always")
        found = call()
    said = [str(w.message) for w in seen]
    assert len(said) < 2
    return found, said[0].split(": ", 1)[1].replace("'", "").split(", ") if said else []


def checked(adapter, model, folder, capsys):
    lf.save(adapter, folder / "a", pad=True)
    (folder / "base").mkdir()
    save_file(model.state_dict(), folder / "base" / "model.safetensors")
    with pytest.raises(SystemExit):
        main(["check", str(folder / "a"), "--base", str(folder / "base"), "--json"])
    return json.loads(capsys.readouterr().out)


@pytest.mark.parametrize("case", ZOO)
def test_the_same_places_by_every_door(case, tmp_path, capsys):
    there, paths, unplaced = ZOO[case]
    model, adapter = tree(there), adapter_of(paths)
    before = copy.deepcopy(model.state_dict())
    expected, without = listed(lambda: adapter.apply_to(before))
    assert without == unplaced
    live, without = listed(lambda: lf.attach(model, adapter))
    assert without == unplaced
    assert live.adapter("default") is adapter
    live.merge("default")
    found = model.state_dict()
    for key, W in expected.items():
        torch.testing.assert_close(found[key], W, atol=1e-5, rtol=1e-5)
    assert sum(not torch.equal(W, found[key]) for key, W in before.items()) == len(paths) - len(
        unplaced
    )
    live.unmerge()
    live.detach()
    if not any(p.startswith("module.") for p in paths):  # a file has plain names
        assert checked(adapter, model, tmp_path, capsys)["unmatched"] == unplaced


@pytest.mark.parametrize("case", ZOO)
def test_training_goes_on_under_the_adapters_own_names(case):
    there, paths, unplaced = ZOO[case]
    adapter = adapter_of([p for p in paths if p not in unplaced])
    plain = {p: p for p in adapter}
    if case == "in parallel, inside out":
        plain = {p: p.removeprefix("module.") for p in adapter}
    live = lf.attach(tree(there), adapter, trainable=True)
    again = live.adapter("default")
    assert set(again) == set(plain.values())
    for p, u in adapter.items():
        torch.testing.assert_close(again[plain[p]].dense(), u.dense(), atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("case", ZOO)
def test_a_library_goes_where_its_adapters_go(case):
    there, paths, unplaced = ZOO[case]
    model, adapter = tree(there), adapter_of(paths)
    library = lf.fold({"a": adapter, "b": 0.5 * adapter}, tolerance=1e-4)
    expected, _ = listed(lambda: library["a"].apply_to(model.state_dict()))
    live, without = listed(lambda: lf.attach(model, library))
    assert sorted(without) == sorted(unplaced)
    live.merge("a")
    for key, W in expected.items():
        torch.testing.assert_close(model.state_dict()[key], W, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("case", NOWHERE)
def test_nowhere_by_every_door(case, tmp_path, capsys):
    there, paths = NOWHERE[case]
    model, adapter = tree(there), adapter_of(paths)
    with pytest.raises(MismatchError, match="none of the adapter's 2 modules is in the state dict"):
        adapter.apply_to(model.state_dict())
    with pytest.raises(MismatchError, match="none of the 2 modules of adapter 'default' is in the"):
        lf.attach(model, adapter)
    with pytest.raises(MismatchError, match="none of the 2 modules of the library is in the model"):
        lf.attach(model, lf.fold({"a": adapter}))
    assert checked(adapter, model, tmp_path, capsys)["unmatched"] == paths


@pytest.mark.parametrize("prefix", ["", "model."])
def test_what_does_not_fit_is_an_error_by_every_door(prefix, tmp_path, capsys):
    model, adapter = tree(several(Q)), adapter_of(several(f"{prefix}{Q}"), shape=(4, 6))
    with pytest.raises(MismatchError, match="the update fits"):
        adapter.apply_to(model.state_dict())
    with pytest.raises(MismatchError, match="belongs to another base"):
        lf.attach(model, adapter)
    with pytest.raises(MismatchError, match="belongs to another base"):
        lf.attach(model, lf.fold({"a": adapter}))
    wrong = checked(adapter, model, tmp_path, capsys)["wrong_shape"]
    assert [row["name"] for row in wrong] == several(f"{prefix}{Q}")


# Heads and other tensors


@pytest.mark.parametrize("prefix", ["", "model."])
def test_a_module_saved_whole_goes_through_prefixes(prefix, tmp_path):
    model = tree([*several(Q), "norm.score"])
    extras = {f"{PREFIX}{prefix}norm.score.weight": torch.full((4, 4), 2.0)}
    config = {"modules_to_save": ["score"]}
    adapter = adapter_of(several(f"{prefix}{Q}"), extras=extras, config=config)
    expected = adapter.apply_to(model.state_dict())
    trained = lf.attach(copy.deepcopy(model), adapter, trainable=True)
    assert trained.adapter("default").extras.keys() == extras.keys()
    trained.save(tmp_path / "a")
    assert trained.resume(tmp_path / "a") == {}
    live = lf.attach(model, adapter)
    live.merge("default")
    for key, W in expected.items():
        torch.testing.assert_close(model.state_dict()[key], W, atol=1e-5, rtol=1e-5)


def test_a_head_that_is_not_there_is_listed():
    model = tree(several(Q))
    extras = {f"{PREFIX}score.weight": torch.ones(4, 4)}
    config = {"modules_to_save": ["score"]}
    adapter = adapter_of(several(f"model.{Q}"), extras=extras, config=config)
    _, unplaced = listed(lambda: adapter.apply_to(model.state_dict()))
    live, without = listed(lambda: lf.attach(model, adapter))
    assert without == unplaced == list(extras)
    live.merge("default")
    with pytest.raises(MismatchError, match="none of the 1 tensors of adapter 'default'"):
        lf.attach(tree(several(Q)), dataclasses.replace(adapter, modules={}))


def test_what_the_model_keeps_in_another_form_is_refused_by_name():
    fused = tree(several("layers.{}.self_attn.qkv_proj"), shape=(12, 4))
    adapter = adapter_of(several(f"model.{Q}"))
    assert adapter.apply_to(fused.state_dict())  # what the error advises
    with pytest.raises(RefusedError, match=r"'model\.layers\.0.*another form.*qkv_proj.*apply_to"):
        lf.attach(fused, adapter)
    names = ("gate_proj", "up_proj")
    one_by_one = tree([f"mlp.experts.{e}.{name}" for e in range(2) for name in names])
    paths = [f"mlp.experts.gate_up_proj[{e}]" for e in range(2)]
    layouts = {p: Layout("expert", expert=(e, 2)) for e, p in enumerate(paths)}
    adapter = adapter_of(paths, shape=(8, 4), layouts=layouts)
    assert adapter.apply_to(one_by_one.state_dict())
    with pytest.raises(RefusedError, match=r"gate_up_proj\[0\]'.*another form.*experts\.0\.gate"):
        lf.attach(one_by_one, adapter)


def test_experts_go_through_prefixes():
    class Experts(nn.Module):
        def __init__(self):
            super().__init__()
            self.down_proj = nn.Parameter(torch.randn(3, 4, 6))

    model = nn.Module()
    model.layers = nn.ModuleList(Experts() for _ in range(2))
    model.layers = nn.ModuleList(nn.ModuleDict({"experts": Experts()}) for _ in range(2))
    paths = [f"model.layers.{i}.experts.down_proj[{e}]" for i in range(2) for e in (0, 2)]
    layouts = {p: Layout("expert", expert=(int(p[-2]), 3)) for p in paths}
    adapter = adapter_of(paths, shape=(4, 6), layouts=layouts)
    expected = adapter.apply_to(model.state_dict())
    live = lf.attach(model, adapter)
    live.merge("default")
    for key, W in expected.items():
        torch.testing.assert_close(model.state_dict()[key], W, atol=1e-5, rtol=1e-5)
    few = dataclasses.replace(
        adapter, layouts={p: Layout("expert", expert=(int(p[-2]), 4)) for p in paths}
    )
    live.detach()
    with pytest.raises(MismatchError, match="the adapter has 4 experts"):
        lf.attach(model, few)


def test_two_parts_of_one_module_are_refused():
    adapter = adapter_of(["fc", "module.fc"])
    with pytest.raises(MismatchError, match=r"'fc' and 'module\.fc' are one module"):
        lf.attach(tree(["fc"]), adapter)


def test_layers_are_counted_where_they_were_replicated():
    config = {"layer_replication": [[0, 2], [1, 2]]}
    adapter = adapter_of(several(Q, count=3), config=config)
    with pytest.raises(MismatchError, match="belongs to 3 layers"):
        lf.attach(tree(several(Q)), adapter)
    lf.attach(tree(several(Q, count=3)), adapter)
