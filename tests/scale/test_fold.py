"""One library, byte for byte, whoever folds it; runs that are ended go on."""

import os
import shutil
import signal
import subprocess
import sys
import time
from concurrent.futures import Executor, Future, ProcessPoolExecutor, ThreadPoolExecutor
from multiprocessing import get_context
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

import lorafold as lf
from lorafold import FileError, MismatchError
from lorafold.fold.passes.coder import Coder

D, RANK, MODULES = 48, 4, 5
OPTIONS = {
    "auto": {"memory": "2MiB"},
    "shared": {"form": "shared", "rank": 12, "bits": 4, "memory": "2MiB"},
    "flat": {"form": "flat", "tolerance": 0.3, "memory": "2MiB"},
    "svd": {"form": "svd", "tolerance": 0.02, "memory": "2MiB"},
}


@pytest.fixture(scope="session")
def many(tmp_path_factory):
    """Forty adapters in four groups of one start each; two more are stored as they are."""
    folder = tmp_path_factory.mktemp("many")
    g = torch.Generator().manual_seed(0)
    first = torch.randn(4, MODULES, RANK, D, generator=g)
    config = {"peft_type": "LORA", "r": RANK, "lora_alpha": RANK, "target_modules": ["q"]}
    for i in range(42):
        modules = {}
        for m in range(MODULES):
            if (i + m) % 9 == 0:
                continue  # not all have all modules
            A = first[i % 4, m] + 0.1 * torch.randn(RANK, D, generator=g)
            B = torch.randn(2 * D if m % 2 else D, RANK, generator=g)
            modules[f"layers.{m}.q"] = lf.LowRank(A, B)
        given = {**config, "use_dora": True} if i >= 40 else config
        extras = {}
        if i >= 40:
            extras = {
                f"base_model.model.{p}.lora_magnitude_vector.weight": torch.rand(u.shape[0])
                for p, u in modules.items()
            }
        lf.save(lf.Adapter(modules, extras, config=given), folder / f"a{i:02d}")
    return folder


def contents(path):
    return {p.name: p.read_bytes() for p in Path(path).iterdir() if not p.name.startswith(".lock")}


@pytest.fixture(scope="session")
def serial(many, tmp_path_factory):
    """What one process makes of each set of options."""
    found = {}
    for name, options in OPTIONS.items():
        path = tmp_path_factory.mktemp("serial") / "lib"
        lf.fold(many, path, **options).close()
        found[name] = contents(path)
    return found


@pytest.mark.parametrize("name", OPTIONS)
def test_local_workers_make_the_same_bytes(many, serial, tmp_path, name):
    with lf.fold(many, tmp_path / "lib", workers=2, **OPTIONS[name]) as lib:
        assert len(lib) == 42
    assert contents(tmp_path / "lib") == serial[name]


@pytest.mark.parametrize("name", ["auto", "shared"])
def test_dask_makes_the_same_bytes(many, serial, tmp_path, name, dask):
    lf.fold(many, tmp_path / "lib", executor=dask, **OPTIONS[name]).close()
    assert contents(tmp_path / "lib") == serial[name]


@pytest.mark.parametrize("name", ["auto", "shared"])
def test_ray_makes_the_same_bytes(many, serial, tmp_path, name, ray):
    lf.fold(many, tmp_path / "lib", executor="ray", **OPTIONS[name]).close()
    assert contents(tmp_path / "lib") == serial[name]


@pytest.mark.parametrize("name", OPTIONS)
def test_threads_and_a_work_directory_make_the_same_bytes(many, serial, tmp_path, name):
    with ThreadPoolExecutor(2) as threads:
        lf.fold(many, tmp_path / "threads", executor=threads, **OPTIONS[name]).close()
    assert contents(tmp_path / "threads") == serial[name]
    lf.fold(many, tmp_path / "here", work=tmp_path / "work", **OPTIONS[name]).close()
    assert contents(tmp_path / "here") == serial[name]


def test_adapters_in_memory_and_in_libraries_travel(many, serial, tmp_path):
    adapters = {p.name: lf.load(p) for p in sorted(many.iterdir())}
    with (
        lf.fold(adapters, tolerance=0) as exact,
        ThreadPoolExecutor(2) as threads,
        lf.fold(adapters, tmp_path / "own", tolerance=0),
    ):
        for sources in (adapters, exact, [str(tmp_path / "own")]):
            here, there = (
                lf.fold(sources, tmp_path / name, memory="2MiB", overwrite=True, **more)
                for name, more in (("here", {}), ("there", {"executor": threads}))
            )
            here.close()
            there.close()
            assert contents(tmp_path / "here") == contents(tmp_path / "there")


def test_modules_that_are_coded_together_make_the_same_bytes(many, tmp_path, monkeypatch):
    """Blocks of a few adapters and room for several modules, as where adapters are large."""
    monkeypatch.setattr("lorafold.collection.collection._TOGETHER", 1)
    told = []
    real = Coder.together

    def spy(self, parts, *args):
        told.append(len(parts))
        return real(self, parts, *args)

    monkeypatch.setattr(Coder, "together", spy)
    options = {"form": "svd", "tolerance": 0.1}
    with lf.fold(many, tmp_path / "here", **options) as lib:
        assert lib.verify(many) == pytest.approx({n: lib.error(n) for n in lib.names}, rel=1e-3)
        assert all(lib.error(n) <= 0.1 for n in lib.names)
    assert max(told) > 1
    assert len(told) > 10
    for executor, name in ((ThreadPoolExecutor(2), "threads"), (None, "workers")):
        more = {"workers": 2} if executor is None else {"executor": executor}
        lf.fold(many, tmp_path / name, **options, **more).close()
        assert contents(tmp_path / name) == contents(tmp_path / "here")


def test_refold_by_workers_makes_the_same_bytes(many, tmp_path):
    lf.fold(many, tmp_path / "one", memory="2MiB").close()
    shutil.copytree(tmp_path / "one", tmp_path / "two")
    with lf.Library.open(tmp_path / "one") as lib:
        lib.refold(0.3, memory="2MiB")
    with lf.Library.open(tmp_path / "two") as lib:
        lib.refold(0.3, memory="2MiB", workers=2)
    assert contents(tmp_path / "one") == contents(tmp_path / "two")


def test_progress_is_told_over_blocks(many, tmp_path):
    told = []
    lf.fold(many, workers=2, memory="2MiB", progress=lambda *said: told.append(said)).close()
    stages = [stage for _, _, stage in told]
    assert stages == sorted(stages)  # measuring, then writing
    done = [k for k, _, _ in told]
    assert done == sorted(done)
    assert {total for _, total, _ in told} == {told[-1][1]}


# Runs that are ended

_PROGRAM = """
import sys, lorafold as lf
lf.fold(sys.argv[1], sys.argv[2], memory="2MiB", work=sys.argv[3], overwrite=True, {more})
"""


@pytest.mark.parametrize("more", ["", "workers=2"])
def test_a_killed_run_goes_on_and_ends_in_the_same_bytes(many, serial, tmp_path, more):
    work, lib = tmp_path / "work", tmp_path / "lib"
    command = [sys.executable, "-c", _PROGRAM.format(more=more), str(many), str(lib), str(work)]
    ends, seen = 0, set()
    for kill_at in (1, 4, 9):
        process = subprocess.Popen(command, start_new_session=True)
        while process.poll() is None:
            done = set(work.glob("*.done")) if work.is_dir() else set()
            if len(done) >= kill_at:
                os.killpg(process.pid, signal.SIGKILL)
                break
            time.sleep(0.005)
        process.wait()
        ends += process.returncode == -signal.SIGKILL
        assert seen <= set(work.glob("*.done"))  # what was done stays
        seen = set(work.glob("*.done"))
    assert ends, "no run was ended before it was done"
    times = {p.name: p.stat().st_mtime_ns for p in seen}
    subprocess.run(command, check=True)
    assert contents(lib) == serial["auto"]
    assert times.items() <= {p.name: p.stat().st_mtime_ns for p in work.glob("*.done")}.items()


def test_a_work_directory_of_other_options_or_adapters_is_refused(many, tmp_path):
    some = [many / f"a{i:02d}" for i in range(6)]
    lf.fold(some, work=tmp_path / "w").close()
    lf.fold(some, work=tmp_path / "w").close()
    with pytest.raises(FileError, match="work directory of another run"):
        lf.fold(some, work=tmp_path / "w", tolerance=0.2)
    with pytest.raises(FileError, match="work directory of another run"):
        lf.fold(some[1:], work=tmp_path / "w")


def test_a_source_that_changed_meanwhile_is_measured_anew(many, tmp_path):
    shutil.copytree(many / "a00", tmp_path / "in/a")
    shutil.copytree(many / "a01", tmp_path / "in/b")
    lf.fold(tmp_path / "in", tmp_path / "lib", work=tmp_path / "w").close()
    lf.save(2.0 * lf.load(tmp_path / "in/a"), tmp_path / "in/a", overwrite=True)
    with pytest.raises(FileError, match="work directory of another run"):
        lf.fold(tmp_path / "in", tmp_path / "lib", work=tmp_path / "w", overwrite=True)


# Broken adapters


@pytest.fixture
def broken(many, tmp_path):
    """Three sound adapters, one cut, one with NaN, one that is none."""
    for i in range(3):
        shutil.copytree(many / f"a{i:02d}", tmp_path / f"in/s{i}")
    shutil.copytree(many / "a03", tmp_path / "in/cut")
    file = tmp_path / "in/cut/adapter_model.safetensors"
    file.write_bytes(file.read_bytes()[:-9])
    bad = lf.load(many / "a04")
    path, u = next(iter(bad.modules.items()))
    A = u.A.clone()
    A[0, 0] = float("nan")
    tensors = {}
    for p, v in bad.modules.items():
        tensors[f"base_model.model.{p}.lora_A.weight"] = A if p == path else v.A
        tensors[f"base_model.model.{p}.lora_B.weight"] = v.B
    from safetensors.torch import save_file

    shutil.copytree(many / "a04", tmp_path / "in/nan")
    save_file(tensors, tmp_path / "in/nan/adapter_model.safetensors")
    (tmp_path / "in/odd").mkdir()
    (tmp_path / "in/odd/adapter_config.json").write_text("{")
    (tmp_path / "in/odd/adapter_model.safetensors").write_bytes(b"no")
    return tmp_path / "in"


@pytest.mark.parametrize("workers", [None, 2])
def test_keep_going_leaves_out_what_cannot_be_read(broken, tmp_path, workers):
    with pytest.raises(lf.LorafoldError):
        lf.fold(broken, workers=workers)
    told = {}
    with lf.fold(broken, tmp_path / "lib", workers=workers, keep_going=told.setdefault) as lib:
        assert lib.names == ["s0", "s1", "s2"]
        assert lib.verify()
    assert sorted(told) == ["cut", "nan", "odd"]
    assert "NaN" in str(told["nan"])
    lf.fold([broken / f"s{i}" for i in range(3)], tmp_path / "sound").close()
    assert contents(tmp_path / "lib") == contents(tmp_path / "sound")


def test_keep_going_warns_of_each(broken):
    with pytest.warns(UserWarning, match="is left out") as caught:
        assert len(lf.fold(broken, keep_going=True)) == 3
    assert sorted(str(w.message).split()[0] for w in caught) == ["cut", "nan", "odd"]


def test_keep_going_with_nothing_left_is_an_error(broken):
    with (
        pytest.warns(UserWarning, match="is left out"),
        pytest.raises(MismatchError, match="none can be"),
    ):
        lf.fold([broken / "cut", broken / "odd"], keep_going=True)


def test_what_was_damaged_on_the_disk_is_made_anew(many, serial, tmp_path):
    lf.fold(many, tmp_path / "lib", work=tmp_path / "w", **OPTIONS["auto"]).close()
    for k, path in enumerate(sorted((tmp_path / "w").glob("*.done"))):
        path.write_bytes(b"" if k % 2 else path.read_bytes()[:-1] + b"?")
    lf.fold(many, tmp_path / "again", work=tmp_path / "w", **OPTIONS["auto"]).close()
    assert contents(tmp_path / "again") == serial["auto"]


# Where the work is done, and how it ends


def test_relative_paths_are_read_by_workers_elsewhere(many, serial, tmp_path, monkeypatch):
    monkeypatch.chdir(many.parent)
    with ProcessPoolExecutor(2, get_context("spawn"), os.chdir, (os.fspath(tmp_path),)) as pool:
        lf.fold(f"{many.name}/*", tmp_path / "lib", executor=pool, **OPTIONS["auto"]).close()
        again = lf.fold(many.name, tmp_path / "in", tolerance=0.1)
        monkeypatch.chdir(tmp_path)
        assert lf.Library.open("in").verify(many, executor=pool) == again.verify(many)
    assert contents(tmp_path / "lib") == serial["auto"]


@pytest.mark.parametrize("work", ["memory://w", "s3://b/w", "", b"w", 5])
def test_a_work_directory_that_is_no_folder_is_refused(many, work):
    with pytest.raises(MismatchError, match="work must be a folder that all workers see"):
        lf.fold(many, work=work)


@pytest.mark.parametrize("inside", ["lib", "lib/w"])
def test_a_work_directory_in_the_library_is_refused(many, tmp_path, inside):
    with pytest.raises(FileError, match="lies in, the library that is to be written"):
        lf.fold(many, tmp_path / "lib", work=tmp_path / inside)
    assert not (tmp_path / "lib").exists()
    lib = lf.fold(many, tmp_path / "lib")
    before = contents(tmp_path / "lib")
    with pytest.raises(FileError, match="lies in, the library that is to be written"):
        lib.refold(tolerance=0.2, work=tmp_path / inside)
    assert contents(tmp_path / "lib") == before


def test_an_error_ends_a_process_as_errors_do(many, tmp_path):
    """Not within torch, by a signal, as the thread that works here may still be under way."""
    for i in range(12):
        shutil.copytree(many / f"a{i:02d}", tmp_path / f"in/a{i:02d}")
    broken = load_file(tmp_path / "in/a03/adapter_model.safetensors")
    next(iter(broken.values()))[0, 0] = torch.nan
    save_file(broken, tmp_path / "in/a03/adapter_model.safetensors")
    command = [sys.executable, "-m", "lorafold", "fold", str(tmp_path / "in"), "-q"]
    for k in range(3):
        more = ["-o", str(tmp_path / f"lib{k}"), "--memory", "1MiB", "--workers", "2"]
        found = subprocess.run([*command, *more], check=False, capture_output=True, text=True)
        assert found.returncode == 2
        assert "a03" in found.stderr
        assert len(found.stderr.splitlines()) == 1


def test_ctrl_c_says_so_in_a_line(many, tmp_path):
    command = [sys.executable, "-m", "lorafold", "fold", str(many), "-q", "--memory", "1MiB"]
    more = ["-o", str(tmp_path / "lib"), "--workers", "3", "--work", str(tmp_path / "w")]
    process = subprocess.Popen(
        [*command, *more], stderr=subprocess.PIPE, text=True, start_new_session=True
    )
    while process.poll() is None and not list((tmp_path / "w").glob("*.task")):
        time.sleep(0.01)
    os.killpg(process.pid, signal.SIGINT)
    stderr = process.communicate()[1]
    assert process.returncode == 2
    assert stderr.split("\n")[-2:] == ["error: interrupted", ""]
    assert "Traceback" not in stderr


class Odd(Executor):
    """Takes tasks in a way of its own."""

    def __init__(self, submitted):
        self._submitted = submitted

    def submit(self, fn, /, *args, **kwargs):
        return self._submitted()


def raising():
    raise ValueError("boo")


def done(result):
    future = Future()
    future.set_result(result)
    return lambda: future


@pytest.mark.parametrize(
    ("submitted", "message"),
    [
        (raising, "the executor takes no tasks: boo"),
        (lambda: 1 / 0, "the executor takes no tasks: division by zero"),
        (lambda: next(iter(())), "the executor takes no tasks: StopIteration"),
        (lambda: None, "submit gives no Future, but None"),
        (lambda: "x", "submit gives no Future, but 'x'"),
        (done(b"junk"), "gives back what no task gave: b'junk'"),
        (done(5), "gives back what no task gave: 5"),
    ],
)
def test_odd_executors_are_told(many, submitted, message):
    with pytest.raises(FileError, match=message):
        lf.fold(many, executor=Odd(submitted))
