"""metrics.jsonl after a power cut, and TensorBoard's files after a clock was set back."""

import json
import time

from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from engine.run.folder import RunFolder
from engine.run.metrics import MetricsLog, read_metrics


def line(step, **values) -> bytes:
    return json.dumps({"step": step, "epoch": 0.5, "elapsed": 1.0, **values}).encode() + b"\n"


def test_damaged_lines_are_skipped_with_a_warning(tmp_path, caplog):
    lines = [line(1), bytes(500) + b"\n", line(2, a=None), b"[1]\n", line("3"), line(4, a="x"), line(5), line(6)[:-2]]
    (tmp_path / "metrics.jsonl").write_bytes(b"".join(lines))
    assert [values["step"] for values in read_metrics(tmp_path)] == [1, 2, 5]
    assert f"{tmp_path / 'metrics.jsonl'}: 4 damaged lines are skipped, number 2 first" in caplog.text


def test_a_file_that_ends_inside_a_line_is_cut_to_whole_lines(tmp_path, caplog):
    (tmp_path / "metrics.jsonl").write_bytes(line(1) + line(2) + line(3)[:9])
    log = MetricsLog(RunFolder(tmp_path, is_new=False), step=3, metrics_bytes=len(line(1) + line(2) + line(3)))
    log.record(4, {"epoch": 1.0, "elapsed": 2.0})
    log.close()
    assert [values["step"] for values in read_metrics(tmp_path)] == [1, 2, 4]
    assert "earlier lines are lost" in caplog.text


def test_tensorboard_reads_the_steps_in_order_after_the_clock_was_set_back(tmp_path, monkeypatch):
    now = time.time()
    for session, clock in enumerate((now, now - 3600, now - 7200)):
        monkeypatch.setattr("time.time", lambda clock=clock: clock)
        log = MetricsLog(RunFolder(tmp_path, is_new=False), step=10 * session, metrics_bytes=0)
        for step in range(1, 11):
            log.record(10 * session + step, {"train/loss": 1.0})
        log.close()
    events = EventAccumulator(str(tmp_path / "tensorboard")).Reload()
    assert [event.step for event in events.Scalars("train/loss")] == list(range(1, 31))
    assert len(list((tmp_path / "tensorboard").iterdir())) == 3
