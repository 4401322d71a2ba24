"""From the keys of a PEFT file to modules, and nothing read but the header.

    base_model.model.<stem>.lora_A.weight                 linear, convolution, attention
    base_model.model.<stem>.lora_embedding_A              embedding

The stem is the module path, except that PEFT's wrappers show: `<path>.base_layer.out_proj` is
the output projection of a MultiheadAttention, and one trailing `.base_layer` per further wrapper
marks a targeted parameter (`target_parameters`). An adapter name after `lora_A` and a missing
prefix are both accepted, and so is `lora_A` without `.weight` (loralib). What compiling and
sharding put into names (`_orig_mod.`, `module.`, the prefix twice) is taken out first, of the keys
and of the config: `plain_keys`.

A targeted 3-D parameter holds E experts, each of them a module here, `<module>.<parameter>[e]`:
A (E·r, in) counts the expert slowest, B (out, E·r) fastest. Which parameter a wrapper belongs to
is not in the file. PEFT wraps a module's parameters in the order in which the module registers
them, the first innermost; that order is taken from the usual names, checked against the shapes,
and else from the config.
"""

from __future__ import annotations

import itertools
import math
import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field, replace
from typing import Any, TypeVar

from ..errors import FileError, MismatchError
from ..parts import (
    LINEAR,
    PREFIX,
    Layout,
    extra_kind,
    patterned,
    plain_name,
    refusal_reason,
    scaling,
)
from ..words import some_of, warn
from .formats.alphas import Alphas, alpha_keys
from .formats.foreign import foreign, no_pair
from .formats.reading import Plan, Shape, Slot, Tensors, common_dtype
from .formats.relatives.merged import looks_merged, merged_shape
from .formats.relatives.tinker import experts_of, is_of_experts, is_placeholder, plain_head
from .peft_targets import finds_module, parameters_of

_KEY = re.compile(
    rf"(?:{re.escape(PREFIX)})?(?P<stem>.+)\."
    r"(?:(?P<plain>lora_[AB])(?:(?:\.[^.]+)?\.weight)?"
    r"|(?P<embedding>lora_embedding_[AB])(?:\.[^.]+)?)"
)
_OUT_PROJ = ".base_layer.out_proj"
_T = TypeVar("_T")

# Fields of a config that name modules, or match their names.
_NAMING = (
    *("target_modules", "exclude_modules", "modules_to_save", "target_parameters"),
    *("rank_pattern", "alpha_pattern", "trainable_token_indices"),
)
# What is taken out of names, in what may be an expression: `a.b`, `a\.b`; of `a.*` the dot stays.
_DOT = r"(?:\\?\.(?![*+?{])|(?=\.[*+?{]))"
_HIDDEN = re.compile(rf"(?:_orig_mod|_fsdp_wrapped_module|_checkpoint_wrapped_module){_DOT}")
_LEADING = re.compile(rf"^(\^?)(?:(?:module|base_model\\?\.model){_DOT})+")

# PEFT (all releases so far) adds the update of a MultiheadAttention's output projection twice,
# in the forward pass and in a merge: https://github.com/huggingface/peft/pull/3774. That is the
# update that was trained, so it is the one that is read, and halved again when written.
OUT_PROJ_TIMES = 2.0

# The order in which mixture-of-experts layers register their parameters.
_MANY = 6  # parameters of one module, of which not every order is tried
_ORDER = ("gate_up_proj", "gate_proj", "up_proj", "down_proj", "w1", "v1", "w2", "w3")


@dataclass
class _Pair:
    """The two keys of one stem, while they are being collected."""

    stem: str
    embedding: bool
    keys: dict[str, str] = field(default_factory=dict)


def is_factor(key: str) -> bool:
    """Whether a key is one of a factor of an update, as PEFT calls them."""
    return _KEY.fullmatch(key) is not None


def plain_key(key: str) -> str:
    """A file's key without what wrapped the model when it was saved.

    Examples:
        >>> plain_key("module.base_model.model._orig_mod.h.0.q.lora_A.weight")
        'base_model.model.h.0.q.lora_A.weight'
    """
    name, prefix = plain_name(key), ""
    while name.startswith(PREFIX):
        name, prefix = plain_name(name.removeprefix(PREFIX)), PREFIX
    return plain_head(prefix + name)


def plain_keys(
    tensors: Mapping[str, _T], config: dict[str, Any] | None, where: str
) -> tuple[dict[str, _T], dict[str, Any] | None]:
    """Tensors under their plain keys, and the config in the same names.

    Raises:
        MismatchError: two keys that are one.
    """
    found: dict[str, tuple[str, _T]] = {}
    for key, value in tensors.items():
        twin, _ = found.setdefault(plain_key(key), (key, value))
        if twin != key:
            raise MismatchError(f"{where}: {twin!r} and {key!r} are the same tensor; keep one")
    if config is not None and any(key != old for key, (old, _) in found.items()):
        config = {k: _plain_names(v) if k in _NAMING else v for k, v in config.items()}
    return {key: value for key, (_, value) in found.items()}, config


def _plain_names(value: Any) -> Any:
    if isinstance(value, str):
        return _LEADING.sub(r"\1", _HIDDEN.sub("", value))
    if isinstance(value, list):
        return [_plain_names(v) for v in value]
    if isinstance(value, dict):
        return {_plain_names(k): v for k, v in value.items()}
    return value


def make_plan(
    tensors: Tensors,
    config: Mapping[str, Any] | None,
    alphas: Alphas,
    where: str,
    blocks: tuple[bool, ...] = (),
) -> Plan:
    """Find the modules among the tensors of a PEFT file.

    Args:
        tensors: {key: (dtype, shape)}.
        config: the adapter's configuration; None where there is none.
        alphas: what is said of α; without a config the rank is the factors' own.
        where: the file, for messages.
        blocks: which of their layers' blocks the factors are of; see `relatives.merged`.

    Raises:
        FileError: a format that is not read, no module and nothing else that is known, or no α.
        MismatchError: naming file and key: an A without B or the reverse, ranks that disagree
            with each other or with the config, a dtype that is not floating point, two keys for
            one module.
    """
    told = foreign(tensors)
    if told is not None:
        raise FileError(f"{where}: {told}")
    pairs, extra_keys = _pairs(tensors, where)
    _check_found(tensors, pairs, extra_keys, config, alphas, where)
    plain: list[tuple[_Pair, Shape, Shape]] = []
    for pair in pairs:
        if set(pair.keys) != {"A", "B"}:
            (there,) = pair.keys
            other = "B" if there == "A" else "A"
            raise MismatchError(
                f"{where}: {pair.keys[there]!r} has no partner lora_{other}: the file is incomplete"
            )
        shapes = _checked_shapes(pair, tensors, config, where, blocks)
        if shapes is None:
            extra_keys += pair.keys.values()
        else:
            plain.append((pair, *shapes))
    used = alpha_keys(tensors)
    taken = {used[pair.stem] for pair, _, _ in plain if pair.stem in used}
    extra_keys = [key for key in extra_keys if key not in taken]
    try:
        slots = _slots(plain, tensors, config, alphas)
        slots = {p: replace(s, blocks=blocks) for p, s in slots.items()} if blocks else slots
    except MismatchError as e:
        raise MismatchError(f"{where}: {e}") from e
    _tell_unused(config or {}, slots, where)
    # In the order of the file, which is the order in which they are read.
    order = {key: i for i, key in enumerate(tensors)}
    slots = dict(sorted(slots.items(), key=lambda item: order[item[1].A]))
    return Plan(slots, tuple(sorted(extra_keys, key=order.__getitem__)))


def _tell_unused(config: Mapping[str, Any], slots: Mapping[str, Slot], where: str) -> None:
    """Warn of patterns of a config that no module is meant by."""
    groups = {slot.layout.group(path) for path, slot in slots.items()}
    for name in ("rank_pattern", "alpha_pattern"):
        unused = [
            key for key in config.get(name) or {} if not any(patterned(key, g) for g in groups)
        ]
        if unused and groups:
            warn(f"{where}: {name} has {some_of(unused)}, by which no module of the file is meant")


def check_gathered(shapes: Iterable[tuple[str, Shape]], where: str) -> None:
    """Refuse tensors that a sharded run has left empty when it saved.

    Raises:
        MismatchError: naming them.
    """
    empty = [key for key, shape in shapes if shape == (0,)]
    if empty:
        raise MismatchError(
            f"{where}: {some_of(empty, 2)} of shape (0,): the parameters were sharded (ZeRO 3, "
            "FSDP) and not gathered when this was saved; save it again from the gathered state "
            "dict (stage3_gather_16bit_weights_on_model_save, FULL_STATE_DICT)"
        )


def _check_found(
    tensors: Tensors,
    pairs: list[_Pair],
    extra_keys: list[str],
    config: Mapping[str, Any] | None,
    alphas: Alphas,
    where: str,
) -> None:
    """Refuse a file in which nothing is known, what is not whole, and modules without a scale."""
    if not tensors:
        raise FileError(f"{where}: there are no tensors in it")
    check_gathered(((key, shape) for key, (_, shape) in tensors.items()), where)
    kinds = {extra_kind(key, config or {}) for key in extra_keys}
    if not pairs and (config is None or "unknown" in kinds):
        raise FileError(f"{where}: {no_pair(tensors)}")
    unscaled = [pair.stem for pair in pairs if config is None and not alphas.known(pair.stem)]
    if unscaled:
        of = "" if len(unscaled) == len(pairs) else f" of {some_of(unscaled)}"
        raise FileError(
            f"{where}: there is no adapter_config.json, so the scale{of} is unknown; give alpha= "
            "(the α it was trained with; the rank is the factors' own)"
        )


def stem_scaling(config: Mapping[str, Any], layout: Layout, path: str) -> tuple[int, float]:
    """Rank and scale that the config gives to the module at `path`, as PEFT applies it."""
    rank, scale = scaling(config, layout.group(path))
    return rank, scale * OUT_PROJ_TIMES if layout.is_out_proj else scale


def parameter_order(names: list[str], shapes: list[tuple[int, int]] | None = None) -> list[str]:
    """Parameters of one module in the order of registration, as far as names and shapes tell.

    Args:
        names: in the order to fall back on.
        shapes: (out, in) of the factors in that order, the innermost first, where there are any.
    """
    known = {name: i for i, name in enumerate(_ORDER)}
    default = sorted(names, key=known.__getitem__) if set(names) <= set(known) else list(names)
    if shapes is None or len(names) > _MANY or _fit(default, shapes):
        return default
    fitting = [list(p) for p in itertools.permutations(default) if _fit(list(p), shapes)]
    return fitting[0] if len(fitting) == 1 else default


def _fit(names: list[str], shapes: list[tuple[int, int]]) -> bool:
    """Whether a gated MLP could have these shapes: gate and up lead to where down starts."""
    by_name = dict(zip(names, shapes, strict=True))
    downs = [s for name, s in by_name.items() if name.startswith("down")]
    ups = [s for name, s in by_name.items() if name.startswith(("gate", "up"))]
    return all(up[1] == down[0] and up[0] in (down[1], 2 * down[1]) for up in ups for down in downs)


def _pairs(tensors: Tensors, where: str) -> tuple[list[_Pair], list[str]]:
    pairs: dict[tuple[str, bool], _Pair] = {}
    extra_keys = []
    for key in tensors:
        match = _KEY.fullmatch(key)
        if match is None:
            extra_keys.append(key)
            continue
        side = match["plain"] or match["embedding"]
        stem, embedding = match["stem"], match["plain"] is None
        if is_placeholder(stem, tensors[key][1]):
            continue
        pair = pairs.setdefault((stem, embedding), _Pair(stem, embedding))
        twin = pair.keys.setdefault(side[-1], key)
        if twin != key:
            raise MismatchError(
                f"{where}: {twin!r} and {key!r} are the same module {stem!r}; "
                "keep one of them (one file holds one adapter)"
            )
    return list(pairs.values()), extra_keys


def _checked_shapes(
    pair: _Pair,
    tensors: Tensors,
    config: Mapping[str, Any] | None,
    where: str,
    blocks: tuple[bool, ...],
) -> tuple[Shape, Shape] | None:
    """Shapes of A and B; None where they are no plain factors and have to stay extras."""
    for key in pair.keys.values():
        dtype, shape = tensors[key]
        if not dtype.is_floating_point:
            raise MismatchError(f"{where}: {key!r} must be floating point, found {dtype}")
        if len(shape) < 2 or 0 in shape:
            raise MismatchError(
                f"{where}: {key!r} has shape {shape}, a factor has two dimensions or more and "
                "no empty one (it may be a shard that was not gathered before saving)"
            )
    A, B = tensors[pair.keys["A"]][1], tensors[pair.keys["B"]][1]
    if blocks and not pair.embedding:
        try:
            return A, merged_shape(pair.keys["B"], A, B, blocks)
        except MismatchError as e:
            raise MismatchError(f"{where}: {e}") from e
    if not pair.embedding and is_of_experts(pair.stem, A):
        return A, B
    fits = len(A) == len(B) and all(n == 1 for n in B[2:])
    if fits and A[0] == B[1]:
        return A, B
    if fits and len(A) > 2 and A[0] % B[1] == 0:
        return None  # a grouped convolution: B (out, r / groups, 1, …)
    if refusal_reason(config or {}, ()) is not None:
        return None  # a variant with factors of its own, block-diagonal ones for example
    hint = ""
    if looks_merged(A, B):
        hint = (
            "; if they are of some blocks of a fused layer (loralib), the config has to say which, "
            '"enable_lora": [true, false, true]'
        )
    raise MismatchError(
        f"{where}: ranks disagree: {pair.keys['A']!r} is {A} and {pair.keys['B']!r} is {B}{hint}"
    )


def _slots(
    plain: list[tuple[_Pair, Shape, Shape]],
    tensors: Tensors,
    config: Mapping[str, Any] | None,
    alphas: Alphas,
) -> dict[str, Slot]:
    stems = {pair.stem for pair, _, _ in plain}
    slots: dict[str, Slot] = {}
    wrapped: dict[str, list[tuple[_Pair, Shape, Shape]]] = {}
    for pair, A, B in plain:
        experts = None if pair.embedding else experts_of(pair.stem, A, B)
        if experts is not None:
            one = _slot(pair, A[1:], B[1:], pair.stem, LINEAR, tensors, config, alphas)
            for e, path in enumerate(experts):
                _add(slots, path, replace(one, part=(e, len(experts))))
            continue
        owner = re.sub(r"(\.base_layer)+$", "", pair.stem)
        if owner != pair.stem or _is_parameter(config, owner, pair):
            wrapped.setdefault(owner, []).append((pair, A, B))
        else:
            path, layout = _layout(pair, A, stems)
            _add(slots, path, _slot(pair, A, B, path, layout, tensors, config, alphas))
    for owner, group in wrapped.items():
        for path, slot in _parameter_slots(owner, group, tensors, config, alphas).items():
            _add(slots, path, slot)
    return slots


def _add(slots: dict[str, Slot], path: str, slot: Slot) -> None:
    twin = slots.setdefault(path, slot)
    if twin is not slot:
        raise MismatchError(f"{twin.A!r} and {slot.A!r} are the same module {path!r}; keep one")


def _layout(pair: _Pair, A: Shape, stems: set[str]) -> tuple[str, Layout]:
    stem = pair.stem
    if pair.embedding:
        return stem, Layout("embedding")
    if len(A) > 2:
        return stem, Layout("conv", kernel=A[1:])
    if stem.endswith(_OUT_PROJ):
        return stem.removesuffix(_OUT_PROJ) + ".out_proj", Layout(stem=stem)
    if stem + _OUT_PROJ in stems:
        return stem, Layout(parameter="in_proj_weight")
    return stem, LINEAR


def _slot(
    pair: _Pair,
    A: Shape,
    B: Shape,
    path: str,
    layout: Layout,
    tensors: Tensors,
    config: Mapping[str, Any] | None,
    alphas: Alphas,
) -> Slot:
    rank = A[0]
    if config is None:
        scale = alphas.of(pair.stem, rank) / rank * (OUT_PROJ_TIMES if layout.is_out_proj else 1)
    else:
        expected, scale = stem_scaling(config, layout, path)
        if rank != expected:
            raise MismatchError(
                f"{pair.keys['A']!r} is {A}, but the config gives {path!r} the rank {expected}"
            )
        alphas.check(pair.stem, config, layout.group(path))
    dtype = common_dtype(*(tensors[key][0] for key in pair.keys.values()))
    return Slot(
        pair.keys["A"], pair.keys["B"], (B[0], math.prod(A[1:])), rank, scale, layout, dtype
    )


def _is_parameter(config: Mapping[str, Any] | None, module: str, pair: _Pair) -> bool:
    if pair.embedding or config is None or not parameters_of(config, module):
        return False
    # A target without a module part ("weight") fits any module; what `target_modules` finds by
    # itself is a module.
    return not finds_module(config, module)


def _parameter_slots(
    owner: str,
    group: list[tuple[_Pair, Shape, Shape]],
    tensors: Tensors,
    config: Mapping[str, Any] | None,
    alphas: Alphas,
) -> dict[str, Slot]:
    names = parameters_of(config or {}, owner)
    if len(names) != len(group):
        raise MismatchError(
            f"{group[0][0].keys['A']!r}: {len(group)} parameters of {owner!r} have factors, "
            f"but target_parameters in the config names {names or 'none'}"
        )
    group = sorted(group, key=lambda item: -len(item[0].stem))  # the innermost first
    shapes = [(B[0], A[1]) for _, A, B in group]
    order = parameter_order(names, shapes)
    slots = {}
    for (pair, A, B), name in zip(group, order, strict=True):
        path = f"{owner}.{name}"
        rank, scale = scaling(config or {}, path)
        alphas.check(pair.stem, config or {}, path)
        a, b = pair.keys["A"], pair.keys["B"]
        count, rest = divmod(A[0], rank)
        if rest:
            raise MismatchError(
                f"{a!r} is {A}, which is no multiple of the rank {rank} "
                f"that the config gives {path!r}"
            )
        dtype = common_dtype(*(tensors[key][0] for key in pair.keys.values()))
        for e in range(count):
            layout = Layout("expert", parameter=name, stem=pair.stem, expert=(e, count))
            slot = Slot(a, b, (B[0], A[1]), rank, scale, layout, dtype)
            slots[f"{path}[{e}]" if count > 1 else path] = slot
    return slots
