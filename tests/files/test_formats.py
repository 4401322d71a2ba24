"""What is not in PEFT's form is an error that names it; α is taken from wherever a file says it."""

import json
import re

import pytest
import torch
from safetensors.torch import save_file

import lorafold as lf
from lorafold.adapter import idle
from lorafold.cli import main
from lorafold.errors import FileError, MismatchError
from lorafold.merge.verify import verify_merge

A, B = torch.randn(2, 8), torch.randn(6, 2)
Q = {"m.q.lora_A.weight": A, "m.q.lora_B.weight": B}
CONFIG = {"peft_type": "LORA", "r": 2, "lora_alpha": 6, "target_modules": ["q"]}


def pair(down, up):
    return {down: A.clone(), up: B.clone()}


FOREIGN = {
    "OFT": (pair("lora_unet_q.oft_blocks", "lora_unet_q.alpha"), "LyCORIS"),
    "GLoRA": (pair("lora_unet_q.a1.weight", "lora_unet_q.b1.weight"), "LyCORIS"),
    "cloneofsimo": (pair("unet:0:down", "unet:0:up"), "cloneofsimo"),
    "nameless": (pair("w_a_000", "w_b_000"), "cloneofsimo"),
    "torchtune": (pair("layers.0.q.lora_a.weight", "layers.0.q.lora_b.weight"), "torchtune"),
    "NeMo": (
        pair("q.adapter.linear_in.weight", "q.adapter.linear_out.weight"),
        "NeMo or Megatron",
    ),
    "AdapterHub": (pair("q.loras.sql.lora_A", "q.loras.sql.lora_B"), "AdapterHub"),
    "AdaLoRA": ({**Q, "m.q.lora_E": A.clone()}, "another method than LoRA"),
    "prompts": ({"prompt_embeddings": A}, "another method than LoRA"),
    "a model": ({"model.embed_tokens.weight": A, "model.norm.weight": B}, "none of its 2 tensors"),
    "beside PEFT's": ({**Q, "m.v.lora_down.weight": A.clone()}, "kohya-ss"),
}


@pytest.mark.parametrize("name", FOREIGN)
def test_a_format_that_is_not_read_is_named(name, tmp_path):
    tensors, says = FOREIGN[name]
    file = tmp_path / "x.safetensors"
    save_file(tensors, file)
    for alpha in (None, 8):
        with pytest.raises(FileError, match=rf"x\.safetensors: .*{re.escape(says)}"):
            lf.load(file, alpha=alpha)
    with pytest.raises(FileError, match=rf"state dict: .*{re.escape(says)}"):
        lf.load(tensors, alpha=8)
    torch.save(tensors, tmp_path / "adapter_model.bin")
    with pytest.raises(FileError, match=re.escape(says)):
        lf.load(tmp_path / "adapter_model.bin", alpha=8, allow_pickle=True)
    (tmp_path / "adapter_config.json").write_text(json.dumps(CONFIG))
    with pytest.raises(FileError, match=re.escape(says)):
        lf.load(file)


@pytest.mark.parametrize("verb", ["info", "resize", "diff", "fold"])
def test_no_command_takes_one_for_an_empty_adapter(verb, tmp_path, capsys):
    tensors, _ = FOREIGN["torchtune"]
    file, out = str(tmp_path / "x.safetensors"), str(tmp_path / "out")
    save_file(tensors, file)
    more = {"resize": [out, "--rank", "1"], "diff": [file], "fold": ["-o", out]}
    with pytest.raises(SystemExit) as ended:
        main([verb, file, "--alpha", "4", *more.get(verb, [])])
    assert ended.value.code == 2
    said = capsys.readouterr()
    assert "torchtune" in said.err
    assert not (tmp_path / "out").exists()


FOLDERS = {
    "a model": (["config.json", "model-00001-of-00002.safetensors"], "a whole model: .*extract"),
    "a model in pickles": (["pytorch_model.bin"], "a whole model: .*extract"),
    "a pipeline": (["model_index.json", "unet/config.json"], "a whole model: .*extract"),
    "an older MLX": (["adapters.npz", "notes.txt"], "older mlx-lm, .*mx.save_safetensors"),
    "ZeRO": (["zero_pp_rank_0_mp_rank_00_optim_states.pt"], "DeepSpeed, sharded: .*gathered"),
    "a run of ZeRO": (["global_step9/x", "zero_to_fp32.py", "latest"], "DeepSpeed, sharded"),
    "Megatron": (["common.pt", "metadata.json", "__0_0.distcp"], "Megatron's: .*target='hf-peft'"),
    "a run of Megatron": (["iter_0000100/x", "latest_checkpointed_iteration.txt"], "Megatron's"),
    "torch": ([".metadata", "__0_0.distcp"], "distributed checkpoint of torch's: .*PEFT directory"),
    "torchtune": (["adapter_0.pt", "config.json"], "of torchtune: .*adapter_model.safetensors"),
    "torchtune's epoch": (["adapter_model.pt"], "of torchtune: .*in PEFT's form"),
}


@pytest.mark.parametrize("kind", FOLDERS)
def test_a_folder_of_something_else_says_what_it_is(kind, tmp_path, capsys):
    files, says = FOLDERS[kind]
    folder = tmp_path / "folder"
    for name in files:
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        if name.endswith(".safetensors"):
            save_file({"model.embed_tokens.weight": A}, folder / name)
        else:
            (folder / name).write_bytes(b"{}")
    with pytest.raises(FileError, match=rf"folder is .*{says}"):
        lf.load(folder)
    with pytest.raises(SystemExit):
        main(["info", str(folder)])
    assert re.search(says, capsys.readouterr().err)
    (name, *_) = files
    if name.endswith((".pt", ".npz", ".distcp")):
        with pytest.raises(FileError, match=rf"{name} is .*{says}"):
            lf.load(folder / name)


def test_what_mlx_makes_of_an_older_file_is_read(tmp_path):
    """The remedy that is told, as it is told."""
    mx = pytest.importorskip("mlx.core")
    pair = {"m.q.lora_a": torch.randn(8, 2).numpy(), "m.q.lora_b": torch.randn(2, 6).numpy()}
    mx.savez(str(tmp_path / "adapters.npz"), **{k: mx.array(v) for k, v in pair.items()})
    parameters = {"rank": 2, "scale": 4.0, "dropout": 0.0}
    config = {"lora_layers": 1, "lora_parameters": parameters}
    (tmp_path / "adapter_config.json").write_text(json.dumps(config))
    with pytest.raises(FileError, match=r"adapters\.npz is not read") as told:
        lf.load(tmp_path)
    (line,) = re.findall("`(mx.*?)`", str(told.value))
    line = line.replace("'adapters", f"'{tmp_path}/adapters")
    exec(line, {"mx": mx})
    found = lf.load(tmp_path)["m.q"]
    delta = 4.0 * (pair["m.q.lora_a"] @ pair["m.q.lora_b"]).T
    assert torch.allclose(found.dense(), torch.from_numpy(delta), atol=1e-5)


def test_a_folder_with_a_config_for_two(tmp_path):
    written(tmp_path / "a", config=CONFIG)
    save_file(Q, tmp_path / "a" / "pytorch_lora_weights.safetensors")
    with pytest.raises(FileError, match=r"adapter_model\.safetensors of PEFT and pytorch_lora_w"):
        lf.load(tmp_path / "a")


def test_what_is_saved_whole_needs_no_pair(tmp_path):
    """PEFT writes adapters of heads and tokens alone: their config says what they are."""
    for name, tensors, more in (
        ("head", {"score.weight": A}, {"modules_to_save": ["score"]}),
        ("tokens", {"wte.trainable_tokens_delta": A}, {"trainable_token_indices": {"wte": [0, 1]}}),
    ):
        adapter = lf.load(tensors, config={**CONFIG, **more})
        assert not adapter.modules
        lf.save(adapter, tmp_path / name)
        assert lf.load(tmp_path / name).extras.keys() == tensors.keys()


def test_factors_without_weight_in_their_keys_are_read():
    """As loralib and LitGPT write them: the same factors."""
    plain = lf.load({"m.q.lora_A": A, "m.q.lora_B": B}, alpha=6)
    assert plain.digest == lf.load(Q, alpha=6).digest


# α, wherever it is said


def written(path, tensors=Q, metadata=None, config=None):
    path.mkdir()
    save_file(tensors, path / "adapter_model.safetensors", metadata=metadata)
    if config is not None:
        (path / "adapter_config.json").write_text(json.dumps(config))
    return path / "adapter_model.safetensors"


PARTS = {"m.r": 2, "m.lora_alpha": 3, "x.r": 4, "x.lora_alpha": 1}
NUMBERS = {
    "beside the factors": ({"m.q.alpha": torch.tensor(3.0)}, None),
    "in half precision": ({"m.q.alpha": torch.tensor([3], dtype=torch.bfloat16)}, None),
    "as an integer": ({"m.q.alpha": torch.tensor(3)}, None),
    "lora_alpha": ({}, {"lora_alpha": "3"}),
    "network_alpha": ({}, {"network_alpha": "3.0"}),
    "ss_network_alpha": ({}, {"ss_network_alpha": "3.0"}),
    "alpha": ({}, {"alpha": "3.0", "lora_alpha": "3"}),
    "a config": ({}, {"lora_adapter_metadata": json.dumps({**CONFIG, "lora_alpha": 3})}),
    "a part's config": (
        {},
        {
            "lora_adapter_metadata": json.dumps(
                {"m.r": 2, "m.lora_alpha": 3, "x.r": 4, "x.lora_alpha": 1}
            )
        },
    ),
    "a module's goes first": ({"m.q.alpha": torch.tensor(3.0)}, {"ss_network_alpha": "1"}),
}


@pytest.mark.parametrize("how", NUMBERS)
def test_alpha_is_what_the_file_says(how, tmp_path):
    more, metadata = NUMBERS[how]
    file = written(tmp_path / "a", {**Q, **more}, metadata)
    found = lf.load(file)
    assert found["m.q"].scale == 1.5
    assert not found.extras
    lf.save(found, tmp_path / "again")
    again = lf.load(tmp_path / "again")
    assert torch.allclose(again["m.q"].dense(), 1.5 * B @ A, atol=1e-6)
    if how != "a config":  # which goes without alpha= as a file does
        assert lf.load(file, alpha=3)["m.q"].scale == 1.5
        with pytest.raises(MismatchError, match=r"α is 3, and alpha= says 16: leave out alpha="):
            lf.load(file, alpha=16)
    half = lf.load(file).resize(rank=1)
    lf.save(half, tmp_path / "half")
    assert lf.load(tmp_path / "half").distance(half) < 1e-6 * half.norm()


@pytest.mark.parametrize("how", NUMBERS)
def test_alpha_that_contradicts_the_config_is_an_error(how, tmp_path):
    more, metadata = NUMBERS[how]
    file = written(tmp_path / "a", {**Q, **more}, metadata, CONFIG)
    with pytest.raises(MismatchError, match=r"adapter_model\.safetensors: .*(remove one of them)"):
        lf.load(file)
    same = written(tmp_path / "b", {**Q, **more}, metadata, {**CONFIG, "lora_alpha": 3})
    if how != "a module's goes first":
        assert lf.load(same)["m.q"].scale == 1.5


def test_each_module_has_its_own_alpha(tmp_path):
    more = {k.replace("m.q", "m.v"): t.clone() for k, t in Q.items()}
    numbers = {"m.q.alpha": torch.tensor(3.0), "m.v.alpha": torch.tensor(8.0)}
    scales = {p: u.scale for p, u in lf.load({**Q, **more, **numbers}).items()}
    assert scales == {"m.q": 1.5, "m.v": 4.0}
    files = []
    for name, alpha in (("one", 3.0), ("two", 5.0)):  # headers alike: nothing is shared
        files.append(written(tmp_path / name, {**Q, "m.q.alpha": torch.tensor(alpha)}))
    opened = [lf.files.open_adapter(f) for f in files]
    assert [f.scales["m.q"] for f in opened] == [1.5, 2.5]
    with pytest.raises(FileError, match=r"scale of 'm\.v' is unknown; give alpha="):
        lf.load({**Q, **more, "m.q.alpha": torch.tensor(3.0)})


def test_an_alpha_that_is_none_is_named(tmp_path):
    for name, metadata, says in (
        ("a", {"lora_alpha": "much"}, "must be α, found 'much'"),
        ("b", {"lora_alpha": "1", "alpha": "2"}, "'lora_alpha' in the header says that α is 1"),
        ("c", {"lora_adapter_metadata": "{"}, "not valid JSON"),
        ("d", {"lora_adapter_metadata": "{}"}, "'r' must be a number"),
        ("e", {"lora_adapter_metadata": '{"m.r": 3, "m.lora_alpha": 3}'}, "rank 2, but .* says 3"),
    ):
        with pytest.raises((FileError, MismatchError), match=rf"adapter_model.*{says}"):
            lf.load(written(tmp_path / name, Q, metadata))


# Heads of tasks, and the base's own weights


class Classifier(torch.nn.Module):
    def __init__(self, head="score"):
        super().__init__()
        self.m = torch.nn.ModuleDict({"q": torch.nn.Linear(8, 6)})
        self.norm = torch.nn.LayerNorm(6)
        self.add_module(head, torch.nn.Linear(6, 3, bias=False))

    def forward(self, x):
        return list(self.children())[-1](self.norm(self.m["q"](x)))


@pytest.mark.parametrize(
    ("task", "head"),
    [("SEQ_CLS", "score"), ("TOKEN_CLS", "classifier"), ("QUESTION_ANS", "qa_outputs")],
)
def test_a_task_has_its_head_saved(task, head):
    """PEFT adds it to modules_to_save itself, whether or not the config names it."""
    torch.manual_seed(0)
    model = Classifier(head)
    tensors = {**Q, f"{head}.weight": torch.randn(3, 6)}
    adapter = lf.load(tensors, config={**CONFIG, "task_type": task})
    x = torch.randn(2, 8)
    with lf.attach(model, adapter).use("default"):
        y = model(x)
    h = model.norm(model.m["q"](x) + adapter["m.q"](x))
    assert torch.allclose(y, h @ tensors[f"{head}.weight"].T, atol=1e-5)
    with pytest.raises(lf.RefusedError, match=head):
        lf.attach(Classifier(head), lf.load(tensors, config=CONFIG))


def test_the_models_own_weights_do_no_harm(tmp_path):
    """A whole state dict of a PEFT model: what is equal to the base is no change of it."""
    torch.manual_seed(0)
    model = Classifier()
    state = {f"base_model.model.{k}": t.clone() for k, t in model.state_dict().items()}
    state["base_model.model.m.q.base_layer.weight"] = state.pop("base_model.model.m.q.weight")
    state["base_model.model.m.q.base_layer.bias"] = state.pop("base_model.model.m.q.bias")
    adapter = lf.load({**Q, **state}, config=CONFIG)
    x, plain = torch.randn(2, 8), lf.load(Q, config=CONFIG)
    with lf.attach(model, plain).use("default") as live:
        expected = model(x)
    live.detach()
    with lf.attach(model, adapter).use("default") as live:
        assert torch.equal(model(x), expected)
    live.detach()
    library = lf.fold({"a": adapter}, tolerance=0)
    with lf.attach(model, library).use("a") as live:
        assert torch.allclose(model(x), expected, atol=1e-6)
    live.detach()
    applied, plainly = (a.apply_to(model.state_dict()) for a in (adapter, plain))
    assert all(torch.equal(t, plainly[k]) for k, t in applied.items())
    other = dict(adapter.extras)
    other["base_model.model.norm.weight"] = other["base_model.model.norm.weight"] + 1
    changed = lf.load({**Q, **other}, config=CONFIG)
    with pytest.raises(lf.RefusedError, match=r"norm\.weight"):
        lf.attach(model, changed)
    library = lf.fold({"a": changed}, tolerance=0)
    live = lf.attach(model, library)
    with pytest.raises(lf.RefusedError, match=r"norm\.weight"), live.use("a"):
        pass


# What does nothing, and what means nothing


@pytest.mark.parametrize(("alpha", "b", "why"), [(0, 1, "α is 0"), (6, 0, "B = 0")])
def test_an_adapter_that_does_nothing_is_called_so(alpha, b, why, tmp_path, capsys):
    model = Classifier()
    folder = tmp_path / "a"
    written(
        folder,
        {"m.q.lora_A.weight": A, "m.q.lora_B.weight": b * B},
        None,
        {**CONFIG, "lora_alpha": alpha},
    )
    (tmp_path / "base").mkdir()
    save_file(model.state_dict(), tmp_path / "base" / "model.safetensors")
    for command in (["info"], ["check", "--base", str(tmp_path / "base")]):
        with pytest.raises(SystemExit):
            main([command[0], str(folder), *command[1:]])
        assert f"it does nothing: {why}" in capsys.readouterr().out.replace(
            "every update is zero (", ""
        )
    with pytest.warns(UserWarning, match=rf"'default' does nothing: .*{why}"):
        lf.attach(model, folder).detach()
    assert idle(lf.load(Q, alpha=1)) is None
    head = {"m.q.lora_A.weight": A, "m.q.lora_B.weight": 0 * B, "score.weight": torch.ones(3, 6)}
    assert idle(lf.load(head, config={**CONFIG, "modules_to_save": ["score"]})) is None


def test_patterns_that_mean_no_module_are_told():
    config = {**CONFIG, "alpha_pattern": {"m.q": 3, "q_proj": 4}, "rank_pattern": {"v": 3}}
    with pytest.warns(UserWarning, match="no module of the file") as told:
        assert lf.load(Q, config=config)["m.q"].scale == 1.5
    assert [str(w.message).partition(": ")[2] for w in told] == [
        "rank_pattern has 'v', by which no module of the file is meant",
        "alpha_pattern has 'q_proj', by which no module of the file is meant",
    ]


def test_factors_that_changed_are_not_as_they_began(tmp_path):
    """Readers refuse what says that it is: vLLM a "pissa", others what they don't know."""
    adapter = lf.load(Q, config={**CONFIG, "init_lora_weights": "gaussian"})
    for name, changed in (("nested", adapter.nested()), ("sum", adapter + adapter)):
        lf.save(changed, tmp_path / name)
        said = json.loads((tmp_path / name / "adapter_config.json").read_text())
        assert said["init_lora_weights"] is True
    lf.save(adapter, tmp_path / "same")
    said = json.loads((tmp_path / "same" / "adapter_config.json").read_text())
    assert said["init_lora_weights"] == "gaussian"


def test_a_merge_that_keeps_nothing_says_so():
    adapter = lf.load(Q, alpha=6)
    with pytest.warns(UserWarning, match="updates are all zero: .*a higher density"):
        merged = lf.merge({"a": adapter, "b": adapter}, "magnitude", density=1e-9)
    assert merged.norm() == 0


def test_a_base_is_a_path():
    adapter = lf.load(Q, alpha=6)
    with pytest.raises(FileError, match="a base is given as a path, not as NoneType"):
        verify_merge(None, adapter, "merged")
    with pytest.raises(FileError, match="a base is given as a path, not as int"):
        lf.extract(3, "merged", rank=1)


def test_one_base_under_two_spellings(tmp_path, capsys):
    for name, base in (("a", "org/base"), ("b", "base")):
        written(tmp_path / name, Q, None, {**CONFIG, "base_model_name_or_path": base})
    sources = [tmp_path / "a", tmp_path / "b"]
    with pytest.raises(MismatchError, match="base_model="):
        lf.fold(sources)
    lib = lf.fold(sources, base_model="org/base", tolerance=0)
    assert lib.base_model == lib["b"].base_model == "org/base"
    one = lf.fold(sources[0], tmp_path / "lib")
    with pytest.raises(MismatchError, match="if these are one, give base_model='org/base'"):
        one.add(sources[1])
    one.add(sources[1], base_model="org/base")
    again = lf.load(sources[1], base_model="org/base")
    assert again.distance(lf.load(sources[0])) < 1e-4
    with pytest.raises(SystemExit) as ended:
        main(["add", str(tmp_path / "lib"), str(sources[1]), "--name", "c"])
    assert ended.value.code == 2
    assert "if these are one, give --base-model 'org/base'" in capsys.readouterr().err
    for command in (
        ["add", str(tmp_path / "lib"), str(sources[1]), "--name", "c"],
        ["fold", *map(str, sources), "-o", str(tmp_path / "lib2")],
    ):
        with pytest.raises(SystemExit) as ended:
            main([*command, "--base-model", "org/base"])
        assert not ended.value.code


def test_two_saves_are_the_same_bytes(make_adapter, tmp_path):
    """Whatever the header says beside: the library writes that in an order of chance."""
    a = make_adapter({"q": (6, 8)}, 2, config={"note": 'é\n\u2028\x7f\x01"\\'})
    merged = lf.merge({"a": a, "b": 2 * a})
    found = set()
    for k in range(8):
        lf.save(merged, tmp_path / f"{k}")
        found.add((tmp_path / f"{k}" / "adapter_model.safetensors").read_bytes())
    (raw,) = found
    assert list(json.loads(raw[8 : 8 + int.from_bytes(raw[:8], "little")])["__metadata__"]) == [
        "format",
        "lorafold_merge",
    ]
    assert lf.load(tmp_path / "0").digest == merged.digest
