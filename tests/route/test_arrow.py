"""Arrow against its definition: dense updates, their own SVD, one token at a time."""

import copy
import json
import math

import pytest
import torch
from torch import nn
from torch._dynamo.testing import CompileCounter

import lorafold as lf
from lorafold.route import load
from lorafold.route.arrow import leading_directions

CLOSE = {"rtol": 1e-8, "atol": 1e-8}


class Reference(nn.Module):
    """Wx + c Σ softmax-top-k(|x·v|) ΔW x, written out."""

    def __init__(self, layer, updates, top_k, temperature, c):
        super().__init__()
        self.layer, self.top_k, self.temperature, self.c = layer, top_k, temperature, c
        self.dense = [u.scale * (u.B.double() @ u.A.double()) for u in updates]
        self.v = [torch.linalg.svd(d)[2][0] for d in self.dense]

    @torch.no_grad()
    def forward(self, x):
        y = self.layer(x)
        flat, out = x.reshape(-1, x.shape[-1]), y.reshape(-1, y.shape[-1]).clone()
        for t, token in enumerate(flat):
            likeness = [abs(float(token @ v)) for v in self.v]
            best = sorted(range(len(likeness)), key=lambda i: -likeness[i])[: self.top_k]
            powers = {
                i: math.exp((likeness[i] - likeness[best[0]]) / self.temperature) for i in best
            }
            for i in best:
                share = powers[i] / sum(powers.values())
                out[t] += self.c * share * (self.dense[i] @ token)
        return out.view(y.shape)


def referred(net, adapters, top_k=2, temperature=1.0, c=1.0):
    net = copy.deepcopy(net)
    for path, layer in list(net.named_modules()):
        updates = [a.modules[path] for a in adapters if path in a.modules]
        if updates:
            parent, _, leaf = path.rpartition(".")
            reference = Reference(layer, updates, top_k, temperature, c)
            setattr(net.get_submodule(parent), leaf, reference)
    return net


@pytest.mark.parametrize(
    ("top_k", "temperature", "c"),
    [(1, 1.0, 1.0), (2, 1.0, 1.0), (2, 0.1, -0.5), (3, 5.0, 2.0), (9, 1.0, 1.0)],
)
def test_equals_the_definition(net, base, three, x, top_k, temperature, c):
    live = lf.attach(net, three)
    router = lf.ArrowRouter(three, top_k, temperature)
    wanted = referred(base, three.values(), top_k, temperature, c)(x)
    with live.use(router, c=c):
        torch.testing.assert_close(net(x), wanted.detach(), **CLOSE)
    assert torch.equal(net(x), base(x))


def test_only_those_that_have_a_module_take_part(net, base, three, x):
    # "b" has no `up`: there the two others share, as if it weren't there.
    live = lf.attach(net, three)
    paths = [p for p in three["a"].modules if p.endswith("up")]
    two = {n: lf.Adapter({p: three[n][p] for p in paths}) for n in "ac"}
    for name in "ac":
        live.add(two[name], f"{name}-up")
    router = lf.ArrowRouter({"a-up": two["a"], "c-up": two["c"], "b": three["b"]}, top_k=3)
    with live.use(router):
        wanted = referred(base, [*two.values(), three["b"]], 3)(x)
        torch.testing.assert_close(net(x), wanted.detach(), **CLOSE)


@pytest.mark.filterwarnings("ignore:adapter 'zero' does nothing")
def test_zero_updates_take_no_part(net, base, three, x):
    zero = lf.Adapter({p: 0.0 * u for p, u in three["a"].modules.items()})
    four = {"zero": zero, **three}
    live = lf.attach(net, four)
    with live.use(lf.ArrowRouter(four)):
        wanted = referred(base, three.values())(x)
        torch.testing.assert_close(net(x), wanted.detach(), **CLOSE)
    with live.use(lf.ArrowRouter({"zero": zero})):
        torch.testing.assert_close(net(x), base(x), **CLOSE)


@pytest.mark.filterwarnings("ignore::DeprecationWarning:torch")
def test_routers_switch_inside_one_graph(make_net, three, x):
    torch._dynamo.reset()
    net = make_net(torch.float32)
    net.layers = net.layers[:1]
    narrow = {
        n: lf.Adapter({p: u.to(dtype=torch.float32) for p, u in a.modules.items() if ".0." in p})
        for n, a in three.items()
    }
    narrow["d"] = 0.5 * narrow["a"] - narrow["c"]
    live = lf.attach(net, narrow, slots=4)
    counter = CompileCounter()
    fast = torch.compile(net, backend=counter, fullgraph=True)
    found = []
    for names, top_k, temperature, c in [
        ("abc", 2, 1.0, 1.0), ("dcb", 1, 0.2, 1.0), ("abcd", 3, 4.0, -0.5), ("abc", 2, 1.0, 0.0),
        ("abc", 2, 1.0, 1.0),
    ]:  # fmt: skip
        router = lf.ArrowRouter({n: narrow[n] for n in names}, top_k, temperature)
        with live.use(router, c=c), torch.no_grad():
            found.append(fast(x))
            torch.testing.assert_close(found[-1], net(x), rtol=1e-5, atol=1e-5)
    assert counter.frame_count == 1
    assert torch.equal(found[0], found[-1])
    assert not torch.equal(found[0], found[1])
    torch._dynamo.reset()


def test_directions_are_those_of_the_dense_updates(make_update):
    updates = [
        make_update(9, 7, 3, seed=1, spectrum=[3.0, 1.0, 0.1]),
        make_update(9, 7, 1, seed=2),
        make_update(9, 7, 7, seed=3, dtype=torch.float64),
        make_update(9, 7, 2, seed=4, scale=-2.0).to(dtype=torch.bfloat16),
    ]
    found = leading_directions(updates).double()
    for v, u in zip(found, updates, strict=True):
        wanted = torch.linalg.svd(u.scale * u.B.double() @ u.A.double())[2][0]
        assert abs(float(v @ wanted)) == pytest.approx(1, abs=1e-6)
    # In any gauge and at any size.
    u = updates[0]
    for big in (1e18, 1e-18):
        v = leading_directions([lf.LowRank(u.A * big, u.B * big, u.scale)])[0].double()
        assert abs(float(v @ found[0])) == pytest.approx(1, abs=1e-6)
    assert not leading_directions([lf.LowRank(u.A, u.B, 0.0)]).any()


def test_many_adapters_of_one_module_are_read_in_blocks(make_update):
    updates = [make_update(4, 6, 1 + i % 2, seed=i) for i in range(130)]
    found = leading_directions(updates)
    assert found.shape == (130, 6)
    for i in (0, 63, 64, 129):
        alone = leading_directions([updates[i]])[0]
        assert abs(float(found[i] @ alone)) == pytest.approx(1, abs=1e-5)


def test_saved_and_loaded_equal(three, net, x, tmp_path):
    router = lf.ArrowRouter(three, top_k=1, temperature=0.3)
    router.save(tmp_path / "arrow")
    assert sorted(p.name for p in (tmp_path / "arrow").iterdir()) == [
        "router.json", "router.safetensors"
    ]  # fmt: skip
    live = lf.attach(net, three)
    with live.use(router):
        wanted = net(x)
    for again in (lf.ArrowRouter.load(tmp_path / "arrow"), load(tmp_path / "arrow")):
        assert (again.names, again.top_k, again.temperature) == (("a", "b", "c"), 1, 0.3)
        assert again.modules == router.modules
        for name in "ac":
            for module in three[name].modules:
                wanted_v = router.direction(name, module)
                assert torch.equal(again.direction(name, module), wanted_v)
        with live.use(again):
            assert torch.equal(net(x), wanted)


def test_explain_says_who_gets_how_much(three):
    router = lf.ArrowRouter(three, top_k=1)
    v = router.direction("a", "layers.0.q")
    found = router.explain({"layers.0.q": torch.stack([100 * v, 100 * v])})
    assert found["layers.0.q"]["a"] == pytest.approx(1)
    assert sum(found["layers.0.q"].values()) == pytest.approx(1)
    assert set(router.explain({"layers.0.up": torch.zeros(2, 3, 8)})["layers.0.up"]) == {"a", "c"}
    with pytest.raises(lf.MismatchError, match="knows no module 'nope'"):
        router.explain({"nope": v})
    for inputs, says in [
        ([v], "inputs are"),
        ({"layers.0.q": v.tolist()}, "vectors are a tensor"),
        ({"layers.0.q": torch.tensor(1.0)}, "vectors are a tensor"),
        ({"layers.0.q": v[:-1]}, "numbers where the router has"),
        ({"layers.0.q": v[None][:0]}, "no token"),
    ]:
        with pytest.raises(lf.MismatchError, match=says):
            router.explain(inputs)
    with pytest.raises(lf.MismatchError, match=r"of 'aa': .*did you mean 'a'"):
        router.direction("aa", "layers.0.q")
    with pytest.raises(lf.MismatchError, match="did you mean 'layers.0.q'"):
        router.direction("a", "layers.0.qq")


def test_gauges_and_orders_change_nothing(make_net, three, x):
    g = torch.Generator().manual_seed(3)

    def turned(u):
        G = torch.linalg.qr(torch.randn(u.rank, u.rank, generator=g).double())[0]
        G = G * torch.linspace(0.5, 2.0, u.rank).double()
        return lf.LowRank(torch.linalg.solve(G, u.A), u.B @ G, u.scale)

    other = {
        n: lf.Adapter({p: turned(u) for p, u in three[n].modules.items()}) for n in reversed("abc")
    }
    found = []
    for adapters in (three, other):
        net = make_net()
        live = lf.attach(net, adapters)
        with live.use(lf.ArrowRouter(adapters)), torch.no_grad():
            found.append(net(x))
    torch.testing.assert_close(*found, rtol=1e-6, atol=1e-6)


def test_adapters_that_train_leave_no_graph(three, net, x):
    grown = {
        n: lf.Adapter(
            {
                p: lf.LowRank(u.A.clone().requires_grad_(), u.B.clone().requires_grad_(), u.scale)
                for p, u in a.modules.items()
            }
        )
        for n, a in three.items()
    }
    router = lf.ArrowRouter(grown)
    assert not router.direction("a", "layers.0.q").requires_grad
    live = lf.attach(net, three)
    with live.use(router):
        found = net(x)
    with live.use(lf.ArrowRouter(three)):
        assert torch.equal(found, net(x))


def test_more_than_there_are(three, net, x):
    live = lf.attach(net, three)
    with live.use(lf.ArrowRouter(three, top_k=3)):
        wanted = net(x)
    with live.use(lf.ArrowRouter(three, top_k=10**30)):
        assert torch.equal(net(x), wanted)
    with live.use(lf.ArrowRouter({"a": three["a"]})):
        found = net(x)
    with live.use("a"):
        torch.testing.assert_close(found, net(x), **CLOSE)


def test_what_is_refused(three, net, make_adapter, shapes_of):
    for options, says in [
        ({"top_k": 0}, "top_k must be"),
        ({"top_k": True}, "top_k must be"),
        ({"temperature": 0}, "temperature must be"),
        ({"temperature": math.nan}, "temperature must be"),
    ]:
        with pytest.raises(lf.MismatchError, match=says):
            lf.ArrowRouter(three, **options)
    with pytest.raises(lf.MismatchError, match="empty"):
        lf.ArrowRouter([])
    router = lf.ArrowRouter(three)
    with pytest.raises(lf.MismatchError, match=r"live\.use\(router\) itself"):
        router(["a text"])
    live = lf.attach(net, {n: three[n] for n in "ac"})
    with pytest.raises(lf.UnknownNameError, match="'b' is attached"):
        live.use(router)
    narrow = lf.ArrowRouter({n: lf.Adapter({"layers.0.q": three[n]["layers.0.q"]}) for n in "ac"})
    with pytest.raises(lf.MismatchError, match="knows no module"):
        live.use(narrow)
    narrower = dict.fromkeys(shapes_of(net), (8, 5))
    other = {n: make_adapter(narrower, 2, seed=i) for i, n in enumerate("ac")}
    with pytest.raises(lf.MismatchError, match="inputs of 5 numbers in this router, and 8"):
        live.use(lf.ArrowRouter(other))
    with pytest.raises(lf.MismatchError, match="different bases"):
        lf.ArrowRouter({"a": three["a"], "o": other["a"]})
    assert live.active == {}
    dora = lf.Adapter(
        three["a"].modules, config={"use_dora": True, "peft_type": "LORA", "r": 4, "lora_alpha": 4}
    )
    with pytest.raises(lf.RefusedError, match="'dora'"):
        lf.ArrowRouter({"dora": dora})
    words = lf.Adapter({"e": three["a"]["layers.0.q"]}, layouts={"e": lf.Layout("embedding")})
    with pytest.raises(lf.MismatchError, match="no adapter has a linear layer"):
        lf.ArrowRouter({"words": words})


def test_damage_is_told(three, tmp_path):
    lf.ArrowRouter(three).save(tmp_path / "r")
    file = tmp_path / "r" / "router.json"
    record = json.loads(file.read_text())
    for change in (
        {"members": record["members"][:-1]},
        {"members": [[7]] * len(record["members"])},
        {"modules": [3] * len(record["modules"])},
        {"top_k": "2"},
        {"top_k": 0},
        {"temperature": 0},
        {"temperature": 10**400},
        {"modules": record["modules"][:1] * len(record["modules"])},
        {"members": [[0] * len(own) for own in record["members"]]},
        {"names": ["a", "a", "b"]},
    ):
        file.write_text(json.dumps({**record, **change}))
        with pytest.raises(lf.FileError, match=r"router\.json"):
            lf.ArrowRouter.load(tmp_path / "r")
    file.write_text(json.dumps({**record, "kind": "centroid"}))
    with pytest.raises(lf.FileError, match="kind 'centroid'"):
        lf.ArrowRouter.load(tmp_path / "r")


def test_a_library_is_a_source(make_net, make_adapter, shapes_of, x):
    shapes = shapes_of(make_net(), ["q", "up"])
    sources = {n: make_adapter(shapes, 2, seed=i) for i, n in enumerate("abc")}
    library = lf.fold(sources, form="shared", tolerance=0.3)
    router = lf.ArrowRouter(library, top_k=2)
    assert router.names == ("a", "b", "c")
    net, base = make_net(torch.float32), make_net()
    live = lf.attach(net, library)
    with live.use(router), torch.no_grad():
        found = net(x)
    wanted = referred(base, [library[n] for n in "abc"])(x)
    torch.testing.assert_close(found.double(), wanted, rtol=1e-3, atol=1e-3)


def test_layers_that_store_the_weight_transposed():
    conv1d = pytest.importorskip("transformers.pytorch_utils").Conv1D
    model = nn.Sequential(conv1d(6, 4)).double()
    adapters = {
        n: lf.Adapter({"0": lf.LowRank(torch.randn(2, 4).double(), torch.randn(6, 2).double())})
        for n in "ab"
    }
    live = lf.attach(model, adapters)
    x = torch.randn(5, 4).double()
    wanted = Reference(copy.deepcopy(model[0]), [a["0"] for a in adapters.values()], 1, 1.0, 1.0)
    with torch.no_grad(), live.use(lf.ArrowRouter(adapters, top_k=1)):
        torch.testing.assert_close(model(x), wanted(x), **CLOSE)


def test_adapters_that_call_their_modules_otherwise(net, base, three, x):
    wrapped = {n: lf.Adapter({f"model.{p}": u for p, u in three[n].modules.items()}) for n in "ac"}
    live = lf.attach(net, wrapped)
    with live.use(lf.ArrowRouter(wrapped)), torch.no_grad():
        found = net(x)
    torch.testing.assert_close(found, referred(base, [three["a"], three["c"]])(x), **CLOSE)
