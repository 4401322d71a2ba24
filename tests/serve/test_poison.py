"""What could end an engine is refused before it, and eight others end as alone beside it."""

from __future__ import annotations

import math
import random

import pytest
import torch

import lorafold as lf
from lorafold.errors import LorafoldError, MismatchError
from lorafold.serve import Sampling
from lorafold.serve.adapters import check_finite
from lorafold.serve.engine import TooLongError

FINE = list(b"SELECT * FROM")
POISON = {
    "an empty prompt": {"prompt": []},
    "a token beyond the vocabulary": {"prompt": [1, 256]},
    "a token below it": {"prompt": [-1]},
    "a token that is no number": {"prompt": ["a"]},
    "a token that is a boolean": {"prompt": [True]},
    "more than there is room for": {"prompt": FINE, "new": 250},
    "nothing to say": {"prompt": FINE, "new": 0},
    "less than nothing": {"prompt": FINE, "new": -1},
    "temperature NaN": {"sampling": Sampling(temperature=math.nan)},
    "temperature below 0": {"sampling": Sampling(temperature=-1)},
    "temperature infinite": {"sampling": Sampling(temperature=math.inf)},
    "temperature a text": {"sampling": Sampling(temperature="hot")},
    "top_k above the vocabulary": {"sampling": Sampling(top_k=257)},
    "top_k below 0": {"sampling": Sampling(top_k=-1)},
    "top_p NaN": {"sampling": Sampling(top_p=math.nan)},
    "top_p above 1": {"sampling": Sampling(top_p=1.5)},
    "a penalty": {"sampling": Sampling(presence=3.0)},
    "a bias of no token": {"sampling": Sampling(bias={256: 1.0})},
    "a bias that is infinite": {"sampling": Sampling(bias={1: math.inf})},
    "more alternatives than are given": {"sampling": Sampling(top=21)},
    "c NaN": {"mix": {"roman": 1.0}, "c": math.nan},
    "c infinite": {"mix": {"roman": 1.0}, "c": math.inf},
    "a weight NaN": {"mix": {"roman": math.nan}},
    "a weight too large": {"mix": {"roman": 1e300}},
    "rank 0": {"mix": {"roman": 1.0}, "rank": 0},
    "rank a fraction": {"mix": {"roman": 1.0}, "rank": 2.5},
    "rank above all": {"mix": {"roman": 1.0}, "rank": 10_000},
    "an unknown adapter": {"mix": {"nope": 1.0}},
}


def asked(engine, serving, how):
    """As the server asks: checked between two steps, then submitted."""
    from lorafold.serve import Request

    how = {"prompt": FINE, "new": 5, **how}
    told = serving.Told()
    request = Request(how.pop("prompt"), how.pop("new"), told, **how)
    engine.call(lambda: engine.check(request)).result(60)
    engine.submit(request)
    return told.wait()


def healthy(engine, serving, count=8):
    rng = random.Random(5)
    names = ["roman", "morse", "base64", "sql_inserts"]
    return [
        serving.ask(
            engine,
            [rng.randrange(32, 127) for _ in range(10 + i)],
            15,
            Sampling(temperature=0.8, seed=i, top=1),
            mix={names[i % 4]: 1.0 - i / 4},
        )
        for i in range(count)
    ]


def test_eight_others_end_as_alone_beside_each(engine, serving):
    expected = [one.wait().tokens for one in healthy(engine, serving)]
    for what, how in POISON.items():
        others = healthy(engine, serving)
        with pytest.raises(LorafoldError):
            pytest.fail(f"{what} was answered: {asked(engine, serving, how).pieces}")
        assert [one.wait().tokens for one in others] == expected, what
        assert engine.error is None, what


def test_what_it_says(engine, serving):
    said = {
        "an empty prompt": "the prompt is empty",
        "a token beyond the vocabulary": "token 256 is not one of the 256",
        "rank above all": "rank 10000 is above that of every module",
        "c NaN": "c must be a number from -1000 to 1000, not nan",
        "an unknown adapter": "no adapter 'nope' is attached",
    }
    for what, text in said.items():
        with pytest.raises(LorafoldError, match=text):
            asked(engine, serving, POISON[what])
    with pytest.raises(TooLongError, match="263, and there is room for 256"):
        asked(engine, serving, POISON["more than there is room for"])


def test_a_request_whose_numbers_overflow_ends_alone(engine, serving, demo_adapters):
    """Its row is made clean: the next one there, masked zeros times what it left, is unharmed."""
    loud = 1e30 * demo_adapters["roman"]
    check_finite(loud)
    serving.add(engine, loud, "loud")
    expected = [one.wait().tokens for one in healthy(engine, serving)]
    others = healthy(engine, serving, 4)
    told = [serving.ask(engine, FINE * 10, 5, mix={"loud": 1000.0}) for _ in range(12)]
    others += healthy(engine, serving)
    for one in told:
        assert one.wait().reason == "error"
        assert "no finite numbers" in str(one.pieces[-1].error)
    assert [one.wait().tokens for one in others] == [*expected[:4], *expected]
    assert [one.wait().tokens for one in healthy(engine, serving)] == expected
    assert engine.error is None


def test_adapters_that_do_not_fit_are_not_attached(engine, serving, demo_adapters, make_adapter):
    with pytest.raises(LorafoldError):
        serving.add(engine, make_adapter({"nowhere.q_proj": (8, 8)}), "wrong")
    path = next(iter(demo_adapters["roman"]))
    with pytest.raises(MismatchError):
        serving.add(engine, make_adapter({path: (8, 8)}), "small")
    assert set(engine.attachments.live.names) == set(demo_adapters)
    head = {"base_model.model.lm_head.weight": torch.full((256, 128), torch.nan)}
    with pytest.raises(MismatchError, match=r"lm_head.weight' has numbers that are not finite"):
        check_finite(lf.Adapter(dict(demo_adapters["roman"].items()), head))
