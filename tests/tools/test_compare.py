import csv
import io
import json
import shutil
import signal
import statistics
import subprocess
import sys
import time
from contextlib import redirect_stderr, redirect_stdout

import pytest

from engine.config.command_line import run_tool
from tests.running import ROOT, results, run_command
from tools.compare import main
from tools.comparison.training import Variant, environments, find_configs, make_variants

pytestmark = pytest.mark.usefixtures("plugins_of_this_module")

DIGITS = ROOT / "configs" / "lenet_digits.yaml"
SHORT = ("--train.n_steps", 20, "--train.eval_freq", 10, "--data.valid_ratio", 0.2)
PLUGIN = """
from engine.build import Data
from engine.tasks.classification import Classification

class Balanced(Classification):
    monitor = "balanced_acc"

TASKS = {"balanced": lambda config, data: Balanced(data.classes)}
"""


def compare(*argv, code=0):
    assert run_tool(lambda: main([str(word) for word in argv])) == code


def table(path):
    """Read a CSV by run, with numbers as floats."""
    with path.open() as file:
        return {line["run"]: {key: _number(value) for key, value in line.items()} for line in csv.DictReader(file)}


def _number(text):
    try:
        return float(text)
    except ValueError:
        return text


@pytest.fixture(scope="module")
def seeds(tmp_path_factory):
    """A folder with the runs of two seeds."""
    folder = tmp_path_factory.mktemp("seeds")
    compare("--train", DIGITS, "--seeds", "1", "-o", folder, *SHORT)
    with redirect_stdout(io.StringIO()) as output:
        compare("--train", DIGITS, "--seeds", "1,2", "-o", folder, *SHORT)
    lines = output.getvalue().splitlines()
    assert lines[0] == "lenet_digits-seed-1: is done already"
    assert lines[1].startswith("lenet_digits-seed-2: done in ")
    return folder


@pytest.fixture(scope="module")
def one_fails(tmp_path_factory, plugins_of_this_module):
    """A failing and a working config trained at the same time, with a plugin's metric: folder, stdout and stderr."""
    folder = tmp_path_factory.mktemp("one-fails")
    (folder / "plugin.py").write_text(PLUGIN)
    (folder / "a_fails.yaml").write_text("data: {name: MNIST, dataroot: nowhere, download: false}\nmodel: {name: lenet}\n")
    shutil.copy(DIGITS, folder / "b_digits.yaml")
    argv = ("--train", folder / "*.yaml", "--plugin", folder / "plugin.py", "--task", "balanced", "-o", folder / "runs")
    with redirect_stdout(io.StringIO()) as out, redirect_stderr(io.StringIO()) as err:
        compare(*argv, *SHORT, "--jobs", 2, "--train.batch_size", 64, "--csv", folder / "table.csv", code=1)
    return folder, out.getvalue(), err.getvalue()


@pytest.fixture(scope="module")
def runs(small_runs, tmp_path_factory):
    """Runs with every status: copies with changed files."""
    folder = tmp_path_factory.mktemp("runs")
    whole = small_runs["lenet"]
    for name in ("completed", "interrupted", "failed", "unfinished"):
        shutil.copytree(whole, folder / name, symlinks=True)
    for name, why in (("interrupted", None), ("failed", "the training diverged at step 30")):
        changed = results(whole) | {"status": name, "why": why, "step": 30, "macs": None}
        (folder / name / "results.json").write_text(json.dumps(changed))
    (folder / "unfinished" / "results.json").unlink()
    with (folder / "unfinished" / "metrics.jsonl").open("a") as file:
        file.write('{"step": 999, "valid')  # half written
    return folder


# The table


def test_table_has_the_numbers_of_results_json(small_runs, tmp_path):
    compare(*small_runs.values(), "--csv", tmp_path / "table.csv")
    rows = table(tmp_path / "table.csv")
    assert list(rows) == list(small_runs)
    for name, run in small_runs.items():
        expected, row = results(run), rows[name]
        for key in ("params", "macs", "images_per_sec", "wall_time", "peak_memory_mb", "status", "step"):
            assert row[key] == expected[key], key
        assert (row["metric"], row["n"], row["best_std"]) == ("acc@1", 1, "")
        assert (row["best"], row["last"]) == (expected["best"]["valid/acc@1"], expected["last"]["valid/acc@1"])
        assert row["test"] == expected["test"].get("test/acc@1", "")
    assert rows["lenet"]["test"] != ""


def test_terminal_and_markdown_show_rounded_numbers(small_runs, tmp_path, capsys):
    compare(small_runs["lenet"], small_runs["resnet18"], "--markdown", tmp_path / "table.md")
    head, _, lenet, resnet, wrote = capsys.readouterr().out.splitlines()
    assert wrote == f"wrote {tmp_path / 'table.md'}"
    titles = ("run", "model", "data", "status", "parameters", "MACs", "images/s", "time", "memory")
    assert head.split() == [*titles, "best", "acc@1", "last", "acc@1", "test", "acc@1"]
    expected = results(small_runs["lenet"])
    wanted = (
        f"{expected['params'] / 1e3:.1f} k",
        "0.42 M",
        f"{expected['images_per_sec']:,.0f}",
        f"{expected['wall_time']:.1f} s",
        f"{expected['peak_memory_mb']:,.0f} MB",
        *(
            f"{100 * expected[of][key]:.2f} %"
            for of, key in (("best", "valid/acc@1"), ("last", "valid/acc@1"), ("test", "test/acc@1"))
        ),
    )
    assert lenet.split() == " ".join(("lenet", "lenet", "digits", "completed", *wanted)).split()
    assert resnet.endswith(" -")  # it has no separate test split
    lines = (tmp_path / "table.md").read_text().splitlines()
    assert [cell.strip() for cell in lines[2].strip("|").split("|")] == ["lenet", "lenet", "digits", "completed", *wanted]


def test_seeds_of_one_config_are_one_row_with_mean_and_deviation(seeds, small_runs, tmp_path, capsys):
    compare(seeds, small_runs["lenet"], "--csv", tmp_path / "table.csv")
    of_seeds, other = table(tmp_path / "table.csv").values()
    expected = [results(seeds / f"lenet_digits-seed-{seed}") for seed in (1, 2)]
    assert (of_seeds["run"], of_seeds["n"], of_seeds["seeds"]) == ("lenet_digits", 2, "1 2")
    assert other["n"] == 1
    reached = {
        "best": [one["best"]["valid/acc@1"] for one in expected],
        "test": [one["test"]["test/acc@1"] for one in expected],
        "wall_time": [one["wall_time"] for one in expected],
    }
    for name, values in reached.items():
        assert of_seeds[name] == pytest.approx(statistics.mean(values), rel=1e-12)
        assert of_seeds[f"{name}_std"] == pytest.approx(statistics.stdev(values), rel=1e-9)
    shown = f"{100 * statistics.mean(reached['best']):.2f} ± {100 * statistics.stdev(reached['best']):.2f} %"
    assert shown in capsys.readouterr().out


def test_repeated_seeds_and_incomplete_runs_have_their_own_rows(seeds, tmp_path):
    for name, status in (("again", "completed"), ("cut-off", "interrupted")):
        shutil.copytree(seeds / "lenet_digits-seed-1", tmp_path / name, symlinks=True)
        changed = results(tmp_path / name) | {"status": status}
        (tmp_path / name / "results.json").write_text(json.dumps(changed))
    compare(seeds, tmp_path / "again", tmp_path / "cut-off", "--csv", tmp_path / "table.csv")
    assert {name: row["n"] for name, row in table(tmp_path / "table.csv").items()} == {
        "lenet_digits": 2,
        "again": 1,
        "cut-off": 1,
    }


def test_status_of_each_run_is_shown(runs, capsys):
    compare(runs)
    output = capsys.readouterr().out
    assert "failed at step 30 of " in output
    assert "interrupted at step 30 of " in output
    n_steps = results(runs / "completed")["n_steps"]
    (unfinished,) = [line for line in output.splitlines() if line.startswith("unfinished")]
    assert f"unfinished at step {n_steps} " in unfinished
    assert f"{100 * results(runs / 'completed')['best']['valid/acc@1']:.2f} %" in unfinished  # from its history
    assert "failed: the training diverged at step 30" in output


@pytest.mark.parametrize("word", ["{}", "{}/*", "{}/comple*", "{}/completed", "{}/completed/ckpt/best", "{}/../{name}/completed"])
def test_folders_globs_and_checkpoints_find_each_run_once(runs, word, capsys):
    compare(runs / "completed", word.format(runs, name=runs.name))
    lines = capsys.readouterr().out.splitlines()
    assert len([line for line in lines if line.startswith("completed ")]) == 1


def test_runs_with_the_same_name_show_their_parent_folder(runs, tmp_path, capsys):
    shutil.copytree(runs / "completed", tmp_path / "other" / "completed", symlinks=True)
    compare(runs / "completed", tmp_path / "other" / "completed", runs / "failed")
    first = [line.split()[0] for line in capsys.readouterr().out.splitlines()]
    assert first[2:5] == [f"{runs.name}/completed", "other/completed", "failed"]


def test_each_run_shows_its_monitored_metric(seeds, one_fails, capsys):
    folder, out, _ = one_fails
    expected = results(folder / "runs" / "b_digits")
    assert table(folder / "table.csv")["b_digits"]["best"] == expected["best"]["valid/balanced_acc"]
    assert "best balanced_acc" in out
    compare(seeds, folder / "runs")
    head, _, of_seeds, own = capsys.readouterr().out.splitlines()
    assert "metric" in head.split()
    assert " acc@1 " in of_seeds
    assert " balanced_acc " in own


# Differences


def test_diff_prints_only_differences(seeds, capsys):
    a, b = (seeds / f"lenet_digits-seed-{seed}" for seed in (1, 2))
    compare("--diff", a, b)
    config, data, machine, reached = capsys.readouterr().out.split("\n\n")
    assert [line.split() for line in config.splitlines()[2:]] == [["seed", "1", "2"]]
    assert {line.split()[0].split(".")[1] for line in data.splitlines()[2:]} == {"train", "valid", "test"}  # of each seed
    assert machine == "versions and machine: no difference"
    lines = {line.split()[0]: line.split()[1:] for line in reached.splitlines()[2:]}
    assert lines["best.valid/loss"] == [str(results(run)["best"]["valid/loss"]) for run in (a, b)]
    assert "params" not in lines


def test_diff_finds_versions_and_missing_keys(small_runs, runs, tmp_path, capsys):
    shutil.copytree(runs / "completed", tmp_path / "changed", symlinks=True)
    environment = json.loads((tmp_path / "changed" / "environment.json").read_text())
    environment["packages"]["torch"] = "1.0"
    (tmp_path / "changed" / "environment.json").write_text(json.dumps(environment))
    compare("--diff", runs / "completed", tmp_path / "changed")
    output = capsys.readouterr().out
    assert "packages.torch" in output
    assert "config: no difference" in output
    compare("--diff", small_runs["lenet"], small_runs["googlenet"])
    lines = [line.split() for line in capsys.readouterr().out.splitlines()]
    assert ["model.name", "lenet", "googlenet"] in lines
    assert ["data.n_train", "-", "192"] in lines


# Training


def test_same_command_skips_completed_runs(seeds, capsys):
    files = [seeds / f"lenet_digits-seed-{seed}" / "results.json" for seed in (1, 2)]
    before = [file.stat().st_mtime_ns for file in files]
    compare("--train", DIGITS, "--seeds", "1,2", "-o", seeds, *SHORT)
    lines = capsys.readouterr().out.splitlines()
    assert lines[:2] == [f"lenet_digits-seed-{seed}: is done already" for seed in (1, 2)]
    assert lines[4].startswith("lenet_digits ")  # the table includes them
    assert before == [file.stat().st_mtime_ns for file in files]


def test_another_config_in_the_same_folder_is_an_error_before_training(seeds, capsys):
    argv = ("--train", DIGITS, "--seeds", "9,1", "-o", seeds, *SHORT, "--dataloader.num_workers", 1)
    compare(*argv, "--train.optim.lr", 0.02, code=2)
    assert "seed-1 was trained with another config: train.optim.lr 0.01, not 0.02; another -o" in capsys.readouterr().err
    assert not (seeds / "lenet_digits-seed-9").exists()


def test_failure_is_reported_and_stops_no_other_training(one_fails):
    folder, out, err = one_fails
    assert "a_fails: failed with exit code 1: MNIST is not in nowhere" in out
    assert f"({folder / 'runs' / 'a_fails.log'})" in out
    assert err.startswith("error: 1 of 2 variants are not complete: a_fails failed")
    assert results(folder / "runs" / "b_digits")["status"] == "completed"
    assert "done" in (folder / "runs" / "b_digits.log").read_text()


@pytest.mark.slow
def test_ctrl_c_saves_checkpoints_and_the_same_command_resumes(tmp_path, capsys):
    argv = ["--train", DIGITS, "--seeds", "1,2", "--jobs", 1, "-o", tmp_path, "--train.n_steps", 200, "--train.print_freq", 5]
    process = subprocess.Popen(
        [sys.executable, "tools/compare.py", *map(str, argv)], cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    )
    log = tmp_path / "lenet_digits-seed-1.log"
    for _ in range(1200):
        if log.exists() and "step 5/200" in log.read_text():
            break
        time.sleep(0.1)
    process.send_signal(signal.SIGINT)
    out, err = process.communicate(timeout=120)
    assert process.returncode == 130, err
    stopped = results(tmp_path / "lenet_digits-seed-1")
    assert stopped["status"] == "interrupted"
    assert (tmp_path / "lenet_digits-seed-1" / "ckpt" / "latest").readlink().name == f"step-{stopped['step']:06d}"
    assert f"lenet_digits-seed-1: interrupted at step {stopped['step']} of 200" in out
    assert "lenet_digits-seed-2 not begun; the same command goes on" in err
    argv[3] = "1"
    compare(*argv)
    assert "lenet_digits-seed-1: done" in capsys.readouterr().out
    assert f"resuming at step {stopped['step']}" in log.read_text()
    assert results(tmp_path / "lenet_digits-seed-1")["step"] == 200


def test_globs_find_the_configs_of_a_family():
    def names(*words):
        return [path.stem for path in find_configs([str(ROOT / "configs" / word) for word in words])]

    assert names("resnet50_cifar10.yaml", "resnet1*_cifar10.yaml")[:2] == ["resnet50_cifar10", "resnet101_cifar10"]
    assert names("vgg1[1369]_cifar10.yaml") == ["vgg11_cifar10", "vgg13_cifar10", "vgg16_cifar10", "vgg19_cifar10"]
    assert len(names("resnet50_a[23]_imagenet.yaml")) == 2
    assert names("vgg11_cifar10.yaml", "vgg11*_cifar10.yaml").count("vgg11_cifar10") == 1


def test_each_model_and_seed_has_a_reproducible_run_folder(tmp_path):
    def variants(output=None):
        return make_variants([DIGITS], ["lenet", "timm/resnet10t"], [1, 2], {"train.optim.lr": 0.1}, output)

    made = variants()
    assert made == variants()
    assert len({variant.folder for variant in made}) == 4
    assert made[3] == Variant(
        "lenet_digits-timm-resnet10t-seed-2",
        DIGITS,
        {"train.optim.lr": 0.1, "model.name": "timm/resnet10t", "seed": 2},
        variants()[0].folder.parent / "lenet_digits-timm-resnet10t-seed-2",
    )
    assert str(made[0].folder.parent) == "runs/compare-lenet_digits-lenet-timm-resnet10t"
    assert variants(tmp_path)[0].folder == tmp_path / "lenet_digits-lenet-seed-1"


def test_simultaneous_trainings_get_separate_gpus_or_a_share_of_the_cores(monkeypatch):
    monkeypatch.delenv("OMP_NUM_THREADS", raising=False)
    monkeypatch.setattr("os.sched_getaffinity", lambda pid: range(8))
    monkeypatch.setattr("torch.cuda.is_available", lambda: False)
    assert [slot["OMP_NUM_THREADS"] for slot in environments(3)] == ["2", "2", "2"]
    assert environments(1) == [{}]
    monkeypatch.setattr("torch.cuda.is_available", lambda: True)
    monkeypatch.setattr("torch.cuda.device_count", lambda: 2)
    assert environments(2) == [{"CUDA_VISIBLE_DEVICES": "0"}, {"CUDA_VISIBLE_DEVICES": "1"}]
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "3,5,6")
    assert environments(2) == [{"CUDA_VISIBLE_DEVICES": "3"}, {"CUDA_VISIBLE_DEVICES": "5"}]
    with pytest.raises(Exception, match="--jobs 4: each variant is trained on its own device; found 3"):
        environments(4)


# Wrong options and damaged files


@pytest.mark.parametrize(
    ("argv", "code", "expected"),
    [
        ([], 2, "nothing to compare: give one of RUN, --diff, --train"),
        (["{runs}", "--train", DIGITS], 2, "RUN and --train: give one of"),
        (["{tmp}"], 1, "there is no run here"),
        (["{tmp}/none"], 1, "none: no such folder"),
        (["{tmp}/*"], 1, "there is no run here"),
        (["{runs}", "--seeds", "1"], 2, "--seeds is for --train"),
        (["{runs}", "--train.n_steps", "1"], 2, "--train.n_steps: a key of the config is for --train"),
        (["{runs}", "--png", "runs.xyz"], 2, "ends in .png"),
        (["{runs}", "--show"], 2, "--show is for --png"),
        (["{runs}", "--csv", "{runs}/completed/config.yaml/x.csv"], 1, "x.csv can't be written"),
        (["--diff", "{runs}", "{runs}"], 2, "expected two runs, these are 4"),
        (["--diff", "{runs}/completed", "{runs}/failed", "--html", "a.html"], 2, "--html and --diff"),
        (["--train", "{tmp}/*.yaml"], 2, "*.yaml: no config has such a name"),
        (["--train", "configs/lenet_digit.yaml"], 2, "did you mean configs/lenet_digits.yaml?"),
        (["--train", DIGITS, "--seeds", "1,x"], 2, "--seeds"),
        (["--train", DIGITS, "--seeds", "1", "--seed", "2"], 2, "--seeds and --seed"),
        (["--train", DIGITS, "--seeds", "1,1"], 2, "--seeds 1,1: each seed once"),
        (["--train", DIGITS, "--jobs", "0"], 2, "--jobs must be at least 1, got 0"),
        (["--train", DIGITS, "--models", "lenets"], 2, "model.name"),
        (["--train", DIGITS, "--train.n_step", "1"], 2, "did you mean train.n_steps?"),
    ],
)
def test_wrong_options_are_one_line_errors(runs, tmp_path, monkeypatch, capsys, argv, code, expected):
    monkeypatch.chdir(ROOT)
    capsys.readouterr()
    compare(*(str(word).format(runs=runs, tmp=tmp_path) for word in argv), code=code)
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith("error: ")
    assert expected in line


def test_a_damaged_run_has_a_row_and_a_reason_in_every_output(runs, tmp_path, capsys):
    shutil.copytree(runs / "completed", tmp_path / "damaged", symlinks=True)
    (tmp_path / "damaged" / "results.json").write_text('{"status": ')
    outputs = ("--markdown", tmp_path / "a.md", "--csv", tmp_path / "a.csv", "--html", tmp_path / "a.html", "--mistakes", 0)
    compare(runs / "completed", tmp_path / "damaged", *outputs, "--png", tmp_path / "a.png")
    printed = capsys.readouterr()
    reason = "results.json: it is not JSON"
    assert "unreadable" in printed.out
    assert reason in printed.out
    assert printed.err == "warning: 1 of 2 runs can't be read\n"
    assert reason in (tmp_path / "a.md").read_text()
    assert reason in (tmp_path / "a.html").read_text()
    assert table(tmp_path / "a.csv")["damaged"]["status"] == "unreadable"
    compare(tmp_path / "damaged", code=1)
    assert reason in capsys.readouterr().err
    compare("--diff", runs / "completed", tmp_path / "damaged", code=1)
    assert reason in capsys.readouterr().err


def test_help_has_examples_and_does_not_import_torch():
    check = "import sys; from tools.compare import main\ntry: main(['--help'])\nfinally: assert 'torch' not in sys.modules"
    finished = run_command("python", "-c", check)
    assert finished.returncode == 0, finished.stderr
    assert "python tools/compare.py --train configs/resnet{50,101,152}_cifar10.yaml" in finished.stdout
