"""The reader: questions and hits to answers with citations, through a generator."""

from __future__ import annotations

import logging
import math
import re
from collections.abc import Callable, Iterator, Sequence
from typing import TYPE_CHECKING, Any, Protocol

from .errors import SettingsError
from .prompts import TEMPLATE_TOKENS, Prompt, abstains, build_prompt, citations
from .splitting import sentences
from .styles import PromptStyle, style_named
from .types import Answer, Hit, Query

if TYPE_CHECKING:
    from .models.taught import Taught
    from .models.virtual_tokens import VirtualTokens

log = logging.getLogger(__name__)

_SUPPORT = 0.5
_FUNCTION_WORDS = frozenset(
    (
        "a an and answer are as at be but by called for from had has have he her his in is it its "
        "name named not of on or passage question she that the their they this to was were which "
        "who with"
    ).split()
)


class TextGenerator(Protocol):
    """What a reader needs of a generator; `Generator` and `ServerGenerator` of models are some.

    One with `virtual_tokens` is told by a keyword of that name which of them stand in each prompt.
    """

    @property
    def window(self) -> int:
        """The tokens that prompt and answer may take together."""
        ...

    def count(self, text: str) -> int:
        """Return how many tokens a text takes."""
        ...

    def generate(
        self,
        prompts: Sequence[Prompt],
        *,
        max_new_tokens: int,
        temperature: float,
        seed: int,
        progress: Callable[[int], None],
    ) -> list[str]:
        """Return the prompts' answers."""
        ...

    def stream(
        self, prompt: Prompt, *, max_new_tokens: int, temperature: float, seed: int
    ) -> Iterator[str]:
        """Yield one answer piece by piece."""
        ...


class GeneratorReader:
    """Reads answers from hits with a generator.

    Args:
        generator: writes the answers.
        style: the prompt's wording, by name (`ragkit`, `flashrag`, `spring`, `virtual-tokens`) or
            given; None is that of the generator's training or virtual tokens, or `ragkit`.
        use_tokens: how many of the generator's virtual tokens stand in prompts, the first ones; 0
            unplugs them, None uses all.
        context_tokens: the tokens that the passages may take.
        max_new_tokens: the tokens that an answer may take.
        temperature: 0 is greedy.
        seed: of the sampling, where the temperature is above 0.
        progress: told how many answers are written, of how many.

    Raises:
        SettingsError: an unknown style, one that the virtual tokens were not learnt with, more
            virtual tokens than there are, numbers out of their range, or `max_new_tokens` that
            leave no room for a prompt in the generator's window.
    """

    def __init__(
        self,
        generator: TextGenerator,
        *,
        style: str | PromptStyle | None = None,
        use_tokens: int | None = None,
        context_tokens: int = 2048,
        max_new_tokens: int = 64,
        temperature: float = 0.0,
        seed: int = 0,
        progress: Callable[[int, int], None] = lambda done, total: None,
    ) -> None:
        if context_tokens < 1 or max_new_tokens < 1 or not 0 <= temperature < math.inf:
            raise SettingsError(
                f"context_tokens {context_tokens} and max_new_tokens {max_new_tokens} must be at "
                f"least 1, temperature {temperature} finite and not negative"
            )
        if not 0 <= seed < 2**63:
            raise SettingsError(f"seed must lie in 0…2^63-1, not at {seed}")
        self._tokens: VirtualTokens | None = getattr(generator, "virtual_tokens", None)
        self.use_tokens = 0 if self._tokens is None else len(self._tokens)
        self.use_tokens = self._standing(use_tokens)
        if max_new_tokens + TEMPLATE_TOKENS + self.use_tokens >= generator.window:
            virtual = f", {self.use_tokens} virtual ones among them" if self.use_tokens else ""
            raise SettingsError(
                f"max_new_tokens {max_new_tokens} leaves no room for a prompt: the generator reads "
                f"and writes {generator.window} tokens together{virtual}"
            )
        self.generator = generator
        self.style = _wording(style, self._tokens, getattr(generator, "taught", None))
        self._context_tokens = context_tokens
        self._max_new_tokens = max_new_tokens
        self._temperature = temperature
        self._seed = seed
        self._warned = False
        self.progress = progress

    def read(
        self,
        queries: Sequence[Query],
        hits: Sequence[Sequence[Hit]],
        use_tokens: int | Sequence[int] | None = None,
    ) -> list[Answer]:
        """Answer each query from its hits.

        Args:
            queries: the questions.
            hits: the hits of each.
            use_tokens: how many virtual tokens stand in the prompts, or in each one's; as many as
                the reader uses if None. All prompts have room for as many as the most have, so that
                they show the same passages.

        Raises:
            DataError: a question that does not fit into the generator's window.
            SettingsError: more virtual tokens than there are, or not one number a query.
        """
        pairs = list(zip(queries, hits, strict=True))
        if use_tokens is None or isinstance(use_tokens, int):
            use_tokens = [self._standing(use_tokens)] * len(pairs)
        if len(use_tokens) != len(pairs):
            raise SettingsError(
                f"{len(use_tokens)} numbers of virtual tokens are given for {len(pairs)} queries"
            )
        counts = [self._standing(count) for count in use_tokens]
        prompts = [self.prompt(query, found, max(counts)) for query, found in pairs]
        texts = self.generator.generate(
            prompts,
            max_new_tokens=self._max_new_tokens,
            temperature=self._temperature,
            seed=self._seed,
            progress=lambda done: self.progress(done, len(prompts)),
            **self._plugged(counts),
        )
        return [
            self._answer(*pair, prompt, text, count)
            for pair, prompt, text, count in zip(pairs, prompts, texts, counts, strict=True)
        ]

    def stream(
        self,
        query: Query,
        hits: Sequence[Hit],
        write: Callable[[str], object],
        use_tokens: int | None = None,
    ) -> Answer:
        """Answer one query, handing each piece of text to `write` as it comes.

        Raises:
            DataError, SettingsError: as `read` does.
        """
        count = self._standing(use_tokens)
        prompt = self.prompt(query, hits, count)
        pieces = []
        for piece in self.generator.stream(
            prompt,
            max_new_tokens=self._max_new_tokens,
            temperature=self._temperature,
            seed=self._seed,
            **self._plugged([count]),
        ):
            pieces.append(piece)
            write(piece)
        return self._answer(query, hits, prompt, "".join(pieces).strip(), count)

    def prompt(
        self, query: Query, hits: Sequence[Hit], use_tokens: int | None = None, room: int = 0
    ) -> Prompt:
        """Return the prompt for a query and its hits, packed to the budget.

        The window keeps room for `use_tokens` virtual tokens, for as many as the reader uses if
        None; and for an answer of `max_new_tokens`, or of `room` tokens if these are more.

        Raises:
            DataError, SettingsError: as `read` does.
        """
        room = max(self._max_new_tokens, room) + self._standing(use_tokens)
        prompt = build_prompt(
            self.style,
            query.text,
            hits,
            budget=self._context_tokens,
            window=self.generator.window - TEMPLATE_TOKENS - room,
            count=self.generator.count,
            sentences=sentences,
        )
        if hits and not prompt.shown and not self._warned:
            self._warned = True
            log.warning(
                "Query %r is answered without passages, since not one sentence of them fits: the "
                "limits are context_tokens, %d, and the window of the generator, %d tokens.",
                query.id,
                self._context_tokens,
                self.generator.window,
            )
        return prompt

    def _standing(self, count: int | None) -> int:
        """Return how many virtual tokens stand in a prompt: the reader's own number if None."""
        if count is None:
            return self.use_tokens
        if self._tokens is not None:
            return len(self._tokens.first(count))
        if count:
            raise SettingsError(
                f"{count} virtual tokens are asked for, and the generator has none plugged in: "
                "load it with virtual_tokens, on the command line --virtual-tokens FOLDER"
            )
        return 0

    def _plugged(self, counts: Sequence[int]) -> dict[str, Any]:
        """Return what tells a generator its prompts' virtual tokens; nothing if it has none."""
        if self._tokens is None:
            return {}
        plugged = {count: self._tokens.first(count) for count in set(counts)}
        return {"virtual_tokens": [plugged[count] for count in counts]}

    def _answer(
        self, query: Query, hits: Sequence[Hit], prompt: Prompt, text: str, virtual: int
    ) -> Answer:
        shown, abstained = tuple(hits[place] for place in prompt.shown), abstains(text)
        cited = citations(text, len(shown))
        support = () if cited or abstained else attribute(text, query.text, shown)
        return Answer(
            query=query,
            text=text,
            hits=shown,
            prompt=prompt.text,
            citations=cited or support,
            attributed=bool(support),
            abstained=abstained,
            prompt_tokens=self.generator.count(prompt.text) + virtual,
            answer_tokens=self.generator.count(text),
            cut=prompt.cut,
        )


def _wording(
    style: str | PromptStyle | None, tokens: VirtualTokens | None, taught: Taught | None
) -> PromptStyle:
    """Return the style that is asked for, or that of virtual tokens, which serve in no other.

    Raises:
        SettingsError: it is unknown, or the virtual tokens were learnt with another.
    """
    if style is None:
        return own.style if (own := tokens or taught) else style_named("ragkit")
    asked = style_named(style) if isinstance(style, str) else style
    if not tokens and taught and taught.style != asked:
        log.warning("The generator was trained in another wording: %s.", taught.style.name)
    if tokens and tokens.style not in (asked, asked.placing(tokens.placement)):
        raise SettingsError(
            f"prompt style {asked.name!r} is not the wording that the virtual tokens were learnt "
            f"with, which is {tokens.style.name!r}: leave the style out, and theirs is used"
        )
    return tokens.style if tokens else asked


def attribute(text: str, question: str, hits: Sequence[Hit]) -> tuple[int, ...]:
    """Return the position of the hit that an answer's words come from, or nothing.

    Small generators seldom write `[n]`. Of the answer's words that are not the question's, the hit
    must hold at least half; the one that holds most of them is it, the better ranked of equals.
    """
    words = _content_words(text) - _content_words(question) or _content_words(text)
    if not words or not hits:
        return ()
    shares = [len(words & _content_words(hit.document.contents)) / len(words) for hit in hits]
    best = max(shares)
    return (shares.index(best),) if best >= _SUPPORT else ()


def _content_words(text: str) -> set[str]:
    return {word for word in re.findall(r"\w+", text.lower()) if word not in _FUNCTION_WORDS}
