"""BM25 by value: against rank_bm25, and against the formulas."""

import gzip
import itertools
import json
import math
import re
import unicodedata
from collections import Counter
from dataclasses import replace

import numpy as np
import pytest
import rank_bm25
import Stemmer
from hypothesis import given, settings
from hypothesis import strategies as st

import ragkit.stores.analysis
import ragkit.stores.limits
from ragkit.errors import DataError, IndexStateError, SettingsError
from ragkit.retrievers import Bm25Retriever
from ragkit.stores._counting import _slot
from ragkit.stores.analysis import Analyser, Vocabulary
from ragkit.stores.bm25 import Bm25Settings, Bm25Store
from ragkit.stores.index import Index
from ragkit.stores.live import Live
from ragkit.stores.memory import MemoryIndex
from ragkit.stores.postings import write_postings
from ragkit.types import Document, Query

PLAIN = Analyser(None, None)
VARIANTS = ("lucene", "okapi", "l", "plus")
SETTINGS = [Bm25Settings(variant) for variant in VARIANTS] + [
    Bm25Settings("lucene", 0.9, 0.4),
    Bm25Settings("okapi", 1.5, 0.75, epsilon=0.1),
    Bm25Settings("l", 2.0, 0.3, 0.2),
    Bm25Settings("plus", 0.4, 1.0, 0.3),
    Bm25Settings("plus", 0.4, 0.0, 0.0),
]


def build(path, texts, analyser=PLAIN, settings=None):
    documents = [Document(str(row), text) for row, text in enumerate(texts)]
    return Index.build(path, documents, stores=("bm25",), analyser=analyser, bm25=settings)


def store_of(folder, parts, settings, analyser=PLAIN, live=None):
    """A store over segments that are written straight to `folder`."""
    folder.mkdir(parents=True, exist_ok=True)
    folders = [folder / str(place) for place in range(len(parts))]
    for path, texts in zip(folders, parts, strict=True):
        write_postings(path, texts, analyser)
    return Bm25Store(folders, analyser, settings, live=live)


def reference(settings, terms):
    kinds = {"okapi": rank_bm25.BM25Okapi, "l": rank_bm25.BM25L, "plus": rank_bm25.BM25Plus}
    options = {"k1": settings.k1, "b": settings.b}
    if settings.variant == "okapi":
        options["epsilon"] = settings.epsilon
    else:
        options["delta"] = settings.shift
    return kinds[settings.variant](terms, **options)


def brute_force(documents, query, settings):
    """Every document's score, by the formulas of `Bm25Settings`, one term at a time."""
    total, average = len(documents), sum(map(len, documents)) / len(documents) or 1
    frequency = Counter(term for terms in documents for term in set(terms))

    def raw(n):
        return math.log((total - n + 0.5) / (n + 0.5))

    mean = sum(map(raw, frequency.values())) / len(frequency) if frequency else 0

    def idf(n):
        if settings.variant == "lucene":
            return math.log(1 + (total - n + 0.5) / (n + 0.5))
        if settings.variant == "okapi":
            return raw(n) if raw(n) >= 0 else settings.epsilon * mean
        return math.log((total + 1) / (n + (0.5 if settings.variant == "l" else 0)))

    k1, scores = settings.k1, []
    for terms in documents:
        counts, score = Counter(terms), 0.0
        for term in query:
            if term not in frequency:
                continue
            f, norm = counts[term], 1 - settings.b + settings.b * len(terms) / average
            if settings.variant == "lucene":
                part = f / (f + k1 * norm) if f else 0
            elif settings.variant == "l":
                c = f / norm if f else 0
                part = f * (k1 + 1) * (c + settings.shift) / (k1 + c + settings.shift)
            else:
                part = f * (k1 + 1) / (f + k1 * norm) if f else 0
                part += settings.shift if settings.variant == "plus" else 0
            score += idf(frequency[term]) * part
        scores.append(score)
    return np.array(scores)


def ranked(scores, allowed, k):
    rows = [row for row in range(len(scores)) if allowed[row]]
    return sorted(rows, key=lambda row: (-scores[row], row))[:k]


@pytest.fixture(scope="module")
def sample(root):
    lines = (root / "benchmarks/data/corpus.jsonl").read_text(encoding="utf-8").splitlines()
    texts = ["{title}\n{text}".format(**json.loads(line)) for line in lines]
    questions = (root / "benchmarks/data/dev.jsonl").read_text(encoding="utf-8").splitlines()
    record = json.loads(questions[0])
    field = next(name for name in ("question", "query", "text") if name in record)
    return texts, [json.loads(line)[field] for line in questions]


@pytest.fixture(scope="module")
def sample_index(sample, tmp_path_factory):
    return build(tmp_path_factory.mktemp("sample") / "kb", sample[0], Analyser())


# --- against rank_bm25 and the formula


@pytest.mark.parametrize("chosen", [s for s in SETTINGS if s.variant != "lucene"], ids=str)
def test_equals_rank_bm25_for_every_document_of_the_sample_set(sample, sample_index, chosen):
    texts, questions = sample
    analyser = Analyser()
    peer = reference(chosen, [analyser.terms(text) for text in texts])
    store = sample_index.bm25.with_settings(chosen)
    assert len(questions) >= 20
    for question in questions:
        expected = np.asarray(peer.get_scores(analyser.terms(question)), np.float64)
        np.testing.assert_allclose(store.scores(question), expected, rtol=0, atol=1e-6)


def test_lucene_equals_the_formula_in_numpy(sample, sample_index):
    texts, questions = sample
    terms = [sample_index.bm25.analyser.terms(text) for text in texts]
    lengths = np.array([len(each) for each in terms])
    norms = 1.2 * (0.25 + 0.75 * lengths / lengths.mean())
    for question in questions[:40]:
        expected = np.zeros(len(texts))
        for term in sample_index.bm25.analyser.terms(question):
            f = np.array([each.count(term) for each in terms], float)
            n = (f > 0).sum()
            expected += np.log(1 + (len(texts) - n + 0.5) / (n + 0.5)) * f / (f + norms)
        np.testing.assert_allclose(sample_index.bm25.scores(question), expected, atol=1e-9)


@pytest.mark.data
def test_equals_rank_bm25_on_squad(data, tmp_path):
    with gzip.open(data / "squad/corpus.jsonl.gz", "rt", encoding="utf-8") as handle:
        records = [json.loads(line) for line in handle]
    texts = [f"{record.get('title', '')}\n{record['text']}" for record in records]
    with gzip.open(data / "squad/queries.jsonl.gz", "rt", encoding="utf-8") as handle:
        questions = [json.loads(line)["text"] for line in handle][::200][:50]
    assert len(texts) > 3000 and len(questions) == 50
    index, analyser = build(tmp_path / "kb", texts, Analyser()), Analyser()
    terms = [analyser.terms(text) for text in texts]
    for variant in ("okapi", "l", "plus"):
        peer = reference(Bm25Settings(variant), terms)
        store = index.bm25.with_settings(Bm25Settings(variant))
        for question in questions:
            expected = np.asarray(peer.get_scores(analyser.terms(question)), np.float64)
            np.testing.assert_allclose(store.scores(question), expected, rtol=0, atol=1e-6)


WORDS = st.lists(st.sampled_from("abcdefg"), max_size=8)


@settings(deadline=None, max_examples=120)
@given(
    documents=st.lists(WORDS, min_size=1, max_size=9),
    query=WORDS,
    cut=st.integers(0, 8),
    k=st.integers(1, 12),
    chosen=st.sampled_from(SETTINGS),
    seed=st.integers(0, 3),
)
def test_tiny_corpora_equal_brute_force(tmp_path_factory, documents, query, cut, k, chosen, seed):
    texts = [" ".join(words) for words in documents]
    parts = [part for part in (texts[:cut], texts[cut:]) if part]
    store = store_of(tmp_path_factory.mktemp("bm25"), parts, chosen)
    expected = brute_force(documents, query, chosen)
    text = " ".join(query)
    np.testing.assert_allclose(store.scores(text), expected, atol=1e-9)
    mask = np.random.default_rng(seed).random(len(documents)) < 0.6 if seed else None
    rows, scores = store.search([text], k, mask)
    found = np.array([bool(set(words) & set(query)) for words in documents])
    allowed = found if mask is None else found & mask
    assert len(rows[0]) == min(k, allowed.sum())
    assert allowed[rows[0]].all()
    np.testing.assert_allclose(scores[0], expected[rows[0]], atol=1e-9)
    best = expected[ranked(expected, allowed, k)]
    np.testing.assert_allclose(scores[0], best, atol=1e-9)
    # Equal scores stand in row order.
    order = list(zip((-scores[0]).tolist(), rows[0].tolist(), strict=True))
    assert order == sorted(order)


def test_the_negative_okapi_weight_is_epsilon_times_the_mean(tmp_path):
    store = store_of(tmp_path, [["a b", "a c", "a", "d e"]], Bm25Settings("okapi"))
    raw = {n: math.log((4 - n + 0.5) / (n + 0.5)) for n in (1, 3)}
    assert raw[3] < 0
    mean = (raw[3] + 4 * raw[1]) / 5
    assert store.idf("a") == pytest.approx(0.25 * mean)
    assert store.idf("b") == pytest.approx(raw[1])
    # With few rare terms the mean itself, and so the score, is negative; it is a hit all the same.
    store = store_of(tmp_path / "low", [["a b", "a b", "a b c"]], Bm25Settings("okapi"))
    assert store.idf("a") < 0
    rows, scores = store.search(["a"], 5)
    assert sorted(rows[0].tolist()) == [0, 1, 2] and (scores[0] < 0).all()


def test_a_term_of_weight_zero_still_finds_its_documents(tmp_path):
    texts = ["a b", "a c", "d e", "f g"]
    store = store_of(tmp_path, [texts], Bm25Settings("okapi"))
    assert store.idf("a") == 0
    memory = MemoryIndex(
        [Document(text, text) for text in texts], Bm25Settings("okapi"), PLAIN
    ).bm25
    for each in (store, memory):
        rows, scores = each.search(["a"], 4)
        assert rows[0].tolist() == [0, 1] and scores[0].tolist() == [0, 0]


# --- segments, masks, ties, edges


@pytest.mark.parametrize("size", [1, 7, 60])
def test_several_segments_score_and_rank_as_one(sample, sample_index, tmp_path, monkeypatch, size):
    texts, questions = sample
    monkeypatch.setattr(ragkit.stores.limits, "SEGMENT_DOCUMENTS", size)
    index = build(tmp_path / "kb", texts, Analyser())
    assert len(index.manifest["segments"]) == -(-len(texts) // size)
    for chosen in SETTINGS:
        one, many = (each.bm25.with_settings(chosen) for each in (sample_index, index))
        for question in questions[:5]:
            np.testing.assert_allclose(many.scores(question), one.scores(question), atol=1e-12)
        rows, scores = one.search(questions[:30], 10)
        more_rows, more_scores = many.search(questions[:30], 10)
        for query in range(30):
            assert more_rows[query].tolist() == rows[query].tolist()
            np.testing.assert_allclose(more_scores[query], scores[query], atol=1e-12)


@pytest.mark.parametrize("variant", VARIANTS)
def test_a_mask_gives_the_best_of_the_allowed(sample, sample_index, variant):
    _, questions = sample
    store = sample_index.bm25.with_settings(Bm25Settings(variant))
    for share in (0.02, 0.5, 0.98):
        mask = np.random.default_rng(7).random(len(store)) < share
        rows, scores = store.search(questions[:20], 10, mask)
        for question, found, values in zip(questions, rows, scores, strict=False):
            full_rows, full_scores = (each[0] for each in store.search([question], len(store)))
            keep = mask[full_rows]
            assert found.tolist() == full_rows[keep][:10].tolist()
            np.testing.assert_array_equal(values, full_scores[keep][:10])
    nothing = store.search(questions[:1], 5, np.zeros(len(store), bool))
    assert nothing[0][0].tolist() == []


@pytest.fixture(scope="module")
def many():
    """Some blocks of documents, and how often each of 200 terms stands in them."""
    random = np.random.default_rng(3)
    shares = 1 / np.arange(2, 202)
    counts = random.poisson(6 * shares / shares.sum(), (30_000, 200))
    texts = [" ".join(f"t{t}" for t in np.repeat(np.arange(200), row)) for row in counts]
    return texts, counts


@pytest.mark.parametrize(
    "chosen",
    [*map(Bm25Settings, VARIANTS), Bm25Settings("okapi", 1.2, epsilon=-0.3),
     Bm25Settings("okapi", 1.2, b=0.0, epsilon=5e-17)], ids=str,
)  # fmt: skip
@pytest.mark.parametrize("masked", [False, True])
@pytest.mark.parametrize("deleted", [False, True])
def test_the_best_of_many_blocks_are_those_of_all_scores(many, tmp_path, chosen, masked, deleted):
    texts, counts = many
    random = np.random.default_rng(4)
    gone = [np.flatnonzero(random.random(size) < 0.3 * deleted) for size in (11_000, 19_000)]
    live = Live([11_000, 19_000], gone)
    store = store_of(tmp_path, [texts[:11_000], texts[11_000:]], chosen, PLAIN, live)
    kept = np.delete(counts, np.concatenate([gone[0], gone[1] + 11_000]), axis=0)
    mask = random.random(len(store)) < 0.1 if masked else None
    asked = [[150], [0], [3, 190], [0, 1, 2], [5, 60, 120, 180], list(range(0, 200, 5))]
    asked += [random.choice(200, size).tolist() for size in (2, 3, 4, 6, 9, 20, 40) * 3]
    queries = [" ".join(f"t{t}" for t in terms) for terms in asked]
    allowed = np.ones(len(store), np.bool_) if mask is None else mask
    everything = [store.search([query], len(store), mask) for query in queries]
    for query, terms, ((rows,), (scores,)) in zip(queries, asked, everything, strict=True):
        expected = by_formula(kept[:, terms], kept.sum(axis=1), chosen, store, query.split())
        np.testing.assert_allclose(scores, expected[rows], rtol=1e-9, atol=1e-12)
        assert set(rows) == set(np.flatnonzero(kept[:, terms].any(axis=1) & allowed))
        assert rows.tolist() == rows[np.lexsort((rows, -scores))].tolist()
    for k in (1, 10, 100):
        found, best = store.search(queries, k, mask)
        for i, ((rows,), (scores,)) in enumerate(everything):
            assert found[i].tolist() == rows[:k].tolist()
            assert best[i].tolist() == scores[:k].tolist()


def by_formula(counts, lengths, chosen, store, terms):
    norms = chosen.k1 * (1 - chosen.b + chosen.b * lengths / lengths.mean())[:, None]
    if chosen.variant == "l":
        c = counts * chosen.k1 / norms + chosen.shift
        impacts = counts * (chosen.k1 + 1) * c / (chosen.k1 + c)
    else:
        impacts = counts / (counts + norms) * (1 if chosen.variant == "lucene" else chosen.k1 + 1)
        impacts += chosen.shift if chosen.variant == "plus" else 0
    return impacts @ np.array([store.idf(term) for term in terms])


@pytest.mark.parametrize("cut", [0, 30])
def test_ties_stand_in_row_order(tmp_path, cut):
    texts = [t for n in range(25) for t in ("same words", f"other{n}", f"same words t{n}")]
    parts = [part for part in (texts[:cut], texts[cut:]) if part]
    for chosen in SETTINGS:
        store = store_of(tmp_path / chosen.variant / str(hash(chosen)), parts, chosen)
        for k in (1, 5, 24, 40):
            rows, _ = store.search(["same words"], k)
            expected = [*range(0, 75, 3), *range(2, 75, 3)]
            if chosen.b:  # the shorter documents come first
                assert rows[0].tolist() == expected[:k]
            else:
                assert rows[0].tolist() == sorted(expected)[:k]


def test_k_beyond_the_matches_and_k_below_one(tmp_path):
    store = store_of(tmp_path, [["a b", "c"], ["a"]], Bm25Settings())
    rows, scores = store.search(["a", "c", "x"], 1000)
    assert [sorted(row.tolist()) for row in rows] == [[0, 2], [1], []]
    assert [len(score) for score in scores] == [2, 1, 0]
    for k in (0, -1):
        with pytest.raises(SettingsError, match="at least 1"):
            store.search(["a"], k)


@pytest.mark.parametrize("chosen", SETTINGS, ids=str)
def test_queries_without_terms_find_nothing(sample_index, chosen):
    store = sample_index.bm25.with_settings(chosen)
    for text in ("", "  \n", "?!…", "the of and is", "zzzzqqqq"):
        rows, scores = store.search([text], 5)
        assert rows[0].tolist() == [] and scores[0].tolist() == []
        assert not store.scores(text).any()
    assert store.search([], 5) == ([], [])


def test_repeated_query_terms_count_each_time(sample_index):
    for chosen in SETTINGS:
        store = sample_index.bm25.with_settings(chosen)
        once, thrice = store.scores("Jupiter"), store.scores("Jupiter Jupiter jupiter")
        assert once.max() > 0
        np.testing.assert_allclose(thrice, 3 * once, rtol=1e-12)


def test_documents_without_terms(tmp_path):
    for name, texts in (("all", ["", "the of", "!"]), ("some", ["", "moon", ""])):
        for parts in ([texts], [texts[:1], texts[1:]]):
            folder = tmp_path / name / str(len(parts))
            store = store_of(folder, parts, Bm25Settings(), Analyser())
            expected = [1] if name == "some" else []
            assert store.search(["the moon"], 3)[0][0].tolist() == expected


def test_threads_change_nothing(sample, tmp_path):
    texts, questions = sample
    write_postings(tmp_path / "bm25", texts, Analyser())
    queries = (questions * 4)[:150]
    one, two = (
        Bm25Store([tmp_path / "bm25"], Analyser(), Bm25Settings(), threads=threads).search(
            queries, 7
        )
        for threads in (1, 2)
    )
    for query in range(len(queries)):
        np.testing.assert_array_equal(one[0][query], two[0][query])
        np.testing.assert_array_equal(one[1][query], two[1][query])


def test_counts_beyond_16_bits_are_kept(tmp_path):
    store = store_of(tmp_path, [["a " * 70_000, "b"]], Bm25Settings(b=0))
    n_of_one = math.log(1 + 1.5 / 1.5)
    assert store.scores("a").tolist() == pytest.approx([n_of_one * 70_000 / 70_001.2, 0])


def test_with_settings_leaves_the_store_as_it_was(tmp_path):
    parts = [["a b b", "a a c", "b"], ["a a a a c d"]]
    store = store_of(tmp_path, parts, Bm25Settings("okapi", epsilon=0.5))
    before = store.scores("a b c")
    for chosen in SETTINGS:
        fresh = store_of(tmp_path / str(hash(chosen)), parts, chosen)
        other = store.with_settings(chosen)
        np.testing.assert_array_equal(other.scores("a b c"), fresh.scores("a b c"))
        assert other.settings == chosen
    np.testing.assert_array_equal(store.scores("a b c"), before)


@pytest.mark.parametrize(
    "wrong",
    [
        {"variant": "bm42"},
        {"k1": 0},
        {"k1": math.nan},
        {"b": 1.1},
        {"b": -0.1},
        {"delta": -1},
        {"k1": 1e308},
        {"delta": math.inf},
        {"epsilon": math.nan},
    ],
)
def test_settings_out_of_range_are_refused(wrong):
    with pytest.raises(SettingsError, match=re.escape(str(next(iter(wrong.values()))))):
        replace(Bm25Settings(), **wrong)


# --- in memory


@pytest.mark.parametrize("chosen", [None, *(s for s in SETTINGS if s.variant != "lucene")], ids=str)
def test_in_memory_is_rank_bm25_and_agrees_with_the_store(sample, sample_index, chosen):
    texts, questions = sample
    documents = [Document(str(row), text) for row, text in enumerate(texts)]
    retriever = Bm25Retriever.in_memory(documents, chosen)
    chosen = chosen or Bm25Settings("okapi", k1=1.5)
    peer = reference(chosen, [Analyser().terms(text) for text in texts])
    store = Bm25Retriever(sample_index, chosen)
    queries = [Query(str(n), text) for n, text in enumerate(questions[:25])]
    for query, hits, stored in zip(
        queries, retriever.retrieve(queries, 10), store.retrieve(queries, 10), strict=True
    ):
        scores = np.asarray(peer.get_scores(Analyser().terms(query.text)), float)
        for hit, other in zip(hits, stored, strict=True):
            assert hit.score == scores[int(hit.document.id)]
            assert other.score == pytest.approx(hit.score, abs=1e-6)
        assert [hit.document.id for hit in hits] == [hit.document.id for hit in stored]


def test_in_memory_filters_and_refuses():
    documents = [Document(str(n), "moon light", metadata={"n": n}) for n in range(4)]
    retriever = Bm25Retriever.in_memory([*documents, Document("x", "sun"), Document("y", "sea")])
    hits = retriever.retrieve([Query("q", "moon", {"n": {"gte": 2}})], 5)
    assert [hit.document.id for hit in hits[0]] == ["2", "3"]
    with pytest.raises(SettingsError, match="at least 1"):
        retriever.retrieve([Query("q", "moon")], 0)
    with pytest.raises(SettingsError, match="lucene"):
        Bm25Retriever.in_memory(documents, Bm25Settings("lucene"))
    for nothing in ([], [Document("a", "the")]):
        with pytest.raises(DataError):
            Bm25Retriever.in_memory(nothing)


# --- the analyser

TEXTS = st.lists(
    st.one_of(
        st.text(max_size=60),
        st.text(
            alphabet="aeinrst' -THE\u00e9\u00df\u0130\ufb01\u6708\u3042\u30ab\uff21\u0301",
            max_size=60,
        ),
        st.sampled_from(
            ["the running moons", "Les étoiles du ciel", "月の光 moonlight", "naïve CAFÉ"]
        ),
    ),
    max_size=6,
)


@settings(deadline=None, max_examples=200)
@given(TEXTS, st.sampled_from(["english", "german", "french", "russian", "none"]))
def test_the_vocabulary_numbers_what_the_analyser_reads(texts, language):
    analyser = Analyser.of_language(language)
    vocabulary = Vocabulary(analyser)
    numbers, lengths = vocabulary.number(texts)
    names = [vocabulary.terms[number] for number in numbers]
    expected = [analyser.terms(text) for text in texts]
    assert names == [term for terms in expected for term in terms]
    assert lengths.tolist() == [len(terms) for terms in expected]
    assert len(set(vocabulary.terms)) == len(vocabulary.terms)


@pytest.mark.parametrize("block", [1, 1 << 20])
def test_the_vocabulary_grows(monkeypatch, block):
    monkeypatch.setattr(ragkit.stores.analysis, "_BLOCK", block)
    names = [f"w{number % 9_000}" for number in range(27_000)]
    vocabulary = Vocabulary(PLAIN)
    numbers, lengths = vocabulary.number([" ".join(names[:20_000]), "", "-", *names[20_000:]])
    assert vocabulary.terms == names[:9_000]
    assert numbers.tolist() == [number % 9_000 for number in range(27_000)]
    assert lengths.tolist() == [20_000, 0, 0] + [1] * 7_000


def test_words_cannot_be_chosen_to_share_a_place():
    """Words of these halves share a polynomial hash modulo 2⁶⁴, whatever its key."""
    half = "".join("ab"[number.bit_count() % 2] for number in range(2048))
    halves = [half, half.translate(str.maketrans("ab", "ba"))]
    slots, none = np.full(1 << 20, -1, np.int32), np.empty(0, np.int64)
    words = ["".join(parts).encode() for parts in itertools.product(halves, repeat=5)]
    places = {
        _slot(
            np.uint64(123_456_789), np.frombuffer(word, np.uint8), 0, len(word), slots, none, none
        )
        for word in words
    }
    assert len(places) == len(words) == 32


def test_terms_by_hand():
    assert Analyser().terms("The Moons are running, in 1610!") == ["moon", "run", "1610"]
    assert PLAIN.terms("The Moons—ＦＵＬＬ width") == ["the", "moons", "full", "width"]
    assert PLAIN.terms("月の光 shines") == ["月", "の", "光", "shines"]
    assert PLAIN.terms("snake_case e\u0301tude") == ["snake_case", "étude"]
    german = Analyser.of_language("German")
    assert german.terms("Die Katzen und Hunde") == german.terms("Katze Hund")
    french = Analyser.of_language("french")
    assert french.terms("le chat et les chats") == ["chat", "chat"]


@pytest.mark.parametrize(
    ("text", "terms"),
    [
        ("हिन्दी में समाचार", ["हिन्दी", "में", "समाचार"]),
        ("كَتَبَ الوَلَدُ", ["كَتَبَ", "الوَلَدُ"]),
        ("שָׁלוֹם ภาษาไทย தமிழ்நாடு", ["שָׁלוֹם", "ภาษาไทย", "தமிழ்நாடு"]),
        ("ශ්\u200dරී ලංකා, ಕನ್\u200cಫ್ಯೂಶನ್!", ["ශ්\u200dරී", "ලංකා", "ಕನ್\u200cಫ್ಯೂಶನ್"]),
        ("q\u0301q \u0301 ė̃", ["q\u0301q", "ė̃"]),
        ("\U00011103\U00011127\U0001112b\U00011103", ["\U00011103\U00011127\U0001112b\U00011103"]),
        # as before: a joiner after a letter, a variation selector, marks of Japanese characters
        ("می\u200cخواهم 1\ufe0f\u20e3 が ヷ", ["می", "خواهم", "1", "が", "ヷ"]),
    ],
)
def test_combining_marks_continue_a_word(text, terms):
    assert PLAIN.terms(text) == terms


@settings(deadline=None, max_examples=300)
@given(st.text(st.characters(exclude_categories=["Mn", "Mc"]), max_size=80))
def test_text_without_marks_is_cut_as_python_cuts_words(text):
    text = unicodedata.normalize("NFKC", text).lower()
    unspaced = "\u3040-\u30ff\u3400-\u4dbf\u4e00-\u9fff\uf900-\ufaff"
    if not any(unicodedata.category(each) in ("Mn", "Mc") for each in text):
        assert PLAIN.terms(text) == re.findall(rf"[{unspaced}]|[^\W{unspaced}]+", text)


def test_the_language_of_sentences():
    codes = {"german": "de", "english": "en", "porter": "en", "none": "en", "Tamil": "ta"}
    assert {name: Analyser.of_language(name).code for name in codes} == codes
    assert Analyser(None, "hebrew").code == "he" and Analyser("dutch_porter", None).code == "nl"
    known = {Analyser.of_language(name).code for name in Stemmer.algorithms()}
    assert len(known) == len(Stemmer.algorithms()) - 2  # porter and dutch_porter have siblings


def test_languages_come_and_go_as_json():
    assert Analyser.of_language("english") == Analyser("english", "lucene")
    assert Analyser.of_language("none") == Analyser(None, None)
    assert Analyser.of_language("porter") == Analyser("porter", None)
    for language in ("german", "english", "none", "porter"):
        analyser = Analyser.of_language(language)
        assert Analyser.from_json(json.loads(json.dumps(analyser.to_json()))) == analyser


@pytest.mark.parametrize(
    "make",
    [
        lambda: Analyser.of_language("klingon"),
        lambda: Analyser("klingon", None),
        lambda: Analyser(None, "klingon"),
    ],
)
def test_an_unknown_language_is_refused(make):
    with pytest.raises(SettingsError, match=r"unknown .*'klingon'; known are .*german"):
        make()


def test_the_index_searches_with_the_analyser_it_was_built_with(tmp_path):
    build(tmp_path / "kb", ["die Katzen", "der Hund"], Analyser.of_language("german"))
    index = Index.open(tmp_path / "kb")
    assert index.bm25.analyser == Analyser.of_language("german")
    assert index.bm25.search(["Katze"], 2)[0][0].tolist() == [0]


@pytest.mark.parametrize("row", [-1, 3, 2**31 - 1, 0, 1])  # of "lead", in rows 1 and 2
@pytest.mark.parametrize("deleted", [(), (0,)])
def test_postings_of_no_document_or_out_of_order_are_refused(tmp_path, row, deleted):
    """Compiled loops check no bounds of their own."""
    write_postings(tmp_path / "bm25", ["tin", "tin lead", "lead"], Analyser())
    file = tmp_path / "bm25" / "rows.npy"
    rows = np.load(file)
    rows[-1] = row
    np.save(file, rows)
    live = Live([3], [np.array(deleted, np.int64)])
    with pytest.raises(IndexStateError, match="do not fit"):
        Bm25Store([tmp_path / "bm25"], Analyser(), live=live).search(["tin lead"], 2)


def test_postings_of_more_documents_than_the_index_has_are_refused(tmp_path):
    write_postings(tmp_path / "bm25", ["tin", "tin lead", "lead"], Analyser())
    with pytest.raises(IndexStateError, match="do not fit"):
        Bm25Store([tmp_path / "bm25"], Analyser(), live=Live([2]))


def test_where_all_documents_are_deleted_there_are_no_hits(tmp_path):
    live = Live([3], [np.arange(3)])
    store = store_of(tmp_path, [["tin", "tin lead", "lead"]], Bm25Settings(), live=live)
    rows, scores = store.search(["tin", "lead", ""], 2)
    assert [len(each) for each in (*rows, *scores)] == [0] * 6
    assert store.scores("tin").tolist() == []


def test_a_mask_of_other_documents_is_refused(tmp_path):
    store = store_of(tmp_path, [["tin", "tin lead", "lead"]], Bm25Settings())
    with pytest.raises(SettingsError, match="a mask of 2 documents, of which there are 3"):
        store.search(["tin"], 2, np.ones(2, np.bool_))


@pytest.mark.parametrize("variant", VARIANTS)
@pytest.mark.parametrize("name", ["counts", "lengths"])
def test_frequencies_and_lengths_that_cannot_be_are_refused(tmp_path, name, variant):
    write_postings(tmp_path / "bm25", ["tin", "tin lead", "lead"], Analyser())
    file = tmp_path / "bm25" / f"{name}.npy"
    np.save(file, np.zeros_like(np.load(file)))
    with pytest.raises(IndexStateError, match="do not fit"):
        Bm25Store([tmp_path / "bm25"], Analyser(), Bm25Settings(variant, b=1.0)).search(["tin"], 2)


@pytest.mark.parametrize("name", ["indptr", "rows", "counts", "lengths"])
def test_postings_of_another_kind_are_refused(tmp_path, name):
    write_postings(tmp_path / "bm25", ["tin", "tin lead", "lead"], Analyser())
    file = tmp_path / "bm25" / f"{name}.npy"
    np.save(file, np.load(file).astype(np.float32))
    with pytest.raises(IndexStateError, match="do not fit"):
        Bm25Store([tmp_path / "bm25"], Analyser())
