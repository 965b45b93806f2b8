"""The generator: any causal language model of transformers."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from functools import partial
from threading import Event, Thread
from typing import Any, Literal, Self, TypeAlias

import numpy as np
import torch
from numpy.typing import NDArray
from safetensors import SafetensorError
from transformers import AutoModelForCausalLM, AutoTokenizer, TextIteratorStreamer

from ..errors import ModelError, SettingsError
from ..prompts import Prompt
from .likelihood import Likelihoods, LikelihoodScorer
from .names import check_writes, resolve
from .precision import (
    Precision,
    check_device,
    check_precision,
    has_bf16,
    pad,
    weights_hash,
    without_bars,
)
from .prefixes import generation_batches
from .prompt_ids import PLAIN_STOPS, PromptEncoder, until_stop

Layout: TypeAlias = Literal["auto", "chat", "plain"]


class Generator:
    """Generates text with a causal language model.

    Args:
        model: the model, on its device.
        tokenizer: its tokenizer.
        name: the name that was asked for.
        layout: `chat` (the tokenizer's chat template), `plain`, or `auto`: chat if there is one.
        batch_tokens: the tokens, generated ones included, in a padded batch.

    Raises:
        ModelError: `layout` is `chat` and the tokenizer has no chat template.
    """

    def __init__(
        self,
        model: Any,
        tokenizer: Any,
        name: str = "",
        *,
        layout: Layout = "auto",
        batch_tokens: int = 16_384,
    ) -> None:
        if layout not in ("auto", "chat", "plain"):
            raise SettingsError(f"unknown layout {layout!r}; known are auto, chat, plain")
        if layout == "chat" and not tokenizer.chat_template:
            raise ModelError(f"generator {name!r} has no chat template; use the plain layout")
        self.model = model.eval()
        self.tokenizer = tokenizer
        self.name = name
        chat = layout == "chat" or (layout == "auto" and bool(tokenizer.chat_template))
        self.encoder = PromptEncoder(tokenizer, chat)
        self._batch_tokens = batch_tokens
        self._ends = _end_ids(model, tokenizer)
        self._hashed: tuple[list[float], str] | None = None

    @classmethod
    def load(
        cls,
        name: str,
        *,
        device: str | None = None,
        precision: Precision = "auto",
        layout: Layout = "auto",
    ) -> Self:
        """Load a generator by folder, embedded name, GGUF file or hub name.

        Raises:
            ModelError: it cannot be found or loaded, or is no generator.
            SettingsError: there is no such device here.
        """
        check_precision(precision)
        device = check_device(device)
        half = precision == "bf16" or (precision == "auto" and has_bf16(device))
        try:
            path = resolve(name)
            check_writes(path, name)
            tokenizer = AutoTokenizer.from_pretrained(path)
            dtype = torch.bfloat16 if half else torch.float32
            with without_bars():
                model: Any = AutoModelForCausalLM.from_pretrained(path, dtype=dtype)
        except (OSError, ValueError, KeyError, SafetensorError) as error:
            raise ModelError(f"generator {name!r} cannot be loaded: {error}") from error
        return cls(model.to(device), tokenizer, name, layout=layout)

    @property
    def window(self) -> int:
        """The tokens that prompt and answer may take together."""
        config = self.model.config.get_text_config()
        return int(getattr(config, "max_position_embeddings", 0) or 2048)

    def count(self, text: str) -> int:
        """Return how many tokens a text takes as data, without control tokens."""
        return len(self.encoder.data_ids(text))

    def generate(
        self,
        prompts: Sequence[Prompt],
        *,
        max_new_tokens: int = 64,
        temperature: float = 0.0,
        seed: int = 0,
        progress: Callable[[int], None] = lambda done: None,
    ) -> list[str]:
        """Answer prompts in batches of like length; greedy unless `temperature` is above 0.

        Raises:
            ModelError: a prompt and `max_new_tokens` do not fit into the window.
        """
        encoded = [self.encoder.encode(prompt).ids for prompt in prompts]
        for ids in encoded:
            self._check_length(len(ids), max_new_tokens)
        if temperature > 0:
            torch.manual_seed(seed)
        texts, done = [""] * len(prompts), 0
        budget, alike = self._batch_tokens, temperature == 0
        for batch, rows, cache in generation_batches(
            self.model, encoded, budget, max_new_tokens, alike=alike
        ):
            inputs = self._pad(rows) | {"past_key_values": cache}
            width = inputs["input_ids"].shape[1]
            output = self.model.generate(
                **inputs, **self._options(width, max_new_tokens, temperature)
            )
            for places, text in zip(batch, self._decode(output[:, width:]), strict=True):
                for place in places:
                    texts[place] = text
                done += len(places)
            progress(done)
        return texts

    def stream(
        self, prompt: Prompt, *, max_new_tokens: int = 64, temperature: float = 0.0, seed: int = 0
    ) -> Iterator[str]:
        """Yield an answer's text piece by piece.

        Raises:
            ModelError: the prompt and `max_new_tokens` do not fit into the window.
        """
        ids = self.encoder.encode(prompt).ids
        self._check_length(len(ids), max_new_tokens)
        if temperature > 0:
            torch.manual_seed(seed)
        streamer: Any = TextIteratorStreamer(
            self.tokenizer, skip_prompt=True, skip_special_tokens=True
        )
        options = self._options(len(ids), max_new_tokens, temperature)
        options |= self._pad([ids]) | {"streamer": streamer}
        left = Event()
        options.setdefault("stopping_criteria", []).append(lambda *_, **__: left.is_set())
        failures: list[Exception] = []

        def work() -> None:
            try:
                self.model.generate(**options)
            except Exception as error:  # handed to the reading thread below
                failures.append(error)
                streamer.end()

        thread = Thread(target=work, daemon=True)
        thread.start()
        try:
            yield from streamer if self.encoder.chat else until_stop(streamer)
        finally:  # a reader that leaves early takes the generation with it
            left.set()
            thread.join()
        if failures:
            raise ModelError(f"generation failed: {failures[0]}") from failures[0]

    def first_token_logprobs(
        self, prompts: Sequence[Prompt], options: Sequence[Sequence[str]]
    ) -> NDArray[np.float32]:
        """Return the log-probability that an answer begins with each option.

        Args:
            prompts: the prompts.
            options: the spellings of each option (`("Yes", "yes")`); their probabilities add up.

        Returns:
            float32 of shape [prompts, options].

        Raises:
            ModelError: a prompt does not fit into the window.
        """
        encoded = [self.encoder.encode(prompt).ids for prompt in prompts]
        for ids in encoded:
            self._check_length(len(ids), 1)
        return self._scorer.first_tokens(encoded, options)

    def loglikelihoods(
        self,
        contexts: Sequence[str],
        continuations: Sequence[Sequence[str]],
        *,
        progress: Callable[[int], None] = lambda done: None,
    ) -> list[Likelihoods]:
        """Return the log-probability of each context's continuations, and their token counts.

        Texts are data, and read without a template; context and continuation are tokenised apart.
        A context is read once. It is cut from the left where the window does not hold it and its
        longest continuation; an empty one is the beginning token, or the end-of-text token.

        Returns:
            per context float64 of shape [continuations, 2]: nats (at most 0), tokens.

        Raises:
            ModelError: a continuation alone is longer than the window.
        """
        return self._scorer.continuations(contexts, continuations, progress)

    def text_loglikelihoods(
        self, texts: Sequence[str], *, progress: Callable[[int], None] = lambda done: None
    ) -> Likelihoods:
        """Return each text's log-probability and token count, float64 of shape [texts, 2].

        Each token is scored once: first a window's, of at most 2,048 tokens, then half a window's
        at a time, behind as many tokens as the window still holds.
        """
        return self._scorer.texts(texts, progress)

    @property
    def _scorer(self) -> LikelihoodScorer:
        return LikelihoodScorer(self.model, self.tokenizer, self.window, self._batch_tokens)

    def weights_hash(self) -> str:
        """Return the SHA-256 of the weights; it is kept until the sum of a tensor changes."""
        state = self.model.state_dict()
        sums = [float(tensor.sum(dtype=torch.float32)) for tensor in state.values()]
        if self._hashed is None or self._hashed[0] != sums:
            self._hashed = sums, weights_hash(state)
        return self._hashed[1]

    def _check_length(self, tokens: int, max_new_tokens: int) -> None:
        if tokens + max_new_tokens > self.window:
            raise ModelError(
                f"a prompt of {tokens} tokens and {max_new_tokens} new ones do not fit into the "
                f"{self.window} tokens of {self.name!r}. Keep fewer or shorter passages."
            )

    def _pad(self, rows: Sequence[Sequence[int]]) -> dict[str, Any]:
        ids, mask = pad(rows, self._ends[0], left=True, device=self.model.device)
        return {"input_ids": ids, "attention_mask": mask}

    def _options(self, width: int, max_new_tokens: int, temperature: float) -> dict[str, Any]:
        """Return how to generate from prompts of so many tokens."""
        options: dict[str, Any] = {
            "max_new_tokens": max_new_tokens,
            "do_sample": temperature > 0,
            "num_beams": 1,
            "eos_token_id": self._ends,
            "pad_token_id": self._ends[0],
        }
        if temperature > 0:
            options["temperature"] = temperature
        if not self.encoder.chat:
            options["stopping_criteria"] = [partial(self._plain_ends, width)]
        return options

    def _plain_ends(self, width: int, ids: torch.Tensor, scores: Any, **_: Any) -> torch.Tensor:
        """Tell which rows have come to a stop string, leading line ends aside."""
        texts = self.tokenizer.batch_decode(ids[:, width:], skip_special_tokens=True)
        ended = [any(stop in text.lstrip("\n") for stop in PLAIN_STOPS) for text in texts]
        return torch.tensor(ended, device=ids.device)

    def _decode(self, rows: torch.Tensor) -> list[str]:
        texts = self.tokenizer.batch_decode(rows, skip_special_tokens=True)
        if not self.encoder.chat:
            texts = ["".join(until_stop([text])) for text in texts]
        return [text.strip() for text in texts]


def _end_ids(model: Any, tokenizer: Any) -> list[int]:
    """Return the ids that end an answer: those of the generation settings, else the tokenizer's."""
    ends = getattr(model.generation_config, "eos_token_id", None)
    ends = ends if ends is not None else tokenizer.eos_token_id
    if ends is None:
        raise ModelError("the generator has no end token: neither its settings nor its tokenizer")
    return list(ends) if isinstance(ends, list | tuple) else [int(ends)]
