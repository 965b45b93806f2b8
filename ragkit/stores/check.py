"""Whether an index is sound: its files by their checksums, its stores by one another."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ..artefacts import file_hash, fingerprint
from ..errors import IndexStateError
from ..types import Progress
from .folder import MANIFEST
from .manifest import unsealed

if TYPE_CHECKING:
    from .index import Index


def live_files(manifest: Mapping[str, Any]) -> dict[str, str]:
    """Return the checksums of all files that a manifest names, by their paths in the folder."""
    files = {
        f"segments/{segment['name']}/{name}": digest
        for segment in manifest["segments"]
        for name, digest in segment["files"].items()
    }
    ann = manifest.get("ann")
    return files | ({f"ann/{ann['file']}": ann["hash"]} if ann and ann["file"] else {})


def check_index(index: Index, progress: Progress) -> list[str]:
    """Tell what is wrong with an index, as `Index.check` does."""
    problems = []
    if fingerprint(unsealed(index.manifest)) != index.manifest.get("checksum"):
        problems.append(f"{index.path / MANIFEST}: changed since it was written")
    try:
        files = index.files()
    except IndexStateError as error:
        return [*problems, str(error)]
    problems += _damage(index.path, files, progress)
    return problems or _misfits(index)


def refuse_damage(index: Index, folders: Sequence[Path], progress: Progress) -> None:
    """Refuse segments whose files are not what was written: nothing must be made of them.

    Raises:
        IndexStateError: a file is missing, or its bytes have changed.
    """
    names = tuple(f"segments/{folder.name}/" for folder in folders)
    files = {name: digest for name, digest in index.files().items() if name.startswith(names)}
    if problems := _damage(index.path, files, progress):
        raise IndexStateError("\n".join([*problems, "Build the index again."]))


def _damage(path: Path, files: Mapping[str, str], progress: Progress) -> list[str]:
    problems = []
    for done, (name, expected) in enumerate(files.items()):
        progress("check files", done, len(files))
        file = path / name
        if not file.is_file():
            problems.append(f"{file}: missing")
        elif file_hash(file) != expected:
            problems.append(f"{file}: its bytes have changed since it was written")
    progress("check files", len(files), len(files))
    return problems


def _misfits(index: Index) -> list[str]:
    try:
        rows = {"documents": len(index.documents), "ids": len(index.documents.rows)}
        rows |= {store: len(getattr(index, store)) for store in index.stores}
    except IndexStateError as error:
        return [str(error)]
    return [
        f"{index.path}: {count} rows of {name}, {len(index)} documents"
        for name, count in rows.items()
        if count != len(index)
    ]
