"""A run's questions as its page holds them: a light index, and details that are read on demand.

The index is one JSON value with what the list of questions shows, sorts and searches. The details
(hits, prompts, answers in other contexts) lie in chunks of `CHUNK` questions, and the passages,
each once, in chunks of as many passages: JSON, compressed with gzip and written in base64.
"""

from __future__ import annotations

import base64
import gzip
import json
import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from itertools import islice
from pathlib import Path
from typing import Any, NoReturn, TypeAlias, TypeVar

from ..errors import DataError

CHUNK = 100
"""Questions, or passages, of a chunk."""

_TOP = 10  # hits that are listed of every question; of the others, relevant and shown ones alone
_SURROGATE = re.compile("[\ud800-\udfff]")
_T = TypeVar("_T")

Texts: TypeAlias = Mapping[str, tuple[int, str]]
"""Passage id -> its place among all passages, and its text."""


@dataclass(slots=True)
class Browser:
    """What a page holds of a run's questions.

    Attributes:
        index: {"chunk", "measures", "rows"} as JSON that may stand in a script element; a row is
            [id, question, golds, scores by the place of their measure, answer, abstained, stage],
            null where the question has no such thing.
        details: the chunks of the questions' details; see `_details`.
        passages: the chunks of the passages, each of them [title, text].
        measures: those of which any question has a score.
        rows: question id -> its row.
        read: whether any question has an answer.
        stages: stage -> its questions.
    """

    index: str = ""
    details: list[str] = field(default_factory=list)
    passages: list[str] = field(default_factory=list)
    measures: list[str] = field(default_factory=list)
    rows: dict[str, int] = field(default_factory=dict)
    read: bool = False
    stages: dict[str, int] = field(default_factory=dict)


def build_browser(run: Path, measures: Sequence[str], contexts: Sequence[str]) -> Browser:
    """Read a run folder's questions and passages.

    Args:
        run: the run folder.
        measures: the measures of questions, in the order in which they are listed.
        contexts: the names of contexts, in the order in which they are listed.

    Raises:
        DataError: a file is missing, or a line of one is not what `evaluate` writes.
    """
    browser, texts, rows = Browser(), dict[str, tuple[int, str]](), list[list[Any]]()
    for chunk in _chunks(_each(run / "passages.jsonl", _passage)):
        for name, _, text in chunk:
            texts[name] = (len(texts), text)
        browser.passages.append(_packed([[title, text] for _, title, text in chunk]))

    def question(row: dict[str, Any]) -> tuple[list[Any], dict[str, Any]]:
        return _row(row, measures), _details(row, contexts, texts)

    for questions in _chunks(_each(run / "answers.jsonl", question)):
        for row, _ in questions:
            browser.rows.setdefault(row[0], len(rows))
            browser.read = browser.read or row[4] is not None
            if row[6] is not None:
                browser.stages[row[6]] = browser.stages.get(row[6], 0) + 1
            rows.append(row)
        browser.details.append(_packed([details for _, details in questions]))
    scored = [p for p in range(len(measures)) if any(row[3][p] is not None for row in rows)]
    for row in rows:
        row[3] = [row[3][place] for place in scored]
    browser.measures = [measures[place] for place in scored]
    browser.index = script_json({"chunk": CHUNK, "measures": browser.measures, "rows": rows})
    return browser


def script_json(value: Any) -> str:
    """Render JSON that may stand inside a script element, and that UTF-8 can hold.

    Raises:
        DataError: `value` holds an infinite number.
    """
    try:
        text = json.dumps(value, ensure_ascii=False, allow_nan=False, separators=(",", ":"))
    except ValueError as error:
        raise DataError(f"a score of the run cannot be written: {error}") from error
    text = text.replace("<", "\\u003c").replace("\u2028", "\\u2028").replace("\u2029", "\\u2029")
    return _SURROGATE.sub(lambda match: f"\\u{ord(match[0]):04x}", text)


def _each(path: Path, convert: Callable[[dict[str, Any]], _T]) -> Iterator[_T]:
    number = 0
    try:
        with path.open("rb") as handle:
            for number, line in enumerate(handle, start=1):  # noqa: B007
                yield convert(_JSON.decode(line.decode()))
    except OSError as error:
        reason = f"{path}: cannot be read ({error.strerror or error})"
        raise DataError(f"{reason}. Run the evaluation again.") from error
    except (ValueError, LookupError, TypeError, AttributeError, RecursionError) as error:
        reason = f"{path}:{number}: not a line of a run folder ({type(error).__name__}: {error})"
        raise DataError(f"{reason}. Run the evaluation again.") from error


def _refuse_constant(name: str) -> NoReturn:
    raise ValueError(f"{name} is not a JSON value")


def _chunks(items: Iterator[_T]) -> Iterator[list[_T]]:
    while chunk := list(islice(items, CHUNK)):
        yield chunk


_JSON = json.JSONDecoder(parse_constant=_refuse_constant)


def _passage(row: dict[str, Any]) -> tuple[str, str, str]:
    return row["id"], row["title"], row["text"]


def _row(row: dict[str, Any], measures: Sequence[str]) -> list[Any]:
    scores = row["scores"]
    return [
        row["id"],
        row["question"],
        row["golds"],
        [_short(scores[measure]) if measure in scores else None for measure in measures],
        row.get("answer"),
        row.get("abstained"),
        row.get("stage"),
    ]


def _details(row: dict[str, Any], contexts: Sequence[str], texts: Texts) -> dict[str, Any]:
    """Return what is shown of one question alone.

    The prompt is a list of text, passage id, text, passage id, …, text, so that what it shows is
    not there twice; "places" tells where a passage stands among all passages.
    """
    shown, cited, under = row.get("shown", []), row.get("citations", []), row.get("contexts", {})
    marked = {*shown, *cited}
    hits = [
        [hit["rank"], hit["id"], float(f"{hit['score']:.6g}"), hit["grade"], hit.get("parent")]
        for hit in row["hits"]
        if hit["rank"] <= _TOP or (hit["grade"] or 0) > 0 or hit["id"] in marked
    ]
    answers = [(name, _context(under[name])) for name in contexts if name in under]
    named = [hit[1] for hit in hits] + shown + [name for _, of in answers for name in of["shown"]]
    return {
        "hits": hits,
        "found": len(row["hits"]),
        "shown": shown,
        "citations": cited,
        "attributed": row.get("attributed", False),
        "prompt": _woven(row["prompt"], shown, texts) if "prompt" in row else None,
        "contexts": answers,
        "judge": row.get("judge", {}),
        "places": {name: texts[name][0] for name in named if name in texts},
    }


def _woven(prompt: str, shown: Sequence[str], texts: Texts) -> list[str]:
    parts, start = list[str](), 0
    for name in shown:
        text = texts[name][1] if name in texts else ""
        place = prompt.find(text, start) if text else -1
        if place >= 0:
            parts += [prompt[start:place], name]
            start = place + len(text)
    return [*parts, prompt[start:]]


def _context(under: dict[str, Any]) -> dict[str, Any]:
    return {
        "answer": under["answer"],
        "abstained": under["abstained"],
        "shown": under["shown"],
        "scores": {measure: _short(value) for measure, value in under["scores"].items()},
    }


def _short(score: float) -> float:
    value = round(score, 4)
    return int(value) if value == int(value) else value


def _packed(chunk: Sequence[Any]) -> str:
    raw = script_json(chunk).encode()
    return base64.b64encode(gzip.compress(raw, 6, mtime=0)).decode()
