"""`verify-merge`: exit status, table and JSON."""

from __future__ import annotations

from safetensors.torch import load_file, save_file

FILE = "model.safetensors"


def test_right_wrong_and_half(here, cli):
    assert cli("merge-into", "base", "adapters/sql", "-o", "merged").code == 0
    ran = cli("verify-merge", "base", "adapters/sql", "merged")
    assert (ran.code, ran.err) == (0, "")
    assert "6 parts of adapters/sql: 6 applied" in ran.out
    assert "2 other tensors: 0 differ" in ran.out
    assert cli("merge-into", "base", "adapters/sql", "-o", "twice", "-c", "2").code == 0
    ran = cli("verify-merge", "base", "adapters/sql", "twice")
    assert ran.code == 1
    assert "6 wrong strength" in ran.out
    assert ran.err == (
        "error: 6 of 6 parts are not as they should be, and 0 other tensors differ: "
        "it was merged twice, or it was scaled as with use_rslora, by √r too much\n"
    )
    found = cli("verify-merge", "base", "adapters/sql", "twice", "--json", "-v")
    assert found.code == 1
    assert found.json["ok"] is False
    assert {f["verdict"] for f in found.json["parts"].values()} == {"wrong strength"}
    # What a library with an error of a tenth gives back is not quite what was merged.
    assert "6 other change" in cli("verify-merge", "base", "lib:sql", "merged").out
    state = load_file("merged/" + FILE)
    state["model.norm.weight"] += 1
    save_file(state, "merged/" + FILE)
    ran = cli("verify-merge", "base", "adapters/sql", "merged", "--verbose")
    assert ran.code == 1
    assert "model.norm.weight: changed" in ran.out
    assert ran.out.count("applied") == 7


def test_what_is_refused(here, cli):
    ran = cli("verify-merge", "base", "adapters/sql", "nowhere")
    assert ran.code == 2
    assert "no such folder: 'nowhere'" in ran.err
