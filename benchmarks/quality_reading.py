"""How the default reader answers, by what it is given to read, and where questions are lost.

    python benchmarks/quality_reading.py --parts depths,squad,popqa,hotpotqa,musique

`depths` reads SQuAD dev questions with k = 1, 3, 5 retrieved passages, without any, and with the
gold one. The other parts are sets: the context-use table, the noise sweep and the stage losses.
"""

from __future__ import annotations

import argparse
import random
import tempfile
from dataclasses import asdict
from pathlib import Path
from typing import Any

from measure import data_folder, save
from rich.console import Console

from ragkit import Example, Hit, Index, Pipeline, evaluate
from ragkit.console import progress_bars
from ragkit.corpus import read_documents, read_qrels, read_questions
from ragkit.evaluation.answers import answer_measures
from ragkit.evaluation.contexts import CONTEXTS
from ragkit.evaluation.report import run_tables
from ragkit.evaluation.statistics import bootstrap_mean
from ragkit.models import Generator
from ragkit.prompts import without_citations
from ragkit.readers import GeneratorReader
from ragkit.retrievers import Bm25Retriever
from ragkit.types import Qrels

MEASURES = ("EM", "F1", "cover")
NOISE = (0.0, 0.5, 0.75, 1.0)
MULTI_HOP = {"hotpotqa", "musique"}
KEEP = {"hotpotqa": 5, "musique": 5}  # two to four passages are needed


def main() -> None:
    """Measure the parts and print their tables."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--parts", default="depths,squad,popqa,hotpotqa,musique")
    parser.add_argument("--questions", type=int, default=300)
    parser.add_argument("--prompt", default="ragkit")
    parser.add_argument("--no-noise", action="store_true", help="leave the noise sweep out")
    arguments = parser.parse_args()
    generator = Generator.load("SmolLM2-135M-Instruct")
    reader = GeneratorReader(generator, style=arguments.prompt, max_new_tokens=24)
    for part in arguments.parts.split(","):
        measure = depths if part == "depths" else contexts
        rows = measure(part, reader, arguments)
        settings = {"questions": arguments.questions, "seed": 0, "prompt": arguments.prompt}
        save(f"{'reading' if part == 'depths' else 'contexts'}/{part}", rows, settings)


def chosen(name: str, count: int) -> tuple[list[Example], Qrels]:
    """Return some dev questions of a set, drawn at random, and its judgements."""
    folder = data_folder() / name
    qrels = read_qrels(folder / "qrels" / "dev.tsv")
    asked = [e for e in read_questions(folder / "queries.jsonl.gz") if e.query.id in qrels]
    return random.Random(0).sample(asked, min(count, len(asked))), qrels


def depths(part: str, reader: GeneratorReader, arguments: Any) -> list[dict[str, Any]]:
    """Read with BM25's best k passages, with none, and with the gold one."""
    examples, qrels = chosen("squad", arguments.questions)
    queries = [example.query for example in examples]
    documents = {d.id: d for d in read_documents([data_folder() / "squad" / "corpus.jsonl.gz"])}
    with tempfile.TemporaryDirectory() as place:
        index = Index.build(Path(place) / "kb", documents.values(), stores=["bm25"])
        found = Bm25Retriever(index).retrieve(queries, 5)
    given: dict[str, list[list[Hit]]] = {"closed book": [[] for _ in queries]}
    given |= {f"BM25, k = {k}": [hits[:k] for hits in found] for k in (1, 3, 5)}
    given["gold passage"] = [[Hit(documents[next(iter(qrels[q.id]))], 1.0)] for q in queries]
    # All contexts in one call: the passages that they begin with alike are read once.
    lists = [hits for context in given.values() for hits in context]
    with progress_bars() as progress:
        reader.progress = lambda done, total: progress("read", done, total)
        read = reader.read(queries * len(given), lists)
    rows: list[dict[str, Any]] = []
    for place, context in enumerate(given):
        answers = read[place * len(queries) : (place + 1) * len(queries)]
        scores = [
            answer_measures(without_citations(a.text), e.answers, abstained=a.abstained)
            for a, e in zip(answers, examples, strict=True)
        ]
        means = {n: asdict(bootstrap_mean([score[n] for score in scores])) for n in MEASURES}
        rows.append({"context": context, "abstained": sum(a.abstained for a in answers), **means})
    Console().print(rows)
    return rows


def contexts(part: str, reader: GeneratorReader, arguments: Any) -> list[dict[str, Any]]:
    """Evaluate BM25 and the reader on a set, in all contexts."""
    examples, qrels = chosen(part, arguments.questions)
    multi_hop = part in MULTI_HOP
    with tempfile.TemporaryDirectory() as place, progress_bars() as progress:
        documents = read_documents([data_folder() / part / "corpus.jsonl.gz"])
        index = Index.build(Path(place) / "kb", documents, stores=["bm25"])
        reader.progress = lambda done, total: progress("read", done, total)
        results = evaluate(
            Pipeline(Bm25Retriever(index), reader=reader, keep=KEEP.get(part, 3)),
            examples,
            qrels=qrels,
            corpus=index,
            need="all" if multi_hop else "any",
            contexts=() if multi_hop else CONTEXTS,
            noise=() if multi_hop or arguments.no_noise else NOISE,
            settings={"set": part},
            progress=progress,
        )
    Console(width=110).print(*run_tables(results, title=part))
    return [results.to_json()]


if __name__ == "__main__":
    main()
