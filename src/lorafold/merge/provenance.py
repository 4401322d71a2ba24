"""Where a merged adapter comes from: for the header of its file, and as a model card.

Both ride in the adapter's config under `ORIGIN`, through whatever is done with the
adapter, until `save` takes them out again: the facts into the metadata of the safetensors file, the
card into README.md.
"""

from __future__ import annotations

import html
import json
import math
import re
from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

from .. import __version__
from ..adapter import ORIGIN, Adapter

KEY = "lorafold_merge"


def origin(facts: Mapping[str, Any], base_model: str | None) -> dict[str, Any]:
    """What `save` writes beside a merged adapter.

    Args:
        facts: JSON values: method, space, seed, options, sources, …
    """
    full = {"lorafold": __version__, **facts}
    return {
        "metadata": {KEY: json.dumps(full, ensure_ascii=True, sort_keys=True)},
        "card": _card(full, base_model),
    }


def facts_of(config: Mapping[str, Any]) -> dict[str, Any] | None:
    """What was said of a merged adapter when it was made; None of any other."""
    found = config.get(ORIGIN)
    if not isinstance(found, Mapping) or KEY not in found.get("metadata", {}):
        return None
    facts: dict[str, Any] = json.loads(found["metadata"][KEY])
    return facts


def with_cut(adapter: Adapter, lost: float) -> Adapter:
    """A merged adapter, with what cutting it has cost told beside where it comes from.

    Args:
        adapter: as it was cut. lost: ‖ΔW − cut‖ / ‖ΔW‖.
    """
    facts = facts_of(adapter.config)
    if facts is None:
        return adapter
    before = facts.get("error") or 0.0  # what was cut then is orthogonal to what is cut now
    facts["error"] = math.hypot(before, math.sqrt(1 - before**2) * lost)
    told = {**adapter.config, ORIGIN: origin(facts, adapter.base_model)}
    return replace(adapter, config=told)


def _card(facts: Mapping[str, Any], base_model: str | None) -> str:
    front = ["---", "library_name: peft", "tags:", "- lora", "- merge"]
    if base_model:
        front.insert(1, f"base_model: {json.dumps(base_model)}")
    options = {**facts.get("options", {}), "space": facts["space"], "seed": facts["seed"]}
    said = ", ".join(f"{name} {cell(value)}" for name, value in options.items())
    lines = [
        *front,
        "---",
        "",
        "# A merged adapter",
        "",
        f"{len(facts['sources'])} adapters merged by `{facts['method']}` ({said}), with lorafold "
        f"{facts['lorafold']}.",
        "",
        "| adapter | weight | digest |",
        "|---|---|---|",
    ]
    for source in facts["sources"]:
        row = (source["name"], source["weight"], source["digest"])
        lines.append("| " + " | ".join(map(cell, row)) + " |")
    if facts.get("error") is not None:
        lines += ["", f"Cut to its rank, it is off by {facts['error']:.3g} of what was cut."]
    if facts.get("missing"):
        lines += ["", "Missing in some adapters, where they count as zero:", ""]
        lines += [f"- {cell(path)}: {cell(who)}" for path, who in facts["missing"].items()]
    return "\n".join(lines) + "\n"


def cell(value: Any) -> str:
    """A value as text that is no markup of any kind."""
    if isinstance(value, float):
        return f"{value:g}"
    if isinstance(value, Mapping) and len(value) > 8:
        return f"by {len(value)} patterns"
    if isinstance(value, Mapping):
        return ", ".join(f"{cell(k)}: {cell(v)}" for k, v in value.items())
    if isinstance(value, Sequence) and not isinstance(value, str):
        return ", ".join(map(cell, value))
    text = html.escape("".join(c if c.isprintable() else " " for c in str(value)), quote=False)
    return re.sub(r"([\\`*_\[\]|#!~$])", r"\\\1", text)
