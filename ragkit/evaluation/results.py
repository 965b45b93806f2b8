"""What a run scored: the value that `evaluate` returns and `results.json` holds."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from importlib.metadata import version
from typing import Any

from .statistics import Estimate

FORMAT = 1
"""The format number of run folders."""


@dataclass(frozen=True, slots=True)
class Results:
    """What a run scored, over how many questions, and at what cost.

    Attributes:
        retrieval: measure -> estimate; empty where nothing judges the retrieval.
        answers: measure -> estimate; empty without a reader, or where no question has gold answers.
        counts: how many questions there were, and how many of each kind that needs a look.
        listed: the first ids of each kind that `counts` counts.
        times: seconds of each stage over all questions, loading on first use included.
        settings: what the run was made with.
        hashes: fingerprints of the questions and of their qrels.
    """

    retrieval: dict[str, Estimate]
    answers: dict[str, Estimate]
    counts: dict[str, int]
    listed: dict[str, list[str]]
    times: dict[str, float]
    settings: dict[str, Any]
    hashes: dict[str, str]

    def to_json(self) -> dict[str, Any]:
        """Return the value that `results.json` holds."""
        questions = self.counts["questions"]
        times = {
            stage: {"seconds": seconds, "per_question": seconds / questions}
            for stage, seconds in self.times.items()
        }
        head = {"format": FORMAT, "ragkit": version("ragkit")}
        return head | asdict(self) | {"times": times}
