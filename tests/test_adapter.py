"""`Adapter` against dense float64 algebra: geometry, arithmetic, sizes, what it carries along."""

import copy
import dataclasses
import itertools
import math
import pickle
import random

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

import lorafold as lf
from lorafold.adapter import Adapter, Layout, combined_digest, module_digest, tensor_digest
from lorafold.errors import MismatchError, RefusedError, UnknownNameError
from lorafold.lowrank import LowRank

Q, K, UP = "layers.0.q_proj", "layers.0.k_proj", "layers.1.mlp.up_proj"
SHAPES = {Q: (24, 16), K: (16, 16), UP: (40, 16)}
RANKS = {Q: 4, K: 1, UP: 20}  # mixed, and one above min(out, in)
seeds = st.integers(0, 10**6)


@pytest.fixture
def a(make_adapter):
    return make_adapter(SHAPES, RANKS, seed=1)


@pytest.fixture
def b(make_adapter):
    """Shares one module with `a`, in another rank and scale."""
    return make_adapter({Q: (24, 16), "layers.9.o_proj": (8, 8)}, 3, seed=2, scale=0.3)


@pytest.fixture(scope="session")
def flat(dense):
    """flat(adapter, paths) -> all updates in one float64 vector, zeros where one is missing."""

    def flat(adapter, *others):
        shapes = {p: u.shape for x in (adapter, *others) for p, u in x.items()}
        parts = [
            dense(adapter[p]).flatten()
            if p in adapter
            else torch.zeros(math.prod(shapes[p]), dtype=torch.float64)
            for p in sorted(shapes)
        ]
        return torch.cat(parts)

    return flat


# Geometry


def test_geometry_equals_that_of_the_dense_updates(a, b, flat):
    x, y = flat(a, b), flat(b, a)
    assert a.norm() == pytest.approx(float(x.norm()), rel=1e-6)
    assert a.inner(b) == pytest.approx(b.inner(a), rel=1e-6)
    assert a.inner(b) == pytest.approx(float(x @ y), abs=1e-6 * a.norm() * b.norm())
    assert a.cosine(b) == pytest.approx(float(x @ y / x.norm() / y.norm()), abs=1e-6)
    assert a.distance(b) == pytest.approx(float((x - y).norm()), rel=1e-6)
    assert b.distance(a) == pytest.approx(float((x - y).norm()), rel=1e-6)
    assert a.distance(a) <= 1e-6 * a.norm()
    assert a.cosine(a) == pytest.approx(1)
    assert a.cosine(-2 * a) == pytest.approx(-1)


def test_adapters_without_a_common_module_are_orthogonal(make_adapter):
    a, b = make_adapter({Q: (8, 8)}), make_adapter({K: (8, 8)}, seed=1)
    assert a.inner(b) == a.cosine(b) == 0
    assert a.distance(b) == pytest.approx(math.hypot(a.norm(), b.norm()))


def test_a_zero_update_has_cosine_zero_and_distance_zero_to_itself(a):
    zero = 0.0 * a
    assert zero.norm() == zero.cosine(a) == a.cosine(zero) == zero.cosine(zero) == 0
    assert zero.distance(zero) == 0
    assert zero.distance(a) == pytest.approx(a.norm())
    assert zero.resize(tolerance=0.1).norm() == zero.nested().norm() == 0


@given(seeds)
def test_a_cosine_never_leaves_its_range(make_adapter, seed):
    a = make_adapter({Q: (4, 3)}, 2, seed=seed)
    assert -1 <= a.cosine(-0.1 * a) <= a.cosine(3.3 * a) <= 1  # math.acos takes it


def test_a_small_difference_is_measured_and_the_gram_formula_would_not(make_adapter, flat):
    shapes = {f"layers.{i}.q_proj": (256, 192) for i in range(3)}
    a, noise = make_adapter(shapes, 8, seed=3), make_adapter(shapes, 8, seed=4)
    b = Adapter(
        {
            p: LowRank((u.A.double() + 1e-5 * noise[p].A.double()).float(), u.B, u.scale)
            for p, u in a.items()
        }
    )
    true = float((flat(a) - flat(b)).norm())
    assert 0.5e-5 < true / a.norm() < 2e-5
    assert a.distance(b) == pytest.approx(true, rel=0.05)
    gram = math.sqrt(max(a.inner(a) + b.inner(b) - 2 * a.inner(b), 0))
    assert abs(gram - true) > 0.05 * true


@given(seeds)
def test_nothing_depends_on_the_gauge(make_adapter, seed):
    a = make_adapter({Q: (9, 7), K: (5, 6)}, 3, seed=seed, dtype=torch.float64)
    b = make_adapter({Q: (9, 7), K: (5, 6)}, 2, seed=seed + 1, dtype=torch.float64)
    g = torch.Generator().manual_seed(seed)
    G = torch.randn(3, 3, generator=g, dtype=torch.float64) + 9 * torch.eye(3)
    other = Adapter({p: LowRank(torch.linalg.solve(G, u.A), u.B @ G, 2.0) for p, u in a.items()})
    assert other.digest != a.digest
    assert other.distance(a) <= 1e-12 * a.norm()
    assert other.norm() == pytest.approx(a.norm(), rel=1e-9)
    assert other.cosine(b) == pytest.approx(a.cosine(b), abs=1e-9)
    assert other.distance(b) == pytest.approx(a.distance(b), rel=1e-9)
    assert other.resize(rank=1).distance(a.resize(rank=1)) <= 1e-6 * a.norm()


def test_one_random_A_looks_like_one_skill_only_in_factor_space():
    # Two unrelated tasks from one seed: A stays near its start, B grows from zero.
    g = torch.Generator().manual_seed(0)
    start = torch.rand(8, 256, generator=g) / 8
    updates = [
        LowRank(
            start + 0.002 * torch.randn(8, 256, generator=g),
            0.005 * torch.randn(256, 8, generator=g),
            2.0,
        )
        for _ in range(2)
    ]
    u, v = updates
    raw = [torch.cat([x.A.flatten(), x.B.flatten()]) for x in (u, v)]
    assert float(torch.cosine_similarity(*raw, dim=0)) > 0.95
    assert abs(Adapter({Q: u}).cosine(Adapter({Q: v}))) < 0.05


# Vector space


def test_sums_equal_the_dense_ones(a, b, flat):
    x, y = flat(a, b), flat(b, a)
    for adapter, expected in [
        (a + b, x + y),
        (a - b, x - y),
        (b - a, y - x),
        (0.5 * a, 0.5 * x),
        (a * -3, -3 * x),
        (-a, -x),
        (0.7 * a - 0.3 * b + a, 1.7 * x - 0.3 * y),
    ]:
        assert float((flat(adapter, a, b) - expected).norm()) <= 1e-6 * float(expected.norm())
    assert set(a + b) == set(a) | set(b)
    assert (a + b)[Q].rank == a[Q].rank + b[Q].rank


def test_averaging_A_and_B_apart_is_wrong_and_the_sum_is_exact(make_adapter, flat):
    a, b = make_adapter(SHAPES, 4, seed=5), make_adapter(SHAPES, 4, seed=6)
    mean = (flat(a) + flat(b)) / 2
    apart = Adapter({p: LowRank((a[p].A + b[p].A) / 2, (a[p].B + b[p].B) / 2, 2.0) for p in SHAPES})
    assert float((flat(apart) - mean).norm() / mean.norm()) > 0.5
    assert float((flat(0.5 * (a + b)) - mean).norm() / mean.norm()) < 1e-6


@given(seeds, st.floats(0.05, 20), st.floats(-20, -0.05))
def test_the_laws_of_a_vector_space(make_adapter, seed, p, q):
    a = make_adapter({Q: (9, 7), K: (5, 6)}, {Q: 3, K: 6}, seed=seed)
    b = make_adapter({Q: (9, 7), UP: (4, 4)}, 2, seed=seed + 1, scale=0.3)
    c = make_adapter({Q: (9, 7), K: (5, 6)}, 1, seed=seed + 2)
    size = a.norm() + b.norm()
    assert ((a + b) - b).distance(a) <= 1e-6 * size
    assert (a + b).distance(b + a) <= 1e-6 * size
    assert ((a + b) + c).distance(a + (b + c)) <= 1e-6 * (size + c.norm())
    assert (p * (a + b)).distance(p * a + p * b) <= 1e-6 * p * size
    near = 2e-6 * c.norm() * (p * a.norm() - q * b.norm())
    assert abs((p * a + q * b).inner(c) - p * a.inner(c) - q * b.inner(c)) <= near
    assert abs(a.inner(b)) <= a.norm() * b.norm() * (1 + 1e-6)
    assert a.distance(c) <= (a.distance(b) + b.distance(c)) * (1 + 1e-6)


@pytest.mark.parametrize("c", [np.float32(0.5), np.float64(0.5), np.array([0.5])[0]])
def test_numpy_scalars_multiply(c, a):
    assert isinstance(c * a, Adapter)
    assert (c * a).digest == (a * c).digest == (0.5 * a).digest


def test_what_is_no_number_or_adapter_does_not_combine(a):
    for combine in (lambda: a + 1, lambda: a - a[Q], lambda: a * a, lambda: "2" * a, lambda: 2 - a):
        with pytest.raises(TypeError):
            combine()


def test_other_bases_and_shapes_are_refused_by_name(make_adapter):
    a = make_adapter({Q: (8, 6)}, base_model="llama")
    b = make_adapter({Q: (8, 6)}, config={"base_model_name_or_path": "qwen"})
    for combine in (lambda: a + b, lambda: a - b, lambda: a.inner(b), lambda: a.distance(b)):
        with pytest.raises(MismatchError, match="different bases: 'llama' and 'qwen'"):
            combine()
    unknown = make_adapter({Q: (8, 6)})
    assert (a + unknown).base_model == (unknown + a).base_model == "llama"
    assert (a + dataclasses.replace(b, base_model="llama")).base_model == "llama"
    with pytest.raises(MismatchError, match=rf"{Q}' is \(8, 6\) .* \(6, 8\)"):
        a + make_adapter({Q: (6, 8)})


# Other sizes and gauges


def test_resizing_works_module_by_module(a, flat, dense):
    for k in (1, 3, 100):
        small = a.resize(rank=k)
        for p, u in small.items():
            D = dense(a[p])
            S = torch.linalg.svdvals(D)
            assert u.rank == min(k, a[p].rank, *a[p].shape)
            tail = float(S[u.rank :].norm())
            assert float((dense(u) - D).norm()) == pytest.approx(tail, abs=1e-6 * float(D.norm()))
    assert a.resize(rank=100).distance(a) <= 1e-6 * a.norm()
    assert a.resize(tolerance=0).distance(a) <= 1e-6 * a.norm()
    assert a.resize(energy=1.0).distance(a) <= 1e-6 * a.norm()


@given(seeds, st.floats(0, 0.999))
def test_a_tolerance_holds_in_every_module(make_adapter, dense, seed, tolerance):
    a = make_adapter({Q: (9, 7), K: (5, 6)}, {Q: 7, K: 4}, seed=seed)
    small = a.resize(tolerance=tolerance)
    for p, u in small.items():
        assert float((dense(u) - dense(a[p])).norm()) <= (tolerance + 1e-6) * a[p].norm()
    assert small.distance(a) <= (tolerance + 1e-6) * a.norm()
    kept = a.resize(energy=1 - tolerance**2)
    assert kept.distance(a) <= (tolerance + 1e-4) * a.norm()


def kept_energy(spectra, ranks):
    return math.fsum(sum(s * s for s in S[:k]) for S, k in zip(spectra, ranks, strict=True))


def best_energy(spectra, costs, budget):
    """The most energy that any ranks ≥ 1 within the budget keep, by trying all."""
    choices = itertools.product(*(range(1, len(S) + 1) for S in spectra))
    fitting = [r for r in choices if sum(k * c for k, c in zip(r, costs, strict=True)) <= budget]
    return max(kept_energy(spectra, ranks) for ranks in fitting)


@given(seeds, st.integers(0, 120))
def test_a_budget_is_kept_and_filled_as_well_as_can_be(make_adapter, dense, seed, extra):
    shapes = {"a": (6, 4), "b": (5, 5), "c": (4, 6)}  # a direction costs the same everywhere
    a = make_adapter(shapes, {"a": 4, "b": 2, "c": 3}, seed=seed)
    a = Adapter({p: (10.0**-i) ** (seed % 2) * u for i, (p, u) in enumerate(a.items())})
    spectra = [torch.linalg.svdvals(dense(u))[: u.rank].tolist() for u in a.values()]
    small = a.resize(budget=30 + extra)
    assert small.num_parameters <= 30 + extra
    kept = kept_energy(spectra, [u.rank for u in small.values()])
    assert kept == pytest.approx(best_energy(spectra, [10] * 3, 30 + extra), rel=1e-9)
    assert small.distance(a) ** 2 == pytest.approx(a.norm() ** 2 - kept, abs=1e-5 * a.norm() ** 2)


@given(seeds, st.integers(0, 150))
def test_a_budget_over_unequal_modules_is_within_one_direction_of_the_best(
    make_adapter, dense, seed, extra
):
    shapes = {"a": (12, 4), "b": (3, 5), "c": (7, 6)}
    a = make_adapter(shapes, {"a": 4, "b": 3, "c": 5}, seed=seed)
    costs = [sum(u.shape) for u in a.values()]
    budget = sum(costs) + extra
    spectra = [torch.linalg.svdvals(dense(u))[: u.rank].tolist() for u in a.values()]
    small = a.resize(budget=budget)
    assert small.num_parameters <= budget
    kept = kept_energy(spectra, [u.rank for u in small.values()])
    # Greedy by gain per number misses the optimum by less than one step (Dantzig 1957).
    step = max(S[1] ** 2 for S in spectra)
    assert best_energy(spectra, costs, budget) - step <= kept * (1 + 1e-9)
    # Nothing that would still fit was left out.
    left = budget - small.num_parameters
    for u, S, cost in zip(small.values(), spectra, costs, strict=True):
        assert u.rank == len(S) or cost > left


def test_a_budget_goes_to_the_most_energy_per_number(make_update):
    # One further direction of `wide` costs as much as three of `slim`.
    slim = make_update(5, 5, 4, spectrum=[9, 1, 1, 1], dtype=torch.float64)
    for sigma, expected in [(2.0, {"slim": 1, "wide": 2}), (1.5, {"slim": 4, "wide": 1})]:
        wide = make_update(15, 15, 2, spectrum=[9, sigma], seed=1, dtype=torch.float64)
        small = Adapter({"slim": slim, "wide": wide}).resize(budget=40 + 30)
        assert {p: u.rank for p, u in small.items()} == expected


def test_a_budget_takes_the_strong_module_first_and_no_empty_directions(make_update):
    strong = make_update(8, 8, 4, spectrum=[9, 8, 7, 6], dtype=torch.float64)
    weak = make_update(8, 8, 4, spectrum=[1, 0.5, 0.2, 0.1], seed=1, dtype=torch.float64)
    a = Adapter({"weak": weak, "strong": strong})
    ranks = {p: u.rank for p, u in a.resize(budget=16 * 5).items()}
    assert ranks == {"weak": 1, "strong": 4}
    assert a.resize(budget=10**9).num_parameters == a.num_parameters
    assert (0.0 * a).resize(budget=10**9).rank == 1
    with pytest.raises(MismatchError, match="budget 31 is below rank 1 everywhere, which takes 32"):
        a.resize(budget=31)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({}, "exactly one of rank, energy, tolerance, budget; found none"),
        ({"rank": 1, "budget": 100}, "found rank and budget"),
        ({"energy": 0.5, "tolerance": 0.5}, "found energy and tolerance"),
        ({"rank": 0}, "at least 1"),
        ({"tolerance": 1.0}, "tolerance must lie in"),
        ({"energy": 2}, "energy must lie in"),
    ],
)
def test_wrong_sizes_are_refused(options, message, a):
    with pytest.raises(MismatchError, match=message):
        a.resize(**options)


def test_nested_is_the_same_update_and_every_prefix_the_best_one(a, dense):
    nested = a.nested()
    assert nested.distance(a) <= 1e-6 * a.norm()
    for p, u in nested.items():
        S = torch.linalg.svdvals(dense(a[p]))
        for k in range(1, u.rank + 1):
            missed = float((dense(u.prefix(k)) - dense(a[p])).norm())
            assert missed == pytest.approx(float(S[k:].norm()), abs=2e-6 * float(S.norm()))
    worse = (dense(a[UP].prefix(3)) - dense(a[UP])).norm()  # the gauge it came in is not nested
    assert worse > 1.05 * (dense(nested[UP].prefix(3)) - dense(a[UP])).norm()


def test_spectra_are_those_of_the_dense_updates(a, dense):
    spectra = a.spectrum()
    assert list(spectra) == list(a)
    for p, S in spectra.items():
        expected = torch.linalg.svdvals(dense(a[p]))[: len(S)]
        assert torch.allclose(S.double(), expected, atol=1e-6 * float(expected[0]))


# What it carries along


def test_extras_stay_through_scaling_and_resizing(make_adapter):
    head = torch.randn(3, 4).half()
    a = make_adapter(SHAPES, extras={"score.weight": head}, config={"task_type": "SEQ_CLS"})
    for x in (
        2 * a,
        -a,
        a.nested(),
        a.resize(rank=1),
        a.resize(budget=10**6),
        a.to(dtype=torch.half),
    ):
        assert x.extras["score.weight"] is head
        assert x.config == {"task_type": "SEQ_CLS"}


def test_sums_keep_extras_that_are_equal_or_one_sided_and_refuse_others(make_adapter):
    def carrying(**extras):
        return make_adapter(SHAPES, extras=extras)

    w, v = torch.ones(3), torch.zeros(2)
    for x in (carrying(w=w, v=v) + carrying(w=w.clone()), carrying(w=w) - carrying(w=w, v=v)):
        assert {k: t.tolist() for k, t in x.extras.items()} == {"w": [1, 1, 1], "v": [0, 0]}
    for other in (w * 2, w.double(), torch.ones(4), torch.ones(3, 1)):
        with pytest.raises(MismatchError, match="both adapters carry 'w' with different values"):
            carrying(w=w) + carrying(w=other)


def test_sums_join_configs_so_that_what_is_carried_stays_reachable(make_adapter):
    def configured(**config):
        return make_adapter(SHAPES, config=config)

    a = configured(target_modules=["q"], modules_to_save=["score"], bias="none", task_type="X", r=4)
    b = configured(target_modules=["q"], modules_to_save=None, bias="all", lora_dropout=0.1, r=8)
    joined = {
        "target_modules": ["q"],
        "modules_to_save": ["score"],
        "bias": "all",
        "task_type": "X",
        "lora_dropout": 0.1,
    }
    assert (a + b).config == {**joined, "r": 4}
    assert (b - a).config == {**joined, "r": 8}
    c = configured(target_modules=["q"], modules_to_save=["lm_head", "score"])
    assert (a + c).config["modules_to_save"] == ["score", "lm_head"]
    # Targets that differ would hide modules of one side from a reader: `save` names them anew.
    for other in ({"target_modules": ["v"]}, {"target_modules": ["q"], "layers_to_transform": [1]}):
        assert (
            not {"target_modules", "layers_to_transform"} & (a + configured(**other)).config.keys()
        )


def test_it_is_a_mapping_of_paths_to_updates(a):
    assert list(a) == [Q, K, UP]
    assert len(a) == 3
    assert Q in a
    assert "x" not in a
    assert a.get("x") is None
    assert dict(a.items())[K] is a[K]
    assert (a.rank, a.num_parameters) == (20, 4 * 40 + 32 + 20 * 56)
    assert repr(a) == "Adapter(3 modules, rank 20, 1,312 parameters)"
    with pytest.raises(UnknownNameError, match=rf"no module 'layers.0.q_prj' .* '{Q}'"):
        a["layers.0.q_prj"]
    with pytest.raises(KeyError):
        a["x"]


def test_missing_names_are_cheap_to_ask_for(a, monkeypatch):
    monkeypatch.setattr("lorafold.adapter.did_you_mean", lambda *_: pytest.fail("asked for hints"))
    assert "layers.0.v_proj" not in a


def test_what_goes_in_is_copied_and_cannot_be_changed(make_update):
    modules, extras, config = {Q: make_update(4, 4, 2)}, {"w": torch.ones(1)}, {"r": 2}
    layouts = {Q: Layout(stem="x")}
    a = Adapter(modules, extras, config, layouts=layouts)
    for given_, kept in [
        (modules, a.modules),
        (extras, a.extras),
        (config, a.config),
        (layouts, a.layouts),
    ]:
        given_.clear()
        assert len(kept) == 1
        with pytest.raises(TypeError):
            kept["new"] = 1
    with pytest.raises(dataclasses.FrozenInstanceError):
        a.base_model = "x"


def test_equal_is_what_has_the_same_contents(a):
    more = dataclasses.replace(a, extras={"w": torch.ones(1)}, config={"r": 4})
    same = pickle.loads(pickle.dumps(more))
    assert more == same
    assert len({more, same}) == 1
    changes = [{"extras": {"w": torch.zeros(1)}}, {"extras": {}}, {"config": {"r": 8}}]
    changes += [{"base_model": "b"}, {"modules": {**a.modules, Q: 2 * a[Q]}}]
    for change in changes:
        assert dataclasses.replace(more, **change) != more
    assert a != dict(a)
    assert a in [dataclasses.replace(a, modules=dict(reversed(a.modules.items())))]


def test_a_mean_of_many(a, b, flat):
    c = a / 4
    expected = (flat(a, b) + flat(b, a) + flat(a, b) / 4) / 3
    assert torch.allclose(flat(sum([a, b, c]) / 3, a, b), expected, atol=1e-6)
    assert sum([a]) is a


def test_it_saves_itself_as_save_does(a, tmp_path):
    a.save(tmp_path / "a", pad=True)
    lf.save(a, tmp_path / "b", pad=True)
    assert lf.load(tmp_path / "a") == lf.load(tmp_path / "b")
    with pytest.raises(lf.FileError, match="overwrite"):
        a.save(tmp_path / "a")


def test_rows_for_a_data_frame(a):
    row = next(row for row in a.rows() if row["module"] == Q)
    assert row == {"module": Q, "out": a[Q].shape[0], "in": a[Q].shape[1], "rank": a[Q].rank} | {
        "scale": a[Q].scale,
        "norm": a[Q].norm(),
        "dtype": "float32",
    }
    assert len(a.rows()) == len(a)
    assert a._ipython_key_completions_() == list(a)


def test_wrong_contents_are_refused(make_update):
    with pytest.raises(MismatchError, match="at least one module or extra"):
        Adapter({})
    with pytest.raises(MismatchError, match=r"module 'q' must be a LowRank, not Tensor"):
        Adapter({"q": torch.ones(2)})
    with pytest.raises(MismatchError, match=r"layouts name modules that are not there: \['k'\]"):
        Adapter({"q": make_update(2, 2, 1)}, layouts={"k": Layout()})


@pytest.mark.parametrize(
    "clone", [copy.deepcopy, copy.copy, lambda a: pickle.loads(pickle.dumps(a))]
)
def test_copies_are_equal(clone, make_adapter):
    a = make_adapter(
        SHAPES,
        extras={"w": torch.ones(2)},
        config={"r": 4, "nested": {"x": [1]}},
        base_model="llama",
        layouts={Q: Layout("conv", (4, 2, 2))},
    )
    b = clone(a)
    assert b == a
    assert b.digest == a.digest
    assert (b.config, b.base_model, b.layouts) == (a.config, a.base_model, a.layouts)


def test_moving_leaves_extras_in_their_dtype(a):
    b = dataclasses.replace(a, extras={"w": torch.ones(2)}).to(dtype=torch.bfloat16)
    assert {u.A.dtype for u in b.values()} == {torch.bfloat16}
    assert b.extras["w"].dtype == torch.float32
    assert a[Q].A.dtype == torch.float32
    assert b.distance(a) < 0.01 * a.norm()
    assert b.to(device="meta").extras["w"].is_meta


# Digest


def test_a_digest_knows_contents_only(a, make_adapter):
    paths = list(a)
    random.Random(0).shuffle(paths)
    extras = {"x": torch.ones(2), "y": torch.zeros(1)}
    one = Adapter(a.modules, extras, {"r": 4}, base_model="llama")
    two = Adapter({p: a[p] for p in paths}, dict(reversed(extras.items())))
    assert one.digest == two.digest == copy.deepcopy(two).digest
    assert len(one.digest) == 64
    # The same bytes seen through a stride.
    assert (
        Adapter({Q: LowRank(a[Q].A.T.contiguous().T, a[Q].B, 2.0)}).digest
        == Adapter({Q: a[Q]}).digest
    )


def test_a_digest_changes_with_every_bit_and_scale(a):
    A = a[K].A.clone()
    A[0, 0] = torch.nextafter(A[0, 0], torch.tensor(math.inf))
    u = a[K]
    ones, halves = torch.ones_like(u.B, dtype=torch.half), (torch.half, torch.bfloat16)
    changed = [
        LowRank(A, u.B, u.scale),
        LowRank(u.A, u.B, math.nextafter(u.scale, 3)),
        LowRank(u.A.double(), u.B, u.scale),
        LowRank(u.A, -u.B, -u.scale),
    ]
    others = [
        *(Adapter({**a.modules, K: v}) for v in changed),
        *(Adapter({**a.modules, K: LowRank(u.A, ones.view(t), u.scale)}) for t in halves),
        Adapter({**{p: a[p] for p in (Q, UP)}, "layers.0.v_proj": u}),
        Adapter({p: a[p] for p in (Q, UP)}),
        Adapter(a.modules, {"w": torch.ones(1)}),
        Adapter(a.modules, {"w": torch.ones(1, 1)}),
        Adapter(a.modules, {"v": torch.ones(1)}),
        Adapter(a.modules, layouts={K: Layout("embedding")}),
    ]
    assert len({x.digest for x in [a, *others]}) == 1 + len(others)


def test_a_digest_is_made_of_those_of_its_parts(a):
    a = dataclasses.replace(a, extras={"w": torch.zeros(0), "n": torch.tensor(3)})
    parts = [module_digest(p, u) for p, u in a.items()]
    parts += [tensor_digest(key, t) for key, t in a.extras.items()]
    assert combined_digest(reversed(parts)) == a.digest


# Refused algebra

ALGEBRA = {
    "norm": lambda a, b: a.norm(),
    "inner": lambda a, b: a.inner(b),
    "cosine": lambda a, b: a.cosine(b),
    "distance": lambda a, b: a.distance(b),
    "spectrum": lambda a, b: a.spectrum(),
    "add": lambda a, b: a + b,
    "subtract": lambda a, b: a - b,
    "multiply": lambda a, b: 2 * a,
    "negate": lambda a, b: -a,
    "resize": lambda a, b: a.resize(rank=1),
    "budget": lambda a, b: a.resize(budget=10**6),
    "nested": lambda a, b: a.nested(),
    "apply_to": lambda a, b: a.apply_to(
        {f"{p}.weight": torch.zeros(u.shape) for p, u in a.items()}
    ),
}
REFUSED = {"DoRA": {"use_dora": True}, "PiSSA": {"init_lora_weights": "pissa_niter_4"}}


@pytest.mark.parametrize("operation", ALGEBRA)
@pytest.mark.parametrize("kind", REFUSED)
def test_where_algebra_would_be_wrong_all_of_it_is_refused(kind, operation, make_adapter):
    a = make_adapter(SHAPES, config=REFUSED[kind])
    sound = dataclasses.replace(a, config={})
    ALGEBRA[operation](sound, sound)
    with pytest.raises(RefusedError, match=kind):
        ALGEBRA[operation](a, sound)
    for combine in (sound.inner, sound.distance, sound.__add__):
        with pytest.raises(RefusedError, match=kind):
            combine(a)


def test_what_is_refused_can_still_be_looked_at_and_moved(make_adapter):
    a = make_adapter(SHAPES, config=REFUSED["DoRA"])
    assert "DoRA" in a.refusal
    assert len(a.digest) == 64
    assert a[Q].norm() > 0
    assert a.to(dtype=torch.half)[Q].A.dtype == torch.half
    assert pickle.loads(pickle.dumps(a)).digest == a.digest


# Applied to a base


@pytest.fixture
def base():
    g = torch.Generator().manual_seed(0)
    weights = {f"{p}.weight": torch.randn(s, generator=g) for p, s in SHAPES.items()}
    return {**weights, "norm.weight": torch.ones(16)}


def test_applying_adds_the_update_to_a_copy(a, base, dense):
    before = {key: t.clone() for key, t in base.items()}
    after = a.apply_to(base)
    assert list(after) == list(base)
    assert after["norm.weight"] is base["norm.weight"]
    for p, u in a.items():
        expected = before[f"{p}.weight"].double() + dense(u)
        assert torch.allclose(after[f"{p}.weight"].double(), expected, atol=1e-6)
    assert all(torch.equal(base[key], t) for key, t in before.items())
    half = {key: t.bfloat16() for key, t in base.items()}
    assert {t.dtype for t in a.apply_to(half).values()} == {torch.bfloat16}
    assert torch.equal((0.0 * a).apply_to(base)[f"{Q}.weight"], base[f"{Q}.weight"])


def test_applying_transposes_for_fan_in_fan_out(a, base, dense):
    stored = {key: t.T.contiguous() if t.ndim == 2 else t for key, t in base.items()}
    after = dataclasses.replace(a, config={"fan_in_fan_out": True}).apply_to(stored)
    for p, u in a.items():
        expected = base[f"{p}.weight"].double() + dense(u)
        assert torch.allclose(after[f"{p}.weight"].T.double(), expected, atol=1e-6)


def test_what_has_no_place_is_an_error_or_a_warning(a, base):
    with pytest.raises(MismatchError, match=rf"none of .* 3 modules .*'{Q}.weight'.* 'model.x'"):
        a.apply_to({"model.x": torch.ones(1)})
    with pytest.raises(MismatchError, match="none of"):
        a.apply_to({})
    del base[f"{UP}.weight"]
    with pytest.warns(UserWarning, match=f"1 parts .* '{UP}'"):
        after = a.apply_to(base)
    assert not torch.equal(after[f"{Q}.weight"], base[f"{Q}.weight"])


def test_extras_without_modules_must_find_a_place_too():
    a = Adapter(
        {}, {"base_model.model.score.weight": torch.ones(2, 3)}, {"modules_to_save": ["score"]}
    )
    assert a.apply_to({"score.weight": torch.zeros(2, 3)})["score.weight"].sum() == 6
    with pytest.raises(MismatchError, match=r"none of the adapter's 1 tensors .*score.weight"):
        a.apply_to({"head.weight": torch.zeros(2, 3)})


def test_a_weight_of_another_shape_or_kind_is_refused_by_name(a, base):
    with pytest.raises(MismatchError, match=rf"'{Q}.weight' has shape \(5, 5\)"):
        a.apply_to({**base, f"{Q}.weight": torch.ones(5, 5)})
    with pytest.raises(MismatchError, match=rf"'{Q}.weight' is torch.int8"):
        a.apply_to({**base, f"{Q}.weight": torch.ones(24, 16, dtype=torch.int8)})


# Cost


OPERATIONS = {
    **{name: operation for name, operation in ALGEBRA.items() if name != "apply_to"},
    "digest": lambda a, b: a.digest,
    "to": lambda a, b: a.to(dtype=torch.float64),
    "numbers": lambda a, b: (a.rank, a.num_parameters, a.refusal),
}


@pytest.mark.parametrize("name", OPERATIONS)
def test_the_full_matrix_is_never_built_and_no_argument_changes(name, make_adapter, shape_watch):
    shapes = {Q: (96, 80), K: (80, 96)}
    a, b = make_adapter(shapes, 3), make_adapter(shapes, 2, seed=1)
    before = a.digest, b.digest
    with shape_watch() as watch:
        OPERATIONS[name](a, b)
    assert watch.largest < 96 * 80 // 2
    assert (a.digest, b.digest) == before


def test_the_watch_sees_the_full_matrix_where_it_is_built(make_adapter, shape_watch):
    with shape_watch() as watch:
        make_adapter({Q: (96, 80)}, 3).apply_to({f"{Q}.weight": torch.zeros(96, 80)})
    assert watch.largest == 96 * 80
