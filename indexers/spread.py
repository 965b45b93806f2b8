"""Building on a Ray cluster: its workers write segments, the program that asked commits them."""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
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
from ragkit.stores.analysis import Analyser
from ragkit.stores.segments import write_segment
from ragkit.types import Progress

if TYPE_CHECKING:
    from ragkit.stores.build import Spread
    from ragkit.stores.embeddings import DocumentEncoder

Load = Callable[[], "DocumentEncoder"]
_KINDS = {each.__name__: each for each in (DataError, IndexStateError, ModelError, SettingsError)}


class SegmentWriter:
    """What a worker runs: it loads its encoder once, and writes one segment after another.

    Args:
        load: loads the encoder; None without a dense store.
        analyser: for BM25, if there is that store.
        threads: of the matrix products.
    """

    def __init__(self, load: Load | None, analyser: Analyser | None, threads: int) -> None:
        self._load, self._analyser, self._threads = load, analyser, threads
        self._encoder: DocumentEncoder | None = None

    def __call__(self, row: dict[str, Any]) -> dict[str, Any]:
        """Write the segment that a row names, and return what was refused: a kind and a message."""
        try:
            self._write(Path(row["folder"]), Path(row["vectors"]) if row["vectors"] else None)
        except RagkitError as error:
            return {"kind": type(error).__name__, "refused": str(error)}
        return {"kind": "", "refused": ""}

    def _write(self, folder: Path, vectors: Path | None) -> None:
        if self._load and self._encoder is None:
            import torch

            torch.set_num_threads(self._threads)
            self._encoder = self._load()
        write_segment(folder, vectors, self._analyser, self._encoder)


@contextmanager
def ray_cluster(address: str, workers: int, load: Load | None, gpu: bool) -> Iterator[Spread]:
    """Yield what writes segments on a Ray cluster, through Ray Data.

    The index folder must lie where all machines see it under the same path. A worker that is killed
    costs the segment that it was at, and of its vectors only those that were not yet safe.

    Args:
        address: of the cluster, or `local` for one that is started here and ends with the build.
        workers: how many write at the same time.
        load: loads the encoder on a worker; None without a dense store.
        gpu: whether each takes a GPU.

    Raises:
        MissingExtra: Ray is not installed.
        SettingsError: there is no such cluster, or it is too small.
    """
    try:
        ray = import_module("ray")
        import_module("ray.data")
    except ImportError as error:
        raise MissingExtra("ray", "ray", "building on a Ray cluster") from error
    ours = not ray.is_initialized()
    if ours:
        _begin(ray, address, workers)
    try:
        cores = int(ray.cluster_resources().get("CPU", 0))
        if cores < workers:
            raise SettingsError(
                f"the Ray cluster has {cores} cores, too few for {workers} --workers"
            )
        yield _Spread(workers, cores // workers, load, gpu)
    finally:
        if ours:
            ray.shutdown()


class _Spread:
    def __init__(self, workers: int, cores: int, load: Load | None, gpu: bool) -> None:
        self._workers, self._cores, self._load, self._gpu = workers, cores, load, gpu

    def __call__(
        self,
        folders: Sequence[Path],
        vectors: Sequence[Path],
        analyser: Analyser | None,
        progress: Progress,
    ) -> None:
        ray = import_module("ray")
        ray.data.DataContext.get_current().enable_progress_bars = False
        rows = [
            {
                "folder": str(folder.resolve()),
                "vectors": str(vectors[number].resolve()) if vectors else "",
            }
            for number, folder in enumerate(folders)
        ]
        written = ray.data.from_items(rows, override_num_blocks=len(rows)).map(
            SegmentWriter,
            fn_constructor_args=(self._load, analyser, self._cores),
            compute=ray.data.ActorPoolStrategy(size=min(self._workers, len(rows))),
            num_cpus=self._cores,
            num_gpus=1 if self._gpu else None,
        )
        progress("segments", 0, len(rows))
        try:
            for done, row in enumerate(written.iter_rows(), 1):
                if row["kind"]:
                    raise _KINDS.get(row["kind"], RagkitError)(row["refused"])
                progress("segments", done, len(rows))
        except ray.exceptions.RayError as error:
            lines = str(error).strip().splitlines() or [type(error).__name__]
            raise RagkitError(f"a worker of the Ray cluster failed: {lines[-1]}") from error


def _begin(ray: Any, address: str, workers: int) -> None:
    options: dict[str, Any] = {"log_to_driver": False, "logging_level": logging.ERROR}
    if address == "local":
        options |= {"num_cpus": workers, "include_dashboard": False}
    try:
        ray.init(None if address == "local" else address, **options)
    except (ConnectionError, ValueError, OSError, RuntimeError) as error:
        raise SettingsError(
            f"--ray {address}: cannot be reached ({error}). Give the address of a cluster, such as "
            "auto or ray://head:10001, or local."
        ) from error
