"""Adapters that are trained at all of several ranks at once, and what becomes of them."""

import copy

import pytest
import torch
from torch import nn

import lorafold as lf

RANKS = (1, 2, 4, 8, 16)


def model():
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(24, 32), nn.Tanh(), nn.Linear(32, 20))


def trained(scaling=None, nested=RANKS, **options):
    net = model()
    spec = lf.LoRA(rank=16, nested=nested, seed=0, **options)
    live = lf.attach(net, spec, rank_scaling=scaling)
    torch.manual_seed(1)
    with torch.no_grad():
        for p in live.parameters():
            p.add_(0.1 * torch.randn_like(p))
    return net, live


@pytest.mark.parametrize("scaling", ["constant", "linear", "sqrt"])
def test_a_training_forward_is_the_mean_of_all_prefixes(scaling):
    net, live = trained(scaling)
    layer = nn.Sequential(copy.deepcopy(net[0]))  # one layer: there the mean of outputs is exact
    live.detach()
    net = nn.Sequential(net[0])
    live = lf.attach(net, lf.LoRA(rank=16, nested=RANKS, seed=0), rank_scaling=scaling)
    with torch.no_grad():
        for p in live.parameters():
            p.copy_(torch.randn_like(p))
    x = torch.randn(5, 24)
    net.eval()
    outs = []
    for k in RANKS:
        with live.use("default", rank=k):
            outs.append(net(x))
    net.train()
    torch.testing.assert_close(net(x), torch.stack(outs).mean(0), atol=1e-5, rtol=1e-5)
    with live.use(["default", None, "default", "default", "default"]):
        rows = net(x)
    torch.testing.assert_close(rows[2], torch.stack(outs).mean(0)[2], atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(rows[1], nn.functional.linear(x, net[0].weight, net[0].bias)[1])
    del layer


def test_gradients_are_those_of_the_mean_of_outputs():
    net = nn.Sequential(nn.Linear(12, 10))
    live = lf.attach(net, lf.LoRA(rank=8, nested=(1, 4), alpha=8, seed=3))
    (A, B) = live.parameters()
    with torch.no_grad():
        B.normal_()
    x, g = torch.randn(7, 12), torch.randn(7, 10)
    net.train()
    net(x).backward(g)
    a, b = A.detach().double().requires_grad_(), B.detach().double().requires_grad_()
    out = sum(x.double() @ a[:k].T @ b[:, :k].T for k in (1, 4, 8)) / 3  # the rank itself, too
    out.backward(g.double())
    torch.testing.assert_close(A.grad.double(), a.grad, atol=1e-4, rtol=1e-4)
    torch.testing.assert_close(B.grad.double(), b.grad, atol=1e-4, rtol=1e-4)


def outputs(net, live, x, name="default"):
    net.eval()
    found = []
    for k in RANKS:
        with torch.no_grad(), live.use(name, rank=k):
            found.append(net(x))
    return found


@pytest.mark.parametrize("scaling", [None, "linear", "sqrt"])
def test_ranks_and_strength_are_the_adapters_own(tmp_path, scaling):
    net, live = trained(scaling)
    x = torch.randn(6, 24)
    want = outputs(net, live, x)
    live.save(tmp_path / "a")
    adapter = live.adapter("default")
    live.detach()
    assert lf.load(tmp_path / "a").config["nested"] == list(RANKS)
    library = lf.fold({"a": adapter}, tmp_path / "lib", tolerance=0.2)
    for given in (tmp_path / "a", adapter, {"x": library["a"]}, library):
        here = lf.attach(net, given)
        for got, wanted in zip(outputs(net, here, x, here.names[0]), want, strict=True):
            torch.testing.assert_close(got, wanted, atol=1e-5, rtol=1e-5)
        # The prefix that is merged, too.
        here.merge({here.names[0]: 1.0}, rank=4)
        with torch.no_grad():
            torch.testing.assert_close(net(x), want[2], atol=1e-5, rtol=1e-5)
        here.detach()
    # A resized one is the prefix.
    here = lf.attach(net, lf.load(tmp_path / "a").resize(rank=4))
    with torch.no_grad(), here.use("default", rank=2):
        torch.testing.assert_close(net(x), want[1], atol=1e-5, rtol=1e-5)


def test_each_of_several_has_its_own_and_attach_overrides():
    net, live = trained("linear")
    a = live.adapter("default")
    live.detach()
    plain = lf.Adapter(a.modules)
    x = torch.randn(4, 24)

    def run(live, what):
        with torch.no_grad(), live.use(what, rank=4):
            return net.eval()(x)

    both = lf.attach(net, {"linear": a, "plain": plain})
    linear, constant = run(both, "linear"), run(both, "plain")
    rows = run(both, ["linear", "plain", {"linear": 1.0}, None])
    torch.testing.assert_close(rows[0], linear[0])
    torch.testing.assert_close(rows[1], constant[1])
    torch.testing.assert_close(rows[2], linear[2])
    assert (linear - constant).abs().max() > 1e-3
    both.detach()
    over = lf.attach(net, {"linear": a, "plain": plain}, rank_scaling="constant")
    torch.testing.assert_close(run(over, "linear"), constant)


def test_trained_on_it_keeps_what_it_means(tmp_path):
    net, live = trained("linear")
    live.save(tmp_path / "a")
    live.detach()
    live = lf.attach(net, tmp_path / "a", trainable=True)
    x = torch.randn(3, 24)
    net.train()
    nested = net(x)
    net.eval()
    assert (nested - net(x)).abs().max() > 1e-4
    assert live.adapter("default").config["rank_scaling"] == "linear"


@pytest.mark.parametrize(
    ("options", "says"),
    [
        ({"nested": (1, 32)}, "nested= names rank 32, above the adapter's own, 16"),
        ({"nested": (4, 2)}, "ascending"),
        ({"nested": (0, 2)}, "at least 1"),
        ({"nested": "124"}, "must list ranks"),
        ({"nested": (1, 2), "init": "pissa"}, "choose 'kaiming' or 'orthogonal'"),
    ],
)
def test_bad_ranks(options, says):
    with pytest.raises(lf.errors.MismatchError, match=says):
        lf.LoRA(rank=16, **options)
