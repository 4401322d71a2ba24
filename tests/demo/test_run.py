"""The demo's numbers, on three adapters, against the same worked out another way."""

import json
import math
import shutil

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file

import lorafold as lf
from lorafold.demo import run
from lorafold.demo.model import data_dir, heldout_loss, load_base

NAMES = ("add", "brackets", "roman")  # ranks 16, 4 and 8; two of them on some modules only


@pytest.fixture(scope="module")
def sources(tmp_path_factory):
    folder = tmp_path_factory.mktemp("sources")
    for name in NAMES:
        shutil.copytree(data_dir() / "adapters" / name, folder / name)
    return folder


@pytest.fixture(scope="module")
def made(sources, tmp_path_factory):
    """The report, and the folder that it is about."""
    folder = tmp_path_factory.mktemp("demo") / "out"
    report = run.run_demo(folder, adapters=sources, tolerances=(0.1,), retention=None, pieces=0)
    return report, folder


def dense(folder):
    """{weight's name: ΔW} from the file, float64."""
    config = json.loads((folder / "adapter_config.json").read_text())
    tensors = load_file(folder / "adapter_model.safetensors")
    found = {}
    for key, A in tensors.items():
        if ".lora_A." not in key:
            continue
        path = key.removeprefix("base_model.model.").replace(".lora_A.weight", "")
        B = tensors[key.replace("lora_A", "lora_B")]
        r = config.get("rank_pattern", {}).get(f"^{path}".replace(".", r"\."), config["r"])
        alpha = config.get("alpha_pattern", {}).get(f"^{path}".replace(".", r"\."), r)
        alpha = config["lora_alpha"] if r == config["r"] else alpha
        scale = alpha / (math.sqrt(r) if config.get("use_rslora") else r)
        found[f"{path}.weight"] = scale * B.double() @ A.double()
    return found


def loss_with(updates, name):
    """On the second half of the text: cut at the first line that ends behind its middle."""
    text = (data_dir() / "heldout" / f"{name}.txt").read_bytes()
    lines, at = text.splitlines(keepends=True), 0
    for line in lines:
        at += len(line)
        if at > len(text) // 2:
            break
    config, state = load_base()
    changed = {k: w + updates[k].float() if k in updates else w for k, w in state.items()}
    return heldout_loss(config, changed, text[at:])


def folded_row(report):
    return next(row for row in report["rows"] if row["library"] == "lib")


def test_losses_and_retention_are_those_of_the_model(made, sources):
    report, folder = made
    row = folded_row(report)
    for name in NAMES:
        base, full = loss_with({}, name), loss_with(dense(sources / name), name)
        assert report["base_loss"][name] == pytest.approx(base, abs=1e-5)
        assert report["adapter_loss"][name] == pytest.approx(full, abs=1e-4)
        back = loss_with(dense(folder / "unfolded" / name), name)
        assert row["retention"][name] == pytest.approx((base - back) / (base - full), abs=1e-3)
    kept = row["retention"].values()
    assert row["retention_mean"] == pytest.approx(sum(kept) / 3)
    assert row["retention_min"] == min(kept)
    assert row["retention"][row["worst_task"]] == min(kept)
    lifts = [1 - report["adapter_loss"][n] / report["base_loss"][n] for n in NAMES]
    assert report["lift"] == pytest.approx({"mean": sum(lifts) / 3, "least": min(lifts)})


def test_errors_are_of_what_was_unfolded(made, sources):
    report, folder = made
    errors = []
    for name in NAMES:
        there, back = dense(sources / name), dense(folder / "unfolded" / name)
        lost = sum(float((there[k] - back.get(k, 0)).square().sum()) for k in there)
        errors.append((lost / sum(float(w.square().sum()) for w in there.values())) ** 0.5)
    row = folded_row(report)
    assert row["error_max"] == pytest.approx(max(errors), rel=1e-3)
    assert row["error_mean"] == pytest.approx(sum(errors) / 3, rel=1e-3)
    assert row["error_max"] <= 0.1


def test_bytes_are_on_the_disk(made, sources):
    report, folder = made
    on_disk = sum(p.stat().st_size for p in (folder / "lib").iterdir())
    packaged = sum(p.stat().st_size for p in sources.rglob("*") if p.is_file())
    row = folded_row(report)
    assert row["bytes"] == on_disk
    assert report["files"]["packaged"] == packaged
    assert row["times_float16"] == packaged / on_disk
    wide = report["files"]["float32"]
    assert row["times_float32"] == wide / on_disk
    numbers = sum(t.numel() for n in NAMES for t in tensors(sources / n).values())
    assert report["parameters"] == numbers
    assert wide - packaged == pytest.approx(2 * numbers, rel=0.02)  # offsets have more digits


def tensors(folder):
    return load_file(folder / "adapter_model.safetensors")


def test_peers_have_the_bytes_and_the_error_that_they_say(made):
    report, _ = made
    row, same_error, same_bytes = report["rows"]
    assert (same_error["form"], same_bytes["form"]) == ("svd, same error", "svd, same bytes")
    assert 0.9 * row["bytes"] < same_bytes["bytes"] <= row["bytes"]
    assert same_error["error_max"] <= row["error_max"] * 1.001
    assert same_error["bytes"] > row["bytes"]
    assert same_bytes["error_min"] > row["error_max"]
    for peer in (same_error, same_bytes):
        assert peer["bits"] == 8 * peer["bytes"] / report["parameters"]


def optimal_bytes(updates, error):
    """The least bytes of a truncation: singular values of the dense matrices, best first."""
    steps = []
    for dW in updates.values():
        S = torch.linalg.svdvals(dW)
        steps += [(float(s) ** 2, sum(dW.shape)) for s in S if s > 1e-9]
    steps.sort(key=lambda step: -step[0] / step[1])
    energy = np.array([e for e, _ in steps])
    width = np.array([w for _, w in steps])
    left = energy.sum() - np.cumsum(energy)
    kept = 1 + int((left > error**2 * energy.sum()).sum())
    return 2 * int(width[:kept].sum())


@pytest.mark.parametrize("error", [0.05, 0.3, 0.7])
def test_truncation_is_the_best_there_is(error, sources):
    adapter = lf.load(sources / "roman")
    cut = run.truncated(run.svd_of(adapter), error=error)
    assert {t.dtype for u in cut.values() for t in (u.A, u.B)} == {torch.float16}
    assert 2 * cut.num_parameters == optimal_bytes(dense(sources / "roman"), error)
    assert 0.8 * error < adapter.distance(cut) / adapter.norm() <= error * 1.001
    # Given those bytes, it is that one again.
    again = run.truncated(run.svd_of(adapter), nbytes=2 * cut.num_parameters)
    assert {p: u.rank for p, u in again.items()} == {p: u.rank for p, u in cut.items()}


def test_no_number_is_from_a_table(made, sources, tmp_path):
    """With an adapter at half its strength, its numbers change and those of the others don't."""
    before, _ = made
    shutil.copytree(sources, tmp_path / "changed")
    path = tmp_path / "changed" / "roman" / "adapter_model.safetensors"
    halved = {k: t / 2 if "lora_B" in k else t for k, t in load_file(path).items()}
    save_file(halved, path, {"format": "pt"})
    options = {"tolerances": (0.1,), "retention": None, "pieces": 0}
    after = run.run_demo(tmp_path / "out", adapters=tmp_path / "changed", **options)
    full = {name: after["adapter_loss"][name] - before["adapter_loss"][name] for name in NAMES}
    assert full["roman"] > 0.01
    assert full["add"] == full["brackets"] == 0
    assert after["base_loss"] == before["base_loss"]
    assert folded_row(after)["retention"]["roman"] != folded_row(before)["retention"]["roman"]


def test_retention_is_chosen_on_one_half_and_reported_on_the_other(sources, tmp_path, monkeypatch):
    seen = {"score": [], "report": []}
    parts = {
        name: run.halves((data_dir() / "heldout" / f"{name}.txt").read_bytes()) for name in NAMES
    }

    def watched(config, state, data):
        part = [name for name in NAMES if data in parts[name]]
        assert len(part) == 1
        kind = "score" if data == parts[part[0]][0] else "report"
        seen[kind].append(part[0])
        return heldout_loss(config, state, data)

    monkeypatch.setattr(run, "heldout_loss", watched)
    only = tmp_path / "only"
    shutil.copytree(sources / "brackets", only / "brackets")
    calls = []
    report = run.run_demo(
        tmp_path / "out",
        adapters=only,
        tolerances=(),
        retention=0.9,
        pieces=0,
        progress=lambda done, total, what: calls.append((done, total, what)),
    )
    row = report["rows"][0]
    assert row["by"] == "retention 0.9"
    assert row["error_max"] > 0.1  # looser than the default, as so little is asked
    assert 3 <= len(seen["score"]) <= 8
    assert len(seen["report"]) == 2 + 3  # the base, the adapter, the library and its two peers
    assert all(0 <= done < total and what == "brackets" for done, total, what in calls)
    # The score's own half decided: there the share is kept.
    lib = lf.Library.open(tmp_path / "out" / "lib-retention-0.9")
    judge = run.Judge(["brackets"], lambda what: None)
    base, full = (judge.score("brackets", a) for a in (None, lf.load(only / "brackets")))
    kept = (judge.score("brackets", lib["brackets"]) - base) / (full - base)
    assert kept >= 0.9


def test_halves_meet_at_a_line():
    assert run.halves(b"ab\ncd\nef\n") == (b"ab\ncd\n", b"ef\n")
    assert run.halves(b"abcdef") == (b"abc", b"def")


def test_only_a_demos_folder_is_replaced(made, sources, tmp_path):
    report, folder = made
    assert json.loads((folder / "report.json").read_text()) == report
    options = {"adapters": sources, "tolerances": (0.1,), "retention": None, "pieces": 0}
    with pytest.raises(lf.FileError, match="exists already"):
        run.run_demo(folder, **options)
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "thesis.txt").write_text("years of work")
    with pytest.raises(lf.FileError, match="not what an earlier demo made: it holds 'thesis.txt'"):
        run.run_demo(tmp_path / "mine", overwrite=True, **options)
    assert (tmp_path / "mine" / "thesis.txt").exists()


def test_what_fails_halfway_leaves_nothing(sources, tmp_path, monkeypatch):
    monkeypatch.setattr(run, "truncated", lambda *a, **k: 1 / 0)
    threads = torch.get_num_threads()
    with pytest.raises(ZeroDivisionError):
        run.run_demo(tmp_path / "out", adapters=sources, tolerances=(0.1,), retention=0.9, pieces=0)
    assert list(tmp_path.iterdir()) == []
    assert torch.get_num_threads() == threads


def test_an_adapter_is_moved_to_another_base(sources, tmp_path):
    only = tmp_path / "only"
    shutil.copytree(sources / "brackets", only / "brackets")
    shutil.copytree(data_dir() / "adapters" / "number_words", only / "number_words")
    options = {"tolerances": (0.1,), "retention": None}
    report = run.run_demo(tmp_path / "out", adapters=only, pieces=2, **options)
    moved = report["moved"]
    assert (moved["adapter"], moved["texts"]) == ("number_words", 2)
    assert 0.1 < moved["distill"] < 1
    assert moved["svd"] < moved["distill"] / 2
    config, state = load_base("wide")
    text = run.halves((data_dir() / "heldout" / "number_words.txt").read_bytes())[1]
    padded = lf.transfer(only / "number_words", target=state, method="svd").adapter
    loss, base = (heldout_loss(config, s, text) for s in (padded.apply_to(state), state))
    assert moved["svd"] == pytest.approx(1 - loss / base, abs=1e-4)
    assert "bases/wide" in report["next"][-1]


def test_without_an_adapter_that_is_known_there_nothing_is_moved(made):
    report, _ = made
    assert report["moved"] is None
