"""What the benchmarks share: the data folder, the machine, timing side by side, results as JSON."""

from __future__ import annotations

import datetime
import os
import platform
import statistics
import subprocess
import sys
import time
from collections.abc import Callable
from importlib.metadata import version
from pathlib import Path
from typing import Any

from ragkit.artefacts import read_json, write_json

ROOT = Path(__file__).parent.parent
RESULTS = ROOT / "benchmarks" / "results"
PACKAGES = (
    "ragkit", "torch", "transformers", "sentence-transformers", "faiss-cpu", "bm25s", "tantivy"
)  # fmt: skip


def data_folder() -> Path:
    """Return the shared data's folder, or end with a message where it is absent."""
    folder = Path(os.environ.get("RAGKIT_DATA") or ROOT.parent / "shared" / "data")
    if not folder.is_dir():
        sys.exit("the shared benchmark data is not here; set RAGKIT_DATA to its folder")
    return folder


def side_by_side(
    candidates: dict[str, Callable[[], Any]], rounds: int = 5
) -> dict[str, list[float]]:
    """Time candidates in turn (A B A B …) after one warm-up each; return seconds a round."""
    for run in candidates.values():
        run()
    seconds: dict[str, list[float]] = {name: [] for name in candidates}
    for _ in range(rounds):
        for name, run in candidates.items():
            started = time.perf_counter()
            run()
            seconds[name].append(time.perf_counter() - started)
    return seconds


def ratio(seconds: dict[str, list[float]], ours: str, peer: str) -> float:
    """Return how many times faster ours is than the peer, by medians."""
    return statistics.median(seconds[peer]) / statistics.median(seconds[ours])


def same_settings(folder: Path, used: dict[str, Any]) -> None:
    """Note in a folder by which settings it is filled, or end where those that are there differ."""
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / "settings.json"
    if path.exists() and read_json(path) != used:
        sys.exit(f"{path} tells of other settings: give the same, or another --work")
    write_json(path, used)


def save(name: str, rows: Any, settings: dict[str, Any]) -> None:
    """Write a part's rows, `BENCHMARK/PART`, with the machine, the versions and the commit.

    Each part has a file of its own, so that one can be measured again alone.
    """
    commit = subprocess.run(
        ["git", "rev-parse", "--short", "HEAD"],
        cwd=ROOT,
        capture_output=True,
        text=True,
        check=False,
    ).stdout.strip()
    path = RESULTS / f"{name}.json"
    path.parent.mkdir(parents=True, exist_ok=True)
    write_json(
        path,
        {
            "date": datetime.date.today().isoformat(),
            "machine": {"processor": _processor(), "cores": os.cpu_count()},
            "python": platform.python_version(),
            "versions": {package: version(package) for package in PACKAGES},
            "commit": commit,
            "settings": settings,
            "rows": rows,
        },
    )


def _processor() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines()
    except OSError:
        return platform.processor()
    flags = next((line for line in lines if line.startswith("flags")), "").split()
    name = next((line.split(":")[1].strip() for line in lines if line.startswith("model name")), "")
    return " ".join([name, *(flag for flag in ("avx512_bf16", "amx_bf16") if flag in flags)])
