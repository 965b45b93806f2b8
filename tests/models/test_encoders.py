"""Encoders and cross-encoders, against plain sentence-transformers."""

from __future__ import annotations

import re
import unicodedata

import numpy as np
import pytest
import sentence_transformers
import torch
from transformers import BertConfig, BertForSequenceClassification

from ragkit.errors import ModelError
from ragkit.models import BiEncoder, CrossEncoder, cross_encoder
from ragkit.models.cross_encoder import KeptScores
from ragkit.rerankers import GeneratorReranker
from ragkit.types import Document, Hit, Query

TEXTS = [
    "Tin melts.",
    "Gallium melts in the hand. " * 9,
    "",
    "Brie.",
    "Käse 東京 🙂",
    "lead " * 300,
]


@pytest.fixture(scope="session")
def expected(encoder):
    """The texts' vectors, one text at a time."""
    return np.stack([encoder.model.encode(text, normalize_embeddings=True) for text in TEXTS])


def test_vectors_and_their_order(encoder, expected):
    done = []
    small = BiEncoder(encoder.model, precision="fp32", batch_tokens=64)
    found = small.encode_documents(TEXTS, progress=done.append)
    np.testing.assert_allclose(found, expected, atol=1e-5)
    np.testing.assert_allclose(encoder.encode_queries(TEXTS), expected, atol=1e-5)
    assert found.dtype == np.float32
    assert done == sorted(set(done))
    assert done[-1] == len(TEXTS)


def test_a_document_of_the_window_is_read_whole_and_a_longer_one_is_not(encoder):
    for prompt, window in (("", 254), ("a passage: ", 251)):
        given = BiEncoder(encoder.model, document_prompt=prompt, precision="fp32")
        assert (given.max_length, given.document_window) == (256, window)
        found = given.encode_documents(["tin " * n for n in (window - 1, window, window + 1)])
        assert np.abs(found[0] - found[1]).max() > 1e-5
        np.testing.assert_allclose(found[1], found[2], atol=1e-6)


def test_no_texts_no_vectors(encoder):
    for encode in (encoder.encode_documents, encoder.encode_queries):
        assert encode([]).shape == (0, encoder.dimension) == (0, 384)


def test_prompts_stand_before_texts(encoder):
    given = BiEncoder(
        encoder.model, query_prompt="query: ", document_prompt="text: ", precision="fp32"
    )
    for found, text in (
        (given.encode_queries(["tin"]), "query: tin"),
        (given.encode_documents(["tin"]), "text: tin"),
    ):
        np.testing.assert_allclose(found, encoder.encode_queries([text]), atol=1e-5)


def test_a_models_own_prompts_are_used_unless_others_are_given(encoder):
    own = {"query": "ask: ", "passage": "say: "}
    model = sentence_transformers.SentenceTransformer(modules=list(encoder.model), prompts=own)
    prompted = BiEncoder(model, precision="fp32")
    assert (prompted.query_prompt, prompted.document_prompt) == ("ask: ", "say: ")
    plain = encoder.encode_queries(["ask: tin", "say: tin", "tin"])
    np.testing.assert_allclose(prompted.encode_queries(["tin"]), plain[:1], atol=1e-5)
    np.testing.assert_allclose(prompted.encode_documents(["tin"]), plain[1:2], atol=1e-5)
    bare = BiEncoder(model, query_prompt="", document_prompt="", precision="fp32")
    np.testing.assert_allclose(bare.encode_queries(["tin"]), plain[2:], atol=1e-5)
    np.testing.assert_allclose(bare.encode_documents(["tin"]), plain[2:], atol=1e-5)


def test_text_beyond_the_maximal_length_is_not_seen(encoder):
    short = BiEncoder.load("all-MiniLM-L6-v2", max_length=5, precision="fp32", device="cpu")
    assert short.max_length == 5  # [CLS] and [SEP] take two
    found = short.encode_documents(["tin iron lead gold", "tin iron lead"])
    np.testing.assert_allclose(found[0], found[1], atol=1e-6)
    whole = encoder.encode_documents(["tin iron lead"])
    np.testing.assert_allclose(found[:1], whole, atol=1e-5)


def test_equal_fingerprints_mean_equal_vectors(encoder):
    def print_of(model=encoder.model, name="m", **options):
        return BiEncoder(model, name, **options).describe()["fingerprint"]

    base = print_of()
    assert print_of(name="another name", precision="fp32", batch_tokens=99) == base
    short = BiEncoder.load("all-MiniLM-L6-v2", max_length=5, device="cpu")
    dotted = sentence_transformers.SentenceTransformer(
        modules=list(encoder.model)[:2], similarity_fn_name="dot"
    )
    others = {
        print_of(query_prompt="q: "),
        print_of(document_prompt="q: "),
        short.describe()["fingerprint"],
        print_of(dotted),
    }
    assert len(others | {base}) == 5
    assert encoder.describe()["name"] == "all-MiniLM-L6-v2"


def test_inner_product_models_are_not_normalised(encoder):
    model = sentence_transformers.SentenceTransformer(
        modules=list(encoder.model)[:2], similarity_fn_name="dot"
    )
    found = BiEncoder(model, precision="fp32").encode_documents(TEXTS)
    np.testing.assert_allclose(found, model.encode(TEXTS), atol=1e-4)
    assert not np.allclose(np.linalg.norm(found, axis=1), 1, atol=0.1)


def test_other_similarities_are_refused(encoder):
    model = sentence_transformers.SentenceTransformer(
        modules=list(encoder.model), similarity_fn_name="euclidean"
    )
    with pytest.raises(ModelError, match="by euclidean"):
        BiEncoder(model, "odd")


@pytest.mark.parametrize("agreement", [0.9995, 1.1])
def test_bf16_is_used_where_its_vectors_agree(encoder, monkeypatch, agreement):
    monkeypatch.setattr("ragkit.models.bi_encoder.has_bf16", lambda device: True)
    monkeypatch.setattr("ragkit.models.bi_encoder.AGREEMENT", agreement)
    texts = [f"Metal number {i} melts at {i * i} degrees." for i in range(64)]
    exact = encoder.encode_documents(texts)
    auto = BiEncoder(encoder.model, precision="auto")
    few = auto.encode_documents(texts[:8])  # too few for a trial
    np.testing.assert_allclose(few, exact[:8], atol=1e-5)
    found = auto.encode_documents(texts)
    cosines = (found * exact).sum(axis=1)
    assert cosines.min() >= 0.9995
    assert np.allclose(found, exact, atol=1e-6) == (agreement > 1)


def test_without_bf16_in_hardware_auto_is_fp32(encoder, monkeypatch):
    monkeypatch.setattr("ragkit.models.bi_encoder.has_bf16", lambda device: False)
    texts = ["tin", "lead"] * 40
    found = BiEncoder(encoder.model, precision="auto").encode_documents(texts)
    np.testing.assert_allclose(found, encoder.encode_documents(texts), atol=1e-6)


def test_spans_are_the_tokens_places(encoder):
    text = "  Naïve Ünïcödé melts — 東京, 2½ km.\n\tEnd"
    tokens = encoder.model.tokenizer.tokenize(text)
    spans = encoder.spans(text)
    assert len(spans) == len(tokens)
    for (start, end), token in zip(spans, tokens, strict=True):
        plain = unicodedata.normalize("NFD", text[start:end].lower())
        assert "".join(c for c in plain if not unicodedata.combining(c)) == token.removeprefix("##")
    assert encoder.spans("") == []
    assert len(encoder.spans("tin " * 600)) == 600  # not cut to the model's length


@pytest.fixture(scope="session")
def folders(encoder, tmp_path_factory):
    """Folders of tiny cross-encoders with random weights, by number of scores."""
    found = {}
    for scores in (1, 2):
        folder = tmp_path_factory.mktemp(f"cross-{scores}")
        torch.manual_seed(scores)
        config = BertConfig(
            vocab_size=30522, hidden_size=32, num_hidden_layers=2, num_attention_heads=2,
            intermediate_size=64, num_labels=scores, initializer_range=0.5,
        )  # fmt: skip
        BertForSequenceClassification(config).save_pretrained(folder)
        encoder.model.tokenizer.save_pretrained(folder)
        found[scores] = str(folder)
    return found


def test_cross_encoder_scores_and_their_order(folders):
    pairs = [(query, text) for text in TEXTS for query in ("tin", "Which metal melts?")]
    plain = sentence_transformers.CrossEncoder(folders[1], device="cpu")
    raw = torch.nn.Identity()
    expected = np.array([plain.predict([pair], activation_fn=raw)[0] for pair in pairs])
    assert np.ptp(expected) > 0.01
    model = CrossEncoder.load(folders[1], precision="fp32", device="cpu")
    np.testing.assert_allclose(model.score(pairs), expected, atol=1e-5)
    small = CrossEncoder(model.model, precision="fp32", batch_tokens=40)
    np.testing.assert_allclose(small.score(pairs), expected, atol=1e-5)
    half = CrossEncoder(model.model, precision="bf16").score(pairs)
    assert half.dtype == np.float32
    np.testing.assert_allclose(half, expected, atol=0.2)
    assert model.score([]).shape == (0,)


def test_scores_are_kept_as_they_are_made(folders, tmp_path, monkeypatch):
    model = CrossEncoder.load(folders[1], precision="fp32", device="cpu")
    pairs = [("tin", text) for text in TEXTS]
    expected = model.score(pairs)
    monkeypatch.setattr(cross_encoder, "_SLICE", 2)
    asked, score = [], CrossEncoder.score

    def stopping(self, some):
        asked.extend(some)
        if len(asked) > 4:
            raise KeyboardInterrupt
        return score(self, some)

    with monkeypatch.context() as patch:
        patch.setattr(CrossEncoder, "score", stopping)
        with pytest.raises(KeyboardInterrupt):
            KeptScores(model, tmp_path).score(pairs)
    assert asked == pairs
    asked.clear()
    with monkeypatch.context() as patch:
        patch.setattr(CrossEncoder, "score", stopping)
        done = []
        # In another order, and one of them twice: the two that were not kept are scored, once.
        found = KeptScores(model, tmp_path).score([*pairs[::-1], pairs[5]], progress=done.append)
    np.testing.assert_allclose(found, [*expected[::-1], expected[5]], atol=1e-5)
    assert asked == pairs[:3:-1] and done == [5, 7]
    with torch.no_grad():
        list(model.model.parameters())[-1].add_(1.0)
    other = CrossEncoder(model.model, precision="fp32")
    assert other.fingerprint != model.fingerprint
    found = KeptScores(other, tmp_path).score(pairs)
    assert np.abs(found - expected).min() > 1e-3
    np.testing.assert_allclose(found, other.score(pairs), atol=1e-5)
    assert CrossEncoder(model.model, precision="bf16").fingerprint != other.fingerprint


def test_a_cross_encoder_of_two_scores_is_refused(folders):
    with pytest.raises(ModelError, match="gives 2 scores"):
        CrossEncoder.load(folders[2], device="cpu")


@pytest.mark.parametrize("part", [BiEncoder, CrossEncoder])
def test_damaged_and_empty_folders_are_named(part, folders, tmp_path):
    with pytest.raises(ModelError, match=re.escape(str(tmp_path))):
        part.load(str(tmp_path), device="cpu")
    config = BertConfig.from_pretrained(folders[1])
    config.save_pretrained(tmp_path)
    sentence_transformers.CrossEncoder(folders[1]).tokenizer.save_pretrained(tmp_path)
    (tmp_path / "model.safetensors").write_bytes(b"no weights" * 9)
    with pytest.raises(ModelError, match=re.escape(str(tmp_path))):
        part.load(str(tmp_path), device="cpu")


def test_the_judges_scores_are_log_odds_of_yes(generator):
    texts = ["Tin melts at 232 degrees.", "Brie is a soft cheese."]
    queries = [Query("1", "At how many degrees does tin melt?"), Query("2", "What is brie?")]
    hits = [[Hit(Document(str(i), text), 0.0) for i, text in enumerate(texts)] for _ in queries]
    hits[1] = hits[1][:1]
    found = GeneratorReranker(generator).rerank(queries, hits, 5)
    assert [sorted(hit.document.id for hit in each) for each in found] == [["0", "1"], ["0"]]
    scores = [hit.score for each in found for hit in each]
    assert np.isfinite(scores).all()
    assert found[0][0].score > found[0][1].score
    top = GeneratorReranker(generator).rerank(queries[:1], hits[:1], 1)[0]
    assert top[0].document == found[0][0].document
    assert top[0].score == pytest.approx(found[0][0].score, abs=1e-3)
