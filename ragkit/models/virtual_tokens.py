"""Virtual tokens: learnt embeddings that stand between a prompt's context and its question.

Zhu et al. 2025, "One Token Can Help! Learning Scalable and Pluggable Virtual Tokens for
Retrieval-Augmented Large Language Models" (SPRING), arXiv 2405.19670.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Self, get_args

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file

from .. import __version__
from ..artefacts import fingerprint, read_json, write_json
from ..errors import DataError, ModelError, SettingsError
from ..styles import SPRING_INSTRUCTION, Placement, PromptStyle, style_from

FORMAT = 1
MANIFEST = "manifest.json"
WEIGHTS = "tokens.safetensors"


@dataclass(frozen=True, slots=True, eq=False)
class VirtualTokens:
    """Embeddings in the order in which they are used: any k of them are the first k.

    Attributes:
        embeddings: float32 of shape [count, size].
        base: the name of the model that they were learnt on.
        base_hash: that model's `Generator.base_hash`.
        layout: `chat` or `plain`.
        placement: where they stand.
        style: the prompt's wording that they were learnt with.
        template_hash: the `template_hash` of their style and chat template.
    """

    embeddings: torch.Tensor
    base: str
    base_hash: str
    layout: str
    placement: Placement
    style: PromptStyle
    template_hash: str

    def __len__(self) -> int:
        return int(self.embeddings.shape[0])

    def first(self, count: int) -> Self:
        """Return the first `count` tokens.

        Raises:
            SettingsError: there are fewer.
        """
        if not 0 <= count <= len(self):
            raise SettingsError(
                f"{count} virtual tokens are asked for, and these are {len(self)}: use 0 "
                f"(unplugged) to {len(self)}"
            )
        return replace(self, embeddings=self.embeddings[:count])

    def check(self, base_hash: str, chat: bool, chat_template: str | None, name: str) -> None:
        """Refuse to be read by another model, in another layout, or by another chat template.

        Raises:
            ModelError: telling what differs.
        """
        layout = "chat" if chat else "plain"
        if self.base_hash != base_hash:
            raise ModelError(
                f"these virtual tokens were learnt on {self.base!r} (weights "
                f"{self.base_hash[:12]}…), and {name!r} has other weights ({base_hash[:12]}…). "
                "Load the base that they were learnt on, or train tokens for this one."
            )
        if self.layout != layout:
            raise ModelError(
                f"these virtual tokens were learnt in the {self.layout} layout; {layout} was asked"
            )
        if self.template_hash != template_hash(self.style, chat_template if chat else None):
            raise ModelError(
                f"these virtual tokens were learnt with another chat template than {name!r} has"
            )

    def save(self, folder: Path) -> None:
        """Write tokens.safetensors and manifest.json into a folder that exists."""
        save_file({"tokens": self.embeddings.detach().cpu().contiguous()}, folder / WEIGHTS)
        (folder / WEIGHTS).chmod(0o644)
        write_json(
            folder / MANIFEST,
            {
                "format": FORMAT,
                "kind": "virtual tokens",
                "ragkit": __version__,
                "base": self.base,
                "base_hash": self.base_hash,
                "count": len(self),
                "size": int(self.embeddings.shape[1]),
                "layout": self.layout,
                "placement": self.placement,
                "style": self.style.to_json(),
                "template_hash": self.template_hash,
            },
        )

    @classmethod
    def load(cls, folder: str | Path) -> Self:
        """Read a folder that `save` wrote.

        Raises:
            ModelError: it is none, or of another format.
        """
        folder = Path(folder).expanduser()
        if not folder.is_dir():
            raise ModelError(f"{folder}: there is no such folder of virtual tokens")
        try:
            manifest = read_json(folder / MANIFEST)
            if manifest.get("kind") != "virtual tokens":
                raise ModelError(f"{folder} holds no virtual tokens (see its {MANIFEST})")
            if manifest["format"] != FORMAT:
                raise ModelError(
                    f"{folder} holds virtual tokens of format {manifest['format']}; this ragkit "
                    f"({__version__}) reads format {FORMAT}"
                )
            embeddings = _read_rows(folder / WEIGHTS)
            shape = manifest["count"], manifest["size"]
            if manifest["placement"] not in get_args(Placement):
                raise ModelError(
                    f"{folder}: unknown placement {manifest['placement']!r}; expected "
                    f"{', '.join(get_args(Placement))}"
                )
            tokens = cls(
                embeddings,
                **{name: manifest[name] for name in ("base", "base_hash", "layout", "placement")},
                style=style_from(manifest["style"]),
                template_hash=manifest["template_hash"],
            )
        except KeyError as error:
            raise ModelError(f"{folder / MANIFEST} does not tell {error}") from error
        except (DataError, SettingsError, OSError, SafetensorError, TypeError) as error:
            raise ModelError(f"{folder}: no virtual tokens can be read here: {error}") from error
        if tuple(embeddings.shape) != shape:
            raise ModelError(
                f"{folder}: {WEIGHTS} holds {tuple(embeddings.shape)} values, the manifest says "
                f"{shape}"
            )
        return tokens

    def to_json(self) -> dict[str, Any]:
        """Return what tells these tokens apart, as JSON values."""
        rows = self.embeddings.detach().cpu().contiguous().numpy().tobytes()
        return {"base": self.base, "count": len(self), "hash": fingerprint(rows.hex())}


def _read_rows(path: Path) -> torch.Tensor:
    with safe_open(path, framework="pt") as file:
        rows: torch.Tensor = file.get_tensor("tokens")
    return checked_rows(rows, str(path))


def checked_rows(rows: Any, place: str) -> torch.Tensor:
    """Return embeddings as float32 of shape [count, size].

    Raises:
        ModelError: they are none, or not finite.
    """
    if not isinstance(rows, torch.Tensor) or rows.ndim != 2 or not rows.numel():
        shape = tuple(rows.shape) if isinstance(rows, torch.Tensor) else type(rows).__name__
        raise ModelError(f"{place}: expected a tensor of shape [count, size], found {shape}")
    if not rows.isfinite().all():
        raise ModelError(f"{place}: holds values that are not finite")
    return rows.detach().float().contiguous()


def read_tensor_file(path: Path) -> torch.Tensor:
    """Read the `[count, size]` tensor that SPRING's authors save as `.pt`; nothing in it is run.

    Raises:
        ModelError: the file is missing or holds anything but such a tensor.
    """
    try:
        rows = torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:  # whatever a hostile file makes torch raise
        raise ModelError(f"{path}: no tensor can be read here: {error}") from error
    if isinstance(rows, Mapping) and len(rows) == 1:
        rows = next(iter(rows.values()))
    if isinstance(rows, torch.nn.Parameter):
        rows = rows.data
    return checked_rows(rows, str(path))


@torch.no_grad()
def start_rows(model: Any, tokenizer: Any, count: int) -> torch.Tensor:
    """Return the rows that virtual tokens start from, float32 of shape [count, size].

    They are the embeddings of `SPRING_INSTRUCTION`, repeated and cut, as Zhu et al. 2025 do.

    Raises:
        SettingsError: `count` is below 1.
    """
    if count < 1:
        raise SettingsError(f"virtual tokens must be at least 1, not {count}")
    ids = tokenizer.encode(SPRING_INSTRUCTION, add_special_tokens=False)
    repeated = (ids * (count // len(ids) + 1))[:count]
    ids = torch.tensor([repeated], device=model.device)
    rows: torch.Tensor = model.get_input_embeddings()(ids)
    return rows[0].float().cpu().clone()


def template_hash(style: PromptStyle, chat_template: str | None) -> str:
    """Return the hash of a wording and of the chat template that renders it (None: plain)."""
    return fingerprint({"style": style.to_json(), "chat_template": chat_template})
