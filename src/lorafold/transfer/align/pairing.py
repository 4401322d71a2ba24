"""Which linear map of the source is paired with which of the target: by role, layer for layer."""

from __future__ import annotations

from collections.abc import Collection, Iterable, Mapping
from typing import Any

import torch

from ...errors import MismatchError
from ...roles import Role
from ...words import one_line
from . import depth
from .bases import Base
from .batches import Batch
from .covariances import Moments, cka, moments_of
from .recording import recording, run

Chosen = Mapping[str, tuple[int, ...]]  # {stack: the source's layer for each of the target's}

_LAYERS_SEEN = 8  # batches from which layers are told apart


def layers_of(asked: Any, source: Base, target: Base, batches: Collection[Batch]) -> Chosen:
    """The source's layer for each of the target's, stack by stack.

    Args:
        asked: "proportional", "cka", or {stack: layers}.

    Raises:
        MismatchError: none of these, layers that aren't there, or no stack in common.
    """
    of_s, of_t = source.depth, target.depth
    both = [side for side in of_t if side in of_s]
    if not both and (of_s or of_t):
        raise MismatchError(
            f"the source has layers in {sorted(of_s)}, the target in {sorted(of_t)}: no stack in "
            "common"
        )
    if asked == "proportional":
        return {side: tuple(depth.proportional(of_s[side], of_t[side])) for side in both}
    if asked == "cka":
        return {side: tuple(_alike(side, source, target, batches)) for side in both}
    if not isinstance(asked, Mapping) or set(asked) != set(both):
        raise MismatchError(
            f"layers must be 'proportional', 'cka', or {{stack: layers}} for {both}, found "
            f"{one_line(asked)}"
        )
    for side, given in asked.items():
        if len(given) != of_t[side] or not depth.checked(list(given), of_s[side]):
            raise MismatchError(
                f"layers[{side!r}] must name one of {of_s[side]} layers of the source for each of "
                f"{of_t[side]} of the target, found {one_line(given)}"
            )
    return {side: tuple(given) for side, given in asked.items()}


def _alike(side: str, source: Base, target: Base, batches: Iterable[Batch]) -> list[int]:
    """By what the layers write into the residual: the last map of each layer."""
    last = {base.side: _blocks(base, side) for base in (source, target)}
    sums: dict[tuple[int, int], Moments] = {}
    for batch in list(batches)[:_LAYERS_SEEN]:
        seen = {}
        for base, given in ((source, batch.source), (target, batch.target)):
            sites = [(path, "out") for path in last[base.side].values()]
            rows = given.rows.to(base.device)
            with torch.no_grad(), recording(base.model, sites, rows) as found:
                run(base.model, given.ids.to(base.device), given.mask.to(base.device), sites)
            seen[base.side] = {k: found[p, "out"] for k, p in last[base.side].items()}
        for t, x_t in seen["target"].items():
            for s, x_s in seen["source"].items():
                m = moments_of(x_s, x_t)
                sums[t, s] = sums[t, s] + m if (t, s) in sums else m
    table = {pair: cka(m) for pair, m in sums.items()}
    return depth.monotone(depth.likeness(table, target.depth[side], source.depth[side]))


def _blocks(base: Base, side: str) -> dict[int, str]:
    """{layer: the module that is the whole layer}: the path up to its number."""
    found = {}
    for role, part in base.parts.items():
        if role.layer is None or role.side != side or role.layer in found:
            continue
        words = part.path.split(".")
        found[role.layer] = ".".join(words[: words.index(str(role.layer)) + 1])
    return found


def joined(
    source: Base, target: Base, layers: Chosen, modules: Collection[str] | None
) -> tuple[dict[Role, tuple[Role, int]], tuple[tuple[str, ...], tuple[str, ...]]]:
    """{role in the target: (role in the source, how many share it)}, and the paths without one.

    Raises:
        MismatchError: `modules` names no role, or nothing is left.
    """
    pairs: dict[Role, Role] = {}
    for role in target.parts:
        layer = role.layer if role.layer is None else layers[role.side][role.layer]
        other = Role(role.kind, layer, role.side, role.expert)
        if other in source.parts:
            pairs[role] = other
    if modules is None:  # a head's outputs would be paired token with token: vocabulary squared
        pairs = {r: o for r, o in pairs.items() if r.layer is not None} or pairs
    else:
        if isinstance(modules, str):
            raise MismatchError(f"modules is a list of kinds: give [{modules!r}]")
        for word in modules:
            if not any(_means(word, role) for role in pairs):
                known = ", ".join(sorted({role.kind for role in pairs}))
                raise MismatchError(f"modules: {word!r} is none of the kinds in common: {known}")
        pairs = {r: o for r, o in pairs.items() if any(_means(w, r) for w in modules)}
    if not pairs:
        raise MismatchError(
            f"the bases have no role in common: {_kinds(source)} and {_kinds(target)}"
        )
    times = {o: sum(other == o for other in pairs.values()) for o in pairs.values()}
    alone_s = {p.path for r, p in source.parts.items() if r not in times}
    alone_t = {p.path for r, p in target.parts.items() if r not in pairs}
    return (
        {r: (o, times[o]) for r, o in pairs.items()},
        (tuple(sorted(alone_s)), tuple(sorted(alone_t))),
    )


def _means(word: str, role: Role) -> bool:
    return role.kind == word or word in role.kind.split(".")


def _kinds(base: Base) -> str:
    return ", ".join(sorted({role.kind for role in base.parts}))
