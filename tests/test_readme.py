"""README's snippets and commands run as they stand there, in one folder, in their order."""

from __future__ import annotations

import re
import shlex
import subprocess
import sys
from pathlib import Path

import pytest

from ragkit.__main__ import run_app

ROOT = Path(__file__).parent.parent
README = (ROOT / "README.md").read_text(encoding="utf-8")


def _blocks(language: str) -> list[str]:
    return re.findall(rf"^```{language}\n(.*?)^```", README, re.MULTILINE | re.DOTALL)


def test_readme_opens_with_the_two_commands() -> None:
    first = _blocks("bash")[0]
    assert [line.split("#")[0].strip() for line in first.strip().splitlines()] == [
        "make demo",
        "make test",
    ]


def test_python_snippets_run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    names: dict[str, object] = {}
    for snippet in _blocks("python"):
        exec(compile(snippet, "README.md", "exec"), names)


def test_commands_run(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    from ragkit.indexers.__main__ import app as indexers
    from ragkit.trainers.__main__ import app as trainers

    from ragkit.console import run

    monkeypatch.chdir(tmp_path)
    (tmp_path / "benchmarks").symlink_to(ROOT / "benchmarks")
    lines = [line for line in _blocks("bash")[1].splitlines() if line]
    assert len(lines) == 25
    apps = {"ragkit-index": indexers, "ragkit-train": trainers}
    for line in lines:
        program, *arguments = shlex.split(line)
        code = run_app(arguments) if program == "ragkit" else run(apps[program], arguments)
        out = capsys.readouterr()
        assert code == 0, f"{line}: {out.err}"
        assert out.out.strip(), line
    assert (tmp_path / "runs" / "hybrid" / "report.html").is_file()


def test_tables_are_those_of_the_results() -> None:
    script = ROOT / "benchmarks" / "table.py"
    done = subprocess.run(
        [sys.executable, str(script), "--check"], capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr


def test_settings_file_is_one_that_the_commands_read(tmp_path: Path) -> None:
    from typing import get_type_hints

    from ragkit.assemble import PipelineSettings
    from ragkit.console import read_settings

    file = tmp_path / "rag.toml"
    file.write_text(_blocks("toml")[0], encoding="utf-8")
    settings = read_settings(file, get_type_hints(PipelineSettings))
    assert PipelineSettings(**settings).keep == 3
