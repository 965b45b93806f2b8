"""How much memory a build may take, and what follows from it."""

from __future__ import annotations

import psutil

from ..errors import SettingsError
from .ann import bytes_a_vector
from .ann_settings import AnnSettings

SEGMENT_DOCUMENTS = 100_000
SEGMENT_BYTES = 1 << 27  # of documents.jsonl
TRAINING_VECTORS = 262_144

# Counting the terms of a segment takes about 4 times the bytes of its text, as does what is read
# and not yet freed; benchmarks/scale.py measures it.
_TEXT_TIMES = 6
_LEAST_TEXT = 1 << 20


class Memory:
    """The memory that a build may take beside what the process holds when it begins.

    Args:
        most: the bytes that the process may take in all; None is no limit.

    Raises:
        SettingsError: the process holds more already, or so much that nothing can be built.
    """

    def __init__(self, most: int | None = None) -> None:
        self._most = most
        self._held = int(psutil.Process().memory_info().rss)
        self.segment_bytes = SEGMENT_BYTES
        self.training_vectors = TRAINING_VECTORS
        if most is None:
            return
        self._left = most - self._held
        if self._left < _LEAST_TEXT * _TEXT_TIMES:
            least = self._held + 64 * _LEAST_TEXT
            raise SettingsError(
                f"--max-memory {_megabytes(most)}: {_megabytes(self._held)} are taken before "
                f"anything is read. Give at least {_megabytes(least)}."
            )
        self.segment_bytes = min(SEGMENT_BYTES, self._left // _TEXT_TIMES)

    def check_ann(self, settings: AnnSettings, vectors: int, dimension: int) -> None:
        """Refuse an approximate index that would not fit, and train it on fewer vectors if need be.

        Raises:
            SettingsError: it would not fit.
        """
        factory = settings.factory_for(vectors, dimension)
        if self._most is None or not factory:
            return
        needed = vectors * bytes_a_vector(factory, dimension)
        if needed > self._left * 3 // 4:
            raise SettingsError(
                f"{factory} over {vectors:,} vectors takes {_megabytes(needed)}, and "
                f"--max-memory {_megabytes(self._most)} leaves {_megabytes(self._left * 3 // 4)} "
                "for it. Take --codes int8 or binary, --kind ivfpq or flat, or more memory."
            )
        # The sample lies there twice while it is put together.
        room = (self._left - needed) // (8 * dimension)
        self.training_vectors = max(1, min(TRAINING_VECTORS, room))


def _megabytes(size: int) -> str:
    return f"{-(-size // 1_000_000):,}MB"
