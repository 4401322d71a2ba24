"""The command line: `lorafold VERB …`, one file per verb, named like it.

A verb's file is imported when the verb is called, and torch when it runs, so that help is quick.
"""

from __future__ import annotations

import click

from ._command import Verbs

VERBS = {
    "info": "Say what adapters, or a library, hold.",
    "similar": "Find adapters that do the same, or nearly, and what could go.",
    "diff": "Compare two adapters by what they do to the weights.",
    "anatomy": "Measure every module of an adapter, and find those that stand out.",
    "roles": "Show what the modules of a base or an adapter do.",
    "resize": "Write adapters at another size, with the error it costs.",
    "convert": "Write an adapter in the form of another program.",
    "check": "Check an adapter's names and shapes against its base, or its file against a program.",
    "doctor": "Ask a running server whether an adapter is in effect, and at what strength.",
    "merge": "Merge adapters into one, of any ranks and targets.",
    "merge-into": "Write a checkpoint with an adapter merged, without loading the model.",
    "verify-merge": "Check, tensor by tensor, what a merged checkpoint holds of an adapter.",
    "extract": "Make an adapter of what differs between two checkpoints.",
    "train": "Train an adapter on examples, and measure what it gains on those held out.",
    "align": "Align two base models by texts run through both.",
    "transfer": "Move adapters to another base model, or to other shapes.",
    "fold": "Fold many adapters into one library with a bounded error.",
    "ls": "List the adapters of a library.",
    "unfold": "Write adapters of a library back as PEFT directories.",
    "add": "Add adapters to a library.",
    "rm": "Remove adapters from a library.",
    "verify": "Check a library's checksums, and its errors against the sources.",
    "refold": "Fold a library anew, from what it holds or from the sources.",
    "repair": "Make a damaged library whole again: rebuild what is lost, or drop it.",
    "steer": "Train a dial from pairs of answers.",
    "route": "Choose adapters for texts: fit a router, ask it.",
    "serve": "Serve a base and its adapters over HTTP, as OpenAI's protocol has it.",
    "report": "Write one page of pictures about a collection of adapters.",
    "bench": "Time a library: open, rebuild, project, add.",
    "demo": "Fold the packaged adapters and measure what that costs their tasks.",
}


@click.group(
    cls=Verbs,
    verbs=VERBS,
    package=__name__,
    invoke_without_command=True,
    context_settings={"help_option_names": ["-h", "--help"], "max_content_width": 100},
    epilog="\b\nExample:\n  lorafold fold adapters/* -o lib --tolerance 0.1",
)
@click.pass_context
def main(ctx: click.Context) -> None:
    """Low-rank adapters after training: fold many into one library, compare, resize, check.

    An adapter is a PEFT directory, its safetensors file, an id on the Hub, or LIB:NAME for one in
    a library. Exit status: 0, 1 when a check failed, 2 for bad usage or input.
    """
    if ctx.invoked_subcommand is None:
        click.echo(ctx.get_help())
