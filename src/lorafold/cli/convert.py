"""`lorafold convert`: an adapter in the form of another program."""

from __future__ import annotations

import contextlib
import re
import tempfile
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any, cast

import click

from ..errors import LorafoldError
from ..files.formats.registry import FORMATS, WRITTEN
from . import _output as output
from ._command import command
from ._source import format_option, opened, source_options_beside_base, touched
from ._writing import Places, dtype_option, torch_dtype

if TYPE_CHECKING:
    from rich.console import Console

    from ..adapter import Adapter


@command("convert", example="lorafold convert adapters/sql -o sql-mlx --to mlx")
@click.argument("source", metavar="IN")
@click.option("-o", "--output", "target", required=True, metavar="OUT", help="What to write.")
@click.option(
    "--to", "form", type=click.Choice(["peft", *WRITTEN]), required=True, help="Whose form."
)
@click.option("--base", metavar="DIR", help="The base's folder, which has its names and shapes.")
@click.option("--base-model", help="Name or path of the base, for the config.")
@click.option(
    "--tolerance",
    type=float,
    help="Relative error to which a LoHa or LoKr of full rank is cut when it is read.",
)
@dtype_option
@click.option("--overwrite", is_flag=True, help="Replace the adapter at OUT.")
@format_option
@source_options_beside_base
def convert(
    source: str,
    target: str,
    form: Any,
    base: str | None,
    base_model: str | None,
    tolerance: float | None,
    dtype: str | None,
    overwrite: bool,
    **options: Any,
) -> None:
    """Write an adapter in the form of another program.

    IN is told by what is in it. The update stays what it is: factors keep their bits where the form
    has room for their scale, and are float32 where multiplying it in would round, unless --dtype
    says otherwise; the error of what was written is measured against IN. What the form has no place
    for is refused by name.
    """
    from ..files import open_adapter, save
    from ..files.formats.diffusion.bases import by_base
    from ..files.save import target_kind
    from ..roles.onto import onto

    file = opened(source, dtype=dtype, tolerance=tolerance, base=base, **options)
    apart = [path for path in touched([source], {}) if path is not None]
    places = Places.of(
        target,
        ["adapter"],
        [*apart, file.path],
        overwrite=overwrite,
        many=False,
        kind=target_kind(form),
    )
    (path,) = places.paths.values()
    adapter, names_of = file.load(), base
    if file.names and base is not None and not (form in FORMATS and FORMATS[form].of_images):
        adapter = by_base(adapter, file.names, base)
    if form == "peft":
        if base is not None and not (file.names or file.is_on_base):
            adapter = onto(adapter, base)
        names_of = None  # which the base was needed for
    with _told_as_options():
        save(
            adapter,
            path,
            format=form,
            base=names_of,
            base_model=base_model,
            dtype=torch_dtype(dtype),
            overwrite=overwrite,
        )
    # What was said to be PEFT's may have others' keys beside it, which go along.
    after = open_adapter(path, base=base, format=form if form == "peft" else None)
    found = {
        "path": target,
        "format": form,
        "modules": [len(file.shapes), len(after.shapes)],
        "ranks": [_ranks(file.shapes), _ranks(after.shapes)],
        "bytes": [file.nbytes, after.nbytes],
        "dtypes": [_dtypes(file.dtypes), _dtypes(after.dtypes)],
        "error": _error(adapter, after.load(), form, base),
    }
    output.report(found, lambda out: _show(out, found))


@contextlib.contextmanager
def _told_as_options() -> Iterator[None]:
    """What `save` says of its `format`, which is --to here: --format is that of IN."""
    try:
        yield
    except LorafoldError as e:
        text = re.sub(r"save it with format='(\w+)'", r"write it with --to \1", str(e))
        e.args = (text, *e.args[1:])
        raise


def _error(adapter: Adapter, written: Adapter, form: str, base: str | None) -> float | None:
    """Relative, in ΔW; None where the algebra is refused.

    Where the form has other names for the modules, against what they are without rounding.
    """
    from ..adapter import on_base
    from ..files import open_adapter, save

    if adapter.refusal is not None:
        return None
    # PEFT has no other names, but zeros for experts that are not there.
    if form in FORMATS and adapter.modules.keys() != written.modules.keys():
        with tempfile.TemporaryDirectory(prefix="lorafold-") as scratch:
            exact = Path(scratch, f"exact{FORMATS[form].ending or ''}")
            save(adapter, exact, format=cast(Any, form), base=base)
            adapter = open_adapter(exact, base=base).load()
    if adapter.base_model is not None:  # of which --base-model may be another name
        written = on_base(written, adapter.base_model)
    norm = adapter.norm()
    return adapter.distance(written) / norm if norm > 0 else 0.0


def _ranks(shapes: Mapping[str, tuple[int, int, int]]) -> list[int]:
    """Smallest and largest."""
    ranks = [rank for _, _, rank in shapes.values()]
    return [min(ranks, default=0), max(ranks, default=0)]


def _dtypes(dtypes: Mapping[str, Any]) -> list[str]:
    return sorted({str(dtype).removeprefix("torch.") for dtype in dtypes.values()})


def _show(out: Console, d: Mapping[str, Any]) -> None:
    error = d["error"]
    said = "not measured: it is no plain W + ΔW"
    rows = {
        "written": f"{d['path']}, in the form of {d['format']}",
        "modules": _change(map(str, d["modules"])),
        "rank": _change(map(output.span, d["ranks"])),
        "bytes": _change(map(output.size, d["bytes"])),
        "dtype": _change(", ".join(names) for names in d["dtypes"]),
        "error": said if error is None else f"{output.percent(error)} of ‖ΔW‖",
    }
    output.facts(out, list(rows.items()))


def _change(words: Any) -> str:
    return " → ".join(dict.fromkeys(words))
