"""`ragkit-train generator`: questions with answers in, a generator that reads passages out."""

from __future__ import annotations

from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ragkit.artefacts import write_json
from ragkit.assemble import RetrievalSettings, open_index
from ragkit.console import print_json, print_tables, say
from ragkit.corpus import read_documents, read_qrels
from ragkit.errors import ModelError, SettingsError
from ragkit.types import Example, Progress, Qrels

from .generator_report import card, tables
from .generator_results import Outcome, copied, loaded, loop_of, outcome_of, said_by
from .generator_settings import Checked, GeneratorSettings, check
from .positives import with_positives
from .questions import answered_and_dev, hash_of, retrieved
from .results import finish
from .runs import (
    MARK,
    check_state,
    each_seed,
    json_values,
    own_device,
    records,
    training_state,
)

if TYPE_CHECKING:
    import torch

    from ragkit.models.generator import Generator
    from ragkit.training.generator_runs import GeneratorRun
    from ragkit.training.keeper import History
    from ragkit.training.remedies import Remedies

_FREE = {"average", "max_forgetting", "probes", "probe_limit"}
_CANDIDATES = 20  # hits of a question that distractors are drawn from


def generator(*, settings: GeneratorSettings, json: bool = False) -> None:
    """Fine-tune a generator to use what was retrieved, and measure what it gains and forgets.

    Example: ragkit-train generator --index kb --questions questions.jsonl --output reader

    The base stays as it is. `ragkit ask --generator reader` then asks with the prompt that was
    trained with.
    On several processes: torchrun --nproc-per-node 2 -m ragkit.trainers generator …
    A run that was stopped goes on when the same command is given again.

    Parameters
    ----------
    json
        Print the results as JSON.
    """
    from ragkit.models.precision import weights_hash
    from ragkit.training.keeper import processes

    checked = check(settings)
    with training_state(settings) as (state, progress):
        run, data = prepared(settings, checked, progress)
        weights = weights_hash(run.generator.model.state_dict())
        check_state(state, json_values(settings), data | {"weights": weights}, _FREE)
        main = processes(run.generator.model.device).is_main_process
        before = said_by(_served(run, settings), run, settings, checked, progress) if main else None
        learnt = each_seed(checked.seeds, state, progress, partial(_learn, run, settings))
        if before is None:
            return
        outcome = outcome_of(run, settings, checked, learnt, before, state, progress)
        results = outcome.results | {"data": data}
        after = weights_hash(run.generator.model.state_dict())
        results["base"] = {"weights": weights, "unchanged": weights == after}
        _gate(settings, outcome, results, state, json=json)
    save = {
        str(seed): partial(copied, folder)
        for seed, folder in zip(checked.seeds, outcome.folders, strict=True)
    }
    what = "an adapter" if run.rank else "all weights"
    told = [f"{settings.output}: {what} of {settings.base}; ask with --generator {settings.output}"]
    if redrawn := results["mix"]["redrawn"]:
        lacked = ", ".join(f"{count} of {kind}" for kind, count in redrawn.items())
        told.append(f"contexts that questions had nothing for became others: {lacked}")
    finish(settings, state, save, results, card(results), tables(results), told, json=json)


def _served(run: GeneratorRun, settings: GeneratorSettings) -> Generator:
    """Return the base as it answers: what is trained whole is held in fp32 while it is."""
    return loaded(run.generator.name, run, settings) if settings.full else run.generator


def _gate(
    settings: GeneratorSettings,
    outcome: Outcome,
    results: dict[str, Any],
    state: Path,
    *,
    json: bool,
) -> None:
    """Fail where more was forgotten than may be, and tell of it.

    Raises:
        ModelError: naming the probe that lost most.
    """
    if settings.max_forgetting is None or outcome.forgetting <= settings.max_forgetting:
        return
    write_json(state / MARK, results)
    if json:
        print_json(results)
    else:
        print_tables(tables(results))
    sweep = "" if settings.average == "sweep" else ", and --average sweep goes on from there"
    raise ModelError(
        f"too much is forgotten: the probe {outcome.worst!r} lost {outcome.forgetting:.3f}, and "
        f"--max-forgetting is {settings.max_forgetting}. {settings.output} is not written; what "
        f"was learnt lies in {state} with its results{sweep}. Or "
        "train anew with --replay FILE, --keep-rows 1, or a lower --learning-rate."
    )


def prepared(
    settings: GeneratorSettings, checked: Checked, progress: Progress
) -> tuple[GeneratorRun, dict[str, Any]]:
    """Read questions, retrieve for them, and load the base."""
    from ragkit.training.keeper import processes
    from ragkit.training.token_runs import Retrieved

    train, dev = answered_and_dev(settings)
    device = own_device(settings.device)
    by = RetrievalSettings(
        index=settings.index,
        retriever=settings.retriever,
        encoder=settings.encoder,
        device=str(device),
    )
    asked = [_with_gold(by, *of) for of in _judged(settings, train, dev)]
    if len(asked[1][0]) < 2:
        raise SettingsError("at least 2 questions to evaluate on are needed whose gold is indexed")
    most = checked.passages[1]
    if checked.mix.shares.keys() & {"gold", "distractors"}:
        most = max(most, _CANDIDATES)
    with processes(device).main_process_first():  # the others find what the first has kept
        parts = [Retrieved(of, retrieved(of, by, most, progress), judged) for of, judged in asked]
    names = ("questions", "qrels", "dev_questions", "dev_qrels", "replay")
    sizes = {"train": len(parts[0].examples), "dev": len(parts[1].examples)}
    data = records(settings, *names) | sizes | {"passages": hash_of(parts)}
    return _run(settings, checked, parts, device), data


def _judged(
    settings: GeneratorSettings, train: list[Example], dev: list[Example]
) -> list[tuple[list[Example], Path, Path | None]]:
    """Return train and dev, each with its file and the qrels that judge it."""
    of_dev, asked = settings.dev_qrels or settings.qrels, settings.dev_questions
    if of_dev is not None and asked is not None and settings.dev_qrels is None:
        judged = read_qrels(of_dev)
        if not any(example.query.id in judged for example in dev):
            say(f"{asked}: {of_dev} judges none of these questions; --dev-qrels could")
            of_dev = None
    return [(train, settings.questions, settings.qrels), (dev, asked or settings.questions, of_dev)]


def _with_gold(
    by: RetrievalSettings, examples: list[Example], path: Path, qrels: Path | None
) -> tuple[list[Example], Qrels]:
    """Give questions the gold passages that qrels name in the index; return the judgements too."""
    if qrels is None or by.index is None:
        return examples, {} if qrels is None else read_qrels(qrels)
    found, judged, _ = with_positives(examples, path, qrels, open_index(by))
    if len(found) < len(examples):
        say(f"{path}: {len(examples) - len(found)} questions are left out: no gold in the index")
    return found, judged


def _run(
    settings: GeneratorSettings,
    checked: Checked,
    parts: Any,
    device: torch.device,
) -> GeneratorRun:
    """Load the base, and put together what all seeds share."""
    from ragkit.models.generator import Generator
    from ragkit.readers import GeneratorReader
    from ragkit.styles import style_named
    from ragkit.training.generator_loss import LOSSES
    from ragkit.training.generator_runs import GeneratorRun

    model = Generator.load(
        settings.base,
        device=str(device),
        precision="fp32" if settings.full else settings.precision,
        layout=None if settings.layout == "auto" else settings.layout,
    )
    train, dev = parts
    style = style_named(settings.prompt)
    reader = GeneratorReader(
        model,
        style=style,
        context_tokens=settings.context_tokens,
        max_new_tokens=settings.max_new_tokens,
    )
    loss = LOSSES[settings.loss]
    abstain = {"auto": None, "always": True, "never": False}[settings.abstain]
    run = GeneratorRun(
        model,
        style,
        reader.prompt,
        train,
        dev,
        checked.mix,
        checked.passages,
        rank=0 if settings.full else settings.lora or GeneratorRun.rank,
        loss=lambda logits, labels, count: loss(logits, labels, count, checked.smoothing),
        contexts={
            "citations": settings.citations,
            "all_gold": settings.all_gold,
            "abstain_retrieved": abstain,
        },
        remedies=_remedies(settings),
    )
    run.check()
    return run


def _remedies(settings: GeneratorSettings) -> Remedies:
    from ragkit.training.remedies import Remedies

    texts: list[str] = []
    if settings.replay is not None:
        texts = [document.contents for document in read_documents([settings.replay])]
    rows = settings.replay_rows if texts else 0
    return Remedies(texts, rows, settings.keep_rows, settings.remedy_weight)


def _learn(
    run: GeneratorRun, settings: GeneratorSettings, seed: int, folder: Path, progress: Progress
) -> tuple[Path, History]:
    return run.learn(loop_of(run, settings, seed), folder, progress=progress)
