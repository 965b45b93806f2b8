"""What every training program does with its settings, its device and the state of its run."""

from __future__ import annotations

import os
import shutil
from collections.abc import Iterator, Set
from contextlib import contextmanager
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ragkit.artefacts import read_json, write_json
from ragkit.errors import SettingsError

if TYPE_CHECKING:
    import torch

_FREE = {"replace", "device", "report_to", "seeds", "output"}  # settings that change no result


def json_values(settings: Any) -> dict[str, Any]:
    """Return a dataclass of settings as JSON values."""
    return {n: str(v) if isinstance(v, Path) else v for n, v in asdict(settings).items()}


def whole_numbers(text: str, option: str) -> list[int]:
    """Read whole numbers such as 0,1,2.

    Raises:
        SettingsError: `text` holds something else, or a number twice.
    """
    try:
        numbers = [int(number) for number in text.split(",")]
    except ValueError:
        raise SettingsError(f"{option} {text!r}: expected whole numbers, such as 0,1,2") from None
    if len(set(numbers)) < len(numbers) or min(numbers) < 0:
        raise SettingsError(f"{option} {text!r}: expected different numbers from 0 up")
    return numbers


@contextmanager
def training_state(output: Path) -> Iterator[Path]:
    """Yield the folder where a run's state is kept, from which it goes on if it is stopped.

    At an error it is removed if nothing has been learnt yet; the program removes it when the run's
    output is written.
    """
    state = output.with_name(f"{output.name}.training")
    try:
        yield state
    except BaseException:
        first = os.environ.get("RANK", "0") == "0"  # of the processes that torchrun starts
        if first and not any(state.glob("*/*.safetensors")):
            shutil.rmtree(state, ignore_errors=True)
        raise


def check_state(
    folder: Path, settings: dict[str, Any], data: dict[str, Any], free: Set[str] = frozenset()
) -> None:
    """Refuse to go on from a run of other settings or data, and note what this one is of.

    Args:
        folder: where the state is kept.
        settings: as JSON values.
        data: hashes of what is read.
        free: settings that may differ, beside those that do in every program.

    Raises:
        SettingsError: telling which setting differs.
    """
    made = {name: value for name, value in settings.items() if name not in free | _FREE}
    made |= {"data": data}
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


def own_device(name: str | None) -> torch.device:
    """Return where this process's model goes: each has a GPU of its own, where there are some."""
    import torch

    from ragkit.models.precision import check_device
    from ragkit.training.keeper import processes

    device = torch.device(check_device(name))
    state = processes(device)
    return torch.device(state.device) if state.num_processes > 1 else device
