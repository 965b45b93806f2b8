"""What a run of a reranker reports, and its model card."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from statistics import fmean
from time import perf_counter
from typing import TYPE_CHECKING, Any

from ragkit import __version__
from ragkit.types import Progress

from .results import before_and_after, table_of

if TYPE_CHECKING:
    from ragkit.models.cross_encoder import CrossEncoder
    from ragkit.training.dev_search import Values
    from ragkit.training.keeper import History
    from ragkit.training.reranker_runs import Ranked, RerankerRun

MEASURE = "nDCG@10"
WEIGHTS = tuple(round(tenth / 10, 1) for tenth in range(11))
"""The weights of a cross-encoder's scores, beside those of the retrieval, that are tried."""


def best_weight(means: Mapping[float, float]) -> float:
    """Return the weight with the greatest mean; of equal ones, that of the retrieval's order."""
    return min(means, key=lambda weight: (-means[weight], weight))


def results_of(
    run: RerankerRun,
    dev: Ranked,
    seeds: Sequence[int],
    learnt: Sequence[tuple[CrossEncoder, History]],
    shares: Sequence[float],
    progress: Progress,
) -> tuple[dict[str, Any], dict[str, CrossEncoder]]:
    """Rerank the dev questions' hits, and compare with their order as they were retrieved.

    The weight of the cross-encoder's scores in the sum with the retrieval's is swept too.

    Args:
        run, dev: what was learnt, and the questions.
        seeds, learnt: the cross-encoder of each seed.
        shares: of the learnt weights in the average with the base, of which the best is taken.
        progress: told of the pairs that are scored.

    Returns:
        the results, and each seed's cross-encoder by its name.
    """
    seconds: list[float] = []
    scores: list[list[list[float]]] = []  # of each model that is tried: [questions, hits]

    def values(model: CrossEncoder) -> Values:
        started = perf_counter()
        scores.append(dev.scores(model, progress))
        seconds.append(perf_counter() - started)
        return dev.values(scores[-1])

    results, models = before_and_after(
        dev.values(), values, MEASURE, seeds, learnt, shares, run.averaged
    )
    first = list(shares).index(results["average"]["taken"]) * len(learnt)
    tried = {
        weight: fmean(
            fmean(dev.values(of, weight)[MEASURE]) for of in scores[first : first + len(learnt)]
        )
        for weight in WEIGHTS
    }
    weights = {
        "taken": best_weight(tried),
        "tried": {str(weight): value for weight, value in tried.items()},
    }
    told = {"weight": weights, "seconds_a_question": fmean(seconds) / len(dev.queries)}
    return results | told, models


def advice(results: Mapping[str, Any]) -> str:
    """Say which weight in the sum with the retrieval's scores was best on dev."""
    weight, depth = results["weight"], results["settings"]["depth"]
    taken, value = weight["taken"], weight["tried"][str(weight["taken"])]
    if taken == 0:
        return (
            f"on dev no weight of it beats the order of the retrieval ({MEASURE} {value:.3f}): it "
            "has learnt too little to be of use"
        )
    return (
        f"best on dev: --reranker-weight {taken:g} --depth {depth} ({MEASURE} {value:.3f}); the "
        "retrieval's scores have the rest"
    )


def card(results: Mapping[str, Any]) -> str:
    """Return the model card: what the cross-encoder is, how it was learnt, what that changed."""
    settings, data = results["settings"], results["data"]
    return CARD.format(
        base=settings["base"],
        objective=settings["objective"],
        train=data["train"],
        dev=data["dev"],
        depth=settings["depth"],
        seeds=", ".join(results["seeds"]),
        share=results["average"]["taken"],
        advice=advice(results),
        options=f"--reranker-weight {results['weight']['taken']:g} --depth {settings['depth']}",
        table=table_of(results),
        version=__version__,
    )


CARD = """# A cross-encoder made of {base}

Reranks what was retrieved; any sentence-transformers loads it.

- base: {base}; objective: {objective}; share of the learnt weights: {share}
- learnt from {train} questions; seeds: {seeds}, of which this is the best on dev

On {dev} dev questions, their best {depth} hits as they were retrieved and reranked:

{table}

{advice}.

In brackets: 95 % bootstrap intervals over questions and seeds. The best step, seed and weight
were chosen on the same questions: for an unbiased figure, evaluate on others.

```
ragkit search "…" --index INDEX --reranker THIS_FOLDER {options}
```

Made by ragkit {version}. `results.json` holds the settings, hashes of the data and the losses.
"""
