"""How a run ends before its end: a loss that is no number, a disk that is full, Ctrl-C."""

from __future__ import annotations

import contextlib
import functools
import math
import signal
from collections.abc import Callable
from pathlib import Path
from typing import Any

from ...errors import LorafoldError
from ..checkpoints import last_checkpoint
from ..many import finite
from ..trainers import sft_trainer
from .libraries import Libraries


class DivergedError(LorafoldError):
    """The loss, or its gradient, is no number any more."""


class Interrupts:
    """While it is entered, the first Ctrl-C asks for an end, and the second leaves at once.

    Args:
        told: called at the first one.
    """

    def __init__(self, told: Callable[[], None]) -> None:
        self.asked, self._told = False, told
        self._before: Any = None

    def __enter__(self) -> Interrupts:
        if signal.getsignal(signal.SIGINT) is signal.SIG_IGN:
            return self  # a job in the background, which Ctrl-C is not for
        with contextlib.suppress(ValueError):  # no signals outside the main thread
            self._before = signal.signal(signal.SIGINT, self._first)
        return self

    def __exit__(self, *_: object) -> None:
        if self._before is not None:
            signal.signal(signal.SIGINT, self._before)

    def _first(self, *_: Any) -> None:
        self.asked = True
        signal.signal(signal.SIGINT, signal.default_int_handler)
        self._told()


def watching(of: Libraries, interrupts: Interrupts, progress: Callable[..., None]) -> Any:
    """A callback of transformers that stops where it is asked to, and says how far it is."""
    base: Any = of.transformers.TrainerCallback

    class Watching(base):  # type: ignore[misc]
        def __init__(self) -> None:
            self.loss = math.nan

        def on_train_begin(self, args: Any, state: Any, control: Any, **kw: Any) -> None:
            best = state.best_model_checkpoint
            if best:  # it lies where it did, though the folder may be called otherwise now
                state.best_model_checkpoint = str(Path(args.output_dir) / Path(best).name)

        def on_step_end(self, args: Any, state: Any, control: Any, **kw: Any) -> None:
            if interrupts.asked:
                control.should_save, control.should_evaluate = True, False
                control.should_training_stop = True
            said = "" if math.isnan(self.loss) else f"loss {self.loss:.3f}"
            progress(state.global_step, state.max_steps, said)

        def on_log(self, args: Any, state: Any, control: Any, logs: Any = None, **kw: Any) -> None:
            self.loss = (logs or {}).get("loss", self.loss)

    return Watching()


@functools.cache
def careful_trainer() -> Any:
    """TRL's trainer with adapters, whose checkpoints are of numbers."""

    class CarefulTrainer(sft_trainer()):  # type: ignore[misc]
        """It makes no step of what is no number."""

        def training_step(self, *args: Any, **kw: Any) -> Any:
            """The library's, of a loss that is a number."""
            loss = super().training_step(*args, **kw)
            step = self.state.global_step + 1
            if not math.isfinite(float(loss)):
                raise DivergedError(f"the loss is {float(loss)} at step {step}{self._kept()}")
            return loss

        def _clip_grad_norm(self, model: Any) -> Any:
            step = self.state.global_step + 1
            if not finite(p.grad for p in self.live.parameters() if p.grad is not None):
                raise DivergedError(f"the gradient is not finite at step {step}{self._kept()}")
            return super()._clip_grad_norm(model)

        def _kept(self) -> str:
            last = last_checkpoint(Path(self.args.output_dir))
            kept = "there is no checkpoint yet" if last is None else f"{last} is the last good one"
            return f": {kept}; a lower lr= or a longer warmup= may help"

        def create_model_card(self, *_: Any, **__: Any) -> None:
            """Nothing: the card is written when the run is over."""

    return CarefulTrainer
