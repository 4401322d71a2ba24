"""Vectors in clusters, whose right names are known."""

import pytest
import torch

NAMES = ["sql", "law", "poems", "<b>[red]maths"]


def clusters(names, each, spread=0.3, seed=0, width=16, centers=0):
    """{name: (each, width)}: points around one center a name."""
    g = torch.Generator().manual_seed(centers)
    middle = torch.nn.functional.normalize(torch.randn(len(names), width, generator=g), dim=1)
    g = torch.Generator().manual_seed(seed)
    noise = torch.randn(len(names), each, width, generator=g) / width**0.5
    return dict(zip(names, middle[:, None] + spread * noise, strict=True))


@pytest.fixture(scope="session")
def make_clusters():
    """make_clusters(names, each, spread=, seed=, width=, centers=) -> {name: vectors}."""
    return clusters


@pytest.fixture(scope="session")
def names():
    """Four names, one of them markup."""
    return NAMES
