"""The generator's utility of passages: how much each makes the answer more probable.

u(q, d) = log p(answer | d, q) - log p(answer | q): one label for training retrievers (REPLUG, Shi
et al. 2023, arXiv 2301.12652; RA-DIT, Lin et al. 2023, arXiv 2310.01352) and rerankers, and for
choosing distractors. It is made once for a question and a passage, and kept on disk.
"""

from __future__ import annotations

import hashlib
import json
import logging
import math
import os
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, Self, TypeAlias
from uuid import uuid4

import numpy as np
from numpy.typing import NDArray

from .. import __version__
from ..artefacts import fingerprint, to_json, write_json
from ..errors import DataError, SettingsError
from ..models.answers import answer_loglikelihoods
from ..models.generator import Generator
from ..models.names import cache_folder
from ..prompts import Prompt
from ..types import Document, Example, Hit, Progress, Query, quiet

_log = logging.getLogger(__name__)
_FORMAT = 1
_BLOCK = 256  # labels that are written at once: what a killed run loses, at most

_Label: TypeAlias = tuple[float, int]
"""An answer's log-probability in nats, and its tokens."""


@dataclass(frozen=True, slots=True, eq=False)
class Utility:
    """What each passage does for a question's answer.

    Attributes:
        opened: log p(answer | passage, question) in nats, summed over the answer's tokens; float64
            of shape [hits], in the hits' order.
        closed: the same without a passage, log p(answer | question).
        tokens: the answer's tokens.
    """

    opened: NDArray[np.float64]
    closed: float
    tokens: int

    @property
    def gains(self) -> NDArray[np.float64]:
        """u(q, d) = log p(answer | d, q) - log p(answer | q) in nats, of shape [hits]."""
        return self.opened - self.closed

    @property
    def mean_gains(self) -> NDArray[np.float64]:
        """`gains` for each token of the answer: comparable between questions."""
        return self.gains / self.tokens

    @property
    def mean_opened(self) -> NDArray[np.float64]:
        """`opened` for each token of the answer; its softmax over hits is that of `mean_gains`."""
        return self.opened / self.tokens


def utilities(
    generator: Generator,
    examples: Sequence[Example],
    hits: Sequence[Sequence[Hit]],
    prompt: Callable[[Query, Sequence[Hit]], Prompt],
    settings: Mapping[str, Any],
    *,
    end: bool = False,
    folder: Path | None = None,
    progress: Progress = quiet,
) -> list[Utility]:
    """Return the utility of each question's hits; labels that are on disk are not made again.

    The answer is the first of an example's: the same one for all its hits and without them, so that
    labels differ by the passage alone. A prompt shows one passage, as `[1]`, or none. Labels are
    made passage by passage, so that the generator reads each passage once for all its questions.

    Args:
        generator: with its virtual tokens, if it has some plugged in.
        examples: the questions, with answers.
        hits: those of each question.
        prompt: builds a prompt, as `GeneratorReader.prompt` does: it cuts passages to a budget.
        settings: JSON values that tell all that `prompt` depends on (style, budget); labels of
            other settings, weights, layouts or templates are kept apart.
        end: whether the token that ends an answer is scored too.
        folder: where labels are kept; `utility` in ragkit's cache folder if None.
        progress: told how many labels are there, of how many.

    Raises:
        DataError: a question has no answer or does not fit into the window, or a label is not
            finite.
        ModelError: a prompt and its answer do not fit into the window.
        SettingsError: labels cannot be written.
    """
    wanted: dict[str, tuple[Example, Hit | None]] = {}
    asked: list[list[str]] = []
    for example, found in zip(examples, hits, strict=True):
        if not example.answers or not example.answers[0].strip():
            raise DataError(
                f"question {example.query.id!r} has no answer, or a blank one comes first: no "
                "utility can be told by it. Leave the question out, or give its answer."
            )
        asked.append([])
        for hit in (None, *found):
            key = _key(example, hit)
            wanted.setdefault(key, (example, hit))
            asked[-1].append(key)
    kept = _Labels.open(folder or cache_folder() / "utility", generator, prompt, settings, end)
    labels = kept.read(wanted)

    def tell(before: int, done: int) -> None:
        progress("label", before + done, len(wanted))

    tell(len(labels), 0)
    # Passage by passage: what stands before the question is then read once for all its questions.
    missing = sorted(wanted.keys() - labels.keys(), key=lambda key: _passage_first(*wanted[key]))
    for start in range(0, len(missing), _BLOCK):
        block = missing[start : start + _BLOCK]
        pairs = [wanted[key] for key in block]
        scores = answer_loglikelihoods(
            generator,
            [prompt(example.query, () if hit is None else (hit,)) for example, hit in pairs],
            [example.answers[0] for example, _ in pairs],
            end=end,
            progress=partial(tell, len(labels)),
        )
        made = {
            key: (nats, int(count))
            for key, (nats, count) in zip(block, scores.tolist(), strict=True)
        }
        kept.write(made)
        labels |= made
    return [_utility([labels[key] for key in keys]) for keys in asked]


def _utility(labels: Sequence[_Label]) -> Utility:
    nats = np.array([nats for nats, _ in labels])
    return Utility(nats[1:], float(nats[0]), labels[0][1])


def _passage_first(example: Example, hit: Hit | None) -> tuple[str, str, str]:
    document = hit.document if hit else Document("", "")
    return document.title, document.text, example.query.text


def _key(example: Example, hit: Hit | None) -> str:
    """Return what a label is kept under: the hash of all texts that it depends on."""
    passage = None if hit is None else [hit.document.title, hit.document.text]
    text = to_json([example.query.text, example.answers[0], passage])
    return hashlib.sha256(text.encode()).hexdigest()[:32]


class _Labels:
    """Labels on disk, those of one generator, wording and layout in a folder.

    Each run appends lines to a file of its own, so that runs do not disturb each other; one that is
    killed leaves a torn line at most, which is not read. `manifest.json` tells where they are from.
    """

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        self._own = folder / f"{uuid4().hex}.jsonl"

    @classmethod
    def open(
        cls,
        folder: Path,
        generator: Generator,
        prompt: Callable[[Query, Sequence[Hit]], Prompt],
        settings: Mapping[str, Any],
        end: bool,
    ) -> Self:
        """Return the labels of these, in a folder of their own within `folder`.

        Raises:
            SettingsError: nothing can be written there.
        """
        encoder, tokens = generator.encoder, generator.virtual_tokens
        template = generator.tokenizer.chat_template if encoder.chat else None
        # Ids tell wordings, templates and tokenizers apart, whatever the settings say.
        hit = Hit(Document("", "A text.", "A title"), 0.0)
        shown = [encoder.encode(prompt(Query("", "Which?"), each)) for each in ([hit], [])]
        depends = {
            "format": _FORMAT,
            "weights": generator.weights_hash(),
            "layout": "chat" if encoder.chat else "plain",
            "template": fingerprint(template),
            "prompt": fingerprint([[ids.context, ids.question] for ids in shown]),
            "settings": dict(settings),
            "virtual_tokens": tokens and {**tokens.to_json(), "placement": tokens.placement},
            "end": end,
        }
        place = folder / fingerprint(depends)
        told = {"kind": "utility labels", "ragkit": __version__, "generator": generator.name}
        try:
            place.mkdir(parents=True, exist_ok=True)
            if not (place / "manifest.json").exists():
                write_json(place / "manifest.json", depends | told)
        except OSError as error:
            raise SettingsError(
                f"{place}: labels cannot be kept here ({error.strerror}). Set RAGKIT_CACHE to a "
                "folder that can be written to."
            ) from error
        return cls(place)

    def read(self, wanted: Iterable[str]) -> dict[str, _Label]:
        """Return the labels of these keys that are there; lines that are none are passed over."""
        keys, found, passed = set(wanted), dict[str, _Label](), 0
        for path in sorted(self._folder.glob("*.jsonl")):
            for line in path.read_bytes().splitlines(keepends=True):
                try:
                    key, nats, tokens = json.loads(line)
                    if not (line.endswith(b"\n") and math.isfinite(nats) and tokens >= 1):
                        raise ValueError
                    if key in keys:
                        found[key] = float(nats), int(tokens)
                except (ValueError, TypeError):
                    passed += 1
        if passed:
            _log.warning("%s: %d lines hold no label, and are passed over", self._folder, passed)
        return found

    def write(self, labels: Mapping[str, _Label]) -> None:
        """Append labels, and make them durable.

        Raises:
            DataError: one is not finite.
            SettingsError: they cannot be written.
        """
        if not all(math.isfinite(nats) for nats, _ in labels.values()):
            raise DataError(
                "the generator gave an answer a log-probability that is not finite: its precision "
                "does not suffice. Take --precision fp32."
            )
        lines = "".join(to_json([key, *label]) + "\n" for key, label in labels.items())
        try:
            with self._own.open("a", encoding="utf-8", newline="\n") as handle:
                handle.write(lines)
                handle.flush()
                os.fsync(handle.fileno())
        except OSError as error:
            raise SettingsError(
                f"{self._own}: labels cannot be written ({error.strerror}). Make room, or set "
                "RAGKIT_CACHE to another folder."
            ) from error
