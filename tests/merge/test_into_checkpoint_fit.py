"""Which weights an adapter's parts go to, and what is refused before a byte is written."""

from __future__ import annotations

import json
import os

import pytest
import torch
from safetensors.torch import load_file, save_file

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


def test_a_head_that_is_the_embedding_gets_a_weight_of_its_own(
    small_state, folder, small, tmp_path, dense
):
    head = lf.LowRank(torch.randn(1, 4), torch.randn(9, 1))
    adapter = lf.Adapter({**small.modules, "lm_head": head})
    state = small_state()
    base = folder(state, config={"tie_word_embeddings": True}, shards=2)
    merged = lf.merge_into_weights(base, adapter, tmp_path / "out")
    assert merged.untied == "lm_head.weight"
    found = load_all(tmp_path / "out")
    assert_same_bits(found, adapter.apply_to(state))
    exact = state["embed_tokens.weight"].double() + dense(head)
    torch.testing.assert_close(found["lm_head.weight"].double(), exact, rtol=1e-6, atol=1e-6)
    assert torch.equal(found["embed_tokens.weight"], state["embed_tokens.weight"])
    assert says_tied(tmp_path / "out") is False
    # Without a configuration nothing could say that they are two weights now.
    bare = folder(state, name="bare")
    assert_refused(tmp_path, bare, adapter, lf.RefusedError, r"has no config\.json")
    assert lf.merge_into_weights(bare, adapter, tmp_path / "same", c=0).untied is None
    empty = folder(state, config={}, name="empty")  # the adapter says that there is such a layer
    assert lf.merge_into_weights(empty, adapter, tmp_path / "e").untied == "lm_head.weight"
    assert says_tied(tmp_path / "e") is False


def test_an_output_layer_of_an_unknown_name_is_refused(small_state, folder, tmp_path):
    config = {"architectures": ["FooForMaskedLM"], "tie_word_embeddings": True}
    base = folder(small_state(), config=config)
    u = lf.LowRank(torch.randn(1, 9), torch.randn(4, 1))
    adapter = lf.Adapter({"embed_tokens": u}, layouts={"embed_tokens": lf.Layout("embedding")})
    assert_refused(tmp_path, base, adapter, lf.RefusedError, "under a name that is not known")
    rows = {f"{PREFIX}embed_tokens.token_adapter.trainable_tokens_delta": torch.randn(1, 4)}
    tokens = lf.Adapter({}, rows, {"trainable_token_indices": [2]})
    merged = lf.merge_into_weights(base, tokens, tmp_path / "out")  # both follow
    assert merged.untied is None


@pytest.mark.parametrize("says", [True, False, None])
def test_one_weight_of_encoder_decoder_and_output_layer(says, small_state, folder, tmp_path):
    """T5's, BART's: what holds it can't say that one of them is another."""
    state = {k.replace("embed_tokens", "shared"): t for k, t in small_state().items()}
    config = {"architectures": ["T5ForConditionalGeneration"], "tie_word_embeddings": says}
    base = folder(state, config=config)
    u = lf.LowRank(torch.randn(1, 9), torch.randn(4, 1))
    embedding = lf.Adapter({"shared": u}, layouts={"shared": lf.Layout("embedding")})
    saved = lf.Adapter({}, {f"{PREFIX}shared.weight": torch.randn(9, 4)})
    head = lf.Adapter({"lm_head": lf.LowRank(torch.randn(1, 4), torch.randn(9, 1))})
    for adapter in (embedding, saved, head):
        match = r"one weight, 'shared\.weight', for encoder, decoder"
        assert_refused(tmp_path, base, adapter, lf.RefusedError, match)
    rows = {f"{PREFIX}shared.token_adapter.trainable_tokens_delta": torch.randn(1, 4)}
    tokens = lf.Adapter({}, rows, {"trainable_token_indices": [2]})
    assert lf.merge_into_weights(base, tokens, tmp_path / "rows").untied is None  # all follow
    # A head of its own is merged; so is all where each of them is stored.
    own = folder(state | {"lm_head.weight": torch.randn(9, 4)}, config=config, name="own")
    if says:  # what is stored is not what is loaded
        assert_refused(tmp_path, own, head, lf.RefusedError, "one weight")
    else:
        assert lf.merge_into_weights(own, head, tmp_path / "head").changed == ("lm_head.weight",)
    if says is False:
        more = {f"{n}.embed_tokens.weight": torch.randn(9, 4) for n in ("encoder", "decoder")}
        each = folder(state | more, config=config, name="each")
        lf.merge_into_weights(each, embedding, tmp_path / "each-out")


def load_all(folder):
    found = {}
    for path in sorted(folder.glob("*.safetensors")):
        found |= load_file(path)
    return found


def says_tied(folder):
    return json.loads((folder / "config.json").read_text()).get("tie_word_embeddings")


def test_an_embedding_that_is_the_output_layer_parts_from_it(small_state, folder, tmp_path):
    u = lf.LowRank(torch.randn(1, 9), torch.randn(4, 1))
    adapter = lf.Adapter({"embed_tokens": u}, layouts={"embed_tokens": lf.Layout("embedding")})
    state = small_state()
    tied = folder(state, config={"tie_word_embeddings": True})
    merged = lf.merge_into_weights(tied, adapter, tmp_path / "a")
    assert merged.untied == "lm_head.weight"
    wanted = adapter.apply_to(state) | {"lm_head.weight": state["embed_tokens.weight"]}
    assert_same_bits(load_all(tmp_path / "a"), wanted)
    assert says_tied(tmp_path / "a") is False
    none = lf.merge_into_weights(tied, adapter, tmp_path / "none", c=0)
    assert (none.untied, none.changed, says_tied(tmp_path / "none")) == (None, (), True)
    body = folder(state, config={"architectures": ["LlamaModel"]}, name="body")
    assert lf.merge_into_weights(body, adapter, tmp_path / "e").untied is None
    free = folder(state, config={"tie_word_embeddings": False}, name="free")
    assert lf.merge_into_weights(free, adapter, tmp_path / "b").untied is None
    own = state | {"lm_head.weight": torch.randn(9, 4)}
    both = folder(own, config={"tie_word_embeddings": False}, name="both")
    assert lf.merge_into_weights(both, adapter, tmp_path / "c").untied is None
    said = folder(own, config={"tie_word_embeddings": True}, name="said")
    assert lf.merge_into_weights(said, adapter, tmp_path / "f").untied == "lm_head.weight"
    assert_same_bits(load_all(tmp_path / "f"), adapter.apply_to(own))
    assert says_tied(tmp_path / "f") is False


@pytest.mark.parametrize("differ", [False, True])
def test_what_both_have_alike_stays_tied(differ, small_state, folder, tmp_path):
    state = small_state()
    tied = folder(state, config={"tie_word_embeddings": True})
    rows = {f"{PREFIX}embed_tokens.token_adapter.trainable_tokens_delta": torch.randn(1, 4)}
    new = torch.randn(9, 4)
    saved = {f"{PREFIX}embed_tokens.weight": new, f"{PREFIX}lm_head.weight": new + differ}
    config = {"trainable_token_indices": [2]}
    for n, (extras, more) in enumerate(
        [(rows, {}), (saved, {"modules_to_save": ["embed_tokens", "lm_head"]})]
    ):
        adapter = lf.Adapter({}, extras, config | more)
        out = tmp_path / str(n)
        merged = lf.merge_into_weights(tied, adapter, out)
        parted = differ and extras is saved
        assert merged.untied == ("lm_head.weight" if parted else None)
        wanted = adapter.apply_to(state)
        if not parted:
            wanted.pop("lm_head.weight", None)
        assert_same_bits(load_all(out), wanted)
        assert says_tied(out) is not parted


@pytest.mark.parametrize("wrapper", ["_orig_mod.", "module.", "module._orig_mod."])
def test_a_base_that_was_wrapped_when_it_was_saved(wrapper, small_state, folder, small, tmp_path):
    """Its keys stay as they are; names are matched without what wrapped the model."""
    state = small_state()
    base = folder({wrapper + key: t for key, t in state.items()})
    merged = lf.merge_into_weights(base, small, tmp_path / "out")
    assert merged.unplaced == {}
    wanted = small.apply_to(state)
    assert_same_bits(load_all(tmp_path / "out"), {wrapper + key: t for key, t in wanted.items()})
    found = small.apply_to({wrapper + key: t for key, t in state.items()})
    assert_same_bits({key.removeprefix(wrapper): t for key, t in found.items()}, wanted)
    inner = {key.replace("layers.1.", "layers.1._orig_mod."): t for key, t in state.items()}
    assert_same_bits(
        {key.replace("_orig_mod.", ""): t for key, t in small.apply_to(inner).items()}, wanted
    )


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
    base = folder(state)
    match = r"1 parts .* 'layers\.1\.q' \(the base stores this module in another form\)"
    assert_refused(tmp_path, base, small, lf.MismatchError, match)
    merged = lf.merge_into_weights(base, small, tmp_path / "out", partial=True)
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


def test_overwriting_spares_what_no_model_has(small_state, folder, small, tmp_path):
    base, out = folder(small_state()), tmp_path / "out"
    out.mkdir()
    data = {"train.safetensors": 1.0, "embeddings.safetensors": 2.0}
    for name, value in data.items():
        save_file({"x": torch.full((3,), value)}, out / name)
    before = {p.name: p.read_bytes() for p in out.iterdir()}
    with pytest.raises(lf.FileError, match="is not a model in safetensors"):
        lf.merge_into_weights(base, small, out, overwrite=True)
    (out / "config.json").write_text("{}")  # of an experiment, say
    with pytest.raises(lf.FileError, match="is not a model in safetensors"):
        lf.merge_into_weights(base, small, out, overwrite=True)
    assert before.items() <= {p.name: p.read_bytes() for p in out.iterdir()}.items()
    # A model's own files go, with the rest that a shard of the old one would be.
    model = tmp_path / "model"
    model.mkdir()
    for name in ("model-00001-of-00002.safetensors", "model.fp16.safetensors"):
        save_file({"x": torch.zeros(3)}, model / name)
    (model / "tokenizer_training.py").write_text("mine")
    (model / "tokenizer.json").write_text("{}")
    lf.merge_into_weights(base, small, model, overwrite=True)
    left = {p.name for p in model.iterdir()} - {p.name for p in base.iterdir()}
    assert left == {"tokenizer_training.py"}
    # A base by another name may be merged anew.
    (base / "model.safetensors").rename(base / "net.safetensors")
    for c in (1.0, 0.5):
        lf.merge_into_weights(base, small, tmp_path / "net", c=c, overwrite=True)
