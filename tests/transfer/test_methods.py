"""Methods that run both bases, or look at their weights: what each finds, and says of itself."""

import copy

import pytest
import torch
from transformers import LlamaConfig, LlamaForCausalLM

import lorafold as lf
from lorafold.demo.model import data_dir

TEXT = (data_dir() / "heldout" / "sql_inserts.txt").read_text()
TEXTS = [TEXT[k : k + 60] for k in range(0, 900, 60)]


def small(seed=0, **config):
    torch.manual_seed(seed)
    kind = {"hidden_size": 32, "intermediate_size": 48, "num_attention_heads": 4, "vocab_size": 256}
    kind |= {"num_hidden_layers": 2, "num_key_value_heads": 4, "max_position_embeddings": 64}
    return LlamaForCausalLM(LlamaConfig(**{**kind, **config})).eval()


def adapter_of(model, kinds=("q_proj", "o_proj", "up_proj", "down_proj"), size=0.3, rank=2):
    g = torch.Generator().manual_seed(1)
    made = {}
    for path, module in model.named_modules():
        if path.rpartition(".")[2] in kinds:
            out, inner = module.weight.shape
            A, B = torch.randn(rank, inner, generator=g), torch.randn(out, rank, generator=g)
            made[path] = lf.LowRank(A, B, size / inner**0.5)
    return lf.Adapter(made)


def carried(t, before, after):
    """Chances t (n, d) after the way from `before` to `after` on which the most stays, by the
    matrices of all ways from one outcome to another.
    """
    stays = torch.minimum(after / before, torch.ones_like(before))
    more = (after - before).clamp_min(0)
    ways = torch.diag_embed(stays) + (1 - stays)[:, :, None] * (more / more.sum(1, True))[:, None]
    assert torch.allclose((before[:, None] @ ways)[:, 0], after)
    return (t[:, None] @ ways)[:, 0]


def divergence(source, adapter, target, moved, texts):
    """KL(the target's own, changed as the adapter changes the source's ‖ target with the other), a
    token; straight from the logits."""

    def said(model, modules, ids):
        other = copy.deepcopy(model)
        with torch.no_grad():
            for path, u in modules.items():
                other.get_submodule(path).weight += u.dense()
            return other(ids).logits[0].double().softmax(-1)

    total = count = 0
    for text in texts:
        ids = torch.tensor([list(text.encode())])
        before, after = said(source, {}, ids), said(source, adapter, ids)
        p, q = carried(said(target, {}, ids), before, after), said(target, moved, ids)
        total, count = total + float((p * (p / q).log()).sum()), count + ids.numel()
    return total / count


def test_vocabulary_finds_other_coordinates_without_texts(ground_truth):
    """Where they are the same everywhere, which embeddings alone can tell."""
    source, target, adapter, truth = ground_truth()
    moved = lf.transfer(adapter, source, target, method="vocabulary", tokenizers="bytes")
    assert moved.adapter.cosine(truth) > 0.9
    assert moved.report.said["tokens"] == 256


def test_vocabulary_needs_tokens_in_common():
    source, target = small(), small(1)
    with pytest.raises(lf.errors.MismatchError, match="0 tokens in common"):
        lf.transfer(adapter_of(source), source, target, method="vocabulary")


def test_distill_takes_away_what_it_says():
    source, target = small(), small(1, hidden_size=48, num_attention_heads=6, num_key_value_heads=2)
    adapter = adapter_of(source, size=2.0)
    done = lf.transfer(
        adapter, source, target, method="distill", texts=TEXTS, tokenizers="bytes", steps=30
    )
    before, after = done.report.said["divergence"]
    assert after < 0.95 * before
    held = TEXTS[4::5]
    assert done.report.said["held"] == len(held)
    assert divergence(source, adapter, target, {}, held) == pytest.approx(before, rel=1e-3)
    found = divergence(source, adapter, target, done.adapter, held)
    assert found == pytest.approx(after, rel=1e-3)
    assert {u.rank for u in done.adapter.values()} == {2}
    assert not any(p.grad is not None for p in (*source.parameters(), *target.parameters()))


def test_distill_is_the_same_every_time_and_touches_nothing():
    source, target = small(), small(1)
    before = copy.deepcopy(target.state_dict())
    state = torch.get_rng_state()
    one, two = (
        lf.transfer(
            adapter_of(source), source, target, method="distill", texts=TEXTS[:5],
            tokenizers="bytes", steps=3,
        ).adapter
        for _ in range(2)
    )  # fmt: skip
    assert one.digest == two.digest
    assert torch.equal(state, torch.get_rng_state())
    assert all(torch.equal(w, before[k]) for k, w in target.state_dict().items())
    assert all(not m._forward_hooks for m in (*source.modules(), *target.modules()))


def test_an_adapter_that_does_nothing_asks_for_nothing():
    """However far apart what the two bases predict is."""
    source, target = small(), small(1)
    nothing = 0.0 * adapter_of(source)
    given = {"texts": TEXTS[:5], "tokenizers": "bytes"}
    with pytest.raises(lf.errors.MismatchError, match="does it do anything on them"):
        lf.transfer(nothing, source, target, method="distill", **given)
    for method in ("procrustes", "functional"):
        moved = lf.transfer(nothing, source, target, method=method, **given)
        assert moved.adapter.norm() == 0


def test_a_fit_that_leads_nowhere_says_what_to_change():
    source, target = small(), small(1)
    with pytest.raises(lf.errors.MismatchError, match=r"give a lower rate= than 1"):
        lf.transfer(
            adapter_of(source, size=0.5), source, target, method="distill", texts=TEXTS[:5],
            tokenizers="bytes", rate=1, steps=4,
        )  # fmt: skip


@pytest.mark.parametrize("method", ["procrustes", "functional", "distill", "auto"])
def test_an_adapter_of_other_shapes_is_refused(method):
    source, target = small(), small(1)
    wide = adapter_of(small(hidden_size=48), ("q_proj",))
    with pytest.raises(lf.errors.MismatchError, match=r"q_proj' is \d+×48, in the base \d+×32"):
        lf.transfer(wide, source, target, method=method, texts=TEXTS[:5], tokenizers="bytes")


@pytest.mark.parametrize("side", ["source", "target"])
def test_predictions_that_are_nan_name_their_base(side):
    bases = {"source": small(), "target": small(1)}
    with torch.no_grad():
        bases[side].model.layers[1].mlp.up_proj.weight[0, 0] = float("nan")
    with pytest.raises(lf.errors.MismatchError, match=f"the {side} predicts on these texts is NaN"):
        lf.transfer(
            adapter_of(bases["source"]), *bases.values(), method="distill", texts=TEXTS[:5],
            tokenizers="bytes",
        )  # fmt: skip


def test_what_else_an_adapter_holds_stays_with_its_base():
    """A head is in the coordinates of what it was trained on, whatever its shape."""
    source, target = small(), small(1)
    extras = {"base_model.model.lm_head.weight": source.lm_head.weight.detach().clone()}
    adapter = lf.Adapter(dict(adapter_of(source)), extras)
    with pytest.warns(UserWarning, match="belong to the source and are left behind"):
        moved = lf.transfer(
            adapter, source, target, method="procrustes", texts=TEXTS[:5], tokenizers="bytes"
        )
    assert not moved.adapter.extras
    assert moved.report.left_behind == tuple(extras)
    kept = lf.transfer(adapter, source, target, method="copy", unchecked=True)
    assert kept.adapter.extras.keys() == extras.keys()


def pairs(text):
    """Tokens of two letters each, and where they end."""
    ids = [ord(text[k]) + ord(text[k + 1]) for k in range(0, len(text) - 1, 2)]
    return ids, list(range(2, 2 * len(ids) + 1, 2))


def test_distill_between_tokenizers_of_other_pieces():
    """Letters against pairs of letters: the chances of the same stretches of text are compared."""
    source, target = small(), small(1, vocab_size=512, hidden_size=48, num_attention_heads=4)
    adapter = adapter_of(source, size=2.0)
    done = lf.transfer(
        adapter, source, target, method="distill", texts=TEXTS[:4], steps=10,
        tokenizers=("bytes", pairs),
    )  # fmt: skip
    assert done.report.said["by"] == "spans"
    values = done.report.said["divergence"]
    assert values[-1] < values[0]

    def chances(model, modules, ids, size):
        other = copy.deepcopy(model)
        with torch.no_grad():
            for path, u in modules.items():
                other.get_submodule(path).weight += u.dense()
            scores = other(torch.tensor([ids])).logits[0].double().log_softmax(-1)
        each = [float(scores[k - 1, ids[k]]) for k in range(1, len(ids))]
        return torch.tensor(each[size - 1 :]).double().view(-1, size).sum(1).exp()

    total = count = 0.0
    for text in TEXTS[:4]:
        letters = list(text.encode())
        before, after = chances(source, {}, letters, 2), chances(source, adapter, letters, 2)
        q = chances(target, {}, pairs(text)[0], 1)
        p = carried(*(torch.stack([x, 1 - x], 1) for x in (q, before, after)))[:, 0]
        total += float((p * (p / q).log() + (1 - p) * ((1 - p) / (1 - q)).log()).sum())
        count += len(pairs(text)[0])
    assert total / count == pytest.approx(values[0], rel=1e-3)


def test_distill_of_models_without_a_head():
    from transformers import LlamaConfig, LlamaModel

    made = []
    for seed, width in ((0, 32), (1, 48)):
        torch.manual_seed(seed)
        kind = {"num_hidden_layers": 2, "num_attention_heads": 4, "intermediate_size": 64}
        made.append(LlamaModel(LlamaConfig(hidden_size=width, vocab_size=256, **kind)).eval())
    done = lf.transfer(
        adapter_of(made[0], ("q_proj", "v_proj")), *made, method="distill", texts=TEXTS[:4],
        tokenizers="bytes", steps=10,
    )  # fmt: skip
    assert done.report.said["by"] == "states"
    values = done.report.said["divergence"]
    assert values[-1] < values[0]


def test_auto_keeps_the_best_and_says_by_how_much(ground_truth):
    source, target, adapter, truth = ground_truth()
    texts = [TEXT[k : k + 200] for k in range(0, 2000, 200)]
    done = lf.transfer(adapter, source, target, method="auto", texts=texts, tokenizers="bytes")
    said = done.report.said
    assert said["scores"][said["chosen"]] == max(said["scores"].values()) > 0.9
    assert said["advice"] == "use"
    assert done.adapter.cosine(truth) > 0.9


def test_auto_says_dont_where_nothing_works():
    """Two bases of random numbers have nothing to tell each other in so few texts."""
    source, target = small(), small(1)
    with pytest.warns(UserWarning, match="don't use this adapter"):
        done = lf.transfer(
            adapter_of(source, size=0.5), source, target, method="auto",
            texts=["abcd", "efgh", "ijkl", "mnop", "1234"], tokenizers="bytes",
        )  # fmt: skip
    assert done.report.said["advice"] == "don't"


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"method": "distill"}, "give texts="),
        ({"method": "auto"}, "give texts="),
        ({"method": "auto", "texts": TEXTS[:4]}, "give 5 texts or more"),
        ({"method": "distill", "texts": TEXTS, "steps": 0}, "steps"),
        ({"method": "distill", "texts": TEXTS, "rate": 0}, "rate"),
        ({"method": "distill", "texts": TEXTS, "rate": float("nan")}, "rate"),
    ],
)
def test_bad_input_is_refused(options, message):
    source = small()
    with pytest.raises(lf.errors.MismatchError, match=message):
        lf.transfer(adapter_of(source), source, small(1), tokenizers="bytes", **options)


def test_auto_of_an_alignment_alone_gives_no_advice_to_use_it(ground_truth):
    source, target, adapter, truth = ground_truth()
    texts = [TEXT[k : k + 200] for k in range(0, 2000, 200)]
    alignment = lf.align(source, target, texts, tokenizers="bytes")
    done = lf.transfer(adapter, method="auto", alignment=alignment)
    said = done.report.said
    assert said["scores"][said["chosen"]] > 0.99
    assert said["advice"].startswith("measure")
    assert done.adapter.cosine(truth) > 0.9
    few = lf.align(source, target, texts[:2], tokenizers="bytes", modules=["query"])
    with pytest.raises(lf.errors.MismatchError, match="holds none back"):
        lf.transfer(adapter, method="auto", alignment=few)


def test_bases_that_are_quantised():
    """They are run and read as they are; where a shape is asked for, they have none to tell."""
    pytest.importorskip("bitsandbytes")
    source, target = small(), small(1)
    packed = small(1)
    lf.quantize_base(packed, 8)
    adapter = adapter_of(source)
    for method, options in {"vocabulary": {}, "procrustes": {"texts": TEXTS[:4]}}.items():
        plain, there = (
            lf.transfer(adapter, source, t, method=method, tokenizers="bytes", **options).adapter
            for t in (target, packed)
        )
        assert {p: u.shape for p, u in there.items()} == {p: u.shape for p, u in plain.items()}
        assert plain.cosine(there) > 0.9
    with pytest.raises(lf.errors.MismatchError, match="keeps it quantised"):
        lf.transfer(adapter, target=packed, method="svd")
