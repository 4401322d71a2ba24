import importlib.util
from pathlib import Path

import pytest


@pytest.fixture(scope="session")
def kill_points():
    """The module `kill_points`, which lies beside; test folders are not on the import path."""
    path = Path(__file__).with_name("kill_points.py")
    spec = importlib.util.spec_from_file_location("kill_points", path)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module
