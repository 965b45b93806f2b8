"""Learning virtual tokens from questions with their passages, and measuring what they changed."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any, Literal, Protocol

import torch

from ..errors import DataError, SettingsError
from ..models.generator import Generator
from ..models.loading import end_ids
from ..models.prefix_cache import PrefixCache
from ..models.virtual_tokens import VirtualTokens, start_rows, template_hash
from ..prompts import Prompt
from ..styles import Placement, PromptStyle
from ..types import Example, Hit, Progress, Qrels, Query, quiet
from .draws import Draw, Draws
from .keeper import History, LoopSettings
from .loop import train
from .packing import turning_length
from .prompt_tuning import PromptTuningTrainee
from .token_loss import Rows, TokenRow, TokenTrainee, collate, row_of

_DEV = "dev"


class MakePrompt(Protocol):
    """Builds a prompt that leaves room for so many tokens."""

    def __call__(self, query: Query, hits: Sequence[Hit], *, room: int = 0) -> Prompt:
        """Return the prompt."""
        ...


@dataclass(frozen=True, slots=True)
class Retrieved:
    """Questions with answers and what was retrieved for them: `hits` as many as `examples`.

    `judged` are judgements of documents, where there are some.
    """

    examples: Sequence[Example]
    hits: Sequence[Sequence[Hit]]
    judged: Qrels = field(default_factory=dict)


@dataclass
class TokenRun:
    """What every seed of a run shares.

    Attributes:
        generator: the base, without virtual tokens of its own.
        style: the prompt's wording, with the tokens in their place.
        prompt: builds a prompt in that wording.
        placement: where the tokens stand.
        count: how many virtual tokens are learnt.
        train, dev: what is learnt from, and what is evaluated while learning.
        passages: the least and the most that a prompt shows; in evaluation always the most.
        prefixes: keeps what stands before the tokens; None takes gradient checkpointing instead.
        start: embeddings to start from in place of `start_rows`.
    """

    generator: Generator
    style: PromptStyle
    prompt: MakePrompt
    placement: Placement
    count: int
    train: Retrieved
    dev: Retrieved
    passages: tuple[int, int]
    prefixes: PrefixCache | None
    start: torch.Tensor | None = None

    def learn(
        self,
        settings: LoopSettings,
        folder: Path,
        *,
        fixed: bool = False,
        objective: Literal["sample", "batch"] = "sample",
        shuffle: bool = False,
        progress: Progress = quiet,
    ) -> tuple[VirtualTokens, History]:
        """Learn the tokens of one seed, from the state in the folder if there is one.

        Raises:
            DataError, SettingsError: as `loop.train` and `Draws` do.
        """
        draws = Draws(
            tuple(len(example.answers) for example in self.train.examples),
            settings.steps,
            settings.batch,
            self.passages,
            self.count,
            fixed=fixed or self.placement == "start",
            objective=objective,
            shuffle=shuffle,
            seed=settings.seed,
        )
        found = [len(hits) for hits in self.train.hits]
        trainee = self._trainee()
        try:
            history = train(
                trainee,
                lambda begin: Rows(draws, self._row, found, begin),
                collate,
                settings,
                folder,
                evaluate=lambda: self._dev_loss(trainee, settings.micro_batch),
                progress=progress,
            )
        finally:
            self.generator.model.eval()
            if self.prefixes is None:
                self.generator.model.activation_checkpointing_disable()
        return self.tokens(trainee.tokens), history

    def _trainee(self) -> TokenTrainee | PromptTuningTrainee:
        model, tokenizer = self.generator.model, self.generator.tokenizer
        start = self.start
        if start is None:
            start = start_rows(model, tokenizer, self.count)
        size = int(model.get_input_embeddings().weight.shape[1])
        if tuple(start.shape) != (self.count, size):
            raise SettingsError(
                f"the embeddings to start from are of shape {tuple(start.shape)}; "
                f"{self.count} tokens of this model need {(self.count, size)}"
            )
        if self.placement == "start":
            return PromptTuningTrainee(model, start)
        return TokenTrainee(model, start, self.prefixes)

    def tokens(self, embeddings: torch.Tensor) -> VirtualTokens:
        """Return embeddings as virtual tokens of this run's base, wording and layout."""
        encoder, tokenizer = self.generator.encoder, self.generator.tokenizer
        return VirtualTokens(
            embeddings.detach().float().cpu().clone(),
            base=self.generator.name,
            base_hash=self.generator.base_hash(),
            layout="chat" if encoder.chat else "plain",
            placement=self.placement,
            style=self.style,
            template_hash=template_hash(
                self.style, tokenizer.chat_template if encoder.chat else None
            ),
        )

    def _row(self, draw: Draw, passages: Sequence[int]) -> TokenRow:
        example, hits = self.train.examples[draw.example], self.train.hits[draw.example]
        key = draw.example if draw.shuffle is None else None
        shown = [hits[place] for place in passages]
        return self._made(key, example, shown, draw.tokens, draw.answer)

    def _made(
        self, key: Any, example: Example, hits: Sequence[Hit], tokens: int, answer: int
    ) -> TokenRow:
        encoder = self.generator.encoder
        room = longest_answer(self.generator, example) + self.count
        ids = encoder.encode(self.prompt(example.query, hits, room=room))
        answer_ids = encoder.answer_ids(example.answers[answer], self.ends)
        size = len(ids.ids) + tokens + len(answer_ids)
        # Beyond where LongRoPE turns, the positions of what was read before would be others.
        window = min(self.generator.window, turning_length(self.generator.model) or size)
        if size > window:
            raise DataError(
                f"question {example.query.id!r}: its prompt, {tokens} virtual tokens and its "
                f"answer take {size} tokens; the model reads {window} as they are trained. Lower "
                "--context-tokens."
            )
        return row_of(key, ids, tokens, answer_ids, self.placement)

    @cached_property
    def ends(self) -> list[int]:
        """The ids that end an answer."""
        return end_ids(self.generator.model, self.generator.tokenizer)

    @cached_property
    def _dev_rows(self) -> list[TokenRow]:
        most = self.passages[1]
        return [
            self._made((_DEV, place), example, hits[:most], self.count, 0)
            for place, (example, hits) in enumerate(
                zip(self.dev.examples, self.dev.hits, strict=True)
            )
        ]

    def _dev_loss(self, trainee: torch.nn.Module, batch: int) -> float:
        """Return the mean loss of the dev questions' first answers, a token, all tokens used."""
        rows = sorted(self._dev_rows, key=lambda row: len(row.after) + len(row.answer))
        total, count = 0.0, 0
        for start in range(0, len(rows), batch):
            part = rows[start : start + batch]
            labels = sum(len(row.answer) for row in part)
            total += float(trainee(**collate(part), num_items_in_batch=1)["loss"])
            count += labels
        return total / count


def longest_answer(generator: Generator, example: Example) -> int:
    """Return how many ids a question's longest answer takes, its end included."""
    ends = end_ids(generator.model, generator.tokenizer)
    return max(len(generator.encoder.answer_ids(answer, ends)) for answer in example.answers)


def check_room(
    generator: Generator, prompt: MakePrompt, examples: Sequence[Example], tokens: int = 0
) -> None:
    """Refuse questions that leave no room for their longest answer and so many tokens more.

    Raises:
        DataError: naming the first.
    """
    for example in examples:
        answer = longest_answer(generator, example)
        try:
            prompt(example.query, (), room=answer + tokens)
        except DataError as error:
            virtual = f", {tokens} virtual tokens" if tokens else ""
            raise DataError(
                f"question {example.query.id!r}: its prompt without passages{virtual} and its "
                f"answer of {answer} tokens do not fit into the {generator.window} that the model "
                "reads. Leave it out, or shorten it."
            ) from error
