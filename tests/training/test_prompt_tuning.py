"""peft's prompt tuning against tokens that stand before everything: the same loss and gradient."""

from copy import deepcopy
from dataclasses import replace

import torch

from ragkit.models.prefix_cache import PrefixCache
from ragkit.training.prompt_tuning import PromptTuningTrainee
from ragkit.training.token_loss import TokenRow, TokenTrainee, collate


def test_it_is_a_placement_of_virtual_tokens(tiny):
    start = torch.randn(4, 32, generator=torch.Generator().manual_seed(1))
    rows = [
        TokenRow("a", (5, 6, 7), 4, (8,), (12, 2)),
        TokenRow("b", (), 4, (9, 10, 11, 12, 13), (14, 15, 2)),
    ]
    tuned = PromptTuningTrainee(deepcopy(tiny), start)
    ours = TokenTrainee(tiny, start, PrefixCache(tiny, 0))
    first = [replace(row, before=(), after=row.before + row.after) for row in rows]
    losses = tuned(**collate(rows))["loss"], ours(**collate(first))["loss"]
    torch.testing.assert_close(*losses, atol=1e-5, rtol=0)
    for loss in losses:
        loss.backward()
    torch.testing.assert_close(tuned.tokens.grad, ours.tokens.grad, atol=1e-5, rtol=0)
    assert [name for name, _ in tuned.named_parameters()] == ["tokens"]
