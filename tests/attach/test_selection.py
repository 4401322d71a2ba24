"""What `use` takes, and what it refuses: with the reason, and without changing what runs."""

import numpy as np
import pytest
import torch

import lorafold as lf
from lorafold.attach.selection import Row, Selection
from lorafold.errors import MismatchError, UnknownNameError

NAMES = ["a", "b", "sql"]


def test_weights_and_c_multiply():
    assert Selection.of("a", None, None, NAMES) == Selection((Row((("a", 1.0),)),))
    assert Selection.of("a", -0.5, 3, NAMES) == Selection((Row((("a", -0.5),), 3),))
    mix = Selection.of({"a": 1, "b": -0.25}, 2, None, NAMES)
    assert mix.rows[0].mix == (("a", 2.0), ("b", -0.5))
    assert mix.uniform


def test_rows_have_their_own_c_and_rank():
    rows = Selection.of(["a", None, {"a": 2, "b": 1}], [1, 5, -0.5], [2, 1, {"q": 3}], NAMES)
    assert not rows.uniform
    assert [r.mix for r in rows.rows] == [(("a", 1.0),), (), (("a", -1.0), ("b", -0.5))]
    assert [r.rank for r in rows.rows] == [2, 1, {"q": 3}]
    assert Selection.of(("a", "b"), 2, 1, NAMES).rows[1] == Row((("b", 2.0),), 1)


def test_a_rank_may_be_of_an_array():
    for k in (torch.tensor(2), np.array(2), np.int64(2)):
        assert Selection.of("a", None, k, NAMES) == Selection.of("a", None, 2, NAMES)
    assert Selection.of(["a"], None, [torch.tensor(2)], NAMES).rows[0].rank == 2


@pytest.mark.parametrize(
    "c", [torch.tensor([0.5, 2.0]), np.array([0.5, 2.0]), (0.5, np.float32(2))], ids=str
)
def test_c_of_rows_may_be_an_array(c):
    assert [r.mix[0][1] for r in Selection.of(["a", "b"], c, None, NAMES).rows] == [0.5, 2.0]


def test_mix_widths_are_padded_to_powers_of_two():
    wide = dict.fromkeys(NAMES, 1)
    for what, width in [(None, 1), ("a", 1), ({"a": 1, "b": 1}, 2), (wide, 4), (["a", wide], 4)]:
        assert Selection.of(what, None, None, NAMES).width == width


BAD = [
    (3, {}, "a row's adapter must be a name, None or {name: weight}, found 3"),
    ([["a"]], {}, "a row's adapter must be a name"),
    ([], {}, r"use\(\[\]\) selects no row"),
    ("a", {"c": "1"}, "c must be a finite number, found '1'"),
    ("a", {"c": float("nan")}, "c must be a finite number, found nan"),
    ("a", {"c": float("inf")}, "c must be a finite number, found inf"),
    ("a", {"c": True}, "c must be a finite number, found True"),
    (
        "a",
        {"c": torch.ones(2, 1)},
        r"c must be a finite number, found tensor\(\[\[1\.\], \[1\.\]\]\)",
    ),
    ({"a": None}, {}, "the weight of 'a' must be a finite number, found None"),
    ("a", {"c": [1, 2]}, "c= has one entry per row, so the adapters must be a list"),
    ("a", {"rank": [1, 2]}, "rank= has one entry per row, so the adapters must be a list"),
    (["a", "b"], {"c": [1, 2, 3]}, "c has 3 entries for 2 rows"),
    (["a", "b"], {"rank": [1]}, "rank has 1 entries for 2 rows"),
    (["a", "b"], {"c": [1, None, 2]}, "c has 3 entries for 2 rows"),
    ("a", {"rank": -1}, "rank must be a whole number of at least 0, found -1"),
    ("a", {"rank": 1.5}, "rank must be a whole number of at least 0, found 1.5"),
    ("a", {"rank": True}, "rank must be a whole number of at least 0, found True"),
    ("a", {"rank": {"q": -2}}, "rank must be a whole number of at least 0, found -2"),
    ("a", {"rank": 5}, "rank 5 is above that of every module; the largest is 4"),
    ("b", {"rank": 3}, "rank 3 is above that of every module; the largest is 2"),
    (["b", "a"], {"rank": [3, 3]}, "rank 3 is above that of every module; the largest is 2"),
    ("a", {"rank": {"q": 5}}, "rank 5 is above that of every module"),
    ("a", {"rank": {"k_proj": 2}}, "rank= names 'k_proj', which is no attached module"),
]


@pytest.mark.parametrize(("what", "options", "message"), BAD)
def test_a_bad_choice_changes_nothing(net, three, x, what, options, message):
    live = lf.attach(net, three)
    live.use("b", c=0.5)
    before = net(x)
    with pytest.raises(MismatchError, match=message):
        live.use(what, **options)
    assert live.active == {"b": 0.5}
    assert torch.equal(net(x), before)


@pytest.mark.parametrize("what", ["sqll", {"sqll": 1}, ["a", "sqll"], [{"sqll": 1.0}]])
def test_unknown_names(what):
    with pytest.raises(UnknownNameError, match="no adapter 'sqll' is attached; did you mean 'sql'"):
        Selection.of(what, None, None, NAMES)
    with pytest.raises(UnknownNameError, match="there are 3: 'a', 'b', 'sql'"):
        Selection.of("unlike", None, None, NAMES)


def test_a_name_of_another_type_is_unknown():
    with pytest.raises(UnknownNameError, match="no adapter 3"):
        Selection.of({3: 1.0}, None, None, NAMES)


@pytest.mark.parametrize("rows", [4, 5, 12])
def test_a_batch_that_is_no_multiple_of_the_rows(net, three, x, rows):
    live = lf.attach(net, three)
    message = f"batch of 6 .* no multiple of the {rows} rows"
    with pytest.raises(MismatchError, match=message), live.use(["a"] * rows):
        net(x)
    assert live.active == {}
