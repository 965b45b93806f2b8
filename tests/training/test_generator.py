"""Training a generator: the library's run, and `ragkit-train generator` from files to files."""

import json
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from ragkit.trainers.__main__ import app
from ragkit.trainers.generator_results import _taken, cited, forgotten, loop_of
from ragkit.trainers.generator_settings import Checked, GeneratorSettings
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM

from ragkit import Document, Example, Hit, Index, Query
from ragkit.console import run as call
from ragkit.corpus import read_questions, write_questions
from ragkit.errors import DataError, ModelError, SettingsError
from ragkit.evaluation.probe_files import Probe, ProbeItem
from ragkit.evaluation.probes import run_probe
from ragkit.models import Generator
from ragkit.models.precision import weights_hash
from ragkit.readers import GeneratorReader
from ragkit.styles import ABSTENTION, style_named
from ragkit.training.generator_loss import Smoothing
from ragkit.training.generator_runs import GeneratorRun, _Rows
from ragkit.training.keeper import LoopSettings
from ragkit.training.lora import with_lora
from ragkit.training.mixes import Mix
from ragkit.training.packing import SftTrainee
from ragkit.training.remedies import RemediedTrainee, Remedies, collated
from ragkit.training.token_runs import Retrieved

METALS = {"tin": "232", "lead": "327", "zinc": "419", "iron": "1538"}
SETTINGS = LoopSettings(steps=6, batch=4, learning_rate=1e-2, evaluate_every=2)


def read(metal, at):
    return Document(metal, f"{metal} melts at {at}.")


@pytest.fixture
def run(tiny_folder):
    return run_on(str(tiny_folder))


def run_on(folder):
    generator = Generator.load(folder, device="cpu", precision="fp32")
    examples = [
        Example(
            Query(metal, f"When does {metal} melt?"), positives=(read(metal, at),), answers=(at,)
        )
        for metal, at in METALS.items()
    ]
    hits = [[Hit(read(*metal), 1.0 - n) for n, metal in enumerate(METALS.items())]] * 4
    style = style_named("virtual-tokens")
    reader = GeneratorReader(generator, style=style)
    learnt = Retrieved(examples, hits)
    mix = Mix({"retrieved": 1.0})
    return GeneratorRun(generator, style, reader.prompt, learnt, learnt, mix, (1, 2), rank=2)


def loss_of(run, folder):
    loaded = Generator.load(str(folder), device="cpu", precision="fp32")
    return replace(run, generator=loaded)._dev_loss(SftTrainee(loaded.model), 4)


@pytest.mark.parametrize("rank", [2, 0])
def test_the_folder_names_a_generator_that_answers_as_it_learnt(run, rank, tmp_path):
    run.rank = rank
    before = weights_hash(run.generator.model.state_dict())
    settings = replace(SETTINGS, steps=20, learning_rate=2e-2 if rank else 2e-3)
    folder, history = run.learn(settings, tmp_path / "state")
    assert history.best_step > 0
    assert history.evaluations[history.best_step] < history.evaluations[0] - 0.05
    assert weights_hash(run.generator.model.state_dict()) == before
    assert loss_of(run, folder) == pytest.approx(history.evaluations[history.best_step], abs=1e-5)
    loaded = Generator.load(str(folder), device="cpu", precision="fp32")
    assert GeneratorReader(loaded).style == run.style
    assert (folder / "adapter_config.json").exists() == bool(rank)


@pytest.mark.parametrize("rank", [2, 0])
def test_an_average_lies_between_the_base_and_what_was_learnt(run, rank, tmp_path):
    run.rank = rank
    folder, _ = run.learn(replace(SETTINGS, learning_rate=1e-3), tmp_path / "state")
    run.averaged(folder, 0.25, tmp_path / "average")
    loaded = [
        Generator.load(str(name), device="cpu", precision="fp32")
        for name in (run.generator.name, folder, tmp_path / "average")
    ]
    assert len({each.weights_hash() for each in loaded}) == 3  # what is kept of each is apart
    models = [each.model for each in loaded]
    for model in models[1:] if rank else ():
        for module in model.modules():
            if hasattr(module, "base_layer"):
                module.merge()
    weights = [
        {name.replace(".base_layer.", "."): of for name, of in model.state_dict().items()}
        for model in models
    ]
    moved = 0
    for name, base in weights[0].items():
        expected = torch.lerp(base, weights[1][name], 0.25)
        torch.testing.assert_close(weights[2][name], expected, atol=1e-6, rtol=1e-5)
        moved += not torch.equal(base, weights[1][name])
    assert moved


def test_a_run_that_was_stopped_goes_on_as_if_it_had_not_been(run, tmp_path):
    run.remedies = Remedies(["Lead is heavy and soft.", "Tin is not."], replay=1)
    whole, _ = run.learn(SETTINGS, tmp_path / "whole")
    asked, make = [], run.row
    run._dev_rows  # noqa: B018 (made once)

    def stopping(draw, of):
        asked.append(draw)
        if len(asked) > 16:  # read ahead of the fifth step; the state is of the fourth
            raise KeyboardInterrupt
        return make(draw, of)

    run.row = stopping
    with pytest.raises(KeyboardInterrupt):
        run.learn(SETTINGS, tmp_path / "stopped")
    assert not any("lora" in name for name in run.generator.model.state_dict())
    asked.clear()
    run.row = lambda draw, of: asked.append(draw) or make(draw, of)
    stopped, _ = run.learn(SETTINGS, tmp_path / "stopped")
    assert len(asked) == 2 * 3  # the rows of the two steps that were left, and no other
    first, second = (load_file(folder / "adapter_model.safetensors") for folder in (whole, stopped))
    assert first.keys() == second.keys() and first
    for name, tensor in first.items():
        torch.testing.assert_close(tensor, second[name], atol=1e-6, rtol=0)


def learnt_both_ways(folder, place):
    """What an adapter and whole weights are after a few steps with remedies, by their files."""
    found = {}
    for rank in (2, 0):
        run = run_on(folder)
        run.rank, run.remedies = rank, Remedies(["Lead is heavy and soft."], replay=2, keep=1)
        of = place / str(rank)
        of.mkdir(parents=True, exist_ok=True)
        learnt, _ = run.learn(replace(SETTINGS, micro_batch=2, learning_rate=1e-3), of)
        for path in learnt.glob("*.safetensors"):
            found |= {f"{rank}.{name}": tensor for name, tensor in load_file(path).items()}
    return found


def test_two_processes_learn_what_one_does(tiny_folder, tmp_path, on_two_processes):
    folder = str(tiny_folder)
    expected = learnt_both_ways(folder, tmp_path / "one")
    given = f"{folder!r}, Path({str(tmp_path / 'two')!r})"
    for found in on_two_processes(f"found = learnt_both_ways({given})"):
        assert found.keys() == expected.keys() and len(found) > 20
        for name, tensor in expected.items():
            torch.testing.assert_close(found[name], tensor, atol=1e-5, rtol=0)


def test_a_base_that_could_not_be_told_apart_is_refused(run, tmp_path):
    folder, _ = run.learn(SETTINGS, tmp_path / "state")
    adapted = replace(run, generator=Generator.load(str(folder), device="cpu"))
    with pytest.raises(SettingsError, match="adapter already"):
        adapted.learn(SETTINGS, tmp_path / "again")
    run.generator.name = ""
    with pytest.raises(SettingsError, match="no name"):
        run.learn(SETTINGS, tmp_path / "nameless")


def test_an_adapter_finds_its_base_from_anywhere(tiny_folder, tmp_path, monkeypatch):
    monkeypatch.chdir(tiny_folder.parent)
    folder, _ = run_on(tiny_folder.name).learn(SETTINGS, tmp_path / "state")
    monkeypatch.chdir(tmp_path)
    Generator.load(str(folder), device="cpu")


@pytest.mark.parametrize("rank", [2, 0])
def test_the_loss_of_a_step_with_remedies_is_that_of_its_parts(run, rank):
    run.rank = rank
    run.remedies = Remedies(["Lead is heavy and soft.", "Tin is not."], 1, 2, weight=0.5)
    base = run.generator.model
    torch.manual_seed(0)
    if rank:
        model = with_lora(base, rank)
        for name, parameter in model.named_parameters():
            if "lora_B" in name:
                torch.nn.init.normal_(parameter, std=0.05)
    else:
        from copy import deepcopy

        model = deepcopy(base)
        for parameter in model.parameters():
            parameter.data += 0.02 * torch.randn_like(parameter)
    rows = [_Rows(run, replace(SETTINGS, batch=5), 0)[place] for place in range(5)]
    assert [row.role for row in rows] == ["answer", "answer", "replay", "keep", "keep"]
    trainee = RemediedTrainee(model, run.loss, run.remedies, None if rank else base)
    found = float(trainee(**collated(rows), num_items_in_batch=None)["loss"].detach())
    plain = AutoModelForCausalLM.from_pretrained(run.generator.name, dtype=torch.float32)

    def logprobs(of, row):
        ids = torch.tensor([row.inputs])
        return of(input_ids=ids).logits[0, row.scored.start :].detach().double().log_softmax(-1)

    def nats(row):
        return -logprobs(model, row).gather(1, torch.tensor(row.answer)[:, None]).sum()

    labels = sum(len(row.answer) for row in rows[:2])
    expected = sum(nats(row) for row in rows[:2]) / labels
    expected += 0.5 * nats(rows[2]) / len(rows[2].answer)
    for row in rows[3:]:
        said, meant = logprobs(model, row), logprobs(plain, row)
        expected += 0.5 / 2 * (meant.exp() * (meant - said)).sum(-1).mean()
    assert found == pytest.approx(float(expected), abs=1e-4)
    assert nats(rows[2]) > 0 and float(expected) > 0


def test_remedies_give_the_same_gradients_in_parts(run):
    run.remedies = Remedies(["Lead is heavy and soft.", "Tin is not."], 2, 2)
    torch.manual_seed(0)
    model = with_lora(run.generator.model, 2)
    for name, parameter in model.named_parameters():
        if "lora_B" in name:
            torch.nn.init.normal_(parameter, std=0.05)
    trainee = RemediedTrainee(model, run.loss, run.remedies, None)
    rows = [_Rows(run, replace(SETTINGS, batch=8), 0)[place] for place in range(8)]
    labels = sum(len(row.answer) for row in rows if row.role == "answer")
    trainee(**collated(rows), num_items_in_batch=labels)["loss"].backward()
    whole = {n: p.grad.clone() for n, p in trainee.named_parameters() if p.grad is not None}
    trainee.zero_grad()
    for start, end in ((0, 5), (5, 7), (7, 8)):  # rows of each kind fall to two parts
        trainee(**collated(rows[start:end]), num_items_in_batch=labels)["loss"].backward()
    for name, parameter in trainee.named_parameters():
        if name in whole:
            torch.testing.assert_close(parameter.grad, whole[name], atol=1e-6, rtol=1e-4)
    assert all(gradient.abs().max() > 0 for gradient in whole.values())


def test_remedies_that_cannot_be_are_refused(run):
    with pytest.raises(SettingsError, match="some"):
        Remedies(replay=1)
    run.remedies = Remedies(["  ", ""], replay=1)
    with pytest.raises(DataError, match="two tokens"):
        run.remedy("replay", 0, 0)
    run.remedies = Remedies(keep=4)
    with pytest.raises(SettingsError, match="no room"):
        run.draws(SETTINGS)


def test_forgetting_is_that_of_the_probe_that_lost_most():
    class Model:
        def __init__(self, right):
            self.right = right

        def loglikelihoods(self, contexts, continuations, *, progress=None):
            import numpy as np

            best = [int(context) < self.right for context in contexts]
            return [np.array([[-1.0 if of else -3.0, 1.0], [-2.0, 1.0]]) for of in best]

        def weights_hash(self):
            return str(self.right)

    def probe(name):
        items = tuple(ProbeItem(str(n), str(n), (" a", " b")) for n in range(10))
        return Probe(name, "choices", items)

    def scores(*right):
        named = zip(right, ("easy", "hard"), strict=True)
        return [run_probe(Model(count), probe(name)) for count, name in named]

    found = forgotten(scores(8, 6), [scores(8, 4), scores(9, 5)])
    assert found["worst"] == "hard"
    assert found["forgetting"] == pytest.approx(0.2)
    assert found["probes"]["easy"]["lost"] == 0.0
    assert forgotten(scores(5, 5), [scores(6, 6)])["forgetting"] == 0
    assert forgotten([], [[]]) == {"probes": {}, "forgetting": 0.0, "worst": ""}


@pytest.fixture
def place(tmp_path, monkeypatch):
    monkeypatch.setenv("RAGKIT_CACHE", str(tmp_path / "cache"))
    monkeypatch.chdir(tmp_path)
    metals = ["tin", "lead", "zinc", "iron", "gold", "copper", "nickel", "silver", "cobalt"]
    Index.build("kb", [read(m, 90 + 7 * n) for n, m in enumerate(metals)], stores=["bm25"])
    lines = [
        {"id": m, "text": f"When does {m} melt?", "answers": [str(90 + 7 * n)]}
        for n, m in enumerate(metals)
    ]
    (tmp_path / "q.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    (tmp_path / "q.tsv").write_text("".join(f"{m}\t0\t{m}\t1\n" for m in metals))
    probe = [
        {"id": str(n), "question": f"Is {m} a metal?", "choices": ["yes", "no"], "answer": n % 2}
        for n, m in enumerate(metals)
    ]
    (tmp_path / "probe.jsonl").write_text("".join(json.dumps(line) + "\n" for line in probe))
    held = [{"id": str(n), "text": "xyz " * (9 + n)} for n in range(3)]
    (tmp_path / "held.jsonl").write_text("".join(json.dumps(line) + "\n" for line in held))
    texts = [{"id": str(n), "text": f"{m} is a metal."} for n, m in enumerate(metals)]
    (tmp_path / "texts.jsonl").write_text("".join(json.dumps(line) + "\n" for line in texts))
    return tmp_path


def train(base, *options):
    command = ["generator", "--output", "out", "--base", str(base)]
    defaults = {
        "--questions": "q.jsonl", "--index": "kb",
        "--lora": "r=2", "--steps": "4", "--batch": "4", "--dev-limit": "3",
        "--passages": "1-2", "--evaluate-every": "2", "--max-new-tokens": "4", "--device": "cpu",
    }  # fmt: skip
    given = {option.split("=")[0] for option in options}
    if "--full" in given:
        del defaults["--lora"]
    command += [f"{name}={value}" for name, value in defaults.items() if name not in given]
    return call(app, [*command, *options])


def test_the_program_writes_an_adapter_results_and_a_card(place, tiny_folder, capsys):
    mix = "--mix=gold:.4,retrieved:.2,distractors:.2,none:.2"
    code = train(
        tiny_folder, mix, "--qrels=q.tsv", "--seeds=0,1", "--probes", "probe.jsonl", "held.jsonl",
        "--replay=texts.jsonl", "--keep-rows=1", "--average=sweep", "--loss=overtone",
        "--citations", "--json",
    )  # fmt: skip
    assert code == 0
    results = json.loads(capsys.readouterr().out)
    out = place / "out"
    assert results["base"]["unchanged"]
    assert list(results["conditions"]) == ["before", "after"]
    tried = results["average"]["tried"]
    assert set(tried) == {"0.25", "0.5", "0.75", "1.0"}
    assert all(of["gain"]["low"] <= of["gain"]["mean"] and of["worst"] for of in tried.values())
    assert (out / "README.md").read_text().count(" (taken) |") == 1
    assert "citation recall" in results["citations"]["after"]
    assert "| citation recall | " in (out / "README.md").read_text()
    assert results["probes"]["probe"]["measure"] == "accuracy"
    assert sum(results["mix"]["kinds"].values()) == 2 * results["data"]["train"] == 12
    assert all(file.stat().st_mode & 0o044 == 0o044 for file in out.rglob("*"))
    assert {path.name for path in out.iterdir()} >= {
        "README.md", "results.json", "ragkit.json", "adapter_model.safetensors", "seeds",
    }  # fmt: skip
    assert not any("state" in path.name or path.suffix == ".bin" for path in out.rglob("*"))
    assert not (place / "out.training").exists()
    reader = GeneratorReader(Generator.load(str(out), device="cpu"))
    assert reader.style.name == "ragkit"
    assert "gold:.4" in (out / "README.md").read_text()
    assert "an adapter (LoRA) of rank 2 of" in (out / "README.md").read_text()


def test_too_much_forgotten_fails_and_leaves_what_was_learnt(place, tiny_folder, capsys):
    options = ("--probes", "held.jsonl", "--learning-rate=0.01", "--steps=12", "--full")
    assert train(tiny_folder, *options, "--max-forgetting=0") == 1
    told = capsys.readouterr()
    assert "'held' lost" in told.err and "General ability" in told.out
    assert not (place / "out").exists()
    assert train(tiny_folder, *options, "--max-forgetting=0", "--json") == 1
    told = capsys.readouterr()
    assert "--average sweep goes on" in told.err
    refused = json.loads(told.out)
    assert refused == json.loads((place / "out.training" / "results.json").read_text())
    assert refused["worst"] == "held"
    assert train(tiny_folder, *options, "--max-forgetting=9") == 0  # what was learnt was kept
    results = json.loads((place / "out" / "results.json").read_text())
    assert results["forgetting"] > 0 and results["worst"] == "held"
    assert (place / "out" / "model.safetensors").exists()


def test_dev_questions_are_judged_by_the_qrels_that_know_them(place, tiny_folder, capsys):
    asked = read_questions(place / "q.jsonl")
    write_questions(place / "train.jsonl", asked[:6])
    write_questions(place / "dev.jsonl", asked[6:])
    options = (
        "--questions=train.jsonl",
        "--dev-questions=dev.jsonl",
        "--citations",
        "--keep-rows=2",
    )
    assert train(tiny_folder, *options, "--qrels=q.tsv", "--epochs=1", "--json") == 0
    assert "citation recall" in json.loads(capsys.readouterr().out)["citations"]["before"]
    (place / "some.tsv").write_text("".join((place / "q.tsv").read_text().splitlines(True)[:6]))
    assert train(tiny_folder, *options, "--qrels=some.tsv", "--replace") == 0
    assert "some.tsv judges none of these questions" in capsys.readouterr().err


def test_an_epoch_sees_each_question_once_beside_what_is_against_forgetting(run):
    run.remedies = Remedies(keep=2)
    settings = GeneratorSettings(output=Path("out"), questions=Path("q"), batch=4, keep_rows=2)
    assert len(run.draws(loop_of(run, settings, 0))) == len(run.train.examples)


def test_what_is_reported_to_tensorboard_is_kept(place, tiny_folder, monkeypatch):
    package = place / "tensorboardX"
    package.mkdir()
    (package / "__init__.py").write_text(
        "from pathlib import Path\n"
        "class SummaryWriter:\n"
        "    def __init__(self, log_dir):\n"
        "        Path(log_dir).mkdir(parents=True, exist_ok=True)\n"
        "        self.path = Path(log_dir, 'events')\n"
        "    def add_scalar(self, name, value, step):\n"
        "        with self.path.open('a') as file: file.write(name + '\\n')\n"
        "    def __getattr__(self, name): return lambda *_, **__: None\n"
    )
    monkeypatch.syspath_prepend(place)
    assert train(tiny_folder, "--report-to=tensorboard") == 0
    (events,) = (place / "out" / "runs" / "seed-0").rglob("events")
    assert "train/loss" in events.read_text()


def test_what_is_measured_is_what_is_served(place, tiny_folder, monkeypatch):
    """All weights are learnt in fp32, and asked in the precision that users ask in."""
    asked = []

    def seen(model, probe, **named):
        asked.append(next(model.model.parameters()).dtype)
        return run_probe(model, probe, **named)

    monkeypatch.setattr("ragkit.evaluation.probes.run_probe", seen)
    assert train(tiny_folder, "--full", "--precision=bf16", "--probes", "held.jsonl") == 0
    assert asked == [torch.bfloat16] * 2
    kept = load_file(place / "out" / "model.safetensors")
    assert {tensor.dtype for tensor in kept.values()} == {torch.float32}


def test_of_the_shares_that_the_gate_lets_through_the_best_is_taken():
    def told(f1, lost):
        return {"conditions": {"after": {"F1": {"mean": f1}}}, "forgetting": lost}

    of = {0.25: told(0.2, 0.0), 0.5: told(0.4, 0.1), 1.0: told(0.9, 0.3)}
    assert _taken(of, None) == 1.0
    assert _taken(of, 0.1) == 0.5
    assert _taken(of, 0.05) == 0.25
    assert _taken({0.5: told(0.4, 0.1), 1.0: told(0.9, 0.3)}, 0.05) == 0.5  # the least forgotten


def test_mined_negatives_are_the_first_distractors(place, tiny_folder, monkeypatch):
    mined, seen, row = Document("mined", "Bismuth melts at 271."), set(), GeneratorRun.row
    asked = [replace(e, negatives=(mined,)) for e in read_questions(place / "q.jsonl")]
    write_questions(place / "mined.jsonl", asked)

    def told(self, draw, of):
        seen.update(hit.document.id for hit in draw.hits[:1])
        return row(self, draw, of)

    monkeypatch.setattr(GeneratorRun, "row", told)
    options = ("--mix=distractors:1", "--qrels=q.tsv", "--passages=1", "--questions=mined.jsonl")
    assert train(tiny_folder, *options) == 0
    assert seen == {"mined"}


def test_another_base_or_chat_template_is_refused(place, tiny_folder, tmp_path):
    assert train(tiny_folder) == 0
    Generator.load("out", device="cpu")
    other = tmp_path / "other"
    model = AutoModelForCausalLM.from_pretrained(tiny_folder)
    model.get_input_embeddings().weight.data += 0.1
    model.save_pretrained(other)
    Generator.load(str(tiny_folder)).tokenizer.save_pretrained(other)
    config = json.loads((place / "out" / "adapter_config.json").read_text())
    config["base_model_name_or_path"] = str(other)
    (place / "out" / "adapter_config.json").write_text(json.dumps(config))
    with pytest.raises(ModelError, match="other"):
        Generator.load("out", device="cpu")
    config["base_model_name_or_path"] = str(tiny_folder)
    (place / "out" / "adapter_config.json").write_text(json.dumps(config))
    with pytest.raises(ModelError, match="layout"):
        Generator.load("out", device="cpu", layout="plain")
    taught = json.loads((place / "out" / "ragkit.json").read_text())
    (place / "out" / "ragkit.json").write_text(json.dumps(taught | {"template_hash": "0"}))
    with pytest.raises(ModelError, match="chat template"):
        Generator.load("out", device="cpu")
    (place / "out" / "ragkit.json").write_text(json.dumps(taught | {"format": 9}))
    with pytest.raises(ModelError, match="format 9"):
        Generator.load("out", device="cpu")
    (place / "out" / "ragkit.json").write_text(json.dumps(taught | {"base_hash": None}))
    with pytest.raises(ModelError, match="base_hash is no text"):
        Generator.load("out", device="cpu")
    (place / "out" / "adapter_config.json").write_text(json.dumps(config | {"r": 5}))
    with pytest.raises(ModelError, match="does not fit"):
        Generator.load("out", device="cpu")


@pytest.mark.parametrize(
    ("options", "code", "message"),
    [
        (["--mix=gold:.5"], 2, "sum to 0.5"),
        (["--mix=golden:1"], 2, "unknown kind"),
        (["--max-forgetting=0.1"], 2, "--probes"),
        (["--keep-rows=4"], 2, "all 4 rows"),
        (["--lora=0"], 2, "--lora must be at least 1"),
        (["--lora=r=0"], 2, "--lora must be at least 1"),
        (["--lora=alpha=8"], 2, "'alpha=8' is no rank"),
        (["--smoothing=1", "--loss=overtone"], 2, "--smoothing"),
        (["--smoothing=.5"], 2, "--smoothing has no effect"),
        (["--replay-rows=3"], 2, "--replay-rows has no effect"),
        (["--full", "--lora=4"], 2, "--lora has no effect"),
        (["--probes", "probe.jsonl", "more/probe.jsonl"], 2, "two files are called 'probe'"),
        (["--replay=probe.jsonl", "--probes", "probe.jsonl"], 2, "it is trained on"),
        (["--probes", "gone.jsonl"], 1, "gone.jsonl"),
        (["--average=2"], 2, "--average"),
        (["--passages=0"], 2, "at least 1 is shown"),
        (["--passages=0-2"], 2, "at least 1 is shown"),
        (["--full", "--lora=8"], 2, "--lora has no effect"),
        (["--deviations=2"], 2, "--deviations has no effect"),
        (["--loss=overtone", "--least=-1"], 2, "least must be"),
        (["--report-to=nonsense"], 2, "--report-to 'nonsense'"),
        (["--clip=nan"], 2, "clip nan"),
        (["--learning-rate=-1"], 2, "learning rate -1.0: expected"),
        (["--prompt=sonnet"], 2, "sonnet"),
        (["--replay=empty.jsonl"], 1, "empty.jsonl"),
        (["--probe-limit=2"], 2, "--probe-limit has no effect"),
        (["--all-gold"], 2, "--all-gold has no effect"),
        (["--abstain=always", "--mix=gold:1,retrieved:0"], 2, "--abstain has no effect"),
        (["--citations", "--mix=none:1"], 2, "--citations has no effect"),
        (["--seeds=4294967296"], 2, "from 0 to 2^32-1"),
        (["--mix=distractors:1", "--questions=bare.jsonl"], 1, "no passages of any kind"),
        (["--mix=distractors:1", "--qrels=other.tsv"], 1, "judges none"),
    ],
)
def test_what_cannot_work_is_refused(
    place, tiny_folder, capsys, monkeypatch, options, code, message
):
    (place / "empty.jsonl").write_text("")
    (place / "other.tsv").write_text("nobody\t0\ttin\t1\n")
    bare = [replace(e, answers=("No",)) for e in read_questions(place / "q.jsonl")]
    write_questions(place / "bare.jsonl", bare)
    monkeypatch.setattr(
        "ragkit.trainers.generator.said_by", None
    )  # refused before anything is said
    assert train(tiny_folder, *options) == code
    assert message in capsys.readouterr().err
    assert not (place / "out").exists() and not (place / "out.training").exists()


def test_each_side_has_its_own_judgements(run):
    other, places = Document("other", "Iron melts at 9."), slice(0, 1)
    (query,) = (example.query for example in run.train.examples[places])
    bare = [Example(query, answers=("9",))]
    hits = [[Hit(other, 1.0), Hit(read("tin", "232"), 0.5)]]
    run.train = Retrieved(bare, hits, {query.id: {"other": 1}})
    run.dev = Retrieved(bare, hits, {query.id: {"tin": 1}})
    run.mix = Mix({"gold": 1.0})
    (first, *_), (dev, *_) = run.draws(SETTINGS), run._draws(run.dev, 1, 1, (1, 1), 0)
    assert [draw.hits[draw.gold[0]].document.id for draw in (first, dev)] == ["other", "tin"]


def test_where_nothing_helps_the_target_abstains(run):
    run.mix = Mix({"distractors": 1.0})
    draws = run.draws(SETTINGS)
    prompt = run.prompt(run.train.examples[draws[0].example].query, draws[0].hits)
    assert draws[0].target(prompt) == ABSTENTION


def test_citations_are_counted_over_questions_and_seeds(run):
    """By hand: tin and lead are shown; 3 of 7 citations are gold, 3 of 4 gold ones are cited."""
    checked = Checked([0, 1], [1.0], run.mix, (1, 2), Smoothing(), [])
    answers = [
        ["232 [1]", "327 [1][2]", "419 [1]", "1538"],
        ["232", "327 [2], [7]", "419 [2]", "1538 [1]"],
    ]
    found = cited(run, checked, answers)
    assert found["citation precision"]["mean"] == pytest.approx(3 / 7)
    assert found["citation recall"]["mean"] == pytest.approx(3 / 4)
    assert list(cited(run, checked, [["232"] * 4])) == ["citation recall"]
    bare = [replace(example, positives=()) for example in run.dev.examples]
    run.dev = Retrieved(bare, run.dev.hits)
    assert cited(run, checked, answers) == {}


def test_a_question_that_does_not_fit_is_named(run):
    long = replace(run.train.examples[0], answers=("9" * 5000,))
    run.train = Retrieved([long, *run.train.examples[1:]], run.train.hits)
    with pytest.raises(DataError, match=r"'tin'.*answer of \d{4,} tokens do not fit"):
        run.check()


def test_a_long_answer_takes_passages_from_its_own_prompt_alone(run):
    """As one is served, with room for `max_new_tokens`: the others' are as they would be."""
    window = run.generator.window
    few = [Hit(read("tin", f"{n} " * (window // 8)), -n) for n in range(4)]
    reader = GeneratorReader(run.generator, style=run.style, max_new_tokens=8)
    long = replace(run.train.examples[0], answers=("9 8 " * (window // 8),))
    run.prompt, run.train = reader.prompt, Retrieved([long, *run.train.examples[1:]], [few] * 4)
    run.passages = 4, 4
    run.check()
    for place, example in enumerate(run.train.examples):
        draw = next(draw for draw in run.draws(SETTINGS) if draw.example == place)
        row = run.row(draw, run.train)
        served = reader.prompt(example.query, draw.hits)
        same = row.prompt == tuple(run.generator.encoder.encode(served).ids)
        assert same == (place > 0) and len(served.shown) > 1
        assert len(row.prompt) + len(row.answer) <= window
