"""Settings to parts: the one place that picks classes by name."""

from __future__ import annotations

import os
from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import cache, partial
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, TypeVar, get_type_hints

from .console import check_settings, read_settings
from .errors import SettingsError
from .pipeline import Pipeline
from .types import Reader, Reranker, Retriever

if TYPE_CHECKING:
    from .models.bi_encoder import BiEncoder
    from .readers import TextGenerator
    from .stores.index import Index

Settings = TypeVar("Settings", bound="RetrievalSettings")
Progress2 = Callable[[int, int], None]


@dataclass(frozen=True, kw_only=True)
class RetrievalSettings:
    """How documents are found."""

    index: Path | None = None
    """The index folder."""
    retriever: Literal["bm25", "dense", "hybrid"] | None = None
    """What searches; hybrid if the index has both stores."""
    depth: int = 100
    """Hits that are retrieved, and reranked, for each question."""
    encoder: str | None = None
    """The encoder, by folder or name; the one named in the index if not given."""
    variant: Literal["lucene", "okapi", "l", "plus"] | None = None
    """The BM25 variant; the index's own if not given."""
    k1: float | None = None
    """BM25's k1: how soon repeated terms stop counting."""
    b: float | None = None
    """BM25's b: how much long documents are held back, 0 to 1."""
    delta: float | None = None
    """BM25L's and BM25+'s delta."""
    fusion: Literal["rrf", "weighted"] = "rrf"
    """How hybrid fuses: reciprocal ranks, or scaled scores."""
    bm25_weight: float = 0.5
    """The weight of BM25 in hybrid, 0 to 1; dense has the rest."""
    exact: bool = False
    """Search every vector, even where the index holds an approximate index."""
    reranker: str | None = None
    """A cross-encoder, by folder or name, or `generator`: the generator judges yes or no."""
    reranker_weight: float = 1.0
    """The weight of the reranker's scores, 0 to 1; those of the retrieval have the rest."""
    diversity: float = 0.0
    """Prefer hits that differ from one another (maximal marginal relevance), 0 to 1."""
    device: str | None = None
    """Where models run: cpu, cuda, mps; the best one here if not given."""
    precision: Literal["auto", "fp32", "bf16"] = "auto"
    """The models' number format."""
    generator: str = "SmolLM2-135M-Instruct"
    """The generator, by folder, GGUF file or name; with --server, its name there."""
    server: str | None = None
    """An OpenAI-compatible server's address, such as http://localhost:8000/v1. Its key is read from
    RAGKIT_API_KEY."""


@dataclass(frozen=True, kw_only=True)
class PipelineSettings(RetrievalSettings):
    """How documents are found and read."""

    virtual_tokens: Path | None = None
    """Virtual tokens, a folder that ragkit-train wrote: they stand in every prompt."""
    use_tokens: int | None = None
    """How many of the virtual tokens are used; all if not given, 0 for none."""
    prompt: str | None = None
    """The prompt's wording: ragkit, flashrag, spring or virtual-tokens; if not given, what the
    virtual tokens or the generator were trained with, or else ragkit."""
    layout: Literal["auto", "chat", "plain"] | None = None
    """Whether the generator's chat template is used; if not given, as the virtual tokens or the
    generator were trained, or else auto."""
    keep: int = 5
    """Hits that the reader is given; 0 answers without passages."""
    context_tokens: int = 2048
    """Tokens that the passages may take in the prompt."""
    max_new_tokens: int = 64
    """Tokens that an answer may take."""
    temperature: float = 0.0
    """0 takes the likeliest token always; above 0 answers are sampled."""
    seed: int = 0
    """The seed of sampling and of resampling."""


def load_pipeline(source: str | Path, **settings: Any) -> Pipeline:
    """Load a pipeline from an index folder, or from a TOML file of settings.

    Args:
        source: an index folder, or a file that holds `PipelineSettings` (its `index` and
            `virtual_tokens` relative to the file).
        settings: `PipelineSettings` by name; they override the file's.

    Raises:
        SettingsError: an unknown setting, a value of another type, or a file that is missing or
            has no `index`.
        IndexStateError: there is no index.
        ModelError: a model cannot be found or loaded.
    """
    source = Path(source)
    kinds = get_type_hints(PipelineSettings)
    check_settings(settings, kinds)
    values: dict[str, Any] = {"index": source}
    if source.suffix == ".toml" and not source.exists():
        raise SettingsError(f"{source}: there is no such file of settings")
    if source.is_file():
        values = read_settings(source, kinds)
        if "index" not in values:
            raise SettingsError(f'{source}: names no index (index = "…")')
        for name in values.keys() & {"index", "virtual_tokens"}:
            values[name] = source.parent / values[name]
    return assemble(PipelineSettings(**values | settings))


def assemble(
    settings: RetrievalSettings,
    index: Index | None = None,
    *,
    read: bool = True,
    progress: Progress2 = lambda done, total: None,
) -> Pipeline:
    """Build the pipeline that settings describe, over their index or one that is open already.

    Args:
        settings: what to build.
        index: the index; that of the settings if None.
        read: false leaves the reader out.
        progress: told how many answers are written, of how many.
    """
    if settings.depth < 1:
        raise SettingsError(f"depth must be at least 1, not {settings.depth}")
    if isinstance(settings, PipelineSettings) and settings.keep < 0:
        raise SettingsError(f"keep must be at least 0, not {settings.keep}")
    if not 0 <= (weight := settings.reranker_weight) <= 1 or (weight < 1 and not settings.reranker):
        raise SettingsError(f"reranker_weight {weight}: 0 to 1, and of a reranker: pass --reranker")
    index = index or open_index(settings)
    settings = resolved(settings, index)
    load = cache(partial(load_generator, settings))
    retriever = _retriever(settings, index)
    reranker = _reranker(settings, index, load)
    reader: Reader | None = None
    keep = settings.keep if isinstance(settings, PipelineSettings) else 5
    if read and isinstance(settings, PipelineSettings):
        reader = _reader(settings, load(), progress)
    return Pipeline(retriever, reranker, reader, retrieve=settings.depth, keep=keep)


def open_index(settings: RetrievalSettings) -> Index:
    """Open the index that settings name.

    Raises:
        SettingsError: they name none.
        IndexStateError: there is none.
    """
    from .stores.index import Index

    if settings.index is None:
        raise SettingsError("no index is named: pass --index FOLDER, or `index` in a settings file")
    return Index.open(settings.index)


def resolved(settings: Settings, index: Index) -> Settings:
    """Return settings with the index's own choices where they leave one to it."""
    values: dict[str, Any] = {"retriever": "hybrid" if len(index.stores) > 1 else index.stores[0]}
    if "bm25" in index.stores:
        bm25 = index.bm25.settings
        names = ("k1", "b", "delta") if settings.variant in (None, bm25.variant) else ()
        values["variant"] = bm25.variant
        values |= {name: getattr(bm25, name) for name in names}
    if "dense" in index.stores:
        values["encoder"] = index.manifest["encoder"]["name"]
    left = {name: value for name, value in values.items() if getattr(settings, name) is None}
    return replace(settings, **left)


def _retriever(settings: RetrievalSettings, index: Index) -> Retriever:
    from .retrievers import HybridRetriever

    name = settings.retriever
    if name == "bm25":
        return _bm25(settings, index)
    if name == "dense":
        return _dense(settings, index)
    if not 0 <= settings.bm25_weight <= 1:
        raise SettingsError(f"bm25_weight must lie in 0…1, not {settings.bm25_weight}")
    return HybridRetriever(
        [_bm25(settings, index), _dense(settings, index)],
        [settings.bm25_weight, 1 - settings.bm25_weight],
        fusion=settings.fusion,
    )


def _bm25(settings: RetrievalSettings, index: Index) -> Retriever:
    from .retrievers import Bm25Retriever

    given = {name: getattr(settings, name) for name in ("variant", "k1", "b", "delta")}
    changes = {name: value for name, value in given.items() if value is not None}
    return Bm25Retriever(index, replace(index.bm25.settings, **changes) if changes else None)


def _dense(settings: RetrievalSettings, index: Index) -> Retriever:
    from .retrievers import DenseRetriever

    return DenseRetriever(index, load_encoder(settings, index), exact=settings.exact)


def load_encoder(settings: RetrievalSettings, index: Index) -> BiEncoder:
    """Load the encoder that an index was built with, or the one that the settings name.

    Raises:
        IndexStateError: the index has no dense store.
    """
    from .models.bi_encoder import BiEncoder

    _ = index.dense
    built = index.manifest["encoder"]
    return BiEncoder.load(
        built["name"] if settings.encoder is None else settings.encoder,
        device=settings.device,
        max_length=built["max_length"],
        query_prompt=built["query_prompt"],
        document_prompt=built["document_prompt"],
        precision=settings.precision,
    )


def _reranker(
    settings: RetrievalSettings, index: Index, generator: Callable[[], TextGenerator]
) -> Reranker | None:
    from .rerankers import CrossEncoderReranker, DiversityReranker, GeneratorReranker

    reranker: Reranker | None = None
    if settings.reranker == "generator":
        if settings.server is not None:
            raise SettingsError("a generator behind a server cannot judge: it shows no likelihoods")
        judge: Any = generator()
        reranker = GeneratorReranker(judge, settings.reranker_weight)
    elif settings.reranker:
        from .models.cross_encoder import CrossEncoder

        model = CrossEncoder.load(
            settings.reranker, device=settings.device, precision=settings.precision
        )
        reranker = CrossEncoderReranker(model, settings.reranker_weight)
    if settings.diversity:
        return DiversityReranker(index, settings.diversity, reranker)
    return reranker


def _reader(settings: PipelineSettings, generator: TextGenerator, progress: Progress2) -> Reader:
    from .readers import GeneratorReader

    return GeneratorReader(
        generator,
        style=settings.prompt,
        use_tokens=settings.use_tokens,
        context_tokens=settings.context_tokens,
        max_new_tokens=settings.max_new_tokens,
        temperature=settings.temperature,
        seed=settings.seed,
        progress=progress,
    )


def load_generator(settings: RetrievalSettings) -> TextGenerator:
    """Load the generator that settings name, here or behind a server.

    Raises:
        ModelError: it cannot be found or loaded.
        SettingsError: it is behind a server, and is to have virtual tokens.
    """
    virtual_tokens = getattr(settings, "virtual_tokens", None)
    if settings.server is not None:
        if virtual_tokens is not None:
            raise SettingsError(
                "a generator behind a server takes no virtual tokens: they are embeddings, and it "
                "is sent text. Load the model here, without --server."
            )
        from .models.server import ServerGenerator

        key = os.environ.get("RAGKIT_API_KEY", "none")
        return ServerGenerator(settings.server, settings.generator, api_key=key)
    from .models.generator import Generator

    return Generator.load(
        settings.generator,
        device=settings.device,
        precision=settings.precision,
        layout=getattr(settings, "layout", None),
        virtual_tokens=virtual_tokens,
    )
