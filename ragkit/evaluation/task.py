"""Run a pipeline over questions, and note of it what is scored."""

from __future__ import annotations

import logging
import math
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from itertools import islice
from typing import TypeAlias

from ..errors import DataError
from ..pipeline import Pipeline
from ..prompts import without_citations
from ..splitting import parent_of
from ..types import Answer, Document, Example, Hit, Progress, Query
from .answers import answer_rank
from .contexts import (
    build_contexts,
    check_contexts,
    check_token_counts,
    noise_name,
    why_not_swept,
    with_tokens,
)
from .costs import Meter
from .evidence import Corpus, Evidence, gold_passages
from .folder import Passages
from .gold import Gold
from .judge import CORRECT, FAITHFUL, Item, JudgeGenerator
from .judge import judge as judge_answers
from .metrics import check_scores
from .scoring import Record
from .stages import Trace

Asked: TypeAlias = tuple[str, str, Sequence[Hit]]
"""A question's id, the context in which it is asked, and the hits that it is asked with."""

_log = logging.getLogger(__name__)

_SLICE = 256  # questions retrieved between two reports of progress
_TEXTS = 10  # hits of a question whose texts the run folder keeps


@dataclass(slots=True)
class Task:
    """What is evaluated, with what is known about it."""

    pipeline: Pipeline
    examples: Sequence[Example]
    gold: Gold
    evidence: Evidence
    corpus: Corpus | None
    contexts: Sequence[str]
    noise: Sequence[float]
    token_counts: Sequence[int]
    seed: int
    progress: Progress
    meter: Meter = field(default_factory=Meter)
    kept: dict[str, Sequence[Hit]] = field(default_factory=dict)
    distractors: dict[str, list[Hit]] = field(default_factory=dict)

    def __post_init__(self) -> None:
        """Refuse contexts that are unknown, and token counts that the reader cannot use.

        Raises:
            SettingsError: as `check_contexts` and `check_token_counts` do.
        """
        check_contexts(self.contexts, self.noise)
        check_token_counts(self.token_counts, self.pipeline.reader)

    @property
    def _distractors_wanted(self) -> int:
        """How many distractors a question may be given."""
        if not (self.contexts or self.noise):
            return 0
        golds = max(1, self.pipeline.keep)
        swept = (math.ceil(golds * r / (1 - r)) for r in self.noise if r < 1)
        return max([golds, *swept])

    def retrieve(self, passages: Passages) -> Record:
        """Retrieve and rerank for all questions."""
        record = Record(reranked=self.pipeline.reranker is not None)
        total = len(self.examples)
        for start in range(0, total, _SLICE):
            self.progress("retrieve", start, total)
            part = self.examples[start : start + _SLICE]
            before, after = self._ranked([example.query for example in part])
            for example, first, hits in zip(part, before, after, strict=True):
                self._note(record, example, first, hits)
                passages.add(self._named(example, hits))
        self.progress("retrieve", total, total)
        return record

    def _named(self, example: Example, hits: Sequence[Hit]) -> Iterator[Document]:
        """Yield the documents whose texts the run folder keeps for a question."""
        yield from (hit.document for hit in hits[:_TEXTS])
        for hit in gold_passages(example, self.gold, self.corpus, _TEXTS):
            yield hit.document

    def _ranked(self, queries: Sequence[Query]) -> tuple[list[list[Hit]], list[list[Hit]]]:
        """Return the queries' hits as retrieved, and as they stand in the end."""
        pipeline = self.pipeline
        with self.meter.stage("retrieve"):
            before = pipeline.retriever.retrieve(queries, pipeline.depth)
        if pipeline.reranker is None:
            return before, before
        with self.meter.stage("rerank"):
            return before, pipeline.reranker.rerank(queries, before, pipeline.depth)

    def _note(
        self, record: Record, example: Example, before: Sequence[Hit], hits: Sequence[Hit]
    ) -> None:
        """Keep of a question's hits what is scored, and those that a reader will be given."""
        query, keep = example.query.id, self.pipeline.keep
        scores = record.found[query] = {}
        for hit in hits:
            scores.setdefault(hit.document.id, float(hit.score))
            if (parent := parent_of(hit.document)) is not None:
                record.parents[hit.document.id] = parent
        check_scores(query, scores)
        if example.answers and query not in self.gold.qrels:
            texts = (hit.document.text for hit in hits)
            record.answer_ranks[query] = answer_rank(texts, example.answers)
        if self.evidence.needs(query):
            kept = self.evidence.suffices(query, hits[:keep])
            leading = kept if before is hits else self.evidence.suffices(query, before[:keep])
            record.traces[query] = Trace(
                retrieved=kept or self.evidence.suffices(query, hits),
                leading=leading,
                kept=kept,
                fits=self.evidence.least(query) <= keep,
            )
        if self.pipeline.reader is not None:
            self.kept[query] = hits[:keep]
        if wanted := self._distractors_wanted:
            wrong = (hit for hit in hits if self.evidence.misleads(query, hit))
            self.distractors[query] = list(islice(wrong, wanted))

    def read(self, record: Record, passages: Passages) -> None:
        """Answer all questions in all contexts, in one call: shared beginnings are read once."""
        reader = self.pipeline.reader
        if reader is None:
            return
        queries = {example.query.id: example.query for example in self.examples}
        asked: list[Asked] = [(query, "retrieved", hits) for query, hits in self.kept.items()]
        asked += self._other_contexts(record)
        asked, counts = self._by_token_counts(asked)
        options = {"use_tokens": counts} if self.token_counts else {}
        self.progress("read", 0, len(asked))
        with self.meter.stage("read") as cost:
            read = reader.read(
                [queries[query] for query, *_ in asked],
                [hits for *_, hits in asked],
                **options,
            )
        cost.prompts = len(asked)
        cost.prompt_tokens = sum(answer.prompt_tokens for answer in read)
        cost.answer_tokens = sum(answer.answer_tokens for answer in read)
        self.progress("read", len(asked), len(asked))
        under: dict[str, dict[str, Answer]] = {name: {} for name in self._names}
        for (query, name, _), answer in zip(asked, read, strict=True):
            if answer.query.id != query:
                raise DataError(
                    f"the reader answered {answer.query.id!r} where {query!r} was asked: "
                    "answers must keep the order of the questions"
                )
            if name != "retrieved" or name in self.contexts:
                under.setdefault(name, {})[query] = answer
            passages.add(hit.document for hit in answer.hits)
        record.answers = dict(zip(queries, read, strict=False))
        record.contexts = {name: answers for name, answers in under.items() if answers}

    @property
    def _names(self) -> list[str]:
        """The contexts that are asked for by name, each before itself with virtual tokens."""
        return [
            name
            for context in self.contexts or ("retrieved",)
            for name in (context, *(with_tokens(context, k) for k in self.token_counts))
        ]

    def _by_token_counts(self, asked: Sequence[Asked]) -> tuple[list[Asked], list[int]]:
        """Ask contexts once more with each number of virtual tokens; return those numbers too."""
        counted = self.contexts or ("retrieved",)
        more = [
            (query, name, hits, count)
            for query, name, hits in asked
            if name in counted
            for count in self.token_counts
        ]
        usual = getattr(self.pipeline.reader, "use_tokens", 0)
        return (
            [*asked, *((query, with_tokens(name, k), hits) for query, name, hits, k in more)],
            [usual] * len(asked) + [count for *_, count in more],
        )

    def judge(self, record: Record, generator: JudgeGenerator) -> None:
        """Have the answers judged: against gold answers, and against the passages shown."""
        answers = record.answers
        given = [query for query in answers if query in self.gold.answers]
        resting = [query for query, a in answers.items() if a.hits and not a.abstained]
        for rubric, asked in ((CORRECT, given), (FAITHFUL, resting)):
            items = [
                Item(
                    answers[query].query.text,
                    without_citations(answers[query].text),
                    tuple(self.gold.answers.get(query, ())),
                    tuple(document.contents for document in answers[query].shown),
                )
                for query in asked
            ]
            with self.meter.stage("judge") as cost:
                verdicts = judge_answers(generator, rubric, items, self.progress)
            cost.prompts = (cost.prompts or 0) + len(items)
            record.verdicts[rubric.name] = dict(zip(asked, verdicts, strict=True))

    def _other_contexts(self, record: Record) -> list[Asked]:
        """Return question, name and hits of the contexts; note what the noise sweep leaves out."""
        if not (self.contexts or self.noise):
            return []
        asked: list[Asked] = []
        left_out: dict[str, str] = {}
        for example in self.examples:
            query, keep = example.query.id, self.pipeline.keep
            gold = gold_passages(example, self.gold, self.corpus, max(1, keep))
            gold = gold if self.evidence.suffices(query, gold) else []
            noise = self.noise if query in self.gold.answers else ()
            built = build_contexts(
                self.contexts,
                noise,
                query=query,
                retrieved=self.kept[query],
                gold=gold,
                distractors=self.distractors[query],
                keep=keep,
                seed=self.seed,
            )
            asked += [(query, name, hits) for name, hits in built.items() if name != "retrieved"]
            if not noise:
                left_out[query] = "without gold answers"
            elif noise_name(noise[0]) not in built:
                left_out[query] = why_not_swept(noise, len(gold))
        if self.noise:
            record.noise_left_out = list(left_out)
            if len(left_out) == len(self.examples):
                _warn_of_no_sweep(self.noise, left_out)
        return asked


def _warn_of_no_sweep(noise: Sequence[float], left_out: Mapping[str, str]) -> None:
    reasons = Counter(left_out.values()).most_common()
    _log.warning(
        f"no question takes part in the noise sweep by {', '.join(map(str, noise))}: of "
        f"{len(left_out)} questions, "
        + ", ".join(f"{count} are {reason}" for reason, count in reasons)
        + ". One gold passage reaches the shares 0, 0.5, 0.67, 0.75, 0.8 and so on, each within 5 "
        "points, and 1, of distractors alone."
    )
