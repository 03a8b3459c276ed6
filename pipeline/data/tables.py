"""Files of rows to plain dictionaries: JSONL, JSON, CSV, TSV and Parquet, plain or gzipped.

Strict: what is broken is named by file and row, never skipped. The only things passed over are
blank lines and a UTF-8 byte order mark. Torch-free.
"""

from __future__ import annotations

import csv
import gzip
import io
import json
import zlib
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NoReturn

from pipeline.errors import DataError

FORMATS = ("jsonl", "json", "csv", "tsv", "parquet")
MAX_ROW_BYTES = 4 << 20
BOM = b"\xef\xbb\xbf"


@dataclass(frozen=True)
class Record:
    """One raw row. ``number``: the line it starts on (JSONL, CSV) or its place from 1 (others)."""

    number: int
    place: str
    values: dict[str, Any]


def suffix_of(name: str) -> str:
    """``.jsonl``, ``.csv.gz``, ...: what decides how a file is read. DataError when unknown."""
    parts = Path(name).name.lower().split(".")
    zipped = parts[-1] == "gz"
    kind = parts[-2 if zipped and len(parts) > 1 else -1]
    if len(parts) < 2 + zipped or kind not in FORMATS:
        raise DataError(
            f"{name}: unknown format; wanted a name ending in"
            f" {', '.join('.' + f for f in FORMATS)} (or one of these with .gz)"
        )
    return f".{kind}.gz" if zipped else f".{kind}"


def read_table(path: Path, shown: str) -> list[Record]:
    """All rows of the file at ``path``; errors call it ``shown``. DataError for any broken row."""
    suffix = suffix_of(path.name)
    data = _bytes(path, shown, zipped=suffix.endswith(".gz"))
    if not data.strip():
        raise DataError(f"{shown}: the file is empty; wanted at least one row")
    reader = {"jsonl": _jsonl, "json": _json, "csv": _csv, "tsv": _tsv, "parquet": _parquet}
    records = list(reader[suffix.split(".")[1]](data.removeprefix(BOM), shown))
    if not records:
        raise DataError(f"{shown}: holds no rows; wanted at least one")
    return records


def _bytes(path: Path, shown: str, *, zipped: bool) -> bytes:
    data = path.read_bytes()
    if not zipped:
        return data
    try:
        return gzip.decompress(data)
    except (gzip.BadGzipFile, EOFError, zlib.error) as error:
        raise DataError(
            f"{shown}: damaged or cut-short gzip file ({error}); fetch it again"
        ) from error


def _decoded(data: bytes, place: str, offset: int) -> str:
    """``data`` as UTF-8; ``offset`` is where it starts in its file, in bytes."""
    try:
        return data.decode("utf-8")
    except UnicodeDecodeError as error:
        line = data[: error.start].count(b"\n")
        where = place if not line else f"{place} (line {line + 1})"
        raise DataError(
            f"{where}: byte {offset + error.start} (0x{data[error.start]:02x}) is not UTF-8;"
            " save the file as UTF-8"
        ) from None


def _jsonl(data: bytes, shown: str) -> Iterator[Record]:
    # Split on \n alone: str.splitlines would also cut at U+2028 inside a text.
    offset = 0
    for number, line in enumerate(data.split(b"\n"), start=1):
        place = f"{shown}:{number}"
        if line.strip():
            if len(line) > MAX_ROW_BYTES:
                _too_long(place, len(line))
            text = _decoded(line, place, offset)
            yield Record(number, place, _object(_parsed(text, place, "JSON"), place))
        offset += len(line) + 1


def _json(data: bytes, shown: str) -> Iterator[Record]:
    tree = _parsed(_decoded(data, shown, 0), shown, "JSON")
    if isinstance(tree, dict):
        lists = [key for key, value in tree.items() if isinstance(value, list)]
        if len(lists) != 1:
            raise DataError(
                f"{shown}: wanted a list of objects, or an object with one list; got an object"
                f" with {len(lists)} lists; write one object a line and call it .jsonl"
            )
        tree = tree[lists[0]]
    if not isinstance(tree, list):
        raise DataError(f"{shown}: wanted a list of objects, got {kind_of(tree)}")
    for number, item in enumerate(tree, start=1):
        place = f"{shown}: row {number}"
        yield Record(number, place, _object(item, place))


def _tsv(data: bytes, shown: str) -> Iterator[Record]:
    return _csv(data, shown, delimiter="\t")


def _csv(data: bytes, shown: str, delimiter: str = ",") -> Iterator[Record]:
    text = io.StringIO(_decoded(data, shown, 0), newline="")
    reader = csv.reader(text, strict=True, delimiter=delimiter)
    header: list[str] | None = None
    before = 0
    while True:
        place = f"{shown}:{before + 1}"
        try:
            cells = next(reader)
        except StopIteration:
            return
        except csv.Error as error:
            raise DataError(
                f"{place}: not valid CSV ({error}); quote fields that hold commas, quotes or"
                " line breaks"
            ) from None
        number, before = before + 1, reader.line_num
        if not cells:
            continue
        if header is None:
            header = cells
            _check_header(header, place)
        elif len(cells) != len(header):
            raise DataError(
                f"{place}: has {len(cells)} fields, the header has {len(header)}; quote fields"
                " that hold commas"
            )
        else:
            yield Record(number, place, dict(zip(header, cells, strict=True)))


def _parquet(data: bytes, shown: str) -> Iterator[Record]:
    import pyarrow as pa
    import pyarrow.parquet as pq

    try:
        table = pq.ParquetFile(pa.BufferReader(data)).read()
    except (pa.ArrowException, OSError) as error:
        first = str(error).strip().splitlines()[0]
        raise DataError(f"{shown}: not a whole Parquet file ({first}); fetch it again") from error
    _check_header(table.column_names, shown)
    number = 0
    for batch in table.to_batches(max_chunksize=1024):
        for values in batch.to_pylist():
            number += 1
            yield Record(number, f"{shown}: row {number}", values)


def _check_header(header: list[str], place: str) -> None:
    for index, name in enumerate(header):
        if not name.strip():
            raise DataError(f"{place}: column {index + 1} of the header has no name; name it")
        if name in header[:index]:
            raise DataError(f"{place}: two columns are called {name!r}; rename one")


def _object(value: Any, place: str) -> dict[str, Any]:
    if not isinstance(value, dict):
        raise DataError(f"{place}: wanted a JSON object, got {kind_of(value)}")
    return value


def _parsed(text: str, place: str, what: str) -> Any:
    def twice(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
        made = dict(pairs)
        if len(made) != len(pairs):
            names = [name for name, _ in pairs]
            double = next(name for name in names if names.count(name) > 1)
            raise DataError(f"{place}: key {double!r} twice in one object; keep one")
        return made

    def constant(name: str) -> NoReturn:
        raise DataError(f"{place}: {name} is not JSON; write a number, a text or null")

    try:
        return json.loads(text, object_pairs_hook=twice, parse_constant=constant)
    except json.JSONDecodeError as error:
        hint = "fix this row"
        if error.msg == "Extra data":
            hint = "one value was wanted; for one object a line call the file .jsonl"
        where = f"column {error.colno}"
        if error.lineno > 1:
            where = f"line {error.lineno}, {where}"
        raise DataError(f"{place}: broken {what} at {where}: {error.msg}; {hint}") from None
    except RecursionError:
        raise DataError(f"{place}: {what} is nested too deeply; wanted a flat object") from None
    except ValueError as error:  # an integer beyond the interpreter's limit of digits
        raise DataError(f"{place}: broken {what}: {error}; fix this row") from None


def _too_long(place: str, size: int) -> NoReturn:
    raise DataError(
        f"{place}: row of {size} bytes, wanted at most {MAX_ROW_BYTES}; is a line break missing?"
    )


def kind_of(value: Any) -> str:
    """What a value is called in an error message."""
    names = {str: "text", dict: "object", list: "list", type(None): "null"}
    return names.get(type(value), type(value).__name__)
