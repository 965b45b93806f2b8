"""Training an encoder beside sentence-transformers' trainer, and mining beside its miner.

    OMP_WAIT_POLICY=PASSIVE python benchmarks/speed_training.py

Questions of squadshifts_reddit (train) with their gold passages, all-MiniLM-L6-v2, in turn (A B A):

epoch   the same questions, InfoNCE at the same temperature, the same batches of questions:
        `sentence-transformers`, its trainer and MultipleNegativesRankingLoss as they come (a batch
        padded to its longest text); `scattered`, ours on the same rows (even passes); `together`,
        ours with the questions of a passage in one batch, where it is encoded once
mining  hard negatives: `mine_hard_negatives`, which encodes the corpus; ours, from the saved index
"""

from __future__ import annotations

import argparse
import statistics
import tempfile
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from measure import data_folder, ratio, save, side_by_side
from rich.console import Console

from ragkit import Example, Index
from ragkit.corpus import read_documents, read_qrels, read_questions
from ragkit.models import BiEncoder
from ragkit.retrievers import DenseRetriever
from ragkit.training.keeper import LoopSettings
from ragkit.training.lists import listed
from ragkit.training.negative_rules import Rules
from ragkit.training.negatives import mine
from ragkit.training.retriever_loss import LossSettings
from ragkit.training.retriever_runs import RetrieverRun

BASE, TEMPERATURE = "all-MiniLM-L6-v2", 0.05


def main() -> None:
    """Time both and write the ratios."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--questions", type=int, default=192, help="of neighbouring passages")
    parser.add_argument("--batch", type=int, default=64)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--mined", type=int, default=200, help="questions that get negatives")
    parser.add_argument("--documents", type=int, default=400, help="that are mined from")
    arguments = parser.parse_args()
    encoder = BiEncoder.load(BASE, precision="fp32", device="cpu")
    examples = questions()
    rows = [
        epoch(encoder, examples[: arguments.questions], arguments),
        mining(encoder, examples, arguments),
    ]
    save("training/speed", rows, vars(arguments) | {"threads": torch.get_num_threads()})
    for row in rows:
        Console().print(row)


def questions() -> list[Example]:
    """Return the train questions with their gold passages, passage after passage."""
    folder = data_folder() / "squadshifts_reddit"
    documents = {d.id: d for d in read_documents([folder / "corpus.jsonl.gz"])}
    qrels = read_qrels(folder / "qrels" / "train.tsv")
    asked = {e.query.id: e for e in read_questions(folder / "queries.jsonl.gz")}
    found = [
        replace(asked[query], positives=tuple(documents[name] for name in grades))
        for query, grades in qrels.items()
    ]
    return sorted(found, key=lambda example: example.positives[0].id)


def epoch(encoder: BiEncoder, examples: Sequence[Example], arguments: Any) -> dict[str, Any]:
    """Time an epoch of each way."""
    steps = len(examples) // arguments.batch
    settings = LoopSettings(
        steps=steps, batch=arguments.batch, learning_rate=1e-5, evaluate_every=steps
    )
    numbered, documents = listed(examples)

    def ours(together: bool) -> Callable[[], None]:
        def learn() -> None:
            run = RetrieverRun(
                encoder,
                documents,
                numbered,
                LossSettings(temperature=TEMPERATURE),
                negatives=0,
                together=together,
            )
            with tempfile.TemporaryDirectory() as folder:
                run.learn(settings, Path(folder))

        return learn

    ways = {
        "together": ours(True),
        "scattered": ours(False),
        "sentence-transformers": lambda: theirs(encoder, examples, steps, arguments.batch),
    }
    seconds = side_by_side(ways, arguments.rounds)
    found: dict[str, Any] = {
        "work": "an epoch of an encoder",
        "passages a question": len(documents) / len(examples),
        "seconds": {name: statistics.median(values) for name, values in seconds.items()},
        "rounds": seconds,
    }
    for name in ("scattered", "together"):
        found[f"ratio, {name}"] = ratio(seconds, name, "sentence-transformers")
    return found


def theirs(encoder: BiEncoder, examples: Sequence[Example], steps: int, batch: int) -> None:
    """Train by sentence-transformers' trainer as its documentation shows it."""
    from copy import deepcopy

    from datasets import Dataset
    from sentence_transformers import (
        SentenceTransformerTrainer,
        SentenceTransformerTrainingArguments,
    )
    from sentence_transformers.sentence_transformer.losses import MultipleNegativesRankingLoss

    model = deepcopy(encoder.model)
    for module in model.modules():
        if isinstance(module, torch.nn.Dropout):  # as ours
            module.p = 0.0
    data = {
        "anchor": [example.query.text for example in examples],
        "positive": [example.positives[0].contents for example in examples],
    }
    with tempfile.TemporaryDirectory() as folder:
        options = SentenceTransformerTrainingArguments(
            output_dir=folder,
            max_steps=steps,
            per_device_train_batch_size=batch,
            learning_rate=1e-5,
            save_strategy="no",
            report_to=[],
            disable_tqdm=True,
            use_cpu=True,
        )
        SentenceTransformerTrainer(
            model=model,
            args=options,
            train_dataset=Dataset.from_dict(data),
            loss=MultipleNegativesRankingLoss(model, scale=1 / TEMPERATURE),
        ).train()


def mining(encoder: BiEncoder, examples: Sequence[Example], arguments: Any) -> dict[str, Any]:
    """Time the mining of 5 negatives a question among the best 50 hits."""
    from datasets import Dataset
    from sentence_transformers.util import mine_hard_negatives

    documents = {d.id: d for example in examples for d in example.positives}
    documents = dict(list(documents.items())[: arguments.documents])
    some = [e for e in examples if e.positives[0].id in documents][: arguments.mined]
    corpus = [document.contents for document in documents.values()]
    pairs = Dataset.from_dict(
        {
            "anchor": [e.query.text for e in some],
            "positive": [e.positives[0].contents for e in some],
        }
    )
    with tempfile.TemporaryDirectory() as place:
        Index.build(Path(place) / "kb", documents.values(), encoder=encoder, stores=["dense"])

        def ours() -> None:
            index = Index.open(Path(place) / "kb")
            hits = DenseRetriever(index, encoder).retrieve([e.query for e in some], 50)
            mine(some, hits, Rules(negatives=5, allow_answers=True), retriever="dense")

        def peer() -> None:
            mine_hard_negatives(
                pairs,
                encoder.model,
                corpus=corpus,
                range_max=50,
                num_negatives=5,
                batch_size=32,
                verbose=False,
            )

        seconds = side_by_side({"ragkit": ours, "mine_hard_negatives": peer}, arguments.rounds)
    return {
        "work": "mining hard negatives",
        "documents": len(corpus),
        "questions": len(some),
        "seconds": {name: statistics.median(values) for name, values in seconds.items()},
        "rounds": seconds,
        "ratio": ratio(seconds, "ragkit", "mine_hard_negatives"),
    }


if __name__ == "__main__":
    main()
