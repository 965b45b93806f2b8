"""The settings of `ragkit-train virtual-tokens`."""

from __future__ import annotations

import math
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from cyclopts import Parameter

from ragkit.errors import SettingsError

from .runs import AnswerSettings, check_training, whole_numbers


@Parameter(name="*")
@dataclass(frozen=True, kw_only=True)
class TokenSettings(AnswerSettings):
    """What is learnt, from what, and how."""

    output: Path
    """The folder for the virtual tokens."""
    tokens: int = 50
    """Virtual tokens to learn."""
    placement: Literal["middle", "front", "last", "prompt-tuning"] = "middle"
    """Behind the passages; or, to compare with, before them, last, or before all (by peft)."""
    prompt: str = "virtual-tokens"
    """The prompt's wording."""
    shuffle: bool = False
    """Show passages in a random order, not by their ranks; their keys and values are not kept."""
    fixed: bool = False
    """Use all tokens always, not the first k of a random k."""
    objective: Literal["sample", "batch"] = "sample"
    """Whether k is drawn for each sample or once for each batch."""
    seeds: str = "0"
    """Seeds, such as 0,1,2: each is learnt apart; the one with the least loss on dev is kept."""
    epochs: float = 3.0
    micro_batch: int = 8
    """Questions in one pass of one process."""
    learning_rate: float = 5e-3
    """The highest learning rate."""
    evaluate_every: int = 50
    """Steps between two evaluations, each followed by a checkpoint."""
    start: Path | None = None
    """Embeddings to start from: virtual tokens of ragkit, or SPRING's .pt file."""
    prefix_cache: float = 2.0
    """GB of keys and values of passages that are kept from one epoch to the next."""
    prefix_cache_folder: Path | None = None
    """Keep them in this folder and not in memory."""
    gradient_checkpointing: bool = False
    """Read again on the way back, in place of the cache: less memory with --placement front."""
    token_counts: str = ""
    """Evaluate with the first k tokens too, such as 0,1,5."""


def check(settings: TokenSettings) -> tuple[list[int], list[int]]:
    """Refuse numbers that could not work, before any work is done.

    Returns:
        the seeds, and the numbers of tokens that are evaluated too.

    Raises:
        SettingsError: naming the option.
    """
    least = {"tokens": 1, "max_new_tokens": 1, "context_tokens": 1}
    seeds = check_training(settings, least, settings.micro_batch)
    if not 0 <= settings.prefix_cache < math.inf:
        raise SettingsError(f"--prefix-cache {settings.prefix_cache}: expected a number from 0 up")
    if settings.gradient_checkpointing and settings.placement == "prompt-tuning":
        raise SettingsError("--gradient-checkpointing does not go with --placement prompt-tuning")
    counts = whole_numbers(settings.token_counts, "--token-counts") if settings.token_counts else []
    if counts and max(counts) > settings.tokens:
        raise SettingsError(
            f"--token-counts asks for {max(counts)} virtual tokens; {settings.tokens} are learnt"
        )
    return seeds, counts


def passage_range(text: str) -> tuple[int, int]:
    """Read `1-5`, or one number for both ends."""
    try:
        low, _, high = text.partition("-")
        ends = int(low), int(high or low)
    except ValueError:
        ends = (1, 0)
    if not 0 <= ends[0] <= ends[1]:
        raise SettingsError(f"--passages {text!r}: expected a range such as 1-5, or one number")
    return ends
