"""Files of image models: diffusers', ComfyUI's, FLUX in any names; all under diffusers' paths."""

import json
import pickle

import pytest
import torch
from safetensors.torch import load_file, save_file

import lorafold as lf
from lorafold.errors import FileError, MismatchError
from lorafold.files import open_adapter

R = torch.randn
ATTENTION = "down_blocks.0.attentions.0.transformer_blocks.0.attn1"
TEXT = "text_model.encoder.layers.0"


def written(path, tensors, **metadata):
    save_file({key: t.contiguous() for key, t in tensors.items()}, path, metadata or None)
    return path


def factors(r=2, out=6, inner=5, kernel=()):
    return R(r, inner, *kernel), R(out, r, *[1] * len(kernel))


def keyed(modules, down, up):
    """{key: tensor} of {name: (A, B)}."""
    ends = {0: down, 1: up}
    return {f"{n}{ends[k]}": t for n, pair in modules.items() for k, t in enumerate(pair)}


# diffusers' three generations

PATHS = {
    f"unet.{ATTENTION}.to_q": factors(),
    f"unet.{ATTENTION}.to_out.0": factors(3),
    "unet.down_blocks.0.resnets.0.conv1": factors(2, 6, 5, (3, 2)),
    f"text_encoder.{TEXT}.self_attn.q_proj": factors(),
    f"text_encoder_2.{TEXT}.mlp.fc1": factors(4),
}


def third(modules):
    return keyed(modules, ".lora_A.weight", ".lora_B.weight")


def older(key, text):
    """A key of the third generation as the second had it, or as the first."""
    path, _, side = key.removesuffix(".weight").rpartition(".lora_")
    side = {"A": "down", "B": "up"}[side]
    if path.startswith("text"):
        return f"{path}.lora_linear_layer.{side}.weight"
    owner, _, name = path.rpartition(".attn1.")
    if text == "second" or not owner:
        return f"{path}.lora.{side}.weight"
    return f"{owner}.attn1.processor.{name.removesuffix('.0')}_lora.{side}.weight"


@pytest.mark.parametrize("generation", ["first", "second", "third", "down and up"])
def test_all_generations_are_one_adapter(generation, tmp_path):
    tensors = third(PATHS)
    if generation == "down and up":
        tensors = keyed(PATHS, ".lora_down.weight", ".lora_up.weight")
    elif generation != "third":
        tensors = {older(key, generation): t for key, t in tensors.items()}
    file = written(tmp_path / "x.safetensors", tensors)
    a, opened = lf.load(file), open_adapter(file)
    assert a.digest == lf.load(tensors).digest == lf.load(file, format="diffusers").digest
    assert set(a) == set(PATHS) == set(opened.shapes)
    assert not a.extras
    for path, (A, B) in PATHS.items():
        u = a[path]
        assert u.scale == 1  # at any rank
        assert torch.equal(u.A, A.flatten(1))
        assert torch.equal(u.B, B.flatten(1))
        assert a.layout(path).kernel == (tuple(A.shape[1:]) if A.ndim > 2 else ())
        assert torch.equal(opened.read(path).A, u.A)
        assert torch.equal(opened.only(path).read(path).B, u.B)


@pytest.mark.parametrize(
    ("without", "owner"),
    [
        (f"{ATTENTION}.processor.to_q_lora.", "unet"),
        ("mid_block.attentions.0.proj_in.lora.", "unet"),
        ("single_transformer_blocks.0.proj_mlp.lora.", "transformer"),
        (f"{TEXT}.self_attn.k_proj.lora_linear_layer.", "text_encoder"),
        (f"{TEXT}.self_attn.to_k_lora.", "text_encoder"),
    ],
)
def test_a_file_of_one_model_need_not_say_which(without, owner, tmp_path):
    A, B = factors()
    for start in ("", f"{owner}."):
        tensors = {f"{start}{without}down.weight": A, f"{start}{without}up.weight": B}
        if owner != "transformer" and "proj_in" in without:
            tensors |= third({f"{start}conv_in": factors(2, 6, 5, (3, 3))})
        a = lf.load(written(tmp_path / "x.safetensors", tensors))
        assert all(path.startswith(f"{owner}.") for path in a)
        assert any(u.A.shape == A.shape and torch.equal(u.A, A) for u in a.modules.values())


def test_a_text_model_is_one_with_its_name_or_without(tmp_path):
    pair = factors()
    with_name, without = (
        lf.load(written(tmp_path / "x.safetensors", third({f"{start}.mlp.fc1": pair})))
        for start in (f"text_encoder.{TEXT}", "text_encoder.encoder.layers.0")
    )
    assert with_name.digest == without.digest
    for te in ("te", "te1"):
        for start in ("text_model_", ""):
            names = {f"lora_{te}_{start}encoder_layers_0_mlp_fc1": pair}
            flat = lf.load(keyed(names, ".lora_down.weight", ".lora_up.weight"))
            assert flat.digest == with_name.digest
    both = third({f"text_encoder.{TEXT}.mlp.fc1": pair})
    both |= third({"text_encoder.encoder.layers.0.mlp.fc1": pair})
    with pytest.raises(MismatchError, match="are one module; keep one"):
        lf.load(both)


def test_the_scale_is_the_headers(tmp_path):
    said = {"r": 2, "lora_alpha": 3, "rank_pattern": {}, "peft_type": "LORA"}
    said["rank_pattern"] = {f"^{ATTENTION}.to_out.0": 3}
    said["alpha_pattern"] = {f"^{ATTENTION}.to_out.0": 12}
    own = {path: pair for path, pair in PATHS.items() if path.startswith("unet.")}
    whole = {f"unet.{key}": value for key, value in said.items()}
    bare = {path.removeprefix("unet."): pair for path, pair in own.items()}
    for modules, config in ((own, whole), (bare, said)):
        text = json.dumps(config)
        file = written(tmp_path / "x.safetensors", third(modules), lora_adapter_metadata=text)
        a = lf.load(file)
        assert {path: u.scale for path, u in a.modules.items()} == {
            path: 4.0 if path.endswith("to_out.0") else 1.5 for path in own
        }
    with pytest.raises(MismatchError, match=r"alpha= says 5"):
        lf.load(file, alpha=5)


def test_the_scale_is_that_beside_the_factors(tmp_path):
    tensors = third(PATHS) | {f"unet.{ATTENTION}.to_q.alpha": torch.tensor(3.0)}
    a = lf.load(written(tmp_path / "x.safetensors", tensors))
    assert a[f"unet.{ATTENTION}.to_q"].scale == 1.5
    assert {u.scale for path, u in a.modules.items() if "to_q" not in path} == {1.0}
    first = {older(key, "first"): t for key, t in third(PATHS).items()}
    first[f"unet.{ATTENTION}.processor.to_q_lora.alpha"] = torch.tensor(3.0)
    assert lf.load(first).digest == a.digest
    assert {u.scale for u in lf.load(third(PATHS), alpha=12).modules.values()} == {6.0, 4.0, 3.0}


def test_an_alpha_that_is_no_number_is_never_taken_for_none():
    tensors = third(PATHS) | {f"unet.{ATTENTION}.to_q.alpha": torch.ones(2)}
    with pytest.raises(MismatchError, match=r"α of 'unet\..*must be one number, found .*\(2,\)"):
        lf.load(tensors)


def test_a_language_models_part_is_not_taken_for_one_of_a_pipeline(tmp_path):
    tensors = third({"transformer.h.0.attn.c_attn": factors()})
    file = written(tmp_path / "x.safetensors", tensors)
    with pytest.raises(FileError, match="format='diffusers' or format='peft'"):
        lf.load(file)
    assert lf.load(file, alpha=4)["transformer.h.0.attn.c_attn"].scale == 2
    assert lf.load(file, format="diffusers")["transformer.h.0.attn.c_attn"].scale == 1
    for key, sure in {
        "transformer.layers.0.attn.to_q": False,  # as other libraries call theirs, too
        "text_encoder.encoder.block.0.layer.0.SelfAttention.q": False,
        "transformer.blocks.0.attn1.to_q": True,
        "transformer.x_embedder": True,
        f"text_encoder.{TEXT}.mlp.fc1": True,
    }.items():
        written(file, third({key: factors()}))
        if sure:
            assert lf.load(file)[key].scale == 1
        else:
            with pytest.raises(FileError, match="format='diffusers' or format='peft'"):
                lf.load(file)
            said = {"transformer.r": 2, "transformer.lora_alpha": 4, "text_encoder.r": 2}
            said |= {"text_encoder.lora_alpha": 4}
            written(file, third({key: factors()}), lora_adapter_metadata=json.dumps(said))
            assert lf.load(file)[key].scale == 2
    config = {"peft_type": "LORA", "r": 2, "lora_alpha": 4, "target_modules": ["to_q"]}
    (tmp_path / "adapter_config.json").write_text(json.dumps(config))
    written(file, third({f"unet.{ATTENTION}.to_q": factors()}))
    assert lf.load(file)[f"unet.{ATTENTION}.to_q"].scale == 2
    written(
        file,
        {
            f"unet.to_q.lora.{side}.weight": t
            for side, t in zip(("down", "up"), factors(), strict=True)
        },
    )
    with pytest.raises(MismatchError, match=r"form of diffusers.*remove the config"):
        lf.load(file)


# FLUX

D, IN = 8, 6
DOUBLE, SINGLE = "transformer.transformer_blocks.1", "transformer.single_transformer_blocks.0"
FUSED = {  # in FLUX's first code: (diffusers' modules, their rows)
    "double_blocks.1.img_attn.qkv": ([f"{DOUBLE}.attn.to_{x}" for x in "qkv"], [D] * 3),
    "double_blocks.1.txt_attn.qkv": ([f"{DOUBLE}.attn.add_{x}_proj" for x in "qkv"], [D] * 3),
    "single_blocks.0.linear1": (
        [*(f"{SINGLE}.attn.to_{x}" for x in "qkv"), f"{SINGLE}.proj_mlp"],
        [D, D, D, 4 * D],
    ),
}
ALONE = {
    "double_blocks.1.img_attn.proj": f"{DOUBLE}.attn.to_out.0",
    "double_blocks.1.txt_attn.proj": f"{DOUBLE}.attn.to_add_out",
    "double_blocks.1.img_mlp.0": f"{DOUBLE}.ff.net.0.proj",
    "double_blocks.1.txt_mlp.2": f"{DOUBLE}.ff_context.net.2",
    "double_blocks.1.img_mod.lin": f"{DOUBLE}.norm1.linear",
    "double_blocks.1.txt_mod.lin": f"{DOUBLE}.norm1_context.linear",
    "single_blocks.0.linear2": f"{SINGLE}.proj_out",
    "single_blocks.0.modulation.lin": f"{SINGLE}.norm.linear",
    "img_in": "transformer.x_embedder",
    "txt_in": "transformer.context_embedder",
    "time_in.in_layer": "transformer.time_text_embed.timestep_embedder.linear_1",
    "vector_in.out_layer": "transformer.time_text_embed.text_embedder.linear_2",
    "guidance_in.in_layer": "transformer.time_text_embed.guidance_embedder.linear_1",
    "final_layer.linear": "transformer.proj_out",
    "final_layer.adaLN_modulation.1": "transformer.norm_out.linear",
}


def flux(kind, shared):
    """{key: tensor} of a whole file in FLUX's names, and {diffusers' module: ΔW}."""
    modules, dense = {}, {}
    for name, (paths, rows) in FUSED.items():
        rank = 3 if shared else 2 * len(paths)
        A, B = R(rank, IN), R(sum(rows), rank)
        if not shared:
            B = torch.block_diag(*(R(n, 2) for n in rows))
        modules[name] = A, B
        dense |= zip(paths, (B @ A).split(rows), strict=True)
    for name, path in ALONE.items():
        A, B = modules[name] = R(3, IN), R(12, 3)
        dense[path] = B @ A
    first, second = dense["transformer.norm_out.linear"].chunk(2)
    dense["transformer.norm_out.linear"] = torch.cat([second, first])
    if kind == "kohya":
        names = {f"lora_unet_{name.replace('.', '_')}": pair for name, pair in modules.items()}
        return keyed(names, ".lora_down.weight", ".lora_up.weight"), dense
    start = {"comfy": "diffusion_model.", "ai-toolkit": "transformer.", "bare": ""}[kind]
    return third({start + name: pair for name, pair in modules.items()}), dense


@pytest.mark.parametrize("kind", ["kohya", "comfy", "ai-toolkit", "bare"])
@pytest.mark.parametrize("shared", [True, False], ids=["shared", "own"])
def test_flux_is_taken_apart(kind, shared, tmp_path):
    tensors, dense = flux(kind, shared)
    file = written(tmp_path / "x.safetensors", tensors)
    a, opened = lf.load(file), open_adapter(file)
    assert set(a) == set(dense)
    for path, exact in dense.items():
        u = a[path]
        assert torch.allclose(u.dense(), exact, atol=1e-5)
        assert u.rank == (2 if not shared and "linear" not in path and _is_part(path) else 3)
        assert opened.shapes[path] == (*u.shape, u.rank)
        assert torch.equal(opened.read(path).B, u.B)
    assert a.digest == lf.load(tensors).digest


def _is_part(path):
    return any(path in paths for paths, _ in FUSED.values())


def test_an_own_a_is_seen_by_all_of_b_alone(tmp_path):
    """A B that is nearly block-diagonal is not; a zero B tells nothing, and keeps the whole A."""
    name = "lora_unet_double_blocks_0_img_attn_qkv"
    A = R(6, IN)
    for change, rank in ((None, 2), ((D - 1, 5), 6), ((0, 2), 6), ("zero", 6), ("a zero part", 6)):
        B = torch.block_diag(*(R(D, 2) for _ in range(3)))
        if change == "zero":
            B.zero_()
        elif change == "a zero part":
            B[D : 2 * D] = 0
        elif change is not None:
            B[change] = 0.5
        a = lf.load(keyed({name: (A, B)}, ".lora_down.weight", ".lora_up.weight"))
        assert {u.rank for u in a.modules.values()} == {rank}
        assert torch.allclose(torch.cat([u.dense() for u in a.modules.values()]), B @ A, atol=1e-5)


def test_files_of_one_header_and_of_two_kinds_of_b(tmp_path):
    """What was found in one file is not taken for another's of the same header."""
    found = []
    for k, shared in enumerate((False, True)):
        A, B = R(6, IN), R(3 * D, 6)
        if not shared:
            B = torch.block_diag(*(R(D, 2) for _ in range(3)))
        tensors = keyed(
            {"diffusion_model.double_blocks.0.img_attn.qkv": (A, B)}, ".lora_A", ".lora_B"
        )
        opened = open_adapter(written(tmp_path / f"{k}.safetensors", tensors))
        found.append({rank for _, _, rank in opened.shapes.values()})
    assert found == [{2}, {6}]


def test_parts_are_read_in_other_processes_and_from_stores(tmp_path):
    fsspec = pytest.importorskip("fsspec")
    name = "diffusion_model.double_blocks.0.img_attn.qkv"
    B = torch.block_diag(*(R(D, 2) for _ in range(3)))
    file = written(tmp_path / "x.safetensors", keyed({name: (R(6, IN), B)}, ".lora_A", ".lora_B"))
    opened = open_adapter(file)
    other = pickle.loads(pickle.dumps(opened))
    assert other.names == opened.names == dict.fromkeys(opened.shapes, name)
    for path in opened.shapes:
        assert torch.equal(other.read(path).B, opened.read(path).B)
    with fsspec.open("memory://images/x.safetensors", "wb") as f:
        f.write(file.read_bytes())
    assert lf.load("memory://images/x.safetensors").digest == lf.load(file).digest
    lf.save(lf.load(file), "memory://images/y.safetensors", format="kohya")
    assert lf.load("memory://images/y.safetensors").distance(lf.load(file)) == 0


def test_x_fluxs_attentions(tmp_path):
    names = {f"double_blocks.1.processor.{p}_lora{n}" for p in ("qkv", "proj") for n in (1, 2)}
    names |= {f"single_blocks.0.processor.{p}_lora" for p in ("qkv", "proj")}
    pairs = {n: (R(2, IN), R(3 * D if "qkv" in n else D, 2)) for n in names}
    a = lf.load(keyed(pairs, ".down.weight", ".up.weight"))
    for name, path in (
        ("double_blocks.1.processor.qkv_lora1", f"{DOUBLE}.attn.to_v"),
        ("double_blocks.1.processor.qkv_lora2", f"{DOUBLE}.attn.add_v_proj"),
        ("single_blocks.0.processor.qkv_lora", f"{SINGLE}.attn.to_v"),
    ):
        A, B = pairs[name]
        assert torch.equal(a[path].A, A)
        assert torch.equal(a[path].B, B[2 * D :])
    assert f"{SINGLE}.proj_out" in a
    assert f"{DOUBLE}.attn.to_add_out" in a


def test_rows_that_are_no_shares_are_refused():
    for name, rows in (("double_blocks_0_img_attn_qkv", 25), ("final_layer_adaLN_modulation_1", 5)):
        pair = (R(2, IN), R(rows, 2))
        with pytest.raises(MismatchError, match=f"{name}.*its {rows} rows are no"):
            lf.load(keyed({f"lora_unet_{name}": pair}, ".lora_down.weight", ".lora_up.weight"))


def test_loha_and_dora_of_fused_weights(tmp_path):
    name = "lora_unet_double_blocks_0_img_attn_qkv"
    loha = {f"hada_w{n}_{x}": R(3 * D, 2) if x == "a" else R(2, 24) for n in (1, 2) for x in "ab"}
    a = lf.load({f"{name}.{what}": t for what, t in loha.items()})
    exact = (loha["hada_w1_a"] @ loha["hada_w1_b"]) * (loha["hada_w2_a"] @ loha["hada_w2_b"])
    assert torch.allclose(torch.cat([u.dense() for u in a.modules.values()]), exact, atol=1e-5)
    pair = {"lora_down.weight": R(2, IN), "lora_up.weight": R(3 * D, 2), "dora_scale": R(3 * D, 1)}
    dora = lf.load({f"{name}.{what}": t for what, t in pair.items()})
    assert list(dora) == [name]  # whose magnitudes are of all rows
    assert "DoRA" in dora.refusal


def test_flat_names_of_diffusers_transformer():
    """As OneTrainer writes them."""
    names = {
        "lora_transformer_transformer_blocks_3_attn_add_q_proj": (
            "transformer.transformer_blocks.3.attn.add_q_proj"
        ),
        "lora_transformer_single_transformer_blocks_37_proj_mlp": (
            "transformer.single_transformer_blocks.37.proj_mlp"
        ),
        "lora_transformer_time_text_embed_timestep_embedder_linear_1": (
            "transformer.time_text_embed.timestep_embedder.linear_1"
        ),
        "lora_transformer_transformer_blocks_0_ff_context_net_0_proj": (
            "transformer.transformer_blocks.0.ff_context.net.0.proj"
        ),
        "lora_te2_encoder_block_0_layer_1_DenseReluDense_wi_0": (
            "text_encoder_2.encoder.block.0.layer.1.DenseReluDense.wi_0"
        ),
    }
    pairs = {name: factors() for name in names}
    a = lf.load(keyed(pairs, ".lora_down.weight", ".lora_up.weight"))
    assert set(a) == set(names.values())
    assert all(torch.equal(a[path].B, pairs[name][1]) for name, path in names.items())


# ComfyUI's other names

COMFY = {
    "diffusion_model.input_blocks.1.1.transformer_blocks.0.attn1.to_q": f"unet.{ATTENTION}.to_q",
    "diffusion_model.input_blocks.4.0.in_layers.2": "unet.down_blocks.1.resnets.0.conv1",
    "diffusion_model.output_blocks.2.1.conv": "unet.up_blocks.0.upsamplers.0.conv",
    "diffusion_model.middle_block.1.proj_in": "unet.mid_block.attentions.0.proj_in",
    f"text_encoders.clip_l.transformer.{TEXT}.mlp.fc1": f"text_encoder.{TEXT}.mlp.fc1",
    f"text_encoders.clip_g.transformer.{TEXT}.mlp.fc1": f"text_encoder_2.{TEXT}.mlp.fc1",
}


@pytest.mark.parametrize(
    "sides",
    [
        *(("lora_A", "lora_B"), ("lora_down", "lora_up"), ("lora.down", "lora.up")),
        ("lora_linear_layer.down", "lora_linear_layer.up"),
        ("lora_A.default", "lora_B.default"),
    ],
)
def test_comfys_names_are_the_same_modules(sides, tmp_path):
    pairs = {name: factors() for name in COMFY}
    tensors = keyed(pairs, *(f".{side}.weight" for side in sides))
    tensors["diffusion_model.middle_block.1.proj_in.alpha"] = torch.tensor(1.0)
    a = lf.load(written(tmp_path / "x.safetensors", tensors))
    assert set(a) == set(COMFY.values())
    assert a["unet.mid_block.attentions.0.proj_in"].scale == 0.5
    assert {a[path].scale for path in a if "proj_in" not in path} == {1.0}
    for name, path in COMFY.items():
        assert torch.equal(a[path].B, pairs[name][1])


def test_paths_that_no_table_has_stay_as_they_are(tmp_path):
    name = "diffusion_model.blocks.0.self_attn.q"
    tensors = third({name: factors()})
    assert list(lf.load(tensors)) == [name]
    assert list(lf.load(tensors, base=["blocks.0.self_attn.q"])) == ["blocks.0.self_attn.q"]
    with pytest.raises(MismatchError, match=f"is meant by '{name}'"):
        lf.load(tensors, base=["blocks.0.self_attn.k"])


# Bases


def test_a_base_of_diffusers(tmp_path):
    tensors, dense = flux("comfy", False)
    file = written(tmp_path / "x.safetensors", tensors)
    base = [path.removeprefix("transformer.") for path in dense]
    assert set(lf.load(file, base=base)) == set(base)
    shapes = {
        f"{path.removeprefix('transformer.')}.weight": torch.empty(d.shape)
        for path, d in dense.items()
    }
    assert set(lf.load(file, base=shapes)) == set(base)
    with pytest.raises(MismatchError, match=r"in the base, and its update .*: they do not fit"):
        lf.load(file, base=shapes | {f"{base[0]}.weight": torch.empty(9, 9)})
    with pytest.raises(MismatchError, match="is meant by 'diffusion_model"):
        lf.load(file, base=base[1:])


@pytest.mark.parametrize("start", ["", "diffusion_model.", "model.diffusion_model."])
@pytest.mark.parametrize("shared", [True, False], ids=["shared", "own"])
def test_a_base_with_fluxs_own_weights(start, shared, tmp_path):
    tensors, _ = flux("kohya", shared)
    names = {start + name: name for name in (*FUSED, *ALONE)}
    a = lf.load(written(tmp_path / "x.safetensors", tensors), base=list(names))
    assert set(a) == set(names)
    for path, name in names.items():
        flat = f"lora_unet_{name.replace('.', '_')}"
        assert torch.equal(a[path].A, tensors[f"{flat}.lora_down.weight"])
        assert torch.equal(a[path].B, tensors[f"{flat}.lora_up.weight"])


def test_a_pipelines_folder_is_a_base(tmp_path):
    (tmp_path / "model_index.json").write_text("{}")
    weights = {path: torch.empty(B.shape[0], *A.shape[1:]) for path, (A, B) in PATHS.items()}
    for part in ("unet", "text_encoder", "text_encoder_2"):
        (tmp_path / part).mkdir()
        own = {
            p.removeprefix(f"{part}."): t for p, t in weights.items() if p.startswith(f"{part}.")
        }
        save_file({f"{p}.weight": t for p, t in own.items()}, tmp_path / part / "model.safetensors")
    file = written(tmp_path / "x.safetensors", third(PATHS))
    assert set(lf.load(file, base=tmp_path)) == set(PATHS)
    assert load_file(tmp_path / "unet" / "model.safetensors")
