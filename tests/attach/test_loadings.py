"""Training inside a library: numbers in the sides that its adapters share."""

import pytest
import torch
from torch import nn

import lorafold as lf
from lorafold.attach.begin.loadings import Loaded


def model():
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(24, 32), nn.Tanh(), nn.Linear(32, 20))


PATHS = {"0": (32, 24), "2": (20, 32)}


def kin(n=6, rank=4, seed=1):
    """Adapters of one row and one column space, so that both sides are shared."""
    g = torch.Generator().manual_seed(seed)
    sides = {
        p: (torch.randn(out, rank, generator=g), torch.randn(rank, inner, generator=g))
        for p, (out, inner) in PATHS.items()
    }
    return {
        f"a{i}": lf.Adapter(
            {
                p: lf.LowRank(torch.randn(rank, rank, generator=g) @ A, B / rank)
                for p, (B, A) in sides.items()
            }
        )
        for i in range(n)
    }


@pytest.fixture(params=["shared", "input", "output"])
def library(request, tmp_path):
    return lf.fold(kin(), tmp_path / "lib", form=request.param, tolerance=0.05)


X = torch.randn(16, 24, generator=torch.Generator().manual_seed(3))
Y = torch.randn(16, 20, generator=torch.Generator().manual_seed(4))


def train(net, live, steps=20):
    optimizer = torch.optim.Adam(live.parameters(), 0.02)
    losses = []
    for _ in range(steps):
        optimizer.zero_grad()
        loss = (net(X) - Y).square().mean()
        loss.backward()
        optimizer.step()
        losses.append(float(loss.detach()))
    return losses


@pytest.mark.parametrize("extra", [0, 2])
def test_loadings_train_and_everything_else_stays(library, extra, tmp_path):
    net = model()
    plain = net(X).detach()
    spec = lf.Loadings(library, extra=extra, seed=0)
    live = lf.attach(net, {"new": spec})
    assert torch.equal(net(X), plain)  # ΔW = 0
    before = {n: library[n] for n in library.names}
    sides = {
        k: v.clone() for k, v in net.state_dict().items() if k.rsplit(".", 1)[-1] in ("U", "V")
    }
    assert sides
    losses = train(net, live)
    assert losses[-1] < 0.97 * losses[0]
    for key, value in sides.items():
        assert torch.equal(net.state_dict()[key], value)
    adapter = live.adapter("new")
    with torch.no_grad():
        trained = net(X)
    live.detach()
    library.add(adapter, "new")
    assert library.error("new") <= 0.05
    for name, a in before.items():
        for path, u in a.items():
            assert torch.equal(library[name][path].A, u.A)
            assert torch.equal(library[name][path].B, u.B)
    live = lf.attach(net, library)
    with torch.no_grad(), live.use("new"):
        off = (net(X) - trained).norm() / (trained - plain).norm()
    assert off < 0.2


def test_without_directions_of_its_own_it_stays_in_what_is_shared(tmp_path):
    library = lf.fold(kin(), tmp_path / "lib", form="shared", tolerance=0.05)
    net = model()
    live = lf.attach(net, lf.Loadings(library))
    lora = lf.attach(model(), lf.LoRA(rank=4))
    count = sum(p.numel() for p in live.parameters())
    assert count < 0.3 * sum(p.numel() for p in lora.parameters())
    train(net, live)
    assert library.project(live.adapter("default")).error < 1e-4
    own = lf.attach(model(), lf.Loadings(library, extra=2, seed=0))
    train(own.model, own)
    assert library.project(own.adapter("default")).error > 1e-3


def test_it_begins_with_an_adapter_of_the_library(library):
    net = model()
    live = lf.attach(net, {"mine": lf.Loadings(library, start="a2")})
    want = library["a2"]
    assert live.adapter("mine").distance(want) / want.norm() < 1e-5
    train(net, live, 3)
    assert live.adapter("mine").distance(want) / want.norm() > 1e-3


def test_rows_of_it_beside_others(library):
    net = model().eval()
    live = lf.attach(net, {"mine": lf.Loadings(library, start="a1", extra=1, seed=0)})
    live.add(library["a0"], "a0")
    with torch.no_grad():
        alone = {}
        for name in ("mine", "a0"):
            with live.use(name):
                alone[name] = net(X)
        with live.use(["mine", "a0"] * 8):
            rows = net(X)
    torch.testing.assert_close(rows[0], alone["mine"][0], atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(rows[1], alone["a0"][1], atol=1e-5, rtol=1e-5)


def test_its_checkpoint_goes_on_without_the_library(library, tmp_path):
    net = model()
    live = lf.attach(net, lf.Loadings(library, start="a1", extra=2, seed=0))
    train(net, live, 3)
    live.save(tmp_path / "a")
    again = model()
    on = lf.attach(again, tmp_path / "a", trainable=True)
    torch.testing.assert_close(again(X), net(X), atol=1e-6, rtol=1e-6)
    assert train(again, on, 3) == pytest.approx(train(net, live, 3), rel=1e-3)
    plain = model()
    lf.attach(plain, tmp_path / "a").use("default")
    shapes = [tuple(p.shape) for p in on.parameters()]
    assert shapes == [tuple(p.shape) for p in live.parameters()]
    back = lf.attach(model(), lf.Loadings(library, extra=2, start="a1"))
    back.resume(tmp_path / "a")


def test_prefixes_pause_the_rest(library):
    live = lf.attach(model(), lf.Loadings(library, start="a1", extra=2, seed=0))
    for module in live.model.modules():
        if isinstance(module, Loaded):
            whole = module.parts(module.rank)[0]
            for k in (1, module.shared, module.shared + 1):
                A, B, _ = module.parts(k)[0]
                assert torch.equal(A, whole[0][:k])
                assert torch.equal(B, whole[1][:, :k])
            for p, index in module.paused(module.shared):
                touched = p.detach()[index].numel()
                assert touched == (0 if p is module.core else p.numel())


def test_bad_specifications(library, tmp_path):
    with pytest.raises(lf.UnknownNameError, match="no adapter 'b1'"):
        lf.Loadings(library, start="b1")
    with pytest.raises(lf.MismatchError, match="extra"):
        lf.Loadings(library, extra=-1)
    with pytest.raises(lf.MismatchError, match="init_scale"):
        lf.Loadings(library, init_scale=0)
    with pytest.raises(lf.MismatchError, match="must be a lorafold Library"):
        lf.Loadings("lib")
    alone = lf.fold(kin(), tmp_path / "own", form="svd", tolerance=0.05)
    with pytest.raises(lf.MismatchError, match="share no side anywhere"):
        lf.attach(model(), lf.Loadings(alone))


def test_a_module_that_shares_nothing_keeps_what_it_began_with(tmp_path):
    g = torch.Generator().manual_seed(9)
    mixed = {}
    for name, a in kin().items():
        own = lf.LowRank(torch.randn(3, 32, generator=g), torch.randn(20, 3, generator=g))
        mixed[name] = lf.Adapter({"0": a["0"], "2": own})
    library = lf.fold(mixed, tmp_path / "lib", tolerance=0.05)  # each module its best form
    shared = {m.path for m in library.contents.modules if m.bases}
    assert shared == {"0"}
    live = lf.attach(model(), {"mine": lf.Loadings(library, start="a2")})
    want = library["a2"]
    assert live.adapter("mine").distance(want) / want.norm() < 1e-5
    live.detach()
    with pytest.warns(UserWarning, match=r"1 modules of the library share no side.*2"):
        lf.attach(model(), lf.Loadings(library))
