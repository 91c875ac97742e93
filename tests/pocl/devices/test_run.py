"""On each device a whole run ranks, caches its teacher, trains, evaluates and leaves its result, in both formats."""

import json
from pathlib import Path

import pytest

from bench.faults.small_runs import write_variant
from pocl.__main__ import read_spec
from pocl.events import Event, Warned
from pocl.run import run
from tests.support.device_parameters import ON_EACH_DEVICE


@ON_EACH_DEVICE
@pytest.mark.system
@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_a_whole_run(precision: str, device: str, tmp_path: Path) -> None:
    spec = write_variant(tmp_path, "carry", training={"precision": precision}, resources={"device": device})
    events: list[Event] = []
    result = run(read_spec(spec), tmp_path / "run", events.append)
    assert result.evaluations[-1].subject == "final"
    warnings = [event.code for event in events if isinstance(event, Warned)]
    assert [code for code in warnings if code.startswith("teacher_cache")] == []
    assert json.loads((tmp_path / "run" / "final" / "config.json").read_bytes())["model_type"] == "llama"
