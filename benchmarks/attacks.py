"""What do kills, crowds of writers and overwrites do to a library and to adapters?

Kills: three processes change one library, all of them are killed at a random moment. Nothing may be
damaged, every change that was reported done must be there, and the next writer must get its turn.
Repairs: the same with a repair of a library that lost a shard. Writers: four processes change one
library as fast as they can; how many changes each gets, and how long one waits at most. Reads: an
adapter is loaded over and over while another process overwrites it; no load may have the scale of
one and the tensors of another. Mutations: every kind of file that lorafold reads is damaged at
random, `tests/attacks` over again with other seeds; each load must give what another reader makes
of the same bytes, or an error of one line. Huge: a hundred megabytes of braces where a config, a
header, a list may be.

No peer: neither safetensors nor PEFT have a collection on the disk that several processes change.
"""

from __future__ import annotations

import contextlib
import os
import random
import shutil
import signal
import statistics
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch
from _common import arguments, report

import lorafold as lf
from lorafold.errors import FileError

QUESTION = "500 kills, four writers at once, loads beside overwrites, 1,500 mutations of each file"
CORPUS = Path(__file__).parents[1] / "tests" / "attacks"
SHAPES = {"q": (16, 24), "v": (24, 16)}


def some(seed: int, scale: float = 1.0) -> lf.Adapter:
    """A small adapter."""
    g = torch.Generator().manual_seed(seed)
    return lf.Adapter(
        {
            path: lf.LowRank(
                torch.randn(2, inner, generator=g), torch.randn(out, 2, generator=g), scale
            )
            for path, (out, inner) in SHAPES.items()
        }
    )


SOURCES = {f"a{k}": some(k) for k in range(8)}


@contextlib.contextmanager
def child(operation: Callable[[int], None]) -> Iterator[tuple[int, int]]:
    """A forked process that is given where to report to; (its pid, where to read that)."""
    source, sink = os.pipe()
    pid = os.fork()
    if not pid:
        os.close(source)
        try:
            torch.set_num_threads(1)
            operation(sink)
            os._exit(0)
        except BaseException as e:  # noqa: BLE001 - a forked child must not go on
            os.write(2, f"{type(e).__name__}: {e}\n".encode())
        os._exit(1)
    os.close(sink)
    try:
        yield pid, source
    finally:
        with contextlib.suppress(ProcessLookupError, ChildProcessError):
            os.kill(pid, signal.SIGKILL)
            os.waitpid(pid, 0)
        os.close(source)


def said(source: int) -> bytes:
    """All that a child that is gone has reported."""
    parts = []
    while part := os.read(source, 1 << 16):
        parts.append(part)
    return b"".join(parts)


# Kills


def change(path: Path, who: int) -> Callable[[int], None]:
    """Adds and removes of one's own names, each reported when it is done."""

    def run(sink: int) -> None:
        lib = lf.Library.open(path, timeout=600)
        for k in range(10**6):
            lib.add(SOURCES[f"a{k % 8}"], f"{who}-{k}")
            os.write(sink, b".")
            if k >= 2:
                lib.remove(f"{who}-{k - 2}")
                os.write(sink, b".")

    return run


def names_after(who: int, steps: int) -> set[str]:
    """One's own names after so many changes."""
    found: set[str] = set()
    for k in range(steps + 1):
        for name, add in ((f"{who}-{k}", True), (f"{who}-{k - 2}", False)):
            if not add and k < 2:
                continue
            if steps == 0:
                return found
            steps -= 1
            found = found | {name} if add else found - {name}
    return found


def kills(folder: Path, count: int, writers: int = 3, seed: int = 0) -> dict[str, int]:
    """Kill all writers of a library at once, `count` times; what was found."""
    moments, pace = random.Random(seed), 0.05
    lf.fold({n: SOURCES[n] for n in ("a0", "a1", "a2")}, folder / "start", tolerance=0.1).close()
    changes = torn = 0
    for run in range(count):
        path = shutil.copytree(folder / "start", folder / f"kill{run}")
        with contextlib.ExitStack() as stack:
            began = time.monotonic()
            them = [stack.enter_context(child(change(path, who))) for who in range(writers)]
            first = moments.randrange(4)
            for _ in range(first):  # then all have begun, however slow the machine is
                for _, source in them:
                    assert os.read(source, 1), "a writer failed"
            if first:
                pace = (time.monotonic() - began) / first
            time.sleep(moments.random() * pace)
            for pid, _ in moments.sample(them, len(them)):
                os.kill(pid, signal.SIGKILL)
                os.waitpid(pid, 0)
            steps = [first + len(said(source)) for _, source in them]
        with lf.Library.open(path, timeout=60) as lib:
            lib.verify()
            for who, done in enumerate(steps):
                mine = {name for name in lib if name.startswith(f"{who}-")}
                assert mine in (names_after(who, done), names_after(who, done + 1)), (mine, done)
                torn += mine != names_after(who, done)
            assert {"a0", "a1", "a2"} <= set(lib)
            assert all(lib[name].norm() > 0 for name in lib)
            lib.add(SOURCES["a3"], "next")
            kept = {*lib.contents.state.files, "library.json", ".library.json.gz", ".lock"}
        assert set(os.listdir(path)) == kept, "something was left over"
        changes += sum(steps)
        shutil.rmtree(path)
    return {"kills": count * writers, "changes": changes, "done but not reported": torn}


def repairs(folder: Path, count: int, seed: int = 0) -> dict[str, int]:
    """Kill the repair of a library that lost a shard, `count` times."""
    moments, pace, done = random.Random(seed), 0.1, 0
    start = folder / "damaged"
    with lf.fold({n: SOURCES[n] for n in ("a0", "a1", "a2")}, start, form="input") as lib:
        for name in ("a3", "a4", "a5"):
            lib.add(SOURCES[name], name)
        shards = [start / lib.entry(name)["shard"] for name in ("a1", "a4")]
    for shard in shards:
        raw = shard.read_bytes()
        shard.write_bytes(raw[:-9] + bytes([raw[-9] ^ 1]) + raw[-8:])
    with lf.Library.open(start) as lib:
        checks = lib.verify(strict=False)
    sound = {name for name, check in checks.items() if check.problem is None}
    assert 0 < len(sound) < len(checks)
    for run in range(count):
        path = shutil.copytree(start, folder / f"repair{run}")
        began = time.monotonic()
        with child(lambda sink, path=path: lf.fold.repair(path, SOURCES) and None) as (pid, _):  # type: ignore[misc]
            if run % 10 == 0:  # to see how long one takes
                os.waitpid(pid, 0)
                pace = time.monotonic() - began
            else:
                time.sleep(moments.random() * pace)
                os.kill(pid, signal.SIGKILL)
                os.waitpid(pid, 0)
        with lf.Library.open(path) as lib:
            assert set(lib) == set(checks)
            assert all(lib[name].norm() > 0 for name in sound)
        done += not lf.fold.repair(path, SOURCES).damage
        with lf.Library.open(path) as lib:
            lib.verify({name: SOURCES[name] for name in lib})
            assert set(lib) == set(checks)
        shutil.rmtree(path)
    return {"repairs killed": count, "of which it was done": done}


# Crowds


def writers(folder: Path, duration: float, count: int = 4) -> dict[str, Any]:
    """Change one library from `count` processes for so many seconds."""
    path = folder / "crowd"
    lf.fold({"a0": SOURCES["a0"]}, path, tolerance=0.1).close()

    def run(who: int) -> Callable[[int], None]:
        def operation(sink: int) -> None:
            lib = lf.Library.open(path, timeout=600)
            end = time.monotonic() + duration
            k = 0
            while time.monotonic() < end:
                began = time.monotonic()
                if k % 2:
                    lib.remove(f"{who}-{k - 1}")
                else:
                    lib.add(SOURCES["a1"], f"{who}-{k}")
                k += 1
                os.write(sink, b"%d\n" % int(1e6 * (time.monotonic() - began)))

        return operation

    with contextlib.ExitStack() as stack:
        them = [stack.enter_context(child(run(who))) for who in range(count)]
        reports = [said(source) for _, source in them]
    waits = [[int(line) / 1e6 for line in text.split()] for text in reports]
    with lf.Library.open(path) as lib:
        lib.verify()
    return {
        "changes": [len(w) for w in waits],
        "longest_s": max(max(w) for w in waits),
        "median_s": statistics.median(wait for found in waits for wait in found),
    }


def reads(folder: Path, duration: float) -> dict[str, int]:
    """Load an adapter while another process overwrites it."""
    path = folder / "adapter"

    def numbered(k: int) -> lf.Adapter:
        u = lf.LowRank(torch.full((1, 64), float(k)), torch.ones(64, 1), float(k))
        return lf.Adapter({"q": u}, config={"r": 1, "lora_alpha": k, "peft_type": "LORA"})

    lf.save(numbered(1), path)

    def overwrite(sink: int) -> None:
        k = 1
        while True:
            k = k % 1000 + 1
            lf.save(numbered(k), path, overwrite=True)
            os.write(sink, b".")

    loads = mixed = failed = 0
    with child(overwrite) as (pid, source):
        assert os.read(source, 1)
        end = time.monotonic() + duration
        while time.monotonic() < end:
            try:
                u = lf.load(path)["q"]
            except FileError:
                failed += 1
                continue
            loads += 1
            mixed += u.scale != float(u.A[0, 0])
        os.kill(pid, signal.SIGKILL)
        os.waitpid(pid, 0)
        saves = 1 + len(said(source))
    return {"loads": loads, "overwrites": saves, "mixed": mixed, "failed": failed}


# Files


def mutations(folder: Path, count: int, seed: int = 0) -> dict[str, Any]:
    """Read `count` mutations of each kind of file; how often each verdict was given, and faults."""
    sys.path.insert(0, str(CORPUS))
    import corpus

    verdicts: dict[str, dict[str, int]] = {}
    faults: list[str] = []
    for name in corpus.KINDS:
        place = folder / name
        place.mkdir()
        began = time.monotonic()
        counts, found = corpus.attacked(name, count, place, seed)
        verdicts[name] = dict(counts)
        faults += [f"{name} {n}: {did}: {v.word}: {v.reason}" for n, did, v in found]
        print(f"{name}: {dict(counts)}, {time.monotonic() - began:.0f} s", flush=True)
    for fault in faults:
        print(fault)
    return {"each": count, "seed": seed, "verdicts": verdicts, "faults": len(faults)}


def huge(folder: Path, size: int = 100_000_000) -> dict[str, Any]:
    """Files of braces: what reading each took at most, beyond what was there."""
    sys.path.insert(0, str(CORPUS))
    import judge

    braces = b"[" + b"{}," * (size // 3) + b"{}]"
    config = b'{"r": 2, "lora_alpha": 4, "x": ' + braces + b"}"
    rows: dict[str, float] = {"seconds": 0.0, "bytes": 0}
    lf.save(SOURCES["a0"], folder / "huge")
    for name, data in (
        ("adapter_config.json", config),
        ("adapter_model.safetensors", len(config).to_bytes(8, "little") + config),
    ):
        file = folder / "huge" / name
        before = file.read_bytes()
        file.write_bytes(data)
        began = time.perf_counter()
        with judge.limited() as used, contextlib.suppress(FileError):
            lf.load(folder / "huge")
            raise AssertionError("it was read")
        rows["seconds"] = max(rows["seconds"], time.perf_counter() - began)
        rows["bytes"] = max(rows["bytes"], used[0])
        file.write_bytes(before)
    return rows


def main() -> None:
    """Attack, print, keep."""
    torch.set_num_threads(1)
    args = arguments(
        QUESTION,
        lambda p: (
            p.add_argument("--kills", type=int, default=500, help="processes to kill"),
            p.add_argument("--seconds", type=float, default=25, help="of the crowds"),
            p.add_argument("--mutations", type=int, default=1500, help="of each kind of file"),
            p.add_argument("--seed", type=int, default=0, help="of the mutations"),
        ),
    )
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        killed = kills(folder, -(-args.kills // 3))
        repaired = repairs(folder, max(args.kills // 5, 1))
        crowd = writers(folder, args.seconds)
        read = reads(folder, args.seconds)
        files = mutations(folder, args.mutations, args.seed)
        large = huge(folder)
    rows = [
        {"attack": "writers killed", "times": killed["kills"], "lost or damaged": 0},
        {"attack": "repairs killed", "times": repaired["repairs killed"], "lost or damaged": 0},
        {
            "attack": "loads beside overwrites",
            "times": read["loads"],
            "lost or damaged": read["mixed"],
        },
        {"attack": "changes by four at once", "times": sum(crowd["changes"]), "lost or damaged": 0},
        {
            "attack": "mutated files read",
            "times": sum(sum(found.values()) for found in files["verdicts"].values()),
            "lost or damaged": files["faults"],
        },
    ]
    result = {"kills": killed, "repairs": repaired, "writers": crowd, "reads": read}
    result |= {"mutations": files, "huge": large, "rows": rows}
    report(QUESTION, rows, result, save=args.save)
    fair = min(crowd["changes"]) >= 0.8 * max(crowd["changes"])
    whole = read["mixed"] == read["failed"] == files["faults"] == 0
    bounded = large["seconds"] < 2 and large["bytes"] < 256 << 20
    sys.exit(0 if whole and fair and bounded else "an attack succeeded")


if __name__ == "__main__":
    main()
