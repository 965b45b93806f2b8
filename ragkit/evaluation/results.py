"""What a run scored: the value that `evaluate` returns and `results.json` holds."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from importlib.metadata import version
from typing import Any

from .costs import Cost
from .stages import StageLosses
from .statistics import Estimate

FORMAT = 2
"""The format number of run folders."""

Estimates = dict[str, Estimate]
"""Measure -> mean, interval and n."""


@dataclass(frozen=True, slots=True)
class Results:
    """What a run scored, over how many questions, and at what cost.

    Attributes:
        retrieval: empty where nothing judges the retrieval.
        answers: empty without a reader, or where no question has gold answers.
        contexts: context -> its answers' measures; empty unless asked for.
        figures: what the contexts say of how the reader uses its passages.
        stages: where questions were lost; None where that cannot be told.
        probes: probe -> its measures of general ability.
        counts: how many questions there were, and how many of each kind that needs a look.
        listed: the first ids of each kind that `counts` counts.
        costs: stage -> what it took.
        settings: what the run was made with.
        hashes: fingerprints of the questions, of their qrels and, if known, of the corpus.
    """

    retrieval: Estimates
    answers: Estimates
    counts: dict[str, int]
    listed: dict[str, list[str]]
    costs: dict[str, Cost]
    settings: dict[str, Any]
    hashes: dict[str, str]
    contexts: dict[str, Estimates] = field(default_factory=dict)
    figures: Estimates = field(default_factory=dict)
    stages: StageLosses | None = None
    probes: Mapping[str, Estimates] = field(default_factory=dict)

    def to_json(self) -> dict[str, Any]:
        """Return the value that `results.json` holds."""
        values = {
            name: {key: asdict(estimate) for key, estimate in getattr(self, name).items()}
            for name in ("retrieval", "answers", "figures")
        }
        for name in ("contexts", "probes"):
            values[name] = {
                key: {measure: asdict(estimate) for measure, estimate in estimates.items()}
                for key, estimates in getattr(self, name).items()
            }
        questions = self.counts["questions"]
        return {
            "format": FORMAT,
            "ragkit": version("ragkit"),
            **values,
            "stages": self.stages.to_json() if self.stages else {},
            "counts": self.counts,
            "listed": self.listed,
            "costs": {stage: cost.to_json(questions) for stage, cost in self.costs.items()},
            "settings": self.settings,
            "hashes": self.hashes,
        }
