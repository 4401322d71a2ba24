"""Adapters trained on wrapped models: what is seen of them are plain names."""

import pytest
import torch
from torch import nn

import lorafold as lf


class Block(nn.Module):
    def __init__(self):
        super().__init__()
        self.q, self.out = nn.Linear(8, 6), nn.Linear(6, 8)

    def forward(self, x):
        return x + self.out(torch.tanh(self.q(x)))


class Stack(nn.Module):
    def __init__(self):
        super().__init__()
        self.layers = nn.ModuleList(Block() for _ in range(2))
        self.score = nn.Sequential(nn.Linear(8, 8), nn.Linear(8, 3))

    def forward(self, x):
        for layer in self.layers:
            x = layer(x)
        return self.score(x)


X = torch.randn(5, 8, generator=torch.Generator().manual_seed(2))


@pytest.fixture(autouse=True)
def _nothing_is_compiled():
    """The wrappers are torch's, and what they make of a forward is tested elsewhere."""
    with torch.compiler.set_stance("force_eager"):
        yield


def stack():
    torch.manual_seed(0)
    return Stack().eval()


def by_layers(model):
    model.layers[0] = torch.compile(model.layers[0], backend="eager")
    model.layers[1].q = torch.compile(model.layers[1].q, backend="eager")
    model.score[1] = torch.compile(model.score[1], backend="eager")
    return model


WRAPS = {
    "plain": lambda model: model,
    "layer by layer": by_layers,
    "compiled": lambda model: torch.compile(model, backend="eager"),
    "data parallel": nn.DataParallel,
    "both": lambda model: nn.DataParallel(torch.compile(by_layers(model), backend="eager")),
}
NAMES = {f"layers.{i}.{leaf}" for i in range(2) for leaf in ("q", "out")}
HEADS = {f"base_model.model.score.{i}.{t}" for i in range(2) for t in ("weight", "bias")}
SPECS = {
    "lora": lf.LoRA(rank=2, targets=("q", "out"), modules_to_save=("score",), seed=1),
    "modulation": lf.PiSSA(
        rank=3, std=0.1, targets=("q", "out"), modules_to_save=("score",), seed=1
    ),
}


def trained(wrap, spec):
    model = WRAPS[wrap](stack())
    live = lf.attach(model, spec)
    optimizer = torch.optim.Adam(live.parameters(), 0.02)
    for _ in range(3):
        optimizer.zero_grad()
        model(X).square().sum().backward()
        optimizer.step()
    return model, live


@pytest.mark.parametrize("wrap", WRAPS)
@pytest.mark.parametrize("spec", SPECS)
def test_a_fresh_adapter_has_plain_names(wrap, spec, tmp_path):
    model, live = trained(wrap, SPECS[spec])
    adapter = live.adapter("default")
    assert set(adapter) == NAMES
    assert set(adapter.layouts) <= NAMES
    assert set(adapter.extras) == HEADS
    assert set(adapter.config["modules_to_save"]) == {"score.0", "score.1"}
    live.save(tmp_path / "a")
    assert set(lf.load(tmp_path / "a")) == NAMES
    assert set(lf.load(tmp_path / "a").extras) == HEADS
    for other, wrapped in WRAPS.items():  # on a model that is wrapped in another way
        again = wrapped(stack())
        lf.attach(again, tmp_path / "a").use("default")
        torch.testing.assert_close(again(X), model(X), atol=1e-5, rtol=1e-5, msg=other)
        resumed = wrapped(stack())
        lf.attach(resumed, SPECS[spec]).resume(tmp_path / "a")
        torch.testing.assert_close(resumed(X), model(X), atol=1e-6, rtol=1e-6, msg=other)


@pytest.mark.parametrize("wrap", WRAPS)
def test_what_is_trained_on_has_them_too(wrap):
    _, live = trained("plain", SPECS["lora"])
    given = live.adapter("default")
    again = lf.attach(WRAPS[wrap](stack()), given, trainable=True).adapter("default")
    assert set(again) == set(given)
    assert again.distance(given) == pytest.approx(0, abs=1e-6)
    assert {k: t.tolist() for k, t in again.extras.items()} == {
        k: t.tolist() for k, t in given.extras.items()
    }


@pytest.mark.parametrize("wrap", WRAPS)
def test_targets_and_ranks_go_by_plain_names(wrap):
    model = WRAPS[wrap](stack())
    spec = lf.LoRA(rank=4, targets=("layers.1.q", "layers.0.out"), rank_pattern={"0.out": 2})
    live = lf.attach(model, spec)
    assert {p: u.rank for p, u in live.adapter("default").items()} == {
        "layers.1.q": 4,
        "layers.0.out": 2,
    }
    live.use("default", rank={"layers.1.q": 1})
    assert set(live.adapter("default")) == {"layers.1.q", "layers.0.out"}


@pytest.mark.parametrize("wrap", WRAPS)
@pytest.mark.parametrize("form", ["svd", "shared"])
def test_a_library_runs_on_all_of_its_layers(wrap, form, make_adapter):
    shapes = {p: (6, 8) if p.endswith("q") else (8, 6) for p in sorted(NAMES)}
    adapters = {n: make_adapter(shapes, rank=2, seed=i) for i, n in enumerate("abc")}
    library = lf.fold(adapters, form=form, tolerance=1e-4)
    model, plain = WRAPS[wrap](stack()), stack()
    live = lf.attach(model, library)
    for name in "abc":
        state = library[name].apply_to(plain.state_dict())
        wanted = torch.func.functional_call(plain, state, X)
        with live.use(name):
            torch.testing.assert_close(model(X), wanted, atol=1e-4, rtol=1e-4)


class Doubled(nn.Module):
    """Its `fc` is not its `module.fc`."""

    def __init__(self, order):
        super().__init__()
        self.fc = nn.Linear(8, 8)
        if order == "after":
            self.module = nn.ModuleDict({"fc": nn.Linear(8, 8)})
        else:
            fc, self.module = self.fc, nn.ModuleDict({"fc": nn.Linear(8, 8)})
            del self.fc
            self.fc = fc

    def forward(self, x):
        return self.fc(x) + 2 * self.module["fc"](x)


@pytest.mark.parametrize("order", ["before", "after"])
def test_a_child_named_module_is_no_wrapper_where_both_are_there(order, make_adapter, dense):
    model = Doubled(order)
    a = make_adapter({"fc": (8, 8)}, rank=2)
    W = model.fc.weight + dense(a["fc"]).float()
    wanted = X @ W.T + model.fc.bias + 2 * model.module["fc"](X)
    live = lf.attach(model, a)
    with live.use("default"):
        torch.testing.assert_close(model(X), wanted, atol=1e-5, rtol=1e-5)
    live.add(lf.LoRA(rank=2, targets="all-linear"), "fresh")
    assert set(live.adapter("fresh")) == {"fc", "module.fc"}
