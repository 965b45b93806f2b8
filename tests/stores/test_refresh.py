"""Another encoder for an index: as if built anew, atomic, resumable, and nothing done twice."""

import hashlib
import json
import os
import resource
import shutil
import signal
import subprocess
import sys

import numpy as np
import pytest

import ragkit.stores.ann
import ragkit.stores.embeddings
import ragkit.stores.folder
import ragkit.stores.limits
from ragkit.errors import IndexStateError, ModelError, SettingsError
from ragkit.retrievers import Bm25Retriever, DenseRetriever
from ragkit.stores.ann_settings import AnnSettings
from ragkit.stores.embeddings import same_documents
from ragkit.stores.index import Index
from ragkit.stores.refresh import Refreshed, refresh_index
from ragkit.types import Document, Query, quiet

DOCUMENTS = [Document(f"d{n}", f"moon {n} of {n % 7}", f"title {n % 3}") for n in range(40)]
QUERIES = [Query(str(n), f"moon {n} of {n % 7}") for n in range(12)]
ENCODERS = {"weights": "w", "modules": [["Pooling", {"mode": "mean"}]], "max_length": 256}
ENCODERS |= {"query_prompt": "", "document_prompt": "", "similarity": "cosine", "dimension": 16}
WINDOW, SEGMENT = 4, 15
WINDOWS = [4, 4, 4, 3, 4, 4, 4, 3, 4, 4, 2]  # the texts of each, in segments of 15, 15 and 10


class Encoder:
    """Every text has the unit vector that the hash of the name and the text seeds.

    `stop` is done after so many windows.
    """

    def __init__(self, name="old", dimension=16, *, after=None, stop=None, **told):
        self.name, self.dimension, self.encoded = name, dimension, []
        self._after, self._stop, self._told = after, stop, told

    def encode_queries(self, texts):
        out = np.empty((len(texts), self.dimension), np.float32)
        for row, text in enumerate(texts):
            digest = hashlib.sha256(f"{self.name} {text}".encode()).digest()
            seed = int.from_bytes(digest[:8], "little")
            out[row] = np.random.default_rng(seed).standard_normal(self.dimension)
        return out / np.linalg.norm(out, axis=1, keepdims=True)

    def encode_documents(self, texts, *, progress=lambda done: None):
        if self._after is not None and len(self.encoded) == self._after:
            return self._stop()
        self.encoded.append(len(texts))
        progress(len(texts))
        return self.encode_queries(texts)

    def describe(self):
        fingerprint = hashlib.sha256(f"{self.name} {self._told}".encode()).hexdigest()[:16]
        described = {"name": self.name, "dimension": self.dimension, "fingerprint": fingerprint}
        return described | self._told


def refresh(path, encoder):
    return refresh_index(Index.open(path), encoder, quiet)


def raising(error):
    def stop(*args, **options):
        raise error

    return stop


def listing(folder):
    return {
        path.relative_to(folder).as_posix(): path.read_bytes() if path.is_file() else None
        for path in folder.rglob("*")
        if ".vectors-" not in path.as_posix()
    }


def left(path):
    return [folder.name for folder in (path / "segments").glob(".vectors-*")]


def whole(path, encoder):
    """Whether an index is sound, and holds and finds what a brute-force search finds."""
    index = Index.open(path)
    assert index.check() == [] and index.manifest["encoder"] == encoder.describe()
    files = {file.relative_to(path).as_posix() for file in path.rglob("*") if file.is_file()}
    assert files - {"manifest.json"} == set(index.files()) and left(path) == []
    vectors = encoder.encode_queries([document.contents for document in DOCUMENTS])
    rows = np.arange(len(DOCUMENTS))
    np.testing.assert_array_equal(index.dense.vectors(rows), vectors)
    scores = encoder.encode_queries([query.text for query in QUERIES]) @ vectors.T
    hits = DenseRetriever(index, encoder).retrieve(QUERIES, 3)
    for row, found in enumerate(hits):
        best = np.argsort(-scores[row])[:3]
        assert [hit.document for hit in found] == [DOCUMENTS[place] for place in best]
    return index


@pytest.fixture(autouse=True)
def small(monkeypatch):
    monkeypatch.setattr(ragkit.stores.limits, "SEGMENT_DOCUMENTS", SEGMENT)
    monkeypatch.setattr(ragkit.stores.embeddings, "_WINDOW", WINDOW)


@pytest.fixture
def kb(tmp_path):
    """An index of three segments with both stores and an approximate index."""
    Index.build(tmp_path / "kb", DOCUMENTS, encoder=Encoder(), ann=AnnSettings("hnsw"))
    return tmp_path / "kb"


# --- as after a fresh build


@pytest.mark.parametrize("stores", [("bm25",), ("dense",), ("bm25", "dense")])
@pytest.mark.parametrize(
    "ann",
    [
        AnnSettings(),
        AnnSettings("hnsw", search="efSearch=99"),
        AnnSettings("ivf"),
        AnnSettings(factory="IVF2,SQ8", search="nprobe=2"),
    ],
    ids=lambda ann: ann.factory or ann.kind,
)
def test_the_index_is_as_one_built_with_the_new_encoder(tmp_path, stores, ann):
    path, new = tmp_path / "kb", Encoder("new", 24)
    old = Index.build(
        path, DOCUMENTS, encoder=Encoder(), stores=stores, ann=ann, settings={"corpus": ["c"]}
    )
    kept = {name: (path / name).stat() for name in old.files() if not name.startswith("ann")}
    told = []
    index = old.refresh(new, progress=lambda *args: told.append(args))
    assert index.check() == [] and index.documents_fingerprint() == old.documents_fingerprint()
    held = {file.relative_to(path).as_posix() for file in path.rglob("*") if file.is_file()}
    assert held == {"manifest.json", *index.files()}
    assert ("encode", 0, 40) in told and ("encode", 40, 40) in told
    assert sum(new.encoded) == 40
    # What did not change is the same file on the disk.
    for name, before in kept.items():
        if not name.endswith("embeddings.npy"):
            _, number, rest = name.split("/", 2)
            after = next(path.glob(f"segments/{number[:6]}-*/{rest}")).stat()
            assert (after.st_ino, after.st_mtime_ns) == (before.st_ino, before.st_mtime_ns)

    wanted = AnnSettings() if stores == ("bm25",) else ann
    fresh = Index.build(
        tmp_path / "fresh", DOCUMENTS, encoder=new, stores=dict.fromkeys((*stores, "dense")),
        ann=wanted, settings={"corpus": ["c"]},
    )  # fmt: skip
    names = {"name", "file", "hash", "checksum"}  # drawn anew, or of bytes that are drawn anew

    def without(value):
        if isinstance(value, dict):
            return {key: without(item) for key, item in value.items() if key not in names}
        return [without(item) for item in value] if isinstance(value, list) else value

    assert without(index.manifest) == without(fresh.manifest)
    assert index.manifest["encoder"] == new.describe()
    rows = np.arange(40)
    np.testing.assert_array_equal(index.dense.vectors(rows), fresh.dense.vectors(rows))
    assert DenseRetriever(index, new).retrieve(QUERIES, 5) == DenseRetriever(fresh, new).retrieve(
        QUERIES, 5
    )
    if "bm25" in stores:
        found = Bm25Retriever(index).retrieve(QUERIES, 5)
        assert found == Bm25Retriever(fresh).retrieve(QUERIES, 5)
    assert list(index.documents) == DOCUMENTS


def test_file_systems_without_hard_links_get_copies(kb, monkeypatch):
    monkeypatch.setattr(ragkit.stores.folder.os, "link", raising(OSError("not here")))
    refresh(kb, Encoder("new"))
    whole(kb, Encoder("new"))


def test_one_index_may_be_refreshed_again_and_back(kb):
    for name in ("new", "newer", "old"):
        assert refresh(kb, Encoder(name)) == Refreshed(True, 40, 0)
        whole(kb, Encoder(name))


# --- only what must be


def test_the_encoder_that_is_there_already_is_nothing_to_do(kb):
    before = listing(kb)
    encoder = Encoder()
    assert refresh(kb, encoder) == Refreshed(False)
    assert listing(kb) == before and encoder.encoded == []


@pytest.mark.parametrize(
    "change",
    [
        {"query_prompt": "query: "},
        {"name": "moved"},
        {"weights": "tower", "base": "BUILT"},
        {"weights": "tower", "base": "BUILT", "dimension": 16, "query_adapter": "a"},
    ],
    ids=["prompt", "name", "tower", "adapter"],
)
def test_nothing_is_encoded_where_document_vectors_stay(tmp_path, change):
    path, built = tmp_path / "kb", Encoder(**ENCODERS)
    old = Index.build(path, DOCUMENTS, encoder=built, ann=AnnSettings("hnsw"))
    kept = listing(path)
    told = ENCODERS | change
    if "base" in told:
        told["base"] = built.describe()["fingerprint"]
    new = Encoder(**{"name": "old"} | told)
    assert refresh(path, new) == Refreshed(True)
    assert new.encoded == []
    index = Index.open(path)
    assert index.manifest["encoder"] == new.describe() and index.check() == []
    del kept["manifest.json"]
    assert {name: data for name, data in listing(path).items() if name in kept} == kept
    assert set(listing(path)) == {"manifest.json", *kept}
    assert index.documents_fingerprint() == old.documents_fingerprint()
    DenseRetriever(index, new)
    if new.name == "old":
        with pytest.raises(IndexStateError, match="ragkit-index refresh"):
            DenseRetriever(index, built)
    assert refresh(path, built) == Refreshed(True) and built.encoded == WINDOWS


@pytest.mark.parametrize("key", [key for key in ENCODERS if key != "query_prompt"])
def test_what_document_vectors_depend_on_is_encoded_anew(key):
    built = Encoder(**ENCODERS).describe()
    assert same_documents(built, built | {"fingerprint": "f", "query_prompt": "q", "name": "n"})
    assert not same_documents(built, built | {"fingerprint": "f", key: "other"})
    untold = {name: value for name, value in built.items() if name != key}
    assert not same_documents(untold, untold | {"fingerprint": "f"})


def test_encoders_of_one_base_encode_documents_alike():
    base, one, two = ({"fingerprint": name} for name in "b12")
    towers = [each | {"base": "b"} for each in (one, two)]
    assert same_documents(*towers) and same_documents(base, towers[0])
    assert same_documents(towers[0], base) and not same_documents(one, two)
    assert not same_documents(one | {"base": "c"}, towers[1])


# --- stopped, and gone on with


@pytest.mark.parametrize("error", [KeyboardInterrupt(), ConnectionError("gone"), ModelError("bad")])
@pytest.mark.parametrize("after", [0, 1, 4, 6, 10])
def test_a_stopped_refresh_goes_on_where_it_was(kb, error, after):
    before = listing(kb)
    with pytest.raises(type(error)):
        refresh(kb, Encoder("new", 24, after=after, stop=raising(error)))
    assert listing(kb) == before and len(left(kb)) == (after > 0)
    assert Index.open(kb).check() == []
    hits = DenseRetriever(Index.open(kb), Encoder()).retrieve(
        [Query("q", DOCUMENTS[3].contents)], 1
    )
    assert hits[0][0].document == DOCUMENTS[3]
    with pytest.raises(IndexStateError, match="built with the encoder 'old'"):
        DenseRetriever(Index.open(kb), Encoder("new", 24))
    new, told = Encoder("new", 24), []
    done = refresh_index(Index.open(kb), new, lambda *args: told.append(args))
    assert new.encoded == WINDOWS[after:]
    assert done == Refreshed(True, sum(new.encoded), 40 - sum(new.encoded))
    shown = [step for stage, step, _ in told if stage == "encode"]
    assert shown == sorted(shown) and shown[-1] == 40
    whole(kb, Encoder("new", 24))


def test_a_killed_refresh_goes_on_where_it_was(kb):
    code = f"""
import os, runpy, signal
import ragkit.stores.embeddings
from ragkit import Index
ragkit.stores.embeddings._WINDOW = {WINDOW}
kill = lambda: os.kill(os.getpid(), signal.SIGKILL)
encoder = runpy.run_path({__file__!r})["Encoder"]("new", after=6, stop=kill)
Index.open({str(kb)!r}).refresh(encoder)
"""
    done = subprocess.run([sys.executable, "-c", code], check=False, capture_output=True)
    assert done.returncode == -signal.SIGKILL, done.stderr
    assert Index.open(kb).check() == [] and (kb / ".lock").exists()
    DenseRetriever(Index.open(kb), Encoder())
    new = Encoder("new")
    assert refresh(kb, new) == Refreshed(True, 17, 23) and new.encoded == WINDOWS[6:]
    whole(kb, new)


def stopped(path, name="new", after=6):
    with pytest.raises(KeyboardInterrupt):
        refresh(path, Encoder(name, after=after, stop=raising(KeyboardInterrupt())))
    return path / "segments" / left(path)[0]


@pytest.mark.parametrize("by", ["build", "refresh", "query side", "same"])
def test_what_was_begun_with_another_encoder_is_removed(tmp_path, by):
    path, built = tmp_path / "kb", Encoder(**ENCODERS)
    Index.build(path, DOCUMENTS, encoder=built)
    begun = stopped(path)
    if by == "build":
        Index.build(path, DOCUMENTS, encoder=built, replace=True)
    elif by == "refresh":
        assert stopped(path, "newer", after=1) != begun and not begun.exists()
        assert refresh(path, Encoder("newer")) == Refreshed(True, 36, 4)
        return
    else:
        prompt = {"query_prompt": "q: "} if by == "query side" else {}
        assert refresh(path, Encoder(**ENCODERS | prompt)) == Refreshed(bool(prompt))
    assert left(path) == [] and Index.open(path).check() == []
    new = Encoder("new")
    refresh(path, new)
    assert new.encoded == WINDOWS


@pytest.mark.parametrize(
    "damage",
    [
        lambda note, file: note.write_text("{"),
        lambda note, file: note.write_text("[]"),
        lambda note, file: note.write_text('{"rows": 8}'),
        lambda note, file: note.write_text('{"rows": -8, "shape": [15, 16]}'),
        lambda note, file: note.write_text('{"rows": 99, "shape": [15, 16]}'),
        lambda note, file: note.write_text('{"rows": 8, "shape": [15, 8]}'),
        lambda note, file: note.unlink(),
        lambda note, file: file.unlink(),
        lambda note, file: os.truncate(file, 300),
    ],
)
def test_begun_vectors_that_are_not_sound_are_encoded_again(kb, damage):
    begun = stopped(kb)
    note = min(begun.glob("*.json"))
    assert json.loads(note.read_text()) == {"rows": 15, "shape": [15, 16]}
    damage(note, note.with_suffix(".npy"))
    new = Encoder("new")
    refresh(kb, new)
    assert new.encoded == [*WINDOWS[:4], *WINDOWS[6:]]
    whole(kb, new)


def test_a_window_that_was_half_written_is_written_again(kb):
    begun = stopped(kb)
    file = max(begun.glob("*.npy"))
    with file.open("ab") as handle:
        handle.write(b"\xff" * 100)
    refresh(kb, Encoder("new"))
    whole(kb, Encoder("new"))


# --- what cannot be written


def test_a_full_disk_is_told_and_what_was_encoded_is_kept(kb):
    before, limits = listing(kb), resource.getrlimit(resource.RLIMIT_FSIZE)
    new = Encoder("new")
    resource.setrlimit(resource.RLIMIT_FSIZE, (700, limits[1]))  # two windows and a part
    try:
        with pytest.raises(SettingsError, match=r"\.vectors-.*cannot be written .*Make room"):
            refresh(kb, new)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    assert listing(kb) == before and new.encoded == [4, 4, 4]
    again = Encoder("new")
    assert refresh(kb, again) == Refreshed(True, 32, 8)
    whole(kb, again)


@pytest.mark.parametrize(
    ("room", "name", "error"),
    [
        (ragkit.stores.ann.faiss, "write_index", RuntimeError("No space left")),
        (ragkit.stores.folder, "write_json", OSError(28, "No space left")),
        (ragkit.stores.folder.shutil, "copyfile", OSError(28, "No space left")),
    ],
    ids=["ann", "manifest", "links"],
)
def test_a_disk_that_is_full_at_the_end_costs_no_encoding(kb, monkeypatch, room, name, error):
    before = listing(kb)
    monkeypatch.setattr(room, name, raising(error))
    if name == "copyfile":
        monkeypatch.setattr(ragkit.stores.folder.os, "link", raising(error))
    with pytest.raises(SettingsError, match=r"kb: cannot be written .*No space left"):
        refresh(kb, Encoder("new"))
    assert {key: data for key, data in listing(kb).items() if key in before} == before
    assert Index.open(kb).check() == [] and not list((kb / "segments").glob(".new-*"))
    monkeypatch.undo()
    assert refresh(kb, Encoder("new")) == Refreshed(True, 0, 40)
    whole(kb, Encoder("new"))


def test_a_folder_that_cannot_be_written_is_told(kb, monkeypatch):
    before = listing(kb)
    monkeypatch.setattr(ragkit.stores.folder, "_lock", raising(PermissionError(13, "Denied")))
    with pytest.raises(SettingsError, match=r"kb: cannot be written \(Denied\)"):
        refresh(kb, Encoder("new"))
    assert listing(kb) == before


# --- what is refused, with the old index as it was


@pytest.mark.parametrize("bad", [np.nan, np.inf])
def test_vectors_that_are_none_are_refused(kb, bad):
    before = listing(kb)

    def stop():
        return np.full((4, 16), bad, np.float32)

    with pytest.raises(ModelError, match="NaN or an infinity for the document in row 4"):
        refresh(kb, Encoder("new", after=1, stop=stop))
    with pytest.raises(ModelError, match=r"shape \(3, 16\) for 4 documents, expected \(4, 16\)"):
        refresh(kb, Encoder("new", after=0, stop=lambda: np.zeros((3, 16), np.float32)))
    assert listing(kb) == before


def test_a_dimension_that_the_approximate_index_cannot_have(tmp_path):
    path, new = tmp_path / "kb", Encoder("new", 18)
    Index.build(path, DOCUMENTS, encoder=Encoder(), ann=AnnSettings(factory="PCA4,SQ8"))
    Index.open(path).refresh(new)
    Index.build(path, DOCUMENTS, encoder=Encoder(), ann=AnnSettings(factory="PQ4x4"), replace=True)
    before, new = listing(path), Encoder("new", 18)
    with pytest.raises(SettingsError, match=r"kb: its approximate index .*'PQ4x4' for 18 .*--kind"):
        refresh(path, new)
    assert listing(path) == before and new.encoded == []


@pytest.mark.parametrize("name", ["bm25/terms.json", "documents.jsonl", "embeddings.npy"])
def test_an_index_that_lacks_a_file_is_refused_before_anything_is_encoded(kb, name):
    next(kb.glob(f"segments/*/{name}")).unlink()
    before, new = listing(kb), Encoder("new")
    with pytest.raises(IndexStateError, match=r"damaged .*ragkit-index check"):
        refresh(kb, new)
    assert listing(kb) == before and new.encoded == []


def test_an_index_of_another_number_of_documents_is_refused(kb):
    manifest = json.loads((kb / "manifest.json").read_text())
    manifest["segments"][0]["documents"] = 14
    del manifest["ann"]["covers"]
    (kb / "manifest.json").write_text(json.dumps(manifest))
    new = Encoder("new")
    with pytest.raises(IndexStateError, match="40 documents where the manifest tells of 39"):
        refresh(kb, new)
    assert new.encoded == []


def test_a_second_writer_is_refused(kb):
    def others():
        for write in (
            lambda: refresh(kb, Encoder("newer")),
            lambda: Index.build(kb, DOCUMENTS, stores=("bm25",), replace=True),
        ):
            with pytest.raises(IndexStateError, match=r"another build .* is running"):
                write()
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        refresh(kb, Encoder("new", after=6, stop=others))
    assert refresh(kb, Encoder("new")) == Refreshed(True, 17, 23)


def test_an_index_that_was_replaced_since_it_was_opened_is_left_alone(kb):
    old = Index.open(kb)
    Index.build(kb, DOCUMENTS[:9], encoder=Encoder(), replace=True)
    before, new = listing(kb), Encoder("new")
    with pytest.raises(IndexStateError, match="replaced since it was opened"):
        old.refresh(new)
    assert listing(kb) == before and new.encoded == []


def test_what_no_build_made_is_left_alone(kb):
    for name in ("segments/.vectors-notes", "segments/000001-abcdef.bak"):
        (kb / name).mkdir()
        (kb / name / "thesis").write_text("years of work")
    index = Index.open(kb).refresh(Encoder("new"))
    assert index.check() == [] and len(list(kb.glob("segments/*/thesis"))) == 2


# --- readers


def test_open_readers_go_on_and_the_old_encoder_is_refused_afterwards(kb, tmp_path):
    old = Index.open(kb)
    readers = [DenseRetriever(old, Encoder()), Bm25Retriever(old)]
    found = [reader.retrieve(QUERIES, 5) for reader in readers]

    def during():
        assert [reader.retrieve(QUERIES, 5) for reader in readers] == found
        anew = Index.open(kb)
        assert DenseRetriever(anew, Encoder()).retrieve(QUERIES, 5) == found[0]
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        refresh(kb, Encoder("new", after=10, stop=during))
    refresh(kb, Encoder("new"))
    assert [reader.retrieve(QUERIES, 5) for reader in readers] == found
    mend = rf"built with the encoder 'new', opened with 'old'.* refresh --index {kb} --encoder old"
    with pytest.raises(IndexStateError, match=mend):
        DenseRetriever(Index.open(kb), Encoder())
    assert Bm25Retriever(Index.open(kb)).retrieve(QUERIES, 5) == found[1]
    # The files that both share are those of whoever keeps them.
    shutil.copytree(kb, tmp_path / "copy")
    assert Index.open(tmp_path / "copy").check() == []
