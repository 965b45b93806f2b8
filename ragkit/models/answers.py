"""Log-probabilities of answers behind prompts: what pairs begin with alike is read once.

Pairs stand in the order of their ids, as the branches of a prefix tree. Pieces of the tree are read
as one row each, without padding: its mask lets a token see its own branch alone, its position is
its depth, and logits are made where a token of an answer is predicted. The branch on which the next
piece grows is kept as keys and values.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from itertools import pairwise
from typing import TYPE_CHECKING, Any, TypeAlias

import numpy as np
import torch
from numpy.typing import NDArray
from transformers.cache_utils import DynamicCache

from ..errors import ModelError
from .likelihood import Likelihoods, alike, logit_rows
from .loading import end_ids
from .precision import pad
from .prefixes import Layers, common_length, roomy_cache
from .splice import spliced

if TYPE_CHECKING:
    from ..prompts import Prompt
    from .generator import Generator, Plugged

_PACKED = {"cpu": 512}  # tokens read as one row: enough to fill the processor, and no more to mask
_PACKED_ELSEWHERE = 4096

_Scores: TypeAlias = Iterator[tuple[int, NDArray[np.int64], NDArray[np.float64]]]
"""How many pairs are done, places of pairs, and what is added to the nats of each."""


@dataclass(frozen=True, slots=True)
class _Pair:
    """A pair's ids: the last one is predicted, and not read.

    Attributes:
        place: where it was given.
        ids: prompt and answer.
        first: the depth of the token that predicts the answer's first.
    """

    place: int
    ids: tuple[int, ...]
    first: int


def answer_loglikelihoods(
    generator: Generator,
    prompts: Sequence[Prompt],
    answers: Sequence[str],
    *,
    end: bool = True,
    virtual_tokens: Plugged = None,
    progress: Callable[[int], None] = lambda done: None,
) -> Likelihoods:
    """Return the log-probability of each answer behind its prompt, and the answer's tokens.

    Prompt and answer are tokenised apart, as in training and serving. What prompts begin with alike
    is read once: put first what many have in common, a passage say.

    Args:
        generator: reads.
        prompts: one for each answer.
        answers: data, each in the place of what the generator would write.
        end: whether the token that ends an answer is scored too.
        virtual_tokens: as in `Generator.generate`.
        progress: told how many answers are scored.

    Returns:
        float64 of shape [answers, 2]: nats (the sum over the tokens, at most 0), and tokens.

    Raises:
        ModelError: a prompt and its answer do not fit into the window.
        SettingsError: more virtual tokens are asked for than there are.
    """
    rows, table = generator.rows(prompts, virtual_tokens, 0)
    ends = end_ids(generator.model, generator.tokenizer)
    pairs = []
    out = np.zeros((len(rows), 2))
    for place, (row, answer) in enumerate(zip(rows, answers, strict=True)):
        ids = generator.encoder.answer_ids(answer, ends)
        ids = ids if end else ids[:-1]
        if len(row) + len(ids) > generator.window:
            raise ModelError(
                f"a prompt of {len(row)} tokens and its answer {answer[:40]!r}… of {len(ids)} do "
                f"not fit into the {generator.window} tokens of {generator.name!r}. Keep fewer or "
                "shorter passages, or leave the question out."
            )
        out[place, 1] = len(ids)
        if ids:
            pairs.append(_Pair(place, (*row, *ids), len(row) - 1))
    read = partial(_packed, generator.model)
    if not packs(generator.model):
        read = partial(_padded, generator.model, budget=generator.batch_tokens)
    with spliced(generator.model, table), torch.inference_mode():
        for done, places, nats in read(pairs):
            np.add.at(out[:, 0], places, nats)
            progress(len(rows) - len(pairs) + done)
    return out


def packs(model: Any) -> bool:
    """Tell whether a model can read branches of a tree as one row.

    It keeps the keys and values of all tokens, and attends as the mask that it is given says.
    """
    ways = model.config.get_text_config()._attn_implementation
    follows = getattr(model, "_supports_attention_backend", False) and ways in ("sdpa", "eager")
    return bool(follows) and roomy_cache(model, 0) is not None


def _packed(model: Any, pairs: Sequence[_Pair]) -> _Scores:
    pack = _Pack(model)
    for done, pair in enumerate(sorted(pairs, key=lambda pair: pair.ids)):
        last = len(pair.ids) - 1
        step = min(pack.budget, pack.positions)  # longer rows are read piece by piece
        stops = [*range(pack.common(pair, last) + step, last, step), last]
        for begin, stop in pairwise([0, *stops]):
            if not pack.takes(pair, begin, stop):
                yield done, *pack.read()
            pack.add(pair, begin, stop)
    if pairs:
        yield len(pairs), *pack.read()


class _Pack:
    """Branches of the tree that are read as one row, behind the part of them that was read before.

    A place is that of a token among those kept and those to read, kept ones first.
    """

    def __init__(self, model: Any) -> None:
        self._model = model
        self.budget = _PACKED.get(model.device.type, _PACKED_ELSEWHERE)
        self.positions = logit_rows(model)
        self._branch: tuple[int, ...] = ()  # the ids added last, and the place of each
        self._path: NDArray[np.int64] = np.arange(0)
        self._layers: Layers = []
        self._begin(0)

    def _begin(self, kept: int) -> None:
        """Begin a row behind the first `kept` ids of the branch."""
        path = torch.from_numpy(self._path[:kept]).to(self._model.device)
        self._layers = [(k[:, :, path], v[:, :, path]) for k, v in self._layers]
        self._branch, self._path = self._branch[:kept], np.arange(kept)
        self._kept = kept
        self._ids: list[int] = []
        self._depths: list[int] = []
        self._seen: list[tuple[int, NDArray[np.int64]]] = []
        self._scored: list[tuple[int, NDArray[np.int64], tuple[int, ...]]] = []

    def common(self, pair: _Pair, stop: int) -> int:
        """Return how many of a pair's first `stop` ids are those of the branch."""
        return min(stop, common_length(self._branch, pair.ids))

    def takes(self, pair: _Pair, begin: int, stop: int) -> bool:
        """Tell whether the row still takes what `add` would add."""
        common, first = self.common(pair, stop), max(pair.first, begin)
        scored = sum(len(places) for _, places, _ in self._scored) + stop - first
        fits = len(self._ids) + stop - common <= self.budget and scored <= self.positions
        made = first >= common or bool(self._path[first] >= self._kept)  # by this row, not before
        return not self._ids or (fits and made)

    def add(self, pair: _Pair, begin: int, stop: int) -> None:
        """Add a pair's first `stop` ids, of which those from `begin` on predict, if any."""
        common, first = self.common(pair, stop), max(pair.first, begin)
        if not self._ids:
            common = min(common, first)
            self._begin(common)
        start, seen = len(self._ids), self._path[:common]
        new = self._kept + start + np.arange(stop - common)
        self._branch, self._path = pair.ids[:stop], np.concatenate([seen, new])
        self._seen.append((start, seen))
        self._ids += pair.ids[common:stop]
        self._depths += range(common, stop)
        if first < stop:
            targets = pair.ids[first + 1 : stop + 1]
            self._scored.append((pair.place, self._path[first:], targets))

    def read(self) -> tuple[NDArray[np.int64], NDArray[np.float64]]:
        """Read the row, and begin another; return the pair of each token scored, and its nats."""
        device, scored = self._model.device, self._scored
        places = np.concatenate([np.arange(0), *(places for _, places, _ in scored)])
        predicting, rows = np.unique(places - self._kept, return_inverse=True)
        output = self._model(
            input_ids=torch.tensor([self._ids], device=device),
            attention_mask=self._mask(),
            position_ids=torch.tensor([self._depths], device=device),
            past_key_values=DynamicCache(self._layers) if self._kept else DynamicCache(),
            use_cache=True,
            logits_to_keep=torch.from_numpy(predicting).to(device) if scored else 1,
        )
        self._layers = [(layer.keys, layer.values) for layer in output.past_key_values.layers]
        logits = output.logits[0].float()
        targets = torch.tensor([i for _, _, ids in scored for i in ids], dtype=torch.long)
        found = logits[torch.from_numpy(rows).to(device), targets.to(device)]
        nats = found - logits.logsumexp(-1)[torch.from_numpy(rows).to(device)]
        owners = [pair for pair, _, ids in scored for _ in ids]
        self._ids = []  # the next `add` begins a row
        return np.array(owners, np.int64), nats.clamp(max=0).double().cpu().numpy()

    def _mask(self) -> torch.Tensor:
        """Return what is added to attention, of shape [1, 1, ids, kept and ids]."""
        model, size = self._model, len(self._ids)
        unseen = torch.finfo(model.dtype).min
        mask = torch.full((size, self._kept + size), unseen, dtype=model.dtype)
        ends = [start for start, _ in self._seen[1:]] + [size]
        for (start, seen), end in zip(self._seen, ends, strict=True):
            mask[start:end, torch.from_numpy(seen)] = 0
            own = slice(self._kept + start, self._kept + end)
            mask[start:end, own] = mask[start:end, own].triu(1)
        return mask[None, None].to(model.device)


def _padded(model: Any, pairs: Sequence[_Pair], budget: int) -> _Scores:
    """Score pairs in batches of like length, padded on the right, where no causal model looks."""
    positions, done = logit_rows(model), 0
    for like in alike([len(pair.ids) - 1 for pair in pairs], budget, limit=positions):
        width = len(pairs[like[0]].ids) - 1
        size = max(1, positions // (width - min(pairs[position].first for position in like)))
        for start in range(0, len(like), size):
            part = [pairs[position] for position in like[start : start + size]]
            tail = min(pair.first for pair in part)
            ids, mask = pad([p.ids[:-1] for p in part], 0, left=False, device=model.device)
            targets, kept = pad([p.ids[tail + 1 :] for p in part], 0, left=False, device="cpu")
            first = torch.tensor([[pair.first - tail] for pair in part])
            scored = kept * (torch.arange(kept.shape[1]) >= first)
            logits = model(
                input_ids=ids,
                attention_mask=mask,
                use_cache=False,
                logits_to_keep=targets.shape[1],
            ).logits.float()
            found = logits.gather(-1, targets.to(logits.device)[..., None])[..., 0]
            nats = (found - logits.logsumexp(-1)).clamp(max=0).double().cpu() * scored
            done += len(part)
            yield done, np.array([pair.place for pair in part]), nats.sum(1).numpy()
