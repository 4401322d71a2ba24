"""A base with adapters behind an engine, and what becomes of requests."""

from __future__ import annotations

import random
import threading
from types import SimpleNamespace

import pytest
import torch

import lorafold as lf
from lorafold.demo.model import base_dir, data_dir
from lorafold.errors import RefusedError
from lorafold.serve import Limits, Request, Sampling
from lorafold.serve.adapters import Attachments
from lorafold.serve.run.packed import PackedEngine
from lorafold.serve.run.paged import check_known
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
def packed():
    """The packed engine, where transformers is one that it runs on."""
    try:
        check_known()
    except RefusedError as e:
        pytest.skip(str(e))
    return PackedEngine


@pytest.fixture(params=["rows", "packed"])
def make(request):
    """What makes an engine: a test that takes it, or `engine`, runs with each."""
    return RowsEngine if request.param == "rows" else request.getfixturevalue("packed")


@pytest.fixture
def engine(demo_model, demo_adapters, make):
    found = started(demo_model, demo_adapters, make=make)
    yield found
    found.stop(60)


def alone(engine, prompt, tokens, mix, c=1.0, rank=None):
    """The model's own log-probabilities (n, vocabulary) at each token, by a plain forward."""
    whole = torch.tensor([[*prompt, *tokens]])
    with torch.no_grad(), engine.attachments.live.use(dict(mix) or None, c=c, rank=rank):
        scores = engine.model(whole, use_cache=False).logits[0]
    return scores[len(prompt) - 1 : -1].float().log_softmax(1)


def check_alone(engine, told, how):
    """What was told of a request is what the model says by itself."""
    own = alone(engine, how["prompt"], told.tokens, how["mix"], how["c"], how["rank"])
    tokens = torch.tensor(told.tokens)
    said = own.gather(1, tokens[:, None])[:, 0]
    assert torch.allclose(said, torch.tensor(told.logprobs), atol=1e-4)
    best = own.topk(2).values
    near = best[:, 0] - best[:, 1] < 1e-3
    assert bool(((own.argmax(1) == tokens) | near).all())
    for piece, row in zip(told.pieces, own, strict=True):
        for token, logprob in piece.top:
            assert abs(float(row[token]) - logprob) < 1e-4


def wanted(count, seed=0, names=NAMES):
    """Requests of unlike lengths, mixes, strengths and ranks."""
    rng = random.Random(seed)
    for i in range(count):
        pair = rng.sample(names, 2)
        mixes = [{}, {pair[0]: 1.0}, {pair[0]: 0.7, pair[1]: -0.3}]
        yield {
            "prompt": [rng.randrange(32, 127) for _ in range(rng.randrange(20, 96))],
            "new": rng.randrange(20, 51),
            "mix": mixes[i % 3],
            "c": rng.choice([1.0, 0.5, -1.0, 1.7, 0.0]),
            "rank": rng.choice([None, 4, 2]),
        }


@pytest.fixture
def serving():
    """The helpers, for tests that make engines of their own."""
    return SimpleNamespace(
        ask=ask,
        add=add,
        started=started,
        wanted=wanted,
        check_alone=check_alone,
        Told=Told,
        GREEDY=GREEDY,
        LIMITS=LIMITS,
    )
