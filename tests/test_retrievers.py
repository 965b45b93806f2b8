"""Fusion and reranking, by values computed by hand or brute force."""

import math

import numpy as np
import pytest

from ragkit.assemble import RetrievalSettings, assemble
from ragkit.errors import IndexStateError, SettingsError
from ragkit.rerankers import CrossEncoderReranker, DiversityReranker, GeneratorReranker
from ragkit.retrievers import Bm25Retriever, DenseRetriever, HybridRetriever
from ragkit.stores.index import Index
from ragkit.types import Document, Hit, Query, Reranker, Retriever


def hits_of(**scores):
    return [
        Hit(Document(id_, f"text of {id_}", id_.upper()), score) for id_, score in scores.items()
    ]


class Fixed:
    """A retriever that gives the same lists to everyone, and remembers what it was asked."""

    def __init__(self, *lists):
        self.lists = lists
        self.depths = []

    def retrieve(self, queries, k):
        self.depths.append(k)
        return [list(found[:k]) for found, _ in zip(self.lists, queries, strict=True)]


QUERIES = [Query("1", "one"), Query("2", "two")]
FIRST = [hits_of(a=9.0, b=5.0, c=1.0), hits_of(x=2.0)]
SECOND = [hits_of(c=0.9, d=0.8, a=0.4), []]


def pairs(hits):
    return [[(hit.document.id, hit.score) for hit in found] for found in hits]


def test_reciprocal_rank_fusion_by_hand():
    hybrid = HybridRetriever([Fixed(*FIRST), Fixed(*SECOND)])
    assert isinstance(hybrid, Retriever)
    expected = [("a", 1 / 61 + 1 / 63), ("c", 1 / 63 + 1 / 61), ("b", 1 / 62), ("d", 1 / 62)]
    found = pairs(hybrid.retrieve(QUERIES, 10))
    assert found == [expected, [("x", 1 / 61)]]
    assert pairs(hybrid.retrieve(QUERIES, 1)) == [expected[:1], [("x", 1 / 61)]]


def test_weighted_reciprocal_rank_fusion_by_hand():
    hybrid = HybridRetriever([Fixed(*FIRST), Fixed(*SECOND)], [1, 3])
    found = pairs(hybrid.retrieve(QUERIES, 3))
    assert [id_ for id_, _ in found[0]] == ["c", "a", "d"]
    assert [score for _, score in found[0]] == pytest.approx(
        [1 / 63 + 3 / 61, 1 / 61 + 3 / 63, 3 / 62]
    )
    assert found[1] == [("x", 1 / 61)]


def test_weighted_fusion_by_hand():
    hybrid = HybridRetriever([Fixed(*FIRST), Fixed(*SECOND)], [0.25, 0.75], fusion="weighted")
    found = pairs(hybrid.retrieve(QUERIES, 10))
    # First list: a 1, b 0.5, c 0. Second: c 1, d 0.8, a 0.
    assert [id_ for id_, _ in found[0]] == ["c", "d", "a", "b"]
    assert [score for _, score in found[0]] == pytest.approx([0.75, 0.6, 0.25, 0.125])
    assert found[1] == [("x", 0.25)]


def test_a_list_of_equal_scores_counts_in_full():
    hybrid = HybridRetriever(
        [Fixed(hits_of(a=2.0, b=2.0)), Fixed(hits_of(b=7.0))], fusion="weighted"
    )
    assert pairs(hybrid.retrieve(QUERIES[:1], 5)) == [[("b", 2.0), ("a", 1.0)]]


def test_a_weight_of_zero_and_lists_that_are_empty():
    hybrid = HybridRetriever([Fixed([], []), Fixed(*FIRST)], [1, 0])
    assert pairs(hybrid.retrieve(QUERIES, 5)) == [[("a", 0), ("b", 0), ("c", 0)], [("x", 0)]]
    nothing = HybridRetriever([Fixed([], []), Fixed([], [])], fusion="weighted")
    assert nothing.retrieve(QUERIES, 5) == [[], []]
    assert HybridRetriever([Fixed(), Fixed()]).retrieve([], 5) == []


def test_depth_is_what_the_parts_are_asked_for():
    part = Fixed(*FIRST)
    HybridRetriever([part], depth=2).retrieve(QUERIES, 1)
    HybridRetriever([part], depth=2).retrieve(QUERIES, 7)
    HybridRetriever([part]).retrieve(QUERIES, 7)
    assert part.depths == [2, 7, 100]


@pytest.mark.parametrize(
    ("parts", "weights", "fusion", "seen"),
    [
        (0, None, "rrf", "0 retrievers"),
        (2, [1], "rrf", r"2 retrievers and the weights \[1\]"),
        (2, [1, -0.5], "rrf", "-0.5"),
        (2, [math.nan, 1], "rrf", "nan"),
        (2, None, "sum", "unknown fusion 'sum'; known are rrf, weighted"),
    ],
)
def test_fusion_that_means_nothing_is_refused(parts, weights, fusion, seen):
    with pytest.raises(SettingsError, match=seen):
        HybridRetriever([Fixed(*FIRST)] * parts, weights, fusion=fusion)


def test_the_hybrid_of_an_index_is_the_fusion_of_its_parts(tmp_path, hash_encoder):
    documents = [Document(f"d{n}", f"moon {n} {'light ' * (n % 5)}") for n in range(40)]
    encoder = hash_encoder()
    index = Index.build(tmp_path / "kb", documents, encoder=encoder)
    parts = [Bm25Retriever(index), DenseRetriever(index, encoder)]
    queries = [Query("a", "light 7"), Query("b", "moon", {"id": ["d3", "d4", "d5"]})]
    lists = [part.retrieve(queries, 100) for part in parts]
    found = HybridRetriever(parts).retrieve(queries, 12)
    for query, hits in enumerate(found):
        scores = {}
        for part in lists:
            for rank, hit in enumerate(part[query], start=1):
                scores[hit.document.id] = scores.get(hit.document.id, 0) + 1 / (60 + rank)
        best = sorted(scores.values(), reverse=True)[:12]
        assert [hit.score for hit in hits] == pytest.approx(best)
        assert all(scores[hit.document.id] == pytest.approx(hit.score) for hit in hits)


def test_another_encoder_is_refused_with_the_mend(tmp_path, hash_encoder):
    index = Index.build(tmp_path / "kb", [Document("a", "b")], encoder=hash_encoder(8, name="old"))
    assert len(DenseRetriever(index, hash_encoder(8, name="old")).retrieve(QUERIES, 1)) == 2
    message = r"kb: built with the encoder 'old', .* 'new', whose dimension differ\..*--encoder"
    with pytest.raises(IndexStateError, match=message):
        DenseRetriever(index, hash_encoder(9, name="new"))


def test_an_encoder_of_queries_searches_the_index_of_its_base(tmp_path, hash_encoder):
    documents = [Document(f"d{n}", f"text {n}") for n in range(9)]
    base = hash_encoder(8, name="base")
    index = Index.build(tmp_path / "kb", documents, encoder=base)

    class Tower(hash_encoder):
        """Encodes a query as the base encodes it in capital letters."""

        def encode_queries(self, texts):
            return super().encode_queries([text.upper() for text in texts])

        def describe(self):
            return super().describe() | {"base": of}

    of = base.describe()["fingerprint"]
    scores = (
        base.encode_queries(["TEXT 5"])
        @ base.encode_queries([document.contents for document in documents]).T
    )
    hits = DenseRetriever(index, Tower(8, name="tower")).retrieve([Query("q", "text 5")], 9)[0]
    assert [hit.document.id for hit in hits] == [f"d{n}" for n in np.argsort(-scores[0])]
    assert [hit.score for hit in hits] == pytest.approx(sorted(scores[0], reverse=True))
    of = "another-8"
    with pytest.raises(IndexStateError, match="whose base differ"):
        DenseRetriever(index, Tower(8, name="tower"))


# --- rerankers


class Scorer:
    def __init__(self, values):
        self.values = values
        self.seen = []

    def score(self, pairs):
        self.seen.append(list(pairs))
        return np.array([self.values[text[:1]] for _, text in pairs], np.float32)


def test_a_cross_encoder_orders_by_its_scores():
    scorer = Scorer({"A": 0.5, "B": 2.0, "C": 0.5, "X": -1.0})
    reranker = CrossEncoderReranker(scorer)
    assert isinstance(reranker, Reranker)
    found = reranker.rerank(QUERIES, FIRST, 10)
    assert pairs(found) == [[("b", 2.0), ("a", 0.5), ("c", 0.5)], [("x", -1.0)]]
    assert scorer.seen == [
        [("one", f"{id_.upper()}\ntext of {id_}") for id_ in "abc"] + [("two", "X\ntext of x")]
    ]
    assert pairs(reranker.rerank(QUERIES, FIRST, 1)) == [[("b", 2.0)], [("x", -1.0)]]
    assert pairs(FIRST) == [[("a", 9.0), ("b", 5.0), ("c", 1.0)], [("x", 2.0)]]


def test_a_weight_keeps_some_of_the_retrievals_order():
    """By hand: .4 · reranker + .6 · retrieval, each from 0 to 1 over the list."""
    scorer = Scorer({"A": 0.5, "B": 2.0, "C": 1.0, "X": -1.0})
    found = CrossEncoderReranker(scorer, 0.4).rerank(QUERIES, FIRST, 2)
    assert [[hit.document.id for hit in hits] for hits in found] == [["b", "a"], ["x"]]
    assert [hit.score for hit in found[0]] == pytest.approx([0.4 + 0.6 * 0.5, 0.6])
    assert found[1][0].score == pytest.approx(1.0)
    order = CrossEncoderReranker(scorer, 0).rerank(QUERIES, FIRST, 3)
    assert [hit.document.id for hit in order[0]] == ["a", "b", "c"]
    judge = Judge({"A": 0.2, "B": 0.8, "C": 0.2, "X": 0.5})
    first = [pairs(GeneratorReranker(judge, w).rerank(QUERIES, FIRST, 1))[0] for w in (1, 0.2)]
    assert first[0][0][0] == "b" and first[1] == [("a", pytest.approx(0.8))]
    for wrong in (-0.1, 1.1, math.nan):
        with pytest.raises(SettingsError, match=f"weight must lie in 0…1, not {wrong}"):
            CrossEncoderReranker(scorer, wrong)
        with pytest.raises(SettingsError, match=f"weight must lie in 0…1, not {wrong}"):
            GeneratorReranker(judge, wrong)


def test_settings_weigh_the_reranker(tmp_path, monkeypatch):
    index = Index.build(
        tmp_path / "kb", [Document("a", "tin"), Document("b", "tin can")], stores=["bm25"]
    )
    monkeypatch.setattr(
        "ragkit.models.cross_encoder.CrossEncoder.load", lambda *_, **__: Scorer({"t": 1.0})
    )
    monkeypatch.setattr("ragkit.assemble.load_generator", lambda *_, **__: Judge({"t": 0.5}))

    def found(**given):
        settings = RetrievalSettings(index=tmp_path / "kb", **given)
        return assemble(settings, index).retrieve([Query("q", "tin")])[0]

    for name in ("x", "generator"):
        assert [hit.score for hit in found(reranker=name, reranker_weight=0.5)] == [1.0, 0.5]
        assert len({hit.score for hit in found(reranker=name)}) == 1
    for given in ({"reranker_weight": 0.5}, {"reranker": "x", "reranker_weight": 2.0}):
        with pytest.raises(SettingsError, match="reranker_weight"):
            found(**given)


class Judge:
    """Says yes to what its table says, and remembers the prompts."""

    def __init__(self, yes, window=1000):
        self.yes = yes
        self.window = window
        self.prompts = []

    def count(self, text):
        return len(text.split())

    def first_token_logprobs(self, prompts, options):
        assert [any("es" in word for word in words) for words in options] == [True, False]
        self.prompts.extend(prompts)
        out = np.empty((len(prompts), 2), np.float32)
        for row, prompt in enumerate(prompts):
            context = "".join(
                part.text
                for message in prompt.messages
                for part in message.parts
                if part.kind == "context"
            )
            out[row] = np.log([self.yes[context[0]], 1 - self.yes[context[0]]])
        return out


def test_a_passage_too_long_to_judge_is_cut_at_a_sentence():
    judge = Judge({"L": 0.5}, window=64 + 30)
    hits = [Hit(Document("long", "Lead is soft. " * 200), 1.0)]
    assert len(GeneratorReranker(judge).rerank([Query("q", "Why?")], [hits], 1)[0]) == 1
    text = judge.prompts[0].text
    assert text.count("Lead is soft.") == 5 and "Question: Why?" in text


def test_a_generator_orders_by_yes_against_no():
    judge = Judge({"A": 0.2, "B": 0.8, "C": 0.2, "X": 0.5})
    found = GeneratorReranker(judge).rerank(QUERIES, FIRST, 2)
    assert [[hit.document.id for hit in hits] for hits in found] == [["b", "a"], ["x"]]
    assert [hit.score for hit in found[0]] == pytest.approx([math.log(4), -math.log(4)], rel=1e-5)
    assert found[1][0].score == pytest.approx(0)
    parts = [[(part.kind, part.text) for part in p.messages[0].parts] for p in judge.prompts]
    assert ("context", "C\ntext of c") in parts[2] and ("question", "two") in parts[3]


@pytest.mark.parametrize(
    "reranker", [CrossEncoderReranker(Scorer({})), GeneratorReranker(Judge({}))]
)
def test_nothing_to_rerank(reranker):
    assert reranker.rerank(QUERIES, [[], []], 5) == [[], []]
    assert reranker.rerank([], [], 5) == []


@pytest.fixture(scope="module")
def diverse(tmp_path_factory, hash_encoder):
    documents = [Document(f"d{n}", f"text {n}") for n in range(30)]
    folder = tmp_path_factory.mktemp("diverse") / "kb"
    return Index.build(folder, documents, encoder=hash_encoder(6), stores=("dense",))


def maximal_marginal_relevance(relevance, vectors, diversity, k):
    chosen, values = [], []
    while len(chosen) < min(k, len(relevance)):
        best = None
        for i in range(len(relevance)):
            if i in chosen:
                continue
            similarity = max([0.0, *(float(vectors[i] @ vectors[j]) for j in chosen)])
            value = (1 - diversity) * relevance[i] - diversity * similarity
            if best is None or value > best[0]:
                best = (value, i)
        values.append(best[0])
        chosen.append(best[1])
    return chosen, values


@pytest.mark.parametrize("diversity", [0.0, 0.3, 0.7, 1.0])
def test_diversity_is_maximal_marginal_relevance(diverse, diversity):
    random = np.random.default_rng(2)
    for size, k in ((12, 5), (30, 30), (1, 3)):
        rows = random.permutation(30)[:size]
        scores = np.sort(random.random(size))[::-1]
        hits = [Hit(diverse.documents[row], score) for row, score in zip(rows, scores, strict=True)]
        found = DiversityReranker(diverse, diversity).rerank(QUERIES[:1], [hits], k)[0]
        span = np.ptp(scores)
        relevance = (scores - scores.min()) / span if span else np.ones(size)
        vectors = diverse.dense.vectors(rows)
        chosen, values = maximal_marginal_relevance(relevance, vectors, diversity, k)
        assert [hit.document.id for hit in found] == [f"d{rows[i]}" for i in chosen]
        assert [hit.score for hit in found] == pytest.approx(values, abs=1e-6)
        assert [hit.score for hit in found] == sorted((h.score for h in found), reverse=True)
        if diversity == 0:
            assert [hit.document.id for hit in found] == [hit.document.id for hit in hits[:k]]


def test_diversity_follows_a_reranker_and_refuses(diverse):
    hits = [Hit(diverse.documents[row], 9.0 - row) for row in range(3)]
    upside_down = CrossEncoderReranker(Scorer({"t": 1.0}))
    upside_down._model.score = lambda pairs: np.arange(len(pairs), dtype=np.float32)
    found = DiversityReranker(diverse, 0, upside_down).rerank(QUERIES, [hits, []], 2)
    assert pairs(found) == [[("d2", 1.0), ("d1", 0.5)], []]
    for wrong in (-0.1, 1.1, math.nan):
        with pytest.raises(SettingsError, match=str(wrong)):
            DiversityReranker(diverse, wrong)
    with pytest.raises(IndexStateError, match="'a' is not in the index"):
        DiversityReranker(diverse, 0.5).rerank(QUERIES, FIRST, 2)


def test_diversity_needs_vectors(tmp_path):
    index = Index.build(tmp_path / "kb", [Document("a", "b")], stores=("bm25",))
    with pytest.raises(IndexStateError, match=r"not with dense.*--stores bm25,dense"):
        DiversityReranker(index, 0.5)
