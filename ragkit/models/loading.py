"""Causal language models as transformers loads them, adapters included."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer

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
                try:
                    model.load_adapter(adapter)
                except (RuntimeError, TypeError) as error:  # weights of other shapes
                    raise ValueError(f"its adapter does not fit {path}: {error}") from error
    except (OSError, ValueError, KeyError, DataError, SafetensorError) as error:
        raise ModelError(f"generator {name!r} cannot be loaded: {error}") from error
    return model.to(device), tokenizer


def weights_dtype(name: str) -> torch.dtype:
    """Return the type of a model's weights as they lie on disk: fp32, bf16 or fp16.

    Raises:
        ModelError: the model cannot be found.
    """
    try:
        dtype = AutoConfig.from_pretrained(_base_of(resolve(name))[0]).dtype
    except (OSError, ValueError, KeyError, DataError) as error:
        raise ModelError(f"generator {name!r} cannot be loaded: {error}") from error
    return dtype if dtype in (torch.bfloat16, torch.float16) else torch.float32


def without_adapter(name: str, model: Any) -> Any:
    """Return a model that `load_causal` gave for a name, its adapter merged into the weights.

    The model that is given is used up, unless it has no adapter and is returned as it is.

    Raises:
        ModelError: a part of the adapter cannot be merged.
    """
    path, adapter = _base_of(resolve(name))
    if adapter is None:
        return model
    for place, module in list(model.named_modules()):
        parent, _, child = place.rpartition(".")
        if hasattr(module, "base_layer"):
            module.merge()
            setattr(model.get_submodule(parent), child, module.get_base_layer())
        elif hasattr(module, "modules_to_save"):
            saved = module.modules_to_save[module.active_adapters[0]]
            setattr(model.get_submodule(parent), child, saved)
    with without_bars():  # a model that had an adapter is saved under the adapter's names
        plain: Any = AutoModelForCausalLM.from_pretrained(path, dtype=model.dtype)
    try:
        plain.load_state_dict(model.state_dict(), assign=True)
    except RuntimeError as error:
        raise ModelError(f"the adapter {name!r} cannot be merged: {error}") from error
    return plain


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
