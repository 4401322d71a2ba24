"""Requests run as each alone, whoever runs beside them, in rows and packed."""

from __future__ import annotations

import itertools
import random
import threading
from dataclasses import replace

import pytest

from lorafold.serve import Sampling
from lorafold.serve.engine import BusyError, DownError

NAMES = ["roman", "morse", "base64", "sql_inserts"]


def test_48_requests_through_16_rows_are_each_as_alone(engine, serving):
    hows = list(serving.wanted(48))
    told = [serving.ask(engine, **how) for how in hows]
    for one, how in zip(told, hows, strict=True):
        assert one.wait().reason == "length"
        assert len(one.tokens) == how["new"]
    for one, how in zip(told, hows, strict=True):
        serving.check_alone(engine, one, how)
    assert engine.load.running == engine.load.waiting == 0
    assert engine.tokens == sum(how["new"] for how in hows)


def test_the_comparison_would_notice_another_strength(engine, serving):
    how = {"prompt": list(b"one two three"), "mix": {"roman": 1.0}, "c": 1.0, "rank": None}
    told = serving.ask(engine, **how).wait()
    with pytest.raises(AssertionError):
        serving.check_alone(engine, told, {**how, "c": 0.99})


def test_one_prompt_under_each_pair_of_adapters(engine, serving):
    """Nothing of a prompt that was read under one adapter reaches another's."""
    prompt = list(b"0123456789abcdef" * 4)  # four pages of an engine that has pages
    for first, second in itertools.permutations(NAMES, 2):
        for name in (first, second):
            how = {"prompt": prompt, "mix": {name: 1.0}, "c": 1.0, "rank": None}
            serving.check_alone(engine, serving.ask(engine, new=6, **how).wait(), how)


def test_a_long_prompt_is_read_in_pieces_while_others_go_on(
    demo_model, demo_adapters, serving, make
):
    demo_model.config.max_position_embeddings = 2048  # positions are rotary
    limits = replace(serving.LIMITS, length=1500, rows=4)
    engine = serving.started(demo_model, demo_adapters, limits, make)
    rng = random.Random(3)
    hows = []
    for i, length in enumerate([30, 1300, 40, 700, 25]):
        prompt = [rng.randrange(32, 127) for _ in range(length)]
        hows.append({"prompt": prompt, "mix": {NAMES[i % 4]: 1.0}, "c": 1.0, "rank": None})
    told = [serving.ask(engine, new=5 + 4 * i, **how) for i, how in enumerate(hows)]
    for one in told:
        one.wait()
    for one, how in zip(told, hows, strict=True):
        serving.check_alone(engine, one, how)
    engine.stop(60)


def test_seeds_do_not_ask_who_runs_beside(engine, serving):
    prompt = list(b"def main(")
    rules = Sampling(temperature=1.2, seed=7, top_p=0.95)
    alone = serving.ask(engine, prompt, 30, rules, mix={"roman": 1.0}).wait().tokens
    other = serving.ask(engine, prompt, 30, Sampling(temperature=1.2, seed=8)).wait().tokens
    assert other != alone
    for count in (5, 11):
        crowd = [
            serving.ask(engine, list(b"x" * (3 + i)), 40, Sampling(temperature=1.0, seed=i))
            for i in range(count)
        ]
        again = serving.ask(engine, prompt, 30, rules, mix={"roman": 1.0}).wait().tokens
        assert again == alone
        for one in crowd:
            one.wait()


def test_rows_are_freed_and_the_queue_is_bounded(demo_model, demo_adapters, serving, make):
    limits = replace(serving.LIMITS, rows=2, waiting=3)
    engine = serving.started(demo_model, {}, limits, make)
    held, at = threading.Event(), threading.Event()
    blocked = engine.call(lambda: (at.set(), held.wait(60)))
    at.wait(60)
    told = [serving.ask(engine, b"abc", 200) for _ in range(3)]
    with pytest.raises(BusyError, match="3 requests are waiting"):
        serving.ask(engine, b"abc")
    engine.cancel(told[2].request)
    held.set()
    blocked.result(60)
    assert told[2].wait().reason == "cancelled"
    engine.cancel(told[0].request)
    assert told[0].wait().reason in ("cancelled", "length")
    assert told[1].wait().reason == "length"
    assert len(told[1].tokens) == 200
    engine.drain()
    with pytest.raises(DownError, match="takes no more"):
        serving.ask(engine, b"abc")
    engine.stop(60)


def test_stop_tokens_end_an_answer_once_enough_is_said(engine, serving):
    prompt = list(b"abc")
    plain = serving.ask(engine, prompt, 12).wait().tokens
    stop = frozenset({plain[3]})
    first = plain.index(plain[3])
    told = serving.ask(engine, prompt, 12, Sampling(temperature=0, stop=stop)).wait()
    assert (told.tokens, told.reason) == (plain[: first + 1], "stop")
    told = serving.ask(engine, prompt, 12, Sampling(temperature=0, stop=stop, min_new=8)).wait()
    assert plain[3] not in told.tokens[:8]


def test_a_step_that_raises_ends_everybody_and_the_engine_begins_again(engine, serving):
    hows = list(serving.wanted(20))
    steps, use = [], engine._use

    def failing(rows):
        steps.append(None)
        if len(steps) == 3:
            raise RuntimeError("a kernel has failed")
        use(rows)

    engine._use = failing
    told = [serving.ask(engine, **how) for how in hows]
    for one in told:
        assert one.wait().reason == "error"
        assert "a kernel has failed" in str(one.pieces[-1].error)
    assert "a kernel has failed" in str(engine.error)
    with pytest.raises(DownError, match="has failed"):
        serving.ask(engine, b"abc")
    with pytest.raises(DownError, match="has failed"):
        engine.call(lambda: None)
    engine._use = use
    engine.start()
    assert engine.error is None
    told = serving.ask(engine, **hows[1]).wait()
    serving.check_alone(engine, told, hows[1])


def test_stopping_tells_those_that_are_there(demo_model, serving, make):
    engine = serving.started(demo_model, {}, make=make)
    told = [serving.ask(engine, b"abc", 200) for _ in range(30)]
    engine.stop(60)
    assert all(one.wait().reason in ("error", "length") for one in told)
    assert any(one.reason == "error" for one in told)
    with pytest.raises(DownError, match="not running"):
        engine.call(lambda: None)
