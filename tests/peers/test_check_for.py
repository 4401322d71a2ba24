"""What `check --for` says of a file is what the program does with it.

Every case is a file, the verdict, and the program itself: it loads and the effect is ours, or it is
not; it raises; or it ends the process, which a child does then. vLLM can't be run here: see
tests/engines/test_vllm.py.
"""

import json
import shlex

import pytest
import torch
from safetensors.torch import save_file

import lorafold as lf
from lorafold.cli import main
from lorafold.engines import check_for
from lorafold.parts import PREFIX

G = torch.Generator().manual_seed(0)


def R(*shape):
    return torch.randn(*shape, generator=G)


def outcome(path, reader, name, **options):
    """The outcome that a finding of this name has; None where there is none."""
    verdict = check_for(path, reader, **options)
    return next((f.outcome for f in verdict.findings if f.name == name), None)


# PEFT

CONFIG = {"peft_type": "LORA", "r": 2, "lora_alpha": 6, "target_modules": ["q_proj", "k_proj"]}
PATHS = {"layers.0.q_proj": (6, 8), "layers.0.k_proj": (6, 8)}


class Tiny(torch.nn.Module):
    def __init__(self):
        super().__init__()
        layer = torch.nn.ModuleDict({n: torch.nn.Linear(8, 6) for n in ("q_proj", "k_proj")})
        self.layers = torch.nn.ModuleList([layer])

    def forward(self, x):
        return self.layers[0]["q_proj"](x) + self.layers[0]["k_proj"](x)


def peft_folder(path, tensors=None, config=CONFIG, before=PREFIX):
    path.mkdir()
    if tensors is None:
        tensors = {}
        for name, (out, inner) in PATHS.items():
            tensors[f"{before}{name}.lora_A.weight"] = R(2, inner)
            tensors[f"{before}{name}.lora_B.weight"] = R(out, 2)
    save_file(tensors, path / "adapter_model.safetensors")
    if config is not None:
        (path / "adapter_config.json").write_text(json.dumps(config))
    return path


def merged_layers(path):
    tensors = {}
    for name in PATHS:
        tensors[f"{PREFIX}{name}.lora_A.weight"] = R(4, 8)
        tensors[f"{PREFIX}{name}.lora_B.weight"] = R(4, 2, 1)
    return peft_folder(path, tensors, {**CONFIG, "enable_lora": [True, False, True]})


def mlx_folder(path, parameters=None, tensors=None, **config):
    path.mkdir()
    tensors = tensors or {
        f"{p}.lora_{s}": R(*((i, 2) if s == "a" else (2, o)))
        for p, (o, i) in PATHS.items()
        for s in "ab"
    }
    save_file(tensors, path / "adapters.safetensors")
    said = {"fine_tune_type": "lora", "num_layers": 1, **config}
    said["lora_parameters"] = parameters or {"rank": 2, "scale": 3.0, "dropout": 0.0}
    said = {key: value for key, value in said.items() if value is not None}
    (path / "adapter_config.json").write_text(json.dumps(said))
    return path


PEFT = {
    "plain": (peft_folder, None, "loads"),
    "rslora and patterns": (
        lambda p: peft_folder(
            p, config={**CONFIG, "use_rslora": True, "alpha_pattern": {"k_proj": 1}}
        ),
        None,
        "loads",
    ),
    "compiled": (
        lambda p: peft_folder(p, before=f"{PREFIX}_orig_mod."),
        "wrapped_names",
        "ignores",
    ),
    "no config": (lambda p: peft_folder(p, config=None), "no_config", "refuses"),
    "merged layers": (merged_layers, "enable_lora", "refuses"),
    "MLX": (mlx_folder, "form", "refuses"),
}


@pytest.mark.filterwarnings("ignore::UserWarning", "ignore::RuntimeWarning")
@pytest.mark.parametrize("case", PEFT)
def test_peft(case, tmp_path):
    peft = pytest.importorskip("peft")
    make, name, expected = PEFT[case]
    path = make(tmp_path / "a")
    found = check_for(path, "peft")
    assert (found.outcome, name) == (expected, found.findings[0].name if found.findings else None)
    model = Tiny()
    x = R(3, 8)
    before = model(x)
    if expected == "refuses":
        with pytest.raises((ValueError, TypeError, KeyError, RuntimeError)):
            peft.PeftModel.from_pretrained(model, path)
        return
    after = peft.PeftModel.from_pretrained(model, path)(x)
    if expected == "ignores":
        assert torch.equal(after, before)
    else:
        ours = sum(u(x) for u in lf.load(path).values())
        assert torch.allclose(after, before + ours, atol=1e-4)


@pytest.mark.filterwarnings("ignore::UserWarning", "ignore::FutureWarning")
def test_names_in_peft(tmp_path):
    """A prefix too few: PEFT finds the targets, and no tensor of the file for them."""
    peft = pytest.importorskip("peft")
    base = tmp_path / "base"
    model = llama(base, tied=False)
    modules = {f"layers.{n}.self_attn.q_proj": lf.LowRank(R(2, 8), R(8, 2)) for n in range(2)}
    lf.save(lf.Adapter(modules, config={"target_modules": ["q_proj"]}), tmp_path / "a")
    (found,) = check_for(tmp_path / "a", "peft", base=base).findings
    assert (found.name, found.outcome, len(found.modules)) == ("names", "ignores", 2)
    ids = torch.arange(8)[None]
    with torch.no_grad():
        before = model(ids).logits
        after = peft.PeftModel.from_pretrained(model, tmp_path / "a")(ids).logits
    assert torch.equal(before, after)
    lf.save(lf.load(tmp_path / "a", base=base), tmp_path / "b")  # as the remedy does
    assert check_for(tmp_path / "b", "peft", base=base).same
    model = llama(tmp_path / "again", tied=False)
    with torch.no_grad():
        after = peft.PeftModel.from_pretrained(model, tmp_path / "b")(ids).logits
    assert not torch.allclose(before, after, atol=1e-3)


# MLX


def of_llama(path="self_attn.q_proj", out=8, inner=8, layer=0):
    return {
        f"model.layers.{layer}.{path}.lora_a": R(inner, 2),
        f"model.layers.{layer}.{path}.lora_b": R(2, out),
    }


def embedding():
    return {"model.embed_tokens.lora_a": R(16, 2), "model.embed_tokens.lora_b": R(2, 8)}


FULL = {"keys": ["model.layers.0.self_attn.q_proj"]}
PARAMETERS = {"rank": 2, "scale": 3.0, "dropout": 0.0}
EMBEDDED = {**PARAMETERS, "keys": ["model.embed_tokens"]}
MLX = {
    "plain": ({"tensors": of_llama()}, None, "loads"),
    "alpha beside": (
        {"tensors": of_llama(), "parameters": {**PARAMETERS, "alpha": 1}},
        "alpha",
        "loads",
    ),
    "older": (
        {"tensors": of_llama(), "num_layers": None, "lora_layers": 2},
        "lora_layers",
        "refuses",
    ),
    "no scale": (
        {"tensors": of_llama(), "parameters": {"rank": 2, "alpha": 6, "dropout": 0.0}},
        "no_scale",
        "refuses",
    ),
    "no dropout": (
        {"tensors": of_llama(), "parameters": {"rank": 2, "scale": 3.0}},
        "no_dropout",
        "refuses",
    ),
    "ranks": ({"tensors": of_llama(), "parameters": {**PARAMETERS, "rank": 4}}, "ranks", "refuses"),
    "blocks before": (
        {"tensors": of_llama(layer=0), "parameters": {**PARAMETERS, "keys": ["self_attn.q_proj"]}},
        "num_layers",
        "refuses",
    ),
    "embedding, tied": (
        {"tensors": embedding(), "parameters": EMBEDDED},
        "tied_embedding",
        "misreads",
    ),
    "embedding": ({"tensors": embedding(), "parameters": EMBEDDED}, None, "loads"),
}


def llama(folder, tied):
    transformers = pytest.importorskip("transformers")
    config = transformers.LlamaConfig(
        vocab_size=16,
        hidden_size=8,
        intermediate_size=16,
        num_hidden_layers=2,
        num_attention_heads=2,
        num_key_value_heads=2,
        tie_word_embeddings=tied,
    )
    torch.manual_seed(0)
    model = transformers.LlamaForCausalLM(config).eval()
    model.save_pretrained(folder)
    return model


@pytest.mark.filterwarnings("ignore:.*is of the embedding alone here")
@pytest.mark.parametrize("case", MLX)
def test_mlx(case, tmp_path, monkeypatch):
    pytest.importorskip("mlx_lm")
    import mlx.core as mx
    from mlx_lm.tuner.utils import load_adapters
    from mlx_lm.utils import load_model

    options, name, expected = MLX[case]
    options = {"num_layers": 2, **options}
    if case == "blocks before":
        options["num_layers"] = 1
    path = mlx_folder(tmp_path / "a", **options)
    base = tmp_path / "base"
    model = llama(base, tied=case == "embedding, tied")
    found = check_for(path, "mlx", base=base)
    assert (found.outcome, name) == (expected, found.findings[0].name if found.findings else None)
    ids = list(range(8))
    runs, _ = load_model(base)
    if expected == "refuses":
        with pytest.raises((AttributeError, KeyError, ValueError)):
            load_adapters(runs, str(path))
        words = shlex.split(found.findings[0].remedy)
        if words[0] != "lorafold":
            return
        monkeypatch.chdir(tmp_path)
        with pytest.raises(SystemExit) as ended:
            main(words[1:])
        assert ended.value.code == 0
        path, expected = tmp_path / words[words.index("-o") + 1], "loads"
        assert check_for(path, "mlx", base=base).same
        runs, _ = load_model(base)
    logits = torch.tensor(load_adapters(runs, str(path))(mx.array([ids])).tolist())
    with lf.attach(model, lf.load(path)).use("default"), torch.no_grad():
        ours = model(torch.tensor([ids])).logits
    assert torch.allclose(logits, ours, atol=1e-3) == (expected == "loads")


def test_mlx_takes_no_folder_of_pefts(tmp_path):
    pytest.importorskip("mlx_lm")
    from mlx_lm.tuner.utils import load_adapters
    from mlx_lm.utils import load_model

    path = peft_folder(tmp_path / "a")
    llama(tmp_path / "base", False)
    assert outcome(path, "mlx", "form") == "refuses"
    runs, _ = load_model(tmp_path / "base")
    with pytest.raises((AttributeError, KeyError)):
        load_adapters(runs, str(path))


# diffusers

ATTENTION = "down_blocks.0.attentions.0"
MODULES = (
    f"{ATTENTION}.proj_in",
    f"{ATTENTION}.transformer_blocks.0.attn1.to_q",
    f"{ATTENTION}.transformer_blocks.0.attn1.to_out.0",
    f"{ATTENTION}.transformer_blocks.0.ff.net.2",
    "down_blocks.0.resnets.0.conv1",
)


@pytest.fixture(scope="module")
def diffusers():
    return pytest.importorskip("diffusers")


def unet(diffusers):
    torch.manual_seed(0)
    return diffusers.UNet2DConditionModel(
        sample_size=8,
        block_out_channels=(8, 16),
        down_block_types=("CrossAttnDownBlock2D", "DownBlock2D"),
        up_block_types=("UpBlock2D", "CrossAttnUpBlock2D"),
        norm_num_groups=4,
        cross_attention_dim=12,
        attention_head_dim=4,
        layers_per_block=1,
    )


def of_unet(model, path, alphas, ranks=(), kind="plain"):
    """A file of kohya-ss's with α of each module, None for none."""
    tensors = {}
    for k, name in enumerate(MODULES):
        layer, rank = model.get_submodule(name), dict(ranks).get(k, 2)
        stem = "lora_unet_" + name.replace(".", "_")
        out, *rest = layer.weight.shape
        if kind == "loha":
            if len(rest) == 1:
                for n in (1, 2):
                    tensors[f"{stem}.hada_w{n}_a"] = R(out, 1)
                    tensors[f"{stem}.hada_w{n}_b"] = R(1, *rest)
            continue
        if kind == "lokr":
            if len(rest) == 1:
                tensors[f"{stem}.lokr_w1"] = R(2, 2)
                tensors[f"{stem}.lokr_w2_a"] = R(out // 2, 1)
                tensors[f"{stem}.lokr_w2_b"] = R(1, rest[0] // 2)
            continue
        is_conv = len(rest) > 1
        if kind == "mid" and is_conv:
            tensors[f"{stem}.lora_mid.weight"] = R(rank, rank, *rest[1:])
            rest = (rest[0], 1, 1)
        tensors[f"{stem}.lora_down.weight"] = R(rank, *rest)
        tensors[f"{stem}.lora_up.weight"] = R(out, rank, *([1, 1] if is_conv else []))
        if kind == "dora":
            tensors[f"{stem}.dora_scale"] = R(out, *([1] * len(rest))).abs()
        if alphas[k] is not None:
            tensors[f"{stem}.alpha"] = torch.tensor(float(alphas[k]))
    save_file(tensors, path)
    return path


def into_unet(diffusers, path):
    """(what each weight changed by), as diffusers loads and fuses a file."""
    from diffusers.loaders import StableDiffusionLoraLoaderMixin as Mixin

    model = unet(diffusers)
    before = {key: value.clone() for key, value in model.state_dict().items()}
    tensors, alphas, metadata = Mixin.lora_state_dict(
        str(path), unet_config=model.config, return_lora_metadata=True
    )
    Mixin.load_lora_into_unet(tensors, network_alphas=alphas, unet=model, metadata=metadata)
    model.fuse_lora()
    state = model.state_dict()
    after = {k.replace(".base_layer", ""): t for k, t in state.items() if ".lora_" not in k}
    return {name: after[f"{name}.weight"] - before[f"{name}.weight"] for name in MODULES}


EQUAL, OTHERS = (4, 4, 4, 4, 4), {1: 3, 2: 4}
ALPHAS = {
    "equal": (EQUAL, {}, "loads"),
    "none": ((None,) * 5, {}, "loads"),
    "none, mixed ranks": ((None,) * 5, OTHERS, "loads"),
    "another of a projection": ((1, 4, 4, 4, 4), {}, "loads"),
    "another of a query": ((4, 1, 4, 4, 4), {}, "misreads"),
    "another of an output": ((4, 4, 1, 4, 4), {}, "misreads"),
    "as the ranks": ((2, 3, 4, 2, 2), OTHERS, "misreads"),
    "one without": ((4, 4, 4, None, 4), {}, "misreads"),
    "one with": ((None, None, 4, None, None), {}, "misreads"),
}
DIFFUSERS_WARNS = pytest.mark.filterwarnings("ignore")  # of what is tried here on purpose


@DIFFUSERS_WARNS
@pytest.mark.parametrize("case", ALPHAS)
def test_alphas_in_diffusers(case, diffusers, tmp_path):
    """The factors that it is said to apply are those that it applies."""
    alphas, ranks, expected = ALPHAS[case]
    path = of_unet(unet(diffusers), tmp_path / "x.safetensors", alphas, ranks.items())
    found = check_for(path, "diffusers")
    assert found.outcome == expected
    told = {p: f for finding in found.findings for p, f in finding.factors.items()}
    changed = into_unet(diffusers, path)
    for name, u in lf.load(path).items():
        delta, BA = changed[name.removeprefix("unet.")].flatten(1), u.dense() / u.scale
        applied, right = told.get(name, (u.scale, u.scale))
        assert right == u.scale
        assert torch.allclose(delta, applied * BA, atol=1e-5), name
    assert (told != {}) == (expected == "misreads")


@DIFFUSERS_WARNS
@pytest.mark.parametrize("kind", ["loha", "lokr", "mid"])
def test_lycoris_in_diffusers(kind, diffusers, tmp_path):
    path = of_unet(unet(diffusers), tmp_path / "x.safetensors", EQUAL, kind=kind)
    assert outcome(path, "diffusers", kind) == "refuses"
    with pytest.raises(ValueError, match="not been correctly renamed"):
        into_unet(diffusers, path)


@DIFFUSERS_WARNS
def test_dora_in_diffusers(diffusers, tmp_path):
    path = of_unet(unet(diffusers), tmp_path / "x.safetensors", EQUAL, kind="dora")
    assert outcome(path, "diffusers", "dora") == "ignores"
    changed = into_unet(diffusers, path)
    for name, u in lf.load(path).items():  # as if there were no magnitudes
        assert torch.allclose(changed[name.removeprefix("unet.")].flatten(1), u.dense(), atol=1e-5)


def flux(diffusers):
    torch.manual_seed(0)
    return diffusers.FluxTransformer2DModel(
        patch_size=1,
        in_channels=4,
        num_layers=1,
        num_single_layers=1,
        attention_head_dim=16,
        num_attention_heads=2,
        joint_attention_dim=24,
        pooled_projection_dim=20,
        axes_dims_rope=(4, 4, 8),
    )


def into_flux(diffusers, path):
    """The modules of a FLUX that diffusers adapts."""
    from diffusers.loaders import FluxLoraLoaderMixin as Mixin

    model = flux(diffusers)
    tensors, alphas, metadata = Mixin.lora_state_dict(
        str(path), return_alphas=True, return_lora_metadata=True
    )
    Mixin.load_lora_into_transformer(
        tensors, network_alphas=alphas, transformer=model, metadata=metadata
    )
    return {name for name, m in model.named_modules() if hasattr(m, "lora_A")}


@DIFFUSERS_WARNS
def test_names_of_flux_in_diffusers(diffusers, tmp_path):
    down, up = "lora_down.weight", "lora_up.weight"
    proj = {"lora_unet_double_blocks_0_img_attn_proj": (32, 32)}
    final = {
        "lora_unet_final_layer_linear": (4, 32),
        "lora_unet_final_layer_adaLN_modulation_1": (64, 32),
    }
    for name, modules in (("plain", proj), ("final", proj | final)):
        tensors = {}
        for stem, (out, inner) in modules.items():
            tensors |= {f"{stem}.{down}": R(2, inner), f"{stem}.{up}": R(out, 2)}
        save_file(tensors, tmp_path / f"{name}.safetensors")
    path = tmp_path / "plain.safetensors"
    assert check_for(path, "diffusers").outcome == "loads"
    assert into_flux(diffusers, path) == {"transformer_blocks.0.attn.to_out.0"}
    path = tmp_path / "final.safetensors"
    assert outcome(path, "diffusers", "final_layer") == "ignores"
    assert into_flux(diffusers, path) == {"transformer_blocks.0.attn.to_out.0"}
    comfy = {
        "diffusion_model.double_blocks.0.img_attn.proj.lora_A.weight": R(2, 32),
        "diffusion_model.double_blocks.0.img_attn.proj.lora_B.weight": R(32, 2),
    }
    save_file(comfy, tmp_path / "comfy.safetensors")
    assert outcome(tmp_path / "comfy.safetensors", "diffusers", "comfy_names") == "ignores"
    assert into_flux(diffusers, tmp_path / "comfy.safetensors") == set()


def pair(name, out, inner, down="lora_down", up="lora_up", alpha=None):
    tensors = {f"{name}.{down}.weight": R(2, inner), f"{name}.{up}.weight": R(out, 2)}
    return tensors if alpha is None else {**tensors, f"{name}.alpha": torch.tensor(float(alpha))}


AB = ("lora_A", "lora_B")
PROJ, COMFY = "lora_unet_double_blocks_0_img_attn_proj", "diffusion_model.double_blocks.0"
OUT, Q = "transformer_blocks.0.attn.to_out.0", "transformer_blocks.0.attn.to_q"
T5 = "encoder_block_0_layer_0_SelfAttention_q"
PLAIN = pair(PROJ, 32, 32)
# {case: (tensors, what is found, the modules that diffusers adapts, or its error)}
FLUX = {
    "CLIP": (PLAIN | pair("lora_te1_text_model_encoder_layers_0_mlp_fc1", 8, 8), None, {OUT}),
    "T5": (PLAIN | pair(f"lora_te3_{T5}", 8, 8), "dropped", {OUT}),
    "a bias": (PLAIN | {f"{PROJ}.diff_b": R(32)}, "dropped", {OUT}),
    "a difference": (PLAIN | {"lora_unet_img_in.diff": R(32, 4)}, "differences", "Incompatible"),
    "a strange name": (PLAIN | pair("lora_unet_double_blocks_0_x", 8, 8), "names", "Incompatible"),
    "its own paths": (pair("lora_unet_" + Q.replace(".", "_"), 32, 32), "names", "Incompatible"),
    "ComfyUI": (pair(f"{COMFY}.img_attn.proj", 32, 32, alpha=1), None, {OUT}),
    "ComfyUI, A and B": (pair(f"{COMFY}.img_attn.proj", 32, 32, *AB), "comfy_names", set()),
    "ComfyUI, the end": (
        pair(f"{COMFY}.img_attn.proj", 32, 32) | pair("diffusion_model.final_layer.linear", 4, 32),
        "final_layer",
        {OUT},
    ),
    "ComfyUI, T5": (
        pair(f"{COMFY}.img_attn.proj", 32, 32)
        | pair(f"text_encoders.t5xxl.transformer.{T5.replace('_', '.')}", 8, 8),
        "dropped",
        {OUT},
    ),
    "x-flux": (
        {
            "double_blocks.0.processor.proj_lora1.down.weight": R(2, 32),
            "double_blocks.0.processor.proj_lora1.up.weight": R(32, 2),
        },
        None,
        {OUT},
    ),
    "α beside A and B": (pair(f"transformer.{Q}", 32, 32, *AB, alpha=1), None, {Q}),
    "α beside down and up": (pair(f"transformer.{Q}", 32, 32, alpha=1), "alphas", {Q}),
    "without a part": (pair(Q, 32, 32, *AB), "no_part", set()),
}


@DIFFUSERS_WARNS
@pytest.mark.parametrize("case", FLUX)
def test_keys_of_flux_in_diffusers(case, diffusers, tmp_path):
    tensors, name, expected = FLUX[case]
    save_file(tensors, tmp_path / "x.safetensors")
    found = check_for(tmp_path / "x.safetensors", "diffusers").findings
    assert [f.name for f in found] == ([] if name is None else [name])
    if isinstance(expected, set):
        assert into_flux(diffusers, tmp_path / "x.safetensors") == expected
    else:
        with pytest.raises(ValueError, match=expected):
            into_flux(diffusers, tmp_path / "x.safetensors")
        assert found[0].outcome == "refuses"


QUERY = f"{ATTENTION}.transformer_blocks.0.attn1.to_q"
OF_UNET = pair("lora_unet_" + QUERY.replace(".", "_"), 8, 8, alpha=2)
# {case: (tensors, what is found, whether the query is adapted, or the error)}
UNET = {
    "T5": (OF_UNET | pair(f"lora_te3_{T5}", 8, 8), "other_keys", False),
    "another key": (OF_UNET | {"step.x": R(1)}, "other_keys", "lora"),
    "a difference": (OF_UNET | {"lora_unet_conv_in.diff": R(8, 4, 3, 3)}, "differences", "renamed"),
    "a strange name": (OF_UNET | pair("lora_unet_foo_bar", 8, 8), "names", True),
    "ComfyUI": (
        pair("diffusion_model.input_blocks.1.1.transformer_blocks.0.attn1.to_q", 8, 8),
        "comfy_names",
        False,
    ),
    "without a part": (pair(QUERY, 8, 8, *AB), "no_part", False),
    "the first names without a part": (
        {
            f"{QUERY[:-5]}.processor.to_q_lora.down.weight": R(2, 8),
            f"{QUERY[:-5]}.processor.to_q_lora.up.weight": R(8, 2),
        },
        "no_part",
        False,
    ),
    "α beside A and B": (pair(f"unet.{QUERY}", 8, 8, *AB, alpha=1), "keys", "lora"),
    "a language model's": (
        pair("base_model.model.model.layers.0.q_proj", 8, 8, *AB) | {"x.alpha": torch.ones(())},
        "form",
        "lora",
    ),
}


@DIFFUSERS_WARNS
@pytest.mark.parametrize("case", UNET)
def test_keys_of_a_unet_in_diffusers(case, diffusers, tmp_path):
    from diffusers.loaders import StableDiffusionLoraLoaderMixin as Mixin

    tensors, name, expected = UNET[case]
    path = tmp_path / "x.safetensors"
    save_file(tensors, path)
    (found,) = check_for(path, "diffusers").findings
    assert (found.name, found.outcome != "loads") == (name, True)
    model = unet(diffusers)

    def load():
        said, alphas, metadata = Mixin.lora_state_dict(
            str(path), unet_config=model.config, return_lora_metadata=True
        )
        if not all("lora" in key for key in said):  # as load_lora_weights looks
            raise ValueError("contain 'lora'")
        Mixin.load_lora_into_unet(said, network_alphas=alphas, unet=model, metadata=metadata)

    if isinstance(expected, str):
        with pytest.raises(ValueError, match=expected):
            load()
    else:
        load()
        adapted = {name for name, m in model.named_modules() if hasattr(m, "lora_A")}
        assert adapted == ({QUERY} if expected else set())


# kohya-ss and LyCORIS


class Layers(torch.nn.Module):
    def __init__(self):
        super().__init__()
        self.q = torch.nn.Linear(48, 80, bias=False)
        self.c = torch.nn.Conv2d(48, 80, 3, bias=False)


def lokr_conv():
    return {
        "lokr_w1": R(8, 6),
        "lokr_t2": R(2, 2, 3, 3),
        "lokr_w2_a": R(2, 10),
        "lokr_w2_b": R(2, 8),
    }


LYCORIS = {
    "plain": ("q", {"lora_down.weight": R(2, 48), "lora_up.weight": R(80, 2)}, 4.0, None, "loads"),
    "no alpha": (
        "q",
        {"lora_down.weight": R(2, 48), "lora_up.weight": R(80, 2)},
        None,
        "no_alpha",
        "refuses",
    ),
    "LoHa, no alpha": (
        "q",
        {
            "hada_w1_a": R(80, 2),
            "hada_w1_b": R(2, 48),
            "hada_w2_a": R(80, 2),
            "hada_w2_b": R(2, 48),
        },
        None,
        "no_alpha",
        "refuses",
    ),
    "lokr_t2": ("c", lokr_conv(), 2.0, "lokr_t2", "refuses"),
    "columns": (
        "q",
        {
            "lora_down.weight": R(2, 48),
            "lora_up.weight": R(80, 2),
            "dora_scale": R(1, 48).abs(),
        },
        2.0,
        "dora_columns",
        "refuses",
    ),
}


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("case", LYCORIS)
def test_kohya(case, tmp_path):
    pytest.importorskip("lycoris")
    from lycoris import create_lycoris_from_weights

    name, parts, alpha, finding, expected = LYCORIS[case]
    parts = {**parts, **({} if alpha is None else {"alpha": torch.tensor(alpha)})}
    path = tmp_path / "x.safetensors"
    save_file({f"lora_unet_{name}.{key}": t for key, t in parts.items()}, path)
    found = check_for(path, "kohya")
    assert (found.outcome, finding) == (
        expected,
        found.findings[0].name if found.findings else None,
    )
    theirs = tmp_path / "theirs.safetensors"
    save_file({f"lycoris_{name}.{key}": t for key, t in parts.items()}, theirs)
    model = Layers()
    if expected == "refuses":
        with pytest.raises((TypeError, AttributeError, RuntimeError, KeyError, ValueError)):
            network, _ = create_lycoris_from_weights(1.0, str(theirs), model)
            network.merge_to(1.0)
        return
    before = model.q.weight.detach().clone()
    network, _ = create_lycoris_from_weights(1.0, str(theirs), model)
    network.merge_to(1.0)
    (u,) = lf.load(path).values()
    assert torch.allclose(model.q.weight - before, u.dense(), atol=1e-4)
