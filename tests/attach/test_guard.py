"""Paused ranks don't move while an optimiser steps: not by decay, not by momentum."""

import copy

import pytest
import torch

import lorafold as lf


def trained(net, init="kaiming", rank=4, **more):
    live = lf.attach(net, {"one": lf.LoRA(rank=rank, init=init, seed=0), **more})
    for m in live._state.trained("one").fresh.values():
        m.B.data = torch.randn(m.B.shape, generator=torch.Generator().manual_seed(1))
    return live


def step(live, net, optimizer, x, **options):
    optimizer.zero_grad()
    with live.use("one", **options):
        net(x).square().mean().backward()
    optimizer.step()


def snapshot(live):
    return {
        path: (m.A.detach().clone(), m.B.detach().clone())
        for path, m in live._state.trained("one").fresh.items()
    }


OPTIMIZERS = {
    "adamw": lambda ps: torch.optim.AdamW(ps, lr=0.1, weight_decay=0.5),
    "adamw, foreach off": lambda ps: torch.optim.AdamW(ps, lr=0.1, weight_decay=0.5, foreach=False),
    "amsgrad": lambda ps: torch.optim.Adam(ps, lr=0.1, weight_decay=0.5, amsgrad=True),
    "sgd": lambda ps: torch.optim.SGD(ps, lr=0.1, momentum=0.9, weight_decay=0.5),
    "rmsprop": lambda ps: torch.optim.RMSprop(ps, lr=0.1, momentum=0.9, weight_decay=0.5),
}


@pytest.mark.parametrize("optimizer", OPTIMIZERS)
def test_paused_ranks_do_not_move(net, x, optimizer):
    live = trained(net)
    optimizer = OPTIMIZERS[optimizer](live.parameters())
    live.guard(optimizer)
    step(live, net, optimizer, x)  # momentum for all of them
    before = snapshot(live)
    states = copy.deepcopy({id(p): s for p, s in optimizer.state.items()})
    for _ in range(3):
        step(live, net, optimizer, x, rank=2)
    for path, m in live._state.trained("one").fresh.items():
        A, B = before[path]
        assert torch.equal(m.A[2:], A[2:])
        assert torch.equal(m.B[:, 2:], B[:, 2:])
        assert (m.A[:2] != A[:2]).all()
        assert (m.B[:, :2] != B[:, :2]).all()
        for p, index in ((m.A, slice(2, None)), (m.B, (slice(None), slice(2, None)))):
            for key, value in optimizer.state[p].items():  # nor their state
                if value.shape == p.shape:
                    assert torch.equal(value[index], states[id(p)][key][index])


@pytest.mark.parametrize("optimizer", OPTIMIZERS)
def test_without_the_guard_they_move(net, x, optimizer):
    live = trained(net)
    optimizer = OPTIMIZERS[optimizer](live.parameters())
    step(live, net, optimizer, x)
    before = snapshot(live)
    step(live, net, optimizer, x, rank=2)
    assert any(
        (m.A[2:] != before[p][0][2:]).any() for p, m in live._state.trained("one").fresh.items()
    )


def test_active_dimensions_alone_get_gradient(net, x):
    live = trained(net)
    with live.use("one", rank=2):
        net(x).square().mean().backward()
    for m in live._state.trained("one").fresh.values():
        assert not m.A.grad[2:].any()
        assert not m.B.grad[:, 2:].any()
        assert m.A.grad[:2].any(dim=1).all()
        assert m.B.grad[:, :2].any(dim=0).all()


def test_active_ones_move_as_without_the_guard(make_net, x):
    found = []
    for guarded in (False, True):
        net = make_net()
        live = trained(net)
        optimizer = OPTIMIZERS["adamw"](live.parameters())
        if guarded:
            live.guard(optimizer)
        for rank in (4, 2):
            step(live, net, optimizer, x, rank=rank)
        found.append(snapshot(live))
    for path, (A, B) in found[0].items():
        assert torch.equal(found[1][path][0][:2], A[:2])
        assert torch.equal(found[1][path][1][:, :2], B[:, :2])


def test_state_that_comes_with_a_paused_step_begins_at_0(net, x):
    live = trained(net)
    optimizer = OPTIMIZERS["adamw"](live.parameters())
    live.guard(optimizer)
    step(live, net, optimizer, x, rank=1)
    m = live._state.trained("one").fresh["layers.0.q"]
    assert not optimizer.state[m.A]["exp_avg"][1:].any()
    step(live, net, optimizer, x)
    assert optimizer.state[m.A]["exp_avg"][1:].any()


def test_the_largest_rank_between_two_steps_counts(net, x):
    live = trained(net)
    optimizer = OPTIMIZERS["adamw"](live.parameters())
    live.guard(optimizer)
    before = snapshot(live)
    optimizer.zero_grad()
    for rank in (1, 3, 2):  # accumulated gradients, as in nested training
        with live.use("one", rank=rank):
            net(x).square().mean().backward()
    optimizer.step()
    for path, m in live._state.trained("one").fresh.items():
        assert torch.equal(m.A[3:], before[path][0][3:])
        assert (m.A[:3] != before[path][0][:3]).all()


def test_what_only_looked_does_not_count(net, x):
    live = trained(net)
    optimizer = OPTIMIZERS["adamw"](live.parameters())
    live.guard(optimizer)
    before = snapshot(live)
    live.use("one", rank=2)
    optimizer.zero_grad()
    net(x).square().mean().backward()
    with live.use("one"), torch.no_grad():
        net(x)  # an evaluation at full rank
    optimizer.step()
    for path, m in live._state.trained("one").fresh.items():
        assert torch.equal(m.A[2:], before[path][0][2:])


def test_rows_count_by_their_ranks(net, x):
    live = trained(net)
    optimizer = OPTIMIZERS["adamw"](live.parameters())
    live.guard(optimizer)
    before = snapshot(live)
    optimizer.zero_grad()
    with live.use(["one", None, "one"], rank=[1, 4, 3]):
        net(x).square().mean().backward()
    optimizer.step()
    for path, m in live._state.trained("one").fresh.items():
        assert torch.equal(m.A[3:], before[path][0][3:])
        assert (m.A[:3] != before[path][0][:3]).all()


def test_ranks_by_module_and_adapters_that_do_not_run(net, x):
    live = trained(net, two=lf.LoRA(rank=2, seed=2), mod=lf.PiSSA(rank=3, mean=0.1))
    optimizer = OPTIMIZERS["adamw"](live.parameters())
    live.guard(optimizer)
    before = snapshot(live)
    others = {}
    for name in ("two", "mod"):
        modules = live._state.trained(name).fresh.values()
        others[name] = [p.detach().clone() for m in modules for p in m.parameters()]
    for p in live.parameters():
        p.grad = torch.zeros_like(p)  # so that decay reaches everything
    with live.use("one", rank={"q": 1}):
        net(x).square().mean().backward()
    optimizer.step()
    for path, m in live._state.trained("one").fresh.items():
        if path.endswith("q"):
            assert torch.equal(m.A[1:], before[path][0][1:])
        assert (m.A[:1] != before[path][0][:1]).all()
        if not path.endswith("q"):
            assert (m.A != before[path][0]).all()
    for name, held in others.items():
        now = [p for m in live._state.trained(name).fresh.values() for p in m.parameters()]
        assert all(torch.equal(p, q) for p, q in zip(now, held, strict=True))


def test_modulations_are_guarded_too(net, x):
    live = lf.attach(net, {"one": lf.PiSSA(rank=4, mean=0.5)})
    optimizer = OPTIMIZERS["adamw"](live.parameters())
    live.guard(optimizer)
    step(live, net, optimizer, x, rank=2)
    for m in live._state.trained("one").fresh.values():
        assert (m.delta_s[2:] == 0.5).all()
        assert (m.delta_s[:2] != 0.5).all()


def test_the_guard_can_be_taken_off(net, x):
    live = trained(net)
    optimizer = OPTIMIZERS["adamw"](live.parameters())
    guard = live.guard(optimizer)
    guard.remove()
    before = snapshot(live)
    step(live, net, optimizer, x, rank=2)
    for path, m in live._state.trained("one").fresh.items():
        assert (m.A[2:] != before[path][0][2:]).any()
    guard.remove()


def test_a_step_without_any_forward_moves_nothing(net, x):
    live = trained(net)
    optimizer = OPTIMIZERS["adamw"](live.parameters())
    live.guard(optimizer)
    for p in live.parameters():
        p.grad = torch.ones_like(p)
    before = snapshot(live)
    optimizer.step()
    after = snapshot(live)
    assert all(torch.equal(a, b) for p in before for a, b in zip(before[p], after[p], strict=True))


def test_each_of_several_optimizers_is_guarded(net, x):
    live = trained(net)
    modules = list(live._state.trained("one").fresh.values())
    optimizers = [torch.optim.SGD([getattr(m, n) for m in modules], lr=0.1) for n in ("A", "B")]
    guards = [live.guard(optimizer) for optimizer in optimizers]
    before = snapshot(live)
    with live.use("one", rank=2):
        net(x).square().mean().backward()
    for optimizer in optimizers:
        optimizer.step()
    for path, (A, B) in snapshot(live).items():
        assert (A[:2] != before[path][0][:2]).any()
        assert (B[:, :2] != before[path][1][:, :2]).any()
        assert torch.equal(A[2:], before[path][0][2:])
        assert torch.equal(B[:, 2:], before[path][1][:, 2:])
    for guard in guards:
        guard.remove()


@pytest.mark.parametrize("wide", [lf.LoRA(rank=2, seed=5), lf.PiSSA(rank=2, seed=5)], ids=type)
def test_layers_that_come_while_an_optimiser_is_guarded(net, x, wide):
    live = lf.attach(net, {"one": lf.LoRA(rank=4, targets="q", seed=0)})
    optimizer = torch.optim.AdamW(live.parameters("one"), lr=0.1)
    live.guard(optimizer)
    with live.use("one", rank=2):
        net(x).square().sum().backward()
    live.add(wide, "two")  # at layers that were not attached to before, some of them further up
    with live.use({"one": 1.0, "two": 1.0}, rank=1):
        net(x).square().sum().backward()
    factors = live._state.trained("one").fresh
    before = {path: m.A.detach().clone() for path, m in factors.items()}
    optimizer.step()
    for path, m in factors.items():
        assert torch.equal(m.A[2:], before[path][2:])
        assert (m.A[:2] != before[path][:2]).any()
