"""A run folder as one page: `report.html`, which needs nothing but a browser."""

from __future__ import annotations

import base64
import hashlib
import json
import re
from collections.abc import Iterator, Mapping
from importlib.resources import files
from pathlib import Path
from typing import Any

from ..artefacts import read_json, write_text
from ..errors import DataError
from .browser import Browser, build_browser
from .contexts import CONTEXTS
from .folder import MARK
from .report import HEADLINES
from .results import FORMAT
from .stages import STAGES

_CARDS = (*HEADLINES, "judge correct")
_SURROGATE = re.compile("[\ud800-\udfff]")


def write_page(run: Path, output: Path | None = None) -> Path:
    """Write a run folder's page: its tables, charts and questions in one file.

    The page asks the network for nothing, and its policy forbids it to. It is the same for the same
    run, wherever and whenever it is written.

    Args:
        run: the run folder.
        output: the file to write; `report.html` in the run folder if not given. One that is there
            is replaced, in one step.

    Returns:
        The file.

    Raises:
        DataError: `run` is no run folder or one of another format, a file of it is damaged, or
            `output` cannot be written.
    """
    run = Path(run)
    target = Path(output) if output else run / "report.html"
    results = _results(run)
    try:
        text = _page(run, results)
    except (LookupError, TypeError, ValueError, AttributeError) as error:
        if isinstance(error, DataError):
            raise
        raise DataError(
            f"{run / MARK} is damaged ({type(error).__name__}: {error}). Run the evaluation again."
        ) from error
    try:
        write_text(target, text)
    except OSError as error:
        raise DataError(f"{target}: cannot be written: {error.strerror or error}") from error
    return target


def _results(run: Path) -> dict[str, Any]:
    if not (run / MARK).is_file():
        raise DataError(
            f"{run} is no run folder: it holds no {MARK}. Name a folder that `ragkit evaluate "
            "--output` wrote."
        )
    results = read_json(run / MARK)
    if results.get("format") != FORMAT:
        raise DataError(
            f"{run / MARK} has the format {results.get('format')!r}; this ragkit reads {FORMAT}. "
            "Run the evaluation again."
        )
    return results


def _page(run: Path, results: Mapping[str, Any]) -> str:
    from jinja2 import Environment, StrictUndefined

    from .sections import estimates_of, in_order, sections_of

    scores = estimates_of(results["retrieval"]) | estimates_of(results["answers"])
    browser = build_browser(run, list(scores), in_order(results["contexts"], CONTEXTS))
    style, script, template = (
        files(__package__).joinpath(f"report.{suffix}").read_text(encoding="utf-8")
        for suffix in ("css", "js", "html.jinja")
    )
    environment = Environment(
        autoescape=True, undefined=StrictUndefined, trim_blocks=True, lstrip_blocks=True
    )
    settings = results["settings"]
    text = environment.from_string(template).render(
        style=style,
        script=script,
        script_hash=base64.b64encode(hashlib.sha256(script.encode()).digest()).decode(),
        version=results["ragkit"],
        title=_title(settings),
        advice=results["stages"].get("advice", ""),
        questions=results["counts"]["questions"],
        cards=[(name, scores[name]) for name in _CARDS if name in scores],
        facts=list(_facts(settings)),
        sections=sections_of(results),
        judge=list(_texts(settings.get("judge", {}))),
        settings=[
            (name, json.dumps(results[name], ensure_ascii=False, indent=2))
            for name in ("settings", "hashes")
        ],
        browser=browser,
        chosen=_chosen(browser),
        stages=[(stage, browser.stages[stage]) for stage in in_order(browser.stages, STAGES)],
    )
    return _SURROGATE.sub("\ufffd", text)


def _chosen(browser: Browser) -> str:
    """Return the measure that the list of questions shows first."""
    wanted = [*(("F1", "EM") if browser.read else ()), *HEADLINES, *browser.measures]
    return next((name for name in wanted if name in browser.measures), "")


def _title(settings: Mapping[str, Any]) -> str:
    """Name the questions and what they were asked of, as far as the settings tell."""
    questions = _at(settings, "questions", "path") or _at(settings, "qrels", "path")
    asked = _at(settings, "command", "index") or _at(settings, "run", "path")
    paths = [str(path).rstrip("/\\") for path in (questions, asked) if path]
    return " · ".join(re.split(r"[/\\]", path)[-1] for path in paths) or "Evaluation"


def _facts(settings: Mapping[str, Any]) -> Iterator[tuple[str, str]]:
    """Yield what was run, as far as the settings tell."""
    for name in ("run", "questions", "qrels"):
        if path := _at(settings, name, "path"):
            yield name, str(path)
    names = ["index", "retriever", "reranker"]
    if _at(settings, "reader") is not False:
        names += ["generator", "server", "prompt", "keep"]
    absent = {"retriever": "the index’s own", "reranker": "none"}
    for name in names:
        value = _at(settings, "command", name)
        if value is None and _at(settings, "command") is not None:
            value = absent.get(name)
        if value is not None:
            yield name, str(value)
    if (used := _at(settings, "virtual_tokens", "used")) is not None:
        yield "virtual tokens", f"{used} of {_at(settings, 'virtual_tokens', 'count')}"


def _at(value: Any, *names: str) -> Any:
    """Look into JSON, of which nothing is known; None where it holds no such thing."""
    for name in names:
        value = value.get(name) if isinstance(value, Mapping) else None
    return value


def _texts(value: Any, name: str = "") -> Iterator[tuple[str, str]]:
    """Yield the texts inside a JSON value, with the path of each; items of lists by their names."""
    if isinstance(value, Mapping):
        for key, inner in value.items():
            yield from _texts(inner, f"{name} · {key}" if name else str(key))
    elif isinstance(value, list):
        for place, inner in enumerate(value, start=1):
            label = str(_at(inner, "name") or place)
            yield from _texts(inner, f"{name} · {label}" if name else label)
    elif value is not None:
        yield name, str(value)
