"""MLX's folders: what they hold is the update that MLX would apply, by its formula."""

import json
import shutil

import pytest
import torch
from safetensors.torch import load_file, save_file

import lorafold as lf
from lorafold.cli import main
from lorafold.errors import FileError, MismatchError
from lorafold.files import open_adapter

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
WRONG = {
    "no scale": ({}, {"parameters": {"scale": None, "alpha": 16}}, "'scale' in the config"),
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
