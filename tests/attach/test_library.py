"""A library runs as the adapters that it gives back would, and reads what it is asked for."""

import copy
import gc
import pickle

import pytest
import torch
import torch._dynamo.testing

import lorafold as lf


@pytest.fixture(scope="module")
def wide():
    """A stack of linear layers of width 48, float32."""
    torch.manual_seed(0)
    return torch.nn.Sequential(*(torch.nn.Linear(48, 48) for _ in range(3))).eval()


@pytest.fixture(scope="module")
def family(wide):
    """20 adapters on common sides of 12 directions, of ranks 2 to 4."""
    g = torch.Generator().manual_seed(1)
    sides = [[torch.linalg.qr(torch.randn(48, 12, generator=g))[0] for _ in "UV"] for _ in range(3)]

    def update(m, r):
        U, V = sides[m]
        A = torch.randn(r, 12, generator=g) @ V.T
        return lf.LowRank(A / 7, U @ torch.randn(12, r, generator=g), 0.5)

    return {
        f"a{i}": lf.Adapter({str(m): update(m, 2 + i % 3) for m in range(3)}) for i in range(20)
    }


def merged_output(wide, adapter, x, c=1.0):
    model = copy.deepcopy(wide)
    model.load_state_dict((c * adapter).apply_to(wide.state_dict()))
    with torch.no_grad():
        return model(x)


@pytest.mark.parametrize("form", ["shared", "input", "output", "svd", "exact", "auto"])
def test_every_form_runs_as_what_it_gives_back(wide, family, form):
    library = lf.fold(family, form=form)
    model = copy.deepcopy(wide)
    live = lf.attach(model, library, slots=3)
    x = torch.randn(4, 5, 48)
    for name in ("a0", "a7", "a19", "a3", "a0"):  # more than there are slots
        with live.use(name, c=0.5):
            y = model(x).detach()
        torch.testing.assert_close(
            y, merged_output(wide, library[name], x, 0.5), atol=2e-5, rtol=2e-5
        )
    with live.use(["a5", None, {"a6": 1.0, "a5": -0.5}, "a5"], c=[1, 1, 1, 0]):
        y = model(x).detach()
    mix = library["a6"] - 0.5 * library["a5"]
    for i, a in ((0, library["a5"]), (2, mix)):
        torch.testing.assert_close(y[i], merged_output(wide, a, x)[i], atol=2e-5, rtol=2e-5)
    with torch.no_grad():
        assert torch.equal(y[1], wide(x)[1])
        assert torch.equal(y[3], wide(x)[3])


def test_shared_sides_are_not_multiplied_out(wide, family, monkeypatch):
    library = lf.fold(family, form="shared", rank=12)
    model = copy.deepcopy(wide)

    def reconstructed(*_):
        raise AssertionError("an update was reconstructed")

    for name in ("__getitem__", "update"):
        monkeypatch.setattr(lf.Library, name, reconstructed)
    monkeypatch.setattr(lf.LowRank, "dense", reconstructed)
    live = lf.attach(model, library, slots=4)
    live.use(["a0", "a1", "a2", "a3"])
    model(torch.randn(4, 1, 48))
    (bank,) = live._state.slots.patches["0"].banks.values()
    assert bank.U.shape == (48, 12)
    assert bank.V.shape == (48, 12)
    assert bank.A.shape[2] == bank.Bt.shape[2] == 12  # cores, not factors of 48
    with pytest.raises(AssertionError, match="reconstructed"):  # the watch works
        live.adapter("a0")


def test_a_residual_of_its_own_runs_too(wide, family):
    library = lf.fold(family, form="shared", tolerance=0.05)
    g = torch.Generator().manual_seed(9)
    odd = lf.Adapter(
        {"1": lf.LowRank(torch.randn(3, 48, generator=g), torch.randn(48, 3, generator=g) / 7)}
    )
    library.add(odd, "odd", tolerance=0.01)
    model = copy.deepcopy(wide)
    live = lf.attach(model, library)
    x = torch.randn(2, 48)
    live.use("odd")
    with torch.no_grad():
        y = model(x)
    torch.testing.assert_close(y, merged_output(wide, library["odd"], x), atol=5e-5, rtol=2e-5)
    assert live.verify(x) < 1e-4


def test_rank_prefixes_run_through_all_parts(wide, family):
    library = lf.fold(family, form="svd", tolerance=0.01)
    model = copy.deepcopy(wide)
    live = lf.attach(model, library)
    x = torch.randn(2, 48)
    folded = library["a2"]  # balanced: strongest direction first
    cut = lf.Adapter({p: u.prefix(min(2, u.rank)) for p, u in folded.modules.items()})
    with live.use("a2", rank=2), torch.no_grad():
        y = model(x)
    torch.testing.assert_close(y, merged_output(wide, cut, x), atol=2e-5, rtol=2e-5)


def test_slots_follow_the_bytes_they_may_take(wide, family):
    library = lf.fold(family, form="svd")
    live = lf.attach(copy.deepcopy(wide), library, cache=20_000)
    capacity = live._state.slots.capacity
    live.detach()
    assert 1 <= capacity < 20
    assert lf.attach(copy.deepcopy(wide), library, cache="1GiB")._state.slots.capacity == 20
    with pytest.raises(lf.MismatchError, match="holds no adapter"):
        lf.attach(copy.deepcopy(wide), library, cache=10)
    with pytest.raises(lf.MismatchError, match="give one of them"):
        lf.attach(copy.deepcopy(wide), library, cache="1GiB", slots=2)
    with pytest.raises(lf.MismatchError, match="limits what is read of a Library"):
        lf.attach(copy.deepcopy(wide), family["a0"], cache="1GiB")


def test_graphs_do_not_grow_with_the_names(wide, family):
    library = lf.fold(family, form="shared", rank=12)
    model = copy.deepcopy(wide)
    live = lf.attach(model, library, slots=4)
    torch._dynamo.reset()
    counter = torch._dynamo.testing.CompileCounter()
    compiled = torch.compile(model, backend=counter, fullgraph=True)
    x = torch.randn(2, 48)
    with torch.no_grad():
        for names in (["a0", "a1"], ["a7", "a0"], ["a9", None], ["a3", "a3"]):
            live.use(names)
            torch.testing.assert_close(compiled(x), model(x), atol=2e-5, rtol=2e-5)
    assert counter.frame_count == 1


def test_what_can_not_run_is_refused_and_leaves_all_as_it_was(wide, family):
    tensors = {"base_model.model.0.lora_magnitude_vector": torch.ones(48)}
    dora = lf.Adapter(dict(family["a0"].modules), tensors, {"use_dora": True})
    library = lf.fold({"plain": family["a1"], "dora": dora})
    model = copy.deepcopy(wide)
    live = lf.attach(model, library)
    live.use("plain")
    x = torch.randn(2, 48)
    y = model(x)
    with pytest.raises(lf.RefusedError, match="dora"):
        live.use("dora")
    assert live.active == {"plain": 1.0}
    assert torch.equal(model(x), y)
    live.detach()
    with pytest.raises(lf.MismatchError, match="none of the 3 modules of the library"):
        lf.attach(torch.nn.ModuleDict({"other": torch.nn.Linear(48, 48)}), library)
    small = torch.nn.Sequential(*(torch.nn.Linear(32, 32) for _ in range(3)))
    with pytest.raises(lf.MismatchError, match="belongs to another base"):
        lf.attach(small, library)
    assert type(small[0]) is torch.nn.Linear


def test_models_with_a_library_can_be_copied(make_update, tmp_path):
    adapters = {n: lf.Adapter({"0": make_update(4, 8, 2, seed=i)}) for i, n in enumerate("ab")}
    x = torch.randn(3, 8)
    for where in (None, tmp_path / "lib"):
        model = torch.nn.Sequential(torch.nn.Linear(8, 4))
        live = lf.attach(model, lf.fold(adapters, where), slots=1)
        live.use("a")
        twin = copy.deepcopy(model)
        lf.Live.of(twin).use("b")  # loads it
        live.use("b")
        assert torch.equal(twin(x), model(x))
        if where is None:
            with pytest.raises(lf.MismatchError, match="save it to a folder"):
                pickle.dumps(model)
        else:
            again = pickle.loads(pickle.dumps(model))
            lf.Live.of(again).use("a")
            live.use("a")
            assert torch.equal(again(x), model(x))
        del twin
        gc.collect()
        live.use("b")  # its files are still open


def test_what_is_not_for_a_library_is_refused(make_update):
    lib = lf.fold({"a": lf.Adapter({"0": make_update(4, 8, 2, seed=0)})})
    for options in ({"trainable": True}, {"max_rank": 4}):
        with pytest.raises(lf.MismatchError, match="is not for a Library"):
            lf.attach(torch.nn.Sequential(torch.nn.Linear(8, 4)), lib, **options)


def test_the_path_of_a_library_is_one(make_update, tmp_path):
    adapters = {n: lf.Adapter({"0": make_update(4, 8, 2, seed=i)}) for i, n in enumerate("ab")}
    lf.fold(adapters, tmp_path / "lib").close()
    model = torch.nn.Sequential(torch.nn.Linear(8, 4))
    live = lf.attach(model, str(tmp_path / "lib"))
    assert live.names == ["a", "b"]
    live.detach()
    live = lf.attach(model, str(tmp_path / "lib") + ":b")
    assert live.names == ["default"]
    assert live.adapter("default").distance(adapters["b"]) <= 0.1 * adapters["b"].norm()
