"""The demo's base model: a byte-level Llama in plain PyTorch.

Each layer is `x += attention(norm(x)); x += mlp(norm(x))`, with RMS norms, rotary positions
(channel i of a head turns with channel i + head/2) and `down(silu(gate(x)) * up(x))` as the MLP.
Weights are a plain dictionary under the names that transformers uses, so `W + ΔW` is a dictionary
with one entry replaced. Tokens are bytes. There are as many key and value heads as query heads.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file
from torch import Tensor
from torch.nn import functional as F

Config = dict[str, Any]


def data_dir() -> Path:
    """The folder of the packaged demo: `base/`, `adapters/`, `heldout/`, `tasks.json`.

    Example:
        >>> sorted(path.name for path in data_dir().iterdir())
        ['adapters', 'base', 'heldout', 'tasks.json']
    """
    return Path(__file__).parent / "data"


def load_base() -> tuple[Config, dict[str, Tensor]]:
    """The base model's configuration and its weights in float32, under transformers' names."""
    folder = data_dir() / "base"
    config: Config = json.loads((folder / "config.json").read_text())
    state = load_file(folder / "model.safetensors")
    return config, {name: weight.float() for name, weight in state.items()}


def logits(config: Config, state: dict[str, Tensor], tokens: Tensor) -> Tensor:
    """The scores of every next byte.

    Args:
        config: as `load_base` gives it.
        state: weights under transformers' names; all of one floating-point type.
        tokens: integers `(batch, length)` below the vocabulary size.

    Returns:
        `(batch, length, vocabulary)`; position t is the prediction of token t + 1.
    """
    x = F.embedding(tokens, state["model.embed_tokens.weight"])
    rotation = _rotation(config, tokens.shape[1], x)
    for number in range(config["num_hidden_layers"]):
        prefix = f"model.layers.{number}."
        layer = {
            name.removeprefix(prefix): w for name, w in state.items() if name.startswith(prefix)
        }
        normed = _norm(config, x, layer["input_layernorm.weight"])
        x = x + _attention(config, layer, normed, rotation)
        normed = _norm(config, x, layer["post_attention_layernorm.weight"])
        x = x + _mlp(layer, normed)
    return F.linear(_norm(config, x, state["model.norm.weight"]), state["lm_head.weight"])


def heldout_loss(
    config: Config, state: dict[str, Tensor], data: bytes, context: int = 256
) -> float:
    """The mean cross-entropy of the model on a text, in nats per byte.

    The text is cut into windows of `context` bytes, and the byte after each of them is predicted
    from its own window alone; so every byte but the first counts once.

    Args:
        config: as `load_base` gives it.
        state: weights under transformers' names.
        data: the text, two bytes or more.
        context: how many bytes the model sees at most.

    Example:
        >>> config, state = load_base()
        >>> heldout_loss(config, state, b"Return the number of items in the list.") < 3
        True
    """
    tokens = torch.frombuffer(bytearray(data), dtype=torch.uint8).long()
    count = len(tokens) - 1
    windows = -(-count // context)
    # The last window is filled up behind its end, where a causal model cannot see it.
    filled = F.pad(tokens, (0, windows * context - count))
    given = filled[:-1].view(windows, context)
    with torch.inference_mode():
        scores = logits(config, state, given).flatten(0, 1)[:count]
        return F.cross_entropy(scores.float(), tokens[1:]).item()


def _norm(config: Config, x: Tensor, weight: Tensor) -> Tensor:
    return F.rms_norm(x, x.shape[-1:], weight, config["rms_norm_eps"])


def _rotation(config: Config, length: int, like: Tensor) -> tuple[Tensor, Tensor]:
    """Cosine and sine `(length, head)` of the rotary angles, the two halves alike."""
    head = config["hidden_size"] // config["num_attention_heads"]
    theta = config.get("rope_parameters", config)["rope_theta"]
    frequencies = theta ** -(torch.arange(0, head, 2, device=like.device) / head)
    angles = torch.outer(torch.arange(length, device=like.device), frequencies).repeat(1, 2)
    return angles.cos().to(like.dtype), angles.sin().to(like.dtype)


def _attention(
    config: Config, layer: dict[str, Tensor], x: Tensor, rotation: tuple[Tensor, Tensor]
) -> Tensor:
    heads = (*x.shape[:2], config["num_attention_heads"], -1)
    projected = (F.linear(x, layer[f"self_attn.{name}_proj.weight"]) for name in "qkv")
    q, k, v = (p.view(heads).transpose(1, 2) for p in projected)
    q, k = _rotated(q, rotation), _rotated(k, rotation)
    mixed = F.scaled_dot_product_attention(q, k, v, is_causal=True)
    return F.linear(mixed.transpose(1, 2).flatten(2), layer["self_attn.o_proj.weight"])


def _rotated(x: Tensor, rotation: tuple[Tensor, Tensor]) -> Tensor:
    cosine, sine = rotation
    left, right = x.chunk(2, dim=-1)
    return x * cosine + torch.cat((-right, left), dim=-1) * sine


def _mlp(layer: dict[str, Tensor], x: Tensor) -> Tensor:
    gate, up, down = (layer[f"mlp.{name}_proj.weight"] for name in ("gate", "up", "down"))
    return F.linear(F.silu(F.linear(x, gate)) * F.linear(x, up), down)
