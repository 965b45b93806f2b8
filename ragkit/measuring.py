"""The commands that measure: `ragkit evaluate`, `compare`, `leaks`."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict
from dataclasses import replace as changed
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal

from cyclopts import Parameter

from .assemble import PipelineSettings, assemble, load_generator, open_index
from .console import parse_where, print_json, progress_bars
from .errors import SettingsError
from .types import Example, Qrels, Query

if TYPE_CHECKING:
    from .evaluation.results import Results
    from .readers import TextGenerator

Reading = Annotated[PipelineSettings, Parameter(name="*")]
READING = PipelineSettings()
Where = Annotated[list[str] | None, Parameter(negative="")]


def evaluate(
    *,
    settings: Reading = READING,
    questions: Path | None = None,
    output: Path | None = None,
    qrels: Path | None = None,
    run: Path | None = None,
    reader: bool = True,
    contexts: str = "",
    noise: str = "",
    need: Literal["any", "all"] = "any",
    judge: str | None = None,
    judge_server: str | None = None,
    all_questions: bool = False,
    limit: int | None = None,
    where: Where = None,
    replace: bool = False,
    json: bool = False,
) -> None:
    """Measure retrieval and answers over a file of questions, and write a run folder.

    Example: ragkit evaluate --index kb --questions dev.jsonl --qrels dev.tsv --output run

    Parameters
    ----------
    questions
        The questions with their answers, in any form that ragkit reads.
    output
        The run folder to write: results.json, report.html, answers.jsonl, run.trec and more.
    qrels
        Which documents are relevant, in TREC or BEIR form; only questions that it judges are asked.
    run
        Score this TREC run of any system by --qrels, and nothing else; needs no index.
    reader
        Whether questions are answered; --no-reader measures retrieval alone.
    contexts
        What else the reader is given, to tell how it uses its passages: some of none,retrieved,
        gold,gold+distractors,wrong,shuffled.
    noise
        Shares of distractors among the passages, such as 0,0.5,0.75,1.
    need
        Whether a question needs one relevant document or all (multi-hop).
    judge
        A generator that judges whether answers are correct and rest on their passages, by name.
    judge_server
        The OpenAI-compatible server of the judge; without it the judge is a local model.
    all_questions
        Ask the questions that the qrels do not judge, too (unanswerable ones, say).
    limit
        Only the first questions of the file.
    where
        FIELD=VALUE: only documents with such metadata; may be given several times.
    replace
        Replace the run folder that is there.
    json
        Print the results as JSON.
    """
    from .artefacts import check_output
    from .evaluation.contexts import check_contexts
    from .evaluation.folder import MARK

    if output:
        check_output(output, replace, MARK)
    if run:
        results = _score_run(run, questions, qrels, output, replace, settings.seed)
    else:
        if not questions or not output:
            raise SettingsError("evaluate needs --questions and --output, or --run and --qrels")
        others, shares = _names(contexts), [_share(share) for share in _names(noise)]
        check_contexts(others, shares)
        asked = _Asked(questions, qrels, limit, where, all_questions=all_questions)
        results = _measure(
            settings,
            asked,
            reader=reader,
            contexts=others,
            noise=shares,
            need=need,
            judge=_judge(settings, judge, judge_server),
            output=output,
            replace=replace,
        )
    if json:
        print_json(results.to_json())
    else:
        from rich.console import Console

        from .evaluation.report import run_tables

        Console().print(*run_tables(results, title=str(output or run)), sep="\n")


class _Asked:
    """The questions of an evaluation and what judges them."""

    def __init__(
        self,
        questions: Path,
        qrels: Path | None,
        limit: int | None,
        where: Sequence[str] | None,
        *,
        all_questions: bool,
    ) -> None:
        from .artefacts import file_hash
        from .corpus import read_qrels, read_questions

        self.qrels = read_qrels(qrels) if qrels else None
        judged = None if all_questions else self.qrels
        examples = _chosen(read_questions(questions), judged, limit)
        queries = filtered([example.query for example in examples], where)
        self.examples = [changed(e, query=q) for e, q in zip(examples, queries, strict=True)]
        self.files = {
            "questions": {"path": str(questions), "hash": file_hash(questions)},
            "qrels": {"path": str(qrels), "hash": file_hash(qrels)} if qrels else None,
        }


def _measure(settings: PipelineSettings, asked: _Asked, *, reader: bool, **options: Any) -> Results:
    from .evaluation.runs import evaluate as measure

    index = open_index(settings)
    with progress_bars() as progress:
        pipeline = assemble(
            settings, read=reader, progress=lambda done, total: progress("read", done, total)
        )
        return measure(
            pipeline,
            asked.examples,
            qrels=asked.qrels,
            corpus=index,
            settings={
                "command": {name: _plain(value) for name, value in asdict(settings).items()},
                **asked.files,
                "index": index.fingerprint(),
                "reader": reader,
            },
            progress=progress,
            seed=settings.seed,
            **options,
        )


def _judge(
    settings: PipelineSettings, name: str | None, server: str | None
) -> TextGenerator | None:
    if name is None:
        if server:
            raise SettingsError("--judge-server needs --judge, the judge's name there")
        return None
    return load_generator(changed(settings, generator=name, server=server))


def _score_run(
    run: Path,
    questions: Path | None,
    qrels: Path | None,
    output: Path | None,
    replace: bool,
    seed: int,
) -> Results:
    from .artefacts import file_hash
    from .corpus import read_qrels, read_questions, read_run
    from .evaluation.runs import evaluate_run

    if not qrels:
        raise SettingsError("--run needs --qrels, by which it is scored")
    return evaluate_run(
        read_run(run),
        read_qrels(qrels),
        examples=read_questions(questions) if questions else None,
        output=output,
        replace=replace,
        settings={
            "run": {"path": str(run), "hash": file_hash(run)},
            "qrels": {"path": str(qrels), "hash": file_hash(qrels)},
        },
        seed=seed,
    )


def _names(text: str) -> list[str]:
    return [name.strip() for name in text.split(",") if name.strip()]


def _share(text: str) -> float:
    try:
        return float(text)
    except ValueError:
        raise SettingsError(f"--noise holds {text!r}, which is no number") from None


def _chosen(examples: list[Example], qrels: Qrels | None, limit: int | None) -> list[Example]:
    """Return the questions that the qrels judge, and the first of them if there is a limit."""
    if limit is not None and limit < 1:
        raise SettingsError(f"--limit must be at least 1, not {limit}")
    if qrels is not None:
        examples = [e for e in examples if e.query.id in qrels] or examples
    return examples[:limit]


def filtered(queries: Sequence[Query], conditions: Sequence[str] | None) -> list[Query]:
    """Give a command's filter to queries, beside the ones of their own."""
    where = parse_where(conditions or [])
    return [Query(query.id, query.text, {**where, **query.where}) for query in queries]


def _plain(value: Any) -> Any:
    return str(value) if isinstance(value, Path) else value
