"""Ground truth: the demo's base, and the same function in other coordinates."""

import copy

import pytest
import torch
from transformers import LlamaForCausalLM

import lorafold as lf
from lorafold.demo.model import data_dir

HEADS = 4


def plain_base():
    """The demo's base with the gains of its norms in the weights behind them, in float32."""
    model = LlamaForCausalLM.from_pretrained(data_dir() / "base", dtype=torch.float32).eval()
    with torch.no_grad():
        for layer in model.model.layers:
            for norm, readers in (
                (layer.input_layernorm, "qkv"),
                (layer.post_attention_layernorm, ("gate", "up")),
            ):
                for name in readers:
                    holder = layer.self_attn if len(name) == 1 else layer.mlp
                    getattr(holder, f"{name}_proj").weight.mul_(norm.weight)
                norm.weight.fill_(1)
        model.lm_head.weight.mul_(model.model.norm.weight)
        model.model.norm.weight.fill_(1)
    return model


def plain_adapter(name="sql_inserts"):
    """An adapter of the demo, made one of `plain_base`: gains into the columns of A."""
    raw = LlamaForCausalLM.from_pretrained(data_dir() / "base", dtype=torch.float32)
    adapter = lf.load(data_dir() / "adapters" / name)
    modules = {}
    for path, u in adapter.modules.items():
        layer = raw.model.layers[int(path.split(".")[2])]
        kind = path.split(".")[-1]
        gain = torch.ones(u.shape[1])
        if kind[0] in "qkv":
            gain = layer.input_layernorm.weight
        elif kind[0] in "gu":
            gain = layer.post_attention_layernorm.weight
        modules[path] = lf.LowRank((u.A.float() * gain).detach(), u.B.float(), u.scale)
    return lf.Adapter(modules)


def turns(model, seed=0, permute=False):
    """{(path, end): R}: what was x is x @ R in the other coordinates. Heads change places too."""
    g = torch.Generator().manual_seed(seed)

    def orthogonal(n):
        if permute:
            return torch.eye(n)[torch.randperm(n, generator=g)]
        return torch.linalg.qr(torch.randn(n, n, generator=g))[0]

    config = model.config
    width, inner = config.hidden_size, config.intermediate_size
    dim = width // HEADS
    residual = orthogonal(width)
    found = {"residual": residual}
    for k in range(config.num_hidden_layers):
        order = torch.randperm(HEADS, generator=g)
        moved = torch.kron(torch.eye(HEADS)[order], torch.eye(dim))
        # Within a head, queries and keys turn only in the planes that the rotary positions turn.
        angle = torch.rand(dim // 2, generator=g) * (0 if permute else 6)
        c, s = torch.diag(angle.cos()), torch.diag(angle.sin())
        plane = torch.cat([torch.cat([c, s], 1), torch.cat([-s, c], 1)])
        asked = torch.block_diag(*[plane] * HEADS) @ moved
        read = torch.block_diag(*[orthogonal(dim) for _ in range(HEADS)]) @ moved
        hidden = torch.eye(inner)[torch.randperm(inner, generator=g)]
        at = f"model.layers.{k}."
        for name, (into, out) in {
            "self_attn.q_proj": (residual, asked),
            "self_attn.k_proj": (residual, asked),
            "self_attn.v_proj": (residual, read),
            "self_attn.o_proj": (read, residual),
            "mlp.gate_proj": (residual, hidden),
            "mlp.up_proj": (residual, hidden),
            "mlp.down_proj": (hidden, residual),
        }.items():
            found[at + name] = into, out
    return found


def turned_base(model, turn):
    """The same function in other coordinates."""
    other = copy.deepcopy(model)
    with torch.no_grad():
        other.model.embed_tokens.weight.copy_(model.model.embed_tokens.weight @ turn["residual"])
        other.lm_head.weight.copy_(model.lm_head.weight @ turn["residual"])
        for path, (into, out) in ((p, r) for p, r in turn.items() if p != "residual"):
            weight = model.get_submodule(path).weight
            other.get_submodule(path).weight.copy_(out.T @ weight @ into)
    return other


def turned_adapter(adapter, turn):
    """The update that does there what the adapter does here."""
    return lf.Adapter(
        {
            path: lf.LowRank(u.A @ turn[path][0], turn[path][1].T @ u.B, u.scale)
            for path, u in adapter.modules.items()
        }
    )


@pytest.fixture(scope="session")
def ground_truth():
    """A function: what coordinates to (source, target, an adapter, what it is in the target)."""

    def made(seed=0, permute=False):
        source, adapter = plain_base(), plain_adapter()
        turn = turns(source, seed, permute)
        return source, turned_base(source, turn), adapter, turned_adapter(adapter, turn)

    return made
