"""Encoders without a head: what is judged is which other texts a text is most like."""

import pytest
import torch
from transformers import BertConfig, BertModel

import lorafold as lf
from lorafold.transfer.align.bases import base_of
from lorafold.transfer.align.batches import batches_of
from lorafold.transfer.methods.judge import judge_of
from lorafold.transfer.methods.judge_vectors import anchors, likeness, pooled

WORDS = ("open", "close", "read", "write", "seek", "flush", "copy", "move", "join", "split")
TEXTS = [f"{a} the {b} {'again ' * (k % 3)}" for k, a in enumerate(WORDS) for b in WORDS[:3]]


def encoder(width=32, layers=2, seed=0):
    torch.manual_seed(seed)
    config = BertConfig(
        vocab_size=256,
        hidden_size=width,
        num_hidden_layers=layers,
        num_attention_heads=4,
        intermediate_size=2 * width,
        max_position_embeddings=64,
    )
    return BertModel(config).eval()


def adapter(model, seed=0, size=1.0):
    g = torch.Generator().manual_seed(seed)
    modules = {}
    for path, role in lf.roles(model).items():
        if role.kind in ("attention.value", "mlp.up"):
            out, inner = model.get_submodule(path).weight.shape
            A, B = torch.randn(2, inner, generator=g), torch.randn(out, 2, generator=g)
            u = lf.LowRank(A, B)
            modules[path] = u * (size / u.norm())
    return lf.Adapter(modules)


@pytest.fixture(scope="module")
def sides():
    """Two encoders that share nothing, as bases, and their batches."""
    source = base_of(encoder(), "source", "bytes", (), None)
    target = base_of(encoder(48, 4, seed=1), "target", "bytes", (), None)
    return source, target, batches_of(source, target, TEXTS, None)


def test_a_text_is_the_mean_of_its_own_tokens(sides):
    source, _, batches = sides
    given = batches[0].source
    found = pooled(source, given)
    for row, ids, mask in zip(found, given.ids, given.mask, strict=True):
        alone = source.model(ids[None, : int(mask.sum())]).last_hidden_state[0].double().mean(0)
        assert torch.allclose(row.double(), alone / alone.norm(), atol=1e-5)


def test_likenesses_are_chances_among_the_others(sides):
    source, _, batches = sides
    others = anchors(source, [batch.source for batch in batches])
    assert len(others) == len(TEXTS)
    found = likeness(source, batches[0].source, others)
    own = pooled(source, batches[0].source).double() @ others.double().T / 0.05
    assert torch.allclose(found.double(), own - own.logsumexp(1, keepdim=True), atol=1e-4)
    assert torch.equal(found.argmax(1), torch.arange(len(found)))  # nothing is more like it


def test_encoders_without_a_head_are_judged_by_vectors(sides):
    source, target, batches = sides
    a = adapter(source.model, size=8.0)
    judge = judge_of(source, target, a.modules, batches)
    assert judge.by == "vectors"
    assert judge.value({}, batches) > 1e-4
    nothing = {path: 0.0 * u for path, u in a.items()}
    assert judge_of(source, target, nothing, batches).value({}, batches) < 1e-6


def test_what_an_adapter_changes_arrives_on_another_encoder():
    source, target = encoder(), encoder(48, 4, seed=1)
    moved = lf.transfer(
        adapter(source, size=2.0),
        source,
        target,
        method="distill",
        texts=TEXTS,
        tokenizers="bytes",
    )
    said = moved.report.said
    assert said["by"] == "vectors"
    before, after = said["divergence"]
    assert after < 0.5 * before
    assert {u.shape[0] for u in moved.adapter.values()} == {48, 96}
