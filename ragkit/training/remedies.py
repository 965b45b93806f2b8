"""What keeps a generator from forgetting while it learns: general texts, and its base's words."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch

from ..errors import SettingsError
from .generator_loss import kl_to_base
from .packing import Loss, SftRow, SftTrainee
from .token_loss import IGNORED, RowBatch, answer_loss, collate


@dataclass(frozen=True)
class Remedies:
    """What keeps a generator from forgetting while it learns.

    Attributes:
        texts: general texts that it sees again.
        replay: rows of a step that are such texts.
        keep: rows of a step that are questions without passages, on which the model is to say what
            the base says: KL(base ‖ model) at every place.
        weight: of the mean loss of either kind of row, a place, beside that of answers.
    """

    texts: Sequence[str] = ()
    replay: int = 0
    keep: int = 0
    weight: float = 1.0

    def __post_init__(self) -> None:
        """Refuse what cannot be done.

        Raises:
            SettingsError: telling what.
        """
        if min(self.replay, self.keep) < 0 or not self.weight > 0:
            raise SettingsError("rows against forgetting must be 0 or more, their weight above 0")
        if self.replay and not self.texts:
            raise SettingsError("to see general texts again, there must be some")


def collated(rows: Sequence[SftRow]) -> dict[str, Any]:
    """Return what the trainee's `forward` takes; rows against forgetting have no labels."""
    batch = collate(rows)
    for number, row in enumerate(rows):
        if row.role != "answer":
            batch["labels"][number] = IGNORED
    return batch


class RemediedTrainee(SftTrainee):
    """Learns answers, and what is against forgetting beside them.

    The loss is the mean over a step's labels, plus `weight` times the mean over each kind of other
    rows of their means over places.
    """

    def __init__(self, model: Any, loss: Loss, remedies: Remedies, base: Any | None) -> None:
        super().__init__(model, loss=loss)
        self._remedies = remedies
        self._frozen = (base,)  # not as a submodule: it is not trained

    def forward(
        self,
        batch: RowBatch[SftRow],
        labels: torch.Tensor,
        num_items_in_batch: torch.Tensor | int | None = None,
    ) -> dict[str, torch.Tensor]:
        """Return the loss, as `SftTrainee.forward` does."""
        answers = tuple(row for row in batch.rows if row.role == "answer")
        losses = []
        if answers:
            losses.append(super().forward(RowBatch(answers), labels, num_items_in_batch)["loss"])
        for role, count in (("replay", self._remedies.replay), ("keep", self._remedies.keep)):
            rows = [row for row in batch.rows if row.role == role]
            losses += [
                self._remedies.weight / count * self._beside(part) for part in self.passes(rows)
            ]
        return {"loss": torch.stack(losses).sum()}

    def _beside(self, rows: Sequence[SftRow]) -> torch.Tensor:
        """Return the sum over rows of their mean losses; rows are of one role."""
        logits = self.read(self.model, rows)
        sizes = [len(row.answer) for row in rows]
        parts = torch.split(logits, sizes, dim=1)
        if rows[0].role == "replay":
            losses = [
                answer_loss(part, torch.tensor([row.answer]), len(row.answer))
                for part, row in zip(parts, rows, strict=True)
            ]
        else:
            with torch.no_grad(), self._as_base() as base:
                said = torch.split(self.read(base, rows), sizes, dim=1)
            every = [torch.ones(part.shape[:2], dtype=torch.bool) for part in parts]
            losses = [
                kl_to_base(part, of_base, mask, None)
                for part, of_base, mask in zip(parts, said, every, strict=True)
            ]
        return torch.stack(losses).sum()

    @contextmanager
    def _as_base(self) -> Iterator[Any]:
        """Yield the model as it was before it learnt."""
        (base,) = self._frozen
        if base is not None:
            yield base
            return
        learning = self.model.training
        self.model.eval()  # what drops out in training is there in the base
        try:
            with self.model.disable_adapter():
                yield self.model
        finally:
            self.model.train(learning)
