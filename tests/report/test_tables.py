"""What objects show in a notebook: small tables, with names as text."""

from __future__ import annotations

import dataclasses
import json
from html.parser import HTMLParser

import pytest
import torch

import lorafold as lf
from lorafold.train.steering.calibrate import Calibration as Strength
from lorafold.words import html_table


class Cells(HTMLParser):
    def __init__(self, text):
        super().__init__()
        self.tags, self.cells = set(), []
        self.feed(text)

    def handle_starttag(self, tag, attrs):
        self.tags.add(tag)
        assert dict(attrs).keys() <= {"style"}
        if tag in ("td", "th", "b"):
            self.cells.append("")

    def handle_data(self, data):
        self.cells[-1] += data


def shown(thing):
    found = Cells(thing._repr_html_())
    assert found.tags <= {"table", "caption", "b", "thead", "tbody", "tr", "td", "th"}
    return found.cells


def test_an_adapter_shows_its_kinds_of_module(make_adapter, shapes):
    a = make_adapter(shapes(4), 3)
    cells = shown(dataclasses.replace(a, base_model="<b>base</b>"))
    assert cells[0] == f"{a!r} on <b>base</b>"
    start = cells.index("model.layers.#.self_attn.q_proj")
    assert cells[start : start + 4] == ["model.layers.#.self_attn.q_proj", "4", "(64, 128)", "3"]


def test_an_adapter_of_many_shapes_is_short(make_adapter):
    a = make_adapter({f"layers.{n}.q": (8 + n, 6) for n in range(30)}, 2)
    assert shown(a)[-2] == "(8, 6), (9, 6), (10, 6), (11, 6) and 26 more"


def test_an_adapter_of_extras_only_shows():
    assert "0 modules" in shown(lf.Adapter({}, {"head": torch.ones(1)}))[0]


def test_a_library_shows_its_adapters(collection, nasty):
    lib = lf.fold(collection(24, layers=1), tolerance=0.1)
    cells = shown(lib)
    assert cells[0] == f"{lib!r}, tolerance 0.1"
    assert nasty[0] in cells
    assert "and 4 more" in cells


def test_similarity_shows_its_pairs(collection, nasty):
    s = lf.similarity(collection(24))
    cells = shown(s)
    at = cells.index(nasty[0])
    assert cells[at : at + 3] == [nasty[0], nasty[1], "1.000"]


def test_a_live_model_shows_what_runs(net, three):
    live = lf.attach(net, {**three, "<i>d": three["a"]})
    live.use({"a": 1.0, "<i>d": 0.5})
    cells = shown(live)
    assert cells[0] == repr(live)
    assert [cells[cells.index(n) + 2] for n in ("a", "b", "<i>d")] == ["runs", "at rest", "runs"]
    assert cells[cells.index("b") + 1] == "2"
    live.use(None)
    live.merge({"b": 1.0})
    assert shown(live)[shown(live).index("b") + 2] == "merged"
    live.detach()
    assert "detached" in shown(live)[0]


def test_a_live_model_of_many_is_short(net, three):
    live = lf.attach(net, {f"n{i}": three["b"] for i in range(25)})
    assert "and 5 more" in shown(live)


def test_a_library_is_rows_and_completes_its_names(collection):
    lib = lf.fold(collection(3, layers=1), tolerance=0.1)
    rows = lib.rows()
    assert [row["name"] for row in rows] == lib._ipython_key_completions_() == lib.names
    for row in rows:
        entry = lib.entry(row["name"])
        assert {key: row[key] for key in ("error", "bound", "bytes")} == {
            key: entry[key] for key in ("error", "bound", "bytes")
        }
        assert row["rank"] == max(entry["ranks"])
    assert lib == lf.fold(collection(3, layers=1), tolerance=0.1)
    assert lib != lf.fold(collection(2, layers=1), tolerance=0.1)
    pandas = pytest.importorskip("pandas")
    assert list(pandas.DataFrame(rows)["error"]) == [lib.error(name) for name in lib]


def test_a_summary_shows_its_layers_and_sums(make_net, three):
    net = make_net().to(torch.bfloat16)
    summary = lf.attach(net, {**three, "<i>": lf.LoRA(rank=2, targets="q")}).summary()
    cells = shown(summary)
    assert f"trainable {summary.trainable:,}" in cells[0]
    at = cells.index("layers.0.q")
    assert cells[at : at + 5] == ["layers.0.q", "64", "bfloat16", "144", "69.23%"]
    assert cells[at + 5] == "a: 4, b: 2, c: 1, <i>: 2"
    told = json.loads(json.dumps(summary.to_dict()))
    assert (told["original"], told["total"]) == (summary.original, summary.total)
    assert (told["trainable"], told["frozen"]) == (summary.trainable, summary.frozen)
    assert told["layers"] == json.loads(json.dumps(summary.rows()))
    assert {layer["format"] for layer in told["layers"]} == {"bfloat16"}
    assert summary.layers[0].ratio == told["layers"][0]["ratio"]


def test_a_footprint_and_the_format_of_layers():
    pytest.importorskip("bitsandbytes")
    model = torch.nn.Sequential(*(torch.nn.Linear(64, 64) for _ in range(23)))
    footprint = lf.quantize_base(model, targets=[str(n) for n in range(22)], group_size=64)
    cells = shown(footprint)
    assert "nf4, 4 bits" in cells[0]
    assert f"→ {footprint.after:,} bytes" in cells[0]
    assert [cells[cells.index("3") + 1], cells[-8]] == ["64×64", "and 2 more"]
    assert footprint.rows()[3] == {**vars(footprint.layers[3]), "after": footprint.layers[3].after}
    summary = lf.attach(model, lf.LoRA(rank=2)).summary()
    assert [x.format for x in summary.layers][-2:] == ["nf4", "float32"]
    assert "nf4" in shown(summary)


def test_calibrations_show_their_figures(net):
    def calibrated(seed):
        g = torch.Generator().manual_seed(seed)
        return lf.calibrate(net, [torch.randint(0, 13, (4, 5), generator=g)], targets=["q", "up"])

    found = calibrated(0)
    cells = shown(found)
    assert cells[0] == repr(found) == f"Calibration({len(found)} layers, 1 sets of inputs)"
    (row, *_) = found.rows()
    std = found["layers.0.q"].std
    assert (row["path"], row["directions"]) == ("layers.0.q", len(std))
    assert (row["largest_std"], row["largest_other_std"]) == (float(std.max()), None)
    assert cells[cells.index("layers.0.q") + 1] == str(len(std))
    assert found._ipython_key_completions_() == list(found)
    assert found == calibrated(0) != calibrated(1)
    with pytest.raises(lf.UnknownNameError, match=r"no layer 'layers.0.qq'.*did you mean"):
        found["layers.0.qq"]


def test_a_strength_shows_what_was_tried():
    found = Strength(0.5, 1.2345678, ((1.0, 3.0), (0.5, 1.2345678)), converged=False)
    cells = shown(found)
    assert cells[0] == "c = 0.5, KL 1.235 (no closer)"
    assert cells[1:] == ["c", "kl", "1", "3", "0.5", "1.235"]
    assert found.rows()[1] == {"c": 0.5, "kl": 1.2345678}


@pytest.mark.parametrize("text", ["<script>", "a&b", '"', "two\nlines", "\udc80"])
def test_cells_are_text(text):
    (title, head, cell) = Cells(html_table(text, [(text,)], (text,))).cells
    assert title == head == cell
    assert "\n" not in cell
    cell.encode()
