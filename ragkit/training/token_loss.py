"""The loss of virtual tokens: cross-entropy on the answer and its end, and on nothing else."""

from __future__ import annotations

import sys
from collections.abc import Callable, Hashable, Sequence
from dataclasses import dataclass
from random import Random
from typing import Any, Generic, Protocol, TypeVar

import torch
from torch.utils.data import Dataset
from transformers.modeling_layers import GradientCheckpointingLayer

from ..models.precision import batches, pad
from ..models.prefix_cache import PrefixCache
from ..models.prompt_ids import PromptIds
from ..models.splice import spliced, without_virtual
from .draws import Draw, Draws

IGNORED = -100  # the label of a place that is not scored
_PASS = {"cpu": 128}  # padded tokens in a pass; elsewhere the micro-batch alone bounds memory


@dataclass(frozen=True, slots=True)
class TokenRow:
    """A training row: a prompt, how many virtual tokens stand in it, and its answer.

    Attributes:
        key: what the keys and values of its prefix are kept under.
        before: ids before the virtual tokens: their gradients are never needed.
        tokens: how many virtual tokens there are.
        after: ids of the rest of the prompt.
        answer: ids of the answer, its end included.
    """

    key: Hashable
    before: tuple[int, ...]
    tokens: int
    after: tuple[int, ...]
    answer: tuple[int, ...]

    @property
    def learnt_through(self) -> int:
        """How many places gradients flow through: the virtual tokens and what follows them."""
        return self.tokens + len(self.after) + len(self.answer) - 1


def row_of(
    key: Hashable, prompt: PromptIds, tokens: int, answer: Sequence[int], placement: str
) -> TokenRow:
    """Return the training row of a prompt and its answer."""
    before, after = prompt.around(placement)
    return TokenRow(key, before, tokens, after, tuple(answer))


def answer_loss(
    logits: torch.Tensor, labels: torch.Tensor, count: torch.Tensor | int | None
) -> torch.Tensor:
    """Return the cross-entropy summed over labels and divided by `count`, or by their number.

    Args:
        logits: of shape [rows, places, vocabulary].
        labels: int64 of shape [rows, places]; those that are `IGNORED` count for nothing.
        count: the labels of a whole step, over all processes.
    """
    labels = labels.to(logits.device)
    losses = torch.nn.functional.cross_entropy(
        logits.float().flatten(0, 1), labels.flatten(), ignore_index=IGNORED, reduction="sum"
    )
    divisor = labels.ne(IGNORED).sum() if count is None else count
    return losses / torch.as_tensor(divisor, device=losses.device)


class _Answering(Protocol):
    @property
    def answer(self) -> tuple[int, ...]: ...


_Row = TypeVar("_Row", bound=_Answering)


class Rows(Dataset[_Row]):
    """The rows of a run's draws, made when they are asked for.

    Args:
        draws: what is drawn.
        make: gives the row of a draw; it is told the places of the passages in their order.
        found: how many passages each example has.
        start: the first draw that is still wanted.
    """

    def __init__(
        self,
        draws: Draws,
        make: Callable[[Draw, Sequence[int]], _Row],
        found: Sequence[int],
        start: int = 0,
    ) -> None:
        self._draws = draws
        self._make = make
        self._found = found
        self._start = start

    def __len__(self) -> int:
        return len(self._draws) - self._start

    def __getitem__(self, place: int) -> _Row:
        draw = self._draws[self._start + place]
        passages = list(range(min(draw.passages, self._found[draw.example])))
        if draw.shuffle is not None:
            Random(draw.shuffle).shuffle(passages)
        return self._make(draw, passages)


@dataclass(frozen=True, slots=True)
class RowBatch(Generic[_Row]):
    """Rows that go through the trainer as they are."""

    rows: tuple[_Row, ...]


def collate(rows: Sequence[_Row]) -> dict[str, Any]:
    """Return what a trainee's `forward` takes, for rows that each have an `answer`.

    The labels, of shape [rows, longest answer], are the answers' ids, aligned at their ends.
    """
    longest = max(len(row.answer) for row in rows)
    labels = torch.tensor(
        [[IGNORED] * (longest - len(row.answer)) + list(row.answer) for row in rows]
    )
    return {"batch": RowBatch(tuple(rows)), "labels": labels}


class TokenTrainee(torch.nn.Module):
    """A frozen model with the virtual tokens that are learnt: its only parameter.

    What stands before them is read without gradients and its keys and values are kept; gradients
    flow through what follows; logits are made where there are labels. The gradients are those of
    the whole, since nothing before the tokens depends on them.

    Args:
        model: a causal model; it is frozen.
        start: the embeddings to start from, float32 of shape [count, size].
        prefixes: reads what stands before the tokens; None reads all of a row with gradients, and
            again on the way back (gradient checkpointing): less memory where little stands before.
    """

    accepts_loss_kwargs = True

    def __init__(self, model: Any, start: torch.Tensor, prefixes: PrefixCache | None) -> None:
        super().__init__()
        model.eval()
        if prefixes is None:
            model.activation_checkpointing_enable({"use_reentrant": False})
            for layer in model.modules():
                if isinstance(layer, GradientCheckpointingLayer):
                    layer.training = True  # this alone: what drops out in training stays still
        for parameter in model.parameters():
            parameter.requires_grad_(False)
        self.tokens = torch.nn.Parameter(start.detach().float().clone().to(model.device))
        # Not as a submodule: what is trained, moved, wrapped and saved is the tokens alone.
        self.frozen = (model, prefixes)

    def forward(
        self,
        batch: RowBatch[TokenRow],
        labels: torch.Tensor,
        num_items_in_batch: torch.Tensor | int | None = None,
    ) -> dict[str, torch.Tensor]:
        """Return the loss: the mean over `num_items_in_batch` labels, or over those here if None.

        Args:
            batch: the rows.
            labels: int64 of shape [rows, longest answer], `IGNORED` before shorter answers.
            num_items_in_batch: the labels of a whole step, over all processes.
        """
        count = labels.ne(IGNORED).sum() if num_items_in_batch is None else num_items_in_batch
        model, prefixes = self.frozen
        sizes = [row.learnt_through + (0 if prefixes else len(row.before)) for row in batch.rows]
        losses = []
        # Rows of like length in a pass: on a CPU, what is saved in padding is saved in time.
        for places in batches(sizes, _PASS.get(model.device.type, sys.maxsize)):
            rows = [batch.rows[place] for place in places]
            longest = max(len(row.answer) for row in rows)
            logits = self._logits(rows, longest)
            losses.append(answer_loss(logits, labels[places, -longest:], count))
        return {"loss": torch.stack(losses).sum()}

    def _logits(self, rows: Sequence[TokenRow], places: int) -> torch.Tensor:
        """Return the last `places` logits of rows: [rows, places, vocabulary]."""
        model, prefixes = self.frozen
        device = model.device
        first = int(model.get_input_embeddings().weight.shape[0])
        suffixes = [
            [*range(first, first + row.tokens), *row.after, *row.answer[:-1]] for row in rows
        ]
        befores = [list(row.before) for row in rows]
        width = max(map(len, suffixes)) if prefixes else None
        for place, suffix in enumerate(suffixes):
            # Rows are filled up with what stands before, read again: padding within a row would
            # be counted by models that attend through sliding windows.
            start = 0 if width is None else max(0, len(befores[place]) - width + len(suffix))
            suffixes[place] = befores[place][start:] + suffix
            befores[place] = befores[place][:start]
        ids, mask = pad(suffixes, 0, left=True, device=device)
        cache = None
        if prefixes is not None:
            cache = prefixes.rows(
                [row.key for row in rows], [row.before for row in rows], list(map(len, befores))
            )
        if cache is not None:
            _, before = pad(befores, 0, left=True, device=device)
            mask = torch.cat([before, mask], dim=1)
        with spliced(model, self.tokens, first=ids):
            logits: torch.Tensor = model(
                input_ids=without_virtual(model, ids, 0),
                attention_mask=mask,
                position_ids=(mask.cumsum(1) - 1).clamp(min=0)[:, -ids.shape[1] :],
                past_key_values=cache,
                use_cache=cache is not None,
                logits_to_keep=places,
            ).logits
        return logits
