"""What a run of a reranker reports, and its model card."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from time import perf_counter
from typing import TYPE_CHECKING, Any

from ragkit import __version__
from ragkit.types import Progress

from .results import compared, positive, table_of

if TYPE_CHECKING:
    from ragkit.models.cross_encoder import CrossEncoder
    from ragkit.training.keeper import History
    from ragkit.training.reranker_runs import Ranked


def results_of(
    dev: Ranked,
    seeds: Sequence[int],
    learnt: Sequence[tuple[CrossEncoder, History]],
    progress: Progress,
) -> dict[str, Any]:
    """Rerank the dev questions' hits, and compare with their order as they were retrieved."""
    before, started = dev.values(None), perf_counter()
    after = [dev.values(model, progress) for model, _ in learnt]
    seconds = (perf_counter() - started) / len(learnt)
    means = [sum(of["nDCG@10"]) / len(of["nDCG@10"]) for of in after]
    return compared(before, after) | {
        "measure": "nDCG@10",
        "seconds_a_question": seconds / len(dev.queries),
        "seeds": {
            str(seed): positive(history) for seed, (_, history) in zip(seeds, learnt, strict=True)
        },
        "best_seed": str(seeds[means.index(max(means))]),
    }


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
        table=table_of(results),
        version=__version__,
    )


CARD = """# A cross-encoder made of {base}

Reranks what was retrieved; any sentence-transformers loads it.

- base: {base}; objective: {objective}
- learnt from {train} questions; seeds: {seeds}, of which this is the best on dev

On {dev} dev questions, their best {depth} hits as they were retrieved and reranked:

{table}

In brackets: 95 % bootstrap intervals over questions and seeds. The best step and seed were chosen
on the same questions: for an unbiased figure, evaluate on others.

```
ragkit search "…" --index INDEX --reranker THIS_FOLDER
```

Made by ragkit {version}. `results.json` holds the settings, hashes of the data and the losses.
"""
