"""Cross-encoders that are learnt: averages with the base, and one process or two."""

from dataclasses import replace

import pytest
import torch

from ragkit import Document, Example, Query
from ragkit.errors import SettingsError
from ragkit.training.keeper import LoopSettings
from ragkit.training.lists import listed
from ragkit.training.reranker_runs import RerankerRun

METALS = ["tin", "lead", "zinc", "iron", "gold", "copper", "nickel", "silver", "cobalt", "barium"]
DOCUMENTS = [
    Document(m, f"{m} melts at {90 + 7 * i}. " * (1 + i % 3)) for i, m in enumerate(METALS)
]
LOOP = LoopSettings(steps=6, batch=4, learning_rate=1e-3, evaluate_every=2)
HEAD = {"0.model.classifier.weight", "0.model.classifier.bias"}


def run_of(base, objective="bce"):
    examples = [
        Example(
            Query(m, f"when does {m} melt?"),
            (DOCUMENTS[i],),
            (DOCUMENTS[(i + 1) % 10], DOCUMENTS[(i + 3) % 10]),
        )
        for i, m in enumerate(METALS)
    ]
    teacher = {
        (e.query.id, d.id): float(len(d.text) % 7)
        for e in examples
        for d in (*e.positives, *e.negatives)
    }
    questions, documents = listed(examples, teacher if objective == "distil" else None)
    return RerankerRun(str(base), documents, questions, objective, negatives=2)


def state_of(model):
    return {name: tensor.clone() for name, tensor in model.state_dict().items()}


def test_an_average_is_the_mean_of_the_weights_that_the_base_has(tiny_encoder_folder, tmp_path):
    """An encoder lacks the output: it stays as it was learnt. A cross-encoder lacks nothing."""
    base, lacking = tiny_encoder_folder, HEAD
    for kind in ("encoder", "cross-encoder"):
        (tmp_path / kind).mkdir()
        run = run_of(base)
        learnt, _ = run.learn(replace(LOOP, learning_rate=1e-2), tmp_path / kind)
        own, tuned = state_of(run.loaded()), state_of(learnt.model)
        assert own.keys() > HEAD
        body = own.keys() - HEAD
        assert sum(not torch.equal(own[name], tuned[name]) for name in body) > 30
        half, whole = (state_of(run.averaged(learnt, share).model) for share in (0.5, 1.0))
        assert half.keys() == whole.keys() == tuned.keys()
        for name, tensor in tuned.items():
            expected = tensor
            if name not in lacking and tensor.is_floating_point():
                expected = (own[name] + tensor) / 2
            torch.testing.assert_close(half[name], expected, atol=1e-7, rtol=1e-6)
            assert torch.equal(whole[name], tensor)
            assert torch.equal(learnt.model.state_dict()[name], tensor)
        with pytest.raises(SettingsError, match="must lie in"):
            run.averaged(learnt, 1.5)
        base, lacking = tmp_path / "saved", set()
        learnt.model.save_pretrained(str(base), create_model_card=False)


OBJECTIVES = ("bce", "listwise", "distil")


def test_two_processes_learn_what_one_does(tiny_encoder_folder, tmp_path, on_two_processes):
    folder = str(tiny_encoder_folder)
    expected = learnt_by_all(folder, tmp_path / "one")
    given = f"{folder!r}, Path({str(tmp_path / 'two')!r})"
    of_no_effect = (
        "key.bias",
        "listwise.0.model.classifier.bias",
        "distil.0.model.classifier.bias",
    )
    for found in on_two_processes(f"found = learnt_by_all({given})"):
        for name, tensor in expected.items():
            if not name.endswith(of_no_effect):  # there Adam follows rounding errors
                torch.testing.assert_close(found[name], tensor, atol=1e-4, rtol=0)


def learnt_by_all(folder, place):
    """The weights after some steps by each objective."""
    found = {}
    for objective in OBJECTIVES:
        (place / objective).mkdir(parents=True, exist_ok=True)
        learnt, _ = run_of(folder, objective).learn(LOOP, place / objective)
        found |= {f"{objective}.{n}": tensor for n, tensor in state_of(learnt.model).items()}
    return found
