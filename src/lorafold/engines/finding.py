"""What is said of a file and a program: findings, and the verdict that they come to."""

from __future__ import annotations

import shlex
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import PurePath
from typing import Literal

from ..files.formats.registry import FORMATS
from ..words import some_of

Outcome = Literal["loads", "ignores", "misreads", "refuses", "aborts"]
OUTCOMES: tuple[Outcome, ...] = ("loads", "ignores", "misreads", "refuses", "aborts")  # worse last


@dataclass(frozen=True)
class Finding:
    """One thing that a program does with a file.

    Args:
        name: a word that stays the same, whatever the file.
        outcome: "loads": as meant, told all the same. "ignores": leaves something out. "misreads":
            applies something else than was trained. "refuses": with an error. "aborts": takes the
            whole process with it.
        says: what happens, in a sentence.
        factors: {module: (the factor that it applies, the right one)}.
        modules: that it is about; none for the file as a whole.
        remedy: a command line after which it does not happen, or else what to do.
    """

    name: str
    outcome: Outcome
    says: str
    factors: Mapping[str, tuple[float, float]] = field(default_factory=dict)
    modules: tuple[str, ...] = ()
    remedy: str | None = None


@dataclass(frozen=True)
class Verdict:
    """What a program makes of a file.

    Args:
        reader: the program.
        findings: the worst first.
    """

    reader: str
    findings: tuple[Finding, ...]

    @property
    def outcome(self) -> Outcome:
        """The worst of the findings'; "loads" where there are none."""
        return max((f.outcome for f in self.findings), key=OUTCOMES.index, default="loads")

    @property
    def same(self) -> bool:
        """Whether the effect is the one that was trained."""
        return self.outcome == "loads"


def ordered(reader: str, findings: Iterable[Finding]) -> Verdict:
    """The verdict, its findings the worst first."""
    by = sorted(findings, key=lambda f: -OUTCOMES.index(f.outcome))
    return Verdict(reader, tuple(by))


def convert(path: str, to: str, *options: str) -> str:
    """The command line that writes a file in another form, beside it."""
    ending = (FORMATS[to].ending if to in FORMATS else None) or ""
    name = PurePath(path.rstrip("/")).name
    stem = name.removesuffix(".safetensors").removesuffix(".gguf") or "adapter"
    out = f"{stem}-{to}{ending}"
    return shlex.join(["lorafold", "convert", path, "-o", out, "--to", to, *options])


def padded(path: str) -> str:
    """The command line that writes a PEFT folder without patterns, of one rank and the scale 1."""
    out = f"{PurePath(path.rstrip('/')).name.removesuffix('.safetensors')}-padded"
    return shlex.join(["lorafold", "resize", path, out, "--tolerance", "0", "--pad"])


def factors_of(
    applied: Mapping[str, float], right: Mapping[str, float]
) -> dict[str, tuple[float, float]]:
    """{module: (applied, right)} of those that are not the same."""
    return {
        path: (applied[path], scale)
        for path, scale in right.items()
        if path in applied and abs(applied[path] - scale) > 1e-6 * max(abs(scale), 1e-12)
    }


def wrong_form(reader: str, found: str, remedy: str, wants: str) -> Finding:
    """The finding on a file in a form that a program does not read."""
    return Finding(
        "form", "refuses", f"{reader} reads {wants}; this is in the form of {found}", remedy=remedy
    )


def told(modules: Iterable[str]) -> str:
    """Some of the modules, for a sentence."""
    return some_of(list(modules), 2)
