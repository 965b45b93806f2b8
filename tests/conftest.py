import hashlib
import importlib.util
import os
from pathlib import Path

import numpy as np
import pytest

ROOT = Path(__file__).parents[1]
DATA = Path(os.environ.get("RAGKIT_DATA", ROOT / ".." / "shared" / "data"))


def pytest_addoption(parser):
    parser.addoption("--slow", action="store_true", help="run the tests that take minutes")


def _has_gpu():
    if importlib.util.find_spec("torch") is None:
        return False
    import torch

    return torch.cuda.is_available()


def pytest_collection_modifyitems(config, items):
    def skip(marker, reason):
        for item in items:
            if marker in item.keywords:
                item.add_marker(pytest.mark.skip(reason=reason))

    if not config.getoption("--slow"):
        skip("slow", "takes minutes: run with --slow")
    if not DATA.is_dir():
        skip("data", "no shared data: set RAGKIT_DATA to its folder")
    if any("gpu" in item.keywords for item in items) and not _has_gpu():
        skip("gpu", "needs a GPU")


@pytest.fixture(scope="session", autouse=True)
def any_processor():
    """Let `auto` be fp32 on every processor: values are compared more closely than bf16 allows."""
    import torch

    with pytest.MonkeyPatch.context() as patch:
        for name in ("_is_avx512_bf16_supported", "_is_amx_tile_supported"):
            patch.setattr(torch.cpu, name, lambda: False)
        yield


@pytest.fixture(scope="session")
def root():
    """The project's folder."""
    return ROOT


@pytest.fixture(scope="session")
def data():
    """The folder of the shared benchmark data; for tests marked `data`."""
    return DATA


class HashEncoder:
    """A deterministic encoder: every text has the unit vector that its hash seeds."""

    def __init__(self, dimension=16, *, name="hash", break_at=None, bad=None):
        self.dimension = dimension
        self.name = name
        self._break_at = break_at  # after so many documents, raise what `bad` is
        self._bad = bad

    def _vector(self, text):
        digest = hashlib.sha256(text.encode()).digest()
        vector = np.random.default_rng(int.from_bytes(digest[:8], "little")).standard_normal(
            self.dimension
        )
        return vector / np.linalg.norm(vector)

    def encode_documents(self, texts, *, progress=lambda done: None):
        if self._break_at is not None and len(texts) > self._break_at:
            raise self._bad
        out = self.encode_queries(texts)
        progress(len(texts))
        return out

    def encode_queries(self, texts):
        vectors = [self._vector(text) for text in texts]
        return np.array(vectors, np.float32).reshape(len(texts), self.dimension)

    def describe(self):
        return {
            "name": self.name,
            "dimension": self.dimension,
            "fingerprint": f"{self.name}-{self.dimension}",
        }


class TableEncoder(HashEncoder):
    """An encoder whose texts' vectors are given; texts outside the table get hashed ones."""

    def __init__(self, table, dimension, **options):
        super().__init__(dimension, **options)
        self._table = table

    def _vector(self, text):
        return self._table[text] if text in self._table else super()._vector(text)


@pytest.fixture(scope="session")
def hash_encoder():
    """The class `HashEncoder`."""
    return HashEncoder


@pytest.fixture(scope="session")
def table_encoder():
    """The class `TableEncoder`."""
    return TableEncoder
