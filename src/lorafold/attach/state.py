"""The state of a model with adapters attached: what there is, and what owns the rest.

What there is (sites and sources) stands here; what is on the device belongs to `Slots`, what runs
to `Running`, and what the base's parameters required to `FrozenBase`.
"""

from __future__ import annotations

from collections.abc import Mapping

from torch import nn

from ..errors import MismatchError, UnknownNameError
from ..layers.swap import Swapped, swap_in
from ..words import did_you_mean
from .choices import Turns
from .run.board import Board, Site
from .run.slots import Slots
from .running import Running
from .sources import Source, Trained


class State:
    """What is attached to a model.

    Args:
        model: the model. slots: for its adapters.
        scaling: of rank prefixes, for all adapters; each one's own when None.

    Attributes:
        scaling: as given. sites: by path, what modules have got.
        sources: by name, where adapters come from.
        running: what runs. board: of the sites. turns: whose it is to change anything.
        detached: whether all this is over.
    """

    def __init__(self, model: nn.Module, slots: Slots, scaling: str | None = None) -> None:
        self.model, self.slots, self.scaling = model, slots, scaling
        self.board, self.turns = Board(model), Turns()
        self.sites: dict[str, Site] = {}
        self.sources: dict[str, Source] = {}
        self.running = Running(self.board, self.sites, self.sources, slots)
        self.detached = False

    def check_attached(self) -> None:
        """Raise a `MismatchError` once all this is over."""
        if self.detached:
            raise MismatchError("this handle was detached: attach again")

    def source(self, name: str) -> Source:
        """Where an adapter comes from.

        Raises:
            UnknownNameError: no such name.
        """
        try:
            return self.sources[name]
        except (KeyError, TypeError):
            raise UnknownNameError(
                f"no adapter {name!r} is attached; {did_you_mean(str(name), self.sources)}"
            ) from None

    def trained(self, name: str) -> Trained:
        """The same of one that is trained.

        Raises:
            UnknownNameError: no such name. MismatchError: it is not trained.
        """
        source = self.source(name)
        if not isinstance(source, Trained):
            raise MismatchError(f"{name!r} is not trained; attach it with trainable=True")
        return source

    def only_trained(self) -> str:
        """The name of the only adapter that is trained.

        Raises:
            MismatchError: there is none, or more than one.
        """
        found = [name for name, s in self.sources.items() if isinstance(s, Trained)]
        if not found:
            raise MismatchError("no adapter is trained here: add one with trainable=True")
        if len(found) > 1:
            raise MismatchError(f"say which: {len(found)} adapters are trained here")
        return found[0]

    def module(self, path: str) -> nn.Module:
        """The module at a path."""
        return self.model.get_submodule(path) if path else self.model

    def attach(self, site: Site, mixin: type[Swapped]) -> None:
        """Give a module its site."""
        swap_in(site.module, site, site.path, mixin)
        self.sites[site.path] = site

    def put(self, sources: Mapping[str, Source]) -> None:
        """Adapters are attached from here on."""
        self.sources.update(sources)

    def freeze(self) -> None:
        """Let the base rest: an adapter is to be trained."""
        merged = self.running.merged
        behind = () if merged is None else merged.kept.values()
        self.board.frozen.freeze([*self.model.parameters(), *(p for p in behind if p is not None)])

    def let_go(self, name: str) -> Source:
        """Take an adapter off the sites and out of its slot; what runs is not asked."""
        for site in self.sites.values():
            site.drop(name)
        self.slots.release(name)
        source = self.sources.pop(name)
        self.running.pauses.forget(source)
        return source

    def remove(self, name: str) -> None:
        """An adapter is no longer attached, and runs nowhere.

        Raises:
            UnknownNameError: no such name. MismatchError: it is merged.
        """
        self.source(name)
        if name in self.running.merged_mix:
            raise MismatchError(f"{name!r} is merged into the weights: unmerge() first")
        self.running.forget(name)
        if not self.let_go(name).in_slots:
            self.running.refresh()

    def detach(self) -> None:
        """Give the model back as it was, but for what is merged."""
        for site in self.sites.values():
            site.leave()
        self.board.frozen.thaw()
        self.board.show(None)
        for there in (self.sites, self.sources, self.slots.patches):
            there.clear()
        self.detached = True
