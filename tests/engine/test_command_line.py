import sys

import pytest

from engine.command_line import expect_installed
from engine.errors import RunError


def test_packages_that_are_missing_are_named_with_the_command_that_installs_them(monkeypatch):
    for module in ("optuna", "onnx"):
        monkeypatch.setitem(sys.modules, module, None)  # as if it were not there
    expect_installed("torch", asked_by="a tool")
    with pytest.raises(RunError, match=r"a tool needs what is not installed: onnx; pip install -r requirements-extra\.txt"):
        expect_installed("torch", "onnx", asked_by="a tool")
    with pytest.raises(RunError, match="not installed: optuna, onnx; pip"):
        expect_installed("optuna", "onnx", asked_by="a tool")
