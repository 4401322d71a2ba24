"""What the sites of a model know of what runs, and what a site is.

A site is the child that attaching gives to a module. It never sees the handle: what is chosen
stands on the board that all sites of a model share, and what they notice is noted there.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping
from typing import Any

from torch import Tensor, nn

from ...layers.frozen import FrozenBase
from ...layers.swap import swap_out
from ...lowrank import LowRank
from ..selection import Row, Selection
from .packed import Packed
from .rows import Rows


class Board:
    """What the sites of one model share; a copy begins stale.

    Args:
        model: that they are in.

    Attributes:
        frozen: the base's parameters, while adapters train.
        running: what the layers run: without what is merged; None for nothing.
        stale: what they are shown is no longer right: layers moved to another device, maybe.
        ran: trained layers have run, with gradients, since somebody asked.
        rows: which entries of the batch the rows in use are.
        handle: of the model; sites don't look at it.
        refresh: shows the layers anew what runs. summed: what a mix adds to the weight at a path.
    """

    refresh: Callable[[], None]
    summed: Callable[[str, Row], LowRank | None]

    def __init__(self, model: nn.Module) -> None:
        self.frozen, self.rows = FrozenBase(), Rows(model)
        self.running: Selection | None = None
        self.stale = self.ran = False
        self.handle: Any = None

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "stale": True}

    def connect(
        self,
        refresh: Callable[[], None],
        summed: Callable[[str, Row], LowRank | None],
    ) -> None:
        """Whom the sites ask."""
        self.refresh, self.summed = refresh, summed

    def belongs_to(self, handle: Any) -> None:
        """The model has a handle."""
        self.handle = handle

    @property
    def row(self) -> Row | None:
        """The mix that runs for the whole batch; None for the base, or for rows."""
        running = self.running
        if running is None or not running.uniform or not running.on:
            return None
        return running.rows[0]

    def show(self, running: Selection | None, packed: Packed | None = None) -> None:
        """This is what runs, and how its rows are packed."""
        self.running, self.stale = running, False
        self.rows.choose(running, packed)

    def moved(self) -> None:
        """Layers may be elsewhere."""
        self.stale = True

    def note_run(self) -> None:
        """Trained layers run, with gradients."""
        self.ran = True

    def have_run(self) -> bool:
        """Whether trained layers have run since this was asked last."""
        ran, self.ran = self.ran, False
        return ran


class Site(nn.Module, ABC):
    """What is attached to one module, as its child.

    Args:
        board: that the sites of a model share. path: of the module. module: itself.

    Attributes:
        knows_rows: whether the rows of a batch can be told apart here.
        time_first: whether time is the first axis here.
    """

    knows_rows = True

    def __init__(self, board: Board, path: str, module: nn.Module) -> None:
        super().__init__()
        self.board, self.path = board, path
        self.time_first = board.rows.join(path)
        if board.rows.passed_by(path):
            self.register_forward_pre_hook(_nothing)
        self._held = (module,)  # in a tuple, or it would become a child of its own child

    @property
    def module(self) -> Any:
        """The module that this is attached to."""
        return self._held[0]

    @abstractmethod
    def has(self, name: str) -> bool:
        """Whether this holds something of an adapter; what is in slots is not asked for."""

    @abstractmethod
    def drop(self, name: str) -> None:
        """Let go of what it holds of an adapter, if anything."""

    @abstractmethod
    def merged(self, row: Row) -> dict[str, Tensor]:
        """{parameter of the module: W + Σ c ΔW} of the parameters that a mix changes."""

    def stands_for(self, kept: Mapping[str, Tensor]) -> None:
        """Others are merged into the module; these parameters stood there before, by name."""

    def settle(self) -> None:
        """They stay so for good."""

    def leave(self) -> None:
        """Give the module back as it was."""
        swap_out(self.module)

    def weight_exchanged(self, old: nn.Parameter, new: nn.Parameter) -> None:
        """The module has another weight."""
        self.board.frozen.exchanged(old, new)


def _nothing(*_: Any) -> None:
    """A hook that is only there to be seen: torch's layer then runs its parts."""
