"""Folding by what matters: a score decides how much error an adapter may have."""

import math

import pytest
import torch

import lorafold as lf
from lorafold.errors import FileError, MismatchError
from lorafold.fold import retention
from lorafold.fold.retention import LOOSEST, TIGHTEST

SHAPES = {"q": (48, 32), "v": (32, 64)}


def dense_error(a, b):
    def dense(u):
        return u.scale * (u.B.double() @ u.A.double())

    lost = sum(float((dense(u) - dense(b[p])).square().sum()) for p, u in a.modules.items())
    return (lost / sum(float(dense(u).square().sum()) for u in a.modules.values())) ** 0.5


class Task:
    """score = base + lift · (1 − steepness · relative distance); every run is remembered."""

    def __init__(self, adapters, *, base=0.0, lift=1.0, steepness=None):
        self.adapters, self.base, self.lift = adapters, base, lift
        self.steepness = steepness or dict.fromkeys(adapters, 1.0)
        self.runs = {name: [] for name in adapters}

    def __call__(self, name, adapter):
        error = None if adapter is None else dense_error(self.adapters[name], adapter)
        self.runs[name].append(error)
        if adapter is None:
            return self.base
        return self.base + self.lift * (1 - self.steepness[name] * error)

    def retention(self, name, adapter):
        return 1 - self.steepness[name] * dense_error(self.adapters[name], adapter)


@pytest.fixture(scope="module")
def adapters(make_adapter):
    return {f"a{i}": make_adapter(SHAPES, 4, seed=i) for i in range(3)}


@pytest.mark.parametrize("share", [0.6, 0.9, 0.99])
@pytest.mark.parametrize("base", [0.0, -5.0, 100.0])
def test_the_share_of_the_lift_is_kept_at_the_loosest_tolerance(adapters, share, base):
    task = Task(adapters, base=base, steepness={"a0": 1.0, "a1": 0.4, "a2": 3.0})
    lib = lf.fold(adapters, retention=share, score=task)
    for name, runs in task.runs.items():
        assert len(runs) <= retention.RUNS == 8
        assert runs[0] is None  # the base and the adapter itself count
        assert runs[1] == 0
        kept = task.retention(name, lib[name])
        assert kept >= share - 1e-9
        # The error that just keeps the share, up to the steps of the bisection and of the bits.
        perfect = min((1 - share) / task.steepness[name], LOOSEST)
        if lib.entry(name).get("exact"):
            assert perfect < TIGHTEST
            continue
        assert lib.entry(name)["tolerance"] <= LOOSEST
        assert dense_error(adapters[name], lib[name]) > min(0.6 * perfect, 0.75)
    assert lib.verify(adapters).keys() == adapters.keys()


def test_each_adapter_has_a_bound_of_its_own_and_bytes_follow(adapters):
    task = Task(adapters, steepness={"a0": 0.2, "a1": 1.0, "a2": 9.0})
    lib = lf.fold(adapters, retention=0.9, score=task)
    bits = [lib.entry(n)["bits"] for n in ("a0", "a1", "a2")]
    assert bits == sorted(bits)
    assert lib.nbytes < lf.fold(adapters, tolerance=0.01).nbytes


def test_without_a_lift_the_default_tolerance_holds(adapters):
    for lift in (0.0, -1.0):
        task = Task(adapters, lift=lift)
        lib = lf.fold(adapters, retention=0.9, score=task)
        assert all(len(runs) == 2 for runs in task.runs.values())
        assert lib.tolerance == 0.1
        for name, a in adapters.items():
            assert "tolerance" not in lib.entry(name)
            assert dense_error(a, lib[name]) <= 0.1
        lib = lf.fold(adapters, retention=0.9, score=Task(adapters, lift=lift), tolerance=0.3)
        assert lib.tolerance == 0.3


@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
@pytest.mark.parametrize("when", [0, 1, 3])
def test_a_score_that_is_no_number_is_an_error(tmp_path, adapters, value, when):
    calls = []

    def score(name, adapter):
        calls.append(name)
        return value if len(calls) > when else float(adapter is not None)

    with pytest.raises(MismatchError, match="the score of 'a0' is .*; it must be a finite"):
        lf.fold(adapters, tmp_path / "lib", retention=0.9, score=score)
    assert not (tmp_path / "lib").exists()


def test_a_score_that_raises_leaves_nothing_behind(tmp_path, adapters):
    with pytest.raises(ZeroDivisionError):
        lf.fold(adapters, tmp_path / "lib", retention=0.9, score=lambda name, a: 1 / 0)
    assert not (tmp_path / "lib").exists()


class Fickle(Task):
    """Likes nothing but what it has liked before: every other coding fails, however near."""

    def __init__(self, adapters, form_passed):
        super().__init__(adapters)
        self.form_passed = form_passed
        self.liked = {}

    def __call__(self, name, adapter):
        super().__call__(name, adapter)
        if adapter is None:
            return 0.0
        bits = b"".join(t.numpy().tobytes() for u in adapter.modules.values() for t in (u.A, u.B))
        if len(self.runs[name]) == 2:
            return 1.0
        if self.form_passed and len(self.runs[name]) <= 7:
            self.liked.setdefault(name, []).append(bits)
            return 1.0
        return float(bits in self.liked.get(name, []))


def test_what_fails_as_written_is_kept_in_the_very_form_that_passed(make_adapter):
    """The check after the bisection: `shared` coordinates differ from the `svd` that was scored."""
    adapters = {f"a{i}": make_adapter(SHAPES, 4, seed=i) for i in range(3)}
    task = Fickle(adapters, form_passed=True)
    lib = lf.fold(adapters, retention=0.9, score=task, form="shared")
    for name, a in adapters.items():
        assert len(task.runs[name]) == 8
        back = lib[name]
        bits = b"".join(t.numpy().tobytes() for u in back.modules.values() for t in (u.A, u.B))
        assert bits == task.liked[name][-1]  # the loosest of those that passed
        assert dense_error(a, back) <= lib.entry(name)["tolerance"] <= LOOSEST


def test_where_nothing_passes_the_adapter_is_stored_exactly(adapters):
    task = Fickle(adapters, form_passed=False)
    lib = lf.fold(adapters, retention=0.9, score=task)
    for name, a in adapters.items():
        assert len(task.runs[name]) == 8
        assert lib[name].digest == a.digest
        assert lib.error(name) == 0
    assert lib.verify(adapters) == dict.fromkeys(adapters, 0.0)


def test_a_demanding_score_ends_at_the_tightest_tolerance_or_exactly(adapters):
    task = Task(adapters, steepness=dict.fromkeys(adapters, 1e6))
    lib = lf.fold(adapters, retention=1.0, score=task)
    for name in adapters:
        assert task.retention(name, lib[name]) == 1
    assert TIGHTEST < 0.01


def test_refused_adapters_are_not_scored(tmp_path, adapters, make_adapter):
    dora = make_adapter(SHAPES, 4, seed=8, config={"use_dora": True})
    task = Task(adapters)
    calls = []
    lib = lf.fold(
        {**adapters, "dora": dora},
        tmp_path / "lib",
        retention=0.9,
        score=lambda name, a: task(name, a) if name != "dora" else calls.append(name),
        progress=lambda done, total, stage: None,
    )
    assert calls == []
    assert lf.Library.open(tmp_path / "lib")["dora"].digest == dora.digest
    assert lib.path == str(tmp_path / "lib")


def test_what_is_in_the_way_is_found_before_the_scores_are_run(tmp_path, adapters):
    lf.fold(adapters, tmp_path / "lib").close()
    with pytest.raises(FileError, match="overwrite"):
        lf.fold(adapters, tmp_path / "lib", retention=0.9, score=lambda *_: pytest.fail("scored"))
    task = Task(adapters)
    lf.fold(adapters, tmp_path / "lib", retention=0.9, score=task, overwrite=True)
    assert lf.Library.open(tmp_path / "lib").names == list(adapters)


def test_scoring_does_not_change_the_adapters(adapters):
    before = {n: a.digest for n, a in adapters.items()}

    def vandal(name, adapter):
        if adapter is not None:
            return 1 - dense_error(adapters[name], adapter)
        return 0.0

    lf.fold(adapters, retention=0.8, score=vandal)
    assert {n: a.digest for n, a in adapters.items()} == before
    assert torch.is_tensor(adapters["a0"]["q"].A)


def test_the_manifest_says_that_retention_decided(adapters):
    lib = lf.fold(adapters, retention=0.9, score=Task(adapters))
    assert lib.stats()["options"]["retention"] == 0.9
    lib.refold(tolerance=0.5)
    assert "retention" not in lib.stats()["options"]
