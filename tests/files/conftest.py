"""Fixtures of the tests of files."""

import importlib.util
from pathlib import Path

import pytest


@pytest.fixture(scope="session")
def kill_points():
    """The module `fold/kill_points.py`, which kills an operation at every call."""
    path = Path(__file__).parents[1] / "fold" / "kill_points.py"
    spec = importlib.util.spec_from_file_location("kill_points", path)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module
