"""A generator behind any OpenAI-compatible server: vLLM, llama.cpp, Ollama, or a hosted one."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import TYPE_CHECKING, Any

from ..errors import MissingExtra, ModelError, SettingsError
from ..prompts import Prompt

if TYPE_CHECKING:
    from openai import OpenAI

# Spellings of control tokens in common chat templates. A server parses them in the text it is sent.
_CONTROL = re.compile(
    r"<\|[^|<>\s]{1,40}\|>|</?s>|<(?:start|end)_of_turn>|<(?:bos|eos|pad|unk)>|"
    r"\[/?INST\]|<<\/?SYS>>|<｜[^｜<>]{1,40}｜>",
    re.IGNORECASE,
)
_BYTES_PER_TOKEN = 3  # on the safe side: English takes about 4 bytes a token


def neutralise(text: str) -> str:
    """Break what looks like a control token with a zero-width space after its first character."""
    return _CONTROL.sub(lambda match: match[0][0] + "\u200b" + match[0][1:], text)


def estimate_tokens(text: str) -> int:
    """Estimate how many tokens a text takes, where its tokenizer is not at hand."""
    return -(-len(text.encode("utf-8", "replace")) // _BYTES_PER_TOKEN)


def as_messages(prompt: Prompt) -> list[dict[str, str]]:
    """Return a prompt as chat messages, with control tokens in its data made harmless."""
    return [
        {
            "role": message.role,
            "content": "".join(
                part.text if part.kind == "instruction" else neutralise(part.text)
                for part in message.parts
            ),
        }
        for message in prompt.messages
    ]


class ServerGenerator:
    """Generates through a server's `/chat/completions`.

    Tokens are estimated from bytes, since the server's tokenizer is not here.

    Args:
        base_url: such as `http://localhost:8000/v1`.
        model: the model's name on the server.
        api_key: sent as the bearer token; local servers take any.
        window: the tokens that the server's model reads and writes together.
        concurrency: requests in flight.
        timeout: seconds until a request fails.

    Raises:
        MissingExtra: the package `openai` is not installed.
        SettingsError: an address without http:// or https://, or a number that leaves no room.
    """

    def __init__(
        self,
        base_url: str,
        model: str,
        *,
        api_key: str = "none",
        window: int = 8192,
        concurrency: int = 8,
        timeout: float = 120.0,
    ) -> None:
        try:
            from openai import OpenAI
        except ImportError as error:
            raise MissingExtra("openai", "server", "a generator behind a server") from error
        if not base_url.lower().startswith(("http://", "https://")):
            raise SettingsError(
                f"a server's address begins with http:// or https://, as "
                f"http://localhost:8000/v1 does; {base_url!r} does not"
            )
        if window < 1 or concurrency < 1 or timeout <= 0:
            raise SettingsError(
                f"window {window}, concurrency {concurrency} and timeout {timeout} of a server "
                "must be above 0"
            )
        self.name = model
        self.window = window
        self._base_url = base_url
        self._concurrency = concurrency
        self._client: OpenAI = OpenAI(base_url=base_url, api_key=api_key, timeout=timeout)

    def count(self, text: str) -> int:
        """Estimate how many tokens a text takes."""
        return estimate_tokens(text)

    def generate(
        self,
        prompts: Sequence[Prompt],
        *,
        max_new_tokens: int = 64,
        temperature: float = 0.0,
        seed: int = 0,
        progress: Callable[[int], None] = lambda done: None,
    ) -> list[str]:
        """Answer prompts, several requests at a time, in the prompts' order.

        Raises:
            ModelError: the server cannot be reached or refuses a request.
        """
        done = 0
        texts = []
        with ThreadPoolExecutor(self._concurrency) as pool:
            jobs = [
                pool.submit(self._complete, prompt, max_new_tokens, temperature, seed)
                for prompt in prompts
            ]
            try:
                for job in jobs:
                    texts.append(job.result())
                    done += 1
                    progress(done)
            except BaseException:
                pool.shutdown(wait=False, cancel_futures=True)
                raise
        return texts

    def stream(
        self, prompt: Prompt, *, max_new_tokens: int = 64, temperature: float = 0.0, seed: int = 0
    ) -> Iterator[str]:
        """Yield an answer's text piece by piece.

        Raises:
            ModelError: the server cannot be reached or refuses the request.
        """
        chunks = self._request(prompt, max_new_tokens, temperature, seed, stream=True)
        answered = False
        try:
            for chunk in chunks:
                if chunk.choices:
                    answered = True
                    if text := chunk.choices[0].delta.content:
                        yield text
        except Exception as error:  # openai lets its HTTP library's own through here
            raise self._failed(error) from error
        if not answered:
            raise self._without_choices("no stream of events")

    def _complete(self, prompt: Prompt, max_new_tokens: int, temperature: float, seed: int) -> str:
        reply = self._request(prompt, max_new_tokens, temperature, seed, stream=False)
        choices = getattr(reply, "choices", None)
        message = getattr(choices[0], "message", None) if choices else None
        if message is None:
            raise self._without_choices(str(reply))
        return (message.content or "").strip()

    def _request(
        self, prompt: Prompt, max_new_tokens: int, temperature: float, seed: int, *, stream: bool
    ) -> Any:
        from openai import OpenAIError

        create: Any = self._client.chat.completions.create
        try:
            return create(
                model=self.name,
                messages=as_messages(prompt),
                max_tokens=max_new_tokens,
                temperature=temperature,
                seed=seed,
                stream=stream,
            )
        except OpenAIError as error:
            raise self._failed(error) from error

    def _without_choices(self, reply: str) -> ModelError:
        return ModelError(
            f"the server at {self._base_url} answered without choices: {reply[:200]!r}. "
            "Does the address end as an OpenAI-compatible one does, mostly in /v1?"
        )

    def _failed(self, error: Exception) -> ModelError:
        return ModelError(f"the server at {self._base_url} failed: {error}")
