"""Calibration: a few sums per direction while the batches stream by."""

import copy

import pytest
import torch
from torch import nn

import lorafold as lf
from lorafold.attach.begin.calibration import Calibration
from lorafold.errors import MismatchError, RefusedError

CLOSE = {"rtol": 1e-4, "atol": 1e-6}


def captured(model, batches):
    """{path: all inputs of the linear layers}."""
    model, seen = copy.deepcopy(model), {}
    for path, m in model.named_modules():
        if isinstance(m, nn.Linear):
            seen[path] = []
            m.register_forward_pre_hook(lambda m, args, path=path: seen[path].append(args[0]))
    with torch.no_grad():
        for batch in batches:
            model(batch)
    return {p: torch.cat([X.reshape(-1, X.shape[-1]) for X in Xs]) for p, Xs in seen.items()}


@pytest.fixture
def batches():
    g = torch.Generator().manual_seed(0)
    return [torch.randint(0, 13, (n, 5), generator=g) for n in (4, 1, 7)]


def test_statistics_by_the_definition(net, batches):
    rejected = [batch.flip(0)[:2] for batch in batches]
    found = lf.calibrate(net, batches, rejected)
    assert isinstance(found, Calibration)
    assert found.contrasted
    assert set(found) == {p for p, m in net.named_modules() if isinstance(m, nn.Linear)} - {
        "lm_head"
    }
    first, second = captured(net, batches), captured(net, rejected)
    for path, stats in found.items():
        W = net.get_submodule(path).weight.detach()
        Vh = torch.linalg.svd(W, full_matrices=False)[2]
        z, other = first[path] @ Vh.T, second[path] @ Vh.T
        both = torch.cat([z, other]).abs().mean(0)
        torch.testing.assert_close(stats.mean_abs.double(), both, **CLOSE)
        torch.testing.assert_close(stats.std.double(), z.std(0), **CLOSE)
        torch.testing.assert_close(stats.other_std.double(), other.std(0), **CLOSE)


def test_both_sets_at_once(net, batches):
    expected = lf.calibrate(net, batches[:2], batches[2:])
    assert lf.calibrate(net, {"cho": batches[:2], "rej": batches[2:]}) == expected
    with pytest.raises(MismatchError, match="given twice"):
        lf.calibrate(net, {"cho": batches, "rej": batches}, batches)


def test_the_order_and_size_of_batches_is_nothing(net, batches):
    whole = lf.calibrate(net, [torch.cat(batches)])
    parts = lf.calibrate(net, iter(reversed(batches)))
    for path in whole:
        torch.testing.assert_close(whole[path].std, parts[path].std, **CLOSE)
        torch.testing.assert_close(whole[path].mean_abs, parts[path].mean_abs, **CLOSE)


def test_a_large_mean_costs_no_digits():
    layer = nn.Linear(4, 4, bias=False)
    layer.weight.data = torch.eye(4)
    x = 1000 + torch.randn(500, 4)
    (stats,) = lf.calibrate(layer, [x[:100], x[100:]]).values()
    Vh = torch.linalg.svd(torch.eye(4))[2]
    wanted = (x.double() @ Vh.double().T).std(0)
    torch.testing.assert_close(stats.std.double(), wanted, rtol=1e-3, atol=1e-3)


def test_batches_of_every_form(net, batches):
    class Called(nn.Module):
        def __init__(self):
            super().__init__()
            self.net = net

        def forward(self, x, other=None):
            return self.net(x)

    wanted = lf.calibrate(Called(), batches)
    for form in (
        [(b,) for b in batches],
        [[b, None] for b in batches],
        [{"x": b} for b in batches],
    ):
        found = lf.calibrate(Called(), form)
        for path in wanted:
            assert torch.equal(found[path].std, wanted[path].std)


def test_it_gives_the_same_choice_as_the_inputs_themselves(make_net, batches):
    net = make_net(torch.float32)
    X = captured(net, batches)
    Y = captured(net, [b.flip(1) for b in batches[:1]])
    rejected = [b.flip(1) for b in batches[:1]]
    for select in ("wanda", "act_only", "min_std"):
        two = select == "min_std"
        given = {p: (X[p], Y[p]) for p in X} if two else X
        stats = lf.calibrate(net, batches, rejected if two else None)
        chosen = []
        for calibration in (given, stats):
            model = make_net(torch.float32)
            spec = lf.PiSSA(rank=3, select=select, calibration=calibration)
            live = lf.attach(model, spec)
            chosen.append(
                {p: m.index.tolist() for p, m in live._state.trained("default").fresh.items()}
            )
        assert chosen[0] == chosen[1]


def test_the_model_is_as_before(net, batches, fingerprint):
    net.train()
    net.layers[1].eval()
    before = fingerprint(net)
    lf.calibrate(net, batches)
    assert fingerprint(net) == before
    with pytest.raises(IndexError):
        lf.calibrate(net, [torch.full((1, 2), 99)])
    assert fingerprint(net) == before


def test_it_measures_the_model_as_it_is_used():
    torch.manual_seed(0)
    model = nn.Sequential(nn.Dropout(0.5), nn.Linear(4, 4)).train()
    x = torch.randn(50, 4)
    noisy = lf.calibrate(model, [x])
    quiet = lf.calibrate(model.eval(), [x])
    assert torch.equal(noisy["1"].std, quiet["1"].std)


def test_targets_exclude_and_layers(net, batches):
    assert set(lf.calibrate(net, batches, targets="q", layers=(0.5, 1))) == {
        "layers.2.q",
        "layers.3.q",
    }
    assert "lm_head" in lf.calibrate(net, batches, exclude=())


def test_what_can_t_be_measured(net, batches):
    with pytest.raises(MismatchError, match="no batch reached module 'layers.0.q'"):
        lf.calibrate(net, [])
    with pytest.raises(MismatchError, match="no batch reached module 'layers.0.q'"):
        lf.calibrate(net, batches, [])
    with pytest.raises(MismatchError, match="'embed' is no linear layer"):
        lf.calibrate(net, batches, targets=["embed"])
    with pytest.raises(MismatchError, match="targets 'k' match no module"):
        lf.calibrate(net, batches, targets="k")
    unused = nn.ModuleDict({"a": nn.Linear(2, 2), "b": nn.Linear(2, 2)})
    unused.forward = unused["a"].__call__
    with pytest.raises(MismatchError, match="no batch reached module 'b'"):
        lf.calibrate(unused, [torch.randn(3, 2)])


def test_a_calibration_of_another_model(make_net, net, batches, fingerprint):
    wide = nn.ModuleDict({"layers": nn.ModuleList([nn.ModuleDict({"q": nn.Linear(8, 4)})])})
    wide.forward = wide["layers"][0]["q"].__call__
    stats = lf.calibrate(wide, [torch.randn(9, 8)])
    before = fingerprint(net)
    with pytest.raises(MismatchError, match=r"'layers.0.q' has 4 directions, the weight 8"):
        lf.attach(net, lf.PiSSA(rank=2, select="wanda", calibration=stats, targets="layers.0.q"))
    with pytest.raises(MismatchError, match=r"nothing for module 'layers.1.q'"):
        lf.attach(net, lf.PiSSA(rank=2, select="wanda", calibration=stats, targets="layers.1.q"))
    assert fingerprint(net) == before


def test_refused_layers_are_named(batches):
    model = nn.ModuleDict({"attn": nn.MultiheadAttention(4, 2)})
    with pytest.raises((MismatchError, RefusedError)):
        lf.calibrate(model, batches, targets="attn")
