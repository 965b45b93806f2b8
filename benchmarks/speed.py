"""Speed as ratios within one run: encoding, BM25 search and build, beside their peers.

OMP_WAIT_POLICY=PASSIVE python benchmarks/speed.py --parts encode,bm25,build
"""

from __future__ import annotations

import argparse
import statistics
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import bm25s
import numpy as np
import rank_bm25
import Stemmer
from measure import data_folder, ratio, save, side_by_side
from rich.console import Console

from ragkit import Document, Index
from ragkit.corpus import read_documents, read_questions
from ragkit.models import BiEncoder
from ragkit.stores.bm25 import Bm25Settings


def main() -> None:
    """Time the parts and write the ratios."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--parts", default=",".join(PARTS))
    arguments = parser.parse_args()
    folder = data_folder() / "squad"
    documents = list(read_documents([folder / "corpus.jsonl.gz"]))
    questions = [e.query.text for e in read_questions(folder / "queries.jsonl.gz")]
    rows = [row for part in arguments.parts.split(",") for row in PARTS[part](documents, questions)]
    save("speed", rows, {"parts": arguments.parts})
    Console().print(rows)


def encode(documents: list[Document], questions: list[str]) -> list[dict[str, Any]]:
    """Documents to vectors, against SentenceTransformer.encode as it comes."""
    texts = [document.contents for document in documents[:256]]
    encoder = BiEncoder.load("all-MiniLM-L6-v2")
    seconds = side_by_side(
        {
            "ragkit": lambda: encoder.encode_documents(texts),
            "SentenceTransformer.encode": lambda: encoder.model.encode(texts),
        }
    )
    expected = encoder.model.encode(texts, normalize_embeddings=True)
    cosine = (encoder.encode_documents(texts) * expected).sum(axis=1).min()
    return [
        _row("encode 256 passages", seconds, len(texts), "SentenceTransformer.encode")
        | {"least cosine": float(cosine)}
    ]


def search(documents: list[Document], questions: list[str]) -> list[dict[str, Any]]:
    """BM25 search from text, k = 10, against bm25s and rank_bm25."""
    with tempfile.TemporaryDirectory() as place:
        store = Index.build(Path(place) / "kb", documents, stores=["bm25"]).bm25
        okapi = store.with_settings(Bm25Settings("okapi", k1=1.5))
        terms = [store.analyser.terms(document.contents) for document in documents]
        slow = rank_bm25.BM25Okapi(terms)
        few, many = questions[:20], questions[:4000]
        options: dict[str, Any] = {
            "stopwords": "en", "stemmer": Stemmer.Stemmer("english"), "show_progress": False
        }  # fmt: skip
        fast = bm25s.BM25(method="lucene", k1=1.2, b=0.75, backend="numba")
        fast.index(bm25s.tokenize([d.contents for d in documents], **options), show_progress=False)

        def peer() -> None:
            fast.retrieve(bm25s.tokenize(many, **options), k=10, show_progress=False, n_threads=2)

        batch = side_by_side({"ragkit": lambda: store.search(many, 10), "bm25s": peer})
        handful = side_by_side(
            {
                "ragkit": lambda: store.search(few, 10),
                "rank_bm25": lambda: [slow.get_scores(store.analyser.terms(q)) for q in few],
            }
        )
        gap = max(
            np.abs(okapi.scores(q) - slow.get_scores(store.analyser.terms(q))).max() for q in few
        )
        count = f"{len(documents):,} documents"
        return [
            _row(f"BM25 search, {count}, 4,000 queries", batch, len(many), "bm25s"),
            _row(f"BM25 search, {count}, 20 queries", handful, len(few), "rank_bm25")
            | {"greatest difference of scores": float(gap)},
        ]


def build(documents: list[Document], questions: list[str]) -> list[dict[str, Any]]:
    """BM25 from text to a saved index, against bm25s."""
    with tempfile.TemporaryDirectory() as place:

        def ours() -> None:
            Index.build(Path(place) / "kb", documents, stores=["bm25"], replace=True)

        def peer() -> None:
            model = bm25s.BM25(method="lucene")
            tokens = bm25s.tokenize(
                [document.contents for document in documents],
                stopwords="en", stemmer=Stemmer.Stemmer("english"), show_progress=False,
            )  # fmt: skip
            model.index(tokens, show_progress=False)
            model.save(Path(place) / "bm25s")

        seconds = side_by_side({"ragkit": ours, "bm25s": peer})
    return [_row(f"BM25 build, {len(documents):,} documents", seconds, len(documents), "bm25s")]


def _row(work: str, seconds: dict[str, list[float]], items: int, peer: str) -> dict[str, Any]:
    return {
        "work": work,
        "peer": peer,
        "ratio": ratio(seconds, "ragkit", peer),
        "items a second": {n: items / statistics.median(times) for n, times in seconds.items()},
        "seconds": seconds,
    }


PARTS: dict[str, Callable[[list[Document], list[str]], list[dict[str, Any]]]] = {
    "encode": encode,
    "bm25": search,
    "build": build,
}

if __name__ == "__main__":
    main()
