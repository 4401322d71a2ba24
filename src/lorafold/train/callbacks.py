"""For who can't subclass a trainer: the adapters saved and measured by a callback."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from ..attach import Live
from ..errors import MissingExtraError
from .measured import Measured
from .mixin import resume_from, save_into

try:
    from transformers import TrainerCallback
except ImportError as e:
    raise MissingExtraError(
        "lorafold.train.AdapterCallback takes transformers: pip install 'lorafold[train]'"
    ) from e

_Base: Any = TrainerCallback


class AdapterCallback(_Base):  # type: ignore[misc]
    """Writes the adapters into every checkpoint, logs their sizes, and holds still what is paused.

    The trainer itself goes on saving the whole model beside, which `Trainer` does not.

    Args:
        live: the model's handle.
    """

    def __init__(self, live: Live) -> None:
        self.live, self._measured = live, Measured(live)
        self._guard: Any = None

    def resume_from(self, folder: Any) -> None:
        """Load the adapters that a checkpoint has.

        Raises:
            FileError, MismatchError: as `Live.resume`.
        """
        resume_from(Path(folder), self.live, self.live.trained)

    def on_train_begin(self, args: Any, state: Any, control: Any, **kw: Any) -> None:
        """Guard the optimiser."""
        optimizer = getattr(kw.get("optimizer"), "optimizer", kw.get("optimizer"))
        if optimizer is not None and args.world_size == 1:
            self._guard = self.live.guard(optimizer)

    def on_train_end(self, args: Any, state: Any, control: Any, **kw: Any) -> None:
        """Let the optimiser go."""
        if self._guard is not None:
            self._guard.remove()
            self._guard = None

    def on_save(self, args: Any, state: Any, control: Any, **kw: Any) -> None:
        """Write the adapters into the checkpoint."""
        if args.should_save:
            folder = Path(args.output_dir) / f"checkpoint-{state.global_step}"
            save_into(folder, self.live, self.live.trained)

    def on_log(self, args: Any, state: Any, control: Any, logs: Any = None, **kw: Any) -> None:
        """Add the sizes to what is logged."""
        if logs is not None and "loss" in logs:
            measured = self._measured()
            logs.update(measured)
            if state.log_history:
                state.log_history[-1].update(measured)
