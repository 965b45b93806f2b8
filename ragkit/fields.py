"""What the fields of a record are called and may hold: records become Documents and Examples."""

from __future__ import annotations

import ast
import json
from collections.abc import Iterable
from functools import lru_cache
from hashlib import blake2b
from typing import Any, TypeAlias

from .errors import DataError
from .types import Document, Example, Query

Record: TypeAlias = dict[str, Any]

FIELDS: dict[str, tuple[str, ...]] = {
    "id": ("id", "_id", "docid", "doc_id", "docno", "passage_id", "psg_id"),
    "text": ("text", "contents", "document_text", "page_content", "body"),
    "title": ("title",),
    "question id": ("id", "_id", "qid", "query_id", "question_id"),
    "question": ("question", "query", "text"),
    "answers": ("answers", "golden_answers", "target", "answer"),
    "positives": ("positives", "positive_passages", "positive_ctxs", "pos"),
    "negatives": ("negatives", "negative_passages", "hard_negative_ctxs", "negative_ctxs", "neg"),
    "retrieved": ("ret_passages", "retrieved"),
    "where": ("where",),
}
"""What a field may be called; where a record has several of the names, the first one counts."""

_KNOWN = {name for names in FIELDS.values() for name in names}
_TITLE_LINE = 200  # characters: a longer first line of "contents" is text, not a title


@lru_cache(maxsize=1024)
def _layout(names: tuple[str, ...]) -> tuple[str, str, str, tuple[str, ...]]:
    """Return the names of a record's id, text and title ("" for none), and its other names."""
    identifier, text, title = (_called(field, names) for field in ("id", "text", "title"))
    for field, name in (("id", identifier), ("text", text)):
        if not name:
            raise _missing(field, names)
    return identifier, text, title, tuple(n for n in names if n not in {identifier, text, title})


def _called(field: str, names: Iterable[str]) -> str:
    return next((name for name in FIELDS[field] if name in names), "")


def _missing(field: str, names: Iterable[str]) -> DataError:
    wanted, seen = ", ".join(FIELDS[field]), ", ".join(names) or "no field"
    return DataError(f"no {field}: looked for {wanted}; saw {seen}")


def document_of(record: Record) -> Document:
    """Make a document of a record; fields without a meaning of their own become metadata.

    Raises:
        DataError: id or text is missing, empty, or (like the title) not a string.
    """
    id_name, text_name, title_name, others = _layout(tuple(record))
    text = _string(record[text_name], text_name)
    title = record[title_name] if title_name else ""
    if type(title) is not str:
        title = "" if title is None else _string(title, title_name)
    if text_name == "contents" and not title_name:
        title, text = _split_title(text)
    metadata: Record = {}
    if others:
        metadata = {name: record[name] for name in others}
        nested = metadata.get("metadata", metadata)
        if nested is None or (isinstance(nested, dict) and nested is not metadata):
            del metadata["metadata"]
            metadata |= nested or {}
    return Document(_identifier(record[id_name], id_name), text, title, metadata)


def _string(value: object, name: str) -> str:
    if type(value) is not str:
        raise DataError(f"{name!r} holds {json.dumps(value)[:80]}, expected a string")
    if not value or value.isspace():
        raise DataError(f"{name!r} is empty")
    return value


def _identifier(value: object, name: str) -> str:
    return str(value) if type(value) is int else _string(value, name)


def _split_title(contents: str) -> tuple[str, str]:
    # FlashRAG keeps the title as the first line of "contents", often inside double quotes
    line, _, text = contents.partition("\n")
    title = line.strip()
    if not title or len(title) > _TITLE_LINE or not text or text.isspace():
        return "", contents
    quoted = len(title) > 1 and title[0] == title[-1] == '"'
    return title[1:-1] if quoted else title, text


def example_of(record: Record, number: str) -> Example:
    """Make a question of a record; `number` is its id if the record has none.

    Raises:
        DataError: the question is missing or empty, or a field holds something else than it should.
    """
    id_name, question = _called("question id", record), _called("question", record)
    if not question:
        raise _missing("question", record)
    identifier = _identifier(record[id_name], id_name) if id_name else number
    where = record.get("where")
    if not isinstance(where, dict | None):
        raise DataError(f"'where' holds {json.dumps(where)[:80]}, expected an object")
    return Example(
        Query(identifier, _string(record[question], question), where or {}),
        _passages(record, "positives"),
        _passages(record, "negatives"),
        _answers(record),
        _passages(record, "retrieved"),
    )


def _answers(record: Record) -> tuple[str, ...]:
    name = _called("answers", record)
    value = record[name] if name else None
    if isinstance(value, str):
        listed = _list_in(value)
        value = [value] if listed is None else listed
    elif value is None:
        value = []
    if not isinstance(value, list) or not all(isinstance(answer, str) for answer in value):
        raise DataError(f"{name!r} holds {json.dumps(value)[:80]}, expected strings")
    return tuple(answer for answer in value if answer and not answer.isspace())


def _list_in(text: str) -> list[str] | None:
    """Read a list of strings that stands as text in a cell, in JSON or in Python's notation."""
    if not text.startswith("[") or not text.endswith("]"):
        return None
    for parse in (json.loads, ast.literal_eval):
        try:
            value = parse(text)
        except (ValueError, SyntaxError, RecursionError, MemoryError):
            continue
        if isinstance(value, list) and all(isinstance(item, str) for item in value):
            return value
    return None


def _passages(record: Record, field: str) -> tuple[Document, ...]:
    documents = []
    for name in (name for name in FIELDS[field] if record.get(name)):
        values = record[name]
        for value in values if isinstance(values, list) else [values]:
            passage = {"text": value} if isinstance(value, str) else value
            if not isinstance(passage, dict):
                raise DataError(f"{name!r} holds {json.dumps(value)[:80]}, expected documents")
            if not _called("id", passage):
                text = json.dumps([passage.get("title"), passage.get(_called("text", passage))])
                passage = {"id": blake2b(text.encode(), digest_size=8).hexdigest(), **passage}
            try:
                documents.append(document_of(passage))
            except DataError as error:
                raise DataError(f"in {name!r}: {error}") from error
    return tuple(documents)


def document_record(document: Document) -> Record:
    """Make a record of a document, with the names that ragkit writes."""
    return {
        "id": document.id,
        "title": document.title,
        "text": document.text,
        "metadata": dict(document.metadata),
    }


def example_record(example: Example) -> Record:
    """Make a record of a question, with the names that ragkit writes."""
    query = example.query
    optional = {
        "where": dict(query.where),
        "positives": [document_record(document) for document in example.positives],
        "negatives": [document_record(document) for document in example.negatives],
        "retrieved": [document_record(document) for document in example.retrieved],
    }
    return {
        "id": query.id,
        "text": query.text,
        "answers": list(example.answers),
        **{name: value for name, value in optional.items() if value},
    }


def json_line(record: Record, name: str) -> str:
    """Render a record as a line of JSON; `name` is what the error calls it.

    Raises:
        DataError: it holds NaN, an infinity, or something that JSON has no form for.
    """
    try:
        return json.dumps(record, ensure_ascii=False, allow_nan=False) + "\n"
    except (TypeError, ValueError, RecursionError) as error:
        raise DataError(f"{name!r} cannot be written as JSON: {error}") from error


def _header(row: list[str]) -> list[str]:
    lowered = [name.strip().lower() for name in row]
    return [low if low in _KNOWN else name for low, name in zip(lowered, row, strict=True)]


def document_columns(row: list[str]) -> tuple[list[str], bool]:
    """Name the columns of a table of documents, and tell whether its first row is a header."""
    names = _header(row)
    if _called("text", names):
        return names, True
    if len(row) in {2, 3}:
        return ["id", "text", "title"][: len(row)], False
    raise DataError(f"{len(row)} columns and no header; without one: id, text and perhaps title")


def question_columns(row: list[str]) -> tuple[list[str], bool]:
    """Name the columns of a table of questions, and tell whether its first row is a header."""
    names = _header(row)
    if _called("question", names):
        return names, True
    if len(row) > 3:
        raise DataError(f"{len(row)} columns and no header; without one: id, question, answers")
    if len(row) == 1 or (len(row) == 2 and row[1].startswith("[")):
        return ["question", "answers"][: len(row)], False
    return ["id", "question", "answers"][: len(row)], False
