"""Seconds and memory of stages."""

import time
from mmap import mmap

import numpy as np
import pytest

from ragkit.evaluation.costs import Cost, Meter


def test_a_stage_that_is_entered_again_adds_up():
    meter = Meter()
    with meter.stage("read"):
        time.sleep(0.02)
    with meter.stage("read") as cost:
        time.sleep(0.03)
    cost.prompt_tokens = 7
    assert meter.costs["read"] is cost
    assert 0.05 <= cost.seconds < 1
    written = cost.to_json(10)
    assert written["per_question"] == pytest.approx(cost.seconds / 10)
    assert written["prompt_tokens"] == 7 and "answer_tokens" not in written
    assert "per_prompt" not in written


def test_where_prompts_are_read_they_are_what_time_is_divided_by():
    written = Cost(seconds=3.0, prompts=12).to_json(4)
    assert written["per_prompt"] == 0.25 and "per_question" not in written
    assert written["prompts"] == 12
    written = Cost(seconds=3.0, prompts=0).to_json(4)
    assert written["prompts"] == 0 and not {"per_prompt", "per_question"} & written.keys()


def test_memory_that_a_stage_held_meanwhile_is_seen():
    meter = Meter()
    with meter.stage("small"):
        pass
    # New pages, whatever the process has freed before.
    with meter.stage("large"), mmap(-1, 320_000_000) as held:
        np.frombuffer(held, np.uint8)[:] = 1
        time.sleep(0.1)
    before, after = (meter.costs[name].peak_memory_mb for name in ("small", "large"))
    assert 250 < after - before < 500


def test_a_failing_stage_is_measured_too():
    meter = Meter()
    with pytest.raises(ZeroDivisionError), meter.stage("read"):
        1 / 0  # noqa: B018
    assert meter.costs["read"].seconds > 0
    assert Cost().to_json(1)["peak_memory_mb"] == 0.0
