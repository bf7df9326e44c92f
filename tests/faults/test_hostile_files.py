"""Dataset files from a stranger: a selection of the mutants. `make faults` tries all of them."""

import pytest

from tests.faults.hostile_files import CASES, PARTS

MUTATED = [name for name in PARTS if name != "by hand"]


@pytest.mark.parametrize("part", MUTATED)
def test_mutants_of_a_file_are_read_as_valid_data_or_refused_in_one_line(tmp_path, part):
    row = PARTS[part](tmp_path, n=300)
    assert row.tried == 300
    assert row.wrong == []


def test_files_made_by_hand_are_refused_in_one_line_or_change_nothing(tmp_path):
    row = PARTS["by hand"](tmp_path)
    assert row.tried == len(CASES) > 200
    assert row.wrong == []
