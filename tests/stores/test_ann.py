"""Approximate indexes of coded vectors: rescored, filtered, measured and tuned."""

from __future__ import annotations

import json
from dataclasses import replace
from itertools import pairwise
from pathlib import Path

import numpy as np
import psutil
import pytest
from numpy.typing import NDArray
from ragkit.indexers.__main__ import app
from ragkit.indexers.build import bytes_of

from ragkit.console import run
from ragkit.errors import SettingsError
from ragkit.stores import ann_settings
from ragkit.stores.ann import build_ann, bytes_a_vector
from ragkit.stores.ann_settings import AnnSettings, Codes, Kind, search_settings
from ragkit.stores.dense import DenseStore
from ragkit.stores.index import Index
from ragkit.stores.limits import Memory
from ragkit.stores.recall import Sample, documents_sample, tune
from ragkit.types import Document

ROWS, DIMENSION, K = 4000, 32, 10
CODED = {
    "SQ8": AnnSettings(codes="int8"),
    "RaBitQ": AnnSettings(codes="binary"),
    "IVF62,SQ8": AnnSettings("ivf", codes="int8"),
    "IVF62,RaBitQ": AnnSettings("ivf", codes="binary"),
    "HNSW32,SQ8": AnnSettings("hnsw", codes="int8"),
    "IVF62,PQ8x4fs": AnnSettings("ivfpq"),
}
Vectors = NDArray[np.float32]


def drawn(rows: int, seed: int) -> Vectors:
    """Normalised vectors in 40 clusters."""
    centres = np.random.default_rng(0).standard_normal((40, DIMENSION))
    random = np.random.default_rng(seed)
    points = centres[random.integers(0, 40, rows)] + random.standard_normal((rows, DIMENSION))
    return (points / np.linalg.norm(points, axis=1, keepdims=True)).astype(np.float32)


@pytest.fixture(scope="module")
def vectors() -> Vectors:
    return drawn(ROWS, 1)


@pytest.fixture(scope="module")
def files(vectors: Vectors, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    folder = tmp_path_factory.mktemp("ann")
    paths = {factory: folder / f"{n}.faiss" for n, factory in enumerate(CODED)}
    for factory, settings in CODED.items():
        assert settings.factory_for(ROWS, DIMENSION) == factory
        build_ann([vectors[:1500], vectors[1500:]], settings, paths[factory])
    return paths


def store(vectors: Vectors, file: Path, rescore: int = 0, search: str = "") -> DenseStore:
    return DenseStore([vectors[:1500], vectors[1500:]], file, search, rescore=rescore)


def recall(found: list[NDArray[np.int64]], scores: NDArray[np.float64]) -> float:
    best = np.argsort(-scores, axis=1)[:, :K]
    pairs = zip(found, best, strict=True)
    return float(np.mean([len({*a.tolist()} & {*b.tolist()}) / K for a, b in pairs]))


@pytest.mark.parametrize("factory", CODED)
def test_scores_are_those_of_the_embeddings(
    vectors: Vectors, files: dict[str, Path], factory: str
) -> None:
    queries = drawn(40, 2)
    exact = queries.astype(np.float64) @ vectors.T.astype(np.float64)
    found, own = store(vectors, files[factory]).search(queries, K)
    again, scores = store(vectors, files[factory], 16).search(queries, K)
    for query in range(len(queries)):
        np.testing.assert_allclose(scores[query], exact[query, again[query]], atol=1e-5)
        assert len(again[query]) == K and (np.diff(scores[query]) <= 0).all()
    assert not all(
        np.allclose(own[query], exact[query, found[query]], atol=1e-4)
        for query in range(len(queries))
    )
    every = "nprobe=62" if "IVF" in factory else "efSearch=4000" if "HNSW" in factory else ""
    assert recall(store(vectors, files[factory], 16, every).search(queries, K)[0], exact) > 0.95
    assert recall(again, exact) >= recall(found, exact)


@pytest.mark.parametrize("factory", CODED)
def test_filters_and_deleted_rows(
    vectors: Vectors, files: dict[str, Path], factory: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("ragkit.stores.dense._EXACT_BELOW", 0)
    queries, random = drawn(20, 3), np.random.default_rng(4)
    gone = [np.sort(random.permutation(1500)[:400]), np.sort(random.permutation(2500)[:900])]
    kept = np.delete(vectors, np.concatenate([gone[0], gone[1] + 1500]), axis=0)
    parts = [vectors[:1500], vectors[1500:]]
    opened = DenseStore(parts, files[factory], rescore=64, deleted=gone)
    mask = random.random(len(kept)) < 0.6
    for allowed in (None, mask):
        exact = queries.astype(np.float64) @ kept.T.astype(np.float64)
        if allowed is not None:
            exact[:, ~allowed] = -np.inf
        found, scores = opened.search(queries, K, allowed)
        for query in range(len(queries)):
            np.testing.assert_allclose(scores[query], exact[query, found[query]], atol=1e-5)
        assert recall(found, exact) > 0.9


def test_only_queries_that_find_too_few_are_searched_exactly(
    vectors: Vectors, files: dict[str, Path]
) -> None:
    queries = drawn(60, 5)
    opened = store(vectors, files["IVF62,SQ8"], 4, "nprobe=1")
    exact, _ = opened.search(queries, 50, exact=True)
    bare, _ = opened.search(queries, 50, whole=False)
    found, scores = opened.search(queries, 50)
    short = [len(row) < 50 for row in bare]
    assert any(short) and not all(short)
    for query, few in enumerate(short):
        wanted = exact if few else bare
        assert found[query].tolist() == wanted[query].tolist()
        np.testing.assert_allclose(scores[query], vectors[found[query]] @ queries[query], atol=1e-5)
    assert any(found[n].tolist() != exact[n].tolist() for n, few in enumerate(short) if not few)


@pytest.mark.parametrize("factory", CODED)
def test_a_tuned_search_reaches_its_target(
    vectors: Vectors, files: dict[str, Path], factory: str
) -> None:
    efforts = []
    for target in (0.7, 0.9, 0.99):
        settings = replace(CODED[factory], target_recall=target)
        tuned = tune([vectors[:1500], vectors[1500:]], files[factory], settings, factory)
        assert tuned.recall >= target and tuned.queries == 200
        fresh = store(vectors, files[factory], tuned.rescore, tuned.search)
        assert documents_sample(fresh).recall().mean() == pytest.approx(tuned.recall)
        efforts.append((int(tuned.search.partition("=")[2] or 0), tuned.rescore))
    assert all(after >= before or after[1] > before[1] for before, after in pairwise(efforts))
    assert efforts[-1] != efforts[0]


@pytest.mark.parametrize("factory", ["HNSW32,SQ8", "IVF62,SQ8", "IVF62,RaBitQ", "HNSW32,Flat"])
def test_a_tuned_search_holds_for_few_hits_and_for_filters(
    vectors: Vectors, tmp_path: Path, factory: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("ragkit.stores.dense._EXACT_BELOW", 0)
    kind: Kind = "hnsw" if "HNSW" in factory else "ivf"
    codes: dict[str, Codes] = {"SQ8": "int8", "RaBitQ": "binary", "Flat": "float32"}
    settings = AnnSettings(kind, codes=codes[factory.split(",")[1]], target_recall=0.95)
    build_ann([vectors], settings, tmp_path / "x.faiss")
    tuned = tune([vectors], tmp_path / "x.faiss", settings, factory)
    opened = store(vectors, tmp_path / "x.faiss", tuned.rescore, tuned.search)
    queries, random = drawn(200, 6), np.random.default_rng(7)
    exact = queries.astype(np.float64) @ vectors.T.astype(np.float64)
    for k in (1, 3, K):
        best = np.argsort(-exact, axis=1)[:, :k]
        found = opened.search(queries, k)[0]
        right = [len({*a.tolist()} & {*b.tolist()}) for a, b in zip(found, best, strict=True)]
        assert np.mean(right) / k > 0.88, k
    for share in (0.3, 0.1, 0.03):
        mask = random.random(ROWS) < share
        filtered = np.where(mask, exact, -np.inf)
        assert recall(opened.search(queries, K, mask)[0], filtered) > 0.85, share


def test_many_queries_are_searched_in_blocks(
    vectors: Vectors, files: dict[str, Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    opened, queries = store(vectors, files["IVF62,RaBitQ"], 16, "nprobe=3"), drawn(50, 8)
    whole = opened.search(queries, K)
    monkeypatch.setattr("ragkit.stores.dense._QUERIES", 7)
    for ours, theirs in zip(opened.search(queries, K), whole, strict=True):
        np.testing.assert_array_equal(np.array(ours), np.array(theirs))


def test_equal_vectors_stand_in_row_order(tmp_path: Path) -> None:
    vectors = np.repeat(drawn(40, 9), 25, axis=0)
    build_ann([vectors], AnnSettings(codes="int8"), tmp_path / "x.faiss")
    found, scores = DenseStore([vectors], tmp_path / "x.faiss", rescore=1).search(drawn(20, 10), 19)
    for rows, of in zip(found, scores, strict=True):
        assert rows.tolist() == [*rows[np.lexsort((rows, -of))]]
        assert len(np.unique(of)) == len({row // 25 for row in rows.tolist()})


def test_what_is_given_is_not_tuned() -> None:
    assert AnnSettings("auto").recall_wanted() == 0.95
    assert AnnSettings("auto", search="nprobe=2").recall_wanted() is None
    assert AnnSettings("auto", factory="IVF4,Flat").recall_wanted() is None
    assert AnnSettings("auto", factory="IVF4,Flat", target_recall=0.9).recall_wanted() == 0.9
    assert AnnSettings("ivfpq").factory_for(20, 32) == ""


def test_a_target_that_codes_cannot_reach_is_told(
    vectors: Vectors, files: dict[str, Path], caplog: pytest.LogCaptureFixture
) -> None:
    settings = replace(CODED["RaBitQ"], target_recall=0.99, rescore=1)
    tuned = tune([vectors], files["RaBitQ"], settings, "RaBitQ")
    assert tuned.rescore == 1 and tuned.recall < 0.9
    assert f"finds {tuned.recall:.3f} of the best 10, not 0.990" in caplog.text


def test_recall_counts_equals_and_leaves_the_query_out() -> None:
    vectors = np.repeat(np.eye(8, DIMENSION, dtype=np.float32), 30, axis=0)
    exact = DenseStore([vectors])
    assert documents_sample(exact, 50).recall().tolist() == [1.0] * 50

    class Other(DenseStore):
        def search(self, vectors, k, mask=None, *, exact=False, whole=True):  # type: ignore[no-untyped-def]
            rows, scores = super().search(vectors, 240, mask, exact=exact)
            if not exact:  # half of what it finds is of another cluster
                return [np.r_[row[10:15], row[100:200]][:k] for row in rows], scores
            return [row[:k] for row in rows], scores

    assert Sample(Other([vectors]), vectors[:3]).recall().tolist() == [0.5] * 3
    few = DenseStore([vectors[:1]])
    assert documents_sample(few).recall().tolist() == [1.0]  # there is nothing to be found


@pytest.mark.parametrize("factory", [*CODED, "IVF62,Flat", "HNSW32,Flat", "PCA8,IVF9,SQ8"])
def test_the_size_of_an_index_is_told_before_it_is_built(
    vectors: Vectors, tmp_path: Path, factory: str
) -> None:
    build_ann([vectors], AnnSettings(factory=factory), tmp_path / "x.faiss")
    size = (tmp_path / "x.faiss").stat().st_size
    told = ROWS * bytes_a_vector(factory, DIMENSION)
    assert 0.85 * size - 20_000 < told < 1.15 * size


def test_an_index_that_would_not_fit_is_refused_before_anything_is_encoded(
    tmp_path: Path, hash_encoder: object, capsys: pytest.CaptureFixture[str]
) -> None:
    held = psutil.Process().memory_info().rss
    memory = Memory(held + 330_000_000)
    memory.check_ann(AnnSettings("ivf"), 70_000, 384)
    assert 39 * 1058 < memory.training_vectors < 100_000  # FAISS wants 39 for each of the lists
    with pytest.raises(SettingsError, match=r"IVF1073,Flat over 120,000 vectors takes .*--codes"):
        memory.check_ann(AnnSettings("ivf", factory="IVF1073,Flat"), 120_000, 384)
    memory.check_ann(AnnSettings("ivf", codes="int8"), 80_000, 384)
    with pytest.raises(SettingsError, match=r"IVF1265,RFlat"):
        memory.check_ann(AnnSettings(factory="IVF1265,RFlat"), 100_000, 384)
    assert 1 << 20 < memory.segment_bytes < 330_000_000 / 28
    with pytest.raises(SettingsError, match=r"taken before anything is read\. Give at least"):
        Memory(held)
    corpus = tmp_path / "c.jsonl"
    corpus.write_text('{"id": "1", "text": "tin"}\n')
    command = ["build", str(corpus), "--index", str(tmp_path / "kb"), "--stores", "bm25"]
    for size, seen in (("10MB", "--max-memory 10MB"), ("lots", "'lots' is no size")):
        assert run(app, [*command, "--max-memory", size]) == 2
        assert seen in capsys.readouterr().err and not (tmp_path / "kb").exists()
    assert run(app, [*command, "--max-memory", "64 GiB"]) == 0


@pytest.mark.parametrize(
    ("size", "expected"),
    [("2GB", 2e9), ("1.5 GiB", 1.5 * (1 << 30)), ("800m", 8e8), ("4096", 4096), ("1kib", 1024)],
)
def test_sizes_are_read(size: str, expected: float) -> None:
    assert bytes_of(size) == expected


def test_segments_end_by_their_bytes(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("ragkit.stores.limits.SEGMENT_BYTES", 15_000)
    documents = [Document(str(n), f"tin {n} " * 500) for n in range(12)]
    index = Index.build(tmp_path / "kb", documents, stores=["bm25"])
    sizes = [(folder / "documents.jsonl").stat().st_size for folder in index.folders]
    assert len(sizes) == 3 and max(sizes) <= 15_000 and list(index.documents) == documents
    assert index.bm25.search(["11"], 3)[0][0].tolist() == [11]
    index.add([Document("long", "zinc " * 9000)])  # longer than a segment is
    assert Index.open(tmp_path / "kb").compact().documents.ids[-1] == "long"


@pytest.mark.parametrize(
    ("vectors", "factory"),
    [(100, ""), (49_999, ""), (60_000, "IVF937,SQ8"), (6_000_000, "IVF9798,PQ96x4fs")],
)
def test_auto_goes_by_the_number_of_vectors(vectors: int, factory: str) -> None:
    assert AnnSettings("auto").factory_for(vectors, 384) == factory


@pytest.mark.parametrize(("dimension", "parts"), [(384, 96), (30, 6), (7, 1), (3, 1), (100, 25)])
def test_product_quantisation_divides_every_dimension(dimension: int, parts: int) -> None:
    assert AnnSettings("ivfpq").factory_for(640, dimension) == f"IVF10,PQ{parts}x4fs"


def test_what_does_not_go_together_is_refused() -> None:
    cases: list[tuple[dict[str, object], str]] = [
        ({"kind": "ivfpq", "codes": "int8"}, "has codes of its own"),
        ({"factory": "IVF2,Flat", "codes": "binary"}, "has codes of its own"),
        ({"kind": "hnsw", "codes": "binary"}, "no graph of binary codes"),
        ({"codes": "int4"}, "known are float32, int8, binary"),
        ({"target_recall": 0.9}, "the target recall 0.9 is of an approximate index"),
        ({"rescore": 4}, "the rescoring 4 is of an approximate index"),
        ({"kind": "ivf", "target_recall": 1.5}, "above 0 and at most 1, not 1.5"),
        ({"kind": "ivf", "rescore": -1}, "0 to 1000 candidates a hit, not -1"),
        ({"kind": "ivf", "target_recall": 0.9, "search": "nprobe=1"}, "leave 'nprobe=1' out"),
    ]
    for given, message in cases:
        with pytest.raises(SettingsError, match=message):
            AnnSettings(**given)  # type: ignore[arg-type]


def test_an_index_keeps_its_tuned_search(
    tmp_path: Path, hash_encoder: object, capsys: pytest.CaptureFixture[str]
) -> None:
    encoder = hash_encoder()  # type: ignore[operator]
    documents = [Document(str(n), f"text {n}") for n in range(400)]
    path = tmp_path / "kb"
    chosen = AnnSettings("ivf", codes="int8", target_recall=0.9)
    built = Index.build(path, documents, encoder=encoder, ann=chosen)
    kept = built.manifest["ann"]
    assert kept["tuned"]["recall"] >= 0.9 and kept["built"] == "IVF6,SQ8"
    assert search_settings(kept) == (kept["tuned"]["search"], kept["tuned"]["rescore"])
    assert ann_settings.ann_settings(kept) == chosen
    assert run(app, ["check", "--index", str(path), "--json"]) == 0
    told = json.loads(capsys.readouterr().out)
    assert told["recall@10"]["mean"] == pytest.approx(kept["tuned"]["recall"], abs=0.06)
    assert told["recall@10"]["n"] == 200
    assert run(app, ["check", "--index", str(path)]) == 0
    assert f"recall@10 {told['recall@10']['mean']:.3f}" in capsys.readouterr().out
    built.add([Document("new", "another")], encoder=encoder)
    Index.open(path).compact()
    again = Index.open(path).manifest["ann"]
    assert again["tuned"]["recall"] >= 0.9 and again["covers"] == 401
    assert run(app, ["info", "--index", str(path)]) == 0
    assert "nprobe=" in capsys.readouterr().out


def test_recall_is_not_measured_of_exact_search(
    tmp_path: Path, hash_encoder: object, capsys: pytest.CaptureFixture[str]
) -> None:
    path, questions = tmp_path / "kb", tmp_path / "q.jsonl"
    questions.write_text('{"id": "1", "question": "what?"}\n')
    Index.build(path, [Document("1", "text")], encoder=hash_encoder())  # type: ignore[operator]
    assert run(app, ["check", "--index", str(path)]) == 0
    assert "recall@10" not in capsys.readouterr().out
    assert run(app, ["check", "--index", str(path), "--questions", str(questions)]) == 2
    assert "its dense search is exact" in capsys.readouterr().err
