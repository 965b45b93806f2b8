"""`ragkit-train retriever` and `reranker`, from files to files, with tiny models."""

import json

import numpy as np
import pytest
import sentence_transformers
import torch
from ragkit.indexers.__main__ import app as indexer
from ragkit.trainers.__main__ import app

from ragkit import Document, Index
from ragkit.console import run
from ragkit.errors import IndexStateError
from ragkit.models import BiEncoder, CrossEncoder
from ragkit.retrievers import DenseRetriever

METALS = ["tin", "lead", "zinc", "iron", "gold", "copper", "nickel", "silver", "cobalt", "barium"]


@pytest.fixture
def place(tmp_path, monkeypatch, tiny_encoder):
    monkeypatch.setenv("RAGKIT_CACHE", str(tmp_path / "cache"))
    monkeypatch.chdir(tmp_path)
    documents = [
        Document(metal, f"{metal} melts at {90 + 7 * i}.") for i, metal in enumerate(METALS)
    ]
    Index.build("kb", documents, encoder=tiny_encoder)
    lines = [
        {"id": f"{metal}-{n}", "text": text, "answers": [str(90 + 7 * i)]}
        for i, metal in enumerate(METALS)
        for n, text in enumerate([f"when does {metal} melt?", f"what melts {metal}?"])
    ]
    (tmp_path / "questions.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    qrels = "".join(f"{line['id']} 0 {line['id'][:-2]} 1\n" for line in lines)
    (tmp_path / "qrels.tsv").write_text(qrels)
    return tmp_path


def train(what, base, *options):
    given = {
        "--examples": "questions.jsonl", "--index": "kb", "--output": "out", "--base": str(base),
        "--steps": "6", "--batch": "4", "--dev-limit": "6", "--device": "cpu",
        "--learning-rate": "3e-3", "--evaluate-every": "2",
    }  # fmt: skip
    named = {option.split("=")[0] for option in options}
    command = [f"{name}={value}" for name, value in given.items() if name not in named]
    return run(app, [what, *command, *options])


def mine(*options):
    command = ["negatives", "--index=kb", "--questions=questions.jsonl", "--qrels=qrels.tsv"]
    return run(app, [*command, "--output=mined.jsonl", "--negatives=3", *options])


def results_of(capsys):
    return json.loads(capsys.readouterr().out)


def test_from_mined_negatives_to_a_refreshed_index(place, tiny_encoder_folder, capsys):
    assert mine() == 0
    capsys.readouterr()
    assert (
        train("retriever", tiny_encoder_folder, "--examples=mined.jsonl", "--seeds=0,1", "--json")
        == 0
    )
    results = results_of(capsys)
    assert results["base"]["unchanged"]
    assert set(results["measures"]) == {"before", "after"} and results["measure"] == "nDCG@10"
    assert results["data"]["train"] + results["data"]["dev"] == 20
    assert results["differences"]["nDCG@10"]["n"] == results["data"]["dev"]
    out = place / "out"
    assert (out / "seeds" / "1" / "modules.json").exists() and not (place / "out.training").exists()
    assert not [path for path in out.rglob("*") if path.suffix in (".bin", ".pt", ".pkl")]
    tuned = BiEncoder.load("out", device="cpu", precision="fp32")
    plain = sentence_transformers.SentenceTransformer("out", device="cpu")
    np.testing.assert_allclose(plain.encode(["tin"]), tuned.encode_queries(["tin"]), atol=1e-5)
    with pytest.raises(IndexStateError, match="refresh"):
        DenseRetriever(Index.open("kb"), tuned)
    assert run(indexer, ["refresh", "--index=kb", "--encoder=out", "--device=cpu"]) == 0
    DenseRetriever(Index.open("kb"), tuned)
    assert "encoder made of" in (out / "README.md").read_text()


@pytest.mark.parametrize(
    "options", [("--side=query", "--batch=10"), ("--objective=query-adapter", "--lora=r=2")]
)
def test_what_changes_queries_alone_searches_the_index_as_it_is(
    place, tiny_encoder_folder, options, capsys
):
    before = (place / "kb" / "manifest.json").read_bytes()
    assert train("retriever", tiny_encoder_folder, "--qrels=qrels.tsv", *options) == 0
    assert "refresh" not in capsys.readouterr().err
    tuned = BiEncoder.load("out", device="cpu", precision="fp32")
    DenseRetriever(Index.open("kb"), tuned)
    assert (place / "kb" / "manifest.json").read_bytes() == before


def test_the_side_of_queries_needs_the_indexs_encoder(place, tiny_encoder_folder, capsys):
    assert train("retriever", tiny_encoder_folder, "--qrels=qrels.tsv") == 0
    capsys.readouterr()
    options = ("--base=out", "--output=two", "--qrels=qrels.tsv", "--side=query")
    assert train("retriever", "out", *options) == 1
    said = capsys.readouterr().err
    assert "its vectors are by the encoder" in said and "ragkit-index refresh" in said
    assert not (place / "two").exists() and not (place / "two.training").exists()


def test_answers_alone_teach_through_the_generator(
    place, tiny_encoder_folder, tiny_folder, monkeypatch, capsys
):
    options = ("--objective=lsr", f"--generator={tiny_folder}", "--passages=4", "--json")
    options += ("--relist-every=2",)
    assert train("retriever", tiny_encoder_folder, *options) == 0
    results = results_of(capsys)
    assert results["measure"] == "answer MRR@10"
    assert results["settings"]["qrels"] is None
    from ragkit.models import answers

    def never(*_, **__):
        raise AssertionError("labels are made again")

    monkeypatch.setattr(answers, "answer_loglikelihoods", never)
    monkeypatch.setattr("ragkit.training.utility.answer_loglikelihoods", never)
    assert train("retriever", tiny_encoder_folder, *options, "--replace") == 0
    assert results_of(capsys)["measures"] == results["measures"]


def test_relisted_hits_are_those_of_what_was_learnt(place, tiny_encoder, tiny_folder, tmp_path):
    from ragkit.trainers.supervision import GeneratorLists

    from ragkit.corpus import read_questions
    from ragkit.types import quiet

    index = Index.open("kb")
    examples = read_questions(place / "questions.jsonl")
    lists = GeneratorLists.first(
        index, examples, generator=str(tiny_folder), retriever="dense", passages=3, device="cpu",
        relisted=True, progress=quiet,
    )  # fmt: skip
    asked = [example.query for example in examples]
    for encoder, both in ((tiny_encoder, False), (tiny_encoder, True)):
        folder = tmp_path / str(both)
        folder.mkdir()
        anew = lists.anew(5, folder, both=both)
        assert anew(encoder, 4) is lists.questions
        found = anew(encoder, 7)
        expected = DenseRetriever(index, encoder).retrieve(asked, 3)
        names = [[index.documents[row].id for row in each.others] for each in found]
        assert names == [[hit.document.id for hit in hits] for hits in expected]
        assert (folder / "lists-1.json").exists()
        assert [each.scores for each in found] == [each.scores for each in lists.questions]
        other = BiEncoder(encoder.model, query_prompt="lead ", precision="fp32")
        assert [q.others for q in lists.anew(5, folder, both=both)(other, 6)] == [
            q.others for q in found
        ]  # what was retrieved before a stop


def test_the_generators_judgement_stands_beside_its_document(place, tiny_folder, tiny_encoder):
    """Against log-likelihoods that are computed by hand, document by document."""
    from ragkit.trainers.supervision import CONTEXT_TOKENS, STYLE, GeneratorLists

    from ragkit import Hit
    from ragkit.corpus import read_questions
    from ragkit.models import Generator
    from ragkit.readers import GeneratorReader
    from ragkit.types import quiet

    index, examples = Index.open("kb"), read_questions(place / "questions.jsonl")[:3]
    lists = GeneratorLists.first(
        index, examples, generator=str(tiny_folder), retriever="hybrid", passages=4, device="cpu",
        relisted=False, progress=quiet,
    )  # fmt: skip
    generator = Generator.load(str(tiny_folder), device="cpu")
    reader = GeneratorReader(generator, style=STYLE, context_tokens=CONTEXT_TOKENS)
    for example, question in zip(examples, lists.questions, strict=True):
        assert len(question.others) == 4 and not question.positives
        for row in question.others:
            hit = Hit(index.documents[row], 0.0)
            before = list(generator.encoder.encode(reader.prompt(example.query, [hit])).ids)
            *answer, _ = generator.encoder.answer_ids(example.answers[0], [0])  # without its end
            with torch.no_grad():
                logits = generator.model(torch.tensor([before + answer])).logits[0]
            logs = logits.log_softmax(-1)
            places = range(len(before) - 1, len(before) + len(answer) - 1)
            nats = [float(logs[at, token]) for at, token in zip(places, answer, strict=True)]
            assert question.scores[row] == pytest.approx(sum(nats) / len(nats), abs=1e-4)


def test_a_teachers_scores_are_no_probabilities(place, tiny_encoder_folder):
    from ragkit.trainers.supervision import scorer

    from ragkit.types import quiet

    assert mine() == 0
    options = ("--examples=mined.jsonl", "--output=teacher")
    assert train("reranker", tiny_encoder_folder, *options) == 0
    pairs = [("when does tin melt?", "tin melts at 90."), ("tin", "lead")]
    plain = sentence_transformers.CrossEncoder("teacher", device="cpu")
    assert type(plain.activation_fn).__name__ == "Sigmoid"
    odds = np.log(plain.predict(pairs) / (1 - plain.predict(pairs)))
    np.testing.assert_allclose(scorer("teacher", "cpu", "fp32", quiet)(pairs), odds, atol=1e-4)


def test_without_negatives_there_is_nothing_to_rank(place, tiny_encoder_folder, capsys):
    for objective in ("bce", "listwise"):
        options = ("--qrels=qrels.tsv", f"--objective={objective}")
        assert train("reranker", tiny_encoder_folder, *options) == 1
        assert "none of 14 questions has negatives" in capsys.readouterr().err
    assert not (place / "out").exists()


def test_dev_questions_may_bring_their_positives(place, tiny_encoder_folder, capsys):
    assert mine() == 0
    lines = (place / "mined.jsonl").read_text().splitlines()
    (place / "dev.jsonl").write_text("\n".join(lines[:6]) + "\n")
    (place / "rest.jsonl").write_text("\n".join(lines[6:]) + "\n")
    capsys.readouterr()
    options = ("--examples=rest.jsonl", "--dev-questions=dev.jsonl", "--json")
    assert train("retriever", tiny_encoder_folder, *options) == 0
    assert results_of(capsys)["data"]["dev"] == 6
    options = ("--examples=mined.jsonl", "--dev-questions=dev.jsonl", "--replace")
    assert train("retriever", tiny_encoder_folder, *options) == 1
    assert "are trained on too" in capsys.readouterr().err
    foreign = [json.loads(line) for line in lines[:6]]
    for record in foreign:
        record["positives"] = [{"text": "something of another corpus"}]
    (place / "foreign.jsonl").write_text("".join(json.dumps(r) + "\n" for r in foreign))
    options = ("--examples=rest.jsonl", "--dev-questions=foreign.jsonl", "--replace")
    assert train("retriever", tiny_encoder_folder, *options) == 1
    assert "of another corpus?" in capsys.readouterr().err


def test_prompts_of_the_index_are_trained_with_and_kept(place, tiny_encoder_folder, tiny_encoder):
    prompted = BiEncoder(
        tiny_encoder.model, str(tiny_encoder_folder), query_prompt="when ", document_prompt="tin "
    )
    documents = list(Index.open("kb").documents)
    Index.build("kb", documents, encoder=prompted, replace=True)
    for options in (("--side=query",), ("--side=both", "--replace")):
        assert train("retriever", tiny_encoder_folder, "--qrels=qrels.tsv", *options) == 0
        tuned = BiEncoder.load("out", device="cpu", precision="fp32")
        assert (tuned.query_prompt, tuned.document_prompt) == ("when ", "tin ")
        if "--side=query" in options:
            DenseRetriever(Index.open("kb"), tuned)


def test_a_cross_encoder_teaches_a_retriever_and_a_reranker(place, tiny_encoder_folder, capsys):
    assert mine() == 0
    options = ("--examples=mined.jsonl", "--objective=listwise")
    assert train("reranker", tiny_encoder_folder, *options, "--output=teacher") == 0
    for objective in ("margin-mse", "kl"):
        options = ("--examples=mined.jsonl", f"--objective={objective}", f"--output={objective}")
        assert train("retriever", tiny_encoder_folder, *options) == 1
        assert "has no score of a cross-encoder" in capsys.readouterr().err
        assert train("retriever", tiny_encoder_folder, *options, "--teacher=teacher") == 0
    assert mine("--replace", "--cross-encoder=teacher") == 0
    options = ("--examples=mined.jsonl", "--objective=distil", "--output=student")
    assert train("reranker", tiny_encoder_folder, *options) == 0


@pytest.mark.parametrize("objective", ["bce", "listwise", "utility"])
def test_a_reranker_is_learnt_from_labels_or_from_utility(
    place, tiny_encoder_folder, tiny_folder, objective, capsys
):
    examples = "questions.jsonl"
    options = [f"--objective={objective}", "--json", "--depth=5"]
    if objective == "utility":
        options += [f"--generator={tiny_folder}", "--passages=4", "--dev-qrels=qrels.tsv"]
        options += ["--dev-questions=dev.jsonl"]
        lines = (place / examples).read_text().splitlines()
        (place / "dev.jsonl").write_text("\n".join(lines[:6]) + "\n")
        (place / "rest.jsonl").write_text("\n".join(lines[6:]) + "\n")
        examples = "rest.jsonl"
    else:
        assert mine() == 0
        examples = "mined.jsonl"
    capsys.readouterr()
    assert train("reranker", tiny_encoder_folder, f"--examples={examples}", *options) == 0
    results = results_of(capsys)
    assert results["seconds_a_question"] > 0
    assert set(results["measures"]["after"]) >= {"nDCG@10", "MRR@10", "recall@5"}
    assert results["average"]["taken"] == 1 and list(results["average"]["tried"]) == ["1.0"]
    weight = results["weight"]
    assert list(map(float, weight["tried"])) == pytest.approx([n / 10 for n in range(11)])
    assert weight["tried"]["0.0"] == pytest.approx(results["measures"]["before"]["nDCG@10"]["mean"])
    assert weight["tried"]["1.0"] == pytest.approx(results["measures"]["after"]["nDCG@10"]["mean"])
    assert weight["tried"][str(weight["taken"])] == max(weight["tried"].values())
    told = f"--reranker-weight {weight['taken']:g} --depth 5\n"
    assert told in (place / "out" / "README.md").read_text()
    model = CrossEncoder.load("out", device="cpu", precision="fp32")
    plain = sentence_transformers.CrossEncoder("out", device="cpu")
    pairs = [("when does tin melt?", "tin melts at 90."), ("tin", "lead")]
    raw = plain.predict(pairs, activation_fn=torch.nn.Identity())
    np.testing.assert_allclose(raw, model.score(pairs), atol=1e-5)


def test_a_stopped_run_goes_on_and_others_are_refused(
    place, tiny_encoder_folder, monkeypatch, capsys
):
    from ragkit.training import keeper

    assert train("retriever", tiny_encoder_folder, "--qrels=qrels.tsv") == 0
    expected = BiEncoder.load("out", device="cpu", precision="fp32").encode_queries(METALS)
    write = keeper.Keeper._write

    def stop(self):
        write(self)
        raise KeyboardInterrupt

    with monkeypatch.context() as patched:
        patched.setattr(keeper.Keeper, "_write", stop)
        again = ("--qrels=qrels.tsv", "--output=two")
        assert train("retriever", tiny_encoder_folder, *again) == 130
    assert (place / "two.training").exists() and not (place / "two").exists()
    capsys.readouterr()
    assert train("retriever", tiny_encoder_folder, *again, "--temperature=0.1") == 2
    assert "other temperature" in capsys.readouterr().err
    assert train("retriever", tiny_encoder_folder, *again) == 0
    found = BiEncoder.load("two", device="cpu", precision="fp32").encode_queries(METALS)
    np.testing.assert_allclose(found, expected, atol=1e-5)


def test_a_stopped_retrieval_goes_on(place, monkeypatch):
    from ragkit.trainers import questions

    from ragkit.assemble import RetrievalSettings
    from ragkit.corpus import read_questions
    from ragkit.retrievers import Bm25Retriever
    from ragkit.types import quiet

    index, settings = Index.open("kb"), RetrievalSettings(index=place / "kb", retriever="bm25")
    asked = [example.query for example in read_questions(place / "questions.jsonl")]
    rows = index.documents.rows
    expected = [
        [(rows[hit.document.id], hit.score) for hit in hits]
        for hits in Bm25Retriever(index).retrieve(asked, 3)
    ]
    monkeypatch.setattr(questions, "_SLICE", 6)
    retrieve, seen = Bm25Retriever.retrieve, []

    def counted(self, queries, k):
        seen.append(len(queries))
        return retrieve(self, queries, k)

    def stop(stage, done, total):
        if done == 12:
            raise KeyboardInterrupt

    monkeypatch.setattr(Bm25Retriever, "retrieve", counted)
    with pytest.raises(KeyboardInterrupt):
        questions.ranked(index, asked, settings, 3, stop)
    assert questions.ranked(index, asked, settings, 3, quiet) == expected
    assert questions.ranked(index, asked, settings, 3, quiet) == expected
    assert seen == [6, 6, 6, 2]


@pytest.mark.parametrize("what", ["retriever", "reranker"])
def test_the_average_is_swept_on_dev(place, tiny_encoder_folder, what, capsys):
    assert mine() == 0
    capsys.readouterr()
    options = ("--examples=mined.jsonl", "--seeds=0,1", "--steps=10", "--json")
    assert train(what, tiny_encoder_folder, *options, "--average=sweep") == 0
    results = results_of(capsys)
    average, after = results["average"], results["measures"]["after"]
    assert list(average["tried"]) == ["0.25", "0.5", "0.75", "1.0"]
    best = average["tried"][str(average["taken"])]
    assert best == max(average["tried"].values())
    assert after[results["measure"]]["mean"] == pytest.approx(best)
    if what == "reranker":  # the weight is of the models at that share
        assert results["weight"]["tried"]["1.0"] == pytest.approx(best)
    told = f"share of the learnt weights: {average['taken']}\n"
    assert told in (place / "out" / "README.md").read_text()
    options = (*options, "--average=0.5", "--replace")
    assert train(what, tiny_encoder_folder, *options) == 0
    assert results_of(capsys)["average"]["tried"] == {"0.5": pytest.approx(average["tried"]["0.5"])}


BAD = [
    (("--average=2",), "expected a share"),
    (("--temperature=0",), "above 0"),
    (("--objective=lsr", "--teacher=x"), "no use for --teacher"),
    (("--relist-every=3",), "no use for --relist-every"),
    (("--direction=reverse",), "no use for --direction"),
    (("--objective=lsr", "--direction=reverse", "--in-batch"), "the direction forward alone"),
    (("--learning-rate=0",), "learning rate 0"),
    (("--warmup=2",), "warm-up 2"),
    (("--objective=lsr", "--retriever=bm25", "--relist-every=2"), "BM25 finds the same"),
    (("--objective=margin-mse", "--teacher=x"), "x"),
    (("--matryoshka=64,32",), "the encoder has 32"),
    (("--seeds=0,0",), "different numbers"),
    (("--batch=1",), "--batch must be at least 2"),
    (("--dev-qrels=none.tsv",), "none.tsv"),
    (("--qrels=other.tsv",), "judges none of the questions"),
    (("--base=nowhere",), "nowhere"),
    (("--index=nowhere",), "no index here"),
    (("--examples=empty.jsonl", "--qrels=qrels.tsv"), "empty.jsonl"),
]


@pytest.mark.parametrize(("options", "told"), BAD)
def test_bad_input_is_told_before_any_work(place, tiny_encoder_folder, options, told, capsys):
    (place / "other.tsv").write_text("nobody 0 tin 1\n")
    (place / "empty.jsonl").write_text("")
    if not any(option.startswith("--qrels") for option in options):
        options = ("--qrels=qrels.tsv", *options)
    assert train("retriever", tiny_encoder_folder, *options) in (1, 2)
    said = capsys.readouterr().err
    assert told in said and "Traceback" not in said
    assert not (place / "out").exists() and not (place / "out.training").exists()


def test_questions_without_positives_or_answers_are_refused(place, tiny_encoder_folder, capsys):
    assert train("retriever", tiny_encoder_folder) == 1
    assert "none of 20 questions has positives" in capsys.readouterr().err
    (place / "bare.jsonl").write_text('{"id": "q", "text": "what?"}\n')
    assert train("retriever", tiny_encoder_folder, "--examples=bare.jsonl", "--objective=lsr") == 1
    assert "has an answer" in capsys.readouterr().err
