"""An adapter on another architecture of the same shapes: every update where its role is.

Nothing is aligned or resized: this is for bases that differ in names and in what they keep in one
weight. What is fused here and apart there is taken apart, and the other way round, exactly.
"""

from __future__ import annotations

import os
from collections import Counter
from collections.abc import Collection, Iterable, Mapping
from dataclasses import dataclass, replace
from typing import Any

from torch import Tensor

from ..adapter import Adapter
from ..errors import MismatchError, RefusedError
from ..lowrank import LowRank
from ..naming import Shape
from ..parts import LINEAR, Layout, base_names, extra_kind
from ..prefixes import regauged
from .fused import Packing, packing
from .names import config_of, name_of, weights_in
from .role import Role
from .roles import Tables, default_side, recognised, roles

# What a config says by the names, or of the layers, of the base that it was made for.
_OF_ITS_BASE = (
    *("target_modules", "target_parameters", "exclude_modules", "layers_to_transform"),
    *("layers_pattern", "fan_in_fan_out"),
)


_OF_LANGUAGE = {"encoder", "decoder", "text"}


@dataclass(frozen=True)
class _Base:
    """A base: {role: path}, roles that several of its modules have, what it was given as, and
    {path: shape}.
    """

    paths: Mapping[Role, str]
    twice: Collection[Role]
    given: Any
    shapes: Mapping[str, Shape | None]

    def expert(self, path: str, stem: str | None = None) -> Layout | None:
        """How an update at `<parameter of all experts>[e]` lies there; None where the base does
        not say, or has no such expert.
        """
        whole, _, number = path.removesuffix("]").partition("[")
        shape = self.shapes.get(whole)
        if shape is None or len(shape) != 3 or int(number) >= shape[0]:
            return None
        parameter = whole.rpartition(".")[2]
        return Layout("expert", parameter=parameter, stem=stem, expert=(int(number), shape[0]))

    def path(self, role: Role) -> str | None:
        """Where a role is; of one expert, in the parameter of all of them too.

        Raises:
            MismatchError: several modules have it.
        """
        if role in self.twice:
            raise MismatchError(
                f"several modules of the base are {str(role)!r}, {self.paths[role]!r} one of them: "
                "tell them apart with tables={end of the path: kind}"
            )
        if role in self.paths or role.expert is None:
            return self.paths.get(role)
        whole = self.paths.get(replace(role, expert=None))
        return None if whole is None else f"{whole}[{role.expert}]"


@dataclass(frozen=True)
class _Part:
    """An update, how its weight keeps it, and the path that it had (None: made of several).

    Args:
        joined: of several updates, one's ranks after another's.
    """

    update: LowRank
    layout: Layout = LINEAR
    was: str | None = None
    joined: bool = False


def onto(
    adapter: Adapter,
    base: Any,
    *,
    packings: Mapping[str, Packing] | None = None,
    tables: Tables = (),
) -> Adapter:
    """The adapter on another base of the same shapes, by roles.

    An update whose role the base has goes there bit for bit. One of a fused weight is taken apart
    where the base has its parts, and those of parts are put together where it has them in one.

    Not for: a base of other shapes or with other hidden units (`lf.transfer`).

    Args:
        adapter: to be moved.
        base: a model, its configuration or folder, or module paths (where nothing is fused).
        packings: {module path: how it packs its parts}; by default by the adapter's own base, if
            `base_model` is a folder.
        tables: as in `roles`, for both sides.

    Returns:
        A new `Adapter` under the base's names.

    Raises:
        MismatchError: roles that are not known, modules without a counterpart (all named), a
            fused module of an unknown packing, or shapes that differ.
        RefusedError: an extra tensor that has no place there.

    Examples:
        >>> import torch
        >>> import lorafold as lf
        >>> u = lf.LowRank(torch.randn(2, 8), torch.randn(8, 2))
        >>> a = lf.Adapter({"model.layers.0.self_attn.q_proj": u})
        >>> list(onto(a, ["transformer.h.0.attn.q_proj"]))
        ['transformer.h.0.attn.q_proj']
    """
    mine = one_each(roles(adapter, tables))
    shapes = weights_in(base)
    theirs, _ = recognised(shapes, tables, default_side(base))
    # A path of the base's own is what it is there: a bare ViT's does not tell that it is one.
    mine = {path: theirs.get(path, role) for path, role in mine.items()}
    mine = _on_its_side(mine, theirs.values())
    counts = Counter(theirs.values())
    twice = {role for role, n in counts.items() if n > 1}
    there = _Base({role: path for path, role in theirs.items()}, twice, base, shapes)
    known = dict(known_packings(mine, adapter.base_model) if packings is None else packings)
    placed = _placed(adapter, mine, there, known)
    for path, part in placed.items():
        _check_shape(path, part, shapes.get(path.partition("[")[0]))
    moved = {part.was: path for path, part in placed.items() if part.was is not None}
    config = _config(adapter, base, all(was == path for was, path in moved.items()))
    if any(part.joined for part in placed.values()):
        config = regauged(config)
    extras = _extras(adapter, moved, there, tables, config)
    return Adapter(
        {path: part.update for path, part in placed.items()},
        extras,
        config,
        layouts={path: part.layout for path, part in placed.items() if part.layout != LINEAR},
    )


def one_each(found: Mapping[str, Role]) -> Mapping[str, Role]:
    """The roles of an adapter, no two of which are the same.

    Raises:
        MismatchError: two modules have one role.
    """
    paths: dict[Role, str] = {}
    for path, role in found.items():
        other = paths.setdefault(role, path)
        if other != path:
            raise MismatchError(
                f"{other!r} and {path!r} have one role, {str(role)!r}: tell them apart with "
                "tables={end of the path: kind}"
            )
    return found


def known_packings(mine: Mapping[str, Role], base: Any) -> dict[str, Packing]:
    """{path: packing} of the fused modules, as far as their base tells.

    Args:
        mine: {path: Role}.
        base: a model, its configuration or folder; or a name, which tells nothing.
    """
    if isinstance(base, str) and not os.path.isdir(base):
        base = None
    if not config_of(base):
        base = None
    found = {}
    for path, role in mine.items():
        try:
            one = packing(role, base)
        except MismatchError:
            continue
        if one is not None:
            found[path] = one
    return found


def _on_its_side(mine: Mapping[str, Role], theirs: Iterable[Role]) -> dict[str, Role]:
    """The roles; where either model has one stack, of language, these stand for each other."""
    ours = {role.side for role in mine.values()} - {""}
    others = {role.side for role in theirs} - {""}
    if len(ours) != 1 or len(others) != 1 or not ours | others <= _OF_LANGUAGE:
        return dict(mine)
    (side,) = others
    return {path: replace(r, side=side) if r.side else r for path, r in mine.items()}


def _placed(
    adapter: Adapter, mine: Mapping[str, Role], there: _Base, known: Mapping[str, Packing]
) -> dict[str, _Part]:
    """{path in the base: what goes there}.

    Raises:
        MismatchError: no counterpart, or an unknown packing.
    """
    placed: dict[str, _Part] = {}
    single: dict[Role, _Part] = {}  # what is still to go to a module of its own, or with others
    lost: list[str] = []
    for path, u in adapter.items():
        role, layout = mine[path], adapter.layout(path)
        to = there.path(role)
        if to is not None and (not role.parts or known.get(path) == packing(role, there.given)):
            if to.endswith("]") and layout.kind != "expert":
                among = there.expert(to)
                if among is None:
                    lost.append(_among(repr(path), to))
                else:
                    placed[to] = _Part(u, among, path)
            elif to == path:
                placed[to] = _Part(u, layout, path)
            else:
                alone = layout.kind == "expert" and not to.endswith("]")
                placed[to] = _Part(u, LINEAR if alone else replace(layout, stem=None), path)
        elif not role.parts:
            single[role] = _Part(u, layout, path)
        elif path not in known:
            raise MismatchError(
                f"how {path!r} packs {', '.join(p.kind for p in role.parts)} is not known: write "
                "the adapter with lorafold.save(adapter, path, format='portable', base=its own "
                "model or folder) first"
            )
        else:
            parts = zip(role.parts, known[path].split(u).values(), strict=True)
            for one, cut in parts:
                if one in mine.values():
                    raise MismatchError(f"the adapter has {str(one)!r} twice, in {path!r} too")
                single[one] = _Part(cut, was=path)
    placed |= _fused(single, there, lost)
    for role, part in single.items():
        at = there.path(role)
        if at is None:
            lost.append(f"{part.was!r} ({role})")
        else:
            placed[at] = _Part(part.update)
    if lost:
        shown = ", ".join(lost[:5]) + (", …" if len(lost) > 5 else "")
        raise MismatchError(
            f"{len(lost)} modules of the adapter have no counterpart in the base: {shown}; leave "
            "them out (dataclasses.replace(adapter, modules={…})), or give tables="
        )
    return placed


def _fused(single: dict[Role, _Part], there: _Base, lost: list[str]) -> dict[str, _Part]:
    """{path in the base: parts in one weight}; they are taken out of `single`, or go to `lost`."""
    placed: dict[str, _Part] = {}
    for fused, to in there.paths.items():
        for whole in _experts(fused, single):
            given = {p: single.pop(p).update for p in whole.parts if p in single}
            if given:
                path_there, among = to, LINEAR
                if whole.expert is not None and fused.expert is None:
                    path_there = f"{to}[{whole.expert}]"
                    found = there.expert(path_there)
                    if found is None:
                        lost += [_among(p, to) for p in map(str, given)]
                        continue
                    among = found
                words = {p.kind.rpartition(".")[2]: u for p, u in given.items()}
                how = packing(whole, there.given)
                assert how is not None
                placed[path_there] = _Part(how.fuse(words), among, joined=True)
    return placed


def _among(path: str, whole: str) -> str:
    return f"{path} (one of the experts in {whole.partition('[')[0]!r})"


def _experts(fused: Role, single: Mapping[Role, _Part]) -> list[Role]:
    """The fused role, and it for each expert that parts are given of."""
    if not fused.parts or fused.expert is not None:
        return [fused]
    numbers = {r.expert for r in single if replace(r, expert=None) in fused.parts}
    return [replace(fused, expert=e) for e in sorted(numbers, key=lambda e: -1 if e is None else e)]


def _check_shape(path: str, part: _Part, shape: Shape | None) -> None:
    out, inner = part.update.shape
    fits = part.layout.shapes(out, inner)
    if shape is not None and shape not in fits:
        found = "×".join(map(str, shape))
        raise MismatchError(
            f"{path!r} is {found} in the base, and the adapter's update is {out}×{inner}: this is "
            "for bases of the same shapes; lorafold.transfer is for others"
        )


def _config(adapter: Adapter, base: Any, same_names: bool) -> dict[str, Any]:
    """The adapter's config, without what it says by the names of another base."""
    config = dict(adapter.config)
    if not same_names:
        for field in _OF_ITS_BASE:
            config.pop(field, None)
    name = name_of(base)
    if name is not None or "base_model_name_or_path" in config:
        config["base_model_name_or_path"] = name
    return config


def _extras(
    adapter: Adapter,
    moved: Mapping[str, str],
    there: _Base,
    tables: Tables,
    config: dict[str, Any],
) -> dict[str, Tensor]:
    """The extra tensors under the base's names; `config` is told of modules saved whole.

    Raises:
        RefusedError: one that has no place there.
    """
    if all(moved.get(path) == path for path in adapter):
        return dict(adapter.extras)
    found = {}
    for key, tensor in adapter.extras.items():
        names = base_names(key)
        owner = next((p for p in moved if any(n.startswith(f"{p}.") for n in names)), None)
        to = None if owner is None else moved[owner]
        if owner is None:
            owner = names[-1].rpartition(".")[0]
            role = recognised([owner], tables)[0].get(owner)
            to = None if role is None else there.path(role)
        if to is None:
            raise RefusedError(
                f"{key!r} has no place in the other base: leave it out "
                "(dataclasses.replace(adapter, extras={…}))"
            )
        if extra_kind(key, adapter.config) == "saved module":
            saved = dict.fromkeys([*(config.get("modules_to_save") or []), to.rpartition(".")[2]])
            config["modules_to_save"] = list(saved)
        found[key.replace(owner, to, 1)] = tensor
    return found
