"""Training a bi-encoder: both of its sides, its query side alone, or an adapter of its queries."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from copy import deepcopy
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Literal, TypeAlias

import numpy as np
import torch
from numpy.typing import NDArray
from sentence_transformers import SentenceTransformer

from ..errors import SettingsError
from ..models.bi_encoder import BiEncoder
from ..types import Document, Progress, quiet
from .dev_search import DevSearch
from .even import even_passes
from .keeper import History, LoopSettings
from .lists import DrawnList, DrawnLists, ListedQuestion, check_lists_of_two
from .loop import train
from .lora import merged, with_lora
from .query_side import QueryAdapter, averaged, check_symmetric, two_towers, with_adapter
from .retriever_loss import LossSettings, RetrieverLoss, labels_of

Side: TypeAlias = Literal["both", "query", "adapter"]
Relist: TypeAlias = Callable[[BiEncoder, int], Sequence[ListedQuestion]]
"""Gives the lists of a step from the encoder as it then is."""


@dataclass
class RetrieverRun:
    """What every seed of a run shares.

    Attributes:
        encoder: the base, in fp32; it stays as it is.
        documents: by number.
        questions: with lists of documents, or what gives them anew as training goes on.
        loss: what is minimised.
        side: what is learnt: `both` sides of the encoder, which the index then has to be refreshed
            for; its `query` side, or an `adapter` of its query vectors, which search the index as
            it is.
        vectors: gives the documents' vectors by number, [numbers, size]; not needed for `both`.
        dev: evaluates while learning.
        negatives: how many of a question's other documents are drawn each time; all if None.
        together: whether questions of one document stand in one batch.
        lora: the rank of an adapter in the encoder's layers, or of the `adapter`; 0: all weights.
        dropout: the share of activations that is dropped while learning.
        kept_tokens: tokens of a batch whose activations are kept; the rest is read twice.
    """

    encoder: BiEncoder
    documents: Sequence[Document]
    questions: Sequence[ListedQuestion] | Relist
    loss: LossSettings
    side: Side = "both"
    vectors: Callable[[NDArray[np.int64]], NDArray[np.float32]] | None = None
    dev: DevSearch | None = None
    negatives: int | None = None
    together: bool = True
    lora: int = 0
    dropout: float = 0.0
    kept_tokens: int = 16_384

    def __post_init__(self) -> None:
        """Refuse what cannot be learnt.

        Raises:
            SettingsError, ModelError: naming it.
        """
        check_symmetric(self.encoder.model, self.encoder.name)
        if self.side != "both" and self.vectors is None:
            raise SettingsError("the query side is learnt on the vectors that an index holds")
        if not callable(self.questions):
            if self.loss.objective != "contrastive":
                check_lists_of_two(self.questions)
            elif not all(each.positives for each in self.questions):
                raise SettingsError("contrastive needs positives of every question")
        size = self.encoder.dimension
        if max(self.loss.dimensions, default=0) > size:
            raise SettingsError(f"dimensions {self.loss.dimensions}: the encoder has {size}")

    def learn(
        self, settings: LoopSettings, folder: Path, *, progress: Progress = quiet
    ) -> tuple[BiEncoder, History]:
        """Learn one seed, from the state in the folder if there is one.

        Returns:
            the encoder; for the query side and the adapter one with the base's documents' side.

        Raises:
            DataError, SettingsError: as `loop.train` does.
        """
        settings = replace(settings, micro_batch=settings.batch)  # a batch's negatives are its own
        torch.manual_seed(settings.seed)
        if self.side == "adapter":
            return self._learn_adapter(settings, folder, progress)
        model = deepcopy(self.encoder.model)
        if self.lora:
            model[0].model = with_lora(model[0].model, self.lora, dropout=self.dropout)
        for module in model.modules():
            if isinstance(module, torch.nn.Dropout):
                module.p = self.dropout
        _freeze_unused(model)
        learner = self._encoder(model)
        loss = RetrieverLoss(model, self.loss, cosine=model.similarity_fn_name == "cosine")
        with even_passes(model, kept=self.kept_tokens):
            history = train(
                model,
                lambda begin: self._rows(settings, begin, learner),
                lambda rows: self._collated(model, rows),
                settings,
                folder,
                evaluate=self._evaluation(learner) if self.dev else None,
                measure=self.dev.measure if self.dev else "",
                loss=loss,
                progress=progress,
            )
        if self.lora:
            model[0].model = merged(model[0].model)
        return self.finished(model), history

    def finished(self, model: SentenceTransformer) -> BiEncoder:
        """Return what a model that was learnt is searched with."""
        restored = deepcopy(self.encoder.model)
        restored.load_state_dict(model.state_dict())  # dropout and the like are the base's
        if self.side == "query":
            restored = two_towers(self.encoder.model, restored)
        return self._encoder(restored)

    def averaged(self, learnt: BiEncoder, share: float) -> BiEncoder:
        """Return the encoder between the base (0) and what was learnt (1).

        Raises:
            SettingsError: `share` lies outside 0…1.
        """
        if self.side == "both":
            model = deepcopy(self.encoder.model)
            state = averaged(self.encoder.model.state_dict(), learnt.model.state_dict(), share)
            model.load_state_dict(state)
            return self._encoder(model)
        model = deepcopy(learnt.model)
        own = self.encoder.model
        same = two_towers(own, own) if self.side == "query" else with_adapter(own, self._adapter())
        model.load_state_dict(averaged(same.state_dict(), learnt.model.state_dict(), share))
        return self._encoder(model)

    def _encoder(self, model: SentenceTransformer) -> BiEncoder:
        return BiEncoder(
            model,
            self.encoder.name,
            query_prompt=self.encoder.query_prompt,
            document_prompt=self.encoder.document_prompt,
            precision="fp32",
        )

    def _rows(self, settings: LoopSettings, begin: int, learner: BiEncoder) -> DrawnLists:
        def questions(step: int) -> Sequence[ListedQuestion]:
            if not callable(self.questions):
                return self.questions
            with judging(learner.model):
                return self.questions(learner, step)

        return DrawnLists(
            questions,
            settings.steps,
            settings.batch,
            self.negatives,
            together=self.together,
            seed=settings.seed,
            begin=begin,
        )

    def _collated(self, model: SentenceTransformer, rows: Sequence[DrawnList]) -> dict[str, Any]:
        """Return the columns that sentence-transformers' trainer takes apart."""
        ids, labels = labels_of(rows)
        batch: dict[str, Any] = {"label": labels}
        texts = [row.text for row in rows]
        asked = model.preprocess(texts, prompt=self.encoder.query_prompt or None)
        batch |= {f"queries_{name}": value for name, value in asked.items()}
        if self.side == "both":
            contents = [self.documents[number].contents for number in ids]
            read = model.preprocess(contents, prompt=self.encoder.document_prompt or None)
            return batch | {f"documents_{name}": value for name, value in read.items()}
        assert self.vectors is not None
        stored = torch.from_numpy(self.vectors(np.array(ids)))
        return batch | {"documents_sentence_embedding": stored}

    def _evaluation(self, learner: BiEncoder) -> Callable[[], float]:
        """Return what gives minus the mean of the dev questions' main measure."""

        def evaluate() -> float:
            assert self.dev is not None
            with judging(learner.model):
                values = self.dev.values(learner, stored=self.side != "both")
            return -float(np.mean(values[self.dev.measure]))

        return evaluate

    def _adapter(self) -> QueryAdapter:
        cosine = self.encoder.model.similarity_fn_name == "cosine"
        loss = RetrieverLoss(torch.nn.Identity(), self.loss, cosine=cosine)
        return QueryAdapter(self.encoder.dimension, self.lora, loss)

    def _learn_adapter(
        self, settings: LoopSettings, folder: Path, progress: Progress
    ) -> tuple[BiEncoder, History]:
        adapter = self._adapter()
        assert self.vectors is not None and not callable(self.questions)
        texts = list(dict.fromkeys(question.text for question in self.questions))
        known = dict(zip(texts, self.encoder.encode_queries(texts), strict=True))
        stored = self.vectors

        def collate(rows: Sequence[DrawnList]) -> dict[str, Any]:
            ids, labels = labels_of(rows)
            return {
                "queries": torch.from_numpy(np.stack([known[row.text] for row in rows])),
                "documents": torch.from_numpy(stored(np.array(ids))),
                "label": labels,
            }

        history = train(
            adapter,
            lambda begin: self._rows(settings, begin, self.encoder),
            collate,
            settings,
            folder,
            evaluate=self._adapter_evaluation(adapter) if self.dev else None,
            measure=self.dev.measure if self.dev else "",
            progress=progress,
        )
        return self._encoder(with_adapter(self.encoder.model, adapter)), history

    def _adapter_evaluation(self, adapter: QueryAdapter) -> Callable[[], float]:
        assert self.dev is not None
        dev = self.dev
        queries = self.encoder.encode_queries([e.query.text for e in dev.examples])

        def evaluate() -> float:
            moved = adapter.adapted(torch.from_numpy(queries)).numpy()
            if self.encoder.model.similarity_fn_name == "cosine":
                moved /= np.linalg.norm(moved, axis=1, keepdims=True)
            return -float(np.mean(dev.scored(moved)[dev.measure]))

        return evaluate


def _freeze_unused(model: SentenceTransformer) -> None:
    """Freeze the parameters that no vector depends on, such as BERT's pooler."""
    vectors = model(model.preprocess(["a"]))["sentence_embedding"]
    vectors.sum().backward()
    for parameter in model.parameters():
        if parameter.grad is None:
            parameter.requires_grad_(False)
    model.zero_grad()


@contextmanager
def judging(model: SentenceTransformer) -> Iterator[None]:
    """Let a model that is being trained encode without dropout or gradients."""
    was = model.training
    model.eval()
    try:
        with torch.no_grad():
            yield
    finally:
        model.train(was)
