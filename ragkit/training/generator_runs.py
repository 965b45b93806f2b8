"""Learning to answer from passages: an adapter (LoRA) of a generator, or all its weights."""

from __future__ import annotations

import shutil
from collections.abc import Mapping
from copy import deepcopy
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from random import Random
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from torch.utils.data import Dataset

from ..errors import DataError, SettingsError
from ..models.generator import Generator
from ..models.loading import end_ids
from ..models.precision import without_bars
from ..models.taught import Taught
from ..styles import PromptStyle
from ..types import Progress, Query, quiet
from .draws import epoch_order
from .keeper import History, LoopSettings, processes
from .loop import train
from .lora import with_lora
from .mixes import ContextDraw, ContextDraws, Mix
from .packing import Loss, Role, SftRow, sft_row
from .query_side import averaged
from .remedies import RemediedTrainee, Remedies, collated
from .token_loss import answer_loss
from .token_runs import MakePrompt, Retrieved, check_room, longest_answer

_LONGEST_TEXT = 512  # tokens of a general text in a row
_CITATIONS = 8  # tokens that an answer's citations may take


@dataclass
class GeneratorRun:
    """What every seed of a run shares.

    Attributes:
        generator: the base. It is as it was when `learn` returns.
        style, prompt: the wording, and what builds a prompt in it, in training as in use.
        train, dev: what is learnt from, and what is evaluated while learning.
        mix: the kinds of contexts, in both.
        passages: the least and the most that a prompt shows.
        rank: the adapter's; 0 trains all weights.
        loss: of answers' tokens.
        contexts: more keywords of `ContextDraws`: citations, all_gold, abstain_retrieved.
        remedies: against forgetting.
    """

    generator: Generator
    style: PromptStyle
    prompt: MakePrompt
    train: Retrieved
    dev: Retrieved
    mix: Mix
    passages: tuple[int, int]
    rank: int = 8
    loss: Loss = answer_loss
    contexts: Mapping[str, Any] = field(default_factory=dict)
    remedies: Remedies = field(default_factory=Remedies)

    def check(self) -> None:
        """Refuse what could not be learnt, before there is any work.

        Raises:
            DataError: as `ContextDraws` and `check_room` do.
            SettingsError: the generator is an adapter itself, or has no name by which an adapter
                could find it.
        """
        self._check_base()
        for of in (self.train, self.dev):
            self._draws(of, 1, 1, self.passages, 0)
            check_room(self.generator, self.prompt, of.examples, _CITATIONS)

    def _check_base(self) -> None:
        if getattr(self.generator.model, "_hf_peft_config_loaded", False):
            raise SettingsError(
                f"{self.generator.name!r} is an adapter already: what is learnt on it could not be "
                "told apart. Start from its base, or merge it first (peft's merge_and_unload)."
            )
        if self.rank and not self.generator.name:
            raise SettingsError("the generator has no name, by which its adapter could find it")

    def learn(
        self, settings: LoopSettings, folder: Path, *, progress: Progress = quiet
    ) -> tuple[Path, History]:
        """Learn one seed, from the state in the folder if there is one.

        Returns:
            the folder of what was learnt, which names a generator: peft's format, or
            transformers'; and the history.

        Raises:
            DataError, SettingsError: as `loop.train`, `ContextDraws`, `sft_row` and `with_lora` do.
        """
        self._check_base()
        self.draws(settings)  # refuses what cannot be drawn, before the model is touched
        base = self.generator.model
        taught = Taught.of(self.generator, self.style)  # hashes the base, which then gets adapted
        torch.manual_seed(settings.seed)  # of the adapter's first weights
        flags = [(parameter, parameter.requires_grad) for parameter in base.parameters()]
        model = with_lora(base, self.rank) if self.rank else deepcopy(base).float()
        try:
            if not self.rank:
                model.requires_grad_(True)
            trainee = RemediedTrainee(model, self.loss, self.remedies, None if self.rank else base)
            history = train(
                trainee,
                lambda begin: _Rows(self, settings, begin),
                collated,
                settings,
                folder,
                evaluate=lambda: self._dev_loss(trainee, settings.micro_batch),
                progress=progress,
            )
            learnt = folder / "model"
            together = processes(base.device)
            if together.is_main_process:
                self._save(model, learnt)
                taught.save(learnt)
            together.wait_for_everyone()
        finally:
            if self.rank:
                self.generator.model = model.unload().eval()
            for parameter, flag in flags:
                parameter.requires_grad_(flag)
        return learnt, history

    def _save(self, model: Any, folder: Path) -> None:
        folder.mkdir(parents=True, exist_ok=True)
        with without_bars():
            if self.rank:
                name = self.generator.name
                local = Path(name).expanduser()  # looked for where peft is called: made absolute
                if local.exists():
                    name = str(local.resolve())
                model.peft_config["default"].base_model_name_or_path = name
                model.save_pretrained(folder, save_embedding_layers=False)
            else:
                model.to(self.generator.model.dtype).save_pretrained(folder)
                self.generator.tokenizer.save_pretrained(folder)

    def averaged(self, learnt: Path, share: float, folder: Path) -> None:
        """Write the average of the base (0) and what was learnt (1) into a new folder.

        What an adapter adds to the base's weights is linear in its second matrices.
        """
        shutil.copytree(learnt, folder)
        if self.rank:
            path = folder / "adapter_model.safetensors"
            tensors = load_file(path)
            save_file({n: t * share if ".lora_B." in n else t for n, t in tensors.items()}, path)
            return
        tuned = Generator.load(str(learnt), device="cpu", precision="fp32").model
        base = {name: of.cpu().float() for name, of in self.generator.model.state_dict().items()}
        tuned.load_state_dict(averaged(base, tuned.state_dict(), share))
        with without_bars():
            tuned.to(self.generator.model.dtype).save_pretrained(folder)

    def draws(self, settings: LoopSettings) -> ContextDraws:
        """Return the questions and contexts of a run, step by step.

        Raises:
            SettingsError, DataError: as `ContextDraws` does, or no row of a step is a question.
        """
        asked = settings.batch - self.remedies.replay - self.remedies.keep
        if asked < 1:
            raise SettingsError(
                f"{self.remedies.replay} general texts and {self.remedies.keep} questions without "
                f"passages leave no room for others in a batch of {settings.batch}"
            )
        return self._draws(self.train, settings.steps, asked, self.passages, settings.seed)

    def _draws(
        self, of: Retrieved, steps: int, batch: int, passages: tuple[int, int], seed: int
    ) -> ContextDraws:
        return ContextDraws(
            of.examples,
            of.hits,
            self.mix,
            steps=steps,
            batch=batch,
            passages=passages,
            judged=of.judged,
            seed=seed,
            **self.contexts,
        )

    def row(self, draw: ContextDraw, of: Retrieved) -> SftRow:
        """Return the row of a draw."""
        example = of.examples[draw.example]
        query, room = example.query, longest_answer(self.generator, example) + _CITATIONS
        prompt = self.prompt(query, draw.hits, room=room)
        return sft_row(self.generator, prompt, draw.target(prompt), f"question {query.id!r}")

    def remedy(self, role: Role, place: int, seed: int) -> SftRow:
        """Return a row against forgetting: all its places are scored but the first."""
        encoder = self.generator.encoder
        if role == "replay":
            epoch, rank = divmod(place, len(self._texts))
            ids = self._texts[epoch_order(seed, epoch, len(self._texts))[rank]]
        else:
            own = Random(f"{seed} keep {place}")
            example = self.train.examples[own.randrange(len(self.train.examples))]
            ids = list(
                encoder.encode(self.prompt(Query(example.query.id, example.query.text), [])).ids
            )
            ends = end_ids(self.generator.model, self.generator.tokenizer)
            ids += encoder.answer_ids(own.choice(example.answers), ends)
        return SftRow(tuple(ids[:1]), tuple(ids[1:]), role)

    @cached_property
    def _texts(self) -> list[list[int]]:
        """The ids of the general texts, but for those in which there is nothing to predict."""
        encoder, longest = self.generator.encoder, min(_LONGEST_TEXT, self.generator.window)
        every = (
            [*encoder.start_ids(), *encoder.data_ids(text)][:longest]
            for text in self.remedies.texts
            if text.strip()
        )
        found = [ids for ids in every if len(ids) > 1]
        if not found:
            raise DataError("none of the general texts has two tokens, one to predict another")
        return found

    @cached_property
    def _dev_rows(self) -> list[SftRow]:
        most = self.passages[1]
        draws = self._draws(self.dev, 1, len(self.dev.examples), (most, most), 0)
        return [self.row(draw, self.dev) for draw in draws]

    def _dev_loss(self, trainee: RemediedTrainee, batch: int) -> float:
        """Return the mean cross-entropy of the dev questions' targets, a token."""
        rows = self._dev_rows
        learning = trainee.training
        trainee.eval()
        total = sum(
            answer_loss(logits, labels, 1).item()
            for start in range(0, len(rows), batch)
            for logits, labels in trainee.logits(rows[start : start + batch])
        )
        trainee.train(learning)
        return total / sum(len(row.answer) for row in rows)


class _Rows(Dataset[SftRow]):
    """The rows of a run from a place on: in a step questions, then what is against forgetting."""

    def __init__(self, run: GeneratorRun, settings: LoopSettings, start: int = 0) -> None:
        self._run = run
        self._draws = run.draws(settings)
        self._batch, self._seed = settings.batch, settings.seed
        self._size, self._start = settings.steps * settings.batch, start

    def __len__(self) -> int:
        return self._size - self._start

    def __getitem__(self, place: int) -> SftRow:
        step, number = divmod(self._start + place, self._batch)
        replay, keep = self._run.remedies.replay, self._run.remedies.keep
        asked = self._batch - replay - keep
        if number < asked:
            return self._run.row(self._draws[step * asked + number], self._run.train)
        number -= asked
        if number < replay:
            return self._run.remedy("replay", step * replay + number, self._seed)
        return self._run.remedy("keep", step * keep + number - replay, self._seed)
