"""`ragkit-index build`: documents in, an index folder out."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal

from cyclopts import Parameter

from ragkit.console import print_json, progress_bars, say
from ragkit.corpus import Problem, read_documents
from ragkit.errors import SettingsError
from ragkit.types import Document

if TYPE_CHECKING:
    from ragkit.models.bi_encoder import BiEncoder
    from ragkit.stores.index import Index

    from .refresh import RefreshSettings


@Parameter(name="*")
@dataclass(frozen=True, kw_only=True)
class BuildSettings:
    """What is built, and how."""

    index: Path
    """The folder for the index."""
    stores: str = "bm25,dense"
    """What is built: bm25, dense or both."""
    encoder: str = "all-MiniLM-L6-v2"
    """The encoder of the dense store, by folder or name."""
    query_prompt: str | None = None
    """Put before each query; the encoder's own if not given."""
    document_prompt: str | None = None
    """Put before each document; the encoder's own if not given."""
    max_length: int | None = None
    """Tokens of a document that the encoder reads; its own limit if not given."""
    kind: Literal["flat", "hnsw", "ivf"] = "flat"
    """The dense search: exact (flat), or an approximate index."""
    factory: str = ""
    """A FAISS factory string in place of --kind, such as IVF1024,PQ48."""
    search_parameters: str = ""
    """FAISS's parameters of the search, such as nprobe=32 or efSearch=256."""
    language: str = "english"
    """BM25's stemmer and stop words (none for neither), and whose sentences are told apart."""
    variant: Literal["lucene", "okapi", "l", "plus"] = "lucene"
    """The BM25 variant that searches use unless told otherwise."""
    k1: float = 1.2
    """BM25's k1: how soon repeated terms stop counting."""
    b: float = 0.75
    """BM25's b: how much long documents are held back, 0 to 1."""
    delta: float | None = None
    """BM25L's and BM25+'s delta; the variant's own if not given."""
    split_tokens: int = 256
    """Longer documents are split at sentence ends (sooner if the encoder reads less); 0: none."""
    split_overlap: int = 32
    """Tokens that a piece repeats of the one before it, at most, in whole sentences."""
    on_error: Literal["stop", "skip"] = "stop"
    """What a record that cannot be read does: stop before anything is written, or skip it."""
    replace: bool = False
    """Replace the index that is there."""
    device: str | None = None
    """Where the encoder runs: cpu, cuda, mps; the best one here if not given."""
    precision: Literal["auto", "fp32", "bf16"] = "auto"
    """The encoder's number format; auto takes bf16 where it is fast and the vectors agree."""


def build(
    corpus: Annotated[list[Path], Parameter(negative="")],
    /,
    *,
    settings: BuildSettings,
    json: bool = False,
) -> None:
    """Build an index over files and folders of documents.

    Example: ragkit-index build papers/ notes.jsonl --index kb

    Parameters
    ----------
    corpus
        Files (.jsonl .jsonl.gz .tsv .csv .json .txt .md .html .pdf .docx) and folders of them.
    json
        Print what was built as JSON.
    """
    problems: list[Problem] = []
    index = build_index(corpus, settings, problems)
    for problem in problems[:20]:
        say(f"skipped {problem}")
    if len(problems) > 20:
        say(f"… and {len(problems) - 20} more")
    summary = describe(index) | {"skipped": [str(problem) for problem in problems]}
    if json:
        print_json(summary)
    else:
        skipped = f", {len(problems)} records skipped" if problems else ""
        print(
            f"{settings.index}: {len(index):,} documents, stores {', '.join(index.stores)}, "
            f"{index.size() / 1e6:.1f} MB{skipped}"
        )


def build_index(corpus: list[Path], settings: BuildSettings, problems: list[Problem]) -> Index:
    """Read, split and index a corpus; what `--on-error skip` left out is added to `problems`."""
    from ragkit.stores.analysis import Analyser
    from ragkit.stores.ann import AnnSettings
    from ragkit.stores.bm25 import Bm25Settings
    from ragkit.stores.build import check_build
    from ragkit.stores.index import Index

    stores = tuple(store.strip() for store in settings.stores.split(",") if store.strip())
    check_build(settings.index, stores, settings.replace)
    analyser = Analyser.of_language(settings.language)
    bm25 = Bm25Settings(settings.variant, settings.k1, settings.b, settings.delta)
    ann = AnnSettings(settings.kind, settings.factory, settings.search_parameters)
    _check_split(settings)
    encoder = load_encoder(settings) if "dense" in stores else None
    settings = _fitted(settings, encoder)
    with progress_bars() as progress:
        documents = read_documents(corpus, on_error=settings.on_error, problems=problems)
        return Index.build(
            settings.index,
            _split(documents, settings, encoder, analyser.code),
            encoder=encoder,
            stores=stores,
            analyser=analyser,
            bm25=bm25,
            ann=ann,
            replace=settings.replace,
            settings={
                "corpus": [str(path) for path in corpus],
                "split_tokens": settings.split_tokens,
                "split_overlap": settings.split_overlap,
            },
            progress=progress,
        )


def load_encoder(settings: BuildSettings | RefreshSettings) -> BiEncoder:
    """Load the encoder that settings name, with their prompts and length.

    Raises:
        ModelError: it cannot be found or loaded.
        SettingsError: there is no such device here.
    """
    from ragkit.models.bi_encoder import BiEncoder

    return BiEncoder.load(
        settings.encoder,
        device=settings.device,
        max_length=settings.max_length,
        query_prompt=settings.query_prompt,
        document_prompt=settings.document_prompt,
        precision=settings.precision,
    )


def _check_split(settings: BuildSettings) -> None:
    """Refuse what `split` refuses before an encoder is loaded."""
    from ragkit.splitting import split

    if settings.split_tokens:
        split((), max_tokens=settings.split_tokens, overlap=settings.split_overlap)


def _fitted(settings: BuildSettings, encoder: BiEncoder | None) -> BuildSettings:
    """Return the settings with pieces that the encoder reads whole."""
    if not encoder or not settings.split_tokens or encoder.document_window >= settings.split_tokens:
        return settings
    window = checked_window(encoder)
    overlap = min(settings.split_overlap, window // 2 - 1)
    return replace(settings, split_tokens=window, split_overlap=overlap)


def checked_window(encoder: BiEncoder) -> int:
    """Return how many tokens of a document an encoder reads.

    Raises:
        SettingsError: they are too few to be of use.
    """
    window = encoder.document_window
    if window < 8:
        raise SettingsError(
            f"the encoder reads {encoder.max_length} tokens, of which {window} are left for the "
            "document; 8 are needed. Raise --max-length, or shorten --document-prompt."
        )
    return window


def _split(
    documents: Iterator[Document], settings: BuildSettings, encoder: BiEncoder | None, code: str
) -> Iterator[Document]:
    from ragkit.splitting import split

    if settings.split_tokens:
        documents = split(
            documents,
            max_tokens=settings.split_tokens,
            overlap=settings.split_overlap,
            tokenize=encoder.spans if encoder else None,
            language=code,
        )
    if not encoder:
        return documents
    if settings.split_tokens:  # of what was split only a long title is too long
        return watched(documents, encoder, "their titles are long", lambda d: 2 * len(d.title))
    return watched(documents, encoder, "nothing was split", lambda d: len(d.contents))


def watched(
    documents: Iterable[Document], encoder: BiEncoder, why: str, length: Callable[[Document], int]
) -> Iterator[Document]:
    """Pass documents on, and tell at the end how many the encoder will not read whole, and why.

    `length` tells how many characters to suspect a document by; a token has one at least.
    """
    window, cut, total = encoder.document_window, 0, 0
    for document in documents:
        total += 1
        cut += length(document) > window and len(encoder.spans(document.contents)) > window
        yield document
    if cut:
        say(
            f"{cut} of {total} documents are longer than the {window} tokens that the encoder "
            f"reads ({why}): the dense store knows only their beginnings"
        )


def describe(index: Index) -> dict[str, Any]:
    """Return what an index holds, for people and programs."""
    manifest = index.manifest
    summary: dict[str, Any] = {
        "index": str(index.path),
        "documents": len(index),
        "segments": len(manifest["segments"]),
        "stores": list(index.stores),
        "bytes": index.size(),
        "format": manifest["format"],
        "ragkit": manifest["ragkit"],
        "settings": manifest["settings"],
    }
    if "bm25" in index.stores:
        summary["bm25"] = manifest["bm25"] | {"analyser": manifest["analyser"]}
    if "dense" in index.stores:
        encoder = manifest["encoder"]
        kept = ("name", "dimension", "max_length", "similarity", "query_prompt", "document_prompt")
        summary["encoder"] = {key: encoder[key] for key in (*kept, "fingerprint")}
        summary["ann"] = manifest["ann"].get("built") or "flat"
    return summary
