"""A small library, and vLLM's three classes as its resolvers see them."""

import abc
import dataclasses
import logging
import sys
import types

import pytest
import torch

import lorafold as lf
from lorafold.serve.engines.settings import Settings

PATHS = [f"model.layers.{i}.self_attn.{n}_proj" for i in range(2) for n in "qv"]


def make_adapter(seed, rank=4, config=None, size=32):
    g = torch.Generator().manual_seed(seed)

    def update(k):
        A, B = torch.randn(k, size, generator=g), torch.randn(size, k, generator=g)
        return lf.LowRank(A / 4, B / 4, scale=0.5)

    ranks = [rank, rank, rank, max(1, rank // 2)]  # unlike ranks in one adapter
    modules = {path: update(k) for path, k in zip(PATHS, ranks, strict=True)}
    return lf.Adapter(modules, config=config or {}, base_model="base")


@pytest.fixture
def library(tmp_path):
    sources = {
        "sql": make_adapter(1),
        "polite": make_adapter(2, rank=2, config={"init_lora_weights": "gaussian"}),
        "über/@c=2, x": make_adapter(3),
    }
    lf.fold(sources, tmp_path / "lib", tolerance=0.01).close()
    return tmp_path / "lib"


@pytest.fixture
def settings(library, tmp_path):
    return Settings(str(library), tmp_path / "cache")


@dataclasses.dataclass(eq=False)
class LoRARequest:
    """The fields and checks of vLLM 0.32's, which is a msgspec.Struct; equal by name."""

    lora_name: str
    lora_int_id: int
    lora_path: str = ""
    base_model_name: str | None = None
    load_inplace: bool = False
    is_3d_lora_weight: bool = False

    def __post_init__(self):
        if self.lora_int_id < 1:
            raise ValueError("id must be > 0")
        assert self.lora_path
        assert isinstance(self.lora_name, str)
        assert isinstance(self.lora_path, str)

    def __eq__(self, other):
        return isinstance(other, LoRARequest) and other.lora_name == self.lora_name

    def __hash__(self):
        return hash(self.lora_name)


class LoRAResolver(abc.ABC):
    @abc.abstractmethod
    async def resolve_lora(self, base_model_name, lora_name): ...


class Registry:
    """A name that is taken is replaced, with a warning."""

    def __init__(self):
        self.resolvers = {}

    def get_supported_resolvers(self):
        return self.resolvers.keys()

    def register_resolver(self, resolver_name, resolver):
        if resolver_name in self.resolvers:
            logging.getLogger("vllm").warning("%s is already registered", resolver_name)
        self.resolvers[resolver_name] = resolver

    def get_resolver(self, resolver_name):
        return self.resolvers[resolver_name]


@pytest.fixture
def vllm(monkeypatch):
    """The modules of vLLM that the plugin imports; gives the registry."""
    registry = Registry()
    contents = {
        "vllm": {},
        "vllm.lora": {},
        "vllm.lora.request": {"LoRARequest": LoRARequest},
        "vllm.lora.resolver": {"LoRAResolver": LoRAResolver, "LoRAResolverRegistry": registry},
    }
    for name, values in contents.items():
        module = types.ModuleType(name)
        module.__dict__.update(values)
        monkeypatch.setitem(sys.modules, name, module)
    return registry
