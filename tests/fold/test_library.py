"""A library that changes: what is added, removed and folded anew, and what must not move."""

import builtins
import json
import multiprocessing
import os
import shutil
import threading
import warnings

import pytest
import torch

import lorafold as lf
from lorafold.errors import FileError, MismatchError, RefusedError, ToleranceError, UnknownNameError
from lorafold.fold.options import FORMS
from lorafold.fold.store import compaction

SHAPES = {"q": (48, 32), "v": (32, 64)}


def dense(u):
    return u.scale * (u.B.double() @ u.A.double())


def dense_error(a, b):
    assert a.modules.keys() == b.modules.keys()
    lost = sum(float((dense(u) - dense(b[p])).square().sum()) for p, u in a.modules.items())
    total = sum(float(dense(u).square().sum()) for u in a.modules.values())
    return (lost / total) ** 0.5 if total > 0 else lost**0.5


@pytest.fixture(scope="module")
def family(make_adapter):
    """kin(i): adapters that share most of both sides, in one gauge, with a little of their own."""
    start = make_adapter(SHAPES, 4, seed=1)

    def kin(i, own=0.05):
        other = make_adapter(SHAPES, 4, seed=100 + i)
        g = torch.Generator().manual_seed(i)
        modules = {}
        for p, u in other.modules.items():
            t = torch.randn(2, generator=g)
            A = start[p].A + 0.3 * t[0] * start[p].A.roll(1, 0) + own * u.A
            B = start[p].B + 0.3 * t[1] * start[p].B.roll(1, 1) + own * u.B
            modules[p] = lf.LowRank(A, B, 2.0)
        return lf.Adapter(modules)

    return kin


@pytest.fixture(scope="module")
def members(family):
    return {f"a{i}": family(i) for i in range(5)}


@pytest.fixture(scope="module")
def stranger(make_adapter):
    return make_adapter(SHAPES, 4, seed=77)


def tensors_of(lib, names=None):
    """Everything that the adapters of a library are made of."""
    found = {}
    for name in names or lib.names:
        for p, u in lib[name].modules.items():
            found[name, p] = (u.A.clone(), u.B.clone(), u.scale)
        for key, t in lib[name].extras.items():
            found[name, key] = (t.clone(),)
    return found


def records_of(lib, names):
    """The stored bytes themselves, bases included."""
    c = lib.contents
    found = {n: [c.record(j, c.entry(n)) for j in c.present(c.entry(n))] for n in names}
    for j, m in enumerate(c.modules):
        for name, pieces in m.bases.items():
            for k, piece in enumerate(pieces):
                found[j, name, k] = c.store.shards[piece.shard].read_bytes(piece.tensor)
    return found


def assert_unmoved(before, after):
    for key, values in before.items():
        for x, y in zip(values, after[key], strict=True):
            if isinstance(x, torch.Tensor):
                assert torch.equal(x, y), key
            else:
                assert x == y, key


# add


@pytest.mark.parametrize("where", ["memory", "disk"])
@pytest.mark.parametrize("form", FORMS)
def test_adding_keeps_the_bound_and_moves_nobody(tmp_path, members, family, stranger, form, where):
    path = tmp_path / "lib" if where == "disk" else None
    lib = lf.fold(members, path, tolerance=0.1, form=form)
    before, records = tensors_of(lib), records_of(lib, lib.names)
    newcomers = {"kin": family(50), "near": family(51, own=0.3), "stranger": stranger}
    for name, a in newcomers.items():
        error = lib.add(a, name)
        assert error == lib.error(name)
        true = dense_error(a, lib[name])
        assert true <= 0.1
        assert abs(true - error) < 1e-5
    assert lib.names == [*members, *newcomers]
    for look in [lib, lf.Library.open(path)] if path else [lib]:
        assert_unmoved(before, tensors_of(look, list(members)))
        assert_unmoved(records, records_of(look, list(members)))
        assert look.verify({**members, **newcomers}).keys() == set(look.names)


@pytest.mark.parametrize("form", ["shared", "input", "output", "flat"])
def test_kin_are_stored_as_coordinates_alone(members, family, form):
    lib = lf.fold(members, tolerance=0.1, form=form)
    bases = {m["path"]: m["ranks"] for m in lib.stats()["modules"]}
    size = {}
    for name, options in (("shared", {}), ("own", {"form": "svd"})):
        lib.add(family(60, own=0.02), name, **options)
        size[name] = lib.entry(name)["bytes"]
        assert lib.error(name) <= 0.1
    assert {m["path"]: m["ranks"] for m in lib.stats()["modules"]} == bases
    assert size["shared"] < size["own"]


def test_new_directions_are_appended_and_shared_from_then_on(make_adapter):
    """A known A with a new B: the second adapter on that B costs its coordinates alone."""
    shapes = {"m": (512, 256)}
    old, new = make_adapter(shapes, 8, seed=1), make_adapter(shapes, 8, seed=2)

    def on(A, B, i):
        g = torch.Generator().manual_seed(i)
        return lf.Adapter({"m": lf.LowRank(torch.randn(8, 8, generator=g) @ A["m"].A, B["m"].B)})

    def size(name):
        return lib.entry(name)["bytes"]

    lib = lf.fold({f"o{i}": on(old, old, i) for i in range(6)}, tolerance=0.1, form="shared")
    before = tensors_of(lib)
    assert lib.stats()["modules"][0]["ranks"] == {"U0": 8, "V0": 8}
    assert lib.project(on(old, new, 20)).error > 0.9
    lib.add(on(old, new, 20), "n0")
    # A residual of its own would need both sides at full width.
    assert lib.stats()["modules"][0]["ranks"] == {"U0": 16, "V0": 8}
    assert lib.project(on(old, new, 21)).error < 0.1
    lib.add(on(old, new, 21), "n1")
    assert lib.stats()["modules"][0]["ranks"] == {"U0": 16, "V0": 8}
    assert max(size("n0"), size("n1")) < 2 * size("o0")
    # Nothing in common with anybody: appending both sides would cost more than its own.
    lib.add(on(new, make_adapter(shapes, 8, seed=3), 22), "own")
    assert lib.stats()["modules"][0]["ranks"] == {"U0": 16, "V0": 8}
    assert size("own") > 10 * size("n1")
    for name, a in {"n0": on(old, new, 20), "n1": on(old, new, 21)}.items():
        assert dense_error(a, lib[name]) <= 0.1
    assert_unmoved(before, tensors_of(lib, [f"o{i}" for i in range(6)]))


@pytest.mark.parametrize("form", FORMS)
def test_a_projection_has_the_error_of_each_module(members, make_adapter, form):
    """As of what comes out of the bases, and with it whether the bases cover the adapter."""
    lib = lf.fold(members, tolerance=0.1, form=form)
    a, new = members["a0"], make_adapter(SHAPES, 4, seed=77)
    for adapter in (a, new):
        found = lib.project(adapter)
        assert set(found.errors) == set(adapter)
        squares = {p: (found.errors[p] * u.norm()) ** 2 for p, u in adapter.modules.items()}
        assert sum(squares.values()) ** 0.5 == pytest.approx(found.error * adapter.norm(), rel=1e-4)
        for path in set(adapter) - set(found.loadings):
            assert found.errors[path] == 1
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        lib.project(new)
        lib.project(new, warn=0)
        lib.project(0.0 * new, warn=1)
    covered = 1 - lib.project(new).error
    with pytest.warns(UserWarning, match=r"shared bases cover .*less than .*Library\.add"):
        lib.project(new, warn=min(1.0, max(0.01, covered + 0.01)))
    for share in (-0.1, 1.1, float("nan"), "half", True):
        with pytest.raises(MismatchError, match="warn must be a share"):
            lib.project(new, warn=share)


@pytest.mark.parametrize("form", FORMS)
def test_a_zero_update_can_be_added(members, form):
    lib = lf.fold(members, tolerance=0.1, form=form)
    modules = dict(members["a0"].modules)
    modules["q"] = lf.LowRank(modules["q"].A, 0 * modules["q"].B)
    zero = {p: lf.LowRank(u.A, 0 * u.B) for p, u in modules.items()}
    assert lib.add(lf.Adapter(modules), "half") <= 0.1
    assert lib.add(lf.Adapter(zero), "zero") == 0
    assert dense_error(lf.Adapter(modules), lib["half"]) <= 0.1
    assert lib["zero"].norm() == 0
    assert lib.project(lf.Adapter(zero)).error == 0
    assert lib.verify({"zero": lf.Adapter(zero)}) == {"zero": 0}


def test_a_name_is_taken_until_replaced(members, family):
    lib = lf.fold(members, tolerance=0.1)
    before = tensors_of(lib)
    with pytest.raises(MismatchError, match="already has an adapter 'a0'.*replace=True"):
        lib.add(family(9), "a0")
    assert_unmoved(before, tensors_of(lib))
    lib.add(family(9), "a0", replace=True)
    assert len(lib) == 5
    assert dense_error(family(9), lib["a0"]) <= 0.1
    assert_unmoved({k: v for k, v in before.items() if k[0] != "a0"}, tensors_of(lib))


def test_names_on_the_way_in(tmp_path, members, family):
    lib = lf.fold(members, tolerance=0.1)
    lf.save(family(9), tmp_path / "sql")
    lib.add(tmp_path / "sql")
    lib.add(str(tmp_path / "sq?"), "by a glob")
    assert lib.names[-2:] == ["sql", "by a glob"]
    with pytest.raises(MismatchError, match="needs a name"):
        lib.add(family(9))
    with pytest.raises(MismatchError, match="needs a name"):
        lib.add(family(9), "")
    lf.save(family(8), tmp_path / "other")
    with pytest.raises(MismatchError, match="one adapter at a time"):
        lib.add(tmp_path)
    with pytest.raises(FileError, match="nowhere"):
        lib.add(tmp_path / "nowhere")


@pytest.mark.parametrize("call", ["__getitem__", "error", "remove", "entry"])
def test_an_unknown_name_lists_near_ones(members, call):
    lib = lf.fold({"sql-writer": members["a0"], "poet": members["a1"]}, tolerance=0.3)
    with pytest.raises(UnknownNameError, match="no adapter 'sql-writr'.*'sql-writer'"):
        getattr(lib, call)("sql-writr")
    with pytest.raises(UnknownNameError, match="2: 'poet', 'sql-writer'"):
        getattr(lib, call)("zzz")
    with pytest.raises(UnknownNameError, match="no module 'w'"):
        lib.update("poet", "w")
    assert "sql-writr" not in lib
    assert lib.names == ["sql-writer", "poet"]


def test_what_does_not_fit_is_refused_and_changes_nothing(tmp_path, members, make_adapter):
    lib = lf.fold(members, tmp_path / "lib", tolerance=0.1)
    files = sorted(os.listdir(tmp_path / "lib"))
    cases = [
        (
            {"adapter": make_adapter({"q": (48, 30)})},
            MismatchError,
            r"'q' is \(48, 32\).*\(48, 30\)",
        ),
        ({"adapter": members["a0"], "tolerance": -0.1}, MismatchError, "tolerance must lie"),
        ({"adapter": members["a0"], "tolerance": 2}, MismatchError, "tolerance must lie"),
        ({"adapter": members["a0"], "form": "tucker"}, MismatchError, "'svd' or 'exact'"),
    ]
    for arguments, error, message in cases:
        with pytest.raises(error, match=message):
            lib.add(name="new", **arguments)
        assert lib.names == list(members)
        assert sorted(os.listdir(tmp_path / "lib")) == files
    based = lf.fold({"a": make_adapter(SHAPES, base_model="llama")}, tolerance=0.1)
    with pytest.raises(MismatchError, match="'new' belongs to base 'qwen', the library to 'llama'"):
        based.add(make_adapter(SHAPES, base_model="qwen"), "new")


def test_a_refused_adapter_is_stored_exactly(members, make_adapter):
    lib = lf.fold(members, tolerance=0.1)
    magnitude = {"base_model.model.q.lora_magnitude_vector": torch.rand(48)}
    dora = make_adapter(SHAPES, 4, seed=5, config={"use_dora": True}, extras=magnitude)
    assert lib.add(dora, "dora") == 0
    back = lib["dora"]
    assert back.digest == dora.digest
    assert back.config == dora.config
    assert back.refusal
    with pytest.raises(RefusedError, match="DoRA"):
        lib.project(dora)
    assert lib.verify({**members, "dora": dora})["dora"] == 0
    with pytest.raises(ToleranceError, match="stored exactly"):
        lib.verify({"dora": make_adapter(SHAPES, 4, seed=6, config={"use_dora": True})})


def test_ways_of_one_s_own(members, stranger):
    lib = lf.fold(members, tolerance=0.1, form="shared")
    lib.add(stranger, "exact", form="exact")
    lib.add(stranger, "tight", tolerance=0.01)
    lib.add(stranger, "loose", tolerance=0.5)
    lib.add(stranger, "zero", tolerance=0)
    for name, bound in {"exact": 0, "tight": 0.01, "loose": 0.5, "zero": 0}.items():
        assert dense_error(stranger, lib[name]) <= bound
    assert lib["exact"].digest == lib["zero"].digest == stranger.digest
    assert lib.verify({"loose": stranger})["loose"] > 0.1
    assert lib.verify({"tight": stranger})["tight"] <= 0.01


@pytest.mark.parametrize(("form", "size"), [
    ("shared", {"rank": 6}), ("input", {"rank": 6}), ("flat", {"rank": 3}), ("svd", {"rank": 2}),
    ("shared", {"energy": 0.9}), ("svd", {"bits": 3}), ("shared", {"rank": 5, "bits": 4}),
])  # fmt: skip
def test_a_library_folded_by_size_only_projects(members, family, stranger, form, size):
    lib = lf.fold(members, form=form, **size)
    ranks = [m["ranks"] for m in lib.stats()["modules"]]
    before = tensors_of(lib)
    near = lf.Adapter(
        {
            p: lf.LowRank(u.A + stranger[p].A, u.B + stranger[p].B, 2.0)
            for p, u in family(71).items()
        }
    )
    for name, a in {"kin": family(70), "near": near}.items():
        stated = lib.add(a, name)
        assert abs(stated - dense_error(a, lib[name])) < 1e-4
        assert abs(lib.verify({name: a})[name] - stated) < 1e-4
    if form != "svd":
        assert lib.error("near") > 0.5 > lib.error("kin")
    if form in ("shared", "flat"):  # of a stranger, `input` keeps what its own outputs hold
        with pytest.raises(ToleranceError, match="its bases hold next to nothing of it"):
            lib.add(stranger, "stranger")
        assert "stranger" not in lib
    assert [m["ranks"] for m in lib.stats()["modules"]] == ranks
    assert_unmoved(before, tensors_of(lib, list(members)))


def test_modules_that_the_library_lacks_and_ones_that_the_newcomer_lacks(
    tmp_path, members, make_adapter
):
    lib = lf.fold(members, tmp_path / "lib", tolerance=0.1)
    before = tensors_of(lib)
    new = make_adapter({"q": (48, 32), "mlp.up": (96, 32), "mlp.down": (32, 96)}, 4, seed=3)
    lib.add(new, "new")
    lib.add(make_adapter({"mlp.up": (96, 32)}, 2, seed=4), "second")
    for look in (lib, lf.Library.open(tmp_path / "lib")):
        assert set(look["new"]) == set(new)
        assert dense_error(new, look["new"]) <= 0.1
        assert list(look["second"]) == ["mlp.up"]
        assert set(look["a0"]) == set(SHAPES)
        counts = {m["path"]: m["adapters"] for m in look.stats()["modules"]}
        assert counts == {"q": 6, "v": 5, "mlp.up": 2, "mlp.down": 1}
        assert_unmoved(before, tensors_of(look, list(members)))
    with pytest.raises(UnknownNameError, match="'a0' has no module 'mlp.up'"):
        lib.update("a0", "mlp.up")


def test_extras_config_and_another_rank_come_along(members, make_adapter):
    lib = lf.fold(members, tolerance=0.1, form="flat")
    extras = {"base_model.model.score.weight": torch.arange(4, dtype=torch.bfloat16)}
    new = make_adapter(SHAPES, 7, seed=3, extras=extras, config={"r": 7, "note": [1, {"a": None}]})
    lib.add(new, "new")
    assert dense_error(new, lib["new"]) <= 0.1
    assert lib["new"].config == new.config
    assert torch.equal(
        lib["new"].extras["base_model.model.score.weight"], next(iter(extras.values()))
    )
    assert lib["a0"].config == {}


# project


@pytest.mark.parametrize("form", ["shared", "input", "output", "svd"])
def test_a_projection_is_the_dense_least_squares_fit(members, family, form):
    lib = lf.fold(members, form=form, rank=6)
    before = tensors_of(lib)
    a = family(80, own=0.5)
    p = lib.project(a)
    assert 0 < p.error <= 1
    total = lost = 0.0
    for j, m in enumerate(lib.contents.modules):
        W = dense(a[m.path])
        sides = lib.contents.sides(j)
        fit, coordinates = W, W
        for side in "UV":
            if sides[side]:
                X = sides[side][0].columns.double()
                solve = torch.linalg.pinv(X)
                fit = X @ solve @ fit if side == "U" else fit @ (X @ solve).T
                coordinates = solve @ coordinates if side == "U" else coordinates @ solve.T
        if form == "svd":
            assert p.loadings == {}
            fit = torch.zeros_like(W)
        else:
            loadings = p.loadings[m.path].double()
            torch.testing.assert_close(loadings, coordinates, atol=1e-4, rtol=1e-3)
        lost += float((W - fit).square().sum())
        total += float(W.square().sum())
    assert abs(p.error - (lost / total) ** 0.5) < 1e-5
    assert_unmoved(before, tensors_of(lib))
    assert lib.names == list(members)


# remove


def test_a_removed_name_is_free_again(tmp_path, members, stranger):
    lib = lf.fold(members, tmp_path / "lib", tolerance=0.1)
    before = tensors_of(lib)
    lib.remove("a2")
    assert "a2" not in lib
    assert lib.names == ["a0", "a1", "a3", "a4"]
    with pytest.raises(UnknownNameError):
        lib["a2"]
    assert_unmoved({k: v for k, v in before.items() if k[0] != "a2"}, tensors_of(lib))
    lib.add(stranger, "a2")
    assert dense_error(stranger, lib["a2"]) <= 0.1
    opened = lf.Library.open(tmp_path / "lib")
    assert opened.names == ["a0", "a1", "a3", "a4", "a2"]
    for name in opened.names:
        opened.remove(name)
    assert len(opened) == 0
    assert opened.stats()["adapters"] == 0
    opened.add(stranger, "again")
    assert dense_error(stranger, lf.Library.open(tmp_path / "lib")["again"]) <= 0.1


def test_removed_bytes_are_given_back_in_the_end(tmp_path, make_adapter):
    lib = lf.fold(
        {str(i): make_adapter(SHAPES, 4, seed=i) for i in range(12)},
        tmp_path / "lib",
        tolerance=0.1,
    )
    full = lib.nbytes
    keep = tensors_of(lib, ["3"])
    for i in (0, 1, 2, *range(4, 12)):
        lib.remove(str(i))
    assert lib.nbytes < 0.35 * full
    assert_unmoved(keep, tensors_of(lib))
    on_disk = sum(p.stat().st_size for p in (tmp_path / "lib").iterdir())
    assert on_disk == lib.nbytes


# refold


@pytest.mark.parametrize("options", [
    {"tolerance": 0.02}, {"tolerance": 0.3}, {"form": "svd"}, {"form": "shared", "tolerance": 0.05},
    {"rank": 2, "form": "svd"}, {"bits": 4}, {"energy": 0.8}, {"memory": "64KiB"}, {"tolerance": 0},
    {"form": "exact"}, {"device": "cpu", "progress": lambda *_: None}, {},
])  # fmt: skip
def test_refolding_from_the_sources_is_folding(tmp_path, members, options):
    lib = lf.fold(members, tmp_path / "lib", tolerance=0.1, form="input")
    lib.refold(sources=members, **options)
    fresh = {k: v for k, v in options.items() if k not in ("memory", "progress", "device")}
    sizes = {"tolerance", "rank", "bits", "energy"} & set(options)
    fresh = {"form": "input", **({} if sizes else {"tolerance": 0.1}), **fresh}
    if fresh["form"] == "exact":
        fresh.pop("tolerance")
    expected = lf.fold(members, **fresh)
    assert_unmoved(tensors_of(expected), tensors_of(lib))
    assert lib.tolerance == expected.tolerance
    for name, a in members.items():
        assert abs(lib.error(name) - dense_error(a, lib[name])) < 1e-5
    assert_unmoved(tensors_of(expected), tensors_of(lf.Library.open(tmp_path / "lib")))


@pytest.mark.parametrize("form", ["svd", "shared", "auto"])
def test_refolding_without_the_sources_sums_the_errors(members, form):
    lib = lf.fold(members, tolerance=0.05, form=form)
    old = {n: lib.error(n) for n in members}
    lib.refold(tolerance=0.3)
    assert lib.tolerance == 0.3
    for name, a in members.items():
        true = dense_error(a, lib[name])
        assert true <= lib.error(name) <= 0.3 + 1e-9  # what is stated is a bound
        assert lib.error(name) >= old[name]
        assert lib.entry(name)["digest"] == a.digest
    # The bound that it keeps is the one that was asked for, not what the old error left of it.
    assert lib.verify(members).keys() == members.keys()


def test_a_bound_that_cannot_be_met_changes_nothing(tmp_path, members):
    lib = lf.fold(members, tmp_path / "lib", tolerance=0.1, form="svd")
    lib.remove("a4")  # so that the lock file is there
    raw, files = (
        (tmp_path / "lib" / "library.json").read_bytes(),
        sorted(os.listdir(tmp_path / "lib")),
    )
    for tolerance in (0.05, 0.01, 0):
        with pytest.raises(ToleranceError, match="'a0' is stored with error.*give sources="):
            lib.refold(tolerance=tolerance)
        assert (tmp_path / "lib" / "library.json").read_bytes() == raw
        assert sorted(os.listdir(tmp_path / "lib")) == files
    with pytest.raises(ToleranceError):
        lib.refold(form="exact")
    for name in lib:
        assert dense_error(members[name], lib[name]) <= 0.1


def test_refolding_needs_all_sources_and_good_options(members, stranger):
    lib = lf.fold(members, tolerance=0.1)
    some = {n: a for n, a in members.items() if n != "a3"}
    with pytest.raises(MismatchError, match="'a3'"):
        lib.refold(sources=some)
    with pytest.raises(MismatchError, match="'extra'"):
        lib.refold(sources={**members, "extra": stranger})
    with pytest.raises(MismatchError, match="exclude"):
        lib.refold(tolerance=0.1, rank=3)
    with pytest.raises(MismatchError, match="retention"):
        lib.refold(retention=0.9, score=lambda name, a: 1.0)
    assert lib.names == list(members)


def test_refolding_keeps_order_bounds_and_exact_ones(members, stranger, make_adapter):
    lib = lf.fold(members, tolerance=0.1, form="svd")
    dora = make_adapter(SHAPES, 4, seed=5, config={"use_dora": True})
    everyone = {**members, "dora": dora, "loose": stranger, "tight": stranger}
    lib.add(dora, "dora")
    lib.add(stranger, "loose", tolerance=0.4)
    lib.add(stranger, "tight", tolerance=0.02)
    lib.refold(sources=everyone)
    assert lib.names == list(everyone)
    assert lib["dora"].digest == dora.digest
    assert 0.2 < dense_error(stranger, lib["loose"]) <= 0.4
    assert dense_error(stranger, lib["tight"]) <= 0.02
    lib.add(members["a0"], "exact", form="exact")
    everyone["exact"] = members["a0"]
    lib.refold()  # nothing but what is stored
    assert lib["dora"].digest == dora.digest
    assert dense_error(stranger, lib["loose"]) <= lib.error("loose") <= 0.4 + 1e-9
    assert dense_error(stranger, lib["tight"]) <= lib.error("tight") <= 0.02 + 1e-9
    assert lib["exact"].digest == members["a0"].digest
    lib.refold(tolerance=0.45)  # a bound that is named is everybody's
    assert lib["exact"].digest != members["a0"].digest
    assert "tolerance" not in lib.entry("tight")
    assert lib.verify(everyone).keys() == everyone.keys()


# verify


def test_a_flipped_byte_is_found(tmp_path, members):
    lib = lf.fold(members, tmp_path / "lib", tolerance=0.1)
    assert lib.verify() == {n: lib.error(n) for n in members}
    shard = next((tmp_path / "lib").glob("shard-*"))
    data = shard.read_bytes()
    places = {len(data) - 1, len(data) // 2, int.from_bytes(data[:8], "little") + 9}
    for place in places:
        shard.write_bytes(data[:place] + bytes([data[place] ^ 4]) + data[place + 1 :])
        with (
            pytest.raises(FileError, match=r"shard-\w+"),
            lf.Library.open(tmp_path / "lib") as damaged,
        ):
            damaged.verify()
    # A changed header or length is noticed on opening.
    for found in (data[:20] + bytes([data[20] ^ 4]) + data[21:], data[:-10]):
        shard.write_bytes(found)
        with pytest.warns(UserWarning, match=r"shard-\w+"):
            damaged = lf.Library.open(tmp_path / "lib")
        with pytest.raises(FileError, match=r"shard-\w+"):
            damaged.verify()
    shard.write_bytes(data)
    lf.Library.open(tmp_path / "lib").verify(members)


def test_a_wrong_source_breaks_the_bound(members, stranger):
    lib = lf.fold(members, tolerance=0.1)
    with pytest.raises(ToleranceError, match="'a0' has error .* above its bound 0.1"):
        lib.verify({"a0": stranger})
    with pytest.raises(UnknownNameError, match="'a9'"):
        lib.verify({"a9": stranger})
    part = lf.Adapter({"q": members["a0"]["q"]})
    with pytest.raises(ToleranceError, match="other modules"):
        lib.verify({"a0": part})
    extra = lf.Adapter(members["a0"].modules, {"head": torch.ones(1)})
    with pytest.raises(ToleranceError, match="other modules or extras"):
        lib.verify({"a0": extra})
    own = lf.fold({"x": extra}, tolerance=0.1)
    with pytest.raises(ToleranceError, match="extra 'head' differs"):
        own.verify({"x": lf.Adapter(members["a0"].modules, {"head": torch.zeros(1)})})
    ranked = lf.fold(members, rank=2, form="svd")
    assert ranked.verify(members)["a1"] == pytest.approx(ranked.error("a1"), rel=1e-3)
    with pytest.raises(ToleranceError):
        ranked.verify({"a0": stranger})


# Many changes, many looks


def test_many_adds_keep_the_number_of_files_small(tmp_path, members, family, monkeypatch):
    lib = lf.fold(members, tmp_path / "lib", tolerance=0.3)
    everyone = dict(members)
    for i in range(24):
        everyone[f"n{i}"] = family(200 + i)
        lib.add(everyone[f"n{i}"], f"n{i}")
        assert len(list((tmp_path / "lib").glob("shard-*"))) <= 8
    before = tensors_of(lib)
    opened = []
    real_open, real_os_open = builtins.open, os.open

    def counted(real):
        def call(path, *args, **kwargs):
            opened.append(path)
            return real(path, *args, **kwargs)

        return call

    with monkeypatch.context() as m:
        m.setattr(builtins, "open", counted(real_open))
        m.setattr("io.open", counted(real_open))
        m.setattr(os, "open", counted(real_os_open))
        again = lf.Library.open(tmp_path / "lib")
    inside = [p for p in opened if str(tmp_path) in str(p)]
    assert 2 <= len(inside) < 10
    assert_unmoved(before, tensors_of(again))
    assert all(e <= 0.3 for e in again.verify(everyone).values())


@pytest.mark.parametrize("content", [None, "file", "empty", "json", "adapter"])
def test_what_is_no_library_is_a_file_error(tmp_path, members, content):
    path = tmp_path / "x"
    if content == "file":
        path.write_text("text")
    elif content == "adapter":
        lf.save(members["a0"], path)
    elif content:
        path.mkdir()
        if content == "json":
            (path / "library.json").write_text('{"format": "something"}')
    with pytest.raises(FileError, match="x"):
        lf.Library.open(path)


def test_a_library_is_a_mapping(members):
    lib = lf.fold(members, tolerance=0.1)
    assert list(lib) == lib.names == list(lib.keys())
    assert len(lib) == len(lib.values()) == 5
    assert "a0" in lib
    assert "a9" not in lib
    assert "5 adapters" in repr(lib)
    assert lf.fold(lib, tolerance=0.5).names == lib.names  # so it can be folded itself
    entry = lib.entry("a0")
    entry["error"] = 7
    assert lib.error("a0") != 7
    u, v = lib.update("a0", "q"), lib["a0"]["q"]
    assert torch.equal(u.A, v.A)
    assert torch.equal(u.B, v.B)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float64])
def test_device_and_dtype(tmp_path, members, dtype):
    lib = lf.fold(members, tmp_path / "lib", tolerance=0.1)
    for moved in (
        lib.to("cpu", dtype),
        lf.Library.open(tmp_path / "lib", device="cpu", dtype=dtype),
    ):
        for u in (*moved["a0"].modules.values(), moved.update("a0", "q")):
            assert u.A.dtype == u.B.dtype == dtype
            assert u.A.device.type == "cpu"
        assert moved.names == lib.names
        assert dense_error(members["a0"], moved["a0"]) <= 0.11
    assert lib["a0"]["q"].A.dtype == torch.float32


def test_a_reader_keeps_what_it_opened(tmp_path, members, family):
    """Another process adds, removes and folds anew; nothing of it reaches an open library."""
    path = tmp_path / "lib"
    lf.fold(members, path, tolerance=0.1).close()
    reader = lf.Library.open(path)
    before = tensors_of(reader)
    context = multiprocessing.get_context("fork")
    writer = context.Process(
        target=_many_changes, args=(path, [family(i) for i in range(300, 304)])
    )
    writer.start()
    looks = 0
    while writer.is_alive() or looks < 2:
        assert reader.names == list(members)
        assert_unmoved(before, tensors_of(reader))
        fresh = lf.Library.open(path)  # at any moment there is a whole library
        assert fresh["a1"].modules.keys() == SHAPES.keys()
        fresh.close()
        looks += 1
    writer.join()
    assert writer.exitcode == 0
    assert_unmoved(before, tensors_of(reader))
    assert lf.Library.open(path).names != list(members)


def _many_changes(path, adapters):
    torch.set_num_threads(1)
    lib = lf.Library.open(path)
    for i, a in enumerate(adapters):
        lib.add(a, f"n{i}")
        if i % 2:
            lib.remove(f"n{i}")
    lib.remove("a0")
    lib.refold(tolerance=0.4)


def test_two_writers_take_turns(tmp_path, members, family):
    path = tmp_path / "lib"
    lf.fold(members, path, tolerance=0.3).close()
    failed = []

    def add(numbers):
        lib = lf.Library.open(path)  # each with a look of its own, soon out of date
        for i in numbers:
            try:
                lib.add(family(i), f"n{i}")
            except FileError as e:
                failed.append(str(e))

    threads = [threading.Thread(target=add, args=(range(k, k + 3),)) for k in (400, 500)]
    for t in threads:
        t.start()
    for t in threads:
        t.join()
    assert not failed
    lib = lf.Library.open(path)
    assert set(lib.names) == {*members, *(f"n{i}" for k in (400, 500) for i in range(k, k + 3))}
    assert lib.verify({f"n{i}": family(i) for i in (400, 401, 502)})


def test_a_second_writer_that_cannot_wait_says_so(tmp_path, members):
    path = tmp_path / "lib"
    one = lf.fold(members, path, tolerance=0.3)
    two = lf.Library.open(path)
    with (
        one.contents.changing(),
        pytest.raises(FileError, match="being changed"),
        two.contents.store.transaction(timeout=0),
    ):
        pass
    two.remove("a0")
    assert "a0" in one  # until it looks again
    with pytest.raises(UnknownNameError):
        one.remove("a0")
    assert one.names == ["a1", "a2", "a3", "a4"]


def test_a_library_that_is_gone_cannot_be_changed(tmp_path, members):
    lib = lf.fold(members, tmp_path / "lib", tolerance=0.3)
    shutil.rmtree(tmp_path / "lib")
    with pytest.raises(FileError):
        lib.remove("a0")
    assert dense_error(members["a0"], lib["a0"]) <= 0.3  # it still holds its files


def test_a_failed_change_leaves_the_object_as_it_was(tmp_path, members, family, monkeypatch):
    lib = lf.fold(members, tmp_path / "lib", tolerance=0.1)
    before = tensors_of(lib)
    monkeypatch.setattr("lorafold.fold.change.commit", lambda *_: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        lib.add(family(9), "new")
    monkeypatch.undo()
    assert lib.names == list(members)
    assert_unmoved(before, tensors_of(lib))
    lib.add(family(9), "new")
    assert len(list((tmp_path / "lib").glob("shard-*"))) == 2


def test_of_many_adds_each_is_copied_a_few_times(tmp_path, make_adapter, monkeypatch):
    """Into larger and larger shards, and from some size on never again."""
    monkeypatch.setattr(compaction, "_SMALL", 8 << 10)
    monkeypatch.setattr(compaction, "_FULL", 64 << 10)
    merge, copied = compaction.merge_shards, []

    def counted(t, manifest, old):
        copied.append(sum(manifest.holds[name].alive for name in old))
        return merge(t, manifest, old)

    monkeypatch.setattr(compaction, "merge_shards", counted)
    adapters = {f"n{k}": make_adapter({"m": (8, 8)}, 1, seed=k) for k in range(121)}
    lib = lf.fold({"n0": adapters["n0"]}, tmp_path / "lib", tolerance=0.3, form="svd")
    for name in list(adapters)[1:]:
        lib.add(adapters[name], name)
        assert len(list((tmp_path / "lib").glob("shard-*"))) <= 7 + 7 + 120 // 40
    assert len(copied) > 10
    assert sum(copied) <= 6 * 120
    assert max(copied) <= 64
    with lf.Library.open(tmp_path / "lib") as again:
        again.verify(adapters)


# The files


def test_equal_folds_are_equal_files(tmp_path, members, family):
    for folder in ("a", "b"):
        with lf.fold(members, tmp_path / folder, tolerance=0.1) as lib:
            lib.add(family(60), "n")
            lib.remove("a1")
    names = sorted(p.name for p in (tmp_path / "a").iterdir())
    assert names == sorted(p.name for p in (tmp_path / "b").iterdir())
    for name in names:
        assert (tmp_path / "a" / name).read_bytes() == (tmp_path / "b" / name).read_bytes()


@pytest.fixture
def short_lists(monkeypatch):
    """Lists of eight names at most."""
    monkeypatch.setattr("lorafold.fold.store.part._LONGEST", 8)
    monkeypatch.setattr("lorafold.fold.store.part._SHORT", 3)


@pytest.mark.usefixtures("short_lists")
def test_adding_and_removing_write_nothing_that_grows_with_the_names(
    tmp_path, make_adapter, monkeypatch
):
    monkeypatch.setattr("lorafold.fold.store.compaction._SMALL", 256)
    monkeypatch.setattr("lorafold.fold.store.compaction._FULL", 4096)
    for count in (20, 200):
        adapters = {f"a{i:03}": make_adapter({"m": (8, 8)}, 1, seed=i) for i in range(count)}
        path = tmp_path / str(count)
        lib = lf.fold(adapters, path, tolerance=0.3, form="svd")
        assert len(lib.contents.manifest.parts) >= count / 8
        for k in range(12):
            before = {p.name: p.read_bytes() for p in path.iterdir()}
            lib.add(make_adapter({"m": (8, 8)}, 1, seed=999 + k), f"new{k}")
            if k % 3 == 2:
                lib.remove(f"a{k:03}")
            fresh = [p for p in path.iterdir() if p.name not in before]
            lists = [json.loads(p.read_bytes()) for p in fresh if p.name.startswith("adapters-")]
            assert 1 <= len(lists) <= 4
            assert all(len(found) <= 8 for found in lists)
            shards = [p.stat().st_size for p in fresh if p.name.startswith("shard-")]
            assert len(shards) == 1
            assert shards[0] < 4000
        with lf.Library.open(path) as again:
            removed = {f"a{k:03}" for k in (2, 5, 8, 11)}
            names = [*(n for n in adapters if n not in removed), *(f"new{k}" for k in range(12))]
            assert again.names == names
            assert len(again) == len(names)
            again.verify()


@pytest.mark.usefixtures("short_lists")
def test_lists_of_adapters_fit_their_names(tmp_path, make_adapter):
    lib = lf.fold({"a": make_adapter({"m": (8, 8)}, 1, seed=0)}, tmp_path / "lib", tolerance=0.3)
    names = ["a"]
    for i in range(60):
        name = f"n{i % 40}"
        lib.add(make_adapter({"m": (8, 8)}, 1, seed=i), name, replace=True)
        names += [name] if name not in names else []
        if i % 7 == 3:
            lib.remove(names.pop(i % len(names)))
        assert lib.names == names
        parts = lib.contents.manifest.parts
        assert all(len(part.entries) <= 8 for part in parts)
        assert len(parts) <= len(names)
        prefixes = sorted(part.prefix for part in parts)
        assert sum(2.0 ** -len(prefix) for prefix in prefixes) == 1  # each name has one place
        assert {p.name for p in (tmp_path / "lib").glob("adapters-*")} == {
            part.file.name for part in parts
        }
    with lf.Library.open(tmp_path / "lib") as again:
        assert again.names == names
        again.verify()
    for name in names[:-1]:
        lib.remove(name)
    assert [part.prefix for part in lib.contents.manifest.parts] == [""]
    lib.remove(names[-1])
    assert lib.names == []
    assert not list((tmp_path / "lib").glob("adapters-*"))


def test_a_library_shows_what_users_need(members):
    lib = lf.fold(members, tolerance=0.3)
    public = [name for name in dir(lib) if not name.startswith("_")]
    assert len(public) <= 20
    assert all(hasattr(lib, name) for name in public)
    own = {name for name in vars(lf.Library) if not name.startswith("_")}
    assert own == {*public, "contents"}  # which other verbs of lorafold read


# Verifying without stopping


def test_verify_can_tell_all_that_is_wrong(members, family):
    lib = lf.fold(members, tolerance=0.3)
    lib.add(family(70), "exact", form="exact")
    sources = {**members, "exact": family(71), "a2": family(72)}
    told = []
    found = lib.verify(sources, strict=False, progress=lambda *step: told.append(step))
    assert [name for name, check in found.items() if check.problem] == ["a2", "exact"]
    assert found["exact"].error is None
    assert found["exact"].bound == 0
    assert "above its bound" in found["a2"].problem
    assert found["a0"].error <= found["a0"].bound == 0.3
    assert told == [(k, len(sources), name) for k, name in enumerate(sources)]
    with pytest.raises(ToleranceError, match="'a2'"):
        lib.verify(sources)
    stored = lib.verify(strict=False)
    assert {name: check.error for name, check in stored.items()} == lib.verify()
    assert not any(check.problem for check in stored.values())
    with pytest.raises(UnknownNameError):
        lib.verify({"nobody": family(1)}, strict=False)


def test_a_model_card_that_can_not_be_read_is_told(tmp_path, members):
    for name in ("a0", "a1"):
        lf.save(members[name], tmp_path / name)
    (tmp_path / "a0" / "README.md").write_bytes(b"caf\xe9")
    with pytest.warns(UserWarning, match="the model card is left out: .*README.md: not UTF-8"):
        lib = lf.fold([tmp_path / "a0", tmp_path / "a1"])
    assert lib.names == ["a0", "a1"]
    assert [lib.contents.card(name) for name in lib] == [None, None]
