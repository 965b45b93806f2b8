"""An index that grows and shrinks: at every step as a fresh build of what it holds by then."""

import json
import random
import shutil

import numpy as np
import pytest

import ragkit.stores.ann
import ragkit.stores.dense
import ragkit.stores.embeddings
import ragkit.stores.folder
import ragkit.stores.limits
import ragkit.stores.segments
from ragkit.errors import DataError, IndexStateError, ModelError, SettingsError
from ragkit.retrievers import Bm25Retriever
from ragkit.splitting import split
from ragkit.stores.ann_settings import AnnSettings
from ragkit.stores.bm25 import Bm25Settings
from ragkit.stores.compact import Compacted, compact_index, uncovered
from ragkit.stores.dense import DenseStore
from ragkit.stores.grow import Grown, add_documents, delete_documents, whole
from ragkit.stores.index import Index
from ragkit.stores.live import Live, deleted_records, live_rows
from ragkit.types import Document, Query, quiet

SEGMENT, DIMENSION = 7, 8
VARIANTS = [Bm25Settings(variant) for variant in ("lucene", "okapi", "l", "plus")]
EXHAUSTIVE = {
    "flat": AnnSettings(),
    "ivf": AnnSettings(factory="IVF2,Flat", search="nprobe=2"),
    "hnsw": AnnSettings("hnsw", search="efSearch=1000"),
    "RR8,HNSW8,Flat": AnnSettings(factory="RR8,HNSW8,Flat", search="efSearch=1000"),
    "IVF2,SQ8,RFlat": AnnSettings(factory="IVF2,SQ8,RFlat", search="nprobe=2,k_factor_rf=1000"),
    "int8": AnnSettings(codes="int8", rescore=1000),
    "binary": AnnSettings(codes="binary", rescore=1000),
}
WORDS = "moon sun tin brie ".split()
QUERIES = ["moon", "tin brie", "sun sun moon x3", "x1 x2 x5", "nothing here"]


def draw(rng, identifier):
    """A document of words that others share, and some of its own."""
    text = " ".join(rng.choice([*WORDS, f"x{rng.randrange(9)}"]) for _ in range(rng.randint(1, 12)))
    return Document(identifier, text, rng.choice(["", "tin"]), {"n": rng.randrange(4)})


@pytest.fixture(autouse=True)
def small(monkeypatch):
    monkeypatch.setattr(ragkit.stores.limits, "SEGMENT_DOCUMENTS", SEGMENT)
    monkeypatch.setattr(ragkit.stores.embeddings, "_WINDOW", 4)
    monkeypatch.setattr(ragkit.stores.dense, "_EXACT_BELOW", 0)


@pytest.fixture
def counting(hash_encoder):
    """An encoder that keeps what it encoded."""

    class Counting(hash_encoder):
        def __init__(self, **options):
            super().__init__(DIMENSION, **options)
            self.texts = []

        def encode_documents(self, texts, *, progress=lambda done: None):
            self.texts += texts
            return super().encode_documents(texts, progress=progress)

    return Counting


def documents_of(count, start=0):
    rng = random.Random(start)
    return [draw(rng, f"d{n}") for n in range(start, start + count)]


def build(path, documents, encoder, kind="flat"):
    return Index.build(path, documents, encoder=encoder, ann=EXHAUSTIVE[kind])


def listing(folder):
    return {
        path.relative_to(folder).as_posix(): path.read_bytes()
        for path in folder.rglob("*")
        if path.is_file()
    }


def answers(index, encoder):
    """All that an index answers: documents, scores of every variant, dense hits, each filtered."""
    found = [list(index.documents), index.documents.ids, dict(index.documents.rows)]
    for where in ({}, {"n": [1, 2]}):
        queries = [Query(text, text, where) for text in QUERIES]
        for settings in VARIANTS:
            hits = Bm25Retriever(index, settings).retrieve(queries, 5)
            found.append([[(hit.document, hit.score) for hit in each] for each in hits])
        vectors = encoder.encode_queries(QUERIES)
        found.append(
            [each.tolist() for each in index.dense.search(vectors, 5, index.mask(where))[0]]
        )
    return found


def as_built_of(index, documents, encoder, tmp_path):
    """Compare an index with one that is built of the documents, and with brute force."""
    assert index.check() == [] and len(index) == len(documents)
    assert set(listing(index.path)) == {"manifest.json", *index.files()}
    assert [index.documents[row] for row in range(len(index))] == list(index.documents) == documents
    assert index.documents.ids == [document.id for document in documents]
    fresh = Index.build(tmp_path / "fresh", documents, encoder=encoder, replace=True)
    for settings in VARIANTS:
        ours, theirs = (each.bm25.with_settings(settings) for each in (index, fresh))
        for text in [*QUERIES, *WORDS, *(f"x{n}" for n in range(9))]:
            assert ours.idf(text) == pytest.approx(theirs.idf(text), abs=1e-12)
            np.testing.assert_allclose(ours.scores(text), theirs.scores(text), rtol=0, atol=1e-12)
        masks = [None, *(fresh.mask({"n": n}) for n in range(4)), fresh.mask({"id": {"ne": "d1"}})]
        for mask in masks:
            for k in (1, 3, 100):
                got, expected = (each.search(QUERIES, k, mask) for each in (ours, theirs))
                for row, true in zip(got[0], expected[0], strict=True):
                    np.testing.assert_array_equal(row, true)
                for score, true in zip(got[1], expected[1], strict=True):
                    np.testing.assert_allclose(score, true, rtol=0, atol=1e-12)
    vectors = encoder.encode_queries([document.contents for document in documents])
    np.testing.assert_array_equal(index.dense.vectors(np.arange(len(documents))), vectors)
    asked = encoder.encode_queries(QUERIES)
    scores = asked @ vectors.T
    for mask in masks:
        assert mask is None or (index.mask({}) is None and len(mask) == len(documents))
        allowed = np.flatnonzero(np.ones(len(documents), bool) if mask is None else mask)
        for k in (1, 3, 100):
            found, told = index.dense.search(asked, k, mask)
            for query in range(len(QUERIES)):
                best = np.sort(scores[query, allowed])[::-1][:k]
                np.testing.assert_allclose(told[query], best, rtol=0, atol=1e-5)
                np.testing.assert_allclose(scores[query, found[query]], best, rtol=0, atol=1e-5)
                assert set(found[query].tolist()) <= set(allowed.tolist())
                assert len(set(found[query].tolist())) == min(k, len(allowed))


class Course:
    """A course of random changes, and the documents that must be there after each."""

    def __init__(self, path, encoder, kind, seed):
        self.rng = random.Random(seed)
        self.documents = [draw(self.rng, f"d{n}") for n in range(self.rng.randint(3, 20))]
        self.encoder, self.number = encoder, len(self.documents)
        self.index = build(path, self.documents, encoder, kind)

    def step(self):
        name = self.rng.choice(["add", "add", "update", "update", "delete", "delete", "compact"])
        getattr(self, name)()

    def add(self, update=False):
        new = [draw(self.rng, f"d{self.number + n}") for n in range(self.rng.randint(1, 9))]
        self.number += len(new)
        self.index = self.index.add(new, encoder=self.encoder, update=update)
        self.documents += new

    def update(self):
        chosen = self.rng.sample(self.documents, self.rng.randint(1, len(self.documents)))
        given = [self.rng.choice([old, draw(self.rng, old.id)]) for old in chosen]
        changed = [new for new in given if new not in self.documents]
        gone = {new.id for new in changed}
        self.index = self.index.add(given, encoder=self.encoder, update=True)
        self.documents = [old for old in self.documents if old.id not in gone] + changed

    def delete(self):
        count = self.rng.randint(0, len(self.documents) - 1)
        gone = {document.id for document in self.rng.sample(self.documents, count)}
        self.index = self.index.delete(gone)
        self.documents = [old for old in self.documents if old.id not in gone]

    def compact(self):
        try:
            self.index = self.index.compact()
        except SettingsError as error:  # FAISS cannot train on so few vectors
            assert "FAISS cannot build" in str(error)


# --- as a fresh build


@pytest.mark.parametrize("kind", EXHAUSTIVE)
@pytest.mark.parametrize("seed", range(4))
def test_any_course_of_changes_is_as_a_fresh_build(tmp_path, counting, kind, seed):
    course = Course(tmp_path / "kb", counting(), kind, seed)
    for _ in range(6):
        course.step()
        as_built_of(course.index, course.documents, course.encoder, tmp_path)


@pytest.mark.parametrize("seed", range(4))
def test_a_refresh_amid_changes(tmp_path, counting, seed):
    course = Course(tmp_path / "kb", counting(), "hnsw", seed)
    for step in range(3):
        course.step()
        course.delete()
        new = counting(name=f"new{step}")
        # Rows of another encoder have other vectors.
        new._vector = lambda text, old=new._vector, step=step: np.roll(old(text), step + 1)
        course.index, course.encoder = course.index.refresh(new), new
        assert sorted(new.texts) == sorted(d.contents for d in course.documents)
        assert course.index.manifest["deleted"] == []
        as_built_of(course.index, course.documents, course.encoder, tmp_path)


def test_a_compacted_index_has_the_files_of_a_fresh_build(tmp_path, counting):
    encoder = counting()
    documents = documents_of(30)
    index = build(tmp_path / "kb", documents[:20], encoder, "hnsw")
    index = index.add(documents[20:], encoder=encoder).delete(["d3", "d19", "d29"])
    kept = [document for document in documents if document.id not in {"d3", "d19", "d29"}]
    assert [s["documents"] for s in index.manifest["segments"]] == [7, 7, 6, 7, 3]
    before = len(encoder.texts)
    index = index.compact()
    assert len(encoder.texts) == before
    fresh = build(tmp_path / "fresh", kept, encoder, "hnsw")
    files = [[each["files"] for each in i.manifest["segments"]] for i in (index, fresh)]
    assert files[0] == files[1] and index.manifest["deleted"] == []
    assert index.manifest["ann"]["hash"] == fresh.manifest["ann"]["hash"]
    as_built_of(index, kept, encoder, tmp_path)


def test_compacting_leaves_full_segments_and_what_is_compact(tmp_path, counting):
    encoder, documents = counting(), documents_of(17)
    index = build(tmp_path / "kb", documents, encoder)
    before = listing(tmp_path)
    assert compact_index(index, quiet) == Compacted()
    assert listing(tmp_path) == before
    index = index.add(documents_of(2, 17), encoder=encoder).delete(["d15"])
    names = [segment["name"] for segment in index.manifest["segments"]]
    told = []
    assert compact_index(index, lambda *args: told.append(args)) == Compacted(2, 1, 0)
    index = Index.open(index.path)
    assert [s["documents"] for s in index.manifest["segments"]] == [7, 7, 4]
    assert [segment["name"] for segment in index.manifest["segments"]][:2] == names[:2]
    assert ("copy documents", 18, 18) in told and ("copy vectors", 18, 18) in told
    assert compact_index(index, quiet) == Compacted()


def test_an_approximate_index_over_full_segments_is_built_anew(tmp_path, counting):
    encoder, documents = counting(), documents_of(14)
    index = build(tmp_path / "kb", documents[:7], encoder, "hnsw").add(
        documents[7:], encoder=encoder
    )
    assert uncovered(index) == 7
    assert compact_index(index, quiet) == Compacted(0, 0, 7)
    index = Index.open(index.path)
    assert uncovered(index) == 0 and index.manifest["ann"]["covers"] == 14
    as_built_of(index, documents, encoder, tmp_path)


@pytest.mark.parametrize("kind", ["flat", "hnsw"])
def test_a_segment_without_a_live_document_goes_unless_the_ann_counts_it(tmp_path, counting, kind):
    encoder, documents = counting(), documents_of(20)
    index = build(tmp_path / "kb", documents, encoder, kind)
    index = index.delete(document.id for document in documents[7:14])
    sizes = [segment["documents"] for segment in index.manifest["segments"]]
    assert sizes == ([7, 6] if kind == "flat" else [7, 7, 6])
    kept = documents[:7] + documents[14:]
    as_built_of(index, kept, encoder, tmp_path)
    as_built_of(index.refresh(counting(name="new")), kept, encoder, tmp_path)


@pytest.mark.parametrize("stores", [("bm25",), ("dense",)])
def test_an_index_of_one_store_grows(tmp_path, counting, stores):
    encoder = counting() if "dense" in stores else None
    documents = documents_of(12)
    index = Index.build(tmp_path / "kb", documents[:8], encoder=encoder, stores=stores)
    index = index.add(documents[8:], encoder=encoder).delete(["d2"])
    for _ in range(2):
        assert index.check() == [] and index.stores == stores
        assert list(index.documents) == documents[:2] + documents[3:]
        index = index.compact()


def test_an_index_of_before_growth_is_read_and_grows(tmp_path, counting):
    encoder, documents = counting(), documents_of(12)
    index = build(tmp_path / "kb", documents[:9], encoder, "hnsw")
    manifest = json.loads((index.path / "manifest.json").read_text())
    del manifest["ann"]["covers"]
    (index.path / "manifest.json").write_text(json.dumps(manifest))
    index = Index.open(index.path)
    assert uncovered(index) == 0
    index = index.add(documents[9:], encoder=encoder).delete(["d0"])
    assert (uncovered(index), index.manifest["ann"]["covers"]) == (3, 9)
    as_built_of(index, documents[1:], encoder, tmp_path)


# --- nothing twice


def test_what_is_there_is_neither_written_nor_encoded_again(tmp_path, counting):
    encoder, documents = counting(), documents_of(10)
    index = build(tmp_path / "kb", documents, encoder)
    files = listing(tmp_path)
    encoder.texts.clear()
    done = add_documents(index, documents, encoder, True, whole, quiet)
    assert done == Grown(unchanged=10) and encoder.texts == []
    assert listing(tmp_path) == files
    changed = [Document("d3", documents[3].text, documents[3].title, {"n": 99})]
    changed += [Document("d4", "quite new"), Document("e", documents[5].text, documents[5].title)]
    done = add_documents(index, [*documents[:3], *changed], encoder, True, whole, quiet)
    assert done == Grown(1, 2, 3, 0, rows_written=3, rows_deleted=2, encoded=2)
    assert encoder.texts == [
        "quite new",
        documents[5].contents,
    ]  # of "d3" the vector is the old one
    kept = documents[:3] + documents[5:] + changed
    as_built_of(Index.open(index.path), kept, encoder, tmp_path)


def pieces(documents):
    return split(documents, max_tokens=8, overlap=2)


def long(identifier, *numbers, **metadata):
    return Document(identifier, " ".join(f"Moon {n} is up." for n in numbers), "", metadata)


def test_pieces_are_replaced_and_deleted_with_their_document(tmp_path, counting):
    encoder = counting()
    first = [long("p", *range(4), n=1), long("q", 8, 9), Document("p#x", "no piece"), long("r", 1)]
    index = Index.build(tmp_path / "kb", pieces(first), encoder=encoder)
    assert index.documents.ids == ["p#1", "p#2", "p#3", "p#4", "q#1", "q#2", "p#x", "r"]

    def update(*documents):
        nonlocal index
        encoder.texts.clear()
        done = add_documents(index, documents, encoder, True, pieces, quiet)
        index = Index.open(index.path)
        assert index.check() == []
        return done

    assert update(*first) == Grown(unchanged=4)
    # Another end: what was not touched stays, and what moved keeps its vector.
    done = update(long("p", 0, 1, 22, 3, n=1))
    assert done == Grown(changed=1, rows_written=2, rows_deleted=2, encoded=1)
    assert index.documents.ids == ["p#1", "p#2", "q#1", "q#2", "p#x", "r", "p#3", "p#4"]
    assert encoder.texts == ["Moon 22 is up."]
    assert [piece.text for piece in index.pieces("p")] == [
        f"Moon {n} is up." for n in (0, 1, 22, 3)
    ]
    # Fewer pieces, then whole, then pieces again.
    assert update(long("p", 0, 1, n=1)).rows_deleted == 2
    assert [piece.id for piece in index.pieces("p")] == ["p#1", "p#2"]
    done = update(long("p", 5, n=1))
    assert (done.rows_written, done.rows_deleted) == (1, 2)
    assert index.documents.ids == ["q#1", "q#2", "p#x", "r", "p"]
    assert update(long("p", *range(3), n=1)).rows_deleted == 1
    assert [piece.id for piece in index.pieces("p")] == ["p#1", "p#2", "p#3"]
    # Metadata alone: no text is encoded.
    done = update(long("p", *range(3), n=2))
    assert (done.rows_written, done.rows_deleted, done.encoded) == (3, 3, 0)
    # By the parent's id all of them go, and a document that merely is called so stays.
    assert delete_documents(index, ["p", "q"]) == Grown(deleted=2, rows_deleted=5)
    assert Index.open(index.path).documents.ids == ["p#x", "r"]


def test_pieces_of_pieces_and_a_piece_that_was_deleted(tmp_path, counting):
    encoder = counting()
    parts = list(split([long("p", *range(8))], max_tokens=16, overlap=0))
    index = Index.build(tmp_path / "kb", pieces(parts), encoder=encoder)
    ids = index.documents.ids
    assert ids[0] == "p#1#1" and len(ids) == 8
    assert add_documents(index, parts, encoder, True, pieces, quiet) == Grown(unchanged=len(parts))
    assert delete_documents(index, [parts[0].id]).rows_deleted == len(ids) - len(
        [i for i in ids if not i.startswith("p#1#")]
    )
    index = Index.open(index.path)
    assert {i.rpartition("#")[0] for i in index.documents.ids} == {part.id for part in parts[1:]}
    done = add_documents(index, parts, encoder, True, pieces, quiet)
    assert (done.added, done.unchanged) == (1, len(parts) - 1)
    index = Index.open(index.path)
    index = index.delete(["p#1#1"])
    done = add_documents(index, parts, encoder, True, pieces, quiet)
    assert (done.changed, done.rows_written, done.rows_deleted) == (1, 1, 0)
    index = Index.open(index.path)
    with pytest.raises(SettingsError, match="no document would be left"):
        index.delete(["p"])


def test_users_own_ids_with_numbers_are_not_pieces(tmp_path, counting):
    documents = [
        Document("a", "tin"),
        Document("a#1", "moon"),
        Document("a#2", "sun", "", {"parent": "a"}),
    ]
    index = build(tmp_path / "kb", documents, counting())
    assert delete_documents(index, "a") == Grown(deleted=1, rows_deleted=1)
    assert Index.open(index.path).documents.ids == ["a#1", "a#2"]
    with pytest.raises(DataError, match="no document has the id 'a'"):
        Index.open(index.path).delete(["a"])


# --- readers of the index as it was


@pytest.mark.parametrize("kind", ["flat", "hnsw"])
def test_open_indexes_keep_what_they_show(tmp_path, counting, kind):
    encoder = counting()
    index = build(tmp_path / "kb", documents_of(12), encoder, kind).delete(["d5"])
    used, unused = Index.open(index.path), Index.open(index.path)
    before = answers(used, encoder)
    changed = index.add(documents_of(3, 12), encoder=encoder)
    assert answers(used, encoder) == before
    # What was not used before finds its files too: they are still of the index.
    assert answers(unused, encoder) == before
    late = Index.open(index.path)
    changed = changed.delete(["d1", "d8"])
    assert late.documents.ids == [f"d{n}" for n in range(15) if n != 5]
    late = Index.open(index.path)
    changed.compact()
    assert answers(used, encoder) == answers(unused, encoder) == before
    with pytest.raises(IndexStateError, match=r"replaced since it was opened\. Open it again"):
        _ = late.documents


def test_a_change_of_an_index_that_has_changed_is_refused(tmp_path, counting):
    encoder = counting()
    old = build(tmp_path / "kb", documents_of(12), encoder)
    old.delete(["d1"])
    before = listing(tmp_path)
    for change in (
        lambda: old.delete(["d2"]),
        lambda: old.add([Document("x", "y")], encoder=encoder),
        lambda: old.add(documents_of(1), encoder=encoder, update=True),
    ):
        with pytest.raises(IndexStateError, match="replaced since it was opened"):
            change()
    new = Index.open(old.path).delete(["d2"])
    with pytest.raises(IndexStateError, match="replaced since it was opened"):
        new.delete(["d3"]) and new.compact()
    assert before.keys() <= listing(tmp_path).keys()


# --- what is refused, with the index as it was


@pytest.fixture
def kb(tmp_path, counting):
    return build(tmp_path / "kb", documents_of(12), counting(), "hnsw").delete(["d9"])


@pytest.mark.parametrize(
    ("documents", "options", "error", "seen"),
    [
        (
            [Document("d1", "x")],
            {},
            DataError,
            "holds a document 'd1' already.*ragkit-index update",
        ),
        ([Document("x", "y"), Document("x", "z")], {}, DataError, "two documents have the id 'x'"),
        ([Document("x", " ")], {}, DataError, "its text is empty"),
        ([Document("x", "y", "", {"n": {1}})], {}, DataError, "'x' cannot be stored"),
        ([], {}, DataError, "no documents to add"),
        ([Document("x", "y")], {"encoder": None}, SettingsError, "needs the encoder 'hash'"),
    ],
)
def test_additions_that_are_refused(kb, counting, documents, options, error, seen):
    before = listing(kb.path)
    with pytest.raises(error, match=seen):
        kb.add(documents, **{"encoder": counting()} | options)
    assert listing(kb.path) == before


def test_pieces_and_documents_of_one_id_are_refused(tmp_path, counting):
    encoder = counting()
    index = Index.build(tmp_path / "kb", pieces([long("p", 1, 2), long("q#2", 1)]), encoder=encoder)
    before = listing(tmp_path)
    for given in (
        [long("q", 1, 2)],
        [long("p", 1, 2), long("p#1", 7)],
        [long("p#1", 7), long("p", 1, 2)],
    ):
        with pytest.raises(DataError, match=r"two documents have the id '[pq]#[12]'"):
            index.add(given, encoder=encoder, update=True, split=pieces)
        assert listing(tmp_path) == before


def test_a_split_that_leaves_nothing_is_refused(tmp_path, counting):
    index = build(tmp_path / "kb", [Document("a", "tin")], counting())
    with pytest.raises(SettingsError, match="no document would be left"):
        index.add([Document("a", "new")], encoder=counting(), update=True, split=lambda _: ())
    assert index.check() == []


def test_another_encoder_is_refused(kb, counting):
    before, other = listing(kb.path), counting(name="other")
    seen = r"built with the encoder 'hash'.*'other'.*refresh --index .*kb --encoder other"
    with pytest.raises(IndexStateError, match=seen):
        kb.add([Document("x", "y")], encoder=other)
    assert listing(kb.path) == before and other.texts == []


def test_deletions_that_are_refused(kb):
    before = listing(kb.path)
    with pytest.raises(DataError, match=r"'d9', 'u0', 'u1', 'u2', 'u3' and 2 more.*--missing skip"):
        kb.delete(["d1", "d9", *(f"u{n}" for n in range(6))])
    with pytest.raises(SettingsError, match=r"no document would be left.*Remove the folder"):
        kb.delete(kb.documents.ids)
    assert delete_documents(kb, ["u", "v"], "skip") == Grown()
    assert listing(kb.path) == before
    assert delete_documents(kb, ["u", "d1", "d1"], "skip") == Grown(deleted=1, rows_deleted=1)


def test_an_encoder_that_fails_leaves_the_index(kb, counting):
    before = listing(kb.path)

    class Broken(counting):
        def encode_documents(self, texts, *, progress=lambda done: None):
            raise error

    for error in (KeyboardInterrupt(), ConnectionError("gone"), ModelError("bad")):
        with pytest.raises(type(error)):
            kb.add([Document("x", "y")], encoder=Broken())
        assert listing(kb.path) == before


def failing(error):
    def fail(*args, **options):
        raise error

    return fail


@pytest.mark.parametrize("change", ["add", "delete", "compact", "build"])
@pytest.mark.parametrize(
    ("room", "name"),
    [
        (ragkit.stores.folder, "write_json"),
        (ragkit.stores.folder, "sync_tree"),
        (ragkit.stores.segments.DocumentWriter, "close"),
        (ragkit.stores.segments, "write_postings"),
        (ragkit.stores.segments, "file_hash"),
        (ragkit.stores.folder, "_lock"),
    ],
    ids=lambda value: value if isinstance(value, str) else None,
)
def test_a_disk_that_cannot_be_written(kb, counting, monkeypatch, change, room, name):
    changes = {
        "add": lambda: kb.add([Document("x", "y")], encoder=counting()),
        "delete": lambda: kb.delete(["d1"]),
        "compact": kb.compact,
        "build": lambda: Index.build(kb.path, documents_of(12), encoder=counting(), replace=True),
    }
    before = listing(kb.path)
    monkeypatch.setattr(room, name, failing(OSError(28, "No space left on device")))
    if change == "delete" and name in ("close", "write_postings", "file_hash"):
        changes["delete"]()  # it writes no such thing
        return
    with pytest.raises(SettingsError, match=r"kb: cannot be written \(No space left .*Make room"):
        changes[change]()
    left = listing(kb.path)
    assert {key: data for key, data in left.items() if key in before} == before
    assert Index.open(kb.path).check() == [] and not list(kb.path.glob("segments/.new-*"))
    monkeypatch.undo()
    after = changes[change]()
    assert after.check() == [] and set(listing(kb.path)) == {"manifest.json", *after.files()}


def test_a_second_writer_is_refused(kb, counting):
    class Meanwhile(counting):
        def encode_documents(self, texts, *, progress=lambda done: None):
            for write in (
                lambda: kb.delete(["d1"]),
                lambda: kb.add([Document("z", "y")], encoder=counting()),
                kb.compact,
                lambda: kb.refresh(counting(name="new")),
            ):
                with pytest.raises(IndexStateError, match=r"another build .* is running"):
                    write()
            return super().encode_documents(texts, progress=progress)

    index = kb.add([Document("x", "y")], encoder=Meanwhile())
    assert index.check() == [] and "x" in index.documents.rows


def test_damage_is_not_copied(kb, counting):
    file = max(kb.path.glob("segments/*/documents.jsonl"))
    sound = file.read_bytes()
    file.write_bytes(sound.replace(b'"title": "', b'"titlf": "', 1))
    before = listing(kb.path)
    for change in (kb.compact, lambda: kb.refresh(counting(name="new"))):
        with pytest.raises(IndexStateError, match=r"documents.jsonl: its bytes have changed"):
            change()
    assert listing(kb.path) == before


# --- deleted rows in the manifest


@pytest.mark.parametrize("share", [0, 0.001, 0.5, 1])
def test_deleted_rows_take_little_room(share):
    size = 100_000
    rows = np.flatnonzero(np.random.default_rng(0).random(size) < share)
    records = deleted_records(["a", "b"], Live([size, 3], [rows, np.array([1])]))
    sizes = [{"name": "a", "documents": size}, {"name": "b", "documents": 3}]
    live = live_rows({"segments": sizes, "deleted": records})
    np.testing.assert_array_equal(live.deleted[0], rows)
    assert live.deleted[1].tolist() == [1] and len(live) == size + 2 - len(rows)
    assert len(json.dumps(records)) < 17_000
    assert live_rows({"segments": sizes}).whole


@pytest.mark.parametrize(
    "change",
    [
        {"bits": "!"}, {"bits": "AAAA"}, {"bits": 3}, {"rows": 2}, {"rows": None}, {"segment": "x"},
        {"bits": deleted_records(["a"], Live([80], [np.array([79])]))[0]["bits"]},
    ],
)  # fmt: skip
def test_deleted_rows_that_cannot_be_are_refused(kb, change):
    manifest = json.loads((kb.path / "manifest.json").read_text())
    manifest["deleted"][0] |= change
    (kb.path / "manifest.json").write_text(json.dumps(manifest))
    with pytest.raises(IndexStateError, match=r"cannot be read\. Build the index again"):
        Index.open(kb.path)


def test_exact_search_among_many_deleted_rows():
    rng = np.random.default_rng(0)
    vectors = rng.integers(-3, 4, (500, 3)).astype(np.float32)
    queries = rng.integers(-3, 4, (20, 3)).astype(np.float32)
    # The best ones of the first query are deleted, all but a few at the end.
    order = np.argsort(-(vectors @ queries[0]))
    for deleted in map(np.sort, (order[:450], order[:499], order[450:], order[:1], order[:200])):
        store = DenseStore([vectors], deleted=[deleted])
        kept = np.delete(vectors, deleted, axis=0)
        for k in (1, 7, 1000):
            found, scores = store.search(queries, k)
            for query, row, score in zip(queries, found, scores, strict=True):
                true = kept @ query
                assert score.tolist() == np.sort(true)[::-1][:k].tolist() == true[row].tolist()


def test_a_build_says_what_is_there(kb, counting):
    seen = (
        r"an index here already, of 11 documents \(bm25, dense by hash\)\. .*"
        r"ragkit-index update CORPUS --index .*kb; .*--replace"
    )
    with pytest.raises(SettingsError, match=seen):
        Index.build(kb.path, documents_of(3), encoder=counting())
    shutil.rmtree(kb.path / "segments")
