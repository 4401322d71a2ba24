"""Aligning two bases: ground truth in other coordinates, what is kept, what is refused."""

import copy
import shutil

import pytest
import torch
from transformers import GPT2Config, GPT2LMHeadModel, LlamaConfig, LlamaForCausalLM

import lorafold as lf
from lorafold.demo.model import data_dir
from lorafold.transfer.align import depth
from lorafold.transfer.align.offsets import as_bytes, paired

TASKS = ("sql_inserts", "dates", "tokens", "html_help")


def texts_of(task, start, count, length=250):
    whole = (data_dir() / "heldout" / f"{task}.txt").read_text()
    return [whole[start + k * length : start + (k + 1) * length] for k in range(count)]


TEXTS = [text for task in TASKS for text in texts_of(task, 0, 3)]
HELD = [text for task in TASKS for text in texts_of(task, 5000, 1)]


@pytest.fixture(scope="module", params=["rotation", "permutation"])
def known(request, ground_truth):
    """Source, target, their alignment, an adapter, and what it is in the target."""
    source, target, adapter, truth = ground_truth(permute=request.param == "permutation")
    return source, target, lf.align(source, target, TEXTS, tokenizers="bytes"), adapter, truth


def inputs(model, text):
    """{path: what the module sees} for a text."""
    seen, handles = {}, []
    for path, module in model.named_modules():
        if isinstance(module, torch.nn.Linear):
            handles.append(
                module.register_forward_hook(
                    lambda m, args, out, path=path: seen.update({path: args[0][0].double()})
                )
            )
    with torch.no_grad():
        model(torch.tensor([as_bytes(text)[0]]))
    for handle in handles:
        handle.remove()
    return seen


def effect_cosine(target, moved, truth):
    """Of the effects on held-out texts, over all modules."""
    both = own = other = 0.0
    for text in HELD:
        seen = inputs(target, text)
        for path, u in truth.items():
            want = u(seen[path])
            got = moved[path](seen[path]) if path in moved else torch.zeros_like(want)
            both, own, other = (
                both + (want * got).sum(),
                own + (want**2).sum(),
                other + (got**2).sum(),
            )
    return float(both / (own * other).sqrt()) if other else 0.0


def test_the_other_coordinates_are_the_same_function(known):
    source, target, _, adapter, truth = known
    ids = torch.tensor([as_bytes(HELD[0])[0]])
    with torch.no_grad():
        assert (source(ids).logits - target(ids).logits).abs().max() < 1e-3
        ends = [added(model, a)(ids).logits for model, a in ((source, adapter), (target, truth))]
    assert (ends[0] - ends[1]).abs().max() < 1e-2


def added(model, adapter):
    """A copy of the model with the updates in its weights."""
    other = copy.deepcopy(model)
    with torch.no_grad():
        for path, u in adapter.items():
            other.get_submodule(path).weight += u.dense()
    return other


@pytest.mark.parametrize(
    ("method", "options"),
    [
        ("procrustes", {}),
        ("procrustes", {"centre": True}),
        ("procrustes", {"whiten": 0.5}),
        ("functional", {}),
        ("functional", {"after": "procrustes"}),
    ],
)
def test_the_update_is_found_in_other_coordinates(known, method, options):
    source, target, alignment, adapter, truth = known
    moved = lf.transfer(
        adapter, source, target, method=method, alignment=alignment, **options
    ).adapter
    assert set(moved) == set(truth)
    assert effect_cosine(target, moved, truth) > 0.99
    assert all(moved[p].rank == u.rank for p, u in adapter.items())
    if method == "procrustes":
        assert moved.cosine(truth) > 0.99


def test_negative_controls(known):
    """What knows nothing of the two bases' coordinates finds nothing."""
    _, target, _, adapter, truth = known
    for method in ("truncate", "svd"):
        padded = lf.transfer(adapter, target=target, method=method).adapter
        assert abs(padded.cosine(truth)) < 0.1
        assert abs(effect_cosine(target, padded, truth)) < 0.3


def index_matched(adapter, source, target):
    """The update with the source weight's singular vectors replaced by the target's, by index.

    Singular vectors have no sign of their own, and two bases order them differently.
    """
    moved = {}
    for path, u in adapter.items():
        W_s, W_t = (m.get_submodule(path).weight.detach().double() for m in (source, target))
        U_s, _, V_s = torch.linalg.svd(W_s, full_matrices=False)
        U_t, _, V_t = torch.linalg.svd(W_t, full_matrices=False)
        A = u.A.double() @ V_s.T @ V_t
        B = U_t @ (U_s.T @ u.B.double())
        moved[path] = lf.LowRank(A.float(), B.float(), u.scale)
    return lf.Adapter(moved)


def test_matching_singular_vectors_by_index_finds_nothing(known):
    source, target, _, adapter, truth = known
    assert abs(index_matched(adapter, source, target).cosine(truth)) < 0.2


def test_heads_are_found_again(known):
    *_, alignment, _, _ = known
    for role, join in alignment.joins.items():
        if role.kind == "attention.query":
            heads = [of for _, (of,) in join.output_heads]
            assert sorted(heads) == [0, 1, 2, 3]
            assert (
                join.output_heads
                == alignment.joins[type(role)("attention.output", role.layer)].input_heads
            )


def test_it_is_written_and_read(known, tmp_path):
    source, target, alignment, adapter, _ = known
    path = tmp_path / "pair.safetensors"
    alignment.save(path)
    with pytest.raises(lf.errors.FileError, match="overwrite=True"):
        alignment.save(path)
    alignment.save(path, overwrite=True)
    again = lf.Alignment.load(path)
    assert (again.joins, again.digests, again.texts) == (
        alignment.joins,
        alignment.digests,
        alignment.texts,
    )
    one = lf.transfer(adapter, source, target, method="procrustes", alignment=alignment).adapter
    for given in (again, path, str(path)):
        other = lf.transfer(adapter, source, target, method="procrustes", alignment=given).adapter
        assert other.cosine(one) > 0.99999
    with pytest.raises(lf.errors.MismatchError, match="the two are exchanged"):
        lf.transfer(adapter, target, source, method="procrustes", alignment=alignment)
    (tmp_path / "other.safetensors").write_bytes(b"none")
    with pytest.raises(lf.errors.FileError, match="other.safetensors"):
        lf.Alignment.load(tmp_path / "other.safetensors")
    with pytest.raises(lf.errors.FileError, match="no alignment"):
        lf.Alignment.load(data_dir() / "base" / "model.safetensors")


def small(seed=0, **config):
    torch.manual_seed(seed)
    kind = {"hidden_size": 32, "intermediate_size": 48, "num_attention_heads": 4, "vocab_size": 256}
    kind |= {"num_hidden_layers": 2, "num_key_value_heads": 4, "max_position_embeddings": 64}
    return LlamaForCausalLM(LlamaConfig(**{**kind, **config})).eval()


def update_of(model, paths, rank=2):
    made = {}
    for path in paths:
        out, inner = model.get_submodule(path).weight.shape
        g = torch.Generator().manual_seed(len(made))
        made[path] = lf.LowRank(
            torch.randn(rank, inner, generator=g), torch.randn(out, rank, generator=g)
        )
    return lf.Adapter(made)


EVERY = [
    f"model.layers.{k}.{name}_proj"
    for k in (0, 1)
    for name in ("self_attn.q", "self_attn.k", "self_attn.v", "self_attn.o", "mlp.up", "mlp.down")
]


def test_other_widths_depths_and_grouped_queries():
    source = small()
    target = small(
        1,
        hidden_size=48,
        num_hidden_layers=3,
        num_attention_heads=6,
        num_key_value_heads=2,
        intermediate_size=64,
    )
    alignment = lf.align(source, target, TEXTS[:6], tokenizers="bytes")
    assert alignment.layers == {"decoder": (0, 0, 1)}
    for method in ("procrustes", "functional"):
        done = lf.transfer(
            update_of(source, EVERY), source, target, method=method, alignment=alignment
        )
        for path, u in done.adapter.items():
            assert u.shape == tuple(target.get_submodule(path).weight.shape)
        assert len(done.adapter) == 18
    by_likeness = lf.align(source, target, TEXTS[:6], tokenizers="bytes", layers="cka")
    assert len(by_likeness.layers["decoder"]) == 3
    assert list(by_likeness.layers["decoder"]) == sorted(by_likeness.layers["decoder"])


def test_a_fused_target_gets_what_a_split_source_has():
    source = small()
    torch.manual_seed(2)
    target = GPT2LMHeadModel(
        GPT2Config(n_embd=32, n_layer=2, n_head=4, vocab_size=256, n_positions=64)
    ).eval()
    done = lf.transfer(
        update_of(source, EVERY),
        source,
        target,
        method="functional",
        texts=TEXTS[:6],
        alignment=lf.align(source, target, TEXTS[:6], tokenizers="bytes"),
    )
    fused = done.adapter["transformer.h.0.attn.c_attn"]
    assert fused.shape == (96, 32)
    assert done.report.modules[0].sources
    gate = lf.align(source, target, TEXTS[:6], tokenizers="bytes").unpaired[0]
    assert "model.layers.0.mlp.gate_proj" in gate


def test_gradients_align_the_outputs(ground_truth):
    source, target, adapter, truth = ground_truth(seed=3)
    alignment = lf.align(source, target, TEXTS[:8], tokenizers="bytes", output="gradients")
    moved = lf.transfer(adapter, source, target, method="procrustes", alignment=alignment).adapter
    assert effect_cosine(target, moved, truth) > 0.97
    assert not any(p.grad is not None for p in (*source.parameters(), *target.parameters()))


def test_the_bases_are_left_as_they_were():
    source, target = small(), small(1).train()
    before = copy.deepcopy([source.state_dict(), target.state_dict()])
    state = torch.get_rng_state()
    lf.align(source, target, TEXTS[:2], tokenizers="bytes")
    assert torch.equal(state, torch.get_rng_state())
    assert target.training
    assert all(not m._forward_hooks for m in (*source.modules(), *target.modules()))
    for model, old in zip((source, target), before, strict=True):
        assert all(torch.equal(w, old[k]) for k, w in model.state_dict().items())


def test_it_goes_on_from_where_it_was_interrupted(tmp_path, monkeypatch):
    from lorafold.transfer.align import batches, summing

    monkeypatch.setattr(summing, "SECONDS", 0.0)
    monkeypatch.setattr(batches, "AT_ONCE", 100)
    source, target = small(), small(1)
    whole = lf.align(source, target, TEXTS[:8], tokenizers="bytes")
    state = tmp_path / "state"

    def stop(done, total, what):
        if done == 3:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        lf.align(source, target, TEXTS[:8], tokenizers="bytes", resume=state, progress=stop)
    with pytest.raises(lf.errors.FileError, match="unfinished"):
        lf.Alignment.load(state)
    with pytest.raises(lf.errors.FileError, match="another run"):
        lf.align(source, target, TEXTS[:7], tokenizers="bytes", resume=state)
    seen = []
    again = lf.align(
        source,
        target,
        TEXTS[:8],
        tokenizers="bytes",
        resume=state,
        progress=lambda done, total, what: seen.append(done),
    )
    assert seen[0] == 3
    assert again.tokens == whole.tokens
    for name, m in whole.fitted.items():
        assert torch.equal(again.fitted[name].st, m.st)
    assert lf.Alignment.load(state).tokens == whole.tokens


# Tokens and layers


def test_tokens_that_end_together_are_pairs():
    letters = [1, 2, 3, 4, 5, 6]
    words = [0, 3, 3, 6]  # a special token, a sign of two tokens
    s, t = paired(letters, words)
    assert (s.tolist(), t.tolist()) == ([2, 5], [2, 3])
    assert as_bytes("aé") == ([97, 0xC3, 0xA9], [1, 2, 2])


def test_layers_by_depth_and_by_likeness():
    assert depth.proportional(4, 4) == [0, 1, 2, 3]
    assert depth.proportional(4, 2) == [1, 3]
    assert depth.proportional(2, 4) == [0, 0, 1, 1]
    assert depth.proportional(12, 6) == [1, 3, 5, 7, 9, 11]
    alike = torch.tensor([[0.9, 0.1, 0.1], [0.6, 0.1, 0.7], [0.2, 0.3, 0.8]])
    assert depth.monotone(alike) == [0, 2, 2]
    best = max(
        float(alike[0, a] + alike[1, b] + alike[2, c])
        for a in range(3)
        for b in range(a, 3)
        for c in range(b, 3)
    )
    assert sum(float(alike[k, s]) for k, s in enumerate(depth.monotone(alike))) == pytest.approx(
        best
    )


# What is refused


@pytest.mark.parametrize(
    ("texts", "options", "error", "message"),
    [
        ([], {}, "MismatchError", "no texts"),
        ("one", {}, "MismatchError", r"give \[text\]"),
        ([3], {}, "MismatchError", "a text is a string"),
        (["a"], {"tokenizers": None}, "MismatchError", "no tokenizer"),
        (["a"], {"tokenizers": 3}, "MismatchError", "must be a fast one"),
        (["a"], {"tokenizers": ("bytes",)}, "MismatchError", "found 1"),
        (["abc"], {"output": "both"}, "MismatchError", "'activations' or 'gradients'"),
        (["abc"], {"layers": "same"}, "MismatchError", "layers must be"),
        (["abc"], {"layers": {"decoder": [0, 7]}}, "MismatchError", "one of 2 layers"),
        (["abc"], {"modules": ["mlp.side"]}, "MismatchError", "'mlp.side' is none of"),
        (["abc"], {"modules": "mlp"}, "MismatchError", r"\['mlp'\]"),
        (["abc"], {"memory": "1 KiB"}, "MismatchError", "more than memory= allows"),
        (
            ["abc"],
            {"tokenizers": ("bytes", lambda text: ([1], [9]))},
            "MismatchError",
            "share nothing",
        ),
    ],
)
def test_bad_input_is_refused(texts, options, error, message):
    options = {"tokenizers": "bytes", **options}
    with pytest.raises(getattr(lf.errors, error), match=message):
        lf.align(small(), small(1), texts, **options)


def test_activations_that_are_nan_are_named():
    bad = small()
    with torch.no_grad():
        bad.model.layers[1].mlp.up_proj.weight[0, 0] = float("nan")
    with pytest.raises(lf.errors.MismatchError, match="layers.1.mlp.up_proj' in the target"):
        lf.align(small(), bad, TEXTS[:1], tokenizers="bytes")


def test_layers_without_roles_are_listed():
    class Other(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.strange = torch.nn.Linear(4, 4)

    with pytest.raises(lf.errors.MismatchError, match=r"'strange'; give a table in roles="):
        lf.align(small(), Other(), TEXTS[:1], tokenizers="bytes")


def test_an_adapter_of_another_base_is_refused():
    source, target = small(), small(1)
    alignment = lf.align(source, target, TEXTS[:1], tokenizers="bytes")
    wide = lf.Adapter({EVERY[0]: lf.LowRank(torch.randn(2, 40), torch.randn(32, 2))})
    with pytest.raises(lf.errors.MismatchError, match="is 32×40, in the base 32×32"):
        lf.transfer(wide, source, target, method="procrustes", alignment=alignment)
    alone = lf.Adapter({"strange.q_proj": lf.LowRank(torch.randn(2, 32), torch.randn(32, 2))})
    with pytest.raises(lf.errors.MismatchError, match="are not in the source base"):
        lf.transfer(alone, source, target, method="procrustes", alignment=alignment)
    with pytest.raises(lf.errors.MismatchError, match="alignment is of another target"):
        lf.transfer(
            update_of(source, EVERY), source, small(2), method="procrustes", alignment=alignment
        )
    with pytest.raises(lf.errors.MismatchError, match="give texts="):
        lf.transfer(update_of(source, EVERY), source, target, method="procrustes")


def test_few_texts_say_what_they_could_not_see():
    source, target = small(), small(1)
    done = lf.transfer(
        update_of(source, EVERY),
        source,
        target,
        method="procrustes",
        alignment=lf.align(source, target, ["abc"], tokenizers="bytes"),
    )
    assert done.report.said["directions"]
    assert done.report.modules[0].fit is None  # nothing was held out


def test_a_zero_update_stays_one():
    source, target = small(), small(1)
    alignment = lf.align(source, target, TEXTS[:2], tokenizers="bytes")
    zero = lf.Adapter({EVERY[0]: lf.LowRank(torch.zeros(2, 32), torch.zeros(32, 2))})
    for method in ("procrustes", "functional"):
        assert (
            lf.transfer(zero, source, target, method=method, alignment=alignment).adapter.norm()
            == 0
        )


def test_modules_whose_alignment_explains_too_little_are_dropped(known):
    source, target, alignment, adapter, _ = known
    whole = lf.transfer(adapter, source, target, method="procrustes", alignment=alignment)
    least = sorted(row.fit for row in whole.report.modules)[10]
    done = lf.transfer(
        adapter, source, target, method="procrustes", alignment=alignment, threshold=least
    )
    kept = {row.path: row.fit for row in done.report.modules}
    assert len(done.report.dropped) == 10
    assert all(fit >= least for fit in kept.values())
    assert set(kept) | set(done.report.dropped) == set(adapter)
    with pytest.raises(lf.errors.MismatchError, match="threshold must be an R²"):
        lf.transfer(
            adapter, source, target, method="procrustes", alignment=alignment, threshold="high"
        )


@pytest.mark.parametrize(
    ("file", "text"),
    [
        ("config.json", "[]"),
        ("config.json", '{"model_type": "nothing"}'),
        ("config.json", '{"model_type": "llama", "architectures": 3}'),
        ("config.json", '{"model_type": "llama", "architectures": ["pipeline"], "hidden_size": 7}'),
        ("model.safetensors", "{"),
        ("tokenizer.json", "{nope"),
    ],
)
def test_a_damaged_base_is_named(tmp_path, file, text):
    folder = tmp_path / "base"
    shutil.copytree(data_dir() / "base", folder)
    (folder / file).write_text(text)
    with pytest.raises((lf.FileError, lf.errors.MismatchError), match=r"base|no tokenizer"):
        lf.align(data_dir() / "base", folder, ["a text", "and another"])
