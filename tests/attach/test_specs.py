"""Specifications: their defaults, and what they refuse."""

import re

import pytest
import torch

import lorafold as lf
from lorafold.errors import MismatchError


def test_defaults():
    lora, pissa = lf.LoRA(), lf.PiSSA()
    assert (lora.rank, lora.alpha, lora.dropout, lora.rslora, lora.init) == (
        16,
        32,
        0,
        False,
        "kaiming",
    )
    assert (pissa.rank, pissa.select, pissa.mean, pissa.std) == (256, None, 0, 0)
    for spec in (lora, pissa):
        assert spec.targets == ("all-linear",)
        assert spec.exclude == ("vision_tower", "lm_head")
        assert spec.layers == (0, 1)
        assert spec.dtype == torch.float32
        assert spec.seed is None


def test_one_target_or_several():
    pattern = re.compile("q")
    for given, meant in [("q", ("q",)), (["q", pattern], ("q", pattern)), (pattern, (pattern,))]:
        assert lf.LoRA(targets=given).targets == meant
        assert lf.PiSSA(exclude=given).exclude == meant
    assert lf.LoRA(exclude=None).exclude == ()


def test_scales():
    assert lf.LoRA(rank=8, alpha=16).scale_at("q") == 2
    assert lf.LoRA(rank=16, alpha=16, rslora=True).scale_at("q") == 4
    spec = lf.LoRA(rank=8, alpha=16, rank_pattern={"q": 4}, alpha_pattern={re.compile("k$"): 2})
    assert [spec.rank_at(p) for p in ("0.q", "0.k", "0.v")] == [4, 8, 8]
    assert [spec.scale_at(p) for p in ("0.q", "0.k", "0.v")] == [4, 0.25, 2]


LORA = [
    ({"rank": 0}, "rank must be a whole number of at least 1, found 0"),
    ({"rank": -2}, "rank must be a whole number"),
    ({"rank": 2.0}, "rank must be a whole number of at least 1, found 2.0"),
    ({"rank": True}, "rank must be a whole number"),
    ({"rank": "8"}, "rank must be a whole number"),
    ({"alpha": 0}, "alpha must be a positive number, found 0"),
    ({"alpha": -1}, "alpha must be a positive number"),
    ({"alpha": float("nan")}, "alpha must be a positive number, found nan"),
    ({"alpha": float("inf")}, "alpha must be a positive number, found inf"),
    ({"alpha": None}, "alpha must be a positive number"),
    ({"dropout": -0.1}, r"dropout must lie in \[0, 1\], found -0.1"),
    ({"dropout": 1.5}, r"dropout must lie in \[0, 1\], found 1.5"),
    ({"dropout": "no"}, r"dropout must lie in \[0, 1\]"),
    ({"dropout": float("nan")}, r"dropout must lie in \[0, 1\]"),
    ({"init": "gaussian"}, "init must be one of kaiming, orthogonal, pissa or pissa_niter_<n>"),
    ({"init": "pissa_niter_x"}, "found 'pissa_niter_x'"),
    ({"rank_pattern": {"q": 0}}, r"rank_pattern\['q'\] must be a whole number"),
    ({"alpha_pattern": {"q": -1}}, r"alpha_pattern\['q'\] must be a positive number"),
]
BOTH = [
    ({"targets": ()}, "targets= names no module"),
    ({"targets": None}, "targets= names no module"),
    ({"targets": [3]}, "targets must be module names or compiled patterns, found 3"),
    ({"targets": ""}, "targets must be module names or compiled patterns, found ''"),
    ({"exclude": [None]}, "exclude must be module names"),
    ({"layers": (0.5, 0.5)}, r"layers must be a band 0 ≤ lo < hi ≤ 1, found \(0.5, 0.5\)"),
    ({"layers": (0, 2)}, "layers must be a band"),
    ({"layers": (-0.1, 1)}, "layers must be a band"),
    ({"layers": 0.5}, "layers must be a band"),
    ({"layers": (0, 0.5, 1)}, "layers must be a band"),
    ({"dtype": torch.int8}, "dtype must be a floating point type, found torch.int8"),
    ({"dtype": "float32"}, "dtype must be a floating point type, found 'float32'"),
    ({"seed": 1.5}, "seed must be a whole number, found 1.5"),
]
PISSA = [
    ({"rank": 0}, "rank must be a whole number"),
    ({"select": "best"}, "select must be one of s_only, wanda, act_only, min_std, found 'best'"),
    ({"std": -1}, "mean and std must be finite, std ≥ 0"),
    ({"mean": float("nan")}, "mean and std must be finite"),
    ({"mean": "0"}, "mean and std must be finite"),
    ({"niter": 0}, "niter must be a whole number of at least 1"),
    ({"niter": 4, "select": "wanda"}, "niter= finds the leading directions only"),
]


@pytest.mark.parametrize(("options", "message"), LORA + BOTH)
def test_lora_out_of_range(options, message):
    with pytest.raises(MismatchError, match=message):
        lf.LoRA(**options)


@pytest.mark.parametrize(("options", "message"), PISSA + BOTH)
def test_pissa_out_of_range(options, message):
    with pytest.raises(MismatchError, match=message):
        lf.PiSSA(**options)


def test_in_range():
    for options in ({"dropout": 0}, {"dropout": 1}, {"rank": 1}, {"init": "pissa_niter_16"}):
        lf.LoRA(**options)
    assert lf.LoRA(init="pissa_niter_16").niter == 16
    assert lf.LoRA(init="pissa").niter is None
