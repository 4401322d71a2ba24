"""`lorafold report`: one page of pictures about a collection."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import click

from . import _output as output
from ._command import command
from ._source import adapter_options, base_option, named, reading_of

if TYPE_CHECKING:
    from rich.console import Console


@command("report", example="lorafold report adapters/* -o report.html")
@click.argument("sources", nargs=-1, metavar="SOURCE...")
@click.option("-o", "--output", "path", required=True, metavar="HTML", help="The page to write.")
@click.option(
    "--name",
    "names",
    multiple=True,
    metavar="NAME=SOURCE",
    help="A source under a name of your own; can be given again.",
)
@click.option("--title", default="", help="Of the page; by default it counts the adapters.")
@click.option(
    "--threshold",
    type=float,
    default=0.9,
    show_default=True,
    help="Cosine from which adapters count as alike.",
)
@click.option(
    "--memory",
    default="1GiB",
    show_default=True,
    help="Limit for what is held of the adapters at once.",
)
@click.option("--overwrite", is_flag=True, help="Replace the page at HTML.")
@base_option
@adapter_options
def report(
    sources: tuple[str, ...],
    path: str,
    names: tuple[str, ...],
    **options: Any,
) -> None:
    """Write one page of pictures about a collection of adapters.

    Who is like whom, common starts, spectra, norms, anomalies, what folding would save, and a table
    that can be searched and sorted. The page is one file and needs no network. What is drawn is
    bounded; the page says what was sampled.
    """
    from ..report.page import plotly_js
    from ..report.report import check_writable
    from ..report.report import report as write

    reading = reading_of(options)
    check_writable(path, options["overwrite"])
    plotly_js()  # before anything is read
    with output.progress("reading") as advance:
        handles = named(sources, names, **reading)
        written = write(handles, path, progress=advance, **options)
    found = {
        "path": str(written.path),
        "bytes": written.nbytes,
        "plotly_bytes": written.plotly,
        "adapters": len(written.names),
        "names": list(written.names),
        "refused": dict(written.refused),
        "sections": list(written.sections),
        "notes": list(written.notes),
    }
    output.report(found, lambda out: _show(out, found))


def _show(out: Console, found: dict[str, Any]) -> None:
    pictures = output.count(len(found["sections"]), "section")
    about = output.count(found["adapters"], "adapter")
    plotly = output.size(found["plotly_bytes"])
    output.say(
        out,
        f"{found['path']}: {pictures} about {about}, {output.size(found['bytes'])}, {plotly} of it "
        "plotly's script",
    )
    for note in found["notes"]:
        output.say(out, note)
