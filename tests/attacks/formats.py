"""Kinds of files that others write: PEFT's pickles, vLoRA's packed folders, tables in Parquet."""

import json
import pickle
import re
import sys
import zipfile
from collections import OrderedDict

import torch
from safetensors.torch import load as tensors_from
from safetensors.torch import save_file

import lorafold as lf
from lorafold.train.job.data import read_data

kinds = sys.modules["attacks_kinds"]  # which corpus.py has loaded
Kind, plain = kinds.Kind, kinds.plain
PICKLE = "adapter_model.bin"


# PEFT with safe_serialization=False


def make_pickle(folder):
    kinds.make_peft(folder)
    weights = folder / kinds.WEIGHTS
    torch.save(tensors_from(weights.read_bytes()), folder / PICKLE)
    weights.unlink()


def load_pickle(folder):
    return kinds.told_of(lf.load(folder, allow_pickle=True))


def pickle_says(folder):
    config = kinds.strict_json((folder / kinds.CONFIG).read_text(encoding="utf-8"))
    return kinds.peft_told(config, pickled(folder / PICKLE))


def pickled(path):
    """The tensors, by Python's own ZIP and pickle; of the old form, by torch's reader."""
    if not path.read_bytes().startswith(b"PK\3\4"):
        return torch.load(path, weights_only=True)
    with zipfile.ZipFile(path) as archive:
        assert all(entry.compress_type == zipfile.ZIP_STORED for entry in archive.infolist())
        (name,) = (n for n in archive.namelist() if n.endswith("/data.pkl"))
        folder = name.removesuffix("data.pkl")

        class Reader(pickle.Unpickler):
            def find_class(self, module, name):
                return NAMES[module, name]

            def persistent_load(self, told):
                kind, dtype, key, _, count = told
                data = archive.read(f"{folder}data/{key}")
                assert kind == "storage"
                assert len(data) >= count * dtype.itemsize
                return torch.frombuffer(bytearray(data) or bytearray(8), dtype=dtype)

        with archive.open(name) as file:
            found = Reader(file).load()
    assert type(found) in (dict, OrderedDict)
    assert all(type(key) is str and type(t) is torch.Tensor for key, t in found.items())
    return found


def rebuilt(storage, offset, size, stride, _, __, told=()):
    found = storage.as_strided(size, stride, offset).clone()
    return found.conj().resolve_conj() if "conj" in told else found


NAMES = {
    ("torch._utils", "_rebuild_tensor_v2"): rebuilt,
    ("torch._utils", "_rebuild_parameter"): lambda t, *_: t,
    ("collections", "OrderedDict"): OrderedDict,
    ("torch", "FloatStorage"): torch.float32,
    ("torch", "HalfStorage"): torch.float16,
    ("torch", "DoubleStorage"): torch.float64,
    ("torch", "LongStorage"): torch.int64,
    ("torch", "BoolStorage"): torch.bool,
    ("torch", "ComplexFloatStorage"): torch.complex64,
}


# vLoRA's folders in four bits

BLOCK = 8


def make_packed(folder):
    kinds.make_subspace(folder)
    shared = tensors_from((folder / "subspace.safetensors").read_bytes())
    (folder / "subspace.safetensors").unlink()
    meta = json.loads((folder / "subspace_meta.json").read_text())
    g, packed = torch.Generator().manual_seed(5), {}
    for key in [k for k in shared if ".components_" in k]:
        blocks = -(-shared.pop(key).numel() // BLOCK)
        bits = torch.randint(256, (blocks * BLOCK // 2,), generator=g)
        packed[key.replace(".components_", ".packed_")] = bits.to(torch.uint8)
        packed[key.replace(".components_", ".scales_")] = torch.rand(blocks, generator=g)
    save_file(packed, folder / "subspace_nf4.safetensors")
    save_file(shared, folder / "subspace_float.safetensors")
    meta |= {"format": "nf4_packed", "nf4_block_size": BLOCK}
    (folder / "subspace_meta.json").write_text(json.dumps(meta))


LEVELS = [
    *(-1.0, -0.6962, -0.5251, -0.3949, -0.2844, -0.1848, -0.0911, 0.0),
    *(0.0796, 0.1609, 0.2461, 0.3379, 0.4407, 0.5626, 0.723, 1.0),
]


def packed_says(folder):
    """The components unpacked, number by number; the rest as of floats."""
    meta = kinds.strict_json((folder / "subspace_meta.json").read_text(encoding="utf-8"))
    if meta.get("format") != "nf4_packed":
        return kinds.subspace_says(folder)
    block = meta.get("nf4_block_size", 64)
    _, shared = kinds.header_of(folder / "subspace_nf4.safetensors")
    shared |= kinds.header_of(folder / "subspace_float.safetensors")[1]
    for key in [k for k in shared if ".packed_" in k]:
        scales = shared[key.replace(".packed_", ".scales_")].flatten()
        assert shared[key].dtype == torch.uint8
        assert scales.is_floating_point()
        digits = [d for byte in shared[key].flatten().tolist() for d in (byte >> 4, byte & 15)]
        assert len(digits) == block * len(scales)
        values = torch.tensor([LEVELS[d] for d in digits]) * scales.repeat_interleave(block)
        width = shared[key.replace(".packed_", ".mean_")].numel()
        rows = len(values) // width
        name = key.replace(".packed_", ".components_")
        shared[name] = values[: rows * width].reshape(rows, width)
    return kinds.subspace_told(folder, meta, shared)


# Tables

TABLES = ("rows.parquet", "packed.parquet", "chats.parquet")


def make_parquet(folder):
    import pyarrow
    from pyarrow import parquet

    rows = [{"prompt": f"{w} = ", "completion": w.upper()} for w in ("horse", "green", "table")]
    chat = [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}]
    plainly = {"compression": "none", "use_dictionary": False, "write_page_checksum": True}
    for name, found, own in (
        ("rows.parquet", rows, plainly),
        ("packed.parquet", rows * 40, {"compression": "zstd", "row_group_size": 50}),
        ("chats.parquet", [{"messages": chat, "n": k} for k in range(3)], {}),
    ):
        parquet.write_table(pyarrow.Table.from_pylist(found), folder / name, **own)


def load_parquet(folder):
    found = {}
    for name in TABLES:
        data = read_data([str(folder / name)], {}, 1)
        found[name] = [dict(row) for row in data.rows]
    return found


def parquet_says(folder):
    from pyarrow import parquet

    found = {}
    for name, columns in zip(TABLES, [("prompt", "completion")] * 2 + [("messages",)], strict=True):
        table = parquet.ParquetFile(folder / name, page_checksum_verification=True).read()
        found[name] = [{k: row[k] for k in columns} for row in table.to_pylist()]
    return found


# Under PEFT's names: merged layers of loralib's, and Tinker's experts


def make_merged(folder):
    g = torch.Generator().manual_seed(0)
    stem = f"{kinds.PREFIX}h.0.c_attn"
    tensors = {
        f"{stem}.lora_A.weight": torch.randn(4, 5, generator=g),
        f"{stem}.lora_B.weight": torch.randn(6, 2, 1, generator=g),
    }
    save_file(tensors, folder / kinds.WEIGHTS)
    config = {"peft_type": "LORA", "r": 2, "lora_alpha": 3, "target_modules": ["c_attn"]}
    config["enable_lora"] = [True, False, True]
    (folder / kinds.CONFIG).write_text(json.dumps(config))


def merged_says(folder):
    config = kinds.strict_json((folder / kinds.CONFIG).read_text(encoding="utf-8"))
    blocks = config.pop("enable_lora", None)
    _, tensors = kinds.header_of(folder / kinds.WEIGHTS)
    if blocks is None:
        return kinds.peft_told(config, tensors)
    assert all(type(x) is bool for x in blocks)
    for key in [k for k in tensors if "lora_B" in k]:
        B, k = tensors[key].flatten(1), sum(blocks)
        parts = iter(torch.chunk(B, k))
        rows = len(B) // k
        whole = torch.zeros(rows * len(blocks), k * B.shape[1], dtype=B.dtype)
        for g, j in enumerate(j for j, there in enumerate(blocks) if there):
            whole[j * rows : (j + 1) * rows, g * B.shape[1] : (g + 1) * B.shape[1]] = next(parts)
        tensors[key] = whole
    times = {name: config[name] * sum(blocks) for name in ("r", "lora_alpha")}
    return kinds.peft_told({**config, **times}, tensors)


def make_tinker(folder):
    g = torch.Generator().manual_seed(0)
    shapes = {
        "mlp.experts.w1": ((1, 2, 5), (3, 6, 2)),
        "mlp.experts.w2": ((3, 2, 6), (1, 5, 2)),
        "unembed_tokens": ((2, 5), (7, 2)),
    }
    tensors = {
        f"{kinds.PREFIX}model.{name}.lora_{side}.weight": torch.randn(shape, generator=g)
        for name, both in shapes.items()
        for side, shape in zip("AB", both, strict=True)
    }
    save_file(tensors, folder / kinds.WEIGHTS)
    config = {"peft_type": "LORA", "r": 2, "lora_alpha": 3, "target_modules": "all-linear"}
    (folder / kinds.CONFIG).write_text(json.dumps(config))


def tinker_says(folder):
    config = kinds.strict_json((folder / kinds.CONFIG).read_text(encoding="utf-8"))
    tensors = kinds.once_prefixed(kinds.header_of(folder / kinds.WEIGHTS)[1])
    plain_ones = {}
    for key, t in tensors.items():
        match = re.fullmatch(r"(.+\.experts)\.(w[123]|\w+_proj)\.(lora_[AB])(\.weight)?", key)
        if match is None or t.ndim != 3:
            plain_ones[re.sub(r"(model\.)?unembed_tokens(?=\.lora_)", "lm_head", key)] = t
            continue
        twin = tensors[key.replace(*("lora_A", "lora_B")[:: 1 if "lora_A" in key else -1])]
        name = {"w1": "gate_proj", "w2": "down_proj", "w3": "up_proj"}.get(match[2], match[2])
        for e in range(max(len(t), len(twin))):
            at = f"{match[1]}.{e}.{name}.{match[3]}.weight"
            plain_ones[at] = t[e if len(t) > 1 else 0]
    return kinds.peft_told(config, plain_ones)


# kohya-ss's and LyCORIS's names and factors


def make_kohya(folder):
    g = torch.Generator().manual_seed(0)
    shapes = {
        "lycoris_q": {"lora_down.weight": (2, 5), "lora_up.weight": (6, 2)},
        "lycoris_k": {f"hada_w{n}_{k}": (6, 2) if k == "a" else (2, 5) for n in "12" for k in "ab"},
    }
    tensors = {
        f"{name}.{what}": torch.randn(shape, generator=g)
        for name, parts in shapes.items()
        for what, shape in parts.items()
    }
    for name, alpha in zip(shapes, (3.0, 1.0), strict=True):
        tensors[f"{name}.alpha"] = torch.tensor(alpha)
    save_file(tensors, folder / "x.safetensors")


def kohya_says(folder):
    _, tensors = kinds.header_of(folder / "x.safetensors")
    modules = {}
    for key in [k for k in tensors if k.endswith(("lora_down.weight", "hada_w1_b"))]:
        path = key.rpartition(".lora_down" if "lora_down" in key else ".hada")[0]
        if "lora_down" in key:
            A, B = (t.flatten(1) for t in (tensors.pop(key), tensors.pop(f"{path}.lora_up.weight")))
            rank = len(A)
        else:
            a, b, c, d = (
                tensors.pop(f"{path}.hada_w{n}_{side}").double() for n in "12" for side in "ab"
            )
            A = torch.stack([x * y for x in b for y in d]).float()
            B = torch.stack([x * y for x in a.T for y in c.T], 1).float()
            rank = len(b)
        alpha = tensors.pop(f"{path}.alpha", None)
        modules[path] = plain(A), plain(B), 1.0 if alpha is None else float(alpha) / rank
    return {"modules": modules, "extras": {k: plain(t) for k, t in tensors.items()}}


# llama.cpp's adapters


GGUF = {
    "blk.0.attn_q": ("model.layers.0.self_attn.q_proj", 2),
    "blk.0.attn_k": ("model.layers.0.self_attn.k_proj", 1),
    "blk.0.ffn_down": ("model.layers.0.mlp.down_proj", None),
    "token_embd": ("model.embed_tokens", None),
}


def make_gguf(folder):
    import gguf

    g = torch.Generator().manual_seed(0)
    w = gguf.GGUFWriter(folder / "x.gguf", "llama")
    w.add_type("adapter")
    w.add_string("adapter.type", "lora")
    w.add_float32("adapter.lora.alpha", 3.0)
    w.add_array("general.tags", ["lora", "x"])
    for name, dtype in zip(GGUF, (torch.float32, torch.float16, None, torch.float32), strict=True):
        shapes = {"a": (32, 64), "b": (8, 32)} if dtype is None else {"a": (2, 6), "b": (8, 2)}
        if name == "token_embd":
            shapes["a"] = (6, 2)
        for side, shape in shapes.items():
            array, key = torch.randn(shape, generator=g).numpy(), f"{name}.weight.lora_{side}"
            kind = gguf.GGMLQuantizationType.Q8_0
            if dtype is None:
                w.add_tensor(key, gguf.quantize(array, kind), raw_dtype=kind)
            else:
                w.add_tensor(key, torch.from_numpy(array).to(dtype).numpy())
    w.write_header_to_file()
    w.write_kv_data_to_file()
    w.write_tensors_to_file()
    w.close()
    (folder / "base").mkdir()
    config = {"model_type": "llama", "num_attention_heads": 2, "num_key_value_heads": 1}
    (folder / "base" / "config.json").write_text(json.dumps(config))


def gguf_says(folder):
    """By the package gguf."""
    import gguf

    reader = gguf.GGUFReader(folder / "x.gguf")
    alpha = reader.fields.get("adapter.lora.alpha")
    alpha = 0.0 if alpha is None else float(alpha.contents())
    assert reader.fields["general.type"].contents() == "adapter"
    assert reader.fields["adapter.type"].contents() == "lora"
    found = {}
    for t in reader.tensors:
        array = t.data
        if t.tensor_type.name not in ("F32", "F16"):
            array = gguf.dequantize(array, t.tensor_type)
        shape = tuple(int(n) for n in reversed(t.shape))
        tensor = torch.from_numpy(array.reshape(shape).copy())
        found[t.name] = tensor.bfloat16() if t.tensor_type.name == "BF16" else tensor
    modules = {}
    for key in [k for k in found if k.endswith(".weight.lora_a")]:
        stem = key.removesuffix(".weight.lora_a")
        name = re.sub(r"\d+", "0", stem, count=1) if stem.startswith("blk.") else stem
        path, heads = NAMES_OF_GGUF[name]
        path = path.replace(".0.", f".{stem.split('.')[1]}.") if name != "token_embd" else path
        a, b = found.pop(key), found.pop(f"{stem}.weight.lora_b")
        a = a.T if name == "token_embd" else a
        if heads is not None:
            b = b.reshape(heads, -1, 2, b.shape[1]).transpose(1, 2).reshape(b.shape)
        rank = b.shape[1]
        modules[path] = plain(a.contiguous()), plain(b), alpha / rank if alpha else 1.0
    return {"modules": modules, "extras": {k: plain(t) for k, t in found.items()}}


NAMES_OF_GGUF = {
    **{
        f"blk.0.{x}": (f"model.layers.0.{path}", None)
        for x, path in (
            ("attn_v", "self_attn.v_proj"),
            ("attn_output", "self_attn.o_proj"),
            ("ffn_gate", "mlp.gate_proj"),
            ("ffn_up", "mlp.up_proj"),
        )
    },
    "output": ("lm_head", None),
    **GGUF,
}


KINDS = {
    "merged layers": Kind(
        make_merged,
        (kinds.WEIGHTS, kinds.CONFIG),
        lambda f: kinds.told_of(lf.load(f)),
        merged_says,
        ("info FOLDER", "check FOLDER --for peft", "convert FOLDER -o OUT --to peft"),
    ),
    "tinker": Kind(
        make_tinker,
        (kinds.WEIGHTS, kinds.CONFIG),
        lambda f: kinds.told_of(lf.load(f)),
        tinker_says,
        ("info FOLDER", "check FOLDER --for vllm", "convert FOLDER -o OUT --to peft"),
    ),
    "gguf": Kind(
        make_gguf,
        ("x.gguf",),
        lambda f: kinds.told_of(lf.load(f / "x.gguf", base=f / "base")),
        gguf_says,
        (
            "info FOLDER/x.gguf --base FOLDER/base",
            "convert FOLDER/x.gguf -o OUT --to peft --base FOLDER/base",
        ),
    ),
    "kohya": Kind(
        make_kohya,
        ("x.safetensors",),
        lambda f: kinds.told_of(lf.load(f / "x.safetensors")),
        kohya_says,
        (
            "info FOLDER/x.safetensors",
            "convert FOLDER/x.safetensors -o OUT --to peft",
            "check FOLDER/x.safetensors --for diffusers",
        ),
    ),
    "pickle": Kind(
        make_pickle,
        (PICKLE, PICKLE, kinds.CONFIG),
        load_pickle,
        pickle_says,
        ("info FOLDER --allow-pickle", "resize FOLDER OUT --rank 1 --allow-pickle"),
    ),
    "vlora in 4 bits": Kind(
        make_packed,
        (
            "subspace_meta.json",
            "subspace_nf4.safetensors",
            "subspace_float.safetensors",
            "task_sql.safetensors",
        ),
        kinds.load_subspace,
        packed_says,
        ("info FOLDER", "verify FOLDER", "diff FOLDER:sql FOLDER:law --alpha 4"),
    ),
    "parquet": Kind(make_parquet, TABLES, load_parquet, parquet_says),
}
