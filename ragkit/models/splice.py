"""Embeddings that stand in a model's input under ids of their own, beyond its vocabulary.

The vocabulary, the embedding matrix and the output layer stay as they are, so that no such id can
ever be generated, and a model reads as it always did where none of them stands in its input.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from threading import get_ident
from typing import Any

import torch


class VirtualIds:
    """Gives each row of embeddings an id beyond a vocabulary; equal rows share one.

    So the first k of some virtual tokens begin as the first k + 1 do, and what rows of ids have in
    common is known by their ids alone.

    Args:
        model: a causal model.
    """

    def __init__(self, model: Any) -> None:
        self._first = int(model.get_input_embeddings().weight.shape[0])
        self._ids: dict[bytes, int] = {}
        self._rows: list[torch.Tensor] = []

    def of(self, embeddings: torch.Tensor) -> tuple[int, ...]:
        """Return the ids of embeddings, float32 of shape [count, size]."""
        found = []
        for row in embeddings.detach().cpu():
            number = self._ids.setdefault(row.numpy().tobytes(), len(self._rows))
            if number == len(self._rows):
                self._rows.append(row)
            found.append(self._first + number)
        return tuple(found)

    def table(self) -> torch.Tensor | None:
        """Return the embeddings in the order of their ids, [ids, size]; None if there are none."""
        return torch.stack(self._rows) if self._rows else None


@contextmanager
def spliced(
    model: Any, table: torch.Tensor | None, *, first: torch.Tensor | None = None
) -> Iterator[None]:
    """Have a model read ids beyond its vocabulary as rows of a table, within the block.

    This thread alone does; others read as they always did.

    Args:
        model: a causal model.
        table: float32 of shape [ids, size]; gradients flow into it. None changes nothing.
        first: ids of shape [rows, tokens] whose last ones the first forward pass reads in place of
            its own: `generate` must not see ids beyond the vocabulary.
    """
    if table is None:
        yield
        return
    embedding = model.get_input_embeddings()
    vocabulary = int(embedding.weight.shape[0])
    table = table.to(embedding.weight.device)
    waiting = [first] if first is not None else []
    read: list[torch.Tensor] = []
    mine = get_ident()  # a model may serve other threads meanwhile

    def before(_module: Any, arguments: tuple[Any, ...]) -> tuple[Any, ...] | None:
        if get_ident() != mine:
            return None
        ids, *others = arguments
        if waiting:
            ids = waiting.pop()[:, -ids.shape[1] :]
        read[:] = [ids]
        return ids.masked_fill(ids >= vocabulary, 0), *others

    def after(_module: Any, _given: tuple[Any, ...], output: torch.Tensor) -> torch.Tensor | None:
        if get_ident() != mine or not bool((virtual := read[0] >= vocabulary).any()):
            return None
        rows = table[(read[0] - vocabulary).clamp(min=0)].to(output.dtype)
        return torch.where(virtual[..., None], rows, output)

    hooks = embedding.register_forward_pre_hook(before), embedding.register_forward_hook(after)
    try:
        yield
    finally:
        for hook in hooks:
            hook.remove()


def without_virtual(model: Any, ids: torch.Tensor, fill: int) -> torch.Tensor:
    """Return ids with `fill` in the place of each that is beyond the vocabulary."""
    return ids.masked_fill(ids >= int(model.get_input_embeddings().weight.shape[0]), fill)
