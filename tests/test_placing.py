"""Where an adapter's parts go in a base: names, layouts, fit, and the weight with them."""

from __future__ import annotations

import dataclasses

import pytest
import torch

import lorafold as lf
from lorafold.errors import MismatchError
from lorafold.naming import Base
from lorafold.parts import Layout, Parts
from lorafold.placing import NO_WEIGHT, NOT_THERE, OTHER_FORM, placed
from lorafold.placing import applied as put

P = "base_model.model."


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
    adapter = lf.Adapter({}, extras, config)
    plan = placed(adapter.parts, Base.of_state(s, adapter.parts.names()))
    for misfit in plan.wrong.values():
        raise MismatchError(misfit.says)
    result = put(plan, s, adapter.value_at)
    for key, value in before.items():
        assert torch.equal(kept[key], value), f"{key} was written to"
    return result, list(plan.unplaced)


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
        applied(extras, config)


# Names


def base_of(*names, asked=()):
    return Base(dict.fromkeys(names, ((4, 4), torch.float32)), asked)


def found(base, name):
    held = base.find(name)
    return None if held is None else [piece.key for piece in held.pieces]


Q = "{}layers.{}.self_attn.q_proj.weight"


@pytest.mark.parametrize(
    ("mine", "theirs"),
    [
        ("", ""),
        ("", "model."),
        ("model.", ""),
        ("model.language_model.", "model."),
        ("model.language_model.", "language_model.model."),
        ("model.vision_tower.", "vision_tower.vision_model."),
        ("model.language_model.", "model.llm."),
        ("model.", "_orig_mod.model."),
        ("model.", "module._orig_mod."),
        ("base.", "base._fsdp_wrapped_module."),
    ],
)
def test_prefixes_that_stand_for_each_other(mine, theirs):
    names = [Q.format(theirs, n) for n in range(2)]
    base = base_of(*names)
    for n in range(2):
        assert found(base, Q.format(mine, n)) == [names[n]]
    assert base.find(Q.format(mine, 7)) is None
    assert base.alike(Q.format(mine, 0)) == [Q.format(mine, n) for n in range(2)]


@pytest.mark.parametrize(
    ("mine", "theirs"),
    [
        ("encoder.", "decoder."),
        ("model.vision_tower.", "language_model."),
        ("model.vision_model.", "model."),
        ("model.", "model.vision_model."),
        ("model.dit.", "paligemma.model.language_model."),
        ("model.audio.encoder.", "perception.encoder."),
        ("model.language_model.encoder.", "vision_model.encoder."),
        ("a.1.", "a.2."),
    ],
)
def test_prefixes_that_do_not(mine, theirs):
    assert base_of(Q.format(theirs, 0)).find(Q.format(mine, 0)) is None


def test_two_prefixes_as_good_as_each_other_are_none():
    both = [Q.format("encoder.", 0), Q.format("decoder.", 0)]
    assert base_of(*both).find(Q.format("", 0)) is None
    assert found(base_of(*both), both[0]) == both[:1]


def test_what_else_the_adapter_has_decides_between_prefixes():
    """The text model's adapter, on a base whose vision tower has layers of the same names."""
    mlp = "{}layers.0.mlp.gate_proj.weight"
    names = [Q.format("vision.", 0), Q.format("text.", 0), mlp.format("text.")]
    asked = [Q.format("", 0), mlp.format("")]
    assert found(base_of(*names, asked=asked), asked[0]) == [names[1]]
    assert base_of(*names).find(asked[0]) is None


def test_two_kinds_of_the_adapter_are_never_one_of_the_base():
    asked = [Q.format("model.", 0), Q.format("model.language_model.", 0)]
    base = base_of(asked[0], asked=asked)
    assert found(base, asked[0]) == asked[:1]
    assert base.find(asked[1]) is None
    towers = [Q.format("vision.", 0), Q.format("text.", 0)]
    base = base_of(Q.format("", 0), asked=towers)
    assert sum(base.find(name) is not None for name in towers) < 2


# Layouts: what is one tensor in memory and several on the disk, or the other way round


def experts(count=3, inner=4, hidden=2, names=("gate_proj", "up_proj", "down_proj"), owner="mlp"):
    """{key: tensor} of experts one by one, and the two parameters that they are in memory."""
    g = torch.Generator().manual_seed(0)
    one_by_one = {}
    for e in range(count):
        for name in names[:2]:
            one_by_one[f"h.0.{owner}.experts.{e}.{name}.weight"] = torch.randn(
                hidden, inner, generator=g
            )
        down = f"h.0.{owner}.experts.{e}.{names[2]}.weight"
        one_by_one[down] = torch.randn(inner, hidden, generator=g)
    fused = {
        "h.0.mlp.experts.gate_up_proj": torch.stack(
            [
                torch.cat([one_by_one[f"h.0.{owner}.experts.{e}.{n}.weight"] for n in names[:2]])
                for e in range(count)
            ]
        ),
        "h.0.mlp.experts.down_proj": torch.stack(
            [one_by_one[f"h.0.{owner}.experts.{e}.{names[2]}.weight"] for e in range(count)]
        ),
    }
    return one_by_one, fused


def expert_adapter(fused, *, transposed, skip=()):
    """Updates of all experts, in either orientation; `skip` are left alone."""
    modules, layouts = {}, {}
    for name, W in fused.items():
        for e in range(len(W)):
            out, inner = W.shape[1:][:: -1 if transposed else 1]
            path = f"{name}[{e}]"
            if e in skip:
                continue
            modules[path] = lf.LowRank(torch.randn(2, inner), torch.randn(out, 2), 0.5)
            layouts[path] = Layout("expert", expert=(e, len(W)), transposed=transposed)
    return lf.Adapter(modules, layouts=layouts)


@pytest.mark.parametrize("transposed", [False, True])
@pytest.mark.parametrize("hidden", [2, 4])  # 4: the down projections are square
@pytest.mark.parametrize(
    ("names", "owner"),
    [
        (("gate_proj", "up_proj", "down_proj"), "mlp"),
        (("w1", "w3", "w2"), "mlp"),
        (("w1", "w3", "w2"), "block_sparse_moe"),
    ],
)
def test_experts_that_lie_one_by_one(transposed, hidden, names, owner, dense):
    torch.manual_seed(0)
    one_by_one, fused = experts(hidden=hidden, names=names, owner=owner)
    adapter = expert_adapter(fused, transposed=transposed, skip=(1,))
    result = adapter.apply_to(one_by_one)
    assert list(result) == list(one_by_one)
    for name, W in fused.items():
        exact = W.double()
        for path, u in adapter.items():
            if path.startswith(name):
                delta = dense(u)
                exact[int(path[-2])] += delta.T if transposed else delta
        leaves = names[2:] if name.endswith("down_proj") else names[:2]
        for e in range(len(W)):
            there = [result[f"h.0.{owner}.experts.{e}.{leaf}.weight"] for leaf in leaves]
            torch.testing.assert_close(torch.cat(there).double(), exact[e], rtol=0, atol=1e-5)
        assert all(
            result[key] is one_by_one[key] for key in one_by_one if ".experts.1." in key
        )  # the expert without an update
    # As the same update of the fused parameters.
    whole = adapter.apply_to(fused)
    joined = torch.stack(
        [
            torch.cat([result[f"h.0.{owner}.experts.{e}.{n}.weight"] for n in names[:2]])
            for e in range(3)
        ]
    )
    torch.testing.assert_close(whole["h.0.mlp.experts.gate_up_proj"], joined)


def test_half_an_expert_or_another_number_of_them_has_no_place():
    one_by_one, fused = experts()
    adapter = expert_adapter(fused, transposed=False)
    parts = adapter.parts
    fewer = {k: t for k, t in one_by_one.items() if ".experts.2." not in k}
    plan = placed(parts, Base.of_state(fewer, parts.names()))
    assert plan.wrong.keys() == set(adapter)
    half = {k: t for k, t in one_by_one.items() if "gate_proj" not in k}
    plan = placed(parts, Base.of_state(half, parts.names()))
    assert {why for part, why in plan.unplaced.items()} == {OTHER_FORM}
    assert {spot.part.partition("[")[0] for spot in plan.spots} == {"h.0.mlp.experts.down_proj"}


@pytest.mark.parametrize("fused", ["qkv", "qkv_proj", "Wqkv", "in_proj"])
def test_layers_that_lie_in_one_tensor(fused, dense):
    torch.manual_seed(0)
    state = {f"h.0.{fused}.weight": torch.randn(12, 3), f"h.0.{fused}.bias": torch.randn(12)}
    names = ["q_proj", "k_proj", "v_proj"]
    modules = {f"h.0.{n}": lf.LowRank(torch.randn(2, 3), torch.randn(4, 2)) for n in names[1:]}
    bias = {f"{P}h.0.q_proj.bias": torch.ones(4)}
    extra = {f"{P}h.0.v_proj.lora_B.bias": torch.ones(4)}
    config = {"bias": "all", "r": 2, "lora_alpha": 6}
    result = lf.Adapter(modules, bias | extra, config).apply_to(state)
    exact = torch.zeros(12, 3, dtype=torch.float64)
    exact[4:8], exact[8:] = (dense(u) for u in modules.values())
    change = result[f"h.0.{fused}.weight"].double() - state[f"h.0.{fused}.weight"].double()
    torch.testing.assert_close(change, exact, rtol=0, atol=1e-5)
    wanted = state[f"h.0.{fused}.bias"].clone()
    wanted[:4], wanted[8:] = 1, wanted[8:] + 3
    torch.testing.assert_close(result[f"h.0.{fused}.bias"], wanted)
    del modules["h.0.k_proj"]
    wide = {"h.0.q_proj": lf.LowRank(torch.randn(2, 3), torch.randn(5, 2)), **modules}
    with pytest.raises(MismatchError, match=r"'h\.0\.q_proj\.weight' has shape \(4, 3\)"):
        lf.Adapter(wide).apply_to(state)


# Tied weights


def embedding_update(rows, width):
    return lf.LowRank(torch.randn(1, rows), torch.randn(width, 1))


@pytest.mark.parametrize("what", ["embedding", "head", "both"])
@pytest.mark.parametrize("there", [True, False])
def test_a_tied_head_and_the_embedding_part_where_they_differ(what, there, dense):
    torch.manual_seed(0)
    W = torch.randn(9, 4)
    state = {"embed_tokens.weight": W} | ({"lm_head.weight": W} if there else {})
    modules, layouts, exact = {}, {}, {key: W.double() for key in state}
    if what != "head":
        modules["embed_tokens"] = u = embedding_update(9, 4)
        layouts["embed_tokens"] = Layout("embedding")
        exact["embed_tokens.weight"] = W.double() + dense(u).T
    if what != "embedding":
        modules["lm_head"] = v = embedding_update(4, 9)
        exact["lm_head.weight"] = W.double() + dense(v)
    result = lf.Adapter(modules, layouts=layouts).apply_to(state)
    assert result.keys() == exact.keys()
    for key, t in exact.items():
        torch.testing.assert_close(result[key].double(), t, rtol=0, atol=1e-5)
    assert torch.equal(W, state["embed_tokens.weight"])


def test_a_stored_base_weight_is_the_one_of_both():
    """As it is where PEFT loads it: into the parameter that they share."""
    W, new = torch.randn(9, 4), torch.randn(9, 4)
    tied = {"embed_tokens.weight": W, "lm_head.weight": W}
    extras = {f"{P}embed_tokens.base_layer.weight": new}
    result = lf.Adapter({}, extras).apply_to(tied)
    assert torch.equal(result["lm_head.weight"], new)
    assert result["lm_head.weight"] is result["embed_tokens.weight"]
    alone = lf.Adapter({}, extras).apply_to(tied | {"lm_head.weight": W.clone()})
    assert torch.equal(alone["lm_head.weight"], W)
    update = {"lm_head": embedding_update(4, 9)}
    result = lf.Adapter(update, extras).apply_to(tied)
    wanted = new + update["lm_head"].dense()
    torch.testing.assert_close(result["lm_head.weight"], wanted)
    assert torch.equal(result["embed_tokens.weight"], new)


# What has no place, and why


def test_reasons():
    parts = Parts(
        {"a.q": (4, 4), "gone": (4, 4)},
        {f"{P}a.q.lora_magnitude_vector": (4,), f"{P}a.q.bias": (4,), "x.lora_velora_embed": (1,)},
        {"bias": "all"},
        {},
    )
    plan = placed(parts, base_of("a.q.weight_v", "a.q.weight_g"))
    assert plan.unplaced == {
        "a.q": OTHER_FORM,
        "gone": NOT_THERE,
        f"{P}a.q.lora_magnitude_vector": NO_WEIGHT,
        f"{P}a.q.bias": NOT_THERE,
    }


def test_half_precision_rounds_once_from_float32(make_adapter, dense):
    adapter = make_adapter({"a.q": (6, 4)}, 2)
    W = torch.randn(6, 4).bfloat16()
    exact = (W.double() + dense(adapter["a.q"])).float()
    found = adapter.apply_to({"a.q.weight": W})["a.q.weight"]
    assert found.dtype == torch.bfloat16
    assert (found.float() - exact).abs().max() <= 2**-8 * exact.abs().max()
    other = dataclasses.replace(adapter, base_model="x").apply_to({"a.q.weight": W})
    assert torch.equal(other["a.q.weight"], found)


def test_a_state_dict_is_looked_at_once_however_many_tensors_change(monkeypatch):
    n, seen = 40, 0
    u = lf.LowRank(torch.ones(1, 3), torch.ones(2, 1))
    adapter = lf.Adapter({f"layers.{i}.q": u for i in range(n)})
    state = {f"layers.{i}.q.weight": torch.zeros(2, 3) for i in range(n)}
    state["layers.0.k.weight"] = state["layers.0.q.weight"]
    real = torch.Tensor.data_ptr

    def counted(self):
        nonlocal seen
        seen += 1
        return real(self)

    monkeypatch.setattr(torch.Tensor, "data_ptr", counted)
    adapter.apply_to(state)
    assert n <= seen <= 2 * n
    square = torch.arange(4.0).reshape(2, 2)
    views = Base.of_state({"a": square, "b": square.T, "c": square.view(2, 2), "d": square[:1]})
    assert views.ties("a") == ("a", "c")
    assert views.ties("b") == ("b",)  # the same memory, but other numbers
    meta = torch.zeros(2, device="meta")
    assert Base.of_state({"a": meta, "b": torch.zeros(2, device="meta")}).ties("a") == ("a",)
    assert Base.of_state({"a": meta, "b": meta}).ties("a") == ("a", "b")
