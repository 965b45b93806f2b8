"""Retrieval-augmented generation whose every part can be trained.

The names here are the public ones; each is imported when it is first used, so that
`import ragkit` costs nothing. Parts and models have modules of their own: `ragkit.retrievers`,
`ragkit.rerankers`, `ragkit.readers`, `ragkit.models`, `ragkit.langchain`.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from .assemble import load_pipeline
    from .errors import (
        DataError,
        IndexStateError,
        MissingExtra,
        ModelError,
        RagkitError,
        SettingsError,
    )
    from .evaluation.runs import evaluate
    from .pipeline import Pipeline
    from .stores.index import Index
    from .types import Answer, Document, Example, Hit, Query

_HOMES = {
    "load_pipeline": "assemble",
    "DataError": "errors",
    "IndexStateError": "errors",
    "MissingExtra": "errors",
    "ModelError": "errors",
    "RagkitError": "errors",
    "SettingsError": "errors",
    "evaluate": "evaluation.runs",
    "Pipeline": "pipeline",
    "Index": "stores.index",
    "Answer": "types",
    "Document": "types",
    "Example": "types",
    "Hit": "types",
    "Query": "types",
}

__all__ = [  # noqa: RUF022 - sorted by home
    "load_pipeline",
    "DataError",
    "IndexStateError",
    "MissingExtra",
    "ModelError",
    "RagkitError",
    "SettingsError",
    "evaluate",
    "Pipeline",
    "Index",
    "Answer",
    "Document",
    "Example",
    "Hit",
    "Query",
    "__version__",
]


def __getattr__(name: str) -> Any:
    if name == "__version__":
        from importlib.metadata import version

        return version("ragkit")
    if name in _HOMES:
        return getattr(import_module(f".{_HOMES[name]}", __name__), name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted(__all__)
