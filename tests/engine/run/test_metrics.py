"""metrics.jsonl after a power cut, and TensorBoard's files after a clock was set back."""

import time

from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from engine.run.folder import RunFolder
from engine.run.metrics import MetricsLog, read_metrics


def test_damaged_lines_are_skipped_with_a_warning(tmp_path, caplog):
    lines = [
        b'{"step": 1}\n',
        bytes(500) + b"\n",
        b'{"step": 2, "a": null}\n',
        b"[1]\n",
        b'{"step": "3"}\n',
        b'{"step": 4, "a": "x"}\n',
    ]
    (tmp_path / "metrics.jsonl").write_bytes(b"".join([*lines, b'{"step": 5}\n', b'{"step": 6']))
    assert [line["step"] for line in read_metrics(tmp_path)] == [1, 2, 5]
    assert f"{tmp_path / 'metrics.jsonl'}: 4 damaged lines are skipped, number 2 first" in caplog.text


def test_a_file_that_ends_inside_a_line_is_cut_to_whole_lines(tmp_path, caplog):
    (tmp_path / "metrics.jsonl").write_bytes(b'{"step": 1}\n{"step": 2}\n{"st')
    log = MetricsLog(RunFolder(tmp_path, is_new=False), step=3, metrics_bytes=36)
    log.record(4, {"a": 1.0})
    log.close()
    assert [line["step"] for line in read_metrics(tmp_path)] == [1, 2, 4]
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
