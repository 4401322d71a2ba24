"""A swapped layer is still what it was: its class, copies, pickles, hooks and calls."""

import copy
import io
import pickle

import pytest
import torch
from torch import nn

import lorafold as lf
from lorafold.errors import MismatchError, RefusedError
from lorafold.layers.swap import Attached, attached_class

TIGHT = {"rtol": 1e-11, "atol": 1e-11}


class Scaled(nn.Linear):
    """A subclass with a forward of its own and a second argument."""

    def forward(self, x, factor=1.0):
        return super().forward(x) * factor


def test_one_cached_subclass_per_base_class():
    assert attached_class(Attached, nn.Linear) is attached_class(Attached, nn.Linear)
    assert attached_class(Attached, Scaled) is not attached_class(Attached, nn.Linear)
    assert issubclass(attached_class(Attached, Scaled), Scaled)


def test_a_subclass_keeps_its_forward_and_its_arguments(make_update, dense):
    layer, u, x = Scaled(6, 4), make_update(4, 6, 2), torch.randn(3, 6)
    before = layer(x, factor=3.0)
    live = lf.attach(layer, lf.Adapter({"": u}))
    assert isinstance(layer, Scaled)
    assert torch.equal(layer(x, 3.0), before)
    with live.use("default"):
        delta = x @ dense(u).float().T
        torch.testing.assert_close(layer(x, factor=3.0), before + delta)
        torch.testing.assert_close(layer(x=x, factor=3.0), before + delta)
        torch.testing.assert_close(layer(factor=3.0, x=x), before + delta)
    live.detach()
    assert type(layer) is Scaled


@pytest.mark.parametrize("rows", [False, True])
def test_keyword_calls(net, base, three, x, expected, rows):
    live = lf.attach(net, three)
    layer, alone = net.layers[0].q, base.layers[0].q
    u = three["a"]["layers.0.q"]
    h = torch.randn(6, 8, dtype=torch.float64)
    with live.use(["a", None] if rows else "a"):
        found = layer(input=h)
    delta = u.scale * (h @ u.A.T) @ u.B.T
    if rows:
        delta[3:] = 0
    torch.testing.assert_close(found, alone(h) + delta, **TIGHT)
    with live.use("a"):
        torch.testing.assert_close(net(x=x), expected(base, [(three["a"], 1)], x), **TIGHT)


def test_a_forward_that_raises_leaves_nothing_behind(net, base, three, x, fingerprint, expected):
    live = lf.attach(net, three)
    before = fingerprint(net)
    bad = torch.zeros(3, 7, dtype=torch.float64)
    for what in ("a", ["a", None, "b"]):
        with pytest.raises(RuntimeError), live.use(what):
            net.layers[0].q(bad)
    no_multiple = "batch of 6 is no multiple of the 4 rows"
    with pytest.raises(MismatchError, match=no_multiple), live.use(["a", None, "b", "c"]):
        net(x)
    assert live.active == {}
    assert fingerprint(net) == before
    assert torch.equal(net(x), base(x))
    with live.use("a"):
        torch.testing.assert_close(net(x), expected(base, [(three["a"], 1)], x), **TIGHT)


def test_hooks_stay_and_see_the_sum(net, base, three, x):
    seen = []
    net.layers[0].q.register_forward_hook(lambda m, args, y: seen.append(y))
    live = lf.attach(net, three)
    net(x)
    with live.use("a"):
        net(x)
    live.detach()
    net(x)
    assert torch.equal(seen[0], seen[2])
    assert not torch.equal(seen[0], seen[1])


def test_a_copy_has_a_handle_of_its_own(net, base, three, x, expected):
    live = lf.attach(net, {**three, "new": lf.LoRA(rank=2, seed=0, dtype=torch.float64)})
    live.use({"a": 0.5})
    twin = copy.deepcopy(net)
    other = lf.Live.of(twin)
    assert lf.Live.of(net) is live
    assert other is not live
    assert other.model is twin
    assert other.active == {"a": 0.5}
    assert other.names == live.names
    half = expected(base, [(three["a"], 0.5)], x)
    torch.testing.assert_close(twin(x).detach(), half, **TIGHT)
    # What one does the other doesn't see.
    other.use("b")
    torch.testing.assert_close(net(x).detach(), half, **TIGHT)
    torch.testing.assert_close(twin(x).detach(), expected(base, [(three["b"], 1)], x), **TIGHT)
    for p in other.parameters():
        p.data += 1
    assert other.adapter("new").distance(live.adapter("new")) > 1
    shared = {p.data_ptr() for p in net.parameters()} & {p.data_ptr() for p in twin.parameters()}
    assert not shared
    assert other.detach() is twin
    assert not any(isinstance(m, Attached) for m in twin.modules())
    assert all(p.requires_grad for p in twin.parameters())
    torch.testing.assert_close(net(x).detach(), half, **TIGHT)


@pytest.mark.parametrize("how", ["pickle", "torch.save"])
def test_a_pickle_has_a_handle_of_its_own(net, base, three, x, expected, how):
    live = lf.attach(net, three)
    live.use(["a", None, "c"], c=[1, 1, -0.5])
    with live.use("b"):
        if how == "pickle":
            twin = pickle.loads(pickle.dumps(net))
        else:
            file = io.BytesIO()
            torch.save(net, file)
            file.seek(0)
            twin = torch.load(file, weights_only=False)
    other = lf.Live.of(twin)
    assert other.active == {"b": 1.0}
    torch.testing.assert_close(twin(x), expected(base, [(three["b"], 1)], x), **TIGHT)
    with other.use("c"):
        torch.testing.assert_close(twin(x), expected(base, [(three["c"], 1)], x), **TIGHT)
    other.detach()
    assert torch.equal(twin(x), base(x))
    assert type(twin.layers[0].q) is nn.Linear


def test_a_merged_model_is_copied_as_it_is(net, base, three, x, expected):
    live = lf.attach(net, three)
    live.merge("a")
    twin = copy.deepcopy(net)
    torch.testing.assert_close(twin(x), expected(base, [(three["a"], 1)], x), **TIGHT)
    other = lf.Live.of(twin)
    assert other.merged == {"a": 1.0}
    other.unmerge()
    assert torch.equal(twin(x), base(x))
    assert live.merged == {"a": 1.0}
    torch.testing.assert_close(net(x), expected(base, [(three["a"], 1)], x), **TIGHT)


def test_a_handle_can_be_copied_too(net, base, three, x):
    live = lf.attach(net, three)
    other = copy.deepcopy(live)
    other.use("a")
    assert other.model is not net
    assert torch.equal(net(x), base(x))
    assert not torch.equal(other.model(x), base(x))


def test_the_models_training_mode_reaches_new_adapters(net, three):
    net.train()
    live = lf.attach(net, lf.LoRA(rank=2, dropout=0.5))
    assert all(p.training for p in live._state.slots.patches.values())
    net.eval()
    live.add(lf.LoRA(rank=2, dropout=0.5), "more")
    assert not any(m.training for p in live._state.slots.patches.values() for m in p.modules())


def test_moving_the_model_moves_the_adapters(net, base, three, x, expected):
    live = lf.attach(net, {**three, "new": lf.LoRA(rank=2)})
    live.use("a")
    net.to(torch.float32)
    assert {t.dtype for p in live._state.slots.patches.values() for t in p.buffers()} == {
        torch.float32
    }
    wanted = expected(base, [(three["a"], 1)], x).float()
    torch.testing.assert_close(net(x).detach(), wanted, rtol=1e-5, atol=1e-5)
    with live.use(["a", None]):
        torch.testing.assert_close(net(x)[:3].detach(), wanted[:3], rtol=1e-5, atol=1e-5)


def test_a_child_of_the_same_name_is_refused(net, fingerprint):
    net.layers[3].q.lorafold = nn.Identity()
    before = fingerprint(net)
    with pytest.raises(RefusedError, match=r"'layers\.3\.q' has a child named 'lorafold'"):
        lf.attach(net, lf.LoRA(rank=2))
    assert fingerprint(net) == before
