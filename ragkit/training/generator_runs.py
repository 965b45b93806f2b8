"""Learning an adapter (LoRA) of a generator from questions with their passages."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

import torch

from ..models.generator import Generator
from ..models.precision import without_bars
from ..types import Progress, quiet
from .draws import Draw, Draws
from .keeper import History, LoopSettings
from .loop import train
from .lora import with_lora
from .packing import SftRow, SftTrainee, sft_row
from .token_loss import Rows, collate
from .token_runs import MakePrompt, Retrieved


@dataclass
class GeneratorRun:
    """What every seed of a run shares.

    Attributes:
        generator: the base. It is as it was when `learn` returns.
        prompt: builds a prompt, in training as in use.
        train, dev: what is learnt from, and what is evaluated while learning.
        passages: the least and the most that a prompt shows; in evaluation always the most.
        rank: the adapter's.
    """

    generator: Generator
    prompt: MakePrompt
    train: Retrieved
    dev: Retrieved
    passages: tuple[int, int]
    rank: int = 8

    def learn(self, settings: LoopSettings, folder: Path, *, progress: Progress = quiet) -> History:
        """Learn the adapter of one seed, and write it into the folder: peft's format.

        The folder names a generator from then on. A state of this run that is there is gone on
        from.

        Raises:
            DataError, SettingsError: as `loop.train`, `Draws`, `sft_row` and `with_lora` do.
        """
        draws = Draws(
            tuple(len(example.answers) for example in self.train.examples),
            settings.steps,
            settings.batch,
            self.passages,
            0,
            seed=settings.seed,
        )
        torch.manual_seed(settings.seed)  # of the adapter's first weights
        model = with_lora(self.generator.model, self.rank)
        model.peft_config["default"].base_model_name_or_path = self.generator.name
        trainee = SftTrainee(model)
        found = [len(hits) for hits in self.train.hits]
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
            with without_bars():
                model.save_pretrained(folder, save_embedding_layers=False)
        finally:
            self.generator.model = model.unload().eval()
        return history

    def _row(self, draw: Draw, passages: Sequence[int]) -> SftRow:
        example, hits = self.train.examples[draw.example], self.train.hits[draw.example]
        prompt = self.prompt(example.query, [hits[place] for place in passages])
        where = f"question {example.query.id!r}"
        return sft_row(self.generator, prompt, example.answers[draw.answer], where)

    @cached_property
    def _dev_rows(self) -> list[SftRow]:
        rows = []
        for example, hits in zip(self.dev.examples, self.dev.hits, strict=True):
            prompt = self.prompt(example.query, hits[: self.passages[1]])
            where = f"question {example.query.id!r}"
            rows.append(sft_row(self.generator, prompt, example.answers[0], where))
        return rows

    def _dev_loss(self, trainee: SftTrainee, batch: int) -> float:
        """Return the mean loss of the dev questions' first answers, a token."""
        rows = self._dev_rows
        learning = trainee.training
        trainee.eval()
        total = sum(
            float(trainee(**collate(rows[start : start + batch]), num_items_in_batch=1)["loss"])
            for start in range(0, len(rows), batch)
        )
        trainee.train(learning)
        return total / sum(len(row.answer) for row in rows)
