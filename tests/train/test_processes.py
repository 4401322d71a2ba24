"""Two processes train what one trains at the same global batch."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

SCRIPT = Path(__file__).with_name("two_processes.py")


def run(folder, kind, processes):
    folder.mkdir()
    head = [sys.executable]
    if processes > 1:  # gloo, as the arguments ask for CPUs
        options = ["--multi_gpu", "--num_processes", str(processes), "--num_machines", "1"]
        more = ["--mixed_precision", "no", "--dynamo_backend", "no", "--main_process_port", "0"]
        head += ["-m", "accelerate.commands.launch", *options, *more]
    command = [*head, str(SCRIPT), str(folder), kind, str(4 // processes)]
    env = {**os.environ, "ACCELERATE_USE_CPU": "true"}
    done = subprocess.run(
        command, capture_output=True, text=True, check=False, timeout=300, env=env
    )
    assert done.returncode == 0, done.stderr[-3000:]
    found, *losses = json.loads((folder / "losses.json").read_text())
    assert found == processes
    return losses, load_file(folder / "factors.safetensors")


@pytest.mark.parametrize("kind", ["one", "many"])
def test_two_processes_are_as_one(kind, tmp_path):
    losses, factors = run(tmp_path / "one", kind, 1)
    theirs, others = run(tmp_path / "two", kind, 2)
    for p, q in zip(losses, theirs, strict=True):
        assert abs(p - q) < 1e-5
    for key, value in factors.items():
        torch.testing.assert_close(others[key], value, atol=1e-5, rtol=1e-5)
    assert list((tmp_path / "two" / "run" / "checkpoint-6").rglob("adapter_model.safetensors"))
