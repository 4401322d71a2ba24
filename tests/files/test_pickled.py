"""`adapter_model.bin`: its checksums, its form, and what a pickle may hold."""

import json
import zipfile

import pytest
import torch

import lorafold as lf
from lorafold.errors import FileError

CONFIG = {"peft_type": "LORA", "r": 2, "lora_alpha": 6, "target_modules": ["q"]}
HEAD = "base_model.model.score.weight"


def state():
    torch.manual_seed(0)
    q = "base_model.model.q.lora_"
    found = {f"{q}A.weight": torch.randn(2, 3), f"{q}B.weight": torch.randn(4, 2)}
    return {**found, HEAD: torch.randn(2, 4)}


@pytest.fixture
def folder(tmp_path):
    (tmp_path / "adapter_config.json").write_text(json.dumps(CONFIG))
    torch.save(state(), tmp_path / "adapter_model.bin")
    return tmp_path


def read(folder):
    return lf.load(folder, allow_pickle=True)


def test_every_single_bit_of_a_tensor_is_covered_by_a_checksum(folder):
    path = folder / "adapter_model.bin"
    data = path.read_bytes()
    at = data.index(state()[HEAD].numpy().tobytes())
    for bit in range(0, 256, 5):
        changed = bytearray(data)
        changed[at + bit // 8] ^= 1 << bit % 8
        path.write_bytes(changed)
        assert not torch.equal(torch.load(path, weights_only=True)[HEAD], state()[HEAD])
        with pytest.raises(FileError, match=r"adapter_model\.bin: .*Bad CRC"):
            read(folder)


@pytest.mark.parametrize("way", ["without checksums", "before 1.6"])
def test_forms_without_checksums_are_read(way, folder):
    expected = read(folder).digest
    torch.serialization.set_crc32_options(way != "without checksums")
    try:
        new = way != "before 1.6"
        path = folder / "adapter_model.bin"
        torch.save(state(), path, _use_new_zipfile_serialization=new)
    finally:
        torch.serialization.set_crc32_options(True)
    assert read(folder).digest == expected


def test_a_packed_archive_is_refused_before_it_is_unpacked(folder):
    path = folder / "adapter_model.bin"
    with zipfile.ZipFile(path) as archive:
        parts = {name: archive.read(name) for name in archive.namelist()}
    for more, how, says in (
        ({}, zipfile.ZIP_DEFLATED, "is packed"),
        ({"x/zeros": bytes(1 << 20)}, zipfile.ZIP_DEFLATED, "is packed"),
    ):
        with zipfile.ZipFile(path, "w", how) as archive:
            for name, data in {**parts, **more}.items():
                archive.writestr(name, data)
        with pytest.raises(FileError, match=says):
            read(folder)


def test_a_flag_in_the_list_of_parts_is_of_no_weight(folder):
    path = folder / "adapter_model.bin"
    expected, data = read(folder).digest, bytearray(path.read_bytes())
    at = data.rindex(b"PK\1\2")
    while (at := data.rfind(b"PK\1\2", 0, at)) >= 0:
        changed = bytearray(data)
        changed[at + 38] |= 0x10  # a folder, says DOS, of which torch reads nothing
        path.write_bytes(changed)
        assert read(folder).digest == expected


def test_one_part_twice_is_two_files_in_one(folder):
    path = folder / "adapter_model.bin"
    with zipfile.ZipFile(path, "a") as archive, pytest.warns(UserWarning, match="Duplicate"):
        archive.writestr(archive.namelist()[0], b"other")
    with pytest.raises(FileError, match="twice"):
        read(folder)


ODD = {
    "sparse": (torch.eye(4).to_sparse(), "is no plain tensor"),
    "without numbers": (torch.empty(2, 4, device="meta"), "is no plain tensor"),
    "of one number": (torch.zeros(1).expand(1 << 20, 1 << 20), "has more numbers than the file"),
    "no tensor": (3.0, "must hold a dict of tensors"),
}


@pytest.mark.parametrize("what", ODD)
def test_what_is_no_plain_tensor_is_named(what, folder):
    value, says = ODD[what]
    torch.save({**state(), HEAD: value}, folder / "adapter_model.bin")
    with pytest.raises(FileError, match=says):
        read(folder)


def test_views_come_out_as_what_they_show(folder):
    both, tied = torch.randn(4, 4), torch.randn(3, 3)
    more = {"turned": both.T, "part": both[1:3, ::2], "tied": tied, "again": tied}
    more |= {"learned": torch.nn.Parameter(tied), "scalar": torch.tensor(2.0)}
    torch.save({**state(), **more}, folder / "adapter_model.bin")
    found = read(folder).extras
    for key, t in more.items():
        assert torch.equal(found[key], t.detach())
        assert found[key].is_contiguous()
        assert type(found[key]) is torch.Tensor
    lf.save(read(folder), folder / "out")  # which takes no two that share memory
    assert lf.load(folder / "out").digest == read(folder).digest
