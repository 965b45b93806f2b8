"""`ragkit-index refresh`: another encoder for an index that is there."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from time import perf_counter
from typing import TYPE_CHECKING, Any, Literal

from cyclopts import Parameter

from ragkit.console import print_json, progress_bars
from ragkit.types import Progress

from .build import describe, load_encoder, telling_of_kept
from .split import Cut, checked_window
from .workers import encoding

if TYPE_CHECKING:
    from ragkit.models.bi_encoder import BiEncoder
    from ragkit.stores.index import Index


@Parameter(name="*")
@dataclass(frozen=True, kw_only=True)
class RefreshSettings:
    """Which index gets which encoder."""

    index: Path
    """The index folder."""
    encoder: str
    """The new encoder, by folder or name."""
    query_prompt: str | None = None
    """Put before each query; the encoder's own if not given."""
    document_prompt: str | None = None
    """Put before each document; the encoder's own if not given."""
    max_length: int | None = None
    """Tokens of a document that the encoder reads; its own limit if not given."""
    device: str | None = None
    """Where the encoder runs: cpu, cuda, mps; the best one here if not given."""
    precision: Literal["auto", "fp32", "bf16"] = "auto"
    """The encoder's number format; auto takes bf16 where it is fast and the vectors agree."""
    workers: int = 1
    """Processes that encode: they share the cores, or take a GPU each."""


def refresh(*, settings: RefreshSettings, json: bool = False) -> None:
    """Give an index another encoder, such as one that was fine-tuned, or its first.

    Documents and BM25 stay as they are, and what was encoded before a stop is not encoded again.

    Example: ragkit-index refresh --index kb --encoder models/retriever

    Parameters
    ----------
    json
        Print what was done as JSON.
    """
    from ragkit.stores.index import Index
    from ragkit.stores.refresh import refresh_index

    index = Index.open(settings.index)
    encoder = load_encoder(settings)
    checked_window(encoder)
    start = perf_counter()
    with (
        telling_of_kept(settings.index),
        encoding(encoder, settings.workers) as encodes,
        progress_bars() as progress,
    ):
        _tell_of_cut(index, encoder, progress)
        done = refresh_index(index, encodes or encoder, progress)
    seconds = perf_counter() - start
    index = Index.open(settings.index)
    if json:
        summary: dict[str, Any] = {"changed": done.changed, "encoded": done.encoded}
        summary |= {"resumed": done.resumed, "seconds": round(seconds, 3)}
        print_json(describe(index) | summary)
    elif not done.changed:
        print(f"{settings.index}: nothing to do, its encoder is {encoder.name} already")
    elif not done.encoded + done.resumed:
        print(
            f"{settings.index}: the encoder is {encoder.name} now; it gives documents the vectors "
            "that the index holds, so none was encoded"
        )
    else:
        before = f", {done.resumed:,} before the stop" if done.resumed else ""
        print(
            f"{settings.index}: {done.encoded:,} documents encoded by {encoder.name} in "
            f"{seconds:.1f} s{before}, stores {', '.join(index.stores)}, "
            f"{index.size() / 1e6:.1f} MB"
        )


def index_encoder(
    index: Index,
    name: str | None = None,
    device: str | None = None,
    precision: Literal["auto", "fp32", "bf16"] = "auto",
) -> BiEncoder:
    """Load the encoder that an index was built with, as it was.

    Args:
        index: an index with a dense store.
        name: where the encoder is now, if it is elsewhere.
        device, precision: as in `RefreshSettings`.
    """
    built = index.manifest["encoder"]
    kept = ("query_prompt", "document_prompt", "max_length")
    return load_encoder(
        RefreshSettings(
            index=index.path,
            encoder=built["name"] if name is None else name,
            device=device,
            precision=precision,
            **{key: built.get(key) for key in kept},
        )
    )


def _tell_of_cut(index: Index, encoder: BiEncoder, progress: Progress) -> None:
    """Tell how many documents are too long for an encoder that is to encode them."""
    from ragkit.stores.embeddings import same_documents

    built = index.manifest.get("encoder")
    if built and same_documents(built, encoder.describe()):
        return
    cut, total = Cut(encoder), len(index)
    for done, document in enumerate(index.documents, 1):
        cut.see(document, len(document.contents))
        if done % 1000 == 0 or done == total:
            progress("read documents", done, total)
    cut.tell("the index holds longer pieces")
