"""What training a generator minimises on an answer's tokens, and how far it has left its base."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import TypeAlias

import torch

from ..errors import SettingsError
from .token_loss import IGNORED, answer_loss

Count: TypeAlias = torch.Tensor | int | None


@dataclass(frozen=True, slots=True)
class Smoothing:
    """How far a token's target lies from certainty. Cross-entropy asks for none of it.

    Attributes:
        own: λ, the share of the target that the label keeps: 1 smooths nothing.
        deviations: n of OVERTONE: words whose logits lie within so many standard deviations of the
            highest share the rest.
        least: ε of OVERTONE, in nats: a token that is nearer to its target is left alone.

    Raises:
        SettingsError: a number out of its range.
    """

    own: float = 0.9
    deviations: float = 1.0
    least: float = 0.01

    def __post_init__(self) -> None:
        if not 0 < self.own <= 1:
            raise SettingsError(f"own must lie above 0 and up to 1, not {self.own}")
        for name in ("deviations", "least"):
            if not 0 <= getattr(self, name) < math.inf:
                raise SettingsError(f"{name} must be a number from 0 up, not {getattr(self, name)}")


SmoothedLoss: TypeAlias = Callable[[torch.Tensor, torch.Tensor, Count, Smoothing], torch.Tensor]
"""A loss of (logits [rows, places, vocabulary], labels int64 [rows, places], count, smoothing).

Labels stand at the logits that foretell them. Those that are `IGNORED` count for nothing: their
logits are not read, and get a gradient of 0. The sum over the others is divided by `count`, the
labels of a whole step over all processes, or by their number if it is None. All is computed in
float32. A word whose logit is -inf cannot be said, and takes no part; if it is the label, the loss
is infinite.
"""


def cross_entropy(
    logits: torch.Tensor, labels: torch.Tensor, count: Count, smoothing: Smoothing
) -> torch.Tensor:
    """Return the sum of -log p(label), as a `SmoothedLoss`."""
    scored, labels = _scored(logits, labels)
    return answer_loss(scored[None], labels[None], _divisor(count, labels))


def label_smoothing(
    logits: torch.Tensor, labels: torch.Tensor, count: Count, smoothing: Smoothing
) -> torch.Tensor:
    """Return the sum of cross-entropies to λ·δ(label) + (1-λ)·uniform, as a `SmoothedLoss`.

    Szegedy et al. 2016 (arXiv 1512.00567), section 7; torch's `label_smoothing` is 1-λ. Uniform is
    over all words that can be said.
    """
    scored, labels = _scored(logits, labels)
    model = scored.log_softmax(-1)
    never = scored.isneginf()
    of_labels = model.gather(-1, labels[:, None])[:, 0]
    of_all = model.masked_fill(never, 0.0).sum(-1) / (~never).sum(-1)
    losses: torch.Tensor = -smoothing.own * of_labels - (1 - smoothing.own) * of_all
    return losses.sum() / _divisor(count, labels)


def overtone(
    logits: torch.Tensor, labels: torch.Tensor, count: Count, smoothing: Smoothing
) -> torch.Tensor:
    """Return the sum of max(KL(target ‖ model), ε), a `SmoothedLoss`; targets as in `soft_targets`.

    OVERTONE: Liu et al. 2025, "Mitigating Heterogeneous Token Overfitting in LLM Knowledge Editing"
    (arXiv 2502.00602). No gradient flows through the targets, and none at all through a token
    whose divergence is below ε; its ε is still in the sum.
    """
    scored, labels = _scored(logits, labels)
    losses = _divergences(soft_targets(scored.detach(), labels, smoothing), scored)
    return losses.clamp(min=smoothing.least).sum() / _divisor(count, labels)


LOSSES: Mapping[str, SmoothedLoss] = {
    "cross-entropy": cross_entropy,
    "label-smoothing": label_smoothing,
    "overtone": overtone,
}


@torch.no_grad()
def soft_targets(logits: torch.Tensor, labels: torch.Tensor, smoothing: Smoothing) -> torch.Tensor:
    """Return OVERTONE's target distributions: float32 [tokens, vocabulary], rows sum to 1.

    π is the softmax over the words whose logit is at least max - n·std of the token's logits (std
    with Bessel's correction, over the words that can be said). A target is λ·δ(label) + (1-λ)·π
    where no word is likelier in it than the label, else δ(label).

    Args:
        logits: float32 [tokens, vocabulary].
        labels: int64 [tokens], none of them `IGNORED`.
        smoothing: λ and n.
    """
    never = logits.isneginf()
    said = (~never).sum(-1, keepdim=True)
    work = logits.masked_fill(never, 0.0)  # the one tensor of this size: it becomes the targets
    work.sub_(work.sum(-1, keepdim=True) / said).masked_fill_(never, 0.0)
    norm = torch.linalg.vector_norm(work, dim=-1, keepdim=True)
    deviation = norm / (said - 1).clamp(min=1).sqrt()
    highest = logits.amax(-1, keepdim=True)
    torch.sub(logits, highest, out=work)
    work.masked_fill_(work < -smoothing.deviations * deviation, -torch.inf)
    work.exp_()
    work.div_(work.sum(-1, keepdim=True))
    # The label has λ more than its π: no other word may have more than that.
    place, rest = labels[:, None], 1 - smoothing.own
    of_labels = work.gather(-1, place)
    others = work.scatter_(-1, place, 0.0).amax(-1, keepdim=True)
    work.scatter_(-1, place, of_labels)
    likeliest = smoothing.own + rest * of_labels >= rest * others
    own = torch.where(likeliest, smoothing.own, 1.0).to(work.dtype)
    return work.mul_(1 - own).scatter_add_(-1, place, own)


def kl_to_base(
    logits: torch.Tensor, base_logits: torch.Tensor, mask: torch.Tensor, count: Count
) -> torch.Tensor:
    """Return the sum of KL(base ‖ model) over places, divided by `count`: what forgetting costs.

    No gradient flows to the base.

    Args:
        logits: the model's, of shape [rows, places, vocabulary].
        base_logits: the base's on the same ids, of the same shape.
        mask: bool of shape [rows, places]: the places that count; others are not read.
        count: those of a whole step, over all processes; the number of them here if None.
    """
    mask = mask.to(logits.device)
    base = base_logits.detach().to(logits.device)[mask].float().softmax(-1)
    losses = _divergences(base, logits[mask].float())
    return losses.sum() / _divisor(count, losses)


def _scored(logits: torch.Tensor, labels: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Return the logits [tokens, vocabulary] in float32, and the labels, of what is scored."""
    labels = labels.to(logits.device)
    kept = labels.ne(IGNORED)
    return logits[kept].float(), labels[kept]


def _divisor(count: Count, counted: torch.Tensor) -> torch.Tensor:
    return torch.as_tensor(max(1, len(counted)) if count is None else count, device=counted.device)


def _divergences(targets: torch.Tensor, logits: torch.Tensor) -> torch.Tensor:
    """Return KL(target ‖ softmax(logits)) of each row in nats, for [tokens, vocabulary] both.

    A word to which the target gives nothing adds nothing, even where its logit is -inf.
    """
    model = logits.log_softmax(-1).masked_fill(targets == 0, 0.0)
    entropies = torch.special.entr(targets).sum(-1)
    # The difference of two near numbers: in half precision, which autocast would take for a
    # product of vectors, nothing is left of it.
    with torch.autocast(logits.device.type, enabled=False):
        divergences: torch.Tensor = -entropies - torch.linalg.vecdot(targets, model)
    return divergences
