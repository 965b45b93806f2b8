"""Giving an index another encoder: vectors are made anew, all else is kept as it is."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ..artefacts import file_hash, fingerprint, to_json
from ..errors import IndexStateError, SettingsError
from ..types import Progress, quiet
from .analysis import Analyser
from .ann import check_ann
from .ann_settings import AnnSettings, ann_settings
from .build import publish, write_ann
from .check import refuse_damage
from .documents import DocumentStore, DocumentWriter
from .embeddings import DocumentEncoder, same_documents
from .folder import changing, link, partial, partials, segment_name, writing
from .manifest import unsealed
from .segments import segment_record, write_bm25, write_dense

if TYPE_CHECKING:
    from .index import Index

_EMBEDDINGS = "embeddings.npy"


@dataclass(frozen=True, slots=True)
class Refreshed:
    """What a refresh did.

    `changed` is false if the index had the encoder already. `encoded` counts the documents that
    were encoded, `resumed` those whose vectors a refresh that was stopped had left; both are 0
    where the encoder gives the documents the vectors that the index holds.
    """

    changed: bool
    encoded: int = 0
    resumed: int = 0


def refresh_index(index: Index, encoder: DocumentEncoder, progress: Progress) -> Refreshed:
    """Replace an index's encoder and what depends on it, as `Index.refresh` does.

    New segments share the files of the old ones by hard links; the manifest goes from the old ones
    to the new ones in one step. Vectors are kept in a folder of their own until all are there.
    """
    built, described = index.manifest.get("encoder"), dict(encoder.describe())
    same = built is not None and to_json(built) == to_json(described)
    if same and not partials(index.path):
        return Refreshed(changed=False)
    with changing(index.path, index.manifest) as place:
        manifest = unsealed(index.manifest)
        manifest["encoder"] = described
        done = Refreshed(changed=not same)
        if not built or not same_documents(built, described):
            done = _replace_vectors(index, place, encoder, manifest, progress)
        with writing(index.path):
            publish(index.path, place, manifest)
    return done


def _replace_vectors(
    index: Index,
    place: Path,
    encoder: DocumentEncoder,
    manifest: dict[str, Any],
    progress: Progress,
) -> Refreshed:
    """Stage segments with new vectors and the approximate index over them.

    What is deleted is not encoded: segments that hold deleted rows are written anew without them.
    """
    ann = _ann_settings(index, encoder.dimension)
    index.size()  # refuses an index that lacks a file
    if len(index.documents) != len(index):
        raise IndexStateError(
            f"{index.path}: {len(index.documents)} documents where the manifest tells of "
            f"{len(index)}. Build the index again."
        )
    vectors = partial(index.path, fingerprint(manifest["encoder"]["fingerprint"]))
    live = index.live
    places = [place for place, size in enumerate(live.sizes) if len(live.deleted[place]) < size]
    refuse_damage(index, [index.folders[n] for n in places if len(live.deleted[n])], progress)
    stores = [DocumentStore([index.folders[n]], [live.deleted[n]]) for n in places]
    files = [vectors / f"{index.folders[n].name}.npy" for n in places]
    encoded = write_dense(stores, files, encoder, progress)
    with writing(index.path):
        records = []
        for number, (n, store, file) in enumerate(zip(places, stores, files, strict=True), 1):
            old, new = manifest["segments"][n], place / segment_name(number)
            if len(live.deleted[n]):
                records.append(_rewritten(index, store, file, new))
            else:
                records.append(_linked(old, index.folders[n], file, new))
        manifest["segments"] = records
        manifest["deleted"] = []
        folders = [place / record["name"] for record in records]
        write_ann(place, folders, ann, manifest, progress)
    return Refreshed(True, encoded, len(index) - encoded)


def _ann_settings(index: Index, dimension: int) -> AnnSettings:
    """Return the settings that the manifest keeps, if they can be those of new vectors too."""
    settings = ann_settings(index.manifest.get("ann", {}))
    try:
        check_ann(settings, dimension)
    except SettingsError as error:
        raise SettingsError(
            f"{index.path}: its approximate index cannot be one of the new vectors: {error}. "
            "Build the index again with another --kind or --factory."
        ) from error
    return settings


def _rewritten(index: Index, store: DocumentStore, vectors: Path, new: Path) -> dict[str, Any]:
    """Stage a segment of an old one's live documents and their vectors; return its record."""
    new.mkdir()
    writer = DocumentWriter(new)
    for row, identifier in enumerate(store.ids):
        writer.add(identifier, store.line(row))
    writer.close()
    if "bm25" in index.stores:
        write_bm25([new], Analyser.from_json(index.manifest["analyser"]), quiet)
    link(vectors, new / _EMBEDDINGS)
    return segment_record(new)


def _linked(record: dict[str, Any], old: Path, vectors: Path, new: Path) -> dict[str, Any]:
    """Stage a segment whose files are an old one's but for the vectors; return its record."""
    for file in old.rglob("*"):
        name = file.relative_to(old).as_posix()
        if name in record["files"] and name != _EMBEDDINGS:
            link(file, new / name)
    link(vectors, new / _EMBEDDINGS)
    return record | {
        "name": new.name,
        "files": record["files"] | {_EMBEDDINGS: file_hash(vectors)},
    }
