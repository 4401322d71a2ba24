"""What commands that write share: dtypes, how to fold, how long to wait, where many adapters go."""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, TypeVar

import click

from ..collection.folders import folder_names, known_names, write_names

if TYPE_CHECKING:
    import torch

    from ..files.remote.place import Place
    from ..files.replacing import FileKind, Kind

F = TypeVar("F", bound=Callable[..., Any])
DTYPES = ["float32", "float16", "bfloat16"]
FORMS = ["auto", "svd", "input", "output", "shared", "flat", "exact"]

dtype_option = click.option("--dtype", type=click.Choice(DTYPES), help="Of the factors written.")

timeout_option = click.option(
    "--timeout",
    type=float,
    default=60.0,
    show_default=True,
    help="Seconds to wait for others who change the library.",
)

_FOLDING = [
    click.option(
        "--form",
        type=click.Choice(FORMS),
        help="How updates are stored; auto takes the smallest, module by module.",
    ),
    click.option("--rank", type=int, help="Directions kept, instead of a tolerance."),
    click.option("--energy", type=float, help="Share of ‖ΔW‖² kept, instead of a tolerance."),
    click.option("--bits", type=float, help="Bits a number: 32, 16, or an average up to 8."),
    click.option(
        "--memory",
        default="1GiB",
        show_default=True,
        help="Limit for what is held of the adapters at once.",
    ),
    click.option("--device", help="Where the algebra runs, such as cuda. [default: cpu]"),
    timeout_option,
]


_CREW = [
    click.option("--workers", type=click.IntRange(1), help="Processes that work, on this machine."),
    click.option(
        "--ray",
        "executor",
        metavar="ADDRESS",
        callback=lambda ctx, parameter, value: _ray_address(value),
        help="A Ray cluster that works, ray://HOST:PORT, or local for one on this machine.",
    ),
    click.option(
        "--work",
        type=click.Path(),
        metavar="DIR",
        help="Keeps what is done, so that a run that was ended goes on; all workers must see it.",
    ),
]


def crew_options(function: F) -> F:
    """Who does the work, and where what is done is kept: what `crew_of` takes."""
    for option in reversed(_CREW):
        function = option(function)
    return function


def crew_of(options: dict[str, Any]) -> dict[str, Any]:
    """What `crew_options` gave, taken out of the options of a command."""
    return {name: options.pop(name) for name in ("executor", "workers", "work")}


def _ray_address(value: str | None) -> str | None:
    if value is None or value.startswith("ray://"):
        return value
    if value != "local":
        raise click.BadParameter(f"{value!r} is not ray://HOST:PORT, nor local")
    return "ray"


def folding_options(function: F) -> F:
    """The options of a command that folds, but for the bound."""
    for option in reversed([*_FOLDING, *_CREW]):
        function = option(function)
    return function


def torch_dtype(name: str | None) -> torch.dtype | None:
    """The dtype of that name."""
    import torch

    if name is None:
        return None
    dtype: torch.dtype = getattr(torch, name)
    return dtype


@dataclass(frozen=True)
class Places:
    """Where adapters go: to OUT, or each of many to OUT/NAME.

    A name that is no plain folder name gets one made from it, which names.json in OUT lists.

    Attributes:
        paths: {name: folder}, each free or to be replaced. renamed: {folder's name: name}.
    """

    target: Place
    paths: dict[str, Place]
    renamed: dict[str, str]
    known: dict[str, str]

    @classmethod
    def of(
        cls,
        target: str,
        names: Iterable[str],
        sources: Collection[Any],
        *,
        overwrite: bool,
        many: bool = True,
        among: Iterable[str] | None = None,
        kind: Kind | FileKind | None = None,
    ) -> Places:
        """The places of adapters, checked before anything is written.

        Args:
            target: OUT. names: of the adapters.
            sources: paths that OUT must not touch; None among them for what has none.
            overwrite: replace adapters that are there.
            many: whether each goes to a folder in OUT; else there is one, and it goes to OUT.
            among: the names that folders' names are told apart from; those by default.
            kind: what is written; a folder in PEFT's form by default.

        Raises:
            FileError: something is in the way.
        """
        from ..files.remote.place import place_of
        from ..files.replacing import check_apart, check_replaceable
        from ..files.save import ADAPTER

        names = list(names)
        folders = folder_names(names if among is None else among) if many else {}
        out = place_of(target)
        paths = {name: out / folders[name] if many else out for name in names}
        for path in paths.values():
            check_apart(path, sources)
            check_replaceable(path, kind or ADAPTER, overwrite, path)
        renamed = {folders[name]: name for name in names if many and folders[name] != name}
        return cls(out, paths, renamed, known_names(out) if renamed else {})

    def list_names(self, failed: Collection[str] = ()) -> dict[str, str]:
        """Write names.json, where it is needed; {folder's name: name} of what is there.

        Args:
            failed: names that were not written.
        """
        renamed = {folder: name for folder, name in self.renamed.items() if name not in failed}
        if renamed:
            write_names(self.target, self.known, renamed)
        return renamed


def stands_for_many(sources: Collection[str], handles: Collection[Any]) -> bool:
    """Whether what is given is several adapters, though there be but one."""
    from ..files.find import is_library

    return len(handles) > 1 or len(sources) > 1 or any(map(is_library, sources))
