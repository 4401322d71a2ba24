"""Fused and apart: rows against the models' own code, and outputs before and after."""

import importlib.util
from pathlib import Path

import pytest
import torch
from transformers import AttentionInterface
from transformers.integrations.sdpa_attention import sdpa_attention_forward

import lorafold as lf
from lorafold.roles import Heads, Packing, Role, heads, packing

spec = importlib.util.spec_from_file_location("models", Path(__file__).with_name("models.py"))
models = importlib.util.module_from_spec(spec)
spec.loader.exec_module(models)

FUSED = ("gpt2", "gpt2 cross", "gpt_neox", "bloom", "falcon", "falcon heads", "falcon new", "phi3")
SEEN = []


def seen(module, query, key, value, mask, **options):
    """torch's attention, and what it was given."""
    SEEN.append((query, key, value))
    return sdpa_attention_forward(module, query, key, value, mask, **options)


AttentionInterface.register("seen", seen)


def random_update(out, inner, rank=2, scale=0.5, seed=0):
    g = torch.Generator().manual_seed(seed)
    A = torch.randn(rank, inner, generator=g) / inner**0.5
    return lf.LowRank(A, torch.randn(out, rank, generator=g), scale)


def fused_layers(model):
    """{path: (role, packing, (out, in))} of the layers that hold several projections."""
    found = {}
    for path, role in lf.roles(model).items():
        how = packing(role, model)
        if how is not None and role.expert is None and not path.endswith("experts.gate_up_proj"):
            layer = model.get_submodule(path)
            shape = tuple(layer.weight.shape)
            found[path] = (role, how, shape[::-1] if type(layer).__name__ == "Conv1D" else shape)
    return found


def attended(model, inputs, path):
    """Query, key and value of one layer as (batch, positions, heads, dim), by the model's code."""
    attention = model.get_submodule(path.rpartition(".")[0])
    if hasattr(attention, "_split_heads") or hasattr(attention, "_reshape"):
        kept = []
        handle = model.get_submodule(path).register_forward_hook(lambda m, i, y: kept.append(y))
        models.output_of(model, inputs)
        handle.remove()
        if hasattr(attention, "_split_heads"):
            return attention._split_heads(kept[0])
        return [t.transpose(1, 2) for t in attention._reshape(kept[0])]
    SEEN.clear()
    models.output_of(model, inputs)
    at = [p for p in fused_layers(model)].index(path)
    return [t.transpose(1, 2) for t in SEEN[at]]


@pytest.mark.parametrize(
    ("name", "kind"),
    [*((name, "attention.qkv") for name in FUSED), ("gpt2 cross", "cross.kv")],
)
def test_each_part_is_what_the_model_takes_for_it(name, kind):
    """An update of one part changes that one, by x ΔWᵀ of its heads, and no other.

    Where positions are rotated in, the norms of the heads are compared.
    """
    model, inputs = models.model_of(name), models.inputs_of(name)
    if "bloom" not in name and "falcon" not in name:
        model.set_attn_implementation("seen")
    layers = fused_layers(model)
    path = next(p for p, (role, _, _) in layers.items() if role.kind == kind)
    _, how, (out, inner) = layers[path]
    kept = []
    layer = model.get_submodule(path)
    handle = layer.register_forward_pre_hook(lambda m, given: kept.append(given[0]))
    before = attended(model, inputs, path)
    handle.remove()
    unrotated = name in ("gpt2", "gpt2 cross", "bloom", "falcon heads")
    parts = how.split(random_update(out, inner))
    assert list(parts) == ["query", "key", "value"][-len(parts) :]
    for word, part in parts.items():
        at = ["query", "key", "value"].index(word)
        delta = how.fuse({word: part}).dense()
        delta = delta.T if type(layer).__name__ == "Conv1D" else delta
        with torch.no_grad():
            layer.weight += delta
            after = attended(model, inputs, path)
            layer.weight -= delta
        changed = [b - a for a, b in zip(before, after, strict=True)]
        of = heads(model)
        expected = part(kept[0]).unflatten(-1, (-1, of.dim))
        assert expected.shape[-2] == (of.query if word == "query" else of.key)
        times = changed[at].shape[-2] // expected.shape[-2]
        expected = expected.repeat_interleave(times, -2)  # a key of several queries
        if unrotated or word == "value":
            torch.testing.assert_close(changed[at], expected, atol=1e-5, rtol=1e-4)
        else:
            norms = changed[at].norm(dim=-1), expected.norm(dim=-1)
            torch.testing.assert_close(*norms, atol=1e-5, rtol=1e-4)
        for other in {0, 1, 2} - {at}:
            assert changed[other].abs().max() < 1e-5


@pytest.mark.parametrize("name", FUSED)
def test_outputs_are_equal_after_taking_apart_and_putting_together(name):
    model, inputs = models.model_of(name), models.inputs_of(name)
    layers = fused_layers(model)
    assert layers
    whole, back, several = {}, {}, {}
    for i, (path, (_, how, (out, inner))) in enumerate(layers.items()):
        whole[path] = random_update(out, inner, seed=i)
        parts = how.split(whole[path])
        back[path] = how.fuse(parts)
        assert torch.equal(back[path].A, whole[path].A)
        assert torch.equal(back[path].B, whole[path].B)
        # Of other gauges and scales, they have no A in common and ranks add.
        other = {w: lf.LowRank(2 * u.A, u.B / 8, 4 * u.scale) for w, u in parts.items()}
        first = next(iter(other))
        other[first] = lf.LowRank(4 * parts[first].A, parts[first].B / 4, parts[first].scale)
        several[path] = how.fuse(other)
        assert several[path].rank == (4 if len(parts) > 1 else 2)
    outputs = []
    for modules in ({}, whole, back, several):
        if not modules:
            outputs.append(models.output_of(model, inputs))
            continue
        live = lf.attach(model, lf.Adapter(modules))
        with live.use("default"):
            outputs.append(models.output_of(model, inputs))
        live.detach()
    assert (outputs[1] - outputs[0]).abs().max() > 1e-2
    assert torch.equal(outputs[1], outputs[2])
    torch.testing.assert_close(outputs[1], outputs[3], atol=1e-5, rtol=0)


def test_fused_heads_of_every_kind():
    assert heads(models.config_of("phi3")) == Heads(4, 2, 8)
    assert heads(models.config_of("qwen3")) == Heads(4, 2, 16)
    assert heads(models.config_of("falcon")) == Heads(4, 1, 8)
    assert heads(models.config_of("falcon heads")) == Heads(4, 4, 8)
    assert heads(models.config_of("falcon new")) == Heads(4, 2, 8)
    assert heads(models.config_of("clip"), "vision") == Heads(4, 4, 8)
    assert heads(models.config_of("t5"), "encoder") == Heads(4, 4, 8)
    for odd in ({}, {"n_head": 0, "n_embd": 8}, {"n_head": 2}, {"num_heads": "4"}):
        with pytest.raises(lf.MismatchError, match="heads are not told"):
            heads({"model_type": "unknown", **odd})


def test_parts_against_dense_rows():
    u = random_update(24, 6)
    how = Packing(("query", "key", "value"), (2, 1, 1), 2)
    rows = u.dense().view(2, 12, 6)
    parts = how.split(u)
    expected = {"query": rows[:, :6], "key": rows[:, 6:9], "value": rows[:, 9:]}
    for word, part in parts.items():
        assert torch.equal(part.dense(), expected[word].reshape(-1, 6))
        assert torch.equal(part.A, u.A)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64])
def test_half_types_stay_and_scales_that_differ_are_not_rounded_in_them(dtype):
    u = random_update(12, 6).to(dtype=dtype)
    how = Packing(("gate", "up"), (1, 1))
    parts = how.split(u)
    assert parts["gate"].B.dtype == how.fuse(parts).B.dtype == dtype
    parts["up"] = parts["up"] * (1 / 3)
    mixed = how.fuse(parts)
    assert mixed.scale == 1.0
    assert mixed.B.dtype == torch.promote_types(dtype, torch.float32)
    expected = torch.cat([parts[w].dense() for w in ("gate", "up")])
    torch.testing.assert_close(mixed.dense(), expected, atol=1e-6, rtol=1e-6)


def test_a_part_that_is_missing_is_not_updated():
    how = Packing(("query", "key", "value"), (4, 2, 2))
    u = random_update(8, 6)
    whole = how.fuse({"value": u})
    assert whole.shape == (32, 6)
    assert torch.equal(whole.dense()[24:], u.dense())
    assert not whole.dense()[:24].any()


def test_bad_input():
    how = Packing(("query", "key", "value"), (2, 1, 1))
    with pytest.raises(lf.MismatchError, match="13 rows can't be shared"):
        how.split(random_update(13, 6))
    with pytest.raises(lf.MismatchError, match="the parts are query, key, value"):
        how.fuse({"gate": random_update(4, 6)})
    with pytest.raises(lf.MismatchError, match="the parts are query"):
        how.fuse({})
    with pytest.raises(lf.MismatchError, match="part 'key' is 8×6"):
        how.fuse({"query": random_update(8, 6), "key": random_update(8, 6)})
    with pytest.raises(lf.MismatchError, match="a share of at least 1"):
        Packing(("gate", "up"), (1, 0))
    with pytest.raises(lf.MismatchError, match="is not told: give a model"):
        packing(Role("attention.qkv", 0))
    with pytest.raises(lf.MismatchError, match="is not known of 'odd'.*ORDERS"):
        packing(Role("attention.qkv", 0), {"model_type": "odd", "n_head": 2, "n_embd": 8})
    assert packing(Role("attention.query", 0)) is None
    assert packing(Role("mlp.gate_up", 0)) == Packing(("gate", "up"), (1, 1))
