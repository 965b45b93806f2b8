"""The bi-encoder: texts to vectors, through any sentence-transformers model."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, nullcontext
from functools import cached_property
from typing import Any, Self

import numpy as np
import torch
from numpy.typing import NDArray
from safetensors import SafetensorError
from sentence_transformers import SentenceTransformer
from sentence_transformers.base.modules import Router

from ..artefacts import fingerprint
from ..errors import ModelError
from .names import resolve
from .precision import (
    Precision,
    batches,
    check_device,
    check_precision,
    has_bf16,
    weights_hash,
    without_bars,
)

AGREEMENT = 0.9995  # the cosine below which bf16 vectors do not pass for fp32's
_PROBES = 16


class BiEncoder:
    """Encodes queries and documents into vectors that are compared by inner product.

    Vectors of a model whose similarity is the cosine are normalised here.

    Args:
        model: any sentence-transformers model.
        name: the name that was asked for; kept in the index's manifest.
        query_prompt: put before each query; the model's own `query` prompt if None.
        document_prompt: put before each document; the model's own if None.
        precision: `fp32`, `bf16`, or `auto`: bf16 if the processor multiplies it in hardware and
            the vectors of a sample agree with fp32's (cosine of at least 0.9995).
        batch_tokens: the tokens in a padded batch.

    Raises:
        ModelError: the model compares vectors by something other than cosine or inner product.
    """

    def __init__(
        self,
        model: SentenceTransformer,
        name: str = "",
        *,
        query_prompt: str | None = None,
        document_prompt: str | None = None,
        precision: Precision = "auto",
        batch_tokens: int = 4096,
    ) -> None:
        check_precision(precision)
        if model.similarity_fn_name not in ("cosine", "dot"):
            raise ModelError(
                f"encoder {name!r} compares vectors by {model.similarity_fn_name}; "
                "ragkit searches by cosine or inner product"
            )
        self.model = model.eval()
        self.name = name
        own = model.prompts or {}
        passage = own.get("document") or own.get("passage")
        self.query_prompt: str = own.get("query") or "" if query_prompt is None else query_prompt
        self.document_prompt: str = passage or "" if document_prompt is None else document_prompt
        self._precision = precision
        self._batch_tokens = batch_tokens
        self._half: bool | None = {"fp32": False, "bf16": True}.get(precision)

    @classmethod
    def load(
        cls,
        name: str,
        *,
        device: str | None = None,
        max_length: int | None = None,
        query_prompt: str | None = None,
        document_prompt: str | None = None,
        precision: Precision = "auto",
    ) -> Self:
        """Load an encoder by folder, embedded name or hub name.

        Raises:
            ModelError: it cannot be found or loaded.
            SettingsError: there is no such device here.
        """
        device = check_device(device)
        try:
            with without_bars():
                model = SentenceTransformer(resolve(name), device=device)
        except (OSError, ValueError, SafetensorError) as error:
            raise ModelError(f"encoder {name!r} cannot be loaded: {error}") from error
        if max_length is not None:
            model.max_seq_length = max_length
        return cls(
            model,
            name,
            query_prompt=query_prompt,
            document_prompt=document_prompt,
            precision=precision,
        )

    @property
    def dimension(self) -> int:
        """The vectors' number of components."""
        dimension = self.model.get_embedding_dimension()
        if dimension is None:
            raise ModelError(f"encoder {self.name!r} does not tell the dimension of its vectors")
        return int(dimension)

    @property
    def max_length(self) -> int:
        """The tokens of a text that the model sees; what follows is cut."""
        return int(self.model.max_seq_length or 512)

    @property
    def document_window(self) -> int:
        """The tokens of a document that the model sees, beside its prompt and special tokens."""
        tokenizer: Any = self.model.tokenizer
        return self.max_length - len(tokenizer(self.document_prompt)["input_ids"])

    def encode_queries(self, texts: Sequence[str]) -> NDArray[np.float32]:
        """Return the queries' vectors, float32 of shape [texts, dimension]."""
        return self._encode(texts, self.model.encode_query, self.query_prompt)

    def encode_documents(
        self, texts: Sequence[str], *, progress: Callable[[int], None] = lambda done: None
    ) -> NDArray[np.float32]:
        """Return the documents' vectors, float32 of shape [texts, dimension].

        `progress` is told how many texts are done.
        """
        return self._encode(texts, self.model.encode_document, self.document_prompt, progress)

    def spans(self, text: str) -> list[tuple[int, int]]:
        """Return the characters that each token of a text covers, as (start, end)."""
        tokenizer: Any = self.model.tokenizer
        encoded = tokenizer(
            text,
            add_special_tokens=False,
            truncation=False,
            return_offsets_mapping=True,
            verbose=False,
        )
        return [(start, end) for start, end in encoded["offset_mapping"] if end > start]

    def describe(self) -> dict[str, Any]:
        """Return name, settings and `fingerprint`: equal fingerprints mean the same vectors.

        An encoder that reads queries in a way of their own tells under `base` the fingerprint of
        the encoder whose documents' side it has: it searches the index of that one.
        """
        told = {"name": self.name, **self._identity, "fingerprint": fingerprint(self._identity)}
        modules: Any = list(self.model)
        plain: list[Any] = []
        for module in modules:
            of: Any = module.sub_modules["document"] if isinstance(module, Router) else [module]
            plain += of
        if len(plain) > len(modules) or any(isinstance(module, Router) for module in modules):
            told["base"] = self._like(plain).describe()["fingerprint"]
        return told

    def _like(self, modules: list[Any]) -> BiEncoder:
        model = SentenceTransformer(
            modules=modules,
            device=str(self.model.device),
            similarity_fn_name=self.model.similarity_fn_name,
        )
        return BiEncoder(
            model,
            query_prompt=self.query_prompt,
            document_prompt=self.document_prompt,
            precision="fp32",
        )

    @cached_property
    def _identity(self) -> dict[str, Any]:
        modules = list(self.model)
        return {
            "weights": weights_hash(self.model.state_dict()),
            "modules": [
                [type(module).__name__, getattr(module, "get_config_dict", dict)()]
                for module in modules[1:]
            ],
            "max_length": self.max_length,
            "query_prompt": self.query_prompt,
            "document_prompt": self.document_prompt,
            "similarity": self.model.similarity_fn_name,
            "dimension": self.dimension,
        }

    def _encode(
        self,
        texts: Sequence[str],
        encode: Callable[..., Any],
        prompt: str,
        progress: Callable[[int], None] = lambda done: None,
    ) -> NDArray[np.float32]:
        out, done = np.empty((len(texts), self.dimension), np.float32), 0
        half = self._use_half(texts, encode, prompt)
        for batch in self._batches(texts):
            out[batch] = self._run([texts[i] for i in batch], encode, prompt, half)
            done += len(batch)
            progress(done)
        return out

    def _batches(self, texts: Sequence[str]) -> list[list[int]]:
        return list(batches(self._lengths(texts), self._batch_tokens))

    def document_batches(self, texts: Sequence[str]) -> tuple[list[list[int]], bool]:
        """Return the batches in which `encode_documents` reads texts, and whether in bf16."""
        half = self._use_half(texts, self.model.encode_document, self.document_prompt)
        return self._batches(texts), half

    def encode_batch(self, texts: list[str], half: bool) -> NDArray[np.float32]:
        """Encode one of the batches that `document_batches` tells of, in bf16 or fp32."""
        return self._run(texts, self.model.encode_document, self.document_prompt, half)

    def _run(
        self, texts: list[str], encode: Callable[..., Any], prompt: str, half: bool
    ) -> NDArray[np.float32]:
        device = self.model.device.type
        context: AbstractContextManager[Any] = (
            torch.autocast(device, torch.bfloat16) if half else nullcontext()
        )
        with context:
            vectors = encode(
                texts,
                prompt=prompt,
                batch_size=len(texts),
                show_progress_bar=False,
                convert_to_tensor=True,
            ).float()
        if self.model.similarity_fn_name == "cosine":
            vectors = torch.nn.functional.normalize(vectors, dim=-1)
        array: NDArray[np.float32] = vectors.cpu().numpy()
        return array

    def _lengths(self, texts: Sequence[str]) -> list[int]:
        if not texts:
            return []
        tokenizer: Any = self.model.tokenizer
        encoded = tokenizer(list(texts), truncation=True, max_length=self.max_length)
        return [len(ids) for ids in encoded["input_ids"]]

    def _use_half(self, texts: Sequence[str], encode: Callable[..., Any], prompt: str) -> bool:
        """Decide once, on the first texts worth the trial, whether bf16 vectors agree."""
        if self._half is not None:
            return self._half
        if not has_bf16(self.model.device.type):
            self._half = False
        elif len(texts) < 4 * _PROBES:
            return False
        else:
            sample = [texts[i] for i in range(0, len(texts), len(texts) // _PROBES)][:_PROBES]
            exact = self._run(sample, encode, prompt, half=False)
            fast = self._run(sample, encode, prompt, half=True)
            norms = np.linalg.norm(exact, axis=1) * np.linalg.norm(fast, axis=1)
            self._half = bool(((exact * fast).sum(axis=1) >= AGREEMENT * norms).all())
        return self._half
