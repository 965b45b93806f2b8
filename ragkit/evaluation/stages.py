"""Where questions are lost between the corpus and the answer, and what to train next."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from typing import Any

from .statistics import Estimate, bootstrap_mean

CORRECT = "correct"
STAGES = (
    "not in the corpus",
    "not retrieved",
    "needs more passages than kept",
    "ranked too low",
    "dropped by the reranker",
    "cut from the prompt",
    "misread",
    "abstained wrongly",
    "should have abstained",
    CORRECT,
)
"""What becomes of a question: where it was lost first, or that it was not."""

BOUNDS = ("corpus", "retrieval", "ranking", "prompt", "answer")
"""Up to where evidence can survive."""

_ENOUGH = 20  # questions that tell how well a reader reads

# Which part would have kept the questions that a stage lost.
_PARTS = {
    "not in the corpus": "corpus",
    "not retrieved": "retriever",
    "needs more passages than kept": "prompt",
    "ranked too low": "retriever",
    "dropped by the reranker": "reranker",
    "cut from the prompt": "prompt",
    "misread": "reader",
    "abstained wrongly": "reader",
    "should have abstained": "reader",
}
_ADVICE = {
    "corpus": "Add the missing documents: for want of them",
    "retriever": "Train the retriever next: by it",
    "reranker": "Train the reranker next: by it",
    "prompt": "Give the reader more passages or a longer context: for want of room",
    "reader": "Train the reader next: by it",
}


@dataclass(frozen=True, slots=True)
class Trace:
    """How far a question's evidence came, and what came of it.

    Attributes:
        held: the corpus holds what the question needs.
        retrieved: it is among all hits.
        leading: it was among the hits that the reader is given before they were reranked; the same
            as `kept` without a reranker.
        kept: it is among the hits that the reader was given.
        fits: as many hits as the reader is given can hold it.
        shown: it is in the prompt.
        correct: the answer is right; None without a reader.
        abstained: the reader declined to answer.
        answerable: the question has an answer.
    """

    held: bool = False
    retrieved: bool = False
    leading: bool = False
    kept: bool = False
    fits: bool = True
    shown: bool = False
    correct: bool | None = None
    abstained: bool = False
    answerable: bool = True


def stage_of(trace: Trace, *, reranked: bool = False) -> str:
    """Return the first stage that lost a question, or `CORRECT`.

    A right answer is right, wherever the reader had it from. `reranked` says that there is a
    reranker: what it did not lift to the reader is lost by it where the retriever had it there
    already, else ranked too low.
    """
    checks = (
        (bool(trace.correct), CORRECT),
        (not trace.answerable, "should have abstained"),
        (not trace.held, "not in the corpus"),
        (not trace.retrieved, "not retrieved"),
        (not trace.kept and not trace.fits, "needs more passages than kept"),
        (not trace.kept and reranked and trace.leading, "dropped by the reranker"),
        (not trace.kept, "ranked too low"),
        (trace.correct is None, CORRECT),
        (not trace.shown, "cut from the prompt"),
        (trace.abstained, "abstained wrongly"),
    )
    return next((stage for applies, stage in checks if applies), "misread")


@dataclass(frozen=True, slots=True)
class StageLosses:
    """Where the questions of a run were lost.

    Attributes:
        stages: query id -> stage.
        counts: stage -> questions.
        bounds: the oracle bound of each stage: the share of answerable questions whose evidence
            came so far, which no later stage can exceed but by chance or by heart; and, as
            `answer`, the share answered rightly.
        gains: part -> what a perfect part would add to the share of right answers. The questions
            that the reader lost, it would win. Those that another part lost would still have to be
            read: they are counted with the share that the reader answers rightly with evidence,
            or fully where fewer than 20 questions tell that share.
        advice: one sentence on what to train next.
    """

    stages: dict[str, str]
    counts: dict[str, int]
    bounds: dict[str, Estimate]
    gains: dict[str, Estimate]
    advice: str

    def to_json(self) -> dict[str, Any]:
        """Return the value that `results.json` holds; the questions are in answers.jsonl."""
        values = asdict(self)
        del values["stages"]
        return values


def not_staged_note(count: int) -> str:
    """Say how many judged questions are in no stage, since nothing tells if they are answered."""
    if not count:
        return ""
    which = "1 judged question is" if count == 1 else f"{count:,} judged questions are"
    return f"{which} in no stage: without gold answers, right and wrong cannot be told apart."


def stage_losses(
    traces: Mapping[str, Trace], *, reranked: bool, seed: int = 0
) -> StageLosses | None:
    """Tell where questions were lost, and which part would bring most; None without questions.

    Args:
        traces: query id -> trace, of the questions of which it is known what they need.
        reranked: whether there was a reranker.
        seed: of the bootstrap.
    """
    if not traces:
        return None
    read = any(trace.correct is not None for trace in traces.values())
    stages = {query: stage_of(trace, reranked=reranked) for query, trace in traces.items()}
    counts = Counter(stages.values())
    answerable = [trace for trace in traces.values() if trace.answerable]
    reach = {
        "corpus": [trace.held for trace in answerable],
        "retrieval": [trace.held and trace.retrieved for trace in answerable],
        "ranking": [trace.held and trace.kept for trace in answerable],
    }
    if read:
        reach["prompt"] = [trace.held and trace.shown for trace in answerable]
        reach["answer"] = [bool(trace.correct) for trace in traces.values()]
    bounds = {
        name: bootstrap_mean([float(value) for value in values], seed=seed)
        for name, values in reach.items()
        if values
    }
    gains = _gains(traces, stages, read, seed)
    return StageLosses(
        stages,
        {stage: counts[stage] for stage in STAGES if counts[stage]},
        bounds,
        gains,
        _advice(stages, gains, bounds, read, sum(trace.shown for trace in traces.values())),
    )


def _gains(
    traces: Mapping[str, Trace], stages: Mapping[str, str], read: bool, seed: int
) -> dict[str, Estimate]:
    shown = [bool(trace.correct) for trace in traces.values() if trace.shown]
    share = sum(shown) / len(shown) if read and len(shown) >= _ENOUGH else 1.0
    gains = {}
    for part in _ADVICE:
        weight = 1.0 if part == "reader" or not read else share
        lost = [weight * (_PARTS.get(stages[query]) == part) for query in traces]
        if any(lost):
            gains[part] = bootstrap_mean(lost, seed=seed)
    return dict(sorted(gains.items(), key=lambda item: -item[1].mean))


def _advice(
    stages: Mapping[str, str],
    gains: Mapping[str, Estimate],
    bounds: Mapping[str, Estimate],
    read: bool,
    shown: int,
) -> str:
    if not gains:
        return "Nothing was lost: these questions show no part that training could better."
    (best, gain), *others = gains.items()
    lost = sum(_PARTS.get(stage) == best for stage in stages.values())
    what = "right answers" if read else "questions whose evidence reaches the reader"
    now = bounds["answer" if read else "ranking"].mean
    sentence = (
        f"{_ADVICE[best]} {lost} of {len(stages)} questions were lost, and a perfect {best} would "
        f"raise the share of {what} from {now:.2f} to {now + gain.mean:.2f}"
    )
    if others:
        second, other = others[0]
        sentence += f"; a perfect {second} would to {now + other.mean:.2f}"
        if other.high >= gain.low:
            sentence += " (the intervals overlap: these questions hardly tell the two apart)"
    if read and shown < _ENOUGH and best != "reader":
        sentence += (
            f", if the reader read them all rightly: only {shown} questions came to it with their "
            "evidence, too few to tell"
        )
    return sentence + "."
