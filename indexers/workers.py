"""What encodes in several processes, here or on a cluster, as the programs ask for it."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING

from ragkit.errors import SettingsError

if TYPE_CHECKING:
    from ragkit.models.bi_encoder import BiEncoder
    from ragkit.models.workers import ParallelEncoder
    from ragkit.stores.build import Spread

    from .build import BuildSettings


def check_workers(workers: int) -> None:
    """Refuse a number of processes that is none.

    Raises:
        SettingsError: it is below 1.
    """
    if workers < 1:
        raise SettingsError(f"at least 1 worker is needed, not {workers}")


@contextmanager
def encoding(
    encoder: BiEncoder | None, workers: int
) -> Iterator[BiEncoder | ParallelEncoder | None]:
    """Yield what encodes in so many processes, if anything is to be encoded."""
    check_workers(workers)
    if encoder is None:
        yield None
        return
    from ragkit.models.workers import parallel

    with parallel(encoder, workers) as found:
        yield found


def spread_of(settings: BuildSettings, encoder: BiEncoder | None) -> AbstractContextManager[Spread]:
    """Return the Ray cluster that settings name."""
    from .build import load_encoder
    from .spread import Cluster, ray_cluster

    place = Path(settings.encoder)
    whole = replace(settings, encoder=str(place.resolve())) if place.is_dir() else settings
    cluster = Cluster(
        workers=settings.workers,
        load=partial(load_encoder, whole) if encoder else None,
        fingerprint=encoder.describe()["fingerprint"] if encoder else "",
        gpu=encoder is not None and encoder.model.device.type == "cuda",
    )
    return ray_cluster(settings.ray or "", cluster)
