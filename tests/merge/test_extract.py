"""An adapter from two checkpoints: what was put in comes out, and errors are what they are."""

from __future__ import annotations

import json

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file

import lorafold as lf
from lorafold.merge import verify_merge
from lorafold.merge.extract import facts

SHAPES = {
    f"model.layers.{i}.{m}": s for i in range(2) for m, s in (("q", (32, 40)), ("up", (48, 32)))
}


def written(folder, state, config=None):
    folder.mkdir()
    save_file({k: t.contiguous() for k, t in state.items()}, folder / "model.safetensors")
    if config is not None:
        (folder / "config.json").write_text(json.dumps(config))
    return folder


@pytest.fixture
def state():
    g = torch.Generator().manual_seed(0)
    found = {f"{p}.weight": torch.randn(s, generator=g) for p, s in SHAPES.items()}
    found["model.embed_tokens.weight"] = torch.randn(50, 32, generator=g)
    found["model.norm.weight"] = torch.ones(32)
    return found


def test_what_was_merged_comes_out_again(state, make_adapter, tmp_path):
    adapter = make_adapter(SHAPES, 4, seed=1, scale=0.1)
    base = written(tmp_path / "base", state)
    lf.merge_into_weights(base, adapter, tmp_path / "tuned")
    found = lf.extract(base, tmp_path / "tuned", rank=4)
    assert set(found) == set(SHAPES)
    assert found.distance(adapter) < 1e-4 * adapter.norm()
    told = facts(found)
    # Half of the float32 rounding of W + ΔW lies in directions that are cut away.
    assert told["error"] < 2 * told["floor"] < 1e-4
    lf.save(found, tmp_path / "out")
    assert lf.merge_into_weights(base, tmp_path / "out", tmp_path / "again").unplaced == {}
    assert facts(lf.load(tmp_path / "out")) == told


def test_the_best_of_its_rank_with_its_error(state, dense, tmp_path):
    g = torch.Generator().manual_seed(1)
    tuned = {
        k: W + 0.1 * torch.randn(W.shape, generator=g)
        if k.endswith(("q.weight", "up.weight"))
        else W
        for k, W in state.items()
    }
    base, after = written(tmp_path / "base", state), written(tmp_path / "tuned", tuned)
    found = lf.extract(base, after, rank=5)
    lost = size = 0.0
    for p in SHAPES:
        D = (tuned[f"{p}.weight"].double() - state[f"{p}.weight"].double()).numpy()
        U, s, Vh = np.linalg.svd(D, full_matrices=False)
        best = (U[:, :5] * s[:5]) @ Vh[:5]
        assert np.linalg.norm(dense(found[p]).numpy() - best) < 1e-4 * np.linalg.norm(best)
        lost, size = lost + (s[5:] ** 2).sum(), size + (s**2).sum()
    assert facts(found)["error"] == pytest.approx((lost / size) ** 0.5, rel=1e-4)


@pytest.mark.parametrize("tolerance", [0.5, 0.1, 0.01, 0.0])
def test_a_tolerance_bounds_every_module_and_no_rank_is_wasted(state, dense, tmp_path, tolerance):
    spectrum = 0.8 ** torch.arange(30.0)
    g = torch.Generator().manual_seed(1)
    tuned = dict(state)
    for p, (out, inn) in SHAPES.items():
        U = torch.linalg.qr(torch.randn(out, 30, generator=g))[0]
        V = torch.linalg.qr(torch.randn(inn, 30, generator=g))[0]
        tuned[f"{p}.weight"] = state[f"{p}.weight"] + (U * spectrum) @ V.T
    base, after = written(tmp_path / "base", state), written(tmp_path / "tuned", tuned)
    found = lf.extract(base, after, tolerance=tolerance)
    for p in SHAPES:
        D = tuned[f"{p}.weight"].double() - state[f"{p}.weight"].double()
        error = torch.linalg.norm(dense(found[p]) - D) / torch.linalg.norm(D)
        assert error <= tolerance + 1e-6
        s = torch.linalg.svdvals(D)
        less = torch.linalg.norm(s[found[p].rank - 1 :]) / torch.linalg.norm(s)
        assert less > tolerance * 0.999


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_the_floor_is_what_rounding_is(state, make_adapter, tmp_path, dtype):
    adapter = make_adapter(SHAPES, 4, seed=1, scale=0.02)
    fine = {k: W.double() for k, W in state.items()}
    tuned = adapter.apply_to(fine)
    base = written(tmp_path / "base", {k: W.to(dtype) for k, W in fine.items()})
    after = written(tmp_path / "tuned", {k: W.to(dtype) for k, W in tuned.items()})
    found = lf.extract(base, after, rank=32)
    off = found.distance(adapter) / found.norm()
    assert facts(found)["floor"] == pytest.approx(off, rel=0.15)


def test_a_large_matrix_is_done_by_chance_and_nearly_as_well(state, tmp_path, monkeypatch):
    from lorafold.merge.algebra import spaces

    g = torch.Generator().manual_seed(1)
    D = (torch.randn(96, 60, generator=g) * 0.9 ** torch.arange(60)) @ torch.randn(
        60, 128, generator=g
    )
    base = written(tmp_path / "base", {"q.weight": torch.zeros(96, 128)})
    after = written(tmp_path / "tuned", {"q.weight": D})
    exact = facts(lf.extract(base, after, rank=8))["error"]
    monkeypatch.setattr(spaces, "_EXACT", 8)
    quick = facts(lf.extract(base, after, rank=8))["error"]
    assert exact - 1e-6 <= quick < 1.001 * exact


def test_embeddings_convolutions_and_gpt2(tmp_path):
    g = torch.Generator().manual_seed(0)

    def low(*shape):
        n = int(np.prod(shape[1:]))
        return (torch.randn(shape[0], 2, generator=g) @ torch.randn(2, n, generator=g)).reshape(
            shape
        )

    shapes = {
        "transformer.wte.weight": (50, 16),
        "transformer.h.0.attn.c_attn.weight": (16, 48),
        "conv.weight": (6, 3, 3, 3),
    }
    state = {k: torch.randn(s, generator=g) for k, s in shapes.items()}
    tuned = {k: W + low(*W.shape) for k, W in state.items()}
    base = written(tmp_path / "base", state, {"model_type": "gpt2"})
    after = written(tmp_path / "tuned", tuned, {"model_type": "gpt2"})
    found = lf.extract(base, after, rank=2)
    assert found["transformer.wte"].shape == (16, 50)
    assert found["transformer.h.0.attn.c_attn"].shape == (48, 16)
    assert found.config["fan_in_fan_out"] is True
    lf.save(found, tmp_path / "out")
    again = lf.load(tmp_path / "out").apply_to(state)
    for k, W in tuned.items():
        assert torch.allclose(again[k], W, atol=1e-4), k


def test_what_is_no_matrix_is_kept_whole(state, tmp_path):
    tuned = {**state, "model.norm.weight": torch.full((32,), 2.0)}
    tuned["model.layers.0.q.weight"] = state["model.layers.0.q.weight"] + 1
    base, after = written(tmp_path / "base", state), written(tmp_path / "tuned", tuned)
    with pytest.warns(UserWarning, match=r"1 tensors .* kept whole: 'model.norm.weight'"):
        found = lf.extract(base, after, rank=1)
    assert set(found) == {"model.layers.0.q"}
    again = found.apply_to(state)
    assert torch.equal(again["model.norm.weight"], tuned["model.norm.weight"])
    assert found.config["modules_to_save"] == ["model.norm"]


@pytest.mark.parametrize("where", ["base", "tuned"])
def test_a_tied_head_may_be_left_out(state, tmp_path, where):
    """transformers leaves out what is tied; other writers don't."""
    tied = {"tie_word_embeddings": True, "model_type": "llama"}
    tuned = {k: W + 1 if k.endswith("q.weight") else W for k, W in state.items()}
    states = {"base": state, "tuned": tuned}
    states[where] = {**states[where], "lm_head.weight": state["model.embed_tokens.weight"].clone()}
    for name, s in states.items():
        written(tmp_path / name, s, tied)
    found = lf.extract(tmp_path / "base", tmp_path / "tuned", rank=1)
    assert set(found) == {p for p in SHAPES if p.endswith("q")}


def test_bad_input(state, tmp_path):
    base = written(tmp_path / "base", state)
    with pytest.raises(lf.MismatchError, match="no tensor differs"):
        lf.extract(base, base, rank=2)
    for options in ({}, {"rank": 2, "tolerance": 0.1}, {"rank": 0}, {"tolerance": 1.0}):
        with pytest.raises(lf.MismatchError):
            lf.extract(base, base, **options)
    fewer = written(tmp_path / "fewer", {k: W for k, W in state.items() if "norm" not in k})
    with pytest.raises(lf.MismatchError, match="'model.norm.weight'"):
        lf.extract(base, fewer, rank=2)
    other = {**state, "model.norm.weight": torch.ones(8)}
    with pytest.raises(lf.MismatchError, match=r"\(32,\) in the base and \(8,\)"):
        lf.extract(base, written(tmp_path / "other", other), rank=2)
    codes = {k: (W * 9).to(torch.int8) for k, W in state.items()}
    with pytest.raises(lf.RefusedError, match="quantised"):
        lf.extract(base, written(tmp_path / "codes", codes), rank=2)
    with pytest.raises(lf.FileError):
        lf.extract(base, tmp_path / "nothing", rank=2)
    key = "model.layers.0.q.weight"
    broken = {**state, key: state[key] * float("nan")}
    with pytest.raises(lf.MismatchError, match=f"'{key}' holds numbers that are not finite"):
        lf.extract(base, written(tmp_path / "broken", broken), rank=2)


@pytest.mark.parametrize("stored", [(False, False), (False, True), (True, False)])
def test_a_tied_head_changes_with_its_embedding(state, tmp_path, stored):
    """Merged back, the embedding's update alone would leave the output layer as it was."""
    key, g = "model.embed_tokens.weight", torch.Generator().manual_seed(1)
    tuned = {**state, key: state[key] + torch.randn(50, 2, generator=g) @ torch.ones(2, 32)}
    words = {"tie_word_embeddings": True, "architectures": ["LlamaForCausalLM"]}
    for name, s, has in zip(("base", "tuned"), (state, tuned), stored, strict=True):
        written(tmp_path / name, {**s, "lm_head.weight": s[key].clone()} if has else s, words)
    found = lf.extract(tmp_path / "base", tmp_path / "tuned", rank=2)
    assert set(found) == {"model.embed_tokens", "lm_head"}
    out = tmp_path / "out"
    lf.merge_into_weights(tmp_path / "base", found, out)
    again = load_file(out / "model.safetensors")
    for head in (key, "lm_head.weight"):
        assert torch.allclose(again[head], tuned[key], atol=1e-5)
    assert verify_merge(tmp_path / "base", found, tmp_path / "tuned").ok


def test_a_head_that_parted_from_its_embedding(state, tmp_path):
    head = state["model.embed_tokens.weight"] + torch.ones(50, 1) @ torch.ones(1, 32)
    words = {"architectures": ["LlamaForCausalLM"]}
    base = written(tmp_path / "base", state, {**words, "tie_word_embeddings": True})
    apart = {**words, "tie_word_embeddings": False}
    tuned = written(tmp_path / "tuned", {**state, "lm_head.weight": head}, apart)
    assert set(lf.extract(base, tuned, rank=1)) == {"lm_head"}


def test_numbers_of_eight_bits_have_no_difference(state, tmp_path):
    base = written(tmp_path / "base", state)
    key = "model.layers.0.q.weight"
    codes = {**state, key: (2 * state[key]).to(torch.float8_e4m3fn)}
    with pytest.raises(lf.RefusedError, match=f"{key!r} is torch.float8"):
        lf.extract(base, written(tmp_path / "tuned", codes), rank=1)
    both = {"base8": codes, "tuned8": {**codes, "model.norm.weight": torch.zeros(32)}}
    paths = [written(tmp_path / name, s) for name, s in both.items()]
    with pytest.warns(UserWarning, match="kept whole"):
        assert not lf.extract(*paths, rank=1).modules


def test_a_difference_beyond_float32_is_told_by_name(state, tmp_path):
    key = "model.layers.0.q.weight"
    near, far = ({**state, key: x * torch.ones(32, 40)} for x in (3e38, -3e38))
    base, tuned = written(tmp_path / "base", near), written(tmp_path / "tuned", far)
    with pytest.raises(lf.MismatchError, match=key):
        lf.extract(base, tuned, rank=1)


@pytest.mark.parametrize("model", ["qwen3_moe", "gpt_oss"])
def test_experts_that_are_one_parameter(tmp_path, model):
    """Slice by slice, (out, in) or (in, out) as the model stores them."""
    g = torch.Generator().manual_seed(0)
    key = "model.layers.0.mlp.experts.down_proj"
    W = torch.randn(3, 12, 16, generator=g)
    D = torch.randn(3, 12, 2, generator=g) @ torch.randn(3, 2, 16, generator=g)
    D[1] = 0
    base = written(tmp_path / "base", {key: W}, {"model_type": model})
    found = lf.extract(base, written(tmp_path / "tuned", {key: W + D}), rank=2)
    assert sorted(found) == [f"{key}[0]", f"{key}[2]"]
    shape = (12, 16) if model == "qwen3_moe" else (16, 12)
    assert {u.shape for u in found.modules.values()} == {shape}
    lf.save(found, tmp_path / "out")
    assert lf.load(tmp_path / "out").config["target_parameters"] == [
        "model.layers.0.mlp.experts.down_proj"
    ]
    lf.merge_into_weights(base, tmp_path / "out", tmp_path / "again")
    assert torch.allclose(load_file(tmp_path / "again/model.safetensors")[key], W + D, atol=1e-4)


@pytest.mark.filterwarnings("ignore:3 tensors")
def test_what_is_kept_whole_is_where_peft_looks_for_it(state, tmp_path):
    """Beside an update, the name of what it wraps; in a module with updates further down, none."""
    state["model.layers.0.q.bias"] = torch.zeros(32)
    state["model.layers.0.sinks"] = torch.zeros(4)
    other = {"model.layers.0.q.bias", "model.layers.0.sinks", "model.norm.weight"}
    tuned = {k: W + 1 if k in other or k.endswith("q.weight") else W for k, W in state.items()}
    base, after = written(tmp_path / "base", state), written(tmp_path / "tuned", tuned)
    with pytest.warns(UserWarning, match="PEFT has no way to load 'model.layers.0.sinks'"):
        found = lf.extract(base, after, rank=1)
    assert sorted(k.removeprefix("base_model.model.model.") for k in found.extras) == [
        "layers.0.q.base_layer.bias",
        "layers.0.sinks",
        "norm.weight",
    ]
    assert found.config["modules_to_save"] == ["model.norm"]
    lf.save(found, tmp_path / "out")
    lf.merge_into_weights(base, tmp_path / "out", tmp_path / "again")
    again = load_file(tmp_path / "again/model.safetensors")
    assert all(torch.allclose(again[k], W, atol=1e-5) for k, W in tuned.items())


def test_a_resized_vocabulary_says_what_to_give(state, tmp_path):
    key = "model.embed_tokens.weight"
    more = {**state, key: torch.cat([state[key], torch.ones(3, 32)])}
    base, after = written(tmp_path / "base", state), written(tmp_path / "tuned", more)
    with pytest.raises(lf.MismatchError, match=r"resize_token_embeddings\(53\)"):
        lf.extract(base, after, rank=1)
