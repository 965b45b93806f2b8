"""Prompts that begin alike, read once: what they share is not computed again."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from itertools import pairwise
from typing import Any, TypeAlias

import torch
from transformers.cache_utils import DynamicCache, DynamicLayer

Layers: TypeAlias = list[tuple[torch.Tensor, torch.Tensor]]
"""Keys and values of each layer, each of shape [rows, heads, tokens, size]."""

_SAVED = {"cpu": 0.15}  # the share of tokens from which reading row by row is faster than padded
_SAVED_ELSEWHERE = 0.5


def worth_sharing(model: Any, rows: Sequence[Sequence[int]]) -> bool:
    """Tell whether rows of token ids begin alike so far that `shared_prefixes` is the faster way.

    A model whose cache is no plain list of keys and values (one with sliding windows or a
    recurrent state, say) cannot be cut back, and never is.
    """
    if not all(type(layer) is DynamicLayer for layer in DynamicCache(config=model.config).layers):
        return False
    ordered = sorted(map(tuple, rows))
    shared = sum(_common(*pair) for pair in pairwise(ordered))
    least = _SAVED.get(model.device.type, _SAVED_ELSEWHERE)
    return shared >= least * sum(map(len, ordered))


def shared_prefixes(
    model: Any, rows: Sequence[Sequence[int]], budget: int, limit: int
) -> Iterator[tuple[list[int], DynamicCache]]:
    """Read each row but for its last token, and yield batches of rows with their caches.

    Rows are read in the order of their ids: then each shares the most with the one before it, and
    keeps that part of its keys and values. This is a walk through the rows' prefix tree which
    holds one branch at a time.

    Args:
        model: a causal model of which `worth_sharing` is true.
        rows: token ids, none empty.
        budget: the padded tokens in a batch's cache.
        limit: the rows in a batch.

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
        layers = _extend(model, layers, ids, _common(before, ids))
        before = ids
        width = max(len(rows[other]) for other in [*batch, position])
        if batch and (len(batch) == limit or width * (len(batch) + 1) > budget):
            yield batch, _stack(kept)
            batch, kept = [], []
        batch.append(position)
        kept.append(layers)
    if batch:
        yield batch, _stack(kept)


def _common(one: Sequence[int], other: Sequence[int]) -> int:
    for place, (mine, its) in enumerate(zip(one, other, strict=False)):
        if mine != its:
            return place
    return min(len(one), len(other))


@torch.no_grad()
def _extend(model: Any, layers: Layers, ids: Sequence[int], common: int) -> Layers:
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


def _stack(rows: Sequence[Layers]) -> DynamicCache:
    """Return the rows' caches as one, padded on the left."""
    width = max(layers[0][0].shape[2] for layers in rows)

    def joined(layer: int, which: int) -> torch.Tensor:
        tensors = [layers[layer][which] for layers in rows]
        return torch.cat(
            [torch.nn.functional.pad(t, (0, 0, width - t.shape[2], 0)) for t in tensors]
        )

    return DynamicCache([(joined(layer, 0), joined(layer, 1)) for layer in range(len(rows[0]))])
