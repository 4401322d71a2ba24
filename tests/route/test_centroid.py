"""Centroids against the definition, the threshold on examples that are new, overlaps, files."""

import json
import math
import re

import numpy as np
import pytest
import torch

import lorafold as lf
from lorafold.route import Calibration, load


def unit(x):
    return x / np.linalg.norm(x, axis=-1, keepdims=True)


def fresh(router, data):
    """(share routed, share of these that is wrong) on labelled examples."""
    rows = [(row, name) for name, x in data.items() for row in router(x)]
    routed = [(row, name) for row, name in rows if row is not None]
    wrong = sum(name not in row for row, name in routed)
    return len(routed) / len(rows), wrong / max(1, len(routed))


def test_the_nearest_centroid_by_the_definition(make_clusters, names):
    data = make_clusters(names, 10, spread=1.0)
    router = lf.CentroidRouter.fit(data, error=None)
    x = torch.cat(list(make_clusters(names, 5, spread=1.0, seed=1).values()))
    centers = np.stack([unit(unit(v.double().numpy()).mean(0)) for v in data.values()])
    wanted = (unit(x.double().numpy()) @ centers.T).argmax(1)
    assert router(x) == [{names[i]: 1.0} for i in wanted]
    np.testing.assert_allclose(
        router.scores(x).numpy(), unit(x.double().numpy()) @ centers.T, atol=1e-6
    )


def test_each_example_is_held_out_once(make_clusters, names):
    """The threshold and the counts, by leaving every example out in a loop."""
    data = make_clusters(names, 6, spread=1.5)
    router = lf.CentroidRouter.fit(data, error=0.2)
    best, right, confused = [], [], {}
    for name, xs in data.items():
        for i in range(len(xs)):
            centers = []
            for other, ys in data.items():
                kept = torch.cat([ys[:i], ys[i + 1 :]]) if other == name else ys
                centers.append(unit(unit(kept.double().numpy()).mean(0)))
            scores = unit(xs[i].double().numpy()) @ np.stack(centers).T
            best.append(scores.max())
            right.append(names[scores.argmax()] == name)
            if not right[-1]:
                pair = frozenset((name, names[scores.argmax()]))
                confused[pair] = confused.get(pair, 0) + 1
    order = np.argsort(best)[::-1]
    count, wrong = np.arange(1, len(order) + 1), np.cumsum(~np.array(right)[order])
    last = np.nonzero((wrong == 0) | ((wrong + 1) / (count + 1) <= 0.2))[0][-1]
    assert router.calibration.heldout == len(best)
    assert router.threshold == pytest.approx(np.array(best)[order][last], abs=1e-6)
    assert router.calibration.routed == pytest.approx((last + 1) / len(best))
    assert router.calibration.wrong == pytest.approx(wrong[last] / count[last])
    found = {frozenset((o.a, o.b)): o.confused for o in router.overlaps(2)}
    assert found == {pair: pytest.approx(n / 12) for pair, n in confused.items()}
    assert confused


@pytest.mark.parametrize("error", [0.05, 0.1])
def test_the_error_holds_on_new_examples(make_clusters, names, error):
    fit, new = (make_clusters(names, n, spread=1.8, seed=n) for n in (400, 1000))
    router = lf.CentroidRouter.fit(fit, error=error)
    routed, wrong = fresh(router, new)
    assert 0.5 * error < wrong < 1.5 * error
    assert routed == pytest.approx(router.calibration.routed, abs=0.05)
    routed, wrong = fresh(lf.CentroidRouter.fit(fit, error=None), new)
    assert routed == 1
    assert wrong > 0.13  # the threshold had something to do


@pytest.mark.filterwarnings("ignore:at no threshold")
def test_the_error_holds_on_few_examples_too(make_clusters, names):
    """In the mean over many fits, each on so few that the threshold could be lucky."""
    new = make_clusters(names, 300, spread=1.8, seed=99)
    for each in (24, 40):
        found = [
            fresh(lf.CentroidRouter.fit(make_clusters(names, each, spread=1.8, seed=s)), new)
            for s in range(30)
        ]
        routed, wrong = (sum(column) / 30 for column in zip(*found, strict=True))
        assert wrong < 0.055  # .064 and .058 without the one more wrong
        assert routed > 0.15


def test_what_is_like_nothing_is_not_routed(make_clusters, names):
    router = lf.CentroidRouter.fit(make_clusters(names, 50))
    others = make_clusters(names, 50, centers=5)
    assert sum(row is not None for x in others.values() for row in router(x)) < 20
    assert router([[0.0] * 16]) == [None]
    assert lf.CentroidRouter.fit(make_clusters(names, 5), error=None)([[0.0] * 16]) == [None]


def test_examples_of_nothing_raise_the_threshold(make_clusters, names):
    data = make_clusters(names, 50)
    strange = make_clusters(names, 50, spread=0.8, seed=3)["sql"]
    before = lf.CentroidRouter.fit(data, error=0.01)
    after = lf.CentroidRouter.fit({**data, None: strange}, error=0.01)
    assert after.threshold > before.threshold
    assert torch.equal(after.centroids, before.centroids)


def test_overlapping_domains_are_told(make_clusters, names):
    data = make_clusters(names, 100)
    data["sqlite"] = make_clusters(names, 100, seed=5)["sql"]
    router = lf.CentroidRouter.fit(data, error=0.2)
    first = router.overlaps()[0]
    assert {first.a, first.b} == {"sql", "sqlite"}
    assert first.cosine > 0.9
    assert first.confused > 0.05
    assert len(router.overlaps()) < 3
    assert len(router.overlaps(-1)) == 10


def test_held_out_examples_of_their_own(make_clusters, names):
    data, other = make_clusters(names, 50), make_clusters(names, 30, spread=2.0, seed=3)
    router = lf.CentroidRouter.fit(data, heldout=other, error=0.1)
    assert router.calibration.heldout == 120
    again = lf.CentroidRouter.fit(data, error=None)
    assert again.calibrate(other, 0.1) == router.calibration
    assert again.calibrate(other, None) is None
    assert again.threshold == -math.inf


def test_a_hopeless_router_says_so(make_clusters, names):
    g = torch.Generator().manual_seed(0)
    noise = {n: torch.randn(30, 16, generator=g) for n in names}
    with pytest.warns(UserWarning, match="abstains from everything"):
        router = lf.CentroidRouter.fit(noise, error=0.0, heldout={n: -x for n, x in noise.items()})
    assert router(noise["sql"]) == [None] * 30


def test_ties_go_together():
    score = torch.tensor([0.9, 0.5, 0.5, 0.5, 0.1])
    right = torch.tensor([True, True, True, False, True])
    found = Calibration.of(score, right, 0.1)
    assert (found.threshold, found.routed) == (pytest.approx(0.9), 0.2)
    assert Calibration.of(score, right, 0.32).threshold == pytest.approx(0.9)
    assert Calibration.of(score, right, 0.34).threshold == pytest.approx(0.1)
    assert Calibration.of(score, ~right, 0.0).threshold == math.inf


def test_one_name_and_one_example():
    router = lf.CentroidRouter.fit({"only": [[1.0, 0.0], [1.0, 0.2], [1.0, -0.2]]})
    assert router([[2.0, 0.0], [-1.0, 0.0]]) == [{"only": 1.0}, None]
    with pytest.raises(lf.MismatchError, match="takes two examples"):
        lf.CentroidRouter.fit({"a": [[1.0, 0.0]], "b": [[0.0, 1.0]]})
    router = lf.CentroidRouter.fit({"a": [[1.0, 0.0]], "b": [[0.0, 1.0]]}, error=None)
    assert router([[1.0, 2.0]]) == [{"b": 1.0}]


def test_a_thousand_names_in_one_product():
    g = torch.Generator().manual_seed(0)
    centers = torch.randn(1000, 64, generator=g)
    data = {f"a{i}": centers[i] + 0.1 * torch.randn(3, 64, generator=g) for i in range(1000)}
    router = lf.CentroidRouter.fit(data)
    rows = router(centers[:64])
    assert rows == [{f"a{i}": 1.0} for i in range(64)]


def test_a_library_of_a_thousand_names_runs_by_rows(make_adapter):
    sources = {f"a{i}": make_adapter({"0": (4, 6)}, 1, seed=i) for i in range(1000)}
    library = lf.fold(sources, form="svd", rank=1, bits=8)
    g = torch.Generator().manual_seed(0)
    centers = torch.randn(1000, 32, generator=g)
    fit = {name: centers[i : i + 1] for i, name in enumerate(library.names)}
    router = lf.CentroidRouter.fit(fit, error=None)
    learned = lf.LearnedRouter(library, input_dim=32, top_k=1)
    model = torch.nn.Sequential(torch.nn.Linear(6, 4))
    live = lf.attach(model, library, slots=64)
    x = torch.randn(64, 6, generator=g)
    rows = router(centers[500:564])
    with live.use(rows), torch.no_grad():
        found = model(x)
    with torch.no_grad():
        for i, row in enumerate(rows):
            (name,) = row
            assert name == library.names[500 + i]
            torch.testing.assert_close(
                found[i], model(x[i]) + library[name]["0"](x[i]), rtol=1e-4, atol=1e-4
            )
    assert learned.weights(centers).shape == (1000, 1000)
    with live.use(learned(centers[:64])):
        assert model(x).isfinite().all()


@pytest.mark.parametrize("size", [1e-30, 1e30])
def test_size_means_nothing(make_clusters, names, size):
    data = make_clusters(names, 10)
    router = lf.CentroidRouter.fit({n: x * size for n, x in data.items()})
    assert torch.allclose(router.centroids, lf.CentroidRouter.fit(data).centroids, atol=1e-6)
    assert router(data["law"] / size) == router(data["law"])


def test_explain(make_clusters, names):
    data = make_clusters(names, 20)
    router = lf.CentroidRouter.fit(data)
    yes, no = router.explain(torch.stack([data["law"].mean(0), -data["law"].mean(0)]))
    assert yes.mix == {"law": 1.0}
    assert yes.nearest[0] == ("law", yes.score)
    assert len(yes.nearest) == 3
    assert str(yes).startswith("'law' (nearest: 'law' ")
    assert no.mix is None
    assert str(no).startswith(f"none: {no.score:.3f} is below {router.threshold:.3f}")
    assert router.explain([]) == []


def test_rows_run(net, base, three, x, make_clusters):
    data = make_clusters(["a", "b"], 10)
    router = lf.CentroidRouter.fit(data)
    live = lf.attach(net, three)
    vectors = torch.stack([data["a"].mean(0), data["b"].mean(0), -data["a"].mean(0)])
    rows = router(vectors)
    assert rows == [{"a": 1.0}, {"b": 1.0}, None]
    with live.use(rows):
        found = net(x)
    with live.use(["a", "b", None]):
        assert torch.equal(found, net(x))
    assert torch.equal(found[4:], base(x)[4:])
    with pytest.raises(lf.MismatchError, match="CentroidRouter gives for a batch"):
        live.use(router)


def test_saved_and_loaded_equal(make_clusters, names, tmp_path):
    data = make_clusters(names, 20, spread=1.5)
    router = lf.CentroidRouter.fit(data, error=0.1)
    router.save(tmp_path / "router")
    for again in (lf.CentroidRouter.load(tmp_path / "router"), load(tmp_path / "router")):
        assert again.names == router.names
        assert torch.equal(again.centroids, router.centroids)
        assert again.calibration == router.calibration
        assert again.overlaps() == router.overlaps()
        assert again(data["sql"]) == router(data["sql"])
    with pytest.raises(lf.FileError, match="overwrite=True"):
        router.save(tmp_path / "router")
    router.save(tmp_path / "router", overwrite=True)
    (tmp_path / "thesis").mkdir()
    (tmp_path / "thesis" / "thesis.txt").write_text("mine")
    with pytest.raises(lf.FileError, match="not a router"):
        router.save(tmp_path / "thesis", overwrite=True)


def test_an_encoder_by_name_is_saved_and_a_function_is_not(tmp_path):
    texts = {"up": ["AAA", "BBB", "ABAB"], "down": ["aaa", "bbb", "abab"]}
    router = lf.CentroidRouter.fit(texts, "ngrams")
    router.save(tmp_path / "named")
    assert lf.CentroidRouter.load(tmp_path / "named")(["AAB"]) == [{"up": 1.0}]

    def encode(batch):
        return [[float(t.isupper()), float(t.islower())] for t in batch]

    lf.CentroidRouter.fit(texts, encode).save(tmp_path / "own")
    with pytest.raises(lf.MismatchError, match="need an encoder"):
        lf.CentroidRouter.load(tmp_path / "own")(["AAB"])
    assert lf.CentroidRouter.load(tmp_path / "own", encode)(["AAB"]) == [{"up": 1.0}]
    assert lf.CentroidRouter.load(tmp_path / "own")([[1, 0]]) == [{"up": 1.0}]


def test_damage_is_told(make_clusters, names, tmp_path):
    router = lf.CentroidRouter.fit(make_clusters(names, 5))
    folder = tmp_path / "router"
    with pytest.raises(lf.FileError, match=r"no router\.json"):
        load(folder)
    router.save(folder)
    file, numbers = folder / "router.json", folder / "router.safetensors"
    record, whole = json.loads(file.read_text()), numbers.read_bytes()
    numbers.write_bytes(whole[:-1] + bytes([whole[-1] ^ 1]))
    with pytest.raises(lf.FileError, match="checksum"):
        load(folder)
    numbers.unlink()
    with pytest.raises(lf.FileError, match="No such file"):
        load(folder)
    numbers.write_bytes(whole)
    for text, says in [
        ("", "is empty"),
        ("[]", "must hold a JSON object"),
        (json.dumps({**record, "lorafold_router": 2}), "version 2"),
        (json.dumps({**record, "lorafold_router": True}), "'lorafold_router'"),
        (json.dumps({**record, "kind": "odd"}), "unknown kind 'odd'"),
        (json.dumps({**record, "names": []}), "'names'"),
        (json.dumps({**record, "names": record["names"][:2]}), "2 names"),
        (json.dumps({**record, "counts": [[1]]}), "4 names"),
        (json.dumps({**record, "counts": [1, 2]}), "'counts'"),
        (json.dumps({**record, "confused": [[9, 9, 1]]}), "4 names"),
        (json.dumps({**record, "calibration": 3}), "'calibration'"),
        (json.dumps({**record, "calibration": {"error": 1}}), "'threshold'|'heldout'"),
        (
            json.dumps({**record, "calibration": {**record["calibration"], "threshold": None}}),
            "'threshold'",
        ),
        (json.dumps({**record, "encoder": 3}), "'encoder'"),
        (
            json.dumps({**record, "calibration": {**record["calibration"], "wrong": 10**400}}),
            "'wrong' is too large",
        ),
    ]:
        file.write_text(text)
        with pytest.raises(lf.FileError, match=says):
            load(folder)
    file.write_text(json.dumps(record))
    with pytest.raises(lf.FileError, match="kind 'centroid'"):
        lf.LearnedRouter.load(folder)
    lf.CentroidRouter.fit(make_clusters(names, 5, seed=1)).save(tmp_path / "other")
    numbers.write_bytes((tmp_path / "other" / "router.safetensors").read_bytes())
    with pytest.raises(lf.FileError, match="checksum"):  # one's names with another's numbers
        load(folder)


@pytest.mark.parametrize(
    ("data", "says"),
    [
        ({}, "nothing to route to"),
        ([["x"]], "found a list"),
        ({"a": []}, "no examples of 'a'"),
        ({"a": "text"}, "must be a list"),
        ({None: ["x"]}, "nothing to route to"),
        ({3: ["x"]}, "non-empty text, found 3"),
        ({"": ["x"]}, "non-empty text"),
        ({"a": ["x", [1.0]]}, "either texts or vectors"),
        ({"a": [[1.0, 2.0]], "b": [[1.0]]}, "differ in length"),
        ({"a": [[1.0, math.nan]]}, "vector 0 of the batch is not finite"),
        ({"a": [[1.0], [1.0, 2.0]]}, "of one length"),
        ({"a": ["x"], "b": ["y"]}, "need an encoder"),
        ({"a": torch.ones(2, 2, 2)}, r"is \(B, D\)"),
        ({"a": torch.tensor(1.0)}, "must be a list"),
        ({"a": {"x", "y"}}, "must be a list"),
        ({"a": {"x": 1}}, "must be a list"),
        ({"a": b"xy"}, "must be a list"),
        ({"a": torch.ones(3, 0)}, "hold no number"),
        ({"a": [[1.0]], "b": [[2.0], [math.inf]]}, r"vector 1 .* \(an example of 'b'\)"),
    ],
)
def test_bad_examples(data, says):
    with pytest.raises(lf.MismatchError, match=says):
        lf.CentroidRouter.fit(data)


@pytest.mark.parametrize("error", [-0.1, 1.0, math.nan, "x", True])
def test_bad_errors(error):
    with pytest.raises(lf.MismatchError, match="error must be"):
        lf.CentroidRouter.fit({"a": [[1.0], [2.0]]}, error=error)


def test_bad_batches(make_clusters, names):
    router = lf.CentroidRouter.fit(make_clusters(names, 5))
    assert router([]) == []
    assert router(torch.zeros(0, 16)) == []
    for batch, says in [
        ("text", "found one text"),
        (3, "texts or vectors"),
        (b"text", "texts or vectors"),
        ({"a", "b"}, "texts or vectors"),
        ({"a": 1}, "texts or vectors"),
        (torch.tensor(1.0), "texts or vectors"),
        ([[1.0] * 15], "15 numbers where the router has 16"),
        (torch.full((2, 16), math.inf), "vector 0"),
        (torch.ones(16), r"is \(B, D\)"),
        ([None], r"is \(B, D\)"),
        ([object()], "texts or vectors"),
    ]:
        with pytest.raises(lf.MismatchError, match=says):
            router(batch)
    with pytest.raises(lf.MismatchError, match=re.escape("held-out examples of 'new'")):
        router.calibrate({"new": [[1.0] * 16]})
    with pytest.raises(lf.MismatchError, match="no held-out examples"):
        router.calibrate({})
    with pytest.raises(lf.MismatchError, match="3 numbers where the router has 16"):
        router.scores(torch.ones(2, 3))
    with pytest.warns(UserWarning, match="abstains from everything"):
        router.calibrate({None: [[1.0] * 16]})


@pytest.mark.parametrize(
    "centroids",
    [
        torch.ones(2, 4),
        torch.eye(4),
        torch.eye(2)[0],
        torch.full((2, 2), math.nan),
        torch.eye(2, dtype=torch.int64),
        torch.zeros(2, 0),
        [[1.0, 0.0], [0.0, 1.0]],
    ],
)
def test_centroids_that_are_none(centroids):
    with pytest.raises(lf.MismatchError, match="centroid"):
        lf.CentroidRouter(["a", "b"], centroids)
    router = lf.CentroidRouter(["a", "<b>"], torch.eye(2))
    assert router([[0.0, 2.0]]) == [{"<b>": 1.0}]
    assert repr(router) == "CentroidRouter(2 adapters, vectors of 2 numbers)"


def test_torchs_random_state_and_the_arguments_stay(make_clusters, names):
    data = make_clusters(names, 5)
    kept = {n: x.clone() for n, x in data.items()}
    before = torch.get_rng_state()
    lf.CentroidRouter.fit(data)(data["sql"])
    assert torch.equal(torch.get_rng_state(), before)
    assert all(torch.equal(data[n], kept[n]) for n in names)
