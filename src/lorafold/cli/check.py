"""`lorafold check`: does an adapter fit its base, by names and shapes alone?"""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

import click

from . import _output as output
from ._command import CheckFailed, command, settings
from ._source import adapter_options, opened

if TYPE_CHECKING:
    from rich.console import Console
    from torch import Tensor

    from ..adapter import Layout
    from ..files import AdapterFile
    from ..files.base import Base

# What a reader that knows only W + scale · B A of linear layers makes of the rest.
_IGNORED = {
    "dora magnitude": "the magnitudes decide the length of every weight's column",
    "lora bias": "added to the layer's bias",
    "bias": "replaces a bias of the base",
    "saved module": "replaces a module of the base",
    "trained tokens": "replaces rows of an embedding",
    "grouped convolution": "not one product B A",
    "base weight": "replaces a weight of the base",
    "training state": "of training alone, no part of the effect",
    "unknown": "not understood here either",
}
_REMEDY = "'resize --tolerance 0 --pad' writes a form without"
_MAY_BE_NEW = {"saved module"}  # may be new: a classifier that the base doesn't have


@command("check", example="lorafold check adapters/sql --base base")
@click.argument("adapter", metavar="ADAPTER")
@click.option("--base", required=True, metavar="DIR", help="The base model's folder.")
@adapter_options
def check(adapter: str, base: str, **options: Any) -> None:
    """Check an adapter's names and shapes against its base.

    Reads the headers of the base's safetensors files and no weights. Tells what matches nothing or
    has the wrong shape (exit status 1), modules of the same kinds that the adapter doesn't touch,
    and what a reader that knows plain ΔW only would ignore.
    """
    file = opened(adapter, **options)
    found = checked(adapter, file, base)
    output.report(found, lambda out: _show(out, found))
    if not found["ok"]:
        wrong, unmatched = len(found["wrong_shape"]), len(found["unmatched"])
        raise CheckFailed(f"{unmatched} without a match in {base}, {wrong} of the wrong shape")


def checked(name: str, file: AdapterFile, base_path: str) -> dict[str, Any]:
    """The comparison, in JSON's types."""
    from ..files.base import kind, read_base

    plain = _unreplicated(file.config)
    base = read_base(base_path, [plain(_owner(p, file.layouts.get(p))) for p in file.shapes])
    results: dict[str, list[Any]] = {"unmatched": [], "wrong_shape": [], "unchecked": []}
    touched = set()
    for path, (out, inner, _) in file.shapes.items():
        layout = file.layouts.get(path)
        owner = plain(_owner(path, layout))
        touched.add(owner)
        status, detail = _module_fit(base, owner, layout, (out, inner))
        if status == "unmatched":
            results[status].append(path)
        elif status != "right":
            results[status].append({"name": path, **detail})
    new = _check_extras(base, file, results)
    kinds = {kind(owner) for owner in touched}
    missing = [m for m in dict.fromkeys(base.modules()) if kind(m) in kinds and m not in touched]
    return {
        "adapter": name,
        "base": base_path,
        "ok": not results["unmatched"] and not results["wrong_shape"],
        "modules": len(file.shapes),
        "prefix": base.prefix or None,
        **results,
        "new": new,
        "untouched": missing,
        "layers_to_transform": file.config.get("layers_to_transform"),
        "ignored": _ignored(file),
        "refusal": file.refusal,
    }


def _owner(path: str, layout: Layout | None) -> str:
    """The module, or for experts the parameter, that the base has under its name."""
    if layout is not None and layout.kind == "expert" and path.endswith("]"):
        return path.rpartition("[")[0]
    return path


def _unreplicated(config: Mapping[str, Any]) -> Any:
    """From a layer's number among replicas (`layer_replication`) to the one in the file."""
    ranges = config.get("layer_replication") or []
    numbers = [n for start, stop in ranges for n in range(start, stop)]

    def plain(path: str) -> str:
        match = re.match(r"(.*?\.|)(\d+)(\..*)", path)
        if not numbers or match is None or int(match[2]) >= len(numbers):
            return path
        return f"{match[1]}{numbers[int(match[2])]}{match[3]}"

    return plain


def _module_fit(
    base: Base, owner: str, layout: Layout | None, shape: tuple[int, int]
) -> tuple[str, dict[str, Any]]:
    """("right", "unmatched", "wrong_shape" or "unchecked", what was found)."""
    expert = layout is not None and layout.kind == "expert"
    parameter = "weight" if layout is None else layout.parameter
    key = base.named(owner if expert else f"{owner}.{parameter}".lstrip("."))
    entry = base.entries.get(key)
    tied = base.embedding() if owner.rpartition(".")[2] == "lm_head" else None
    if entry is None and tied is not None:
        entry = base.entries[tied]
    if entry is None:
        parent = owner.rpartition(".")[0] if expert else owner
        if base.below(parent):
            reason = "the base stores this module in another form (quantised, or split)"
            return "unchecked", {"reason": reason}
        return "unmatched", {}
    if not entry.dtype.is_floating_point:
        return "unchecked", {"reason": f"the base stores {entry.dtype}"}
    expected = _weight_shapes(layout, shape)
    if tuple(entry.shape) in expected:
        return "right", {}
    return "wrong_shape", {"expected": list(expected[0]), "found": list(entry.shape)}


def _weight_shapes(layout: Layout | None, shape: tuple[int, int]) -> list[tuple[int, ...]]:
    """Shapes of the weight that an update (out, in) fits; layers may store either orientation."""
    out, inner = shape
    if layout is None or layout.kind == "linear":
        return [(out, inner), (inner, out)]
    if layout.kind == "embedding":
        return [(inner, out)]
    if layout.kind == "conv":
        return [(out, *layout.kernel)]
    count = layout.expert[1] if layout.expert else 1
    shapes: list[tuple[int, ...]] = [(count, out, inner), (count, inner, out)]
    return shapes + ([shape, shape[::-1]] if count == 1 else [])


def _check_extras(base: Base, file: AdapterFile, results: dict[str, list[Any]]) -> list[str]:
    """Sort extras into the results; those that are new in the adapter are returned."""
    from ..parts import extra_kind, extra_places

    new = []
    for key, tensor in file.read_extras().items():
        what = extra_kind(key, file.config)
        if what in ("dora magnitude", "grouped convolution", "training state"):
            continue  # beside factors, and checked with them
        names = extra_places(key, file.config)
        found = next((n for n in names if base.named(n) in base.entries), None)
        if found is None:
            if _is_tied(base, names):
                continue
            if what in _MAY_BE_NEW or "original_module" in key:
                new.append(key)
            else:
                results["unmatched"].append(key)
        else:
            shape = base.entries[base.named(found)].shape
            if not _extra_fits(what, tensor, shape):
                detail = {"expected": list(tensor.shape), "found": list(shape)}
                results["wrong_shape"].append({"name": key, **detail})
    return new


def _is_tied(base: Base, names: list[str]) -> bool:
    return any(n.endswith("lm_head.weight") for n in names) and base.embedding() is not None


def _extra_fits(what: str, tensor: Tensor, shape: tuple[int, ...]) -> bool:
    if what == "trained tokens":
        return tuple(tensor.shape[1:]) == tuple(shape[1:]) and len(tensor) <= shape[0]
    return tuple(tensor.shape) == tuple(shape)


def _ignored(file: AdapterFile) -> list[dict[str, Any]]:
    """What readers that know plain ΔW only leave out or get wrong."""
    from collections import Counter

    from ..parts import extra_kind

    rows = []
    for what, n in Counter(extra_kind(key, file.config) for key in file.extra_keys).items():
        rows.append({"what": what, "count": n, "why": _IGNORED[what]})
    layouts = Counter(str(layout.kind) for layout in file.layouts.values())
    layouts.pop("linear", None)
    why = "an update of no linear layer, which many readers leave out"
    rows += [{"what": name, "count": n, "why": why} for name, n in layouts.items()]
    for field in ("rank_pattern", "alpha_pattern"):
        if file.config.get(field):
            why = f"vLLM and others ignore patterns and get these scales wrong; {_REMEDY}"
            rows.append({"what": field, "count": len(file.config[field]), "why": why})
    if file.config.get("fan_in_fan_out"):
        why = "the base stores these weights transposed"
        rows.append({"what": "fan_in_fan_out", "count": len(file.shapes), "why": why})
    if file.config.get("use_rslora"):
        why = f"the scale is α/√r; readers of α/r make it too small; {_REMEDY}"
        rows.append({"what": "use_rslora", "count": len(file.shapes), "why": why})
    return rows


# For people


def _show(out: Console, d: Mapping[str, Any]) -> None:
    wrong = {w["name"] for w in d["wrong_shape"]} | set(d["unmatched"])
    good = d["modules"] - len(wrong) - sum(u["name"] not in wrong for u in d["unchecked"])
    prefix = d["prefix"]
    words = f"names {'less' if prefix[0] == '+' else 'after'} {prefix[1:]!r}" if prefix else None
    verdict = "fits" if d["ok"] else "does not fit"
    output.say(out, f"{d['adapter']} {verdict} {d['base']}\n")
    output.facts(
        out,
        [
            ("modules", f"{max(good, 0):,} of {d['modules']:,} match by name and shape"),
            ("matched by", words),
            ("not checked", _grouped(d["unchecked"], "reason")),
            ("new", output.listed(d["new"]) or None),
        ],
    )
    if d["unmatched"]:
        output.say(out, "\nMatches nothing in the base:")
        _list(out, d["unmatched"])
    if d["wrong_shape"]:
        output.say(out, "\nHas the wrong shape:")
        rows = ((w["name"], _shape(w["expected"]), _shape(w["found"])) for w in d["wrong_shape"])
        output.table(out, ["name", ">expected", ">found in base"], rows)
    if d["untouched"]:
        asked = d["layers_to_transform"]
        why = f" (layers_to_transform is {asked})" if asked is not None else ""
        output.say(out, f"\nModules of the same kinds that the adapter does not touch{why}:")
        _list(out, d["untouched"])
    if d["ignored"]:
        output.say(out, "\nA reader that knows plain ΔW only would ignore or misread:")
        rows2 = ((row["what"], row["count"], row["why"]) for row in d["ignored"])
        output.table(out, ["what", ">count", "why"], rows2)
    if d["refusal"]:
        output.say(out, f"\nnot for ΔW algebra: {d['refusal']}")


def _shape(shape: list[int]) -> str:
    return "×".join(map(str, shape))


def _grouped(rows: list[dict[str, Any]], field: str) -> str | None:
    reasons: dict[str, int] = {}
    for row in rows:
        reasons[row[field]] = reasons.get(row[field], 0) + 1
    return "; ".join(f"{n:,}: {reason}" for reason, n in reasons.items()) or None


def _list(out: Console, names: list[str]) -> None:
    """Names by kind, or each in full with --verbose."""
    if settings().verbose:
        for name in names:
            output.say(out, f"  {name}")
        return
    from ..files.base import by_kind

    rows = []
    for what, numbers in by_kind(names).items():
        rows.append((f"  {what}", f"# = {output.listed(numbers, 12)}" if "#" in what else ""))
    output.facts(out, rows)
