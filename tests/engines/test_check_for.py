"""Findings, verdicts, and remedies that run; the programs themselves are in tests/peers."""

import json
import shlex

import pytest
import torch
from safetensors.torch import save_file

import lorafold as lf
from lorafold.cli import main
from lorafold.cli.check import READERS as OFFERED
from lorafold.engines import READERS, check_for, finding
from lorafold.errors import FileError, MismatchError
from lorafold.parts import PREFIX

PATHS = {
    "model.layers.0.self_attn.q_proj": (16, 16),
    "model.layers.0.self_attn.v_proj": (8, 16),
    "model.layers.0.mlp.down_proj": (16, 24),
}


def R(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def folder(path, before=PREFIX, rank=4, extra=None, ranks=None, **config):
    """A PEFT folder as a trainer leaves it."""
    path.mkdir()
    tensors = dict(extra or {})
    for name, (out, inner) in PATHS.items():
        r = (ranks or {}).get(name.rpartition(".")[2], rank)
        tensors[f"{before}{name}.lora_A.weight"] = R(r, inner)
        tensors[f"{before}{name}.lora_B.weight"] = R(out, r, seed=1)
    save_file(tensors, path / "adapter_model.safetensors")
    said = {"peft_type": "LORA", "r": rank, "lora_alpha": 6, "target_modules": ["q_proj", "v_proj"]}
    said["target_modules"].append("down_proj")
    said["base_model_name_or_path"] = "base"
    (path / "adapter_config.json").write_text(json.dumps({**said, **config}))
    return path


def of(verdict, name):
    return next(f for f in verdict.findings if f.name == name)


def test_a_plain_one_loads_where_its_form_is_read(tmp_path):
    path = folder(tmp_path / "a")
    assert {r: check_for(path, r).outcome for r in READERS} == {
        "vllm": "loads",
        "llama.cpp": "loads",
        "mlx": "refuses",
        "peft": "loads",
        "diffusers": "refuses",
        "kohya": "refuses",
    }
    assert OFFERED == READERS


def test_the_worst_finding_is_the_verdict():
    say = finding.Finding
    verdict = finding.ordered(
        "x", [say("a", "loads", ""), say("b", "aborts", ""), say("c", "ignores", "")]
    )
    assert [f.name for f in verdict.findings] == ["b", "c", "a"]
    assert (verdict.outcome, verdict.same) == ("aborts", False)
    assert finding.ordered("x", []).same


def test_what_is_no_file_or_no_program(tmp_path):
    with pytest.raises(FileError, match="no such file"):
        check_for(tmp_path / "nowhere", "peft")
    path = folder(tmp_path / "a")
    lf.fold({"sql": path}, tmp_path / "lib", tolerance=0).close()
    with pytest.raises(FileError, match=r"lies in a library.*`lorafold convert LIB:NAME -o OUT"):
        check_for(f"{tmp_path}/lib:sql", "peft")
    (tmp_path / "b").mkdir()
    torch.save({"q.lora_A.weight": R(2, 3)}, tmp_path / "b" / "adapter_model.bin")
    with pytest.raises(FileError, match=r"is a pickle, .*--to peft --allow-pickle`"):
        check_for(tmp_path / "b", "vllm")
    save_file({"embed.weight": R(2, 3)}, tmp_path / "whole.safetensors")
    save_file({}, tmp_path / "none.safetensors")
    for name, why in (("whole", "none of its 1 tensors is a factor"), ("none", "no tensors")):
        for reader in READERS:
            with pytest.raises(FileError, match=why):
                check_for(tmp_path / f"{name}.safetensors", reader)
    half = {"lora_unet_conv_in.lora_up.weight": R(8, 2)}
    save_file(half, tmp_path / "half.safetensors")
    with pytest.raises(FileError, match="has no lora_down"):
        check_for(tmp_path / "half.safetensors", "diffusers")
    with pytest.raises(MismatchError, match=r"no rules of 'vlm'.*'vllm'"):
        check_for(path, "vlm")


# vLLM, by its published rules

VLLM = {
    "modules_to_save": (
        {"modules_to_save": ["lm_head"], "extra": {f"{PREFIX}lm_head.weight": R(8, 16)}},
        "refuses",
    ),
    "dora": (
        {
            "use_dora": True,
            "extra": {f"{PREFIX}{p}.lora_magnitude_vector": R(s[0]) for p, s in PATHS.items()},
        },
        "refuses",
    ),
    "bias": (
        {"bias": "lora_only", "extra": {f"{PREFIX}model.layers.0.self_attn.q_proj.bias": R(16)}},
        "refuses",
    ),
    "lora_bias": (
        {
            "lora_bias": True,
            "extra": {f"{PREFIX}{p}.lora_B.bias": R(s[0]) for p, s in PATHS.items()},
        },
        "refuses",
    ),
    "tensors": (
        {
            "trainable_token_indices": {"embed_tokens": [1]},
            "extra": {f"{PREFIX}model.embed_tokens.token_adapter.trainable_tokens_delta": R(1, 16)},
        },
        "refuses",
    ),
    "base_weights": (
        {"extra": {f"{PREFIX}model.embed_tokens.base_layer.weight": R(8, 16)}},
        "ignores",
    ),
    "init": ({"init_lora_weights": "pissa"}, "refuses"),
    "variant": ({"use_qalora": True}, "refuses"),
    "patterns": ({"alpha_pattern": {"v_proj": 12}}, "misreads"),
    "wrapped_names": ({"before": f"{PREFIX}_orig_mod."}, "ignores"),
    "rank": ({"rank": 24}, "refuses"),
}


@pytest.mark.parametrize("name", VLLM)
def test_vllm(name, tmp_path):
    options, expected = VLLM[name]
    verdict = check_for(folder(tmp_path / "a", **options), "vllm")
    assert (verdict.outcome, verdict.findings[0].name) == (expected, name)
    assert {f.name for f in verdict.findings} <= {name, "tensors"}


def test_the_factor_that_vllm_applies(tmp_path):
    path = folder(tmp_path / "a", ranks={"v_proj": 2}, rank_pattern={"v_proj": 2}, use_rslora=True)
    factors = of(check_for(path, "vllm"), "patterns").factors
    assert factors == {"model.layers.0.self_attn.v_proj": (3.0, pytest.approx(6 / 2**0.5))}
    assert check_for(folder(tmp_path / "b", use_rslora=True), "vllm").same


def test_what_vllm_takes_beside_factors(tmp_path):
    head = {"modules_to_save": ["score"], "extra": {f"{PREFIX}score.weight": R(2, 16)}}
    assert check_for(folder(tmp_path / "a", **head), "vllm").same
    assert check_for(folder(tmp_path / "b", init_lora_weights="gaussian"), "vllm").same
    embedding = {"extra": {f"{PREFIX}model.embed_tokens.weight": R(8, 16)}}
    assert (
        of(check_for(folder(tmp_path / "c", **embedding), "vllm"), "tensors").outcome == "refuses"
    )


def test_the_rank_that_vllm_has_to_be_started_with(tmp_path):
    for rank, says in ((9, None), (16, None), (17, 32), (65, 128), (512, 512)):
        path = folder(tmp_path / str(rank), rank=rank)
        verdict = check_for(path, "vllm")
        assert verdict.same == (says is None)
        assert says is None or verdict.findings[0].remedy.endswith(f"--max-lora-rank {says}")
    (found,) = check_for(folder(tmp_path / "513", rank=513), "vllm").findings
    assert found.remedy.endswith("--rank 512")


# llama.cpp's converter, by its source


def test_the_factors_that_the_converter_leads_to(tmp_path):
    path = folder(tmp_path / "a", use_rslora=True)
    found = of(check_for(path, "llama.cpp"), "rslora")
    assert set(found.factors.values()) == {(1.5, 3.0)}
    mixed = folder(tmp_path / "b", ranks={"v_proj": 2}, rank_pattern={"v_proj": 2})
    assert check_for(mixed, "llama.cpp").same  # α of all, by each tensor's own rank: right here
    alphas = folder(tmp_path / "c", alpha_pattern={"v_proj": 2})
    found = of(check_for(alphas, "llama.cpp"), "patterns")
    assert found.factors == {"model.layers.0.self_attn.v_proj": (1.5, 0.5)}
    options, _ = VLLM["dora"]
    assert (
        of(check_for(folder(tmp_path / "d", **options), "llama.cpp"), "dora").outcome == "refuses"
    )


# Remedies

REMEDIES = {
    ("vllm", "patterns"): {"alpha_pattern": {"v_proj": 12}},
    ("vllm", "wrapped_names"): {"before": f"{PREFIX}_orig_mod."},
    ("vllm", "rank"): {"rank": 520},
    ("peft", "wrapped_names"): {"before": f"{PREFIX}_orig_mod."},
    ("mlx", "form"): {"use_rslora": True},
    ("llama.cpp", "rslora"): {"use_rslora": True},
}


@pytest.mark.parametrize("case", REMEDIES, ids=" ".join)
def test_after_the_remedy_it_loads(case, tmp_path, monkeypatch, capsys):
    reader, name = case
    monkeypatch.chdir(tmp_path)
    base(tmp_path / "base")  # which its config names
    path = folder(tmp_path / "a", **REMEDIES[case])
    remedy = of(check_for("a", reader), name).remedy
    words = shlex.split(remedy)
    assert words[0] == "lorafold"
    if "gguf" in words:
        pytest.importorskip("gguf")
    with pytest.raises(SystemExit) as ended:
        main(words[1:])
    assert ended.value.code == 0, capsys.readouterr().err
    out = words[words.index("-o") + 1] if "-o" in words else words[3]
    after = check_for(out, reader, base=tmp_path / "base" if "gguf" in words else None)
    findings = [f for f in after.findings if f.outcome != "loads"]
    assert findings == []
    if "gguf" not in words:
        a, b = lf.load(path), lf.load(out)
        assert (
            name == "rank" or a.distance(lf.Adapter(b.modules, config=a.config)) < 1e-5 * a.norm()
        )


def flat_file(path, alphas, parts=("lora_down.weight", "lora_up.weight")):
    """A file of kohya-ss's of some modules of a UNet, each with its α or without."""
    shapes = {"lora_down.weight": (2, 8), "lora_up.weight": (8, 2), "lora_mid.weight": (2, 2, 1, 1)}
    block = "lora_unet_down_blocks_0_attentions_0_transformer_blocks_0_attn1"
    tensors = {}
    for name, alpha in alphas.items():
        tensors |= {f"{block}_{name}.{part}": R(*shapes[part]) for part in parts}
        if alpha is not None:
            tensors[f"{block}_{name}.alpha"] = torch.tensor(float(alpha))
    save_file(tensors, path)
    return path


FLAT = {
    ("diffusers", "alphas"): {"to_q": 1, "to_k": 4, "to_v": 4},
    ("kohya", "no_alpha"): {"to_q": 1, "to_k": None},
}


@pytest.mark.parametrize("case", FLAT, ids=" ".join)
def test_after_the_remedy_an_image_models_loads(case, tmp_path, monkeypatch, capsys):
    reader, name = case
    monkeypatch.chdir(tmp_path)
    flat_file(tmp_path / "x.safetensors", FLAT[case])
    a = lf.load("x.safetensors")
    words = shlex.split(of(check_for("x.safetensors", reader), name).remedy)
    with pytest.raises(SystemExit) as ended:
        main(words[1:])
    assert ended.value.code == 0, capsys.readouterr().err
    out = words[words.index("-o") + 1]
    assert check_for(out, reader).same
    b = lf.load(out)
    assert a.modules.keys() == b.modules.keys()
    assert all(torch.allclose(u.dense(), b[p].dense(), atol=1e-5) for p, u in a.items())


def test_a_pipelines_folder_is_a_base(tmp_path):
    unet = tmp_path / "sd" / "unet"
    unet.mkdir(parents=True)
    (tmp_path / "sd" / "model_index.json").write_text("{}")
    (unet / "config.json").write_text("{}")
    path = "down_blocks.0.attentions.0.transformer_blocks.0.attn1.to_q.weight"
    save_file({path: R(8, 8)}, unet / "diffusion_pytorch_model.safetensors")
    flat_file(tmp_path / "x.safetensors", {"to_q": 1})
    for reader in ("diffusers", "kohya"):
        assert check_for(tmp_path / "x.safetensors", reader, base=tmp_path / "sd").same
    flat_file(tmp_path / "y.safetensors", {"to_nothing": 1})
    with pytest.raises(MismatchError, match="no module of the base.*to_nothing"):
        check_for(tmp_path / "y.safetensors", "kohya", base=tmp_path / "sd")


def test_every_form_is_told_by_every_program(tmp_path):
    """With a remedy where there is one."""
    flat_file(tmp_path / "x.safetensors", {"to_q": 1, "to_k": 1})
    for reader in ("vllm", "llama.cpp", "mlx", "peft"):
        (found,) = check_for(tmp_path / "x.safetensors", reader).findings
        assert (found.name, found.outcome) == ("form", "refuses")
        assert (found.remedy is None) == (reader != "peft")  # a UNet is for none of the others
    (found,) = check_for(folder(tmp_path / "a"), "kohya").findings
    assert (found.name, found.remedy) == ("form", None)  # nor a language model for this one


def base(path):
    path.mkdir()
    state = {f"{p}.weight": R(*shape) for p, shape in PATHS.items()}
    state["model.embed_tokens.weight"] = R(8, 16)
    save_file(state, path / "model.safetensors")
    config = {"model_type": "llama", "architectures": ["LlamaForCausalLM"], "hidden_size": 16}
    config |= {"num_attention_heads": 4, "num_key_value_heads": 2, "num_hidden_layers": 1}
    (path / "config.json").write_text(json.dumps(config))
    return path
