"""Prompts that begin alike are read once, and are answered as if each were read alone."""

from types import SimpleNamespace

import pytest
import torch

from ragkit.models import prefixes
from ragkit.models.prefixes import one_by_one, shared_prefixes

ROWS = [
    (5, 6, 7, 8, 9),
    (5, 6, 7),
    (5, 6, 7, 8, 9, 10, 11),
    (20,),
    (5, 6, 30, 31),
    (20, 21),
]


@pytest.mark.parametrize(
    ("budget", "limit", "room"),
    [(10_000, 64, 0), (12, 64, 0), (1, 64, 0), (10_000, 2, 0), (24, 64, 3)],
)
def test_caches_are_those_of_rows_read_alone(generator, budget, limit, room):
    model, seen = generator.model, []
    for batch, cache in shared_prefixes(model, ROWS, budget, limit, room):
        assert len(batch) <= limit
        assert len(batch) == 1 or len(batch) * (max(len(ROWS[i]) for i in batch) + room) <= budget
        for row, position in enumerate(batch):
            seen.append(position)
            length = len(ROWS[position]) - 1
            if not length:
                continue
            with torch.no_grad():
                alone = model(torch.tensor([ROWS[position][:-1]]), use_cache=True)
            for ours, its in zip(cache.layers, alone.past_key_values.layers, strict=True):
                width = ours.keys.shape[2]
                torch.testing.assert_close(
                    ours.keys[row, :, width - length :], its.keys[0], atol=2e-3, rtol=2e-3
                )
                torch.testing.assert_close(
                    ours.values[row, :, width - length :], its.values[0], atol=2e-3, rtol=2e-3
                )
    assert sorted(seen) == list(range(len(ROWS)))


def test_what_is_shared_is_read_once(generator, monkeypatch):
    read = []
    forward = generator.model.forward

    def counting(*arguments, **options):
        read.append(options["input_ids"].shape[1])
        return forward(*arguments, **options)

    monkeypatch.setattr(generator.model, "forward", counting)
    list(shared_prefixes(generator.model, ROWS, 10_000, 64))
    # The tree's edges: 5 6 | 7 8 | 9 10 (their last tokens are not read), 30 | 20
    assert sum(read) == 2 + 2 + 2 + 1 + 1


def test_a_gpu_reads_one_by_one_what_begins_alike_and_a_cpu_everything(generator, monkeypatch):
    apart = [(n, n + 1, n + 2) for n in range(0, 90, 3)]
    assert one_by_one(generator.model, ROWS)
    assert one_by_one(generator.model, apart)
    elsewhere = SimpleNamespace(config=generator.model.config, device=torch.device("cuda"))
    assert one_by_one(elsewhere, ROWS)
    assert not one_by_one(elsewhere, apart)
    assert not one_by_one(elsewhere, [ROWS[0]])
    recurrent = SimpleNamespace(
        config=generator.model.config, device=torch.device("cpu"), _is_stateful=True
    )
    assert not one_by_one(recurrent, ROWS)
    monkeypatch.setattr(prefixes, "DynamicLayer", type("Sliding", (), {}))
    assert not one_by_one(generator.model, ROWS)


def test_values_may_be_of_another_size_than_keys():
    layer = prefixes.RoomyLayer(2)
    for tokens in (3, 1, 4):  # the last ones are more than there is room for
        keys, values = layer.update(torch.ones(1, 2, tokens, 8), torch.ones(1, 2, tokens, 4))
    assert (keys.shape, values.shape) == ((1, 2, 8, 8), (1, 2, 8, 4))
    assert bool(keys.eq(1).all()) and bool(values.eq(1).all())


def test_rows_that_are_stacked_are_freed():
    rows = [[(torch.ones(1, 2, 3, 4), torch.ones(1, 2, 3, 4))] for _ in range(2)]
    prefixes.stack(rows, room=1)
    assert all(t.untyped_storage().nbytes() == 0 for of in rows for pair in of for t in pair)
