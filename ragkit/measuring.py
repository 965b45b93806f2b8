"""The command that measures: `ragkit evaluate`."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal, TypeVar

from cyclopts import Parameter

from .artefacts import file_record
from .assemble import PipelineSettings, assemble, load_generator, open_index, resolved
from .console import parse_where, print_json, print_tables, progress_bars, say
from .errors import SettingsError
from .types import Example, Progress, Qrels, Query, Reader

if TYPE_CHECKING:
    from .evaluation.probes import ProbeScores
    from .evaluation.results import Results
    from .readers import TextGenerator

Reading = Annotated[PipelineSettings, Parameter(name="*")]
READING = PipelineSettings()
Number = TypeVar("Number", int, float)
Where = Annotated[list[str] | None, Parameter(negative="")]


@dataclass(frozen=True, kw_only=True)
class EvaluationSettings:
    """What is evaluated, by which questions, and how deep."""

    questions: Path | None = None
    """The questions with their answers, in any form that ragkit reads."""
    output: Path | None = None
    """The run folder to write: report.html, results.json, answers.jsonl, run.trec and more."""
    qrels: Path | None = None
    """Which documents are relevant, in TREC or BEIR form; only questions that it judges are
    asked."""
    run: Path | None = None
    """Score this TREC run of any system by --qrels, and nothing else; needs no index."""
    reader: bool = True
    """Whether questions are answered; --no-reader measures retrieval alone."""
    contexts: str = ""
    """What else the reader is given, to tell how it uses its passages: some of none,retrieved,
    gold,gold+distractors,wrong,shuffled."""
    noise: str = ""
    """Shares of distractors among the passages, such as 0,0.5,0.75,1; one gold passage reaches 0,
    0.5, 0.67, 0.75, 0.8 and so on."""
    token_counts: str = ""
    """Numbers of virtual tokens, such as 0,1,5,10,50: every context of --contexts (or else what was
    retrieved) is read with each of them as well."""
    need: Literal["any", "all"] = "any"
    """Whether a question needs one relevant document or all (multi-hop)."""
    probes: Annotated[list[Path] | None, Parameter(negative="", consume_multiple=True)] = None
    """Files of general ability (multiple choice, answers, or texts) that the generator is scored
    on."""
    probe_limit: int | None = None
    """Only the first items of each probe."""
    judge: str | None = None
    """A generator that judges whether answers are correct and rest on their passages, by name."""
    judge_server: str | None = None
    """The OpenAI-compatible server of the judge; without it the judge is a local model."""
    all_questions: bool = False
    """Ask the questions that the qrels do not judge, too (unanswerable ones, say)."""
    limit: int | None = None
    """Only the first questions of the file."""
    replace: bool = False
    """Replace the run folder that is there."""


EVALUATION = EvaluationSettings()


def evaluate(
    *,
    settings: Reading = READING,
    evaluation: Annotated[EvaluationSettings, Parameter(name="*")] = EVALUATION,
    where: Where = None,
    json: bool = False,
) -> None:
    """Measure retrieval and answers over a file of questions, and write a run folder.

    Example: ragkit evaluate --index kb --questions dev.jsonl --qrels dev.tsv --output run

    Parameters
    ----------
    where
        FIELD=VALUE: only documents with such metadata; may be given several times.
    json
        Print the results as JSON.
    """
    from .artefacts import check_output
    from .evaluation.folder import MARK

    if evaluation.output:
        check_output(evaluation.output, evaluation.replace, MARK)
    if evaluation.run:
        results = _score_run(evaluation, settings.seed)
    else:
        results = _measure(settings, evaluation, where)
    if json:
        print_json(results.to_json())
    else:
        from .evaluation.report import run_tables

        print_tables(run_tables(results, title=str(evaluation.output or evaluation.run)))
        if evaluation.output:
            say(f"To read question by question: {evaluation.output / 'report.html'}")


def _measure(
    settings: PipelineSettings, evaluation: EvaluationSettings, where: Sequence[str] | None
) -> Results:
    from .corpus import read_qrels
    from .evaluation.contexts import check_contexts, check_token_counts
    from .evaluation.runs import evaluate as measure
    from .readers import GeneratorReader

    if not evaluation.questions or not evaluation.output:
        raise SettingsError("evaluate needs --questions and --output, or --run and --qrels")
    contexts = _names(evaluation.contexts)
    noise = [_number(float, share, "--noise") for share in _names(evaluation.noise)]
    counts = [_number(int, count, "--token-counts") for count in _names(evaluation.token_counts)]
    check_contexts(contexts, noise)
    qrels = read_qrels(evaluation.qrels) if evaluation.qrels else None
    examples = _examples(evaluation, qrels, where)
    index = open_index(settings)
    settings = resolved(settings, index)
    with progress_bars() as progress:
        pipeline = assemble(
            settings,
            index,
            read=evaluation.reader,
            progress=lambda done, total: progress("read", done, total),
        )
        check_token_counts(counts, pipeline.reader)
        if isinstance(reader := pipeline.reader, GeneratorReader):
            settings = replace(settings, prompt=reader.style.name)
            most = max([reader.use_tokens, *counts])
            for example in examples:  # one too long for the generator is refused before any work
                reader.prompt(example.query, (), most)
        return measure(
            pipeline,
            examples,
            qrels=qrels,
            corpus=index,
            need=evaluation.need,
            contexts=contexts,
            noise=noise,
            token_counts=counts,
            judge=_judge(settings, evaluation),
            probes=_probes(pipeline.reader, evaluation, progress),
            output=evaluation.output,
            replace=evaluation.replace,
            settings={
                "command": {name: _plain(value) for name, value in asdict(settings).items()},
                "questions": file_record(evaluation.questions),
                "qrels": file_record(evaluation.qrels),
                "index": index.fingerprint(),
                "reader": evaluation.reader,
            },
            progress=progress,
            seed=settings.seed,
        )


def _examples(
    evaluation: EvaluationSettings, qrels: Qrels | None, where: Sequence[str] | None
) -> list[Example]:
    """Return the questions that the qrels judge, and the first of them if there is a limit."""
    from .corpus import read_questions

    limit, questions = evaluation.limit, evaluation.questions
    if limit is not None and limit < 1:
        raise SettingsError(f"--limit must be at least 1, not {limit}")
    examples = read_questions(questions) if questions else []
    if qrels is not None and not evaluation.all_questions:
        examples = [e for e in examples if e.query.id in qrels] or examples
    examples = examples[:limit]
    queries = filtered([example.query for example in examples], where)
    return [replace(e, query=query) for e, query in zip(examples, queries, strict=True)]


def _probes(
    reader: Reader | None, evaluation: EvaluationSettings, progress: Progress
) -> list[ProbeScores]:
    from .evaluation.probe_files import read_probe
    from .evaluation.probes import run_probe
    from .models.names import cache_folder

    if not evaluation.probes:
        return []
    model: Any = getattr(reader, "generator", None)
    if not hasattr(model, "loglikelihoods"):
        raise SettingsError("--probes needs a local generator: no other tells its likelihoods")
    return [
        run_probe(
            model,
            probe,
            limit=evaluation.probe_limit,
            progress=progress,
            cache=cache_folder() / "probes",
        )
        for probe in map(read_probe, evaluation.probes)
    ]


def _judge(settings: PipelineSettings, evaluation: EvaluationSettings) -> TextGenerator | None:
    if evaluation.judge is None:
        if evaluation.judge_server:
            raise SettingsError("--judge-server needs --judge, the judge's name there")
        return None
    return load_generator(
        replace(
            settings,
            generator=evaluation.judge,
            server=evaluation.judge_server,
            virtual_tokens=None,
        )
    )


def _score_run(evaluation: EvaluationSettings, seed: int) -> Results:
    from .corpus import read_qrels, read_questions, read_run
    from .evaluation.runs import evaluate_run

    if not evaluation.run or not evaluation.qrels:
        raise SettingsError("--run needs --qrels, by which it is scored")
    return evaluate_run(
        read_run(evaluation.run),
        read_qrels(evaluation.qrels),
        examples=read_questions(evaluation.questions) if evaluation.questions else None,
        output=evaluation.output,
        replace=evaluation.replace,
        settings={"run": file_record(evaluation.run), "qrels": file_record(evaluation.qrels)},
        seed=seed,
    )


def _names(text: str) -> list[str]:
    return [name.strip() for name in text.split(",") if name.strip()]


def _number(kind: Callable[[str], Number], text: str, option: str) -> Number:
    try:
        return kind(text)
    except ValueError:
        what = "whole number" if kind is int else "number"
        raise SettingsError(f"{option} holds {text!r}, which is no {what}") from None


def filtered(queries: Sequence[Query], conditions: Sequence[str] | None) -> list[Query]:
    """Give a command's filter to queries, beside the ones of their own."""
    where = parse_where(conditions or [])
    return [Query(query.id, query.text, {**where, **query.where}) for query in queries]


def _plain(value: Any) -> Any:
    return str(value) if isinstance(value, Path) else value
