"""An attached library's names mean what they meant when it was attached, cached or not."""

import copy
import pickle

import pytest
import torch

import lorafold as lf

CLOSE = {"rtol": 2e-5, "atol": 2e-5}
D = 24


@pytest.fixture(scope="module")
def wide():
    torch.manual_seed(0)
    return torch.nn.Sequential(*(torch.nn.Linear(D, D) for _ in range(2))).eval()


def members(seed, names, sides):
    """Adapters of rank 2 in common sides of 6 directions."""
    g = torch.Generator().manual_seed(seed)

    def update(m):
        U, V = sides[m]
        A, B = torch.randn(2, 6, generator=g) @ V.T / 5, U @ torch.randn(6, 2, generator=g)
        return lf.LowRank(A, B, 0.5)

    return {n: lf.Adapter({str(m): update(m) for m in range(2)}) for n in names}


def sides_of(seed):
    g = torch.Generator().manual_seed(seed)
    return [[torch.linalg.qr(torch.randn(D, 6, generator=g))[0] for _ in "UV"] for _ in range(2)]


def replaced(library):
    """Another adapter of the name, in directions that the sides lack."""
    (new,) = members(5, ["x"], sides_of(9)).values()
    library.add(new, "a1", replace=True)


def replaced_by_one_of_kin(library):
    (new,) = members(6, ["x"], sides_of(1)).values()
    library.add(new, "a1", replace=True)


def grown(library):
    for name, a in members(7, ["new", "newer"], sides_of(8)).items():
        library.add(a, name)


def removed(library):
    library.remove("a1")
    library.remove("a3")


def refolded(library):
    library.refold(tolerance=0.5)


def made_anew(library):
    """The same name for what it was not, and back in another order."""
    library.remove("a0")
    (new,) = members(8, ["x"], sides_of(9)).values()
    library.add(new, "a0")
    library.remove("a2")


CHANGES = [replaced, replaced_by_one_of_kin, grown, removed, refolded, made_anew]


def dense(wide, adapter, x):
    """The output by W + ΔW, in float64."""
    y = x.double()
    for m, layer in enumerate(wide):
        u = adapter.modules[str(m)]
        W = layer.weight.double() + u.scale * u.B.double() @ u.A.double()
        y = y @ W.T + layer.bias.double()
    return y.float()


@torch.no_grad()
@pytest.mark.parametrize("change", CHANGES, ids=lambda f: f.__name__)
@pytest.mark.parametrize("where", ["memory", "disk"])
@pytest.mark.parametrize("slots", [1, 64])
@pytest.mark.parametrize("form", ["shared", "svd"])
def test_names_mean_what_was_attached(wide, tmp_path, change, where, slots, form):
    family = members(2, [f"a{i}" for i in range(4)], sides_of(1))
    path = tmp_path / "lib" if where == "disk" else None
    library = lf.fold(family, path, form=form, tolerance=0.1)
    then = {name: library[name] for name in library}
    model = copy.deepcopy(wide)
    live = lf.attach(model, library, slots=slots)
    x = torch.randn(4, D, generator=torch.Generator().manual_seed(3))
    live.use("a1")  # in a slot, and the last to leave
    now = model(x)
    change(library)
    assert torch.equal(model(x), now)
    assert live.names == list(then)
    for name in ("a1", "a0", "a1", "a3", "a2"):
        with live.use(name):
            torch.testing.assert_close(model(x), dense(wide, then[name], x), **CLOSE)
        assert live.adapter(name).digest == then[name].digest
    if slots > 1:
        with live.use(["a1", "a3", None, "a1"]):
            y = model(x)
        for i, name in ((0, "a1"), (1, "a3"), (3, "a1")):
            torch.testing.assert_close(y[i], dense(wide, then[name], x)[i], **CLOSE)
    live.use("a1")
    assert live.verify(x) < 1e-4
    for name in set(library) - set(then):
        with pytest.raises(lf.UnknownNameError):
            live.use(name)
    live.detach()

    again = lf.attach(model, library, slots=slots)  # what it is now, it is for whoever attaches now
    assert again.names == library.names
    for name in library:
        with again.use(name):
            torch.testing.assert_close(model(x), dense(wide, library[name], x), **CLOSE)


@torch.no_grad()
def test_what_came_later_is_added_by_name(wide):
    library = lf.fold(members(2, ["a0", "a1"], sides_of(1)), form="shared", tolerance=0.1)
    model = copy.deepcopy(wide)
    live = lf.attach(model, library, slots=2)
    x = torch.randn(4, D, generator=torch.Generator().manual_seed(3))
    live.use("a0")
    grown(library)
    live.add(library["new"], "new")
    (other,) = members(12, ["x"], sides_of(4)).values()
    live.add(other, "a1", replace=True)
    wider = lf.Adapter({"0": lf.LowRank(torch.randn(9, D) / 9, torch.randn(D, 9) / 9)})
    live.add(wider, "wider")  # of a larger rank than any other: the slots of a library grow
    for name, a in (("new", library["new"]), ("a1", other), ("a0", library["a0"])):
        with live.use(name):
            torch.testing.assert_close(model(x), dense(wide, a, x), **CLOSE)
    with live.use("wider"):
        assert live.verify(x) < 1e-4


@torch.no_grad()
def test_another_writer_of_the_folder_changes_nothing(wide, tmp_path):
    library = lf.fold(members(2, ["a0", "a1"], sides_of(1)), tmp_path / "lib", form="shared")
    then = library["a1"]
    model = copy.deepcopy(wide)
    live = lf.attach(model, library, slots=1)
    x = torch.randn(4, D, generator=torch.Generator().manual_seed(3))
    with lf.Library.open(tmp_path / "lib") as other:
        replaced(other)
        other.remove("a0")
    library.remove("a1")  # which has this object read what the other one wrote
    live.use("a1")
    torch.testing.assert_close(model(x), dense(wide, then, x), **CLOSE)


@torch.no_grad()
def test_copies_keep_the_state_that_was_attached(wide, tmp_path):
    library = lf.fold(members(2, ["a0", "a1"], sides_of(1)), tmp_path / "lib", form="shared")
    then = library["a1"]
    model = copy.deepcopy(wide)
    live = lf.attach(model, library, slots=1)
    live.use("a0")
    twin, again = copy.deepcopy(model), pickle.loads(pickle.dumps(model))
    late = pickle.dumps(model)
    x = torch.randn(4, D, generator=torch.Generator().manual_seed(3))
    replaced(library)
    for net in (twin, again):
        lf.Live.of(net).use("a1")
        torch.testing.assert_close(net(x), dense(wide, then, x), **CLOSE)
    net = pickle.loads(late)  # its library is found by the path, where another state is now
    with pytest.raises(lf.MismatchError, match="was changed after the model .* was pickled"):
        lf.Live.of(net).use("a1")
    with pytest.raises(lf.MismatchError, match="attach it again"):
        lf.Live.of(net).adapter("a1")
    torch.testing.assert_close(net(x), model(x), **CLOSE)  # what was in a slot runs on
