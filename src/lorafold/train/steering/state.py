"""A run of steering on the disk, to go on with: `run.safetensors`, and a folder for each round.

`round1`, `round2`, … are PEFT directories of what is kept. The file holds the round that is being
trained: `now.<i>` and `best.<i>`, its parameters in their order, `adam.<i>.<moment>`, and in its
header what was asked for, which has to be the same when it goes on, what was seen so far, and the
checksums of the rounds' files.
"""

from __future__ import annotations

import hashlib
import json
import os
import re
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ...adapter import Adapter
from ...errors import FileError, MismatchError
from ...files import load
from ...files.atomic import new_directory
from ...files.config import CONFIG_NAME, WEIGHTS_NAME
from ...files.disk.sealed import check_sums, read_sealed, sums_of, with_seal
from ...files.replacing import Kind
from ...files.safetensors import save_tensors
from ...files.save import peft_form, write_form
from .calibrate import Calibration
from .rounds import named
from .steer import Judged, Round, Run

FILE, HEADER, VERSION = "run.safetensors", "lorafold_steering_run", 3
_MOMENTS = ("exp_avg", "exp_avg_sq")

RUN = Kind(
    "a run of steering",
    lambda folder: os.path.isfile(folder / FILE),
    re.compile(re.escape(FILE)),
    folders=re.compile(r"round\d+"),
)


def save_run(run: Run, path: str | os.PathLike[str]) -> None:
    """Write a run as it is, between two steps, in place of an earlier state of one.

    Raises:
        FileError: something else is at `path`.
    """
    live, now = run.live, run.now
    header: dict[str, Any] = {"version": VERSION, **_asked(run)}
    header["kept"] = {} if live is None else live.kept
    header["done"] = [r.to_dict() for r in run.done]
    header["now"] = None if now is None else [now.step, [asdict(j) for j in now.judged]]
    tensors: dict[str, Tensor] = {"none": torch.zeros(1)}
    if now is not None and live is not None:
        for i, p in enumerate(live.parameters(named(now.number))):
            tensors[f"now.{i}"] = p.detach()
            tensors |= {f"adam.{i}.{m}": now.optimizer.state[p][m] for m in _MOMENTS if now.step}
        tensors |= {f"best.{i}": t for i, t in enumerate(now.best)}
    apart = {key: t.detach().cpu().contiguous().clone() for key, t in tensors.items()}
    with new_directory(path, RUN, overwrite=True) as staging:
        for name in header["kept"]:
            assert live is not None
            (staging / name).mkdir()
            write_form(staging / name, *peft_form(live.adapter(name)))
        files = (
            f"{name}/{file}" for name in header["kept"] for file in (CONFIG_NAME, WEIGHTS_NAME)
        )
        header["files"] = sums_of(staging, files)
        text = json.dumps(with_seal(header, apart))
        save_tensors(apart, staging / FILE, metadata={"format": "pt", HEADER: text})


def load_run(run: Run, path: str | os.PathLike[str]) -> None:
    """Put a fresh run where a saved one was left.

    Raises:
        FileError: no run is there, or it can't be read. MismatchError: other pairs or options.
    """
    header, tensors, adapters = read_run(Path(path))
    for what, here in _asked(run).items():
        if header.get(what) != here:
            raise MismatchError(f"{path} is a run {_other(what, header.get(what), here)}")
    done = [_round(told) for told in header["done"]]
    run.restore({name: (a, header["kept"][name]) for name, a in adapters.items()}, done)
    if header["now"] is not None:
        _go_on(run, header["now"], tensors)


def _go_on(run: Run, told: Any, tensors: dict[str, Tensor]) -> None:
    """Bring the round that was being trained back to its step."""
    now, (step, judged) = run.begin(), told
    assert run.live is not None
    parameters = list(run.live.parameters(named(now.number)))
    with torch.no_grad():
        for i, p in enumerate(parameters):
            p.copy_(tensors[f"now.{i}"])
            if step:
                moments = {m: tensors[f"adam.{i}.{m}"].to(p.device) for m in _MOMENTS}
                count = torch.tensor(float(step), dtype=torch.float32)
                now.optimizer.state[p] = {"step": count, **moments}
    best = [tensors[f"best.{i}"].to(p.device) for i, p in enumerate(parameters) if judged]
    now.go_on(step, best, [_judged(j) for j in judged])


def _asked(run: Run) -> dict[str, Any]:
    """What a run is of: its options, its pairs, the shapes of its model."""
    pairs = hashlib.sha256(repr(run.encoded.pairs).encode()).hexdigest()
    shapes = [list(p.shape) for n, p in sorted(run.model.named_parameters()) if "lorafold" not in n]
    model = hashlib.sha256(repr(shapes).encode()).hexdigest()
    return {"options": run.options.facts(), "pairs": pairs, "model": model}


def _other(what: str, there: Any, here: Any) -> str:
    if what != "options":
        return f"with other {'pairs' if what == 'pairs' else 'shapes of the base'}: give the same"
    there = there if isinstance(there, dict) else {}
    name = next(k for k in here if there.get(k) != here[k])
    return f"with {name} {there.get(name)!r}, and not {here[name]!r}: give the same options"


def read_run(path: Path) -> tuple[dict[str, Any], dict[str, Tensor], dict[str, Adapter]]:
    """Header and tensors of a run on the disk, and the rounds that are kept of it.

    Raises:
        FileError: none is there, or it is not what was written.
    """
    file = path / FILE
    if not os.path.isfile(file):
        raise FileError(f"{path}: there is no run to go on with")
    header, tensors = read_sealed(file, HEADER)
    if header.get("version") != VERSION:
        raise FileError(f"{file}: this is no run of steering that this version reads")
    check_sums(path, header["files"])
    kept = {name: load(path / name) for name in header["kept"]}
    return header, tensors, kept


def _round(told: dict[str, Any]) -> Round:
    found = told["calibration"]
    if found is not None:
        found = Calibration(**{**found, "tried": tuple(map(tuple, found["tried"]))})
    judged = tuple(map(_judged, told["judged"]))
    return Round(**{**told, "judged": judged, "calibration": found})


def _judged(told: dict[str, Any]) -> Judged:
    return Judged(
        told["step"], told["loss"], tuple(told["margins"]), told["kl"], tuple(told["nll"])
    )
