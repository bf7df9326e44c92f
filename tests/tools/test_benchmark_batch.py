"""The largest micro-batch is found by processes that may run out of memory."""

import json

import pytest

from engine.config.command_line import run_tool
from tests.running import ROOT
from tools.benchmark import main
from tools.benchmarks import batch

DIGITS = ("-c", ROOT / "configs" / "lenet_digits.yaml", "--train.batch_size", 60)


def find(*argv):
    return run_tool(lambda: main([str(word) for word in ("batch", *DIGITS, *argv)]))


@pytest.mark.parametrize(("largest", "expected"), [(60, 0), (59, 30), (30, 30), (29, 20), (6, 6), (1, 1)])
def test_equal_parts_are_as_large_as_fits(largest, expected, monkeypatch, capsys):
    tried = []

    def fits(config, keys, limit, size):
        tried.append(size)
        return 100.0 if size <= largest else None

    monkeypatch.setattr(batch, "fits_in_a_process", fits)
    assert find("--json") == 0
    assert json.loads(capsys.readouterr().out)["keys"] == {"train.micro_batch_size": expected}
    assert len(tried) == len(set(tried)) <= 5


def test_a_model_that_does_not_fit_at_all_is_an_error(monkeypatch, capsys):
    monkeypatch.setattr(batch, "fits_in_a_process", lambda *args: None)
    assert find() == 1
    assert "not even one image of lenet fits" in capsys.readouterr().err


@pytest.mark.slow
def test_processes_run_out_of_memory_and_other_failures_are_errors(capsys):
    whole = ("-c", "configs/resnet18_cifar10.yaml", "--train.batch_size", 400, "--train.num_threads", 1)
    keys = dict(zip((str(word)[2:] for word in whole[2::2]), whole[3::2], strict=True))
    assert batch.fits_in_a_process(whole[1], keys, 2**28, 400) is None
    assert batch.fits_in_a_process(whole[1], keys, None, 4) > 100
    with pytest.raises(batch.RunError, match="no_such_key"):
        batch.fits_in_a_process(whole[1], {**keys, "model.no_such_key": 1}, None, 4)
