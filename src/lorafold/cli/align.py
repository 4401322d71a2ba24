"""`lorafold align`: two bases side by side, once for every adapter of the pair."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from . import _output as output
from ._bases import pair_options, tables_of, tokenizers_of
from ._command import command
from ._texts import texts_of

if TYPE_CHECKING:
    from rich.console import Console


@command("align", example="lorafold align base-s base-t --texts texts/sql.txt -o pair")
@click.argument("source", metavar="BASE_S")
@click.argument("target", metavar="BASE_T")
@click.option("-o", "--output", "place", required=True, metavar="ALIGNMENT", help="File to write.")
@click.option("--texts", required=True, metavar="FILE", help="Texts to run: .txt, or .jsonl.")
@click.option("--lines", type=click.IntRange(min=1), default=1, help="Lines of a text (1).")
@click.option("--layers", default="proportional", help="proportional (default), or cka.")
@click.option("--gradients", is_flag=True, help="Align outputs by the loss's gradients.")
@click.option("--context", type=click.IntRange(min=1), help="Tokens of a text at most.")
@click.option("--memory", default="8GiB", help="What the sums may take (8GiB).")
@click.option("--modules", multiple=True, metavar="KIND", help="mlp, attention.query, …; all.")
@pair_options
@click.option("--resume", metavar="FILE", help="Keep the state here, and go on from it.")
@click.option("--overwrite", is_flag=True, help="Replace the alignment that is there.")
def align(
    source: str,
    target: str,
    place: str,
    texts: str,
    lines: int,
    gradients: bool,
    overwrite: bool,
    tokenizers: tuple[str, ...],
    tables: tuple[str, ...],
    modules: tuple[str, ...],
    **options: Any,
) -> None:
    """Align two base models by texts run through both.

    BASE_S and BASE_T are folders that transformers reads, each with its tokenizer. What is written
    serves 'lorafold transfer --alignment' for every adapter of that pair: covariances, no texts and
    no activations.
    """
    from ..transfer import align as aligned
    from ..transfer.alignment import check_place

    check_place(place, overwrite)  # before anything is run
    given = {key: value for key, value in options.items() if value is not None}
    with output.progress("aligning") as advance:
        found = aligned(
            source,
            target,
            texts_of(texts, lines),
            tokenizers=tokenizers_of(tokenizers),
            roles=tables_of(tables),
            modules=modules or None,
            output="gradients" if gradients else "activations",
            progress=advance,
            **given,
        )
        found.save(place, overwrite=overwrite)
    told = {
        "path": place,
        "bytes": Path(place).stat().st_size,
        "maps": len(found.joins),
        "texts": found.texts,
        "tokens": found.tokens,
        "layers": {side: list(pairs) for side, pairs in found.layers.items()},
        "unpaired": {"source": list(found.unpaired[0]), "target": list(found.unpaired[1])},
    }
    output.report(told, lambda out: _show(out, told))


def _show(out: Console, d: dict[str, Any]) -> None:
    sides = [f"{side}: {', '.join(map(str, pairs))}" for side, pairs in d["layers"].items()]
    output.facts(
        out,
        [
            ("written", d["path"]),
            ("bytes", output.size(d["bytes"])),
            ("maps", output.count(d["maps"])),
            ("texts", output.count(d["texts"])),
            ("pairs of tokens", output.count(d["tokens"])),
            ("layers", "; ".join(sides)),
            ("no counterpart", output.listed([*d["unpaired"]["source"]]) or None),
            ("left as it is", output.listed([*d["unpaired"]["target"]]) or None),
        ],
    )
