"""Arrow: a mix for every token at every layer, from the adapters themselves.

The leading right-singular vector v of an update is the input that it answers to most. A token's
input x at a layer is compared with every adapter's, |x·v| (a singular vector has no sign); the
`top_k` largest go through a softmax (Ostapenko et al. 2024, "Towards Modular LLMs by Building and
Reusing a Library of LoRAs").
"""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from ..attach import TokenMix
from ..collection.batch import decompose
from ..collection.sources import Handle, named_handles
from ..errors import FileError, MismatchError, RefusedError
from ..lowrank import LowRank
from ..parts import Layout
from ..thin import thin
from ..words import did_you_mean, one_line
from . import store
from .encoders import check_width
from .examples import checked_count, checked_temperature

KIND = "arrow"
_AT_ONCE = 64  # updates whose factors are stacked


class ArrowRouter(TokenMix):
    """Weighs attached adapters token by token, layer by layer; nothing is trained.

    Give it to `live.use` itself: `live.use(router)`. It runs every one of its adapters at every
    layer and weighs what comes out, in graphs too: another router of as many adapters (to a power
    of two), with any top_k and temperature, runs in the same graph.

    Args:
        adapters: sources, as everywhere: {name: Adapter}, paths, globs, a Library. The names must
            be those that they are attached by.
        top_k: adapters a token gets at most. temperature: of the softmax of |x·v|.

    Raises:
        MismatchError: options out of range, adapters of different bases. RefusedError: an adapter
            that ΔW algebra is refused for.

    Not for: hundreds of adapters at once, as every token is multiplied with all of them; choose a
    few first (`CentroidRouter`). Layers that are not linear have no input to compare with.

    Examples:
        >>> import torch, lorafold as lf
        >>> model = torch.nn.Sequential(torch.nn.Linear(4, 3))
        >>> def along(i):
        ...     return lf.Adapter({"0": lf.LowRank(torch.eye(4)[i : i + 1], torch.ones(3, 1))})
        >>> two = {"first": along(0), "second": along(1)}
        >>> live = lf.attach(model, two)
        >>> router = lf.ArrowRouter(two, top_k=1)
        >>> x = torch.tensor([[5.0, 1.0, 0.0, 0.0], [1.0, -3.0, 0.0, 0.0]])
        >>> with live.use(router): y = model(x)
        >>> torch.allclose(y - model(x), torch.tensor([[5.0] * 3, [-3.0] * 3]), atol=1e-5)
        True
    """

    def __init__(self, adapters: Any, top_k: int = 2, temperature: float = 1.0) -> None:
        top_k = checked_count(top_k, "top_k")
        temperature = checked_temperature(temperature)
        handles = named_handles(adapters)
        for name, h in handles.items():
            if h.refusal is not None:
                raise RefusedError(f"adapter {name!r}: {h.refusal}")
        found: dict[str, tuple[tuple[str, ...], Tensor]] = {}
        for path in dict.fromkeys(path for h in handles.values() for path in _linear(h)):
            own = {name: h for name, h in handles.items() if path in h.shapes}
            if len({h.shapes[path][:2] for h in own.values()}) > 1:
                raise MismatchError(
                    f"module {path!r} has different shapes: the adapters belong to different bases"
                )
            directions = leading_directions([h.read(path) for h in own.values()])
            found[path] = tuple(own), directions
        if not found:
            raise MismatchError(
                "no adapter has a linear layer, and only these are weighed by token"
            )
        self._settle(tuple(handles), found, top_k, temperature)

    def _settle(
        self,
        names: tuple[str, ...],
        directions: Mapping[str, tuple[tuple[str, ...], Tensor]],
        top_k: int,
        temperature: float,
    ) -> None:
        self.names, self.top_k, self.temperature = names, top_k, temperature
        self._directions = dict(directions)
        self._row = {(p, n): i for p, (own, _) in directions.items() for i, n in enumerate(own)}

    def __repr__(self) -> str:
        options = f"top_k={self.top_k}, temperature={self.temperature:g}"
        return f"ArrowRouter({len(self.names)} adapters, {options})"

    def __call__(self, batch: Any) -> Any:
        """Not to be called: tokens are weighed where they run.

        Raises:
            MismatchError: always.
        """
        raise MismatchError("an ArrowRouter weighs tokens as they run: live.use(router) itself")

    @property
    def modules(self) -> list[str]:
        """The modules that it weighs, as the adapters call them."""
        return list(self._directions)

    def direction(self, name: str, module: str) -> Tensor:
        """The leading right-singular vector (in,) of an adapter's update; zero for a zero update.

        Raises:
            MismatchError: it knows no such adapter or module.
        """
        i = self._row.get((module, name))
        if i is None:
            other = name not in self.names
            near = did_you_mean(*((name, self.names) if other else (module, self.modules)))
            raise MismatchError(
                f"this router knows no module {module!r} of {name!r}: make it of the adapters "
                f"that are attached ({near})"
            )
        return self._directions[module][1][i]

    def numbers(
        self, modules: Sequence[tuple[str, str | None]], width: int, inner: int
    ) -> tuple[Tensor, ...]:
        rows: list[Tensor | None] = [
            None if module is None else self.direction(name, module) for name, module in modules
        ]
        V = torch.zeros(width, inner, dtype=_widest([v for v in rows if v is not None]))
        for i, v in enumerate(rows):
            if v is None:
                continue
            if len(v) != inner:
                name, module = modules[i]
                raise MismatchError(
                    f"module {module!r} of {name!r} has inputs of {len(v)} numbers in this router, "
                    f"and {inner} where it is attached"
                )
            V[i] = v
        top_k = torch.tensor(min(self.top_k, width))
        return V, V.any(1), top_k, torch.tensor(self.temperature, dtype=torch.float32)

    @staticmethod
    def weights(x: Tensor, *numbers: Tensor) -> Tensor:
        """The weights (T, N) of inputs x (T, in); as tensors all that differs between routers."""
        V, there, top_k, temperature = numbers
        likeness = torch.where(there, (x.to(V.dtype) @ V.mT).abs().to(V.dtype), -1.0)
        best, index = likeness.sort(stable=True, dim=1, descending=True)
        on = (torch.arange(len(V), device=x.device) < top_k) & (best >= 0)
        lowest = torch.finfo(V.dtype).min  # not -inf, of which alone a softmax is no number
        exponent = torch.where(on, (best - best[:, :1]) / temperature, lowest)
        return torch.zeros_like(likeness).scatter(1, index, exponent.softmax(1))

    def explain(self, inputs: Mapping[str, Tensor]) -> dict[str, dict[str, float]]:
        """Who gets how much, module by module.

        Args:
            inputs: {module: what it is given, (…, in)}.

        Returns:
            {module: {name: its mean weight over the tokens}}, of the adapters that have the module.

        Raises:
            MismatchError: a module that the router does not know, or inputs that are none or of
                another size.
        """
        if not isinstance(inputs, Mapping):
            raise MismatchError(f"inputs are {{module: tensor}}, found {one_line(inputs)}")
        found = {}
        for module, x in inputs.items():
            if module not in self._directions:
                raise MismatchError(
                    f"this router knows no module {module!r}; {did_you_mean(module, self.modules)}"
                )
            own, V = self._directions[module]
            check_width(x, V.shape[1])
            if not x.numel():
                raise MismatchError(f"module {module!r} is given no token to explain")
            numbers = self.numbers([(name, module) for name in own], len(own), x.shape[-1])
            tokens = x.detach().reshape(-1, x.shape[-1])
            mean = self.weights(tokens, *(t.to(x.device) for t in numbers)).mean(0)
            found[module] = dict(zip(own, mean.tolist(), strict=True))
        return found

    def save(self, path: str | os.PathLike[str], *, overwrite: bool = False) -> None:
        """Write the router as a directory.

        Raises:
            FileError: something is at `path`, and `overwrite` is False or it is no router.
        """
        place = {name: i for i, name in enumerate(self.names)}
        modules = list(self._directions.items())
        record = {
            "kind": KIND,
            "names": list(self.names),
            "top_k": self.top_k,
            "temperature": self.temperature,
            "modules": [path for path, _ in modules],
            "members": [[place[name] for name in own] for _, (own, _) in modules],
        }
        store.write(path, record, {f"{i}": V for i, (_, (_, V)) in enumerate(modules)}, overwrite)

    @classmethod
    def load(cls, path: str | os.PathLike[str]) -> ArrowRouter:
        """A router that `save` wrote.

        Raises:
            FileError: no router of this kind, or a damaged one.
        """
        f, tensors = store.read(path, KIND)
        names = f.names()
        found: dict[str, tuple[tuple[str, ...], Tensor]] = {}
        modules, members = f.get("modules", list), f.get("members", list)
        if len(modules) != len(members):
            raise FileError(f"{f.where}: 'modules' and 'members' differ in length")
        for i, (module, own) in enumerate(zip(modules, members, strict=True)):
            V = tensors.get(f"{i}")
            known = isinstance(own, list) and all(
                type(k) is int and 0 <= k < len(names) for k in own
            )
            once = isinstance(module, str) and module not in found and known
            if not once or len(set(own)) < len(own) or V is None or V.ndim != 2:
                raise FileError(f"{f.where}: module {i} is damaged")
            if len(V) != len(own):
                raise FileError(f"{f.where}: module {i} has {len(V)} directions for {len(own)}")
            found[module] = tuple(names[k] for k in own), V
        router = cls.__new__(cls)
        try:
            top_k = checked_count(f.get("top_k", int), "top_k")
            temperature = checked_temperature(f.number("temperature"))
        except MismatchError as e:
            raise FileError(f"{f.where}: {e}") from e
        router._settle(names, found, top_k, temperature)
        return router


def _linear(handle: Handle) -> list[str]:
    """The modules of an adapter whose inputs are vectors."""
    return [p for p in handle.shapes if handle.layouts.get(p, Layout()).kind == "linear"]


@thin
def leading_directions(updates: Sequence[LowRank]) -> Tensor:
    """The leading right-singular vectors (n, in) of updates with inputs of one size.

    Where the largest singular value is there twice, it is one of the plane. Zero for a zero update.
    """
    with torch.no_grad():  # of adapters that train too, what is known never changes
        parts = [_leading(updates[k : k + _AT_ONCE]) for k in range(0, len(updates), _AT_ONCE)]
    return torch.cat([V.to(_widest(parts)) for V in parts])


def _leading(updates: Sequence[LowRank]) -> Tensor:
    dtype = _widest([t for u in updates for t in (u.A, u.B)])
    rank = max(1, *(u.rank for u in updates))
    A = [F.pad(_even(u.A, dtype), (0, 0, 0, rank - u.rank)) for u in updates]
    B = [F.pad(_even(u.B, dtype), (0, rank - u.rank)) * (u.scale != 0) for u in updates]
    V: Tensor = decompose(torch.stack(B), torch.stack(A))[2][:, :, 0]
    return V


def _even(t: Tensor, dtype: torch.dtype) -> Tensor:
    """A factor at a size that no product overflows; directions don't depend on it."""
    t = t.to(dtype)
    largest = t.abs().amax() if t.numel() else t.new_zeros(())
    return t / torch.where(largest > 0, largest, 1.0)


def _widest(tensors: Sequence[Tensor]) -> torch.dtype:
    dtype = torch.float32
    for t in tensors:
        dtype = torch.promote_types(dtype, t.dtype)
    return dtype
