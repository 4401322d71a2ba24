"""form="flat" against vLoRA's SharedSubspace on the same adapters, and what vLoRA loses.

https://github.com/vlora-dev/vlora: means and principal directions of the flattened A and B.
"""

import json

import pytest
import torch

import lorafold as lf
from lorafold.errors import FileError

vlora = pytest.importorskip("vlora")

SHAPES = {"layers.0.q_proj": (48, 32), "layers.0.v_proj": (32, 64)}
RANK = 4


@pytest.fixture(scope="module")
def adapters(make_adapter):
    return {f"a{i}": make_adapter(SHAPES, RANK, seed=i, scale=2.0) for i in range(8)}


def weights(adapter, *, with_scale=True):
    """vLoRA's view of an adapter. It knows no scale: that goes into B, or is lost."""
    factor = {p: u.scale if with_scale else 1.0 for p, u in adapter.modules.items()}
    return vlora.LoRAWeights(
        layer_names=sorted(adapter),
        lora_a={p: u.A.clone() for p, u in adapter.modules.items()},
        lora_b={p: factor[p] * u.B for p, u in adapter.modules.items()},
        rank=RANK,
    )


def subspace(adapters, k, **options):
    return vlora.SharedSubspace.from_adapters(
        [weights(a, **options) for a in adapters.values()],
        task_ids=list(adapters),
        num_components=k,
    )


@pytest.fixture(scope="module")
def new(adapters, make_adapter):
    """A newcomer that is partly like two of those in a library, and has scale .5."""
    own = make_adapter(SHAPES, RANK, seed=99)
    one, two = adapters["a1"], adapters["a4"]
    return lf.Adapter(
        {p: lf.LowRank(u.A + one[p].A + two[p].A, u.B + one[p].B + two[p].B, 0.5)
         for p, u in own.items()}
    )  # fmt: skip


def update(reconstructed, path):
    return reconstructed.lora_b[path].double() @ reconstructed.lora_a[path].double()


def dense(u):
    return u.scale * (u.B.double() @ u.A.double())


@pytest.mark.parametrize("k", [1, 3, 7])
def test_flat_reconstructs_what_vlora_does(adapters, k):
    lib = lf.fold(adapters, form="flat", rank=k)
    peer = subspace(adapters, k)
    for name, a in adapters.items():
        theirs = peer.reconstruct(name)
        lost = total = 0.0
        for p, u in a.modules.items():
            W, ours = dense(u), dense(lib[name][p])
            gap = (ours - update(theirs, p)).norm() / W.norm()
            assert gap < 1e-4
            lost += float((W - update(theirs, p)).square().sum())
            total += float(W.square().sum())
        assert lib.error(name) <= (lost / total) ** 0.5 + 1e-4


def test_vlora_loses_the_scale(adapters):
    """The negative control of the test above: unfolded scales come back as 1."""
    peer = subspace(adapters, 7, with_scale=False)
    p = next(iter(SHAPES))
    W = dense(adapters["a0"][p])
    assert (update(peer.reconstruct("a0"), p) - W).norm() / W.norm() > 0.4


def test_added_adapters_are_projected_alike(adapters, new):
    lib, peer = lf.fold(adapters, form="flat", rank=5), subspace(adapters, 5)
    lib.add(new, "new")
    peer.add_task(peer.project(weights(new), "new"))
    theirs = peer.reconstruct("new")
    for p, u in new.modules.items():
        W = dense(u)
        assert (dense(lib["new"][p]) - update(theirs, p)).norm() / W.norm() < 1e-4


@pytest.mark.parametrize("k", [1, 5, 7])
def test_a_projection_is_vloras(adapters, new, k):
    """Loadings (up to the signs of directions) and error, which is what `add` states then."""
    lib, peer = lf.fold(adapters, form="flat", rank=k), subspace(adapters, k)
    found, theirs = lib.project(new), peer.project(weights(new), "new")
    for p in SHAPES:
        for ours, other in zip(
            found.loadings[p], (theirs.loadings_a[p], theirs.loadings_b[p]), strict=True
        ):
            torch.testing.assert_close(ours.abs(), other.abs(), rtol=1e-3, atol=1e-4)
    peer.add_task(theirs)
    back = peer.reconstruct("new")
    lost = sum((dense(u) - update(back, p)).square().sum() for p, u in new.modules.items())
    total = sum(dense(u).square().sum() for u in new.modules.values())
    assert found.error == pytest.approx(float(lost / total) ** 0.5, rel=1e-4)
    assert lib.names == list(adapters)  # nothing is stored
    if k == 1:  # one direction holds next to nothing of it, which vLoRA would store
        assert found.error >= 0.95
        with pytest.raises(lf.ToleranceError, match="next to nothing"):
            lib.add(new, "new")
    else:
        assert lib.add(new, "new") == pytest.approx(found.error, rel=1e-6)


@pytest.mark.parametrize("bits", [2, 8, None])
def test_projections_of_those_in_it_and_of_a_mean(adapters, bits):
    lib = lf.fold(adapters, form="flat", rank=3, bits=bits)
    for name, a in adapters.items():
        assert lib.project(a).error == pytest.approx(lib.error(name), rel=0.02)
    mean = lf.Adapter(
        {
            p: lf.LowRank(
                torch.stack([a[p].A for a in adapters.values()]).mean(0),
                torch.stack([a[p].scale * a[p].B for a in adapters.values()]).mean(0),
            )
            for p in SHAPES
        }
    )
    found = lib.project(mean)
    if bits is None:
        assert found.error < 1e-5
        assert all(x.abs().max() < 1e-4 for pair in found.loadings.values() for x in pair)


def test_an_adapter_of_another_rank_is_not_on_flat_sides(tmp_path, adapters, make_adapter):
    """It shares nothing with them, is stored on its own, and both are read back after opening."""
    lf.fold(adapters, tmp_path / "lib", form="flat", rank=3).close()
    for rank in (1, RANK - 1, RANK + 1):
        new = make_adapter(SHAPES, rank, seed=9)
        with lf.Library.open(tmp_path / "lib") as lib:
            found = lib.project(new)
            assert (found.loadings, found.error) == ({}, 1)
            lib.add(new, f"of rank {rank}")
        with lf.Library.open(tmp_path / "lib") as lib:
            one = lib["a0"]
            assert one.distance(adapters["a0"]) / adapters["a0"].norm() < lib.error("a0") + 1e-4
            assert lib[f"of rank {rank}"].distance(new) / new.norm() < 1e-5


def test_ids_that_look_alike_as_file_names(tmp_path, adapters):
    """`a/b` and `a_b` are one file to vLoRA, two adapters here."""
    alike = dict(zip(("a/b", "a_b"), adapters.values(), strict=False))
    subspace(alike, 1).save(tmp_path / "vlora")
    back = vlora.SharedSubspace.load(tmp_path / "vlora")
    p = next(iter(SHAPES))
    one, two = (update(back.reconstruct(name), p) for name in alike)
    assert torch.equal(one, two)  # the second has overwritten the first

    lf.fold(alike, tmp_path / "lib", form="flat", rank=1)
    with lf.Library.open(tmp_path / "lib") as lib:
        for name, a in alike.items():
            assert (dense(lib[name][p]) - dense(a[p])).norm() / dense(a[p]).norm() < 1e-4


def test_a_damaged_file_goes_unnoticed_without_checksums(tmp_path, adapters):
    """One changed byte of the data: vLoRA loads other numbers, a library says which shard it is."""
    subspace(adapters, 7).save(tmp_path / "vlora")
    before = vlora.SharedSubspace.load(tmp_path / "vlora").reconstruct("a0")
    flip_a_byte(tmp_path / "vlora" / "subspace.safetensors", "layers.0.q_proj.mean_a")
    after = vlora.SharedSubspace.load(tmp_path / "vlora").reconstruct("a0")
    p = "layers.0.q_proj"
    assert not torch.equal(update(before, p), update(after, p))
    assert "sha256" not in json.dumps(
        json.loads((tmp_path / "vlora/subspace_meta.json").read_text())
    )

    lf.fold(adapters, tmp_path / "lib", form="flat", rank=7).close()
    shard = next((tmp_path / "lib").glob("shard-*"))
    flip_a_byte(shard, "b0.A0")
    with pytest.raises(FileError, match=shard.name), lf.Library.open(tmp_path / "lib") as lib:
        lib.verify()


def flip_a_byte(path, key):
    """Change the exponent of the first number of a tensor in a safetensors file."""
    data = bytearray(path.read_bytes())
    end = 8 + int.from_bytes(data[:8], "little")
    begin = json.loads(data[8:end])[key]["data_offsets"][0]
    data[end + begin + 3] ^= 1
    path.write_bytes(data)
