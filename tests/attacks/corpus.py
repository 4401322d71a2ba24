"""Runs the corpus: so many mutations of each kind of file, each read and judged."""

import contextlib
import importlib.util
import random
import shutil
import sys
from collections import Counter
from pathlib import Path


def beside(name):
    """A module that lies beside; test folders are not on the import path."""
    full = f"attacks_{name}"
    if full not in sys.modules:
        spec = importlib.util.spec_from_file_location(full, Path(__file__).with_name(f"{name}.py"))
        sys.modules[full] = importlib.util.module_from_spec(spec)
        spec.loader.exec_module(sys.modules[full])
    return sys.modules[full]


kinds, judge, mutations = beside("kinds"), beside("judge"), beside("mutations")
KINDS = {
    name: kind
    for file in ("kinds", "formats", "images", "runs")
    for name, kind in beside(file).KINDS.items()
}


def attacked(name, count, folder, seed=0, first=0, lines=8, more=True):
    """Mutate files of a kind, read them, and judge.

    Args:
        name: of the kind. count: mutations. folder: an empty one, to work in.
        seed, first: which mutations; number n of a seed is always the same one.
        lines: every so many is read by a command line as well; more: also by slow ones.

    Returns:
        (how often each verdict, [(number, what was done, verdict)] of the faults).
    """
    kind = KINDS[name]
    every = kind.lines + kind.more * more
    start, here, out = folder / "start", folder / "here", folder / "out"
    start.mkdir()
    kind.make(start)
    files = kinds.library_files(start) if name == "library" else kind.files
    before = kind.load(start)

    def says(found, folder=here):
        if kind.says is None:
            return {key: before.get(key) for key in found}
        return kind.says(folder)

    # Nothing is found where nothing was done: the other reader and this one agree.
    assert judge.judged(lambda: before, lambda found: says(found, start)).word == "right", name
    for module in kind.imports if every else ():  # which takes its time once
        with contextlib.suppress(ImportError):
            importlib.import_module(module)
    for line in every:  # and so does what they import
        mutations.copied(start, here)
        judge.clean(out)
        ran = run(words_of(line, here, out))
        assert ran.exit_code in (0, 1, 2), (line, ran.stderr)
    counts, faults = Counter(), []
    for n in range(first, first + count):
        chance = random.Random(f"{seed} {name} {n}")
        mutations.copied(start, here)
        did = mutations.mutated(here, files, chance)
        verdicts = [("load", judge.judged(lambda: kind.load(here), says))]
        if every and n % lines == 0:
            line = chance.choice(every)
            judge.clean(out)
            verdicts.append((line, judge.told(run, words_of(line, here, out))))
        for door, verdict in verdicts:
            counts[verdict.word] += 1
            if verdict.fault:
                faults.append((n, f"{did} | {door}", verdict))
    shutil.rmtree(folder, ignore_errors=True)
    return counts, faults


def words_of(line, here, out):
    """The words of a command line."""
    return line.replace("FOLDER", str(here)).replace("OUT", str(out)).split(" ")


def run(arguments):
    """A command line in this process."""
    from click.testing import CliRunner

    from lorafold.cli import main

    return CliRunner().invoke(main, arguments, env={"COLUMNS": "100"})
