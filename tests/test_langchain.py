"""Both doors to LangChain, by value, with its own store, fakes and conformance tests."""

from __future__ import annotations

import asyncio
import warnings
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from operator import itemgetter
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from langchain_core.callbacks import BaseCallbackHandler, CallbackManagerForRetrieverRun
from langchain_core.documents import Document as LangchainDocument
from langchain_core.embeddings import DeterministicFakeEmbedding
from langchain_core.language_models import BaseChatModel, FakeListChatModel, GenericFakeChatModel
from langchain_core.messages import AIMessage, BaseMessage, HumanMessage, SystemMessage
from langchain_core.output_parsers import StrOutputParser
from langchain_core.outputs import ChatGeneration, ChatResult
from langchain_core.prompts import ChatPromptTemplate
from langchain_core.retrievers import BaseRetriever
from langchain_core.runnables import RunnableLambda, RunnablePassthrough
from langchain_core.vectorstores import InMemoryVectorStore
from langchain_tests.integration_tests import EmbeddingsIntegrationTests, RetrieversIntegrationTests
from langchain_tests.unit_tests import EmbeddingsUnitTests
from numpy.typing import NDArray

from ragkit.errors import DataError, ModelError
from ragkit.langchain import (
    ChatModelGenerator,
    LangchainRetriever,
    LangchainStoreRetriever,
    RagkitCompressor,
    RagkitEmbeddings,
    RagkitRetriever,
    RagkitRunnable,
    document_filter,
    from_langchain_document,
    to_langchain_document,
)
from ragkit.pipeline import Pipeline
from ragkit.prompts import Message, Part, Prompt
from ragkit.readers import GeneratorReader
from ragkit.stores.documents import matches
from ragkit.types import Answer, Document, Hit, Query, Reader, Reranker, Retriever

METALS = [
    Document("ga", "Gallium melts in the hand.", "Gallium", {"year": 1875, "group": 13}),
    Document("hg", "Mercury is liquid at room temperature.", "Mercury", {"group": 12}),
    Document("fe", "Iron rusts in damp air.", "", {"group": 8, "year": -1200}),
    Document("au", "Gold does not rust in the hand.", "Gold", {}),
]
LANGCHAIN_METALS = [to_langchain_document(document) for document in METALS]


class WordEncoder:
    """Counts hashed words, so that texts that share words are near; queries are scaled."""

    def _encode(self, texts: Sequence[str]) -> NDArray[np.float32]:
        vectors = np.zeros((len(texts), 64), np.float32)
        for row, text in enumerate(texts):
            for word in text.lower().rstrip(".?").split():
                vectors[row, sum(word.encode()) % 64] += 1
        return vectors

    def encode_queries(self, texts: Sequence[str]) -> NDArray[np.float32]:
        return 2 * self._encode(texts)

    def encode_documents(self, texts: Sequence[str]) -> NDArray[np.float32]:
        return self._encode(texts)


@dataclass
class WordRetriever:
    """Scores by shared words; remembers its calls; fails on the question `fail`."""

    calls: list[tuple[list[str], int]] = field(default_factory=list)

    def retrieve(self, queries: Sequence[Query], k: int) -> list[list[Hit]]:
        self.calls.append(([query.text for query in queries], k))
        return [self._one(query)[:k] for query in queries]

    def _one(self, query: Query) -> list[Hit]:
        if query.text == "fail":
            raise DataError("told to fail")
        words = set(query.text.lower().split())
        hits = [
            Hit(document, float(len(words & set(document.contents.lower().rstrip(".").split()))))
            for document in METALS
            if matches(query.where, document)
        ]
        return sorted(hits, key=lambda hit: -hit.score)


class LengthReranker:
    """Prefers short texts."""

    def rerank(
        self, queries: Sequence[Query], hits: Sequence[Sequence[Hit]], k: int
    ) -> list[list[Hit]]:
        scored = [[Hit(hit.document, -float(len(hit.document.text))) for hit in h] for h in hits]
        return [sorted(found, key=lambda hit: -hit.score)[:k] for found in scored]


class TitleReader:
    """Answers with the first hit's title, and does not stream."""

    def read(self, queries: Sequence[Query], hits: Sequence[Sequence[Hit]]) -> list[Answer]:
        return [
            Answer(query, found[0].document.title, tuple(found), "prompt", (0,))
            for query, found in zip(queries, hits, strict=True)
        ]


class PieceReader(TitleReader):
    """Streams fixed pieces, with blanks where generators leave them."""

    pieces = ("", " Gal", "lium ", "[1]", " \n")

    def stream(self, query: Query, hits: Sequence[Hit], write: Callable[[str], object]) -> Answer:
        if query.text == "fail":
            raise DataError("told to fail")
        for piece in self.pieces:
            write(piece)
        return Answer(query, "".join(self.pieces).strip(), tuple(hits), "prompt", (0,))


class Recorder(BaseCallbackHandler):
    def __init__(self) -> None:
        self.seen: list[tuple[str, Any]] = []

    def on_retriever_start(self, serialized: Any, query: str, **kwargs: Any) -> None:
        self.seen.append(("start", query))

    def on_retriever_end(self, documents: Any, **kwargs: Any) -> None:
        self.seen.append(("end", [document.id for document in documents]))

    def on_chain_end(self, outputs: Any, **kwargs: Any) -> None:
        self.seen.append(("chain", outputs))


# ---- Documents -----------------------------------------------------------------------------------

keys = st.sampled_from(["title", "ragkit_title", "score", "ragkit_score", "ragkit_ragkit_title"])
values = st.one_of(st.none(), st.booleans(), st.integers(), st.floats(0, 9), st.text(max_size=4))
text = st.text(st.characters(exclude_categories=["Cs"]), min_size=1, max_size=8)
documents = st.builds(
    Document,
    id=text,
    text=text,
    title=st.one_of(st.just(""), text),
    metadata=st.dictionaries(st.one_of(keys, text), values, max_size=5),
)


@given(documents)
@settings(max_examples=300, deadline=None)
def test_a_document_comes_back_as_it_went(document: Document) -> None:
    assert from_langchain_document(to_langchain_document(document)) == document


@given(st.lists(st.tuples(documents, st.floats(-1e6, 1e6)), max_size=5))
@settings(max_examples=200, deadline=None)
def test_ranked_hits_come_back_as_they_went(pairs: list[tuple[Document, float]]) -> None:
    hits = [Hit(*pair) for pair in sorted(pairs, key=lambda pair: -pair[1])]
    there = RagkitRetriever(retriever=Fixed(hits), k=9)
    assert LangchainRetriever(there).retrieve([Query("q", "x")], 9) == [hits]


@dataclass
class Fixed:
    hits: list[Hit]

    def retrieve(self, queries: Sequence[Query], k: int) -> list[list[Hit]]:
        return [self.hits[:k] for _ in queries]


def test_title_and_score_stand_in_the_metadata_and_overwrite_nothing() -> None:
    plain = to_langchain_document(METALS[0], 2.5)
    assert (plain.id, plain.page_content) == ("ga", "Gallium melts in the hand.")
    assert plain.metadata == {"year": 1875, "group": 13, "title": "Gallium", "score": 2.5}
    taken = to_langchain_document(Document("x", "t", "Own", {"title": "sir", "score": 7}), 0.5)
    assert taken.metadata == {
        "title": "sir",
        "score": 7,
        "ragkit_title": "Own",
        "ragkit_score": 0.5,
    }
    assert METALS[0].metadata == {"year": 1875, "group": 13}


def test_ids_come_from_the_document_then_the_metadata_then_the_content() -> None:
    def id_of(own: str | None = None, text: str = "same", **metadata: Any) -> str:
        return from_langchain_document(LangchainDocument(text, id=own, metadata=metadata)).id

    assert id_of("a", id="b") == "a"
    assert id_of(id="b") == "b"
    assert id_of(id=7) == "7"
    assert id_of() == id_of(page=3) == id_of(id="") == id_of(id=None)
    assert id_of() != id_of(text="other") != id_of(title="a title")
    kept = from_langchain_document(LangchainDocument("t", metadata={"id": "b", "title": 3}))
    assert kept == Document("b", "t", "", {"id": "b", "title": 3})


# ---- ragkit's parts, for LangChain ---------------------------------------------------------------


@pytest.mark.asyncio
@pytest.mark.filterwarnings("ignore:.*is marked with '@pytest.mark.asyncio'.*")
class TestRetrieverConformance(RetrieversIntegrationTests):
    @property
    def retriever_constructor(self) -> type[RagkitRetriever]:
        return RagkitRetriever

    @property
    def retriever_constructor_params(self) -> dict[str, Any]:
        return {"retriever": WordRetriever()}

    @property
    def retriever_query_example(self) -> str:
        return "which metal melts in the hand"


class TestEmbeddingsConformance(EmbeddingsUnitTests):
    @property
    def embeddings_class(self) -> type[RagkitEmbeddings]:
        return RagkitEmbeddings

    @property
    def embedding_model_params(self) -> dict[str, Any]:
        return {"encoder": WordEncoder()}


@pytest.mark.asyncio
@pytest.mark.filterwarnings("ignore:.*is marked with '@pytest.mark.asyncio'.*")
class TestEmbeddingsConformanceOfValues(EmbeddingsIntegrationTests):
    @property
    def embeddings_class(self) -> type[RagkitEmbeddings]:
        return RagkitEmbeddings

    @property
    def embedding_model_params(self) -> dict[str, Any]:
        return {"encoder": WordEncoder()}


def test_retriever_takes_k_and_where_made_or_called() -> None:
    retriever = RagkitRetriever(retriever=WordRetriever(), k=2)
    assert [d.id for d in retriever.invoke("melts in the hand")] == ["ga", "au"]
    assert [d.metadata["score"] for d in retriever.invoke("melts in the hand")] == [4.0, 3.0]
    assert [d.id for d in retriever.invoke("in the hand", k=1, where={"group": 8})] == ["fe"]
    made = RagkitRetriever(retriever=WordRetriever(), where={"year": {"gte": 0}})
    assert [d.id for d in made.invoke("in the hand")] == ["ga"]
    assert [d.id for d in made.invoke("gold", where={}, k=1)] == ["au"]
    with pytest.raises(ValueError, match="k"):
        RagkitRetriever(retriever=WordRetriever(), k=0)
    with pytest.raises(ValueError, match="retriever"):
        RagkitRetriever(retriever="not a retriever")  # type: ignore[arg-type]


def test_a_batch_of_questions_is_one_call_told_to_callbacks_one_by_one() -> None:
    ours, recorder = WordRetriever(), Recorder()
    found = RagkitRetriever(retriever=ours, k=1).batch(
        ["gold", "iron", "gold"], {"callbacks": [recorder], "max_concurrency": 1}, k=2
    )
    assert ours.calls == [(["gold", "iron", "gold"], 2)]
    assert [[d.id for d in documents] for documents in found] == [
        ["au", "ga"],
        ["fe", "ga"],
        ["au", "ga"],
    ]
    assert recorder.seen[:4] == [
        ("start", "gold"),
        ("end", ["au", "ga"]),
        ("start", "iron"),
        ("end", ["fe", "ga"]),
    ]
    assert RagkitRetriever(retriever=ours).batch([]) == []


def test_async_batches_are_one_call_too() -> None:
    ours = WordRetriever()
    retriever = RagkitRetriever(retriever=ours, k=1)
    assert asyncio.run(retriever.abatch(["gold", "iron"])) == retriever.batch(["gold", "iron"])
    assert ours.calls == [(["gold", "iron"], 1)] * 2
    assert asyncio.run(retriever.ainvoke("gold")) == retriever.invoke("gold")


def test_with_return_exceptions_each_question_fails_alone() -> None:
    retriever = RagkitRetriever(retriever=WordRetriever(), k=1)
    with pytest.raises(DataError):
        retriever.batch(["gold", "fail"])
    for found in (
        retriever.batch(["gold", "fail"], return_exceptions=True),
        asyncio.run(retriever.abatch(["gold", "fail"], return_exceptions=True)),
    ):
        good, bad = found
        assert [d.id for d in good] == ["au"]
        assert isinstance(bad, DataError)


def test_embeddings_are_the_encoders_vectors_in_a_langchain_store() -> None:
    encoder, embeddings = WordEncoder(), RagkitEmbeddings(WordEncoder())
    texts = [document.text for document in METALS]
    assert embeddings.embed_documents(texts) == encoder.encode_documents(texts).tolist()
    assert embeddings.embed_query("gold") == encoder.encode_queries(["gold"])[0].tolist()
    assert embeddings.embed_documents([]) == []
    store = InMemoryVectorStore(embeddings)
    store.add_documents(LANGCHAIN_METALS)
    assert store.similarity_search("iron rusts", k=1)[0].id == "fe"


def test_a_compressor_reranks_and_replaces_the_retrievers_scores() -> None:
    found = RagkitRetriever(retriever=WordRetriever(), k=4).invoke("gallium in the hand")
    compressor = RagkitCompressor(reranker=LengthReranker(), k=3)
    kept = compressor.compress_documents(found, "gallium in the hand")
    assert [(d.id, d.metadata.get("score")) for d in kept] == [
        ("fe", -23.0),
        ("ga", -26.0),
        ("au", -31.0),
    ]
    assert [d.metadata.get("title") for d in kept] == [None, "Gallium", "Gold"]
    assert asyncio.run(compressor.acompress_documents(found, "x")) == kept
    assert compressor.compress_documents([], "x") == []
    foreign = [LangchainDocument("a"), LangchainDocument("bb", metadata={"page": 2})]
    assert [d.metadata for d in compressor.compress_documents(foreign, "x")] == [
        {"score": -1.0},
        {"page": 2, "score": -2.0},
    ]


def test_a_retriever_pipes_into_a_prompt_and_a_model() -> None:
    retriever = RagkitRetriever(retriever=WordRetriever(), k=1)
    model = FakeListChatModel(responses=["gallium"])
    chain = (
        {
            "context": retriever | (lambda found: found[0].page_content),
            "question": RunnablePassthrough(),
        }
        | ChatPromptTemplate.from_template("{context} -> {question}")
        | RunnableLambda(lambda value: (value.to_string(), model.invoke(value).text))
    )
    assert chain.invoke("which melts") == (
        "Human: Gallium melts in the hand. -> which melts",
        "gallium",
    )


# ---- The pipeline as a runnable ------------------------------------------------------------------


def runnable_with(reader: Reader) -> tuple[RagkitRunnable, WordRetriever]:
    retriever = WordRetriever()
    return RagkitRunnable(pipeline=Pipeline(retriever, None, reader, retrieve=3, keep=1)), retriever


def test_a_pipeline_answers_questions_and_mappings() -> None:
    runnable, _ = runnable_with(TitleReader())
    output = {
        "question": "which melts",
        "answer": "Gallium",
        "context": [to_langchain_document(METALS[0], 1.0)],
        "citations": [0],
        "abstained": False,
    }
    assert runnable.invoke("which melts") == output
    assert runnable.invoke({"question": "which melts"}) == output
    assert runnable.invoke({"input": "which melts", "chat_history": []}) == output
    where = {"question": "which melts", "where": {"group": 12}}
    assert runnable.invoke(where)["answer"] == "Mercury"
    assert asyncio.run(runnable.ainvoke("which melts")) == output
    with pytest.raises(DataError, match="question"):
        runnable.invoke({"query": "which melts"})


def test_a_batch_of_a_pipeline_is_one_call() -> None:
    runnable, retriever = runnable_with(TitleReader())
    recorder = Recorder()
    answers = runnable.batch(["gold", {"question": "gallium"}], {"callbacks": [recorder]})
    assert retriever.calls == [(["gold", "gallium"], 3)]
    assert [answer["answer"] for answer in answers] == ["Gold", "Gallium"]
    assert recorder.seen == [("chain", answers[0]), ("chain", answers[1])]
    assert asyncio.run(runnable.abatch(["gold", "gallium"])) == answers
    assert retriever.calls == [(["gold", "gallium"], 3)] * 2
    assert runnable.batch([]) == []
    outputs: list[Any] = runnable.batch(["gold", "fail"], return_exceptions=True)
    good, bad = outputs
    assert good == answers[0]
    assert isinstance(bad, DataError)
    with pytest.raises(DataError):
        runnable.batch(["gold", "fail"])


def test_a_pipeline_chains() -> None:
    runnable, retriever = runnable_with(TitleReader())
    chain = RunnableLambda(str.lower) | runnable | itemgetter("answer")
    assert chain.batch(["GOLD", "Gallium"]) == ["Gold", "Gallium"]
    assert retriever.calls == [(["gold", "gallium"], 3)]


def test_chunks_of_a_stream_add_up_to_the_answer() -> None:
    runnable, _ = runnable_with(PieceReader())
    chunks = list(runnable.stream("gallium"))
    assert [chunk["answer"] for chunk in chunks if "answer" in chunk] == ["Gal", "lium", " [1]"]
    whole: Any = chunks[0]
    for chunk in chunks[1:]:
        whole = whole + chunk
    assert whole == {
        "question": "gallium",
        "answer": "Gallium [1]",
        "context": [to_langchain_document(METALS[0], 1.0)],
        "citations": [0],
        "abstained": False,
    }
    assert list(runnable.pick("answer").stream("gallium")) == ["Gal", "lium", " [1]"]

    async def gather() -> list[Any]:
        return [chunk async for chunk in runnable.astream("gallium")]

    assert asyncio.run(gather()) == chunks


def test_a_stream_tells_its_callbacks_the_whole_and_raises_the_readers_error() -> None:
    recorder = Recorder()
    runnable, _ = runnable_with(PieceReader())
    list(runnable.stream("gallium", {"callbacks": [recorder]}))
    assert [outputs["answer"] for _, outputs in recorder.seen] == ["Gallium [1]"]
    failing = RagkitRunnable(pipeline=Pipeline(Fixed([]), None, PieceReader()))
    with pytest.raises(DataError, match="told to fail"):
        list(failing.stream("fail"))


def test_a_reader_that_does_not_stream_gives_one_chunk() -> None:
    runnable, _ = runnable_with(TitleReader())
    assert list(runnable.stream("gold")) == [runnable.invoke("gold")]


# ---- LangChain's parts, for ragkit ---------------------------------------------------------------


class Scripted(BaseRetriever):
    """Returns given documents, whatever is asked."""

    documents: list[LangchainDocument]

    def _get_relevant_documents(
        self, query: str, *, run_manager: CallbackManagerForRetrieverRun
    ) -> list[LangchainDocument]:
        return self.documents


def scripted(*scores: Any) -> list[tuple[str, float, dict[str, Any]]]:
    found = [
        LangchainDocument("t", id=str(n), metadata={} if score is None else {"score": score})
        for n, score in enumerate(scores)
    ]
    hits = LangchainRetriever(Scripted(documents=found)).retrieve([Query("q", "x")], 3)[0]
    return [(hit.document.id, hit.score, dict(hit.document.metadata)) for hit in hits]


def test_scores_of_a_langchain_retriever_are_believed_only_where_they_fall() -> None:
    assert scripted(0.9, 0.5, 0.1, 0.0) == [("0", 0.9, {}), ("1", 0.5, {}), ("2", 0.1, {})]
    assert scripted(None, None) == [("0", 1.0, {}), ("1", 0.5, {})]
    distances = scripted(0.1, 0.5)
    assert distances == [("0", 1.0, {"score": 0.1}), ("1", 0.5, {"score": 0.5})]
    assert [score for _, score, _ in scripted(0.9, None, 0.1)] == [1.0, 0.5, 1 / 3]
    assert [score for _, score, _ in scripted("high", "low")] == [1.0, 0.5]
    assert [score for _, score, _ in scripted(True, False)] == [1.0, 0.5]
    assert [score for _, score, _ in scripted(float("nan"))] == [1.0]
    assert [score for _, score, _ in scripted(np.float32(0.5), 0)] == [0.5, 0.0]


def test_a_langchain_retriever_is_asked_in_one_batch_and_filtered_by_where() -> None:
    retriever = LangchainRetriever(Scripted(documents=LANGCHAIN_METALS), concurrency=2)
    queries = [Query("1", "x"), Query("2", "y", {"year": {"lt": 0}}), Query("3", "z")]
    found = retriever.retrieve(queries, 2)
    assert isinstance(retriever, Retriever)
    assert found == [
        [Hit(METALS[0], 1.0), Hit(METALS[1], 0.5)],
        [Hit(METALS[2], 1 / 3)],
        [Hit(METALS[0], 1.0), Hit(METALS[1], 0.5)],
    ]
    assert retriever.retrieve([], 2) == []
    ours = WordRetriever()
    LangchainRetriever(RagkitRetriever(retriever=ours, k=1)).retrieve(queries, 4)
    assert ours.calls == [(["x", "y", "z"], 4)]


def store_of(embeddings: Any = None) -> InMemoryVectorStore:
    store = InMemoryVectorStore(embeddings or RagkitEmbeddings(WordEncoder()))
    store.add_documents(LANGCHAIN_METALS)
    return store


def test_k_reaches_the_store_behind_a_langchain_retriever() -> None:
    retriever = LangchainRetriever(store_of().as_retriever(search_kwargs={"k": 1}))
    assert {hit.document.id for hit in retriever.retrieve([Query("q", "gold")], 4)[0]} == {
        "ga",
        "hg",
        "fe",
        "au",
    }


def cosines(question: str) -> dict[str, float]:
    encoder = WordEncoder()
    rows = encoder.encode_documents([document.text for document in METALS])
    query = encoder.encode_queries([question])[0]
    scores = rows @ query / np.linalg.norm(rows, axis=1) / np.linalg.norm(query)
    return {d.id: float(score) for d, score in zip(METALS, scores, strict=True)}


def test_a_store_without_relevance_scores_gives_one_over_rank_in_its_order() -> None:
    questions = ["which metal melts in the hand", "iron rusts in damp air"]
    queries = [Query(str(n), question) for n, question in enumerate(questions)]
    found = LangchainStoreRetriever(store_of()).retrieve(queries, 3)
    for question, hits in zip(questions, found, strict=True):
        scores = cosines(question)
        order = sorted(scores, key=lambda id_: -scores[id_])[:3]
        assert [hit.document.id for hit in hits] == order
        assert [hit.score for hit in hits] == [1.0, 0.5, 1 / 3]
        assert all(hit.document in METALS for hit in hits)


class Relevance(InMemoryVectorStore):
    """A store of cosine distances that says how relevant they are."""

    def similarity_search_with_score(
        self, query: str, k: int = 4, **kwargs: Any
    ) -> list[tuple[LangchainDocument, float]]:
        pairs = super().similarity_search_with_score(query, k, **kwargs)
        return [(document, 1 - score) for document, score in pairs]

    def _select_relevance_score_fn(self) -> Callable[[float], float]:
        return lambda distance: 1 - distance


class Inverted(Relevance):
    """Its relevance falls where likeness rises, as FAISS's does for inner products."""

    def _select_relevance_score_fn(self) -> Callable[[float], float]:
        return lambda distance: distance


class Unknown(Relevance):
    """Refuses its metric, as Chroma and FAISS do for those they do not know."""

    def _select_relevance_score_fn(self) -> Callable[[float], float]:
        raise ValueError("no relevance function for this metric")


def test_relevance_scores_are_used_where_they_are_right() -> None:
    question = "which metal melts in the hand"
    for kind in (Relevance, Inverted, Unknown):
        store = kind(RagkitEmbeddings(WordEncoder()))
        store.add_documents(LANGCHAIN_METALS)
        [hits] = LangchainStoreRetriever(store).retrieve([Query("q", question)], 3)
        scores = cosines(question)
        order = sorted(scores, key=lambda id_: -scores[id_])[:3]
        assert [hit.document.id for hit in hits] == order
        wanted = [scores[id_] for id_ in order] if kind is Relevance else [1.0, 0.5, 1 / 3]
        assert [hit.score for hit in hits] == pytest.approx(wanted, abs=1e-6)


def test_where_goes_to_the_store_as_its_filter() -> None:
    store = store_of(DeterministicFakeEmbedding(size=8))
    retriever = LangchainStoreRetriever(store, to_filter=document_filter)
    queries = [Query("1", "gold", {"group": [8, 12]}), Query("2", "gold", {"title": "Gold"})]
    found = retriever.retrieve(queries, 4)
    assert [{hit.document.id for hit in hits} for hits in found] == [{"fe", "hg"}, {"au"}]

    class Deaf(InMemoryVectorStore):
        filters: list[Any] = []  # noqa: RUF012

        def similarity_search(
            self, query: str, k: int = 4, **kwargs: Any
        ) -> list[LangchainDocument]:
            self.filters.append(kwargs.get("filter"))
            return super().similarity_search(query, k)

    deaf = Deaf(RagkitEmbeddings(WordEncoder()))
    deaf.add_documents(LANGCHAIN_METALS)
    [hits] = LangchainStoreRetriever(deaf).retrieve([Query("1", "gold", {"group": 8})], 4)
    assert [hit.document.id for hit in hits] == ["fe"]
    assert Deaf.filters == [{"group": 8}]


# ---- The chat model as a generator ---------------------------------------------------------------


class EchoModel(BaseChatModel):
    """Answers with what it was asked; remembers messages and settings; fails on `fail`."""

    seen: Any  # a list that callers keep; pydantic copies those it knows to be lists
    max_tokens: int | None = None
    temperature: float | None = 0.7

    def _generate(
        self,
        messages: list[BaseMessage],
        stop: list[str] | None = None,
        run_manager: Any = None,
        **kwargs: Any,
    ) -> ChatResult:
        self.seen.append((messages, self.max_tokens, self.temperature))
        if "fail" in messages[-1].text:
            raise ConnectionError("no route")
        reply = AIMessage(f" {messages[-1].text} ")
        return ChatResult(generations=[ChatGeneration(message=reply)])

    @property
    def _llm_type(self) -> str:
        return "echo"


def prompt_of(text: str, system: str = "") -> Prompt:
    messages = [Message("user", (Part(text, "context"),))]
    if system:
        messages.insert(0, Message("system", (Part(system, "instruction"),)))
    return Prompt(tuple(messages))


def test_a_chat_model_generates_in_the_prompts_order_and_tells_its_progress() -> None:
    done: list[int] = []
    generator = ChatModelGenerator(EchoModel(seen=[]), concurrency=4)
    prompts = [prompt_of(str(n)) for n in range(20)]
    texts = generator.generate(prompts, max_new_tokens=9, progress=done.append)
    assert texts == [str(n) for n in range(20)]
    assert done == list(range(1, 21))
    assert generator.generate([]) == []


def test_data_reaches_a_chat_model_as_plain_text() -> None:
    seen: list[Any] = []
    generator = ChatModelGenerator(EchoModel(seen=seen))
    generator.generate([prompt_of("a<|im_end|>b", system="<|keep|>")])
    [(messages, _, _)] = seen
    assert messages == [SystemMessage("<|keep|>"), HumanMessage("a<\u200b|im_end|>b")]


def test_settings_reach_the_fields_that_a_model_was_not_given() -> None:
    seen: list[Any] = []
    for model in (EchoModel(seen=seen), EchoModel(seen=seen, temperature=0.3, max_tokens=5)):
        ChatModelGenerator(model).generate([prompt_of("x")], max_new_tokens=9, temperature=0.0)
        list(ChatModelGenerator(model).stream(prompt_of("x"), max_new_tokens=8))
    assert [settings for _, *settings in seen] == [[9, 0.0], [8, 0.0], [5, 0.3], [5, 0.3]]


def test_a_chat_model_streams_and_its_failures_are_model_errors() -> None:
    model = GenericFakeChatModel(messages=iter([AIMessage("Gallium melts")]))
    assert list(ChatModelGenerator(model).stream(prompt_of("x"))) == ["Gallium", " ", "melts"]
    generator = ChatModelGenerator(EchoModel(seen=[]))
    with pytest.raises(ModelError, match="no route"):
        generator.generate([prompt_of("x"), prompt_of("fail")])
    with pytest.raises(ModelError, match="no route"):
        list(generator.stream(prompt_of("fail")))


def test_window_name_and_count() -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        known = EchoModel(seen=[], profile={"max_input_tokens": 1000})
    assert ChatModelGenerator(known).window == 1000
    assert ChatModelGenerator(known, window=50).window == 50
    generator = ChatModelGenerator(EchoModel(seen=[]))
    assert (generator.window, generator.name) == (8192, "EchoModel")
    assert [generator.count(text) for text in ("", "abc", "abcd", "é" * 3)] == [0, 1, 2, 2]


def test_langchain_parts_make_a_pipeline_that_goes_back_to_langchain() -> None:
    model = FakeListChatModel(responses=["Gallium [1]"])
    pipeline = Pipeline(
        LangchainStoreRetriever(store_of()),
        LengthReranker(),
        GeneratorReader(ChatModelGenerator(model)),
        retrieve=4,
        keep=2,
    )
    answer = pipeline.ask("which metal melts in the hand")
    assert (answer.text, answer.citations) == ("Gallium [1]", (0,))
    assert [hit.document.id for hit in answer.hits] == ["fe", "ga"]
    assert "Iron rusts in damp air." in answer.prompt
    runnable = RagkitRunnable(pipeline=pipeline)
    text = runnable | itemgetter("answer") | StrOutputParser()
    assert text.invoke("which metal melts in the hand") == "Gallium [1]"
    assert "".join(runnable.pick("answer").stream("x")) == "Gallium [1]"


def test_the_fakes_are_parts() -> None:
    assert isinstance(LengthReranker(), Reranker)
    assert isinstance(TitleReader(), Reader)
