"""Merging into the weights, and back to the bit: never by subtraction."""

import math

import pytest
import torch
import torch.nn.functional as F
from safetensors.torch import load_file
from torch import nn

import lorafold as lf
from lorafold.errors import MismatchError, UnknownNameError

TIGHT = {"rtol": 1e-10, "atol": 1e-10}
DTYPES = [torch.float32, torch.bfloat16, torch.float16, torch.float64]


@pytest.mark.parametrize("dtype", DTYPES)
def test_merge_then_unmerge_is_bit_exact(make_net, three, x, dtype, fingerprint):
    net, base = make_net(dtype), make_net(dtype)
    live = lf.attach(net, three)
    before = fingerprint(net)
    for mix in ({"a": 1.0, "b": -0.5}, {"c": 30.0}):
        live.merge(mix)
        assert live.merged == mix
        for path, W in base.state_dict().items():
            module, _, name = path.rpartition(".")
            delta = sum(
                c * three[n][module].scale * three[n][module].B @ three[n][module].A
                for n, c in mix.items()
                if module in three[n] and name == "weight"
            )
            merged = net.state_dict()[path]
            if isinstance(delta, int):
                assert torch.equal(merged, W)
            else:
                error = (merged.double() - W.double() - delta).abs().max()
                assert error <= 2 * torch.finfo(dtype).eps * merged.double().abs().max()
                assert not torch.equal(merged, W)
        live.unmerge()
        assert live.merged == {}
        assert fingerprint(net) == before
    assert torch.equal(net(x), base(x))


def test_subtracting_would_not_be_exact(make_net, three):
    # What bit-exactness guards against: a share of half-precision weights would change.
    W = make_net(torch.bfloat16).layers[0].q.weight.detach()
    u = three["a"]["layers.0.q"]
    delta = (u.scale * u.B @ u.A).to(torch.bfloat16)
    assert (((W + delta) - delta) != W).double().mean() > 0.1


def test_outputs_by_the_definition(net, base, three, x, expected):
    live = lf.attach(net, three)
    for mix, options in [
        ("a", {}),
        ("a", {"c": -0.5, "rank": 2}),
        ({"a": 1, "b": 0.3, "c": -1}, {"c": 2}),
    ]:
        live.merge(mix, **options)
        weights = {mix: 1} if isinstance(mix, str) else mix
        wanted = [(three[name], options.get("c", 1) * c) for name, c in weights.items()]
        found = net(x).detach()
        torch.testing.assert_close(found, expected(base, wanted, x, options.get("rank")), **TIGHT)
        live.unmerge()


def test_what_runs_is_merged_when_nothing_is_named(net, base, three, x, expected):
    live = lf.attach(net, three)
    live.use({"a": 0.5, "c": 2}, rank=2)
    live.merge()
    assert live.merged == {"a": 0.5, "c": 2.0}
    wanted = expected(base, [(three["a"], 0.5), (three["c"], 2)], x, 2)
    torch.testing.assert_close(net(x).detach(), wanted, **TIGHT)
    live.unmerge()
    torch.testing.assert_close(net(x).detach(), wanted, **TIGHT)  # and it runs again


def test_the_only_adapter_is_merged_when_nothing_runs(net, base, three, x, expected):
    live = lf.attach(net, three["a"])
    live.merge(c=0.5)
    torch.testing.assert_close(net(x).detach(), expected(base, [(three["a"], 0.5)], x), **TIGHT)


@pytest.mark.parametrize("scaling", ["linear", "sqrt"])
def test_prefixes_are_merged_at_their_scale(net, base, three, x, expected, scaling):
    live = lf.attach(net, three, rank_scaling=scaling)
    live.merge("a", rank=1)
    factor = {"linear": float, "sqrt": math.sqrt}[scaling]
    wanted = expected(base, [(three["a"], 1)], x, 1, factor)
    torch.testing.assert_close(net(x).detach(), wanted, **TIGHT)


def test_the_bytes_that_are_kept_are_stated(net, three):
    live = lf.attach(net, three)
    changed = {f"{p}.weight": net.get_submodule(p).weight for p in three["b"]}
    assert live.merge("b") == sum(p.numel() * p.element_size() for p in changed.values()) == 2048


def test_merging_a_subset_leaves_the_others_active(net, base, three, x, expected):
    live = lf.attach(net, three)
    live.use({"a": 1, "b": -0.5, "c": 2})
    live.merge({"a": 1})
    wanted = expected(base, [(three["a"], 1), (three["b"], -0.5), (three["c"], 2)], x)
    torch.testing.assert_close(net(x).detach(), wanted, **TIGHT)
    with live.use("b"):
        wanted = expected(base, [(three["a"], 1), (three["b"], 1)], x)
        torch.testing.assert_close(net(x).detach(), wanted, **TIGHT)
    with live.use(["b", "c"], c=[0, 1]):
        merged = expected(base, [(three["a"], 1)], x)
        torch.testing.assert_close(net(x).detach()[:3], merged[:3], **TIGHT)
    live.unmerge()
    wanted = expected(base, [(three["a"], 1), (three["b"], -0.5), (three["c"], 2)], x)
    torch.testing.assert_close(net(x).detach(), wanted, **TIGHT)


def test_state_errors(net, base, three, x):
    live = lf.attach(net, three)
    with pytest.raises(MismatchError, match="nothing is merged"):
        live.unmerge()
    live.merge({"a": 1.0, "b": 0.5})
    merged = net(x)
    for again in ("a", "c", {"c": 1}):
        with pytest.raises(MismatchError, match=r"'a', 'b' are merged already: unmerge\(\) first"):
            live.merge(again)
    for what, options in [
        ("a", {}),
        ("b", {"c": 0.5}),
        ({"a": 1, "c": 1}, {}),
        (["a", "c"], {}),
        (["c", None], {}),
        (None, {}),
    ]:
        with pytest.raises(MismatchError, match=r"merged into the weights.*unmerge\(\) first"):
            live.use(what, **options)
    with pytest.raises(MismatchError, match=r"'a' is merged into the weights: unmerge\(\) first"):
        live.remove("a")
    with pytest.raises(MismatchError, match=r"'a' is merged into the weights: unmerge\(\) first"):
        live.add(three["c"], "a", replace=True)
    with pytest.raises(MismatchError, match=r"unmerge\(\) before verify"):
        live.verify(x)
    assert torch.equal(net(x), merged)
    assert live.merged == {"a": 1.0, "b": 0.5}
    live.unmerge()
    with pytest.raises(MismatchError, match="nothing is merged"):
        live.unmerge()
    assert torch.equal(net(x), base(x))


def test_bad_mixes_merge_nothing(net, base, three, x, fingerprint):
    live = lf.attach(net, three)
    before = fingerprint(net)
    for what, options, error, message in [
        (None, {}, MismatchError, "say which: there are 3 adapters, and none runs"),
        (["a", "b"], {}, MismatchError, "rows of a batch can't be merged"),
        ("x", {}, UnknownNameError, "no adapter 'x'"),
        ("a", {"c": float("nan")}, MismatchError, "c must be a finite number"),
        ("a", {"rank": 9}, MismatchError, "rank 9 is above that of every module"),
        ("a", {"rank": {"k": 1}}, MismatchError, "rank= names 'k'"),
    ]:
        with pytest.raises(error, match=message):
            live.merge(what, **options)
    live.use(["a", "b"])
    with pytest.raises(MismatchError, match="rows of a batch can't be merged"):
        live.merge()
    live.use(None)
    assert live.merged == {}
    assert fingerprint(net) == before


def test_final_merges_let_go_of_the_adapters(net, base, three, x, expected):
    live = lf.attach(net, three)
    live.use({"a": 1, "b": 1})
    assert live.merge("a", c=0.5, keep=False) == 0
    assert live.merged == {}
    assert live.names == ["b", "c"]
    assert live.active == {"b": 1.0}
    wanted = expected(base, [(three["a"], 0.5), (three["b"], 1)], x)
    torch.testing.assert_close(net(x).detach(), wanted, **TIGHT)
    with pytest.raises(MismatchError, match="nothing is merged"):
        live.unmerge()
    live.merge("c", keep=False)  # one after the other
    live.detach()
    wanted = expected(base, [(three["a"], 0.5), (three["c"], 1)], x)
    torch.testing.assert_close(net(x).detach(), wanted, **TIGHT)


def test_a_final_merge_leaves_a_model_that_requires_what_it_did(net, x):
    net.layers[0].q.weight.requires_grad_(False)
    live = lf.attach(net, lf.LoRA(rank=2))
    for p in live.parameters():
        p.data = torch.randn_like(p)
    live.merge(keep=False)
    live.detach()
    flags = {n: p.requires_grad for n, p in net.named_parameters()}
    assert flags.pop("layers.0.q.weight") is False
    assert all(flags.values())


def test_detaching_unmerges(net, base, three, x, fingerprint):
    before = fingerprint(net)
    live = lf.attach(net, three)
    live.merge("a")
    live.detach()
    assert fingerprint(net) == before


def test_trained_adapters_merge_as_they_are(net, base, x, expected):
    options = {"rank": 2, "dtype": torch.float64}
    specs = {
        "lora": lf.LoRA(**options),
        "pissa": lf.LoRA(init="pissa", **options),
        "mod": lf.PiSSA(**options),
    }
    live = lf.attach(net, specs)
    for p in live.parameters():
        p.data += torch.randn_like(p) / 5
    mix = {"lora": 1, "pissa": -1, "mod": 0.5}
    adapters = [(live.adapter(name), c) for name, c in mix.items()]
    with live.use(mix):
        attached = net(x).detach()
        live.merge()
    torch.testing.assert_close(net(x).detach(), attached, **TIGHT)
    torch.testing.assert_close(net(x).detach(), expected(base, adapters, x), **TIGHT)
    live.unmerge()


# Tied weights


class Tied(nn.Module):
    """An embedding whose weight is the output layer's as well."""

    def __init__(self):
        super().__init__()
        self.embed, self.head = nn.Embedding(13, 8), nn.Linear(8, 13, bias=False)
        self.head.weight = self.embed.weight

    def forward(self, x):
        return self.head(torch.tanh(self.embed(x)))


@pytest.mark.parametrize("paths", [["embed"], ["head"], ["embed", "head"]])
def test_tied_weights_are_changed_where_the_adapter_is(make_update, dense, x, paths):
    torch.manual_seed(0)
    model = Tied().double()
    W = model.embed.weight
    shapes = {"embed": (8, 13), "head": (13, 8)}
    options = {"dtype": torch.float64}
    adapter = lf.Adapter({p: make_update(*shapes[p], 2, **options) for p in paths})
    live = lf.attach(model, adapter)
    embed = W + dense(adapter["embed"]).T if "embed" in paths else W
    head = W + dense(adapter["head"]) if "head" in paths else W
    wanted = torch.tanh(embed[x]) @ head.T
    with live.use("default"):
        torch.testing.assert_close(model(x), wanted, **TIGHT)
        assert live.verify(x) < 1e-10
    kept = W.detach().clone()
    live.merge("default")
    torch.testing.assert_close(model(x), wanted, **TIGHT)
    live.unmerge()
    assert model.head.weight is model.embed.weight is W  # tied again
    assert torch.equal(W, kept)


# Verifying


class Reads(nn.Module):
    """Uses a layer, and reads the weight of another one past its forward."""

    def __init__(self):
        super().__init__()
        self.used, self.read = nn.Linear(6, 6), nn.Linear(6, 6)

    def forward(self, x):
        assert self.read.weight.dtype == x.dtype  # looking at it is fine
        return F.linear(torch.tanh(self.used(x)), self.read.weight, self.read.bias)


def test_verify_finds_a_weight_that_is_read_directly(make_update):
    model, x = Reads().train(), torch.randn(4, 6)
    u = make_update(6, 6, 2)
    live = lf.attach(model, {"fine": lf.Adapter({"used": u}), "past": lf.Adapter({"read": u})})
    with live.use("fine"):
        assert live.verify(x) < 1e-5
    with live.use({"fine": 1, "past": 1}):
        assert live.verify(x) > 0.1
        assert live.active == {"fine": 1.0, "past": 1.0}
    assert model.training
    assert live.merged == {}


def test_verify_takes_what_the_model_takes(net, three, x):
    live = lf.attach(net, three)
    live.use({"a": 1, "b": 1}, rank=2)
    before = net(x)
    assert live.verify(x=x) < 1e-12
    assert live.verify(x) < 1e-12
    assert torch.equal(net(x), before)
    with pytest.raises(TypeError):
        live.verify(y=x)
    assert live.merged == {}
    assert torch.equal(net(x), before)
    live.use(["a", "b"])
    with pytest.raises(MismatchError, match="rows of a batch"):
        live.verify(x)
    assert live.active == [{"a": 1.0}, {"b": 1.0}]


def test_verify_with_a_background(net, three, x):
    live = lf.attach(net, three)
    live.keep("b", 0.5)
    live.use("a")
    assert live.verify(x) < 1e-12


def test_verify_finds_a_weight_that_is_read_past_its_layer(make_update):
    class Reader(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.up = nn.Linear(8, 16)

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return nn.functional.linear(x, self.up.weight)

    torch.manual_seed(0)
    model = Reader()
    live = lf.attach(model, lf.Adapter({"up": make_update(16, 8, 2)}))
    x = torch.randn(2, 3, 8)
    assert live.verify(x) > 1e-2
    base = model(x)
    live.merge("default")
    assert not torch.allclose(model(x), base)  # merging reaches it


def test_torchs_encoder_takes_no_fast_path_past_its_layers(make_update):
    torch.manual_seed(0)
    layer = nn.TransformerEncoderLayer(8, 2, 16, dropout=0.0, batch_first=True).eval()
    live = lf.attach(layer, lf.Adapter({"linear1": make_update(16, 8, 2)}))
    assert live.verify(torch.randn(2, 3, 8)) < 1e-5


@pytest.mark.parametrize("choice", [("a", 0), (["a", "b"], [0, 1])])
def test_c_0_is_refused_while_merged(net, three, choice):
    live = lf.attach(net, three)
    live.merge({"a": 1.0})
    with pytest.raises(MismatchError, match="no dial reaches"):
        live.use(choice[0], c=choice[1])


def test_rows_of_the_base_are_not_merged_into(net, three, x, fingerprint):
    live = lf.attach(net, three)
    live.use(["b", None])
    before = fingerprint(net)
    with pytest.raises(MismatchError, match="row 1 in use is the base's"):
        live.merge({"a": 1.0})
    assert fingerprint(net) == before
    assert live.merged == {}


def test_a_final_merge_at_0_leaves_an_adapter(net, three):
    live = lf.attach(net, three)
    live.merge({"a": 1.0, "b": 0.0}, keep=False)
    assert live.names == ["b", "c"]


def test_what_is_merged_is_frozen_with_the_base(net, three):
    required = {n: p.requires_grad for n, p in net.named_parameters()}
    live = lf.attach(net, three)
    live.merge({"a": 1.0})
    live.add(lf.LoRA(rank=2, targets="q"), "fresh")
    live.unmerge()
    mine = {id(p) for p in live.parameters()}
    assert not [n for n, p in net.named_parameters() if p.requires_grad and id(p) not in mine]
    live.detach()
    assert {n: p.requires_grad for n, p in net.named_parameters()} == required


# Tied weights


def tied_llama():
    transformers = pytest.importorskip("transformers")
    torch.manual_seed(0)
    config = transformers.LlamaConfig(
        hidden_size=24,
        intermediate_size=40,
        num_hidden_layers=1,
        num_attention_heads=2,
        num_key_value_heads=2,
        vocab_size=50,
        tie_word_embeddings=True,
    )
    return transformers.LlamaForCausalLM(config).eval()


def of_both_ends(what):
    """An adapter of the embedding, the output layer, or both."""
    g = torch.Generator().manual_seed(1)
    modules, layouts, extras, config = {}, {}, {}, {}
    if what in ("embedding", "both"):
        u = lf.LowRank(torch.randn(2, 50, generator=g), torch.randn(24, 2, generator=g), 0.1)
        modules["model.embed_tokens"] = u
        layouts["model.embed_tokens"] = lf.Layout("embedding")
    if what in ("head", "both"):
        u = lf.LowRank(torch.randn(2, 24, generator=g), torch.randn(50, 2, generator=g), 0.1)
        modules["lm_head"] = u
    if what in ("copies", "equal copies"):
        W = torch.randn(50, 24, generator=g)
        V = W.clone() if what == "equal copies" else torch.randn(50, 24, generator=g)
        prefix = "base_model.model."
        extras = {f"{prefix}model.embed_tokens.weight": W, f"{prefix}lm_head.weight": V}
        config = {"modules_to_save": ["embed_tokens", "lm_head"]}
    return lf.Adapter(modules, extras, config, layouts=layouts)


@pytest.mark.parametrize("keep", [True, False])
@pytest.mark.parametrize("what", ["embedding", "head", "both", "copies", "equal copies"])
def test_what_is_merged_into_tied_weights_is_saved_and_loaded(what, keep, tmp_path):
    model = tied_llama()
    tokens = torch.tensor([[1, 2, 3, 5, 6, 7]])
    W = model.lm_head.weight
    live = lf.attach(model, of_both_ends(what))
    with torch.no_grad():
        plain = model(tokens).logits
        with live.use("default"):
            wanted = model(tokens).logits
        assert (wanted - plain).abs().max() > 0.1
        live.verify(tokens)
        assert model.config.tie_word_embeddings is True
        live.merge("default", keep=keep)
        if not keep:
            live.detach()
        model.save_pretrained(tmp_path)
        twin = type(model).from_pretrained(tmp_path).eval()
        torch.testing.assert_close(twin(tokens).logits, wanted, rtol=1e-5, atol=1e-5)
    alike = what == "equal copies"
    saved = load_file(tmp_path / "model.safetensors")
    assert ("lm_head.weight" in saved) is not alike
    assert twin.config.tie_word_embeddings is alike
    assert (twin.lm_head.weight is twin.model.embed_tokens.weight) is alike
    if keep:
        live.unmerge()
        assert model.config.tie_word_embeddings is True
        assert model.lm_head.weight is W
        assert model.model.embed_tokens.weight is W


@torch.no_grad()
@pytest.mark.parametrize("keep", [True, False])
@pytest.mark.parametrize("c", [1.0, -0.5])
def test_a_module_saved_whole_beside_one_that_is_merged(keep, c):
    def saved(seed):
        g = torch.Generator().manual_seed(seed)
        tensors = {"weight": torch.randn(3, 4, generator=g), "bias": torch.randn(3, generator=g)}
        extras = {f"base_model.model.head.{key}": t.double() for key, t in tensors.items()}
        return lf.Adapter({}, extras, {"modules_to_save": ["head"]})

    torch.manual_seed(0)
    net = nn.Sequential()
    net.head = nn.Linear(4, 3).double()
    x = torch.randn(5, 4, dtype=torch.float64)
    found, base = {name: saved(i) for i, name in enumerate("ab")}, net(x)
    a, b = (
        torch.func.functional_call(net, {k[17:]: t for k, t in found[n].extras.items()}, x)
        for n in "ab"
    )
    wanted = base + 0.3 * (a - base) + c * (b - base)
    live = lf.attach(net, found)
    live.use({"a": 0.3, "b": c})
    torch.testing.assert_close(net(x), wanted, atol=1e-12, rtol=1e-12)
    live.merge({"a": 0.3}, keep=keep)
    live.use("b", c=c)
    torch.testing.assert_close(net(x), wanted, atol=1e-12, rtol=1e-12)
    live.use(["b"] * 5, c=c)
    torch.testing.assert_close(net(x), wanted, atol=1e-12, rtol=1e-12)
    if keep:
        live.unmerge()
        live.use("b", c=c)
        torch.testing.assert_close(net(x), base + c * (b - base), atol=1e-12, rtol=1e-12)
