"""Every kind of layer against its dense weight W + c ΔW; layers are refused by name."""

import copy
import types

import pytest
import torch
from torch import nn

import lorafold as lf
from lorafold.errors import RefusedError

TIGHT = {"rtol": 1e-10, "atol": 1e-10}


def conv1d(*sizes):
    return pytest.importorskip("transformers.pytorch_utils").Conv1D(*sizes)


KINDS = {
    "linear": (lambda: nn.Linear(6, 4), (3, 6)),
    "linear, two inputs' axes": (lambda: nn.Linear(6, 4, bias=False), (2, 3, 5, 6)),
    "Conv1D": (lambda: conv1d(4, 6), (5, 6)),
    "square Conv1D": (lambda: conv1d(6, 6), (5, 6)),
    "embedding": (lambda: nn.Embedding(7, 5, padding_idx=1), 7),
    "conv1d": (lambda: nn.Conv1d(3, 4, 3, stride=2, padding=1), (3, 9)),
    "conv1d, same": (lambda: nn.Conv1d(3, 4, 4, padding="same", dilation=2), (3, 9)),
    "conv2d": (lambda: nn.Conv2d(3, 4, (2, 3), padding=(1, 0), dilation=(1, 2)), (3, 7, 8)),
    "conv2d, 1x1": (lambda: nn.Conv2d(3, 4, 1, bias=False), (3, 4, 5)),
    "conv2d, reflect": (lambda: nn.Conv2d(2, 3, 3, padding=1, padding_mode="reflect"), (2, 5, 5)),
    "conv3d": (lambda: nn.Conv3d(2, 3, (1, 2, 3), padding=(0, 1, 1)), (2, 3, 4, 5)),
}


def built(kind, batch=4):
    """A layer, inputs, and an adapter for it with its ΔW in the weight's shape."""
    make, shape = KINDS[kind]
    torch.manual_seed(0)
    layer = make().double()
    if isinstance(shape, int):
        x = torch.randint(0, shape, (batch, 5))
    else:
        x = torch.randn(batch, *shape, dtype=torch.float64)
    W = layer.weight
    out, inner = (W.shape[1], W.shape[0]) if is_stored_transposed(layer) else (len(W), W[0].numel())
    updates = [
        lf.LowRank(
            torch.randn(r, inner, dtype=torch.float64),
            torch.randn(out, r, dtype=torch.float64),
            0.3,
        )
        for r in (3, 2)
    ]
    return layer, x, updates


def is_stored_transposed(layer):
    return isinstance(layer, nn.Embedding) or type(layer).__name__ == "Conv1D"


def with_weight(layer, delta):
    """The layer's twin with ΔW (out, in) added to its weight."""
    twin = copy.deepcopy(layer)
    with torch.no_grad():
        twin.weight += (delta.T if is_stored_transposed(layer) else delta).reshape(
            twin.weight.shape
        )
    return twin


def dense(u):
    return u.scale * u.B @ u.A


@pytest.mark.parametrize("kind", KINDS)
def test_uniform_and_rows_by_the_dense_weight(kind):
    layer, x, (u, v) = built(kind)
    base = copy.deepcopy(layer)
    live = lf.attach(layer, {"u": lf.Adapter({"": u}), "v": lf.Adapter({"": v})})
    with torch.no_grad():
        both = with_weight(base, 0.5 * dense(u) - 2 * dense(v))(x)
        with live.use({"u": 0.5, "v": -2}):
            torch.testing.assert_close(layer(x), both, **TIGHT)
        first = with_weight(base, dense(u))(x[:1])
        prefix = with_weight(base, -0.5 * u.scale * u.B[:, :2] @ u.A[:2])(x[2:3])
        with live.use(["u", None, "u", {"u": 0.5, "v": -2}], c=[1, 1, -0.5, 1], rank=[3, 1, 2, 3]):
            found = layer(x)
        torch.testing.assert_close(found[:1], first, **TIGHT)
        assert torch.equal(found[1], base(x)[1])
        torch.testing.assert_close(found[2:3], prefix, **TIGHT)
        torch.testing.assert_close(found[3], both[3], **TIGHT)
        with live.use(["v", None]):  # each row serves two entries
            found = layer(x)
        torch.testing.assert_close(found[:2], with_weight(base, dense(v))(x[:2]), **TIGHT)
        assert torch.equal(found[2:], base(x)[2:])
        with live.use("u", c=0):
            assert torch.equal(layer(x), base(x))


@pytest.mark.parametrize("kind", KINDS)
def test_trained_factors_by_the_dense_weight(kind):
    layer, x, (u, v) = built(kind)
    base = copy.deepcopy(layer)
    live = lf.attach(layer, {"u": lf.Adapter({"": u}), "v": lf.Adapter({"": v})}, trainable=True)
    with torch.no_grad():
        both = with_weight(base, 0.5 * dense(u) - 2 * dense(v))(x)
        with live.use({"u": 0.5, "v": -2}):
            torch.testing.assert_close(layer(x), both, **TIGHT)
        with live.use(["u", None, "u", {"u": 0.5, "v": -2}], rank=[2, 1, 1, 3]):
            found = layer(x)
        prefix = with_weight(base, u.scale * u.B[:, :2] @ u.A[:2])(x[:1])
        torch.testing.assert_close(found[:1], prefix, **TIGHT)
        assert torch.equal(found[1], base(x)[1])
        torch.testing.assert_close(found[3], both[3], **TIGHT)


@pytest.mark.parametrize("kind", KINDS)
def test_gradients_by_the_dense_weight(kind):
    layer, x, (u, _) = built(kind)
    base = copy.deepcopy(layer)
    live = lf.attach(layer, lf.Adapter({"": u}), trainable=True)
    live.use("default", c=-0.5)
    if kind == "embedding":
        x[x == layer.padding_idx] = 0
    layer(x).pow(2).sum().backward()
    A, B = (t.clone().requires_grad_() for t in (u.A, u.B))
    delta = -0.5 * u.scale * B @ A
    W = (delta.T if is_stored_transposed(base) else delta).reshape(base.weight.shape)
    from torch.func import functional_call

    functional_call(base, {"weight": base.weight.detach() + W}, (x,)).pow(2).sum().backward()
    grads = {tuple(p.shape): p.grad for p in live.parameters()}
    torch.testing.assert_close(grads[tuple(A.shape)], A.grad, **TIGHT)
    torch.testing.assert_close(grads[tuple(B.shape)], B.grad, **TIGHT)


@pytest.mark.parametrize("kind", KINDS)
def test_merging_by_the_dense_weight(kind):
    layer, x, (u, v) = built(kind)
    base = copy.deepcopy(layer)
    live = lf.attach(layer, {"u": lf.Adapter({"": u}), "v": lf.Adapter({"": v})})
    live.merge({"u": 0.5, "v": -2})
    wanted = with_weight(base, 0.5 * dense(u) - 2 * dense(v))
    torch.testing.assert_close(layer.weight, wanted.weight, **TIGHT)
    live.unmerge()
    assert torch.equal(layer.weight, base.weight)
    live.use({"u": 0.5, "v": -2})
    assert live.verify(x) < 1e-9


def test_padding_is_looked_up_and_not_trained():
    layer, _, (u, _) = built("embedding")
    live = lf.attach(layer, lf.Adapter({"": u}), trainable=True)
    x = torch.tensor([1, 2])
    live.use("default")
    y = layer(x)
    torch.testing.assert_close(y.detach(), layer.weight[x] + dense(u).T[x], **TIGHT)
    y.sum().backward()
    A = next(p for p in live.parameters() if p.shape == u.A.shape)
    assert A.grad[:, 1].abs().sum() == 0
    assert A.grad[:, 2].abs().sum() > 0


# What is refused


class Looked(nn.Embedding):
    """Looks up another row than it is asked for."""

    def forward(self, x):
        return super().forward(x + 1)


def patched():
    layer = nn.Linear(6, 4)
    layer.forward = types.MethodType(nn.Linear.forward, layer)
    return layer


REFUSED = {
    "forward of its own": (patched, (4, 6), "'at' has a forward of its own on the instance"),
    "grouped": (lambda: nn.Conv1d(4, 4, 3, groups=2), (4, 6), "'at' is a grouped convolution"),
    "max_norm": (lambda: nn.Embedding(6, 4, max_norm=1.0), (4, 6), "'at' renormalises its rows"),
    "looked up": (lambda: Looked(6, 4), (4, 6), "'at' is a Looked, whose forward looks up"),
    "norm": (lambda: nn.LayerNorm(6), (4, 6), "'at' is a LayerNorm, which takes no update"),
    "transposed": (lambda: nn.ConvTranspose1d(4, 4, 1), (4, 4), "'at' is a ConvTranspose1d"),
    "bilinear": (lambda: nn.Bilinear(2, 3, 4), (4, 6), "'at' is a Bilinear"),
}


@pytest.mark.parametrize("case", REFUSED)
def test_refused_by_name(case, make_update, fingerprint):
    make, shape, message = REFUSED[case]
    model = nn.ModuleDict({"good": nn.Linear(6, 4), "at": make()})
    before = fingerprint(model)
    adapter = lf.Adapter({"good": make_update(4, 6, 2), "at": make_update(*shape, 2)})
    with pytest.raises(RefusedError, match=message):
        lf.attach(model, adapter)
    with pytest.raises(RefusedError, match=message):
        lf.attach(model, lf.LoRA(rank=2, targets="at"))
    assert fingerprint(model) == before


def test_children_of_multihead_attention_are_refused(make_update, fingerprint):
    model = nn.ModuleDict({"attn": nn.MultiheadAttention(6, 2)})
    before = fingerprint(model)
    with pytest.raises(RefusedError, match=r"'attn\.out_proj' is part of an nn\.Multihead"):
        lf.attach(model, lf.Adapter({"attn.out_proj": make_update(6, 6, 2)}))
    with pytest.raises(RefusedError, match=r"'attn' is a MultiheadAttention"):
        lf.attach(model, lf.Adapter({"attn": make_update(18, 6, 2)}))
    assert fingerprint(model) == before


def test_all_linear_names_what_to_leave_out():
    model = nn.ModuleDict({"attn": nn.MultiheadAttention(6, 2), "mlp": nn.Linear(6, 6)})
    with pytest.raises(RefusedError, match=r"'attn\.out_proj'.*exclude="):
        lf.attach(model, lf.LoRA(rank=2))
    live = lf.attach(model, lf.LoRA(rank=2, exclude="attn"))
    assert list(live._state.slots.patches) == ["mlp"]
