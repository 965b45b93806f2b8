"""What training brings to retrieval: encoders, a query adapter, rerankers; and what is forgotten.

    python benchmarks/quality_training.py --parts contrastive,query,adapter,lsr --seeds 0,1,2
    python benchmarks/quality_training.py --parts reranker --limit 1500 --test 300
    python benchmarks/quality_training.py --parts retention

Each part trains by `ragkit-train` on the train questions of a set (squadshifts_reddit), chooses on
dev, and looks at test once. What is trained is kept in `--work` and not trained again. lsr has the
answers alone, no qrels. Hybrid's weight is chosen on dev for each encoder. A set without test is
tested on its dev, and chooses on questions on a tenth of the documents of train; one that has dev
alone is split by what stands before # in documents' ids: their site.
"""

from __future__ import annotations

import argparse
import shutil
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from random import Random
from typing import Any

import numpy as np
from measure import data_folder, same_settings, save
from ragkit.trainers.__main__ import app as trainer
from ragkit.trainers.reranker_results import WEIGHTS, best_weight
from rich.console import Console
from rich.table import Table

from ragkit import Index, Query
from ragkit.console import run
from ragkit.corpus import (
    read_documents,
    read_qrels,
    read_questions,
    write_qrels,
    write_questions,
)
from ragkit.evaluation.duplicates import normalize_text
from ragkit.evaluation.metrics import retrieval_measures, strictly_decreasing
from ragkit.evaluation.statistics import bootstrap_means, paired_differences
from ragkit.fusion import interpolated
from ragkit.models import BiEncoder, CrossEncoder
from ragkit.retrievers import Bm25Retriever, DenseRetriever, HybridRetriever
from ragkit.training.reranker_runs import Ranked
from ragkit.types import Hit, Qrels, Retriever

BASE = "all-MiniLM-L6-v2"
MEASURES = ("nDCG@10", "recall@10")
WAYS: dict[str, list[str]] = {
    "contrastive": ["--examples=mined", "--objective=contrastive"],
    "query": ["--examples=mined", "--objective=contrastive", "--side=query"],
    "adapter": ["--examples=mined", "--objective=query-adapter", "--epochs=10"],
    "lsr": ["--examples=answers", "--objective=lsr"],
}
RETAINED = {"nfcorpus": "test", "cranfield": "test"}
DEV, DEPTH, RERANKED = 300, 100, 50

Values = dict[str, list[list[float]]]
"""Measure -> [seeds, questions]."""


def main() -> None:
    """Train and test the parts."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--set", default="squadshifts_reddit")
    parser.add_argument("--parts", default="contrastive")
    parser.add_argument("--seeds", default="0,1,2")
    parser.add_argument("--limit", type=int, help="questions to train on")
    parser.add_argument("--test", type=int, help="questions to test on, drawn at random")
    parser.add_argument("--objectives", default="bce,listwise,utility", help="of rerankers")
    parser.add_argument("--shares", default="0.25,0.5,0.75,1", help="of what was learnt: retention")
    parser.add_argument("--options", default="", help="more options of ragkit-train, after commas")
    parser.add_argument("--work", type=Path, default=Path("training-work"))
    arguments = parser.parse_args()
    for part in arguments.parts.split(","):
        rows = {"reranker": rerankers, "retention": retention}.get(part, retrievers)(
            part, arguments
        )
        given = {name: str(value) for name, value in vars(arguments).items() if name != "work"}
        save(f"adaptation/{arguments.set}-{part}", rows, given)
        for row in rows:
            show(row)


class Task:
    """A set: its index by the base encoder, its files, and its questions by split."""

    def __init__(self, name: str, work: Path) -> None:
        self.folder = data_folder() / name
        self.work = work / name
        self.work.mkdir(parents=True, exist_ok=True)
        self.kb = self.work / "kb"
        if not (self.kb / "manifest.json").exists():
            documents = read_documents([self.folder / "corpus.jsonl.gz"])
            Index.build(self.kb, documents, encoder=BiEncoder.load(BASE))
        self.questions = {e.query.id: e for e in read_questions(self.folder / "queries.jsonl.gz")}
        self.splits = self.folder / "qrels"
        if not (self.splits / "test.tsv").exists():
            self.splits = self.work / "qrels"
            self.splits.mkdir(exist_ok=True)
            for split, qrels in self.split().items():
                write_qrels(self.splits / f"{split}.tsv", qrels, "beir")

    def split(self) -> dict[str, Qrels]:
        """Return train, dev and test of a set that has no test: by document, or by site."""
        given = {path.stem: read_qrels(path) for path in (self.folder / "qrels").glob("*.tsv")}
        if "train" in given:
            groups = {name: min(grades) for name, grades in given["train"].items()}
            shares, splits = (0.9, 1.0), {"test": given["dev"]}
        else:
            groups = {name: min(grades).partition("#")[0] for name, grades in given["dev"].items()}
            shares, splits = (0.6, 0.7), {}
        asked = given.get("train", given["dev"])
        names = sorted(set(groups.values()))
        order = dict(zip(Random(0).sample(names, len(names)), range(len(names)), strict=True))
        for name, grades in asked.items():
            place = order[groups[name]] / len(order)
            split = "train" if place < shares[0] else "dev" if place < shares[1] else "test"
            splits.setdefault(split, {})[name] = grades
        return splits

    def qrels(self, split: str, limit: int | None = None) -> Qrels:
        """Return the judgements of a split, or of some of its questions drawn at random."""
        qrels = read_qrels(self.splits / f"{split}.tsv")
        if limit is None or limit >= len(qrels):
            return qrels
        return {name: qrels[name] for name in Random(0).sample(sorted(qrels), limit)}

    def queries(self, qrels: Qrels) -> list[Query]:
        """Return the questions that are judged."""
        return [self.questions[name].query for name in qrels]

    def examples(self, kind: str, dev: int = DEV) -> list[str]:
        """Return the options that name the questions: with mined negatives, or answers alone."""
        path = self.work / f"{kind}.jsonl"
        splits = self.splits
        if kind == "answers" and not path.exists():
            held = [name for split in ("dev", "test") for name in self.qrels(split)]
            texts = {normalize_text(self.questions[name].query.text) for name in held}
            asked = [self.questions[name] for name in self.qrels("train")]
            apart = [e for e in asked if normalize_text(e.query.text) not in texts]
            write_questions(path, [e for e in apart if e.answers])
        if kind == "mined" and not path.exists():
            held_out = [f"--held-out={splits / (name + '.tsv')}" for name in ("dev", "test")]
            call(
                "negatives", f"--index={self.kb}", f"--output={path}", *held_out,
                f"--questions={self.folder / 'queries.jsonl.gz'}",
                f"--qrels={splits / 'train.tsv'}", "--retriever=hybrid", "--depth=30",
                "--from-rank=2", "--negatives=8",
            )  # fmt: skip
        options = [f"--examples={path}", f"--dev-questions={self.folder / 'queries.jsonl.gz'}"]
        return [*options, f"--dev-qrels={splits / 'dev.tsv'}", f"--dev-limit={dev}"]


def call(*options: str) -> None:
    """Run ragkit-train, which must succeed."""
    if code := run(trainer, list(options)):
        raise SystemExit(code)


def retrievers(part: str, arguments: Any) -> list[dict[str, Any]]:
    """Train an encoder in one way, and test it alone and in hybrid, beside its base."""
    task = Task(arguments.set, arguments.work)
    folder = task.work / part
    same_settings(task.work / f"{part}.settings", used(arguments))
    if not (folder / "results.json").exists():
        kind, *way = WAYS[part]
        call(
            "retriever", *task.examples(kind.partition("=")[2]), *way, f"--index={task.kb}",
            f"--output={folder}", f"--seeds={arguments.seeds}", *more(arguments),
        )  # fmt: skip
    test, dev = task.qrels("test", arguments.test), task.qrels("dev", DEV)
    systems: dict[str, Values] = {}
    for name, folders in (("base", [BASE]), (part, seeds_of(folder, arguments))):
        for encoder in folders:
            for system, values in tested(task, encoder, dev, test).items():
                of = systems.setdefault(
                    f"{name}, {system}" if system != "bm25" else system, {m: [] for m in MEASURES}
                )
                for measure in MEASURES:
                    of[measure].append(values[measure])
    systems["bm25"] = {measure: of[:1] for measure, of in systems["bm25"].items()}
    pairs = [("base, dense", f"{part}, dense"), ("base, hybrid", f"{part}, hybrid")]
    pairs += [(f"{part}, dense", f"{part}, hybrid"), ("bm25", f"{part}, hybrid")]
    return [row_of(arguments.set, systems, pairs)]


def more(arguments: Any) -> list[str]:
    """Return the options of training that the command line adds."""
    limit = [f"--limit={arguments.limit}"] if arguments.limit else []
    return [*limit, *(f"--{option}" for option in arguments.options.split(",") if option)]


def used(arguments: Any) -> dict[str, Any]:
    """Return the settings that what is learnt depends on."""
    return {name: getattr(arguments, name) for name in ("seeds", "limit", "options")}


def seeds_of(folder: Path, arguments: Any) -> list[str]:
    """Return the folders of the seeds' models."""
    seeds = arguments.seeds.split(",")
    return [str(folder)] if len(seeds) == 1 else [str(folder / "seeds" / seed) for seed in seeds]


def searchers(task: Task, name: str, dev: Qrels) -> dict[str, Retriever]:
    """Return BM25, an encoder's dense search, and their hybrid with a weight chosen on dev."""
    encoder = BiEncoder.load(name)
    index = Index.open(task.kb)
    if name != BASE and "base" not in encoder.describe():
        place = task.work / "refreshed"
        shutil.rmtree(place, ignore_errors=True)
        shutil.copytree(task.kb, place)
        index = Index.open(place).refresh(encoder)
    parts: list[Retriever] = [Bm25Retriever(index), DenseRetriever(index, encoder)]
    scores: dict[float, float] = {}
    for weight in np.linspace(0.1, 0.9, 9).round(1).tolist():
        found = values_of(weighted(parts, weight), task.queries(dev), dev)
        scores[weight] = float(np.mean(found["nDCG@10"]))
    best = max(scores, key=lambda weight: scores[weight])
    return {"bm25": parts[0], "dense": parts[1], "hybrid": weighted(parts, best)}


def weighted(parts: Sequence[Retriever], weight: float) -> Retriever:
    """Fuse by scaled scores with this weight on BM25."""
    return HybridRetriever(parts, [weight, 1 - weight], fusion="weighted")


def tested(task: Task, name: str, dev: Qrels, test: Qrels) -> dict[str, dict[str, list[float]]]:
    """Return the test questions' scores by each of an encoder's searches."""
    queries = task.queries(test)
    found = searchers(task, name, dev)
    return {system: values_of(retriever, queries, test) for system, retriever in found.items()}


def values_of(
    retriever: Retriever, queries: Sequence[Query], qrels: Qrels
) -> dict[str, list[float]]:
    """Return each measure's values, question by question."""
    return scored(retriever.retrieve(queries, DEPTH), queries, qrels)


def scored(lists: Any, queries: Sequence[Query], qrels: Qrels) -> dict[str, list[float]]:
    """Return each measure's values of hits, question by question."""
    run_ = {
        query.id: {hit.document.id: hit.score for hit in hits}
        for query, hits in zip(queries, lists, strict=True)
    }
    found = retrieval_measures(strictly_decreasing(run_), qrels, [10])
    return {measure: [found[measure][query.id] for query in queries] for measure in MEASURES}


def rerankers(part: str, arguments: Any) -> list[dict[str, Any]]:
    """Train cross-encoders from labels and from utility; rerank 50 hits of the best hybrid.

    They start from the encoder that was learnt, if one was, but for those of utility, which learn
    from answers alone. Each is tested alone, and in the sum with the retrieval's scores by a weight
    chosen on dev.
    """
    task = Task(arguments.set, arguments.work)
    judged = {"dev": task.qrels("dev", 50), "test": task.qrels("test", arguments.test)}
    queries = {split: task.queries(qrels) for split, qrels in judged.items()}
    tuned = task.work / "contrastive"
    encoder = str(tuned) if (tuned / "results.json").exists() else BASE
    hybrid = searchers(task, encoder, task.qrels("dev", DEV))["hybrid"]
    first = {split: hybrid.retrieve(asked, RERANKED) for split, asked in queries.items()}

    def measured(split: str, hits: Sequence[Sequence[Hit]]) -> dict[str, list[float]]:
        return scored(hits, queries[split], judged[split])

    systems: dict[str, Values] = {
        "hybrid": {m: [v] for m, v in measured("test", first["test"]).items()}
    }
    taken: dict[str, list[float]] = {}
    for objective in arguments.objectives.split(","):
        kind, base = ("answers", BASE) if objective == "utility" else ("mined", encoder)
        folder = task.work / f"reranker-{objective}"
        settings = used(arguments) | {"base": Path(base).name}
        same_settings(task.work / f"reranker-{objective}.settings", settings)
        if not (folder / "results.json").exists():
            call(
                "reranker", *task.examples(kind, 50), f"--index={task.kb}", f"--base={base}",
                f"--output={folder}", f"--objective={objective}", f"--seeds={arguments.seeds}",
                *more(arguments),
            )  # fmt: skip
        alone, fused = f"hybrid, {objective} alone", f"hybrid, {objective}"
        systems |= {system: {measure: [] for measure in MEASURES} for system in (alone, fused)}
        for name in seeds_of(folder, arguments):
            model = CrossEncoder.load(name)
            scores = {
                split: Ranked(queries[split], first[split], judged[split]).scores(model)
                for split in judged
            }
            means = {
                weight: float(np.mean(
                    measured("dev", reordered(first["dev"], scores["dev"], weight))["nDCG@10"]
                ))
                for weight in WEIGHTS
            }  # fmt: skip
            weight = best_weight(means)
            taken.setdefault(objective, []).append(weight)
            for system, of in ((alone, 1.0), (fused, weight)):
                found = measured("test", reordered(first["test"], scores["test"], of))
                for measure in MEASURES:
                    systems[system][measure].append(found[measure])
    pairs = [("hybrid", name) for name in systems if name != "hybrid"]
    return [row_of(arguments.set, systems, pairs) | {"weights": taken, "depth": RERANKED}]


def reordered(
    hits: Sequence[Sequence[Hit]], scores: Sequence[Sequence[float]], weight: float
) -> list[list[Hit]]:
    """Return the hits in the order of the sums of both scores."""
    found = []
    for first, own in zip(hits, scores, strict=True):
        sums = interpolated([hit.score for hit in first], own, weight)
        again = [Hit(hit.document, value) for hit, value in zip(first, sums, strict=True)]
        found.append(sorted(again, key=lambda hit: -hit.score))
    return found


def retention(part: str, arguments: Any) -> list[dict[str, Any]]:
    """Search other sets with the base, what was learnt, and averages of the two."""
    from ragkit.training.query_side import averaged

    trained = Task(arguments.set, arguments.work).work / "contrastive"
    rows = []
    for name, split in RETAINED.items():
        task = Task(name, arguments.work)
        qrels = task.qrels(split)
        queries, systems = task.queries(qrels), {}
        documents = [document.contents for document in Index.open(task.kb).documents]
        ids = [document.id for document in Index.open(task.kb).documents]
        base = BiEncoder.load(BASE, precision="fp32")
        for share in (0.0, *map(float, arguments.shares.split(","))):
            of: Values = {measure: [] for measure in MEASURES}
            for folder in seeds_of(trained, arguments)[: 1 if share == 0 else None]:
                encoder = BiEncoder.load(folder, precision="fp32")
                states = base.model.state_dict(), encoder.model.state_dict()
                encoder.model.load_state_dict(averaged(*states, share))
                scores = encoder.encode_queries([q.text for q in queries]) @ (
                    encoder.encode_documents(documents).T
                )
                best = np.argsort(-scores, axis=1)[:, :DEPTH]
                run_ = {
                    query.id: {ids[row]: float(scores[place, row]) for row in best[place]}
                    for place, query in enumerate(queries)
                }
                found = retrieval_measures(strictly_decreasing(run_), qrels, [10])
                for measure in MEASURES:
                    of[measure].append([found[measure][query.id] for query in queries])
            systems[f"share {share}"] = of
        pairs = [("share 0.0", system) for system in systems if system != "share 0.0"]
        rows.append(row_of(name, systems, pairs))
    return rows


def row_of(
    name: str, systems: dict[str, Values], pairs: Sequence[tuple[str, str]]
) -> dict[str, Any]:
    """Return means with intervals, and differences by question, of systems on one set."""
    return {
        "set": name,
        "systems": {
            system: {
                measure: asdict(estimate)
                for measure, estimate in zip(
                    MEASURES, bootstrap_means([of[m] for m in MEASURES]), strict=True
                )
            }
            for system, of in systems.items()
        },
        "differences": {
            f"{after} - {before}": {
                measure: asdict(
                    paired_differences([(systems[before][measure], systems[after][measure])])[0]
                )
                for measure in MEASURES
            }
            for before, after in pairs
        },
    }


def show(row: dict[str, Any]) -> None:
    """Print a set's table."""
    table = Table("system", *MEASURES, title=row["set"])
    for group in ("systems", "differences"):
        for name, of in row[group].items():
            cells = (of[m] for m in MEASURES)
            table.add_row(
                name, *(f"{c['mean']:.3f} [{c['low']:.3f}, {c['high']:.3f}]" for c in cells)
            )
        table.add_section()
    Console(width=120).print(table)


if __name__ == "__main__":
    main()
