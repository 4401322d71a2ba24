"""The verb around the methods: shapes, bases, what the adapter carries, and what is refused."""

import json
from dataclasses import replace

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import save_file

import lorafold as lf

Q, K, UP = "model.layers.0.self_attn.q_proj", "model.layers.0.self_attn.k_proj", "lm.up"


def update(out=8, inner=16, rank=3, seed=0):
    g = torch.Generator().manual_seed(seed)
    return lf.LowRank(
        torch.randn(rank, inner, generator=g), torch.randn(out, rank, generator=g), 2.0
    )


@pytest.fixture
def adapter():
    config = {"r": 3, "lora_alpha": 6, "target_modules": ["q_proj", "k_proj", "up"]}
    modules = {Q: update(), K: update(4, seed=1), UP: update(32, seed=2)}
    return lf.Adapter(modules, config=config, base_model="old")


def weights(shapes, seed=0):
    g = torch.Generator().manual_seed(seed)
    return {f"{path}.weight": torch.randn(shape, generator=g) for path, shape in shapes.items()}


def saved(state, folder, config=None):
    folder.mkdir()
    save_file(state, folder / "model.safetensors")
    (folder / "config.json").write_text(json.dumps(config or {}))
    return str(folder)


# Shapes that are given


def test_shapes_go_by_path_or_pattern_and_the_rest_stays(adapter):
    moved = lf.transfer(adapter, shape={"[qk]_proj": (10, 20), K: (6, 20)}, method="truncate")
    shapes = {path: u.shape for path, u in moved.adapter.items()}
    assert shapes == {Q: (10, 20), K: (6, 20), UP: (32, 16)}
    assert torch.equal(moved.adapter[UP].A, adapter[UP].A)
    assert [m.error for m in moved.report.modules] == [None, None, 0.0]


def test_the_first_pattern_that_matches_counts(adapter):
    moved = lf.transfer(adapter, shape={"k_proj": (5, 5), ".*": (7, 7)})
    assert [u.shape for u in moved.adapter.values()] == [(7, 7), (5, 5), (7, 7)]


def test_a_transfer_is_an_adapter_that_is_saved_and_tells_where_it_comes_from(adapter, tmp_path):
    moved = lf.transfer(adapter, shape={".*": (8, 8)}, rank=2).adapter
    lf.save(moved, tmp_path / "a")
    back = lf.load(tmp_path / "a")
    assert {u.shape for u in back.values()} == {(8, 8)}
    assert back.rank == 2
    assert moved.distance(back) < 1e-6 * moved.norm()
    with safe_open(tmp_path / "a" / "adapter_model.safetensors", "pt") as f:
        told = json.loads(f.metadata()["lorafold_transfer"])
    assert told["method"] == "svd"
    assert told["digest"] == adapter.digest


def test_a_path_is_taken_for_an_adapter(adapter, tmp_path):
    lf.save(adapter, tmp_path / "a")
    moved = lf.transfer(tmp_path / "a", shape={".*": (8, 8)})
    assert {u.shape for u in moved.adapter.values()} == {(8, 8)}


def test_it_prints_what_it_did(adapter):
    text = repr(lf.transfer(adapter, shape={".*": (8, 8)}))
    assert text.startswith("Transfer(Adapter(3 modules, rank 3")
    assert "TransferReport(3 modules, norm ratio" in text


def test_progress_is_told(adapter):
    seen = []
    lf.transfer(adapter, shape={".*": (8, 8)}, progress=lambda *args: seen.append(args))
    assert seen == [(k, 3, path) for k, path in enumerate(adapter)]


# Shapes of a base


NEW = {Q: (12, 24), K: (6, 24), UP: (48, 24), "other": (3, 3)}


@pytest.mark.parametrize("form", ["folder", "file", "state", "model"])
def test_a_target_is_enough_for_plain_resizings(adapter, form, tmp_path):
    state = weights(NEW)
    target = {"state": state}.get(form)
    if form in ("folder", "file"):
        target = saved(state, tmp_path / "base")
        target += "/model.safetensors" if form == "file" else ""
    elif form == "model":
        target = torch.nn.Module()
        for path, (out, inner) in NEW.items():
            owner = target
            for part in path.split("."):
                child = torch.nn.Linear(inner, out) if part == path.split(".")[-1] else None
                if not hasattr(owner, part):
                    owner.add_module(part, child or torch.nn.Module())
                owner = getattr(owner, part)
    moved = lf.transfer(adapter, target=target)
    assert {path: u.shape for path, u in moved.adapter.items()} == {
        path: NEW[path] for path in adapter
    }
    named = target if isinstance(target, str) else "old"
    assert moved.adapter.base_model == named
    assert moved.report.without == {}


def test_what_has_no_counterpart_is_listed(adapter):
    moved = lf.transfer(adapter, target=weights({Q: (12, 24)}))
    assert set(moved.adapter) == {Q}
    assert moved.report.without == dict.fromkeys((K, UP), "not in the base, nor its role")
    with pytest.raises(lf.MismatchError, match="none of the 3 modules has a counterpart"):
        lf.transfer(adapter, target=weights({"else": (12, 24)}))


def test_a_base_that_stores_weights_transposed(adapter):
    turned = replace(adapter, config={**adapter.config, "fan_in_fan_out": True})
    moved = lf.transfer(turned, target=weights({p: s[::-1] for p, s in NEW.items()})).adapter
    assert {u.shape for u in moved.values()} == {NEW[p] for p in adapter}


def test_the_names_of_the_target_may_have_another_prefix(adapter, tmp_path):
    inner = {p: u for p, u in adapter.items() if p != UP}
    state = weights({f"language_model.{p}": NEW[p] for p in inner})
    moved = lf.transfer(lf.Adapter(inner), target=saved(state, tmp_path / "base"))
    assert moved.report.without == {}


def test_a_target_with_other_names_is_matched_by_roles():
    a = lf.Adapter({Q: update(), "model.layers.1.mlp.down_proj": update(seed=1)})
    fc = "decoder.layers.1.fc2"
    there = weights({"decoder.layers.0.self_attn.q_proj": (8, 16), f"model.{fc}": (12, 24)})
    moved = lf.transfer(a, target=there)
    assert moved.adapter[f"model.{fc}"].shape == (12, 24)
    (row,) = (m for m in moved.report.modules if m.path == f"model.{fc}")
    assert row.sources == ("model.layers.1.mlp.down_proj",)


# Copy


def test_copy_keeps_the_factors_and_tells_how_far_the_bases_are_apart(adapter, tmp_path):
    shapes = {p: u.shape for p, u in adapter.items()} | {"norm": (4,)}
    old = weights(shapes)
    new = {key: W + 0.05 * torch.randn(W.shape) for key, W in old.items()}
    bases = saved(old, tmp_path / "old"), saved(new, tmp_path / "new")
    moved = lf.transfer(adapter, *bases, method="copy")
    for path, u in adapter.items():
        assert torch.equal(moved.adapter[path].A, u.A)
        assert torch.equal(moved.adapter[path].B, u.B)
    assert moved.report.error == 0
    W, V = (torch.cat([t.double().flatten() for t in state.values()]) for state in (old, new))
    said = moved.report.said
    assert said["base_distance"] == pytest.approx(float((V - W).norm() / W.norm()), rel=1e-6)
    assert said["tensors_compared"] == 4
    assert said["expect"].startswith("nearly the same weights")
    for m in moved.report.modules:
        W, V = (state[f"{m.path}.weight"].double() for state in (old, new))
        assert m.distance == pytest.approx(float((V - W).norm() / W.norm()), rel=1e-6)
    assert moved.adapter.base_model == bases[1]


def test_copy_says_dont_where_the_bases_are_strangers(adapter):
    shapes = {p: u.shape for p, u in adapter.items()}
    moved = lf.transfer(adapter, weights(shapes), weights(shapes, seed=1), method="copy")
    assert moved.report.said["base_distance"] == pytest.approx(2**0.5, rel=0.2)
    assert moved.report.said["expect"].startswith("don't")
    same = lf.transfer(adapter, weights(shapes), weights(shapes), method="copy")
    assert same.report.said["base_distance"] == 0


def test_copy_without_a_check_reads_no_weights(adapter):
    shapes = {p: u.shape for p, u in adapter.items()}
    bad = {k: W * torch.nan for k, W in weights(shapes).items()}
    with pytest.raises(lf.MismatchError, match=r"q_proj.weight' holds NaN"):
        lf.transfer(adapter, weights(shapes), bad, method="copy")
    moved = lf.transfer(adapter, weights(shapes), bad, method="copy", unchecked=True)
    assert moved.report.said == {}
    assert lf.transfer(adapter, target=weights(shapes), method="copy").report.said == {}


def test_copy_leaves_out_other_shapes(adapter):
    shapes = {p: u.shape for p, u in adapter.items()} | {K: (5, 16)}
    moved = lf.transfer(adapter, target=weights(shapes), method="copy")
    assert moved.report.without == {K: "(4, 16) in the adapter, (5, 16) in the target"}
    with pytest.raises(lf.MismatchError, match="copy needs equal shapes"):
        lf.transfer(adapter, target=weights(NEW), method="copy")


# What else the file held


def test_extras_stay_where_shapes_do_and_are_named_where_they_do_not(adapter):
    whole = replace(adapter, extras={"base_model.model.lm.up.bias": torch.ones(32)})
    shapes = {p: u.shape for p, u in adapter.items()}
    same = lf.transfer(whole, shape=shapes)
    assert list(same.adapter.extras) == list(whole.extras)
    assert same.report.left_behind == ()
    with pytest.warns(UserWarning, match="left behind: 'base_model.model.lm.up.bias'"):
        moved = lf.transfer(whole, shape={".*": (8, 8)})
    assert not moved.adapter.extras
    assert moved.report.left_behind == tuple(whole.extras)


def test_an_adapter_without_right_algebra_is_refused(adapter, tmp_path):
    dora = replace(adapter, config={**adapter.config, "use_dora": True})
    with pytest.raises(lf.RefusedError, match="can't be transferred: this is a DoRA adapter"):
        lf.transfer(dora, shape={".*": (8, 8)})


# Bad input


@pytest.mark.parametrize(
    ("keywords", "error", "match"),
    [
        ({"method": "svdd", "shape": {".*": (8, 8)}}, "UnknownNameError", "did you mean 'svd'"),
        ({"shape": {".*": (8, 8)}, "rescal": 1}, "UnknownNameError", "did you mean 'rescale'"),
        ({"shape": {".*": (8, 8)}, "rank": 0}, "MismatchError", "rank must be a whole number"),
        ({"shape": {".*": (8, 8)}, "rank": 1.5}, "MismatchError", "rank must be a whole number"),
        ({"shape": {".*": (8, 8)}, "energy": 0}, "MismatchError", r"energy must lie in \(0, 1\]"),
        ({"shape": {".*": (8, 8)}, "energy": float("nan")}, "MismatchError", "energy must lie"),
        ({"shape": {".*": (8, 8)}, "energy": 1, "rank": 1}, "MismatchError", "not both"),
        ({"shape": {".*": (8, 0)}}, "MismatchError", r"'\.\*' must be \(out, in\)"),
        ({"shape": {".*": (8, True)}}, "MismatchError", "whole numbers above 0"),
        ({"shape": {".*": 8}}, "MismatchError", "whole numbers above 0, found 8"),
        ({"shape": {"w_proj": (8, 8)}}, "MismatchError", "'w_proj' matches none"),
        ({"shape": {"(": (8, 8)}}, "MismatchError", "no regular expression"),
        ({"shape": (8, 8)}, "MismatchError", r"module path or pattern: \(out, in\)"),
        ({"shape": {}}, "MismatchError", "module path or pattern"),
        ({"shape": {".*": (8, 8)}, "target": {}}, "MismatchError", "not both"),
        ({}, "MismatchError", "needs shape= or a target"),
        ({"target": "nowhere"}, "FileError", "no such folder"),
        ({"target": 3}, "MismatchError", "a base is a folder"),
        ({"target": {}}, "MismatchError", "a base is a folder"),
        ({"target": {"a": 1}}, "MismatchError", "a base is a folder"),
    ],
)
def test_bad_input_is_told_in_a_line(adapter, keywords, error, match):
    with pytest.raises(getattr(lf, error), match=match) as caught:
        lf.transfer(adapter, **keywords)
    assert "\n" not in str(caught.value)


def test_a_lowrank_needs_a_shape():
    with pytest.raises(lf.MismatchError, match="a LowRank has no module path"):
        lf.transfer(update(), target="base")
    with pytest.raises(lf.MismatchError, match=r"must be \(out, in\)"):
        lf.transfer(update(), shape={"q": (8, 8)})


def test_an_adapter_of_heads_alone_is_nothing_to_transfer():
    heads = lf.Adapter({}, extras={"base_model.model.score.weight": torch.ones(2, 2)})
    with pytest.raises(lf.MismatchError, match="nothing to transfer"):
        lf.transfer(heads, shape={".*": (8, 8)})
