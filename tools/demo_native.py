"""Adapters trained on a base of the demo in a bare loop, for their losses alone.

The weights of a step are W + s B A, formed anew; so the plain-PyTorch model runs as it is, in two
thirds of the time that PEFT's modules take. AdamW, a warm-up, a cosine to a tenth and bfloat16
autocast as in make_demo.py.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from lorafold.demo.model import Config, logits

State = Mapping[str, Tensor]
Factors = dict[str, tuple[Tensor, Tensor, float]]  # {weight's name: (A, B, scale)}


def fresh(state: State, recipe: Any) -> Factors:
    """What PEFT starts with: a random A, and a B of zeros."""
    g = torch.Generator().manual_seed(recipe.seed)
    rank = recipe.rank
    scale = recipe.alpha / (math.sqrt(rank) if recipe.rslora else rank)
    found = {}
    for name, W in state.items():
        if name.removesuffix(".weight").endswith(recipe.targets):
            A = (2 * torch.rand(rank, W.shape[1], generator=g) - 1) / math.sqrt(W.shape[1])
            found[name] = A, torch.zeros(W.shape[0], rank), scale
    return found


def with_factors(state: State, factors: Factors) -> dict[str, Tensor]:
    """W + ΔW."""
    changed = {name: state[name] + s * B @ A for name, (A, B, s) in factors.items()}
    return {**state, **changed}


def trained(
    config: Config,
    state: State,
    start: Factors,
    tokens: Tensor,
    recipe: Any,
    *,
    steps: int,
    windows: int,
) -> Factors:
    """The factors after some steps on windows at random places of a text; `start` stays."""
    factors = {
        name: (A.detach().clone().requires_grad_(), B.detach().clone().requires_grad_(), s)
        for name, (A, B, s) in start.items()
    }
    leaves = [t for A, B, _ in factors.values() for t in (A, B)]
    rate = recipe.learning_rate
    optimizer = torch.optim.AdamW(leaves, lr=rate, betas=(0.9, 0.95), weight_decay=0.01)
    warmup = max(1, steps // 20)
    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda k: _share(k, warmup, steps))
    context = config["max_position_embeddings"]
    within = torch.arange(context + 1)
    g = torch.Generator().manual_seed(recipe.seed)
    for _ in range(steps):
        places = torch.randint(len(tokens) - context - 1, (windows, 1), generator=g)
        batch = tokens[places + within]
        with torch.autocast("cpu", torch.bfloat16):
            scores = logits(config, with_factors(state, factors), batch[:, :-1])
        loss = F.cross_entropy(scores.float().flatten(0, 1), batch[:, 1:].flatten())
        torch.autograd.backward(loss)
        torch.nn.utils.clip_grad_norm_(leaves, 1.0)
        optimizer.step()
        optimizer.zero_grad()
        schedule.step()
    return {name: (A.detach(), B.detach(), s) for name, (A, B, s) in factors.items()}


def _share(step: int, warmup: int, steps: int) -> float:
    """Of the learning rate."""
    progress = max(0.0, (step - warmup) / max(1, steps - warmup))
    return min((step + 1) / warmup, 0.55 + 0.45 * math.cos(math.pi * progress))
