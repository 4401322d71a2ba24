"""The grammar of what an adapter file holds besides plain factors.

Two questions are answered here, without reading any factor: would ΔW algebra be right for this
adapter (`refusal_reason`), and where do its other tensors belong in the base (`apply_extras`)?
The rules are PEFT's: `scaling` is how it turns α and r into a scale, and a tensor whose name, less
PEFT's wrapper segments, is a name in the base replaces that tensor.
"""

from __future__ import annotations

import math
import re
from collections.abc import Iterable, Mapping, Sequence
from typing import Any, Literal

from torch import Tensor

from .errors import MismatchError

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
                "into the factors, and was not converted: save it with PEFT's save_pretrained("
                "path, path_initial_model_for_weight_conversion=...) first"
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
    saved = config.get("modules_to_save") or []
    parents = [module[: m.end()] for m in re.finditer(r"[^.]+", module)]
    # PEFT takes any module whose name ends in the target, even inside a word.
    if any(p.endswith(str(target)) for p in parents for target in saved):
        return "saved module"
    if parameter == "bias" and config.get("bias", "none") != "none":
        return "bias"
    if "base_layer" in module.split(".") or _is_embedding(module):
        return "base weight"
    return "unknown"


def _is_embedding(module: str) -> bool:
    # The names that PEFT's save_embedding_layers="auto" looks for.
    return module.rpartition(".")[2] in {"embed_tokens", "lm_head", "wte", "word_embeddings"}


def apply_extras(
    state: dict[str, Tensor], extras: Mapping[str, Tensor], config: Mapping[str, Any]
) -> list[str]:
    """Put extra tensors into a base state dict, as PEFT's merge_and_unload does.

    Saved modules, biases and stored base weights replace the base's tensors; trained token rows
    replace rows; a LoRA bias is added with its module's scale. Tensors keep the base's dtype.

    Args:
        state: changed in place: its tensors are replaced, never written to.
        extras: {file key: tensor}.
        config: the adapter's configuration.

    Returns:
        The keys that had no place.

    Raises:
        MismatchError: a shape differs from the base's, or token indices are missing.
    """
    unused = []
    # Replacements first: a LoRA bias adds to the bias that the file itself may hold, and rows
    # go into the embedding that it may hold.
    order = {"lora bias": 1, "trained tokens": 1}
    kinds = {key: extra_kind(key, config) for key in extras}
    for key in sorted(extras, key=lambda key: order.get(kinds[key], 0)):
        kind, value = kinds[key], extras[key]
        if kind in ("dora magnitude", "grouped convolution"):
            placed = False
        elif kind == "training state":
            placed = True
        elif kind == "lora bias":
            placed = _add_lora_bias(state, key, value, config)
        elif kind == "trained tokens":
            placed = _set_token_rows(state, key, value, config)
        else:
            placed = _replace(state, key, value)
        if not placed:
            unused.append(key)
    return unused


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


def _replace(state: dict[str, Tensor], key: str, value: Tensor) -> bool:
    if "original_module" in key.split("."):
        return True  # the untrained twin of a saved module, which the saved one replaces
    for name in base_names(key):
        if name in state:
            _check_shape(key, tuple(value.shape), name, tuple(state[name].shape))
            state[name] = value.detach().to(state[name], copy=True)
            return True
    return False


def _add_lora_bias(
    state: dict[str, Tensor], key: str, value: Tensor, config: Mapping[str, Any]
) -> bool:
    for name in extra_places(key, config):
        bias = state.get(name)
        if bias is not None:
            _check_shape(key, tuple(value.shape), name, tuple(bias.shape))
            delta = value.float() * scaling(config, lora_bias_path(key))[1]
            state[name] = (bias.float() + delta.to(bias.device)).to(bias.dtype)
            return True
    return False


def lora_bias_path(key: str) -> str:
    """The path by which PEFT looks up the scale of a LoRA bias."""
    match = _LORA_BIAS.match(key)
    assert match is not None
    # The two projections of a MultiheadAttention go by the path of the attention itself.
    return match["path"].removeprefix(PREFIX).removesuffix(".base_layer.out_proj")


def _set_token_rows(
    state: dict[str, Tensor], key: str, value: Tensor, config: Mapping[str, Any]
) -> bool:
    (name,) = extra_places(key, config)
    path = name.removesuffix(".weight")
    old = state.get(name)
    if old is None:
        return False
    rows = token_indices(config, path)
    if len(rows) != value.shape[0] or max(rows, default=-1) >= old.shape[0]:
        raise MismatchError(
            f"{key!r} holds {value.shape[0]} token rows, but trainable_token_indices in the "
            f"config names {len(rows)} for {path!r} (which has {old.shape[0]} rows)"
        )
    new = old.clone()
    new[list(rows)] = value.to(new)
    for name, other in list(state.items()):
        # A tied output layer shares the embedding's memory, and follows it in PEFT too.
        if other is old or (
            other.data_ptr() == old.data_ptr() and other.shape == old.shape and old.numel()
        ):
            state[name] = new
    return True


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


def check_replicated(
    state: Mapping[str, Any], config: Mapping[str, Any], paths: Iterable[str]
) -> None:
    """Refuse a base without the replicated layers that the adapter was trained on.

    Its layer numbers count the replicas, so they would hit the wrong layers of the plain base.

    Raises:
        MismatchError: naming the numbers of layers.
    """
    ranges = config.get("layer_replication")
    stack = next((m[1] for p in paths if (m := re.match(r"(.*?\.|)\d+\.", p))), None)
    if not ranges or stack is None:
        return
    expected = sum(stop - start for start, stop in ranges)
    pattern = re.compile(rf"{re.escape(stack)}(\d+)\.")
    found = len({m[1] for key in state if (m := pattern.match(key))})
    if found != expected:
        raise MismatchError(
            f"the adapter belongs to {expected} layers (layer_replication {ranges}), the state "
            f"dict has {found} under {stack!r}: give that of the base with its layers replicated"
        )


def _patterned(config: Mapping[str, Any], patterns: str, default: str, path: str) -> Any:
    for pattern, value in (config.get(patterns) or {}).items():
        try:
            found = re.match(rf"(.*\.)?({pattern})$", path)
        except re.error as e:
            raise MismatchError(f"{patterns} key {pattern!r} is no regular expression: {e}") from e
        if found:
            return _number(value, f"{patterns}[{pattern!r}]")
    return _number(config.get(default), default)


def _number(value: Any, field: str) -> Any:
    if isinstance(value, bool) or not isinstance(value, int | float):
        raise MismatchError(f"{field} in the config must be a number, found {value!r}")
    return value


def _check_shape(key: str, found: tuple[int, ...], name: str, expected: tuple[int, ...]) -> None:
    if found != expected:
        raise MismatchError(
            f"{key!r} has shape {found}, but {name!r} in the base has {expected}: "
            "resize the base (for example its vocabulary) as it was when the adapter was trained"
        )
