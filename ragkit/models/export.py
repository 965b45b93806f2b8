"""Virtual tokens written into a model's vocabulary, for engines that take text or ids alone."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from ..errors import ModelError
from ..prompts import Prompt
from .generator import Generator
from .loading import weights_dtype, without_adapter
from .precision import Precision, without_bars
from .spellings import add_placeholder, add_spellings, spellings
from .splice import spliced
from .virtual_tokens import VirtualTokens

_LEAST = 256  # real tokens whose mean is a virtual token's row of the output layer
_BIAS = -1e4  # of a virtual token, where the output layer has biases; fp16 holds it


@dataclass(frozen=True, slots=True)
class Exported:
    """What was written, and what a check of the written folder has shown.

    Attributes:
        string: the spellings of all the tokens, joined: what stands in a prompt's text.
        first_id: the id of the first; the others follow it.
        dtype: that of the weights.
        text: the example's prompt as one string.
        messages: it as chat messages that hold the placeholder; None without a placeholder.
        ids: its token ids, as the tokens were learnt with.
        add_special_tokens: whether the text is to be tokenised with the tokenizer's own start.
        same_ids: whether the text, so tokenised, gives these ids.
        probability: the highest, of the virtual tokens together, anywhere in the example.
    """

    string: str
    first_id: int
    dtype: str
    text: str
    messages: list[dict[str, str]] | None
    ids: tuple[int, ...]
    add_special_tokens: bool
    same_ids: bool
    probability: float


@dataclass(frozen=True, slots=True)
class _Reading:
    """An example as the base reads it: logits [tokens, vocabulary], what its output layer reads.

    The ids of virtual tokens are those from `beyond` on.
    """

    ids: tuple[int, ...]
    beyond: int
    logits: torch.Tensor
    states: torch.Tensor


def export_model(name: str, tokens: VirtualTokens, prompt: Prompt, folder: Path) -> Exported:
    """Write a model and its virtual tokens as a transformers folder that needs no ragkit.

    The tokenizer spells the tokens `<|virtual_1|>`, `<|virtual_2|>`, …; their rows of the input
    embeddings are the tokens'. Input and output embeddings are untied. An adapter is merged. The
    folder is then loaded by transformers alone and compared with the model that it was made of.

    A virtual token's row of the output layer is the mean of the rows of the 256 real tokens (half
    of a smaller vocabulary) that are least likely in the example. Its logit is the mean of theirs,
    whatever the model has read: never above the highest of them, so greedy search cannot choose it
    (a tie would need them all to tie at the top), and its probability is at most 1/256 of theirs
    together, by Jensen's inequality. That holds in exact arithmetic, in any engine that reads the
    output layer; what was measured, `Exported.probability`, tells how far above rounding it is.
    transformers also reads `suppress_tokens` in generation_config.json, which forbids the ids;
    other engines do not.

    Args:
        name: the model that the tokens were learnt on; a peft folder is merged.
        tokens: all that are to be written.
        prompt: an example in the tokens' wording, to check by.
        folder: an empty folder.

    Raises:
        ModelError: the model is none that the tokens were learnt on, has no place for them, or the
            folder's check failed.
    """
    dtype = weights_dtype(name)
    half: Precision = "bf16" if dtype == torch.bfloat16 else "fp32"
    generator = Generator.load(name, device="cpu", precision=half, virtual_tokens=tokens)
    model, tokenizer, encoder = generator.model, generator.tokenizer, generator.encoder
    if getattr(model, "hf_quantizer", None) is not None:
        raise ModelError(f"{name!r} is quantised: export with the base before it was quantised")
    string = "".join(spellings(len(tokens)))
    text = encoder.text(prompt, string, tokens.placement)
    reading = _read(generator, tokens, prompt)
    first = add_spellings(tokenizer, model, len(tokens), name)
    messages = add_placeholder(encoder, tokenizer, prompt, tokens.placement, string)
    model = without_adapter(name, model).to(dtype)
    _write_rows(model, tokens.embeddings, first, reading.states)
    try:
        with without_bars():
            model.save_pretrained(folder)
            tokenizer.save_pretrained(folder)
    except ValueError as error:  # settings of generation that transformers refuses to write
        raise ModelError(f"{name!r} cannot be written: {error}") from error
    beyond = reading.beyond
    ids = tuple(i if i < beyond else i - beyond + first for i in reading.ids)
    del generator, model
    special = not encoder.chat and tokens.placement != "start"
    probability = _check(folder, tokens.embeddings, first, ids, reading.logits)
    found = AutoTokenizer.from_pretrained(folder)
    if found.encode(string, add_special_tokens=False) != list(range(first, first + len(tokens))):
        raise ModelError(f"the tokenizer of {name!r} does not read the virtual tokens as it should")
    same = tuple(found.encode(text, add_special_tokens=special)) == ids
    kind = str(dtype).removeprefix("torch.")
    return Exported(string, first, kind, text, messages, ids, special, same, probability)


@torch.no_grad()
def _read(generator: Generator, tokens: VirtualTokens, prompt: Prompt) -> _Reading:
    """Read the example with virtual tokens spliced in, each under an id of its own."""
    model = generator.model
    beyond = int(model.get_input_embeddings().weight.shape[0])
    numbers = tuple(range(beyond, beyond + len(tokens)))
    ids = generator.encoder.encode(prompt).with_tokens(numbers, tokens.placement)
    with spliced(model, tokens.embeddings), _head_inputs(model) as states:
        logits = model(input_ids=torch.tensor([ids])).logits[0]
    return _Reading(ids, beyond, logits.float(), states[0][0].float())


@contextmanager
def _head_inputs(model: Any) -> Iterator[list[torch.Tensor]]:
    """Collect what a model's output layer reads, within the block."""
    states: list[torch.Tensor] = []
    hook = model.get_output_embeddings().register_forward_pre_hook(
        lambda _, arguments: states.append(arguments[0])
    )
    try:
        yield states
    finally:
        hook.remove()


@torch.no_grad()
def _write_rows(model: Any, rows: torch.Tensor, first: int, states: torch.Tensor) -> None:
    """Write virtual tokens' rows from `first` on into both ends of a model, untied.

    Args:
        model: the model.
        rows: the tokens, float32 of shape [count, size].
        first: the id of the first; all below are real tokens.
        states: what its output layer reads, float32 of shape [tokens, size].

    Raises:
        ModelError: the model's ends are not rows.
    """
    head, end = model.get_output_embeddings(), first + len(rows)
    if not isinstance(head, torch.nn.Linear):
        raise ModelError(f"{type(model).__name__} has no linear output layer to write rows into")
    if head.weight.data_ptr() == model.get_input_embeddings().weight.data_ptr():
        head.weight = torch.nn.Parameter(head.weight.detach().clone())
    for config in (model.config, model.config.get_text_config()):
        config.tie_word_embeddings = False
    if end > head.weight.shape[0]:
        model.resize_token_embeddings(end, mean_resizing=False)
    embedding, head = model.get_input_embeddings(), model.get_output_embeddings()
    embedding.weight[first:end] = (rows / _scale(embedding)).to(embedding.weight.dtype)
    logits = states.mean(0) @ head.weight[:first].float().T
    if head.bias is not None:
        logits += head.bias[:first].float()
        head.bias[first:end] = _BIAS
    least = logits.topk(min(_LEAST, max(1, first // 2)), largest=False).indices
    head.weight[first:end] = head.weight[least].float().mean(0).to(head.weight.dtype)
    settings = model.generation_config
    forbidden = {*(settings.suppress_tokens or ()), *range(first, end)}
    settings.suppress_tokens = sorted(forbidden)
    settings._from_model_config = False  # or `generate` makes them anew, without these


def _scale(embedding: Any) -> float:
    """Return by what an embedding layer multiplies its rows: Gemma 3's does.

    Raises:
        ModelError: it does something else with them.
    """
    ids = torch.arange(min(64, embedding.weight.shape[0]))
    rows, output = embedding.weight[ids].float(), embedding(ids).float()
    scale = float((rows * output).sum() / (rows * rows).sum())
    error = float((output - scale * rows).abs().max())
    if not error <= 0.01 * float(output.abs().max()):
        raise ModelError("this model's input embeddings are more than rows: they cannot be written")
    return 1.0 if abs(scale - 1) < 1e-3 else scale


@torch.no_grad()
def _check(
    folder: Path, rows: torch.Tensor, first: int, ids: Sequence[int], logits: torch.Tensor
) -> float:
    """Compare a written folder, as transformers loads it, with the model that it was made of.

    Args:
        folder: the folder.
        rows: the virtual tokens.
        first: the id of the first.
        ids: the example's.
        logits: those of the base with spliced tokens, of shape [ids, vocabulary].

    Returns:
        the highest probability, of the virtual tokens together, anywhere in the example.

    Raises:
        ModelError: an embedding or a logit differs, or a virtual token is the likeliest.
    """
    with without_bars():
        model: Any = AutoModelForCausalLM.from_pretrained(folder, dtype="auto")
    exact = model.dtype == torch.float32
    if model.dtype == torch.float16:  # slow, or not to be had, on processors
        model = model.float()
    virtual, embedding = torch.arange(first, first + len(rows)), model.get_input_embeddings()
    if embedding.weight.data_ptr() == model.get_output_embeddings().weight.data_ptr():
        raise ModelError("this kind of model ties its embeddings whatever its configuration says")
    read = embedding(virtual).float()
    off = float((read - rows).abs().max() / rows.abs().max())
    if not off <= (1e-5 if exact else 1e-2):
        raise ModelError(
            "the exported model reads the virtual tokens otherwise than they were learnt "
            f"({off:.1%} off): its input embeddings are more than rows"
        )
    found = model(input_ids=torch.tensor([ids])).logits[0].float()
    base = logits[:, :first]
    off = float((found[:, :first] - base).abs().max() / base.abs().max())
    if not off <= (1e-4 if exact else 5e-2):
        raise ModelError(
            "the exported model's logits differ from the base's with the virtual tokens "
            f"({off:.1%} off): this kind of model reads its token ids elsewhere too"
        )
    if bool(torch.isin(found.argmax(-1), virtual).any()):
        raise ModelError("a virtual token is the likeliest in the exported model's example")
    return float(found.softmax(-1)[:, virtual].sum(-1).max())
