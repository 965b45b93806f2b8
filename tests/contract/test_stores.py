"""What every store promises, whatever its kind: dense search by value, and filters."""

import math

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

import ragkit.stores.limits
from ragkit.errors import IndexStateError, ModelError, SettingsError
from ragkit.retrievers import Bm25Retriever, DenseRetriever, HybridRetriever
from ragkit.stores import ann, dense
from ragkit.stores.ann import build_ann
from ragkit.stores.ann_settings import AnnSettings
from ragkit.stores.dense import DenseStore
from ragkit.stores.documents import matches
from ragkit.stores.index import Index
from ragkit.types import Document, Query

ROWS, DIMENSION, K = 3000, 24, 10
EXACT = "nprobe=100000"
# name -> (settings, exhaustive search parameters, whether scores are the true inner products)
ANN = {
    "hnsw": (AnnSettings("hnsw"), "efSearch=3000", True),
    "ivf": (AnnSettings("ivf"), EXACT, True),
    "IVF4,PQ8x4": (AnnSettings(factory="IVF4,PQ8x4"), EXACT, False),
    "HNSW16,SQ8": (AnnSettings(factory="HNSW16,SQ8"), "efSearch=3000", False),
    "IVF8,Flat": (AnnSettings(factory="IVF8,Flat"), EXACT, True),
    "PCA16,IVF64,Flat": (AnnSettings(factory="PCA16,IVF64,Flat"), EXACT, False),
    "PCA16,HNSW4,Flat": (AnnSettings(factory="PCA16,HNSW4,Flat"), "efSearch=3000", False),
    "IVF64,SQ8,RFlat": (AnnSettings(factory="IVF64,SQ8,RFlat"), EXACT, True),
}
KINDS = ("flat", *ANN)
# Recall@10 at least, by what is lost to quantisation and projection even if all is searched.
LOSSY = {"HNSW16,SQ8": 0.93, "IVF4,PQ8x4": 0.23, "PCA16,IVF64,Flat": 0.4, "PCA16,HNSW4,Flat": 0.39}
SOUND = [kind for kind in ANN if ANN[kind][2]]


@pytest.fixture(scope="module")
def clusters():
    """Vectors in 40 clusters, normalised, and queries near them."""
    random = np.random.default_rng(0)
    centres = random.standard_normal((40, DIMENSION))

    def draw(n):
        points = centres[random.integers(0, 40, n)] + 0.35 * random.standard_normal((n, DIMENSION))
        return (points / np.linalg.norm(points, axis=1, keepdims=True)).astype(np.float32)

    return draw(ROWS), draw(50)


@pytest.fixture(scope="module")
def files(clusters, tmp_path_factory):
    """The FAISS file of each kind; None for the flat one."""
    folder = tmp_path_factory.mktemp("ann")
    paths = {"flat": None}
    for number, (kind, (chosen, _, _)) in enumerate(ANN.items()):
        paths[kind] = folder / f"{number}.faiss"
        build_ann([clusters[0][:1000], clusters[0][1000:]], chosen, paths[kind])
    return paths


def segments(vectors, cuts=(700, 1900)):
    return np.split(vectors, cuts)


def brute_force(vectors, queries, k, allowed=None):
    scores = queries.astype(np.float64) @ vectors.T.astype(np.float64)
    if allowed is not None:
        scores[:, ~allowed] = -np.inf
    rows = np.argsort(-scores, axis=1, kind="stable")[:, :k]
    return rows, scores


def recall(found, expected):
    pairs = zip(found, expected, strict=True)
    return np.mean([len(set(row.tolist()) & set(true.tolist())) / len(true) for row, true in pairs])


def mask_of(share, seed=3):
    return np.random.default_rng(seed).random(ROWS) < share


# --- dense, by value


@pytest.mark.parametrize("cuts", [(), (700, 1900), tuple(range(100, ROWS, 100))])
@pytest.mark.parametrize("k", [1, 10, 150, ROWS + 5])
def test_flat_is_brute_force(clusters, cuts, k):
    vectors, queries = clusters
    found, scores = DenseStore(segments(vectors, cuts)).search(queries, k)
    rows, expected = brute_force(vectors, queries, k)
    for query in range(len(queries)):
        true = expected[query, found[query]]
        np.testing.assert_allclose(scores[query], true, rtol=0, atol=1e-5)
        assert len(found[query]) == min(k, ROWS)
        # The same rows, but for neighbours whose scores float32 cannot tell apart.
        differing = found[query] != rows[query]
        np.testing.assert_allclose(
            true[differing], expected[query, rows[query][differing]], atol=1e-6
        )
    assert k > 10 or all((found[q] == rows[q]).all() for q in range(len(queries)))


@pytest.mark.parametrize("kind", ANN)
def test_scores_and_recall_with_default_parameters(clusters, files, kind):
    vectors, queries = clusters
    found, scores = DenseStore(segments(vectors, ()), files[kind]).search(queries, K)
    rows, expected = brute_force(vectors, queries, K)
    for row, score in zip(found, scores, strict=True):
        assert len(set(row.tolist())) == K
        assert (np.diff(score) <= 0).all()
    if kind in SOUND:
        for query in range(len(queries)):
            np.testing.assert_allclose(scores[query], expected[query, found[query]], atol=1e-5)
    assert recall(found, rows) >= LOSSY.get(kind, 0.98)
    everything = DenseStore(segments(vectors, ()), files[kind], ANN[kind][1])
    assert recall(found, rows) >= 0.97 * recall(everything.search(queries, K)[0], rows)


@pytest.mark.parametrize(
    ("factory", "lists", "expected"),
    [
        ("HNSW4,Flat", 0, 128),
        ("PCA8,HNSW4,Flat", 0, 128),
        ("PCA8,HNSW4,RFlat", 0, 128),
        ("IVF200,Flat", 200, 12),
        ("PCA8,IVF200,SQ8,RFlat", 200, 12),
    ],
)
def test_default_parameters_reach_below_transforms(clusters, tmp_path, factory, lists, expected):
    build_ann([clusters[0]], AnnSettings(factory=factory), tmp_path / "x.faiss")
    for search in ("", "nprobe=3" if lists else "efSearch=3"):
        opened = ann.Ann(tmp_path / "x.faiss", search)
        core = ann._core(opened._index)
        assert (core.nprobe if lists else core.hnsw.efSearch) == (3 if search else expected)
        assert lists or core.hnsw.efConstruction == 200


@pytest.mark.parametrize("kind", SOUND)
def test_exhaustive_parameters_find_everything(clusters, files, kind):
    vectors, queries = clusters
    store = DenseStore(segments(vectors, ()), files[kind], ANN[kind][1])
    assert recall(store.search(queries, K)[0], brute_force(vectors, queries, K)[0]) >= 0.999


@pytest.mark.parametrize("kind", KINDS)
def test_exact_is_brute_force_in_every_kind(clusters, files, kind):
    vectors, queries = clusters
    found, scores = DenseStore(segments(vectors), files[kind]).search(queries, K, exact=True)
    rows, expected = brute_force(vectors, queries, K)
    np.testing.assert_array_equal(np.stack(found), rows)
    np.testing.assert_allclose(np.stack(scores), np.take_along_axis(expected, rows, 1), atol=1e-5)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("share", [0.001, 0.05, 0.95])
def test_masks_equal_brute_force_over_the_allowed(clusters, files, kind, share):
    vectors, queries = clusters
    mask = mask_of(share)
    rows, expected = brute_force(vectors, queries, min(K, mask.sum()), mask)
    found, scores = DenseStore(segments(vectors), files[kind]).search(queries, K, mask)
    np.testing.assert_array_equal(np.stack(found), rows)
    np.testing.assert_allclose(np.stack(scores), np.take_along_axis(expected, rows, 1), atol=1e-5)


@pytest.mark.parametrize("kind", ANN)
@pytest.mark.parametrize("share", [0.001, 0.05, 0.95])
def test_masks_through_faiss_selectors(clusters, files, kind, share, monkeypatch):
    monkeypatch.setattr(dense, "_EXACT_BELOW", 0)
    vectors, queries = clusters
    mask = mask_of(share)
    rows, expected = brute_force(vectors, queries, min(K, mask.sum()), mask)
    store = DenseStore(segments(vectors), files[kind], ANN[kind][1])
    assert store._ann.search(queries, K, mask) is not None  # FAISS filters, below transforms too
    found, scores = store.search(queries, K, mask)
    for query in range(len(queries)):
        assert mask[found[query]].all()
        assert len(set(found[query].tolist())) == min(K, mask.sum())
        if kind in SOUND:
            np.testing.assert_allclose(scores[query], expected[query, found[query]], atol=1e-5)
    if kind in SOUND:
        assert recall(found, rows) >= 0.999


@pytest.mark.parametrize("kind", KINDS)
def test_a_mask_of_nothing_and_more_than_there_is(clusters, files, kind):
    vectors, queries = clusters
    store = DenseStore(segments(vectors), files[kind])
    for rows, scores in zip(*store.search(queries, K, np.zeros(ROWS, bool)), strict=True):
        assert rows.tolist() == [] and scores.tolist() == []
    everything, _ = store.search(queries[:2], 10 * ROWS)
    assert [sorted(rows.tolist()) for rows in everything] == [list(range(ROWS))] * 2


@pytest.mark.parametrize("kind", SOUND)
def test_a_segment_that_the_index_does_not_cover_is_searched_exactly(
    clusters, files, kind, monkeypatch
):
    vectors, queries = clusters
    more = np.concatenate([vectors, queries + np.float32(0.01)])
    store = DenseStore(segments(more, (ROWS,)), files[kind], ANN[kind][1])
    found, scores = store.search(queries, K)
    rows, expected = brute_force(more, queries, K)
    assert (rows[:, 0] >= ROWS).any()
    assert recall(found, rows) >= 0.999
    mask = np.random.default_rng(5).random(len(more)) < 0.5
    for below in (0, 20_000):
        monkeypatch.setattr(dense, "_EXACT_BELOW", below)
        found, scores = store.search(queries, K, mask)
        rows, expected = brute_force(more, queries, K, mask)
        assert recall(found, rows) >= 0.999
        for query in range(len(queries)):
            np.testing.assert_allclose(scores[query], expected[query, found[query]], atol=1e-5)


@pytest.mark.parametrize("k", [3, 100, 149, 150, 260])
@pytest.mark.parametrize("cuts", [(), (90, 200)])
def test_equal_scores_stand_in_row_order(k, cuts):
    vectors = np.tile(np.eye(4, dtype=np.float32)[:2], (150, 1))
    found, scores = DenseStore(np.split(vectors, cuts)).search(vectors[:1], k)
    even, odd = found[0][found[0] % 2 == 0], found[0][found[0] % 2 == 1]
    assert found[0].tolist() == sorted(even) + sorted(odd)
    assert (len(even), len(set(even.tolist()))) == (min(k, 150), min(k, 150))
    assert scores[0].tolist() == [1] * len(even) + [0] * len(odd)


@settings(deadline=None, max_examples=80)
@given(
    rows=st.integers(1, 30),
    cuts=st.lists(st.integers(0, 30), max_size=3),
    k=st.integers(1, 40),
    share=st.sampled_from([0, 0.3, 1]),
    seed=st.integers(0, 1000),
)
def test_small_flat_stores_are_brute_force(rows, cuts, k, share, seed):
    random = np.random.default_rng(seed)
    # Small integers: products are exact, and many are equal.
    vectors = random.integers(-2, 3, (rows, 3)).astype(np.float32)
    queries = random.integers(-2, 3, (4, 3)).astype(np.float32)
    mask = random.random(rows) < share if share else None
    parts = [
        part for part in np.split(vectors, sorted(min(cut, rows) for cut in cuts)) if len(part)
    ]
    found, scores = DenseStore(parts).search(queries, k, mask)
    for query in range(4):
        values = vectors @ queries[query]
        allowed = [row for row in range(rows) if mask is None or mask[row]]
        best = sorted(allowed, key=lambda row: (-values[row], row))[:k]
        assert scores[query].tolist() == [values[row] for row in best]
        assert values[found[query]].tolist() == scores[query].tolist()
        order = list(zip((-scores[query]).tolist(), found[query].tolist(), strict=True))
        assert order == sorted(set(order))
        assert set(found[query].tolist()) <= set(allowed)


def test_vectors_come_by_row_from_every_segment(clusters):
    vectors, _ = clusters
    rows = np.array([2999, 0, 700, 699, 1900, 700])
    store = DenseStore(segments(vectors))
    np.testing.assert_array_equal(store.vectors(rows), vectors[rows])
    assert store.vectors(np.array([], np.int64)).shape == (0, DIMENSION)
    assert (len(store), store.dimension) == (ROWS, DIMENSION)


# --- dense, what is refused


@pytest.mark.parametrize("kind", KINDS)
def test_queries_that_do_not_fit_are_refused(clusters, files, kind):
    vectors, queries = clusters
    store = DenseStore(segments(vectors), files[kind])
    for wrong in (queries[:, :-1], queries[0], np.zeros((2, 0), np.float32)):
        with pytest.raises(
            IndexStateError, match=r"24 components.*encoder that the index was built"
        ):
            store.search(wrong, K)
    for value in (math.nan, math.inf):
        broken = queries.copy()
        broken[3, 2] = value
        with pytest.raises(ModelError, match="NaN or an infinity for a query"):
            store.search(broken, K, mask_of(0.5))
    with pytest.raises(SettingsError, match="at least 1, not 0"):
        store.search(queries, 0)
    assert store.search(queries[:0], K) == ([], [])


def test_an_ann_file_of_other_segments_or_broken_is_refused(clusters, files, tmp_path):
    vectors, _ = clusters
    with pytest.raises(IndexStateError, match=r"holds 3000 vectors, the segments \[10, 2000\]"):
        DenseStore(segments(vectors[:2000], (10,)), files["hnsw"])
    (tmp_path / "broken.faiss").write_bytes(files["hnsw"].read_bytes()[:1000])
    for name in ("broken.faiss", "missing.faiss"):
        with pytest.raises(IndexStateError, match="Build the index again"):
            DenseStore(segments(vectors), tmp_path / name)


DOCUMENTS = [Document(str(n), f"text {n}") for n in range(30)]


def test_settings_that_faiss_refuses_are_refused_before_anything_is_encoded(tmp_path, hash_encoder):
    encoder = hash_encoder(break_at=0, bad=AssertionError("encoded"))
    cases = [
        (AnnSettings(factory="NOPE12"), "NOPE12"),
        (AnnSettings(factory="IVF4,PQ7"), "IVF4,PQ7"),
        (AnnSettings("hnsw", search="nprobes=3"), "nprobes=3"),
    ]
    for chosen, seen in cases:
        with pytest.raises(SettingsError, match=seen):
            Index.build(tmp_path / "kb", DOCUMENTS, encoder=encoder, ann=chosen)
        assert not (tmp_path / "kb").exists()
    with pytest.raises(SettingsError, match="'lsh'; known are auto, flat, hnsw, ivf, ivfpq"):
        AnnSettings("lsh")
    with pytest.raises(SettingsError, match="'nprobe=3' is of an approximate index"):
        AnnSettings(search="nprobe=3")
    with pytest.raises(SettingsError, match="over 30 vectors of dimension 16"):
        Index.build(
            tmp_path / "kb",
            DOCUMENTS,
            encoder=hash_encoder(),
            ann=AnnSettings(factory="IVF50,Flat"),
        )
    files = [path for path in tmp_path.rglob("*") if path.is_file()]
    assert files and all(".vectors-" in path.as_posix() for path in files)  # they are kept


def test_an_encoder_that_gives_nonsense_is_refused(tmp_path, table_encoder, hash_encoder):
    broken = table_encoder({"text 17": np.full(4, math.nan)}, 4)
    with pytest.raises(ModelError, match="NaN or an infinity for the document in row 17"):
        Index.build(tmp_path / "kb", DOCUMENTS, encoder=broken)

    class Narrow(hash_encoder):
        def encode_documents(self, texts, *, progress=lambda done: None):
            return super().encode_documents(texts)[:1]

    with pytest.raises(ModelError, match=r"shape \(1, 16\) for 30 documents"):
        Index.build(tmp_path / "kb", DOCUMENTS, encoder=Narrow())
    assert list(tmp_path.iterdir()) == []


# --- filters: one table, every store

COLOURS = ("red", "green", "blue")


def coloured(n):
    metadata = {"n": n, "colour": COLOURS[n % 3], "tags": [str(n % 4), "all"], "half": n / 2}
    if n % 5 == 0:
        metadata |= {"rare": True, "nested": {"a": n}}
    if n % 7 == 0:
        metadata |= {"n": str(n), "colour": None}
    return Document(f"d{n}", f"moon number {n}", "even" if n % 2 == 0 else "", metadata)


# Each filter, and which of the documents 0 … 299 must pass it. Where 7 divides n, the document's
# field `n` is a string and its colour null; 5 divides n where there are `rare` and `nested`.
WHERES = [
    ({}, lambda n: True),
    ({"colour": "red"}, lambda n: n % 3 == 0 and n % 7),
    ({"colour": ["red", "blue"]}, lambda n: n % 3 != 1 and n % 7),
    ({"colour": ("red",)}, lambda n: n % 3 == 0 and n % 7),
    ({"colour": []}, lambda n: False),
    ({"colour": {"ne": "red"}}, lambda n: n % 3 or n % 7 == 0),
    ({"colour": {"exists": False}}, lambda n: n % 7 == 0),
    ({"colour": {"exists": True}}, lambda n: n % 7),
    ({"colour": None}, lambda n: False),
    ({"n": {"gte": 290}}, lambda n: n >= 290 and n % 7),
    ({"n": {"gt": 10, "lt": 20}}, lambda n: n in (11, 12, 13, 15, 16, 17, 18, 19)),
    ({"n": {"gt": 10, "lte": 20, "ne": 15}}, lambda n: n in (11, 12, 13, 16, 17, 18, 19, 20)),
    ({"n": 14}, lambda n: False),
    ({"n": "14"}, lambda n: n == 14),
    ({"n": {"gt": "5"}}, lambda n: n % 7 == 0 and str(n) > "5"),
    ({"half": 1}, lambda n: n == 2),
    ({"half": {"in": [0.5, 1.0, 99.5]}}, lambda n: n in (1, 2, 199)),
    ({"tags": "3"}, lambda n: n % 4 == 3),
    ({"tags": ["2", "3"]}, lambda n: n % 4 >= 2),
    ({"tags": {"ne": "3"}}, lambda n: n % 4 != 3),
    ({"tags": "all"}, lambda n: True),
    ({"rare": True}, lambda n: n % 5 == 0),
    ({"rare": {"ne": True}}, lambda n: n % 5),
    ({"nested": {"exists": True}}, lambda n: n % 5 == 0),
    ({"id": "d17"}, lambda n: n == 17),
    ({"id": ["d17", "d18", "x"]}, lambda n: n in (17, 18)),
    ({"title": "even"}, lambda n: n % 2 == 0),
    (
        {"title": "even", "colour": "red", "n": {"lt": 100}},
        lambda n: n % 6 == 0 and n % 7 and n < 100,
    ),
    ({"missing": 1}, lambda n: False),
    ({"missing": {"ne": 1}}, lambda n: True),
]
STORES = ("bm25", "hybrid", *KINDS)


@pytest.fixture(scope="module")
def retrievers(tmp_path_factory, hash_encoder):
    folder = tmp_path_factory.mktemp("filters")
    documents, encoder, parts = [coloured(n) for n in range(300)], hash_encoder(), {}
    size = ragkit.stores.limits.SEGMENT_DOCUMENTS
    ragkit.stores.limits.SEGMENT_DOCUMENTS = 130
    try:
        for number, kind in enumerate(KINDS):
            # 8 x 4 bits train on 300 vectors; PCA needs no more than the dimension.
            chosen = ANN[kind][0] if kind in ANN else AnnSettings()
            index = Index.build(folder / str(number), documents, encoder=encoder, ann=chosen)
            assert len(index.manifest["segments"]) == 3
            parts[kind] = DenseRetriever(index, encoder)
    finally:
        ragkit.stores.limits.SEGMENT_DOCUMENTS = size
    parts["bm25"] = Bm25Retriever(index)
    parts["hybrid"] = HybridRetriever([parts["bm25"], parts["hnsw"]], depth=300)
    return documents, parts


@pytest.mark.parametrize("store", STORES)
@pytest.mark.parametrize("below", [0, 20_000], ids=["selectors", "exact"])
def test_every_store_filters_as_matches_says(retrievers, store, below, monkeypatch):
    monkeypatch.setattr(dense, "_EXACT_BELOW", below)
    documents, parts = retrievers
    queries = [Query(str(n), "moon", where) for n, (where, _) in enumerate(WHERES)]
    # All filters mixed in one call, and again in another order.
    for order in (1, -1):
        found = parts[store].retrieve(queries[::order], 300)
        for (where, passes), hits in zip(WHERES[::order], found, strict=True):
            expected = {f"d{n}" for n in range(300) if passes(n)}
            assert {each.id for each in documents if matches(where, each)} == expected, where
            assert {hit.document.id for hit in hits} == expected, where
            assert len(hits) == len(expected)
            assert [hit.score for hit in hits] == sorted((h.score for h in hits), reverse=True)


@pytest.mark.parametrize("store", ["bm25", "flat", *SOUND])
def test_a_filtered_list_is_the_full_list_without_the_others(retrievers, store):
    _, parts = retrievers
    queries = [Query("a", "moon number 7", where) for where, _ in WHERES]
    full = parts[store].retrieve([Query("a", "moon number 7")], 300)[0]
    for query, hits in zip(queries, parts[store].retrieve(queries, 5), strict=True):
        kept = [hit for hit in full if matches(query.where, hit.document)][:5]
        assert [hit.document.id for hit in hits] == [hit.document.id for hit in kept]
        assert [h.score for h in hits] == pytest.approx([h.score for h in kept], abs=1e-6)


@pytest.mark.parametrize("store", STORES)
@pytest.mark.parametrize(
    ("where", "message"),
    [
        ({"n": {"near": 3}}, "'near'; known are eq, ne, gt, gte, lt, lte, in, exists"),
        ({"n": {"in": "abc"}}, "'in' takes a list, not 'abc'"),
    ],
)
def test_every_store_refuses_filters_that_mean_nothing(retrievers, store, where, message):
    with pytest.raises(SettingsError, match=message):
        retrievers[1][store].retrieve([Query("a", "moon", where)], 5)


@pytest.mark.parametrize("store", STORES)
def test_no_queries_no_hits(retrievers, store):
    assert retrievers[1][store].retrieve([], 5) == []
