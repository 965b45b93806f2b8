"""`ragkit-train retriever`: questions with documents in, an encoder out."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ragkit.assemble import RetrievalSettings, load_encoder, open_index
from ragkit.errors import DataError, IndexStateError, ModelError, SettingsError
from ragkit.types import Example, Progress, Qrels

from .list_settings import loop_of
from .positives import train_and_dev
from .results import finish, saving, tables
from .retriever_results import card, results_of, with_prompts
from .retriever_settings import RetrieverSettings, check, loss_of
from .runs import check_state, each_seed, json_values, own_device, records, training_state
from .supervision import GeneratorLists, taught

if TYPE_CHECKING:
    from ragkit.models.bi_encoder import BiEncoder
    from ragkit.stores.index import Index
    from ragkit.training.dev_search import DevSearch
    from ragkit.training.keeper import History
    from ragkit.training.retriever_runs import RetrieverRun


@dataclass
class Prepared:
    """What a run is made of: the questions, and the lists of the generator where it teaches."""

    run: RetrieverRun
    dev: DevSearch
    train: Sequence[Example]
    lists: GeneratorLists | None
    data: dict[str, Any]


def retriever(*, settings: RetrieverSettings, json: bool = False) -> None:
    """Fine-tune the encoder of an index, and measure on dev questions what that changes.

    Example: ragkit-train retriever --examples train.jsonl --index kb --output models/retriever

    On several processes: torchrun --nproc-per-node 2 -m ragkit.trainers retriever …
    A run that was stopped goes on when the same command is given again. An encoder of both sides
    is given to the index by: ragkit-index refresh --index kb --encoder models/retriever

    Parameters
    ----------
    json
        Print the results as JSON.
    """
    from ragkit.training.keeper import processes

    seeds, shares = check(settings)
    with training_state(settings) as (state, progress):
        made = prepared(settings, progress)
        base = made.run.encoder.describe()
        values = json_values(settings)
        check_state(state, values, made.data | {"base": base["fingerprint"]}, {"average"})
        learnt = each_seed(seeds, state, progress, partial(_learn, made, settings))
        if not processes(made.run.encoder.model.device).is_main_process:
            return
        results, encoders = results_of(made.run, made.dev, seeds, learnt, shares, progress)
        results |= {"data": made.data, "settings": values, "loss": asdict(made.run.loss)}
        results["base"] |= {"unchanged": base["weights"] == _weights(made.run.encoder)}
    save = {seed: saving(with_prompts(encoder)) for seed, encoder in encoders.items()}
    told = [f"{settings.output}: an encoder made of {settings.base}"]
    if not settings.fixed:
        told += [f"next: ragkit-index refresh --index {settings.index} --encoder {settings.output}"]
    finish(settings, state, save, results, card(results), tables(results), told, json=json)


def _weights(encoder: BiEncoder) -> str:
    from ragkit.models.precision import weights_hash

    return weights_hash(encoder.model.state_dict())


def prepared(settings: RetrieverSettings, progress: Progress) -> Prepared:
    """Read the questions, open the index, load the base, and put together what seeds share."""
    from ragkit.training.keeper import processes
    from ragkit.training.retriever_runs import RetrieverRun

    index = open_index(RetrievalSettings(index=settings.index))
    train, dev_examples, qrels = train_and_dev(
        settings, index, by_answers=settings.objective == "lsr"
    )
    device = own_device(settings.device)
    encoder = _base(settings, index, str(device))
    dev = _dev(settings, index, dev_examples, qrels, encoder)
    data = records(settings, "examples", "qrels", "dev_questions", "dev_qrels")
    data |= {"train": len(train), "dev": len(dev.examples), "dev_documents": len(dev.rows)}
    data |= {"index": index.fingerprint()}
    shared: dict[str, Any] = {
        "loss": loss_of(settings, cosine=encoder.model.similarity_fn_name == "cosine"),
        "side": "adapter" if settings.adapter else settings.side,
        "dev": dev,
        "together": not settings.scattered,
        "lora": settings.lora,
        "dropout": settings.dropout,
        "kept_tokens": settings.kept_tokens,
    }
    lists: GeneratorLists | None = None
    if settings.objective == "lsr":
        with processes(device).main_process_first():  # the others find what the first has kept
            lists = GeneratorLists.first(
                index,
                train,
                generator=settings.generator,
                retriever=settings.retriever,
                passages=settings.passages,
                relisted=settings.relist_every is not None,
                device=str(device),
                progress=progress,
            )
        shared |= {"documents": index.documents, "questions": lists.questions}
        shared |= {"vectors": index.dense.vectors if settings.fixed else None}
        kept = lists if settings.relist_every else None  # else the generator may go
        return Prepared(RetrieverRun(encoder, **shared), dev, train, kept, data)
    if settings.objective in ("margin-mse", "kl"):
        with processes(device).main_process_first():
            scores = taught(train, settings.teacher, str(device), progress)
    else:
        scores = None
    shared |= _lists(settings, index, train, scores)
    return Prepared(RetrieverRun(encoder, **shared), dev, train, None, data)


def _lists(
    settings: RetrieverSettings,
    index: Index,
    train: Sequence[Example],
    scores: dict[tuple[str, str], float] | None,
) -> dict[str, Any]:
    """Return the documents, the questions on them, and how their vectors are found."""
    import numpy as np

    from ragkit.training.lists import listed

    questions, documents = listed(train, scores)
    negatives = settings.negatives
    if negatives is None and settings.objective in ("contrastive", "query-adapter"):
        negatives = 1
    given: dict[str, Any] = {"documents": documents, "questions": questions}
    given |= {"negatives": negatives}
    if settings.fixed:
        rows = index.documents.rows
        missing = [each.id for each in documents if each.id not in rows]
        if missing:
            raise DataError(
                f"{len(missing)} of {len(documents)} documents of the examples are not in "
                f"{settings.index}, such as {missing[:3]}. Make the examples from this index: "
                "ragkit-train negatives"
            )
        places = np.array([rows[each.id] for each in documents])
        given |= {"vectors": lambda numbers: index.dense.vectors(places[numbers])}
    return given


def _base(settings: RetrieverSettings, index: Index, device: str) -> BiEncoder:
    """Load the base: as the index was built with it, prompts and all, if it is the index's encoder.

    Raises:
        IndexStateError: documents are to keep the index's vectors, and these are another encoder's.
        ModelError: the base cannot be trained.
    """
    from ragkit.models.bi_encoder import BiEncoder
    from ragkit.stores.embeddings import same_documents
    from ragkit.training.query_side import check_symmetric

    encoder = BiEncoder.load(settings.base, device=device, precision="fp32")
    check_symmetric(encoder.model, settings.base)
    built = index.manifest.get("encoder")
    if built is not None and built.get("weights") == encoder.describe()["weights"]:
        by = RetrievalSettings(encoder=settings.base, device=device, precision="fp32")
        encoder = load_encoder(by, index)
    if settings.fixed and (built is None or not same_documents(built, encoder.describe())):
        name = built["name"] if built else "none"
        raise IndexStateError(
            f"{settings.index}: its vectors are by the encoder {name!r}, and the base is "
            f"{encoder.name!r}. To learn the query side alone, start from the index's encoder, or "
            f"give the index this one: ragkit-index refresh --index {settings.index} --encoder "
            f"{encoder.name}"
        )
    largest = max(loss_of(settings, cosine=True).dimensions, default=0)
    if largest > encoder.dimension:
        raise SettingsError(
            f"--matryoshka {settings.matryoshka}: the encoder has {encoder.dimension} components"
        )
    return encoder


def _dev(
    settings: RetrieverSettings,
    index: Index,
    examples: Sequence[Example],
    qrels: Qrels,
    encoder: BiEncoder,
) -> DevSearch:
    from ragkit.training.dev_search import DevSearch

    dev = DevSearch(index, examples, qrels, settings.dev_documents)
    if not settings.fixed:
        dev.narrow(encoder)
    return dev


def _learn(
    made: Prepared, settings: RetrieverSettings, seed: int, folder: Path, progress: Progress
) -> tuple[BiEncoder, History]:
    run = made.run
    if made.lists is not None and settings.relist_every is not None:
        anew = made.lists.anew(settings.relist_every, folder, both=not settings.fixed)
        run = replace(run, questions=anew)
    rate = 1e-3 if settings.adapter else 3e-5 if settings.objective == "lsr" else 1e-4
    loop = loop_of(settings, len(made.train), seed, rate)
    learnt, history = run.learn(loop, folder, progress=progress)
    if settings.fixed and learnt.describe()["base"] != run.encoder.describe()["fingerprint"]:
        raise ModelError(
            f"seed {seed}: the documents' side of what was learnt is not that of {settings.base}, "
            "which was to stay as it is. This is a fault of ragkit: please report it."
        )
    return learnt, history
