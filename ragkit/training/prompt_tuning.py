"""Prompt tuning as peft does it (Lester et al. 2021): the baseline that virtual tokens are held to.

The tokens stand before everything, so that every gradient flows through the whole prompt.
"""

from __future__ import annotations

from typing import Any

import torch
from peft import PromptTuningConfig, TaskType, get_peft_model

from ..errors import SettingsError
from ..models.precision import pad
from .token_loss import IGNORED, RowBatch, TokenRow, answer_loss


class PromptTuningTrainee(torch.nn.Module):
    """peft's own module for prompt tuning; the tokens are its only parameter.

    Args:
        model: a causal model; it is frozen.
        start: the embeddings to start from, float32 of shape [count, size].
    """

    accepts_loss_kwargs = True

    def __init__(self, model: Any, start: torch.Tensor) -> None:
        super().__init__()
        settings = PromptTuningConfig(task_type=TaskType.CAUSAL_LM, num_virtual_tokens=len(start))
        try:
            tuned: Any = get_peft_model(model.eval(), settings)
        except ValueError as error:
            raise SettingsError(
                f"{type(model).__name__} cannot be tuned by peft's prompts: {error}"
            ) from error
        weight = tuned.prompt_encoder["default"].embedding.weight
        with torch.no_grad():
            weight.copy_(start)
        self.tokens: torch.nn.Parameter = weight
        self.frozen = (tuned.eval(),)

    def forward(
        self,
        batch: RowBatch[TokenRow],
        labels: torch.Tensor,
        num_items_in_batch: torch.Tensor | int | None = None,
    ) -> dict[str, torch.Tensor]:
        """Return the loss as `TokenTrainee.forward` does; all tokens stand in every prompt."""
        (tuned,) = self.frozen
        device = tuned.get_input_embeddings().weight.device
        rows = [[*row.before, *row.after, *row.answer] for row in batch.rows]
        ids, mask = pad(rows, 0, left=False, device=device)
        targets = torch.full((len(rows), len(self.tokens) + ids.shape[1]), IGNORED, device=device)
        for place, row in enumerate(batch.rows):
            end = len(self.tokens) + len(rows[place])
            targets[place, end - len(row.answer) : end] = torch.tensor(row.answer, device=device)
        logits = tuned(input_ids=ids, attention_mask=mask).logits
        return {"loss": answer_loss(logits[:, :-1], targets[:, 1:], num_items_in_batch)}
