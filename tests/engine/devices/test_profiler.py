"""train.profile writes a trace for a viewer."""

import json
import os

import pytest

from engine.devices.profiler import recorded
from tests.faults.campaign import SMALL
from tests.running import metrics, run_main, untimed


@pytest.mark.parametrize(("n_steps", "first"), [(30, 11), (4, 1)])
def test_trace_contains_a_marker_and_the_operations_of_each_update(tmp_path, n_steps, first):
    run = tmp_path / "run"
    assert run_main("-e", run, *SMALL, "--train.n_steps", n_steps, "--train.profile", 3) == 0
    (path,) = (run / "profile").iterdir()
    assert path.name == "trace-rank0.json"
    events = json.loads(path.read_text())["traceEvents"]
    markers = sorted({event["name"] for event in events if event["name"].startswith("ProfilerStep#")})
    assert markers == sorted(f"ProfilerStep#{first + i}" for i in range(3))
    names = {event["name"] for event in events}
    assert "aten::convolution_backward" in names
    assert any(name.startswith("Optimizer.step") for name in names)


def test_profiling_does_not_change_the_run(tmp_path):
    for name, options in (("plain", ()), ("profiled", ("--train.profile", 2))):
        assert run_main("-e", tmp_path / name, *SMALL, "--train.n_steps", 15, "--train.print_freq", 5, *options) == 0
    assert untimed(metrics(tmp_path / "plain")) == untimed(metrics(tmp_path / "profiled"))
    assert not (tmp_path / "plain" / "profile").exists()


@pytest.mark.parametrize(("value", "expected"), [(None, "1"), ("0", "0")])
def test_a_profile_detaches_cupti_unless_the_environment_says_otherwise(tmp_path, monkeypatch, value, expected):
    monkeypatch.setenv("TEARDOWN_CUPTI", value or "")  # is undone after the test
    if value is None:
        del os.environ["TEARDOWN_CUPTI"]
    assert list(recorded(iter([1, 2, 3]), tmp_path / "profile", rank=0, n_updates=1, n_left=3)) == [1, 2, 3]
    assert os.environ["TEARDOWN_CUPTI"] == expected
