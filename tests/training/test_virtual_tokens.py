"""`ragkit-train virtual-tokens`, from files to files, mostly with a tiny model."""

import json
import shutil
from collections import Counter

import pytest
import torch
from ragkit.trainers.__main__ import app
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM

from ragkit import Document, Index
from ragkit.console import run
from ragkit.errors import ModelError, SettingsError
from ragkit.models import Generator
from ragkit.models.virtual_tokens import VirtualTokens, read_tensor_file, start_rows
from ragkit.styles import SPRING_INSTRUCTION, style_named
from ragkit.training.draws import Draws

METALS = ["tin", "lead", "zinc", "iron", "gold", "copper", "nickel", "silver", "cobalt", "barium"]


@pytest.fixture
def place(tmp_path, monkeypatch):
    monkeypatch.setenv("RAGKIT_CACHE", str(tmp_path / "cache"))
    monkeypatch.chdir(tmp_path)
    documents = [
        Document(metal, f"{metal.title()} melts at {90 + 7 * i}.") for i, metal in enumerate(METALS)
    ]
    Index.build("kb", documents, stores=["bm25"])
    lines = [
        {"id": metal, "text": f"When does {metal} melt?", "answers": [str(90 + 7 * i)]}
        for i, metal in enumerate(METALS)
    ]
    (tmp_path / "questions.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    return tmp_path


def train(base, *options, questions="questions.jsonl", index=("--index", "kb")):
    command = ["virtual-tokens", "--questions", questions, "--output", "out", "--base", str(base)]
    defaults = {
        "--tokens": "6", "--steps": "4", "--batch": "4", "--dev-limit": "3", "--passages": "1-2",
        "--evaluate-every": "2", "--max-new-tokens": "4", "--device": "cpu",
    }  # fmt: skip
    given = {o.split("=")[0] for o in options}
    command += [f"{name}={value}" for name, value in defaults.items() if name not in given]
    return run(app, [*command, *index, *options])


def test_it_writes_tokens_results_and_a_card(place, tiny_folder, capsys):
    assert train(tiny_folder, "--seeds=0,1", "--token-counts=1", "--json") == 0
    results = json.loads(capsys.readouterr().out)
    out = place / "out"
    tokens = VirtualTokens.load(out)
    assert len(tokens) == 6 and tokens.layout == "chat" and tokens.placement == "middle"
    assert sorted(path.name for path in out.iterdir()) == [
        "README.md", "manifest.json", "results.json", "seeds", "tokens.safetensors",
    ]  # fmt: skip
    seeds = [load_file(out / "seeds" / str(seed) / "tokens.safetensors") for seed in (0, 1)]
    assert not torch.equal(seeds[0]["tokens"], seeds[1]["tokens"])
    assert results["base"]["unchanged"]
    assert list(results["conditions"]) == ["prompt only", "unplugged", "1 token", "virtual tokens"]
    assert set(results["conditions"]["virtual tokens"]["EM"]) >= {"mean", "low", "high", "n"}
    assert results["data"]["train"] + results["data"]["dev"] == 10
    assert not (place / "out.training").exists()
    assert "6 virtual tokens" in (out / "README.md").read_text()


def test_the_same_seed_gives_the_same_tokens(place, tiny_folder):
    assert train(tiny_folder) == 0
    first = load_file(place / "out" / "tokens.safetensors")["tokens"]
    assert train(tiny_folder, "--replace", "--prefix-cache=0", "--micro-batch=2") == 0
    again = load_file(place / "out" / "tokens.safetensors")["tokens"]
    torch.testing.assert_close(first, again, atol=1e-5, rtol=0)
    assert train(tiny_folder, "--replace", "--gradient-checkpointing") == 0
    again = load_file(place / "out" / "tokens.safetensors")["tokens"]
    torch.testing.assert_close(first, again, atol=1e-5, rtol=0)


def test_a_stopped_run_goes_on(place, tiny_folder, monkeypatch, capsys):
    from ragkit.training import keeper

    assert train(tiny_folder) == 0
    expected = load_file(place / "out" / "tokens.safetensors")["tokens"]
    write = keeper.Keeper._write

    def stop(self):
        write(self)
        raise KeyboardInterrupt

    monkeypatch.setattr(keeper.Keeper, "_write", stop)
    assert train(tiny_folder, "--replace") == 130
    assert "out.training holds what was learnt so far" in capsys.readouterr().err
    assert torch.equal(load_file(place / "out" / "tokens.safetensors")["tokens"], expected)
    monkeypatch.undo()
    monkeypatch.setenv("RAGKIT_CACHE", str(place / "cache"))
    monkeypatch.chdir(place)
    assert train(tiny_folder, "--replace", "--learning-rate=0.1") == 2
    assert "learning_rate" in capsys.readouterr().err
    assert train(tiny_folder, "--replace") == 0
    found = load_file(place / "out" / "tokens.safetensors")["tokens"]
    torch.testing.assert_close(found, expected, atol=1e-6, rtol=0)


@pytest.mark.parametrize("placement", ["front", "last", "prompt-tuning"])
def test_baselines_are_options(place, tiny_folder, placement):
    assert train(tiny_folder, f"--placement={placement}", "--fixed") == 0
    tokens = VirtualTokens.load(place / "out")
    assert tokens.placement == ("start" if placement == "prompt-tuning" else placement)
    generator = Generator.load(str(tiny_folder), device="cpu", virtual_tokens=tokens)
    assert generator.virtual_tokens is tokens


def test_springs_files_need_no_index(place, tiny_folder):
    lines = [
        {"question": f"When does {m} melt?", "target": str(i), "ret_passages": [f"{m} at {i}."] * 2}
        for i, m in enumerate(METALS)
    ]
    (place / "spring.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    assert (
        train(
            tiny_folder,
            questions="spring.jsonl",
            index=(),
        )
        == 0
    )
    assert train(tiny_folder, "--replace", "--passages=0") == 0  # no passages at all


def test_what_cannot_be_is_told_and_leaves_nothing(place, tiny_folder, capsys):
    def refused(code, told, *options, **other):
        assert train(tiny_folder, *options, **other) == code
        assert told in capsys.readouterr().err
        assert not (place / "out").exists()

    (place / "bare.jsonl").write_text('{"id": "1", "text": "Why?"}\n')
    refused(1, "has an answer to learn", questions="bare.jsonl")
    refused(2, "pass --index", index=())
    refused(2, "--passages '3-1'", "--passages=3-1")
    refused(2, "--seeds '0,0'", "--seeds=0,0")
    refused(1, "trained on too", "--dev-questions=questions.jsonl")
    (place / "long.jsonl").write_text(
        "".join(
            json.dumps({"id": m, "text": f"{m}?", "answers": ["tin " * 600]}) + "\n" for m in METALS
        )
    )
    refused(1, "do not fit into", questions="long.jsonl")
    refused(2, "leave no room for a prompt", "--tokens=4000")
    refused(2, "at least 1, not 0", "--tokens=0")
    refused(2, "7 virtual tokens; 6 are", "--token-counts=1,7")
    refused(2, "--dev-limit must be at least 2", "--dev-limit=-1")
    refused(2, "--steps must be at least 1", "--steps=0")
    refused(2, "--prefix-cache nan", "--prefix-cache=nan")
    refused(2, "multiple of", "--batch=5", "--micro-batch=2")
    assert train("./nowhere") == 1 and "there is no such folder" in capsys.readouterr().err


def test_a_base_that_moved_is_told(place, tiny_folder, monkeypatch, capsys):
    from ragkit.training.token_runs import TokenRun

    learn = TokenRun.learn

    def damaged(self, *given, **named):
        with torch.no_grad():
            self.generator.model.model.norm.weight[0] += 1e-4
        return learn(self, *given, **named)

    monkeypatch.setattr(TokenRun, "learn", damaged)
    assert train(tiny_folder, "--json") == 0
    assert json.loads(capsys.readouterr().out)["base"]["unchanged"] is False


def test_a_run_goes_on_with_the_same_base_and_passages_alone(
    place, tiny_folder, tmp_path, monkeypatch, capsys
):
    from ragkit.training import keeper

    def stop(self):
        write(self)
        raise KeyboardInterrupt

    base = tmp_path / "copy"
    shutil.copytree(tiny_folder, base)
    write = keeper.Keeper._write
    with monkeypatch.context() as patch:
        patch.setattr(keeper.Keeper, "_write", stop)
        assert train(base) == 130
    model = AutoModelForCausalLM.from_pretrained(base)
    with torch.no_grad():
        model.model.norm.weight[0] += 1
    model.save_pretrained(base)
    assert train(base) == 2
    assert "other data" in capsys.readouterr().err
    shutil.rmtree(base)
    shutil.copytree(tiny_folder, base)
    Index.build("kb", [Document("x", "Iron melts.")], stores=["bm25"], replace=True)
    assert train(base) == 2
    assert train(base, "--report-to=") == 2


def test_tokens_are_learnt_on_a_lora_and_in_other_ways(place, tiny_folder, tmp_path):
    from peft import LoraConfig, get_peft_model

    model = AutoModelForCausalLM.from_pretrained(tiny_folder)
    tuned = get_peft_model(
        model, LoraConfig(r=2, target_modules=["q_proj"], init_lora_weights=False)
    )
    tuned.save_pretrained(tmp_path / "lora")
    config = tmp_path / "lora" / "adapter_config.json"
    values = json.loads(config.read_text()) | {"base_model_name_or_path": str(tiny_folder)}
    config.write_text(json.dumps(values))
    assert train(tmp_path / "lora", f"--prefix-cache-folder={tmp_path}", "--shuffle") == 0
    assert not list(tmp_path.glob("prefixes.*"))
    plugged = Generator.load(str(tmp_path / "lora"), device="cpu", virtual_tokens=place / "out")
    assert any("lora" in name for name, _ in plugged.model.named_parameters())
    with pytest.raises(ModelError, match="other weights"):
        Generator.load(str(tiny_folder), device="cpu", virtual_tokens=place / "out")
    assert train(tiny_folder, "--replace", "--precision=bf16", "--objective=batch") == 0


def test_a_tokenizer_without_a_template_has_no_chat_layout(place, tiny_folder, tmp_path, capsys):
    bare = tmp_path / "bare"
    shutil.copytree(tiny_folder, bare)
    (bare / "chat_template.jinja").unlink()
    assert train(bare, "--layout=chat") == 1
    assert "no chat template" in capsys.readouterr().err
    assert train(bare) == 0
    assert VirtualTokens.load(place / "out").layout == "plain"


def test_tokens_of_another_base_are_refused(place, tiny_folder, tmp_path):
    assert train(tiny_folder) == 0
    other = tmp_path / "other"
    shutil.copytree(tiny_folder, other)
    model = AutoModelForCausalLM.from_pretrained(other)
    with torch.no_grad():
        model.model.norm.weight[0] += 0.5
    model.save_pretrained(other)
    with pytest.raises(ModelError, match="other weights"):
        Generator.load(str(other), device="cpu", virtual_tokens=place / "out")
    with pytest.raises(ModelError, match="layout"):
        Generator.load(str(tiny_folder), device="cpu", layout="plain", virtual_tokens=place / "out")
    tokens = VirtualTokens.load(place / "out")
    assert len(tokens.first(2)) == 2
    with pytest.raises(SettingsError, match="these are 6"):
        tokens.first(7)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"count": None}, "does not tell 'count'"),
        ({"count": 7}, "the manifest says"),
        ({"placement": "behind"}, "unknown placement 'behind'"),
        ({"style": {"name": "mine"}}, "style"),
        ({"format": 99}, "format 99"),
    ],
)
def test_a_damaged_manifest_is_told(place, tiny_folder, change, message):
    generator = Generator.load(str(tiny_folder), device="cpu")
    style = style_named("virtual-tokens")
    hashes = {"base_hash": "0", "template_hash": "0"}
    VirtualTokens(
        torch.zeros(6, 32), base=generator.name, layout="chat", placement="middle", style=style,
        **hashes,
    ).save(place)  # fmt: skip
    manifest = json.loads((place / "manifest.json").read_text()) | change
    kept = {name: value for name, value in manifest.items() if value is not None}
    (place / "manifest.json").write_text(json.dumps(kept))
    with pytest.raises(ModelError, match=message):
        VirtualTokens.load(place)


def test_what_had_not_begun_may_begin_otherwise(place, tiny_folder, monkeypatch, capsys):
    from ragkit.training import keeper

    def stop(self, *given, **named):
        raise KeyboardInterrupt

    monkeypatch.setattr(keeper.Keeper, "_write", stop)
    state = place / "out.training"
    (state / "seed-0").mkdir(parents=True)
    (state / "run.json").write_text('{"steps": 1}')
    assert train(tiny_folder) == 130
    assert state.exists()  # it was there before
    monkeypatch.undo()
    monkeypatch.setenv("RAGKIT_CACHE", str(place / "cache"))
    monkeypatch.chdir(place)
    assert train(tiny_folder, "--steps=2") == 0


def test_rows_end_where_longrope_turns(place, tiny_folder, monkeypatch, capsys):
    from ragkit.training import token_runs

    monkeypatch.setattr(token_runs, "turning_length", lambda model: 40)
    assert train(tiny_folder) == 1
    assert "the model reads 40 as they are trained" in capsys.readouterr().err


def test_tokens_start_from_the_instructions_embeddings(tiny_folder):
    generator = Generator.load(str(tiny_folder), device="cpu")
    rows = start_rows(generator.model, generator.tokenizer, 200)
    ids = generator.tokenizer.encode(SPRING_INSTRUCTION, add_special_tokens=False)
    assert len(ids) < 200
    weights = generator.model.get_input_embeddings().weight
    expected = weights[[ids[place % len(ids)] for place in range(200)]]
    assert torch.equal(rows, expected)


def test_the_authors_tensor_is_read_and_nothing_else(tmp_path, place, tiny_folder, capsys):
    rows = torch.randn(6, 32)
    torch.save(rows, tmp_path / "tokens.pt")
    assert torch.equal(read_tensor_file(tmp_path / "tokens.pt"), rows)
    assert train(tiny_folder, f"--start={tmp_path / 'tokens.pt'}", "--learning-rate=1e-9") == 0
    found = load_file(place / "out" / "tokens.safetensors")["tokens"]
    torch.testing.assert_close(found, rows, atol=1e-5, rtol=0)

    class Hostile:
        def __reduce__(self):
            return print, ("run",)

    for wrong in (Hostile(), torch.randn(6), {"a": 1}, torch.full((2, 2), float("nan"))):
        torch.save(wrong, tmp_path / "wrong.pt")
        with pytest.raises(ModelError):
            read_tensor_file(tmp_path / "wrong.pt")
    assert "run" not in capsys.readouterr().out


def test_k_is_uniform_and_repeats_with_the_seed():
    draws = Draws((1, 2, 3), 1000, 5, (1, 5), 10, seed=4)
    counts = Counter(draw.tokens for draw in draws)
    assert set(counts) == set(range(1, 11))
    expected = len(draws) / 10
    assert sum((n - expected) ** 2 / expected for n in counts.values()) < 27.9  # chi², p = .001
    assert {draw.passages for draw in draws} == {1, 2, 3, 4, 5}
    assert list(draws) == list(Draws((1, 2, 3), 1000, 5, (1, 5), 10, seed=4))
    assert list(draws) != list(Draws((1, 2, 3), 1000, 5, (1, 5), 10, seed=5))
    assert all(draw.answer < (1, 2, 3)[draw.example] for draw in draws)
    for epoch in range(5):
        seen = [draws[3 * epoch + rank].example for rank in range(3)]
        assert sorted(seen) == [0, 1, 2]
    whole = Draws((1,), 10, 8, (1, 1), 10, objective="batch", seed=1)
    assert all(len({whole[8 * step + i].tokens for i in range(8)}) == 1 for step in range(10))
    assert {draw.tokens for draw in Draws((1,), 9, 2, (0, 0), 7, fixed=True)} == {7}
