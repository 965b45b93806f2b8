"""The passages and the target that a generator is trained on: contexts mixed on purpose.

RAFT (Zhang et al. 2024, arXiv 2403.10131) and beyond: gold passages among distractors, at any
place; what was retrieved, as it was; distractors alone, from which to abstain; or nothing. All that
is drawn follows from the seed and the place alone, as in `draws`.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import islice
from random import Random
from typing import Any, Self

from ..errors import DataError, SettingsError
from ..evaluation.answers import cover_match, telling
from ..prompts import Prompt
from ..styles import ABSTENTION
from ..types import Document, Example, Hit, Qrels
from .draws import epoch_order
from .passages import KINDS, ContextKind, Passages


@dataclass(frozen=True, slots=True)
class Mix:
    """How often each kind of context is drawn.

    Attributes:
        shares: kind -> its share; together they are 1. A kind that is left out is never drawn.

    Raises:
        SettingsError: an unknown kind, a share that is none, or a sum that is not 1 (to 1e-6).
    """

    shares: Mapping[ContextKind, float]

    def __post_init__(self) -> None:
        for kind, share in self.shares.items():
            if kind not in KINDS:
                raise SettingsError(
                    f"mix {self}: unknown kind {kind!r}; known are {', '.join(KINDS)}"
                )
            if not 0 <= share < math.inf:
                raise SettingsError(
                    f"mix {self}: the share of {kind} must be a number from 0 to 1, not {share}"
                )
        total = math.fsum(self.shares.values())
        if abs(total - 1) > 1e-6:
            raise SettingsError(
                f"mix {self}: the shares sum to {total:g}. Make them sum to 1, as in "
                "gold:.4,retrieved:.3,distractors:.2,none:.1"
            )

    @classmethod
    def parse(cls, text: str) -> Self:
        """Read a mix as it is written: `gold:.4,retrieved:.3,distractors:.2,none:.1`.

        Raises:
            SettingsError: it is written otherwise, names a kind twice, or is none.
        """
        shares: dict[Any, float] = {}
        for part in text.split(","):
            kind, _, share = (piece.strip() for piece in part.partition(":"))
            try:
                value = float(share)
            except ValueError:
                raise SettingsError(
                    f"mix {text!r}: {part.strip()!r} is no KIND:SHARE, such as gold:.4"
                ) from None
            if kind in shares:
                raise SettingsError(f"mix {text!r}: {kind} stands there twice; give it one share")
            shares[kind] = value
        return cls(shares)

    def __str__(self) -> str:
        return ",".join(f"{kind}:{share:g}" for kind, share in self.shares.items())


@dataclass(frozen=True, slots=True)
class ContextDraw:
    """One access to an example.

    Attributes:
        example: its place in the list of examples.
        wanted: the kind that the mix drew.
        kind: the kind that it became, where the example has nothing for `wanted`.
        count: how many passages were to be shown; `hits` are fewer where there are not so many.
        hits: the passages in their order.
        gold: places of gold passages in `hits`, from 0.
        holding: places of the others that hold an answer.
        answer: the gold answer that is learnt.
        answers: all of them.
        citations: whether the target cites.
        abstains: whether the target abstains where no shown passage is gold or holds an answer.
    """

    example: int
    wanted: ContextKind
    kind: ContextKind
    count: int
    hits: tuple[Hit, ...]
    gold: tuple[int, ...]
    holding: tuple[int, ...]
    answer: str
    answers: tuple[str, ...]
    citations: bool
    abstains: bool

    def target(self, prompt: Prompt | None = None) -> str:
        """Return what the generator is to say: the answer, with `[2]` if it cites, or `ABSTENTION`.

        It cites all gold passages, or else the first that holds an answer. Where no passage is
        shown it answers.

        Args:
            prompt: made of `hits`: what its budget left out, or cut the answer off, does not help,
                and its numbers are cited. None takes all hits as shown.
        """
        shown = range(len(self.hits)) if prompt is None else prompt.shown
        if not shown:
            return self.answer
        lost = None if prompt is None else self._cut_off(prompt)
        numbers = {place: number for number, place in enumerate(shown, 1) if place != lost}
        cited = [numbers[place] for place in self.gold if place in numbers]
        cited = cited or [numbers[place] for place in self.holding if place in numbers][:1]
        if not cited:
            return ABSTENTION if self.abstains else self.answer
        marks = "".join(f"[{number}]" for number in sorted(cited))
        return f"{self.answer} {marks}" if self.citations else self.answer

    def _cut_off(self, prompt: Prompt) -> int | None:
        """Return the place of the passage that held the answer before the prompt cut it."""
        if prompt.cut is None:
            return None
        place = prompt.shown[-1]
        whole = self.hits[place].document
        part = replace(whole, text=whole.text[: prompt.cut])
        answers = telling(self.answers)
        held, holds = (cover_match(each.contents, answers) for each in (whole, part))
        return place if held and not holds else None


class ContextDraws(Sequence[ContextDraw]):
    """All draws of a run. Each epoch passes through all examples in an order of its own.

    What is gold and what distracts is told by `Passages`. In contexts of these two kinds passages
    stand in random order.

    Args:
        examples: with answers.
        hits: what was retrieved for each, best first.
        mix: how often each kind is drawn; of one that an example has nothing for, another takes
            the place, by the shares of those that it has something for.
        steps: optimiser steps.
        batch: examples in a step.
        passages: the least and the most that are shown, 1 up; each number is as likely.
        citations: whether targets cite.
        abstain_retrieved: whether the target abstains where nothing retrieved is gold or holds an
            answer; None does so where an example's relevant passages are known.
        all_gold: whether all of an example's gold passages are shown, as questions need that are
            answered by several together; else a random number of them.
        judged: judgements of documents.
        seed: of everything.

    Raises:
        SettingsError: numbers that leave nothing to draw.
        DataError: a question without an answer, or without anything that the mix draws.
    """

    def __init__(
        self,
        examples: Sequence[Example],
        hits: Sequence[Sequence[Hit]],
        mix: Mix,
        *,
        steps: int,
        batch: int,
        passages: tuple[int, int],
        citations: bool = False,
        abstain_retrieved: bool | None = None,
        all_gold: bool = False,
        judged: Qrels | None = None,
        seed: int = 0,
    ) -> None:
        low, high = passages
        if not examples or steps < 1 or batch < 1:
            raise SettingsError("there must be examples, steps and a batch, each 1 up")
        if not 1 <= low <= high:
            raise SettingsError(
                f"passages {low}-{high}: expected a range from 1 up; the kind none shows none"
            )
        self._examples, self._hits, self._judged = examples, hits, judged or {}
        self._shares = {kind: share for kind, share in mix.shares.items() if share}
        self._size, self._passages, self._seed = steps * batch, passages, seed
        self._citations, self._all_gold = citations, all_gold
        self._abstain_retrieved = abstain_retrieved
        self._check(mix)

    def __len__(self) -> int:
        return self._size

    def __getitem__(self, place: int) -> ContextDraw:  # type: ignore[override]
        """Return the draw at a place."""
        if not 0 <= place < len(self):
            raise IndexError(place)
        epoch, rank = divmod(place, len(self._examples))
        example = epoch_order(self._seed, epoch, len(self._examples))[rank]
        own = Random(f"{self._seed} context {place}")
        question = self._question(example)
        wanted = kind = self._kind(own, self._shares)
        if not question.has(wanted):
            kind = self._kind(own, [each for each in self._shares if question.has(each)])
        count = 0 if kind == "none" else own.randint(*self._passages)
        answer = own.choice(question.answers)
        hits = question.hits[:count]
        if kind in ("gold", "distractors"):
            built = self._built(own, question, kind, count)
            hits = [Hit(document, -float(rank)) for rank, document in enumerate(built)]
        places = range(len(hits))
        gold = tuple(p for p in places if question.is_gold(hits[p].document))
        others = (p for p in places if p not in gold)
        holding = tuple(p for p in others if question.holds(hits[p].document))
        abstains = kind in ("gold", "distractors")
        if kind == "retrieved":
            chosen = self._abstain_retrieved
            abstains = question.tells and (question.known if chosen is None else chosen)
        told = answer, tuple(question.answers), self._citations, abstains
        return ContextDraw(example, wanted, kind, count, tuple(hits), gold, holding, *told)

    def _kind(self, own: Random, kinds: Iterable[ContextKind]) -> ContextKind:
        among = list(kinds)
        return own.choices(among, [self._shares[kind] for kind in among])[0]

    def _built(
        self, own: Random, question: Passages, kind: ContextKind, count: int
    ) -> list[Document]:
        built: list[Document] = []
        if kind == "gold":
            most = min(count, len(question.gold))
            built = own.sample(question.gold, most if self._all_gold else own.randint(1, most))
        built += islice(question.distractors(own), count - len(built))
        own.shuffle(built)
        return built

    def _question(self, place: int) -> Passages:
        example = self._examples[place]
        return Passages(example, self._hits[place], self._judged.get(example.query.id, {}))

    def _check(self, mix: Mix) -> None:
        for example, _ in zip(self._examples, self._hits, strict=True):
            if not any(answer.strip() for answer in example.answers):
                raise DataError(
                    f"question {example.query.id!r} has no answer to learn. Leave it out, or give "
                    "its answer."
                )
        places = () if "none" in self._shares else range(len(self._examples))
        lacking = [
            self._examples[place].query.id
            for place, question in zip(places, map(self._question, places), strict=True)
            if not any(map(question.has, self._shares))
        ]
        if lacking:
            more = f", and {len(lacking) - 1} more," if len(lacking) > 1 else ""
            raise DataError(
                f"question {lacking[0]!r}{more} has no passages of any kind that the mix {mix} "
                "draws. Leave such questions out, find passages, or give the kind none a share."
            )


def tally(draws: Iterable[ContextDraw]) -> dict[str, Any]:
    """Count what was drawn, as the prompts would show it if nothing were left out.

    Returns:
        under `kinds` kind -> draws; `redrawn` kind -> draws that wanted it in vain; `passages`
        number shown -> draws; `gold_places` kind -> place of a gold passage, from 1 -> how often;
        `short` draws that show fewer passages than they should; `abstaining` draws whose target
        abstains.
    """
    kinds, redrawn, passages = Counter[str](), Counter[str](), Counter[int]()
    places: dict[str, Counter[int]] = {}
    short = abstaining = 0
    for draw in draws:
        kinds[draw.kind] += 1
        redrawn[draw.wanted] += draw.wanted != draw.kind
        passages[len(draw.hits)] += 1
        if draw.gold:
            places.setdefault(draw.kind, Counter()).update(place + 1 for place in draw.gold)
        short += len(draw.hits) < draw.count
        abstaining += draw.target() == ABSTENTION
    return {
        "kinds": dict(kinds),
        "redrawn": dict(+redrawn),
        "passages": dict(sorted(passages.items())),
        "gold_places": {kind: dict(sorted(of.items())) for kind, of in places.items()},
        "short": short,
        "abstaining": abstaining,
    }
