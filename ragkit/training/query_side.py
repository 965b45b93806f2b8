"""Encoders that change the query's side alone: the index of their base stays as it is.

They are sentence-transformers models with a Router, and `BiEncoder.describe` tells of which encoder
their documents' side is.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from sentence_transformers import SentenceTransformer
from sentence_transformers.base.modules import Dense, Normalize, Router

from ..errors import ModelError, SettingsError
from .retriever_loss import RetrieverLoss


def two_towers(base: SentenceTransformer, queries: SentenceTransformer) -> SentenceTransformer:
    """Return the encoder that reads queries as one model and documents as another."""
    sides: list[Any] = [list(queries), list(base)]
    return _like(base, [Router.for_query_document(*sides)])


def with_adapter(base: SentenceTransformer, adapter: QueryAdapter) -> SentenceTransformer:
    """Return the encoder that multiplies its query vectors by an adapter's matrix."""
    size = adapter.bias.shape[0]
    dense = Dense(size, size, bias=True, activation_function=torch.nn.Identity())
    with torch.no_grad():
        dense.linear.weight.copy_(adapter.matrix())
        dense.linear.bias.copy_(adapter.bias)
    modules: list[Any] = list(base)
    last, query = modules[-1], [modules[-1], dense]
    if base.similarity_fn_name == "cosine":  # learnt on normalised vectors
        plain = [] if isinstance(last, Normalize) else [Normalize()]
        query = [last, *plain, dense, Normalize()]
    router = Router.for_query_document(query, [last])
    return _like(base, [*modules[:-1], router])


def check_symmetric(model: SentenceTransformer, name: str) -> None:
    """Refuse an encoder whose query's side is one of its own already.

    Raises:
        ModelError: it has a Router.
    """
    if any(isinstance(module, Router) for module in model):
        raise ModelError(
            f"encoder {name!r} reads queries and documents in different ways (it has a Router) and "
            "cannot be trained further. Train the encoder that it was made of."
        )


def _like(base: SentenceTransformer, modules: Sequence[Any]) -> SentenceTransformer:
    return SentenceTransformer(
        modules=list(modules),
        device=str(base.device),
        prompts={name: prompt or "" for name, prompt in base.prompts.items()},
        similarity_fn_name=base.similarity_fn_name,
    ).eval()


class QueryAdapter(torch.nn.Module):
    """A linear map of query vectors, q -> (I + A) q + b, learnt on vectors alone.

    Args:
        size: the components of a vector.
        rank: of A, which then is the product of two thin matrices; a full one if 0.
        loss: what is minimised.
    """

    def __init__(self, size: int, rank: int, loss: RetrieverLoss) -> None:
        super().__init__()
        self.loss = loss
        self.rank = rank
        self.bias = torch.nn.Parameter(torch.zeros(size))
        if rank:
            self.left = torch.nn.Parameter(torch.zeros(size, rank))
            self.right = torch.nn.Parameter(torch.randn(rank, size) / size**0.5)
        else:
            self.full = torch.nn.Parameter(torch.zeros(size, size))

    def matrix(self) -> torch.Tensor:
        """Return I + A, of shape [size, size]."""
        change = self.left @ self.right if self.rank else self.full
        return torch.eye(len(self.bias), device=change.device) + change

    def adapted(self, queries: torch.Tensor) -> torch.Tensor:
        """Return the query vectors that are compared, [queries, size]."""
        return queries @ self.matrix().T + self.bias

    def forward(
        self,
        queries: torch.Tensor,
        documents: torch.Tensor,
        label: Mapping[str, torch.Tensor],
        **_: Any,
    ) -> dict[str, torch.Tensor]:
        """Return the loss of a batch of vectors."""
        return {"loss": self.loss.loss(self.adapted(queries), documents, dict(label))}


@torch.no_grad()
def averaged(
    base: Mapping[str, torch.Tensor], tuned: Mapping[str, torch.Tensor], share: float
) -> dict[str, torch.Tensor]:
    """Return (1 - share) · base + share · tuned of two state dicts (Wortsman et al. 2022, WiSE-FT).

    Tensors that are not of floating point, or that the base lacks, are the tuned ones.

    Raises:
        SettingsError: `share` lies outside 0…1.
    """
    if not 0 <= share <= 1:
        raise SettingsError(f"the share of the learnt weights must lie in 0…1, not {share}")
    return {
        name: torch.lerp(base[name], tensor, share)
        if name in base and tensor.is_floating_point()
        else tensor
        for name, tensor in tuned.items()
    }
