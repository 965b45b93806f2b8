"""The settings of `ragkit-train retriever`."""

from __future__ import annotations

import math
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Literal

from cyclopts import Parameter

from ragkit.errors import SettingsError

from .runs import whole_numbers

if TYPE_CHECKING:
    from ragkit.training.keeper import LoopSettings
    from ragkit.training.retriever_loss import LossSettings

SWEPT = (0.25, 0.5, 0.75, 1.0)
"""The shares of the learnt weights that `--average sweep` tries."""


@Parameter(name="*")
@dataclass(frozen=True, kw_only=True)
class RetrieverSettings:
    """What is learnt, from what, and how."""

    examples: Path
    """Questions with positives and negatives, such as ragkit-train negatives writes; with --qrels
    or --objective lsr, any questions."""
    index: Path
    """The index folder that is searched: dev questions in all of it."""
    output: Path
    """The folder for the encoder."""
    base: str = "all-MiniLM-L6-v2"
    """The encoder to start from, by folder or name."""
    qrels: Path | None = None
    """The relevant documents are the positives, and only questions that have some are taken."""
    objective: Literal["contrastive", "margin-mse", "kl", "lsr", "query-adapter"] = "contrastive"
    """What is learnt: to tell positives from all else in a batch; a cross-encoder's margins, or its
    order of a list; the generator's, from answers alone; or a mere map of query vectors."""
    side: Literal["both", "query"] = "both"
    """Learn both sides, for which the index is then refreshed, or the query's, on the index as it
    is."""
    dev_questions: Path | None = None
    """Questions to evaluate on; --examples if --dev-qrels are given, else some are held out."""
    dev_qrels: Path | None = None
    """Their qrels; without any, documents that hold an answer are relevant."""
    limit: int | None = None
    """Questions to train on, drawn at random; all if not given."""
    dev_limit: int = 500
    """Questions to evaluate on, drawn at random."""
    dev_documents: int = 20_000
    """The most documents that dev questions are searched in; if there are more, those that are
    relevant or that the base finds, and others drawn at random."""
    negatives: int | None = None
    """Negatives of a question in a batch, drawn from its own: 1 for contrastive, else all."""
    teacher: str | None = None
    """The cross-encoder of margin-mse and kl; without one, the scores that the examples have."""
    generator: str = "SmolLM2-135M-Instruct"
    """The generator of lsr."""
    retriever: Literal["bm25", "dense", "hybrid"] | None = None
    """What finds the documents that the generator of lsr judges; hybrid if the index has both."""
    passages: int = 8
    """Documents of a question that the generator of lsr judges."""
    relist_every: int | None = None
    """Steps after which lsr retrieves documents anew with what it has learnt; never if not
    given."""
    temperature: float = 0.05
    """What similarities are divided by."""
    teacher_temperature: float = 1.0
    """What the teacher's scores are divided by, for kl and lsr."""
    direction: Literal["forward", "reverse"] = "forward"
    """KL of the teacher from the retriever, or the reverse."""
    matryoshka: str = ""
    """Learn vectors that can be cut to these components too, such as 384,192,96."""
    lora: int = 0
    """The rank of LoRA in the encoder, or of the query adapter; 0 learns all weights."""
    average: str = "1"
    """The share of what was learnt in the average with the base: a number from 0 to 1, or sweep,
    which takes the best on dev."""
    seeds: str = "0"
    """Seeds, such as 0,1,2: each is learnt apart; the best on dev is kept."""
    epochs: float = 1.0
    """Passes through the questions."""
    steps: int | None = None
    """Optimiser steps, in place of --epochs."""
    batch: int = 64
    """Questions in a step, over all processes."""
    scattered: bool = False
    """Draw a batch's questions from everywhere, not with others on the same document: more
    documents to encode."""
    learning_rate: float | None = None
    """The highest learning rate; 1e-4 if not given, for an adapter 1e-3."""
    schedule: Literal["linear", "cosine", "constant_with_warmup"] = "linear"
    """The course of the learning rate."""
    warmup: float = 0.1
    """The share of steps in which the learning rate rises."""
    weight_decay: float = 0.01
    """AdamW's weight decay."""
    clip: float = 1.0
    """The largest norm of the gradient."""
    dropout: float = 0.0
    """The share of activations that is dropped while learning."""
    evaluate_every: int | None = None
    """Steps between two evaluations, each followed by a checkpoint; a quarter of all if not
    given."""
    kept_tokens: int = 16_384
    """Tokens of a batch whose activations are kept; what is more is read twice, in less memory."""
    report_to: str = ""
    """Where training is reported to, by transformers' names, such as tensorboard."""
    device: str | None = None
    """Where models run: cpu, cuda, mps; the best one here if not given."""
    precision: Literal["fp32", "bf16"] = "fp32"
    """The number format of activations while learning."""
    replace: bool = False
    """Replace the output that is there."""

    @property
    def adapter(self) -> bool:
        """Whether a map of query vectors is learnt."""
        return self.objective == "query-adapter"

    @property
    def fixed(self) -> bool:
        """Whether documents keep the vectors that the index holds."""
        return self.adapter or self.side == "query"


def check(settings: RetrieverSettings) -> tuple[list[int], list[float]]:
    """Refuse numbers that could not work, before any work is done.

    Returns:
        the seeds, and the shares of the learnt weights that are tried.

    Raises:
        SettingsError: naming the option.
    """
    least = {"dev_limit": 2, "dev_documents": 1, "passages": 2, "batch": 2, "steps": 1, "lora": 0}
    least |= {"negatives": 0, "relist_every": 1, "evaluate_every": 1, "kept_tokens": 0}
    for name, low in least.items():
        value = getattr(settings, name)
        if value is not None and value < low:
            raise SettingsError(f"--{name.replace('_', '-')} must be at least {low}, not {value}")
    if not 0 < settings.epochs < math.inf or not 0 <= settings.dropout < 1:
        raise SettingsError(
            f"--epochs {settings.epochs} and --dropout {settings.dropout}: expected a number above "
            "0, and one from 0 to 1"
        )
    if settings.objective not in ("margin-mse", "kl") and settings.teacher:
        raise SettingsError(f"--objective {settings.objective} has no use for a --teacher")
    if settings.objective != "lsr" and settings.relist_every:
        raise SettingsError(f"--objective {settings.objective} has no lists to --relist-every")
    if settings.adapter and settings.matryoshka:
        raise SettingsError("--matryoshka does not go with --objective query-adapter")
    loss_of(settings)
    return whole_numbers(settings.seeds, "--seeds"), _shares(settings.average)


def _shares(text: str) -> list[float]:
    if text == "sweep":
        return list(SWEPT)
    try:
        share = float(text)
    except ValueError:
        share = math.nan
    if not 0 < share <= 1:
        raise SettingsError(f"--average {text!r}: expected a share above 0, up to 1, or sweep")
    return [share]


def loss_of(settings: RetrieverSettings) -> LossSettings:
    """Return what is minimised."""
    from ragkit.training.retriever_loss import LossSettings

    named = {"lsr": "kl", "query-adapter": "contrastive"}
    objective: str = named.get(settings.objective, settings.objective)
    sizes = whole_numbers(settings.matryoshka, "--matryoshka") if settings.matryoshka else []
    return LossSettings(
        objective,  # type: ignore[arg-type]
        settings.temperature,
        settings.teacher_temperature,
        settings.direction,
        tuple(sizes),
    )


def loop_of(settings: RetrieverSettings, questions: int, seed: int) -> LoopSettings:
    """Return how so many questions are trained on."""
    from ragkit.training.keeper import LoopSettings

    steps = settings.steps or max(1, round(settings.epochs * questions / settings.batch))
    return LoopSettings(
        steps=steps,
        batch=settings.batch,
        learning_rate=settings.learning_rate or (1e-3 if settings.adapter else 1e-4),
        schedule=settings.schedule,
        warmup=settings.warmup,
        weight_decay=settings.weight_decay,
        clip=settings.clip,
        evaluate_every=settings.evaluate_every or max(1, math.ceil(steps / 4)),
        seed=seed,
        precision=settings.precision,
        report_to=tuple(name for name in settings.report_to.split(",") if name),
    )
