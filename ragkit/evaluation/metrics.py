"""Scores per question: of a run against qrels (trec_eval's), and of answers against gold answers.

Every function gives one value per question, never a mean: means and their intervals are
`statistics`', and two systems can only be compared question by question.
"""

from __future__ import annotations

import re
import string
from collections import Counter
from collections.abc import Callable, Iterable, Mapping, Sequence

import numpy as np
import pytrec_eval

from ..errors import DataError, SettingsError
from ..types import Qrels, Run

ANSWER_MEASURES = ("EM", "F1", "cover")
"""The names of the measures that `answer_measures` gives."""

_ARTICLES = re.compile(r"\b(a|an|the)\b")
_NO_PUNCTUATION = str.maketrans("", "", string.punctuation)
_SCORE_LIMIT = 1e38  # trec_eval keeps scores in single precision, whose largest value is 3.4e38


def retrieval_measures(
    run: Run, qrels: Qrels, ks: Sequence[int] = (1, 5, 10, 20, 100)
) -> dict[str, dict[str, float]]:
    """Score a run with trec_eval's code: measure -> query id -> value.

    The measures are nDCG@10, MRR@10, MAP, and recall@k and hit@k of each k; a document is relevant
    from grade 1. As with `trec_eval -c`, every query of `qrels` has a value: 0 where the run lacks
    it, and 0 where nothing is relevant. Queries that `qrels` do not judge have none.

    trec_eval orders by score in single precision, and equal scores by descending document id,
    whatever the order of the run. A run whose order is to be measured as it stands goes through
    `strictly_decreasing` first.

    Raises:
        DataError: a score is not a finite number.
        SettingsError: a k is not a positive integer.
    """
    check_ks(ks)
    for query, scores in run.items():
        check_scores(query, scores)
    names = _trec_names(ks)
    judged = {query: grades for query, grades in qrels.items() if grades}
    evaluator = pytrec_eval.RelevanceEvaluator(judged, set(names.values()))
    found = evaluator.evaluate({query: run[query] for query in judged if query in run})
    values = {
        name: {query: float(found.get(query, {}).get(trec_name, 0.0)) for query in judged}
        for name, trec_name in names.items()
    }
    # A first relevant document below rank 10 has a reciprocal rank of at most 1/11.
    values["MRR@10"] = {
        query: value if value > 1 / 10.5 else 0.0 for query, value in values["MRR@10"].items()
    }
    return values


def check_ks(ks: Sequence[int]) -> None:
    """Refuse depths that cannot be those of recall@k and hit@k.

    Raises:
        SettingsError: a k is not a positive integer.
    """
    for k in ks:
        if not isinstance(k, int) or k < 1:
            raise SettingsError(f"the depths k of recall@k must be positive integers, not {k!r}")


def check_scores(query: str, scores: Mapping[str, float]) -> None:
    """Refuse scores that are not finite numbers (in trec_eval's single precision).

    Raises:
        DataError: naming the query and the document.
    """
    for document, score in scores.items():
        if not abs(score) < _SCORE_LIMIT:
            raise DataError(
                f"query {query!r}: document {document!r} has the score {score}, which is not a "
                "finite number. Mend the retriever or reranker that gave it."
            )


def strictly_decreasing(run: Run) -> Run:
    """Lower scores, as little as single precision allows, until each is below the one before it.

    trec_eval then measures the order of the run as it stands, ties included, and so does anybody
    who scores the written run again. A run without ties, best first, keeps its scores but for
    rounding to single precision.

    Raises:
        DataError: a score is not a finite number.
    """
    return {query: _decreasing(query, scores) for query, scores in run.items()}


def judged_ids(qrels: Qrels, parents: Mapping[str, str]) -> dict[str, str]:
    """Tell which documents are judged as their parent: document id -> parent id.

    `parents` maps documents that were split off longer ones to those. Where the qrels name any
    parent, they judge whole documents: then every such document counts as its parent, but those
    that the qrels name themselves. Where they name none, the result is empty.
    """
    named = {document for grades in qrels.values() for document in grades}
    if named.isdisjoint(parents.values()):
        return {}
    return {piece: parent for piece, parent in parents.items() if piece not in named}


def judged_run(run: Run, qrels: Qrels, parents: Mapping[str, str]) -> Run:
    """Replace documents by the parents that they are judged as (see `judged_ids`).

    A parent's score is that of its best document, and its place that of its first (MaxP; Dai and
    Callan 2019, "Deeper text understanding for IR with contextual neural language modeling").
    """
    judged_as = judged_ids(qrels, parents)
    result: Run = {}
    for query, scores in run.items():
        best: dict[str, float] = {}
        for document, score in scores.items():
            judged = judged_as.get(document, document)
            best[judged] = max(score, best.get(judged, score))
        result[query] = best
    return result


def answer_rank(texts: Iterable[str], golds: Sequence[str]) -> int:
    """Return the rank, from 1, of the first text that contains a gold answer, or 0 if none does.

    From it comes answer@k, the share of questions whose first k documents contain an answer: the
    "top-k accuracy" of Karpukhin et al. 2020 (DPR), with `cover_match` as the test.
    """
    for rank, text in enumerate(texts, start=1):
        if cover_match(text, golds):
            return rank
    return 0


def answer_measures(
    text: str, golds: Sequence[str], *, abstained: bool = False
) -> dict[str, float]:
    """Score one answer by EM, F1 and cover against the best of its golds.

    No golds mean that the question cannot be answered. Then, as in SQuAD 2.0 (Rajpurkar et al.
    2018), all scores are 1 when the reader abstained, else 0. An answer that abstains from a
    question with golds earns nothing for the words of its refusal: it scores 0, unless a gold
    says exactly the same.
    """
    if not golds:
        return dict.fromkeys(ANSWER_MEASURES, float(abstained))
    exact = exact_match(text, golds)
    if abstained:
        return dict.fromkeys(ANSWER_MEASURES, exact)
    return {"EM": exact, "F1": token_f1(text, golds), "cover": cover_match(text, golds)}


def normalize_answer(text: str) -> str:
    """Lower-case, strip ASCII punctuation and English articles, and join by single spaces.

    This is the normalisation of SQuAD's official script (Rajpurkar et al. 2016), kept as it is so
    that numbers compare: "3.5" becomes "35", "well-known" becomes "wellknown", and punctuation
    outside ASCII (“ ” – …) stays.
    """
    lowered = text.lower().translate(_NO_PUNCTUATION)
    return " ".join(_ARTICLES.sub(" ", lowered).split())


def exact_match(text: str, golds: Sequence[str]) -> float:
    """Return 1.0 if the text equals a gold after normalisation, else 0.0.

    A gold of which normalisation leaves nothing ("The The", "!") is compared as it is, lower-cased;
    the official script would call it equal to any other such answer.
    """
    return _best(text, golds, _same)


def token_f1(text: str, golds: Sequence[str]) -> float:
    """Return the harmonic mean of precision and recall of normalised words, for the best gold.

    Rajpurkar et al. 2016, section 6.1. Golds of which normalisation leaves nothing are compared
    as in `exact_match`.
    """
    return _best(text, golds, _f1)


def cover_match(text: str, golds: Sequence[str]) -> float:
    """Return 1.0 if the text contains a gold as a run of whole normalised words, else 0.0.

    Words end at white space, so that in scripts without spaces only a gold that fills the space
    between two spaces is found. Golds of which normalisation leaves nothing are searched as they
    are, lower-cased.
    """
    return _best(text, golds, _covers)


def _best(text: str, golds: Sequence[str], score: Callable[[str, str, str, str], float]) -> float:
    """Return the best score of (normalised text, normalised gold, raw text, raw gold)."""
    normal, raw = normalize_answer(text), text.lower().strip()
    return max(
        (float(score(normal, normalize_answer(gold), raw, gold.lower().strip())) for gold in golds),
        default=0.0,
    )


def _same(text: str, gold: str, raw_text: str, raw_gold: str) -> bool:
    return text == gold if gold else raw_text == raw_gold


def _f1(text: str, gold: str, raw_text: str, raw_gold: str) -> float:
    if not gold:
        return float(raw_text == raw_gold)
    words, gold_words = text.split(), gold.split()
    shared = (Counter(words) & Counter(gold_words)).total()
    # 2PR / (P + R) with P = shared / len(words) and R = shared / len(gold_words).
    return 2 * shared / (len(words) + len(gold_words))


def _covers(text: str, gold: str, raw_text: str, raw_gold: str) -> bool:
    if gold:
        return f" {gold} " in f" {text} "
    if not raw_gold:
        return not raw_text
    before = r"(?<!\w)" if raw_gold[0].isalnum() else ""
    after = r"(?!\w)" if raw_gold[-1].isalnum() else ""
    return re.search(before + re.escape(raw_gold) + after, raw_text) is not None


def _decreasing(query: str, scores: Mapping[str, float]) -> dict[str, float]:
    check_scores(query, scores)
    values = np.fromiter(scores.values(), np.float32, len(scores))
    if (np.diff(values) >= 0).any():
        lowest = np.float32(-np.inf)
        for place in range(1, len(values)):
            values[place] = min(values[place], np.nextafter(values[place - 1], lowest))
    return dict(zip(scores, values.tolist(), strict=True))


def _trec_names(ks: Sequence[int]) -> dict[str, str]:
    names = {"nDCG@10": "ndcg_cut_10", "MRR@10": "recip_rank", "MAP": "map"}
    names |= {f"recall@{k}": f"recall_{k}" for k in ks}
    return names | {f"hit@{k}": f"success_{k}" for k in ks}
