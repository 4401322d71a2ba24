"""The model card of a trained adapter: on what, on which data, for how long, and what it gained."""

from __future__ import annotations

import json
from collections.abc import Mapping
from typing import Any

from ...merge.provenance import cell


def card(name: str, r: Mapping[str, Any]) -> str:
    """The card of an adapter, from the run's report."""
    front = ["---", "library_name: peft", "tags:", "- lora"]
    if not r["base"].startswith((".", "/", "~")) and "\\" not in r["base"]:
        front.insert(1, f"base_model: {json.dumps(r['base'])}")
    lines = [
        *front,
        "---",
        "",
        f"# {'A trained adapter' if name == 'default' else cell(name)}",
        "",
        *_made(r),
        "",
        *_gained(r["adapters"][name]),
    ]
    lines += ["", "| data | rows | bytes | SHA-256 |", "|---|---|---|---|"]
    for file in r["data"]["files"]:
        row = (file["name"], file["rows"], file["bytes"], file["sha256"])
        lines.append("| " + " | ".join(map(cell, row)) + " |")
    lines += ["", "| option | value |", "|---|---|"]
    lines += [f"| {key} | {cell(value)} |" for key, value in r["options"].items()]
    if r["said"]:
        lines += ["", "Of the base and the data:", "", *(f"- {cell(text)}" for text in r["said"])]
    return "\n".join(lines) + "\n"


def _made(r: Mapping[str, Any]) -> list[str]:
    rows, ended = r["data"], "" if r["ended"] == "whole" else ", stopped early"
    best = (
        f", of which step {r['best_step']} was kept"
        if r["best_step"] not in (None, r["steps"])
        else ""
    )
    with_ = f" together with {len(r['adapters']) - 1} others" if len(r["adapters"]) > 1 else ""
    return [
        f"A LoRA adapter for `{cell(r['base'])}`, trained{with_} on {rows['train']} rows "
        f"({rows['tokens']} tokens) for {r['steps']} steps{best}{ended}, with lorafold "
        f"{r['lorafold']}."
    ]


def _gained(a: Mapping[str, Any]) -> list[str]:
    found = a["held_out"]
    if found is None:
        return ["Nothing was held out: what it gains was not measured."]
    return [
        f"On {found['tokens']} held-out tokens: {found['base']:.4f} nats a token for the base, "
        f"{found['adapter']:.4f} with the adapter."
    ]
