"""Rows of a batch: which entries each of them is, by what the model's own input says.

n is the first axis of the main input of the outermost running module that holds attached layers:
hooks on these modules, there only while rows are in use, read it before anything runs. n = m · rows
and each row is m consecutive entries. A layer's entries are told apart where its first axis is n,
or, of what was flattened, n or n times the length of that input; in classes that put time first, by
the second axis. Anything else (tokens that routing has sorted, images beside texts, time first
where nobody says so) is refused by name, and not guessed at by what happens to divide.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from ...errors import MismatchError
from ..selection import Selection
from .packed import Packed

HOOK = "lorafold"  # always the same key: a compiled graph looks at it, and the hooks come and go

# Modules of transformers that turn their inputs over, so that time is first for what is in them.
_TIME_FIRST = {"LEDEncoderSelfAttention", "LongformerSelfAttention", "XLNetModel"}
# Inputs with an entry for each of the batch, by the names that transformers gives them.
_INPUTS = (
    "input_ids",
    "inputs_embeds",
    "decoder_input_ids",
    "decoder_inputs_embeds",
    "encoder_outputs",
    "encoder_hidden_states",
)

_LISTS = (nn.ModuleList, nn.ModuleDict)


class Rows:
    """What the rows in use are of the batch that runs.

    Args:
        model: that adapters are attached to.

    Attributes:
        count: of the rows in use; 0 where they needn't be told apart along the first axis.
        packed: how rows lie along the second axis, where they do.
        n: entries of the batch that runs; None where no module that is watched runs.
        lengths: of its inputs.
    """

    def __init__(self, model: nn.Module) -> None:
        self._model = model
        self._watched: dict[str, tuple[Any, Callable[..., None]]] = {}
        self._known: set[str] = set()  # layers whose first axis is the batch's beyond doubt
        self.count = 0
        self.packed: Packed | None = None
        self._forget()

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "_owner": None, "_depth": 0, "n": None, "lengths": ()}

    def _forget(self) -> None:
        self._owner: nn.Module | None = None
        self._depth = 0
        self.n: int | None = None
        self.lengths: tuple[int, ...] = ()
        self._checked = False

    def join(self, path: str) -> bool:
        """Watch the modules that hold one more layer; whether time is first there."""
        time_first = False
        for above, module in _above(self._model, path):
            if above not in self._watched:
                enter = (
                    self._enter_time_first
                    if time_first or _torch_time_first(module)
                    else self._enter
                )
                self._watched[above] = (module, enter)
            time_first = time_first or _time_first_inside(module)
        if self._wanted:
            self._show_hooks()
        return time_first

    def routed(self, path: str) -> bool:
        """Whether a layer is one of experts in a list, each of which gets what routing picks."""
        lists = [p for p, m in _above(self._model, path) if isinstance(m, _LISTS)]
        return any("expert" in p.rpartition(".")[2].lower() for p in lists)

    def passed_by(self, path: str) -> bool:
        """Whether a layer is in torch's encoder layer, which may read its weight past it."""
        above = _above(self._model, path)
        return any(isinstance(module, nn.TransformerEncoderLayer) for _, module in above)

    def choose(self, running: Selection | None, packed: Packed | None) -> None:
        """These rows run."""
        self._forget()  # what an interrupted forward may have left
        before = self._wanted
        rows = 0 if running is None or running.uniform else len(running.rows)
        self.packed = packed
        self.count = rows if rows > 1 and packed is None else 0
        if self._wanted != before:
            self._show_hooks()

    @property
    def _wanted(self) -> bool:
        """Whether the hooks have something to do."""
        return bool(self.count) or self.packed is not None

    def _show_hooks(self) -> None:
        wanted = self._wanted
        for module, enter in self._watched.values():
            before, after = module._forward_pre_hooks, module._forward_hooks
            if (HOOK in before) == wanted:
                continue
            named, always = (
                module._forward_pre_hooks_with_kwargs,
                module._forward_hooks_always_called,
            )
            if wanted:
                before[HOOK], named[HOOK] = enter, True
                after[HOOK], always[HOOK] = self._leave, True
            else:
                del before[HOOK], named[HOOK], after[HOOK], always[HOOK]

    def _enter(self, module: nn.Module, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> None:
        self._read(module, args, kwargs, 0)

    def _enter_time_first(
        self, module: nn.Module, args: tuple[Any, ...], kwargs: Mapping[str, Any]
    ) -> None:
        self._read(module, args, kwargs, 1)

    def _read(
        self, module: nn.Module, args: tuple[Any, ...], kwargs: Mapping[str, Any], axis: int
    ) -> None:
        if self._owner is not None and self._owner is not module:
            return
        inputs = [t for t in _inputs(module, args, kwargs) if t.ndim > axis]
        if not inputs:
            return  # a module in it will say
        self._owner = module
        self._depth += 1
        sizes = [t.shape[axis] for t in inputs]
        for size in sizes[1:]:
            if size != sizes[0]:
                raise MismatchError(
                    f"the inputs of {type(module).__name__} disagree on the batch, {sizes[0]} "
                    f"entries and {size}: rows can't be told apart"
                )
        self.n, self.lengths = sizes[0], tuple(_length(t, axis) for t in inputs)
        if self.packed is None:
            self._check_multiple(sizes[0], "")
        elif sizes[0] != 1:
            raise MismatchError(
                "packed rows (lengths=) lie along the second axis of inputs (1, T), found a batch "
                f"of {sizes[0]}"
            )
        elif not torch.compiler.is_compiling():  # in a graph the first layer does
            self.packed.check(self.lengths[0], inputs[0].device)

    def _leave(self, module: nn.Module, args: Any, output: Any) -> None:
        if self._owner is module:
            self._depth -= 1
            if self._depth == 0:
                self._forget()

    def _check_multiple(self, n: int, where: str) -> None:
        if n % self.count:
            raise MismatchError(
                f"a batch of {n}{where} is no multiple of the {self.count} rows given to use([...])"
            )

    def check(
        self,
        path: str,
        lead: Sequence[int],
        time_first: bool,
        recorded: bool,
        convolved: bool = False,
    ) -> None:
        """Raise a `MismatchError` where a layer's entries are not those of the rows.

        Args:
            path: of the layer. lead: the axes of what it gives, the channels left out.
            time_first: whether time is first there. recorded: whether it runs in a graph.
            convolved: whether it has its lengths behind the channels.
        """
        if not self.count:
            return
        axis, n = int(time_first), self.n
        if n is None:  # it is called by itself: its own input says
            if len(lead) > axis:
                self._check_multiple(lead[axis], f" at {path!r}")
                return
        elif len(lead) == 1 and not time_first:
            if lead[0] == n or any(lead[0] == n * length for length in self.lengths):
                if not convolved:
                    self._check_known(path, lead, self.lengths, recorded)
                return
        elif len(lead) > axis and lead[axis] == n:
            if not time_first:
                self._check_known(path, lead, lead[1:], recorded)
            return
        raise MismatchError(
            f"module {path!r} gets {_shown(lead)} entries where the model's input has {n}, so the "
            "rows can't be told apart there: use one mix for the whole batch"
        )

    def packed_as(
        self, path: str, lead: Sequence[int], time_first: bool, device: torch.device
    ) -> tuple[int, bool]:
        """How a layer's entries are packed rows: (their number, whether it is one a sequence).

        Args:
            path, lead, time_first: as for `check`. device: of the layer.

        Raises:
            MismatchError: they are not, naming the layer.
        """
        assert self.packed is not None
        ones, found = list(lead), 0
        if len(lead) == 2:
            found = ones.pop(0 if time_first else 1)
        elif len(lead) == 1:
            found = ones.pop()
        tokens = self.lengths[0] if self.lengths else found  # or it is called by itself
        if ones in ([], [1]) and lead:
            if not self._checked:
                self._checked = bool(self.lengths)
                self.packed.check(tokens, device)
            if found == tokens:
                return found, False
            if found == self.packed.sequences:
                return found, True
        raise MismatchError(
            f"module {path!r} gets {_shown(lead)} entries of {tokens} packed tokens, so the rows "
            "can't be told apart there: it needs all of them, or one a sequence"
        )

    def _check_known(
        self, path: str, lead: Sequence[int], others: Sequence[int], recorded: bool
    ) -> None:
        """Refuse a layer whose first axis may as well be another one, as long as that."""
        if lead[0] not in others:
            if not recorded:  # in a graph this would be looked at, and done at every call
                self._known.add(path)
        elif path not in self._known:
            raise MismatchError(
                f"module {path!r} gets {_shown(lead)} entries, and the rows may lie along either "
                "axis: pad the batch to another length, or run one of another length first"
            )


def _above(model: nn.Module, path: str) -> Iterator[tuple[str, nn.Module]]:
    """The modules that hold the one at a path, the model first."""
    parts = path.split(".") if path else []
    for i in range(len(parts)):
        above = ".".join(parts[:i])
        yield above, model.get_submodule(above) if above else model


def _time_first_inside(module: nn.Module) -> bool:
    names = {c.__name__ for c in type(module).__mro__}
    return not names.isdisjoint(_TIME_FIRST) or _torch_time_first(module)


def _torch_time_first(module: nn.Module) -> bool:
    kinds = (
        nn.Transformer,
        nn.TransformerEncoder,
        nn.TransformerDecoder,
        nn.TransformerEncoderLayer,
        nn.TransformerDecoderLayer,
    )
    if not isinstance(module, kinds):
        return False
    attention = [m for m in module.modules() if isinstance(m, nn.MultiheadAttention)]
    return bool(attention) and not attention[0].batch_first


def _inputs(module: nn.Module, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> list[Tensor]:
    """The tensors of a call that have an entry for each of the batch, the main one first."""
    if args and isinstance(args[0], Mapping):
        args, kwargs = args[1:], {**args[0], **kwargs}
    main = getattr(module, "main_input_name", None)
    names = [main, *(n for n in _INPUTS if n != main)] if isinstance(main, str) else list(_INPUTS)
    given = [*args[:1], *(kwargs[name] for name in names if name in kwargs)]
    tensors = [_tensor(value) for value in given]
    found = [t for t in tensors if t is not None]
    if found:
        return found
    return [t for t in (*args, *kwargs.values()) if isinstance(t, Tensor)][:1]


def _tensor(value: Any) -> Tensor | None:
    """The tensor that an input is, or that an encoder's output begins with."""
    if isinstance(value, Tensor):
        return value
    if isinstance(value, tuple) or hasattr(value, "last_hidden_state"):
        first = value[0]
        return first if isinstance(first, Tensor) else None
    return None


def _length(t: Tensor, axis: int) -> int:
    """Entries that each of the batch has in an input."""
    if t.ndim == 3 or (t.ndim == 2 and not t.is_floating_point()):
        return t.shape[1 - axis]
    return 1


def _shown(lead: Sequence[int]) -> str:
    return " × ".join(map(str, lead)) or "no"
