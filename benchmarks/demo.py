"""The main job, on the sample set: index, answer with citations, measure, tune, measure again.

Run by `make demo`; needs no network and no GPU.
"""

from __future__ import annotations

import shutil
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path

from cyclopts import App
from ragkit.trainers.__main__ import app as ragkit_train
from rich.console import Console

from ragkit import Index, Pipeline, evaluate
from ragkit.__main__ import app as ragkit
from ragkit.assemble import PipelineSettings, assemble
from ragkit.console import progress_bars, run
from ragkit.corpus import read_documents, read_qrels, read_questions
from ragkit.evaluation.report import results_table
from ragkit.evaluation.results import Results
from ragkit.models import BiEncoder
from ragkit.types import Progress

DATA = Path(__file__).parent / "data"
OUTPUT = Path("demo-output")
QUESTIONS = (
    "Which metal turns liquid at about 30 degrees Celsius?",
    "What is the name of the huge ringed impact basin on Callisto?",
    "Which two countries signed the Treaty of Tordesillas?",
)
ANSWERED = 50
TUNING = (
    "--tokens 20 --passages 1-2 --limit 80 --dev-limit 16 --steps 30 --evaluate-every 15 "
    "--max-new-tokens 24"
)
console = Console(width=110 if not sys.stdout.isatty() else None)


def main() -> None:
    """Run the stages one after the other."""
    started = time.perf_counter()
    shutil.rmtree(OUTPUT, ignore_errors=True)
    stage("Index", "the sample set's documents, for BM25 and dense search")
    with bars() as progress:
        documents = read_documents([DATA / "corpus.jsonl"])
        encoder = BiEncoder.load("all-MiniLM-L6-v2")
        index = Index.build(OUTPUT / "kb", documents, encoder=encoder, progress=progress)
    console.print(f"{len(index)} documents in {index.path}")

    stage("Answer", "three questions, from the three best passages of hybrid retrieval")
    settings = PipelineSettings(index=OUTPUT / "kb", keep=3)
    pipeline = assemble(settings)
    for question in QUESTIONS:
        answer(pipeline, question)

    stage("Measure", f"retrieval on all test questions, answers on {ANSWERED} of them")
    measures = ("nDCG@10", "recall@10", "EM", "F1", "cover")
    rows = measure(settings, pipeline, index)
    console.print(results_table(rows, measures, title="Sample set, test questions"))
    console.print("In brackets: 95 % bootstrap intervals.", rows[-1][1].stages.advice)

    stage(
        "Tune",
        "virtual tokens for the reader, which itself stays as it is",
    )
    tune()
    tuned = replace(settings, virtual_tokens=OUTPUT / "tokens")
    after = read(assemble(tuned, index), index, OUTPUT / "runs" / "tuned")
    rows = [rows[-1], ("hybrid + reader + virtual tokens", after)]
    console.print(results_table(rows, measures[2:], title="The same questions, before and after"))
    runs = [str(OUTPUT / "runs" / name) for name in ("answers", "tuned")]
    command("ragkit", ragkit, ["compare", *runs, "--measures", "EM,F1,cover"])
    page = OUTPUT / "runs" / "tuned" / "report.html"
    console.print("Question by question, to open in a browser:", str(page))
    console.print(f"Done in {time.perf_counter() - started:.0f} seconds.")


def answer(pipeline: Pipeline, question: str) -> None:
    """Ask one question and show the answer with the passages it rests on."""
    answer = pipeline.ask(question)
    console.print(f"\n[bold]{question}[/bold]")
    console.print(answer.text, markup=False)
    for position in answer.citations:
        document = answer.hits[position].document
        console.print(f"  [{position + 1}] {document.title}: {document.text}", markup=False)


def measure(
    settings: PipelineSettings, pipeline: Pipeline, index: Index
) -> list[tuple[str, Results]]:
    """Measure three retrievers, then the reader on the hybrid one's passages."""
    examples = read_questions(DATA / "test.jsonl")
    qrels = read_qrels(DATA / "qrels" / "test.tsv")
    rows = []
    with bars() as progress:
        for name in ("bm25", "dense", "hybrid"):
            retriever = assemble(replace(settings, retriever=name), index, read=False)
            folder = OUTPUT / "runs" / name
            progress(name, 0, len(examples))
            found = evaluate(retriever, examples, qrels=qrels, corpus=index, output=folder)
            rows.append((name, found))
            progress(name, len(examples), len(examples))
    rows.append(("hybrid + reader", read(pipeline, index, OUTPUT / "runs" / "answers")))
    return rows


def read(pipeline: Pipeline, index: Index, folder: Path) -> Results:
    """Measure the reader on every third test question, so that all topics are asked about."""
    examples = read_questions(DATA / "test.jsonl")
    some = examples[:: len(examples) // ANSWERED][:ANSWERED]
    qrels = read_qrels(DATA / "qrels" / "test.tsv")
    with bars() as progress:
        pipeline.reader.progress = lambda done, total: progress("read", done, total)
        return evaluate(pipeline, some, qrels=qrels, corpus=index, output=folder)


def tune() -> None:
    """Train virtual tokens on the sample set's own questions to train on."""
    arguments = [
        "virtual-tokens", "--index", str(OUTPUT / "kb"), "--output", str(OUTPUT / "tokens"),
        "--questions", str(DATA / "train.jsonl"), "--dev-questions", str(DATA / "dev.jsonl"),
        *TUNING.split(),
    ]  # fmt: skip
    command("ragkit-train", ragkit_train, arguments)


def command(name: str, app: App, arguments: list[str]) -> None:
    """Run a program as its command line does, and show that line."""
    console.print(name, *arguments, soft_wrap=True)
    if code := run(app, arguments):
        sys.exit(code)


@contextmanager
def bars() -> Iterator[Progress]:
    """Show progress as bars, or as lines where there is no terminal."""
    if sys.stderr.isatty():
        with progress_bars() as progress:
            yield progress
        return
    yield lambda stage, done, total: print(f"{stage}: {done} of {total}", flush=True)


def stage(name: str, what: str) -> None:
    """Announce a stage."""
    console.rule(f"[bold]{name}[/bold]: {what}")


if __name__ == "__main__":
    main()
