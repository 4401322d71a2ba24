"""Which parameters of a base required gradients before adapters were trained on it."""

from __future__ import annotations

from collections.abc import Iterable

from torch import nn


class FrozenBase:
    """The parameters of a base that rests while adapters train, and what each one was.

    The only one to write `requires_grad` of a base's parameters, once they rest.
    """

    def __init__(self) -> None:
        self._flags: list[tuple[nn.Parameter, bool]] = []
        self.frozen = False

    def freeze(self, parameters: Iterable[nn.Parameter]) -> None:
        """Let parameters rest, unless that was done."""
        if self.frozen:
            return
        self.frozen = True
        self._flags = [(p, p.requires_grad) for p in parameters]
        for p, _ in self._flags:
            p.requires_grad_(False)

    def thaw(self) -> None:
        """Give every parameter back what it had."""
        for p, flag in self._flags:
            p.requires_grad_(flag)
        self._flags, self.frozen = [], False

    def exchanged(self, old: nn.Parameter | None, new: nn.Parameter) -> None:
        """A parameter takes the place of another: it rests, and is given back what either had.

        The old one stays known: a tied layer may still have it.
        """
        if self.frozen:
            was = next((flag for p, flag in self._flags if p is old), False)
            self._flags.append((new, was or new.requires_grad))
            new.requires_grad_(False)
