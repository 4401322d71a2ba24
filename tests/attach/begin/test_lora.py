"""Fresh factors: the model is unchanged at step 0, and the start is what the init says."""

import math
import re

import pytest
import torch
from torch import nn

import lorafold as lf
from lorafold.attach.begin.lora import leading_directions
from lorafold.errors import MismatchError

INITS = ["kaiming", "orthogonal", "pissa", "pissa_niter_4"]


def attached(net, **options):
    live = lf.attach(net, lf.LoRA(**{"rank": 4, "seed": 0, **options}))
    return live, live._state.trained("default").fresh


@pytest.mark.parametrize("init", ["kaiming", "orthogonal"])
def test_the_model_is_unchanged_at_step_0(make_net, base, net, x, init):
    attached(net, init=init)
    assert torch.equal(net(x), base(x))
    with lf.Live.of(net).use(["default", None]):
        assert torch.equal(net(x), base(x))


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16])
@pytest.mark.parametrize("init", ["pissa", "pissa_niter_4"])
def test_pissa_cancels_to_rounding_at_step_0(make_net, x, init, dtype):
    net, base = make_net(dtype), make_net(dtype)
    attached(net, init=init, dtype=dtype)
    weights = [p.clone() for p in base.parameters()]
    assert torch.equal(net(x), base(x))  # the two products are the same numbers
    trained = {id(p) for p in lf.Live.of(net).parameters()}
    for p, W in zip((p for p in net.parameters() if id(p) not in trained), weights, strict=True):
        assert torch.equal(p, W)  # W is unaltered
    with lf.Live.of(net).use(["default", None], c=[-0.5, 1]):
        assert torch.equal(net(x), base(x))


@pytest.mark.parametrize("init", INITS)
def test_gradients_flow_at_step_0(net, x, init):
    live, modules = attached(net, init=init)
    net(x).square().sum().backward()
    for module in modules.values():
        assert module.B.grad.abs().sum() > 0
        moves = module.A.grad.abs().sum() > 0
        assert bool(moves) == init.startswith("pissa")  # with B = 0 only B moves at first
    assert live.active == {"default": 1.0}


def test_kaiming_is_pefts_distribution(net):
    _, modules = attached(net, rank=8, targets=["up", "down"])
    A = torch.cat([m.A.flatten() * math.sqrt(m.A.shape[1]) for m in modules.values()])
    # kaiming_uniform_(a=√5) is uniform on ±1/√in.
    assert A.abs().max() <= 1
    assert A.abs().max() > 0.97
    assert abs(A.mean()) < 0.05
    assert A.var().item() == pytest.approx(1 / 3, rel=0.1)
    assert all(not m.B.any() for m in modules.values())


def test_orthogonal_rows(net):
    _, modules = attached(net, init="orthogonal")
    for module in modules.values():
        torch.testing.assert_close(module.A @ module.A.T, torch.eye(4), rtol=1e-5, atol=1e-5)
        assert not module.B.any()


@pytest.mark.parametrize("rslora", [False, True])
@pytest.mark.parametrize("init", ["pissa", "pissa_niter_16"])
def test_pissa_starts_from_the_leading_directions(base, net, init, rslora):
    _, modules = attached(net, init=init, alpha=5, rslora=rslora)
    for path, module in modules.items():
        W = base.get_submodule(path).weight.detach()
        U, S, Vh = torch.linalg.svd(W)
        best = (U[:, :4] * S[:4] @ Vh[:4]).float()
        scale = 5 / (2 if rslora else 4)
        assert module.scale == scale
        torch.testing.assert_close(scale * module.B @ module.A, best, rtol=1e-4, atol=1e-5)
        # √S on either side: the factors are balanced.
        torch.testing.assert_close(
            module.A @ module.A.T, module.B.T @ module.B, rtol=1e-4, atol=1e-4
        )


def test_pissa_trains_as_if_the_directions_were_taken_out_of_the_weight(base, net):
    """W x + s (B A − B₀ A₀) x equals (W − s B₀ A₀) x + s B A x."""
    live, modules = attached(net, init="pissa", dtype=torch.float64)
    h = torch.randn(5, 8, dtype=torch.float64)
    for path, module in modules.items():
        if module.A.shape[1] != 8:
            continue
        layer, alone = net.get_submodule(path), base.get_submodule(path)
        residual = alone.weight - module.scale * module.B0 @ module.A0
        module.A.data += 0.1 * torch.randn_like(module.A)
        module.B.data += 0.1 * torch.randn_like(module.B)
        wanted = h @ (residual + module.scale * module.B @ module.A).T + alone.bias
        torch.testing.assert_close(layer(h), wanted, rtol=1e-10, atol=1e-10)
        with live.use("default", c=-0.5):
            wanted = h @ (alone.weight - 0.5 * module.scale * (
                module.B @ module.A - module.B0 @ module.A0
            )).T + alone.bias  # fmt: skip
            torch.testing.assert_close(layer(h), wanted, rtol=1e-10, atol=1e-10)
        u = live._state.sources["default"].update(path)
        assert u.rank == 8  # exported with the start beside it
        both = module.scale * (module.B @ module.A - module.B0 @ module.A0)
        torch.testing.assert_close(u.dense(), both.detach(), rtol=1e-10, atol=1e-10)


@pytest.mark.parametrize("shape", [(60, 40), (40, 60), (50, 50)])
def test_the_randomised_svd_comes_close_to_the_exact_one(shape):
    torch.manual_seed(0)
    U, _ = torch.linalg.qr(torch.randn(shape[0], 40))
    V, _ = torch.linalg.qr(torch.randn(shape[1], 40))
    S = 0.9 ** torch.arange(40)
    W = U * S @ V.T
    generator = torch.Generator().manual_seed(0)
    for niter, error in [(1, 0.03), (4, 1e-3), (16, 1e-5)]:
        u, s, vh = leading_directions(W, 8, niter, generator)
        best = U[:, :8] * S[:8] @ V[:, :8].T
        assert (u * s @ vh - best).norm() / best.norm() < 10 * error
        torch.testing.assert_close(s, S[:8], rtol=error, atol=0)
        eye = torch.eye(8)
        torch.testing.assert_close(u.T @ u, eye, rtol=1e-4, atol=1e-4)
        torch.testing.assert_close(vh @ vh.T, eye, rtol=1e-4, atol=1e-4)


def test_seeds(make_net):
    def A_of(**options):
        live = lf.attach(make_net(), lf.LoRA(rank=2, **options))
        return live._state.trained("default").fresh["layers.0.q"].A.detach()

    assert torch.equal(A_of(seed=3), A_of(seed=3))
    assert not torch.equal(A_of(seed=3), A_of(seed=4))
    torch.manual_seed(5)
    first = A_of()
    torch.manual_seed(5)
    assert torch.equal(A_of(), first)
    assert not torch.equal(A_of(), first)


def test_a_seed_leaves_the_global_one_alone(net):
    torch.manual_seed(0)
    wanted = torch.rand(3)
    torch.manual_seed(0)
    lf.attach(net, lf.LoRA(rank=2, seed=1))
    assert torch.equal(torch.rand(3), wanted)


def test_two_adapters_without_a_seed_don_t_share_their_start(net):
    # One A for both would look like a shared skill.
    live = lf.attach(net, {"one": lf.LoRA(rank=2), "two": lf.LoRA(rank=2)})
    one, two = (live._state.trained(name).fresh["layers.0.q"].A for name in ("one", "two"))
    assert not torch.equal(one, two)


def test_patterns_of_rank_and_alpha(net):
    spec = lf.LoRA(
        rank=4, alpha=8, rank_pattern={"up": 2, re.compile(r"\.3\.q"): 1}, alpha_pattern={"q": 5}
    )
    modules = lf.attach(net, spec)._state.trained("default").fresh
    for path, module in modules.items():
        leaf = path.rpartition(".")[2]
        rank = 2 if leaf == "up" else 1 if path == "layers.3.q" else 4
        assert (module.rank, module.scale) == (rank, (5 if leaf == "q" else 8) / rank)


@pytest.mark.parametrize("option", ["rank_pattern", "alpha_pattern"])
def test_patterns_that_match_nothing_are_named(net, option, fingerprint):
    before = fingerprint(net)
    with pytest.raises(MismatchError, match=f"{option} names 'k_proj', which matches no"):
        lf.attach(net, lf.LoRA(rank=2, **{option: {"q": 1, "k_proj": 1}}))
    with pytest.raises(MismatchError, match=r"attached to; .*re.compile\('q\|k'\)"):
        lf.attach(net, lf.LoRA(rank=2, **{option: {"q|k": 1}}))
    with pytest.raises(MismatchError, match=r"'lm.\*' matches no module; .*re.compile\('lm.\*'\)"):
        lf.attach(net, lf.LoRA(rank=2, modules_to_save=["lm.*"]))
    assert fingerprint(net) == before


def test_a_rank_above_the_layers_is_an_error(net):
    with pytest.raises(MismatchError, match=r"rank 16 is above min\(out, in\) = 8 of .*layers.0.q"):
        lf.attach(net, lf.LoRA())
    with pytest.raises(MismatchError, match=r"rank 9 .* of module 'layers.0.down'"):
        lf.attach(net, lf.LoRA(rank=2, rank_pattern={"down": 9}))
    lf.attach(net, lf.LoRA(rank=8))


def test_dropout_drops_inputs_while_training_only():
    torch.manual_seed(0)
    layer = nn.Linear(64, 8)
    live = lf.attach(layer, lf.LoRA(rank=4, dropout=0.5, init="orthogonal"))
    for p in live.parameters():
        p.data = torch.ones_like(p)
    x = torch.ones(200, 64)
    layer.eval()
    base = nn.functional.linear(x, layer.weight, layer.bias)
    whole = layer(x) - base
    torch.testing.assert_close(whole, torch.full_like(whole, 64 * 4 * 8.0), rtol=1e-4, atol=1e-2)
    layer.train()
    for what in ("default", ["default"] * 2):
        with live.use(what):
            noisy = (layer(x) - base) / whole
        assert noisy.std() > 0.05
        assert noisy.mean().item() == pytest.approx(1, abs=0.05)  # it is rescaled
    live.detach()
    live = lf.attach(layer.train(), lf.LoRA(rank=4, dropout=1.0))
    for p in live.parameters():
        p.data = torch.ones_like(p)
    assert torch.equal(layer(x), base)
