"""A base with adapters behind an engine, and what becomes of requests."""

from __future__ import annotations

import threading
from types import SimpleNamespace

import pytest
import torch

import lorafold as lf
from lorafold.demo.model import base_dir, data_dir
from lorafold.serve import Limits, Request, Sampling
from lorafold.serve.adapters import Attachments
from lorafold.serve.run.rows import RowsEngine

transformers = pytest.importorskip("transformers")

NAMES = ["roman", "morse", "base64", "sql_inserts"]
LIMITS = Limits(length=256, vocabulary=256, rows=16, adapters=64, waiting=256)
GREEDY = Sampling(temperature=0, top=2)


class Told:
    """What an engine told of one request."""

    def __init__(self):
        self.pieces, self.ended = [], threading.Event()

    def __call__(self, piece):
        self.pieces.append(piece)
        if piece.reason is not None:
            self.ended.set()

    @property
    def tokens(self):
        return [p.token for p in self.pieces if p.token is not None]

    @property
    def logprobs(self):
        return [p.logprob for p in self.pieces if p.token is not None]

    @property
    def reason(self):
        return self.pieces[-1].reason

    def wait(self):
        assert self.ended.wait(60), "a request never ended"
        return self


def ask(engine, prompt, new=12, sampling=GREEDY, **how):
    """A request in the queue, and what is told of it."""
    told = Told()
    request = Request(list(prompt), new, told, sampling=sampling, **how)
    engine.submit(request)
    told.request = request
    return told


@pytest.fixture(scope="session")
def demo_adapters():
    return {name: lf.load(data_dir() / "adapters" / name) for name in NAMES}


@pytest.fixture
def demo_model():
    return transformers.AutoModelForCausalLM.from_pretrained(
        base_dir(), dtype=torch.float32, local_files_only=True
    ).eval()


def started(model, adapters, limits=LIMITS, make=RowsEngine):
    """An engine that runs, with adapters attached under their names."""
    engine = make(model, Attachments(model, limits.adapters, model.dtype), limits)
    engine.start()
    for name, adapter in adapters.items():
        add(engine, adapter, name)
    return engine


def add(engine, adapter, name):
    engine.call(lambda: engine.attachments.add(adapter, name, engine.trial)).result(60)


@pytest.fixture
def engine(demo_model, demo_adapters):
    found = started(demo_model, demo_adapters)
    yield found
    found.stop(60)


@pytest.fixture
def serving():
    """The helpers, for tests that make engines of their own."""
    return SimpleNamespace(
        ask=ask, add=add, started=started, Told=Told, GREEDY=GREEDY, LIMITS=LIMITS
    )
