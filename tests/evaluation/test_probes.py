"""Probes: files of records in, scores of a model out, and what changed between two."""

from __future__ import annotations

import gzip
import json
import math

import numpy as np
import pytest

from ragkit.errors import DataError, SettingsError
from ragkit.evaluation.probes import compare_probes, read_probe, run_probe
from ragkit.evaluation.statistics import Estimate, bootstrap_mean

CHOICES = [
    {"question": "Which metal melts in the hand?", "choices": ["gallium", "tin"], "answer": 0},
    {"id": "eat", "question": "Predators eat", "choices": ["grass", " bunnies "], "answer": 1},
    {"id": 7, "input": "Čí je čaj?", "choices": ["abcd", "čččč"], "answer": 1, "domain": "tea"},
]
ASKED = {
    ("Question: Which metal melts in the hand?\nAnswer:", " gallium"): (-6.0, 3),
    ("Question: Which metal melts in the hand?\nAnswer:", " tin"): (-3.0, 1),
    ("Predators eat", " grass"): (-9.0, 2),
    ("Predators eat", " bunnies"): (-8.0, 2),
    ("Question: Čí je čaj?\nAnswer:", " abcd"): (-3.0, 2),
    ("Question: Čí je čaj?\nAnswer:", " čččč"): (-4.0, 4),
}
ANSWERS = [
    {"question": "How many?", "answer": "18", "solution": "9 and 9"},
    {"input": "1 + 1 =", "output": "2"},
    {"question": "Name it.", "target": "Tin"},
]
ANSWERED = {
    ("Question: How many?\nAnswer:", " 18"): (-3.0, 2),
    ("Question: 1 + 1 =\nAnswer:", " 2"): (-0.5, 1),
    ("Question: Name it.\nAnswer:", " Tin"): (-7.0, 2),
}
TEXTS = [{"id": "a", "text": "Tin melts.", "title": "Tin"}, {"id": "b", "text": "Ho čaj\n"}]
READ = {"Tin melts.": (-6.0, 3), "Ho čaj": (-4.0, 1)}


class Table:
    """A model whose likelihoods are given, and counted when it is asked."""

    def __init__(self, table, weights="w"):
        self.table = table
        self.weights = weights
        self.asked = 0

    def loglikelihoods(self, contexts, continuations, *, progress=lambda done: None):
        self.asked += len(contexts)
        found = []
        for context, texts in zip(contexts, continuations, strict=True):
            found.append(np.array([self.table[context, text] for text in texts], np.float64))
            progress(len(found))
        return found

    def text_loglikelihoods(self, texts, *, progress=lambda done: None):
        self.asked += len(texts)
        progress(len(texts))
        return np.array([self.table[text] for text in texts], np.float64)

    def weights_hash(self):
        return self.weights


@pytest.fixture
def write(tmp_path):
    def write(rows, name="probe.jsonl"):
        path = tmp_path / name
        text = "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows)
        path.write_bytes(gzip.compress(text.encode()) if name.endswith(".gz") else text.encode())
        return path

    return write


@pytest.fixture
def scores(write):
    def scores(rows, table, **options):
        return run_probe(Table(table), read_probe(write(rows)), **options)

    return scores


# Files


@pytest.mark.parametrize("name", ["tea.jsonl", "tea.jsonl.gz"])
def test_choices_become_continuations_behind_a_space(write, name):
    probe = read_probe(write(CHOICES, name))
    assert (probe.name, probe.kind) == ("tea", "choices")
    assert [item.id for item in probe.items] == ["q1", "eat", "7"]
    assert [item.answer for item in probe.items] == [0, 1, 1]
    pairs = [(item.context, text) for item in probe.items for text in item.continuations]
    assert pairs == list(ASKED)


def test_a_question_and_its_answer(write):
    probe = read_probe(write(ANSWERS))
    assert probe.kind == "answers"
    assert [(item.context, *item.continuations) for item in probe.items] == list(ANSWERED)


def test_texts_stand_alone(write):
    probe = read_probe(write(TEXTS))
    assert probe.kind == "texts"
    assert [(item.context, *item.continuations) for item in probe.items] == [
        ("", "Tin melts."),
        ("", "Ho čaj"),
    ]


@pytest.mark.parametrize(
    ("question", "asks"),
    [
        ("Which of these is true?", True),
        ('Who said "is it so?"', True),
        ("It rained. What fell (choose one)?", True),
        ("An atom has a mass. How large is it? ", True),
        ("谁？", True),
        ("The spectrum is divided according to", False),
        ("Learn to write poetry.", False),
        ("Who was it? The man", False),
        ('"Was it he?" he asked. She', False),
        ("dresser", False),
    ],
)
def test_a_question_is_asked_and_other_text_is_continued(write, question, asks):
    rows = [{"question": question, "choices": ["a", "b"], "answer": 0}]
    (item,) = read_probe(write(rows)).items
    plain = question.strip()
    assert item.context == (f"Question: {plain}\nAnswer:" if asks else plain)


GOOD = {"question": "Who?", "choices": ["he", "she"], "answer": 0}


@pytest.mark.parametrize(
    ("record", "message"),
    [
        (GOOD | {"answer": 2}, r"'answer' is 2, but the places of the 2 choices are 0 to 1"),
        (GOOD | {"answer": -1}, r"'answer' is -1, but"),
        (GOOD | {"answer": "B"}, r"'answer' holds \"B\", expected the place .* from 0 to 1"),
        (GOOD | {"answer": True}, r"'answer' holds true, expected the place"),
        (GOOD | {"answer": None}, r"'answer' holds null, expected the place"),
        (GOOD | {"choices": ["he"]}, r"'choices' holds 1 of them, and there must be at least 2"),
        (GOOD | {"choices": []}, r"'choices' holds 0 of them"),
        (GOOD | {"choices": ["he", " "]}, r"choice 1 \(from 0\) is empty"),
        (GOOD | {"choices": ["he", 3]}, r"'choices' holds .*, expected a list of strings"),
        (GOOD | {"choices": "he, she"}, r"'choices' holds .*, expected a list of strings"),
        (GOOD | {"question": ""}, r"'question' is empty"),
        (GOOD | {"question": 3}, r"'question' holds 3, expected a string"),
        ({"choices": ["a", "b"], "answer": 0}, r"no question: looked for question, input; saw"),
        (GOOD | {"id": [1]}, r"'id' holds \[1\], expected"),
        (GOOD | {"id": "one"}, r"duplicate id 'one'"),
        ({"question": "Who?", "answer": "he"}, r"a record of answers after records of choices"),
        ({"text": "He."}, r"a record of texts after records of choices"),
        ({"question": "Who?", "answer": 3}, r"'answer' holds 3, expected a string"),
        ({"question": "Who?", "output": " "}, r"'output' is empty"),
        ({"text": "Who?", "answer": "he"}, r"no question: looked for question, input; saw text"),
        ({"text": "Who?", "answers": ["he"]}, r"not a record of a probe.*saw text, answers"),
        ({"question": "Who?"}, r"not a record of a probe.*saw question"),
        ({}, r"not a record of a probe.*saw no field"),
        ([1], r"expected a JSON object, saw list"),
    ],
)
def test_a_bad_record_is_named_with_its_line_and_the_mend(write, record, message):
    path = write([GOOD | {"id": "one"}, record])
    with pytest.raises(DataError, match=message) as raised:
        read_probe(path)
    assert str(raised.value).startswith(f"{path}:2: ")


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("a.jsonl", b"\n", "the file is empty"),
        ("a.json", b"[]", "the list is empty"),
        ("a.jsonl", b'{"text": ', "a.jsonl:1: broken JSON"),
        (
            "a.jsonl.gz",
            gzip.compress(b'{"text": "a"}\n' * 99, mtime=0)[:-9],
            "truncated or damaged gzip",
        ),
        ("a.txt", b"a", "no file of records"),
    ],
)
def test_a_file_that_cannot_be_read_is_refused(tmp_path, name, content, message):
    path = tmp_path / name
    path.write_bytes(content)
    with pytest.raises(DataError, match=message):
        read_probe(path)


def test_a_missing_file_is_refused(tmp_path):
    with pytest.raises(DataError, match=r"gone\.jsonl: cannot be read: No such file"):
        read_probe(tmp_path / "gone.jsonl")


# Scores


def test_accuracy_by_total_and_by_byte(scores):
    found = scores(CHOICES, ASKED)
    # Tin is likelier than gallium (-3 > -6), but not by the byte: -3/3 < -6/7. "čččč" is less
    # likely than "abcd" by its total and its 4 characters, and likelier by its 8 bytes.
    assert found.values == {
        "accuracy": (0.0, 1.0, 0.0),
        "accuracy (per byte)": (1.0, 1.0, 1.0),
    }
    assert found.estimates["accuracy"] == bootstrap_mean([0.0, 1.0, 0.0])
    assert found.estimates["accuracy (per byte)"] == Estimate(1.0, 1.0, 1.0, 3)
    assert found.ids == ("q1", "eat", "7")


def test_answers_by_their_nats_per_token(scores):
    found = scores(ANSWERS, ANSWERED, seed=3)
    assert found.values == {"answer nats per token": (1.5, 0.5, 3.5)}
    assert found.estimates == {"answer nats per token": bootstrap_mean([1.5, 0.5, 3.5], seed=3)}


def test_perplexity_is_of_all_tokens_together(scores):
    found = scores(TEXTS, READ)
    assert found.values == {"nats": (6.0, 4.0), "tokens": (3.0, 1.0), "bytes": (10.0, 7.0)}
    # A quarter of the samples of two holds the first text alone, a quarter the second alone.
    perplexity = found.estimates["perplexity"]
    assert perplexity.mean == pytest.approx(math.exp(10 / 4))
    assert (perplexity.low, perplexity.high) == pytest.approx((math.exp(2), math.exp(4)))
    bits = found.estimates["bits per byte"]
    assert bits.mean == pytest.approx(10 / math.log(2) / 17)
    assert (bits.low, bits.high) == pytest.approx((4 / math.log(2) / 7, 6 / math.log(2) / 10))
    assert (perplexity.n, bits.n) == (2, 2)


def many_texts(count=400, factor=1.0):
    random = np.random.default_rng(5)
    tokens = random.integers(5, 200, count)
    nats = tokens * random.normal(3, 0.5, count) * factor
    rows = [{"text": f"{place} {'x' * int(size)}"} for place, size in enumerate(tokens)]
    table = {
        row["text"]: (-float(loss), int(size))
        for row, loss, size in zip(rows, nats, tokens, strict=True)
    }
    return rows, table, nats, tokens


def test_the_interval_of_perplexity_agrees_with_the_delta_method(scores):
    rows, table, nats, tokens = many_texts()
    found = scores(rows, table).estimates["perplexity"]
    ratio = nats.sum() / tokens.sum()
    error = np.sqrt(((nats - ratio * tokens) ** 2).sum()) / tokens.sum()
    assert found.mean == pytest.approx(math.exp(ratio))
    assert math.log(found.low) == pytest.approx(ratio - 1.96 * error, abs=0.1 * error)
    assert math.log(found.high) == pytest.approx(ratio + 1.96 * error, abs=0.1 * error)


def test_a_limit_takes_the_first_items(scores):
    found = scores(CHOICES, ASKED, limit=2)
    assert found.values["accuracy"] == (0.0, 1.0)
    assert found.ids == ("q1", "eat")
    with pytest.raises(SettingsError, match="limit of 0"):
        scores(CHOICES, ASKED, limit=0)


def test_progress_begins_at_0_and_ends_with_all(scores):
    told = []
    scores(CHOICES, ASKED, progress=lambda *report: told.append(report))
    assert told[0] == ("probe probe", 0, 3)
    assert told[-1] == ("probe probe", 3, 3)
    assert [done for _, done, _ in told] == [0, 1, 2, 3, 3]


@pytest.mark.parametrize("bad", [(math.nan, 3), (-math.inf, 3), (-1.0, 0)])
def test_likelihoods_that_are_no_numbers_are_refused_by_item(scores, bad):
    table = ASKED | {("Predators eat", " grass"): bad}
    with pytest.raises(DataError, match="item 'eat' has the likelihoods"):
        scores(CHOICES, table)


# The cache


def test_the_model_is_asked_once_for_the_same_items_and_weights(write, tmp_path):
    path, cache = write(CHOICES), tmp_path / "deep" / "cache"
    model = Table(ASKED)
    first = run_probe(model, read_probe(path), cache=cache)
    assert model.asked == 3
    assert run_probe(model, read_probe(path), cache=cache) == first
    assert run_probe(Table({}), read_probe(path), cache=cache) == first
    assert model.asked == 3

    run_probe(model, read_probe(path), limit=2, cache=cache)
    assert model.asked == 5
    run_probe(model, read_probe(write(CHOICES[1:])), cache=cache)
    assert model.asked == 7
    model.weights = "others"
    run_probe(model, read_probe(path), cache=cache)
    assert model.asked == 7 + 2
    model.table = dict.fromkeys(ASKED, (-1.0, 1))  # what is read is what was written
    assert run_probe(Table(ASKED), read_probe(write(CHOICES)), cache=cache) == first
    assert len(list(cache.iterdir())) == 4


@pytest.mark.parametrize(
    "damage",
    [
        lambda text: "",
        lambda text: text[:-20],
        lambda text: "[]",
        lambda text: "{}",
        lambda text: text.replace("-6.0", "null"),
        lambda text: text.replace("-6.0", '"x"'),
        lambda text: json.dumps(json.loads(text) | {"likelihoods": [[[-1, 1], [-2, 1]]]}),
        lambda text: json.dumps(json.loads(text) | {"likelihoods": 3}),
        lambda text: json.dumps(json.loads(text) | {"weights": "others"}),
        lambda text: json.dumps(json.loads(text) | {"format": 0}),
    ],
)
def test_a_damaged_cache_is_written_anew(write, tmp_path, caplog, damage):
    probe, cache = read_probe(write(CHOICES)), tmp_path / "cache"
    model = Table(ASKED)
    first = run_probe(model, probe, cache=cache)
    (file,) = cache.iterdir()
    whole = file.read_text(encoding="utf-8")
    assert damage(whole) != whole
    file.write_text(damage(whole), encoding="utf-8")
    assert run_probe(model, probe, cache=cache) == first
    assert model.asked == 6
    assert f"{file} is written anew" in caplog.text
    assert file.read_text(encoding="utf-8") == whole


# Before and after


def test_changes_are_paired_by_item(scores):
    better = ASKED | {("Question: Čí je čaj?\nAnswer:", " čččč"): (-2.0, 4)}
    changes = compare_probes(scores(CHOICES, ASKED), scores(CHOICES, better))
    assert changes == {
        "accuracy": bootstrap_mean([0.0, 0.0, 1.0]),
        "accuracy (per byte)": Estimate(0.0, 0.0, 0.0, 3),
    }
    worse = ANSWERED | {("Question: 1 + 1 =\nAnswer:", " 2"): (-2.5, 1)}
    changes = compare_probes(scores(ANSWERS, ANSWERED), scores(ANSWERS, worse), seed=2)
    assert changes == {"answer nats per token": bootstrap_mean([0.0, 2.0, 0.0], seed=2)}


def test_changes_of_perplexity_are_of_the_same_samples(scores):
    changes = compare_probes(
        scores(TEXTS, READ), scores(TEXTS, READ | {"Ho čaj": (-6.0, 2)}, seed=9)
    )
    perplexity = changes["perplexity"]
    assert perplexity.mean == pytest.approx(math.exp(12 / 5) - math.exp(10 / 4))
    # Of the second text alone, of the first alone: exp(6 / 2) - exp(4 / 1), and no change.
    assert (perplexity.low, perplexity.high) == pytest.approx((math.exp(3) - math.exp(4), 0))

    rows, table, _, _ = many_texts()
    dearer = {
        text: (loss - 0.1 * math.log(2) * len(text.encode()), size)
        for text, (loss, size) in table.items()
    }
    bits = compare_probes(scores(rows, table), scores(rows, dearer))["bits per byte"]
    assert (bits.mean, bits.low, bits.high) == pytest.approx((0.1, 0.1, 0.1))


@pytest.mark.parametrize(
    ("rows", "table"), [(CHOICES, ASKED), (ANSWERS, ANSWERED), (TEXTS, READ)], ids=["c", "a", "t"]
)
def test_a_model_compared_with_itself_shows_exactly_0(scores, rows, table):
    changes = compare_probes(scores(rows, table), scores(rows, table))
    assert changes
    for change in changes.values():
        assert change == Estimate(0.0, 0.0, 0.0, len(rows))


def test_other_items_are_not_compared(scores):
    whole, part = scores(CHOICES, ASKED), scores(CHOICES, ASKED, limit=2)
    with pytest.raises(DataError, match="3 items of probe 'probe' cannot be compared with 2 items"):
        compare_probes(whole, part)


# Real files


@pytest.mark.data
@pytest.mark.parametrize(
    ("name", "kind", "items", "asked"),
    [
        ("arc-easy", "choices", 2376, 1888),
        ("openbookqa", "choices", 500, 179),
        ("piqa", "choices", 1838, 600),
        ("hellaswag_dev", "choices", 1000, 0),
        ("mmlu_redux_dev", "choices", 1000, 529),
        ("truthfulqa_dev", "choices", 200, 200),
        ("gsm8k_first300", "answers", 300, 300),
        ("bbh_dev", "answers", 1000, 1000),
    ],
)
def test_shared_probes_are_read_whole(data, name, kind, items, asked):
    probe = read_probe(data / "general" / f"{name}.jsonl.gz")
    assert (probe.name, probe.kind, len(probe.items)) == (name, kind, items)
    assert sum(item.context.startswith("Question: ") for item in probe.items) == asked


@pytest.mark.data
@pytest.mark.slow
def test_a_real_model_knows_easy_science(data, tmp_path):
    from ragkit.models import Generator

    generator = Generator.load("SmolLM2-135M-Instruct", precision="fp32", device="cpu")
    probe = read_probe(data / "general/arc-easy.jsonl.gz")
    first = run_probe(generator, probe, limit=100, cache=tmp_path)
    # A blind choice among four is right in a quarter; 135M parameters are known for about half.
    assert 0.4 < first.estimates["accuracy"].mean < 0.7
    again = run_probe(generator, probe, limit=100)
    assert compare_probes(first, again)["accuracy"] == Estimate(0.0, 0.0, 0.0, 100)
