"""sentence-transformers' trainers, given rows in the order in which they are to be read."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from datasets import Dataset
from sentence_transformers import (
    CrossEncoder,
    CrossEncoderTrainer,
    CrossEncoderTrainingArguments,
    SentenceTransformerTrainer,
    SentenceTransformerTrainingArguments,
)
from sentence_transformers.base.data_collator import BaseDataCollator
from torch.utils.data import BatchSampler, SequentialSampler
from transformers import Trainer

from .loop import one_device


class _Rows(BaseDataCollator):
    """Collates rows by their numbers, the one column that the trainer sees."""

    def __init__(self, rows: Any, collate: Callable[[Sequence[Any]], dict[str, Any]]) -> None:
        super().__init__(preprocess_fn=collate)
        self._rows = rows

    def __call__(self, features: list[dict[str, Any]]) -> dict[str, Any]:
        batch: dict[str, Any] = self.preprocess_fn([self._rows[each["row"]] for each in features])
        return batch


class _WithoutCard:
    """Leaves the model card to the program, which knows what was measured."""

    def add_model_card_callback(self, default_args_dict: dict[str, Any]) -> None:
        """Add none: it would tokenise samples of columns that are mere numbers."""


class _Encoders(_WithoutCard, SentenceTransformerTrainer):
    pass


class _CrossEncoders(_WithoutCard, CrossEncoderTrainer):
    pass


def sentence_trainer(
    module: Any,
    loss: torch.nn.Module,
    rows: Any,
    collate: Callable[[Sequence[Any]], dict[str, Any]],
    arguments: dict[str, Any],
    options: dict[str, Any],
) -> Trainer:
    """Return the trainer of a SentenceTransformer or a CrossEncoder; what it is given is `train`'s.

    `collate` gives what sentence-transformers' collators do: columns of features, and a `label`.
    """
    engine: Any = _Encoders
    kind: Any = SentenceTransformerTrainingArguments
    if isinstance(module, CrossEncoder):
        engine, kind = _CrossEncoders, CrossEncoderTrainingArguments

    def in_order(dataset: Any, batch_size: int, drop_last: bool, **_: Any) -> BatchSampler:
        return BatchSampler(SequentialSampler(dataset), batch_size, drop_last)

    trainer: Trainer = engine(
        model=module,
        args=one_device(kind(**arguments, batch_sampler=in_order)),
        train_dataset=Dataset.from_dict({"row": list(range(len(rows)))}),
        data_collator=_Rows(rows, collate),
        loss=loss,
        **options,
    )
    return trainer
