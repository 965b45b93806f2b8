"""What virtual tokens bring to a frozen reader, against fair baselines, over seeds.

    python benchmarks/quality_tokens.py --parts middle,front,last,fixed --seeds 0,1,2 \
        --train 2000 --dev 500 --steps 750

Trained on SQuAD's train questions with BM25's passages, the best step chosen on 48 more of them,
evaluated on dev. Each part is a way to train; what is learnt is kept in `--work` and gone on from.
Its table: the prompt alone, unplugged, and all tokens, with `--shown` passages by BM25 and with
another question's, which tells learning to read from learning to answer briefly. On the first
`--sweep` questions other numbers of tokens too, other numbers of passages, and dense retrieval's.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from random import Random
from typing import Any

from measure import data_folder, same_settings, save
from rich.console import Console

from ragkit import Index
from ragkit.artefacts import write_json
from ragkit.console import progress_bars
from ragkit.corpus import read_documents, read_qrels, read_questions
from ragkit.evaluation.probe_files import read_probe
from ragkit.evaluation.probes import run_probe
from ragkit.models import BiEncoder, Generator
from ragkit.models.precision import has_bf16, weights_hash
from ragkit.models.prefix_cache import PrefixCache
from ragkit.models.virtual_tokens import VirtualTokens
from ragkit.readers import GeneratorReader
from ragkit.retrievers import Bm25Retriever, DenseRetriever
from ragkit.styles import style_named
from ragkit.training.conditions import Condition, answered, scored
from ragkit.training.generator_runs import GeneratorRun
from ragkit.training.keeper import LoopSettings
from ragkit.training.mixes import Mix
from ragkit.training.token_runs import Retrieved, TokenRun
from ragkit.types import Hit, Progress

BASE = "SmolLM2-135M-Instruct"
WAYS: dict[str, dict[str, Any]] = {
    "middle": {},
    "front": {"placement": "front"},
    "last": {"placement": "last"},
    "fixed": {"fixed": True},
    "prompt-tuning": {"placement": "start", "fixed": True},
    "lora": {"rank": 8, "learning_rates": "2e-3,5e-4"},
}
CHOOSING = 48  # questions that choose the best step
SLICE = 20  # questions that are answered at a time


def main() -> None:
    """Train and evaluate the parts, and write a table of each."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--parts", default="middle")
    parser.add_argument("--name", default="tokens/middle", help="of the results")
    parser.add_argument("--seeds", default="0,1,2")
    parser.add_argument("--train", type=int, default=2000)
    parser.add_argument("--dev", type=int, default=500)
    parser.add_argument("--passages", type=int, default=5, help="the most shown while training")
    parser.add_argument("--tokens", type=int, default=50)
    parser.add_argument("--steps", type=int, default=750)
    parser.add_argument("--batch", type=int, default=8)
    parser.add_argument("--learning-rates", default="5e-3", help="tried with the first seed")
    parser.add_argument("--evaluations", type=int, default=10, help="while training")
    parser.add_argument("--shown", type=int, default=3, help="passages in the evaluation")
    parser.add_argument("--counts", default="1,5,10,50", help="tokens used")
    parser.add_argument("--depths", default="0,1,3,5", help="other numbers of passages")
    parser.add_argument("--sweep", type=int, default=100, help="questions of other k and depths")
    parser.add_argument("--max-new-tokens", type=int, default=16)
    parser.add_argument("--no-dense", action="store_true")
    parser.add_argument("--bare", action="store_true", help="answer with all tokens alone")
    parser.add_argument("--prefix-cache", type=float, default=8.0, help="GB")
    parser.add_argument("--work", type=Path, default=Path("tokens-work"))
    parser.add_argument("--probes", type=int, default=0, help="items of each general probe")
    arguments = parser.parse_args()
    generator = Generator.load(BASE)
    before = weights_hash(generator.model.state_dict())
    with progress_bars() as progress:
        train, dev, dense = tasks(arguments)
        cache = PrefixCache(generator.model, int(arguments.prefix_cache * 1e9))
        rows: list[dict[str, Any]] = []
        ways: dict[str, list[list[str]]] = {}
        for part in arguments.parts.split(","):
            run = run_of(part, generator, train, arguments, cache)
            folders, training = learnt_by_seed(run, part, arguments, progress)
            if isinstance(run, GeneratorRun):
                found, ways[part] = adapted(run, folders, dev, arguments, progress)
            else:
                learnt = [VirtualTokens.load(folder) for folder in folders]
                found, ways[part] = table(run, part, learnt, dev, dense, arguments, progress)
            found["training"] = training
            found["base unchanged"] = before == weights_hash(generator.model.state_dict())
            Console(width=120).print(part, found["conditions"])
            rows.append({"way": part} | found)
    general = probes(generator, arguments)
    # Of tokens unplugged: an adapter's probes are ragkit-train generator's.
    rows = [row if WAYS[row["way"]].get("rank") else row | {"probes": general} for row in rows]
    if len(ways) > 1:  # differences are of the first one
        rows.append({"way": "all"} | scored(dev.examples, dict(reversed(ways.items()))))
    used = {name: str(value) for name, value in vars(arguments).items() if name != "work"}
    save(arguments.name, rows, used)


def tasks(arguments: Any) -> tuple[Retrieved, Retrieved, Retrieved | None]:
    """Return train and dev questions with BM25's passages, and dev with dense retrieval's."""
    folder = data_folder() / "squad"
    encoder = None if arguments.no_dense else BiEncoder.load("all-MiniLM-L6-v2")
    stores = ["bm25"] if encoder is None else ["bm25", "dense"]
    kb = arguments.work / f"kb-{'-'.join(stores)}"
    if not (kb / "manifest.json").exists():
        documents = read_documents([folder / "corpus.jsonl.gz"])
        Index.build(kb, documents, encoder=encoder, stores=stores)
    index = Index.open(kb)
    questions = read_questions(folder / "queries.jsonl.gz")
    bm25 = Bm25Retriever(index)
    found = []
    for split, count in (("train", arguments.train + CHOOSING), ("dev", arguments.dev)):
        judged = read_qrels(folder / "qrels" / f"{split}.tsv")
        asked = [e for e in questions if e.query.id in judged and e.answers]
        examples = Random(0).sample(asked, min(count, len(asked)))
        hits = bm25.retrieve([example.query for example in examples], 5)
        found.append(Retrieved(examples, hits))
    train, dev = found
    if encoder is None:
        return train, dev, None
    queries = [example.query for example in dev.examples]
    return train, dev, Retrieved(dev.examples, DenseRetriever(index, encoder).retrieve(queries, 5))


def run_of(
    part: str,
    generator: Generator,
    train: Retrieved,
    arguments: Any,
    cache: PrefixCache,
) -> TokenRun | GeneratorRun:
    """Return the run of one way to train, with questions that choose the best step held out."""
    placement = WAYS[part].get("placement", "middle")
    style = style_named("virtual-tokens").placing(placement)
    reader = GeneratorReader(generator, style=style, context_tokens=1024)
    learning = Retrieved(train.examples[:-CHOOSING], train.hits[:-CHOOSING])
    choosing = Retrieved(train.examples[-CHOOSING:], train.hits[-CHOOSING:])
    passages = (min(1, arguments.passages), arguments.passages)
    if "rank" in WAYS[part]:
        mix, rank = Mix({"retrieved": 1.0}), WAYS[part]["rank"]
        return GeneratorRun(
            generator, style, reader.prompt, learning, choosing, mix, passages, rank
        )
    return TokenRun(
        generator,
        style,
        reader.prompt,
        placement,
        arguments.tokens,
        learning,
        choosing,
        passages,
        cache,
    )


def learnt_by_seed(
    run: TokenRun | GeneratorRun, part: str, arguments: Any, progress: Progress
) -> tuple[list[Path], dict[str, Any]]:
    """Return the folders of what each seed learnt, at the rate that was best for the first one."""
    seeds = [int(seed) for seed in arguments.seeds.split(",")]
    tried_rates = WAYS[part].get("learning_rates", arguments.learning_rates).split(",")
    rates = [float(rate) for rate in tried_rates]
    tried = [learn(run, part, seeds[0], rate, arguments, progress) for rate in rates]
    losses = [min(history["evaluations"].values()) for _, history in tried]
    rate = rates[losses.index(min(losses))]
    done = [tried[rates.index(rate)]]
    done += [learn(run, part, seed, rate, arguments, progress) for seed in seeds[1:]]
    training = {
        "loss of each learning rate": dict(zip(tried_rates, losses, strict=True)),
        "learning rate": rate,
        "histories": [history for _, history in done],
    }
    return [folder for folder, _ in done], training


def settings_of(arguments: Any) -> dict[str, Any]:
    """Return the settings that what is learnt and answered depends on."""
    names = ("train", "dev", "passages", "tokens", "steps", "batch", "evaluations", "shown")
    return {name: getattr(arguments, name) for name in (*names, "max_new_tokens")}


def learn(
    run: TokenRun | GeneratorRun,
    part: str,
    seed: int,
    rate: float,
    arguments: Any,
    progress: Progress,
) -> tuple[Path, dict[str, Any]]:
    """Learn what one seed gives, or take what was learnt before."""
    folder = arguments.work / part / f"{seed}-{rate:g}"
    same_settings(folder, settings_of(arguments))
    if not (folder / "history.json").exists():
        settings = LoopSettings(
            steps=arguments.steps,
            batch=arguments.batch,
            learning_rate=rate,
            evaluate_every=max(1, arguments.steps // arguments.evaluations),
            seed=seed,
            precision="bf16" if isinstance(run, GeneratorRun) and has_bf16("cpu") else "fp32",
        )
        if isinstance(run, GeneratorRun):
            _, history = run.learn(settings, folder, progress=progress)
        else:
            fixed = WAYS.get(part, {}).get("fixed", False)
            tokens, history = run.learn(settings, folder, fixed=fixed, progress=progress)
            tokens.save(folder)
        write_json(folder / "history.json", asdict(history))
        Console().print(part, seed, rate, asdict(history))
    return folder, json.loads((folder / "history.json").read_text(encoding="utf-8"))


def adapted(
    run: GeneratorRun, folders: Sequence[Path], dev: Retrieved, arguments: Any, progress: Progress
) -> tuple[dict[str, Any], list[list[str]]]:
    """Answer the dev questions by each seed's adapter: its scores, and texts [seeds, questions]."""
    depth, count = arguments.shown, len(dev.examples)
    name = f"BM25, {depth} passages: LoRA of rank {run.rank}"
    prompts = [
        run.prompt(example.query, hits[:depth])
        for example, hits in zip(dev.examples, dev.hits, strict=True)
    ]
    texts = []
    for folder in folders:
        path = folder / f"answers-{depth}-{count}.json"
        if not path.exists():
            asked, longest = [Condition(name, prompts)], arguments.max_new_tokens
            reader = Generator.load(str(folder / "model"))
            said = answered(reader, asked, max_new_tokens=longest, progress=progress)
            write_json(path, {"texts": said[name][0]})
        texts.append(json.loads(path.read_text(encoding="utf-8"))["texts"])
    return scored(dev.examples, {name: texts}), texts


def table(
    run: TokenRun,
    part: str,
    learnt: Sequence[VirtualTokens],
    dev: Retrieved,
    dense: Retrieved | None,
    arguments: Any,
    progress: Progress,
) -> tuple[dict[str, Any], list[list[str]]]:
    """Answer the dev questions in all conditions, and by all tokens [seeds, questions]."""
    examples = dev.examples
    plain = GeneratorReader(run.generator, style="spring", context_tokens=1024)
    main: list[Condition] = []
    sweep: list[Condition] = []

    def add(
        to: list[Condition], name: str, hits: Sequence[Sequence[Hit]], counts: Sequence[int]
    ) -> None:
        pairs = list(zip(examples, hits, strict=True))
        if to is sweep:
            pairs = pairs[: arguments.sweep]
        prompts = [run.prompt(example.query, shown) for example, shown in pairs]
        told = [plain.prompt(example.query, shown) for example, shown in pairs]
        if not arguments.bare and name not in {each.name.rpartition(":")[0] for each in main}:
            to.append(Condition(f"{name}: prompt only", told))
        if to is main and 0 in counts:
            to.append(Condition(f"{name}: unplugged", prompts))
        for count in filter(None, counts):
            chosen = [tokens.first(count) for tokens in learnt]
            to.append(Condition(f"{name}: {count} tokens", prompts, chosen))

    counts = [int(count) for count in arguments.counts.split(",")]
    depth, rest = arguments.shown, [int(m) for m in arguments.depths.split(",") if m]
    shown = [hits[:depth] for hits in dev.hits]
    others = [*shown[1:], shown[0]]
    name = f"BM25, {depth} passages"
    if not arguments.bare:
        add(main, f"of another question, {depth} passages", others, counts[-1:])
    # The last one: differences are of it.
    add(main, name, shown, counts[-1:] if arguments.bare else [0, counts[-1]])
    if arguments.sweep:
        add(sweep, name, shown, counts[:-1])
        for other in rest:
            if other != depth:
                hits = [of[:other] for of in dev.hits]
                add(sweep, f"BM25, {other} passages", hits, counts[-1:])
        if dense is not None:
            hits = [of[:depth] for of in dense.hits]
            add(sweep, f"dense, {depth} passages", hits, counts[-1:])
    answers = answers_by_parts(run, [*sweep, *main], len(examples), part, arguments, progress)
    found = scored(examples, {each.name: answers[each.name] for each in main})
    if arguments.sweep:
        few = {name: [texts[: arguments.sweep] for texts in of] for name, of in answers.items()}
        found["sweep"] = scored(examples[: arguments.sweep], few)
    found["examples"] = [
        {"question": example.query.text, "gold": list(example.answers)}
        | {name: of[0][place] for name, of in answers.items()}
        for place, example in enumerate(examples[:5])
    ]
    return found, answers[main[-1].name]


def answers_by_parts(
    run: TokenRun,
    conditions: Sequence[Condition],
    count: int,
    part: str,
    arguments: Any,
    progress: Progress,
) -> dict[str, list[list[str]]]:
    """Answer some questions at a time, and keep the answers: several processes may share the work.

    What is there is not answered again, though it was with other seeds. Questions that another
    process has begun are left to it, until nothing else is to be done.
    """
    folder = arguments.work / part / "answers"
    same_settings(folder, settings_of(arguments))
    seeds = arguments.seeds.split(",")
    single = {
        f"{each.name} | {seeds[place] if len(each.tokens) > 1 else '-'}": (each, place)
        for each in conditions
        for place in range(len(each.tokens))
    }
    for alone in (False, True):
        for start in range(0, count, SLICE):
            there = kept(folder, start)
            missing = [
                name
                for name, (each, _) in single.items()
                if name not in there and len(each.prompts) > start
            ]
            begun = folder / f"{start}-{'-'.join(seeds)}.begun"
            if not missing or (begun.exists() and not alone):
                continue
            begun.touch()
            some = []
            for name in missing:
                each, place = single[name]
                prompts = each.prompts[start : start + SLICE]
                some.append(Condition(name, prompts, [each.tokens[place]]))
            longest = arguments.max_new_tokens
            found = answered(run.generator, some, max_new_tokens=longest, progress=progress)
            write_json(begun.with_suffix(".json"), {name: of[0] for name, of in found.items()})
    whole = [kept(folder, start) for start in range(0, count, SLICE)]
    answers: dict[str, list[list[str]]] = {}
    for name, (each, _) in single.items():
        answers.setdefault(each.name, []).append(
            [text for of in whole for text in of.get(name, ())]
        )
    return answers


def kept(folder: Path, start: int) -> dict[str, list[str]]:
    """Return the answers that are there of the questions from a place on."""
    found: dict[str, list[str]] = {}
    for path in sorted(folder.glob(f"{start}-*.json")):
        found |= json.loads(path.read_text(encoding="utf-8"))
    return found


def probes(generator: Generator, arguments: Any) -> dict[str, float]:
    """Return the general ability of the base, unplugged, less that of the base before: 0."""
    if not arguments.probes:
        return {}
    found = {}
    fresh = Generator.load(BASE)
    for name in ("arc-easy", "piqa"):
        probe = read_probe(data_folder() / "general" / f"{name}.jsonl.gz")
        values = [run_probe(model, probe, limit=arguments.probes) for model in (fresh, generator)]
        for measure, estimate in values[1].estimates.items():
            found[f"{name}, {measure}"] = estimate.mean - values[0].estimates[measure].mean
    return found


if __name__ == "__main__":
    main()
