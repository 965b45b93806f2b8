"""The context-use table: how answers change with what the reader is given."""

from __future__ import annotations

import math
import random
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from ..errors import SettingsError
from ..types import Answer, Hit
from .statistics import Estimate, bootstrap_mean

CONTEXTS = ("none", "retrieved", "gold", "gold+distractors", "wrong", "shuffled")
"""The contexts that can be asked for by name."""

FIGURES = ("context gain", "distraction loss", "order gain", "position sensitivity")
_MEASURES = ("F1", "cover")
_REACH = 0.05  # how far from its share of distractors a context may be

Scores = Mapping[str, Mapping[str, float]]
"""Measure -> query id -> value."""


def check_contexts(contexts: Sequence[str], noise: Sequence[float]) -> None:
    """Refuse contexts that are not known, shares that are none, and shares of one name.

    Raises:
        SettingsError: naming them.
    """
    if unknown := [name for name in contexts if name not in CONTEXTS]:
        raise SettingsError(f"unknown contexts {unknown}; known are {', '.join(CONTEXTS)}")
    if wrong := [share for share in noise if not 0 <= share <= 1]:
        raise SettingsError(f"a share of distractors lies between 0 and 1, not at {wrong}")
    names = [noise_name(share) for share in noise]
    if twice := [share for share in noise if names.count(noise_name(share)) > 1]:
        raise SettingsError(
            f"some shares of distractors have the same name, such as {noise_name(twice[0])!r}: ask "
            f"for one of each among {twice}"
        )


def tokens_of(reader: object) -> Any:
    """Return the virtual tokens of which a reader can be told how many to use; None if none."""
    generator = getattr(reader, "generator", None) if hasattr(reader, "use_tokens") else None
    return getattr(generator, "virtual_tokens", None)


def check_token_counts(counts: Sequence[int], reader: object) -> None:
    """Refuse numbers of virtual tokens that a reader cannot use, or that are asked for twice.

    Raises:
        SettingsError: naming them.
    """
    tokens = tokens_of(reader)
    if counts and tokens is None:
        raise SettingsError(
            f"token counts {list(counts)} are asked for, and no reader here has virtual tokens: "
            "give its generator some (--virtual-tokens FOLDER)"
        )
    if wrong := [count for count in counts if not 0 <= count <= len(tokens)]:
        raise SettingsError(
            f"there are {len(tokens)} virtual tokens: a token count lies between 0 and that, not "
            f"at {wrong}"
        )
    if len(set(counts)) < len(counts):
        raise SettingsError(f"some token counts are asked for twice: {list(counts)}")


def with_tokens(context: str, count: int) -> str:
    """Name a context that is read with so many virtual tokens."""
    return f"{context} with {count} token{'' if count == 1 else 's'}"


def describe_tokens(reader: object) -> dict[str, Any]:
    """Return the setting `virtual_tokens` that tells of a reader's; nothing if it has none."""
    tokens = tokens_of(reader)
    if tokens is None:
        return {}
    told = {name: getattr(tokens, name) for name in ("layout", "placement")}
    used = getattr(reader, "use_tokens", None)
    return {"virtual_tokens": {**tokens.to_json(), **told, "used": used}}


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
    r of all, as `noise_sizes` counts them; 1 is distractors alone.

    A context that needs what is missing is left out: gold passages, one distractor at least, or two
    hits to shuffle. A question that cannot have one of the shares is left out of all of them, so
    that the sweep compares the same questions (see `why_not_swept`). Random places depend on `seed`
    and the question alone.

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
    sizes = noise_sizes(noise, len(gold)) or {}
    if len(others) < max(sizes.values(), default=0):
        return result
    for share, size in sizes.items():
        name, some = noise_name(share), others[:size]
        result[name] = list(some) if share == 1 else _among(gold, some, chance(name))
    return result


def noise_name(share: float) -> str:
    """Name the context of which this share are distractors."""
    return f"noise {100 * share:.0f} %"


def noise_sizes(noise: Sequence[float], golds: int) -> dict[float, int] | None:
    """Return how many distractors beside so many gold passages make each share.

    They are the whole number d that comes nearest to the share by d / (d + golds); for the share 1,
    of distractors alone, as many as for the next lower share, or as there are gold passages.

    Returns:
        share -> distractors; None without gold passages, or where a share is not reached within 5
        points. One gold passage reaches 0, 0.5, 0.67, 0.75, 0.8 and so on.
    """
    if not golds:
        return None
    sizes = {}
    for share in (share for share in noise if share < 1):
        exact = golds * share / (1 - share)
        near = (math.floor(exact), math.ceil(exact))
        missed, sizes[share] = min((abs(size / (size + golds) - share), size) for size in near)
        if missed > _REACH + 1e-9:
            return None
    alone = max(1, max(sizes.values(), default=golds))
    return {share: sizes.get(share, alone) for share in noise}


def why_not_swept(noise: Sequence[float], golds: int) -> str:
    """Say why a question with so many gold passages is left out of the noise sweep."""
    if not golds:
        return "without gold passages that suffice"
    if noise_sizes(noise, golds) is None:
        return "with gold passages beside which a share of distractors cannot be had"
    return "with too few distractors"


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
