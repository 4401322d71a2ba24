"""A mix for every token, by whatever weighs them: against the definition, and in one graph."""

import copy
from types import SimpleNamespace

import pytest
import torch
from torch import nn
from torch._dynamo.testing import CompileCounter

import lorafold as lf
from lorafold.attach import TokenMix

CLOSE = {"rtol": 1e-10, "atol": 1e-10}


class BySign(TokenMix):
    """The first adapter gets a token whose first number is positive, the second any other."""

    def __init__(self, *names, sizes=(1.0, 0.5)):
        self.names, self.sizes = names, sizes
        self.asked = 0

    def numbers(self, modules, width, inner):
        self.asked += 1
        self.modules = modules
        sizes = torch.zeros(width)
        sizes[: len(modules)] = torch.tensor(self.sizes[: len(modules)])
        return (sizes,)

    @staticmethod
    def weights(x, sizes):
        first = (x[:, :1] > 0).to(sizes.dtype)
        one_hot = torch.cat([first, 1 - first], 1)
        return torch.nn.functional.pad(one_hot, (0, len(sizes) - 2)) * sizes


class Reference(nn.Module):
    """A linear layer with dense updates, one a token."""

    def __init__(self, layer, updates, sizes, c):
        super().__init__()
        self.layer, self.updates, self.sizes, self.c = layer, updates, sizes, c

    def forward(self, x):
        y = self.layer(x)
        positive = (x[..., :1] > 0).double()
        for share, size, u in zip((positive, 1 - positive), self.sizes, self.updates, strict=True):
            if u is not None:
                y = y + self.c * size * share * (x @ (u.scale * u.B @ u.A).T)
        return y


def referred(net, adapters, sizes=(1.0, 0.5), c=1.0):
    net = copy.deepcopy(net)
    for path, layer in list(net.named_modules()):
        if isinstance(layer, nn.Linear) and path != "lm_head":
            updates = [a.modules.get(path) for a in adapters]
            parent, _, leaf = path.rpartition(".")
            setattr(net.get_submodule(parent), leaf, Reference(layer, updates, sizes, c))
    return net


@pytest.mark.parametrize("c", [1.0, -0.5])
@pytest.mark.parametrize("names", [("a", "b"), ("b", "c")])
def test_every_token_gets_its_own_mix(net, base, three, x, names, c):
    live = lf.attach(net, three)
    wanted = referred(base, [three[n] for n in names], c=c)(x)
    with live.use(BySign(*names), c=c):
        torch.testing.assert_close(net(x), wanted, **CLOSE)
        assert live.active == dict.fromkeys(names, c)
        packed = net(x.reshape(1, -1))  # tokens are weighed alike wherever they stand
        torch.testing.assert_close(packed, wanted.reshape(1, -1, 13), **CLOSE)
    assert torch.equal(net(x), base(x))
    live.detach()
    assert torch.equal(net(x), base(x))


def test_c_of_zero_is_the_base_to_the_bit(net, base, three, x):
    live = lf.attach(net, three)
    for options in ({"c": 0}, {"rank": 0}):
        with live.use(BySign("a", "b"), **options):
            assert torch.equal(net(x), base(x))


def test_rank_prefixes(net, base, three, x):
    live = lf.attach(net, three)
    cut = [
        lf.Adapter({p: u if u.rank == 1 else u.prefix(1) for p, u in three[n].modules.items()})
        for n in "ac"
    ]
    with live.use(BySign("a", "c"), rank=1):
        torch.testing.assert_close(net(x), referred(base, cut)(x), **CLOSE)


def test_what_is_asked_of_it(net, three, x):
    live = lf.attach(net, three)
    mix = BySign("a", "b")
    with live.use(mix):
        assert mix.modules == [("a", "layers.3.down"), ("b", None)]
        asked = mix.asked
        net(x)
    with live.use(mix, c=2):  # what it knows never changes
        net(x)
    assert mix.asked == asked == 12
    with live.use(BySign("b", "a")) as _:
        net(x)
    with live.use(mix):
        net(x)
    assert mix.asked == 24  # another's numbers stood there


def test_kept_rounds_run_behind_it(net, base, three, x):
    live = lf.attach(net, three)
    live.keep("c", 0.5)
    behind = copy.deepcopy(base)
    for path, u in three["c"].modules.items():
        behind.get_submodule(path).weight.data += 0.5 * u.dense()
    wanted = referred(behind, [three["a"], three["b"]])(x)
    with live.use(BySign("a", "b")):
        torch.testing.assert_close(net(x), wanted, **CLOSE)


def test_an_adapter_that_is_removed_leaves_the_mix(net, base, three, x):
    live = lf.attach(net, three)
    live.use(BySign("a", "b"))
    live.remove("b")
    only = referred(base, [three["a"], SimpleNamespace(modules={})], sizes=(1.0, 0.0))
    torch.testing.assert_close(net(x), only(x), **CLOSE)
    live.remove("a")
    assert torch.equal(net(x), base(x))


def test_a_copy_of_the_model_runs_the_same(net, three, x):
    live = lf.attach(net, three)
    live.use(BySign("a", "b"))
    twin = copy.deepcopy(net)
    torch.testing.assert_close(twin(x), net(x), **CLOSE)
    live.detach()
    assert not torch.equal(twin(x), net(x))


def test_adapters_on_shared_sides(make_net, make_adapter, shapes_of, x, tmp_path):
    shapes = shapes_of(make_net())
    sources = {n: make_adapter(shapes, 2, seed=i) for i, n in enumerate("abc")}
    library = lf.fold(sources, form="shared", tolerance=0.3)
    net = make_net(torch.float32)
    live = lf.attach(net, library)
    apart = make_net(torch.float32)
    other = lf.attach(apart, {n: library[n] for n in "abc"})
    with live.use(BySign("a", "c")), other.use(BySign("a", "c")):
        torch.testing.assert_close(net(x), apart(x), rtol=1e-4, atol=1e-4)


def test_gradients_pass_and_a_later_choice_does_not_disturb_them(net, three, x):
    live = lf.attach(net, three)
    grads = []
    for later in (False, True):
        with live.use(BySign("a", "b")):
            loss = net(x).square().sum()
            if later:
                live.use(BySign("b", "a"))
            grads.append(torch.autograd.grad(loss, net.embed.weight)[0])
    assert grads[0].any()
    assert torch.equal(*grads)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_precision(make_net, three, x, dtype):
    half = {
        n: lf.Adapter({p: u.to(dtype=dtype) for p, u in a.modules.items()})
        for n, a in three.items()
    }
    net = make_net(dtype)
    live = lf.attach(net, half, dtype=dtype)
    with live.use(BySign("a", "c")), torch.no_grad():
        found = net(x)
    assert found.dtype == dtype
    assert found.isfinite().all()
    assert not torch.equal(found, net(x))


# One graph


@pytest.mark.filterwarnings("ignore::DeprecationWarning:torch")
def test_one_graph_whoever_is_weighed(make_net, three, x):
    torch._dynamo.reset()
    net = make_net(torch.float32)
    net.layers = net.layers[:1]
    narrow = {
        n: lf.Adapter({p: u.to(dtype=torch.float32) for p, u in a.modules.items() if ".0." in p})
        for n, a in three.items()
    }
    live = lf.attach(net, narrow)
    counter = CompileCounter()
    fast = torch.compile(net, backend=counter, fullgraph=True)
    first, second = BySign("a", "b"), BySign("c", "a", sizes=(-1.0, 3.0))
    choices = [(first, {}), (second, {}), (first, {"c": -2}), (second, {"rank": 1})]
    for mix, options in [*choices, (first, {"c": 0}), (first, {})]:
        with live.use(mix, **options), torch.no_grad():
            torch.testing.assert_close(fast(x), net(x), rtol=1e-5, atol=1e-5)
    assert counter.frame_count == 1
    for what in ("a", first, "b", second, ["a", "b"], first):
        with live.use(what), torch.no_grad():
            torch.testing.assert_close(fast(x), net(x), rtol=1e-5, atol=1e-5)
    assert counter.frame_count == 3  # one more for a mix, one for rows
    torch._dynamo.reset()


# What is refused


def refused(live, what, says, error=lf.MismatchError, **options):
    before = live.active
    with pytest.raises(error, match=says):
        live.use(what, **options)
    assert live.active == before


def test_what_is_refused(net, three, x):
    live = lf.attach(net, three)
    live.use("a")
    mix = BySign("a", "b")
    refused(live, BySign("a", "d"), "no adapter 'd' is attached", lf.UnknownNameError)
    refused(live, [mix, None], "BySign weighs every token by itself")
    refused(live, mix, "lengths= has one entry per row", lengths=[3])
    refused(live, mix, "c= has one entry per row", c=[1, 2])
    refused(live, mix, "rank 9 is above", rank=9)
    refused(live, print, "call it on that first")
    live.use(mix)
    for call in (live.merge, lambda: live.merge(mix), lambda: live.verify(x)):
        with pytest.raises(lf.MismatchError, match="can't be merged"):
            call()


def test_a_failing_mix_leaves_what_runs(net, three, x):
    class Failing(BySign):
        def numbers(self, modules, width, inner):
            raise lf.MismatchError("no")

    live = lf.attach(net, three)
    live.use(BySign("a", "b"))
    before = net(x)
    refused(live, Failing("b", "c"), "no")
    assert torch.equal(net(x), before)


def test_what_has_no_vectors_is_refused(net, three, make_adapter):
    words = lf.Adapter(
        {"embed": lf.LowRank(torch.randn(2, 13).double(), torch.randn(8, 2).double())},
        layouts={"embed": lf.Layout("embedding")},
    )
    live = lf.attach(net, {**three, "words": words})
    refused(live, BySign("a", "words"), "'embed', which is no linear layer", lf.RefusedError)
    live.add(three["a"], "trained", trainable=True)
    refused(live, BySign("a", "trained"), "'trained' is trained here", lf.RefusedError)
    live.use(BySign("a", "b"))
    with pytest.raises(lf.RefusedError, match="weighed token by token"):
        live.add(words, "b", replace=True)
