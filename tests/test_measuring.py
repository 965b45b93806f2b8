"""The commands that measure, over a small BM25 index."""

import json

import pytest

from ragkit import Document, Index
from ragkit.__main__ import run_app

TEXTS = {
    "tin": "Tin melts at 232 degrees Celsius.",
    "lead": "Lead melts at 327 degrees Celsius.",
    "gallium": "Gallium melts at 30 degrees Celsius, in the hand.",
    "brie": "Brie is a soft cheese.",
}
QUESTIONS = [
    {"id": "q1", "question": "At how many degrees does tin melt?", "answers": ["232"]},
    {"id": "q2", "question": "At how many degrees does lead melt?", "answers": ["327"]},
    {"id": "q3", "question": "Which metal melts in the hand?", "answers": ["gallium"]},
]


@pytest.fixture
def place(tmp_path, monkeypatch):
    """A folder with an index `kb`, questions and qrels, which commands run in."""
    monkeypatch.chdir(tmp_path)
    documents = [Document(name, text) for name, text in TEXTS.items()]
    Index.build("kb", documents, stores=["bm25"])
    lines = "".join(json.dumps(question) + "\n" for question in QUESTIONS)
    (tmp_path / "q.jsonl").write_text(lines)
    (tmp_path / "qrels.tsv").write_text("q1 0 tin 1\nq2 0 lead 1\nq3 0 gallium 1\n")
    return tmp_path


def evaluated(name, *options):
    command = ["evaluate", "--index", "kb", "--questions", "q.jsonl", "--qrels", "qrels.tsv"]
    assert run_app([*command, "--output", name, "--no-reader", "--json", *options]) == 0


def test_a_run_is_a_folder_with_its_page_and_what_it_was_made_with(place, capsys):
    evaluated("run")
    assert {path.name for path in (place / "run").iterdir()} == {
        "report.html", "results.json", "answers.jsonl", "passages.jsonl", "run.trec",
        "settings.json",
    }  # fmt: skip
    settings = json.loads((place / "run" / "settings.json").read_text())
    assert settings["command"]["retriever"] == "bm25"  # as it was resolved
    assert settings["command"]["variant"] == "lucene"
    assert "Tin melts at 232" in (place / "run" / "passages.jsonl").read_text()


def test_a_run_compared_with_itself_differs_by_nothing(place, capsys):
    evaluated("a")
    capsys.readouterr()
    assert run_app(["compare", "a", "a", "--json", "--output", "c.json"]) == 0
    outcomes = json.loads(capsys.readouterr().out)["outcomes"]
    assert outcomes
    for outcome in outcomes:
        found = outcome["difference"]
        assert found["mean"] == found["low"] == found["high"] == 0
        assert found["permutation_p"] == found["bootstrap_p"] == outcome["holm_p"] == 1
    assert json.loads((place / "c.json").read_text())["outcomes"] == outcomes
    assert run_app(["compare", "a", "a"]) == 0
    shown = capsys.readouterr().out
    assert "nDCG@10" in shown and "w/t/l" in shown
    assert run_app(["compare", "a", "a", "--json", "--measures", "nDCG@10, MAP"]) == 0
    outcomes = json.loads(capsys.readouterr().out)["outcomes"]
    assert sorted(outcome["measure"] for outcome in outcomes) == ["MAP", "nDCG@10"]
    assert run_app(["compare", "a", "a", "--measures", "nDCG@11"]) == 2
    assert "no run has the measures nDCG@11; they have" in capsys.readouterr().err


def test_runs_of_other_questions_documents_or_judgements_are_refused(place, capsys):
    evaluated("a")
    evaluated("fewer", "--limit", "2")
    assert run_app(["compare", "a", "fewer"]) == 1
    assert "questions" in capsys.readouterr().err
    Index.build("kb", [Document("tin", "Tin melts.")], stores=["bm25"], replace=True)
    (place / "qrels.tsv").write_text("q1 0 tin 1\nq2 0 tin 0\nq3 0 tin 0\n")
    evaluated("judged otherwise")
    assert run_app(["compare", "a", "judged otherwise"]) == 1
    assert "qrels" in capsys.readouterr().err
    (place / "qrels.tsv").write_text("q1 0 tin 1\nq2 0 lead 1\nq3 0 gallium 1\n")
    evaluated("b")
    assert run_app(["compare", "a", "b"]) == 1
    assert "--other-corpus" in capsys.readouterr().err
    assert run_app(["compare", "a", "b", "--other-corpus"]) == 0


@pytest.mark.parametrize("arguments", [["compare"], ["compare", "a"]])
def test_one_run_is_no_comparison(place, capsys, arguments):
    evaluated("a")
    assert run_app(arguments) == 2


def test_leaks_between_two_sets_and_a_corpus(place, capsys):
    test = [
        {"id": "t1", "question": "at how many degrees does TIN melt", "answers": ["232"]},
        {"id": "t2", "question": "Who wrote the Iliad?", "answers": ["Homer"]},
    ]
    (place / "t.jsonl").write_text("".join(json.dumps(question) + "\n" for question in test))
    (place / "c.jsonl").write_text('{"id": "tin", "text": "Tin melts at 232 degrees."}\n')
    command = ["leaks", "q.jsonl", "t.jsonl", "--corpus", "c.jsonl"]
    assert run_app([*command, "--json", "--output", "l.json"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert [(pair["ids"], pair["other_ids"], pair["exact"]) for pair in found["pairs"]] == [
        (["t1"], ["q1"], True)
    ]
    assert [absent["id"] for absent in found["absent"]] == ["t2"]
    assert json.loads((place / "l.json").read_text()) == found
    assert run_app(command) == 0
    assert "t.jsonl against q.jsonl" in capsys.readouterr().out
    # Of the training questions only the second is judged, and the leak is gone.
    (place / "some.tsv").write_text("q2 0 lead 1\n")
    assert run_app([*command, "--train-qrels", "some.tsv", "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["pairs"] == []


def test_a_folder_that_is_no_run_is_never_replaced(place, capsys):
    (place / "mine").mkdir()
    (place / "mine" / "precious.txt").write_text("x")
    command = ["evaluate", "--index", "kb", "--questions", "q.jsonl", "--output", "mine"]
    assert run_app([*command, "--no-reader", "--replace"]) == 2
    assert "has no results.json" in capsys.readouterr().err
    assert (place / "mine" / "precious.txt").read_text() == "x"


def test_a_question_too_long_for_the_generator_is_refused_before_any_work(place, capsys):
    (place / "long.jsonl").write_text(
        json.dumps({"id": "q1", "question": "tin " * 9000, "answers": ["232"]}) + "\n"
    )
    command = ["evaluate", "--index", "kb", "--questions", "long.jsonl", "--output", "run"]
    assert run_app([*command, "--server", "http://127.0.0.1:9/v1", "--generator", "m"]) == 1
    assert "Shorten it" in capsys.readouterr().err  # the server was not asked
    assert not (place / "run").exists()


def test_probes_need_a_model_that_tells_likelihoods(place, capsys):
    (place / "p.jsonl").write_text(
        '{"id": "1", "question": "Is tin a metal?", "choices": ["yes", "no"], "answer": 0}\n'
    )
    command = ["evaluate", "--index", "kb", "--questions", "q.jsonl", "--output", "run"]
    server = ["--server", "http://127.0.0.1:9/v1", "--generator", "m"]
    assert run_app([*command, *server, "--probes", "p.jsonl"]) == 2
    assert "--probes needs a local generator" in capsys.readouterr().err
