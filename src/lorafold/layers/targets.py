"""Which modules of a model a specification means.

A string matches the last components of a path (`q_proj`, `self_attn.q_proj`), a compiled pattern
is searched in the whole path, and "all-linear" means every linear layer. A pattern takes linear
layers, and others (embeddings, convolutions) where its match goes to the path's end. A depth band
`layers=(lo, hi)` keeps the layers ⌊n · lo⌋ ≤ i < ⌊n · hi⌋ of each stack of n.
"""

from __future__ import annotations

import math
import re
from collections.abc import Iterable
from typing import Any, TypeAlias

from torch import nn

from ..errors import MismatchError
from ..parts import plain_name, wraps
from .kinds import KINDS, is_linear
from .swap import base_modules

Target: TypeAlias = "str | re.Pattern[str]"
ALL_LINEAR = "all-linear"


def matches(target: Target, path: str) -> bool:
    """Whether a target means the module at `path`, by its own name or the plain one."""
    if _matches(target, path):
        return True
    plain = plain_name(path)
    return plain != path and _matches(target, plain)


def _matches(target: Target, path: str) -> bool:
    if isinstance(target, re.Pattern):
        return target.search(path) is not None
    return path == target or path.endswith(f".{target}")


def shown(target: Target) -> str:
    """A target, quoted."""
    return repr(target.pattern if isinstance(target, re.Pattern) else target)


def as_targets(value: Any, label: str) -> tuple[Target, ...]:
    """One target or several, as a tuple.

    Raises:
        MismatchError: neither strings nor compiled patterns.
    """
    items = (value,) if isinstance(value, str | re.Pattern) else tuple(value or ())
    for item in items:
        if not isinstance(item, str | re.Pattern) or item == "":
            raise MismatchError(
                f"{label} must be module names or compiled patterns, found {item!r}"
            )
    return items


def found_layers(
    model: nn.Module,
    targets: Iterable[Target],
    exclude: Iterable[Target] = (),
    layers: tuple[float, float] = (0, 1),
) -> dict[str, nn.Module]:
    """{path: layer} of what the targets mean.

    Raises:
        MismatchError: a target that matches nothing, or nothing left at all; naming them.
    """
    targets, exclude = tuple(targets), tuple(exclude)
    wanted = _in_band(model, layers)
    found: dict[str, nn.Module] = {}
    unmatched = list(targets)
    for path, module in base_modules(model):
        if wraps(name for name, _ in module.named_children()):
            continue  # what is in it comes after it
        hits = [t for t in targets if _hits(t, path, module)]
        unmatched = [t for t in unmatched if t not in hits]
        if hits and wanted(path) and not _excluded(exclude, path):
            found[path] = module
    if unmatched:
        names = ", ".join(map(shown, unmatched))
        raise MismatchError(f"targets {names} match no module{_instead(unmatched, model)}")
    for target in exclude:
        hint = pattern_hint(target)
        if hint and not any(matches(target, path) for path, _ in base_modules(model)):
            raise MismatchError(f"exclude={shown(target)} matches no module{hint}")
    if not found:
        raise MismatchError("exclude= and layers= leave no module to attach to")
    return found


def _instead(unmatched: Iterable[Target], model: nn.Module) -> str:
    """What to write for targets that match nothing."""
    found = next(filter(None, map(pattern_hint, unmatched)), "")
    leaves = {p.rpartition(".")[2] for p, m in model.named_modules() if is_linear(m)}
    return found or f"; the linear layers are named {', '.join(sorted(leaves)[:8])}"


def pattern_hint(target: Target) -> str:
    """What to say further of a string that looks like a pattern; "" of any other target."""
    if isinstance(target, re.Pattern) or not re.search(r"[|\\*^]", target):
        return ""
    return f"; a string is the end of a name, and a pattern re.compile({_regular(target)})"


def _regular(text: str) -> str:
    """The text, quoted, where it is a regular expression."""
    try:
        re.compile(text)
    except re.error:
        return "…"
    return repr(text)


def _hits(target: Target, path: str, module: nn.Module) -> bool:
    if target == ALL_LINEAR:
        return is_linear(module)
    if isinstance(target, str):
        return matches(target, path)
    # A pattern that is searched also meets the containers of what it means, and other layers.
    if is_linear(module):
        return matches(target, path)
    return KINDS.find(module) is not None and any(
        target.fullmatch(name, start)
        for name in (path, plain_name(path))
        for start in range(max(1, len(name)))
    )


def _excluded(exclude: Iterable[Target], path: str) -> bool:
    """Whether the path, or a module that it lies in, is excluded."""
    parts = path.split(".")
    above = [".".join(parts[:i]) for i in range(1, len(parts) + 1)]
    return any(
        e.search(path) is not None
        if isinstance(e, re.Pattern)
        else any(matches(e, p) for p in above)
        for e in exclude
    )


def _in_band(model: nn.Module, layers: tuple[float, float]) -> Any:
    low, high = layers
    if (low, high) == (0, 1):
        return lambda path: True
    counts = {
        path: len(m) for path, m in model.named_modules() if isinstance(m, nn.ModuleList) and len(m)
    }
    if not counts:
        raise MismatchError("layers= keeps a band of a stack of layers, and the model has none")

    def first(n: int, share: float) -> int:
        return math.floor(n * share + 1e-9)  # 100 · 0.29 is a little less than 29

    def wanted(path: str) -> bool:
        parts = path.split(".")
        for at, part in enumerate(parts):  # the outermost stack counts
            n = counts.get(".".join(parts[:at]))
            if n is not None and part.isdecimal():
                return first(n, low) <= int(part) < first(n, high)
        return True

    return wanted


DEFAULT_EXCLUDE = ("vision_tower", "lm_head")
