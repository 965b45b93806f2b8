"""What a run of virtual tokens reports: before and after, and a model card."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict
from typing import TYPE_CHECKING, Any

from ragkit import __version__
from ragkit.types import Progress

from .results import interval, laid_out, markdown, told_of_scores
from .runs import json_values

if TYPE_CHECKING:
    from ragkit.models.virtual_tokens import VirtualTokens
    from ragkit.training.keeper import History
    from ragkit.training.token_runs import TokenRun

    from .token_settings import TokenSettings

_MEASURES = ("EM", "F1", "cover")


def results_of(
    run: TokenRun,
    settings: TokenSettings,
    seeds: Sequence[int],
    counts: Sequence[int],
    learnt: Sequence[tuple[VirtualTokens, History]],
    progress: Progress,
) -> dict[str, Any]:
    """Answer the dev questions before and after, and say what was learnt and how."""
    from ragkit.readers import GeneratorReader
    from ragkit.training.conditions import Condition, measured

    examples = run.dev.examples
    asked = list(zip(examples, run.dev.hits, strict=True))
    plain = GeneratorReader(
        run.generator,
        style="spring",
        context_tokens=settings.context_tokens,
        max_new_tokens=settings.max_new_tokens,
    )
    prompts = [run.prompt(example.query, hits) for example, hits in asked]
    conditions = [
        Condition("prompt only", [plain.prompt(e.query, hits) for e, hits in asked]),
        Condition("unplugged", prompts),
        *(
            Condition(_named(count), prompts, [tokens.first(count) for tokens, _ in learnt])
            for count in counts
            if count
        ),
        Condition("virtual tokens", prompts, [tokens for tokens, _ in learnt]),
    ]
    found = measured(
        run.generator,
        examples,
        conditions,
        max_new_tokens=settings.max_new_tokens,
        progress=progress,
    )
    answers = found.pop("answers")
    losses = [min(history.evaluations.values()) for _, history in learnt]
    best = losses.index(min(losses))
    return found | {
        "seeds": {
            str(seed): asdict(history) for seed, (_, history) in zip(seeds, learnt, strict=True)
        },
        "settings": json_values(settings),
        "best_seed": str(seeds[best]),
        "prefixes": {
            "tokens_read": run.prefixes.read_tokens if run.prefixes else 0,
            "tokens_kept": run.prefixes.kept_tokens if run.prefixes else 0,
        },
        "examples": [
            {"question": example.query.text, "gold": list(example.answers)}
            | {name: of[best if len(of) > 1 else 0][place] for name, of in answers.items()}
            for place, example in enumerate(examples[:10])
        ],
    }


def tables(results: Mapping[str, Any]) -> list[Any]:
    """Lay out before and after for the terminal."""
    title = f"{results['data']['dev']} questions to evaluate on, {len(results['seeds'])} seeds"
    changes = "What virtual tokens change, paired by question"
    return [
        laid_out(title, ("answers with", *_MEASURES), _rows(results["conditions"])),
        laid_out(changes, ("difference", *_MEASURES), _rows(results["differences"])),
        told_of_scores("step was"),
    ]


def _rows(named: Mapping[str, Any]) -> list[list[str]]:
    return [[name, *(interval(of[measure]) for measure in _MEASURES)] for name, of in named.items()]


def _named(count: int) -> str:
    return f"{count} token{'' if count == 1 else 's'}"


def card(tokens: VirtualTokens, results: Mapping[str, Any]) -> str:
    """Return the model card: what the tokens are, how they were learnt, what they changed."""
    settings, data = results["settings"], results["data"]
    return CARD.format(
        count=len(tokens),
        base=tokens.base,
        base_hash=tokens.base_hash[:16],
        placement=tokens.placement,
        layout=tokens.layout,
        style=tokens.style.name,
        train=data["train"],
        dev=data["dev"],
        seeds=", ".join(results["seeds"]),
        passages=settings["passages"],
        learning_rate=settings["learning_rate"],
        table=markdown(("answers with", *_MEASURES), _rows(results["conditions"])),
        version=__version__,
    )


CARD = """# {count} virtual tokens for {base}

Learnt embeddings that stand between retrieved passages and the question (SPRING: Zhu et al. 2025,
arXiv 2405.19670). The base model is unchanged; without them it is itself, bit for bit.

- base: {base}, weights {base_hash}…; other weights are refused
- prompt: wording `{style}`, layout `{layout}`, placement `{placement}`
- learnt from {train} questions, {passages} retrieved passages each, learning rate {learning_rate}
- seeds: {seeds}; this is the one with the least loss on the {dev} questions evaluated

{table}

In brackets: 95 % bootstrap intervals over questions and seeds. The best step and seed were chosen
on the same questions: for an unbiased figure, evaluate on others.

```
ragkit ask "…" --index INDEX --virtual-tokens THIS_FOLDER
```

Made by ragkit {version}. `results.json` holds the settings, hashes of the data and the losses.
"""
