"""Rows that a generator learns from, packed into passes in which none of them sees another."""

from __future__ import annotations

from bisect import bisect_left, insort
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any, Literal, TypeAlias

import torch

from ..errors import DataError
from ..models.generator import Generator
from ..models.loading import end_ids
from ..models.precision import batches, pad
from ..models.prefixes import keeps_every_token
from ..prompts import Prompt
from .token_loss import IGNORED, RowBatch, answer_loss

Loss: TypeAlias = Callable[[torch.Tensor, torch.Tensor, torch.Tensor | int | None], torch.Tensor]
"""Called as `answer_loss` is: a sum over labels, divided by `count`."""

Role: TypeAlias = Literal["answer", "replay", "keep"]

_PASS = {"cpu": 512}  # tokens in a pass; elsewhere 4,096: the micro-batch bounds memory


@dataclass(frozen=True, slots=True)
class SftRow:
    """A training row: the ids of a prompt, and those of its answer, its end included.

    Attributes:
        prompt: what is given.
        answer: what is predicted.
        role: whether that is learnt as an `answer`, or against forgetting: a general text that is
            seen again (`replay`), or what the base says, which the model is to `keep` to.

    Raises:
        DataError: prompt or answer is empty: an answer is predicted from what stands before it.
    """

    prompt: tuple[int, ...]
    answer: tuple[int, ...]
    role: Role = "answer"

    def __post_init__(self) -> None:
        """Refuse what cannot be learnt from."""
        if not self.prompt or not self.answer:
            raise DataError("a training row needs a prompt and an answer of one token at least")

    @property
    def inputs(self) -> tuple[int, ...]:
        """What is read: all but the last id, which is only predicted."""
        return self.prompt + self.answer[:-1]

    @property
    def scored(self) -> range:
        """The places in the inputs whose logits predict the answer."""
        return range(len(self.prompt) - 1, len(self.prompt) + len(self.answer) - 1)


def sft_row(generator: Generator, prompt: Prompt, answer: str, where: str) -> SftRow:
    """Return the training row of a prompt, as it is asked with, and an answer.

    Args:
        generator: whose ids they become.
        prompt: the prompt.
        answer: the text to answer with.
        where: names the row in messages: `question 'q7'`.

    Raises:
        DataError: the two are longer than the generator's window.
    """
    ids = generator.encoder.encode(prompt).ids
    target = generator.encoder.answer_ids(answer, end_ids(generator.model, generator.tokenizer))
    if len(ids) + len(target) > generator.window:
        raise DataError(
            f"{where}: its prompt of {len(ids)} tokens and its answer of {len(target)} take "
            f"{len(ids) + len(target)}; the model reads {generator.window}. Lower "
            "--context-tokens, or shorten the answer."
        )
    return SftRow(ids, tuple(target))


def packed(lengths: Sequence[int], tokens: int) -> list[list[int]]:
    """Group positions into few sequences of at most `tokens` tokens, by best-fit decreasing.

    The longest that is left goes where least room remains, or into a sequence of its own where
    it fits nowhere: so does one that is longer than `tokens`. At most 11/9 of the fewest sequences
    are needed, and 4 (Johnson et al. 1974).
    """
    sequences: list[list[int]] = []
    room: list[tuple[int, int]] = []  # what is left in a sequence, and its number, least first
    for position in sorted(range(len(lengths)), key=lambda position: -lengths[position]):
        length = lengths[position]
        if (place := bisect_left(room, (length, 0))) < len(room):
            left, number = room.pop(place)
        else:
            left, number = max(tokens, length), len(sequences)
            sequences.append([])
        sequences[number].append(position)
        insort(room, (left - length, number))
    return sequences


class SftTrainee(torch.nn.Module):
    """A model that learns answers: its parameters that need gradients are what is trained.

    Rows are packed where the model reads packed rows as it reads them alone; else rows of like
    length are padded to passes. Loss and gradients are the same.

    Args:
        model: a causal model of transformers, or an adapted one of peft.
        loss: called as `answer_loss` is, with logits of shape [1, places, vocabulary].
        tokens: the most in a pass, but for longer rows; None takes what suits the device.
    """

    accepts_loss_kwargs = True

    def __init__(self, model: Any, *, loss: Loss = answer_loss, tokens: int | None = None) -> None:
        super().__init__()
        self.model = model
        self.loss = loss
        self.tokens = tokens or _PASS.get(model.device.type, 4096)
        self.packs = packs_exactly(model)
        self._turn = turning_length(model)

    def forward(
        self,
        batch: RowBatch[SftRow],
        labels: torch.Tensor,
        num_items_in_batch: torch.Tensor | int | None = None,
    ) -> dict[str, torch.Tensor]:
        """Return the loss: the mean over `num_items_in_batch` labels, or over those here if None.

        Args:
            batch: the rows.
            labels: what `collate` gives for them.
            num_items_in_batch: the labels of a whole step, over all processes.
        """
        count = labels.ne(IGNORED).sum() if num_items_in_batch is None else num_items_in_batch
        losses = [self.loss(*scored, count) for scored in self.logits(batch.rows)]
        return {"loss": torch.stack(losses).sum()}

    def logits(self, rows: Sequence[SftRow]) -> Iterator[tuple[torch.Tensor, torch.Tensor]]:
        """Yield, pass by pass, the logits that predict answers, and the answers' ids.

        The rows alone decide which pass holds which, in what order.

        Yields:
            of shape [1, places, vocabulary], and int64 of shape [1, places].
        """
        for part in self.passes(rows):
            logits = self.read(self.model, part)
            answers = [token for row in part for token in row.answer]
            yield logits, torch.tensor([answers], device=logits.device)

    def passes(self, rows: Sequence[SftRow]) -> Iterator[list[SftRow]]:
        """Yield the rows of each pass."""
        for places in self._passes([len(row.inputs) for row in rows]):
            yield [rows[place] for place in places]

    def read(self, model: Any, rows: Sequence[SftRow]) -> torch.Tensor:
        """Return the logits by which a model predicts the answers: [1, places, vocabulary]."""
        return (_packed_logits if self.packs else _padded_logits)(model, rows)

    def _passes(self, lengths: Sequence[int]) -> Iterator[list[int]]:
        """Group the positions of rows into passes."""
        group = packed if self.packs else batches
        turn = self._turn or max(lengths, default=0)
        for alike in (
            [place for place, length in enumerate(lengths) if length <= turn],
            [place for place, length in enumerate(lengths) if length > turn],
        ):
            for part in group([lengths[place] for place in alike], self.tokens):
                yield [alike[place] for place in part]


def _packed_logits(model: Any, rows: Sequence[SftRow]) -> torch.Tensor:
    """Return the logits that predict the answers of rows in one sequence: [1, places, vocabulary].

    Positions that begin anew are what tells transformers' masks and kernels of packed rows. They
    look for them where there is one sequence, no mask, and no cache.
    """
    ids: list[int] = []
    positions: list[int] = []
    scored: list[int] = []
    for row in rows:
        scored += [len(ids) + place for place in row.scored]
        positions += range(len(row.inputs))
        ids += row.inputs
    logits: torch.Tensor = model(
        input_ids=torch.tensor([ids], device=model.device),
        position_ids=torch.tensor([positions], device=model.device),
        use_cache=False,
        logits_to_keep=torch.tensor(scored, device=model.device),
    ).logits
    return logits


def _padded_logits(model: Any, rows: Sequence[SftRow]) -> torch.Tensor:
    """Return what `_packed_logits` does, of rows padded at their ends.

    No row can look behind its end in any causal model, whatever it keeps of what it has read: so
    there is nothing to mask.
    """
    ids, _ = pad([row.inputs for row in rows], 0, left=False, device=model.device)
    places = sorted({place for row in rows for place in row.scored})
    column = {place: number for number, place in enumerate(places)}
    kept: torch.Tensor = model(
        input_ids=ids,
        use_cache=False,
        logits_to_keep=torch.tensor(places, device=model.device),
    ).logits
    owners = [number for number, row in enumerate(rows) for _ in row.scored]
    return kept[owners, [column[place] for row in rows for place in row.scored]][None]


@torch.no_grad()
def packs_exactly(model: Any) -> bool:
    """Tell whether a model reads packed rows as it reads them alone.

    It is tried: a mask of the model's own making, or positions that it is not told, would let a
    row see the one before it. What then differs is compared with what differs where the two rows
    are one text. A recurrent state need not be tried.
    """
    if not keeps_every_token(model):
        return False
    size = int(model.get_input_embeddings().weight.shape[0])
    ids = [place % size for place in range(1, 25)]
    before = SftRow(tuple(ids[:8]), tuple(ids[8:12]))
    after = SftRow(tuple(ids[12:13]), tuple(ids[13:]))
    joined = SftRow(before.inputs + after.prompt, after.answer)
    modes = {module: module.training for module in model.modules()}
    model.eval()
    try:
        alone, seen, together = (
            _packed_logits(model, rows)[:, -len(after.answer) :].float()
            for rows in ([after], [joined], [before, after])
        )
    except (TypeError, ValueError):  # it takes no positions
        return False
    finally:
        for module, mode in modes.items():
            module.training = mode
    noise = torch.finfo(model.dtype).eps ** 0.5
    return bool((together - alone).abs().max() <= noise * (seen - alone).abs().max())


def turning_length(model: Any) -> int | None:
    """Return above which length a row turns the positions of all rows in its pass (LongRoPE)."""
    rope = getattr(model.config.get_text_config(), "rope_parameters", None) or {}
    kinds = [rope, *(kind for kind in rope.values() if isinstance(kind, dict))]
    lengths = [
        int(kind["original_max_position_embeddings"])
        for kind in kinds
        if kind.get("rope_type") == "longrope"
    ]
    return min(lengths, default=None)
