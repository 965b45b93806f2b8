"""Compacting an index: segments merged, deleted rows gone, vectors copied."""

from __future__ import annotations

from bisect import bisect_left
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ..types import Progress
from . import limits
from .analysis import Analyser
from .ann_settings import ann_settings
from .build import publish, write_ann
from .check import refuse_damage
from .dense import DenseStore
from .documents import DocumentStore
from .embeddings import copy_embeddings
from .folder import changing, writing
from .manifest import unsealed
from .segments import SegmentsWriter, segment_record, write_bm25

if TYPE_CHECKING:
    from .index import Index


@dataclass(frozen=True, slots=True)
class Compacted:
    """What a compaction did.

    `segments` counts the segments that were merged, `rows` the deleted rows that are gone, and
    `covered` the documents that the approximate index did not cover before. All are 0 where there
    was nothing to do.
    """

    segments: int = 0
    rows: int = 0
    covered: int = 0


def covered(manifest: Mapping[str, Any]) -> int:
    """Return how many rows, deleted ones included, the approximate index covers.

    Where there is none, no row is left to be covered. Before indexes grew, an approximate index
    covered them whole.
    """
    total: int = sum(segment["documents"] for segment in manifest["segments"])
    return int(manifest.get("ann", {}).get("covers", total))


def uncovered(index: Index) -> int:
    """Return how many documents the approximate index does not cover: they are searched exactly."""
    place = bisect_left(index.live.held, covered(index.manifest))
    return len(index) - index.live.starts[place]


def next_number(manifest: Mapping[str, Any]) -> int:
    """Return the number of an index's next segment."""
    return 1 + max(int(segment["name"][:6]) for segment in manifest["segments"])


def compact_index(index: Index, progress: Progress) -> Compacted:
    """Merge an index's segments, as `Index.compact` does.

    Full segments without deleted rows at the beginning stay as they are; the others' documents are
    copied into new ones with their vectors, and their terms counted anew.
    """
    live, first = index.live, _first_to_merge(index)
    left = uncovered(index)
    merged = index.folders[first:]
    if len(merged) == 1 and live.whole:
        merged = []
    if not merged and not left:
        return Compacted()
    with changing(index.path, index.manifest) as place:
        index.size()  # refuses an index that lacks a file
        refuse_damage(index, merged, progress)
        with writing(index.path):
            manifest = unsealed(index.manifest)
            folders = index.folders
            if merged:
                staged = _merge(index, live.starts[first], place, progress)
                folders = [*folders[:first], *staged]
                records = [segment_record(folder) for folder in staged]
                manifest["segments"] = [*manifest["segments"][:first], *records]
                manifest["deleted"] = []
            if "dense" in index.stores:
                ann = ann_settings(manifest["ann"])
                write_ann(place, folders, ann, manifest, progress)
            publish(index.path, place, manifest)
    return Compacted(len(merged), live.held[-1] - len(live), left)


def _first_to_merge(index: Index) -> int:
    """Return the first segment that is not full, by documents or by bytes, or has deleted rows."""
    for place, size in enumerate(index.live.sizes):
        if len(index.live.deleted[place]):
            return place
        text = (index.folders[place] / "documents.jsonl").stat().st_size
        if place + 1 < len(index.folders):  # a segment is full where the next document is too much
            text += len(index.documents.line(index.live.starts[place + 1]))
        if size < limits.SEGMENT_DOCUMENTS and text <= limits.SEGMENT_BYTES:
            return place
    return len(index.live.sizes)


def _merge(index: Index, start: int, place: Path, progress: Progress) -> list[Path]:
    """Stage segments of the documents from row `start` on; return their folders."""
    writer = SegmentsWriter(place, next_number(index.manifest))
    for row in range(start, len(index)):
        writer.add(index.documents.ids[row], index.documents.line(row))
        if row % 1000 == 0:
            progress("copy documents", row, len(index))
    writer.close()
    progress("copy documents", len(index), len(index))
    folders = writer.folders
    if "bm25" in index.stores:
        write_bm25(folders, Analyser.from_json(index.manifest["analyser"]), progress)
    if "dense" in index.stores:
        store = DenseStore.open(index.folders, index.live)
        for folder in folders:
            rows = range(start, start + len(DocumentStore([folder])))
            copy_embeddings(folder / "embeddings.npy", store.vectors, rows)
            start = rows.stop
            progress("copy vectors", start, len(index))
    return folders
