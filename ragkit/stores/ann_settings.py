"""Which approximate index is built over embeddings, and how it is searched."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, fields
from typing import Any, Literal, TypeAlias, get_args

from ..errors import SettingsError

Kind: TypeAlias = Literal["auto", "flat", "hnsw", "ivf", "ivfpq"]
KINDS: tuple[Kind, ...] = get_args(Kind)
Codes: TypeAlias = Literal["float32", "int8", "binary"]
CODES: dict[Codes, str] = {"float32": "Flat", "int8": "SQ8", "binary": "RaBitQ"}

_FLAT_BELOW, _PQ_FROM = 50_000, 5_000_000  # vectors: what auto takes
_PQ_LEAST = 64  # vectors: fewer are searched exactly
_AUTO_RECALL = 0.95
_RESCORED = {"Flat": 0, "SQ8": 4, "RaBitQ": 16, "PQ": 16}
_TRAINING_VECTORS_PER_LIST = 64


@dataclass(frozen=True, slots=True)
class AnnSettings:
    """Which FAISS index is built over the embeddings, and how it is searched.

    `kind` is `flat` (all vectors), `hnsw` (a graph), `ivf` (inverted lists), `ivfpq` (lists of
    product-quantised vectors), or `auto`, which goes by how many vectors there are: exact search,
    lists of int8 vectors, product-quantised ones. `factory` is a FAISS factory string, such as
    `IVF1024,PQ48` or `HNSW32,SQ8`, that takes its place. `search` sets FAISS's parameters for the
    search (`nprobe=32`, `efSearch=256`, comma-separated); `target_recall` has them chosen, when the
    index is built, such that this share of the best 10 is found.

    `codes` is how the approximate index keeps vectors: `float32`, `int8` (a byte a component), or
    `binary` (a bit a component, RaBitQ: Gao and Long, SIGMOD 2024). Coded vectors only choose
    candidates, `rescore` times as many as hits are wanted, and the float32 embeddings tell their
    scores: 4 times for int8, 16 for binary and ivfpq, unless it is given; 0 takes the codes' own
    scores.
    """

    kind: Kind = "flat"
    factory: str = ""
    search: str = ""
    codes: Codes = "float32"
    rescore: int | None = None
    target_recall: float | None = None

    def __post_init__(self) -> None:
        """Refuse unknown names, and what does not go together.

        Raises:
            SettingsError: it says what, and what to do.
        """
        if self.kind not in KINDS:
            raise SettingsError(f"unknown kind {self.kind!r}; known are {', '.join(KINDS)}")
        if self.codes not in CODES:
            raise SettingsError(f"unknown codes {self.codes!r}; known are {', '.join(CODES)}")
        coded = self.codes != "float32"
        if coded and (self.factory or self.kind in ("ivfpq", "auto")):
            chosen = f"factory {self.factory!r}" if self.factory else f"kind {self.kind}"
            raise SettingsError(f"the {chosen} has codes of its own; leave {self.codes} out")
        if self.codes == "binary" and self.kind == "hnsw":
            raise SettingsError("FAISS has no graph of binary codes: take ivf or flat, or int8")
        approximate = bool(self.factory) or self.kind != "flat" or coded
        for name, value in (("search parameters", self.search), ("rescoring", self.rescore),
                            ("target recall", self.target_recall)):  # fmt: skip
            if value and not approximate:
                raise SettingsError(
                    f"the {name} {value!r} is of an approximate index; exact search (flat) has "
                    "none. Choose another kind, or leave it out."
                )
        whole = self.rescore is None or type(self.rescore) is int
        if not whole or not 0 <= (self.rescore or 0) <= 1000:
            raise SettingsError(f"rescoring takes 0 to 1000 candidates a hit, not {self.rescore}")
        if self.target_recall is not None and not 0 < self.target_recall <= 1:
            raise SettingsError(
                f"the target recall is above 0 and at most 1, not {self.target_recall}"
            )
        if self.search and self.target_recall:
            raise SettingsError(
                f"a target recall chooses the search parameters: leave {self.search!r} out, or it"
            )

    def factory_for(self, vectors: int, dimension: int) -> str:
        """Return the FAISS factory string for so many vectors; empty for exact search."""
        if self.factory:
            return self.factory
        kind, codes = self.kind, CODES[self.codes]
        if kind == "auto":
            kind = "flat" if vectors < _FLAT_BELOW else "ivf" if vectors < _PQ_FROM else "ivfpq"
            codes = "Flat" if kind == "flat" else "SQ8"
        if kind == "ivfpq" and vectors < _PQ_LEAST:
            return ""
        if kind == "flat":
            return "" if codes == "Flat" else codes
        if kind == "hnsw":
            return f"HNSW32,{codes}"
        if kind == "ivfpq":
            codes = f"PQ{_parts(dimension)}x4fs"
        lists = max(1, min(round(4 * vectors**0.5), vectors // _TRAINING_VECTORS_PER_LIST))
        return f"IVF{lists},{codes}"

    def rescored(self, factory: str) -> int:
        """Return how many candidates a hit of this factory's index are scored again, 0 for none."""
        if self.rescore is not None:
            return self.rescore
        if self.factory:
            return 0
        return next(times for code, times in _RESCORED.items() if code in factory)

    def recall_wanted(self) -> float | None:
        """Return the share of the best 10 that the search is tuned to find, if it is."""
        ours = self.kind == "auto" and not self.factory and not self.search
        return self.target_recall or (_AUTO_RECALL if ours else None)


def _parts(dimension: int) -> int:
    """Return into how many parts product quantisation divides vectors: of 4 components or more."""
    return next(n for n in range(max(1, dimension // 4), 0, -1) if dimension % n == 0)


def ann_settings(kept: Mapping[str, Any]) -> AnnSettings:
    """Return the settings that a manifest keeps as `ann`."""
    names = {field.name for field in fields(AnnSettings)}
    return AnnSettings(**{name: value for name, value in kept.items() if name in names})


def search_settings(kept: Mapping[str, Any]) -> tuple[str, int]:
    """Return FAISS's search parameters and how many candidates a hit are scored again.

    Args:
        kept: what a manifest keeps as `ann`, of an approximate index.
    """
    if tuned := kept.get("tuned"):
        return str(tuned["search"]), int(tuned["rescore"])
    factory = kept.get("built") or kept.get("factory") or "Flat"
    return str(kept["search"]), ann_settings(kept).rescored(factory)
