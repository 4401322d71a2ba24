"""FLUX's names: those of its first code, which keeps several of diffusers' weights in one.

kohya-ss and ComfyUI call its modules so. Of what is fused, an update's rows are its parts': each
part takes its rows of B, and A is of all of them; where B is block-diagonal, of its own A alone.
What scales and shifts the last layer is stored in the other order.
"""

from __future__ import annotations

import re
from dataclasses import dataclass


@dataclass(frozen=True)
class Piece:
    """A module that a name in a file means, or means with others.

    Args:
        path: diffusers'.
        shares: from where to where its rows are, of how many shares; None: all of them.
        index: which part of the name's it is, and of how many.
        swapped: whether the two halves of its rows are in the other order.
    """

    path: str
    shares: tuple[int, int, int] | None = None
    index: tuple[int, int] = (0, 1)
    swapped: bool = False

    @property
    def is_cut(self) -> bool:
        """Whether it is anything but the whole of what the file has, as it is."""
        return self.shares is not None or self.swapped

    def rows(self, out: int) -> tuple[int, int]:
        """From where to where its rows are, of `out`.

        Raises:
            ValueError: these can't be shared so.
        """
        if self.shares is None:
            return 0, out
        first, last, total = self.shares
        if out % total:
            raise ValueError(f"its {out} rows are no {total} shares, as those of FLUX are")
        return out // total * first, out // total * last


_QKV, _ADDED = ("to_q", "to_k", "to_v"), ("add_q_proj", "add_k_proj", "add_v_proj")
# {name in a block: (the block's in diffusers, its modules, their shares)}
_DOUBLE = {
    "img_attn.qkv": (tuple(f"attn.{x}" for x in _QKV), (1, 1, 1)),
    "txt_attn.qkv": (tuple(f"attn.{x}" for x in _ADDED), (1, 1, 1)),
    "img_attn.proj": (("attn.to_out.0",), (1,)),
    "txt_attn.proj": (("attn.to_add_out",), (1,)),
    "img_mlp.0": (("ff.net.0.proj",), (1,)),
    "img_mlp.2": (("ff.net.2",), (1,)),
    "txt_mlp.0": (("ff_context.net.0.proj",), (1,)),
    "txt_mlp.2": (("ff_context.net.2",), (1,)),
    "img_mod.lin": (("norm1.linear",), (1,)),
    "txt_mod.lin": (("norm1_context.linear",), (1,)),
}
_SINGLE = {
    "linear1": ((*(f"attn.{x}" for x in _QKV), "proj_mlp"), (1, 1, 1, 4)),
    "linear2": (("proj_out",), (1,)),
    "modulation.lin": (("norm.linear",), (1,)),
}
_AROUND = {
    "img_in": "x_embedder",
    "txt_in": "context_embedder",
    "time_in.in_layer": "time_text_embed.timestep_embedder.linear_1",
    "time_in.out_layer": "time_text_embed.timestep_embedder.linear_2",
    "vector_in.in_layer": "time_text_embed.text_embedder.linear_1",
    "vector_in.out_layer": "time_text_embed.text_embedder.linear_2",
    "guidance_in.in_layer": "time_text_embed.guidance_embedder.linear_1",
    "guidance_in.out_layer": "time_text_embed.guidance_embedder.linear_2",
    "final_layer.linear": "proj_out",
    "final_layer.adaLN_modulation.1": "norm_out.linear",
}
_SWAPPED = "norm_out.linear"
# What x-flux trains: the attention alone.
_PROCESSORS = {
    ("double", "processor_qkv_lora1"): "img_attn.qkv",
    ("double", "processor_qkv_lora2"): "txt_attn.qkv",
    ("double", "processor_proj_lora1"): "img_attn.proj",
    ("double", "processor_proj_lora2"): "txt_attn.proj",
    ("single", "processor_proj_lora"): "linear2",
}
_BLOCKS = {
    "double": ("transformer_blocks", _DOUBLE),
    "single": ("single_transformer_blocks", _SINGLE),
}

_FLAT = re.compile(r"(double|single)_blocks_(\d+)_(.+)")
_PATH = re.compile(r"(transformer_blocks|single_transformer_blocks)\.(\d+)\.(.+)")


def flux_pieces(rest: str) -> tuple[Piece, ...] | None:
    """The modules that a flat name of FLUX's means; None where it is none.

    Args:
        rest: without `lora_unet_`.
    """
    match = _FLAT.fullmatch(rest)
    if match is None:
        path = _OF_FLAT.get(rest)
        return None if path is None else (Piece(f"transformer.{path}", swapped=path == _SWAPPED),)
    kind, n, end = match[1], match[2], match[3]
    owner, names = _BLOCKS[kind]
    before = f"transformer.{owner}.{n}."
    if (kind, end) == ("single", "processor_qkv_lora"):
        return _pieces(before, _DOUBLE["img_attn.qkv"])
    name = _PROCESSORS.get((kind, end)) or _FLAT_NAMES[kind].get(end)
    return None if name is None else _pieces(before, names[name])


def _pieces(before: str, said: tuple[tuple[str, ...], tuple[int, ...]]) -> tuple[Piece, ...]:
    modules, shares = said
    if len(modules) == 1:
        return (Piece(before + modules[0]),)
    starts = [sum(shares[:k]) for k in range(len(shares) + 1)]
    return tuple(
        Piece(before + module, (starts[k], starts[k + 1], starts[-1]), (k, len(modules)))
        for k, module in enumerate(modules)
    )


def to_flux(path: str) -> tuple[str, Piece] | None:
    """The name of FLUX's first code that a path of diffusers' is in, and which piece of it.

    Args:
        path: with `transformer.`.
    """
    rest = path.removeprefix("transformer.")
    if rest in _OF_AROUND and rest != path:
        return _OF_AROUND[rest], Piece(path, swapped=rest == _SWAPPED)
    match = _PATH.fullmatch(rest)
    if match is None or rest == path:
        return None
    kind = "double" if match[1] == "transformer_blocks" else "single"
    for name, said in _BLOCKS[kind][1].items():
        if match[3] in said[0]:
            pieces = _pieces(f"transformer.{match[1]}.{match[2]}.", said)
            return f"{kind}_blocks.{match[2]}.{name}", pieces[said[0].index(match[3])]
    return None


_FLAT_NAMES = {
    kind: {name.replace(".", "_"): name for name in names} for kind, (_, names) in _BLOCKS.items()
}
_OF_FLAT = {name.replace(".", "_"): path for name, path in _AROUND.items()}
_OF_AROUND = {path: name for name, path in _AROUND.items()}
