"""Log-probabilities of given texts under a causal language model."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from copy import deepcopy
from itertools import pairwise
from typing import Any, TypeAlias

import numpy as np
import torch
from numpy.typing import NDArray

from ..errors import ModelError
from .precision import batches, pad
from .prompt_ids import PromptEncoder

Likelihoods: TypeAlias = NDArray[np.float64]
"""Shape [texts, 2]: a text's log-probability in nats (the sum over its tokens), and its tokens."""

_Row: TypeAlias = tuple[list[int], list[list[int]]]
"""A context's ids, at least one, and those of its continuations."""

_LOGITS = 1 << 25  # logits held at a time: 128 MiB in fp32
_TEXT_WINDOW = 2048
_WORTH = 128  # the tokens that are worth a forward pass of their own


class LikelihoodScorer:
    """Scores texts with a causal language model of transformers.

    Args:
        model: the model, on its device.
        tokenizer: its tokenizer.
        window: the tokens that the model reads at once.
        batch_tokens: the tokens in a padded batch.
    """

    def __init__(self, model: Any, tokenizer: Any, window: int, batch_tokens: int) -> None:
        self._model = model
        self._tokenizer = tokenizer
        self._encoder = PromptEncoder(tokenizer, chat=False)
        self._window = window
        self._budget = batch_tokens
        self._positions = logit_rows(model)

    @torch.inference_mode()
    def first_tokens(
        self, prompts: Sequence[Sequence[int]], options: Sequence[Sequence[str]]
    ) -> NDArray[np.float32]:
        """Return what `Generator.first_token_logprobs` does, of prompts as token ids."""
        starts = [
            sorted({self._encoder.data_ids(spelling)[0] for spelling in spellings})
            for spellings in options
        ]
        out = np.empty((len(prompts), len(options)), np.float32)
        for batch in batches([len(ids) for ids in prompts], self._budget, limit=self._positions):
            _, logprobs, _ = self._read([prompts[i] for i in batch])
            for column, ids in enumerate(starts):
                out[batch, column] = torch.logsumexp(logprobs[:, ids], dim=-1).cpu().numpy()
        return out

    def continuations(
        self,
        contexts: Sequence[str],
        continuations: Sequence[Sequence[str]],
        progress: Callable[[int], None],
    ) -> list[Likelihoods]:
        """Return what `Generator.loglikelihoods` does.

        Raises:
            ModelError: a continuation is longer than the window.
        """
        start = self._encoder.start_ids()
        rows: list[_Row] = []
        for context, texts in zip(contexts, continuations, strict=True):
            scored = [self._encoder.data_ids(text) for text in texts]
            longest = max(map(len, scored), default=0)
            if longest > self._window:
                text = texts[[len(ids) for ids in scored].index(longest)]
                raise ModelError(
                    f"the continuation {text[:40]!r}… of {longest} tokens does not fit into the "
                    f"model's window of {self._window}. Score a shorter one."
                )
            ids = self._encoder.data_ids(context)
            rows.append((self._context(start, ids, longest), scored))
        out: list[Likelihoods] = [np.empty((0, 2))] * len(rows)
        for done, (place, scores) in enumerate(self._scores(rows), start=1):
            out[place] = scores
            progress(done)
        return out

    def texts(self, texts: Sequence[str], progress: Callable[[int], None]) -> Likelihoods:
        """Return what `Generator.text_loglikelihoods` does."""
        start = self._encoder.start_ids()
        rows: list[_Row] = []
        owners: list[int] = []
        for place, text in enumerate(texts):
            for before, block in self._blocks(self._encoder.data_ids(text)):
                rows.append((self._context(start, before, len(block)), [block]))
                owners.append(place)
        out = np.zeros((len(texts), 2))
        left = Counter(owners)
        for row, scores in self._scores(rows):
            owner = owners[row]
            out[owner] += scores[0]
            left[owner] -= 1
            if not left[owner]:
                del left[owner]
                progress(len(texts) - len(left))
        return out

    def _blocks(self, ids: list[int]) -> Iterator[tuple[list[int], list[int]]]:
        """Cut a text into blocks to score, each with the window that comes before it.

        The first block fills a window and the others half of one, so that only the text's first
        tokens have less than half a window before them.
        """
        window = min(self._window, _TEXT_WINDOW)
        half = max(1, window // 2)
        ends = [0, *range(window, len(ids), half), len(ids)]
        for start, end in pairwise(ends):
            if end > start:
                yield ids[max(0, start - window) : start], ids[start:end]

    def _context(self, start: list[int], ids: list[int], scored: int) -> list[int]:
        """Put the beginning token first, and cut from the left what the window does not hold.

        The last token scored is never read, so `scored` of them take one place less.
        """
        room = self._window - max(scored, 1) + 1 - len(start)
        whole = start + ids[max(0, len(ids) - room) :]
        if whole:
            return whole
        for token in (self._tokenizer.bos_token_id, self._tokenizer.eos_token_id):
            if token is not None:
                return [int(token)]
        raise ModelError(
            "the tokenizer has no beginning token and no end-of-text token, so the first token of "
            "a text has nothing to stand on. Give a context."
        )

    def _scores(self, rows: Sequence[_Row]) -> Iterator[tuple[int, Likelihoods]]:
        """Yield the place of each row and the likelihoods of its continuations."""
        # The contexts' caches are repeated for the continuations, which the budget has to hold.
        fan = max((len(scored) for _, scored in rows), default=1)
        budget = self._budget // max(1, fan)
        lengths = [len(context) for context, _ in rows]
        for batch in alike(lengths, budget, self._positions):
            yield from zip(batch, self._batch([rows[i] for i in batch]), strict=True)

    @torch.inference_mode()
    def _batch(self, rows: Sequence[_Row]) -> list[Likelihoods]:
        cache, first, mask = self._read([context for context, _ in rows])
        owners = [place for place, (_, scored) in enumerate(rows) for _ in scored]
        flat = [continuation for _, scored in rows for continuation in scored]
        totals = np.zeros(len(flat))
        begun = [place for place, continuation in enumerate(flat) if continuation]
        totals[begun] = (
            first[[owners[place] for place in begun], [flat[place][0] for place in begun]]
            .cpu()
            .numpy()
        )
        longer = [place for place, continuation in enumerate(flat) if len(continuation) > 1]
        lengths = [len(flat[place]) - 1 for place in longer]
        for part in alike(lengths, self._budget, self._positions, mask.shape[1]):
            places = [longer[i] for i in part]
            chosen = torch.tensor([owners[place] for place in places], device=mask.device)
            own = deepcopy(cache)
            own.reorder_cache(chosen)
            totals[places] += self._rest(own, mask[chosen], [flat[place] for place in places])
        scores = np.column_stack([totals, [len(continuation) for continuation in flat]])
        return np.split(scores, np.cumsum([len(scored) for _, scored in rows])[:-1])

    def _read(self, rows: Sequence[Sequence[int]]) -> tuple[Any, torch.Tensor, torch.Tensor]:
        """Read rows of ids: their cache, the next token's log-probabilities, the attention mask."""
        ids, mask = pad(rows, 0, left=True, device=self._model.device)
        output = self._model(
            input_ids=ids,
            attention_mask=mask,
            position_ids=(mask.cumsum(1) - 1).clamp(min=0),
            use_cache=True,
            logits_to_keep=1,
        )
        following = torch.log_softmax(output.logits[:, -1].float(), dim=-1)
        return output.past_key_values, following, mask

    def _rest(self, cache: Any, before: torch.Tensor, rows: Sequence[Sequence[int]]) -> Any:
        """Return the log-probabilities of each row's tokens from the second on, summed.

        Args:
            cache: of the rows' contexts, for this call to change.
            before: the contexts' attention mask, of shape [rows, longest context].
            rows: ids of continuations, at least two each.
        """
        ids, mask = pad(rows, 0, left=False, device=before.device)
        inputs, targets, scored = ids[:, :-1], ids[:, 1:, None], mask[:, 1:]
        attended = torch.cat([before, scored], dim=1)
        places = before.sum(1, keepdim=True) + scored.cumsum(1) - 1
        totals = np.zeros(len(rows))
        # A long continuation is read piece by piece: the logits of one piece are held at a time.
        step = max(1, self._positions // len(rows))
        for start in range(0, inputs.shape[1], step):
            columns = slice(start, start + step)
            logits = self._model(
                input_ids=inputs[:, columns],
                attention_mask=attended[:, : before.shape[1] + start + step],
                position_ids=places[:, columns],
                past_key_values=cache,
                use_cache=True,
            ).logits.float()
            found = logits.gather(-1, targets[:, columns])[..., 0] - logits.logsumexp(-1)
            totals += (found * scored[:, columns]).cpu().double().sum(1).numpy()
        return totals


def logit_rows(model: Any) -> int:
    """Return of how many tokens the logits are held at a time."""
    return max(1, _LOGITS // int(model.config.get_text_config().vocab_size))


def alike(lengths: Sequence[int], budget: int, limit: int, more: int = 0) -> Iterator[list[int]]:
    """Group positions as `batches` does, and again where a quarter and more would be padding.

    `more` is what each row takes of the budget beside its length.
    """
    for batch in batches([length + more for length in lengths], budget, limit):
        start = 0
        for end, position in enumerate(batch):
            longest = lengths[batch[start]]
            if 4 * lengths[position] < 3 * longest and longest * (end - start) >= _WORTH:
                yield batch[start:end]
                start = end
        yield batch[start:]
