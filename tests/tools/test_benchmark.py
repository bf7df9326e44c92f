import json
import time
from functools import partial
from unittest import mock

import psutil
import pytest
from PIL import Image

from engine.config.command_line import run_tool
from tests.running import run_command
from tools.benchmark import main
from tools.benchmarks import data, sides
from tools.benchmarks.loops import checkpoint
from tools.benchmarks.random_sets import write_jpegs
from tools.benchmarks.report import Options
from tools.benchmarks.sides import Turn, take_turns


@pytest.fixture(scope="module")
def pictures(tmp_path_factory):
    """Three JPEGs, one of them gray, at several depths."""
    folder = tmp_path_factory.mktemp("pictures")
    for place, mode, size in (("a.jpg", "RGB", (300, 260)), ("b.JPEG", "L", (240, 250)), ("deep/er/c.jpg", "RGB", (90, 80))):
        (folder / place).parent.mkdir(parents=True, exist_ok=True)
        Image.new(mode, size, "gray").save(folder / place, format="JPEG")
    (folder / "notes.txt").write_text("no picture")
    return folder


def measured(*words):
    argv = ("data", "--quick", "--num_workers", 1, "--num_threads", 1, "--json", *words)
    finished = run_command("python", "tools/benchmark.py", *argv)
    assert finished.returncode == 0, finished.stderr
    return json.loads(finished.stdout)


@pytest.mark.slow
def test_every_installed_input_pipeline_is_compared():
    found = measured()
    pairs = {(row["what"].split(",")[-1].strip(), row["rival"]) for row in found["ratios"]}
    assert pairs >= {("training", name) for name in (data.PLAIN, data.PLAIN_2, "the limit: gathered and normalized only")}
    expected = {
        (kind, name) for kind in ("training", "evaluation") for name in (data.TIMM, data.DALI, data.ON_PIL, data.TORCHCODEC)
    }
    expected |= {("training", name) for name in (data.SHARDS, data.TURBO)} | {(data.FAST.split(", ")[1], data.DALI)}
    assert expected - pairs == {pair for pair in expected if any(line.startswith(pair[1]) for line in found["left_out"])}
    for row in found["ratios"]:
        assert row["unit"] == "core ms/image"
        assert row["ratio"] == pytest.approx(row["theirs"] / row["ours"])
        ours, theirs, ratio = row["images_per_sec"]
        assert ratio == pytest.approx(ours / theirs)


@pytest.mark.slow
def test_pictures_of_a_folder_are_measured_quiet_and_busy(pictures):
    found = measured("--images", pictures, "--busy", 1)
    titles = {row["what"] for row in found["ratios"]}
    kinds = (", training", ", evaluation", f", {data.FAST}", " in tar shards, training")
    quiet = {f"3 JPEGs to 224x224{kind}" for kind in kinds}
    assert titles - {f"{title}; beside busy processes" for title in quiet} <= quiet
    assert {f"{title}; beside busy processes" for title in titles & quiet} <= titles
    assert {"3 JPEGs to 224x224, training", "3 JPEGs to 224x224, evaluation"} <= titles


def test_a_folder_without_jpegs_is_refused(tmp_path, capsys):
    (tmp_path / "notes.txt").write_text("no picture")
    assert run_tool(lambda: main(["data", "--images", str(tmp_path)])) == 2
    assert capsys.readouterr().err == f"error: --images {tmp_path}: it has no JPEGs\n"


def test_every_picture_has_names_of_its_own(pictures, tmp_path):
    originals = sorted(path for path in pictures.rglob("*") if path.suffix.lower() in (".jpg", ".jpeg"))
    write_jpegs(tmp_path / "train", 7, originals)
    files = sorted((tmp_path / "train" / "class").iterdir())
    assert [file.read_bytes() for file in files] == [originals[i % 3].read_bytes() for i in range(7)]


def test_actions_take_turns():
    called = []
    actions = {name: lambda name=name: called.append(name) or len(called) for name in ("ours", "theirs")}
    assert take_turns(3, actions, "test") == {"ours": [1, 3, 5], "theirs": [2, 4, 6]}
    assert called == ["ours", "theirs"] * 3


@pytest.mark.parametrize(("seconds", "n_rounds"), [(1.0, 5), (25.0, 3), (100.0, 2)])  # of a round
def test_a_slow_machine_has_fewer_rounds(seconds, n_rounds):
    past = list[int]()
    with mock.patch.object(sides.time, "perf_counter", side_effect=lambda: seconds * len(past)):
        assert take_turns(5, {"only": partial(past.append, 1)}, "test") == {"only": [None] * n_rounds}


def race_of(quiet, busy):
    """Race two made-up sides, of which each turn is (images, seconds, core seconds), with one busy process."""

    class Side:
        start = Turn(0, 6.0, 3.0)

        def __init__(self, name, work, threads):
            self.name, self.quiet, self.busy = name, iter([(8, 8.0, 8.0), *quiet[name]]), iter(busy[name])

        def turn(self, steps, seconds=0.0, beside=()):
            return Turn(*next(self.busy if beside else self.quiet))

        both_turns = sides.Side.both_turns

        def close(self):
            pass

    with mock.patch.object(sides, "Side", Side):
        return sides.race(dict.fromkeys(quiet), sides.Length(2, turns=3), 1, "test", n_busy=1)


def test_figures_are_medians_and_ratios_those_of_the_rounds():
    ours, theirs = "this project", "the other"
    quiet = {ours: [(8, 1, 2), (8, 4, 8), (8, 2, 4)], theirs: [(8, 4, 8), (8, 4, 8), (8, 16, 4)]}
    busy = {ours: [(8, 2, 2), (8, 8, 8), (8, 4, 4)], theirs: [(8, 16, 8), (8, 16, 8), (8, 64, 4)]}
    speeds = race_of(quiet, busy)
    steady, beside, kept, kept_at_all = sides.speed_ratios("it", theirs, speeds, 1.5, kept=True)
    assert (steady.ours, steady.theirs, steady.ratio) == (500.0, 1000.0, 1.0)  # 1000 * core seconds / images; 4, 1, 1
    assert steady.images_per_sec == (4.0, 2.0, 4.0)  # 4, 1, 8
    assert (beside.what, beside.images_per_sec) == ("it; beside busy processes", (2.0, 0.5, 8.0))
    assert (kept.ours, kept.theirs, kept.ratio, kept.at_least) == (0.5, 0.25, 2.0, 1.0)
    assert (kept_at_all.ratio, kept_at_all.at_least) == (0.5, 0.4)
    assert sides.speed_ratio("it", theirs, speeds[ours].cold, speeds[theirs].cold).images_per_sec[0] == 32 / 21


def busy_processes():
    children = psutil.Process().children()
    return [child for child in children if child.status() != psutil.STATUS_ZOMBIE and sides.BUSY in child.cmdline()]


def test_busy_processes_work_only_in_busy_turns():
    class Stopped:  # in place of the process of a side
        is_alive = staticmethod(lambda: False)

    side = object.__new__(sides.Side)
    side._process, side._connection, states = Stopped, mock.Mock(), []

    def receive():
        time.sleep(0.05)  # until a signal has arrived
        states.append([process.status() == psutil.STATUS_STOPPED for process in busy_processes()])
        return Turn(1, 1.0, 1.0)

    side._receive, side.start, side.close = receive, Turn(0, 1.0, 1.0), mock.Mock()
    with mock.patch.object(sides, "Side", return_value=side):
        sides.race({"one": None}, sides.Length(1, turns=2), 1, "test", n_busy=1)
    assert states == [[True], [True], [False], [True], [False]]  # stopped in the warm-up, and in the quiet turns of two rounds
    assert not busy_processes()


def test_cpu_time_counts_workers_also_after_their_end():
    before = sides._core_seconds()
    run_command("python", "-c", "import time\nwhile time.process_time() < 0.3: pass")
    assert sides._core_seconds() - before >= 0.3


def test_a_rival_that_is_not_installed_is_named():
    works, left_out = sides.installed(
        {"this project": 1, "DALI": 2, "a package": 3}, {"DALI": "no_such_package.dali", "a package": "json"}
    )
    assert works == {"this project": 1, "a package": 3}
    assert left_out == ["DALI, as no_such_package.dali is not installed"]


def test_the_generated_jpegs_have_the_documented_size(tmp_path):
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
    found = checkpoint(Options(quick=True, num_threads=1, folder=tmp_path)).json
    assert [one["unit"] for one in found["ratios"]] == ["ms", "s"]
    assert 85 < found["megabytes"] < 95  # 11.17 M parameters and their momentum
