"""The sensor's promise, and what the controller does in each state."""

import json
import math
import random

import pytest
import torch
from torch import nn

import lorafold as lf
from lorafold.train.orbital.controller import OrbitalController
from lorafold.train.orbital.sensor import Sensor, Tuning


def noise(seed, kind):
    r = random.Random(seed)
    if kind == "normal":
        return lambda: r.gauss(0, 0.05)
    if kind == "skewed":
        return lambda: r.expovariate(20) - 0.05
    return lambda: r.gauss(0, 0.05) / max(0.3, sum(r.gauss(0, 1) ** 2 for _ in range(5)) / 5) ** 0.5


@pytest.mark.parametrize("kind", ["normal", "skewed", "heavy"])
def test_a_shock_is_found_within_five_steps(kind):
    found = 0
    for seed in range(100):
        draw, sensor = noise(seed, kind), Sensor()
        onset = random.Random(seed).randint(100, 400)
        for _ in range(onset):
            sensor.read(2 + draw())
        found += any(step(sensor, 3 + draw()) for _ in range(5))  # + 20 σ
    assert found >= 95


def step(sensor, loss):
    sensor.read(loss)
    return sensor.stressed


@pytest.mark.parametrize("kind", ["normal", "skewed", "heavy"])
@pytest.mark.parametrize("slope", [0, -0.0005])
def test_alarms_on_noise_alone_are_rare(kind, slope):
    alarms = 0
    for seed in range(20):
        draw, sensor, before = noise(seed, kind), Sensor(), False
        for i in range(1000):
            sensor.read(2 + slope * i + draw())
            alarms += sensor.stressed and not before
            before = sensor.stressed
    assert alarms <= 20


def test_what_stays_so_is_how_things_are():
    draw, sensor = noise(1, "normal"), Sensor()
    for _ in range(200):
        sensor.read(2 + draw())
    for _ in range(200):  # ten times the noise from now on
        sensor.read(2 + 10 * draw())
    assert not sensor.stressed
    assert sensor.cooled or sensor.above(2) > 0.5


def test_a_single_bad_batch_is_no_stress():
    draw, sensor = noise(1, "normal"), Sensor()
    for i in range(300):
        sensor.read(2 + draw() + (1 if i == 200 else 0))
        # The way back moves the average's distance once more, below what counts as hot.
        assert not sensor.stressed or i == 201


def test_it_goes_on_from_its_state():
    draw, one = noise(2, "normal"), Sensor()
    losses = [2 + draw() for _ in range(150)]
    for x in losses[:100]:
        one.read(x)
    other = Sensor()
    other.restore(json.loads(json.dumps(one.state())))
    for x in losses[100:]:
        one.read(x)
        other.read(x)
    assert one.state() == other.state()


@pytest.mark.parametrize(
    ("option", "value"),
    [("decay", 1.0), ("rise", -1), ("window", 4), ("warmup", 1.5), ("stable", 0), ("hot", "6")],
)
def test_bad_tuning(option, value):
    with pytest.raises(lf.MismatchError, match=option):
        Tuning(**{option: value})
    with pytest.raises(lf.MismatchError, match="must not be above hot"):
        Tuning(cool=7.0)


# The controller


def controlled(**options):
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(12, 10))
    live = lf.attach(model, lf.LoRA(rank=8, seed=0))
    optimizer = torch.optim.AdamW(live.parameters(), lr=0.01, weight_decay=0.1)
    options = {"levels": (2, 4, 8), "every": 1, **options}
    return model, live, optimizer, OrbitalController(live, optimizer, **options)


def train(model, optimizer, controller, losses, x):
    for loss in losses:
        controller.step(loss)
        optimizer.zero_grad()
        with controller.running():
            model(x).square().mean().backward()
        optimizer.step()


def steady(n, level=2.0, seed=0):
    draw = noise(seed, "normal")
    return [level + draw() for _ in range(n)]


def test_stress_lowers_rank_and_rate_at_once_and_pauses_what_it_leaves_out():
    model, live, optimizer, controller = controlled()
    x = torch.randn(20, 12)
    train(model, optimizer, controller, steady(100), x)
    assert controller.state in ("BASE", "HIGH")
    train(model, optimizer, controller, [4.0, 4.0], x)
    assert (controller.state, controller.rank) == ("LOW", 2)
    A, B = (p.detach().clone() for p in live.parameters())
    moments = [optimizer.state[p]["exp_avg"].clone() for p in live.parameters()]
    train(model, optimizer, controller, [4.0] * 5, x)
    after = list(live.parameters())
    assert torch.equal(after[0][2:], A[2:])
    assert torch.equal(after[1][:, 2:], B[:, 2:])
    assert not torch.equal(after[0][:2], A[:2])
    assert torch.equal(optimizer.state[after[0]]["exp_avg"][2:], moments[0][2:])
    assert [g["lr"] for g in optimizer.param_groups] == [0.01]  # but for the length of a step
    train(model, optimizer, controller, steady(60), x)
    assert controller.state != "LOW"
    what = [event.what for event in controller.events]
    assert "restored" in what or "kept" in what


def test_the_rate_is_scaled_for_a_step_and_schedules_do_not_know():
    model, _live, optimizer, controller = controlled(rates=(0.25, 1.0, 2.0))
    seen = []
    optimizer.register_step_pre_hook(lambda o, *_: seen.append(o.param_groups[0]["lr"]))
    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda k: 1 / (1 + k))
    x = torch.randn(20, 12)
    train(model, optimizer, controller, steady(40), x)
    schedule.step()
    assert optimizer.param_groups[0]["lr"] == 0.005
    train(model, optimizer, controller, [9.0, 9.0], x)
    assert controller.state == "LOW"
    assert seen[-1] == pytest.approx(0.25 * 0.005)


def test_little_movement_under_stress_is_taken_back():
    for drift, what in ((1e9, "restored"), (0.0, "kept")):
        model, live, optimizer, controller = controlled(drift=drift)
        x = torch.randn(20, 12)
        train(model, optimizer, controller, [*steady(100), 5.0, 5.0], x)
        assert controller.state == "LOW"
        entered = [event for event in controller.events if event.state == "LOW"]
        assert len(entered) == 1
        before = live.adapter("default")
        train(model, optimizer, controller, [5.0] * 3, x)
        moved = live.adapter("default").distance(before)
        assert moved > 0
        for loss in steady(80):
            was = controller.state
            controller.step(loss)
            if was == "LOW" and controller.state != "LOW":
                break
        event = next(e for e in controller.events if e.what == what)
        assert event.drift is not None
        assert math.isfinite(event.drift)


@pytest.mark.parametrize("bad", [math.nan, math.inf])
def test_a_loss_that_is_not_finite_is_never_stepped_on(bad):
    model, live, optimizer, controller = controlled(keep=4)
    x = torch.randn(20, 12)
    train(model, optimizer, controller, steady(60), x)
    good = [p.detach().clone() for p in live.parameters()]
    with torch.no_grad():
        next(iter(live.parameters())).fill_(math.nan)  # and what it came from
    controller.step(bad)
    assert (controller.state, controller.rank) == ("NON_FINITE", 2)
    now = [p.detach().clone() for p in live.parameters()]
    assert all(torch.isfinite(p).all() for p in now)
    optimizer.zero_grad()
    (model(x).square().mean() * bad).backward()
    optimizer.step()
    for p, q in zip(live.parameters(), now, strict=True):
        assert torch.equal(p, q)
    assert all((p - q).abs().max() < 0.1 for p, q in zip(now, good, strict=True))
    train(model, optimizer, controller, steady(60), x)
    assert controller.state in ("BASE", "HIGH")
    broken = [e.what for e in controller.events if e.state == "NON_FINITE"]
    assert broken == ["restored", "state"]


def test_gradients_that_are_not_finite_make_no_step():
    model, live, optimizer, controller = controlled()
    x = torch.randn(20, 12)
    train(model, optimizer, controller, steady(5), x)
    before = [p.detach().clone() for p in live.parameters()]
    controller.step(2.0)
    model(x).square().mean().backward()
    next(iter(live.parameters())).grad[0, 0] = math.nan
    optimizer.step()
    for p, q in zip(live.parameters(), before, strict=True):
        assert torch.equal(p, q)


def test_losses_are_read_at_full_rank_whatever_trains():
    model, live, _optimizer, controller = controlled(every=2)
    x = torch.randn(20, 12)
    with torch.no_grad():
        for p in live.parameters():
            p.normal_()
    with live.use("default"):
        full = model(x).square().mean().item()
    read = []
    for _ in range(6):
        found = controller.read(lambda: model(x).square().mean())
        read.append(found)
        controller.step(found)
    assert read == [full, None] * 3
    with controller.running():
        assert model(x).square().mean().item() != full


def test_it_goes_on_from_what_was_saved():
    runs = []
    for resumed in (False, True):
        model, live, optimizer, controller = controlled()
        x = torch.randn(20, 12, generator=torch.Generator().manual_seed(3))
        losses = [*steady(100), 5.0, 5.0, 5.0, *steady(60, seed=1)]
        train(model, optimizer, controller, losses[:102], x)
        if resumed:
            state = json.loads(json.dumps(controller.state_dict()))
            tensors = controller.tensors()
            controller.close()
            options = {"levels": (2, 4, 8), "every": 1}
            controller = OrbitalController(live, optimizer, **options)
            controller.load_state_dict(state, tensors)
        train(model, optimizer, controller, losses[102:], x)
        runs.append((controller.events, [p.detach().clone() for p in live.parameters()]))
    assert runs[0][0] == runs[1][0]
    assert all(torch.equal(p, q) for p, q in zip(runs[0][1], runs[1][1], strict=True))


@pytest.mark.parametrize(
    ("options", "says"),
    [
        ({"levels": (4, 2, 8)}, "must ascend"),
        ({"levels": (2, 4, 16)}, "up to the adapter's rank, 8"),
        ({"levels": (2, 4)}, "three ranks"),
        ({"every": 5}, "every must be 1 or 2"),
        ({"rates": (1, 1)}, "three factors"),
        ({"rates": (0, 1, 1)}, "three factors"),
        ({"keep": 0}, "keep"),
    ],
)
def test_bad_options(options, says):
    with pytest.raises(lf.MismatchError, match=says):
        controlled(**options)
