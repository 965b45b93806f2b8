"""`ragkit-train virtual-tokens`: questions and answers in, a few hundred kB of tokens out."""

from __future__ import annotations

import shutil
from dataclasses import asdict, dataclass
from pathlib import Path
from random import Random
from typing import TYPE_CHECKING, Any, Literal

from cyclopts import Parameter

from ragkit.artefacts import check_output, new_folder, read_json, write_json
from ragkit.assemble import RetrievalSettings
from ragkit.console import print_json, print_tables, progress_bars, say
from ragkit.errors import SettingsError
from ragkit.types import Example, Progress

from .questions import answered, check_apart, described, held_out, retrieved
from .token_results import results_of, tables, write

if TYPE_CHECKING:
    from ragkit.models.generator import Generator
    from ragkit.models.virtual_tokens import VirtualTokens
    from ragkit.training.loop import History
    from ragkit.training.token_runs import Retrieved, TokenRun

MARK = "results.json"
_GB = 1e9


@Parameter(name="*")
@dataclass(frozen=True, kw_only=True)
class TokenSettings:
    """What is learnt, from what, and how."""

    questions: Path
    """Questions with answers, in any form that ragkit reads; SPRING's too."""
    output: Path
    """The folder for the virtual tokens."""
    base: str = "SmolLM2-135M-Instruct"
    """The generator that they are learnt for, by folder, GGUF file or name; a peft folder too."""
    index: Path | None = None
    """The index folder that passages are retrieved from."""
    qrels: Path | None = None
    """Train on the questions that these judge alone; nothing else of them is used."""
    dev_questions: Path | None = None
    """Questions to evaluate on; --questions if --dev-qrels are given, else some are held out."""
    dev_qrels: Path | None = None
    """Evaluate on the questions that these judge."""
    limit: int | None = None
    """Questions to train on, drawn at random; all if not given."""
    dev_limit: int = 200
    """Questions to evaluate on, drawn at random."""
    tokens: int = 50
    """Virtual tokens to learn."""
    layout: Literal["auto", "chat", "plain"] = "auto"
    """Whether the chat template is used; auto uses it if there is one."""
    placement: Literal["middle", "front", "last", "prompt-tuning"] = "middle"
    """Where tokens T stand beside passages R and question Q: [R,T,Q], [T,R,Q], [R,Q,T], or before
    all, by peft's prompt tuning. All but the first are there to be compared with."""
    prompt: str = "virtual-tokens"
    """The prompt's wording."""
    retriever: Literal["bm25", "dense", "hybrid"] | None = None
    """What searches; hybrid if the index has both stores."""
    encoder: str | None = None
    """The encoder of the dense search; the one named in the index if not given."""
    passages: str = "1-5"
    """How many retrieved passages a prompt shows while training: drawn from this range. Evaluation
    shows the most."""
    shuffle: bool = False
    """Show passages in a random order, not by their ranks; their keys and values are not kept."""
    fixed: bool = False
    """Use all tokens always, not the first k of a random k."""
    objective: Literal["sample", "batch"] = "sample"
    """Whether k is drawn for each sample or once for each batch."""
    seeds: str = "0"
    """Seeds, such as 0,1,2: each is learnt apart; the one with the least loss on dev is kept."""
    epochs: float = 3.0
    """Passes through the questions."""
    steps: int | None = None
    """Optimiser steps, in place of --epochs."""
    batch: int = 8
    """Questions in a step, over all processes and accumulated passes."""
    micro_batch: int = 8
    """Questions in one pass of one process."""
    learning_rate: float = 5e-3
    """The highest learning rate."""
    schedule: Literal["linear", "cosine", "constant_with_warmup"] = "linear"
    """The course of the learning rate."""
    warmup: float = 0.1
    """The share of steps in which the learning rate rises."""
    clip: float = 1.0
    """The largest norm of the gradient."""
    evaluate_every: int = 50
    """Steps between two evaluations, each followed by a checkpoint."""
    start: Path | None = None
    """Embeddings to start from: virtual tokens of ragkit, or SPRING's .pt file."""
    prefix_cache: float = 2.0
    """GB of keys and values of passages that are kept from one epoch to the next."""
    prefix_cache_folder: Path | None = None
    """Keep them in this folder and not in memory."""
    context_tokens: int = 1024
    """Tokens that the passages may take in a prompt."""
    max_new_tokens: int = 32
    """Tokens that an answer may take in the evaluation."""
    token_counts: str = ""
    """Evaluate with the first k tokens too, such as 0,1,5."""
    report_to: str = ""
    """Where training is reported to, by transformers' names, such as tensorboard."""
    device: str | None = None
    """Where the model runs: cpu, cuda, mps; the best one here if not given."""
    precision: Literal["auto", "fp32", "bf16"] = "auto"
    """The model's number format; the tokens are learnt in fp32 always."""
    replace: bool = False
    """Replace the output that is there."""


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
    check_output(settings.output, settings.replace, MARK)
    seeds = _numbers(settings.seeds, "--seeds")
    with progress_bars() as progress:
        run, files = prepared(settings, progress)
        state = settings.output.with_name(f"{settings.output.name}.training")
        _check_state(state, settings, files)
        learnt = [_learn(run, settings, seed, state / f"seed-{seed}", progress) for seed in seeds]
        if not _main_process(run.generator):
            return
        frozen = run.generator.base_hash(anew=True) == run.generator.base_hash()
        results = results_of(run, settings, seeds, learnt, progress) | {"data": files}
        results["base_unchanged"] = frozen
    with new_folder(settings.output, replace=settings.replace, mark=MARK) as folder:
        write(folder, seeds, [tokens for tokens, _ in learnt], results)
    shutil.rmtree(state, ignore_errors=True)
    if json:
        print_json(results)
    else:
        print_tables(tables(results))
        say(f"{settings.output}: {settings.tokens} virtual tokens for {settings.base}")


def prepared(settings: TokenSettings, progress: Progress) -> tuple[TokenRun, dict[str, Any]]:
    """Read questions, retrieve for them, and load the base."""
    from ragkit.training.token_runs import Retrieved

    low, high = _range(settings.passages)
    train = answered(settings.questions, settings.qrels, None, 0)
    if settings.dev_questions or settings.dev_qrels:
        dev = answered(
            settings.dev_questions or settings.questions, settings.dev_qrels, settings.dev_limit, 0
        )
    else:
        train, dev = held_out(train, settings.dev_limit)
    check_apart(train, dev)
    if len(dev) < 2:
        raise SettingsError("at least 2 questions to evaluate on are needed")
    train = _drawn(train, settings.limit)
    by = RetrievalSettings(
        index=settings.index,
        retriever=settings.retriever,
        encoder=settings.encoder,
        device=settings.device,
        precision=settings.precision,
    )
    parts = [Retrieved(part, retrieved(part, by, high, progress)) for part in (train, dev)]
    files = {
        name: described(getattr(settings, name))
        for name in ("questions", "qrels", "dev_questions", "dev_qrels")
    }
    return token_run(settings, parts[0], parts[1], (low, high)), files | {
        "train": len(train),
        "dev": len(dev),
    }


def token_run(
    settings: TokenSettings, train: Retrieved, dev: Retrieved, passages: tuple[int, int]
) -> TokenRun:
    """Load the base, and put together what all seeds share."""
    from ragkit.models.generator import Generator
    from ragkit.models.prefix_cache import PrefixCache
    from ragkit.models.virtual_tokens import VirtualTokens, read_tensor_file
    from ragkit.readers import GeneratorReader
    from ragkit.styles import style_named
    from ragkit.training.token_runs import TokenRun

    placement: Any = "start" if settings.placement == "prompt-tuning" else settings.placement
    style = style_named(settings.prompt).placing(placement)
    generator = Generator.load(
        settings.base,
        device=_device(settings.device),
        precision=settings.precision,
        layout=settings.layout,
    )
    reader = GeneratorReader(
        generator,
        style=style,
        context_tokens=settings.context_tokens,
        max_new_tokens=settings.max_new_tokens + settings.tokens,
    )
    start = None
    if settings.start is not None:
        kept = settings.start.is_dir()
        start = (
            VirtualTokens.load(settings.start).embeddings
            if kept
            else read_tensor_file(settings.start)
        )
    budget = 0 if settings.shuffle else int(settings.prefix_cache * _GB)
    return TokenRun(
        generator,
        style,
        reader.prompt,
        placement,
        settings.tokens,
        train,
        dev,
        passages,
        PrefixCache(generator.model, budget, settings.prefix_cache_folder),
        start,
    )


def _learn(
    run: TokenRun, settings: TokenSettings, seed: int, folder: Path, progress: Progress
) -> tuple[VirtualTokens, History]:
    from ragkit.training.loop import LoopSettings

    examples = len(run.train.examples)
    steps = settings.steps or max(1, round(settings.epochs * examples / settings.batch))
    loop = LoopSettings(
        steps=steps,
        batch=settings.batch,
        micro_batch=settings.micro_batch,
        learning_rate=settings.learning_rate,
        schedule=settings.schedule,
        warmup=settings.warmup,
        clip=settings.clip,
        evaluate_every=settings.evaluate_every,
        seed=seed,
        report_to=tuple(name for name in settings.report_to.split(",") if name),
    )
    folder.mkdir(parents=True, exist_ok=True)
    return run.learn(
        loop,
        folder,
        fixed=settings.fixed,
        objective=settings.objective,
        shuffle=settings.shuffle,
        progress=lambda _, done, total: progress(f"train, seed {seed}", done, total),
    )


def _check_state(folder: Path, settings: TokenSettings, files: dict[str, Any]) -> None:
    """Refuse to go on from a run of other settings or data, and note what this one is of.

    Raises:
        SettingsError: telling which setting differs.
    """
    free = {"replace", "device", "prefix_cache", "prefix_cache_folder", "report_to"}
    free |= {"token_counts", "seeds", "output"}
    made = {name: plain(value) for name, value in asdict(settings).items() if name not in free}
    made |= {"data": files}
    path = folder / "run.json"
    if path.exists():
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


def _device(name: str | None) -> str | None:
    """Return where this process's model goes: each has a GPU of its own, where there are some."""
    import torch

    from ragkit.models.precision import check_device
    from ragkit.training.loop import processes

    device = torch.device(check_device(name))
    together = processes(device)
    return str(together.device) if together.num_processes > 1 else name


def _main_process(generator: Generator) -> bool:
    from ragkit.training.loop import processes

    return bool(processes(generator.model.device).is_main_process)


def _numbers(text: str, option: str) -> list[int]:
    try:
        numbers = [int(number) for number in text.split(",")]
    except ValueError:
        raise SettingsError(f"{option} {text!r}: expected whole numbers, such as 0,1,2") from None
    if len(set(numbers)) < len(numbers) or min(numbers) < 0:
        raise SettingsError(f"{option} {text!r}: expected different numbers from 0 up")
    return numbers


def _range(text: str) -> tuple[int, int]:
    """Read `1-5`, or one number for both ends."""
    try:
        low, _, high = text.partition("-")
        ends = int(low), int(high or low)
    except ValueError:
        ends = (1, 0)
    if not 0 <= ends[0] <= ends[1]:
        raise SettingsError(f"--passages {text!r}: expected a range such as 1-5, or one number")
    return ends


def _drawn(examples: list[Example], limit: int | None) -> list[Example]:
    if limit is None or limit >= len(examples):
        return examples
    if limit < 1:
        raise SettingsError(f"--limit must be at least 1, not {limit}")
    return Random(0).sample(examples, limit)


def plain(value: Any) -> Any:
    """Return a setting as JSON holds it."""
    return str(value) if isinstance(value, Path) else value
