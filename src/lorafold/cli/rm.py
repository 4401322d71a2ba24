"""`lorafold rm`: adapters out of a library."""

from __future__ import annotations

import click

from . import _output as output
from ._command import command
from ._writing import timeout_option


@command("rm", example="lorafold rm lib law")
@click.argument("lib", metavar="LIB")
@click.argument("names", nargs=-1, required=True, metavar="NAME...")
@timeout_option
def rm(lib: str, names: tuple[str, ...], timeout: float) -> None:
    """Remove adapters from a library.

    Their names are free again. What others share with them stays, and the bytes of a shard are
    freed when most of it is unused.
    """
    from ..fold.store.catalog import Catalog
    from ..fold.store.compaction import remove

    opened = Catalog.open(lib, timeout)
    wanted = list(dict.fromkeys(names))
    for name in wanted:
        opened.entry(name)  # an unknown one is told before anything is removed
    before = opened.store.nbytes
    with output.progress("removing") as advance:
        for k, name in enumerate(wanted):
            advance(k, len(wanted), name)
            remove(opened.store, name)
    sizes = [before, opened.store.nbytes]
    left = len(opened.store.manifest.adapters)
    data = {"path": lib, "removed": wanted, "adapters": left, "bytes": sizes}
    gone = output.listed(map(repr, wanted))
    words = f"{gone} removed; {output.count(left, 'adapter')} left"
    change = f"{output.size(sizes[0])} → {output.size(sizes[1])}"
    output.report(data, lambda out: output.say(out, f"{words}\n{lib}: {change}"))
