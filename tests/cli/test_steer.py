"""`steer` on the packaged base: what is written, told and refused; stopping and going on."""

import json
import signal
from pathlib import Path

import pytest

import lorafold as lf
from lorafold.train.steering import steer as module
from lorafold.train.steering.sweep import Scales

pytest.importorskip("transformers")
pytestmark = pytest.mark.filterwarnings("ignore")

QUICK = ("--steps", 4, "--every", 2, "--batch", 4, "--rank", 2, "--target", "o_proj", "--tokens", 4)


@pytest.fixture
def pairs(tmp_path, monkeypatch):
    """A file of pairs in the current folder: a word is put in brackets, or said twice."""
    monkeypatch.chdir(tmp_path)
    rows = [
        {"prompt": f"{w} -> ", "chosen": f"({w})", "rejected": f"{w} {w}"}
        for w in ("horse", "click", "long", "groups", "polling", "says", "full", "allow")
    ]
    Path("pairs.jsonl").write_text("\n".join(map(json.dumps, rows)) + "\n")
    return "pairs.jsonl"


def test_a_dial_is_written_with_what_it_does(pairs, cli):
    Path("other.txt").write_text("def items(self):\n    return list(self)\n")
    ran = cli("steer", "demo", "--pairs", pairs, "-o", "dial", "--texts", "other.txt", *QUICK)
    assert (ran.code, ran.err) == (0, "")
    assert "NLL of 2 other texts" in ran.out
    assert "c = 1" in ran.out
    found = json.loads(Path("dial/steering.json").read_text())
    points = found["sweep"]["points"]
    assert [p["c"] for p in points] == [-2, -1.5, -1, -0.5, 0, 0.5, 1, 1.5, 2]
    assert points[4]["kl"] == points[4]["margin"] == 0
    assert points[6]["margin"] > 0 > points[2]["margin"]
    assert found["pairs"] == {"trained": 6, "held_out": 2, "cut": 0, "left_out": 0}
    card = Path("dial/README.md").read_text()
    assert 'base_model: "lorafold/demo-base"' in card
    assert card.count("\n| ") == 11
    adapter = lf.load("dial")
    assert adapter.rank == found["rank"] == 2
    assert adapter.base_model == "lorafold/demo-base"
    assert sorted(p.name for p in Path("dial").iterdir()) == [
        "README.md", "adapter_config.json", "adapter_model.safetensors", "steering.json",
    ]  # fmt: skip
    # What replaces it takes card and figures away.
    assert cli("resize", "dial", "small", "--rank", 1).code == 0
    assert cli("resize", "small", "dial", "--rank", 1, "--overwrite").code == 0
    assert not Path("dial/steering.json").exists()


def test_rounds_in_json(pairs, cli):
    own = ("--rounds", 2, "--rank", 1, "--lambda", 0.1, "--top", 20, "--reference", "kept")
    ran = cli("steer", "demo", "--pairs", pairs, "-o", "dial", "--json", *QUICK, *own)
    assert ran.code == 0
    found = ran.json
    assert [r["rank"] for r in found["rounds"]] == [2, 1]
    assert found["rank"] == sum(r["rank"] for r in found["rounds"] if r["best"])
    assert found["options"]["barrier"]["top"] == 20
    assert found["path"] == "dial"


def test_singular_values_alone(pairs, cli):
    own = ("--kind", "pissa", "--rank", 8)
    ran = cli(
        "steer", "demo", "--pairs", pairs, "-o", "dial", "--json", *QUICK[:6], *QUICK[8:], *own
    )
    assert ran.code == 0
    assert lf.load("dial").rank == 8


@pytest.mark.parametrize(
    ("text", "says"),
    [
        ('{"prompt": "a", "chosen": "b"}', "pairs.jsonl: line 1: it lacks 'rejected'"),
        ("nonsense", "pairs.jsonl: line 1: not valid JSON"),
        ('{"prompt": "a", "chosen": "b", "rejected": "b"}', "line 1: chosen and rejected are the"),
        ("", "pairs.jsonl: there are no pairs in it"),
        ('{"prompt": "a", "chosen": "b", "rejected": "c"}', "the pairs have one prompt only"),
    ],
)
def test_bad_pairs(pairs, cli, text, says):
    Path(pairs).write_text(text)
    ran = cli("steer", "demo", "--pairs", pairs, "-o", "dial")
    assert ran.code == 2
    assert says in ran.err
    assert ran.err.count("\n") == 1
    assert not Path("dial").exists()


def test_bad_places_and_options(pairs, cli):
    Path("dial").mkdir()
    Path("dial/thesis.txt").write_text("x")
    for args, says in (
        (("demo", "-o", "dial"), "dial exists already"),
        (("demo", "-o", "dial", "--overwrite"), "it is not an adapter"),
        (("nowhere", "-o", "out"), "nowhere is not a base"),
        (("demo", "-o", "out", "--lr", 0), "--lr must be a positive number"),
        (("demo", "-o", "out", "--lambda", -1), "--lambda must be a number"),
        (("demo", "-o", "out", "--aggregate", "median"), "--aggregate must be one of"),
        (("demo", "-o", "out", "--resume"), "out.unfinished: there is no run to go on with"),
        (("demo", "-o", "out", "--target", "nothing"), "nothing"),
        (("demo", "-o", "out", "--rounds", 3, "--rank", 1, "--rank", 2), "--rank is given 2 times"),
    ):
        ran = cli("steer", *args, "--pairs", pairs)
        assert ran.code == 2, args
        assert says in ran.err
        assert ran.err.count("\n") == 1
    assert not Path("out").exists()
    assert Path("dial/thesis.txt").read_text() == "x"


@pytest.fixture
def ctrl_c():
    """It interrupts, also where a shell runs the tests in the background and has it ignored."""
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    yield
    signal.signal(signal.SIGINT, before)


@pytest.mark.usefixtures("ctrl_c")
def test_stopped_by_ctrl_c_it_keeps_what_there_is_and_goes_on(pairs, cli, monkeypatch):
    backward, calls = module.steer_backward, []

    def interrupted(*args, **kwargs):
        backward(*args, **kwargs)
        calls.append(1)
        if len(calls) == 3:
            signal.raise_signal(signal.SIGINT)

    monkeypatch.setattr(module, "steer_backward", interrupted)
    args = ("steer", "demo", "--pairs", pairs, "-o", "dial", *QUICK)
    ran = cli(*args)
    assert ran.code == 2
    assert "interrupted in round 1, step 3" in ran.err
    assert "the same command with --resume goes on" in ran.err
    assert signal.getsignal(signal.SIGINT) is signal.default_int_handler
    assert not Path("dial").exists()
    assert cli(*args, "--resume", "--json").json["rounds"][0]["steps"] == 4
    assert len(calls) == 4  # one more step was left
    assert not Path("dial.unfinished").exists()


def test_stopped_while_it_is_measured(pairs, cli, monkeypatch):
    point = Scales.point

    def interrupted(self, model, at, c):
        if c == 0:
            raise KeyboardInterrupt
        return point(self, model, at, c)

    args = ("steer", "demo", "--pairs", pairs, "-o", "dial", *QUICK)
    with monkeypatch.context() as patched:
        patched.setattr(Scales, "point", interrupted)
        ran = cli(*args)
    assert ran.code == 2
    assert "interrupted while measuring; what was trained is kept in dial.unfinished" in ran.err
    assert not Path("dial").exists()
    assert cli(*args, "--resume").code == 0
    assert Path("dial/steering.json").exists()
    assert not Path("dial.unfinished").exists()
