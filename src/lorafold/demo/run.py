"""The demo: fold the packaged adapters, run the model with what comes back, and compare with SVD;
then move one of them to another base.

Retention of a task is (base − folded) / (base − adapter), in loss on the task's held-out text. Each
text is cut in two at a line. The first part is what `fold(retention=…)` may look at when it chooses
tolerances; every number reported comes from the second.
"""

from __future__ import annotations

import json
import re
import shlex
import shutil
import statistics
import time
from collections.abc import Callable, Mapping
from concurrent.futures import CancelledError, ThreadPoolExecutor
from pathlib import Path
from threading import Event
from typing import Any

from safetensors.torch import load_file
from safetensors.torch import save as as_safetensors
from torch import Tensor

from ..adapter import Adapter
from ..files import load, save
from ..files.atomic import new_directory
from ..files.replacing import Kind
from ..fold import Library, fold
from ..thin import thin, threads
from ..transfer import transfer
from .model import Llama, base_dir, data_dir, heldout_loss, load_base
from .truncation import svd_of, truncated

TOLERANCES = (0.05, 0.1, 0.2)
DEFAULT = 0.1  # fold's own; this library is called `lib`, and is unfolded
RETENTION = 0.98
PAIR = ("base", "wide")  # an adapter of the first is moved to the second
MOVED = "json_facts"  # this one, if it is there
PIECES, PIECE = 10, 256  # texts that moving it looks at, and characters of each
REPORT = "report.json"
DEMO = Kind(
    "what an earlier demo made",
    lambda path: (path / REPORT).is_file(),
    re.compile(re.escape(REPORT)),
    re.compile("adapters|unfolded|bases|texts|moved|lib(-.*)?"),
)

Progress = Callable[[int, int, str], None]
Row = dict[str, Any]


class Judge:
    """Runs the base model with adapters on the tasks' held-out texts.

    Args:
        names: the tasks.
        advance: called before every run of the model with the task's name.
    """

    def __init__(self, names: list[str], advance: Callable[[str], None]) -> None:
        self._config, self._state = load_base()
        texts = {n: (data_dir() / "heldout" / f"{n}.txt").read_bytes() for n in names}
        self._parts = {name: halves(text) for name, text in texts.items()}
        self._advance = advance
        self._base: dict[tuple[str, int], float] = {}

    def loss(self, name: str, adapter: Adapter | None, part: int = 1) -> float:
        """Nats per byte on the first (0) or second (1) part of a task's text; None: the base."""
        if adapter is None:
            if (name, part) not in self._base:
                self._base[name, part] = self._run(name, self._state, part)
            return self._base[name, part]
        return self._run(name, adapter.apply_to(self._state), part)

    def score(self, name: str, adapter: Adapter | None) -> float:
        """What `fold(retention=…)` maximises: minus the loss on the first part."""
        return -self.loss(name, adapter, part=0)

    def _run(self, name: str, state: dict[str, Tensor], part: int) -> float:
        self._advance(name)
        return heldout_loss(self._config, state, self._parts[name][part])


def halves(text: bytes) -> tuple[bytes, bytes]:
    """A text cut in two at the line break nearest behind its middle."""
    cut = text.find(b"\n", len(text) // 2) + 1 or len(text) // 2
    return text[:cut], text[cut:]


def run_demo(
    folder: Path,
    *,
    adapters: Path | None = None,
    tolerances: tuple[float, ...] = TOLERANCES,
    retention: float | None = RETENTION,
    pieces: int = PIECES,
    overwrite: bool = False,
    progress: Progress | None = None,
) -> dict[str, Any]:
    """Copy adapters out, fold and unfold them, and measure everything by running the model.

    Args:
        folder: to be made: `adapters/`, the libraries, `unfolded/`, `report.json`, and `bases/`
            and `texts/` to try a transfer with.
        adapters: the adapters, named like the packaged tasks; those of the package when None.
        tolerances: one library each; the one at 0.1 is unfolded.
        retention: one more library, as small as this share of each lift allows; None for none.
        pieces: how many texts moving an adapter to another base looks at; 0 to move none.
        overwrite: replace `folder`, if an earlier demo made it.
        progress: called with (done, total, what).

    Returns:
        What is written to `report.json`: `adapters`, `lift`, `files`, `rows`, `forms`,
        `init_groups`, `moved`, `next`, …

    Raises:
        FileError: something is at `folder`.
    """
    with new_directory(folder, DEMO, overwrite=overwrite) as staging:
        shutil.copytree(adapters or data_dir() / "adapters", staging / "adapters")
        shutil.copytree(data_dir() / "heldout", staging / "texts")
        for name in PAIR:
            shutil.copytree(base_dir(name), staging / "bases" / name)
        with threads(1), ThreadPoolExecutor(2) as runs:
            demo = _Demo(staging, tolerances, retention, progress, runs)
            report = {**demo.report(), "moved": demo.moved(pieces)}
        report = {"folder": str(folder), **report, "next": _next(folder, report)}
        (staging / REPORT).write_text(json.dumps(report, indent=2) + "\n", encoding="utf-8")
    return report


class _Demo:
    """One run, in the folder that holds a copy of the adapters."""

    def __init__(
        self,
        folder: Path,
        tolerances: tuple[float, ...],
        retention: float | None,
        progress: Progress | None,
        runs: ThreadPoolExecutor,
    ) -> None:
        self._runs = runs
        self.folder, self.sources = folder, folder / "adapters"
        self.names = sorted(p.name for p in self.sources.iterdir())
        # The base, the adapters, each library, two peers of some, and a search of eight at most.
        peers = 2 * (DEFAULT in tolerances) + (2 + 1 + 8) * (retention is not None)
        self._total = len(self.names) * (2 + len(tolerances) + peers)
        self._done = 0
        self._stopped = Event()
        self._progress = progress or (lambda done, total, what: None)
        self._tolerances, self._retention = tolerances, retention
        self.judge = Judge(self.names, self._advance)
        self.adapters = {name: load(self.sources / name) for name in self.names}
        self.svds = {name: svd_of(a) for name, a in self.adapters.items()}
        self.base = self._losses(dict.fromkeys(self.names))
        self.full = self._losses(self.adapters)

    def _advance(self, what: str) -> None:
        if self._stopped.is_set():
            raise CancelledError
        self._progress(min(self._done, self._total - 1), self._total, what)
        self._done += 1

    def _losses(self, adapters: Mapping[str, Adapter | None]) -> dict[str, float]:
        """Each adapter's loss on its task, two at a time."""
        losses = self._runs.map(thin(self.judge.loss), adapters, adapters.values())
        return dict(zip(adapters, losses, strict=True))

    def report(self) -> dict[str, Any]:
        """Everything but the folder."""
        numbers = sum(a.num_parameters for a in self.adapters.values())
        files = file_bytes(self.sources, self.names)
        measured = self._libraries()
        rows = [row for _, rows in measured for row in rows]
        stats = next((s for s, rows in measured if rows[0]["library"] == "lib"), measured[0][0])
        for row in rows:
            row["bits"] = 8 * row.pop("payload") / numbers
            row["times_float16"] = files["packaged"] / row["bytes"]
            row["times_float32"] = files["float32"] / row["bytes"]
        lifts = [1 - self.full[name] / self.base[name] for name in self.names]
        return {
            "adapters": len(self.names),
            "parameters": numbers,
            "base_loss": self.base,
            "adapter_loss": self.full,
            "lift": {"mean": statistics.mean(lifts), "least": min(lifts)},
            "files": files,
            "rows": rows,
            "forms": stats["forms"],
            "options": stats["options"],
            "init_groups": stats["init_groups"],
        }

    def _libraries(self) -> list[tuple[dict[str, Any], list[Row]]]:
        """Every library folded and measured, two at a time: most of the work is torch's."""
        jobs: list[tuple[str, str, dict[str, Any]]] = []
        for tolerance in self._tolerances:
            name = "lib" if tolerance == DEFAULT else f"lib-{tolerance:g}"
            jobs.append((name, f"tolerance {tolerance:g}", {"tolerance": tolerance}))
        if self._retention is not None:
            options = {"retention": self._retention, "score": self.judge.score}
            by = f"retention {self._retention:g}"
            jobs.append((f"lib-retention-{self._retention:g}", by, options))
        with ThreadPoolExecutor(2) as pool:
            # The last is the longest: it goes first.
            futures = [pool.submit(self._folded, *job) for job in reversed(jobs)]
            try:
                return [future.result() for future in reversed(futures)]
            except BaseException:
                self._stopped.set()
                raise

    def _folded(
        self, name: str, by: str, options: Mapping[str, Any]
    ) -> tuple[dict[str, Any], list[Row]]:
        fold([self.sources], self.folder / name, **options).close()
        return self._measured(self.folder / name, by)

    def _measured(self, path: Path, by: str) -> tuple[dict[str, Any], list[Row]]:
        """A library's statistics, and its row; with those of its peers where these are wanted."""
        with Library.open(path) as lib:
            errors = lib.verify(
                [self.sources]
            )  # measured against the files, and the bounds checked
            stats, nbytes = lib.stats(), lib.nbytes
            sizes = {name: _own_bytes(lib, name) for name in self.names}
            back = {name: lib[name] for name in self.names}
        if path.name == "lib":
            back = self._unfolded(back)
        row = {"by": by, "form": "fold", "library": path.name, "bytes": nbytes}
        row["payload"] = stats["bits"] * stats["parameters"] / 8
        rows = [{**row, **self._kept(back), **_spread("error", errors)}]
        if path.name == "lib" or by.startswith("retention"):
            shared = (nbytes - sum(sizes.values())) / len(self.names)
            fair = {name: size + shared for name, size in sizes.items()}
            rows += self._peers(by, errors, fair)
        return stats, rows

    def _peers(self, by: str, errors: Mapping[str, float], sizes: Mapping[str, float]) -> list[Row]:
        """Truncated SVD of each adapter at the same error, and at the same bytes."""
        cut = {
            "svd, same error": {n: truncated(s, error=errors[n]) for n, s in self.svds.items()},
            "svd, same bytes": {n: truncated(s, nbytes=sizes[n]) for n, s in self.svds.items()},
        }
        rows = []
        for form, peers in cut.items():
            size = sum(2 * a.num_parameters for a in peers.values())
            off = {n: a.distance(peers[n]) / a.norm() for n, a in self.adapters.items()}
            row = {"by": by, "form": form, "library": None, "bytes": size, "payload": size}
            rows.append({**row, **self._kept(peers), **_spread("error", off)})
        return rows

    def _unfolded(self, back: Mapping[str, Adapter]) -> dict[str, Adapter]:
        """Adapters written as PEFT directories and read again."""
        for name, adapter in back.items():
            save(adapter, self.folder / "unfolded" / name)
        return {name: load(self.folder / "unfolded" / name) for name in back}

    def _kept(self, back: Mapping[str, Adapter]) -> Row:
        base, full, losses = self.base, self.full, self._losses(back)
        kept = {n: (base[n] - loss) / (base[n] - full[n]) for n, loss in losses.items()}
        worst = min(kept, key=lambda name: kept[name])
        return {**_spread("retention", kept), "worst_task": worst, "retention": kept}

    def moved(self, pieces: int) -> dict[str, Any] | None:
        """One adapter on another base, by texts of the first half; None where none is known there.

        Lifts are shares of the base's loss on the second half; the native one, of an adapter that
        was trained there, comes with the package, and is of the whole text.
        """
        known = json.loads((base_dir(PAIR[1]) / "tasks.json").read_text())
        name = next((n for n in (MOVED, *self.names) if n in self.names and n in known), None)
        if name is None or pieces == 0:
            return None
        self._advance(name)
        first, second = halves((data_dir() / "heldout" / f"{name}.txt").read_bytes())
        text = first.decode("utf-8", "ignore")
        texts = [text[k : k + PIECE] for k in range(0, len(text), PIECE)][:pieces]
        config, state = load_base(PAIR[1])
        base = heldout_loss(config, state, second)
        found: dict[str, Any] = {"adapter": name, "to": PAIR[1], "texts": len(texts)}
        ways: dict[Any, dict[str, Any]]
        ways = {"distill": {"texts": texts, "tokenizers": "bytes"}, "svd": {}}
        for method, options in ways.items():
            start = time.perf_counter()
            pair = (Llama(side) for side in PAIR)
            there = transfer(self.adapters[name], *pair, method=method, **options).adapter
            found[f"{method} seconds"] = time.perf_counter() - start
            found[method] = 1 - heldout_loss(config, there.apply_to(state), second) / base
        found["native"] = 1 - known[name]["native_loss"] / known[name]["base_loss"]
        return found


def _spread(what: str, values: Mapping[str, float]) -> Row:
    numbers = list(values.values())
    return {
        f"{what}_mean": statistics.mean(numbers),
        f"{what}_max": max(numbers),
        f"{what}_min": min(numbers),
    }


def _own_bytes(lib: Library, name: str) -> int:
    """Bytes of an adapter's records, beside what it shares with others."""
    return int(lib.entry(name)["bytes"])


def file_bytes(folder: Path, names: list[str]) -> dict[str, int]:
    """Bytes of the adapters' directories as packaged, and as PEFT writes them by default."""
    found = {"packaged": 0, "float32": 0}
    for name in names:
        for path in (folder / name).iterdir():
            size = path.stat().st_size
            found["packaged"] += size
            if path.suffix == ".safetensors":
                wide = {key: tensor.float() for key, tensor in load_file(path).items()}
                size = len(as_safetensors(wide, {"format": "pt"}))
            found["float32"] += size
    return found


def _next(folder: Path, report: Mapping[str, Any]) -> list[str]:
    """Commands that work on what was written; the last moves an adapter to another base."""
    first = next(row for row in report["rows"] if row["form"] == "fold")
    row = next((r for r in report["rows"] if r["library"] == "lib"), first)
    lib = shlex.quote(str(folder / row["library"]))
    name = row["worst_task"]
    source = shlex.quote(str(folder / "adapters" / name))
    task = (report["moved"] or {}).get("adapter", name)
    own, moved = (shlex.quote(str(folder / p / task)) for p in ("adapters", "moved"))
    texts = shlex.quote(str(folder / "texts" / f"{task}.txt"))
    bases = [shlex.quote(str(folder / "bases" / n)) for n in PAIR]
    return [
        f"lorafold info {lib}",
        f"lorafold diff {source} {lib}:{name}",
        f"lorafold add {lib} {source} --name {name}-fine --tolerance 0.02",
        f"lorafold transfer {own} --from {bases[0]} --to {bases[1]} --texts {texts} "
        f"--method distill -o {moved}",
    ]
