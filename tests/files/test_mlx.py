"""MLX's folders: what they hold is the update that MLX would apply, by its formula."""

import json
import shutil

import pytest
import torch
from safetensors.torch import load_file, save_file

import lorafold as lf
from lorafold.cli import main
from lorafold.errors import FileError, MismatchError, RefusedError
from lorafold.files import open_adapter
from lorafold.parts import Layout

Q, EMBED, HEAD = "model.layers.0.self_attn.q_proj", "model.embed_tokens", "lm_head"
UP = "model.layers.1.mlp.switch_mlp.up_proj"
SHAPES = {Q: (6, 10), EMBED: (5, 12), HEAD: (12, 5)}  # (out, in)


def factors(out, inner, rank=3, experts=None):
    if experts is None:
        return torch.randn(inner, rank), torch.randn(rank, out)
    return torch.randn(experts, rank, inner), torch.randn(experts, out, rank)


def tensors_of(shapes=SHAPES, rank=3):
    found = {}
    for path, shape in shapes.items():
        found[f"{path}.lora_a"], found[f"{path}.lora_b"] = factors(*shape, rank)
    return found


def written(folder, tensors, **said):
    """A folder as mlx-lm leaves it."""
    folder.mkdir(exist_ok=True)
    copies = {key: t.clone().contiguous() for key, t in tensors.items()}
    save_file(copies, folder / "adapters.safetensors")
    parameters = {"rank": 3, "scale": 20.0, "dropout": 0.0, **said.pop("parameters", {})}
    config = {"fine_tune_type": "lora", "num_layers": 2, "lora_parameters": parameters, **said}
    config = {k: v for k, v in config.items() if v is not None}
    (folder / "adapter_config.json").write_text(json.dumps(config))
    return folder


def update(tensors, path, scale):
    """By MLX's formula, in float64."""
    return scale * (tensors[f"{path}.lora_a"].double() @ tensors[f"{path}.lora_b"].double()).T


@pytest.mark.parametrize("scale", [20.0, 0.1, 1 / 3])
def test_a_folder_is_the_update_that_mlx_applies(tmp_path, scale):
    tensors = tensors_of()
    folder = written(tmp_path / "a", tensors, parameters={"scale": scale}, model="org/base")
    a = lf.load(folder)
    assert a.modules.keys() == SHAPES.keys()
    assert a.base_model == "org/base"
    for path, shape in SHAPES.items():
        assert a[path].shape == shape
        assert a[path].scale == scale
        assert torch.equal(a[path].A, tensors[f"{path}.lora_a"].T)
        assert torch.equal(a[path].B, tensors[f"{path}.lora_b"].T)
        exact = update(tensors, path, scale)
        assert (a[path].dense() - exact).norm() < 1e-6 * exact.norm()
    assert a.layout(EMBED).kind == "embedding"
    config = json.loads((folder / "adapter_config.json").read_text())
    assert lf.load(tensors, config=config).digest == a.digest
    file = tmp_path / "a" / "adapters.safetensors"
    assert lf.load(file).digest == a.digest


def test_it_is_read_by_modules_and_by_every_verb(tmp_path, capsys):
    tensors = tensors_of()
    folder = written(tmp_path / "a", tensors)
    f = open_adapter(folder)
    assert f.shapes[Q] == (6, 10, 3)
    assert f.scales[Q] == 20
    assert torch.equal(f.read(Q).A, tensors[f"{Q}.lora_a"].T)
    assert torch.equal(f.only(Q).read(Q).B, tensors[f"{Q}.lora_b"].T)
    a = lf.load(folder)
    written(tmp_path / "b", tensors_of())
    library = lf.fold([folder, tmp_path / "b"], tolerance=0)
    assert a.distance(library["a"]) == 0
    norm = pytest.approx(
        float(torch.cat([update(tensors, p, 20).flatten() for p in SHAPES]).norm())
    )
    for line, field in (
        (["info", str(folder)], "norm"),
        (["diff", str(folder), str(tmp_path / "b")], "norm_a"),
    ):
        with pytest.raises(SystemExit) as ended:
            main([*line, "--json"])
        assert ended.value.code == 0
        assert json.loads(capsys.readouterr().out)[field] == norm
    small = tmp_path / "small"
    with pytest.raises(SystemExit):
        main(["resize", str(folder), str(small), "--rank", "1"])
    assert lf.load(small).distance(a.resize(rank=1)) < 1e-5 * a.norm()


def test_saved_for_peft_factors_keep_their_bits(tmp_path):
    tensors = tensors_of()
    a = lf.load(written(tmp_path / "a", tensors, parameters={"dropout": 0.05}))
    lf.save(a, tmp_path / "peft")
    saved = load_file(tmp_path / "peft" / "adapter_model.safetensors")
    assert torch.equal(saved[f"base_model.model.{Q}.lora_B.weight"], tensors[f"{Q}.lora_b"].T)
    config = json.loads((tmp_path / "peft" / "adapter_config.json").read_text())
    assert (config["r"], config["lora_alpha"], config["lora_dropout"]) == (3, 60.0, 0.05)
    assert lf.load(tmp_path / "peft").distance(a) == 0


def test_checkpoints_are_files_beside_it(tmp_path):
    first, last = tensors_of(), tensors_of()
    folder = written(tmp_path / "a", last)
    file = folder / "0000100_adapters.safetensors"
    save_file(first, file)
    assert torch.equal(lf.load(file)[Q].A, first[f"{Q}.lora_a"].T)
    assert lf.load(file)[Q].scale == 20
    assert torch.equal(lf.load(folder)[Q].A, last[f"{Q}.lora_a"].T)
    (folder / "adapters.safetensors").unlink()
    with pytest.raises(FileError, match=r"0000100_adapters\.safetensors.*its own path"):
        lf.load(folder)


@pytest.mark.parametrize("flat", [False, True], ids=["(E, r, in)", "(E·r, in)"])
@pytest.mark.parametrize("block", ["mlp", "block_sparse_moe"])
def test_experts_are_modules_by_the_names_of_a_checkpoint(tmp_path, flat, block):
    a, b = factors(6, 10, experts=4)
    path = UP.replace("mlp.switch", f"{block}.switch")
    stored = a.reshape(-1, 10) if flat else a
    folder = written(tmp_path / "a", {f"{path}.lora_a": stored, f"{path}.lora_b": b})
    found = lf.load(folder)
    name = "up_proj" if block == "mlp" else "w3"
    for e in range(4):
        u = found[f"model.layers.1.{block}.experts.{e}.{name}"]
        assert torch.equal(u.A, a[e])
        assert torch.equal(u.B, b[e])
        assert u.scale == 20
    assert len(found.modules) == 4


def test_older_configs_and_decoration(tmp_path):
    """`lora_layers` is what num_layers was; an `alpha` beside the scale means nothing to MLX."""
    tensors = tensors_of()
    more = {"alpha": 16.0, "scale": 10.0, "keys": ["self_attn.q_proj"]}
    a = lf.load(written(tmp_path / "a", tensors, num_layers=None, lora_layers=4, parameters=more))
    assert a[Q].scale == 10
    old = written(tmp_path / "b", tensors, fine_tune_type=None)
    assert lf.load(old)[Q].scale == 20


def test_without_a_config_alpha_says_the_scale(tmp_path):
    tensors = tensors_of()
    save_file(tensors, tmp_path / "x.safetensors")
    assert lf.load(tmp_path / "x.safetensors", alpha=60)[Q].scale == 20
    with pytest.raises(FileError, match="give alpha="):
        lf.load(tmp_path / "x.safetensors")


def test_magnitudes_are_doras(tmp_path):
    tensors = tensors_of({Q: SHAPES[Q]}) | {f"{Q}.m": torch.rand(6)}
    a = lf.load(written(tmp_path / "a", tensors, fine_tune_type="dora"))
    assert "DoRA" in a.refusal
    key = f"base_model.model.{Q}.lora_magnitude_vector"
    assert torch.equal(a.extras[key], tensors[f"{Q}.m"])
    lf.save(a, tmp_path / "peft")
    saved = load_file(tmp_path / "peft" / "adapter_model.safetensors")
    assert torch.equal(saved[key], tensors[f"{Q}.m"])
    assert torch.equal(open_adapter(tmp_path / "a").read_extras()[key], tensors[f"{Q}.m"])


def test_an_embedding_alone_is_told_of(tmp_path):
    tensors = tensors_of({EMBED: SHAPES[EMBED]})
    folder = written(tmp_path / "a", tensors)
    with pytest.warns(UserWarning, match="MLX applies it to the output layer as well"):
        assert lf.load(folder)[EMBED].shape == SHAPES[EMBED]


def test_the_header_that_mlx_writes_is_one(tmp_path):
    """Without metadata it writes null in their place."""
    folder = written(tmp_path / "a", tensors_of())
    before = lf.load(folder)
    file = folder / "adapters.safetensors"
    raw = file.read_bytes()
    end = 8 + int.from_bytes(raw[:8], "little")
    header = json.dumps({"__metadata__": None, **json.loads(raw[8:end])}).encode()
    file.write_bytes(len(header).to_bytes(8, "little") + header + raw[end:])
    assert lf.load(folder).digest == before.digest


A, B = factors(6, 10)
SECOND = "model.layers.1.mlp.experts.1.up_proj"
WRONG = {
    "no scale": ({}, {"parameters": {"scale": None, "alpha": 16}}, "'scale' in the config"),
    "a long number": ({}, {"parameters": {"scale": 10**400}}, "must be a number"),
    "infinity": ({}, {"parameters": {"scale": float("inf")}}, "must be a number"),
    "a text": ({}, {"parameters": {"scale": "20"}}, "must be a number, found '20'"),
    "another rank": ({}, {"parameters": {"rank": 8}}, "its rank is 3, and the config says 8"),
    "no parameters": ({}, {"lora_parameters": None}, "is not one of MLX's LoRA"),
    "full": ({}, {"fine_tune_type": "full"}, "is not one of MLX's LoRA"),
    "no partner": ({f"{HEAD}.lora_a": A}, {}, "has no partner lm_head.lora_b"),
    "no rank in common": ({f"{HEAD}.lora_a": A, f"{HEAD}.lora_b": B.T}, {}, "are no factors"),
    "whole numbers": ({f"{HEAD}.lora_a": A.int(), f"{HEAD}.lora_b": B}, {}, "floating point"),
    "four dimensions": (
        {f"{HEAD}.lora_a": A[None, None], f"{HEAD}.lora_b": B},
        {},
        "two dimensions or three",
    ),
    "NaN": ({f"{HEAD}.lora_a": A * float("nan"), f"{HEAD}.lora_b": B}, {}, "NaN"),
    "magnitudes": ({f"{Q}.m": torch.rand(6)}, {}, "has magnitudes"),
    "no magnitudes": ({}, {"fine_tune_type": "dora"}, "has no magnitudes"),
    "experts twice": (
        dict(
            zip(
                (f"{UP}.lora_a", f"{UP}.lora_b", *(f"{SECOND}.lora_{s}" for s in "ab")),
                (*factors(6, 10, experts=2), A, B),
                strict=True,
            )
        ),
        {},
        "in the file twice",
    ),
    "magnitudes twice": (
        {f"{Q}.m": torch.rand(6), f"base_model.model.{Q}.lora_magnitude_vector": torch.rand(6)},
        {"fine_tune_type": "dora"},
        "are the same tensor",
    ),
    "strange experts": (
        dict(zip(("x.experts.lora_a", "x.experts.lora_b"), factors(6, 10, experts=2), strict=True)),
        {},
        "how a checkpoint calls those",
    ),
}


@pytest.mark.parametrize("case", WRONG)
def test_what_can_not_be_read_is_named(case, tmp_path):
    tensors, said, why = WRONG[case]
    folder = written(tmp_path / "a", {f"{Q}.lora_a": A, f"{Q}.lora_b": B, **tensors}, **said)
    with pytest.raises((FileError, MismatchError), match=rf"adapters\.safetensors: .*{why}"):
        lf.load(folder)


def test_what_is_no_adapter_says_what_it_is(tmp_path):
    whole = {"model.embed_tokens.weight": torch.randn(12, 5)}
    with pytest.raises(FileError, match="whole model here.*lorafold extract"):
        lf.load(written(tmp_path / "a", whole, fine_tune_type="full"))
    with pytest.raises(FileError, match="tensors beside it are not MLX's"):
        lf.load(written(tmp_path / "b", whole))
    folder = written(tmp_path / "c", tensors_of())
    shutil.copy(folder / "adapters.safetensors", folder / "adapter_model.safetensors")
    with pytest.raises(FileError, match="one config for both"):
        lf.load(folder)


# Writing

K, DOWN = "model.layers.0.self_attn.k_proj", "model.layers.1.mlp.down_proj"
WRITTEN = {Q: (6, 10), K: (4, 10), DOWN: (10, 14)}


def adapter_of(scales=(1.0, 1.0, 1.0), ranks=(2, 3, 4), dtype=torch.float32, **more):
    modules = {
        path: lf.LowRank(torch.randn(r, inner).to(dtype), torch.randn(out, r).to(dtype), scale)
        for (path, (out, inner)), r, scale in zip(WRITTEN.items(), ranks, scales, strict=True)
    }
    return lf.Adapter(modules, **more)


def base_of(folder, tied=False, model_type="llama", **more):
    """A base by its headers: what the modules here need, and a configuration."""
    shapes = {**WRITTEN, EMBED: (12, 5), **({} if tied else {HEAD: (12, 5)}), **more}
    folder.mkdir()
    save_file(
        {f"{path}.weight": torch.zeros(shape) for path, shape in shapes.items()},
        folder / "model.safetensors",
    )
    names = ["LlamaForCausalLM"]
    config = {"model_type": model_type, "tie_word_embeddings": tied, "architectures": names}
    (folder / "config.json").write_text(json.dumps(config))
    return folder


def said_in(folder):
    return json.loads((folder / "adapter_config.json").read_text())


def test_ranks_are_padded_and_a_common_scale_is_kept(tmp_path):
    a = adapter_of(scales=(0.3, 0.3, 0.3), base_model="org/base", config={"lora_dropout": 0.1})
    lf.save(a, tmp_path / "mlx", format="mlx")
    tensors, said = load_file(tmp_path / "mlx" / "adapters.safetensors"), said_in(tmp_path / "mlx")
    assert said["lora_parameters"] == {"rank": 4, "scale": 0.3, "dropout": 0.1, "keys": [*WRITTEN]}
    assert (said["fine_tune_type"], said["model"]) == ("lora", "org/base")
    assert {key: tuple(t.shape) for key, t in tensors.items()} == {
        f"{path}.lora_{side}": shape
        for path, (out, inner) in WRITTEN.items()
        for side, shape in (("a", (inner, 4)), ("b", (4, out)))
    }
    back = lf.load(tmp_path / "mlx")
    for path, u in a.modules.items():
        assert torch.equal(back[path].A, u.A)
        assert torch.equal(back[path].B, u.B)
        assert back[path].scale == u.scale
        exact = u.scale * u.B.double() @ u.A.double()
        assert (update(tensors, path, 0.3) - exact).norm() < 1e-6 * exact.norm()
    assert open_adapter(tmp_path / "mlx").shapes[Q] == (6, 10, 2)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_scales_that_differ_go_into_b(tmp_path, dtype):
    exactly = adapter_of(scales=(0.5, 2.0, 4.0), dtype=dtype)
    rounded = adapter_of(scales=(0.3, 2.0, 4.0), dtype=dtype)
    for name, a in ("exactly", exactly), ("rounded", rounded):
        lf.save(a, tmp_path / name, format="mlx")
        back = lf.load(tmp_path / name)
        assert said_in(tmp_path / name)["lora_parameters"]["scale"] == 1
        assert all(torch.equal(back[path].A, u.A) for path, u in a.modules.items())
        assert a.distance(back) <= 1e-6 * a.norm()
        assert back[Q].B.dtype == (dtype if name == "exactly" else torch.float32)
        assert back[K].B.dtype == dtype
    assert torch.equal(lf.load(tmp_path / "exactly")[Q].B, exactly[Q].B * 0.5)
    lf.save(rounded, tmp_path / "half", format="mlx", dtype=torch.bfloat16)
    half = lf.load(tmp_path / "half")
    assert half[Q].B.dtype == torch.bfloat16
    assert rounded.distance(half) < 5e-3 * rounded.norm()


def test_embedding_and_head_of_an_untied_base(tmp_path):
    modules = {p: lf.LowRank(torch.randn(2, i), torch.randn(o, 2)) for p, (o, i) in SHAPES.items()}
    a = lf.Adapter(modules, layouts={EMBED: Layout("embedding")})
    lf.save(a, tmp_path / "mlx", format="mlx", base=base_of(tmp_path / "base"))
    tensors = load_file(tmp_path / "mlx" / "adapters.safetensors")
    assert tuple(tensors[f"{EMBED}.lora_a"].shape) == (12, 2)
    assert tuple(tensors[f"{EMBED}.lora_b"].shape) == (2, 5)
    assert a.distance(lf.load(tmp_path / "mlx")) == 0
    tied = base_of(tmp_path / "tied", tied=True)
    for path in (EMBED, HEAD):
        one = lf.Adapter({path: a[path]}, layouts={path: a.layout(path)})
        with pytest.raises(RefusedError, match=f"one weight for embedding and .*{path}"):
            lf.save(one, tmp_path / "no", format="mlx", base=tied)
    with pytest.raises(RefusedError, match=f"{EMBED}.*give base="):
        lf.save(a, tmp_path / "no", format="mlx")


def refused(name, tmp_path):
    """(adapter, options, what is said) of what MLX has no place for."""
    u = lf.LowRank(torch.randn(2, 8), torch.randn(6, 2))
    base = base_of(tmp_path / "base")
    layouts = {
        "conv": Layout("conv", kernel=(2, 4)),
        "experts": Layout("expert", parameter="gate_up_proj", expert=(0, 2)),
        "attention": Layout(parameter="in_proj_weight"),
    }
    a = adapter_of()
    config = {"modules_to_save": ["score"]}
    return {
        "a head": (lf.Adapter(a.modules, {"score.weight": u.A}, config), {}, "'score.weight'"),
        "a bias": (lf.Adapter(a.modules, {f"{Q}.bias": u.A[0]}, {}), {}, f"'{Q}.bias'"),
        "a convolution": (lf.Adapter({"c": u}, layouts={"c": layouts["conv"]}), {}, "'c'"),
        "an attention": (lf.Adapter({"c": u}, layouts={"c": layouts["attention"]}), {}, "'c'"),
        "experts in one": (
            lf.Adapter({"e.gate_up_proj[0]": u}, layouts={"e.gate_up_proj[0]": layouts["experts"]}),
            {},
            "is an expert .*give base=",
        ),
        "a strange name": (lf.Adapter({"transformer.h.0.attn": u}), {}, "'transformer.h.0.attn'"),
        "not in the base": (lf.Adapter({f"{Q}x": u}), {"base": base}, "q_projx"),
        "another shape": (lf.Adapter({Q: u}), {"base": base}, "q_proj"),
        "another architecture": (
            a,
            {"base": base_of(tmp_path / "bert", model_type="bert")},
            "'bert', of which it is not known",
        ),
        "PiSSA": (
            lf.Adapter(a.modules, config={"init_lora_weights": "pissa", "r": 2, "lora_alpha": 2}),
            {},
            "PiSSA",
        ),
        "replicas": (
            lf.Adapter(a.modules, config={"layer_replication": [[0, 2], [0, 2]]}),
            {"base": base},
            "layers replicated",
        ),
        "DoRA of some": (
            lf.Adapter(a.modules, {f"{Q}.lora_magnitude_vector": torch.ones(6)}),
            {},
            "DoRA of all modules or of none",
        ),
        "float64": (adapter_of(dtype=torch.float64), {}, "give dtype=torch.float32"),
        "padding": (a, {"pad": True}, "pad= and tables= are not for format='mlx'"),
    }[name]


NOT_HELD = (
    *("a head", "a bias", "a convolution", "an attention", "experts in one", "a strange name"),
    *("not in the base", "another shape", "another architecture", "PiSSA", "DoRA of some"),
    *("float64", "padding", "replicas"),
)


@pytest.mark.parametrize("name", NOT_HELD)
def test_what_mlx_can_not_hold_is_refused_by_name(name, tmp_path):
    adapter, options, says = refused(name, tmp_path)
    with pytest.raises((RefusedError, MismatchError), match=says):
        lf.save(adapter, tmp_path / "no", format="mlx", **options)
    assert not (tmp_path / "no").exists()


def test_experts_that_are_not_there_are_zero(tmp_path):
    names = [f"model.layers.0.mlp.experts.{e}.up_proj" for e in (0, 2)]
    updates = [lf.LowRank(torch.randn(r, 10), torch.randn(6, r)) for r in (2, 1)]
    lf.save(lf.Adapter(dict(zip(names, updates, strict=True))), tmp_path / "mlx", format="mlx")
    tensors = load_file(tmp_path / "mlx" / "adapters.safetensors")
    path = "model.layers.0.mlp.switch_mlp.up_proj"
    assert said_in(tmp_path / "mlx")["lora_parameters"]["keys"] == [path]
    A, B = tensors[f"{path}.lora_a"], tensors[f"{path}.lora_b"]
    assert (A.shape, B.shape) == ((3, 2, 10), (3, 6, 2))
    assert not A[1].any()
    back = lf.load(tmp_path / "mlx")
    assert [back[name].rank for name in names] == [2, 1]
    assert all(torch.equal(back[n].A, u.A) for n, u in zip(names, updates, strict=True))


def test_one_form_takes_the_place_of_the_other(tmp_path):
    a, folder = adapter_of(), tmp_path / "a"
    lf.save(a, folder)
    (folder / "notes.txt").write_text("mine")
    lf.save(a, folder, format="mlx", overwrite=True)
    files = {"adapters.safetensors", "adapter_config.json", "notes.txt"}
    assert {path.name for path in folder.iterdir()} == files
    lf.save(lf.load(folder), folder, overwrite=True)
    files = {"adapter_model.safetensors", "adapter_config.json", "notes.txt"}
    assert {path.name for path in folder.iterdir()} == files
    assert a.distance(lf.load(folder)) == 0


@pytest.mark.parametrize(
    ("ranks", "says"),
    [
        ("{", "not valid JSON"),
        (f'{{"{Q}": "2"}}', "whole numbers"),
        (f'{{"{DOWN}": 2}}', "its rank is not the 2"),
    ],
)
def test_a_header_that_is_wrong_about_the_padding(tmp_path, ranks, says):
    lf.save(adapter_of(), tmp_path / "a", format="mlx")
    file = tmp_path / "a" / "adapters.safetensors"
    save_file(load_file(file), file, metadata={"lorafold_ranks": ranks})
    with pytest.raises((FileError, MismatchError), match=says):
        lf.load(tmp_path / "a")
