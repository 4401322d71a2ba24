"""What does a library of 100,000 names cost to open, to read from and to change?

Libraries of 1,000, 10,000 and 100,000 small adapters (2 modules of 16×16, rank 2), folded into a
folder. Of each: the seconds to open it, to read an adapter of a name from a library that was just
opened, and how many files that opens; to add and to remove one, the median and the slowest of many;
to list all names; and of `lorafold ls LIB` and `lorafold info LIB:NAME`, as commands. Then 1,000
readers of the largest in one process, and as many in 20, each of which reads one adapter, and goes
on reading what it opened after a writer has added and removed others.

At 100,000: opening, `add` and `remove` below 0.2 s, in the median; `add` and `remove` take at most
twice the processor's time of those in one of 10,000, as the manifest has a line for some 400 names;
two files opened to read an adapter.
"""

from __future__ import annotations

import contextlib
import json
import os
import resource
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from _common import arguments, report, seconds
from library_ops import family

import lorafold as lf

QUESTION = "Libraries of 1,000, 10,000 and 100,000 names: open, read, add, remove; 1,000 readers"
COUNTS, D, MODULES = (1_000, 10_000, 100_000), 16, 2
SECONDS_AT_MOST, GROWTH_AT_MOST, FILES_AT_MOST = 0.2, 2.0, 2
READERS, PROCESSES = 1_000, 20


class Opened:
    """Names of the files of a folder that are opened within a block."""

    def __init__(self) -> None:
        self._folder, self._seen = "", set[str]()
        sys.addaudithook(self._hook)

    def _hook(self, event: str, arguments: tuple[object, ...]) -> None:
        if self._folder and event == "open" and isinstance(arguments[0], str | os.PathLike):
            folder, name = os.path.split(os.fspath(arguments[0]))
            if folder == self._folder:
                self._seen.add(name)

    @contextlib.contextmanager
    def of(self, folder: Path) -> Iterator[set[str]]:
        self._folder, self._seen = str(folder), set()
        yield self._seen
        self._folder = ""


def took(fn: Any) -> tuple[float, float]:
    """Seconds of a call, and those of the processor."""
    start, of_processor = time.perf_counter(), time.process_time()
    fn()
    return time.perf_counter() - start, time.process_time() - of_processor


def medians(what: str, calls: list[tuple[float, float]]) -> dict[str, float]:
    """Of what `took` gave: the median, the slowest, and the median of the processor."""
    wall, processor = zip(*calls, strict=True)
    return {
        what: statistics.median(wall),
        f"{what}, slowest": max(wall),
        f"{what}, of the processor": statistics.median(processor),
    }


def measured(folder: Path, count: int, opened: Opened, repeats: int) -> dict[str, float]:
    """Seconds and files of each operation on a library of so many names."""
    fresh = list(family(repeats + 1, D, MODULES, seed=1).values())
    picked = [f"a{k * count // repeats}" for k in range(repeats)]
    opening = [took(lambda: lf.Library.open(folder).close()) for _ in range(repeats)]
    reading, files = [], []
    for name in picked:
        with lf.Library.open(folder) as lib:
            with opened.of(folder) as seen:
                reading.append(took(lambda lib=lib, name=name: lib[name]))
            files.append(len(seen))
    with lf.Library.open(folder) as lib:
        names = seconds(lambda: lib.names)
        assert len(lib) == len(lib.names) == count
    lib = lf.Library.open(folder)
    lib.add(fresh[repeats], "warm")
    lib.remove("warm")
    adding = [took(lambda k=k: lib.add(fresh[k], f"new{k}")) for k in range(repeats)]
    removing = [took(lambda name=name: lib.remove(name)) for name in picked]
    assert len(lib) == count
    assert lib["new0"].distance(fresh[0]) <= 0.1 * fresh[0].norm()
    lib.close()
    return {
        **medians("open", opening),
        **medians("read one", reading),
        "files to read one": max(files),
        **medians("add", adding),
        **medians("remove", removing),
        "all names": names,
        "ls": command("ls", str(folder)),
        "info": command("info", f"{folder}:new1"),
        "files": len(os.listdir(folder)),
        "manifest": (folder / "library.json").stat().st_size,
        "bytes": sum(p.stat().st_size for p in folder.iterdir()),
    }


def command(*words: str) -> float:
    """Seconds of a command."""
    whole = [sys.executable, "-m", "lorafold", *words]
    return seconds(lambda: subprocess.run(whole, check=True, stdout=subprocess.DEVNULL))


# Many readers


def read_beside_a_writer(folder: Path, readers: int, tell: Any) -> dict[str, float]:
    """Open readers, say so, wait for a word, and read through each; what that took of this process.

    Args:
        tell: called when all are open; returns when the writer is done.
    """
    before = len(os.listdir("/proc/self/fd")), memory()
    start = time.perf_counter()
    opened = [lf.Library.open(folder) for _ in range(readers)]
    opening = time.perf_counter() - start
    there = opened[0].names
    names = [there[k * len(there) // readers] for k in range(readers)]
    first = [lib[name].digest for lib, name in zip(opened, names, strict=True)]
    tell()
    for lib, name, digest in zip(opened, names, first, strict=True):
        assert lib[name].digest == digest
        assert "late" not in lib
    return {
        "seconds each": opening / readers,
        "open files": len(os.listdir("/proc/self/fd")) - before[0],
        "bytes each": (memory() - before[1]) / readers,
    }


def memory() -> int:
    """Resident bytes of this process."""
    pages = int(Path("/proc/self/statm").read_text().split()[1])
    return pages * resource.getpagesize()


def in_processes(folder: Path, change: Any) -> int:
    """`READERS` in `PROCESSES` of them, all open before the change; how many read well."""
    source = (
        "import sys; from pathlib import Path; import large_library as b\n"
        f"b.read_beside_a_writer(Path(sys.argv[1]), {READERS // PROCESSES}, "
        "lambda: (print('open', flush=True), sys.stdin.readline()))"
    )
    pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "text": True}
    where = {**os.environ, "PYTHONPATH": os.pathsep.join([str(Path(__file__).parent), *sys.path])}
    children = [
        subprocess.Popen([sys.executable, "-c", source, str(folder)], env=where, **pipes)
        for _ in range(PROCESSES)
    ]
    for child in children:
        assert child.stdout is not None
        assert child.stdout.readline() == "open\n"
    change()
    for child in children:
        child.communicate("done\n")
    return sum(child.returncode == 0 for child in children) * (READERS // PROCESSES)


def main() -> None:
    args = arguments(QUESTION, lambda p: p.add_argument("--repeats", type=int, default=100))
    torch.set_num_threads(1)
    opened, found = Opened(), {}
    with tempfile.TemporaryDirectory() as top:
        for count in COUNTS:
            folder = Path(top) / str(count)
            adapters = family(count, D, MODULES)
            folding = seconds(lambda a=adapters, to=folder: lf.fold(a, to, form="svd").close())
            del adapters
            found[count] = {"fold": folding, **measured(folder, count, opened, args.repeats)}
        (late,) = family(1, D, MODULES, seed=2).values()

        def change() -> None:
            with lf.Library.open(folder) as lib:
                lib.add(late, "late")
                lib.remove("late")
                lib.remove(lib.names[0])

        together = read_beside_a_writer(folder, READERS, change)
        apart = in_processes(folder, change)
    small, large = found[COUNTS[-2]], found[COUNTS[-1]]
    rows = [
        {"what": what, **{f"{count:,}": found[count][what] for count in COUNTS}} for what in small
    ]
    growth = {
        what: large[f"{what}, of the processor"] / small[f"{what}, of the processor"]
        for what in ("open", "read one", "add", "remove")
    }
    result = {
        **{str(count): row for count, row in found.items()},
        "growth": growth,
        "readers": {"in one process": {"readers": READERS, **together}, "in processes": apart},
        "processes": PROCESSES,
        "open files at most": resource.getrlimit(resource.RLIMIT_NOFILE)[0],
        "met": {
            "open, add, remove < 0.2 s": max(large["open"], large["add"], large["remove"])
            < SECONDS_AT_MOST,
            "add, remove ≤ 2×": max(growth["add"], growth["remove"]) <= GROWTH_AT_MOST,
            "two files": large["files to read one"] <= FILES_AT_MOST,
            "1,000 readers": apart == READERS,
        },
    }
    print(json.dumps(result["readers"]))
    report(QUESTION, rows, result, args.save)


if __name__ == "__main__":
    main()
