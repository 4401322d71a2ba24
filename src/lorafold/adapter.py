"""An adapter: module path → update, and whatever else its file held.

Adapters over the same base form a vector space with the inner product ⟨a, b⟩ = Σ_modules
tr(ΔW_aᵀ ΔW_b); a module that one of them lacks counts as zero there. All of it is computed on
factors, module by module. `extras` and `config` ride along untouched.
"""

from __future__ import annotations

import hashlib
import importlib
import math
import os
from collections.abc import Collection, Iterable, Iterator, Mapping
from dataclasses import dataclass, field, replace
from numbers import Integral, Real
from types import MappingProxyType
from typing import Any

import torch
from torch import Tensor

from .errors import MismatchError, RefusedError, UnknownNameError
from .lowrank import LowRank, Vector, cosine, from_svd, same_bits
from .naming import Base, kind
from .parts import LINEAR, Parts, check_bias_scales, extra_kind, refusal_reason
from .parts import Layout as Layout  # noqa: PLC0414  (part of what an Adapter is)
from .placing import Spot, applied, check_replicated, placed
from .prefixes import Prefixes, regauged
from .thin import thin
from .words import Keyed, Table, did_you_mean, html_table, warn


@dataclass(frozen=True, eq=False)
class Adapter(Vector, Keyed, Table, Mapping[str, LowRank]):
    """A mapping of module path to `LowRank`, with vector-space arithmetic.

    Two are equal where every number of modules and extras, scales, config and base are.

    Not for: thousands at once (`fold` reads them module by module), nor training (`attach`).

    Args:
        modules: {path in the base model's own names: update}; at least one.
        extras: {file key: tensor}: everything the file held that is not a plain update (heads,
            biases, DoRA magnitudes, trained tokens); stored exactly and carried along.
        config: the adapter's configuration as in `adapter_config.json`.
        base_model: name or path of the base; taken from the config when None.
        layouts: {path: Layout} for modules that are not plain linear layers.

    Raises:
        MismatchError: nothing in it, or a value of the wrong type.

    Examples:
        >>> import torch
        >>> u = LowRank(torch.randn(2, 8), torch.randn(4, 2))
        >>> a = Adapter({"layers.0.q_proj": u})
        >>> round((a - 0.5 * a).norm() / a.norm(), 6)
        0.5
    """

    modules: Mapping[str, LowRank]
    extras: Mapping[str, Tensor] = field(default_factory=dict)
    config: Mapping[str, Any] = field(default_factory=dict)
    base_model: str | None = None
    layouts: Mapping[str, Layout] = field(default_factory=dict)

    def __post_init__(self) -> None:
        if not self.modules and not self.extras:
            raise MismatchError("an Adapter needs at least one module or extra tensor")
        for path, u in self.modules.items():
            if not isinstance(u, LowRank):
                raise MismatchError(f"module {path!r} must be a LowRank, not {type(u).__name__}")
        unknown = sorted(set(self.layouts) - set(self.modules))
        if unknown:
            raise MismatchError(f"layouts name modules that are not there: {unknown[:3]}")
        base = self.base_model or self.config.get("base_model_name_or_path") or None
        object.__setattr__(self, "base_model", base)
        for name in ("modules", "extras", "config", "layouts"):
            object.__setattr__(self, name, MappingProxyType(dict(getattr(self, name))))

    def __reduce__(self) -> tuple[Any, ...]:
        # Mapping proxies can be neither pickled nor deep-copied.
        parts = (dict(self.modules), dict(self.extras), dict(self.config))
        return Adapter, (*parts, self.base_model, dict(self.layouts))

    def __eq__(self, other: object) -> bool:
        if not isinstance(other, Adapter):
            return NotImplemented
        parts = ("base_model", "config", "layouts", "modules")
        mine, theirs = self.extras, other.extras
        return (
            all(getattr(self, name) == getattr(other, name) for name in parts)
            and mine.keys() == theirs.keys()
            and all(same_bits(t, theirs[key]) for key, t in mine.items())
        )

    def __hash__(self) -> int:
        return hash((frozenset(self.modules), frozenset(self.extras), self.base_model))

    # A mapping

    def __getitem__(self, path: str) -> LowRank:
        try:
            return self.modules[path]
        except KeyError:
            hint = did_you_mean(str(path), self.modules)
            raise UnknownNameError(f"no module {path!r} in this adapter; {hint}") from None

    def __contains__(self, path: object) -> bool:
        return path in self.modules  # `Mapping` would build the error message above for each miss

    def __iter__(self) -> Iterator[str]:
        return iter(self.modules)

    def __len__(self) -> int:
        return len(self.modules)

    def __repr__(self) -> str:
        extras = f", {len(self.extras)} extras" if self.extras else ""
        size = f"{len(self)} modules, rank {self.rank}, {self.num_parameters:,} parameters"
        return f"Adapter({size}{extras})"

    def _repr_html_(self) -> str:
        return _html(self)

    def rows(self) -> list[dict[str, Any]]:
        """A record of each module: its path, out, in, rank, scale, ‖ΔW‖ and dtype."""
        return [_row(path, u) for path, u in self.modules.items()]

    # What it is

    @property
    def rank(self) -> int:
        """The largest rank of any module (0 without modules)."""
        return max((u.rank for u in self.modules.values()), default=0)

    @property
    def num_parameters(self) -> int:
        """Numbers in all factors together; extras do not count."""
        return sum(u.num_parameters for u in self.modules.values())

    @property
    def digest(self) -> str:
        """SHA-256 of the tensors and what scales them, whatever their order in the file."""
        modules = (module_digest(p, u, self.layout(p)) for p, u in self.modules.items())
        extras = (tensor_digest(key, t) for key, t in self.extras.items())
        return combined_digest([*modules, *extras])

    def layout(self, path: str) -> Layout:
        """How the module's weight relates to its update."""
        return self.layouts.get(path, LINEAR)

    @property
    def refusal(self) -> str | None:
        """Why ΔW algebra would be wrong for this adapter, with the remedy; None if it is right."""
        return refusal_reason(self.config, self.extras)

    def _algebra(self) -> Mapping[str, LowRank]:
        reason = self.refusal
        if reason is not None:
            raise RefusedError(reason)
        return self.modules

    # Geometry

    @thin
    def norm(self) -> float:
        """‖ΔW‖_F over all modules."""
        return math.hypot(*(u.norm() for u in self._algebra().values()))

    @thin
    def inner(self, other: Adapter) -> float:
        """⟨ΔW, ΔW'⟩ summed over the modules both have."""
        mine, theirs = self._pair(other)
        return math.fsum(u.inner(theirs[p]) for p, u in mine.items() if p in theirs)

    def cosine(self, other: Adapter) -> float:
        """Cosine between the two updates; 0 when either is zero."""
        return cosine(self.inner(other), self.norm(), other.norm())

    @thin
    def distance(self, other: Adapter) -> float:
        """‖ΔW − ΔW'‖_F, from the QR of the concatenated factors (not from inner products)."""
        mine, theirs = self._pair(other)
        paths = dict.fromkeys([*mine, *theirs])
        parts = []
        for p in paths:
            if p in mine and p in theirs:
                parts.append((mine[p] - theirs[p]).norm())
            else:
                parts.append((mine[p] if p in mine else theirs[p]).norm())
        return math.hypot(*parts)

    @thin
    def spectrum(self) -> dict[str, Tensor]:
        """Module path → singular values of ΔW, descending."""
        return {p: u.spectrum() for p, u in self._algebra().items()}

    # Vector space

    @thin
    def __add__(self, other: Adapter) -> Adapter:
        """Exact sum: factors concatenated, ranks add, no cross terms between A and B."""
        if not isinstance(other, Adapter):
            return NotImplemented
        mine, theirs = self._pair(other)
        modules = {p: u + theirs[p] if p in theirs else u for p, u in mine.items()}
        modules |= {p: u for p, u in theirs.items() if p not in mine}
        config = merged_config(self.config, other.config)
        for one in (self, other):
            check_bias_scales(one.extras, one.config, config)
        return Adapter(
            modules,
            _merged_extras(self.extras, other.extras),
            config,
            self.base_model or other.base_model,
            {**other.layouts, **self.layouts},
        )

    def __mul__(self, c: float) -> Adapter:
        """c · ΔW: scales change, factors and extras do not."""
        if not isinstance(c, Real):
            return NotImplemented
        return replace(self, modules={p: float(c) * u for p, u in self._algebra().items()})

    # Other sizes and gauges

    @thin
    def resize(
        self,
        rank: int | None = None,
        energy: float | None = None,
        tolerance: float | None = None,
        budget: int | None = None,
    ) -> Adapter:
        """The best adapter of lower rank, module by module (Eckart–Young). Exactly one of:

        Args:
            rank, energy, tolerance: as in `LowRank.truncate`, for each module.
            budget: numbers in all factors together; directions are kept over all modules by
                σ² per number (water-filling), at least one a module.

        Returns:
            An `Adapter` in balanced gauge, with the same extras; but one whose config says `nested`
            has its prefix of k ranks cut by `rank=k`, at the strength that it runs with.

        Raises:
            MismatchError: not exactly one option, one out of range, or a budget below rank 1.
            RefusedError: ΔW algebra would be wrong for this adapter.
        """
        modules = self._algebra()
        options = {"rank": rank, "energy": energy, "tolerance": tolerance, "budget": budget}
        named = [name for name, value in options.items() if value is not None]
        if len(named) != 1:
            found = " and ".join(named) if named else "none"
            raise MismatchError(f"give exactly one of {', '.join(options)}; found {found}")
        prefixes = Prefixes.of(self.config)
        if rank is not None and prefixes.ranks:
            return _prefix(self, rank, prefixes)
        if budget is None:
            cut = {p: u.truncate(rank, energy, tolerance) for p, u in modules.items()}
            return _regauged(self, cut)
        parts = {p: u.svd() for p, u in modules.items()}
        ranks = _water_filled({p: S for p, (_, S, _) in parts.items()}, modules, budget)
        svds = ((p, ranks[p], *parts[p]) for p in parts)
        return _regauged(self, {p: from_svd(U[:, :k], S[:k], Vh[:k]) for p, k, U, S, Vh in svds})

    @thin
    def nested(self) -> Adapter:
        """The same update, re-gauged so that every rank prefix is the best one of that rank."""
        return _regauged(self, {p: u.balanced() for p, u in self._algebra().items()})

    @thin
    def to(self, device: Any = None, dtype: torch.dtype | None = None) -> Adapter:
        """A copy on `device` with the factors in `dtype`; extras move but keep their dtype."""
        modules = {p: u.to(device, dtype) for p, u in self.modules.items()}
        extras = {key: t.to(device=device) for key, t in self.extras.items()}
        return replace(self, modules=modules, extras=extras)

    def apply_to(self, state_dict: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """The base's state dict with ΔW added, and the extras that stand for weights put in.

        Args:
            state_dict: the base's tensors under its own names; not changed, and the untouched
                tensors are shared with the result.

        Returns:
            A new dict with the same keys; changed tensors keep their dtype. Tensors that share
            their memory go on doing so where both change alike, and part where they do not; an
            adapter of `lm_head` adds its weight where the dict has the embedding alone (tied).

        Raises:
            MismatchError: no module matches, or a shape does not fit. Modules without a weight
                are listed in a warning.
        """
        return _applied(self, self._algebra(), state_dict)

    def save(self, path: str | os.PathLike[str], **options: Any) -> None:
        """Write it: `lorafold.save(adapter, path, …)`, with the options of that."""
        # Files know adapters, and not the other way round.
        importlib.import_module(f"{__package__}.files").save(self, path, **options)

    def value_at(self, spot: Spot) -> LowRank | Tensor:
        """What an adapter has for a place: the update, or the extra tensor."""
        return self.modules[spot.part] if spot.what == "update" else self.extras[spot.part]

    @property
    def parts(self) -> Parts:
        """What it is made of, without the numbers."""
        shapes = {p: u.shape for p, u in self.modules.items()}
        extras = {key: tuple(t.shape) for key, t in self.extras.items()}
        return Parts(shapes, extras, self.config, self.layouts)

    def _pair(self, other: Adapter) -> tuple[Mapping[str, LowRank], Mapping[str, LowRank]]:
        mine, theirs = self._algebra(), other._algebra()
        if self.base_model and other.base_model and self.base_model != other.base_model:
            raise MismatchError(
                f"the adapters belong to different bases: {self.base_model!r} and "
                f"{other.base_model!r}; if these are one, load them with one base_model="
            )
        for p in mine.keys() & theirs.keys():
            if mine[p].shape != theirs[p].shape:
                raise MismatchError(
                    f"module {p!r} is {mine[p].shape} in one adapter and "
                    f"{theirs[p].shape} in the other"
                )
        return mine, theirs


def _applied(
    a: Adapter, modules: Mapping[str, LowRank], state_dict: Mapping[str, Tensor]
) -> dict[str, Tensor]:
    """See `Adapter.apply_to`."""
    parts = a.parts
    check_replicated(state_dict, a.config, modules)
    plan = placed(parts, Base.of_state(state_dict, parts.names()))
    if plan.unplaced and not plan.wrong and not plan.touches(modules):
        what, first = "modules is in the state dict: expected", parts.names()[:1]
        if not modules:
            what, first = "tensors has a place in the state dict:", list(plan.unplaced)[:1]
        raise MismatchError(
            f"none of the adapter's {len(modules or a.extras)} {what} e.g. {first[0]!r}, "
            f"found e.g. {next(iter(state_dict), None)!r}"
        )
    for misfit in plan.wrong.values():
        raise MismatchError(misfit.says)
    if plan.unplaced:
        names = ", ".join(repr(n) for n in list(plan.unplaced)[:5])
        warn(f"{len(plan.unplaced)} parts of the adapter have no place in the state dict: {names}")
    return applied(plan, state_dict, a.value_at)


def on_base(adapter: Adapter, base_model: str) -> Adapter:
    """The same adapter, on a base that is called so."""
    config = dict(adapter.config)
    if "base_model_name_or_path" in config:
        config["base_model_name_or_path"] = base_model
    return replace(adapter, config=config, base_model=base_model)


def idle(a: Adapter) -> str | None:
    """Why an adapter does nothing to any model; None where it does something.

    What is saved whole (a head, biases, trained tokens) counts as doing something.
    """
    if any(extra_kind(key, a.config) != "training state" for key in a.extras):
        return None
    if all(u.scale == 0 for u in a.modules.values()):
        return "α is 0"
    if any(u.scale != 0 and u.A.any() and u.B.any() for u in a.modules.values()):
        return None
    return "every update is zero (B = 0, as before training)"


def _regauged(a: Adapter, modules: Mapping[str, LowRank]) -> Adapter:
    return replace(a, modules=modules, config=regauged(a.config))


def _prefix(a: Adapter, rank: int, prefixes: Prefixes) -> Adapter:
    """The first ranks of an adapter, as they run."""
    if isinstance(rank, bool) or not isinstance(rank, Integral) or rank < 1:
        raise MismatchError(f"rank must be a whole number of at least 1, found {rank!r}")
    ranks = {p: min(rank, u.rank) for p, u in a.modules.items()}
    modules = {p: prefixes.factor(u.rank, ranks[p]) * u.prefix(ranks[p]) for p, u in a.items()}
    config = {**regauged(a.config), **prefixes.cut(max(ranks.values())).said()}
    return replace(a, modules=modules, config=config)


def _row(path: str, u: LowRank) -> dict[str, Any]:
    out, inner = u.shape
    row = {"module": path, "out": out, "in": inner, "rank": u.rank, "scale": u.scale}
    return {**row, "norm": u.norm(), "dtype": str(u.A.dtype).removeprefix("torch.")}


def _html(adapter: Adapter) -> str:
    """A table of its kinds of module, for a notebook."""
    kinds: dict[str, list[LowRank]] = {}
    for path, u in adapter.modules.items():
        kinds.setdefault(kind(path), []).append(u)
    rows = [
        (name, len(us), _listed({u.shape for u in us}), _listed({u.rank for u in us}))
        for name, us in kinds.items()
    ]
    title = repr(adapter) + (f" on {adapter.base_model}" if adapter.base_model else "")
    return html_table(title, rows, ("modules", "how many", "(out, in)", "rank"))


def _listed(values: Collection[Any]) -> str:
    """A few values in order, and how many more there are."""
    first, rest = sorted(values)[:4], len(values) - 4
    return ", ".join(map(str, first)) + (f" and {rest} more" if rest > 0 else "")


def module_digest(path: str, u: LowRank, layout: Layout = LINEAR) -> bytes:
    """SHA-256 of one update: its path, layout, scale and the bytes of both factors."""
    head = f"{path}\0{layout.kind}\0{layout.kernel}\0{float(u.scale).hex()}"
    return hashlib.sha256(
        head.encode("utf-8", "surrogatepass") + tensor_digest("A", u.A) + tensor_digest("B", u.B)
    ).digest()


def tensor_digest(key: str, t: Tensor) -> bytes:
    """SHA-256 of a tensor's key, dtype, shape and bytes."""
    h = hashlib.sha256(f"{key}\0{t.dtype}\0{tuple(t.shape)}\0".encode("utf-8", "surrogatepass"))
    flat = t.detach().cpu().contiguous().reshape(-1)
    if flat.numel():
        h.update(flat.view(torch.uint8).numpy().data)
    return h.digest()


def combined_digest(parts: Iterable[bytes]) -> str:
    """One hexadecimal digest of many, whatever their order."""
    return hashlib.sha256(b"".join(sorted(parts))).hexdigest()


def _water_filled(
    spectra: Mapping[str, Tensor], modules: Mapping[str, LowRank], budget: int
) -> dict[str, int]:
    """Ranks that keep the most energy within `budget` numbers: best σ² per number first."""
    cost = {p: sum(u.shape) for p, u in modules.items()}
    floor = sum(cost.values())
    if budget < floor:
        raise MismatchError(f"budget {budget} is below rank 1 everywhere, which takes {floor}")
    ranks = dict.fromkeys(spectra, 1)
    left = budget - floor
    # Within a module σ descends, so taking steps in order of gain takes each prefix in order.
    steps = [
        (float(s) ** 2 / cost[p], p) for p, S in spectra.items() for s in S.tolist()[1:] if s > 0
    ]
    for _, p in sorted(steps, key=lambda step: (-step[0], step[1])):
        if cost[p] <= left:
            ranks[p] += 1
            left -= cost[p]
    return ranks


def _merged_extras(a: Mapping[str, Tensor], b: Mapping[str, Tensor]) -> dict[str, Tensor]:
    for key in a.keys() & b.keys():
        if a[key].dtype != b[key].dtype or not torch.equal(a[key], b[key]):
            raise MismatchError(
                f"both adapters carry {key!r} with different values; "
                "lorafold.merge(…, heads=…) takes those of one of them"
            )
    return {**b, **a}


# A config's field that tells where an adapter comes from: "metadata", texts for the header of its
# file, "card", the text of a README.md, and "record", that of a JSON file beside. `save` takes it
# out of the config.
ORIGIN = "lorafold_origin"


def with_card(config: Mapping[str, Any], card: str | None) -> dict[str, Any]:
    """A config that tells of a model card, which `save` writes."""
    told = {} if card is None else {ORIGIN: {**config.get(ORIGIN, {}), "card": card}}
    return {**config, **told}


_TARGETS = (
    "target_modules",
    "target_parameters",
    "exclude_modules",
    "layers_to_transform",
    "layers_pattern",
)


def merged_config(a: Mapping[str, Any], b: Mapping[str, Any]) -> dict[str, Any]:
    """Both configs as one: lists and mappings are joined, `a` decides where they contradict.

    A side that says nothing (None, False, "none", empty) yields to the other, so that a head or
    bias carried from one adapter keeps the setting that makes readers look for it. Where the
    targets differ they are left for `save` to name.
    """
    kept = regauged({key: _merged_value(a.get(key), b.get(key)) for key in [*b, *a]})
    kept.pop(ORIGIN, None)  # where one of them comes from is not where the sum does
    if any(a.get(key) != b.get(key) for key in _TARGETS):
        for key in _TARGETS:
            kept.pop(key, None)
    return kept


def _merged_value(x: Any, y: Any) -> Any:
    if x == y or not y or y == "none":
        return y if x is None else x
    if not x or x == "none":
        return y
    if isinstance(x, list) and isinstance(y, list):
        return x + [item for item in y if item not in x]
    if isinstance(x, dict) and isinstance(y, dict):
        return {**y, **x}
    return x
