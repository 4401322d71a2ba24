"""What is attached, in numbers: `Live.summary`."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from ..layers.kinds import packed_sizes
from ..layers.storage import is_quantized, stored_as
from ..words import LISTED, Table, aligned, html_table, some_of
from .run.factors import Modulation
from .run.patch import Patch
from .sources import Trained
from .state import State


@dataclass(frozen=True)
class LayerSummary:
    """One attached layer.

    Args:
        path: of the layer. original: numbers in its weight. adapter: in the adapters' factors.
        ranks: {name: r}. alphas: {name: α} (scale · r). quantized: the weight is.
        format: how the weight is stored: "nf4", "int8" …, or a dtype, "bfloat16".
        tail_depths: {name: how far from the top a `PiSSA` adapter's directions are}: 0 for the
            leading ones, 1 for the last ones.
    """

    path: str
    original: int
    adapter: int
    ranks: dict[str, int]
    alphas: dict[str, float]
    quantized: bool
    tail_depths: dict[str, float]
    format: str = ""

    @property
    def ratio(self) -> float:
        """adapter / (original + adapter)."""
        return self.adapter / (self.original + self.adapter)


@dataclass(frozen=True)
class Summary(Table):
    """All attached layers, and the model.

    Args:
        layers: one each. total: numbers in the model without the adapters.
        trainable: numbers that are trained. quantized: how many layers are.
        metadata: {name of a trained adapter: what came with its checkpoint}, where something did.
    """

    layers: tuple[LayerSummary, ...]
    total: int
    trainable: int
    metadata: Mapping[str, Mapping[str, Any]] = field(default_factory=dict)

    @property
    def original(self) -> int:
        """Numbers in the attached layers' weights."""
        return sum(layer.original for layer in self.layers)

    @property
    def adapter(self) -> int:
        """Numbers in the adapters."""
        return sum(layer.adapter for layer in self.layers)

    @property
    def frozen(self) -> int:
        """Numbers of model and adapters that are not trained."""
        return self.total + self.adapter - self.trainable

    @property
    def ratio(self) -> float:
        """adapter / (original + adapter), over the attached layers."""
        return self.adapter / (self.original + self.adapter)

    @property
    def quantized(self) -> int:
        """How many attached layers are quantised."""
        return sum(layer.quantized for layer in self.layers)

    def rows(self) -> list[dict[str, Any]]:
        """A record of each layer: all that `LayerSummary` has, and its ratio."""
        return [{**vars(layer), "ratio": layer.ratio} for layer in self.layers]

    def to_dict(self) -> dict[str, Any]:
        """All of it as plain JSON types: the sums by their names, and `layers`, the rows."""
        return {**self._sums(), "metadata": dict(self.metadata), "layers": self.rows()}

    def _sums(self) -> dict[str, Any]:
        names = ("total", "trainable", "frozen", "original", "adapter", "ratio", "quantized")
        return {name: getattr(self, name) for name in names}

    def _repr_html_(self) -> str:
        head = ("layer", "weight", "format", "adapters", "share", "r", "α")
        rows = (
            (x.path, x.original, x.format, x.adapter, f"{x.ratio:.2%}", x.ranks, x.alphas)
            for x in self.layers
        )
        title = ", ".join(f"{name} {_number(value)}" for name, value in self._sums().items())
        return html_table(title, rows, head, len(self.layers))

    def __str__(self) -> str:
        rows: list[tuple[Any, ...]] = [("layer", "weight", "adapters", "share", "r", "α")]
        rows += [
            (
                layer.path + (" (quantised)" if layer.quantized else ""),
                f"{layer.original:,}",
                f"{layer.adapter:,}",
                f"{layer.ratio:.2%}",
                "/".join(str(r) for r in layer.ranks.values()),
                "/".join(f"{a:g}" for a in layer.alphas.values()),
            )
            for layer in self.layers
        ]
        rows.append(
            ("total", f"{self.original:,}", f"{self.adapter:,}", f"{self.ratio:.2%}", "", "")
        )
        lines = aligned(rows)
        lines.append(
            f"model {self.total:,}, trainable {self.trainable:,}, frozen {self.frozen:,}, "
            f"quantised layers {self.quantized}"
        )
        return "\n".join(lines)


def _number(value: float) -> str:
    return f"{value:,}" if isinstance(value, int) else f"{value:.2%}"


def summarized(state: State) -> Summary:
    """See `Live.summary`."""
    layers = []
    for path, patch in state.slots.patches.items():
        found = {name: source.shape(path) for name, source in state.sources.items()}
        shapes = {name: shape for name, shape in found.items() if shape is not None}
        layers.append(
            LayerSummary(
                path,
                patch.kind.size(patch.module),
                sum(r * sum(patch.dims) for r, _ in shapes.values()),
                {name: r for name, (r, _) in shapes.items()},
                {name: r * scale for name, (r, scale) in shapes.items()},
                is_quantized(patch.module),
                _tail_depths(patch),
                stored_as(patch.module),
            )
        )
    own = {id(p) for source in state.sources.values() for p in source.parameters()}
    packed = packed_sizes(state.model)
    base = (p for p in state.model.parameters() if id(p) not in own)
    total = sum(packed.get(id(p), p.numel()) for p in base)
    trainable = sum(p.numel() for p in state.model.parameters() if p.requires_grad)
    told = {n: s.metadata for n, s in state.sources.items() if isinstance(s, Trained)}
    metadata = {name: dict(its) for name, its in told.items() if its}
    return Summary(tuple(layers), total, trainable, metadata)


def live_repr(state: State) -> str:
    """What is attached, how much of it, and what of it runs; it waits for nobody."""
    if state.detached:
        return "Live(detached, 0 adapters)"
    names, selection = list(state.sources), state.running.selection
    size = f"{_counted(len(state.slots.patches), 'layer')}, {_counted(len(names), 'adapter')}"
    running = [] if selection is None else [n for n in selection.names if n in state.sources]
    if running:
        now = f"{some_of(running, 3)} in use"
    elif not names or state.running.kept or state.running.merged_mix:
        now = ""
    else:
        now = f"none in use: live.use({names[0]!r})"
    return f"Live({size}{now and ', '}{now})"


def _counted(number: int, what: str) -> str:
    return f"{number} {what}{'' if number == 1 else 's'}"


def live_html(title: str, state: State) -> str:
    """A table of what is attached, for a notebook; it waits for no block of another thread."""
    selection = state.running.selection
    running = [] if selection is None else [dict(row.mix) for row in selection.rows if row.on]
    kept, merged = state.running.kept, state.running.merged_mix
    rows: list[tuple[object, ...]] = []
    for name, source in list(state.sources.items())[:LISTED]:
        doing = [
            what
            for what, there in (
                ("runs", any(name in mix for mix in running)),
                ("in the background", name in kept),
                ("merged", name in merged),
            )
            if there
        ]
        rows.append((name, source.rank, ", ".join(doing) or "at rest"))
    return html_table(title, rows, ("adapter", "rank", "now"), len(state.sources))


def _tail_depths(patch: Patch) -> dict[str, float]:
    found = ((name, patch.fresh[key]) for name, key in patch.keys.items())
    return {name: f.tail_depth for name, f in found if isinstance(f, Modulation)}
