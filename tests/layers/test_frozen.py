"""A base rests while adapters train, and every parameter gets back what it had."""

import pytest
import torch
from torch import nn

import lorafold as lf
from lorafold.layers.frozen import FrozenBase
from lorafold.layers.modes import called, evaluating


def parameters(*flags):
    return [nn.Parameter(torch.zeros(1), requires_grad=flag) for flag in flags]


def test_frozen_once_and_thawed():
    a, b = there = parameters(True, False)
    base = FrozenBase()
    base.freeze(there)
    base.freeze([*there, later := nn.Parameter(torch.zeros(1))])  # an adapter's, which trains
    assert (a.requires_grad, b.requires_grad, later.requires_grad) == (False, False, True)
    assert base.frozen
    base.thaw()
    assert (a.requires_grad, b.requires_grad, base.frozen) == (True, False, False)


@pytest.mark.parametrize(("old_flag", "new_flag"), [(True, False), (False, True), (False, False)])
def test_what_takes_a_place_rests_and_gets_what_either_had(old_flag, new_flag):
    (old,), (new,) = parameters(old_flag), parameters(new_flag)
    base = FrozenBase()
    base.exchanged(old, new)  # nothing rests
    assert new.requires_grad == new_flag
    base.freeze([old])
    base.exchanged(old, new)
    assert not new.requires_grad
    base.thaw()
    assert (old.requires_grad, new.requires_grad) == (old_flag, old_flag or new_flag)


def test_a_tied_weight_that_a_merge_left_behind_is_given_back_too():
    model = nn.ModuleDict({"embed": nn.Embedding(6, 4), "head": nn.Linear(4, 6, bias=False)})
    model["head"].weight = model["embed"].weight
    live = lf.attach(model, lf.LoRA(rank=2, targets="head", init="orthogonal"))
    assert not model["embed"].weight.requires_grad
    live.merge(keep=False)
    assert model["head"].weight is not model["embed"].weight
    live.detach()
    assert all(p.requires_grad for p in model.parameters())


@pytest.mark.parametrize("whole", [True, False])
def test_layers_without_an_adapter_that_are_dequantised_meanwhile_rest_too(whole):
    pytest.importorskip("bitsandbytes")
    model = nn.Sequential(nn.Linear(64, 64), nn.Linear(64, 64), nn.Linear(64, 64))
    lf.quantize_base(model)
    live = lf.attach(model, lf.LoRA(rank=2, targets="1"))
    lf.dequantize(model if whole else model[1])
    trained = {id(p) for p in model.parameters() if p.requires_grad}
    assert trained == set(map(id, live.parameters()))
    model(torch.randn(2, 64)).sum().backward()
    assert model[0].weight.grad is None
    live.detach()
    assert all(m.weight.requires_grad for m in (model if whole else [model[1]]))


def test_evaluation_for_a_while():
    model = nn.Sequential(nn.Dropout(), nn.Linear(2, 2))
    model[0].eval()
    model.train()
    model[1].eval()
    modes = [m.training for m in model.modules()]
    with pytest.raises(RuntimeError, match="mat1"), evaluating(model):
        assert not any(m.training for m in model.modules())
        assert not torch.is_grad_enabled()
        model(torch.ones(3))
    assert [m.training for m in model.modules()] == modes
    x = torch.ones(1, 2)
    for inputs in (x, (x,), [x], {"input": x}):
        assert called(model, inputs).shape == (1, 2)
