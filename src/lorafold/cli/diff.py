"""`lorafold diff`: how far two adapters are apart, as changes of the weights."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

import click

from . import _output as output
from ._command import command, settings
from ._source import adapter_options, loaded

if TYPE_CHECKING:
    from rich.console import Console

    from ..adapter import Adapter
    from ..compare import ModuleOverlap

_BASE = "base_model_name_or_path"
_ROUNDING = 1e-6  # relative distances below are float32's


@command("diff", example="lorafold diff adapters/sql lib:sql")
@click.argument("a", metavar="A")
@click.argument("b", metavar="B")
@adapter_options
def diff(a: str, b: str, **options: Any) -> None:
    """Compare two adapters by what they do to the weights.

    A and B are paths, ids on the Hub, or LIB:NAME. Norms, cosine and distance are those of ΔW, so
    equal updates are equal whatever their factors look like; distances are relative to A. Shared is
    how much of both lies in the output (input) space of the other, interference what each does
    within the other's, which is what merging mixes. The modules that differ most come first.
    """
    with output.progress("comparing") as advance:
        found = comparison(a, _freed(a, **options), b, _freed(b, **options), advance)
    output.report(found, lambda out: _show(out, found), tables=("modules",))


def _freed(text: str, **options: Any) -> Adapter:
    """The adapter, refused by its name where ΔW algebra is refused."""
    from ..errors import RefusedError

    adapter = loaded(text, **options)
    if adapter.refusal is not None:
        raise RefusedError(f"{text}: {adapter.refusal}")
    return adapter


def comparison(
    name_a: str, a: Adapter, name_b: str, b: Adapter, progress: output.Advance | None = None
) -> dict[str, Any]:
    """Everything in which two adapters differ, in JSON's types.

    Raises:
        MismatchError: a module has two shapes.
    """
    from ..compare.overlap import compared

    # Updates of one shape can be compared whatever the bases are called; the names are reported.
    found = compared(a, b, progress)
    modules = [_compared(m) for m in found.modules]
    return {
        "a": name_a,
        "b": name_b,
        "norm_a": found.norm_a,
        "norm_b": found.norm_b,
        "cosine": found.cosine,
        "distance": found.distance,
        "relative_distance": _relative(found.distance, found.norm_a),
        "shared_out": found.shared_out,
        "shared_in": found.shared_in,
        "interference": found.interference,
        "interference_a": found.interference_a,
        "interference_b": found.interference_b,
        "only_in_a": list(found.only_in_a),
        "only_in_b": list(found.only_in_b),
        "config": _config_differences(a, b),
        "extras": _extra_differences(a, b),
        "modules": sorted(modules, key=lambda m: -m["distance"]),
    }


def _compared(m: ModuleOverlap) -> dict[str, Any]:
    return {
        "module": m.path,
        "norm_a": m.norm_a,
        "norm_b": m.norm_b,
        "cosine": m.cosine,
        "distance": m.distance,
        "relative_distance": _relative(m.distance, m.norm_a),
        "shared_out": m.shared_out,
        "shared_in": m.shared_in,
        "interference_a": m.interference_a,
        "interference_b": m.interference_b,
        "angles_out": m.angles_out.tolist(),
        "angles_in": m.angles_in.tolist(),
    }


def _relative(distance: float, norm: float) -> float | None:
    if norm > 0:
        return distance / norm
    return 0.0 if distance == 0 else None


def _config_differences(a: Adapter, b: Adapter) -> dict[str, list[Any]]:
    left = {**a.config, _BASE: a.base_model}
    right = {**b.config, _BASE: b.base_model}
    fields = dict.fromkeys([*left, *right])
    pairs = {field: [left.get(field), right.get(field)] for field in fields}
    return {field: [x, y] for field, (x, y) in pairs.items() if _plain(x) != _plain(y)}


def _plain(value: Any) -> Any:
    """Lists of names are sets to PEFT."""
    if isinstance(value, list) and all(isinstance(item, str) for item in value):
        return sorted(value)
    return value


def _extra_differences(a: Adapter, b: Adapter) -> dict[str, list[str]]:
    import torch

    both = [k for k in a.extras if k in b.extras]
    return {
        "only_in_a": [k for k in a.extras if k not in b.extras],
        "only_in_b": [k for k in b.extras if k not in a.extras],
        "differ": [k for k in both if not torch.equal(a.extras[k], b.extras[k])],
    }


# For people


def _show(out: Console, d: Mapping[str, Any]) -> None:
    extras, relative = d["extras"], output.percent(d["relative_distance"])
    output.facts(
        out,
        [
            ("A", f"{d['a']}: norm {output.digits(d['norm_a'], 4)}"),
            ("B", f"{d['b']}: norm {output.digits(d['norm_b'], 4)}"),
            ("cosine", f"{d['cosine']:.4f}"),
            ("distance", f"{output.digits(d['distance'], 4)}, {relative} of ‖A‖"),
            (
                "shared",
                f"{output.percent(d['shared_out'])} out, {output.percent(d['shared_in'])} in",
            ),
            ("interference", f"{d['interference']:.3f} if merged"),
            ("only in A", _names(d["only_in_a"])),
            ("only in B", _names(d["only_in_b"])),
            ("extras only in A", _names(extras["only_in_a"])),
            ("extras only in B", _names(extras["only_in_b"])),
            ("extras that differ", _names(extras["differ"])),
        ],
    )
    if d["config"]:
        output.say(out, "\nThe configs differ:")
        rows = ((field, *map(_value, pair)) for field, pair in d["config"].items())
        output.table(out, ["field", "A", "B"], rows)
    modules = [m for m in d["modules"] if m["distance"] > _ROUNDING * m["norm_a"]]
    if not modules:
        if d["modules"]:
            output.say(out, "\nEvery module that both have is the same, but for rounding.")
        return
    output.say(out)
    output.table(
        out,
        [
            *("module", ">norm A", ">norm B", ">cosine", ">distance", ">of ‖A‖"),
            *(">shared out", ">shared in", ">angle"),
        ],
        (
            (
                m["module"],
                output.digits(m["norm_a"], 4),
                output.digits(m["norm_b"], 4),
                f"{m['cosine']:.4f}",
                output.digits(m["distance"], 4),
                output.percent(m["relative_distance"]),
                output.percent(m["shared_out"]),
                output.percent(m["shared_in"]),
                _degrees(m),
            )
            for m in modules
        ),
        most=output.MOST,
    )


def _degrees(m: Mapping[str, Any]) -> str | None:
    """The smallest principal angles of a module, out and in."""
    if not m["angles_out"] or not m["angles_in"]:
        return None
    return f"{math.degrees(m['angles_out'][0]):.0f}°, {math.degrees(m['angles_in'][0]):.0f}°"


def _names(names: list[str]) -> str | None:
    if not names:
        return None
    return f"{len(names):,}: {output.listed(names, len(names) if settings().verbose else 3)}"


def _value(value: Any) -> str:
    import json

    return json.dumps(value, ensure_ascii=False)
