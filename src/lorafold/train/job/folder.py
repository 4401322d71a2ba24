"""Where a run writes: OUT/checkpoints while it goes on, and the adapter in OUT when it is over.

What was at OUT before stays until the new adapter takes its place in one rename. Several adapters
are OUT/NAME each. `checkpoints/recipe.json` says how to go on.
"""

from __future__ import annotations

import contextlib
import os
import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from ...adapter import ORIGIN, Adapter
from ...collection.folders import folder_names, write_names
from ...errors import FileError, MismatchError
from ...files.atomic import new_directory, replace_file
from ...files.config import CHECKPOINTS, RECIPE_NAME, as_json, json_object, read_text
from ...files.disk.sealed import check_seal, with_seal
from ...files.remote.place import local
from ...files.replacing import Kind, check_apart, check_replaceable
from ...files.save import ADAPTER, peft_form, write_form
from ..checkpoints import check_sealed, last_checkpoint

REPORT, TEMPLATE_FILE = "training.json", "chat_template.jinja"
_CHECKPOINTS = Kind(
    "the checkpoints of a training run",
    lambda path: os.path.isfile(path / RECIPE_NAME),
    re.compile(re.escape(RECIPE_NAME)),
    re.compile(r"\.?checkpoint-\d+(\.before)?"),
)


class Folder:
    """The folder of one run.

    Args:
        path: OUT.
    """

    def __init__(self, path: str) -> None:
        self.path, self.checkpoints = local(path), local(path) / CHECKPOINTS

    @property
    def last(self) -> Path | None:
        """The last whole checkpoint."""
        return last_checkpoint(self.checkpoints)

    def recipe(self) -> dict[str, Any]:
        """How the run there was begun: `recipe`, `digest` and more, as `begin` was given them.

        Raises:
            FileError: no run is there that can be gone on with, or it is not what was written.
        """
        path, last = self.checkpoints / RECIPE_NAME, self.last
        if not os.path.isfile(path) or last is None:
            raise FileError(f"{self.path}: there is no checkpoint of a training run to resume from")
        found = json_object(read_text(path), path)
        if not isinstance(found.get("recipe"), dict):
            raise FileError(f"{path} is no recipe of a run")
        check_seal(path, found, {})
        check_sealed(last)
        return found

    def check(self, sources: Iterable[str | Path], overwrite: bool) -> None:
        """Check that a run may begin.

        Raises:
            FileError: something is there, or one of the sources is in the way.
        """
        check_apart(self.path, sources)
        unfinished = _is_run(self.path) and not os.path.isfile(self.path / REPORT)
        if unfinished and not overwrite:
            go_on = "resume=True to go on, or " if self.last is not None else ""
            raise FileError(
                f"{self.path} holds a training run that is not over: give {go_on}overwrite=True to "
                "begin anew"
            )
        check_replaceable(self.path, self._kind(()), overwrite, self.path)

    @contextlib.contextmanager
    def claimed(self) -> Iterator[None]:
        """Leave no empty folder behind where what is done within fails."""
        try:
            yield
        except BaseException:
            for path in (self.checkpoints, self.path):
                with contextlib.suppress(OSError):
                    path.rmdir()
            raise

    def begin(self, recipe: Mapping[str, Any]) -> None:
        """Make it ready for checkpoints of a new run; what an earlier one left of them goes."""
        with new_directory(self.checkpoints, _CHECKPOINTS, overwrite=True) as staging:
            (staging / RECIPE_NAME).write_text(_recipe_text(recipe), encoding="utf-8")

    def tell(self, recipe: Mapping[str, Any]) -> None:
        """Write how the run is to go on."""
        replace_file(self.checkpoints / RECIPE_NAME, _recipe_text(recipe).encode())

    def finish(
        self,
        adapters: Mapping[str, Adapter],
        cards: Mapping[str, str],
        report: Mapping[str, Any],
        template: str | None,
        apart: bool,
    ) -> dict[str, str]:
        """Put the adapters in their place, all at once or not at all.

        Args:
            adapters, cards: by name. report: for training.json. template: a chat template to go
                with them. apart: each in a folder of its own.

        Returns:
            {name: where it is}.
        """
        places = folders_of(adapters) if apart else dict.fromkeys(adapters, "")
        with new_directory(self.path, self._kind(places.values()), overwrite=True) as staging:
            for name, adapter in adapters.items():
                into = staging / places[name]
                into.mkdir(exist_ok=True)
                told = {**adapter.config, "task_type": "CAUSAL_LM", ORIGIN: {"card": cards[name]}}
                write_form(into, *peft_form(replace(adapter, config=told)))
                if template is not None:
                    (into / TEMPLATE_FILE).write_text(template, encoding="utf-8")
            renamed = {place: name for name, place in places.items() if place not in ("", name)}
            if renamed:
                write_names(staging, {}, renamed)
            (staging / REPORT).write_text(as_json(report), encoding="utf-8")
        return {name: str(self.path / place) for name, place in places.items()}

    def _kind(self, folders: Iterable[str]) -> Kind:
        """What is written here, with the folders of the run that was here before."""
        old: list[str] = []
        with contextlib.suppress(FileError):  # somebody else's file of that name
            if os.path.isfile(self.path / REPORT):
                old = _told_folders(json_object(read_text(self.path / REPORT), REPORT))
        names = "|".join(map(re.escape, filter(None, [*folders, *old])))
        files = rf"{ADAPTER.files.pattern}|training\.json|names\.json|chat_template\.jinja"
        return Kind(
            "an adapter",
            lambda path: ADAPTER.known(path) or _is_run(path),
            re.compile(files),
            re.compile(names) if names else None,
            ADAPTER.marked,
        )


def _recipe_text(recipe: Mapping[str, Any]) -> str:
    return as_json(with_seal(recipe, {}))


def _told_folders(report: Mapping[str, Any]) -> list[str]:
    """The folders of adapters that a training.json tells of; of another's, none."""
    adapters = report.get("adapters")
    told = adapters.values() if isinstance(adapters, dict) else ()
    found = [a.get("folder") for a in told if isinstance(a, dict)]
    return [name for name in found if isinstance(name, str)]


def folders_of(names: Iterable[str]) -> dict[str, str]:
    """{name: its folder in OUT}.

    Raises:
        MismatchError: one that would lie where the checkpoints do.
    """
    found = folder_names(names)
    for name, place in found.items():
        if place.lower() == CHECKPOINTS:
            raise MismatchError(f"an adapter can't be called {name!r}: checkpoints lie there")
    return found


def _is_run(path: Path) -> bool:
    return os.path.isfile(path / REPORT) or os.path.isfile(path / CHECKPOINTS / RECIPE_NAME)


def relative(names: Sequence[str], apart: bool) -> dict[str, str]:
    """{name: its folder within OUT}, "" where it lies in OUT itself."""
    return folders_of(names) if apart else dict.fromkeys(names, "")
