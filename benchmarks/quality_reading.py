"""EM, F1 and cover of the default reader on SQuAD dev questions, by what it is given to read.

python benchmarks/quality_reading.py --questions 200
"""

from __future__ import annotations

import argparse
import random
import tempfile
from pathlib import Path
from typing import Any

from measure import data_folder, save
from rich.console import Console
from rich.table import Table

from ragkit import Hit, Index
from ragkit.corpus import read_documents, read_qrels, read_questions
from ragkit.evaluation.answers import answer_measures
from ragkit.evaluation.statistics import bootstrap_mean
from ragkit.models import Generator
from ragkit.prompts import without_citations
from ragkit.readers import GeneratorReader
from ragkit.retrievers import Bm25Retriever

MEASURES = ("EM", "F1", "cover")


def main() -> None:
    """Read with each context and print the table."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--questions", type=int, default=200)
    parser.add_argument("--prompt", default="ragkit")
    arguments = parser.parse_args()
    folder = data_folder() / "squad"
    documents = {d.id: d for d in read_documents([folder / "corpus.jsonl.gz"])}
    qrels = read_qrels(folder / "qrels" / "dev.tsv")
    examples = [e for e in read_questions(folder / "queries.jsonl.gz") if e.query.id in qrels]
    examples = random.Random(0).sample(examples, arguments.questions)
    queries = [example.query for example in examples]
    with tempfile.TemporaryDirectory() as place:
        index = Index.build(Path(place) / "kb", documents.values(), stores=["bm25"])
        found = Bm25Retriever(index).retrieve(queries, 5)
    contexts: dict[str, list[list[Hit]]] = {"closed book": [[] for _ in queries]}
    contexts |= {f"BM25, k = {k}": [hits[:k] for hits in found] for k in (1, 3, 5)}
    contexts["gold passage"] = [[Hit(documents[next(iter(qrels[q.id]))], 1.0)] for q in queries]
    reader = GeneratorReader(Generator.load("SmolLM2-135M-Instruct"), style=arguments.prompt)
    rows: list[dict[str, Any]] = []
    table = Table("context", *MEASURES, title=f"SQuAD dev, n = {len(queries)}")
    # All contexts in one call: the passages that they begin with alike are read once.
    lists = [hits for context in contexts.values() for hits in context]
    read = reader.read(queries * len(contexts), lists)
    for place, context in enumerate(contexts):
        answers = read[place * len(queries) : (place + 1) * len(queries)]
        scores = [
            answer_measures(without_citations(a.text), e.answers, abstained=a.abstained)
            for a, e in zip(answers, examples, strict=True)
        ]
        means = {name: bootstrap_mean([score[name] for score in scores]) for name in MEASURES}
        rows.append(
            {
                "context": context,
                "abstained": sum(answer.abstained for answer in answers),
                **{n: {"mean": m.mean, "low": m.low, "high": m.high} for n, m in means.items()},
            }
        )
        table.add_row(context, *(str(mean) for mean in means.values()))
    save("reading/squad", rows, {"questions": len(queries), "seed": 0, "prompt": arguments.prompt})
    Console(width=110).print(table)


if __name__ == "__main__":
    main()
