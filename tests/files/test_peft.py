"""PEFT's format without PEFT: keys, scales, what is read, and what is written."""

import json
import math
import os
import re
import sys

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from safetensors.torch import load_file, save_file

import lorafold as lf
from lorafold.errors import FileError, MismatchError, RefusedError, UnknownNameError
from lorafold.files import AdapterFile, load_many, open_adapter
from lorafold.files import safetensors as ranges_module
from lorafold.files.config import as_json
from lorafold.files.disk import held
from lorafold.files.peft_targets import exact_pattern

P = "base_model.model."
CONFIG = {"peft_type": "LORA", "r": 2, "lora_alpha": 6, "target_modules": ["q", "v"]}


def pair(stem, out=4, inn=3, rank=2, seed=0, prefix=P):
    g = torch.Generator().manual_seed(seed)
    return {
        f"{prefix}{stem}.lora_A.weight": torch.randn(rank, inn, generator=g),
        f"{prefix}{stem}.lora_B.weight": torch.randn(out, rank, generator=g),
    }


def written(folder, tensors, config=CONFIG):
    folder.mkdir(parents=True, exist_ok=True)
    save_file(tensors, folder / "adapter_model.safetensors")
    if config is not None:
        (folder / "adapter_config.json").write_text(json.dumps(config))
    return folder


# Keys


@pytest.mark.parametrize(
    ("keys", "path"),
    [
        (("base_model.model.m.0.q.lora_A.weight", "base_model.model.m.0.q.lora_B.weight"), "m.0.q"),
        (("m.0.q.lora_A.weight", "m.0.q.lora_B.weight"), "m.0.q"),
        (("m.q.lora_A.default.weight", "m.q.lora_B.default.weight"), "m.q"),
        (("base_model.model.q.lora_A.weight", "q.lora_B.weight"), "q"),
        (("lora_A.lora_A.weight", "lora_A.lora_B.weight"), "lora_A"),
        (("ünï.q v/ß.lora_A.weight", "ünï.q v/ß.lora_B.weight"), "ünï.q v/ß"),
    ],
)
def test_keys_that_name_a_module(keys, path, tmp_path):
    A, B = pair("x").values()
    adapter = lf.load(written(tmp_path / "a", {keys[0]: A, keys[1]: B}))
    assert list(adapter) == [path]
    assert torch.equal(adapter[path].A, A)
    assert torch.equal(adapter[path].B, B)
    lf.save(adapter, tmp_path / "again")
    again = load_file(tmp_path / "again" / "adapter_model.safetensors")
    assert set(again) == {f"{P}{path}.lora_{s}.weight" for s in "AB"}


def test_shapes_layouts_and_extras(tmp_path):
    tensors = {
        **pair("q"),
        P + "emb.lora_embedding_A": torch.randn(2, 9),
        P + "emb.lora_embedding_B": torch.randn(4, 2),
        P + "conv.lora_A.weight": torch.randn(2, 3, 5, 7),
        P + "conv.lora_B.weight": torch.randn(4, 2, 1, 1),
        **pair("attn", 12, 4),
        **pair("attn.base_layer.out_proj", 4, 4),
        P + "norm.bias": torch.randn(3),
        "something else": torch.arange(3),
    }
    f = open_adapter(written(tmp_path / "a", tensors))
    assert f.shapes == {
        "q": (4, 3, 2),
        "emb": (4, 9, 2),
        "conv": (4, 105, 2),
        "attn": (12, 4, 2),
        "attn.out_proj": (4, 4, 2),
    }
    assert {p: (x.kind, x.kernel, x.parameter) for p, x in f.layouts.items()} == {
        "emb": ("embedding", (), "weight"),
        "conv": ("conv", (3, 5, 7), "weight"),
        "attn": ("linear", (), "in_proj_weight"),
        "attn.out_proj": ("linear", (), "weight"),
    }
    assert set(f.extra_keys) == {P + "norm.bias", "something else"}
    assert set(f.keys) == set(tensors)
    assert torch.equal(f.read_extras()["something else"], torch.arange(3))
    conv = f.read("conv")
    product = tensors[P + "conv.lora_B.weight"].flatten(1) @ tensors[
        P + "conv.lora_A.weight"
    ].flatten(1)
    torch.testing.assert_close(conv.dense(), 3 * product)
    with pytest.raises(UnknownNameError, match="did you mean 'conv'"):
        f.read("cnv")


def test_experts_are_slices(tmp_path):
    E, r, out, inn = 3, 2, 5, 4
    A, B = torch.randn(E * r, inn), torch.randn(out, r * E)
    config = {**CONFIG, "target_modules": [], "target_parameters": ["mlp.down_proj"]}
    tensors = {P + "h.0.mlp.lora_A.weight": A, P + "h.0.mlp.lora_B.weight": B}
    f = open_adapter(written(tmp_path / "a", tensors, config))
    assert list(f.shapes) == [f"h.0.mlp.down_proj[{e}]" for e in range(E)]
    # The definition, from PEFT: A is (expert, rank, in), B is (out, rank, expert).
    dense = torch.einsum("ore,eri->eoi", B.reshape(out, r, E), A.reshape(E, r, inn)) * 3
    for e in range(E):
        u = f.read(f"h.0.mlp.down_proj[{e}]")
        torch.testing.assert_close(u.dense(), dense[e])
        assert u.A.untyped_storage().nbytes() == u.A.nbytes  # not a view on all experts
    lf.save(f.load(), tmp_path / "again")
    again = load_file(tmp_path / "again" / "adapter_model.safetensors")
    assert all(torch.equal(again[k], tensors[k]) for k in tensors)
    state = {"h.0.mlp.down_proj": torch.zeros(E, inn, out)}
    torch.testing.assert_close(f.load().apply_to(state)["h.0.mlp.down_proj"], dense.mT)


def test_shapes_decide_which_parameter_is_which(tmp_path):
    # Innermost first: A of the inner one is (E·r, hidden), so it belongs to gate_up_proj
    # whatever the names' order; with down registered first the shapes are the other way round.
    hidden, inner, E, r = 6, 4, 3, 2
    up = (torch.randn(E * r, hidden), torch.randn(2 * inner, E * r))
    down = (torch.randn(E * r, inner), torch.randn(hidden, E * r))
    config = {**CONFIG, "target_parameters": ["x.down_proj", "x.gate_up_proj"]}
    for inside, outside in ((up, down), (down, up)):
        tensors = {
            "x.base_layer.lora_A.weight": inside[0],
            "x.base_layer.lora_B.weight": inside[1],
            "x.lora_A.weight": outside[0],
            "x.lora_B.weight": outside[1],
        }
        adapter = lf.load(tensors, config=config)
        assert adapter["x.gate_up_proj[0]"].shape == (2 * inner, hidden)
        assert adapter["x.down_proj[2]"].shape == (hidden, inner)
        lf.save(adapter, tmp_path / "a", overwrite=True)
        again = load_file(tmp_path / "a" / "adapter_model.safetensors")
        assert {k.removeprefix(P) for k in again} == set(tensors)
        assert all(torch.equal(t, tensors[k.removeprefix(P)]) for k, t in again.items())


# Scales


@pytest.mark.filterwarnings("ignore:.*by which no module of the file is meant")
@pytest.mark.parametrize(
    ("config", "path", "scale"),
    [
        ({}, "m.q", 3.0),
        ({"use_rslora": True}, "m.q", 6 / math.sqrt(2)),
        ({"alpha_pattern": {"q": 5}}, "m.q", 2.5),
        ({"alpha_pattern": {"q": 5}}, "m.xq", 3.0),
        ({"alpha_pattern": {"m.q": 5, "q": 7}}, "m.q", 2.5),  # the first that matches
        ({"alpha_pattern": {"^q": 5}}, "m.q", 3.0),
        ({"alpha_pattern": {"^m.q": 5}}, "m.q", 2.5),
        ({"alpha_pattern": {r"(m|n)\.q": 5}}, "n.q", 2.5),
        ({"alpha_pattern": {"q.x": 5}}, "q.x.y", 3.0),
        ({"rank_pattern": {"q": 2}, "r": 8}, "m.q", 3.0),
        ({"rank_pattern": None, "alpha_pattern": None}, "q", 3.0),
        ({"lora_alpha": 0}, "q", 0.0),
    ],
)
def test_scale_by_the_config(config, path, scale, tmp_path):
    f = open_adapter(written(tmp_path / "a", pair(path), {**CONFIG, **config}))
    assert f.scales == {path: scale}
    assert f.read(path).scale == scale


def test_alpha_where_there_is_no_config(tmp_path):
    tensors = {**pair("q", rank=2), **pair("v", rank=3)}
    folder = written(tmp_path / "a", tensors, None)
    with pytest.raises(FileError, match="alpha="):
        lf.load(folder)
    with pytest.raises(FileError, match="alpha="):
        lf.load(tensors)
    for source in (folder, folder / "adapter_model.safetensors", tensors):
        adapter = lf.load(source, alpha=6)
        assert {p: u.scale for p, u in adapter.items()} == {"q": 3.0, "v": 2.0}
    with pytest.raises(MismatchError, match="leave out alpha"):
        lf.load(written(tmp_path / "b", pair("q")), alpha=6)


# Reading little


def test_opening_reads_no_tensor(tmp_path, monkeypatch):
    folder = written(tmp_path / "a", {**pair("q"), **pair("v", seed=1)})
    read = []
    original = ranges_module.read_tensors

    def spy(file, wanted, path):
        wanted = list(wanted)
        read.extend(key for key, _ in wanted)
        return original(file, wanted, path)

    monkeypatch.setattr(ranges_module, "read_tensors", spy)
    f = open_adapter(folder)
    assert f.nbytes == sum(p.stat().st_size for p in folder.iterdir())
    assert f.dtypes == {"q": torch.float32, "v": torch.float32}
    assert read == []
    f.read("v")
    assert read == [P + "v.lora_A.weight", P + "v.lora_B.weight"]


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="looks at /proc")
def test_many_open_adapters_hold_few_descriptors_and_no_mapping(tmp_path, monkeypatch):
    monkeypatch.setattr(held, "_MOST", 4)
    before = len(os.listdir("/proc/self/fd"))
    files = [open_adapter(written(tmp_path / f"{i}", pair("q", seed=i))) for i in range(50)]
    tensors = [f.read("q") for f in files]
    assert len(os.listdir("/proc/self/fd")) <= before + 4
    with open("/proc/self/maps") as maps:
        assert str(tmp_path) not in maps.read()
    # What the same script trained has one header, and says it once.
    assert all(f.shapes is files[0].shapes for f in files)
    assert len({float(t.A[0, 0]) for t in tensors}) == 50


def test_a_file_that_changes_under_us_is_noticed(tmp_path):
    folder = written(tmp_path / "a", pair("q"))
    f = open_adapter(folder)
    before = f.read("q")
    file = folder / "adapter_model.safetensors"
    os.replace(written(tmp_path / "b", pair("q", inn=8)) / file.name, file)
    assert torch.equal(f.read("q").A, before.A)  # it has the one it opened
    f = open_adapter(written(tmp_path / "c", pair("q")))
    with open(tmp_path / "c" / file.name, "r+b") as other:  # in place
        other.truncate(20)
    with pytest.raises(FileError, match="was changed"):
        f.read("q")


def test_an_adapter_in_memory_reads_alike(tmp_path):
    tensors = {**pair("q"), P + "norm.bias": torch.ones(3)}
    on_disk = open_adapter(written(tmp_path / "a", tensors))
    in_memory = open_adapter(on_disk.load())
    for name in ("config", "base_model", "shapes", "scales", "layouts", "dtypes", "refusal"):
        assert getattr(in_memory, name) == getattr(on_disk, name), name
    assert in_memory.extra_keys == on_disk.extra_keys
    assert in_memory.path is None
    assert in_memory.nbytes == sum(t.nbytes for t in tensors.values())
    assert torch.equal(in_memory.read("q").B, on_disk.read("q").B)
    assert in_memory.load().digest == on_disk.load().digest
    assert isinstance(AdapterFile.of(on_disk.load()), AdapterFile)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float16, torch.bfloat16], ids=str)
def test_dtypes_survive(dtype, tmp_path):
    tensors = {k: v.to(dtype) for k, v in pair("q").items()}
    extras = {
        "e8": torch.randn(3).to(torch.float8_e4m3fn),
        "empty": torch.zeros(0, 3),
        "flag": torch.tensor([True]),
        "scalar": torch.tensor(7),
        "wide": torch.arange(3, dtype=torch.uint8),
    }
    adapter = lf.load(written(tmp_path / "a", {**tensors, **extras}))
    assert adapter["q"].A.dtype == adapter["q"].B.dtype == dtype
    lf.save(adapter, tmp_path / "again")
    again = load_file(tmp_path / "again" / "adapter_model.safetensors")
    for key, value in {**tensors, **extras}.items():
        assert again[key].dtype == value.dtype
        assert again[key].shape == value.shape
        assert (
            again[key].numpy(force=True).tobytes() == value.numpy(force=True).tobytes()
            if (value.dtype not in (torch.bfloat16, torch.float8_e4m3fn))
            else torch.equal(again[key].view(torch.uint8), value.view(torch.uint8))
        )
    assert lf.load(tmp_path / "a", dtype=torch.float32)["q"].A.dtype == torch.float32
    lf.save(adapter, tmp_path / "cast", dtype=torch.bfloat16)
    cast = load_file(tmp_path / "cast" / "adapter_model.safetensors")
    assert cast[P + "q.lora_A.weight"].dtype == torch.bfloat16
    assert cast["e8"].dtype == torch.float8_e4m3fn


def test_eight_bit_factors_are_read_when_a_dtype_is_given(tmp_path):
    tensors = {k: v.to(torch.float8_e4m3fn) for k, v in pair("q").items()}
    folder = written(tmp_path / "a", tensors)
    assert open_adapter(folder).dtypes == {"q": torch.float8_e4m3fn}
    with pytest.raises(MismatchError, match=r"module 'q'.*dtype=torch\.float32"):
        lf.load(folder)
    A = lf.load(folder, dtype=torch.float32)["q"].A
    assert torch.equal(A, tensors[P + "q.lora_A.weight"].float())


# Finding the files


def test_where_an_adapter_may_lie(tmp_path):
    inside = written(tmp_path / "run" / "sql", pair("q"))
    for source in (tmp_path / "run", str(inside), inside / "adapter_model.safetensors"):
        assert list(lf.load(source)) == ["q"]
    written(tmp_path / "run" / "poems", pair("v"))
    with pytest.raises(FileError, match="holds 2 adapters: 'poems', 'sql'"):
        lf.load(tmp_path / "run")
    many = load_many(tmp_path / "run")
    assert {name: list(a) for name, a in many.items()} == {"poems": ["v"], "sql": ["q"]}
    assert list(load_many(inside)) == ["sql"]
    with pytest.raises(UnknownNameError, match="did you mean 'sql'"):
        many["sqll"]
    with pytest.raises(FileError, match="neither adapters nor"):
        load_many(
            inside.parent.parent / "run" / "sql" / ".." / ".." / "empty"
            if False
            else _empty(tmp_path)
        )
    with pytest.raises(FileError, match="revision"):
        lf.load(inside, revision="main")
    with pytest.raises(MismatchError, match="config="):
        lf.load(inside, config=CONFIG)


def _empty(tmp_path):
    (tmp_path / "empty").mkdir()
    return tmp_path / "empty"


def test_a_pickle_only_when_asked_for(tmp_path):
    folder = written(tmp_path / "a", pair("q"))
    (folder / "adapter_model.safetensors").unlink()
    torch.save(pair("q"), folder / "adapter_model.bin")
    with pytest.raises(FileError, match="allow_pickle=True"):
        lf.load(folder)
    with pytest.raises(FileError, match="allow_pickle=True"):
        lf.load(folder / "adapter_model.bin")
    expected = lf.load(pair("q"), config=CONFIG)
    assert lf.load(folder, allow_pickle=True).digest == expected.digest
    f = open_adapter(folder, allow_pickle=True)
    assert f.path == folder
    assert f.nbytes == sum(p.stat().st_size for p in folder.iterdir())
    torch.save({"a": print}, folder / "adapter_model.bin")
    with pytest.raises(FileError, match=r"adapter_model\.bin"):
        lf.load(folder, allow_pickle=True)
    (folder / "adapter_model.bin").write_bytes(b"")
    with pytest.raises(FileError, match=r"adapter_model\.bin"):
        lf.load(folder, allow_pickle=True)


# Writing


def test_an_untouched_save_keeps_everything(tmp_path):
    config = {
        **CONFIG,
        "r": 8,
        "rank_pattern": {"q": 2},
        "use_rslora": True,
        "x_future": [1, {"y": None}],
    }
    tensors = {**pair("q"), "odd key": torch.arange(4), P + "n.bias": torch.randn(2)}
    adapter = lf.load(written(tmp_path / "a", tensors, config))
    lf.save(adapter, tmp_path / "b")
    again = load_file(tmp_path / "b" / "adapter_model.safetensors")
    assert again.keys() == tensors.keys()
    assert all(torch.equal(again[k], tensors[k]) for k in tensors)
    assert json.loads((tmp_path / "b" / "adapter_config.json").read_text()) == config
    with ranges_module.open_file(tmp_path / "b" / "adapter_model.safetensors") as f:
        header, _ = ranges_module.header_bytes(f, "b")
    assert json.loads(header)["__metadata__"] == {"format": "pt"}
    with pytest.raises(FileError, match="overwrite=True"):
        lf.save(adapter, tmp_path / "b")
    lf.save(0.5 * adapter, tmp_path / "b", overwrite=True)
    assert lf.load(tmp_path / "b").norm() == pytest.approx(adapter.norm() / 2)


def test_half_letters_of_a_config_are_kept(tmp_path):
    config = {**CONFIG, "target_modules": ["q"], "of": "\ud800"}
    folder = written(tmp_path / "a", pair("q"), config)
    lf.save(lf.load(folder), tmp_path / "b")
    assert lf.load(tmp_path / "b").config["of"] == "\ud800"
    lf.save(lf.load(folder).resize(rank=1), tmp_path / "c")
    assert "ü" in as_json({"a": "ü"})


def test_a_failed_save_leaves_nothing(tmp_path, make_update):
    u = make_update(4, 3, 2, scale=3.0)
    double = lf.Adapter({"q": u}, {f"{P}q.lora_A.weight": torch.ones(1)}, CONFIG)
    with pytest.raises(MismatchError, match="both a module's factor and an extra"):
        lf.save(double, tmp_path / "a")
    with pytest.raises(MismatchError, match="JSON"):
        lf.save(lf.Adapter({"q": u}, config={"note": object()}), tmp_path / "a")
    assert list(tmp_path.iterdir()) == []
    # A LoraConfig's own types are no obstacle.
    lf.save(lf.Adapter({"q": u}, config={"target_modules": {"v", "q"}}), tmp_path / "a")
    config = json.loads((tmp_path / "a" / "adapter_config.json").read_text())
    assert config["target_modules"] == ["q", "v"]


def test_handmade_adapters_get_a_whole_config(tmp_path, make_adapter):
    adapter = make_adapter({"h.0.q": (6, 5), "h.1.q": (6, 5), "h.0.v": (3, 5)}, rank=2, scale=0.7)
    lf.save(adapter, tmp_path / "a", base_model="org/base")
    config = json.loads((tmp_path / "a" / "adapter_config.json").read_text())
    assert config["peft_type"] == "LORA"
    assert config["base_model_name_or_path"] == "org/base"
    assert (config["r"], config["lora_alpha"], config["task_type"]) == (2, 2, None)
    assert config["target_modules"] == r"h\.(0|1)\.q|h\.0\.v"
    assert config["rank_pattern"] == config["alpha_pattern"] == {}
    again = lf.load(tmp_path / "a")
    assert again.base_model == "org/base"
    assert again.distance(adapter) <= 1e-6 * adapter.norm()
    lf.save(again, tmp_path / "b")
    assert lf.load(tmp_path / "b").digest == again.digest


shape = st.tuples(st.integers(1, 9), st.integers(1, 9))


@given(
    shapes=st.dictionaries(
        st.lists(st.sampled_from(["h", "0", "1", "q", "a+b", "ä"]), min_size=1, max_size=3).map(
            ".".join
        ),
        shape,
        min_size=1,
        max_size=4,
    ),
    ranks=st.lists(st.integers(1, 5), min_size=4, max_size=4),
    scale=st.sampled_from([1.0, -0.3, 2.0, 1e-3]),
    pad=st.booleans(),
    dtype=st.sampled_from([torch.float32, torch.float16, torch.bfloat16]),
)
def test_what_is_saved_is_the_same_update(
    shapes, ranks, scale, pad, dtype, make_adapter, dense, tmp_path_factory
):
    ranks = dict(zip(shapes, ranks, strict=False))
    adapter = make_adapter(shapes, ranks, scale=scale, dtype=dtype)
    path = tmp_path_factory.mktemp("p") / "a"
    lf.save(adapter, path, pad=pad)
    config = json.loads((path / "adapter_config.json").read_text())
    tensors = load_file(path / "adapter_model.safetensors")
    for key, rank in config["rank_pattern"].items():
        assert key[0] == "^"
        assert config["alpha_pattern"][key] == rank
    assert config["r"] == config["lora_alpha"]
    if pad:
        # What vLLM (no patterns) and llama.cpp (each tensor's own rank) need to agree with PEFT.
        assert config["rank_pattern"] == config["alpha_pattern"] == {}
        assert {t.shape[0] for k, t in tensors.items() if "lora_A" in k} == {config["r"]}
        assert {t.shape[1] for k, t in tensors.items() if "lora_B" in k} == {config["r"]}
    assert (config["use_rslora"], config["init_lora_weights"]) == (False, True)
    again = lf.load(path)
    assert set(again) == set(adapter)
    for p, u in adapter.items():
        expected = dense(u)
        atol = 1e-6 * float(expected.abs().max())
        torch.testing.assert_close(dense(again[p]), expected, atol=atol, rtol=0)
        # B alone carries ΔW for a reader that divides α by r.
        A, B = (tensors[f"{P}{p}.lora_{s}.weight"].double() for s in "AB")
        torch.testing.assert_close(B @ A, expected, atol=atol, rtol=0)


names = st.lists(st.sampled_from(["h", "0", "12", "q.", "v", "(x"]), min_size=1, max_size=4)


@given(paths=st.lists(names.map(".".join), min_size=1, max_size=6, unique=True))
def test_exact_patterns_match_exactly(paths):
    pattern = re.compile(exact_pattern(paths))
    for path in paths:
        assert pattern.fullmatch(path)
        for other in (f"x.{path}", f"{path}.x", f"x{path}", path[:-1], path.replace("12", "1")):
            assert bool(pattern.fullmatch(other)) == (other in paths)


def test_refused_adapters_are_written_only_as_they_were(tmp_path):
    folder = written(tmp_path / "a", pair("q"), {**CONFIG, "init_lora_weights": "pissa"})
    adapter = lf.load(folder)
    lf.save(adapter, tmp_path / "b")
    with pytest.raises(RefusedError, match="only be saved as it was loaded: .*PiSSA"):
        lf.save(adapter, tmp_path / "c", pad=True)
    changed = lf.Adapter({"q": 2 * adapter["q"]}, config=adapter.config)
    with pytest.raises(RefusedError, match="PiSSA"):
        lf.save(changed, tmp_path / "c")
    assert sorted(p.name for p in tmp_path.iterdir()) == ["a", "b"]


def test_tensors_that_share_memory_are_written_apart(tmp_path, make_update):
    u = make_update(4, 4, 2)
    whole = torch.randn(3, 8)
    adapter = lf.Adapter({"q": u, "v": u}, {"x": whole[:, :4], "y": whole[:, 4:], "z": whole})
    lf.save(adapter, tmp_path / "a")
    again = load_file(tmp_path / "a" / "adapter_model.safetensors")
    assert torch.equal(torch.cat([again["x"], again["y"]], 1), again["z"])
    assert torch.equal(again[f"{P}q.lora_A.weight"], again[f"{P}v.lora_A.weight"])


@pytest.mark.parametrize("key", ["base_model.model.score.weight", "score.weight", "m.score.bias"])
def test_an_adapter_of_extras_alone_is_read_back(key, tmp_path):
    adapter = lf.Adapter({}, extras={key: torch.ones(2, 3)})
    lf.save(adapter, tmp_path / "a")
    again = lf.load(tmp_path / "a")
    assert again.extras[key].equal(adapter.extras[key])
    assert json.loads((tmp_path / "a" / "adapter_config.json").read_text())["modules_to_save"] == [
        "score"
    ]
    with pytest.raises(MismatchError, match="'head' alone is no adapter"):
        lf.save(lf.Adapter({}, extras={"head": torch.ones(2)}), tmp_path / "b")
