import sys

import pytest

from engine.config.command_line import require_packages
from engine.config.errors import RunError
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
