"""`lorafold check`: does an adapter fit its base, and what would a program do with its file?"""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping
from typing import TYPE_CHECKING, Any

import click

from . import _output as output
from ._command import CheckFailed, command, settings, told
from ._source import opened, source_options_beside_base

if TYPE_CHECKING:
    from rich.console import Console

    from ..engines import Finding
    from ..files import AdapterFile
    from ..files.base import BaseFiles
    from ..naming import Base
    from ..parts import Parts
    from ..placing import Placement

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


READERS = ("vllm", "llama.cpp", "mlx", "peft", "diffusers", "kohya")


@command("check", example="lorafold check adapters/sql --base base")
@click.argument("adapter", metavar="ADAPTER")
@click.option("--base", metavar="DIR", help="The base model's folder.")
@click.option(
    "--for",
    "reader",
    type=click.Choice(READERS),
    help="A program: what would it do with the file, by its rules and as measured?",
)
@source_options_beside_base
def check(adapter: str, base: str | None, reader: str | None, **options: Any) -> None:
    """Check an adapter's names and shapes against its base, or its file against a program.

    Reads the headers of the base's safetensors files and no weights of it. Tells what matches
    nothing or has the wrong shape (exit status 1), modules of the same kinds that the adapter
    doesn't touch, and what a reader that knows plain ΔW only would ignore.

    With --for it tells what that program would make of the files: whether it loads, ignores a part,
    misreads a scale (the factor that it would apply against the right one), refuses, or aborts;
    exit status 1 where the effect would not be the one that was trained. --base helps there, too.
    """
    if reader is not None:
        _check_for(adapter, reader, base, options)
        return
    if base is None:
        raise click.UsageError(
            "give the base's folder with --base, or a program with --for",
            click.get_current_context(),
        )
    file = opened(adapter, base=base, **options)
    found = checked(adapter, file, base)
    output.report(found, lambda out: _show(out, found))
    if not found["ok"]:
        wrong, unmatched = len(found["wrong_shape"]), len(found["unmatched"])
        raise CheckFailed(f"{unmatched} without a match in {base}, {wrong} of the wrong shape")


def _check_for(adapter: str, reader: str, base: str | None, options: Mapping[str, Any]) -> None:
    from ..engines import check_for

    given = {name: options[name] for name in ("alpha", "revision")}
    verdict = check_for(adapter, reader, base=base, **given)
    found = {
        "adapter": adapter,
        "reader": reader,
        "base": base,
        "outcome": verdict.outcome,
        "same": verdict.same,
        "findings": list(map(_in_json, verdict.findings)),
    }
    output.report(found, lambda out: _show_verdict(out, found), kind="check-for")
    if not verdict.same:
        worst = verdict.findings[0]
        raise CheckFailed(f"{reader} {worst.outcome}: {worst.says}")


def _in_json(finding: Finding) -> dict[str, Any]:
    return {
        "name": finding.name,
        "outcome": finding.outcome,
        "says": settings().in_flags(finding.says),
        "modules": list(finding.modules),
        "factors": {
            path: {"applied": applied, "right": right}
            for path, (applied, right) in finding.factors.items()
        },
        "remedy": finding.remedy,
    }


def checked(name: str, file: AdapterFile, base_path: str) -> dict[str, Any]:
    """The comparison, in JSON's types."""
    from ..files.base import read_base
    from ..parts import extra_kind
    from ..placing import placed

    parts, plain = file.parts, _unreplicated(file.config)
    files = read_base(base_path)
    base = files.named(map(plain, parts.names()))
    plan = placed(parts, base, plain)
    unmatched, unchecked, new = _without_place(plan, parts)
    unchecked += [
        {"name": spot.part, "reason": f"the base stores {spot.held.dtype}"}
        for spot in plan.spots
        if spot.what == "update" and not spot.held.dtype.is_floating_point
    ]
    beside = ("dora magnitude", "grouped convolution", "training state")
    others = [key for key in parts.extras if extra_kind(key, parts.config) not in beside]
    fitting = {spot.part for spot in plan.spots} - {row["name"] for row in unchecked}
    return {
        "adapter": name,
        "base": base_path,
        "ok": not unmatched and not plan.wrong,
        "modules": len(parts.modules),
        "modules_matched": len(fitting & parts.modules.keys()),
        "other_tensors": len(others),
        "other_tensors_matched": len(fitting & set(others)),
        "renamed": base.renamed,
        "unmatched": unmatched,
        "wrong_shape": [
            {"name": part, "expected": list(misfit.expected), "found": list(misfit.found)}
            for part, misfit in plan.wrong.items()
        ],
        "unchecked": unchecked,
        "new": new,
        "untied": plan.untied(),
        "untied_unless_equal": _are_copies(plan),
        "not_merged": _not_merged(file, files, plan, unchecked),
        "untouched": _untouched(parts, base, plain),
        "layers_to_transform": file.config.get("layers_to_transform"),
        "ignored": _ignored(file),
        "refusal": file.refusal,
        "idle": _idle(file),
    }


def _unreplicated(config: Mapping[str, Any]) -> Callable[[str], str]:
    """From a layer's number among replicas (`layer_replication`) to the one in the file."""
    ranges = config.get("layer_replication") or []
    numbers = [n for start, stop in ranges for n in range(start, stop)]

    def plain(path: str) -> str:
        match = re.match(r"(.*?\.|)(\d+)(\..*)", path)
        if not numbers or match is None or int(match[2]) >= len(numbers):
            return path
        return f"{match[1]}{numbers[int(match[2])]}{match[3]}"

    return plain


def _without_place(
    plan: Placement, parts: Parts
) -> tuple[list[str], list[dict[str, Any]], list[str]]:
    """What matches nothing, what can't be checked, and what is new in the adapter."""
    from ..parts import extra_kind
    from ..placing import NO_WEIGHT, OTHER_FORM

    unmatched: list[str] = []
    unchecked: list[dict[str, Any]] = []
    new: list[str] = []
    for part, why in plan.unplaced.items():
        if part in parts.modules and why == OTHER_FORM:
            unchecked.append({"name": part, "reason": f"{why} (quantised, or split)"})
        elif part not in parts.modules and extra_kind(part, parts.config) in _MAY_BE_NEW:
            new.append(part)
        elif why != NO_WEIGHT:  # what is beside factors is checked with them
            unmatched.append(part)
    return unmatched, unchecked, new


def _not_merged(
    file: AdapterFile, files: BaseFiles, plan: Placement, unchecked: list[dict[str, Any]]
) -> str | None:
    """Why merge-into would write nothing; None where it would."""
    from ..errors import MismatchError
    from ..placing import check_replicated

    reason = file.refusal or (None if _are_copies(plan) else files.untying_refusal(plan.untied()))
    try:
        check_replicated(list(plan.base.names()), file.config, file.parts.modules)
    except MismatchError as e:
        reason = reason or told(e)
    if reason is None and (plan.unplaced or plan.wrong or unchecked):
        n = output.count(len({*plan.unplaced, *plan.wrong, *(row["name"] for row in unchecked)}))
        reason = f"parts of the adapter without a place that fits: {n} (--partial leaves out"
        reason += " those that the base doesn't have)"
    return reason


def _are_copies(plan: Placement) -> bool:
    """Whether output layer and embedding are both saved whole: headers don't say if alike."""
    ends = plan.base.tied or ()
    found = [(s.what, p.key) for s in plan.spots for p in s.pieces if p.key in ends]
    return bool(ends) and sorted(found) == sorted(("whole", key) for key in ends)


def _untouched(parts: Parts, base: Base, plain: Callable[[str], str]) -> list[str]:
    """Modules of the kinds that the adapter has, which it leaves alone."""
    from ..naming import kind

    found: dict[str, None] = {}
    touched = {plain(parts.layout(path).weight_name(path)) for path in parts.modules}
    for name in {kind(name): name for name in touched}.values():
        stem = name.removesuffix(".weight")
        there = base.alike(name) or [
            other.replace("qweight", "weight") for other in base.alike(f"{stem}.qweight")
        ]
        found |= dict.fromkeys(other for other in there if other not in touched)
    return [name.removesuffix(".weight") for name in found]


def _idle(file: AdapterFile) -> str | None:
    """Why it does nothing; reads modules up to the first that does something."""
    import torch

    from ..parts import extra_kind

    if any(extra_kind(key, file.config) != "training state" for key in file.extra_keys):
        return None
    scaled = [path for path, scale in file.scales.items() if scale != 0]
    if not scaled:
        return "α is 0"
    updates = (file.read(path, torch.float32) for path in scaled)
    some = any(bool(u.A.any() and u.B.any()) for u in updates)
    return None if some else "every update is zero (B = 0, as before training)"


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


def _show_verdict(out: Console, d: Mapping[str, Any]) -> None:
    same = "as it was trained" if d["same"] else "not as it was trained"
    output.say(out, f"{d['reader']} {d['outcome']} {d['adapter']}: {same}")
    for finding in d["findings"]:
        output.say(out, f"\n{finding['name']}: {finding['outcome']}: {finding['says']}")
        rows = [(path, f["applied"], f["right"]) for path, f in finding["factors"].items()]
        shown = rows if settings().verbose else rows[:5]
        if rows:
            number = [(path, f"{a:.6g}", f"{b:.6g}") for path, a, b in shown]
            output.table(out, ["  module", ">applied", ">right"], number)
            if len(rows) > len(shown):
                output.say(out, f"  and {output.count(len(rows) - len(shown), 'more')}")
        if finding["remedy"] is not None:
            output.line_to_run(out, f"  remedy: {finding['remedy']}")


def _show(out: Console, d: Mapping[str, Any]) -> None:
    modules = f"{d['modules_matched']:,} of {d['modules']:,} match by name and shape"
    others = f"{d['other_tensors_matched']:,} of {d['other_tensors']:,} match"
    head = d["untied"] or "the output layer"
    unless = ", unless the two saved copies are equal" if d["untied_unless_equal"] else ""
    untied = f"{head} gets a weight of its own in a merge: the model will be untied{unless}"
    merges = d["not_merged"] is None
    verdict = "fits" if d["ok"] else "does not fit"
    output.say(out, f"{d['adapter']} {verdict} {d['base']}\n")
    output.facts(
        out,
        [
            ("modules", modules if d["modules"] else None),
            ("other tensors", others if d["other_tensors"] else None),
            ("matched by", _renamed(d["renamed"])),
            ("not checked", _grouped(d["unchecked"], "reason")),
            ("new", output.listed(d["new"]) or None),
            ("tied", untied if d["untied"] is not None and merges else None),
            ("merge-into", f"writes nothing: {d['not_merged']}" if not merges else None),
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
    if d["idle"]:
        output.say(out, f"\nit does nothing: {d['idle']}")


def _renamed(renamed: Mapping[str, str]) -> str | None:
    """How the names of the adapter differ from the base's."""
    words = []
    for old, new in renamed.items():
        if old and new:
            words.append(f"{old!r} as {new!r}")
        else:
            words.append(f"names {'less' if old else 'after'} {(old or new)!r}")
    return ", ".join(words) or None


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
        if "#" in what:
            rows.append((f"  {what}", f"# = {output.listed(numbers, 12)}"))
        else:
            output.say(out, f"  {what}")
    output.facts(out, rows)
