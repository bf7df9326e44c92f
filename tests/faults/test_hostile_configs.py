from tests.faults.hostile_configs import hostile_configs, mutated_configs


def test_300_mutants_of_a_config_load_or_are_one_line(tmp_path):
    row = mutated_configs(tmp_path, 300)
    assert (row.tried, row.wrong) == (300, [])


def test_hostile_configs_are_one_line(tmp_path):
    row = hostile_configs(tmp_path)
    assert row.tried >= 60
    assert row.wrong == []
