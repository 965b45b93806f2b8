"""Devices, precisions and batches: what all models share."""

from __future__ import annotations

import hashlib
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any, Literal, TypeAlias

import torch
from transformers.utils import logging

from ..errors import SettingsError

Precision: TypeAlias = Literal["auto", "fp32", "bf16"]


def check_precision(precision: str) -> None:
    """Refuse an unknown precision.

    Raises:
        SettingsError: it is none of auto, fp32, bf16.
    """
    if precision not in ("auto", "fp32", "bf16"):
        raise SettingsError(f"unknown precision {precision!r}; known are auto, fp32, bf16")


def default_device() -> str:
    """Return the best device here: `cuda`, `mps` or `cpu`."""
    if torch.cuda.is_available():
        return "cuda"
    return "mps" if torch.backends.mps.is_available() else "cpu"


def check_device(device: str | None) -> str:
    """Return the device that models go to: the one named, or the best one here if None.

    Raises:
        SettingsError: torch does not know such a device, or there is none here.
    """
    if device is None:
        return default_device()
    try:
        torch.zeros(1, device=device).cpu()
    except (RuntimeError, AssertionError) as error:
        reason = str(error).partition("\n")[0]
        raise SettingsError(
            f"device {device!r} cannot be used here ({reason}); the best one here is "
            f"{default_device()!r}"
        ) from error
    return device


@contextmanager
def without_bars() -> Iterator[None]:
    """Keep transformers from drawing its bars while a model is loaded."""
    bars: Any = logging  # its functions have no types
    shown = bars.is_progress_bar_enabled()
    bars.disable_progress_bar()
    try:
        yield
    finally:
        if shown:
            bars.enable_progress_bar()


def has_bf16(device: str) -> bool:
    """Tell whether a device multiplies bf16 matrices in hardware."""
    if device.startswith("cuda"):
        return bool(torch.cuda.is_bf16_supported(including_emulation=False))
    return device == "cpu" and (
        torch.cpu._is_avx512_bf16_supported() or torch.cpu._is_amx_tile_supported()
    )


def batches(lengths: Sequence[int], budget: int, limit: int = 1024) -> Iterator[list[int]]:
    """Group positions so that a padded batch holds at most `budget` tokens, longest first.

    Longest first, so that what does not fit into memory fails at once, not after an hour.
    """
    order = sorted(range(len(lengths)), key=lambda position: -lengths[position])
    start = 0
    while start < len(order):
        size = min(limit, max(1, budget // max(1, lengths[order[start]])))
        yield order[start : start + size]
        start += size


def pad(
    rows: Sequence[Sequence[int]], fill: int, *, left: bool, device: Any
) -> tuple[torch.Tensor, torch.Tensor]:
    """Return token ids, padded with `fill`, and their mask: int64, both [rows, longest row]."""
    width = max(map(len, rows))
    ids = torch.full((len(rows), width), fill, dtype=torch.long)
    mask = torch.zeros_like(ids)
    for row, tokens in enumerate(rows):
        start = width - len(tokens) if left else 0
        ids[row, start : start + len(tokens)] = torch.tensor(tokens)
        mask[row, start : start + len(tokens)] = 1
    return ids.to(device), mask.to(device)


def weights_hash(state: dict[str, Any], dtype: torch.dtype | None = None) -> str:
    """Return the SHA-256 of a state dict's names, types and bytes, in hexadecimal.

    With a `dtype`, floating-point tensors are taken in it, one after the other.
    """
    digest = hashlib.sha256()
    for name in sorted(state):
        tensor = state[name].detach().cpu().contiguous()
        if dtype is not None and tensor.is_floating_point():
            tensor = tensor.to(dtype)
        digest.update(f"{name} {tensor.dtype} {tuple(tensor.shape)}".encode())
        digest.update(tensor.reshape(-1).view(torch.uint8).numpy())
    return digest.hexdigest()
