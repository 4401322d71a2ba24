"""Expressions of a file: as `re` has them, in bounded time."""

import re
import time

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from lorafold.errors import MismatchError
from lorafold.patterns import matches

PLAIN = [
    r"(a+)+$",
    r"(a|a)*b",
    r"(.*\.)?((a|aa)+)$",
    r"^(?!.*visual).*(?:q_proj|k_proj)",
    r".*?(?:vision|language).*?(?:self_attn|mlp).*?(?:q_proj|v_proj)",
    r"(?:\d+\.[^.]*\.x{2,3})+",
    r"(?i)(?:A|B)+b",
    r"(?:a\b|b)*.*\Z",
    r"(ab?)*c|d",
    r"(?:x|y|ab){2,4}$",
    r"(?:[^\W\d]+|_)*\.q",
    r"(a?){9}a{9}",
    r"(?:(?:a|b)+?\.)*q",
    r"(?:(?=a)[ab]|\.)*$",
]
TEXTS = ["", "a", "aab", "b.", "model.layers.0.self_attn.q_proj", "a.b.q", "a" * 12]
TEXTS += ["language_model.layers.12.mlp.v_proj", "visual.q_proj", "1.q.xx", "abababc", "AbB", "a\n"]


@pytest.mark.parametrize("pattern", PLAIN)
def test_as_re_has_it(pattern):
    for text in TEXTS:
        assert matches(pattern, text) == (re.match(pattern, text) is not None), text
        if not pattern.startswith("(?i)"):
            assert matches(pattern, text, "(?:…)!") == (
                re.match(f"(?:{pattern})!", text) is not None
            )


PARTS = st.recursive(
    st.sampled_from(["a", "b", ".", r"\.", "[ab]", "[^a]", "$", r"\w"]),
    lambda inner: st.one_of(
        st.tuples(inner, inner).map("".join),
        st.tuples(inner, inner).map(lambda p: f"(?:{p[0]}|{p[1]})"),
        st.tuples(inner, st.sampled_from(["*", "+?", "{1,2}", "?"])).map(
            lambda p: f"(?:{p[0]}){p[1]}"
        ),
    ),
    max_leaves=5,
)


@settings(max_examples=150, deadline=None)
@given(PARTS, st.text("ab.", max_size=5))
def test_whatever_the_expression(pattern, text):
    assert matches(f"(?:(?:{pattern})*)*$", text) == (
        re.match(f"(?:{pattern})*$", text) is not None
    )


@pytest.mark.parametrize(
    ("pattern", "text"),
    [
        (r"(a+)+$", "a" * 5000 + "!"),
        (r"(.*\.)?((a|aa)+b)$", "a" * 4000),
        (r"(.*)*(.*)*(.*)*x", "a." * 2000),
        (r".*.*.*.*.*.*x", "a" * 3000),
        (r"(?:(?=(a+)+b)a)*c", "a" * 2000),
        (r"((a?){1000}){1000}b", "a" * 2000),
        (r"(a+)+\1b", "a" * 40),
        ("(" * 3000 + "a" + ")*" * 3000, "a" * 40),
        ("(a|" * 30_000, "a"),
    ],
)
def test_none_takes_long(pattern, text):
    """`re` would not come back; here it is no match, or an error that names the expression."""
    started = time.process_time()
    try:
        assert not matches(pattern, text)
    except MismatchError as e:
        assert repr(pattern)[1:20] in str(e)  # noqa: PT017
    assert time.process_time() - started < 30  # no measure of speed: the other way takes years
