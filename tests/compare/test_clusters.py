"""Complete linkage against scipy's, and connected components against a search one by one."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from lorafold.compare.clusters import components, linked

scipy = pytest.importorskip("scipy.cluster.hierarchy", reason="scipy is the reference")


def by_scipy(similarity, threshold):
    from scipy.spatial.distance import squareform

    distance = 1 - similarity
    np.fill_diagonal(distance, 0)
    tree = scipy.linkage(squareform(distance, checks=False), "complete")
    labels = scipy.fcluster(tree, 1 - threshold, "distance")
    return {frozenset(np.flatnonzero(labels == k).tolist()) for k in set(labels)}


def as_sets(groups):
    return {frozenset(g.tolist()) for g in groups}


@given(st.integers(0, 10_000), st.integers(2, 40), st.sampled_from([0.0, 0.3, 0.6, 0.9]))
def test_it_is_scipys(seed, count, threshold):
    rng = np.random.default_rng(seed)
    points = rng.standard_normal((count, 3))
    points /= np.linalg.norm(points, axis=1, keepdims=True)
    similarity = points @ points.T
    found = linked(similarity, threshold)
    assert as_sets(found) == by_scipy(similarity, threshold)
    assert [len(g) for g in found] == sorted(map(len, found), reverse=True)
    assert sorted(np.concatenate(found).tolist()) == list(range(count))
    for group in found:
        block = similarity[np.ix_(group, group)]
        assert block[~np.eye(len(group), dtype=bool)].min(initial=1) >= threshold


def test_a_chain_is_not_one_cluster():
    """a–b and b–c are near and a–c is not: single linkage would join them."""
    s = np.array([[1, 0.95, 0.2], [0.95, 1, 0.94], [0.2, 0.94, 1]])
    assert [g.tolist() for g in linked(s, 0.9)] == [[0, 1], [2]]
    assert [g.tolist() for g in components(s >= 0.9)] == [[0, 1, 2]]


def test_equals_and_zeros():
    assert [g.tolist() for g in linked(np.ones((5, 5)), 1.0)] == [[0, 1, 2, 3, 4]]
    assert len(linked(np.zeros((4, 4)), 0.5)) == 4
    assert len(linked(np.eye(1), 0.5)) == 1


@given(st.integers(0, 1000), st.integers(1, 30))
def test_components(seed, count):
    near = np.random.default_rng(seed).random((count, count)) < 1.5 / count
    near |= near.T
    labels = list(range(count))
    for _ in range(count):
        for i, j in zip(*np.nonzero(near), strict=True):
            labels[i] = labels[j] = min(labels[i], labels[j])
    wanted = {frozenset(k for k in range(count) if labels[k] == x) for x in set(labels)}
    assert as_sets(components(near)) == wanted
