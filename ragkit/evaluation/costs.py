"""What each stage of a run costs: seconds, tokens, peak memory."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from threading import Event, Thread
from time import perf_counter
from typing import Any

import psutil

_PERIOD = 0.02  # seconds between two looks at the process' memory


@dataclass(slots=True)
class Cost:
    """What a stage took, over all questions; loading on first use is part of it.

    Attributes:
        seconds: of wall-clock time.
        peak_memory_mb: the largest resident memory of the process meanwhile, in 10^6 bytes.
        peak_gpu_mb: the largest memory held on GPUs meanwhile, in 10^6 bytes; None without one.
        prompts: how many were read, a question's once for each context or rubric; None where the
            stage reads none.
        prompt_tokens: tokens read; None where they are not counted.
        answer_tokens: tokens written.
    """

    seconds: float = 0.0
    peak_memory_mb: float = 0.0
    peak_gpu_mb: float | None = None
    prompts: int | None = None
    prompt_tokens: int | None = None
    answer_tokens: int | None = None

    def to_json(self, questions: int) -> dict[str, Any]:
        """Return the value that `results.json` holds, seconds by prompt or question among it."""
        values = {name: getattr(self, name) for name in self.__slots__}
        each = self.each(questions)
        values |= {"per_question" if self.prompts is None else "per_prompt": each}
        return {name: value for name, value in values.items() if value is not None}

    def each(self, questions: int) -> float | None:
        """Return the seconds a prompt, or a question where no prompts are read; None of nothing."""
        parts = questions if self.prompts is None else self.prompts
        return self.seconds / parts if parts else None


class Meter:
    """Measures stages; a stage that is entered again adds to its cost."""

    def __init__(self) -> None:
        self.costs: dict[str, Cost] = {}

    @contextmanager
    def stage(self, name: str) -> Iterator[Cost]:
        """Measure what is done inside."""
        cost = self.costs.setdefault(name, Cost())
        process, done = psutil.Process(), Event()

        def look() -> None:
            while True:
                held = process.memory_info().rss / 1e6
                cost.peak_memory_mb = max(cost.peak_memory_mb, held)
                if done.wait(_PERIOD):
                    return

        cuda = _cuda()
        if cuda:
            cuda.reset_peak_memory_stats()
        watch = Thread(target=look, daemon=True)
        watch.start()
        started = perf_counter()
        try:
            yield cost
        finally:
            cost.seconds += perf_counter() - started
            done.set()
            watch.join()
            if cuda := _cuda():
                cost.peak_gpu_mb = max(cost.peak_gpu_mb or 0.0, cuda.max_memory_allocated() / 1e6)


def _cuda() -> Any:
    """Return torch's CUDA module if a model uses it: measuring a run loads nothing."""
    torch = sys.modules.get("torch")
    return torch.cuda if torch is not None and torch.cuda.is_initialized() else None
