"""Modulated singular directions: W + c · U diag(Δs) Vh, against dense float64 algebra."""

import pytest
import torch
from torch import nn

import lorafold as lf
from lorafold.attach.run.factors import Modulation
from lorafold.errors import MismatchError
from lorafold.layers.kinds import LINEAR

TIGHT = {"rtol": 1e-10, "atol": 1e-10}


def attached(net, name="default", **options):
    live = lf.attach(net, {name: lf.PiSSA(**{"rank": 3, "seed": 0, **options})})
    return live, live._state.trained(name).fresh


def shaken(live, size=0.3):
    for p in live.parameters():
        p.data = size * torch.randn(p.shape, dtype=p.dtype)


def svd(W):
    return torch.linalg.svd(W.detach().double(), full_matrices=False)


def test_the_model_is_unchanged_at_the_start(net, base, x):
    live, modules = attached(net)
    assert torch.equal(net(x), base(x))
    for module in modules.values():
        assert module.delta_s.dtype == torch.float32
        assert not module.delta_s.any()
        assert [n for n, _ in module.named_parameters()] == ["delta_s"]
    assert sum(p.numel() for p in live.parameters()) == 12 * 3


def test_it_equals_extracting_the_directions_and_modulating_them(net, base):
    live, modules = attached(net, dtype=torch.float64)
    shaken(live)
    h = torch.randn(5, 16, dtype=torch.float64)
    for path, m in modules.items():
        layer, alone = net.get_submodule(path), base.get_submodule(path)
        x = h[:, : m.Vh.shape[1]]
        residual = alone.weight - m.U * m.S @ m.Vh  # the directions, taken out
        for c in (1, -0.5, 0):
            S = m.S + c * m.delta_s
            wanted = x @ residual.T + (x @ m.Vh.T * S) @ m.U.T
            if alone.bias is not None:
                wanted = wanted + alone.bias
            with live.use("default", c=c):
                torch.testing.assert_close(layer(x), wanted, **TIGHT)
                if c == 0:
                    assert torch.equal(layer(x), alone(x))


def test_the_directions_are_those_of_the_weight(net, base):
    _, modules = attached(net)
    for path, m in modules.items():
        U, S, Vh = svd(base.get_submodule(path).weight)
        torch.testing.assert_close(m.S.double(), S[:3], rtol=1e-5, atol=1e-5)
        for i in range(3):  # the signs of a pair are arbitrary together
            pair = torch.outer(m.U[:, i], m.Vh[i]).double()
            torch.testing.assert_close(pair, torch.outer(U[:, i], Vh[i]), rtol=1e-3, atol=1e-4)
        assert m.index.tolist() == [0, 1, 2]
        assert m.tail_depth == 0


def test_w_is_never_altered(net, base, x):
    live, _ = attached(net, mean=0.1, std=0.1)
    optimizer = torch.optim.AdamW(live.parameters(), lr=0.1)
    for _ in range(3):
        net(x).square().sum().backward()
        optimizer.step()
    weights = dict(base.named_parameters())
    for name, p in net.named_parameters():
        assert ("lorafold" in name) == p.requires_grad
        if "lorafold" not in name:
            assert torch.equal(p, weights[name])
    live.detach()
    assert torch.equal(net(x), base(x))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_zero_is_exact_in_every_dtype(make_net, x, dtype):
    net, base = make_net(dtype), make_net(dtype)
    live, modules = attached(net, mean=0.3)
    assert {m.delta_s.dtype for m in modules.values()} == {torch.float32}
    assert not torch.equal(net(x), base(x))
    with live.use("default", c=0):
        assert torch.equal(net(x), base(x))


def test_mean_and_std_of_the_start(make_net):
    _, modules = attached(make_net(), mean=0.25)
    assert all((m.delta_s == 0.25).all() for m in modules.values())
    _, modules = attached(make_net(), rank=8, mean=1.0, std=0.5)
    start = torch.cat([m.delta_s.detach() for m in modules.values()])
    assert len(start) == 96
    assert start.mean().item() == pytest.approx(1, abs=0.2)
    assert start.std().item() == pytest.approx(0.5, abs=0.15)
    _, again = attached(make_net(), rank=8, mean=1.0, std=0.5)
    assert torch.equal(start, torch.cat([m.delta_s.detach() for m in again.values()]))


def test_a_mean_breaks_the_symmetry_of_the_dial(make_net, x):
    net = make_net()
    live, _ = attached(net)
    gaps = []
    for c in (1, -1):  # at 0, both sides of the dial are the same model
        with live.use("default", c=c):
            gaps.append(net(x))
    assert torch.equal(*gaps)
    net = make_net()
    live, _ = attached(net, mean=0.01)
    outputs = []
    for c in (1, -1):
        with live.use("default", c=c):
            outputs.append(net(x))
    assert not torch.equal(*outputs)


def test_ranks_are_clamped_per_layer():
    model = nn.ModuleDict({"wide": nn.Linear(9, 4), "square": nn.Linear(6, 6)})
    live = lf.attach(model, lf.PiSSA())
    ranks = {path: m.rank for path, m in live._state.trained("default").fresh.items()}
    assert ranks == {"wide": 4, "square": 6}


def test_the_randomised_svd_finds_the_same(net, base):
    _, modules = attached(net, niter=30)
    for path, m in modules.items():
        _, S, _ = svd(base.get_submodule(path).weight)
        torch.testing.assert_close(m.S.double(), S[:3], rtol=1e-4, atol=1e-4)
        assert m.directions == len(S)
        assert m.tail_depth == 0


def test_rank_prefixes(net, base):
    live, modules = attached(net, dtype=torch.float64)
    shaken(live)
    m, layer, alone = modules["layers.0.q"], net.layers[0].q, base.layers[0].q
    h = torch.randn(5, 8, dtype=torch.float64)
    with live.use("default", rank=2):
        wanted = alone(h) + (h @ m.Vh[:2].T * m.delta_s[:2]) @ m.U[:, :2].T
        torch.testing.assert_close(layer(h), wanted, **TIGHT)


def test_targets_exclude_and_layers(make_net):
    for options, count in [
        ({"targets": "q"}, 4),
        ({"exclude": ["up", "lm_head"]}, 8),
        ({"layers": (0.5, 1)}, 6),
        ({"targets": ["q", "down"], "layers": (0, 0.25)}, 2),
    ]:
        _, modules = attached(make_net(), **options)
        assert len(modules) == count


def test_convolutions_and_embeddings_are_modulated_too():
    torch.manual_seed(0)
    model = nn.ModuleDict({"conv": nn.Conv1d(3, 4, 3), "embed": nn.Embedding(7, 4)}).double()
    live = lf.attach(model, lf.PiSSA(rank=2, targets=["conv", "embed"], dtype=torch.float64))
    weights = {path: m.weight.detach().clone() for path, m in model.items()}
    shaken(live)
    x = torch.randn(2, 3, 6, dtype=torch.float64)
    m = live._state.trained("default").fresh["conv"]
    W = weights["conv"] + (m.U * m.delta_s @ m.Vh).reshape(4, 3, 3)
    wanted = nn.functional.conv1d(x, W, model["conv"].bias)
    torch.testing.assert_close(model["conv"](x), wanted, **TIGHT)
    m = live._state.trained("default").fresh["embed"]
    W = weights["embed"] + (m.U * m.delta_s @ m.Vh).T
    ids = torch.tensor([[1, 6, 0]])
    torch.testing.assert_close(model["embed"](ids), W[ids], **TIGHT)


# Which directions are chosen


@pytest.fixture(scope="module")
def inputs(base):
    """Two sets of inputs for each layer, of unlike spread in the coordinates."""
    g = torch.Generator().manual_seed(3)
    found = {}
    for path, m in base.named_modules():
        if isinstance(m, nn.Linear) and path != "lm_head":
            n = m.in_features
            scale = 4.0 ** torch.randn(n, generator=g)
            other = 4.0 ** torch.randn(n, generator=g)
            found[path] = (
                torch.randn(40, n, generator=g) * scale + 0.5,
                torch.randn(30, n, generator=g) * other,
            )
    return found


def scores(select, W, X, Y=None):
    """By the definition, in float64."""
    _, S, Vh = svd(W)
    both = X if Y is None else torch.cat([X, Y])
    excited = (both.double() @ Vh.T).abs().mean(0)
    if select == "min_std":
        return torch.minimum((X.double() @ Vh.T).std(0), (Y.double() @ Vh.T).std(0))
    return {"s_only": S, "wanda": S * excited, "act_only": excited}[select]


@pytest.mark.parametrize("select", ["s_only", "wanda", "act_only"])
def test_choosing_by_one_set(net, base, inputs, select):
    calibration = {path: X for path, (X, _) in inputs.items()}
    live, modules = attached(net, select=select, calibration=calibration)
    depths = []
    for path, m in modules.items():
        order = scores(select, base.get_submodule(path).weight, inputs[path][0]).argsort(
            descending=True
        )
        assert m.index.tolist() == order[:3].tolist()
        assert m.select == select
        depths.append(m.tail_depth)
        S = svd(base.get_submodule(path).weight)[1]
        torch.testing.assert_close(m.S.double(), S[m.index], rtol=1e-5, atol=1e-5)
    assert (max(depths) > 0) == (select != "s_only")
    assert len(modules) == 12
    assert live.names == ["default"]


@pytest.mark.parametrize("select", ["min_std", None])
def test_choosing_by_two_sets_is_the_default_when_there_are_two(net, base, inputs, select):
    _, modules = attached(net, select=select, calibration=inputs)
    for path, m in modules.items():
        order = scores("min_std", base.get_submodule(path).weight, *inputs[path])
        assert m.index.tolist() == order.argsort(descending=True)[:3].tolist()
        assert m.select == "min_std"


def test_two_sets_by_their_names(make_net, inputs):
    expected = {p: m.index.tolist() for p, m in attached(make_net(), calibration=inputs)[1].items()}
    for calibration in (
        {path: {"cho": X, "rej": Y} for path, (X, Y) in inputs.items()},
        {path: {"rejected": Y, "chosen": X} for path, (X, Y) in inputs.items()},
        {
            side: {path: XY[n] for path, XY in inputs.items()}
            for n, side in enumerate(("cho", "rej"))
        },
    ):
        _, modules = attached(make_net(), calibration=calibration)
        assert {p: m.index.tolist() for p, m in modules.items()} == expected
    with pytest.raises(MismatchError, match=r"one set only of layer 'layers.0.q'"):
        lf.PiSSA(calibration={"cho": {"layers.0.q": torch.ones(2, 8)}, "rej": {}})


def test_one_set_alone_leaves_the_default(net, inputs):
    _, modules = attached(net, calibration={path: X for path, (X, _) in inputs.items()})
    assert {m.select for m in modules.values()} == {"s_only"}


def test_tail_depth():
    def depth(index, directions):
        r, index = len(index), torch.tensor(index)
        parts = torch.zeros(12, r), torch.zeros(r), torch.zeros(r, 12), torch.zeros(r)
        return Modulation(LINEAR, *parts, index, directions).tail_depth

    assert depth([0, 1, 2], 10) == 0
    assert depth([7, 8, 9], 10) == 1
    assert depth([9, 0], 10) == pytest.approx(0.5)
    assert depth([1, 0], 2) == 0


def no_inputs(X):
    return "x"


BAD = [
    ({"select": "wanda"}, r"select='wanda' needs calibration= \(see lf.calibrate\)"),
    ({"select": "min_std"}, "select='min_std' needs calibration="),
    ({"select": "wanda", "calibration": {}}, "the calibration has nothing for module 'layers.0.q'"),
    ({"select": "wanda", "calibration": 3}, "calibration must be what lf.calibrate returned"),
    ({"select": "act_only", "each": lambda X: X[:, :5]}, r"inputs \(n, 8\), found \(40, 5\)"),
    ({"select": "act_only", "each": lambda X: X[:0]}, r"inputs \(n, 8\), found \(0, 8\)"),
    ({"select": "act_only", "each": no_inputs}, r"must be inputs \(n, 8\), found str"),
    ({"select": "act_only", "each": lambda X: (X, X, X)}, "one set of inputs or two, not 3"),
    ({"select": "wanda", "each": lambda X: X / 0}, "'layers.0.q' holds NaN or infinite values"),
    ({"select": "min_std", "each": lambda X: X}, "select='min_std' needs two sets of inputs"),
]


@pytest.mark.parametrize(("options", "message"), BAD)
def test_missing_or_wrong_calibrations(net, inputs, fingerprint, options, message):
    before = fingerprint(net)
    options = dict(options)
    if "each" in options:
        change = options.pop("each")
        options["calibration"] = {path: change(X) for path, (X, _) in inputs.items()}
    with pytest.raises(MismatchError, match=message):
        attached(net, **options)
    assert fingerprint(net) == before
