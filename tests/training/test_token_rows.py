"""Rows from prompts: every number of passages from one reading, and what a window cuts."""

import pytest
import torch

from ragkit import Document, Query
from ragkit.errors import DataError
from ragkit.models import Generator
from ragkit.models.prefix_cache import PrefixCache
from ragkit.models.splice import spliced
from ragkit.readers import GeneratorReader
from ragkit.styles import style_named
from ragkit.training.token_loss import TokenTrainee, collate
from ragkit.training.token_runs import Retrieved, TokenRun
from ragkit.types import Example, Hit

TEXTS = [f"Tin number {n} melts at {200 + n} degrees. It is heavy." for n in range(5)]
EXAMPLE = Example(Query("q", "Who melts?"), answers=("Tin", "Lead"))
HITS = [Hit(Document(str(n), text), 1.0) for n, text in enumerate(TEXTS)]


@pytest.fixture
def generator(tiny_folder):
    return Generator.load(str(tiny_folder), device="cpu", precision="fp32")


def run_of(generator, *, tokens=6, context_tokens=400, placement="middle"):
    style = style_named("virtual-tokens").placing(placement)
    reader = GeneratorReader(generator, style=style, context_tokens=context_tokens)
    task = Retrieved([EXAMPLE], [HITS])
    cache = PrefixCache(generator.model, 10**8)
    return TokenRun(generator, style, reader.prompt, placement, tokens, task, task, (0, 5), cache)


def row(run, passages, tokens=3, key="k"):
    return run._made(key, EXAMPLE, HITS[:passages], tokens, 0)


def test_one_reading_serves_every_number_of_passages(generator):
    run = run_of(generator)
    whole = row(run, 5).before
    run.prefixes.rows(["k"], [whole])
    assert run.prefixes.read_tokens == len(whole)
    for passages in (1, 3, 4, 5):
        before = row(run, passages).before
        run.prefixes.rows(["k"], [before])
    # Between passages stands one line end, behind the last one two: those are read anew.
    assert run.prefixes.read_tokens <= len(whole) + 3 * 2
    grown = run_of(generator)
    for passages in (1, 3, 5, 5, 2):
        grown.prefixes.rows(["k"], [row(grown, passages).before])
    assert grown.prefixes.read_tokens <= len(whole) + 4 * 2


@pytest.mark.parametrize("placement", ["middle", "front", "last"])
def test_a_row_is_the_prompt_that_a_reader_asks_with(generator, placement):
    run = run_of(generator, placement=placement)
    for passages in (0, 1, 5):
        made = row(run, passages)
        prompt = run.prompt(EXAMPLE.query, HITS[:passages])
        assert made.before + made.after == generator.encoder.encode(prompt).ids
        assert made.answer == (*generator.encoder.data_ids("Tin"), 1)


def test_passages_alone_are_cut(generator):
    short, long = row(run_of(generator, context_tokens=40), 5), row(run_of(generator), 5)
    assert len(short.before) < len(long.before)
    assert short.before == long.before[: len(short.before) - 1] + short.before[-1:]
    assert short.after == long.after and short.answer == long.answer and short.tokens == 3
    run = run_of(generator)
    prompt = run.prompt(EXAMPLE.query, HITS)
    run.prompt = lambda query, hits, room: prompt
    run.generator.model.config.max_position_embeddings = len(long.before)
    with pytest.raises(DataError, match="Lower --context-tokens"):
        row(run, 5)


def test_rows_with_and_without_passages_go_together(generator):
    run = run_of(generator)
    rows = [row(run, passages, key=passages) for passages in (0, 2, 5)]
    trainee = TokenTrainee(generator.model, torch.randn(6, 32), run.prefixes)
    count = sum(len(each.answer) for each in rows)
    whole = trainee(**collate(rows), num_items_in_batch=count)["loss"]
    apart = sum(trainee(**collate([each]), num_items_in_batch=count)["loss"] for each in rows)
    torch.testing.assert_close(whole, apart, atol=1e-5, rtol=0)


def test_other_threads_read_as_they_always_did(generator):
    from threading import Thread

    model, found = generator.model, []
    ids = torch.tensor([[3, 4, 5]])
    expected = model(ids).logits
    with spliced(model, torch.randn(2, 32), first=torch.tensor([[320, 321, 5]])):
        thread = Thread(target=lambda: found.append(model(ids).logits))
        thread.start()
        thread.join()
        here = model(ids).logits
    assert torch.equal(found[0], expected)
    assert not torch.equal(here, expected)
