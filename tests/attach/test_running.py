"""Models run in many ways: without gradients, in inference mode, in autocast, recomputed."""

import pytest
import torch
from torch import nn
from torch.utils.checkpoint import checkpoint

import lorafold as lf

TIGHT = {"rtol": 1e-11, "atol": 1e-11}


@pytest.mark.parametrize("first", ["attach", "use", "run"])
def test_inference_mode_may_begin_and_end_anywhere(make_net, base, three, x, expected, first):
    net = make_net()
    outputs = {name: expected(base, [(a, 1)], x) for name, a in three.items()}
    with torch.inference_mode(first == "attach"):
        live = lf.attach(net, three, slots=2)
    with torch.inference_mode(first in ("attach", "use")):
        live.use(["a", None])
        live.use("a")
    with torch.inference_mode():
        torch.testing.assert_close(net(x), outputs["a"], **TIGHT)
        live.use(["b", "a"])
        torch.testing.assert_close(net(x)[:3], outputs["b"][:3], **TIGHT)
        live.keep("b")
        live.drop("b")
    for name in ("b", "c", "a"):  # written anew: two slots for three
        live.use(name)
        torch.testing.assert_close(net(x).detach(), outputs[name], **TIGHT)
        live.use([name, None])
        torch.testing.assert_close(net(x).detach()[:3], outputs[name][:3], **TIGHT)
    live.add(lf.LoRA(rank=2), "new")
    live.add(three["b"], "more")
    with torch.inference_mode():
        live.use({"more": 1, "new": 1})
        torch.testing.assert_close(net(x), outputs["b"], **TIGHT)
    live.use({"a": 1, "new": 1})
    net(x).square().sum().backward()
    assert all(p.grad is not None for p in live.parameters())


def test_specifications_attached_in_inference_mode_can_be_trained(net, x):
    with torch.inference_mode():
        live = lf.attach(net, {"lora": lf.LoRA(rank=2, init="pissa"), "mod": lf.PiSSA(rank=2)})
        net(x)
    live.use({"lora": 1, "mod": 1})
    net(x).square().sum().backward()
    assert all(p.grad is not None and p.grad.abs().sum() > 0 for p in live.parameters())
    torch.optim.SGD(live.parameters(), lr=0.1).step()


def test_merging_in_inference_mode(net, base, three, x, expected):
    live = lf.attach(net, three)
    with torch.inference_mode():
        live.merge("a")
        merged = net(x)
    net(x).sum().backward()  # the merged weights are plain parameters
    torch.testing.assert_close(merged.clone(), expected(base, [(three["a"], 1)], x), **TIGHT)
    live.unmerge()
    assert torch.equal(net(x), base(x))


@pytest.mark.parametrize("what", ["a", ["a", None, "b"], {"a": 1, "new": 1}, ["new", "a", "mod"]])
def test_autocast(make_net, three, x, what):
    net = make_net(torch.float32)
    fresh = {"new": lf.LoRA(rank=2), "mod": lf.PiSSA(rank=2, mean=0.5)}
    live = lf.attach(net, {**three, **fresh}, dtype=torch.float32)
    for p in live.parameters():
        p.data += torch.randn_like(p) / 9
    live.keep("b", 0.1)
    with live.use(what):
        wanted = net(x)
        with torch.autocast("cpu", dtype=torch.bfloat16):
            found = net(x)
        assert found.dtype == torch.bfloat16
        assert (found.float() - wanted).norm() / wanted.norm() < 0.05
        if wanted.requires_grad:
            found.float().square().sum().backward()


@pytest.mark.parametrize("reentrant", [False, True])
def test_recomputed_activations_give_the_same_gradients(make_net, x, reentrant):
    grads = []
    for recompute in (False, True):
        net = make_net()
        live = lf.attach(net, lf.LoRA(rank=2, seed=0))
        live.use("default", c=0.5, rank=1)
        h = net.embed(x).detach().requires_grad_()
        for layer in net.layers:
            h = checkpoint(layer, h, use_reentrant=reentrant) if recompute else layer(h)
        net.lm_head(h).square().sum().backward()
        grads.append([p.grad for p in live.parameters()])
    for mine, theirs in zip(*grads, strict=True):
        assert (mine is None) == (theirs is None)
        if mine is not None:
            torch.testing.assert_close(mine, theirs, **TIGHT)


def test_many_batch_sizes_are_not_remembered_for_ever(net, three, x):
    live = lf.attach(net, three)
    for rows in range(1, 200):
        live.use(["a", "b"] * rows)
    assert len(live._state.running._active) < 100
    live.use(["a", "b"])
    net(x)


def test_vmap_and_jacobians(make_update, dense):
    layer = nn.Linear(6, 4).double()
    u = make_update(4, 6, 2, dtype=torch.float64)
    live = lf.attach(layer, lf.Adapter({"": u}))
    x = torch.randn(5, 6, dtype=torch.float64)
    with live.use("default", c=0.5):
        J = torch.func.jacrev(layer)(x[0])
        torch.testing.assert_close(J, layer.weight.detach() + 0.5 * dense(u), **TIGHT)
        torch.testing.assert_close(torch.func.vmap(layer)(x), layer(x), **TIGHT)


def test_one_layer_called_several_times_in_a_forward(make_update, dense):
    class Twice(nn.Module):
        def __init__(self):
            super().__init__()
            self.layer = nn.Linear(4, 4, bias=False).double()

        def forward(self, x):
            return self.layer(torch.tanh(self.layer(x)))

    model, u = Twice(), make_update(4, 4, 2, dtype=torch.float64)
    live = lf.attach(model, lf.Adapter({"layer": u}))
    W = model.layer.weight + dense(u)
    x = torch.randn(3, 4, dtype=torch.float64)
    with live.use("default"):
        torch.testing.assert_close(model(x), torch.tanh(x @ W.T) @ W.T, **TIGHT)


def test_empty_batches(net, three):
    live = lf.attach(net, three)
    x = torch.zeros(0, 5, dtype=torch.int64)
    for what in ("a", ["a", None], {"a": 1, "b": 1}):
        with live.use(what):
            assert net(x).shape == (0, 5, 13)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_autocast_without_gradients(make_net, three, x, dtype):
    net = make_net(torch.float32)
    live = lf.attach(net, three, dtype=torch.float32)
    live.use({"a": 1.0, "b": 0.5})
    with torch.no_grad():
        y = net(x)
        with torch.autocast("cpu", dtype):
            found = net(x)
    torch.testing.assert_close(found.float(), y, rtol=0.05, atol=0.05 * float(y.abs().max()))


def test_two_forwards_of_rows_before_one_backward(make_update):
    layer = torch.nn.Conv2d(3, 4, 3)
    adapters = {n: lf.Adapter({"0": make_update(4, 27, 2, seed=i)}) for i, n in enumerate("ab")}
    net = torch.nn.Sequential(layer)
    live = lf.attach(net, adapters)
    x = torch.randn(2, 3, 5, 5, requires_grad=True)

    def gradient(*choices):
        total = 0
        for choice in choices:
            live.use(choice)
            total = total + net(x).square().sum()
        return torch.autograd.grad(total, x)[0]

    both = gradient(["a", "b"], ["b", "a"])
    torch.testing.assert_close(both, gradient(["a", "b"]) + gradient(["b", "a"]))
