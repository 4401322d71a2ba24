"""Adapters of image models for kohya-ss, diffusers and ComfyUI: what goes out comes back."""

import json

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file

import lorafold as lf
from lorafold.cli import main
from lorafold.errors import FileError, MismatchError, RefusedError
from lorafold.files import open_adapter
from lorafold.parts import Layout

FORMS = ("kohya", "diffusers", "comfy")
R = torch.randn
P = "base_model.model."
TEXT = "text_model.encoder.layers.0"


def attention(block):
    return f"{block}.transformer_blocks.0.attn1"


# {path: (out, in, kernel…)}, none of them square
SD1 = {
    f"unet.{attention('down_blocks.0.attentions.1')}.to_q": (6, 5),
    f"unet.{attention('up_blocks.3.attentions.2')}.to_out.0": (5, 6),
    "unet.down_blocks.2.downsamplers.0.conv": (6, 5, 3, 2),
    "unet.up_blocks.0.upsamplers.0.conv": (6, 5, 3, 3),
    "unet.mid_block.attentions.0.proj_in": (6, 5, 1, 1),
    "unet.down_blocks.1.resnets.0.time_emb_proj": (6, 5),
    "unet.time_embedding.linear_1": (6, 5),
    f"text_encoder.{TEXT}.self_attn.q_proj": (4, 3),
}
SDXL = {
    f"unet.{attention('down_blocks.1.attentions.1')}.to_q": (6, 5),
    "unet.up_blocks.0.attentions.2.transformer_blocks.9.ff.net.0.proj": (5, 6),
    "unet.up_blocks.1.upsamplers.0.conv": (6, 5, 3, 3),
    "unet.down_blocks.0.resnets.0.conv_shortcut": (6, 5, 1, 1),
    "unet.mid_block.resnets.1.conv2": (6, 5, 3, 2),
    "unet.add_embedding.linear_2": (6, 5),
    "unet.conv_in": (6, 5, 3, 3),
    f"text_encoder.{TEXT}.mlp.fc1": (4, 3),
    f"text_encoder_2.{TEXT}.mlp.fc2": (4, 3),
}
DOUBLE, SINGLE = "transformer.transformer_blocks.1", "transformer.single_transformer_blocks.0"
D, IN = 8, 6
FLUX = {
    **{f"{DOUBLE}.attn.to_{x}": (D, IN) for x in "qkv"},
    **{f"{DOUBLE}.attn.add_{x}_proj": (D, IN) for x in "qkv"},
    **{f"{SINGLE}.attn.to_{x}": (D, IN) for x in "qkv"},
    f"{SINGLE}.proj_mlp": (4 * D, IN),
    f"{SINGLE}.proj_out": (D, 5 * D),
    f"{DOUBLE}.ff_context.net.2": (D, 4 * D),
    "transformer.norm_out.linear": (2 * D, IN),
    "transformer.proj_out": (5, IN),
    "transformer.time_text_embed.guidance_embedder.linear_1": (D, 7),
    f"text_encoder.{TEXT}.mlp.fc1": (4, 3),
    "text_encoder_2.encoder.block.0.layer.0.SelfAttention.q": (4, 3),
}
MODELS = {"SD 1": SD1, "SDXL": SDXL, "FLUX": FLUX}


def adapter_of(shapes, scales=(1.0, 0.5, 0.3), ranks=(2, 3, 1), dtype=torch.float32, common=False):
    one = {inner: R(2, inner) for _, inner, *_ in shapes.values()}
    modules, layouts = {}, {}
    for k, (path, (out, inner, *kernel)) in enumerate(shapes.items()):
        rank = 2 if common else ranks[k % len(ranks)]
        width = inner * torch.Size(kernel).numel()
        A = one[inner].clone() if common and not kernel else R(rank, width)
        scale = scales[k % len(scales)]
        modules[path] = lf.LowRank(A.to(dtype), R(out, rank).to(dtype), scale)
        if kernel:
            layouts[path] = Layout("conv", kernel=(inner, *kernel))
    return lf.Adapter(modules, layouts=layouts)


def metadata(file):
    with safe_open(file, "pt") as f:
        return f.metadata()


@pytest.mark.parametrize("common", [False, True], ids=["own A", "one A"])
@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("model", MODELS)
def test_what_goes_out_comes_back(model, form, common, tmp_path):
    a, file = adapter_of(MODELS[model], common=common), tmp_path / "x.safetensors"
    before = a.digest
    lf.save(a, file, format=form)
    assert a.digest == before
    b, opened = lf.load(file), open_adapter(file)
    assert set(b) == set(a) == set(opened.shapes)
    assert not b.extras
    for path, u in a.modules.items():
        v = b[path]
        assert v.rank == u.rank  # what was padded is taken away again
        assert torch.equal(v.A, u.A)
        if u.scale in (1.0, 0.5):
            assert torch.equal(v.B * v.scale, u.B * u.scale)
            assert v.scale == 1
        assert (u - v).norm() <= 1e-6 * u.norm()
        assert b.layout(path).kernel == a.layout(path).kernel
        assert opened.shapes[path] == (*v.shape, v.rank)
        assert torch.equal(opened.read(path).B, v.B)
    lf.save(b, tmp_path / "y.safetensors", format=form)  # and is the same file from then on
    first, second = load_file(file), load_file(tmp_path / "y.safetensors")
    assert first.keys() == second.keys()
    assert all(torch.equal(t, second[key]) for key, t in first.items())
    assert metadata(file) == metadata(tmp_path / "y.safetensors")


@pytest.mark.parametrize("model", MODELS)
def test_from_each_form_to_each(model, tmp_path):
    a = adapter_of(MODELS[model], scales=(1.0,))
    for k, form in enumerate((*FORMS, *reversed(FORMS), "peft", *FORMS)):
        path = tmp_path / (f"{k}" if form == "peft" else f"{k}.safetensors")
        lf.save(a, path, format=form)
        b = lf.load(path)
        assert set(b) == set(a)
        assert all(torch.equal(b[p].A, a[p].A) and torch.equal(b[p].B, a[p].B) for p in a)
        a = b


def test_kohyas_keys(tmp_path):
    lf.save(adapter_of(SD1), tmp_path / "x.safetensors", format="kohya")
    tensors = load_file(tmp_path / "x.safetensors")
    names = {key.partition(".")[0] for key in tensors}
    assert f"lora_unet_{attention('down_blocks.0.attentions.1').replace('.', '_')}_to_q" in names
    assert f"lora_te_{TEXT.replace('.', '_')}_self_attn_q_proj" in names
    assert {float(t) for key, t in tensors.items() if key.endswith(".alpha")} == {3.0}
    assert {len(t) for key, t in tensors.items() if ".lora_down." in key} == {3}
    conv = "lora_unet_down_blocks_2_downsamplers_0_conv"
    assert tensors[f"{conv}.lora_down.weight"].shape == (3, 5, 3, 2)
    assert tensors[f"{conv}.lora_up.weight"].shape == (6, 3, 1, 1)
    lf.save(adapter_of(SDXL), tmp_path / "y.safetensors", format="kohya")
    names = {key.partition(".")[0] for key in load_file(tmp_path / "y.safetensors")}
    assert {
        "lora_unet_output_blocks_5_2_conv",
        "lora_unet_label_emb_0_2",
        "lora_unet_middle_block_2_out_layers_3",
        f"lora_te1_{TEXT.replace('.', '_')}_mlp_fc1",
        f"lora_te2_{TEXT.replace('.', '_')}_mlp_fc2",
    } <= names


def test_the_other_forms_keys(tmp_path):
    for form, ends, key in (
        ("diffusers", ("lora_A", "lora_B"), "unet.up_blocks.0.upsamplers.0.conv.lora_A.weight"),
        (
            "comfy",
            ("lora_down", "lora_up"),
            "diffusion_model.output_blocks.2.1.conv.lora_down.weight",
        ),
    ):
        file = tmp_path / f"{form}.safetensors"
        lf.save(adapter_of(SD1), file, format=form)
        tensors = load_file(file)
        assert key in tensors
        assert all(key.endswith(tuple(f".{end}.weight" for end in ends)) for key in tensors)
        assert metadata(file) == {"format": "pt"}
    assert f"text_encoders.clip_l.transformer.{TEXT}.self_attn.q_proj.lora_up.weight" in tensors


def test_flux_keeps_its_ranks_and_says_what_was_joined(tmp_path):
    a = adapter_of(FLUX, scales=(1.0,))
    file = tmp_path / "x.safetensors"
    lf.save(a, file, format="kohya")
    tensors = load_file(file)
    qkv = "lora_unet_double_blocks_1_img_attn_qkv"
    assert tensors[f"{qkv}.lora_down.weight"].shape == (6, IN)
    assert float(tensors[f"{qkv}.alpha"]) == 6
    assert json.loads(metadata(file)["lorafold_ranks"])[qkv] == [2, 3, 1]
    assert "lora_te3_encoder_block_0_layer_0_SelfAttention_q.alpha" in tensors
    # Without what the header says, ranks of three sizes are those of all; the update is the same.
    save_file(tensors, tmp_path / "bare.safetensors")
    bare = lf.load(tmp_path / "bare.safetensors")
    assert bare[f"{DOUBLE}.attn.to_q"].rank == 6
    assert a.distance(bare) <= 1e-6 * a.norm()


def test_parts_that_are_not_there_come_back_as_none(tmp_path):
    shapes = {p: s for p, s in FLUX.items() if not p.endswith(("to_k", "add_q_proj", "proj_mlp"))}
    a, file = adapter_of(shapes), tmp_path / "x.safetensors"
    for form in FORMS:
        lf.save(a, file, format=form, overwrite=True)
        assert set(lf.load(file)) == set(a)
        assert a.distance(lf.load(file)) <= 1e-6 * a.norm()
        assert set(lf.load(file, base=list(FLUX))) == set(a)
    one = lf.Adapter({p: u for p, u in a.modules.items() if p.endswith(f"{DOUBLE}.attn.to_q")})
    lf.save(one, file, format="kohya", overwrite=True)
    assert torch.equal(lf.load(file)[f"{DOUBLE}.attn.to_q"].A, one[f"{DOUBLE}.attn.to_q"].A)


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_narrow_factors_stay_where_their_scale_is_exact(form, dtype, tmp_path):
    a = adapter_of(SDXL, scales=(1.0, 0.5, 0.3), dtype=dtype)
    lf.save(a, tmp_path / "x.safetensors", format=form)
    b = lf.load(tmp_path / "x.safetensors")
    for path, u in a.modules.items():
        assert b[path].A.dtype == dtype
        assert b[path].B.dtype == (torch.float32 if u.scale == 0.3 else dtype)
    assert a.distance(b) <= 1e-6 * a.norm()
    lf.save(a, tmp_path / "y.safetensors", format=form, dtype=dtype)
    narrow = lf.load(tmp_path / "y.safetensors")
    assert {u.B.dtype for u in narrow.modules.values()} == {dtype}
    assert 0 < a.distance(narrow) < 3e-3 * a.norm()


def test_products_go_out_as_plain_factors(tmp_path):
    name = f"lora_unet_{attention('down_blocks.0.attentions.1').replace('.', '_')}_to_q"
    loha = {f"hada_w{n}_{x}": R(24, 2) if x == "a" else R(2, 40) for n in (1, 2) for x in "ab"}
    lokr = {"lokr_w1": R(3, 4), "lokr_w2_a": R(8, 2), "lokr_w2_b": R(2, 10)}
    for product in (loha, lokr):
        tensors = {f"{name}.{what}": t for what, t in product.items()}
        a = lf.load({**tensors, f"{name}.alpha": torch.tensor(3.0)})
        for form in FORMS:
            file = tmp_path / "x.safetensors"
            lf.save(a, file, format=form, overwrite=True)
            assert not any("hada" in key or "lokr" in key for key in load_file(file))
            assert a.distance(lf.load(file)) <= 1e-6 * a.norm()


@pytest.mark.parametrize("form", ["kohya", "comfy"])
def test_magnitudes_go_along_where_there_is_room(form, tmp_path):
    shapes = {path: SD1[path] for path in list(SD1)[:3]}
    a = adapter_of(shapes)
    extras = {
        f"{P}{path}.lora_magnitude_vector": R(out).abs() if not kernel else R(1, out, 1, 1).abs()
        for path, (out, _, *kernel) in shapes.items()
    }
    a = lf.Adapter(a.modules, extras, {"use_dora": True}, layouts=a.layouts)
    lf.save(a, tmp_path / "x.safetensors", format=form)
    tensors = load_file(tmp_path / "x.safetensors")
    shaped = {tuple(t.shape) for key, t in tensors.items() if key.endswith(".dora_scale")}
    assert shaped == {(6, 1), (5, 1), (6, 1, 1, 1)}
    b = lf.load(tmp_path / "x.safetensors")
    assert "DoRA" in b.refusal
    assert b.extras.keys() == extras.keys()
    assert all(torch.equal(b.extras[key], t) for key, t in extras.items())
    with pytest.raises(RefusedError, match=r"diffusers' form has no place for DoRA \('unet\."):
        lf.save(a, tmp_path / "y.safetensors", format="diffusers")
    fused = f"{DOUBLE}.attn.to_q"
    dora = {f"{P}{fused}.lora_magnitude_vector": R(D)}
    a = lf.Adapter({fused: lf.LowRank(R(2, IN), R(D, 2))}, dora, {"use_dora": True})
    with pytest.raises(RefusedError, match=f"{fused}' is DoRA's, and is a part of a weight"):
        lf.save(a, tmp_path / "y.safetensors", format=form)


def test_differences_go_along_to_kohya_alone(tmp_path):
    name = "lora_unet_mid_block_attentions_0_proj_in"
    tensors = {f"{name}.lora_down.weight": R(2, 5, 1, 1), f"{name}.lora_up.weight": R(6, 2, 1, 1)}
    more = {"lora_unet_conv_norm_out.w_norm": R(8), "lora_unet_conv_in.diff": R(4, 3, 3, 3)}
    text = {f"lora_te_{TEXT.replace('.', '_')}_mlp_fc1.lora_down.weight": R(2, 3)}
    text[next(iter(text)).replace("down", "up")] = R(4, 2)
    a = lf.load({**tensors, **more, **text})
    base = [*SD1, "unet.mid_block.attentions.0.proj_in", f"text_encoder.{TEXT}.mlp.fc1"]
    with pytest.raises(MismatchError, match=r"Stable Diffusion 1 and XL .*: give base="):
        lf.save(a, tmp_path / "x.safetensors", format="kohya")
    lf.save(a, tmp_path / "x.safetensors", format="kohya", base=base)
    assert lf.load(tmp_path / "x.safetensors").digest == a.digest
    for form in ("diffusers", "comfy"):
        with pytest.raises(RefusedError, match="has no place for 'lora_unet_con.*no update of a"):
            lf.save(a, tmp_path / "y.safetensors", format=form)


# What can't be written


def one(path, **more):
    return lf.Adapter({path: lf.LowRank(R(2, 5), R(6, 2))}, **more)


Q = f"unet.{attention('down_blocks.0.attentions.1')}.to_q"
WRONG = {
    "a language model": (one("model.layers.0.self_attn.q_proj"), MismatchError, "no name for 'mod"),
    "a head": (
        one(Q, extras={"score.weight": R(2, 2)}),
        RefusedError,
        "no place for 'score.weight'",
    ),
    "an embedding": (
        one(Q, layouts={Q: Layout("embedding")}),
        RefusedError,
        f"no place for '{Q}', which is no linear layer and no convolution",
    ),
    "PiSSA": (one(Q, config={"init_lora_weights": "pissa"}), RefusedError, "can't hold .*PiSSA"),
    "two names": (
        lf.Adapter(
            {
                f"text_encoder.{start}encoder.layers.0.mlp.fc1": lf.LowRank(R(2, 5), R(6, 2))
                for start in ("", "text_model.")
            }
        ),
        MismatchError,
        "are one module: drop one",
    ),
    "no update": (lf.Adapter({}, {"score.weight": R(2, 2)}), RefusedError, "updates alone"),
    "a scale": (
        lf.Adapter({Q: lf.LowRank(R(2, 5), R(6, 2), 1e39)}),
        MismatchError,
        "makes numbers that float32 can't hold",
    ),
}


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("case", WRONG)
def test_what_a_form_can_not_hold_is_named(case, form, tmp_path):
    adapter, kind, why = WRONG[case]
    with pytest.raises(kind, match=why):
        lf.save(adapter, tmp_path / "x.safetensors", format=form)
    assert not list(tmp_path.iterdir())


def test_names_that_only_some_have(tmp_path):
    sd3 = one("transformer.transformer_blocks.0.attn.norm_q")
    lf.save(sd3, tmp_path / "x.safetensors", format="diffusers")
    for form in ("kohya", "comfy"):
        with pytest.raises(MismatchError, match=r"no name for 'transformer\..*norm_q' in this"):
            lf.save(sd3, tmp_path / "y.safetensors", format=form)
    strange = "lora_unet_joint_blocks_0_x_block_attn_qkv"
    lf.save(one(strange), tmp_path / "z.safetensors", format="kohya")
    assert list(lf.load(tmp_path / "z.safetensors")) == [strange]
    own = "diffusion_model.blocks.0.self_attn.q"
    lf.save(one(own), tmp_path / "w.safetensors", format="comfy")
    assert list(lf.load(tmp_path / "w.safetensors")) == [own]
    lf.save(
        one(strange),
        tmp_path / "v.safetensors",
        format="diffusers",
        base=["joint.blocks.0.x_block.attn.qkv"],
    )
    assert list(lf.load(tmp_path / "v.safetensors")) == ["unet.joint.blocks.0.x_block.attn.qkv"]


def test_a_base_is_checked_and_has_what_the_file_has_not(tmp_path):
    a = adapter_of(SD1)
    shapes = {f"{p}.weight": torch.empty(out, inner, *k) for p, (out, inner, *k) in SD1.items()}
    lf.save(a, tmp_path / "x.safetensors", format="kohya", base=shapes)
    wrong = shapes | {f"{next(iter(SD1))}.weight": torch.empty(7, 5)}
    with pytest.raises(MismatchError, match=r"is 7×5 in the base, and its update 6×5"):
        lf.save(a, tmp_path / "y.safetensors", format="kohya", base=wrong)
    with pytest.raises(MismatchError, match="is meant by"):
        lf.save(a, tmp_path / "y.safetensors", format="kohya", base=list(SD1)[1:])
    conv = "unet.down_blocks.2.downsamplers.0.conv"
    flat = lf.Adapter({conv: lf.LowRank(R(2, 30), R(6, 2))})  # as LoHa's are
    lf.save(flat, tmp_path / "z.safetensors", format="diffusers", base=shapes)
    assert load_file(tmp_path / "z.safetensors")[f"{conv}.lora_A.weight"].shape == (2, 5, 3, 2)
    bare = lf.Adapter({p.removeprefix("unet."): u for p, u in a.modules.items() if "unet" in p})
    lf.save(bare, tmp_path / "w.safetensors", format="diffusers")  # as loaded for a UNet
    assert all(path.startswith("unet.") for path in lf.load(tmp_path / "w.safetensors"))


@pytest.mark.parametrize(
    ("said", "why"),
    [
        ({"x": 0}, "must give whole numbers"),
        ({"x": [0, 0]}, "must give whole numbers"),
        ({"x": "2"}, "must give whole numbers"),
        ({"NAME": 1}, "its rank is not the 1 that 'lorafold_ranks' in the header says"),
        ({"NAME": 9}, "its rank is 3, and 'lorafold_ranks' in the header says 9"),
        ({"NAME": [1, 1]}, "its rank is 3, and 'lorafold_ranks' in the header says"),
    ],
)
def test_a_header_that_lies_of_padding_is_refused(said, why, tmp_path):
    name = "lora_unet_mid_block_attentions_0_proj_in"
    tensors = {f"{name}.lora_down.weight": R(3, 5), f"{name}.lora_up.weight": R(6, 3)}
    text = json.dumps({name if key == "NAME" else key: value for key, value in said.items()})
    save_file(tensors, tmp_path / "x.safetensors", {"lorafold_ranks": text})
    with pytest.raises((FileError, MismatchError), match=why):
        lf.load(tmp_path / "x.safetensors")


# The command line, and other verbs


def run(*words):
    with pytest.raises(SystemExit) as ended:
        main(list(map(str, words)))
    return ended.value.code


@pytest.mark.parametrize("form", FORMS)
def test_the_bases_name_goes_along(form, tmp_path, capsys):
    a = adapter_of(SD1)
    lf.save(a, tmp_path / "x.safetensors", format=form)
    assert "lorafold_base_model" not in metadata(tmp_path / "x.safetensors")
    lf.save(lf.Adapter(a.modules, layouts=a.layouts, base_model="org/sd"), tmp_path / "peft")
    out = tmp_path / "y.safetensors"
    for source, option in ((tmp_path / "peft", ()), (tmp_path / "x.safetensors", "--base-model")):
        words = ("convert", source, "-o", out, "--to", form, "--overwrite")
        assert run(*words, *([option, "org/sd"] if option else [])) == 0
        assert lf.load(out).base_model == "org/sd"
        assert run("convert", out, "-o", tmp_path / "z", "--to", "peft", "--overwrite") == 0
        assert lf.load(tmp_path / "z").base_model == "org/sd"
    lf.save(lf.load(out), tmp_path / "again.safetensors", format=form)
    assert (tmp_path / "again.safetensors").read_bytes() == out.read_bytes()


@pytest.mark.parametrize("form", FORMS)
def test_convert_writes_a_file(form, tmp_path, capsys):
    a = adapter_of(SDXL)
    lf.save(a, tmp_path / "peft")
    out = tmp_path / "x.safetensors"
    assert run("convert", tmp_path / "peft", "-o", out, "--to", form, "--json") == 0
    told = json.loads(capsys.readouterr().out)
    assert told["error"] < 1e-6
    assert told["modules"] == [len(a)] * 2
    assert told["ranks"] == [[1, 3]] * 2
    assert run("convert", out, "-o", tmp_path / "back", "--to", "peft") == 0
    assert a.distance(lf.load(tmp_path / "back")) <= 1e-6 * a.norm()
    capsys.readouterr()
    assert run("convert", tmp_path / "peft", "-o", tmp_path / "y", "--to", form) == 2
    assert "whose name ends in .safetensors" in capsys.readouterr().err
    lf.save(lf.Adapter({"unet.conv_in": lf.LowRank(R(2, 5), R(6, 2))}), tmp_path / "two")
    code = run("convert", tmp_path / "two", "-o", tmp_path / "z.safetensors", "--to", form)
    assert code == (2 if form == "kohya" else 0)
    if form == "kohya":
        assert "give --base" in capsys.readouterr().err


def test_two_of_them_fold_merge_and_come_back(tmp_path, capsys):
    """Of two trainers: one in kohya-ss's names, one in ComfyUI's."""
    files = {"a": tmp_path / "a.safetensors", "b": tmp_path / "b.safetensors"}
    adapters = {name: adapter_of(SDXL) for name in files}
    for (name, file), form in zip(files.items(), ("kohya", "comfy"), strict=True):
        lf.save(adapters[name], file, format=form)
    weights = {f"{p}.weight": R(out, inner, *k) for p, (out, inner, *k) in SDXL.items()}
    library = lf.fold(list(files.values()), tolerance=0)
    library.save(tmp_path / "lib")
    for name, form in (("a", "kohya"), ("b", "diffusers")):
        assert run("unfold", tmp_path / "lib", name, "-o", tmp_path / "out") == 0
        out = tmp_path / f"{name}-back.safetensors"
        assert run("convert", tmp_path / "out" / name, "-o", out, "--to", form) == 0
        before, after = (lf.load(f).apply_to(weights) for f in (files[name], out))
        assert all((t - after[k]).norm() <= 1e-6 * t.norm() for k, t in before.items())
    merged = lf.merge(list(files.values()), "linear", weights=[0.5, 0.5])
    exact = 0.5 * adapters["a"] + 0.5 * adapters["b"]
    assert exact.distance(merged) <= 1e-5 * exact.norm()
    small = lf.load(files["a"]).resize(rank=1)
    lf.save(small, tmp_path / "small.safetensors", format="kohya")
    assert {u.rank for u in lf.load(tmp_path / "small.safetensors").modules.values()} == {1}
    capsys.readouterr()
    assert run("info", files["a"], files["b"]) == 0
    assert run("resize", files["a"], tmp_path / "resized", "--rank", "1") == 0
    assert run("merge", files["a"], files["b"], "-o", tmp_path / "merged") == 0
