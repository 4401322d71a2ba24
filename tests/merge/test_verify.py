"""What is found in a merged checkpoint: what was done to it, by hand, is known."""

from __future__ import annotations

import json

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file

import lorafold as lf
from lorafold.merge import verify_merge
from lorafold.parts import Layout

SHAPES = {
    f"model.layers.{i}.{m}": s for i in range(3) for m, s in (("q", (32, 32)), ("up", (48, 32)))
}
FILE = "model.safetensors"


@pytest.fixture
def world(make_adapter, tmp_path):
    """world(dtype) -> base folder, adapter; W of size 1, ΔW of a tenth of that."""

    def made(dtype=torch.float32, scale=0.05, rslora=False):
        g = torch.Generator().manual_seed(0)
        state = {f"{p}.weight": torch.randn(s, generator=g).to(dtype) for p, s in SHAPES.items()}
        state["model.embed_tokens.weight"] = torch.randn(50, 32, generator=g).to(dtype)
        state["model.norm.weight"] = torch.ones(32, dtype=dtype)
        folder = tmp_path / "base"
        folder.mkdir(exist_ok=True)
        save_file(state, folder / FILE)
        return folder, make_adapter(SHAPES, 4, seed=1, scale=scale)

    return made


def rewritten(base, out, change):
    """A copy of the base with `change(key, W)` in place of every tensor; None leaves it out."""
    out.mkdir()
    state = {k: change(k, W) for k, W in load_file(base / FILE).items()}
    save_file({k: t.contiguous() for k, t in state.items() if t is not None}, out / FILE)
    return out


def plus(adapter, c, dtype=None, only=lambda path: True, turn=False):
    """W + c ΔW, as anyone would write it."""

    def change(key, W):
        path = key.removesuffix(".weight")
        if path not in adapter or not only(path):
            return W if dtype is None else W.to(dtype)
        u = adapter[path]
        D = c * u.scale * (u.B.double() @ u.A.double())
        return (W.double() + (D.T if turn and D.shape[0] == D.shape[1] else D)).to(dtype or W.dtype)

    return change


def verdicts(found):
    return {f.verdict for f in found.parts.values()}


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("scale", [1.0, 0.05, 0.003])
def test_what_was_merged_right_is_right(world, tmp_path, dtype, scale):
    base, adapter = world(dtype, scale)
    lf.merge_into_weights(base, adapter, tmp_path / "out")
    found = verify_merge(base, adapter, tmp_path / "out")
    assert found.ok
    assert found.says == ""
    assert found.compared == 2
    for f in found.parts.values():
        assert f.rounding == pytest.approx(f.unexplained, abs=1e-4)
        if dtype == torch.float32:
            assert f.c == pytest.approx(1, abs=1e-4)
            assert f.rounding < 1e-3


def test_a_checkpoint_in_another_dtype(world, tmp_path):
    base, adapter = world()
    lf.merge_into_weights(base, adapter, tmp_path / "out", dtype=torch.bfloat16)
    assert verify_merge(base, adapter, tmp_path / "out").ok


def test_an_update_that_the_dtype_cannot_hold_is_said(world, tmp_path):
    base, adapter = world(torch.bfloat16, 1e-6)
    lf.merge_into_weights(base, adapter, tmp_path / "out")
    found = verify_merge(base, adapter, tmp_path / "out")
    assert found.ok
    assert any("too coarse" in f.why for f in found.parts.values())
    assert all(f.rounding > 0.5 for f in found.parts.values())


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize(
    ("c", "says"),
    [
        (2.0, "twice"),
        (-1.0, "subtracted"),
        (0.5, "without use_rslora"),  # rank 4: √r = 2, which twice is as well
        (20.0, "without its scale"),
        (0.7, ""),
    ],
)
def test_a_wrong_strength_is_found_with_its_likely_reason(world, tmp_path, dtype, c, says):
    base, adapter = world(dtype)
    found = verify_merge(base, adapter, rewritten(base, tmp_path / "out", plus(adapter, c)))
    assert verdicts(found) == {"wrong strength"}
    assert not found.ok
    assert says in found.says
    for f in found.parts.values():
        assert f.c == pytest.approx(c, rel=0.03)


def test_rslora_taken_for_plain_lora(world, tmp_path, make_adapter):
    base, _ = world()
    adapter = make_adapter(SHAPES, 16, seed=1, scale=0.05)
    found = verify_merge(base, adapter, rewritten(base, tmp_path / "out", plus(adapter, 4.0)))
    assert "√r too much" in found.says


def test_half_merged(world, tmp_path):
    base, adapter = world()
    some = plus(adapter, 1.0, only=lambda path: ".0." in path)
    found = verify_merge(base, adapter, rewritten(base, tmp_path / "out", some))
    assert found.counts == {"applied": 2, "not applied": 4}
    assert "in part" in found.says
    assert found.parts["model.layers.1.q"].c == 0


def test_not_merged(world):
    base, adapter = world()
    found = verify_merge(base, adapter, base)
    assert verdicts(found) == {"not applied"}
    assert "not merged" in found.says


def test_transposed(world, tmp_path):
    base, adapter = world()
    turned = plus(adapter, 1.0, turn=True)
    found = verify_merge(base, adapter, rewritten(base, tmp_path / "out", turned))
    assert found.parts["model.layers.0.q"].verdict == "other change"
    assert "transposed" in found.parts["model.layers.0.q"].why
    assert found.parts["model.layers.0.up"].verdict == "applied"


def test_the_wrong_base(world, tmp_path):
    base, adapter = world()
    rng = np.random.default_rng(0)

    def another(key, W):
        return plus(adapter, 1.0)(
            key, W + 0.1 * torch.from_numpy(rng.standard_normal(W.shape)).float()
        )

    found = verify_merge(base, adapter, rewritten(base, tmp_path / "out", another))
    assert verdicts(found) == {"other change"}
    assert set(found.others.values()) == {"changed"}
    assert "another base" in found.says


def test_another_adapter(world, tmp_path, make_adapter):
    base, adapter = world()
    other = make_adapter(SHAPES, 4, seed=9, scale=0.05)
    found = verify_merge(base, adapter, rewritten(base, tmp_path / "out", plus(other, 1.0)))
    assert verdicts(found) == {"other change"}
    assert found.says == ""
    assert all(abs(f.c) < 0.5 and f.unexplained > 0.5 for f in found.parts.values())


def test_tensors_that_went_missing_or_were_touched(world, tmp_path):
    base, adapter = world()

    def change(key, W):
        if key == "model.layers.2.q.weight":
            return None
        if key == "model.norm.weight":
            return W + 1
        return plus(adapter, 1.0)(key, W)

    found = verify_merge(base, adapter, rewritten(base, tmp_path / "out", change))
    assert found.parts["model.layers.2.q"].verdict == "missing"
    assert found.others == {"model.norm.weight": "changed"}
    assert not found.ok


def test_heads_that_are_held_whole(world, tmp_path):
    base, adapter = world()
    key = "base_model.model.model.norm.weight"
    whole = lf.Adapter(
        adapter.modules, {key: torch.full((32,), 3.0)}, {"modules_to_save": ["norm"]}
    )
    lf.merge_into_weights(base, whole, tmp_path / "out")
    assert verify_merge(base, whole, tmp_path / "out").ok
    found = verify_merge(base, whole, rewritten(base, tmp_path / "half", plus(adapter, 1.0)))
    assert found.parts[key].verdict == "not applied"


def test_what_cannot_be_told(world, tmp_path, make_adapter):
    base, adapter = world()
    with pytest.raises(lf.MismatchError, match="nothing of the adapter has a place"):
        verify_merge(base, make_adapter({"other.q": (4, 4)}, 2), base)
    with pytest.raises(lf.RefusedError, match="DoRA"):
        verify_merge(base, lf.Adapter(adapter.modules, config={"use_dora": True}), base)
    with pytest.raises(lf.FileError):
        verify_merge(base, adapter, tmp_path / "nothing")
    whole = rewritten(base, tmp_path / "out", lambda k, W: (W * 10).to(torch.int8))
    with pytest.raises(lf.RefusedError, match="quantised"):
        verify_merge(base, adapter, whole)


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_numbers_that_are_none_are_another_change(world, tmp_path, value):
    base, adapter = world()

    def change(key, W):
        W1 = plus(adapter, 1.0)(key, W)
        if key == "model.layers.1.q.weight":
            W1[0, 0] = value
        return W1

    found = verify_merge(base, adapter, rewritten(base, tmp_path / "out", change))
    assert found.counts == {"applied": 5, "other change": 1}
    f = found.parts["model.layers.1.q"]
    assert "not finite" in f.why
    assert (f.c, f.unexplained) == (None, 0.0)


def test_shards_and_conv_and_embeddings(tmp_path, make_update):
    modules = {"conv": make_update(6, 27, 2, seed=1), "emb": make_update(8, 30, 2, seed=2)}
    layouts = {"conv": lf.Layout("conv", kernel=(3, 3, 3)), "emb": lf.Layout("embedding")}
    adapter = lf.Adapter(modules, layouts=layouts)
    base = tmp_path / "base"
    base.mkdir()
    g = torch.Generator().manual_seed(0)
    save_file({"conv.weight": torch.randn(6, 3, 3, 3, generator=g)}, base / "model-1.safetensors")
    save_file({"emb.weight": torch.randn(30, 8, generator=g)}, base / "model-2.safetensors")
    lf.merge_into_weights(base, adapter, tmp_path / "out")
    assert verify_merge(base, adapter, tmp_path / "out").ok
    assert verdicts(verify_merge(base, 2 * adapter, tmp_path / "out")) == {"wrong strength"}


def tied(folder, said=True):
    """A base that says that its output layer is its embedding."""
    words = {"architectures": ["LlamaForCausalLM"], "tie_word_embeddings": said}
    (folder / "config.json").write_text(json.dumps(words))


@pytest.mark.parametrize("part", ["lm_head", "model.embed_tokens"])
def test_an_output_layer_that_parted_from_the_embedding(world, tmp_path, make_update, part):
    """`merge_into_weights` writes a tensor that the base does not have."""
    base, _ = world()
    tied(base)
    head = part == "lm_head"
    u = make_update(50, 32, 2) if head else make_update(32, 50, 2)
    layouts = {} if head else {part: Layout("embedding")}
    adapter = lf.Adapter({part: u}, layouts=layouts)
    lf.merge_into_weights(base, adapter, tmp_path / "out")
    assert "lm_head.weight" in load_file(tmp_path / "out" / FILE)
    found = verify_merge(base, adapter, tmp_path / "out")
    assert found.ok, found
    half = verify_merge(base, 0.5 * adapter, tmp_path / "out")
    assert half.counts == {"wrong strength": 1}


def test_an_output_layer_that_changed_with_the_embedding(world, tmp_path, make_update):
    """What merging into a running model whose layers share a weight comes to."""
    base, _ = world()
    tied(base)
    u = make_update(32, 50, 2)
    adapter = lf.Adapter(
        {"model.embed_tokens": u}, layouts={"model.embed_tokens": Layout("embedding")}
    )
    D = u.dense().T
    out = rewritten(
        base, tmp_path / "out", lambda k, W: W + D if k.endswith("tokens.weight") else W
    )
    tied(out)
    found = verify_merge(base, adapter, out)
    assert verdicts(found) == {"applied"}
    assert found.others == {"lm_head.weight": "changed"}


def test_an_output_layer_that_went_missing(world, tmp_path):
    base, adapter = world()
    state = load_file(base / FILE)
    save_file({**state, "lm_head.weight": torch.ones(50, 32)}, base / FILE)
    tied(base, said=False)
    out = rewritten(base, tmp_path / "out", plus(adapter, 1.0))
    save_file({k: t for k, t in load_file(out / FILE).items() if "head" not in k}, out / FILE)
    tied(out)  # the reader takes the embedding in its place
    assert verify_merge(base, adapter, out).others == {"lm_head.weight": "changed"}


def test_merged_twice_and_rounded_each_time(world, tmp_path):
    base, adapter = world(torch.bfloat16, scale=0.01)
    once = rewritten(base, tmp_path / "once", plus(adapter, 1.0))
    twice = rewritten(once, tmp_path / "twice", plus(adapter, 1.0))
    found = verify_merge(base, adapter, twice)
    assert verdicts(found) == {"wrong strength"}
    assert "merged twice" in found.says


def test_a_zero_update_in_another_dtype(world, tmp_path):
    base, adapter = world()
    out = rewritten(base, tmp_path / "out", plus(adapter, 0.0, torch.bfloat16))
    found = verify_merge(base, 0 * adapter, out)
    assert found.ok
    assert {f.why for f in found.parts.values()} == {"the update is zero"}


def test_a_strength_that_rounding_hides_is_said(world, tmp_path):
    base, adapter = world(torch.bfloat16, scale=0.0005)
    out = rewritten(base, tmp_path / "out", plus(adapter, 1.0))
    found = verify_merge(base, adapter, out)
    assert verdicts(found) == {"applied"}
    assert all("too coarse to tell" in f.why for f in found.parts.values())


def test_numbers_of_eight_bits_are_refused_and_untouched_ones_compared(world, tmp_path):
    base, adapter = world()
    key = next(iter(adapter)) + ".weight"
    out = rewritten(base, tmp_path / "out", plus(adapter, 1.0))
    state = load_file(out / FILE)
    save_file({**state, key: state[key].to(torch.float8_e4m3fn)}, out / FILE)
    with pytest.raises(lf.RefusedError, match="quantised"):
        verify_merge(base, adapter, out)
    codes = torch.ones(3).to(torch.float8_e4m3fn)
    save_file({**load_file(base / FILE), "codes": codes}, base / FILE)
    save_file({**state, "codes": codes}, out / FILE)
    assert verify_merge(base, adapter, out).ok


def test_nan_where_the_base_has_it_is_no_change(world, tmp_path):
    base, adapter = world()
    mask = torch.tensor([0.0, float("nan"), float("-inf")])
    save_file({**load_file(base / FILE), "mask": mask}, base / FILE)
    out = rewritten(base, tmp_path / "out", plus(adapter, 1.0))
    assert verify_merge(base, adapter, out).ok
    save_file({**load_file(out / FILE), "mask": mask.nan_to_num()}, out / FILE)
    assert verify_merge(base, adapter, out).others == {"mask": "changed"}


def test_an_embedding_whose_weight_is_saved_beside_its_update(world, tmp_path, make_update):
    """As PEFT saves it: the weight takes the base's place, the update is added to it."""
    base, _ = world()
    key = "model.embed_tokens"
    u, own = make_update(32, 50, 2), torch.ones(50, 32)
    extras = {f"base_model.model.{key}.base_layer.weight": own}
    adapter = lf.Adapter({key: u}, extras, layouts={key: Layout("embedding")})
    lf.merge_into_weights(base, adapter, tmp_path / "out")
    found = verify_merge(base, adapter, tmp_path / "out")
    assert found.counts == {"applied": 2}, found
    assert found.ok
    assert verify_merge(base, 2 * adapter, tmp_path / "out").counts == {"wrong strength": 2}
    only_u = rewritten(base, tmp_path / "u", lambda k, W: W + u.dense().T if key in k else W)
    assert verify_merge(base, adapter, only_u).counts == {"other change": 2}


@pytest.mark.parametrize("size", [(32, 32), (48, 32)])
def test_a_weight_that_is_stored_transposed(world, tmp_path, size):
    """Right numbers that no model can be loaded from."""
    base, adapter = world()
    merged = plus(adapter, 1.0)

    def turned(key, W):
        return (
            merged(key, W).T if tuple(W.shape) == size and key[:-7] in adapter else merged(key, W)
        )

    found = verify_merge(base, adapter, rewritten(base, tmp_path / "out", turned))
    assert found.counts == {"other change": 3, "applied": 3}
    assert found.says == "the whole weight is stored transposed"


def renamed(folder, out, name):
    out.mkdir()
    save_file({name(k): t for k, t in load_file(folder / FILE).items()}, out / FILE)
    return out


def test_names_with_a_base_model_s_prefix_or_without_it(world, tmp_path):
    """transformers writes `transformer.h.0…` of a GPT-2 whose base on the Hub has `h.0…`."""
    base, adapter = world()
    short = renamed(base, tmp_path / "short", lambda k: k.removeprefix("model."))
    merged = rewritten(base, tmp_path / "out", plus(adapter, 1.0))
    assert verify_merge(short, adapter, merged).ok
    found = verify_merge(base, adapter, renamed(merged, tmp_path / "out2", lambda k: k[6:]))
    assert (found.ok, found.compared) == (True, 2)
    broken = rewritten(merged, tmp_path / "broken", lambda k, W: W + 1 if "norm" in k else W)
    assert verify_merge(short, adapter, broken).others == {"norm.weight": "changed"}


def test_names_that_nothing_reads_are_told(world, tmp_path):
    base, adapter = world()
    merged = rewritten(base, tmp_path / "out", plus(adapter, 1.0))
    twice = verify_merge(base, adapter, renamed(merged, tmp_path / "m", lambda k: "model." + k))
    assert (twice.ok, len(twice.others)) == (False, 4)
    assert twice.says == "the names of its tensors have 'model.' before them"
