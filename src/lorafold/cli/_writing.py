"""What commands that write share: the dtype of adapters, how long to wait for other writers."""

from __future__ import annotations

from typing import TYPE_CHECKING

import click

if TYPE_CHECKING:
    import torch

DTYPES = ["float32", "float16", "bfloat16"]

dtype_option = click.option("--dtype", type=click.Choice(DTYPES), help="Of the factors written.")

timeout_option = click.option(
    "--timeout",
    type=float,
    default=60.0,
    show_default=True,
    help="Seconds to wait for others who change the library.",
)


def torch_dtype(name: str | None) -> torch.dtype | None:
    """The dtype of that name."""
    import torch

    if name is None:
        return None
    dtype: torch.dtype = getattr(torch, name)
    return dtype
