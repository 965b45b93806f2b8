"""Scores of several lists made comparable, and their sums."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal, TypeAlias

from .types import Hit

Fusion: TypeAlias = Literal["rrf", "weighted"]


def values_of(fusion: Fusion, hits: Sequence[Hit]) -> list[float]:
    """Return what each hit of a list, the best first, adds to its document's sum."""
    if fusion == "rrf":
        return [1 / (60 + rank) for rank in range(1, len(hits) + 1)]
    return scaled([hit.score for hit in hits])


def scaled(scores: Sequence[float]) -> list[float]:
    """Scale to 0…1, the lowest to the highest; equal scores are all 1."""
    low = min(scores, default=0.0)
    span = max(scores, default=0.0) - low
    return [(score - low) / span if span else 1.0 for score in scores]


def interpolated(
    retrieved: Sequence[float], scores: Sequence[float], weight: float
) -> Sequence[float]:
    """Return weight · scores + (1 - weight) · retrieved of one list, both scaled to 0…1 first.

    With the weight 1 the scores are given as they are.
    """
    if weight == 1:
        return scores
    pairs = zip(scaled(retrieved), scaled(scores), strict=True)
    return [(1 - weight) * first + weight * second for first, second in pairs]
