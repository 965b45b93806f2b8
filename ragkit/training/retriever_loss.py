"""Losses of a bi-encoder over lists of documents.

The score of a document is s(q,d) = <q,d> / temperature, of normalised vectors where the encoder
compares by cosine. Gradients flow through it into the encoder, and nowhere else.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Literal, TypeAlias, get_args

import torch
import torch.distributed
from torch.nn import functional

from ..errors import SettingsError
from .lists import DrawnList

Objective: TypeAlias = Literal["contrastive", "margin-mse", "kl"]
Direction: TypeAlias = Literal["forward", "reverse"]


@dataclass(frozen=True, slots=True)
class LossSettings:
    """What is minimised.

    Attributes:
        objective: `contrastive`: InfoNCE, -log softmax of the positive's score over all documents
            of the batch but the question's other positives. `margin-mse`: the squared difference
            of (positive's score - other's score) from the teacher's (Hofstätter et al. 2020, arXiv
            2010.02666). `kl`: between softmax(s) over the question's list and the teacher's
            Q = softmax(score / teacher_temperature), which with the generator's log-likelihoods as
            scores is LSR (REPLUG, Shi et al. 2023, arXiv 2301.12652).
        temperature: of the scores.
        teacher_temperature: of the teacher's distribution.
        in_batch: whether `kl` tells a question's list from the batch's other documents too: its P
            is over all of them, and the teacher's Q is 0 outside the list. A document that would
            help and was not listed is then taken for one that does not.
        direction: of KL: `forward` is KL(Q || P), as in RA-DIT (Lin et al. 2023, arXiv 2310.01352),
            `reverse` KL(P || Q), as in REPLUG.
        dimensions: the loss is summed over whole vectors and vectors cut to so many components, as
            Matryoshka representations are learnt (Kusupati et al. 2022).
    """

    objective: Objective = "contrastive"
    temperature: float = 0.05
    teacher_temperature: float = 1.0
    direction: Direction = "forward"
    in_batch: bool = False
    dimensions: tuple[int, ...] = ()

    def __post_init__(self) -> None:
        """Refuse what cannot be minimised.

        Raises:
            SettingsError: an unknown name, or a number that is not above 0.
        """
        if self.objective not in get_args(Objective) or self.direction not in get_args(Direction):
            raise SettingsError(
                f"objective {self.objective!r}, direction {self.direction!r}: known are "
                f"{', '.join(get_args(Objective))}, and {', '.join(get_args(Direction))}"
            )
        if (
            not min(self.temperature, self.teacher_temperature) > 0
            or min(self.dimensions or [1]) < 1
        ):
            raise SettingsError(
                f"temperatures {self.temperature} and {self.teacher_temperature}, dimensions "
                f"{self.dimensions}: expected numbers above 0"
            )
        if self.in_batch and (self.objective, self.direction) != ("kl", "forward"):
            raise SettingsError(
                "in_batch goes with kl or lsr, and with the direction forward alone: the reverse "
                "KL to a teacher that gives 0 is infinite"
            )


def labels_of(rows: Sequence[DrawnList]) -> tuple[list[int], dict[str, Any]]:
    """Number the documents of a batch.

    Returns:
        the documents to encode, each once; and the labels: `ids` [documents] are their numbers,
        `lists` [rows, longest list] the places of each row's documents among them, -1 behind the
        last one, `positives` [rows, most positives] the numbers of relevant ones, -1 behind them,
        and `scores` [rows, longest list] the teacher's.
    """
    ids = list(dict.fromkeys(each for row in rows for each in row.documents))
    places = {number: place for place, number in enumerate(ids)}
    width = max(len(row.documents) for row in rows)
    lists = torch.full((len(rows), width), -1)
    scores = torch.zeros(len(rows), width)
    positives = torch.full((len(rows), max(1, *(len(row.positives) for row in rows))), -1)
    for place, row in enumerate(rows):
        lists[place, : len(row.documents)] = torch.tensor([places[n] for n in row.documents])
        positives[place, : len(row.positives)] = torch.tensor(row.positives, dtype=torch.long)
        if row.scores:
            scores[place, : len(row.documents)] = torch.tensor(row.scores)
    labels = {"ids": torch.tensor(ids), "lists": lists, "positives": positives, "scores": scores}
    return ids, labels


class RetrieverLoss(torch.nn.Module):
    """The loss of a batch, as sentence-transformers' trainers call it.

    Args:
        model: the encoder; the trainer puts its wrapped self in the place.
        settings: what is minimised.
        cosine: whether vectors are normalised.
    """

    def __init__(self, model: torch.nn.Module, settings: LossSettings, *, cosine: bool) -> None:
        super().__init__()
        self.model = model
        self.settings = settings
        self.cosine = cosine

    def forward(
        self, features: Sequence[dict[str, Any]], labels: dict[str, torch.Tensor]
    ) -> torch.Tensor:
        """Return the loss of queries and documents: tokens, or documents' vectors as they are.

        Args:
            features: of the queries, and of the documents.
            labels: what `labels_of` gives.
        """
        queries, documents = (self._vectors(each) for each in features)
        sizes = dict.fromkeys((queries.shape[1], *self.settings.dimensions))
        losses = [self.loss(queries[:, :n], documents[:, :n], labels) for n in sizes]
        return torch.stack(losses).sum()

    def _vectors(self, features: dict[str, Any]) -> torch.Tensor:
        vectors: torch.Tensor
        if "sentence_embedding" in features:
            vectors = features["sentence_embedding"].detach()
        else:
            vectors = self.model(features)["sentence_embedding"]
        return vectors.float()

    def loss(
        self, queries: torch.Tensor, documents: torch.Tensor, labels: dict[str, torch.Tensor]
    ) -> torch.Tensor:
        """Return the loss of vectors [rows, size] and [documents, size]: a scalar."""
        if self.cosine:
            queries = functional.normalize(queries, dim=-1)
            documents = functional.normalize(documents, dim=-1)
        if self.settings.objective == "contrastive":
            return self._contrastive(queries, documents, labels)
        lists = labels["lists"]
        scores = (queries[:, None] * documents[lists.clamp(min=0)]).sum(-1)
        scores = scores / self.settings.temperature
        there = lists >= 0
        if self.settings.objective == "margin-mse":
            return _margin_mse(scores, labels["scores"], there)
        teacher = labels["scores"] / self.settings.teacher_temperature
        beside = self._beside(queries, documents, labels) if self.settings.in_batch else None
        return _divergence(scores, teacher, there, self.settings.direction, beside)

    def _beside(
        self, queries: torch.Tensor, documents: torch.Tensor, labels: dict[str, torch.Tensor]
    ) -> torch.Tensor:
        """Return log Σ exp(score) of each row's negatives outside of its list, [rows, 1]."""
        lists = labels["lists"]
        own = labels["ids"][lists.clamp(min=0)].masked_fill(lists < 0, -1)
        documents, ids = _gathered(documents, labels["ids"])
        held = torch.cat([own, labels["positives"]], dim=1)
        inside = (held[:, :, None] == ids[None, None, :]).any(dim=1)
        scores = queries @ documents.T / self.settings.temperature
        scores = scores.masked_fill(inside | _repeated(ids), torch.finfo(scores.dtype).min)
        return scores.logsumexp(dim=1, keepdim=True)

    def _contrastive(
        self, queries: torch.Tensor, documents: torch.Tensor, labels: dict[str, torch.Tensor]
    ) -> torch.Tensor:
        targets = labels["ids"][labels["lists"][:, 0]]  # numbers, which all processes share
        documents, ids = _gathered(documents, labels["ids"])
        target = (targets[:, None] == ids[None, :]).int().argmax(dim=1)
        relevant = (labels["positives"][:, :, None] == ids[None, None, :]).any(dim=1)
        relevant[torch.arange(len(target), device=ids.device), target] = False
        scores = queries @ documents.T / self.settings.temperature
        scores = scores.masked_fill(relevant | _repeated(ids), -torch.inf)
        return functional.cross_entropy(scores, target)


def _repeated(ids: torch.Tensor) -> torch.Tensor:
    """Tell which documents stand further to the left already, [documents]."""
    first = (ids[:, None] == ids[None, :]).int().argmax(dim=1)
    return first != torch.arange(len(ids), device=ids.device)


def _margin_mse(scores: torch.Tensor, teacher: torch.Tensor, there: torch.Tensor) -> torch.Tensor:
    """Compare each list's first document with the others, [rows, list] all."""
    ours, its = scores[:, :1] - scores[:, 1:], teacher[:, :1] - teacher[:, 1:]
    others = there[:, 1:].float()
    return (((ours - its) ** 2 * others).sum(dim=1) / others.sum(dim=1).clamp(min=1)).mean()


def _divergence(
    scores: torch.Tensor,
    teacher: torch.Tensor,
    there: torch.Tensor,
    direction: Direction,
    beside: torch.Tensor | None,
) -> torch.Tensor:
    """Return the mean KL divergence between softmax(scores) and softmax(teacher), [rows, list].

    `beside`, [rows, 1], is log Σ exp of the scores of documents that the teacher gives 0.
    """
    lowest = torch.finfo(scores.dtype).min
    given = scores.masked_fill(~there, lowest)
    whole = given if beside is None else torch.cat([given, beside], dim=1)
    ours = given - whole.logsumexp(dim=1, keepdim=True)
    its = teacher.masked_fill(~there, lowest).log_softmax(dim=1)
    to, of = (ours, its) if direction == "forward" else (its, ours)
    terms = (of.exp() * (of - to)).masked_fill(~there, 0.0)
    return terms.sum(dim=1).mean()


class _Gather(torch.autograd.Function):
    """The tensors of all processes, as many; each gets the sum of all processes' gradients back."""

    @staticmethod
    def forward(_: Any, own: torch.Tensor) -> tuple[torch.Tensor, ...]:
        parts = [torch.empty_like(own) for _ in range(torch.distributed.get_world_size())]
        torch.distributed.all_gather(parts, own.contiguous())
        return tuple(parts)

    @staticmethod
    def backward(_: Any, *gradients: torch.Tensor) -> torch.Tensor:
        whole = torch.stack(gradients)
        torch.distributed.all_reduce(whole)
        return whole[torch.distributed.get_rank()]


def _gathered(documents: torch.Tensor, ids: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Return the documents of all processes, gradients flowing back to each, and their numbers."""
    if not torch.distributed.is_initialized() or torch.distributed.get_world_size() == 1:
        return documents, ids

    count = torch.tensor([len(ids)], device=ids.device)
    counts = [torch.zeros_like(count) for _ in range(torch.distributed.get_world_size())]
    torch.distributed.all_gather(counts, count)
    sizes = [int(each) for each in counts]
    more = max(sizes) - len(ids)
    padded = functional.pad(documents, (0, 0, 0, more))
    numbers = [torch.zeros(max(sizes), dtype=ids.dtype, device=ids.device) for _ in sizes]
    torch.distributed.all_gather(numbers, functional.pad(ids, (0, more), value=-1))
    gather: Any = _Gather.apply
    parts = [part[:size] for part, size in zip(gather(padded), sizes, strict=True)]
    return torch.cat(parts), torch.cat(
        [part[:size] for part, size in zip(numbers, sizes, strict=True)]
    )
