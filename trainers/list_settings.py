"""The settings that `ragkit-train retriever` and `reranker` share."""

from __future__ import annotations

import math
from dataclasses import dataclass, fields
from pathlib import Path
from typing import TYPE_CHECKING, Literal

from cyclopts import Parameter

from ragkit.errors import SettingsError

from .runs import TrainingSettings, check_training, loop_settings

if TYPE_CHECKING:
    from ragkit.training.keeper import LoopSettings

SWEPT = (0.25, 0.5, 0.75, 1.0)
"""The shares of the learnt weights that `--average sweep` tries."""


@Parameter(name="*")
@dataclass(frozen=True, kw_only=True)
class ListSettings(TrainingSettings):
    """What is learnt from lists of documents, and how."""

    examples: Path
    """Questions with positives and negatives, such as ragkit-train negatives writes; with --qrels,
    or where a generator teaches, any questions."""
    index: Path
    """The index folder that is searched."""
    base: str = "all-MiniLM-L6-v2"
    """The model to start from, by folder or name: an encoder, or for a reranker a cross-encoder."""
    qrels: Path | None = None
    """The relevant documents are the positives, and only questions that have some are taken."""
    dev_questions: Path | None = None
    """Questions to evaluate on; --examples if --dev-qrels are given, else some are held out."""
    dev_qrels: Path | None = None
    """Their qrels."""
    negatives: int | None = None
    """Negatives of a question in a batch, drawn from its own; if not given 1 (contrastive), 3 (bce,
    listwise), or all."""
    teacher: str | None = None
    """The cross-encoder that is learnt from; without one, the scores that the examples have."""
    generator: str = "SmolLM2-135M-Instruct"
    """The generator that is learnt from."""
    retriever: Literal["bm25", "dense", "hybrid"] | None = None
    """What finds the hits that a generator judges or a reranker reorders; hybrid if the index has
    both stores."""
    passages: int = 8
    """Hits of a question that the generator judges."""
    teacher_temperature: float | None = None
    """What scores are divided by: if not given 1 for a teacher's, 0.03 for a generator's, in nats a
    token of the answer."""
    average: str = "1"
    """The share of what was learnt in the average with the base: above 0, up to 1; or sweep, which
    takes the best on dev."""
    weight_decay: float = 0.01
    """AdamW's weight decay."""
    dropout: float = 0.0
    """The share of activations that is dropped while learning."""
    kept_tokens: int = 16_384
    """Tokens of a batch whose activations are kept; what is more is read twice, in less memory."""
    precision: Literal["fp32", "bf16"] = "fp32"
    """The number format of activations while learning."""


def check_lists(
    settings: ListSettings, objective: str, least: dict[str, int], uses: dict[str, set[str]]
) -> tuple[list[int], list[float]]:
    """Refuse what could not work, before any work is done.

    Args:
        settings: the settings.
        objective: what is learnt.
        least: the least values of settings that others lack.
        uses: settings that some objectives alone have a use for, and which these are.

    Returns:
        the seeds, and the shares of the learnt weights that are tried.

    Raises:
        SettingsError: naming the option.
    """
    least = least | {"passages": 2, "batch": 2, "negatives": 0, "kept_tokens": 0}
    seeds = check_training(settings, least, settings.batch)
    if not 0 <= settings.dropout < 1:
        raise SettingsError(f"--dropout {settings.dropout}: expected a number from 0 up, below 1")
    if settings.teacher_temperature is not None and not settings.teacher_temperature > 0:
        raise SettingsError(
            f"--teacher-temperature must be above 0, not {settings.teacher_temperature}"
        )
    for field in fields(settings):
        unused = objective not in uses.get(field.name, {objective})
        if unused and getattr(settings, field.name) != field.default:
            option = field.name.replace("_", "-")
            raise SettingsError(f"--objective {objective} has no use for --{option}")
    return seeds, shares_of(settings.average)


def teacher_temperature(settings: ListSettings, *, by_generator: bool) -> float:
    """Return what the teacher's scores are divided by.

    A generator's judgements lie within a nat a token, and are uncertain undivided: what learns from
    that learns to tell nothing apart.
    """
    if settings.teacher_temperature is None:
        return 0.03 if by_generator else 1.0
    return settings.teacher_temperature


def shares_of(text: str) -> list[float]:
    """Read `--average`: the shares of the learnt weights that are tried.

    Raises:
        SettingsError: it is no share, nor `sweep`.
    """
    if text == "sweep":
        return list(SWEPT)
    try:
        share = float(text)
    except ValueError:
        share = math.nan
    if not 0 < share <= 1:
        raise SettingsError(f"--average {text!r}: expected a share above 0, up to 1, or sweep")
    return [share]


def loop_of(settings: ListSettings, questions: int, seed: int, rate: float) -> LoopSettings:
    """Return how so many questions are trained on; `rate` if no learning rate is set."""
    return loop_settings(
        settings,
        questions,
        seed,
        rate,
        micro_batch=settings.batch,
        weight_decay=settings.weight_decay,
        precision=settings.precision,
    )
