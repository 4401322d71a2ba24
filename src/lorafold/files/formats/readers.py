"""The formats that are read: for each a file here, and a line below. Which one a file is in.

A file says it itself in its header, or by its keys. Keys of two formats are an error that asks for
`format=`; those of none are PEFT's to refuse.
"""

from __future__ import annotations

from ...errors import FileError, MismatchError
from ...words import one_line
from .diffusion.comfy import COMFY
from .diffusion.diffusers import DIFFUSERS
from .flat import FLAT
from .gguf.reading import GGUF
from .kohya.reading import KOHYA
from .mlx.reading import MLX
from .peft import PEFT
from .portable import PORTABLE
from .reading import Format, Source

_FORMATS = {f.name: f for f in (PORTABLE, FLAT, MLX, GGUF, KOHYA, COMFY, DIFFUSERS, PEFT)}
READ = tuple(_FORMATS)


def reader(name: str) -> Format:
    """The format of a name in `READ`."""
    return _FORMATS[name]


def format_of(source: Source, name: str | None = None) -> Format:
    """The format that a file is in.

    Args:
        source: the file.
        name: as the caller says; None: by what is in it.

    Raises:
        FileError: keys of several formats, all named.
        MismatchError: none of the one that is named, or no such format.
    """
    if name is not None and name not in _FORMATS:
        known = ", ".join(map(repr, READ))
        raise MismatchError(f"format must be one of {known}, found {one_line(name)}")
    claims = [f for f in _FORMATS.values() if f.claims(source)]
    if PORTABLE in claims:  # which its header says
        claims = [PORTABLE]
    if name is not None:
        asked = _FORMATS[name]
        if asked in claims or (asked is PEFT and not claims):
            return asked
        theirs = claims[0] if claims else PEFT
        raise MismatchError(
            f"{source.where}: its tensors are not in the form of {asked.said}, but of "
            f"{theirs.said}: give format={theirs.name!r}, or none"
        )
    if len(claims) > 1:
        said = " and ".join(f.said for f in claims)
        names = " or ".join(f"format={f.name!r}" for f in claims)
        raise FileError(
            f"{source.where}: its tensors have names of {said}: say which it is with {names}, "
            "or keep the tensors of one alone"
        )
    return claims[0] if claims else PEFT
