"""What a trainer refuses: what would train and not be saved, and what would not train at all."""

from __future__ import annotations

from typing import Any

from ..attach import Live
from ..errors import MismatchError, RefusedError
from .packing import COLUMN


def trained_now(live: Live) -> list[str]:
    """The trained adapters but for kept rounds, which run in the background as they were."""
    return [name for name in live.trained if name not in live.kept]


def check_model(live: Live, model: Any) -> None:
    """Refuse a trainer's model that is not the handle's, and a handle that trains nothing.

    Args:
        model: as a trainer passes it to callbacks, wrapped or not; None where it does not.

    Raises:
        MismatchError: naming what is wrong.
    """
    if not trained_now(live):
        raise MismatchError(
            "no adapter is trained here: attach lorafold.LoRA(…), or with trainable=True"
        )
    if model is not None and all(module is not live.model for module in model.modules()):
        raise MismatchError(
            "the trainer has another model than the handle's: give both the one that "
            "lorafold.attach was given"
        )


def check_parameters(live: Live, names: list[str]) -> None:
    """Refuse parameters of the base that train, and adapters that do not.

    Raises:
        RefusedError: checkpoints hold the adapters alone, and would lose the former.
        MismatchError: an adapter whose parameters require no gradients.
    """
    own = {id(p) for p in live.parameters()}
    named = live.model.named_parameters()
    if others := [n for n, p in named if p.requires_grad and id(p) not in own]:
        more = f" and {len(others) - 1} more" if others[1:] else ""
        raise RefusedError(
            f"{others[0]}{more} of the base would be trained, and not be saved with the adapters: "
            "freeze the base (requires_grad_(False) before lorafold.attach), or attach with "
            "modules_to_save="
        )
    for name in names:
        if not any(p.requires_grad for p in live.parameters(name)):
            raise MismatchError(
                f"{name!r} would not be trained: its parameters require no gradients (freeze a "
                "model before attaching to it, not afterwards)"
            )


def check_running(live: Live, names: list[str]) -> None:
    """Refuse a step in which some trained adapters do not run.

    Raises:
        MismatchError: naming them.
    """
    now = live.active
    mixes = [now] if isinstance(now, dict) else now
    running = {name for mix in mixes for name, c in mix.items() if c != 0}
    idle = [name for name in names if name not in running or name in live.merged]
    if not idle:
        return
    what = f"{', '.join(map(repr, idle))} would not be trained: "
    if merged := [name for name in idle if name in live.merged]:
        raise MismatchError(f"{what}{merged[0]!r} is merged into the weights (live.unmerge())")
    if len(names) == 1:
        raise MismatchError(f"{what}it is switched off (live.use({names[0]!r}))")
    raise MismatchError(
        f"{what}the data has no column {COLUMN} to say whose each row is (which lorafold.train's "
        "trainers read), and others are in use"
    )
