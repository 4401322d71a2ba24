"""Rank prefixes: the first k rows and columns, lossless, at the scale that was chosen."""

import math
import re

import pytest
import torch

import lorafold as lf

TIGHT = {"rtol": 1e-11, "atol": 1e-11}
SCALINGS = {"constant": lambda ratio: 1.0, "linear": lambda ratio: ratio, "sqrt": math.sqrt}


@pytest.mark.parametrize("trainable", [False, True])
@pytest.mark.parametrize("scaling", SCALINGS)
def test_prefixes_by_the_definition(net, base, three, x, expected, scaling, trainable):
    live = lf.attach(net, three, rank_scaling=scaling, trainable=trainable)
    for name in ("a", "c"):  # "c" has ranks of 1 to 4: each module runs min(k, its own)
        for k in (1, 2, 3, 4):
            wanted = expected(base, [(three[name], -0.5)], x, k, SCALINGS[scaling])
            with live.use(name, rank=k, c=-0.5):
                torch.testing.assert_close(net(x).detach(), wanted, **TIGHT)
            with live.use([name, None], rank=k, c=-0.5):
                found = net(x).detach()
            torch.testing.assert_close(found[:3], wanted[:3], **TIGHT)
            assert torch.equal(found[3:], base(x)[3:])


def test_scalings_differ(net, three, x):
    found = []
    for scaling in SCALINGS:
        live = lf.attach(net, three, rank_scaling=scaling)
        with live.use("a", rank=1):
            found.append(net(x))
        live.detach()
    assert not torch.allclose(found[0], found[1])
    assert not torch.allclose(found[1], found[2])


def test_constant_scale_by_default_leaves_kept_directions_alone(net, make_update):
    # Rank 16 → 4 at the scale max_rank/r would make the kept directions four times as large.
    u = make_update(8, 8, 4, dtype=torch.float64)
    live = lf.attach(net, lf.Adapter({"layers.0.q": u}))
    layer = net.layers[0].q
    first = torch.linalg.pinv(u.A)[:, 0]  # excites rank 0 alone
    with live.use("default"):
        whole = layer(first)
    with live.use("default", rank=1):
        torch.testing.assert_close(layer(first), whole, **TIGHT)


def test_descending_and_ascending_is_lossless(net, base, three, x):
    live = lf.attach(net, three)
    outputs = {}
    for k in (4, 3, 2, 1, 0, 1, 2, 3, 4, None):
        with live.use("a", rank=k):
            found = net(x)
        assert torch.equal(found, outputs.setdefault(4 if k is None else k, found))
    assert torch.equal(outputs[0], base(x))
    assert len({o.sum().item() for o in outputs.values()}) == 5


def test_switching_allocates_nothing_on_the_device(net, three, x):
    live = lf.attach(net, three)
    live.use("a")
    patch = net.layers[0].q.lorafold
    bank = patch.bank("own")
    pointers = bank.A.data_ptr(), bank.Bt.data_ptr(), patch.now.w["own"].data_ptr()
    for name, k in [("a", 2), ("b", None), ("c", 1), ("a", 4)]:
        live.use(name, rank=k, c=0.5)
        now = bank.A.data_ptr(), bank.Bt.data_ptr(), patch.now.w["own"].data_ptr()
        assert now == pointers


def test_ranks_by_module(net, base, three, x, expected):
    live = lf.attach(net, three)
    ranks = {}
    for path in three["a"]:
        ranks[path] = 1 if path.endswith(".q") else 0 if ".3." in path else 4
    with live.use("a", rank={"q": 1, re.compile(r"layers\.3\."): 0}):
        torch.testing.assert_close(net(x), expected(base, [(three["a"], 1)], x, ranks), **TIGHT)
    with live.use(["a", None], rank=[{"q": 1, re.compile(r"layers\.3\."): 0}, None]):
        wanted = expected(base, [(three["a"], 1)], x, ranks)
        torch.testing.assert_close(net(x)[:3], wanted[:3], **TIGHT)


def test_rank_zero_is_the_base(net, base, three, x):
    live = lf.attach(net, {**three, "new": lf.PiSSA(rank=2, mean=1)})
    for what in ("a", "new", ["a", "new"], {"a": 1, "new": 1}):
        with live.use(what, rank=0):
            assert torch.equal(net(x), base(x))
    with live.use("a", rank={"q": 0, "up": 0, "down": 0}):
        assert torch.equal(net(x), base(x))


def test_ranks_of_rows(net, base, three, x, expected):
    live = lf.attach(net, three)
    names, ranks = ["a", "a", "b", None, "c", "a"], [1, 4, 2, 3, 2, 0]
    c = [1, -1, 0.5, 1, 2, 1]
    with live.use(names, rank=ranks, c=c):
        found = net(x)
    for i, name in enumerate(names):
        mix = [] if name is None else [(three[name], c[i])]
        wanted = expected(base, mix, x[i : i + 1], ranks[i])
        torch.testing.assert_close(found[i : i + 1], wanted, **TIGHT)


@pytest.mark.parametrize("k", [1, 2, 3])
def test_a_nested_prefix_is_the_best_update_of_its_rank(net, base, make_update, dense, k):
    # Eckart and Young: the error of the best rank-k approximation is the tail of the spectrum.
    spectrum = [4.0, 2.0, 1.0, 0.5]
    u = make_update(16, 8, 4, spectrum=spectrum, dtype=torch.float64, scale=0.3)
    plain = lf.Adapter({"layers.1.up": u})
    live = lf.attach(net, {"plain": plain, "nested": plain.nested()})
    layer, alone, eye = net.layers[1].up, base.layers[1].up, torch.eye(8, dtype=torch.float64)

    def update(name, **options):  # ΔW is what the layer adds on the unit vectors
        with live.use(name, **options):
            return (layer(eye) - alone(eye)).T.detach()

    torch.testing.assert_close(update("nested"), dense(u), **TIGHT)
    U, S, Vh = torch.linalg.svd(dense(u), full_matrices=False)
    best = U[:, :k] * S[:k] @ Vh[:k]
    torch.testing.assert_close(update("nested", rank=k), best, rtol=1e-9, atol=1e-9)
    tail = math.sqrt(sum(s**2 for s in spectrum[k:]))
    assert (update("nested", rank=k) - dense(u)).norm().item() == pytest.approx(tail, rel=1e-9)
    assert (update("plain", rank=k) - dense(u)).norm() > 1.01 * tail  # any gauge is worse
