"""The model and the dataset of CONTRIBUTING.md work as printed, without a change to any other file."""

import re
import shutil
import subprocess
import sys

from tests.running import ROOT


def test_a_model_and_a_dataset_need_one_file_each_and_a_config(tmp_path):
    for name in ("main.py", "models", "datasets", "engine", "configs"):
        copy = shutil.copytree if (ROOT / name).is_dir() else shutil.copy
        copy(ROOT / name, tmp_path / name)
    text = (ROOT / "CONTRIBUTING.md").read_text()
    blocks = re.findall(r"```(?:python|yaml)\n(.+?)```", text, re.DOTALL)
    for name, block in zip(("models/tiny.py", "configs/tiny_noise.yaml", "datasets/noise.py"), blocks, strict=True):
        assert f"`{name}`" in text
        assert len([line for line in block.splitlines() if line.strip() and not line.startswith("#")]) <= 10
        (tmp_path / name).write_text(block)
    argv = [sys.executable, "main.py", "-c", "configs/tiny_noise.yaml", "-e", tmp_path / "run", "--model.width", "4"]
    finished = subprocess.run(argv, cwd=tmp_path, capture_output=True, text=True, check=False)
    assert finished.returncode == 0, finished.stderr
    assert "tiny" in finished.stdout
    assert "noise (200 images, 2 classes, 32x32)" in finished.stdout
