"""What torch makes by default, in a script that loads its model in bfloat16, is nobody's input."""

import copy
from contextlib import contextmanager

import pytest
import torch

import lorafold as lf
from lorafold.fold.coding import codebook, rotation


def adapters():
    g = torch.Generator().manual_seed(0)

    def update(k, out, inner):
        A, B = torch.randn(4, inner, generator=g), torch.randn(out, 4, generator=g)
        return lf.LowRank(A.bfloat16(), B.bfloat16(), 0.3 + 0.1 * k)

    return {
        f"a{k}": lf.Adapter({"q": update(k, 96, 160), "v": update(k, 33, 65)}) for k in range(6)
    }


@contextmanager
def default(dtype, device=None):
    before = torch.get_default_dtype()
    for tables in (codebook._levels, codebook._pairs, codebook._cells, rotation._hadamard):
        tables.cache_clear()  # as in a new process
    torch.set_default_dtype(dtype)
    try:
        with torch.device(device or "cpu"):
            yield
    finally:
        torch.set_default_dtype(before)


def numbers(adapter):
    return {
        path: (u.A.dtype, u.B.dtype, u.A.float().tolist(), u.B.float().tolist(), u.scale)
        for path, u in adapter.modules.items()
    }


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float64, torch.float16], ids=str)
@pytest.mark.parametrize("form", ["auto", "svd", "shared"])
def test_a_library_is_the_same(tmp_path, dtype, form):
    given = adapters()
    plain = lf.fold(given, tmp_path / "plain", form=form)
    wanted = [numbers(plain[name]) for name in plain.names]
    with default(dtype):
        inside = lf.fold(given, tmp_path / "inside", form=form)
        found = [numbers(inside[name]) for name in inside.names]
        read = [numbers(lf.Library.open(tmp_path / "plain")[name]) for name in plain.names]
        inside.verify(given)
    assert found == read == wanted
    assert [numbers(inside[name]) for name in plain.names] == wanted  # nor later


def test_a_library_is_read_where_another_device_is_the_default(tmp_path):
    plain = lf.fold(adapters(), tmp_path / "plain")
    wanted = [numbers(plain[name]) for name in plain.names]
    with default(torch.float32, "meta"):
        opened = lf.Library.open(tmp_path / "plain")
        found = [opened[name] for name in opened.names]
    assert [numbers(a) for a in found] == wanted


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float64], ids=str)
def test_comparing_and_merging_are_the_same(dtype):
    given = adapters()

    def results():
        merged = [numbers(lf.merge(given, method=m, seed=0)) for m in ("linear", "ties", "dare")]
        return [*merged, lf.similarity(given).matrix.tolist()]

    wanted = results()
    with default(dtype):
        assert results() == wanted


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float64], ids=str)
def test_what_is_trained_begins_the_same(dtype):
    base = torch.nn.Sequential(torch.nn.Linear(16, 24), torch.nn.Linear(24, 12))
    specs = {
        "lora": lf.LoRA(rank=4, targets=["0", "1"], seed=3),
        "pissa": lf.PiSSA(rank=4, targets=["0", "1"], std=0.05, seed=3),
    }

    def begun():
        found = []
        for name, spec in specs.items():
            live = lf.attach(copy.deepcopy(base), {name: spec})
            found.append(numbers(live.adapter(name)))
        return found

    wanted = begun()
    with default(dtype):
        assert begun() == wanted
