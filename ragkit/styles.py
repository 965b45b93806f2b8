"""Wordings of prompts: where passages, virtual tokens and the question stand."""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import asdict, dataclass, replace
from typing import Any, Literal, Self, TypeAlias

from .errors import SettingsError

Placement: TypeAlias = Literal["middle", "front", "last", "start"]
"""Where virtual tokens T stand beside passages R and question Q: [R,T,Q], [T,R,Q], [R,Q,T], or
before all that the model reads, control tokens and instructions included."""

PLACEHOLDER = re.compile(r"\{(context|tokens|question)\}")


@dataclass(frozen=True, slots=True)
class PromptStyle:
    """The wording of a prompt.

    `system` and `user` hold `{context}` and `{question}` once between them, the context before the
    question. `passage` holds `{number}`, `{title}` and `{text}`; `titled` replaces it for passages
    with a title; `between` stands between two of them and `after` after the last one. `alone`
    replaces `system`, and `user_alone` `user`, where there are no passages. `{tokens}` may say
    where virtual tokens stand; else they follow the last passage, or begin the user's words.
    """

    name: str
    system: str
    user: str
    passage: str
    titled: str
    alone: str
    user_alone: str = "Question: {question}"
    between: str = ""
    after: str = ""

    def __post_init__(self) -> None:
        """Refuse a style that could not show its context and question.

        Raises:
            SettingsError: a placeholder is missing, repeated, or in the wrong order.
        """
        found = PLACEHOLDER.findall(self.system) + PLACEHOLDER.findall(self.user)
        alone = PLACEHOLDER.findall(self.user_alone)
        wrong = [n for n in found if n != "tokens"] != ["context", "question"]
        wrong |= [n for n in alone if n != "tokens"] != ["question"]
        if wrong or found.count("tokens") > 1 or alone.count("tokens") > 1:
            raise SettingsError(
                f"prompt style {self.name!r}: {{context}} and then {{question}} must stand in it "
                "once each, and {tokens} at most once"
            )

    def placing(self, placement: Placement) -> Self:
        """Return the style with virtual tokens standing elsewhere than it says itself."""
        if placement == "middle":
            return self
        bare = {
            name: getattr(self, name).replace("{tokens}", "")
            for name in ("system", "user", "user_alone")
        }
        if placement == "front":
            for name in ("system", "user"):
                bare[name] = bare[name].replace("{context}", "{tokens}{context}")
            bare["user_alone"] = "{tokens}" + bare["user_alone"]
        elif placement == "last":
            bare["user"] += "{tokens}"
            bare["user_alone"] += "{tokens}"
        return replace(self, **bare)

    def to_json(self) -> dict[str, str]:
        """Return the wording by its fields."""
        return asdict(self)


def style_from(value: Mapping[str, Any]) -> PromptStyle:
    """Return the style of which `value` is the JSON.

    Raises:
        SettingsError: it is none.
    """
    try:
        return PromptStyle(**value)
    except TypeError as error:
        raise SettingsError(f"this is no prompt style: {error}") from error


ABSTENTION = "I don't know"
"""What a reader is to say where the answer is not known."""

SPRING_INSTRUCTION = (
    "According to the previous relevant passages, please answer the following question. "
    "Only return the answer without any other words."
)

STYLES: dict[str, PromptStyle] = {
    style.name: style
    for style in (
        PromptStyle(
            name="ragkit",
            system=(
                "Answer the question based on the given passages. Give only the answer, in a few "
                "words, and cite the passage that holds it by its number, such as [2]. "
                f"If the passages do not hold the answer, say: {ABSTENTION}.\n\n{{context}}"
            ),
            user="Question: {question}",
            passage="[{number}] {text}\n",
            titled="[{number}] {title}: {text}\n",
            alone=(
                "Answer the question. Give only the answer, in a few words. "
                f"If you do not know it, say: {ABSTENTION}."
            ),
        ),
        # FlashRAG's default template (Jin et al., 2024), word for word, missing blanks included.
        PromptStyle(
            name="flashrag",
            system=(
                "Answer the question based on the given document."
                "Only give me the answer and do not output any other words."
                "\nThe following are given documents.\n\n{context}"
            ),
            user="Question: {question}",
            passage="Doc {number}(Title: ) {text}\n",
            titled="Doc {number}(Title: {title}) {text}\n",
            alone=(
                "Answer the question based on your own knowledge. "
                "Only give me the answer and do not output any other words."
            ),
        ),
        # The prompt baseline of SPRING (Zhu et al., 2025, arXiv 2405.19670).
        PromptStyle(
            name="spring",
            system="",
            user="{context}\n" + SPRING_INSTRUCTION + "\nQuestion: {question}\nAnswer:",
            passage="[{number}] {text}\n",
            titled="[{number}] {title} {text}\n",
            alone="",
            user_alone="Question: {question}\nAnswer:",
        ),
        # What SPRING trains its tokens with: they take the instruction's place.
        PromptStyle(
            name="virtual-tokens",
            system="",
            user="{context}{tokens}Question: {question}\nAnswer:",
            passage="[{number}] {text}",
            titled="[{number}] {title} {text}",
            alone="",
            user_alone="{tokens}Question: {question}\nAnswer:",
            between="\n",
            after="\n\n",
        ),
    )
}


def style_named(name: str) -> PromptStyle:
    """Return a prompt style by name.

    Raises:
        SettingsError: there is none of that name.
    """
    if name not in STYLES:
        raise SettingsError(f"unknown prompt {name!r}; known are {', '.join(STYLES)}")
    return STYLES[name]
