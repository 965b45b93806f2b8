"""What every training program does with its settings, its device and the state of its run."""

from __future__ import annotations

import json
import math
import os
import shutil
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence, Set
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, TypeVar

from ragkit.artefacts import check_output, file_record, read_json, write_json
from ragkit.console import progress_bars, say
from ragkit.errors import SettingsError
from ragkit.types import Progress

if TYPE_CHECKING:
    import torch
    from cyclopts import Token

    from ragkit.training.keeper import LoopSettings

MARK = "results.json"
Learnt = TypeVar("Learnt")

_FREE = {"replace", "device", "report_to", "seeds", "output"}  # settings that change no result


def rank(kind: Any, tokens: Sequence[Token]) -> int:
    """Read a rank, with or without peft's name for it."""
    said = tokens[0].value
    try:
        return int(said.removeprefix("r="))
    except ValueError as error:
        raise ValueError(f"{said!r} is no rank, such as 8 or r=8") from error


@dataclass(frozen=True, kw_only=True)
class TrainingSettings:
    """What every training program can be told."""

    output: Path
    """The folder for the model."""
    limit: int | None = None
    """Questions to train on, drawn at random; all if not given."""
    dev_limit: int = 200
    """Questions to evaluate on, drawn at random; at least 2."""
    seeds: str = "0"
    """Seeds, such as 0,1,2: each is learnt apart; the best on dev is kept."""
    epochs: float = 1.0
    """Passes through the questions."""
    steps: int | None = None
    """Optimiser steps, in place of --epochs."""
    batch: int = 64
    """Questions in a step, over all processes."""
    learning_rate: float | None = None
    """The highest learning rate; 1e-4 if not given, for an adapter 1e-3, for lsr 2e-5."""
    schedule: Literal["linear", "cosine", "constant_with_warmup"] = "linear"
    """The course of the learning rate."""
    warmup: float = 0.1
    """The share of steps in which the learning rate rises."""
    clip: float = 1.0
    """The largest norm of the gradient."""
    evaluate_every: int | None = None
    """Steps between two evaluations, each followed by a checkpoint; a quarter of all if not
    given."""
    report_to: str = ""
    """Where training is reported to, by transformers' names, such as tensorboard; its files are
    kept in the output's folder runs."""
    device: str | None = None
    """Where models run: cpu, cuda, mps; the best one here if not given."""
    replace: bool = False
    """Replace the output that is there."""


@dataclass(frozen=True, kw_only=True)
class AnswerSettings(TrainingSettings):
    """What every program can be told that learns answers from retrieved passages."""

    questions: Path
    """Questions with answers, in any form that ragkit reads; SPRING's too."""
    base: str = "SmolLM2-135M-Instruct"
    """The generator that is learnt for, by folder, GGUF file or name; a peft folder too."""
    index: Path | None = None
    """The index folder that passages are retrieved from."""
    qrels: Path | None = None
    """Train on the questions that these judge alone."""
    dev_questions: Path | None = None
    """Questions to evaluate on; --questions if --dev-qrels are given, else some are held out."""
    dev_qrels: Path | None = None
    """Evaluate on the questions that these judge."""
    layout: Literal["auto", "chat", "plain"] = "auto"
    """Whether the chat template is used; auto uses it if there is one."""
    retriever: Literal["bm25", "dense", "hybrid"] | None = None
    """What searches; hybrid if the index has both stores."""
    encoder: str | None = None
    """The encoder of the dense search; the one named in the index if not given."""
    passages: str = "1-5"
    """Passages in a prompt, drawn from this range; evaluation shows the most."""
    batch: int = 8
    """Questions in a step, over all processes and accumulated passes."""
    context_tokens: int = 2048
    """Tokens that the passages may take in a prompt, as where questions are asked."""
    max_new_tokens: int = 32
    """Tokens that an answer may take in the evaluation."""
    precision: Literal["auto", "fp32", "bf16"] = "auto"
    """The number format of multiplications; what is learnt is kept in fp32."""


def check_training(
    settings: TrainingSettings, least: Mapping[str, int], micro_batch: int
) -> list[int]:
    """Refuse numbers that could not work, and return the seeds.

    Args:
        settings: the settings.
        least: the least values of settings, beside those that every program has.
        micro_batch: questions in one pass of one process.

    Raises:
        SettingsError: naming the option.
    """
    shared = {"dev_limit": 2, "steps": 1, "batch": 1, "evaluate_every": 1}
    for name, low in (shared | dict(least)).items():
        value = getattr(settings, name)
        if value is not None and value < low:
            raise SettingsError(f"--{name.replace('_', '-')} must be at least {low}, not {value}")
    if not 0 < settings.epochs < math.inf:
        raise SettingsError(f"--epochs must be above 0, not {settings.epochs}")
    _check_reports(settings.report_to)
    from ragkit.training.keeper import processes

    device = own_device(settings.device)
    together = processes(device).num_processes
    if device.index and together == 1:
        raise SettingsError(
            f"--device {settings.device}: training takes the first GPU that it sees. Let it see "
            f"that one alone: CUDA_VISIBLE_DEVICES={device.index}, and --device cuda"
        )
    loop_settings(settings, 1, 0, 1e-4, micro_batch=micro_batch).passes(together)
    return whole_numbers(settings.seeds, "--seeds")


def _check_reports(names: str) -> None:
    """Refuse to report to what transformers does not know, or what is not installed."""
    if not (asked := [name for name in names.split(",") if name]):
        return
    from transformers import integrations

    known: Any = integrations
    there: list[str] = known.get_available_reporting_integrations()
    if lacking := [name for name in asked if name not in there]:
        raise SettingsError(
            f"--report-to {lacking[0]!r}: transformers reports to no such package that is "
            f"installed here; it could to {', '.join(there) or 'none'}"
        )


def loop_settings(
    settings: TrainingSettings, questions: int, seed: int, rate: float, **more: Any
) -> LoopSettings:
    """Return how so many questions are trained on; `rate` if no learning rate is set."""
    from ragkit.training.keeper import LoopSettings

    steps = settings.steps or max(1, round(settings.epochs * questions / settings.batch))
    return LoopSettings(
        steps=steps,
        batch=settings.batch,
        learning_rate=rate if settings.learning_rate is None else settings.learning_rate,
        schedule=settings.schedule,
        warmup=settings.warmup,
        clip=settings.clip,
        evaluate_every=settings.evaluate_every or max(1, math.ceil(steps / 4)),
        seed=seed,
        report_to=tuple(name for name in settings.report_to.split(",") if name),
        **more,
    )


def records(settings: Any, *names: str) -> dict[str, Any]:
    """Return the files that settings name, with the hashes of what they hold."""
    return {name: file_record(getattr(settings, name)) for name in names}


def json_values(settings: Any) -> dict[str, Any]:
    """Return a dataclass of settings as JSON values."""
    values: dict[str, Any] = json.loads(json.dumps(asdict(settings), default=str))
    return values


def whole_numbers(text: str, option: str) -> list[int]:
    """Read whole numbers such as 0,1,2.

    Raises:
        SettingsError: `text` holds something else, or a number twice.
    """
    try:
        numbers = [int(number) for number in text.split(",")]
    except ValueError:
        raise SettingsError(f"{option} {text!r}: expected whole numbers, such as 0,1,2") from None
    if len(set(numbers)) < len(numbers) or min(numbers) < 0 or max(numbers) >= 2**32:
        raise SettingsError(f"{option} {text!r}: expected different numbers from 0 to 2^32-1")
    return numbers


@contextmanager
def training_state(settings: TrainingSettings) -> Iterator[tuple[Path, Progress]]:
    """Yield the folder where a run's state is kept, and what draws its progress.

    A run that is stopped goes on from there. At an error the folder is removed if nothing has been
    learnt yet; `results.finish` removes it when the run's output is written.

    Raises:
        SettingsError: the output is in the way.
    """
    check_output(settings.output, settings.replace, MARK)
    state = settings.output.with_name(f"{settings.output.name}.training")
    there = state.exists()
    try:
        with progress_bars() as progress:
            yield state, progress
    except BaseException:
        first = os.environ.get("RANK", "0") == "0"  # of the processes that torchrun starts
        if first and not _begun(state) and not there:
            shutil.rmtree(state, ignore_errors=True)
        elif first and isinstance(sys.exception(), KeyboardInterrupt) and _begun(state):
            say(f"{state} holds what was learnt so far: the same command goes on from there.")
        raise


def _begun(state: Path) -> bool:
    """Tell whether there is something to go on from."""
    return any(state.glob("*/*.safetensors"))


def each_seed(
    seeds: Sequence[int],
    state: Path,
    progress: Progress,
    learn: Callable[[int, Path, Progress], Learnt],
) -> list[Learnt]:
    """Return what is learnt with each seed, which has a folder of its own for its state."""
    learnt = []
    for seed in seeds:
        folder = state / f"seed-{seed}"
        folder.mkdir(parents=True, exist_ok=True)

        def told(_: str, done: int, total: int | None, stage: str = f"train, seed {seed}") -> None:
            progress(stage, done, total)

        learnt.append(learn(seed, folder, told))
    return learnt


def check_state(
    folder: Path, settings: dict[str, Any], data: dict[str, Any], free: Set[str] = frozenset()
) -> None:
    """Refuse to go on from a run of other settings or data, and note what this one is of.

    Args:
        folder: where the state is kept.
        settings: as JSON values.
        data: hashes of what is read.
        free: settings that may differ, beside those that do in every program.

    Raises:
        SettingsError: telling which setting differs.
    """
    made = {name: value for name, value in settings.items() if name not in free | _FREE}
    made |= {"data": data}
    path = folder / "run.json"
    if path.exists() and _begun(folder):
        kept = read_json(path)
        differ = sorted(name for name in made if kept.get(name) != made[name])
        if differ:
            raise SettingsError(
                f"{folder} holds the state of a run with other {', '.join(differ)}. Give the same "
                "ones to go on from it, or remove it to start anew."
            )
        return
    folder.mkdir(parents=True, exist_ok=True)
    write_json(path, made)


def own_device(name: str | None) -> torch.device:
    """Return where this process's model goes: each has a GPU of its own, where there are some."""
    import torch

    from ragkit.models.precision import check_device
    from ragkit.training.keeper import processes

    device = torch.device(check_device(name))
    state = processes(device)
    return torch.device(state.device) if state.num_processes > 1 else device
