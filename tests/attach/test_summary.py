"""Numbers of a summary, counted by hand."""

import pytest
import torch
from torch import nn

import lorafold as lf


def test_64_by_32_at_rank_8_is_768_of_2816():
    layer = nn.Linear(32, 64, bias=False)
    live = lf.attach(layer, lf.LoRA(rank=8))
    summary = live.summary()
    (one,) = summary.layers
    assert (one.original, one.adapter, one.original + one.adapter) == (2048, 768, 2816)
    assert one.ratio == summary.ratio == 768 / 2816
    assert (summary.total, summary.trainable, summary.frozen) == (2048, 768, 2048)
    assert (one.ranks, one.alphas, one.quantized) == ({"default": 8}, {"default": 32.0}, False)


def test_totals(net, three):
    spec = lf.LoRA(rank=2, alpha=4, targets=["q", "lm_head"], exclude=())
    live = lf.attach(net, {**three, "new": spec})
    summary = live.summary()
    blocks = 4 * (64 + 128 + 128)
    model = 13 * 8 + blocks + 4 * (8 + 16) + 8 * 13 + 13
    assert summary.total == model
    layers = {layer.path: layer for layer in summary.layers}
    assert len(layers) == 13
    assert summary.original == blocks + 8 * 13
    new = 4 * 2 * 16 + 2 * (8 + 13)
    assert summary.trainable == new
    given = sum(a.num_parameters for a in three.values())
    assert summary.adapter == new + given
    assert summary.frozen == model + given
    q = layers["layers.0.q"]
    assert q.ranks == {"a": 4, "b": 2, "c": 1, "new": 2}
    assert q.alphas == pytest.approx({"a": 2.8, "b": 1.4, "c": 0.7, "new": 4})
    assert layers["lm_head"].ranks == {"new": 2}
    assert q.adapter == (4 + 2 + 1 + 2) * 16
    assert summary.quantized == 0


def test_it_prints_as_a_table(net, three):
    text = str(lf.attach(net, three).summary())
    lines = text.splitlines()
    assert lines[0].split() == ["layer", "weight", "adapters", "share", "r", "α"]
    assert lines[1].split() == ["layers.0.q", "64", "112", "63.64%", "4/2/1", "2.8/1.4/0.7"]
    assert lines[-2].startswith("total")
    assert lines[-1].startswith("model 1,597, trainable 1,597, frozen 1,792")


def test_a_modulation_trains_r_numbers():
    live = lf.attach(nn.Linear(32, 64, bias=False), lf.PiSSA(rank=8))
    summary = live.summary()
    assert summary.trainable == 8
    assert summary.layers[0].ranks == {"default": 8}
    # U, S, Vh and Δs are all held.
    assert summary.adapter == 8 * (32 + 64)


def test_pissas_start_beside_counts(net):
    live = lf.attach(nn.Linear(32, 64), lf.LoRA(rank=8, init="pissa"))
    assert live.summary().trainable == 768
    assert live.summary().layers[0].ranks == {"default": 8}


def test_a_merged_model_has_the_same_numbers(net, three):
    live = lf.attach(net, three)
    before = live.summary()
    live.merge("a")
    assert live.summary() == before


def test_convolutions_and_embeddings():
    model = nn.ModuleDict({"conv": nn.Conv2d(3, 8, 3), "embed": nn.Embedding(10, 4)})
    live = lf.attach(model, lf.LoRA(rank=2, targets=["conv", "embed"]))
    layers = {layer.path: layer for layer in live.summary().layers}
    assert (layers["conv"].original, layers["conv"].adapter) == (216, 2 * (27 + 8))
    assert (layers["embed"].original, layers["embed"].adapter) == (40, 2 * 14)
    assert torch.is_tensor(model["conv"].weight)


def test_how_far_from_the_top_the_directions_are():
    net = torch.nn.Sequential(torch.nn.Linear(8, 6, bias=False))
    with torch.no_grad():
        net[0].weight.copy_(torch.diag(torch.arange(8.0, 0, -1))[:6])
    inputs = torch.eye(8)[[4, 4, 5, 5]] + 1e-3 * torch.eye(8)[[0, 1, 2, 3]]  # excite the last two
    specs = {
        "top": lf.PiSSA(rank=2),
        "last": lf.PiSSA(rank=2, select="act_only", calibration={"0": inputs}),
        "all": lf.PiSSA(rank=6),
        "lora": lf.LoRA(rank=2),
    }
    (layer,) = lf.attach(net, specs).summary().layers
    assert layer.tail_depths == {"top": 0.0, "last": 1.0, "all": 0.0}
