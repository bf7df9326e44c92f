"""tools/gpu_results.py trains what fits in its time, and says what it could not do."""

import json
import sys

import pytest

from engine import RunError
from tests.faults.children import run_script
from tools import gpu_results


def test_the_last_line_of_a_command_is_its_result_or_its_error():
    assert gpu_results.call([sys.executable, "-c", "print('1')\nprint('= 8 passed in 3 s =')"]) == "8 passed in 3 s"
    with pytest.raises(RunError, match=r"^2 failed$"):
        gpu_results.call([sys.executable, "-c", "print('1')\nprint('2 failed')\nraise SystemExit(1)"])


def test_ten_models_come_after_what_is_wanted_most():
    parts = gpu_results.parts({}, quick=False)
    assert list(parts)[3] == "resnet18, 30 epochs"
    assert len(parts) == 13


@pytest.mark.slow
def test_every_part_is_tried_on_a_cpu(tmp_path, data_root):
    output, data = tmp_path / "results.json", f"CIFAR-10={data_root / 'CIFAR-10'}:random pixels"
    words = ("--device", "cpu", "--quick", "--minutes", 60, "--data", data, "-o", output)
    finished = run_script("tools/gpu_results.py", *words, timeout=500)
    assert finished.returncode == 0, finished.stderr
    written = json.loads(output.read_text())
    assert written["machine"].startswith("CPU, random pixels, ")
    tests, airbench, resumed, *models = written["table"][1:]
    assert " passed, " in tests[-1]
    assert airbench[-1].startswith("2 seeds; the first compiles, in ")
    assert resumed[-1] == "fp32, 6 updates of 8 images, killed after step-000002: all 122 tensors are equal, bit for bit"
    assert [row[-1] for row in models] == ["batch 32, bf16, channels_last"] * 10
    assert all(float(row[2].replace(",", "")) >= 0 and row[1].endswith(" %") for row in models)
