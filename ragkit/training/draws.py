"""What is drawn at each access to a training example: all of it from the seed and the place alone.

A run is one list of draws, from its first to its last. So it is the same on one process and on
many, and one that was killed goes on where it stood.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache
from random import Random
from typing import Literal, TypeAlias

from ..errors import SettingsError

Objective: TypeAlias = Literal["sample", "batch"]


@dataclass(frozen=True, slots=True)
class Draw:
    """One access to an example.

    Attributes:
        example: its place in the list of examples.
        passages: how many of its passages are shown.
        tokens: how many virtual tokens stand in the prompt.
        answer: which of its answers is the target.
        shuffle: the seed of its passages' order; None keeps their ranks.
    """

    example: int
    passages: int
    tokens: int
    answer: int
    shuffle: str | None = None


@dataclass(frozen=True, slots=True)
class Draws(Sequence[Draw]):
    """All draws of a run. Each epoch passes through all examples in an order of its own.

    Attributes:
        answers: how many answers each example has, at least 1.
        steps: optimiser steps.
        batch: examples in a step.
        passages: the least and the most that are shown; each number is as likely.
        tokens: the most virtual tokens.
        fixed: whether always all of them stand in the prompt, and not a random number of them.
        objective: whether that number is drawn for each `sample` (the paper) or once for each
            `batch` (its authors' code).
        shuffle: whether passages stand in a random order.
        seed: of everything.
    """

    answers: tuple[int, ...]
    steps: int
    batch: int
    passages: tuple[int, int]
    tokens: int
    fixed: bool = False
    objective: Objective = "sample"
    shuffle: bool = False
    seed: int = 0

    def __post_init__(self) -> None:
        """Refuse numbers that leave nothing to draw.

        Raises:
            SettingsError: naming them.
        """
        low, high = self.passages
        if not self.answers or min(self.answers) < 1 or self.steps < 1 or self.batch < 1:
            raise SettingsError("there must be examples with answers, steps and a batch, each 1 up")
        if not 0 <= low <= high or self.tokens < 0:
            raise SettingsError(f"passages {low}-{high}: expected a range from 0 up")

    def __len__(self) -> int:
        return self.steps * self.batch

    def __getitem__(self, place: int) -> Draw:  # type: ignore[override]
        """Return the draw at a place."""
        if not 0 <= place < len(self):
            raise IndexError(place)
        epoch, rank = divmod(place, len(self.answers))
        example = epoch_order(self.seed, epoch, len(self.answers))[rank]
        own = Random(f"{self.seed} draw {place}")
        passages = own.randint(*self.passages)
        answer = own.randrange(self.answers[example])
        shared = self.objective == "batch"
        of_tokens = Random(f"{self.seed} step {place // self.batch}") if shared else own
        tokens = of_tokens.randint(min(1, self.tokens), self.tokens)
        return Draw(
            example,
            passages,
            self.tokens if self.fixed else tokens,
            answer,
            f"{self.seed} order {place}" if self.shuffle else None,
        )


@lru_cache(maxsize=4)
def epoch_order(seed: int, epoch: int, count: int) -> tuple[int, ...]:
    """Return the order in which an epoch passes through so many examples."""
    order = list(range(count))
    Random(f"{seed} epoch {epoch}").shuffle(order)
    return tuple(order)
