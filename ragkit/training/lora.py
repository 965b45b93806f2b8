"""Low-rank adapters (LoRA; Hu et al. 2021) in any model of transformers, through peft."""

from __future__ import annotations

import warnings
from typing import Any

import peft

from ..errors import SettingsError


def with_lora(model: Any, rank: int, *, dropout: float = 0.0) -> Any:
    """Return the model with an adapter of this rank in each of its linear layers, it alone learnt.

    Raises:
        SettingsError: `rank` is below 1, or the model has no layers that peft can adapt.
    """
    if rank < 1:
        raise SettingsError(f"the rank of LoRA must be at least 1, not {rank}")
    settings = peft.LoraConfig(
        r=rank, lora_alpha=2 * rank, lora_dropout=dropout, target_modules="all-linear"
    )
    try:
        with warnings.catch_warnings():  # peft asks for a name that transformers will drop
            warnings.simplefilter("ignore", FutureWarning)
            return peft.get_peft_model(model, settings)
    except ValueError as error:
        raise SettingsError(f"{type(model).__name__} cannot be adapted: {error}") from error


def merged(model: Any) -> Any:
    """Return the model that `with_lora` was given, with its weights changed by the adapter."""
    return model.merge_and_unload()
