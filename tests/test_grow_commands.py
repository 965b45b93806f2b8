"""`ragkit-index add | update | delete | compact`, as their users meet them."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from ragkit.indexers.__main__ import app
from sentence_transformers import SentenceTransformer

from ragkit.console import run
from ragkit.models import BiEncoder
from ragkit.stores.index import Index

ODD = ["a/b c", "-k", "--json", "é #1", "'; DROP", "\u2028line", "%s {x}"]
CORPUS: list[dict[str, Any]] = [{"id": each, "text": f"Tin {n}."} for n, each in enumerate(ODD)]


def lines(path: Path, records: list[dict[str, Any]]) -> Path:
    path.write_text("".join(json.dumps(record) + "\n" for record in records), encoding="utf-8")
    return path


def sentences(*numbers: int) -> str:
    return " ".join(f"Sentence number {n} tells of the moon." for n in numbers)


@pytest.fixture
def dense(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """Encode by hashes of texts, with the real tokenizer; what is encoded is noted."""
    loaded, encoded = BiEncoder.load("all-MiniLM-L6-v2", precision="fp32"), list[str]()
    vectors = np.random.default_rng(0)

    def encode(self: Any, texts: Any, *, progress: Any = None) -> Any:
        encoded.extend(texts)
        return vectors.standard_normal((len(texts), 384)).astype(np.float32)

    monkeypatch.setattr(BiEncoder, "encode_documents", encode)
    monkeypatch.setattr(BiEncoder, "load", classmethod(lambda cls, name, **options: loaded))
    assert isinstance(loaded.model, SentenceTransformer)
    return encoded


@pytest.fixture
def kb(tmp_path: Path) -> Path:
    corpus = lines(tmp_path / "corpus.jsonl", CORPUS)
    command = ["build", str(corpus), "--index", str(tmp_path / "kb"), "--stores", "bm25"]
    assert run(app, command) == 0
    return tmp_path / "kb"


def told(capsys: pytest.CaptureFixture[str], *arguments: object, code: int = 0) -> str:
    capsys.readouterr()
    assert run(app, [str(argument) for argument in arguments]) == code
    out, err = capsys.readouterr()
    return err if code else out


def test_a_corpus_that_is_split_and_encoded_grows(
    tmp_path: Path, dense: list[str], capsys: pytest.CaptureFixture[str]
) -> None:
    records: list[dict[str, Any]] = [
        {"id": "long", "text": sentences(*range(30)), "year": 1},
        {"id": "short", "text": "Tin melts."},
    ]
    corpus, path = lines(tmp_path / "c.jsonl", records), tmp_path / "kb"
    build = ["build", corpus, "--index", path, "--split-tokens", "64", "--split-overlap", "9"]
    told(capsys, *build, "--kind", "hnsw")
    pieces = len(Index.open(path)) - 1
    assert pieces > 3
    settings = Index.open(path).manifest["settings"]
    assert (settings["split_tokens"], settings["language"]) == (64, "english")

    def change(command: str, *options: object) -> dict[str, Any]:
        dense.clear()
        out = told(capsys, command, corpus, "--index", path, *options, "--json")
        found: dict[str, Any] = json.loads(out)
        assert Index.open(path).check() == [] and found["documents"] == len(Index.open(path))
        assert found["encoded"] == len(dense)
        return found

    done = change("update")
    assert (done["added"], done["changed"], done["unchanged"]) == (0, 0, 2)
    records[0]["text"] = sentences(*range(28), 77, 78)
    lines(corpus, [*records, {"id": "new", "text": sentences(*range(40, 60))}])
    done = change("update")
    assert (done["added"], done["changed"], done["unchanged"]) == (1, 1, 1)
    assert done["rows_deleted"] < pieces and done["uncovered"] == done["rows_written"] > 2
    assert done["segments"] == 2
    assert all("77" in text or "4" in text or "5" in text for text in dense)
    out = told(capsys, "update", corpus, "--index", path)
    assert "0 documents added, 0 changed, 3 unchanged (0 rows written, 0 encoded)" in out
    assert re.search(r"not in the approximate index \(HNSW32,Flat\) .* `ragkit-index compact`", out)
    # Pieces are as if the index was built so, only in another order.
    told(capsys, *build[:2], "--index", tmp_path / "fresh", *build[4:])
    ours, fresh = ({d.id: d for d in Index.open(p).documents} for p in (path, tmp_path / "fresh"))
    assert ours == fresh
    records[0]["year"] = 2
    lines(corpus, records)
    done = change("update")
    assert (done["changed"], done["encoded"]) == (1, 0)
    rest = len(Index.open(path)) - done["rows_written"]
    assert "1 documents deleted" in told(capsys, "delete", "long", "--index", path)
    assert len(Index.open(path)) == rest and Index.open(path).pieces("long") == []
    out = json.loads(told(capsys, "compact", "--index", path, "--json"))
    assert (out["merged"], out["segments"], out["uncovered"], out["deleted_rows"]) == (2, 1, 0, 0)
    assert "nothing to do" in told(capsys, "compact", "--index", path)


def test_add_update_and_what_they_refuse(
    kb: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    more = lines(tmp_path / "more.jsonl", [{"id": "z", "text": "Zinc."}, {"id": "y", "text": "Y."}])
    out = told(capsys, "add", more, "--index", kb)
    assert "2 documents added (2 rows written, 0 encoded), 9 documents in 2 segments\n" in out
    seen = told(capsys, "add", more, "--index", kb, code=1)
    assert "holds a document 'z' already" in seen and "ragkit-index update" in seen
    more.write_text('{"id": "x", "text": "X."}\n{"id": \n', encoding="utf-8")
    assert "more.jsonl:2" in told(capsys, "update", more, "--index", kb, code=1)
    assert len(Index.open(kb)) == 9
    out = told(capsys, "update", more, "--index", kb, "--on-error", "skip")
    assert "1 documents added, 0 changed, 0 unchanged" in out and "1 records skipped, 10" in out
    assert "no index here" in told(capsys, "add", more, "--index", tmp_path / "no", code=1)
    assert "no such file" in told(capsys, "update", tmp_path / "no.jsonl", "--index", kb, code=1)
    seen = told(capsys, "build", more, "--index", kb, "--stores", "bm25", code=2)
    assert "an index here already, of 10 documents (bm25)" in seen and "ragkit-index update" in seen


def test_many_small_segments_are_told(
    kb: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    for n in range(15):
        corpus = lines(tmp_path / "more.jsonl", [{"id": f"m{n}", "text": "Lead."}])
        seen = told(capsys, "add", corpus, "--index", kb)
        assert ("compact` merges them" in seen) == (n == 14)
    assert "in 16 segments; each is searched by itself" in seen
    assert "merges" not in told(capsys, "compact", "--index", kb)


def test_delete_odd_ids(kb: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert Index.open(kb).documents.ids == ODD
    told(capsys, "delete", "a/b c", "é #1", "--index", kb, "--", "-k", "--json")
    assert Index.open(kb).documents.ids == ODD[4:]
    file = tmp_path / "ids.txt"
    file.write_text("\u2028line\r\n\n'; DROP\n", encoding="utf-8", newline="")
    out = told(capsys, "delete", "--ids-file", file, "--index", kb)
    assert out == f"{kb}: 2 documents deleted, 1 documents in 1 segment with 6 deleted rows\n"
    assert Index.open(kb).check() == []
    seen = told(capsys, "delete", "--ids-file", file, "--index", kb, code=1)
    assert "no document has the id" in seen and "--missing skip" in seen
    out = told(capsys, "delete", "--ids-file", file, "--index", kb, "--missing", "skip", "--json")
    assert (json.loads(out)["deleted"], json.loads(out)["deleted_rows"]) == (0, 6)
    assert "no document would be left" in told(capsys, "delete", ODD[6], "--index", kb, code=2)
    assert "--ids-file FILE" in told(capsys, "delete", "--index", kb, code=2)
    assert "no.txt" in told(capsys, "delete", "--ids-file", "no.txt", "--index", kb, code=1)
    file.write_bytes(b"a\xff\n")
    assert "is not UTF-8" in told(capsys, "delete", "--ids-file", file, "--index", kb, code=1)
    assert "deleted_rows 6" in told(capsys, "info", "--index", kb)
    out = told(capsys, "compact", "--index", kb)
    assert re.search(r"1 segments merged, 6 deleted rows dropped in .* 1 documents in 1 seg", out)


def test_an_index_of_another_language_is_split_alike(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    text = "Dr. Maier kam am 3. Mai. " * 60
    corpus = lines(tmp_path / "c.jsonl", [{"id": "a", "text": text}, {"id": "b", "text": "Zinn."}])
    options = ["--stores", "bm25", "--language", "german", "--split-tokens", "90"]
    told(capsys, "build", corpus, "--index", tmp_path / "kb", *options)
    told(capsys, "delete", "a", "--index", tmp_path / "kb")
    told(capsys, "update", corpus, "--index", tmp_path / "kb")
    told(capsys, "build", corpus, "--index", tmp_path / "fresh", *options)
    ours, fresh = (set(Index.open(tmp_path / n).documents.ids) for n in ("kb", "fresh"))
    assert ours == fresh and len(ours) > 3
