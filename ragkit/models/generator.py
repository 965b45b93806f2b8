"""The generator: any causal language model of transformers."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from functools import partial
from pathlib import Path
from typing import Any, Literal, Self, TypeAlias

import numpy as np
import torch
from numpy.typing import NDArray

from ..errors import ModelError, SettingsError
from ..prompts import Prompt
from .likelihood import Likelihoods, LikelihoodScorer
from .loading import end_ids, load_causal
from .precision import Precision, pad, weights_hash
from .prefixes import generation_batches
from .prompt_ids import PromptEncoder, at_stop, until_stop
from .splice import VirtualIds, spliced, without_virtual
from .streaming import stream_text
from .taught import Taught, taught_of
from .virtual_tokens import VirtualTokens

Layout: TypeAlias = Literal["auto", "chat", "plain"]
Plugged: TypeAlias = int | Sequence[VirtualTokens | None] | None
"""Which virtual tokens stand in prompts: the generator's first so many (0: none; None: all of its
own), or those given for each prompt."""


class Generator:
    """Generates text with a causal language model.

    Args:
        model: the model, on its device.
        tokenizer: its tokenizer.
        name: the name that was asked for.
        layout: `chat` (the tokenizer's chat template), `plain`, or `auto`: chat if there is one.
        batch_tokens: the tokens of a padded batch, generated ones too; on a CPU at least 2 GiB's.
        virtual_tokens: stand in every prompt unless a call says otherwise.
        taught: the prompt that the model was trained with, if ragkit has trained it.

    Raises:
        ModelError: `layout` is `chat` and the tokenizer has no chat template, or the virtual
            tokens or the model itself were learnt on another model, layout or chat template.
    """

    def __init__(
        self,
        model: Any,
        tokenizer: Any,
        name: str = "",
        *,
        layout: Layout = "auto",
        batch_tokens: int = 16_384,
        virtual_tokens: VirtualTokens | None = None,
        taught: Taught | None = None,
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
        self.batch_tokens = batch_tokens
        self._ends = end_ids(model, tokenizer)
        self._hashed: tuple[list[float], str] | None = None
        self._based: str | None = None
        self.virtual_tokens = virtual_tokens
        self.taught = taught
        if taught is not None:
            taught.check(chat, tokenizer.chat_template, name)
        if virtual_tokens is not None:
            virtual_tokens.check(self.base_hash(), chat, tokenizer.chat_template, name)

    @classmethod
    def load(
        cls,
        name: str,
        *,
        device: str | None = None,
        precision: Precision = "auto",
        layout: Layout | None = None,
        virtual_tokens: VirtualTokens | str | Path | None = None,
    ) -> Self:
        """Load a generator by folder, embedded name, GGUF file or hub name.

        A peft folder is loaded with the model that it adapts. `layout` is that of the virtual
        tokens if not given, or that which the model was trained in, or else `auto`.

        Raises:
            ModelError: it cannot be found or loaded, is no generator, or as the class does.
            SettingsError: there is no such device here.
        """
        if isinstance(virtual_tokens, str | Path):
            virtual_tokens = VirtualTokens.load(virtual_tokens)
        model, tokenizer = load_causal(name, device, precision)
        taught = taught_of(name, model)
        own: Any = next((each.layout for each in (virtual_tokens, taught) if each), "auto")
        named: Any = {"virtual_tokens": virtual_tokens, "taught": taught}
        return cls(model, tokenizer, name, layout=layout or own, **named)

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
        virtual_tokens: Plugged = None,
        progress: Callable[[int], None] = lambda done: None,
    ) -> list[str]:
        """Answer prompts in batches; greedy unless `temperature` is above 0.

        What prompts begin with alike is read once, whatever virtual tokens follow it.

        Raises:
            ModelError: a prompt and `max_new_tokens` do not fit into the window.
            SettingsError: more virtual tokens are asked for than there are.
        """
        encoded, table = self.rows(prompts, virtual_tokens, max_new_tokens)
        if temperature > 0:
            torch.manual_seed(seed)
        texts: dict[int, str] = {}
        budget, alike = self.batch_tokens, temperature == 0
        batches = generation_batches(self.model, encoded, budget, max_new_tokens, alike=alike)
        with spliced(self.model, table):
            for batch, rows, cache in batches:
                inputs, read = self._inputs(rows)
                width = inputs["input_ids"].shape[1]
                options = inputs | self._options(width, max_new_tokens, temperature)
                with spliced(self.model, table, first=read):
                    output = self.model.generate(**options, past_key_values=cache)
                for places, text in zip(batch, self._decode(output[:, width:]), strict=True):
                    texts |= dict.fromkeys(places, text)
                progress(len(texts))
        return [texts[place] for place in range(len(prompts))]

    def stream(
        self,
        prompt: Prompt,
        *,
        max_new_tokens: int = 64,
        temperature: float = 0.0,
        seed: int = 0,
        virtual_tokens: Plugged = None,
    ) -> Iterator[str]:
        """Yield an answer's text piece by piece.

        Raises:
            ModelError, SettingsError: as `generate` does.
        """
        rows, table = self.rows([prompt], virtual_tokens, max_new_tokens)
        if temperature > 0:
            torch.manual_seed(seed)
        inputs, read = self._inputs(rows)
        options = inputs | self._options(len(rows[0]), max_new_tokens, temperature)

        def generate(streamer: Any, stopped: Callable[[], bool]) -> None:
            options.setdefault("stopping_criteria", []).append(lambda *_, **__: stopped())
            with spliced(self.model, table, first=read):
                self.model.generate(**options, streamer=streamer)

        pieces = stream_text(self.tokenizer, generate)
        yield from pieces if self.encoder.chat else until_stop(pieces)

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
        encoded, _ = self.rows(prompts, 0, 1)
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
        return LikelihoodScorer(self.model, self.tokenizer, self.window, self.batch_tokens)

    def weights_hash(self) -> str:
        """Return the SHA-256 of the weights; it is kept until the sum of a tensor changes."""
        state = self.model.state_dict()
        sums = [float(tensor.sum(dtype=torch.float32)) for tensor in state.values()]
        if self._hashed is None or self._hashed[0] != sums:
            self._hashed = sums, weights_hash(state)
        return self._hashed[1]

    def base_hash(self) -> str:
        """Return the SHA-256 of the weights in bf16: the same in whichever precision they are."""
        if self._based is None:
            self._based = weights_hash(self.model.state_dict(), torch.bfloat16)
        return self._based

    def rows(
        self, prompts: Sequence[Prompt], plugged: Plugged, max_new_tokens: int
    ) -> tuple[list[tuple[int, ...]], torch.Tensor | None]:
        """Return prompts as token ids with virtual tokens in their places, and those's embeddings.

        Raises:
            ModelError: a prompt and `max_new_tokens` do not fit into the window.
        """
        if plugged is None or isinstance(plugged, int):
            own = self.virtual_tokens
            if plugged and own is None:
                raise SettingsError(f"generator {self.name!r} has no virtual tokens plugged in")
            plugged = [own if own is None or plugged is None else own.first(plugged)] * len(prompts)
        virtual = VirtualIds(self.model)
        rows = []
        for prompt, tokens in zip(prompts, plugged, strict=True):
            ids = self.encoder.encode(prompt)
            if tokens:
                rows.append(ids.with_tokens(virtual.of(tokens.embeddings), tokens.placement))
            else:
                rows.append(ids.ids)
            if len(rows[-1]) + max_new_tokens > self.window:
                raise ModelError(
                    f"a prompt of {len(rows[-1])} tokens and {max_new_tokens} new ones do not fit "
                    f"into the {self.window} of {self.name!r}. Keep fewer or shorter passages."
                )
        return rows, virtual.table()

    def _inputs(self, rows: Sequence[Sequence[int]]) -> tuple[dict[str, Any], torch.Tensor]:
        """Return what `generate` is given for rows of ids, and the ids that are read for them."""
        read, mask = pad(rows, self._ends[0], left=True, device=self.model.device)
        inputs = {"input_ids": without_virtual(self.model, read, self._ends[0])}
        return inputs | {"attention_mask": mask}, read

    def _options(self, width: int, max_new_tokens: int, temperature: float) -> dict[str, Any]:
        """Return how to generate from prompts of so many tokens."""
        options: dict[str, Any] = {
            "max_new_tokens": max_new_tokens,
            "do_sample": temperature > 0,
            "num_beams": 1,
            "eos_token_id": self._ends,
            "pad_token_id": self._ends[0],
        }
        options |= {"temperature": temperature} if temperature > 0 else {}
        if not self.encoder.chat:
            options["stopping_criteria"] = [partial(at_stop, self.tokenizer, width)]
        return options

    def _decode(self, rows: torch.Tensor) -> list[str]:
        texts = self.tokenizer.batch_decode(rows, skip_special_tokens=True)
        if not self.encoder.chat:
            texts = ["".join(until_stop([text])) for text in texts]
        return [text.strip() for text in texts]
