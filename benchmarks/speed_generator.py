"""A training step of a generator's adapter, beside the same rows padded.

    OMP_WAIT_POLICY=PASSIVE python benchmarks/speed_generator.py

The ways, in turn on the same rows (SQuAD questions, BM25 passages, SmolLM2 with LoRA):
ragkit      rows packed into passes; logits where answers are predicted
maximum     transformers' labels and loss: rows padded to the longest of all rows, logits everywhere
dynamic     the same, padded to the longest row of a batch
Loss and gradients of the first two are compared. No cache, no other rows: what is timed is the way
forward and back of the same batches.
"""

from __future__ import annotations

import argparse
import statistics
import tempfile
from collections.abc import Callable, Sequence
from pathlib import Path
from random import Random
from typing import Any

import torch
from measure import data_folder, ratio, save, side_by_side
from rich.console import Console

from ragkit import Index
from ragkit.corpus import read_documents, read_qrels, read_questions
from ragkit.models import Generator
from ragkit.models.precision import pad
from ragkit.readers import GeneratorReader
from ragkit.retrievers import Bm25Retriever
from ragkit.training.lora import with_lora
from ragkit.training.packing import SftRow, SftTrainee, sft_row
from ragkit.training.token_loss import IGNORED, collate


def main() -> None:
    """Time the ways and write the ratios."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--batch", type=int, default=8)
    parser.add_argument("--batches", type=int, default=3)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--passages", type=int, default=3, help="drawn from 1 to this")
    parser.add_argument("--rank", type=int, default=8)
    arguments = parser.parse_args()
    generator = Generator.load("SmolLM2-135M-Instruct", precision="fp32", device="cpu")
    batches = rows_of(generator, arguments)
    torch.manual_seed(0)
    row = measure(with_lora(generator.model, arguments.rank), batches, arguments.rounds)
    settings = vars(arguments) | {"precision": "fp32", "threads": torch.get_num_threads()}
    save("training/generator", [row], settings)
    Console().print(row)


def rows_of(generator: Generator, arguments: Any) -> list[list[SftRow]]:
    """Return batches of rows: questions drawn at random, with their first passages."""
    folder, own = data_folder() / "squad", Random(0)
    judged = read_qrels(folder / "qrels" / "train.tsv")
    asked = [e for e in read_questions(folder / "queries.jsonl.gz") if e.query.id in judged]
    examples = own.sample(asked, arguments.batch * arguments.batches)
    with tempfile.TemporaryDirectory() as place:
        documents = read_documents([folder / "corpus.jsonl.gz"])
        index = Index.build(Path(place) / "kb", documents, stores=["bm25"])
        hits = Bm25Retriever(index).retrieve([e.query for e in examples], arguments.passages)
    reader = GeneratorReader(generator, style="virtual-tokens", context_tokens=1024)
    rows = []
    for example, found in zip(examples, hits, strict=True):
        prompt = reader.prompt(example.query, found[: own.randint(1, arguments.passages)])
        rows.append(sft_row(generator, prompt, example.answers[0], example.query.id))
    return [rows[at : at + arguments.batch] for at in range(0, len(rows), arguments.batch)]


def measure(model: Any, batches: list[list[SftRow]], rounds: int) -> dict[str, Any]:
    """Time the ways over the same batches, and compare their gradients."""
    trainee = SftTrainee(model.train())
    lengths = [len(row.inputs) + 1 for rows in batches for row in rows]

    def ours(rows: list[SftRow]) -> torch.Tensor:
        loss: torch.Tensor = trainee(**collate(rows))["loss"]
        return loss

    def epoch(step: Callable[[list[SftRow]], torch.Tensor]) -> Callable[[], None]:
        def run() -> None:
            for rows in batches:
                step(rows).backward()

        return run

    ways = {
        "ragkit": epoch(ours),
        "maximum": epoch(lambda rows: padded(model, rows, max(lengths))),
        "dynamic": epoch(lambda rows: padded(model, rows, 0)),
    }
    seconds = side_by_side(ways, rounds)
    return {
        "seconds a step": {
            name: statistics.median(values) / len(batches) for name, values in seconds.items()
        },
        "rounds": seconds,
        "against maximum": ratio(seconds, "ragkit", "maximum"),
        "against dynamic": ratio(seconds, "ragkit", "dynamic"),
        "tokens of a row": {"mean": statistics.fmean(lengths), "most": max(lengths)},
        "packed": trainee.packs,
    } | gradients(model, ours, lambda rows: padded(model, rows, max(lengths)), batches[0])


def padded(model: Any, rows: Sequence[SftRow], width: int) -> torch.Tensor:
    """Return the loss of rows padded on the right, logits everywhere, as transformers has it."""
    whole = [[*row.prompt, *row.answer] for row in rows]
    ids, mask = pad([*whole, [0] * width], 0, left=False, device="cpu")
    ids, mask = ids[:-1], mask[:-1]
    labels = torch.full_like(ids, IGNORED)
    for place, row in enumerate(rows):
        labels[place, len(row.prompt) : len(row.prompt) + len(row.answer)] = torch.tensor(
            row.answer
        )
    loss: torch.Tensor = model(
        input_ids=ids, attention_mask=mask, labels=labels, use_cache=False
    ).loss
    return loss


def gradients(
    model: Any,
    ours: Callable[[list[SftRow]], torch.Tensor],
    theirs: Callable[[list[SftRow]], torch.Tensor],
    rows: list[SftRow],
) -> dict[str, float]:
    """Return how far our loss and gradients are from those of padded rows."""
    losses, found = [], []
    for way in (ours, theirs):
        model.zero_grad()
        losses.append(way(rows))
        losses[-1].backward()
        found.append(
            torch.cat([p.grad.flatten() for p in model.parameters() if p.grad is not None])
        )
    return {
        "difference of losses": abs(float((losses[0] - losses[1]).detach())),
        "largest difference of gradients": float((found[0] - found[1]).abs().max()),
        "largest gradient": float(found[1].abs().max()),
    }


if __name__ == "__main__":
    main()
