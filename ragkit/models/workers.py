"""Encoding in several processes: on a processor's cores, or on a machine's GPUs."""

from __future__ import annotations

import multiprocessing
import os
import signal
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import ProcessPoolExecutor, as_completed
from concurrent.futures.process import BrokenProcessPool
from contextlib import contextmanager
from threading import Thread
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from ..errors import ModelError, SettingsError
from .bi_encoder import BiEncoder

_loaded: list[BiEncoder] = []  # a worker's own


class ParallelEncoder:
    """Encodes documents in processes, in the batches in which the encoder would read them alone.

    `encoding` makes one.
    """

    def __init__(self, encoder: BiEncoder, pool: ProcessPoolExecutor) -> None:
        self._encoder, self._pool = encoder, pool
        self.dimension = encoder.dimension

    def describe(self) -> Mapping[str, Any]:
        """Return what the encoder tells of itself."""
        return self._encoder.describe()

    def encode_documents(
        self, texts: Sequence[str], *, progress: Callable[[int], None] = lambda done: None
    ) -> NDArray[np.float32]:
        """Return the documents' vectors, float32 of shape [texts, dimension].

        Raises:
            ModelError: a worker was killed, or could not load the encoder.
        """
        batches, half = self._encoder.document_batches(texts)
        out, done = np.empty((len(texts), self.dimension), np.float32), 0
        try:
            running = {
                self._pool.submit(_encode, [texts[row] for row in batch], half): batch
                for batch in batches
            }
            for finished in as_completed(running):
                batch = running[finished]
                out[batch] = finished.result()
                done += len(batch)
                progress(done)
        except BrokenProcessPool as error:
            raise ModelError(
                "a process that encodes was killed, or could not begin: memory may have run out. "
                "Take fewer --workers; what was encoded before is kept."
            ) from error
        return out


@contextmanager
def encoding(encoder: BiEncoder, workers: int) -> Iterator[BiEncoder | ParallelEncoder]:
    """Yield an encoder whose documents are encoded by so many processes; one is this one.

    On the CPU they share its cores; on a machine with several GPUs each takes the next one.

    Args:
        encoder: loaded by a name that the workers can load it by.
        workers: how many, at least 1.

    Raises:
        SettingsError: `workers` is below 1.
    """
    if workers < 1:
        raise SettingsError(f"at least 1 worker is needed, not {workers}")
    if workers == 1:
        yield encoder
        return
    context = multiprocessing.get_context("spawn")
    devices: Any = context.SimpleQueue()
    kind, gpus = encoder.model.device.type, max(1, torch.cuda.device_count())
    for worker in range(workers):
        devices.put(f"cuda:{worker % gpus}" if kind == "cuda" else kind)
    pool = ProcessPoolExecutor(
        workers,
        context,
        _begin,
        (
            devices,
            max(1, torch.get_num_threads() // workers),
            encoder.name,
            encoder.max_length,
            encoder.query_prompt,
            encoder.document_prompt,
        ),
    )
    try:
        yield ParallelEncoder(encoder, pool)
    finally:
        pool.shutdown(cancel_futures=True)


def _begin(
    devices: Any, threads: int, name: str, max_length: int, query_prompt: str, document_prompt: str
) -> None:
    """Load a worker's encoder."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # the process that asked for it ends it
    Thread(target=_follow, daemon=True).start()
    torch.set_num_threads(threads)
    encoder = BiEncoder.load(
        name,
        device=devices.get(),
        max_length=max_length,
        query_prompt=query_prompt,
        document_prompt=document_prompt,
    )
    _loaded.append(encoder)


def _follow() -> None:
    """End with the process that asked for this one, even if that was killed."""
    if parent := multiprocessing.parent_process():
        parent.join()
        os._exit(1)


def _encode(texts: list[str], half: bool) -> NDArray[np.float32]:
    return _loaded[0].encode_batch(texts, half)
