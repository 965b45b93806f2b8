"""Both doors to LangChain: ragkit's parts as parts of langchain-core, and the other way round.

A name tells where a part comes from. `RagkitRetriever`, `RagkitEmbeddings`, `RagkitCompressor` and
`RagkitRunnable` are ragkit's, for LangChain's chains. `LangchainRetriever`,
`LangchainStoreRetriever` and `ChatModelGenerator` are LangChain's, for a pipeline: any store or
model with a LangChain integration serves through them. Between the two, a document's id and text
are LangChain's `id` and `page_content`; title and score are keys of the metadata.
"""

from __future__ import annotations

import re
from collections.abc import AsyncIterator, Callable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextvars import copy_context
from dataclasses import dataclass, replace
from inspect import signature
from itertools import pairwise
from math import isfinite
from queue import SimpleQueue
from threading import Thread
from typing import Any, Protocol, TypeAlias

import numpy as np
from langchain_core.callbacks import CallbackManagerForRetrieverRun, Callbacks
from langchain_core.documents import BaseDocumentCompressor
from langchain_core.documents import Document as LangchainDocument
from langchain_core.embeddings import Embeddings
from langchain_core.language_models import BaseChatModel
from langchain_core.retrievers import BaseRetriever
from langchain_core.runnables import RunnableConfig, RunnableSerializable
from langchain_core.runnables.config import run_in_executor
from langchain_core.runnables.utils import AddableDict
from langchain_core.vectorstores import VectorStore, VectorStoreRetriever
from numpy.typing import NDArray
from pydantic import ConfigDict, Field

from .artefacts import fingerprint
from .errors import DataError, ModelError
from .models.server import as_messages, estimate_tokens
from .pipeline import Pipeline
from .prompts import Prompt
from .stores.documents import matches
from .types import Answer, Document, Hit, Query, Reranker, Retriever, Where

_Configs: TypeAlias = RunnableConfig | list[RunnableConfig] | None
_Question: TypeAlias = str | dict[str, Any]

_LENGTHS = ("max_tokens", "num_predict", "max_output_tokens", "max_new_tokens")


class _Encoder(Protocol):
    def encode_queries(self, texts: Sequence[str]) -> NDArray[np.float32]: ...
    def encode_documents(self, texts: Sequence[str]) -> NDArray[np.float32]: ...


def to_langchain_document(document: Document, score: float | None = None) -> LangchainDocument:
    """Return a document as LangChain's, its title and score among the metadata.

    Where the metadata already has such a key, ours is called `ragkit_title` (`ragkit_score`), and
    so on, so that nothing is overwritten and `from_langchain_document` gives the same document.
    """
    metadata = dict(document.metadata)
    if document.title or _longest(metadata, "title"):
        metadata[_free(metadata, "title")] = document.title
    if score is not None:
        metadata[_free(metadata, "score")] = score
    return LangchainDocument(document.text, id=document.id, metadata=metadata)


def from_langchain_document(document: LangchainDocument) -> Document:
    """Return LangChain's document as ours.

    Its id is the `id`, else the metadata's `id` (which stays there), else a fingerprint of title
    and text, so that equal contents have equal ids.
    """
    metadata = {str(key): value for key, value in document.metadata.items()}
    key = _longest(metadata, "title")
    title = metadata.pop(key) if key and isinstance(metadata[key], str) else ""
    named = metadata.get("id")
    id_ = document.id or (str(named) if isinstance(named, str | int) and named != "" else "")
    text = document.page_content
    return Document(id_ or fingerprint([title, text]), text, title, metadata)


def document_filter(where: Where) -> Callable[[LangchainDocument], bool]:
    """Return a metadata filter as the function that `InMemoryVectorStore` takes as its filter."""
    return lambda document: matches(where, from_langchain_document(document))


def _longest(metadata: Mapping[str, Any], name: str) -> str | None:
    keys = (key for key in metadata if re.fullmatch(f"(ragkit_)*{name}", key))
    return max(keys, key=len, default=None)


def _free(metadata: Mapping[str, Any], name: str) -> str:
    taken = _longest(metadata, name)
    return f"ragkit_{taken}" if taken else name


def _hits(documents: Sequence[LangchainDocument]) -> list[Hit]:
    """Read ranked documents; scores in their metadata are taken out of it if they are believed."""
    plain = [from_langchain_document(document) for document in documents]
    keys = [_longest(document.metadata, "score") for document in plain]
    scores = [
        document.metadata[key] if key else None for document, key in zip(plain, keys, strict=True)
    ]
    if not _falling(scores):
        return _scored(plain)
    without = [
        replace(document, metadata={k: v for k, v in document.metadata.items() if k != key})
        for document, key in zip(plain, keys, strict=True)
    ]
    return _scored(without, scores)


def _scored(documents: Sequence[Document], scores: Sequence[Any] = ()) -> list[Hit]:
    """Score ranked documents: by `scores` where these fall from first to last, else by 1/rank.

    Scores that rise are distances, and 1/rank keeps the promise that higher is better.
    """
    if len(scores) != len(documents) or not _falling(scores):
        scores = [1 / rank for rank in range(1, len(documents) + 1)]
    return [Hit(d, float(score)) for d, score in zip(documents, scores, strict=True)]


def _falling(scores: Sequence[Any]) -> bool:
    numbers = all(
        isinstance(score, int | float | np.number) and not isinstance(score, bool)
        for score in scores
    )
    if not numbers or not all(map(isfinite, scores)):
        return False
    return all(before >= after for before, after in pairwise(scores))


async def _abatch(
    self: Any, inputs: list[Any], config: _Configs = None, **options: Any
) -> list[Any]:
    """Do what `batch` does, off the event loop's thread."""
    return await run_in_executor(None, self.batch, inputs, config, **options)


class RagkitRetriever(BaseRetriever):
    """A ragkit retriever as LangChain's; `invoke(question, k=…, where=…)` is for one call.

    A batch is one call of the retriever, or with `return_exceptions` one a question.
    """

    retriever: Retriever
    k: int = Field(default=10, ge=1)
    where: dict[str, Any] = Field(default_factory=dict)

    def _get_relevant_documents(
        self,
        query: str,
        *,
        run_manager: CallbackManagerForRetrieverRun,
        k: int | None = None,
        where: Where | None = None,
        found: Mapping[str, list[Hit]] | None = None,
    ) -> list[LangchainDocument]:
        hits = (self._find([query], k, where) if found is None else found)[query]
        return [to_langchain_document(hit.document, hit.score) for hit in hits]

    def _find(
        self, texts: Sequence[str], k: int | None = None, where: Where | None = None
    ) -> dict[str, list[Hit]]:
        where = self.where if where is None else where
        queries = [Query(str(place), text, where) for place, text in enumerate(texts)]
        hits = self.retriever.retrieve(queries, self.k if k is None else k)
        return dict(zip(texts, hits, strict=True))

    def batch(
        self,
        inputs: list[str],
        config: _Configs = None,
        *,
        return_exceptions: bool = False,
        **kwargs: Any,
    ) -> list[list[LangchainDocument]]:
        """Retrieve for all questions, then report each to its own callbacks."""
        if not return_exceptions:
            kwargs["found"] = self._find(inputs, kwargs.get("k"), kwargs.get("where"))
        return super().batch(inputs, config, return_exceptions=return_exceptions, **kwargs)

    abatch = _abatch


class RagkitEmbeddings(Embeddings):
    """A ragkit encoder as LangChain's embeddings: queries and documents each with its prompt."""

    def __init__(self, encoder: _Encoder) -> None:
        self.encoder = encoder

    def embed_documents(self, texts: list[str]) -> list[list[float]]:
        """Return the documents' vectors, shape [texts, dimension]."""
        vectors: list[list[float]] = self.encoder.encode_documents(texts).tolist()
        return vectors

    def embed_query(self, text: str) -> list[float]:
        """Return the query's vector, shape [dimension]."""
        vector: list[float] = self.encoder.encode_queries([text])[0].tolist()
        return vector


class RagkitCompressor(BaseDocumentCompressor):
    """A ragkit reranker as LangChain's compressor: the best `k` documents with new scores."""

    model_config = ConfigDict(arbitrary_types_allowed=True)
    reranker: Reranker
    k: int = Field(default=5, ge=1)

    def compress_documents(
        self, documents: Sequence[LangchainDocument], query: str, callbacks: Callbacks = None
    ) -> list[LangchainDocument]:
        """Return the best `k` of the documents, best first."""
        hits = self.reranker.rerank([Query("question", query)], [_hits(documents)], self.k)[0]
        return [to_langchain_document(hit.document, hit.score) for hit in hits]


class RagkitRunnable(RunnableSerializable[_Question, dict[str, Any]]):
    """A ragkit pipeline as LangChain's runnable.

    The input is a question, or a mapping of `question` (or `input`) and perhaps `where`. The
    output maps `question`, `answer`, `context` (the documents that the prompt showed), `citations`
    (positions in `context`) and `abstained`. Chunks of a stream add up to it, so that
    `runnable.pick("answer").stream(question)` yields text. A batch is one call of the pipeline, or
    with `return_exceptions` one a question. An input without a question raises `DataError`.
    """

    model_config = ConfigDict(arbitrary_types_allowed=True)
    pipeline: Pipeline

    def invoke(
        self, input: _Question, config: RunnableConfig | None = None, **kwargs: Any
    ) -> dict[str, Any]:
        """Answer a question."""
        return self._call_with_config(lambda given: self._answer([given])[0], input, config)

    def batch(
        self,
        inputs: list[_Question],
        config: _Configs = None,
        *,
        return_exceptions: bool = False,
        **kwargs: Any,
    ) -> list[dict[str, Any]]:
        """Answer questions."""
        if return_exceptions:
            return super().batch(inputs, config, return_exceptions=True)
        return self._batch_with_config(self._answer, inputs, config)

    abatch = _abatch

    def stream(
        self, input: _Question, config: RunnableConfig | None = None, **kwargs: Any
    ) -> Iterator[dict[str, Any]]:
        """Yield the answer's pieces as the reader writes them, then the rest of the output."""
        yield from self._transform_stream_with_config(iter([input]), self._chunks, config)

    async def astream(
        self, input: _Question, config: RunnableConfig | None = None, **kwargs: Any
    ) -> AsyncIterator[dict[str, Any]]:
        """Do what `stream` does, off the event loop's thread."""
        chunks = self.stream(input, config)
        while (chunk := await run_in_executor(None, next, chunks, None)) is not None:
            yield chunk

    def _answer(self, inputs: list[_Question]) -> list[Any]:
        queries = [_query(place, given) for place, given in enumerate(inputs)]
        return [_output(answer) for answer in self.pipeline.answer(queries)]

    def _chunks(self, inputs: Iterator[_Question]) -> Iterator[dict[str, Any]]:
        query = _query(0, next(inputs))
        write = getattr(self.pipeline.reader, "stream", None)
        if write is None:
            yield AddableDict(_output(self.pipeline.answer([query])[0]))
            return
        hits = self.pipeline.retrieve([query])[0][: self.pipeline.keep]
        whole = sent = ""
        for piece in _pieces(lambda put: write(query, hits, put)):
            if isinstance(piece, Answer):
                output = _output(piece)
                if sent:
                    del output["answer"]
                yield AddableDict(output)
            else:
                whole += piece
                text, sent = whole.strip().removeprefix(sent), whole.strip()
                if text:
                    yield AddableDict(answer=text)


def _query(place: int, given: _Question) -> Query:
    fields: dict[str, Any] = {"question": given} if isinstance(given, str) else given
    question = fields.get("question", fields.get("input"))
    if not isinstance(question, str):
        raise DataError(f"expected a question or a mapping with `question`, found {given!r:.80}")
    return Query(str(place), question, fields.get("where") or {})


def _output(answer: Answer) -> dict[str, Any]:
    return {
        "question": answer.query.text,
        "answer": answer.text,
        "context": [to_langchain_document(hit.document, hit.score) for hit in answer.hits],
        "citations": list(answer.citations),
        "abstained": answer.abstained,
    }


def _pieces(write: Callable[[Callable[[str], None]], Answer]) -> Iterator[str | Answer]:
    """Turn a writer, run in a thread of its own, into an iterator that ends with its answer."""
    queue: SimpleQueue[str | Answer | Exception] = SimpleQueue()

    def work() -> None:
        try:
            queue.put(write(queue.put))
        except Exception as error:  # raised by the reading thread
            queue.put(error)

    Thread(target=copy_context().run, args=(work,), daemon=True).start()
    while not isinstance(piece := queue.get(), Answer):
        if isinstance(piece, Exception):
            raise piece
        yield piece
    yield piece


@dataclass(frozen=True, slots=True)
class LangchainRetriever:
    """A LangChain retriever as ragkit's.

    It is asked for `k` documents if it can be (`VectorStoreRetriever` and those whose
    `_get_relevant_documents` takes `k`); another one returns as many as it was made for. It knows
    no `where`: what it returned is filtered, which may leave fewer than `k`. Scores are the
    metadata's `score` where it falls from first to last, else 1/rank.
    """

    retriever: BaseRetriever
    concurrency: int = 8

    def retrieve(self, queries: Sequence[Query], k: int) -> list[list[Hit]]:
        """Return the best `k` hits of each query."""
        asked = signature(self.retriever._get_relevant_documents).parameters
        takes_k = "k" in asked or isinstance(self.retriever, VectorStoreRetriever)
        options: dict[str, Any] = {"k": k} if takes_k else {}
        texts = [query.text for query in queries]
        found = self.retriever.batch(texts, {"max_concurrency": self.concurrency}, **options)
        return [
            [hit for hit in _hits(documents) if matches(query.where, hit.document)][:k]
            for query, documents in zip(queries, found, strict=True)
        ]


@dataclass(frozen=True, slots=True)
class LangchainStoreRetriever:
    """A LangChain vector store (Qdrant, pgvector, OpenSearch, Milvus…) as ragkit's retriever.

    Scores are the store's relevance scores where it has them and they fall from first to last,
    else 1/rank: `similarity_search_with_score` gives distances in some stores. A query's `where`
    goes to the store through `to_filter` as its keyword `filter`, and hits that do not match are
    left out. As it is, Chroma, FAISS, Pinecone and PGVector take a mapping of fields to values;
    `document_filter` serves `InMemoryVectorStore`; other stores and operators need a function.
    """

    store: VectorStore
    to_filter: Callable[[Where], Any] = dict
    concurrency: int = 8

    def retrieve(self, queries: Sequence[Query], k: int) -> list[list[Hit]]:
        """Return the best `k` hits of each query."""
        with ThreadPoolExecutor(self.concurrency) as pool:
            return list(pool.map(lambda query: self._search(query, k), queries))

    def _search(self, query: Query, k: int) -> list[Hit]:
        options = {"filter": self.to_filter(query.where)} if query.where else {}
        store, scores = self.store, []
        try:
            pairs = store.similarity_search_with_relevance_scores(query.text, k=k, **options)
            documents, scores = [pair[0] for pair in pairs], [pair[1] for pair in pairs]
        except (NotImplementedError, ValueError):  # the store has no relevance scores
            documents = store.similarity_search(query.text, k=k, **options)
        hits = _scored([from_langchain_document(document) for document in documents], scores)
        return [hit for hit in hits if matches(query.where, hit.document)][:k]


class ChatModelGenerator:
    """A LangChain chat model as the generator of a `GeneratorReader`.

    Length, temperature and seed are set on a copy of the model, where it has such a field and was
    not given a value for it. Tokens are estimated from bytes. Control tokens in passages and
    questions are made harmless before they are sent.

    Args:
        model: the chat model.
        window: the tokens that it reads and writes together; by its profile, else 8192, if None.
        concurrency: requests in flight.
    """

    def __init__(
        self, model: BaseChatModel, *, window: int | None = None, concurrency: int = 8
    ) -> None:
        self.model = model
        self.name: str = getattr(model, "model_name", "") or getattr(model, "model", "")
        self.name = str(self.name or model.get_name())
        self.window: int = window or (model.profile or {}).get("max_input_tokens") or 8192
        self._concurrency = concurrency

    def count(self, text: str) -> int:
        """Estimate how many tokens a text takes."""
        return estimate_tokens(text)

    def generate(
        self,
        prompts: Sequence[Prompt],
        *,
        max_new_tokens: int = 64,
        temperature: float = 0.0,
        seed: int = 0,
        progress: Callable[[int], None] = lambda done: None,
    ) -> list[str]:
        """Answer prompts, several requests at a time, in the prompts' order.

        Raises:
            ModelError: the model fails.
        """
        texts = [""] * len(prompts)
        model = self._set(max_new_tokens, temperature, seed)
        inputs: list[Any] = [as_messages(prompt) for prompt in prompts]
        replies = model.batch_as_completed(inputs, {"max_concurrency": self._concurrency})
        try:
            for done, (place, reply) in enumerate(replies, start=1):
                texts[place] = reply.text.strip()
                progress(done)
        except Exception as error:
            raise ModelError(f"the chat model {self.name!r} failed: {error}") from error
        return texts

    def stream(
        self, prompt: Prompt, *, max_new_tokens: int = 64, temperature: float = 0.0, seed: int = 0
    ) -> Iterator[str]:
        """Yield an answer's text piece by piece.

        Raises:
            ModelError: the model fails.
        """
        model = self._set(max_new_tokens, temperature, seed)
        try:
            for chunk in model.stream(as_messages(prompt)):
                if text := str(chunk.text):
                    yield text
        except Exception as error:
            raise ModelError(f"the chat model {self.name!r} failed: {error}") from error

    def _set(self, max_new_tokens: int, temperature: float, seed: int) -> BaseChatModel:
        wanted = dict.fromkeys(_LENGTHS, max_new_tokens) | {
            "temperature": temperature,
            "seed": seed,
        }
        fields = type(self.model).model_fields.keys() - self.model.model_fields_set
        update = {name: value for name, value in wanted.items() if name in fields}
        return self.model.model_copy(update=update) if update else self.model
