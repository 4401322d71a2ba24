"""The trained head: a bare loop, `fit`, blends, files."""

import json
import math

import pytest
import torch
import torch.nn.functional as F

import lorafold as lf
from lorafold.route import load


def accuracy(router, data):
    right = [max(row, key=row.get) == name for name, x in data.items() for row in router(x)]
    return sum(right) / len(right)


def rings(each, seed=0):
    """Two names that no centroid tells apart: within and around."""
    g = torch.Generator().manual_seed(seed)
    angle = 2 * math.pi * torch.rand(2, each, generator=g)
    size = torch.tensor([1.0, 3.0])[:, None] + 0.2 * torch.randn(2, each, generator=g)
    return dict(zip(("in", "out"), torch.stack([angle.cos(), angle.sin()], -1) * size[..., None],
                    strict=True))  # fmt: skip


def test_untrained_it_trains_in_a_bare_loop(make_adapter):
    library = lf.fold({n: make_adapter({"m": (6, 4)}, 1, seed=i) for i, n in enumerate("abc")})
    router = lf.LearnedRouter(library, input_dim=8, hidden=16)
    assert router.names == ("a", "b", "c")
    assert router.num_parameters == 8 * 16 + 16 + 16 * 3 + 3
    g = torch.Generator().manual_seed(0)
    labels = torch.randint(3, (128,), generator=g)
    vectors = torch.randn(3, 8, generator=g)[labels] + 0.1 * torch.randn(128, 8, generator=g)
    weights = router.weights(vectors)
    assert weights.shape == (128, 3)
    torch.testing.assert_close(weights.sum(1), torch.ones(128))
    optimizer = torch.optim.Adam(router.parameters(), lr=0.01)
    losses = []
    for _ in range(60):
        loss = F.nll_loss(router.weights(vectors).log(), labels)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert losses[-1] < 0.1 < losses[0]
    assert all(
        max(row, key=row.get) == "abc"[i] for row, i in zip(router(vectors), labels, strict=True)
    )
    heldout = {n: vectors[labels == i] for i, n in enumerate("abc")}
    assert router.calibrate(heldout).wrong == 0


def test_fit_learns_what_centroids_cannot():
    router = lf.LearnedRouter.fit(rings(200), hidden=32)
    new = rings(300, seed=1)
    assert accuracy(router, new) > 0.97
    assert accuracy(lf.CentroidRouter.fit(rings(200), error=None), new) < 0.75
    assert router.training_run.accuracy > 0.95
    linear = lf.LearnedRouter.fit(rings(200), hidden=None)
    assert linear.num_parameters == 2 * 2 + 2
    assert accuracy(linear, new) < 0.75


def test_weights_by_the_definition(make_clusters, names):
    x = torch.cat(list(make_clusters(names, 3).values()))
    router = lf.LearnedRouter(names, 16, 5, temperature=0.5)
    first, last = router.head[0], router.head[2]
    hidden = F.gelu(x.double() @ first.weight.double().T + first.bias.double())
    logits = hidden @ last.weight.double().T + last.bias.double()
    wanted = (logits / 0.5).softmax(1).detach()
    torch.testing.assert_close(router.weights(x).double(), wanted, rtol=1e-5, atol=1e-6)
    rows = router(x)
    for row, own in zip(rows, wanted, strict=True):
        assert row == {
            n: pytest.approx(float(w), abs=1e-5) for n, w in zip(names, own, strict=True)
        }
    blend = router.blend(x)
    assert list(blend) == names
    assert blend == {
        n: pytest.approx(float(w), abs=1e-5) for n, w in zip(names, wanted.mean(0), strict=True)
    }


def test_top_k_keeps_the_best_and_sums_to_one(make_clusters, names):
    x = torch.cat(list(make_clusters(names, 3).values()))
    whole = lf.LearnedRouter(names, 16)(x)
    for k in (1, 2, 9):
        for row, all_of in zip(lf.LearnedRouter(names, 16, top_k=k)(x), whole, strict=True):
            best = sorted(all_of, key=all_of.get, reverse=True)[:k]
            total = sum(all_of[n] for n in best)
            assert row == {n: pytest.approx(all_of[n] / total, abs=1e-6) for n in best}


def test_the_error_holds_on_new_examples(make_clusters, names):
    router = lf.LearnedRouter.fit(
        make_clusters(names, 400, spread=1.8), error=0.05, heldout=0.5, hidden=8
    )
    new = make_clusters(names, 1000, spread=1.8, seed=1)
    rows = [(row, name) for name, x in new.items() for row in router(x)]
    routed = [max(row, key=row.get) == name for row, name in rows if row is not None]
    assert 0.02 < 1 - sum(routed) / len(routed) < 0.08
    assert len(routed) / len(rows) == pytest.approx(router.calibration.routed, abs=0.05)


def test_it_stops_early_and_keeps_the_best(make_clusters, names):
    seen = []
    router = lf.LearnedRouter.fit(
        make_clusters(names, 40, spread=2.0),
        patience=3,
        progress=lambda done, total, stage: seen.append((done, total, stage)),
    )
    run = router.training_run
    assert run.epochs == run.best + 3 < 300
    assert [done for done, _, _ in seen] == [*range(1, run.epochs + 1), *range(1, run.best + 1)]
    losses = [float(stage.rpartition(" ")[2]) for _, _, stage in seen[: run.epochs]]
    assert min(losses) == pytest.approx(run.loss, abs=1e-4) == losses[run.best - 1]


def test_the_head_is_trained_on_all_that_it_may_see(make_clusters, names):
    data = make_clusters(names, 12, spread=1.5)
    router = lf.LearnedRouter.fit(data, hidden=None)
    best = router.training_run.best
    again = lf.LearnedRouter.fit(data, hidden=None, heldout=0, epochs=best)  # stopped on nothing
    assert again.training_run.best == best > 3
    assert torch.equal(again.head.weight, router.head.weight)


def test_what_it_is_calibrated_on_is_neither_trained_nor_stopped_on(make_clusters, names):
    data = make_clusters(names, 30, spread=1.5)
    other = [make_clusters(names, 30, spread=s, seed=1) for s in (0.1, 2.0)]
    good, bad = (lf.LearnedRouter.fit(data, error=0.1, heldout=held) for held in other)
    assert torch.equal(good.weights(data["sql"]), bad.weights(data["sql"]))
    assert good.training_run == bad.training_run
    assert good.calibration.routed == 1 > bad.calibration.routed


def test_the_error_holds_over_small_fits(make_clusters, names):
    """The control: calibrated on what it was trained on, it routes too much."""
    wrong, routed = {"fit": 0, "control": 0}, {"fit": 0, "control": 0}
    for seed in range(8):
        data = make_clusters(names, 40, spread=1.5, seed=seed)
        new = make_clusters(names, 300, spread=1.5, seed=100 + seed)
        router = lf.LearnedRouter.fit(data, error=0.1, seed=seed)
        for kind in wrong:
            if kind == "control":
                router.calibrate(data, 0.1)
            for name, x in new.items():
                rows = [row for row in router(x) if row is not None]
                wrong[kind] += sum(max(row, key=row.get) != name for row in rows)
                routed[kind] += len(rows)
    assert wrong["fit"] / routed["fit"] < 0.1 < wrong["control"] / routed["control"]
    assert routed["fit"] > 0.7 * routed["control"]


def test_seeds_decide_and_torchs_own_state_stays(make_clusters, names):
    data = make_clusters(names, 20)
    before = torch.get_rng_state()
    routers = [lf.LearnedRouter.fit(data, seed=s, epochs=5) for s in (0, 0, 1)]
    assert torch.equal(torch.get_rng_state(), before)
    first, same, other = (r.weights(data["sql"]) for r in routers)
    assert torch.equal(first, same)
    assert not torch.equal(first, other)


def test_examples_of_nothing_are_held_out(make_clusters, names):
    data = {**make_clusters(names, 30), None: make_clusters(["x"], 30, centers=3)["x"]}
    router = lf.LearnedRouter.fit(data, error=0.1, epochs=30)
    assert router.names == tuple(names)
    assert router.calibration.heldout == 4 * 6 + 30
    with pytest.raises(lf.MismatchError, match="calibrated on held-out"):
        lf.LearnedRouter.fit({"a": [[1.0]], "b": [[2.0]]}, error=0.1)


def test_few_examples_are_trained_on_all_the_same():
    router = lf.LearnedRouter.fit({"a": [[1.0, 0.0]], "b": [[0.0, 1.0]]}, epochs=100)
    assert router([[2.0, 0.0]])[0]["a"] > 0.5
    same = lf.LearnedRouter.fit({"a": [[1.0], [1.0]], "b": [[1.0]]}, epochs=2)
    assert torch.isfinite(same.weights(torch.ones(1, 1))).all()


@pytest.mark.parametrize("mode", [torch.no_grad, torch.inference_mode])
def test_it_trains_in_whatever_mode_it_is_called(make_clusters, names, mode):
    data = make_clusters(names, 20)
    wanted = lf.LearnedRouter.fit(data, epochs=3, error=0.1)
    with mode():
        router = lf.LearnedRouter.fit({n: x.clone() for n, x in data.items()}, epochs=3, error=0.1)
        assert router(data["sql"]) == wanted(data["sql"])
    assert router.calibration == wanted.calibration
    router.weights(data["sql"]).sum().backward()  # it goes on training


def test_what_is_abstained_from_is_the_bases_share(make_clusters, names):
    data = make_clusters(names, 30)
    router = lf.LearnedRouter.fit(data, error=0.05)
    strange = make_clusters(names, 40, spread=3.0, seed=1, centers=7)["sql"]
    rows = router(strange)
    share = sum(row is not None for row in rows) / len(rows)
    assert 0 < share < 1
    blend = router.blend(strange)
    assert list(blend) == names
    assert sum(blend.values()) == pytest.approx(share, abs=1e-5)
    for name, weight in blend.items():
        own = sum(row[name] for row in rows if row is not None) / len(rows)
        assert weight == pytest.approx(own, abs=1e-6)


@pytest.mark.parametrize("size", [1e-30, 1e30])
def test_size_means_nothing(make_clusters, names, size):
    data = {n: x * size for n, x in make_clusters(names, 20).items()}
    router = lf.LearnedRouter.fit(data, epochs=100, hidden=8)
    assert accuracy(router, data) > 0.95


def test_saved_and_loaded_equal(make_clusters, names, tmp_path):
    data = make_clusters(names, 20)
    router = lf.LearnedRouter.fit(data, error=0.2, epochs=10, temperature=0.7, top_k=2, hidden=7)
    router.save(tmp_path / "router")
    for again in (lf.LearnedRouter.load(tmp_path / "router"), load(tmp_path / "router")):
        assert torch.equal(again.weights(data["sql"]), router.weights(data["sql"]))
        assert again(data["law"]) == router(data["law"])
        assert again.training_run == router.training_run
        assert again.calibration == router.calibration
        assert (again.top_k, again.hidden, again.temperature) == (2, 7, 0.7)
    for dtype in (torch.float32, torch.float64, torch.bfloat16):
        untrained = lf.LearnedRouter(names, 16, None).to(dtype)
        untrained.save(tmp_path / "untrained", overwrite=True)
        again = lf.LearnedRouter.load(tmp_path / "untrained")
        assert torch.equal(again.weights(data["sql"]), untrained.weights(data["sql"]))
        assert again.head.weight.dtype == dtype
        again.weights(data["sql"]).log().mean().backward()  # and can be trained on
        assert again.head.weight.grad.any()
    file = tmp_path / "router" / "router.json"
    record = json.loads(file.read_text())
    before = torch.get_rng_state()
    for change in (
        {"hidden": 8},
        {"hidden": 10**15},
        {"hidden": 10**40},
        {"input_dim": 10**12},
        {"temperature": 0},
        {"temperature": 10**400},
        {"top_k": -1},
        {"training": {"epochs": 1}},
    ):
        file.write_text(json.dumps({**record, **change}))
        with pytest.raises(lf.FileError, match=r"router\.json"):
            load(tmp_path / "router")
    assert torch.equal(torch.get_rng_state(), before)


def test_an_encoder_that_is_a_module_is_no_part_of_it(tmp_path):
    class Encode(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.table = torch.nn.Embedding(256, 4)

        def forward(self, texts):
            return torch.stack([self.table(torch.tensor(list(t.encode()))).mean(0) for t in texts])

    encode = Encode()
    router = lf.LearnedRouter.fit({"a": ["xx", "xy"], "b": ["qq", "qr"]}, encode, hidden=3)
    assert router.num_parameters == 4 * 3 + 3 + 3 * 2 + 2
    assert not any("table" in key for key in router.state_dict())
    assert router(["xx"])[0].keys() == {"a", "b"}
    assert encode.table.weight.grad is None


def test_rows_and_blends_run(net, three, x, make_clusters):
    data = make_clusters(list("abc"), 10)
    router = lf.LearnedRouter.fit(data, epochs=20)
    live = lf.attach(net, three)
    vectors = torch.cat([v[:1] for v in data.values()])
    with live.use(router(vectors)):
        rows = net(x)
    assert rows.isfinite().all()
    with live.use(router.blend(vectors)):
        assert net(x).isfinite().all()
    with pytest.raises(lf.MismatchError, match="at least one input"):
        router.blend([])


@pytest.mark.parametrize(
    ("options", "says"),
    [
        ({"names": []}, "nothing to route to"),
        ({"names": "sql"}, "a list of texts"),
        ({"names": ["a", "a"]}, "'a' is given twice"),
        ({"names": 3}, "a list of texts"),
        ({"input_dim": 0}, "input_dim must be"),
        ({"input_dim": 2.0}, "input_dim must be"),
        ({"hidden": 0}, "hidden must be"),
        ({"temperature": 0}, "temperature must be"),
        ({"temperature": math.inf}, "temperature must be"),
        ({"top_k": 0}, "top_k must be"),
        ({"encoder": 3}, "encoder must be"),
        ({"seed": "x"}, "seed must be"),
        ({"seed": 2**70}, "seed must be"),
    ],
)
def test_bad_options(options, says):
    with pytest.raises(lf.MismatchError, match=says):
        lf.LearnedRouter(**{"names": ["a"], "input_dim": 2, **options})


@pytest.mark.parametrize(
    ("options", "says"),
    [
        ({"epochs": 0}, "epochs must be"),
        ({"patience": 0}, "patience must be"),
        ({"lr": 0}, "lr must be"),
        ({"heldout": 1.0}, "heldout must be"),
        ({"heldout": "x"}, "heldout must be"),
        ({"error": 2}, "error must be"),
        ({"seed": None}, "seed must be"),
    ],
)
def test_bad_options_of_fit(options, says):
    with pytest.raises(lf.MismatchError, match=says):
        lf.LearnedRouter.fit({"a": [[1.0], [2.0]]}, **options)


@pytest.mark.parametrize("vectors", [[[0.0, 0.0]], None, torch.ones(2, 3), torch.tensor(1.0)])
def test_bad_vectors_of_a_bare_loop(vectors):
    with pytest.raises(lf.MismatchError, match="vectors"):
        lf.LearnedRouter(["a", "b"], 2).weights(vectors)


def test_vectors_beyond_the_heads_dtype():
    huge = {n: torch.full((4, 2), x, dtype=torch.float64) for n, x in (("a", 1e300), ("b", -1e300))}
    with pytest.raises(lf.MismatchError, match="larger than torch.float32 holds"):
        lf.LearnedRouter.fit(huge)
    tiny = {n: x * 1e-300 * 1e-300 for n, x in huge.items()}
    assert lf.LearnedRouter.fit(tiny, epochs=2).weights(tiny["a"]).isfinite().all()
