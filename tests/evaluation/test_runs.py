import io
import json
import logging
import math
from dataclasses import replace

import pytest
from rich.console import Console

from ragkit import Answer, Document, Example, Hit, Pipeline, Query
from ragkit.artefacts import read_json
from ragkit.corpus import read_run
from ragkit.errors import DataError, SettingsError
from ragkit.evaluation import scoring
from ragkit.evaluation.answers import ANSWER_MEASURES
from ragkit.evaluation.metrics import retrieval_measures
from ragkit.evaluation.report import measures_table, results_table, run_tables
from ragkit.evaluation.runs import evaluate, evaluate_run
from ragkit.evaluation.statistics import bootstrap_means
from ragkit.stores.documents import matches

DOCUMENTS = {
    "p": Document("p", "Paris is the capital of France."),
    "l": Document("l", "Lyon lies on the Rhône."),
    "m#0": Document("m#0", "Mars is red.", "", {"parent": "m", "start": 0, "end": 12}),
    "m#1": Document("m#1", "Mars has two moons.", "", {"parent": "m", "start": 13, "end": 32}),
}


class Shelf:
    """A corpus of documents by id."""

    def __init__(self, documents=None, fingerprint="f"):
        self.documents = list(DOCUMENTS.values() if documents is None else documents)
        self._fingerprint = fingerprint

    def passing(self, where):
        return (d for d in self.documents if matches(where, d))

    def pieces(self, name, where=None):
        parents = [d for d in self.documents if d.metadata.get("parent") == name]
        found = [d for d in self.documents if d.id == name] or parents
        return [d for d in found if matches(where or {}, d)]

    def documents_fingerprint(self):
        return self._fingerprint


class Finder:
    """A retriever that finds what it is told to."""

    def __init__(self, found):
        self.found = found

    def retrieve(self, queries, k):
        return [
            [Hit(DOCUMENTS[name], score) for name, score in self.found.get(query.id, [])][:k]
            for query in queries
        ]


class Teller:
    """A reader that says what it is told to, citing its first hit."""

    def __init__(self, said):
        self.said = said

    def read(self, queries, hits):
        return [
            Answer(
                query,
                self.said[query.id],
                tuple(found),
                prompt=f"prompt of {query.id}",
                citations=(0,) if found else (),
                abstained=self.said[query.id] == "Unknown",
            )
            for query, found in zip(queries, hits, strict=True)
        ]


def example(name, *answers):
    return Example(Query(name, f"Question {name}?"), answers=answers)


FOUND = {
    "q1": [("p", 2.0), ("l", 2.0)],
    "q2": [("m#1", 3.0), ("l", 2.5), ("m#0", 1.0)],
    "q3": [("l", 1.0)],
}
EXAMPLES = [example("q1", "Paris"), example("q2", "two", "2"), example("q3"), example("q4", "Lyon")]
QRELS = {"q1": {"l": 1, "p": 0}, "q2": {"m": 2}, "beyond": {"z": 1}}
SAID = {"q1": "Paris [1].", "q2": "Two moons [1][2]", "q3": "Unknown", "q4": "Rome"}


def run(**options):
    reader = Teller(SAID)
    return evaluate(Pipeline(Finder(FOUND), None, reader, keep=2), EXAMPLES, **options)


def means(estimates):
    return {name: (value.mean, value.n) for name, value in estimates.items()}


def test_scores_by_value():
    results = run(qrels=QRELS, ks=(1, 2))
    # q1 keeps its order in spite of the tie: "l" is second. q2 counts as its parent, first.
    assert means(results.retrieval) == {
        "nDCG@10": (pytest.approx((1 / math.log2(3) + 1) / 2), 2),
        "MRR@10": (0.75, 2),
        "MAP": (0.75, 2),
        "recall@1": (0.5, 2),
        "recall@2": (1.0, 2),
        "hit@1": (0.5, 2),
        "hit@2": (1.0, 2),
        "answer@1": (0.0, 1),  # q4 has an answer and no qrels, and finds nothing
        "answer@2": (0.0, 1),
    }
    # q3 has no answer and the reader abstained: 1.
    assert means(results.answers) == {
        "EM": (pytest.approx(2 / 4), 4),
        "F1": (pytest.approx((1 + 2 / 3 + 1 + 0) / 4), 4),
        "cover": (pytest.approx(3 / 4), 4),
        "ROUGE-L": (pytest.approx((1 + 2 / 3 + 1 + 0) / 4), 4),
        # q1 cites what is not relevant, beside what is; q3 is rightly abstained from.
        "citation precision": (0.5, 2),
        "citation recall": (0.5, 2),
        "abstention precision": (1.0, 1),
        "abstention recall": (1.0, 1),
    }
    assert results.counts == {
        "questions": 4,
        "judged": 2,
        "with_gold": 4,
        "unjudged": 2,
        "nothing_relevant": 0,
        "unanswerable": 1,
        "without_gold": 0,
        "unknown_documents": 0,
        "nothing_found": 1,
        "abstained": 1,
        "not_staged": 0,
    }
    assert results.listed == {
        "unjudged": ["q3", "q4"],
        "unanswerable": ["q3"],
        "nothing_found": ["q4"],
        "abstained": ["q3"],
    }


def test_the_run_folder(tmp_path):
    output = tmp_path / "deep" / "run"
    results = run(qrels=QRELS, ks=(1, 2), output=output, settings={"index": {"format": 1}}, seed=5)
    assert sorted(path.name for path in output.iterdir()) == [
        "answers.jsonl",
        "passages.jsonl",
        "report.html",
        "results.json",
        "run.trec",
        "settings.json",
    ]
    settings = {"index": {"format": 1}, "ks": [1, 2], "need": "any", "seed": 5}
    assert read_json(output / "settings.json") == settings
    stored = read_json(output / "results.json")
    assert stored == json.loads(json.dumps(results.to_json()))
    assert stored["format"] == 2
    assert stored["settings"] == settings
    assert stored["retrieval"]["MAP"] == {
        "mean": 0.75,
        "low": results.retrieval["MAP"].low,
        "high": results.retrieval["MAP"].high,
        "n": 2,
    }
    for stage, kind in (("retrieve", "per_question"), ("read", "per_prompt")):
        cost = stored["costs"][stage]
        assert cost[kind] == cost["seconds"] / 4
    lines = (output / "answers.jsonl").read_text(encoding="utf-8").splitlines()
    rows = {row["id"]: row for row in map(json.loads, lines)}
    assert list(rows) == ["q1", "q2", "q3", "q4"]
    assert rows["q2"] == {
        "id": "q2",
        "question": "Question q2?",
        "golds": ["two", "2"],
        "answer": "Two moons [1][2]",
        "abstained": False,
        "citations": ["m#1"],
        "attributed": False,
        "shown": ["m#1", "l"],
        "prompt": "prompt of q2",
        "stage": "correct",
        "scores": {
            **{"nDCG@10": 1.0, "MRR@10": 1.0, "MAP": 1.0, "recall@1": 1.0, "recall@2": 1.0},
            **{"hit@1": 1.0, "hit@2": 1.0, "EM": 0.0, "F1": pytest.approx(2 / 3), "cover": 1.0},
            "ROUGE-L": pytest.approx(2 / 3),
        },
        "hits": [
            {"rank": 1, "id": "m#1", "parent": "m", "score": 3.0, "grade": 2},
            {"rank": 2, "id": "l", "score": 2.5, "grade": None},
            {"rank": 3, "id": "m#0", "parent": "m", "score": 1.0, "grade": 2},
        ],
    }
    assert rows["q4"]["hits"] == []
    nothing = dict.fromkeys(("answer@1", "answer@2", "EM", "F1", "cover", "ROUGE-L"), 0)
    assert rows["q4"]["scores"] == nothing


def test_trec_eval_gives_the_same_values_for_the_written_run(tmp_path):
    results = run(qrels=QRELS, output=tmp_path / "run")
    written = read_run(tmp_path / "run" / "run.trec")
    assert list(written["q2"]) == ["m", "l"]
    asked = {query: QRELS[query] for query in ("q1", "q2")}
    for name, values in retrieval_measures(written, asked, ks=[1, 5, 10, 20, 100]).items():
        assert sum(values.values()) / 2 == pytest.approx(results.retrieval[name].mean), name


def test_without_reader_retrieval_alone_is_measured(tmp_path):
    stages = []
    results = evaluate(
        Pipeline(Finder(FOUND), retrieve=2),
        EXAMPLES,
        qrels=QRELS,
        ks=[1, 2, 3],
        output=tmp_path / "run",
        progress=lambda *told: stages.append(told),
    )
    assert results.answers == {}
    assert "recall@2" in results.retrieval
    assert "recall@3" not in results.retrieval  # the pipeline retrieves two
    assert list(results.costs) == ["retrieve"]
    assert stages == [("retrieve", 0, 4), ("retrieve", 4, 4)]
    row = json.loads((tmp_path / "run" / "answers.jsonl").read_text().splitlines()[0])
    assert row.keys() == {"id", "question", "golds", "scores", "hits", "stage"}


def test_answers_alone_judge_retrieval_by_containment():
    found = {"q1": [("l", 9.0), ("p", 1.0)], "q2": [("m#0", 2.0)]}
    examples = [example("q1", "Paris"), example("q2", "two"), example("q3")]
    results = evaluate(Pipeline(Finder(found)), examples, ks=(1, 2))
    assert means(results.retrieval) == {"answer@1": (0.0, 2), "answer@2": (0.5, 2)}


def test_a_question_that_a_document_would_answer_is_not_unanswerable():
    examples = [example("q1", "Paris"), example("q2"), example("q3")]
    pipeline = Pipeline(Finder(FOUND), None, Teller(SAID))
    results = evaluate(pipeline, examples, qrels={"q2": {"m": 1}, "q1": {"p": 1}})
    assert results.listed["without_gold"] == ["q2"]
    assert results.listed["unanswerable"] == ["q3"]
    assert means(results.answers)["EM"] == (1.0, 2)


def test_without_gold_answers_there_are_no_answer_scores():
    pipeline = Pipeline(Finder(FOUND), None, Teller(SAID))
    results = evaluate(pipeline, [example("q1"), example("q3")], qrels=QRELS)
    assert set(results.answers) == {"citation precision", "citation recall"}
    assert results.counts["without_gold"] == 2
    assert results.counts["unanswerable"] == 0


def test_a_parent_field_of_the_users_own_is_not_a_split(monkeypatch):
    reply = Document("reply", "A reply.", "", {"parent": "p"})
    monkeypatch.setitem(DOCUMENTS, "reply", reply)
    found = {"q1": [("reply", 2.0), ("p", 1.0)]}
    results = evaluate(Pipeline(Finder(found)), [example("q1")], qrels={"q1": {"p": 1}}, ks=[1])
    assert results.retrieval["MRR@10"].mean == 0.5


def test_hashes_follow_the_data_that_was_asked():
    plain = run(qrels=QRELS).hashes
    assert run(qrels=QRELS | {"another": {"p": 1}}).hashes == plain
    assert run(qrels={"q1": {"l": 2}}).hashes["qrels"] != plain["qrels"]
    changed = [example("q1", "Lyon"), *EXAMPLES[1:]]
    pipeline = Pipeline(Finder(FOUND), None, Teller(SAID))
    assert evaluate(pipeline, changed, qrels=QRELS).hashes["questions"] != plain["questions"]


def test_unknown_documents_are_counted_and_listed(caplog):
    qrels = {"q1": {"p": 1, "gone": 1, "gone too": 0}, "q2": {"m": 1}}
    results = run(qrels=qrels, corpus=Shelf())
    assert results.counts["unknown_documents"] == 1
    assert results.listed["unknown_documents"] == ["gone"]
    assert "1 relevant documents are not in the index: 'gone'" in caplog.text
    with pytest.raises(DataError, match=r"none of the 3 relevant documents .* 'gone'"):
        run(qrels=qrels, corpus=Shelf([]))


def test_ids_of_another_corpus_are_warned_of(caplog):
    caplog.set_level(logging.WARNING)
    results = run(qrels={"q1": {"enwiki-1": 1}})
    assert results.retrieval["MAP"].mean == 0.0
    assert "the qrels judge none" in caplog.text
    assert "'enwiki-1'" in caplog.text


@pytest.mark.parametrize(
    ("examples", "qrels", "message"),
    [
        ([], QRELS, "no questions"),
        ([example("q1"), example("q1")], QRELS, "more than once: 'q1'"),
        ([example("q1")], None, "nothing can be measured"),
        ([example("q1", "Paris")], {"7": {"p": 1}}, "name none of the 1 questions.*'q1'.*'7'"),
        ([example("q1", "Paris")], {}, "the qrels name nothing"),
        ([example("q1", "Paris")], {"q1": {"p": 0}}, "no relevant document"),
    ],
)
def test_data_that_cannot_be_scored_is_refused_before_any_work(examples, qrels, message, tmp_path):
    class Never:
        def retrieve(self, queries, k):
            raise AssertionError("work was done")

    with pytest.raises(DataError, match=message):
        evaluate(Pipeline(Never()), examples, qrels=qrels, output=tmp_path / "run")
    assert list(tmp_path.iterdir()) == []


def test_scores_that_are_not_numbers_are_refused_and_nothing_is_left(tmp_path):
    pipeline = Pipeline(Finder({"q1": [("p", math.nan)]}))
    with pytest.raises(DataError, match="query 'q1': document 'p' has the score nan"):
        evaluate(pipeline, EXAMPLES, qrels=QRELS, output=tmp_path / "run")
    assert list(tmp_path.iterdir()) == []


def test_a_seed_or_answers_that_cannot_be_are_refused():
    with pytest.raises(SettingsError, match="seed must be at least 0, not -1"):
        evaluate(None, [], seed=-1)
    with pytest.raises(DataError, match=r"query 'q' are the string '232'.*\('232',\)"):
        Example(Query("q", "When?"), answers="232")


def test_settings_that_json_cannot_hold_are_refused_before_any_work(tmp_path):
    with pytest.raises(DataError, match="cannot be written as JSON"):
        run(qrels=QRELS, settings={"path": tmp_path})


def test_a_folder_in_the_way_is_refused_before_any_work(tmp_path):
    output = tmp_path / "run"
    run(qrels=QRELS, output=output)
    before = (output / "results.json").read_bytes()

    class Never:
        def retrieve(self, queries, k):
            raise AssertionError("work was done")

    with pytest.raises(SettingsError, match="exists already"):
        evaluate(Pipeline(Never()), EXAMPLES, qrels=QRELS, output=output)
    assert (output / "results.json").read_bytes() == before
    run(qrels=QRELS, output=output, replace=True, seed=9)
    assert read_json(output / "settings.json")["seed"] == 9


def test_an_interrupted_run_leaves_the_old_folder_and_nothing_else(tmp_path):
    output = tmp_path / "run"
    run(qrels=QRELS, output=output)

    class Interrupted:
        def read(self, queries, hits):
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        evaluate(
            Pipeline(Finder(FOUND), None, Interrupted()),
            EXAMPLES,
            qrels=QRELS,
            output=output,
            replace=True,
        )
    assert [path.name for path in tmp_path.iterdir()] == ["run"]
    assert len(list(output.iterdir())) == 6


def test_a_reader_that_loses_the_order_is_refused():
    class Shuffled(Teller):
        def read(self, queries, hits):
            return super().read(queries, hits)[::-1]

    with pytest.raises(DataError, match="keep the order"):
        evaluate(Pipeline(Finder(FOUND), None, Shuffled(SAID)), EXAMPLES, qrels=QRELS)


def text_of(table):
    console = Console(width=160, file=io.StringIO())
    with console.capture() as capture:
        console.print(table)
    return capture.get()


def test_tables():
    full = run(qrels=QRELS, ks=(1, 10))
    retrieval = evaluate(Pipeline(Finder(FOUND)), EXAMPLES, qrels=QRELS, ks=(1, 10))
    shown = text_of(results_table([("read", full), ("found", retrieval)]))
    assert "nDCG@10" in shown
    assert "n = 2" in shown
    lines = shown.splitlines()
    place = next(place for place, line in enumerate(lines) if "read" in line)
    for estimate in (full.retrieval["nDCG@10"], full.answers["EM"]):
        assert f"{estimate.mean:.3f}" in lines[place]
        assert str(estimate).split(" ", 1)[1] in lines[place + 1]
    line = next(line for line in lines if "found" in line)
    assert line.split("│")[-2].isspace()  # no F1 without a reader
    one = text_of(measures_table(full))
    line = next(line for line in one.splitlines() if "MAP" in line)
    estimate = full.retrieval["MAP"]
    assert f"{estimate.mean:.3f}" in line
    assert f"{estimate.low:.3f} – {estimate.high:.3f}" in line


def test_with_a_corpus_answers_need_no_qrels():
    results = run(corpus=Shelf())
    assert results.counts["unknown_documents"] == 0
    assert results.retrieval["answer@1"].n == 3


def test_measures_over_the_same_questions_share_what_is_drawn(monkeypatch):
    drawn = []

    def counted(columns, *given, **options):
        drawn.append(columns)
        return bootstrap_means(columns, *given, **options)

    monkeypatch.setattr(scoring, "bootstrap_means", counted)
    scores = {
        "F1": {"a": 1.0, "b": 0.0, "c": 0.5},
        "judge": {"b": 1.0},
        "none": {},
        "EM": {"c": 0.0, "b": 0.0, "a": 1.0},
    }
    found = scoring.means(scores, 3)
    assert list(found) == ["F1", "judge", "EM"]
    assert drawn == [[[1.0, 0.0, 0.5], [1.0, 0.0, 0.0]], [[1.0]]]  # in one order of questions
    f1, em = bootstrap_means(drawn[0], seed=3)
    assert (found["F1"], found["EM"]) == (f1, em)
    assert means(found) == {"F1": (0.5, 3), "judge": (1.0, 1), "EM": (pytest.approx(1 / 3), 3)}


# --- contexts, evidence, stages


def everything(**options):
    corpus = Shelf()
    examples = [example("q1", "Paris"), example("q2", "two", "moons"), example("q3")]
    qrels = {"q1": {"p": 1}, "q2": {"m": 1}}
    pipeline = Pipeline(Finder(FOUND), None, Teller(SAID), keep=2)
    return evaluate(pipeline, examples, qrels=qrels, corpus=corpus, **options)


def test_contexts_are_read_in_one_call_and_kept_by_question(tmp_path):
    calls = []

    class Counting(Teller):
        def read(self, queries, hits):
            calls.append(
                [
                    (q.id, [h.document.id for h in found])
                    for q, found in zip(queries, hits, strict=True)
                ]
            )
            return super().read(queries, hits)

    examples = [example("q1", "Paris"), example("q2", "two", "moons"), example("q3")]
    results = evaluate(
        Pipeline(Finder(FOUND), None, Counting(SAID), keep=2),
        examples,
        qrels={"q1": {"p": 1}, "q2": {"m": 1}},
        corpus=Shelf(),
        contexts=["retrieved", "none", "gold", "wrong"],
        noise=[1.0],
        output=tmp_path / "run",
    )
    assert len(calls) == 1
    assert results.costs["read"].prompts == 13
    console = Console(width=200, file=io.StringIO())
    with console.capture() as capture:
        console.print(run_tables(results)[-1])
    lines = {line.split()[1]: line for line in capture.get().splitlines() if " a " in line}
    assert f"{1000 * results.costs['read'].seconds / 13:.1f} a prompt" in lines["read"]
    assert f"{1000 * results.costs['retrieve'].seconds / 3:.1f} a question" in lines["retrieve"]
    assert calls[0] == [
        ("q1", ["p", "l"]), ("q2", ["m#1", "l"]), ("q3", ["l"]),
        ("q1", []), ("q1", ["p"]), ("q1", ["l"]), ("q1", ["l"]),
        # The piece of m that holds an answer; what is m's other piece is no distractor.
        ("q2", []), ("q2", ["m#1"]), ("q2", ["l"]), ("q2", ["l"]),
        ("q3", []), ("q3", ["l"]),
    ]  # fmt: skip
    assert means(results.contexts["none"])["cover"] == (1.0, 3)
    assert means(results.contexts["gold"])["EM"] == (0.5, 2)
    assert set(results.contexts) == {"retrieved", "none", "gold", "wrong", "noise 100 %"}
    assert results.figures["context gain (F1)"].n == 3
    rows = [json.loads(row) for row in (tmp_path / "run/answers.jsonl").read_text().splitlines()]
    assert rows[1]["contexts"]["gold"] == {
        "answer": "Two moons [1][2]", "abstained": False, "attributed": False,
        "citations": ["m#1"], "shown": ["m#1"], "scores": rows[1]["scores"] | {},
    } | {"scores": {name: rows[1]["scores"][name] for name in ANSWER_MEASURES}}  # fmt: skip
    passages = (tmp_path / "run/passages.jsonl").read_text().splitlines()
    assert sorted(json.loads(line)["id"] for line in passages) == ["l", "m#0", "m#1", "p"]


class Tokens:
    """Two virtual tokens, as far as an evaluation asks."""

    layout, placement = "plain", "middle"

    def __len__(self):
        return 2

    def to_json(self):
        return {"base": "b", "count": 2, "hash": "h"}


class Plugged(Teller):
    """A reader whose generator has virtual tokens: with all of them it is always right."""

    use_tokens = 1

    def __init__(self, said):
        super().__init__(said)
        self.calls = []
        self.right = {"q1": "Paris", "q2": "two", "q3": "Unknown"}
        self.generator = type("Model", (), {"virtual_tokens": Tokens()})()

    def read(self, queries, hits, use_tokens=None):
        self.calls.append(use_tokens)
        counts = [self.use_tokens] * len(queries) if use_tokens is None else use_tokens
        return [
            Teller(self.right if count == 2 else self.said).read([query], [found])[0]
            for query, found, count in zip(queries, hits, counts, strict=True)
        ]


def counted(reader, **options):
    examples = [example("q1", "Paris"), example("q2", "two", "moons"), example("q3")]
    pipeline = Pipeline(Finder(FOUND), None, reader, keep=2)
    qrels = {"q1": {"p": 1}, "q2": {"m": 1}}
    return evaluate(pipeline, examples, qrels=qrels, corpus=Shelf(), **options)


def test_token_counts_are_rows_of_the_contexts_table_read_in_the_same_call(tmp_path):
    reader = Plugged(SAID)
    results = counted(reader, token_counts=(0, 2), output=tmp_path / "run")
    assert reader.calls == [[1, 1, 1] + [0, 2] * 3]
    assert list(results.contexts) == ["retrieved with 0 tokens", "retrieved with 2 tokens"]
    assert results.answers["EM"].mean == results.contexts["retrieved with 0 tokens"]["EM"].mean
    assert means(results.contexts["retrieved with 2 tokens"])["EM"] == (1.0, 3)
    assert results.costs["read"].prompts == 9
    kept = read_json(tmp_path / "run" / "settings.json")
    assert kept["virtual_tokens"] == {
        "base": "b", "count": 2, "hash": "h", "layout": "plain", "placement": "middle", "used": 1,
    }  # fmt: skip
    rows = [json.loads(row) for row in (tmp_path / "run/answers.jsonl").read_text().splitlines()]
    assert rows[1]["answer"] == "Two moons [1][2]"
    assert rows[1]["contexts"]["retrieved with 2 tokens"]["answer"] == "two"
    page = (tmp_path / "run/report.html").read_text()
    assert "retrieved with 2 tokens" in page and "1 of 2" in page


def test_each_context_is_read_with_each_token_count():
    reader = Plugged(SAID)
    contexts = ["gold", "none"]
    results = counted(reader, contexts=contexts, noise=[1.0], token_counts=[1, 0])
    # q1 and q2 have gold passages and distractors for the noise, which is read once.
    assert reader.calls == [[1] * 3 + [1, 1, 1] * 2 + [1] + [1, 0] * 5]
    assert list(results.contexts) == [
        "gold", "gold with 1 token", "gold with 0 tokens",
        "none", "none with 1 token", "none with 0 tokens", "noise 100 %",
    ]  # fmt: skip
    plain = Plugged(SAID)
    found = counted(plain, contexts=contexts, noise=[1.0])
    assert plain.calls == [None]  # a reader that knows no numbers of tokens serves as well
    assert found.contexts == {name: results.contexts[name] for name in found.contexts}


@pytest.mark.parametrize(
    ("reader", "counts", "message"),
    [
        (Plugged(SAID), [0, 3, -1], r"there are 2 virtual tokens: .* not at \[3, -1\]"),
        (Plugged(SAID), [1, 0, 1], r"asked for twice: \[1, 0, 1\]"),
        (Teller(SAID), [0], r"\[0\] are asked for, and no reader here has virtual tokens"),
        (None, [0], "no reader here has virtual tokens"),
    ],
)
def test_token_counts_that_cannot_be(tmp_path, reader, counts, message):
    with pytest.raises(SettingsError, match=message):
        counted(reader, token_counts=counts, output=tmp_path / "run")
    assert not (tmp_path / "run").exists()


def test_questions_without_a_noise_sweep_are_counted_and_listed(caplog):
    found = everything(noise=[0.0, 0.5])
    assert found.contexts["noise 50 %"]["F1"].n == 2
    assert found.counts["noise_left_out"] == 1
    assert found.listed["noise_left_out"] == ["q3"]  # it has no answer, and so no gold passage
    assert "noise sweep" not in caplog.text
    assert "noise_left_out" not in everything().counts
    # One distractor was found of each question, and the share of 80 % asks for four.
    found = everything(noise=[0.8])
    assert found.counts["noise_left_out"] == 3 and "noise 80 %" not in found.contexts
    assert "of 3 questions, 2 are with too few distractors, 1 are without gold pass" in caplog.text
    caplog.clear()
    assert everything(noise=[0.3]).counts["noise_left_out"] == 3
    assert "2 are with gold passages beside which a share of distractors cannot" in caplog.text
    assert "One gold passage reaches the shares 0, 0.5, 0.67, 0.75, 0.8" in caplog.text


def test_a_question_whose_answers_are_not_scored_is_left_out_of_the_sweep():
    examples = [example("q1", "Paris"), example("q2")]
    pipeline = Pipeline(Finder(FOUND), None, Teller(SAID), keep=2)
    qrels = {"q1": {"p": 1}, "q2": {"m": 1}}
    found = evaluate(pipeline, examples, qrels=qrels, corpus=Shelf(), noise=[0.5])
    assert found.listed["noise_left_out"] == ["q2"]
    assert found.contexts["noise 50 %"]["F1"].n == 1


def test_stages_of_a_run():
    losses = everything().stages
    assert losses.counts == {"correct": 3}

    reader = Teller(SAID | {"q1": "Rome", "q2": "Unknown", "q3": "Mars"})
    pipeline = Pipeline(Finder(FOUND | {"q4": FOUND["q3"]}), None, reader, keep=1)
    examples = [*EXAMPLES, example("q5", "nowhere to be found")]
    reader.said |= {"q4": "Rome", "q5": "Rome"}
    losses = evaluate(pipeline, examples, corpus=Shelf()).stages
    assert losses.stages == {
        "q1": "misread",
        "q2": "abstained wrongly",
        "q3": "should have abstained",
        "q4": "misread",
        "q5": "not in the corpus",
    }
    needs = evaluate(
        Pipeline(Finder({"q1": [("p", 2.0)]}), None, Teller({"q1": "Rome"}), keep=1),
        [example("q1", "Paris")],
        qrels={"q1": {"p": 1, "l": 1}},
        corpus=Shelf(),
        need="all",
    )
    assert needs.stages.stages == {"q1": "not retrieved"}


def test_judged_questions_without_gold_answers_are_in_no_stage_and_counted():
    examples = [example("q1", "Paris"), example("q2"), example("q3")]
    qrels = {"q1": {"p": 1}, "q2": {"m": 1}}

    def shown(results):
        console = Console(width=200, file=io.StringIO())
        with console.capture() as capture:
            console.print(*run_tables(results), sep="\n\n")
        return capture.get()

    results = evaluate(Pipeline(Finder(FOUND), None, Teller(SAID)), examples, qrels=qrels)
    assert results.stages.counts == {"correct": 2}
    assert results.counts["not_staged"] == 1 and results.listed["not_staged"] == ["q2"]
    assert "1 judged question is in no stage: without gold answers" in shown(results)
    # Without a reader it counts how far their evidence came.
    results = evaluate(Pipeline(Finder(FOUND)), examples, qrels=qrels)
    assert results.stages.stages.keys() == {"q1", "q2"}
    assert "not_staged" not in results.counts and "in no stage" not in shown(results)


@pytest.mark.parametrize("reader", [None, Teller({"q1": "Rome"})])
@pytest.mark.parametrize(
    ("keep", "need", "stage"),
    [
        (1, "all", "needs more passages than kept"),
        (0, "any", "needs more passages than kept"),
        (1, "any", "ranked too low"),
        (2, "all", "ranked too low"),
    ],
)
def test_the_retriever_is_not_blamed_where_too_few_passages_are_kept(reader, keep, need, stage):
    found = {"q1": [("m#0", 3.0), ("p", 2.0), ("l", 1.0)]}
    losses = evaluate(
        Pipeline(Finder(found), None, reader, keep=keep),
        [example("q1", "Paris")],
        qrels={"q1": {"p": 1, "l": 1}},
        corpus=Shelf(),
        need=need,
    ).stages
    assert losses.stages == {"q1": stage}
    if stage == "needs more passages than kept":
        assert losses.advice.startswith("Give the reader more passages or a longer context: for")


def test_a_relevant_document_behind_a_filter_was_not_in_the_corpus():
    asked = [
        replace(example(name, "Paris"), query=Query(name, "?", where))
        for name, where in (("q1", {"id": "l"}), ("q2", {}))
    ]
    found = {"q1": [("l", 1.0)], "q2": [("l", 1.0)]}
    for qrels in (None, {"q1": {"p": 1}, "q2": {"p": 1}}):
        results = evaluate(Pipeline(Finder(found)), asked, qrels=qrels, corpus=Shelf())
        assert results.stages.stages == {"q1": "not in the corpus", "q2": "not retrieved"}


def test_a_reranker_is_timed_apart_and_blamed_for_what_it_drops():
    class Reverse:
        def rerank(self, queries, hits, k):
            return [found[::-1][:k] for found in hits]

    pipeline = Pipeline(Finder(FOUND), Reverse(), Teller(SAID | {"q1": "Rome"}), keep=1)
    results = evaluate(pipeline, [example("q1", "Paris")], qrels={"q1": {"p": 1}}, corpus=Shelf())
    assert results.stages.stages == {"q1": "dropped by the reranker"}
    assert list(results.costs) == ["retrieve", "rerank", "read"]


def test_a_passage_that_was_cut_before_its_answer_was_not_shown(monkeypatch):
    class Cutting(Teller):
        def read(self, queries, hits):
            answers = super().read(queries, hits)
            return [replace(answer, text="Rome", cut=len("Mars has ")) for answer in answers]

    # "2" stands in the prompt's instruction and question, and in a passage that is not relevant.
    monkeypatch.setitem(DOCUMENTS, "l", Document("l", "Lyon has 2 rivers.", "2"))
    monkeypatch.setitem(DOCUMENTS, "m#1", replace(DOCUMENTS["m#1"], text="Mars has 2 moons."))
    found = {"q2": [("l", 3.0), ("m#1", 2.0)]}
    pipeline = Pipeline(Finder(found), None, Cutting({"q2": ""}), keep=2)
    for golds, stage in (
        (("2", "two"), "cut from the prompt"),
        (("Mars",), "misread"),
        (("three",), "misread"),  # no passage ever held it, so that none was cut off it
    ):
        results = evaluate(pipeline, [example("q2", *golds)], qrels={"q2": {"m": 1}})
        assert results.stages.stages == {"q2": stage}


class Judging:
    """A judge that says what it is told of an answer."""

    def __init__(self, said):
        self.said, self.asked = said, []

    def generate(self, prompts, *, max_new_tokens, temperature, seed, progress):
        self.asked += [prompt.text for prompt in prompts]
        return [
            next((reply for words, reply in self.said.items() if words in prompt.text), "Well …")
            for prompt in prompts
        ]


def test_a_judge_scores_what_it_clearly_says(tmp_path):
    judge = Judging({"Two moons": "CORRECT", "Rome": "INCORRECT"})
    results = run(qrels=QRELS, judge=judge, output=tmp_path / "run")
    assert means(results.answers)["judge correct"] == (0.5, 2)
    assert "judge faithful" not in results.answers  # no reply could be read
    assert results.listed["judge_correct_unread"] == ["q1", "q3"]
    assert results.counts["judge_faithful_unread"] == 2  # those with passages that did not abstain
    assert results.settings["judge"]["rubrics"][0]["name"] == "correct"
    rows = [json.loads(row) for row in (tmp_path / "run/answers.jsonl").read_text().splitlines()]
    assert rows[0]["judge"]["correct"] == {"reply": "Well …", "verdict": None}
    assert rows[1]["scores"]["judge correct"] == 1.0
    assert results.costs["judge"].prompts == len(judge.asked) == 4 + 2


def test_the_judge_of_faithfulness_sees_passages_as_the_reader_saw_them(monkeypatch):
    class Cutting(Teller):
        def read(self, queries, hits):
            return [replace(answer, cut=8) for answer in super().read(queries, hits)]

    monkeypatch.setitem(DOCUMENTS, "l", replace(DOCUMENTS["l"], title="A city"))
    judge = Judging({})
    pipeline = Pipeline(Finder(FOUND), None, Cutting(SAID), keep=2)
    evaluate(pipeline, [example("q1", "Paris")], judge=judge)
    _, faithful = judge.asked
    assert "Paris is the capital of France." in faithful  # only the last one shown is cut
    assert "\nA city\nLyon lie\n" in faithful and "Rhône" not in faithful


# --- runs of other systems


def test_a_run_of_any_system_is_scored_as_trec_eval_does(tmp_path):
    ranking = {"q1": {"a": 2.0, "b": 2.0}, "q2": {"c": 1.0}, "extra": {"a": 1.0}}
    qrels = {"q1": {"a": 1}, "q2": {"d": 1}, "missing": {"a": 1}}
    results = evaluate_run(ranking, qrels, ks=[1], output=tmp_path / "run")
    # Of equal scores trec_eval puts "b" first.
    assert means(results.retrieval)["MRR@10"] == (pytest.approx(0.5 / 3), 3)
    assert results.listed["nothing_found"] == ["missing"]
    assert results.listed["unjudged"] == ["extra"]
    assert read_run(tmp_path / "run" / "run.trec").keys() == {"q1", "q2", "extra"}
    expected = retrieval_measures(ranking, qrels, [1])
    rows = [json.loads(row) for row in (tmp_path / "run/answers.jsonl").read_text().splitlines()]
    assert {row["id"]: row["scores"].get("nDCG@10") for row in rows} == expected["nDCG@10"] | {
        "extra": None
    }


@pytest.mark.parametrize(
    ("ranking", "message"),
    [
        ({}, "the run is empty"),
        ({"q1": {}}, "the run is empty"),
        ({"7": {"a": 1.0}}, "no query in common: the run names '7', the qrels 'q1'"),
        ({"q1": {"a": math.nan}}, "'a' has the score nan"),
    ],
)
def test_runs_that_cannot_be_scored(ranking, message):
    with pytest.raises(DataError, match=message):
        evaluate_run(ranking, {"q1": {"a": 1}})


def test_a_page_that_fails_does_not_take_the_run_with_it(tmp_path, monkeypatch, caplog):
    def fail(folder):
        raise DataError("no page today")

    monkeypatch.setattr("ragkit.evaluation.runs.write_page", fail)
    run(qrels=QRELS, output=tmp_path / "run")
    assert (tmp_path / "run" / "results.json").is_file()
    assert "without its page: no page today" in caplog.text


def test_probes_are_kept_with_the_run_and_compared_item_by_item(tmp_path):
    from ragkit.evaluation.comparison import compare
    from ragkit.evaluation.probes import ProbeScores
    from ragkit.evaluation.statistics import Estimate
    from ragkit.evaluation.systems import group_runs

    def scores(*right):
        estimates = {"accuracy": Estimate(sum(right) / 3, 0.0, 1.0, 3)}
        return ProbeScores("arc", "choices", "h", ("1", "2", "3"), estimates, {"accuracy": right})

    before = run(qrels=QRELS, output=tmp_path / "a", probes=[scores(1.0, 1.0, 0.0)])
    run(qrels=QRELS, output=tmp_path / "b", probes=[scores(1.0, 0.0, 0.0)])
    assert before.to_json()["probes"]["arc"]["accuracy"]["n"] == 3
    found = compare(group_runs([f"one={tmp_path / 'a'}", f"two={tmp_path / 'b'}"]))
    (outcome,) = [o for o in found.outcomes if o.measure == "accuracy (arc)"]
    assert (outcome.difference.mean, outcome.difference.n) == (pytest.approx(-1 / 3), 3)
    assert (outcome.difference.wins, outcome.difference.losses) == (0, 1)


def test_all_that_a_run_shows_fits_a_narrow_terminal():
    results = everything(contexts=["none", "retrieved", "gold"], noise=[0.5])
    console = Console(width=80, file=io.StringIO())
    with console.capture() as capture:
        console.print(*run_tables(results, title="a run"), sep="\n\n")
    shown = capture.get()
    for words in (
        "gold",
        "context gain (F1)",
        "Where questions",
        "tokens",
        "Nothing was",
    ):
        assert words in shown
    assert str(results.figures["context gain (F1)"]) in shown


def test_queries_that_nobody_judged_do_not_make_runs_incomparable():
    qrels = {"q1": {"a": 1}}
    one = evaluate_run({"q1": {"a": 1.0}}, qrels)
    other = evaluate_run({"q1": {"b": 1.0}, "q2": {"a": 1.0}}, qrels)
    assert one.hashes == other.hashes
