"""vLoRA folders on the command line: what they hold, and whether it is sound."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from . import _output as output

if TYPE_CHECKING:
    from rich.console import Console


def show_subspace(path: str) -> None:
    """Report a folder's tasks, and the bytes of each."""
    from ..files.formats.vlora import Subspace

    space = Subspace.at(path)
    facts = space.facts()
    report = {"path": path, "format": "vLoRA", **facts}

    def show(out: Console) -> None:
        told = [
            ("vLoRA folder", path),
            ("adapters", f"{facts['adapters']:,}"),
            ("modules", f"{facts['modules']:,}"),
            ("rank", facts["rank"]),
            ("directions", ", ".join(map(str, facts["components"]))),
            ("stored as", facts["stored"]),
            ("α", "not said: give --alpha where its adapters are read"),
        ]
        output.facts(out, told)
        output.say(out)
        output.table(out, ["adapter", ">bytes"], ((t["name"], t["bytes"]) for t in facts["tasks"]))

    output.report(report, show, kind="subspace")


def verify_subspace(path: str) -> list[str]:
    """Report what is wrong with a folder; the list of it."""
    from ..files.formats.vlora import Subspace

    wrong = Subspace.at(path).problems()
    report: dict[str, Any] = {"path": path, "ok": not wrong, "problems": wrong}

    def show(out: Console) -> None:
        if not wrong:
            output.say(out, f"{path}: finite, orthonormal, and of sizes that fit together")
        for line in wrong:
            output.say(out, line)

    output.report(report, show, kind="verify-subspace")
    return wrong
