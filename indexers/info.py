"""`ragkit-index info` and `ragkit-index check`: what an index holds, and whether it is sound."""

from __future__ import annotations

from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING

from ragkit.console import print_json, progress_bars
from ragkit.errors import IndexStateError, SettingsError

from .build import describe
from .refresh import index_encoder

if TYPE_CHECKING:
    from ragkit.evaluation.statistics import Estimate
    from ragkit.stores.index import Index


def info(*, index: Path, json: bool = False) -> None:
    """Show what an index holds.

    Example: ragkit-index info --index kb

    Parameters
    ----------
    index
        The index folder.
    json
        Print it as JSON.
    """
    from ragkit.stores.index import Index

    summary = describe(Index.open(index))
    if json:
        print_json(summary)
        return
    for name, value in summary.items():
        shown = (
            ", ".join(f"{key} {item}" for key, item in value.items() if item not in (None, ""))
            if isinstance(value, dict)
            else ", ".join(value)
            if isinstance(value, list)
            else value
        )
        print(f"{name:<12} {shown}")


def check(
    *, index: Path, questions: Path | None = None, encoder: str | None = None, json: bool = False
) -> None:
    """Compare every file of an index with its checksum, and its stores with one another.

    Of an approximate index it also tells the recall@10: how much it finds of what exact search
    finds, for 200 documents that stand for queries, or for questions.

    Example: ragkit-index check --index kb

    Parameters
    ----------
    index
        The index folder.
    questions
        A file of questions on which the recall is measured.
    encoder
        Where the index's encoder is now, if that is not where it was when the index was built.
    json
        Print the result as JSON.
    """
    from ragkit.stores.index import Index

    opened = Index.open(index)
    with progress_bars() as progress:
        problems = opened.check(progress)
        recall = None if problems else _recall(opened, questions, encoder)
    if json:
        told = {"index": str(index), "sound": not problems, "problems": problems}
        print_json(told | ({"recall@10": asdict(recall)} if recall else {}))
    if problems:
        raise IndexStateError("\n".join([*problems, "Build the index again."]))
    if not json:
        of = "questions" if questions else "documents that stand for queries"
        found = f", recall@10 {recall} over {recall.n} {of}" if recall else ""
        print(f"{index}: sound, {len(opened):,} documents{found}")


def _recall(index: Index, questions: Path | None, encoder: str | None) -> Estimate | None:
    """Measure an approximate index; None where there is none."""
    if "dense" not in index.stores or not index.manifest["ann"]["file"]:
        if questions:
            raise SettingsError(
                f"{index.path}: its dense search is exact, or it has none, so that there is no "
                "recall to be measured. Leave --questions out."
            )
        return None
    from ragkit.corpus import read_questions
    from ragkit.evaluation.statistics import bootstrap_mean
    from ragkit.stores.embeddings import may_search
    from ragkit.stores.recall import Sample, documents_sample

    if questions is None:
        sample = documents_sample(index.dense, seed=1)  # others than a build tunes its search on
    else:
        asked = [example.query.text for example in read_questions(questions)]
        reads = index_encoder(index, encoder)
        if not may_search(index.manifest["encoder"], reads.describe()):
            raise IndexStateError(
                f"{index.path}: {reads.name} is not the encoder that the index was built with. "
                "Name that one with --encoder."
            )
        sample = Sample(index.dense, reads.encode_queries(asked))
    return bootstrap_mean(sample.recall().tolist())
