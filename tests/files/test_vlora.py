"""vLoRA folders, against vLoRA's own reader."""

import json
import math

import pytest
import torch
from safetensors.torch import load_file, save_file

import lorafold as lf
from lorafold.cli import main
from lorafold.errors import FileError, MismatchError, UnknownNameError
from lorafold.files import load_many

vlora = pytest.importorskip("vlora")

SHAPES = {"m.0.q_proj": (12, 8), "m.0.v_proj": (6, 8), "m.1.q_proj": (12, 8)}


@pytest.fixture(params=["float", "nf4", "nf4 in blocks of 48", "adaptive"])
def subspace(request, tmp_path):
    torch.manual_seed(0)
    adapters = []
    for _ in range(5):
        a = {name: torch.randn(3, inn) for name, (_, inn) in SHAPES.items()}
        b = {name: torch.randn(out, 3) for name, (out, _) in SHAPES.items()}
        adapters.append(vlora.LoRAWeights(list(SHAPES), a, b, 3))
    names = ["sql", "poems", "a b", "ünï", "x.y"]
    kwargs = {"num_components": 3}
    if request.param == "adaptive":
        kwargs = {"adaptive_k": True, "variance_threshold": 0.7}
    space = vlora.SharedSubspace.from_adapters(adapters, task_ids=names, **kwargs)
    if request.param.startswith("nf4"):
        space.save_quantized(tmp_path, block_size=48 if "48" in request.param else 64)
    else:
        space.save(tmp_path)
    return tmp_path


@pytest.mark.form("vlora", "read", by="vlora-dev")
def test_tasks_come_back_as_vlora_rebuilds_them(subspace):
    theirs = vlora.SharedSubspace.load(subspace)
    ours = load_many(subspace, alpha=6)
    assert set(ours) == set(theirs.tasks) == {"sql", "poems", "a b", "ünï", "x.y"}
    assert len(ours) == 5
    for name, adapter in ours.items():
        expected = theirs.reconstruct(name)
        assert set(adapter) == set(SHAPES)
        for layer, u in adapter.items():
            assert u.scale == 2.0
            product = expected.lora_b[layer].double() @ expected.lora_a[layer].double()
            torch.testing.assert_close(u.dense().double(), 2 * product, atol=1e-5, rtol=1e-5)
    assert ours["sql"].distance(ours["poems"]) > 0.1 * ours["sql"].norm()
    half = load_many(subspace, alpha=6, dtype=torch.float16)["sql"]
    assert half["m.0.q_proj"].A.dtype == torch.float16


def test_they_can_be_saved_for_peft(subspace, tmp_path):
    adapter = load_many(subspace, alpha=6)["sql"]
    lf.save(adapter, tmp_path / "sql", base_model="org/base")
    assert lf.load(tmp_path / "sql").distance(adapter) <= 1e-6 * adapter.norm()


def test_what_is_missing_is_named(subspace):
    with pytest.raises(FileError, match="give alpha="):
        load_many(subspace)
    with pytest.raises(FileError, match="name one of its adapters"):
        lf.load(subspace, alpha=6)
    with pytest.raises(UnknownNameError, match="did you mean 'sql'"):
        load_many(subspace, alpha=6)["sqll"]


def ran(capsys, *words):
    """Status and what was printed of a command."""
    with pytest.raises(SystemExit) as ended:
        main(list(map(str, words)))
    said = capsys.readouterr()
    return ended.value.code, said.out + said.err


def test_a_folder_is_a_source_everywhere(subspace, tmp_path, capsys):
    expected = load_many(subspace, alpha=6)
    lib = lf.fold(subspace, alpha=6, tolerance=0)
    assert lib.names == list(expected)
    assert lib["sql"].digest == expected["sql"].digest
    alone = lf.fold(f"{subspace}:x.y", alpha=6, tolerance=0)
    assert alone.names == ["x.y"]
    with pytest.raises(FileError, match="give alpha="):
        lf.fold(subspace)
    code, said = ran(capsys, "diff", f"{subspace}:sql", f"{subspace}:poems", "--alpha", 6, "--json")
    assert code == 0
    assert json.loads(said)["norm_a"] == pytest.approx(expected["sql"].norm())
    assert "give --alpha" in ran(capsys, "diff", f"{subspace}:sql", f"{subspace}:poems")[1]
    assert "did you mean 'sql'" in ran(capsys, "info", f"{subspace}:sqll", "--alpha", 6)[1]
    for command in ("info", "ls"):
        code, said = ran(capsys, command, subspace, "--json")
        facts = json.loads(said)
        assert [t["name"] for t in facts["tasks"]] == list(expected)
        assert (code, facts["modules"], facts["rank"]) == (0, 3, 3)


def test_verify_finds_what_is_wrong(subspace, capsys):
    assert ran(capsys, "verify", subspace)[0] == 0
    for file in (*subspace.glob("subspace*.safetensors"), subspace / "task_sql.safetensors"):
        good = load_file(file)
        used = [k for k in good if any(w in k for w in ("components_", "scales_", "loadings_"))]
        if not used:
            continue
        key = used[0]
        damaged = good[key].clone().fill_(math.nan)
        save_file({**good, key: damaged}, file)
        code, said = ran(capsys, "verify", subspace)
        assert (code, "holds NaN" in said) == (1, True)
        if "components" in key:
            save_file({**good, key: 2 * good[key]}, file)
            code, said = ran(capsys, "verify", subspace)
            assert (code, "not orthonormal, off by 3" in said) == (1, True)
        save_file({**good, key: good[key][..., :-1].contiguous()}, file)
        assert ran(capsys, "verify", subspace)[0] == 1
        save_file(good, file)
    assert ran(capsys, "verify", subspace)[0] == 0


def rewritten_meta(folder, **changes):
    meta = json.loads((folder / "subspace_meta.json").read_text())
    meta.update(changes)
    (folder / "subspace_meta.json").write_text(json.dumps(meta))


def test_two_tasks_in_one_file_are_not_confused(subspace):
    # vLoRA writes "a/b" and "a_b" to one file, so that the first is lost.
    files = {"a/b": "sql", "a_b": "sql", "poems": "poems"}
    rewritten_meta(subspace, task_ids=list(files), task_filenames=files)
    many = load_many(subspace, alpha=6)
    with pytest.raises(FileError, match="'a/b' and 'a_b' were written to one file"):
        many["a_b"]
    assert set(many["poems"]) == set(SHAPES)


@pytest.mark.parametrize("name", ["../sql", "x/../../sql", "/etc/passwd"])
def test_a_task_name_does_not_lead_out_of_the_folder(subspace, name):
    rewritten_meta(subspace, task_filenames={"sql": name})
    with pytest.raises(FileError, match="is no file name"):
        load_many(subspace, alpha=6)


def test_damage_is_named(subspace):
    meta = (subspace / "subspace_meta.json").read_text()
    for text, match in (("{", "not valid JSON"), ("[]", "object"), ("{}", "'layer_names'")):
        (subspace / "subspace_meta.json").write_text(text)
        with pytest.raises(FileError, match=rf"subspace_meta\.json.*{match}"):
            load_many(subspace, alpha=6)
    (subspace / "subspace_meta.json").write_text(meta)
    task = subspace / "task_sql.safetensors"
    good = load_file(task)
    changes = {
        "is missing": {k: v for k, v in good.items() if not k.endswith("v_proj.loadings_b")},
        "another size|do not fit": {**good, "m.0.q_proj.loadings_a": torch.ones(99)},
        "module 'm.0.v_proj': A holds NaN": {
            **good,
            "m.0.v_proj.loadings_a": good["m.0.v_proj.loadings_a"] * math.nan,
        },
    }
    for match, tensors in changes.items():
        save_file(tensors, task)
        with pytest.raises((FileError, MismatchError), match=match):
            load_many(subspace, alpha=6)["sql"]
    task.unlink()
    with pytest.raises(FileError, match=r"task_sql\.safetensors"):
        load_many(subspace, alpha=6)["sql"]


@pytest.mark.parametrize("what", ["scales", "packed", "signed"])
def test_packed_components_are_a_row_of_bytes_and_a_scale_each(what, tmp_path):
    torch.manual_seed(0)
    adapters = [
        vlora.LoRAWeights(["q"], {"q": torch.randn(2, 12)}, {"q": torch.randn(8, 2)}, 2)
        for _ in range(3)
    ]
    space = vlora.SharedSubspace.from_adapters(adapters, task_ids=list("abc"), num_components=2)
    space.save_quantized(tmp_path, block_size=8)
    before = load_many(tmp_path, alpha=6)["a"]
    path = tmp_path / "subspace_nf4.safetensors"
    tensors = load_file(path)
    key = next(k for k in tensors if (".scales_" if what == "scales" else ".packed_") in k)
    tensors[key] = tensors[key].view(torch.int8) if what == "signed" else tensors[key][:, None]
    save_file({k: t.contiguous() for k, t in tensors.items()}, path)
    if what == "signed":  # whose digits would be counted from the other end
        with pytest.raises(MismatchError, match=r"'q' are torch\.int8"):
            load_many(tmp_path, alpha=6)["a"]
    else:
        assert load_many(tmp_path, alpha=6)["a"].digest == before.digest


def test_a_task_of_a_name_that_no_file_can_have(subspace):
    path = subspace / "subspace_meta.json"
    meta = json.loads(path.read_text())
    meta["task_ids"].append("x" * 5_000)
    path.write_text(json.dumps(meta))
    assert len(load_many(subspace, alpha=6)) == 6
    with pytest.raises(FileError, match="too long"):
        load_many(subspace, alpha=6)["x" * 5_000]
    with pytest.raises(SystemExit) as ended:
        main(["info", str(subspace)])
    assert ended.value.code == 0
