"""`ragkit-train negatives`: questions in, questions with hard negatives out."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal

from cyclopts import Parameter

from ragkit.artefacts import check_file, file_record
from ragkit.assemble import RetrievalSettings, open_index, resolved
from ragkit.console import print_json, print_tables, progress_bars, say
from ragkit.corpus import read_questions, write_questions
from ragkit.errors import DataError, SettingsError
from ragkit.parsing import suffix_of
from ragkit.training.negative_rules import FILTERS, Rules
from ragkit.training.negatives import Score, Weigh, mine
from ragkit.types import Example, Hit, Qrels

from .positives import with_positives, without_held_out
from .questions import drawn, ranked
from .supervision import scorer, weigher

if TYPE_CHECKING:
    from ragkit.stores.index import Index

_SLICE = 256  # questions whose hits are in memory


@Parameter(name="*")
@dataclass(frozen=True, kw_only=True)
class NegativeSettings:
    """Which questions get which negatives, and from where."""

    index: Path
    """The index folder that negatives are taken from; nothing of it is encoded again."""
    questions: Path
    """Questions, in any form that ragkit reads; with positives of their own, or --qrels."""
    output: Path
    """The file for the questions with their negatives: .jsonl or .jsonl.gz."""
    qrels: Path | None = None
    """The relevant documents are the positives, and only questions that have some are taken."""
    held_out: Annotated[
        list[Path], Parameter(negative="", consume_multiple=True, show_default=False)
    ] = field(default_factory=list)
    """Qrels, or questions in JSON, of dev and test: left out, and what is relevant is spared."""
    limit: int | None = None
    """Questions that get negatives, drawn at random; all if not given."""
    retriever: Literal["bm25", "dense", "hybrid"] | None = None
    """What searches; hybrid if the index has both stores."""
    encoder: str | None = None
    """The encoder of the questions; the one named in the index if not given."""
    negatives: int = 8
    """Negatives of a question, at most."""
    depth: int = 100
    """The last rank that a negative may have."""
    from_rank: int = 1
    """The first rank that a negative may have."""
    sampling: Literal["top", "random"] = "top"
    """Take the best ranks, or draw from all of them."""
    seed: int = 0
    """The seed of --sampling random."""
    margin: float | None = None
    """How much lower than the best relevant document a negative scores, at least."""
    relative_margin: float | None = None
    """The same as a share of that document's score, such as 0.05."""
    cross_encoder: str | None = None
    """A cross-encoder, by folder or name, that scores positives and candidates."""
    max_score: float | None = None
    """The highest score of a negative by the cross-encoder."""
    score_margin: float | None = None
    """How much lower than the best positive the cross-encoder scores a negative, at least."""
    max_utility: float | None = None
    """The most that a negative may make a token of the answer likelier to --generator, in nats: at
    0, what makes it likelier is left out."""
    generator: str = "SmolLM2-135M-Instruct"
    """The generator of --max-utility, by folder or name."""
    allow_answers: bool = False
    """Take documents that hold an answer too."""
    allow_held_out: bool = False
    """Take what is relevant to held-out questions too: sparing it tells training of their qrels."""
    similarity: float = 0.8
    """From where a document is nearly the same as a positive and not taken, up to 1."""
    device: str | None = None
    """Where models run: cpu, cuda, mps; the best one here if not given."""
    precision: Literal["auto", "fp32", "bf16"] = "auto"
    """The models' number format."""
    replace: bool = False
    """Replace the output that is there."""


def negatives(*, settings: NegativeSettings, json: bool = False) -> None:
    """Find hard negatives for questions in an index, and leave out those that may be positives.

    Example: ragkit-train negatives --index kb --questions q.jsonl --qrels q.tsv --output n.jsonl

    Negatives that came with the questions are replaced; each new one's metadata tell its rank,
    scores and margins. A run that was stopped goes on when the same command is given again.

    Parameters
    ----------
    json
        Print the settings, the files and the counts as JSON.
    """
    rules = _rules(settings)
    index = open_index(_retrieval(settings))
    examples, qrels, documents, left_out = _examples(settings, index)
    mined, counts = _mined(settings, index, examples, qrels, replace(rules, held_out=documents))
    found = [example for example in mined if example.negatives]
    if not found:
        taken = [f"{counts[name]} were {why}" for name, why in FILTERS.items() if counts[name]]
        raise DataError(
            f"none of {len(mined)} questions has a negative. Of {counts['seen']} hits looked at, "
            f"{', '.join(taken) or 'none was left'}."
        )
    write_questions(settings.output, found)
    results = _results(settings, index, left_out, mined, counts)
    if json:
        print_json(results)
    else:
        print_tables(_tables(results))
        say(f"{settings.output}: {len(found):,} questions, {counts['kept']:,} negatives")


def _rules(settings: NegativeSettings) -> Rules:
    """Refuse settings that could not work, before any work is done."""
    rules = Rules(
        negatives=settings.negatives,
        from_rank=settings.from_rank,
        margin=settings.margin,
        relative_margin=settings.relative_margin,
        max_score=settings.max_score,
        score_margin=settings.score_margin,
        max_utility=settings.max_utility,
        allow_answers=settings.allow_answers,
        similarity=settings.similarity,
        seed=settings.seed if settings.sampling == "random" else None,
    )
    if settings.depth < settings.from_rank:
        raise SettingsError(
            f"--depth {settings.depth} lies before --from-rank {settings.from_rank}: no rank left"
        )
    if settings.cross_encoder is None and rules.scored:
        raise SettingsError("--max-score and --score-margin need --cross-encoder NAME")
    if suffix_of(settings.output) not in (".jsonl", ".jsonl.gz"):
        raise SettingsError(f"--output {settings.output}: the name must end in .jsonl or .jsonl.gz")
    check_file(settings.output)
    if settings.output.exists() and not settings.replace:
        raise SettingsError(
            f"{settings.output} exists already. Choose another name, or pass --replace."
        )
    return rules


def _retrieval(settings: NegativeSettings) -> RetrievalSettings:
    names = ("index", "retriever", "encoder", "depth", "device", "precision")
    return RetrievalSettings(**{name: getattr(settings, name) for name in names})


def _examples(
    settings: NegativeSettings, index: Index
) -> tuple[list[Example], Qrels, frozenset[str], dict[str, int]]:
    """Read the questions with their positives.

    Returns:
        the questions, their judgements, the documents to spare, and how many were left out of what.
    """
    asked = read_questions(settings.questions)
    examples, qrels, counts = with_positives(asked, settings.questions, settings.qrels, index)
    apart, documents = without_held_out(examples, asked, settings.held_out)
    counts["questions held out"] = len(examples) - len(apart)
    spared = frozenset() if settings.allow_held_out else documents
    return drawn(apart, settings.limit), qrels, spared, counts


def _mined(
    settings: NegativeSettings,
    index: Index,
    examples: Sequence[Example],
    qrels: Qrels,
    rules: Rules,
) -> tuple[list[Example], Counter[str]]:
    by = resolved(_retrieval(settings), index)
    mined: list[Example] = []
    counts: Counter[str] = Counter()
    with progress_bars() as progress:
        score: Score | None = None
        if settings.cross_encoder is not None:
            named = settings.cross_encoder, settings.device, settings.precision
            score = scorer(*named, progress)
        weigh: Weigh | None = None
        if rules.max_utility is not None:
            weigh = weigher(settings.generator, settings.device, settings.precision, progress)
        found = ranked(index, [each.query for each in examples], by, settings.depth, progress)
        for start in range(0, len(examples), _SLICE):
            progress("negatives", start, len(examples))
            hits = [
                [Hit(index.documents[row], value) for row, value in rows]
                for rows in found[start : start + _SLICE]
            ]
            part, taken = mine(
                examples[start : start + _SLICE],
                hits,
                rules,
                retriever=by.retriever or "",
                judged=qrels,
                score=score,
                weigh=weigh,
            )
            mined += part
            counts += taken
        progress("negatives", len(examples), len(examples))
    return mined, counts


def _results(
    settings: NegativeSettings,
    index: Index,
    left_out: dict[str, int],
    mined: Sequence[Example],
    counts: Counter[str],
) -> dict[str, Any]:
    found = Counter(min(len(each.negatives), settings.negatives) for each in mined)
    values = asdict(settings) | {"held_out": [str(path) for path in settings.held_out]}
    return {
        "settings": {n: str(v) if isinstance(v, Path) else v for n, v in values.items()},
        "index": index.fingerprint(),
        "files": {
            "questions": file_record(settings.questions),
            "qrels": file_record(settings.qrels),
            "held_out": [file_record(path) for path in settings.held_out],
            "output": file_record(settings.output),
        },
        "questions": left_out
        | {
            "questions without negatives": found[0],
            "questions with fewer negatives": len(mined) - found[0] - found[settings.negatives],
            "questions with all negatives": found[settings.negatives],
        },
        "hits": {"seen": counts["seen"]}
        | {name: counts[name] for name in FILTERS}
        | {"kept": counts["kept"]},
    }


def _tables(results: dict[str, Any]) -> list[Any]:
    from rich.table import Column, Table

    questions = Table("questions and positives", Column("count", justify="right"))
    for name, count in results["questions"].items():
        questions.add_row(name, f"{count:,}")
    hits = Table("hits looked at", Column("count", justify="right"))
    told = {"seen": "all"} | FILTERS | {"kept": "kept as negatives"}
    for name, count in results["hits"].items():
        hits.add_row(told[name], f"{count:,}")
    return [questions, hits]
