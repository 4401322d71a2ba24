"""docs/formats.md is enough: a reader in plain numpy, written from the page, agrees with ours."""

from __future__ import annotations

import hashlib
import json
import re
import struct
import zlib
from pathlib import Path

import numpy as np
import pytest
import safetensors.numpy
import torch

import lorafold as lf
from lorafold.adapter import ORIGIN
from lorafold.fold.coding.codebook import codebook

PAGE = Path(lf.__file__).parents[2] / "docs" / "formats.md"


def page_levels():
    """{bits: float32 levels, ascending}, from the page's last block."""
    block = re.findall(r"```text\n(.*?)```", PAGE.read_text(encoding="utf-8"), re.DOTALL)[-1]
    found = {}
    for bits, numbers in re.findall(r"^(\d): ([^:]*?)(?=^\d:|\Z)", block, re.MULTILINE):
        positive = np.array([float(x) for x in numbers.split()], np.float32)
        found[int(bits)] = np.concatenate([-positive[::-1], positive])
    return found


class Reader:
    """A library as the page describes it."""

    def __init__(self, folder):
        raw = (folder / "library.json").read_bytes()
        self.manifest = json.loads(raw)
        assert raw.startswith(b'{"sha256":"' + self.manifest["sha256"].encode() + b'",')
        first = raw.index(b'"'), raw.index(b",") + 1
        rest = raw[: first[0]] + raw[first[1] :]
        assert hashlib.sha256(rest).hexdigest() == self.manifest["sha256"]
        assert (self.manifest["format"], self.manifest["version"]) == ("lorafold-library", 1)
        self.levels = page_levels()
        self.adapters = self.listed(folder)
        self.shards = {}
        for name, info in self.manifest["shards"].items():
            data = (folder / name).read_bytes()
            start = 8 + int.from_bytes(data[:8], "little")
            assert len(data) == info["bytes"]
            assert hashlib.sha256(data[:start]).hexdigest() == info["header_sha256"]
            assert hashlib.sha256(data[start:]).hexdigest() == info["data_sha256"]
            both = (info["header_sha256"] + info["data_sha256"]).encode()
            assert name == f"shard-{hashlib.sha256(both).hexdigest()[:16]}.safetensors"
            self.shards[name] = safetensors.numpy.load(data)
            header = json.loads(data[8:start])
            stated = header.pop("__metadata__")
            found = [
                zlib.crc32(data[start + begin : start + end])
                for begin, end in (tensor["data_offsets"] for tensor in header.values())
            ]
            assert stated == {"crc32": "".join(f"{c:08x}" for c in found)}

    def listed(self, folder):
        """{name: entry} of all lists, in order."""
        found = []
        for part in self.manifest["adapters"]:
            data = (folder / part["file"]).read_bytes()
            assert len(data) == part["bytes"]
            assert hashlib.sha256(data).hexdigest() == part["sha256"]
            assert part["file"] == f"adapters-{part['sha256'][:16]}.json"
            gone, entries = part.get("gone", []), json.loads(data)
            assert part["listed"] == len(entries)
            for entry in entries:
                digest = hashlib.sha256(entry["name"].encode()).digest()
                bits = "".join(f"{byte:08b}" for byte in digest[:4])
                assert bits.startswith(part["prefix"])
            found += [entry for entry in entries if entry["name"] not in gone]
        found.sort(key=lambda entry: entry["order"])
        return {entry["name"]: entry for entry in found}

    def adapter(self, name):
        """{path: ΔW (out, in) float64}, and the extras."""
        entry = self.adapters[name]
        shard, row = self.place(entry["id"])
        updates = {}
        lines = [line[:-1] for line in shard["at"][row : row + 2]]
        assert zlib.crc32(b"".join(line.tobytes() for line in lines)) == shard["at"][row][-1]
        for j, module in enumerate(self.manifest["modules"]):
            if j >= len(lines[0]):
                continue
            low, high = (int(line[j]) for line in lines)
            if high > low:
                stored = shard[f"m{j}"].tobytes()[low:high]
                record = stored[:-4]
                assert zlib.crc32(record) == int.from_bytes(stored[-4:], "little")
                updates[module["path"]] = self.update(module, record)
        extras = {key: shard[tensor] for key, tensor in entry.get("extras", {}).items()}
        return updates, extras

    def place(self, number):
        """The shard and the row of an id."""
        for name, info in self.manifest["shards"].items():
            low, high = info.get("ids", (1, 0))
            if low <= number <= high:
                ids = self.shards[name]["ids"].tolist()
                assert ids == sorted(ids)
                assert len(ids) == info["rows"]
                assert (ids[0], ids[-1]) == (low, high)
                assert number not in info.get("gone", [])
                return self.shards[name], ids.index(number)
        raise AssertionError(number)

    def card(self, name):
        """The text of a model card; None where there is none."""
        shard, row = self.place(self.adapters[name]["id"])
        number = shard["cards"][row] if "cards" in shard else 0
        return shard[f"card{number - 1}"].tobytes().decode() if number else None

    def config(self, name):
        difference = self.adapters[name].get("config", {})
        kept = {
            k: v for k, v in self.manifest["config"].items() if k not in difference.get("drop", [])
        }
        return {**kept, **difference.get("set", {})}

    def update(self, module, record):
        total = np.zeros(module["shape"])
        at = 0
        while at < len(record):
            kind = record[at]
            if kind == 0:
                at += 1
                continue
            part = {1: self.pairs, 2: self.exact, 3: self.flat}[kind]
            update, at = part(module, record, at)
            total += update
        return total

    def pairs(self, module, record, at):
        flags = record[at + 1]
        at += 2
        sides, lengths = [], []
        for bit, side in enumerate("UV"):
            columns, length = None, module["shape"][bit]
            if flags >> bit & 1:
                number, length = struct.unpack_from("<HH", record, at)
                at += 4
                columns = self.basis(module, f"{side}{number}", module["shape"][bit], bit)
                columns = columns[:length].T
            sides.append(columns)
            lengths.append(length)
        rows, c, at = self.rows(record, at, lengths, [0, 1])
        left, right = (
            r.T if columns is None else columns @ r.T
            for r, columns in zip(rows, sides, strict=True)
        )
        return left * c @ right.T, at

    def exact(self, module, record, at):
        n, s = struct.unpack_from("<IB", record, at + 1)
        at += 6
        scale = json.loads(record[at : at + s])
        tensors = safetensors.numpy.load(record[at + s : at + s + n])
        return scale * (tensors["B"].astype(float) @ tensors["A"].astype(float)), at + s + n

    def flat(self, module, record, at):
        head = struct.Struct("<BHHHHBff")
        _, number, r, k_A, k_B, wide, t_A, t_B = head.unpack_from(record, at)
        at += head.size
        kind = np.dtype("<f4" if wide else "<f2")
        out, inner = module["shape"]
        factors = {}
        for side, k, t, seed, shape in (
            ("A", k_A, t_A, 3, (r, inner)),
            ("B", k_B, t_B, 2, (out, r)),
        ):
            z = np.frombuffer(record, kind, k, at).astype(float)
            at += k * kind.itemsize
            y = self.basis(module, f"{side}{number}", shape[0] * shape[1], seed)
            factors[side] = (y[0] + t * z @ y[1 : k + 1]).reshape(shape)
        return factors["B"] @ factors["A"], at

    def basis(self, module, name, length, seed):
        """(vectors, length)"""
        pieces = []
        for shard, tensor, count in module["bases"][name]:
            record = self.shards[shard][tensor].tobytes()
            (rows,), c, end = self.rows(record, 0, [length], [seed])
            assert end == len(record)
            assert len(rows) == count
            pieces.append(c[:, None] * rows)
        return np.concatenate(pieces)

    def rows(self, data, at, lengths, seeds):
        m, wide, t = struct.unpack_from("<HBf", data, at)
        at += 7
        codes = self.unpacked(data[at : at + (m + 1) // 2], 4, m)
        bits = np.array([*range(9), 16, 32])[codes]
        assert (bits > 0).all()
        at += (m + 1) // 2
        kind = np.dtype("<f4" if wide else "<f2")
        c = (np.frombuffer(data, kind, m, at).astype(np.float32) * np.float32(t)).astype(float)
        at += m * kind.itemsize
        found = [np.zeros((m, d)) for d in lengths]
        for b in sorted(set(bits.tolist()), reverse=True):
            mine = np.flatnonzero(bits == b)
            count = len(mine) * sum(lengths)
            size = (count * b + 7) // 8
            if b > 8:
                numbers = np.frombuffer(data, f"<f{b // 8}", count, at).astype(float)
            else:
                numbers = self.levels[b][self.unpacked(data[at : at + size], b, count)]
            at += size
            start = 0
            for side, d, seed in zip(found, lengths, seeds, strict=True):
                part = numbers[start : start + len(mine) * d].reshape(-1, d).astype(float)
                start += len(mine) * d
                side[mine] = part if b > 8 else rotated_back(part, seed)
        return found, c, at

    @staticmethod
    def unpacked(data, b, count):
        stream = np.unpackbits(np.frombuffer(data, np.uint8), bitorder="little")[: count * b]
        return stream.reshape(count, b) @ (1 << np.arange(b))


def signs(p, seed, stage):
    gamma, mask = 0x9E3779B97F4A7C15, (1 << 64) - 1

    def mix(z):
        z = (z ^ z >> 30) * 0xBF58476D1CE4E5B9 & mask
        z = (z ^ z >> 27) * 0x94D049BB133111EB & mask
        return z ^ z >> 31

    start = mix(seed + (stage + 1) * gamma & mask)
    words = [mix(start + (i + 1) * gamma & mask) for i in range(p)]
    return np.array([-1.0 if word >> 63 else 1.0 for word in words])


def hadamard(p):
    H = np.ones((1, 1))
    while len(H) < p:
        H = np.block([[H, H], [H, -H]])
    return H


def rotated_back(y, seed):
    d = y.shape[1]
    p = 1 << d.bit_length() - 1
    x = y.copy()
    for stage, where in ((1, slice(d - p, d)), (0, slice(0, p))):
        if stage == 0 or d != p:
            x[:, where] = signs(p, seed, stage) * (x[:, where] @ hadamard(p)) / p**0.5
    return x


# The libraries that it reads

PATHS = {"layers.0.q_proj": (48, 40), "layers.0.up_proj": (72, 40), "layers.1.q_proj": (48, 40)}


def related(make_adapter, count=6, rank=4):
    """Adapters with one A at each module, small steps apart: every form can share something."""
    first = make_adapter(PATHS, rank, seed=50)
    steps = [make_adapter(PATHS, rank, seed=60 + i) for i in range(count)]
    adapters = {}
    for i, step in enumerate(steps):
        modules = {
            p: lf.LowRank(
                u.A + (0.02 * step[p].A if i % 2 else 0), u.B + 0.1 * step[p].B, 0.5 + i % 2
            )
            for p, u in first.items()
        }
        adapters[f"a/{i}"] = lf.Adapter(
            modules,
            {f"head.{i}": torch.arange(3.0 + i)} if i % 2 else {},
            {"r": rank, "lora_alpha": 8 + i, "peft_type": "LORA"},
        )
    return adapters


def compare(folder):
    """What the reader reads against what the library gives."""
    lib, reader = lf.Library.open(folder), Reader(Path(folder))
    assert list(reader.adapters) == lib.names
    for name in lib.names:
        adapter = lib[name]
        updates, extras = reader.adapter(name)
        assert updates.keys() == adapter.modules.keys()
        for path, dW in updates.items():
            ours = adapter[path].dense().double().numpy()
            assert np.abs(dW - ours).max() <= 1e-5 * max(np.abs(ours).max(), 1e-30), (name, path)
        assert {k: v.tolist() for k, v in extras.items()} == {
            k: v.tolist() for k, v in adapter.extras.items()
        }
        config = {k: v for k, v in adapter.config.items() if k != ORIGIN}
        assert reader.config(name) == config
        assert reader.card(name) == lib.contents.card(name)
    return reader


@pytest.mark.parametrize(
    "options",
    [
        {"tolerance": 0.1},
        *({"tolerance": 0.05, "form": f} for f in ("svd", "input", "output", "shared", "flat")),
        *({"rank": 3, "form": f} for f in ("svd", "input", "output", "shared", "flat")),
        *({"bits": b, "form": "svd"} for b in (1, 2.5, 7.5, 8, 16, 32)),
        {"bits": 4, "form": "shared"},
        {"bits": 16, "form": "flat", "rank": 2},
        {"tolerance": 0},
    ],
    ids=str,
)
def test_every_form_is_read(options, make_adapter, tmp_path):
    lf.fold(related(make_adapter), tmp_path / "lib", **options).close()
    reader = compare(tmp_path / "lib")
    form = options.get("form", "exact" if options == {"tolerance": 0} else None)
    if form is not None:
        assert {m["form"] for m in reader.manifest["modules"]} == {form}
    bases = {name[0] for m in reader.manifest["modules"] for name in m.get("bases", {})}
    expected = {"input": "V", "output": "U", "shared": "UV", "flat": "AB"}
    assert bases == set(expected.get(form, "")) or form is None


@pytest.mark.parametrize("form", ["svd", "input", "shared", "flat"])
def test_what_was_added_later_is_read(form, make_adapter, tmp_path):
    adapters = related(make_adapter)
    late = {name: adapters.pop(name) for name in list(adapters)[3:]}
    lib = lf.fold(adapters, tmp_path / "lib", tolerance=0.1, form=form)
    for name, adapter in late.items():
        lib.add(adapter, name)
    # Another module, another rank and nothing in common with the bases; then exactly stored.
    odd = make_adapter({**PATHS, "layers.2.q_proj": (48, 40)}, 2, seed=90)
    lib.add(lf.Adapter(odd.modules), "odd")
    lib.add(lf.Adapter(odd.modules), "odd, exactly", form="exact")
    lib.close()
    reader = compare(tmp_path / "lib")
    assert len(reader.shards) > 1
    assert "layers.2.q_proj" not in reader.adapter("a/0")[0]
    with lf.Library.open(tmp_path / "lib") as opened:
        for name in (*late, "a/0"):
            opened.remove(name)
    reader = compare(tmp_path / "lib")
    assert any("gone" in shard for shard in reader.manifest["shards"].values())


def test_cards_and_many_lists_and_shards_are_read(make_adapter, tmp_path, monkeypatch):
    monkeypatch.setattr("lorafold.fold.store.part._LONGEST", 2)
    monkeypatch.setattr("lorafold.fold.passes.write._ROWS", 2)
    for k, (name, adapter) in enumerate(related(make_adapter).items()):
        folder = tmp_path / name.replace("/", "")
        lf.save(adapter, folder)
        if k != 1:
            (folder / "README.md").write_text(f"# Card {k % 2}")
    with lf.fold([tmp_path / f"a{k}" for k in range(6)], tmp_path / "lib", form="shared") as lib:
        reader = compare(tmp_path / "lib")
        assert (len(reader.manifest["adapters"]) > 2, len(reader.shards)) == (True, 3)
        assert [reader.card(f"a{k}") for k in range(3)] == ["# Card 0", None, "# Card 0"]
        lib.remove("a2")
        lib.add(tmp_path / "a2", "again")
        lib.add(tmp_path / "a3", "a3", replace=True)
    reader = compare(tmp_path / "lib")
    assert reader.card("again") == "# Card 0"


def test_a_list_that_was_lost_and_came_back_is_read(make_adapter, tmp_path):
    adapters = related(make_adapter)
    lf.fold(adapters, tmp_path / "lib").close()
    (part,) = (tmp_path / "lib").glob("adapters-*")
    raw = part.read_bytes()
    part.unlink()
    with pytest.warns(UserWarning, match="is damaged"):
        lib = lf.Library.open(tmp_path / "lib")
    lib.add(adapters["a/1"], "a/0", form="svd")
    lib.close()
    part.write_bytes(raw)
    reader = compare(tmp_path / "lib")
    assert sorted(reader.adapters) == sorted(adapters)
    assert any("gone" in part for part in reader.manifest["adapters"])


def test_a_zero_update_and_a_missing_module_differ(make_adapter, tmp_path):
    a = make_adapter(PATHS, 4, seed=1)
    zero = {p: lf.LowRank(u.A, torch.zeros_like(u.B)) for p, u in list(a.items())[:2]}
    lf.fold({"a": lf.Adapter(a.modules), "z": lf.Adapter(zero)}, tmp_path / "lib").close()
    reader = compare(tmp_path / "lib")
    updates, _ = reader.adapter("z")
    assert set(updates) == set(zero)
    assert all((dW == 0).all() for dW in updates.values())


def test_the_page_has_the_codebooks():
    levels = page_levels()
    assert sorted(levels) == list(range(1, 9))
    for bits, found in levels.items():
        assert found.tolist() == codebook(bits).tolist()


def test_the_page_names_every_field(make_adapter, tmp_path):
    text = PAGE.read_text(encoding="utf-8")
    for options in ({"form": "shared"}, {"form": "flat"}, {"rank": 99}, {"tolerance": 0}):
        folder = tmp_path / str(len(list(tmp_path.iterdir())))
        lf.fold(related(make_adapter), folder, **options).close()
        manifest = json.loads((folder / "library.json").read_text(encoding="utf-8"))
        fields = {*manifest, *manifest["options"]}
        fields |= {k for m in manifest["modules"] for k in m}
        fields |= {k for part in manifest["adapters"] for k in part}
        for part in manifest["adapters"]:
            fields |= {k for e in json.loads((folder / part["file"]).read_bytes()) for k in e}
        fields |= {k for s in manifest["shards"].values() for k in s}
        missing = [f for f in fields if f"`{f}`" not in text and f'"{f}"' not in text]
        assert not missing


def test_the_readers_check_bites(make_adapter, tmp_path, monkeypatch):
    lf.fold(related(make_adapter), tmp_path / "lib", tolerance=0.1, form="shared").close()
    right = rotated_back
    monkeypatch.setitem(globals(), "rotated_back", lambda y, seed: right(y, seed + 1))
    with pytest.raises(AssertionError):
        compare(tmp_path / "lib")
