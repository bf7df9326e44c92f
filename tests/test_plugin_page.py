"""The file and the commands of docs/plugins.md work as printed."""

import re
import shlex

import pytest

from tests.running import ROOT, run_command


@pytest.mark.slow
def test_the_commands_of_the_page_run(tmp_path):
    page = (ROOT / "docs" / "plugins.md").read_text()
    (tmp_path / "my_model.py").write_text(re.search(r"```python\n(.+?)```", page, re.DOTALL)[1])
    commands = re.search(r"```sh\n(.+?)```", page, re.DOTALL)[1].splitlines()
    assert len(commands) == 3
    for command in commands:
        paths = {"my_model.py": tmp_path / "my_model.py", "runs/small": tmp_path / "run"}
        words = [paths.get(word, word) for word in shlex.split(command)]
        words += ["--train.n_epochs", 2] if words[1] == "main.py" and "-r" not in words else []
        finished = run_command(*words)
        assert finished.returncode == 0, finished.stderr
