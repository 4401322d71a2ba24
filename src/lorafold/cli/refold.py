"""`lorafold refold`: a library folded anew, from what it holds or from the sources."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import click

from . import _output as output
from ._command import command
from ._library import options_words
from ._source import adapter_options, base_option, reading_of
from ._source import named as named_handles
from ._writing import folding_options

if TYPE_CHECKING:
    from rich.console import Console


@command("refold", example="lorafold refold lib adapters --tolerance 0.2")
@click.argument("lib", metavar="LIB")
@click.argument("sources", nargs=-1, metavar="[SOURCE]...")
@click.option(
    "--name",
    "named",
    multiple=True,
    metavar="NAME=SOURCE",
    help="The source of the adapter NAME; can be given again.",
)
@click.option("--tolerance", type=float, help="The new bound. [default: the library's own]")
@folding_options
@base_option
@adapter_options
def refold(
    lib: str,
    sources: tuple[str, ...],
    named: tuple[str, ...],
    timeout: float,
    **options: Any,
) -> None:
    """Fold a library anew, from what it holds or from the sources.

    In one step. The SOURCEs must be all of its adapters. Without them old and new errors add up,
    and together they keep the bound, or nothing changes. What adapters have in common is looked
    for anew, and what many changes have left goes.
    """
    from ..fold import Library

    reading = reading_of(options)
    given = {key: value for key, value in options.items() if value is not None}
    with output.notes(), Library.open(lib, timeout=timeout) as opened:
        handles = None
        if sources or named:
            handles = named_handles(sources, named, **reading)
        before = opened.stats()
        with output.progress("folding") as advance:
            opened.refold(sources=handles, progress=advance, **given)
        after = opened.stats()
    found = {
        "path": lib,
        "from": "what it held" if handles is None else "sources",
        "adapters": after["adapters"],
        "options": after["options"],
        "bytes": [before["bytes"], after["bytes"]],
        "error": [before["error"], after["error"]],
        "forms": [before["forms"], after["forms"]],
    }
    output.report(found, lambda out: _show(out, found))


def _show(out: Console, d: dict[str, Any]) -> None:
    errors = (
        f"mean {output.percent(e['mean'])}, max {output.percent(e['max'])}" for e in d["error"]
    )
    forms = (", ".join(f"{form} ×{n}" for form, n in forms.items()) for forms in d["forms"])
    output.facts(
        out,
        [
            ("library", d["path"]),
            ("folded anew", f"{output.count(d['adapters'], 'adapter')}, from {d['from']}"),
            ("by", options_words(d["options"])),
            ("bytes", " → ".join(map(output.size, d["bytes"]))),
            ("error", " → ".join(errors)),
            ("forms", " → ".join(dict.fromkeys(forms))),
        ],
    )
