"""What every command shares: its flags, how its help ends, and how a failure is told.

The flags of `shared_flags` are understood before and after the command's name. Nothing here, or at
the top of a command's file, imports torch: help must not wait for it.
"""

from __future__ import annotations

import contextlib
import errno
import itertools
import json
import logging
import os
import sys
import traceback
import warnings
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, TypeVar

import click

from .. import __version__
from ..errors import LorafoldError, ToleranceError
from ..words import did_you_mean, escaped
from ._completion import VARIABLE, know_bash, offers, taken_by
from ._remedies import as_flags

CHECK_FAILED, BAD_INPUT = 1, 2

F = TypeVar("F", bound=Callable[..., Any])


@dataclass
class Settings:
    """The flags that hold for any command."""

    json: bool = False
    verbose: bool = False
    quiet: bool = False
    debug: bool = False
    printed: bool = False  # whether the one JSON value is out
    command: click.Command | None = None  # that is running

    def in_flags(self, text: str) -> str:
        """A message in the words of the command that is running."""
        return as_flags(text, {} if self.command is None else flags_of(self.command))


def flags_of(command: click.Command) -> dict[str, str]:
    """{keyword: flag} of a command, by the names of its options and of its arguments."""
    own = command.own() if isinstance(command, Command) else ()
    found = {name: f"--option {name}=" for name in own}
    for option in command.params:
        for name in option.opts if isinstance(option, click.Option) else ():
            if name.startswith("--"):
                found |= dict.fromkeys([str(option.name), name[2:].replace("-", "_")], name)
        if isinstance(option, click.Argument):
            found.setdefault(str(option.name), taken_by(option))
    return found


def told(error: LorafoldError) -> str:
    """What an error says, for a command's report."""
    return settings().in_flags(str(error))


def settings() -> Settings:
    """Those of the command that is running."""
    ctx = click.get_current_context(silent=True)
    return Settings() if ctx is None else ctx.find_root().ensure_object(Settings)


def print_json(value: Mapping[str, Any], chosen: Settings) -> None:
    """Print the one JSON value of a command."""
    # ASCII, so that any terminal and any name (lone surrogates too) can be written.
    click.echo(json.dumps(value, indent=2, allow_nan=False))
    chosen.printed = True


class CheckFailed(click.ClickException):
    """A check found what it looks for: what it says goes to stderr, and the status is 1."""

    exit_code = CHECK_FAILED


class Command(click.Command):
    """A command with the shared flags, whose help ends in an example that can be run.

    Args:
        example: the whole line, from `lorafold` on.
        own: what `--option NAME=VALUE` takes, where there is that.
    """

    def __init__(
        self, *args: Any, example: str, own: Callable[[], Iterable[str]] = tuple, **kwargs: Any
    ) -> None:
        kwargs["epilog"] = f"\b\nExample:\n  {example}"
        super().__init__(*args, **kwargs)
        self.example, self.own = example, own
        for parameter in self.params:
            offers(parameter)
        self.params += shared_flags()

    def invoke(self, ctx: click.Context) -> Any:
        """Run it; its messages are told in its own words."""
        chosen = ctx.find_root().ensure_object(Settings)
        chosen.command = self
        if chosen.quiet and chosen.verbose:
            raise click.UsageError("--quiet and --verbose exclude each other", ctx)
        return super().invoke(ctx)


def command(
    name: str, example: str, own: Callable[[], Iterable[str]] = tuple
) -> Callable[[Callable[..., Any]], Command]:
    """Decorate a function to be the command `name`."""
    return click.command(name, cls=Command, example=example, own=own)


class Group(Command, click.Group):
    """The same, of several commands."""

    def resolve_command(
        self, ctx: click.Context, args: list[str]
    ) -> tuple[str | None, click.Command | None, list[str]]:
        check_known(ctx, args[0], self.commands)
        return super().resolve_command(ctx, args)


def check_known(ctx: click.Context, name: str, known: Iterable[str]) -> None:
    """Refuse a word that is no command, with what may have been meant."""
    known = list(known)
    if name not in known and name[:1].isalnum():
        ctx.fail(f"there is no command {name!r}; {did_you_mean(name, known)}")


def group(name: str, example: str) -> Callable[[Callable[..., Any]], Group]:
    """Decorate a function to be the command `name`, which has commands of its own."""
    return click.group(name, cls=Group, example=example)


def shared_flags() -> list[click.Parameter]:
    """The flags of `Settings`, wherever they are given, and --version."""

    def remember(ctx: click.Context, param: click.Parameter, value: bool) -> None:
        if value:
            setattr(ctx.find_root().ensure_object(Settings), str(param.name), True)

    def version(ctx: click.Context, param: click.Parameter, value: bool) -> None:
        if value and not ctx.resilient_parsing:
            click.echo(f"lorafold {__version__}")
            ctx.exit()

    def flag(*names: str, text: str, callback: Callable[..., None] = remember) -> click.Option:
        # Eager, so that --debug is known when another option is found to be wrong.
        return click.Option(
            names, is_flag=True, expose_value=False, is_eager=True, callback=callback, help=text
        )

    return [
        flag("--json", text="Print one JSON value, and nothing else, on stdout."),
        flag("-v", "--verbose", text="Print more: tables of every module."),
        flag("-q", "--quiet", text="Print nothing but warnings and errors (and --json's value)."),
        flag("--debug", text="Show the traceback of an error."),
        flag("-V", "--version", text="Print the version.", callback=version),
    ]


class Verbs(click.Group):
    """A group whose commands each live in a file of their own, imported when called.

    Args:
        verbs: {command: its one-line help}.
        package: the package of their files.
    """

    def __init__(self, *args: Any, verbs: dict[str, str], package: str, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.verbs, self._package = verbs, package
        self.params += shared_flags()

    def list_commands(self, ctx: click.Context) -> list[str]:
        return list(self.verbs)

    def get_command(self, ctx: click.Context, cmd_name: str) -> click.Command | None:
        if cmd_name not in self.verbs:
            return None
        import importlib

        name = cmd_name.replace("-", "_")
        module = importlib.import_module(f".{name}", self._package)
        found: click.Command = getattr(module, name)
        return found

    def resolve_command(
        self, ctx: click.Context, args: list[str]
    ) -> tuple[str | None, click.Command | None, list[str]]:
        check_known(ctx, args[0], self.verbs)
        return super().resolve_command(ctx, args)

    def format_commands(self, ctx: click.Context, formatter: click.HelpFormatter) -> None:
        # From the table, so that help loads no command.
        with formatter.section("Commands"):
            formatter.write_dl(list(self.verbs.items()))

    def main(self, args: Sequence[str] | None = None, *more: Any, **extra: Any) -> Any:
        """Run a command line and exit with its status: 0, 1 (a check failed) or 2."""
        standalone = extra.pop("standalone_mode", True)
        extra["standalone_mode"] = False
        if not standalone:
            return super().main(args, *more, **extra)
        if VARIABLE in os.environ:
            know_bash()
        chosen = extra.setdefault("obj", Settings())
        # Known already where the rest of the line can't be understood.
        words = itertools.takewhile("--".__ne__, sys.argv[1:] if args is None else args)
        chosen.json = "--json" in words
        # A failure is told once, in one line, and the bars are ours.
        os.environ.setdefault("HF_HUB_VERBOSITY", "error")
        os.environ.setdefault("HF_HUB_DISABLE_PROGRESS_BARS", "1")
        run = super().main
        for stream in (sys.stdout, sys.stderr):
            if hasattr(stream, "reconfigure"):  # a terminal that lacks a letter is no failure
                stream.reconfigure(errors="backslashreplace")
        sys.exit(_status(lambda: run(args, *more, **extra), chosen))


def _status(run: Callable[[], Any], chosen: Settings) -> int:
    try:
        with _one_line_warnings(chosen), _others_silent():
            result = run()
        return result if isinstance(result, int) else 0
    except click.exceptions.NoArgsIsHelpError as e:  # a question, not a mistake
        click.echo(e.ctx.get_help() if e.ctx else str(e))
        return 0
    except (KeyboardInterrupt, click.Abort) as e:
        return _failed(e, "interrupted", chosen, BAD_INPUT)
    except click.ClickException as e:
        return _failed(e, _usage_line(e), chosen, e.exit_code)
    except ToleranceError as e:
        return _failed(e, str(e), chosen, CHECK_FAILED)
    except LorafoldError as e:
        return _failed(e, str(e), chosen, BAD_INPUT)
    except OSError as e:
        if e.errno == errno.EPIPE:
            raise
        where = f"{e.filename}: " if e.filename else ""
        return _failed(e, f"{where}{e.strerror or e}", chosen, BAD_INPUT)
    except Exception as e:  # noqa: BLE001  (told in a line; --debug has the rest)
        text = f"unexpected {type(e).__name__}: {e} (--debug shows where)"
        return _failed(e, text, chosen, BAD_INPUT)


def _failed(error: BaseException, text: str, chosen: Settings, status: int) -> int:
    said = one_line(chosen.in_flags(text))
    if chosen.json and not chosen.printed:
        kinds = {"kind": "error", "type": type(error).__name__.strip("_")}
        print_json({**kinds, "status": status, "message": said}, chosen)
    if chosen.debug and not isinstance(error, click.ClickException):
        click.echo("".join(traceback.format_exception(error)), err=True, nl=False)
    else:
        click.echo(f"error: {said}", err=True)
    return status


def _usage_line(error: click.ClickException) -> str:
    ctx = error.ctx if isinstance(error, click.UsageError) else None
    hint = f" (see '{ctx.command_path} --help')" if ctx else ""
    return error.format_message().rstrip(".") + hint


def one_line(text: str) -> str:
    """The text on one line, control characters escaped."""
    lines = text.strip("\n").splitlines()
    return escaped(" ".join(map(str.strip, lines)) if len(lines) > 1 else text.strip("\n"))


@contextlib.contextmanager
def _others_silent() -> Iterator[None]:
    """What libraries log below an error is not shown: it is not about what was asked for."""
    before = logging.root.manager.disable
    logging.disable(logging.WARNING)
    try:
        yield
    finally:
        logging.disable(before)


@contextlib.contextmanager
def _one_line_warnings(chosen: Settings) -> Iterator[None]:
    def show(message: Warning | str, *_: Any, **__: Any) -> None:
        click.echo(f"warning: {one_line(chosen.in_flags(str(message)))}", err=True)

    with warnings.catch_warnings():
        warnings.showwarning = show
        yield
