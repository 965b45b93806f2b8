"""`ragkit-index build`: documents in, an index folder out."""

from __future__ import annotations

import os
import re
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal

from cyclopts import Parameter

from ragkit.console import print_json, progress_bars, say
from ragkit.corpus import Problem, read_documents
from ragkit.errors import SettingsError
from ragkit.types import Document

from .split import Splitter, checked_overlap
from .workers import check_workers, encoding, spread_of

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
    kind: Literal["auto", "flat", "hnsw", "ivf", "ivfpq"] = "flat"
    """The dense search: exact (flat), or an approximate index; auto goes by how many vectors."""
    codes: Literal["float32", "int8", "binary"] = "float32"
    """How the approximate index keeps vectors; with codes of less, flat is one too."""
    factory: str = ""
    """A FAISS factory string in place of --kind and --codes, such as IVF1024,PQ48."""
    search_parameters: str = ""
    """FAISS's parameters of the search, such as nprobe=32 or efSearch=256."""
    target_recall: float | None = None
    """Chooses these parameters, and --rescore unless that or a factory is given: the share of the
    best 10 to be found, such as .95."""
    rescore: int | None = None
    """Candidates a hit whose scores the float32 vectors tell: if not given 4 for int8, 16 for
    binary and ivfpq, 0 for a factory."""
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
    split_overlap: int | None = None
    """Tokens that a piece repeats of the one before it, at most, in whole sentences; if not given,
    an eighth of --split-tokens, and no more than 32."""
    on_error: Literal["stop", "skip"] = "stop"
    """What a record that cannot be read does: stop before anything is written, or skip it."""
    max_memory: str | None = None
    """The memory that the build may take, such as 2GB, beside encoding and the documents' ids."""
    replace: bool = False
    """Replace the index that is there."""
    device: str | None = None
    """Where the encoder runs: cpu, cuda, mps; the best one here if not given."""
    precision: Literal["auto", "fp32", "bf16"] = "auto"
    """The encoder's number format; auto takes bf16 where it is fast and the vectors agree."""
    workers: int = 1
    """Processes that encode: they share the cores, or take a GPU each."""
    ray: str | None = None
    """The Ray cluster whose --workers write the segments: its address, or local for one here."""


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
    say_problems(problems)
    summary = describe(index) | {"skipped": [str(problem) for problem in problems]}
    if json:
        print_json(summary)
    else:
        skipped = f", {len(problems)} records skipped" if problems else ""
        print(
            f"{settings.index}: {len(index):,} documents, stores {', '.join(index.stores)}, "
            f"{index.size() / 1e6:.1f} MB{skipped}"
        )


def say_problems(problems: list[Problem]) -> None:
    """Say which records were skipped, some of them one by one."""
    for problem in problems[:20]:
        say(f"skipped {problem}")
    if len(problems) > 20:
        say(f"… and {len(problems) - 20} more")


def build_index(corpus: list[Path], settings: BuildSettings, problems: list[Problem]) -> Index:
    """Read, split and index a corpus; what `--on-error skip` left out is added to `problems`."""
    from ragkit.stores.analysis import Analyser
    from ragkit.stores.ann_settings import AnnSettings
    from ragkit.stores.bm25 import Bm25Settings
    from ragkit.stores.build import check_build
    from ragkit.stores.index import Index

    stores = tuple(store.strip() for store in settings.stores.split(",") if store.strip())
    check_build(settings.index, stores, settings.replace)
    analyser = Analyser.of_language(settings.language)
    bm25 = Bm25Settings(settings.variant, settings.k1, settings.b, settings.delta)
    ann = AnnSettings(
        settings.kind,
        settings.factory,
        settings.search_parameters,
        settings.codes,
        settings.rescore,
        settings.target_recall,
    )
    checked_overlap(settings.split_tokens, settings.split_overlap)
    max_memory = bytes_of(settings.max_memory) if settings.max_memory else None
    check_workers(settings.workers)
    encoder = load_encoder(settings) if "dense" in stores else None
    split = Splitter(settings.split_tokens, settings.split_overlap, encoder, analyser.code)

    def pieces() -> Iterator[Document]:
        yield from split(read_documents(corpus, on_error=settings.on_error, problems=problems))
        split.tell()

    with ExitStack() as stack:
        stack.enter_context(telling_of_kept(settings.index))
        spread = stack.enter_context(spread_of(settings, encoder)) if settings.ray else None
        workers = 1 if spread else settings.workers
        encodes = stack.enter_context(encoding(encoder, workers))
        progress = stack.enter_context(progress_bars())
        return Index.build(
            settings.index,
            pieces(),
            encoder=encodes,
            stores=stores,
            analyser=analyser,
            bm25=bm25,
            ann=ann,
            replace=settings.replace,
            settings={
                "corpus": [os.fsencode(path).decode(errors="backslashreplace") for path in corpus],
                "split_tokens": split.tokens,
                "split_overlap": split.overlap,
                "language": settings.language,
            },
            max_memory=max_memory,
            spread=spread,
            progress=progress,
        )


def bytes_of(size: str) -> int:
    """Return the bytes that a size such as 2GB, 800MB or 1.5GiB names.

    Raises:
        SettingsError: it names none.
    """
    units = {"": 0, "K": 10, "M": 20, "G": 30, "T": 40}
    found = re.fullmatch(r"([0-9]{0,15}\.?[0-9]{1,15}) ?([KMGT]?)(i?)B?", size, re.IGNORECASE)
    if not found:
        raise SettingsError(f"--max-memory {size!r} is no size; write it as 2GB or 800MB")
    number, unit, binary = found.groups()
    power = units[unit.upper()]
    return int(float(number) * (1 << power if binary else 10 ** (3 * power // 10)))


@contextmanager
def telling_of_kept(index: Path) -> Iterator[None]:
    """Tell, where work on an index is stopped, that what was encoded is kept."""
    try:
        yield
    except BaseException:
        from ragkit.stores.folder import partials

        if partials(index):
            say(f"{index} keeps the vectors made so far: the same command goes on from there.")
        raise


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


def describe(index: Index) -> dict[str, Any]:
    """Return what an index holds, for people and programs.

    `deleted_rows` are those of deleted documents, which segments hold until they are compacted, and
    `uncovered` the documents that are not in the approximate index.
    """
    from ragkit.stores.ann_settings import search_settings
    from ragkit.stores.compact import uncovered

    manifest = index.manifest
    summary: dict[str, Any] = {
        "index": str(index.path),
        "documents": len(index),
        "segments": len(manifest["segments"]),
        "deleted_rows": index.live.held[-1] - len(index),
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
        summary["encoder"] = {key: encoder.get(key) for key in (*kept, "fingerprint")}
        summary["ann"] = manifest["ann"].get("built") or "flat"
        if manifest["ann"].get("file"):
            summary["search"] = dict(
                zip(("parameters", "rescore"), search_settings(manifest["ann"]), strict=True)
            )
        summary["uncovered"] = uncovered(index)
    return summary
