"""One rule for what a path stands for: `fold`, `info`, `load` and `check` see the same adapters."""

import json
import ntpath
import shutil

import pytest
import torch
from safetensors.torch import load_file, save_file

import lorafold as lf
from lorafold.errors import FileError, LorafoldError, UnknownNameError
from lorafold.files import load_many
from lorafold.files.config import CONFIG_NAME, LIBRARY_NAME, SUBSPACE_NAME, WEIGHTS_NAME
from lorafold.files.find import adapters_at, in_library, locate, matches, name_of


def adapter(seed=0):
    g = torch.Generator().manual_seed(seed)
    factors = torch.randn(2, 8, generator=g), torch.randn(6, 2, generator=g)
    return lf.Adapter({"layers.0.q_proj": lf.LowRank(*factors)}, base_model="base")


@pytest.fixture(scope="module")
def base(tmp_path_factory):
    folder = tmp_path_factory.mktemp("base")
    save_file({"layers.0.q_proj.weight": torch.randn(6, 8)}, folder / "model.safetensors")
    return folder


def whole(path):
    lf.save(adapter(), path)


def weights_only(path):
    whole(path)
    (path / CONFIG_NAME).unlink()


def config_only(path):
    whole(path)
    (path / WEIGHTS_NAME).unlink()


def pickled(path):
    whole(path)
    torch.save(load_file(path / WEIGHTS_NAME), path / "adapter_model.bin")
    (path / WEIGHTS_NAME).unlink()


def damaged(path):
    whole(path)
    (path / WEIGHTS_NAME).write_bytes(b"")


def other_method(path):
    whole(path)
    (path / CONFIG_NAME).write_text(json.dumps({"peft_type": "IA3"}))


def subspace(path):
    path.mkdir(parents=True)
    (path / SUBSPACE_NAME).write_text("{}")


def unrelated(path):
    path.mkdir(parents=True)
    (path / "notes.txt").write_text("x")


def library(path):
    lf.fold([adapter()], path).close()


BROKEN = [weights_only, config_only, pickled, damaged, other_method, subspace]
NONE = [unrelated, library]


@pytest.fixture
def doors(cli, base):
    """{door: folder -> the names that it sees as adapters, those named as errors among them}."""

    def by_fold(folder):
        try:
            return set(lf.fold(folder, tolerance=0.5).names)
        except LorafoldError as e:
            return {"error", *named_in(str(e), folder)}

    def by_info(folder):
        ran = cli("info", folder, "--json")
        one = [ran.json] if ran.json["kind"] in ("adapter", "library", "subspace") else []
        found = ran.json.get("adapters", []) if ran.json["kind"] == "adapters" else one
        names = {name_of(locate_or(folder, d["path"])) for d in found}
        if ran.code:
            return {"error", *names, *named_in(ran.err, folder)}
        return names

    def by_load(folder):
        try:
            lf.load(folder)
        except LorafoldError as e:
            return {"error", *named_in(str(e), folder)}
        return {name_of(locate(folder).weights)}

    def by_check(folder):
        ran = cli("check", folder, "--base", base)
        if ran.code:
            return {"error", *named_in(ran.err, folder)}
        return {name_of(locate(folder).weights)}

    return {"fold": by_fold, "info": by_info, "load": by_load, "check": by_check}


def locate_or(folder, path):
    """The adapter's own folder, where `info` gives the one around it."""
    return locate(path).weights if str(path) == str(folder) else type(folder)(path)


def named_in(message, folder):
    return {p.name for p in folder.iterdir() if p.is_dir() and p.name in message}


@pytest.mark.parametrize("broken", BROKEN, ids=lambda f: f.__name__)
@pytest.mark.parametrize("others", [0, 2])
def test_a_broken_one_is_named_by_every_door(tmp_path, doors, broken, others):
    folder = tmp_path / "set"
    for k in range(others):
        whole(folder / f"good{k}")
    broken(folder / "bad")
    for name, door in doors.items():
        found = door(folder)
        assert "bad" in found, name
        assert "error" in found, name


@pytest.mark.filterwarnings("ignore:passed over")
@pytest.mark.parametrize("none", NONE, ids=lambda f: f.__name__)
def test_what_is_no_adapter_is_passed_over_by_every_door(tmp_path, doors, none):
    folder = tmp_path / "set"
    whole(folder / "good")
    none(folder / "other")
    for hidden in (".cache", ".good.0123456789abcdef.tmp", ".good.0123456789abcdef.old"):
        weights_only(folder / hidden)
    for name, door in doors.items():
        assert door(folder) == {"good"}, name


@pytest.mark.parametrize("door", ["merge", "similar", "info"])
@pytest.mark.parametrize(
    "sources",
    [["set"], ["set/*"], ["set/README.md", "set/good", "set/more", "set/other"]],
    ids=["folder", "glob", "spelled out by the shell"],
)
@pytest.mark.filterwarnings("default:passed over")
def test_what_is_passed_over_is_told(tmp_path, monkeypatch, cli, door, sources):
    """Whatever stands for all that a folder holds, in Python as on the command line."""
    monkeypatch.chdir(tmp_path)
    whole(tmp_path / "set" / "good"), whole(tmp_path / "set" / "more")
    unrelated(tmp_path / "set" / "other")
    (tmp_path / "set" / "README.md").write_text("x")
    ran = cli(door, *sources, *(["-o", "out"] if door == "merge" else []))
    assert ran.code == 0, ran.err
    what = "'set/other'" if sources == ["set"] else "'set/README.md', 'set/other'"
    assert ran.err == f"warning: passed over, as no adapter is there: {what}\n"
    with pytest.warns(UserWarning, match="passed over, .*set/other"):
        assert lf.similarity(sources).names == ("good", "more")


def test_what_is_named_must_be_an_adapter(tmp_path, monkeypatch, cli):
    monkeypatch.chdir(tmp_path)
    whole(tmp_path / "set" / "good"), whole(tmp_path / "set" / "more")
    unrelated(tmp_path / "set" / "other")
    for sources in (["set/good", "set/other"], ["set/other"]):
        ran = cli("merge", *sources, "-o", "out")
        assert (ran.code, "set/other is no adapter" in ran.err) == (2, True)
    ran = cli("merge", "set/o*", "-o", "out")
    assert (ran.code, ran.err) == (2, "error: no adapter matches 'set/o*', only 'set/other'\n")


def test_several_whole_ones(tmp_path, doors):
    folder = tmp_path / "set"
    for name in ("a", "b", "c"):
        whole(folder / name)
    (folder / "link").symlink_to(folder / "a", target_is_directory=True)
    (folder / "README.md").write_text("x")
    everyone = {"a", "b", "c", "link"}
    assert doors["fold"](folder) == doors["info"](folder) == everyone
    assert doors["load"](folder) == doors["check"](folder) == {"error", *everyone}
    assert set(load_many(folder)) == everyone


@pytest.mark.parametrize("broken", [whole, *BROKEN], ids=lambda f: f.__name__)
def test_a_folder_that_is_one_itself_stands_for_itself(tmp_path, doors, broken):
    """As a trainer's output, with its checkpoints below."""
    folder = tmp_path / "out"
    broken(folder)
    whole(folder / "checkpoint-100")
    whole(folder / "checkpoint-200")
    for name, door in doors.items():
        found = door(folder)
        assert not {"checkpoint-100", "checkpoint-200"} & found, name
        assert found == {"out"} if broken is whole else "error" in found, name


@pytest.mark.parametrize("broken", [whole, *BROKEN], ids=lambda f: f.__name__)
def test_a_named_adapter_of_peft_lies_one_level_down(tmp_path, doors, broken):
    broken(tmp_path / "out" / "polite")
    for name, door in doors.items():
        found = door(tmp_path / "out")
        assert "polite" in found, name
        assert ("error" in found) == (broken is not whole), name


@pytest.mark.parametrize("kind", ["empty", "unrelated", "library"])
def test_folders_without_any(tmp_path, doors, kind):
    folder = tmp_path / "set"
    folder.mkdir()
    if kind == "unrelated":
        unrelated(folder / "other")
    if kind == "library":
        folder.rmdir()
        library(folder)
    for name, door in doors.items():
        if kind == "library" and name in ("fold", "info"):
            assert name == "info" or door(folder) == {"task_0"}  # info describes it
        else:
            assert door(folder) == {"error"}, name


def test_pickles_are_read_when_asked_for(tmp_path, cli):
    pickled(tmp_path / "out" / "bad")
    for path in (tmp_path / "out", tmp_path / "out" / "bad"):
        assert lf.load(path, allow_pickle=True).rank == 2
        assert cli("info", path, "--allow-pickle").code == 0


def test_globs(tmp_path, cli, monkeypatch):
    for name in ("a1", "a2", "b1", "[x]"):
        whole(tmp_path / name)
    monkeypatch.chdir(tmp_path)
    assert lf.fold("a*", tolerance=0.5).names == ["a1", "a2"]
    assert [d["path"] for d in cli("info", "a*", "--json").json["adapters"]] == ["a1", "a2"]
    assert lf.fold("[x]", tolerance=0.5).names == ["[x]"]  # what is there is no glob
    assert [p.name for p in matches("?1")] == ["a1", "b1"]
    for call in (lambda: matches("c*"), lambda: lf.fold("c*")):
        with pytest.raises(FileError, match=r"no adapter matches 'c\*'"):
            call()
    assert "no adapter matches" in cli("info", "c*").err


def test_one_in_a_library(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    lf.fold({"a:b": adapter()}, "li:b").close()
    assert in_library("li:b:a:b") == ("li:b", "a:b")
    assert in_library("li:b:nothing") == ("li:b", "nothing")
    assert in_library("li:b") is None  # a path that is there
    assert in_library("li") is None
    assert lf.fold("li:b:a:b").names == lf.fold("li:b").names == ["a:b"]
    assert lf.load("li:b:a:b")["layers.0.q_proj"].rank == 2
    with pytest.raises(FileError, match=r"li:b is a library; name one of its .*, as li:b:NAME"):
        lf.load("li:b")
    with pytest.raises(UnknownNameError, match="no adapter 'a:c' in the library; did you mean 'a"):
        lf.load("li:b:a:c")
    shutil.rmtree("li:b")
    assert in_library("li:b:a:b") is None


def test_the_drive_of_a_path_is_no_library(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    library(tmp_path / "C")
    library(tmp_path / "C:\\lib")
    assert in_library("C:\\lib:sql") == ("C", "\\lib:sql")  # any letter may be in a name here
    monkeypatch.setattr("os.path.splitdrive", ntpath.splitdrive)
    assert in_library("C:\\lib:sql") == ("C:\\lib", "sql")


@pytest.fixture
def two(tmp_path, monkeypatch):
    """A library at `lib` of `a` and `b`, which lie in folders too; a base; texts for a path."""
    monkeypatch.chdir(tmp_path)
    made = {name: adapter(seed) for seed, name in enumerate("ab")}
    for name, a in made.items():
        lf.save(a, tmp_path / name)
    lf.fold(made, "lib", tolerance=0).close()
    save_file({"layers.0.q_proj.weight": torch.randn(6, 8)}, "model.safetensors")
    (tmp_path / "base").mkdir()
    (tmp_path / "model.safetensors").rename(tmp_path / "base" / "model.safetensors")
    return made


def added(source):
    with lf.fold([adapter(7)]) as lib:
        lib.add(source)
        return lib.names[1:]


def attached(source):
    layer = torch.nn.ModuleDict({"q_proj": torch.nn.Linear(8, 6)})
    live = lf.attach(torch.nn.ModuleDict({"layers": torch.nn.ModuleList([layer])}), source)
    live.add(source, "again")
    return live.adapter("again").digest


IN_PYTHON = {
    "load": lambda s: lf.load(s).digest,
    "attach": attached,
    "fold": lambda s: lf.fold([s]).names,
    "fold by name": lambda s: lf.fold({"x": s}).names,
    "add": added,
    "project": lambda s: lf.Library.open("lib").project(s).error,
    "verify": lambda s: lf.Library.open("lib").verify(s),
    "refold": lambda s: lf.Library.open("lib").refold(0.1, [s, "b"]),
    "merge": lambda s: lf.merge([s, "b"]).digest,
    "merge into": lambda s: lf.merge_into_weights("base", s, "out", overwrite=True).changed,
    "similarity": lambda s: lf.similarity([s, "b"]).matrix.tolist(),
    "overlap": lambda s: lf.overlap(s, "b").cosine,
    "anatomy": lambda s: lf.anatomy(s).modules[0].norm,
    "transfer": lambda s: lf.transfer(s, shape={"q_proj": (4, 4)}, method="svd").adapter.digest,
    "shared": lambda s: lf.shared_spectrum([s, "b"]).share(1),
}


@pytest.mark.parametrize("door", IN_PYTHON)
def test_one_in_a_library_is_an_adapter_at_every_door_of_python(two, door):
    """Stored exactly, so that it does what the folder of the same name does."""
    run = IN_PYTHON[door]
    assert run("lib:a") == run("a")
    with pytest.raises(UnknownNameError, match="no adapter 'aa' in the library; did you mean 'a'?"):
        run("lib:aa")
    for name in ("a", "lib:aa"):  # a path that is there comes first
        lf.save(two["b"], name, overwrite=name == "a")
    assert IN_PYTHON["load"]("lib:aa") == two["b"].digest


IN_SHELL = [
    "info {}", "similar {} b", "diff {} b", "anatomy {}", "roles {}", "resize {} out --rank 1",
    "check {} --base base", "merge {} b -o out", "merge-into base {} -o out",
    "transfer {} --shape q_proj=4x4 -o out", "fold {} -o out", "add lib {} --name x",
    "verify lib {}", "repair lib --sources {}", "verify lib --name a={}",
]  # fmt: skip


@pytest.mark.parametrize("line", IN_SHELL)
def test_one_in_a_library_is_an_adapter_at_every_door_of_the_shell(two, cli, line):
    ran = cli(*line.format("lib:a").split(), "--json")
    assert (ran.code, ran.err) == (0, "")
    ran = cli(*line.format("lib:aa").split(), *(["--overwrite"] if "-o" in line else []))
    assert (ran.code, ran.err) == (2, "error: no adapter 'aa' in the library; did you mean 'a'?\n")


def test_names_of_paths(tmp_path, monkeypatch):
    (tmp_path / "a" / "b").mkdir(parents=True)
    monkeypatch.chdir(tmp_path / "a" / "b")
    expected = {
        ".": "b",
        "..": "a",
        f"x/{WEIGHTS_NAME}": "x",
        "x/adapters.safetensors": "x",
        "x/pytorch_lora_weights.safetensors": "x",
        "x/adapter_model.bin": "x",
        "x/0000100_adapters.safetensors": "0000100_adapters",
        "loras/night sky v1.5.safetensors": "night sky v1.5",
        "org/name": "name",
    }
    assert {text: name_of(matches(text)[0]) for text in expected} == expected


def loose(path, name, alpha=4.0, seed=0):
    """A file of its own, as users of image models have them."""
    path.mkdir(parents=True, exist_ok=True)
    g = torch.Generator().manual_seed(seed)
    stem = "lora_unet_mid_block_attentions_0_proj_in"
    tensors = {
        f"{stem}.lora_down.weight": torch.randn(2, 8, 1, 1, generator=g),
        f"{stem}.lora_up.weight": torch.randn(8, 2, 1, 1, generator=g),
        f"{stem}.alpha": torch.tensor(alpha),
    }
    save_file(tensors, path / f"{name}.safetensors")


def test_loose_files_have_names_of_their_own(tmp_path, cli, doors):
    folder = tmp_path / "loras"
    for k, name in enumerate(("night", "rain v1.5", "sun")):
        loose(folder, name, seed=k)
    (folder / "preview.png").write_bytes(b"x")
    names = {"night", "rain v1.5", "sun"}
    assert doors["fold"](folder) == doors["info"](folder) == names
    assert set(lf.similarity(folder).names) == set(lf.similarity(f"{folder}/*.saf*").names) == names
    with pytest.raises(FileError, match=r"holds 3 adapters: 'night\.safetensors', .*give the path"):
        lf.load(folder)
    assert set(load_many(folder)) == names
    lib = tmp_path / "lib"
    assert cli("fold", folder, "-o", lib).code == 0
    assert set(lf.Library.open(lib).names) == names
    assert lf.load(f"{lib}:night").modules.keys() == {"unet.mid_block.attentions.0.proj_in"}
    one = tmp_path / "one"
    loose(one, "only")
    assert lf.load(one).digest == lf.load(one / "only.safetensors").digest
    assert doors["fold"](one) == {"only"}


def test_folders_of_loose_files(tmp_path, monkeypatch):
    """As what a glob matches, and URLs, whose files are not looked into beforehand."""
    monkeypatch.chdir(tmp_path)
    loose(tmp_path / "sets" / "one", "night"), loose(tmp_path / "sets" / "two", "rain", seed=1)
    assert set(lf.similarity("sets/*").names) == {"night", "rain"}
    fsspec = pytest.importorskip("fsspec")
    store = fsspec.filesystem("memory")
    for name in ("night", "rain"):
        loose(tmp_path / "up", name)
        store.pipe(f"/loras/{name}.safetensors", (tmp_path / f"up/{name}.safetensors").read_bytes())
    assert set(lf.fold("memory://loras", tolerance=0.5).names) == {"night", "rain"}
    store.rm("/loras", recursive=True)


@pytest.mark.filterwarnings("ignore:passed over")
def test_loose_files_beside_folders_and_what_is_none(tmp_path, cli, doors):
    folder = tmp_path / "set"
    whole(folder / "good")
    loose(folder, "night")
    save_file(
        {"first_stage_model.decoder.conv_in.weight": torch.ones(2, 2)}, folder / "vae.safetensors"
    )
    assert doors["fold"](folder) == doors["info"](folder) == {"good", "night"}
    with pytest.warns(UserWarning, match=r"passed over, .*vae\.safetensors"):
        lf.similarity([folder])
    (folder / "cut.safetensors").write_bytes(b"x" * 4)
    assert doors["info"](folder) >= {"good", "night", "error"}
    assert "cut.safetensors: 4 bytes are too few" in cli("fold", folder, "-o", tmp_path / "x").err
    library(tmp_path / "lib")  # its shards are none
    assert adapters_at(tmp_path / "lib") == [tmp_path / "lib"]
    save_file({"layers.0.q_proj.weight": torch.randn(6, 8)}, tmp_path / "model.safetensors")
    assert cli("roles", tmp_path).code == 0


def test_a_folder_that_cannot_be_listed(tmp_path, monkeypatch):
    def refused(self):
        raise PermissionError(13, "Permission denied")

    monkeypatch.setattr(type(tmp_path), "iterdir", refused)
    with pytest.raises(FileError, match="Permission denied"):
        adapters_at(tmp_path)


def test_the_library_of_a_folder_is_known_by_its_manifest(tmp_path):
    library(tmp_path / "lib")
    assert (tmp_path / "lib" / LIBRARY_NAME).is_file()
