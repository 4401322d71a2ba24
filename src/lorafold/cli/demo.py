"""`lorafold demo`: the packaged adapters folded, and what that costs their tasks."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import click

from . import _output as output
from ._command import command
from ._library import group_words, sharing_remark

if TYPE_CHECKING:
    from rich.console import Console

FOLDER = "lorafold-demo"


@command("demo", example="lorafold demo")
@click.option(
    "-o",
    "--output",
    "folder",
    default=FOLDER,
    show_default=True,
    metavar="DIR",
    help="Where adapters and libraries go.",
)
@click.option("--overwrite", is_flag=True, help="Replace what an earlier demo left at DIR.")
def demo(folder: str, overwrite: bool) -> None:
    """Fold the packaged adapters and measure what that costs their tasks.

    Copies the adapters out, folds them at several tolerances, reads them back, runs the base model
    with each on text that it was not trained on, and does the same with truncated SVD at the same
    bytes and at the same error. Needs no network; takes a minute or two.
    """
    from ..demo.run import run_demo
    from ..files.remote.place import local

    with output.progress("running the model") as advance:
        found = run_demo(local(folder), overwrite=overwrite, progress=advance)
    output.report(found, lambda out: _show(out, found))


def _show(out: Console, d: dict[str, Any]) -> None:
    files, lift = d["files"], d["lift"]
    output.say(
        out,
        f"{d['adapters']} adapters of one small language model, trained with PEFT. On held-out "
        f"text they lower its loss by {output.percent(lift['mean'])} on average, by "
        f"{output.percent(lift['least'])} at least.\n",
    )
    heads = [">bytes", ">÷ f16", ">÷ f32", ">bits", ">max error", ">kept", ">worst"]
    output.table(out, ["", *heads], [*_file_rows(files), *map(_row, d["rows"])])
    # LoRA's B starts at zero: what overlaps there is what was learned.
    alike = {"in": d["init_groups"]["in"]} if "in" in d["init_groups"] else {}
    words = group_words({**d, "init_groups": alike}) or ["No two adapters start from the same A"]
    output.say(out, f"\n{words[0]}. {_reading(d)}")
    if d.get("moved"):
        output.say(out, f"\n{_moving(d['moved'])}")
    output.say(
        out,
        "\nkept: share of a task's lift that is left, (base − folded) / (base − adapter) in loss, "
        "its mean and its worst task, by running the model on the second half of each held-out "
        "text; the first half chose the tolerances of the retention row. ÷: times smaller than "
        "the float16 files as packaged, and than PEFT's default. bits: per number of the adapters. "
        "svd: each adapter truncated alone, by energy per byte, in float16, headers not counted.",
    )
    output.say(out, f"\nWritten to {d['folder']}. Try next:\n")
    for line in d["next"]:
        click.echo(f"  {line}")


def _file_rows(files: dict[str, int]) -> list[tuple[object, ...]]:
    packaged, wide = files["packaged"], files["float32"]
    kept = (output.percent(1.0),) * 2

    def ratio(size: int, of: int) -> str:
        return output.digits(of / size)

    return [
        ("PEFT files, float32", output.size(wide), ratio(wide, packaged), ratio(wide, wide))
        + ("32", "0", *kept),
        ("PEFT files, float16", output.size(packaged), ratio(packaged, packaged))
        + (ratio(packaged, wide), "16", "0", *kept),
    ]


def _row(row: dict[str, Any]) -> tuple[object, ...]:
    name = f"  {row['form']}"
    if row["form"] == "fold":
        name = row["by"] + (", default" if row["library"] == "lib" else "")
    return (
        name,
        output.size(row["bytes"]),
        output.digits(row["times_float16"]),
        output.digits(row["times_float32"]),
        output.digits(row["bits"]),
        output.percent(row["error_max"]),
        output.percent(row["retention_mean"]),
        output.percent(row["retention_min"]),
    )


def _moving(m: dict[str, Any]) -> str:
    """What became of an adapter on another base."""
    share, took = m["distill"] / m["native"], output.duration(m["distill seconds"])
    lifts = [output.percent(m[key]) for key in ("distill", "native", "svd")]
    return (
        f"On a wider base that was trained apart, {m['adapter']} lowers the loss by {lifts[0]}, "
        f"moved by {output.count(m['texts'], 'text')} without labels in {took}: {share:.2f} of "
        f"what an adapter trained there does ({lifts[1]}). Resized alone: {lifts[2]}."
    )


def _reading(d: dict[str, Any]) -> str:
    """What the default row says, in a sentence, and whether sharing had a part in it."""
    at = next(k for k, row in enumerate(d["rows"]) if row["library"] == "lib")
    row, same_error, same_bytes = d["rows"][at : at + 3]
    text = (
        f"At the default tolerance the library is {output.digits(row['times_float16'])}× smaller "
        f"than float16 files and keeps {output.percent(row['retention_mean'])} of the lift (worst: "
        f"{row['worst_task']}, {output.percent(row['retention_min'])}). Truncated SVD needs "
        f"{output.digits(same_error['bytes'] / row['bytes'])}× its bytes for the same error, and "
        f"keeps {output.percent(same_bytes['retention_mean'])} in the same bytes."
    )
    remark = sharing_remark(d)
    return f"{text} {remark}" if remark else text
