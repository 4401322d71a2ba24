"""`lorafold doctor`: is an adapter in effect on a running server, and how strongly?"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

import click

from . import _output as output
from ._command import CheckFailed, command
from ._source import loaded, source_options_beside_base
from ._texts import texts_of

if TYPE_CHECKING:
    from rich.console import Console

_KEY = "LORAFOLD_API_KEY"


@command(
    "doctor",
    example="lorafold doctor http://127.0.0.1:8080 --adapter sql --adapter-file adapters/sql "
    "--base base",
)
@click.argument("url", metavar="URL")
@click.option("--adapter", "name", required=True, metavar="NAME", help="What it is called there.")
@click.option("--adapter-file", "file", required=True, metavar="A", help="The adapter, here.")
@click.option("--base", required=True, metavar="DIR", help="The base's folder, to be run here.")
@click.option("--base-name", metavar="NAME", help="What the base is called there.")
@click.option("--strength", type=float, default=1.0, help="That it should have there (1).")
@click.option("--tolerance", type=float, default=0.1, help="How far off, as a share of it (0.1).")
@click.option("--prompts", metavar="FILE", help="Prompts: .txt, or .jsonl.")
@click.option("--lines", type=click.IntRange(min=1), default=1, help="Lines of a prompt (1).")
@click.option(
    "--requests", type=click.IntRange(min=4), default=40, help="To the server, at most (40)."
)
@click.option("--timeout", type=float, default=60.0, help="Seconds to wait for an answer (60).")
@click.option("--api-key", metavar="KEY", envvar=_KEY, help=f"For the server; or ${_KEY}.")
@click.option("--device", help="Where the base runs.")
@source_options_beside_base
def doctor(
    url: str,
    name: str,
    file: str,
    base: str,
    base_name: str | None,
    strength: float,
    tolerance: float,
    prompts: str | None,
    lines: int,
    requests: int,
    timeout: float,
    api_key: str | None,
    device: str | None,
    **options: Any,
) -> None:
    """Ask a running server whether an adapter is in effect, and at what strength.

    A few prompts are sent to it, with the adapter and without, and what follows is compared with
    the base and the adapter as they run here. llama.cpp's server is told every adapter's scale in
    each request; any other of OpenAI's protocol has a model called NAME. Exit status 1 where the
    adapter is not in effect, or at another strength.
    """
    from ..doctor.doctor import SAYS, examined
    from ..doctor.local import PROMPTS, LocalRun, opened_base
    from ..doctor.server import Http, find_server
    from ..errors import MismatchError

    if not strength or not abs(strength) < 1e6 or not 0 < tolerance < 1:
        raise MismatchError("strength must be a number that is not 0, and tolerance below 1")
    texts = list(PROMPTS) if prompts is None else texts_of(prompts, lines)
    http = Http(url, key=api_key, timeout=timeout, most=requests)
    server = find_server(http, name, base_name)
    adapter = loaded(file, base=base, dtype="float32", **options)
    model, tokenizer = opened_base(base, device)
    local = LocalRun(model, adapter, tokenizer, texts)
    with output.progress("asking") as advance:
        found = examined(server, local, strength=strength, tolerance=tolerance, progress=advance)
    facts = {
        "url": http.url,
        "server": server.kind,
        "adapter": name,
        "base": base,
        "ok": found.verdict == "right",
        "says": SAYS[found.verdict],
        "requests": http.count,
        **dataclasses.asdict(found),
    }
    output.report(facts, lambda out: _show(out, facts))
    if not facts["ok"]:
        raise CheckFailed(f"{http.url}: {facts['says']}")


def _show(out: Console, d: Mapping[str, Any]) -> None:
    text = d["by"] == "greedy tokens"

    def amount(x: float | None) -> str | None:
        return None if x is None else f"{100 * x:.0f} % of the text" if text else f"{x:.3g} nats"

    found = d["strength"]
    rows = [
        ("server", f"{d['url']}, {d['server']}"),
        ("strength", None if found is None else f"{found:.3g}, should be {d['expected']:g}"),
        ("effect", f"{amount(d['effect'])}, on average"),
        ("unexplained", amount(d["unexplained"])),
        ("base is off", amount(d["base_difference"])),
        ("compared", f"{d['by']} after {output.count(d['prompts'], 'prompt')}"),
        ("requests", d["requests"]),
        *(("note", note) for note in d["notes"]),
    ]
    output.say(out, f"{d['adapter']}: {d['says']}\n")
    output.facts(out, rows)
