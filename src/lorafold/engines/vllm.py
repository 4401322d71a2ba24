"""vLLM, `--enable-lora`: by its published rules; the tests ask its own loader where it is there.

Of `vllm/lora/peft_helper.py` and `lora_model.py` of 0.32; what 0.11 to 0.15 do otherwise is told. A
key that is neither a factor nor a saved embedding's `base_layer` is an error. Before 0.32 (0.15 is
the last that was read) every module gets one factor, α/r or α/√r, whatever patterns say, and
`init_lora_weights` is not looked at.
"""

from __future__ import annotations

import re
import shlex
from collections.abc import Iterator

from ..parts import extra_kind
from .finding import Finding, factors_of, padded, told
from .look import Look
from .peft_folder import form_findings, merge_into, rooted_scale, wrapped_names

RANKS = (1, 8, 16, 32, 64, 128, 256, 320, 512)  # that --max-lora-rank takes
DEFAULT_RANK = 16
_FACTOR = re.compile(r".*\.(lora_[AB]\.weight|lora_embedding_[AB])")
_OF_BASE = re.compile(r".*\.(embed_tokens|lm_head)\.base_layer\.weight")
_HEADS = {"score", "classifier"}  # the modules that it takes whole, one of them
_OF_HEAD = re.compile(r".*\b(score|classifier)\.(weight|bias)")
# Ways to begin that say nothing of the base's weights.
_INITS = {"gaussian", "eva", "orthogonal", "mica", "lora_ga"}
_FIELDS = {
    "alora_invocation_tokens": "aLoRA",
    "layer_replication": "layers that are replicated",
    "use_bdlora": "BD-LoRA",
    "use_qalora": "QA-LoRA",
}


def findings(look: Look) -> Iterator[Finding]:
    """What vLLM does with a file."""
    found = list(form_findings(look, "vLLM"))
    yield from found
    if found or look.config is None:
        return
    if look.place.weights.name != "adapter_model.safetensors":
        yield Finding(
            "file_name",
            "refuses",
            f"vLLM looks for adapter_model.safetensors, and this is {look.place.weights.name}",
        )
    yield from _config(look)
    yield from _tensors(look)
    yield from wrapped_names(look, "vLLM")
    yield from _ranks(look)
    yield from _scales(look)


def _config(look: Look) -> Iterator[Finding]:
    config, merged = look.config or {}, merge_into(look)
    saved = set(config.get("modules_to_save") or ())
    if not saved <= _HEADS or len(saved) > 1:
        yield Finding(
            "modules_to_save",
            "refuses",
            f"of modules saved whole it takes one head (score or classifier), not {sorted(saved)}",
            remedy=merged,
        )
    if config.get("use_dora"):
        yield Finding("dora", "refuses", "it has no DoRA", remedy=merged)
    if config.get("bias", "none") != "none":
        yield Finding(
            "bias", "refuses", f"bias must be 'none', and is {config['bias']!r}", remedy=merged
        )
    init = config.get("init_lora_weights", True)
    if isinstance(init, str) and init.lower() not in _INITS:
        yield Finding(
            "init",
            "refuses",
            f"init_lora_weights is {init!r}, which changes the base's weights too; older releases "
            "(0.15) add the factors to the whole weights as they are",
            remedy="save it with PEFT's save_pretrained(path, "
            "path_initial_model_for_weight_conversion=…)",
        )
    for field, what in _FIELDS.items():
        if config.get(field):
            says = f"it has no {what} ({field}); older releases (0.15) leave that out"
            yield Finding("variant", "refuses", says, remedy=merged)
    refusal = None if look.file is None else look.file.refusal
    known = config.get("use_dora") or isinstance(init, str) or any(map(config.get, _FIELDS))
    if refusal is not None and not known:
        yield Finding("variant", "misreads", f"it adds B A to the base's weights, and {refusal}")


def _tensors(look: Look) -> Iterator[Finding]:
    config = look.config or {}
    others = [key for key in look.tensors if _FACTOR.fullmatch(key) is None]
    left_out = [key for key in others if _OF_BASE.fullmatch(key)]
    strange = [key for key in others if key not in left_out]
    lora_bias = [key for key in strange if extra_kind(key, config) == "lora bias"]
    if lora_bias:
        yield Finding(
            "lora_bias",
            "refuses",
            f"it has no biases of LoRA ({told(lora_bias)})",
            modules=tuple(lora_bias),
            remedy=merge_into(look),
        )
    strange = [key for key in strange if key not in lora_bias]
    if set(config.get("modules_to_save") or ()) <= _HEADS:
        strange = [key for key in strange if _OF_HEAD.fullmatch(key) is None]
    if strange and not config.get("modules_to_save") and not config.get("use_dora"):
        yield Finding(
            "tensors",
            "refuses",
            f"it takes no tensors beside factors, and there is {told(strange)}",
            modules=tuple(strange),
            remedy=merge_into(look),
        )
    if left_out:
        yield Finding(
            "base_weights",
            "ignores",
            f"it leaves out weights of the base that were saved ({told(left_out)})",
            modules=tuple(left_out),
            remedy=merge_into(look),
        )


def _ranks(look: Look) -> Iterator[Finding]:
    ranks = [shape[2] for shape in ({} if look.file is None else look.file.shapes).values()]
    most = max(ranks, default=0)
    if most > RANKS[-1]:
        yield Finding(
            "rank",
            "refuses",
            f"its largest max_lora_rank is {RANKS[-1]}, and the rank is {most}",
            remedy=shlex.join(
                ["lorafold", "resize", look.path, "smaller", "--rank", str(RANKS[-1])]
            ),
        )
    elif most > DEFAULT_RANK:
        needed = next(rank for rank in RANKS if rank >= most)
        yield Finding(
            "rank",
            "refuses",
            f"its max_lora_rank is {DEFAULT_RANK} unless it is given, and the rank is {most}",
            remedy=shlex.join(
                ["vllm", "serve", "BASE", "--enable-lora", "--max-lora-rank", str(needed)]
            ),
        )


def _scales(look: Look) -> Iterator[Finding]:
    config = look.config or {}
    if look.file is None:
        return
    factor = rooted_scale(config)
    wrong = factors_of(dict.fromkeys(look.scales, factor), look.scales)
    if wrong:
        yield Finding(
            "patterns",
            "misreads",
            "releases that do not follow rank_pattern and alpha_pattern (0.15 does not, 0.32 does) "
            f"apply {factor:.6g} to all modules",
            wrong,
            tuple(wrong),
            padded(look.path),
        )
