"""Files that are whole or absent: write-then-rename, hashes, fingerprints."""

from __future__ import annotations

import hashlib
import json
import os
import re
import shutil
import tempfile
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from .errors import DataError, SettingsError

_BLOCK = 1 << 20


def to_json(value: Any, *, indent: int | None = None) -> str:
    """Render `value` as JSON with sorted keys, so that equal values give equal text.

    Raises:
        DataError: `value` holds NaN, an infinity, or something JSON cannot hold.
    """
    try:
        return json.dumps(value, ensure_ascii=False, sort_keys=True, indent=indent, allow_nan=False)
    except (TypeError, ValueError) as error:
        raise DataError(f"this value cannot be written as JSON: {error}") from error


def fingerprint(value: Any) -> str:
    """Return 16 hexadecimal digits of the SHA-256 of `value`'s JSON."""
    return hashlib.sha256(to_json(value).encode()).hexdigest()[:16]


def file_hash(path: Path) -> str:
    """Return the SHA-256 of a file's bytes, in hexadecimal."""
    digest = hashlib.sha256()
    with path.open("rb") as handle:
        while block := handle.read(_BLOCK):
            digest.update(block)
    return digest.hexdigest()


def file_record(path: Path | None) -> dict[str, str] | None:
    """Name a file and the hash of what it holds, as results keep it; None for no file."""
    return {"path": str(path), "hash": file_hash(path)} if path else None


def folder_hash(path: Path, suffixes: tuple[str, ...] = ()) -> str:
    """Return one hash over the names and bytes of a folder's files (of these suffixes, if any)."""
    files = (file for file in path.rglob("*") if file.is_file())
    names = {
        file.relative_to(path).as_posix(): file_hash(file)
        for file in files
        if not suffixes or file.suffix in suffixes
    }
    return fingerprint(names)


def read_json(path: Path) -> dict[str, Any]:
    """Read a JSON object.

    Raises:
        DataError: the file is missing, is not JSON, or holds something other than an object.
    """
    try:
        value = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError) as error:
        raise DataError(f"{path}: cannot be read as JSON: {error}") from error
    if not isinstance(value, dict):
        raise DataError(f"{path}: expected a JSON object, found {type(value).__name__}")
    return value


def write_json(path: Path, value: Mapping[str, Any]) -> None:
    """Replace `path` by `value`'s JSON in one step: a reader sees the old file or the new one."""
    write_text(path, to_json(value, indent=2) + "\n")


def write_text(path: Path, text: str) -> None:
    """Replace `path` by a text in UTF-8 in one step: a reader sees the old file or the new one."""
    descriptor, name = tempfile.mkstemp(dir=path.parent, prefix=f".{path.name}.")
    temporary = Path(name)
    try:
        with os.fdopen(descriptor, "w", encoding="utf-8", newline="\n") as handle:
            handle.write(text)
            handle.flush()
            os.fsync(handle.fileno())
        temporary.chmod(0o644)
        temporary.replace(path)
    except BaseException:
        temporary.unlink(missing_ok=True)
        raise
    sync(path.parent)


def sync(path: Path) -> None:
    """Make a file's bytes or a folder's names durable (a no-op where it cannot be opened)."""
    try:
        descriptor = os.open(path, os.O_RDONLY if path.is_dir() else os.O_RDWR)
    except OSError:
        return
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def sync_tree(folder: Path) -> None:
    """Make a folder durable, with all that is in it."""
    for path in folder.rglob("*"):
        sync(path)
    sync(folder)


def check_output(path: Path, replace: bool, mark: str) -> None:
    """Refuse an output folder that is in the way, before any work is done.

    A folder that a killed process had moved aside, to replace it, is put back first.

    Args:
        path: the folder that will be written.
        replace: whether a folder of the same kind may be replaced.
        mark: the file by which that kind is known; what lacks it is never replaced.

    Raises:
        SettingsError: `path` exists, is not an empty folder, and may not be replaced.
    """
    if not (path.exists() or path.is_symlink()) and (aside := _aside(path)):
        aside[-1].replace(path)
    if not (path.exists() or path.is_symlink()) or (path.is_dir() and not any(path.iterdir())):
        return
    if not replace:
        raise SettingsError(f"{path} exists already. Choose another place, or pass --replace.")
    if not (path / mark).is_file():
        raise SettingsError(
            f"{path} is not what would be written there (it has no {mark}), and is not replaced. "
            "Choose another place, or remove it yourself."
        )


def check_file(path: Path) -> None:
    """Refuse an output file that could not be written, before any work is done.

    Raises:
        SettingsError: `path` is a folder, or its own folder is missing or read-only.
    """
    if path.is_dir():
        raise SettingsError(f"{path} is a folder. Name a file.")
    if not path.parent.is_dir():
        raise SettingsError(f"{path}: there is no folder {path.parent}. Make it first.")
    if not os.access(path.parent, os.W_OK):
        raise SettingsError(f"{path}: the folder {path.parent} cannot be written to.")


@contextmanager
def new_folder(path: Path, *, replace: bool = False, mark: str) -> Iterator[Path]:
    """Yield a temporary folder that becomes `path` when the block ends well.

    On any exception, Ctrl-C included, the temporary folder is removed and `path` is as it was. A
    process that is killed between the two last renames leaves the old folder aside, under a hidden
    name, from where the next call puts it back.

    Raises:
        SettingsError: as `check_output` does, or if there can be no folder at `path`.
    """
    check_output(path, replace, mark)
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise SettingsError(f"{path}: there can be no folder here ({error.strerror})") from error
    temporary = Path(tempfile.mkdtemp(dir=path.parent, prefix=f".{path.name}."))
    retired = temporary.with_name(temporary.name + ".old")
    try:
        yield temporary
        temporary.chmod(0o755)
        for file in temporary.rglob("*"):  # safetensors' own are for their owner alone
            file.chmod(0o755 if file.is_dir() else 0o644)
        sync_tree(temporary)
        check_output(path, replace, mark)  # another process may have been as busy
        if path.exists():
            path.replace(retired)
        temporary.replace(path)
        for old in _aside(path):
            _remove(old)
    except BaseException:
        if retired.exists() and not path.exists():
            retired.replace(path)
        _remove(temporary)
        raise
    sync(path.parent)


def _aside(path: Path) -> list[Path]:
    """List what `new_folder` moved aside to replace it, the newest last."""
    name = re.compile(rf"\.{re.escape(path.name)}\.[a-z0-9_]{{8}}\.old")
    found = path.parent.iterdir() if path.parent.is_dir() else ()
    return sorted(
        (other for other in found if name.fullmatch(other.name)), key=lambda o: o.stat().st_mtime
    )


def _remove(path: Path) -> None:
    if path.is_dir() and not path.is_symlink():
        shutil.rmtree(path, ignore_errors=True)
    else:
        path.unlink(missing_ok=True)
