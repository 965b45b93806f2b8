"""What a run of a retriever reports, and its model card."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

from ragkit import __version__
from ragkit.types import Progress

from .results import before_and_after, table_of

if TYPE_CHECKING:
    from ragkit.models.bi_encoder import BiEncoder
    from ragkit.training.dev_search import DevSearch
    from ragkit.training.keeper import History
    from ragkit.training.retriever_runs import RetrieverRun


def results_of(
    run: RetrieverRun,
    dev: DevSearch,
    seeds: Sequence[int],
    learnt: Sequence[tuple[BiEncoder, History]],
    shares: Sequence[float],
    progress: Progress,
) -> tuple[dict[str, Any], dict[str, BiEncoder]]:
    """Search the dev questions before and after.

    Args:
        run, dev: what was learnt, and the questions.
        seeds, learnt: the encoder of each seed.
        shares: of the learnt weights in the average with the base, of which the best is taken.
        progress: told of the documents that are encoded.

    Returns:
        the results, and each seed's encoder by its name.
    """
    stored = run.side != "both"
    before = dev.values(run.encoder, stored=stored, progress=progress)
    results, encoders = before_and_after(
        before,
        lambda encoder: dev.values(encoder, stored=stored, progress=progress),
        dev.measure,
        seeds,
        learnt,
        shares,
        run.averaged,
    )
    described = run.encoder.describe()
    base = {"name": run.encoder.name, "fingerprint": described["fingerprint"]}
    return results | {"base": base}, encoders


def with_prompts(encoder: BiEncoder) -> Any:
    """Return an encoder's model, to be saved with the prompts that it was trained with."""
    prompts = {"query": encoder.query_prompt, "document": encoder.document_prompt}
    encoder.model.prompts = {**encoder.model.prompts, **prompts}
    return encoder.model


def card(results: Mapping[str, Any]) -> str:
    """Return the model card: what the encoder is, how it was learnt, what that changed."""
    settings, data = results["settings"], results["data"]
    use = (
        "It searches the index of its base as it is:"
        if settings["side"] == "query" or settings["objective"] == "query-adapter"
        else "Its vectors are its own; an index takes them by `ragkit-index refresh --index INDEX "
        "--encoder THIS_FOLDER`, and is then searched by:"
    )
    return CARD.format(
        base=results["base"]["name"],
        fingerprint=results["base"]["fingerprint"],
        objective=settings["objective"],
        side=settings["side"],
        train=data["train"],
        dev=data["dev"],
        documents=data["dev_documents"],
        seeds=", ".join(results["seeds"]),
        share=results["average"]["taken"],
        table=table_of(results),
        use=use,
        version=__version__,
    )


CARD = """# An encoder made of {base}

Fine-tuned for retrieval; any sentence-transformers loads it.

- base: {base}, fingerprint {fingerprint}
- objective: {objective}; side: {side}; share of the learnt weights: {share}
- learnt from {train} questions; seeds: {seeds}, of which this is the best on dev

On {dev} dev questions, searched in {documents} documents:

{table}

In brackets: 95 % bootstrap intervals over questions and seeds. The best step and seed were chosen
on the same questions: for an unbiased figure, evaluate on others.

{use}

```
ragkit search "…" --index INDEX --encoder THIS_FOLDER
```

Made by ragkit {version}. `results.json` holds the settings, hashes of the data and the losses.
"""
