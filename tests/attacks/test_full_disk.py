"""A disk that is full at any moment, whoever writes: the old state or the new one, and one error.

Every call that changes the disk fails once, or fails and so do all later ones that need room; the
writers that are not Python's (safetensors', torch's) leave half of what they write. What is there
afterwards must be what was there before, or all of the new, under its names; nothing else is left.
"""

import contextlib
import errno
import hashlib
import importlib.util
import itertools
import json
import os
import re
import shutil
import sys
import warnings
from functools import partial
from pathlib import Path

import pytest
import safetensors.torch
import torch
from safetensors import SafetensorError

import lorafold as lf
from lorafold.errors import LorafoldError


def module(folder, name):
    full = f"{folder}_{name}"
    if full not in sys.modules:
        path = Path(__file__).parents[1] / folder / f"{name}.py"
        spec = importlib.util.spec_from_file_location(full, path)
        sys.modules[full] = importlib.util.module_from_spec(spec)
        spec.loader.exec_module(sys.modules[full])
    return sys.modules[full]


kill_points, kinds = module("fold", "kill_points"), module("attacks", "kinds")
corpus, runs = module("attacks", "corpus"), module("attacks", "runs")


def opened(folder):
    return lf.Library.open(folder / "lib")


def line(*words):
    """A command line, whose error is raised as that of a call."""

    def ran(folder):
        done = corpus.run([str(folder / w[1:]) if w[0] == "@" else w for w in words])
        if done.exit_code:
            said = [text for text in done.stderr.splitlines() if not text.startswith("warning: ")]
            assert len(said) == 1, done.stderr
            assert said[0].startswith("error: "), said
            assert not said[0].startswith("error: unexpected"), said
            raise LorafoldError(said[0])

    return ran


def begin(folder, rank=2):
    """What `lorafold train` writes first."""
    out = runs.Folder(str(folder))
    with out.claimed():
        out.begin({"recipe": {"rank": rank}, "digest": "d"})


def finish(folder):
    """And last."""
    adapters, cards = {"sql": kinds.adapter(5), "a/b": kinds.adapter(6)}, {"sql": "# S", "a/b": "#"}
    report = {"adapters": {"sql": {"folder": "sql"}}}
    runs.Folder(str(folder)).finish(adapters, cards, report, "template", True)


def trainer(folder, **options):
    """A trainer on a tiny model."""
    transformers = pytest.importorskip("transformers")
    live = lf.attach(runs.language_model(), lf.LoRA(rank=1, targets=["q_proj"]))
    given = {"max_steps": 1, "report_to": [], "use_cpu": True, "disable_tqdm": True}
    given |= {"save_strategy": "no", "dataloader_pin_memory": False, **options}
    args = transformers.TrainingArguments(str(folder / "out"), **given)
    rows = [{"input_ids": [1, 2, 3], "labels": [1, 2, 3]}] * 8
    return lf.train.Trainer(live.model, args, train_dataset=rows)


def training(folder):
    return trainer(folder, save_strategy="steps", save_steps=1, save_total_limit=1).train


def by_callback(folder):
    made = trainer(folder)
    made.state.global_step = 1
    callback = lf.train.AdapterCallback(made.live)
    return lambda: callback.on_save(made.args, made.state, made.control)


ROLES = {f"model.layers.0.self_attn.{w}_proj": (6, 6) for w in "qv"}
TRAINING = {  # what is to be called, when all before that is made
    "train": training,
    "train over": lambda f: training(f / "trained"),
    "save model": lambda f: trainer(f).save_model,
    "save model over": lambda f: trainer(f / "trained").save_model,
    "callback": by_callback,
    "steering": lambda f: partial(runs.steering.save_run, runs.steering_run(), f / "out"),
    "steering over": lambda f: partial(runs.steering.save_run, runs.steering_run(), f / "steered"),
}
WRITERS = {
    "save": lambda f: lf.save(kinds.adapter(), f / "out"),
    "save over": lambda f: lf.save(kinds.adapter(7), f / "a", overwrite=True),
    "portable": lambda f: lf.save(kinds.adapter(shapes=ROLES), f / "out", format="portable"),
    "fold": lambda f: lf.fold({"a": kinds.adapter()}, f / "out").close(),
    "add": lambda f: opened(f).add(kinds.adapter(9), "new"),
    "remove": lambda f: opened(f).remove("a"),
    "refold": lambda f: opened(f).refold(tolerance=0.3),
    "library": lambda f: opened(f).save(f / "out"),
    "repair": lambda f: lf.fold.repair(f / "cut"),
    "repair a manifest": lambda f: lf.fold.repair(f / "headless"),
    "state": lambda f: kinds.attached()[1].save(f / "out"),
    "state over": lambda f: kinds.attached()[1].save(f / "a", overwrite=True),
    "centroids": lambda f: lf.CentroidRouter.fit(kinds.TEXTS, "ngrams").save(f / "out"),
    "learned router": lambda f: lf.LearnedRouter(("a", "b"), 8, 4).save(f / "out"),
    "arrow router": lambda f: lf.ArrowRouter({"a": kinds.adapter()}).save(f / "out"),
    "alignment": lambda f: kinds.make_alignment(f / "out" / "deep"),
    "merge into": lambda f: lf.merge_into_weights(f / "base", kinds.adapter(), f / "out"),
    "merge into shards": lambda f: lf.merge_into_weights(
        f / "shards" / "base", kinds.adapter(), f / "out", dtype=torch.float16
    ),
    "report": lambda f: lf.report({"a": f / "a"}, f / "out.html"),
    "report over": lambda f: lf.report({"a": f / "a"}, f / "old.html", overwrite=True),
    "run begins": lambda f: begin(f / "out"),
    "run begins over": lambda f: begin(f / "begun"),
    "run ends": lambda f: finish(f / "begun"),
    "controller": lambda f: kinds.make_controller(f / "a"),
    "lorafold unfold": line("unfold", "@odd", "-o", "@out"),
    "lorafold unfold one": line("unfold", "@lib", "a", "-o", "@out"),
    "lorafold resize": line("resize", "@a", "@out", "--rank", "1"),
    "lorafold merge": line("merge", "@a", "@b", "-o", "@out"),
    "lorafold extract": line("extract", "@base", "@tuned", "-o", "@out", "--rank", "1"),
    "lorafold fold": line("fold", "@a", "@b", "-o", "@out"),
    "lorafold route fit": line("route", "fit", "@sql.txt", "@law.txt", "-o", "@out"),
}
MANY = ("lorafold unfold",)  # adapter by adapter, each of them whole
SLOW = ("train", "train over", "report", "report over")
# What holds times, or where it was written.
DATED = ("train", "train over", "save model", "save model over", "lorafold extract")


@pytest.fixture(scope="module")
def start(tmp_path_factory):
    folder = tmp_path_factory.mktemp("start")
    kinds.make_library(folder)
    kinds.make_base(folder)
    (folder / "shards").mkdir()
    kinds.make_shards(folder / "shards")
    lf.save(kinds.adapter(3), folder / "b")
    lf.merge_into_weights(folder / "base", kinds.adapter(4), folder / "tuned")
    with lf.fold({"a/b": kinds.adapter(0), "c d": kinds.adapter(1)}) as lib:
        lib.save(folder / "odd")
    shard = next((folder / "lib").glob("*.safetensors")).name
    for name, lost in (("cut", shard), ("headless", "library.json")):
        shutil.copytree(folder / "lib", folder / name)
        (folder / name / lost).unlink()
    for name, texts in kinds.TEXTS.items():
        (folder / f"{name}.txt").write_text("\n".join(texts))
    begin(folder / "begun", 3)
    (folder / "begun" / "checkpoints" / "notes").write_text("of it")
    (folder / "old.html").write_text("<html>old</html>")
    return folder


@pytest.fixture
def ready(start, tmp_path, request):
    """A folder with all that the writer needs, made anew each time it is called."""
    writer, numbers = request.getfixturevalue("writer"), itertools.count()
    if writer in TRAINING:
        pytest.importorskip("transformers")
    if "report" in writer:
        pytest.importorskip("plotly")
    made = start
    if writer.endswith(" over") and writer in TRAINING:
        made = shutil.copytree(start, tmp_path / "start")
        if writer == "steering over":
            other = runs.Run(runs.language_model(), runs.Letters(), *runs.steering_asked())
            runs.steering.save_run(other, made / "steered")
        else:
            training(made / "trained")()
            trainer(made / "trained").save_model()

    def copy():
        here = shutil.copytree(made, tmp_path / str(next(numbers)))
        if writer in TRAINING:
            (here / "out").mkdir()  # which transformers makes at once
        return here

    return copy


HIDDEN = re.compile(r"(.*/)?\.([^/]*\.[0-9a-f]{16}\.(tmp|old)|beside-[^/]*|[^/]*\.before)(/.*)?")


def held(folder):
    """{path: what it holds} of all files and libraries, and of what else is there."""
    found, libraries = {}, [p.parent for p in folder.rglob("library.json")]
    for path in sorted(folder.rglob("*")):
        name = path.relative_to(folder).as_posix()
        if path in libraries:  # whose files that nobody names, and second copy, are the next one's
            found[f"{name}/"] = in_library(path)
        elif path.parent in libraries:
            continue
        elif path.is_file():
            found[name] = told_of(path)
        elif not any(path.iterdir()):
            found[f"{name}/"] = ""
    return found


def told_of(path):
    """A checksum; of safetensors whatever order the header is in."""
    data = path.read_bytes()
    with contextlib.suppress(ValueError):
        if path.suffix == ".safetensors":
            length = int.from_bytes(data[:8], "little")
            head = json.dumps(json.loads(data[8 : 8 + length]), sort_keys=True)
            data = head.encode() + data[8 + length :]
    return hashlib.sha256(data).hexdigest()


def in_library(path):
    found = {}
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        with lf.Library.open(path) as lib:
            for name in lib:
                with contextlib.suppress(LorafoldError):
                    found[name] = kinds.told_of(lib[name]), lib.error(name)
            damaged = bool(lib.verify(strict=False).damage)
    return {**found, "damaged": damaged}


ROOM = {*kill_points.CHANGES} - {"unlink", "remove", "rmdir", "rename", "replace", "renames"}


@contextlib.contextmanager
def full(fatal, lasting):
    """A disk without room at the call of that number, or from it on; how many calls there were."""
    count = [0]

    def is_full(name):
        count[0] += 1
        needs = name in ROOM or name == "open"
        return fatal is not None and (count[0] == fatal or (lasting and needs and count[0] > fatal))

    def before(name, function, args):
        if is_full(name):
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    write, save = torch.save, safetensors.torch.save_file

    def save_file(tensors, path, metadata=None):
        if is_full("write"):
            data = safetensors.torch.save(tensors, metadata)
            half(path, data[: len(data) // 2])
            raise SafetensorError("I/O error: No space left on device (os error 28)")
        save(tensors, path, metadata=metadata)

    def torch_save(value, path, *more, **own):
        if isinstance(path, str | os.PathLike) and is_full("write"):
            half(path, b"PK")
            raise RuntimeError("PytorchStreamWriter failed writing file data/0: file write failed")
        write(value, path, *more, **own)

    plain_open, plain_write, plain_close = os.open, os.write, os.close

    def half(path, data):
        number = plain_open(path, os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
        plain_write(number, data)
        plain_close(number)

    with pytest.MonkeyPatch.context() as patch, kill_points._intercept(before):
        patch.setattr(safetensors.torch, "save_file", save_file)
        patch.setattr(torch, "save", torch_save)
        yield count


def written(writer, folder, fatal=None, lasting=False):
    """(calls, what was raised) of a run of a writer on a disk that is full at a moment."""
    told = None
    write = TRAINING[writer](folder) if writer in TRAINING else partial(WRITERS[writer], folder)
    with warnings.catch_warnings(), full(fatal, lasting) as count:
        warnings.simplefilter("ignore")
        try:
            write()
        except LorafoldError as e:
            told = str(e)
    return count[0], told


@pytest.mark.parametrize("writer", [*WRITERS, *TRAINING])
def test_the_old_state_or_the_new_one_and_one_error(writer, ready, monkeypatch):
    monkeypatch.setattr(os, "fsync", lambda _: None)
    kinds.attached(), kinds.of_rank_4()
    here = ready()
    before = held(here)
    total, told = written(writer, here)
    assert told is None
    after = held(here)
    assert after != before
    failed = 0
    for k, n in enumerate(moments(total, 3 if writer in SLOW else 5)):
        lasting = bool(k % 2)
        here = ready()
        _, told = written(writer, here, n, lasting)
        found = held(here)
        shutil.rmtree(here)
        failed += told is not None
        what = f"{writer}, call {n} of {total}{' and on' * lasting}: {told}"
        if told is not None:
            assert "No space left" in told or "PytorchStreamWriter failed" in told, what
            assert str(here) in told or "in memory" in told, what
        # The old state may lie aside where the new one is there, but may not be on the disk.
        seen = {name: value for name, value in found.items() if not HIDDEN.fullmatch(name)}
        if not alike(writer, seen, after):
            assert told is not None, (what, changed(found, after))
            assert found == before or in_part(writer, found, before, after), (
                *(what, changed(found, before)),
            )
    assert failed


def moments(total, most):
    """Some calls: the first ones, the last ones, and others between."""
    first, last = range(1, most), range(max(1, total - most), total + 1)
    return sorted(
        {*first, *last, *range(1, total + 1, max(1, total // most))} & {*range(total + 1)}
    )


def alike(writer, found, after):
    """Whether all of the new state is there, and nothing else."""
    if writer in DATED:
        return found.keys() == after.keys()
    return found == after


def in_part(writer, found, before, after):
    """Whether, of many adapters, some are there and whole."""
    new = {name: value for name, value in found.items() if name not in before}
    folders = {os.path.dirname(name) for name in new}
    whole = {name: v for name, v in after.items() if os.path.dirname(name) in folders}
    return writer in MANY and new == whole and {**found, **before} == found


def changed(a, b):
    return sorted(name for name in {**a, **b} if a.get(name) != b.get(name))
