import sys

import pytest

from engine.config.command_line import require_packages, run_tool
from engine.config.errors import ConfigError, RunError
from engine.plugins import Parser


def test_missing_packages_are_an_error_with_the_pip_command(monkeypatch):
    for module in ("optuna", "onnx"):
        monkeypatch.setitem(sys.modules, module, None)  # as if it were not installed
    require_packages("torch", needed_by="a tool")
    with pytest.raises(RunError, match=r"a tool needs packages that are not installed: onnx; pip install"):
        require_packages("torch", "onnx", needed_by="a tool")
    with pytest.raises(RunError, match="not installed: optuna, onnx; pip"):
        require_packages("optuna", "onnx", needed_by="a tool")


def test_options_can_appear_between_list_arguments():
    parser = Parser(prog="tool")
    parser.add_argument("source")
    parser.add_argument("images", nargs="*")
    parser.add_argument("--n", type=int)
    args, overrides = parser.parse_with_overrides(["run", "--n", "3", "a.jpg", "--seed", "1", "b.jpg"])
    assert (args.source, args.images, args.n, overrides) == ("run", ["a.jpg", "b.jpg"], 3, {"seed": 1})


@pytest.mark.parametrize("kind", [ConfigError, RunError])
def test_an_error_is_one_line_without_control_characters(kind, capsys):
    def fail():
        raise kind("class '\x1b[2J\x1b]0;title\x07\nok: \u202etxt.\udc80' is unknown" + 10_000 * "x")

    assert run_tool(fail) == kind.exit_code
    message = capsys.readouterr().err
    assert message.startswith(r"error: class '\x1b[2J\x1b]0;title\x07\nok: \u202etxt.\udc80' is unknown")
    assert len(message) < 5_000
