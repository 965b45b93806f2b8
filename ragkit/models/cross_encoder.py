"""The cross-encoder: a query and a text read together, to one score."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, nullcontext
from functools import cached_property
from itertools import islice
from pathlib import Path
from typing import Any, Self

import numpy as np
import sentence_transformers
import torch
from numpy.typing import NDArray
from safetensors import SafetensorError

from ..artefacts import fingerprint, read_json, write_json
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

_SLICE = 1024  # pairs that are scored before their scores are kept


class CrossEncoder:
    """Scores (query, text) pairs, through any sentence-transformers CrossEncoder of one output.

    Args:
        model: the model.
        name: the name that was asked for.
        precision: `fp32`, `bf16`, or `auto`: bf16 if the processor multiplies it in hardware.
        batch_tokens: the tokens in a padded batch.

    Raises:
        ModelError: the model gives several scores for a pair.
    """

    def __init__(
        self,
        model: sentence_transformers.CrossEncoder,
        name: str = "",
        *,
        precision: Precision = "auto",
        batch_tokens: int = 8192,
    ) -> None:
        check_precision(precision)
        if model.num_labels != 1:
            raise ModelError(
                f"cross-encoder {name!r} gives {model.num_labels} scores for a pair; "
                "a reranker gives one"
            )
        self.model = model.eval()
        self.name = name
        self._half = precision == "bf16" or (precision == "auto" and has_bf16(model.device.type))
        self._batch_tokens = batch_tokens

    @classmethod
    def load(cls, name: str, *, device: str | None = None, precision: Precision = "auto") -> Self:
        """Load a cross-encoder by folder or hub name.

        Raises:
            ModelError: it cannot be found or loaded.
            SettingsError: there is no such device here.
        """
        device = check_device(device)
        try:
            with without_bars():
                model = sentence_transformers.CrossEncoder(resolve(name), device=device)
        except (OSError, ValueError, SafetensorError) as error:
            raise ModelError(f"cross-encoder {name!r} cannot be loaded: {error}") from error
        return cls(model, name, precision=precision)

    def score(self, pairs: Sequence[tuple[str, str]]) -> NDArray[np.float32]:
        """Return each pair's score, float32 of shape [pairs]; higher is more relevant.

        A score is what the model gives before any activation: log-odds where it was trained by
        binary cross-entropy. A sigmoid of it would make what is very relevant equal, and is no
        score to learn from.
        """
        out = np.empty(len(pairs), np.float32)
        if not pairs:
            return out
        tokenizer: Any = self.model.tokenizer
        queries, texts = zip(*pairs, strict=True)
        lengths = [
            len(ids)
            for ids in tokenizer(
                list(queries), list(texts), truncation=True, max_length=self.model.max_seq_length
            )["input_ids"]
        ]
        context: AbstractContextManager[Any] = (
            torch.autocast(self.model.device.type, torch.bfloat16) if self._half else nullcontext()
        )
        with context:
            for batch in batches(lengths, self._batch_tokens):
                out[batch] = self.model.predict(
                    [pairs[i] for i in batch],
                    batch_size=len(batch),
                    show_progress_bar=False,
                    activation_fn=torch.nn.Identity(),
                )
        return out

    @cached_property
    def fingerprint(self) -> str:
        """One hash of all that scores depend on: equal fingerprints mean the same scores."""
        return fingerprint(
            {
                "weights": weights_hash(self.model.state_dict()),
                "max_length": self.model.max_seq_length,
                "bf16": self._half,
            }
        )


class KeptScores:
    """A cross-encoder whose scores are kept on disk as they are made: no pair is scored twice.

    Args:
        model: the cross-encoder.
        folder: where scores are kept, those of each model apart.
    """

    def __init__(self, model: CrossEncoder, folder: Path) -> None:
        self._model = model
        self._folder = folder / model.fingerprint
        self._folder.mkdir(parents=True, exist_ok=True)
        self._kept: dict[str, float] = {}
        for path in sorted(self._folder.glob("*.json")):
            self._kept |= read_json(path)

    def score(
        self,
        pairs: Sequence[tuple[str, str]],
        *,
        progress: Callable[[int], None] = lambda done: None,
    ) -> NDArray[np.float32]:
        """Return each pair's score, float32 of shape [pairs]; higher is more relevant.

        `progress` is told how many pairs are done.
        """
        keys = [fingerprint(list(pair)) for pair in pairs]
        new = {key: pair for key, pair in zip(keys, pairs, strict=True) if key not in self._kept}
        items, done = iter(new.items()), len(pairs) - len(new)
        while part := dict(islice(items, _SLICE)):
            progress(done)
            done += len(part)
            scores = self._model.score(list(part.values())).tolist()
            made = dict(zip(part, scores, strict=True))
            write_json(self._folder / f"{fingerprint(list(part))}.json", made)
            self._kept |= made
        progress(len(pairs))
        return np.array([self._kept[key] for key in keys], np.float32)
