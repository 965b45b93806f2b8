"""Learning an adapter of a generator."""

import pytest
import torch
from safetensors.torch import load_file

from ragkit import Document, Example, Hit, Query
from ragkit.models import Generator
from ragkit.models.precision import weights_hash
from ragkit.readers import GeneratorReader
from ragkit.styles import style_named
from ragkit.training.generator_runs import GeneratorRun
from ragkit.training.keeper import LoopSettings
from ragkit.training.packing import SftTrainee
from ragkit.training.token_runs import Retrieved

METALS = {"tin": "232", "lead": "327", "zinc": "419", "iron": "1538"}


@pytest.fixture
def run(tiny_folder):
    generator = Generator.load(str(tiny_folder), device="cpu", precision="fp32")
    examples = [
        Example(Query(metal, f"When does {metal} melt?"), answers=(at,))
        for metal, at in METALS.items()
    ]
    hits = [[Hit(Document(m, f"{m} melts at {at}."), 1.0)] for m, at in METALS.items()]
    reader = GeneratorReader(generator, style=style_named("virtual-tokens"))
    learnt = Retrieved(examples, hits)
    return GeneratorRun(generator, reader.prompt, learnt, learnt, (0, 1), rank=2)


def test_the_folder_names_a_generator_that_answers_as_it_learnt(run, tmp_path):
    before = weights_hash(run.generator.model.state_dict())
    settings = LoopSettings(steps=30, batch=4, learning_rate=2e-2, evaluate_every=10)
    history = run.learn(settings, tmp_path)
    assert history.best_step > 0
    assert history.evaluations[history.best_step] < history.evaluations[0] - 0.1
    assert weights_hash(run.generator.model.state_dict()) == before
    assert not any("lora" in name for name in run.generator.model.state_dict())
    loaded = Generator.load(str(tmp_path), device="cpu", precision="fp32")
    again = GeneratorRun(loaded, run.prompt, run.train, run.dev, run.passages)
    loss = again._dev_loss(SftTrainee(loaded.model), 4)
    assert loss == pytest.approx(history.evaluations[history.best_step], abs=1e-5)


def test_a_run_that_was_stopped_goes_on_as_if_it_had_not_been(run, tmp_path):
    settings = LoopSettings(steps=6, batch=4, learning_rate=1e-2, evaluate_every=2)
    run.learn(settings, tmp_path / "whole")
    asked = []
    make = run._row

    def stopping(draw, passages):
        asked.append(draw)
        if len(asked) > 16:
            raise KeyboardInterrupt
        return make(draw, passages)

    run._row = stopping
    with pytest.raises(KeyboardInterrupt):
        run.learn(settings, tmp_path / "stopped")
    run._row = make
    run.learn(settings, tmp_path / "stopped")
    whole, stopped = (
        load_file(tmp_path / name / "adapter_model.safetensors") for name in ("whole", "stopped")
    )
    assert whole.keys() == stopped.keys() and whole
    for name, tensor in whole.items():
        torch.testing.assert_close(tensor, stopped[name], atol=1e-6, rtol=0)
