"""What routers are fitted on: vectors, each with the name that is right for it; and options."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from ..errors import MismatchError
from ..words import one_line
from .encoders import Encoder, plain, vectors_of

NOWHERE = -1  # the label of an example that no name is right for


@dataclass(frozen=True)
class Examples:
    """Vectors with the names that are right for them.

    Args:
        names: of the adapters. vectors: (n, D). labels: (n,) positions in `names`, or NOWHERE.
    """

    names: tuple[str, ...]
    vectors: Tensor
    labels: Tensor

    @classmethod
    def of(
        cls,
        data: Any,
        encoder: Encoder | None,
        names: Sequence[str] | None = None,
        width: int | None = None,
    ) -> Examples:
        """The examples in {name: texts or vectors}, all encoded at once.

        Args:
            data: under None, examples that no name is right for.
            names: those there are, where that is known. width: D, where that is known.

        Raises:
            MismatchError: no name, a name without examples, or an unknown one.
        """
        if not isinstance(data, Mapping):
            raise MismatchError(
                f"examples are {{name: texts or vectors}}, found a {type(data).__name__}"
            )
        if not data and names is not None:
            raise MismatchError("there are no held-out examples at all")
        own = [name for name in data if name is not None]
        names = checked_names(own) if names is None else tuple(names)
        for name in own:
            if name not in names:
                raise MismatchError(f"there are held-out examples of {name!r}, and no others")
        groups = {name: _listed(name, batch) for name, batch in data.items()}
        owners = [name for name, group in groups.items() for _ in range(len(group))]
        if all(isinstance(item, str) for group in groups.values() for item in group[:1]):
            texts = [item for group in groups.values() for item in group]
            x = vectors_of(texts, encoder, width, owners)
        else:
            x = _joined(
                [vectors_of(g, encoder, width, [name] * len(g)) for name, g in groups.items()]
            )
        if not x.shape[1]:
            raise MismatchError("the vectors of the examples hold no number")
        place = {name: i for i, name in enumerate(names)}
        labels = [place.get(name, NOWHERE) for name in owners]
        return cls(names, x.detach(), torch.tensor(labels, device=x.device))

    def take(self, index: Tensor) -> Examples:
        """Some of them."""
        return Examples(self.names, self.vectors[index], self.labels[index])

    def __len__(self) -> int:
        return len(self.labels)


def _listed(name: Any, batch: Any) -> Any:
    """The examples of a name, which are at least one."""
    found = plain(batch)
    if found is None:
        raise MismatchError(f"the examples of {name!r} must be a list, found {one_line(batch)}")
    if not len(found):
        raise MismatchError(f"there are no examples of {name!r}")
    return found


def _joined(parts: list[Tensor]) -> Tensor:
    widths = {x.shape[1] for x in parts}
    if len(widths) > 1:
        raise MismatchError(f"the vectors of the examples differ in length: {sorted(widths)}")
    dtype = parts[0].dtype
    for x in parts:
        dtype = torch.promote_types(dtype, x.dtype)
    return torch.cat([x.to(parts[0].device, dtype) for x in parts])


# Options


def checked_names(names: Any) -> tuple[str, ...]:
    """Names of adapters, in their order.

    Raises:
        MismatchError: none, one twice, or one that is no text.
    """
    if isinstance(names, str) or not isinstance(names, Iterable):
        raise MismatchError(f"names are a list of texts, found {one_line(names)}")
    found = tuple(names)
    if not found:
        raise MismatchError("there is nothing to route to: no name is given")
    for name in found:
        if not isinstance(name, str) or not name:
            raise MismatchError(f"a name must be a non-empty text, found {one_line(name)}")
    if len(set(found)) < len(found):
        twice = next(name for i, name in enumerate(found) if name in found[:i])
        raise MismatchError(f"the name {twice!r} is given twice")
    return found


def checked_number(value: Any, label: str) -> float:
    """A finite number above 0.

    Raises:
        MismatchError: anything else.
    """
    number = isinstance(value, int | float) and not isinstance(value, bool)
    if not number or not 0 < value < math.inf:
        raise MismatchError(f"{label} must be a finite number above 0, found {value!r}")
    return float(value)


def checked_temperature(value: Any) -> float:
    """A temperature that no softmax of float32 fails at.

    Raises:
        MismatchError: anything else.
    """
    number = isinstance(value, int | float) and not isinstance(value, bool)
    if not number or not 1e-6 <= value <= 1e6:
        raise MismatchError(f"temperature must be between 1e-6 and 1e6, found {value!r}")
    return float(value)


def checked_error(error: Any) -> float | None:
    """A share in [0, 1), or None.

    Raises:
        MismatchError: anything else.
    """
    if error is None:
        return None
    number = isinstance(error, int | float) and not isinstance(error, bool)
    if not number or not 0 <= error < 1:
        raise MismatchError(f"error must be a share in [0, 1), or None, found {error!r}")
    return float(error)


def checked_count(value: Any, label: str) -> int:
    """A whole number of at least 1.

    Raises:
        MismatchError: anything else.
    """
    if type(value) is not int or value < 1:
        raise MismatchError(f"{label} must be a whole number of at least 1, found {value!r}")
    return value


def checked_seed(value: Any) -> int:
    """A whole number that a generator takes.

    Raises:
        MismatchError: anything else.
    """
    if type(value) is not int or not -(2**63) <= value < 2**64:
        raise MismatchError(f"seed must be a whole number of 64 bits, found {one_line(value)}")
    return value
