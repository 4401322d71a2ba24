"""Several projections in one weight: where the rows of each lie, apart and together, exactly.

A fused weight is `groups` blocks of rows, and in every block the parts follow one another: with one
group they are simply stacked (GPT-2, Phi-3); GPT-NeoX and BLOOM have a group a head, (query, key,
value) each of one head; Falcon a group per key-value head, of several query heads, one key and one
value. An update's rows are rows of B, so taking it apart copies rows and keeps A, and putting
updates together stacks A and lays their B's block-diagonally: ranks add, and nothing is rounded
but what different scales would (in float32 then, at least).
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from ..errors import MismatchError
from ..lowrank import LowRank
from ..words import one_line
from .names import config_of
from .role import FUSED, Role
from .tables import ORDERS


@dataclass(frozen=True)
class Heads:
    """The heads of an attention.

    Args:
        query: how many query heads. key: key-value heads, of which each serves as many query
            heads, next to each other. dim: entries of a head.
    """

    query: int
    key: int
    dim: int


def heads(model: Any, side: str = "decoder") -> Heads:
    """The heads of a stack of a model, by its configuration.

    Args:
        model: the model, its configuration, or its folder.
        side: the stack; see `Role`.

    Raises:
        MismatchError: the configuration does not say.
    """
    config = config_of(model)
    inner = {"vision": "vision_config", "text": "text_config", "decoder": "text_config"}.get(side)
    if inner and isinstance(config.get(inner), Mapping):
        config = config[inner]
    query = _first(
        config,
        f"{side}_attention_heads",
        "num_attention_heads",
        "n_head",
        "num_heads",
        "n_heads",
        "decoder_attention_heads",
    )
    width = _first(config, "hidden_size", "n_embd", "d_model", "dim")
    dim = _first(config, "head_dim", "d_kv") or (width or 0) // (query or 1)
    if not query or not dim:
        raise MismatchError(
            "the heads are not told by the model's configuration (num_attention_heads, "
            "hidden_size): give a model of transformers, its config, or its folder"
        )
    if config.get("model_type") in ("falcon", "RefinedWeb", "RefinedWebModel"):
        return Heads(query, _falcon_keys(config, query), dim)
    return Heads(query, _first(config, "num_key_value_heads") or query, dim)


def _falcon_keys(config: Mapping[str, Any], query: int) -> int:
    if config.get("multi_query", True) and not config.get("new_decoder_architecture", False):
        return 1
    return _first(config, "num_kv_heads", "n_head_kv") or query


def _first(config: Mapping[str, Any], *names: str) -> int | None:
    return next((int(config[n]) for n in names if isinstance(config.get(n), int)), None)


@dataclass(frozen=True)
class Packing:
    """How the rows of several projections lie in one weight.

    Args:
        words: the last word of each part's kind ("query", "key", "value"), in order.
        shares: how the rows of a group are shared among the parts, in whole numbers.
        groups: how many groups.

    Raises:
        MismatchError: shares or groups that are no counts.

    Examples:
        >>> import torch
        >>> u = LowRank(torch.randn(2, 8), torch.randn(12, 2))
        >>> parts = Packing(("query", "key", "value"), (2, 1, 1)).split(u)
        >>> parts["query"].shape, parts["value"].shape
        ((6, 8), (3, 8))
    """

    words: tuple[str, ...]
    shares: tuple[int, ...]
    groups: int = 1

    def __post_init__(self) -> None:
        counts = (*self.shares, self.groups)
        if len(self.words) != len(self.shares) or min(counts) < 1:
            raise MismatchError(
                f"a packing has a share of at least 1 for each of {self.words}, and at least 1 "
                f"group; found {self.shares} and {self.groups}"
            )

    def split(self, u: LowRank) -> dict[str, LowRank]:
        """The update of each part: its rows of B, the same A and scale.

        Args:
            u: (out, in).

        Returns:
            {word: update}, in order; the factors share nothing with u's B.

        Raises:
            MismatchError: out is no multiple of what the packing takes.
        """
        return {w: LowRank(u.A, u.B[at], u.scale) for w, at in self.rows(u.shape[0]).items()}

    def fuse(self, parts: Mapping[str, LowRank], out: int | None = None) -> LowRank:
        """The update of the fused weight; what is not given of it is not updated.

        Parts with one A and one scale, as `split` gives them, stay of one rank; of others the
        ranks add.

        Args:
            parts: {word: update}, at least one.
            out: rows of the fused weight; by default those that the parts have room in.

        Raises:
            MismatchError: an unknown word, parts of other shapes than the packing's.
        """
        unknown = sorted(parts.keys() - set(self.words))
        if unknown or not parts:
            raise MismatchError(f"the parts are {', '.join(self.words)}; found {sorted(parts)}")
        ordered = {w: parts[w] for w in self.words if w in parts}
        first = next(iter(ordered))
        if out is None:
            share = self.shares[self.words.index(first)]
            out = ordered[first].shape[0] * sum(self.shares) // share
        rows = self.rows(out)
        for word, u in ordered.items():
            if u.shape != (len(rows[word]), ordered[first].shape[1]):
                raise MismatchError(
                    f"the part {word!r} is {u.shape[0]}×{u.shape[1]}, of a weight that packs "
                    f"{len(rows[word])}×{ordered[first].shape[1]} for it"
                )
        return _together(list(ordered.values()), [rows[w] for w in ordered], out)

    def rows(self, out: int) -> dict[str, Tensor]:
        """{word: its rows in a weight of `out` rows, in the order of its own}.

        Raises:
            MismatchError: out is no multiple of what the packing takes.
        """
        total, groups = sum(self.shares), self.groups
        if out % (groups * total):
            raise MismatchError(
                f"{out} rows can't be shared among {', '.join(self.words)} as "
                f"{':'.join(map(str, self.shares))} in {groups} groups: another architecture or "
                "configuration than the weight's?"
            )
        unit = out // (groups * total)
        blocks = torch.arange(out).view(groups, total * unit)
        found, at = {}, 0
        for word, share in zip(self.words, self.shares, strict=True):
            found[word] = blocks[:, at : at + share * unit].flatten()
            at += share * unit
        return found


def packing(role: Role, model: Any = None) -> Packing | None:
    """How a fused module packs its parts; None for a role that is one by itself.

    Args:
        role: of the module.
        model: the model, its configuration or folder; it tells the heads and the order. The gate
            and up of a plain MLP take none.

    Raises:
        MismatchError: the order of this type of model is not known, or not its heads.
    """
    words = FUSED.get(role.kind.rpartition(".")[2])
    if words is None:
        return None
    if role.kind == "mlp.gate_up":
        return Packing(words, (1, 1))
    model_type = config_of(model).get("model_type")
    if model_type not in ORDERS:
        told = "is not told" if model_type is None else f"is not known of {one_line(model_type)}"
        raise MismatchError(
            f"in what order {str(role)!r} packs {', '.join(words)} {told}: give a model of "
            "transformers, its configuration, or its folder; of a type that is not known, set "
            "lorafold.roles.ORDERS[type] to 'stacked' or 'grouped'"
        )
    if words == FUSED["gate_up"]:
        return Packing(words, (1, 1))
    found = heads(model, role.side)
    count = {"query": found.query, "key": found.key, "value": found.key}
    if ORDERS[model_type] == "grouped":
        return Packing(words, tuple(count[w] // found.key for w in words), found.key)
    return Packing(words, tuple(count[w] for w in words))


def _together(parts: Sequence[LowRank], rows: Sequence[Tensor], out: int) -> LowRank:
    """One update: each part's B at its rows; columns are shared where A and scale are."""
    kinds: list[LowRank] = []
    which = []
    for u in parts:
        for i, other in enumerate(kinds):
            if u.scale == other.scale and _same(u.A, other.A):
                which.append(i)
                break
        else:
            which.append(len(kinds))
            kinds.append(u)
    alike = len({u.scale for u in kinds}) == 1
    dtype = parts[0].B.dtype
    for t in (t for u in parts for t in (u.A, u.B)):
        dtype = torch.promote_types(dtype, t.dtype)
    if not alike:
        dtype = torch.promote_types(dtype, torch.float32)
    starts = [sum(u.rank for u in kinds[:i]) for i in range(len(kinds) + 1)]
    B = parts[0].B.new_zeros(out, starts[-1], dtype=dtype)
    for u, i, at in zip(parts, which, rows, strict=True):
        value = u.B.to(dtype) if alike else u.B.to(dtype) * u.scale
        B[at.to(B.device)[:, None], torch.arange(starts[i], starts[i + 1], device=B.device)] = value
    A = torch.cat([u.A.to(dtype) for u in kinds])
    return LowRank(A, B, kinds[0].scale if alike else 1.0)


def _same(a: Tensor, b: Tensor) -> bool:
    return a is b or (a.dtype == b.dtype and a.device == b.device and torch.equal(a, b))
