"""One training step and epoch of virtual tokens, beside three other ways to train such rows.

    OMP_WAIT_POLICY=PASSIVE python benchmarks/speed_tokens.py

The ways, in turn on the same rows (SQuAD questions, BM25 passages, SmolLM2):
ragkit      the frozen prefix: passages read without gradients, then kept; logits at labels alone
recipe      SPRING's published recipe, from its description: rows padded to 600 tokens, passages
            cut to 550 (the longest row decides where question and answer take more than 50);
            gradients through everything, logits everywhere
dynamic     the same, padded to the longest row
peft        peft's prompt tuning: tokens before everything, padded to the longest row
Loss and gradients of the first two are compared; peft's are of other places, and are not.
"""

from __future__ import annotations

import argparse
import statistics
import tempfile
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
from measure import data_folder, ratio, save, side_by_side
from rich.console import Console

from ragkit import Index
from ragkit.corpus import read_documents, read_qrels, read_questions
from ragkit.models import Generator
from ragkit.models.loading import end_ids
from ragkit.models.precision import pad
from ragkit.models.prefix_cache import PrefixCache
from ragkit.models.virtual_tokens import start_rows
from ragkit.readers import GeneratorReader
from ragkit.retrievers import Bm25Retriever
from ragkit.training.draws import Draws
from ragkit.training.prompt_tuning import PromptTuningTrainee
from ragkit.training.token_loss import IGNORED, TokenRow, TokenTrainee, collate, row_of

TOKENS, LONGEST = 50, 600


def main() -> None:
    """Time the ways and write the ratios."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--batch", type=int, default=8)
    parser.add_argument("--batches", type=int, default=3)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--passages", type=int, default=5, help="drawn from 1 to this")
    parser.add_argument("--every", type=int, default=50, help="question: 1 takes whole articles")
    parser.add_argument("--peers", default="recipe,dynamic,peft")
    parser.add_argument("--name", default="training/tokens", help="of the results")
    arguments = parser.parse_args()
    generator = Generator.load("SmolLM2-135M-Instruct", precision="fp32")
    batches = rows_of(generator, arguments)
    row = measure(generator, batches, arguments.rounds, arguments.peers.split(","))
    settings = vars(arguments) | {"tokens": TOKENS, "precision": "fp32"}
    save(arguments.name, [row], settings | {"threads": torch.get_num_threads()})
    Console().print(row)


def rows_of(generator: Generator, arguments: Any) -> list[list[TokenRow]]:
    """Return batches of training rows as `ragkit-train virtual-tokens` draws them."""
    folder = data_folder() / "squad"
    judged = read_qrels(folder / "qrels" / "train.tsv")
    questions = read_questions(folder / "queries.jsonl.gz")
    count = arguments.batch * arguments.batches
    examples = [e for e in questions if e.query.id in judged][
        : arguments.every * count : arguments.every
    ]
    with tempfile.TemporaryDirectory() as place:
        documents = read_documents([folder / "corpus.jsonl.gz"])
        index = Index.build(Path(place) / "kb", documents, stores=["bm25"])
        hits = Bm25Retriever(index).retrieve([e.query for e in examples], arguments.passages)
    reader = GeneratorReader(generator, style="virtual-tokens", context_tokens=LONGEST - TOKENS)
    answers = tuple(len(example.answers) for example in examples)
    draws = Draws(answers, arguments.batches, arguments.batch, (1, arguments.passages), TOKENS)
    ends = end_ids(generator.model, generator.tokenizer)
    rows = []
    for draw in draws:
        example = examples[draw.example]
        prompt = reader.prompt(example.query, hits[draw.example][: draw.passages])
        ids = generator.encoder.encode(prompt)
        answer = generator.encoder.answer_ids(example.answers[draw.answer], ends)
        rows.append(row_of(draw.example, ids, draw.tokens, answer, "middle"))
    return [rows[at : at + arguments.batch] for at in range(0, len(rows), arguments.batch)]


def measure(
    generator: Generator, batches: list[list[TokenRow]], rounds: int, peers: Sequence[str]
) -> dict[str, Any]:
    """Time the ways over the same batches, and compare their gradients."""
    model = generator.model
    start = start_rows(model, generator.tokenizer, TOKENS)
    kept = TokenTrainee(model, start, anew(model))
    fresh = TokenTrainee(model, start, anew(model))
    tokens = torch.nn.Parameter(start.clone())
    tuned = PromptTuningTrainee(model, start)

    def epoch(step: Callable[[list[TokenRow]], torch.Tensor]) -> Callable[[], None]:
        def run() -> None:
            for rows in batches:
                step(rows).backward()

        return run

    def first() -> None:
        fresh.frozen = model, anew(model)
        epoch(lambda rows: fresh(**collate(rows))["loss"])()

    others = {
        "recipe": epoch(lambda rows: whole(model, tokens, rows, LONGEST)),
        "dynamic": epoch(lambda rows: whole(model, tokens, rows, 0)),
        "peft": epoch(lambda rows: tuned(**collate(rows))["loss"]),
    }
    ways = {"ragkit": first, "ragkit, prefixes kept": epoch(lambda r: kept(**collate(r))["loss"])}
    seconds = side_by_side(ways | {name: others[name] for name in peers}, rounds)
    found: dict[str, Any] = {
        "seconds a step": {
            name: statistics.median(values) / len(batches) for name, values in seconds.items()
        },
        "rounds": seconds,
    }
    for peer in peers:
        found[f"first epoch, against {peer}"] = ratio(seconds, "ragkit", peer)
        found[f"later epochs, against {peer}"] = ratio(seconds, "ragkit, prefixes kept", peer)
    fresh.frozen = model, anew(model)
    found |= gradients(kept, model, start, batches[0]) | spent(fresh, kept, batches)
    read = fresh.frozen[1].read_tokens
    found["tokens before"] = [sum(len(r.before) for rows in batches for r in rows), read]
    return found | limit(model, batches, seconds, read)


def anew(model: Any) -> PrefixCache:
    """Return an empty cache, with room for all that is read."""
    return PrefixCache(model, 4 * 10**9)


def whole(model: Any, tokens: torch.Tensor, rows: Sequence[TokenRow], width: int) -> torch.Tensor:
    """Return the loss of rows read whole, padded on the left, logits everywhere."""
    embed = model.get_input_embeddings()
    parts = [
        torch.cat(
            [
                embed(torch.tensor(row.before, dtype=torch.long)),
                tokens[: row.tokens],
                embed(torch.tensor([*row.after, *row.answer])),
            ]
        )
        for row in rows
    ]
    width = max([width, *map(len, parts)])
    embedded = torch.stack(
        [torch.nn.functional.pad(part, (0, 0, width - len(part), 0)) for part in parts]
    )
    _, mask = pad([[1] * len(part) for part in parts] + [[1] * width], 0, left=True, device="cpu")
    labels = torch.full((len(rows), width), IGNORED)
    for place, row in enumerate(rows):
        labels[place, -len(row.answer) :] = torch.tensor(row.answer)
    mask = mask[:-1]
    logits = model(
        inputs_embeds=embedded,
        attention_mask=mask,
        position_ids=(mask.cumsum(1) - 1).clamp(min=0),
        use_cache=False,
    ).logits
    return torch.nn.functional.cross_entropy(
        logits[:, :-1].float().flatten(0, 1), labels[:, 1:].flatten(), ignore_index=IGNORED
    )


def gradients(
    trainee: TokenTrainee, model: Any, start: torch.Tensor, rows: list[TokenRow]
) -> dict[str, float]:
    """Return how far our loss and gradient are from those of the recipe."""
    trainee.zero_grad()
    ours = trainee(**collate(rows))["loss"]
    ours.backward()
    tokens = torch.nn.Parameter(start.clone())
    theirs = whole(model, tokens, rows, LONGEST)
    theirs.backward()
    assert trainee.tokens.grad is not None and tokens.grad is not None
    return {
        "difference of losses": abs(float(ours - theirs)),
        "largest difference of gradients": float((trainee.tokens.grad - tokens.grad).abs().max()),
        "largest gradient": float(tokens.grad.abs().max()),
    }


def spent(fresh: TokenTrainee, kept: TokenTrainee, batches: list[list[TokenRow]]) -> dict[str, Any]:
    """Return where the time of a step goes: reading passages, the way forward, the way back."""
    shares = {}
    for name, trainee in (("first epoch", fresh), ("later epochs", kept)):
        prefixes = trainee.frozen[1]
        read, times = prefixes.rows, {"passages": 0.0, "forward": 0.0, "backward": 0.0}

        def timed(*given: Any, read: Any = read, times: dict[str, float] = times) -> Any:
            started = time.perf_counter()
            cache = read(*given)
            times["passages"] += time.perf_counter() - started
            return cache

        prefixes.rows = timed  # type: ignore[method-assign]
        for rows in batches:
            before, started = times["passages"], time.perf_counter()
            loss = trainee(**collate(rows))["loss"]
            middle = time.perf_counter()
            loss.backward()
            times["backward"] += time.perf_counter() - middle
            times["forward"] += middle - started - (times["passages"] - before)
        prefixes.rows = read  # type: ignore[method-assign]
        total = sum(times.values())
        shares[f"share of time, {name}"] = {part: spent / total for part, spent in times.items()}
    return shares


def limit(
    model: Any, batches: list[list[TokenRow]], seconds: dict[str, list[float]], read: int
) -> dict[str, Any]:
    """Return how far the arithmetic of a step is from a plain matrix product's speed.

    A weight costs 2 operations a token forward, and 2 back (its own gradient is not made); the
    recipe makes logits of all tokens too. What a first epoch could gain if every way ran at the
    same speed is the ratio of their operations.
    """
    weights = sum(p.numel() for n, p in model.named_parameters() if "embed" not in n)
    head = model.get_input_embeddings().weight.numel()
    rows = [row for batch in batches for row in batch]
    later = 4.0 * weights * sum(row.learnt_through for row in rows)
    first = later + 2.0 * weights * read
    recipe = 4.0 * (weights + head) * LONGEST * len(rows)
    one, other = torch.randn(512, 2048), torch.randn(2048, 2048)
    (one @ other).sum()
    started = time.perf_counter()
    for _ in range(20):
        one @ other
    peak = 20 * 2 * 512 * 2048 * 2048 / (time.perf_counter() - started)
    reached = {
        name: operations / statistics.median(seconds[name])
        for name, operations in (
            ("ragkit", first),
            ("ragkit, prefixes kept", later),
            ("recipe", recipe),
        )
    }
    return {
        "GFLOP/s of a matrix product": peak / 1e9,
        "GFLOP/s of a kept step": reached["ragkit, prefixes kept"] / 1e9,
        "share of the limit": {name: speed / peak for name, speed in reached.items()},
        "operations, recipe to first epoch": recipe / first,
        "operations, recipe to later epochs": recipe / later,
    }


if __name__ == "__main__":
    main()
