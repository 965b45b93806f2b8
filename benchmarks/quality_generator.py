"""What training does to a reader: its answers by what it is given, and what it forgets.

    python benchmarks/quality_generator.py --parts base,tokens,as-is,mixed,both --seeds 0,1,2
    python benchmarks/quality_generator.py --parts as-is,overtone,replay,keep,average

Each part learns from the same train questions of SQuAD with BM25's passages, in an adapter or in
virtual tokens, the best step chosen on 48 more of them. What is learnt and answered is kept in
`--work`, and what is finished in the results, answers included: seeds and parts that are there are
not made again, on whatever machine they were. All parts answer the same dev questions: without
passages, with those retrieved, with the gold passage alone and among distractors, and with
distractors alone; and questions of nq_wiki that its passages do not answer. In the last two it is
right to abstain. General ability is measured before and after, on items and on passages of a set
that nothing was learnt from.

On a CPU freed memory is best kept for a while: LD_PRELOAD=…/libjemalloc.so.2 and
MALLOC_CONF=oversize_threshold:0,dirty_decay_ms:8000 save a tenth of the time or more. Kept for
ever (-1) it filled 24 GB in minutes, two runs side by side: rows of each length want own pages.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from random import Random
from typing import Any

from measure import RESULTS, data_folder, same_settings, save
from quality_tokens import learn, settings_of, tasks
from rich.console import Console

from ragkit import Example, Index
from ragkit.artefacts import fingerprint, new_folder, read_json, write_json
from ragkit.console import progress_bars
from ragkit.corpus import read_documents, read_qrels, read_questions
from ragkit.evaluation.contexts import build_contexts
from ragkit.evaluation.probe_files import Probe, ProbeItem, read_probe
from ragkit.evaluation.probes import compare_probes, run_probe
from ragkit.models import Generator
from ragkit.models.loading import without_adapter
from ragkit.models.names import cache_folder
from ragkit.models.prefix_cache import PrefixCache
from ragkit.models.virtual_tokens import VirtualTokens
from ragkit.readers import GeneratorReader
from ragkit.retrievers import Bm25Retriever
from ragkit.styles import PromptStyle, style_named
from ragkit.training.conditions import Condition, answered, scored
from ragkit.training.generator_loss import LOSSES, Smoothing
from ragkit.training.generator_runs import GeneratorRun
from ragkit.training.mixes import Mix
from ragkit.training.passages import Passages
from ragkit.training.remedies import Remedies
from ragkit.training.token_runs import Retrieved, TokenRun
from ragkit.types import Hit, Progress, Qrels

BASE = "SmolLM2-135M-Instruct"
AS_IS, MIXED = "retrieved:1", "gold:.4,retrieved:.3,distractors:.2,none:.1"
PARTS: dict[str, dict[str, Any]] = {
    "base": {},
    "tokens": {"tokens": 50, "steps": 150, "evaluations": 10},
    "as-is": {"mix": AS_IS},
    "mixed": {"mix": MIXED},
    "both": {"tokens": 50, "on": "as-is"},
    "overtone": {"mix": AS_IS, "loss": "overtone"},
    "replay": {"mix": AS_IS, "replay": 1},
    "keep": {"mix": AS_IS, "keep": 1},
    "average": {"average": 0.5, "on": "as-is"},
}
REFERENCE = "as-is"  # what the other parts are compared with
RATES = {"tokens": 1e-2, "adapter": 2e-3}
UNANSWERABLE = "unanswerable"
PROBES = ("arc-easy", "piqa")


def main() -> None:
    """Train and ask the parts, and write what came of each."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--parts", default="base,tokens,as-is,mixed,both")
    parser.add_argument("--seeds", default="0,1,2")
    parser.add_argument("--train", type=int, default=240)
    parser.add_argument("--dev", type=int, default=500)
    parser.add_argument("--passages", type=int, default=3, help="the most shown")
    parser.add_argument("--steps", type=int, default=48)
    parser.add_argument("--batch", type=int, default=8)
    parser.add_argument("--evaluations", type=int, default=3, help="while training")
    parser.add_argument(
        "--contexts", default=f"none,retrieved,gold,gold+distractors,wrong,{UNANSWERABLE}"
    )
    parser.add_argument("--others", type=int, default=150, help="dev questions of other contexts")
    parser.add_argument("--unanswerable", type=int, default=100, help="questions of nq_wiki")
    parser.add_argument("--probes", type=int, default=100, help="items of each general probe")
    parser.add_argument("--max-new-tokens", type=int, default=16)
    parser.add_argument("--prefix-cache", type=float, default=8.0, help="GB")
    parser.add_argument("--work", type=Path, default=Path("generator-work"))
    arguments = parser.parse_args()
    arguments.shown, arguments.tokens, arguments.no_dense = arguments.passages, 50, True
    base = Generator.load(BASE)
    with progress_bars() as progress:
        train, dev, _ = tasks(arguments)
        asked = contexts_of(dev, arguments)
        probes = general(arguments) if arguments.probes else []
        before = [run_probe(base, probe, cache=cache_folder() / "probes") for probe in probes]
        for part in arguments.parts.split(","):
            contexts, runs = known(part, arguments)
            missing = [
                int(seed)
                for seed in (["0"] if part == "base" else arguments.seeds.split(","))
                if not (seed in runs and runs[seed]["answers"].keys() >= asked.keys())
            ]
            # Tokens of all seeds plug into one model, which reads the passages once for all.
            plug = "tokens" in PARTS[part] and "on" not in PARTS[part]
            for seeds in [missing] if plug and missing else [[seed] for seed in missing]:
                cache = PrefixCache(base.model, int(arguments.prefix_cache * 1e9)) if plug else None
                ready = [
                    learnt(part, seed, base, train, arguments, progress, cache) for seed in seeds
                ]
                cache = None  # GBs that answering has no use for
                told = said(part, seeds, [model for model, _ in ready], asked, arguments, progress)
                for seed, (model, history), texts in zip(seeds, ready, told, strict=True):
                    after = [
                        run_probe(model, each, cache=cache_folder() / "probes") for each in probes
                    ]
                    changes = {
                        b.probe: {n: asdict(e) for n, e in compare_probes(b, a).items()}
                        for b, a in zip(before, after, strict=True)
                    }
                    kept = runs.get(str(seed), {}).get("answers", {})
                    run = {"answers": kept | texts, "probes": changes, "training": history}
                    runs[str(seed)] = run
                contexts |= measured(asked, runs)
                row = {"part": part, "way": PARTS[part], "contexts": contexts}
                save(f"generator/{part}", [row | {"runs": runs}], used(arguments))
                Console(width=120).print(row)
    parts = {part: runs for part in PARTS if (runs := known(part, arguments)[1])}
    if parts.keys() > {REFERENCE}:
        found = {"part": "differences", "contexts": differences(asked, parts)}
        save("generator/differences", [found], used(arguments))


def used(arguments: Any) -> dict[str, str]:
    """Return the settings in which the runs of all parts agree."""
    free = {"parts", "seeds", "work", "prefix_cache", "contexts"}
    return {name: str(value) for name, value in vars(arguments).items() if name not in free}


def known(part: str, arguments: Any) -> tuple[dict[str, Any], dict[str, dict[str, Any]]]:
    """Return what a part's results hold: scores by context, and runs, by seed, not to make again.

    Ends where they were made with other settings.
    """
    path = RESULTS / "generator" / f"{part}.json"
    if not path.exists():
        return {}, {}
    found = read_json(path)
    if found["settings"] != used(arguments):
        sys.exit(f"{path} tells of other settings: give the same, or remove it")
    return found["rows"][0]["contexts"], found["rows"][0]["runs"]


Asked = dict[str, tuple[Sequence[Example], Sequence[Sequence[Hit]]]]
"""Context -> questions, and the passages that each is asked with."""


def contexts_of(dev: Retrieved, arguments: Any) -> Asked:
    """Return the questions and passages of each context.

    All dev questions are asked with what was retrieved, the first of those that have every context
    with the others too.
    """
    folder, keep = data_folder() / "squad", arguments.passages
    qrels = read_qrels(folder / "qrels" / "dev.tsv")
    documents = {d.id: d for d in read_documents([folder / "corpus.jsonl.gz"])}
    names = [name for name in arguments.contexts.split(",") if name != UNANSWERABLE]
    built = []
    for example, hits in zip(dev.examples, dev.hits, strict=True):
        grades = qrels[example.query.id]
        gold = [Hit(documents[name], 1.0) for name, grade in grades.items() if grade > 0]
        passages = Passages(example, hits, grades)
        others = [
            hit
            for hit in hits
            if not (passages.is_gold(hit.document) or passages.holds(hit.document))
        ]
        found = build_contexts(
            names, (), query=example.query.id, retrieved=hits[:keep], gold=gold,
            distractors=others, keep=keep, seed=0,
        )  # fmt: skip
        if found.keys() == set(names):
            built.append((example, found))
    some = built[: arguments.others]
    asked: Asked = {
        name: ([e for e, _ in some], [found[name] for _, found in some]) for name in names
    }
    if "retrieved" in names:
        asked["retrieved"] = dev.examples, [hits[:keep] for hits in dev.hits]
    if UNANSWERABLE in arguments.contexts.split(","):
        asked[UNANSWERABLE] = unanswerable(arguments)
    return asked


def unanswerable(arguments: Any) -> tuple[list[Example], list[list[Hit]]]:
    """Return nq_wiki's questions without an answer, and BM25's passages for them."""
    folder, kb = data_folder() / "nq_wiki", arguments.work / "nq_wiki"
    if not (kb / "manifest.json").exists():
        Index.build(kb, read_documents([folder / "corpus.jsonl.gz"]), stores=["bm25"])
    asked = [e for e in read_questions(folder / "queries.jsonl.gz") if not e.answers]
    asked = Random(0).sample(asked, min(arguments.unanswerable, len(asked)))
    hits = Bm25Retriever(Index.open(kb)).retrieve([e.query for e in asked], arguments.passages)
    return asked, [list(found) for found in hits]


def general(arguments: Any) -> list[Probe]:
    """Return the probes of general ability: items, and passages of another set."""
    limit = arguments.probes
    found = [read_probe(data_folder() / "general" / f"{name}.jsonl.gz") for name in PROBES]
    found = [Probe(probe.name, probe.kind, probe.items[:limit]) for probe in found]
    documents = read_documents([data_folder() / "popqa" / "corpus.jsonl.gz"])
    items = [ProbeItem(d.id, "", (d.text,)) for d, _ in zip(documents, range(limit), strict=False)]
    return [*found, Probe("popqa passages", "texts", tuple(items))]


def style_of(part: str) -> PromptStyle:
    """Return the wording of a part: what is trained has the one of virtual tokens."""
    return style_named("ragkit" if part == "base" else "virtual-tokens")


def learnt(
    part: str,
    seed: int,
    base: Generator,
    train: Retrieved,
    arguments: Any,
    progress: Progress,
    cache: PrefixCache | None = None,
) -> tuple[Generator, dict[str, Any]]:
    """Return what one seed of a part has learnt, plugged in, and the history of that.

    The cache is of the base's prefixes; one is made where it is wanted and None is given.
    """
    way = PARTS[part]
    if not way:
        return base, {}
    if on := way.get("on"):
        base = learnt(on, seed, base, train, arguments, progress)[0]
    style = style_of(part)
    reader = GeneratorReader(base, style=style, context_tokens=1024)
    cut = len(train.examples) - 48
    learning, choosing = (
        Retrieved(train.examples[of], train.hits[of], judged())
        for of in (slice(cut), slice(cut, None))
    )
    shown = (1, arguments.passages)
    if "tokens" in way:
        arguments = argparse.Namespace(**vars(arguments))
        for name in ("steps", "evaluations"):
            setattr(arguments, name, way.get(name, getattr(arguments, name)))
        cache = cache or PrefixCache(base.model, int(arguments.prefix_cache * 1e9))
        tokens = TokenRun(
            base, style, reader.prompt, "middle", way["tokens"], learning, choosing, shown, cache
        )
        folder, history = learn(tokens, part, seed, RATES["tokens"], arguments, progress)
        plugged = VirtualTokens.load(folder)
        return Generator(base.model, base.tokenizer, base.name, virtual_tokens=plugged), history
    loss, smoothing = LOSSES[way.get("loss", "cross-entropy")], Smoothing()
    run = GeneratorRun(
        base, style, reader.prompt, learning, choosing, Mix.parse(way.get("mix", AS_IS)), shown,
        loss=lambda logits, labels, count: loss(logits, labels, count, smoothing),
        remedies=remedies(way),
    )  # fmt: skip
    if share := way.get("average"):
        whole = arguments.work / on / f"{seed}-{RATES['adapter']:g}" / "model"
        place = arguments.work / part / str(seed)
        if not place.exists():
            with new_folder(place, mark="model") as folder:
                run.averaged(whole, share, folder / "model")
        return loaded(place / "model"), {}
    folder, history = learn(run, part, seed, RATES["adapter"], arguments, progress)
    return loaded(folder / "model"), history


def loaded(folder: Path) -> Generator:
    """Return a trained generator, its adapter merged into the weights: so it answers faster."""
    generator = Generator.load(str(folder))
    generator.model = without_adapter(str(folder), generator.model).eval()
    return generator


def judged() -> Qrels:
    """Return what is relevant to train questions."""
    return read_qrels(data_folder() / "squad" / "qrels" / "train.tsv")


def remedies(way: Mapping[str, Any]) -> Remedies:
    """Return what is done against forgetting; general texts are passages of nq_wiki."""
    texts: list[str] = []
    if way.get("replay"):
        texts = [d.text for d in read_documents([data_folder() / "nq_wiki" / "corpus.jsonl.gz"])]
    return Remedies(texts, way.get("replay", 0), way.get("keep", 0))


def said(
    part: str,
    seeds: Sequence[int],
    models: Sequence[Generator],
    asked: Asked,
    arguments: Any,
    progress: Progress,
) -> list[dict[str, list[str]]]:
    """Return each seed's answers in each context; those that are kept are not made again.

    Of several seeds the models differ in their virtual tokens alone.
    """
    reader = GeneratorReader(models[0], style=style_of(part), context_tokens=1024)
    found: list[dict[str, list[str]]] = [{} for _ in seeds]
    for context, (examples, hits) in asked.items():
        shown = [
            (e.query.id, [hit.document.id for hit in of])
            for e, of in zip(examples, hits, strict=True)
        ]
        name = f"{context}-{len(examples)}-{fingerprint(shown)[:8]}.json"
        paths = [arguments.work / part / f"answers-{seed}" / name for seed in seeds]
        for path in paths:
            same_settings(path.parent, settings_of(arguments))
        if missing := [place for place, path in enumerate(paths) if not path.exists()]:
            prompts = [reader.prompt(e.query, of) for e, of in zip(examples, hits, strict=True)]
            told = [Condition(context, prompts, [models[p].virtual_tokens for p in missing])]
            longest = arguments.max_new_tokens
            of = answered(models[0], told, max_new_tokens=longest, progress=progress)[context]
            for place, texts in zip(missing, of, strict=True):
                write_json(paths[place], {"texts": texts})
        for kept, path in zip(found, paths, strict=True):
            kept[context] = read_json(path)["texts"]
    return found


def measured(asked: Asked, runs: Mapping[str, Mapping[str, Any]]) -> dict[str, Any]:
    """Return each context's scores, among them how often the answer was that there is none."""
    return {
        context: scored(examples, {context: texts_of(runs, context)})["conditions"][context]
        for context, (examples, _) in asked.items()
        if texts_of(runs, context)
    }


def texts_of(runs: Mapping[str, Mapping[str, Any]], context: str) -> list[list[str]]:
    """Return the answers in a context: texts [seeds, questions], of the seeds that have some."""
    told = [run["answers"] for _, run in sorted(runs.items())]
    return [texts[context] for texts in told if context in texts]


def differences(asked: Asked, parts: Mapping[str, Mapping[str, Any]]) -> dict[str, Any]:
    """Return by context how far the reference is from each other part, paired by question."""
    found = {}
    for context, (examples, _) in asked.items():
        order = [*(part for part in parts if part != REFERENCE), REFERENCE]
        texts = {part: told for part in order if (told := texts_of(parts[part], context))}
        if context != UNANSWERABLE and REFERENCE in texts:
            found[context] = scored(examples, texts)["differences"]
    return found


if __name__ == "__main__":
    main()
