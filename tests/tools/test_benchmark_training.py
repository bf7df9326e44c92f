"""Both sides of the benchmarks do the work that is measured. No test depends on timing."""

import json
import os
from contextlib import closing
from dataclasses import asdict, replace
from functools import partial
from itertools import repeat

import psutil
import pytest

from datasets.pipeline import catalog
from engine import load_config
from engine.config.command_line import run_tool
from engine.config.errors import RunError
from tests.running import run_command
from tools import benchmark
from tools.benchmark import main
from tools.benchmarks import loops, model, ours, rivals
from tools.benchmarks.model import Setting
from tools.benchmarks.random_sets import write_cifar10
from tools.benchmarks.report import Options, Report, ratio
from tools.benchmarks.rivals import LENET
from tools.benchmarks.sides import InEnvironment, Length, Side, Speed, Turn, Turns, race, run_python


class Enough(BaseException):
    """Stops a side, which otherwise never returns."""


class Parent:
    """The other end of a side's connection: starts turns with these numbers of steps and keeps the reports."""

    def __init__(self, *turns: int) -> None:
        self.turns, self.reports = list(turns), []

    def send(self, report: object) -> None:
        self.reports.append(report)

    def recv(self) -> tuple[int, float]:
        if not self.turns:
            raise Enough
        return self.turns.pop(0), 0.0


def reports(work, *turns: int) -> list:
    """Run a side in this process, and return its reports except the first, of its start."""
    parent = Parent(*turns)
    with pytest.raises(Enough):
        work(Turns(parent))
    assert parent.reports[0].images == 0
    return parent.reports[1:]


@pytest.fixture(scope="module")
def job(tmp_path_factory):
    root = write_cifar10(tmp_path_factory.mktemp("cifar"), n_train=100, n_test=40)
    return replace(LENET, root=root, batch_size=8)


# Turns


def test_a_turn_has_the_requested_number_of_steps():
    assert [turn.images for turn in reports(lambda turns: list(turns.counted(repeat(None), 4)), 1, 3, 2)] == [4, 12, 8]


def test_the_end_of_the_batches_is_not_counted_as_a_step():
    def in_epochs(turns):
        while True:
            assert len(list(turns.counted(range(3), 4))) == 3

    assert [turn.images for turn in reports(in_epochs, 2, 2, 4)] == [8, 8, 16]


@pytest.mark.slow
def test_all_sides_process_the_same_number_of_images(job, tmp_path):
    works = {"ours": partial(ours.train, job, {}, tmp_path / "run"), "bare": partial(rivals.bare, job)}
    speeds = race(works, Length(warm_up=1, turns=2, steps=3), 1, "test")
    assert list(speeds) == ["ours", "bare"]
    for speed in speeds.values():
        assert [turn.images for turn in speed.quiet] == [3 * 8] * 2
        assert all(turn.core_seconds > 0 and turn.peak_mib > 50 for turn in speed.quiet)
        assert speed.cold[0].images == 7 * 8  # with the warm-up


def test_the_error_of_a_failed_side_has_its_reason():
    with pytest.raises(RunError, match=r"broken failed:(.|\n)*no_such_model"):
        race({"broken": partial(rivals.bare, rivals.Job("no_such_model"))}, Length(1, 1, 1), 1, "test")


@pytest.mark.slow
@pytest.mark.skipif(not hasattr(os, "setpgrp"), reason="there are no process groups")
def test_no_side_outlives_a_benchmark_that_is_killed(job):
    program = (
        "import os; from functools import partial; from pathlib import Path; from tools.benchmarks import rivals, sides\n"
        "if __name__ == '__main__':\n"
        f"    job = rivals.Job('lenet', batch_size=8, root=Path({str(job.root)!r}), workers=2)\n"
        "    side = sides.Side('one', partial(rivals.plain_script, job), 1)\n"
        "    side.turn(1)\n"
        "    import psutil; print(*(p.pid for p in psutil.Process(side._process.pid).children(True)), side._process.pid)\n"
        "    import sys; sys.stdout.flush(); os.kill(os.getpid(), 9)\n"
    )
    finished = run_command("python", "-c", program)
    pids = [int(pid) for pid in finished.stdout.split()]
    assert len(pids) == 3, finished.stderr  # with two workers
    _, alive = psutil.wait_procs([psutil.Process(pid) for pid in pids if psutil.pid_exists(pid)], timeout=30)
    assert not alive


# The sides


@pytest.mark.parametrize("side", [rivals.bare, rivals.plain_script, rivals.timm_loop])
def test_a_rival_trains(side, job, monkeypatch):
    network = job.new_model()
    before = {name: value.clone() for name, value in network.state_dict().items()}
    monkeypatch.setattr(rivals.Job, "new_model", lambda self: network)
    assert [turn.images for turn in reports(partial(side, job), 2, 1)] == [16, 8]
    assert all(not value.equal(before[name]) for name, value in network.state_dict().items())


@pytest.mark.slow
@pytest.mark.parametrize("side", [rivals.lightning, rivals.hf_trainer])
def test_a_trainer_of_another_package_trains(side, job, tmp_path, monkeypatch):
    pytest.importorskip("lightning" if side is rivals.lightning else "transformers")
    work = partial(side, job) if side is rivals.lightning else partial(side, job, tmp_path)
    test_a_rival_trains(lambda _, turns: work(turns), job, monkeypatch)


def test_the_rivals_read_what_the_engine_reads(job):
    from engine.build import read_data

    config = load_config(ours.config_of(job), ours.keys_of(job))
    read, theirs = read_data(config).train, rivals.cifar10(job.root)
    assert (read.images.permute(0, 2, 3, 1).numpy() == theirs.data).all()
    assert read.labels.tolist() == theirs.targets
    assert (config.train.optim.lr, config.train.optim.momentum, config.train.optim.weight_decay) == (job.lr, 0.9, 5e-4)


def test_an_evaluation_is_counted_batch_by_batch(job):
    work = partial(ours.evaluate, replace(job, batch_size=20))
    assert [turn.images for turn in reports(work, 1, 2, 3)] == [20, 40, 60]  # of 40 images: two batches, and again
    assert [turn.images for turn in reports(partial(rivals.bare_evaluation, job, 40), 1, 6)] == [8, 48]


# A model, and its fastest setting


def speed_of(rate: float, note: object) -> Speed:
    turn = Turn(8, 8 / rate, 1.0, note=note)
    return Speed([turn], [turn])


def first_update(setting: Setting) -> Speed:
    keys = {"model.name": "resnet18", "model.layers": [1, 1, 1, 1], "train.batch_size": 16, **setting.keys}
    (turn,) = reports(partial(ours.update, None, keys), 2)
    catalog.DATASETS.entries.pop(("random images", "classes"))  # so that the next call can register it
    return speed_of(1.0, turn.note)


def test_only_settings_with_the_same_first_update_agree():
    exact = first_update(Setting()).begin[-1].note
    for setting in (Setting(), Setting(channels_last=True), Setting(precision="bf16")):
        tried = model.compare(setting, first_update(setting), exact)
        assert tried["agrees"], tried
    wrong = {"loss": exact["loss"], "change": [2 * value for value in exact["change"]]}
    assert not model.compare(Setting(), speed_of(1.0, wrong), exact)["agrees"]
    wrong = {"loss": 1.1 * exact["loss"], "change": exact["change"]}
    assert not model.compare(Setting(precision="bf16"), speed_of(1.0, wrong), exact)["agrees"]


def tuned(rate_of):
    """Tune with made-up speeds, where torch.compile returns a wrong loss."""
    note = {"loss": 2.0, "change": [1.0, 2.0]}

    def race(settings):
        return {setting: speed_of(rate_of(setting), {**note, "loss": 3.0} if setting.compile else note) for setting in settings}

    return model.tune("lenet", race, Setting(), ["fp32", "bf16"], compiling=True)


@pytest.mark.parametrize(("has_instructions", "expected"), [(True, ("fp32", "bf16")), (False, ("fp32",))])
def test_a_processor_without_bf16_instructions_is_not_tried_in_bf16(has_instructions, expected, monkeypatch):
    monkeypatch.setattr("torch.cuda.is_available", lambda: False)
    monkeypatch.setattr(model, "has_bf16_instructions", lambda: has_instructions)
    assert model.fast_precisions() == expected


def test_the_fastest_setting_that_agrees_is_found():
    found = tuned(
        lambda s: 10.0 + 5 * (s.precision == "bf16") + 2 * s.channels_last + 100 * s.compile + s.keep_memory * s.channels_last
    ).json
    assert {key: found["keys"][f"train.{key}"] for key in ("precision", "channels_last", "compile", "keep_memory")} == {
        "precision": "bf16",
        "channels_last": True,
        "compile": False,
        "keep_memory": True,
    }
    (speedup,) = found["ratios"]
    assert speedup["ratio"] == speedup["ours"] / speedup["theirs"] == 1.8
    assert [one["agrees"] for one in found["rows"] if "compiled" in one["setting"]] == [False]


def test_a_hardly_faster_setting_is_not_chosen():
    assert tuned(lambda s: 10.0 + 0.1 * s.channels_last).json["keys"] == Setting().keys


def test_the_last_lines_of_tune_are_valid_config_lines(tmp_path):
    found = tuned(lambda s: 20.0 if s.precision == "bf16" else 10.0)
    path = tmp_path / "pasted.yaml"
    path.write_text("data: {name: digits}\nmodel: {name: lenet}\n" + found.text.split("\n\n")[-1] + "\n  n_epochs: 1\n")
    train = load_config(path).train
    assert {f"train.{name}": getattr(train, name) for name in asdict(Setting())} == found.json["keys"]


@pytest.mark.slow
def test_a_model_is_measured_in_every_setting(capsys):
    argv = ["model", "--quick", "--json", "--batch_sizes", "8", "--precisions", "fp32", "--layouts", "channels first"]
    assert run_tool(lambda: main([*argv, "--data.name", "CIFAR-10", "--data.img_size", "32"])) == 0  # without its files
    rows = json.loads(capsys.readouterr().out)["rows"]
    assert [(row["kind"], row["batch_size"], row["times"]) for row in rows] == [("inference", 8, 1.0), ("training", 8, 1.0)]
    assert all(row["ms"] == pytest.approx(8000 / row["images_per_sec"]) for row in rows)


def test_keys_that_the_benchmark_sets_are_refused(capsys):
    assert run_tool(lambda: main(["model", "--train.precision", "bf16"])) == 2
    assert run_tool(lambda: main(["memory", "--train.precision", "bf16"])) == 2
    assert capsys.readouterr().err.count("error: ") == 2


# Starting


def test_the_first_step_ends_the_measurement(tmp_path):
    assert loops.run_to_first_step(tmp_path, ["--train.n_epochs", "1"]) > 0
    (metrics,) = tmp_path.glob("*/metrics.jsonl")
    assert json.loads(metrics.read_text().splitlines()[0])["step"] == 1


def test_the_error_of_a_failed_start_has_its_reason(tmp_path):
    with pytest.raises(RunError, match="no such option"):
        loops.run_to_first_step(tmp_path, ["--model.no_such_key", "1", "--no_such_option", "1"])
    with pytest.raises(RunError, match="nothing_of_this_name"):
        run_python(["-c", "import nothing_of_this_name"])


def say_variable(turns):
    turns.note = os.environ.get("MALLOC_MMAP_THRESHOLD_")
    for _ in turns.counted(repeat(None), 1):
        pass


def test_a_side_starts_with_its_own_variables():
    variables = {"MALLOC_MMAP_THRESHOLD_": "123456789"}
    for work, expected in ((InEnvironment(say_variable, variables), "123456789"), (say_variable, None)):
        with closing(Side("a side", work, 1)) as side:
            assert side.start.note == expected


# The whole benchmark


def test_ratios_are_compared_with_their_targets():
    met, missed = ratio("a", "b", "s", 1.0, 4.0, at_most=0.3), ratio("a", "b", "images/s", 1.0, 4.0, at_least=0.3)
    assert met.ratio == missed.ratio == 0.25
    assert [(one.row["aim"], one.row[""]) for one in (met, missed, ratio("a", "b", "s", 1.0, 2.0))] == [
        ("at most 0.3", "reached"),
        ("at least 0.3", "missed"),
        ("", ""),
    ]


def test_all_writes_one_table_and_one_json_and_trains_with_the_tuned_setting(tmp_path, monkeypatch):
    commands = []

    def measured(words):
        commands.append(words)
        keys = {"keys": {"train.precision": "bf16", "train.compile": False}} if "--tune" in words else {}
        ratios = [asdict(ratio(words[0], "another", "s", 1.0, 2.0, at_most=1.0))]
        return Report({**keys, "left_out": ["lightning"], "ratios": ratios}, ""), None

    with monkeypatch.context() as patched:
        patched.setattr(benchmark, "run", measured)
        report = benchmark.everything(Options(quick=True))
    report.show("benchmark", as_json=False, folder=tmp_path)
    assert commands[1] == ["training", "--train.precision", "bf16", "--train.compile", "false", "--busy", "2", "--quick"]
    assert [words[0] for words in commands if "--busy" in words] == ["training", "data", "evaluation"]
    report = json.loads((tmp_path / "benchmark.json").read_text())
    table = (tmp_path / "benchmark.md").read_text()
    assert len(report["measured"]) == len(commands) == 9
    assert all(f"| {name} " in table for name in report["measured"])
    assert table.count("Left out: lightning.") == 1


def test_a_part_that_fails_costs_none_of_the_others(tmp_path, monkeypatch, capsys):
    everything = benchmark.everything

    def measured(words):
        if words[0] == "all":
            return everything(Options(quick=True)), Options(what="all", json=False, output=tmp_path)
        if words[0] in ("model", "growth"):
            raise RunError("it has no memory left")
        return Report({"left_out": [], "ratios": [asdict(ratio(words[0], "another", "s", 1.0, 2.0))]}, ""), None

    monkeypatch.setattr(benchmark, "run", measured)
    assert run_tool(lambda: benchmark.main(["all"])) == 1
    printed, report = capsys.readouterr().err, json.loads((tmp_path / "benchmark.json").read_text())
    assert "growth failed: it has no memory left" in printed
    assert "these failed, and are not in the report: model, growth" in printed
    assert (report["failed"], len(report["measured"])) == (["model", "growth"], 7)
    assert "Left out: growth, which failed." in (tmp_path / "benchmark.md").read_text()


@pytest.mark.slow
@pytest.mark.parametrize(
    "words",
    [
        ["training", "--only", "lenet"],
        ["training", "--only", "resnet", "--train.precision", "bf16"],
        ["start"],
        ["evaluation"],
        ["memory"],
        ["ranks"],
        ["growth"],
        ["checkpoint"],
        ["model", "--tune", "-c", "configs/resnet18_cifar10.yaml", "--train.batch_size", "8"],
    ],
    ids=" ".join,
)
def test_a_benchmark_runs_and_its_ratios_agree_with_its_speeds(words):
    finished = run_command("python", "tools/benchmark.py", *words, "--quick", "--json", timeout=900)
    assert finished.returncode == 0, finished.stderr
    printed = json.loads(finished.stdout)
    assert printed["ratios"]
    for one in printed["ratios"]:
        assert one["ours"] > 0
        assert one["ratio"] > 0
    if "--tune" in words:
        chosen = str(Setting(**{key.removeprefix("train."): value for key, value in printed["keys"].items()}))
        assert [one["agrees"] for one in printed["rows"] if one["setting"] == chosen] == [True]
