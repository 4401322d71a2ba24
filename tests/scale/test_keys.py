"""Names of tasks: the same for the same inputs, in every process; another for any other."""

import subprocess
import sys
from dataclasses import dataclass

import numpy as np
import pytest
import torch

from lorafold.scale.keys import key_of


@dataclass(frozen=True)
class Point:
    x: float
    y: float


VALUES = [
    None,
    True,
    1,
    1.0,
    "1",
    b"1",
    "",
    [],
    [[]],
    ["a", "b"],
    ["ab"],
    ["a", ["b"]],
    {"a": 1},
    {"a": 2},
    {"b": 1},
    Point(1.0, 2.0),
    Point(2.0, 1.0),
    np.zeros(3),
    np.zeros(3, np.float32),
    np.zeros((3, 1)),
    torch.zeros(3),
    torch.zeros(3, dtype=torch.bfloat16),
    torch.device("cpu"),
    torch.float32,
    key_of,
    len,
]


def test_every_value_has_a_key_of_its_own():
    keys = [key_of(value) for value in VALUES]
    assert len(set(keys)) == len(VALUES)
    assert all(len(key) == 40 for key in keys)


def test_a_key_is_the_same_in_another_process():
    program = (
        "from lorafold.scale.keys import key_of; import numpy as np;"
        "print(key_of({'a': [1, 2.5, None], 'b': np.arange(6).reshape(2, 3)}))"
    )
    found = subprocess.run(
        [sys.executable, "-c", program], check=True, capture_output=True, text=True
    ).stdout.strip()
    assert found == key_of({"a": [1, 2.5, None], "b": np.arange(6).reshape(2, 3)})


def test_what_has_no_key_is_refused():
    with pytest.raises(TypeError, match="object has no key"):
        key_of(object())
