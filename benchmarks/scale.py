"""How the cost of an index grows, and what its approximate indexes find in which time.

    python benchmarks/scale.py --parts growth --sizes 10000,100000,1000000 --max-memory 2GB
    python benchmarks/scale.py --parts recall --vectors 1000000

`growth` builds BM25 and dense stores over windows of 64 words of all shared sets (real text, no two
alike) with synthetic vectors, each size in a process of its own, and asks each index questions of
squad in another. `recall` searches vectors that lie between embeddings of such windows and their
nearest neighbours, through each kind of index at several efforts, and draws recall@10 against time.
"""

from __future__ import annotations

import argparse
import json
import resource
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from itertools import count, islice
from pathlib import Path
from typing import Any

import faiss
import matplotlib as mpl
import numpy as np
from matplotlib.figure import Figure
from measure import RESULTS, data_folder, save
from ragkit.indexers.build import bytes_of
from rich.console import Console

from ragkit import Document, Index
from ragkit.corpus import read_documents, read_questions
from ragkit.models import BiEncoder
from ragkit.stores.ann import build_ann
from ragkit.stores.ann_settings import AnnSettings
from ragkit.stores.dense import DenseStore
from ragkit.stores.recall import Sample

DIMENSION, CLUSTERS, WINDOW = 384, 4096, 64
KINDS = {
    "hnsw": AnnSettings("hnsw"),
    "ivf": AnnSettings("ivf"),
    "ivf, int8": AnnSettings("ivf", codes="int8"),
    "ivf, binary": AnnSettings("ivf", codes="binary"),
    "ivfpq": AnnSettings("ivfpq"),
}


class SyntheticEncoder:
    """Gives random vectors in clusters, the same ones for the same texts."""

    dimension = DIMENSION

    def __init__(self) -> None:
        random = np.random.default_rng(0)
        self._centres = random.standard_normal((CLUSTERS, DIMENSION), np.float32)

    def encode_documents(
        self, texts: Sequence[str], *, progress: Callable[[int], None] = lambda done: None
    ) -> Any:
        """Return vectors of shape [texts, dimension]."""
        random = np.random.default_rng(list(texts[0].encode())[:64])
        vectors = random.standard_normal((len(texts), DIMENSION), np.float32)
        vectors += self._centres[random.integers(0, CLUSTERS, len(texts))]
        vectors /= np.linalg.norm(vectors, axis=1, keepdims=True)
        progress(len(texts))
        return vectors

    encode_queries = encode_documents

    def describe(self) -> dict[str, Any]:
        """Return what an index keeps of an encoder."""
        return {"name": "synthetic", "dimension": DIMENSION, "fingerprint": "synthetic"}


def main() -> None:
    """Measure the parts, or be the process that one size is measured in."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--parts", default="growth,recall")
    parser.add_argument("--sizes", default="10000,100000,1000000")
    parser.add_argument("--max-memory", default="2GB")
    parser.add_argument("--codes", default="int8", help="of the lists that growth builds")
    parser.add_argument("--vectors", type=int, default=1_000_000, help="of the part `recall`")
    parser.add_argument("--embedded", type=int, default=20_000, help="windows that are encoded")
    parser.add_argument("--alone", help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.alone:
        work, size, place = arguments.alone.split(":", 2)
        measured = building if work == "build" else asking
        print(json.dumps(measured(int(size), Path(place), arguments)))
        return
    for part in arguments.parts.split(","):
        rows = {"growth": growth, "recall": recall}[part](arguments)
        save(f"scale/{part}", rows, {k: v for k, v in vars(arguments).items() if k != "alone"})
        Console().print(rows)


def windows() -> Iterator[Document]:
    """Yield windows of words of all shared sets, without end, each pass beginning elsewhere."""
    files = sorted(data_folder().glob("*/corpus.jsonl.gz"))
    for turn in count():
        for file in files:
            for document in read_documents([file]):
                words = document.text.split()
                for start in range(turn * 7, len(words), WINDOW // 2):
                    text = " ".join(words[start : start + WINDOW])
                    yield Document(f"{file.parent.name}/{document.id}/{turn}/{start}", text)


def growth(arguments: Any) -> list[dict[str, Any]]:
    """Build and ask indexes of several sizes."""
    rows = []
    for size in map(int, arguments.sizes.split(",")):
        with tempfile.TemporaryDirectory() as place:
            row: dict[str, Any] = {"documents": size}
            for work in ("build", "ask"):
                own = [f"--alone={work}:{size}:{place}", f"--max-memory={arguments.max_memory}"]
                command = [sys.executable, __file__, *own, f"--codes={arguments.codes}"]
                done = subprocess.run(command, stdout=subprocess.PIPE, check=True, text=True)
                row |= json.loads(done.stdout.splitlines()[-1])
            rows.append(row)
    return rows


def building(size: int, place: Path, arguments: Any) -> dict[str, Any]:
    """Build an index; return seconds by stage, the greatest memory and the bytes on disk."""
    started = last = time.perf_counter()
    stages: dict[str, float] = {}

    def told(stage: str, done: int, total: int | None) -> None:
        nonlocal last
        now, name = time.perf_counter(), stage.split(",", maxsplit=1)[0]
        stages[name], last = stages.get(name, 0.0) + now - last, now

    held = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    index = Index.build(
        place / "kb",
        islice(windows(), size),
        encoder=SyntheticEncoder(),
        ann=AnnSettings("ivf", codes=arguments.codes, target_recall=0.95),
        max_memory=bytes_of(arguments.max_memory),
        progress=told,
    )
    sizes: dict[str, int] = {}
    for name in index.files():
        store = name.rsplit("/", 1)[-1].split(".")[0]
        kind = "bm25" if "/bm25/" in name else "ann" if name.startswith("ann/") else store
        sizes[kind] = sizes.get(kind, 0) + (index.path / name).stat().st_size
    return {
        "seconds": round(time.perf_counter() - started, 1),
        "stages": {name: round(seconds, 2) for name, seconds in stages.items()},
        "peak_mb": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss // 1024,
        "before_mb": held // 1024,
        "segments": len(index.folders),
        "bytes": sizes,
        "ann": {key: index.manifest["ann"][key] for key in ("built", "tuned")},
    }


def asking(size: int, place: Path, arguments: Any) -> dict[str, Any]:
    """Ask an index one question after another; return milliseconds a question, by medians."""
    file = data_folder() / "squad/queries.jsonl.gz"
    texts = [example.query.text for example in read_questions(file)][:200]
    vectors = SyntheticEncoder().encode_queries(texts)
    started = time.perf_counter()
    index = Index.open(place / "kb")
    stores = index.bm25, index.dense
    opened = time.perf_counter() - started
    asked: dict[str, Callable[[int], object]] = {
        "bm25": lambda n: stores[0].search(texts[n : n + 1], 10),
        "approximate": lambda n: stores[1].search(vectors[n : n + 1], 10),
        "exact": lambda n: stores[1].search(vectors[n : n + 1], 10, exact=True),
    }
    found: dict[str, float] = {}
    for name, search in asked.items():
        times = []
        for number in range(20 if name == "exact" else len(texts)):
            start = time.perf_counter()
            search(number)
            times.append(time.perf_counter() - start)
        found[name] = round(1000 * statistics.median(times), 3)
    return {"open_seconds": round(opened, 2), "milliseconds": found}


def recall(arguments: Any) -> list[dict[str, Any]]:
    """Search each kind of index at several efforts, one query at a time, beside exact search."""
    faiss.omp_set_num_threads(1)
    vectors, queries = between(arguments.vectors, arguments.embedded)
    rows: list[dict[str, Any]] = []
    with tempfile.TemporaryDirectory() as place:
        for name, settings in KINDS.items():
            file = Path(place) / "x.faiss"
            started = time.perf_counter()
            build_ann([vectors], settings, file)
            built = round(time.perf_counter() - started, 1)
            store = DenseStore([vectors], file)
            sample = Sample(store, queries)
            rescored = settings.rescored(settings.factory_for(len(vectors), DIMENSION))
            unit, most, _ = store.effort or ("", 1, 0.0)
            for effort in (
                (16, 32, 64, 128, 256, 512) if unit == "efSearch" else (1, 2, 4, 8, 16, 32, 64)
            ):
                if effort > most:
                    break
                store.set_search(f"{unit}={effort}", rescored)
                times = [_timed(store, query) for query in queries[:100]]
                rows.append(
                    {
                        "kind": name,
                        "search": f"{unit}={effort}",
                        "rescore": rescored,
                        "recall@10": float(sample.recall().mean()),
                        "milliseconds": 1000 * statistics.median(times),
                        "megabytes": file.stat().st_size // 1_000_000,
                        "build_seconds": built,
                    }
                )
        exact = DenseStore([vectors])
        times = [_timed(exact, query) for query in queries[:20]]
        rows.append(
            {"kind": "flat", "recall@10": 1.0, "milliseconds": 1000 * statistics.median(times)}
        )
    draw(rows, RESULTS / "scale" / "recall.svg")
    return rows


def _timed(store: DenseStore, query: Any) -> float:
    started = time.perf_counter()
    store.search(query[None], 10)
    return time.perf_counter() - started


def between(wanted: int, embedded: int) -> tuple[Any, Any]:
    """Return vectors between real embeddings and their neighbours, and questions' vectors."""
    encoder, random = BiEncoder.load("all-MiniLM-L6-v2"), np.random.default_rng(0)
    texts = [document.text for document in islice(windows(), 10 * embedded)]
    real = encoder.encode_documents([texts[n] for n in random.permutation(len(texts))[:embedded]])
    near = faiss.knn(real, real, 20, metric=faiss.METRIC_INNER_PRODUCT)[1]
    out = np.empty((wanted, DIMENSION), np.float32)
    for start in range(0, wanted, 1 << 16):
        rows = random.integers(0, embedded, min(1 << 16, wanted - start))
        others = near[rows, random.integers(1, 20, len(rows))]
        share = random.random((len(rows), 1), np.float32) * 0.5
        block = real[rows] + share * (real[others] - real[rows])
        out[start : start + len(rows)] = block / np.linalg.norm(block, axis=1, keepdims=True)
    file = data_folder() / "squad/queries.jsonl.gz"
    asked = [example.query.text for example in read_questions(file)]
    return out, encoder.encode_queries(asked[:200])


def draw(rows: Sequence[dict[str, Any]], path: Path) -> None:
    """Draw recall against time, a line for each kind."""
    figure = Figure((7, 4.5), layout="constrained")
    axes = figure.add_subplot()
    for kind in dict.fromkeys(row["kind"] for row in rows):
        own = [row for row in rows if row["kind"] == kind]
        axes.plot(
            [row["milliseconds"] for row in own],
            [row["recall@10"] for row in own],
            "o-",
            label=kind,
        )
    axes.set(xscale="log", xlabel="milliseconds a query, one thread", ylabel="recall@10")
    axes.grid(alpha=0.3)
    axes.legend()
    path.parent.mkdir(parents=True, exist_ok=True)
    with mpl.rc_context({"svg.hashsalt": "ragkit", "svg.fonttype": "none"}):
        figure.savefig(path, metadata={"Date": None})


if __name__ == "__main__":
    main()
