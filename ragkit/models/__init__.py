"""Models: text and tensors in, text and tensors out; nothing here knows a Document."""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from .bi_encoder import BiEncoder
    from .cross_encoder import CrossEncoder
    from .generator import Generator
    from .server import ServerGenerator
    from .virtual_tokens import VirtualTokens

_HOMES = {
    "BiEncoder": "bi_encoder",
    "CrossEncoder": "cross_encoder",
    "Generator": "generator",
    "ServerGenerator": "server",
    "VirtualTokens": "virtual_tokens",
}

__all__ = ["BiEncoder", "CrossEncoder", "Generator", "ServerGenerator", "VirtualTokens"]


def __getattr__(name: str) -> Any:
    if name in _HOMES:
        return getattr(import_module(f".{_HOMES[name]}", __name__), name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
