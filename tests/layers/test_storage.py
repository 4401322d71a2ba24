"""A quantised base: what it stores and loses, what attaches to it, and the way back.

The reference is what bitsandbytes stores of each weight, codes and scales, multiplied out by hand.
"""

import copy
import re
import warnings
from dataclasses import replace

import pytest
import torch
from torch import nn
from torch.func import functional_call

import lorafold as lf
from lorafold.errors import MismatchError, RefusedError
from lorafold.layers import misread, storage

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
    return codes_times_scales(codes, state)


def codes_times_scales(codes, state):
    """By numbers, one group after the other."""
    scales = state.absmax
    if state.nested:
        inner = state.state2
        grouped = zip(scales.split(256), inner.absmax, strict=True)
        scales = torch.cat([inner.code[c.long()] * s for c, s in grouped]) + state.offset
    pairs = [(int(b) >> 4, int(b) & 15) for b in codes.flatten()]
    numbers = state.code[torch.tensor(pairs).flatten()[: state.shape.numel()]]
    groups = zip(numbers.split(state.blocksize), scales, strict=True)
    return torch.cat([g * s for g, s in groups]).reshape(state.shape)


def linears(model):
    return {
        path: m
        for path, m in model.named_modules()
        if isinstance(m, nn.Linear) and path != "lm_head"
    }


def dense(model, options):
    """A copy of a model with its linear weights as the reference has them."""
    found = copy.deepcopy(model)
    for layer in linears(found).values():
        layer.weight.data = reference(layer.weight.data, options).to(layer.weight.dtype)
    return found


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


def test_a_base_in_four_bits_and_a_library_against_sixteen_and_files(tmp_path, make_adapter):
    model = nn.Sequential(nn.Embedding(10, 64), nn.Linear(64, 32, dtype=torch.float16))
    model.register_buffer("positions", torch.arange(10))
    plain = lf.quantize_base(model)
    assert plain.in_16_bits == 2 * (10 * 64 + 32 * 64 + 32) + 8 * 10
    adapters = {name: make_adapter({"1": (32, 64)}, 4, seed=k) for k, name in enumerate("abc")}
    for name, adapter in adapters.items():
        lf.save(adapter, tmp_path / name)
    lib = lf.fold([tmp_path / name for name in adapters], tmp_path / "lib")
    found = plain.with_adapters(lib)
    on_disk = sum(p.stat().st_size for p in (tmp_path / "lib").iterdir())
    files = sum(p.stat().st_size for name in adapters for p in (tmp_path / name).iterdir())
    assert found.adapters == lib.nbytes == on_disk
    assert found.files == lib.file_bytes == files
    assert found.total == plain.after + on_disk
    assert found.plain == plain.in_16_bits + files
    assert found.total_ratio == found.plain / found.total
    assert f"{found.total_ratio:.2f} times less" in str(found)
    assert f"= {found.plain:,}" in str(found)
    assert (plain.files, plain.adapters) == (0, 0)
    assert plain.total_ratio == plain.in_16_bits / plain.after
    # What is attached is no file: that is counted as it runs.
    live = lf.attach(model, {"a": adapters["a"]})
    assert found.with_adapters(live).files == 0
    for odd in (None, "lib", model, 7):
        with pytest.raises(MismatchError, match="with_adapters takes what lf.attach returned, or"):
            plain.with_adapters(odd)


def test_bytes_by_hand():
    model = nn.Sequential(nn.Embedding(10, 64), nn.Linear(64, 32), nn.LayerNorm(32))
    report = lf.quantize_base(model)
    (layer,) = report.layers
    assert (layer.path, layer.shape, layer.before) == ("1", (32, 64), 4 * 64 * 32)
    assert (layer.codes, layer.groups) == (64 * 32 // 2, 32)
    assert layer.scales == 4 * 32 + 4 * 16  # a scale for each group, and the table of 16 levels
    rest = 4 * (10 * 64 + 32 + 2 * 32)
    assert report.before == layer.before + rest
    assert report.after == layer.codes + layer.scales + rest
    assert report.total == report.after
    assert report.ratio == 8192 / (1024 + 192)
    text = str(report)
    assert " 32×64   8,192  1,024     192   6.74 " in text
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
    assert live.summary().total == 10 * 64 + 64 * 32 + 32 + 2 * 32


def test_bytes_of_the_other_kinds():
    def layer(**options):
        return lf.quantize_base(nn.Linear(512, 64), **options).layers[0]

    twice = layer(double_quant=True)  # a byte for each scale, a scale for 256 of them, two tables
    assert (twice.groups, twice.scales) == (512, 512 + 4 * 2 + 4 * 256 + 4 * 16 + 4)
    rows = layer(bits=8)
    assert (rows.codes, rows.groups, rows.scales) == (512 * 64, 64, 4 * 64)
    groups = layer(**GROUPS, group_size=128)
    assert (groups.codes, groups.groups) == (512 * 64, 256)
    large = layer(group_size=512)
    assert (large.codes, large.groups) == (512 * 32, 64)


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
    layer = nn.Linear(1024, 64)
    W = torch.randn(64, 1024, generator=torch.Generator().manual_seed(0))

    def error(**options):
        copied = copy.deepcopy(layer)
        copied.weight.data = W.clone()
        return lf.quantize_base(copied, **options).weight_error

    assert 0.090 < error() < 0.094
    assert error(group_size=32) < error() < error(group_size=256) < error(group_size=1024)
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
    for path, factors in live._state.trained("default").fresh.items():
        U, S, Vh = torch.linalg.svd(expected.get_submodule(path).weight.double())
        wanted = (U[:, :4] * S[:4]) @ Vh[:4]
        # Wedin: directions move by the error of the matrix over the gap to those left out.
        rounding = 8 * torch.finfo(torch.float32).eps * S[0]
        off = torch.linalg.matrix_norm((factors.B @ factors.A).double() - wanted, 2)
        assert off < rounding * (2 + 2 * S[0] / (S[3] - S[4]))
    live.detach()
    live = lf.attach(wide, lf.PiSSA(rank=4, std=0.1, seed=0))
    for path, module in live._state.trained("default").fresh.items():
        S = torch.linalg.svdvals(expected.get_submodule(path).weight)
        torch.testing.assert_close(module.S, S[:4], rtol=1e-5, atol=0)
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
        nn.init.normal_(p, std=0.2, generator=torch.Generator().manual_seed(1))
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
    outputs, errors = [], []
    for model in (theirs, mine):
        live = lf.attach(model, adapter)
        with torch.no_grad():
            bare = model(tokens).logits
            live.use("default")
            outputs.append(model(tokens).logits)
            lf.dequantize(model)
            live.merge()
            off = relative(outputs[-1], model(tokens).logits)
            live.unmerge()
            live.use(None)
            # What the kernel itself loses to products of the same weights in float32: in 8 bits it
            # rounds its inputs; in 4 bits, where a processor has AVX512-BF16, all to bfloat16.
            errors.append(relative(bare, model(tokens).logits))
        assert off < 3 * errors[-1] + 1e-5
    assert errors[1] < 0.03 if bits == 8 else errors[1] < 1e-5
    assert relative(*outputs) < 3 * sum(errors) + 1e-5


def relative(found, wanted):
    return float((found - wanted).norm() / wanted.norm())


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_the_update_is_added_to_what_the_kernel_gives(make_update, dtype):
    # In evaluation, in whatever precision the kernel computes.
    layer = bnb.nn.LinearNF4(64, 32, compute_dtype=dtype)
    layer.load_state_dict({"weight": torch.randn(32, 64), "bias": torch.randn(32)})
    layer.to("cpu").eval()
    u = make_update(32, 64, 4, scale=2.0)
    x = torch.randn(5, 64)
    with torch.no_grad():
        bare = layer(x)
        live = lf.attach(layer, lf.Adapter({"": u}))
        with live.use("default", c=-0.5):
            change = layer(x).double() - bare.double()
    wanted = -0.5 * 2.0 * (x.double() @ u.A.T.double() @ u.B.T.double())
    torch.testing.assert_close(change, wanted, rtol=1e-5, atol=1e-5)


# Rows that are no whole number of groups

RAGGED = [((8, 96), 64), ((192, 96), 128), ((7, 100), 64), ((64, 64), 256), ((5, 33), 32)]


@pytest.mark.parametrize("double_quant", [False, True])
@pytest.mark.parametrize("kind", ["nf4", "fp4"])
@pytest.mark.parametrize(("shape", "size"), RAGGED)
def test_rows_that_groups_do_not_divide_are_right_or_refused(
    shape, size, kind, double_quant, fingerprint
):
    layer = nn.Linear(*shape[::-1])
    with torch.no_grad():  # rows of unequal size, so that another row's scale is far off
        layer.weight.copy_(torch.randn(shape) * torch.logspace(-1, 1, shape[0])[:, None])
    options = {"kind": kind, "group_size": size, "double_quant": double_quant}
    W, before = layer.weight.detach().clone(), fingerprint(layer)
    codes, state = F.quantize_4bit(W, blocksize=size, quant_type=kind)
    wrong = relative(F.dequantize_4bit(codes, state), codes_times_scales(codes, state))
    if wrong > 1e-3:  # this processor's kernel is at fault
        with pytest.raises(MismatchError, match=r"module '' can't be quantised: .* in groups of"):
            lf.quantize_base(layer, **options)
        assert fingerprint(layer) == before
        return
    stored = reference(W, options)
    report = lf.quantize_base(layer, **options)
    assert report.weight_error < 0.2
    x = torch.randn(6, shape[1])
    with torch.no_grad():
        assert relative(layer(x), x @ stored.T + layer.bias) < 1e-5
    assert torch.equal(lf.dequantize(layer).weight, stored)


def lying(layer):
    """A kernel that takes the scales of other rows."""
    return storage.BNB4.kernel(layer).roll(1, 0)


@pytest.mark.parametrize(
    ("width", "remedy"), [(96, "group_size 32$"), (72, "leave it out.*bits=8")]
)
def test_a_kernel_that_reads_something_else_is_refused(width, remedy, fingerprint):
    model = nn.Sequential(nn.Linear(64, width), nn.Linear(width, 16))
    before = fingerprint(model)
    with storage.STORAGES.including(replace(storage.BNB4, kernel=lying)):
        with pytest.raises(MismatchError, match=r"module '0' can't be quantised: its rows of 64"):
            lf.quantize_base(model, group_size=128)
        with pytest.raises(MismatchError, match=rf"module '1' .*: its rows of {width}.*{remedy}"):
            lf.quantize_base(model, targets="1")
    assert fingerprint(model) == before


def by_others(width, size, double_quant=False):
    layer = bnb.nn.Linear4bit(width, 64, quant_type="nf4", compress_statistics=double_quant)
    with torch.no_grad():
        layer.weight.copy_(torch.randn(64, width) * torch.logspace(-1, 1, 64)[:, None])
    layer.weight.blocksize = size
    layer.to("cpu")
    state = layer.weight.quant_state
    wrong = F.dequantize_4bit(layer.weight.data, state)
    return layer, relative(wrong, codes_times_scales(layer.weight.data, state))


@pytest.mark.parametrize("double_quant", [False, True])
def test_attach_warns_of_a_base_that_others_quantised_in_such_groups(double_quant):
    layer, wrong = by_others(96, 128, double_quant)
    model = nn.Sequential(layer, by_others(64, 64)[0])
    stored = codes_times_scales(layer.weight.data, layer.weight.quant_state)
    if wrong > 1e-3:
        with pytest.warns(UserWarning, match=rf"module '0' computes with .*{wrong:.0%} off"):
            live = lf.attach(model, lf.LoRA(rank=2, targets="0"))
    else:
        live = lf.attach(model, lf.LoRA(rank=2, targets="0"))  # warnings are errors
    lf.dequantize(live.detach())
    assert torch.equal(model[0].weight, stored)  # what is stored is whole


def test_a_state_that_the_kernel_does_not_read_is_noticed():
    # The kernels have the levels of nf4 in them: with others in its state, a weight is misread.
    layer, wrong = by_others(96, 32)
    assert wrong == misread.misread(layer) == 0
    layer.weight.quant_state.code = -layer.weight.quant_state.code
    assert misread.misread(layer) == pytest.approx(2, abs=1e-3)
    with warnings.catch_warnings():  # rows of whole groups are not looked at
        warnings.simplefilter("error")
        lf.attach(layer, lf.LoRA(rank=2, targets=re.compile("^$"))).detach()
    layer, _ = by_others(96, 64)
    layer.weight.quant_state.code = -layer.weight.quant_state.code
    with pytest.warns(UserWarning, match=r"computes with another weight .*lf\.dequantize") as found:
        lf.attach(layer, lf.LoRA(rank=2, targets=re.compile("^$"))).detach()
    assert found[0].filename == __file__
