"""benchmarks/attacks.py with small counts: kills, a crowd of writers, loads beside overwrites."""

import importlib.util
import os
from pathlib import Path

import pytest
import torch

from lorafold.files import atomic

SCRIPT = Path(__file__).parents[2] / "benchmarks" / "attacks.py"


@pytest.fixture(scope="module")
def attacks():
    torch.set_num_threads(1)
    with pytest.MonkeyPatch.context() as patch:
        patch.syspath_prepend(str(SCRIPT.parent))
        spec = importlib.util.spec_from_file_location("attacks", SCRIPT)
        module = importlib.util.module_from_spec(spec)
        spec.loader.exec_module(module)
        yield module


@pytest.fixture(autouse=True)
def quick(monkeypatch):
    """No flushing, which takes time and shows in no test. Forks under threads touch no thread."""
    monkeypatch.setattr(os, "fsync", lambda _: None)


pytestmark = pytest.mark.filterwarnings("ignore::DeprecationWarning")


def test_names_after_changes(attacks):
    assert [attacks.names_after(7, n) for n in range(5)] == [
        set(),
        {"7-0"},
        {"7-0", "7-1"},
        {"7-0", "7-1", "7-2"},
        {"7-1", "7-2"},
    ]


def test_kills_of_several_writers_lose_nothing(tmp_path, attacks):
    assert attacks.kills(tmp_path, 5)["changes"] > 0


def test_kills_of_repairs_lose_nothing(tmp_path, attacks):
    assert attacks.repairs(tmp_path, 4)["repairs killed"] == 4


def test_a_crowd_of_writers_gets_through(tmp_path, attacks):
    assert min(attacks.writers(tmp_path, 1.0)["changes"]) >= 1


@pytest.mark.parametrize("exchanges", [True, False])
def test_loads_beside_overwrites(tmp_path, attacks, monkeypatch, exchanges):
    if not exchanges:  # as on file systems that rename twice
        monkeypatch.setattr(atomic, "_rename_with", lambda *_: False)
    found = attacks.reads(tmp_path, 0.5)
    assert found["mixed"] == found["failed"] == 0
    assert found["overwrites"] > 0
