"""A selection of the fault campaign. The slow tests and `python -m tests.faults` run all of it."""

import re

import pytest

from tests.faults import campaign
from tests.faults.children import AtStep, InEvaluation, KillAtOperation

pytestmark = pytest.mark.xdist_group("faults")


def test_a_killed_run_resumes_and_equals_an_uninterrupted_one(tmp_path):
    operations = campaign.operations(tmp_path)
    places = ("os.fsync .*/.environment.json", "open .*/ckpt/.step-000006.*/manifest.json", "os.rename .*/ckpt/.step-000008")
    places += ("os.symlink .*step-000018",)
    faults = [KillAtOperation(next(n for n, name in enumerate(operations) if re.search(place, name))) for place in places]
    faults += [AtStep(9, "SIGKILL"), InEvaluation("SIGKILL")]
    row = campaign.kill_points(tmp_path, faults)
    assert row.tried == 6
    assert row.wrong == []


@pytest.mark.parametrize(("feature", "n_workers", "n_ranks"), [("augmentation", 2, 1), ("mixing", 0, 2)])
def test_a_run_interrupted_twice_in_an_epoch_ends_with_the_same_bits(tmp_path, feature, n_workers, n_ranks):
    row = campaign.resume_matrix(tmp_path, [feature], [n_workers], [n_ranks])
    assert row.tried == 1
    assert row.wrong == []


def test_a_flipped_bit_in_a_checkpoint_is_detected_and_its_file_named(tmp_path):
    assert campaign.flipped_bytes(tmp_path, 60).wrong == []


def test_code_in_a_pickle_does_not_run(tmp_path, capsys):
    row = campaign.pickles(tmp_path)
    assert capsys.readouterr().out == ""  # stdout is for the table
    assert row.tried == 4
    assert row.wrong == []


@pytest.mark.slow
@pytest.mark.timeout(1800)  # each of the hundred operations: a run that is killed, and its resumption
@pytest.mark.parametrize(
    ("part", "at_least"), [("operations", 100), ("moments", 40), ("writes", 20), ("flips", 200), ("pickles", 4)]
)
def test_each_part_of_the_whole_campaign(tmp_path, part, at_least):
    row = campaign.PARTS[part](tmp_path)
    assert row.wrong == []
    assert row.tried >= at_least


@pytest.mark.slow
@pytest.mark.parametrize("feature", campaign.FEATURES)
def test_each_feature_in_the_whole_resume_matrix(tmp_path, feature):
    row = campaign.resume_matrix(tmp_path, [feature])
    assert row.wrong == []
    assert row.tried == 4
