"""How a run ends, and what one of a retriever or a reranker reports: before and after on dev."""

from __future__ import annotations

import math
import shutil
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from statistics import fmean
from typing import TYPE_CHECKING, Any, TypeVar

from ragkit import __version__
from ragkit.artefacts import new_folder, write_json, write_text
from ragkit.console import print_json, print_tables, say

from .runs import MARK, TrainingSettings

if TYPE_CHECKING:
    from ragkit.training.keeper import History

Model = TypeVar("Model")


def before_and_after(
    before: Mapping[str, Sequence[float]],
    values: Callable[[Model], Mapping[str, Sequence[float]]],
    measure: str,
    seeds: Sequence[int],
    learnt: Sequence[tuple[Model, History]],
    shares: Sequence[float],
    averaged: Callable[[Model, float], Model],
) -> tuple[dict[str, Any], dict[str, Model]]:
    """Evaluate what was learnt, in the average with the base that is best on dev.

    Args:
        before: measure -> one value a question, of the base.
        values: gives the same of a model.
        measure: what is to become large.
        seeds, learnt: the model of each seed.
        shares: of the learnt weights in the averages that are tried.
        averaged: gives such an average.

    Returns:
        the results, and each seed's model by its name.
    """
    means: dict[float, list[float]] = {}
    taken, most = shares[0], -math.inf
    models: list[Model] = []
    after: list[Mapping[str, Sequence[float]]] = []
    for share in shares:
        tried = [model if share == 1 else averaged(model, share) for model, _ in learnt]
        found = [values(model) for model in tried]
        means[share] = [fmean(of[measure]) for of in found]
        if fmean(means[share]) > most:
            taken, most, models, after = share, fmean(means[share]), tried, found
    results = compared(before, after) | {
        "measure": measure,
        "average": {
            "taken": taken,
            "tried": {str(share): fmean(of) for share, of in means.items()},
        },
        "seeds": {
            str(seed): _positive(history) for seed, (_, history) in zip(seeds, learnt, strict=True)
        },
        "best_seed": str(seeds[means[taken].index(max(means[taken]))]),
    }
    return results, {str(seed): model for seed, model in zip(seeds, models, strict=True)}


def compared(
    before: Mapping[str, Sequence[float]], after: Sequence[Mapping[str, Sequence[float]]]
) -> dict[str, Any]:
    """Return the means of each measure before and after, and their differences by question.

    Args:
        before: measure -> one value a question.
        after: the same for each seed.
    """
    from ragkit.evaluation.statistics import bootstrap_means, paired_differences

    names = list(before)
    base = [[before[name]] for name in names]
    tuned = [[of[name] for of in after] for name in names]
    pairs = list(zip(base, tuned, strict=True))
    return {
        "measures": {
            title: {
                name: asdict(estimate)
                for name, estimate in zip(names, bootstrap_means(values), strict=True)
            }
            for title, values in (("before", base), ("after", tuned))
        },
        "differences": {
            name: asdict(difference)
            for name, difference in zip(names, paired_differences(pairs), strict=True)
        }
        if len(base[0][0]) > 1
        else {},
    }


def _positive(history: History) -> dict[str, Any]:
    """Return a history with the dev measure as it is, not its negative that was minimised."""
    values = asdict(history)
    values["evaluations"] = {step: -value for step, value in history.evaluations.items()}
    return values


def finish(
    settings: TrainingSettings,
    state: Path,
    save: Mapping[str, Callable[[Path], object]],
    results: Mapping[str, Any],
    card: str,
    tables: Sequence[Any],
    told: Sequence[str],
    *,
    json: bool,
) -> None:
    """Write what was learnt and the report, drop the run's state, and print the results.

    Args:
        settings: name the output folder, which gets the best seed's; several seeds' lie in it too.
        state: the folder of the run's state.
        save: writes what a seed has learnt into a folder, by seed.
        results: with `best_seed`.
        card: the model card.
        tables: of the results, for the terminal.
        told: what is said of the output and of what comes next.
        json: print the results in the tables' place.
    """
    from ragkit.models.precision import without_bars

    with new_folder(settings.output, replace=settings.replace, mark=MARK) as folder, without_bars():
        save[results["best_seed"]](folder)
        for seed, write in save.items() if len(save) > 1 else ():
            apart = folder / "seeds" / seed
            apart.mkdir(parents=True)
            write(apart)
        write_json(folder / MARK, dict(results) | {"ragkit": __version__})
        write_text(folder / "README.md", card)
        for logs in state.glob("seed-*/runs"):  # TensorBoard's
            shutil.copytree(logs, folder / "runs" / logs.parent.name)
    shutil.rmtree(state, ignore_errors=True)
    if json:
        print_json(results)
        return
    print_tables(tables)
    for line in told:
        say(line)


def saving(model: Any) -> Callable[[Path], None]:
    """Return what writes a model of sentence-transformers into a folder."""
    return lambda folder: model.save_pretrained(str(folder), create_model_card=False)


def tables(results: Mapping[str, Any]) -> list[Any]:
    """Lay out before and after for the terminal."""
    return [scores_table(results, _rows(results)), told_of_scores("step was")]


def scores_table(results: Mapping[str, Any], rows: Sequence[Sequence[str]]) -> Any:
    """Return a table of rows: a measure, before, after, and their difference."""
    title = f"{results['data']['dev']} questions to evaluate on, {len(results['seeds'])} seeds"
    return laid_out(title, ("measure", "before", "after", "difference"), rows)


def laid_out(
    title: str, heads: Sequence[str], rows: Sequence[Sequence[str]], names: int = 1
) -> Any:
    """Return a table whose first columns, so many, are names, and the others figures."""
    from rich.table import Table

    table = Table(title=title)
    for place, head in enumerate(heads):
        table.add_column(head, justify="left" if place < names else "right")
    for row in rows:
        table.add_row(*row)
    return table


def told_of_scores(chosen: str) -> str:
    """Say what brackets hold, and what was chosen on the questions: `step was`."""
    return (
        f"In brackets: 95 % bootstrap intervals over questions and seeds. The best {chosen} chosen "
        "on these questions: for an unbiased figure, evaluate on others."
    )


def _rows(results: Mapping[str, Any]) -> list[list[str]]:
    shown = [n for n in results["measures"]["before"] if not n.startswith("hit@")]
    return [
        [
            name,
            *(interval(results["measures"][title][name]) for title in ("before", "after")),
            interval(results["differences"][name]) if results["differences"] else "",
        ]
        for name in shown
    ]


def interval(value: Mapping[str, float]) -> str:
    """Write a mean with its interval: .512 [.480, .545]."""
    mean, low, high = (f"{value[end]:.3f}".replace("0.", ".") for end in ("mean", "low", "high"))
    return f"{mean} [{low}, {high}]"


def table_of(results: Mapping[str, Any]) -> str:
    """Lay out before and after in Markdown."""
    return markdown(("measure", "before", "after", "difference"), _rows(results))


def markdown(heads: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """Return a table in Markdown."""
    lines = ["| " + " | ".join(line) + " |" for line in (heads, *rows)]
    return "\n".join([lines[0], "|" + "---|" * len(heads), *lines[1:]])
