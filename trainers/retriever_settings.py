"""The settings of `ragkit-train retriever`."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path  # noqa: F401  (what inherited fields are of is looked up here)
from typing import TYPE_CHECKING, Annotated, Any, Literal

from cyclopts import Parameter

from .list_settings import ListSettings, check_lists, teacher_temperature
from .runs import rank, whole_numbers

if TYPE_CHECKING:
    from ragkit.training.retriever_loss import LossSettings

_ENCODER = {"contrastive", "margin-mse", "kl", "lsr"}
USES = {
    "teacher": {"margin-mse", "kl"},
    "teacher_temperature": {"kl", "lsr"},
    "direction": {"kl", "lsr"},
    "in_batch": {"kl", "lsr"},
    "generator": {"lsr"},
    "retriever": {"lsr"},
    "passages": {"lsr"},
    "relist_every": {"lsr"},
    "negatives": {"contrastive", "margin-mse", "kl", "query-adapter"},
    "side": _ENCODER,
    "matryoshka": _ENCODER,
    "dropout": _ENCODER,
    "kept_tokens": _ENCODER,
    "precision": _ENCODER,
}
"""The settings that some objectives alone have a use for, and which these are."""


@Parameter(name="*")
@dataclass(frozen=True, kw_only=True)
class RetrieverSettings(ListSettings):
    """What an encoder learns, from what, and how."""

    objective: Literal["contrastive", "margin-mse", "kl", "lsr", "query-adapter"] = "contrastive"
    """What is learnt: to tell positives from all else in a batch; a cross-encoder's margins, or its
    order of a list; the generator's, from answers alone; or a mere map of query vectors."""
    side: Literal["both", "query"] = "both"
    """Learn both sides, for which the index is then refreshed, or the query's, on the index as it
    is."""
    dev_documents: int = 20_000
    """The most documents that dev questions are searched in; if there are more, those that are
    relevant or that the base finds, and others drawn at random."""
    relist_every: int | None = None
    """Steps after which lsr retrieves documents anew with what it has learnt; never if not
    given."""
    temperature: float | None = None
    """What similarities are divided by; if not given 0.05, or 1 for an encoder that compares by
    inner products."""
    direction: Literal["forward", "reverse"] = "forward"
    """KL of the teacher from the retriever, or the reverse."""
    in_batch: bool | None = None
    """Tell the documents that a teacher or the generator judged from those of a batch's other
    questions too; if not given lsr does, unless the KL is reverse."""
    matryoshka: str = ""
    """Learn vectors that can be cut to these components too, such as 384,192,96."""
    lora: Annotated[int, Parameter(converter=rank)] = 0
    """The rank of LoRA in the encoder, or of the query adapter, such as 8 or r=8; 0 learns all
    weights."""
    scattered: bool = False
    """Draw a batch's questions from everywhere, not with others on the same document: more
    documents to encode."""

    @property
    def adapter(self) -> bool:
        """Whether a map of query vectors is learnt."""
        return self.objective == "query-adapter"

    @property
    def fixed(self) -> bool:
        """Whether documents keep the vectors that the index holds."""
        return self.adapter or self.side == "query"


def check(settings: RetrieverSettings) -> tuple[list[int], list[float]]:
    """Refuse what could not work, before any work is done.

    Returns:
        the seeds, and the shares of the learnt weights that are tried.

    Raises:
        SettingsError: naming the option.
    """
    least = {"dev_documents": 1, "lora": 0, "relist_every": 1}
    loss_of(settings, cosine=True)
    return check_lists(settings, settings.objective, least, USES)


def loss_of(settings: RetrieverSettings, *, cosine: bool) -> LossSettings:
    """Return what is minimised by an encoder that compares by the cosine, or by inner products."""
    from ragkit.training.retriever_loss import LossSettings

    named: dict[str, Any] = {"lsr": "kl", "query-adapter": "contrastive"}
    in_batch = settings.in_batch
    if in_batch is None:
        in_batch = settings.objective == "lsr" and settings.direction == "forward"
    sizes = whole_numbers(settings.matryoshka, "--matryoshka") if settings.matryoshka else []
    return LossSettings(
        named.get(settings.objective, settings.objective),
        (0.05 if cosine else 1.0) if settings.temperature is None else settings.temperature,
        teacher_temperature(settings, by_generator=settings.objective == "lsr"),
        settings.direction,
        in_batch,
        tuple(sizes),
    )
