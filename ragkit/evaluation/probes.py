"""Probes of general ability: what training one task may have cost elsewhere.

Nothing is generated: a probe asks how likely given texts are. Choices are compared by likelihood,
answers are measured by theirs, and so are whole texts (perplexity).
"""

from __future__ import annotations

import logging
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol, TypeAlias

import numpy as np
from numpy.typing import NDArray

from ..artefacts import fingerprint, read_json, write_json
from ..errors import DataError, SettingsError
from ..types import Progress, quiet
from .probe_files import Kind, Probe, ProbeItem
from .probe_files import read_probe as read_probe  # noqa: PLC0414  (a name of this module's, too)
from .resampling import drawn_means
from .statistics import Estimate, bootstrap_mean

_log = logging.getLogger(__name__)

FORMAT = 1
"""The format number of cached likelihoods; prompts are part of it."""

_Array: TypeAlias = NDArray[np.float64]

_RESAMPLES = 10_000


class LikelihoodModel(Protocol):
    """Tells how likely texts are: the sum of their tokens' log-probabilities, in nats."""

    def loglikelihoods(
        self,
        contexts: Sequence[str],
        continuations: Sequence[Sequence[str]],
        *,
        progress: Callable[[int], None] = ...,
    ) -> Sequence[_Array]:
        """Return, per context, (log-probability, tokens) of each of its continuations."""
        ...

    def text_loglikelihoods(
        self, texts: Sequence[str], *, progress: Callable[[int], None] = ...
    ) -> _Array:
        """Return (log-probability, tokens) of each text, of shape [texts, 2]."""
        ...

    def weights_hash(self) -> str:
        """Return a hash; models of equal hashes give equal likelihoods."""
        ...


@dataclass(frozen=True, slots=True)
class ProbeScores:
    """What a model scored on a probe.

    Attributes:
        probe: the probe's name.
        kind: its kind.
        items: a hash of the items that were scored.
        ids: theirs, in order.
        estimates: measure -> estimate over the items.
        values: per item, each measure; for texts, of which totals are taken, `nats`, `tokens` and
            `bytes`.
    """

    probe: str
    kind: Kind
    items: str
    ids: tuple[str, ...]
    estimates: dict[str, Estimate]
    values: dict[str, tuple[float, ...]]

    @property
    def by_item(self) -> dict[str, tuple[float, ...]]:
        """Measures that each item has alone; of a text that is `nats per token`."""
        if self.kind != "texts":
            return self.values
        pairs = zip(self.values["nats"], self.values["tokens"], strict=True)
        return {"nats per token": tuple(nats / tokens for nats, tokens in pairs)}


def run_probe(
    model: LikelihoodModel,
    probe: Probe,
    *,
    limit: int | None = None,
    seed: int = 0,
    progress: Progress | None = None,
    cache: Path | None = None,
) -> ProbeScores:
    """Score a model on a probe.

    Choices give `accuracy` (the right one is the likeliest) and `accuracy (per byte)` (it is by
    the log-probability divided by the choice's UTF-8 bytes; the lm-evaluation-harness' `acc_norm`
    divides by characters). Answers give `answer nats per token`, the mean over the answers. Texts
    give `perplexity`, exp(nats / tokens) over all of them, and `bits per byte`, which compares
    models of different tokenizers.

    Args:
        model: what is scored.
        probe: the items.
        limit: score the first so many alone.
        seed: of the bootstrap.
        progress: told of the stage `probe NAME`.
        cache: a folder of likelihoods by weights and items: the model is not asked again for what
            is there. A file that cannot be used is written anew.

    Raises:
        DataError: the model gives something other than finite numbers.
        SettingsError: `limit` is below 1.
    """
    if limit is not None and limit < 1:
        raise SettingsError(f"at least 1 item is needed, not a limit of {limit}")
    items = probe.items[:limit]
    content = [[item.context, list(item.continuations), item.answer] for item in items]
    head = {"format": FORMAT, "items": fingerprint([probe.kind, content])}
    path = None
    if cache is not None:
        head["weights"] = model.weights_hash()
        path = cache / f"probe-{fingerprint(head)}.json"
        cache.mkdir(parents=True, exist_ok=True)
    found = _read(path, head, items) if path else None
    if found is None:
        found = _ask(model, probe, items, progress or quiet)
        if path:
            likelihoods = [rows.tolist() for rows in found]
            write_json(path, head | {"probe": probe.name, "likelihoods": likelihoods})
    values = _values(probe.kind, items, found)
    estimates = _estimates(values, seed)
    ids = tuple(item.id for item in items)
    return ProbeScores(probe.name, probe.kind, str(head["items"]), ids, estimates, values)


def _read(path: Path, head: dict[str, Any], items: Sequence[ProbeItem]) -> list[_Array] | None:
    if not path.exists():
        return None
    try:
        kept = read_json(path)
        found = [np.asarray(rows, np.float64) for rows in kept["likelihoods"]]
        _check(items, found)
        if head.items() <= kept.items():
            return found
        reason = "it is of something else"
    except (DataError, KeyError, TypeError, ValueError) as error:
        reason = str(error)
    _log.warning(f"{path} is written anew: {reason}")
    return None


def _ask(
    model: LikelihoodModel, probe: Probe, items: Sequence[ProbeItem], report: Progress
) -> list[_Array]:
    def progress(done: int) -> None:
        report(f"probe {probe.name}", done, len(items))

    progress(0)
    if probe.kind == "texts":
        texts = [item.continuations[0] for item in items]
        found = list(model.text_loglikelihoods(texts, progress=progress)[:, None])
    else:
        contexts = [item.context for item in items]
        continuations = [item.continuations for item in items]
        found = list(model.loglikelihoods(contexts, continuations, progress=progress))
    _check(items, found)
    progress(len(items))
    return found


def _check(items: Sequence[ProbeItem], found: Sequence[_Array]) -> None:
    if len(found) != len(items):
        raise DataError(f"there are likelihoods of {len(found)} items, not of {len(items)}")
    for item, rows in zip(items, found, strict=True):
        whole = rows.shape == (len(item.continuations), 2)
        if not (whole and np.isfinite(rows).all() and (rows[:, 1] >= 1).all()):
            raise DataError(
                f"item {item.id!r} has the likelihoods {rows.tolist()}, not a finite "
                f"log-probability and a number of tokens for each of {len(item.continuations)}"
            )


def _values(
    kind: Kind, items: Sequence[ProbeItem], found: Sequence[_Array]
) -> dict[str, tuple[float, ...]]:
    sizes = [[len(text.strip().encode()) for text in item.continuations] for item in items]
    if kind == "choices":
        per_byte = [rows[:, 0] / size for rows, size in zip(found, sizes, strict=True)]
        best = {"accuracy": [rows[:, 0] for rows in found], "accuracy (per byte)": per_byte}
        return {
            measure: tuple(
                float(np.argmax(scores) == item.answer)
                for item, scores in zip(items, rows, strict=True)
            )
            for measure, rows in best.items()
        }
    logprobs, tokens = np.array([rows[0] for rows in found]).T
    nats = -logprobs
    if kind == "answers":
        return {"answer nats per token": tuple((nats / tokens).tolist())}
    return {
        "nats": tuple(nats.tolist()),
        "tokens": tuple(tokens.tolist()),
        "bytes": tuple(float(size) for (size,) in sizes),
    }


def _perplexity(totals: _Array) -> _Array:
    """Jelinek et al. 1977, of totals [..., (nats, tokens, bytes)]."""
    return np.exp(totals[..., 0] / totals[..., 1])


def _bits_per_byte(totals: _Array) -> _Array:
    return totals[..., 0] / (totals[..., 2] * math.log(2))


_OF_TOTALS = {"perplexity": _perplexity, "bits per byte": _bits_per_byte}


def _estimates(values: Mapping[str, Sequence[float]], seed: int) -> dict[str, Estimate]:
    if "nats" not in values:
        return {name: bootstrap_mean(each, seed=seed) for name, each in values.items()}
    means, drawn = _means(values, seed)
    return {
        name: _estimate(figure(means), figure(drawn), values) for name, figure in _OF_TOTALS.items()
    }


def compare_probes(
    before: ProbeScores, after: ProbeScores, *, seed: int = 0
) -> dict[str, Estimate]:
    """Estimate each measure's change, after - before, paired by item.

    A model compared with itself shows exactly 0.

    Raises:
        DataError: the two are not of the same items.
    """
    if before.items != after.items:
        raise DataError(
            f"{len(before.ids)} items of probe {before.probe!r} cannot be compared with "
            f"{len(after.ids)} items of {after.probe!r}, which are other ones. Score both models "
            "on the same file and with the same limit."
        )
    if before.kind != "texts":
        changes = {
            name: np.subtract(after.values[name], before.values[name]) for name in before.values
        }
        return {name: bootstrap_mean(each.tolist(), seed=seed) for name, each in changes.items()}
    means, drawn = _means(before.values, seed)
    means_after, drawn_after = _means(after.values, seed)
    return {
        name: _estimate(
            figure(means_after) - figure(means), figure(drawn_after) - figure(drawn), before.values
        )
        for name, figure in _OF_TOTALS.items()
    }


def _means(values: Mapping[str, Sequence[float]], seed: int) -> tuple[_Array, _Array]:
    """Return the columns' means, and over items drawn again; figures of totals are theirs too.

    Equal values and seeds give equal draws, so that a model compared with itself shows exactly 0.
    """
    columns = np.column_stack(list(values.values()))
    drawn = drawn_means(columns, _RESAMPLES, np.random.default_rng(seed))
    return columns.mean(axis=0), drawn


def _estimate(value: _Array, drawn: _Array, values: Mapping[str, Sequence[float]]) -> Estimate:
    """Estimate a figure with the percentile interval of its draws (Efron 1979), at 95 %."""
    low, high = np.quantile(drawn, [0.025, 0.975])
    return Estimate(float(value), float(low), float(high), len(values["nats"]))
