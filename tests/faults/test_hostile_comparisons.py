import os
import resource

from tests.faults.hostile_comparisons import compared, damaged_runs, mutated_runs, write_run


def test_300_mutants_of_a_run_are_compared_or_a_row_that_says_why(tmp_path):
    row = mutated_runs(tmp_path, 300)
    assert (row.tried, row.wrong) == (300, [])


def test_a_damaged_run_is_a_row_that_says_why(tmp_path):
    row = damaged_runs(tmp_path)
    assert row.tried >= 30
    assert row.wrong == []


def test_a_line_of_600_mb_in_metrics_jsonl_is_skipped_in_little_memory(tmp_path):
    good, run = write_run(tmp_path / "good"), write_run(tmp_path / "huge")
    with (run / "metrics.jsonl").open("ab") as file:
        file.truncate(600_000_000)  # zeros, on no disk
    os.truncate(run / "metrics.jsonl", 600_000_000)
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    ended = compared(good, run)
    assert ended.code == 0, ended.err
    assert ended.out.count("failed at step 20") == 2
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before < 50_000  # KiB
