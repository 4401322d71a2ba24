"""Named handles, and a collection of them: what is checked, and in which order modules come."""

import numpy as np
import pytest
import torch

import lorafold as lf
from lorafold.collection.collection import Collection
from lorafold.collection.sources import named_handles
from lorafold.errors import MismatchError

SHAPES = {"b": (6, 8), "a": (4, 8)}


@pytest.fixture
def pair(make_adapter):
    one, two = make_adapter(SHAPES, 2, seed=1), make_adapter({"a": (4, 8)}, 3, seed=2)
    return {"one": one, "two": two}


def collected(adapters, **options):
    return Collection(named_handles(adapters), block_bytes=1 << 20, **{"exact": (), **options})


def test_a_handle_gives_the_whole_adapter_and_its_parts(pair, tmp_path):
    lf.save(pair["one"], tmp_path / "one")
    for source in (pair["one"], tmp_path / "one"):
        (handle,) = named_handles(source).values()
        whole = lf.load(source)
        assert handle.load().digest == whole.digest
        assert torch.equal(handle.read("a").A, whole["a"].A)


def test_modules_that_a_library_has_come_first_in_its_order(pair):
    c = collected(pair, before={"z": (3, 5), "b": (6, 8)})
    assert c.paths == ["z", "b", "a"]
    assert c.shapes == {"z": (3, 5), "b": (6, 8), "a": (4, 8)}
    assert c.stack("z") is None
    assert c.stack("a").members.tolist() == [0, 1]
    assert collected(pair).paths == ["a", "b"]


def test_those_stored_exactly_come_last(pair):
    c = collected(pair, exact={"one"})
    assert (c.names, c.folded) == (["two", "one"], 1)
    assert c.stack("b") is None


def test_a_stack_reads_every_member_with_its_scale(pair, dense):
    (f,) = collected(pair).stack("a").factors()
    W = f.B.double() @ f.A.double()
    for k, adapter in enumerate(pair.values()):
        np.testing.assert_allclose(W[k], dense(adapter["a"]), atol=1e-6)


def test_digests_are_those_of_the_adapters_however_much_was_read(pair):
    c = collected(pair)
    c.read(0, "b")
    for k, adapter in enumerate(pair.values()):
        assert c.digest(k, adapter.extras) == adapter.digest


def test_adapters_of_different_bases_are_told_apart(pair, make_adapter):
    with pytest.raises(MismatchError, match="'a' is .* different bases"):
        collected({**pair, "three": make_adapter({"a": (5, 8)}, 2, seed=3)})
    others = {f"o{k}": make_adapter({"a": (5, 8), "b": (3, 3)}, 2, seed=k) for k in range(6)}
    listed = "'a', 'b' in 'o0', 'o1', 'o2', 'o3' and 2 more"
    with pytest.raises(MismatchError, match=f"different bases; of other shapes .* {listed}"):
        collected({**pair, **others})


def test_all_bases_are_told(make_adapter):
    named = {"a": "llama", "b": None, "c": "qwen", "d": "llama", "e": "qwen"}
    made = {n: make_adapter({"q": (5, 8)}, 2, base_model=base) for n, base in named.items()}
    with pytest.raises(MismatchError, match="bases: 'a', 'd' to 'llama'; 'c', 'e' to 'qwen';"):
        collected(made)
