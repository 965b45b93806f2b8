"""Causal language models as transformers loads them, adapters included."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from transformers import AutoModelForCausalLM, AutoTokenizer

from ..artefacts import read_json
from ..errors import DataError, ModelError
from .names import check_writes, resolve
from .precision import Precision, check_device, check_precision, has_bf16, without_bars


def load_causal(name: str, device: str | None, precision: Precision) -> tuple[Any, Any]:
    """Return a model, on its device, and its tokenizer.

    Args:
        name: a folder (a peft folder is loaded with the model that it adapts), embedded name, GGUF
            file or hub name.
        device: where it goes; the best one here if None.
        precision: `auto` takes bf16 where the device multiplies it in hardware.

    Raises:
        ModelError: it cannot be found or loaded, or is no generator.
        SettingsError: there is no such device here.
    """
    check_precision(precision)
    device = check_device(device)
    half = precision == "bf16" or (precision == "auto" and has_bf16(device))
    try:
        path, adapter = _base_of(resolve(name))
        check_writes(path, name)
        tokenizer = AutoTokenizer.from_pretrained(path)
        dtype = torch.bfloat16 if half else torch.float32
        with without_bars():
            model: Any = AutoModelForCausalLM.from_pretrained(path, dtype=dtype)
            if adapter:
                model.load_adapter(adapter)
    except (OSError, ValueError, KeyError, DataError, SafetensorError) as error:
        raise ModelError(f"generator {name!r} cannot be loaded: {error}") from error
    return model.to(device), tokenizer


def _base_of(path: str) -> tuple[str, str | None]:
    """Return where a model lies, and the peft folder that adapts it, if `path` is one."""
    config = Path(path) / "adapter_config.json"
    if not config.is_file():
        return path, None
    base = read_json(config).get("base_model_name_or_path")
    if not base:
        raise ModelError(f"{config} names no base model (base_model_name_or_path)")
    return resolve(str(base)), path


def end_ids(model: Any, tokenizer: Any) -> list[int]:
    """Return the ids that end an answer: those of the generation settings, else the tokenizer's.

    Raises:
        ModelError: there are none.
    """
    ends = getattr(model.generation_config, "eos_token_id", None)
    ends = ends if ends is not None else tokenizer.eos_token_id
    if ends is None:
        raise ModelError("the generator has no end token: neither its settings nor its tokenizer")
    return list(ends) if isinstance(ends, list | tuple) else [int(ends)]
