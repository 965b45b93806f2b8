"""The manifest of an index folder: read, and refused where it holds what no build writes."""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from ..artefacts import fingerprint, read_json
from ..errors import DataError, IndexStateError, SettingsError
from .ann_settings import ann_settings, search_settings
from .folder import MANIFEST, is_name

FORMAT = 1

_KINDS = {
    "ragkit": str, "settings": dict, "segments": list, "deleted": list, "encoder": dict,
    "analyser": dict, "bm25": dict, "ann": dict,
}  # fmt: skip
_OPTIONAL = {"deleted", "encoder", "analyser", "bm25", "ann"}
_FILE = re.compile(r"(bm25/)?[a-z]+\.(jsonl|json|npy)")
_MOST = 1 << 40


def read_manifest(path: Path) -> dict[str, Any]:
    """Read the manifest of an index folder.

    Raises:
        IndexStateError: there is no index at `path`, or it is of another format, or the manifest
            holds what no build writes: names of files elsewhere, for instance.
    """
    if not (path / MANIFEST).is_file():
        raise IndexStateError(
            f"{path}: no index here (no manifest.json). "
            f"Build one with: ragkit-index build CORPUS --index {path}"
        )
    try:
        manifest = read_json(path / MANIFEST)
    except DataError as error:
        raise IndexStateError(f"{error}. Build the index again.") from error
    if manifest.get("format") != FORMAT:
        raise IndexStateError(
            f"{path}: index format {manifest.get('format')!r}, this ragkit reads {FORMAT}. "
            "Build the index again with this version."
        )
    if found := wrong(manifest):
        raise IndexStateError(f"{path / MANIFEST}: its {found}. Build the index again.")
    return manifest


def wrong(manifest: Mapping[str, Any]) -> str:
    """Tell what in a manifest no build writes; nothing if all is right."""
    try:
        fingerprint(manifest)
    except (DataError, UnicodeEncodeError) as error:
        return f"text cannot be written ({error})"
    return next((f"{name} is {repr(value)[:100]}" for name, value in _wrong(manifest)), "")


def unsealed(manifest: Mapping[str, Any]) -> dict[str, Any]:
    """Return a manifest without its checksum, to be changed and published."""
    return {key: value for key, value in manifest.items() if key != "checksum"}


def _wrong(manifest: Mapping[str, Any]) -> Iterator[tuple[str, Any]]:
    """Yield what cannot be right, by name."""
    for name, kind in _KINDS.items():
        if name not in manifest and name in _OPTIONAL:
            continue
        if not isinstance(manifest.get(name), kind):
            yield name, manifest.get(name)
    held = [0]
    for segment in manifest["segments"] or [None]:
        yield from _wrong_segment(segment)
        held.append(held[-1] + segment["documents"])
    names = [segment["name"] for segment in manifest["segments"]]
    if len({*names}) < len(names):
        yield "segments", names
    if ("analyser" in manifest) != ("bm25" in manifest):
        yield "bm25", manifest.get("bm25")
    for name, value in manifest.get("bm25", {}).items():
        if name != "variant" and value is not None and not _is_number(value):
            yield f"bm25's {name}", value
    if "encoder" in manifest:
        yield from _wrong_encoder(manifest["encoder"])
        yield from _wrong_ann(manifest.get("ann"), held)


def _wrong_segment(segment: Any) -> Iterator[tuple[str, Any]]:
    if not isinstance(segment, dict) or not is_name("segments", segment.get("name")):
        yield "segment", segment
    documents, files = segment.get("documents"), segment.get("files")
    if type(documents) is not int or not 0 < documents < _MOST:
        yield "number of documents", documents
    if not isinstance(files, dict):
        yield "record of files", files
    for file, digest in files.items():
        if not _FILE.fullmatch(file) or not isinstance(digest, str):
            yield "record of files", {file: digest}


def _wrong_encoder(encoder: Mapping[str, Any]) -> Iterator[tuple[str, Any]]:
    for name in ("name", "fingerprint"):
        if not isinstance(encoder.get(name), str):
            yield f"encoder's {name}", encoder.get(name)


def _wrong_ann(ann: Any, held: Sequence[int]) -> Iterator[tuple[str, Any]]:
    """Yield what is wrong with the approximate index of segments that end after so many rows."""
    try:
        ann_settings(ann)
        if file := ann["file"]:
            search, rescore = search_settings(ann)
            sound = is_name("ann", file) and isinstance(ann["hash"], str) and 0 <= rescore <= 1000
            if not sound or len(search) > 1000 or ann.get("covers", held[-1]) not in held:
                yield "approximate index", ann
    except (SettingsError, AttributeError, KeyError, TypeError, ValueError, StopIteration):
        yield "approximate index", ann


def _is_number(value: Any) -> bool:
    return type(value) in (int, float) and abs(value) < 1 << 62
