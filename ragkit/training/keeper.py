"""The state of a training run: evaluated, kept, and gone on from."""

from __future__ import annotations

import json
import logging
import math
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass, field
from datetime import timedelta
from pathlib import Path
from time import perf_counter
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from transformers import TrainerCallback

from ..artefacts import to_json
from ..errors import DataError, SettingsError
from ..types import Progress

_log = logging.getLogger(__name__)
_STATE = "state.safetensors"


@dataclass(frozen=True, slots=True)
class LoopSettings:
    """How a module is trained.

    Attributes:
        steps: optimiser steps.
        batch: examples in a step, over all processes and accumulated passes.
        micro_batch: examples in one pass of one process.
        learning_rate: the highest.
        schedule: its course: linear, cosine or constant, by transformers' names.
        warmup: the share of steps in which it rises from 0.
        weight_decay: AdamW's.
        clip: the largest norm of the gradient.
        evaluate_every: steps between two evaluations, each followed by a checkpoint.
        seed: of whatever torch draws.
        precision: `bf16` multiplies in it where torch's autocast does; weights stay in fp32.
        report_to: transformers' integrations (tensorboard, wandb, …), by name.
    """

    steps: int
    batch: int = 8
    micro_batch: int = 8
    learning_rate: float = 1e-3
    schedule: str = "linear"
    warmup: float = 0.1
    weight_decay: float = 0.0
    clip: float = 1.0
    evaluate_every: int = 50
    seed: int = 0
    precision: str = "fp32"
    report_to: tuple[str, ...] = ()

    def compared(self) -> str:
        """Return the settings in which runs must agree to go on from each other."""
        return to_json({n: v for n, v in asdict(self).items() if n != "report_to"})

    def passes(self, processes: int) -> int:
        """Return how many passes of each process make a step.

        Raises:
            SettingsError: the batch is no whole number of passes, or a number is out of range.
        """
        if min(self.steps, self.batch, self.micro_batch, self.evaluate_every) < 1:
            raise SettingsError("steps, batch, micro-batch and evaluate-every must be at least 1")
        rate, warmup, clip = self.learning_rate, self.warmup, self.clip
        for name, value, fits, wanted in (
            ("learning rate", rate, 0 < rate < 10, "a number above 0, below 10"),
            ("warm-up", warmup, 0 <= warmup <= 1, "a share of the steps, from 0 to 1"),
            ("clip", clip, 0 < clip < math.inf, "a number above 0"),
        ):
            if not fits:
                raise SettingsError(f"{name} {value}: expected {wanted}")
        size = min(self.micro_batch, max(1, self.batch // processes))
        if self.batch % (size * processes):
            raise SettingsError(
                f"a batch of {self.batch} cannot be made of passes of {size} on {processes} "
                f"processes: choose a multiple of {size * processes}"
            )
        return self.batch // (size * processes)


@dataclass(slots=True)
class History:
    """What happened while training.

    Attributes:
        step: the steps done.
        losses: step -> mean training loss since the one before.
        evaluations: step -> the value that was to become small.
        best_step: where that was smallest.
        seconds: of training, evaluations included, over all starts.
    """

    step: int = 0
    losses: dict[int, float] = field(default_factory=dict)
    evaluations: dict[int, float] = field(default_factory=dict)
    best_step: int = 0
    seconds: float = 0.0


def processes(device: torch.device) -> Any:
    """Return accelerate's state of the processes that train together, on CPUs or GPUs."""
    from accelerate import PartialState

    # One process may be labelling for hours what the others wait for.
    return PartialState(cpu=device.type == "cpu", timeout=timedelta(days=7))


class Keeper(TrainerCallback):
    """Evaluates while the Trainer trains, keeps the best weights, and writes the state.

    Of several processes the first evaluates and writes; the others learn the value from it.
    """

    def __init__(
        self,
        module: torch.nn.Module,
        parameters: Mapping[str, torch.nn.Parameter],
        optimizer: torch.optim.Optimizer,
        schedule: Any,
        settings: LoopSettings,
        folder: Path,
        evaluate: Callable[[], float] | None,
        measure: str,
        progress: Progress,
    ) -> None:
        self.module = module
        self.parameters = parameters
        self.optimizer = optimizer
        self.schedule = schedule
        self.settings = settings
        self.path = folder / _STATE
        self.evaluate = evaluate
        self.measure = measure
        self.progress = progress
        self.history = History()
        self.best: dict[str, torch.Tensor] = {}
        self.offset = 0
        self.before = 0.0
        self.started = perf_counter()
        self.processes = processes(next(iter(parameters.values())).device)

    def on_train_begin(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        """Evaluate what training starts from."""
        self.started = perf_counter()
        if self.evaluate and not self.history.evaluations:
            self._judge(0)

    def on_step_begin(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        """Seed what torch draws in the step: the same after a stop, and another in each process."""
        rank = self.processes.process_index
        step = self.offset + state.global_step
        torch.manual_seed(((self.settings.seed * 1_000_003 + step) * 1_009 + rank) % 2**63)

    def on_step_end(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        """Tell how far training is."""
        self.history.step = self.offset + state.global_step
        self.progress("train", self.history.step, self.settings.steps)

    def on_log(self, args: Any, state: Any, control: Any, logs: Any = None, **_: Any) -> None:
        """Keep the training loss, evaluate, write the state: the Trainer logs when it is due."""
        if logs and "loss" in logs:
            self.history.losses[self.history.step] = float(logs["loss"])
            self._checkpoint()

    def on_train_end(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        """Evaluate the last step, where none was due."""
        if self.history.step % self.settings.evaluate_every:
            self._checkpoint()

    def _checkpoint(self) -> None:
        step = self.history.step
        if self.evaluate:
            self._judge(step)
        self.history.seconds = self.before + perf_counter() - self.started
        if self.processes.is_main_process:
            self._write()
            losses, values = self.history.losses, self.history.evaluations
            _log.info(
                "step %d of %d: training loss %s, dev %s %s, best at step %d",
                step,
                self.settings.steps,
                f"{losses[step]:.4f}" if step in losses else "-",
                self.measure,
                f"{abs(values[step]):.4f}" if step in values else "-",
                self.history.best_step,
            )

    def _judge(self, step: int) -> None:
        assert self.evaluate is not None
        value = math.nan
        if self.processes.is_main_process:
            with torch.no_grad():
                value = float(self.evaluate())
        value = self.history.evaluations[step] = self._of_the_first(value)
        if not math.isfinite(value):
            raise DataError(
                f"at step {step} the loss on dev is {value}: training went astray. Lower "
                "--learning-rate, or take --precision fp32."
            )
        before = [of for at, of in self.history.evaluations.items() if at != step]
        if not before or value < min(before):
            self.history.best_step = step
            self.best = {n: p.detach().cpu().clone() for n, p in self.parameters.items()}

    def _of_the_first(self, value: float) -> float:
        """Return what the first process has, so that all take the same step for the best."""
        if self.processes.num_processes == 1:
            return value
        shared = torch.tensor(value, dtype=torch.float64, device=self.processes.device)
        torch.distributed.broadcast(shared, 0)
        return float(shared)

    def take_best(self) -> None:
        """Give the module the best weights."""
        with torch.no_grad():
            for name, tensor in self.best.items():
                self.parameters[name].copy_(tensor)

    def _write(self) -> None:
        tensors = {f"now.{n}": p.detach().cpu().contiguous() for n, p in self.parameters.items()}
        tensors |= {f"best.{name}": tensor for name, tensor in self.best.items()}
        for name, parameter in self.parameters.items():
            for key, value in self.optimizer.state[parameter].items():
                tensors[f"optimizer.{key}.{name}"] = torch.as_tensor(value).cpu().clone()
        history = json.dumps(asdict(self.history))
        told = {"settings": self.settings.compared(), "history": history}
        aside = self.path.with_suffix(".writing")
        save_file(tensors, aside, metadata=told)
        aside.replace(self.path)

    def restore(self) -> None:
        """Go on from the state in the folder, if there is one.

        Raises:
            SettingsError, DataError: as `train` tells.
        """
        if not self.path.exists():
            return
        try:
            with safe_open(self.path, framework="pt") as file:
                told = file.metadata() or {}
                tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
            values = json.loads(told["history"])
            for kind in ("losses", "evaluations"):
                values[kind] = {int(step): value for step, value in values[kind].items()}
            history = History(**values)
            same = told["settings"] == self.settings.compared()
            if same:
                self._load(tensors, history)
        except (SafetensorError, OSError, KeyError, ValueError, TypeError, RuntimeError) as error:
            raise DataError(f"{self.path} cannot be gone on from: {error}") from error
        if not same:
            raise SettingsError(
                f"{self.path} is the state of a run with other settings. Give the same ones, or "
                "remove its folder to start anew."
            )

    def _load(self, tensors: Mapping[str, torch.Tensor], history: History) -> None:
        for key, tensor in tensors.items():
            parts = key.split(".", 1 if key.startswith(("now.", "best.")) else 2)
            shape = self.parameters[parts[-1]].shape
            if tensor.shape != shape and parts[1] != "step":
                raise ValueError(f"{key} is of shape {tuple(tensor.shape)}, not {tuple(shape)}")
        with torch.no_grad():
            for name, parameter in self.parameters.items():
                parameter.copy_(tensors[f"now.{name}"])
        for name, parameter in self.parameters.items():
            for key in ("step", "exp_avg", "exp_avg_sq"):
                value = tensors[f"optimizer.{key}.{name}"]
                moved = value if key == "step" else value.to(parameter.device)
                self.optimizer.state[parameter][key] = moved
        self.best = {
            name.removeprefix("best."): tensor
            for name, tensor in tensors.items()
            if name.startswith("best.")
        }
        self.history, self.offset, self.before = history, history.step, history.seconds
        self.schedule.last_epoch = history.step
        rates = [
            base * rate(history.step)
            for base, rate in zip(self.schedule.base_lrs, self.schedule.lr_lambdas, strict=True)
        ]
        for group, rate in zip(self.optimizer.param_groups, rates, strict=True):
            group["lr"] = rate
        _log.info("Going on from step %d of %d.", history.step, self.settings.steps)
