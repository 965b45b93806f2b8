"""Files of probes: their records become contexts to read and continuations to score."""

from __future__ import annotations

import json
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, NoReturn, TypeAlias

from ..errors import DataError
from ..parsing import Problem, records, suffix_of

Kind: TypeAlias = Literal["choices", "answers", "texts"]

_QUESTION = ("question", "input")
_ANSWER = ("answer", "output", "target")
_ASKED = {*_QUESTION, *_ANSWER, "query", "answers", "golden_answers"}
_SENTENCE_END = re.compile(r"(?<=[.!?…؟])[\"'”’)\]]*\s+")


@dataclass(frozen=True, slots=True)
class ProbeItem:
    """What a model reads (`context`), and what it scores after it.

    Attributes:
        id: unique in its probe.
        context: empty for a text that is scored as a whole.
        continuations: the choices, the one answer, or the one text.
        answer: the place of the right choice, from 0.
    """

    id: str
    context: str
    continuations: tuple[str, ...]
    answer: int = 0


@dataclass(frozen=True, slots=True)
class Probe:
    """The items of one file, all of one kind."""

    name: str
    kind: Kind
    items: tuple[ProbeItem, ...]


def read_probe(path: Path) -> Probe:
    """Read a probe from JSON lines or any other file of records, `.gz` too.

    Records with `choices` and an integer `answer` (from 0) are multiple choice; those with
    `question` or `input` and a string `answer`, `output` or `target` ask how likely that answer
    is; those with `text` alone are held-out texts. Other fields are passed over. A record without
    an id is called "q" and the number of its line.

    Prompts are the lm-evaluation-harness' (Gao et al. 2024): `Question: …`, `Answer:`, and the
    choice or answer behind a space. A question with choices whose last sentence holds no question
    mark ("Predators eat") is running text, which the choices continue.

    Raises:
        DataError: a record that is none of these, records of several kinds, an id twice, or a file
            that cannot be read; with file and line.
    """
    kind: Kind | None = None
    items: dict[str, ProbeItem] = {}
    for line, record in records(path, _stop, lambda row: (row, True)):
        try:
            found, item = _item(record, f"q{line}")
            if kind not in (None, found):
                raise DataError(
                    f"a record of {found} after records of {kind}; keep one kind in a file"
                )
            if item.id in items:
                raise DataError(f"duplicate id {item.id!r}; give each record its own, or none")
        except DataError as error:
            raise DataError(f"{path}:{line}: {error}") from error
        kind = found
        items[item.id] = item
    if kind is None:
        raise DataError(f"{path}: there are no records")
    return Probe(path.name[: -len(suffix_of(path))], kind, tuple(items.values()))


def _stop(path: Path, line: int | None, message: str) -> NoReturn:
    raise DataError(str(Problem(str(path), line, message)))


def _item(record: Mapping[str, Any], number: str) -> tuple[Kind, ProbeItem]:
    name = record.get("id", number)
    if type(name) not in (str, int):
        raise DataError(f"'id' holds {json.dumps(name)[:80]}, expected a string or an integer")
    if "choices" in record:
        question = _string(record, _QUESTION)
        choices = _choices(record["choices"])
        answer = _place(record.get("answer"), len(choices))
        context = _as_question(question) if _asks(question) else question
        return "choices", ProbeItem(str(name), context, tuple(f" {c}" for c in choices), answer)
    if any(field in record for field in _ANSWER):
        context = _as_question(_string(record, _QUESTION))
        return "answers", ProbeItem(str(name), context, (f" {_string(record, _ANSWER)}",))
    if "text" in record and not record.keys() & _ASKED:
        return "texts", ProbeItem(str(name), "", (_string(record, ("text",)),))
    raise DataError(
        "not a record of a probe, which has `question` and `choices` and `answer`, or `question` "
        f"and `answer`, or `text` alone; saw {', '.join(record) or 'no field'}"
    )


def _string(record: Mapping[str, Any], names: Sequence[str]) -> str:
    name = next((name for name in names if name in record), None)
    if name is None:
        raise DataError(f"no {names[0]}: looked for {', '.join(names)}; saw {', '.join(record)}")
    value = record[name]
    if not isinstance(value, str):
        raise DataError(f"{name!r} holds {json.dumps(value)[:80]}, expected a string")
    if not value.strip():
        raise DataError(f"{name!r} is empty; fill it or drop the record")
    return value.strip()


def _choices(value: object) -> list[str]:
    if not isinstance(value, list) or not all(isinstance(choice, str) for choice in value):
        raise DataError(f"'choices' holds {json.dumps(value)[:80]}, expected a list of strings")
    if len(value) < 2:
        raise DataError(f"'choices' holds {len(value)} of them, and there must be at least 2")
    choices = [choice.strip() for choice in value]
    if "" in choices:
        raise DataError(f"choice {choices.index('')} (from 0) is empty; fill it or drop it")
    return choices


def _place(value: object, choices: int) -> int:
    if type(value) is not int:
        raise DataError(
            f"'answer' holds {json.dumps(value)[:80]}, expected the place of the right choice, an "
            f"integer from 0 to {choices - 1}"
        )
    if not 0 <= value < choices:
        raise DataError(
            f"'answer' is {value}, but the places of the {choices} choices are 0 to {choices - 1}"
        )
    return value


def _asks(question: str) -> bool:
    last = _SENTENCE_END.split(question)[-1]
    return any(mark in last for mark in "?？؟")


def _as_question(question: str) -> str:
    return f"Question: {question}\nAnswer:"
