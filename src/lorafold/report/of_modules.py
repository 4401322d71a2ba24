"""Pictures of what updates look like along rank and depth: spectra, energy, norms, anomalies."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np

from ..compare import Anatomy, Anomaly
from .measured import Measured, by_family
from .section import (
    BAND,
    Section,
    counted,
    evenly,
    layout,
    numbers,
    shortened,
    shown,
    span,
    whole_ticks,
)

_FAMILIES = 12  # of modules, drawn at most
_LAYERS = 16  # a family's lines, at most
_SINGLE = 24  # adapters with a line each, at most; more are drawn as quantiles
_POINTS = 400  # anomalies drawn, at most

# From plotly's Viridis, without the ends that are lost on black and on white.
_DEPTHS = ["#46327e", "#365c8d", "#277f8e", "#1fa187", "#4ac16d", "#a0da39"]


def spectra(m: Measured) -> Section:
    """How fast singular values fall, for each family of modules and layer."""
    families = _drawn_families(m)
    columns = min(4, len(families))
    rows = -(-len(families) // max(columns, 1))
    data: list[dict[str, Any]] = []
    titles, table = [], []
    for n, (name, modules) in enumerate(families.items()):
        axis = "" if n == 0 else str(n + 1)
        titles.append(_title(name, axis))
        for i in evenly(len(modules), _LAYERS):
            path = m.paths[modules[i][1]]
            S = m.spectra[path]
            S = S[S > 0]  # beyond the rank that half of them have
            if not len(S):
                continue
            S = S / S[0]
            color = _between(i / max(len(modules) - 1, 1))
            data.append(
                {
                    "type": "scatter",
                    "mode": "lines" if len(S) > 1 else "markers",
                    "x": list(range(1, len(S) + 1)),
                    "y": numbers(S),
                    "xaxis": f"x{axis}",
                    "yaxis": f"y{axis}",
                    "line": {"color": color, "width": 1.5},
                    "marker": {"color": color},
                    "showlegend": False,
                    "name": shown(path),
                    "hovertemplate": "%{fullData.name}<br>σ%{x} = %{y:.3f} σ1<extra></extra>",
                }
            )
            table.append((path, len(S), f"{S[(len(S) - 1) // 2]:.3f}", f"{S[-1]:.3f}"))
    drawn = {
        "grid": {"rows": rows, "columns": columns, "pattern": "independent", "ygap": 0.35},
        "annotations": titles,
        "margin": {"l": 50, "r": 20, "t": 40, "b": 40},
        "height": 60 + 230 * rows,
        "hovermode": "closest",
        **_spectra_axes(len(families), data),
    }
    return Section(
        "spectra",
        "Spectra",
        "Singular values of ΔW beside the largest, σₖ / σ₁ by k, the median over the adapters: a "
        "line for each layer, from violet for the first to green for the last. Steep lines mean "
        "that a smaller rank would do.",
        {"data": data, "layout": drawn} if data else None,
        _left_out(m),
        ("module", "values", "σ at half / σ₁", "last / σ₁"),
        table,
    )


def _spectra_axes(count: int, data: list[dict[str, Any]]) -> dict[str, Any]:
    """Axes of so many small pictures: whole numbers along them, and ticks that tell upwards."""
    longest = max((len(trace["y"]) for trace in data), default=0)
    # Powers of ten; of less than a decade and a half they would be a tick or two.
    least = min((y for trace in data for y in trace["y"]), default=1.0)
    ticks: dict[str, Any] = {"dtick": 1} if least < 0.03 else {}
    axes: dict[str, Any] = {}
    for n in range(count):
        axis = "" if n == 0 else str(n + 1)
        axes[f"xaxis{axis}"] = {"nticks": 5} if longest > 5 else {"dtick": 1}
        axes[f"yaxis{axis}"] = {"type": "log", **ticks, **({"matches": "y"} if n else {})}
    return axes


def energy(m: Measured) -> Section:
    """What share of ‖ΔW‖² the best k directions of each module keep."""
    alive = m.norm() > 0
    kept = m.kept()[alive]
    names = [name for name, has in zip(m.names, alive, strict=True) if has]
    ks = list(range(1, kept.shape[1] + 1))
    if not names:
        return Section("energy", "Energy against rank", "Every update is zero.")
    middle = np.median(kept, axis=0)
    ninety = m.rank_for(0.9)[alive]
    says = (
        f"The best {int(np.median(ninety))} directions of each module keep 90 % of ‖ΔW‖² in the "
        f"median ({span(ninety)}), of rank {span(m.ranks)}."
    )
    drawn = layout(
        "rank kept in each module",
        "share of ‖ΔW‖²",
        yaxis_tickformat=".0%",
        yaxis_rangemode="tozero",
        xaxis_rangemode="tozero",
        height=420,
        **whole_ticks("xaxis", len(ks)),
    )
    rows = [
        (k, f"{kept[:, k - 1].min():.1%}", f"{middle[k - 1]:.1%}", f"{kept[:, k - 1].max():.1%}")
        for k in ks
    ]
    return Section(
        "energy",
        "Energy against rank",
        says,
        {"data": _curves(names, kept), "layout": drawn},
        "",
        ("rank", "least", "median", "most"),
        rows,
    )


def _curves(names: list[str], kept: np.ndarray) -> list[dict[str, Any]]:
    """A line each of a few, quantiles of many; the median last."""
    ks = list(range(1, kept.shape[1] + 1))
    data: list[dict[str, Any]] = []
    if len(names) <= _SINGLE:
        data += [
            {
                "type": "scatter",
                "mode": "lines",
                "x": ks,
                "y": numbers(row),
                "line": {"width": 1},
                "opacity": 0.6,
                "showlegend": False,
                "name": shown(name),
                "hovertemplate": "%{fullData.name}<br>rank %{x}: %{y:.1%}<extra></extra>",
            }
            for name, row in zip(names, kept, strict=True)
        ]
    else:
        low, first, third, high = np.quantile(kept, [0.05, 0.25, 0.75, 0.95], axis=0)
        for lower, upper, label in ((low, high, "5–95 %"), (first, third, "25–75 %")):
            edge = {"type": "scatter", "mode": "lines", "x": ks, "line": {"width": 0}}
            data += [
                {**edge, "y": numbers(upper), "showlegend": False, "hoverinfo": "skip"},
                {
                    **edge,
                    "y": numbers(lower),
                    "fill": "tonexty",
                    "fillcolor": BAND,
                    "name": f"{label} of the adapters",
                    "hoverinfo": "skip",
                },
            ]
    data.append(
        {
            "type": "scatter",
            "mode": "lines+markers",
            "name": "median",
            "x": ks,
            "y": numbers(np.median(kept, axis=0)),
            "line": {"width": 3},
            "meta": {"color": 0},
            "hovertemplate": "median<br>rank %{x}: %{y:.1%}<extra></extra>",
        }
    )
    return data


def norms(m: Measured) -> Section:
    """‖ΔW‖ of each family of modules along the layers."""
    data, table = [], []
    for name, modules in _drawn_families(m).items():
        layers = [(d, j) for d, j in modules if d is not None]
        middle, low, high = (
            np.array([np.nanquantile(m.norms[:, j], q) for _, j in modules])
            for q in (0.5, 0.25, 0.75)
        )
        table += [
            (m.paths[j], f"{x:.4g}", f"{lo:.4g}", f"{hi:.4g}")
            for (_, j), x, lo, hi in zip(modules, middle, low, high, strict=True)
        ]
        if not layers:
            continue
        keep = [k for k, (d, _) in enumerate(modules) if d is not None]
        data.append(
            {
                "type": "scatter",
                "mode": "lines+markers",
                "name": shown(name, 28),
                "x": [d for d, _ in layers],
                "y": numbers(middle[keep]),
                "customdata": [
                    [shown(m.paths[j]), *pair]
                    for (_, j), *pair in zip(
                        layers, numbers(low[keep]), numbers(high[keep]), strict=True
                    )
                ],
                "hovertemplate": "%{customdata[0]}<br>median %{y:.3g}<br>half of the adapters lie "
                "in %{customdata[1]:.3g}–%{customdata[2]:.3g}<extra></extra>",
            }
        )
    note = _left_out(m)
    without = sum(d is None for modules in by_family(m.paths).values() for d, _ in modules)
    if without:
        note = f"{note} Modules outside the layers are in the numbers only: {without}.".strip()
    biggest = max(table, key=lambda row: float(row[1]), default=None)
    says = "‖ΔW‖ of each module, the median over the adapters, by the layer it is in."
    if biggest is not None:
        says += f" The largest is {shortened(biggest[0])}, {biggest[1]}."
    drawn = layout("layer", "‖ΔW‖", yaxis_rangemode="tozero", height=440, **_layers(m.paths))
    drawn["legend"] = {"orientation": "h", "y": -0.2}
    return Section(
        "norms",
        "Norms along depth",
        says,
        {"data": data, "layout": drawn} if data else None,
        note,
        ("module", "median", "first quarter", "last quarter"),
        table,
    )


def anomalies(found: Mapping[str, Anatomy], total: int) -> Section:
    """Modules that stand out from their family at their depth."""
    flagged = [(name, a) for name, anatomy in found.items() for a in anatomy.anomalies]
    flagged.sort(key=lambda pair: -abs(pair[1].z))
    layers = {m.path: m.depth for anatomy in found.values() for m in anatomy.modules}
    owners = len({name for name, _ in flagged})
    looked_at = counted(len(found), "adapter")
    says = (
        f"{counted(len(flagged), 'value')} in {owners} of {looked_at} stand out from the same "
        "kind of module in the other layers, by a robust z."
        if flagged
        else f"No module of {looked_at} stands out from its kind in the other layers."
    )
    note = ""
    if len(found) < total:
        note = (
            f"{len(found)} of {total:,} adapters were looked at: half have the most unusual norms "
            "of modules, the rest is spread evenly over the collection."
        )
    if flagged[_POINTS:]:
        note = f"{note} The {_POINTS} furthest of {len(flagged):,} are drawn.".strip()
    rows = [
        (
            n,
            a.path,
            a.measure.replace("_", " "),
            f"{a.value:.4g}",
            f"{a.expected:.4g}",
            f"{a.z:.1f}",
        )
        for n, a in flagged
    ]
    axes = layout("layer", "robust z", height=400, **_layers(list(layers)))
    picture = {"data": _points(flagged[:_POINTS], layers), "layout": axes}
    return Section(
        "anomalies",
        "Anomalies",
        says,
        picture if flagged else None,
        note,
        ("adapter", "module", "what", "value", "expected", "z"),
        rows,
    )


def _points(
    flagged: list[tuple[str, Anomaly]], layers: Mapping[str, int | None]
) -> list[dict[str, Any]]:
    """A cloud of points for each measure; those outside the layers are in the numbers only."""
    data = []
    for measure in sorted({a.measure for _, a in flagged}):
        label = measure.replace("_", " ")
        drawn = [(name, a) for name, a in flagged if a.measure == measure]
        data.append(
            {
                "type": "scatter",
                "mode": "markers",
                "name": label,
                "x": [layers[a.path] for _, a in drawn],
                "y": numbers([a.z for _, a in drawn]),
                "marker": {"size": 8, "opacity": 0.8},
                "customdata": [
                    [shown(name), shown(a.path), *numbers([a.value, a.expected])]
                    for name, a in drawn
                ],
                "hovertemplate": "%{customdata[0]}<br>%{customdata[1]}<br>"
                f"{label} %{{customdata[2]}}, expected %{{customdata[3]}}"
                "<br>z = %{y:.1f}<extra></extra>",
            }
        )
    return data


# Families of modules


def _drawn_families(m: Measured) -> dict[str, list[tuple[int | None, int]]]:
    """The families with the most energy, those that any adapter has, in the order of paths."""
    found = by_family(m.paths)
    squares = np.nansum(m.norms**2, axis=0)
    weight = {name: sum(squares[j] for _, j in modules) for name, modules in found.items()}
    kept = sorted(found, key=lambda name: -weight[name])[:_FAMILIES]
    return {
        name: [x for x in found[name] if m.paths[x[1]] in m.spectra]
        for name in found
        if name in kept
    }


def _layers(paths: list[str]) -> dict[str, Any]:
    """An axis of all layers, with whole numbers along it."""
    depths = [d for modules in by_family(paths).values() for d, _ in modules if d is not None]
    low, high = min(depths, default=0), max(depths, default=0)
    axis: dict[str, Any] = {"xaxis_range": [low - 0.5, high + 0.5]}
    return axis | ({"xaxis_dtick": 1} if high - low <= 24 else {})


def _left_out(m: Measured) -> str:
    families = by_family(m.paths)
    notes = []
    if len(families) > _FAMILIES:
        notes.append(f"The {_FAMILIES} of {len(families)} kinds of module with the largest norms.")
    deepest = max((len(modules) for modules in families.values()), default=0)
    if deepest > _LAYERS:
        notes.append(f"Of {deepest} layers {_LAYERS} spectra are drawn, evenly spaced.")
    return " ".join(notes)


def _title(family: str, axis: str) -> dict[str, Any]:
    return {
        "text": shown(family, 26),
        "xref": f"x{axis} domain",
        "yref": f"y{axis} domain",
        "x": 0,
        "y": 1.02,
        "xanchor": "left",
        "yanchor": "bottom",
        "showarrow": False,
        "font": {"size": 12},
    }


def _between(place: float) -> str:
    """The colour of a depth in 0 … 1."""
    at = place * (len(_DEPTHS) - 1)
    low = min(int(at), len(_DEPTHS) - 2)
    ends = [[int(_DEPTHS[k][i : i + 2], 16) for i in (1, 3, 5)] for k in (low, low + 1)]
    mixed = [round(a + (at - low) * (b - a)) for a, b in zip(*ends, strict=True)]
    return "#" + "".join(f"{c:02x}" for c in mixed)
