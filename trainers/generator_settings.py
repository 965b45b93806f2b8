"""The settings of `ragkit-train generator`."""

from __future__ import annotations

import math
from dataclasses import dataclass, field, fields
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Literal

from cyclopts import Parameter

from ragkit.errors import SettingsError
from ragkit.parsing import suffix_of

from .list_settings import shares_of
from .runs import AnswerSettings, check_training, rank
from .token_settings import passage_range

if TYPE_CHECKING:
    from ragkit.evaluation.probe_files import Probe
    from ragkit.training.generator_loss import Smoothing
    from ragkit.training.mixes import Mix


@Parameter(name="*")
@dataclass(frozen=True, kw_only=True)
class GeneratorSettings(AnswerSettings):
    """What a generator learns, from what, and how."""

    output: Path
    """The folder for what is learnt: an adapter (peft), or with --full a model (transformers)."""
    base: str = "SmolLM2-135M-Instruct"
    """The generator to start from, by folder, GGUF file or name; no peft folder."""
    qrels: Path | None = None
    """What is relevant is gold, and only questions that have some are taken; without qrels, gold is
    the first hit that holds an answer."""
    lora: Annotated[int | None, Parameter(converter=rank)] = None
    """The rank of the adapter, such as 8 or r=8; 8 if not given."""
    full: bool = False
    """Train all weights in place of an adapter."""
    mix: str = "retrieved:1"
    """Kinds of contexts with their shares, such as gold:.4,retrieved:.3,distractors:.2,none:.1.
    Distractors are the negatives of --questions first, such as ragkit-train negatives mines."""
    citations: bool = False
    """Answers cite the passage that holds them, such as [2]."""
    all_gold: bool = False
    """Show all gold passages of a question, for answers that need several together."""
    abstain: Literal["auto", "always", "never"] = "auto"
    """Where nothing retrieved is gold or holds an answer, learn to say so; auto does where it is
    known what is relevant. Among distractors alone it is always learnt."""
    prompt: str = "ragkit"
    """The prompt's wording, which the trained generator then is asked with."""
    seeds: str = "0"
    """Seeds, such as 0,1,2: each is learnt apart; the best on dev is kept."""
    batch: int = 8
    """Rows in a step, over all processes and accumulated passes."""
    micro_batch: int = 4
    """Rows of one process that are packed into passes together: the more, the fuller these are."""
    learning_rate: float | None = None
    """The highest learning rate; 2e-3 if not given, with --full 5e-5."""
    loss: Literal["cross-entropy", "label-smoothing", "overtone"] = "cross-entropy"
    """What is minimised on the tokens of answers."""
    smoothing: float = 0.1
    """The share of a target that does not go to the token itself, where the loss is smoothed. Above
    .5, OVERTONE leaves it whole where another token would get more."""
    deviations: float = 1.0
    """OVERTONE shares it among tokens whose logits are within so many standard deviations of the
    highest one."""
    least: float = 0.01
    """OVERTONE leaves a token alone whose divergence from its target is below this, in nats."""
    replay: Path | None = None
    """General texts that are seen again while learning: records with a field text."""
    replay_rows: int = 1
    """Rows of a step that are such texts, if there are some."""
    keep_rows: int = 0
    """Rows of a step that are questions without passages, on which the base's words are kept."""
    remedy_weight: float = 1.0
    """The weight of either beside the loss of answers."""
    average: str = "1"
    """The share of what was learnt in the average with the base: above 0, up to 1; or sweep, which
    takes the best on dev of those that the gate lets through."""
    probes: Annotated[
        list[Path], Parameter(negative="", consume_multiple=True, show_default=False)
    ] = field(default_factory=list)
    """Probes of general ability, which are run before and after: files of items with a question,
    choices and an answer, a question and answers, or a text."""
    probe_limit: int | None = None
    """Items of each probe; all if not given."""
    max_forgetting: float | None = None
    """The most that a probe may lose in any seed, such as 0.02: of the accuracy of choices, in
    shares of 1; of answers and texts the rise of their nats, as a share of what they were. What
    loses more is not written, and makes the run fail."""


@dataclass(frozen=True, slots=True)
class Checked:
    """What settings say once they are read.

    Attributes:
        seeds: the seeds.
        shares: of the learnt weights, in the averages that are tried.
        mix: of contexts.
        passages: the least and the most that are shown.
        smoothing: of the loss.
        probes: of general ability.
    """

    seeds: list[int]
    shares: list[float]
    mix: Mix
    passages: tuple[int, int]
    smoothing: Smoothing
    probes: list[Probe]


def check(settings: GeneratorSettings) -> Checked:
    """Refuse what could not work, before any work is done.

    Raises:
        SettingsError: naming the option.
        DataError: a probe cannot be read.
    """
    from ragkit.evaluation.probe_files import read_probe
    from ragkit.styles import style_named
    from ragkit.training.generator_loss import Smoothing
    from ragkit.training.mixes import Mix

    least = {"lora": 1, "max_new_tokens": 1, "context_tokens": 1, "probe_limit": 1}
    least |= {"micro_batch": 1, "replay_rows": 1, "keep_rows": 0}
    seeds = check_training(settings, least, settings.micro_batch)
    if not 0 <= settings.smoothing < 1:
        raise SettingsError(f"--smoothing {settings.smoothing}: expected a share from 0, below 1")
    if not 0 < settings.remedy_weight < math.inf:
        raise SettingsError(f"--remedy-weight must be above 0, not {settings.remedy_weight}")
    rows = settings.keep_rows + (settings.replay_rows if settings.replay else 0)
    if rows >= settings.batch:
        raise SettingsError(
            f"--replay-rows and --keep-rows take all {settings.batch} rows of a step: raise --batch"
        )
    if settings.max_forgetting is not None:
        if not 0 <= settings.max_forgetting < math.inf:
            raise SettingsError(
                f"--max-forgetting must be 0 or more, not {settings.max_forgetting}"
            )
        if not settings.probes:
            raise SettingsError("--max-forgetting needs --probes, by which forgetting is measured")
    names = [path.name.removesuffix(suffix_of(path)) for path in settings.probes]
    if twice := [name for name in names if names.count(name) > 1]:
        raise SettingsError(f"--probes: two files are called {twice[0]!r}; give one another name")
    if settings.replay in settings.probes:
        raise SettingsError(f"--replay and --probes both name {settings.replay}: it is trained on")
    mix, shares = Mix.parse(settings.mix), shares_of(settings.average)
    kinds = {kind for kind, share in mix.shares.items() if share}
    unused = {
        "lora": settings.full,
        "smoothing": settings.loss == "cross-entropy",
        "deviations": settings.loss != "overtone",
        "least": settings.loss != "overtone",
        "replay_rows": settings.replay is None,
        "remedy_weight": rows == 0,
        "probe_limit": not settings.probes,
        "all_gold": "gold" not in kinds,
        "abstain": "retrieved" not in kinds,
        "citations": kinds == {"none"},
    }
    for each in fields(settings):
        if unused.get(each.name) and getattr(settings, each.name) != each.default:
            option = f"--{each.name.replace('_', '-')}"
            raise SettingsError(f"{option} has no effect here: leave it out")
    passages = passage_range(settings.passages)
    if passages[0] < 1:
        raise SettingsError(
            f"--passages {settings.passages}: at least 1 is shown; how often none is, --mix says: "
            "none:.1"
        )
    style_named(settings.prompt)
    smoothing = Smoothing(1 - settings.smoothing, settings.deviations, settings.least)
    probes = [read_probe(path) for path in settings.probes]
    return Checked(seeds, shares, mix, passages, smoothing, probes)
