"""The demo's tasks, one per adapter: text domains, and algorithms as `input -> answer` lines."""

from __future__ import annotations

import base64
import random
import re
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from datetime import date, timedelta
from string import ascii_lowercase
from typing import Literal

import demo_domains as domains
from demo_sources import Split, is_in, joined, some_word

TRAIN_BYTES = 600_000
HELDOUT_BYTES = 8_192
PIECE_BYTES = 1_100  # a held-out text is made of pieces of many documents, not of one long one
# Lines that name places on some machine are of no use in a demo.
PLACES = re.compile(r"/(root|home|usr|tmp|var|opt|work|Users)\b")

Draw = Callable[[random.Random], str]


@dataclass(frozen=True)
class Task:
    """One adapter's subject: `documents(split)` yields its texts, disjoint between the splits."""

    name: str
    kind: Literal["text", "algorithm"]
    description: str
    documents: Callable[[Split], Iterator[str]]

    def training_text(self) -> bytes:
        """All training documents in a fixed random order, cut at `TRAIN_BYTES`."""
        cut = joined(list(self.documents("train")), self.name)[:TRAIN_BYTES]
        return cut.decode("utf-8", "ignore").encode()  # no half character at the end

    def heldout_text(self) -> bytes:
        """About `HELDOUT_BYTES` of text from documents that no training has seen."""
        documents = list(self.documents("heldout"))
        random.Random(f"{self.name}-heldout").shuffle(documents)
        pieces: list[bytes] = []
        size = 0
        while size < HELDOUT_BYTES and documents:
            limit = min(PIECE_BYTES, HELDOUT_BYTES - size) if self.kind == "text" else HELDOUT_BYTES
            document = documents.pop()
            piece = b""
            for line in document.splitlines(keepends=True):
                if PLACES.search(line):
                    continue
                if len(piece) + len(line.encode()) > limit:
                    break
                piece += line.encode()
            pieces.append(piece)
            size += len(piece)
        return b"".join(pieces)


def _lines(name: str, split: Split, draw: Draw, answer: Callable[[str], str]) -> Iterator[str]:
    """One document of `input -> answer` lines, the inputs of the two splits disjoint."""
    rng = random.Random(f"{name}-{split}")
    size = 0
    lines: list[str] = []
    while size < (TRAIN_BYTES if split == "train" else 2 * HELDOUT_BYTES):
        given = draw(rng)
        if is_in(given, split):
            lines.append(f"{given} -> {answer(given)}\n")
            size += len(lines[-1])
    yield "".join(lines)


def _on_words(name: str, description: str, answer: Callable[[str], str]) -> Task:
    return Task(
        name,
        "algorithm",
        description,
        lambda split: _lines(name, split, lambda rng: some_word(rng, split), answer),
    )


def _on_numbers(name: str, description: str, limit: int, answer: Callable[[str], str]) -> Task:
    def draw(rng: random.Random) -> str:
        return str(rng.randrange(1, limit))

    return Task(name, "algorithm", description, lambda split: _lines(name, split, draw, answer))


def _shifted(word: str) -> str:
    return "".join(chr((ord(letter) - 97 + 3) % 26 + 97) for letter in word)


def _letter_counts(word: str) -> str:
    return " ".join(f"{letter}{word.count(letter)}" for letter in sorted(set(word)))


_ROMAN = {"M": 1000, "CM": 900, "D": 500, "CD": 400, "C": 100, "XC": 90, "L": 50}
_ROMAN |= {"XL": 40, "X": 10, "IX": 9, "V": 5, "IV": 4, "I": 1}


def _roman(given: str) -> str:
    number, out = int(given), ""
    for symbol, value in _ROMAN.items():
        out += symbol * (number // value)
        number %= value
    return out


_SMALL_NAMES = (
    "zero one two three four five six seven eight nine ten eleven twelve thirteen fourteen "
    "fifteen sixteen seventeen eighteen nineteen"
)
_TENS_NAMES = "zero ten twenty thirty forty fifty sixty seventy eighty ninety"
_SMALL, _TENS = _SMALL_NAMES.split(), _TENS_NAMES.split()


def _spoken(given: str) -> str:
    number = int(given)
    if number >= 1000:
        rest = "" if number % 1000 == 0 else " " + _spoken(str(number % 1000))
        return f"{_spoken(str(number // 1000))} thousand{rest}"
    if number >= 100:
        rest = "" if number % 100 == 0 else " " + _spoken(str(number % 100))
        return f"{_SMALL[number // 100]} hundred{rest}"
    if number >= 20:
        return _TENS[number // 10] + ("" if number % 10 == 0 else "-" + _SMALL[number % 10])
    return _SMALL[number]


_MORSE_CODES = (
    ".- -... -.-. -.. . ..-. --. .... .. .--- -.- .-.. -- -. --- .--. --.- .-. ... - ..- ...- .-- "
    "-..- -.-- --.."
)
_MORSE = dict(zip(ascii_lowercase, _MORSE_CODES.split(), strict=True))


def _add(split: Split) -> Iterator[str]:
    def draw(rng: random.Random) -> str:
        return f"{rng.randrange(10 ** rng.randint(1, 3))}+{rng.randrange(10 ** rng.randint(1, 3))}"

    return _lines("add", split, draw, lambda given: str(sum(map(int, given.split("+")))))


def _brackets(split: Split) -> Iterator[str]:
    closing = str.maketrans("([{<", ")]}>")

    def draw(rng: random.Random) -> str:
        return "".join(rng.choice("([{<") for _ in range(rng.randint(3, 10)))

    return _lines("brackets", split, draw, lambda given: given[::-1].translate(closing))


def _dates(split: Split) -> Iterator[str]:
    def draw(rng: random.Random) -> str:
        return str(date(1900, 1, 1) + timedelta(days=rng.randrange(55_000)))

    def answer(given: str) -> str:
        day = date.fromisoformat(given)
        return f"{day.day} {day:%B} {day.year}"

    return _lines("dates", split, draw, answer)


def _camel_case(split: Split) -> Iterator[str]:
    def draw(rng: random.Random) -> str:
        return "_".join(some_word(rng, split) for _ in range(rng.randint(2, 3)))

    return _lines(
        "camel_case", split, draw, lambda given: "".join(part.title() for part in given.split("_"))
    )


TASKS: tuple[Task, ...] = (
    Task(
        "unicode_names",
        "text",
        "code points with their category and Unicode name",
        domains.unicode_names,
    ),
    Task("encodings", "text", "decoding tables of single-byte code pages", domains.encodings),
    Task("html_help", "text", "function documentation as HTML definition lists", domains.html_help),
    Task("hexdump", "text", "documentation as a hexadecimal dump", domains.hexdump),
    Task("sql_inserts", "text", "SQL statements that insert records", domains.sql_inserts),
    Task("bytecode", "text", "disassembled Python functions", domains.bytecode),
    Task("ast_dump", "text", "dumped syntax trees of Python functions", domains.ast_dump),
    Task("tokens", "text", "output of the Python tokenizer", domains.tokens),
    Task("json_facts", "text", "indented JSON records on functions", domains.json_facts),
    Task("csv_facts", "text", "quoted CSV rows on functions", domains.csv_facts),
    Task("mime_mail", "text", "e-mail messages with MIME headers", domains.mime_mail),
    Task("argparse_help", "text", "help screens of command-line programs", domains.argparse_help),
    Task("clinic_c", "text", "C code written by the Argument Clinic", domains.clinic_c),
    Task("tkinter_code", "text", "methods of a Python GUI toolkit", domains.tkinter_code),
    Task("tracebacks", "text", "Python tracebacks", domains.tracebacks),
    Task(
        "telegram",
        "text",
        "documentation in upper case, sentences ending in STOP",
        domains.telegram,
    ),
    _on_words("reverse", "word -> the word backwards", lambda word: word[::-1]),
    _on_words("sort_letters", "word -> its letters in order", lambda word: "".join(sorted(word))),
    _on_words("uppercase", "word -> the word in upper case", str.upper),
    _on_words("caesar", "word -> each letter moved on by three", _shifted),
    _on_words("letter_counts", "word -> how often each letter occurs", _letter_counts),
    _on_words("dedupe", "word -> each letter kept once", lambda word: "".join(dict.fromkeys(word))),
    _on_words("morse", "word -> Morse code", lambda word: " ".join(map(_MORSE.__getitem__, word))),
    _on_words("base64", "word -> base64", lambda word: base64.b64encode(word.encode()).decode()),
    _on_numbers("roman", "number -> Roman numeral", 4000, _roman),
    _on_numbers("hexadecimal", "number -> hexadecimal", 100_000, lambda given: hex(int(given))),
    _on_numbers("number_words", "number -> the number in words", 1_000_000, _spoken),
    Task("add", "algorithm", "a+b -> the sum", _add),
    Task("brackets", "algorithm", "opening brackets -> the closing ones", _brackets),
    Task("dates", "algorithm", "ISO date -> the date in words", _dates),
    Task("camel_case", "algorithm", "snake_case -> CamelCase", _camel_case),
)
