"""Scores of answers, per question: against gold answers, gold passages and gold silence.

Every function gives the value of one question, never a mean: means and their intervals are
`statistics`', and two systems can only be compared question by question.
"""

from __future__ import annotations

import re
import string
import unicodedata
from collections import Counter
from collections.abc import Callable, Iterable, Sequence
from collections.abc import Set as AbstractSet
from functools import cache
from typing import TYPE_CHECKING, TypeAlias

if TYPE_CHECKING:
    from rouge_score.rouge_scorer import RougeScorer

ANSWER_MEASURES = ("EM", "F1", "cover", "ROUGE-L")
"""The names of the measures that `answer_measures` gives."""

Ratio: TypeAlias = tuple[int, int]
"""A question's part in a ratio of sums: what it adds to the numerator and to the denominator."""

_ARTICLES = re.compile(r"\b(a|an|the)\b")
_NO_PUNCTUATION = str.maketrans("", "", string.punctuation)
# Thai, Lao, Myanmar, Khmer, Japanese and Chinese write no spaces between words.
_UNSPACED = re.compile(
    "[\u0e00-\u0eff\u1000-\u109f\u1780-\u17ff\u3005-\u3007\u3040-\u30ff\u31f0-\u31ff"
    "\u3400-\u4dbf\u4e00-\u9fff\uf900-\ufaff\U00020000-\U0003ffff]"
)


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
    """Score one answer by EM, F1, cover and ROUGE-L against the best of its golds.

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
    return {
        "EM": exact,
        "F1": token_f1(text, golds),
        "cover": cover_match(text, golds),
        "ROUGE-L": rouge_l(text, golds),
    }


def citation_measures(
    cited: Iterable[str], relevant: AbstractSet[str], shown: Iterable[str]
) -> dict[str, Ratio]:
    """Count what one question adds to the precision and recall of citations.

    Precision is the share of cited passages that are gold, recall the share of the gold passages
    among those shown that are cited; both are ratios of sums over questions. They speak of
    questions with gold passages alone: leave the others out. Where no gold passage was shown, every
    citation is wrong, and recall has nothing to count.

    Args:
        cited: the passages that the answer cites, each counted once however often it is named.
        relevant: the question's gold passages, shown or not.
        shown: the passages that the prompt showed. Ids are those that the qrels judge, so that
            pieces of a document may count as it (see `metrics.judged_ids`).
    """
    named, gold = set(cited), relevant & set(shown)
    return {
        "citation precision": (len(named & relevant), len(named)),
        "citation recall": (len(named & gold), len(gold)),
    }


def abstention_measures(abstained: bool, golds: Sequence[str]) -> dict[str, Ratio]:
    """Count what one question adds to the precision and recall of abstentions.

    Precision is the share of abstentions that are right, because the question cannot be answered;
    recall is the share of such questions that are abstained from. Both are ratios of sums over
    questions. No golds mean that a question cannot be answered, as in `answer_measures`: leave out
    those whose golds are not known.
    """
    right = int(abstained and not golds)
    return {
        "abstention precision": (right, int(abstained)),
        "abstention recall": (right, int(not golds)),
    }


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


def telling(answers: Sequence[str]) -> list[str]:
    """Return the answers whose place in a text tells that it answers.

    Left out are yes, no, articles, and single letters, digits and marks, which most texts hold by
    chance. Evaluation counts all answers; what tells passages apart in training counts these.
    """

    def tells(answer: str) -> bool:
        words = normalize_answer(answer) or answer.lower().strip(
            string.punctuation + string.whitespace
        )
        common = words in ("yes", "no", "a", "an", "the")
        return not (common or (len(words) < 2 and words.isascii()))

    return [answer for answer in answers if tells(answer)]


def rouge_l(text: str, golds: Sequence[str]) -> float:
    """Return the F-measure of the longest common subsequence of words, for the best gold.

    Lin 2004, "ROUGE: a package for automatic evaluation of summaries", as the package rouge-score
    computes it, without stemming; articles count. That package sees ASCII words alone. Here words
    of every script count, after NFKC, and in scripts without spaces (Chinese, Japanese, Thai, …)
    each character is one; texts in ASCII score what the package gives. As there, a text or gold
    without any word scores 0. Time and memory grow with the product of the two lengths.
    """
    score = _rouge_scorer().score
    return max((float(score(gold, text)["rougeL"].fmeasure) for gold in golds), default=0.0)


@cache
def _rouge_scorer() -> RougeScorer:
    from rouge_score.rouge_scorer import RougeScorer  # takes a second: it imports nltk

    return RougeScorer(["rougeL"], tokenizer=_UnicodeWords())


class _UnicodeWords:
    """The tokenizer of `rouge_l`: lower-cased runs of letters, digits and their marks."""

    def tokenize(self, text: str) -> list[str]:
        category = unicodedata.category
        # NFKC would make of an accent that stands alone, as in "don´t", one of the letter after it.
        bare = "".join(" " if category(c) == "Sk" else c for c in text)
        normal = unicodedata.normalize("NFKC", bare).lower()
        kept = "".join(c if category(c)[0] in "LMN" else " " for c in normal)
        return _UNSPACED.sub(r" \g<0> ", kept).split()


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
