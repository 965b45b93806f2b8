"""The prompt that a generator was trained with: kept beside its weights, checked at loading."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Literal, Self

import torch

from .. import __version__
from ..artefacts import read_json, write_json
from ..errors import DataError, ModelError, SettingsError
from ..styles import PromptStyle, style_from
from .names import resolve
from .precision import weights_hash
from .virtual_tokens import template_hash

FORMAT = 1
FILE = "ragkit.json"


@dataclass(frozen=True, slots=True)
class Taught:
    """The prompt that a generator was trained with, and the base that it was made of.

    Attributes:
        base: the base's name.
        base_hash: its `Generator.base_hash`.
        layout: `chat` or `plain`.
        style: the prompt's wording.
        template_hash: the `template_hash` of style and chat template.
    """

    base: str
    base_hash: str
    layout: Literal["chat", "plain"]
    style: PromptStyle
    template_hash: str

    @classmethod
    def of(cls, generator: Any, style: PromptStyle) -> Self:
        """Return what a `Generator` that is trained with a wording is taught."""
        chat = generator.encoder.chat
        template = generator.tokenizer.chat_template if chat else None
        layout: Any = "chat" if chat else "plain"
        hashed = template_hash(style, template)
        return cls(generator.name, generator.base_hash(), layout, style, hashed)

    def check(self, chat: bool, chat_template: str | None, name: str) -> None:
        """Refuse another layout or chat template than was trained with.

        Raises:
            ModelError: telling what differs.
        """
        layout = "chat" if chat else "plain"
        if self.layout != layout:
            raise ModelError(
                f"generator {name!r} was trained in the {self.layout} layout; {layout} was asked"
            )
        if self.template_hash != template_hash(self.style, chat_template if chat else None):
            raise ModelError(
                f"generator {name!r} was trained with another chat template than it has now"
            )

    def save(self, folder: Path) -> None:
        """Write ragkit.json into a folder that exists."""
        head = {"format": FORMAT, "kind": "trained generator", "ragkit": __version__}
        write_json(folder / FILE, head | asdict(self))

    @classmethod
    def load(cls, folder: Path) -> Self | None:
        """Read what `save` wrote; None where there is no such file.

        Raises:
            ModelError: it is damaged, or of another format.
        """
        path = folder / FILE
        if not path.is_file():
            return None
        try:
            found = read_json(path)
            if found["format"] != FORMAT:
                raise ModelError(
                    f"{path} is of format {found['format']}; this ragkit ({__version__}) reads "
                    f"format {FORMAT}"
                )
            names = ("base", "base_hash", "layout", "template_hash")
            if wrong := [name for name in names if not isinstance(found[name], str)]:
                raise TypeError(f"{wrong[0]} is no text")
            return cls(style=style_from(found["style"]), **{name: found[name] for name in names})
        except (DataError, SettingsError, KeyError, TypeError) as error:
            raise ModelError(f"{path} cannot be read: {error}") from error


def taught_of(name: str, model: Any) -> Taught | None:
    """Return what the generator of a name was taught, if ragkit has trained it.

    Args:
        name: a folder, or any other name that `load_causal` takes.
        model: what that has loaded.

    Raises:
        ModelError: it is an adapter, and the base that it was loaded with has other weights than
            the one that it was learnt on.
    """
    path = resolve(name)
    found = Taught.load(Path(path))
    if found is None or not (Path(path) / "adapter_config.json").is_file():
        return found
    base = {
        name.replace(".base_layer.", "."): tensor
        for name, tensor in model.state_dict().items()
        if ".lora_" not in name
    }
    if (hashed := weights_hash(base, torch.bfloat16)) != found.base_hash:
        raise ModelError(
            f"the adapter {name!r} was learnt on {found.base!r} with weights "
            f"{found.base_hash[:12]}…; the base that is there has others ({hashed[:12]}…)"
        )
    return found
