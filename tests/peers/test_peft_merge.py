"""Merging, against PEFT's `add_weighted_adapter` on the same adapters."""

from __future__ import annotations

import warnings

import pytest
import torch
from torch import nn

pytest.importorskip("peft")

from peft import LoraConfig, PeftModel, get_peft_model
from safetensors.torch import save_file

import lorafold as lf
from lorafold.merge import verify_merge
from lorafold.merge.algebra.core import Members

RANKS = {"a": 4, "b": 4, "c": 4}
NAMES = list(RANKS)
FULL = 24


class Small(nn.Module):
    def __init__(self):
        super().__init__()
        self.q = nn.Linear(40, 24, bias=False)
        self.conv = nn.Conv2d(5, 24, 3)
        self.emb = nn.Embedding(30, 40)

    def forward(self, tokens):
        x = self.emb(tokens)
        return self.q(x) + self.conv(x.reshape(-1, 5, 4, 10)).mean((2, 3))[:, None]


TARGETS = ["q", "conv", "emb"]
TOKENS = torch.tensor([[1, 2, 3, 4, 5]])


@pytest.fixture
def wrapped(tmp_path):
    """A PEFT model with three adapters of its own, α = r, and them as files."""

    def made(ranks=RANKS, alphas=RANKS, rslora=False):
        torch.manual_seed(0)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            model = None
            for n, r in ranks.items():
                config = LoraConfig(
                    r=r, lora_alpha=alphas[n], target_modules=TARGETS, use_rslora=rslora
                )
                if model is None:
                    model = get_peft_model(Small(), config, adapter_name=n)
                else:
                    model.add_adapter(n, config)
            with torch.no_grad():
                for key, p in model.named_parameters():
                    if "lora_" in key:
                        p.copy_(torch.randn_like(p) / 4)
            model.save_pretrained(tmp_path / "peft")
        return model.eval(), {n: tmp_path / "peft" / n for n in ranks}

    return made


def deltas(model, name):
    """{module: ΔW (out, in)} that PEFT has under a name."""
    base = model.base_model.model
    found = {}
    for path in TARGETS:
        D = getattr(base, path).get_delta_weight(name).detach()
        found[path] = D.flatten(1) if path == "conv" else D.T if path == "emb" else D
    return found


def assert_agree(merged, wanted, tolerance=1e-5):
    for path, D in wanted.items():
        found = merged[path].dense()
        assert torch.linalg.norm(found - D) < tolerance * torch.linalg.norm(D), path


def add(model, kind, weights, **options):
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        model.add_weighted_adapter(NAMES, weights, "merged", combination_type=kind, **options)
    return deltas(model, "merged")


@pytest.mark.parametrize("weights", [[1.0, 1.0, 1.0], [0.7, -0.3, 1.2]])
@pytest.mark.parametrize(
    ("kind", "method"), [("svd", "linear"), ("magnitude_prune_svd", "magnitude")]
)
def test_sums_are_peft_s(wrapped, kind, method, weights):
    model, paths = wrapped()
    more = {} if method == "linear" else {"density": 0.3}
    wanted = add(model, kind, weights, svd_rank=FULL, **more)
    assert_agree(lf.merge(paths, method, weights=weights, space="delta", rank=FULL, **more), wanted)


def test_cat_is_exact_as_linear_is(wrapped):
    model, paths = wrapped({"a": 2, "b": 8, "c": 3}, {"a": 8, "b": 8, "c": 1})
    wanted = add(model, "cat", [0.7, -0.3, 1.2])
    assert_agree(lf.merge(paths, weights=[0.7, -0.3, 1.2]), wanted)


def test_rslora_is_not_inflated_as_in_peft(wrapped):
    model, paths = wrapped({"a": 2, "b": 8, "c": 3}, {"a": 8, "b": 8, "c": 1}, rslora=True)
    wanted = {p: sum(deltas(model, n)[p] for n in NAMES) for p in TARGETS}
    merged = lf.merge(paths, weights=[1, 1, 1])
    assert_agree(merged, wanted)
    peft = add(model, "cat", [1.0, 1.0, 1.0])
    assert_agree(13**0.5 * merged, peft)  # the control: α/√r of what was α/r


@pytest.mark.parametrize("density", [0.2, 0.5])
def test_ties_at_equal_weights_is_peft_s(wrapped, density):
    model, paths = wrapped()
    wanted = add(model, "ties_svd", [1.0, 1.0, 1.0], svd_rank=FULL, density=density)
    assert_agree(lf.merge(paths, "ties", space="delta", rank=FULL, density=density), wanted)


@pytest.mark.parametrize(
    ("kind", "method"), [("dare_linear_svd", "dare"), ("dare_ties_svd", "dare_ties")]
)
def test_dare_with_peft_s_masks_is_peft_s(wrapped, monkeypatch, kind, method):
    model, paths = wrapped()
    bernoulli, drawn = torch.bernoulli, []

    def recorded(p):
        drawn.append(bernoulli(p))
        return drawn[-1]

    with monkeypatch.context() as m:
        m.setattr(torch, "bernoulli", recorded)
        wanted = add(model, kind, [1.0, 1.0, 1.0], svd_rank=FULL, density=0.6)
    # One layer after the other, in the model's order, for each adapter.
    masks = {}
    for path in TARGETS:
        for i in range(3):
            mask = drawn.pop(0)
            masks[path, i] = mask.T if path == "emb" else mask.flatten(1)

    def uniforms(self, i, shape, side=""):
        return 1 - masks[self.path, i]  # 0 is below any density, 1 is not

    monkeypatch.setattr(Members, "uniforms", uniforms)
    merged = lf.merge(paths, method, space="delta", rank=FULL, density=0.6, weights=[1, 1, 1])
    assert_agree(merged, wanted)


@pytest.mark.parametrize("weights", [[1.0, 1.0, 1.0], [0.7, -0.3, 1.2]])
@pytest.mark.parametrize(
    ("kind", "method"), [("linear", "linear"), ("magnitude_prune", "magnitude"), ("ties", "ties")]
)
def test_factors_are_peft_s(wrapped, kind, method, weights):
    if method == "ties":
        weights = [1.0, 1.0, 1.0]  # PEFT elects signs, and divides, without weights
    alphas = RANKS if method == "ties" else {"a": 8, "b": 2, "c": 4}
    model, paths = wrapped(alphas=alphas)
    more = {} if method == "linear" else {"density": 0.5}
    wanted = add(model, kind, weights, **more)
    assert_agree(lf.merge(paths, method, weights=weights, space="factors", **more), wanted)


def test_peft_s_linear_is_not_the_sum(wrapped):
    """The control: averaging A and B apart has cross terms."""
    model, paths = wrapped()
    wanted = add(model, "linear", [0.5, 0.5, 0.0])
    exact = lf.merge(paths, weights=[0.5, 0.5, 0.0])
    apart = torch.linalg.norm(exact["q"].dense() - wanted["q"]) / torch.linalg.norm(
        exact["q"].dense()
    )
    assert apart > 0.3


@pytest.mark.parametrize("method", ["linear", "ties", "tsv", "iso_c", "knots", "lego", "ctm"])
@pytest.mark.parametrize("pad", [False, True])
def test_what_is_saved_runs_in_peft_with_the_same_outputs(wrapped, tmp_path, method, pad):
    model, paths = wrapped({"a": 2, "b": 8, "c": 3}, {"a": 8, "b": 8, "c": 1}, rslora=True)
    merged = lf.merge(paths, method)
    lf.save(merged, tmp_path / "out", pad=pad)
    base = model.unload()
    plain = base(TOKENS).double()
    state = merged.apply_to({k: v.double() for k, v in base.state_dict().items()})
    wanted = torch.func.functional_call(base.double(), state, (TOKENS,))
    reloaded = PeftModel.from_pretrained(base.float(), tmp_path / "out").eval()
    assert torch.allclose(reloaded(TOKENS).double(), wanted, rtol=1e-4, atol=1e-4)
    assert not torch.allclose(wanted, plain, atol=1e-2)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_what_peft_merged_is_found_right(wrapped, tmp_path, dtype):
    model, paths = wrapped({"a": 4, "b": 4, "c": 4}, {"a": 16, "b": 4, "c": 2})
    (tmp_path / "base").mkdir()
    (tmp_path / "merged").mkdir()
    base = {
        k.replace(".base_layer", ""): v.to(dtype).contiguous().clone()
        for k, v in model.base_model.model.state_dict().items()
        if "lora_" not in k
    }
    save_file(base, tmp_path / "base" / "model.safetensors")
    model = model.to(dtype)
    model.set_adapter("a")
    merged = model.merge_and_unload().state_dict()
    whole = {k: v.contiguous().clone() for k, v in merged.items()}
    save_file(whole, tmp_path / "merged" / "model.safetensors")
    adapter = lf.load(paths["a"])
    assert verify_merge(tmp_path / "base", adapter, tmp_path / "merged").ok
    half = verify_merge(tmp_path / "base", 0.5 * adapter, tmp_path / "merged")
    assert half.counts == {"wrong strength": 3}
    assert "√r too much" in half.says  # r = 4
    other = verify_merge(tmp_path / "base", lf.load(paths["b"]), tmp_path / "merged")
    assert other.counts == {"other change": 3}
