"""What a library's `stats()` says, in words and tables; shared by `fold` and `info`."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from . import _output as output
from ._command import settings

if TYPE_CHECKING:
    from rich.console import Console

# B starts at zero, so a common column space of B was learned, not given.
_SIDES = {"in": "start from the same A", "out": "have nearly the same B"}
_OWN = {"svd", "exact"}  # forms in which adapters share nothing


def library_facts(out: Console, stats: Mapping[str, Any]) -> None:
    """Print totals: bytes before and after, errors, forms, init groups, and what SVD would cost."""
    error, options = stats["error"], stats["options"]
    bits = f", {stats['bits']:.3g} bits a parameter" if stats["bits"] else ""
    output.facts(
        out,
        [
            ("library", stats["path"]),
            ("base", stats["base_model"] or "not said"),
            ("adapters", f"{stats['adapters']:,}, {stats['parameters']:,} parameters"),
            ("folded by", options_words(options)),
            (
                "on disk",
                f"{output.size(stats['file_bytes'])} → {output.size(stats['bytes'])}: "
                f"{_ratio_words(stats['ratio'])}{bits}",
            ),
            ("error", f"mean {output.percent(error['mean'])}, max {output.percent(error['max'])}"),
            ("forms", ", ".join(f"{form} ×{n}" for form, n in stats["forms"].items())),
            ("same start", "; ".join(group_words(stats)) or _no_groups(stats)),
            ("plain SVD", svd_words(stats)),
            ("damaged", "\n".join(stats["damage"])),
        ],
    )
    remark = sharing_remark(stats)
    if remark:
        output.say(out, f"\n{remark}")


def _ratio_words(ratio: float) -> str:
    return f"{ratio:.2f}× smaller" if ratio >= 1 else f"{1 / max(ratio, 1e-9):.2f}× larger"


def _no_groups(stats: Mapping[str, Any]) -> str | None:
    # Adapters that are all kept as they are have not been compared.
    return None if set(stats["forms"]) <= {"exact"} else "no two adapters"


def options_words(options: Mapping[str, Any]) -> str:
    """What a library was folded by, in a line."""
    named = (f"{k} {v:g}" if isinstance(v, float) else f"{k} {v}" for k, v in options.items())
    return ", ".join(named)


def group_words(stats: Mapping[str, Any]) -> list[str]:
    """["12 of 24 adapters start from the same A"], a phrase for each side that has groups."""
    phrases = []
    for side, groups in stats["init_groups"].items():
        sizes = sorted((len(group) for group in groups), reverse=True)
        phrase = f"{sum(sizes)} of {stats['adapters']} adapters {_SIDES[side]}"
        if len(sizes) > 1:
            phrase += f" as others, in {len(sizes)} groups of {output.span(sizes)}"
        phrases.append(phrase)
    return phrases


def svd_words(stats: Mapping[str, Any]) -> str | None:
    """What truncated float16 SVD, adapter by adapter, would take at the same tolerance."""
    plain = stats["plain_svd_bytes"]
    if not plain:
        return None
    return (
        f"{output.size(plain)} ({plain / max(stats['bytes'], 1):.2f}× as much): each adapter "
        "truncated alone to the same error, in float16"
    )


def sharing_remark(stats: Mapping[str, Any]) -> str | None:
    """The plain statement where unrelated adapters gained nothing from lying together."""
    forms, options = stats["forms"], stats["options"]
    if stats["adapters"] < 2 or "svd" not in forms or set(forms) - _OWN:
        return None
    if options.get("form") != "auto" or "rank" in options or "energy" in options:
        return None  # nothing was tried, or the size was set and not found
    return (
        "These adapters have nothing in common that saves bytes: each is stored on its own, and "
        "what is saved is saved by coding alone. More of the same kind will not compress better."
    )


def library_table(out: Console, stats: Mapping[str, Any]) -> None:
    """Print a row per form, and with --verbose a row per module."""
    modules = stats["modules"]
    rows = []
    for form, number in stats["forms"].items():
        mine = [m for m in modules if m["form"] == form]
        rows.append(
            (
                form,
                number,
                output.span(r for m in mine for r in m["ranks"].values()),
                output.span(m["adapters"] for m in mine),
                f"{sum(m['parameters'] for m in mine):,}",
                output.size(sum(m["record_bytes"] for m in mine)),
                output.size(sum(m["basis_bytes"] for m in mine)),
            )
        )
    output.say(out)
    heads = [">shared rank", ">adapters", ">parameters", ">own bytes", ">shared bytes"]
    output.table(out, ["form", ">modules", *heads], rows)
    if settings().verbose:
        output.say(out)
        heads = ["form", ">rank", ">used by", ">parameters", ">own", ">shared"]
        output.table(out, ["module", ">shape", *heads], map(_module_row, modules))


def _module_row(m: Mapping[str, Any]) -> tuple[object, ...]:
    ranks = ",".join(str(rank) for rank in m["ranks"].values())
    return (
        m["path"],
        "×".join(map(str, m["shape"])),
        m["form"],
        ranks or None,
        m["adapters"],
        f"{m['parameters']:,}",
        output.size(m["record_bytes"]),
        output.size(m["basis_bytes"]),
    )
