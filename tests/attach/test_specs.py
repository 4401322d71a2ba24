"""Specifications: their defaults, and what they refuse."""

import copy
import dataclasses
import json
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


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"r": 8}, "LoRA has no option r=; it is rank= here"),
        ({"lora_alpha": 8}, "it is alpha= here"),
        ({"target_modules": ["q"]}, "it is targets= here"),
        ({"exclude_modules": ["q"]}, "it is exclude= here"),
        ({"use_rslora": True}, "it is rslora= here"),
        ({"lora_dropout": 0.1}, "it is dropout= here"),
        ({"init_lora_weights": "pissa"}, "it is init= here"),
        ({"tragets": ["q"]}, "did you mean 'targets'"),
    ],
)
def test_words_of_others_are_told_with_ours(options, message):
    with pytest.raises(MismatchError, match=message):
        lf.LoRA(**options)


def test_a_kind_tells_its_own_words_only():
    with pytest.raises(MismatchError, match=r"PiSSA has no option lora_alpha=; there are"):
        lf.PiSSA(lora_alpha=3)
    with pytest.raises(MismatchError, match=r"found 'cho_rej_min_std'; it is 'min_std' here"):
        lf.PiSSA(select="cho_rej_min_std")


SPECS = [
    lf.LoRA(),
    lf.LoRA(
        rank=4,
        targets=["q", re.compile("v$", re.IGNORECASE)],
        exclude=(),
        layers=(0.5, 1),
        dtype=torch.bfloat16,
        seed=1,
        nested=(1, 2),
        rank_pattern={"q": 2, re.compile("k|v"): 3},
        alpha_pattern={"q": 0.5},
        modules_to_save=["head"],
    ),
    lf.PiSSA(rank=3, select="wanda", niter=None, mean=0.1, std=0.2, targets="q"),
]


@pytest.mark.parametrize("spec", SPECS)
def test_records_give_the_same_back(spec):
    record = json.loads(json.dumps(spec.to_dict()))
    assert type(spec).from_dict(record) == spec
    assert record["kind"] == type(spec).__name__
    for copied in (copy.copy(spec), copy.deepcopy(spec), dataclasses.replace(spec)):
        assert copied == spec


def test_records_of_loadings_name_their_library(tmp_path):
    u = lf.LowRank(torch.ones(2, 4), torch.ones(3, 2))
    lib = lf.fold({"a": lf.Adapter({"q": u}), "b": lf.Adapter({"q": 2 * u})}, tmp_path / "lib")
    spec = lf.Loadings(lib, start="a", extra=2)
    record = json.loads(json.dumps(spec.to_dict()))
    assert record["library"] == str(tmp_path / "lib")
    again = lf.Loadings.from_dict(record)
    assert again.library.names == lib.names
    assert dataclasses.replace(again, library=lib) == spec
    with pytest.raises(MismatchError, match="save the library to a folder"):
        lf.Loadings(lf.fold([lf.Adapter({"q": u})])).to_dict()
    with pytest.raises(MismatchError, match="the record is of a Loadings, not of a LoRA"):
        lf.LoRA.from_dict(record)
    with pytest.raises(MismatchError, match="has no option extras="):
        lf.Loadings.from_dict({**record, "extras": 1})
    with pytest.raises(MismatchError, match=r"calibration= can't be written as JSON"):
        lf.PiSSA(calibration={"q": torch.ones(2, 2)}).to_dict()


def test_in_range():
    for options in ({"dropout": 0}, {"dropout": 1}, {"rank": 1}, {"init": "pissa_niter_16"}):
        lf.LoRA(**options)
    assert lf.LoRA(init="pissa_niter_16").niter == 16
    assert lf.LoRA(init="pissa").niter is None
