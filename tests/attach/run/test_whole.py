"""Modules that are saved whole beside an adapter: heads, with PEFT as the reference."""

import copy

import pytest
import torch
from torch import nn

pytest.importorskip("peft")

from peft import LoraConfig, PeftModel, get_peft_model

import lorafold as lf

pytestmark = pytest.mark.filterwarnings(r"ignore:.*:UserWarning:peft(\..*)?")


class Classifier(nn.Module):
    def __init__(self):
        super().__init__()
        self.q = nn.Linear(8, 8)
        self.head = nn.Sequential(nn.Linear(8, 6), nn.Tanh(), nn.Linear(6, 3))

    def forward(self, x):
        return self.head(torch.tanh(self.q(x)))


@pytest.fixture(scope="module")
def base():
    torch.manual_seed(0)
    return Classifier().eval()


@pytest.fixture(scope="module")
def x():
    return torch.randn(4, 8, generator=torch.Generator().manual_seed(0))


@pytest.fixture(scope="module")
def written(base, x, tmp_path_factory):
    config = LoraConfig(r=2, target_modules=["q"], modules_to_save=["head"])
    model = get_peft_model(copy.deepcopy(base), config).eval()
    for name, p in model.named_parameters():
        if "lora_B" in name or "modules_to_save" in name:
            nn.init.normal_(p, std=0.5)
    folder = tmp_path_factory.mktemp("head")
    model.save_pretrained(folder)
    with torch.no_grad():
        return lf.load(folder), model(x)


@torch.no_grad()
def test_a_head_comes_with_its_adapter(base, written, x):
    adapter, theirs = written
    model = copy.deepcopy(base)
    live = lf.attach(model, adapter)
    assert torch.equal(model(x), base(x))
    with live.use("default"):
        torch.testing.assert_close(model(x), theirs, atol=1e-6, rtol=1e-6)
    with live.use(["default", None, "default", "default"], c=[1, 1, 0, 1]):
        y = model(x)
    torch.testing.assert_close(y[0], theirs[0], atol=1e-6, rtol=1e-6)
    torch.testing.assert_close(y[3], theirs[3], atol=1e-6, rtol=1e-6)
    assert torch.equal(y[1:3], base(x)[1:3])


@torch.no_grad()
def test_the_dial_reaches_the_heads_weights(base, written, x):
    adapter, _ = written
    model = copy.deepcopy(base)
    live = lf.attach(model, adapter)
    state = (0.3 * adapter).apply_to(base.state_dict())
    whole = adapter.apply_to(base.state_dict())
    for name, W in base.state_dict().items():
        if name.startswith("head"):
            state[name] = W + 0.3 * (whole[name] - W)
    expected = copy.deepcopy(base)
    expected.load_state_dict(state)
    with live.use("default", c=0.3):
        torch.testing.assert_close(model(x), expected(x), atol=1e-6, rtol=1e-5)
        assert live.verify(x) < 1e-6
    live.merge("default", c=0.3)
    torch.testing.assert_close(model(x), expected(x), atol=1e-6, rtol=1e-5)
    live.unmerge()
    live.detach()
    assert torch.equal(model(x), base(x))


def test_a_fresh_head_trains_and_is_saved(base, x, tmp_path):
    model = copy.deepcopy(base)
    live = lf.attach(model, lf.LoRA(rank=2, targets=["q"], modules_to_save="head"))
    assert torch.equal(model(x), base(x))
    trained = list(live.parameters())
    assert {id(p) for p in trained} == {id(p) for p in model.parameters() if p.requires_grad}
    assert len(trained) == 2 + 4
    optimizer = torch.optim.Adam(trained, 0.05)
    for _ in range(3):
        optimizer.zero_grad()
        model(x).square().sum().backward()
        optimizer.step()
    y = model(x).detach()
    assert (y - base(x)).abs().max() > 0.01
    live.save(tmp_path / "mine")
    peft = PeftModel.from_pretrained(copy.deepcopy(base), tmp_path / "mine").eval()
    torch.testing.assert_close(peft(x), y, atol=1e-6, rtol=1e-5)
    with live.use(None), torch.no_grad():
        assert torch.equal(model(x), base(x))
    again = copy.deepcopy(base)
    lf.attach(again, lf.LoRA(rank=2, targets=["q"], modules_to_save="head")).resume(
        tmp_path / "mine"
    )
    assert torch.equal(again(x), y)
    live.detach()
    assert torch.equal(model(x), base(x))
    assert all(p.requires_grad for p in model.parameters())


def test_what_has_no_place_is_refused(base, make_adapter):
    q = {"q": (8, 8)}
    key = "base_model.model.q.lora_B.bias"
    bias = make_adapter(q, 2, extras={key: torch.ones(8)}, config={"lora_bias": True})
    model = copy.deepcopy(base)
    with pytest.raises(lf.RefusedError, match="lora bias"):
        lf.attach(model, bias)
    unknown = make_adapter(q, 2, extras={"something": torch.ones(2)})
    with pytest.raises(lf.RefusedError, match="'something'"):
        lf.attach(model, unknown)
    short = make_adapter(
        q,
        2,
        extras={"base_model.model.head.0.weight": torch.ones(6, 8)},
        config={"modules_to_save": ["head"]},
    )
    with pytest.raises(lf.MismatchError, match="other tensors than the model's"):
        lf.attach(model, short)
    with pytest.raises(lf.MismatchError, match="modules_to_save='tail' matches no module"):
        lf.attach(model, lf.LoRA(rank=2, targets=["q"], modules_to_save="tail"))
    assert not any(hasattr(m, "lorafold") for m in model.modules())


def test_a_loaded_head_trains_on(base, written, x):
    adapter, _ = written
    model = copy.deepcopy(base)
    live = lf.attach(model, adapter, trainable=True)
    live.use("default")
    before = live.adapter("default").extras
    optimizer = torch.optim.SGD(live.parameters(), 0.1)
    model(x).square().sum().backward()
    optimizer.step()
    after = live.adapter("default").extras
    assert set(after) == set(before)
    assert all((after[key] != before[key]).any() for key in after)
    live.detach()
    assert torch.equal(model(x), base(x))


@torch.no_grad()
def test_the_bases_module_runs_only_where_it_is_asked_for(base, written, x):
    adapter, _ = written
    runs = []

    class Watched(nn.Linear):
        def forward(self, x):
            runs.append(id(self))
            return super().forward(x)

    model = copy.deepcopy(base)
    for i in (0, 2):
        layer = model.head[i]
        watched = Watched(layer.in_features, layer.out_features)
        watched.load_state_dict(layer.state_dict())
        model.head[i] = watched
    own = {id(m) for m in model.head.modules()}
    live = lf.attach(model, adapter)
    for what, of_the_base, in_all in (
        (None, 2, 2),
        ("default", 0, 2),
        (["default"] * 4, 0, 2),
        (["default", None, "default", None], 2, 4),
    ):
        runs.clear()
        with live.use(what):
            model(x)
        assert len([run for run in runs if run in own]) == of_the_base
        assert len(runs) == in_all
