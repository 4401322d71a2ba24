"""`similarity`: cosines against dense algebra, what is exact, and what follows from them."""

from __future__ import annotations

import importlib
import sys

import numpy as np
import pytest
import torch

import lorafold as lf
from lorafold.collection.sources import named_handles
from lorafold.compare.pairs import Pairs

SHAPES = {"layers.0.q": (24, 40), "layers.0.v": (12, 40), "layers.1.q": (24, 40)}
WIDE = {f"layers.{n}.{name}": (96, 128) for n in range(3) for name in ("q", "v")}


def family(make_adapter, shapes=SHAPES):
    """Ranks, scales, dtypes and targets of all kinds."""
    few = {p: s for p, s in shapes.items() if not p.endswith("1.q")}
    return {
        "two": make_adapter(shapes, 2, seed=1, scale=2.0),
        "eight": make_adapter(shapes, 8, seed=2, scale=0.5),
        "few": make_adapter(few, 3, seed=3),
        "half": make_adapter(shapes, 4, seed=4, dtype=torch.bfloat16),
        "double": make_adapter(shapes, 4, seed=5, dtype=torch.float64),
        "mixed": make_adapter(shapes, {p: 1 + k for k, p in enumerate(shapes)}, seed=6),
    }


def sketched(sources, seed=0, **options):
    """As where all pairs are too many to be computed."""
    pairs = Pairs(named_handles(sources), **options)
    return pairs, pairs.sketched(seed)


@pytest.fixture
def always_sketched(monkeypatch):
    # `lorafold.compare.similarity` is the function as well.
    module = importlib.import_module("lorafold.compare.similarity")
    monkeypatch.setattr(module, "_CHEAP", -1.0)


# Cosines


def test_the_matrix_is_the_dense_one(make_adapter, dense_cosines):
    sources = family(make_adapter)
    found = lf.similarity(sources)
    assert found.names == tuple(sources)
    assert found.matrix.dtype == np.float64
    np.testing.assert_allclose(found.matrix, dense_cosines(list(sources.values())), atol=2e-6)
    assert (found.matrix == found.matrix.T).all()
    assert found.error == 0
    assert found.known.all()
    norms = [a.norm() for a in sources.values()]
    np.testing.assert_allclose(found.norms, norms, rtol=1e-5)
    assert found.missing == {"layers.1.q": ("few",)}
    for path in SHAPES:
        wanted = dense_cosines(list(sources.values()), [path])
        np.testing.assert_allclose(found.module(path), wanted, atol=2e-6)
    assert found.modules == tuple(sorted(SHAPES))


def test_files_in_blocks_give_the_same(make_adapter, tmp_path):
    """Under a limit that holds one or two adapters' factors of a module."""
    sources = family(make_adapter)
    for name, a in sources.items():
        lf.save(a, tmp_path / name)
    whole = lf.similarity({n: tmp_path / n for n in sources})
    for memory in (8 * 4 * 64 * 8, 8 * 4 * 64 * 12):
        found = lf.similarity({n: tmp_path / n for n in sources}, memory=memory)
        np.testing.assert_allclose(found.matrix, whole.matrix, atol=1e-6)
        blocks = sketched({n: tmp_path / n for n in sources}, memory=memory)[1]
        np.testing.assert_allclose(blocks.matrix, sketched(sources)[1].matrix, atol=1e-6)
    glob = lf.similarity(tmp_path)
    assert set(glob.names) == set(sources)
    assert (glob.nbytes > 0).all()


def test_a_library_is_a_source(make_adapter):
    sources = {name: make_adapter(SHAPES, 2, seed=s) for s, name in enumerate(("a", "b", "c"))}
    lib = lf.fold(sources, tolerance=0.01)
    found = lf.similarity(lib)
    assert found.names == ("a", "b", "c")
    np.testing.assert_allclose(found.matrix, lf.similarity(sources).matrix, atol=0.02)
    np.testing.assert_allclose(found.matrix, lf.similarity(dict(lib.items())).matrix, atol=1e-6)


def test_gauge_scale_and_rank_hide_no_duplicate(make_adapter, regauged):
    a = make_adapter(SHAPES, 4, seed=1)
    padded = lf.Adapter(
        {
            p: lf.LowRank(
                torch.cat([u.A, torch.randn(3, u.shape[1])]),
                torch.cat([u.B, torch.zeros(u.shape[0], 3)], 1),
                u.scale,
            )
            for p, u in a.modules.items()
        }
    )
    bad = lf.Adapter(
        {p: lf.LowRank(1e18 * u.A, 1e-18 * u.B, u.scale) for p, u in a.modules.items()}
    )
    cancels = lf.Adapter(
        {
            p: lf.LowRank(
                torch.cat([u.A, 1e3 * u.A + u.A]), torch.cat([-1e3 * u.B, u.B], 1), u.scale
            )
            for p, u in a.modules.items()
        }
    )
    sources = {"a": a, "gauge": regauged(a, 3), "nested": a.nested(), "padded": padded}
    sources |= {"bad": bad, "cancels": cancels, "twice": 2 * a, "minus": -1 * a}
    found = lf.similarity(sources)
    np.testing.assert_allclose(np.abs(found.matrix), 1, atol=1e-5)
    assert (found.matrix[-1, :-1] < 0).all()


def test_a_common_start_is_no_likeness():
    """Two unrelated B on one A: .96 for vLoRA, in the space of factors; near 0 in ΔW."""
    analysis = pytest.importorskip("vlora.analysis")
    from vlora.io import LoRAWeights

    g = torch.Generator().manual_seed(0)
    A = torch.randn(8, 512, generator=g)

    def task():
        return lf.Adapter({"q": lf.LowRank(A, 0.2 * torch.randn(512, 8, generator=g))})

    one, two = task(), task()
    theirs = [LoRAWeights(["q"], {"q": a["q"].A}, {"q": a["q"].B}, 8) for a in (one, two)]
    assert analysis.compute_similarity_matrix(theirs)[0, 1] > 0.95
    assert abs(lf.similarity([one, two]).matrix[0, 1]) < 0.1
    assert abs(sketched([one, two])[1].matrix[0, 1]) < 0.2


def test_zero_huge_and_tiny_updates(make_adapter, dense_cosines):
    a, b = make_adapter(SHAPES, 4, seed=1), make_adapter(SHAPES, 4, seed=2)
    sources = {"a": a, "b": b, "huge": 1e30 * a, "tiny": 1e-30 * b, "zero": 0.0 * a}
    found = lf.similarity(sources)
    wanted = dense_cosines([a, b, a, b, 0.0 * a])
    np.testing.assert_allclose(found.matrix, wanted, atol=1e-5)
    assert (found.matrix[-1] == 0).all()
    many = lf.similarity({"a": a, "b": lf.Adapter({p: u * 1e100 for p, u in a.modules.items()})})
    assert many.matrix[0, 1] == pytest.approx(1, abs=1e-5)
    u = a["layers.0.q"].to(dtype=torch.float64)
    with pytest.raises(lf.MismatchError, match=r"'layers\.0\.q' has an update that is too large"):
        lf.similarity({"a": a, "b": lf.Adapter({"layers.0.q": lf.LowRank(u.A * 1e100, u.B)})})


def test_modules_far_apart_in_size_are_not_lost(make_adapter, dense_cosines, always_sketched):
    a, b = make_adapter(WIDE, 4, seed=1), make_adapter(WIDE, 4, seed=2)
    first = sorted(WIDE)[0]
    odd = lf.Adapter({p: u * (1e-30 if p == first else 1.0) for p, u in a.modules.items()})
    found = lf.similarity({"a": a, "b": b, "odd": odd})
    np.testing.assert_allclose(
        found.matrix, dense_cosines([a, b, odd]), atol=6 * found.error + 1e-5
    )
    assert found.matrix[0, 2] > 0.8


@pytest.mark.parametrize(("of_A", "of_B"), [(1e-42, 1e30), (1.0, 1e-40), (1e25, 1e-44)])
def test_factors_at_the_end_of_float32(make_adapter, of_A, of_B):
    """1 over the least of its numbers is more than it holds."""
    a = make_adapter(SHAPES, 1, seed=1)
    odd = {p: lf.LowRank(of_A * u.A, of_B * u.B) for p, u in a.modules.items()}
    found = lf.similarity({"a": a, "odd": lf.Adapter(odd)})
    assert found.matrix[0, 1] == pytest.approx(1, abs=0.05)  # what so few bits hold of it
    assert (found.norms > 0).all()


def test_at_threshold_one_rounding_hides_no_copy(make_adapter, regauged):
    a = make_adapter(SHAPES, 4, seed=1)
    found = lf.similarity({"a": a, "copy": regauged(a, 1), "nested": a.nested(), "minus": -1 * a})
    assert found.clusters(1) == [["a", "copy", "nested"], ["minus"]]
    assert len(found.duplicates(1)) == 3
    near = a + 5e-3 * make_adapter(SHAPES, 4, seed=2)
    assert lf.similarity({"a": a, "near": near}).duplicates(1) == []


# Sketches


def test_the_error_of_sketches_is_what_it_says(make_adapter, dense_cosines):
    sources = {f"a{k}": make_adapter(WIDE, 1 + k % 5, seed=k) for k in range(40)}
    off = ~np.eye(40, dtype=bool)
    wanted = dense_cosines(list(sources.values()))
    found = sketched(sources)[1]
    real = np.sqrt(np.mean((found.matrix - wanted)[off] ** 2))
    assert found.error == pytest.approx(real, rel=0.3)
    assert found.error > 1e-3
    assert (np.abs(found.matrix - wanted) < 7 * found.error).all()
    again, other = sketched(sources)[1], sketched(sources, seed=1)[1]
    assert (found.matrix == again.matrix).all()
    assert not np.allclose(found.matrix, other.matrix, atol=1e-6)


def test_what_is_near_is_exact(make_adapter, blend, dense_cosines, always_sketched):
    base = {f"a{k}": make_adapter(WIDE, 4, seed=k) for k in range(30)}
    near = {
        f"n{k}": blend(base[f"a{k}"], make_adapter(WIDE, 2, seed=100 + k), c)
        for k, c in enumerate((1.0, 0.999, 0.95, 0.91, 0.9, 0.85, 0.5, -0.95))
    }
    sources = {**base, **near}
    wanted = dense_cosines(list(sources.values()))
    found = lf.similarity(sources)
    assert found.error > 0
    np.testing.assert_allclose(found.matrix[found.known], wanted[found.known], atol=3e-6)
    assert found.known[wanted > 0.9 - 2 * found.error].all()
    assert found.known.mean() < 0.1
    assert (np.abs(found.matrix - wanted) < 7 * found.error).all()
    # Asking for less refines more, and changes nothing of what is there.
    before = found.matrix.copy()
    lower = found.at(0.4)
    assert lower.threshold == 0.4
    assert lower.known[wanted > 0.45].all()
    np.testing.assert_allclose(lower.matrix[lower.known], wanted[lower.known], atol=3e-6)
    assert (found.matrix == before).all()
    assert len(found.clusters(0.4)) == 38 - 7
    everything = lf.similarity(sources, exact=True)
    assert everything.known.all()
    assert everything.error == 0
    np.testing.assert_allclose(everything.matrix, wanted, atol=3e-6)


def test_pairs_of_one_start_among_others_are_found(make_adapter, blend, always_sketched):
    """Their sketches are farther off than those of the many, by which the error is estimated."""
    sources = {f"a{k}": make_adapter({"q": (128, 160)}, 1, seed=k) for k in range(60)}
    one = sources["a0"]["q"]
    kin = lf.Adapter({"q": lf.LowRank(one.A, torch.randn(128, 1), one.scale)})
    sources |= {"kin": kin, "near": blend(sources["a0"], kin, 0.92)}
    found = lf.similarity(sources)
    i, j = found.names.index("a0"), found.names.index("near")
    assert found.known[i, j]
    assert found.matrix[i, j] == pytest.approx(0.92, abs=1e-4)


def test_few_pairs_just_above_the_threshold_among_many_duplicates(
    make_adapter, blend, dense_cosines, always_sketched
):
    """Sketches of duplicates hardly disagree, which says nothing of pairs farther apart."""
    shapes = {"q": (128, 160)}
    a = make_adapter(shapes, 2, seed=0)
    many = {f"m{k}": blend(a, make_adapter(shapes, 2, seed=k), 0.9999) for k in range(1, 300)}
    edge = {f"e{k}": blend(a, make_adapter(shapes, 2, seed=1000 + k), 0.9005) for k in range(3)}
    sources = {"a": a, **many, **edge}
    found, wanted = lf.similarity(sources), dense_cosines(list(sources.values()))
    assert found.known[wanted >= 0.9].all()
    np.testing.assert_allclose(found.matrix[found.known], wanted[found.known], atol=3e-6)


@pytest.mark.parametrize("threshold", [0.5, 0.9, 0.98])
def test_pairs_that_differ_in_one_direction_are_found(
    make_adapter, blend, dense_cosines, always_sketched, threshold
):
    """Their sketches are several times farther off than those that tell the error of most pairs."""
    shapes = {f"layers.{n}.q": (96, 112) for n in range(12)}
    sources, c = {}, threshold + 0.002
    for k in range(40):
        path = f"layers.{k % 12}.q"
        broad = make_adapter(shapes, 6, seed=k)
        odd = make_adapter({path: shapes[path]}, 1, seed=100 + k)
        sources |= {f"broad{k}": broad, f"near{k}": blend(broad, odd, c)}
        # Two that have nothing else, and the same inputs.
        kin = lf.Adapter({path: lf.LowRank(odd[path].A, torch.randn(96, 1))})
        sources |= {f"odd{k}": odd, f"kin{k}": blend(odd, kin, c)}
    found, wanted = lf.similarity(sources, threshold=threshold), dense_cosines([*sources.values()])
    assert (np.triu(wanted, 1) >= threshold).sum() >= 80
    assert found.known[wanted >= threshold].all()
    np.testing.assert_allclose(found.matrix[found.known], wanted[found.known], atol=3e-6)
    assert found.known.mean() < 0.1, "or it would be simpler to compute all"
    unknown = ~found.known
    real = np.sqrt(np.mean((found.matrix - wanted)[unknown] ** 2))
    assert real / 2 < found.error < 2 * real


def test_the_focus_bounds_what_a_sketch_is_off(make_adapter, dense):
    """‖ΔW ΔWᵀ‖ over ‖ΔW‖², of the modules that are wide enough for something to be lost."""
    shapes = {"q": (96, 112), "v": (64, 50), "narrow": (12, 30)}
    a = make_adapter(shapes, 3, seed=1)
    one = make_adapter({"q": (96, 112)}, 1, seed=2)
    sources = {"a": a, "one": 1e30 * one, "small": make_adapter({"narrow": (12, 30)}, 2, seed=3)}
    focus = sketched({**sources, "zero": 0 * a})[1].focus
    S = {p: torch.linalg.svdvals(dense(u)) for p, u in a.items()}
    fourth = sum(float((S[p] ** 4).sum()) for p in ("q", "v"))
    square = sum(float((s**2).sum()) for s in S.values())
    np.testing.assert_allclose(focus, [fourth**0.5 / square, 1, 0, 0], rtol=1e-5)


def test_narrow_modules_are_sketched_without_loss(make_adapter, dense_cosines):
    sources = family(make_adapter)
    found = sketched(sources)[1]
    assert found.error < 1e-6
    np.testing.assert_allclose(found.matrix, dense_cosines(list(sources.values())), atol=5e-6)


def test_nothing_global_is_touched(make_adapter, always_sketched):
    sources = family(make_adapter)
    before = torch.get_rng_state()
    digests = [a.digest for a in sources.values()]
    lf.similarity(sources).clusters(0.1)
    assert torch.equal(before, torch.get_rng_state())
    assert digests == [a.digest for a in sources.values()]


# What follows


@pytest.fixture(scope="module")
def kin(make_adapter, blend, regauged):
    """a with two copies, one twice as strong, and a near one; b with a copy of another head; c."""
    a, b, c = (make_adapter(SHAPES, 4, seed=s) for s in (1, 2, 3))
    head = {"base_model.model.score.modules_to_save.weight": torch.ones(2, 2)}
    config = {"modules_to_save": ["score"]}
    return {
        "a": a,
        "copy": regauged(a, 1),
        "nested": a.nested(),
        "twice": 2 * a,
        "near": blend(a, b, 0.95),
        "b": b,
        "b_head": lf.Adapter(b.modules, head, config),
        "c": c,
    }


def test_clusters_and_duplicates(kin):
    found = lf.similarity(kin)
    assert found.clusters() == [["a", "copy", "nested", "twice", "near"], ["b", "b_head"], ["c"]]
    assert found.clusters(0.99) == [
        ["a", "copy", "nested", "twice"],
        ["b", "b_head"],
        ["near"],
        ["c"],
    ]
    pairs = found.duplicates()
    assert {(p.a, p.b) for p in pairs} == {
        *(("a", "copy"), ("a", "nested"), ("a", "twice"), ("copy", "nested")),
        *(("copy", "twice"), ("nested", "twice"), ("b", "b_head")),
    }
    assert pairs[0].cosine == pytest.approx(1, abs=1e-5)
    assert len(found.duplicates(0.9)) == len(pairs) + 4
    assert [p.cosine for p in found.duplicates(0.9)] == sorted(
        (p.cosine for p in found.duplicates(0.9)), reverse=True
    )


def test_only_what_does_the_same_could_go(kin):
    """Not what is as strong again, nor what has another head."""
    assert lf.similarity(kin).redundant() == {"copy": "a", "nested": "a"}
    zero = {"z": 0.0 * kin["a"], "y": 0.0 * kin["b"]}
    found = lf.similarity({**kin, **zero})
    assert found.redundant() == {"copy": "a", "nested": "a", "y": "z"}
    assert ("z", "y") not in {(p.a, p.b) for p in found.duplicates()}


def test_the_smallest_file_stays(make_adapter):
    a = make_adapter(SHAPES, 4, seed=1)
    large = a + 0.0 * make_adapter(SHAPES, 8, seed=2)
    assert lf.similarity({"large": large, "small": a}).redundant() == {"large": "small"}


def test_nearest(kin):
    found = lf.similarity(kin)
    order = found.nearest("near", k=4)
    assert {p.b for p in order} == {"a", "copy", "nested", "twice"}
    assert order[0].a == "near"
    assert len(found.nearest("c", k=50)) == 7
    with pytest.raises(lf.UnknownNameError, match="did you mean 'near'"):
        found.nearest("neat")
    for k in (0, -1, 2.5, True):
        with pytest.raises(lf.MismatchError, match="k must be"):
            found.nearest("a", k=k)


@pytest.mark.parametrize("count", [3, 4, 5, 9])
def test_an_outlier_among_few_is_found(make_adapter, count):
    sources = {f"a{k}": make_adapter(SHAPES, 4, seed=k) for k in range(count)}
    assert lf.similarity(sources).outliers() == []
    sources["a1"] = 1000 * sources["a1"]
    (found,) = lf.similarity(sources).outliers()
    assert found.name == "a1"
    assert found.z > 5
    mean = sources["a0"]
    for name in list(sources)[1:]:
        mean = mean + sources[name]
    wanted = sources["a1"].distance((1 / count) * mean)
    assert found.distance == pytest.approx(wanted, rel=1e-4)


def test_an_outlier_in_direction_and_none_among_copies(make_adapter, blend, regauged):
    a = make_adapter(SHAPES, 4, seed=0)
    kin = {f"k{k}": blend(a, make_adapter(SHAPES, 4, seed=10 + k), 0.95) for k in range(6)}
    odd = make_adapter(SHAPES, 4, seed=99)
    odd = odd * (a.norm() / odd.norm())
    assert [o.name for o in lf.similarity({**kin, "odd": odd}).outliers()] == ["odd"]
    copies = {f"c{k}": regauged(a, k) for k in range(6)}
    assert lf.similarity(copies).outliers() == []
    assert lf.similarity({"a": a, "big": 1000 * a}).outliers() == []
    for threshold in ("far", None, True, float("nan")):
        with pytest.raises(lf.MismatchError, match="threshold must be a number of deviations"):
            lf.similarity(copies).outliers(threshold)


def test_to_pandas(kin, monkeypatch):
    found = lf.similarity(kin)
    pandas = pytest.importorskip("pandas")
    frame = found.to_pandas()
    assert isinstance(frame, pandas.DataFrame)
    assert frame.loc["a", "near"] == found.matrix[0, 4]


def test_pandas_is_asked_for(kin, monkeypatch):
    monkeypatch.setitem(sys.modules, "pandas", None)
    with pytest.raises(lf.MissingExtraError, match=r"pip install 'lorafold\[compare\]'"):
        lf.similarity(kin).to_pandas()


def test_one_adapter(make_adapter, always_sketched):
    found = lf.similarity(make_adapter(SHAPES, 4))
    assert found.matrix.tolist() == [[1.0]]
    assert (found.clusters(), found.duplicates(), found.outliers()) == ([["task_0"]], [], [])
    assert (found.redundant(), found.nearest("task_0")) == ({}, [])
    assert "1 adapters" in repr(found)


# Bad input


def test_what_is_refused(make_adapter, tmp_path):
    a = make_adapter(SHAPES, 2)
    for nothing in ([], {}, ()):
        with pytest.raises(lf.MismatchError, match="empty"):
            lf.similarity(nothing)
    dora = make_adapter(SHAPES, 2, config={"use_dora": True})
    with pytest.raises(lf.RefusedError, match="'d' can't be compared: this is a DoRA"):
        lf.similarity({"a": a, "d": dora})
    pissa = make_adapter(SHAPES, 2, config={"init_lora_weights": "pissa"})
    with pytest.raises(lf.RefusedError, match="'p' .*PiSSA.*save_pretrained"):
        lf.similarity({"a": a, "p": pissa})
    with pytest.raises(lf.MismatchError, match="different bases"):
        lf.similarity({"a": a, "b": make_adapter({"layers.0.q": (8, 8)}, 2)})
    other, one = (make_adapter(SHAPES, 2, base_model=name) for name in ("x", "y"))
    with pytest.raises(lf.MismatchError, match="different bases"):
        lf.similarity({"a": one, "b": other})
    with pytest.raises(lf.FileError):
        lf.similarity([tmp_path / "nothing", a])
    with pytest.raises(lf.UnknownNameError, match=r"did you mean 'layers\.0\.q'"):
        lf.similarity(a).module("layers.0.qq")


def test_kinds_of_modules(make_adapter, tmp_path):
    """Convolutions, embeddings and experts are compared; one module of two kinds is refused."""
    a, b = (make_adapter({"m": (8, 27)}, 2, seed=s) for s in (1, 2))
    plain = lf.similarity([a, b]).matrix
    for layout in (lf.Layout("conv", (3, 3, 3)), lf.Layout("embedding")):
        odd = [lf.Adapter(x.modules, layouts={"m": layout}) for x in (a, b)]
        np.testing.assert_array_equal(lf.similarity(odd).matrix, plain)
        with pytest.raises(lf.MismatchError, match=r"'m' is of kind linear in 'a' and"):
            lf.similarity({"a": a, "odd": odd[0]})


def test_what_is_not_finite_is_named(folder_with_nan, make_adapter):
    with pytest.raises(lf.MismatchError, match=r"adapter 'odd': .*NaN or infinite"):
        lf.similarity([folder_with_nan, make_adapter(SHAPES, 2)])


@pytest.fixture
def folder_with_nan(make_adapter, tmp_path):
    from safetensors.torch import load_file, save_file

    lf.save(make_adapter(SHAPES, 2), tmp_path / "odd")
    place = tmp_path / "odd" / "adapter_model.safetensors"
    tensors = load_file(place)
    tensors[next(iter(tensors))][0, 0] = float("nan")
    save_file(tensors, place)
    return tmp_path / "odd"


@pytest.mark.parametrize("threshold", [1.5, -2, float("nan"), "high", True, None])
def test_a_threshold_is_a_cosine(make_adapter, threshold):
    a = make_adapter(SHAPES, 2)
    with pytest.raises(lf.MismatchError, match="threshold must be a cosine"):
        lf.similarity(a, threshold=threshold)
    with pytest.raises(lf.MismatchError, match="threshold must be a cosine"):
        lf.similarity(a).clusters(threshold)


def test_names_are_data(make_adapter):
    names = ["<script>alert(1)</script>", "../../etc", "[red]x[/red]", "a/b", "a_b", ""]
    sources = {n: make_adapter(SHAPES, 2, seed=k) for k, n in enumerate(names[:-1])}
    assert lf.similarity(sources).names == tuple(names[:-1])


def test_progress(make_adapter):
    seen = []
    lf.similarity([make_adapter(SHAPES, 2)], progress=lambda *told: seen.append(told))
    assert seen == [(k, 3, p) for k, p in enumerate(sorted(SHAPES))]
