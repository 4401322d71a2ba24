"""Few bytes that want to become many: an error, before they do.

Sizes are such that a test is quick; `benchmarks/attacks.py` has the larger ones, and the time.
"""

import contextlib
import hashlib
import importlib.util
import itertools
import json
import struct
import warnings
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

import lorafold as lf
from lorafold.errors import FileError, LorafoldError
from lorafold.files.base import read_base
from lorafold.fold.coding.record import decode

spec = importlib.util.spec_from_file_location("attacks_judge", Path(__file__).with_name("judge.py"))
judge = importlib.util.module_from_spec(spec)
spec.loader.exec_module(judge)

BRACES = 20_000_000
CONFIG = {"r": 2, "lora_alpha": 4, "peft_type": "LORA"}


def refused(load, match, error=FileError):
    """It is, within the limits of time and memory."""
    with judge.limited() as used, pytest.raises(error, match=match):
        load()
    assert used[0] < judge.MEMORY


def with_header(path, text):
    path.write_bytes(struct.pack("<Q", len(text)) + text)
    return path


def braces(count=BRACES):
    return b"[" + b"{}," * (count // 3) + b"{}]"


def test_a_key_of_dots(tmp_path):
    entry = {"dtype": "F32", "shape": [0], "data_offsets": [0, 0]}
    for key in ("." * 120_000, "a." * 60_000 + "lora_A.weight"):
        file = with_header(tmp_path / "a.safetensors", json.dumps({key: entry}).encode())
        refused(lambda file=file: lf.load(file, alpha=1), "letters")
        refused(lambda file=file: read_base(file), "letters")
    state = {"." * 120_000 + end: torch.ones(2, 2) for end in ("lora_A.weight", "lora_B.weight")}
    with judge.limited() as used, contextlib.suppress(LorafoldError):
        lf.load(state, alpha=1)
    assert used[0] < judge.MEMORY


def test_braces_without_end(tmp_path):
    lf.save(lf.Adapter({"q": lf.LowRank(torch.ones(2, 3), torch.ones(4, 2))}), tmp_path / "a")
    config = tmp_path / "a" / "adapter_config.json"
    config.write_bytes(b'{"r": 2, "lora_alpha": 4, "x": ' + braces() + b"}")
    refused(lambda: lf.load(tmp_path / "a"), "brackets without end")
    for text in (b'{"x": ' + braces() + b"}", b'{"__metadata__": {"x": ' + braces() + b"}}"):
        file = with_header(tmp_path / "b.safetensors", text)
        refused(lambda file=file: lf.load(file, alpha=1), r"b\.safetensors")
    (tmp_path / "base").mkdir()
    save_file({"q.weight": torch.ones(4, 3)}, tmp_path / "base" / "model.safetensors")
    (tmp_path / "base" / "config.json").write_bytes(b'{"x": ' + braces() + b"}")
    refused(lambda: read_base(tmp_path / "base"), "brackets without end")


def test_a_library_whose_manifest_or_list_is_braces(tmp_path):
    """With checksums that are right: whoever wrote it knows how."""
    lib = tmp_path / "lib"
    u = lf.LowRank(torch.ones(2, 3), torch.ones(4, 2))
    lf.fold({"a": lf.Adapter({"q": u})}, lib).close()
    manifest, (part,) = lib / "library.json", lib.glob("adapters-*.json")
    raw = manifest.read_bytes()

    def sealed(raw):
        rest = raw[raw.index(b",") + 1 :]
        digest = hashlib.sha256(b"{" + rest).hexdigest().encode()
        manifest.write_bytes(b'{"sha256":"' + digest + b'",' + rest)

    sealed(raw)
    assert manifest.read_bytes() == raw  # that is how it is done
    for more in (braces(), b"[" * 100_000 + b"]" * 100_000):
        sealed(raw[:-1] + b',"x":' + more + b"}")
        refused(lambda: lf.Library.open(lib), "not valid JSON")
    data = part.read_bytes()[:-1] + b"," + braces()[1:]
    part.write_bytes(data)
    told, old = json.loads(raw), part.name
    digest = hashlib.sha256(data).hexdigest()
    name = f"adapters-{digest[:16]}.json"
    told["adapters"] = [{"file": name, "bytes": len(data), "sha256": digest}]
    told["adapters"][0] |= {"prefix": "", "listed": 1}
    part.rename(lib / name)
    assert name != old
    sealed(json.dumps(told, separators=(",", ":")).encode())
    refused(lambda: list(lf.Library.open(lib)), "brackets without end")


def test_eleven_parameters_of_one_module():
    """11! orders in which their factors may lie."""
    names = [f"mlp.experts.w{k}" for k in range(11)]
    config = {**CONFIG, "target_modules": [], "target_parameters": names}
    tensors = {}
    for k, layer in itertools.product(range(11), range(4)):
        stem = f"base_model.model.layers.{layer}.mlp.experts" + ".base_layer" * k
        tensors[f"{stem}.lora_A.weight"] = torch.ones(8, 5 + k)
        tensors[f"{stem}.lora_B.weight"] = torch.ones(7, 8)
    with judge.limited() as used:
        found = lf.load(tensors, config=config)
    assert used[0] < judge.MEMORY
    assert len(found) == 11 * 4 * 4  # of every parameter and layer four experts, of rank 2
    assert {u.shape[1] for u in found.values()} == set(range(5, 16))


def test_a_record_of_many_parts():
    """164 kB that stand for 11,000 pairs of sides of 36,864 numbers each: 6 GB."""
    part = struct.pack("<BB", 1, 3) + struct.pack("<HH", 0, 1) * 2 + struct.pack("<HBf", 1, 0, 1.0)
    part += b"\x11\0\x3c\xff"
    record = part * (164_000 // len(part))
    shape = (36_864, 36_864)

    def basis(side, number, columns):
        return torch.ones(shape[0], columns)

    assert decode(part, shape, basis).rank == 1
    refused(lambda: decode(record, shape, basis), "more parts")


BOMBS = ["(a+)+$", "(.*)*x", "^(([a-z])+.)+[A-Z]([a-z])+$", "(a|aa)+$", ".*" * 200 + "x"]
FIELDS = ["rank_pattern", "alpha_pattern", "target_modules", "exclude_modules", "layers_pattern"]


@pytest.mark.parametrize("pattern", BOMBS)
@pytest.mark.parametrize("field", FIELDS)
def test_an_expression_that_backtracks(field, pattern, tmp_path):
    path = "a" * 40 + ".layers.0." + "b" * 40
    stem = f"base_model.model.{path}"
    tensors = {f"{stem}.lora_A.weight": torch.ones(2, 3), f"{stem}.lora_B.weight": torch.ones(4, 2)}
    value = {pattern: 2} if field.endswith("_pattern") and field != "layers_pattern" else pattern
    config = {**CONFIG, field: value, "layers_to_transform": [0]}
    told = contextlib.suppress(LorafoldError)
    with judge.limited() as used, warnings.catch_warnings(), told:
        warnings.simplefilter("ignore")
        adapter = lf.load(tensors, config=config)
        lf.save(adapter, tmp_path / "a")  # which asks whether the targets mean what is there
    assert used[0] < judge.MEMORY
