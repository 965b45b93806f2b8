"""Read and write corpora, questions, qrels and runs.

Every name that a field may have in a file is in `ragkit.fields.FIELDS`. Files are read as they are,
`.gz` too: JSON lines, JSON lists, TSV and CSV hold records, one document each; text, Markdown,
HTML, PDF and Word files are one document each. Of a folder that holds a `corpus.jsonl` or
`corpus.jsonl.gz` (BEIR's form) only that file is read; of another, every file of a known suffix.
"""

from __future__ import annotations

import gzip
import io
import math
import secrets
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Literal, TextIO, TypeAlias

from .errors import DataError, SettingsError
from .extraction import EXTRACTORS, extract
from .fields import (
    document_columns,
    document_of,
    document_record,
    example_of,
    example_record,
    json_line,
    question_columns,
)
from .parsing import READABLE, Report, lines, records, suffix_of, walk
from .parsing import Problem as Problem  # noqa: PLC0414  (a name of this module's, too)
from .types import Document, Example, Qrels, Run

OnError: TypeAlias = Literal["stop", "skip"]
"""What becomes of a problem: a `DataError` at the first, or a note and the next record."""


def read_documents(
    paths: Sequence[Path], *, on_error: OnError = "stop", problems: list[Problem] | None = None
) -> Iterator[Document]:
    """Yield the documents of files and folders one by one; only their ids stay in memory.

    Fields other than id, text and title become metadata, beside those of a `metadata` object. A
    document with a file of its own has the path within its folder as id and `metadata["source"]`.
    Folders are read in the order of names; their hidden files, links out of them and files of
    unknown suffix are passed over (if problems are skipped, the last are counted in a problem).

    Raises:
        DataError: the first problem, with file and line, if `on_error` is "stop"; if it is "skip",
            problems are appended to `problems` and what they concern is left out.
        MissingExtra: the package that parses such a file is not installed.
    """
    return _documents(paths, _reporter(on_error, problems), count_others=on_error == "skip")


def read_questions(
    path: Path, *, on_error: OnError = "stop", problems: list[Problem] | None = None
) -> list[Example]:
    """Read questions with their answers, and positive and negative documents where there are any.

    A question without an id is called "q" and the number of its line (in a `.json`: of its record).
    A document without an id gets a hash of its contents. Blank answers are dropped.

    Raises:
        DataError: as `read_documents` does.
    """
    report = _reporter(on_error, problems)
    a_list = suffix_of(path).removesuffix(".gz") == ".json"
    seen: dict[str, int] = {}
    examples: list[Example] = []
    for number, (line, record) in enumerate(records(path, report, question_columns), 1):
        try:
            example = example_of(record, f"q{number if a_list else line}")
            name = example.query.id
            if name in seen:
                nth = f" of record {number}" if seen[name] == line else ""
                raise DataError(f"duplicate id {name!r}{nth}, first seen in line {seen[name]}")
        except DataError as error:
            report(path, line, str(error))
        else:
            seen[name] = line
            examples.append(example)
    return examples


def read_qrels(path: Path) -> Qrels:
    """Read relevance judgements: TREC's four columns or BEIR's three, with or without a header.

    A line that holds tabs is split there, so that ids may hold spaces; another at white space.

    Raises:
        DataError: a file that cannot be read, a line of another form, or contradicting grades.
    """
    qrels: Qrels = {}
    for number, fields in _rows(path, {3, 4}, "query 0 document grade, or BEIR's three columns"):
        query, document, grade = fields[0], fields[-2], fields[-1]
        try:
            value = int(grade)
        except ValueError:
            if number == 1 and not any(character.isdigit() for character in grade):
                continue
            raise DataError(f"{path}:{number}: the grade {grade!r} is not an integer") from None
        if qrels.setdefault(query, {}).setdefault(document, value) != value:
            pair = f"query {query!r} and document {document!r}"
            raise DataError(f"{path}:{number}: {pair} were judged {qrels[query][document]} before")
    return qrels


def read_run(path: Path) -> Run:
    """Read a TREC run `query Q0 document rank score tag`, split as qrels are; ranks are not used.

    Raises:
        DataError: a file that cannot be read, a line of another form, a score that is no finite
            number, or a document twice for one query.
    """
    run: Run = {}
    for number, fields in _rows(path, {6}, "query Q0 document rank score tag"):
        query, _, document, _, text, _ = fields
        try:
            score = float(text)
        except ValueError:
            score = math.nan
        if not math.isfinite(score):
            raise DataError(f"{path}:{number}: the score {text!r} is not a finite number")
        scores = run.setdefault(query, {})
        if document in scores:
            raise DataError(f"{path}:{number}: document {document!r} twice for query {query!r}")
        scores[document] = score
    return run


def write_documents(path: Path, documents: Iterable[Document]) -> None:
    """Write documents as JSON lines {id, title, text, metadata}, compressed if `path` ends in .gz.

    As with every `write_…` here, `path` is replaced in one step when all is written.

    Raises:
        DataError: a document that JSON cannot hold, or a path that cannot be written to.
    """
    with _replacing(path) as handle:
        for document in documents:
            handle.write(json_line(document_record(document), document.id))


def write_questions(path: Path, examples: Iterable[Example]) -> None:
    """Write questions as JSON lines {id, text, answers} with where, positives and negatives if any.

    Raises:
        DataError: as `write_documents` does.
    """
    with _replacing(path) as handle:
        for example in examples:
            handle.write(json_line(example_record(example), example.query.id))


def write_qrels(path: Path, qrels: Qrels, form: Literal["trec", "beir"] = "trec") -> None:
    """Write judgements in TREC's four columns or BEIR's three with their header; tabs between them.

    Raises:
        DataError: an id that a line cannot hold, or a path that cannot be written to.
    """
    if form not in {"trec", "beir"}:
        raise SettingsError(f"form={form!r}: the forms of qrels are 'trec' and 'beir'")
    with _replacing(path) as handle:
        if form == "beir":
            handle.write("query-id\tcorpus-id\tscore\n")
        for query, grades in qrels.items():
            for document, grade in grades.items():
                middle = ("0", document) if form == "trec" else (document,)
                handle.write(_tab_line(query, *middle, str(int(grade))))


def write_run(path: Path, run: Run, tag: str) -> None:
    """Write a TREC run, best score first (equal ones in the order given), with tabs as separators.

    Tabs let ids hold spaces; programs that split at any white space need ids without them.

    Raises:
        DataError: a score that is not finite, or as `write_qrels` does.
    """
    with _replacing(path) as handle:
        for query, scores in run.items():
            ranked = sorted(scores.items(), key=lambda item: -item[1])
            for rank, (document, score) in enumerate(ranked, 1):
                if not math.isfinite(score):
                    raise DataError(f"query {query!r}, document {document!r}: the score is {score}")
                handle.write(_tab_line(query, "Q0", document, str(rank), repr(float(score)), tag))


def _documents(paths: Sequence[Path], report: Report, *, count_others: bool) -> Iterator[Document]:
    seen: dict[str, int] = {}  # id -> number of its file << 40 | its line (0: the file as a whole)
    sources: list[Path] = []
    for path, name in _sources(paths, report, count_others=count_others):
        number = len(sources) << 40
        sources.append(path)
        for count, line, document in _documents_of(path, name, report):
            if (first := seen.get(document.id)) is None:
                seen[document.id] = number | (line or 0)
                yield document
            else:
                where = Problem(str(sources[first >> 40]), first & (1 << 40) - 1 or None, "").place
                nth = f" of record {count}" if first == number | (line or 0) else ""
                report(path, line, f"duplicate id {document.id!r}{nth}, first seen in {where}")


def _sources(
    paths: Sequence[Path], report: Report, *, count_others: bool
) -> Iterator[tuple[Path, str]]:
    for path in map(Path, paths):
        if not path.is_dir():
            if not path.exists():
                report(path, None, "no such file or folder")
            elif not suffix_of(path):
                report(path, None, f"unknown suffix; what can be read: {READABLE}")
            else:
                yield path, path.name
            continue
        beir = [path / name for name in ("corpus.jsonl", "corpus.jsonl.gz")]
        beir = [file for file in beir if file.is_file()][:1]
        files, others = (beir, None) if beir else walk(path, report)
        if not files:
            report(path, None, f"nothing in this folder can be read; what can be: {READABLE}")
        elif others and count_others:
            counts = ", ".join(f"{suffix} ({count})" for suffix, count in others.most_common())
            report(path, None, f"files of unknown suffix were passed over: {counts}")
        for file in files:
            yield file, file.relative_to(path).as_posix()


def _documents_of(
    path: Path, name: str, report: Report
) -> Iterator[tuple[int, int | None, Document]]:
    if suffix_of(path) in EXTRACTORS:
        try:
            title, text, metadata = extract(path)
        except DataError as error:
            report(path, None, str(error))
        else:
            yield 1, None, Document(name, text, title, {"source": name, **metadata})
        return
    for number, (line, record) in enumerate(records(path, report, document_columns), 1):
        try:
            document = document_of(record)
        except DataError as error:
            report(path, line, str(error))
        else:
            yield number, line, document


def _reporter(on_error: OnError, problems: list[Problem] | None) -> Report:
    if on_error not in {"stop", "skip"}:
        raise SettingsError(f"on_error={on_error!r}: choose 'stop' or 'skip'")

    def report(path: Path, line: int | None, message: str) -> None:
        problem = Problem(str(path), line, message)
        if on_error == "stop":
            raise DataError(str(problem))
        if problems is not None:
            problems.append(problem)

    return report


def _rows(path: Path, counts: set[int], form: str) -> Iterator[tuple[int, list[str]]]:
    for number, text in lines(path, _reporter("stop", None)):
        if not text.isspace():
            fields = text.rstrip("\r\n").split("\t") if "\t" in text else text.split()
            if len(fields) not in counts:
                hint = "ids that hold spaces need tabs between the fields"
                raise DataError(f"{path}:{number}: expected {form}; saw {fields} ({hint})")
            yield number, fields


def _tab_line(*fields: str) -> str:
    if bad := [field for field in fields if not field or any(mark in field for mark in "\t\n\r")]:
        raise DataError(f"{bad[0]!r} is empty or holds a tab or a line break; rename it")
    if fields[0].startswith("\ufeff"):  # in the first line it would be read as the file's own
        raise DataError(f"{fields[0]!r} begins with a byte order mark; rename it")
    return "\t".join(fields) + "\n"


@contextmanager
def _replacing(path: Path) -> Iterator[TextIO]:
    """Open a hidden sibling that takes the place of `path` at the end, or vanishes at an error."""
    temporary = path.with_name(f".{path.name}.{secrets.token_hex(4)}")
    try:
        with temporary.open("xb") as raw:
            file: Any = raw
            if path.name.lower().endswith(".gz"):  # without name and time: equal data, equal bytes
                file = gzip.GzipFile("", "wb", 6, raw, mtime=0)
            with io.TextIOWrapper(file, encoding="utf-8", newline="\n") as handle:
                yield handle
        temporary.replace(path)
    except UnicodeEncodeError as error:
        raise DataError(f"{path}: a lone surrogate cannot be written: {error}") from error
    except OSError as error:
        raise DataError(f"{path}: cannot be written: {error.strerror or error}") from error
    finally:
        temporary.unlink(missing_ok=True)
