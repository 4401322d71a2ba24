"""The choices of `use`: whose turn it is to make one, and which of them counts.

Choices are a stack, and the last one counts. A plain `use` lays one on top; a block takes its own,
and whatever was chosen inside it, away again. As `use(…)` can't know whether a block follows, its
choice is laid down at once, and moves to the top when its block begins: what other threads chose in
between then lies beneath.
"""

from __future__ import annotations

import threading
import weakref
from collections.abc import Container, Iterable
from typing import Any

from .selection import Selection


class Turns:
    """Whose turn it is to change what runs: a lock that its holder may take again.

    Who leaves a block need not be who began it: a server steps a generator in any of its threads.
    A copy has a lock of its own, which nobody holds.
    """

    def __init__(self) -> None:
        self._changed = threading.Condition(threading.Lock())
        self._holder: int | None = None
        self._depth = 0

    def __reduce__(self) -> Any:
        return Turns, ()

    def __enter__(self) -> None:
        me = threading.get_ident()
        with self._changed:
            while self._holder not in (None, me):
                self._changed.wait()
            self._holder, self._depth = me, self._depth + 1

    def __exit__(self, *_: object) -> None:
        with self._changed:
            self._depth -= 1
            if self._depth == 0:
                self._holder = None
                self._changed.notify()


class Choice:
    """One entry of the stack: a selection, or None for nothing."""

    def __init__(self, selection: Selection | None, block: bool = False) -> None:
        self.selection, self.block = selection, block
        self._user: weakref.ref[Any] | None = None

    def held_by(self, user: Any) -> None:
        """A block may be made of this as long as `user` is there."""
        self._user = weakref.ref(user)

    @property
    def stands(self) -> bool:
        """Whether no block is made of this, nor will be."""
        return not self.block and (self._user is None or self._user() is None)

    def leave_out(self, names: Iterable[str]) -> None:
        """These adapters are no longer chosen."""
        if self.selection is not None:
            self.selection = self.selection.left_by(names)

    def keep_only(self, there: Container[str]) -> None:
        """Adapters that have gone since are no longer chosen."""
        rows = () if self.selection is None else self.selection.rows
        gone = [name for row in rows for name, _ in row.mix if name not in there]
        if gone:
            self.leave_out(gone)


class Choices:
    """The stack; a copy of it is in nobody's block, and holds what counts."""

    def __init__(self) -> None:
        self._stack: list[Choice] = []

    def __getstate__(self) -> dict[str, Any]:
        return {"_stack": [Choice(self.last)]}

    @property
    def last(self) -> Selection | None:
        """The selection that counts; None for nothing."""
        return self._stack[-1].selection if self._stack else None

    def lay(self, selection: Selection) -> Choice:
        """This is chosen from now on, or until its block ends."""
        self._settle()
        choice = Choice(selection)
        self._stack.append(choice)
        return choice

    def begin(self, choice: Choice) -> Choice:
        """The block that is made of a choice, on top."""
        block = Choice(choice.selection, block=True)
        self._stack = [*(c for c in self._stack if c is not choice), block]
        return block

    def end(self, block: Choice) -> None:
        """A block is left."""
        if block in self._stack:
            del self._stack[self._stack.index(block) :]

    def leave_out(self, names: Iterable[str]) -> None:
        """These adapters are no longer chosen, in no block either."""
        for choice in self._stack:
            choice.leave_out(names)

    def _settle(self) -> None:
        """Forget what lies beneath a choice that stands."""
        blocks = [i for i, choice in enumerate(self._stack) if choice.block]
        first = blocks[-1] + 1 if blocks else 0
        standing = [i for i in range(first, len(self._stack)) if self._stack[i].stands]
        if standing:
            del self._stack[first : standing[-1]]
