"""A selection of the hostile run folders and checkpoints. `make faults` tries all of them."""

import pytest

from tests.faults import hostile_runs

pytestmark = pytest.mark.xdist_group("faults")


def test_mutants_of_a_checkpoint_open_or_are_refused_in_one_line(tmp_path):
    row = hostile_runs.mutants(tmp_path, 300)
    assert row.tried == 300
    assert row.wrong == []


def test_a_hostile_run_folder_changes_nothing_outside_of_it(tmp_path):
    row = hostile_runs.folders(tmp_path, lambda i: i % 4 == 0)
    assert row.tried > 20
    assert row.wrong == []
