"""Collections to report on, and pages made of them."""

from __future__ import annotations

import pytest

import lorafold as lf
from lorafold.report import costs

ROLES = {"self_attn.q_proj": (64, 128), "mlp.up_proj": (96, 128)}
# Names that are markup somewhere: in HTML, to plotly, to matplotlib, on a terminal.
NASTY = [
    "<script>alert(1)</script>",
    "<b>bold</b>",
    "</script><img src=x onerror=alert(1)>",
    "%{x} %{customdata}",
    "$x_1$",
    "two\nlines",
    '"quoted" & more',
    "naïve ΔW",
]


def _shapes(layers):
    return {f"model.layers.{n}.{role}": s for n in range(layers) for role, s in ROLES.items()}


@pytest.fixture(scope="session")
def shapes():
    """shapes(layers) -> {path: (out, in)} of two roles."""
    return _shapes


@pytest.fixture(scope="session")
def nasty():
    """Names that are markup."""
    return NASTY


@pytest.fixture(autouse=True, scope="session")
def _few_folds():
    """Folding a sample is most of a report's work: the test of it has all forms and tolerances."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(costs, "FORMS", ("svd", "shared"))
        patch.setattr(costs, "TOLERANCES", (0.2, 0.1))
        yield


@pytest.fixture(scope="session")
def collection(make_adapter):
    """collection(count, layers=4) -> {name: Adapter}: the first two alike, some from one start."""

    def make(count, layers=4):
        names = [*NASTY, *(f"adapter-{i:03}" for i in range(count))][:count]
        made = {
            name: make_adapter(_shapes(layers), 2 + i % 3, seed=i, base_model="base")
            for i, name in enumerate(names)
        }
        if count > 1:
            made[names[1]] = 1.5 * made[names[0]]
        start = made[names[-1]]
        for name in names[max(2, count - 4) : -1]:  # the same A, another B
            own = made[name]
            made[name] = lf.Adapter(
                {
                    p: lf.LowRank(u.A, own[p].B[:, :1].expand(-1, u.rank).contiguous(), u.scale)
                    for p, u in start.items()
                },
                base_model="base",
            )
        return made

    return make
