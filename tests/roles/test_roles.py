"""Roles: every layer of every architecture has one, no two have the same."""

import importlib.util
from pathlib import Path

import pytest
from torch import nn

import lorafold as lf
from lorafold.roles import Role

spec = importlib.util.spec_from_file_location("models", Path(__file__).with_name("models.py"))
models = importlib.util.module_from_spec(spec)
spec.loader.exec_module(models)


@pytest.mark.parametrize("name", models.ARCHITECTURES)
def test_every_layer_has_a_role_of_its_own(name):
    model = models.model_of(name, device="meta")
    found = lf.roles(model)
    layers = {
        path
        for path, m in model.named_modules()
        if isinstance(m, nn.Linear | nn.Embedding | nn.Conv1d | nn.Conv2d)
        or type(m).__name__ == "Conv1D"
    }
    assert layers
    assert layers <= found.keys()
    assert len(set(found.values())) == len(found)
    assert {Role.parse(str(role)) for role in found.values()} == set(found.values())
