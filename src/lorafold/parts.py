"""The grammar of what an adapter file holds besides plain factors.

Two questions are answered here, without reading any factor: would ΔW algebra be right for this
adapter (`refusal_reason`), and where do its other tensors belong in the base (`apply_extras`)?
The rules are PEFT's: `scaling` is how it turns α and r into a scale, and a tensor whose name, less
PEFT's wrapper segments, is a name in the base replaces that tensor.
"""

from __future__ import annotations

import functools
import math
import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

from .errors import MismatchError
from .patterns import matches

PREFIX = "base_model.model."

ExtraKind = Literal[
    "dora magnitude",
    "lora bias",
    "bias",
    "saved module",
    "trained tokens",
    "grouped convolution",
    "base weight",
    "training state",
    "unknown",
]

_MAGNITUDE = re.compile(r"\.lora_magnitude_vector(\.[^.]+)?(\.weight)?$")
_LORA_BIAS = re.compile(r"^(?P<path>.*)\.lora_(?:embedding_)?B(\.[^.]+)?\.bias$")
_FACTOR = re.compile(r"\.lora_(embedding_)?[AB](\.[^.]+)?(\.weight)?$")
_TOKENS = re.compile(r"^(?P<path>.*?)(\.token_adapter)?\.trainable_tokens_delta(\.[^.]+)?$")
# What VeLoRA's backward pass and MonteCLoRA's noise keep; neither changes the weights.
_TRAINING = re.compile(r"\.lora_(velora_embed|monteclora_sampler)\b")
_WRAPPERS = {"base_layer", "modules_to_save", "token_adapter"}

# Heads that PEFT saves with an adapter, whether or not its config names them.
_HEADS_OF_TASKS = {
    "SEQ_CLS": ("classifier", "score"),
    "TOKEN_CLS": ("classifier", "score"),
    "QUESTION_ANS": ("qa_outputs",),
}

# Initialisations that move part of the base weight into the factors, by how their name starts.
_ALTERING = {"pissa": "PiSSA", "olora": "OLoRA", "corda": "CorDA", "lora_ga": "LoRA-GA"}

# PEFT's variants whose effect is not W + scale · B A. Three variants are missing on purpose:
# VeLoRA changes only the backward pass, MonteCLoRA adds noise only while training, and MiCA
# freezes B: all three run and merge as plain LoRA.
_VARIANTS = {
    "use_qalora": "QA-LoRA pools the layer's input in groups before A: run it with PEFT",
    "alora_invocation_tokens": "aLoRA acts only on tokens after its invocation string, "
    "so it is no change of the weights: run it with PEFT",
    "use_bdlora": "BD-LoRA stores one factor as the blocks of a block-diagonal matrix: "
    "merge it with PEFT (merge_and_unload), or expand the blocks first",
    "arrow_config": "Arrow mixes other adapters per token: load those adapters instead",
    "kasa_config": "KaSA truncates the base weight and puts a diagonal between B and A: "
    "merge it with PEFT (merge_and_unload)",
}


def refusal_reason(config: Mapping[str, Any], extras: Iterable[str]) -> str | None:
    """Why ΔW algebra would be wrong for an adapter, and what to do; None where it is right.

    Args:
        config: the adapter's configuration.
        extras: the keys of its extra tensors (a mapping serves as well).
    """
    kinds = {extra_kind(key, config) for key in extras}
    if config.get("use_dora") or "dora magnitude" in kinds:
        return (
            "this is a DoRA adapter, whose effect also depends on magnitudes and on the base "
            "weight: merge it into its base with PEFT (merge_and_unload), or train without use_dora"
        )
    init = str(config.get("init_lora_weights", "")).lower()
    for start, name in _ALTERING.items():
        if init.startswith(start):
            return (
                f"this adapter was initialised with {name}, which moves part of the base weight "
                "into the factors, and was not converted: save it with PEFT's `save_pretrained("
                "path, path_initial_model_for_weight_conversion=…)` first"
            )
    if init == "loftq":
        return (
            "this adapter was initialised with LoftQ, so its factors also hold the quantisation "
            "error of the base: use it with PEFT on that quantised base"
        )
    for field, reason in _VARIANTS.items():
        # An empty list of invocation tokens still makes an aLoRA.
        if config.get(field) not in (None, False, {}):
            return reason
    if "grouped convolution" in kinds:
        return (
            "this adapter updates a grouped convolution, whose update is not one product B A "
            "(PEFT cannot merge it either): leave that layer out, or run it with PEFT"
        )
    return None


def extra_kind(key: str, config: Mapping[str, Any]) -> ExtraKind:
    """What the extra tensor stored under `key` is."""
    if _MAGNITUDE.search(key):
        return "dora magnitude"
    if _LORA_BIAS.match(key):
        return "lora bias"
    if _TOKENS.match(key):
        return "trained tokens"
    if _FACTOR.search(key):
        # Plain factors never become extras, so these were kept out of the modules.
        return "unknown" if config.get("use_bdlora") else "grouped convolution"
    if _TRAINING.search(key):
        return "training state"
    name = key.removeprefix(PREFIX)
    module, _, parameter = name.rpartition(".")
    saved = saved_modules(config)
    ends = [m.end() for m in re.finditer(r"[^.]+", module)] if saved else []
    # PEFT takes any module whose name ends in the target, even inside a word.
    if any(module.endswith(target, 0, end) for end in ends for target in saved):
        return "saved module"
    if parameter == "bias" and config.get("bias", "none") != "none":
        return "bias"
    if "base_layer" in module.split(".") or _is_embedding(module):
        return "base weight"
    return "unknown"


def _is_embedding(module: str) -> bool:
    # The names that PEFT's save_embedding_layers="auto" looks for.
    return module.rpartition(".")[2] in {"embed_tokens", "lm_head", "wte", "word_embeddings"}


def saved_modules(config: Mapping[str, Any]) -> list[str]:
    """The modules that an adapter has whole, by the ends of their names: the config's, and what
    PEFT takes for granted in its kind of task.
    """
    named = [str(name) for name in config.get("modules_to_save") or []]
    heads = _HEADS_OF_TASKS.get(str(config.get("task_type")), ())
    return list(dict.fromkeys([*named, *heads]))


# What compiling, sharding and checkpointing put between a module and its child.
_HIDDEN = {"_orig_mod", "_fsdp_wrapped_module", "_checkpoint_wrapped_module"}


def plain_name(name: str) -> str:
    """A tensor's or module's name without what wrapped the model when it was written down.

    Examples:
        >>> plain_name("module._orig_mod.model.layers.0.q_proj")
        'model.layers.0.q_proj'
    """
    parts = [part for part in name.split(".") if part not in _HIDDEN]
    while len(parts) > 1 and parts[0] == "module":
        del parts[0]
    return ".".join(parts)


def wraps(children: Iterable[str]) -> bool:
    """Whether a module with children of these names only wraps another one."""
    return not _HIDDEN.isdisjoint(children)


def base_names(key: str) -> list[str]:
    """The names that a stored tensor may have in the base, best first."""
    name = key.removeprefix(PREFIX)
    parts = name.split(".")
    bare = [p for p in parts if p not in _WRAPPERS]
    names = [name, ".".join(bare)]
    if "modules_to_save" in parts[:-2]:
        # A live model's state dict has the adapter's name after the wrapper's.
        at = parts.index("modules_to_save")
        names.append(".".join(p for p in parts[:at] + parts[at + 2 :] if p not in _WRAPPERS))
    return list(dict.fromkeys(names))


def extra_places(key: str, config: Mapping[str, Any]) -> list[str]:
    """The names in the base, best first, of the tensor that an extra changes; none for some."""
    kind = extra_kind(key, config)
    if kind in ("dora magnitude", "grouped convolution", "training state"):
        return []
    if kind == "lora bias":
        match = _LORA_BIAS.match(key)
        assert match is not None
        return [f"{path}.bias" for path in base_names(match["path"])]
    if kind == "trained tokens":
        match = _TOKENS.match(key)
        assert match is not None
        return [f"{base_names(match['path'])[-1]}.weight"]
    return base_names(key)


def lora_bias_path(key: str) -> str:
    """The path by which PEFT looks up the scale of a LoRA bias."""
    match = _LORA_BIAS.match(key)
    assert match is not None
    # The two projections of a MultiheadAttention go by the path of the attention itself.
    return match["path"].removeprefix(PREFIX).removesuffix(".base_layer.out_proj")


def token_indices(config: Mapping[str, Any], path: str) -> Sequence[int]:
    """The rows of the embedding at `path` that were trained, from `trainable_token_indices`."""
    given = config.get("trainable_token_indices")
    if isinstance(given, Mapping):
        return next((rows for name, rows in given.items() if path.endswith(name)), [])
    return given or []


def scaling(config: Mapping[str, Any], path: str) -> tuple[int, float]:
    """Rank and scale that PEFT gives the module at `path`: (r, α/r), or (r, α/√r) for rsLoRA.

    A key of `rank_pattern` or `alpha_pattern` is a regular expression that must match the end of
    the path, from a dot on; the first that matches counts.

    Raises:
        MismatchError: the config lacks r or lora_alpha, or a rank is below 1.
    """
    r = _patterned(config, "rank_pattern", "r", path)
    alpha = _patterned(config, "alpha_pattern", "lora_alpha", path)
    if isinstance(r, bool) or not isinstance(r, int) or r < 1:
        raise MismatchError(f"rank must be a whole number of at least 1, the config says r={r!r}")
    return r, alpha / math.sqrt(r) if config.get("use_rslora") else alpha / r


def check_bias_scales(
    extras: Iterable[str], old: Mapping[str, Any], new: Mapping[str, Any]
) -> None:
    """Refuse a config under which LoRA biases would get another scale than under their own.

    Raises:
        MismatchError: naming the bias.
    """
    for key in extras:
        if extra_kind(key, old) == "lora bias":
            path = lora_bias_path(key)
            if scaling(old, path)[1] != scaling(new, path)[1]:
                raise MismatchError(
                    f"{key!r} is scaled by α/r, which the two adapters set differently: "
                    "save and load the adapter it comes from with save(…, pad=True) first"
                )


def alpha_of(config: Mapping[str, Any], path: str) -> float:
    """α that PEFT gives the module at `path`.

    Raises:
        MismatchError: the config lacks it, or it is no number.
    """
    return float(_patterned(config, "alpha_pattern", "lora_alpha", path))


def _patterned(config: Mapping[str, Any], patterns: str, default: str, path: str) -> Any:
    given = config.get(patterns) or {}
    pattern = _indexed(patterns, tuple(given)).first(path) if given else None
    if pattern is None:
        return _number(config.get(default), default)
    return _number(given[pattern], f"{patterns}[{pattern!r}]")


_ESCAPED = re.compile(r"\^((?:[\w/]|\\[^\w])*)")  # what `re.escape` makes of a path, from its start
_DOTTED = re.compile(r"[\w.]*")  # letters as they are; a dot stands for any of them


class _Indexed:
    """Keys of a pattern field, so that a path is not compared with each: a file that was resized
    has a key for every module.

    Keys that are whole paths, escaped, are looked up. So are those of letters and dots, by which of
    their letters are dots (any letter, there): few ways for many keys. The others are tried.
    """

    def __init__(self, field: str, keys: tuple[str, ...]) -> None:
        self._field, self._keys = field, keys
        self._whole: dict[str, int] = {}
        self._dotted: dict[int, dict[tuple[int, ...], dict[str, int]]] = {}
        self._others: list[int] = []
        for k, key in enumerate(keys):
            escaped = _ESCAPED.fullmatch(key)
            if escaped is not None:
                self._whole.setdefault(re.sub(r"\\(.)", r"\1", escaped[1], flags=re.DOTALL), k)
            elif _DOTTED.fullmatch(key):
                dots = tuple(i for i, letter in enumerate(key) if letter == ".")
                ways = self._dotted.setdefault(len(key), {})
                ways.setdefault(dots, {}).setdefault(key.replace(".", ""), k)
            else:
                self._others.append(k)

    def first(self, path: str) -> str | None:
        """The first key that matches the end of a path, from a dot on."""
        found = [self._whole[path]] if path in self._whole else []
        for start in (0, *(i + 1 for i, letter in enumerate(path) if letter == ".")):
            end = path[start:]
            for dots, keys in self._dotted.get(len(end), {}).items():
                letters = "".join(x for i, x in enumerate(end) if i not in dots)
                if letters in keys:
                    found.append(keys[letters])
        least = min(found, default=len(self._keys))
        for k in self._others:
            if k > least:
                break
            try:
                if patterned(self._keys[k], path):
                    return self._keys[k]
            except MismatchError as e:
                raise MismatchError(f"{self._field} key {e}") from e
        return self._keys[least] if found else None


_indexed = functools.lru_cache(maxsize=16)(_Indexed)


def patterned(pattern: str, path: str) -> bool:
    """Whether a key of `rank_pattern` or `alpha_pattern` means the module at `path`.

    Raises:
        MismatchError: it is no regular expression.
    """
    return matches(pattern, path, r"(.*\.)?(…)$")


def _number(value: Any, field: str) -> Any:
    if isinstance(value, bool) or not isinstance(value, int | float):
        raise MismatchError(f"{field} in the config must be a number, found {value!r}")
    return value


@dataclass(frozen=True)
class Layout:
    """How a module's weight, and its factors in a file, relate to the 2-D update (out, in).

    Not for: how a base keeps that weight on the disk, which is `naming.Base`'s.

    Args:
        kind: "linear": the weight is (out, in), or (in, out) where the layer stores it transposed.
            "embedding": the update is (dim, vocab), the weight (vocab, dim).
            "conv": the weight is (out, *kernel), flattened to (out, in) here.
            "expert": one slice of a 3-D parameter (experts, ·, ·).
        kernel: for "conv", the weight's shape without `out`.
        parameter: the name of the parameter of the module that is updated.
        stem: the module's name in the file where it differs from the path.
        expert: (index, count) of the slice, for "expert".
        transposed: for "expert", the slice is stored (in, out).
    """

    kind: Literal["linear", "embedding", "conv", "expert"] = "linear"
    kernel: tuple[int, ...] = ()
    parameter: str = "weight"
    stem: str | None = None
    expert: tuple[int, int] | None = None
    transposed: bool = False

    def weight_name(self, path: str) -> str:
        """The name of the tensor that an update at `path` changes."""
        if self.kind == "expert":
            return path.rpartition("[")[0] if path.endswith("]") else path
        return f"{path}.{self.parameter}" if path else self.parameter

    def owner(self, path: str) -> str:
        """The path of the module that has this tensor."""
        return self.weight_name(path).rpartition(".")[0]

    def group(self, path: str) -> str:
        """What PEFT matches patterns and targets against; what has it in common shares a scale.

        All experts of a parameter do, and the two projections of a MultiheadAttention.
        """
        if self.kind == "expert":
            return self.weight_name(path)
        return path.removesuffix(".out_proj") if self.is_out_proj else path

    @property
    def is_out_proj(self) -> bool:
        """Whether this is the output projection of a MultiheadAttention."""
        return self.stem is not None and self.stem.endswith(".base_layer.out_proj")

    def shapes(self, out: int, inner: int) -> list[tuple[int, ...]]:
        """Shapes of the weight that an update (out, in) fits, the usual one first."""
        if self.kind == "linear":
            return [(out, inner), (inner, out)]
        if self.kind == "embedding":
            return [(inner, out)]
        if self.kind == "conv":
            return [(out, *self.kernel)]
        count = 1 if self.expert is None else self.expert[1]
        shapes: list[tuple[int, ...]] = [(count, out, inner), (count, inner, out)]
        # A 2-D weight is one expert.
        return shapes + ([(out, inner), (inner, out)] if count == 1 else [])


LINEAR = Layout()


@dataclass(frozen=True)
class Parts:
    """What an adapter is made of, without its numbers.

    Args:
        modules: {module path: (out, in) of its update}.
        extras: {file key: shape}.
        config: the adapter's configuration.
        layouts: {module path: Layout}; plain linear where none is given.
    """

    modules: Mapping[str, tuple[int, int]]
    extras: Mapping[str, tuple[int, ...]]
    config: Mapping[str, Any]
    layouts: Mapping[str, Layout]

    def layout(self, path: str) -> Layout:
        """How the module's weight relates to its update."""
        return self.layouts.get(path, LINEAR)

    def names(self) -> list[str]:
        """Names that the tensors which it changes may have in memory."""
        found = [self.layout(path).weight_name(path) for path in self.modules]
        for key in self.extras:
            found += extra_places(key, self.config)
        return found
