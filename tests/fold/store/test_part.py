"""Lists of adapters: whatever is edited in their bytes is what would be written anew."""

import dataclasses
import gzip
import json
import random

import pytest

from lorafold.errors import FileError
from lorafold.fold.store.entries import AdapterEntry, Rows
from lorafold.fold.store.fields import encoded
from lorafold.fold.store.manifest import Manifest, compressed
from lorafold.fold.store.part import Entries, Line, bits_of
from lorafold.fold.store.shard_writer import ShardInfo

PLAIN = [*(f"a{k}" for k in range(20)), "é", "a b/c", "", "名"]
ODD = [
    'a"b',
    "x\\y",
    "\udc80",
    "line\n",
    '},{"name":"a1',
    '","order":',
    'a1","order":1,"id":1,"digest":',
]
LOOKALIKE = {"set": {"x": [{"a": 1}, {"name": "a1", "order": 1, "id": 1, "digest": "d"}]}}


def entry(name, k, **more):
    return AdapterEntry(name, k, k, "0" * 64, 10 + k, 7, 4, 0.1 / (k + 1), **more)


def reopened(manifest):
    """As another process has it: nothing but the lists' bytes."""
    parts = []
    for part in manifest.parts:
        raw = part.entries.to_bytes()
        _, written = part.written(raw)
        size = len(json.loads(raw))
        entries = Entries(lambda raw=raw: raw, "the list", part.prefix, size, lambda: b"")
        parts.append(dataclasses.replace(written, entries=entries))
    return dataclasses.replace(manifest, parts=tuple(parts))


@pytest.mark.parametrize("names", [PLAIN, [*PLAIN, *ODD]], ids=["plain", "odd"])
@pytest.mark.parametrize("config", [{}, LOOKALIKE])
@pytest.mark.parametrize("reopen", [True, False])
def test_an_edited_list_is_the_one_written_anew(names, config, reopen, monkeypatch):
    monkeypatch.setattr("lorafold.fold.store.part._LONGEST", 6)
    monkeypatch.setattr("lorafold.fold.store.part._SHORT", 2)
    chance = random.Random(0)
    manifest, model = Manifest(), {}
    for step in range(300):
        name = chance.choice(names)
        if name in model and chance.random() < 0.6:
            del model[name]
            manifest = manifest.changed((), {name})
        else:
            own = config if chance.random() < 0.2 else {}
            fresh = entry(name, manifest.next_id, config=own)
            if name in model:
                fresh = dataclasses.replace(fresh, order=model[name].order)
            model[name] = fresh
            manifest = manifest.changed([fresh])
        if reopen and step % 3:
            manifest = reopened(manifest)
        for asked in names:
            assert (asked in manifest.adapters) == (asked in model)
        in_order = sorted(model.values(), key=lambda e: e.order)
        for part in manifest.parts:
            mine = [e for e in in_order if bits_of(e.name).startswith(part.prefix)]
            raw = b"[%s]" % b",".join(encoded(e.to_json()) for e in mine)
            assert part.entries.to_bytes() == raw
            assert part.count == len(mine) <= 6
        assert {name: manifest.adapters[name] for name in model} == model
        if step % 10 == 0:
            assert list(manifest.adapters) == [e.name for e in in_order]


def test_one_that_is_laid_out_otherwise_is_read():
    some = [entry(f"a{k}", k) for k in range(9)]
    objects = [e.to_json() for e in some]
    turned = [dict(reversed(found.items())) for found in objects]
    for raw in (json.dumps(objects, indent=1), json.dumps(turned), json.dumps(turned[::-1])):
        entries = Entries(lambda raw=raw: raw.encode(), "the list", "", 9)
        assert "a9" not in entries
        assert [entries[e.name] for e in some] == some
        assert set(entries) == {e.name for e in some}


def test_what_only_looks_like_a_list_is_refused_when_it_is_read():
    raw = b"[%s]" % b",".join(encoded(entry(f"a{k}", k).to_json()) for k in range(3))
    broken = raw.replace(b'"rank":4', b'"rank":[}', 1)
    entries = Entries(lambda: broken, "the list", "", 3)
    assert entries["a1"] == entry("a1", 1)
    with pytest.raises(FileError, match=r"adapter 'a0' is not valid JSON"):
        entries["a0"]
    for size in (2, 4):
        with pytest.raises(FileError, match=f"lists 3 adapters, the manifest says {size}"):
            Entries(lambda: raw, "the list", "", size)["a0"]
    with pytest.raises(FileError, match="whose place is another list"):
        list(Entries(lambda: raw, "the list", bits_of("a0")[:9], 3))


def test_the_copy_in_pieces_unpacks_to_the_manifest(monkeypatch):
    monkeypatch.setattr("lorafold.fold.store.part._LONGEST", 4)
    manifest = Manifest().changed([entry(f"a{k}", k) for k in range(300)])
    shards = [ShardInfo(10 + k, f"{k:064}", f"{k + 9:064}") for k in range(5)]
    rows = {s.name: Rows(10 * k, 10 * k + 9, 10) for k, s in enumerate(shards)}
    kept = {}
    for k in range(40):
        manifest = reopened(manifest.changed((), {f"a{k}"}))
        rows[shards[k % 5].name] = rows[shards[k % 5].name].without([10 * (k % 5) + k // 5])
        raw = manifest.holding(rows).to_bytes({s.name: s for s in shards})
        assert json.loads(raw)["adapters"][0]["file"] == manifest.parts[0].file.name
        kept[raw] = compressed(raw)
        assert kept[raw].count(gzip.compress(b"", 6, mtime=0)[:9]) > 4
    assert all(gzip.decompress(data) == raw for raw, data in kept.items())


@pytest.mark.parametrize("junk", [b",{}", b",[1],{}", b",5,{}", b"}", b',"x":{}', b" {}"])
def test_what_is_beside_the_objects_of_a_list_is_found_when_all_are_asked_for(junk):
    (line,) = Entries.of("", [Line.of(entry("a", 0))]).lines.values()
    raw = b"[" + line.json + junk + b"]"
    with pytest.raises(FileError):
        list(Entries(lambda: raw, "a list", "", 1))
