"""What an adapter carries besides factors: named, refused with a reason, or put in its place."""

import math
import re

import pytest
import torch

import lorafold as lf
from lorafold.errors import MismatchError
from lorafold.parts import extra_kind, refusal_reason, scaling
from lorafold.placing import apply_extras

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


def state():
    embedding = torch.arange(12.0).reshape(4, 3)
    return {
        "embed.weight": embedding,
        "head.weight": embedding,  # tied
        "q.weight": torch.zeros(2, 3),
        "q.bias": torch.tensor([1.0, 2.0], dtype=torch.float16),
        "score.0.weight": torch.zeros(2, 2),
    }


def applied(extras, config):
    before, s = state(), state()
    s["head.weight"] = s["embed.weight"]
    kept = dict(s)
    unused = apply_extras(s, extras, config)
    for key, value in before.items():
        assert torch.equal(kept[key], value), f"{key} was written to"
    return s, unused


@pytest.mark.parametrize(
    "key",
    [
        P + "q.bias",
        "q.bias",
        P + "q.base_layer.bias",
        P + "q.modules_to_save.bias",
        P + "q.modules_to_save.default.bias",
    ],
)
def test_replaced_tensors_keep_the_dtype_of_the_base(key):
    s, unused = applied({key: torch.tensor([5.0, 6.0])}, {"bias": "all"})
    assert unused == []
    assert torch.equal(s["q.bias"], torch.tensor([5.0, 6.0], dtype=torch.float16))


def test_the_untrained_twin_of_a_saved_module_is_passed_over():
    extras = {P + "score.original_module.0.weight": torch.ones(2, 2)}
    s, unused = applied(extras, {"bias": "all"})
    assert unused == []
    assert torch.equal(s["score.0.weight"], torch.zeros(2, 2))


def test_lora_bias_is_added_with_its_scale_after_the_stored_bias():
    config = {"r": 4, "lora_alpha": 6, "rank_pattern": {"q": 1}, "use_rslora": True}
    extras = {P + "q.lora_B.bias": torch.tensor([1.0, 10.0])}
    s, _ = applied(extras, config)
    assert torch.equal(s["q.bias"].float(), torch.tensor([7.0, 62.0]))
    extras[P + "q.base_layer.bias"] = torch.tensor([100.0, 200.0])
    s, _ = applied(extras, config)
    assert torch.equal(s["q.bias"].float(), torch.tensor([106.0, 260.0]))


@pytest.mark.parametrize("given", [[3, 0], {"embed": [3, 0]}, {"x.embed": [1, 2], "embed": [3, 0]}])
def test_trained_rows_replace_rows_of_every_tied_weight(given):
    rows = torch.tensor([[-1.0, -2.0, -3.0], [-4.0, -5.0, -6.0]])
    extras = {P + "embed.token_adapter.trainable_tokens_delta": rows}
    s, unused = applied(extras, {"trainable_token_indices": given})
    assert unused == []
    assert s["head.weight"] is s["embed.weight"]
    assert torch.equal(s["embed.weight"][[3, 0]], rows)
    assert torch.equal(s["embed.weight"][1:3], state()["embed.weight"][1:3])


def test_what_has_no_place_is_returned():
    extras = {
        P + "k.bias": torch.ones(2),
        P + "k.lora_B.bias": torch.ones(2),
        P + "k.token_adapter.trainable_tokens_delta": torch.ones(1, 3),
        P + "q.lora_magnitude_vector": torch.ones(2),
        P + "c.lora_A.weight": torch.ones(2, 3, 3),
        "nonsense": torch.ones(1),
    }
    s, unused = applied(extras, {"trainable_token_indices": [0]})
    assert sorted(unused) == sorted(extras)
    assert s.keys() == state().keys()
    with pytest.raises(MismatchError, match="none of the adapter's 1 tensors has a place"):
        lf.Adapter({}, {"nonsense": torch.ones(1)}).apply_to(state())


@pytest.mark.parametrize(
    ("extras", "config", "match"),
    [
        ({P + "q.bias": torch.ones(3)}, {}, r"'base_model\.model\.q\.bias' has shape \(3,\)"),
        ({P + "embed.weight": torch.ones(5, 3)}, {}, "vocabulary"),
        (
            {P + "q.lora_B.bias": torch.ones(3)},
            {"r": 1, "lora_alpha": 1},
            r"q\.lora_B\.bias' has shape \(3,\)",
        ),
        (
            {P + "embed.token_adapter.trainable_tokens_delta": torch.ones(2, 3)},
            {"trainable_token_indices": [0]},
            "2 token rows.*names 1",
        ),
        (
            {P + "embed.token_adapter.trainable_tokens_delta": torch.ones(1, 3)},
            {"trainable_token_indices": [9]},
            "4 rows",
        ),
    ],
)
def test_what_does_not_fit_is_an_error(extras, config, match):
    with pytest.raises(MismatchError, match=match):
        apply_extras(state(), extras, config)


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
