"""Losses, lists and passes of a retriever, each against a plain computation."""

import math
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from sentence_transformers import SentenceTransformer
from sentence_transformers.sentence_transformer.losses import MultipleNegativesRankingLoss
from torch.nn import functional

from ragkit import Document, Example, Index, Query
from ragkit.errors import DataError, ModelError, SettingsError
from ragkit.models import BiEncoder
from ragkit.training.dev_search import ANSWER, DevSearch
from ragkit.training.even import even_passes
from ragkit.training.keeper import LoopSettings
from ragkit.training.lists import DrawnList, DrawnLists, ListedQuestion, listed
from ragkit.training.query_side import QueryAdapter, averaged, two_towers, with_adapter
from ragkit.training.retriever_loss import LossSettings, RetrieverLoss, labels_of
from ragkit.training.retriever_runs import RetrieverRun

METALS = ["tin", "lead", "zinc", "iron", "gold", "copper", "nickel", "silver", "cobalt", "barium"]
DOCUMENTS = [
    Document(m, f"{m} melts at {90 + 7 * i}. " * (1 + i % 3)) for i, m in enumerate(METALS)
]
LOOP = LoopSettings(steps=6, batch=4, learning_rate=3e-3, evaluate_every=2)


def of(*places):
    return tuple(DOCUMENTS[place] for place in places)


EXAMPLES = [
    Example(Query(f"{m}-{n}", text), of(i), of((i + 1) % 10, (i + 3) % 10), (str(90 + 7 * i),))
    for i, m in enumerate(METALS)
    for n, text in enumerate([f"when does {m} melt?", f"at what heat is {m} melting?"])
]


def settled(model):
    """A copy without dropout, in the state for training."""
    for module in model.modules():
        if isinstance(module, torch.nn.Dropout):
            module.p = 0.0
    return model.train()


def test_even_passes_change_neither_vectors_nor_gradients(tiny_encoder):
    model = settled(tiny_encoder.model)
    features = model.preprocess([d.contents for d in DOCUMENTS] + ["tin"])
    weights = torch.randn(11, 32, generator=torch.Generator().manual_seed(0))

    def step():
        model.zero_grad()
        vectors = model(dict(features))["sentence_embedding"]
        (vectors * weights).sum().backward()
        return vectors.detach(), {n: p.grad for n, p in model.named_parameters()}

    expected, gradients = step()
    for tokens, kept in ((16, 10**6), (40, 60), (40, 0), (1, 0)):
        with even_passes(model, tokens=tokens, kept=kept):
            found, its = step()
        torch.testing.assert_close(found, expected, atol=1e-5, rtol=0)
        for name, gradient in gradients.items():
            if gradient is None:
                assert its[name] is None
            else:
                torch.testing.assert_close(its[name], gradient, atol=1e-5, rtol=1e-4)
    again, _ = step()
    assert torch.equal(again, expected)  # nothing is left of it


def test_what_is_not_kept_is_read_again(tiny_encoder, monkeypatch):
    model = settled(tiny_encoder.model)
    features = model.preprocess([d.contents for d in DOCUMENTS])
    read = type(model).forward
    seen = []

    def counted(self, given, **options):
        seen.append(int(given["attention_mask"].sum()))
        return read(self, given, **options)

    monkeypatch.setattr(type(model), "forward", counted)
    counts = {}
    for kept in (0, 60, 10**6):
        seen.clear()
        with even_passes(model, tokens=40, kept=kept):
            model(dict(features))["sentence_embedding"].sum().backward()
        counts[kept] = sum(seen)
    total = int(features["attention_mask"].sum())
    assert counts[10**6] == total and counts[0] == 2 * total
    assert total < counts[60] < 2 * total


def test_left_padding_is_cut_on_the_left():
    from ragkit.training.even import _cut

    mask = torch.tensor([[0, 0, 1, 1], [0, 1, 1, 1]])
    ids = torch.tensor([[0, 0, 5, 6], [0, 7, 8, 9]])
    assert _cut(ids, mask, torch.tensor([0]), 2, False).tolist() == [[5, 6]]
    assert _cut(torch.tensor([3, 4]), mask, torch.tensor([1]), 2, False).tolist() == [4]
    assert _cut("text", mask, torch.tensor([1]), 2, False) == "text"


def contrastive(queries, documents, rows, temperature):
    """The definition, a question at a time."""
    losses = []
    ids, _ = labels_of(rows)
    for query, row in zip(queries, rows, strict=True):
        target = row.documents[0]
        scores = {
            number: float(functional.cosine_similarity(query, document, dim=0)) / temperature
            for number, document in zip(ids, documents, strict=True)
            if number == target or number not in row.positives
        }
        losses.append(math.log(sum(map(math.exp, scores.values()))) - scores[target])
    return sum(losses) / len(losses)


def drawn(*documents, positives=None, scores=()):
    return DrawnList("q", documents, positives or documents[:1], scores)


def test_nobodys_positive_is_its_negative_and_documents_count_once():
    rows = [drawn(4, 7), drawn(2, 4, positives=(2, 9)), drawn(4, 9), drawn(9, positives=(9, 2))]
    ids, labels = labels_of(rows)
    assert ids == [4, 7, 2, 9]
    random = torch.Generator().manual_seed(0)
    queries, documents = torch.randn(4, 8, generator=random), torch.randn(4, 8, generator=random)
    loss = RetrieverLoss(torch.nn.Identity(), LossSettings(temperature=0.3), cosine=True)
    expected = contrastive(queries, documents, rows, 0.3)
    assert float(loss.loss(queries, documents, labels)) == pytest.approx(expected, abs=1e-6)


def test_without_shared_documents_it_is_the_ranking_loss(tiny_encoder):
    model = settled(tiny_encoder.model)
    texts = [[f"when does {m} melt?" for m in METALS[:4]], [d.contents for d in DOCUMENTS[:4]]]
    texts.append([d.contents for d in DOCUMENTS[4:8]])
    columns = [model.preprocess(of) for of in texts]
    theirs = MultipleNegativesRankingLoss(model, scale=20.0)(columns, None)
    rows = [drawn(i, 4 + i) for i in range(4)]
    ids, labels = labels_of(rows)
    features = [model.preprocess(texts[0]), model.preprocess([DOCUMENTS[i].contents for i in ids])]
    ours = RetrieverLoss(model, LossSettings(temperature=0.05), cosine=True)(features, labels)
    assert float(ours) == pytest.approx(float(theirs), abs=1e-4)


def test_margins_and_divergences_are_those_of_the_formulas():
    rows = [
        drawn(3, 1, 2, scores=(2.0, -1.0, 0.5)),
        drawn(1, 3, scores=(0.3, 0.1)),
        DrawnList("q", (2, 3, 1), (), (-40.0, -1.0, -1.5)),
        drawn(5, 4, positives=(5, 2), scores=(1.0, -1.0)),
    ]
    ids, labels = labels_of(rows)
    random = torch.Generator().manual_seed(1)
    queries, documents = (torch.randn(n, 8, generator=random) for n in (4, 5))
    scores = {
        (i, number): float(queries[i] @ documents[ids.index(number)]) / 0.5
        for i, row in enumerate(rows)
        for number in row.documents
    }

    def loss(**options):
        settings = LossSettings(temperature=0.5, teacher_temperature=0.8, **options)
        of = RetrieverLoss(torch.nn.Identity(), settings, cosine=False)
        return float(of.loss(queries, documents, labels))

    every = (queries @ documents.T).numpy() / 0.5
    margins, forward, reverse, among = [], [], [], []
    for i, row in enumerate(rows):
        ours = np.array([scores[i, number] for number in row.documents])
        its = np.array(row.scores)
        margins.append(np.mean(((ours[0] - ours[1:]) - (its[0] - its[1:])) ** 2))
        p, q = (np.exp(of) / np.exp(of).sum() for of in (ours, its / 0.8))
        forward.append((q * np.log(q / p)).sum())
        reverse.append((p * np.log(p / q)).sum())
        held = {*row.documents, *row.positives}
        beside = [every[i, place] for place, number in enumerate(ids) if number not in held]
        p = np.exp(ours) / (np.exp(ours).sum() + np.exp(beside).sum())
        among.append((q * np.log(q / p)).sum())
    assert loss(objective="margin-mse") == pytest.approx(np.mean(margins), rel=1e-5)
    assert loss(objective="kl") == pytest.approx(np.mean(forward), rel=1e-5)
    assert loss(objective="kl", direction="reverse") == pytest.approx(np.mean(reverse), rel=1e-5)
    assert loss(objective="kl", in_batch=True) == pytest.approx(np.mean(among), rel=1e-5)
    assert np.mean(among) > np.mean(forward) + 0.1


def test_matryoshka_sums_the_losses_of_cut_vectors():
    rows = [drawn(0, 2), drawn(1)]
    _, labels = labels_of(rows)
    queries, documents = torch.randn(2, 8), torch.randn(3, 8)
    features = [{"sentence_embedding": queries}, {"sentence_embedding": documents}]

    def loss(*sizes):
        settings = LossSettings(dimensions=sizes)
        return float(RetrieverLoss(torch.nn.Identity(), settings, cosine=True)(features, labels))

    of = RetrieverLoss(torch.nn.Identity(), LossSettings(), cosine=True)
    whole, half = (float(of.loss(queries[:, :n], documents[:, :n], labels)) for n in (8, 4))
    assert loss() == loss(8) == pytest.approx(whole, abs=1e-6)
    assert loss(4) == loss(8, 4) == pytest.approx(whole + half, abs=1e-5)


class TestSupervisionByTheGenerator:
    """The faults that others' implementations have."""

    rows = (
        DrawnList("when does tin melt?", (0, 1, 2), (), (-0.5, -3.0, -2.0)),
        DrawnList("when does zinc melt?", (2, 0, 1), (), (-0.2, -4.0, -1.0)),
    )

    def loss(self, model, rows, **options):
        settings = LossSettings(objective="kl", temperature=0.1, **options)
        ids, labels = labels_of(rows)
        asked = model.preprocess([row.text for row in rows])
        read = model.preprocess([DOCUMENTS[number].contents for number in ids])
        return RetrieverLoss(model, settings, cosine=True)([asked, read], labels)

    def test_gradients_reach_the_encoder(self, tiny_encoder):
        model = settled(tiny_encoder.model)
        self.loss(model, self.rows).backward()
        embeddings = model[0].auto_model.embeddings.word_embeddings.weight
        seen = {i for r in self.rows for i in model.tokenizer(r.text)["input_ids"]}
        seen |= {i for d in DOCUMENTS[:3] for i in model.tokenizer(d.contents)["input_ids"]}
        moved = {i for i, row in enumerate(embeddings.grad) if row.abs().sum() > 0}
        assert moved == seen

    def test_the_query_side_alone_gets_them_where_documents_are_fixed(self, tiny_encoder):
        model = settled(tiny_encoder.model)
        ids, labels = labels_of(self.rows)
        vectors = torch.from_numpy(
            tiny_encoder.encode_documents([DOCUMENTS[number].contents for number in ids])
        ).requires_grad_()
        model.train()
        settings = LossSettings(objective="kl")
        asked = model.preprocess([row.text for row in self.rows])
        loss = RetrieverLoss(model, settings, cosine=True)(
            [asked, {"sentence_embedding": vectors}], labels
        )
        loss.backward()
        assert vectors.grad is None
        embeddings = model[0].auto_model.embeddings.word_embeddings.weight
        moved = {i for i, row in enumerate(embeddings.grad) if row.abs().sum() > 0}
        assert moved == {i for r in self.rows for i in model.tokenizer(r.text)["input_ids"]}

    def test_both_distributions_are_of_the_same_documents_in_any_order(self, tiny_encoder):
        model = settled(tiny_encoder.model)
        expected = float(self.loss(model, self.rows))
        for order in ((2, 0, 1), (1, 2, 0), (2, 1, 0)):
            turned = [
                DrawnList(
                    row.text,
                    tuple(row.documents[place] for place in order),
                    (),
                    tuple(row.scores[place] for place in order),
                )
                for row in reversed(self.rows)
            ]
            assert float(self.loss(model, turned)) == pytest.approx(expected, abs=1e-5)
        wrong = [replace(row, scores=row.scores[::-1]) for row in self.rows]
        assert abs(float(self.loss(model, wrong)) - expected) > 0.01

    def test_the_teachers_are_log_probabilities(self, tiny_encoder):
        """Of probabilities such as 1e-12 and 1e-9 the softmax would be uniform."""
        model = settled(tiny_encoder.model)
        nats = tuple(math.log(p) for p in (1e-12, 1e-9, 1e-10))
        rows = [DrawnList("when does tin melt?", (0, 1, 2), (), nats)]
        uniform = [replace(rows[0], scores=(0.0, 0.0, 0.0))]
        assert abs(float(self.loss(model, rows)) - float(self.loss(model, uniform))) > 0.05
        sharp = float(self.loss(model, rows, teacher_temperature=0.1))
        assert sharp != pytest.approx(float(self.loss(model, rows)), abs=1e-3)

    def test_all_documents_count(self, tiny_encoder):
        model = settled(tiny_encoder.model)
        expected = float(self.loss(model, self.rows[:1]))
        for place in range(3):
            scores = list(self.rows[0].scores)
            scores[place] += 1.0
            changed = [replace(self.rows[0], scores=tuple(scores))]
            assert abs(float(self.loss(model, changed)) - expected) > 1e-3


def test_lists_are_of_numbered_documents():
    questions, documents = listed(EXAMPLES[:4])
    assert [d.id for d in documents] == ["tin", "lead", "iron", "zinc", "gold"]
    assert questions[2] == ListedQuestion("when does lead melt?", (1,), (3, 4), {})
    scores = {(e.query.id, d.id): 0.5 for e in EXAMPLES for d in (*e.positives, *e.negatives)}
    questions, _ = listed(EXAMPLES[:1], scores)
    assert questions[0].scores == {0: 0.5, 1: 0.5, 2: 0.5}
    with pytest.raises(DataError, match="'q' has neither"):
        listed([Example(Query("q", "?"))])
    with pytest.raises(DataError, match="'tin' and differ"):
        listed([Example(Query("q", "?"), of(0), (Document("tin", "other"),))])


def test_draws_pass_through_all_questions_and_follow_from_the_seed():
    questions, _ = listed(EXAMPLES)
    rows = DrawnLists(lambda step: questions, 10, 4, 1, seed=5)
    assert len(rows) == 40
    texts = [rows[place].text for place in range(40)]
    every = sorted(question.text for question in questions)
    assert sorted(texts[:20]) == sorted(texts[20:]) == every
    assert texts[:20] != texts[20:]
    later = DrawnLists(lambda step: questions, 10, 4, 1, seed=5, begin=12)
    assert [later[place] for place in range(28)] == [rows[place] for place in range(12, 40)]
    assert texts != [DrawnLists(lambda s: questions, 10, 4, 1, seed=6)[p].text for p in range(40)]
    with pytest.raises(IndexError):
        later[28]
    negatives = {rows[place].documents[1] for place in range(40) if " tin " in rows[place].text}
    assert len(negatives) == 2  # one of two is drawn at each access
    whole = DrawnLists(lambda step: questions, 10, 4, None)[0]
    assert len(whole.documents) == 3


def test_together_questions_of_a_document_are_neighbours():
    questions, _ = listed(EXAMPLES)
    rows = DrawnLists(lambda step: questions, 5, 4, 0, together=True)
    firsts = [rows[place].documents[0] for place in range(20)]
    assert firsts[::2] == firsts[1::2] and len(set(firsts)) == 10
    assert firsts[:20:2] != sorted(firsts[:20:2])


@pytest.mark.parametrize(
    "options",
    [
        {"objective": "best"}, {"direction": "sideways"}, {"temperature": 0.0},
        {"teacher_temperature": -1.0}, {"dimensions": (0,)}, {"temperature": math.nan},
        {"in_batch": True}, {"objective": "kl", "direction": "reverse", "in_batch": True},
    ],
)  # fmt: skip
def test_losses_that_cannot_be_are_refused(options):
    with pytest.raises(SettingsError):
        LossSettings(**options)


@pytest.fixture
def index(tiny_encoder, tmp_path):
    return Index.build(tmp_path / "kb", DOCUMENTS, encoder=tiny_encoder)


def run_of(encoder, index, **options):
    questions, documents = listed(EXAMPLES)
    rows = np.array([index.documents.rows[document.id] for document in documents])
    dev = DevSearch(index, EXAMPLES, {e.query.id: {e.positives[0].id: 1} for e in EXAMPLES})
    return RetrieverRun(
        encoder,
        documents,
        questions,
        options.pop("loss", LossSettings()),
        vectors=lambda numbers: index.dense.vectors(rows[numbers]),
        dev=dev,
        **options,
    )


def mean(values):
    return float(np.mean(values["nDCG@10"]))


@pytest.mark.parametrize("side", ["both", "query", "adapter"])
@pytest.mark.parametrize("lora", [0, 4])
def test_it_learns_and_the_base_stays_as_it_was(tiny_encoder, index, tmp_path, side, lora):
    before = tiny_encoder.model.state_dict()
    before = {name: tensor.clone() for name, tensor in before.items()}
    run = run_of(tiny_encoder, index, side=side, lora=lora)
    rate = 0.1 if side == "adapter" else 1e-2 if lora else 3e-3
    settings = replace(LOOP, steps=40, learning_rate=rate, evaluate_every=10)
    learnt, history = run.learn(settings, tmp_path)
    base = mean(run.dev.values(tiny_encoder))
    after = mean(run.dev.values(learnt, stored=side != "both"))
    assert after > base + (0.005 if lora else 0.05)
    assert -min(history.evaluations.values()) == pytest.approx(after, abs=1e-6)
    assert all(torch.equal(before[n], t) for n, t in tiny_encoder.model.state_dict().items())
    learnt.model.save_pretrained(str(tmp_path / "out"), create_model_card=False)
    again = BiEncoder.load(str(tmp_path / "out"), device="cpu", precision="fp32")
    plain = SentenceTransformer(str(tmp_path / "out"), device="cpu")
    queries = [example.query.text for example in EXAMPLES]
    np.testing.assert_allclose(
        plain.encode_query(queries), again.encode_queries(queries), atol=1e-5
    )
    assert mean(run.dev.values(again, stored=side != "both")) == pytest.approx(after, abs=1e-6)
    base_fingerprint = tiny_encoder.describe()["fingerprint"]
    if side == "both":
        assert "base" not in again.describe()
        assert again.describe()["fingerprint"] != base_fingerprint
    else:
        assert again.describe()["base"] == base_fingerprint
        documents = [document.contents for document in DOCUMENTS]
        mine, its = again.encode_documents(documents), tiny_encoder.encode_documents(documents)
        np.testing.assert_array_equal(mine, its)
        with pytest.raises(ModelError, match="cannot be trained further"):
            replace(run, encoder=again)


@pytest.mark.parametrize("kind", ["cosine", "dot"])
def test_an_adapter_is_exported_as_it_was_learnt(tiny_encoder, index, kind):
    """Also where the encoder itself does not normalise its vectors."""
    bare = SentenceTransformer(modules=list(tiny_encoder.model)[:2], similarity_fn_name=kind)
    encoder = BiEncoder(bare, precision="fp32")
    loss = RetrieverLoss(torch.nn.Identity(), LossSettings(), cosine=kind == "cosine")
    adapter = QueryAdapter(encoder.dimension, 0, loss)
    with torch.no_grad():
        for parameter in adapter.parameters():
            parameter.add_(torch.randn(parameter.shape, generator=torch.Generator().manual_seed(1)))
    texts = ["when does tin melt?", "lead"]
    expected = adapter.adapted(torch.from_numpy(encoder.encode_queries(texts))).detach()
    if kind == "cosine":
        expected = functional.normalize(expected, dim=-1)
    exported = BiEncoder(with_adapter(bare, adapter), precision="fp32")
    np.testing.assert_allclose(exported.encode_queries(texts), expected, atol=1e-4)
    documents, own = exported.encode_documents(texts), encoder.encode_documents(texts)
    np.testing.assert_allclose(documents, own, atol=1e-6)


@pytest.mark.parametrize("side", ["both", "query", "adapter"])
def test_averages_lie_between_the_base_and_what_was_learnt(tiny_encoder, index, tmp_path, side):
    run = replace(run_of(tiny_encoder, index, side=side), dev=None)
    learnt, _ = run.learn(replace(LOOP, learning_rate=1e-2), tmp_path)
    texts = ["when does tin melt?", "lead"]
    none, whole = run.averaged(learnt, 0.0), run.averaged(learnt, 1.0)
    np.testing.assert_allclose(
        none.encode_queries(texts), tiny_encoder.encode_queries(texts), atol=1e-6
    )
    np.testing.assert_allclose(whole.encode_queries(texts), learnt.encode_queries(texts), atol=1e-6)
    half = run.averaged(learnt, 0.5).encode_queries(texts)
    assert np.abs(half - none.encode_queries(texts)).max() > 1e-4
    with pytest.raises(SettingsError, match="must lie in"):
        run.averaged(learnt, 1.5)


def test_the_average_of_states_is_linear():
    base = {"w": torch.zeros(2), "n": torch.tensor(3)}
    tuned = {"w": torch.ones(2), "n": torch.tensor(7)}
    found = averaged(base, tuned, 0.25)
    assert found["w"].tolist() == [0.25, 0.25] and int(found["n"]) == 7


@pytest.mark.parametrize("options", [{}, {"lora": 4}, {"dropout": 0.2}])
def test_a_stopped_run_goes_on(tiny_encoder, index, tmp_path, options):
    run = run_of(tiny_encoder, index, **options)
    for name in "ab":
        (tmp_path / name).mkdir()
    whole, history = run.learn(LOOP, tmp_path / "a")
    told = []

    def stop(stage, done, total):
        told.append(done)
        if done == 5:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        run.learn(LOOP, tmp_path / "b", progress=stop)
    again, its = run.learn(
        LOOP, tmp_path / "b", progress=lambda stage, done, total: told.append(done)
    )
    assert told == [1, 2, 3, 4, 5, 5, 6]
    assert its.evaluations == pytest.approx(history.evaluations, abs=1e-6)
    for name, tensor in whole.model.state_dict().items():
        torch.testing.assert_close(again.model.state_dict()[name], tensor, atol=1e-6, rtol=0)


def test_two_towers_are_two(tiny_encoder, tmp_path):
    other = BiEncoder.load(tiny_encoder.name, device="cpu", precision="fp32")
    with torch.no_grad():
        other.model[0].auto_model.embeddings.word_embeddings.weight *= -1
    both = BiEncoder(two_towers(tiny_encoder.model, other.model), precision="fp32")
    np.testing.assert_array_equal(
        both.encode_documents(["tin"]), tiny_encoder.encode_documents(["tin"])
    )
    np.testing.assert_array_equal(both.encode_queries(["tin"]), other.encode_queries(["tin"]))
    assert both.describe()["base"] == tiny_encoder.describe()["fingerprint"]


def test_dev_questions_are_searched_in_what_matters(tiny_encoder, index):
    qrels = {"tin-0": {"cobalt": 1}, "other": {"tin": 1}}
    dev = DevSearch(index, EXAMPLES, qrels, limit=6)
    dev.narrow(tiny_encoder)
    found, _ = index.dense.search(tiny_encoder.encode_queries([EXAMPLES[0].query.text]), 3)
    needed = {index.documents.rows["cobalt"], *found[0].tolist()}
    assert len(dev.rows) == 6 and needed < set(dev.rows.tolist())
    others = {tuple(DevSearch(index, EXAMPLES, qrels, 6, seed).rows) for seed in range(5)}
    assert len(others) == 1  # nothing is left out before `narrow`
    again = DevSearch(index, EXAMPLES, qrels, limit=6, seed=0)
    again.narrow(tiny_encoder)
    assert again.rows.tolist() == dev.rows.tolist()
    other = BiEncoder(tiny_encoder.model, document_prompt="lead ", precision="fp32")
    by_bm25 = DevSearch(index, EXAMPLES, qrels, limit=6)
    by_bm25.narrow(other)  # whose vectors are not the index's
    best = index.bm25.search([EXAMPLES[0].query.text], 3)[0][0].tolist()
    assert {index.documents.rows["cobalt"], *best} <= set(by_bm25.rows.tolist())
    dev = DevSearch(index, EXAMPLES, qrels)
    assert [example.query.id for example in dev.examples] == ["tin-0"]
    values = dev.values(tiny_encoder)
    assert values == dev.values(tiny_encoder, stored=True)
    ranked = index.dense.search(tiny_encoder.encode_queries([EXAMPLES[0].query.text]), 10)[0][0]
    rank = [index.documents[int(row)].id for row in ranked].index("cobalt") + 1
    assert values["nDCG@10"] == [pytest.approx(1 / math.log2(rank + 1))]


def test_dev_questions_keep_their_filters(tiny_encoder, tmp_path):
    documents = [replace(d, metadata={"even": i % 2 == 0}) for i, d in enumerate(DOCUMENTS)]
    index = Index.build(tmp_path / "kb", documents, encoder=tiny_encoder)
    asked = [replace(e, query=replace(e.query, where={"even": False})) for e in EXAMPLES[:4]]
    dev = DevSearch(index, asked, {e.query.id: {e.positives[0].id: 1} for e in asked})
    for stored in (False, True):
        found = dev.values(tiny_encoder, stored=stored)["recall@10"]
        assert found == [0.0, 0.0, 1.0, 1.0]  # tin is even, lead is not


def test_without_qrels_the_answers_tell(tiny_encoder, index):
    dev = DevSearch(index, EXAMPLES[:1], {})
    assert dev.measure == ANSWER
    ranked = index.dense.search(tiny_encoder.encode_queries([EXAMPLES[0].query.text]), 10)[0][0]
    rank = [index.documents[int(row)].id for row in ranked].index("tin") + 1
    assert dev.values(tiny_encoder)[ANSWER] == [pytest.approx(1 / rank)]
    with pytest.raises(DataError, match="neither qrels nor answers"):
        DevSearch(index, [Example(Query("q", "?"))], {})


LOSSES = (
    LossSettings(),
    LossSettings("margin-mse", temperature=1.0),
    LossSettings("kl"),
    LossSettings("kl", in_batch=True),
)


def test_two_processes_learn_what_one_does(tiny_encoder_folder, tmp_path, on_two_processes):
    """Questions of one document fall to both: it counts once, and for each is a positive."""
    folder = str(tiny_encoder_folder)
    expected = learnt_with_all(folder, tmp_path / "one")
    given = f"{folder!r}, Path({str(tmp_path / 'two')!r})"
    found, _ = on_two_processes(f"found = learnt_with_all({given})")
    for name, tensor in expected.items():
        if not name.endswith("key.bias"):  # no vector depends on it: Adam follows rounding errors
            torch.testing.assert_close(found[name], tensor, atol=1e-4, rtol=0)


def learnt_with_all(folder, place):
    """The weights after some steps with each loss."""
    place.mkdir(exist_ok=True)
    return {
        f"{number}.{name}": tensor
        for number, loss in enumerate(LOSSES)
        for name, tensor in learnt_of(folder, loss, place / str(number)).items()
    }


def learnt_of(folder, loss, place):
    """The weights after some steps, by batches of which each document has three questions."""
    place.mkdir(exist_ok=True)
    encoder = BiEncoder.load(folder, device="cpu", precision="fp32")
    thrice = [
        replace(e, query=Query(f"{e.query.id}+{n}", f"{e.query.text} {METALS[n]}"))
        for e in EXAMPLES[::2]
        for n in range(3)
    ]
    teacher = {
        (e.query.id, d.id): float(len(d.text) % 7)
        for e in thrice
        for d in (*e.positives, *e.negatives)
    }
    questions, documents = listed(thrice, None if loss.objective == "contrastive" else teacher)
    run = RetrieverRun(encoder, documents, questions, loss, negatives=1)
    learnt, _ = run.learn(replace(LOOP, learning_rate=1e-3), place)
    texts = [document.contents for document in DOCUMENTS]
    vectors = torch.from_numpy(learnt.encode_documents(texts))
    return learnt.model.state_dict() | {"vectors": vectors}


def test_a_generators_judgements_are_sharpened_and_told_apart_unless_told_otherwise():
    from ragkit.trainers.retriever_settings import RetrieverSettings, loss_of

    def of(**given):
        paths = {name: Path("x") for name in ("output", "examples", "index")}
        return loss_of(RetrieverSettings(**paths, **given), cosine=True)

    lsr, kl = of(objective="lsr"), of(objective="kl")
    assert (lsr.teacher_temperature, kl.teacher_temperature) == (0.03, 1.0)
    assert of(objective="lsr", teacher_temperature=2.0).teacher_temperature == 2.0
    assert lsr.in_batch and not kl.in_batch and of(objective="kl", in_batch=True).in_batch
    assert not of(objective="lsr", in_batch=False).in_batch
    assert not of(objective="lsr", direction="reverse").in_batch
    with pytest.raises(SettingsError, match="forward"):
        of(objective="lsr", direction="reverse", in_batch=True)
