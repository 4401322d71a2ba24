"""The demo's base models: small Llamas in plain PyTorch.

Each layer is `x += attention(norm(x)); x += mlp(norm(x))`, with RMS norms, rotary positions
(channel i of a head turns with channel i + head/2) and `down(silu(gate(x)) * up(x))` as the MLP.
Weights are a plain dictionary under the names that transformers uses, so `W + ΔW` is a dictionary
with one entry replaced. Several query heads may share one head of keys and values.

The demo's adapters were trained on `base`, whose tokens are bytes. Three more bases were pretrained
on the same text, to move adapters to: `wide` is wider, `deep` is narrower and has more layers, and
`pairs` reads byte pairs and has half as many heads of keys and values.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import torch
from safetensors.torch import load_file
from torch import Tensor, nn
from torch.nn import functional as F

from ..errors import MissingExtraError, UnknownNameError

Config = dict[str, Any]
Linear = Callable[[str, Tensor], Tensor]

BASES = ("base", "wide", "deep", "pairs")


def data_dir() -> Path:
    """The folder of the packaged demo: `base/`, `bases/`, `adapters/`, `heldout/`, `tasks.json`.

    Examples:
        >>> sorted(path.name for path in data_dir().iterdir())
        ['adapters', 'base', 'bases', 'heldout', 'tasks.json']
    """
    return Path(__file__).parent / "data"


def base_dir(name: str = "base") -> Path:
    """A base's folder, model and tokenizer, as transformers loads it.

    Raises:
        UnknownNameError: no packaged base has this name.

    Examples:
        >>> base_dir("wide").relative_to(data_dir()).as_posix()
        'bases/wide'
    """
    if name not in BASES:
        raise UnknownNameError(f"no base {name!r} in the demo; there are {', '.join(BASES)}")
    return data_dir() / ("base" if name == "base" else f"bases/{name}")


def load_base(name: str = "base") -> tuple[Config, dict[str, Tensor]]:
    """A base model's configuration and its weights in float32, under transformers' names."""
    return read_base(base_dir(name))


def read_base(folder: Path) -> tuple[Config, dict[str, Tensor]]:
    """The same, of a base in any folder."""
    config: Config = json.loads((folder / "config.json").read_text())
    state = load_file(folder / "model.safetensors")
    return config, {name: weight.float() for name, weight in state.items()}


def tokens_of(text: bytes, folder: Path) -> list[int]:
    """A text's tokens, as the base in a folder reads it: its bytes, or byte pairs.

    Raises:
        MissingExtraError: the base reads byte pairs, and `tokenizers` is not installed.

    Examples:
        >>> tokens_of(b"def", base_dir())
        [100, 101, 102]
    """
    if json.loads((folder / "config.json").read_text())["vocab_size"] == 256:
        return list(text)
    try:
        from tokenizers import Tokenizer
    except ImportError as error:
        raise MissingExtraError(
            f"the base {folder.name!r} reads byte pairs, which takes tokenizers: "
            "pip install tokenizers"
        ) from error
    ids: list[int] = Tokenizer.from_file(str(folder / "tokenizer.json")).encode(text.decode()).ids
    return ids


def logits(
    config: Config, state: Mapping[str, Tensor], tokens: Tensor, linear: Linear | None = None
) -> Tensor:
    """The scores of every next token.

    Args:
        config: as `load_base` gives it.
        state: weights under transformers' names; all of one floating-point type.
        tokens: integers `(batch, length)` below the vocabulary size.
        linear: from a layer's name and its input to what it gives; x Wᵀ when None.

    Returns:
        `(batch, length, vocabulary)`; position t is the prediction of token t + 1.
    """
    apply = linear or (lambda name, x: F.linear(x, state[f"{name}.weight"]))
    x = F.embedding(tokens, state["model.embed_tokens.weight"])
    rotation = _rotation(config, tokens.shape[1], x)
    for number in range(config["num_hidden_layers"]):
        at = f"model.layers.{number}"
        normed = _norm(config, x, state[f"{at}.input_layernorm.weight"])
        x = x + _attention(config, partial(_within, apply, f"{at}.self_attn"), normed, rotation)
        normed = _norm(config, x, state[f"{at}.post_attention_layernorm.weight"])
        x = x + _mlp(partial(_within, apply, f"{at}.mlp"), normed)
    return apply("lm_head", _norm(config, x, state["model.norm.weight"]))


class Llama(nn.Module):
    """A packaged base as a module of linear layers, for what works on modules, without
    transformers; its scores are `logits`.

    Examples:
        >>> Llama("wide")(torch.tensor([[100, 101, 102]])).logits.shape
        torch.Size([1, 3, 256])
    """

    def __init__(self, name: str = "base") -> None:
        super().__init__()
        self.name_or_path = str(base_dir(name))
        self.config, state = load_base(name)
        for key, weight in state.items():
            path, _, leaf = key.removesuffix(".weight").rpartition(".")
            holder: nn.Module = self
            for word in filter(None, path.split(".")):
                if not hasattr(holder, word):
                    holder.add_module(word, nn.Module())
                holder = holder.get_submodule(word)
            holder.add_module(leaf, _module(leaf, weight))

    def forward(self, input_ids: Tensor, attention_mask: Any = None) -> Any:
        """Scores of whole texts, filled up behind their ends, as `.logits`."""
        state = dict(self.named_parameters())
        return SimpleNamespace(logits=logits(self.config, state, input_ids, self._applied))

    def _applied(self, name: str, x: Tensor) -> Tensor:
        found: Tensor = self.get_submodule(name)(x)
        return found

    def get_output_embeddings(self) -> nn.Module:
        """The head, as transformers calls it."""
        return self.get_submodule("lm_head")

    def get_input_embeddings(self) -> nn.Module:
        """The embedding."""
        return self.get_submodule("model.embed_tokens")


def _module(leaf: str, weight: Tensor) -> nn.Module:
    """A layer with this weight; a norm's is held by a module of its own."""
    made = nn.Module()
    if weight.ndim == 2:  # without numbers of its own, which would be drawn
        rows, columns = weight.shape
        made = nn.Linear(columns, rows, bias=False, device="meta")
        if leaf == "embed_tokens":
            made = nn.Embedding(rows, columns, device="meta")
    made.register_parameter("weight", nn.Parameter(weight))
    return made


def _within(apply: Linear, prefix: str, name: str, x: Tensor) -> Tensor:
    return apply(f"{prefix}.{name}", x)


def heldout_loss(
    config: Config,
    state: dict[str, Tensor],
    data: bytes,
    context: int | None = None,
    tokens: Sequence[int] | None = None,
) -> float:
    """The mean cross-entropy of the model on a text, in nats per byte.

    The text is cut into windows of `context` tokens, and the token after each of them is predicted
    from its own window alone; so every token but the first counts once. Their sum is divided by the
    number of bytes but one, so that bases with other tokens can be compared.

    Args:
        config: as `load_base` gives it.
        state: weights under transformers' names.
        data: the text, two bytes or more.
        context: how many tokens the model sees at most; as many as it was trained on when None.
        tokens: the text's tokens, as `tokens_of` gives them; its bytes when None.

    Examples:
        >>> config, state = load_base()
        >>> heldout_loss(config, state, b"Return the number of items in the list.") < 3
        True
    """
    ids = torch.tensor(list(data) if tokens is None else tokens)
    context = context or config["max_position_embeddings"]
    count = len(ids) - 1
    windows = -(-count // context)
    # The last window is filled up behind its end, where a causal model cannot see it.
    filled = F.pad(ids, (0, windows * context - count))
    given = filled[:-1].view(windows, context)
    with torch.inference_mode():
        scores = logits(config, state, given).flatten(0, 1)[:count]
        nats = F.cross_entropy(scores.float(), ids[1:], reduction="sum")
    return nats.item() / (len(data) - 1)


def _norm(config: Config, x: Tensor, weight: Tensor) -> Tensor:
    return F.rms_norm(x, x.shape[-1:], weight, config["rms_norm_eps"])


def _rotation(config: Config, length: int, like: Tensor) -> tuple[Tensor, Tensor]:
    """Cosine and sine `(length, head)` of the rotary angles, the two halves alike."""
    head = config["hidden_size"] // config["num_attention_heads"]
    theta = config.get("rope_parameters", config)["rope_theta"]
    frequencies = theta ** -(torch.arange(0, head, 2, device=like.device) / head)
    angles = torch.outer(torch.arange(length, device=like.device), frequencies).repeat(1, 2)
    return angles.cos().to(like.dtype), angles.sin().to(like.dtype)


def _attention(config: Config, apply: Linear, x: Tensor, rotation: tuple[Tensor, Tensor]) -> Tensor:
    heads = (*x.shape[:2], -1, config["hidden_size"] // config["num_attention_heads"])
    projected = (apply(f"{name}_proj", x) for name in "qkv")
    q, k, v = (p.view(heads).transpose(1, 2) for p in projected)
    q, k = _rotated(q, rotation), _rotated(k, rotation)
    shared = k.shape[1] < q.shape[1]
    mixed = F.scaled_dot_product_attention(q, k, v, is_causal=True, enable_gqa=shared)
    return apply("o_proj", mixed.transpose(1, 2).flatten(2))


def _rotated(x: Tensor, rotation: tuple[Tensor, Tensor]) -> Tensor:
    cosine, sine = rotation
    left, right = x.chunk(2, dim=-1)
    return x * cosine + torch.cat((-right, left), dim=-1) * sine


def _mlp(apply: Linear, x: Tensor) -> Tensor:
    return apply("down_proj", F.silu(apply("gate_proj", x)) * apply("up_proj", x))
