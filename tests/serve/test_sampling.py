"""Tokens are drawn as the rules say, row by row, and counted against what is exact."""

from __future__ import annotations

import math
from collections import Counter

import pytest
import torch

from lorafold.serve import Sampling
from lorafold.serve.run.sampling import Draws, sampled

SCORES = torch.tensor([2.0, 1.0, 0.0, -1.0, 0.5, -math.inf])


def frequencies(rules, count=6000, scores=SCORES):
    draws = [Draws(Sampling(**rules, seed=seed)) for seed in range(count)]
    found = Counter(c.token for c in sampled(scores.expand(count, -1), draws))
    return torch.tensor([found[i] / count for i in range(len(scores))])


def masked(scores, kept):
    out = torch.full_like(scores, -math.inf)
    out[kept] = scores[kept]
    return out.softmax(0)


@pytest.mark.parametrize(
    ("rules", "expected"),
    [
        ({}, SCORES.softmax(0)),
        ({"temperature": 0.5}, (SCORES / 0.5).softmax(0)),
        ({"temperature": 2.0}, (SCORES / 2).softmax(0)),
        ({"temperature": 1e-50}, masked(SCORES, [0])),
        ({"top_k": 2}, masked(SCORES, [0, 1])),
        ({"top_k": 1}, masked(SCORES, [0])),
        ({"top_p": 0.0}, masked(SCORES, [0])),
        # 0.527, 0.194, 0.118: the third is needed to reach 0.8
        ({"top_p": 0.8}, masked(SCORES, [0, 1, 4])),
        # of the two that top_k leaves, the first has 0.731
        ({"top_k": 2, "top_p": 0.7}, masked(SCORES, [0])),
        ({"bias": {2: 2.0}}, (SCORES + torch.tensor([0, 0, 2.0, 0, 0, 0])).softmax(0)),
        ({"bias": {0: -100.0}}, masked(SCORES, [1, 2, 3, 4])),
    ],
)
def test_frequencies_are_the_probabilities(rules, expected):
    found = frequencies(rules)
    deviation = (expected * (1 - expected) / 6000).sqrt()
    assert bool(((found - expected).abs() <= 5 * deviation + 1e-9).all())
    assert bool((found[expected < 1e-12] == 0).all())


def test_a_nucleus_wider_than_the_first_look_is_whole():
    flat = torch.zeros(1000)
    flat[7] = 0.1
    draws = [Draws(Sampling(top_p=0.9, seed=seed)) for seed in range(4000)]
    found = {c.token for c in sampled(flat.expand(4000, -1), draws)}
    assert len(found) > 800


def test_cold_and_greedy_are_the_likeliest():
    for temperature in (0, 1e-30, 1e-6):
        (choice,) = sampled(SCORES[None], [Draws(Sampling(temperature=temperature, seed=1))])
        assert choice.token == 0


def test_rows_do_not_see_each_other():
    rules = [
        Sampling(seed=3, top=2),
        Sampling(temperature=0, top=1),
        Sampling(seed=4, top_p=0.5, presence=1.0),
        Sampling(seed=5, top_k=3, frequency=0.5),
    ]
    g = torch.Generator().manual_seed(0)
    steps = [torch.randn(4, 50, generator=g) for _ in range(20)]
    together = [Draws(r) for r in rules]
    rows = [sampled(scores, together) for scores in steps]
    for i, r in enumerate(rules):
        alone = Draws(r)
        for scores, row in zip(steps, rows, strict=True):
            (own,) = sampled(scores[i : i + 1], [alone])
            assert own.token == row[i].token
            if r.top is not None:
                assert abs(own.logprob - row[i].logprob) < 1e-6
                assert len(own.top) == r.top


def test_penalties_count_what_was_chosen():
    draws = Draws(Sampling(temperature=0, presence=0.75, frequency=0.5))
    flat = torch.tensor([[1.0, 0.9, 0.0]])
    # 1; then −0.25 against 0.9; then both −, against 0; …
    expected, scores, counts = [], [1.0, 0.9, 0.0], [0, 0, 0]
    for _ in range(9):
        now = [s - 0.75 * (n > 0) - 0.5 * n for s, n in zip(scores, counts, strict=True)]
        expected.append(now.index(max(now)))
        counts[expected[-1]] += 1
    assert [sampled(flat, [draws])[0].token for _ in range(9)] == expected
    assert len(set(expected)) == 3


def test_logprobs_are_the_models_own():
    rules = Sampling(temperature=0.1, bias={3: 50.0}, top=3)
    (choice,) = sampled(SCORES[None], [Draws(rules)])
    own = SCORES.log_softmax(0)
    assert choice.token == 3
    assert choice.logprob == pytest.approx(float(own[3]))
    assert [t for t, _ in choice.top] == [0, 1, 4]
    assert [p for _, p in choice.top] == pytest.approx(own[[0, 1, 4]].tolist())


@pytest.mark.parametrize("bad", [math.nan, math.inf])
def test_a_row_without_finite_scores_is_told_apart(bad):
    scores = SCORES.repeat(3, 1)
    scores[1, 2] = bad
    draws = [Draws(Sampling(seed=i)) for i in range(3)]
    found = sampled(scores, draws)
    assert found[1] is None
    assert all(found[i].token < 5 for i in (0, 2))
    assert [d.count for d in draws] == [1, 0, 1]


def test_without_a_seed_draws_differ():
    flat = torch.zeros(1, 10_000)
    found = {sampled(flat, [Draws(Sampling())])[0].token for _ in range(20)}
    assert len(found) > 10


def test_log_probabilities_are_numbers_of_json():
    (choice,) = sampled(SCORES[None], [Draws(Sampling(temperature=0, top=6))])
    assert choice.top[-1] == (5, -9999.0)
