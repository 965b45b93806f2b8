"""The frozen prefix, the loss and its gradients, against a plain pass through everything."""

import pytest
import torch

from ragkit.errors import ModelError
from ragkit.models import prefix_cache
from ragkit.models.precision import weights_hash
from ragkit.models.prefix_cache import PrefixCache
from ragkit.models.splice import VirtualIds, spliced
from ragkit.training import token_loss
from ragkit.training.token_loss import TokenRow, TokenTrainee, collate

COUNT, SIZE = 6, 32


def rows():
    return [
        TokenRow("a", (5, 6, 7, 8, 9), 4, (10, 11), (12, 2)),
        TokenRow("b", (5, 6), 1, (13,), (14, 15, 16, 2)),
        TokenRow("c", (), 6, (10, 11, 12, 13), (2,)),
        TokenRow("d", (20, 21, 22), 2, (23, 24), (25, 26, 2)),
    ]


def start():
    return torch.randn(COUNT, SIZE, generator=torch.Generator().manual_seed(1))


def plain_loss(model, tokens, rows):
    """Sum the losses of rows read one by one, whole, with the embeddings put in by hand."""
    embed, total, count = model.get_input_embeddings(), 0.0, 0
    for row in rows:
        parts = [embed(torch.tensor(row.before, dtype=torch.long)), tokens[: row.tokens]]
        parts.append(embed(torch.tensor([*row.after, *row.answer])))
        logits = model(inputs_embeds=torch.cat(parts)[None]).logits[0]
        scored = logits[-len(row.answer) - 1 : -1]
        total = total + torch.nn.functional.cross_entropy(
            scored, torch.tensor(row.answer), reduction="sum"
        )
        count += len(row.answer)
    return total / count


def test_the_frozen_prefix_gives_the_loss_and_gradient_of_the_whole(tiny):
    trainee = TokenTrainee(tiny, start(), PrefixCache(tiny, 10**9))
    tokens = start().requires_grad_()
    expected = plain_loss(tiny, tokens, rows())
    (gradient,) = torch.autograd.grad(expected, tokens)
    for _ in range(2):  # read, then kept
        trainee.zero_grad()
        loss = trainee(**collate(rows()))["loss"]
        loss.backward()
        torch.testing.assert_close(loss, expected, atol=1e-5, rtol=0)
        torch.testing.assert_close(trainee.tokens.grad, gradient, atol=1e-5, rtol=0)


def test_checkpointing_gives_the_same_gradient(tiny):
    trainees = [TokenTrainee(tiny, start(), PrefixCache(tiny, 0))]
    losses = [trainees[0](**collate(rows()))["loss"]]
    losses[0].backward()
    trainees.append(TokenTrainee(tiny, start(), None))
    calls = []
    tiny.model.layers[0].input_layernorm.register_forward_hook(lambda *_: calls.append(1))
    losses.append(trainees[1](**collate(rows()))["loss"])
    losses[1].backward()
    assert len(calls) == 2  # on the way back again
    torch.testing.assert_close(*losses, atol=1e-5, rtol=0)
    torch.testing.assert_close(*[t.tokens.grad for t in trainees], atol=1e-5, rtol=0)


def test_a_batch_of_four_is_four_batches_of_one(tiny):
    trainee = TokenTrainee(tiny, start(), PrefixCache(tiny, 0))
    whole = trainee(**collate(rows()), num_items_in_batch=10)["loss"]
    apart = [trainee(**collate([row]), num_items_in_batch=10)["loss"] for row in rows()]
    torch.testing.assert_close(whole, sum(apart), atol=1e-6, rtol=0)


def test_a_long_answer_beside_rows_shorter_than_it(tiny, monkeypatch):
    monkeypatch.setitem(token_loss._PASS, "cpu", 8)  # rows of 7 and of 2 are read apart
    long = TokenRow("a", (5, 6), 1, (10,), (12, 13, 14, 15, 16, 2))
    short = TokenRow("b", (5, 6, 7), 1, (), (12, 2))
    trainee = TokenTrainee(tiny, start(), PrefixCache(tiny, 0))
    whole = trainee(**collate([long, short]), num_items_in_batch=8)["loss"]
    apart = [trainee(**collate([row]), num_items_in_batch=8)["loss"] for row in (long, short)]
    torch.testing.assert_close(whole, sum(apart), atol=1e-6, rtol=0)


@pytest.mark.parametrize("count", [1, 3, 6])
def test_only_the_first_k_tokens_have_a_gradient(tiny, count):
    trainee = TokenTrainee(tiny, start(), PrefixCache(tiny, 0))
    row = TokenRow("a", (5, 6), count, (10,), (12, 2))
    trainee(**collate([row]))["loss"].backward()
    moved = trainee.tokens.grad.abs().sum(dim=1) > 0
    assert moved.tolist() == [place < count for place in range(COUNT)]


def test_training_moves_no_weight_of_the_model(tiny):
    before, tied = weights_hash(tiny.state_dict()), tiny.lm_head.weight
    trainee = TokenTrainee(tiny, start(), PrefixCache(tiny, 10**9))
    optimizer = torch.optim.AdamW(trainee.parameters(), lr=0.1)
    for _ in range(3):
        optimizer.zero_grad()
        trainee(**collate(rows()))["loss"].backward()
        optimizer.step()
    assert [name for name, _ in trainee.named_parameters()] == ["tokens"]
    assert not torch.equal(trainee.tokens, start())
    assert weights_hash(tiny.state_dict()) == before
    assert tiny.lm_head.weight is tied is tiny.get_input_embeddings().weight
    assert tiny.get_input_embeddings().weight.shape == tiny.lm_head.weight.shape == (97, 32)


def test_labels_are_the_answers_and_nothing_else():
    labels = collate(rows())["labels"]
    assert labels.tolist() == [
        [-100, -100, 12, 2],
        [14, 15, 16, 2],
        [-100, -100, -100, 2],
        [-100, 25, 26, 2],
    ]


@pytest.mark.parametrize("on_disk", [False, True])
def test_prefixes_are_read_once_and_extended(tiny, tmp_path, on_disk):
    cache = PrefixCache(tiny, 10**9, tmp_path if on_disk else None)
    for ids, read in (((1, 2), 2), ((1, 2, 3, 4), 4), ((1, 2, 3), 4), ((1, 9), 5), ((1, 2, 3), 5)):
        found = cache.rows(["q"], [ids])
        assert cache.read_tokens == read
        fresh = tiny(torch.tensor([ids]), use_cache=True).past_key_values
        for mine, its in zip(found.layers, fresh.layers, strict=True):
            torch.testing.assert_close(mine.keys, its.keys, atol=1e-5, rtol=0)
            torch.testing.assert_close(mine.values, its.values, atol=1e-5, rtol=0)
    assert cache.kept_tokens == 4
    cache.close()
    assert not list(tmp_path.iterdir())


def test_a_full_disk_leaves_what_was_kept(tiny, tmp_path, monkeypatch, caplog):
    cache = PrefixCache(tiny, 10**9, tmp_path)
    cache.rows(["q"], [(1, 2)])

    def full(tensors, path):
        path.write_bytes(b"half")
        raise OSError("no space")

    monkeypatch.setattr(prefix_cache, "save_file", full)
    for ids, read in (((1, 2, 3), 3), ((1, 2), 3), ((1, 2, 3), 4)):
        cache.rows(["q"], [ids])
        assert cache.read_tokens == read
    assert "no space" in caplog.text


def test_the_cache_keeps_to_its_budget(tiny):
    token = 2 * 3 * 2 * 8 * 4
    cache = PrefixCache(tiny, 5 * token)
    for _ in range(2):
        for key, ids in (("a", (1, 2, 3)), ("b", (1, 2, 3)), ("c", (4, 5))):
            cache.rows([key], [ids])
    assert cache.kept_tokens == 5
    assert cache.read_tokens == 8 + 3  # b did not fit, and is read again


def test_questions_on_the_same_first_passages_share_their_reading(tiny):
    cache, shared = PrefixCache(tiny, 10**9), tuple(range(3, 73))
    cache.rows(["a"], [(*shared, 80, 81)])
    found = cache.rows(["b"], [(*shared, 90)])
    assert cache.read_tokens == 72 + 1
    fresh = tiny(torch.tensor([[*shared, 90]]), use_cache=True).past_key_values
    for mine, its in zip(found.layers, fresh.layers, strict=True):
        torch.testing.assert_close(mine.keys, its.keys, atol=1e-5, rtol=0)
    cache.rows(["c"], [(4, *shared[1:])])  # another beginning
    assert cache.read_tokens == 73 + 70


def test_a_model_without_spliced_ids_is_the_base_bit_for_bit(tiny):
    ids = torch.tensor([[3, 4, 5, 6]])
    expected = tiny(ids).logits
    with spliced(tiny, start()):
        assert torch.equal(tiny(ids).logits, expected)
        assert tiny(ids).logits.shape[-1] == 97
        changed = tiny(torch.tensor([[3, 97, 98, 6]])).logits
    assert torch.equal(tiny(ids).logits, expected)
    embedded = tiny.get_input_embeddings()(ids).clone()
    embedded[0, 1:3] = start()[:2]
    torch.testing.assert_close(changed, tiny(inputs_embeds=embedded).logits)


def test_equal_rows_have_equal_ids(tiny):
    virtual = VirtualIds(tiny)
    assert virtual.of(start()) == tuple(range(97, 97 + COUNT))
    assert virtual.of(start()[:2]) == (97, 98)
    assert virtual.of(start()[1:3] + 1) == (97 + COUNT, 98 + COUNT)
    assert virtual.table().shape == (COUNT + 2, SIZE)


@pytest.mark.parametrize(
    "name", ["Mistral", "Gemma3Text", "Qwen3", "Phi3", "Falcon", "GPT2", "Bloom"]
)
def test_it_is_exact_for_each_kind_of_attention(of_kind, name):
    """Sliding windows, heads shared among queries, learnt and relative positions."""
    model = of_kind(name)
    tokens = start().requires_grad_()
    expected = plain_loss(model, tokens, rows())
    (gradient,) = torch.autograd.grad(expected, tokens)
    trainee = TokenTrainee(model, start(), PrefixCache(model, 10**9))
    for _ in range(2):
        trainee.zero_grad()
        loss = trainee(**collate(rows()))["loss"]
        loss.backward()
        torch.testing.assert_close(loss, expected, atol=1e-5, rtol=0)
        torch.testing.assert_close(trainee.tokens.grad, gradient, atol=1e-6, rtol=0)


def test_a_recurrent_model_has_no_prefix_to_keep(of_kind):
    model = of_kind("Mamba")
    with pytest.raises(ModelError, match="recurrent state"):
        PrefixCache(model, 10**9)
    tokens = start().requires_grad_()
    expected = plain_loss(model, tokens, rows())
    loss = TokenTrainee(model, start(), None)(**collate(rows()))["loss"]
    torch.testing.assert_close(loss, expected, atol=1e-5, rtol=0)
