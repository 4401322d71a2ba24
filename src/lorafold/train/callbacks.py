"""For who can't subclass a trainer: the adapters saved and measured by a callback."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from ..attach import Live
from .checks import check_model, check_running, trained_now
from .measured import Measured
from .mixin import resume_controller, resume_from, save_controller, save_into
from .orbital.controller import OrbitalController


class _Callback:
    """What transformers asks of a callback: every event, of which most are nothing here."""

    def __getattr__(self, name: str) -> Any:
        if name.startswith("on_"):
            return _nothing
        raise AttributeError(f"{type(self).__name__!r} object has no attribute {name!r}")


def _nothing(*_: Any, **__: Any) -> None:
    """An event that changes nothing."""


class AdapterCallback(_Callback):
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
        resume_from(Path(folder), self.live, trained_now(self.live))

    def on_train_begin(self, args: Any, state: Any, control: Any, **kw: Any) -> None:
        """Guard the optimiser.

        Raises:
            MismatchError: the trainer has another model, or some trained adapter does not run.
        """
        check_model(self.live, kw.get("model"))
        check_running(self.live, trained_now(self.live))
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
            save_into(folder, self.live, trained_now(self.live))

    def on_log(self, args: Any, state: Any, control: Any, logs: Any = None, **kw: Any) -> None:
        """Add the sizes to what is logged."""
        if logs is not None and "loss" in logs:
            measured = self._measured()
            logs.update(measured)
            if state.log_history:
                state.log_history[-1].update(measured)


class OrbitalCallback(_Callback):
    """An `OrbitalController` in a trainer that can't be subclassed: it reads a probe.

    A fixed batch tells of divergence, not of bad data, which it never sees: `Trainer(controller=)`
    reads the batches that are trained on.

    Args:
        controller: of the optimiser that the trainer was given (`optimizers=`).
        probe: what the model is called with, labels included, on the model's device.
    """

    def __init__(self, controller: OrbitalController, probe: Any) -> None:
        self.controller, self.probe = controller, dict(probe)

    def resume_from(self, folder: Any) -> None:
        """Load the controller's state from a checkpoint.

        Raises:
            FileError: it is not there, or can't be read.
        """
        resume_controller(Path(folder), self.controller)

    def on_step_begin(self, args: Any, state: Any, control: Any, **kw: Any) -> None:
        """Read the probe where that is due, and run what trains now."""
        model, c = self.controller.live.model, self.controller
        c.step(c.read(lambda: model(**self.probe)["loss"]))
        c.running()

    def on_train_end(self, args: Any, state: Any, control: Any, **kw: Any) -> None:
        """Run the whole adapter again."""
        self.controller.live.use(self.controller.name)

    def on_save(self, args: Any, state: Any, control: Any, **kw: Any) -> None:
        """Write the controller's state into the checkpoint."""
        if args.should_save:
            folder = Path(args.output_dir) / f"checkpoint-{state.global_step}"
            save_controller(folder, self.controller)
