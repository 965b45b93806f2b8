"""Caches of keys and values: prompts that begin alike are read once, and steps copy nothing."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from itertools import pairwise
from typing import Any, TypeAlias

import torch
from transformers.cache_utils import (
    Cache,
    DynamicCache,
    DynamicLayer,
    DynamicSlidingWindowLayer,
)

from .precision import batches

Layers: TypeAlias = list[tuple[torch.Tensor, torch.Tensor]]
"""Keys and values of each layer, each of shape [rows, heads, tokens, size]."""

_SAVED = 0.5  # the share of tokens from which a GPU reads row by row faster than padded
_ROWS = 64  # in a batch, at most
_CACHE_BYTES = (
    2 << 30
)  # of a batch's keys and values: the more rows, the fewer times weights pass by


class RoomyLayer(DynamicLayer):
    """A cache layer with room for what will be generated.

    `DynamicLayer` copies all keys and values at each step; this one writes the new ones behind
    those it has. The values it gives are the same.

    Args:
        room: the tokens that will be written after the first ones.
    """

    def __init__(self, room: int) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self._room = room
        self._buffers: list[torch.Tensor] = []

    def update(
        self, key_states: torch.Tensor, value_states: torch.Tensor, *_: Any, **__: Any
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Append keys and values, each of shape [rows, heads, tokens, size], and return all."""
        start = self.get_seq_length() if self._buffers else 0
        end = start + key_states.shape[2]
        if not self._buffers:
            self.lazy_initialization(key_states, value_states)
            self._buffers = [
                states.new_empty((*states.shape[:2], end + self._room, states.shape[3]))
                for states in (key_states, value_states)
            ]
        elif end > self._buffers[0].shape[2]:
            more = (0, 0, 0, end + self._room - self._buffers[0].shape[2])
            self._buffers = [torch.nn.functional.pad(buffer, more) for buffer in self._buffers]
        for buffer, states in zip(self._buffers, (key_states, value_states), strict=True):
            buffer[:, :, start:end] = states
        self.keys, self.values = (buffer[:, :, :end] for buffer in self._buffers)
        return self.keys, self.values


def roomy_cache(model: Any, room: int) -> Cache | None:
    """Return an empty cache with room for `room` generated tokens; None for other cache kinds."""
    layers = DynamicCache(config=model.config).layers
    if not all(type(layer) is DynamicLayer for layer in layers):
        return None
    return Cache(layers=[RoomyLayer(room) for _ in layers])


def generation_batches(
    model: Any, rows: Sequence[tuple[int, ...]], budget: int, room: int, *, alike: bool
) -> Iterator[tuple[list[list[int]], list[tuple[int, ...]], Cache | None]]:
    """Yield batches to generate from: places, token ids, and the cache to continue.

    Rows are padded together or, where that is faster, read one by one, and what they begin with
    alike once.

    Args:
        model: a causal model.
        rows: token ids of the prompts.
        budget: the padded tokens in a batch, generated ones included; of rows read one by one as
            many more as 2 GiB of keys and values hold.
        room: the tokens that will be generated.
        alike: equal rows will have equal answers, so that they stand together in one place.
    """
    places: dict[Any, list[int]] = {}
    for place, ids in enumerate(rows):
        places.setdefault(ids if alike else (place, ids), []).append(place)
    groups = list(places.values())
    distinct = [rows[group[0]] for group in groups]
    if len(distinct) > 1 and one_by_one(model, distinct):
        cached = max(budget, _CACHE_BYTES // bytes_per_token(model))
        for batch, cache in shared_prefixes(model, distinct, cached, _ROWS, room):
            yield [groups[i] for i in batch], [distinct[i] for i in batch], cache
        return
    for batch in batches([len(ids) + room for ids in distinct], budget, limit=_ROWS):
        yield [groups[i] for i in batch], [distinct[i] for i in batch], roomy_cache(model, room)


def keeps_every_token(model: Any) -> bool:
    """Tell whether a model's cache is keys and values of tokens, be it through sliding windows."""
    kinds = {type(layer) for layer in DynamicCache(config=model.config).layers}
    return bool(kinds) and kinds <= {DynamicLayer, DynamicSlidingWindowLayer}


def one_by_one(model: Any, rows: Sequence[Sequence[int]]) -> bool:
    """Tell whether rows of token ids are read faster by `shared_prefixes` than padded together.

    On a CPU they are: what a padded batch computes does not stay in the processor's caches.
    Elsewhere they are where they begin alike for long. A model that keeps anything but all tokens'
    keys and values (one with sliding windows or a recurrent state, say) cannot be cut back, and
    never is read so.
    """
    if roomy_cache(model, 0) is None or getattr(model, "_is_stateful", False):
        return False
    if model.device.type == "cpu":
        return True
    ordered = sorted(map(tuple, rows))
    shared = sum(common_length(*pair) for pair in pairwise(ordered))
    return shared >= _SAVED * sum(map(len, ordered))


def shared_prefixes(
    model: Any, rows: Sequence[Sequence[int]], budget: int, limit: int, room: int = 0
) -> Iterator[tuple[list[int], Cache]]:
    """Read each row but for its last token, and yield batches of rows with their caches.

    Rows are read in the order of their ids: then each shares the most with the one before it, and
    keeps that part of its keys and values. This is a walk through the rows' prefix tree which
    holds one branch at a time.

    Args:
        model: a causal model of which `one_by_one` is true.
        rows: token ids, none empty.
        budget: the padded tokens in a batch's cache, generated ones included.
        limit: the rows in a batch.
        room: the tokens that will be generated, for which the caches keep room.

    Yields:
        The rows' positions, and their cache, padded on the left to the longest row less one.
    """
    order = sorted(range(len(rows)), key=lambda position: tuple(rows[position]))
    batch: list[int] = []
    kept: list[Layers] = []
    before: tuple[int, ...] = ()
    layers: Layers = []
    for position in order:
        ids = tuple(rows[position][:-1])
        layers = extend(model, layers, ids, common_length(before, ids))
        before = ids
        width = max(len(rows[other]) for other in [*batch, position]) + room
        if batch and (len(batch) == limit or width * (len(batch) + 1) > budget):
            yield batch, stack(kept, room)
            batch, kept = [], []
        batch.append(position)
        kept.append(list(layers))
    if batch:
        yield batch, stack(kept, room)


def common_length(one: Sequence[int], other: Sequence[int]) -> int:
    """Return how many ids two rows begin with alike."""
    for place, (mine, its) in enumerate(zip(one, other, strict=False)):
        if mine != its:
            return place
    return min(len(one), len(other))


@torch.no_grad()
def extend(model: Any, layers: Layers, ids: Sequence[int], common: int) -> Layers:
    """Return the keys and values of `ids`, of which `layers` hold the first `common` already."""
    held = [(keys[:, :, :common], values[:, :, :common]) for keys, values in layers]
    if common == len(ids):
        return held or [(layer, layer) for layer in _nothing(model)]
    cache: Any = DynamicCache(held) if common else DynamicCache()
    new = torch.tensor([ids[common:]], device=model.device)
    model(input_ids=new, past_key_values=cache, use_cache=True, logits_to_keep=1)
    return [(layer.keys, layer.values) for layer in cache.layers]


def _nothing(model: Any) -> list[torch.Tensor]:
    config = model.config.get_text_config()
    size = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
    heads = getattr(config, "num_key_value_heads", None) or config.num_attention_heads
    empty = torch.empty(1, heads, 0, size, dtype=model.dtype, device=model.device)
    return [empty] * config.num_hidden_layers


def bytes_per_token(model: Any) -> int:
    """Return the bytes that a token's keys and values take in all layers."""
    empty = _nothing(model)
    return 2 * len(empty) * empty[0].shape[1] * empty[0].shape[3] * empty[0].element_size()


def stack(rows: Sequence[Layers], room: int) -> Cache:
    """Return the rows' caches as one, padded on the left; takes the rows' tensors from them.

    With room for tokens that will be generated; with none, gradients flow through what is added.
    """
    width = max(layers[0][0].shape[2] for layers in rows)
    stacked: list[Any] = []
    for layer in range(len(rows[0])):
        joined = []
        for which in range(2):
            tensors = [layers[layer][which] for layers in rows]
            _, heads, _, size = tensors[0].shape
            out = tensors[0].new_zeros((len(rows), heads, width, size))
            for row, tensor in enumerate(tensors):
                out[row, :, width - tensor.shape[2] :] = tensor[0]
            joined.append(out)
        nothing = joined[0].new_empty(0)
        for layers in rows:  # they are copied: free them
            layers[layer] = (nothing, nothing)
        stacked.append(RoomyLayer(room) if room else DynamicLayer())  # type: ignore[no-untyped-call]
        if width:
            stacked[-1].update(*joined)
    return Cache(layers=stacked)
