"""Virtual tokens as words of a tokenizer, and a chat template that knows where they stand."""

from __future__ import annotations

import re
from typing import Any

from transformers import AddedToken

from ..errors import ModelError
from ..prompts import Prompt
from .prompt_ids import PromptEncoder

PLACEHOLDER = "<|virtual_tokens|>"
"""What a chat message may hold in the place of all the tokens' spellings."""

_TAKEN = re.compile(r"<\|virtual_(\d+|tokens)\|>")
_CONTROL = "bos_token_id", "eos_token_id", "pad_token_id"


def spellings(count: int) -> list[str]:
    """Return how the first `count` virtual tokens are spelled."""
    return [f"<|virtual_{number}|>" for number in range(1, count + 1)]


def add_spellings(tokenizer: Any, model: Any, count: int, name: str) -> int:
    """Teach a tokenizer the spellings of so many virtual tokens; return the id of the first.

    Raises:
        ModelError: it knows such spellings already, or their ids would be no rows of their own.
    """
    rows = int(model.get_input_embeddings().weight.shape[0])
    if taken := sorted(token for token in tokenizer.get_vocab() if _TAKEN.fullmatch(token)):
        raise ModelError(
            f"the tokenizer of {name!r} knows {taken[0]} already: export with the base that the "
            "virtual tokens were learnt on, not with a folder that was exported before"
        )
    words = spellings(count)
    tokenizer.add_tokens(
        [
            AddedToken(word, normalized=False, lstrip=False, rstrip=False, special=True)
            for word in words
        ],
        special_tokens=True,
    )
    ids = tokenizer.convert_tokens_to_ids(words)
    if ids != list(range(ids[0], ids[0] + count)) or ids[0] > rows:
        raise ModelError(
            f"the tokenizer of {name!r} gives the virtual tokens the ids {ids[0]}…{ids[-1]}, which "
            f"would not follow the model's {rows} embeddings: model and tokenizer do not fit"
        )
    settings = model.config.get_text_config(), model.generation_config
    used = [getattr(each, key, None) for each in settings for key in _CONTROL]
    flat = [i for use in used for i in (use if isinstance(use, list | tuple) else [use])]
    if clash := sorted({i for i in flat if i is not None and i in ids}):
        raise ModelError(
            f"{name!r} uses the id {clash[0]} as a control token that its tokenizer does not know, "
            "and a virtual token would take it: add that token to the tokenizer first"
        )
    return int(ids[0])


def add_placeholder(
    encoder: PromptEncoder, tokenizer: Any, prompt: Prompt, placement: str, string: str
) -> list[dict[str, str]] | None:
    """Have a chat template put the virtual tokens where messages hold the placeholder.

    Returns:
        the prompt as messages that hold it; None, and the template as it was, where that cannot be:
        a plain layout, tokens before the template's own, a template that renders otherwise so.
    """
    template = tokenizer.chat_template
    if not encoder.chat or not isinstance(template, str) or placement == "start":
        return None
    messages = encoder.turns(prompt, PLACEHOLDER)
    talk = [*messages, {"role": "assistant", "content": "x\n"}, {"role": "user", "content": "y"}]
    expected = [
        encoder.render_turns(each).replace(PLACEHOLDER, string) for each in (messages, talk)
    ]
    body = template.removesuffix("\n")  # as Jinja drops it, at the end of a template alone
    wrapped = f"{{% filter replace('{PLACEHOLDER}', '{string}') %}}{body}{{% endfilter %}}"
    tokenizer.chat_template = wrapped
    if [encoder.render_turns(each) for each in (messages, talk)] == expected:
        return messages
    tokenizer.chat_template = template
    return None
