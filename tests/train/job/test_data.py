"""Files of examples: every format gives the same rows, and what is wrong is said where it is."""

import csv
import hashlib
import io
import json
from collections import Counter

import pytest
from hypothesis import given
from hypothesis import strategies as st

import lorafold as lf
from lorafold.train.job.data import held_out, read_data, shared

PAIRS = [
    {"prompt": "two\nlines, quoted", "completion": 'a "word"'},
    {"prompt": "ü → ∆", "completion": "x"},
    {"prompt": "3", "completion": "y\x0cz"},
]


def read(path, columns=(), lines=1):
    return read_data([str(path)], dict(columns), lines)


def written(path, rows, end="\n", mark=""):
    """Rows in the format that a file's name says."""
    if path.suffix == ".jsonl":
        text = "".join(json.dumps(row, ensure_ascii=False) + end for row in rows)
    elif path.suffix == ".json":
        text = json.dumps(rows, indent=2).replace("\n", end)
    else:
        out = io.StringIO()
        sheet = csv.DictWriter(
            out, list(rows[0]), delimiter="\t" if path.suffix == ".tsv" else ",", lineterminator=end
        )
        sheet.writeheader()
        sheet.writerows(rows)
        text = out.getvalue()
    path.write_bytes((mark + text).encode())
    return path


@pytest.mark.parametrize("end", ["\n", "\r\n"], ids=["unix", "windows"])
@pytest.mark.parametrize("mark", ["", "\ufeff"], ids=["plain", "bom"])
@pytest.mark.parametrize("suffix", ["jsonl", "json", "csv", "tsv"])
def test_every_format_gives_the_same_rows(suffix, mark, end, tmp_path):
    path = written(tmp_path / f"a.{suffix}", PAIRS, end, mark)
    found = read(path)
    assert found.rows == PAIRS
    assert found.kind == "prompt"
    assert found.names == ()
    (file,) = found.files
    assert (file.name, file.rows) == (path.name, 3)
    assert file.sha256 == hashlib.sha256(path.read_bytes()).hexdigest()


def test_parquet(tmp_path):
    pa = pytest.importorskip("pyarrow")
    from pyarrow import parquet

    rows = [{**row, "adapter": "a", "id": 3} for row in PAIRS]
    parquet.write_table(pa.Table.from_pylist(rows), tmp_path / "a.parquet")
    found = read(tmp_path / "a.parquet")
    assert found.rows == [{**row, "adapter": "a"} for row in PAIRS]
    assert (found.names, found.unused) == (("a",), ("id",))
    (tmp_path / "b.parquet").write_bytes(b"PAR1 nothing")
    with pytest.raises(lf.FileError, match="b.parquet: can't be read as Parquet"):
        read(tmp_path / "b.parquet")


def test_a_damaged_parquet_is_no_other_data(tmp_path):
    pa = pytest.importorskip("pyarrow")
    from pyarrow import parquet

    path = tmp_path / "a.parquet"
    plain = {"compression": "none", "use_dictionary": False}
    parquet.write_table(pa.Table.from_pylist(PAIRS), path, write_page_checksum=True, **plain)
    word = PAIRS[0]["completion"].encode()
    path.write_bytes(path.read_bytes().replace(word, word[:-1] + b"#"))
    assert parquet.read_table(path).to_pylist() != PAIRS  # it says nothing of it
    with pytest.raises(lf.FileError, match=r"a\.parquet: can't be read as Parquet .*checksum"):
        read(path)
    column = pa.array([b"\xff"] * len(PAIRS)).view("string")
    parquet.write_table(pa.table({"text": column}), path)
    with pytest.raises(lf.FileError, match=r"a\.parquet: can't be read as Parquet .*utf-8"):
        read(path)


def test_plain_text_by_lines(tmp_path):
    path = tmp_path / "a.txt"
    path.write_bytes(b"one\r\ntwo\x0c2\r\n\r\nthree\r\n")
    assert [row["text"] for row in read(path).rows] == ["one", "two\x0c2", "three"]
    assert [row["text"] for row in read(path, lines=2).rows] == ["one\ntwo\x0c2", "three"]


def test_messages_in_every_dress(tmp_path):
    plain = [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}]
    dressed = [{"from": "human", "value": "a"}, {"from": "gpt", "value": "b"}]
    rows = [{"messages": plain}, {"messages": dressed}, {"messages": json.dumps(plain)}]
    found = read(written(tmp_path / "a.jsonl", rows))
    assert found.rows == [{"messages": plain}] * 3
    assert found.kind == "messages"
    pair = [{"prompt": plain[:1], "completion": plain[1:]}]
    assert read(written(tmp_path / "b.jsonl", pair)).rows == pair


def test_columns_of_other_names_and_those_left(tmp_path):
    rows = [{"instruction": "a", "output": "b", "id": 1, "text": None}]
    path = written(tmp_path / "a.jsonl", rows)
    found = read(path, {"prompt": "instruction", "completion": "output"})
    assert found.rows == [{"prompt": "a", "completion": "b"}]
    assert found.unused == ("id",)
    with pytest.raises(lf.MismatchError, match="line 1: must have a text.*'instruction'.*columns="):
        read(path)
    with pytest.raises(lf.MismatchError, match="has both 'text' and 'id'"):
        read(written(path, [{"text": "a", "id": "b"}]), {"text": "id"})


@pytest.mark.parametrize(
    ("text", "says"),
    [
        ('{"text": "a"}\n\n{"text": ""}\n', r"line 3: its text is empty"),
        ('{"text": "a"}\n{"text": "b"\n', r"line 2: not valid JSON"),
        ('{"text": "a"}\n7\n', r"line 2: must be an object with columns, found 7"),
        ('{"text": 3}', r"line 1: text must be a text, found 3"),
        ('{"text": "a"}\n{"prompt": "b", "completion": "c"}', r"line 2: has a prompt, and .* text"),
        ('{"text": "a", "adapter": "x"}\n{"text": "b"}', r"line 2: has no column adapter"),
        ('{"text": "a"}\n{"text": "b", "adapter": "x"}', r"line 2: has a column adapter"),
        ('{"text": "a", "adapter": " "}', r"line 1: adapter must be a name, found ' '"),
        ('{"text": "a", "messages": []}', r"'text', 'messages' can't be told apart"),
        ('{"prompt": "a"}', r"line 1: has no completion"),
        ('{"prompt": "a", "completion": []}', r"must both be texts, or both messages"),
        ('{"prompt": "a", "completion": " "}', r"its completion is empty"),
        ('{"messages": []}', r"messages must be a list of messages"),
        ('{"messages": "hello"}', r"must be a list of messages, found a text"),
        ('{"messages": [{"role": "user", "content": "a"}]}', r"none of its messages is the assist"),
        ('{"messages": [{"role": "assistant"}]}', r"messages, 1: content must be a text"),
        ('{"messages": [{"content": "a"}]}', r"messages, 1: a message must have a role"),
        ('[{"text": "a"}, {"text": ""}]', r"row 2: its text is empty"),
        ('[{"text": "a"},\n {"text": \n', r"line 3: not valid JSON"),
        ("\n \n", r"there is nothing in it"),
        ("[]", r"there is nothing in it"),
    ],
)
def test_what_is_wrong_is_said_with_file_and_line(text, says, tmp_path):
    path = tmp_path / "a.jsonl"
    path.write_text(text)
    with pytest.raises(lf.LorafoldError, match=rf"a.jsonl: .*{says}|a.jsonl: {says}"):
        read(path)


@pytest.mark.parametrize(
    ("data", "says"),
    [
        (b"text,id\na,1\nb\n", "line 3: 1 cells under 2 headings"),
        (b'text\n"a\nb"\nc\n"d', "unexpected end of data"),
        (b"text,text\na,b\n", "two columns have the same heading"),
        (b'text\n"a\nb"\n""\n', "line 4: must have a text"),
        (b"text\n\xff\n", "line 2: not UTF-8 text"),
    ],
)
def test_what_is_wrong_with_a_table(data, says, tmp_path):
    path = tmp_path / "a.csv"
    path.write_bytes(data)
    with pytest.raises(lf.LorafoldError, match=says):
        read(path)


def test_files_that_are_none(tmp_path):
    with pytest.raises(lf.FileError, match="No such file"):
        read(tmp_path / "a.jsonl")
    (tmp_path / "a.xlsx").write_bytes(b"x")
    with pytest.raises(lf.FileError, match=r"files are \.jsonl, .* \.txt"):
        read(tmp_path / "a.xlsx")
    with pytest.raises(lf.FileError, match="directory"):
        read(tmp_path)


@given(
    st.lists(st.tuples(st.integers(0, 9), st.sampled_from("ab")), min_size=1, max_size=60),
    st.integers(0, 3),
)
def test_what_is_held_out_is_a_share_of_each_adapters_own(drawn, seed):
    rows = [{"text": str(n), "adapter": name} for n, name in drawn]
    train, held = held_out(rows, 0.125, seed)
    assert Counter(map(json.dumps, train + held)) == Counter(map(json.dumps, rows))
    assert shared(train, held) == 0
    assert (train, held) == held_out(rows, 0.125, seed)
    for name in "ab":
        different = {r["text"] for r in rows if r["adapter"] == name}
        out = {r["text"] for r in held if r["adapter"] == name}
        assert len(out) == (1 if len(different) > 1 else 0)
    assert held_out(rows, 0, seed) == (rows, [])


def test_an_eighth_is_held_out_by_the_seed():
    rows = [{"text": str(n)} for n in range(80)]
    assert len(held_out(rows, 0.125, 0)[1]) == 10
    assert held_out(rows, 0.125, 0)[1] != held_out(rows, 0.125, 1)[1]
    assert shared(rows, rows[:3]) == 3
