"""diffusers' files and kohya-ss's in diffusers itself: what it fuses is what lorafold adds."""

from __future__ import annotations

import json
import warnings

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import nn

import lorafold as lf
from lorafold.parts import Layout

pytest.importorskip("peft")
transformers = pytest.importorskip("transformers")
with warnings.catch_warnings():
    warnings.simplefilter("ignore")
    pytest.importorskip("diffusers", reason="no wheel of diffusers here", exc_type=ImportError)
    from diffusers import FluxTransformer2DModel, UNet2DConditionModel
    from diffusers.loaders import FluxLoraLoaderMixin, StableDiffusionLoraLoaderMixin
    from diffusers.utils import logging

logging.set_verbosity_error()
pytestmark = pytest.mark.filterwarnings("ignore")  # its own, of deprecated parts of torch


def sd1():
    return UNet2DConditionModel(
        block_out_channels=(8, 16),
        layers_per_block=2,
        sample_size=8,
        down_block_types=("CrossAttnDownBlock2D", "DownBlock2D"),
        up_block_types=("UpBlock2D", "CrossAttnUpBlock2D"),
        norm_num_groups=4,
        cross_attention_dim=12,
        attention_head_dim=4,
    )


def sdxl():
    return UNet2DConditionModel(
        block_out_channels=(8, 16, 16),
        layers_per_block=2,
        sample_size=8,
        down_block_types=("DownBlock2D", "CrossAttnDownBlock2D", "CrossAttnDownBlock2D"),
        up_block_types=("CrossAttnUpBlock2D", "CrossAttnUpBlock2D", "UpBlock2D"),
        norm_num_groups=4,
        cross_attention_dim=12,
        attention_head_dim=4,
        transformer_layers_per_block=(1, 2, 2),
        addition_embed_type="text_time",
        addition_time_embed_dim=4,
        projection_class_embeddings_input_dim=24,
    )


def text_encoder():
    config = transformers.CLIPTextConfig(
        vocab_size=20,
        hidden_size=16,
        intermediate_size=24,
        num_hidden_layers=2,
        num_attention_heads=2,
        max_position_embeddings=8,
    )
    return transformers.CLIPTextModel(config)


def flux():
    return FluxTransformer2DModel(
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


def layers(model):
    kinds = (nn.Linear, nn.Conv2d)
    return {name: x for name, x in model.named_modules() if isinstance(x, kinds)}


def adapter_of(model, owner, scales=(1.0, 0.5, 1.3)):
    """An update of every layer, of mixed ranks and scales."""
    modules, layouts = {}, {}
    for k, (name, layer) in enumerate(layers(model).items()):
        shape = tuple(layer.weight.shape)
        inner = layer.weight[0].numel()
        A, B = torch.randn(1 + k % 3, inner) / 4, torch.randn(shape[0], 1 + k % 3) / 4
        if owner.startswith("text") and not name.startswith("text_model."):
            name = f"text_model.{name}"  # noqa: PLW2901
        path = f"{owner}.{name}"
        modules[path] = lf.LowRank(A, B, scales[k % len(scales)])
        if len(shape) > 2:
            layouts[path] = Layout("conv", kernel=shape[1:])
    return lf.Adapter(modules, layouts=layouts)


def weights(model):
    """Its state dict under the names that it has without an adapter."""
    return {
        key.replace(".base_layer", ""): t.detach().clone()
        for key, t in model.state_dict().items()
        if ".lora_" not in key
    }


def adapted(model):
    return sum(hasattr(module, "lora_A") and bool(module.lora_A) for module in model.modules())


def load_unet(source, unet):
    found, alphas, meta = StableDiffusionLoraLoaderMixin.lora_state_dict(
        source, unet_config=unet.config, return_lora_metadata=True
    )
    StableDiffusionLoraLoaderMixin.load_lora_into_unet(
        found, network_alphas=alphas, unet=unet, metadata=meta
    )
    unet.fuse_lora()


def load_text(source, encoder):
    found, alphas, meta = StableDiffusionLoraLoaderMixin.lora_state_dict(
        source, unet_config=sd1().config, return_lora_metadata=True
    )
    StableDiffusionLoraLoaderMixin.load_lora_into_text_encoder(
        found, network_alphas=alphas, text_encoder=encoder, prefix="text_encoder", metadata=meta
    )
    for module in encoder.modules():
        if hasattr(module, "merge") and hasattr(module, "lora_A"):
            module.merge()


def load_flux(source, transformer):
    found, alphas, meta = FluxLoraLoaderMixin.lora_state_dict(
        source, return_alphas=True, return_lora_metadata=True
    )
    FluxLoraLoaderMixin.load_lora_into_transformer(
        found, network_alphas=alphas, transformer=transformer, metadata=meta
    )
    transformer.fuse_lora()


MODELS = {
    "SD 1": (sd1, "unet", load_unet),
    "SDXL": (sdxl, "unet", load_unet),
    "text": (text_encoder, "text_encoder", load_text),
    "FLUX": (flux, "transformer", load_flux),
}


def check(model, adapter, before):
    """That diffusers' weights are the base's and the adapter's."""
    owned = {p: p.partition(".")[2] for p in adapter.modules}
    names = set(layers_of(before))
    renamed = {p: n if n in names else n.removeprefix("text_model.") for p, n in owned.items()}
    after = weights(model)
    for path, name in renamed.items():
        exact = before[f"{name}.weight"].double().flatten(1) + adapter[path].dense().double()
        got = after[f"{name}.weight"].double().flatten(1)
        assert (got - exact).norm() <= 1e-6 * exact.norm(), path
    others = [k for k in before if k.removesuffix(".weight") not in set(renamed.values())]
    assert all(torch.equal(before[k], after[k]) for k in others)
    assert adapted(model) == len(adapter.modules)


def layers_of(state):
    return {key.removesuffix(".weight") for key in state if key.endswith(".weight")}


CASES = [(m, f) for m in MODELS for f in ("diffusers", "kohya") if (m, f) != ("FLUX", "kohya")]


@pytest.mark.parametrize(("name", "form"), CASES)
@pytest.mark.form("diffusers", "written", by="diffusers")
@pytest.mark.form("kohya", "written", by="diffusers")
def test_what_is_written_is_fused_there(name, form, tmp_path):
    """Every linear layer and convolution, at mixed ranks and scales."""
    make, owner, load = MODELS[name]
    torch.manual_seed(0)
    model = make()
    adapter, before = adapter_of(model, owner), weights(model)
    file = tmp_path / "x.safetensors"
    adapter = lf.Adapter(adapter.modules, layouts=adapter.layouts, base_model="org/sd")
    lf.save(adapter, file, format=form)
    read = lf.load(file)
    assert adapter.distance(read) <= 1e-6 * adapter.norm()
    if form == "kohya":  # the same α everywhere, as it is right there
        tensors = load_file(file)
        alphas = {float(t) for key, t in tensors.items() if key.endswith(".alpha")}
        assert alphas == {3.0}
        assert len(tensors) == 3 * len(adapter)
    load(file, model)
    check(model, adapter, before)
    assert set(lf.load(file, base=make())) == set(layers(make()))


def test_other_verbs_take_such_a_file_as_it_is(tmp_path):
    """Attached to a running model, and merged into its weights on the disk: as diffusers fuses."""
    torch.manual_seed(0)
    unet, text = sd1().eval(), text_encoder().eval()
    for model, owner in ((unet, "unet"), (text, "text_encoder")):
        lf.save(adapter_of(model, owner), tmp_path / f"{owner}.safetensors", format="kohya")
    unet.save_pretrained(tmp_path / "base")
    lf.merge_into_weights(tmp_path / "base", tmp_path / "unet.safetensors", tmp_path / "merged")
    (merged,) = map(load_file, (tmp_path / "merged").glob("*.safetensors"))
    image, time = torch.randn(1, 4, 8, 8), torch.tensor([5])
    ids, states = torch.tensor([[1, 2, 3]]), torch.randn(1, 3, 12)

    def runs():
        with torch.no_grad():
            return unet(image, time, states).sample, text(ids).last_hidden_state

    found = []
    for k, (model, owner) in enumerate(((unet, "unet"), (text, "text_encoder"))):
        live = lf.attach(model, lf.load(tmp_path / f"{owner}.safetensors"), use="default")
        found.append(runs()[k])
        live.detach()
    load_unet(tmp_path / "unet.safetensors", unet)
    load_text(tmp_path / "text_encoder.safetensors", text)
    for got, exact in zip(found, runs(), strict=True):
        assert (got - exact).norm() <= 1e-5 * exact.norm()
    for name, exact in weights(unet).items():
        assert (merged[name] - exact).norm() <= 1e-6 * exact.norm()


# What it writes, and what it reads of older generations


@pytest.mark.parametrize("name", ["SD 1", "FLUX"])
@pytest.mark.form("diffusers", "read", by="diffusers")
def test_what_a_model_saves_there_is_read(name, tmp_path):
    """With a config in the header, and no part of a pipeline in the names."""
    from peft import LoraConfig

    make, owner, _ = MODELS[name]
    torch.manual_seed(0)
    model = make()
    before = weights(model)
    own = r".*attn.*\.to_q$" if name == "SD 1" else r".*(to_q|proj_mlp)$"
    config = LoraConfig(
        r=3,
        lora_alpha=5,
        target_modules=own,
        rank_pattern={"to_q": 2} if name == "FLUX" else {},
        init_lora_weights=False,
    )
    model.add_adapter(config)
    model.save_lora_adapter(tmp_path)
    (file,) = tmp_path.glob("*.safetensors")
    adapter = lf.load(file)
    assert all(path.startswith(f"{owner}.") for path in adapter)
    assert {u.scale for u in adapter.modules.values()} <= {5 / 3, 5 / 2}
    model.fuse_lora()
    check(model, adapter, before)


@pytest.mark.parametrize("generation", ["first", "second"])
def test_older_generations_are_what_they_are_there(generation, tmp_path):
    torch.manual_seed(0)
    model = sd1()
    before = weights(model)
    tensors = {}
    for path, u in adapter_of(model, "unet").modules.items():
        if ".attn1.to_" not in path:
            continue
        if generation == "first":
            owner, _, inner = path.rpartition(".attn1.")
            stem = f"{owner}.attn1.processor.{inner.removesuffix('.0')}_lora"
        else:
            stem = f"{path}.lora"
        tensors[f"{stem}.down.weight"], tensors[f"{stem}.up.weight"] = u.A, u.B
    save_file(tensors, tmp_path / "x.safetensors")
    adapter = lf.load(tmp_path / "x.safetensors")
    load_unet(tmp_path / "x.safetensors", model)
    check(model, adapter, before)


def test_a_pipelines_file_is_read(tmp_path):
    """With the configs of two of its parts in the header."""
    torch.manual_seed(0)
    unet, text = sd1(), text_encoder()
    before = weights(unet), weights(text)
    parts = [
        adapter_of(model, owner, (1.0,))
        for model, owner in ((unet, "unet"), (text, "text_encoder"))
    ]
    lf.save(parts[0], tmp_path / "x.safetensors", format="diffusers")
    tensors = load_file(tmp_path / "x.safetensors")
    lf.save(parts[1], tmp_path / "y.safetensors", format="diffusers")
    tensors |= load_file(tmp_path / "y.safetensors")
    metadata = {}
    for part in parts:
        owner = next(iter(part)).partition(".")[0]
        bare = {p.partition(".")[2]: u.rank for p, u in part.modules.items()}
        metadata |= {
            f"{owner}.r": 1,
            f"{owner}.lora_alpha": 2,
            f"{owner}.rank_pattern": {f"^{p}": r for p, r in bare.items()},
            f"{owner}.alpha_pattern": {f"^{p}": 2 * r for p, r in bare.items()},
            f"{owner}.target_modules": list(bare),
        }
    file = tmp_path / "z.safetensors"
    save_file(tensors, file, {"lora_adapter_metadata": json.dumps(metadata), "format": "pt"})
    adapter = lf.load(file)
    assert {u.scale for u in adapter.modules.values()} == {2.0}
    load_unet(file, unet)
    own = lf.Adapter({p: adapter[p] for p in parts[0]})
    check(unet, own, before[0])


@pytest.mark.form("kohya", "read", by="kohya-ss's formula")
def test_differing_alphas_are_kohyas_formula(tmp_path):
    """diffusers takes these for others, so that they are compared with α / r by hand."""
    torch.manual_seed(0)
    model = sd1()
    adapter = adapter_of(model, "unet", (1.0,))
    lf.save(adapter, tmp_path / "x.safetensors", format="kohya")
    tensors = load_file(tmp_path / "x.safetensors")
    for k, key in enumerate(sorted(key for key in tensors if key.endswith(".alpha"))):
        tensors[key] = torch.tensor(1.0 + k % 4)
    save_file(tensors, tmp_path / "y.safetensors")
    read = lf.load(tmp_path / "y.safetensors")
    for path, u in read.modules.items():
        name = f"lora_unet_{path.removeprefix('unet.').replace('.', '_')}"
        factor = float(tensors[f"{name}.alpha"]) / len(tensors[f"{name}.lora_down.weight"])
        up, down = (tensors[f"{name}.lora_{x}.weight"].double().flatten(1) for x in ("up", "down"))
        exact = factor * up @ down
        assert (u.dense().double() - exact).norm() <= 1e-6 * exact.norm()


# FLUX in its first names: diffusers' converter takes its real width alone

D = 3072


def flux_adapter(shared):
    """Of a block of each kind, and of the last layer."""
    shapes = {
        "transformer_blocks.0.attn.to_q": (D, D),
        "transformer_blocks.0.attn.to_k": (D, D),
        "transformer_blocks.0.attn.to_v": (D, D),
        "transformer_blocks.0.attn.add_q_proj": (D, D),
        "transformer_blocks.0.attn.add_k_proj": (D, D),
        "transformer_blocks.0.attn.add_v_proj": (D, D),
        "transformer_blocks.0.ff.net.0.proj": (4 * D, D),
        "transformer_blocks.0.norm1.linear": (6 * D, D),
        "single_transformer_blocks.0.attn.to_q": (D, D),
        "single_transformer_blocks.0.attn.to_k": (D, D),
        "single_transformer_blocks.0.attn.to_v": (D, D),
        "single_transformer_blocks.0.proj_mlp": (4 * D, D),
        "single_transformer_blocks.0.proj_out": (D, 5 * D),
        "x_embedder": (D, 64),
        "proj_out": (64, D),
        "norm_out.linear": (2 * D, D),
    }
    common = torch.randn(4, D)
    return lf.Adapter(
        {
            f"transformer.{path}": lf.LowRank(
                common if shared and inner == D else torch.randn(4, inner), torch.randn(out, 4), 0.3
            )
            for path, (out, inner) in shapes.items()
        }
    )


@pytest.mark.parametrize("form", ["kohya", "comfy"])
@pytest.mark.parametrize("shared", [True, False], ids=["shared", "own"])
@pytest.mark.form("comfy", "read", by="diffusers")
@pytest.mark.form("comfy", "written", by="diffusers")
@pytest.mark.form("kohya", "written", by="diffusers")
def test_fluxs_first_names_are_converted_there(form, shared, tmp_path):
    torch.manual_seed(0)
    adapter = flux_adapter(shared)
    file = tmp_path / "x.safetensors"
    lf.save(adapter, file, format=form)
    read = lf.load(file)
    assert adapter.distance(read) <= 1e-6 * adapter.norm()
    assert {p: u.rank for p, u in read.modules.items()} == dict.fromkeys(adapter, 4)
    found, _ = FluxLoraLoaderMixin.lora_state_dict(file, return_alphas=True)
    paths = {key.partition(".lora_")[0] for key in found}
    assert len(paths) == len(adapter)
    for path, u in adapter.modules.items():
        stem = path if path in paths else path.removeprefix("transformer.")
        A, B = (found[f"{stem}.lora_{x}.weight"].double() for x in "AB")
        x = torch.randn(A.shape[1], 5, dtype=torch.float64)
        exact = u.scale * (u.B.double() @ (u.A.double() @ x))
        assert (B @ (A @ x) - exact).norm() <= 1e-6 * exact.norm(), path
