"""Learning virtual tokens from questions with their passages, and measuring what they changed."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any, Literal, TypeAlias

import torch

from ..errors import DataError, SettingsError
from ..models.generator import Generator
from ..models.loading import end_ids
from ..models.prefix_cache import PrefixCache
from ..models.virtual_tokens import VirtualTokens, start_rows, template_hash
from ..prompts import TEMPLATE_TOKENS, Prompt
from ..styles import Placement, PromptStyle
from ..types import Example, Hit, Progress, Qrels, Query, quiet
from .draws import Draw, Draws
from .keeper import History, LoopSettings
from .loop import train
from .packing import turning_length
from .prompt_tuning import PromptTuningTrainee
from .token_loss import Rows, TokenRow, TokenTrainee, collate, row_of

MakePrompt: TypeAlias = Callable[[Query, Sequence[Hit]], Prompt]
_DEV = "dev"


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
        ids = encoder.encode(self.prompt(example.query, hits))
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


def longest_answer(generator: Generator, examples: Sequence[Example], tokens: int) -> int:
    """Return how many ids the longest answer takes, its end included.

    Raises:
        DataError: it leaves no room for a prompt in the generator's window.
    """
    ends = end_ids(generator.model, generator.tokenizer)
    sizes = [
        (max(len(generator.encoder.answer_ids(answer, ends)) for answer in e.answers), e.query.id)
        for e in examples
    ]
    room = generator.window - 2 * TEMPLATE_TOKENS
    if tokens > room:
        raise DataError(
            f"{tokens} virtual tokens leave no room for a prompt in the {generator.window} tokens "
            f"that the model reads: at most {room} do"
        )
    longest, question = max(sizes)
    if longest + tokens > room:
        raise DataError(
            f"question {question!r} has an answer of {longest} tokens; "
            + (f"with {tokens} virtual tokens " if tokens else "")
            + f"it leaves no room for a prompt in the {generator.window} that the model reads. "
            "Leave the question out, or shorten its answer."
        )
    return longest
