"""How much memory a build may take, and what follows from it."""

from __future__ import annotations

import psutil

from ..errors import SettingsError
from .ann import TRAINING_VECTORS, bytes_a_vector, training_needed
from .ann_settings import AnnSettings

SEGMENT_DOCUMENTS = 100_000
SEGMENT_BYTES = 1 << 27  # of documents.jsonl

# Counting a segment's terms takes 3 times the bytes of a text of common words, and up to 28 times
# those of one in which every word is another.
_TEXT_TIMES = 30
_LEAST_TEXT = 1 << 20
_TRAINING_TIMES = 16  # bytes a component
_BLOCKS = 1 << 24  # what is being added, and other small things


class Memory:
    """The memory that a build may take beside what the process holds when it begins.

    Not counted are the documents' ids, about 200 bytes each, and what encoding takes.

    Args:
        most: the bytes that the process may take in all; None is no limit.

    Raises:
        SettingsError: the process holds more already, or so much that nothing can be built.
    """

    def __init__(self, most: int | None = None) -> None:
        self._most = most
        self.segment_bytes = SEGMENT_BYTES
        self.training_vectors = TRAINING_VECTORS
        if most is None:
            return
        held = int(psutil.Process().memory_info().rss)
        if most - held < _LEAST_TEXT * _TEXT_TIMES:
            least = held + 2 * _LEAST_TEXT * _TEXT_TIMES
            raise SettingsError(
                f"--max-memory {_megabytes(most)}: {_megabytes(held)} are taken before "
                f"anything is read. Give at least {_megabytes(least)}."
            )
        self.segment_bytes = min(SEGMENT_BYTES, (most - held) // _TEXT_TIMES)

    def check_ann(self, settings: AnnSettings, vectors: int, dimension: int) -> None:
        """Refuse an approximate index that would not fit, and train it on fewer vectors if need be.

        Raises:
            SettingsError: it would not fit.
        """
        factory = settings.factory_for(vectors, dimension)
        if self._most is None or not factory:
            return
        # FAISS doubles what it holds when that is full. Before it holds any, the vectors that it is
        # trained on lie there with their residuals and copies that are not yet freed.
        left = self._most - int(psutil.Process().memory_info().rss)  # ids are there by now
        needed = 2 * vectors * bytes_a_vector(factory, dimension)
        trained = min(vectors, training_needed(factory, dimension))
        needed = max(needed, trained * _TRAINING_TIMES * dimension) + _BLOCKS
        if needed > left:
            raise SettingsError(
                f"{factory} over {vectors:,} vectors takes up to {_megabytes(needed)}, and "
                f"--max-memory {_megabytes(self._most)} leaves {_megabytes(left)} for it. "
                "Take --codes int8 or binary, --kind ivfpq or flat, or more memory."
            )
        room = (left - _BLOCKS) // (_TRAINING_TIMES * dimension)
        self.training_vectors = min(TRAINING_VECTORS, room)


def _megabytes(size: int) -> str:
    return f"{-(-size // 1_000_000):,}MB"
