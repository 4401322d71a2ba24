"""`lorafold serve`: a base and adapters over HTTP."""

from __future__ import annotations

import math
import os
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from ..errors import FileError, MismatchError
from . import _output as output
from ._command import command

if TYPE_CHECKING:
    from rich.console import Console

DEMO = "demo"


def _named(ctx: click.Context, param: click.Parameter, given: Any) -> dict[str, str]:
    found: dict[str, str] = {}
    for text in given:
        name, equals, path = text.partition("=")
        if not (name and equals and path) or name in found:
            raise click.BadParameter(f"{text!r} is not NAME=PATH", ctx, param)
        found[name] = path
    return found


def _seconds(ctx: click.Context, param: click.Parameter, given: float) -> float:
    if not 0 < given < math.inf:
        raise click.BadParameter(f"{given} is not in the range x>0", ctx, param)
    return given


def _option(name: str, text: str, **how: Any) -> Callable[[Any], Any]:
    return click.option(f"--{name}", help=text, **how)


_SOME = click.IntRange(1)
_OPTIONS = [
    _option("library", "Adapters folded into one, of which any is served.", metavar="LIB"),
    click.option(
        "--adapter",
        "adapters",
        multiple=True,
        metavar="NAME=PATH",
        callback=_named,
        help="One more; repeatable.",
    ),
    _option("name", "What the base is called (its folder).", metavar="NAME"),
    _option("router", "A saved router, for the model 'auto'.", metavar="ROUTER"),
    _option("adapter-root", "Let adapters below it be loaded by requests.", metavar="DIR"),
    _option("host", "Where to listen (127.0.0.1: this machine alone).", default="127.0.0.1"),
    _option("port", "0 is any that is free (8000).", type=click.IntRange(0, 65535), default=8000),
    click.option(
        "--api-key",
        "api_keys",
        multiple=True,
        metavar="KEY",
        envvar="LORAFOLD_API_KEYS",
        help="Who may ask; repeatable, or LORAFOLD_API_KEYS, with spaces.",
    ),
    _option(
        "max-rows", "Requests that run at once (64, or what memory holds).", type=click.IntRange(1)
    ),
    _option(
        "max-len", "Tokens of one, prompt and answer (the base's, ≤ 4096).", type=click.IntRange(1)
    ),
    _option("max-adapters", "Different ones that run at once (64).", type=_SOME),
    _option("max-queue", "Requests that may wait (256).", type=_SOME, default=256),
    _option("cache", "Bytes of adapters that stay attached.", default="1GiB", metavar="SIZE"),
    _option("timeout", "Seconds for one request (600).", default=600.0, callback=_seconds),
    _option("drain", "Seconds for what runs, on SIGTERM (30).", default=30.0, callback=_seconds),
    _option(
        "dtype",
        "Of the base: as it is stored, if not said.",
        type=click.Choice(["auto", "float32", "bfloat16", "float16"]),
        default="auto",
    ),
    _option("quantize", "The base.", type=click.Choice(["nf4", "fp4", "int8"])),
    _option(
        "engine",
        "What runs it: rows, or packed (for a GPU with flash attention).",
        type=click.Choice(["rows", "packed"]),
        default="rows",
    ),
    _option("chat-template", "Instead of the base's own.", metavar="FILE"),
    _option("cpu", "Use no GPU.", is_flag=True),
    _option("check", "Load all of it, answer one request, and end.", is_flag=True),
]


def _all_options(function: Any) -> Any:
    for option in reversed(_OPTIONS):
        function = option(function)
    return function


@command("serve", example="lorafold serve demo --library lib --port 8000")
@click.argument("base")
@_all_options
def serve(base: str, host: str, port: int, drain: float, check: bool, **given: Any) -> None:
    """Serve a base and its adapters over HTTP, as OpenAI's protocol has it.

    BASE is a folder of a language model or an encoder, or 'demo', the packaged one. A request's
    model is the base, an adapter, a mix of them (sql:0.7+polite:-0.3), any of these with a strength
    and a rank (sql@c=0.5@r=4), or 'auto', whom the router chooses. SIGTERM and Ctrl-C end it when
    what runs has ended.
    """
    from ..serve.http.running import address, listening, run

    made = _application(base, **given)
    if check:
        found = _described(made, None)
        _answered(made)
        output.report(found, lambda out: _show(out, found))
        return
    at = listening(host, port)
    found = _described(made, address(at))
    output.report(found, lambda out: _show(out, found))
    run(made, at, drain)


def _application(base: str, **given: Any) -> Any:
    from ..serve import Room, Settings, app, read_base

    folder, named = _base(base)
    template = given["chat_template"]
    room = Room(given["max_rows"], given["max_len"], given["max_adapters"], given["max_queue"])
    read = read_base(
        folder,
        given["name"] or named,
        dtype=given["dtype"],
        quantize=given["quantize"],
        device="cpu" if given["cpu"] else None,
        engine=given["engine"],
        room=room,
        template=None if template is None else _text(template),
    )
    root = given["adapter_root"]
    if root is not None and not os.path.isdir(root):
        raise FileError(f"no such folder: {root!r}")
    settings = Settings(
        keys=tuple(given["api_keys"]),
        root=root,
        cache=given["cache"],
        seconds=given["timeout"],
    )
    return app(read, given["library"], given["adapters"], router=given["router"], settings=settings)


def _base(text: str) -> tuple[Path, str]:
    """The folder of a base, and what it is called."""
    from ..demo.model import base_dir

    if text == DEMO and not os.path.exists(text):
        return base_dir(), DEMO
    if not os.path.isdir(text):
        raise MismatchError(
            f"no such folder: {text!r}; BASE is the folder of a model, or 'demo' (one on the Hub "
            "is fetched with: hf download ID --local-dir DIR)"
        )
    return Path(text), Path(text).resolve().name


def _text(path: str) -> str:
    from ..files.config import read_text

    try:
        return read_text(Path(path))
    except FileError as e:
        raise FileError(f"{path}: can't be read as a chat template ({e})") from e


def _answered(made: Any) -> None:
    """Have one request answered, as a client would."""
    from ..serve.http.running import tried

    tried(made)


def _described(made: Any, url: str | None) -> dict[str, Any]:
    service = made.state.service
    limits = service.engine.limits
    return {
        "url": url,
        "base": service.base.name,
        "engine": service.engine.name,
        "adapters": len(service.catalog),
        "rows": limits.rows,
        "length": limits.length,
        "keys": len(service.settings.keys),
    }


# For people


def _show(out: Console, d: dict[str, Any]) -> None:
    adapters = output.count(d["adapters"], "adapter")
    at = "all of it answers" if d["url"] is None else f"at {d['url']}/v1 (Ctrl-C ends it)"
    output.say(out, f"{d['base']} and {adapters}, {at}")
    keys = output.count(d["keys"], "key") if d["keys"] else "anybody may ask"
    rows = f"{d['rows']} requests at once, {d['length']:,} tokens each"
    output.facts(out, [("engine", d["engine"]), ("room", rows), ("keys", keys)])
