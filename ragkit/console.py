"""What the programs share: progress bars, settings files, exit codes."""

from __future__ import annotations

import json
import logging
import os
import signal
import sys
import threading
import tomllib
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from types import FrameType, UnionType
from typing import TYPE_CHECKING, Any, Literal, Union, get_args, get_origin

from .errors import RagkitError, SettingsError
from .types import Progress

if TYPE_CHECKING:
    from cyclopts import App


def print_json(value: Any) -> None:
    """Print a value as JSON on standard output."""
    print(json.dumps(value, ensure_ascii=False, indent=2, default=str))


def print_tables(tables: Sequence[Any]) -> None:
    """Print tables and sentences on standard output, a blank line between them."""
    from rich.console import Console

    Console().print(*tables, sep="\n\n")


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

    A number or a truth value also stands for its spelling, which is what a TSV file's column holds.

    Raises:
        SettingsError: a condition without `=`, a field named twice, or NaN or an infinity.
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
        if isinstance(where[field], int | float):  # tables hold their numbers as strings
            where[field] = [where[field], value]
        try:
            json.dumps(where[field], allow_nan=False)
        except ValueError as error:
            raise SettingsError(
                f"--where {condition!r}: NaN and infinities are no values to filter by; "
                f"a word stands in quotes: {field}='\"…\"'"
            ) from error
    return where


def read_settings(path: Path, kinds: Mapping[str, Any]) -> dict[str, Any]:
    """Read a TOML file of settings; `-` and `_` in names are one.

    Raises:
        SettingsError: the file cannot be read, or as `check_settings` does.
    """
    try:
        with path.open("rb") as handle:
            settings = tomllib.load(handle)
    except OSError as error:
        raise SettingsError(f"{path}: cannot be read ({error.strerror})") from error
    except tomllib.TOMLDecodeError as error:
        raise SettingsError(f"{path}: is not TOML: {error}") from error
    settings = {name.replace("-", "_"): value for name, value in settings.items()}
    check_settings(settings, kinds, f"{path}: ")
    return settings


def check_settings(settings: Mapping[str, Any], kinds: Mapping[str, Any], place: str = "") -> None:
    """Refuse settings of unknown names or of other types than theirs.

    Args:
        settings: values by name.
        kinds: the types by name: of numbers, strings, paths, literals, lists, and unions of such.
        place: put before the message, such as `rag.toml: `.

    Raises:
        SettingsError: a name is unknown, or a value of another type.
    """
    if unknown := sorted(set(settings) - set(kinds)):
        known = ", ".join(sorted(kinds))
        raise SettingsError(f"{place}unknown settings {', '.join(unknown)}; known are {known}")
    for name, value in settings.items():
        if not _fits(value, kinds[name]):
            wanted = " or ".join(_described(kinds[name]))
            raise SettingsError(f"{place}{name} is {value!r}; expected {wanted}")


def _fits(value: Any, kind: Any) -> bool:
    if get_origin(kind) in (Union, UnionType):
        return any(_fits(value, each) for each in get_args(kind))
    if get_origin(kind) is Literal:
        return isinstance(value, str) and value in get_args(kind)
    if get_origin(kind) is list:
        return isinstance(value, list) and all(_fits(item, get_args(kind)[0]) for item in value)
    if isinstance(value, bool):
        return kind is bool
    accepted = {float: (int, float), Path: (str, Path)}.get(kind, kind)
    return isinstance(value, accepted)


def _described(kind: Any) -> Iterator[str]:
    if get_origin(kind) in (Union, UnionType):
        for each in get_args(kind):
            yield from _described(each)
    elif get_origin(kind) is Literal:
        yield f"one of {', '.join(get_args(kind))}"
    elif get_origin(kind) is list:
        yield f"a list, each item {' or '.join(_described(get_args(kind)[0]))}"
    elif kind is not type(None):
        names = {int: "a whole number", float: "a number", bool: "true or false"}
        yield names.get(kind, "a string")


def run(app: App, arguments: Sequence[str] | None = None) -> int:
    """Run a program and return its exit code.

    It is 0 for done, 1 for failed, 2 for bad usage, 130 for interrupted (Ctrl-C), and 143 for
    terminated (SIGTERM). A settings file (`--config FILE`) may hold every option of every command.

    Args:
        app: the commands.
        arguments: the command line; the process's own if None.
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
        with _terminable():
            arguments = _configure(app, arguments)
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
    except KeyboardInterrupt as stop:
        say("interrupted; nothing is left half-written")
        return 128 + (signal.SIGTERM if stop.args == (signal.SIGTERM,) else signal.SIGINT)
    return 0


@contextmanager
def _terminable() -> Iterator[None]:
    """Have SIGTERM clean up as Ctrl-C does, unless someone else has taken it."""

    def stop(number: int, frame: FrameType | None) -> None:
        raise KeyboardInterrupt(number)

    main = threading.current_thread() is threading.main_thread()
    if not main or signal.getsignal(signal.SIGTERM) is not signal.SIG_DFL:
        yield
        return
    signal.signal(signal.SIGTERM, stop)
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, signal.SIG_DFL)


def _options(app: App) -> dict[str, Any]:
    """Return the types of all options of an app's commands, by name."""
    kinds: dict[str, Any] = {}
    for command in app:
        if command.startswith("-"):  # --help and --version
            continue
        for argument in app[command].assemble_argument_collection():
            for option in set(argument.names) - set(argument.negatives):
                if option.startswith("--"):
                    name = option.removeprefix("--").replace("-", "_")
                    kinds[name] = kinds.get(name, argument.hint) | argument.hint
    return kinds


def _configure(app: App, arguments: list[str]) -> list[str]:
    """Take `--config FILE` off the command line and make its settings the app's defaults."""
    from cyclopts.config import Dict

    app.config = ()
    app.suppress_keyboard_interrupt = False  # `run` tells of it
    for place, argument in enumerate(arguments):
        name, equals, value = argument.partition("=")
        if name != "--config":
            continue
        if not equals and place + 1 == len(arguments):
            raise SettingsError("--config needs a file")
        path = Path(value if equals else arguments[place + 1])
        app.config = Dict(
            read_settings(path, _options(app)),
            source=str(path),
            allow_unknown=True,  # known to the program, if not to each of its commands
            use_commands_as_keys=False,
        )
        return arguments[:place] + arguments[place + (1 if equals else 2) :]
    return arguments
