"""What the programs share: progress bars, settings files, exit codes."""

from __future__ import annotations

import json
import logging
import os
import sys
import tomllib
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

from .errors import RagkitError, SettingsError
from .types import Progress

if TYPE_CHECKING:
    from cyclopts import App


def print_json(value: Any) -> None:
    """Print a value as JSON on standard output."""
    print(json.dumps(value, ensure_ascii=False, indent=2, default=str))


def say(message: str) -> None:
    """Print a message for people on standard error."""
    print(message, file=sys.stderr, flush=True)


@contextmanager
def progress_bars() -> Iterator[Progress]:
    """Yield a `Progress` that draws a bar for each stage; it is silent when not on a terminal."""
    if not sys.stderr.isatty():
        yield lambda stage, done, total: None
        return
    from rich import progress
    from rich.console import Console

    columns = (
        progress.TextColumn("{task.description:<16}"),
        progress.BarColumn(),
        progress.MofNCompleteColumn(),
        progress.TimeElapsedColumn(),
        progress.TimeRemainingColumn(),
    )
    with progress.Progress(*columns, console=Console(stderr=True)) as bars:
        tasks: dict[str, progress.TaskID] = {}

        def report(stage: str, done: int, total: int | None) -> None:
            if stage not in tasks:
                tasks[stage] = bars.add_task(stage, total=total)
            bars.update(tasks[stage], completed=done, total=total)

        yield report


def parse_where(conditions: Sequence[str]) -> dict[str, Any]:
    """Turn `field=value` conditions into a filter; a value is read as JSON where it is JSON.

    Raises:
        SettingsError: a condition without `=`, or a field named twice.
    """
    where: dict[str, Any] = {}
    for condition in conditions:
        field, equals, value = condition.partition("=")
        if not equals or not field:
            raise SettingsError(f"--where {condition!r}: expected FIELD=VALUE")
        if field in where:
            raise SettingsError(f"--where names {field!r} twice; for one of several: {field}='[…]'")
        try:
            where[field] = json.loads(value)
        except ValueError:
            where[field] = value
    return where


def read_settings(path: Path, known: Sequence[str]) -> dict[str, Any]:
    """Read a TOML file of settings; `-` and `_` in names are one.

    Raises:
        SettingsError: the file cannot be read, or names something unknown.
    """
    try:
        with path.open("rb") as handle:
            settings = tomllib.load(handle)
    except OSError as error:
        raise SettingsError(f"{path}: cannot be read ({error.strerror})") from error
    except tomllib.TOMLDecodeError as error:
        raise SettingsError(f"{path}: is not TOML: {error}") from error
    settings = {name.replace("-", "_"): value for name, value in settings.items()}
    if unknown := sorted(set(settings) - set(known)):
        raise SettingsError(
            f"{path}: unknown settings {', '.join(unknown)}; known are {', '.join(sorted(known))}"
        )
    return settings


def run(app: App, arguments: Sequence[str] | None = None, known: Sequence[str] = ()) -> int:
    """Run a program and return its exit code: 0 done, 1 failed, 2 bad usage, 130 interrupted.

    Args:
        app: the commands.
        arguments: the command line; the process's own if None.
        known: the names that a settings file (`--config FILE`) may hold.
    """
    from cyclopts import CycloptsError

    arguments = list(sys.argv[1:] if arguments is None else arguments)
    logging.basicConfig(level=logging.WARNING, format="%(message)s", stream=sys.stderr)
    logging.getLogger("ragkit").setLevel(logging.INFO)
    logging.getLogger("pypdf").setLevel(logging.CRITICAL)  # what it means is in our own message
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "true")
    # The libraries' own bars would draw across ours.
    os.environ.setdefault("HF_HUB_DISABLE_PROGRESS_BARS", "1")
    try:
        arguments = _configure(app, arguments, known)
        app(arguments, exit_on_error=False, print_error=False, result_action="return_value")
    except (SettingsError, CycloptsError) as error:
        say(f"error: {error}")
        return 2
    except RagkitError as error:
        say(f"error: {error}")
        return 1
    except BrokenPipeError:  # the reader of our output went away, as `| head` does
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 0
    except OSError as error:
        say(f"error: {error.filename or ''}: {error.strerror or error}")
        return 1
    except KeyboardInterrupt:
        say("interrupted; nothing is left half-written")
        return 130
    return 0


def _configure(app: App, arguments: list[str], known: Sequence[str]) -> list[str]:
    """Take `--config FILE` off the command line and make its settings the app's defaults."""
    from cyclopts.config import Dict

    app.config = ()
    for place, argument in enumerate(arguments):
        name, equals, value = argument.partition("=")
        if name != "--config":
            continue
        if not equals and place + 1 == len(arguments):
            raise SettingsError("--config needs a file")
        path = Path(value if equals else arguments[place + 1])
        app.config = Dict(
            read_settings(path, known),
            source=str(path),
            allow_unknown=True,  # known to the program, if not to each of its commands
            use_commands_as_keys=False,
        )
        return arguments[:place] + arguments[place + (1 if equals else 2) :]
    return arguments
