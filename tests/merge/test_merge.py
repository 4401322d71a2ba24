"""`lf.merge`: the laws of every rule, on adapters of mixed ranks, against dense references."""

from __future__ import annotations

import importlib.util
import json
import warnings
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors import safe_open

import lorafold as lf
from lorafold.merge.methods import METHODS
from lorafold.merge.provenance import facts_of

_spec = importlib.util.spec_from_file_location("ref", Path(__file__).with_name("reference.py"))
ref = importlib.util.module_from_spec(_spec)
_spec.loader.exec_module(ref)

SHAPE = {"l.q": (24, 40)}
# What can be asked of any method without more than adapters.
# A merge that leaves nothing says so, and warnings are errors here.
NOTHING_LEFT = pytest.mark.filterwarnings("ignore:the merged adapter's updates are all zero")
PLAIN = [m for m in METHODS if m not in ("slerp", "lorahub", "regmean")]
ENTRYWISE = ["magnitude", "ties", "dare", "dare_ties", "della", "breadcrumbs"]


def grams(of_one):
    """The same for each of `three`."""
    return {"sql": of_one, "law": of_one, "art": of_one}


def quietly(*args, **kwargs):
    """`lf.merge`, where modules that are missing are meant to be."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return lf.merge(*args, **kwargs)


def lifted(deltas, rule):
    U, V, cores = ref.joint(deltas)
    return U @ rule(cores) @ V.T


def references(deltas, paths, adapters, rule):
    return {p: rule(deltas(adapters, p)) for p in paths}


@pytest.fixture
def copies(make_update):
    """copies(n) -> {name: the same adapter in n gauges}, and the adapter: σ = 5, 3, 2, 1."""
    u = make_update(24, 40, 4, seed=5, spectrum=(5.0, 3.0, 2.0, 1.0))

    def made(n):
        found = {}
        for i in range(n):
            G = torch.from_numpy(np.random.default_rng(i).standard_normal((4, 4)) + 3 * np.eye(4))
            v = lf.LowRank(torch.linalg.solve(G, u.A.double()), u.B.double() @ G, u.scale)
            found[f"copy{i}"] = lf.Adapter({"l.q": v})
        return found, lf.Adapter({"l.q": u})

    return made


# Each rule, against dense algebra


@pytest.mark.parametrize("weights", [None, [0.7, 0.3, 0.25], [1.0, -0.5, 2.0]])
@pytest.mark.parametrize("space", ["core", "delta"])
def test_linear_is_the_weighted_sum(three, deltas, off, weights, space):
    w = weights or [1 / 3] * 3
    merged = quietly(three, "linear", weights=weights, space=space)
    paths = list(three["sql"])
    wanted = {p: sum(x * d for x, d in zip(w, deltas(three, p), strict=True)) for p in paths}
    assert off(merged, wanted) < 1e-6
    assert merged["layers.0.q"].rank == 26


@pytest.mark.parametrize("weights", [None, [0.5, 1.0, -0.75]])
@pytest.mark.parametrize(
    ("method", "options", "rule"),
    [
        (
            "magnitude",
            {"density": 0.3},
            lambda xs, w: sum(a * ref.top(x, 0.3) for a, x in zip(w, xs, strict=True)),
        ),
        ("ties", {}, lambda xs, w: ref.ties(xs, w, 0.5)),
        ("ties", {"drop_rate": 0.8}, lambda xs, w: ref.ties(xs, w, 0.2)),
        (
            "breadcrumbs",
            {"density": 0.5, "gamma": 0.1},
            lambda xs, w: sum(a * ref.middle(x, 0.5, 0.1) for a, x in zip(w, xs, strict=True)),
        ),
        ("tsv", {}, ref.tsv),
        ("iso_c", {}, ref.iso_c),
        ("iso_cts", {}, lambda xs, w: ref.iso_cts(xs, w, 0.8)),
        ("iso_cts", {"common": 0.5}, lambda xs, w: ref.iso_cts(xs, w, 0.5)),
    ],
    ids=lambda x: x if isinstance(x, str) else "",
)
def test_rules_in_core_are_the_published_ones_there(
    three, deltas, off, method, options, rule, weights
):
    w = weights or [1.0 if METHODS[method].counts == "sum" else 1 / 3] * 3
    merged = quietly(three, method, weights=weights, **options)
    wanted = {p: lifted(deltas(three, p), lambda cs: rule(cs, w)) for p in three["sql"]}
    assert off(merged, wanted) < 1e-5


@pytest.mark.parametrize("weights", [None, [0.5, 1.0, -0.75]])
def test_knots_is_one_svd_side_by_side(three, deltas, off, weights):
    merged = quietly(three, "knots", weights=weights, density=0.4)
    w = weights or [1 / 3] * 3
    wanted = {p: ref.knots(deltas(three, p), w, 0.4) for p in three["sql"]}
    assert off(merged, wanted) < 1e-5


@pytest.fixture
def uniforms(monkeypatch):
    """Random numbers that both sides can have: {(path, adapter): array}."""
    from lorafold.merge.algebra.core import Members

    given = {}

    def draw(self, i, shape, side=""):
        given[self.path, i] = np.random.default_rng([i, *self.path.encode()]).random(tuple(shape))
        return torch.from_numpy(given[self.path, i])

    monkeypatch.setattr(Members, "uniforms", draw)
    return given


def dropped(xs, path, given, density):
    """DARE: what is left of each with these random numbers, made up for."""
    none = np.ones_like(xs[0])
    return [x * (given.get((path, i), none) < density) / density for i, x in enumerate(xs)]


@pytest.mark.parametrize("rule", ["dare", "dare_ties"])
def test_knots_takes_other_rules(three, deltas, off, uniforms, rule):
    merged = quietly(three, "knots", rule=rule, density=0.4)

    def by_hand(p):
        D = deltas(three, p)
        U, s, Vh = ref.svd(np.hstack(D))
        kept = dropped(np.split(s[:, None] * Vh, len(D), axis=1), p, uniforms, 0.4)
        return U @ (sum(kept) / 3 if rule == "dare" else ref.disjoint(kept, [1 / 3] * 3))

    assert off(merged, {p: by_hand(p) for p in three["sql"]}) < 1e-5


@pytest.mark.parametrize("weights", [[1 / 3] * 3, [0.5, 1.0, -0.75]])
@pytest.mark.parametrize("space", ["core", "delta"])
@pytest.mark.parametrize("method", ["dare", "dare_ties", "della", "breadcrumbs"])
def test_rules_that_drop_are_the_published_ones(
    three, deltas, off, uniforms, method, space, weights
):
    """On entries of ΔW as on cores, with the same random numbers."""
    whole = {"rank": 40} if space == "delta" else {}
    merged = quietly(three, method, space=space, weights=weights, density=0.6, **whole)

    def rule(xs, p):
        if method == "breadcrumbs":
            return sum(w * ref.middle(x, 0.6, 0.01) for w, x in zip(weights, xs, strict=True))
        if method == "della":
            none = np.zeros_like(xs[0])
            us = [uniforms.get((p, i), none) for i in range(len(xs))]
            return ref.della(xs, weights, 0.6, 0.15, us)
        kept = dropped(xs, p, uniforms, 0.6)
        if method == "dare_ties":
            return ref.disjoint(kept, weights)
        return sum(w * x for w, x in zip(weights, kept, strict=True))

    def by_hand(p):
        D = deltas(three, p)
        return rule(D, p) if space == "delta" else lifted(D, lambda cores: rule(cores, p))

    assert off(merged, {p: by_hand(p) for p in three["sql"]}) < 1e-5


@pytest.mark.parametrize("beta", [0.0, 0.5, 1.0])
def test_ctm_is_the_rule_in_tucker_coordinates(make_adapter, deltas, off, beta):
    kin = {n: make_adapter(SHAPE, r, seed=i) for i, (n, r) in enumerate({"a": 2, "b": 5}.items())}
    kin["c"] = kin["a"] + 0.3 * kin["b"]
    merged = lf.merge(kin, "ctm", rank=3, rule="ties", density=0.5, beta=beta)
    assert merged.rank == 3
    found = deltas(kin, "l.q")
    w = [1 / 3] * 3
    # Nine numbers: which of them is the fifth is the sweeps' to say, so take five that are clear.
    wanted = ref.ctm(found, w, 3, beta, lambda xs, w: ref.ties(xs, w, 4 / 9))
    assert off(merged, {"l.q": wanted}) < 1e-4


@pytest.mark.parametrize("weights", [None, [0.5, 1.0, -0.75]])
def test_ctm_sums_where_no_rule_is_given(make_adapter, deltas, off, weights):
    some = {n: make_adapter(SHAPE, r, seed=i) for i, (n, r) in enumerate({"a": 2, "b": 5}.items())}
    some["c"] = some["a"] + 0.3 * some["b"]
    merged = lf.merge(some, "ctm", rank=3, weights=weights)
    w = weights or [1 / 3] * 3
    wanted = ref.ctm(
        deltas(some, "l.q"), w, 3, 0.0, lambda xs, w: sum(a * x for a, x in zip(w, xs, strict=True))
    )
    assert off(merged, {"l.q": wanted}) < 1e-4


@pytest.mark.parametrize("weights", [None, [0.5, 1.0, -0.75]])
@pytest.mark.parametrize("rank", [4, 8])
def test_lego_clusters_pieces(make_adapter, deltas, off, rank, weights):
    some = {n: make_adapter(SHAPE, r, seed=i) for i, (n, r) in enumerate({"a": 2, "b": 8}.items())}
    some["c"] = some["a"] + 0.1 * make_adapter(SHAPE, 3, seed=9)
    merged = lf.merge(some, "lego", rank=rank, weights=weights)
    assert merged.rank == rank
    wanted = ref.lego(deltas(some, "l.q"), weights or [1 / 3] * 3, rank)
    assert off(merged, {"l.q": wanted}) < 1e-4


def test_della_keeps_by_rank_in_the_row(three, deltas, off, uniforms):
    merged = quietly(three, "della", density=0.6, epsilon=0.2)
    wanted = {}
    for p in three["sql"]:
        U, V, cores = ref.joint(deltas(three, p))
        # Signs of the bases are free: |entries| and so the masks are the same for any.
        us = [uniforms.get((p, i), np.zeros_like(c)) for i, c in enumerate(cores)]
        wanted[p] = U @ ref.della(cores, [1 / 3] * 3, 0.6, 0.2, us) @ V.T
    assert off(merged, wanted) < 1e-5


@pytest.mark.parametrize("method", ["magnitude", "ties"])
def test_delta_rules_act_on_the_entries(three, deltas, off, method):
    merged = quietly(three, method, space="delta", density=0.3, rank=40)
    w = [1 / 3] * 3
    rule = {"ties": ref.ties, "magnitude": lambda xs, w, d: sum(ref.top(x, d) for x in xs) / 3}
    wanted = {p: rule[method](deltas(three, p), w, 0.3) for p in three["sql"]}
    assert off(merged, wanted) < 1e-5


def test_delta_is_cut_to_its_rank_and_says_what_that_costs(three, deltas, off):
    merged = quietly(three, "ties", space="delta", density=0.3)
    assert merged["layers.0.q"].rank == 24  # Σr = 26, and there are 24 rows
    assert merged["layers.1.q"].rank == 10
    lost = size = 0.0
    for p in three["sql"]:
        D = ref.ties(deltas(three, p), [1 / 3] * 3, 0.3)
        s = np.linalg.svd(D, compute_uv=False)
        lost, size = lost + (s[merged[p].rank :] ** 2).sum(), size + (s**2).sum()
    facts = json.loads(merged.config["lorafold_origin"]["metadata"]["lorafold_merge"])
    assert facts["error"] == pytest.approx((lost / size) ** 0.5, rel=1e-4)


@pytest.mark.parametrize("space", ["core", "delta"])
def test_a_sum_is_cut_as_resize_does(three, space):
    weights = [0.5, 2.0, -1.0]
    whole = quietly(three, weights=weights)
    cut = quietly(three, weights=weights, rank=3, space=space)
    assert cut.rank == 3
    assert cut.distance(whole.resize(rank=3)) < 1e-5 * whole.norm()
    facts = json.loads(cut.config["lorafold_origin"]["metadata"]["lorafold_merge"])
    assert facts["error"] == pytest.approx(whole.distance(cut) / whole.norm(), rel=1e-4)


def test_a_large_delta_is_cut_nearly_as_well(make_adapter, monkeypatch):
    from lorafold.merge.algebra import spaces

    two = {n: make_adapter({"q": (96, 160)}, 4, seed=i) for i, n in enumerate("ab")}
    exact = lf.merge(two, "ties", space="delta", density=0.5)
    monkeypatch.setattr(spaces, "_EXACT", 8)
    quick = lf.merge(two, "ties", space="delta", density=0.5)
    errors = [
        json.loads(m.config["lorafold_origin"]["metadata"]["lorafold_merge"])["error"]
        for m in (exact, quick)
    ]
    assert errors[0] <= errors[1] <= errors[0] * 1.001


@pytest.mark.parametrize("angle", [0.3, 1.2, 2.5])
def test_slerp_runs_along_the_great_circle(make_adapter, deltas, off, angle):
    a, b = make_adapter(SHAPE, 3, seed=1), make_adapter(SHAPE, 2, seed=2)
    a = (1 / a.norm()) * a
    b = b - (a.inner(b)) * a
    c = np.cos(angle) * a + (2 * np.sin(angle) / b.norm()) * b
    c = (1 / c.norm()) * c
    merged = lf.merge({"a": a, "c": c}, "slerp", weights=[0.75, 0.25])
    A, C = deltas({"a": a, "c": c}, "l.q")
    angle_ = np.arccos((A * C).sum())
    wanted = (np.sin(0.75 * angle_) * A + np.sin(0.25 * angle_) * C) / np.sin(angle_)
    assert off(merged, {"l.q": wanted}) < 1e-5
    assert merged.norm() == pytest.approx(1, abs=1e-5)


def test_slerp_along_a_line_where_there_is_no_circle(make_adapter):
    a = make_adapter(SHAPE, 3, seed=1)
    assert lf.merge({"a": a, "b": -a}, "slerp", weights=[3, 1]).distance(0.5 * a) < 1e-5
    with pytest.raises(lf.MismatchError, match="add up to zero"):
        lf.merge({"a": a, "b": -a}, "slerp", weights=[1, -1])


@pytest.mark.parametrize("method", ["linear", "ties", "tsv", "lego", "iso_c"])
def test_pico_damps_what_all_share_and_keeps_the_mean_norm(make_adapter, deltas, off, method):
    a = make_adapter(SHAPE, 3, seed=1)
    some = {
        "a": a,
        "b": make_adapter(SHAPE, 5, seed=2) + 2 * a,
        "c": make_adapter(SHAPE, 2, seed=3),
    }
    merged = lf.merge(some, method, pico=True)
    dense_calm = ref.pico(deltas(some, "l.q"))
    calm = {n: lf.Adapter({"l.q": _exactly(d)}) for n, d in zip(some, dense_calm, strict=True)}
    plain = lf.merge(calm, method)
    mean = np.mean([x.norm() for x in some.values()])
    assert merged.norm() == pytest.approx(mean, rel=1e-5)
    assert merged.distance((mean / plain.norm()) * plain) < 1e-4 * mean


def _exactly(D):
    U, s, Vh = ref.svd(D)
    return lf.LowRank(torch.from_numpy(s[:, None] * Vh), torch.from_numpy(np.ascontiguousarray(U)))


def test_factors_are_peft_s_formula(make_adapter, dense):
    two = {
        n: make_adapter(SHAPE, 4, seed=i, scale=s)
        for i, (n, s) in enumerate({"a": 2, "b": 0.5}.items())
    }
    merged = lf.merge(two, weights=[0.7, -0.3], space="factors")
    root = {n: (abs(w) * s) ** 0.5 for n, w, s in (("a", 0.7, 2), ("b", 0.3, 0.5))}
    A = root["a"] * two["a"]["l.q"].A - root["b"] * two["b"]["l.q"].A
    B = root["a"] * two["a"]["l.q"].B + root["b"] * two["b"]["l.q"].B
    assert torch.allclose(dense(merged["l.q"]), B.double() @ A.double(), atol=1e-5)
    with pytest.raises(lf.MismatchError, match="ranks"):
        lf.merge({"a": two["a"], "c": make_adapter(SHAPE, 2)}, space="factors")


# Copies of one adapter


@pytest.mark.parametrize("n", [2, 3, 8])
@pytest.mark.parametrize("method", ["linear", "magnitude", "ties", "knots", "lego", "ctm"])
def test_copies_give_the_adapter(copies, n, method):
    some, one = copies(n)
    if method == "knots":  # its columns are those of ΔW: what the rule makes of one
        options = {"density": 1.0}
    else:
        options = {"density": 0.25} if method in ("magnitude", "ties") else {}
    assert lf.merge(some, method, **options).distance(one) < 1e-5 * one.norm()


def test_two_copies_give_the_adapter_by_slerp(copies):
    some, one = copies(2)
    assert lf.merge(some, "slerp").distance(one) < 1e-5 * one.norm()


@pytest.mark.parametrize("n", [2, 4])
def test_copies_by_tsv_give_the_best_rank_r_over_n(copies, n):
    some, one = copies(n)
    assert lf.merge(some, "tsv").distance(one.resize(rank=4 // n)) < 1e-5 * one.norm()


@pytest.mark.parametrize("n", [2, 5])
def test_copies_by_iso_c_give_n_times_the_mean(copies, n, off):
    some, one = copies(n)
    U, s, Vh = one["l.q"].svd()
    wanted = n * s.double().mean() * U.double() @ Vh.double()
    assert off(lf.merge(some, "iso_c"), {"l.q": wanted.numpy()}) < 1e-5


@pytest.mark.parametrize("method", ["magnitude", "ties", "breadcrumbs"])
def test_copies_in_delta_give_what_the_rule_makes_of_one(copies, method):
    some, one = copies(3)
    of_one = lf.merge(one, method, space="delta", rank=24)
    assert one.distance(of_one) > 0.1 * one.norm()
    assert lf.merge(some, method, space="delta", rank=24).distance(of_one) < 1e-5 * one.norm()


@pytest.mark.parametrize("space", ["core", "delta", "factors"])
def test_dare_is_right_in_the_mean(make_adapter, space):
    two = {n: make_adapter({"q": (6, 8)}, 2, seed=i, scale=1.0) for i, n in enumerate("ab")}
    target = lf.merge(two, space="factors" if space == "factors" else "core")
    options = {"rank": 6} if space == "delta" else {}
    runs = [lf.merge(two, "dare", density=0.7, seed=s, space=space, **options) for s in range(200)]
    if space == "factors":  # the mean of products is not the product of means: look at A alone
        mean = sum(r["q"].A for r in runs) / len(runs)
        assert torch.linalg.norm(mean - target["q"].A) < 0.1 * torch.linalg.norm(target["q"].A)
        return
    mean = (
        sum((r["q"].dense().double() for r in runs), torch.zeros(6, 8, dtype=torch.float64)) / 200
    )
    wanted = target["q"].dense().double()
    single = torch.linalg.norm(runs[0]["q"].dense().double() - wanted) / torch.linalg.norm(wanted)
    assert torch.linalg.norm(mean - wanted) < 0.15 * torch.linalg.norm(wanted) < single


# What must change nothing


@pytest.mark.parametrize("method", PLAIN)
@pytest.mark.parametrize("pico", [False, True])
def test_gauge_and_order_change_nothing(three, regauged, method, pico):
    merged = quietly(three, method, pico=pico)
    other = {n: regauged(three[n], i) for i, n in enumerate(("art", "sql", "law"))}
    again = quietly(other, method, pico=pico)
    assert again.distance(merged) < 1e-5 * merged.norm()


@pytest.mark.parametrize("method", ENTRYWISE)
def test_gauge_and_order_change_nothing_in_delta(three, regauged, method):
    merged = quietly(three, method, space="delta", rank=24)
    other = {n: regauged(three[n], i) for i, n in enumerate(("art", "sql", "law"))}
    again = quietly(other, method, space="delta", rank=24)
    assert again.distance(merged) < 1e-5 * merged.norm()


def test_gauge_and_order_change_nothing_for_slerp_and_regmean(three, regauged):
    two = {n: three[n] for n in ("sql", "law")}
    other = {n: regauged(three[n], i) for i, n in enumerate(("law", "sql"))}
    g = torch.Generator().manual_seed(0)
    X = {n: torch.randn(99, 40, generator=g) for n in two}
    grams = {n: dict.fromkeys(three["sql"], x.T @ x) for n, x in X.items()}
    weights = {"sql": 0.25, "law": 0.75}
    for method, options in (("slerp", {}), ("regmean", {"grams": grams})):
        merged = lf.merge(two, method, weights=weights, **options)
        again = lf.merge(other, method, weights=weights, **options)
        assert again.distance(merged) < 1e-5 * merged.norm()


@pytest.mark.parametrize("method", PLAIN)
def test_a_bad_gauge_changes_nothing(make_adapter, method):
    """One direction of A is a hundred million times as large as another, and B's as small."""
    some = {n: make_adapter(SHAPE, r, seed=r, dtype=torch.float64) for n, r in (("a", 3), ("b", 4))}
    merged = lf.merge(some, method)
    skewed = {}
    for n, a in some.items():
        u = a["l.q"]
        rng = np.random.default_rng(0)
        Q = torch.from_numpy(np.linalg.qr(rng.standard_normal((u.rank, u.rank)))[0])
        d = torch.logspace(-4, 4, u.rank, dtype=torch.float64)
        G = (Q * d) @ Q.T
        skewed[n] = lf.Adapter({"l.q": lf.LowRank(G @ u.A, u.B @ ((Q / d) @ Q.T), u.scale)})
    assert lf.merge(skewed, method).distance(merged) < 1e-5 * merged.norm()


@pytest.mark.parametrize("space", ["core", "delta"])
@pytest.mark.parametrize("method", ["ties", "dare_ties", "della"])
def test_opposite_updates_elect_one_sign_in_any_gauge(make_adapter, regauged, method, space):
    a = make_adapter(SHAPE, 4, seed=1)
    options = {"density": 0.8, "space": space} | ({"rank": 24} if space == "delta" else {})
    merged = lf.merge({"a": a, "b": -a}, method, **options)
    again = lf.merge({"b": regauged(-a, 1), "a": regauged(a, 2)}, method, **options)
    assert again.distance(merged) < 1e-5 * a.norm()


@pytest.mark.parametrize("others", [[], [2]])
def test_opposite_pieces_are_clustered_alike_in_any_gauge_and_order(make_adapter, regauged, others):
    """Every piece has a twin at the same distance from all that is taken."""
    a = make_adapter(SHAPE, 4, seed=1)
    given = {"a": a, "b": -a, **{f"o{r}": make_adapter(SHAPE, r, seed=r) for r in others}}
    merged = lf.merge(given, "lego")
    again = lf.merge({n: regauged(given[n], i) for i, n in enumerate(reversed(given))}, "lego")
    assert again.distance(merged) < 1e-5 * a.norm()


@pytest.mark.parametrize("method", ["linear", "magnitude", "ctm", "slerp"])
def test_pico_blows_up_no_rounding(make_adapter, regauged, method):
    a = make_adapter(SHAPE, 4, seed=1)
    merged = lf.merge({"a": a, "b": regauged(-a, 1)}, method, pico=True)
    assert merged.norm() < 1e-5 * a.norm()


@pytest.mark.parametrize("method", ["slerp", "ties", "tsv", "lego", "ctm"])
@pytest.mark.parametrize(("size_a", "size_b"), [(1e-30, 1e30), (1e30, 1e-30), (1e19, 1e-19)])
def test_the_size_of_factors_changes_nothing(make_adapter, method, size_a, size_b):
    """A gauge whose products in float32 are infinite, or nothing."""
    a, b = make_adapter(SHAPE, 4, seed=1), make_adapter(SHAPE, 2, seed=2)
    moved = [
        lf.Adapter({p: lf.LowRank(u.A * size_a, u.B * size_b, u.scale) for p, u in x.items()})
        for x in (a, b)
    ]
    wanted = lf.merge([a, b], method)
    assert lf.merge(moved, method).distance(wanted) < 1e-5 * wanted.norm()


def test_gauge_matters_in_factors(three, regauged):
    """The control: what PEFT's rules act on is no property of the update."""
    two = {"a": three["sql"], "b": regauged(three["sql"], 7)}
    merged = lf.merge(two, space="factors")
    assert merged.distance(three["sql"]) > 0.1 * three["sql"].norm()
    assert lf.merge(two).distance(three["sql"]) < 1e-5 * three["sql"].norm()


@pytest.mark.parametrize("method", ["dare", "dare_ties", "della"])
def test_the_seed_is_all_that_a_mask_depends_on(three, method):
    state = torch.get_rng_state()
    first = quietly(three, method, seed=3)
    assert torch.equal(torch.get_rng_state(), state)
    torch.rand(5)
    assert quietly(three, method, seed=3).digest == first.digest
    assert quietly(three, method, seed=4).digest != first.digest
    assert (
        quietly({**three, "sql2": three["sql"]}, method, weights=[1, 1, 1, 0], seed=3) is not None
    )


@pytest.mark.parametrize("method", PLAIN)
def test_arguments_stay_as_they_are(three, method):
    before = {n: a.digest for n, a in three.items()}
    quietly(three, method, pico=True)
    assert {n: a.digest for n, a in three.items()} == before


@pytest.mark.parametrize("method", [m for m in PLAIN if m != "knots"])
def test_no_matrix_of_the_weight_s_size_is_made(make_adapter, shape_watch, method):
    wide = {n: make_adapter({"q": (700, 900)}, 3, seed=i) for i, n in enumerate("abc")}
    with shape_watch() as watch:
        lf.merge(wide, method)
    assert watch.largest <= 900 * 9 * 4


def test_half_precision_and_mixed_dtypes(three):
    half = {n: a.to(dtype=torch.bfloat16) for n, a in three.items()}
    for method in ("linear", "ties", "tsv"):
        merged = quietly(half, method)
        assert merged["layers.0.q"].A.dtype == torch.float32
        assert (
            merged.distance(
                quietly({n: a.to(dtype=torch.float64) for n, a in half.items()}, method)
            )
            < 1e-5 * merged.norm()
        )


# One, none, zero


@pytest.mark.parametrize("method", list(METHODS))
def test_one_adapter_comes_back_as_itself(three, method):
    more = {"lorahub": {"score": lambda a: 0.0}, "regmean": {"grams": {"sql": {}}}}
    merged = lf.merge({"sql": three["sql"]}, method, **more.get(method, {}))
    assert merged.digest == three["sql"].digest


def test_one_adapter_times_its_weight(three):
    a = three["sql"]
    assert lf.merge({"sql": a}, weights=[-0.5]).digest == (-0.5 * a).digest
    assert lf.merge({"sql": a}, "ties", weights=[-0.5]).digest == (-a).digest  # weights divide out
    assert lf.merge([a], lambda_=3.0).digest == (3 * a).digest


@NOTHING_LEFT
@pytest.mark.parametrize("method", PLAIN)
def test_zero_updates_stay_zero(make_adapter, method):
    zero = {n: 0.0 * make_adapter(SHAPE, 3, seed=i) for i, n in enumerate("ab")}
    assert lf.merge(zero, method).norm() == 0
    assert lf.merge(zero, method, pico=True).norm() == 0


@pytest.mark.parametrize("method", PLAIN)
@pytest.mark.parametrize("size", [1e-15, 1e15])
def test_the_size_of_updates_changes_nothing_else(make_adapter, method, size):
    some = {n: make_adapter(SHAPE, r, seed=r) for n, r in (("a", 3), ("b", 4), ("c", 2))}
    merged = lf.merge(some, method)
    scaled = lf.merge({n: size * a for n, a in some.items()}, method)
    assert (1 / size * scaled).distance(merged) < 1e-5 * merged.norm()


@pytest.mark.parametrize("method", PLAIN)
def test_one_huge_and_one_tiny_update(make_adapter, method):
    some = {"huge": 1e12 * make_adapter(SHAPE, 3, seed=1), "tiny": 1e-12 * make_adapter(SHAPE, 2)}
    for pico in (False, True):
        merged = lf.merge(some, method, pico=pico)
        assert 0 < merged.norm() < np.inf


@NOTHING_LEFT
@pytest.mark.parametrize("method", PLAIN)
@pytest.mark.parametrize("pico", [False, True])
def test_weights_of_zero_are_no_error(make_adapter, method, pico):
    two = {"a": make_adapter(SHAPE, 2, seed=1), "b": make_adapter(SHAPE, 4, seed=2)}
    assert np.isfinite(lf.merge(two, method, weights=[0, 0], pico=pico).norm())


@NOTHING_LEFT
@pytest.mark.parametrize("method", PLAIN)
def test_an_adapter_and_its_negative_sum_to_nothing(make_adapter, method):
    a = make_adapter(SHAPE, 3, seed=1)
    merged = lf.merge({"a": a, "b": a}, method, weights=[1, -1])
    if method in ("linear", "magnitude", "iso_c", "breadcrumbs"):
        assert merged.norm() < 1e-6 * a.norm()
    assert np.isfinite(merged.norm())


@pytest.mark.parametrize("method", PLAIN)
def test_rank_one_and_full_rank(make_adapter, method):
    some = {
        n: make_adapter({"q": (6, 9)}, r, seed=i)
        for i, (n, r) in enumerate({"a": 1, "b": 6, "c": 12}.items())
    }
    merged = lf.merge(some, method)
    assert 0 < merged.norm() < np.inf


def test_missing_modules_count_as_zero_and_are_listed(three, deltas, off):
    with pytest.warns(
        UserWarning, match=r"zero where missing, 1 of 3 modules: 'layers.1.q' in art"
    ):
        merged = lf.merge(three)
    assert off(merged, {p: sum(deltas(three, p)) / 3 for p in three["sql"]}) < 1e-6
    assert "layers.1.q: art" in merged.config["lorafold_origin"]["card"]


# Weights


def test_weights_by_name_module_and_layer(three, deltas, off):
    weights = {
        "sql": 0.5,
        "law": {r"layers\.0\..*": 2.0, ".*": -1.0},
        "art": {"q": 0.25, "layers.0.v": 3.0},
    }
    merged = quietly(three, weights=weights)
    each = {
        "layers.0.q": (0.5, 2.0, 0.25),
        "layers.0.v": (0.5, 2.0, 3.0),
        "layers.1.q": (0.5, -1.0, 0.25),
    }
    wanted = {
        p: sum(w * d for w, d in zip(ws, deltas(three, p), strict=True)) for p, ws in each.items()
    }
    assert off(merged, wanted) < 1e-6
    assert (
        off(
            quietly(three, weights=torch.tensor([1.0, 2, 3])),
            {p: sum(w * d for w, d in zip((1, 2, 3), deltas(three, p), strict=True)) for p in each},
        )
        < 1e-6
    )


def test_density_of_its_own_for_each(three, deltas, off):
    merged = quietly(
        three, "magnitude", density={"sql": 1.0, "law": {"q": 0.5, "v": 0.25}, "art": 0.1}
    )
    D = deltas(three, "layers.0.q")
    U, V, (a, b, c) = ref.joint(D)
    q = U @ (a + ref.top(b, 0.5) + ref.top(c, int(0.1 * c.size) / c.size)) @ V.T / 3
    assert np.linalg.norm(
        merged["layers.0.q"].dense().double().numpy() - q
    ) < 1e-5 * np.linalg.norm(q)


@pytest.mark.parametrize(
    ("weights", "what"),
    [
        ([1.0], "1 weights for 3"),
        ([1.0, 2.0, float("nan")], "finite"),
        ([1.0, 2.0, "x"], "finite"),
        ({"sql": 1.0}, "lack 'law', 'art'"),
        ({"sql": 1, "law": 1, "art": 1, "lwa": 1}, "did you mean"),
        ({"sql": 1, "law": 1, "art": {"nothing": 1}}, "'nothing' matches none"),
        ({"sql": 1, "law": 1, "art": {"(": 1}}, "regular expression"),
        ("0.5", "one number for each"),
        (0.5, "one number for each"),
        ({"sql": True, "law": 1, "art": 1}, "finite"),
    ],
)
def test_weights_that_are_wrong(three, weights, what):
    with pytest.raises(lf.LorafoldError, match=what):
        lf.merge(three, weights=weights)


# Bad input


@pytest.mark.parametrize(
    ("method", "options", "what"),
    [
        ("tise", {}, "did you mean 'ties'"),
        (3, {}, "must be a name"),
        ("ties", {"densty": 0.5}, "did you mean 'density'"),
        ("linear", {"density": 0.5}, "takes no density"),
        ("ties", {"density": 0}, r"\(0, 1\]"),
        ("ties", {"density": 1.5}, r"\(0, 1\]"),
        ("ties", {"density": float("nan")}, "found nan"),
        ("ties", {"density": 0.5, "drop_rate": 0.5}, "not both"),
        ("ties", {"drop_rate": 1}, "drop_rate"),
        ("della", {"density": 0.9}, "epsilon"),
        ("breadcrumbs", {"gamma": 2}, "gamma"),
        ("knots", {"rule": "tie"}, "did you mean 'ties'"),
        ("knots", {"rule": "linear", "density": 0.5}, "drops entries"),
        ("tsv", {"space": "delta"}, "core"),
        ("ties", {"space": "detla"}, "did you mean 'delta'"),
        ("ties", {"seed": 1.5}, "seed"),
        ("lego", {"rank": 0}, "rank"),
        ("ties", {"rank": 4}, r"takes no rank=: its result is exact; resize that"),
        ("ties", {"gamma": 0.1}, "takes no gamma=: breadcrumbs, knots, ctm do"),
        ("iso_cts", {"common": -1}, "common"),
        ("linear", {"lambda_": float("inf")}, "lambda_"),
        ("linear", {"heads": "swl"}, "did you mean 'sql'"),
        ("slerp", {}, "between two"),
        ("lorahub", {}, "needs score"),
        ("lorahub", {"score": 3}, "function"),
        ("lorahub", {"score": lambda a: float("nan")}, "number"),
        ("regmean", {}, "needs grams"),
        ("regmean", {"grams": {"sql": {}}}, "lack 'law', 'art'"),
        ("regmean", {"grams": grams([1])}, "grams lack 'sql'"),
        ("regmean", {"grams": grams({})}, "has none for module"),
        (
            "regmean",
            {"grams": grams({"layers.0.q": np.eye(40)})},
            "a ndarray, which is no tensor",
        ),
        (
            "regmean",
            {"grams": grams({"layers.0.q": torch.eye(40) / 0})},
            "not finite",
        ),
        ("lorahub", {"score": lambda a: "1"}, "number"),
        ("lorahub", {"score": lambda a: torch.ones(2)}, "number"),
        ("linear", {"drop_rate": 0.5}, "takes no drop_rate"),
        ("ties", {"density": True}, "density|densities"),
        ("ties", {"density": 10**400}, r"lie in \(0, 1\], found 1"),
        ("ties", {"density": [0.5]}, "1 densities for 3"),
        ("linear", {"lambda_": 10**400}, "lambda_"),
        ("linear", {"pico": "no"}, "True or False"),
        ("linear", {"progress": 3}, "progress must be a function"),
        ("linear", {"space": None}, "no space"),
        ("knots", {"rule": ["ties"]}, "no rule"),
        ("knots", {"rule": 3}, "no rule"),
        ("linear", {"weights": [1e308] * 3}, "module 'layers.0.q'"),
        ("linear", {"weights": [10**400, 1, 1]}, "finite"),
    ],
)
def test_options_that_are_wrong(three, method, options, what):
    with pytest.raises(lf.LorafoldError, match=what):
        quietly(three, method, **options)


def test_sources_that_do_not_fit(make_adapter, tmp_path):
    a = make_adapter(SHAPE, 2, base_model="one")
    with pytest.raises(lf.MismatchError, match="list of sources is empty"):
        lf.merge([])
    with pytest.raises(lf.MismatchError, match="'a' to 'one'; 'b' to 'two'"):
        lf.merge({"a": a, "b": make_adapter(SHAPE, 2, base_model="two")})
    with pytest.raises(lf.MismatchError, match=r"'l.q' is \(24, 40\) in 'a' and \(8, 40\) in 'b'"):
        lf.merge({"a": a, "b": make_adapter({"l.q": (8, 40)}, 2)})
    embedding = lf.Adapter(dict(a), layouts={"l.q": lf.Layout("embedding")})
    with pytest.raises(lf.MismatchError, match="kind"):
        lf.merge({"a": a, "b": embedding})
    dora = make_adapter(SHAPE, 2, config={"use_dora": True})
    with pytest.raises(lf.RefusedError, match="'d' can't be merged: this is a DoRA"):
        lf.merge({"a": a, "d": dora})
    pissa = make_adapter(SHAPE, 2, config={"init_lora_weights": "pissa"})
    with pytest.raises(lf.RefusedError, match="'p' .*PiSSA"):
        lf.merge({"a": a, "p": pissa})
    with pytest.raises(lf.FileError):
        lf.merge([tmp_path / "nothing", a])


# Heads, tokens, biases


def test_equal_extras_stay_and_different_ones_must_be_chosen(make_adapter):
    head, other = torch.ones(3), torch.zeros(3)
    key = "base_model.model.score.modules_to_save.weight"
    config = {"modules_to_save": ["score"], "r": 2, "lora_alpha": 4}
    a, b = (make_adapter(SHAPE, 2, seed=i, extras={key: head}, config=config) for i in (1, 2))
    c = make_adapter(SHAPE, 2, seed=3)
    merged = lf.merge({"a": a, "b": b, "c": c})
    assert torch.equal(merged.extras[key], head)
    assert merged.config["modules_to_save"] == ["score"]
    b = make_adapter(SHAPE, 2, seed=2, extras={key: other}, config=config)
    with pytest.raises(lf.MismatchError, match=r"'a' and 'b' carry .*score.* heads=, e.g. 'a'"):
        lf.merge({"a": a, "b": b, "c": c})
    assert torch.equal(lf.merge({"a": a, "b": b, "c": c}, heads="b").extras[key], other)
    assert not lf.merge({"a": a, "b": b, "c": c}, heads="c").extras


# Provenance


def test_where_it_comes_from_is_in_the_file_and_on_a_card(three, tmp_path):
    names = {"<script>alert(1)</script>": three["sql"], "a|b\n# c": three["law"]}
    merged = lf.merge(names, "ties", weights=[0.7, 0.3], density=0.25, seed=5).resize(rank=4)
    lf.save(merged, tmp_path / "out")
    with safe_open(tmp_path / "out" / "adapter_model.safetensors", "pt") as f:
        facts = json.loads(f.metadata()["lorafold_merge"])
    assert [s["name"] for s in facts["sources"]] == list(names)
    assert [s["digest"] for s in facts["sources"]] == [a.digest for a in names.values()]
    assert [s["weight"] for s in facts["sources"]] == [0.7, 0.3]
    assert (facts["method"], facts["space"], facts["seed"]) == ("ties", "core", 5)
    assert facts["options"] == {"density": 0.25}
    card = (tmp_path / "out" / "README.md").read_text()
    assert "<script>" not in card
    assert "\n# c" not in card
    assert "a\\|b" in card
    assert "lorafold_origin" not in (tmp_path / "out" / "adapter_config.json").read_text()
    assert lf.load(tmp_path / "out").distance(merged) < 1e-6 * merged.norm()


def test_where_it_comes_from_outlives_load_and_save(three, tmp_path):
    merged = lf.merge({"sql": three["sql"], "law": three["law"]}, "ties", seed=5)
    lf.save(merged, tmp_path / "out")
    loaded = lf.load(tmp_path / "out")
    assert facts_of(loaded.config) == facts_of(merged.config)
    lib = lf.fold({"both": loaded, "sql": three["sql"]}, tolerance=0.1)
    for k, again in enumerate((loaded, loaded.resize(rank=2), 0.5 * loaded, lib["both"])):
        lf.save(again, tmp_path / str(k))
        assert facts_of(lf.load(tmp_path / str(k)).config) == facts_of(merged.config)
        assert "lorafold" not in (tmp_path / str(k) / "adapter_config.json").read_text()
    assert facts_of(lib["sql"].config) is None
    assert facts_of((loaded + three["sql"]).config) is None


def test_a_card_goes_with_its_adapter_and_a_readme_stays(three, tmp_path):
    merged = lf.merge({"sql": three["sql"], "law": three["law"]})
    out, card = tmp_path / "out", tmp_path / "out" / "README.md"
    lf.save(merged, out)
    lf.save(lf.merge({"other": three["art"]}), out, overwrite=True)
    assert "| other |" in card.read_text()
    assert "| sql |" not in card.read_text()
    lf.save(three["art"], out, overwrite=True)
    assert not card.exists()
    card.write_text("# Mine\n")
    for adapter in (merged, three["sql"]):
        lf.save(adapter, out, overwrite=True)
        assert card.read_text() == "# Mine\n"
        assert lf.load(out).distance(adapter) < 1e-6 * adapter.norm()


def test_what_is_added_up_or_merged_again_does_not_keep_the_old_card(three, tmp_path):
    merged = lf.merge({"sql": three["sql"], "law": three["law"]}, "ties")
    lf.save(merged + three["sql"], tmp_path / "sum")
    assert not (tmp_path / "sum" / "README.md").exists()
    lf.save(quietly({"once": merged, "art": three["art"]}), tmp_path / "again")
    assert "| once |" in (tmp_path / "again" / "README.md").read_text()
    lf.save(merged.resize(rank=2), tmp_path / "small")
    assert "| law |" in (tmp_path / "small" / "README.md").read_text()


def test_what_is_no_merge_has_no_card(three, tmp_path):
    lf.save(three["sql"], tmp_path / "out")
    assert sorted(p.name for p in (tmp_path / "out").iterdir()) == [
        "adapter_config.json",
        "adapter_model.safetensors",
    ]


# From files, and what adapters are made of


def test_from_files_module_by_module(three, tmp_path):
    for name, a in three.items():
        lf.save(a, tmp_path / name)
    merged = quietly([tmp_path / n for n in three], "ties")
    assert merged.distance(quietly(three, "ties")) < 1e-6 * merged.norm()
    assert quietly(tmp_path, "ties").digest == quietly(str(tmp_path / "*"), "ties").digest


def test_patterns_rslora_conv_embedding_and_experts(make_update, tmp_path, dense):
    def part(seed, ranks, config):
        modules = {
            "conv": make_update(6, 27, ranks[0], seed=seed),
            "emb": make_update(8, 30, ranks[1], seed=seed + 1),
            "moe.up[0]": make_update(10, 8, ranks[2], seed=seed + 2),
            "moe.up[1]": make_update(10, 8, ranks[2], seed=seed + 3),
        }
        layouts = {
            "conv": lf.Layout("conv", kernel=(3, 3, 3)),
            "emb": lf.Layout("embedding"),
            "moe.up[0]": lf.Layout("expert", parameter="up", expert=(0, 2)),
            "moe.up[1]": lf.Layout("expert", parameter="up", expert=(1, 2)),
        }
        return lf.Adapter(modules, config=config, layouts=layouts)

    a = part(10, (2, 3, 2), {"r": 2, "lora_alpha": 4, "use_rslora": True})
    b = part(20, (4, 2, 4), {"r": 4, "lora_alpha": 4})
    lf.save(a, tmp_path / "a")
    lf.save(b, tmp_path / "b")
    merged = lf.merge([tmp_path / "a", tmp_path / "b"], weights=[0.5, 2.0])
    lf.save(merged, tmp_path / "out")
    again = lf.load(tmp_path / "out")
    assert set(again) == set(a)
    for path in a:
        wanted = 0.5 * dense(a[path]) + 2 * dense(b[path])
        assert torch.linalg.norm(dense(again[path]) - wanted) < 1e-6 * torch.linalg.norm(wanted)
    assert again.layout("conv").kernel == (3, 3, 3)


# What looks at more than adapters


def test_lorahub_raises_the_score_and_tells_its_weights(make_adapter):
    two = {n: make_adapter(SHAPE, 2, seed=i) for i, n in enumerate("ab")}
    target = 0.9 * two["a"] - 0.4 * two["b"]
    asked = []

    def score(adapter):
        asked.append(adapter)
        return -adapter.distance(target) / target.norm()

    merged = lf.merge(two, "lorahub", score=score, budget=60, penalty=0.0, seed=1)
    assert len(asked) == 60
    assert score(merged) > score(lf.merge(two)) + 0.3
    facts = json.loads(merged.config["lorafold_origin"]["metadata"]["lorafold_merge"])
    w = [s["weight"] for s in facts["sources"]]
    assert merged.distance(w[0] * two["a"] + w[1] * two["b"]) < 1e-5 * target.norm()
    assert (
        lf.merge(two, "lorahub", score=score, budget=60, penalty=0.0, seed=1).digest
        == merged.digest
    )


def test_regmean_is_least_squares_on_each_one_s_inputs(make_adapter, deltas, off):
    two = {n: make_adapter(SHAPE, 3, seed=i) for i, n in enumerate("ab")}
    rng = np.random.default_rng(0)
    X = {n: rng.standard_normal((200, 40)) @ np.diag(rng.random(40)) for n in two}
    grams = {n: {"l.q": torch.from_numpy(x.T @ x)} for n, x in X.items()}
    merged = lf.merge(two, "regmean", grams=grams, off_diagonal=1.0, weights=[1, 1])
    D = deltas(two, "l.q")
    Y = np.vstack([x @ d.T for x, d in zip(X.values(), D, strict=True)])
    wanted = np.linalg.lstsq(np.vstack(list(X.values())), Y, rcond=None)[0].T
    assert off(merged, {"l.q": wanted}) < 1e-5
    same = {n: {"l.q": torch.eye(40)} for n in two}
    assert lf.merge(two, "regmean", grams=same).distance(lf.merge(two)) < 1e-5
    with pytest.raises(lf.MismatchError, match="must be"):
        lf.merge(two, "regmean", grams={n: {"l.q": torch.eye(3)} for n in two})
    with pytest.raises(lf.MismatchError, match="singular"):
        lf.merge(two, "regmean", grams={n: {"l.q": torch.zeros(40, 40)} for n in two})


def test_the_package_is_the_verb(three):
    import lorafold.merge as package

    assert package(list(three.values())[:2]).rank == 10
    assert package.merge_into_weights is lf.merge_into_weights
    assert Path(package.__file__).parent.name == "merge"


@pytest.mark.parametrize(
    ("method", "space"),
    [
        *((m, "core") for m in ("linear", "ties", "dare", "knots", "tsv", "iso_c", "lego")),
        ("ties", "delta"),
        ("dare", "delta"),
    ],
)
def test_factors_that_train_merge_like_others(method, space):
    g = torch.Generator().manual_seed(0)
    pairs = [(torch.randn(2, 6, generator=g), torch.randn(5, 2, generator=g)) for _ in range(2)]
    still = [lf.Adapter({"q": lf.LowRank(A, B)}) for A, B in pairs]
    trained = [
        lf.Adapter({"q": lf.LowRank(A.clone().requires_grad_(), B.clone().requires_grad_())})
        for A, B in pairs
    ]
    options = {} if space == "core" else {"space": space}
    found, wanted = (lf.merge(x, method, **options)["q"] for x in (trained, still))
    assert not found.A.requires_grad
    assert torch.equal(found.dense(), wanted.dense())


@pytest.mark.parametrize("method", list(METHODS))
def test_none_is_as_if_nothing_were_given(three, method):
    if method in ("slerp", "lorahub", "regmean"):
        three = {"sql": three["sql"]}
    needs = {"lorahub": {"score": lambda a: 0.0}, "regmean": {"grams": {"sql": {}}}}
    own = needs.get(method, {})
    none = {**dict.fromkeys(METHODS[method].takes), **dict.fromkeys(("lambda_", "pico", "heads"))}
    merged = quietly(three, method, **own)
    again = quietly(three, method, **{**none, **own})
    assert again.distance(merged) < 1e-5 * merged.norm()


@pytest.mark.parametrize("kind", [np.float32, np.array, torch.tensor, lambda x: torch.tensor([x])])
def test_a_score_is_any_number(make_adapter, kind):
    two = {"a": make_adapter(SHAPE, 2, seed=1), "b": make_adapter(SHAPE, 2, seed=2)}
    merged = lf.merge(two, "lorahub", score=lambda a: kind(-a.norm()), budget=3)
    wanted = lf.merge(two, "lorahub", score=lambda a: -a.norm(), budget=3)
    assert merged.distance(wanted) < 1e-5 * wanted.norm()
