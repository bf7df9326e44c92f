import json
from importlib.util import find_spec

import pytest

from engine.config.command_line import run_tool
from tests.running import run_command
from tools.benchmark import main
from tools.benchmarks import sides
from tools.benchmarks.loops import measure_saves
from tools.benchmarks.random_sets import write_jpegs
from tools.benchmarks.report import Options
from tools.benchmarks.sides import Speed, Turn, take_turns


@pytest.fixture(scope="module")
def quick():
    finished = run_command("python", "tools/benchmark.py", "data", "--quick", "--num_workers", 1, "--num_threads", 1, "--json")
    assert finished.returncode == 0, finished.stderr
    return json.loads(finished.stdout)


@pytest.mark.slow
def test_every_input_pipeline_is_compared_with_every_rival(quick):
    found = {(row["comparison"].split(",")[-1].strip(), row["pipeline"]) for row in quick["rows"]}
    torchvision, timm = "torchvision's transforms on PIL", "timm's create_loader"
    assert found >= {("training", f"{torchvision}, {n} workers") for n in (0, 2)}
    assert found >= {(kind, name) for kind in ("training", "evaluation") for name in ("this project", timm, torchvision)}
    assert found >= {("training", name) for name in ("this project", "webdataset's loader, torchvision's transforms")}
    assert ("training", "the limit: gathered and normalized only") in found
    assert quick["left_out"] == []
    assert (quick["threads"], quick["workers"]) == (1, 1)


@pytest.mark.slow
def test_speedups_are_ratios_of_images_per_second(quick):
    for row in quick["rows"]:
        ours = next(r for r in quick["rows"] if r["comparison"] == row["comparison"])
        assert ours["pipeline"] == "this project"
        assert row["faster_by"] == pytest.approx(ours["images_per_sec"] / row["images_per_sec"])
        assert 0 < row["lowest"] <= row["images_per_sec"] <= row["highest"]


@pytest.mark.slow
def test_every_rival_has_a_ratio(quick):
    assert len(quick["ratios"]) == len([row for row in quick["rows"] if row["pipeline"] != "this project"]) > 0
    for one in quick["ratios"]:
        (row,) = (r for r in quick["rows"] if (r["comparison"], r["pipeline"]) == (one["what"], one["rival"]))
        assert one["ratio"] == pytest.approx(one["ours"] / one["theirs"]) == row["faster_by"]


def test_actions_take_turns():
    called = []
    actions = {name: lambda name=name: called.append(name) or len(called) for name in ("ours", "theirs")}
    assert take_turns(3, actions, "test") == {"ours": [1, 3, 5], "theirs": [2, 4, 6]}
    assert called == ["ours", "theirs"] * 3


def test_a_speed_is_the_median_of_the_turns_after_the_warm_up(monkeypatch):
    class Side:
        def __init__(self, name, work, threads):
            self.turns = iter([Turn(8, 8.0, 1.0, 5.0, "warm"), *(Turn(8, s, 2 * s, 6.0, None) for s in (1.0, 4.0, 2.0))])
            self.images, self.seconds = 32, 16.0

        def turn(self, steps, seconds=0.0):
            return next(self.turns)

        def close(self):
            pass

    monkeypatch.setattr(sides, "Side", Side)
    (speed,) = sides.race({"one": None}, sides.Length(2, turns=3), 1, "test").values()
    assert speed == Speed(4.0, 2.0, 8.0, 2.0, 24, 500.0, 6.0, "warm")


def test_a_rival_that_is_not_installed_is_named(monkeypatch, capsys):
    monkeypatch.setattr("tools.benchmarks.data.find_spec", lambda name: None if name == "timm" else find_spec(name))
    speed = Speed(1.0, 1.0, 1.0, 1.0, 1, 1.0, 1.0, None)
    monkeypatch.setattr("tools.benchmarks.data.race", lambda works, *_: dict.fromkeys(works, speed))
    assert run_tool(lambda: main(["data", "--quick"])) == 0
    printed = capsys.readouterr().out
    assert "left out: timm, which is not installed" in printed
    assert "this project" in printed
    assert "create_loader" not in printed


def test_the_generated_jpegs_have_the_documented_size(tmp_path):
    from PIL import Image

    write_jpegs(tmp_path, 80)
    files = sorted(tmp_path.glob("*/*.jpg"))
    assert len(files) == 80
    assert all(Image.open(path).size == (500, 375) for path in files)
    assert 55_000 < sum(path.stat().st_size for path in files) / 80 < 65_000


def test_a_command_is_required(capsys):
    assert run_tool(lambda: main([])) == 2
    assert run_tool(lambda: main(["date"])) == 2
    assert capsys.readouterr().err.count("error: ") == 2


@pytest.mark.slow
def test_a_checkpoint_is_compared_with_a_bare_save(tmp_path):
    saves = measure_saves(Options(quick=True, num_threads=1, folder=tmp_path))
    assert saves["times"] == pytest.approx(saves["ms"] / saves["bare_ms"])
    assert 85 < saves["megabytes"] < 95  # 11.17 M parameters and their momentum
