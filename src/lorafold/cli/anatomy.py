"""`lorafold anatomy`: an adapter measured, module by module, and what stands out."""

from __future__ import annotations

import math
from collections.abc import Mapping
from statistics import fmean
from typing import TYPE_CHECKING, Any

import click

from . import _output as output
from ._command import command, settings
from ._source import adapter_options, opened

if TYPE_CHECKING:
    from rich.console import Console

    from ..compare import Anatomy, ModuleAnatomy


@command("anatomy", example="lorafold anatomy adapters/sql")
@click.argument("adapter", metavar="ADAPTER")
@click.option(
    "--threshold", type=float, default=3.5, help="Robust deviations of what stands out (3.5)."
)
@adapter_options
def anatomy(adapter: str, threshold: float, **options: Any) -> None:
    """Measure every module of an adapter, and find those that stand out.

    ADAPTER is a path, an id on the Hub, or LIB:NAME. The modules of one family (all q_proj) are
    compared along the depth of the model: one stands out where its norm, stable rank, entropy, or
    largest row or column is far off a robust line through its family. With --verbose, every module.
    """
    from ..compare import anatomy as measured

    with output.progress("measuring"):
        found = measured(opened(adapter, **options), threshold=threshold)
    d = described(adapter, found)
    output.report(d, lambda out: _show(out, d), tables=("modules",))


def described(path: str, found: Anatomy) -> dict[str, Any]:
    """An adapter's anatomy, in JSON's types."""
    return {
        "path": path,
        "norm": found.norm,
        "families": {
            family: {
                "modules": len(members),
                "norm": math.hypot(*(m.norm for m in members)),
                "stable_rank": fmean(m.stable_rank for m in members),
                "participation_ratio": fmean(m.participation_ratio for m in members),
                "entropy": fmean(m.entropy for m in members),
            }
            for family, members in found.families.items()
        },
        "modules": [_module(m) for m in found.modules],
        "anomalies": [
            {
                "module": a.path,
                "family": a.family,
                "measure": a.measure,
                "value": a.value,
                "expected": a.expected,
                "z": a.z,
            }
            for a in found.anomalies
        ],
    }


def _module(m: ModuleAnatomy) -> dict[str, Any]:
    return {
        "module": m.path,
        "family": m.family,
        "depth": m.depth,
        "shape": list(m.shape),
        "rank": m.rank,
        "norm": m.norm,
        "stable_rank": m.stable_rank,
        "participation_ratio": m.participation_ratio,
        "entropy": m.entropy,
        "largest_row": {"index": m.row, "norm": m.row_norm},
        "largest_column": {"index": m.column, "norm": m.column_norm},
        "singular_values": m.spectrum.tolist(),
    }


# For people


def _show(out: Console, d: Mapping[str, Any]) -> None:
    output.facts(
        out,
        [
            ("adapter", d["path"]),
            ("norm ‖ΔW‖", output.digits(d["norm"], 4)),
            ("modules", f"{len(d['modules']):,}"),
            ("stand out", output.count(len({a["module"] for a in d["anomalies"]}), "module")),
        ],
    )
    measures = ("norm", "stable_rank", "participation_ratio", "entropy")
    heads = [">norm", ">stable rank", ">participation", ">entropy"]
    output.say(out)
    output.table(
        out,
        ["family", ">modules", *heads],
        (
            (family, f["modules"], *(output.digits(f[key]) for key in measures))
            for family, f in d["families"].items()
        ),
    )
    if d["anomalies"]:
        output.say(out, "\nfar from their families:")
        output.table(
            out,
            ["module", "measure", ">value", ">expected", ">z"],
            (
                (
                    a["module"],
                    a["measure"].replace("_", " "),
                    output.digits(a["value"]),
                    output.digits(a["expected"]),
                    f"{a['z']:+.1f}",
                )
                for a in d["anomalies"]
            ),
            most=output.MOST,
        )
    if settings().verbose:
        output.say(out)
        output.table(
            out,
            ["module", ">shape", ">rank", *heads, ">largest row", ">largest column"],
            (
                (
                    m["module"],
                    "×".join(map(str, m["shape"])),
                    m["rank"],
                    *(output.digits(m[key]) for key in measures),
                    *(_largest(m[key]) for key in ("largest_row", "largest_column")),
                )
                for m in d["modules"]
            ),
        )


def _largest(found: Mapping[str, Any]) -> str:
    return f"{output.digits(found['norm'])} at {found['index']}"
