"""Packed batches: several sequences end to end in (1, T), against each sequence alone.

The caller gives position ids and a block-diagonal mask; the reference is a copy of the base with
W + c ΔW as its weights that runs one sequence, and knows nothing of packing.
"""

import copy
import itertools

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import nn
from torch._dynamo.testing import CompileCounter

import lorafold as lf
from lorafold.attach.run import patch
from lorafold.attach.run.packed import Packed, block_size
from lorafold.errors import MismatchError, RefusedError

transformers = pytest.importorskip("transformers")
pytestmark = pytest.mark.filterwarnings("ignore::DeprecationWarning:torch")
TIGHT = {"rtol": 1e-9, "atol": 1e-9}
NAMES = ("a", "b", "c")


def llama(**options):
    config = transformers.LlamaConfig(
        vocab_size=30, hidden_size=8, intermediate_size=16, num_hidden_layers=2,
        num_attention_heads=2, attn_implementation="sdpa", **options,
    )  # fmt: skip
    torch.manual_seed(0)
    return transformers.LlamaForCausalLM(config).double().eval()


def adapters_of(model):
    """Adapters of ranks 1 to 3 on every linear layer and the embedding."""
    found = {}
    for i, name in enumerate(NAMES):
        g = torch.Generator().manual_seed(i)

        def factor(*size, g=g):
            return 0.3 * torch.randn(*size, generator=g, dtype=torch.float64)

        modules, layouts = {}, {}
        for path, m in model.named_modules():
            if type(m) is nn.Linear:
                modules[path] = lf.LowRank(
                    factor(1 + i, m.in_features), factor(m.out_features, 1 + i), 0.7
                )
            elif type(m) is nn.Embedding:
                modules[path] = lf.LowRank(
                    factor(1 + i, m.num_embeddings), factor(m.embedding_dim, 1 + i)
                )
                layouts[path] = lf.Layout("embedding")
        found[name] = lf.Adapter(modules, layouts=layouts)
    return found


def merged(base, adapters, mix, rank=None):
    """A copy of the base with W + Σ c ΔW as its weights."""
    twin = copy.deepcopy(base)
    mix = {} if mix is None else {mix: 1.0} if isinstance(mix, str) else mix
    for name, c in mix.items():
        for path, u in adapters[name].items():
            layer = twin.get_submodule(path)
            W, k = layer.weight.detach(), u.rank if rank is None else min(rank, u.rank)
            delta = c * u.scale * u.B[:, :k].double() @ u.A[:k].double()
            layer.weight = nn.Parameter(W + (delta if delta.shape == W.shape else delta.T))
    return twin


def pack(sequences, tokens=None, dtype=torch.float64):
    """The batch of some sequences end to end, padded to a number of tokens."""
    lengths = [len(s) for s in sequences]
    rest = (tokens or sum(lengths)) - sum(lengths)
    whole = [*sequences, *([torch.zeros(rest, dtype=torch.int64)] if rest else [])]
    of = torch.cat([torch.full((len(s),), i) for i, s in enumerate(whole)])
    seen = (of[:, None] == of[None]).tril()
    return {
        "input_ids": torch.cat(whole)[None],
        "position_ids": torch.cat([torch.arange(len(s)) for s in whole])[None],
        "attention_mask": torch.where(seen, 0.0, -1e9).to(dtype)[None, None],
        "use_cache": False,
    }


def sequences_of(lengths, seed=0):
    g = torch.Generator().manual_seed(seed)
    return [torch.randint(1, 30, (length,), generator=g) for length in lengths]


def check(found, base, adapters, sequences, rows, c=None, rank=None):
    """Every sequence of a packed output equals the sequence alone."""
    start = 0
    for i, (sequence, what) in enumerate(zip(sequences, rows, strict=True)):
        part = found[0, start : start + len(sequence)]
        start += len(sequence)
        if not len(sequence):
            continue
        mix = {} if what is None else {what: 1.0} if isinstance(what, str) else what
        mix = {n: w * (1.0 if c is None else c[i]) for n, w in mix.items()}
        alone = merged(base, adapters, mix, None if rank is None else rank[i])
        with torch.no_grad():
            torch.testing.assert_close(part, alone(sequence[None]).logits[0], **TIGHT)
    if start < found.shape[1]:  # the rest is the base's
        assert found.shape[1] - start > 0


CHOICES = {
    "names": (["a", "b", "c"], {}),
    "one of the base": (["a", None, "c"], {}),
    "the same twice": (["b", "a", "b"], {}),
    "all the same": (["b", "b", "b"], {}),
    "coefficients": (["a", "b", "c"], {"c": [1.0, -0.5, 0.0]}),
    "ranks": (["c", "c", "b"], {"rank": [1, 3, 2]}),
    "mixes": ([{"a": 1.0, "c": -0.5}, "b", {"b": 0.5}], {"c": [1.0, 2.0, 1.0]}),
    "the base": ([None, None, None], {}),
}


@pytest.mark.parametrize("recorded", [False, True], ids=["eager", "as in a graph"])
@pytest.mark.parametrize("tokens", [None, 17])
@pytest.mark.parametrize("choice", CHOICES)
def test_each_sequence_as_if_it_were_alone(monkeypatch, choice, tokens, recorded):
    monkeypatch.setattr(patch, "_is_recorded", lambda y: recorded)
    model = llama()
    base, adapters = copy.deepcopy(model), adapters_of(model)
    live = lf.attach(model, adapters)
    rows, options = CHOICES[choice]
    for lengths in ([5, 2, 7], [1, 1, 12], [0, 6, 4], [3, 0, 0]):
        sequences = sequences_of(lengths)
        batch = pack(sequences, tokens)
        with live.use(rows, lengths=lengths, **options), torch.no_grad():
            found = model(**batch).logits
        check(found, base, adapters, sequences, rows, **options)
        end = sum(lengths)
        if end < found.shape[1]:
            wanted = base(**batch).logits[:, end:]
            torch.testing.assert_close(found[:, end:], wanted, **TIGHT)


def test_what_nobody_has_is_the_base_to_the_bit():
    model = nn.Sequential(nn.Linear(6, 4)).double()
    base = copy.deepcopy(model)
    u = lf.LowRank(torch.randn(2, 6).double(), torch.randn(4, 2).double())
    live = lf.attach(model, {n: lf.Adapter({"0": u}) for n in "ab"})
    x = torch.randn(1, 9, 6, dtype=torch.float64)
    x[0, 2:4], x[0, 7:] = 1e308, 1e308  # 0 · ∞ would be no number
    with live.use(["a", None, "b"], lengths=[2, 2, 3]):
        found = model(x)
    assert torch.equal(found[:, 2:4], base(x)[:, 2:4])
    assert torch.equal(found[:, 7:], base(x)[:, 7:])
    assert found[:, [0, 1, 4, 5, 6]].isfinite().all()
    assert not torch.equal(found[:, :2], base(x)[:, :2])


@pytest.mark.parametrize("how", ["lora", "pissa", "modulation"])
def test_gradients_are_those_of_each_sequence_alone(how):
    options = {"rank": 2, "dtype": torch.float64, "targets": ["q_proj", "down_proj", "lm_head"]}
    init = "pissa" if how == "pissa" else "kaiming"
    made = {
        n: lf.PiSSA(rank=2, mean=0.1, seed=i, targets=options["targets"])
        if how == "modulation"
        else lf.LoRA(seed=i, init=init, **options)
        for i, n in enumerate("ab")
    }
    model = llama()
    live = lf.attach(model, made)
    for p in live.parameters():
        p.data += 0.1 * torch.randn(p.shape, dtype=p.dtype)
    sequences, rows = sequences_of([4, 3, 5, 2]), ["a", None, "b", "a"]

    def gradients():
        found = [p.grad for p in live.parameters()]
        for p in live.parameters():
            p.grad = None
        return found

    with live.use(rows, lengths=[4, 3, 5, 2], c=[1, 1, -0.5, 2]):
        model(**pack(sequences, 16)).logits[:, :14].square().sum().backward()
    together = gradients()
    for sequence, name, c in zip(sequences, rows, [1, 1, -0.5, 2], strict=True):
        if name is not None:
            with live.use(name, c=c):
                model(sequence[None]).logits.square().sum().backward()
    assert len(together) > 2
    tight = TIGHT if together[0].dtype == torch.float64 else {"rtol": 1e-4, "atol": 1e-3}
    for mine, theirs in zip(together, gradients(), strict=True):
        torch.testing.assert_close(mine, theirs, **tight)


def test_gradients_of_the_input_through_given_adapters():
    model = nn.Sequential(nn.Linear(6, 5), nn.Tanh(), nn.Linear(5, 4)).double()
    base = copy.deepcopy(model)
    adapters = {
        n: lf.Adapter(
            {
                "0": lf.LowRank(torch.randn(2, 6).double(), torch.randn(5, 2).double()),
                "2": lf.LowRank(torch.randn(2, 5).double(), torch.randn(4, 2).double()),
            }
        )
        for n in "ab"
    }
    live = lf.attach(model, adapters)
    x = torch.randn(1, 9, 6, dtype=torch.float64, requires_grad=True)
    with live.use(["b", "a"], lengths=[4, 3]):
        first = model(x).square().sum()
        with live.use(["a", "b"], lengths=[2, 6]):  # another choice before the backward pass
            model(x)
    (found,) = torch.autograd.grad(first, x)
    for name, part in (("b", slice(0, 4)), ("a", slice(4, 7)), (None, slice(7, 9))):
        given_x = x.detach()[:, part].clone().requires_grad_()
        merged(base, adapters, name)(given_x).square().sum().backward()
        torch.testing.assert_close(found[:, part], given_x.grad, **TIGHT)


def test_kept_rounds_and_modules_saved_whole():
    model = llama()
    base = copy.deepcopy(model)
    adapters = adapters_of(model.model)
    adapters = {
        n: lf.Adapter({f"model.{p}": u for p, u in a.items() if "embed" not in p})
        for n, a in adapters.items()
    }
    spec = {"rank": 2, "targets": ["q_proj"], "modules_to_save": ["lm_head"]}
    live = lf.attach(model, {**adapters, "s": lf.LoRA(**spec), "t": lf.LoRA(**spec)})
    for p in live.parameters():
        p.data += 0.1 * torch.randn(p.shape, dtype=p.dtype)
    live.keep("b", 0.5)
    lengths, rows = [4, 3, 5, 2], ["s", "a", None, "t"]
    sequences = sequences_of(lengths)
    with torch.no_grad():
        with live.use(rows, lengths=lengths, c=[1, 1, 1, 0.5]):
            found = model(**pack(sequences, 15)).logits
        start = 0
        for sequence, name, c in zip(sequences, rows, [1, 1, 1, 0.5], strict=True):
            with live.use(name, c=c):
                wanted = model(sequence[None]).logits[0]
            part = found[0, start : start + len(sequence)]
            torch.testing.assert_close(part, wanted, rtol=1e-6, atol=1e-6)
            start += len(sequence)
        wanted = base(**pack(sequences, 15)).logits[0, 14:]
        torch.testing.assert_close(found[0, 14:], wanted, **TIGHT)


@pytest.mark.parametrize("form", ["svd", "input", "output", "shared"])
@pytest.mark.parametrize("recorded", [False, True], ids=["eager", "as in a graph"])
def test_from_a_library(monkeypatch, form, recorded):
    monkeypatch.setattr(patch, "_is_recorded", lambda y: recorded)
    model = llama()
    paths = {p: m for p, m in model.named_modules() if p.endswith(("q_proj", "up_proj"))}
    g = torch.Generator().manual_seed(0)
    adapters = {
        name: lf.Adapter(
            {
                p: lf.LowRank(
                    torch.randn(2, m.in_features, generator=g),
                    torch.randn(m.out_features, 2, generator=g),
                )
                for p, m in paths.items()
            }
        )
        for name in NAMES
    }
    library = lf.fold(adapters, form=form, tolerance=0.2)
    live = lf.attach(model, library, dtype=torch.float64)
    lengths, rows = [4, 3, 5], ["c", None, "a"]
    sequences, start = sequences_of(lengths), 0
    with torch.no_grad():
        with live.use(rows, lengths=lengths, c=[1, 1, -0.5]):
            found = model(**pack(sequences, 15)).logits
        for sequence, name, c in zip(sequences, rows, [1, 1, -0.5], strict=True):
            with live.use(name, c=c):
                wanted = model(sequence[None]).logits[0]
            torch.testing.assert_close(found[0, start : start + len(sequence)], wanted, **TIGHT)
            start += len(sequence)


class Last(nn.Module):
    """Gives the head only the last token of each sequence, as a server does."""

    def __init__(self, flat):
        super().__init__()
        self.embed, self.body, self.head = nn.Embedding(30, 8), nn.Linear(8, 8), nn.Linear(8, 5)
        self.flat = flat

    def forward(self, ids, last):
        h = torch.tanh(self.body(self.embed(ids)))[:, last]
        return self.head(h[0] if self.flat else h)


@pytest.mark.parametrize("recorded", [False, True], ids=["eager", "as in a graph"])
@pytest.mark.parametrize("flat", [False, True])
@pytest.mark.parametrize("lengths", [[3, 4, 2], [3, 0, 2, 5], [1, 1, 1]])
def test_a_layer_that_sees_one_token_a_sequence(monkeypatch, lengths, flat, recorded):
    monkeypatch.setattr(patch, "_is_recorded", lambda y: recorded)
    model = Last(flat).double()
    base, adapters = copy.deepcopy(model), adapters_of(model)
    live = lf.attach(model, adapters)
    rows = ["a", "b", "c", "b"][: len(lengths)]
    ends = list(itertools.accumulate(lengths))
    some = [(end - 1, rows[i]) for i, end in enumerate(ends) if lengths[i]]
    ids = torch.randint(1, 30, (1, 12))
    with live.use(rows, lengths=lengths), torch.no_grad():
        found = model(ids, torch.tensor([at for at, _ in some])).view(len(some), 5)
    for i, (at, name) in enumerate(some):
        wanted = merged(base, adapters, name)(ids[:, at : at + 1], torch.tensor([0])).view(5)
        torch.testing.assert_close(found[i], wanted, **TIGHT)


def test_a_layer_that_sees_other_tokens_is_refused_by_name():
    model = Last(False).double()
    base = copy.deepcopy(model)
    live = lf.attach(model, adapters_of(model))
    ids = torch.randint(1, 30, (1, 12))
    message = r"'head' gets 1 × 2 entries of 12 packed tokens"
    with pytest.raises(MismatchError, match=message), live.use(["a", "b", "c"], lengths=[3, 4, 2]):
        model(ids, torch.tensor([2, 6]))
    assert torch.equal(model(ids, torch.tensor([2, 6])), base(ids, torch.tensor([2, 6])))


def test_what_can_not_be_packed_is_refused():
    model = nn.Sequential(nn.Linear(6, 4)).double()
    u = lf.LowRank(torch.randn(2, 6).double(), torch.randn(4, 2).double())
    live = lf.attach(model, {n: lf.Adapter({"0": u}) for n in "ab"})
    x = torch.randn(1, 9, 6, dtype=torch.float64)
    for what, lengths, message in [
        ("a", [3], "lengths= has one entry per row, so the adapters must be a list"),
        ({"a": 1.0}, [3], "the adapters must be a list"),
        (["a", "b"], [3], "lengths has 1 entries for 2 rows"),
        (["a", "b"], 3, "lengths must be a list"),
        (["a", "b"], [3, -1], "a length must be a whole number of at least 0, found -1"),
        (["a", "b"], [3, 1.5], "a length must be a whole number"),
        (["a", "b"], [3, True], "a length must be a whole number"),
        (["a", "b"], torch.tensor(3), "lengths must be a list"),
        (["a", "b"], torch.ones(2, 1), "lengths must be a list"),
        (["a", "b"], [10**30, 1], "more than any batch has"),
        (["a", "b"], [2**63 - 1, 2**63 - 1], "more than any batch has"),
    ]:
        with pytest.raises(MismatchError, match=message):
            live.use(what, lengths=lengths)
        assert live.active == {}
    with live.use(["a", "b"], lengths=[5, 5]):
        with pytest.raises(MismatchError, match="add up to 10, the batch has 9 tokens"):
            model(x)
        with pytest.raises(MismatchError, match=r"inputs \(1, T\), found a batch of 2"):
            model(x.expand(2, 9, 6))
    with live.use(["a", "b"], lengths=torch.tensor([4, 5])):  # an array will do
        model(x)
    with live.use(["a", "b"], lengths=list(torch.tensor([4, 5])), rank=torch.tensor(1)):
        model(x)
    assert not model._forward_pre_hooks
    conv = nn.Sequential(nn.Conv1d(4, 4, 3, padding=1)).double()
    k = lf.LowRank(torch.randn(2, 12).double(), torch.randn(4, 2).double())
    layouts = {"0": lf.Layout("conv", kernel=(4, 3))}
    live = lf.attach(conv, {n: lf.Adapter({"0": k}, layouts=layouts) for n in "ab"})
    with live.use(["a", "b"], lengths=[1, 1]), pytest.raises(MismatchError, match="'0' gets no"):
        conv(torch.randn(1, 4, 9).double())


def test_experts_in_a_list_can_not_be_packed():
    model = nn.Sequential()
    model.experts = nn.ModuleList([nn.Linear(4, 4)])
    u = lf.LowRank(torch.randn(2, 4), torch.randn(4, 2))
    live = lf.attach(model, {n: lf.Adapter({"experts.0": u}) for n in "ab"})
    with pytest.raises(RefusedError, match="routing hides the rows"):
        live.use(["a", "b"], lengths=[1, 2])


def test_removing_and_merging_keep_the_lengths():
    model = llama()
    base, adapters = copy.deepcopy(model), adapters_of(model)
    live = lf.attach(model, adapters)
    lengths = [5, 2, 7]
    sequences = sequences_of(lengths)
    live.use(["a", "b", {"a": 1.0, "c": 1.0}], lengths=lengths)
    live.remove("b")
    with torch.no_grad():
        check(
            model(**pack(sequences)).logits,
            base,
            adapters,
            sequences,
            ["a", None, {"a": 1.0, "c": 1.0}],
        )
        live.use(["a", "a", {"a": 1.0, "c": 1.0}], lengths=lengths)
        live.merge({"a": 1.0})
        check(
            model(**pack(sequences)).logits,
            base,
            adapters,
            sequences,
            ["a", "a", {"a": 1.0, "c": 1.0}],
        )


# Graphs


@pytest.fixture(autouse=True)
def fresh_dynamo():
    torch._dynamo.reset()
    yield
    torch._dynamo.reset()


def test_other_lengths_make_no_new_graph():
    model = llama()
    base, adapters = copy.deepcopy(model), adapters_of(model)
    live = lf.attach(model, adapters)
    counter = CompileCounter()
    fast = torch.compile(model, backend=counter, fullgraph=True)
    for rows, lengths, options in [
        (["a", "b", "c"], [5, 2, 7], {}),
        (["a", "b", "c"], [1, 10, 3], {}),
        (["c", None, "c"], [0, 6, 4], {"c": [1, 1, -0.5]}),
        (["b", "c", "c", "a"], [2, 3, 4, 5], {"rank": [1, 2, 1, 1]}),  # padded to four rows before
        ([None, None, None], [4, 4, 4], {}),
    ]:
        sequences = sequences_of(lengths)
        with live.use(rows, lengths=lengths, **options), torch.no_grad():
            found = fast(**pack(sequences, 16)).logits
        check(found, base, adapters, sequences, rows, **options)
        assert counter.frame_count == 1
    live.use(["a", "b", "c"], lengths=[8, 8, 8])
    with pytest.raises(RuntimeError, match="add up to more than the 16 tokens"), torch.no_grad():
        fast(**pack(sequences_of([8, 8]), 16))


def test_one_token_a_sequence_in_a_graph():
    model = Last(False).double()
    base, adapters = copy.deepcopy(model), adapters_of(model)
    live = lf.attach(model, adapters)
    counter = CompileCounter()
    fast = torch.compile(model, backend=counter, fullgraph=True)
    ids = torch.randint(1, 30, (1, 12))
    for rows, lengths in [(["a", "b", "c"], [3, 4, 2]), (["c", "a", None], [5, 1, 6])]:
        last = torch.tensor(list(itertools.accumulate(lengths))) - 1
        with live.use(rows, lengths=lengths), torch.no_grad():
            found = fast(ids, last)
        for i, at in enumerate(last.tolist()):
            wanted = merged(base, adapters, rows[i])(ids[:, at : at + 1], torch.tensor([0]))
            torch.testing.assert_close(found[:, i : i + 1], wanted, **TIGHT)
    assert counter.frame_count == 1


def test_trained_adapters_in_a_graph():
    model = nn.Sequential(nn.Linear(6, 5), nn.Tanh(), nn.Linear(5, 4)).double()
    spec = {"rank": 2, "targets": ["0", "2"], "dtype": torch.float64}
    live = lf.attach(model, {n: lf.LoRA(seed=i, **spec) for i, n in enumerate("ab")})
    for p in live.parameters():
        p.data += 0.1 * torch.randn(p.shape, dtype=p.dtype)
    fast = torch.compile(model, backend="aot_eager", fullgraph=True)
    x = torch.randn(1, 9, 6, dtype=torch.float64)
    for lengths in ([3, 4], [6, 2]):
        grads = []
        for run in (model, fast):
            with live.use(["a", "b"], lengths=lengths):
                run(x).square().sum().backward()
            grads.append([p.grad for p in live.parameters()])
            for p in live.parameters():
                p.grad = None
        for mine, theirs in zip(*grads, strict=True):
            torch.testing.assert_close(mine, theirs, **TIGHT)


# The arithmetic of blocks


@given(
    lengths=st.lists(st.integers(0, 9), min_size=1, max_size=6),
    rest=st.integers(0, 5),
    size=st.sampled_from([1, 2, 4, 8]),
)
def test_every_token_lies_in_a_block_of_its_row(lengths, rest, size):
    tokens = sum(lengths) + rest
    if not tokens:
        return
    packed, cpu = Packed(len(lengths) + 1, []), torch.device("cpu")
    packed.set(lengths)
    row = packed.row_of(cpu, tokens, False)
    assert row.tolist() == [i for i, n in enumerate([*lengths, rest]) for _ in range(n)]
    blocks = packed.blocks(cpu, tokens, False, size)
    mine = row < len(lengths)
    at = torch.arange(tokens)[mine]
    assert torch.equal(blocks.source[blocks.place[mine]], at)
    assert torch.equal(blocks.row[blocks.place[mine] // size], row[mine])
    assert len(blocks.source) == size * len(blocks.row)


def test_the_size_of_blocks_follows_what_they_read():
    assert block_size(64, 64, 16) <= 8
    assert block_size(4096, 8, 16) > block_size(4096, 64, 16) > block_size(4096, 64, 1)
    assert block_size(1, 9, 0) == 1
