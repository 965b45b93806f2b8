"""nDCG@10 and recall@10 of BM25, dense and hybrid retrieval, beside bm25s and plain faiss.

Documents are indexed whole, so that all systems rank the same units. Hybrid's weight is chosen on
the dev split where there is one, and the test split is looked at once.

    python benchmarks/quality_retrieval.py --sets nfcorpus,limit_small
"""

from __future__ import annotations

import argparse
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import bm25s
import faiss
import numpy as np
import Stemmer
from measure import data_folder, save
from rich.console import Console
from rich.table import Table

from ragkit import Document, Index, Query
from ragkit.corpus import read_documents, read_qrels, read_questions
from ragkit.evaluation.metrics import retrieval_measures
from ragkit.evaluation.statistics import bootstrap_mean
from ragkit.models import BiEncoder
from ragkit.retrievers import Bm25Retriever, DenseRetriever, HybridRetriever
from ragkit.types import Qrels, Retriever, Run

SETS = {  # name -> (split measured, split that chooses hybrid's weight), the smallest first
    "limit_small": ("test", None),
    "policyqa": ("dev", None),
    "nfcorpus": ("test", "dev"),
    "squadshifts_reddit": ("test", "dev"),
    "medquad": ("dev", "train"),
}
DEPTH = 100
TUNED_ON = 500  # dev questions at most


def main() -> None:
    """Measure the sets and print the table."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--sets", default=",".join(SETS))
    names = parser.parse_args().sets.split(",")
    encoder = BiEncoder.load("all-MiniLM-L6-v2")
    settings = {"depth": DEPTH, "encoder": "all-MiniLM-L6-v2", "split_tokens": 0}
    for name in names:
        rows = measure(name, encoder)
        save(f"retrieval/{name}", rows, settings)
        table = Table("system", *MEASURES, title=f"{name} {rows[0]['split']}, n = {rows[0]['n']}")
        for row in rows:
            cells = (row[m] for m in MEASURES)
            table.add_row(
                row["system"],
                *(f"{c['mean']:.3f} [{c['low']:.3f}, {c['high']:.3f}]" for c in cells),
            )
        Console(width=120).print(table)


MEASURES = ("nDCG@10", "recall@10")


def measure(name: str, encoder: BiEncoder) -> list[dict[str, Any]]:
    """Measure all systems on one set."""
    folder, (split, dev) = data_folder() / name, SETS[name]
    documents = list(read_documents([folder / "corpus.jsonl.gz"]))
    texts = {e.query.id: e.query.text for e in read_questions(folder / "queries.jsonl.gz")}
    qrels = read_qrels(folder / "qrels" / f"{split}.tsv")
    queries = [Query(id_, texts[id_]) for id_ in qrels]
    with tempfile.TemporaryDirectory() as place:
        index = Index.build(Path(place) / "kb", documents, encoder=encoder)
        parts = [Bm25Retriever(index), DenseRetriever(index, encoder)]
        systems: dict[str, Retriever] = {"bm25": parts[0], "dense": parts[1]}
        systems["hybrid rrf"] = HybridRetriever(parts)
        if dev:
            weight = choose(parts, read_qrels(folder / "qrels" / f"{dev}.tsv"), texts)
            systems[f"hybrid weighted {weight:.1f}"] = weighted(parts, weight)
        runs = {system: run_of(retriever, queries) for system, retriever in systems.items()}
    runs["peer: bm25s"] = bm25s_run(documents, queries)
    runs["peer: sentence-transformers + faiss"] = faiss_run(encoder, documents, queries)
    return [row(name, split, system, run, qrels) for system, run in runs.items()]


def weighted(parts: Sequence[Retriever], weight: float) -> Retriever:
    """Fuse by scaled scores with this weight on BM25."""
    return HybridRetriever(parts, [weight, 1 - weight], fusion="weighted")


def choose(parts: Sequence[Retriever], qrels: Qrels, texts: dict[str, str]) -> float:
    """Return BM25's weight that gives the best nDCG@10 on dev questions."""
    ids = sorted(qrels)[:: max(1, len(qrels) // TUNED_ON)]
    queries, some = [Query(id_, texts[id_]) for id_ in ids], {id_: qrels[id_] for id_ in ids}
    scores: dict[float, float] = {}
    for weight in np.linspace(0, 1, 11).tolist():
        run = run_of(weighted(parts, weight), queries)
        values = retrieval_measures(run, some, [10])["nDCG@10"].values()
        scores[weight] = float(np.mean(list(values)))
    return max(scores, key=lambda weight: scores[weight])


def run_of(retriever: Retriever, queries: Sequence[Query]) -> Run:
    """Retrieve for all queries."""
    lists = retriever.retrieve(queries, DEPTH)
    return {
        query.id: {hit.document.id: hit.score for hit in hits}
        for query, hits in zip(queries, lists, strict=True)
    }


def bm25s_run(documents: Sequence[Document], queries: Sequence[Query]) -> Run:
    """Retrieve with bm25s as its documentation advises: English stop words and stemmer."""
    options: dict[str, Any] = {"stopwords": "en", "stemmer": Stemmer.Stemmer("english")}
    model = bm25s.BM25(method="lucene", k1=1.2, b=0.75)
    tokens = bm25s.tokenize([d.contents for d in documents], show_progress=False, **options)
    model.index(tokens, show_progress=False)
    asked = bm25s.tokenize([q.text for q in queries], show_progress=False, **options)
    k = min(DEPTH, len(documents))
    rows, scores = model.retrieve(asked, k=k, show_progress=False)
    return _run(documents, queries, rows, scores)


def faiss_run(encoder: BiEncoder, documents: Sequence[Document], queries: Sequence[Query]) -> Run:
    """Retrieve with SentenceTransformer.encode as it comes and an exact faiss index."""
    vectors = encoder.model.encode([d.contents for d in documents], normalize_embeddings=True)
    index = faiss.IndexFlatIP(vectors.shape[1])
    index.add(vectors)
    asked = encoder.model.encode([q.text for q in queries], normalize_embeddings=True)
    scores, rows = index.search(asked, min(DEPTH, len(documents)))
    return _run(documents, queries, rows, scores)


def _run(documents: Sequence[Document], queries: Sequence[Query], rows: Any, scores: Any) -> Run:
    return {
        query.id: {documents[int(r)].id: float(s) for r, s in zip(rows[i], scores[i], strict=True)}
        for i, query in enumerate(queries)
    }


def row(name: str, split: str, system: str, run: Run, qrels: Qrels) -> dict[str, Any]:
    """Return one system's scores on one set."""
    values = retrieval_measures(run, qrels, [10])
    cells = {}
    for measure_name in MEASURES:
        found = bootstrap_mean(list(values[measure_name].values()))
        cells[measure_name] = {"mean": found.mean, "low": found.low, "high": found.high}
    return {"set": name, "split": split, "system": system, "n": len(qrels), **cells}


if __name__ == "__main__":
    main()
