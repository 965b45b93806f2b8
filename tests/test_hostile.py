"""Files that somebody broke, by accident or on purpose: refused with a message, and no more."""

from __future__ import annotations

import gzip
import json
import shutil
import signal
import unicodedata
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from random import Random
from typing import Any

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from ragkit.indexers.build import describe

import ragkit.stores.limits
from ragkit.artefacts import file_hash, fingerprint, to_json
from ragkit.corpus import read_documents, read_qrels, read_questions, read_run
from ragkit.errors import DataError, RagkitError
from ragkit.stores.ann_settings import AnnSettings
from ragkit.stores.documents import document_line
from ragkit.stores.index import Index
from ragkit.types import Document

CASES = [1_500, pytest.param(20_000, marks=pytest.mark.slow)]
SECONDS = 30  # for one case
TOKENS = [
    b"\x00", b"\xed\xa0\x80", b"\xff\xfe", b"\xef\xbb\xbf", b"NaN", b"-Infinity", b"1e999", b"-1",
    b"9" * 40, b"null", b"true", b"[" * 3000, b"{", b'"', b"\\u0000", b"\\ud800", b"\r", b"\n",
    b"\xe2\x80\xa8", b"../../../escaped", b"/etc/passwd", b"\x1f\x8b\x08", b"PK\x03\x04",
    b"\x80\x04cos\nsystem\n(S'touch escaped'\ntR.", b"<|im_start|>", b"{{ 7*7 }}", b"\t" * 9,
]  # fmt: skip
VALUES: list[Any] = [
    None, True, -1, 0, 1.5, 10**30, "", "\x00", "../../escaped", "/escaped", "000001-ffffff", [],
    {}, [[]], {"name": "x"}, "9" * 50, "a" * 100_000, [None], "nan", "IVF1,Flat", "eJw=",
]  # fmt: skip


def mutated(data: bytes, random: Random) -> bytes:
    """Return bytes that somebody broke in one to three places."""
    out = bytearray(data)
    for _ in range(random.randint(1, 3)):
        at = random.randrange(len(out) + 1)
        until = min(len(out), at + random.choice((1, 2, 8, 64, 4096)))
        kind = random.randrange(6)
        if kind == 0 and at < len(out):
            out[at] ^= 1 << random.randrange(8)
        elif kind == 1:
            del out[at:until]
        elif kind == 2:
            out[at:at] = out[at:until]
        elif kind == 3:
            out[at:at] = random.choice(TOKENS)
        elif kind == 4:
            out[at:until] = random.randbytes(until - at)
        else:
            del out[at:]
    return bytes(out)


def altered(value: Any, random: Random) -> Any:
    """Return JSON in which one value, key or item is another."""
    if not isinstance(value, dict | list) or not value or random.random() < 0.1:
        return random.choice(VALUES)
    value = value.copy()
    key = random.choice(list(value) if isinstance(value, dict) else range(len(value)))
    kind = random.random()
    if kind < 0.1:
        del value[key]
    elif kind < 0.2 and isinstance(value, dict):
        value[str(random.choice(VALUES))] = value.pop(key)
    elif kind < 0.2:
        value.append(value[key])
    else:
        value[key] = altered(value[key], random)
    return value


@contextmanager
def in_time(case: object) -> Iterator[None]:
    """Fail if a case does not end."""

    def late(*_: object) -> None:
        raise AssertionError(f"does not end: {case!r}")

    before = signal.signal(signal.SIGALRM, late)
    signal.alarm(SECONDS)
    try:
        yield
    finally:
        signal.alarm(0)
        signal.signal(signal.SIGALRM, before)


def contents(folder: Path) -> dict[str, bytes]:
    return {
        file.relative_to(folder).as_posix(): file.read_bytes()
        for file in folder.rglob("*")
        if file.is_file()
    }


# --- corpora

LINES = [
    {"id": "a/b", "text": "Tin melts at 232 degrees.", "title": "Tin", "year": 1990},
    {"_id": 7, "contents": "Lead \u2028 melts\u0000.", "metadata": {"k": ["v", 1.5, None]}},
    {"docid": "é", "page_content": "Zinc.", "tags": {"deep": {"er": [1, [2, [3]]]}}},
]
CORPORA = {
    "c.jsonl": "".join(json.dumps(line) + "\n" for line in LINES).encode(),
    "c.json": json.dumps(LINES, ensure_ascii=False).encode(),
    "c.tsv": b'id\ttext\ttitle\n1\tTin melts.\tTin\n2\t"Lead\nmelts"\t\n',
    "c.csv": b'id,text,year\n1,"Tin, melts.",1990\n2,"Le""ad",\n',
    "c.txt": b"Tin melts.\r\n\x0c",
    "c.md": b"# Tin\n\n```\nx\n```\n| a |\n|---|\n",
    "c.html": b"<html><title>Tin</title><script>x</script><p>melts&nbsp;&#0;<p></html>",
}
READERS: dict[str, tuple[bytes, Callable[[Path], object]]] = {
    "q.jsonl": (
        b'{"id": "1", "question": "what?", "answers": ["tin", "lead"], "pos": ["a"], "neg": []}\n',
        read_questions,
    ),
    "q.tsv": (b'id\tquestion\tanswers\n1\twhat?\t["tin"]\n', read_questions),
    "r.tsv": (b"query-id\tcorpus-id\tscore\n1\ta\t1\n2\tb\t0\n", read_qrels),
    "r.trec": (b"1 0 a 1\n1 0 b 0\n", read_qrels),
    "r.run": (b"1 Q0 a 1 12.5 tag\n1 Q0 b 2 3.5 tag\n", read_run),
}


@pytest.mark.parametrize("cases", CASES)
def test_broken_corpora_are_read_or_refused(tmp_path: Path, cases: int) -> None:
    random, room = Random(1), tmp_path / "room"
    room.mkdir()
    read = refused = 0
    for case in range(cases):
        name, data = random.choice([*CORPORA.items(), *((n, d) for n, (d, _) in READERS.items())])
        broken = mutated(data, random)
        file = room / name
        if random.random() < 0.1:
            file = room / f"{name}.gz"
            packed = gzip.compress(broken, 1)
            broken = mutated(packed, random) if random.random() < 0.5 else packed
        file.write_bytes(broken)
        with in_time((case, name, broken)):
            try:
                if name in READERS:
                    READERS[name][1](file)
                else:
                    for document in read_documents([file]):
                        document_line(document)
                read += 1
            except RagkitError as error:
                assert len(str(error)) < 2500 and name[0] in str(error)
                refused += 1
            if name in CORPORA:  # what is skipped is told of
                for _ in read_documents([file], on_error="skip", problems=[]):
                    pass
        file.unlink()
    assert read > cases / 10 and refused > cases / 10
    assert [path.name for path in tmp_path.iterdir()] == ["room"] and not contents(tmp_path)


# --- indexes


@pytest.fixture(scope="module")
def sound(tmp_path_factory: pytest.TempPathFactory, encoder: Any) -> Path:
    """An index of three segments with deleted rows and an approximate index."""
    path = tmp_path_factory.mktemp("sound") / "kb"
    words = ["tin", "lead", "zinc", "gold", "melts", "shines"]
    documents = [
        Document(f"d{n}", f"{words[n % 6]} {words[n % 4]} {n}", "T", {"year": n}) for n in range(14)
    ]
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(ragkit.stores.limits, "SEGMENT_DOCUMENTS", 8)
        ann = AnnSettings("ivf", codes="int8", target_recall=0.5)
        index = Index.build(path, documents, encoder=encoder, ann=ann)
        index.delete(["d2", "d9"]).add([Document("new", "tin again")], encoder=encoder)
    assert Index.open(path).check() == []
    return path


@pytest.fixture(scope="module")
def encoder(request: pytest.FixtureRequest) -> Any:
    from tests.conftest import HashEncoder

    return HashEncoder()


def use(path: Path, encoder: Any, writes: bool) -> None:
    """Do with an index whatever may be done."""
    index = Index.open(path)
    describe(index)
    index.fingerprint(), index.documents_fingerprint()
    queries = encoder.encode_queries(["tin", "new"])
    for where in ({}, {"year": {"gte": 3}}):
        mask = index.mask(where)
        index.bm25.search(["tin melts", "gold 3"], 5, mask)
        index.dense.search(queries, 5, mask)
    [document.contents for document in index.documents]
    index.pieces("d3")
    index.check()
    if writes:
        index.delete(["d3"]).add([Document("x", "lead")], encoder=encoder).compact()


def sealed(manifest: Any) -> Any:
    """Return a manifest with the checksum that it should have."""
    if isinstance(manifest, dict):
        rest = {key: value for key, value in manifest.items() if key != "checksum"}
        return rest | {"checksum": fingerprint(rest)}
    return manifest


def broken_indexes(sound: Path, place: Path, cases: int, seed: int) -> Iterator[tuple[Any, Path]]:
    """Yield copies of an index in which a file is broken; what it writes is undone."""
    random, path = Random(seed), place / "kb"
    files = sorted(contents(sound))
    for case in range(cases):
        if case % 25 == 0 or random.random() < 0.02:
            shutil.rmtree(path, ignore_errors=True)
            shutil.copytree(sound, path)
        name = "manifest.json" if random.random() < 0.5 else random.choice(files)
        original = (sound / name).read_bytes()
        manifest = json.loads((sound / "manifest.json").read_bytes())
        if name == "manifest.json" and random.random() < 0.7:
            changed = altered(manifest, random)
            told = sealed(changed) if random.random() < 0.7 else changed
            broken = json.dumps(told).encode()
        elif name.endswith(".json") and random.random() < 0.5:
            broken = json.dumps(altered(json.loads(original), random)).encode()
        else:
            broken = mutated(original, random)
        temporary = path.parent / "new"
        temporary.write_bytes(broken)
        temporary.replace(path / name)
        segment, _, inner = name.removeprefix("segments/").partition("/")
        if inner and random.random() < 0.7:  # its checksum is right, as an attacker's would be
            for record in manifest["segments"]:
                if record["name"] == segment:
                    record["files"][inner] = file_hash(path / name)
            (path / "manifest.json").write_text(to_json(sealed(manifest)))
        yield (case, name, broken[:2000]), path
        for file in (name, "manifest.json"):
            temporary.write_bytes((sound / file).read_bytes())
            (path / file).parent.mkdir(parents=True, exist_ok=True)
            temporary.replace(path / file)


@pytest.mark.parametrize("cases", CASES)
def test_broken_indexes_are_used_or_refused(
    tmp_path: Path, sound: Path, encoder: Any, cases: int
) -> None:
    place = tmp_path / "place"
    place.mkdir()
    (place / "beside.txt").write_text("safe")
    (tmp_path / "above.txt").write_text("safe")
    used = refused = 0
    for case, path in broken_indexes(sound, place, cases, 2):
        writes = case[0] % 25 == 24  # the last one before a fresh copy
        with in_time(case):
            try:
                use(path, encoder, writes)
                used += 1
            except RagkitError as error:
                assert str(error)
                refused += 1
        outside = {name for name in contents(tmp_path) if not name.startswith("place/kb/")}
        assert outside == {"place/beside.txt", "above.txt"}, case
        assert (place / "beside.txt").read_text() == (tmp_path / "above.txt").read_text() == "safe"
    assert used > cases / 20 and refused > cases / 3


# --- texts

TEXTS = st.text(st.characters(codec=None), max_size=30)  # surrogates and all planes
ODD = [
    "a/b", "..", "../x", ".", "\x00", "a\x00b", " ", "\u202eabc", "\ud800", "\udfff", "\ufeff",
    "\u2028", "\x1f", "'; DROP TABLE", "%s{0}", "con", "-rf", "#1", "a#1", "\U0010ffff", "e\u0301",
    "*".join(chr(plane << 16 | 0x41) for plane in range(17)),
]  # fmt: skip


@settings(max_examples=150, deadline=None, suppress_health_check=[HealthCheck.too_slow])
@given(
    st.lists(
        st.tuples(TEXTS | st.sampled_from(ODD), TEXTS | st.sampled_from(ODD), TEXTS),
        min_size=1,
        max_size=6,
        unique_by=lambda each: each[0],
    )
)
def test_texts_come_back_as_they_were_or_are_refused(given_texts: list[tuple[str, ...]]) -> None:
    import tempfile

    documents = [Document(a, b, c, {c: b}) for a, b, c in given_texts]
    with tempfile.TemporaryDirectory() as place:
        try:
            index = Index.build(Path(place) / "kb", documents, stores=["bm25"])
        except DataError:
            odd = [text for texts in given_texts for text in texts if not text.isprintable()]
            blank = [texts for texts in given_texts if not all(map(str.strip, texts[:2]))]
            assert odd or blank
            assert list(Path(place).iterdir()) == []
            return
        assert list(index.documents) == documents
        assert [index.documents.rows[document.id] for document in documents] == [
            *range(len(documents))
        ]
        for document in documents:
            index.bm25.search([document.text], 3)
        assert index.check() == []
        left = index.delete([documents[0].id]) if len(documents) > 1 else index
        assert len(left) == max(1, len(documents) - 1 - _pieces(documents))
        assert {path.name for path in Path(place).iterdir()} == {"kb"}


def _pieces(documents: list[Document]) -> int:
    """Count the others that were split off the first document, by their ids."""
    first = documents[0].id
    ids = {document.id for document in documents}
    number = 0
    while f"{first}#{number + 1}" in ids:
        number += 1
    return number


def test_a_megabyte_in_every_plane(tmp_path: Path) -> None:
    planes = [chr(plane << 16 | low) for plane in range(17) for low in (0x10, 0xE5, 0x4E00)]
    usable = [each for each in planes if unicodedata.category(each) != "Cs"]
    text = "".join(usable) * (1_000_000 // len(usable))
    documents = [Document(text[:100_000], text, text), Document("b", "tin " * 250_000)]
    index = Index.build(tmp_path / "kb", documents, stores=["bm25"])
    assert list(index.documents) == documents
    assert index.bm25.search(["tin"], 2)[0][0].tolist() == [1]
    assert np.array(index.bm25.scores(text[:1000])).shape == (2,)


@pytest.mark.parametrize(
    "settings", [{"corpus": ["\udcff.jsonl"]}, {"corpus": float("nan")}, {"corpus": {1, 2}}]
)
def test_what_a_manifest_cannot_hold_is_refused_before_anything_is_read(
    tmp_path: Path, settings: dict[str, Any]
) -> None:
    def unread() -> Iterator[Document]:
        raise AssertionError("read")
        yield

    with pytest.raises(RagkitError, match="cannot be written"):
        Index.build(tmp_path / "kb", unread(), stores=["bm25"], settings=settings)
    assert list(tmp_path.iterdir()) == []


def test_an_encoder_that_tells_little_is_enough(tmp_path: Path, encoder: Any) -> None:
    class Terse(type(encoder)):  # type: ignore[misc]
        def describe(self) -> dict[str, str]:
            return {"name": "terse", "fingerprint": "0"}

    class Silent(type(encoder)):  # type: ignore[misc]
        def describe(self) -> dict[str, str]:
            return {"name": "silent"}

    documents = [Document("1", "tin")]
    assert len(Index.build(tmp_path / "kb", documents, encoder=Terse()).dense) == 1
    with pytest.raises(DataError, match="its encoder's fingerprint is None"):
        Index.build(tmp_path / "kb", documents, encoder=Silent(), replace=True)
    assert Index.open(tmp_path / "kb").check() == []
