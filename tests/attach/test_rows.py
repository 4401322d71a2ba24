"""Rows of a batch against each row alone: the model's own input says which entries are whose.

The reference knows nothing of rows: a copy of the base with W + c ΔW in place of its weights runs
the entries of one row. What can't be told apart has to be refused by name, and leave no trace.
"""

import copy

import pytest
import torch
from torch import nn
from torch.func import functional_call
from torch.utils.checkpoint import checkpoint

import lorafold as lf
from lorafold.errors import MismatchError, RefusedError

transformers = pytest.importorskip("transformers")
TIGHT = {"rtol": 1e-9, "atol": 1e-9}
live_of = lf.Live.of
APART = "can't be told apart"
NAMES = ("a", "b", "c")


def adapters_of(model, wanted=lambda path: True, names=NAMES):
    """Adapters of rank 2 on the model's linear layers and embeddings."""
    found = {}
    for i, name in enumerate(names):
        g = torch.Generator().manual_seed(i)

        def factor(*size, g=g):
            return 0.3 * torch.randn(*size, generator=g, dtype=torch.float64)

        modules, layouts = {}, {}
        for path, m in model.named_modules():
            if type(m) is nn.Linear and wanted(path):
                modules[path] = lf.LowRank(factor(2, m.in_features), factor(m.out_features, 2))
            elif type(m) is nn.Embedding and wanted(path):
                modules[path] = lf.LowRank(factor(2, m.num_embeddings), factor(m.embedding_dim, 2))
                layouts[path] = lf.Layout("embedding")
        found[name] = lf.Adapter(modules, layouts=layouts)
    return found


def alone(base, adapter, c, *args, **kwargs):
    """What a copy of the base gives with W + c ΔW in place of its weights."""
    weights = {key: p.detach() for key, p in base.named_parameters(remove_duplicate=False)}
    for path, u in adapter.items() if adapter is not None else ():
        delta = c * u.scale * u.B.double() @ u.A.double()
        W = weights[f"{path}.weight"]
        weights[f"{path}.weight"] = W + (delta if delta.shape == W.shape else delta.T)
    with torch.no_grad():
        return functional_call(base, weights, args, kwargs, tie_weights=False)


def merged(base, adapter):
    """A copy of the base with W + ΔW as its weights."""
    twin = copy.deepcopy(base)
    for path, u in adapter.items() if adapter is not None else ():
        layer, delta = twin.get_submodule(path), u.scale * u.B.double() @ u.A.double()
        W = layer.weight.detach()
        layer.weight = nn.Parameter(W + (delta if delta.shape == W.shape else delta.T))
    return twin


def check(model, base, adapters, batch, get, rows=("a", None, "b"), c=(1.0, 1.0, -0.5), each=1):
    """Every row of a batch {name: tensor} equals the row alone."""
    with live_of(model).use(list(rows), c=list(c)), torch.no_grad():
        found = get(model(**batch))
    for i, name in enumerate(rows):
        mine = slice(i * each, (i + 1) * each)
        part = {key: value[mine] for key, value in batch.items()}
        wanted = get(alone(base, adapters.get(name), c[i], **part))
        torch.testing.assert_close(found[mine], wanted, **TIGHT)
        if name is not None:  # and the rows do differ
            assert not torch.allclose(found[mine], get(base(**part)))


def attached(model, wanted=lambda path: True):
    """(model, its base, adapters) with all of them attached."""
    base = copy.deepcopy(model.double().eval())
    adapters = adapters_of(model, wanted)
    lf.attach(model, adapters)
    return model, base, adapters


def tokens(n, length, vocabulary=30, seed=0):
    return torch.randint(3, vocabulary, (n, length), generator=torch.Generator().manual_seed(seed))


def no_trace(model):
    """No hooks are left, and no batch is remembered."""
    ours = ("lorafold" in (*m._forward_hooks, *m._forward_pre_hooks) for m in model.modules())
    hooks = any(ours)
    return not hooks and live_of(model)._state.board.rows.n is None


# Time first


class TimeFirst(nn.Module):
    """Tokens (n, T) through torch's transformer, which wants (T, n, ...)."""

    def __init__(self, batch_first=False):
        super().__init__()
        self.embed = nn.Embedding(30, 8)
        layer = nn.TransformerEncoderLayer(8, 2, 16, dropout=0.0, batch_first=batch_first)
        self.encoder = nn.TransformerEncoder(layer, 2, enable_nested_tensor=False)
        self.head = nn.Linear(8, 5)
        self.batch_first = batch_first

    def forward(self, x):
        h = self.embed(x)
        if not self.batch_first:
            h = h.transpose(0, 1)
        h = self.encoder(h)
        return self.head(h if self.batch_first else h.transpose(0, 1))


def linears(path):
    return "self_attn" not in path


@pytest.mark.parametrize(("n", "length"), [(3, 6), (6, 3), (3, 4)])
def test_torchs_time_first_transformer(n, length):
    model, base, adapters = attached(TimeFirst(), linears)
    check(model, base, adapters, {"x": tokens(n, length)}, lambda y: y, each=n // 3)


@pytest.mark.parametrize("batch_first", [False, True])
def test_torchs_transformer_by_itself(batch_first):
    model = nn.TransformerEncoderLayer(8, 2, 16, dropout=0.0, batch_first=batch_first)
    model, base, adapters = attached(model, linears)
    x = torch.randn(3, 6, 8, dtype=torch.float64)
    with live_of(model).use(["a", None, "b"]), torch.no_grad():
        found = model(x if batch_first else x.transpose(0, 1))
    found = found if batch_first else found.transpose(0, 1)
    for i, name in enumerate(["a", None, "b"]):
        part = x[i : i + 1]
        wanted = alone(base, adapters.get(name), 1, part if batch_first else part.transpose(0, 1))
        wanted = wanted if batch_first else wanted.transpose(0, 1)
        torch.testing.assert_close(found[i : i + 1], wanted, **TIGHT)


@pytest.mark.parametrize("what", ["a", ["a", "a", "a"]])
@pytest.mark.parametrize("batch_first", [False, True])
def test_torchs_fast_path_does_not_pass_adapters_by(batch_first, what):
    model = TimeFirst(batch_first)
    model, base, adapters = attached(model, lambda path: "linear" in path)
    ids = tokens(3, 6)
    with torch.no_grad(), live_of(model).use(what):
        found = model(ids)
    wanted = merged(base, adapters["a"]).train()(ids)  # gradients and training: no fast path
    torch.testing.assert_close(found, wanted, **TIGHT)
    with torch.no_grad():
        torch.testing.assert_close(model(ids), base(ids), **TIGHT)


def test_torchs_decoder_and_whole_transformer():
    encoder = nn.TransformerEncoder(
        nn.TransformerEncoderLayer(8, 2, 16, dropout=0.0), 1, enable_nested_tensor=False
    )
    model = nn.Transformer(8, 2, 1, 1, 16, dropout=0.0, custom_encoder=encoder)
    model, base, adapters = attached(model, linears)
    src, tgt = torch.randn(6, 3, 8).double(), torch.randn(4, 3, 8).double()
    with live_of(model).use(["a", None, "b"]), torch.no_grad():
        found = model(src, tgt)
    for i, name in enumerate(["a", None, "b"]):
        wanted = alone(base, adapters.get(name), 1, src[:, i : i + 1], tgt[:, i : i + 1])
        torch.testing.assert_close(found[:, i : i + 1], wanted, **TIGHT)


def xlnet():
    config = transformers.XLNetConfig(
        vocab_size=30, d_model=8, n_layer=2, n_head=2, d_inner=16, dropout=0.0, pad_token_id=0
    )
    return transformers.XLNetLMHeadModel(config)


def longformer():
    config = transformers.LongformerConfig(
        vocab_size=30, hidden_size=8, num_hidden_layers=2, num_attention_heads=2,
        intermediate_size=16, attention_window=4, max_position_embeddings=40, pad_token_id=0,
    )  # fmt: skip
    return transformers.LongformerForMaskedLM(config)


def led():
    config = transformers.LEDConfig(
        vocab_size=30, d_model=8, encoder_layers=1, decoder_layers=1, encoder_attention_heads=2,
        decoder_attention_heads=2, encoder_ffn_dim=16, decoder_ffn_dim=16, attention_window=4,
        max_encoder_position_embeddings=40, max_decoder_position_embeddings=40, pad_token_id=0,
    )  # fmt: skip
    return transformers.LEDForConditionalGeneration(config)


def not_positions(path):
    return "position" not in path and "token_type" not in path


@pytest.mark.parametrize("length", [8, 12, 16])
@pytest.mark.parametrize("make", [xlnet, longformer, led])
def test_transformers_that_put_time_first(make, length):
    torch.manual_seed(0)
    model, base, adapters = attached(make(), not_positions)
    batch = {"input_ids": tokens(6, length), "attention_mask": torch.ones(6, length)}
    if make is led:
        batch["decoder_input_ids"] = tokens(6, 5, seed=1)
    if make is longformer:
        batch["global_attention_mask"] = torch.zeros(6, length)
        batch["global_attention_mask"][:, 0] = 1
    check(model, base, adapters, batch, lambda out: out.logits, each=2)


class OwnTimeFirst(nn.Module):
    """Puts time first, and nobody can know."""

    def __init__(self):
        super().__init__()
        self.up, self.down = nn.Linear(8, 8), nn.Linear(8, 8)

    def forward(self, x):
        return self.down(torch.tanh(self.up(x.transpose(0, 1)))).transpose(0, 1)


@pytest.mark.parametrize(("n", "length"), [(2, 4), (4, 2), (2, 6)])
def test_time_first_of_ones_own_is_refused_by_name(n, length):
    model, base, _ = attached(OwnTimeFirst())
    x = torch.randn(n, length, 8, dtype=torch.float64)
    with live_of(model).use(["a", "b"]):
        message = rf"'up' gets {length} × {n} entries where the model's input has {n}.*{APART}"
        with pytest.raises(MismatchError, match=message):
            model(x)
    assert no_trace(model)
    assert torch.equal(model(x), base(x))


def test_as_long_as_wide_is_refused_until_it_is_clear():
    model, _, _ = attached(OwnTimeFirst())
    with live_of(model).use(["a", "b"]), pytest.raises(MismatchError, match="either axis"):
        model(torch.randn(2, 2, 8, dtype=torch.float64))
    # One that puts the batch first is known by a batch of another length.
    model, base, adapters = attached(nn.Sequential(nn.Linear(8, 8), nn.Tanh(), nn.Linear(8, 8)))
    x = torch.randn(2, 3, 8, dtype=torch.float64)
    with live_of(model).use(["a", "b"]):
        with pytest.raises(MismatchError, match=r"'0' gets 2 × 2 entries.*either axis"):
            model(x[:, :2])
        model(x)
        found = model(x[:, :2])
    for i, name in enumerate("ab"):
        wanted = alone(base, adapters[name], 1, x[i : i + 1, :2])
        torch.testing.assert_close(found[i : i + 1], wanted, **TIGHT)


@pytest.mark.parametrize("rows", [["a", "b", "c"], ["a", "a", "a"], ["c", None, "a"], ["b"] * 6])
def test_inputs_that_are_no_block_of_memory(rows):
    model, base, adapters = attached(nn.Sequential(nn.Linear(8, 8)))
    x = torch.randn(8, 5, 6, dtype=torch.float64).permute(2, 1, 0)
    for given in (x, x[:, ::2], x[:, :1].expand(6, 4, 8)):
        with live_of(model).use(rows), torch.no_grad():
            found = model(given)
        for i, part in enumerate(given.chunk(len(rows))):
            wanted = alone(base, adapters.get(rows[i]), 1, part)
            torch.testing.assert_close(found.chunk(len(rows))[i], wanted, **TIGHT)


# Entries that are not the batch's


class Routed(nn.Module):
    """Each token goes to the expert of its first feature's sign."""

    def __init__(self, name="experts", container=nn.ModuleList):
        super().__init__()
        two = [nn.Linear(8, 8) for _ in range(2)]
        made = container(two if container is nn.ModuleList else {"e0": two[0], "e1": two[1]})
        self.name = name
        self.add_module(name, made)

    def forward(self, x):
        flat, found = x.reshape(-1, 8), torch.zeros_like(x).reshape(-1, 8)
        for i, expert in enumerate(self.get_submodule(self.name).children()):
            chosen = (flat[:, 0] > 0) == bool(i)
            found[chosen] = expert(flat[chosen])
        return found.view(x.shape)


@pytest.mark.parametrize("container", [nn.ModuleList, nn.ModuleDict])
def test_experts_in_a_list_are_refused_when_rows_are_chosen(container):
    model, base, adapters = attached(Routed(container=container))
    x = torch.randn(2, 5, 8, dtype=torch.float64)
    with pytest.raises(RefusedError, match=r"'a' updates the experts of 'experts\.(0|e0)'"):
        live_of(model).use(["a", "b"])
    assert live_of(model).active == {}
    with live_of(model).use("a"):  # one for the whole batch is fine
        torch.testing.assert_close(model(x), alone(base, adapters["a"], 1, x), **TIGHT)


def test_experts_in_a_list_can_not_come_while_rows_are_in_use():
    model = nn.Sequential(nn.Linear(8, 8), Routed())
    base = copy.deepcopy(model.double().eval())
    outside = adapters_of(model, lambda path: path == "0")
    inside = adapters_of(model, names=("a", "d"))
    live = lf.attach(model, {"a": outside["a"], "b": outside["b"], "d": inside["d"]})
    x = torch.randn(2, 5, 8, dtype=torch.float64)
    live.use(["a", "b"])
    with pytest.raises(
        RefusedError, match=r"'a' is in use by rows, and experts \('1\.experts\.0'\)"
    ):
        live.add(inside["a"], "a", replace=True)
    with pytest.raises(RefusedError, match=r"'d' updates the experts of '1\.experts\.0'"):
        live.keep("d")
    found = model(x)
    for i, name in enumerate("ab"):
        wanted = alone(base, outside[name], 1, x[i : i + 1])
        torch.testing.assert_close(found[i : i + 1], wanted, **TIGHT)
    assert live.kept == {}


@pytest.mark.parametrize("seed", range(20))
def test_routing_under_another_name_is_never_wrong(seed):
    model, base, adapters = attached(Routed("branches"))
    x = torch.randn(2, 4, 8, generator=torch.Generator().manual_seed(seed)).double()
    with live_of(model).use(["a", "b"]), torch.no_grad():
        try:
            found = model(x)
        except MismatchError as error:
            assert "'branches." in str(error)  # noqa: PT017
            return
    for i, name in enumerate("ab"):
        torch.testing.assert_close(found[i], alone(base, adapters[name], 1, x[i]), **TIGHT)


def test_experts_in_a_list_beside_rows_of_other_layers():
    config = transformers.LlamaConfig(
        vocab_size=30, hidden_size=8, intermediate_size=16, num_hidden_layers=1,
        num_attention_heads=2,
    )  # fmt: skip
    model = transformers.LlamaModel(config)
    model.layers[0].mlp = Routed()
    model, base, adapters = attached(model, lambda path: "experts" not in path)
    batch = {"input_ids": tokens(3, 5)}
    check(model, base, adapters, batch, lambda out: out.last_hidden_state)


def clip():
    text = {
        "vocab_size": 30, "hidden_size": 8, "intermediate_size": 16, "num_hidden_layers": 1,
        "num_attention_heads": 2, "max_position_embeddings": 12, "eos_token_id": 2,
    }  # fmt: skip
    vision = {
        "hidden_size": 8, "intermediate_size": 16, "num_hidden_layers": 1, "image_size": 8,
        "num_attention_heads": 2, "patch_size": 4,
    }  # fmt: skip
    config = transformers.CLIPConfig(text_config=text, vision_config=vision, projection_dim=8)
    return transformers.CLIPModel(config)


@pytest.mark.parametrize(("images", "texts"), [(2, 4), (4, 2)])
def test_clip_with_more_texts_than_images(images, texts):
    model, base, _ = attached(clip(), not_positions)
    batch = {
        "input_ids": tokens(texts, 6),
        "pixel_values": torch.randn(images, 3, 8, 8, dtype=torch.float64),
    }
    before = base(**batch).logits_per_image
    with live_of(model).use(["a", "b"]), pytest.raises(MismatchError, match=APART):
        model(**batch)
    assert no_trace(model)
    assert torch.equal(model(**batch).logits_per_image, before)


def test_layers_that_nobody_in_the_batch_changes_are_not_asked():
    model = clip().double().eval()
    base = copy.deepcopy(model)
    text = adapters_of(model, lambda path: path.startswith("text_model.encoder"))
    vision = adapters_of(model, lambda path: path.startswith("vision_model.encoder"), ("d",))
    live = lf.attach(model, {**text, **vision})
    batch = {
        "input_ids": tokens(4, 6),
        "pixel_values": torch.randn(2, 3, 8, 8, dtype=torch.float64),
    }
    with live.use(["a", None]), torch.no_grad():
        found = model(**batch).text_embeds
    for part, name in ((slice(0, 2), "a"), (slice(2, 4), None)):
        own = {"input_ids": batch["input_ids"][part], "pixel_values": batch["pixel_values"]}
        wanted = alone(base, text.get(name), 1, **own).text_embeds
        torch.testing.assert_close(found[part], wanted, **TIGHT)
    with live.use(["a", "d"]), pytest.raises(MismatchError, match=rf"'vision_model.*{APART}"):
        model(**batch)


def test_clip_with_as_many():
    model, base, adapters = attached(clip(), not_positions)
    batch = {
        "input_ids": tokens(4, 6),
        "pixel_values": torch.randn(4, 3, 8, 8, dtype=torch.float64),
    }
    for get in (lambda out: out.text_embeds, lambda out: out.image_embeds):
        check(model, base, adapters, batch, get, rows=("a", "b"), c=(1.0, 0.5), each=2)


class Flat(nn.Module):
    """Flattens its batch, and pools it; all tokens are in order."""

    def __init__(self):
        super().__init__()
        self.embed = nn.Embedding(30, 8)
        self.inner, self.pool = nn.Linear(8, 8), nn.Linear(8, 8)

    def forward(self, ids):
        h = self.embed(ids.flatten())
        h = torch.tanh(self.inner(h)).view(*ids.shape, 8)
        return self.pool(h[:, -1])


@pytest.mark.parametrize(("n", "length"), [(3, 4), (6, 2)])
def test_what_was_flattened_in_order(n, length):
    model, base, adapters = attached(Flat())
    check(model, base, adapters, {"ids": tokens(n, length)}, lambda y: y, each=n // 3)
    check(model, base, adapters, {"ids": tokens(3, 3)}, lambda y: y)  # known by now


class Positions(nn.Module):
    """Has positions without a batch; a linear layer makes more of them."""

    def __init__(self):
        super().__init__()
        self.embed, self.at = nn.Embedding(30, 8), nn.Embedding(10, 8)
        self.relative, self.out = nn.Linear(8, 8), nn.Linear(8, 8)

    def forward(self, ids):
        at = torch.arange(ids.shape[1])
        return self.out(self.embed(ids) + self.at(at) + self.relative(self.at.weight[at]))


@pytest.mark.parametrize("leaf", ["at", "relative"])
@pytest.mark.parametrize(("n", "length"), [(3, 3), (6, 6), (3, 4)])
def test_positions_that_are_as_many_as_the_batch_are_no_rows(leaf, n, length):
    model, base, _ = attached(Positions(), lambda path: path == leaf)
    ids = tokens(n, length)
    with live_of(model).use(["a", None, "b"]), pytest.raises(MismatchError, match=f"'{leaf}' get"):
        model(ids)
    assert no_trace(model)
    assert torch.equal(model(ids), base(ids))


def test_a_convolution_has_its_batch_first():
    net = nn.Sequential(nn.Conv1d(3, 4, 3), nn.Flatten(), nn.Linear(16, 2)).double()
    base = copy.deepcopy(net)
    u = lf.LowRank(torch.randn(2, 9).double(), torch.randn(4, 2).double())
    live = lf.attach(net, lf.Adapter({"0": u}, layouts={"0": lf.Layout("conv", kernel=(3, 3))}))
    x = torch.randn(3, 3, 6, dtype=torch.float64)  # as many as channels
    with live.use(["default", None, "default"]), torch.no_grad():
        found = net(x)
    W = base[0].weight.detach()
    state = {"0.weight": W + (u.B @ u.A).view_as(W)}
    wanted = functional_call(base, state, x).detach()
    wanted[1] = base(x)[1].detach()
    torch.testing.assert_close(found, wanted, **TIGHT)


class Half(nn.Module):
    """One layer sees half of the tokens, another every second entry."""

    def __init__(self):
        super().__init__()
        self.embed, self.out = nn.Embedding(30, 8), nn.Linear(8, 8)

    def forward(self, ids):
        h = self.embed(ids)
        return self.out(h.reshape(-1, 8)[: h.shape[0] * h.shape[1] // 2])


def test_part_of_what_was_flattened_is_refused():
    model, _, _ = attached(Half())
    with live_of(model).use(["a", "b"]), pytest.raises(MismatchError, match=r"'out' gets 6 ent"):
        model(tokens(2, 6))
    assert no_trace(model)


def test_no_batch_at_all_is_refused():
    model, _, _ = attached(nn.Sequential(nn.Linear(8, 8)))
    for x in (torch.randn(8), torch.randn(3, 8)):
        with live_of(model).use(["a", "b"]), pytest.raises(MismatchError):
            model(x.double())
    conv = nn.Sequential(nn.Conv1d(4, 4, 3)).double()
    u = lf.LowRank(torch.randn(2, 12).double(), torch.randn(4, 2).double())
    live = lf.attach(conv, {n: lf.Adapter({"0": u}, layouts={}) for n in "ab"})
    with live.use(["a", "b"]), pytest.raises(MismatchError, match="'0' gets no entries"):
        conv(torch.randn(4, 9).double())  # channels and time, no batch


# What the outermost input says


def test_inputs_that_disagree_are_refused_before_anything_runs():
    model, _, _ = attached(led(), not_positions)
    ran = []
    model.led.encoder.register_forward_pre_hook(lambda *_: ran.append(1))
    with live_of(model).use(["a", "b"]):
        with pytest.raises(MismatchError, match="disagree on the batch, 4 entries and 2"):
            model(input_ids=tokens(4, 8), decoder_input_ids=tokens(2, 3))
        with pytest.raises(MismatchError, match="batch of 3 is no multiple of the 2 rows"):
            model(input_ids=tokens(3, 8), decoder_input_ids=tokens(3, 3))
    assert not ran


class Wrapped(nn.Module):
    """Calls a model with whatever it was given."""

    def __init__(self, model, call):
        super().__init__()
        self.model, self.call = model, call

    def forward(self, *args, **kwargs):
        return self.call(self.model, *args, **kwargs)


CALLS = {
    "by position": (lambda m, x: m(x), lambda x: ((x,), {})),
    "by name": (lambda m, **kw: m(**kw), lambda x: ((), {"ids": x})),
    "a mapping": (lambda m, batch: m(batch["ids"]), lambda x: (({"ids": x},), {})),
    "a tuple": (lambda m, pair: m(pair[1]), lambda x: (((x, x),), {})),
    "no tensor": (lambda m, texts: m(torch.stack(texts)), lambda x: ((list(x),), {})),
    "a number first": (lambda m, scale, x: m(x), lambda x: ((torch.tensor(2.0), x), {})),
}


@pytest.mark.parametrize("call", CALLS)
def test_however_the_batch_is_given(call):
    inner, arguments = CALLS[call]
    model, base, adapters = attached(Wrapped(Flat(), inner))
    args, kwargs = arguments(tokens(3, 4))
    with live_of(model).use(["a", None, "b"]), torch.no_grad():
        found = model(*args, **kwargs)
    for i, name in enumerate(["a", None, "b"]):
        args, kwargs = arguments(tokens(3, 4)[i : i + 1])
        wanted = alone(base, adapters.get(name), 1, *args, **kwargs)
        torch.testing.assert_close(found[i : i + 1], wanted, **TIGHT)


def test_embeddings_in_place_of_tokens():
    config = transformers.LlamaConfig(
        vocab_size=30, hidden_size=8, intermediate_size=16, num_hidden_layers=1,
        num_attention_heads=2,
    )  # fmt: skip
    model, base, adapters = attached(transformers.LlamaForCausalLM(config), not_positions)
    batch = {"inputs_embeds": torch.randn(6, 5, 8, dtype=torch.float64)}
    check(model, base, adapters, batch, lambda out: out.logits, each=2)


# Models called in parts


def t5():
    config = transformers.T5Config(
        vocab_size=30, d_model=8, d_kv=4, d_ff=16, num_layers=1, num_heads=2, dropout_rate=0.0,
        decoder_start_token_id=0, pad_token_id=0, eos_token_id=1,
    )  # fmt: skip
    return transformers.T5ForConditionalGeneration(config), {"input_ids": tokens(3, 7)}


def whisper():
    config = transformers.WhisperConfig(
        vocab_size=30, d_model=8, encoder_layers=1, decoder_layers=1, encoder_attention_heads=2,
        decoder_attention_heads=2, encoder_ffn_dim=16, decoder_ffn_dim=16, num_mel_bins=4,
        max_source_positions=10, max_target_positions=20, decoder_start_token_id=3,
        pad_token_id=0, bos_token_id=1, eos_token_id=2, suppress_tokens=None,
        begin_suppress_tokens=None,
    )  # fmt: skip
    features = torch.randn(3, 4, 20, generator=torch.Generator().manual_seed(0)).double()
    return transformers.WhisperForConditionalGeneration(config), {"input_features": features}


@pytest.mark.parametrize("beams", [1, 2])
@pytest.mark.parametrize("make", [t5, whisper])
def test_generating_with_an_encoder(make, beams):
    torch.manual_seed(0)
    model, inputs = make()
    wanted = lambda path: "relative" not in path and "position" not in path  # noqa: E731
    model, base, adapters = attached(model, wanted)
    options = {"max_new_tokens": 5, "do_sample": False, "num_beams": beams, "min_new_tokens": 5}
    options |= {"output_logits": True, "return_dict_in_generate": True}
    rows = ["a", None, "b"]
    with live_of(model).use(rows), torch.no_grad():
        found = model.generate(**inputs, **options)
    assert no_trace(model)
    for i, name in enumerate(rows):
        part = {key: value[i : i + 1] for key, value in inputs.items()}
        alone_here = merged(base, adapters.get(name)).generate(**part, **options)
        assert torch.equal(found.sequences[i : i + 1], alone_here.sequences)
        if make is t5:  # Whisper gives those of one beam
            first = found.logits[0].view(3, beams, 30)[i]
            torch.testing.assert_close(first, alone_here.logits[0], **TIGHT)


def test_parts_by_hand():
    model, inputs = t5()
    model, base, adapters = attached(model, lambda path: "relative" not in path)
    ids = inputs["input_ids"]
    get = lambda out: out.last_hidden_state  # noqa: E731
    with live_of(model).use(["a", None, "b"]), torch.no_grad():
        found = get(model.encoder(ids))
        states = model.encoder.block[0](get(base.encoder(ids)))[0]
        model.lm_head(states)
    for i, name in enumerate(["a", None, "b"]):
        with torch.no_grad():
            wanted = get(merged(base, adapters.get(name)).encoder(ids[i : i + 1]))
        torch.testing.assert_close(found[i : i + 1], wanted, **TIGHT)


# Gradients and activations computed again


def llama(**options):
    config = transformers.LlamaConfig(
        vocab_size=30, hidden_size=8, intermediate_size=16, num_hidden_layers=2,
        num_attention_heads=2, **options,
    )  # fmt: skip
    torch.manual_seed(0)
    return transformers.LlamaForCausalLM(config).double()


@pytest.mark.parametrize("reentrant", [False, True])
def test_gradient_checkpointing(reentrant):
    ids, grads = tokens(4, 5), []
    for recompute in (False, True):
        model = llama()
        spec = lf.LoRA(rank=2, seed=0, targets=["q_proj", "up_proj", "lm_head"])
        live = lf.attach(model, {"a": spec, "b": lf.LoRA(rank=2, seed=1, targets=spec.targets)})
        g = torch.Generator().manual_seed(0)
        for p in live.parameters():
            p.data += 0.1 * torch.randn(p.shape, generator=g, dtype=p.dtype)
        model.train()
        if recompute:
            model.activation_checkpointing_enable({"use_reentrant": reentrant})
            model.enable_input_require_grads()
        with live.use(["a", "b"], c=[1, -0.5]):
            out = model(input_ids=ids, use_cache=False).logits
            out.square().sum().backward()
        grads.append([out.detach(), *(p.grad for p in live.parameters())])
        assert live._state.board.rows.n is None
    assert len(grads[0]) > 5
    for mine, theirs in zip(*grads, strict=True):
        torch.testing.assert_close(mine, theirs, **TIGHT)


def test_time_first_layers_computed_again():
    x, grads = torch.randn(6, 3, 8, dtype=torch.float64), []
    for recompute in (False, True):
        torch.manual_seed(0)
        model = nn.TransformerEncoderLayer(8, 2, 16, dropout=0.0).double()
        live = lf.attach(model, adapters_of(model, linears), trainable=True)
        given = x.clone().requires_grad_()
        with live.use(["a", None, "b"]):
            run = (lambda h: checkpoint(model, h, use_reentrant=False)) if recompute else model  # noqa: B023
            run(given).square().sum().backward()
        grads.append([given.grad, *(p.grad for p in live.parameters() if p.grad is not None)])
    assert len(grads[0]) > 2
    for mine, theirs in zip(*grads, strict=True):
        torch.testing.assert_close(mine, theirs, **TIGHT)


def test_gradients_of_rows_are_those_of_each_row_alone():
    model = llama()
    options = {"rank": 2, "targets": "all-linear", "dtype": torch.float64}
    live = lf.attach(model, {n: lf.LoRA(seed=i, **options) for i, n in enumerate("ab")})
    for p in live.parameters():
        p.data += 0.1 * torch.randn(p.shape, dtype=p.dtype)
    ids = tokens(4, 5)

    def gradient(*calls):
        for what, part in calls:
            with live.use(what):
                model(input_ids=part).logits.square().sum().backward()
        found = [p.grad.clone() for p in live.parameters()]
        for p in live.parameters():
            p.grad = None
        return found

    together = gradient((["a", "b"], ids))
    for mine, theirs in zip(together, gradient(("a", ids[:2]), ("b", ids[2:])), strict=True):
        torch.testing.assert_close(mine, theirs, **TIGHT)


# Modules saved whole


@pytest.mark.parametrize(("n", "length"), [(4, 6), (6, 4)])
def test_modules_saved_whole_inside_a_time_first_class(n, length):
    torch.manual_seed(0)
    model = TimeFirst().double().eval()
    base = copy.deepcopy(model)
    specs = {
        name: lf.LoRA(rank=2, targets=["head"], modules_to_save=["linear1"], dtype=torch.float64)
        for name in ("a", "b")
    }
    live = lf.attach(model, specs)
    for p in live.parameters():
        p.data += 0.1 * torch.randn(p.shape, dtype=p.dtype)
    ids = tokens(n, length)
    with torch.no_grad():
        each = {}
        for name in ("a", "b"):
            with live.use(name):
                each[name] = model(ids)
        with live.use(["a", "b"]):
            found = model(ids)
        torch.testing.assert_close(found[: n // 2], each["a"][: n // 2], **TIGHT)
        torch.testing.assert_close(found[n // 2 :], each["b"][n // 2 :], **TIGHT)
        live.use(None)
        torch.testing.assert_close(model(ids), base(ids), **TIGHT)


# Hooks


class Failing(nn.Module):
    def __init__(self):
        super().__init__()
        self.first, self.second = nn.Linear(8, 8), nn.Linear(8, 8)
        self.fails = None

    def forward(self, x):
        h = self.first(x)
        if self.fails is not None:
            raise self.fails
        return self.second(h)


@pytest.mark.parametrize("error", [ZeroDivisionError(), KeyboardInterrupt()])
def test_nothing_is_left_behind_by_a_forward_that_raises(error):
    model, base, adapters = attached(nn.Sequential(Failing()))
    x = torch.randn(4, 3, 8, dtype=torch.float64)
    live = live_of(model)
    live.use(["a", "b"])
    model[0].fails = error
    with pytest.raises(type(error)):
        model(x)
    model[0].fails = None
    found = model(torch.cat([x, x]))  # another batch, which the one that failed has no say in
    wanted = torch.cat([x[:, :], x])
    for part, name in ((slice(0, 4), "a"), (slice(4, 8), "b")):
        torch.testing.assert_close(
            found[part], alone(base, adapters[name], 1, wanted[part]), **TIGHT
        )
    live.use(None)
    assert no_trace(model)
    assert torch.equal(model(x), base(x))


def test_hooks_are_there_only_while_rows_are_in_use():
    model, base, _ = attached(TimeFirst(), linears)
    live = live_of(model)
    assert no_trace(model)
    with live.use("a"):
        assert no_trace(model)
    seen = []
    handle = model.register_forward_pre_hook(lambda *_: seen.append(1))
    with live.use(["a", "b"]):
        assert len(model._forward_pre_hooks) == 2
        model(tokens(2, 4))
        with live.use("a"):
            assert len(model._forward_pre_hooks) == 1
        assert len(model._forward_pre_hooks) == 2
    assert list(model._forward_pre_hooks) == [handle.id]
    assert seen == [1]
    handle.remove()
    live.use(["a", "b"])
    live.add(adapters_of(base, linears)["a"], "late")
    live.detach()
    assert not any(m._forward_pre_hooks or m._forward_hooks for m in model.modules())


def test_a_copy_has_hooks_of_its_own():
    model, base, adapters = attached(TimeFirst(), linears)
    live_of(model).use(["a", "b"])
    twin = copy.deepcopy(model)
    live_of(model).detach()
    ids = tokens(4, 6)
    found = twin(ids)
    for i, name in enumerate("ab"):
        mine = slice(2 * i, 2 * i + 2)
        torch.testing.assert_close(found[mine], alone(base, adapters[name], 1, ids[mine]), **TIGHT)
    assert live_of(twin)._state.board.rows.n is None
    live_of(twin).use(None)
    assert no_trace(twin)


def test_layers_that_come_while_rows_are_in_use():
    model, base, _ = attached(Wrapped(TimeFirst(), lambda m, x: m(x)), lambda p: "head" in p)
    live = live_of(model)
    live.use(["a", "b"])
    more = adapters_of(base, linears)["c"]
    live.add(more, "more")
    ids = tokens(2, 6)
    with live.use(["a", "more"]):
        found = model(ids)
    torch.testing.assert_close(found[1:], alone(base, more, 1, ids[1:]), **TIGHT)
