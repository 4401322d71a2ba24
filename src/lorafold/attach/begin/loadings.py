"""Training inside a library: numbers in the sides that its adapters share, and little else.

Where a module of the library has both sides shared, ΔW = U Σ Vᵀ and Σ (R_U, R_V) trains; where one
is, the other side of the product does. The sides stay as they are, bit for bit, and so do all
adapters of the library. `extra` directions of its own let a task leave what the others span.

Source: Kaushik et al., Shared LoRA subspaces for almost strict continual learning (2026),
arXiv:2602.06043, for training loadings alone; there on factors in one gauge, here on ΔW.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from numbers import Integral
from typing import Any

import torch
from torch import Tensor, nn

from ...errors import MismatchError, UnknownNameError
from ...fold import Library
from ...fold.coding.record import StoredPart
from ...layers.kinds import LayerKind
from ...layers.sites import Place
from ...layers.swap import device_of
from ...words import did_you_mean, some_of, warn
from ..run.factors import Factors
from .places import Places, Standing, library_places
from .records import Recorded


@dataclass(frozen=True)
class Loadings(Recorded):
    """A fresh adapter of numbers in a library's shared sides.

    Not for: a library whose adapters share nothing (form "svd"), where there is nothing to load.

    Args:
        library: the library; `lib.add(live.adapter(name), name)` stores the result.
        start: the adapter of the library to begin from; None begins with ΔW = 0.
        extra: directions of its own at each module.
        init_scale: standard deviation of the entries of their A, times 1/√in; their B is 0.
        dtype: of what trains. seed: of A.

    Raises:
        MismatchError: an option out of range. UnknownNameError: no adapter of that name.
    """

    library: Library
    start: str | None = None
    extra: int = 0
    init_scale: float = 0.01
    dtype: torch.dtype = torch.float32
    seed: int | None = None

    def __post_init__(self) -> None:
        if not isinstance(self.library, Library):
            raise MismatchError(
                f"library must be a lorafold Library, found a {type(self.library).__name__}"
            )
        if self.start is not None and self.start not in self.library.names:
            hint = did_you_mean(str(self.start), self.library.names)
            raise UnknownNameError(f"the library has no adapter {self.start!r}; {hint}")
        if isinstance(self.extra, bool) or not isinstance(self.extra, Integral) or self.extra < 0:
            raise MismatchError(f"extra must be a whole number of at least 0, found {self.extra!r}")
        if not isinstance(self.init_scale, int | float) or not 0 < self.init_scale < math.inf:
            raise MismatchError(f"init_scale must be above 0, found {self.init_scale!r}")
        if not isinstance(self.dtype, torch.dtype) or not self.dtype.is_floating_point:
            raise MismatchError(f"dtype must be a floating point type, found {self.dtype!r}")

    @classmethod
    def _read(cls, name: str, value: Any) -> Any:
        return Library.open(value) if name == "library" else super()._read(name, value)


class Loaded(Factors):
    """Numbers between sides that are shared, directions of its own, and what it began with.

    Args:
        U: (out, R_U) or None. V: (in, R_V) or None; one of them is there.
        core: (R_U or out, R_V or in), trained.
        own: (A (e, in), B (out, e)), trained; e may be 0.
        rest: (A, B) of what it began with outside of the sides, not trained.
    """

    saved_as = "loadings"
    U: Tensor | None
    V: Tensor | None
    rest_A: Tensor
    rest_B: Tensor

    def __init__(
        self,
        kind: LayerKind,
        U: Tensor | None,
        V: Tensor | None,
        core: Tensor,
        own: tuple[Tensor, Tensor],
        rest: tuple[Tensor, Tensor],
    ) -> None:
        shared = core.shape[1] if V is not None else core.shape[0]
        super().__init__(kind, shared + len(own[0]) + len(rest[0]), 1.0)
        self.shared = shared
        self.core = nn.Parameter(core)
        self.own_A, self.own_B = nn.Parameter(own[0]), nn.Parameter(own[1])
        for name, t in (("U", U), ("V", V), ("rest_A", rest[0]), ("rest_B", rest[1])):
            self.register_buffer(name, t)

    def parts(self, k: int) -> list[tuple[Tensor, Tensor, Tensor | float]]:
        core, U, V = self.core, self.U, self.V
        B: Tensor = core if U is None else U.to(core) @ core if V is not None else U.to(core)
        A: Tensor = core if V is None else V.T.to(core)
        pairs = [(A, B)]
        more = ((self.own_A, self.own_B), (self.rest_A, self.rest_B))
        pairs += [pair for pair in more if len(pair[0])]
        if len(pairs) > 1:  # one pair, as the rows of a batch weigh its ranks
            A, B = torch.cat([a for a, _ in pairs]), torch.cat([b for _, b in pairs], 1)
        return [(A[:k], B[:, :k], 1.0)]

    def paused(self, k: int) -> list[tuple[nn.Parameter, Any]]:
        last = (slice(None), slice(k, None)) if self.V is not None else slice(k, None)
        more = max(k - self.shared, 0)
        return [
            (self.core, last),
            (self.own_A, slice(more, None)),
            (self.own_B, (slice(None), slice(more, None))),
        ]


def fresh_loadings(spec: Loadings, at: Standing) -> tuple[dict[str, Factors], Places]:
    """The factors that a specification means, and where they go.

    Raises:
        MismatchError: nothing is shared at any module of the library.
    """
    places = library_places(spec.library, at)
    generator = torch.Generator()
    generator.manual_seed(int(torch.randint(2**62, ())) if spec.seed is None else spec.seed)
    fresh: dict[str, Factors] = {}
    for path, place in places.layers.items():
        made = _at(spec, places.names[path], place, generator)
        if made is not None:
            fresh[path] = made
    if not any(isinstance(f, Loaded) and f.shared for f in fresh.values()):
        raise MismatchError(
            "the library's adapters share no side anywhere, so there is nothing to load: fold them "
            "with form='shared' (or 'input', 'output'), or attach lf.LoRA(…)"
        )
    if left := [path for path in places.layers if path not in fresh]:
        warn(f"{len(left)} modules of the library share no side and don't train: {some_of(left)}")
    layers = {path: places.layers[path] for path in fresh}
    return fresh, Places(layers, {}, {}, {path: places.names[path] for path in fresh})


def _at(spec: Loadings, name: str, place: Place, generator: torch.Generator) -> Loaded | None:
    """One module's factors; None where there are none: nothing shared, begun with or of its own."""
    contents = spec.library.contents
    sides = contents.sides(contents.manifest.numbers[name])
    columns = {s: [basis.columns for basis in bases] for s, bases in sides.items()}
    device = device_of(place.layer)
    out, inner = place.dims
    U, V = (torch.cat(c, 1).to(device) if (c := columns[s]) else None for s in ("U", "V"))
    if U is None and V is None:  # no side to load: what it began with, and directions of its own
        V = torch.zeros(inner, 0, dtype=torch.float32, device=device)
    core = torch.zeros(
        out if U is None else U.shape[1], inner if V is None else V.shape[1], dtype=spec.dtype
    )
    rest: list[tuple[Tensor, Tensor]] = []
    for part in contents.parts(spec.start, name) if spec.start is not None else ():
        if (part.U is None, part.V is None) == (U is None, V is None):
            rows, cols = (_span(columns[s], n) for s, n in (("U", part.U), ("V", part.V)))
            left, right = part.left, part.right
            core[rows.start : rows.start + len(left), cols.start : cols.start + right.shape[1]] += (
                part.scale * (left @ right)
            ).to(core)
        else:
            rest.append(_multiplied(part, columns))
    if not (min(core.shape) or spec.extra or rest):
        return None
    wide = torch.float32
    A = torch.randn(spec.extra, inner, generator=generator, dtype=wide)
    own = A * (spec.init_scale / math.sqrt(inner)), torch.zeros(out, spec.extra, dtype=wide)
    left_over = (
        torch.cat([torch.zeros(0, inner, dtype=wide), *(a.cpu().float() for a, _ in rest)]),
        torch.cat([torch.zeros(out, 0, dtype=wide), *(b.cpu().float() for _, b in rest)], 1),
    )
    (A, B), (rest_A, rest_B) = (
        (a.to(device, spec.dtype), b.to(device, spec.dtype)) for a, b in (own, left_over)
    )
    return Loaded(place.kind, U, V, core.to(device), (A, B), (rest_A, rest_B))


def _span(columns: list[Tensor], number: int | None) -> slice:
    """The columns of one basis among all of a side's."""
    first = sum(c.shape[1] for c in columns[:number]) if number is not None else 0
    return slice(first, None)


def _multiplied(part: StoredPart, columns: dict[str, list[Tensor]]) -> tuple[Tensor, Tensor]:
    """(A, B) of a stored part, its sides multiplied out."""
    left, right = part.scale * part.left, part.right
    if part.U is not None:
        left = columns["U"][part.U][:, : len(left)] @ left
    if part.V is not None:
        right = right @ columns["V"][part.V][:, : right.shape[1]].T
    return right, left
