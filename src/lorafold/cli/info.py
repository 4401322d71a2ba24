"""`lorafold info`: what an adapter, a folder of adapters or a library holds."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from pathlib import PurePath
from typing import TYPE_CHECKING, Any

import click

from . import _output as output
from ._command import command, settings, told
from ._library import library_facts, library_table
from ._source import adapter_options, format_option, opened
from ._subspace import show_subspace

if TYPE_CHECKING:
    from rich.console import Console

    from ..files import AdapterFile


@command("info", example="lorafold info adapters/sql")
@click.argument("paths", nargs=-1, required=True, metavar="PATH...")
@format_option
@adapter_options
def info(paths: tuple[str, ...], **options: Any) -> None:
    """Say what adapters, or a library, hold.

    One adapter is described in full, a folder of adapters (or several paths) in one line each, and
    a library by its forms, bytes and errors. With --verbose, every module.
    """
    from ..files.find import is_library, is_subspace

    if len(paths) == 1 and is_library(paths[0]):
        _library(paths[0])
        return
    if len(paths) == 1 and is_subspace(paths[0]):
        show_subspace(paths[0])
        return
    found = _places(paths)
    failures: list[str] = []
    described = []
    with output.progress("reading") as advance:
        for k, path in enumerate(found):
            advance(k, len(found), PurePath(path).name)
            if len(found) == 1:
                described.append(describe(path, opened(path, **options)))
            else:
                described.append(_described_or_error(path, failures, options))
    if len(found) == 1:
        one = described[0]
        output.report(one, lambda out: _show_one(out, one), kind="adapter", tables=["per_module"])
    else:
        many = {"adapters": described, "failed": failures}
        output.report(
            many, lambda out: _show_many(out, described), kind="adapters", tables=["per_module"]
        )
    if failures:
        from ..errors import FileError

        raise FileError(f"{len(failures)} of {len(found)} can't be read: {failures[0]}")


def _library(path: str) -> None:
    from ..fold.stats import library_stats
    from ..fold.store.catalog import Catalog

    stats = {"path": path, **library_stats(Catalog.open(path))}
    if settings().verbose:
        stats["shared"] = _shared(path)

    def show(out: Console) -> None:
        library_facts(out, stats)
        library_table(out, stats)
        if stats.get("shared"):
            output.say(out, f"\n{_shared_words(stats['shared'])}")

    output.report(stats, show, kind="library", tables=("modules",))


def _shared(lib: str) -> list[dict[str, Any]] | None:
    """What 1, 2, 4, … directions a side have of all energy, and of as many random adapters'."""
    from ..collection.sources import named_handles
    from ..compare import shared_spectrum

    handles = {n: h for n, h in named_handles(lib).items() if h.refusal is None and h.shapes}
    if len(handles) < 2:
        return None
    with output.progress("looking for what is shared") as advance:
        found = shared_spectrum(handles, progress=advance)
    most = max(len(row.energy) for row in found.rows)
    counts = [2**k for k in range(most.bit_length())]
    return [{"directions": k, "energy": found.share(k), "random": found.control(k)} for k in counts]


def _shared_words(shared: list[dict[str, Any]]) -> str:
    words = (
        f"{s['directions']}: {output.percent(s['energy'])} ({output.percent(s['random'])})"
        for s in shared
    )
    return (
        "directions that all adapters could share on each side, and the energy they would hold "
        f"(of random adapters): {'; '.join(words)}"
    )


def _places(paths: Sequence[str]) -> list[str]:
    """The adapters that paths stand for: those in a folder where it is not itself one."""
    from ..files.find import idle_among, places_at, tell_idle
    from ..files.remote.place import exists

    idle = idle_among(paths)
    found: list[str] = []
    for path in (path for path in paths if path not in idle):
        inside, more = places_at(path)
        idle += more
        alone = len(inside) == 1 and exists(path)
        found += [path] if alone else map(str, inside)
    tell_idle(idle)
    return found


def _described_or_error(path: str, failures: list[str], options: Mapping[str, Any]) -> Any:
    from ..errors import LorafoldError

    try:
        return describe(path, opened(path, **options))
    except LorafoldError as e:
        failures.append(told(e))
        return {"path": path, "error": failures[-1]}


def describe(path: str, file: AdapterFile) -> dict[str, Any]:
    """All there is to say of an adapter, in JSON's types.

    Args:
        path: as it was given.
        file: the opened adapter; its tensors are read.
    """
    from ..adapter import idle
    from ..parts import extra_kind

    adapter = file.load()
    config, refusal = adapter.config, adapter.refusal
    rslora = bool(config.get("use_rslora"))
    modules: list[dict[str, Any]] = [
        {
            "module": p,
            "shape": list(u.shape),
            "rank": u.rank,
            "alpha": _alpha(u.scale, u.rank, rslora),
            "scale": u.scale,
            "norm": u.norm() if refusal is None else None,
            "dtype": str(file.dtypes[p]).removeprefix("torch."),
            "kind": adapter.layout(p).kind,
        }
        for p, u in adapter.modules.items()
    ]
    extras: dict[str, list[str]] = {}
    for key in adapter.extras:
        extras.setdefault(extra_kind(key, config), []).append(key)
    return {
        "path": path,
        "base_model": adapter.base_model,
        "ranks": _counted(m["rank"] for m in modules),
        "alphas": _counted(m["alpha"] for m in modules),
        "scaling": "alpha/sqrt(rank)" if rslora else "alpha/rank",
        "targets": _counted(_target(m["module"]) for m in modules),
        "kinds": _counted(m["kind"] for m in modules),
        "modules": len(modules),
        "parameters": adapter.num_parameters,
        "extra_parameters": sum(t.numel() for t in adapter.extras.values()),
        "bytes": file.nbytes,
        "dtypes": _counted(m["dtype"] for m in modules),
        "norm": math.hypot(*(m["norm"] for m in modules)) if refusal is None else None,
        "init": config.get("init_lora_weights", True) if config else None,
        "extras": extras,
        "refusal": refusal,
        "idle": idle(adapter),
        "digest": adapter.digest,
        "per_module": modules,
    }


def _alpha(scale: float, rank: int, rslora: bool) -> float:
    # Back from what the config's patterns made of it: whole numbers were whole.
    alpha = scale * (math.sqrt(rank) if rslora else rank)
    return float(round(alpha)) if abs(alpha - round(alpha)) < 1e-6 * abs(alpha) else alpha


def _target(path: str) -> str:
    return path.rpartition(".")[2].partition("[")[0]


def _counted(values: Iterable[Any]) -> dict[str, int]:
    counts = Counter(values)
    keys = sorted(counts) if not all(isinstance(k, str) for k in counts) else list(counts)
    return {f"{k:g}" if isinstance(k, float) else str(k): counts[k] for k in keys}


# For people


def _init(found: Any) -> str | None:
    words = {True: "default (B = 0)", False: "random B", None: None}
    return words[found] if found is None or isinstance(found, bool) else str(found)


def _with_counts(counts: Mapping[str, int]) -> str:
    if len(counts) == 1:
        return next(iter(counts))
    return ", ".join(f"{value} ×{n}" for value, n in counts.items())


def _show_one(out: Console, d: dict[str, Any]) -> None:
    rslora = d["scaling"] != "alpha/rank"
    odd = {kind: n for kind, n in d["kinds"].items() if kind != "linear"}
    output.facts(
        out,
        [
            ("adapter", d["path"]),
            ("base", d["base_model"] or "not said"),
            ("rank", _with_counts(d["ranks"])),
            ("α", _with_counts(d["alphas"]) + (", scaled by α/√r (rsLoRA)" if rslora else "")),
            ("targets", _with_counts(d["targets"])),
            ("modules", f"{d['modules']:,}" + (f" ({_with_counts(d['kinds'])})" if odd else "")),
            ("parameters", output.count(d["parameters"])),
            ("on disk", f"{output.size(d['bytes'])}, {_with_counts(d['dtypes'])}"),
            ("norm ‖ΔW‖", d["norm"] and output.digits(d["norm"], 4)),
            ("init", _init(d["init"])),
            ("digest", d["digest"]),
        ],
    )
    if d["extras"]:
        output.say(out, f"\nbeside the factors ({output.count(d['extra_parameters'])} parameters):")
        output.facts(out, ((f"  {kind}", _keys(kind, keys)) for kind, keys in d["extras"].items()))
    if d["refusal"]:
        output.say(out, f"\nnot for ΔW algebra: {d['refusal']}")
    if d["idle"]:
        output.say(out, f"\nit does nothing: {d['idle']}")
    if settings().verbose:
        output.say(out)
        output.table(
            out,
            ["module", ">shape", ">rank", ">α", ">norm", "dtype", "kind"],
            (
                (
                    m["module"],
                    "×".join(map(str, m["shape"])),
                    m["rank"],
                    f"{m['alpha']:g}",
                    None if m["norm"] is None else output.digits(m["norm"], 4),
                    m["dtype"],
                    m["kind"],
                )
                for m in d["per_module"]
            ),
        )


def _keys(kind: str, keys: list[str]) -> str:
    """Keys of a kind that is known are counted; of the unknown, all are named."""
    most = len(keys) if kind == "unknown" or settings().verbose else 2
    return f"{len(keys):,}: {output.listed(keys, most)}"


def _show_many(out: Console, found: list[dict[str, Any]]) -> None:
    """One line each; a column in which all agree becomes a line above the table."""
    good = [d for d in found if "error" not in d]
    columns = {
        "base": [d["base_model"] for d in good],
        "rank": [output.span(map(int, d["ranks"])) for d in good],
        "α": [_alphas(d) for d in good],
        "targets": [_short(list(d["targets"])) for d in good],
        "modules": [output.count(d["modules"]) for d in good],
        "parameters": [output.count(d["parameters"]) for d in good],
        "norm": [d["norm"] and output.digits(d["norm"], 4) for d in good],
        "init": [(_init(d["init"]) or "").partition(" ")[0] or None for d in good],
        "extras": [_extras(d) for d in good],
        "dtype": [",".join(d["dtypes"]) for d in good],
        "digest": [d["digest"][:8] for d in good],
    }
    common = {title: cells[0] for title, cells in columns.items() if len(set(cells)) == 1}
    varied = {title: cells for title, cells in columns.items() if title not in common}
    numbers = {"rank", "modules", "parameters", "norm"}
    heads = [f">{t}" if t in numbers else f"{t}…" for t in varied]
    rows = zip((PurePath(d["path"]).name for d in good), *varied.values(), strict=True)
    output.table(out, ["adapter", *heads], rows)
    if common:
        same = "; ".join(f"{t} {c or 'none'}" for t, c in common.items())
        output.say(out, f"\n{output.count(len(good), 'adapter')}, all with: {same}")
    for d in found:
        if "error" in d:
            output.say(out, f"can't be read: {d['error']}")
        elif d["refusal"]:
            output.say(out, f"\n{PurePath(d['path']).name}: not for ΔW algebra: {d['refusal']}")
        elif d["idle"]:
            output.say(out, f"\n{PurePath(d['path']).name} does nothing: {d['idle']}")


def _short(targets: list[str]) -> str:
    """q_proj, v_proj as {q,v}_proj: a table has little room."""
    stems = [name.rpartition("_")[0] for name in targets]
    ends = {name.rpartition("_")[2] for name in targets}
    if len(targets) > 1 and len(ends) == 1 and all(stems):
        return "{" + ",".join(stems) + "}_" + ends.pop()
    return ",".join(targets)


def _alphas(d: Mapping[str, Any]) -> str:
    return ",".join(d["alphas"]) + (",rsLoRA" if d["scaling"] != "alpha/rank" else "")


def _extras(d: Mapping[str, Any]) -> str | None:
    kinds = (f"{len(keys)}×{kind.replace(' ', '-')}" for kind, keys in d["extras"].items())
    return ",".join(kinds) or None
