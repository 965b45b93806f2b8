"""`ragkit-train reranker`: questions with documents in, a cross-encoder out."""

from __future__ import annotations

import math
import shutil
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from cyclopts import Parameter

from ragkit.artefacts import check_output, file_record, new_folder
from ragkit.assemble import RetrievalSettings, open_index, resolved
from ragkit.console import print_json, print_tables, progress_bars, say
from ragkit.errors import SettingsError
from ragkit.types import Example, Hit, Progress, Qrels

from .questions import ranked, train_and_dev
from .reranker_results import card, results_of, saver
from .results import MARK, tables, write
from .runs import check_state, json_values, own_device, training_state, whole_numbers
from .supervision import GeneratorLists, taught

if TYPE_CHECKING:
    from ragkit.models.cross_encoder import CrossEncoder
    from ragkit.stores.index import Index
    from ragkit.training.keeper import History
    from ragkit.training.reranker_runs import Ranked, RerankerRun


@Parameter(name="*")
@dataclass(frozen=True, kw_only=True)
class RerankerSettings:
    """What is learnt, from what, and how."""

    examples: Path
    """Questions with positives and negatives, such as ragkit-train negatives writes; with
    --objective utility, any questions with answers."""
    index: Path
    """The index folder whose hits are reranked."""
    output: Path
    """The folder for the cross-encoder."""
    base: str = "all-MiniLM-L6-v2"
    """The cross-encoder or sentence encoder to start from, by folder or name."""
    qrels: Path | None = None
    """The relevant documents are the positives, and only questions that have some are taken."""
    objective: Literal["bce", "listwise", "distil", "utility"] = "bce"
    """Learn of each document whether it is relevant; the order of a list; another cross-encoder's
    scores; or how likely a document makes the answer, as a generator judges it."""
    dev_questions: Path | None = None
    """Questions to evaluate on; --examples if --dev-qrels are given, else some are held out."""
    dev_qrels: Path | None = None
    """Their qrels."""
    limit: int | None = None
    """Questions to train on, drawn at random; all if not given."""
    dev_limit: int = 100
    """Questions to evaluate on, drawn at random."""
    retriever: Literal["bm25", "dense", "hybrid"] | None = None
    """What finds the hits; hybrid if the index has both stores."""
    depth: int = 20
    """Hits of a dev question that are reranked."""
    negatives: int | None = None
    """Negatives of a question in a batch, drawn from its own: 3, or all for distil and utility."""
    teacher: str | None = None
    """The cross-encoder that is distilled; without one, the scores that the examples have."""
    generator: str = "SmolLM2-135M-Instruct"
    """The generator whose judgement is learnt with --objective utility."""
    passages: int = 8
    """Documents of a question that the generator judges."""
    teacher_temperature: float = 1.0
    """What the scores of teacher or generator are divided by."""
    seeds: str = "0"
    """Seeds, such as 0,1,2: each is learnt apart; the best on dev is kept."""
    epochs: float = 1.0
    """Passes through the questions."""
    steps: int | None = None
    """Optimiser steps, in place of --epochs."""
    batch: int = 16
    """Questions in a step, over all processes."""
    learning_rate: float = 1e-4
    """The highest learning rate."""
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
    max_length: int | None = 256
    """Tokens of a question and a document together; what is more is cut."""
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


def reranker(*, settings: RerankerSettings, json: bool = False) -> None:
    """Fine-tune a cross-encoder, and measure what reranking by it changes on dev questions.

    Example: ragkit-train reranker --examples train.jsonl --index kb --output models/reranker

    On several processes: torchrun --nproc-per-node 2 -m ragkit.trainers reranker …
    A run that was stopped goes on when the same command is given again.

    Parameters
    ----------
    json
        Print the results as JSON.
    """
    from ragkit.training.keeper import processes

    check_output(settings.output, settings.replace, MARK)
    seeds = check(settings)
    with training_state(settings.output) as state, progress_bars() as progress:
        device = own_device(settings.device)
        run, dev, data = prepared(settings, str(device), progress)
        values = json_values(settings)
        check_state(state, values, data)
        learnt = [_learn(run, settings, seed, state, progress) for seed in seeds]
        if not processes(device).is_main_process:
            return
        results = results_of(dev, seeds, learnt, progress)
        results |= {"data": data, "settings": values}
    with new_folder(settings.output, replace=settings.replace, mark=MARK) as folder:
        models = zip(seeds, learnt, strict=True)
        save = {str(seed): saver(model) for seed, (model, _) in models}
        write(folder, save, results, card(results))
    shutil.rmtree(state, ignore_errors=True)
    if json:
        print_json(results)
    else:
        print_tables(tables(results))
        say(f"{settings.output}: a cross-encoder made of {settings.base}")


def check(settings: RerankerSettings) -> list[int]:
    """Refuse numbers that could not work, before any work is done, and return the seeds.

    Raises:
        SettingsError: naming the option.
    """
    least = {"dev_limit": 2, "depth": 2, "passages": 2, "batch": 1, "steps": 1, "negatives": 1}
    least |= {"evaluate_every": 1, "kept_tokens": 0, "max_length": 8}
    for name, low in least.items():
        value = getattr(settings, name)
        if value is not None and value < low:
            raise SettingsError(f"--{name.replace('_', '-')} must be at least {low}, not {value}")
    if not 0 < settings.epochs < math.inf or not 0 <= settings.dropout < 1:
        raise SettingsError(
            f"--epochs {settings.epochs} and --dropout {settings.dropout}: expected a number above "
            "0, and one from 0 to 1"
        )
    if settings.objective != "distil" and settings.teacher:
        raise SettingsError(f"--objective {settings.objective} has no use for a --teacher")
    if not settings.teacher_temperature > 0:
        raise SettingsError(
            f"--teacher-temperature must be above 0, not {settings.teacher_temperature}"
        )
    return whole_numbers(settings.seeds, "--seeds")


def prepared(
    settings: RerankerSettings, device: str, progress: Progress
) -> tuple[RerankerRun, Ranked, dict[str, Any]]:
    """Read the questions, retrieve for those of dev, and put together what seeds share."""
    from ragkit.training.keeper import processes
    from ragkit.training.lists import listed
    from ragkit.training.reranker_runs import RerankerRun

    index = open_index(RetrievalSettings(index=settings.index))
    by_answers = settings.objective == "utility"
    train, asked, qrels = train_and_dev(settings, index, by_answers=by_answers)
    shared: dict[str, Any] = {"objective": settings.objective, "negatives": settings.negatives}
    with processes(own_device(device)).main_process_first():  # the others find what it has kept
        dev = _dev(settings, index, asked, qrels, device, progress)
        if by_answers:
            lists = GeneratorLists.first(
                index,
                train,
                generator=settings.generator,
                retriever=settings.retriever,
                passages=settings.passages,
                device=device,
                progress=progress,
            )
            shared |= {"objective": "distil", "questions": lists.questions}
            shared |= {"documents": index.documents}
        else:
            scores = None
            if settings.objective == "distil":
                scores = taught(train, settings.teacher, device, progress)
            elif settings.negatives is None:
                shared["negatives"] = 3
            questions, documents = listed(train, scores)
            shared |= {"questions": questions, "documents": documents}
    files = ("examples", "qrels", "dev_questions", "dev_qrels")
    data: dict[str, Any] = {name: file_record(getattr(settings, name)) for name in files}
    data |= {"train": len(train), "dev": len(dev.queries), "index": index.fingerprint()}
    run = RerankerRun(
        settings.base,
        teacher_temperature=settings.teacher_temperature,
        dev=dev,
        max_length=settings.max_length,
        device=device,
        dropout=settings.dropout,
        kept_tokens=settings.kept_tokens,
        **shared,
    )
    return run, dev, data


def _dev(
    settings: RerankerSettings,
    index: Index,
    examples: Sequence[Example],
    qrels: Qrels,
    device: str,
    progress: Progress,
) -> Ranked:
    """Retrieve for the dev questions.

    Raises:
        SettingsError: they have no judgements.
    """
    from ragkit.training.reranker_runs import Ranked

    judged = [example.query for example in examples if example.query.id in qrels]
    if not judged:
        raise SettingsError(
            "a reranker is evaluated by qrels: pass --dev-qrels, or --qrels of questions that some "
            "can be held out of"
        )
    by = RetrievalSettings(index=settings.index, retriever=settings.retriever, device=device)
    found = ranked(index, judged, resolved(by, index), settings.depth, progress)
    hits = [[Hit(index.documents[row], score) for row, score in rows] for rows in found]
    return Ranked(judged, hits, {query.id: qrels[query.id] for query in judged})


def _learn(
    run: RerankerRun, settings: RerankerSettings, seed: int, state: Path, progress: Progress
) -> tuple[CrossEncoder, History]:
    from ragkit.training.keeper import LoopSettings

    folder = state / f"seed-{seed}"
    folder.mkdir(parents=True, exist_ok=True)
    steps = settings.steps or max(1, round(settings.epochs * len(run.questions) / settings.batch))
    loop = LoopSettings(
        steps=steps,
        batch=settings.batch,
        learning_rate=settings.learning_rate,
        schedule=settings.schedule,
        warmup=settings.warmup,
        weight_decay=settings.weight_decay,
        clip=settings.clip,
        evaluate_every=settings.evaluate_every or max(1, math.ceil(steps / 4)),
        seed=seed,
        precision=settings.precision,
        report_to=tuple(name for name in settings.report_to.split(",") if name),
    )
    return run.learn(
        loop,
        folder,
        progress=lambda stage, done, total: progress(f"train, seed {seed}", done, total),
    )
