"""The context-use table: how answers change with what the reader is given."""

from __future__ import annotations

import random
from collections.abc import Callable, Mapping, Sequence

from ..errors import SettingsError
from ..types import Answer, Hit
from .statistics import Estimate, bootstrap_mean

CONTEXTS = ("none", "retrieved", "gold", "gold+distractors", "wrong", "shuffled")
"""The contexts that can be asked for by name."""

FIGURES = ("context gain", "distraction loss", "order gain", "position sensitivity")
_MEASURES = ("F1", "cover")

Scores = Mapping[str, Mapping[str, float]]
"""Measure -> query id -> value."""


def check_contexts(contexts: Sequence[str], noise: Sequence[float]) -> None:
    """Refuse contexts that are not known, and shares that are none.

    Raises:
        SettingsError: naming them.
    """
    if unknown := [name for name in contexts if name not in CONTEXTS]:
        raise SettingsError(f"unknown contexts {unknown}; known are {', '.join(CONTEXTS)}")
    if wrong := [share for share in noise if not 0 <= share <= 1]:
        raise SettingsError(f"a share of distractors lies between 0 and 1, not at {wrong}")


def build_contexts(
    contexts: Sequence[str],
    noise: Sequence[float],
    *,
    query: str,
    retrieved: Sequence[Hit],
    gold: Sequence[Hit],
    distractors: Sequence[Hit],
    keep: int,
    seed: int,
) -> dict[str, list[Hit]]:
    """Return the passages of each context that can be built for a question.

    none: no passages. retrieved: what the reader is given anyway. gold: the gold passages alone.
    gold+distractors: the gold passages at random places among distractors, `keep` in all, at least
    one distractor. wrong: `keep` distractors. shuffled: what was retrieved, in another order.
    noise r: the gold passages at random places among so many distractors that these are the share
    r of all; 1 is distractors alone, as many as go with the gold at the next lower share.

    A context that needs what is missing is left out: gold passages, one distractor at least, or two
    hits to shuffle. A question with too few distractors for one share is left out of all of them,
    so that the sweep compares the same questions. Random places depend on `seed` and the
    question alone.

    Args:
        contexts: names out of `CONTEXTS`.
        noise: shares of distractors, 0 to 1.
        query: the question's id.
        retrieved: the hits that the reader is given.
        gold: its gold passages.
        distractors: hits that are neither relevant nor hold an answer, best first.
        keep: how many passages the reader is given.
        seed: of the random places.
    """

    def chance(context: str) -> random.Random:
        return random.Random(f"{seed} {query} {context}")

    others = [hit for hit in distractors if hit.document.id not in {g.document.id for g in gold}]
    filled = others[: max(1, keep - len(gold))]
    built: dict[str, list[Hit]] = {
        "none": [],
        "retrieved": list(retrieved),
        "wrong": list(others[:keep]),
        "shuffled": _shuffled(retrieved, chance("shuffled")),
    }
    if gold:
        built["gold"] = list(gold)
        built["gold+distractors"] = (
            _among(gold, filled, chance("gold+distractors")) if filled else []
        )
    result = {name: built[name] for name in contexts if built.get(name) or name == "none"}
    names = {share: noise_name(share) for share in noise}
    swept = {n: _noisy(share, noise, gold, others, chance(n)) for share, n in names.items()}
    return result | swept if all(swept.values()) else result


def noise_name(share: float) -> str:
    """Name the context of which this share are distractors."""
    return f"noise {100 * share:.0f} %"


def _shuffled(hits: Sequence[Hit], chance: random.Random) -> list[Hit]:
    if all(hit == hits[0] for hit in hits):
        return []
    order = list(hits)
    while order == list(hits):
        chance.shuffle(order)
    return order


def _among(gold: Sequence[Hit], others: Sequence[Hit], chance: random.Random) -> list[Hit]:
    """Put gold passages at random places among others, both in their own order."""
    places = set(chance.sample(range(len(gold) + len(others)), len(gold)))
    golds, rest = iter(gold), iter(others)
    return [
        next(golds) if place in places else next(rest) for place in range(len(gold) + len(others))
    ]


def _noisy(
    share: float,
    shares: Sequence[float],
    gold: Sequence[Hit],
    others: Sequence[Hit],
    chance: random.Random,
) -> list[Hit]:
    if not gold:
        return []
    below = max((other for other in shares if other < 1), default=0.5)
    wanted = round(len(gold) * (ratio := min(share, below)) / (1 - ratio))
    wanted = max(wanted, 1) if share == 1 else wanted
    if len(others) < wanted:
        return []
    return list(others[:wanted]) if share == 1 else _among(gold, others[:wanted], chance)


def context_figures(
    scores: Mapping[str, Scores], answers: Mapping[str, Mapping[str, Answer]], seed: int
) -> dict[str, Estimate]:
    """Return the figures that the contexts allow, each with an interval over paired questions.

    context gain: retrieved - none, what passages bring over answering by heart.
    distraction loss: gold - gold+distractors, what distractors beside the gold passage cost.
    over-reliance: the share of wrong answers in `wrong` that rest on a passage there (cite it, or
    consist of its words), of all questions: the reader believed what does not answer.
    order gain: retrieved - shuffled; above 0, the reader leans on what stands first.
    position sensitivity: the share of questions whose score changes when the order does.

    Args:
        scores: context -> measure -> query id -> value.
        answers: context -> query id -> answer.
        seed: of the bootstrap.
    """
    figures: dict[str, Estimate] = {}

    def add(name: str, one: str, other: str, figure: Callable[[float, float], float]) -> None:
        for measure in _MEASURES:
            first = scores.get(one, {}).get(measure, {})
            second = scores.get(other, {}).get(measure, {})
            values = [figure(first[query], second[query]) for query in first if query in second]
            if values:
                figures[f"{name} ({measure})"] = bootstrap_mean(values, seed=seed)

    def minus(first: float, second: float) -> float:
        return first - second

    add("context gain", "retrieved", "none", minus)
    add("distraction loss", "gold", "gold+distractors", minus)
    believed = [
        float(
            value == 0
            and bool(answers["wrong"][query].citations)
            and not answers["wrong"][query].abstained
        )
        for query, value in scores.get("wrong", {}).get("cover", {}).items()
    ]
    if believed:
        figures["over-reliance"] = bootstrap_mean(believed, seed=seed)
    add("order gain", "retrieved", "shuffled", minus)
    add("position sensitivity", "retrieved", "shuffled", lambda a, b: float(a != b))
    return figures
