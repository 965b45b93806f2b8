"""The loop: the same on one process and on two, after a kill, and with accumulated passes."""

from dataclasses import replace

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import save_file

from ragkit.errors import DataError, SettingsError
from ragkit.models.prefix_cache import PrefixCache
from ragkit.training.draws import Draws
from ragkit.training.keeper import LoopSettings
from ragkit.training.loop import train
from ragkit.training.token_loss import Rows, TokenRow, TokenTrainee, collate

SETTINGS = LoopSettings(
    steps=6, batch=4, micro_batch=2, learning_rate=0.05, warmup=0.2, evaluate_every=2
)
COUNT = 5


def run(model, folder, settings=SETTINGS, *, stop_at=None, made=None):
    draws = Draws((1,) * 7, settings.steps, settings.batch, (1, 3), COUNT, seed=3)
    start = torch.randn(COUNT, 32, generator=torch.Generator().manual_seed(1))
    trainee = TokenTrainee(model, start, PrefixCache(model, 10**7))

    def make(draw, passages):
        before = tuple(7 * draw.example + place for place in passages)
        return TokenRow(draw.example, before, draw.tokens, (90, draw.example), (50, 2))

    seen = []

    def evaluate():
        seen.append(trainee.tokens.detach().clone())
        if stop_at is not None and len(seen) > stop_at:
            raise KeyboardInterrupt
        rows = [make(draws[place], (0, 1)) for place in range(7)]
        return float(trainee(**collate(rows))["loss"])

    folder.mkdir(exist_ok=True)

    def making(draw, passages):
        if made is not None:
            made.append(draw)
        return make(draw, passages)

    rows = lambda begin: Rows(draws, making, (3,) * 7, begin)  # noqa: E731
    history = train(trainee, rows, collate, settings, folder, evaluate=evaluate)
    return trainee.tokens.detach(), history


def test_it_learns_and_keeps_the_best(tiny, tmp_path):
    _, history = run(tiny, tmp_path / "a", replace(SETTINGS, steps=30))
    losses = history.evaluations
    assert losses[history.best_step] == min(losses.values()) < losses[0] - 0.05
    assert set(losses) == set(range(0, 31, 2))
    assert history.step == 30 and history.losses


def test_passes_accumulate_to_the_same(tiny, tmp_path):
    two, _ = run(tiny, tmp_path / "a")
    one, _ = run(tiny, tmp_path / "b", replace(SETTINGS, micro_batch=4))
    torch.testing.assert_close(two, one, atol=1e-5, rtol=0)


def test_a_killed_run_goes_on_as_if_it_had_not_been(tiny, tmp_path):
    expected, whole = run(tiny, tmp_path / "a")
    with pytest.raises(KeyboardInterrupt):
        run(tiny, tmp_path / "b", stop_at=2)  # before step 4 is written
    made = []
    found, history = run(tiny, tmp_path / "b", made=made)
    torch.testing.assert_close(found, expected, atol=1e-6, rtol=0)
    assert len(made) == 4 * SETTINGS.batch  # of the four steps that were left
    assert history.evaluations == pytest.approx(whole.evaluations, abs=1e-5)
    assert not [path for path in (tmp_path / "b").rglob("*") if path.suffix != ".safetensors"]


def test_a_run_that_is_done_trains_no_more(tiny, tmp_path):
    expected, _ = run(tiny, tmp_path / "a")
    found, _ = run(tiny, tmp_path / "a", stop_at=0)
    assert torch.equal(found, expected)


def test_the_state_of_other_settings_is_refused(tiny, tmp_path):
    run(tiny, tmp_path / "a")
    with pytest.raises(SettingsError, match="other settings"):
        run(tiny, tmp_path / "a", replace(SETTINGS, learning_rate=0.01))
    state = tmp_path / "a" / "state.safetensors"
    with safe_open(state, framework="pt") as file:
        told, tensors = file.metadata(), {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
    for change in ({"now.tokens": torch.zeros(1, 32)}, {"now.others": torch.zeros(5, 32)}):
        save_file(tensors | change, state, metadata=told)
        with pytest.raises(DataError, match="gone on"):  # a row is not spread over all
            run(tiny, tmp_path / "a")
    state.write_bytes(b"x" * 64)
    with pytest.raises(DataError, match="gone on"):
        run(tiny, tmp_path / "a")


@pytest.mark.parametrize(
    "change", [{"batch": 3, "micro_batch": 2}, {"steps": 0}, {"learning_rate": -1.0}, {"warmup": 2}]
)
def test_numbers_out_of_range_are_refused(tiny, tmp_path, change):
    with pytest.raises(SettingsError):
        run(tiny, tmp_path / "a", replace(SETTINGS, **change))


def test_two_processes_give_what_one_does(tiny, tmp_path, on_two_processes):
    """The first alone evaluates, and all take the best by its value."""
    expected, whole = run(tiny, tmp_path / "one")
    for found in on_two_processes(
        "import conftest, os\n"
        "stop_at = None if os.environ['RANK'] == '0' else 0  # the first time it evaluates\n"
        f"place = Path({str(tmp_path / 'two')!r})\n"
        "tokens, history = run(conftest.tiny_model(), place, stop_at=stop_at)\n"
        "found = {'tokens': tokens, 'best': torch.tensor(history.best_step)}\n"
        "found['losses'] = torch.tensor(list(history.evaluations.values()))\n"
    ):
        torch.testing.assert_close(found["tokens"], expected, atol=1e-5, rtol=0)
        losses = pytest.approx(list(whole.evaluations.values()), abs=1e-5)
        assert found["losses"].tolist() == losses and int(found["best"]) == whole.best_step
