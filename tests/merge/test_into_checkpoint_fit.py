"""Which weights an adapter's parts go to, and what is refused before a byte is written."""

from __future__ import annotations

import os

import pytest
import torch
from safetensors.torch import load_file

import lorafold as lf
from lorafold.files import safetensors as ranges
from lorafold.parts import PREFIX

Q = "layers.{}.q"


def assert_same_bits(found, wanted):
    assert found.keys() == wanted.keys()
    for key, t in wanted.items():
        assert found[key].dtype == t.dtype
        assert torch.equal(found[key], t), key


# Names


@pytest.mark.parametrize("longer", ["adapter", "base"])
def test_the_name_of_the_body_may_be_left_out(longer, folder, make_adapter, tmp_path):
    mine = {"adapter": "transformer.", "base": ""}[longer]
    theirs = {"adapter": "", "base": "transformer."}[longer]
    shapes = {f"h.{n}.attn": (6, 4) for n in range(2)}
    extras = {f"{PREFIX}{mine}h.0.attn.bias": torch.randn(6)}
    adapter = make_adapter(
        {mine + p: s for p, s in shapes.items()}, 2, extras=extras, config={"bias": "all"}
    )
    state = {f"h.{n}.attn.weight": torch.randn(6, 4) for n in range(2)}
    state["h.0.attn.bias"] = torch.zeros(6)
    base = folder({theirs + key: t for key, t in state.items()})
    lf.merge_into_weights(base, adapter, tmp_path / "out")
    full = adapter.apply_to({mine + key: t for key, t in state.items()})
    found = {
        key.removeprefix(theirs): t
        for key, t in load_file(tmp_path / "out" / "model.safetensors").items()
    }
    assert_same_bits(found, {key.removeprefix(mine): t for key, t in full.items()})


def test_a_head_that_is_the_embedding_is_reported_and_not_invented(
    small_state, folder, small, tmp_path
):
    head = lf.LowRank(torch.randn(1, 4), torch.randn(9, 1))
    adapter = lf.Adapter({**small.modules, "lm_head": head})
    state = small_state()
    base = folder(state)
    with pytest.warns(UserWarning, match="'lm_head'"):
        merged = lf.merge_into_weights(base, adapter, tmp_path / "out")
    assert "shares the weight of 'embed_tokens.weight'" in merged.unplaced["lm_head"]
    assert_same_bits(load_file(tmp_path / "out" / "model.safetensors"), small.apply_to(state))
    with pytest.raises(lf.MismatchError, match=r"nothing of .* shares the weight of"):
        lf.merge_into_weights(base, lf.Adapter({"lm_head": head}), tmp_path / "no")


def test_an_embedding_that_is_the_output_layer_is_told(small_state, folder, tmp_path):
    u = lf.LowRank(torch.randn(1, 9), torch.randn(4, 1))
    adapter = lf.Adapter({"embed_tokens": u}, layouts={"embed_tokens": lf.Layout("embedding")})
    tied = folder(small_state(), config={"tie_word_embeddings": True})
    with pytest.warns(UserWarning, match=r"'embed_tokens\.weight' is the output layer too"):
        merged = lf.merge_into_weights(tied, adapter, tmp_path / "a")
    assert merged.shared == ("embed_tokens.weight",)
    free = folder(small_state(), config={"tie_word_embeddings": False}, name="free")
    assert lf.merge_into_weights(free, adapter, tmp_path / "b").shared == ()
    both = folder(small_state() | {"lm_head.weight": torch.randn(9, 4)}, name="both")
    assert lf.merge_into_weights(both, adapter, tmp_path / "c").shared == ()
    rows = {f"{PREFIX}embed_tokens.token_adapter.trainable_tokens_delta": torch.randn(1, 4)}
    tokens = lf.Adapter({}, rows, {"trainable_token_indices": [2]})
    assert lf.merge_into_weights(tied, tokens, tmp_path / "d").shared == ()  # meant for both


# Refusals: before anything is written


def assert_refused(tmp_path, base, adapter, error, match, **options):
    before = sorted(tmp_path.rglob("*"))
    with pytest.raises(error, match=match) as info:
        lf.merge_into_weights(base, adapter, tmp_path / "out", **options)
    assert "\n" not in str(info.value)
    assert sorted(tmp_path.rglob("*")) == before


def test_options_out_of_range(small_state, folder, small, tmp_path):
    base = folder(small_state())
    for c in (float("nan"), float("inf"), "1", True, None):
        assert_refused(tmp_path, base, small, lf.MismatchError, "c must be a finite number", c=c)
    assert_refused(tmp_path, base, small, lf.MismatchError, "not as torch.int8", dtype=torch.int8)


def test_nothing_matches_or_a_shape_does_not_fit(
    small_state, folder, small, make_adapter, tmp_path
):
    base = folder(small_state())
    other = make_adapter({"x.y": (6, 4)}, 2)
    match = r"nothing of the adapter's 1 modules is in .*'x\.y' \(not in the base\)"
    assert_refused(tmp_path, base, other, lf.MismatchError, match)
    extra = lf.Adapter({}, {f"{PREFIX}score.weight": torch.ones(2, 2)})
    assert_refused(tmp_path, base, extra, lf.MismatchError, "nothing of the adapter's 1 tensors")
    wide = make_adapter({Q.format(0): (6, 4), Q.format(1): (6, 5)}, 2)
    match = r"'layers\.1\.q\.weight' has shape \(6, 4\), the update fits"
    assert_refused(tmp_path, base, wide, lf.MismatchError, match)
    long = lf.Adapter(small.modules, {f"{PREFIX}embed_tokens.weight": torch.ones(10, 4)})
    assert_refused(tmp_path, base, long, lf.MismatchError, "resize the base")


def test_shapes_are_found_wrong_before_a_byte_is_read(
    small_state, folder, make_adapter, tmp_path, monkeypatch
):
    base = folder(small_state())
    wide = make_adapter({Q.format(0): (6, 4), Q.format(1): (6, 5)}, 2)

    def fail(*_):
        raise AssertionError

    monkeypatch.setattr(ranges, "read_tensors", fail)
    assert_refused(tmp_path, base, wide, lf.MismatchError, "has shape")


def test_adapters_that_are_no_plain_update(small_state, folder, small, tmp_path):
    base = folder(small_state())
    dora = lf.Adapter(small.modules, {}, {"use_dora": True})
    assert_refused(tmp_path, base, dora, lf.RefusedError, "this is a DoRA adapter")
    replicated = lf.Adapter(small.modules, {}, {"layer_replication": [[0, 2], [1, 2]]})
    assert_refused(tmp_path, base, replicated, lf.MismatchError, "layer_replication")


@pytest.mark.parametrize(
    ("suffix", "value"),
    [
        ("weight", torch.zeros(12, 1, dtype=torch.uint8)),
        ("weight", torch.zeros(6, 4, dtype=torch.int8)),
        ("weight", torch.zeros(6, 4).to(torch.float8_e4m3fn)),
        ("qweight", torch.zeros(1, 6, dtype=torch.int32)),
        ("weight_packed", torch.zeros(6, 1, dtype=torch.int32)),
    ],
)
def test_quantised_weights(small_state, suffix, value, folder, small, tmp_path):
    state = small_state()
    del state["layers.1.q.weight"]
    base = folder(state | {f"layers.1.q.{suffix}": value})
    assert_refused(
        tmp_path, base, small, lf.RefusedError, rf"is quantised: 'layers\.1\.q\.{suffix}'"
    )
    extra = lf.Adapter({}, {f"{PREFIX}layers.1.q.{suffix}": torch.zeros(value.shape)})
    assert_refused(tmp_path, base, extra, lf.RefusedError, "is quantised")
    alone = lf.Adapter({Q.format(0): small[Q.format(0)]})
    lf.merge_into_weights(base, alone, tmp_path / "out")  # a float layer of a mixed model


def test_a_quantised_model_keeps_its_dtypes(small_state, folder, small, tmp_path):
    base = folder(small_state(), config={"quantization_config": {"bits": 4}})
    match = "its tensors keep their dtypes"
    assert_refused(tmp_path, base, small, lf.RefusedError, match, dtype=torch.float16)


def test_a_module_in_another_form_is_listed(small_state, folder, small, tmp_path):
    state = small_state()
    state["layers.1.q.weight_v"] = state.pop("layers.1.q.weight")
    with pytest.warns(UserWarning, match="1 parts"):
        merged = lf.merge_into_weights(folder(state), small, tmp_path / "out")
    assert merged.unplaced == {Q.format(1): "the base stores this module in another form"}


def test_numbers_beyond_the_range_of_the_dtype(small_state, folder, small, make_adapter, tmp_path):
    large = make_adapter({Q.format(0): (6, 4)}, 2, scale=1e6)
    base = folder(small_state(torch.float16))
    match = r"'layers\.0\.q\.weight' has numbers beyond the range of float16"
    assert_refused(tmp_path, base, large, lf.MismatchError, match)
    lf.merge_into_weights(base, large, tmp_path / "fine", dtype=torch.bfloat16)
    state = small_state() | {"norm.weight": torch.full((4,), 1e5)}
    wide = folder(state, name="wide")
    match = r"'norm\.weight' has numbers beyond the range of float16"
    assert_refused(tmp_path, wide, small, lf.MismatchError, match, dtype=torch.float16)
    extra = lf.Adapter(small.modules, {f"{PREFIX}norm.weight": torch.full((4,), 1e5)})
    assert_refused(tmp_path, base, extra, lf.MismatchError, match)


def test_folders_that_are_not_there_or_in_the_way(small_state, folder, small, tmp_path):
    base = folder(small_state())
    assert_refused(tmp_path, tmp_path / "no", small, lf.FileError, "no such folder")
    file = base / "model.safetensors"
    assert_refused(tmp_path, file, small, lf.FileError, "give the folder of the base model")
    for out in (base, base / "inside", tmp_path, base / ".." / "base"):
        with pytest.raises(lf.FileError, match="write elsewhere"):
            lf.merge_into_weights(base, small, out, overwrite=True)
    (tmp_path / "link").symlink_to(base)
    with pytest.raises(lf.FileError, match="write elsewhere"):
        lf.merge_into_weights(base, small, tmp_path / "link", overwrite=True)
    lf.merge_into_weights(base, small, tmp_path / "out")
    with pytest.raises(lf.FileError, match="give overwrite=True"):
        lf.merge_into_weights(base, small, tmp_path / "out")
    lf.merge_into_weights(base, small, tmp_path / "out", c=2, overwrite=True)
    assert_same_bits(
        load_file(tmp_path / "out" / "model.safetensors"), (2 * small).apply_to(small_state())
    )
    assert sorted(os.listdir(tmp_path)) == ["base", "link", "out"]
