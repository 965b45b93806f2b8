import io
import json
import time
from dataclasses import replace

import numpy as np
import pytest
from rich.console import Console

from ragkit import Answer, Document, Example, Hit, Pipeline, Query
from ragkit.errors import DataError, SettingsError
from ragkit.evaluation.comparison import compare
from ragkit.evaluation.report import comparison_tables
from ragkit.evaluation.results import FORMAT
from ragkit.evaluation.runs import evaluate
from ragkit.evaluation.statistics import bootstrap_mean, holm, paired_differences
from ragkit.evaluation.systems import System, group_runs, read_run_folder

HASHES = {"questions": "5e1f", "qrels": "9a3e", "corpus": "c09b"}


@pytest.fixture
def write(tmp_path):
    """Write a run folder with scores {measure: [value of q0, q1, …]}; None is no score."""

    def write(name, scores, *, seed=0, contexts=None, hashes=HASHES, ids=None, **command):
        folder = tmp_path / name
        folder.mkdir(parents=True)
        count = len(next(iter(scores.values())))
        ids = ids or [f"q{n}" for n in range(count)]

        def of(values, place):
            return {m: column[place] for m, column in values.items() if column[place] is not None}

        rows = [
            {"id": ids[n], "question": "Why?\u2028Because.", "scores": of(scores, n), "hits": []}
            | (
                {"contexts": {c: {"answer": "", "scores": of(v, n)} for c, v in contexts.items()}}
                if contexts
                else {}
            )
            for n in range(count)
        ]
        lines = [json.dumps(row, ensure_ascii=False) + "\n" for row in rows]
        (folder / "answers.jsonl").write_text("".join(lines), encoding="utf-8")
        results = {
            "format": FORMAT,
            "counts": {"questions": count},
            "hashes": hashes,
            "settings": {"command": {"seed": seed, **command}, "ks": [10], "seed": seed},
        }
        (folder / "results.json").write_text(json.dumps(results), encoding="utf-8")
        return str(folder)

    return write


def names(systems):
    return [(system.name, [run.path.name for run in system.runs]) for system in systems]


# --- reading


def test_a_run_folder_by_value(write):
    path = write(
        "run",
        {"EM": [1, 0.5], "F1": [None, 0.25]},
        contexts={"gold": {"EM": [1, 1]}, "noise 50 %": {"EM": [0, None]}},
        index="kb",
        seed=4,
    )
    run = read_run_folder(path)
    assert run.questions == ("q0", "q1")
    assert run.scores == {
        "EM": {"q0": 1.0, "q1": 0.5},
        "F1": {"q1": 0.25},
        "EM (gold)": {"q0": 1.0, "q1": 1.0},
        "EM (noise 50 %)": {"q0": 0.0},
    }
    assert run.hashes == HASHES
    assert run.settings == {"command": {"seed": 4, "index": "kb"}, "ks": [10], "seed": 4}


class Finder:
    """A retriever that finds one document for each question."""

    def __init__(self, found):
        self.found = found

    def retrieve(self, queries, k):
        return [[Hit(Document(self.found[query.id], "A text."), 1.0)] for query in queries]


class Teller:
    """A reader that says what it is told to."""

    def __init__(self, said):
        self.said = said

    def read(self, queries, hits):
        return [Answer(query, self.said[query.id], (), prompt="") for query in queries]


def test_folders_that_evaluate_wrote_are_compared(tmp_path):
    examples = [Example(Query(name, f"{name}?"), answers=("yes",)) for name in ("q1", "q2", "q3")]
    qrels = {"q1": {"d": 1}, "q2": {"d": 1}}
    found = [{"q1": "d", "q2": "x", "q3": "x"}, {"q1": "d", "q2": "d", "q3": "x"}]
    said = [{"q1": "yes", "q2": "yes", "q3": "no"}, {"q1": "no", "q2": "no", "q3": "no"}]
    for place in (0, 1):
        pipeline = Pipeline(Finder(found[place]), None, Teller(said[place]))
        output = tmp_path / f"run{place}"
        evaluate(pipeline, examples, qrels=qrels, output=output, settings={"system": place})
    systems = group_runs([str(tmp_path / "run0"), str(tmp_path / "run1")])
    comparison = compare(systems, resamples=100)
    found = {outcome.measure: outcome for outcome in comparison.outcomes}
    assert found["EM"].difference.mean == pytest.approx(-2 / 3)
    assert found["EM"].difference.n == 3
    assert found["recall@10"].difference.mean == 0.5
    assert found["recall@10"].difference.n == 2
    assert found["recall@10"].baseline_mean == 0.5
    assert found["recall@10"].system_mean == 1.0


def damage(path, name, change):
    file = path / name
    file.write_text(change(file.read_text(encoding="utf-8")), encoding="utf-8")


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda text: text.replace('"q1"', "q1"), r"answers.jsonl:2: is no line of a run"),
        (lambda text: text[:-20], r"answers.jsonl:3: is no line of a run"),
        (lambda text: text + "\n", r"answers.jsonl:4: is no line"),
        (lambda text: text.replace('"q1"', "7"), r"answers.jsonl:2: the id 7 is not a text"),
        (lambda text: text.replace('"id"', '"name"'), r"answers.jsonl:1: .*KeyError: 'id'"),
        (lambda text: text.replace('"scores": {', '"marks": {'), "KeyError: 'scores'"),
        (lambda text: text.replace('"q1"', '"q0"'), "2: the id 'q0' occurs a second time"),
        (lambda text: text.replace("0.25", "NaN"), "2: question 'q1' has the F1 nan"),
        (lambda text: text.replace("0.25", "-Infinity"), "has the F1 -inf"),
        (lambda text: text.replace("0.25", "1" + 400 * "0"), "is not a finite number"),
        (lambda text: text.replace("0.25", '"high"'), "has the F1 'high'"),
        (lambda text: text.replace("0.25", "null"), "has the F1 None"),
        (lambda text: text.replace("0.25", "true"), "has the F1 True"),
        (lambda text: text.replace("0.75", "NaN"), r"'q2' has the F1 \(gold\) nan"),
        (
            lambda text: text.replace('{"gold": {', '{"gold": {"x": {').replace("}}}", "}}}}"),
            "is no",
        ),
        (lambda text: "[1]\n" + text, "answers.jsonl:1: is no line"),
        (lambda text: text.split("\n", 1)[1], "has 2 lines where results.json counts 3"),
        (lambda text: "[" * 100_000, "is no line of a run"),
    ],
)
def test_damaged_answers_are_refused(write, tmp_path, change, message):
    write("run", {"F1": [0, 0.25, 1]}, contexts={"gold": {"F1": [0, 1, 0.75]}})
    read_run_folder(tmp_path / "run")
    damage(tmp_path / "run", "answers.jsonl", change)
    with pytest.raises(DataError, match=message):
        read_run_folder(tmp_path / "run")


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (
            lambda text: text.replace(f'"format": {FORMAT}', '"format": 1'),
            f"1, .* reads format {FORMAT}",
        ),
        (lambda text: text.replace('"format"', '"form"'), "has format None"),
        (lambda text: text.replace('"hashes"', '"hash"'), "lacks settings, hashes or counts"),
        (lambda text: text.replace('"qrels"', '"q"'), r"lacks .* \('qrels'\)"),
        (lambda text: text.replace('"settings": {', '"settings": 1, "x": {'), "lacks settings"),
        (lambda text: text.replace('"counts": {', '"counts": [], "x": {'), "lacks settings"),
        (lambda text: text[:-1], "cannot be read as JSON"),
        (lambda text: "[]", "expected a JSON object"),
    ],
)
def test_damaged_results_are_refused(write, tmp_path, change, message):
    write("run", {"F1": [0, 1]})
    damage(tmp_path / "run", "results.json", change)
    with pytest.raises(DataError, match=message):
        read_run_folder(tmp_path / "run")


def test_what_is_no_run_folder_is_refused(write, tmp_path):
    for path in (tmp_path, tmp_path / "nothing", __file__):
        with pytest.raises(DataError, match="is no run folder"):
            read_run_folder(path)
    (tmp_path / "run").mkdir()
    write("whole", {"F1": [0, 1]})
    (tmp_path / "whole" / "answers.jsonl").rename(tmp_path / "run" / "answers.jsonl")
    with pytest.raises(DataError, match=r"answers.jsonl: cannot be read \(No such file"):
        read_run_folder(tmp_path / "whole")


# --- grouping


def test_runs_are_grouped_by_their_settings(write):
    b0 = write("bm25-0", {"EM": [0, 1]}, seed=0, retriever="bm25")
    d0 = write("dense-0", {"EM": [0, 1]}, seed=0, retriever="dense")
    b1 = write("bm25-1", {"EM": [0, 1]}, seed=1, retriever="bm25")
    assert names(group_runs([b0, d0, b1])) == [
        ("bm25-0", ["bm25-0", "bm25-1"]),
        ("dense-0", ["dense-0"]),
    ]
    assert names(group_runs([d0, f"{b0},{b1}"])) == [
        ("dense-0", ["dense-0"]),
        ("bm25-0", ["bm25-0", "bm25-1"]),
    ]
    # A name keeps a run out of a group; one that was told holds what it is told to.
    assert names(group_runs([f"one={b0}", b1, f"two={d0},{b1}"])) == [
        ("one", ["bm25-0"]),
        ("bm25-1", ["bm25-1"]),
        ("two", ["dense-0", "bm25-1"]),
    ]


def test_a_run_beside_itself_and_folders_of_one_name(write):
    a = write("x/run", {"EM": [0, 1]}, retriever="bm25")
    b = write("y/run", {"EM": [0, 1]}, retriever="dense")
    assert [system.name for system in group_runs([a, a, a])] == ["run", a, f"{a} (2)"]
    assert [system.name for system in group_runs([a, b])] == ["run", b]
    assert [system.name for system in group_runs([a, f"run={b}"])] == [a, "run"]


def test_seeds_of_which_some_are_equal_are_refused(write):
    runs = [write(f"run{n}", {"EM": [0, 1]}, seed=seed) for n, seed in enumerate((0, 1, 0))]
    with pytest.raises(SettingsError, match=r"run0, .*run1, .*run2 .*NAME=FOLDER"):
        group_runs(runs)


def test_folders_whose_paths_hold_signs(write):
    odd = write("k=5,top", {"EM": [0, 1]})
    other = write("other", {"EM": [0, 1]}, k=2)
    assert names(group_runs([odd, other])) == [("k=5,top", ["k=5,top"]), ("other", ["other"])]


@pytest.mark.parametrize("argument", ["", "=run", "name=", "a,,b", "name=a,", ","])
def test_arguments_that_name_nothing_are_refused(argument):
    with pytest.raises(SettingsError, match="expected FOLDER"):
        group_runs([argument])


def test_folders_that_are_not_there_are_refused(tmp_path):
    with pytest.raises(DataError, match="gone: is no run folder"):
        group_runs([f"{tmp_path / 'gone'},{tmp_path / 'gone too'}"])


# --- comparing

RANDOM = np.random.default_rng(0)
EM_A, EM_B = (RANDOM.random(40) < share for share in (0.3, 0.8))
F1_A = RANDOM.random(40)
F1_B = F1_A + RANDOM.normal(0, 0.1, 40)


def floats(values):
    return [float(value) for value in values]


def test_outcomes_are_those_of_the_paired_differences(write):
    a = write("a", {"EM": floats(EM_A), "F1": floats(F1_A)}, system="a")
    b = write("b", {"EM": floats(EM_B), "F1": floats(F1_B)}, system="b")
    comparison = compare(group_runs([a, b]), resamples=500, seed=3)
    expected = paired_differences([(EM_A, EM_B), (F1_A, F1_B)], resamples=500, seed=3)
    assert [(o.system, o.measure) for o in comparison.outcomes] == [("b", "EM"), ("b", "F1")]
    assert [o.difference for o in comparison.outcomes] == expected
    adjusted = holm([one.permutation_p for one in expected])
    assert [o.holm_p for o in comparison.outcomes] == adjusted
    assert [o.significant for o in comparison.outcomes] == [True, False]
    assert comparison.outcomes[0].baseline_mean == EM_A.mean()
    assert comparison.outcomes[0].system_mean == EM_B.mean()
    assert comparison.remarks == ()
    first = comparison.systems[0]
    assert (first.name, first.seeds, first.folders) == ("a", 1, (a,))
    score = first.measures["F1"]
    mean = bootstrap_mean(F1_A)
    assert score.estimate.mean == pytest.approx(mean.mean)
    assert score.estimate.low == pytest.approx(mean.low, abs=0.02)
    assert (score.sd, score.lowest, score.highest) == (None, F1_A.mean(), F1_A.mean())


def test_holm_is_over_all_systems_and_measures(write):
    a = write("a", {"EM": floats(EM_A), "F1": floats(F1_A)}, system="a")
    b = write("b", {"EM": floats(EM_B), "F1": floats(F1_B)}, system="b")
    c = write("c", {"EM": floats(~EM_A), "F1": floats(F1_A + 0.01)}, system="c")
    comparison = compare(group_runs([a, b, c]), resamples=500)
    assert [(o.system, o.measure) for o in comparison.outcomes] == [
        (system, measure) for system in "bc" for measure in ("EM", "F1")
    ]
    p_values = [outcome.difference.permutation_p for outcome in comparison.outcomes]
    assert [outcome.holm_p for outcome in comparison.outcomes] == holm(p_values)
    assert (
        comparison.outcomes[0].holm_p
        > compare(group_runs([a, b]), resamples=500).outcomes[0].holm_p
    )


def test_seeds_are_aggregated(write):
    a = write("a", {"EM": floats(EM_A)}, system="a")
    seeds = [
        write(f"b{n}", {"EM": floats(np.clip(EM_B + shift, 0, 2))}, seed=n, system="b")
        for n, shift in enumerate((0.0, 0.1, 0.5))
    ]
    comparison = compare(group_runs([a, *seeds]), resamples=1000)
    [outcome] = comparison.outcomes
    values = EM_B + np.array([[0.0], [0.1], [0.5]])
    assert outcome.difference == paired_differences([(EM_A, values)], resamples=1000)[0]
    assert outcome.difference.mean == pytest.approx(EM_B.mean() + 0.2 - EM_A.mean())
    score = comparison.systems[1].measures["EM"]
    assert comparison.systems[1].seeds == 3
    assert score.sd == pytest.approx(np.std([0, 0.1, 0.5], ddof=1))
    assert score.lowest == pytest.approx(EM_B.mean())
    assert score.highest == pytest.approx(EM_B.mean() + 0.5)
    assert score.estimate.mean == pytest.approx(EM_B.mean() + 0.2)
    alone = compare(group_runs([a, f"b={seeds[1]}"]), resamples=1000).outcomes[0].difference
    assert outcome.difference.high - outcome.difference.low > 1.2 * (alone.high - alone.low)


def test_a_gain_that_may_be_the_seeds_own_is_remarked(write):
    a = write("a", {"EM": [0.5] * 20}, system="a")
    seeds = [write(f"b{n}", {"EM": [v] * 20}, seed=n, system="b") for n, v in enumerate((0.4, 0.9))]
    comparison = compare(group_runs([a, *seeds]))
    [outcome] = comparison.outcomes
    assert outcome.significant
    assert outcome.difference.low < 0 < outcome.difference.mean
    assert comparison.remarks == (
        "EM of b0: the difference is significant for these seeds, but its interval, which speaks "
        "of other seeds as well, holds 0",
    )


def test_a_run_with_itself_is_exactly_equal(write):
    a = write("a", {"EM": floats(EM_A), "F1": floats(F1_A)})
    comparison = compare(group_runs([a, a]))
    assert len(comparison.outcomes) == 2
    for outcome in comparison.outcomes:
        found = outcome.difference
        assert (found.mean, found.low, found.high) == (0, 0, 0)
        assert (found.bootstrap_p, found.permutation_p, outcome.holm_p) == (1, 1, 1)
        assert (found.wins, found.ties, found.losses) == (0, 40, 0)
        assert not outcome.significant


def test_questions_that_one_run_does_not_score_are_left_out_and_listed(write):
    some = [None, *[0.5] * 11, *[None] * 11, 1.0, 0.0]
    ends = [1.0] * 24 + [None]
    a = write("a", {"EM": [0.0] * 25, "F1": [0.0] * 25, "cover": ends}, system="a")
    b = write("b", {"EM": some, "F1": some, "cover": [0.0] * 25}, system="b")
    comparison = compare(group_runs([a, b]), resamples=100)
    left = {o.measure: (o.difference.n, o.left_out, o.listed) for o in comparison.outcomes}
    out = ("q0", *(f"q{n}" for n in range(12, 23)))
    assert left == {
        "EM": (13, 12, out[:10]),
        "F1": (13, 12, out[:10]),
        "cover": (24, 1, ("q24",)),
    }
    assert comparison.outcomes[0].difference.mean == pytest.approx((11 * 0.5 + 1) / 13)
    assert comparison.systems[0].measures["EM"].estimate.n == 25
    assert comparison.systems[1].measures["EM"].estimate.n == 13
    assert comparison.remarks == (
        "EM, F1: 12 questions are left out of b against a, since only some runs score them: "
        + ", ".join(f"'{name}'" for name in out[:10])
        + ", …",
        "cover: 1 questions are left out of b against a, since only some runs score them: 'q24'",
    )


def test_measures_of_one_side_or_of_one_question_are_remarked(write):
    scores = {"EM": [0, 1, 1], "F1": [0.5, None, None], "MAP": [1, 0, 1]}
    a = write("a", scores, system="a")
    b = write(
        "b", {"EM": [1, 1, 1], "F1": [1, 1, None]}, contexts={"gold": {"EM": [1, 0, 1]}}, system="b"
    )
    comparison = compare(group_runs([a, b]), resamples=100)
    assert [outcome.measure for outcome in comparison.outcomes] == ["EM"]
    assert comparison.remarks[:3] == (
        f"MAP of b against a: not compared, since {b} has no such scores",
        f"EM (gold) of b against a: not compared, since {a} has no such scores",
        "F1 of b is not compared: 1 questions have it in all runs, at least 2 are needed",
    )


def test_measures_are_in_the_order_of_their_numbers(write):
    measures = ["recall@100", "recall@5", "EM", "recall@10"]
    contexts = {"gold": {"EM": [1, 0]}}
    runs = [
        write(name, {m: [0, 1] for m in measures}, contexts=contexts, system=name) for name in "ab"
    ]
    found = [outcome.measure for outcome in compare(group_runs(runs), resamples=10).outcomes]
    assert found == ["EM", "recall@5", "recall@10", "recall@100", "EM (gold)"]


def test_json_holds_the_comparison(write):
    a = write("a", {"EM": floats(EM_A)}, system="a")
    b = write("b", {"EM": floats(EM_B)}, system="b")
    comparison = compare(group_runs([a, b]), resamples=100, seed=5)
    stored = json.loads(json.dumps(comparison.to_json(), allow_nan=False))
    assert stored["baseline"] == "a"
    assert (stored["resamples"], stored["seed"], stored["remarks"]) == (100, 5, [])
    [outcome], [found] = stored["outcomes"], comparison.outcomes
    assert outcome["difference"]["mean"] == found.difference.mean
    assert outcome["difference"]["detectable"] == found.difference.detectable
    assert outcome["holm_p"] == found.holm_p
    assert outcome["significant"] is True
    assert stored["systems"][1]["measures"]["EM"]["estimate"]["n"] == 40
    assert stored["systems"][1]["folders"] == [b]


# --- refusals


def test_other_questions_are_refused(write):
    a = write("a", {"EM": [0, 1, 1]}, ids=["x", "y", "z"])
    hashes = HASHES | {"questions": "ffff"}
    b = write("b", {"EM": [0, 1]}, ids=["x", "w"], hashes=hashes, system="b")
    message = (
        r"a and .*b asked different questions: 2 ids are in the first only \('y', 'z'\), 1 in the "
        r"second only \('w'\)\. Evaluate both with the same questions"
    )
    with pytest.raises(DataError, match=message):
        compare(group_runs([a, b]))
    c = write("c", {"EM": [0, 1, 1]}, ids=["z", "y", "x"], hashes=hashes, system="c")
    with pytest.raises(DataError, match="3 ids are the same, their texts, filters or answers not"):
        compare(group_runs([a, c]))
    d = write("d", {"EM": [0, 1, 1]}, ids=["x", "y", "v"], system="d")
    with pytest.raises(DataError, match=r"1 in the second only \('v'\)"):
        compare(group_runs([a, d]))


def test_changed_qrels_are_refused(write):
    a = write("a", {"EM": [0, 1]})
    b = write("b", {"EM": [0, 1]}, hashes=HASHES | {"qrels": "0000"}, system="b")
    with pytest.raises(DataError, match=r"different qrels \(hashes 9a3e and 0000\)"):
        compare(group_runs([a, b]))


def test_a_changed_corpus_is_refused_unless_it_is_meant(write):
    a = write("a", {"EM": [0, 1, 1]})
    b = write("b", {"EM": [0, 1, 0]}, hashes=HASHES | {"corpus": "0000"}, system="b")
    with pytest.raises(DataError, match=r"corpora \(hashes c09b and 0000\).*pass --other-corpus"):
        compare(group_runs([a, b]))
    comparison = compare(group_runs([a, b]), other_corpus=True)
    assert comparison.outcomes[0].difference.losses == 1
    assert comparison.remarks == ("b searched another corpus than a",)
    with pytest.raises(DataError, match="Seeds of one system search one corpus"):
        compare(group_runs([a, f"two={a},{b}"]), other_corpus=True)


def test_an_unknown_corpus_is_remarked(write):
    a = write("a", {"EM": [0, 1, 1]})
    known = {name: HASHES[name] for name in ("questions", "qrels")}
    b = write("b", {"EM": [0, 1, 0]}, hashes=known, system="b")
    comparison = compare(group_runs([a, b]))
    assert comparison.remarks == (f"which corpus was searched is not known for '{b}'",)


def test_fewer_than_two_systems_are_refused(write):
    runs = [write(f"run{seed}", {"EM": [0, 1]}, seed=seed) for seed in (0, 1)]
    with pytest.raises(SettingsError, match="at least 2 systems are needed, not 0"):
        compare([])
    message = "not 1: 'run0', with 2 runs.*unless they have names: A=FOLDER B=FOLDER"
    with pytest.raises(SettingsError, match=message):
        compare(group_runs(runs))
    assert len(compare(group_runs([f"A={runs[0]}", f"B={runs[1]}"])).outcomes) == 1


def test_a_run_twice_in_a_system_is_refused(write):
    a = write("a", {"EM": [0, 1]}, system="a", seed=7)
    again = write("again", {"EM": [0, 1]}, system="a", seed=7)
    b = write("b", {"EM": [0, 1]}, system="b")
    for twice in (a, again):
        with pytest.raises(
            SettingsError, match=r"'a': .*a and .* the same seed, 7: .* count twice"
        ):
            compare(group_runs([b, f"{a},{twice}"]))


def test_runs_of_other_models_with_one_seed_are_seeds_if_they_are_named_so(write):
    b = write("b", {"EM": [0, 1, 0]}, system="b")
    tuned = [write(f"t{n}", {"EM": [1, 1, n]}, tokens=f"tokens/{n}") for n in (0, 1)]
    comparison = compare(group_runs([b, f"tuned={','.join(tuned)}"]))
    assert comparison.systems[1].seeds == 2
    assert comparison.outcomes[0].difference.mean == pytest.approx((1 + 0 + 0.5) / 3)


def test_systems_that_cannot_be_told_apart_are_refused(write):
    run = read_run_folder(write("a", {"EM": [0, 1]}))
    with pytest.raises(SettingsError, match="'x' names more than one system"):
        compare([System("x", (run,)), System("x", (run,))])
    with pytest.raises(SettingsError, match="the system 'y' has no runs"):
        compare([System("x", (run,)), System("y", ())])


def test_nothing_to_compare_is_refused(write):
    a = write("a", {"EM": [0, 1]}, system="a")
    b = write("b", {"MAP": [0, 1]}, system="b")
    with pytest.raises(DataError, match=r"nothing can be compared: EM of b .*; MAP of b"):
        compare(group_runs([a, b]))


def test_ten_thousand_questions_are_compared_in_seconds(write):
    random = np.random.default_rng(1)
    measures = [f"recall@{k}" for k in range(8)]
    runs = [
        write(name, {m: random.random(10_000).tolist() for m in measures}, system=name)
        for name in "ab"
    ]
    systems = group_runs(runs)
    started = time.process_time()
    assert len(compare(systems).outcomes) == 8
    assert time.process_time() - started < 15


# --- tables


def text_of(shown, width=110):
    console = Console(width=width, file=io.StringIO())
    with console.capture() as capture:
        console.print(*shown, sep="\n")
    return capture.get()


def test_tables_show_what_was_found(write):
    a = write("a", {"EM": floats(EM_A), "F1": floats(F1_A)}, system="a")
    b = write("[red]b", {"EM": floats(EM_B), "F1": floats(F1_B)}, system="b")
    comparison = compare(group_runs([a, b]), resamples=500)
    shown = text_of(comparison_tables(comparison))
    assert "A = a, B = [red]b" in shown
    lines = shown.splitlines()
    em, f1 = comparison.outcomes
    for outcome in (em, f1):
        [line] = [line for line in lines if line.split()[:1] == [outcome.measure]]
        found = outcome.difference
        for part in (
            f"{outcome.baseline_mean:.3f}  {outcome.system_mean:.3f}  {found.mean:+.3f}",
            f"{found.low:+.3f}, {found.high:+.3f}",
            f"{found.wins}/{found.ties}/{found.losses}",
            f"{found.detectable:.3f}",
        ):
            assert part in line
        assert ("*" in line) == outcome.significant
    assert f"{f1.difference.permutation_p:.3f}" in shown
    assert lines[-1] == "After Holm's adjustment, [red]b is better than a on EM."
    assert "Seeds" not in shown
    swapped = text_of(comparison_tables(compare(group_runs([b, a]), resamples=500)))
    assert "a is worse than [red]b on EM." in swapped


def test_tables_fit_into_110_columns(write):
    random = np.random.default_rng(2)
    runs = [
        write(
            name,
            {
                "nDCG@10": random.random(10_000).tolist(),
                "recall@100": random.random(10_000).tolist(),
            },
            contexts={"gold+distractors": {"ROUGE-L": random.random(10_000).tolist()}},
            system=name,
        )
        for name in "ab"
    ]
    comparison = compare(group_runs(runs), resamples=50)
    shown = text_of(comparison_tables(comparison))
    assert "…" not in shown
    assert len(shown.splitlines()[0]) <= 110
    for outcome in comparison.outcomes:  # nothing is folded
        [line] = [line for line in shown.splitlines() if line.startswith(f"{outcome.measure}  ")]
        assert line.rstrip().endswith(f"{outcome.difference.detectable:.3f}")


def test_seeds_remarks_and_what_stayed_unseen_are_told(write):
    a = write("a", {"EM": floats(EM_A)}, system="a")
    b = [write(f"b{n}", {"EM": [*floats(EM_A)[:-1], n / 2]}, seed=n, system="b") for n in (0, 1, 2)]
    c = write("c", {"EM": floats(EM_A)}, system="c")
    comparison = compare(group_runs([a, *b, c]), resamples=200)
    comparison = replace(comparison, remarks=("something [bold]odd",))
    shown = " ".join(text_of(comparison_tables(comparison)).split())
    detectable = comparison.outcomes[0].difference.detectable
    assert "A = a, B = b0 (3 seeds)" in shown
    assert f"{comparison.systems[1].measures['EM'].sd:.3f}" in shown
    assert "Note: something [bold]odd." in shown
    assert (
        f"b0 is not told apart from a on any measure (detectable were {detectable:.3f} to "
        f"{detectable:.3f}); c is no different from a in any question."
    ) in shown
