"""Verbs over several engines: what they find is what one process finds, to the last bit."""

from __future__ import annotations

import importlib
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pytest
import torch

import lorafold as lf
from lorafold import FileError, MismatchError, ToleranceError
from lorafold.collection.sources import named_handles
from lorafold.compare.pairs import Pairs
from lorafold.files import open_adapter
from lorafold.thin import threads as torch_has

SHAPES = {f"layers.{n}.{p}": (24, 40) for n in range(3) for p in ("q", "v")}


@pytest.fixture(params=["workers", "threads", "dask", "ray"])
def crew(request):
    """Who does the work, as keywords of a verb."""
    if request.param == "threads":
        with ThreadPoolExecutor(2) as threads:
            yield {"executor": threads}
    else:
        yield {"executor": request.getfixturevalue(request.param)}


@pytest.fixture(scope="module")
def family(make_adapter):
    """{name: Adapter} of several ranks and dtypes; some are alike, one lacks modules."""
    few = {p: shape for p, shape in SHAPES.items() if "1" not in p}
    found = {f"a{i}": make_adapter(SHAPES, 2 + i % 3, seed=i, scale=0.5 + i) for i in range(6)}
    found["few"] = make_adapter(few, 3, seed=20)
    found["copy"] = found["a0"].nested()
    found["half"] = found["a1"].to(dtype=found["few"]["layers.0.q"].A.bfloat16().dtype)
    return found


@pytest.fixture(scope="module")
def folder(family, tmp_path_factory):
    """The family as files."""
    path = tmp_path_factory.mktemp("family")
    for name, adapter in family.items():
        lf.save(adapter, path / name)
    return path


# verify


@pytest.fixture(scope="module")
def library(folder, family, tmp_path_factory):
    """Its library: one stored exactly, one of an in-memory source."""
    path = tmp_path_factory.mktemp("library") / "lib"
    with lf.fold(folder, path, tolerance=0.1) as lib:
        lib.add(family["a3"], "memory")
        lib.add(folder / "a2", "exact", form="exact")
    return path


@pytest.fixture
def one_a_task(monkeypatch):
    monkeypatch.setattr("lorafold.fold.checking._LEAST", 1)


@pytest.fixture
def sources(folder, family):
    """Every kind of source."""
    paths = {p.name: p for p in sorted(folder.iterdir())}
    other = lf.fold({"a4": folder / "a4"}, tolerance=0)
    based = named_handles({"a5": folder / "a5"}, base_model=None)
    return {**paths, "memory": family["a3"], "exact": folder / "a2", "a4": other, **based}


def test_verify(library, sources, crew, one_a_task):
    with lf.Library.open(library) as lib:
        here = lib.verify(sources)
        assert lib.verify(sources, **crew) == here
        assert len({*here.values()}) > 5
        assert here["exact"] == 0
        assert lib.verify(**crew) == lib.verify()


def test_verify_by_workers_of_its_own(library, sources):
    with lf.Library.open(library) as lib:
        assert lib.verify(sources, workers=2) == lib.verify(sources)


def test_verify_of_a_library_and_of_adapters_in_memory(family, workers, one_a_task):
    lib = lf.fold(family, tolerance=0.1)
    assert lib.verify(family, executor=workers) == lib.verify(family)


def test_verify_tells_what_is_wrong(library, sources, family, crew, one_a_task):
    wrong = {**sources, "a1": family["a0"], "memory": family["a5"], "exact": family["a1"]}
    with lf.Library.open(library) as lib:
        here = lib.verify(wrong, strict=False)
        found = lib.verify(wrong, strict=False, **crew)
        assert dict(found) == dict(here)
        assert {n for n, check in here.items() if check.problem} == {"a1", "memory", "exact"}
        with pytest.raises(ToleranceError, match="'a1' has error"):
            lib.verify(wrong, **crew)


def test_verify_raises_the_first_of_a_group_before_what_another_raises(
    library, sources, family, folder, tmp_path, workers
):
    """All of these are in one task: what comes after the first is not looked at."""
    lf.save(family["a2"], tmp_path / "changed")
    handle = open_adapter(tmp_path / "changed")
    (tmp_path / "changed/adapter_model.safetensors").write_bytes(b"")
    broken = {"a1": family["a0"], "a2": handle}
    with lf.Library.open(library) as lib:
        for crew in ({}, {"executor": workers}):
            with pytest.raises(ToleranceError, match="'a1'"):
                lib.verify(broken, **crew)
            with pytest.raises(FileError, match="changed"):
                lib.verify(broken, strict=False, **crew)


def test_verify_of_a_damaged_library(library, sources, tmp_path, workers, one_a_task):
    import shutil

    shutil.copytree(library, tmp_path / "lib")
    shard = max((tmp_path / "lib").glob("*.safetensors"), key=lambda p: p.stat().st_size)
    raw = bytearray(shard.read_bytes())
    raw[len(raw) // 2] ^= 255
    shard.write_bytes(raw)
    with lf.Library.open(tmp_path / "lib") as lib:
        here = lib.verify(sources, strict=False)
        there = lib.verify(sources, strict=False, executor=workers)
        assert here.damage
        assert any(check.problem for check in here.values())
        assert (dict(there), there.damage) == (dict(here), here.damage)


def test_a_library_that_changes_meanwhile_is_told(folder, tmp_path, workers):
    lf.fold(folder, tmp_path / "lib", tolerance=0.1).close()
    with lf.Library.open(tmp_path / "lib") as lib, lf.Library.open(tmp_path / "lib") as other:
        other.remove("a5")
        with pytest.raises(FileError, match="was changed meanwhile: start again"):
            lib.verify({"a1": folder / "a1"}, executor=workers)


def test_a_handle_of_another_kind_is_read_here(library, folder, workers):
    class Own:
        def __init__(self, handle):
            self._handle = handle

        def __getattr__(self, name):
            if name.startswith("__"):
                raise AttributeError(name)
            return getattr(self._handle, name)

    own = Own(open_adapter(folder / "a1"))
    with lf.Library.open(library) as lib:
        assert lib.verify({"a1": own}, executor=workers) == lib.verify({"a1": own})


def test_verify_goes_on_from_a_work_directory(library, sources, tmp_path, one_a_task):
    with lf.Library.open(library) as lib:
        here = lib.verify(sources)
        assert lib.verify(sources, work=tmp_path / "work") == here
        done = sorted((tmp_path / "work").glob("*.done"))
        assert len(done) == len(sources)
        times = [path.stat().st_mtime_ns for path in done]
        assert lib.verify(sources, work=tmp_path / "work") == here
        assert [path.stat().st_mtime_ns for path in done] == times
        with pytest.raises(FileError, match="of another run"):
            lib.verify({**sources, "a1": sources["a2"]}, work=tmp_path / "work", strict=False)


@pytest.mark.parametrize(
    ("given", "message"),
    [({"executor": 3}, "executor must be"), ({"workers": 0}, "workers must be a whole number")],
)
def test_who_is_to_work_is_checked(library, given, message):
    with lf.Library.open(library) as lib, pytest.raises(MismatchError, match=message):
        lib.verify(**given)


# similarity


def matrices(s):
    return s.matrix, s.norms, s.known, s.focus, s.error, s.threshold


def same(one, two):
    return all(np.array_equal(a, b) for a, b in zip(matrices(one), matrices(two), strict=True))


@pytest.fixture(params=["one strip", "several"])
def strips(request, monkeypatch):
    """As few rows in a task as to make several of them, or all rows in one."""
    if request.param == "several":
        monkeypatch.setattr("lorafold.compare.strips._ROWS", 8 * 9 * 4)


@pytest.fixture
def always_sketched(monkeypatch):
    module = importlib.import_module("lorafold.compare.similarity")
    monkeypatch.setattr(module, "_CHEAP", -1.0)


def test_similarity(folder, family, crew, strips):
    sources = [*sorted(folder.iterdir())[:-1], family["half"]]
    here = lf.similarity(sources)
    assert here.clusters()[0] == ["a0", "copy"]
    assert same(lf.similarity(sources, **crew), here)


def test_similarity_by_workers_of_its_own(folder):
    assert same(lf.similarity(folder, workers=2), lf.similarity(folder))


def test_sketched_similarity(make_adapter, tmp_path, crew, strips, always_sketched):
    shapes = {f"layers.{n}.q": (96, 128) for n in range(4)}
    few = {p: shape for p, shape in shapes.items() if "1" not in p}
    sources = {f"a{i}": make_adapter(shapes, 1 + i % 3, seed=i, scale=10.0**i) for i in range(7)}
    sources |= {"few": make_adapter(few, 2, seed=9), "copy": sources["a2"].nested()}
    here = lf.similarity(sources, memory=8 * 4 * 224 * 7)
    assert 0 < here.error < 0.2
    assert not here.known.all()
    assert here.matrix[2, 8] == 1
    there = lf.similarity(sources, memory=8 * 4 * 224 * 7, **crew)
    assert same(there, here)
    assert same(there.at(-1.0), here.at(-1.0))  # by this process, without the executor


def test_several_tasks_at_once_in_this_process_give_the_same(
    folder, monkeypatch, strips, always_sketched
):
    here = lf.similarity(folder)
    monkeypatch.setattr(Pairs, "at_once", 3)
    assert same(lf.similarity(folder), here)


def test_strips_are_the_whole_matrix(folder, monkeypatch, always_sketched):
    for exact in (True, False):
        whole = lf.similarity(folder, exact=exact)
        with monkeypatch.context() as patch:
            patch.setattr("lorafold.compare.strips._ROWS", 8 * 9 * 2)
            found = lf.similarity(folder, exact=exact)
        np.testing.assert_allclose(found.matrix, whole.matrix, atol=1e-6)
        np.testing.assert_allclose(found.norms, whole.norms, rtol=1e-6)


def test_similarity_of_a_library(library, workers):
    with lf.Library.open(library) as lib:
        assert same(lf.similarity(lib, executor=workers), lf.similarity(lib))


def test_similarity_goes_on_from_a_work_directory(folder, tmp_path):
    here = lf.similarity(folder)
    assert same(lf.similarity(folder, work=tmp_path / "work"), here)
    done = {p: p.stat().st_mtime_ns for p in (tmp_path / "work").glob("*.done")}
    assert len(done) == len(SHAPES)
    assert same(lf.similarity(folder, work=tmp_path / "work"), here)
    assert done == {p: p.stat().st_mtime_ns for p in (tmp_path / "work").glob("*.done")}
    with pytest.raises(FileError, match="of another run"):
        lf.similarity([folder / "a1", folder / "a2"], work=tmp_path / "work")


def test_a_source_that_is_gone_is_told_by_whoever_reads_it(folder, family, tmp_path, crew):
    lf.save(family["a1"], tmp_path / "gone")
    sources = named_handles([folder / "a0", tmp_path / "gone"])
    (tmp_path / "gone/adapter_model.safetensors").write_bytes(b"")
    with pytest.raises(FileError, match="gone.*changed since it was opened"):
        lf.similarity(sources, **crew)


def test_what_float32_can_not_hold_is_named_by_whoever_reads_it(family, workers):
    u = family["a1"]["layers.0.q"]
    wide = lf.LowRank(u.A.double() * 1e100, u.B.double())
    with pytest.raises(MismatchError, match="'layers.0.q' has an update that is too large"):
        lf.similarity({"a": lf.Adapter({"layers.0.q": wide})}, executor=workers)


# merge

JOBS = {
    "linear": {"weights": {"a1": 0.5, "a2": {"q": -1.0}, "few": 2.0}},
    "ties": {"density": 0.4, "lambda_": 0.5, "pico": True},
    "dare_ties": {"seed": 3},
    "knots": {},
    "tsv": {},
    "iso_cts": {},
    "lego": {"rank": 3},
    "ctm": {},
    "breadcrumbs": {"space": "delta", "rank": 4},
    "della": {"space": "delta"},
}


@pytest.fixture
def three(folder):
    return {name: folder / name for name in ("a1", "a2", "few")}


@pytest.fixture
def one_module_a_task(monkeypatch):
    monkeypatch.setattr("lorafold.merge.by_module._TOGETHER", 1)


def files(adapter, path):
    """What is written of an adapter: file → bytes."""
    lf.save(adapter, path, overwrite=True)
    return {p.name: p.read_bytes() for p in path.iterdir()}


@pytest.mark.filterwarnings("ignore:counted as zero")
def test_merge(three, family, tmp_path, crew, one_module_a_task):
    sources = {**three, "a2": family["a2"]}  # files, and one in memory
    for method, options in JOBS.items():
        here = files(lf.merge(sources, method, **options), tmp_path / "merged")
        assert files(lf.merge(sources, method, **options, **crew), tmp_path / "merged") == here
        assert {"adapter_model.safetensors", "adapter_config.json"} <= here.keys()


def test_merge_by_workers_of_its_own(folder, tmp_path):
    two = [folder / "a1", folder / "a4"]
    here = files(lf.merge(two, "slerp"), tmp_path / "merged")
    assert files(lf.merge(two, "slerp", workers=2), tmp_path / "merged") == here


def test_merge_by_the_inputs_of_layers(folder, tmp_path, workers, one_module_a_task):
    x = torch.randn(80, 40)
    grams = {n: dict.fromkeys(SHAPES, (x + k).T @ (x + k)) for k, n in enumerate(("a1", "a2"))}
    two = [folder / "a1", folder / "a2"]
    here = files(lf.merge(two, "regmean", grams=grams), tmp_path / "merged")
    there = lf.merge(two, "regmean", grams=grams, executor=workers)
    assert files(there, tmp_path / "merged") == here


def test_merge_by_a_score_asks_it_here(folder, tmp_path, workers):
    two, asked = [folder / "a1", folder / "a2"], []

    def score(adapter):
        asked.append(adapter.norm())
        return -asked[-1]

    here = files(lf.merge(two, "lorahub", score=score, budget=4), tmp_path / "merged")
    there = lf.merge(two, "lorahub", score=score, budget=4, executor=workers)
    assert files(there, tmp_path / "merged") == here
    assert len(asked) == 8


def test_matrices_that_are_merged_at_the_same_time(folder, tmp_path):
    """Two at once in this process, each on one thread, as in a worker."""
    sources = [folder / "a1", folder / "a4"]
    found = []
    for count in (1, 3):
        with torch_has(count):
            merged = lf.merge(sources, "ties", space="delta", rank=3)
        found.append(files(merged, tmp_path / "merged"))
    assert found[0] == found[1]


@pytest.mark.filterwarnings("ignore:counted as zero")
def test_merge_goes_on_from_a_work_directory(three, tmp_path, one_module_a_task):
    here = files(lf.merge(three, "ties"), tmp_path / "merged")
    for _ in range(2):
        merged = lf.merge(three, "ties", work=tmp_path / "work")
        assert files(merged, tmp_path / "merged") == here
    assert len(list((tmp_path / "work").glob("*.done"))) == len(SHAPES)
    with pytest.raises(FileError, match="of another run"):
        lf.merge(three, "ties", density=0.2, work=tmp_path / "work")


def test_what_can_not_be_merged_is_named_by_whoever_tries(folder, crew):
    sources = [folder / "a0", folder / "a1"]  # of ranks 2 and 3
    with pytest.raises(MismatchError, match=r"module 'layers.0.q' has ranks \[2, 3\]"):
        lf.merge(sources, "ties", space="factors", **crew)


def test_progress_of_all_verbs_is_told(library, folder, workers, strips):
    three = [folder / "a0", folder / "a1", folder / "a2"]
    told = []
    options = {"progress": lambda *step: told.append(step), "executor": workers}
    lf.merge(three, **options)
    lf.similarity(three, **options)
    with lf.Library.open(library) as lib:
        lib.verify(three, **options)
    assert [step[0] for step in told if step[0] == 0] == [0, 0, 0]
    assert all(0 <= done < total for done, total, _ in told)
