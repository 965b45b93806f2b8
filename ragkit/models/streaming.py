"""An answer's text piece by piece, while a thread generates it."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from threading import Event, Thread
from typing import Any

from transformers import TextIteratorStreamer

from ..errors import ModelError


def stream_text(
    tokenizer: Any, generate: Callable[[Any, Callable[[], bool]], None]
) -> Iterator[str]:
    """Yield the text that `generate(streamer, stopped)` writes to its streamer.

    It runs in a thread of its own, and should end once `stopped` says true: a reader that leaves
    early takes the generation with it.

    Raises:
        ModelError: `generate` raised something.
    """
    streamer: Any = TextIteratorStreamer(tokenizer, skip_prompt=True, skip_special_tokens=True)
    left = Event()
    failures: list[Exception] = []

    def work() -> None:
        try:
            generate(streamer, left.is_set)
        except Exception as error:  # handed to the reading thread below
            failures.append(error)
            streamer.end()

    thread = Thread(target=work, daemon=True)
    thread.start()
    try:
        yield from streamer
    finally:
        left.set()
        thread.join()
    if failures:
        raise ModelError(f"generation failed: {failures[0]}") from failures[0]
