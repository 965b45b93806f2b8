"""The training loop: transformers' `Trainer`, or sentence-transformers' where it is given a loss,
with weights and states in safetensors alone.

The Trainer does steps, accumulation, clipping, processes and reports. What it would pickle
(optimiser, schedule, random states) the keeper keeps: one file, replaced in one step, from which a
run that was killed goes on as if it had not been.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
from torch.utils.data import Dataset
from transformers import PrinterCallback, Trainer, TrainingArguments, get_scheduler

from ..types import Progress, quiet
from .keeper import History, Keeper, LoopSettings, processes


def train(
    module: torch.nn.Module,
    rows: Callable[[int], Dataset[Any]],
    collate: Callable[[Sequence[Any]], dict[str, Any]],
    settings: LoopSettings,
    folder: Path,
    *,
    evaluate: Callable[[], float] | None = None,
    measure: str = "loss",
    loss: torch.nn.Module | None = None,
    progress: Progress = quiet,
) -> History:
    """Train a module's parameters, and leave it with the best that were evaluated.

    Every process of a distributed run calls this; rank 0 alone writes.

    Args:
        module: gives `{"loss": …}` for a batch and `num_items_in_batch`; or, with a `loss`, a
            SentenceTransformer or a CrossEncoder.
        rows: gives the rows of the run from that place on.
        collate: makes a batch of rows; its `labels` are counted over a step, but those of -100.
        settings: how.
        folder: where the state is kept; one that is there is gone on from.
        evaluate: gives what is to become small, on the first process; without it the last weights
            are kept.
        measure: what `evaluate` gives, or gives the negative of, is called.
        loss: called as sentence-transformers' losses are, on what `collate` gives its trainer.
        progress: told of the stage `train`.

    Raises:
        SettingsError: the batch cannot be divided, numbers are out of their range, or the folder
            holds the state of a run with other settings.
        DataError: that state cannot be read, or is of other parameters.
    """
    device = next(module.parameters()).device
    settings.passes(processes(device).num_processes)
    parameters = {n: p for n, p in module.named_parameters() if p.requires_grad}
    optimizer = torch.optim.AdamW(
        parameters.values(), lr=settings.learning_rate, weight_decay=settings.weight_decay
    )
    warmup = round(settings.warmup * settings.steps)
    schedule = get_scheduler(settings.schedule, optimizer, warmup, settings.steps)
    keeper = Keeper(
        module, parameters, optimizer, schedule, settings, folder, evaluate, measure, progress
    )
    keeper.restore()
    if keeper.history.step < settings.steps:
        data = rows(keeper.history.step * settings.batch)
        arguments = _arguments(settings, folder, device, keeper.history.step)
        options: dict[str, Any] = {
            "optimizers": (optimizer, schedule),
            "callbacks": [keeper],
        }
        if loss is None:
            trainer = Trainer(
                model=module,
                args=one_device(TrainingArguments(**arguments)),
                data_collator=collate,
                train_dataset=data,
                **options,
            )
        else:
            from .sentence_trainer import sentence_trainer

            trainer = sentence_trainer(module, loss, data, collate, arguments, options)
        trainer.remove_callback(PrinterCallback)
        trainer.train()
    keeper.take_best()
    return keeper.history


def _arguments(
    settings: LoopSettings, folder: Path, device: torch.device, done: int
) -> dict[str, Any]:
    """Return the Trainer's arguments for the steps that are left."""
    together = processes(device).num_processes
    passes = settings.passes(together)
    return {
        "output_dir": str(folder),
        "max_steps": settings.steps - done,
        "per_device_train_batch_size": settings.batch // (passes * together),
        "gradient_accumulation_steps": passes,
        "max_grad_norm": settings.clip,
        "seed": settings.seed,
        "logging_steps": settings.evaluate_every,
        "report_to": list(settings.report_to),
        "save_strategy": "no",
        "disable_tqdm": True,
        "remove_unused_columns": False,
        "train_sampling_strategy": "sequential",
        "bf16": settings.precision == "bf16",
        "use_cpu": device.type == "cpu",
        "dataloader_pin_memory": False,
        "ddp_find_unused_parameters": False,
    }


def one_device(arguments: TrainingArguments) -> TrainingArguments:
    """Take a GPU a process: there is no DataParallel here."""
    arguments._n_gpu = min(1, arguments.n_gpu)
    return arguments
