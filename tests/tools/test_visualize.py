import shutil

import pytest
from matplotlib.image import imread
from PIL import Image
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from engine.config.command_line import run_tool
from tests.running import ROOT, metrics, run_command, run_main
from tools.visualize import main

CIFAR = ROOT / "configs" / "resnet18_cifar10.yaml"
MODEL_PICTURES = ("predictions", "features", "embeddings", "gradcam", "confusion", "calibration")
RUN_PICTURES = ("data", "curves", "model", *MODEL_PICTURES)
SMALL = ("lenet", "resnet18", "googlenet", "vit")


def visualize(*argv):
    return run_tool(lambda: main([str(word) for word in argv]))


def _written(capsys):
    return [line for line in capsys.readouterr().out.splitlines() if line.startswith("wrote ")]


@pytest.mark.parametrize("argv", [(), ("schedules",), ("-c", CIFAR)])
def test_the_picture_is_a_required_argument(argv, capsys):
    assert visualize(*argv) == 2
    assert "WHAT" in capsys.readouterr().err


def test_help_has_examples_and_needs_no_torch():
    check = """
import contextlib, io, sys
from tools.visualize import main
for name in ("", *sys.argv[1:]):
    with contextlib.redirect_stdout(io.StringIO()) as help_text, contextlib.suppress(SystemExit):
        main([name, "--help"] if name else ["--help"])
    assert f"python tools/visualize.py {name or 'curves'} " in help_text.getvalue(), name
assert "torch" not in sys.modules
"""
    finished = run_command("python", "-c", check, *RUN_PICTURES, "schedule")
    assert finished.returncode == 0, finished.stderr


@pytest.mark.parametrize("picture", RUN_PICTURES)
@pytest.mark.parametrize(
    "model", ["lenet", "resnet18", *(pytest.param(name, marks=pytest.mark.slow) for name in ("googlenet", "vit"))]
)
def test_every_picture_can_be_drawn_of_every_run(small_runs, tmp_path, capsys, model, picture):
    path = tmp_path / "new" / "picture.png"
    assert visualize(picture, small_runs[model], "-o", path) == 0
    out = capsys.readouterr().out
    assert f"wrote {path}\n" in out
    height, width, _ = imread(path).shape
    assert 300 < width < 3000
    assert 150 < height < 3000


def test_a_picture_of_a_run_goes_into_its_folder_and_its_tensorboard(small_runs, tmp_path, capsys):
    others = shutil.ignore_patterns("figures", "pictures")  # written by other tests
    run = shutil.copytree(small_runs["lenet"], tmp_path / "run", symlinks=True, ignore=others)
    before = (run / "metrics.jsonl").read_text()
    assert visualize("confusion", run) == 0
    assert visualize("features", run) == 0
    written = [f"wrote {run / 'figures' / name}.png" for name in ("confusion", "features", "filters")]
    assert _written(capsys) == written
    pictures = EventAccumulator(str(run / "tensorboard" / "pictures"), size_guidance={"images": 0})
    pictures.Reload()
    assert sorted(pictures.Tags()["images"]) == ["confusion", "features", "filters"]
    (event,) = pictures.Images("confusion")
    height, width, _ = imread(run / "figures" / "confusion.png").shape
    assert (event.height, event.width, event.step) == (height, width, int((run / "ckpt" / "best").resolve().name[5:]))
    scalars = EventAccumulator(str(run / "tensorboard"))
    scalars.Reload()
    assert not scalars.Tags()["images"] or "confusion" not in scalars.Tags()["images"]

    assert run_main("-r", run, "--train.n_epochs", 7) == 0  # a picture doesn't disturb resuming
    assert (run / "metrics.jsonl").read_text().startswith(before[: before.rindex('{"step": 210')])
    assert metrics(run)[-1]["step"] == 245
    pictures.Reload()
    assert pictures.Images("confusion")


def test_a_picture_without_a_run_is_written_into_the_current_folder(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    Image.new("RGB", (40, 30), "teal").save("photo.png")
    assert visualize("features", "timm/test_resnet", "--model.pretrained", "false", "photo.png") == 0
    assert _written(capsys) == ["wrote features.png", "wrote filters.png"]
    assert sorted(path.name for path in tmp_path.glob("*.png")) == ["features.png", "filters.png", "photo.png"]


@pytest.mark.parametrize(
    ("argv", "code", "expected"),
    [
        (["confusion", "{folder}"], 1, "is neither a run folder with a checkpoint nor a checkpoint"),
        (["curves", "{folder}"], 1, "is not a run folder (it has no metrics.jsonl)"),
        (["data", "{folder}"], 1, "is not a run folder (it has no config.yaml)"),
        (["data"], 2, "give either a run or -c CONFIG"),
        (["data", "{lenet}", "--step", 100000], 2, "--step 100000: this run has the updates 0 to 209"),
        (["gradcam", "{lenet}", "{folder}/none.jpg"], 1, "none.jpg: no such image"),
        (["gradcam", "{lenet}", "{folder}/broken.jpg"], 1, "broken.jpg: this image can't be read"),
        (["predictions", "{lenet}", "{folder}/empty"], 1, "no image in this folder"),
        (["predictions", "{lenet}", "--samples", 3, 5000], 2, "there is no sample 5000: the split valid has 287"),
        (["predictions", "{lenet}", "--wrong", "--samples", 3], 2, "--wrong searches the whole split"),
        (["features", "{lenet}", "--layers", "conv3"], 2, "LeNet5 has no layer 'conv3'; similar names: conv"),
        (["gradcam", "{lenet}", "--layer", "conv3"], 2, "LeNet5 has no layer 'conv3'; similar names: conv"),
        (["gradcam", "{lenet}", "--target", "disk"], 2, "--target disk: no such class"),
        (["gradcam", "{lenet}", "--method", "rollout"], 2, "LeNet5 has no attention between all tokens"),
        (["gradcam", "{lenet}", "--method", "rollout", "--layer", "conv2"], 2, "--target and --layer are for --method gradcam"),
        (["features", "{googlenet}", "--layers", "aux1"], 2, "layer aux1 isn't used in evaluation mode"),
        (["curves", "{lenet}", "--smooth", 1], 2, "--smooth must be at least 0 and below 1"),
        (["curves", "{lenet}", "--train.n_steps", 1], 2, "--train.n_steps: curves show logged metrics"),
        (["embeddings", "{lenet}", "--n", 0], 2, "--n must be at least 1"),
        (["confusion", "{lenet}", "-o", "x.xyz"], 2, "ends in .png"),
        (["model", "{lenet}", "-o", "x.xyz"], 2, "ends in .png"),
        (["model"], 2, "give either a run"),
        (
            ["confusion", "{lenet}", "--data.name", "shapes", "--data.n_train", 8],
            1,
            "doesn't fit the config: size mismatch for conv1",
        ),
        (["confusion", "lenet", "-c", "configs/lenet_digits.yaml"], 2, "there are no published weights"),
        (["confusion", "{lenet}", "--ema"], 1, "has no averaged weights"),
    ],
)
def test_a_mistake_is_a_one_line_error_and_writes_nothing(small_runs, tmp_path, monkeypatch, capsys, argv, code, expected):
    monkeypatch.chdir(ROOT)
    (tmp_path / "empty").mkdir()
    (tmp_path / "broken.jpg").write_bytes(b"no image")
    names = {name: small_runs[name] for name in SMALL if any(f"{{{name}}}" in str(word) for word in argv)}
    words = [str(word).format(folder=tmp_path, **names) for word in argv]
    if "-o" not in words:
        words += ["-o", tmp_path / "picture.png"]
    assert visualize(*words) == code
    (message,) = [line for line in capsys.readouterr().err.splitlines() if line.startswith("error: ")]
    assert expected in message
    assert sorted(path.name for path in tmp_path.iterdir()) == ["broken.jpg", "empty"]
