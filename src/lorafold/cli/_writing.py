"""What commands that write adapters share: the dtype."""

from __future__ import annotations

from typing import TYPE_CHECKING

import click

if TYPE_CHECKING:
    import torch

DTYPES = ["float32", "float16", "bfloat16"]

dtype_option = click.option("--dtype", type=click.Choice(DTYPES), help="Of the factors written.")


def torch_dtype(name: str | None) -> torch.dtype | None:
    """The dtype of that name."""
    import torch

    if name is None:
        return None
    dtype: torch.dtype = getattr(torch, name)
    return dtype
