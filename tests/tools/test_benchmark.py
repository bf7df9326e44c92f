import json
from importlib.util import find_spec

import pytest

from engine.config.command_line import run_tool
from tests.running import run_command
from tools.benchmark import main
from tools.benchmarks.checkpoint import measure_saves
from tools.benchmarks.data import write_jpegs
from tools.benchmarks.measure import Comparison, Effort, measure, run

TINY = Effort(rounds=3, seconds=0.0, warm_up=2)


@pytest.fixture(scope="module")
def quick():
    finished = run_command("python", "tools/benchmark.py", "data", "--quick", "--num_workers", 1, "--num_threads", 1, "--json")
    assert finished.returncode == 0, finished.stderr
    return json.loads(finished.stdout)


def test_every_input_pipeline_is_measured_beside_its_rivals(quick):
    found = {(row["comparison"].split(",")[-1].strip(), row["pipeline"]) for row in quick["rows"]}
    torchvision, timm = "torchvision's transforms on PIL", "timm's create_loader"
    assert found >= {("training", f"{torchvision}, {n} workers") for n in (0, 2)}
    assert found >= {(kind, name) for kind in ("training", "evaluation") for name in ("this project", timm, torchvision)}
    assert ("training", "the limit: gathered and normalized only") in found
    assert quick["left_out"] == []
    assert (quick["threads"], quick["workers"]) == (1, 1)


def test_ratios_are_those_of_the_rates(quick):
    for row in quick["rows"]:
        ours = next(r for r in quick["rows"] if r["comparison"] == row["comparison"])
        assert ours["pipeline"] == "this project"
        assert row["faster_by"] == pytest.approx(ours["images_per_sec"] / row["images_per_sec"])
        assert 0 < row["lowest"] <= row["images_per_sec"] <= row["highest"]


def test_every_rival_is_beside_ours(quick):
    assert len(quick["ratios"]) == len([row for row in quick["rows"] if row["pipeline"] != "this project"]) > 0
    for one in quick["ratios"]:
        (row,) = (r for r in quick["rows"] if (r["comparison"], r["pipeline"]) == (one["what"], one["rival"]))
        assert one["ratio"] == pytest.approx(one["ours"] / one["theirs"]) == row["faster_by"]


def test_pipelines_take_turns_and_a_warm_up_is_not_counted():
    started = []

    def pipeline(name):
        def batches():
            started.append(name)
            while True:
                yield [0] * 8, None

        return batches

    rows = measure(Comparison("one", {"ours": pipeline("ours"), "theirs": pipeline("theirs")}), TINY)
    assert started == ["ours", "theirs"] * 3
    assert [row.pipeline for row in rows] == ["ours", "theirs"]
    taken = iter([([0] * 1000, None), ([0] * 1000, None), ([0] * 8, None)])
    assert run(taken, TINY)[0] == 8


def test_a_rival_that_is_not_installed_is_left_out_and_named(monkeypatch, capsys):
    monkeypatch.setattr("tools.benchmarks.data.find_spec", lambda name: None if name == "timm" else find_spec(name))
    monkeypatch.setattr("tools.benchmarks.measure.run", lambda batches, size: (1, 1.0, 1.0))
    assert run_tool(lambda: main(["data", "--quick"])) == 0
    said = capsys.readouterr().out
    assert "left out: timm, which is not installed" in said
    assert "create_loader" not in said


def test_the_generated_jpegs_have_the_size_that_is_claimed(tmp_path):
    from PIL import Image

    write_jpegs(tmp_path, 80)
    files = sorted(tmp_path.glob("*/*.jpg"))
    assert len(files) == 80
    assert all(Image.open(path).size == (500, 375) for path in files)
    assert 55_000 < sum(path.stat().st_size for path in files) / 80 < 65_000


def test_something_must_be_asked_for(capsys):
    assert run_tool(lambda: main([])) == 2
    assert run_tool(lambda: main(["date"])) == 2
    assert capsys.readouterr().err.count("error: ") == 2


def test_a_checkpoint_is_measured_beside_a_bare_save():
    saves = measure_saves(1)
    assert saves["times"] == pytest.approx(saves["ms"] / saves["bare_ms"])
    assert 85 < saves["megabytes"] < 95  # 11.17 M parameters, and as many momenta
