"""Files of rows: every format gives the same rows, held against pandas, pyarrow and json."""

from __future__ import annotations

import csv
import gzip
import io
import json
from pathlib import Path
from typing import Any

import pytest

from pipeline.data import tables
from pipeline.data.tables import Record, read_table, suffix_of
from pipeline.errors import DataError

ROWS = [
    {"prompt": "What is 2, 3?", "response": "Both are primes.", "category": "sums"},
    {"prompt": 'Say "no"', "response": "No.\nNever.", "category": "words"},
    {
        "prompt": "Caf\u00e9 \u4f60\u597d \U0001f600",
        "response": "\u2028 in a text",
        "category": "signs",
    },
]


def as_jsonl(rows: list[dict[str, Any]], *, escaped: bool = True) -> bytes:
    text = "".join(json.dumps(row, ensure_ascii=escaped) + "\n" for row in rows)
    return text.encode("utf-8")


def as_csv(rows: list[dict[str, Any]]) -> bytes:
    stream = io.StringIO(newline="")
    writer = csv.DictWriter(stream, list(rows[0]))
    writer.writeheader()
    writer.writerows(rows)
    return stream.getvalue().encode("utf-8")


def as_parquet(rows: list[dict[str, Any]]) -> bytes:
    import pyarrow as pa
    import pyarrow.parquet as pq

    stream = io.BytesIO()
    pq.write_table(pa.Table.from_pylist(rows), stream)
    return stream.getvalue()


def read(folder: Path, name: str, content: bytes) -> list[Record]:
    path = folder / name
    path.write_bytes(content)
    return read_table(path, name)


FORMS = {
    "a.jsonl": as_jsonl(ROWS),
    "unescaped.jsonl": as_jsonl(ROWS, escaped=False),
    "last-line-open.jsonl": as_jsonl(ROWS).rstrip(b"\n"),
    "blank-lines.jsonl": as_jsonl(ROWS).replace(b"\n", b"\n\n"),
    "windows.jsonl": as_jsonl(ROWS).replace(b"\n", b"\r\n"),
    "mark.jsonl": b"\xef\xbb\xbf" + as_jsonl(ROWS),
    "a.json": json.dumps(ROWS).encode(),
    "in-an-object.json": json.dumps({"version": 1, "rows": ROWS}, indent=1).encode(),
    "a.csv": as_csv(ROWS),
    "mark.csv": b"\xef\xbb\xbf" + as_csv(ROWS),
    "a.parquet": as_parquet(ROWS),
    "a.jsonl.gz": gzip.compress(as_jsonl(ROWS)),
    "a.csv.gz": gzip.compress(as_csv(ROWS)),
    "CAPITALS.JSONL": as_jsonl(ROWS),
}


@pytest.mark.parametrize("name", FORMS)
def test_every_format_gives_the_same_rows(name: str, tmp_path: Path) -> None:
    assert [record.values for record in read(tmp_path, name, FORMS[name])] == ROWS


@pytest.mark.parametrize("name", ["a.csv", "a.parquet", "a.jsonl"])
def test_pandas_reads_the_same(name: str, tmp_path: Path) -> None:
    import pandas

    records = read(tmp_path, name, FORMS[name])
    readers = {
        "a.csv": pandas.read_csv,
        "a.parquet": pandas.read_parquet,
        "a.jsonl": lambda path: pandas.read_json(path, lines=True),
    }
    frame: Any = readers[name](tmp_path / name)
    assert [record.values for record in records] == frame.to_dict("records")


def test_rows_are_numbered_by_where_they_stand(tmp_path: Path) -> None:
    lines = b'{"a": 1}\n\n{"a": 2}\n'
    assert [(r.number, r.place) for r in read(tmp_path, "x.jsonl", lines)] == [
        (1, "x.jsonl:1"),
        (3, "x.jsonl:3"),
    ]
    quoted = b'a,b\n1,"x\ny"\n\n2,z\n'
    assert [(r.number, r.place) for r in read(tmp_path, "x.csv", quoted)] == [
        (2, "x.csv:2"),
        (5, "x.csv:5"),
    ]
    assert [r.place for r in read(tmp_path, "x.json", b'[{"a": 1}, {"a": 2}]')] == [
        "x.json: row 1",
        "x.json: row 2",
    ]
    many = as_parquet([{"a": i} for i in range(2500)])
    assert [(r.number, r.values["a"]) for r in read(tmp_path, "x.parquet", many)] == [
        (i + 1, i) for i in range(2500)
    ]


def test_values_keep_their_types(tmp_path: Path) -> None:
    row = {"a": 1, "b": 1.5, "c": None, "d": True, "e": ["x", "y"], "f": [{"role": "user"}]}
    for name, content in (("x.jsonl", as_jsonl([row])), ("x.parquet", as_parquet([row]))):
        (record,) = read(tmp_path, name, content)
        assert record.values == row
        assert {k: type(v) for k, v in record.values.items()} == {
            k: type(v) for k, v in row.items()
        }


@pytest.mark.parametrize(
    ("name", "suffix"),
    [
        ("a.jsonl", ".jsonl"),
        ("x/y.z/a.b.CSV", ".csv"),
        ("a.parquet.gz", ".parquet.gz"),
        ("jsonl", None),
        ("a", None),
        ("a.gz", None),
        (".gz", None),
        ("json.gz", None),
        ("a.txt", None),
        ("a.jsonl.zip", None),
        ("a.jsonl.gz.gz", None),
    ],
)
def test_the_name_decides_the_format(name: str, suffix: str | None) -> None:
    if suffix is None:
        with pytest.raises(DataError, match="unknown format"):
            suffix_of(name)
    else:
        assert suffix_of(name) == suffix


@pytest.mark.parametrize(
    ("line", "says"),
    [
        (b"{", r"x\.jsonl:2: broken JSON at column 2"),
        (b'{"a": 1}}', "Extra data"),
        (b"null", "wanted a JSON object, got null"),
        (b'"text"', "got text"),
        (b'{"a": Infinity}', "Infinity is not JSON"),
        (b'{"a": {"b": 1, "b": 2}}', "key 'b' twice"),
        (b'{"a": ' + b"9" * 5000 + b"}", r"x\.jsonl:2: broken JSON"),
        (b"[" * 200_000, "nested too deeply"),
        (b'{"a": "\xff"}', r"byte 16 \(0xff\) is not UTF-8"),
    ],
)
def test_a_broken_line_is_named(line: bytes, says: str, tmp_path: Path) -> None:
    with pytest.raises(DataError, match=says) as caught:
        read(tmp_path, "x.jsonl", b'{"a": 1}\n' + line + b'\n{"a": 3}\n')
    assert "x.jsonl:2" in str(caught.value)


def test_a_line_of_any_size_below_the_limit_is_read(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(tables, "MAX_ROW_BYTES", 100)
    row = {"a": "x" * 91}
    assert len(json.dumps(row)) == 100
    assert read(tmp_path, "x.jsonl", as_jsonl([row]))[0].values == row
    with pytest.raises(DataError, match="row of 101 bytes, wanted at most 100"):
        read(tmp_path, "x.jsonl", as_jsonl([{"a": "x" * 92}]))


@pytest.mark.parametrize(
    ("name", "content", "says"),
    [
        ("x.csv", b"a,,c\n1,2,3\n", "column 2 of the header has no name"),
        ("x.csv", b"a,b\n1,2,3\n", "has 3 fields, the header has 2"),
        ("x.csv", b'a,b\n1,2"3"\n"4"5,6\n', "not valid CSV"),
        ("x.csv", b"a,b\n1,2\n3,\xe9\n", r"\(line 3\): byte 10 \(0xe9\) is not UTF-8"),
        ("x.json", b'{"a": [1], "b": [2]}', "with 2 lists"),
        ("x.json", b"7", "wanted a list of objects, got int"),
        ("x.json", b"[]", "holds no rows"),
        ("x.jsonl", b"\xef\xbb\xbf", "holds no rows"),
        ("x.jsonl", b"", "the file is empty"),
        ("x.jsonl.gz", b'{"a": 1}', "damaged or cut-short gzip"),
        ("x.parquet", b"PAR1PAR1", "not a whole Parquet file"),
    ],
)
def test_a_broken_file_is_named(name: str, content: bytes, says: str, tmp_path: Path) -> None:
    with pytest.raises(DataError, match=says) as caught:
        read(tmp_path, name, content)
    assert str(caught.value).startswith(name)


def test_a_column_of_one_name_twice_in_parquet(tmp_path: Path) -> None:
    import pyarrow as pa
    import pyarrow.parquet as pq

    stream = io.BytesIO()
    pq.write_table(pa.Table.from_arrays([pa.array([1]), pa.array([2])], names=["a", "a"]), stream)
    with pytest.raises(DataError, match="two columns are called 'a'"):
        read(tmp_path, "x.parquet", stream.getvalue())
