"""fold, ls, unfold, add, rm, verify, bench: what they print is what the library is."""

from __future__ import annotations

import json
import os
import shutil
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

import lorafold as lf
from lorafold.cli import _library
from lorafold.cli._writing import FORMS
from lorafold.collection.folders import folder_names
from lorafold.fold.options import FORMS as KNOWN_FORMS


def tree(folder):
    return {str(p): p.read_bytes() for p in Path(folder).rglob("*") if p.is_file()}


# fold


def test_fold_measures_and_says(here, cli):
    ran = cli("fold", "adapters", "-o", "out", "--tolerance", "0.05", "--json")
    assert ran.code == 0
    found = ran.json
    with lf.Library.open("out") as lib:
        assert found["bytes"] == lib.nbytes == sum(len(b) for b in tree("out").values())
        assert found["error"]["max"] == max(lib.error(n) for n in lib.names) <= 0.05
        assert set(lib.names) == {"sql", "poems", "law"}
    text = cli("fold", "adapters", "-o", "out", "--overwrite").out
    for word in ("on disk", "mean", "max", "forms", "plain SVD", "nothing in common"):
        assert word in text


def test_every_option_of_fold_is_a_flag():
    import inspect

    from lorafold.cli.fold import fold as fold_command
    from lorafold.fold.fold import fold

    flags = {p.name for p in fold_command.params}
    assert set(inspect.signature(fold).parameters) - {"progress"} <= flags
    assert set(FORMS) == set(KNOWN_FORMS)


@pytest.mark.parametrize(
    "options",
    [
        ["--tolerance", "0"],
        ["--form", "svd", "--rank", "2"],
        ["--energy", "0.9", "--bits", "16"],
        ["--bits", "2.5", "--memory", "64 MiB", "--device", "cpu"],
        ["--form", "exact"],
    ],
)
def test_fold_passes_its_options_on(options, here, cli):
    found = cli("fold", "adapters", "-o", "out", *options, "--json").json
    values = dict(zip(options[::2], options[1::2], strict=True))
    for name in ("tolerance", "rank", "energy", "bits"):
        if f"--{name}" in values:
            assert found["options"][name] == float(values[f"--{name}"])
    if options == ["--tolerance", "0"] or "exact" in options:
        assert set(found["forms"]) == {"exact"}
        assert "same start" not in cli("info", "out").out


def test_named_sources(here, cli):
    args = ["--name", "a/b=adapters/sql", "--name", "a=b=adapters/law"]
    assert cli("fold", "adapters/poems", *args[:2], "-o", "out").code == 0
    with lf.Library.open("out") as lib:
        assert lib.names == ["poems", "a/b"]
    ran = cli("fold", *args[2:], "-o", "other")
    assert ran.code == 2  # `b=adapters/law` is no path
    assert cli("verify", "out", "adapters/poems", *args[:2]).code == 0


def test_quoted_globs(here, cli):
    assert cli("fold", "adapters/*", "-o", "out").code == 0
    assert "no adapter matches" in cli("fold", "nope/*", "-o", "other").err


def test_a_score_from_the_working_directory(here, cli):
    (here / "my_scores.py").write_text(
        "def norm(name, adapter):\n    return 0.0 if adapter is None else adapter.norm()\n"
    )
    score = ["--retention", "0.99", "--score", "my_scores:norm"]
    ran = cli("fold", "adapters", "-o", "out", *score, "--json")
    assert ran.code == 0, ran.err
    assert ran.json["options"]["score"] == "my_scores:norm"
    for name in ("sql", "law"):
        with lf.Library.open("out") as lib:
            assert lib[name].norm() >= 0.99 * lf.load(here / "adapters" / name).norm()


def test_init_groups_in_words():
    groups = {"in": [["a", "b", "c"], ["d", "e"]], "out": [["a", "b"]]}
    assert _library.group_words({"adapters": 24, "init_groups": groups}) == [
        "5 of 24 adapters start from the same A as others, in 2 groups of 2–3",
        "2 of 24 adapters have nearly the same B",
    ]


def test_a_shared_start_is_said_and_no_lack_of_it(here, make_update, cli):
    for n in range(4):
        u = make_update(24, 16, 4, seed=1)
        B = make_update(24, 16, 4, seed=10 + n).B
        lf.save(lf.Adapter({"q": lf.LowRank(u.A, B)}), here / "kin" / str(n))
    ran = cli("fold", "kin", "-o", "out")
    assert "4 of 4 adapters start from the same A" in ran.out


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({}, True),
        ({"forms": {"svd": 1, "exact": 1}}, True),
        ({"forms": {"svd": 1, "input": 1}}, False),
        ({"forms": {"exact": 1}}, False),
        ({"options": {"form": "svd", "tolerance": 0.1}}, False),
        ({"options": {"form": "auto", "rank": 4}}, False),
        ({"adapters": 1}, False),
    ],
)
def test_when_nothing_is_shared_it_is_said(change, said):
    stats = {"adapters": 3, "forms": {"svd": 2}, "options": {"form": "auto", "tolerance": 0.1}}
    assert (_library.sharing_remark({**stats, **change}) is not None) == said


def test_a_vlora_folder_comes_over(here, make_adapter, cli):
    vlora = pytest.importorskip("vlora")
    weights = []
    for n in range(3):
        u = make_adapter({"q": (24, 16)}, 4, seed=n)["q"]
        pair = {"layer_names": ["q"], "lora_a": {"q": u.A}, "lora_b": {"q": u.B}, "rank": 4}
        weights.append(vlora.LoRAWeights(**pair))
    space = vlora.SharedSubspace.from_adapters(weights, num_components=2)
    space.save(str(here / "subspace"))
    assert cli("info", "subspace").code == 0
    assert "give --alpha" in cli("fold", "subspace", "-o", "out").err
    ran = cli("fold", "subspace", "-o", "out", "--alpha", "8")
    assert ran.code == 0, ran.err
    with lf.Library.open("out") as lib:
        assert len(lib) == 3


# ls


def test_ls(world, cli):
    rows = {row["name"]: row for row in cli("ls", world / "lib", "--json").json["adapters"]}
    with lf.Library.open(world / "lib") as lib:
        assert list(rows) == lib.names
        for name, row in rows.items():
            assert row["bytes"] == lib.entry(name)["bytes"] > 0
            assert row["error"] == lib.error(name)
            assert row["ranks"] == [lf.load(world / "adapters" / name).rank]
            folder = world / "adapters" / name
            assert row["file_bytes"] == sum(p.stat().st_size for p in folder.iterdir())
    assert rows["law"]["digest"][:8] in cli("ls", world / "lib").out


def test_ls_after_changes(here, cli):
    assert cli("add", "lib", "adapters/sql", "--name", "x" * 300).code == 0
    assert cli("rm", "lib", "poems").code == 0
    ran = cli("ls", "lib", columns=2000)
    assert [line.split()[0] for line in ran.out.splitlines()[2:]] == ["law", "sql", "x" * 300]
    assert cli("ls", "lib", columns=80).out.count("x") == 300  # folded, not cut


# unfold


def test_folders_are_made_from_names():
    names = ["sql", "a_b", "a/b", "..", "🙂", "x" * 300, "names.json", "SQL", "", "-x", "c."]
    folders = folder_names(names)
    assert list(folders) == names
    assert folders["sql"] == "sql"
    assert folders["a_b"] == "a_b"
    assert len({f.lower() for f in folders.values()} | {"names.json"}) == len(names) + 1
    for folder in folders.values():
        assert Path(folder).name == folder
        assert folder[0] not in ".-"
        assert len(folder.encode()) <= 100
    assert folder_names(["a/b"])["a/b"] == folders["a/b"]  # whatever else is there
    assert folder_names(["römän", "数字"]) == {"römän": "römän", "数字": "数字"}
    apart = folder_names(["é", "e\u0301", "É", "数" * 90])  # one letter to some file systems
    assert apart["é"] == "é"
    assert len({f.casefold() for f in apart.values()}) == 4
    assert all(f.startswith("é-") for f in (apart["e\u0301"], apart["É"].casefold()))
    assert len(apart["数" * 90].encode()) <= 200
    assert folder_names([folders["a/b"], "a/b"]) == {
        folders["a/b"]: folders["a/b"],
        "a/b": "a_b-" + folders["a/b"][4:] + folder_names(["a/b", folders["a/b"]])["a/b"][-1:],
    }


def test_model_cards_go_through_a_library(here, cli):
    cards = dict.fromkeys(("law", "new"), "# A template")
    cards["sql"] = "---\nlicense: mit\n---\n# SQL, für 数"
    for name in ("sql", "law"):
        (here / "adapters" / name / "README.md").write_text(cards[name] + "\n", encoding="utf-8")
    shutil.copytree(here / "adapters/law", here / "new")
    cli("fold", "adapters/sql", "adapters/law", "adapters/poems", "-o", "cards")
    cli("add", "cards", "new")
    shutil.copytree(here / "cards", here / "anew")
    with lf.Library.open("anew") as lib:
        lib.refold(tolerance=0.2)
        shard = lib.contents.shard_of(lib.contents.entry("law"))
        assert [key for key in shard.keys if key.startswith("card")] == ["cards", "card0", "card1"]
        for k in range(40):  # shards are merged
            lib.add("adapters/poems", f"p{k}")
        assert len({lib.entry(name)["shard"] for name in lib.names}) < 40
    for lib in ("cards", "anew"):
        cli("unfold", lib, "sql", "law", "new", "poems", "-o", f"out of {lib}")
        for name in ("sql", "law", "new", "poems"):
            there = here / f"out of {lib}" / name / "README.md"
            assert there.is_file() == (name in cards)
            if name in cards:
                assert there.read_text(encoding="utf-8").startswith(cards[name] + "\n<!--")


def test_unfold_gives_back_what_the_library_holds(here, cli):
    ran = cli("unfold", "lib", "-o", "out", "--json")
    assert sorted(p.name for p in (here / "out").iterdir()) == ["law", "poems", "sql"]
    with lf.Library.open("lib") as lib:
        for row in ran.json["adapters"]:
            back = lf.load(row["path"])
            assert back.distance(lib[row["name"]]) < 1e-5 * back.norm()
            assert {u.A.dtype for u in back.modules.values()} == {torch.float32}
            source = lf.load(here / "adapters" / row["name"])
            assert source.distance(back) <= 0.1 * source.norm()


def test_unfold_names_are_no_paths(here, cli):
    with lf.Library.open("lib") as lib:
        for name in ("../out2", "🙂", "a/b"):
            lib.add("adapters/law", name)
    before = set(here.parent.iterdir())
    ran = cli("unfold", "lib", "../out2", "sql", "-o", "out/deep")
    assert ran.code == 0
    assert set(here.parent.iterdir()) == before
    names = json.loads((here / "out/deep/names.json").read_text())
    assert list(names.values()) == ["../out2"]
    (folder,) = names
    assert folder in ran.out
    assert "../out2" in ran.out
    assert lf.load(here / "out/deep" / folder).digest
    assert cli("unfold", "lib", "🙂", "-o", "out/deep").code == 0
    names = json.loads((here / "out/deep/names.json").read_text())
    assert set(names.values()) == {"../out2", "🙂"}
    assert not (here / "other").exists()
    assert cli("unfold", "lib", "law", "-o", "plain").code == 0
    assert not (here / "plain/names.json").exists()


def test_unfold_writes_nothing_where_something_is_in_the_way(here, cli):
    assert cli("unfold", "lib", "sql", "-o", "out").code == 0
    state = tree("out")
    ran = cli("unfold", "lib", "-o", "out")
    assert ran.code == 2
    assert "--overwrite" in ran.err
    assert tree("out") == state
    assert cli("unfold", "lib", "-o", "out", "--overwrite").code == 0
    assert len(list((here / "out").iterdir())) == 3


@pytest.mark.parametrize(
    "text", ["not JSON", "[]", '{"Alice": "Bob"}', '{"a": 1}', '{"sql": "sql"}', "\x00"]
)
def test_a_names_json_of_somebody_else_is_not_written_over(here, cli, text):
    assert cli("add", "lib", "adapters/sql", "--name", "a/b").code == 0
    (here / "out").mkdir()
    (here / "out" / "names.json").write_text(text)
    state = tree("out")
    ran = cli("unfold", "lib", "-o", "out", "--overwrite")
    assert ran.code == 2
    assert "out/names.json is no list of unfolded adapters: move it" in ran.err
    assert tree("out") == state
    assert cli("unfold", "lib", "sql", "-o", "out").code == 0  # needs none
    assert (here / "out" / "names.json").read_text() == text


def test_unfold_options(here, cli):
    args = ["--dtype", "bfloat16", "--pad", "--base-model", "other/base"]
    ran = cli("unfold", "lib", "sql", "-o", "out", *args, "--json")
    back = lf.load("out/sql")
    assert {u.A.dtype for u in back.modules.values()} == {torch.bfloat16}
    assert back.base_model == "other/base"
    assert 0 < ran.json["adapters"][0]["rounding"] < 0.01
    ran = cli("unfold", "lib", "sql", "-o", "out", *args, "--overwrite")
    assert "bfloat16 adds at most" in ran.out


def test_unfold_of_exact_is_bit_for_bit(here, cli):
    assert cli("fold", "adapters", "-o", "exact", "--tolerance", "0").code == 0
    assert cli("unfold", "exact", "-o", "out").code == 0
    for name in ("sql", "poems", "law"):
        assert lf.load(here / "out" / name).digest == lf.load(here / "adapters" / name).digest


# add and rm


def test_add_several_and_leave_the_others_alone(here, cli):
    shutil.move("adapters/sql", "more/sql2")
    shutil.move("adapters/law", "more/law2")
    with lf.Library.open("lib") as lib:
        old = {name: lib[name].digest for name in lib.names}
    found = cli("add", "lib", "more", "--tolerance", "0.05", "--json").json
    assert [row["name"] for row in found["added"]] == ["law2", "sql2"]
    with lf.Library.open("lib") as lib:
        assert {name: lib[name].digest for name in old} == old
        assert all(row["error"] == lib.error(row["name"]) <= 0.05 for row in found["added"])
        assert found["bytes"][1] == lib.nbytes


def test_add_checks_all_names_first(here, cli):
    shutil.copytree("adapters/sql", "more/new")
    shutil.copytree("adapters/sql", "more/sql")
    state = tree("lib")
    assert cli("add", "lib", "more").code == 2
    assert tree("lib") == state
    assert cli("add", "lib", "more", "--replace").code == 0


def test_add_exactly(here, cli):
    assert cli("add", "lib", "adapters/sql", "--name", "s", "--form", "exact").code == 0
    with lf.Library.open("lib") as lib:
        assert lib["s"].digest == lf.load("adapters/sql").digest
    assert "exact" in cli("ls", "lib").out


def test_rm_frees_the_name(here, cli):
    ran = cli("rm", "lib", "sql", "sql", "law")
    assert ran.code == 0
    assert "1 adapter left" in ran.out
    with lf.Library.open("lib") as lib:
        assert lib.names == ["poems"]
    assert cli("add", "lib", "adapters/sql").code == 0


# verify


def test_verify_passes_and_measures(here, cli):
    assert "checksums are right" in cli("verify", "lib").out
    found = cli("verify", "lib", "adapters", "--json").json
    assert found["ok"]
    assert found["measured"]
    for row in found["adapters"]:
        with lf.Library.open("lib") as lib:
            source = lf.load(here / "adapters" / row["name"])
            error = source.distance(lib[row["name"]]) / source.norm()
        assert row["error"] == pytest.approx(error, rel=1e-6)
        assert row["bound"] == 0.1


def test_verify_finds_every_broken_bound(here, cli):
    swapped = ["--name", "sql=adapters/poems", "--name", "poems=adapters/sql"]
    ran = cli("verify", "lib", *swapped, "--name", "law=adapters/law")
    assert ran.code == 1
    assert ran.err.startswith("error: 2 of 3 adapters failed: ")
    assert ran.err.count("\n") == 1
    assert "right" in ran.out
    found = cli("verify", "lib", *swapped, "--json")
    assert found.code == 1
    assert [row["ok"] for row in found.json["adapters"]] == [False, False]


def unwrapped(text):
    """Without what breaks a long path over lines."""
    return "".join(text.split())


def test_verify_finds_damage(here, cli):
    shard = next((here / "lib").glob("shard-*"))
    data = bytearray(shard.read_bytes())
    data[-5] ^= 1
    shard.write_bytes(data)
    ran = cli("verify", "lib")
    assert ran.code == 1
    assert shard.name in unwrapped(ran.out)
    assert ran.err.count("\n") == 1
    assert shard.name in ran.err
    assert "lorafold repair lib" in ran.err


@pytest.mark.filterwarnings("default")
@pytest.mark.parametrize("pattern", ["library.json", "adapters-*", "shard-*"])
@pytest.mark.parametrize("how", ["cut", "emptied", "gone", "edited"])
def test_verify_finds_every_file_that_is_not_right(here, cli, pattern, how):
    """Also what can't be opened at all: damage is what the command looks for."""
    path = next((here / "lib").glob(pattern))
    raw = path.read_bytes()
    if how == "gone":
        path.unlink()
    else:
        path.write_bytes({"cut": raw[:-9], "emptied": b"", "edited": b"x" + raw[1:]}[how])
    ran = cli("verify", "lib", "--json")
    assert ran.code == (2 if (pattern, how) == ("library.json", "gone") else 1)
    assert ran.err.count("\n") == 1
    assert path.name in ran.err
    if pattern == "library.json":
        assert ran.json["kind"] == "error"
        return
    assert not ran.json["ok"]
    assert len(ran.json["damage"]) == 1
    assert path.name in ran.json["damage"][0]
    assert not any(row["ok"] for row in ran.json["adapters"])


@pytest.fixture
def damaged(here, cli):
    """A library, one adapter of which is in a shard of its own, that was cut."""
    assert cli("add", "lib", "adapters/sql", "--name", "new").code == 0
    with lf.Library.open("lib") as lib:
        shard = here / "lib" / lib.entry("new")["shard"]
    os.truncate(shard, 100)
    return shard


@pytest.mark.filterwarnings("default")
def test_a_damaged_library_is_used_as_far_as_it_goes(here, cli, damaged):
    ran = cli("ls", "lib", "--json")
    assert (ran.code, ran.err.count("\n")) == (0, 1)
    assert ran.err.startswith("warning: ")
    assert damaged.name in ran.err
    assert {row["name"] for row in ran.json["adapters"] if row["problem"]} == {"new"}
    assert "lost" in cli("ls", "lib").out
    assert cli("info", "lib").code == 0
    assert cli("unfold", "lib", "sql", "-o", "one").code == 0
    ran = cli("unfold", "lib", "-o", "all", "--json")
    assert ran.code == 1
    assert list(ran.json["lost"]) == ["new"]
    assert "'new'" in ran.err
    assert sorted(os.listdir("all")) == ["law", "poems", "sql"]
    assert cli("rm", "lib", "law").code == 0
    found = cli("verify", "lib", "--json")
    assert found.code == 1
    assert [row["name"] for row in found.json["adapters"] if not row["ok"]] == ["new"]
    assert cli("rm", "lib", "new").code == 0
    assert cli("verify", "lib").code == 0


@pytest.mark.filterwarnings("default")
@pytest.mark.parametrize("given", [False, True])
def test_repair(here, cli, damaged, given):
    ran = cli("repair", "lib", *(["--name", "new=adapters/sql"] if given else []))
    assert ran.code == 0
    assert damaged.name in unwrapped(ran.out)
    assert ("rebuilt" if given else "dropped") in ran.out
    assert cli("verify", "lib").code == 0
    assert ("new" in cli("ls", "lib").out) == given
    again = cli("repair", "lib", "--sources", "adapters", "--json")
    kept = 4 if given else 3
    assert again.json == {
        "kind": "repair", "path": "lib", "damage": [], "rebuilt": [], "dropped": {},
        "lost_lists": 0, "kept": kept,
    }  # fmt: skip


def test_verify_of_what_is_no_library_or_source_is_bad_input(here, cli):
    for args in (["nowhere"], ["adapters"], ["lib", "nowhere"], ["lib", "--name", "sql=nowhere"]):
        ran = cli("verify", *args)
        assert (ran.code, ran.out, ran.err.count("\n")) == (2, "", 1)
    ran = cli("verify", "lib", "--name", "nobody=adapters/sql")
    assert ran.code == 2
    assert "nobody" in ran.err


# refold


def test_refold_states_what_was_and_what_is(here, cli):
    with lf.Library.open("lib") as lib:
        bytes_, errors = lib.nbytes, [lib.error(n) for n in lib.names]
    found = cli("refold", "lib", "adapters", "--tolerance", "0.3", "--json").json
    with lf.Library.open("lib") as lib:
        checked = lib.verify(["adapters"])
        assert found["bytes"] == [bytes_, lib.nbytes]
        assert found["options"]["tolerance"] == lib.tolerance == 0.3
    assert found["bytes"][1] < found["bytes"][0]
    assert found["error"][0]["max"] == max(errors)
    assert found["error"][1]["max"] == pytest.approx(max(checked.values()), rel=1e-4)
    assert found["from"] == "sources"
    ran = cli("refold", "lib", "--form", "svd", "--rank", "2", "--memory", "64MiB")
    assert ran.code == 0, ran.err
    assert "folded anew  3 adapters, from what it held" in ran.out
    assert "form svd, rank 2" in ran.out


@pytest.mark.parametrize(
    ("line", "status", "says"),
    [
        ("refold lib --tolerance 1e-9", 1, "its source: give SOURCE, or give a larger --tolerance"),
        ("refold lib adapters/sql", 2, "must be the library's adapters, one each"),
        ("refold lib --name sql=adapters/sql", 2, "one each"),
        ("refold lib --tolerance 0.1 --rank 2", 2, "exclude each other"),
        ("refold nowhere", 2, "nowhere does not exist"),
        ("refold adapters", 2, "is not a library"),
        ("refold lib --memory much", 2, "memory must be"),
    ],
)
def test_a_refold_that_fails_changes_nothing(line, status, says, here, cli):
    def state():
        """Of the files that lock nothing."""
        return {p.name: p.read_bytes() for p in (here / "lib").iterdir() if p.name[0] != "."}

    before = state()
    ran = cli(*line.split())
    assert (ran.code, ran.out, ran.err.count("\n")) == (status, "", 1)
    assert says in ran.err
    assert state() == before


# bench


def test_bench_leaves_the_library_alone(here, cli):
    state = tree("lib")
    found = cli("bench", "lib", "--repeat", "2", "--json").json
    assert [row["verb"] for row in found["times"]] == ["open", "rebuild", "project", "add"]
    assert all(row["seconds"] > 0 and row["per_second"] > 0 for row in found["times"])
    assert tree("lib") == state
    assert "a second" in cli("bench", "lib", "--repeat", "1").out


def test_bench_of_nothing(here, cli):
    assert cli("rm", "lib", "sql", "law", "poems").code == 0
    assert "has no adapters" in cli("bench", "lib").err
    assert cli("ls", "lib").code == cli("info", "lib").code == cli("verify", "lib").code == 0
    assert cli("unfold", "lib", "-o", "out").code == 0


def test_a_pickle_is_read_with_the_flag_that_is_told(here, cli):
    source = Path("adapters/sql")
    torch.save(load_file(source / "adapter_model.safetensors"), source / "adapter_model.bin")
    (source / "adapter_model.safetensors").unlink()
    add = ("add", "lib", source, "--replace")
    for args in (("fold", source, "-o", "out"), add, ("verify", "lib", source)):
        ran = cli(*args)
        assert ran.code == 2
        assert "is a pickle" in ran.err
        assert "give --allow-pickle if you trust it" in ran.err
        assert cli(*args, "--allow-pickle").code == 0
