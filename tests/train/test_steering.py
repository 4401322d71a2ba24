"""One adapter as a dial: its loss, its barrier, its calibration."""

import math

import pytest
import torch
from torch.nn import functional as F

import lorafold as lf
from lorafold.train.steering.barrier import KLBarrier, aggregated, token_kl
from lorafold.train.steering.loss import conflict_averse, steer_backward, steering_loss

pytest.importorskip("transformers")
pytestmark = pytest.mark.filterwarnings("ignore")


def llama(seed=0, scale=8.0):
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(seed)
    sizes = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2}
    heads = {"num_attention_heads": 4, "num_key_value_heads": 2}
    model = LlamaForCausalLM(LlamaConfig(vocab_size=40, **sizes, **heads)).eval()
    with torch.no_grad():
        model.lm_head.weight.mul_(scale)
    return model


def pairs(n=6, seed=0):
    g = torch.Generator().manual_seed(seed)
    prompt = torch.randint(3, 40, (n, 4), generator=g)
    batch = {}
    for side, (lo, hi) in {"chosen": (3, 20), "rejected": (20, 40)}.items():
        answer = torch.randint(lo, hi, (n, 5), generator=g)
        ids = torch.cat([prompt, answer], 1)
        labels = ids.clone()
        labels[:, :4] = -100
        batch[side] = {"input_ids": ids, "labels": labels}
    return batch


def test_the_divergence_is_that_of_the_definition():
    p, q = torch.randn(3, 4, 50), torch.randn(3, 4, 50)
    want = (p.softmax(-1) * (p.log_softmax(-1) - q.log_softmax(-1))).sum(-1)
    torch.testing.assert_close(token_kl(p, q), want)
    assert token_kl(p, p).abs().max() < 1e-6
    assert (token_kl(p, q, top=5) <= want + 1e-5).all()  # what is put together says less
    torch.testing.assert_close(token_kl(p, q, top=49), want, atol=1e-4, rtol=1e-4)
    torch.testing.assert_close(token_kl(p, q, top=500), want)


def test_mass_that_leaves_the_top_moves_the_bucket_and_not_the_renormalised_one():
    q = torch.full((1, 50), -4.0)
    q[0, :5] = torch.tensor([3.0, 2.5, 2.0, 1.5, 1.0])
    p = q.clone()
    p[0, 10:20] += 8  # half of everything and more goes to tokens outside
    top = q.topk(5).indices
    inside = [x.gather(-1, top).log_softmax(-1) for x in (p, q)]
    renormalised = (inside[0].exp() * (inside[0] - inside[1])).sum()
    assert renormalised.abs() < 1e-6
    assert token_kl(p, q, top=5) > 1


@pytest.mark.parametrize("how", ["mean", "rmse", "p95", "max"])
def test_aggregates(how):
    kl = torch.tensor([0.0, 1.0, 2.0, 5.0])
    want = {"mean": 2.0, "rmse": math.sqrt(7.5), "p95": float(torch.quantile(kl, 0.95)), "max": 5.0}
    assert float(aggregated(kl, how)) == pytest.approx(want[how])
    barrier = KLBarrier(lambda_=0.3, hinge=0.5, aggregate=how)
    assert float(barrier(kl)) == pytest.approx(0.3 * (want[how] - 0.5))
    assert float(barrier(torch.full((4,), 0.4))) == 0  # free up to the hinge
    zero = torch.zeros(3, requires_grad=True)
    aggregated(zero, how).backward()
    assert torch.isfinite(zero.grad).all()


def test_nothing_has_moved_at_the_start():
    model = llama()
    live = lf.attach(model, lf.LoRA(rank=4, seed=0))
    found = steering_loss(model, live, pairs(), c=2.0)
    assert float(found.kl.abs().max()) == 0
    assert found.margins == (0.0, 0.0)
    assert float(found.loss.detach()) == 2.0  # the cap, twice
    steer_backward(found, live)
    assert all(torch.isfinite(p.grad).all() for p in live.parameters())
    assert sum(float(p.grad.norm()) for p in live.parameters()) > 0


@pytest.mark.parametrize("kind", [lambda: lf.LoRA(rank=4, seed=0), lambda: lf.PiSSA(rank=16)])
def test_the_dial_raises_one_answer_and_the_other(kind):
    model = llama()
    live = lf.attach(model, kind())
    optimizer = torch.optim.Adam(live.parameters(), lr=0.02)
    barrier = KLBarrier(lambda_=0.3, hinge=2.0)
    for _ in range(40):
        optimizer.zero_grad()
        steer_backward(steering_loss(model, live, pairs(), barrier=barrier), live)
        optimizer.step()
    found = steering_loss(model, live, pairs(), barrier=barrier)
    assert min(found.margins) > 0.2
    batch = pairs()
    with torch.no_grad():
        scores = {}
        for c in (-1, 0, 1):
            with live.use("default", c=c):
                logits = model(batch["chosen"]["input_ids"]).logits
            flat = logits[:, :-1].flatten(0, 1)
            labels = batch["chosen"]["labels"][:, 1:].flatten()
            scores[c] = float(F.cross_entropy(flat, labels, ignore_index=-100))
    assert scores[1] < scores[0]


def test_changes_of_singular_values_train_in_float32():
    live = lf.attach(llama().bfloat16(), lf.PiSSA(rank=4, dtype=torch.bfloat16))
    assert {p.dtype for p in live.parameters()} == {torch.float32}


def test_the_push_is_capped():
    model = llama()
    live = lf.attach(model, lf.LoRA(rank=4, seed=0))
    with torch.no_grad():
        for p in live.parameters():
            p.add_(0.05 * torch.randn_like(p))
    free = KLBarrier(lambda_=0.0)
    small = steering_loss(model, live, pairs(), barrier=free, cap=1e-6)
    margins = [m for m in small.margins if m > 0]
    assert float(small.loss.detach()) <= 2e-6 + sum(abs(m) for m in small.margins) * 2
    assert margins or float(small.loss.detach()) > 0


def test_conflicting_gradients_serve_both():
    a, b = torch.tensor([1.0, 0.0, 0.2]), torch.tensor([-0.9, 0.5, 0.2])
    (g,) = conflict_averse([[a], [b]], 0.5)
    mean = (a + b) / 2
    worst = min(float(g @ a), float(g @ b))
    assert worst > min(float(mean @ a), float(mean @ b))
    # The best within the ball about the mean, by looking everywhere.
    directions = torch.randn(20000, 3, generator=torch.Generator().manual_seed(0))
    near = mean + 0.5 * mean.norm() * F.normalize(directions, dim=1)
    best = torch.minimum(near @ a, near @ b).max()
    assert worst >= float(best) - 1e-4
    assert (g - mean).norm() <= 0.5 * mean.norm() + 1e-5
    (same,) = conflict_averse([[a], [b]], 0.0)
    torch.testing.assert_close(same, mean)


@pytest.mark.parametrize(
    ("options", "says"),
    [
        ({"aggregate": "median"}, "aggregate must be one of"),
        ({"lambda_": -1}, "lambda_"),
        ({"hinge": "a"}, "hinge"),
        ({"top": 0}, "top"),
    ],
)
def test_bad_barriers(options, says):
    with pytest.raises(lf.MismatchError, match=says):
        KLBarrier(**options)


def test_bad_batches():
    model = llama()
    live = lf.attach(model, lf.LoRA(rank=4, seed=0))
    with pytest.raises(lf.MismatchError, match="needs 'rejected'"):
        steering_loss(model, live, {"chosen": pairs()["chosen"]})
    with pytest.raises(lf.MismatchError, match="above 0"):
        steering_loss(model, live, pairs(), c=-1.0)


# The strength


def moving(size=0.15):
    model = llama()
    live = lf.attach(model, lf.LoRA(rank=4, seed=0))
    g = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for p in live.parameters():
            p.add_(size * torch.randn(p.shape, generator=g))
    return model, live


@pytest.mark.parametrize("kl", [0.05, 0.3, 1.0])
@pytest.mark.parametrize("start", [1.0, 30.0, 1e-3, -1.0])
def test_the_strength_of_a_divergence_is_found(kl, start):
    _, live = moving()
    prompts = torch.randint(3, 40, (6, 5), generator=torch.Generator().manual_seed(2))
    found = lf.calibrate_c(live, prompts, kl, start=start, tokens=12)
    assert len(found.tried) <= 12
    assert found.c * start > 0
    # The text changes with c, so that f may jump over what was asked for: then it says so.
    assert found.converged == (abs(found.kl / kl - 1) <= 0.05)
    below = [abs(c) for c, value in found.tried if value <= kl * 1.05]
    above = [abs(c) for c, value in found.tried if value >= kl * 0.95]
    assert found.converged or (below and above)


def test_most_are_within_five_percent():
    hits = 0
    for seed in range(10):
        _, live = moving()
        prompts = torch.randint(3, 40, (8, 5), generator=torch.Generator().manual_seed(seed))
        hits += lf.calibrate_c(live, prompts, 0.5, tokens=16).converged
    assert hits >= 9


def test_a_canary_stops_it():
    _, live = moving()
    prompts = torch.randint(3, 40, (4, 5), generator=torch.Generator().manual_seed(2))
    seen = []

    def canary(texts):
        seen.append(texts.shape)
        return len(seen) < 3

    found = lf.calibrate_c(live, prompts, 5.0, start=1e-3, tokens=8, canary=canary)
    assert found.stopped
    assert abs(found.c) == max(abs(c) for c, _ in found.tried[:2])
    assert seen[0] == (4, 8)


def test_an_adapter_that_does_nothing():
    model = llama()
    live = lf.attach(model, lf.LoRA(rank=4, seed=0))
    with pytest.raises(lf.MismatchError, match="moves no token"):
        lf.calibrate_c(live, torch.ones(2, 3, dtype=torch.int64), 1.0, tokens=4)
    with pytest.raises(lf.MismatchError, match="kl must be above 0"):
        lf.calibrate_c(live, torch.ones(2, 3, dtype=torch.int64), 0.0)
    assert model.training is False
