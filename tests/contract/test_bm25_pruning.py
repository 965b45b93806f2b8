"""Pruning must be invisible: the k best are the first k of all documents' scores."""

import numpy as np
import pytest

from ragkit import Document, Index
from ragkit.stores.analysis import Analyser
from ragkit.stores.bm25 import Bm25Settings

DOCUMENTS = 3000


@pytest.fixture(scope="module")
def store(tmp_path_factory):
    """A store over words drawn by Zipf's law, so that queries mix rare words with common ones."""
    random = np.random.default_rng(7)
    lengths = random.integers(1, 60, DOCUMENTS)
    texts = [" ".join(f"w{n}" for n in random.zipf(1.3, size) % 500) for size in lengths]
    documents = [Document(str(row), text) for row, text in enumerate(texts)]
    path = tmp_path_factory.mktemp("zipf") / "kb"
    return Index.build(path, documents, stores=["bm25"], analyser=Analyser(None, None)).bm25


@pytest.mark.parametrize("variant", ["lucene", "okapi", "l", "plus"])
@pytest.mark.parametrize("k", [1, 10, 300])
@pytest.mark.parametrize("masked", [False, True])
def test_the_best_k_are_those_of_all_scores(store, variant, k, masked):
    store = store.with_settings(Bm25Settings(variant))
    random = np.random.default_rng(k)
    mask = random.random(DOCUMENTS) < 0.2 if masked else None
    queries = [" ".join(f"w{n}" for n in random.zipf(1.2, 6) % 500) for _ in range(40)]
    found_rows, found_scores = store.search(queries, k, mask)
    for query, rows, scores in zip(queries, found_rows, found_scores, strict=True):
        everything = store.scores(query)  # k = all documents: nothing can be pruned
        allowed = everything if mask is None else np.where(mask, everything, -np.inf)
        best = np.lexsort((np.arange(DOCUMENTS), -allowed))[: len(rows)]
        assert rows.tolist() == best.tolist()
        assert scores.tolist() == everything[best].tolist()
