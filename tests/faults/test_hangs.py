"""A selection of the campaign of hangs. `make faults` runs all of it."""

import pytest

from tests.faults import hangs
from tests.faults.children import At

pytestmark = pytest.mark.xdist_group("faults")


def test_workers_that_cannot_start_end_the_run(tmp_path):
    limits = [hangs.FewFiles(5), hangs.NoMoreProcesses(3), hangs.SmallSharedMemory(64), hangs.LittleMemory(1)]
    row = hangs.workers_cannot_start(tmp_path, limits, ["images"])
    assert row.wrong == []
    assert row.tried == 4


def test_batches_that_cannot_be_handed_over_end_the_run(tmp_path):
    assert hangs.workers_cannot_start(tmp_path, [hangs.FewFiles(27), hangs.SmallSharedMemory(64)], ["boxes"]).wrong == []


def test_workers_that_read_from_a_pipe_end_the_run(tmp_path):
    assert hangs.workers_fail(tmp_path, [(hangs.InWorker("pipe", "valid"), 1)]).wrong == []


@pytest.mark.parametrize(
    "fault",
    [
        pytest.param(At("engine.build:read_data", "hang", rank=0), marks=pytest.mark.slow),
        At("engine.run.checkpoint:Checkpoints.save", "hang", rank=0),
        pytest.param(At("engine.train:_finish", "hang", rank=1), marks=pytest.mark.slow),
        At("engine.train:_draw_predictions", "SIGKILL", rank=0),
    ],
    ids=lambda fault: f"{fault.function.rpartition(':')[2]} {fault.what}",
)
def test_one_of_two_ranks_hangs_or_dies(fault, tmp_path):
    assert hangs.ranks_fail(tmp_path, [fault]).wrong == []


def test_signals_at_odd_moments(tmp_path):
    cases = [
        ("engine.build:read_data", "SIGTERM", 2),
        ("engine.build:read_data", "SIGINT SIGINT", 1),
        ("engine.update:Update.__call__", "SIGHUP", 1),
        ("engine.train:_test_best", "SIGINT", 1),
        ("engine.train:write_results", "SIGTERM", 1),
    ]
    assert hangs.signals_at_odd_moments(tmp_path, cases).wrong == []


@pytest.mark.slow
def test_both_ranks_save_when_torchrun_is_killed(tmp_path):
    assert hangs.launcher_is_killed(tmp_path, [(hangs.TORCHRUN, 2, "SIGKILL")]).wrong == []
