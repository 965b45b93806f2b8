"""The commands that compare: `ragkit compare` runs, `ragkit leaks` sets of questions."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

from cyclopts import Parameter

from .console import print_json, print_tables, progress_bars
from .types import Example


def compare(
    *runs: str,
    measures: str = "",
    other_corpus: bool = False,
    output: Path | None = None,
    json: bool = False,
) -> None:
    """Compare run folders question by question: differences, intervals, tests.

    The first is the baseline of the others. Runs that differ in nothing but their seed are one
    system, as are folders joined by commas: tuned=seed0,seed1,seed2.

    Example: ragkit compare base-run tuned-run

    Parameters
    ----------
    runs
        Run folders, or NAME=FOLDER,FOLDER,… for a system of several seeds.
    measures
        Compare by these alone, such as nDCG@10,F1: the fewer tests, the easier one is passed.
    other_corpus
        Compare runs over different documents, too (other splits of them, say).
    output
        Write the comparison here, as JSON.
    json
        Print the comparison as JSON.
    """
    from .artefacts import check_file, write_json
    from .evaluation.comparison import compare as compared
    from .evaluation.report import comparison_tables
    from .evaluation.systems import group_runs

    if output:
        check_file(output)
    chosen = [measure.strip() for measure in measures.split(",") if measure.strip()]
    comparison = compared(group_runs(runs), measures=chosen, other_corpus=other_corpus)
    if output:
        write_json(output, comparison.to_json())
    if json:
        print_json(comparison.to_json())
    else:
        print_tables(comparison_tables(comparison))


def leaks(
    train: Path,
    test: Path,
    /,
    *,
    corpus: Annotated[list[Path] | None, Parameter(negative="", consume_multiple=True)] = None,
    train_qrels: Path | None = None,
    test_qrels: Path | None = None,
    threshold: float = 0.8,
    output: Path | None = None,
    json: bool = False,
) -> None:
    """Tell which questions of a test set stand, exactly or nearly, in a training set.

    Example: ragkit leaks train.jsonl test.jsonl --corpus corpus.jsonl

    Parameters
    ----------
    train
        The questions that are trained on.
    test
        The questions that are kept to measure by.
    corpus
        Documents, to find test questions that stand in them and answers that do not.
    train_qrels
        Only the questions of `train` that these judge.
    test_qrels
        Only the questions of `test` that these judge.
    threshold
        From which Jaccard similarity two questions are nearly the same.
    output
        Write all that was found here, as JSON.
    json
        Print all that was found as JSON.
    """
    from .artefacts import check_file, write_json
    from .corpus import read_documents
    from .evaluation.leaks import audit
    from .evaluation.report import leaks_table

    if output:
        check_file(output)
    learnt = _judged(train, train_qrels)
    one_set = (train, train_qrels) == (test, test_qrels)
    with progress_bars() as progress:
        found = audit(
            learnt,
            learnt if one_set else _judged(test, test_qrels),
            read_documents(corpus) if corpus else None,
            threshold=threshold,
            progress=progress,
        )
    if output:
        write_json(output, found.to_json())
    if json:
        print_json(found.to_json())
    else:
        print_tables([leaks_table(found, title=f"{test} against {train}")])


def _judged(questions: Path, qrels: Path | None) -> list[Example]:
    """Read questions; those that the qrels judge, if there are any."""
    from .corpus import read_qrels, read_questions

    examples = read_questions(questions)
    if qrels is None:
        return examples
    judged = read_qrels(qrels)
    return [example for example in examples if example.query.id in judged]
