"""The grammar of names: an exact name wins, all else is bounded."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

import lorafold as lf
from lorafold.serve.naming import HIGHEST, LONGEST, MOST, STRONGEST, Named, parsed

NAMES = {"sql", "polite", "a+b", "a", "b", "x@c=2", "q:1", "über/x, y", "c"}


@pytest.mark.parametrize(
    ("text", "mix", "c", "rank"),
    [
        ("sql", [("sql", 1)], 1, None),
        ("sql@c=0.5", [("sql", 1)], 0.5, None),
        ("sql@c=-2", [("sql", 1)], -2, None),
        ("sql@r=4", [("sql", 1)], 1, 4),
        ("sql@c=.25@r=4", [("sql", 1)], 0.25, 4),
        ("sql@r=4@c=+1.", [("sql", 1)], 1, 4),
        ("sql:0.7+polite:-0.3", [("sql", 0.7), ("polite", -0.3)], 1, None),
        ("sql+polite", [("sql", 1), ("polite", 1)], 1, None),
        ("sql:2", [("sql", 2)], 1, None),
        ("sql:0.7+polite:-0.3@c=0.5@r=2", [("sql", 0.7), ("polite", -0.3)], 0.5, 2),
        ("über/x, y@c=0", [("über/x, y", 1)], 0, None),
        # names that spell something else
        ("a+b", [("a+b", 1)], 1, None),
        ("a+b:0.5", [("a+b", 0.5)], 1, None),
        ("b+a", [("b", 1), ("a", 1)], 1, None),
        ("a+b+a", [("a+b", 1), ("a", 1)], 1, None),
        ("b+a+b:2", [("b", 1), ("a+b", 2)], 1, None),
        ("x@c=2", [("x@c=2", 1)], 1, None),
        ("x@c=2@c=3", [("x@c=2", 1)], 3, None),
        ("x@c=2@r=3", [("x@c=2", 1)], 1, 3),
        ("x@c=2:0.5+sql", [("x@c=2", 0.5), ("sql", 1)], 1, None),
        ("q:1", [("q:1", 1)], 1, None),
        ("q:1:2", [("q:1", 2)], 1, None),
        ("c@c=3", [("c", 1)], 3, None),
    ],
)
def test_what_a_name_asks_for(text, mix, c, rank):
    assert parsed(text, NAMES) == Named(tuple(mix), c, rank)


@pytest.mark.parametrize(
    "text",
    [
        *(
            "",
            "nope",
            "nope@c=0.5",
            "nope@c=x",
            "nope@q=1",
            "../../etc/passwd",
            "a\0b",
            "sql ",
            "SQL",
        ),
        *("sql+", "+sql", "sql++polite", "sql+nope", "nope:1", ":1", "@c=1", "sql@", "sql@c"),
        *("sql:x", "sql:nan+polite", "sql:", "sql:1e3", "sql:+polite", "sql@c=1@q=2@r=3"),
        *("sql@c=1@c=2", "x" * 5_000, "sql" + "@c=1" * 500, "sql+" * 9_999),
    ],
)
def test_what_spells_no_adapter(text):
    with pytest.raises(lf.errors.UnknownNameError, match="there is no adapter") as e:
        parsed(text, NAMES)
    assert len(str(e.value)) < 200


@pytest.mark.parametrize(
    ("text", "why"),
    [
        *(
            (f"sql@c={c}", "c must be")
            for c in ("x", "nan", "inf", "1e3", "", "1000.5", "٣", "0x1", "1 ")
        ),
        *((f"sql@r={r}", "r must be") for r in ("0", "-1", "1.0", "", "65537", "9" * 200, "²")),
        ("sql:1+polite:-1001", "the weight of 'polite'"),
        ("sql@q=1", "'@q=' is no option"),
        ("sql+sql:2", "'sql' is named twice"),
        ("sql@c=" + "1" * 500, "c must be"),
    ],
)
def test_numbers_are_plain_and_bounded(text, why):
    with pytest.raises(lf.errors.MismatchError, match=why) as e:
        parsed(text, NAMES)
    assert len(str(e.value)) < 300


def test_the_limits_themselves_are_allowed():
    assert parsed(f"sql@c=-{STRONGEST:.0f}@r={HIGHEST}", NAMES).c == -STRONGEST
    names = [f"n{i}" for i in range(MOST + 1)]
    assert len(parsed("+".join(names[:MOST]), names).mix) == MOST
    with pytest.raises(lf.errors.UnknownNameError):
        parsed("+".join(names), names)
    long = "n" * 2 * LONGEST
    assert parsed(long, {long}).mix == ((long, 1),)


class Counted(set):
    def __init__(self, names):
        super().__init__(names)
        self.asked = 0

    def __contains__(self, name):
        self.asked += 1
        return super().__contains__(name)


@given(st.text(alphabet="sqla+b:@c=r.0123456789-", max_size=60))
def test_any_text_is_read_or_refused_in_a_bounded_number_of_lookups(text):
    known = Counted(NAMES)
    try:
        found = parsed(text, known)
    except (lf.errors.UnknownNameError, lf.errors.MismatchError):
        return
    finally:
        assert known.asked < 4 * (MOST + 1) ** 2
    assert all(name in NAMES and abs(weight) <= STRONGEST for name, weight in found.mix)
    assert abs(found.c) <= STRONGEST
