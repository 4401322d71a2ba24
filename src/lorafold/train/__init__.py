"""Training: the libraries' own trainers with adapters attached, losses and controllers.

Data formats, templates, packing, schedules, checkpoints and distribution are transformers' and
TRL's. What is here runs in a loop of your own, too; the two trainers and the callbacks need the
extra `lorafold[train]`, and are imported when they are asked for.

    lf.attach(model, lf.LoRA(rank=16))
    lf.train.SFTTrainer(model, args, train_dataset=data).train()
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

_HOME = {
    "AdapterCallback": "callbacks",
    "OrbitalCallback": "callbacks",
    "OrbitalController": "orbital.controller",
    "Tuning": "orbital.sensor",
    "KLBarrier": "steering.barrier",
    "conflict_averse": "steering.loss",
    "steer_backward": "steering.loss",
    "steering_loss": "steering.loss",
    "steer": "steering.steer",
    "sweep": "steering.sweep",
    "read_pairs": "steering.pairs",
    "joined_rounds": "steering.rounds",
    "proportional": "steering.rounds",
    "RandomRank": "ranks",
    "loss_by_adapter": "many",
    "clip_by_adapter": "many",
}

if TYPE_CHECKING:
    from .callbacks import AdapterCallback as AdapterCallback
    from .callbacks import OrbitalCallback as OrbitalCallback
    from .many import clip_by_adapter as clip_by_adapter
    from .many import loss_by_adapter as loss_by_adapter
    from .orbital.controller import OrbitalController as OrbitalController
    from .orbital.sensor import Tuning as Tuning
    from .ranks import RandomRank as RandomRank
    from .steering.barrier import KLBarrier as KLBarrier
    from .steering.loss import conflict_averse as conflict_averse
    from .steering.loss import steer_backward as steer_backward
    from .steering.loss import steering_loss as steering_loss
    from .steering.pairs import read_pairs as read_pairs
    from .steering.rounds import joined_rounds as joined_rounds
    from .steering.rounds import proportional as proportional
    from .steering.steer import steer as steer
    from .steering.sweep import sweep as sweep

    Trainer: Any  # classes, of trainers.py
    SFTTrainer: Any

# Classes that exist where their library does.
_MADE = {"Trainer": "trainer", "SFTTrainer": "sft_trainer"}

__all__ = [*_MADE, *_HOME]  # noqa: PLE0604 (all of them are strings)


def __getattr__(name: str) -> Any:
    if name in _MADE:
        value = getattr(importlib.import_module(".trainers", __name__), _MADE[name])()
    elif name in _HOME:
        value = getattr(importlib.import_module(f".{_HOME[name]}", __name__), name)
    else:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return __all__
