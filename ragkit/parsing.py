"""Folders as files, and files as records; what the fields mean is for `ragkit.fields` to say."""

from __future__ import annotations

import csv
import gzip
import io
import json
import math
import os
import re
import zlib
from collections import Counter
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from itertools import chain
from pathlib import Path
from typing import Any, BinaryIO, NoReturn, TypeAlias

from .errors import DataError

RECORD_SUFFIXES = (".jsonl", ".ndjson", ".json", ".tsv", ".csv")  # each also with .gz
TEXT_SUFFIXES = (".txt", ".md", ".html", ".htm", ".pdf", ".docx")
READABLE = f"{' '.join(RECORD_SUFFIXES)} (each also .gz) {' '.join(TEXT_SUFFIXES)}"


@dataclass(frozen=True, slots=True)
class Problem:
    """Something in a file that cannot be used: which file, which line (from 1), and why."""

    source: str
    line: int | None
    message: str

    @property
    def place(self) -> str:
        """The file and the line, as in `corpus.jsonl:7`."""
        return self.source if self.line is None else f"{self.source}:{self.line}"

    def __str__(self) -> str:
        return f"{self.place}: {self.message}"


Report: TypeAlias = Callable[[Path, int | None, str], None]
"""Takes note of a problem (file, line, message): raises, or returns to have it skipped."""

Record: TypeAlias = dict[str, Any]

Columns: TypeAlias = Callable[[list[str]], tuple[list[str], bool]]
"""Reads the first row of a table: the columns' names, and whether that row was a header."""


def suffix_of(path: Path) -> str:
    """Return the suffix that says how a file is read (".jsonl.gz", ".pdf", …), or "" for none."""
    name = path.name.lower()
    plain = name.removesuffix(".gz")
    for suffix in RECORD_SUFFIXES:
        if plain.endswith(suffix):
            return suffix + name[len(plain) :]
    return next((suffix for suffix in TEXT_SUFFIXES if name.endswith(suffix)), "")


def walk(folder: Path, report: Report) -> tuple[list[Path], Counter[str]]:
    """List the readable files of a folder, and count the others by suffix.

    The order is that of the names, a folder's own files before its subfolders. Hidden files and
    folders are passed over, and so are links to folders and links that lead out of `folder`.
    """
    found: list[Path] = []
    others: Counter[str] = Counter()

    def unreadable(error: OSError) -> None:
        report(Path(error.filename), None, f"the folder cannot be read: {error.strerror}")

    root = folder.resolve()
    for parent, folders, names in os.walk(folder, onerror=unreadable):
        folders[:] = sorted(name for name in folders if not name.startswith("."))
        for name in sorted(names):
            path = Path(parent, name)
            outside = path.is_symlink() and not path.resolve().is_relative_to(root)
            if name.startswith(".") or outside or not path.is_file():
                continue
            if suffix_of(path):
                found.append(path)
            else:
                others[path.suffix or "no suffix"] += 1
    return found, others


def lines(path: Path, report: Report) -> Iterator[tuple[int, str]]:
    """Yield (number from 1, line with its end) of a UTF-8 file, compressed if it ends in .gz."""
    number, blank = 0, True
    try:
        with _open(path) as file:
            for number, raw in enumerate(file, 1):
                try:
                    text = raw.decode()
                except UnicodeDecodeError as error:
                    blank = False
                    byte, offset = raw[error.start], error.start
                    report(
                        path, number, f"not UTF-8: byte 0x{byte:02x} at offset {offset} of the line"
                    )
                    continue
                if number == 1:
                    text = text.removeprefix("\ufeff")
                blank = blank and (not text or text.isspace())
                yield number, text
    except (EOFError, zlib.error, gzip.BadGzipFile) as error:
        report(path, None, f"truncated or damaged gzip after line {number}: {error}")
        return
    except OSError as error:
        report(path, None, f"cannot be read: {error.strerror or error}")
        return
    if blank:
        report(path, None, "the file is empty")


def records(path: Path, report: Report, columns: Columns) -> Iterator[tuple[int, Record]]:
    """Yield (line where it begins, record) of a JSONL, JSON, TSV or CSV file.

    A `.json` file is one list of objects (read into memory as a whole) or, failing that, an object
    a line. Fields of a TSV are split at tabs, whole lines only; a field inside double quotes is
    unquoted. A `.csv` whose first line holds a tab is read as TSV (the form of DPR's questions).
    """
    kind = suffix_of(path).removesuffix(".gz")
    if kind not in RECORD_SUFFIXES:
        report(path, None, f"no file of records; such files end in {' '.join(RECORD_SUFFIXES)}")
        return
    rows = lines(path, report)
    if kind in {".jsonl", ".ndjson"}:
        yield from _json_lines(path, rows, report)
    elif kind == ".json":
        kept = list(rows)
        text = "".join(line for _, line in kept)
        if text.lstrip().startswith("["):
            yield from _json_list(path, text, report)
        else:
            yield from _json_lines(path, kept, report)
    else:
        first = next(rows, None)
        if first is None:
            return
        rows = chain([first], rows)
        comma = kind == ".csv" and "\t" not in first[1]
        cells = _comma_rows(path, rows, report) if comma else _tab_rows(rows)
        yield from _table(path, cells, report, columns)


def _open(path: Path) -> BinaryIO:
    if path.name.lower().endswith(".gz"):
        return io.BufferedReader(gzip.open(path))
    return path.open("rb")


def _refuse_constant(name: str) -> NoReturn:
    raise ValueError(f"{name} is not a JSON value that can be held")


def _finite(digits: str) -> float:
    return float(digits) if math.isfinite(float(digits)) else _refuse_constant(digits)


_JSON = json.JSONDecoder(parse_constant=_refuse_constant, parse_float=_finite)
_BLANKS = re.compile(r"[ \t\r\n]*")


def _json_lines(
    path: Path, rows: Iterable[tuple[int, str]], report: Report
) -> Iterator[tuple[int, Record]]:
    for number, text in rows:
        if text.isspace():
            continue
        try:
            record = _JSON.decode(text.rstrip("\r\n"))
            if type(record) is not dict:
                raise DataError(f"expected a JSON object, saw {type(record).__name__}")
            if "\\ud" in text or "\\uD" in text:
                _refuse_lone_surrogates(record)
        except (ValueError, RecursionError) as error:
            report(path, number, _json_message(error))
            continue
        yield number, record


def _json_list(path: Path, text: str, report: Report) -> Iterator[tuple[int, Record]]:
    def skip(position: int) -> int:
        match = _BLANKS.match(text, position)
        return match.end() if match else position

    escapes = "\\ud" in text or "\\uD" in text
    position, counted, number = skip(skip(0) + 1), 0, 1
    if text.startswith("]", position):
        report(path, None, "the list is empty")
        return
    while True:
        number, counted = number + text.count("\n", counted, position), position
        try:
            record, position = _JSON.raw_decode(text, position)
        except (ValueError, RecursionError) as error:
            report(path, getattr(error, "lineno", number), _json_message(error))
            return
        try:
            if type(record) is not dict:
                raise DataError(f"expected a JSON object, saw {type(record).__name__}")
            if escapes:
                _refuse_lone_surrogates(record)
        except DataError as error:
            report(path, number, str(error))
        else:
            yield number, record
        position = skip(position)
        if text.startswith("]", position):
            return
        if not text.startswith(",", position):
            line = text.count("\n", 0, position) + 1
            report(path, line, "broken JSON: expected ',' or ']' after a record of the list")
            return
        position = skip(position + 1)


def _json_message(error: Exception) -> str:
    if isinstance(error, json.JSONDecodeError):
        return f"broken JSON: {error.msg} (column {error.colno})"
    return str(error) if isinstance(error, DataError) else f"broken JSON: {error}"


def _refuse_lone_surrogates(record: Record) -> None:
    try:
        json.dumps(record, ensure_ascii=False).encode()
    except UnicodeEncodeError as error:
        code = ord(error.object[error.start])
        raise DataError(
            f"lone surrogate \\u{code:04x}, which is half of a character; write it whole or drop it"
        ) from error


def _tab_rows(rows: Iterable[tuple[int, str]]) -> Iterator[tuple[int, list[str]]]:
    for number, text in rows:
        if not text.isspace():
            fields = text.rstrip("\r\n").split("\t")
            yield number, [_unquoted(field) if '"' in field else field for field in fields]


def _unquoted(field: str) -> str:
    inner = field[1:-1]
    quoted = len(field) > 1 and field[0] == field[-1] == '"' and '"' not in inner.replace('""', "")
    return inner.replace('""', '"') if quoted else field


def _comma_rows(
    path: Path, rows: Iterable[tuple[int, str]], report: Report
) -> Iterator[tuple[int, list[str]]]:
    last = 0

    def texts() -> Iterator[str]:
        nonlocal last
        for number, text in rows:
            last = number
            yield text

    reader = csv.reader(texts(), strict=True)
    while True:
        first = last + 1
        try:
            row = next(reader)
        except StopIteration:
            return
        except csv.Error as error:
            report(path, first, f"broken CSV: {error}; JSONL holds texts of any length")
            continue
        if row:
            yield first, row


def _table(
    path: Path, rows: Iterable[tuple[int, list[str]]], report: Report, columns: Columns
) -> Iterator[tuple[int, Record]]:
    rows = iter(rows)
    first = next(rows, None)
    if first is None:
        return
    number, row = first
    try:
        names, header = columns(row)
        if len(set(names)) < len(names):
            raise DataError(f"two columns of the same name: {names}")
    except DataError as error:
        report(path, number, str(error))
        return
    if header:
        first = next(rows, None)
        if first is None:
            report(path, None, "there is nothing after the header")
            return
    for number, row in chain([first], rows):
        if len(row) != len(names):
            report(path, number, f"{len(row)} fields where there are {len(names)} columns: {names}")
        else:
            yield number, dict(zip(names, row, strict=True))
