"""Even passes: texts of like length are read together, whatever the batch that a loss asks for.

A batch of texts is padded to its longest, which on real documents wastes a third of the work. The
rows of a batch do not see each other inside the model, so that they can be read in any order and
in any parts: outputs and gradients are the same. What would not fit into memory is read again on
the way back: gradient caching (Gao et al. 2021, arXiv 2101.06983) for every loss.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch.utils.checkpoint import checkpoint

from ..models.precision import batches


@contextmanager
def even_passes(model: Any, *, tokens: int = 4096, kept: int = 16_384) -> Iterator[None]:
    """Let a sentence-transformers model read its batches in even parts.

    Args:
        model: a SentenceTransformer or a CrossEncoder.
        tokens: the padded tokens of a part.
        kept: the tokens whose activations are kept for the way back, of each call of the model (a
            batch's questions, its documents); those of the others are made again.
    """
    read = model.forward  # bound: the class's own

    def forward(features: dict[str, Any], **options: Any) -> dict[str, Any]:
        mask = features.get("attention_mask")
        if not isinstance(mask, torch.Tensor) or mask.ndim != 2:
            return dict(read(features, **options))
        return _read(read, features, mask, options, tokens, kept)

    model.forward = forward
    try:
        yield
    finally:
        del model.forward


def _read(
    read: Any,
    features: dict[str, Any],
    mask: torch.Tensor,
    options: dict[str, Any],
    tokens: int,
    kept: int,
) -> dict[str, Any]:
    lengths = [max(1, length) for length in mask.sum(1).tolist()]
    right = bool(mask[:, 0].all())
    parts = list(batches(lengths, tokens))
    outputs: list[torch.Tensor] = []
    key, spent = "", 0
    for places in parts:
        width = max(lengths[place] for place in places)
        cut = {
            name: _cut(value, mask, torch.tensor(places, device=mask.device), width, right)
            for name, value in features.items()
        }
        spent += width * len(places)

        def run(cut: dict[str, Any] = cut) -> torch.Tensor:
            nonlocal key
            found = read(dict(cut), **options)
            key = "sentence_embedding" if "sentence_embedding" in found else "scores"
            output: torch.Tensor = found[key]
            return output

        again = torch.is_grad_enabled() and spent > kept
        outputs.append(checkpoint(run, use_reentrant=False) if again else run())
    order = torch.tensor([place for places in parts for place in places], device=mask.device)
    return {key: torch.cat(outputs)[order.argsort()]}


def _cut(value: Any, mask: torch.Tensor, places: torch.Tensor, width: int, right: bool) -> Any:
    """Return the rows at `places` of a tensor of rows, without their common padding."""
    if not isinstance(value, torch.Tensor) or value.shape[:1] != mask.shape[:1]:
        return value
    rows = value[places]
    if value.shape[:2] != mask.shape:
        return rows
    return rows[:, :width] if right else rows[:, -width:]
