"""The generator's utility labels, beside padded forward passes of whole pairs.

    OMP_WAIT_POLICY=PASSIVE python benchmarks/speed_utility.py

Questions of squadshifts_reddit (train) with BM25's passages, one passage a prompt, read by SmolLM2:
log p(answer | passage, question) of every pair, and log p(answer | question) of every question.
Two ways in turn (A B A B), over the same pairs, from texts to numbers:
ragkit  what pairs begin with alike is read once; no padding; logits where answers are predicted
padded  batches of 8 as they come, padded to the longest, logits and log_softmax everywhere; the
        prompts without a passage, which are short, in batches of their own

What is shared depends on how many questions are asked of the same passages, so three draws:
passages   all pairs, of those of all train questions, whose passage is among `--drawn` drawn at
           random: the share that they have in a run over all of train. The prompts without a
           passage, one a question, are more of the whole here than there, which does not help us
documents  whole lists of questions whose gold passage is among `--documents` drawn at random, up to
           `--questions`: gold passages are shared, the others hardly
questions  whole lists of `--questions` drawn at random: hardly a passage is shared
How many pairs a passage has in each, and over all of train, stands in the results; so does how
often the gold passage is first by utility, where whole lists are labelled.
"""

from __future__ import annotations

import argparse
import random
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any, TypeAlias

import numpy as np
import torch
from measure import data_folder, ratio, save, side_by_side
from rich.console import Console

from ragkit import Example, Hit, Index
from ragkit.corpus import read_documents, read_qrels, read_questions
from ragkit.models import Generator
from ragkit.models.loading import end_ids
from ragkit.models.precision import pad
from ragkit.readers import GeneratorReader
from ragkit.retrievers import Bm25Retriever
from ragkit.training.utility import Utility, utilities
from ragkit.types import Qrels

PEER_BATCH = 8

Lists: TypeAlias = dict[int, Sequence[Hit]]
"""The places of the questions that are drawn, and the hits of each."""


def main() -> None:
    """Time both ways on both draws, and write the ratios."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--questions", type=int, default=60)
    parser.add_argument("--documents", type=int, default=12, help="whose questions are drawn")
    parser.add_argument("--drawn", type=int, default=8, help="passages whose pairs are drawn")
    parser.add_argument("--draws", default="passages,documents,questions")
    parser.add_argument("--passages", type=int, default=8)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--style", default="virtual-tokens")
    parser.add_argument("--context-tokens", type=int, default=1024)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--no-save", action="store_true")
    arguments = parser.parse_args()
    generator = Generator.load("SmolLM2-135M-Instruct", precision="fp32", device="cpu")
    reader = GeneratorReader(
        generator, style=arguments.style, context_tokens=arguments.context_tokens
    )
    folder = data_folder() / "squadshifts_reddit"
    qrels = read_qrels(folder / "qrels" / "train.tsv")
    asked = [e for e in read_questions(folder / "queries.jsonl.gz") if e.query.id in qrels]
    found = retrieved(folder, asked, arguments.passages)
    for name in arguments.draws.split(","):
        lists = DRAWS[name](asked, found, qrels, arguments)
        examples, hits = [asked[i] for i in lists], list(lists.values())
        row, labels = measure(reader, examples, hits, arguments.rounds)
        row = {"draw": name} | shared(hits, found) | row
        if name != "passages":
            row |= ranked(examples, hits, labels, qrels)
        Console().print(row)
        if not arguments.no_save:
            settings = vars(arguments) | {"precision": "fp32", "threads": torch.get_num_threads()}
            settings |= {"model": generator.name, "corpus": folder.name}
            save(f"training/utility-{name}", [row], settings)


def retrieved(folder: Path, examples: Sequence[Example], k: int) -> list[list[Hit]]:
    """Return BM25's passages of all questions."""
    with tempfile.TemporaryDirectory() as place:
        documents = read_documents([folder / "corpus.jsonl.gz"])
        index = Index.build(Path(place) / "kb", documents, stores=["bm25"])
        return Bm25Retriever(index).retrieve([e.query for e in examples], k)


def of_passages(
    examples: Sequence[Example], found: Sequence[Sequence[Hit]], qrels: Qrels, arguments: Any
) -> Lists:
    """Draw passages that were retrieved, and take all their pairs."""
    every = sorted({hit.document.id for hits in found for hit in hits})
    drawn = set(random.Random(arguments.seed).sample(every, arguments.drawn))
    lists = {i: [hit for hit in found[i] if hit.document.id in drawn] for i in range(len(found))}
    return {place: hits for place, hits in lists.items() if hits}


def of_documents(
    examples: Sequence[Example], found: Sequence[Sequence[Hit]], qrels: Qrels, arguments: Any
) -> Lists:
    """Draw documents, and take the questions of which they are the gold passages."""
    gold = [{d for d, grade in qrels[e.query.id].items() if grade > 0} for e in examples]
    every = sorted(set[str]().union(*gold))
    drawn = set(random.Random(arguments.seed).sample(every, arguments.documents))
    places = [place for place, of in enumerate(gold) if of & drawn]
    return {place: found[place] for place in places[: arguments.questions]}


def of_questions(
    examples: Sequence[Example], found: Sequence[Sequence[Hit]], qrels: Qrels, arguments: Any
) -> Lists:
    """Draw questions."""
    places = random.Random(arguments.seed).sample(range(len(examples)), arguments.questions)
    return {place: found[place] for place in places}


DRAWS = {"passages": of_passages, "documents": of_documents, "questions": of_questions}


def shared(hits: Sequence[Sequence[Hit]], everything: Sequence[Sequence[Hit]]) -> dict[str, float]:
    """Return how many pairs a passage has, in a draw and in all of train."""

    def pairs(lists: Sequence[Sequence[Hit]]) -> float:
        ids = [hit.document.id for found in lists for hit in found]
        return len(ids) / len(set(ids))

    return {"pairs a passage": pairs(hits), "pairs a passage, all of train": pairs(everything)}


def measure(
    reader: GeneratorReader,
    examples: Sequence[Example],
    hits: Sequence[Sequence[Hit]],
    rounds: int,
) -> tuple[dict[str, Any], list[Utility]]:
    """Time both ways over the same pairs, and compare their values; return the labels too."""
    ours: list[Utility] = []
    theirs: list[float] = []
    settings = {"style": reader.style.to_json()}
    generator: Any = reader.generator

    def labelled() -> None:
        with tempfile.TemporaryDirectory() as place:  # a new one each time: nothing is kept
            ours[:] = utilities(
                generator, examples, hits, reader.prompt, settings, folder=Path(place)
            )

    def padded() -> None:
        lists = list(zip(examples, hits, strict=True))
        theirs[:] = whole_pairs(generator, reader, [(example, []) for example in examples])
        theirs.extend(whole_pairs(generator, reader, [(e, [h]) for e, of in lists for h in of]))

    seconds = side_by_side({"ragkit": labelled, "padded": padded}, rounds)
    nats = np.concatenate([[u.closed for u in ours], *(u.opened for u in ours)])
    return {
        "questions": len(examples),
        "pairs": len(nats),
        "seconds": seconds,
        "times as fast": ratio(seconds, "ragkit", "padded"),
        "largest difference in nats": float(np.abs(nats - theirs).max()),
    }, ours


@torch.inference_mode()
def whole_pairs(
    generator: Generator, reader: GeneratorReader, pairs: Sequence[tuple[Example, Sequence[Hit]]]
) -> list[float]:
    """Return the answers' log-probabilities, the usual way."""
    ends = end_ids(generator.model, generator.tokenizer)
    rows = []
    for example, hits in pairs:
        answer = generator.encoder.answer_ids(example.answers[0], ends)[:-1]
        prompt = generator.encoder.encode(reader.prompt(example.query, hits)).ids
        rows.append(([*prompt, *answer], len(answer)))
    nats = []
    for start in range(0, len(rows), PEER_BATCH):
        part = rows[start : start + PEER_BATCH]
        ids, mask = pad([row for row, _ in part], 0, left=False, device="cpu")
        logits = generator.model(input_ids=ids, attention_mask=mask, use_cache=False).logits
        logprobs = torch.log_softmax(logits[:, :-1].float(), dim=-1)
        picked = logprobs.gather(-1, ids[:, 1:, None])[..., 0]
        for row, (tokens, count) in zip(picked, part, strict=True):
            nats.append(float(row[len(tokens) - 1 - count : len(tokens) - 1].double().sum()))
    return nats


def ranked(
    examples: Sequence[Example],
    hits: Sequence[Sequence[Hit]],
    labels: Sequence[Utility],
    qrels: Qrels,
) -> dict[str, float]:
    """Return how often the gold passage is first, where it is among the passages."""
    first: dict[str, list[float]] = {"utility": [], "BM25": [], "chance": []}
    for example, found, label in zip(examples, hits, labels, strict=True):
        gold = [qrels[example.query.id].get(hit.document.id, 0) > 0 for hit in found]
        if any(gold):
            first["utility"].append(gold[int(label.gains.argmax())])
            first["BM25"].append(gold[0])
            first["chance"].append(sum(gold) / len(gold))
    shares = {f"gold first, {name}": float(np.mean(values)) for name, values in first.items()}
    return {"questions with gold": float(len(first["BM25"]))} | shares


if __name__ == "__main__":
    main()
