"""Giving an index another encoder: vectors are made anew, all else is kept as it is."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ..artefacts import file_hash, fingerprint, read_json, to_json
from ..errors import IndexStateError, SettingsError
from ..types import Progress
from .ann import AnnSettings, check_ann
from .build import publish, write_ann, write_dense
from .embeddings import DocumentEncoder, same_documents
from .folder import MANIFEST, link, partial, partials, segment_name, staging, writing

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
    with staging(index.path, replace=True) as place:
        if read_json(index.path / MANIFEST) != index.manifest:
            raise IndexStateError(f"{index.path}: replaced since it was opened. Open it again.")
        manifest = {key: value for key, value in index.manifest.items() if key != "checksum"}
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
    """Stage segments with new vectors and the approximate index over them."""
    ann = _ann_settings(index, encoder.dimension)
    index.size()  # refuses an index that lacks a file
    if len(index.documents) != len(index):
        raise IndexStateError(
            f"{index.path}: {len(index.documents)} documents where the manifest tells of "
            f"{len(index)}. Build the index again."
        )
    vectors = partial(index.path, fingerprint(manifest["encoder"]["fingerprint"]))
    old = [index.path / "segments" / segment["name"] for segment in manifest["segments"]]
    files = [vectors / f"{folder.name}.npy" for folder in old]
    encoded = write_dense(old, files, encoder, progress, resume=True)
    with writing(index.path):
        manifest["segments"] = [
            _segment(segment, folder, file, place / segment_name(number))
            for number, (segment, folder, file) in enumerate(
                zip(manifest["segments"], old, files, strict=True), 1
            )
        ]
        folders = [place / segment["name"] for segment in manifest["segments"]]
        write_ann(place, folders, ann, manifest, progress)
    return Refreshed(True, encoded, len(index) - encoded)


def _ann_settings(index: Index, dimension: int) -> AnnSettings:
    """Return the settings that the manifest keeps, if they can be those of new vectors too."""
    kept = index.manifest.get("ann", {})
    names = ("kind", "factory", "search")
    settings = AnnSettings(**{name: kept[name] for name in names if name in kept})
    try:
        check_ann(settings, dimension)
    except SettingsError as error:
        raise SettingsError(
            f"{index.path}: its approximate index cannot be one of the new vectors: {error}. "
            "Build the index again with another --kind or --factory."
        ) from error
    return settings


def _segment(record: dict[str, Any], old: Path, vectors: Path, new: Path) -> dict[str, Any]:
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
