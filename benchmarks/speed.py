"""Speed as ratios within one run: encoding, search, build, start and reading, beside their peers.

OMP_WAIT_POLICY=PASSIVE python benchmarks/speed.py --parts encode,bm25,large,build,dense,start,read

`large` searches and builds over `--documents` windows of 64 words from all shared sets: real text,
the same in every run.
"""

from __future__ import annotations

import argparse
import statistics
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterator
from itertools import islice
from pathlib import Path
from typing import Any

import bm25s
import faiss
import numpy as np
import rank_bm25
import Stemmer
from measure import data_folder, ratio, save, side_by_side
from rich.console import Console

from ragkit import Document, Hit, Index, Query
from ragkit.corpus import read_documents, read_questions
from ragkit.models import BiEncoder, Generator
from ragkit.readers import GeneratorReader
from ragkit.stores.bm25 import Bm25Settings, Bm25Store
from ragkit.stores.dense import DenseStore

Row = dict[str, Any]
WINDOW = 64  # words


def main() -> None:
    """Time the parts and write the ratios."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--parts", default=",".join(PARTS))
    parser.add_argument("--documents", type=int, default=200_000, help="of the part `large`")
    arguments = parser.parse_args()
    folder = data_folder() / "squad"
    documents = list(read_documents([folder / "corpus.jsonl.gz"]))
    questions = [e.query.text for e in read_questions(folder / "queries.jsonl.gz")]
    for part in arguments.parts.split(","):
        large = part == "large"
        used = list(islice(windows(), arguments.documents)) if large else documents
        rows = PARTS[part](used, questions)
        save(f"speed/{part}", rows, {"documents": len(used)})
        Console().print(rows)


def encode(documents: list[Document], questions: list[str]) -> list[Row]:
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


def windows() -> Iterator[Document]:
    """Yield overlapping windows of words from all shared sets, in the order of their names."""
    for file in sorted(data_folder().glob("*/corpus.jsonl.gz")):
        for document in read_documents([file]):
            words = document.text.split()
            for start in range(0, len(words), WINDOW // 2):
                text = " ".join(words[start : start + WINDOW])
                yield Document(f"{file.parent.name}/{document.id}/{start}", text)


def search(documents: list[Document], questions: list[str]) -> list[Row]:
    """BM25 search, k = 10: from text against bm25s (2 threads, 0 threads), against rank_bm25."""
    with tempfile.TemporaryDirectory() as place:
        store = Index.build(Path(place) / "kb", documents, stores=["bm25"]).bm25
        rows = _against_bm25s(store, documents, questions[:4000])
        return [*rows, _against_rank_bm25(store, documents, questions[:10])]


def _against_bm25s(store: Bm25Store, documents: list[Document], queries: list[str]) -> list[Row]:
    options: dict[str, Any] = {
        "stopwords": "en", "stemmer": Stemmer.Stemmer("english"), "show_progress": False
    }  # fmt: skip
    peer = bm25s.BM25(method="lucene", k1=1.2, b=0.75, backend="numba")
    peer.index(bm25s.tokenize([d.contents for d in documents], **options), show_progress=False)
    terms = bm25s.tokenize(queries, return_ids=False, **options)

    def from_text(threads: int) -> None:
        asked = bm25s.tokenize(queries, **options)
        peer.retrieve(asked, k=10, show_progress=False, n_threads=threads)

    seconds = side_by_side(
        {
            "ragkit": lambda: store.search(queries, 10),
            "bm25s, 2 threads": lambda: from_text(2),
            "bm25s, its default": lambda: from_text(0),
            "bm25s, 2 threads, its queries split beforehand": lambda: peer.retrieve(
                terms, k=10, show_progress=False, n_threads=2
            ),
        }
    )
    work = f"BM25 search, {len(documents):,} documents, {len(queries):,} queries"
    return [
        _row(work, seconds, len(queries), n) for n in ("bm25s, 2 threads", "bm25s, its default")
    ]


def _against_rank_bm25(store: Bm25Store, documents: list[Document], queries: list[str]) -> Row:
    """Time Okapi on few queries, one by one, and compare the scores of all documents."""
    terms = store.analyser.terms
    peer = rank_bm25.BM25Okapi([terms(document.contents) for document in documents])
    okapi = store.with_settings(Bm25Settings("okapi", k1=1.5))
    seconds = side_by_side(
        {
            "ragkit": lambda: [okapi.search([query], 10) for query in queries],
            "rank_bm25": lambda: [peer.get_scores(terms(query)) for query in queries],
        }
    )
    gap = max(float(np.abs(okapi.scores(q) - peer.get_scores(terms(q))).max()) for q in queries)
    work = f"BM25 search, {len(documents):,} documents, {len(queries)} queries one by one"
    row = _row(work, seconds, len(queries), "rank_bm25")
    return row | {"greatest difference of scores": gap}


def large(documents: list[Document], questions: list[str]) -> list[Row]:
    """Search and build over many documents."""
    return [*search(documents, questions), *build(documents, questions)]


def build(documents: list[Document], questions: list[str]) -> list[Row]:
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


def dense(documents: list[Document], questions: list[str]) -> list[Row]:
    """Exact dense search, k = 10, against faiss alone; vectors are drawn at random."""
    random = np.random.default_rng(0)
    vectors = random.standard_normal((50_000, 384), dtype=np.float32)
    asked = random.standard_normal((500, 384), dtype=np.float32)
    store, peer = DenseStore([vectors]), faiss.IndexFlatIP(384)
    peer.add(vectors)
    seconds = side_by_side(
        {
            "ragkit": lambda: store.search(asked, 10),
            "faiss.IndexFlatIP": lambda: peer.search(asked, 10),
        }
    )
    work = f"dense search, {len(vectors):,} vectors"
    return [_row(work, seconds, len(asked), "faiss.IndexFlatIP")]


def start(documents: list[Document], questions: list[str]) -> list[Row]:
    """What `import ragkit` and `ragkit --help` take beyond starting Python."""

    def run(*arguments: str) -> Callable[[], Any]:
        command = [sys.executable, *arguments]
        return lambda: subprocess.run(command, check=True, capture_output=True)

    seconds = side_by_side(
        {
            "python": run("-c", "pass"),
            "import ragkit": run("-c", "import ragkit"),
            "ragkit --help": run("-m", "ragkit", "--help"),
        },
        rounds=9,
    )
    medians = {name: statistics.median(times) for name, times in seconds.items()}
    return [
        {
            "work": name,
            "added milliseconds": 1000 * (medians[name] - medians["python"]),
            "seconds": {key: seconds[key] for key in ("python", name)},
        }
        for name in ("import ragkit", "ragkit --help")
    ]


def read(documents: list[Document], questions: list[str]) -> list[Row]:
    """Answers to 24 questions from one passage each, against one call a question."""
    generator = Generator.load("SmolLM2-135M-Instruct")
    reader = GeneratorReader(generator, max_new_tokens=32)
    queries = [Query(str(n), text) for n, text in enumerate(questions[:24])]
    hits = [[Hit(document, 1.0)] for document in documents[:24]]
    texts: dict[str, list[str]] = {}

    def together() -> None:
        texts["ragkit"] = [answer.text for answer in reader.read(queries, hits)]

    def apart() -> None:
        pairs = zip(queries, hits, strict=True)
        texts["one by one"] = [reader.read([q], [h])[0].text for q, h in pairs]

    seconds = side_by_side({"ragkit": together, "one by one": apart}, rounds=3)
    same = sum(a == b for a, b in zip(texts["ragkit"], texts["one by one"], strict=True))
    row = _row("answers to 24 questions, at most 32 tokens", seconds, len(queries), "one by one")
    return [row | {"same texts": same}]


def _row(work: str, seconds: dict[str, list[float]], items: int, peer: str) -> Row:
    return {
        "work": work,
        "peer": peer,
        "ratio": ratio(seconds, "ragkit", peer),
        "items a second": {n: items / statistics.median(times) for n, times in seconds.items()},
        "seconds": seconds,
    }


PARTS: dict[str, Callable[[list[Document], list[str]], list[Row]]] = {
    "encode": encode,
    "bm25": search,
    "large": large,
    "build": build,
    "dense": dense,
    "start": start,
    "read": read,
}

if __name__ == "__main__":
    main()
