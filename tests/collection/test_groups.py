"""Who started from the same factors: found when it is so, and only then."""

import numpy as np
import pytest
import torch

from lorafold.collection import groups as groups_module
from lorafold.collection.groups import init_groups, probes
from lorafold.collection.stack import Stack
from lorafold.lowrank import LowRank

OUT, INN = 96, 128


def stacks_of(adapters):
    """One `Stack` a module over adapters given as {module: LowRank}; a module may be missing."""
    found = []
    for path in sorted({p for a in adapters for p in a}):
        members = np.array([i for i, a in enumerate(adapters) if path in a])
        ranks = np.array([adapters[i][path].rank for i in members])

        def read(i, path=path):
            return adapters[i][path]

        shape = adapters[members[0]][path].shape
        found.append(Stack(path, shape, members, ranks, read, 1 << 14))
    return found


def trained(init, seed, *, moved=0.3, rank=4, modules=3, shape=(OUT, INN)):
    """An adapter some steps away from the A that `init` seeds, B from its own seed."""
    out, inn = shape
    adapter = {}
    for m in range(modules):
        a = torch.randn(16, inn, generator=torch.Generator().manual_seed(100 * init + m))[:rank]
        g = torch.Generator().manual_seed(10_000 + 100 * seed + m)
        A = a + moved * torch.randn(rank, inn, generator=g)
        B = torch.randn(out, rank, generator=g)
        # Training mixes the rows, and so does any gauge: only the space they span stays.
        G = torch.randn(rank, rank, generator=g) + 3 * torch.eye(rank)
        adapter[f"m{m}"] = LowRank(G @ A, B, 2.0)
    return adapter


def test_adapters_of_one_init_are_found_and_others_are_not():
    adapters = [trained(init, seed) for seed, init in enumerate([1, 2, 1, 3, 2, 1, 4])]
    stacks = stacks_of(adapters)
    assert init_groups(stacks, 7, "V").tolist() == [0, 1, 0, -1, 1, 0, -1]
    assert init_groups(stacks, 7, "U").tolist() == [-1] * 7


def test_a_shared_B_is_found_on_the_other_side():
    adapters = [
        {p: LowRank(u.B.T.contiguous(), u.A.T.contiguous()) for p, u in trained(i, s).items()}
        for s, i in enumerate([1, 1, 2])
    ]
    stacks = stacks_of(adapters)
    assert init_groups(stacks, 3, "U").tolist() == [0, 0, -1]
    assert init_groups(stacks, 3, "V").tolist() == [-1, -1, -1]


def test_ranks_may_differ():
    adapters = [trained(1, 0, rank=2), trained(1, 1, rank=8), trained(2, 2, rank=8)]
    assert init_groups(stacks_of(adapters), 3, "V").tolist() == [0, 0, -1]


@pytest.mark.parametrize("rank", [1, 4, 48])
def test_unrelated_adapters_of_any_rank_are_no_group(rank):
    """The negative control: a rank of a quarter of the width overlaps a quarter by chance."""
    g = torch.Generator().manual_seed(rank)
    adapters = [
        {"m": LowRank(torch.randn(rank, 64, generator=g), torch.randn(64, rank, generator=g))}
        for _ in range(8)
    ]
    assert init_groups(stacks_of(adapters), 8, "V").tolist() == [-1] * 8
    # Without the correction for chance the widest ones would be taken for kin.
    A = [torch.linalg.qr(a["m"].A.T)[0] for a in adapters]
    overlap = float((A[0].T @ A[1]).square().sum() / rank)
    assert (overlap > groups_module.THRESHOLD) == (rank == 48)


def test_unrelated_adapters_of_unequal_ranks_are_no_group():
    """Half of a narrow space holds half of any direction, and all of it every direction."""
    g = torch.Generator().manual_seed(0)
    ranks = [4, 8, 16, 32] * 5
    adapters = [
        {p: LowRank(torch.randn(r, 32, generator=g), torch.randn(32, r, generator=g)) for p in "ab"}
        for r in ranks
    ]
    for side in "UV":
        assert init_groups(stacks_of(adapters), len(ranks), side).tolist() == [-1] * len(ranks)


def test_far_trained_adapters_are_no_group_any_more():
    adapters = [trained(1, seed, moved=3.0) for seed in range(3)]
    assert init_groups(stacks_of(adapters), 3, "V").tolist() == [-1] * 3


def test_zero_updates_and_missing_modules():
    adapters = [trained(1, 0), trained(1, 1), trained(1, 2)]
    for p, u in adapters[1].items():  # B = 0, as before the first step: A still tells
        adapters[1][p] = LowRank(u.A, torch.zeros_like(u.B))
    for p, u in adapters[2].items():
        adapters[2][p] = LowRank(torch.zeros_like(u.A), u.B)
    assert init_groups(stacks_of(adapters), 3, "V").tolist() == [0, 0, -1]
    assert init_groups(stacks_of(adapters), 3, "U").tolist() == [-1] * 3
    partial = [trained(1, 0), trained(1, 1, modules=1), trained(2, 2, modules=2)]
    assert init_groups(stacks_of(partial), 3, "V").tolist() == [0, 0, -1]
    assert init_groups([], 3, "V").tolist() == [-1] * 3


def test_long_vectors_are_folded_down(monkeypatch):
    adapters = [trained(init, seed) for seed, init in enumerate([1, 1, 2, 2, 3])]
    monkeypatch.setattr(groups_module, "_WIDTH", 40)
    assert init_groups(stacks_of(adapters), 5, "V").tolist() == [0, 0, 1, 1, -1]


def test_pieces_of_the_overlap_matrix_change_nothing(monkeypatch):
    adapters = [trained(1 + s % 3, s) for s in range(9)]
    stacks = stacks_of(adapters)
    whole = init_groups(stacks, 9, "V").tolist()
    monkeypatch.setattr(groups_module, "_PIECE", 6)
    assert init_groups(stacks, 9, "V").tolist() == whole == [0, 1, 2] * 3


def test_all_are_compared_with_a_sample(monkeypatch):
    """Groups with one in the sample are found whole, wherever it lies; nobody joins a wrong one."""
    adapters = [trained(1 + s % 3, s) for s in range(9)] + [trained(10 + s, s) for s in range(9)]
    adapters += [trained(4, 20), trained(4, 21)]
    stacks = stacks_of(adapters)
    lone = [-1] * 9
    assert init_groups(stacks, 20, "V").tolist() == [0, 1, 2] * 3 + lone + [3, 3]
    monkeypatch.setattr(groups_module, "_SAMPLE", 4 * 6)  # of rank 4: numbers 0, 4, 8, 11, 15, 19
    monkeypatch.setattr(groups_module, "_PIECE", 8)
    assert init_groups(stacks, 20, "V").tolist() == [0, 1, 2] * 3 + lone + [3, 3]
    monkeypatch.setattr(groups_module, "_SAMPLE", 4 * 2)  # the first and the last
    assert init_groups(stacks, 20, "V").tolist() == [0, -1, -1] * 3 + lone + [1, 1]


def test_probes_are_evenly_spaced():
    assert probes(2, 3) == [0, 1]
    assert probes(0, 3) == []
    assert probes(101, 3) == [0, 50, 100]
