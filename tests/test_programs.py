"""The command lines, as their users meet them: bad input, interrupts, filters, settings files."""

from __future__ import annotations

import json
import os
import re
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Self

import numpy as np
import pytest
from ragkit.indexers.__main__ import app as index_app
from sentence_transformers import SentenceTransformer

from ragkit.__main__ import app, run_app
from ragkit.assemble import load_pipeline
from ragkit.console import run
from ragkit.errors import SettingsError
from ragkit.models import BiEncoder
from ragkit.stores.index import Index

ROOT = Path(__file__).parent.parent
CORPUS = [
    {"id": "a", "text": "Gallium melts at 30 degrees.", "kind": "metal"},
    {"id": "b", "text": "Tin melts at 232 degrees.", "kind": "metal"},
    {"id": "c", "text": "Brie is a soft cheese that melts.", "kind": "cheese"},
]


def _lines(path: Path, records: list[dict[str, object]]) -> Path:
    path.write_text("".join(json.dumps(record) + "\n" for record in records), encoding="utf-8")
    return path


@pytest.fixture
def corpus(tmp_path: Path) -> Path:
    return _lines(tmp_path / "corpus.jsonl", list(CORPUS))


@pytest.fixture
def index(tmp_path: Path, corpus: Path) -> Path:
    assert (
        run(index_app, ["build", str(corpus), "--index", str(tmp_path / "kb"), "--stores", "bm25"])
        == 0
    )
    return tmp_path / "kb"


def test_search_filters_and_prints_json(index: Path, capsys: pytest.CaptureFixture[str]) -> None:
    capsys.readouterr()
    arguments = ["search", "what melts", "--index", str(index), "--where", "kind=metal", "--json"]
    assert run_app(arguments) == 0
    hits = json.loads(capsys.readouterr().out)["hits"]
    assert sorted(hit["id"] for hit in hits) == ["a", "b"]


def test_settings_file_is_read_and_overridden(
    index: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    capsys.readouterr()
    file = tmp_path / "rag.toml"
    file.write_text(f'index = "{index}"\nretriever = "bm25"\nkeep = 2\n', encoding="utf-8")
    assert run_app(["search", "tin", "--config", str(file), "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["hits"][0]["id"] == "b"
    file.write_text('index = "kb"\nretriver = "bm25"\n', encoding="utf-8")
    assert run_app(["search", "tin", "--config", str(file)]) == 2
    assert "retriver" in capsys.readouterr().err


def test_a_settings_file_may_hold_every_option(
    index: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    capsys.readouterr()
    file = tmp_path / "rag.toml"
    text = f'index = "{index}"\nk = 1\nwhere = ["kind=metal"]\njson = true\nlimit = 2\n'
    text += 'questions = "q.jsonl"\nrun = "r.trec"\nmax-new-tokens = 9\nb = 1\n'
    file.write_text(text, encoding="utf-8")
    assert run_app(["search", "what melts", "--config", str(file)]) == 0
    assert len(json.loads(capsys.readouterr().out)["hits"]) == 1
    assert run_app(["search", "what melts", "--config", str(file), "-k", "9"]) == 0
    hits = json.loads(capsys.readouterr().out)["hits"]
    assert sorted(hit["id"] for hit in hits) == ["a", "b"]
    corpus = str(tmp_path / "corpus.jsonl")
    for program, arguments, line, message in [
        (app, ["search", "x"], "depth = 2.5", "depth is 2.5; expected a whole number"),
        (app, ["search", "x"], "exact = 1", "exact is 1; expected true or false"),
        (app, ["search", "x"], 'where = "a=b"', "expected a list, each item a string"),
        (app, ["ask", "x"], 'layout = "bogus"', "expected one of auto, chat, plain"),
        (app, ["ask", "x"], "no_exact = true", "unknown settings no_exact"),
        (app, ["ask", "x"], 'query = "x"', "unknown settings query"),
        (index_app, ["build", corpus], 'k1 = "1"', "k1 is '1'; expected a number"),
    ]:
        file.write_text(f'index = "{index}"\n{line}\n', encoding="utf-8")
        assert run(program, [*arguments, "--config", str(file)]) == 2
        error = capsys.readouterr().err
        assert message in error
        assert str(file) in error


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"retriever": "dnese"}, "retriever is 'dnese'; expected one of bm25, dense, hybrid"),
        ({"depth": "3"}, "depth is '3'; expected a whole number"),
        ({"depth": True}, "depth is True; expected a whole number"),
        ({"layout": "bogus", "server": "http://x/v1"}, "expected one of auto, chat, plain"),
        ({"device": 3}, "device is 3; expected a string"),
        ({"dpeth": 3}, "unknown settings dpeth"),
    ],
)
def test_a_pipelines_settings_are_checked(
    index: Path, tmp_path: Path, settings: dict[str, object], message: str
) -> None:
    with pytest.raises(SettingsError, match=re.escape(message)):
        load_pipeline(index, **settings)
    file = tmp_path / "rag.toml"
    lines = [f"{name} = {json.dumps(value)}" for name, value in settings.items()]
    file.write_text("\n".join(['index = "kb"', *lines]), encoding="utf-8")
    with pytest.raises(SettingsError, match=re.escape(f"{file}: ") + ".*" + re.escape(message)):
        load_pipeline(file)


def test_a_file_of_settings_that_names_no_index(tmp_path: Path) -> None:
    with pytest.raises(SettingsError, match=r"nofile\.toml: there is no such file"):
        load_pipeline(tmp_path / "nofile.toml")
    file = tmp_path / "rag.toml"
    for text, message in [("index = 5", "index is 5; expected a string"), ("", "names no index")]:
        file.write_text(text, encoding="utf-8")
        with pytest.raises(SettingsError, match=message):
            load_pipeline(file)


def test_search_shows_as_many_hits_as_are_asked_for(
    index: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    capsys.readouterr()
    arguments = ["search", "what melts", "--index", str(index), "--json", "--depth", "1", "-k", "3"]
    assert run_app(arguments) == 0
    assert len(json.loads(capsys.readouterr().out)["hits"]) == 3


@pytest.mark.parametrize(
    ("arguments", "code", "message"),
    [
        (["search", "x", "--index", "nowhere"], 1, "no index here"),
        (["search", "x"], 2, "--index"),
        (["search", "x", "--index", "KB", "--retriever", "dense"], 1, "built with the stores bm25"),
        (["search", "x", "--index", "KB", "--retriever", "nonsense"], 2, "nonsense"),
        (["search", "x", "--index", "KB", "--where", "kind"], 2, "FIELD=VALUE"),
        (["search", "x", "--index", "KB", "--k1", "-1"], 2, "k1 must be above 0"),
        (["search", "x", "--index", "KB", "--where", "kind=NaN"], 2, "--where 'kind=NaN'"),
        (["search", "x", "--index", "KB", "--where", "kind=[1e999]"], 2, "--where 'kind=[1e999]'"),
        (["search", "x", "--index", "KB", "-k", "0"], 2, "-k"),
        (["search", "x", "--index", "KB", "-k", "-1"], 2, "-k"),
        (["ask", "x", "--index", "KB", "--depth", "0"], 2, "depth must be at least 1, not 0"),
        (["ask", "x", "--index", "KB", "--keep", "-1"], 2, "keep must be at least 0, not -1"),
        (["ask", "x", "--index", "KB", "--server", ""], 2, "http://"),
        (["ask", "x", "--index", "KB", "--generator", ""], 1, "name of a model is empty"),
        (
            ["ask", "x", "--index", "KB", "--server", "http://x/v1", "--temperature", "nan"],
            2,
            "temperature nan",
        ),
        (["retrieve", "--index", "KB", "--questions", "none", "--run", "KB"], 2, "is a folder"),
        (
            ["retrieve", "--index", "KB", "--questions", "none", "--run", "KB/no/r.trec"],
            2,
            "there is no folder",
        ),
        (
            ["retrieve", "--index", "KB", "--questions", "none", "--run", "r.trec", "-k", "0"],
            2,
            "-k",
        ),
        (
            ["export", "--base", "x", "--virtual-tokens", "KB", "--output", "o"],
            1,
            "holds no virtual tokens",
        ),
        (["export", "--base", "x", "--virtual-tokens", "t", "--output", "KB"], 2, "--replace"),
        (["frobnicate"], 2, "frobnicate"),
        (
            ["evaluate", "--index", "KB", "--questions", "none.jsonl", "--output", "r"],
            1,
            "none.jsonl",
        ),
        (
            ["evaluate", "--index", "KB", "--questions", "none.jsonl", "--output", "KB"],
            2,
            "--replace",
        ),
    ],
)
def test_bad_usage_is_told_in_one_message(
    index: Path, capsys: pytest.CaptureFixture[str], arguments: list[str], code: int, message: str
) -> None:
    capsys.readouterr()
    assert run_app([word.replace("KB", str(index)) for word in arguments]) == code
    error = capsys.readouterr().err
    assert message in error
    assert "Traceback" not in error


def test_broken_record_stops_before_anything_is_written(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    file = tmp_path / "corpus.jsonl"
    file.write_text('{"id": "a", "text": "Tin melts."}\n{"id": "b", "text": \n', encoding="utf-8")
    arguments = ["build", str(file), "--index", str(tmp_path / "kb"), "--stores", "bm25"]
    assert run(index_app, arguments) == 1
    assert "corpus.jsonl:2" in capsys.readouterr().err
    assert not (tmp_path / "kb").exists()
    assert run(index_app, [*arguments, "--on-error", "skip", "--json"]) == 0
    built = json.loads(capsys.readouterr().out)
    assert built["documents"] == 1
    assert "corpus.jsonl:2" in built["skipped"][0]


def test_evaluate_writes_a_run_folder(
    index: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    questions = _lines(
        tmp_path / "questions.jsonl",
        [{"id": "q1", "question": "When does tin melt?", "answers": ["232"]}],
    )
    qrels = tmp_path / "qrels.tsv"
    qrels.write_text("query-id\tcorpus-id\tscore\nq1\tb\t1\n", encoding="utf-8")
    capsys.readouterr()
    arguments = [
        "evaluate",
        "--index",
        str(index),
        "--questions",
        str(questions),
        "--qrels",
        str(qrels),
    ]
    arguments += ["--output", str(tmp_path / "run"), "--no-reader", "--json"]
    assert run_app(arguments) == 0
    results = json.loads(capsys.readouterr().out)
    assert results["retrieval"]["nDCG@10"]["mean"] == 1.0
    trec, again = tmp_path / "run" / "run.trec", tmp_path / "again"
    scored = ["evaluate", "--run", str(trec), "--qrels", str(qrels), "--json"]
    assert run_app([*scored, "--output", str(again)]) == 0
    assert json.loads(capsys.readouterr().out)["retrieval"] == results["retrieval"]
    assert (again / "run.trec").read_bytes() == trec.read_bytes()


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["evaluate"], "needs --questions and --output, or --run and --qrels"),
        (["evaluate", "--run", "r.trec"], "--run needs --qrels"),
        (
            ["evaluate", "--questions", "q.jsonl", "--output", "o", "--contexts", "x"],
            "known are none",
        ),
        (["evaluate", "--questions", "q.jsonl", "--output", "o", "--noise", "a,b"], "holds 'a'"),
        (["search", "tin"], "pass --index FOLDER"),
    ],
)
def test_wrong_arguments_are_named(
    arguments: list[str], message: str, tmp_path: Path, capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:  # fmt: skip
    monkeypatch.chdir(tmp_path)
    (tmp_path / "q.jsonl").write_text(
        '{"id": "1", "text": "a", "answers": ["b"]}\n', encoding="utf-8"
    )
    assert run_app(arguments) == 2
    assert message in capsys.readouterr().err


@pytest.mark.parametrize(("sign", "code"), [(signal.SIGINT, 130), (signal.SIGTERM, 143)])
def test_an_interrupted_build_leaves_the_old_index(
    tmp_path: Path, index: Path, sign: signal.Signals, code: int
) -> None:
    more = _lines(
        tmp_path / "more.jsonl", [{"id": str(i), "text": f"word{i} " * 60} for i in range(60_000)]
    )
    command = [sys.executable, "-m", "ragkit.indexers", "build", str(more), "--index", str(index)]
    command += ["--stores", "bm25", "--replace"]
    process = subprocess.Popen(command, stderr=subprocess.PIPE, text=True, cwd=tmp_path)
    while process.poll() is None and not list((index / "segments").glob(".new-*/*/*")):
        time.sleep(0.02)
    process.send_signal(sign)
    _, error = process.communicate(timeout=60)
    assert process.returncode == code, error
    assert error == "interrupted; nothing is left half-written\n"
    assert run(index_app, ["check", "--index", str(index)]) == 0
    assert not list((index / "segments").glob(".new-*"))


def test_the_wheel_serves_each_program_in_an_empty_place(tmp_path: Path) -> None:
    source = tmp_path / "source"
    skipped = shutil.ignore_patterns(".*", "demo-output", "*.egg-info", "build", "dist", "tests")
    shutil.copytree(ROOT, source, ignore=skipped)
    pip = [sys.executable, "-m", "pip", "--quiet"]
    subprocess.run(
        [*pip, "wheel", "--no-deps", "--no-build-isolation", "--wheel-dir", tmp_path, source],
        check=True,
    )
    wheel = next(tmp_path.glob("ragkit-*.whl"))
    place = tmp_path / "place"
    subprocess.run([*pip, "install", "--no-deps", "--target", place, wheel], check=True)
    assert not (place / "trainers").exists()
    assert not (place / "indexers").exists()
    corpus = _lines(tmp_path / "corpus.jsonl", list(CORPUS))
    environment = os.environ | {"PYTHONPATH": str(place)}

    def call(*arguments: str) -> str:
        done = subprocess.run(
            [sys.executable, "-P", "-m", *arguments],
            cwd=tmp_path, env=environment, check=True, capture_output=True, text=True,
        )  # fmt: skip
        return done.stdout

    call("ragkit.indexers", "build", str(corpus), "--index", "kb", "--stores", "bm25")
    assert "Tin melts" in call("ragkit", "search", "tin", "--index", "kb")
    assert "virtual-tokens" in call("ragkit.trainers", "--help")
    where = subprocess.run(
        [sys.executable, "-P", "-c", "import ragkit; print(ragkit.__file__)"],
        cwd=tmp_path, env=environment, check=True, capture_output=True, text=True,
    )  # fmt: skip
    assert str(place) in where.stdout


class _ShortSighted(BiEncoder):
    """The default encoder, which remembers the longest text it was given, in tokens."""

    longest = 0
    loaded: SentenceTransformer | None = None

    @classmethod
    def load(
        cls,
        name: str,
        *,
        max_length: int | None = None,
        document_prompt: str | None = None,
        query_prompt: str | None = None,
        **_: Any,
    ) -> Self:
        loaded = cls.loaded = cls.loaded or BiEncoder.load("all-MiniLM-L6-v2").model
        loaded.max_seq_length = max_length or 256
        prompts = {"query_prompt": query_prompt, "document_prompt": document_prompt}
        return cls(loaded, name, precision="fp32", **prompts)

    def encode_documents(self, texts: Sequence[str], **options: Any) -> Any:
        lengths = self.model.tokenizer([self.document_prompt + text for text in texts])["input_ids"]
        type(self).longest = max(len(ids) for ids in lengths)
        return super().encode_documents(texts, **options)


@pytest.fixture
def short_sighted(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("ragkit.models.bi_encoder.BiEncoder", _ShortSighted)


@pytest.mark.parametrize(
    ("options", "longest", "told"),
    [
        ([], 256, None),
        (["--max-length", "40"], 40, None),
        (["--max-length", "64", "--document-prompt", "a text of mine: "], 64, None),
        (["--split-tokens", "0"], 600, "1 of 2 documents are longer than the 254 tokens"),
        (["--split-tokens", "20", "--split-overlap", "4"], 22, None),
        (["--split-tokens", "40"], 42, None),
    ],
)
@pytest.mark.usefixtures("short_sighted")
def test_no_piece_is_longer_than_the_encoder_reads(
    tmp_path: Path, capsys: pytest.CaptureFixture[str],
    options: list[str], longest: int, told: str | None,
) -> None:  # fmt: skip
    long = " ".join(f"Word {n} is here." for n in range(120)) + " x" * 300
    corpus = _lines(tmp_path / "c.jsonl", [{"id": "a", "text": long}, {"id": "b", "text": "Tin."}])
    command = ["build", str(corpus), "--index", str(tmp_path / "kb"), "--stores", "dense", *options]
    assert run(index_app, command) == 0
    assert longest - 8 <= min(_ShortSighted.longest, 600) <= longest
    error = capsys.readouterr().err
    assert (told or "") in error
    assert ("longer than" in error) == (told is not None)


@pytest.mark.usefixtures("short_sighted")
def test_a_long_title_that_hides_the_text_is_told(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    records = [{"id": "a", "title": "long title " * 20, "text": "Tin melts early. " * 20}]
    corpus = _lines(tmp_path / "c.jsonl", [*records, {"id": "b", "text": "Tin."}])
    command = ["build", str(corpus), "--index", str(tmp_path / "kb"), "--stores", "dense"]
    assert run(index_app, [*command, "--max-length", "40"]) == 0
    assert re.search(r"(\d+) of \d+ documents .* 38 tokens .*titles", capsys.readouterr().err)
    assert run(index_app, [*command, "--replace", "--max-length", "9"]) == 2
    assert "7 are left for the document" in capsys.readouterr().err
    assert run(index_app, [*command, "--replace", "--split-overlap", "128"]) == 2
    assert "overlap=128" in capsys.readouterr().err


@pytest.mark.usefixtures("short_sighted")
def test_refresh_gives_an_index_another_encoder(
    tmp_path: Path, index: Path, corpus: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    command = ["refresh", "--index", str(index), "--encoder"]

    def told(*arguments: str) -> dict[str, Any]:
        capsys.readouterr()
        assert run(index_app, [*command, *arguments, "--json"]) == 0
        found: dict[str, Any] = json.loads(capsys.readouterr().out)
        assert found["seconds"] >= 0
        return found

    first = told("tuned", "--document-prompt", "a text: ", "--max-length", "64")
    assert (first["changed"], first["encoded"], first["resumed"]) == (True, 3, 0)
    assert first["stores"] == ["bm25", "dense"]
    fresh = ["build", str(corpus), "--index", str(tmp_path / "fresh"), "--encoder", "tuned"]
    assert run(index_app, [*fresh, "--document-prompt", "a text: ", "--max-length", "64"]) == 0
    opened, built = Index.open(index), Index.open(tmp_path / "fresh")
    assert opened.manifest["encoder"] == built.manifest["encoder"]
    rows = np.arange(3)
    np.testing.assert_array_equal(opened.dense.vectors(rows), built.dense.vectors(rows))
    again = told("tuned", "--document-prompt", "a text: ", "--max-length", "64")
    assert (again["changed"], again["encoded"]) == (False, 0)
    asked = ["--document-prompt", "a text: ", "--max-length", "64", "--query-prompt", "asked: "]
    prompted = told("tuned", *asked)
    assert (prompted["changed"], prompted["encoded"]) == (True, 0)
    assert prompted["encoder"]["query_prompt"] == "asked: "

    for arguments, expected in (
        (["tuned", *asked], "nothing to do, its encoder is tuned already"),
        (["all-MiniLM-L6-v2", *asked], "none was encoded"),
        (["tuned"], r"3 documents encoded by tuned in \d+\.\d s, stores bm25, dense, 0\.\d MB"),
    ):
        assert run(index_app, [*command, *arguments]) == 0
        assert re.search(expected, capsys.readouterr().out)
    assert run(index_app, ["check", "--index", str(index)]) == 0


@pytest.mark.usefixtures("short_sighted")
def test_refresh_tells_of_pieces_that_the_encoder_cuts(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    records = [{"id": "a", "text": "Tin melts early. " * 20}, {"id": "b", "text": "Tin."}]
    corpus = _lines(tmp_path / "c.jsonl", [*records])
    place = ["--index", str(tmp_path / "kb")]
    assert run(index_app, ["build", str(corpus), *place, "--stores", "dense"]) == 0
    before = Index.open(tmp_path / "kb").manifest
    for prompt in ("", "question: "):  # nothing is encoded, and nothing told
        command = ["refresh", *place, "--encoder", "all-MiniLM-L6-v2", "--query-prompt", prompt]
        assert run(index_app, command) == 0
        assert capsys.readouterr().err == ""
    command = ["refresh", *place, "--encoder", "tuned", "--max-length"]
    assert run(index_app, [*command, "9"]) == 2
    assert "7 are left for the document" in capsys.readouterr().err
    assert Index.open(tmp_path / "kb").manifest["segments"] == before["segments"]
    assert run(index_app, [*command, "40"]) == 0
    message = "1 of 2 documents are longer than the 38 tokens that the encoder reads (the index"
    assert message in capsys.readouterr().err


def test_refresh_refuses_what_cannot_be(
    tmp_path: Path, index: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    before = {path: path.stat().st_mtime_ns for path in index.rglob("*")}
    for place, encoder, code, message in (
        (tmp_path / "nowhere", "all-MiniLM-L6-v2", 1, "no index here"),
        (index, str(tmp_path / "no/model"), 1, "no/model"),
        (index, str(tmp_path), 1, "cannot be loaded"),
    ):
        assert run(index_app, ["refresh", "--index", str(place), "--encoder", encoder]) == code
        assert message in capsys.readouterr().err
    assert run(index_app, ["refresh", "--index", str(index)]) == 2
    assert "--encoder" in capsys.readouterr().err
    assert {path: path.stat().st_mtime_ns for path in index.rglob("*")} == before
    assert not (tmp_path / "nowhere").exists()


def test_search_parameters_need_a_kind_that_has_some(
    tmp_path: Path, corpus: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    command = ["build", str(corpus), "--index", str(tmp_path / "kb"), "--search-parameters"]
    assert run(index_app, [*command, "nprobe=3", "--kind", "flat"]) == 2
    assert "exact search (flat) has none" in capsys.readouterr().err


def test_the_language_is_that_of_the_sentences_too(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    text = "Er kam heute. Das gilt am 3. Oktober 1990 um 12 Uhr."
    corpus = _lines(tmp_path / "c.jsonl", [{"id": "a", "text": text}])
    command = ["build", str(corpus), "--stores", "bm25", "--split-tokens", "14"]
    pieces = {}
    for language in ("german", "english"):
        path = tmp_path / language
        assert run(index_app, [*command, "--split-overlap", "0", "--language", language,
                               "--index", str(path)]) == 0  # fmt: skip
        pieces[language] = [document.text for document in Index.open(path).documents]
    assert pieces["german"] == [text[:13], text[14:]]
    assert pieces["english"] == [text[:28], text[29:]]


def test_numbers_of_a_filter_match_a_tables_spelling(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    table = tmp_path / "c.tsv"
    table.write_text("id\ttext\tyear\na\ttin melts\t1990\nb\ttin melts\t1991\n", encoding="utf-8")
    place = str(tmp_path / "kb")
    assert run(index_app, ["build", str(table), "--index", place, "--stores", "bm25"]) == 0
    capsys.readouterr()
    assert run_app(["search", "tin", "--index", place, "--where", "year=1990", "--json"]) == 0
    assert [hit["id"] for hit in json.loads(capsys.readouterr().out)["hits"]] == ["a"]
