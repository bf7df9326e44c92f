"""Log lines on the terminal and in output.log."""

import logging

from engine.run.log import Line, add_log_file, remove_log_file, set_up_terminal
from tests.running import run_main

HOSTILE = "cat\x1b[31m\x1b]0;title\x07\u202e"
ESCAPED = r"cat\x1b[31m\x1b]0;title\x07\u202e"


def test_control_characters_are_escaped_on_the_terminal_and_in_the_file(tmp_path, capsys):
    set_up_terminal(is_main=True)
    handler = add_log_file(tmp_path / "output.log")
    logging.getLogger("models").warning("the class %s is unknown\n\tsee above", HOSTILE)
    remove_log_file(handler)
    expected = f"warning: the class {ESCAPED} is unknown\n\tsee above\n"
    assert capsys.readouterr().out == expected
    assert (tmp_path / "output.log").read_text() == expected


def test_tools_without_a_log_print_warnings_in_the_same_form():
    assert isinstance(logging.lastResort.formatter, Line)


def test_names_of_folders_are_escaped_in_a_training(tmp_path, capsys):
    run = tmp_path / "run\x1b[31m"
    assert run_main("-e", run, "--train.n_steps", 2, "--train.batch_size", 8) == 0
    for text in (capsys.readouterr().out, (run / "output.log").read_text()):
        assert r"run folder " in text
        assert r"run\x1b[31m" in text
        assert "\x1b" not in text
