"""Prompts as token ids, each part tokenised apart and the ids joined."""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from jinja2 import TemplateError

from ..errors import ModelError
from ..prompts import Message, Part, Prompt

# Private-use characters mark, in a rendered chat template, where a part's own token ids belong.
_MARK = re.compile("\ue000(\\d+)\ue001")


PLAIN_STOPS = ("\n\n", "\nQuestion:")
"""What ends an answer in the plain layout, where no control token does."""


@dataclass(frozen=True, slots=True)
class PromptIds:
    """A prompt as token ids: those before virtual tokens, and those after.

    `[header + context]` and `[question + answer header]`, unless the wording places tokens
    elsewhere.
    """

    context: tuple[int, ...]
    question: tuple[int, ...]

    @property
    def ids(self) -> tuple[int, ...]:
        """Both, joined."""
        return self.context + self.question

    def with_tokens(self, tokens: tuple[int, ...], placement: str) -> tuple[int, ...]:
        """Return them with ids of virtual tokens in their place: `start` is before both."""
        before, after = self.around(placement)
        return before + tokens + after

    def around(self, placement: str) -> tuple[tuple[int, ...], tuple[int, ...]]:
        """Return what stands before virtual tokens, and what after them."""
        return ((), self.ids) if placement == "start" else (self.context, self.question)


class PromptEncoder:
    """Turns prompts into token ids, by the tokenizer's chat template or plainly.

    Training and inference both go through here, so that they see the same ids.
    """

    def __init__(self, tokenizer: Any, chat: bool) -> None:
        self._tokenizer = tokenizer
        # Tokens that are added but not special, such as <think>: `split_special_tokens` leaves
        # them whole. Those that are blank are of the text.
        self._added = {
            number
            for number, token in tokenizer.added_tokens_decoder.items()
            if not token.special and token.content.strip(" \t\r\n\u2581")
        }
        self.chat = chat
        self._around: tuple[str, list[int]] | None = None

    def data_ids(self, text: str) -> list[int]:
        """Tokenise untrusted text: what looks like a control token is spelled out, not obeyed."""
        ids: list[int] = self._tokenizer.encode(
            text, add_special_tokens=False, split_special_tokens=True, verbose=False
        )
        if self._added.isdisjoint(ids) or len(text) < 2:
            return ids
        middle = len(text) // 2
        return self.data_ids(text[:middle]) + self.data_ids(text[middle:])

    def _instruction_ids(self, text: str) -> list[int]:
        ids: list[int] = self._tokenizer.encode(text, add_special_tokens=False, verbose=False)
        return ids

    def encode(self, prompt: Prompt) -> PromptIds:
        """Tokenise a prompt part by part and join the ids, as training does too.

        Raises:
            ModelError: the chat template leaves out a part of the prompt.
        """
        messages, data = _marked(prompt.messages)
        pieces = _MARK.split(self._render(messages)[0])
        context: list[int] = []
        ids: list[int] = [] if self.chat else self.start_ids()
        blank = ""  # models know words with the blank before them: it goes with the data
        for place, piece in enumerate(pieces):
            if place % 2 == 0:
                before_data = place + 1 < len(pieces) and data[int(pieces[place + 1])] is not None
                trusted = piece.rstrip(" ") if before_data else piece
                blank = piece[len(trusted) :]
                ids += self._instruction_ids(trusted) if trusted else []
            elif (part := data[int(piece)]) is None:
                context, ids = ids, []
            else:
                ids += self.data_ids(blank + part.text)
        return PromptIds(tuple(context), tuple(ids))

    def text(self, prompt: Prompt, tokens: str, placement: str) -> str:
        """Return a prompt as one string, with a spelling of virtual tokens in their place.

        `start` is before the control tokens. Data is spelled as it is: a tokenizer that reads the
        string obeys the control tokens in it.
        """
        messages, data = _marked(prompt.messages)
        spelling = "" if placement == "start" else tokens
        text = _spelled(self._render(messages)[0], data, spelling)
        if placement != "start":
            return text
        start = "" if self.chat else self._tokenizer.decode(self.start_ids())
        return tokens + start + text

    def turns(self, prompt: Prompt, tokens: str) -> list[dict[str, str]]:
        """Return a prompt as the chat template's messages, with a spelling of virtual tokens.

        Messages of roles that the template does not take are said by the user.
        """
        messages, data = _marked(prompt.messages)
        return [
            {**message, "content": _spelled(message["content"], data, tokens)}
            for message in self._render(messages)[1]
        ]

    def _render(self, messages: list[dict[str, str]]) -> tuple[str, list[dict[str, str]]]:
        """Return messages as one string, and the messages that it was made of."""
        merged = "\n\n".join(message["content"] for message in messages)
        if not self.chat:
            return merged, messages
        marks = _MARK.findall(merged)
        rendered = self.render_turns(messages)
        if _MARK.findall(rendered) != marks:  # the template refuses the system role, or drops it
            messages = [{"role": "user", "content": merged}]
            rendered = self.render_turns(messages)
        if _MARK.findall(rendered) != marks:
            raise ModelError("the tokenizer's chat template leaves out the user's words")
        return rendered, messages

    def render_turns(self, messages: list[dict[str, str]]) -> str:
        """Return what the chat template makes of messages; nothing where it refuses them."""
        try:
            return str(
                self._tokenizer.apply_chat_template(
                    messages, tokenize=False, add_generation_prompt=True
                )
            )
        except TemplateError:
            return ""

    def answer_ids(self, text: str, ends: Sequence[int]) -> list[int]:
        """Tokenise an answer as it follows a prompt, with the token that ends it.

        Args:
            text: the answer, which is data.
            ends: the ids that end an answer; the one that the chat template writes is taken.
        """
        if not self.chat:
            return [*self.data_ids(" " + text), ends[0]]
        if self._around is None:
            self._around = self._around_answers()
        blank, closing = self._around
        return [*self.data_ids(blank + text), next((i for i in closing if i in ends), ends[0])]

    def _around_answers(self) -> tuple[str, list[int]]:
        """Return the blank that the chat template has an answer begin with, and ids behind it.

        Templates that end a prompt in `[/INST]` put a blank before the answer. It is the first
        word's, unless the tokenizer gives each text one by itself.
        """
        user, answer = {"role": "user", "content": ""}, {"role": "assistant", "content": "\ue001"}
        try:
            rendered = str(self._tokenizer.apply_chat_template([user, answer], tokenize=False))
        except TemplateError:
            rendered = ""
        before, _, after = rendered.rpartition("\ue001")
        header = self.render_turns([user])
        joined = self._instruction_ids(before + "a")
        begun = before == header + " " and (
            joined == self._instruction_ids(header) + self.data_ids(" a")
        )
        return " " if begun else "", self._instruction_ids(after)

    def start_ids(self) -> list[int]:
        """Return what the tokenizer puts before a plain text: a beginning token, or nothing."""
        ids: list[int] = self._tokenizer.encode("")
        return [token for token in ids if token == self._tokenizer.bos_token_id]


def _marked(messages: Sequence[Message]) -> tuple[list[dict[str, str]], list[Part | None]]:
    """Return messages for a chat template with marks for data, and the data behind the marks.

    The mark whose data is None stands where virtual tokens do: where the prompt says so, or else
    where the context ends and the question begins, which is before the part that follows the last
    passage (which may begin the user's turn), or before the user's words without passages.
    """
    flat = [(place, part) for place, message in enumerate(messages) for part in message.parts]
    kinds = [part.kind for _, part in flat]
    users = [message.role for message in messages].index("user")
    if "tokens" in kinds:
        boundary = kinds.index("tokens")
    elif "context" in kinds:
        boundary = len(kinds) - kinds[::-1].index("context")
    else:
        boundary = [place for place, _ in flat].index(users)
    contents = [""] * len(messages)
    data: list[Part | None] = []
    for number, (place, part) in enumerate(flat):
        if number == boundary:
            contents[place] += f"\ue000{len(data)}\ue001"
            data.append(None)
        if part.kind == "instruction":
            contents[place] += part.text
        elif part.kind != "tokens":
            contents[place] += f"\ue000{len(data)}\ue001"
            data.append(part)
    roles = [message.role for message in messages]
    return [{"role": r, "content": c} for r, c in zip(roles, contents, strict=True)], data


def _spelled(marked: str, data: Sequence[Part | None], tokens: str) -> str:
    """Return a text with the data behind its marks, and `tokens` where virtual tokens stand."""

    def behind(mark: re.Match[str]) -> str:
        part = data[int(mark[1])]
        return tokens if part is None else part.text

    return _MARK.sub(behind, marked)


def at_stop(tokenizer: Any, width: int, ids: torch.Tensor, scores: Any, **_: Any) -> torch.Tensor:
    """Tell which rows have come to a stop string, behind `width` ids and line ends."""
    texts = tokenizer.batch_decode(ids[:, width:], skip_special_tokens=True)
    ended = [any(stop in text.lstrip("\n") for stop in PLAIN_STOPS) for text in texts]
    return torch.tensor(ended, device=ids.device)


def until_stop(pieces: Iterable[str]) -> Iterator[str]:
    """Pass a text on up to its first stop string, without the line ends that it begins with."""
    text, done = "", 0
    for piece in pieces:
        text = text + piece if done else (text + piece).lstrip("\n")
        ends = [text.find(stop) for stop in PLAIN_STOPS if stop in text]
        begun = [
            size
            for stop in PLAIN_STOPS
            for size in range(1, len(stop))
            if text.endswith(stop[:size])
        ]
        end = min(ends) if ends else len(text) - max(begun, default=0)
        if end > done:
            yield text[done:end]
            done = end
        if ends:
            return
    yield text[done:]
