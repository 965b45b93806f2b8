"""`ragkit-train negatives`, from files to a file."""

import gzip
import json
from pathlib import Path

import pytest
import torch
from ragkit.trainers.__main__ import app
from tokenizers import Tokenizer, models, normalizers, pre_tokenizers, processors
from transformers import BertConfig, BertForSequenceClassification, PreTrainedTokenizerFast

from ragkit import Document, Index
from ragkit.console import run
from ragkit.corpus import read_questions
from ragkit.models import BiEncoder, CrossEncoder
from ragkit.splitting import split
from ragkit.training import utility

METALS = {
    "tin": "Tin melts at 232 degrees and is soft.",
    "lead": "Lead melts at 327 degrees and is heavy.",
    "zinc": "Zinc melts at 419 degrees and keeps roofs dry.",
    "iron": "Iron melts at 1538 degrees and rusts in water.",
    "gold": "Gold melts at 1064 degrees and is dear to everyone.",
    "copper": "Copper melts at 1085 degrees and carries electricity well.",
}
ANSWERS = {"tin": "232", "lead": "327", "zinc": "419", "iron": "1538", "gold": "1064"}


def lines(path, records):
    path.write_text("".join(json.dumps(record) + "\n" for record in records))


def qrels(path, grades):
    rows = [f"{query}\t0\t{document}\t{grade}\n" for query, document, grade in grades]
    path.write_text("".join(rows))


@pytest.fixture
def place(tmp_path, monkeypatch):
    monkeypatch.setenv("RAGKIT_CACHE", str(tmp_path / "cache"))
    monkeypatch.chdir(tmp_path)
    Index.build("kb", [Document(*pair) for pair in METALS.items()], stores=["bm25"])
    lines(
        tmp_path / "q.jsonl",
        [
            {"id": f"q-{metal}", "text": f"At how many degrees melts {metal}?", "answers": [answer]}
            for metal, answer in ANSWERS.items()
        ],
    )
    qrels(tmp_path / "q.tsv", [(f"q-{metal}", metal, 1) for metal in ANSWERS])
    return tmp_path


def mine(*options, questions="q.jsonl", judged=("--qrels", "q.tsv"), index="kb", output="n.jsonl"):
    command = ["negatives", "--index", index, "--questions", questions, "--output", output]
    return run(app, [*command, *judged, *options])


def negatives(path="n.jsonl"):
    return {
        each.query.id.removeprefix("q-"): [document.id for document in each.negatives]
        for each in read_questions(Path(path))
    }


def test_questions_get_negatives_and_every_hit_is_counted(place, capsys):
    assert mine("--negatives", "2", "--json") == 0
    results = json.loads(capsys.readouterr().out)
    found = read_questions(place / "n.jsonl")
    index = Index.open("kb")
    for example in found:
        metal = example.query.id.removeprefix("q-")
        assert [document.id for document in example.positives] == [metal]
        assert example.positives[0].text == METALS[metal] and example.answers == (ANSWERS[metal],)
        rows, scores = index.bm25.search([example.query.text], 6, None)
        ranked = [index.documents[row].id for row in rows[0].tolist()]
        assert [document.id for document in example.negatives] == [
            name for name in ranked if name != metal
        ][:2]
        for document in example.negatives:
            told = document.metadata["mined"]
            assert told["retriever"] == "bm25" and ranked[told["rank"] - 1] == document.id
            assert told["score"] == pytest.approx(scores[0][told["rank"] - 1])
            assert told["margin"] == pytest.approx(scores[0][ranked.index(metal)] - told["score"])
    assert results["hits"]["kept"] == 10 and results["hits"]["relevant"] == 5
    assert results["hits"]["seen"] == 15
    assert results["questions"]["questions with all negatives"] == 5
    assert results["index"] == index.fingerprint()
    assert mine("--negatives", "2", output="z.jsonl.gz") == 0
    assert "relevant, or of a relevant document" in capsys.readouterr().out
    with gzip.open(place / "z.jsonl.gz", "rt") as handle:
        assert handle.read() == (place / "n.jsonl").read_text()


def test_positives_may_come_with_the_questions(place, capsys, caplog):
    lines(
        place / "own.jsonl",
        [
            {"id": "1", "question": "When melts tin?", "pos": [METALS["tin"]], "neg": ["Old."]},
            {"id": "2", "question": "When melts lead?", "answers": ["327"]},
        ],
    )
    assert mine("--margin", "0.1", "--json", questions="own.jsonl", judged=()) == 0
    counts = json.loads(capsys.readouterr().out)["questions"]
    assert counts["questions without positives"] == counts["positives not in the index"] == 1
    assert "1 of 1 positives are not in kb" in caplog.text
    [example] = read_questions(place / "n.jsonl")
    assert sorted(each.id for each in example.negatives) == sorted(METALS.keys() - {"tin"})


def test_pieces_of_a_judged_document(place, capsys, caplog):
    text = "Tin is a metal of old. " * 9 + "It melts at 232 degrees, says the book on metals."
    documents = [Document("book", text), Document("lead", METALS["lead"])]
    pieces = list(split(documents, max_tokens=20, overlap=0))
    holding = [each.id for each in pieces if "232" in each.text]
    assert len(pieces) > 3 and holding
    Index.build("pieces", pieces, stores=["bm25"])
    qrels(place / "q.tsv", [("q-tin", "book", 1), ("q-tin", "gone", 1), ("other", "lead", 1)])
    assert mine("--json", index="pieces") == 0
    counts = json.loads(capsys.readouterr().out)
    [example] = read_questions(place / "n.jsonl")
    assert [each.id for each in example.positives] == holding
    assert [each.id for each in example.negatives] == ["lead"]
    assert counts["hits"]["relevant"] == counts["hits"]["seen"] - 1 >= 1
    assert counts["questions"]["questions not judged"] == 4
    assert counts["questions"]["positives not in the index"] == 1
    assert "1 of 2 positives are not in pieces: 'gone'" in caplog.text


def test_nothing_of_dev_and_test_is_taken(place, capsys):
    qrels(place / "dev.tsv", [("q-tin", "copper", 1), ("q-tin", "iron", 0)])
    test = {"id": "t", "text": "at how many degrees melts LEAD"}
    lines(place / "test.jsonl", [test | {"positives": [{"id": "gold", "text": "."}]}])
    # A question of another id that asks what dev's asks.
    questions = (place / "q.jsonl").read_text()
    twin = {"id": "twin", "text": "At how many degrees melts tin ?"}
    (place / "q.jsonl").write_text(questions + json.dumps(twin) + "\n")
    with (place / "q.tsv").open("a") as handle:
        handle.write("twin\t0\ttin\t1\n")
    assert mine("--held-out", "dev.tsv", "test.jsonl", "--json") == 0
    results = json.loads(capsys.readouterr().out)
    found = negatives()
    assert found.keys() == {"zinc", "iron", "gold"}
    assert results["questions"]["questions held out"] == 3
    for metal, names in found.items():
        assert set(names) == METALS.keys() - {metal, "copper", "gold"}
    assert results["hits"]["held_out"] == 5
    assert mine("--held-out", "dev.tsv", "--allow-held-out", output="all.jsonl") == 0
    assert {m: set(found) for m, found in negatives("all.jsonl").items()} == {
        metal: METALS.keys() - {metal} for metal in ANSWERS if metal != "tin"
    }
    (place / "s.toml").write_text('held_out = ["dev.tsv", "test.jsonl"]\n')
    first = (place / "n.jsonl").read_text()
    assert mine("--config", "s.toml", "--replace") == 0
    assert (place / "n.jsonl").read_text() == first


def test_limit_sampling_and_ranks(place):
    assert mine("--limit", "2", "--from-rank", "3", "--depth", "4") == 0
    found = read_questions(place / "n.jsonl")
    assert len(found) == 2
    ranks = {each.metadata["mined"]["rank"] for example in found for each in example.negatives}
    assert ranks == {3, 4}
    draws = []
    for seed in ("0", "0", "1"):
        assert mine("--sampling", "random", "--seed", seed, "--negatives", "2", "--replace") == 0
        draws.append(negatives())
    assert draws[0] == draws[1] != draws[2]


def test_vectors_are_those_of_the_index(place, monkeypatch):
    encoder = BiEncoder.load("all-MiniLM-L6-v2", device="cpu", precision="fp32")
    documents = [Document(*pair) for pair in METALS.items()]
    Index.build("dense", documents, encoder=encoder)

    def refused(*given, **named):
        raise AssertionError("a document was encoded")

    monkeypatch.setattr(BiEncoder, "encode_documents", refused)
    options = ("--device", "cpu", "--precision", "fp32", "--retriever", "dense")
    assert mine("--relative-margin", "0.2", *options, index="dense") == 0
    vectors = encoder._encode(list(METALS.values()), encoder.model.encode_document, "")
    for example in read_questions(place / "n.jsonl"):
        metal = example.query.id.removeprefix("q-")
        own = encoder.encode_queries([example.query.text])[0]
        scores = dict(zip(METALS, (vectors @ own).tolist(), strict=True))
        low = scores[metal] * 0.8
        expected = [
            name for name in sorted(scores, key=lambda n: -scores[n]) if scores[name] <= low
        ]
        assert [each.id for each in example.negatives] == expected != []
        for each in example.negatives:
            assert each.metadata["mined"]["score"] == pytest.approx(scores[each.id], abs=1e-5)


@pytest.fixture(scope="module")
def cross_encoder(tmp_path_factory):
    """A folder of a cross-encoder with random weights that knows the words of the metals."""
    folder = tmp_path_factory.mktemp("cross")
    words = sorted({word.strip(".?").lower() for text in METALS.values() for word in text.split()})
    special = ["[PAD]", "[CLS]", "[SEP]", "[UNK]"]
    names = {name: number for number, name in enumerate([*special, *words])}
    tokenizer = Tokenizer(models.WordLevel(names, unk_token="[UNK]"))
    tokenizer.normalizer = normalizers.Lowercase()
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    tokenizer.post_processor = processors.BertProcessing(("[SEP]", 2), ("[CLS]", 1))
    PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, pad_token="[PAD]", cls_token="[CLS]", sep_token="[SEP]",
        unk_token="[UNK]", model_max_length=64,
    ).save_pretrained(folder)  # fmt: skip
    torch.manual_seed(1)
    config = BertConfig(
        vocab_size=len(names), hidden_size=32, num_hidden_layers=2, num_attention_heads=2,
        intermediate_size=64, num_labels=1, initializer_range=0.5, max_position_embeddings=64,
    )  # fmt: skip
    BertForSequenceClassification(config).save_pretrained(folder)
    return str(folder)


def test_a_cross_encoder_refuses_and_scores_a_pair_once(place, cross_encoder, monkeypatch, capsys):
    model = CrossEncoder.load(cross_encoder, device="cpu", precision="fp32")
    scores = {}
    for metal in ANSWERS:
        pairs = [(f"At how many degrees melts {metal}?", text) for text in METALS.values()]
        scores[metal] = dict(zip(METALS, model.score(pairs).tolist(), strict=True))
    ordered = sorted(value for of in scores.values() for value in of.values())
    middle = (ordered[18] + ordered[19]) / 2  # no score is as near to it as rounding is
    options = ("--cross-encoder", cross_encoder, "--max-score", str(middle), "--device", "cpu")
    options += ("--precision", "fp32")
    assert mine(*options) == 0
    found = read_questions(place / "n.jsonl")
    for example in found:
        metal = example.query.id.removeprefix("q-")
        assert {each.id for each in example.negatives} == {
            name for name in METALS if name != metal and scores[metal][name] <= middle
        }
        for each in (*example.positives, *example.negatives):
            told = each.metadata["mined"]["cross_encoder"]
            assert told == pytest.approx(scores[metal][each.id], abs=1e-5)
    assert 0 < sum(len(each.negatives) for each in found) < 25
    first = (place / "n.jsonl").read_text()
    # Other thresholds, and the same ones again, need no more scores.
    monkeypatch.setattr(CrossEncoder, "score", lambda *given: pytest.fail("scored again"))
    assert mine(*options, "--replace") == 0
    assert (place / "n.jsonl").read_text() == first
    assert mine(*options[:2], *options[4:], "--score-margin", "0.0", "--replace") == 0
    best = {
        metal: {n for n in METALS if n != metal and scores[metal][n] <= scores[metal][metal]}
        for metal in ANSWERS
    }
    assert {m: set(names) for m, names in negatives().items()} == {
        m: n for m, n in best.items() if n
    }


def test_what_helps_the_generator_is_no_negative(place, tiny_folder, monkeypatch, capsys):
    options = ("--generator", str(tiny_folder), "--device", "cpu", "--precision", "fp32")
    assert mine(*options, "--max-utility=99") == 0
    every = {
        (example.query.id, each.id): each.metadata["mined"]["utility"]
        for example in read_questions(place / "n.jsonl")
        for each in example.negatives
    }
    assert len(every) == 25 and len(set(every.values())) > 20
    middle = sorted(every.values())[12]
    # What is on disk is not asked again.
    monkeypatch.setattr(utility, "answer_loglikelihoods", lambda *of, **_: pytest.fail("again"))
    assert mine(*options, f"--max-utility={middle}", "--replace", "--json") == 0
    assert '"utility": 12' in capsys.readouterr().out
    kept = {
        (example.query.id, each.id)
        for example in read_questions(place / "n.jsonl")
        for each in example.negatives
    }
    assert kept == {pair for pair, value in every.items() if value <= middle}


def test_what_cannot_be_is_told_and_leaves_nothing(place, capsys):
    def refused(code, told, *options, **other):
        assert mine(*options, **other) == code
        error = capsys.readouterr().err
        assert told in error and "Traceback" not in error
        assert not list(place.glob("*n.jsonl*"))

    refused(1, "none of 5 questions has positives. Pass --qrels", judged=())
    qrels(place / "others.tsv", [("x", "tin", 1)])
    refused(
        1, "others.tsv judges none of the questions of q.jsonl", judged=("--qrels", "others.tsv")
    )
    qrels(place / "gone.tsv", [("q-tin", "gone", 1), ("q-tin", "tin", 0)])
    refused(1, "none of the 1 documents that gone.tsv judges", judged=("--qrels", "gone.tsv"))
    refused(1, "built with the stores bm25, not with dense", "--retriever", "dense")
    refused(1, "no index here", index="nowhere")
    refused(1, "all 5 questions are held out", "--held-out", "q.tsv")
    refused(1, "missing.tsv", "--held-out", "missing.tsv")
    refused(1, "Of 30 hits looked at, 30 were before the first rank", "--from-rank", "50")
    refused(1, "10 hits looked at, 5 were relevant, or of", "--depth", "2", "--margin", "9")
    refused(2, "--depth 3 lies before --from-rank 5", "--depth", "3", "--from-rank", "5")
    refused(2, "need --cross-encoder NAME", "--max-score", "0.5")
    refused(2, "margin must be a number from 0 up, not -1.0", "--margin", "-1")
    refused(2, "negatives must be at least 1, not 0", "--negatives", "0")
    refused(2, "--limit must be at least 1, not 0", "--limit", "0")
    refused(2, "the name must end in .jsonl", output="n.txt")
    refused(2, "there is no folder", output="no/n.jsonl")
    refused(1, "there is no such folder", "--cross-encoder", "./nowhere")
    assert not (place / "n.txt").exists()
    assert mine() == 0
    kept = (place / "n.jsonl").read_text()
    assert mine("--negatives", "1") == 2
    assert "n.jsonl exists already" in capsys.readouterr().err
    assert (place / "n.jsonl").read_text() == kept
    assert mine("--negatives", "1", "--replace") == 0
    assert (place / "n.jsonl").read_text() != kept
