"""What the modules of image models are called: diffusers' paths, and what other programs call them.

Every adapter of an image model has diffusers' paths here, behind the part of the pipeline that they
are of: `unet.`, `transformer.`, `text_encoder.`, `text_encoder_2.`, `text_encoder_3.`.

kohya-ss's names are flat: a path with its dots written as `_`, behind the name of its model. Paths
have `_` themselves, so a name alone does not tell where the dots were. It does where every piece of
it is a word that is known. A model of which one name is another keeps all its names as they are in
the file; with the base's own modules (`bases`) they are told apart.

SDXL's UNet is written with the names of its first code (sgm), and ComfyUI writes all UNets so: its
blocks are counted through, a level has two on the way down and three on the way up, and the one
between levels resizes. FLUX's names are `flux`'s.
"""

from __future__ import annotations

import re
from collections.abc import Collection, Iterable

from .flux import Piece, flux_pieces

# The model of a pipeline that a flat name begins with, and diffusers' name of it.
OWNERS = {
    "lora_unet_": "unet",
    "lora_transformer_": "transformer",
    "lora_te_": "text_encoder",
    "lora_te1_": "text_encoder",
    "lora_te2_": "text_encoder_2",
    "lora_te3_": "text_encoder_3",
}
LYCORIS = "lycoris_"  # of any model
_FLAT = re.compile(rf"({'|'.join((*OWNERS, LYCORIS))})[^.]+\..+")

_UNET = (
    *("down_blocks", "mid_block", "up_blocks", "resnets", "attentions", "downsamplers"),
    *("upsamplers", "transformer_blocks", "attn1", "attn2", "to_q", "to_k", "to_v", "to_out"),
    *("ff", "net", "proj", "proj_in", "proj_out", "conv", "conv1", "conv2", "conv_in"),
    *("conv_out", "conv_shortcut", "time_emb_proj", "time_embedding", "add_embedding"),
    *("linear_1", "linear_2"),
)
_TRANSFORMER = (
    *("transformer_blocks", "single_transformer_blocks", "attn", "to_q", "to_k", "to_v", "to_out"),
    *("add_q_proj", "add_k_proj", "add_v_proj", "to_add_out", "norm", "norm1", "norm1_context"),
    *("norm_out", "linear", "ff", "ff_context", "net", "proj", "proj_mlp", "proj_out"),
    *("x_embedder", "context_embedder", "time_text_embed", "timestep_embedder", "text_embedder"),
    *("guidance_embedder", "linear_1", "linear_2"),
)
_CLIP = (
    *("text_model", "encoder", "layers", "self_attn", "q_proj", "k_proj", "v_proj", "out_proj"),
    *("mlp", "fc1", "fc2", "embeddings", "token_embedding", "position_embedding"),
    *("text_projection",),
)
_T5 = (
    *("encoder", "block", "layer", "SelfAttention", "q", "k", "v", "o", "DenseReluDense"),
    *("wi", "wi_0", "wi_1", "wo", "shared"),
)
_WORDS = {
    model: re.compile(rf"({'|'.join(sorted(words, key=len, reverse=True))}|\d+)(?:_|$)")
    for model, words in (
        ("lora_unet_", _UNET),
        ("lora_transformer_", _TRANSFORMER),
        *((f"lora_te{n}_", {*_CLIP, *_T5}) for n in ("", 1, 2, 3)),
    )
}

# sgm's names of parts, and diffusers'.
_IN_RESNET = {
    "in_layers.2": "conv1",
    "out_layers.3": "conv2",
    "emb_layers.1": "time_emb_proj",
    "skip_connection": "conv_shortcut",
}
_OF_RESNET = {path: name for name, path in _IN_RESNET.items()}
_AROUND = {
    "input_blocks.0.0": "conv_in",
    "out.2": "conv_out",
    "time_embed.0": "time_embedding.linear_1",
    "time_embed.2": "time_embedding.linear_2",
    "label_emb.0.0": "add_embedding.linear_1",
    "label_emb.0.2": "add_embedding.linear_2",
}
_OF_AROUND = {path: name for name, path in _AROUND.items()}
_FLAT_RESNET = {name.replace(".", "_"): path for name, path in _IN_RESNET.items()}
_FLAT_AROUND = {n.replace(".", "_"): p.replace(".", "_") for n, p in _AROUND.items()}
_BLOCK = re.compile(r"(input_blocks|middle_block|output_blocks)_(\d+)(?:_(\d+))?_(.+)")
_MIDDLE = ("resnets_0", "attentions_0", "resnets_1")
_PATH = re.compile(
    r"(?:(?P<side>down|up)_blocks\.(?P<level>\d+)|mid_block)"
    r"\.(?P<kind>resnets|attentions|downsamplers|upsamplers)\.(?P<n>\d+)\.(?P<end>.+)"
)
_CLIP_START = re.compile(
    r"(text_encoder(?:_\d)?)\.(?=(?:encoder\.layers|embeddings|final_layer)\b)"
)


def is_flat_name(key: str) -> bool:
    """Whether a key begins as a module's name of kohya-ss's or LyCORIS's."""
    return _FLAT.fullmatch(key) is not None


def is_flat_path(path: str) -> bool:
    """Whether a module's path is a flat name, which nothing has taken apart."""
    return "." not in path and bool(parted(path)[0])


def pieces_of(names: Iterable[str], whole: Collection[str] = ()) -> dict[str, tuple[Piece, ...]]:
    """{name in a file: the modules that it means}, as far as the names tell; else the name itself.

    Args:
        names: flat ones.
        whole: those that must not be taken apart: their models keep their names where one would be.

    Examples:
        >>> found = pieces_of(["lora_unet_mid_block_attentions_0_proj_in"])
        >>> [piece.path for pieces in found.values() for piece in pieces]
        ['unet.mid_block.attentions.0.proj_in']
    """
    split = {name: _split(name) for name in names}
    for name in whole:
        if any(piece.is_cut for piece in split.get(name) or ()):
            split[name] = None
    strange = {parted(name)[0] for name, pieces in split.items() if pieces is None}
    found = {
        name: (Piece(name),) if pieces is None or parted(name)[0] in strange else pieces
        for name, pieces in split.items()
    }
    if any(piece.path.startswith("transformer.") for pieces in found.values() for piece in pieces):
        return {name: tuple(map(_of_flux, pieces)) for name, pieces in found.items()}
    return found


def _of_flux(piece: Piece) -> Piece:
    """A module of FLUX's pipeline, whose second text encoder is T5."""
    rest = piece.path.removeprefix("text_encoder_3.")
    return piece if rest == piece.path else Piece(f"text_encoder_2.{rest}")


def _split(name: str) -> tuple[Piece, ...] | None:
    """The modules of a name by words that are known; None where there are others in it."""
    model, rest = parted(name)
    if model not in _WORDS:
        return None
    if model == "lora_unet_":
        found = flux_pieces(rest)
        if found is not None:
            return found
        rest = of_sgm(rest) or rest
    words = _WORDS[model].findall(rest)
    path = with_text_model(".".join((OWNERS[model], *words)))
    return (Piece(path),) if "_".join(words) == rest else None


def parted(name: str) -> tuple[str, str]:
    """The model that a flat name begins with ("" where it is none), and the rest."""
    model = next((m for m in (*OWNERS, LYCORIS) if name.startswith(m)), "")
    return model, name.removeprefix(model)


def of_sgm(rest: str) -> str | None:
    """A flat name of sgm's as diffusers' would be; None where it is none."""
    if rest in _FLAT_AROUND:
        return _FLAT_AROUND[rest]
    match = _BLOCK.fullmatch(rest)
    if match is None:
        return None
    where, n, end = match[1], int(match[2]), match[4]
    if where == "middle_block":
        end = f"{match[3]}_{end}" if match[3] else end
        return f"mid_block_{_MIDDLE[n]}_{_FLAT_RESNET.get(end, end)}" if n < 3 else None
    if match[3] is None:
        return None
    part, down = int(match[3]), where == "input_blocks"
    level, block = divmod(n - 1 if down else n, 3)
    side = f"{'down' if down else 'up'}_blocks_{level}"
    if end == ("op" if down else "conv"):
        return f"{side}_{'down' if down else 'up'}samplers_0_conv"
    if part > 1 or level < 0 or (down and block == 2):
        return None
    return f"{side}_{('resnets', 'attentions')[part]}_{block}_{_FLAT_RESNET.get(end, end)}"


def to_sgm(path: str, bare_levels: Collection[int] = ()) -> str | None:
    """A path in diffusers' UNet as sgm has it; None where it has none.

    Args:
        path: without `unet.`.
        bare_levels: those on the way up that have no attentions, but an upsampler.
    """
    if path in _OF_AROUND:
        return _OF_AROUND[path]
    match = _PATH.fullmatch(path)
    if match is None:
        return None
    kind, n, end = match["kind"], int(match["n"]), match["end"]
    end = _OF_RESNET.get(end, end) if kind == "resnets" else end
    if match["side"] is None:
        at = {("resnets", 0): 0, ("attentions", 0): 1, ("resnets", 1): 2}.get((kind, n))
        return None if at is None else f"middle_block.{at}.{end}"
    level, down = int(match["level"]), match["side"] == "down"
    if kind == ("downsamplers" if down else "upsamplers"):
        if n or end != "conv":
            return None
        if down:
            return f"input_blocks.{3 * level + 3}.0.op"
        return f"output_blocks.{3 * level + 2}.{1 if level in bare_levels else 2}.conv"
    if kind not in ("resnets", "attentions") or n > (1 if down else 2):
        return None
    part = 0 if kind == "resnets" else 1
    block = f"input_blocks.{1 + 3 * level + n}" if down else f"output_blocks.{3 * level + n}"
    return f"{block}.{part}.{end}"


def with_text_model(path: str) -> str:
    """A path of CLIP's with the `text_model.` that files have, and newer releases leave out."""
    return _CLIP_START.sub(r"\1.text_model.", path)
