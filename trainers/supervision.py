"""Teachers: what a cross-encoder or a generator says of the documents of questions."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from ragkit.artefacts import read_json, write_json
from ragkit.assemble import RetrievalSettings, resolved
from ragkit.errors import DataError, SettingsError
from ragkit.models.names import cache_folder
from ragkit.types import Document, Example, Hit, Progress

from .questions import ranked

if TYPE_CHECKING:
    from ragkit.models.bi_encoder import BiEncoder
    from ragkit.models.generator import Generator
    from ragkit.models.precision import Precision
    from ragkit.readers import GeneratorReader
    from ragkit.stores.index import Index
    from ragkit.training.lists import ListedQuestion
    from ragkit.training.negatives import Weigh

STYLE, CONTEXT_TOKENS = "spring", 512  # of the prompts by which a generator judges a document
JUDGED_BY = {"style": STYLE, "context_tokens": CONTEXT_TOKENS}


def scorer(
    name: str, device: str | None, precision: Precision, progress: Progress
) -> Callable[[Sequence[tuple[str, str]]], list[float]]:
    """Load a cross-encoder, and return what scores pairs; scores are kept in ragkit's cache."""
    from ragkit.models.cross_encoder import CrossEncoder, KeptScores

    model = CrossEncoder.load(name, device=device, precision=precision)
    kept = KeptScores(model, cache_folder() / "cross-encoder")
    done = 0

    def score(pairs: Sequence[tuple[str, str]]) -> list[float]:
        nonlocal done
        scores = kept.score(pairs, progress=lambda of: progress("cross-encoder", done + of, None))
        done += len(pairs)
        return [float(value) for value in scores]

    return score


def weigher(name: str, device: str | None, precision: Precision, progress: Progress) -> Weigh:
    """Load a generator, and return what tells how much documents help it; that is kept on disk."""
    from ragkit.models.generator import Generator
    from ragkit.readers import GeneratorReader
    from ragkit.training.utility import utilities

    model = Generator.load(name, device=device, precision=precision)
    reader = GeneratorReader(model, style=STYLE, context_tokens=CONTEXT_TOKENS)

    def weigh(asked: Sequence[tuple[Example, Sequence[Document]]]) -> list[list[float]]:
        labels = utilities(
            model,
            [example for example, _ in asked],
            [[Hit(document, 0.0) for document in documents] for _, documents in asked],
            reader.prompt,
            JUDGED_BY,
            progress=progress,
        )
        return [label.mean_gains.tolist() for label in labels]

    return weigh


def taught(
    examples: Sequence[Example], teacher: str | None, device: str, progress: Progress
) -> dict[tuple[str, str], float]:
    """Return a cross-encoder's score of each question's documents: (query id, document id) -> it.

    Args:
        examples: with positives and negatives.
        teacher: the cross-encoder; without one, its scores are those that mining has left.
        device: where it runs.
        progress: told of the pairs that are scored.

    Raises:
        DataError: a document without a score, and no teacher.
    """
    pairs = [(each, of) for each in examples for of in (*each.positives, *each.negatives)]
    if teacher is not None:
        values = scorer(teacher, device, "fp32", progress)(
            [(each.query.text, of.contents) for each, of in pairs]
        )
        return {
            (each.query.id, of.id): value for (each, of), value in zip(pairs, values, strict=True)
        }
    found: dict[tuple[str, str], float] = {}
    for each, of in pairs:
        score = (of.metadata.get("mined") or {}).get("cross_encoder")
        if not isinstance(score, float | int):
            raise DataError(
                f"question {each.query.id!r}: document {of.id!r} has no score of a cross-encoder. "
                "Name one: --teacher NAME, or ragkit-train negatives --cross-encoder NAME"
            )
        found[each.query.id, of.id] = float(score)
    return found


@dataclass
class GeneratorLists:
    """Lists of documents, each with the generator's log-likelihood of the answer, a token.

    Attributes:
        questions: from what the index's retriever finds; documents are numbered by their rows.
    """

    index: Index
    examples: Sequence[Example]
    generator: Generator
    reader: GeneratorReader
    by: RetrievalSettings
    passages: int
    progress: Progress
    questions: Sequence[ListedQuestion] = ()

    @classmethod
    def first(
        cls,
        index: Index,
        examples: Sequence[Example],
        *,
        generator: str,
        retriever: Literal["bm25", "dense", "hybrid"] | None,
        passages: int,
        relisted: bool,
        device: str,
        progress: Progress,
    ) -> GeneratorLists:
        """Load the generator, and judge what the index's retriever finds.

        Questions for which fewer than two documents are found are left out.

        Raises:
            SettingsError: lists are to be made anew, and BM25 finds them.
            DataError: for no question two documents are found.
        """
        from ragkit.models.generator import Generator
        from ragkit.readers import GeneratorReader

        by = RetrievalSettings(index=index.path, retriever=retriever, device=device)
        by = resolved(by, index)
        if relisted and by.retriever == "bm25":
            raise SettingsError("BM25 finds the same however the encoder learns: no --relist-every")
        queries = [example.query for example in examples]
        found = ranked(index, queries, by, passages, progress)
        rows = [[row for row, _ in of] for of in found]
        enough = [place for place, of in enumerate(rows) if len(of) > 1]
        if not enough:
            raise DataError(
                f"for none of {len(rows)} questions were two documents found to choose from"
            )
        examples = [examples[place] for place in enough]
        model = Generator.load(generator, device=device)
        reader = GeneratorReader(model, style=STYLE, context_tokens=CONTEXT_TOKENS)
        lists = cls(index, examples, model, reader, by, passages, progress)
        lists.questions = lists.judged([rows[place] for place in enough])
        return lists

    def judged(self, rows: Sequence[Sequence[int]]) -> list[ListedQuestion]:
        """Return questions with documents by row, and the generator's judgement of each."""
        from ragkit.training.lists import ListedQuestion
        from ragkit.training.utility import utilities

        hits = [[Hit(self.index.documents[row], 0.0) for row in of] for of in rows]
        labels = utilities(
            self.generator,
            self.examples,
            hits,
            self.reader.prompt,
            JUDGED_BY,
            progress=self.progress,
        )
        return [
            ListedQuestion(
                example.query.text,
                (),
                tuple(of),
                dict(zip(of, label.mean_opened.tolist(), strict=True)),
            )
            for example, of, label in zip(self.examples, rows, labels, strict=True)
        ]

    def anew(
        self, every: int, folder: Path, *, both: bool
    ) -> Callable[[BiEncoder, int], Sequence[ListedQuestion]]:
        """Return what gives the lists of a step: retrieved anew every so many steps.

        Args:
            every: the steps.
            folder: what was retrieved is kept there: a run that is gone on from sees the same.
            both: whether documents are encoded anew too.
        """
        from ragkit.training.keeper import processes

        kept: dict[int, Sequence[ListedQuestion]] = {}

        def questions(encoder: BiEncoder, step: int) -> Sequence[ListedQuestion]:
            period = step // every
            if period == 0:
                return self.questions
            if period not in kept:
                path = folder / f"lists-{period}.json"
                with processes(encoder.model.device).main_process_first():
                    if not path.exists():
                        vectors = folder / "vectors.npy" if both else None
                        write_json(path, {"rows": self._retrieved(encoder, vectors)})
                    kept.clear()
                    kept[period] = self.judged(read_json(path)["rows"])
            return kept[period]

        return questions

    def _retrieved(self, encoder: BiEncoder, vectors: Path | None) -> list[list[int]]:
        """Return the rows that the encoder, as it is now, finds for each question.

        With a file for vectors, documents are encoded anew into it.
        """
        from ragkit.retrievers import Bm25Retriever, DenseRetriever, HybridRetriever
        from ragkit.stores.dense import DenseStore
        from ragkit.stores.embeddings import open_embeddings, write_embeddings

        store, documents = self.index.dense, self.index.documents
        if vectors is not None:
            write_embeddings(
                vectors,
                encoder,
                lambda start, stop: [documents[row].contents for row in range(start, stop)],
                len(documents),
                lambda done: self.progress("encode", done, len(documents)),
            )
            store = DenseStore([open_embeddings(vectors, len(documents))])
        retriever: Any = DenseRetriever(self.index, encoder, store=store)
        if self.by.retriever == "hybrid":
            retriever = HybridRetriever([Bm25Retriever(self.index), retriever])
        queries = [replace(each.query, id=str(n)) for n, each in enumerate(self.examples)]
        rows = documents.rows
        return [
            [rows[hit.document.id] for hit in hits]
            for hits in retriever.retrieve(queries, self.passages)
        ]
