"""A quantised base: what it stores and loses, what attaches to it, and the way back.

The reference is bitsandbytes' functional interface, applied to each weight by itself.
"""

import copy
import pickle
import re
import sys

import pytest
import torch
from torch import nn
from torch.func import functional_call

import lorafold as lf
from lorafold.errors import MismatchError, MissingExtraError, RefusedError

bnb = pytest.importorskip("bitsandbytes")
F = bnb.functional

FOUR = [
    {},
    {"kind": "fp4", "group_size": 128},
    {"double_quant": True},
    {"group_size": 32, "compute_dtype": torch.bfloat16},
]
ROWS = {"bits": 8}
GROUPS = {"bits": 8, "kind": "int8_weight_only"}
ALL = [*FOUR, ROWS, GROUPS]


def named(options):
    return "-".join(str(v).removeprefix("torch.") for v in options.values()) or "default"


every = pytest.mark.parametrize("options", ALL, ids=named)


def reference(W, options):
    """The weight that is computed with, float32."""
    if options is GROUPS:
        from torchao.quantization import Int8Tensor, PerGroup

        return Int8Tensor.from_hp(W, PerGroup(64)).dequantize()
    if options.get("bits") == 8:
        codes, scales, _ = F.int8_vectorwise_quant(W.half())
        return codes.float() * scales[:, None] / 127
    codes, state = F.quantize_4bit(
        W,
        blocksize=options.get("group_size", 64),
        compress_statistics=options.get("double_quant", False),
        quant_type=options.get("kind", "nf4"),
    )
    state.dtype = torch.float32
    return F.dequantize_4bit(codes, state)


def linears(model, exclude=("lm_head",)):
    return {
        path: m
        for path, m in model.named_modules()
        if isinstance(m, nn.Linear) and path not in exclude
    }


def dense(model, options, exclude=("lm_head",)):
    """A copy of a model with its linear weights as the reference has them."""
    found = copy.deepcopy(model)
    for layer in linears(found, exclude).values():
        layer.weight.data = reference(layer.weight.data, options).to(layer.weight.dtype)
    return found


class Wide(nn.Module):
    """Tokens (n, length) to logits, through two blocks of width 64; its weights fit all groups."""

    def __init__(self):
        super().__init__()
        self.embed = nn.Embedding(13, 64)
        self.layers = nn.ModuleList(
            nn.ModuleDict({"up": nn.Linear(64, 128), "down": nn.Linear(128, 64, bias=False)})
            for _ in range(2)
        )
        self.lm_head = nn.Linear(64, 13)

    def forward(self, tokens):
        h = self.embed(tokens)
        for layer in self.layers:
            h = h + layer["down"](torch.tanh(layer["up"](h)))
        return self.lm_head(h)


@pytest.fixture
def wide():
    with torch.random.fork_rng():
        torch.manual_seed(0)
        return Wide().eval()


@pytest.fixture
def adapter(wide, make_adapter, shapes_of):
    return make_adapter(shapes_of(wide, ("up", "down")), 4, seed=5, scale=0.3)


def tolerance(options):
    if options is ROWS:
        return {"rtol": 0, "atol": 0.05}  # the inputs are rounded as well
    return {"rtol": 0, "atol": 0.03 if "compute_dtype" in options else 1e-4}


# Weights, outputs, bytes


@every
def test_weights_and_outputs_are_those_of_the_reference(wide, x, options):
    expected = dense(wide, options)
    lf.quantize_base(wide, **options)
    assert all(isinstance(m, nn.Linear) for m in linears(wide).values())
    torch.testing.assert_close(wide(x), expected(x), **tolerance(options))
    lf.dequantize(wide)  # after a forward, which moves the scales of an 8-bit layer
    for path, layer in linears(wide).items():
        exact = {"rtol": 0, "atol": 2e-7 if options in (ROWS, GROUPS) else 0}
        wanted = expected.get_submodule(path).weight
        torch.testing.assert_close(layer.weight, wanted, **exact)
    torch.testing.assert_close(wide(x), expected(x), rtol=0, atol=1e-5)


def test_bytes_by_hand():
    model = nn.Sequential(nn.Embedding(10, 32), nn.Linear(32, 64), nn.LayerNorm(64))
    report = lf.quantize_base(model)
    (layer,) = report.layers
    assert (layer.path, layer.shape, layer.before) == ("1", (64, 32), 4 * 64 * 32)
    assert (layer.codes, layer.groups) == (64 * 32 // 2, 32)
    assert layer.scales == 4 * 32 + 4 * 16  # a scale for each group, and the table of 16 levels
    rest = 4 * (10 * 32 + 64 + 2 * 64)
    assert report.before == layer.before + rest
    assert report.after == layer.codes + layer.scales + rest
    assert report.total == report.after
    assert report.ratio == 8192 / (1024 + 192)
    text = str(report)
    assert " 64×32   8,192  1,024     192   6.74 " in text
    assert "nf4, 4 bits, one scale for 64 weights: 32 scales in float32" in text
    assert f"model {report.before:,} → {report.after:,} bytes" in text

    live = lf.attach(model, lf.LoRA(rank=4, targets="1"))
    with_adapters = report.with_adapters(live)
    assert with_adapters.adapters == 4 * 4 * (64 + 32)
    assert with_adapters.total == report.after + with_adapters.adapters
    assert report.adapters == 0
    assert f"= {with_adapters.total:,}" in str(with_adapters)
    assert live.summary().quantized == 1
    assert live.summary().original == 64 * 32


def test_bytes_of_the_other_kinds():
    def layer(**options):
        return lf.quantize_base(nn.Linear(512, 64), **options).layers[0]

    twice = layer(double_quant=True)  # a byte for each scale, a scale for 256 of them, two tables
    assert (twice.groups, twice.scales) == (512, 512 + 4 * 2 + 4 * 256 + 4 * 16 + 4)
    rows = layer(bits=8)
    assert (rows.codes, rows.groups, rows.scales) == (512 * 64, 64, 4 * 64)
    groups = layer(**GROUPS, group_size=128)
    assert (groups.codes, groups.groups) == (512 * 64, 256)
    large = layer(group_size=4096)
    assert (large.codes, large.groups) == (512 * 32, 8)


@every
def test_errors_are_those_of_the_weights(wide, options):
    expected = dense(wide, options)
    before = {path: m.weight.detach().clone() for path, m in linears(wide).items()}
    report = lf.quantize_base(wide, **options)
    assert [layer.path for layer in report.layers] == list(before)
    wrong = total = 0.0
    for layer in report.layers:
        W = before[layer.path]
        difference = expected.get_submodule(layer.path).weight.detach() - W
        assert layer.weight_error == pytest.approx(float(difference.norm() / W.norm()), rel=1e-3)
        # Normal inputs: what is lost of the output is what is lost of the weight.
        extra = 3 if options is ROWS else 1.3  # the inputs' own rounding
        assert layer.weight_error / 1.3 < layer.forward_error < extra * layer.weight_error
        wrong += float(difference.square().sum())
        total += float(W.square().sum())
    assert report.weight_error == pytest.approx((wrong / total) ** 0.5, rel=1e-3)
    assert report.forward_error is None


def test_nf4_loses_nine_percent_of_normal_weights():
    # Large groups lose more, and fp4 more than nf4; a floor and a ceiling for each.
    layer = nn.Linear(256, 256)
    W = torch.randn(256, 256, generator=torch.Generator().manual_seed(0))

    def error(**options):
        copied = copy.deepcopy(layer)
        copied.weight.data = W.clone()
        return lf.quantize_base(copied, **options).weight_error

    assert 0.090 < error() < 0.094
    assert error(group_size=32) < error() < error(group_size=256) < error(group_size=4096)
    assert error() < error(kind="fp4")
    assert error(bits=8) < 0.01


def test_error_of_the_output_for_inputs(wide, x):
    y = wide(x).detach()
    wide.train()
    wide.layers[1].eval()
    modes = [m.training for m in wide.modules()]
    report = lf.quantize_base(wide, inputs=x)
    assert [m.training for m in wide.modules()] == modes
    wanted = float((wide.eval()(x).detach() - y).norm() / y.norm())
    assert report.forward_error == pytest.approx(wanted, rel=1e-5)
    assert f"error of its output {report.forward_error:.3%}" in str(report)


@pytest.mark.parametrize("wrap", [lambda x: (x,), lambda x: {"tokens": x}], ids=["tuple", "dict"])
def test_inputs_by_position_and_by_name(wide, x, wrap):
    twin = copy.deepcopy(wide)
    expected = lf.quantize_base(twin, inputs=x).forward_error
    assert lf.quantize_base(wide, inputs=wrap(x)).forward_error == expected


def test_inputs_that_do_not_run_leave_the_model_unchanged(wide, fingerprint):
    before = fingerprint(wide)
    with pytest.raises(IndexError):
        lf.quantize_base(wide, inputs=torch.tensor([[99]]))
    assert fingerprint(wide) == before


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_bases(wide, x, dtype):
    wide.to(dtype)
    expected = dense(wide, {})
    report = lf.quantize_base(wide)
    assert report.layers[0].before == 2 * 128 * 64
    assert report.compute_dtype == dtype
    assert 0.085 < report.weight_error < 0.095
    got = wide(x)
    assert got.dtype == dtype
    torch.testing.assert_close(got.float(), expected.float()(x), rtol=0, atol=0.05)
    assert {m.weight.dtype for m in linears(lf.dequantize(wide)).values()} == {dtype}


def test_shapes_that_are_no_whole_groups():
    layer = nn.Linear(38, 61)
    W, x = layer.weight.detach().clone(), torch.randn(3, 38)
    report = lf.quantize_base(layer)
    assert report.layers[0].path == ""
    assert (report.layers[0].groups, report.layers[0].codes) == (37, 38 * 61 // 2)
    torch.testing.assert_close(layer(x), x @ reference(W, {}).T + layer.bias)


def test_eight_bits_round_to_the_nearest_level():  # the one by rows in float16
    for options, width in ((ROWS, 256), (GROUPS, 64)):
        layer = nn.Linear(256, 16)
        W = layer.weight.detach().clone()
        lf.quantize_base(layer, **options)
        lf.dequantize(layer)
        step = W.view(16, -1, width).abs().amax(-1, keepdim=True) / 127
        assert ((layer.weight - W).view(16, -1, width).abs() <= 0.6 * step).all()


def test_zero_weights():
    for options in (*FOUR[:2], ROWS):
        layer = nn.Linear(64, 8)
        nn.init.zeros_(layer.weight)
        report = lf.quantize_base(layer, **options)
        assert (report.weight_error, report.layers[0].forward_error) == (0, 0)
        torch.testing.assert_close(layer(torch.ones(2, 64)), layer.bias.expand(2, 8))


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
    expected = reference(W, {"double_quant": double_quant})
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
    expected = reference(W.T.contiguous(), {})
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


# Attaching


def with_updates(model, mix):
    """The weights of a model with W + Σ c ΔW."""
    weights = dict(model.state_dict())
    for a, c in mix:
        for path, u in a.modules.items():
            weights[f"{path}.weight"] = weights[f"{path}.weight"] + c * u.dense()
    return weights


@every
def test_attached_outputs_by_the_definition(wide, adapter, x, options):
    base = dense(wide, options)
    lf.quantize_base(wide, **options)
    plain = wide(x)
    live = lf.attach(wide, {"a": adapter})
    assert torch.equal(wide(x), plain)
    with live.use("a", c=0.5):
        expected = functional_call(base, with_updates(base, [(adapter, 0.5)]), (x,))
        torch.testing.assert_close(wide(x), expected, **tolerance(options))
        assert not torch.allclose(wide(x), plain, atol=0.1)
    with live.use("a", c=0):
        assert torch.equal(wide(x), plain)
    with live.use(["a", None, {"a": -1.0}] * 2):
        rows = wide(x)
    if options is not ROWS:  # rounds the inputs, whose scale depends on nothing but the row
        torch.testing.assert_close(rows[1], plain[1], rtol=0, atol=1e-5)
    assert torch.equal(live.detach()(x), plain)


@every
def test_the_loss_falls_and_the_base_stays(wide, x, options):
    lf.quantize_base(wide, **options)
    codes = {path: m.weight.data.clone() for path, m in linears(wide).items()}
    live = lf.attach(wide.train(), lf.LoRA(rank=8, alpha=16, seed=0))
    assert {id(p) for p in wide.parameters() if p.requires_grad} == set(map(id, live.parameters()))
    optimizer = torch.optim.AdamW(live.parameters(), lr=1e-2)
    losses = []
    for _ in range(12):
        loss = nn.functional.cross_entropy(wide(x).flatten(0, 1), x.roll(-1, 1).flatten())
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert losses[-1] < 0.7 * losses[0]
    for path, layer in linears(live.detach()).items():
        now, then = layer.weight.data, codes[path]
        if options is GROUPS:
            now, then = now.dequantize(), then.dequantize()
        assert torch.equal(now, then)


@every
def test_pissa_begins_with_the_dequantised_weight(wide, x, options):
    expected = dense(wide, options)
    lf.quantize_base(wide, **options)
    plain = wide(x)
    live = lf.attach(wide, lf.LoRA(rank=4, alpha=4, init="pissa"))
    torch.testing.assert_close(wide(x), plain, rtol=0, atol=1e-4)
    for path, factors in live.trained_modules("default").items():
        U, S, Vh = torch.linalg.svd(expected.get_submodule(path).weight.double())
        wanted = (U[:, :4] * S[:4]) @ Vh[:4]
        torch.testing.assert_close((factors.B @ factors.A).double(), wanted, rtol=0, atol=1e-5)
    live.detach()
    live = lf.attach(wide, lf.PiSSA(rank=4, std=0.1, seed=0))
    for path, module in live.trained_modules("default").items():
        S = torch.linalg.svdvals(expected.get_submodule(path).weight)
        torch.testing.assert_close(module.S, S[:4], rtol=0, atol=1e-5)
    with live.use("default", c=0):
        assert torch.equal(wide(x), plain)
    assert not torch.allclose(wide(x), plain, atol=1e-3)


@every
def test_merging_is_refused_until_the_base_is_float(wide, adapter, x, options):
    base = dense(wide, options)
    lf.quantize_base(wide, **options)
    live = lf.attach(wide, {"a": adapter})
    plain = wide(x)
    for merge in (lambda: live.merge({"a": 1.0}), lambda: live.verify(x)):
        with pytest.raises(RefusedError, match=r"'layers\.0\.up' is quantised.*lf\.dequantize"):
            merge()
    assert live.merged == {}
    assert torch.equal(wide(x), plain)
    lf.dequantize(wide)  # the adapters stay
    floats = wide(x)
    torch.testing.assert_close(floats, base(x), rtol=0, atol=1e-5)
    live.merge({"a": 1.0})
    expected = functional_call(base, with_updates(base, [(adapter, 1)]), (x,))
    torch.testing.assert_close(wide(x), expected, rtol=0, atol=1e-4)
    live.unmerge()
    assert torch.equal(wide(x), floats)
    live.use("a")
    assert live.verify(x) < 1e-4
    assert type(live.detach().layers[0]["up"]) is nn.Linear


def test_a_base_that_is_dequantised_under_a_trained_adapter_stays_frozen(wide, x):
    lf.quantize_base(wide)
    live = lf.attach(wide, lf.LoRA(rank=2))
    lf.dequantize(wide)
    assert {id(p) for p in wide.parameters() if p.requires_grad} == set(map(id, live.parameters()))
    live.detach()
    assert all(p.requires_grad for p in wide.parameters())


def test_save_and_resume_on_a_quantised_base(wide, x, tmp_path):
    lf.quantize_base(wide)
    live = lf.attach(wide, lf.LoRA(rank=2, seed=0))
    for p in live.parameters():
        nn.init.normal_(p, generator=torch.Generator().manual_seed(1))
    y = wide(x)
    live.save(tmp_path / "a")
    live.detach()
    live = lf.attach(wide, lf.load(tmp_path / "a"))
    with live.use("default"):
        torch.testing.assert_close(wide(x), y, rtol=0, atol=1e-4)


@pytest.mark.parametrize("options", [{}, GROUPS], ids=named)
def test_one_graph_for_all_adapters(wide, adapter, x, options):
    lf.quantize_base(wide, **options)
    live = lf.attach(wide, {"a": adapter, "b": -adapter})
    graphs = []

    def backend(module, inputs):
        graphs.append(module)
        return module.forward

    torch._dynamo.reset()
    compiled = torch.compile(wide, backend=backend)
    for use in (["a", "b"], ["b", None], ["a", "a"]):
        live.use([*use, None] * 2, c=0.5)
        with torch.no_grad():
            compiled(x)
            counted = len(graphs)
            torch.testing.assert_close(compiled(x), wide(x), rtol=0, atol=1e-5)
    assert len(graphs) == counted
    torch._dynamo.reset()


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
        ({**GROUPS, "group_size": 256}, "rows of 64 are no whole groups.*64, 32 or 'row'"),
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


def test_quantise_first_and_attach_then(wide, adapter, fingerprint):
    live = lf.attach(wide, adapter)
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


# Peers


@pytest.mark.parametrize("options", [{}, {"double_quant": True}, ROWS], ids=named)
@pytest.mark.filterwarnings(r"ignore:.*:UserWarning:peft(\..*)?")
def test_peft_on_the_same_base(wide, x, options):
    peft = pytest.importorskip("peft")
    lf.quantize_base(wide, **options)
    setattr(wide, f"is_loaded_in_{options.get('bits', 4)}bit", True)
    config = peft.LoraConfig(
        r=4, lora_alpha=8, target_modules=["up", "down"], init_lora_weights=False
    )
    with torch.random.fork_rng():
        torch.manual_seed(3)
        theirs = peft.get_peft_model(copy.deepcopy(wide), config).eval()
    assert any("bnb" in type(m).__module__ for m in theirs.modules() if hasattr(m, "lora_A"))
    modules = {
        path.removeprefix("base_model.model."): lf.LowRank(
            m.lora_A["default"].weight.detach(), m.lora_B["default"].weight.detach(), 2.0
        )
        for path, m in theirs.named_modules()
        if hasattr(m, "lora_A")
    }
    live = lf.attach(wide, lf.Adapter(modules))
    with torch.no_grad(), live.use("default"):
        torch.testing.assert_close(wide(x), theirs(x), rtol=0, atol=1e-5)


@pytest.mark.parametrize("bits", [4, 8])
def test_the_base_as_transformers_quantises_it(bits):
    tf = pytest.importorskip("transformers")
    from lorafold.demo.model import data_dir

    config = tf.BitsAndBytesConfig(
        load_in_4bit=bits == 4,
        load_in_8bit=bits == 8,
        bnb_4bit_quant_type="nf4",
        bnb_4bit_compute_dtype=torch.float32,
        llm_int8_threshold=0.0,
    )
    options = {"dtype": torch.float32, "device_map": "cpu"}
    load = tf.AutoModelForCausalLM.from_pretrained
    theirs = load(data_dir() / "base", quantization_config=config, **options)
    mine = load(data_dir() / "base", **options)
    lf.quantize_base(mine, bits)
    tokens = torch.arange(32)[None]
    adapter = lf.load(data_dir() / "adapters" / "roman")
    outputs = []
    for model in (theirs, mine):
        live = lf.attach(model, adapter)
        with torch.no_grad(), live.use("default"):
            outputs.append(model(tokens).logits)
            lf.dequantize(model)
            live.merge()
            off = (model(tokens).logits - outputs[-1]).norm() / outputs[-1].norm()
        assert off < (1e-5 if bits == 4 else 0.03)  # in 8 bits the inputs were rounded as well
    assert torch.equal(*outputs)
