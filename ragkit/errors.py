"""Every error that ragkit raises on purpose.

    RagkitError
    ├── DataError        a record, file or question that cannot be used (also a ValueError)
    ├── SettingsError    an option or argument that cannot be used (also a ValueError)
    ├── IndexStateError  an index folder that is missing, damaged, or does not fit its encoder
    ├── ModelError       a model that cannot be found, loaded, or fitted to its prompt
    └── MissingExtra     an optional dependency that is not installed (also an ImportError)

A message holds what was seen, where, and the mend. Programs print it without a traceback and exit
with 1 (2 for `SettingsError`).
"""

from __future__ import annotations

_LINE = 1_000  # characters of a line of a message: what is quoted can be of any length


class RagkitError(Exception):
    """Base of all errors that ragkit raises on purpose.

    Of a line of the message that is longer than 1,000 characters the middle is left out.
    """

    def __init__(self, message: object = "") -> None:
        super().__init__("\n".join(map(_shortened, str(message).split("\n"))))


def _shortened(line: str) -> str:
    return line if len(line) <= _LINE else f"{line[: _LINE // 2]} … {line[-_LINE // 4 :]}"


class DataError(RagkitError, ValueError):
    """A record, file or question that cannot be used."""


class SettingsError(RagkitError, ValueError):
    """An option or argument that cannot be used."""


class IndexStateError(RagkitError):
    """An index folder that is missing, damaged, or does not fit what it is used with."""


class ModelError(RagkitError):
    """A model that cannot be found, loaded, or fitted to its prompt."""


class MissingExtra(RagkitError, ImportError):
    """An optional dependency that is not installed."""

    def __init__(self, package: str, extra: str, purpose: str) -> None:
        super().__init__(
            f"{purpose} needs the package {package!r}, which is not installed. "
            f"Install it with: pip install 'ragkit[{extra}]'"
        )
