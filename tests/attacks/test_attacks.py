"""A small part of the corpus: mutated files give what they say, or an error of one line.

`benchmarks/attacks.py` runs the large one.
"""

import importlib.util
import mmap
from pathlib import Path

import pytest

import lorafold as lf
from lorafold.errors import FileError, LorafoldError, UnknownNameError

spec = importlib.util.spec_from_file_location(
    "attacks_corpus", Path(__file__).with_name("corpus.py")
)
corpus = importlib.util.module_from_spec(spec)
spec.loader.exec_module(corpus)
judge = corpus.judge


NEEDS = {"recipe": ["yaml"], "config": ["yaml"], "parquet": ["pyarrow"]}
NEEDS |= {"steering": ["transformers"], "gguf": ["gguf"]}


@pytest.mark.parametrize("kind", corpus.KINDS)
def test_a_mutated_file_is_read_as_it_is_or_refused(kind, tmp_path):
    for module in NEEDS.get(kind, ()):
        pytest.importorskip(module)
    counts, faults = corpus.attacked(kind, 40, tmp_path, lines=20, more=False)
    assert not faults
    assert counts["refused"] > 5


# The judge bites


def refusing(text):
    def load():
        raise FileError(text)

    return load


def test_the_judge_knows_right_from_wrong():
    def foreign():
        raise KeyError("x")

    def unreadable(_):
        raise ValueError("no file")

    assert judge.judged(lambda: {"a": 1}, lambda _: {"a": 1}).word == "right"
    assert judge.judged(refusing("no"), lambda _: {"a": 1}).word == "refused"
    wrong = judge.judged(lambda: {"a": 1}, lambda _: {"a": 2})
    assert (wrong.word, wrong.fault) == ("wrong", True)
    assert judge.judged(lambda: {"a": 1}, unreadable).word == "wrong"
    assert judge.judged(foreign, lambda _: 1).reason == "KeyError: 'x'"


def test_the_judge_stops_what_hangs_and_sees_what_grows(monkeypatch):
    def hangs():
        while True:
            pass

    def grows():
        with mmap.mmap(-1, 1 << 26) as fresh:  # what is freed in the process is not its memory
            return fresh.write(bytes(1 << 20) * 64) * 0

    monkeypatch.setattr(judge, "SECONDS", 0.05)
    assert judge.judged(hangs, lambda _: None).word == "hang"
    monkeypatch.setattr(judge, "SECONDS", 2)
    assert judge.judged(grows, lambda found: found).word == "right"
    monkeypatch.setattr(judge, "MEMORY", 1 << 24)
    if Path("/proc/self/clear_refs").exists():
        assert judge.judged(grows, lambda found: found).word == "memory"


def test_the_corpus_is_the_same_again(tmp_path):
    def files(seed):
        start, here = tmp_path / "start", tmp_path / "here"
        corpus.mutations.copied(tmp_path / "made", start)
        told = []
        for n in range(30):
            chance = corpus.random.Random(f"{seed} {n}")
            corpus.mutations.copied(start, here)
            did = corpus.mutations.mutated(here, corpus.KINDS["peft"].files, chance)
            at = [here / name for name in corpus.KINDS["peft"].files]
            told.append((did, [p.read_bytes()[:9999] if p.is_file() else None for p in at]))
        return told

    (tmp_path / "made").mkdir()
    corpus.KINDS["peft"].make(tmp_path / "made")
    assert files(1) == files(1) != files(2)


# Messages


def test_a_message_is_one_line_that_can_be_read():
    e = FileError("a\nb\x1b[31m\ud800: " + "x" * 100_000 + " the end")
    assert str(e).startswith("a b\\x1b[31m\\ud800: xxx")
    assert str(e).endswith("x the end")
    assert len(str(e)) < 2_000
    assert str(UnknownNameError("no\nname")) == "no name"
    assert str(LorafoldError("żółw 🐢 ΔW")) == "żółw 🐢 ΔW"
    with pytest.raises(FileError, match=r"no such file or directory: 'x\\ny'$"):
        lf.load("x\ny")
