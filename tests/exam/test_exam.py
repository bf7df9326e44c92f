"""This project passes its own exam, and the exam notices what it asks about."""

import dataclasses
import json
import os
import signal
import subprocess
import sys
import time

import psutil
import pytest
import torch

from tests.exam import exam, work
from tests.exam.__main__ import main, options
from tests.exam.candidates import CANDIDATES
from tests.exam.table import table
from tests.exam.work import KINDS, WEIGHTS
from tests.running import ROOT


def write_updates(folder, number, epoch, steps, ids):
    text = "".join(f"{json.dumps({'epoch': epoch, 'step': step, 'ids': ids[step]})}\n" for step in steps)
    with (folder / f"trained-{number}.jsonl").open("a") as file:
        file.write(text)


def batches_of_three_epochs():
    kind = KINDS["pictures"]
    n = kind.epoch_steps
    return {step: list(range(step % n * kind.batch_size, (step % n + 1) * kind.batch_size)) for step in range(3 * n)}


def test_updates_that_a_resumed_run_does_again_count_once(tmp_path):
    ids, n = batches_of_three_epochs(), KINDS["pictures"].epoch_steps
    write_updates(tmp_path, 0, 0, range(n), ids)
    write_updates(tmp_path, 0, 1, range(n, n + 4), ids)
    write_updates(tmp_path, 1, 1, range(n + 2, 2 * n), ids)
    write_updates(tmp_path, 1, 2, range(2 * n, 3 * n), ids)
    assert exam.miscounted(tmp_path, "pictures") == (0, 0)


def test_a_batch_in_place_of_another_is_noticed(tmp_path):
    ids, n = batches_of_three_epochs(), KINDS["pictures"].epoch_steps
    for epoch in range(3):
        write_updates(tmp_path, 0, epoch, range(epoch * n, (epoch + 1) * n), {**ids, n + 3: ids[n]})
    assert exam.miscounted(tmp_path, "pictures") == (16, 16)


def test_the_probe_knows_each_digit_in_a_batch_of_any_normalization(tmp_path):
    probe, order = work.Job(tmp_path, "digits", resume=False, evaluate=False).probe, torch.randperm(KINDS["digits"].n_train)[:100]
    images, _ = work.digits(train=True)
    probe.trained((images[order] - 0.3) / 0.4, epoch=0, step=0, mean=0.3, std=0.4)
    assert exam.lines(tmp_path / "trained-0.jsonl") == [{"epoch": 0, "step": 0, "ids": order.tolist()}]


def test_the_measured_table_is_complete_and_this_project_fails_nowhere():
    results = json.loads((ROOT / "docs" / "measured" / "exam.json").read_text())
    assert len({result["candidate"] for result in results}) >= 6
    assert not [line for line in table(results).splitlines() if line.startswith("| this project") and "**" in line]
    mine = [result for result in results if result["candidate"] == "ours"]
    assert [len(result["resumed"]) for result in mine] == [6, 6]
    assert table(results) in (ROOT / "docs" / "reliability.md").read_text()


def test_one_bit_of_a_weight_is_a_difference(tmp_path):
    for name, value in (("a", 1.0), ("b", 1.0 + 2**-23)):
        (tmp_path / name).mkdir()
        torch.save({"w": torch.tensor([value, 2.0])}, tmp_path / name / WEIGHTS)
    assert exam.difference(tmp_path / "a", tmp_path / "a") == 0
    assert 0 < exam.difference(tmp_path / "a", tmp_path / "b") < 1e-6


def test_the_table_shows_failures_and_names_what_is_missing():
    wrong = exam.Resumed("SIGKILL at update 4", None, 0.25, 32, 16)
    failed = exam.Resumed("killed in a save", "exit code 1")
    result = exam.Result("lightning-steps", "digits", "2.6", 0.0, [wrong, failed], ["trained on", "error"], True)
    row = next(line for line in table([dataclasses.asdict(result)]).splitlines() if "2.6" in line)
    assert "**1 of 2**; error after: killed in a save" in row
    assert "off by up to 25.0%" in row
    assert "up to 32 again, 16 never" in row
    assert "**1 of 2**; trained on with it" in row
    assert "issues/19764" in row
    assert "Composer" in table([]).splitlines()[-1]


def test_a_mistake_on_the_command_line_is_an_error(tmp_path, capsys):
    (tmp_path / "file").touch()
    mistakes = {"keras": ["--frameworks", "keras"], "not empty": ["--keep", tmp_path], "no folder": ["--output", tmp_path / "x"]}
    for problem, argv in mistakes.items():
        with pytest.raises(SystemExit):
            options(list(map(str, argv)))
        assert problem in capsys.readouterr().err


def test_each_adapter_is_short_and_names_the_page_that_it_follows():
    for candidate in CANDIDATES.values():
        text = (ROOT / "tests" / "exam" / "adapters" / f"{candidate.adapter}.py").read_text()
        assert len(text.splitlines()) <= 80, candidate.adapter
        assert "https://" in text or "docs/" in text, candidate.adapter


@pytest.mark.slow
def test_this_project_passes_every_question(tmp_path):
    assert main(["--frameworks", "ours", "--output", str(tmp_path)]) == 0
    digits, pictures = json.loads((tmp_path / "exam.json").read_text())
    assert (digits["data"], pictures["data"]) == ("digits", "pictures")
    assert (len(digits["resumed"]), len(pictures["resumed"])) == (6, 6)
    for result in (digits, pictures):
        for resumed in result["resumed"]:
            assert (resumed["error"], resumed["difference"], resumed["twice"], resumed["never"]) == (None, 0, 0, 0), resumed
    assert digits["flips"] == ["fallback"] * 3
    assert digits["code_ran"] is False
    assert digits["counted"] == {"counted": KINDS["digits"].n_test, "twice": 0, "never": 0}


@pytest.mark.slow
def test_ctrl_c_ends_every_process_of_the_exam(tmp_path):
    words = [sys.executable, "-m", "tests.exam", "--frameworks", "ours", "--data", "pictures", "--keep", str(tmp_path / "kept")]
    process = subprocess.Popen(words, cwd=ROOT, env={**os.environ, "OMP_NUM_THREADS": "1"}, stderr=subprocess.DEVNULL)
    while not list(tmp_path.glob("kept/*/*/trained-0.jsonl")):
        assert process.poll() is None
        time.sleep(0.1)
    started = psutil.Process(process.pid).children(recursive=True)
    assert len(started) >= 3  # the examination, its fork server, a training
    process.send_signal(signal.SIGINT)
    process.wait(30)
    _, alive = psutil.wait_procs(started, timeout=20)
    assert alive == []
