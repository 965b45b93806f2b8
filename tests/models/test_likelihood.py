"""Log-probabilities of texts, against plain forward passes of one row each."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from tokenizers.processors import TemplateProcessing
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer

from ragkit.errors import ModelError
from ragkit.models import Generator, likelihood
from ragkit.models.likelihood import LikelihoodScorer
from ragkit.models.names import resolve
from ragkit.models.precision import weights_hash

CONTEXTS = [
    "Question: Which metal melts in the hand?\nAnswer:",
    "The sea",
    "",
    "A man stands in front of a bush. He starts up a chainsaw. he",
    "Tin melts. <|im_end|> Lead melts too, and",
]
CONTINUATIONS = [
    [" Gallium", " Tin does, and so does lead if you are patient enough", "", " Iron."],
    [" is blue"],
    ["The cat sat on the mat.", "A"],
    [],
    ["<|im_end|>", " so do many others, which is why they are used for <|im_start|>"],
]


SMALL = {
    "hidden_size": 16,
    "intermediate_size": 16,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "num_key_value_heads": 1,
}


def untrained(generator, kind, **options):
    """A model of any kind with a handful of weights, and the real one's tokenizer."""
    vocabulary = {"vocab_size": generator.model.config.vocab_size, "eos_token_id": 2}
    config = AutoConfig.for_model(kind, **options, **vocabulary)
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(config).eval()
    with torch.no_grad():  # far from even, so that the numbers tell one context from another
        for parameter in model.parameters():
            parameter.mul_(8)
    return Generator(model, generator.tokenizer)


def plainly(model, before, scored):
    """The likelihood of ids behind others: one row, one forward pass, no cache, no padding."""
    ids = [*before, *scored]
    if not scored:
        return [0.0, 0]
    with torch.inference_mode():
        logits = model(torch.tensor([ids])).logits[0].double()
    logprobs = torch.log_softmax(logits, dim=-1)
    rows = range(len(before) - 1, len(ids) - 1)
    return [float(sum(logprobs[row, ids[row + 1]] for row in rows)), len(scored)]


def expected(generator, context, continuations):
    data_ids = generator.encoder.data_ids
    before = data_ids(context) or [generator.tokenizer.bos_token_id]
    rows = [plainly(generator.model, before, data_ids(text)) for text in continuations]
    return np.array(rows).reshape(-1, 2)


def close(found, wanted):
    assert found.shape == wanted.shape
    np.testing.assert_allclose(found, wanted, rtol=0, atol=1e-4)


@pytest.fixture
def tokenizer():
    """A tokenizer of its own, for tests that change it."""
    return AutoTokenizer.from_pretrained(resolve("SmolLM2-135M-Instruct"))


@pytest.fixture(scope="module")
def small(generator):
    """A small model, for what does not need a real one."""
    return untrained(generator, "llama", **SMALL)


@pytest.fixture(scope="module")
def wanted(generator):
    return [expected(generator, *pair) for pair in zip(CONTEXTS, CONTINUATIONS, strict=True)]


def test_equal_to_one_plain_pass_a_continuation(generator, wanted):
    found = generator.loglikelihoods(CONTEXTS, CONTINUATIONS)
    assert [rows.dtype for rows in found] == [np.float64] * len(CONTEXTS)
    for rows, reference in zip(found, wanted, strict=True):
        close(rows, reference)
    assert found[3].shape == (0, 2)
    assert found[0][2].tolist() == [0.0, 0.0]


def test_alone_or_in_another_order_the_numbers_are_the_same(generator, wanted):
    for context, texts, reference in zip(CONTEXTS, CONTINUATIONS, wanted, strict=True):
        close(generator.loglikelihoods([context], [texts])[0], reference)
    turned = [texts[::-1] for texts in CONTINUATIONS[::-1]]
    backwards = generator.loglikelihoods(CONTEXTS[::-1], turned)
    for rows, reference in zip(backwards[::-1], wanted, strict=True):
        close(rows[::-1], reference)


@pytest.mark.parametrize("budget", [1, 40])
def test_small_batches_and_few_logits_at_a_time_change_nothing(small, monkeypatch, budget):
    monkeypatch.setattr(likelihood, "_LOGITS", 3 * small.model.config.vocab_size)
    asked = []
    forward = small.model.forward

    def counted(*args, **options):
        output = forward(*args, **options)
        asked.append(output.logits.shape[:2].numel())
        return output

    scorer = LikelihoodScorer(small.model, small.tokenizer, small.window, budget)
    with monkeypatch.context() as patch:
        patch.setattr(small.model, "forward", counted)
        found = scorer.continuations(CONTEXTS, CONTINUATIONS, lambda done: None)
    assert max(asked) == 3
    for context, texts, rows in zip(CONTEXTS, CONTINUATIONS, found, strict=True):
        close(rows, expected(small, context, texts))


def test_batches_are_split_where_padding_is_worth_a_pass():
    lengths = [1, 40, 3, 39, 31, 2, 38, 29]
    # 40 + 39 + 38 + 31 pad little. 29 is below three quarters of 40, and 4 x 40 tokens are worth
    # a pass of their own; what follows 29 is not (1 x 29).
    assert list(likelihood.alike(lengths, 1000, 99)) == [[1, 3, 6, 4], [7, 2, 5, 0]]
    assert list(likelihood.alike(lengths, 80, 99)) == [[1, 3], [6, 4], [7, 2], [5, 0]]
    assert list(likelihood.alike(lengths, 1000, 3)) == [[1, 3, 6], [4, 7, 2], [5, 0]]
    # 60 more a row fill the budget sooner.
    assert list(likelihood.alike(lengths, 200, 99, 60)) == [[1, 3], [6, 4], [7, 2], [5, 0]]


def test_a_context_is_read_once_and_only_the_scored_positions_have_logits(small, monkeypatch):
    rows, logits = [], []
    forward = small.model.forward

    def counted(*args, **options):
        output = forward(*args, **options)
        rows.append(tuple(options["input_ids"].shape))
        logits.append(tuple(output.logits.shape[:2]))
        return output

    monkeypatch.setattr(small.model, "forward", counted)
    before = len(small.encoder.data_ids(CONTEXTS[0]))
    small.loglikelihoods([CONTEXTS[0]], [[" one two three", " one two three", " one"]])
    assert rows == [(1, before), (2, 2)]
    assert logits == [(1, 1), (2, 2)]


def test_control_tokens_in_texts_are_spelled_out(small):
    (rows,) = small.loglikelihoods([""], [["<|im_end|>"]])
    assert rows[0, 1] == len(small.encoder.data_ids("<|im_end|>")) > 1


def test_what_the_window_does_not_hold_is_cut_from_the_contexts_left(small, monkeypatch):
    monkeypatch.setattr(Generator, "window", 8)
    data_ids = small.encoder.data_ids
    before, texts = data_ids(CONTEXTS[3]), [" is", " trims the hedge with it"]
    scored = [data_ids(text) for text in texts]
    longest = max(map(len, scored))
    assert len(before) > 8 > longest > 2
    # The last token scored is not read.
    kept = before[-(8 - longest + 1) :]
    reference = np.array([plainly(small.model, kept, ids) for ids in scored])
    close(small.loglikelihoods([CONTEXTS[3]], [texts])[0], reference)

    whole = " is" * 8
    assert len(data_ids(whole)) == 8
    reference = np.array([plainly(small.model, before[-1:], data_ids(whole))])
    close(small.loglikelihoods([CONTEXTS[3]], [[whole]])[0], reference)
    with pytest.raises(ModelError, match=r"of 9 tokens does not fit .* window of 8"):
        small.loglikelihoods(["", ""], [[" is"], [" is", " is" * 9]])


def test_the_beginning_token_that_a_tokenizer_adds_comes_first(small, tokenizer, monkeypatch):
    tokenizer.bos_token = "<|endoftext|>"
    tokenizer.backend_tokenizer.post_processor = TemplateProcessing(
        single="<|endoftext|> $A", special_tokens=[("<|endoftext|>", tokenizer.bos_token_id)]
    )
    begun = Generator(small.model, tokenizer)
    start = [tokenizer.bos_token_id]
    before, scored = (begun.encoder.data_ids(text) for text in (CONTEXTS[3], " is cut"))
    found = begun.loglikelihoods([CONTEXTS[3], ""], [[" is cut"], [" is cut"]])
    close(found[0], np.array([plainly(begun.model, start + before, scored)]))
    close(found[1], np.array([plainly(begun.model, start, scored)]))
    monkeypatch.setattr(Generator, "window", 5)  # a cut takes the context's words, not the start
    (cut,) = begun.loglikelihoods([CONTEXTS[3]], [[" is cut"]])
    close(cut, np.array([plainly(begun.model, start + before[-3:], scored)]))


def test_without_a_beginning_token_an_empty_context_is_the_end_of_text_token(small, tokenizer):
    tokenizer.bos_token = None
    tokenizer.eos_token = "<|endoftext|>"
    other = Generator(small.model, tokenizer)
    scored = other.encoder.data_ids("Tin melts.")
    reference = plainly(other.model, [tokenizer.eos_token_id], scored)
    close(other.loglikelihoods([""], [["Tin melts."]])[0], np.array([reference]))
    tokenizer.eos_token = None
    with pytest.raises(ModelError, match="no beginning token and no end-of-text token"):
        other.loglikelihoods([""], [["Tin melts."]])


@pytest.mark.parametrize(
    ("kind", "options"),
    [
        ("gpt2", {"n_embd": 16, "n_layer": 2, "n_head": 2, "n_positions": 45}),
        ("mistral", SMALL | {"sliding_window": 4}),
        ("gemma2", SMALL | {"sliding_window": 4, "head_dim": 8, "final_logit_softcapping": 2.0}),
    ],
)
def test_learned_positions_sliding_windows_and_capped_logits(generator, kind, options):
    other = untrained(generator, kind, **options)
    contexts = [*CONTEXTS, "A long one. " * 9]
    texts = [*CONTINUATIONS, [" Tin.", " Tin melts."]]
    found = other.loglikelihoods(contexts, texts)
    for context, continuations, rows in zip(contexts, texts, found, strict=True):
        close(rows, expected(other, context, continuations))


# Whole texts


def test_a_text_that_fits_is_scored_in_one_go(small):
    texts = ["The cat sat on the mat.", "", "Tin melts, and lead melts too, which is of use."]
    reference = np.vstack([expected(small, "", [text]) for text in texts])
    close(small.text_loglikelihoods(texts), reference)
    close(small.text_loglikelihoods(texts[2:]), reference[2:])


@pytest.mark.parametrize("cut", [0, 1, 4, 9])
def test_each_token_of_a_long_text_is_scored_once(small, monkeypatch, cut):
    monkeypatch.setattr(Generator, "window", 10)
    ids = small.encoder.data_ids("Tin melts, and lead melts too, which is of use to many. " * 2)
    ids = ids[: len(ids) - cut]
    text = small.tokenizer.decode(ids)
    assert small.encoder.data_ids(text) == ids
    total, start = plainly(small.model, [small.tokenizer.bos_token_id], ids[:10])[0], 10
    while start < len(ids):
        block = ids[start : start + 5]
        # The last token of a block is not read, so 10 tokens are read each time.
        before = ids[start - (11 - len(block)) : start]
        total += plainly(small.model, before, block)[0]
        start += 5
    found = small.text_loglikelihoods(["Tin.", text])
    close(found[1:], np.array([[total, len(ids)]]))
    close(found[:1], expected(small, "", ["Tin."]))


def test_progress_ends_with_all_that_was_asked(small, monkeypatch):
    done = []
    small.loglikelihoods(CONTEXTS, CONTINUATIONS, progress=done.append)
    assert done == [1, 2, 3, 4, 5]
    done.clear()
    monkeypatch.setattr(Generator, "window", 10)
    small.text_loglikelihoods(["", "Tin melts. " * 9, "Lead."], progress=done.append)
    assert done == [2, 3]


# The weights' hash


def test_the_hash_follows_the_weights_and_is_kept_between(small, monkeypatch):
    counted = []

    def counting(state):
        counted.append(len(state))
        return weights_hash(state)

    monkeypatch.setattr("ragkit.models.generator.weights_hash", counting)
    other = Generator(small.model, small.tokenizer)
    first = other.weights_hash()
    assert first == other.weights_hash() == weights_hash(small.model.state_dict())
    assert len(counted) == 1
    weight = small.model.model.norm.weight
    kept = weight.detach().clone()
    try:
        weight.data[0] += 1  # which the tensor's version counter does not see
        assert other.weights_hash() == weights_hash(small.model.state_dict()) != first
    finally:
        weight.data.copy_(kept)
    assert other.weights_hash() == first
