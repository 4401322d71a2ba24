"""What wrapped the model when it was saved is no part of an adapter's names, by any door."""

import copy
import dataclasses
import json

import pytest
import torch
from safetensors.torch import load_file, save_file

import lorafold as lf
from lorafold.cli import main
from lorafold.errors import MismatchError
from lorafold.files.peft_keys import plain_key, plain_keys
from lorafold.parts import PREFIX

LAYERS = ("layers.0", "layers.1")
RANKS = {"layers.0.q_proj": 2, "layers.0.v_proj": 3, "layers.1.q_proj": 2, "layers.1.v_proj": 3}

# What is put before a module's path, and what between a layer and its modules.
WRAPPED = {
    "compiled": (f"{PREFIX}_orig_mod.", ""),
    "compiled from without": (f"_orig_mod.{PREFIX}", ""),
    "compiled layer by layer": (PREFIX, "_orig_mod."),
    "in parallel": (f"{PREFIX}module.", ""),
    "in parallel from without": (f"module.{PREFIX}", ""),
    "in parallel without a prefix": ("module.", ""),
    "both": (f"module._orig_mod.{PREFIX}module._orig_mod.", "_orig_mod."),
    "sharded": (f"{PREFIX}_fsdp_wrapped_module.", "_fsdp_wrapped_module."),
    "checkpointed": (PREFIX, "_checkpoint_wrapped_module."),
    "doubled": (PREFIX * 2, ""),
    "tripled, and compiled between": (f"{PREFIX}_orig_mod.{PREFIX}{PREFIX}", ""),
}


def name(before, between, path):
    layer, _, module = path.rpartition(".")
    return f"{before}{layer}.{between}{module}"


def written(folder, before=PREFIX, between="", patterns="names"):
    """An adapter with updates of two ranks, a head saved whole and trained tokens."""
    g = torch.Generator().manual_seed(0)
    tensors = {}
    for path, rank in RANKS.items():
        at = name(before, between, path)
        tensors[f"{at}.lora_A.weight"] = torch.randn(rank, 6, generator=g)
        tensors[f"{at}.lora_B.weight"] = torch.randn(6, rank, generator=g)
    tensors[f"{before}score.weight"] = torch.randn(4, 6, generator=g)
    tensors[f"{before}wte.token_adapter.trainable_tokens_delta"] = torch.randn(2, 6, generator=g)
    inner = before.removeprefix("module.").removeprefix("_orig_mod.").removeprefix(PREFIX)
    keys = {p: name(inner, between, p) for p in RANKS if p.endswith("v_proj")}
    if patterns == "expressions":
        keys = {p: "^" + n.replace(".", r"\.") for p, n in keys.items()}
    config = {
        "peft_type": "LORA",
        "r": 2,
        "lora_alpha": 8,
        "base_model_name_or_path": "base",
        "target_modules": [name(inner, between, p) for p in RANKS],
        "modules_to_save": ["score"],
        "trainable_token_indices": {f"{inner}wte": [1, 5]},
        "rank_pattern": dict.fromkeys(keys.values(), 3),
        "alpha_pattern": dict.fromkeys(keys.values(), 6),
    }
    folder.mkdir(parents=True)
    save_file(tensors, folder / "adapter_model.safetensors")
    (folder / "adapter_config.json").write_text(json.dumps(config))
    return folder


class Layer(torch.nn.Module):
    def __init__(self):
        super().__init__()
        self.q_proj = torch.nn.Linear(6, 6, bias=False)
        self.v_proj = torch.nn.Linear(6, 6, bias=False)

    def forward(self, x):
        return x + self.v_proj(torch.tanh(self.q_proj(x)))


class Base(torch.nn.Module):
    def __init__(self):
        super().__init__()
        self.wte = torch.nn.Embedding(8, 6)
        self.layers = torch.nn.ModuleList(Layer() for _ in LAYERS)
        self.score = torch.nn.Linear(6, 4, bias=False)

    def forward(self, ids):
        x = self.wte(ids)
        for layer in self.layers:
            x = layer(x)
        return self.score(x)


@pytest.fixture
def model():
    torch.manual_seed(0)
    return Base().eval()


@pytest.fixture
def clean(tmp_path):
    return written(tmp_path / "clean")


@pytest.fixture(params=WRAPPED.values(), ids=WRAPPED)
def wrapped(request, tmp_path):
    return written(tmp_path / "wrapped", *request.param)


def assert_same(a, b):
    assert a.modules.keys() == b.modules.keys()
    extras, others = ({k.removeprefix(PREFIX): t for k, t in x.extras.items()} for x in (a, b))
    assert extras.keys() == others.keys()
    for p, u in a.modules.items():
        assert (u.scale, u.rank) == (b[p].scale, b[p].rank)
        assert torch.equal(u.A, b[p].A)
        assert torch.equal(u.B, b[p].B)
    assert all(torch.equal(t, others[k]) for k, t in extras.items())
    assert a.digest == b.digest or a.extras.keys() != b.extras.keys()


@pytest.mark.parametrize("patterns", ["names", "expressions"])
@pytest.mark.parametrize("how", WRAPPED)
def test_read_as_the_plain_one(tmp_path, clean, how, patterns):
    folder = written(tmp_path / "w", *WRAPPED[how], patterns=patterns)
    assert_same(lf.load(folder), lf.load(clean))
    tensors = load_file(folder / "adapter_model.safetensors")
    config = json.loads((folder / "adapter_config.json").read_text())
    assert_same(lf.load(tensors, config=config), lf.load(clean))
    torch.save(tensors, folder / "adapter_model.bin")
    (folder / "adapter_model.safetensors").unlink()
    assert_same(lf.load(folder, allow_pickle=True), lf.load(clean))


def test_saved_again_every_tensor_has_its_bytes(tmp_path, wrapped, clean):
    """Under plain names, with patterns and targets that find them: nothing is scaled anew."""
    lf.save(lf.load(wrapped), tmp_path / "again")
    found = load_file(tmp_path / "again" / "adapter_model.safetensors")
    expected = load_file(clean / "adapter_model.safetensors")
    known = {k if k.startswith(PREFIX) else PREFIX + k: t for k, t in found.items()}
    assert known.keys() == expected.keys()
    assert all(torch.equal(t, expected[k]) for k, t in known.items())
    config = json.loads((tmp_path / "again" / "adapter_config.json").read_text())
    before = json.loads((wrapped / "adapter_config.json").read_text())
    assert (config["r"], config["lora_alpha"]) == (before["r"], before["lora_alpha"])
    assert sorted(config["target_modules"]) == sorted(RANKS)
    assert config["rank_pattern"] == {p: 3 for p in RANKS if p.endswith("v_proj")}
    assert_same(lf.load(tmp_path / "again"), lf.load(clean))


def test_attached(wrapped, clean, model):
    ids = torch.arange(8)[None]
    outputs = []
    for path in (clean, wrapped):
        adapter = lf.load(path)
        heads = {k: t for k, t in adapter.extras.items() if "score" in k}
        live = lf.attach(model, dataclasses.replace(adapter, extras=heads))
        with live.use("default"):
            outputs.append(model(ids))
        live.detach()
    assert torch.equal(*outputs)
    assert not torch.allclose(outputs[0], model(ids))


def test_merged_into_weights_and_checked(tmp_path, wrapped, clean, model, capsys):
    (tmp_path / "base").mkdir()
    save_file(model.state_dict(), tmp_path / "base" / "model.safetensors")
    found = []
    for path in (clean, wrapped):
        merged = lf.merge_into_weights(tmp_path / "base", path, tmp_path / f"m-{path.name}")
        assert not merged.unplaced
        found.append(load_file(tmp_path / f"m-{path.name}" / "model.safetensors"))
        with pytest.raises(SystemExit) as ended:
            main(["check", str(path), "--base", str(tmp_path / "base"), "--json"])
        assert not ended.value.code
    said = capsys.readouterr().out.replace("wrapped", "clean").split("\n}\n")
    assert said[0] == said[1]
    assert all(torch.equal(t, found[1][k]) for k, t in found[0].items())
    assert not torch.equal(found[0]["score.weight"], model.score.weight)


def test_differences_resizing_and_folding(wrapped, clean):
    a, b = lf.load(clean), lf.load(wrapped)
    a, b = (lf.Adapter(x.modules, {}, {}, base_model=x.base_model) for x in (a, b))
    assert a.distance(b) < 1e-6 * a.norm()
    assert_same(b.resize(rank=1), a.resize(rank=1))
    lib = lf.fold({"clean": clean, "wrapped": wrapped}, tolerance=0.1)
    assert lib["clean"].modules.keys() == lib["wrapped"].modules.keys() == RANKS.keys()


def test_diff_says_they_are_equal(wrapped, clean, capsys):
    with pytest.raises(SystemExit):
        main(["diff", str(clean), str(wrapped), "--json"])
    found = json.loads(capsys.readouterr().out)
    assert found["distance"] < 1e-6 * found["norm_a"]
    assert not found["only_in_a"]
    assert not found["only_in_b"]
    only = ([k.removeprefix(PREFIX) for k in found["extras"][f"only_in_{x}"]] for x in "ab")
    assert next(only) == next(only)  # without a prefix they are other keys, as before
    assert not found["extras"]["differ"]


class Around(torch.nn.Module):
    """As a wrapper for data parallelism is: the model is its `module`."""

    def __init__(self, module):
        super().__init__()
        self.module = module

    def forward(self, ids):
        return self.module(ids)


class Compiled(torch.nn.Module):
    """What torch.compile puts around a layer, by its names."""

    def __init__(self, layer):
        super().__init__()
        self._orig_mod = layer

    def forward(self, x):
        return self._orig_mod(x)


@pytest.mark.parametrize("wrap", ["around", "layers compiled", "both"])
def test_attached_to_a_model_that_is_wrapped(wrap, clean, model):
    """The other way round: plain names, and a model whose own are not."""
    ids = torch.arange(8)[None]
    adapter = lf.load(clean)
    heads = {k: t for k, t in adapter.extras.items() if "score" in k}
    adapter = dataclasses.replace(adapter, extras=heads)
    copied = copy.deepcopy(model)
    with lf.attach(model, adapter).use("default"):
        expected = model(ids)
    if wrap != "around":
        copied.layers = torch.nn.ModuleList(map(Compiled, copied.layers))
    wrapped = copied if wrap == "layers compiled" else Around(copied)
    live = lf.attach(wrapped, adapter)
    with live.use("default"):
        assert torch.allclose(wrapped(ids), expected, atol=1e-6)
    assert live.adapter("default").digest == adapter.digest
    live.merge("default")
    assert torch.allclose(wrapped(ids), expected, atol=1e-5)
    live.unmerge()
    live.detach()


def test_a_module_that_is_called_module(tmp_path, model):
    """A base may have one: its adapters are read by plain names, and placed all the same."""
    outer = torch.nn.Module()
    outer.module = model
    outer.forward = None
    adapter = lf.load(written(tmp_path / "a", f"{PREFIX}module."))
    merged = adapter.apply_to(outer.state_dict())
    plain = adapter.apply_to(model.state_dict())
    assert merged.keys() == {f"module.{k}" for k in plain}
    assert all(torch.equal(t, merged[f"module.{k}"]) for k, t in plain.items())


def test_two_keys_that_are_one_are_refused():
    tensors = {"q.lora_A.weight": torch.ones(1, 2), "_orig_mod.q.lora_A.weight": torch.ones(1, 2)}
    with pytest.raises(MismatchError, match=r"state dict: 'q\.lora_A.* and '_orig_mod.* keep one"):
        lf.load(tensors, alpha=1)


@pytest.mark.parametrize(
    ("given", "plain"),
    [
        ("_orig_mod.q", "q"),
        (r"^_orig_mod\.q", "^q"),
        (r"_orig_mod.*q", ".*q"),
        (r"module.*q", ".*q"),
        (r"^module\.module\.q", "^q"),
        (r"base_model\.model\.module\.q", "q"),
        (r".*\.(q|v)_proj", r".*\.(q|v)_proj"),
        ("my_module.q", "my_module.q"),
        ("h.module.q", "h.module.q"),
        ("all-linear", "all-linear"),
    ],
)
def test_names_and_expressions_in_a_config(given, plain):
    key = f"{PREFIX}_orig_mod.q.lora_A.weight"
    config = {"target_modules": given, "exclude_modules": [given], "rank_pattern": {given: 3}}
    _, found = plain_keys({key: 1}, {**config, "r": 2}, "here")
    assert found == {
        "target_modules": plain,
        "exclude_modules": [plain],
        "rank_pattern": {plain: 3},
        "r": 2,
    }
    _, untouched = plain_keys({plain_key(key): 1}, config, "here")
    assert untouched is config
