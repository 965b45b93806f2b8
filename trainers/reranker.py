"""`ragkit-train reranker`: questions with documents in, a cross-encoder out."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from cyclopts import Parameter

from ragkit.assemble import RetrievalSettings, open_index, resolved
from ragkit.errors import SettingsError
from ragkit.types import Example, Hit, Progress, Qrels

from .list_settings import ListSettings, check_lists, loop_of, teacher_temperature
from .positives import train_and_dev
from .questions import ranked
from .reranker_results import advice, card, results_of
from .results import finish, saving, tables
from .runs import check_state, each_seed, json_values, own_device, records, training_state
from .supervision import GeneratorLists, taught

if TYPE_CHECKING:
    from ragkit.models.cross_encoder import CrossEncoder
    from ragkit.stores.index import Index
    from ragkit.training.keeper import History
    from ragkit.training.reranker_runs import Ranked, RerankerRun


@Parameter(name="*")
@dataclass(frozen=True, kw_only=True)
class RerankerSettings(ListSettings):
    """What a cross-encoder learns, from what, and how."""

    objective: Literal["bce", "listwise", "distil", "utility"] = "bce"
    """Learn of each document whether it is relevant; the order of a list; another cross-encoder's
    scores; or how likely a document makes the answer, as a generator judges it."""
    batch: int = 16
    dev_limit: int = 100
    depth: int = 20
    """Hits of a dev question that are reranked."""
    max_length: int = 256
    """Tokens of a question and a document together; what is more is cut."""


USES = {
    "teacher": {"distil"},
    "teacher_temperature": {"distil", "utility"},
    "generator": {"utility"},
    "passages": {"utility"},
}
"""The settings that some objectives alone have a use for, and which these are."""


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

    seeds, shares = check(settings)
    with training_state(settings) as (state, progress):
        device = own_device(settings.device)
        run, dev, data = prepared(settings, str(device), progress)
        values = json_values(settings)
        check_state(state, values, data, {"average"})
        learnt = each_seed(seeds, state, progress, partial(_learn, run, settings))
        if not processes(device).is_main_process:
            return
        results, models = results_of(run, dev, seeds, learnt, shares, progress)
        results |= {"data": data, "settings": values}
    save = {seed: saving(each.model) for seed, each in models.items()}
    told = [f"{settings.output}: a cross-encoder made of {settings.base}", advice(results)]
    finish(settings, state, save, results, card(results), tables(results), told, json=json)


def check(settings: RerankerSettings) -> tuple[list[int], list[float]]:
    """Refuse what could not work, before any work is done.

    Returns:
        the seeds, and the shares of the learnt weights that are tried.

    Raises:
        SettingsError: naming the option.
    """
    if settings.objective in ("bce", "listwise") and settings.negatives == 0:
        raise SettingsError("a reranker needs negatives: --negatives 1 or more")
    return check_lists(settings, settings.objective, {"depth": 2, "max_length": 8}, USES)


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
                relisted=False,
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
    data = records(settings, "examples", "qrels", "dev_questions", "dev_qrels")
    data |= {"train": len(train), "dev": len(dev.queries), "index": index.fingerprint()}
    run = RerankerRun(
        settings.base,
        teacher_temperature=teacher_temperature(settings, by_generator=by_answers),
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
    run: RerankerRun, settings: RerankerSettings, seed: int, folder: Path, progress: Progress
) -> tuple[CrossEncoder, History]:
    loop = loop_of(settings, len(run.questions), seed, 1e-4)
    return run.learn(loop, folder, progress=progress)
