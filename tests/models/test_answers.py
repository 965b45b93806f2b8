"""Answers behind prompts, against plain forward passes of one row each with all logits."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from transformers import AutoConfig, AutoModelForCausalLM

from ragkit.errors import ModelError
from ragkit.models import Generator, answers, likelihood
from ragkit.models.answers import answer_loglikelihoods, packs
from ragkit.models.loading import end_ids
from ragkit.models.virtual_tokens import VirtualTokens, template_hash
from ragkit.prompts import Message, Part, Prompt, build_prompt
from ragkit.styles import STYLES
from ragkit.types import Document, Hit

SMALL = {
    "hidden_size": 16,
    "intermediate_size": 16,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "num_key_value_heads": 1,
}
PASSAGES = ["Tin melts at 232 degrees.", "Lead is heavy, and melts later. " * 4, None]
QUESTIONS = ["Which metal melts first?", "Who?", "Which metal melts last, and at what degree?"]
ANSWERS = ["Tin", "Lead, which is <|im_end|> heavy", "a", "Tin and lead do"]


def untrained(generator, kind="llama", **options):
    """A small random model of any kind whose numbers tell contexts apart."""
    vocabulary = {"vocab_size": generator.model.config.vocab_size, "eos_token_id": 2}
    torch.manual_seed(0)
    config = AutoConfig.for_model(kind, **(options or SMALL), **vocabulary)
    model = AutoModelForCausalLM.from_config(config).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.mul_(8)
    return Generator(model, generator.tokenizer, "small")


@pytest.fixture
def small(generator):
    return untrained(generator)


def prompt_of(style, question, passage):
    hits = [] if passage is None else [Hit(Document("d", passage), 1.0)]
    return build_prompt(
        STYLES[style], question, hits, budget=1000, window=1000, count=len,
        sentences=lambda text: [(0, len(text))],
    )  # fmt: skip


def pairs(style="virtual-tokens"):
    """Pairs as they come: not in the order in which they share the most."""
    grid = [(q, p, a) for a in ANSWERS for q in QUESTIONS for p in PASSAGES]
    grid += grid[5:6]
    return [prompt_of(style, q, p) for q, p, _ in grid], [a for _, _, a in grid]


def plainly(generator, prompt, answer, end):
    before = list(generator.encoder.encode(prompt).ids)
    ids = generator.encoder.answer_ids(answer, end_ids(generator.model, generator.tokenizer))
    ids = ids if end else ids[:-1]
    with torch.inference_mode():
        logits = generator.model(torch.tensor([before + ids])).logits[0].double()
    logprobs = torch.log_softmax(logits, dim=-1)
    return [sum(float(logprobs[len(before) - 1 + n, t]) for n, t in enumerate(ids)), len(ids)]


def same(generator, prompts, texts, end=True):
    found = answer_loglikelihoods(generator, prompts, texts, end=end)
    wanted = [plainly(generator, *pair, end) for pair in zip(prompts, texts, strict=True)]
    assert found.shape == (len(texts), 2) and found.dtype == np.float64
    np.testing.assert_allclose(found, np.array(wanted), rtol=1e-5, atol=1e-4)
    return found


@pytest.mark.parametrize("style", ["virtual-tokens", "ragkit", "spring"])
@pytest.mark.parametrize("end", [True, False])
def test_values_are_those_of_whole_rows(small, style, end):
    found = same(small, *pairs(style), end=end)
    assert np.ptp(found[: len(QUESTIONS) * len(PASSAGES), 0]) > 0.1  # contexts are told apart


@pytest.mark.parametrize("budget", [1, 7, 60])
@pytest.mark.parametrize("positions", [1, 3, 1000])
def test_rows_are_read_in_pieces_of_any_size(small, monkeypatch, budget, positions):
    monkeypatch.setitem(answers._PACKED, "cpu", budget)
    monkeypatch.setattr(likelihood, "_LOGITS", positions * small.model.config.vocab_size)
    prompts, texts = pairs()
    same(small, prompts[:12], texts[:12])


def test_nothing_is_read_twice_and_few_logits_are_made(small, monkeypatch):
    read, made, forward = [], [], small.model.forward

    def counting(*arguments, **options):
        read.append(options["input_ids"].numel())
        output = forward(*arguments, **options)
        made.append(output.logits.shape[1])
        return output

    monkeypatch.setattr(small.model, "forward", counting)
    prompts = [prompt_of("virtual-tokens", q, PASSAGES[1] * 3) for q in QUESTIONS * 2]
    texts = [ANSWERS[0]] * 3 + [ANSWERS[3]] * 3
    answer_loglikelihoods(small, prompts, texts)
    ends = end_ids(small.model, small.tokenizer)
    rows = [
        (*small.encoder.encode(p).ids, *small.encoder.answer_ids(a, ends)[:-1])
        for p, a in zip(prompts, texts, strict=True)
    ]
    assert sum(read) == len({row[: n + 1] for row in rows for n in range(len(row))})
    first = [len(small.encoder.encode(p).ids) for p in prompts]
    scored = {r[: n + 1] for r, f in zip(rows, first, strict=True) for n in range(f - 1, len(r))}
    assert sum(made) == len(scored)
    # What is kept from one row to the next: each passage once more where a row is full.
    monkeypatch.setitem(answers._PACKED, "cpu", 40)
    pieces = len(read)
    answer_loglikelihoods(small, prompts, texts)
    assert len(read) > 2 * pieces + 1
    assert sum(read[pieces:]) <= sum(read[:pieces]) + len(read)  # a last token is read again


def test_pairs_whose_ids_meet_by_accident(small, monkeypatch):
    long = Prompt((Message("user", (Part("Tin melts. Lead melts. Zinc", "question"),)),))
    plain = Generator(small.model, small.tokenizer, layout="plain")
    begun = Prompt((Message("user", (Part("Tin melts.", "question"),)),))
    for budget in (512, 3):
        monkeypatch.setitem(answers._PACKED, "cpu", budget)
        texts = ["too", "Lead melts. Zinc too", "Lead", "too", "Lead melts. Zinc too, late"]
        same(plain, [long, begun, begun, long, begun], texts, end=False)


@pytest.mark.parametrize(
    ("kind", "options"),
    [
        ("gpt2", {"n_embd": 16, "n_layer": 2, "n_head": 2, "n_positions": 400}),
        ("mistral", SMALL | {"sliding_window": 4}),
        ("gemma2", SMALL | {"sliding_window": 4, "head_dim": 8, "final_logit_softcapping": 2.0}),
        ("falcon", {"hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2}),
        ("mamba", {"hidden_size": 16, "num_hidden_layers": 2, "state_size": 4}),
    ],
)
def test_models_that_read_otherwise(generator, monkeypatch, kind, options):
    other = untrained(generator, kind, **options)
    assert packs(other.model) == (kind == "gpt2")
    monkeypatch.setattr(Generator, "window", 400)
    prompts, texts = pairs()
    for limit in (1000, 5):
        monkeypatch.setattr(likelihood, "_LOGITS", limit * other.model.config.vocab_size)
        same(other, prompts[::3], texts[::3])


def test_attention_that_is_no_kernel(generator):
    eager = untrained(generator, "llama", **SMALL, attn_implementation="eager")
    assert eager.model.config._attn_implementation == "eager" and packs(eager.model)
    prompts, texts = pairs()
    same(eager, prompts[:9], texts[:9])


@pytest.mark.parametrize("placement", ["middle", "start"])
def test_virtual_tokens_stand_in_the_prompts(small, placement):
    style = STYLES["virtual-tokens"]
    rows = torch.randn(3, 16, generator=torch.Generator().manual_seed(1))
    template = template_hash(style, small.tokenizer.chat_template)
    tokens = VirtualTokens(
        rows, "small", small.base_hash(), "chat", placement, style, template
    )  # fmt: skip
    prompts, texts = pairs()
    found = answer_loglikelihoods(
        small, prompts[:6], texts[:6], end=False, virtual_tokens=[tokens, None] * 3
    )
    embed = small.model.get_input_embeddings()
    for place, (prompt, text) in enumerate(zip(prompts[:6], texts[:6], strict=True)):
        ids = small.encoder.encode(prompt)
        before, after = ids.around(placement)
        answer = small.encoder.answer_ids(text, [2])[:-1]
        parts = [embed(torch.tensor(before, dtype=torch.long))]
        parts += [rows] if place % 2 == 0 else []
        parts.append(embed(torch.tensor([*after, *answer])))
        with torch.inference_mode():
            logits = small.model(inputs_embeds=torch.cat(parts)[None]).logits[0].double()
        logprobs = torch.log_softmax(logits, -1)[-len(answer) - 1 : -1]
        wanted = logprobs.gather(-1, torch.tensor(answer)[:, None]).sum()
        assert found[place, 0] == pytest.approx(float(wanted), abs=1e-4)


def test_nothing_to_score_and_progress(small):
    prompts, texts = pairs()
    assert answer_loglikelihoods(small, [], []).shape == (0, 2)
    assert answer_loglikelihoods(small, prompts[:2], ["", ""], end=False).tolist() == [[0, 0]] * 2
    done = []
    same(small, prompts[:2], ["", "Tin"], end=False)
    answer_loglikelihoods(small, prompts, texts, progress=done.append)
    assert done == sorted(done) and done[-1] == len(prompts)


def test_what_does_not_fit_is_refused(small, monkeypatch):
    monkeypatch.setattr(Generator, "window", 40)
    prompts, _ = pairs()
    with pytest.raises(ModelError, match=r"answer 'tin tin .*do not fit into the 40 tokens"):
        answer_loglikelihoods(small, prompts[2:3], ["tin " * 40])
