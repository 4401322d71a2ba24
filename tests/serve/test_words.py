"""Text comes letter by letter and stops where it is told, however the pieces fall."""

from __future__ import annotations

import random

import pytest

from lorafold.serve import Piece
from lorafold.serve.http.answering import Answer
from lorafold.serve.words import Stops, TextReader, Words

TEXT = "naïve 日本 🙂 end"


@pytest.mark.parametrize("seed", range(5))
def test_bytes_become_letters(seed):
    words = Words(None)
    reader = words.reader()
    shown = [reader.read(b) for b in TEXT.encode()]
    assert "".join(shown) + reader.rest() == TEXT
    assert max(map(len, shown)) == 1
    rng = random.Random(seed)
    noise = bytes(rng.randrange(256) for _ in range(300))
    reader = words.reader()
    assert "".join(map(reader.read, noise)) + reader.rest() == noise.decode("utf-8", "replace")


class Pieces:
    """A tokenizer of two bytes a token, that says what several are together."""

    all_special_ids, added_tokens_decoder, chat_template, eos_token = [], {}, None, None

    def decode(self, ids, **_):
        return b"".join(i.to_bytes(2, "big") for i in ids).decode("utf-8", "replace")


def test_other_tokens_wait_for_the_rest_of_a_letter():
    data = TEXT.encode()
    data += b" " * (len(data) % 2)
    ids = [int.from_bytes(data[i : i + 2], "big") for i in range(0, len(data), 2)]
    reader = TextReader(Words(Pieces()))
    shown = [reader.read(i) for i in ids]
    assert "".join(shown) + reader.rest() == data.decode()
    assert not any("\N{REPLACEMENT CHARACTER}" in s for s in shown)
    broken = TextReader(Words(Pieces()))
    assert "".join(broken.read(0xFFFF) for _ in range(40)), "what never is a letter is shown"


@pytest.mark.parametrize("size", [1, 2, 3, 7])
def test_stops_come_in_pieces_of_any_size(size):
    for text, stops, expected in [
        ("one two three", ["two"], "one "),
        ("one two three", ["three", "two"], "one "),
        ("aaab", ["aab"], "a"),
        ("ababac", ["abac"], "ab"),
        ("one two", ["twos"], "one two"),
        ("x", ["x"], ""),
        ("abc", ["bcd", "cd"], "abc"),
    ]:
        finder, shown, stopped = Stops(stops), "", False
        for i in range(0, len(text), size):
            more, stopped = finder.read(text[i : i + size])
            shown += more
            assert text.startswith(shown)
            if stopped:
                break
        assert stopped == any(s in text for s in stops)
        assert (shown if stopped else shown + finder.rest()) == expected


def test_what_is_held_back_is_no_more_than_a_stop_may_begin_with():
    finder = Stops(["\n\n", "END"])
    assert finder.read("one\n") == ("one", False)
    assert finder.read("two E") == ("\ntwo ", False)
    assert finder.read("N") == ("", False)
    assert finder.read("TER") == ("ENTER", False)


def test_tokens_go_with_their_text():
    answer = Answer(Words(None), ["ll"], frozenset({0}))
    shown = [answer.read(Piece(t)) for t in b"he"]
    assert [text for text, _ in shown] == ["h", "e"]
    assert [[(p.token, at) for p, at in tokens] for _, tokens in shown] == [[(104, 0)], [(101, 1)]]
    assert answer.read(Piece(ord("l"))) == ("", [])
    assert answer.read(Piece(ord("l"))) == ("", [])
    assert (answer.reason, answer.count) == ("stop", 4)


def test_an_end_is_counted_and_not_shown():
    answer = Answer(Words(None), [], frozenset({0}))
    assert answer.read(Piece(97))[0] == "a"
    assert answer.read(Piece(0, reason="stop")) == ("", [])
    assert (answer.reason, answer.count) == ("stop", 2)


def test_half_a_surrogate_is_no_letter():
    assert Words(None).tokens("a\ud800b") == list(b"a?b")


def test_real_tokenizers(tmp_path):
    """Byte pairs and bytes in brackets, made here and read by transformers."""
    tokenizers = pytest.importorskip("tokenizers")
    transformers = pytest.importorskip("transformers")
    pieces = [*(f"<0x{b:02X}>" for b in range(256)), "▁", "na", "▁end", "ve"]
    made = tokenizers.Tokenizer(
        tokenizers.models.BPE(
            {p: i for i, p in enumerate(pieces)}, [], byte_fallback=True, fuse_unk=False
        )
    )
    made.decoder = tokenizers.decoders.Sequence(
        [
            tokenizers.decoders.Replace("▁", " "),
            tokenizers.decoders.ByteFallback(),
            tokenizers.decoders.Fuse(),
        ]
    )
    words = Words(transformers.PreTrainedTokenizerFast(tokenizer_object=made))
    assert not words.exact
    ids = [257, 0xC3, 0xAF, 259, 258]
    reader = words.reader()
    assert [reader.read(i) for i in ids] == ["na", "", "ï", "ve", " end"]
    assert [words.shown(i) for i in ids[:3]] == ["na", "bytes:\\xc3", "bytes:\\xaf"]
    assert words.bytes_of(258) == b" end"
