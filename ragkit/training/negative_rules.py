"""Which documents may be a question's negatives."""

from __future__ import annotations

import math
from collections.abc import Set as AbstractSet
from dataclasses import dataclass

from ..errors import SettingsError

FILTERS = {
    "rank": "before the first rank that counts",
    "relevant": "relevant, or of a relevant document",
    "held_out": "relevant to a held-out question",
    "unfound": "with nothing relevant found to keep a margin to",
    "margin": "within the margin to the best relevant document, or above it",
    "duplicate": "nearly the same as a positive",
    "answer": "holding an answer",
    "cross_encoder": "scored too high by the cross-encoder",
    "utility": "helping the generator too much",
}
"""What takes a candidate away, in the order in which it is asked."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Rules:
    """Which of the documents found for a question may be its negatives, and how many are taken.

    A margin is measured from the best score of a document that is relevant to the question. Where
    none was found, all that was found scores higher than what is relevant, and is no negative.

    Attributes:
        negatives: how many each question gets, at most.
        from_rank: the first rank that counts, from 1.
        margin: how much lower than the positive a negative scores, at least.
        relative_margin: the same, as a share of the positive's score.
        max_score: the highest score that a cross-encoder may give a negative.
        score_margin: how much lower than the best positive a cross-encoder scores it, at least.
        max_utility: the most that a negative may help a generator: u(q, d) in nats a token.
        allow_answers: whether a negative may hold an answer.
        similarity: from where a document is nearly the same as a positive, by `shingles`.
        held_out: ids of documents that are never taken, nor pieces of them.
        seed: draws from all ranks alike; None takes the best ranks.

    Raises:
        SettingsError: a number out of its range.
    """

    negatives: int = 8
    from_rank: int = 1
    margin: float | None = None
    relative_margin: float | None = None
    max_score: float | None = None
    score_margin: float | None = None
    max_utility: float | None = None
    allow_answers: bool = False
    similarity: float = 0.8
    held_out: AbstractSet[str] = frozenset()
    seed: int | None = None

    def __post_init__(self) -> None:
        for name in ("negatives", "from_rank"):
            if getattr(self, name) < 1:
                raise SettingsError(f"{name} must be at least 1, not {getattr(self, name)}")
        ends = {"margin": math.inf, "relative_margin": 1.0, "score_margin": math.inf}
        for name, end in ends.items():
            value = getattr(self, name)
            if value is not None and not 0 <= value < end:
                most = "" if end == math.inf else f" and below {end:g}"
                raise SettingsError(f"{name} must be a number from 0 up{most}, not {value}")
        for name in ("max_score", "max_utility"):
            value = getattr(self, name)
            if value is not None and not math.isfinite(value):
                raise SettingsError(f"{name} must be a number, not {value}")
        if not 0 < self.similarity <= 1:
            raise SettingsError(f"similarity must lie above 0 and up to 1, not {self.similarity}")

    @property
    def scored(self) -> bool:
        """Whether a cross-encoder is needed."""
        return self.max_score is not None or self.score_margin is not None
