"""Building on a Ray cluster: its workers write segments, the program that asked commits them."""

from __future__ import annotations

import logging
import os
import re
import socket
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from importlib import import_module
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ragkit.errors import (
    DataError,
    IndexStateError,
    MissingExtra,
    ModelError,
    RagkitError,
    SettingsError,
)
from ragkit.models.workers import worker_encoder
from ragkit.stores.analysis import Analyser
from ragkit.stores.segments import write_segment
from ragkit.types import Progress

if TYPE_CHECKING:
    from ragkit.stores.build import Spread
    from ragkit.stores.embeddings import DocumentEncoder

Load = Callable[[], "DocumentEncoder"]
_HOST_AND_PORT = re.compile(r"(?:\w+://)?\[?(?P<host>[^/\[\]]+)\]?:(?P<port>\d+)/?")
_SECONDS = 10  # in which a cluster's head must answer
_ATTEMPTS = 3  # at a segment whose worker is killed
_KINDS = {each.__name__: each for each in (DataError, IndexStateError, ModelError, SettingsError)}


@dataclass(frozen=True, kw_only=True)
class Cluster:
    """What workers are to be, and what they encode by.

    `load` loads the encoder on a worker, and `fingerprint` is what it must tell; without a dense
    store there is none. `gpu` gives each worker a GPU.
    """

    workers: int
    load: Load | None = None
    fingerprint: str = ""
    gpu: bool = False


class SegmentWriter:
    """What a worker runs: it loads its encoder once, and writes one segment after another.

    Args:
        cluster: tells of the encoder.
        analyser: for BM25, if there is that store.
        threads: of the matrix products.
    """

    def __init__(self, cluster: Cluster, analyser: Analyser | None, threads: int) -> None:
        self._cluster, self._analyser, self._threads = cluster, analyser, threads
        self._encoder: DocumentEncoder | None = None

    def __call__(self, row: dict[str, Any]) -> dict[str, Any]:
        """Write the segment that a row names, and return what was refused: a kind and a message."""
        try:
            self._write(Path(row["folder"]), Path(row["vectors"]) if row["vectors"] else None)
        except RagkitError as error:
            return {"kind": type(error).__name__, "refused": str(error)}
        return {"kind": "", "refused": ""}

    def _write(self, folder: Path, vectors: Path | None) -> None:
        if self._cluster.load and self._encoder is None:
            self._encoder = worker_encoder(
                self._cluster.load, self._cluster.fingerprint, self._threads
            )
        if not folder.is_dir():
            raise DataError(
                f"{folder}: a worker does not see it. The index folder must lie where all machines "
                "of the cluster see it under the same path."
            )
        write_segment(folder, vectors, self._analyser, self._encoder)


@contextmanager
def ray_cluster(address: str, cluster: Cluster) -> Iterator[Spread]:
    """Yield what writes segments on a Ray cluster, through Ray Data.

    The index folder must lie where all machines see it under the same path. A worker that is killed
    costs the segment that it was at, and of its vectors only those that were not yet safe.

    Args:
        address: of the cluster, or `local` for one that is started here and ends with the build.
        cluster: what its workers are to be.

    Raises:
        MissingExtra: Ray is not installed.
        SettingsError: there is no such cluster, or it is too small.
    """
    os.environ.setdefault("RAY_DATA_LOG_LEVEL", "ERROR")  # beside our own progress
    try:
        ray = import_module("ray")
        import_module("ray.data")
    except ImportError as error:
        raise MissingExtra("ray", "ray", "building on a Ray cluster") from error
    ours = not ray.is_initialized()
    if ours:
        _begin(ray, address)
    try:
        yield _Spread(ray, cluster, _cores(ray, cluster))
    finally:
        if ours:
            ray.shutdown()


class _Spread:
    def __init__(self, ray: Any, cluster: Cluster, cores: int) -> None:
        self._ray, self._cluster, self._cores = ray, cluster, cores

    def __call__(
        self,
        folders: Sequence[Path],
        vectors: Sequence[Path],
        analyser: Analyser | None,
        progress: Progress,
    ) -> None:
        ray, files = self._ray, [str(file.resolve()) for file in vectors] or [""] * len(folders)
        ray.data.DataContext.get_current().enable_progress_bars = False
        rows = [
            {"folder": str(folder.resolve()), "vectors": file}
            for folder, file in zip(folders, files, strict=True)
        ]
        written = ray.data.from_items(rows, override_num_blocks=len(rows)).map(
            SegmentWriter,
            fn_constructor_args=(self._cluster, analyser, self._cores),
            compute=ray.data.ActorPoolStrategy(size=min(self._cluster.workers, len(rows))),
            num_cpus=self._cores,
            num_gpus=1 if self._cluster.gpu else None,
            max_restarts=_ATTEMPTS,
            max_task_retries=_ATTEMPTS,
        )
        progress("segments", 0, len(rows))
        done = iter(written.iter_rows())
        try:
            for number, row in enumerate(done, 1):
                if row["kind"]:
                    raise _KINDS.get(row["kind"], RagkitError)(row["refused"])
                progress("segments", number, len(rows))
        except ray.exceptions.RayError as error:
            lines = str(error).strip().splitlines() or [type(error).__name__]
            raise RagkitError(f"the workers of the Ray cluster failed: {lines[-1]}") from error
        finally:  # nobody writes any more when the folder is given free
            getattr(done, "close", lambda: None)()


def _begin(ray: Any, address: str) -> None:
    quiet: dict[str, Any] = {"log_to_driver": False, "logging_level": logging.ERROR}
    try:
        if place := _HOST_AND_PORT.fullmatch(address):  # where nobody listens, Ray tries for ever
            socket.create_connection((place["host"], int(place["port"])), _SECONDS).close()
        ray.init(address, **quiet, **({"include_dashboard": False} if address == "local" else {}))
    except (ValueError, OSError, OverflowError, RuntimeError) as error:
        raise SettingsError(
            f"--ray {address}: cannot be reached ({error}). Give the address of a cluster, such as "
            "auto or ray://head:10001, or local."
        ) from error


def _cores(ray: Any, cluster: Cluster) -> int:
    """Return how many cores each worker can have, all of them of one machine.

    Raises:
        SettingsError: there are fewer cores, or GPUs, than workers.
    """
    nodes = [node["Resources"] for node in ray.nodes() if node["Alive"]]
    for kind, wanted in (("CPU", True), ("GPU", cluster.gpu)):
        if wanted and (held := sum(int(node.get(kind, 0)) for node in nodes)) < cluster.workers:
            raise SettingsError(
                f"the Ray cluster has {held} {kind}s, too few for {cluster.workers} --workers"
            )
    sizes = [int(node.get("CPU", 0)) for node in nodes]
    return max(
        cores
        for cores in range(1, max(sizes) + 1)
        if sum(size // cores for size in sizes) >= cluster.workers
    )
