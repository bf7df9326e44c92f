"""tools/gpu_speed.py measures what it can, and says what it could not."""

import json

import pytest

from datasets.pipeline.catalog import DATASETS
from engine import RunError
from tests.faults.children import run_script
from tools import gpu_speed
from tools.gpu_speed import compared, main, measured, peak, waits_in


@pytest.fixture(autouse=True)
def cpu(monkeypatch):
    monkeypatch.setitem(DATASETS.entries, ("random", "classes"), None)  # removed again after the test
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "")


def test_a_card_has_its_peak_and_an_unknown_card_has_none():
    assert peak("NVIDIA H100 80GB HBM3") == 989
    assert peak("NVIDIA H100 PCIe") == 756
    assert peak("NVIDIA A100-SXM4-40GB") == 312
    assert peak("CPU") == 0


def test_a_part_becomes_a_row_of_the_table():
    assert compared(1500.4, 3000.0, "images/s") == ["1,500", "3,000", "0.50", "images/s"]

    def fails(folder):
        raise RunError("out of memory\nmore")

    head = ["part", "this project", "the other", "ratio", "details"]
    assert measured(head, fails) == ["", "", "", "failed: RunError: out of memory"]


def test_a_part_that_does_not_fit_is_listed_and_a_failed_one_does_not_end_the_others(monkeypatch, tmp_path, capsys):
    def broken(folder):
        raise ValueError("broken")

    chosen = {"long": (1e6, broken), "broken": (1, broken), "good": (1, lambda folder: compared(2.0, 1.0, "images/s"))}
    monkeypatch.setattr(gpu_speed, "parts", lambda quick, card: chosen)
    assert main(["--device", "cpu", "--quick", "-o", str(tmp_path / "speed.json")]) == 0
    written = json.loads((tmp_path / "speed.json").read_text())
    assert written["machine"].startswith("CPU, ")
    assert [row[0] + ": " + row[4] for row in written["table"][1:]] == [
        "long: not measured: no time left",
        "broken: failed: ValueError: broken",
        "good: images/s",
    ]
    assert "not measured: no time left" in capsys.readouterr().out


def test_waits_are_counted_inside_of_the_recorded_updates(tmp_path):
    def event(name, ts, cat="cuda_runtime"):
        return {"name": name, "ts": ts, "dur": 1, "cat": cat}

    events = [{"name": f"ProfilerStep#{i}", "ts": 100 * i, "dur": 100, "cat": "user_annotation"} for i in (11, 12)]
    trace = tmp_path / "trace.json"
    trace.write_text(
        json.dumps({"traceEvents": [*events, event("cudaLaunchKernel", 1120), event("cudaDeviceSynchronize", 1400)]})
    )
    assert waits_in(trace) == "0 waits in 2 updates"
    events += [event("cudaStreamSynchronize", 1110), event("aten::item", 1250), {"name": "aten::item", "ts": 1130}]
    trace.write_text(json.dumps({"traceEvents": events}))
    assert waits_in(trace) == "2 waits in 2 updates: aten::item, cudaStreamSynchronize"


@pytest.mark.slow
def test_every_part_is_measured(tmp_path):
    finished = run_script("tools/gpu_speed.py", "--device", "cpu", "--quick", "-o", tmp_path / "speed.json", timeout=500)
    assert finished.returncode == 0, finished.stderr
    table = json.loads((tmp_path / "speed.json").read_text())["table"]
    assert len(table) == 8
    for name, ours, other, ratio, details in table[1:]:
        assert min(float(cell.replace(",", "")) for cell in (ours, other, ratio)) > 0, (name, details)
    assert "TFLOP/s; " in table[1][4]
    assert "in 5 updates" in table[1][4]
