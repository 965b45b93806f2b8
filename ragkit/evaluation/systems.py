"""Run folders read back, and grouped into the systems whose seeds they are."""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Collection, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ..artefacts import read_json, to_json
from ..errors import DataError, SettingsError
from .folder import MARK, PROBES
from .gold import sample
from .results import FORMAT
from .scoring import Scores

_LARGEST = 1e300  # a score beyond it is none


@dataclass(frozen=True, slots=True)
class RunFolder:
    """What a comparison needs of a run folder.

    Attributes:
        path: the folder.
        settings: what the run was made with.
        hashes: fingerprints of its questions, qrels and, if known, corpus.
        questions: the questions' ids, in the order in which they were asked.
        scores: measure -> question id -> value. What a reader scored in another context is a
            measure of its own, such as "F1 (gold)".
    """

    path: Path
    settings: dict[str, Any]
    hashes: dict[str, str]
    questions: tuple[str, ...]
    scores: Scores


@dataclass(frozen=True, slots=True)
class System:
    """What is compared: one run, or runs of several seeds."""

    name: str
    runs: tuple[RunFolder, ...]


def read_run_folder(path: str | Path) -> RunFolder:
    """Read a run folder's settings, hashes, and scores of every question.

    Raises:
        DataError: it is no run folder, is of another format, or is damaged: a broken line, an id
            twice, a score that is not a finite number, lines missing.
    """
    folder = Path(path)
    if not (folder / MARK).is_file():
        raise DataError(
            f"{folder}: is no run folder, it holds no {MARK}. `ragkit evaluate --output` makes one."
        )
    results = read_json(folder / MARK)
    if (found := results.get("format")) != FORMAT:
        raise DataError(
            f"{folder / MARK}: has format {found!r}, and this ragkit reads format {FORMAT}. "
            "Evaluate again to make it anew."
        )
    try:
        settings, count = dict(results["settings"]), results["counts"]["questions"]
        hashes = {name: str(results["hashes"][name]) for name in ("questions", "qrels")}
        if "corpus" in results["hashes"]:
            hashes["corpus"] = str(results["hashes"]["corpus"])
    except (LookupError, TypeError, ValueError) as error:
        raise DataError(
            f"{folder / MARK}: lacks settings, hashes or counts ({error}). Evaluate again."
        ) from error
    questions, scores = _read_scores(folder / "answers.jsonl")
    if len(questions) != count:
        raise DataError(
            f"{folder / 'answers.jsonl'}: has {len(questions)} lines where {MARK} counts {count} "
            "questions: the folder is damaged. Evaluate again."
        )
    return RunFolder(folder, settings, hashes, questions, scores | _read_probes(folder / PROBES))


def _read_scores(path: Path) -> tuple[tuple[str, ...], Scores]:
    questions: dict[str, None] = {}
    scores: Scores = {}
    try:
        with path.open("rb") as lines:
            for number, line in enumerate(lines, start=1):
                query, values = _row(line, f"{path}:{number}")
                if query in questions:
                    raise DataError(f"{path}:{number}: the id {query!r} occurs a second time")
                questions[query] = None
                for measure, value in values.items():
                    scores.setdefault(measure, {})[query] = value
    except OSError as error:
        raise DataError(f"{path}: cannot be read ({error.strerror})") from error
    return tuple(questions), scores


def _read_probes(path: Path) -> Scores:
    """Read what items of probes scored, under their id and the hash of their probe's items."""
    scores: Scores = {}
    try:
        for line in path.read_bytes().splitlines() if path.exists() else ():
            row = json.loads(line)
            of = scores.setdefault(f"{row['measure']} ({row['probe']})", {})
            of[f"{row['items']}:{row['id']}"] = float(row["value"])
    except (OSError, ValueError, LookupError, TypeError) as error:
        raise DataError(f"{path}: is damaged ({error}). Evaluate again.") from error
    return scores


def _row(line: bytes, where: str) -> tuple[str, dict[str, float]]:
    """Return a line's question id and its scores, those of its contexts by their own names."""
    try:
        row = json.loads(line)
        query, found = row["id"], dict(row["scores"])
        for context, answer in row.get("contexts", {}).items():
            found |= {f"{name} ({context})": value for name, value in answer["scores"].items()}
    except (ValueError, LookupError, TypeError, AttributeError, RecursionError) as error:
        raise DataError(
            f"{where}: is no line of a run ({type(error).__name__}: {error}). Evaluate again."
        ) from error
    if not isinstance(query, str):
        raise DataError(f"{where}: the id {query!r} is not a text. Evaluate again.")
    for measure, value in found.items():
        number = isinstance(value, int | float) and not isinstance(value, bool)
        if not number or not abs(value) < _LARGEST:
            raise DataError(
                f"{where}: question {query!r} has the {measure} {value!r}, which is not a finite "
                "number. Mend what scored it, and evaluate again."
            )
    return query, {measure: float(value) for measure, value in found.items()}


def group_runs(arguments: Sequence[str]) -> list[System]:
    """Read run folders and tell which of them are seeds of one system, in the order given.

    An argument is a run folder, or `NAME=FOLDER,FOLDER,…` or `FOLDER,FOLDER,…` for several seeds
    of one system; a folder whose own path holds `=` or `,` is meant if it exists. Folders given
    alone, and without a name, are one system if their settings are equal but for the seed. Those
    that are equal in the seed, too, are systems of their own: a run beside itself. A system is
    called after its first folder unless it has a name.

    Raises:
        DataError: as `read_run_folder` does.
        SettingsError: an empty name or folder, or folders given alone of which some have the same
            seed and others do not.
    """
    groups: list[tuple[str, list[RunFolder]]] = []
    alone: dict[str, list[RunFolder]] = {}
    for argument in arguments:
        name, folders = _parse(argument)
        runs = [read_run_folder(folder) for folder in folders]
        if not name and len(runs) == 1:
            key = to_json(_without_seed(runs[0].settings))
            if key in alone:
                alone[key] += runs
                continue
            alone[key] = runs
        groups.append((name, runs))
    groups = [part for name, runs in groups for part in _split(name, runs, alone.values())]
    names = {name for name, _ in groups if name}
    systems: list[System] = []
    for name, runs in groups:
        taken = names | {system.name for system in systems}
        systems.append(System(name or _free_name(runs[0].path, taken), tuple(runs)))
    return systems


def _parse(argument: str) -> tuple[str, list[str]]:
    if argument and Path(argument).is_dir():
        return "", [argument]
    name, equals, rest = argument.partition("=")
    folders = (rest if equals else argument).split(",")
    if (equals and not name) or not all(folders):
        raise SettingsError(f"{argument!r}: expected FOLDER, FOLDER,FOLDER or NAME=FOLDER,FOLDER")
    return name if equals else "", folders


def _split(
    name: str, runs: list[RunFolder], alone: Collection[list[RunFolder]]
) -> list[tuple[str, list[RunFolder]]]:
    """Put runs of folders given alone side by side if not even their seeds differ."""
    different = len({to_json(run.settings) for run in runs})
    if different == len(runs) or not any(runs is group for group in alone):
        return [(name, runs)]
    if different == 1:
        return [(name, [run]) for run in runs]
    raise SettingsError(
        f"{', '.join(str(run.path) for run in runs)} have the same settings, and some have the "
        "same seed, too. Say which are one system: NAME=FOLDER,FOLDER"
    )


def _without_seed(settings: dict[str, Any]) -> dict[str, Any]:
    kept = {name: value for name, value in settings.items() if name != "seed"}
    if isinstance(command := kept.get("command"), dict):
        kept["command"] = {name: value for name, value in command.items() if name != "seed"}
    return kept


def _free_name(path: Path, taken: set[str]) -> str:
    names = [path.resolve().name, str(path)]
    names += [f"{path} ({number})" for number in range(2, len(taken) + 3)]
    return next(name for name in names if name and name not in taken)


def check_comparable(systems: Sequence[System], *, other_corpus: bool) -> list[str]:
    """Refuse what cannot be compared, and return what is doubtful about the rest.

    Raises:
        SettingsError: fewer than two systems, one without runs, a name twice, or a run twice
            within a system.
        DataError: runs of different questions or qrels; of different corpora within a system or,
            unless `other_corpus`, at all.
    """
    names = Counter(system.name for system in systems)
    if len(systems) < 2:
        only = f": {systems[0].name!r}, with {len(systems[0].runs)} runs" if systems else ""
        raise SettingsError(
            f"at least 2 systems are needed, not {len(systems)}{only}. Runs that differ in their "
            "seed alone are one system, unless they have names: A=FOLDER B=FOLDER"
        )
    if twice := [name for name, count in names.items() if count > 1]:
        raise SettingsError(f"{sample(twice)} names more than one system: choose another name")
    first, runs = systems[0], [run for system in systems for run in system.runs]
    for system in systems:
        _check_runs(system)
        _check_corpora(system.runs, "Seeds of one system search one corpus.")
    for run in runs:
        _check_questions(first.runs[0], run)
    if not other_corpus:
        mend = "The difference could be theirs. If that is what you ask, pass --other-corpus."
        _check_corpora(runs, mend)
    remarks = [
        f"{system.name} searched another corpus than {first.name}"
        for system in systems[1:]
        if len(_corpora([*first.runs, *system.runs])) > 1
    ]
    if unknown := [str(run.path) for run in runs if "corpus" not in run.hashes]:
        remarks.append(f"which corpus was searched is not known for {sample(unknown)}")
    return remarks


def _check_runs(system: System) -> None:
    if not system.runs:
        raise SettingsError(f"the system {system.name!r} has no runs")
    seen: dict[str, RunFolder] = {}
    for run in system.runs:
        other = seen.setdefault(to_json(run.settings), run)
        if other is not run:
            raise SettingsError(
                f"system {system.name!r}: {other.path} and {run.path} have the same settings and "
                f"the same seed, {run.settings.get('seed')}: they would count twice. Leave one out."
            )


def _check_questions(a: RunFolder, b: RunFolder) -> None:
    in_a, in_b = set(a.questions), set(b.questions)
    if a.hashes["questions"] != b.hashes["questions"] or in_a != in_b:
        only_a = [query for query in a.questions if query not in in_b]
        only_b = [query for query in b.questions if query not in in_a]
        found = (
            f"{len(only_a)} ids are in the first only ({sample(only_a) or 'none'}), {len(only_b)} "
            f"in the second only ({sample(only_b) or 'none'})"
            if only_a or only_b
            else f"their {len(a.questions)} ids are the same, their texts, filters or answers not"
        )
        raise DataError(
            f"{a.path} and {b.path} asked different questions: {found}. Evaluate both with the "
            "same questions."
        )
    if a.hashes["qrels"] != b.hashes["qrels"]:
        raise DataError(
            f"{a.path} and {b.path} were judged by different qrels (hashes {a.hashes['qrels']} and "
            f"{b.hashes['qrels']}). Evaluate both with the same qrels."
        )


def _corpora(runs: Sequence[RunFolder]) -> dict[str, RunFolder]:
    """Return the corpora that are known, by their hashes, each with a run that searched it."""
    found: dict[str, RunFolder] = {}
    for run in runs:
        if "corpus" in run.hashes:
            found.setdefault(run.hashes["corpus"], run)
    return found


def _check_corpora(runs: Sequence[RunFolder], mend: str) -> None:
    found = list(_corpora(runs).items())
    if len(found) > 1:
        (a_hash, a), (b_hash, b) = found[:2]
        raise DataError(
            f"{a.path} and {b.path} searched different corpora (hashes {a_hash} and {b_hash}). "
            f"{mend}"
        )
