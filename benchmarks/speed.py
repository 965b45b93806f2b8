"""Speed as ratios within one run: encoding, search, build, start and reading, beside their peers.

OMP_WAIT_POLICY=PASSIVE python benchmarks/speed.py --parts encode,bm25,large,build,dense,start,read

`large` searches and builds over `--documents` windows of 64 words from all shared sets: real text,
the same in every run.
"""

from __future__ import annotations

import argparse
import re
import statistics
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from itertools import islice, product
from pathlib import Path
from typing import Any

import bm25s
import faiss
import numpy as np
import rank_bm25
import Stemmer
import tantivy
from measure import data_folder, ratio, save, side_by_side
from rich.console import Console
from tantivy import Filter

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
    """BM25 search by questions, k = 10: against bm25s, tantivy and rank_bm25."""
    return _search(documents, {"questions": questions[:4000]}, [10], [False])


def _search(
    documents: list[Document], asked: dict[str, list[str]], ks: list[int], singly: list[bool]
) -> list[Row]:
    """Search from text, all queries at once or one by one, beside each peer at its best."""
    with tempfile.TemporaryDirectory() as place:
        store = Index.build(Path(place) / "kb", documents, stores=["bm25"]).bm25
        by_bm25s, by_tantivy = _bm25s(documents), _tantivy(documents)
        rows = []
        for (name, queries), k, single in product(asked.items(), ks, singly):
            calls = [[query] for query in queries[:200]] if single else [queries]
            searches = {"ragkit": store.search, "bm25s": by_bm25s, "tantivy": by_tantivy}
            seconds = side_by_side(
                {
                    system: lambda find=find, calls=calls, k=k: [find(each, k) for each in calls]
                    for system, find in searches.items()
                }
            )
            count = sum(map(len, calls))
            work = f"BM25 search, {len(documents):,} documents, {count:,} {name}, k = {k}"
            work += ", one by one" if single else ""
            rows += [_row(work, seconds, count, peer) for peer in ("bm25s", "tantivy")]
        return [*rows, _against_rank_bm25(store, documents, next(iter(asked.values()))[:10])]


Find = Callable[[list[str], int], Any]


def _bm25s(documents: list[Document]) -> Find:
    options: dict[str, Any] = {
        "stopwords": "en", "stemmer": Stemmer.Stemmer("english"), "show_progress": False
    }  # fmt: skip
    peer = bm25s.BM25(method="lucene", k1=1.2, b=0.75, backend="numba")
    peer.index(bm25s.tokenize([d.contents for d in documents], **options), show_progress=False)

    def find(queries: list[str], k: int) -> Any:
        threads = 2 if len(queries) > 1 else 0  # its best in a batch, and its best for one query
        asked = bm25s.tokenize(queries, **options)
        return peer.retrieve(asked, k=k, show_progress=False, n_threads=threads)

    return find


def _tantivy(documents: list[Document]) -> Find:
    schema = tantivy.SchemaBuilder()
    schema.add_text_field("text", tokenizer_name="words", index_option="freq")
    index = tantivy.Index(schema.build())
    words = tantivy.TextAnalyzerBuilder(tantivy.Tokenizer.simple())
    for each in (Filter.lowercase(), Filter.stopword("english"), Filter.stemmer("english")):
        words = words.filter(each)
    index.register_tokenizer("words", words.build())
    writer = index.writer()
    for document in documents:
        writer.add_document(tantivy.Document(text=document.contents))
    writer.commit()
    writer.wait_merging_threads()
    index.reload()
    searcher = index.searcher()

    def one(query: str, k: int) -> Any:
        plain = re.sub(r"\W+", " ", query).lower()  # what is no word is an operator
        return searcher.search(index.parse_query(plain, ["text"]), k).hits

    def find(queries: list[str], k: int) -> Any:
        if len(queries) == 1:
            return one(queries[0], k)
        with ThreadPoolExecutor(2) as pool:
            return list(pool.map(lambda query: one(query, k), queries))

    return find


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
    """Search and build over many documents; long queries are the first words of passages."""
    passages = read_documents([data_folder() / "squad" / "corpus.jsonl.gz"])
    long = [" ".join(each.text.split()[:WINDOW]) for each in islice(passages, 500)]
    asked = {"questions": questions[:4000], f"queries of {WINDOW} words": long}
    rows = _search(documents, asked, [10, 100], [False, True])
    return [*rows, *build(documents, questions)]


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
