"""What a source stands for, and what is said where it can't be taken."""

import json
from pathlib import Path

import pytest
import torch

import lorafold as lf
from lorafold.collection.sources import named_handles
from lorafold.errors import FileError, MismatchError, UnknownNameError
from lorafold.fold.contents import Contents

CONFIG = {"peft_type": "LORA", "r": 2, "lora_alpha": 4, "target_modules": ["q"]}


@pytest.fixture
def pickled(tmp_path):
    folder = tmp_path / "adapters" / "old"
    folder.mkdir(parents=True)
    keys = {f"base_model.model.q.lora_{x}.weight": s for x, s in (("A", (2, 4)), ("B", (3, 2)))}
    torch.save({k: torch.ones(s) for k, s in keys.items()}, folder / "adapter_model.bin")
    (folder / "adapter_config.json").write_text(json.dumps(CONFIG))
    return folder


def test_a_pickle_is_told_with_what_the_door_has(pickled, tmp_path, make_adapter):
    """`fold`, `add`, `project`, `verify` and `refold` have no option for it."""
    lib = lf.fold({"a": make_adapter({"q": (3, 4)}, 2)})
    for use in (
        lambda: lf.fold(pickled.parent),
        lambda: lf.fold({"old": pickled / "adapter_model.bin"}),
        lambda: lib.add(pickled),
        lambda: lib.project(pickled),
        lambda: lib.verify({"a": pickled}),
        lambda: lib.refold(0.1, {"a": pickled}),
    ):
        with pytest.raises(FileError, match="is a pickle, which can run code") as caught:
            use()
        assert "allow_pickle=True" not in str(caught.value)
        assert "lorafold.load" in str(caught.value)
    trusted = lf.load(pickled, allow_pickle=True)
    assert lib.add(trusted, "old") <= 0.1
    lf.save(trusted, tmp_path / "new")
    assert lf.fold(tmp_path / "new").names == ["new"]


@pytest.fixture
def shelf(tmp_path, monkeypatch, make_adapter):
    """A folder to be in: adapters/{sql,law} and a library lib of three, one with colons."""
    monkeypatch.chdir(tmp_path)
    made = {n: make_adapter({"q": (12, 10), "v": (6, 10)}, 2, seed=k) for k, n in enumerate("abc")}
    lf.save(made["a"], "adapters/sql")
    lf.save(made["b"], "adapters/law")
    lf.fold({"sql": made["a"], "x": made["b"], "C:\\a:b/c": made["c"]}, "lib", tolerance=0.05)
    return made


def names(source, **options):
    return list(named_handles(source, **options))


def test_every_kind_of_source(shelf):
    lib = lf.Library.open("lib")
    inside = ["sql", "x", "C:\\a:b/c"]
    assert names("adapters/sql") == ["sql"]
    assert names("adapters") == names("adapters/*") == names([Path("adapters")]) == ["law", "sql"]
    assert names("lib") == names(lib) == names([lib]) == names("l*") == inside
    assert names("lib:x") == names(Path("lib:x")) == ["x"]
    assert names("lib:C:\\a:b/c") == ["C:\\a:b/c"]
    assert names(shelf["a"]) == names([shelf["a"]]) == ["task_0"]
    assert names([lf.files.open_adapter("adapters/sql"), shelf["b"]]) == ["sql", "task_1"]
    assert names({"one": "lib:sql", "two": ["adapters/sql"], "three": shelf["c"]}) == [
        *("one", "two", "three")
    ]
    assert names([["adapters"], [[shelf["a"]], {"y": lib["x"]}], "lib:x", shelf["b"]]) == [
        *("law", "sql", "task_1", "y", "x", "task_4")
    ]
    assert names(iter(["lib:sql", "lib:x"])) == ["sql", "x"]
    assert names(named_handles("lib")) == inside


def test_what_a_library_gives_is_what_it_holds(shelf):
    lib = lf.Library.open("lib")
    for name, handle in named_handles(lib).items():
        a = lib[name]
        assert handle.shapes == {p: (*u.shape, u.rank) for p, u in a.modules.items()}
        assert handle.load().digest == a.digest
        for path, u in a.modules.items():
            read = handle.read(path)
            assert torch.equal(read.A, u.A)
            assert torch.equal(read.B, u.B)
        assert (handle.path, handle.base_model) == (Path("lib").absolute(), a.base_model)


@pytest.mark.parametrize(
    "options",
    [
        {"form": form, **size}
        for form in ("svd", "input", "shared", "flat", "exact")
        for size in ({"tolerance": 0}, {"tolerance": 0.3}, {"rank": 1, "bits": 3})
        if form not in ("exact", "flat") or size != {"rank": 1, "bits": 3}
    ],
)
def test_ranks_are_known_without_decoding(options, make_adapter):
    adapters = [make_adapter({"q": (12, 10), "v": (6, 10)}, 3, seed=k) for k in range(3)]
    adapters.append(0.0 * adapters[0])
    try:
        lib = lf.fold(adapters, **options)
    except lf.errors.LorafoldError:
        pytest.skip("not a form for that size")
    for name, handle in named_handles(lib).items():
        assert {p: r for p, (_, _, r) in handle.shapes.items()} == {
            p: u.rank for p, u in lib[name].modules.items()
        }


def test_an_opened_library_is_read_module_by_module(shelf, monkeypatch):
    """Neither opening nor merging builds a whole adapter."""

    def never(*_):
        raise AssertionError("a whole adapter was built")

    lib = lf.Library.open("lib")
    expected = sum((lib[n] for n in lib.names[1:]), lib[lib.names[0]])
    monkeypatch.setattr(Contents, "adapter", never)
    merged = lf.merge(lib, weights=[1, 1, 1])
    assert merged.distance(expected) < 1e-5 * expected.norm()
    assert lf.fold(["lib:x", lib.names[0:0]], tolerance=0.5).names == ["x"]


def test_sources_stay_as_they_were_opened(shelf):
    lib = lf.Library.open("lib")
    before, handle = lib["x"], named_handles(lib)["x"]
    lib.remove("x")
    lib.refold(0.3)
    assert handle.load().digest == before.digest


def test_folding_a_library_counts_from_what_it_holds(shelf):
    lib = lf.Library.open("lib")
    again = lf.fold("lib", tolerance=0.2)
    assert again.names == lib.names
    assert max(again.verify(lib).values()) <= 0.2
    kept = lf.fold("lib", tolerance=0)
    assert [kept[n].digest for n in kept] == [lib[n].digest for n in lib]
    assert set(kept.verify("lib").values()) == {0.0}
    with pytest.raises(FileError, match="is the source"):
        lf.fold(["lib:x"], "lib", overwrite=True)


def test_libraries_go_into_one_another(shelf, make_adapter):
    other = lf.fold({"new": make_adapter({"q": (12, 10), "v": (6, 10)}, 2, seed=9)}, tolerance=0.1)
    lib = lf.Library.open("lib")
    assert lib.add("adapters/law") <= 0.05
    assert lib.add(other) <= 0.05
    assert "new" in lib


@pytest.mark.parametrize(
    ("source", "error", "says"),
    [
        ([], MismatchError, "the list of sources is empty"),
        ({}, MismatchError, "the list of sources is empty"),
        ([[], {}], MismatchError, "the list of sources is empty"),
        (3, MismatchError, "not int"),
        (torch.ones(2), MismatchError, "not Tensor"),
        ({"a": torch.ones(2)}, MismatchError, "not Tensor"),
        (b"adapters", MismatchError, "not bytes"),
        ([None], MismatchError, "not NoneType"),
        ({3: "adapters/sql"}, MismatchError, "a non-empty text, found 3"),
        ({"": "adapters/sql"}, MismatchError, "a non-empty text"),
        ({"a": "adapters"}, MismatchError, "'a' stands for 2 adapters"),
        ({"a": "lib"}, MismatchError, "'a' stands for 3 adapters"),
        ({"a": []}, MismatchError, "'a' stands for 0 adapters"),
        (["adapters", "adapters/sql"], MismatchError, "both named 'sql'"),
        (["lib:sql", "adapters"], MismatchError, "both named 'sql'"),
        (["lib", "lib"], MismatchError, "both named 'sql'"),
        (["adapters", "adapters"], MismatchError, ", and so with 'sql': give names"),
        ("lib:sqk", UnknownNameError, "did you mean 'sql'"),
        ("lib:", UnknownNameError, "there are 3"),
        ("lib:C", UnknownNameError, "'C'"),
        ("C:\\adapters\\sql", FileError, "no such file or directory"),
        ("nolib:sql", FileError, "no such file or directory"),
        ("adapters:sql", FileError, "no such file or directory"),
        ("nothing/*", FileError, "no adapter matches"),
    ],
)
def test_what_is_refused(shelf, source, error, says):
    with pytest.raises(error) as caught:
        named_handles(source)
    assert says in str(caught.value)
    assert "\n" not in str(caught.value)


def test_a_path_comes_before_a_library(shelf):
    lf.save(shelf["b"], "lib:sql")
    assert names("lib:sql") == ["lib:sql"]
    assert (
        named_handles("lib:sql")["lib:sql"].load().distance(shelf["b"]) < 1e-6 * shelf["b"].norm()
    )


def test_a_closed_library_says_so(shelf):
    lib = lf.Library.open("lib")
    lib.close()
    for use in (lf.merge, lf.fold):
        with pytest.raises(FileError, match="lib is closed: open it again"):
            use(lib)
    memory = lf.fold([shelf["a"]])
    memory.close()
    with pytest.raises(FileError, match="the library in memory is closed"):
        lf.merge(memory)


def test_alpha_is_for_those_that_have_no_config(shelf):
    lf.save(shelf["a"], "bare")
    Path("bare/adapter_config.json").unlink()
    with pytest.raises(FileError, match="give alpha="):
        named_handles(["bare", "adapters"])
    found = named_handles(["bare", "adapters"], alpha=2 * shelf["a"].rank)  # saved as α = r
    assert found["bare"].load().distance(2 * shelf["a"]) < 1e-6 * shelf["a"].norm()
    assert found["sql"].load().distance(shelf["a"]) < 1e-6 * shelf["a"].norm()


def test_another_class_can_be_a_shelf(make_adapter):
    """What `__lorafold_handles__` gives is taken, whoever has it."""

    class Mine:
        def __lorafold_handles__(self, name=None):
            return named_handles({"mine": make_adapter({"q": (3, 4)}, 2)})

    assert names([Mine()]) == ["mine"]


@pytest.mark.parametrize("text", ["", "./sql", "sql/", "a\0b", "x" * 5000, "lib:" + "x" * 5000])
def test_what_is_no_path_is_no_other_either(text, tmp_path, monkeypatch, make_adapter):
    """Not the working directory, not an id on the Hub, and no error of the system's own."""
    asked = []

    def snapshot(name, *_):
        asked.append(name)
        raise FileError("no such adapter")

    monkeypatch.setattr("lorafold.files.find.snapshot", snapshot)
    lf.save(make_adapter({"q": (6, 4)}, {"q": 2}), tmp_path)
    monkeypatch.chdir(tmp_path)
    with pytest.raises(FileError):
        named_handles(text)
    assert not asked or text[0] in "axl"  # what an id looks like is said elsewhere
