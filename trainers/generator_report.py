"""How a run of a generator is told: tables for the terminal, and a model card."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from ragkit import __version__

from .results import interval, laid_out, markdown, scores_table, told_of_scores

_MEASURES = ("EM", "F1", "cover", "abstained")
_PROBES = ("probe", "measure", "before", "change, by seed", "lost by the worst")


def tables(results: Mapping[str, Any]) -> list[Any]:
    """Lay out before and after, and the probes, for the terminal."""
    shown = [scores_table(results, _rows(results))]
    if len(results["average"]["tried"]) > 1:
        shown.append(laid_out("Shares of what was learnt", _SHARES, _share_rows(results)))
    if results["probes"]:
        shown.append(laid_out("General ability", _PROBES, _probe_rows(results), names=2))
    return [*shown, told_of_scores("step and share were")]


def _rows(results: Mapping[str, Any]) -> list[list[str]]:
    (changed,) = results["differences"].values()
    rows = [
        [
            measure,
            *(interval(results["conditions"][title][measure]) for title in ("before", "after")),
            interval(changed[measure]),
        ]
        for measure in _MEASURES
    ]
    cited = results["citations"]
    for measure in cited.get("after", {}):
        ends = (cited[title].get(measure) for title in ("before", "after"))
        rows.append(
            [measure, *("nothing cited" if of is None else interval(of) for of in ends), ""]
        )
    return rows


_SHARES = ("share", "F1", "gain", "most that a probe lost")


def _share_rows(results: Mapping[str, Any]) -> list[list[str]]:
    average = results["average"]
    return [
        [
            share + (" (taken)" if float(share) == average["taken"] else ""),
            interval(of["F1"]),
            interval(of["gain"]),
            f"{of['forgetting']:.3f}: {of['worst']}" if of["worst"] else "",
        ]
        for share, of in average["tried"].items()
    ]


def _probe_rows(results: Mapping[str, Any]) -> list[list[str]]:
    return [
        [
            name,
            of["measure"],
            interval(of["before"]),
            " ".join(interval(change) for change in of["changes"]),
            f"{of['lost']:.3f}",
        ]
        for name, of in results["probes"].items()
    ]


def card(results: Mapping[str, Any]) -> str:
    """Return the model card: what was learnt and how, what it gained, what it forgot."""
    settings, data = results["settings"], results["data"]
    rank = results["rank"]
    what = f"an adapter (LoRA) of rank {rank}" if rank else "all weights"
    probes = markdown(_PROBES, _probe_rows(results))
    shares = markdown(_SHARES, _share_rows(results))
    return CARD.format(
        what=what,
        base=settings["base"],
        base_hash=results["base"]["weights"][:16],
        prompt=settings["prompt"],
        train=data["train"],
        dev=data["dev"],
        mix=settings["mix"],
        passages=settings["passages"],
        loss=settings["loss"],
        seeds=", ".join(results["seeds"]),
        share=results["average"]["taken"],
        table=markdown(("measure", "before", "after", "difference"), _rows(results)),
        shares=f"{shares}\n\n" if len(results["average"]["tried"]) > 1 else "",
        probes=probes if results["probes"] else "No probe of general ability was run.",
        version=__version__,
    )


CARD = """# A reader made of {base}

{what} of {base} (weights {base_hash}…), trained to answer from retrieved passages.

- prompt: wording `{prompt}`, by which it is asked from now on; ragkit.json holds it
- learnt from {train} questions; contexts {mix}, passages {passages}; loss {loss}
- seeds: {seeds}; this is the one with the best F1 on the {dev} questions evaluated
- share of what was learnt in the average with the base: {share}

{table}

{shares}{probes}

In brackets: 95 % bootstrap intervals over questions and seeds. The best step, seed and share were
chosen on the same questions: for an unbiased figure, evaluate on others.

```
ragkit ask "…" --index INDEX --generator THIS_FOLDER
```

Made by ragkit {version}. `results.json` holds the settings, hashes of the data and the losses.
"""
