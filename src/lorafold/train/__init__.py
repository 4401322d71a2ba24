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
    "Trainer": "trainer",
    "SFTTrainer": "sft",
    "AdapterCallback": "callbacks",
    "OrbitalCallback": "callbacks",
    "OrbitalController": "orbital.controller",
    "Tuning": "orbital.sensor",
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
    from .sft import SFTTrainer as SFTTrainer
    from .trainer import Trainer as Trainer

__all__ = list(_HOME)


def __getattr__(name: str) -> Any:
    if name not in _HOME:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    value = getattr(importlib.import_module(f".{_HOME[name]}", __name__), name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return __all__
