"""`ragkit-index add`, `update`, `delete` and `compact`: an index that changes without a build."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from pathlib import Path
from time import perf_counter
from typing import TYPE_CHECKING, Annotated, Any, Literal

from cyclopts import Parameter

from ragkit.console import print_json, progress_bars
from ragkit.corpus import Problem, read_documents
from ragkit.errors import DataError, SettingsError

from .build import describe, say_problems, telling_of_kept
from .refresh import index_encoder
from .split import Splitter
from .workers import encoding

if TYPE_CHECKING:
    from ragkit.models.bi_encoder import BiEncoder
    from ragkit.stores.grow import Grown
    from ragkit.stores.index import Index

_MANY = 16  # segments, from which on merging small ones is worth a word


@Parameter(name="*")
@dataclass(frozen=True, kw_only=True)
class GrowSettings:
    """Which index gets the documents; how they are split and encoded is the index's own."""

    index: Path
    """The index folder."""
    encoder: str | None = None
    """Where the index's encoder is now, if that is not where it was when the index was built."""
    on_error: Literal["stop", "skip"] = "stop"
    """What a record that cannot be read does: stop before anything is written, or skip it."""
    device: str | None = None
    """Where the encoder runs: cpu, cuda, mps; the best one here if not given."""
    precision: Literal["auto", "fp32", "bf16"] = "auto"
    """The encoder's number format; auto takes bf16 where it is fast and the vectors agree."""
    workers: int = 1
    """Processes that encode: they share the cores, or take a GPU each."""


Corpus = Annotated[list[Path], Parameter(negative="")]


def add(corpus: Corpus, /, *, settings: GrowSettings, json: bool = False) -> None:
    """Add documents to an index, as new segments; an id that is there already is refused.

    Example: ragkit-index add more.jsonl --index kb

    Parameters
    ----------
    corpus
        Files and folders of documents, as `build` takes them.
    json
        Print what was done as JSON.
    """
    _grow(corpus, settings, update=False, json=json)


def update(corpus: Corpus, /, *, settings: GrowSettings, json: bool = False) -> None:
    """Add documents, or put them in the place of those of the same ids.

    Unchanged documents are neither written nor encoded again, so that a corpus may be given whole;
    what the index holds beyond it stays.

    Example: ragkit-index update corpus.jsonl --index kb

    Parameters
    ----------
    corpus
        Files and folders of documents, as `build` takes them.
    json
        Print what was done as JSON.
    """
    _grow(corpus, settings, update=True, json=json)


def delete(
    ids: Annotated[tuple[str, ...], Parameter(negative="")] = (),
    /,
    *,
    index: Path,
    ids_file: Path | None = None,
    missing: Literal["refuse", "skip"] = "refuse",
    json: bool = False,
) -> None:
    """Delete documents from an index, with all pieces that were split off them.

    Example: ragkit-index delete report-7 report-8 --index kb

    Parameters
    ----------
    ids
        The documents' ids; after `--`, also such as begin with a hyphen.
    index
        The index folder.
    ids_file
        A file that holds ids, one a line.
    missing
        What an id that is not in the index does: refuse all that was asked for, or be skipped.
    json
        Print what was done as JSON.
    """
    from ragkit.stores.grow import delete_documents
    from ragkit.stores.index import Index

    asked = [*ids, *(_ids(ids_file) if ids_file else ())]
    if not asked:
        raise SettingsError("no ids are given: name them, or pass --ids-file FILE")
    done = delete_documents(Index.open(index), asked, missing)
    opened = Index.open(index)
    if json:
        print_json(describe(opened) | asdict(done))
    else:
        print(f"{index}: {done.deleted:,} documents deleted, {_state(opened)}")


def compact(*, index: Path, json: bool = False) -> None:
    """Merge an index's segments, leave deleted documents out, and build its approximate index anew.

    Nothing is encoded; the index is as one that was built of the documents that are left.

    Example: ragkit-index compact --index kb

    Parameters
    ----------
    index
        The index folder.
    json
        Print what was done as JSON.
    """
    from ragkit.stores.compact import compact_index
    from ragkit.stores.index import Index

    start = perf_counter()
    with progress_bars() as progress:
        done = compact_index(Index.open(index), progress)
    opened = Index.open(index)
    if json:
        told = {"merged": done.segments, "rows_dropped": done.rows, "covered": done.covered}
        print_json(describe(opened) | told | {"seconds": round(perf_counter() - start, 3)})
    elif not done.segments + done.covered:
        print(f"{index}: nothing to do, {_state(opened)}")
    else:
        print(
            f"{index}: {done.segments:,} segments merged, {done.rows:,} deleted rows dropped in "
            f"{perf_counter() - start:.1f} s, {_state(opened)}"
        )


def _ids(file: Path) -> list[str]:
    try:
        lines = file.read_bytes().decode("utf-8").split("\n")
    except UnicodeDecodeError as error:
        raise DataError(f"{file}: is not UTF-8 ({error.reason} at byte {error.start})") from error
    return [line for each in lines if (line := each.removesuffix("\r")).strip()]


def _grow(corpus: list[Path], settings: GrowSettings, *, update: bool, json: bool) -> None:
    from ragkit.stores.grow import add_documents
    from ragkit.stores.index import Index

    start, problems = perf_counter(), list[Problem]()
    index = Index.open(settings.index)
    encoder = None
    if "dense" in index.stores:
        encoder = index_encoder(index, settings.encoder, settings.device, settings.precision)
    split = _splitter(index, encoder)
    with (
        telling_of_kept(settings.index),
        encoding(encoder, settings.workers) as encodes,
        progress_bars() as progress,
    ):
        documents = read_documents(corpus, on_error=settings.on_error, problems=problems)
        done = add_documents(index, documents, encodes, update, split, progress)
    split.tell()
    say_problems(problems)
    index = Index.open(settings.index)
    if json:
        summary = describe(index) | asdict(done) | {"skipped": [str(each) for each in problems]}
        print_json(summary | {"seconds": round(perf_counter() - start, 3)})
    else:
        skipped = f", {len(problems)} records skipped" if problems else ""
        print(f"{settings.index}: {_told(done, update)}{skipped}, {_state(index)}")


def _splitter(index: Index, encoder: BiEncoder | None) -> Splitter:
    """Return what splits documents as the index's build did."""
    from ragkit.stores.analysis import Analyser

    kept: dict[str, Any] = index.manifest["settings"]
    code = "en"
    if "language" in kept:
        code = Analyser.of_language(kept["language"]).code
    elif "analyser" in index.manifest:
        code = Analyser.from_json(index.manifest["analyser"]).code
    return Splitter(kept.get("split_tokens", 0), kept.get("split_overlap", 0), encoder, code)


def _told(done: Grown, update: bool) -> str:
    told = f"{done.added:,} documents added"
    if update:
        told += f", {done.changed:,} changed, {done.unchanged:,} unchanged"
    return f"{told} ({done.rows_written:,} rows written, {done.encoded:,} encoded)"


def _state(index: Index) -> str:
    """Tell what an index holds now, and what compacting would change."""
    from ragkit.stores.limits import SEGMENT_DOCUMENTS

    summary = describe(index)
    segments = summary["segments"]
    told = f"{len(index):,} documents in {segments:,} segment{'s' * (segments != 1)}"
    if summary["deleted_rows"]:
        told += f" with {summary['deleted_rows']:,} deleted rows"
    if segments >= _MANY and len(index) < segments * SEGMENT_DOCUMENTS / 10:
        told += "; each is searched by itself, `ragkit-index compact` merges them"
    if summary.get("uncovered"):
        told += (
            f"; {summary['uncovered']:,} documents are not in the approximate index "
            f"({summary['ann']}) and are searched exactly until `ragkit-index compact`"
        )
    return told
