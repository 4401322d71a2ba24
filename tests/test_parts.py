"""What an adapter carries besides factors: named, or refused with a reason."""

import math
import re
import sys

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

import lorafold as lf
from lorafold.errors import MismatchError
from lorafold.parts import LINEAR, Layout, extra_kind, plain_name, refusal_reason, scaling

P = "base_model.model."


@pytest.mark.parametrize(
    ("key", "config", "kind"),
    [
        ("q.lora_magnitude_vector", {}, "dora magnitude"),
        ("q.lora_magnitude_vector.default.weight", {}, "dora magnitude"),
        ("q.lora_B.bias", {}, "lora bias"),
        ("q.lora_B.default.bias", {"bias": "all"}, "lora bias"),
        ("q.base_layer.bias", {"bias": "lora_only"}, "bias"),
        ("norm.bias", {"bias": "all"}, "bias"),
        ("norm.bias", {"bias": "none"}, "unknown"),
        ("score.weight", {"modules_to_save": ["score"]}, "saved module"),
        ("model.score.0.bias", {"modules_to_save": ["score"], "bias": "all"}, "saved module"),
        ("score.weight", {"modules_to_save": None}, "unknown"),
        ("score.weight", {"modules_to_save": ["classifier"]}, "unknown"),
        ("embed_tokens.token_adapter.trainable_tokens_delta", {}, "trained tokens"),
        ("conv.lora_A.weight", {}, "grouped convolution"),
        ("q.lora_A.weight", {"use_bdlora": {"nblocks": 2}}, "unknown"),
        ("q.base_layer.weight", {}, "base weight"),
        ("model.embed_tokens.weight", {}, "base weight"),
        ("q.lora_velora_embed", {}, "training state"),
        ("q.lora_monteclora_sampler.std_prior", {}, "training state"),
        ("q.router", {}, "unknown"),
    ],
)
def test_kinds(key, config, kind):
    assert extra_kind(key, config) == extra_kind(P + key, config) == kind


@pytest.mark.parametrize(
    ("config", "keys", "words"),
    [
        ({"use_dora": True}, [], "DoRA.*merge_and_unload"),
        ({}, [P + "q.lora_magnitude_vector"], "DoRA"),
        ({"init_lora_weights": "pissa"}, [], "PiSSA.*path_initial_model_for_weight_conversion"),
        ({"init_lora_weights": "pissa_niter_16"}, [], "PiSSA"),
        ({"init_lora_weights": "OLoRA"}, [], "OLoRA"),
        ({"init_lora_weights": "corda"}, [], "CorDA"),
        ({"init_lora_weights": "lora_ga"}, [], "LoRA-GA"),
        ({"init_lora_weights": "loftq"}, [], "LoftQ.*quantised base"),
        ({"use_qalora": True}, [], "QA-LoRA"),
        ({"alora_invocation_tokens": [1, 2]}, [], "aLoRA"),
        ({"arrow_config": {"top_k": 2}}, [], "Arrow"),
        ({"use_bdlora": {"nblocks": 2}}, [], "BD-LoRA"),
        ({"kasa_config": {"beta": 0.1}}, [], "KaSA"),
        ({}, [P + "conv.lora_B.weight"], "grouped convolution"),
    ],
)
def test_refusals_say_why_and_what_to_do(config, keys, words):

    reason = refusal_reason(config, keys)
    assert re.search(words, reason)
    assert "\n" not in reason
    assert ": " in reason  # the remedy follows
    u = lf.LowRank(torch.ones(1, 2), torch.ones(2, 1))
    adapter = lf.Adapter({"q": u}, {k: torch.ones(1) for k in keys}, config)
    assert adapter.refusal == reason
    with pytest.raises(lf.RefusedError, match=words):
        adapter.norm()


@pytest.mark.parametrize(
    "config",
    [
        {},
        {"init_lora_weights": True},
        {"init_lora_weights": False},
        *({"init_lora_weights": init} for init in ("gaussian", "eva", "orthogonal", "mica")),
        {"use_dora": False, "use_qalora": False, "use_bdlora": None, "kasa_config": None},
        {"corda_config": {}, "alora_invocation_tokens": None},
        {"velora_config": {"scale": 1.0}, "monteclora_config": {"num_samples": 8}},
        {"layer_replication": [[0, 4], [2, 5]], "use_rslora": True},
    ],
)
def test_what_leaves_the_base_alone_is_not_refused(config):
    assert refusal_reason(config, [P + "score.weight", P + "q.lora_B.bias"]) is None


def test_scaling():
    config = {"r": 4, "lora_alpha": 6}
    assert scaling(config, "q") == (4, 1.5)
    assert scaling({**config, "use_rslora": True}, "q") == (4, 6 / math.sqrt(4))
    with pytest.raises(MismatchError, match="r in the config must be a number"):
        scaling({"lora_alpha": 6}, "q")


def test_biases_scaled_differently_do_not_mix(make_adapter):
    key = P + "q.lora_B.bias"
    with_bias = make_adapter(
        {"q": (2, 3)}, extras={key: torch.ones(2)}, config={"r": 4, "lora_alpha": 4}
    )
    other = make_adapter({"q": (2, 3)}, config={"r": 4, "lora_alpha": 8})
    alike = make_adapter({"q": (2, 3)}, config={"r": 2, "lora_alpha": 2})
    with pytest.raises(MismatchError, match="scaled by α/r"):
        other + with_bias
    assert set((alike + with_bias).extras) == {key}


@pytest.mark.parametrize(
    ("layout", "path", "weight", "owner", "group"),
    [
        (LINEAR, "a.q", "a.q.weight", "a.q", "a.q"),
        (LINEAR, "", "weight", "", ""),
        (Layout("linear", parameter="in_proj_weight"), "a", "a.in_proj_weight", "a", "a"),
        (
            Layout("linear", stem="a.base_layer.out_proj"),
            "a.out_proj",
            "a.out_proj.weight",
            "a.out_proj",
            "a",
        ),
        (
            Layout("expert", expert=(2, 4)),
            "a.experts.down[2]",
            "a.experts.down",
            "a.experts",
            "a.experts.down",
        ),
        (Layout("expert", expert=(0, 1)), "a.down", "a.down", "a", "a.down"),
    ],
)
def test_a_layout_says_where_its_weight_is(layout, path, weight, owner, group):
    assert layout.weight_name(path) == weight
    assert (layout.owner(path), layout.group(path)) == (owner, group)


@pytest.mark.parametrize(
    ("layout", "shapes"),
    [
        (LINEAR, [(2, 3), (3, 2)]),
        (Layout("embedding"), [(3, 2)]),
        (Layout("conv", kernel=(3, 1)), [(2, 3, 1)]),
        (Layout("expert", expert=(1, 4)), [(4, 2, 3), (4, 3, 2)]),
        (Layout("expert", expert=(0, 1)), [(1, 2, 3), (1, 3, 2), (2, 3), (3, 2)]),
    ],
)
def test_shapes_that_an_update_fits(layout, shapes):
    assert layout.shapes(2, 3) == shapes


@pytest.mark.parametrize(
    ("name", "plain"),
    [
        ("_orig_mod.q.weight", "q.weight"),
        ("module._orig_mod.model.layers.0._orig_mod.q", "model.layers.0.q"),
        ("_fsdp_wrapped_module.h._checkpoint_wrapped_module.q", "h.q"),
        ("module.module.q", "q"),
        ("model.module.q", "model.module.q"),  # a child that is called so
        ("module", "module"),
        ("", ""),
    ],
)
def test_names_without_what_wrapped_the_model(name, plain):
    assert plain_name(name) == plain


PATHS = ["q", "a.q", "b.a.q", "aq", "a_q", "x.a.b.q", "layers.0.q", "layers.10.q", "k.q_proj"]
KEYS = [*PATHS, *("^" + re.escape(p) for p in PATHS), "a.", ".q", r"a\.q", "(a|b).*q", "l.*0.q", ""]


@given(st.permutations(KEYS), st.integers(1, len(KEYS)))
def test_the_first_key_that_matches_counts(keys, count):
    patterns = {key: k + 1 for k, key in enumerate(keys[:count])}
    for path in [*PATHS, "a.q.", "axq"]:
        wanted = next((v for k, v in patterns.items() if re.match(rf"(.*\.)?({k})$", path)), 99)
        assert scaling({"r": 99, "lora_alpha": 1, "rank_pattern": patterns}, path)[0] == wanted


@pytest.mark.parametrize("escaped", [True, False])
def test_patterns_for_every_module_take_a_time_in_proportion(escaped):
    def calls(count):
        paths = [f"model.layers.{i // 7}.m.{'abcdefg'[i % 7]}_proj" for i in range(count)]
        keys = ["^" + re.escape(p) if escaped else p for p in paths]
        config = {"r": 1, "lora_alpha": 1, "rank_pattern": dict.fromkeys(keys, 3)}
        made = 0

        def count_call(frame, event, arg):
            nonlocal made
            made += event in ("call", "c_call")

        sys.setprofile(count_call)
        try:
            assert all(scaling(config, path)[0] == 3 for path in paths)
        finally:
            sys.setprofile(None)
        return made

    few = calls(140)
    assert calls(560) < 5 * few
