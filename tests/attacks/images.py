"""Kinds of files of image models: diffusers' three generations, and FLUX in ComfyUI's names."""

import json
import re
import sys

import torch
from safetensors.torch import save_file

import lorafold as lf

kinds = sys.modules["attacks_kinds"]  # which corpus.py has loaded
Kind, plain = kinds.Kind, kinds.plain
FILE = "x.safetensors"
TEXT = "text_encoder.encoder.layers.0."


def pair(g, down, up, A=(2, 5), B=(6, 2)):
    return {down: torch.randn(A, generator=g), up: torch.randn(B, generator=g)}


# diffusers


def make_diffusers(folder):
    g = torch.Generator().manual_seed(0)
    first = "unet.mid_block.attn1.processor.to_out_lora"
    tensors = {
        **pair(g, "unet.mid_block.q.lora_A.weight", "unet.mid_block.q.lora_B.weight"),
        "unet.mid_block.q.alpha": torch.tensor(3.0),
        **pair(g, f"{first}.down.weight", f"{first}.up.weight"),
        **pair(g, "unet.conv_in.lora.down.weight", "unet.conv_in.lora.up.weight", (2, 5, 3, 1)),
        **pair(g, *(f"{TEXT}mlp.fc1.lora_linear_layer.{side}.weight" for side in ("down", "up"))),
    }
    tensors["unet.conv_in.lora.up.weight"] = tensors["unet.conv_in.lora.up.weight"][..., None, None]
    tensors = {key: t.contiguous() for key, t in tensors.items()}
    save_file(tensors, folder / FILE, {"format": "pt", "lora_alpha": "None"})


ENDS = (  # of a key of the first factor: (what it ends in, its partner's end, its α's)
    (".lora_A.weight", ".lora_B.weight", ".alpha"),
    (".lora_down.weight", ".lora_up.weight", ".alpha"),
    (".lora.down.weight", ".lora.up.weight", ".lora.alpha"),
    (".lora_linear_layer.down.weight", ".lora_linear_layer.up.weight", ".lora_linear_layer.alpha"),
    ("_lora.down.weight", "_lora.up.weight", "_lora.alpha"),
)


def taken(tensors, key):
    """What is at a key, or at that with PEFT's prefix, which means the same; not at both."""
    found = [k for k in (key, kinds.PREFIX + key) if k in tensors]
    assert len(found) < 2
    return tensors.pop(found[0]) if found else None


def diffusers_says(folder):
    header, tensors = kinds.header_of(folder / FILE)
    said = header.get("__metadata__", {}).get("lora_alpha", "None")
    every = None if said in ("None", "") else float(said)
    modules = {}
    for key in list(tensors):
        found = [end for end in ENDS if key.endswith(end[0])]
        if not found:
            continue
        first, second, beside = found[0]
        stem = key.removesuffix(first).removeprefix(kinds.PREFIX)
        A, B, alpha = (taken(tensors, stem + end) for end in (first, second, beside))
        path = stem.replace(".processor.", ".")
        if first.startswith("_"):
            path = path.removesuffix("to_out") + "to_out.0" if path.endswith("to_out") else path
        if path.startswith(("text_encoder.encoder.layers.", "text_encoder.embeddings.")):
            path = path.replace("text_encoder.", "text_encoder.text_model.", 1)
        told = every if alpha is None else float(alpha)
        assert path not in modules
        factor = 1.0 if told is None else told / len(A)
        modules[path] = plain(A.flatten(1)), plain(B.flatten(1)), factor
    return {"modules": modules, "extras": {k: plain(t) for k, t in tensors.items()}}


# ComfyUI, FLUX

OWNER = "diffusion_model."
BLOCK = "transformer.single_transformer_blocks"
NAMES = {
    r"double_blocks\.(\d+)\.img_attn\.qkv": (
        [rf"transformer.transformer_blocks.\1.attn.to_{x}" for x in "qkv"],
        [1, 1, 1],
    ),
    r"single_blocks\.(\d+)\.linear1": (
        [*(rf"{BLOCK}.\1.attn.to_{x}" for x in "qkv"), rf"{BLOCK}.\1.proj_mlp"],
        [1, 1, 1, 4],
    ),
    r"single_blocks\.(\d+)\.linear2": ([rf"{BLOCK}.\1.proj_out"], [1]),
    r"img_in": (["transformer.x_embedder"], [1]),
    r"final_layer\.adaLN_modulation\.1": (["transformer.norm_out.linear"], [1]),
}


def make_comfy(folder):
    g = torch.Generator().manual_seed(0)
    tensors = {}
    for name, A, B in (
        ("double_blocks.0.img_attn.qkv", (2, 5), (9, 2)),
        ("single_blocks.1.linear1", (4, 5), (14, 4)),
        ("img_in", (3, 5), (4, 3)),
        ("final_layer.adaLN_modulation.1", (2, 5), (6, 2)),
    ):
        tensors |= pair(g, *(f"{OWNER}{name}.lora_{x}.weight" for x in ("down", "up")), A, B)
    up = tensors[f"{OWNER}single_blocks.1.linear1.lora_up.weight"]
    up *= torch.block_diag(*(torch.ones(n, 1) for n in (2, 2, 2, 8)))
    tensors[f"{OWNER}img_in.lora_up.weight"][:, 2:] = 0
    tensors[f"{OWNER}double_blocks.0.img_attn.qkv.alpha"] = torch.tensor(3.0)
    said = {"format": "pt", "lorafold_ranks": json.dumps({f"{OWNER}img_in": 2})}
    save_file(tensors, folder / FILE, said)


def comfy_says(folder):
    header, tensors = kinds.header_of(folder / FILE)
    metadata = header.get("__metadata__", {})
    ranks = kinds.strict_json(metadata["lorafold_ranks"]) if "lorafold_ranks" in metadata else {}
    told = [metadata[k] for k in ("lora_alpha", "network_alpha", "alpha") if k in metadata]
    assert not told
    modules = {}
    for key in [key for key in tensors if key.endswith(".lora_down.weight")]:
        name = key.removesuffix(".lora_down.weight")
        A, B = (t.flatten(1) for t in (tensors.pop(key), tensors.pop(f"{name}.lora_up.weight")))
        alpha = tensors.pop(f"{name}.alpha", None)
        factor = 1.0 if alpha is None else float(alpha) / len(A)
        for path, a, b in parts_of(name.removeprefix(OWNER), A, B, ranks.get(name)):
            a, b = a.clone(), b.clone(memory_format=torch.contiguous_format)  # noqa: PLW2901
            assert path not in modules
            modules[path] = plain(a), plain(b), factor
    return {"modules": modules, "extras": {k: plain(t) for k, t in tensors.items()}}


def parts_of(name, A, B, rank):
    """(path, A, B) of what a name stands for."""
    (paths, shares), match = next(
        (said, match) for text, said in NAMES.items() if (match := re.fullmatch(text, name))
    )
    paths = [match.expand(path) for path in paths]
    rows = [len(B) // sum(shares) * share for share in shares]
    assert sum(rows) == len(B)
    if isinstance(rank, list) and len(paths) == 1:  # the rank of each part
        (rank,) = rank
    assert rank is None or isinstance(rank, int)
    blocks = B.split(rows)
    if rank is not None:
        assert 0 < rank <= len(A)
        assert not B[:, rank:].any()
        A, blocks = A[:rank], [block[:, :rank] for block in blocks]
    elif len(paths) > 1 and len(A) % len(paths) == 0:
        r = len(A) // len(paths)
        inside = [block[:, k * r : (k + 1) * r] for k, block in enumerate(blocks)]
        own = torch.block_diag(*inside)
        if all(part.any() for part in inside) and torch.equal(own.bool(), B.bool()):
            return list(zip(paths, A.split(r), inside, strict=True))
    if name.startswith("final"):
        blocks = [torch.cat(blocks[0].chunk(2)[::-1])]
        assert len(B) % 2 == 0
    return [(path, A, block) for path, block in zip(paths, blocks, strict=True)]


LINES = (f"info FOLDER/{FILE}", f"convert FOLDER/{FILE} -o OUT --to peft")


def load(folder):
    return kinds.told_of(lf.load(folder / FILE))


KINDS = {
    "diffusers": Kind(make_diffusers, (FILE,), load, diffusers_says, LINES),
    "comfy": Kind(make_comfy, (FILE,), load, comfy_says, LINES),
}
