"""A disk that is full at any moment: an error of lorafold's that names a path, whoever writes."""

import errno
import importlib.util
import itertools
import os
import shutil
import warnings
from pathlib import Path

import pytest

import lorafold as lf
from lorafold.errors import LorafoldError


def module(folder, name):
    path = Path(__file__).parents[1] / folder / f"{name}.py"
    spec = importlib.util.spec_from_file_location(f"{folder}_{name}", path)
    found = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(found)
    return found


kill_points, kinds = module("fold", "kill_points"), module("attacks", "kinds")


def opened(folder):
    return lf.Library.open(folder / "lib")


WRITERS = {
    "save": lambda f: lf.save(kinds.adapter(), f / "out"),
    "save over": lambda f: lf.save(kinds.adapter(), f / "a", overwrite=True),
    "portable": lambda f: kinds.make_portable(f / "made"),
    "fold": lambda f: lf.fold({"a": kinds.adapter()}, f / "out").close(),
    "add": lambda f: opened(f).add(kinds.adapter(9), "new"),
    "remove": lambda f: opened(f).remove("a"),
    "refold": lambda f: opened(f).refold(tolerance=0.3),
    "library": lambda f: opened(f).save(f / "out"),
    "repair": lambda f: lf.fold.repair(f / "lib"),
    "state": lambda f: kinds.attached()[1].save(f / "out"),
    "routers": lambda f: kinds.make_routers(f / "made"),
    "alignment": lambda f: kinds.make_alignment(f / "made" / "deep"),
    "merge into": lambda f: lf.merge_into_weights(f / "base", kinds.adapter(), f / "out"),
}


@pytest.fixture(scope="module")
def start(tmp_path_factory):
    folder = tmp_path_factory.mktemp("start")
    kinds.make_library(folder)
    kinds.make_base(folder)
    (folder / "made").mkdir()
    (folder / "made" / "deep").mkdir()
    return folder


@pytest.mark.parametrize("writer", WRITERS)
def test_a_full_disk_is_told_as_ours(writer, start, tmp_path, monkeypatch):
    kinds.attached()
    monkeypatch.setattr(os, "fsync", lambda _: None)

    def calls(fatal):
        """How many calls that change the disk a run makes; and what it raised at the fatal one."""
        here, count = tmp_path / str(fatal), itertools.count(1)
        shutil.copytree(start, here)
        if writer == "repair":
            (here / "lib" / "library.json").write_bytes(b"{")

        def before(name, function, args):
            if next(count) == fatal:
                raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

        undo, told = kill_points._intercept(before), None
        try:
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")
                WRITERS[writer](here)
        except LorafoldError as e:
            told = str(e)
        finally:
            undo.close()
            shutil.rmtree(here)
        return next(count) - 1, told

    total, _ = calls(None)
    first, last, step = range(1, 8), range(max(1, total - 6), total + 1), max(1, total // 6)
    moments = {n for n in (*first, *last, *range(1, total, step)) if n <= total}
    told = [text for n in sorted(moments) if (text := calls(n)[1]) is not None]
    places = str(tmp_path), "in memory"
    assert told
    assert all("No space left" in text and any(p in text for p in places) for text in told), told
