"""What is told of a dial beside it: facts in JSON, and a model card."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import replace
from typing import Any

from ... import __version__
from ...adapter import ORIGIN, Adapter
from .steer import Dial, Run
from .sweep import Sweep

KEY = "lorafold_steer"
COLUMNS = ("c", "margin", "preferred", "KL", "KL of text", "NLL", "repeated")


def facts_of(run: Run, dial: Dial, sweep: Sweep) -> dict[str, Any]:
    """What was asked for, what was done, and what the dial does, as JSON has it."""
    return {
        "lorafold": __version__,
        "options": run.options.facts(),
        "pairs": {
            "trained": len(run.train),
            "held_out": len(run.held),
            "cut": run.encoded.cut,
            "left_out": run.encoded.dropped,
        },
        "rounds": [r.to_dict() for r in dial.rounds],
        "rank": dial.adapter.rank,
        "sweep": sweep.to_dict(),
    }


def told(adapter: Adapter, facts: Mapping[str, Any], base_model: str | None) -> Adapter:
    """The adapter, beside which `save` writes its card and its figures."""
    short = {key: facts[key] for key in ("lorafold", "options", "pairs")}
    origin = {
        "metadata": {KEY: json.dumps(short, sort_keys=True)},
        "card": _card(facts, base_model),
        "record": json.dumps(facts, indent=2) + "\n",
    }
    return replace(adapter, config={**adapter.config, ORIGIN: origin}, base_model=base_model)


def cells(point: Mapping[str, Any]) -> list[str]:
    """A point's row of `COLUMNS`."""
    names = ("margin", "kl", "kl_text", "nll")
    margin, kl, kl_text, nll = (f"{point[name]:.3f}" for name in names)
    preferred, repeated = (f"{100 * point[name]:.0f} %" for name in ("preferred", "repeated"))
    return [f"{point['c']:g}", margin, preferred, kl, kl_text, nll, repeated]


def strength(facts: Mapping[str, Any]) -> str:
    """What c = 1 is, in words."""
    ended = [r for r in facts["rounds"] if r["calibration"] is not None]
    if not ended:
        return "c = 1 is the strength at which it was trained"
    found = ended[-1]["calibration"]
    said = "moves greedy text by KL"
    near = "" if found["converged"] else f", as near as {facts['options']['kl']:g} could be met"
    return f"c = 1 {said} {found['kl']:.3g} (95th percentile of its tokens){near}"


def _card(facts: Mapping[str, Any], base_model: str | None) -> str:
    front = ["---", "library_name: peft", "tags:", "- lora", "- steering"]
    if base_model and not base_model.startswith((".", "/", "~")) and "\\" not in base_model:
        front.insert(1, f"base_model: {json.dumps(base_model)}")
    pairs, sweep = facts["pairs"], facts["sweep"]
    columns = [" | ".join(COLUMNS), "|".join("---:" for _ in COLUMNS)]
    return "\n".join(
        [
            *front,
            "---",
            "",
            "# A dial",
            "",
            f"Trained on {pairs['trained']} pairs of answers, in {len(facts['rounds'])} round(s), "
            f"with lorafold {facts['lorafold']}: a positive strength c raises the chosen answers, "
            f"a negative one the rejected; {strength(facts)}.",
            "",
            f"Measured on {pairs['held_out']} held-out pairs (nats a token; margin of chosen over "
            f"rejected beyond the base's; NLL of {sweep['nll_of']}):",
            "",
            *(f"| {row} |" for row in columns),
            *(f"| {' | '.join(cells(point))} |" for point in sweep["points"]),
        ]
    )
