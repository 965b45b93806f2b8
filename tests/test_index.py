"""The index folder: whole or absent, what was put in comes out, and damage is found and named."""

import json
import os
import re
import shutil
import subprocess
import sys

import numpy as np
import pytest

import ragkit.stores.build
import ragkit.stores.documents
import ragkit.stores.folder
import ragkit.stores.limits
import ragkit.stores.segments
from ragkit import artefacts
from ragkit.artefacts import check_output, new_folder, read_json, write_json
from ragkit.errors import DataError, IndexStateError, SettingsError
from ragkit.retrievers import Bm25Retriever, DenseRetriever
from ragkit.stores.ann_settings import AnnSettings
from ragkit.stores.bm25 import Bm25Settings
from ragkit.stores.index import Index
from ragkit.types import Document, Query

DOCUMENTS = [Document(f"d{n}", f"moon {n}", f"title {n % 3}", {"n": n}) for n in range(40)]
OTHERS = [Document(f"o{n}", f"sun {n}") for n in range(25)]

PLANES = "".join(chr(plane << 16 | 0x41) for plane in range(17)) + "".join(
    chr(code) for code in (0, 1, 9, 10, 13, 0x85, 0x2028, 0x2029, 0x202E, 0xFEFF, 0xFFFE, 0x10FFFF)
)
NAMES = [
    "../../etc/passwd", "/absolute", "a/b/c", ".", "..", ".hidden", "CON", "new\nline", "tab\t",
    "null\0", " ", "", "{context}", "{question}", "%s%n", "<|im_end|>", "<|im_start|>system",
    '"quoted" \\ back', "manifest.json", "é", "e\u0301", "'; DROP TABLE", "-k", "\u202egnp.exe",
    "</s>",
]  # fmt: skip
HOSTILE = [
    *(
        Document(
            name if name.strip() else f"blank{name}",
            f"{name} text {name}",
            name,
            {name: [name, {"in": name}]},
        )
        for name in NAMES
    ),
    Document("planes", PLANES, PLANES[::-1], {"p": PLANES, "n": 1.5, "big": 2**70, "none": None}),
    Document(PLANES, "id of every plane"),
    Document("long", "moon wörld " * 90_000, "t" * 10_000),
    Document("unspoken", "..."),
    *(Document(f"plane {c >> 16}", chr(c)) for c in range(0x10041, 0x110000, 0x10000)),
]


def same(index, documents):
    assert list(index.documents) == documents
    assert [index.documents[row] for row in range(len(index))] == documents
    assert index.documents.ids == [document.id for document in documents]
    assert index.check() == []


def listing(folder):
    return {
        path.relative_to(folder).as_posix(): path.read_bytes() if path.is_file() else None
        for path in folder.rglob("*")
    }


@pytest.fixture
def encoder(hash_encoder):
    return hash_encoder()


@pytest.fixture
def small_segments(monkeypatch):
    monkeypatch.setattr(ragkit.stores.limits, "SEGMENT_DOCUMENTS", 15)


@pytest.fixture(scope="module")
def pristine(tmp_path_factory, hash_encoder):
    """An index of three segments with both stores and an approximate index."""
    path = tmp_path_factory.mktemp("pristine") / "kb"
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(ragkit.stores.limits, "SEGMENT_DOCUMENTS", 15)
        Index.build(path, DOCUMENTS, encoder=hash_encoder(), ann=AnnSettings("hnsw"))
    return path


@pytest.fixture
def damaged(pristine, tmp_path):
    """A copy to be damaged."""
    return shutil.copytree(pristine, tmp_path / "kb")


# --- in and out


@pytest.mark.parametrize("size", [7, 100])
def test_hostile_documents_come_back_as_they_were(tmp_path, encoder, monkeypatch, size):
    monkeypatch.setattr(ragkit.stores.limits, "SEGMENT_DOCUMENTS", size)
    built = Index.build(tmp_path / "kb", iter(HOSTILE), encoder=encoder)
    same(built, HOSTILE)
    index = Index.open(str(tmp_path / "kb"))
    same(index, HOSTILE)
    assert {path.name for path in tmp_path.iterdir()} == {"kb"}
    for row, document in enumerate(HOSTILE):
        assert index.documents.rows[document.id] == row
        hits = Bm25Retriever(index).retrieve([Query("q", "moon", {"id": document.id})], 3)[0]
        assert [hit.document for hit in hits] == [document] * (document.id == "long")
        hits = DenseRetriever(index, encoder).retrieve([Query("q", document.contents)], 1)[0]
        assert hits[0].document.contents == document.contents
        assert hits[0].score == pytest.approx(1, abs=1e-5)


@pytest.mark.parametrize(
    ("document", "seen"),
    [
        (Document("a\ud800", "x"), "surrogates"),
        (Document("x", "lone \udfff"), "surrogates"),
        (Document("x", "y", "", {"n": float("nan")}), "JSON"),
        (Document("x", "y", "", {"n": {1, 2}}), "JSON"),
    ],
)
def test_what_cannot_be_stored_is_named(tmp_path, document, seen):
    with pytest.raises(DataError, match=rf"(?s)document .* cannot be stored: .*{seen}"):
        Index.build(tmp_path / "deep/er/kb", [*DOCUMENTS, document], stores=("bm25",))
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    ("document", "seen"),
    [
        (Document(1, "x"), "document 1: its id is 1, not a string"),
        (Document(" ", "x"), "its id is empty"),
        (Document("a", ""), "document 'a': its text is empty"),
        (Document("a", None), "its text is None"),
        (Document("a", "x", 7), "its title is 7"),
        (Document("a", "x", "", [1]), "its metadata is"),
    ],
)
def test_what_files_cannot_hold_is_refused(tmp_path, document, seen):
    with pytest.raises(DataError, match=re.escape(seen)):
        Index.build(tmp_path / "kb", [*DOCUMENTS, document], stores=("bm25",))
    assert list(tmp_path.iterdir()) == []
    with pytest.raises(DataError, match=re.escape(seen)):
        Bm25Retriever.in_memory([*DOCUMENTS, document])


def test_two_documents_of_one_id_in_memory():
    with pytest.raises(DataError, match="two documents have the id 'twin'"):
        Bm25Retriever.in_memory([Document("twin", "a"), Document("twin", "b")])


def test_a_filter_by_a_field_that_no_document_has_is_warned_of(tmp_path, caplog):
    index = Index.build(tmp_path / "kb", [Document("a", "tin", "", {"year": 1})], stores=("bm25",))
    retriever = Bm25Retriever(index)
    for where in ({"year": 2}, {"id": "b"}, {"yeer": {"exists": False}}):
        retriever.retrieve([Query("q", "tin", where)], 1)
    assert not caplog.records
    retriever.retrieve([Query("q", "tin", {"yeer": 1, "year": 1})], 1)
    assert "none has 'yeer'" in caplog.text


def test_a_query_text_may_hold_anything(pristine, encoder):
    index = Index.open(pristine)
    queries = [Query(str(n), text) for n, text in enumerate([*NAMES, PLANES, "moon " * 100_000])]
    for retriever in (Bm25Retriever(index), DenseRetriever(index, encoder)):
        assert len(retriever.retrieve(queries, 2)) == len(queries)


def test_the_manifest_says_what_there_is(pristine, encoder):
    index = Index.open(pristine)
    assert (len(index), index.stores) == (40, ("bm25", "dense"))
    assert [segment["documents"] for segment in index.manifest["segments"]] == [15, 15, 10]
    assert index.manifest["encoder"] == encoder.describe()
    assert index.manifest["ann"]["built"] == "HNSW32,Flat"
    files = [path for path in pristine.rglob("*") if path.is_file()]
    assert {path.relative_to(pristine).as_posix() for path in files} == {
        "manifest.json", *index.files()
    }  # fmt: skip
    sizes = sum(path.stat().st_size for path in files)
    assert index.size() == sizes - (pristine / "manifest.json").stat().st_size
    assert not [path for path in files if path.suffix in (".pkl", ".pickle", ".pt")]
    assert index.pieces("d7") == [index.documents[7]] and index.pieces("d40") == []


def test_documents_behind_a_filter(tmp_path):
    parts = [Document(f"m#{n}", "moon", "", {"parent": "m", "n": n}) for n in (1, 2, 3)]
    index = Index.build(tmp_path / "kb", [*DOCUMENTS, *parts], stores=("bm25",))
    assert list(index.passing({})) == [*DOCUMENTS, *parts]
    assert list(index.passing({"n": {"lte": 2}})) == [*DOCUMENTS[:3], *parts[:2]]
    assert list(index.passing({"year": 1})) == []
    assert index.pieces("m") == parts and index.pieces("m", {}) == parts
    assert index.pieces("m", {"n": [1, 3]}) == [parts[0], parts[2]]
    assert index.pieces("d7", {"n": 7}) == [DOCUMENTS[7]] and index.pieces("d7", {"n": 8}) == []


@pytest.mark.parametrize("store", ["bm25", "dense"])
def test_an_index_of_one_store(tmp_path, encoder, store):
    given = encoder if store == "dense" else None
    index = Index.build(tmp_path / "kb", DOCUMENTS, encoder=given, stores=(store,))
    assert index.stores == (store,)
    same(index, DOCUMENTS)
    other = {"bm25": "dense", "dense": "bm25"}[store]
    with pytest.raises(IndexStateError, match=f"with the stores {store}, not with {other}"):
        getattr(index, other)
    retriever = Bm25Retriever(index) if store == "bm25" else DenseRetriever(index, encoder)
    hit = retriever.retrieve([Query("q", DOCUMENTS[7].contents)], 1)[0][0]
    assert hit.document == DOCUMENTS[7]


def test_filters_are_remembered_within_bounds(pristine, monkeypatch):
    monkeypatch.setattr(ragkit.stores.documents, "_MASK_BYTES", 3 * 40 + 39)
    documents = Index.open(pristine).documents
    for n in [*range(9), 0]:
        assert documents.mask({"n": {"gte": n}}).tolist() == [row >= n for row in range(40)]
    assert list(documents._masks) == ['{"n": {"gte": 7}}', '{"n": {"gte": 8}}', '{"n": {"gte": 0}}']
    monkeypatch.setattr(ragkit.stores.documents, "_MASK_BYTES", 1)
    assert documents.mask({"id": "d3"}).sum() == 1 and len(documents._masks) <= 3


def test_bm25_settings_and_progress(tmp_path, encoder, small_segments):
    told = []
    index = Index.build(
        tmp_path / "kb",
        DOCUMENTS,
        encoder=encoder,
        bm25=Bm25Settings("plus", 0.9, 0.4, 0.5),
        ann=AnnSettings("ivf", search="nprobe=3"),
        settings={"note": "é"},
        progress=lambda *args: told.append(args),
    )
    assert Index.open(tmp_path / "kb").bm25.settings == Bm25Settings("plus", 0.9, 0.4, 0.5)
    assert index.manifest["settings"] == {"note": "é"}
    last = {stage: (done, total) for stage, done, total in told}
    stages = ("read documents", "BM25", "encode", "IVF1,Flat")
    assert last == dict.fromkeys(stages, (40, 40))


# --- what is refused before anything is written


def test_builds_that_cannot_end_well_are_refused(tmp_path, encoder):
    with pytest.raises(DataError, match="two documents have the id 'd3'"):
        Index.build(tmp_path / "kb", [*DOCUMENTS, DOCUMENTS[3]], stores=("bm25",))
    with pytest.raises(DataError, match="no documents"):
        Index.build(tmp_path / "kb", [], stores=("bm25",))
    with pytest.raises(SettingsError, match="needs an encoder"):
        Index.build(tmp_path / "kb", DOCUMENTS)
    for stores, seen in ((("bm25", "graph"), "asked for: graph"), ((), "asked for: nothing")):
        with pytest.raises(SettingsError, match=seen):
            Index.build(tmp_path / "kb", DOCUMENTS, encoder=encoder, stores=stores)
    assert list(tmp_path.iterdir()) == []


def test_a_foreign_folder_is_left_alone(tmp_path):
    (tmp_path / "home/segments").mkdir(parents=True)
    (tmp_path / "home/thesis.tex").write_text("years of work")
    (tmp_path / "file").write_text("x")
    before = listing(tmp_path)
    for name in ("home", "file"):
        for replace in (False, True):
            with pytest.raises(SettingsError, match="exists and is not an index"):
                Index.build(tmp_path / name, DOCUMENTS, stores=("bm25",), replace=replace)
    with pytest.raises(SettingsError, match="cannot be written"):
        Index.build(tmp_path / "file/kb", DOCUMENTS, stores=("bm25",))
    assert listing(tmp_path) == before


def test_replace(tmp_path, encoder, small_segments):
    path = tmp_path / "kb"
    path.mkdir()
    Index.build(path, DOCUMENTS, encoder=encoder, ann=AnnSettings("hnsw"))
    before = listing(path)
    with pytest.raises(SettingsError, match=r"index here already.*--replace"):
        Index.build(path, OTHERS, stores=("bm25",))
    assert listing(path) == before
    old = Index.open(path)
    assert old.documents[0] == DOCUMENTS[0] and old.dense.dimension == 16
    new = Index.build(path, OTHERS, stores=("bm25",), replace=True)
    same(new, OTHERS)
    assert not before.keys() & set(new.files())
    files = {path.relative_to(new.path).as_posix() for path in path.rglob("*") if path.is_file()}
    assert files == {"manifest.json", *new.files()}
    # A reader of the old index still reads what it has mapped.
    assert list(old.documents) == DOCUMENTS


# --- interruption


def failing(error, at):
    for number, document in enumerate(OTHERS):
        if number == at:
            raise error
        yield document


def explode(error):
    def raising(*args, **kwargs):
        raise error

    return raising


ROOMS = ("new/kb/segments",)


@pytest.mark.parametrize("error", [KeyboardInterrupt(), OSError("disk full"), ValueError("bug")])
@pytest.mark.parametrize("place", ["first", "middle", "encoder", "ann", "postings", "commit"])
@pytest.mark.parametrize("over", [False, True], ids=["new", "replace"])
def test_an_interrupted_build_leaves_what_was_there(
    tmp_path, hash_encoder, monkeypatch, error, place, over
):
    path = tmp_path / "new/kb"
    if over:
        Index.build(path, DOCUMENTS, encoder=hash_encoder(), ann=AnnSettings("hnsw"))
    before = listing(tmp_path)
    monkeypatch.setattr(ragkit.stores.limits, "SEGMENT_DOCUMENTS", 9)
    documents, encoder = iter(OTHERS), hash_encoder()
    if place in ("first", "middle"):
        documents = failing(error, 0 if place == "first" else 20)
    elif place == "encoder":
        encoder = hash_encoder(break_at=7, bad=error)
    else:
        room, name = {
            "ann": (ragkit.stores.build, "build_ann"),
            "postings": (ragkit.stores.segments, "write_postings"),
            "commit": (ragkit.stores.folder, "write_json"),
        }[place]
        monkeypatch.setattr(room, name, explode(error))

    def build(**options):
        return Index.build(path, documents, replace=over, ann=AnnSettings("ivf"), **options)

    full = isinstance(error, OSError) and place in ("ann", "postings", "commit")
    with pytest.raises(SettingsError if full else type(error)):
        build(encoder=encoder)
    if place == "commit":  # files without a manifest may stay; they are in nobody's way
        assert {name: data for name, data in listing(tmp_path).items() if name in before} == before
        assert [name for name in listing(tmp_path) if "/.new" in name] == []
    elif place == "ann":  # what was encoded is kept
        found = {name: data for name, data in listing(tmp_path).items() if ".vectors-" not in name}
        assert {name for name in found if name not in before} <= {"new", "new/kb", *ROOMS}
        assert {name: found[name] for name in before} == before
    else:
        assert listing(tmp_path) == before
    if over:
        same(Index.open(path), DOCUMENTS)
    else:
        with pytest.raises(IndexStateError, match="no index here"):
            Index.open(path)
    monkeypatch.undo()
    documents = iter(OTHERS)
    monkeypatch.setattr(ragkit.stores.limits, "SEGMENT_DOCUMENTS", 9)
    if place in ("ann", "commit"):
        encoder = hash_encoder(break_at=0, bad=AssertionError("encoded again"))
    else:
        encoder = hash_encoder()
    index = build(encoder=encoder)
    same(index, OTHERS)
    files = {name for name, data in listing(path).items() if data is not None}
    assert files == {"manifest.json", *index.files()}


@pytest.mark.parametrize("change", ["build", "add"])
def test_what_was_encoded_before_a_stop_is_not_encoded_again(
    tmp_path, hash_encoder, monkeypatch, change
):
    class Stopping(type(hash_encoder())):
        left, seen = 20, 0

        def encode_documents(self, texts, **options):
            self.seen += len(texts)
            if self.seen > self.left:
                raise KeyboardInterrupt
            return super().encode_documents(texts, **options)

    path, encoder = tmp_path / "kb", Stopping()
    monkeypatch.setattr(ragkit.stores.limits, "SEGMENT_DOCUMENTS", 9)
    if change == "add":
        Index.build(path, DOCUMENTS, encoder=hash_encoder())

    def make():
        if change == "build":
            return Index.build(path, OTHERS, encoder=encoder)
        return Index.open(path).add(OTHERS, encoder=encoder)

    with pytest.raises(KeyboardInterrupt):
        make()
    if change == "add":
        same(Index.open(path), DOCUMENTS)
    encoder.left, encoder.seen = len(OTHERS), 18  # two segments are encoded
    same(make(), [*(DOCUMENTS if change == "add" else []), *OTHERS])
    assert encoder.seen == len(OTHERS)
    assert not list((path / "segments").glob(".vectors-*"))


def test_what_a_killed_build_left_is_in_nobodys_way(tmp_path):
    left = [
        tmp_path / "kb" / name
        for name in (
            "segments/.new-01234567/000001-abcdef/documents.jsonl", "segments/000002-012345/x",
            "ann/0123456789ab.faiss", ".manifest.json.ab_12xyz", ".lock",
        )
    ]  # fmt: skip
    for file in left:
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_text("half a li")
    index = Index.build(tmp_path / "kb", OTHERS, stores=("bm25",))
    same(index, OTHERS)
    assert set(files_of(tmp_path / "kb")) == {"manifest.json", *index.files()}


@pytest.mark.parametrize(
    "name",
    [
        "segments/chapter.tex", "segments/000001-abcdef.bak", "segments/.new-01", "ann/photo.jpg",
        "ann/0123456789ab.faiss.old", "segments/2024/notes", ".manifest.json.backup",
    ],
)  # fmt: skip
def test_a_build_never_removes_what_no_build_made(tmp_path, name):
    for over in (False, True):
        path = tmp_path / f"kb{over}"
        if over:
            Index.build(path, DOCUMENTS, stores=("bm25",))
        (path / name).parent.mkdir(parents=True, exist_ok=True)
        (path / name).write_text("years of work")
        if over:
            same(Index.build(path, OTHERS, stores=("bm25",), replace=True), OTHERS)
        else:
            with pytest.raises(SettingsError, match="exists and is not an index"):
                Index.build(path, DOCUMENTS, stores=("bm25",))
        assert (path / name).read_text() == "years of work"


def test_a_manifest_of_something_else_is_not_replaced(tmp_path):
    for text in ('{"name": "an extension", "version": 3}', "not JSON", "[]"):
        (tmp_path / "manifest.json").write_text(text)
        for replace in (False, True):
            with pytest.raises(SettingsError, match="exists and is not an index"):
                Index.build(tmp_path, OTHERS, stores=("bm25",), replace=replace)
        assert listing(tmp_path) == {"manifest.json": text.encode()}


def test_a_damaged_index_can_be_replaced(damaged):
    (damaged / "manifest.json").write_text('{"format": 1')
    with pytest.raises(SettingsError, match="--replace"):
        Index.build(damaged, OTHERS, stores=("bm25",))
    same(Index.build(damaged, OTHERS, stores=("bm25",), replace=True), OTHERS)


# --- several processes


def test_a_second_build_of_one_index_is_refused(tmp_path):
    path = tmp_path / "kb"

    def documents(replace):
        for number, document in enumerate(DOCUMENTS):
            if number == 5:
                with pytest.raises(IndexStateError, match=r"another build .* is running"):
                    Index.build(path, OTHERS, stores=("bm25",), replace=replace)
            yield document

    for replace in (False, True):
        index = Index.build(path, documents(replace), stores=("bm25",), replace=replace)
        same(index, DOCUMENTS)


def test_an_index_that_was_built_meanwhile_is_not_replaced(tmp_path, monkeypatch):
    path, lock = tmp_path / "kb", ragkit.stores.folder._lock

    def other_first(file):
        monkeypatch.undo()
        Index.build(path, DOCUMENTS, stores=("bm25",))
        return lock(file)

    monkeypatch.setattr(ragkit.stores.folder, "_lock", other_first)
    with pytest.raises(SettingsError, match="index here already"):
        Index.build(path, OTHERS, stores=("bm25",))
    same(Index.open(path), DOCUMENTS)


def test_a_killed_build_holds_no_lock(tmp_path):
    path = tmp_path / "kb"
    code = f"""
import os, signal
from ragkit import Document, Index
def documents():
    yield Document("a", "moon")
    os.kill(os.getpid(), signal.SIGKILL)
Index.build({str(path)!r}, documents(), stores=("bm25",))
"""
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == -9
    assert len(listing(path)) >= 4 and (path / ".lock").exists()
    index = Index.build(path, OTHERS, stores=("bm25",))
    same(index, OTHERS)
    assert set(files_of(path)) == {"manifest.json", *index.files()}


def test_retrievers_outlive_a_rebuild_and_what_was_not_mapped_says_why(tmp_path, encoder):
    path = tmp_path / "kb"
    Index.build(path, DOCUMENTS, encoder=encoder)
    old, unused = Index.open(path), Index.open(path)
    retrievers = [Bm25Retriever(old), DenseRetriever(old, encoder)]
    Index.build(path, OTHERS, encoder=encoder, replace=True)
    for retriever in retrievers:
        hits = retriever.retrieve([Query("q", "moon 7", {"n": {"lt": 30}})], 3)[0]
        assert len(hits) == 3 and all(hit.document in DOCUMENTS[:30] for hit in hits)
    assert old.pieces("d7") == [DOCUMENTS[7]]
    uses = [lambda: unused.documents, lambda: unused.bm25, lambda: unused.dense, unused.size]
    for use_it in uses:
        with pytest.raises(IndexStateError, match=r"replaced since it was opened\. Open it again"):
            use_it()
    assert Index.open(path).size() > 0


@pytest.mark.parametrize("ann", ["flat", "hnsw"])
def test_everything_is_durable_before_the_manifest_names_it(tmp_path, encoder, monkeypatch, ann):
    path, synced, at_the_end = tmp_path / "kb", set(), set()
    fsync, write = os.fsync, ragkit.stores.folder.write_json

    def note(descriptor):
        synced.add(os.fstat(descriptor).st_ino)
        fsync(descriptor)

    def last(*args):
        at_the_end.update(synced)
        write(*args)

    monkeypatch.setattr(artefacts.os, "fsync", note)
    monkeypatch.setattr(ragkit.stores.folder, "write_json", last)
    Index.build(path, DOCUMENTS, encoder=encoder, ann=AnnSettings(ann))
    needed = [tmp_path, *(file for file in path.rglob("*") if file.name != "manifest.json")]
    assert {file for file in needed if file.stat().st_ino not in at_the_end} == set()
    assert {path.stat().st_ino, (path / "manifest.json").stat().st_ino} <= synced


# --- damage


def use(path, encoder):
    """Do everything that reads an index."""
    index = Index.open(path)
    list(index.documents)
    index.documents.rows  # noqa: B018
    Bm25Retriever(index).retrieve([Query("q", "moon 7", {"n": {"lt": 30}})], 5)
    DenseRetriever(index, encoder).retrieve([Query("q", "moon 7")], 5)
    index.size()


def files_of(path):
    return sorted(file.relative_to(path).as_posix() for file in path.rglob("*") if file.is_file())


def test_one_flipped_byte_in_any_file_is_found(damaged):
    names = files_of(damaged)
    assert len(names) == 3 * 9 + 2
    for name in names:
        file = damaged / name
        sound = file.read_bytes()
        for place in {0, len(sound) // 2, len(sound) - 2}:
            broken = bytearray(sound)
            broken[place] ^= 0x04
            file.write_bytes(broken)
            try:
                problems = Index.open(damaged).check()
            except IndexStateError as error:
                problems = [str(error)]
            assert problems and name in problems[0], (name, place)
        file.write_bytes(sound)
    assert Index.open(damaged).check() == []


def test_a_missing_file_is_found_and_named(damaged, encoder):
    for name in files_of(damaged):
        (damaged / name).rename(damaged.parent / "away")
        with pytest.raises(IndexStateError) as caught:
            use(damaged, encoder)
        assert "ragkit-index" in str(caught.value) or "Build the index again" in str(caught.value)
        if name != "manifest.json":
            assert Index.open(damaged).check() == [f"{damaged / name}: missing"]
        (damaged.parent / "away").rename(damaged / name)
    use(damaged, encoder)


@pytest.mark.parametrize("keep", [0, 0.1, 0.5, -1])
def test_a_truncated_file_is_refused(damaged, encoder, keep):
    for name in files_of(damaged):
        file = damaged / name
        sound = file.read_bytes()
        file.write_bytes(sound[: len(sound) - 2 if keep == -1 else int(len(sound) * keep)])
        with pytest.raises(IndexStateError) as caught:
            use(damaged, encoder)
        assert len(str(caught.value)) < 1000 and str(damaged) in str(caught.value)
        file.write_bytes(sound)
    use(damaged, encoder)


@pytest.mark.parametrize(
    ("name", "content"),
    [
        ("documents.jsonl", None),
        ("ids.json", "{}"),
        ("ids.json", '["d0"]'),
        ("bm25/terms.json", '["moon"]'),
        ("bm25/terms.json", "3"),
        ("bm25/indptr.npy", b"\x93NUMPY\x01\x00garbage"),
        ("embeddings.npy", b"PK\x03\x04 not a zip"),
    ],
)
def test_nonsense_in_a_file_is_refused(damaged, encoder, name, content):
    file = next(damaged.glob(f"segments/*/{name}"))
    if content is None:  # as long as it was, but no JSON
        content = b"x" * file.stat().st_size
    file.write_bytes(content if isinstance(content, bytes) else content.encode())
    with pytest.raises(IndexStateError):
        use(damaged, encoder)
    assert len(Index.open(damaged).check()) == 1


def test_embeddings_of_another_type_or_number_are_refused(damaged, encoder):
    file = min(damaged.glob("segments/*/embeddings.npy"))
    for array in (np.zeros((15, 16)), np.zeros((14, 16), np.float32), np.zeros(15, np.float32)):
        np.save(file, array)
        with pytest.raises(
            IndexStateError, match=r"embeddings.npy: .*expected float32 with 15 rows"
        ):
            use(damaged, encoder)


def test_arrays_of_objects_are_not_unpickled(damaged, encoder):
    file = min(damaged.glob("segments/*/embeddings.npy"))
    np.save(file, np.array([print, None], dtype=object), allow_pickle=True)
    with pytest.raises(IndexStateError, match="cannot be read"):
        use(damaged, encoder)


@pytest.mark.parametrize(
    ("change", "seen"),
    [
        (lambda m: m | {"format": 2}, "index format 2, this ragkit reads 1"),
        (lambda m: {k: v for k, v in m.items() if k != "format"}, "index format None"),
        (lambda m: {k: v for k, v in m.items() if k != "segments"}, "its segment"),
        (lambda m: m | {"segments": 3}, "its segment"),
        (lambda m: m | {"segments": [{}]}, "its segment"),
        (lambda m: m | {"segments": [{"name": "x", "documents": "x"}]}, "its segment"),
        (lambda m: m | {"analyser": {"stemmer": "klingon", "stopwords": None}}, "klingon"),
        (lambda m: m | {"bm25": {"k2": 1}}, "k2"),
        (lambda m: m | {"ann": {"file": "gone.faiss", "search": ""}}, "gone.faiss"),
        (lambda m: m | {"ann": {}}, "its approximate index is {}"),
        (lambda m: [m], "expected a JSON object, found list"),
    ],
)
def test_a_manifest_that_does_not_fit_is_refused(damaged, encoder, change, seen):
    manifest = json.loads((damaged / "manifest.json").read_text())
    (damaged / "manifest.json").write_text(json.dumps(change(manifest)))
    with pytest.raises(IndexStateError, match=seen):
        use(damaged, encoder)


@pytest.mark.parametrize(
    ("change", "seen"),
    [
        (lambda segment: segment.pop("files"), "its record of files"),
        (lambda segment: segment.update(files=3), "its record of files"),
        (lambda segment: segment.update(files={"../x.json": "0"}), "its record of files"),
        (lambda segment: segment.update(name="../x"), "its segment is"),
        (lambda segment: segment.update(documents=-1), "its number of documents is -1"),
    ],
)
def test_a_manifest_of_files_that_no_build_writes_is_refused(damaged, change, seen):
    manifest = json.loads((damaged / "manifest.json").read_text())
    change(manifest["segments"][0])
    (damaged / "manifest.json").write_text(json.dumps(manifest))
    with pytest.raises(IndexStateError, match=seen):
        Index.open(damaged)


def test_check_tells_of_a_manifest_without_its_files(damaged):
    manifest = json.loads((damaged / "manifest.json").read_text())
    manifest["segments"][0]["files"] = {}
    (damaged / "manifest.json").write_text(json.dumps(manifest))
    problems = Index.open(damaged).check()
    assert problems == [f"{damaged / 'manifest.json'}: changed since it was written"]
    with pytest.raises(IndexStateError, match=r"documents.jsonl"):
        Index.open(damaged).documents_fingerprint()


@pytest.mark.parametrize("text", [b"", b"{", b'{"format": 1', b"\xff\xfe\x00", b"null"])
def test_a_broken_manifest_is_refused(damaged, text):
    (damaged / "manifest.json").write_bytes(text)
    with pytest.raises(IndexStateError, match=r"manifest.json: .* Build the index again"):
        Index.open(damaged)


def test_no_index_here(tmp_path):
    for path in (tmp_path, tmp_path / "nowhere", tmp_path / "a\nb"):
        with pytest.raises(IndexStateError, match=r"no index here.*ragkit-index build CORPUS"):
            Index.open(path)


# --- files that are whole or absent


def test_write_json_replaces_or_leaves(tmp_path, monkeypatch):
    path = tmp_path / "a.json"
    write_json(path, {"b": "é", "a": [1, 2.5, None]})
    assert read_json(path) == {"a": [1, 2.5, None], "b": "é"}
    with pytest.raises(DataError, match="cannot be written as JSON"):
        write_json(path, {"a": float("inf")})
    monkeypatch.setattr(artefacts.os, "fsync", explode(KeyboardInterrupt()))
    with pytest.raises(KeyboardInterrupt):
        write_json(path, {})
    assert [(file.name, read_json(file)["b"]) for file in tmp_path.iterdir()] == [("a.json", "é")]


def test_new_folder_is_whole_or_absent(tmp_path):
    path = tmp_path / "out/run"
    with new_folder(path, mark="a") as folder:
        (folder / "a").write_text("1")
        assert not path.exists()
    with pytest.raises(SettingsError, match="exists already"), new_folder(path, mark="a"):
        pass
    with pytest.raises(KeyboardInterrupt), new_folder(path, replace=True, mark="a") as folder:
        (folder / "a").write_text("2")
        raise KeyboardInterrupt
    assert listing(path.parent) == {"run": None, "run/a": b"1"}
    with pytest.raises(SettingsError, match="has no b"), new_folder(path, replace=True, mark="b"):
        pass
    with new_folder(path, replace=True, mark="a") as folder:
        (folder / "b").write_text("3")
    assert listing(path.parent) == {"run": None, "run/b": b"3"}
    check_output(tmp_path / "free", False, "a")
    with pytest.raises(SettingsError, match="--replace"):
        check_output(path, False, "b")
    with pytest.raises(SettingsError, match="no folder here"), new_folder(path / "b/c", mark="a"):
        pass
    with pytest.raises(SettingsError, match="not replaced"):  # a file
        check_output(path / "b", True, "a")


def test_new_folder_puts_the_old_one_back(tmp_path, monkeypatch):
    path = tmp_path / "run"
    path.mkdir()
    (path / "a").write_text("1")
    moves, replace = [], type(path).replace

    def second_fails(self, target):
        moves.append(target)
        if len(moves) == 2:
            raise KeyboardInterrupt
        return replace(self, target)

    monkeypatch.setattr(type(path), "replace", second_fails)
    with pytest.raises(KeyboardInterrupt), new_folder(path, replace=True, mark="a"):
        pass
    assert listing(tmp_path) == {"run": None, "run/a": b"1"}


def test_what_a_kill_left_aside_is_put_back(tmp_path):
    for name in (".run.abcd_123.old", ".run.x.abcd1234.old", ".run.abcd1234"):
        (tmp_path / name).mkdir()
        (tmp_path / name / "a").write_text(name)
    with pytest.raises(SettingsError, match="--replace"):
        check_output(tmp_path / "run", False, "a")
    with new_folder(tmp_path / "run", replace=True, mark="a") as folder:
        assert (tmp_path / "run/a").read_text() == ".run.abcd_123.old"
        (tmp_path / ".run.zzzzzzzz.old").mkdir()  # killed after both renames
        (folder / "a").write_text("new")
    check_output(tmp_path / "free", False, "a")
    names = {path.name: (path / "a").read_text() for path in tmp_path.iterdir()}
    assert names == {
        "run": "new", ".run.x.abcd1234.old": ".run.x.abcd1234.old", ".run.abcd1234": ".run.abcd1234"
    }  # fmt: skip


def test_new_folder_does_not_replace_what_came_meanwhile(tmp_path):
    path = tmp_path / "run"
    with (
        pytest.raises(SettingsError, match="exists already"),
        new_folder(path, mark="a"),
        new_folder(path, mark="a") as other,
    ):
        (other / "a").write_text("first")
    assert listing(tmp_path) == {"run": None, "run/a": b"first"}


def test_new_folder_is_durable_before_it_is_named(tmp_path, monkeypatch):
    synced, fsync = set(), os.fsync

    def note(descriptor):
        assert os.fstat(descriptor).st_ino == tmp_path.stat().st_ino or not path.exists()
        synced.add(os.fstat(descriptor).st_ino)
        fsync(descriptor)

    path = tmp_path / "run"
    monkeypatch.setattr(artefacts.os, "fsync", note)
    with new_folder(path, mark="a") as folder:
        (folder / "deep").mkdir()
        for name in ("a", "deep/b"):
            (folder / name).write_text(name)
    assert synced == {file.stat().st_ino for file in (tmp_path, path, *path.rglob("*"))}
