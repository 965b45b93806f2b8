"""The pipeline: retrieve, rerank, read."""

from __future__ import annotations

from collections.abc import Sequence

from .errors import SettingsError
from .types import Answer, Hit, Query, Reader, Reranker, Retriever


class Pipeline:
    """Retriever, reranker and reader, one after the other.

    Args:
        retriever: finds documents.
        reranker: re-orders what was found; None leaves it as it is.
        reader: answers; None for a pipeline that only retrieves.
        retrieve: how many hits are retrieved, and reranked, a query.
        keep: how many hits the reader is given.

    Raises:
        SettingsError: a number below 1 (`keep` may be 0: the reader then answers without passages).
    """

    def __init__(
        self,
        retriever: Retriever,
        reranker: Reranker | None = None,
        reader: Reader | None = None,
        *,
        retrieve: int = 100,
        keep: int = 5,
    ) -> None:
        if retrieve < 1:
            raise SettingsError(f"retrieve must be at least 1, not {retrieve}")
        if keep < 0:
            raise SettingsError(f"keep must be at least 0, not {keep}")
        self.retriever = retriever
        self.reranker = reranker
        self.reader = reader
        self.depth = retrieve
        self.keep = keep

    def retrieve(self, queries: Sequence[Query]) -> list[list[Hit]]:
        """Return each query's hits, reranked if there is a reranker, best first."""
        hits = self.retriever.retrieve(queries, self.depth)
        return self.reranker.rerank(queries, hits, self.depth) if self.reranker else hits

    def read(self, queries: Sequence[Query], hits: Sequence[Sequence[Hit]]) -> list[Answer]:
        """Answer each query from the first `keep` of its hits.

        Raises:
            SettingsError: the pipeline has no reader.
        """
        if self.reader is None:
            raise SettingsError("this pipeline has no reader: it retrieves, and does not answer")
        return self.reader.read(queries, [found[: self.keep] for found in hits])

    def answer(self, queries: Sequence[Query]) -> list[Answer]:
        """Answer queries: retrieve, rerank, read.

        Raises:
            SettingsError: the pipeline has no reader.
        """
        return self.read(queries, self.retrieve(queries))

    def ask(self, question: str) -> Answer:
        """Answer one question."""
        return self.answer([Query("question", question)])[0]
