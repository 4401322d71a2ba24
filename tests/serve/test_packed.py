"""What is the packed engine's own: pages, budgets that cut prompts, and what it refuses."""

from __future__ import annotations

import itertools
from dataclasses import replace
from functools import partial

import pytest
import torch

import lorafold as lf
from lorafold.errors import MismatchError, RefusedError
from lorafold.serve import Room, Sampling, read_base
from lorafold.serve.run import paged
from lorafold.serve.run.packed import PackedEngine

transformers = pytest.importorskip("transformers")

PROMPT = list(b"0123456789abcdef" * 4)  # four pages


pytestmark = pytest.mark.usefixtures("packed")


@pytest.fixture
def begun(demo_model, demo_adapters, serving):
    """`begun(...)`: an engine that runs, with the demo's adapters."""
    made = []

    def begin(limits=serving.LIMITS, adapters=demo_adapters, **how):
        if made:
            made[-1].stop(60)
            made[-1].attachments.live.detach()
        make = partial(PackedEngine, **how)
        made.append(serving.started(demo_model, adapters, limits, make))
        return made[-1]

    yield begin
    for engine in made:
        engine.stop(60)


@pytest.fixture
def at_the_head(demo_adapters):
    """An adapter that goes to lm_head as well, where a sequence has one entry."""
    g = torch.Generator().manual_seed(0)
    A, B = torch.randn(4, 128, generator=g) / 12, torch.randn(256, 4, generator=g) / 4
    return lf.Adapter({**dict(demo_adapters["roman"].items()), "lm_head": lf.LowRank(A, B)})


def test_16_requests_whose_prompts_are_cut_are_each_as_alone(
    begun, serving, at_the_head, demo_adapters
):
    engine = begun(adapters={**demo_adapters, "head": at_the_head}, tokens=48)
    lengths, use = [], engine._use

    def noted(batch):
        lengths.append([count for _, count in batch])
        use(batch)

    engine._use = noted
    hows = list(serving.wanted(16, seed=1, names=["head", "morse", "roman"]))
    told = [serving.ask(engine, **how) for how in hows]
    assert [one.wait().reason for one in told] == ["length"] * 16
    for one, how in zip(told, hows, strict=True):
        serving.check_alone(engine, one, how)
    assert max(map(sum, lengths)) == 48
    assert sum(count > 1 for batch in lengths for count in batch) > 16  # prompts in pieces


def differing(engine, serving, adapters):
    """Of all ordered pairs of adapters over one prompt, those whose second isn't as alone."""
    found = []
    for pair in itertools.permutations(adapters, 2):
        for name in pair:
            how = {"prompt": PROMPT, "mix": {name: 1.0}, "c": 1.0, "rank": None}
            told = serving.ask(engine, new=4, **how).wait()
        try:
            serving.check_alone(engine, told, how)
        except AssertionError:
            found.append(pair)
    return found


def test_shared_pages_would_mix_adapters(begun, serving, demo_adapters, monkeypatch):
    assert differing(begun(), serving, demo_adapters) == []
    monkeypatch.setitem(paged.OPTIONS, "allow_block_sharing", True)
    assert len(differing(begun(), serving, demo_adapters)) > 6


def test_requests_begin_when_pages_for_all_their_tokens_are_free(begun, serving):
    engine = begun(room=256)
    used = []
    hows = [{**how, "new": 60} for how in serving.wanted(12, seed=2)]
    told = [serving.ask(engine, **how) for how in hows]
    while not all(one.ended.wait(0.01) for one in told):
        used.append(engine.used)
    for one, how in zip(told, hows, strict=True):
        assert one.reason == "length"
        serving.check_alone(engine, one, how)
    assert max(used) <= 1
    assert engine.used == 0


def test_what_has_ended_leaves_nothing(begun, serving):
    engine = begun(replace(serving.LIMITS, rows=2))
    long = [serving.ask(engine, b"abc", 250) for _ in range(4)]
    for one in long[1:]:
        engine.cancel(one.request)
    stop = Sampling(temperature=0, stop=frozenset(range(256)))
    assert serving.ask(engine, b"abc", 250, stop).wait().reason == "stop"
    for one in long:
        assert one.wait().reason in ("cancelled", "length")
    serving.ask(engine, b"abc", 3).wait()
    processor = engine._paged._processor
    assert not processor.scheduler.active_requests
    assert not processor.scheduler.waiting_requests
    assert all(not a.block_table for a in processor.cache.cache_allocators.values())
    assert engine._paged._manager.output_router.output_queue.empty()


def test_a_prompt_that_is_cut_and_overflows_ends_alone(begun, serving, demo_adapters):
    """In some of its steps others are spoiled, and nobody sees its own numbers."""
    engine = begun(tokens=32)
    serving.add(engine, 1e30 * demo_adapters["roman"], "loud")
    hows = list(serving.wanted(8, seed=3))
    told = [serving.ask(engine, **how) for how in hows[:4]]
    loud = [serving.ask(engine, b"x" * 150, 20, mix={"loud": 1000.0}) for _ in range(3)]
    told += [serving.ask(engine, **how) for how in hows[4:]]
    assert [one.wait().reason for one in loud] == ["error"] * 3
    assert [one.wait().reason for one in told] == ["length"] * 8
    for one, how in zip(told, hows, strict=True):
        serving.check_alone(engine, one, how)


def test_another_transformers_is_refused_by_name(demo_model, serving, monkeypatch):
    from transformers.generation.continuous_batching import model_runner

    def other(self, logits):
        pass

    monkeypatch.setattr(model_runner.ModelRunner, "_sample", other)
    with pytest.raises(RefusedError, match=r"_sample has no scores\): give engine='rows'"):
        PackedEngine(demo_model, None, serving.LIMITS)
    monkeypatch.delattr(model_runner.ModelRunner, "_sample")
    with pytest.raises(RefusedError, match=r"transformers 5.23 has it, which .* has not"):
        PackedEngine(demo_model, None, serving.LIMITS)


def test_a_base_for_it(tmp_path):
    from lorafold.demo.model import base_dir

    base = read_base(base_dir(), "demo", device="cpu", engine="packed", room=Room(rows=100))
    assert base.engine.name == "packed"
    assert base.engine.limits.rows == 100
    transformers.BertConfig().save_pretrained(tmp_path)
    with pytest.raises(MismatchError, match="'bert' is an encoder: leave engine= out"):
        read_base(tmp_path, "bert", engine="packed")
