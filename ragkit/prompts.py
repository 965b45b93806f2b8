"""Prompts: a question and its hits, packed to a token budget, as parts that know what they are.

A prompt is messages of parts, not a string, for two reasons. Passages and questions are data: their
parts are marked, so that a generator never reads a control token in them. And the place where the
context ends stays known, so that virtual tokens can stand there
(`[header + context] [virtual tokens] [question + answer header]`).
"""

from __future__ import annotations

import re
from bisect import bisect_left
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import partial
from typing import Literal, TypeAlias

from .errors import DataError
from .styles import PLACEHOLDER, PromptStyle
from .types import Hit

Kind: TypeAlias = Literal["instruction", "context", "tokens", "question"]
_Cut: TypeAlias = Callable[[int | None], str]
Sentences: TypeAlias = Callable[[str], Sequence[tuple[int, int]]]

TEMPLATE_TOKENS = 64  # what chat templates add: roles, turns, a default system message
_CITATION = re.compile(r"\[\s*(\d{1,3}(?:\s*[,;]\s*\d{1,3})*)\s*\]")
_SOURCE = r"(passages?|documents?|context|text|sources?|information)"
_SAYS = r"(mention|contain|say|state|provide|hold|specify|answer|give|include|tell)"
_SAID = r"(mentioned|stated|provided|given|specified|found|answered|contained|said|included)"
_WHOLE_ABSTENTION = re.compile(
    rf"\W*(unknown|unanswerable|none|n/?a|no answer|no idea|not (known|available|sure|{_SAID}))\W*",
    re.IGNORECASE,
)
_ABSTENTION = re.compile(
    r"\b(i (do not|don['’]?t|cannot|can['’]?t|could not|couldn['’]?t) "
    r"(know|answer|determine|find|tell(?! (you|a)\b))|"
    r"(i['’]?m|i am) (not sure|unable to (answer|determine|find|tell|say))|i have no idea|"
    r"(not|\w+n['’]t)( have| contain| provide| give| include)? (enough|sufficient) information|"
    r"insufficient information|there is no answer|answer (cannot|can['’]?t|could not) be found|"
    r"(cannot|can['’]?t|could not) be (answered|determined)|"
    rf"{_SOURCE}( (above|below|provided|given))? "
    rf"(do(es)? not|don['’]?t|doesn['’]?t) (explicitly |directly )?{_SAYS}|"
    rf"(no|none of the)( given| provided| above)? {_SOURCE}( that)? {_SAYS}s?(?! (more|fewer))|"
    rf"not (explicitly |directly )?{_SAID} (in|by) (the|any of the|these|this)"
    rf"( given| provided| above)? {_SOURCE}|"
    rf"answer (is not|isn['’]t) (in the|{_SAID}(?! (in|by) (?!the|any|these|this))))\b",
    re.IGNORECASE,
)


@dataclass(frozen=True, slots=True)
class Part:
    """A piece of a message. Only an `instruction` is trusted: it may hold control tokens.

    An empty one of the kind `tokens` marks where virtual tokens stand.
    """

    text: str
    kind: Kind


@dataclass(frozen=True, slots=True)
class Message:
    """What one role says."""

    role: Literal["system", "user"]
    parts: tuple[Part, ...]

    @property
    def text(self) -> str:
        """The parts joined."""
        return "".join(part.text for part in self.parts)


@dataclass(frozen=True, slots=True)
class Prompt:
    """Messages for a generator, and the places of the hits that they show, in their order.

    `cut` tells how many characters of the last one's text are shown, where it was cut.
    """

    messages: tuple[Message, ...]
    shown: tuple[int, ...] = ()
    cut: int | None = None

    @property
    def text(self) -> str:
        """The messages' texts, one paragraph each: the prompt of the plain layout."""
        return "\n\n".join(message.text for message in self.messages)


def build_prompt(
    style: PromptStyle,
    question: str,
    hits: Sequence[Hit],
    *,
    budget: int,
    window: int,
    count: Callable[[str], int],
    sentences: Sentences,
) -> Prompt:
    """Pack hits, best first, and the question into a prompt.

    Passages are added whole while they fit. The first that does not fit is cut at the end of its
    last sentence that does, and nothing follows it; one of which not even a sentence fits is left
    out, and the next is tried. The question is never cut.

    Args:
        style: the wording.
        question: the question.
        hits: the passages, best first.
        budget: the tokens that the passages may take.
        window: the tokens that the whole prompt may take.
        count: counts a text's tokens.
        sentences: gives a text's sentences, as character spans.

    Raises:
        DataError: the question alone does not fit into the window.
    """
    alone = _size(_assemble(style, question, ()), count)
    if alone > window:
        raise DataError(
            f"the question {question[:60]!r}… and its prompt take {alone} tokens, the "
            f"generator reads {window}. Shorten it, or choose a generator that reads more."
        )
    passages: list[str] = []
    shown: list[int] = []
    room = min(window - _size(_assemble(style, question, ("",)), count), budget)
    cut = None
    for place, hit in enumerate(hits):
        passage_of = partial(_passage, style, len(passages) + 1, hit)

        def size_of(end: int | None = None, passage_of: _Cut = passage_of) -> int:
            return count(passage_of(end) + style.between)

        if (size := size_of()) > room:
            ends = [end for _, end in sentences(hit.document.text)]
            fitting = bisect_left(ends, True, key=lambda end: size_of(end) > room)
            if not fitting:
                continue
            cut = len(hit.document.text[: ends[fitting - 1]].rstrip())
        passages.append(passage_of(cut))
        shown.append(place)
        room -= size
        if cut is not None:
            break
    return replace(_assemble(style, question, passages), shown=tuple(shown), cut=cut)


def _size(prompt: Prompt, count: Callable[[str], int]) -> int:
    return sum(count(message.text) for message in prompt.messages)


def _passage(style: PromptStyle, number: int, hit: Hit, end: int | None = None) -> str:
    text = hit.document.text if end is None else hit.document.text[:end].rstrip()
    template = style.titled if hit.document.title else style.passage
    values = {"number": str(number), "title": hit.document.title, "text": text}
    return re.sub(r"\{(number|title|text)\}", lambda match: values[match[1]], template)


def _assemble(style: PromptStyle, question: str, passages: Sequence[str]) -> Prompt:
    templates = (
        (("system", style.system), ("user", style.user))
        if passages
        else (("system", style.alone), ("user", style.user_alone))
    )
    ends = [style.between] * (len(passages) - 1) + [style.after]
    fill: dict[str, tuple[Part, ...]] = {
        "context": tuple(Part(p + end, "context") for p, end in zip(passages, ends, strict=False)),
        "tokens": (Part("", "tokens"),),
        "question": (Part(question, "question"),),
    }
    messages = []
    for role, template in templates:
        parts: list[Part] = []
        for place, piece in enumerate(PLACEHOLDER.split(template)):
            if place % 2:
                parts.extend(fill[piece])
            elif piece:
                parts.append(Part(piece, "instruction"))
        if parts:
            messages.append(Message(role, tuple(parts)))  # type: ignore[arg-type]
    return Prompt(tuple(messages))


def citations(text: str, shown: int) -> tuple[int, ...]:
    """Return the passages that an answer cites as `[n]` or `[n, m]`: positions from 0, each once.

    Numbers of no shown passage are left out.
    """
    numbers = [int(n) for group in _CITATION.findall(text) for n in re.findall(r"\d+", group)]
    return tuple(dict.fromkeys(n - 1 for n in numbers if 1 <= n <= shown))


def without_citations(text: str) -> str:
    """Return an answer without its `[n]` marks, as answers are compared with gold ones."""
    return re.sub(r"\s*" + _CITATION.pattern, "", text).strip()


def abstains(text: str) -> bool:
    """Tell whether an answer declines to answer (English wordings, or an empty answer)."""
    said = without_citations(text)
    return not said or bool(_WHOLE_ABSTENTION.fullmatch(said) or _ABSTENTION.search(said))
