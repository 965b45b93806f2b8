"""`ragkit-train virtual-tokens`: questions and answers in, a few hundred kB of tokens out."""

from __future__ import annotations

from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ragkit.assemble import RetrievalSettings
from ragkit.console import say
from ragkit.errors import SettingsError
from ragkit.types import Progress

from .questions import answered_and_dev, hash_of, retrieved
from .results import finish
from .runs import (
    check_state,
    each_seed,
    json_values,
    loop_settings,
    own_device,
    records,
    training_state,
)
from .token_results import card, results_of, tables
from .token_settings import TokenSettings, check, passage_range

if TYPE_CHECKING:
    import torch

    from ragkit.models.generator import Generator
    from ragkit.models.virtual_tokens import VirtualTokens
    from ragkit.training.keeper import History
    from ragkit.training.token_runs import Retrieved, TokenRun

_GB = 1e9
_FREE = {"prefix_cache", "prefix_cache_folder", "token_counts"}  # beside those of every program


def virtual_tokens(*, settings: TokenSettings, json: bool = False) -> None:
    """Learn virtual tokens (SPRING) for a frozen generator, and measure what they change.

    Example: ragkit-train virtual-tokens --index kb --questions questions.jsonl --output tokens

    On several processes: torchrun --nproc-per-node 2 -m ragkit.trainers virtual-tokens …
    A run that was stopped goes on when the same command is given again.

    Parameters
    ----------
    json
        Print the results as JSON.
    """
    from ragkit.models.precision import weights_hash
    from ragkit.training.keeper import processes as together

    seeds, counts = check(settings)
    run = None
    try:
        with training_state(settings) as (state, progress):
            run, data = prepared(settings, progress)
            before = weights_hash(run.generator.model.state_dict())
            check_state(state, json_values(settings), data | {"weights": before}, _FREE)
            learnt = each_seed(seeds, state, progress, partial(_learn, run, settings))
            if not together(run.generator.model.device).is_main_process:
                return
            results = results_of(run, settings, seeds, counts, learnt, progress) | {"data": data}
            after = weights_hash(run.generator.model.state_dict())
            results["base"] = {"weights": before, "unchanged": before == after}
    finally:
        if run is not None and run.prefixes is not None:
            run.prefixes.close()
    save = {str(seed): tokens.save for seed, (tokens, _) in zip(seeds, learnt, strict=True)}
    told = [f"{settings.output}: {settings.tokens} virtual tokens for {settings.base}"]
    report = card(learnt[0][0], results)
    finish(settings, state, save, results, report, tables(results), told, json=json)


def prepared(settings: TokenSettings, progress: Progress) -> tuple[TokenRun, dict[str, Any]]:
    """Read questions, retrieve for them, and load the base."""
    from ragkit.training.keeper import processes
    from ragkit.training.token_runs import Retrieved

    low, high = passage_range(settings.passages)
    train, dev = answered_and_dev(settings)
    device = own_device(settings.device)
    by = RetrievalSettings(
        index=settings.index,
        retriever=settings.retriever,
        encoder=settings.encoder,
        device=str(device),
        precision=settings.precision,
    )
    with processes(device).main_process_first():  # the others find what the first has kept
        parts = [Retrieved(part, retrieved(part, by, high, progress)) for part in (train, dev)]
    files = records(settings, "questions", "qrels", "dev_questions", "dev_qrels")
    data = files | {"train": len(train), "dev": len(dev), "passages": hash_of(parts)}
    return token_run(settings, parts[0], parts[1], (low, high), device), data


def token_run(
    settings: TokenSettings,
    train: Retrieved,
    dev: Retrieved,
    passages: tuple[int, int],
    device: torch.device,
) -> TokenRun:
    """Load the base, and put together what all seeds share."""
    from ragkit.models.generator import Generator
    from ragkit.models.prefix_cache import PrefixCache
    from ragkit.prompts import TEMPLATE_TOKENS
    from ragkit.readers import GeneratorReader
    from ragkit.styles import style_named
    from ragkit.training.token_runs import TokenRun, check_room

    placement: Any = "start" if settings.placement == "prompt-tuning" else settings.placement
    style = style_named(settings.prompt).placing(placement)
    generator = Generator.load(
        settings.base,
        device=str(device),
        precision=settings.precision,
        layout=settings.layout,
    )
    if settings.tokens > generator.window - settings.max_new_tokens - 2 * TEMPLATE_TOKENS:
        raise SettingsError(
            f"--tokens {settings.tokens} and --max-new-tokens {settings.max_new_tokens} leave no "
            f"room for a prompt in the {generator.window} tokens that the model reads"
        )
    reader = GeneratorReader(
        generator,
        style=style,
        context_tokens=settings.context_tokens,
        max_new_tokens=settings.max_new_tokens + settings.tokens,
    )
    check_room(generator, reader.prompt, [*train.examples, *dev.examples], settings.tokens)
    prefixes = None
    if not settings.gradient_checkpointing and placement != "start":
        budget = int(settings.prefix_cache * _GB)
        prefixes = PrefixCache(generator.model, budget, settings.prefix_cache_folder)
    return TokenRun(
        generator,
        style,
        reader.prompt,
        placement,
        settings.tokens,
        train,
        dev,
        passages,
        prefixes,
        _start(settings, generator),
    )


def _start(settings: TokenSettings, generator: Generator) -> torch.Tensor | None:
    """Return the embeddings to start from, where the settings name some."""
    from ragkit.models.virtual_tokens import VirtualTokens, read_tensor_file

    path = settings.start
    if path is None or not path.is_dir():
        return None if path is None else read_tensor_file(path)
    tokens = VirtualTokens.load(path)
    if tokens.base_hash != generator.base_hash():
        say(
            f"{path}: these tokens were learnt on other weights ({tokens.base}); starting from them"
        )
    return tokens.first(min(settings.tokens, len(tokens))).embeddings


def _learn(
    run: TokenRun, settings: TokenSettings, seed: int, folder: Path, progress: Progress
) -> tuple[VirtualTokens, History]:
    return run.learn(
        loop_settings(
            settings,
            len(run.train.examples),
            seed,
            settings.learning_rate,
            micro_batch=settings.micro_batch,
        ),
        folder,
        fixed=settings.fixed,
        objective=settings.objective,
        shuffle=settings.shuffle,
        progress=progress,
    )
