"""A layer class and a quantised weight of somebody else's: a record each, and all verbs take them.

Each is tried by itself, and both together: the two tables know nothing of each other.
"""

import copy
import pickle

import pytest
import torch
from torch import nn

import lorafold as lf
from lorafold.errors import MismatchError, RefusedError
from lorafold.layers import kinds, storage

IN, OUT = 64, 32


class Einsum(nn.Module):
    """x W + b with W stored (in, out), under names that no layer of torch has."""

    def __init__(self, inner=IN, out=OUT):
        super().__init__()
        self.weight = nn.Parameter(torch.randn(inner, out) / inner**0.5)
        self.bias = nn.Parameter(torch.randn(out))

    def numbers(self):
        return self.weight

    def forward(self, x):
        return torch.einsum("...i,io->...o", x, self.numbers()) + self.bias


class Rounded:
    """The weight as bytes and a step a column."""

    def rounded(self):
        W = self.weight.detach()
        self.step = W.abs().amax(0, keepdim=True) / 127
        self.weight = nn.Parameter((W / self.step).round().to(torch.int8), requires_grad=False)
        return self

    def numbers(self):
        return self.weight * self.step


class RoundedEinsum(Rounded, Einsum):
    pass


class RoundedLinear(Rounded, nn.Linear):
    def forward(self, x):
        return nn.functional.linear(x, self.numbers(), self.bias)


EINSUM = kinds.LayerKind(
    name="einsum",
    mine=lambda layer: isinstance(layer, Einsum),
    dims=lambda layer: tuple(layer.weight.shape[::-1]),
    transposed=True,
    plain=lambda layer: type(layer) is Einsum,
)
STEPS = storage.Storage(
    name="steps",
    mine=lambda layer: isinstance(layer, Rounded),
    read=lambda layer: layer.numbers(),
    parts=lambda layer: storage.Parts(layer.weight.data, (layer.step,), layer.step),
    dtype=lambda layer: layer.step.dtype,
    origin=lambda layer: storage.Origin(
        Einsum if isinstance(layer, Einsum) else nn.Linear, None, names=frozenset({"step"})
    ),
)
LAYERS = {
    "layer": Einsum,
    "storage": lambda: RoundedLinear(IN, OUT).rounded(),
    "both": lambda: RoundedEinsum().rounded(),
}


@pytest.fixture(autouse=True)
def _registered():
    with kinds.KINDS.including(EINSUM), storage.STORAGES.including(STEPS):
        yield


def matrix(layer):
    """(out, in) of the weight, in float64, by hand."""
    W = layer.numbers() if hasattr(layer, "numbers") else layer.weight
    return (W.T if isinstance(layer, Einsum) else W).detach().double()


@pytest.fixture
def model_of():
    def build(which):
        torch.manual_seed(0)
        return nn.Sequential(nn.Linear(8, IN), LAYERS[which]())

    return build


@pytest.fixture
def updates(make_update):
    return {"u": make_update(OUT, IN, 4, scale=0.5), "v": make_update(OUT, IN, 2, seed=1)}


def adapters(updates):
    return {name: lf.Adapter({"1": u}) for name, u in updates.items()}


def by_hand(layer, h, delta):
    return h.double() @ (matrix(layer) + delta).T + layer.bias.detach().double()


CLOSE = {"rtol": 1e-5, "atol": 1e-5}
every = pytest.mark.parametrize("which", LAYERS)


@every
def test_what_runs_by_the_dense_weight(which, model_of, updates, dense):
    model, x = model_of(which), torch.randn(6, 8)
    bare = copy.deepcopy(model)
    with torch.no_grad():
        live = lf.attach(model, adapters(updates))
        h, base = bare[0](x), bare(x)
        u, v = dense(updates["u"]), dense(updates["v"])
        with live.use({"u": 0.5, "v": -2}):
            wanted = by_hand(bare[1], h, 0.5 * u - 2 * v)
            torch.testing.assert_close(model(x).double(), wanted, **CLOSE)
        prefix = updates["u"].scale * updates["u"].B[:, :2].double() @ updates["u"].A[:2].double()
        with live.use(["u", None, "v"], c=[-1, 1, 2], rank=2):  # each row serves two entries
            found = model(x).double()
        torch.testing.assert_close(found[:2], by_hand(bare[1], h[:2], -prefix), **CLOSE)
        assert torch.equal(found[2:4], base[2:4].double())
        torch.testing.assert_close(found[4:], by_hand(bare[1], h[4:], 2 * v), **CLOSE)
        with live.use("u", c=0):
            assert torch.equal(model(x), base)
        assert torch.equal(live.detach()(x), base)
    assert type(model[1]) is type(bare[1])


@every
def test_all_linear_means_it_and_training_begins_in_its_directions(which, model_of):
    model, x = model_of(which), torch.randn(6, 8)
    W, plain = matrix(model[1]), model(x).detach()
    live = lf.attach(model, lf.LoRA(rank=3, alpha=3, init="pissa"))
    assert set(live._state.slots.patches) == {"0", "1"}
    torch.testing.assert_close(model(x), plain, **CLOSE)
    U, S, Vh = torch.linalg.svd(W, full_matrices=False)
    factors = live._state.trained("default").fresh["1"]
    wanted = (U[:, :3] * S[:3]) @ Vh[:3]
    torch.testing.assert_close((factors.B @ factors.A).detach().double(), wanted, **CLOSE)
    model(x).square().sum().backward()
    assert all(p.grad is not None for p in live.parameters())
    assert live.adapter("default").config.get("fan_in_fan_out", False) == (which != "storage")
    live.detach()
    stats = lf.calibrate(model, [x], targets="1")
    z = model[0](x).detach().double() @ Vh.T
    torch.testing.assert_close(stats["1"].mean_abs.double(), z.abs().mean(0), **CLOSE)


@every
def test_merging_and_the_way_back(which, model_of, updates, dense):
    model, x = model_of(which), torch.randn(6, 8)
    live = lf.attach(model, adapters(updates))
    if which != "layer":
        with pytest.raises(RefusedError, match="'1' is quantised"):
            live.merge("u")
        wanted = matrix(model[1])
        assert live.summary().quantized == 1
        lf.dequantize(model)  # under the adapters
        assert not hasattr(model[1], "step")
        torch.testing.assert_close(matrix(model[1]), wanted, rtol=1e-6, atol=0)
    W, weight = matrix(model[1]), model[1].weight
    live.merge({"u": -0.5})
    torch.testing.assert_close(matrix(model[1]), W - 0.5 * dense(updates["u"]), **CLOSE)
    live.unmerge()
    assert model[1].weight is weight
    live.use("u")
    assert live.verify(x) < 1e-5
    merged = adapters(updates)["u"].apply_to(live.detach().state_dict())
    torch.testing.assert_close(
        matrix(model[1]) + dense(updates["u"]),
        (merged["1.weight"].T if which != "storage" else merged["1.weight"]).double(),
        **CLOSE,
    )


def test_the_layer_in_4_bits_and_back(model_of, updates, dense):
    pytest.importorskip("bitsandbytes")
    model, x = model_of("layer"), torch.randn(6, 8)
    W = matrix(model[1])
    (footprint,) = lf.quantize_base(model, targets="1").layers
    assert (footprint.shape, footprint.codes) == ((OUT, IN), IN * OUT // 2)
    assert 0.08 < footprint.weight_error < 0.11
    live = lf.attach(model, adapters(updates))
    with torch.no_grad(), live.use("u"):
        y = model(x).double()
    lf.dequantize(live.detach())
    assert type(model[1]) is Einsum
    off = torch.linalg.matrix_norm(matrix(model[1]) - W) / torch.linalg.matrix_norm(W)
    assert off == pytest.approx(footprint.weight_error, rel=1e-4)
    with torch.no_grad():
        wanted = by_hand(model[1], model[0](x), dense(updates["u"]))
    torch.testing.assert_close(y, wanted, **CLOSE)


@pytest.mark.parametrize("which", ["storage", "both"])
def test_bytes_of_the_storage(which, model_of):
    from lorafold.quantize.footprint import model_bytes

    model = model_of(which)
    floats = 4 * (8 * IN + IN + OUT)
    assert model_bytes(model) == floats + IN * OUT + 4 * model[1].step.numel()
    with pytest.raises(RefusedError, match="'1' is quantised already"):
        lf.quantize_base(model)
    lf.dequantize(model)
    assert model_bytes(model) == floats + 4 * IN * OUT


@every
def test_copies_and_pickles_keep_the_kind(which, model_of, updates):
    model, x = model_of(which), torch.randn(6, 8)
    lf.attach(model, adapters(updates)).use("u")
    y = model(x)
    for other in (copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
        assert torch.equal(other(x), y)
        assert other[1].lorafold.kind is model[1].lorafold.kind


def test_without_the_records(updates):
    layer, rounded = Einsum(), RoundedLinear(IN, OUT).rounded()
    found = kinds.KINDS.including(EINSUM)
    with found:
        pass
    assert kinds.KINDS.find(layer) is EINSUM  # what was before comes back
    others = kinds.Table(kinds.LINEAR, kinds.CONV)
    assert others.find(layer) is None
    assert storage.FLOAT.read(rounded) is None
    unknown = nn.Linear(IN, OUT)
    unknown.weight = rounded.weight  # bytes are no floats, and nobody knows what they stand for
    with pytest.raises(RefusedError, match="weight of '0' .* can't be read here"):
        lf.attach(nn.Sequential(unknown), lf.LoRA(rank=2, init="pissa", dtype=torch.float32))
    refusing = kinds.LayerKind("none", lambda m: m is layer, EINSUM.dims, lambda m: "is not ours")
    with kinds.KINDS.including(refusing), pytest.raises(RefusedError, match="module '1' is not ou"):
        lf.attach(nn.Sequential(nn.Identity(), layer), adapters(updates))
    with pytest.raises(MismatchError, match="takes updates of shape"):
        lf.attach(nn.Sequential(nn.Identity(), Einsum(OUT, IN)), adapters(updates))
