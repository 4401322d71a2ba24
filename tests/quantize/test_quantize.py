"""Quantising a base is in place and goes back, and what can't be quantised is refused by name."""

import copy
import pickle
import re
import sys

import pytest
import torch
from torch import nn

import lorafold as lf
from lorafold.errors import MismatchError, MissingExtraError, RefusedError

bnb = pytest.importorskip("bitsandbytes")
F = bnb.functional

FOUR = [
    {},
    {"kind": "fp4", "group_size": 32},
    {"double_quant": True},
    {"group_size": 32, "compute_dtype": torch.bfloat16},
]
ROWS = {"bits": 8}
GROUPS = {"bits": 8, "kind": "int8_weight_only"}


def named(options):
    return "-".join(str(v).removeprefix("torch.") for v in options.values()) or "default"


every = pytest.mark.parametrize("options", [*FOUR, ROWS, GROUPS], ids=named)


def in_nf4(W, double_quant=False):
    """The weight that is computed with in nf4, groups of 64."""
    return F.dequantize_4bit(
        *F.quantize_4bit(W, quant_type="nf4", compress_statistics=double_quant)
    )


def linears(model):
    return {
        path: m
        for path, m in model.named_modules()
        if isinstance(m, nn.Linear) and path != "lm_head"
    }


# In place, and back


@every
def test_layers_stay_the_objects_that_they_are(wide, options):
    hook = wide.layers[0]["up"].register_forward_hook(lambda *_: None)
    modules, biases = list(wide.modules()), [m.bias for m in linears(wide).values()]
    head = wide.lm_head.weight
    rng = torch.get_rng_state()
    lf.quantize_base(wide, **options)
    assert torch.equal(torch.get_rng_state(), rng)
    assert list(map(id, wide.modules())) == list(map(id, modules))
    assert hook.id in wide.layers[0]["up"]._forward_hooks
    assert wide.lm_head.weight is head  # excluded by default
    if "compute_dtype" not in options:
        assert [m.bias for m in linears(wide).values()] == biases


@every
def test_the_round_trip(wide, x, options):
    for p in wide.layers[0].parameters():
        p.requires_grad_(False)

    def shape_of(model):
        return [(path, type(m), list(vars(m)), m.training) for path, m in model.named_modules()], [
            (n, p.shape, p.dtype, p.requires_grad) for n, p in model.named_parameters()
        ]

    before, biases = shape_of(wide), [m.bias for m in linears(wide).values()]
    hooks = [len(m._load_state_dict_pre_hooks) for m in wide.modules()]
    lf.quantize_base(wide, **options)
    wide(x)
    assert lf.dequantize(wide) is wide
    assert shape_of(wide) == before
    assert [m.bias for m in linears(wide).values()] == biases
    assert [len(m._load_state_dict_pre_hooks) for m in wide.modules()] == hooks


@pytest.mark.parametrize("options", [*FOUR[:2], ROWS], ids=named)
def test_what_was_dequantised_loses_nothing_more(wide, options):
    assert lf.quantize_base(wide, **options).weight_error > 3e-3
    lf.dequantize(wide)
    first = {path: m.weight.detach().clone() for path, m in linears(wide).items()}
    again = lf.quantize_base(wide, **options)
    assert again.weight_error < (1e-3 if options is ROWS else 1e-12)
    lf.dequantize(wide)
    for path, layer in linears(wide).items():
        atol = 1e-3 if options is ROWS else 0
        torch.testing.assert_close(layer.weight, first[path], rtol=0, atol=atol)


def test_one_layer_comes_back(wide, x):
    lf.quantize_base(wide)
    y = wide(x)
    layer = wide.layers[0]["up"]
    assert lf.dequantize(layer) is layer
    assert type(layer) is nn.Linear
    assert type(wide.layers[0]["down"]) is bnb.nn.Linear4bit
    torch.testing.assert_close(wide(x), y, rtol=0, atol=1e-5)


def test_a_converted_bias_comes_back_to_the_bit(x):
    layer = nn.Linear(64, 8)
    bias = layer.bias
    bits = bias.detach().clone()
    lf.quantize_base(layer, compute_dtype=torch.bfloat16)
    layer(torch.randn(2, 64))
    assert layer.bias.dtype == torch.bfloat16
    assert layer.bias.requires_grad
    lf.dequantize(layer)
    assert layer.bias is bias
    assert torch.equal(bias, bits)


@every
def test_copies_and_pickles(wide, x, options):
    lf.quantize_base(wide, **options)
    y = wide(x)
    for other in (copy.deepcopy(wide), pickle.loads(pickle.dumps(wide))):
        assert torch.equal(other(x), y)
        lf.dequantize(other)
        assert type(other.layers[0]["up"]) is nn.Linear
    assert torch.equal(wide(x), y)


def test_layers_of_its_own_kind_by_bitsandbytes_itself(x):
    weights = torch.randn(8, 64), torch.randn(8)
    for made in (
        bnb.nn.LinearNF4(64, 8, compress_statistics=True),
        bnb.nn.Linear8bitLt(64, 8, has_fp16_weights=False),
    ):
        plain = set(vars(nn.Linear(64, 8)))
        made.load_state_dict({"weight": weights[0], "bias": weights[1]})
        made.to("cpu")
        inputs = torch.randn(3, 64)
        y = made.train()(inputs)
        lf.dequantize(made)
        assert type(made) is nn.Linear
        assert set(vars(made)) == plain
        assert not made._load_state_dict_pre_hooks
        torch.testing.assert_close(made(inputs), y, rtol=0, atol=1e-5)


@pytest.mark.parametrize("double_quant", [False, True])
def test_codes_that_were_reordered_for_avx512(double_quant):
    # bitsandbytes does so at the first forward in evaluation, on processors that have AVX512-BF16.
    W = torch.randn(64, 128, generator=torch.Generator().manual_seed(0))
    layer = bnb.nn.Linear4bit(128, 64, quant_type="nf4", compress_statistics=double_quant)
    layer.load_state_dict({"weight": W, "bias": torch.zeros(64)})
    layer.to("cpu")
    expected = in_nf4(W, double_quant)
    packed, state = F._convert_weight_packed_for_cpu(layer.weight.data, layer.weight.quant_state)
    layer.weight.data = packed
    layer.weight.quant_state = state
    kept = layer.weight.data.clone(), state.absmax.clone()
    live = lf.attach(layer, lf.LoRA(rank=4, targets=re.compile("^$"), init="pissa"))
    assert torch.equal(layer.weight.data, kept[0])
    assert torch.equal(state.absmax, kept[1])
    live.detach()
    lf.dequantize(layer)
    # The scales were rounded to bfloat16 on the way.
    torch.testing.assert_close(layer.weight, expected, rtol=2**-8, atol=0)


def test_our_layers_are_not_reordered(wide):
    lf.quantize_base(wide)
    assert not any(m.support_avx512bf16_for_cpu for m in linears(wide).values())


def test_conv1d_of_transformers():
    from transformers.pytorch_utils import Conv1D

    layer = Conv1D(12, 64)  # (out, in), the weight (in, out)
    W, inputs, names = layer.weight.detach().clone(), torch.randn(3, 64), set(vars(layer))
    expected = in_nf4(W.T.contiguous())
    report = lf.quantize_base(layer)
    assert report.layers[0].shape == (12, 64)
    torch.testing.assert_close(layer(inputs), inputs @ expected.T + layer.bias)
    u = lf.LowRank(torch.randn(2, 64), torch.randn(12, 2))
    live = lf.attach(layer, lf.Adapter({"": u}))
    with live.use("default"):
        torch.testing.assert_close(
            layer(inputs), inputs @ (expected + u.dense()).T + layer.bias, rtol=1e-4, atol=1e-4
        )
    live.detach()
    lf.dequantize(layer)
    assert type(layer) is Conv1D
    assert set(vars(layer)) == names
    assert torch.equal(layer.weight, expected.T)


# Refusals


@pytest.mark.parametrize(
    ("options", "match"),
    [
        ({"bits": 3}, "bits must be 4 or 8, found 3"),
        ({"bits": "4"}, "bits must be 4 or 8, found '4'"),
        ({"kind": "int4"}, "kind must be 'nf4' or 'fp4' at 4 bits, found 'int4'"),
        ({"bits": 8, "kind": "nf4"}, "kind must be 'int8' or 'int8_weight_only' at 8 bits"),
        ({"group_size": 48}, "group_size must be 32, 64, 128, .* or 4096 for kind 'nf4', found 48"),
        ({"group_size": "row"}, "for kind 'nf4', found 'row'"),
        ({"group_size": 64.0}, "found 64.0"),
        (
            {"bits": 8, "group_size": 64},
            r"group_size must be 'row' for kind 'int8' \(or kind='int8_weight_only'\), found 64",
        ),
        ({**GROUPS, "group_size": 48}, "32, 64, 128, 256 or 'row'"),
        ({**GROUPS, "group_size": 256}, "rows of 64 are no whole groups.*32, 64 or 'row'"),
        ({"bits": 8, "double_quant": True}, "double_quant= is for 4 bits only"),
        ({"bits": 8, "compute_dtype": torch.float16}, "compute_dtype= is for 4 bits only"),
        ({"compute_dtype": torch.int8}, "compute_dtype must be 'float32', 'bfloat16' or 'float16'"),
        ({"targets": "nothing"}, "targets 'nothing' match no module"),
        ({"targets": "embed"}, "is a Embedding, which is no plain linear layer"),
    ],
)
def test_what_is_not_supported(wide, fingerprint, options, match):
    before = fingerprint(wide)
    with pytest.raises(MismatchError, match=match) as error:
        lf.quantize_base(wide, **options)
    assert "\n" not in str(error.value)
    assert fingerprint(wide) == before


def test_quantise_first_and_attach_then(wide, fingerprint):
    live = lf.attach(wide, lf.LoRA(rank=2))
    before = fingerprint(wide)
    with pytest.raises(RefusedError, match="quantise first and attach then"):
        lf.quantize_base(wide)
    assert fingerprint(wide) == before
    live.detach()
    lf.quantize_base(wide)


def test_twice_and_nothing(wide):
    with pytest.raises(MismatchError, match="nothing here is quantised"):
        lf.dequantize(wide)
    lf.quantize_base(wide, targets="up")
    with pytest.raises(RefusedError, match=r"'layers\.0\.up' is quantised already.*exclude="):
        lf.quantize_base(wide)
    lf.quantize_base(wide, exclude=("up", "lm_head"), bits=8)
    assert type(wide.layers[1]["down"]) is bnb.nn.Linear8bitLt


class Own(nn.Linear):
    def forward(self, x):
        return super().forward(x) + 1


def broken(how):
    model = nn.Sequential(nn.Linear(64, 64), nn.Linear(64, 64))
    layer = model[1]
    if how == "tied":
        layer.weight = model[0].weight
    elif how == "meta":
        layer.to("meta")
    elif how == "float64":
        layer.double()
    elif how == "nan":
        layer.weight.data[3, 5] = float("nan")
    elif how == "own forward":
        model[1] = Own(64, 64)
    elif how == "own forward, Conv1D":
        from transformers.pytorch_utils import Conv1D

        own = type("Louder", (Conv1D,), {"forward": lambda self, x: 2 * Conv1D.forward(self, x)})
        model[1] = own(64, 64)
    elif how == "parametrised":
        torch.nn.utils.parametrizations.weight_norm(layer)
    elif how == "instance":
        layer.forward = lambda x: x
    elif how == "attention":
        model[1] = nn.MultiheadAttention(64, 4)
    return model


@pytest.mark.parametrize(
    ("how", "match"),
    [
        ("tied", "'0' shares its weight with '1'"),
        ("meta", "'1' has no weight yet"),
        ("float64", "'1' has a weight of torch.float64"),
        ("nan", "'1' has numbers that are not finite"),
        ("own forward", "'1' is a Own"),
        ("own forward, Conv1D", "'1' is a Louder, which is no plain linear layer"),
        ("parametrised", "'1' is a ParametrizedLinear"),
        ("instance", "'1' has a forward of its own"),
        ("attention", "'1.out_proj' is part of an nn.MultiheadAttention"),
    ],
)
def test_layers_that_cannot_be_quantised(how, match):
    model = broken(how)
    classes = [type(m) for m in model.modules()]
    with pytest.raises(MismatchError, match=match):
        lf.quantize_base(model)
    assert [type(m) for m in model.modules()] == classes


def test_numbers_above_float16():
    layer = nn.Linear(64, 8)
    layer.weight.data[0, 0] = 1e6
    with pytest.raises(MismatchError, match="goes through float16: take kind='int8_weight_only'"):
        lf.quantize_base(layer, bits=8)
    lf.quantize_base(layer)


@pytest.mark.parametrize(
    ("package", "extra", "options"),
    [("bitsandbytes", "qlora", {}), ("torchao", "torchao", GROUPS)],
)
def test_a_missing_package(wide, monkeypatch, fingerprint, package, extra, options):
    before = fingerprint(wide)
    monkeypatch.setitem(sys.modules, package, None)
    with pytest.raises(MissingExtraError, match=rf"{package}: pip install 'lorafold\[{extra}\]'"):
        lf.quantize_base(wide, **options)
    assert fingerprint(wide) == before


def test_embeddings_of_bitsandbytes_are_not_dequantised():
    model = nn.Sequential(bnb.nn.Embedding8bit(8, 64), nn.Linear(64, 8)).to("cpu")
    with pytest.raises(RefusedError, match="'0' is a Embedding8bit"):
        lf.dequantize(model)
