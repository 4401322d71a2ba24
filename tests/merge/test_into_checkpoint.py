"""Merging into a checkpoint: the bits of `apply_to`, whole or not at all, in little memory."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import warnings
from pathlib import Path

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file

import lorafold as lf
from lorafold.demo.model import data_dir, logits
from lorafold.files import safetensors as ranges
from lorafold.merge import into_checkpoint as export
from lorafold.parts import PREFIX

ROOT = Path(lf.__file__).parents[1]
BASE = data_dir() / "base"
ROMAN = data_dir() / "adapters" / "roman"
INDEX = "model.safetensors.index.json"
Q = "layers.{}.q"


def written(out):
    """{key: tensor} of all safetensors files at the top of a folder."""
    found = {}
    for path in sorted(Path(out).glob("*.safetensors")):
        found |= load_file(path)
    return found


def assert_same_bits(found, wanted):
    assert found.keys() == wanted.keys()
    for key, t in wanted.items():
        assert found[key].dtype == t.dtype, key
        assert found[key].shape == t.shape, key
        assert bits(found[key]) == bits(t), key
    return True


def bits(t):
    return bytes(t.contiguous().reshape(-1).view(torch.uint8).numpy().data)


def quietly_applied(adapter, state):
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return adapter.apply_to(state)


# The demo's base


def test_the_demo_base_gets_the_bits_of_apply_to(tmp_path):
    merged = lf.merge_into_weights(BASE, ROMAN, tmp_path / "out")
    adapter, base = lf.load(ROMAN), load_file(BASE / "model.safetensors")
    assert_same_bits(written(tmp_path / "out"), adapter.apply_to(base))
    assert sorted(merged.changed) == sorted(f"{p}.weight" for p in adapter)
    assert merged.unplaced == {}
    assert (merged.untied, merged.left_out) == (None, ())
    assert (tmp_path / "out" / "config.json").read_bytes() == (BASE / "config.json").read_bytes()
    assert os.listdir(tmp_path) == ["out"]


def test_its_weights_by_the_definition_in_float64(tmp_path, dense):
    merged = lf.merge_into_weights(BASE, ROMAN, tmp_path / "out", c=-0.5)
    adapter, base = lf.load(ROMAN), load_file(BASE / "model.safetensors")
    found = written(tmp_path / "out")
    error = norm = 0.0
    for path, u in adapter.items():
        key = f"{path}.weight"
        exact = base[key].double() - 0.5 * dense(u)
        # float16 keeps 11 binary digits
        torch.testing.assert_close(found[key].double(), exact, rtol=2**-11, atol=1e-7)
        error += float((found[key].double() - exact).norm()) ** 2
        norm += float((0.5 * dense(u)).norm()) ** 2
    assert merged.rounding == pytest.approx((error / norm) ** 0.5, rel=1e-3)
    assert merged.rounding > 1e-5


def test_it_runs_as_the_attached_model_does(tmp_path):
    transformers = pytest.importorskip("transformers")
    lf.merge_into_weights(BASE, ROMAN, tmp_path / "out", dtype=torch.float32)
    tokens = torch.frombuffer(bytearray(b"7 in Roman numerals is VII."), dtype=torch.uint8)
    tokens = tokens.long()[None]
    build = transformers.LlamaForCausalLM.from_pretrained
    model = build(BASE, dtype=torch.float32).eval()
    twin = build(tmp_path / "out", dtype="auto").eval()
    assert twin.dtype == torch.float32
    live = lf.attach(model, lf.load(ROMAN))
    with torch.no_grad():
        plain = model(tokens).logits
        with live.use("default"):
            attached = model(tokens).logits
        merged = twin(tokens).logits
    torch.testing.assert_close(merged, attached, rtol=1e-5, atol=1e-4)
    assert (attached - plain).abs().max() > 0.1  # the comparison can fail
    # In the base's own float16, to that precision; by the demo's own model.
    lf.merge_into_weights(BASE, ROMAN, tmp_path / "half")
    config = json.loads((tmp_path / "half" / "config.json").read_text())
    half = {key: t.float() for key, t in written(tmp_path / "half").items()}
    found = logits(config, half, tokens)
    torch.testing.assert_close(found, attached, rtol=0.01, atol=0.05)


# Files


@pytest.mark.parametrize("shards", [1, 3])
def test_names_headers_and_what_is_not_touched_stay(small_state, shards, folder, small, tmp_path):
    state = small_state(torch.bfloat16)
    base = folder(state, shards=shards)
    merged = lf.merge_into_weights(base, small, tmp_path / "out")
    names = sorted(p.name for p in base.iterdir())
    assert sorted(p.name for p in (tmp_path / "out").iterdir()) == names
    assert list(merged.files) == [n for n in names if n.endswith(".safetensors")]
    for name in merged.files:
        old, new = (base / name).read_bytes(), (tmp_path / "out" / name).read_bytes()
        head = 8 + int.from_bytes(old[:8], "little")
        assert old[:head] == new[:head]  # keys, shapes, dtypes, places, metadata
        with safe_open(tmp_path / "out" / name, "pt") as f:
            assert f.metadata()["by"] == "a test"
    if shards > 1:
        assert (tmp_path / "out" / INDEX).read_bytes() == (base / INDEX).read_bytes()
    assert_same_bits(written(tmp_path / "out"), small.apply_to(state))
    assert merged.nbytes == sum((base / n).stat().st_size for n in merged.files)
    assert merged.tensors == len(state)


def test_an_adapter_may_be_a_path_and_progress_is_told(small_state, folder, small, tmp_path):
    base = folder(small_state(), shards=2)
    lf.save(small, tmp_path / "adapter")
    told = []
    lf.merge_into_weights(
        base, tmp_path / "adapter", tmp_path / "out", progress=lambda *step: told.append(step)
    )
    assert_same_bits(written(tmp_path / "out"), small.apply_to(small_state()))
    total = sum(t.nbytes for t in small_state().values())
    assert told[-1][:2] == (total, total)
    assert [done for done, _, _ in told] == sorted(done for done, _, _ in told)
    assert {stage for _, _, stage in told} == {p.name for p in base.glob("*.safetensors")}


# Every kind of module and extra


def experts(name, count, transposed=False):
    shape = (4, 6) if transposed else (6, 4)
    modules, layouts = {}, {}
    for e in range(count):
        modules[f"{name}[{e}]"] = lf.LowRank(
            torch.randn(2, shape[1]), torch.randn(shape[0], 2), 0.5
        )
        layouts[f"{name}[{e}]"] = lf.Layout(
            "expert", parameter="up", expert=(e, count), transposed=transposed
        )
    return modules, layouts


def kinds_of_modules():
    u = lf.LowRank(torch.randn(2, 4), torch.randn(6, 2), 1.5)
    square = lf.LowRank(torch.randn(2, 4), torch.randn(4, 2))
    flat = lf.LowRank(torch.randn(2, 12), torch.randn(5, 2))
    tokens = lf.LowRank(torch.randn(2, 9), torch.randn(4, 2))
    W = torch.randn
    yield "linear", {"a.q": u}, {}, {"a.q.weight": W(6, 4)}, {}
    yield "transposed", {"a.q": u}, {}, {"a.q.weight": W(4, 6)}, {}
    stored = {"a.q.weight": W(4, 4), "b.q.weight": W(4, 6)}
    yield "square among kin", {"a.q": square, "b.q": u}, {}, stored, {}
    config = {"fan_in_fan_out": True}
    yield "fan_in_fan_out", {"a.q": square}, {}, {"a.q.weight": W(4, 4)}, config
    conv = {"c": lf.Layout("conv", (3, 2, 2))}
    yield "conv", {"c": flat}, conv, {"c.weight": W(5, 3, 2, 2)}, {}
    embedding = {"e": lf.Layout("embedding")}
    yield "embedding", {"e": tokens}, embedding, {"e.weight": W(9, 4)}, {}
    attention = {"m": lf.Layout(parameter="in_proj_weight")}
    yield "attention", {"m": u}, attention, {"m.in_proj_weight": W(6, 4)}, {}
    yield "experts", *experts("x.up", 3), {"x.up": W(3, 6, 4)}, {}
    yield "experts stored (in, out)", *experts("x.up", 3, True), {"x.up": W(3, 6, 4)}, {}
    half = {"a.q": u.to(dtype=torch.float16)}
    yield "half factors", half, {}, {"a.q.weight": W(6, 4)}, {}
    double = {"a.q": u.to(dtype=torch.float64)}
    yield "double factors", double, {}, {"a.q.weight": W(6, 4)}, {}


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16, torch.float64])
def test_every_kind_of_module_as_apply_to(dtype, folder, tmp_path, monkeypatch):
    monkeypatch.setattr(export, "_CHUNK", 8)  # two rows at a time
    torch.manual_seed(0)
    for number, (what, modules, layouts, weights, config) in enumerate(kinds_of_modules()):
        state = {key: t.to(dtype) for key, t in weights.items()} | {"other": torch.ones(2, 2)}
        adapter = lf.Adapter(modules, layouts=layouts, config=config)
        out = tmp_path / f"out{number}"
        merged = lf.merge_into_weights(folder(state, name=f"b{number}"), adapter, out)
        assert_same_bits(written(out), adapter.apply_to(state))
        assert set(merged.changed) == set(state) - {"other"}, what
        wide = {torch.float32, torch.float64} if what != "double factors" else {torch.float64}
        assert (merged.rounding == 0) == (dtype in wide), what


def kinds_of_extras():
    n = torch.randn
    saved = {f"{PREFIX}head.weight": n(3, 4), f"{PREFIX}head.bias": n(3)}
    yield "saved module", saved, {"modules_to_save": ["head"]}
    wrapped = {f"{PREFIX}head.modules_to_save.weight": n(3, 4)}
    twin = {f"{PREFIX}head.original_module.weight": n(3, 4)}
    yield "wrapped", wrapped | twin, {"modules_to_save": ["head"]}
    yield "bias", {f"{PREFIX}layers.0.q.bias": n(6)}, {"bias": "lora_only"}
    lora_bias = {f"{PREFIX}layers.0.q.lora_B.bias": n(6)}
    yield "lora bias", lora_bias, {"lora_bias": True, "r": 2, "lora_alpha": 3}
    both = {f"{PREFIX}layers.0.q.bias": n(6), **lora_bias}
    yield "both biases", both, {"bias": "all", "r": 2, "lora_alpha": 3}
    tokens = {f"{PREFIX}embed_tokens.token_adapter.trainable_tokens_delta": n(2, 4)}
    yield "trained tokens", tokens, {"trainable_token_indices": [1, 7]}
    whole = {f"{PREFIX}embed_tokens.weight": n(9, 4)}
    yield "base weight", whole, {}
    yield "base weight and tokens", whole | tokens, {"trainable_token_indices": [1, 7]}
    yield "updated weight", {f"{PREFIX}layers.0.q.base_layer.weight": n(6, 4)}, {}


def state_with_extras(state):
    more = {
        "head.weight": torch.randn(3, 4),
        "head.bias": torch.randn(3),
        "layers.0.q.bias": torch.randn(6),
        "lm_head.weight": torch.randn(9, 4),
    }
    dtype = state["norm.weight"].dtype
    return state | {key: t.to(dtype) for key, t in more.items()}


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("with_modules", [True, False])
def test_every_kind_of_extra_as_apply_to(small_state, dtype, with_modules, folder, small, tmp_path):
    torch.manual_seed(0)
    state = state_with_extras(small_state(dtype))
    base = folder(state, shards=2)
    for what, extras, config in kinds_of_extras():
        adapter = lf.Adapter(small.modules if with_modules else {}, extras, config)
        merged = lf.merge_into_weights(base, adapter, tmp_path / what)
        wanted = adapter.apply_to(state)
        assert_same_bits(written(tmp_path / what), wanted)
        changed = {key for key in state if bits(wanted[key]) != bits(state[key])}
        assert set(merged.changed) == changed
        assert len(changed) >= 1 + with_modules or what == "updated weight"


def test_a_bases_extras_of_training_alone_and_what_has_no_place(
    small_state, folder, small, tmp_path
):
    extras = {
        f"{PREFIX}{Q.format(0)}.lora_velora_embed.x": torch.ones(2),
        f"{PREFIX}score.weight": torch.ones(2, 4),
    }
    more = lf.LowRank(torch.randn(1, 4), torch.randn(6, 1))
    modules = {**small.modules, Q.format(7): more}
    adapter = lf.Adapter(modules, extras, {"modules_to_save": ["score"]})
    state = small_state()
    base = folder(state, config={"model_type": "small"})
    with pytest.raises(lf.MismatchError, match=r"2 parts .* have no place in .*layers\.7.*partial"):
        lf.merge_into_weights(base, adapter, tmp_path / "out")
    assert not (tmp_path / "out").exists()
    merged = lf.merge_into_weights(base, adapter, tmp_path / "out", partial=True)
    config = json.loads((tmp_path / "out" / "config.json").read_text())
    assert config["lorafold"] == {"partial_merge": True, "left_out": list(merged.unplaced)}
    assert merged.unplaced == {
        Q.format(7): "not in the base",
        f"{PREFIX}score.weight": "not in the base",
    }
    assert_same_bits(written(tmp_path / "out"), quietly_applied(adapter, state))


# c and dtype


def test_c_is_the_dial(small_state, folder, small, tmp_path):
    state = small_state(torch.bfloat16)
    state["norm.weight"] = torch.tensor([-0.0, 1, 2, 3], dtype=torch.bfloat16)
    base = folder(state)
    for c in (-0.5, 2, 0.3):
        lf.merge_into_weights(base, small, tmp_path / f"{c}", c=c)
        assert_same_bits(written(tmp_path / f"{c}"), (c * small).apply_to(state))
    merged = lf.merge_into_weights(base, small, tmp_path / "none", c=0)
    assert (merged.changed, merged.rounding) == ((), 0)
    name = "model.safetensors"
    assert (tmp_path / "none" / name).read_bytes() == (base / name).read_bytes()


def test_with_another_c_what_is_whole_goes_that_share_of_the_way(small_state, folder, tmp_path):
    torch.manual_seed(0)
    state = state_with_extras(small_state())
    base = folder(state)
    for what, extras, config in kinds_of_extras():
        adapter = lf.Adapter({}, extras, config)
        full = adapter.apply_to(state)
        lf.merge_into_weights(base, adapter, tmp_path / what, c=-0.25)
        for key, t in written(tmp_path / what).items():
            wanted = state[key].double() - 0.25 * (full[key].double() - state[key].double())
            torch.testing.assert_close(t.double(), wanted, rtol=1e-6, atol=1e-6)


def test_a_saved_head_at_half_strength_is_that_of_the_attached_model(folder, tmp_path):
    torch.manual_seed(0)
    model = torch.nn.Sequential(torch.nn.Linear(4, 6), torch.nn.Linear(6, 3))
    u = lf.LowRank(torch.randn(2, 4), torch.randn(6, 2))
    extras = {f"{PREFIX}1.weight": torch.randn(3, 6), f"{PREFIX}1.bias": torch.randn(3)}
    adapter = lf.Adapter({"0": u}, extras, {"modules_to_save": ["1"]})
    lf.merge_into_weights(folder(model.state_dict()), adapter, tmp_path / "out", c=0.5)
    x = torch.randn(5, 4)
    live = lf.attach(model, adapter)
    with live.use("default", c=0.5):
        attached = model(x)
    live.detach()
    model.load_state_dict(written(tmp_path / "out"))
    torch.testing.assert_close(model(x), attached)


def test_a_wider_dtype_keeps_the_sum_and_a_narrower_one_rounds_once(
    small_state, folder, small, tmp_path
):
    wide, half = small_state(), small_state(torch.bfloat16)
    bases = folder(wide, name="wide"), folder(half, name="half")
    kept = lf.merge_into_weights(bases[1], small, tmp_path / "a", dtype=torch.float32)
    assert_same_bits(
        written(tmp_path / "a"), small.apply_to({k: t.float() for k, t in half.items()})
    )
    assert kept.rounding == 0
    lf.merge_into_weights(bases[0], small, tmp_path / "b", dtype=torch.bfloat16)
    once = {k: t.bfloat16() for k, t in small.apply_to(wide).items()}
    assert_same_bits(written(tmp_path / "b"), once)
    lf.merge_into_weights(bases[1], small, tmp_path / "c", dtype=torch.float16)
    through = small.apply_to({k: t.float() for k, t in half.items()})
    assert_same_bits(written(tmp_path / "c"), {k: t.half() for k, t in through.items()})
    zero = lf.merge_into_weights(bases[0], small, tmp_path / "d", c=0, dtype=torch.float16)
    assert_same_bits(written(tmp_path / "d"), {k: t.half() for k, t in wide.items()})
    assert zero.changed == ()


# Whole or not at all, and one tensor at a time


def test_stopped_half_way_nothing_is_left(small_state, folder, small, tmp_path):
    base = folder(small_state(), shards=2)
    (tmp_path / "kept").mkdir()
    (tmp_path / "kept" / "model.safetensors").write_text("old")
    before = sorted(tmp_path.rglob("*"))

    def stop(done, total, stage):
        if done > total / 2:
            raise KeyboardInterrupt

    for out, overwrite in ((tmp_path / "out", False), (tmp_path / "kept", True)):
        with pytest.raises(KeyboardInterrupt):
            lf.merge_into_weights(base, small, out, progress=stop, overwrite=overwrite)
        assert sorted(tmp_path.rglob("*")) == before


SCRIPT = f"""
import os, signal, sys
sys.path.insert(0, {str(ROOT)!r})
import torch
import lorafold as lf
base, adapter, out, what = sys.argv[1:]
torch.set_num_threads(1)
"""


def fresh(code, *args):
    command = [sys.executable, "-c", SCRIPT + code, *map(str, args)]
    return subprocess.run(command, capture_output=True, text=True, check=False)


def test_killed_half_way_there_is_no_folder_and_the_next_run_clears_up(
    small_state, folder, small, tmp_path
):
    base = folder(small_state(), shards=2)
    lf.save(small, tmp_path / "adapter")
    there = sorted(os.listdir(tmp_path))
    code = """
def kill(done, total, stage):
    if what == "kill" and done > total / 2:
        os.kill(os.getpid(), signal.SIGKILL)
lf.merge_into_weights(base, adapter, out, progress=kill)
"""
    args = base, tmp_path / "adapter", tmp_path / "out"
    assert fresh(code, *args, "kill").returncode == -9
    left = set(os.listdir(tmp_path)) - set(there)
    assert len(left) == 1  # what was written so far
    assert all(name.startswith(".out.") for name in left)
    done = fresh(code, *args, "")
    assert done.returncode == 0, done.stderr
    assert sorted(os.listdir(tmp_path)) == sorted([*there, "out"])
    assert_same_bits(written(tmp_path / "out"), small.apply_to(small_state()))


@pytest.mark.skipif(sys.platform != "linux", reason="peak memory is read as Linux tells it")
def test_memory_is_that_of_one_tensor_not_of_the_model(folder, make_adapter, tmp_path):
    n, count = 1024, 24
    W = torch.randn(2 * n, n).bfloat16()  # 4 MiB; 96 MiB in all
    state = {f"{Q.format(i)}.weight": W.clone() for i in range(count)}
    base = folder(state, shards=2)
    lf.save(make_adapter({Q.format(i): (2 * n, n) for i in range(count)}, 2), tmp_path / "adapter")
    code = """
model = lf.load(adapter)
# Loads what is loaded on first use.
lf.merge_into_weights(base, model, out + "-first", c=0, overwrite=True)
lf.LowRank(torch.ones(1, 512), torch.ones(512, 1)).norm()
def peak():
    status = open("/proc/self/status").read()
    return int(status.partition("VmHWM:")[2].split()[0]) / 1024
start = peak()
if what == "all":
    from safetensors.torch import load_file
    files = [os.path.join(base, name) for name in os.listdir(base) if name[-1] == "s"]
    kept = [{k: t.clone() for k, t in load_file(file).items()} for file in files]
else:
    lf.merge_into_weights(base, model, out)
print(peak() - start)
"""
    args = base, tmp_path / "adapter", tmp_path / "out"
    done = fresh(code, *args, "")
    assert done.returncode == 0, done.stderr
    # The tensor, ΔW, and pieces in float32: 4 + 8 + 3 × 8 MiB at most.
    assert float(done.stdout) < 48
    assert float(fresh(code, *args, "all").stdout) > 80  # the test can tell


def test_every_tensor_is_read_once_and_untouched_ones_never(
    small_state, folder, small, tmp_path, monkeypatch
):
    state = small_state(layers=4)
    base = folder(state, shards=3)
    read = []
    original = ranges.read_tensors

    def spy(file, wanted, path):
        wanted = list(wanted)
        read.extend(key for key, _ in wanted)
        return original(file, wanted, path)

    monkeypatch.setattr(ranges, "read_tensors", spy)
    merged = lf.merge_into_weights(base, small, tmp_path / "out")
    assert sorted(read) == sorted(merged.changed) == ["layers.0.q.weight", "layers.1.q.weight"]
