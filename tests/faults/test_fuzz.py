import json
from pathlib import Path

from tests.faults.fuzz import fuzz, mutants


def test_mutants_are_reproducible_and_differ():
    first = list(mutants(b'{"a": 12, "b": [3.5, "word"]}', 50))
    assert first == list(mutants(b'{"a": 12, "b": [3.5, "word"]}', 50))
    assert len(set(first)) > 40


def test_errors_that_are_not_allowed_are_found(tmp_path):
    file = tmp_path / "values.json"
    row = fuzz("values", {file: b'{"a": 12}'}, lambda: json.loads(file.read_bytes())["a"] + 1, (ValueError,), 60)
    assert row.tried == 60
    assert any("TypeError" in problem for problem in row.wrong)


def test_a_crash_and_too_much_memory_are_found(tmp_path):
    file = tmp_path / "numbers"
    file.write_bytes(b"12")

    def crash() -> None:
        import ctypes

        if file.read_bytes() == b"12":
            return
        ctypes.string_at(0)

    assert "the process ended with -11" in fuzz("numbers", {file: b"12"}, crash, (), 3).wrong[0]
    row = fuzz("numbers", {file: b"12"}, lambda: bytes(4 << 30), (), 2)
    assert all("MemoryError" in problem for problem in row.wrong)
    assert len(row.wrong) == 2
    assert Path(file).read_bytes() == b"12"
