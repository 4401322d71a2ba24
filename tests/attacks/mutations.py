"""Seeded ways to damage a file, or to write one that nobody should believe.

`mutated(folder, files, chance)` changes one file of a folder and says what it did. What it does
comes from `chance` (a `random.Random`) alone, so a seed and a number say which mutation it was.
"""

import datetime
import functools
import gzip
import json
import os
import shutil
import struct
import warnings
import zipfile
from collections import OrderedDict
from itertools import pairwise
from pathlib import Path

BOMB = "(a+)+$"
ODD = [
    *(None, True, False, 0, 1, -1, 2, 0.5, -0.0, 1e308, 1e-320, 2**31, 2**63, 2**64 + 1, 10**30),
    *(float("nan"), float("inf"), -float("inf")),
    *(
        "",
        "x",
        "1",
        "true",
        "../x",
        "/",
        "a\0b",
        "ü",
        "\ud800",
        "a\nb",
        "x" * 50_000,
        "." * 120_000,
    ),
    *(BOMB, "(.*)*\\1", "[", "(?P<a>", "^(([a-z])+.)+[A-Z]([a-z])+$", "*" * 40),
    *([], [[]], {}, {"": {}}, [1, 2, 3], ["a", "a"], {"a": 1}, [None], list("abcdefghijk")),
]
DTYPES = {"BOOL": 1, "U8": 1, "I8": 1, "F8_E4M3": 1, "F8_E5M2": 1, "I16": 2, "F16": 2, "BF16": 2,
          "I32": 4, "F32": 4, "I64": 8, "F64": 8, "C64": 8, "F4": 1, "": 4}  # fmt: skip
PAGES = [
    b"<!DOCTYPE html><html>not found</html>",
    b"version https://git-lfs.github.com/spec/v1\noid sha256:00\nsize 1\n",
    b"PK\3\4" + bytes(40),
    b"\x1f\x8b\x08" + bytes(40),
    b"\x80\x02}q\x00.",
    bytes(64),
    b"\xff" * 64,
    b"{}",
    b"[]",
    b"null",
    b"0",
    b'"x"',
    b"\n\n\n",
]


def mutated(folder, files, chance):
    """Change one of the files (relative paths) in a folder; what was done, in words."""
    name = chance.choice(files)
    path = Path(folder, name)
    kinds = [_bytes] * 4 + [_whole] + [_structure(path)] * 5
    return f"{name}: {chance.choice(kinds)(path, chance)}"


# Bytes


def _bytes(path, chance):
    data = bytearray(path.read_bytes())
    if not data:
        return "empty already"
    at = chance.randrange(len(data))
    length = chance.choice([1, 2, 7, 8, 64, len(data) // 3 + 1])
    what = chance.choice(
        ["flip"] * 4 + ["byte", "cut", "head", "drop", "twice", "zeros", "ones", "swap", "insert"]
    )
    if what == "flip":
        bit = chance.randrange(8)
        data[at] ^= 1 << bit
        what = f"bit {bit} flipped"
    elif what == "byte":
        data[at] = chance.randrange(256)
    elif what == "cut":
        del data[at:]
    elif what == "head":
        del data[:length]
    elif what == "drop":
        del data[at : at + length]
    elif what == "twice":
        data[at:at] = data[at : at + length]
    elif what in ("zeros", "ones"):
        part = data[at : at + length]
        data[at : at + length] = (b"\0" if what == "zeros" else b"\xff") * len(part)
    elif what == "swap":
        other = chance.randrange(len(data))
        a, b = sorted((at, other))
        n = min(length, b - a, len(data) - b)
        data[a : a + n], data[b : b + n] = data[b : b + n], data[a : a + n]
    else:
        data[at:at] = chance.randbytes(length)
    path.write_bytes(data)
    return f"{what} at {at} ({length})"


def _whole(path, chance):
    data = path.read_bytes()
    what = chance.choice(
        [
            "gone",
            "empty",
            "folder",
            "fifo",
            "link",
            "loop",
            "page",
            "mark",
            "utf-16",
            "tail",
            "long",
        ]
    )
    if what in ("gone", "folder", "fifo", "link", "loop"):
        path.unlink()
    if what == "empty":
        path.write_bytes(b"")
    elif what == "folder":
        path.mkdir()
    elif what == "fifo":
        os.mkfifo(path)
    elif what == "link":
        path.symlink_to("nowhere")
    elif what == "loop":
        path.symlink_to(path.name)
    elif what == "page":
        path.write_bytes(chance.choice(PAGES))
    elif what == "mark":
        path.write_bytes(b"\xef\xbb\xbf" + data)
    elif what == "utf-16":
        path.write_bytes(data.decode("latin-1").encode("utf-16"))
    elif what == "tail":
        path.write_bytes(data + chance.randbytes(chance.choice([1, 8, 1000])))
    elif what == "long":
        os.truncate(path, len(data) + (1 << 32))  # holes, which take no room
    return what


# What is in them


def _structure(path):
    if path.suffix == ".safetensors":
        return _tensors
    if path.suffix == ".json":
        return _json
    other = {".bin": _pickle, ".pt": _bytes, ".parquet": _parquet, ".gz": _packed_json}
    other[".gguf"] = _head_numbers
    return other.get(path.suffix, _text)


def _json(path, chance):
    what, text = _json_text(path.read_text(encoding="utf-8"), chance)
    path.write_bytes(text.encode("utf-8", "surrogatepass"))
    return what


def _json_text(text, chance):
    """A text of JSON changed at one place; and how."""
    value = json.loads(text)
    holders = [h for h in _holders(value) if h]
    kind = chance.choice(
        ["set"] * 6 + ["delete", "rename", "twice", "deep", "swap", "wrap", "many"]
    )
    if kind == "deep":
        n = chance.choice([100, 2_000, 200_000])
        opened, closed = chance.choice([("[", "]"), ('{"a":', "}")])
        return f"{n} levels", text.rstrip()[:-1] + f', "deep": {opened * n}1{closed * n}' + "}"
    if kind == "many" or not holders:
        return "many", text.rstrip()[:-1] + ', "many": [' + "{}," * 50_000 + "{}]}"
    holder = chance.choice(holders)
    key = chance.choice(list(holder) if isinstance(holder, dict) else range(len(holder)))
    if kind == "twice" and isinstance(holder, dict):
        # Said of the outermost one: the last one counts for Python, the first for others.
        name = chance.choice(list(value)) if isinstance(value, dict) else "a"
        told = json.dumps(chance.choice(ODD))
        return f"{name} twice", text.rstrip()[:-1] + f", {json.dumps(name)}: {told}" + "}"
    if kind == "delete":
        del holder[key]
    elif kind == "rename" and isinstance(holder, dict):
        holder[chance.choice(["", "x", "." * 120_000, "\ud800", str(key) + " "])] = holder.pop(key)
    elif kind == "swap":
        other = chance.choice(list(holder) if isinstance(holder, dict) else range(len(holder)))
        holder[key], holder[other] = holder[other], holder[key]
    elif kind == "wrap":
        holder[key] = chance.choice([[holder[key]], {"a": holder[key]}, str(holder[key])])
    else:
        kind, holder[key] = "set", chance.choice(ODD)
    return f"{kind} {str(key)[:40]} {str(holder)[:60]}", json.dumps(value)


def _holders(value):
    if isinstance(value, dict | list):
        yield value
        for inner in value.values() if isinstance(value, dict) else value:
            yield from _holders(inner)


def _tensors(path, chance):
    data = path.read_bytes()
    (length,) = struct.unpack("<Q", data[:8])
    header, body = json.loads(data[8 : 8 + length]), bytearray(data[8 + length :])
    keys = [key for key in header if key != "__metadata__"]
    told = header.get("__metadata__", {})
    kind = chance.choice(
        ["value", "swap", "dtype", "shape", "rename", "drop", "twice", "field", "length", "deep"]
        + ["number", "number", *["metadata", "inside"] * (2 if told else 0)]
    )
    key = chance.choice(keys) if keys else ""
    entry = header.get(key, {})
    raw = None
    if kind == "value" or not keys:
        holder = chance.choice([header, entry, entry]) or header
        inner = chance.choice(list(holder))
        holder[inner] = chance.choice(ODD)
        kind = f"{inner[:40]} set"
    elif kind == "swap":
        other = header[chance.choice(keys)]
        for field in chance.sample(list(entry), chance.randint(1, len(entry))):
            entry[field], other[field] = other[field], entry[field]
    elif kind == "dtype":
        entry["dtype"] = chance.choice(list(DTYPES))
        if chance.random() < 0.5:  # with a shape that takes as many bytes
            start, stop = entry["data_offsets"]
            entry["shape"] = [(stop - start) // DTYPES[entry["dtype"]]]
    elif kind == "shape":
        shape = entry["shape"]
        size = len(body) + 1
        entry["shape"] = chance.choice(
            [shape[::-1], [0], [0, *shape], [*shape, 1], [], [1] * 70, [-1, *shape[1:]], [2**62, 4],
             [sum(shape)], [size, size], [float(n) for n in shape], [0] * len(shape)]
        )  # fmt: skip
    elif kind == "rename":
        new = chance.choice(
            ["", "x", key + ".", "." * 120_000, "\ud800", key.upper(), key[:-1]]
            + ["base_model.model." + key, key.replace(".", "\0"), key.replace("0", "1")]
            + [key.replace("lora_A", "lora_B")]
        )
        header = {new if k == key else k: v for k, v in header.items()}
    elif kind == "drop":  # a tensor, and its bytes with it
        start, stop = header.pop(key)["data_offsets"]
        del body[start:stop]
        for k in header:
            at = header[k].get("data_offsets", [0, 0])
            if at[0] >= stop:
                header[k]["data_offsets"] = [n - (stop - start) for n in at]
    elif kind == "twice":
        raw = json.dumps(header)[:-1] + f", {json.dumps(key)}: {json.dumps(entry)}" + "}"
    elif kind == "field":
        kind, raw = _json_text(json.dumps(header), chance)
    elif kind == "deep":
        n = chance.choice([100, 5_000, 100_000])
        raw = json.dumps(header)[:-1] + ', "deep": ' + "[" * n + "]" * n + "}"
    elif kind == "number":  # in the numbers themselves
        dtype = entry["dtype"]
        size = DTYPES.get(dtype) or 1
        start, stop = entry["data_offsets"]
        if stop - start >= size:
            at = start + chance.randrange((stop - start) // size) * size
            pattern = chance.choice([b"\x00\x00\x80\x7f", b"\x00\x00\xc0\x7f", b"\xff\xff\x7f\x7f"])
            body[at : at + size] = (bytes(size) + pattern)[-size:]
            kind = f"number of {key[:40]}"
    elif kind in ("metadata", "inside"):
        field = chance.choice(list(told))
        if kind == "inside" and told[field].startswith("{"):
            kind, told[field] = _json_text(told[field], chance)
        else:
            new = chance.choice(ODD)
            told[field] = new if isinstance(new, str) else json.dumps(new)
        kind = f"{field}: {kind}"
    text = (raw if raw is not None else json.dumps(header)).encode("utf-8", "surrogatepass")
    claimed = len(text)
    if kind == "length":
        claimed = chance.choice([0, 1, claimed - 1, claimed + 1, 2**40, 2**63, len(data)])
    path.write_bytes(struct.pack("<Q", claimed) + text + body)
    return kind


def _text(path, chance):
    """Lines of JSON, YAML, CSV or plain text."""
    lines = path.read_bytes().decode("utf-8").split("\n")
    k = chance.randrange(len(lines))
    kind = chance.choice(
        ["json", "json", "twice", "delete", "swap", "odd", "nested", "bomb", "blank"]
    )
    if kind == "json" and lines[k].lstrip().startswith("{"):
        kind, lines[k] = _json_text(lines[k], chance)
    elif kind == "twice":
        lines.insert(k, lines[k])
    elif kind == "delete":
        del lines[k]
    elif kind == "swap":
        other = chance.randrange(len(lines))
        lines[k], lines[other] = lines[other], lines[k]
    elif kind == "nested":
        n = chance.choice([100, 5_000])
        lines[k] = chance.choice(["[" * n + "]" * n, " a: [" * n, '{"a":' * n])
    elif kind == "bomb":
        names = "abcdefgh"
        told = ["a: &a [x,x,x,x,x,x,x,x,x]"]
        told += [f"{b}: &{b} [{','.join(['*' + a] * 9)}]" for a, b in pairwise(names)]
        lines[k:k] = told
    elif kind == "blank":
        lines[k] = chance.choice(
            ["", "\t", " ", "\0", "\r", "\u2028", "\ufeff", "'", '"', "- ", "? "]
        )
    else:
        head, mark, _ = lines[k].partition(chance.choice([":", ","]))
        new = chance.choice(ODD)
        lines[k] = f"{head}{mark} {new if isinstance(new, str) else json.dumps(new)}"
    path.write_bytes("\n".join(lines).encode("utf-8", "surrogatepass"))
    return f"{kind} line {k}"


def _pickle(path, chance):
    """PyTorch's ZIP of a pickle and storages: its parts, its form, and what is pickled."""
    import torch

    with zipfile.ZipFile(path) as archive:
        parts = {info.filename: archive.read(info) for info in archive.infolist()}
    kind = chance.choice(
        ["code"] * 4 + ["number"] * 3 + ["odd"] * 6 + ["drop", "swap", "cut", "twice", "rename"]
        + ["packed", "bomb", "old form"]
    )  # fmt: skip
    names = [n for n in parts if "/data" in n]
    name, other = chance.choice(names), chance.choice(list(parts))
    code = next(n for n in parts if n.endswith("data.pkl"))
    if kind in ("odd", "old form"):
        state = torch.load(path, weights_only=True)
        key = chance.choice(list(state))
        if kind == "odd":
            kind, state = _odd_tensors(state, key, chance)
        torch.save(state, path, _use_new_zipfile_serialization=kind != "old form")
        return kind
    if kind in ("code", "number"):  # with the checksums of what it then is
        name = code if kind == "code" else chance.choice([n for n in names if n != code])
        at = chance.randrange(len(parts[name]))
        new = chance.choice([chance.randrange(256), parts[name][at] ^ 1 << chance.randrange(8)])
        parts[name] = parts[name][:at] + bytes([new]) + parts[name][at + 1 :]
    elif kind == "drop":
        del parts[other]
    elif kind == "swap":
        parts[name], parts[other] = parts[other], parts[name]
    elif kind == "cut":
        parts[name] = parts[name][: chance.randrange(len(parts[name]))]
    elif kind == "rename":
        parts[chance.choice(["x", "../" + name, name + "\0", "y" * 9_000])] = parts.pop(name)
    elif kind == "bomb":
        parts[name] = bytes(400 << 20)
    how = zipfile.ZIP_DEFLATED if kind in ("packed", "bomb") else zipfile.ZIP_STORED
    with warnings.catch_warnings(), zipfile.ZipFile(path, "w", how) as archive:
        warnings.simplefilter("ignore")  # of names twice
        for told, data in parts.items():
            archive.writestr(told, data)
        if kind == "twice":
            archive.writestr(other, parts[name])
    return f"{kind} {name}"


def _odd_tensors(state, key, chance):
    """What is no dict of plain tensors, or holds less than it says."""
    import torch

    t = state[key]
    odd = {
        "parameter": lambda: torch.nn.Parameter(t),
        "sparse": t.to_sparse,
        "sparse rows": lambda: t.to_sparse_csr() if t.ndim == 2 else t.to_sparse(),
        "rounded": lambda: torch.quantize_per_tensor(t, 0.1, 0, torch.qint8),
        "nowhere": lambda: t.to("meta"),
        "complex": lambda: torch.complex(t, t).conj(),
        "whole numbers": t.long,
        "flags": lambda: t > 0,
        "half": t.half,
        "wide": t.double,
        "huge": lambda: torch.zeros(1).expand(1 << 20, 1 << 20),
        "wound": lambda: torch.zeros(9).as_strided((9_000, 9_000), (0, 0)),
        "turned": lambda: t.mT if t.ndim == 2 else t,
        "part": lambda: torch.cat([t, t])[: len(t)],
        "scalar": lambda: torch.tensor(1.0),
        "none": lambda: None,
        "number": lambda: 3.0,
        "text": lambda: "x",
        "list": lambda: [t],
        "state": lambda: {"a": t},
    }
    kind = chance.choice([*odd, "shared", "list of all", "numbered", "beside", "ordered"])
    if kind in odd:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # of kinds of tensors on their way out
            return kind, {**state, key: odd[kind]()}
    if kind == "shared":
        return kind, {k: t if v.shape == t.shape else v for k, v in state.items()}
    if kind == "list of all":
        return kind, list(state.values())
    if kind == "ordered":
        return kind, OrderedDict(state)
    return kind, {**state, 1: t} if kind == "numbered" else {**state, "step": 7}


def _packed_json(path, chance):
    """What is packed, changed; or a little that unpacks to a lot."""
    if chance.random() < 0.1:
        path.write_bytes(_packed_zeros())
        return "bomb"
    what, text = _json_text(gzip.decompress(path.read_bytes()).decode(), chance)
    path.write_bytes(gzip.compress(text.encode("utf-8", "surrogatepass"), mtime=0))
    return what


@functools.cache
def _packed_zeros():
    return gzip.compress(bytes(400 << 20), 1, mtime=0)


def _head_numbers(path, chance):
    """A count, length, type, size or offset of a GGUF file's head, or another word in it."""
    data = bytearray(path.read_bytes())
    names = [b"lora_a", b"lora_b", b"attn_q", b"attn_k", b"ffn_down", b"blk.0", b"adapter", b"lora"]
    if chance.random() < 0.3:
        old, new = chance.choice(names), chance.choice(names)
        at = data.find(old, chance.randrange(len(data) // 3))
        if at >= 0 and len(old) == len(new):
            data[at : at + len(old)] = new
        path.write_bytes(data)
        return f"{old} as {new} at {at}"
    n = chance.choice([4, 8])
    small = [i for i in range(4, 1600) if data[i + 1 : i + n] == bytes(n - 1) and data[i]]
    at = chance.choice(small) if small else 8
    odd = [
        0,
        1,
        2,
        3,
        5,
        7,
        8,
        30,
        31,
        32,
        33,
        64,
        2**16,
        2**31,
        2**32 - 1,
        2**40,
        2**63,
        2**64 - 1,
    ]
    new = chance.choice(odd) % 256**n
    data[at : at + n] = new.to_bytes(n, "little")
    path.write_bytes(data)
    return f"{new} at {at}"


def _parquet(path, chance):
    """A table of other columns, or the same written in another way."""
    import pyarrow
    from pyarrow import parquet

    rows = parquet.read_table(path).to_pylist()
    kind = chance.choice(["way", "way", "value", "column", "name", "many", "none", "bytes"])
    name, row = chance.choice(list(rows[0])), chance.choice(rows)
    told, own = None, {}
    if kind == "way":
        own = {
            "compression": chance.choice(["none", "snappy", "gzip", "brotli", "zstd", "lz4"]),
            "use_dictionary": chance.random() < 0.5,
            "version": chance.choice(["1.0", "2.4", "2.6"]),
            "data_page_version": chance.choice(["1.0", "2.0"]),
            "write_statistics": chance.random() < 0.5,
        }
    elif kind == "value":
        new = chance.choice([None, "", " ", "x" * 50_000, "\0"])
        row[name] = new if isinstance(row[name], str) else None
    elif kind == "column":
        new = chance.choice([None, 1, 1e300, True, b"x", [1], {"a": 1}, datetime.date(9999, 1, 1)])
        rows = [{**r, name: new} for r in rows]
    elif kind == "name":
        new = chance.choice(["text", "adapter", "x", "", "\u2028"])
        rows = [{new if k == name else k: v for k, v in r.items()} for r in rows]
    elif kind == "many":
        rows = rows[:1] * 3_000
    elif kind == "none":
        rows = []
    else:  # texts that are none
        column = pyarrow.array([b"\xff\xfe"] * len(rows)).cast("binary").view("string")
        table = pyarrow.Table.from_pylist(rows)
        told = table.set_column(table.column_names.index(name), name, column)
    table = pyarrow.Table.from_pylist(rows) if told is None else told
    parquet.write_table(table, path, **own)
    return f"{kind} {name}"


def copied(source, target):
    """A folder as it was, in place of whatever is there."""
    shutil.rmtree(target, ignore_errors=True)
    shutil.copytree(source, target)
