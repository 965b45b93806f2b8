"""Training a cross-encoder: from labels, or from the scores of a teacher or a generator."""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import Any, Literal, TypeAlias

import numpy as np
import sentence_transformers
import torch
from safetensors import SafetensorError
from sentence_transformers.cross_encoder.losses import (
    BinaryCrossEntropyLoss,
    LambdaLoss,
    ListNetLoss,
)
from transformers import AutoModelForSequenceClassification

from ..errors import ModelError, SettingsError
from ..fusion import interpolated
from ..models.cross_encoder import CrossEncoder
from ..models.names import resolve
from ..models.precision import without_bars
from ..types import Document, Hit, Progress, Qrels, Query, Run, quiet
from .dev_search import Values, measured, parents_of
from .even import even_passes
from .keeper import History, LoopSettings
from .lists import DrawnList, DrawnLists, ListedQuestion, check_lists_of_two
from .loop import train
from .query_side import averaged

RerankerObjective: TypeAlias = Literal["bce", "listwise", "distil"]
"""`bce`: each document is relevant or not. `listwise`: LambdaLoss, the order of a list by nDCG
(Wang et al. 2018). `distil`: KL of softmax(scores) of a list from the teacher's (ListNet; Cao et
al. 2007)."""


@dataclass(frozen=True, slots=True)
class Ranked:
    """Dev questions with their hits, which are reranked, and their judgements."""

    queries: Sequence[Query]
    hits: Sequence[Sequence[Hit]]
    qrels: Qrels

    def scores(self, model: CrossEncoder, progress: Progress = quiet) -> list[list[float]]:
        """Return a model's scores of each question's hits."""
        pairs = [
            (query.text, hit.document.contents)
            for query, hits in zip(self.queries, self.hits, strict=True)
            for hit in hits
        ]
        progress("rerank", 0, len(pairs))
        values = iter(model.score(pairs).tolist())
        progress("rerank", len(pairs), len(pairs))
        return [[next(values) for _ in hits] for hits in self.hits]

    def values(
        self, scores: Sequence[Sequence[float]] | None = None, weight: float = 1.0
    ) -> Values:
        """Score the hits' order, or that by a model's scores: measure -> one value a question.

        A retriever's part of the relevant documents that lie deeper than the hits is lost to any
        reranker: recall of the hits bounds what it can reach.

        Args:
            scores: one a hit of each question.
            weight: theirs in the sum with those of the retrieval (`fusion.interpolated`).
        """
        found: list[Sequence[float]] = [[hit.score for hit in hits] for hits in self.hits]
        if scores is not None:
            pairs = zip(found, scores, strict=True)
            found = [interpolated(own, given, weight) for own, given in pairs]
        run: Run = {}
        for query, hits, own in zip(self.queries, self.hits, found, strict=True):
            order = sorted(zip(hits, own, strict=True), key=lambda pair: -pair[1])
            run[query.id] = {hit.document.id: score for hit, score in order}
        parents = parents_of(hit.document for hits in self.hits for hit in hits)
        return measured(run, parents, self.qrels, (1, 5))


@dataclass
class RerankerRun:
    """What every seed of a run shares.

    Attributes:
        base: a cross-encoder or a sentence encoder, by folder or name; a sentence encoder gets a
            new output, drawn by the seed.
        documents: by number.
        questions: with lists of documents, and a teacher's scores for `distil`.
        objective: what is minimised.
        teacher_temperature: of the teacher's distribution.
        negatives: how many of a question's other documents are drawn each time; all if None.
        dev: evaluates while learning.
        max_length: tokens of a pair that are read; the base's own limit if None.
        device: where it runs.
        kept_tokens: tokens of a batch whose activations are kept; the rest is read twice.
    """

    base: str
    documents: Sequence[Document]
    questions: Sequence[ListedQuestion]
    objective: RerankerObjective = "bce"
    teacher_temperature: float = 1.0
    negatives: int | None = 3
    dev: Ranked | None = None
    max_length: int | None = None
    device: str = "cpu"
    dropout: float = 0.0
    kept_tokens: int = 16_384

    def __post_init__(self) -> None:
        """Refuse what cannot be learnt.

        Raises:
            SettingsError: naming it.
        """
        if self.objective == "distil" and not all(each.scores for each in self.questions):
            raise SettingsError("a teacher's scores of all documents are needed to distil them")
        if self.objective != "distil" and not all(each.positives for each in self.questions):
            raise SettingsError(f"{self.objective} needs positives of every question")
        check_lists_of_two(self.questions)

    def learn(
        self, settings: LoopSettings, folder: Path, *, progress: Progress = quiet
    ) -> tuple[CrossEncoder, History]:
        """Learn one seed, from the state in the folder if there is one.

        Raises:
            DataError, SettingsError: as `loop.train` does.
            ModelError: the base cannot be loaded, or gives several scores.
        """
        settings = replace(settings, micro_batch=settings.batch)
        torch.manual_seed(settings.seed)
        learner = CrossEncoder(self.loaded(), self.base, precision="fp32")
        model = learner.model
        for module in model.modules():
            if isinstance(module, torch.nn.Dropout):
                module.p = self.dropout
        with even_passes(model, kept=self.kept_tokens):
            history = train(
                model,
                lambda begin: DrawnLists(
                    lambda step: self.questions,
                    settings.steps,
                    settings.batch,
                    self.negatives,
                    repeat=True,
                    seed=settings.seed,
                    begin=begin,
                ),
                self.collated,
                settings,
                folder,
                evaluate=self._evaluation(learner) if self.dev else None,
                measure="nDCG@10",
                loss=self._loss(model),
                progress=progress,
            )
        return learner, history

    def averaged(self, learnt: CrossEncoder, share: float) -> CrossEncoder:
        """Return the cross-encoder between the base (0) and what was learnt (1).

        Weights that the base lacks, as an encoder has no output of one score, are the learnt ones.

        Raises:
            SettingsError: `share` lies outside 0…1.
        """
        model = self.loaded()
        base = {n: tensor for n, tensor in model.state_dict().items() if n not in self._drawn}
        model.load_state_dict(averaged(base, learnt.model.state_dict(), share))
        return CrossEncoder(model, self.base, precision="fp32")

    @cached_property
    def _drawn(self) -> set[str]:
        """The names of the weights that the base lacks, and that are drawn when it is loaded."""
        try:
            with without_bars(), _quietly():
                _, told = AutoModelForSequenceClassification.from_pretrained(
                    resolve(self.base), num_labels=1, output_loading_info=True
                )
        except ValueError:  # no classifier: its modules, the output among them, lie in its folder
            return set()
        return {f"0.model.{name}" for name in told["missing_keys"]}

    def loaded(self) -> sentence_transformers.CrossEncoder:
        """Load the base with one output.

        Raises:
            ModelError: it cannot be found or loaded.
        """
        try:
            with without_bars(), _quietly():
                model: Any = sentence_transformers.CrossEncoder(
                    resolve(self.base), num_labels=1, device=self.device
                )
        except (OSError, ValueError, SafetensorError, RuntimeError) as error:
            raise ModelError(f"cross-encoder {self.base!r} cannot be loaded: {error}") from error
        if self.max_length is not None:
            model.max_seq_length = self.max_length
        given: sentence_transformers.CrossEncoder = model
        return given

    def collated(self, rows: Sequence[DrawnList]) -> dict[str, Any]:
        """Return the columns that sentence-transformers' losses read: texts, and labels."""
        if self.objective == "bce":
            pairs = [(row, number) for row in rows for number in row.documents]
            return {
                "query": [row.text for row, _ in pairs],
                "document": [self.documents[number].contents for _, number in pairs],
                "label": torch.tensor([float(number in row.positives) for row, number in pairs]),
            }
        return {
            "query": [row.text for row in rows],
            "documents": [
                [self.documents[number].contents for number in row.documents] for row in rows
            ],
            "label": [self._targets(row) for row in rows],
        }

    def _targets(self, row: DrawnList) -> torch.Tensor:
        if self.objective == "distil":
            return torch.tensor(row.scores) / self.teacher_temperature
        return torch.tensor([float(number in row.positives) for number in row.documents])

    def _loss(self, model: Any) -> torch.nn.Module:
        if self.objective == "bce":
            return BinaryCrossEntropyLoss(model)
        if self.objective == "listwise":
            return LambdaLoss(model)
        return ListNetLoss(model)

    def _evaluation(self, learner: CrossEncoder) -> Callable[[], float]:
        """Return what gives minus the mean nDCG@10 of the dev questions, reranked."""

        def evaluate() -> float:
            assert self.dev is not None
            was = learner.model.training
            learner.model.eval()
            try:
                values = self.dev.values(self.dev.scores(learner))
            finally:
                learner.model.train(was)
            return -float(np.mean(values["nDCG@10"]))

        return evaluate


@contextmanager
def _quietly() -> Iterator[None]:
    """Keep the libraries from warning that a new output has no weights yet: it is to be learnt."""
    names = ("transformers", "sentence_transformers")
    loggers = [logging.getLogger(name) for name in names]
    levels = [logger.level for logger in loggers]
    for logger in loggers:
        logger.setLevel(logging.ERROR)
    try:
        yield
    finally:
        for logger, level in zip(loggers, levels, strict=True):
            logger.setLevel(level)
