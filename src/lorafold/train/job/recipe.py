"""What a training run is to do, each option checked: the command's options, and a file's keys."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass, field, fields, replace
from numbers import Integral, Real
from typing import Any

from ...attach import LoRA
from ...errors import MismatchError
from ...words import one_line, one_of

QUANTIZED: dict[str, dict[str, Any]] = {
    "nf4": {"bits": 4, "kind": "nf4"},
    "fp4": {"bits": 4, "kind": "fp4"},
    "int8": {"bits": 8, "kind": "int8"},
}
SCHEDULES = {"cosine": "cosine", "linear": "linear", "constant": "constant_with_warmup"}


@dataclass(frozen=True)
class Recipe:
    """A training run.

    Args:
        base: the folder of a model. data: files. output: the folder to make.
        eval: files of the held-out part; else `held_out`, a share of the data, is it.
        columns: {what a column is: what it is called} where names are others.
        lines: of plain text that make a row.
        rank, alpha, targets, exclude, layers, dropout, rslora, nested, init: as for `LoRA`; α is
            twice the rank when None.
        epochs: how often the data is seen. steps: of the optimiser, instead.
        batch: rows at once. accumulate: batches a step.
        lr: the learning rate. schedule: how it falls. warmup: steps, or a share of them below 1.
        betas: Adam's. weight_decay: AdamW's. clip: the largest norm of an adapter's gradient.
        lora_plus: the rate of B over that of A.
        max_length: tokens of a row; when None what the base takes, 1024 at most.
        packing: several rows one behind the other in one.
        train_on_prompts: learn all tokens, not the completion's or the assistant's alone.
        bf16: compute in bfloat16; where the device can when None.
        gradient_checkpointing: compute activations twice instead of keeping them.
        quantize: the base, to "nf4", "fp4" or "int8".
        patience: evaluations without a better held-out loss before it stops; 0 for never.
        eval_every: steps between evaluations, and checkpoints; a tenth of the run when None.
        chat_template: a file, instead of the base's own. seed: of everything. cpu: use no other.

    Raises:
        MismatchError: an option out of range, naming it.
    """

    base: str
    data: tuple[str, ...]
    output: str
    eval: tuple[str, ...] = ()
    held_out: float = 0.125
    columns: Mapping[str, str] = field(default_factory=dict)
    lines: int = 1
    rank: int = 16
    alpha: float | None = None
    targets: tuple[str, ...] = ("all-linear",)
    exclude: tuple[str, ...] = ()
    layers: tuple[float, ...] = (0.0, 1.0)
    dropout: float = 0.0
    rslora: bool = False
    nested: tuple[int, ...] | None = None
    init: str = "kaiming"
    epochs: float = 3.0
    steps: int | None = None
    batch: int = 8
    accumulate: int = 1
    lr: float = 2e-4
    schedule: str = "cosine"
    warmup: float = 0.03
    betas: tuple[float, ...] = (0.9, 0.999)
    weight_decay: float = 0.0
    clip: float = 1.0
    lora_plus: float = 1.0
    max_length: int | None = None
    packing: bool = False
    train_on_prompts: bool = False
    bf16: bool | None = None
    gradient_checkpointing: bool = False
    quantize: str | None = None
    patience: int = 3
    eval_every: int | None = None
    chat_template: str | None = None
    seed: int = 0
    cpu: bool = False

    def __post_init__(self) -> None:
        for name, check in _CHECKS.items():
            value = getattr(self, name)
            if value is None and name in _MAY_BE_NONE:
                continue
            object.__setattr__(self, name, check(name, value))
        self.spec()  # ranks and starts that don't go together

    @classmethod
    def of(cls, given: Mapping[str, Any]) -> Recipe:
        """The recipe of options by their names.

        Raises:
            MismatchError: base, data or output is missing, or an option is out of range.
        """
        for name, what in (("base", "BASE"), ("data", "data="), ("output", "output=")):
            if not given.get(name):
                raise MismatchError(f"{what} is missing: give it, or {name}: in the config file")
        return cls(**given)

    def to_dict(self) -> dict[str, Any]:
        """What `of` takes, as JSON holds it."""
        return asdict(self)

    def with_(self, **changed: Any) -> Recipe:
        """The same with other options."""
        return replace(self, **changed)

    def spec(self) -> LoRA:
        """The fresh adapter that it means."""
        more: dict[str, Any] = {"exclude": self.exclude} if self.exclude else {}
        return LoRA(
            rank=self.rank,
            alpha=2 * self.rank if self.alpha is None else self.alpha,
            targets=self.targets,
            layers=(self.layers[0], self.layers[1]),
            dropout=self.dropout,
            rslora=self.rslora,
            nested=self.nested,
            init=self.init,
            seed=self.seed,
            **more,
        )


def checked(name: str, value: Any) -> Any:
    """An option's value in the form in which it is kept.

    Raises:
        MismatchError: it is out of range.
    """
    return _CHECKS[name](name, value)


OPTIONS = tuple(f.name for f in fields(Recipe))

# Checks of one option's value; each gives the value in the one form that it is kept in.

Check = Callable[[str, Any], Any]


def _refused(name: str, what: str, value: Any) -> MismatchError:
    return MismatchError(f"{name} must be {what}, found {one_line(value)}")


def _whole(least: int) -> Check:
    def check(name: str, value: Any) -> int:
        if isinstance(value, bool) or not isinstance(value, Integral) or value < least:
            raise _refused(name, f"a whole number of at least {least}", value)
        return int(value)

    return check


def _number(low: float, high: float = math.inf, *, above: bool = False) -> Check:
    what = f"above {low:g}" if above else f"at least {low:g}"
    what = f"a number {what}" + ("" if high == math.inf else f" and below {high:g}")

    def check(name: str, value: Any) -> float:
        right = isinstance(value, Real) and not isinstance(value, bool)
        if not right or not low <= value < high or (above and value == low):
            raise _refused(name, what, value)
        return float(value)

    return check


def _flag(name: str, value: Any) -> bool:
    if not isinstance(value, bool):
        raise _refused(name, "true or false", value)
    return value


def _choice(*known: str) -> Check:
    def check(name: str, value: Any) -> str:
        if value not in known:
            raise _refused(name, one_of(known), value)
        return str(value)

    return check


def _text(name: str, value: Any) -> str:
    if not isinstance(value, str) or not value:
        raise _refused(name, "a text", value)
    return value


def _texts(name: str, value: Any) -> tuple[str, ...]:
    found = tuple(value.split(",")) if isinstance(value, str) else value
    if not isinstance(found, list | tuple) or not all(isinstance(v, str) and v for v in found):
        raise _refused(name, "a text, or several", value)
    return tuple(v.strip() for v in found)


def _paths(name: str, value: Any) -> tuple[str, ...]:
    return _texts(name, [value] if isinstance(value, str) else value)


def _numbers(count: int | None, each: Check, what: str) -> Check:
    def check(name: str, value: Any) -> tuple[Any, ...]:
        if not isinstance(value, list | tuple) or count not in (None, len(value)):
            raise _refused(name, what, value)
        return tuple(each(name, v) for v in value)

    return check


def _columns(name: str, value: Any) -> dict[str, str]:
    if not isinstance(value, Mapping):
        raise _refused(name, "names of columns by what they are", value)
    for what, called in value.items():
        _text(name, called)
        _choice("text", "messages", "prompt", "completion", "adapter", "tools")(name, what)
    return dict(value)


def _steps_or_share(name: str, value: Any) -> float:
    found: float = _number(0)(name, value)
    if found > 1 and found != int(found):
        raise _refused(name, "a number of steps, or a share of them below 1", value)
    return found


_CHECKS: dict[str, Check] = {
    "base": _text,
    "data": _paths,
    "output": _text,
    "eval": _paths,
    "held_out": _number(0, 1),
    "columns": _columns,
    "lines": _whole(1),
    "rank": _whole(1),
    "alpha": _number(0, above=True),
    "targets": _texts,
    "exclude": _texts,
    "layers": _numbers(2, _number(0, 1.0000001), "two shares of the depth, as 0.5, 1"),
    "dropout": _number(0, 1.0000001),
    "rslora": _flag,
    "nested": _numbers(None, _whole(1), "ranks, ascending"),
    "init": _text,
    "epochs": _number(0, above=True),
    "steps": _whole(1),
    "batch": _whole(1),
    "accumulate": _whole(1),
    "lr": _number(0, 100, above=True),
    "schedule": _choice(*SCHEDULES),
    "warmup": _steps_or_share,
    "betas": _numbers(2, _number(0, 1), "two numbers below 1, as 0.9, 0.95"),
    "weight_decay": _number(0),
    "clip": _number(0, above=True),
    "lora_plus": _number(0, 1e6, above=True),
    "max_length": _whole(2),
    "packing": _flag,
    "train_on_prompts": _flag,
    "bf16": _flag,
    "gradient_checkpointing": _flag,
    "quantize": _choice(*QUANTIZED),
    "patience": _whole(0),
    "eval_every": _whole(1),
    "chat_template": _text,
    "seed": _whole(0),
    "cpu": _flag,
}
_MAY_BE_NONE = {f.name for f in fields(Recipe) if f.default is None}
