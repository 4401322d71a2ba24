"""How a base names and keeps its tensors, against the names that its modules have in memory.

Three things differ: a prefix (`language_model.model.layers…` on the disk for
`model.language_model.layers…`), words (`block_sparse_moe` for `mlp`, `attention.query` for
`q_proj`), and how much one tensor holds: experts that are one parameter in memory and one tensor
each on the disk (or the other way round, where an adapter has a module for each), or q, k and v in
one tensor on the disk. All of it is settled per *kind* of name
(numbers left out), by what is there: a name that is there needs no rule, a rule counts only where
its result is there, and where two results are equally good there is none.

Given up: renamings outside the tables below. What they miss has no place, and that is said.
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass, replace
from functools import cached_property
from itertools import count
from typing import TYPE_CHECKING, Any

from .parts import plain_name

if TYPE_CHECKING:
    from torch import Tensor

Shape = tuple[int, ...]

# What wraps the body of a language model; these stand for each other.
_BODIES = {"model", "language_model", "text_model", "transformer", "llm", "thinker", "backbone"}

# Words of a kind of name in memory, and what they are on the disk: applied in turn.
_FAMILIES: tuple[tuple[tuple[str, str], ...], ...] = (
    (),
    (
        (r"\.mlp\.(?=experts\.|gate\.|router\.)", ".block_sparse_moe."),
        (r"\.router\.weight$", ".gate.weight"),
    ),
    (
        (r"\.layers\.#", ".encoder.layer.#"),
        (r"\.attention\.o_proj\.", ".attention.output.dense."),
        (r"\.attention\.(q|k|v)_proj\.", r".attention.attention.\1_proj."),
        (r"\.mlp\.fc1\.", ".intermediate.dense."),
        (r"\.mlp\.fc2\.", ".output.dense."),
        (r"\.q_proj\.", ".query."),
        (r"\.k_proj\.", ".key."),
        (r"\.v_proj\.", ".value."),
    ),
    (
        (r"\.attention\.o_proj\.", ".attention.output.dense."),
        (r"\.attention\.q_proj\.", ".attention.attention.query."),
        (r"\.attention\.k_proj\.", ".attention.attention.key."),
        (r"\.attention\.v_proj\.", ".attention.attention.value."),
    ),
    (
        (r"\.attention\.o_proj\.", ".attention.output.dense."),
        (r"\.attention\.q_proj\.", ".attention.self.query."),
        (r"\.attention\.k_proj\.", ".attention.self.key."),
        (r"\.attention\.v_proj\.", ".attention.self.value."),
        (r"\.mlp\.fc1\.", ".intermediate.dense."),
        (r"\.mlp\.fc2\.", ".output.dense."),
    ),
    ((r"\.layers\.#", ".encoder.layer.#"), (r"\.self_attn\.", ".attention.")),
    (
        (r"\.layers\.#", ".encoder.layers.#"),
        (r"\.self_attn\.o_proj\.", ".mixer.out_proj."),
        (r"\.self_attn\.", ".mixer."),
    ),
    (
        (r"\.layers\.#", ".encoder.layers.#"),
        (r"\.self_attn\.o_proj\.", ".attn.out_proj."),
        (r"\.self_attn\.", ".attn."),
        (r"\.mlp\.up_proj\.", ".mlp.fc11."),
        (r"\.mlp\.gate_proj\.", ".mlp.fc12."),
        (r"\.mlp\.down_proj\.", ".mlp.fc2."),
    ),
    ((r"^\.lm_head\.", ".embed_out."),),
    (
        (r"\.experts\.gate_up_proj$", ".input_linear.weight"),
        (r"\.experts\.down_proj$", ".output_linear.weight"),
        (r"\.router\.weight$", ".router.layer.weight"),
    ),
    ((r"\.experts\.gate_up_proj$", ".experts.fc1.weight"), (r"\.down_proj$", ".fc2.weight")),
)
# One parameter of all experts in memory: the tensors that an expert has on the disk, in order.
_EXPERTS = {
    "gate_up_proj": (("gate_proj", "up_proj"), ("w1", "w3"), ("fc1", "fc3")),
    "down_proj": (("down_proj",), ("w2",), ("fc2",)),
}
# The other way round, {layer of one expert: (the parameter of all, at which place of n)}.
_ALL_EXPERTS = {
    name: (whole, (i, len(names)) if len(names) > 1 else None)
    for whole, spellings in _EXPERTS.items()
    for names in spellings
    for i, name in enumerate(names)
}
_ONE_EXPERT = re.compile(r"(?P<owner>(?:.+\.)?experts)\.#\.(?P<name>\w+)\.weight")
# One layer in memory: the tensor on the disk that holds it among n, and at which place.
_QKV = ("qkv", "qkv_proj", "Wqkv", "in_proj")
_GATED = ("gate_up_proj", "weights_in", "w12")
_FUSED: dict[str, tuple[tuple[str, int, int], ...]] = {
    **{f"{x}_proj": tuple((name, i, 3) for name in _QKV) for i, x in enumerate("qkv")},
    "gate_proj": (*((name, 0, 2) for name in _GATED), ("up_gate_proj", 1, 2)),
    "up_proj": (*((name, 1, 2) for name in _GATED), ("up_gate_proj", 0, 2)),
}

_HEAD = re.compile(
    r"(^|\.)(lm_head|embed_out|proj_out|output_projection|generator_lm_head|vocab_projector|lm_loss"
    r"|(lm_head|head|predictions)\.decoder|lm_head\.out_proj|pred_layer\.proj)\.weight$"
    r"|^decoder\.weight$"
)
_EMBEDDING = re.compile(
    r"(^|\.)(embed_tokens|wte|word_embeddings?|embed_in|tok_embeddings|tokens_embed|embeddings"
    r"|shared|transformer\.w)\.weight$"
)
_SHARED = re.compile(r"(^|\.)shared\.weight$")


def kind(name: str) -> str:
    """A name with its numbers left out: modules of one kind differ in these alone.

    Examples:
        >>> kind("model.layers.12.self_attn.q_proj")
        'model.layers.#.self_attn.q_proj'
    """
    return re.sub(r"(?<![^.])\d+(?![^.])", "#", name)


def is_head(name: str) -> bool:
    """Whether this is the weight of a language model's output layer."""
    return _HEAD.search(name) is not None


def is_shared(name: str) -> bool:
    """Whether this is one weight of the embeddings of both an encoder and a decoder."""
    return _SHARED.search(name) is not None


def _embedding(keys: Iterable[str]) -> str | None:
    found = [key for key in keys if _EMBEDDING.search(key)]
    return next(filter(is_shared, found), found[0] if found else None)


def _same_memory(state: Mapping[str, Tensor]) -> dict[str, tuple[str, ...]]:
    """{key: all keys of its memory}; one pass, as a model of many experts has 10⁵ tensors."""
    found: dict[Any, list[str]] = {}
    for key, t in state.items():
        # Without memory of its own (on the meta device, or empty) only the very same tensor is one.
        where = t.data_ptr() if t.numel() else 0
        mine = (where, t.shape, t.stride(), t.dtype) if where else id(t)
        found.setdefault(mine, []).append(key)
    return {key: tuple(keys) for keys in found.values() for key in keys}


@dataclass(frozen=True)
class Piece:
    """One tensor of a base, and what of a model's tensor it holds.

    Args:
        key: the base's own.
        expert: which entry along the first axis; None for all of it.
        rows: [start, stop) along the next axis; None for all of them.
        into: [start, stop) of the rows of the base's tensor that these are; None for all.
        entry: of the base's tensor along its first axis, that this is in, or its rows are.
        like: the key whose values it has, where it is stored under no key of its own (tied).
    """

    key: str
    expert: int | None = None
    rows: tuple[int, int] | None = None
    into: tuple[int, int] | None = None
    entry: int | None = None
    like: str | None = None

    @property
    def is_part(self) -> bool:
        """Whether the base's tensor holds more than this."""
        return self.into is not None or self.entry is not None


@dataclass(frozen=True)
class Held:
    """A tensor of a model, as a base holds it.

    Args:
        name: by which it was asked for.
        shape: of the model's tensor.
        dtype: of the base's.
        pieces: together they are all of it.
    """

    name: str
    shape: Shape
    dtype: Any
    pieces: tuple[Piece, ...]

    @property
    def whole(self) -> bool:
        """Whether one tensor of the base is just this."""
        p = self.pieces[0]
        return len(self.pieces) == 1 and p.expert is None and p.rows is None and not p.is_part

    @property
    def expert_module(self) -> str | None:
        """Of an expert's layer that the base has in a parameter of all experts: what the layer is
        called beside that; None for all else.
        """
        piece = self.pieces[0]
        if piece.entry is None:
            return None
        owner, _, whole = piece.key.rpartition(".")
        (names, *_) = _EXPERTS[whole]
        name = names[bool(piece.into and piece.into[0])]
        return f"{owner}.{piece.entry}.{name}"

    @cached_property
    def of_experts(self) -> dict[int | None, tuple[Piece, ...]]:
        """The pieces by the expert that they hold."""
        found: dict[int | None, tuple[Piece, ...]] = {}
        for piece in self.pieces:
            found[piece.expert] = (*found.get(piece.expert, ()), piece)
        return found


@dataclass(frozen=True)
class _Form:
    """How one kind of name is kept: kinds in the base ("*" counts experts), or part of one."""

    templates: tuple[str, ...]
    part: tuple[int, int] | None = None  # the i-th of n
    entry: int | None = None  # which number of the name is the entry along the first axis


class Base:
    """The names, shapes and dtypes of a base's tensors: a state dict's or those of files.

    Not for: reading or changing values; see `placing.placed` for what an adapter does to them.

    Args:
        tensors: {key: (shape, dtype)}.
        asked: names of tensors that an adapter has to do with; they decide between prefixes.
        tied: (key of the output layer, key of the embedding) that have one weight; the former may
            be stored nowhere. None where they have one each.
        shared: from a key to all keys that are one tensor with it in memory.
    """

    def __init__(
        self,
        tensors: Mapping[str, tuple[Shape, Any]],
        asked: Iterable[str] = (),
        tied: tuple[str, str] | None = None,
        shared: Callable[[str], tuple[str, ...]] | None = None,
    ) -> None:
        self.tensors, self.tied = tensors, tied
        self._shared = shared
        self._keys: dict[str, str] = {}
        for key in tensors:  # where `fc` is there as well, `module.fc` is another
            plain = plain_name(key)
            self._keys.setdefault(key if plain in tensors else plain, key)
        self._kinds: dict[str, list[str]] = {}
        for name in self._keys:
            self._kinds.setdefault(kind(name), []).append(name)
        self._ends: dict[str, list[str]] | None = None
        self._forms: dict[str, _Form | None] = {}
        self._held_as: dict[str, Held | None] = {}
        self._claimed: dict[str, str] = {}  # kind of the base: kind that was asked for
        self.renamed: dict[str, str] = {}  # prefix of the adapter: prefix of the base
        self._settle(dict.fromkeys(kind(plain_name(name)) for name in asked))

    def find(self, name: str) -> Held | None:
        """How the base holds the tensor that is called `name` in memory; None if it does not."""
        if name not in self._held_as:
            self._held_as[name] = self._look_up(name)
        return self._held_as[name]

    def _look_up(self, name: str) -> Held | None:
        plain = plain_name(name)
        key = self._keys.get(name, self._keys.get(plain))
        if key is not None:
            shape, dtype = self.tensors[key]
            return Held(name, shape, dtype, (Piece(key),))
        form = self._form(kind(plain))
        found = None if form is None else self._held(name, form, re.findall(_NUMBER, plain))
        return found or self._tied_head(name)

    def names(self) -> Iterator[str]:
        """All names, by the base's and by the adapter's prefixes."""
        yield from self._keys
        for old, new in self.renamed.items():
            yield from (old + name[len(new) :] for name in self._keys if name.startswith(new))

    def below(self, module: str) -> bool:
        """Whether anything is stored under a module."""
        return any(name in self._inside for name in self._as_stored(plain_name(module)))

    def beside(self, name: str) -> list[str]:
        """Keys of the module whose tensor `name` would be."""
        owners = self._as_stored(plain_name(name).rpartition(".")[0])
        return [key for owner in owners for key in self._inside.get(owner, ())]

    @cached_property
    def _inside(self) -> dict[str, list[str]]:
        """{module: keys of its own tensors}, of all modules that hold any, at whatever depth."""
        found: dict[str, list[str]] = {}
        for name, key in self._keys.items():
            owner = name.rpartition(".")[0]
            found.setdefault(owner, []).append(key)
            while (owner := owner.rpartition(".")[0]) and owner not in found:
                found[owner] = []
        return found

    def _as_stored(self, module: str) -> list[str]:
        """A module's name, and with each prefix that the base has instead."""
        renamed = self.renamed.items()
        return [
            module,
            *(new + module[len(old) :] for old, new in renamed if module.startswith(old)),
        ]

    def ties(self, key: str) -> tuple[str, ...]:
        """The keys that have one weight with `key`, itself included."""
        keys = (key,) if self._shared is None else self._shared(key)
        if self.tied is not None and not set(self.tied).isdisjoint(keys):
            keys = tuple(dict.fromkeys([*keys, *self.tied]))
        return keys

    @cached_property
    def tied_bias(self) -> tuple[str, str] | None:
        """(key of the tied output layer's bias, key that holds it) where it has none of its own.

        BERT and its kin tie both: a layer that gets a weight of its own needs its bias too.
        """
        head = "" if self.tied is None else self.tied[0]
        owner = head.removesuffix(".decoder.weight")
        own, like = f"{owner}.decoder.bias", f"{owner}.bias"
        there = owner != head and like in self.tensors and own not in self.tensors
        return (own, like) if there else None

    def source(self, key: str) -> str:
        """The key that has its numbers: its own, or what an output layer shares."""
        if self.tied is None or key in self.tensors:
            return key
        return self.tied_bias[1] if self.tied_bias and key == self.tied_bias[0] else self.tied[1]

    def embedding(self) -> str | None:
        """The key of the input embedding."""
        return _embedding(self.tensors)

    def alike(self, name: str) -> list[str]:
        """All names of the kind of `name` that the base holds."""
        asked = kind(plain_name(name))
        if asked in self._kinds:
            return self._kinds[asked]
        form = self._form(asked)
        if form is None:
            return []
        found: dict[str, None] = {}
        for there in self._kinds[form.templates[0].replace("*", "#")]:
            numbers = re.findall(_NUMBER, there)
            if form.entry is not None:
                at = form.entry
                shape, _ = self.tensors[self._keys[there]]
                for e in range(*shape[:1]):
                    found[_filled(asked, [*numbers[:at], str(e), *numbers[at:]])] = None
                continue
            before, star, _ = form.templates[0].partition("*")
            if star:
                del numbers[before.count("#")]
            found[_filled(asked, numbers)] = None
        return list(found)

    @classmethod
    def of_state(cls, state: Mapping[str, Tensor], asked: Iterable[str] = ()) -> Base:
        """A state dict as a base.

        An output layer that is not in it is the embedding, as in the files of a tied model.
        """
        asked = list(asked)
        tensors = {key: (tuple(t.shape), t.dtype) for key, t in state.items()}
        head = next((name for name in asked if is_head(name)), None)
        embedding = _embedding(tensors)
        missing = head is not None and embedding is not None and not any(map(is_head, tensors))
        tied = (head, embedding) if missing else None
        shared = _same_memory(state)
        return cls(tensors, asked, tied, lambda key: shared.get(key, (key,)))  # type: ignore[arg-type]

    def _tied_head(self, name: str) -> Held | None:
        if self.tied is None or self.tied[0] in self.tensors or not is_head(name):
            return None
        key, like = self.tied
        shape, dtype = self.tensors[like]
        return Held(name, shape, dtype, (Piece(key, like=like),))

    def _held(self, name: str, form: _Form, numbers: list[str]) -> Held | None:
        """What a form comes to with these numbers; None where a tensor of it is missing."""
        if form.entry is not None:
            return _in_experts(name, form, numbers, self.tensors, self._keys)
        if "*" not in form.templates[0]:
            return self._joined(name, form.templates, numbers, form.part)
        experts: list[Held] = []
        for e in count():
            one = self._joined(name, [t.replace("*", str(e)) for t in form.templates], numbers)
            if one is None:
                break
            experts.append(one)
        if len({held.shape for held in experts}) != 1:
            return None
        pieces = tuple(replace(p, expert=e) for e, held in enumerate(experts) for p in held.pieces)
        return Held(name, (len(experts), *experts[0].shape), experts[0].dtype, pieces)

    def _joined(
        self,
        name: str,
        templates: Iterable[str],
        numbers: list[str],
        part: tuple[int, int] | None = None,
    ) -> Held | None:
        """Tensors one below the other, or one part of one tensor; None where one is missing."""
        found = [self._keys.get(_filled(t, numbers)) for t in templates]
        keys = [key for key in found if key is not None]
        if len(keys) < len(found):
            return None
        shapes = [self.tensors[key][0] for key in keys]
        dtype = self.tensors[keys[0]][1]
        if part is not None:
            (shape,), (i, n) = shapes, part
            if not shape or shape[0] % n:
                return None
            rows = shape[0] // n
            piece = Piece(keys[0], into=(i * rows, (i + 1) * rows))
            return Held(name, (rows, *shape[1:]), dtype, (piece,))
        if len(keys) == 1:
            return Held(name, shapes[0], dtype, (Piece(keys[0]),))
        if len({shape[1:] for shape in shapes}) > 1 or not all(shapes):
            return None
        pieces, at = [], 0
        for key, shape in zip(keys, shapes, strict=True):
            pieces.append(Piece(key, rows=(at, at + shape[0])))
            at += shape[0]
        return Held(name, (at, *shapes[0][1:]), dtype, tuple(pieces))

    # Which form a kind has

    def _form(self, asked: str) -> _Form | None:
        if asked not in self._forms:
            self._settle([asked])
        return self._forms[asked]

    def _settle(self, asked: Iterable[str]) -> None:
        """Decide for kinds together: what is there as it is, then what one rule serves most."""
        todo: dict[str, list[tuple[_Form, str, str, int]]] = {}
        for name in asked:
            if name in self._kinds:
                self._claimed.setdefault(name, name)
                self._forms[name] = None  # nothing to rename: what is missing is missing
            elif name not in self._forms:
                todo[name] = self._candidates(name)
        votes = Counter(
            rule for found in todo.values() for rule in {(old, new) for _, old, new, _ in found}
        )
        for name, found in todo.items():
            ranked = sorted(found, key=lambda c: (c[3], votes[c[1], c[2]]), reverse=True)
            best = [c for c in ranked[:2] if _rank(c, votes) == _rank(ranked[0], votes)]
            form = best[0][0] if len(best) == 1 else None
            if form is not None and form.part is None and form.entry is None:
                there = form.templates[0].replace("*", "#")
                if self._claimed.setdefault(there, name) != name:
                    form = None  # two kinds of the adapter can't be one of the base
            self._forms[name] = form
            if form is not None and best[0][1] != best[0][2]:
                self.renamed[best[0][1]] = best[0][2]

    def _candidates(self, name: str) -> list[tuple[_Form, str, str, int]]:
        """(form, prefix of the adapter, prefix of the base, how good) of the first that fit."""
        for form in _forms(name):
            found = [
                (
                    replace(form, templates=tuple(new + t[len(old) :] for t in form.templates)),
                    old,
                    new,
                    n,
                )
                for old, new, n in self._prefixes(form.templates[0])
            ]
            kinds = self._kinds
            found = [c for c in found if all(t.replace("*", "#") in kinds for t in c[0].templates)]
            if found:
                return found
        return []

    def _prefixes(self, template: str) -> list[tuple[str, str, int]]:
        """(prefix, the base's instead, words in common), where the longest end is in common."""
        if self._ends is None:
            self._ends = {}
            for known in self._kinds:
                parts = known.split(".")
                for at in range(len(parts) - 1):
                    self._ends.setdefault(".".join(parts[at:]), []).append(known)
        parts = template.replace("*", "#").split(".")
        # The last word before a number belongs to it.
        most = parts.index("#") if "#" in parts else len(parts) - 1
        for at in range(max(1, most)):
            end = ".".join(parts[at:])
            old = parts[:at]
            found = []
            for known in self._ends.get(end, ()):
                new = known[: len(known) - len(end)].split(".")[:-1]
                if "#" not in new and _may_be(old, new):
                    common = len(set(old) & set(new))
                    found.append((_dotted(old), _dotted(new), common))
            if found:
                return found
        return []


def _renamed(form: _Form, old: str, new: str) -> _Form:
    """The form, with another prefix."""
    return replace(form, templates=tuple(new + t[len(old) :] for t in form.templates))


def _in_experts(
    name: str,
    form: _Form,
    numbers: list[str],
    tensors: Mapping[str, tuple[Shape, Any]],
    keys: Mapping[str, str],
) -> Held | None:
    """One entry, or some of its rows, of the parameter of all experts (experts, out, in).

    None where there is no such entry, or where it is stored (in, out).
    """
    assert form.entry is not None
    at, e = form.entry, int(numbers[form.entry])
    key = keys.get(_filled(form.templates[0], [*numbers[:at], *numbers[at + 1 :]]))
    if key is None or len(shape := tensors[key][0]) != 3 or e >= shape[0]:
        return None
    owner = key.rpartition(".")[0]
    both, down = (tensors.get(f"{owner}.{whole}", ((), None))[0] for whole in _EXPERTS)
    if len(both) == len(down) == 3 and (both[1], both[2]) != (2 * down[2], down[1]):
        return None
    _, rows, inner = shape
    into = None
    if form.part is not None:
        i, n = form.part
        into, rows = (i * rows // n, (i + 1) * rows // n), rows // n
    return Held(name, (rows, inner), tensors[key][1], (Piece(key, into=into, entry=e),))


_NUMBER = re.compile(r"(?<![^.])\d+(?![^.])")


def _rank(candidate: tuple[_Form, str, str, int], votes: Mapping[Any, int]) -> tuple[int, int]:
    return candidate[3], votes[candidate[1], candidate[2]]


def _dotted(parts: list[str]) -> str:
    return "".join(f"{part}." for part in parts)


def _may_be(old: list[str], new: list[str]) -> bool:
    """Whether one prefix may stand for another.

    One of them is none, or what they say beside the body's words (`vision_tower`) is the same, or
    more of the same.
    """
    if not old or not new:
        return True
    mine, theirs = set(old) - _BODIES, set(new) - _BODIES
    named = (mine & theirs) - {"encoder", "decoder"}  # which every tower may have
    return mine == theirs or (bool(named) and (mine <= theirs or theirs <= mine))


def _filled(template: str, numbers: list[str]) -> str:
    given = iter(numbers)
    return re.sub("#", lambda _: next(given, "#"), template)


def _forms(name: str) -> Iterator[_Form]:
    """Ways in which a kind of name may be kept, the plainest first."""
    spelled = []
    for family in _FAMILIES:
        new = f".{name}"
        for pattern, words in family:
            new = re.sub(pattern, words, new)
        if new[1:] not in spelled:
            spelled.append(new[1:])
    for text in spelled:
        yield _Form((text,))
    for text in spelled:
        owner, _, leaf = text.rpartition(".")
        if owner.endswith("experts"):
            for leaves in _EXPERTS.get(leaf, ((leaf,),)):
                yield _Form(tuple(f"{owner}.*.{one}.weight" for one in leaves))
        module, _, parameter = text.rpartition(".")
        above, _, layer = module.rpartition(".")
        for fused, i, n in _FUSED.get(layer, ()):
            yield _Form((f"{above}.{fused}.{parameter}",), (i, n))
        one = _ONE_EXPERT.fullmatch(text)
        if one is not None and one["name"] in _ALL_EXPERTS:
            whole, place = _ALL_EXPERTS[one["name"]]
            entry = one["owner"].count("#")
            for inside in (one["owner"], one["owner"].replace(".block_sparse_moe.", ".mlp.")):
                yield _Form((f"{inside}.{whole}",), place, entry)
        if layer == "gate_up_proj":
            yield _Form(tuple(f"{above}.{one}.{parameter}" for one in ("gate_proj", "up_proj")))
