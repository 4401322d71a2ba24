"""The architectures of llama.cpp that adapters are read and written for, and their names.

A GGUF file has llama.cpp's names, `blk.0.attn_q`, where a checkpoint has
`model.layers.0.self_attn.q_proj`; which of a dozen names of checkpoints stands behind one is told
by the base. Here are the architectures that were tried: llama.cpp ran their adapters, and gave what
transformers gives. Of one that is not here it is not known what llama.cpp's converter does to the
weights besides.

Where llama.cpp rotates pairs of neighbours (as the first Llama did) and transformers the two halves
of a head, the converter has the rows of q and k in another order: per head of width h, rows
(2, h/2) become (h/2, 2). So has B, and A stays.
"""

from __future__ import annotations

import functools
import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from types import ModuleType
from typing import Any

from torch import Tensor

from ....errors import MismatchError, MissingExtraError
from ....naming import kind

_ENDS = {"token_embd": "model.embed_tokens", "output": "lm_head"}
_ATTENTION = {
    "blk.#.attn_q": "model.layers.#.self_attn.q_proj",
    "blk.#.attn_k": "model.layers.#.self_attn.k_proj",
    "blk.#.attn_v": "model.layers.#.self_attn.v_proj",
    "blk.#.attn_output": "model.layers.#.self_attn.o_proj",
}
_UNGATED = {
    "blk.#.ffn_up": "model.layers.#.mlp.up_proj",
    "blk.#.ffn_down": "model.layers.#.mlp.down_proj",
}
_LLAMA = _ENDS | _ATTENTION | {"blk.#.ffn_gate": "model.layers.#.mlp.gate_proj"} | _UNGATED
_TIED = {name: there for name, there in _LLAMA.items() if name != "output"}
_OF_EXPERTS = {
    "blk.#.ffn_gate_inp": "model.layers.#.mlp.gate",
    "blk.#.ffn_gate_exps": "model.layers.#.mlp.experts.gate_proj",
    "blk.#.ffn_up_exps": "model.layers.#.mlp.experts.up_proj",
    "blk.#.ffn_down_exps": "model.layers.#.mlp.experts.down_proj",
}
_MIXTRAL = {
    "blk.#.ffn_gate_inp": "model.layers.#.block_sparse_moe.gate",
    "blk.#.ffn_gate_exps": "model.layers.#.block_sparse_moe.experts.w1",
    "blk.#.ffn_up_exps": "model.layers.#.block_sparse_moe.experts.w3",
    "blk.#.ffn_down_exps": "model.layers.#.block_sparse_moe.experts.w2",
}
_PHI3 = {
    "blk.#.attn_qkv": "model.layers.#.self_attn.qkv_proj",
    "blk.#.attn_output": "model.layers.#.self_attn.o_proj",
    "blk.#.ffn_up": "model.layers.#.mlp.gate_up_proj",
    "blk.#.ffn_down": "model.layers.#.mlp.down_proj",
}
PERMUTED = ("attn_q", "attn_k")  # whose rows are in another order, where any are


@dataclass(frozen=True, eq=False)
class Architecture:
    """One of llama.cpp's.

    Args:
        name: as `general.architecture` has it.
        models: the model types of transformers that become it.
        usual: {name there: a checkpoint's}, "#" for a block's number.
        permuted: whether the rows of q and k are in another order.
    """

    name: str
    models: tuple[str, ...]
    usual: Mapping[str, str] = field(default_factory=lambda: _LLAMA)
    permuted: bool = False


_TRIED = (
    Architecture("llama", ("llama", "mistral", "mixtral"), _LLAMA | _MIXTRAL, permuted=True),
    Architecture("qwen2", ("qwen2",)),
    Architecture("qwen3", ("qwen3",)),
    Architecture("qwen3moe", ("qwen3_moe",), _ENDS | _ATTENTION | _OF_EXPERTS),
    Architecture("olmoe", ("olmoe",), _ENDS | _ATTENTION | _OF_EXPERTS),
    Architecture("granite", ("granite",), permuted=True),
    Architecture("smollm3", ("smollm3",), permuted=True),
    Architecture("gemma", ("gemma",), _TIED),
    Architecture("gemma2", ("gemma2",), _TIED),
    Architecture("gemma3", ("gemma3_text",), _TIED),
    Architecture("olmo2", ("olmo2",)),
    Architecture("phi3", ("phi3",), _ENDS | _PHI3),
    Architecture("arcee", ("arcee",), _ENDS | _ATTENTION | _UNGATED, permuted=True),
    Architecture("seed_oss", ("seed_oss",)),
)
ARCHITECTURES = {a.name: a for a in _TRIED}
BY_MODEL = {model: a for a in _TRIED for model in a.models}
# Whose embedding is the output layer too, where a config does not say.
TIED_UNLESS_SAID = frozenset(("gemma", "gemma2", "gemma3_text"))


def architecture(name: Any, where: str) -> Architecture:
    """The one that a file says it is of.

    Raises:
        MismatchError: none, or none that was tried.
    """
    found = ARCHITECTURES.get(name) if isinstance(name, str) else None
    if found is None:
        raise MismatchError(
            f"{where} is of the architecture {name!r:.40}, of which it is not known what llama.cpp "
            f"does to its weights; known are {', '.join(ARCHITECTURES)}"
        )
    return found


def gguf_package() -> ModuleType:
    """llama.cpp's own package for Python.

    Raises:
        MissingExtraError: it is not there.
    """
    try:
        import gguf
    except ImportError as e:
        raise MissingExtraError(
            "GGUF files take llama.cpp's package for Python: pip install 'lorafold[gguf]'"
        ) from e
    package: ModuleType = gguf
    return package


@functools.cache
def names_of(arch: Architecture) -> Mapping[str, str]:
    """{a checkpoint's name of a module: llama.cpp's}, "#" for a block's number, by gguf's table.

    Raises:
        MissingExtraError: that package is not there.
    """
    gguf = gguf_package()
    number = next(n for n, name in gguf.MODEL_ARCH_NAMES.items() if name == arch.name)
    table = gguf.get_tensor_name_map(number, 1).mapping  # of one block, whose number is 0
    return {kind(name): kind(there) for name, (_, there) in table.items()}


def usual_name(arch: Architecture, name: str) -> str | None:
    """What transformers' checkpoints call a module of llama.cpp's; None where it has none."""
    found = arch.usual.get(kind(name))
    number = re.match(r"blk\.(\d+)\.", name)
    return found if number is None or found is None else found.replace("#", number[1])


def heads_of(config: Mapping[str, Any], name: str, where: str) -> int:
    """How many heads q or k of a module of llama.cpp's has, by the base's configuration.

    Raises:
        MismatchError: it does not say.
    """
    heads = config.get("num_attention_heads")
    found = config.get("num_key_value_heads") if name.endswith("attn_k") else None
    found = heads if found is None else found
    if type(found) is not int or found < 1:
        raise MismatchError(f"{where}: its configuration does not say how many heads it has")
    return found


def permuted(B: Tensor, heads: int) -> Tensor:
    """(out, r) with its rows as llama.cpp has them.

    Raises:
        MismatchError: the rows are no such number of heads.
    """
    return _swapped(B, heads, (heads, 2, -1))


def unpermuted(B: Tensor, heads: int) -> Tensor:
    """The way back."""
    return _swapped(B, heads, (heads, -1, 2))


def _swapped(B: Tensor, heads: int, shape: tuple[int, ...]) -> Tensor:
    out, rank = B.shape
    if out % (2 * heads):
        raise MismatchError(
            f"its {out} rows are not those of {heads} heads, as the base's configuration has them"
        )
    return B.reshape(*shape, rank).transpose(1, 2).reshape(out, rank)
