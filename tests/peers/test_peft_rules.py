"""PEFT's matching rules, against PEFT, on names that nobody would choose."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

pytest.importorskip("peft")

from peft import LoraConfig
from peft.tuners.tuners_utils import check_target_module_exists
from peft.utils.other import get_pattern_key

from lorafold.files.peft_targets import finds_module
from lorafold.parts import scaling

names = st.lists(
    st.sampled_from(["q", "v", "0", "1", "12", "layers", "xq"]), min_size=1, max_size=4
)
paths = names.map(".".join)
patterns = st.one_of(paths, paths.map("^{}".format), st.sampled_from(["q|v", r".*\.q", "(q|0).*"]))


@given(path=paths, keys=st.lists(patterns, max_size=3, unique=True))
def test_pattern_keys_match_as_in_peft(path, keys):
    ranks = {key: i for i, key in enumerate(keys, start=2)}
    expected = ranks.get(get_pattern_key(ranks.keys(), path), 99)
    config = {"r": 99, "lora_alpha": 99, "rank_pattern": ranks, "alpha_pattern": ranks}
    assert scaling(config, path) == (expected, 1.0)


@given(
    path=paths,
    targets=st.one_of(st.lists(paths, max_size=3), patterns),
    excluded=st.one_of(st.none(), st.lists(paths, max_size=2), patterns),
    saved=st.one_of(st.none(), st.lists(paths, max_size=2)),
    layers=st.one_of(st.none(), st.integers(0, 2), st.lists(st.integers(0, 12), max_size=2)),
    stack=st.one_of(st.none(), st.just("layers"), st.lists(st.just("layers"), max_size=1)),
)
def test_targets_match_as_in_peft(path, targets, excluded, saved, layers, stack):
    if isinstance(targets, str) or layers is None:
        layers = stack = None  # PEFT takes these with lists only
    config = {
        "target_modules": targets,
        "exclude_modules": excluded,
        "modules_to_save": saved,
        "layers_to_transform": layers,
        "layers_pattern": stack,
    }
    expected = check_target_module_exists(LoraConfig(**config), path)
    assert finds_module(config, path) == bool(expected)
