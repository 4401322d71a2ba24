"""kohya-ss's and LyCORIS's files: what they hold is the update of their formulas, never dense."""

import json
import re

import pytest
import torch
from safetensors.torch import load_file, save_file

import lorafold as lf
from lorafold.cli import main
from lorafold.errors import FileError, MismatchError, RefusedError
from lorafold.files import open_adapter
from lorafold.files.formats.diffusion.names import pieces_of

NAME, PATH = "lora_unet_mid_block_attentions_0_proj_in", "unet.mid_block.attentions.0.proj_in"
R = torch.randn


def plain():
    t = {"lora_down.weight": R(3, 40), "lora_up.weight": R(24, 3)}
    return t, t["lora_up.weight"].double() @ t["lora_down.weight"].double(), 3


def conv(kernel):
    t = {"lora_down.weight": R(3, 5, *kernel), "lora_up.weight": R(24, 3, *[1] * len(kernel))}
    down, up = (x.double() for x in t.values())
    return t, torch.einsum("oa,ai...->oi...", up.flatten(1), down), 3


def tucker():
    t = {
        "lora_down.weight": R(3, 5, 1, 1),
        "lora_up.weight": R(24, 3, 1, 1),
        "lora_mid.weight": R(3, 3, 3, 2),
    }
    down, up, mid = (x.double() for x in t.values())
    return t, torch.einsum("oa,abhw,bi->oihw", up.flatten(1), mid, down.flatten(1)), 3


def loha(core=False):
    t = {}
    for n in (1, 2):
        t[f"hada_w{n}_a"], t[f"hada_w{n}_b"] = (R(2, 24), R(2, 6)) if core else (R(24, 2), R(2, 40))
        if core:
            t[f"hada_t{n}"] = R(2, 2, 3, 2)
    d = {key: x.double() for key, x in t.items()}
    if not core:
        return t, (d["hada_w1_a"] @ d["hada_w1_b"]) * (d["hada_w2_a"] @ d["hada_w2_b"]), 2
    sides = [
        torch.einsum("abhw,ao,bi->oihw", d[f"hada_t{n}"], d[f"hada_w{n}_a"], d[f"hada_w{n}_b"])
        for n in (1, 2)
    ]
    return t, sides[0] * sides[1], 2


def lokr(**tensors):
    """Of w1 (o, i) and w2 (p, q, …), each whole or in factors."""
    t = {f"lokr_{what}": x for what, x in tensors.items()}
    d = {what: x.double() for what, x in tensors.items()}
    w1 = d["w1"] if "w1" in d else d["w1_a"] @ d["w1_b"]
    if "t2" in d:
        w2 = torch.einsum("abhw,ap,bq->pqhw", d["t2"], d["w2_a"], d["w2_b"])
    else:
        w2 = d["w2"] if "w2" in d else d["w2_a"] @ d["w2_b"]
    dense = torch.einsum("oi,pq...->opiq...", w1, w2)
    dense = dense.reshape(len(w1) * len(w2), w1.shape[1] * w2.shape[1], *w2.shape[2:])
    dim = next((len(tensors[what]) for what in ("w2_b", "w1_b") if what in tensors), None)
    return t, dense, dim


KINDS = {
    "plain": plain,
    "conv 1×1": lambda: conv((1, 1)),
    "conv 3×2": lambda: conv((3, 2)),
    "conv of one dimension": lambda: conv((3,)),
    "tucker": tucker,
    "loha": loha,
    "loha, tucker": lambda: loha(core=True),
    "lokr": lambda: lokr(w1=R(3, 4), w2_a=R(8, 2), w2_b=R(2, 10)),
    "lokr, tall": lambda: lokr(w1=R(4, 3), w2_a=R(8, 2), w2_b=R(2, 15)),
    "lokr, w1 in factors": lambda: lokr(w1_a=R(4, 2), w1_b=R(2, 4), w2_a=R(6, 2), w2_b=R(2, 10)),
    "lokr, w2 whole": lambda: lokr(w1_a=R(4, 2), w1_b=R(2, 4), w2=R(6, 10)),
    "lokr, both whole": lambda: lokr(w1=R(2, 8), w2=R(12, 5)),
    "lokr, conv": lambda: lokr(w1_a=R(4, 1), w1_b=R(1, 4), w2=R(8, 2, 3, 2)),
    "lokr, tucker": lambda: lokr(w1=R(3, 4), t2=R(2, 2, 3, 2), w2_a=R(2, 8), w2_b=R(2, 2)),
}


def written(path, **modules):
    """A file: {name: {what: tensor}}."""
    tensors = {f"{name}.{what}": t for name, parts in modules.items() for what, t in parts.items()}
    save_file({key: t.contiguous() for key, t in tensors.items()}, path)
    return path


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("alpha", [None, 1.5], ids=["α = r", "α"])
def test_the_update_is_the_formulas(kind, alpha, tmp_path):
    tensors, dense, dim = KINDS[kind]()
    if alpha is not None:
        tensors = {**tensors, "alpha": torch.tensor(alpha)}
    file = written(tmp_path / "x.safetensors", **{NAME: tensors})
    exact = dense * (1.0 if None in (alpha, dim) else alpha / dim)
    opened = open_adapter(file)
    a = lf.load(file)
    u = a[PATH]
    assert list(a) == [PATH]
    assert not a.extras
    assert u.rank < min(u.shape) or kind == "plain"
    assert opened.shapes[PATH] == (*u.shape, u.rank)
    assert opened.dtypes[PATH] == u.A.dtype
    assert (u.dense().double().reshape(exact.shape) - exact).norm() < 1e-6 * exact.norm()
    assert a.layout(PATH).kernel == (tuple(exact.shape[1:]) if exact.ndim > 2 else ())
    for other in (opened.read(PATH), opened.only(PATH).read(PATH)):
        assert torch.equal(other.A, u.A)
        assert torch.equal(other.B, u.B)
        assert other.scale == u.scale
    assert lf.load({f"{NAME}.{what}": t for what, t in tensors.items()}).digest == a.digest
    weight = torch.zeros(exact.shape)
    applied = a.apply_to({f"{PATH}.weight": weight})[f"{PATH}.weight"]
    assert (applied.double() - exact).norm() < 1e-6 * exact.norm()


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32, torch.float64])
@pytest.mark.parametrize("kind", ["plain", "loha", "lokr"])
def test_narrow_numbers_lose_nothing(kind, dtype, tmp_path):
    """Products of half-precision numbers are exact in float32; plain factors keep their bits."""
    tensors = {what: t.to(dtype) for what, t in KINDS[kind]()[0].items()}
    u = lf.load(written(tmp_path / "x.safetensors", **{NAME: tensors}))[PATH]
    if kind == "plain":
        assert torch.equal(u.A, tensors["lora_down.weight"])
        assert torch.equal(u.B, tensors["lora_up.weight"])
        return
    assert u.A.dtype == (torch.float64 if dtype == torch.float64 else torch.float32)
    d = {what: t.double() for what, t in tensors.items()}
    if kind == "loha":
        exact = torch.einsum("oa,oc->oac", d["hada_w1_a"], d["hada_w2_a"]).flatten(1)
        if dtype != torch.float32:
            assert torch.equal(u.B.double(), exact)
    else:
        exact = torch.kron(torch.eye(3, dtype=torch.float64), d["lokr_w2_a"])
        assert torch.equal(u.B.double(), exact)


def test_it_is_read_by_every_verb(tmp_path, capsys):
    files = [tmp_path / f"{name}.safetensors" for name in "ab"]
    for file in files:
        parts = {NAME: plain()[0], "lora_te_text_model_encoder_layers_1_mlp_fc1": loha()[0]}
        written(file, **parts)
    a, b = map(lf.load, files)
    library = lf.fold(files, tolerance=0)
    assert library["a"].distance(a) < 1e-6 * a.norm()
    with pytest.raises(SystemExit) as ended:
        main(["diff", *map(str, files), "--json"])
    assert ended.value.code == 0
    assert json.loads(capsys.readouterr().out)["distance"] == pytest.approx(a.distance(b))
    lf.save(a, tmp_path / "peft")
    assert lf.load(tmp_path / "peft").distance(a) < 1e-6 * a.norm()


# Of full rank


def full_loha():
    t = {f"hada_w{n}_{k}": R(24, 5) if k == "a" else R(5, 40) for n in (1, 2) for k in "ab"}
    d = {key: x.double() for key, x in t.items()}
    return t, (d["hada_w1_a"] @ d["hada_w1_b"]) * (d["hada_w2_a"] @ d["hada_w2_b"]), 5


FULL = {
    "loha": full_loha,
    "lokr": lambda: lokr(w1=R(3, 4), w2=R(6, 10)),
    "lokr, w1 in factors": lambda: lokr(w1_a=R(2, 2), w1_b=R(2, 3), w2=R(10, 12)),
    "lokr, conv": lambda: lokr(w1=R(3, 3), w2=R(8, 3, 3, 2)),
}


@pytest.mark.parametrize("kind", FULL)
@pytest.mark.parametrize("tolerance", [0.0, 0.05, 0.4])
def test_products_of_full_rank_are_cut_where_asked(kind, tolerance, tmp_path):
    tensors, dense, dim = FULL[kind]()
    tensors = {**tensors, "alpha": torch.tensor(3.0)}
    exact = dense * (1.0 if dim is None else 3.0 / dim)
    file = written(tmp_path / "x.safetensors", **{NAME: tensors})
    with pytest.raises(
        FileError, match=r"no update of low rank: cut it .*`lf\.load\(path, tolerance=0\.01\)`"
    ):
        lf.load(file)
    with pytest.warns(UserWarning, match=f"{PATH}' multiplied to full rank: cut, with .* most "):
        a = lf.load(file, tolerance=tolerance)
    u = a[PATH]
    error = (u.dense().double().reshape(exact.shape) - exact).norm() / exact.norm()
    assert error <= tolerance + 1e-6
    S = torch.linalg.svdvals(exact.flatten(1))
    left = S.square().flip(0).cumsum(0).flip(0).sqrt() / S.norm()  # the error of keeping k
    fewest = int((left > tolerance).sum()) if tolerance else len(S)
    assert u.rank == fewest
    assert a.layout(PATH).kernel == (tuple(exact.shape[1:]) if exact.ndim > 2 else ())
    with pytest.warns(UserWarning, match="multiplied to full rank"):
        opened = open_adapter(file, tolerance=tolerance)
    assert opened.shapes[PATH] == (*u.shape, u.rank)
    flat = {f"{NAME}.{what}": t for what, t in tensors.items()}
    with pytest.warns(UserWarning, match="state dict: .*multiplied to full rank"):
        assert lf.load(flat, tolerance=tolerance).digest == a.digest
    with pytest.warns(UserWarning, match="multiplied to full rank"):
        moved = lf.load(file, tolerance=tolerance, base=[PATH.removeprefix("unet.")])
    assert list(moved) == [PATH.removeprefix("unet.")]
    full = pytest.warns(UserWarning, match="multiplied to full rank")
    with full, pytest.raises(MismatchError, match=r"x\.safetensors: .*tolerance"):
        lf.load(file, tolerance=2.0)


def test_a_tolerance_cuts_nothing_of_low_rank(tmp_path):
    file = written(tmp_path / "x.safetensors", **{NAME: loha()[0]})
    assert lf.load(file, tolerance=0.4).digest == lf.load(file).digest


# α


def test_alpha_is_each_modules_own(tmp_path):
    other = NAME.replace("_0_", "_1_")
    a, b = ({**plain()[0], "alpha": torch.tensor(x)} for x in (6.0, 1.5))
    file = written(tmp_path / "x.safetensors", **{NAME: a, other: b})
    assert list(open_adapter(file).scales.values()) == [2.0, 0.5]
    twin = written(tmp_path / "y.safetensors", **{NAME: b, other: a})  # of the same header
    assert list(open_adapter(twin).scales.values()) == [0.5, 2.0]
    with pytest.raises(MismatchError, match="leave out alpha="):
        lf.load(file, alpha=6)


def test_alpha_of_the_header_and_of_a_resized_file(tmp_path):
    tensors = {f"{NAME}.{what}": t for what, t in plain()[0].items()}
    file = tmp_path / "x.safetensors"
    save_file(tensors, file, metadata={"ss_network_alpha": "6", "ss_steps": "100"})
    a = lf.load(file)
    assert a[PATH].scale == 2.0
    assert a.config["lorafold_origin"]["metadata"]["ss_steps"] == "100"
    more = {**tensors, f"{NAME}.alpha": torch.tensor(1.5)}
    save_file(more, file, metadata={"ss_network_alpha": "Dynamic", "ss_network_dim": "Dynamic"})
    assert lf.load(file)[PATH].scale == 0.5
    save_file(tensors, file)
    assert lf.load(file, alpha=6)[PATH].scale == 2.0


# What is carried


@pytest.mark.parametrize("shape", [(24, 1), (24, 1, 1, 1), (1, 40)])
def test_magnitudes_are_doras(shape, tmp_path):
    tensors = conv((1, 1))[0] if len(shape) == 4 else plain()[0]
    m = torch.rand(shape) + 1
    file = written(tmp_path / "x.safetensors", **{NAME: {**tensors, "dora_scale": m}})
    a = lf.load(file)
    assert "DoRA" in a.refusal
    assert open_adapter(file).refusal == a.refusal
    with pytest.raises(RefusedError, match="DoRA"):
        a.norm()
    (key,) = a.extras
    assert torch.equal(a.extras[key].flatten(), m.flatten())
    assert torch.equal(open_adapter(file).read_extras()[key], a.extras[key])
    if shape[0] == 1:  # of columns, which PEFT does not have
        assert key == f"{NAME}.dora_scale"
        return
    lf.save(a, tmp_path / "peft")
    saved = load_file(tmp_path / "peft" / "adapter_model.safetensors")
    expected = (24,) if len(shape) == 2 else (1, 24, 1, 1)
    assert saved[f"base_model.model.{PATH}.lora_magnitude_vector"].shape == expected
    moved = lf.load(file, base=[PATH.removeprefix("unet.")])
    path = PATH.removeprefix("unet.")
    assert list(moved.extras) == [f"base_model.model.{path}.lora_magnitude_vector"]


def test_differences_are_extras(tmp_path):
    more = {"diff": R(4, 4), "diff_b": R(4)}
    norm = {"w_norm": R(8), "b_norm": R(8)}
    parts = {NAME: plain()[0], "lora_unet_conv_in": more, "lora_unet_conv_norm_out": norm}
    a = lf.load(written(tmp_path / "x.safetensors", **parts))
    assert list(a) == [PATH]
    assert torch.equal(a.extras["lora_unet_conv_in.diff"], more["diff"])
    assert set(a.extras) == {
        *(f"lora_unet_conv_in.{k}" for k in more),
        *(f"lora_unet_conv_norm_out.{k}" for k in norm),
    }


# Names


SGM = {
    "input_blocks_0_0": "conv_in",
    "input_blocks_3_0_op": "down_blocks.0.downsamplers.0.conv",
    "input_blocks_4_0_in_layers_2": "down_blocks.1.resnets.0.conv1",
    "input_blocks_4_0_skip_connection": "down_blocks.1.resnets.0.conv_shortcut",
    "input_blocks_8_1_transformer_blocks_9_attn2_to_out_0": (
        "down_blocks.2.attentions.1.transformer_blocks.9.attn2.to_out.0"
    ),
    "middle_block_0_emb_layers_1": "mid_block.resnets.0.time_emb_proj",
    "middle_block_1_proj_in": "mid_block.attentions.0.proj_in",
    "middle_block_2_out_layers_3": "mid_block.resnets.1.conv2",
    "output_blocks_2_1_transformer_blocks_0_ff_net_0_proj": (
        "up_blocks.0.attentions.2.transformer_blocks.0.ff.net.0.proj"
    ),
    "output_blocks_5_2_conv": "up_blocks.1.upsamplers.0.conv",
    "output_blocks_6_0_in_layers_2": "up_blocks.2.resnets.0.conv1",
    "time_embed_2": "time_embedding.linear_2",
    "label_emb_0_0": "add_embedding.linear_1",
    "out_2": "conv_out",
}
SD1 = (
    "down_blocks.0.attentions.1.transformer_blocks.0.attn1.to_q",
    "down_blocks.0.resnets.0.time_emb_proj",
    "up_blocks.3.attentions.2.transformer_blocks.0.ff.net.2",
    "time_embedding.linear_1",
    "conv_in",
)


def paths_of(names):
    return {name: piece.path for name, (piece,) in pieces_of(names).items()}


def test_names_by_tables():
    names = {f"lora_unet_{flat}": f"unet.{path}" for flat, path in SGM.items()}
    names |= {f"lora_unet_{path.replace('.', '_')}": f"unet.{path}" for path in SD1}
    end = "text_model_encoder_layers_11_self_attn_q_proj"
    dotted = "text_model.encoder.layers.11.self_attn.q_proj"
    for te, model in (("te", "text_encoder"), ("te2", "text_encoder_2")):
        names[f"lora_{te}_{end}"] = f"{model}.{dotted}"
    assert paths_of(names) == names


def test_names_that_no_table_has_stay_as_they_are():
    strange = ["lora_unet_joint_blocks_0_x_block_attn_qkv", "lora_unet_conv_in", "lycoris_fc1"]
    text = "lora_te1_text_model_encoder_layers_0_mlp_fc2"
    found = paths_of([*strange, text, "m.q"])
    assert all(found[name] == name for name in [*strange, "m.q"])
    assert found[text] == "text_encoder.text_model.encoder.layers.0.mlp.fc2"


class Block(torch.nn.Module):
    """Names that only the base tells apart, and a convolution."""

    def __init__(self):
        super().__init__()
        self.img_attn = torch.nn.ModuleDict({"to_q_b": torch.nn.Linear(40, 24)})
        self.con_v = torch.nn.Conv2d(5, 24, (4, 2))


def test_names_by_the_base(tmp_path):
    flat = {"lora_unet_img_attn_to_q_b": plain()[0], "lora_unet_con_v": loha()[0]}
    file = written(tmp_path / "x.safetensors", **flat)
    model = Block()
    assert set(lf.load(file)) == set(flat)
    a = lf.load(file, base=model)
    assert set(a) == {"img_attn.to_q_b", "con_v"}
    assert a.layout("con_v").kernel == (5, 4, 2)  # which LoHa flattens
    before = model.con_v.weight.clone()
    after = a.apply_to(model.state_dict())["con_v.weight"]
    assert torch.allclose((after - before).flatten(1), a["con_v"].dense(), atol=1e-5)
    names = ["unet.img_attn.to_q_b", "unet.con_v"]
    assert set(lf.load(load_file(file), base=names)) == set(names)
    (tmp_path / "base").mkdir()
    save_file(model.state_dict(), tmp_path / "base" / "model.safetensors")
    assert set(lf.load(file, base=tmp_path / "base")) == set(a)


def test_a_base_has_its_text_model_or_not(tmp_path):
    end = "encoder_layers_0_self_attn_q_proj"
    names = {f"lora_te{n}_text_model_{end}": plain()[0] for n in (1, 2)}
    file = written(tmp_path / "x.safetensors", **names)
    path = "encoder.layers.0.self_attn.q_proj"
    base = [f"text_encoder.{path}", f"text_encoder_2.text_model.{path}"]
    assert set(lf.load(file, base=base)) == set(base)
    with pytest.raises(MismatchError, match=r"more than one, is meant by 'lora_te2_.*_2\.'"):
        lf.load(file, base=[path])  # one of the two can't be it
    with pytest.raises(MismatchError, match=r"is meant by 'lora_te1_.*, 'lora_te2_"):
        lf.load(file, base=["encoder.layers.1.self_attn.q_proj"])
    with pytest.raises(MismatchError, match="is meant by 'lora_te1_"):
        lf.load(file, base=[*base, base[0].replace("self_attn.q", "self.attn_q")])


def test_sgms_names_by_a_base_of_diffusers(tmp_path):
    names = {f"lora_unet_{flat}": plain()[0] for flat in SGM}
    file = written(tmp_path / "x.safetensors", **names)
    assert set(lf.load(file, base=list(SGM.values()))) == set(SGM.values())


def test_dotted_names_are_paths(tmp_path):
    file = written(tmp_path / "x.safetensors", **{"m.q_proj": plain()[0]})
    assert list(lf.load(file)) == ["m.q_proj"]
    assert list(lf.load(file, base=["m.q_proj"])) == ["m.q_proj"]


# What is no such file


down, up = plain()[0].values()
LOHA, LOKR = loha()[0], KINDS["lokr"]()[0]
WRONG = {
    "no partner": ({"lora_down.weight": down}, "has no lora_up: the file is incomplete"),
    "no w1": ({k: t for k, t in LOHA.items() if k != "hada_w1_b"}, "has no hada_w1_b"),
    "half a core": ({**LOHA, "hada_t1": R(2, 2, 3, 3)}, "has no hada_t2"),
    "half a product": ({"lokr_w1": R(3, 4)}, "has no lokr_w2_a"),
    "twice": ({**LOKR, "lokr_w2": R(8, 10)}, "at once"),
    "two kinds": ({**LOKR, **LOHA}, "at once"),
    "ranks": ({"lora_down.weight": R(4, 40), "lora_up.weight": up}, "do not fit together"),
    "a kernel": ({"lora_down.weight": R(3, 40), "lora_up.weight": R(24, 3, 3, 3)}, "do not fit"),
    "sides": ({**LOHA, "hada_w2_b": R(2, 39)}, "do not fit together"),
    "whole numbers": ({"lora_down.weight": down.int(), "lora_up.weight": up}, "floating point"),
    "one dimension": ({"lora_down.weight": R(3), "lora_up.weight": up}, "none of a factor"),
    "NaN": ({"lora_down.weight": down * float("nan"), "lora_up.weight": up}, "NaN"),
    "magnitudes": (
        {"lora_down.weight": down, "lora_up.weight": up, "dora_scale": R(23, 1)},
        "23 magnitudes, and its update 24 rows",
    ),
    "an α of two": (
        {"lora_down.weight": down, "lora_up.weight": up, "alpha": R(2)},
        "α must be one number, found torch.float32 of shape",
    ),
    "GLoRA": ({"a1.weight": R(3, 4), "a2.weight": R(3, 4)}, r"algorithm of LyCORIS \('lora_unet"),
    "OFT": ({"oft_blocks": R(2, 4, 4)}, r"LyCORIS adapter \(OFT\)"),
    "a part of another": ({**LOKR, "bias_values": R(3)}, "algorithm of LyCORIS"),
    "of full rank": (
        {f"hada_w{n}_{k}": R(24, 5) if k == "a" else R(5, 40) for n in (1, 2) for k in "ab"},
        "multiply to the rank 25, and its weight is 24×40, .*lorafold extract",
    ),
    "twice .weight": (
        {"lora_down.weight": down, "lora_up.weight": up, "lora_up": up.clone()},
        "twice, with .weight and without",
    ),
}


@pytest.mark.parametrize("case", WRONG)
def test_what_can_not_be_read_is_named(case, tmp_path):
    tensors, why = WRONG[case]
    file = written(tmp_path / "x.safetensors", **{NAME: tensors})
    with pytest.raises((FileError, MismatchError), match=rf"x\.safetensors: .*{why}") as told:
        lf.load(file)
    assert (PATH if case in ("NaN", "magnitudes") else NAME) in str(told.value)


def test_two_names_of_one_module(tmp_path):
    names = ("lora_unet_middle_block_1_proj_in", NAME)
    file = written(tmp_path / "x.safetensors", **{name: plain()[0] for name in names})
    with pytest.raises(MismatchError, match=re.escape(f"is another name of {PATH!r}")):
        lf.load(file)


def test_pickles_and_configs_beside(tmp_path):
    tensors = {f"{NAME}.{what}": t for what, t in loha()[0].items()}
    torch.save(tensors, tmp_path / "adapter_model.bin")
    a = lf.load(tmp_path / "adapter_model.bin", allow_pickle=True)
    assert a.digest == lf.load(tensors).digest
    base = [PATH.removeprefix("unet.")]
    assert list(lf.load(tmp_path / "adapter_model.bin", allow_pickle=True, base=base)) == base
    save_file(tensors, tmp_path / "x.safetensors")
    (tmp_path / "adapter_config.json").write_text(json.dumps({"r": 2, "lora_alpha": 4}))
    with pytest.raises(MismatchError, match="form of kohya-ss.*remove the config"):
        lf.load(tmp_path / "x.safetensors")
