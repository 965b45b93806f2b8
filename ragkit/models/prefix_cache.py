"""Keys and values of what stands before virtual tokens, kept from one epoch to the next.

The model is causal and frozen, so that they depend on no virtual token: they are read once,
without gradients. Of passages in the order of their ranks, the first m begin as the first m + 1
do: one reading serves every m. Questions that have the same first passages share their reading.
"""

from __future__ import annotations

import logging
import tempfile
from collections.abc import Hashable, Sequence
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from transformers.cache_utils import Cache

from ..errors import ModelError
from .prefixes import Layers, common_length, extend, keeps_every_token, stack

_log = logging.getLogger(__name__)

_STRIDE = 32  # tokens: prefixes are known by their first 32, 64, …, to find one that begins alike


class PrefixCache:
    """Reads prefixes, and keeps their keys and values within a budget.

    What does not fit is read anew each time. What is kept first stays: epochs pass through all
    prefixes in turn, so that whatever was thrown out to make room would be missed sooner.

    Args:
        model: a frozen causal model that attends to tokens, through windows too; one that keeps a
            recurrent state instead cannot be cut back.
        budget: bytes of keys and values to keep; 0 keeps nothing.
        folder: where to keep them on disk, in a folder of its own that goes when the cache does;
            in main memory if None.

    Raises:
        ModelError: the model does not keep keys and values alone.
    """

    def __init__(self, model: Any, budget: int, folder: Path | None = None) -> None:
        if not keeps_every_token(model):
            raise ModelError(
                f"what {type(model).__name__} keeps of a text is not the keys and values of each "
                "token alone (a recurrent state, say), so that no prefix of it can be kept. Read "
                "rows whole: --gradient-checkpointing"
            )
        self._model = model
        self._left = budget
        self._kept: dict[Hashable, tuple[tuple[int, ...], Layers | Path]] = {}
        self._starts: dict[int, Hashable] = {}
        self._folder: tempfile.TemporaryDirectory[str] | None = None
        if folder is not None:
            self._folder = tempfile.TemporaryDirectory(dir=folder, prefix="prefixes.")
        self.read_tokens = 0
        self.kept_tokens = 0

    def rows(
        self,
        keys: Sequence[Hashable],
        prefixes: Sequence[Sequence[int]],
        lengths: Sequence[int] | None = None,
    ) -> Cache | None:
        """Return the prefixes' keys and values as one cache, padded on the left; None if all empty.

        Args:
            keys: what each prefix is kept under: it has most in common with the last one there;
                None keeps it not.
            prefixes: token ids of each row.
            lengths: how many of each row's tokens are wanted; all of them are kept.
        """
        wanted = list(map(len, prefixes)) if lengths is None else lengths
        if not any(wanted):
            return None
        read = [
            self._layers(key, tuple(ids)) if ids else []
            for key, ids in zip(keys, prefixes, strict=True)
        ]
        empty = next(layers for layers in read if layers)
        cut = [
            [(k[:, :, :length], v[:, :, :length]) for k, v in layers or empty]
            for layers, length in zip(read, wanted, strict=True)
        ]
        return stack(cut, 0)

    def _layers(self, key: Hashable, ids: tuple[int, ...]) -> Layers:
        had, kept = self._kept.get(key, ((), []))
        common, kept = self._alike(ids, common_length(had, ids), kept)
        layers = self._opened(kept, common)
        if common < len(ids):
            layers = extend(self._model, layers, ids, common)
            self.read_tokens += len(ids) - common
        if key is not None and len(ids) > len(had):
            self._keep(key, ids, layers, len(had))
        return layers

    def _alike(
        self, ids: tuple[int, ...], common: int, kept: Layers | Path
    ) -> tuple[int, Layers | Path]:
        """Return what is kept of any prefix that begins as `ids` do for longer than `common`."""
        for length in range(len(ids) // _STRIDE * _STRIDE, common, -_STRIDE):
            key = self._starts.get(hash(ids[:length]))
            if key in self._kept:
                other, layers = self._kept[key]
                if (alike := common_length(other, ids)) > common:
                    return alike, layers
        return common, kept

    def _opened(self, kept: Layers | Path, length: int) -> Layers:
        """Return the first `length` tokens' keys and values, on the model's device."""
        if not length:
            return []
        if isinstance(kept, Path):
            tensors = load_file(kept)
            kept = [
                (tensors[f"{number}.keys"], tensors[f"{number}.values"])
                for number in range(len(tensors) // 2)
            ]
        device = self._model.device
        return [
            (keys[:, :, :length].to(device), values[:, :, :length].to(device))
            for keys, values in kept
        ]

    def _keep(self, key: Hashable, ids: tuple[int, ...], layers: Layers, before: int) -> None:
        token = sum(tensor.nbytes for layer in layers for tensor in layer) // len(ids)
        cost = (len(ids) - before) * token
        if cost > self._left:
            return
        held = [(keys.cpu().contiguous(), values.cpu().contiguous()) for keys, values in layers]
        try:
            self._kept[key] = ids, held if self._folder is None else self._written(key, held)
        except (OSError, SafetensorError) as error:
            _log.warning("No more prefixes are kept: %s", error)
            self._left = 0
            return
        for length in range(_STRIDE, len(ids) + 1, _STRIDE):
            self._starts.setdefault(hash(ids[:length]), key)
        self._left -= cost
        self.kept_tokens += len(ids) - before

    def _written(self, key: Hashable, layers: Layers) -> Path:
        """Write keys and values in place of those under the same key."""
        assert self._folder is not None
        _, path = self._kept.get(key, ((), None))
        if not isinstance(path, Path):
            path = Path(self._folder.name) / f"{len(self._kept)}.safetensors"
        tensors: dict[str, torch.Tensor] = {}
        for number, (keys, values) in enumerate(layers):
            tensors |= {f"{number}.keys": keys, f"{number}.values": values}
        aside = path.with_suffix(".writing")
        save_file(tensors, aside)  # where the disk is full, what was kept before stays whole
        aside.replace(path)
        return path

    def close(self) -> None:
        """Forget everything, on disk too."""
        self._kept.clear()
        self._starts.clear()
        if self._folder is not None:
            self._folder.cleanup()
