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
from typing import Any, Protocol, TypeVar

import numpy as np
import torch
from numpy.typing import NDArray

from ..errors import ModelError, RagkitError
from .bi_encoder import BiEncoder


class Described(Protocol):
    """What tells of itself, as encoders do."""

    def describe(self) -> Mapping[str, Any]:
        """Return name, settings and `fingerprint`."""
        ...


Encoder = TypeVar("Encoder", bound=Described)

_loaded: list[BiEncoder | str] = []  # a worker's own encoder, or why there is none


class ParallelEncoder:
    """Encodes documents in processes, in the batches in which the encoder would read them alone.

    `parallel` makes one.
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
            ModelError: a worker was killed, or could not load this encoder.
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
                "a process that encodes was killed (memory may have run out: take fewer "
                "--workers), or could not begin (a script that asks for some needs "
                '`if __name__ == "__main__":`). What was encoded before is kept.'
            ) from error
        return out


@contextmanager
def parallel(encoder: BiEncoder, workers: int) -> Iterator[BiEncoder | ParallelEncoder]:
    """Yield an encoder whose documents are encoded by so many processes; one is this one.

    On the CPU they share its cores; on a machine with several GPUs each takes the next one. They
    begin by reading the script that calls this: it does so below `if __name__ == "__main__":`.

    Args:
        encoder: as it is loaded by its name; a worker that finds another one there refuses.
        workers: how many; fewer than 2 are none.
    """
    if workers < 2:
        yield encoder
        return
    context = multiprocessing.get_context("spawn")
    devices: Any = context.SimpleQueue()
    device, gpus = encoder.model.device, max(1, torch.cuda.device_count())
    for worker in range(workers):
        several = device.type == "cuda" and not device.index
        devices.put(f"cuda:{worker % gpus}" if several else str(device))
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
            encoder.describe()["fingerprint"],
        ),
    )
    try:
        yield ParallelEncoder(encoder, pool)
    finally:
        pool.shutdown(cancel_futures=True)


def _begin(
    devices: Any,
    threads: int,
    name: str,
    max_length: int,
    query_prompt: str,
    document_prompt: str,
    fingerprint: str,
) -> None:
    """Load a worker's encoder, or keep why it cannot be loaded."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # the process that asked for it ends it
    Thread(target=_follow, daemon=True).start()

    def load() -> BiEncoder:
        return BiEncoder.load(
            name,
            device=devices.get(),
            max_length=max_length,
            query_prompt=query_prompt,
            document_prompt=document_prompt,
        )

    try:
        _loaded.append(worker_encoder(load, fingerprint, threads))
    except RagkitError as error:
        _loaded.append(str(error))


def worker_encoder(load: Callable[[], Encoder], fingerprint: str, threads: int) -> Encoder:
    """Load a worker's encoder, and refuse one that is not the one whose vectors are wanted.

    Args:
        load: loads it.
        fingerprint: what the wanted one tells.
        threads: of the process's matrix products.

    Raises:
        ModelError: it is another.
    """
    torch.set_num_threads(threads)
    encoder = load()
    told = encoder.describe()
    if told["fingerprint"] != fingerprint:
        raise ModelError(
            f"the encoder {told['name']!r} that a worker loads is not the one that the index is "
            "built with: its weights or settings differ. Give a folder that is the same everywhere."
        )
    return encoder


def _follow() -> None:
    """End with the process that asked for this one, even if that was killed."""
    if parent := multiprocessing.parent_process():
        parent.join()
        os._exit(1)


def _encode(texts: list[str], half: bool) -> NDArray[np.float32]:
    if isinstance(encoder := _loaded[0], str):
        raise ModelError(encoder)
    return encoder.encode_batch(texts, half)
