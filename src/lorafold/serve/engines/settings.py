"""What the environment says of a library that another engine serves."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from ...collection.limits import memory_bytes
from ...errors import MismatchError
from ...words import one_line, one_of

LIBRARY, FOLDER = "LORAFOLD_LIBRARY", "LORAFOLD_VLLM_CACHE"
DTYPE, BYTES, VARIANTS = "LORAFOLD_VLLM_DTYPE", "LORAFOLD_VLLM_BYTES", "LORAFOLD_VLLM_VARIANTS"
DTYPES = ("float32", "bfloat16", "float16")


@dataclass(frozen=True)
class Settings:
    """Where adapters come from and go to, and how much of them.

    Args:
        library: the folded library, or its URL. folder: where they are unfolded.
        dtype: of their factors. nbytes: all that lies in the folder at most.
        variants: other strengths and ranks of one adapter, and mixes with it, at most.
    """

    library: str
    folder: Path
    dtype: str = "float32"
    nbytes: int = 16 << 30
    variants: int = 32

    @classmethod
    def of(cls, environment: Mapping[str, str]) -> Settings | None:
        """What the variables say; None where no library is named.

        Raises:
            MismatchError: one that says something else than it may.
        """
        library = environment.get(LIBRARY)
        if not library:
            return None
        dtype = environment.get(DTYPE) or cls.dtype
        if dtype not in DTYPES:
            raise MismatchError(f"{DTYPE} must be {one_of(DTYPES)}, not {one_line(dtype)}")
        nbytes = environment.get(BYTES)
        if nbytes:
            try:
                limit = memory_bytes(nbytes)
            except MismatchError:
                why = f"{BYTES} must be a size such as 16GiB, not {one_line(nbytes)}"
                raise MismatchError(why) from None
        else:
            limit = cls.nbytes
        variants = environment.get(VARIANTS) or str(cls.variants)
        if not (variants.isascii() and variants.isdigit() and len(variants) < 10):
            raise MismatchError(
                f"{VARIANTS} must be a whole number of at least 0, not {one_line(variants)}"
            )
        return cls(library, _folder(environment), dtype, limit, int(variants))


def _folder(environment: Mapping[str, str]) -> Path:
    """The one that is named, or one in the user's cache."""
    named = environment.get(FOLDER)
    if named:
        return Path(named).expanduser()
    cache = environment.get("XDG_CACHE_HOME") or "~/.cache"
    return Path(cache).expanduser() / "lorafold" / "vllm"
