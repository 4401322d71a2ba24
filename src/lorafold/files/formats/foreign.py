"""Adapters in formats that are not read: told by how their tensors are called, with a way out.

Nothing of such a file would be found by PEFT's names, and what is not found would be an adapter
without any effect. So each is an error that says what the file is and which tool turns it into
one that is read. Folders of something else are told by the names of their files.
"""

from __future__ import annotations

import os
import re
from collections.abc import Collection, Iterable

from ...errors import FileError
from ...words import some_of
from ..disk.header import header_length
from ..disk.held import open_regular
from ..remote.place import Place, UrlPath
from .gguf.header import may_be_adapter

DIFFERENCE = (
    "merge it into its base with its own tool, and take the difference: "
    "`lorafold extract BASE MERGED -o OUT`"
)
# What a format is, how a key of it that nothing else has looks, and what to do.
_FORMATS = (
    (
        "a LyCORIS adapter (OFT)",
        re.compile(r"[._](oft_(blocks|diag)|boft_)"),
        DIFFERENCE,
    ),
    (
        "in cloneofsimo's form, which has no names of modules",
        re.compile(r"^\w+:\d+:(down|up)$|^w_[ab]_\d+$"),
        DIFFERENCE,
    ),
    (
        "in torchtune's form",
        re.compile(r"\.lora_[ab]\.weight$"),
        "write it with torchtune's checkpointer, which has PEFT's form too",
    ),
    (
        "in the form of NeMo or Megatron",
        re.compile(r"adapter\w*\.linear_(in|out)\.weight$"),
        "export it for PEFT (`export_ckpt(…, target='hf-peft')`)",
    ),
    (
        "in the form of AdapterHub's library",
        re.compile(r"(^|\.)loras\.[^.]+\.lora_[AB]$"),
        DIFFERENCE,
    ),
    (
        "of another method than LoRA",
        re.compile(
            r"\.(lora_E|vera_(lambda_[bd]|[AB])|ia3_l|b?oft_[rRs]|randlora_\w+|fourierft_spectrum"
            r"|vblora_\w+|hra_u|miss_block|bone_block)(\.|$)|(^|\.)prompt_embeddings$"
        ),
        f"convert it to LoRA (newer releases of PEFT have convert_to_lora), or {DIFFERENCE}",
    ),
)


def foreign(keys: Iterable[str]) -> str | None:
    """What format the tensors of a file are in that is not read, and what to do; None if none."""
    for key in keys:
        for what, pattern, remedy in _FORMATS:
            if pattern.search(key):
                return f"this is {what} ({key!r:.120}), which is not read: {remedy}"
    return None


def no_pair(keys: Collection[str]) -> str:
    """What to say of a file with tensors of which none is a factor of an update."""
    return (
        f"none of its {len(keys)} tensors is a factor of LoRA (….lora_A.weight, ….lora_B.weight), "
        f"found {some_of(keys, 3)}; if it is a whole model, take its difference from the base: "
        "`lorafold extract BASE MODEL -o OUT`"
    )


# Folders, and files that are none of safetensors

_EXPORT = "give the PEFT directory that its own export writes"
_WHOLE = "a whole model: take its difference from the base, `lorafold extract BASE MODEL -o OUT`"

# How a file is called that only such a folder holds, what that is, and what to do.
_FOLDERS = (
    (
        re.compile(r"adapters\.npz"),
        "of an older mlx-lm, whose adapters.npz is not read: write it as safetensors beside its "
        "adapter_config.json, with mlx, `mx.save_safetensors('adapters.safetensors', "
        "dict(mx.load('adapters.npz')))`",
    ),
    (
        re.compile(r"(zero_|bf16_zero_)pp_rank_.*|mp_rank_\d+_model_states\.pt|zero_to_fp32\.py"),
        "a checkpoint of DeepSpeed, sharded: save the adapter from the gathered state dict "
        "(stage3_gather_16bit_weights_on_model_save), or gather it with its zero_to_fp32.py",
    ),
    (
        re.compile(r"latest_checkpointed_iteration\.txt|iter_\d{7}|common\.pt|mp_rank_\d\d(_\d+)*"),
        f"a distributed checkpoint of Megatron's: {_EXPORT} (`export_ckpt(…, target='hf-peft')` "
        "in NeMo)",
    ),
    (
        re.compile(r"__\d+_\d+\.distcp"),
        f"a distributed checkpoint of torch's: {_EXPORT}, or make it one file "
        "(`python -m torch.distributed.checkpoint.format_utils dcp_to_torch FOLDER FILE.bin`)",
    ),
    (
        re.compile(r"adapter_\d+\.pt|adapter_model\.pt|recipe_state(\.pt)?"),
        "of torchtune: give the folder of an epoch with adapter_model.safetensors in it, which "
        "its checkpointer for Hugging Face writes, in PEFT's form",
    ),
    (
        re.compile(r"model_index\.json|((diffusion_)?pytorch_model|model|consolidated)\b.*"),
        _WHOLE,
    ),
)
# In a header's keys, or its format: what an adapter has, of any form that is known.
_ADAPTERS = re.compile(
    rb'lora|hada_w|lokr_w|oft_|\.diff(_b)?"|adapter\w*\.linear_(in|out)|prompt_embeddings|ia3_l'
    rb'|trainable_tokens|lorafold-portable|"unet:\d|"w_[ab]_\d|"(A|B|U|S|Vh|delta_s)\.'
)


def kind_of_folder(path: Place) -> str | None:
    """What a folder without an adapter is, and what to do; None where nothing is known."""
    names = sorted(p.name for p in path.iterdir())
    return next((says for known, says in _FOLDERS if any(map(known.fullmatch, names))), None)


def kind_of_file(name: str) -> str | None:
    """What a file is by its name, and what to do; None where that tells nothing."""
    known = next((says for pattern, says in _FOLDERS if pattern.fullmatch(name)), None)
    return None if known == _WHOLE else known


def may_hold_adapter(path: Place) -> bool:
    """Whether a file has tensors as adapters have them, or may have: it can't be read.

    A file on a store is not asked.
    """
    if isinstance(path, UrlPath):
        return True
    try:
        with open(open_regular(path), "rb") as file:
            if path.suffix == ".gguf":
                return may_be_adapter(file.read(1 << 16))
            size = os.fstat(file.fileno()).st_size
            header = file.read(header_length(file.read(8), size, path))
    except (OSError, FileError):
        return True
    return _ADAPTERS.search(header) is not None
