"""PEFT is the reference for its own format: what it writes, what it merges, what it reads back."""

import copy
import json
import math
import re
import warnings
from collections import OrderedDict

import pytest
import torch
from torch import nn

pytest.importorskip("peft")
pytest.importorskip("transformers")

from peft import LoraConfig, PeftModel, get_peft_model, get_peft_model_state_dict
from safetensors.torch import load_file
from transformers import LlamaConfig, LlamaForCausalLM
from transformers.pytorch_utils import Conv1D

import lorafold as lf
from lorafold.errors import RefusedError
from lorafold.files import open_adapter

# PEFT warns about what these tests do on purpose, and about being handed plain torch modules.
pytestmark = [
    pytest.mark.filterwarnings(r"ignore:.*:UserWarning:peft(\..*)?"),
    pytest.mark.filterwarnings(r"ignore:.*:RuntimeWarning:peft(\..*)?"),
    pytest.mark.filterwarnings("ignore:.is_gradient_checkpointing:FutureWarning"),  # asked by PEFT
]


class Experts(nn.Module):
    """Two 3-D parameters, registered gate_up_proj first, as transformers' layers do."""

    def __init__(self, count=3, dim=6, inner=4, transposed=False):
        super().__init__()
        up, down = (count, 2 * inner, dim), (count, dim, inner)
        if transposed:
            up, down = (count, dim, 2 * inner), (count, inner, dim)
            self.is_transposed = True  # what PEFT looks at
        self.gate_up_proj = nn.Parameter(torch.randn(up))
        self.down_proj = nn.Parameter(torch.randn(down))

    def forward(self, h):
        up, down = self.gate_up_proj, self.down_proj
        if getattr(self, "is_transposed", False):
            up, down = up.mT, down.mT
        gate, value = torch.einsum("boi,nsi->nsbo", up, h).chunk(2, -1)
        return torch.einsum("boi,nsbi->nso", down, torch.tanh(gate) * value)


class Holder(nn.Module):
    """Bare 2-D parameters."""

    def __init__(self, dim=6):
        super().__init__()
        self.w = nn.Parameter(torch.randn(dim, dim))
        self.weight = nn.Parameter(torch.randn(dim, dim))

    def forward(self, h):
        return h @ self.w.T + torch.tanh(h) @ self.weight.T


class Net(nn.Module):
    """One of every kind of layer that PEFT puts a LoRA on."""

    def __init__(self, transposed=False, inner=4):
        super().__init__()
        self.embed = nn.Embedding(11, 6)
        self.lin = nn.Linear(6, 6)
        self.block = nn.ModuleDict({"lin": nn.Linear(6, 6), "wide": nn.Linear(6, 8)})
        self.narrow = nn.Linear(8, 6, bias=False)
        self.square, self.c_fc = Conv1D(6, 6), Conv1D(6, 6)
        self.c_proj = nn.ModuleDict({"c_proj": Conv1D(6, 6), "up": Conv1D(9, 6)})
        self.conv1 = nn.Conv1d(6, 6, 3, padding=1)
        self.conv2 = nn.Conv2d(1, 4, 3, padding=1)
        self.point = nn.Conv2d(4, 1, 1)
        self.conv3 = nn.Conv3d(1, 1, (1, 3, 3), padding=(0, 1, 1))
        self.grouped = nn.Conv1d(6, 6, 3, padding=1, groups=2)
        self.attn = nn.MultiheadAttention(6, 2, batch_first=True)
        self.experts = Experts(transposed=transposed, inner=inner)
        self.holder = Holder()
        self.score = nn.Sequential(nn.Linear(6, 5), nn.Tanh(), nn.Linear(5, 2))

    def forward(self, x):
        h = self.embed(x)
        h = h + self.lin(torch.tanh(h)) + self.narrow(torch.tanh(self.block["wide"](h)))
        h = h + self.block["lin"](torch.tanh(h))
        h = h + self.square(torch.tanh(h)) + self.c_fc(torch.cos(h))
        h = h + self.c_proj["c_proj"](torch.sin(h)) + self.c_proj["up"](h)[..., :6]
        h = h + self.conv1(h.mT).mT + self.grouped(h.mT).mT
        h = h + self.point(torch.tanh(self.conv2(h[:, None])))[:, 0]
        h = h + self.conv3(h[:, None, None])[:, 0, 0]
        h = torch.tanh(h / 3)
        h = h + self.attn(h, h, h, need_weights=False)[0]
        h = h + self.experts(h) / 9 + self.holder(h) / 3
        return self.score(torch.tanh(h))


X = torch.randint(0, 11, (3, 5), generator=torch.Generator().manual_seed(0))
KINDS = {
    "linear": {"target_modules": ["lin", "wide"]},
    "rslora": {"target_modules": ["wide", "narrow"], "use_rslora": True, "lora_alpha": 5},
    "patterns": {
        "target_modules": ["lin", "wide", "narrow"],
        "rank_pattern": {"^lin": 1, "wide": 5},
        "alpha_pattern": {"block.lin": 7, "narrow|wide": 2},
    },
    "patterns and rslora": {
        "target_modules": r"block\..*|narrow",
        "rank_pattern": {r"block\.(lin|wide)": 2, "wide": 6},
        "use_rslora": True,
    },
    "Conv1D": {"target_modules": ["square", "c_fc", "c_proj.c_proj", "up"]},
    "embedding": {"target_modules": ["embed", "lin"]},
    "convolutions": {"target_modules": ["conv1", "conv2", "conv3", "point"]},
    "attention": {"target_modules": ["attn", "lin"], "rank_pattern": {"attn": 3}},
    "lora_bias": {"target_modules": ["lin", "conv2"], "lora_bias": True, "lora_alpha": 7},
    "bias lora_only": {"target_modules": ["lin", "wide"], "bias": "lora_only"},
    "bias all": {"target_modules": ["lin"], "bias": "all", "modules_to_save": ["score"]},
    "modules_to_save": {"target_modules": ["lin"], "modules_to_save": ["score", "conv2"]},
    "tokens": {"target_modules": ["lin"], "trainable_token_indices": {"embed": [1, 4, 10]}},
    "parameters": {
        "target_modules": [],
        # In another order than the module registers them.
        "target_parameters": ["experts.down_proj", "experts.gate_up_proj"],
        "rank_pattern": {"experts.down_proj": 2},
    },
    "one parameter": {"target_modules": ["wide"], "target_parameters": ["down_proj"]},
    "2-D parameters": {"target_modules": [], "target_parameters": ["holder.w", "weight"]},
    "velora": {"target_modules": ["lin"], "velora_config": {"num_groups": 2}},
    "mica": {"target_modules": ["lin", "wide"], "init_lora_weights": "mica"},
    "monteclora": {"target_modules": ["lin"], "monteclora_config": {"num_samples": 2}},
    "layers excluded": {"target_modules": ["lin", "wide"], "exclude_modules": ["block.lin"]},
}
NET = {"parameters": {"transposed": True}}


def trained(base, seed, **config):
    """A PEFT model on a copy of the base, every trainable number random."""
    options = {"r": 4, "lora_alpha": 6, **config}
    if options.get("target_parameters") == ["holder.w", "weight"]:
        options["target_parameters"] = ["holder.w", "holder.weight"]
    model = get_peft_model(copy.deepcopy(base), LoraConfig(**options)).eval()
    generator = torch.Generator().manual_seed(seed)
    for name, p in model.named_parameters():
        if "lora_" in name or p.requires_grad:
            p.data += 0.3 * torch.randn(p.shape, generator=generator)  # in place: some are tied
    return model


def with_extras_of(model, other):
    """The model, everything but its factors taken over from the other."""
    source = dict(other.named_parameters())
    for name, p in model.named_parameters():
        if not re.search(r"\.lora_(embedding_)?[AB]\.default(\.weight)?$", name):
            p.data = source[name].data.clone()
    return model


def state_of(model):
    return {k: v.detach().clone() for k, v in model.state_dict().items()}


def merged(model):
    return state_of(copy.deepcopy(model).merge_and_unload())


def outputs(base, state, x=X):
    model = copy.deepcopy(base).eval()
    model.load_state_dict(state)
    with torch.no_grad():
        return logits(model(x))


def reloaded_outputs(base, path, x=X):
    """What PEFT makes of a saved adapter; every key of the model must be in the file."""
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        model = PeftModel.from_pretrained(copy.deepcopy(base), str(path)).eval()
    assert not [w for w in caught if "missing adapter keys" in str(w.message)]
    with torch.no_grad():
        return logits(model(x))


def logits(output):
    return output if isinstance(output, torch.Tensor) else output.logits


def assert_states(found, expected, atol=1e-6):
    assert found.keys() == expected.keys()
    for key, value in expected.items():
        assert found[key].dtype == value.dtype, key
        assert torch.allclose(found[key], value, atol=atol, rtol=1e-6), key


@pytest.fixture(params=list(KINDS), ids=[k.replace(" ", "-") for k in KINDS])
def kind(request, tmp_path):
    torch.manual_seed(3)
    base = Net(**NET.get(request.param, {})).eval()
    model = trained(base, 1, **KINDS[request.param])
    model.save_pretrained(tmp_path / "a")
    return base, model, KINDS[request.param], tmp_path


@pytest.mark.form("peft", "read", by="PEFT")
def test_every_kind_merges_as_in_peft(kind):
    base, model, _, path = kind
    state = state_of(base)
    before = {k: v.clone() for k, v in state.items()}
    adapter = lf.load(path / "a")
    assert adapter.modules
    assert_states(adapter.apply_to(state), merged(model))
    assert_states(state, before, atol=0)
    # The check bites: a scale that is off by a hundredth is seen.
    with pytest.raises(AssertionError):
        assert_states((1.01 * adapter).apply_to(state), merged(model))


def test_an_untouched_adapter_is_written_bit_for_bit(kind):
    base, model, _, path = kind
    lf.save(lf.load(path / "a"), path / "again")
    for name in ("a", "again"):
        assert json.loads((path / name / "adapter_config.json").read_text())["peft_type"] == "LORA"
    first, second = (load_file(path / n / "adapter_model.safetensors") for n in ("a", "again"))
    assert first.keys() == second.keys()
    for key in first:
        assert first[key].dtype == second[key].dtype
        assert torch.equal(first[key], second[key]), key
    configs = [json.loads((path / n / "adapter_config.json").read_text()) for n in ("a", "again")]
    assert configs[0] == configs[1]
    with torch.no_grad():
        assert torch.equal(reloaded_outputs(base, path / "again"), model(X))


@pytest.mark.form("peft", "written", by="PEFT")
def test_what_is_saved_after_algebra_runs_the_same_in_peft(kind):
    base, model, config, path = kind
    other = with_extras_of(trained(base, 2, **config), model)
    other.save_pretrained(path / "b")
    a, b = lf.load(path / "a"), lf.load(path / "b")
    W, Wa, Wb = state_of(base), merged(model), merged(other)
    factored = {re.sub(r"\[\d+\]$", "", p) for p in a}
    names = {k for k in W if k in factored or k.rpartition(".")[0] in factored}
    names = {k for k in names if not k.endswith("bias")}
    made = {
        "sum": (a + b, lambda k: Wa[k] + Wb[k] - W[k] if k in names else Wa[k]),
        "half": (0.5 * a, lambda k: (Wa[k] + W[k]) / 2 if k in names else Wa[k]),
        "resized": (a.resize(tolerance=0), lambda k: Wa[k]),
        "nested": (a.nested(), lambda k: Wa[k]),
    }
    for name, (adapter, weight) in made.items():
        expected = outputs(base, {k: weight(k) for k in W})
        for pad in (False, True):
            lf.save(adapter, path / f"{name}{pad}", pad=pad)
            found = reloaded_outputs(base, path / f"{name}{pad}")
            torch.testing.assert_close(found, expected, atol=2e-5, rtol=1e-5)
            saved = json.loads((path / f"{name}{pad}" / "adapter_config.json").read_text())
            assert saved["use_rslora"] is False
            assert saved["lora_alpha"] == saved["r"]
            if pad:
                assert not saved["rank_pattern"]
                assert not saved["alpha_pattern"]
            again = lf.load(path / f"{name}{pad}")
            assert again.distance(adapter) <= 1e-6 * adapter.norm()
    assert (0.5 * a).distance(a) > 0.1 * a.norm()


# What PEFT cannot merge either, or what is no ΔW: carried, and refused by name.

REFUSED = {
    "DoRA": ({"target_modules": ["lin", "embed", "conv1"], "use_dora": True}, "DoRA"),
    "grouped convolution": ({"target_modules": ["grouped", "lin"]}, "grouped convolution"),
    "pissa": ({"target_modules": ["lin"], "init_lora_weights": "pissa"}, "PiSSA"),
    "olora": ({"target_modules": ["lin"], "init_lora_weights": "olora"}, "OLoRA"),
    "kasa": ({"target_modules": ["lin"], "kasa_config": {}}, "KaSA"),
    "bdlora": (
        {"target_modules": ["lin"], "use_bdlora": {"target_modules_bd_b": ["lin"], "nblocks": 2}},
        "BD-LoRA",
    ),
}


@pytest.mark.parametrize("name", REFUSED)
def test_what_is_refused_is_carried_bit_for_bit(name, tmp_path):
    config, word = REFUSED[name]
    torch.manual_seed(3)
    base = Net().eval()
    model = trained(base, 1, **config)
    model.save_pretrained(tmp_path / "a")
    adapter = lf.load(tmp_path / "a")
    assert word in adapter.refusal
    assert open_adapter(tmp_path / "a").refusal == adapter.refusal
    for algebra in (adapter.norm, lambda: adapter + adapter, lambda: adapter.apply_to({})):
        with pytest.raises(RefusedError, match=re.escape(word)):
            algebra()
    with pytest.raises(RefusedError, match=re.escape(word)):
        lf.save(adapter, tmp_path / "padded", pad=True)
    assert not (tmp_path / "padded").exists()
    lf.save(adapter, tmp_path / "again")
    with torch.no_grad():
        assert torch.equal(reloaded_outputs(base, tmp_path / "again"), model(X))


@pytest.mark.parametrize("init", ["pissa", "olora"])
def test_a_converted_initialisation_is_plain_lora(init, tmp_path):
    torch.manual_seed(3)
    base = Net().eval()
    config = LoraConfig(target_modules=["lin", "wide"], r=2, init_lora_weights=init)
    model = get_peft_model(copy.deepcopy(base), config).eval()
    model.peft_config["default"].init_lora_weights = True
    model.save_pretrained(tmp_path / "initial")
    model.peft_config["default"].init_lora_weights = init
    for name, p in model.named_parameters():
        if "lora_" in name:
            p.data = p.data + 0.1 * torch.randn_like(p)
    with torch.no_grad():
        expected = model(X)
    model.save_pretrained(
        tmp_path / "a", path_initial_model_for_weight_conversion=str(tmp_path / "initial")
    )
    adapter = lf.load(tmp_path / "a")
    assert adapter.refusal is None
    assert adapter.rank == 4
    torch.testing.assert_close(outputs(base, adapter.apply_to(state_of(base))), expected)


def test_lora_bias_of_an_attention_is_ignored_aloud(tmp_path):
    # PEFT never adds the LoRA bias of in_proj; only out_proj's counts.
    torch.manual_seed(3)
    base = Net().eval()
    model = trained(base, 1, target_modules=["attn"], lora_bias=True, bias="lora_only")
    model.save_pretrained(tmp_path / "a")
    with pytest.warns(UserWarning, match=r"no place .*attn\.lora_B\.bias"):
        state = lf.load(tmp_path / "a").apply_to(state_of(base))
    assert_states(state, merged(model))
    lf.save(0.5 * lf.load(tmp_path / "a"), tmp_path / "half")
    half = lf.load(tmp_path / "half")
    with pytest.warns(UserWarning, match="no place"):
        found = half.apply_to(state_of(base))
    torch.testing.assert_close(outputs(base, found), reloaded_outputs(base, tmp_path / "half"))
    for key in ("attn.in_proj_weight", "attn.out_proj.weight"):
        W = state_of(base)[key]
        torch.testing.assert_close(2 * (found[key] - W), state[key] - W)


# Names


def test_ranks_that_differ_hit_exactly_their_own_modules(tmp_path):
    # "lin" is also the end of "block.lin": PEFT would give both the rank of a bare "lin".
    torch.manual_seed(3)
    base = Net().eval()
    u = {"lin": (6, 6), "block.lin": (6, 6), "block.wide": (8, 6)}
    adapter = lf.Adapter(
        {
            path: lf.LowRank(torch.randn(r, s[1]), torch.randn(s[0], r), 0.3)
            for r, (path, s) in enumerate(u.items(), start=1)
        }
    )
    expected = outputs(base, adapter.apply_to(state_of(base)))
    lf.save(adapter, tmp_path / "a")
    config = json.loads((tmp_path / "a" / "adapter_config.json").read_text())
    assert set(config["rank_pattern"]) < {"^lin", r"^block\.lin", r"^block\.wide"}
    torch.testing.assert_close(reloaded_outputs(base, tmp_path / "a"), expected)
    # The check bites: with bare paths PEFT cannot even load the file.
    bare = {"lin": 1, "block.lin": 2, "block.wide": 3}
    config.update(rank_pattern=bare, alpha_pattern=bare)
    (tmp_path / "a" / "adapter_config.json").write_text(json.dumps(config))
    with pytest.raises(RuntimeError, match="size mismatch"):
        reloaded_outputs(base, tmp_path / "a")


def test_a_handmade_adapter_is_found_only_where_it_is(tmp_path):
    torch.manual_seed(3)
    base = Net().eval()
    adapter = lf.Adapter({"lin": lf.LowRank(torch.randn(2, 6), torch.randn(6, 2))})
    for pad in (False, True):
        lf.save(adapter, tmp_path / f"{pad}", pad=pad, base_model="org/base")
        model = PeftModel.from_pretrained(copy.deepcopy(base), str(tmp_path / f"{pad}"))
        wrapped = {n for n, m in model.named_modules() if hasattr(m, "lora_A")}
        assert wrapped == {"base_model.model.lin"}  # and not block.lin
        assert model.peft_config["default"].base_model_name_or_path == "org/base"
        found = reloaded_outputs(base, tmp_path / f"{pad}")
        torch.testing.assert_close(found, outputs(base, adapter.apply_to(state_of(base))))


def test_adapters_with_other_targets_add_up(tmp_path):
    torch.manual_seed(3)
    base = Net().eval()
    a = trained(base, 1, target_modules=["lin"], exclude_modules=["block.lin"])
    b = trained(base, 2, target_modules=["wide", "down_proj"][:1], r=2)
    c = trained(base, 3, target_modules=[], target_parameters=["experts.down_proj"])
    total = None
    for name, model in (("a", a), ("b", b), ("c", c)):
        model.save_pretrained(tmp_path / name)
        adapter = lf.load(tmp_path / name)
        total = adapter if total is None else total + adapter
    lf.save(total, tmp_path / "sum")
    expected = outputs(base, total.apply_to(state_of(base)))
    torch.testing.assert_close(reloaded_outputs(base, tmp_path / "sum"), expected)


def test_an_adapter_of_another_name_lies_one_folder_down(tmp_path):
    torch.manual_seed(3)
    base = Net().eval()
    model = trained(base, 1, target_modules=["lin"])
    model.add_adapter("sql", LoraConfig(target_modules=["wide"], r=3))
    model.save_pretrained(tmp_path / "both")
    model.save_pretrained(tmp_path / "one", selected_adapters=["sql"])
    assert set(lf.load(tmp_path / "both")) == {"lin", "block.lin"}
    assert set(lf.load(tmp_path / "one")) == {"block.wide"}
    assert set(lf.load(tmp_path / "both" / "sql")) == {"block.wide"}


def test_a_state_dict_in_memory(tmp_path):
    torch.manual_seed(3)
    base = Net().eval()
    model = trained(base, 1, target_modules=["lin", "embed", "conv1"])
    model.save_pretrained(tmp_path / "a")
    on_disk = lf.load(tmp_path / "a")
    state = get_peft_model_state_dict(model)
    config = model.peft_config["default"]
    live = {k: v for k, v in model.state_dict().items() if "lora_" in k}  # with ".default" in it
    assert any(".lora_A.default.weight" in k for k in live)
    bare = {k.removeprefix("base_model.model."): v for k, v in state.items()}
    for tensors in (state, live, bare):
        found = lf.load(tensors, config=config)
        assert found.digest == on_disk.digest
        lf.save(found, tmp_path / "again", overwrite=True)
        with torch.no_grad():
            assert torch.equal(reloaded_outputs(base, tmp_path / "again"), model(X))
    assert lf.load(state, alpha=6).digest == on_disk.digest
    state_before = {k: v.clone() for k, v in state.items()}
    loaded = lf.load(state, alpha=6)
    for v in state.values():
        v.data.zero_()
    assert loaded.digest == on_disk.digest
    assert any(v.any() for v in state_before.values())


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_half_precision(dtype, tmp_path):
    torch.manual_seed(3)
    base = Net().eval()
    model = trained(base, 1, target_modules=["lin", "wide"], lora_alpha=5)
    model.save_pretrained(tmp_path / "a")
    a = lf.load(tmp_path / "a", dtype=dtype)
    lf.save(a, tmp_path / "half")
    again = load_file(tmp_path / "half" / "adapter_model.safetensors")
    assert {t.dtype for t in again.values()} == {dtype}
    # 25/8 · B has more digits than the dtype holds, so it is written in float32: nothing is lost.
    lf.save(2.5 * a, tmp_path / "scaled")
    scaled = lf.load(tmp_path / "scaled")
    assert torch.equal(scaled["lin"].B, 2.5 * 5 / 4 * a["lin"].B.float())
    assert {scaled["lin"].A.dtype, scaled["lin"].B.dtype} == {dtype, torch.float32}
    expected = outputs(base, (2.5 * a).apply_to(state_of(base)))
    torch.testing.assert_close(
        reloaded_outputs(base, tmp_path / "scaled"), expected, atol=1e-4, rtol=1e-4
    )


# Experts


def test_square_experts_follow_their_kin(tmp_path):
    # down_proj is (3, 6, 6) and fits both ways; gate_up_proj tells how this model stores them.
    for transposed in (False, True):
        torch.manual_seed(3)
        base = Net(transposed=transposed, inner=6).eval()
        targets = ["experts.gate_up_proj", "experts.down_proj"]
        model = trained(base, 1, target_modules=[], target_parameters=targets)
        model.save_pretrained(tmp_path / f"{transposed}")
        adapter = lf.load(tmp_path / f"{transposed}")
        assert_states(adapter.apply_to(state_of(base)), merged(model))


def test_experts_of_unequal_rank_are_joined(tmp_path):
    torch.manual_seed(3)
    base = Net().eval()
    model = trained(base, 1, **KINDS["parameters"])
    model.save_pretrained(tmp_path / "a")
    adapter = lf.load(tmp_path / "a")
    modules = {p: u.truncate(rank=1) if p.endswith("[1]") else u for p, u in adapter.items()}
    del modules["experts.down_proj[2]"]
    layouts = {p: adapter.layout(p) for p in modules}
    part = lf.Adapter(modules, config=adapter.config, layouts=layouts)
    lf.save(part, tmp_path / "part")
    expected = outputs(base, part.apply_to(state_of(base)))
    torch.testing.assert_close(reloaded_outputs(base, tmp_path / "part"), expected)
    only = {p: u for p, u in adapter.items() if "gate_up" in p}
    only = lf.Adapter(only, config=adapter.config, layouts={p: adapter.layout(p) for p in only})
    lf.save(only, tmp_path / "only")
    expected = outputs(base, only.apply_to(state_of(base)))
    torch.testing.assert_close(reloaded_outputs(base, tmp_path / "only"), expected)


# Whole language models


def llama(tie=False, layers=3):
    torch.manual_seed(5)
    config = LlamaConfig(
        vocab_size=13,
        hidden_size=8,
        intermediate_size=12,
        num_hidden_layers=layers,
        num_attention_heads=2,
        num_key_value_heads=1,
        tie_word_embeddings=tie,
    )
    return LlamaForCausalLM(config).eval()


def test_replicated_layers(tmp_path):
    base = llama()
    replication = [[0, 2], [1, 3]]
    model = trained(base, 1, target_modules=["q_proj"], layer_replication=replication)
    model.save_pretrained(tmp_path / "a")
    adapter = lf.load(tmp_path / "a")
    assert list(adapter) == [f"model.layers.{i}.self_attn.q_proj" for i in range(4)]
    lf.save(adapter, tmp_path / "again")
    with torch.no_grad():
        expected = model(X).logits
    torch.testing.assert_close(reloaded_outputs(base, tmp_path / "again"), expected)
    lf.save(adapter.resize(tolerance=0), tmp_path / "resized")
    torch.testing.assert_close(reloaded_outputs(base, tmp_path / "resized"), expected)
    with pytest.raises(lf.MismatchError, match="4 layers"):
        adapter.apply_to(state_of(base))
    bigger, state = llama(layers=4), {}
    for key, value in state_of(base).items():
        for new, old in enumerate([0, 1, 1, 2]):
            if f"layers.{old}." in key:
                state[key.replace(f"layers.{old}.", f"layers.{new}.")] = value.clone()
        if "layers." not in key:
            state[key] = value
    torch.testing.assert_close(outputs(bigger, adapter.apply_to(state)), expected)


@pytest.mark.parametrize("ensure", [False, True], ids=["apart", "tied"])
def test_tied_embeddings(ensure, tmp_path):
    base = llama(tie=True)
    model = trained(base, 1, target_modules=["embed_tokens", "v_proj"], ensure_weight_tying=ensure)
    with torch.no_grad():
        expected = model(X).logits
    model.save_pretrained(tmp_path / "a")
    adapter = lf.load(tmp_path / "a")
    assert ("lm_head" in adapter) == ensure
    assert not any("lora_" in key for key in adapter.extras)
    # Untied, the base can hold what the adapter makes of either end.
    found = outputs(llama(tie=False), adapter.apply_to(state_of(base)))
    torch.testing.assert_close(found, expected)
    for name, changed in (("same", adapter), ("nested", adapter.nested())):
        lf.save(changed, tmp_path / name)
        torch.testing.assert_close(reloaded_outputs(base, tmp_path / name), expected)


def test_tokens_of_tied_embeddings(tmp_path):
    base = llama(tie=True)
    model = trained(base, 1, target_modules=["q_proj"], trainable_token_indices=[2, 12])
    with torch.no_grad():
        expected = model(X).logits
    model.save_pretrained(tmp_path / "a")
    adapter = lf.load(tmp_path / "a")
    assert_states(adapter.apply_to(base.state_dict()), merged(model))
    lf.save(adapter.resize(tolerance=0), tmp_path / "resized")
    torch.testing.assert_close(reloaded_outputs(base, tmp_path / "resized"), expected)


def test_stored_embeddings_are_part_of_the_result(tmp_path):
    base = llama()
    model = trained(base, 1, target_modules=["embed_tokens", "q_proj"])
    model.base_model.model.model.embed_tokens.base_layer.weight.data += 1
    model.save_pretrained(tmp_path / "a", save_embedding_layers=True)
    adapter = lf.load(tmp_path / "a")
    assert "base_model.model.model.embed_tokens.base_layer.weight" in adapter.extras
    assert_states(adapter.apply_to(state_of(base)), merged(model))
    lf.save(0.5 * adapter, tmp_path / "half")
    half = lf.load(tmp_path / "half").apply_to(state_of(base))
    torch.testing.assert_close(reloaded_outputs(base, tmp_path / "half"), outputs(base, half))


def test_rank_stabilised_scale_is_alpha_over_root_r(tmp_path):
    config = {"target_modules": ["q_proj"], "r": 4, "lora_alpha": 10, "use_rslora": True}
    trained(llama(), 1, **config).save_pretrained(tmp_path / "a")
    assert lf.load(tmp_path / "a")["model.layers.0.self_attn.q_proj"].scale == 10 / math.sqrt(4)


@pytest.mark.parametrize("wrap", ["compiled", "layers compiled", "in parallel"])
def test_a_base_that_was_wrapped_when_the_adapter_was_saved(tmp_path, wrap):
    """PEFT writes the wrappers' names; read, they are gone, and so are they when it reads ours."""
    torch.manual_seed(0)
    body = nn.Sequential(OrderedDict(q=nn.Linear(6, 6), act=nn.Tanh()))
    base = nn.Sequential(OrderedDict(body=body, head=nn.Linear(6, 4)))
    wrapped = copy.deepcopy(base)
    if wrap == "compiled":
        wrapped = torch.compile(wrapped, backend="eager")
    elif wrap == "layers compiled":
        wrapped.body = torch.compile(wrapped.body, backend="eager")
    else:
        wrapped = nn.DataParallel(wrapped)
    config = LoraConfig(r=2, lora_alpha=6, target_modules=["q", "head"], init_lora_weights=False)
    model = get_peft_model(wrapped, config)
    model.save_pretrained(tmp_path / "a")
    names = load_file(tmp_path / "a" / "adapter_model.safetensors").keys()
    assert any("_orig_mod." in n or ".module." in n for n in names)
    adapter = lf.load(tmp_path / "a")
    assert set(adapter.modules) == {"body.q", "head"}
    lf.save(adapter, tmp_path / "b")
    again = PeftModel.from_pretrained(copy.deepcopy(base), tmp_path / "b")
    x = torch.randn(3, 6)
    expected = lf.Adapter(adapter.modules).apply_to(base.state_dict())
    plain = copy.deepcopy(base)
    plain.load_state_dict(expected)
    with torch.no_grad():
        torch.testing.assert_close(again(x), plain(x))
        torch.testing.assert_close(model.eval()(x), plain(x))
