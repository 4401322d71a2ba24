"""Pictures of how adapters stand to one another: likeness, starts, shared directions, bytes."""

from __future__ import annotations

from typing import Any

import numpy as np

from ..compare import SharedSpectrum, Similarity
from .costs import Costs
from .measured import Measured
from .order import cluster_order, nearest, sample
from .section import Section, counted, distinct, layout, numbers, shortened, shown, whole_ticks

_MAP = 256  # adapters on the map, at most: 65,536 cells
_NAMED = 60  # names along its sides, at most
_LETTERS = 22  # of such a name
_GROUPS = 15  # with one start, drawn at most
_PAIRS = 40  # listed
_MEMBERS = 12  # names of a group that are listed

SIDES = {"V": "A", "U": "B", "in": "inputs (A)", "out": "outputs (B)"}


def similarity_map(s: Similarity, threshold: float) -> Section:
    """Cosines of ΔW of all pairs, like beside like."""
    rows = sample(nearest(s.matrix)[1], _MAP)
    rows = rows[cluster_order(s.matrix[np.ix_(rows, rows)])]
    names = distinct(shown(s.names[i]) for i in rows)
    near = _nearest_pairs(s)
    note = ""
    if len(rows) < len(s.names):
        note = (
            f"{len(rows)} of {len(s.names):,} adapters are drawn: half are those most like another "
            "one, the rest is spread evenly over the collection. The table below names each one's "
            "nearest."
        )
    ticks = {"type": "category", "showgrid": False, "automargin": True}
    if len(rows) <= _NAMED:
        short = [shown(s.names[i], _LETTERS) for i in rows]
        ticks |= {"tickvals": names, "ticktext": short, "tickfont": {"size": 10}}
    else:
        ticks |= {"showticklabels": False, "ticks": ""}
    drawn = {
        "type": "heatmap",
        "x": names,
        "y": names,
        "z": [numbers(np.round(row, 3)) for row in s.matrix[np.ix_(rows, rows)]],
        "coloraxis": "coloraxis",
        "hovertemplate": "%{y}<br>%{x}<br>cosine %{z:.3f}<extra></extra>",
    }
    figure = {
        "data": [drawn],
        "layout": {
            "xaxis": {**ticks, "tickangle": -60},
            "yaxis": {**ticks, "autorange": "reversed"},
            "coloraxis": {"cmin": -1, "cmax": 1, "colorbar": {"title": {"text": "cosine"}}},
            "margin": {"l": 60, "r": 20, "t": 20, "b": 60},
            "height": 720,
        },
    }
    return Section(
        "similarity",
        "Who is like whom",
        _said_of_pairs(s, near, threshold),
        figure,
        note,
        ("adapter", "and", "cosine"),
        [(s.names[i], s.names[j], f"{s.matrix[i, j]:.3f}") for i, j in near],
    )


def _nearest_pairs(s: Similarity) -> list[tuple[int, int]]:
    """The pairs with the largest cosines, positions of the two."""
    upper = np.where(np.triu(np.ones(s.matrix.shape, bool), 1), s.matrix, -np.inf)
    most = min(_PAIRS, len(s.names) * (len(s.names) - 1) // 2)
    least = np.partition(upper, -most, axis=None)[-most]
    found = np.argwhere(upper >= least)
    order = np.argsort(-upper[tuple(found.T)], kind="stable")[:most]
    return [(int(i), int(j)) for i, j in found[order]]


def _said_of_pairs(s: Similarity, near: list[tuple[int, int]], threshold: float) -> str:
    pairs = int((np.triu(s.matrix, 1) >= threshold).sum())
    clusters = sum(len(c) > 1 for c in s.clusters(threshold))
    i, j = near[0]
    says = "Cosine of ΔW of every pair. "
    says += (
        f"{counted(pairs, 'pair')} of adapters at {threshold:g} or above make "
        f"{counted(clusters, 'cluster')}. "
        if pairs
        else f"No pair reaches {threshold:g}; the nearest are {shortened(s.names[i], 40)} and "
        f"{shortened(s.names[j], 40)}, {s.matrix[i, j]:.2f}. "
    )
    says += "Unrelated adapters stand near 0, whatever they started from."
    if s.error:
        says += (
            f" Cosines far below that are sketched, to ±{2 * s.error:.2g}; the others are exact."
        )
    return says


def starts(m: Measured) -> Section:
    """Which adapters started from the same A or B."""
    found: list[tuple[str, list[str]]] = []
    for side, groups in m.groups.items():
        for number in range(int(groups.max(initial=-1)) + 1):
            label = f"{SIDES[side]}, group {number + 1}"  # as in the table of adapters
            found.append((label, [m.names[i] for i in np.flatnonzero(groups == number)]))
    found.sort(key=lambda group: -len(group[1]))
    kept = found[:_GROUPS]
    together = {side: int((groups >= 0).sum()) for side, groups in m.groups.items()}
    says = (
        "No two adapters started from the same factors."
        if not found
        else "; ".join(
            f"{n} of {len(m.names):,} adapters share the start of {SIDES[side]} with another"
            for side, n in together.items()
            if n
        )
        + ". Such adapters keep one row or column space; that alone does not make them alike."
    )
    figure = None
    if found:
        figure = {
            "data": [
                {
                    "type": "bar",
                    "orientation": "h",
                    "y": [label for label, _ in kept],
                    "x": [len(members) for _, members in kept],
                    "customdata": [_members(members, as_text=False) for _, members in kept],
                    "hovertemplate": "%{y}: %{x} adapters<br>%{customdata}<extra></extra>",
                }
            ],
            "layout": layout(
                "adapters",
                "",
                yaxis_autorange="reversed",
                yaxis_type="category",
                **whole_ticks("xaxis", max(len(members) for _, members in kept)),
                bargap=0.4,
                height=120 + 26 * len(kept),
            ),
        }
    note = (
        f"The {len(kept)} largest of {len(found)} groups are drawn." if found[len(kept) :] else ""
    )
    rows = [(label, len(members), _members(members)) for label, members in found]
    return Section(
        "starts", "Common starts", says, figure, note, ("group", "adapters", "which"), rows
    )


def _members(names: list[str], as_text: bool = True) -> str:
    rest = len(names) - _MEMBERS
    # One name after another on the page; one below another beside the mouse.
    named = [n if as_text else shown(n, 40) for n in names[:_MEMBERS]]
    return (", " if as_text else "<br>").join(named + ([f"and {rest:,} more"] if rest > 0 else []))


def shared(s: SharedSpectrum) -> Section:
    """How much of the collection's energy k shared directions explain, with a control."""
    sides: dict[str, list[Any]] = {}
    for row in s.rows:
        sides.setdefault(row.side, []).append(row)
    data, table = [], []
    for n, (side, rows) in enumerate(sides.items()):
        most, weights = max(len(row.energy) for row in rows), [row.size for row in rows]
        ks = np.unique(np.geomspace(1, most, 48).round().astype(int))
        for name, dash in (("energy", "solid"), ("control", "dash")):
            curves = [_at(getattr(row, name), ks) for row in rows]
            shares = np.average(curves, axis=0, weights=weights if sum(weights) > 0 else None)
            label = SIDES.get(side, side) + (", random" if name == "control" else "")
            data.append(
                {
                    "type": "scatter",
                    "mode": "lines",
                    "name": label,
                    "legendgroup": side,
                    "line": {"dash": dash},
                    "meta": {"color": n},
                    "x": ks.tolist(),
                    "y": numbers(shares),
                    "hovertemplate": f"{label}<br>%{{x}} directions: %{{y:.1%}}<extra></extra>",
                }
            )
            table += [(label, int(k), f"{share:.1%}") for k, share in zip(ks, shares, strict=True)]
    k = min(16, *(len(row.energy) for row in s.rows)) if s.rows else 0
    says = (
        f"{k} shared directions a side explain {s.share(k):.0%} of the energy, and "
        f"{s.control(k):.0%} where the adapters are random ones of the same spectra. Only what "
        "lies above the control is shared."
        if k
        else "There is nothing to share."
    )
    drawn = layout(
        "shared directions of a module's side",
        "share of the energy",
        xaxis_type="log",
        xaxis_tickvals=[2**n for n in range(16)],
        yaxis_tickformat=".0%",
        yaxis_range=[0, 1.02],
        height=420,
    )
    return Section(
        "shared",
        "What is shared",
        says,
        {"data": data, "layout": drawn},
        "Means over the modules, by their energy.",
        ("side", "directions", "energy"),
        table,
    )


def _at(cumulative: np.ndarray, ks: np.ndarray) -> np.ndarray:
    """The curve at ks; from its end on, its last value."""
    curve: np.ndarray = np.asarray(cumulative)[np.minimum(ks, len(cumulative)) - 1]
    return curve


def bytes_against_error(c: Costs, total: int) -> Section:
    """What each form of folding takes, on a sample."""
    forms: dict[str, list[Any]] = {}
    for cost in c.costs:
        forms.setdefault(cost.form, []).append(cost)
    data = [
        {
            "type": "scatter",
            "mode": "lines+markers",
            "name": form,
            "x": numbers([x.error for x in found]),
            "y": numbers([x.nbytes / c.float16 for x in found]),
            "customdata": [f"{x.nbytes / 1024:,.0f} KiB" for x in found],
            "hovertemplate": f"{form}<br>error %{{x:.1%}}<br>%{{y:.1%}} of float16, "
            "%{customdata}<extra></extra>",
        }
        for form, found in forms.items()
    ]
    drawn = layout(
        "largest error of an adapter, ‖ΔŴ − ΔW‖ / ‖ΔW‖",
        "bytes, as a share of float16",
        xaxis_tickformat=".0%",
        yaxis_tickformat=".0%",
        yaxis_rangemode="tozero",
        height=420,
    )
    at = {x.form: x for x in c.costs if x.tolerance == 0.1}
    says = "No form holds this sample."
    if at:
        best = min(at, key=lambda f: at[f].nbytes)
        share = at[best].nbytes / c.float16
        says = (
            f"At 10 % error the smallest form is {best}: {share:.0%} of the factors in float16. A "
            "library that is folded with the form auto has the smallest for each module."
        )
    note = (
        f"Folded in memory: {len(c.names)} of {total:,} adapters, {len(c.modules)} modules. In a "
        "larger collection shared sides cost less per adapter."
    )
    for form, reason in c.failed.items():
        note += f" {form} is not drawn: {shortened(reason, 160)}."
    rows = [
        (
            x.form,
            f"{x.tolerance:g}",
            f"{x.error:.2%}",
            f"{x.nbytes:,}",
            f"{x.nbytes / c.float16:.1%}",
        )
        for x in c.costs
    ]
    return Section(
        "bytes",
        "Bytes against error",
        says,
        {"data": data, "layout": drawn} if data else None,
        note,
        ("form", "tolerance", "error", "bytes", "of float16"),
        rows,
    )
