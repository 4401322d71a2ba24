"""Shards against the official safetensors library, and against files that are cut or faked."""

import contextlib
import hashlib
import json
import os
import threading
import zlib

import numpy as np
import pytest
import safetensors
import safetensors.numpy
import safetensors.torch
import torch
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp

from lorafold.errors import FileError
from lorafold.fold.store import shard_writer
from lorafold.fold.store.descriptor import Descriptor
from lorafold.fold.store.shard import Shard, ShardInfo, ShardWriter

NUMPY = ["bool", *(f"{u}int{n}" for u in ("", "u") for n in (8, 16, 32, 64))]
NUMPY += ["float16", "float32", "float64", "complex64"]
TORCH = [
    *("bfloat16", "float8_e4m3fn", "float8_e4m3fnuz", "float8_e5m2", "float8_e5m2fnuz"),
    *("float16", "float32", "float64", "int64", "uint8", "bool"),
]


def arrays():
    rng = np.random.default_rng(0)
    made = {name: rng.integers(0, 256, 48, np.uint8).view(np.uint8) % 2 for name in NUMPY}
    made = {name: raw.astype(name).reshape(2, -1) for name, raw in made.items()}
    return made | {
        "0-d": np.float32(3.5),
        "empty": np.zeros((0, 7), np.float16),
        "transposed": np.arange(12, dtype=np.int32).reshape(3, 4).T,
        "big-endian": np.arange(5, dtype=">f8"),
    }


def written(path, content, header_capacity=8192, streams=()):
    with ShardWriter(path, header_capacity=header_capacity) as writer:
        for key, array in content.items():
            writer.add(key, array)
        for key, parts in streams:
            with writer.stream(key) as stream:
                for part in parts:
                    stream.write(part)
    return writer


def faked(header, data=b"", length=None):
    """A shard with any header; text or what JSON makes of it."""
    raw = header.encode() if isinstance(header, str) else json.dumps(header).encode()
    return (len(raw) if length is None else length).to_bytes(8, "little") + raw + data


# Written, and read by others


@pytest.mark.parametrize("header_capacity", [0, 100, 10_000])
def test_official_numpy_reads_what_we_write(tmp_path, header_capacity):
    content = arrays()
    streams = [("bytes", [b"odd", b"", b"ity"]), ("none", [])]
    writer = written(tmp_path / "s", content, header_capacity, streams)
    raw = (tmp_path / "s").read_bytes()
    found = safetensors.numpy.load(raw)
    assert found.keys() == content.keys() | {"bytes", "none"}
    for key, array in content.items():
        assert found[key].shape == np.shape(array)
        np.testing.assert_array_equal(found[key], array, strict=key != "big-endian")
    assert found["bytes"].tobytes() == b"oddity"
    assert found["none"].shape == (0,)
    with safetensors.safe_open(tmp_path / "s", "numpy") as f:
        stated = f.metadata()
    tensors = [*(a.tobytes() for a in content.values()), b"oddity", b""]
    tensors[list(content).index("big-endian")] = content["big-endian"].astype("<f8").tobytes()
    assert stated == {"crc32": "".join(f"{zlib.crc32(t):08x}" for t in tensors)}
    start = 8 + int.from_bytes(raw[:8], "little")
    assert start % 8 == 0
    assert writer.close() == ShardInfo(
        len(raw), *(hashlib.sha256(part).hexdigest() for part in (raw[:start], raw[start:]))
    )


@pytest.mark.parametrize("dtype", TORCH)
def test_official_torch_reads_what_we_write(tmp_path, dtype):
    generator = torch.Generator().manual_seed(0)
    bits = torch.randint(0, 2, (4, 64), dtype=torch.uint8, generator=generator)
    tensor = bits.view(getattr(torch, dtype))
    content = {"a": tensor, "b": tensor.t(), "c": tensor[1, 1], "d": tensor[:0]}
    written(tmp_path / "s", content)
    shard = Shard.open(tmp_path / "s")
    official = safetensors.torch.load_file(tmp_path / "s")
    for key, expected in content.items():
        for found in (official[key], shard.read_tensor(key)):
            assert (found.dtype, found.shape) == (expected.dtype, expected.shape)
            assert same_bits(found, expected)


def bytes_of(writer):
    """All that was written."""
    return os.pread(writer.file.number, writer.info.nbytes, 0)


def same_bits(a, b):
    a, b = (t.contiguous().reshape(-1).view(torch.uint8) for t in (a, b))
    return torch.equal(a, b)


def test_a_tensor_that_needs_grad_or_is_a_view_is_stored_as_it_looks():
    a = torch.arange(6.0).reshape(2, 3).requires_grad_()
    z = torch.tensor([1 + 2j]).conj()
    shard = Shard.of(written(None, {"a": a[:, 1], "z": z, "n": z.imag, "p": torch.nn.Parameter(a)}))
    assert shard.read("a").tolist() == [1, 4]
    assert shard.read("z").tolist() == [1 - 2j]
    assert shard.read("n").tolist() == [-2]
    assert torch.equal(shard.read_tensor("p"), a)


def test_we_read_what_official_writes(tmp_path):
    content = {
        k: np.ascontiguousarray(v).astype(v.dtype.newbyteorder("=")) for k, v in arrays().items()
    }
    safetensors.numpy.save_file(content, tmp_path / "s", {"k": "v"})
    shard = Shard.open(tmp_path / "s")
    for key, array in content.items():
        np.testing.assert_array_equal(shard.read(key), array, strict=True)
        assert shard.shape(key) == array.shape
        assert shard.read_bytes(key) == array.tobytes()
    with pytest.raises(FileError, match="no checksums are known"):
        shard.verify()


TEXT = st.text(st.characters(exclude_categories=["Cs"]), max_size=8)
KEYS = TEXT.filter(lambda key: key != "__metadata__")
ANY = hnp.arrays(st.sampled_from(NUMPY), hnp.array_shapes(min_dims=0, min_side=0, max_side=4))


@given(st.dictionaries(KEYS, ANY, max_size=5), st.integers(0, 600))
def test_any_keys_shapes_and_types(content, header_capacity):
    writer = written(
        None, content, header_capacity, [("stream", [b"x"])] * ("stream" not in content)
    )
    found = safetensors.numpy.load(bytes_of(writer))
    shard = Shard.of(writer)
    for key, array in content.items():
        np.testing.assert_array_equal(found[key], array, strict=True)
        np.testing.assert_array_equal(shard.read(key), array, strict=True)
    shard.verify()


def test_memory_and_file_are_the_same_bytes(tmp_path):
    for capacity in (0, 4000):
        path = tmp_path / str(capacity)
        on_disk = written(path, arrays(), capacity)
        in_memory = written(None, arrays(), capacity)
        assert path.read_bytes() == bytes_of(in_memory)
        assert on_disk.info.data_sha256 == in_memory.info.data_sha256


def test_a_header_that_does_not_fit_moves_much_data(tmp_path, monkeypatch):
    monkeypatch.setattr(shard_writer, "BLOCK", 64)
    content = {f"{i}": np.arange(i, dtype=np.uint8) for i in range(100)}
    writer = written(tmp_path / "s", content, header_capacity=0)
    found = safetensors.numpy.load_file(tmp_path / "s")
    assert all(np.array_equal(found[k], v) for k, v in content.items())
    Shard.of(writer).verify()


def test_small_tensors_share_writes(tmp_path, kill_points):
    content = {f"{i}": np.full(100, i, np.float32) for i in range(3000)}
    calls = kill_points.trace(lambda: written(tmp_path / "s", content, 300_000))
    assert sum(name == "write" for name, *_ in calls) == 3  # 1.2 MB in two blocks, and the header
    assert calls[-1] == ("fsync", str(tmp_path / "s"))


# Reading


def test_reads_are_aligned_writable_copies(tmp_path):
    content = {"a": np.uint8(1), "b": np.arange(3.0)}
    shard = Shard.of(written(tmp_path / "s", content))
    for array in (shard.read("b"), shard.read_tensor("b").numpy()):
        assert array.flags.aligned
        array[:] = -1
    assert shard.read("b").tolist() == [0, 1, 2]


def test_ranges_of_bytes(tmp_path):
    for path in (None, tmp_path / "s"):
        shard = Shard.of(written(path, {"a": np.int8(7)}, streams=[("b", [b"0123456789"])]))
        assert shard.read_bytes("b", 3, 5) == b"34"
        assert shard.read_bytes("b", 8) == b"89"
        assert shard.read_bytes("b", 10) == b""
        for start, stop in [(-1, 2), (0, 11), (5, 4), (11, None)]:
            with pytest.raises(FileError, match=r"key 'b'.*not within 10 bytes"):
                shard.read_bytes("b", start, stop)
        with pytest.raises(FileError, match="no tensor 'c'"):
            shard.read("c")


def test_numpy_types_only_by_read():
    shard = Shard.of(written(None, {"a": torch.ones(2, dtype=torch.bfloat16)}))
    with pytest.raises(FileError, match=r"'a'.*no BF16; use read_tensor"):
        shard.read("a")


def test_an_open_shard_outlives_its_name(tmp_path):
    shard = Shard.of(written(tmp_path / "s", {"a": np.arange(4)}))
    os.unlink(tmp_path / "s")
    assert shard.read("a").tolist() == [0, 1, 2, 3]
    shard.verify()
    shard.close()
    assert shard.closed
    with pytest.raises(FileError, match="closed"):
        shard.read("a")


def test_closing_under_a_reader_in_another_thread(tmp_path, monkeypatch):
    """The descriptor's number must not pass to another file while a read is going on."""
    (tmp_path / "other").write_bytes(bytes(1 << 16))
    shard = Shard.of(written(tmp_path / "s", {"a": np.ones(1000, np.uint8)}))
    preadv = os.preadv
    opened = []

    def interrupted(descriptor, buffers, offset):
        shard.close()
        opened.append(os.open(tmp_path / "other", os.O_RDONLY))
        return preadv(descriptor, buffers, offset)

    monkeypatch.setattr(os, "preadv", interrupted)
    found = []
    thread = threading.Thread(target=lambda: found.append(shard.read("a")))
    thread.start()
    thread.join()
    os.close(*opened)
    assert found[0].all()


def test_descriptors_are_closed(tmp_path):
    before = len(os.listdir("/proc/self/fd"))
    shard = Shard.of(written(tmp_path / "s", {"a": np.arange(4)}))
    with Shard.open(tmp_path / "s"):
        assert len(os.listdir("/proc/self/fd")) == before + 2
    del shard
    (tmp_path / "bad").write_bytes(b"no shard at all")
    with pytest.raises(FileError):
        Shard.open(tmp_path / "bad")
    assert len(os.listdir("/proc/self/fd")) == before


# Refused by the writer


def test_keys_and_types_that_cannot_be_stored():
    writer = ShardWriter(None, header_capacity=100)
    writer.add("a", np.ones(2))
    for key, array, message in [
        ("a", np.ones(2), "'a' is taken"),
        ("__metadata__", np.ones(2), "taken"),
        ("\udc80", np.ones(2), "not valid Unicode"),
        ("b", np.array(["text"]), "<U4"),
        ("b", np.array([object()]), "object"),
        ("b", np.zeros(2, "f4,f4"), "can't be stored"),
        ("b", np.ones(2, np.complex128), "complex128"),
        ("b", [1.0], "found list"),
        ("b", torch.ones(2, dtype=torch.complex128), "complex128"),
        ("b", torch.eye(2).to_sparse(), "sparse"),
        ("b", torch.ones(2, device="meta"), "meta"),
    ]:
        with pytest.raises(FileError, match=message):
            writer.add(key, array)
    assert writer.close().nbytes > 0
    assert Shard.of(writer).shape("a") == (2,)


def test_one_stream_at_a_time(tmp_path):
    writer = ShardWriter(tmp_path / "s", header_capacity=100)
    stream = writer.stream("a")
    for call in (
        lambda: writer.add("b", np.ones(1)),
        lambda: writer.stream("b"),
        writer.close,
    ):
        with pytest.raises(FileError, match="'a' is still being streamed"):
            call()
    stream.write(memoryview(np.arange(2, dtype=np.int16)))
    assert stream.nbytes == 4
    stream.close()
    with pytest.raises(FileError, match="'a' is closed"):
        stream.write(b"x")
    with pytest.raises(FileError, match="still being written"):
        Shard.of(writer)
    writer.close()
    assert writer.close() is writer.info
    with pytest.raises(FileError, match="closed"):
        writer.add("b", np.ones(1))
    assert Shard.of(writer).shape("a") == (4,)


def test_half_a_stream_does_not_pass_for_a_whole_one(tmp_path):
    writer = ShardWriter(tmp_path / "s", header_capacity=100)
    with pytest.raises(ZeroDivisionError), writer.stream("a") as stream:
        stream.write(b"x")
        raise ZeroDivisionError
    with pytest.raises(FileError, match="a write to it failed"):
        writer.close()
    writer.abort()
    writer.abort()
    assert os.listdir(tmp_path) == []


def test_an_exception_drops_the_shard(tmp_path):
    with (
        pytest.raises(ZeroDivisionError),
        ShardWriter(tmp_path / "s", header_capacity=100) as writer,
    ):
        writer.add("a", np.ones(2))
        raise ZeroDivisionError
    assert os.listdir(tmp_path) == []
    assert writer.aborted


def test_a_closed_shard_can_be_dropped(tmp_path):
    for path in (None, tmp_path / "s"):
        writer = written(path, {"a": np.ones(2)})
        shard = Shard.of(writer)
        writer.abort()
        writer.abort()
        with pytest.raises(FileError, match="was dropped"):
            Shard.of(writer)
        assert shard.read("a").tolist() == [1, 1]
    assert os.listdir(tmp_path) == []


def test_a_file_that_exists_is_not_written_to(tmp_path):
    (tmp_path / "s").write_text("mine")
    with pytest.raises(FileExistsError):
        ShardWriter(tmp_path / "s", header_capacity=100)
    assert (tmp_path / "s").read_text() == "mine"


# Refused by the reader


def test_every_truncation_is_found(tmp_path):
    path = tmp_path / "s"
    writer = written(path, {"a": np.arange(10)}, header_capacity=80)
    whole = path.read_bytes()
    for size in range(len(whole)):
        path.write_bytes(whole[:size])
        with pytest.raises(FileError, match=r"s is truncated or was changed: "):
            Shard.open(path, writer.info)
        with pytest.raises(FileError, match=r"/s: .*(too few|ends after)"):  # by the header alone
            Shard.open(path)
    path.write_bytes(whole + b"x")
    with pytest.raises(FileError, match="1 bytes after the last tensor"):
        Shard.open(path)


def test_every_corrupt_byte_is_found(tmp_path):
    path = tmp_path / "s"
    writer = written(path, {"a": np.arange(10)}, header_capacity=80)
    whole = path.read_bytes()
    Shard.open(path, writer.info).verify()
    for at in range(len(whole)):
        path.write_bytes(whole[:at] + bytes([whole[at] ^ 1]) + whole[at + 1 :])
        if at < len(whole) - 80:
            with pytest.raises(FileError, match=r"/s( is damaged: its header|: the header)"):
                Shard.open(path, writer.info)
        else:
            shard = Shard.open(path, writer.info)
            for read in (shard.read, shard.read_tensor, shard.read_bytes):
                with pytest.raises(FileError, match=r"/s, key 'a' is damaged: its CRC-32"):
                    read("a")
            with pytest.raises(FileError, match=r"/s is damaged: its tensors"):
                shard.verify()
            with pytest.raises(FileError, match=r"/s is damaged: its tensors"):
                shard.copy_to(tmp_path / f"copy{at}")


def test_truncated_after_it_was_opened(tmp_path):
    path = tmp_path / "s"
    shard = Shard.of(written(path, {"a": np.arange(10)}))
    os.truncate(path, path.stat().st_size - 1)
    with pytest.raises(FileError, match=r"/s, key 'a': the file was truncated"):
        shard.read("a")
    with pytest.raises(FileError, match="truncated"):
        shard.verify()


ONE = {"dtype": "U8", "shape": [2], "data_offsets": [0, 2]}


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"", "0 bytes are too few"),
        (b"\x02\0\0", "3 bytes are too few"),
        (faked("{}", length=2**63), "header claims 9223372036854775808 bytes"),
        (faked("{}", length=3), "header takes 3 bytes, but the file ends after 10"),
        (faked("{}", length=0), "not valid JSON"),
        (faked({"k": ONE}, b"a"), "'k' reaches to byte"),
    ],
)
def test_files_that_are_no_shards(tmp_path, content, message):
    (tmp_path / "s").write_bytes(content)
    with pytest.raises(FileError, match=r"shard .*/s: .*" + message):
        Shard.open(tmp_path / "s")


@given(st.binary(max_size=60), st.integers(0, 70))
def test_random_bytes_raise_file_errors_only(raw, at):
    content = faked({"k": ONE}, b"ab")
    for bent in (
        raw,
        content[:at] + raw + content[at:],
        content[:at] + raw + content[at + len(raw) :],
    ):
        source = Descriptor.new(None)
        os.write(source.number, bent)
        with contextlib.suppress(FileError):
            assert len(Shard(source, None).read_bytes("k")) <= len(bent)


def test_paths_that_cannot_be_read(tmp_path):
    with pytest.raises(FileError, match="s is missing"):
        Shard.open(tmp_path / "s")
    with pytest.raises(FileError, match="can't be read: Is a directory"):
        Shard.open(tmp_path)


def test_checksums_that_are_not_one_a_tensor_are_refused(tmp_path):
    """A shard of a library states them; a header that doesn't was written by something else."""
    for stated in (None, "", "0" * 7, "0" * 16, "zzzzzzzz"):
        metadata = {} if stated is None else {"__metadata__": {"crc32": stated}}
        raw = faked({**metadata, "k": ONE}, b"ab")
        (tmp_path / "s").write_bytes(raw)
        parts = raw[:-2], raw[-2:]
        info = ShardInfo(len(raw), *(hashlib.sha256(part).hexdigest() for part in parts))
        with pytest.raises(FileError, match="does not state a CRC-32 of each tensor"):
            Shard.open(tmp_path / "s", info)
