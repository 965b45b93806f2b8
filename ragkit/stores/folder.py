"""The index folder as its writers see it: which files are theirs, one at a time, all or nothing."""

from __future__ import annotations

import os
import re
import secrets
import shutil
from collections.abc import Iterator, Mapping, Set
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

from ..artefacts import read_json, sync, sync_tree, write_json
from ..errors import DataError, IndexStateError, SettingsError

try:
    import fcntl
except ImportError:  # Windows
    fcntl = None  # type: ignore[assignment]

MANIFEST = "manifest.json"
_LOCK = ".lock"
# The names that a build gives, by where they stand; nothing of another name is ever removed.
_NAMES = {
    "": re.compile(rf"\{_LOCK}|\.manifest\.json\.[a-z0-9_]{{8}}"),
    "segments": re.compile(r"\d{6}-[0-9a-f]{6}|\.new-[0-9a-f]{8}|\.vectors-[0-9a-f]{16}"),
    "ann": re.compile(r"[0-9a-f]{12}\.faiss"),
}


def is_name(room: str, name: object) -> bool:
    """Tell whether a build gives such names to what lies in `segments` or `ann`."""
    return isinstance(name, str) and name[:1] != "." and bool(_NAMES[room].fullmatch(name))


def segment_name(number: int) -> str:
    """Return a new name for an index's n-th segment."""
    return f"{number:06d}-{secrets.token_hex(3)}"


def ann_name() -> str:
    """Return a new name for a FAISS file."""
    return f"{secrets.token_hex(6)}.faiss"


def partials(path: Path) -> list[Path]:
    """List the folders of vectors that builds and changes which were stopped have left."""
    return [child for child, own in _entries(path) if own and child.name.startswith(".vectors-")]


def partial(path: Path, encoder: str) -> Path:
    """Return the folder in which vectors are kept until they are all there.

    It outlives what is stopped once it holds some. What is committed removes it, and so does work
    with another encoder.

    Args:
        path: the index folder, locked.
        encoder: 16 hexadecimal digits that stand for the encoder.

    Raises:
        SettingsError: it cannot be made.
    """
    folder = path / "segments" / f".vectors-{encoder}"
    for other in partials(path):
        if other != folder:
            shutil.rmtree(other, ignore_errors=True)
    with writing(folder):
        folder.mkdir(exist_ok=True)
    return folder


class writing:  # noqa: N801 -- a context manager, entered for every document
    """Tell of a full disk, a missing right and the like as of a path that cannot be written.

    Raises:
        SettingsError: in the place of an OSError.
    """

    def __init__(self, path: Path) -> None:
        self._path = path

    def __enter__(self) -> None:
        pass

    def __exit__(self, kind: object, error: BaseException | None, trace: object) -> None:
        if isinstance(error, OSError):
            raise SettingsError(
                f"{self._path}: cannot be written ({error.strerror or error}). "
                "Make room, or make it writable, and give the same command again."
            ) from error


def link(file: Path, target: Path) -> None:
    """Give a finished file a second name, or a copy where the file system has no hard links."""
    target.parent.mkdir(parents=True, exist_ok=True)
    try:
        os.link(file, target)
    except OSError:
        shutil.copyfile(file, target)


def check_folder(path: Path, replace: bool) -> None:
    """Refuse a folder that an index must not be built in.

    Raises:
        SettingsError: it holds an index, and `replace` is false, or what no build has put there.
    """
    if (path / MANIFEST).exists():
        if not _is_index(path):
            raise SettingsError(
                f"{path} exists and is not an index (its {MANIFEST} is something else's). "
                "Choose another folder."
            )
        if not replace:
            raise SettingsError(
                f"{path}: there is an index here already{_held(path)}. To change some of its "
                f"documents: ragkit-index update CORPUS --index {path}; to build another in its "
                "place: --replace; or choose another folder."
            )
    elif path.exists() and (not path.is_dir() or (foreign := _foreign(path))):
        seen = f" (it holds {foreign[0]})" if path.is_dir() else ""
        raise SettingsError(f"{path} exists and is not an index{seen}. Choose another folder.")


def _is_index(path: Path) -> bool:
    try:
        return read_json(path / MANIFEST).keys() >= {"format", "segments"}
    except DataError:  # a damaged index, if all else in the folder is an index's
        return (path / "segments").is_dir() and _foreign(path) == [MANIFEST]


def _held(path: Path) -> str:
    """Tell what an index holds, as far as its manifest can be read."""
    try:
        manifest = read_json(path / MANIFEST)
        documents = sum(segment["documents"] for segment in manifest["segments"])
        documents -= sum(record["rows"] for record in manifest["deleted"])
        stores = ["bm25"] if "analyser" in manifest else []
        if "encoder" in manifest:
            stores.append(f"dense by {manifest['encoder']['name']}")
    except (DataError, KeyError, TypeError):
        return ""
    return f", of {documents:,} documents ({', '.join(stores)})"


def _foreign(path: Path) -> list[str]:
    """Name what lies in a folder and its rooms and does not bear a name that builds give."""
    return [
        child.relative_to(path).as_posix()
        for child, own in _entries(path)
        if not own and not (child.name in _NAMES and child.parent == path and child.is_dir())
    ]


def _entries(path: Path) -> Iterator[tuple[Path, bool]]:
    """Yield what lies in a folder and its rooms, and whether a build gives such names."""
    for room, names in _NAMES.items():
        for child in list((path / room).iterdir()) if (path / room).is_dir() else ():
            yield child, bool(names.fullmatch(child.name)) and not child.is_symlink()


@contextmanager
def staging(path: Path, replace: bool) -> Iterator[Path]:
    """Lock an index folder and yield a place for a build's files, removed whatever happens.

    The lock is a file that a process holds with flock, so that a dead one holds none; where the
    system has no flock, nothing is locked.

    Raises:
        IndexStateError: another build of this index is running.
        SettingsError: as `check_folder` does, or the folder cannot be written.
    """
    segments = path / "segments"
    created = [folder for folder in (segments, path, *path.parents) if not folder.exists()]
    place = segments / f".new-{secrets.token_hex(4)}"
    try:
        with writing(path):
            path.mkdir(parents=True, exist_ok=True)
            lock = _lock(path / _LOCK)
        try:
            check_folder(path, replace)
            with writing(path):
                place.mkdir(parents=True)
            yield place
        finally:
            shutil.rmtree(place, ignore_errors=True)
            for folder in partials(path):
                if not any(folder.glob("*.json")):  # no row in it is known to be safe
                    shutil.rmtree(folder, ignore_errors=True)
            (path / _LOCK).unlink(missing_ok=True)
            os.close(lock)
    finally:
        for folder in created:
            with suppress(OSError):  # it is not empty
                folder.rmdir()


@contextmanager
def changing(path: Path, manifest: Mapping[str, Any]) -> Iterator[Path]:
    """Stage as `staging` does, for a change of the index that has this manifest.

    Raises:
        IndexStateError: it has another by now, or another build of this index is running.
        SettingsError: the folder cannot be written.
    """
    with staging(path, replace=True) as place:
        if read_json(path / MANIFEST) != manifest:
            raise IndexStateError(f"{path}: replaced since it was opened. Open it again.")
        yield place


def _lock(file: Path) -> int:
    """Return the descriptor of a lock file, locked until it is closed."""
    while True:
        descriptor = os.open(file, os.O_RDWR | os.O_CREAT, 0o644)
        try:
            if fcntl:
                fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
            # Its holder may have removed the file between the two calls above.
            if os.path.samestat(os.fstat(descriptor), file.stat()):
                return descriptor
        except BlockingIOError:
            os.close(descriptor)
            raise IndexStateError(
                f"{file.parent}: another build of this index is running. Wait until it has ended."
            ) from None
        except FileNotFoundError:
            pass
        os.close(descriptor)


def commit(path: Path, place: Path, manifest: dict[str, object], live: Set[str]) -> None:
    """Move a build's files from `place` to theirs, replace the manifest, drop the files not live.

    Args:
        path: the index folder.
        place: what `staging` gave; holds segments and FAISS files, finished.
        manifest: what `manifest.json` will hold.
        live: the names of the segments and FAISS files that the manifest names.
    """
    sync_tree(place)
    for child in sorted(place.iterdir()):
        room = path / ("ann" if child.suffix == ".faiss" else "segments")
        room.mkdir(exist_ok=True)
        child.replace(room / child.name)
    for folder in (path / "segments", path / "ann", path.parent):
        sync(folder)
    write_json(path / MANIFEST, manifest)
    for child, own in list(_entries(path)):
        if own and child.name not in {*live, place.name, _LOCK}:
            if child.is_dir():
                shutil.rmtree(child, ignore_errors=True)
            else:
                child.unlink(missing_ok=True)
