"""One graph: at a fixed input shape and mix width, who runs, at which rank and c, is data."""

import pytest
import torch
from torch._dynamo.testing import CompileCounter

import lorafold as lf

# torch.compile says so itself when it meets a tensor of float64, or its own deprecations.
pytestmark = pytest.mark.filterwarnings("ignore::DeprecationWarning:torch")
CLOSE = {"rtol": 1e-5, "atol": 1e-5}


@pytest.fixture(autouse=True)
def fresh_dynamo():
    torch._dynamo.reset()
    yield
    torch._dynamo.reset()


@pytest.fixture
def small(make_net):
    """small() -> a float32 model of one block."""

    def made():
        net = make_net(torch.float32)
        net.layers = net.layers[:1]
        return net

    return made


@pytest.fixture
def adapters(three):
    """Those of `three`, as far as the small model goes."""
    return {
        name: lf.Adapter({p: u.to(dtype=torch.float32) for p, u in a.items() if ".0." in p})
        for name, a in three.items()
    }


@pytest.fixture
def compiled(small, adapters):
    """An attached model, the same compiled with a counter of graphs, and the handle."""
    net = small()
    live = lf.attach(net, adapters)
    counter = CompileCounter()
    return net, torch.compile(net, backend=counter, fullgraph=True), live, counter


UNIFORM = [
    ("a", {}),
    ("b", {}),
    ("a", {"c": -0.5}),
    ("c", {"rank": 1}),
    ("a", {"rank": 3, "c": 2}),
    ("a", {"rank": {"q": 1}}),
    ("b", {"c": 0}),
    ("a", {"rank": 0}),
    ({"c": 0.3}, {}),
]
ROWS = [
    (["a", None, "b"], {}),
    (["b", "c", "c"], {"c": [1, 0, -0.5]}),
    (["c", "c", "c"], {"rank": [1, 2, 3]}),
    ([None, None, "a"], {"rank": 2, "c": 0.1}),
    ([{"a": 0.5}, "b", "c"], {}),
    ([None, None, None], {}),
    (["a", "b", "c"], {"c": 0}),
    (["a", "b", "c"], {"rank": 0}),
]
MIXES = [
    ({"a": 1, "b": -0.3}, {}),
    ({"b": 1, "c": 2}, {"c": 0.5}),
    ({"c": 1, "a": 0}, {"rank": 1}),
]


@pytest.mark.parametrize("choices", [UNIFORM, ROWS, MIXES], ids=["uniform", "rows", "mixes"])
def test_changing_the_choice_makes_no_new_graph(compiled, x, choices):
    net, fast, live, counter = compiled
    for what, options in choices:
        with live.use(what, **options), torch.no_grad():
            torch.testing.assert_close(fast(x), net(x), **CLOSE)
        assert counter.frame_count == 1


@pytest.mark.parametrize("m", [1, 2])
def test_rows_are_told_apart_in_a_graph_as_out_of_it(compiled, small, adapters, x, expected, m):
    net, fast, live, counter = compiled
    rows = [None, "a", "b", "c", "a", "b"][: 6 // m]
    with live.use(rows), torch.no_grad():
        found = fast(x)
        assert live._state.board.rows.n is None
        for i, name in enumerate(rows):
            mix = [] if name is None else [(adapters[name], 1)]
            part = slice(m * i, m * (i + 1))
            wanted = expected(small(), mix, x[part]).float()
            torch.testing.assert_close(found[part], wanted, rtol=1e-4, atol=1e-4)
        with pytest.raises(Exception, match="no multiple of the"):
            torch.compile(net, backend="eager")(x[:5])
        torch.testing.assert_close(fast(x), found)  # nothing is left of what failed
    with live.use("a"), torch.no_grad():
        fast(x)
    with live.use(rows), torch.no_grad():
        torch.testing.assert_close(fast(x), found)
    assert counter.frame_count == 2  # one for rows, one for the whole batch


def test_blocks_that_are_compiled_one_by_one(make_net, three, x, base, expected):
    net = make_net()
    live = lf.attach(net, three)
    counter = CompileCounter()
    for block in net.layers:
        block.compile(backend=counter, fullgraph=True)
    for rows in (["a", None, "b"], ["c", "c", None]):
        with live.use(rows), torch.no_grad():
            found = net(x)
        for i, name in enumerate(rows):
            mix = [] if name is None else [(three[name], 1)]
            part = slice(2 * i, 2 * i + 2)
            torch.testing.assert_close(found[part], expected(base, mix, x[part]))
    assert counter.frame_count == 1  # the blocks are alike
    with live.use(["a", "b"]), torch.no_grad():
        assert live._state.board.rows.n is None
        net(x)
    assert live._state.board.rows.n is None


def test_time_first_in_a_graph():
    torch.manual_seed(0)
    layer = torch.nn.TransformerEncoderLayer(8, 2, 16, dropout=0.0).eval()
    u = {n: lf.LowRank(torch.randn(2, 8), torch.randn(16, 2)) for n in "ab"}
    live = lf.attach(layer, {n: lf.Adapter({"linear1": u[n]}) for n in "ab"})
    counter = CompileCounter()
    fast = torch.compile(layer, backend=counter, fullgraph=True)
    x = torch.randn(4, 6, 8)  # time, batch
    with torch.no_grad():
        each = {}
        for name in "ab":
            with live.use(name):
                each[name] = layer(x)
        for rows in (["a", "b", "a"], ["b", "b", "a"]):
            with live.use(rows):
                found = fast(x)
            for i, name in enumerate(rows):
                torch.testing.assert_close(
                    found[:, 2 * i : 2 * i + 2], each[name][:, 2 * i : 2 * i + 2], **CLOSE
                )
    assert counter.frame_count == 1


def test_the_counter_counts(compiled, x):
    _, fast, live, counter = compiled
    with live.use("a"), torch.no_grad():
        fast(x)
        fast(x[:, :2])  # another shape
    assert counter.frame_count == 2


def test_zero_in_a_graph_is_the_base_bit_for_bit(compiled, small, x):
    _, fast, live, _ = compiled
    base = small()
    with torch.no_grad():
        for what, c in [("a", 0), (["a", None, "b"], [0, 1, 1])]:
            with live.use(what, c=c):
                found = fast(x)
            assert torch.equal(found[:4], base(x)[:4])


def test_added_and_removed_adapters_run_in_the_same_graph(compiled, adapters, x):
    net, fast, live, counter = compiled
    with torch.no_grad():
        with live.use("a"):
            fast(x)
        live.remove("b")
        live.add(adapters["c"], "late")
        with live.use("late"):
            torch.testing.assert_close(fast(x), net(x), **CLOSE)
    assert counter.frame_count == 1


def test_adapters_that_share_a_slot_run_in_the_same_graph(small, adapters, x):
    net = small()
    live = lf.attach(net, adapters, slots=1)
    counter = CompileCounter()
    fast = torch.compile(net, backend=counter, fullgraph=True)
    for name in ("a", "b", "c", "a"):
        with live.use(name), torch.no_grad():
            torch.testing.assert_close(fast(x), net(x), **CLOSE)
    assert counter.frame_count == 1


@pytest.mark.parametrize(
    "spec", [lf.LoRA(rank=2), lf.PiSSA(rank=2, mean=0.1)], ids=["lora", "pissa"]
)
def test_trained_adapters_compile(small, x, spec):
    net = small()
    live = lf.attach(net, {"one": spec, "two": spec})
    for p in live.parameters():
        p.data += 0.1 * torch.randn(p.shape)
    counter = CompileCounter()
    fast = torch.compile(net, backend=counter, fullgraph=True)
    for what, options in [("one", {}), ("two", {"c": -1}), ("one", {"rank": 1}), ("one", {"c": 0})]:
        with live.use(what, **options):
            torch.testing.assert_close(fast(x), net(x), **CLOSE)
            grads = []
            for model in (net, fast):
                y = model(x)
                if y.requires_grad:
                    y.square().sum().backward()
                grads.append([p.grad for p in live.parameters()])
                for p in live.parameters():
                    p.grad = None
        for mine, theirs in zip(*grads, strict=True):
            if mine is None or theirs is None:  # not run, or run with the weight 0
                assert all(g is None or not g.any() for g in (mine, theirs))
            else:
                torch.testing.assert_close(mine, theirs, rtol=1e-4, atol=1e-4)
    assert counter.frame_count == 1


def test_kept_rounds_compile(compiled, x):
    net, fast, live, counter = compiled
    live.keep("b", 0.5)
    for what, options in [("a", {}), ("c", {"c": -1}), ("c", {"c": 0}), ("a", {"rank": 1})]:
        with live.use(what, **options), torch.no_grad():
            torch.testing.assert_close(fast(x), net(x), **CLOSE)
    assert counter.frame_count == 1


def test_attaching_after_compiling(small, adapters, x):
    net, base = small(), small()
    fast = torch.compile(net, backend="eager", fullgraph=True)
    with torch.no_grad():
        assert torch.equal(fast(x), base(x))
        live = lf.attach(net, {"a": adapters["a"]})
        live.use("a")
        torch.testing.assert_close(fast(x), net(x), **CLOSE)
        assert not torch.equal(fast(x), base(x))
        live.use(None)
        assert torch.equal(fast(x), base(x))
        live.use("a")
        live.detach()
        assert torch.equal(fast(x), base(x))


def test_a_compiled_model_is_attached_by_its_own_names(small, adapters, x):
    net, base = small(), small()
    fast = torch.compile(net, backend="eager", fullgraph=True)
    live = lf.attach(fast, adapters)
    assert lf.Live.of(fast) is live
    assert live.model is net
    with live.use("a"), torch.no_grad():
        torch.testing.assert_close(fast(x), net(x), **CLOSE)
        assert not torch.equal(net(x), base(x))
    live.detach()
    assert torch.equal(net(x), base(x))


def test_generation_compiles_no_more_than_the_base():
    transformers = pytest.importorskip("transformers")
    config = transformers.LlamaConfig(
        vocab_size=61, hidden_size=32, intermediate_size=48, num_hidden_layers=1,
        num_attention_heads=4, max_position_embeddings=64, pad_token_id=0, bos_token_id=1,
        eos_token_id=None,
    )  # fmt: skip
    torch.manual_seed(0)
    model = transformers.LlamaForCausalLM(config).eval()
    ids = torch.randint(3, 61, (3, 4))
    options = {"max_new_tokens": 3, "do_sample": False, "cache_implementation": "static"}

    def graphs(live, choices):
        torch._dynamo.reset()
        counter = CompileCounter()
        forward = model.forward
        model.forward = torch.compile(forward, backend=counter)
        counts = []
        try:
            for what in choices:
                if live is not None:
                    live.use(what)
                model.generate(ids, **options)
                counts.append(counter.frame_count)
        finally:
            del model.forward
        return counts

    base = graphs(None, [None, None])
    shapes = {p: (m.out_features, m.in_features) for p, m in model.named_modules() if "q_proj" in p}
    adapters = {
        name: lf.Adapter(
            {
                p: lf.LowRank(torch.randn(2, i) / 9, torch.randn(o, 2))
                for p, (o, i) in shapes.items()
            }
        )
        for name in "ab"
    }
    live = lf.attach(model, adapters)
    found = graphs(live, [["a", None, "b"], ["b", "b", None], ["a", "a", "a"]])
    assert found == [base[0]] * 3
    assert base[0] == base[1]
