"""Files that may come from a stranger."""

import os

import pytest

from models.loading.files import MalformedFile, read_limited, stays_inside


def test_a_file_is_read_up_to_its_limit_also_if_it_has_no_size(tmp_path):
    (tmp_path / "file").write_bytes(b"12345")
    assert read_limited(tmp_path / "file", 5) == b"12345"
    assert read_limited("/proc/self/stat").startswith(b"%d " % os.getpid())
    for path, limit in ((tmp_path / "file", 4), ("/proc/self/stat", 9)):
        with pytest.raises(MalformedFile, match=f"it has more than {limit} bytes"):
            read_limited(path, limit)


def test_a_message_on_a_malformed_file_is_one_line_without_control_characters():
    error = MalformedFile("a\nb/\x1b[31m.txt", "its name is \x1b[32m\nx")
    assert str(error) == "a?b/?[31m.txt: its name is ?[32m"
    assert error.problem == "its name is ?[32m"


def test_a_name_stays_inside_its_folder_unless_it_is_absolute_or_has_two_dots():
    assert all(map(stays_inside, ("a", "a/b.jpg", "./a", "a..b/..c", "a/ .. /b")))
    assert not any(map(stays_inside, ("..", "../a", "a/../../b", "/a", "a/..", "a\0b")))
