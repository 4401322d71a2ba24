"""Pictures for notebooks and papers: each takes matplotlib axes and returns them.

    fig, axes = plt.subplots(1, 2)
    lf.plot.spectrum(adapter, axes[0])

Without axes, a new figure is made. Names are drawn as they are, `$` and `_` too.
"""

from __future__ import annotations

import math
from collections.abc import Iterable
from typing import TYPE_CHECKING, Any

import numpy as np

from ..adapter import Adapter
from ..collection.sources import named_handles
from ..compare import Anatomy, ModuleAnatomy, Similarity
from ..compare import anatomy as anatomy_of
from ..errors import MismatchError, MissingExtraError
from ..words import escaped
from .measured import by_family, measured
from .order import cluster_order
from .section import shortened

if TYPE_CHECKING:
    from matplotlib.axes import Axes

_NAMED = 40  # adapters with their names along a map, at most
_LINES = 24  # adapters with a line each, at most; more are drawn as quantiles


def spectrum(adapter: Adapter, ax: Axes | None = None) -> Axes:
    """Singular values of ΔW of each module, beside the module's largest.

    Args:
        adapter: whose. ax: where to draw; a new figure's by default.

    Returns:
        The axes; a line a module, one colour a family, faint for the first layers.

    Raises:
        RefusedError: ΔW algebra would be wrong for this adapter.
        MissingExtraError: matplotlib is not installed.

    Not for: many adapters at once (`rank_curve`).

    Examples:
        >>> import torch
        >>> import lorafold as lf
        >>> a = lf.Adapter({"layers.0.q_proj": lf.LowRank(torch.randn(2, 8), torch.randn(4, 2))})
        >>> lf.plot.spectrum(a).get_ylabel()
        'σₖ / σ₁'
    """
    _checked(adapter, Adapter, "an Adapter")
    found = adapter.spectrum()
    ax = _axes(ax)
    paths = list(found)
    for n, (family, modules) in enumerate(by_family(paths).items()):
        for k, (_, j) in enumerate(modules):
            S = found[paths[j]].double().cpu().numpy()
            S = S[S > 0]
            ax.plot(
                np.arange(1, len(S) + 1),
                S / S[0] if len(S) else S,
                color=f"C{n}",
                alpha=0.3 + 0.7 * (k + 1) / len(modules),
                linewidth=1.2,
                marker="." if len(S) < 3 else None,
                label=_plain(family) if k + 1 == len(modules) else None,
            )
    ax.set(xlabel="k", ylabel="σₖ / σ₁", yscale="log")
    _legend(ax)
    return ax


def rank_curve(sources: Any, ax: Axes | None = None) -> Axes:
    """Share of ‖ΔW‖² that the best k directions of each module keep, for each adapter.

    Args:
        sources: paths, globs, `Adapter`s, or {name: any}; read module by module.
        ax: where to draw; a new figure's by default.

    Returns:
        The axes: a line an adapter, beyond 24 quantiles instead; the median is thick.

    Raises:
        MismatchError: no sources, or adapters that disagree. RefusedError: ΔW algebra would be
            wrong for every source.
        MissingExtraError: matplotlib is not installed.

    Not for: choosing a rank for one adapter by an error: `Adapter.resize(tolerance=…)`.

    Examples:
        >>> import torch
        >>> import lorafold as lf
        >>> a = lf.Adapter({"layers.0.q_proj": lf.LowRank(torch.randn(2, 8), torch.randn(4, 2))})
        >>> lf.plot.rank_curve({"sql": a}).get_xlabel()
        'rank kept in each module'
    """
    m = measured(named_handles(sources))
    ax = _axes(ax)
    kept = m.kept()[m.norm() > 0]
    if not len(kept):
        raise MismatchError("there is no curve to draw: every update is zero")
    ks = np.arange(1, kept.shape[1] + 1)
    if len(kept) <= _LINES:
        ax.plot(ks, kept.T, color="C0", alpha=0.35, linewidth=1)
    else:
        for low, high in ((0.05, 0.95), (0.25, 0.75)):
            ax.fill_between(
                ks,
                *np.quantile(kept, [low, high], axis=0),
                color="C0",
                alpha=0.2,
                linewidth=0,
                label=f"{low:.0%} to {high:.0%} of the adapters",
            )
    ax.plot(ks, np.median(kept, axis=0), color="C0", linewidth=2.5, marker=".", label="median")
    ax.set(xlabel="rank kept in each module", ylabel="share of ‖ΔW‖²", ylim=(0, 1.02))
    ax.legend(frameon=False)
    return ax


def similarity(s: Similarity, ax: Axes | None = None) -> Axes:
    """The map of cosines of ΔW, like beside like.

    Args:
        s: what `lf.similarity` gives. ax: where to draw; a new figure's by default.

    Returns:
        The axes. Beyond 40 adapters names are left out.

    Raises:
        MissingExtraError: matplotlib or scipy is not installed.

    Not for: finding out who a cell is (`s.nearest`, or the page that `lf.report` writes).

    Examples:
        >>> import torch
        >>> import lorafold as lf
        >>> a = lf.Adapter({"layers.0.q_proj": lf.LowRank(torch.randn(2, 8), torch.randn(4, 2))})
        >>> ax = lf.plot.similarity(lf.similarity({"sql": a, "law": 2 * a}))
        >>> [label.get_text() for label in ax.get_yticklabels()]
        ['sql', 'law']
    """
    _checked(s, Similarity, "what lf.similarity gives")
    ax = _axes(ax)
    order = cluster_order(s.matrix)
    image = ax.imshow(s.matrix[np.ix_(order, order)], cmap="RdBu", vmin=-1, vmax=1)
    ax.figure.colorbar(image, ax=ax, label="cosine of ΔW")
    if len(order) <= _NAMED:
        names = [_plain(shortened(s.names[i], 22)) for i in order]
        size = "medium" if len(names) <= 16 else "x-small"
        ax.set_xticks(range(len(names)), names, rotation=90, fontsize=size)
        ax.set_yticks(range(len(names)), names, fontsize=size)
    else:
        ax.set(xlabel=f"{len(order):,} adapters, in the order of clusters", xticks=[], yticks=[])
    return ax


def anatomy(a: Adapter | Anatomy, ax: Axes | None = None) -> Axes:
    """‖ΔW‖ of each module along depth, a line a family; what stands out is ringed.

    Args:
        a: an adapter, or what `lf.anatomy` gives. ax: where to draw; a new figure's by default.

    Returns:
        The axes. Modules outside the layers are left out.

    Raises:
        RefusedError: ΔW algebra would be wrong for this adapter.
        MissingExtraError: matplotlib is not installed.

    Not for: the other measures; `lf.anatomy(a).modules` has them.

    Examples:
        >>> import torch
        >>> import lorafold as lf
        >>> u = lambda: lf.LowRank(torch.randn(2, 8), torch.randn(4, 2))
        >>> ax = lf.plot.anatomy(lf.Adapter({f"layers.{n}.q_proj": u() for n in range(3)}))
        >>> ax.get_xlabel(), ax.get_ylabel()
        ('layer', '‖ΔW‖')
    """
    if isinstance(a, Adapter):
        a = anatomy_of(a)
    _checked(a, Anatomy, "an Adapter or what lf.anatomy gives")
    ax = _axes(ax)
    for family, modules in a.families.items():
        places = _places(modules)
        if places:
            ax.plot(*zip(*places, strict=True), marker=".", label=_plain(family))
    odd = {x.path for x in a.anomalies}
    ringed = _places([m for m in a.modules if m.path in odd])
    if ringed:
        ax.scatter(
            [depth for depth, _ in ringed],
            [norm for _, norm in ringed],
            s=90,
            facecolors="none",
            edgecolors="C3",
            linewidths=1.5,
            label="stands out",
            zorder=3,
        )
    ax.set(xlabel="layer", ylabel="‖ΔW‖")
    ax.set_ylim(bottom=0)
    ax.locator_params(axis="x", integer=True)
    _legend(ax)
    return ax


def _places(modules: Iterable[ModuleAnatomy]) -> list[tuple[int, float]]:
    """(layer, ‖ΔW‖) of those that are in a layer."""
    return [(m.depth, m.norm) for m in modules if m.depth is not None]


def _axes(ax: Axes | None) -> Axes:
    if ax is not None:
        return ax
    axes: Axes = _pyplot().subplots(layout="constrained")[1]
    return axes


def _pyplot() -> Any:
    try:
        from matplotlib import pyplot
    except ImportError:
        raise MissingExtraError(
            "pictures are matplotlib's, which is not there: pip install 'lorafold[plot]'"
        ) from None
    return pyplot


def _legend(ax: Axes) -> None:
    entries = ax.get_legend_handles_labels()[1]
    if entries:
        ax.legend(frameon=False, fontsize="small", ncols=math.ceil(len(entries) / 8))


def _plain(text: str) -> str:
    """A name as it is: matplotlib would take what stands between dollars for a formula."""
    return escaped(text).replace("$", r"\$")


def _checked(value: Any, kind: type, what: str) -> None:
    if not isinstance(value, kind):
        raise MismatchError(f"expected {what}, found {type(value).__name__}")
