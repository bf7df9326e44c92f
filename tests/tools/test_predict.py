import csv
import io
import json
import os
import signal
import subprocess
import sys
import time

import numpy as np
import pytest
import torch
from PIL import Image

from engine.config.command_line import run_tool
from engine.inference.trained import load_trained
from tests import on_disk
from tests.running import ROOT, run_command, run_main
from tools.predict import main
from tools.predictions.formats import mask_paths


def predict(capsys, *argv, code=0):
    """Run predict.py; return its stdout and stderr."""
    capsys.readouterr()  # the output of a training in this process
    assert run_tool(lambda: main([str(word) for word in argv])) == code
    return capsys.readouterr()


def rows(text):
    return list(csv.DictReader(io.StringIO(text)))


@pytest.fixture(scope="module")
def digits(small_runs, tmp_path_factory):
    """The validation images of the run on digits, each in a file."""
    folder = tmp_path_factory.mktemp("digits")
    for i, image in enumerate(load_trained(small_runs["lenet"], {}).data.splits["valid"].images):
        Image.fromarray(image[0].numpy()).save(folder / f"{i:04d}.png")
    return folder


@pytest.fixture(scope="module")
def of_files(tmp_path_factory):
    """A run of a small network on images in files, and the folder of the images."""
    root = on_disk.write_image_folder(tmp_path_factory.mktemp("images"))
    data = ("--data.name", "imagefolder", "--data.dataroot", root, "--data.img_size", 32, "--augment.crop_pct", 0.8)
    model = ("--model.name", "resnet18", "--model.layers", "[1,1,1,1]")
    length = ("--train.n_steps", 6, "--train.batch_size", 8, "--dataloader.num_workers", 0)
    assert run_main("-e", root / "run", *data, *model, *length) == 0
    return root / "run", root / "val"


def probabilities(run, **options):
    """Return the predictions for the whole validation split, read from the dataset."""
    trained = load_trained(run, options)
    with torch.no_grad():
        of_batches = [trained.task.predict(trained.model, batch) for batch in trained.data.loader("valid").batches()]
    return torch.cat(of_batches), trained.classes


def test_images_of_an_in_memory_dataset_get_the_probabilities_of_its_evaluation(small_runs, digits, capsys):
    found = rows(predict(capsys, small_runs["lenet"], digits).out)
    expected, classes = probabilities(small_runs["lenet"])
    assert [row["filename"] for row in found] == [str(digits / f"{i:04d}.png") for i in range(len(expected))]
    assert [row["class"] for row in found] == [classes[c] for c in expected.argmax(1)]
    torch.testing.assert_close(torch.tensor([float(row["probability"]) for row in found]), expected.amax(1))


@pytest.mark.parametrize("resize", ["pillow", "torch"])
def test_images_in_files_get_the_probabilities_of_their_evaluation_for_any_batch_size_and_workers(of_files, resize, capsys):
    run, images = of_files
    expected, classes = probabilities(run, **{"eval.resize": resize})
    for options in ((), ("--batch_size", 2), ("--batch_size", 4, "--dataloader.num_workers", 2)):
        found = json.loads(predict(capsys, run, images, "--json", "--top_k", 3, "--eval.resize", resize, *options).out)
        assert len(found) == 3 * len(expected)
        for i, scores in enumerate(expected):
            of_image = found[3 * i : 3 * i + 3]
            assert len({row["filename"] for row in of_image}) == 1
            assert [row["class"] for row in of_image] == [classes[c] for c in scores.argsort(descending=True)]
            assert [row["probability"] for row in of_image] == pytest.approx(
                scores.sort(descending=True).values.tolist(), rel=1e-5
            )


def test_unreadable_images_are_listed_at_the_end_and_the_others_are_predicted(of_files, tmp_path, capsys):
    run, images = of_files
    good = sorted(images.rglob("*.jpg"))[0]
    (tmp_path / "a.jpg").write_bytes(b"no image")
    (tmp_path / "b.jpg").write_bytes(good.read_bytes())
    (tmp_path / "c.jpg").write_bytes(good.read_bytes()[:200])
    printed = predict(capsys, run, tmp_path, "-o", tmp_path / "out.csv", "--batch_size", 1, code=1)
    (found,) = rows((tmp_path / "out.csv").read_text())
    assert found["filename"] == str(tmp_path / "b.jpg")
    *named, last = printed.err.splitlines()
    assert [line.partition(":")[0] for line in named[-2:]] == [str(tmp_path / name) for name in ("a.jpg", "c.jpg")]
    assert last == "error: 2 of 3 images can't be read; the others are predicted"


def test_json_is_an_empty_list_if_no_image_can_be_read(of_files, tmp_path, capsys):
    (tmp_path / "a.jpg").write_bytes(b"no image")
    assert json.loads(predict(capsys, of_files[0], tmp_path / "a.jpg", "--json", code=1).out) == []


def test_file_names_that_are_not_utf8_are_written_as_their_bytes(of_files, tmp_path):
    run, images = of_files
    name = os.fsencode(tmp_path) + b"/caf\xe9.jpg"
    with open(name, "wb") as file:
        file.write(sorted(images.rglob("*.jpg"))[0].read_bytes())
    assert run_tool(lambda: main([str(run), str(tmp_path), "-o", str(tmp_path / "out.csv")])) == 0
    assert name in (tmp_path / "out.csv").read_bytes()


@pytest.mark.parametrize("architecture", ["resnet18", "googlenet", "vit"])
def test_every_architecture_predicts_a_photo(small_runs, architecture, tmp_path, capsys):
    Image.fromarray(np.random.default_rng(0).integers(0, 256, (50, 70, 3), dtype=np.uint8)).save(tmp_path / "photo.png")
    found = rows(predict(capsys, small_runs[architecture], tmp_path / "photo.png", "--top_k", 10).out)
    assert sum(float(row["probability"]) for row in found) == pytest.approx(1, abs=1e-4)
    assert {row["class"] for row in found} == set(load_trained(small_runs[architecture], {}).classes)


def test_a_model_name_is_accepted_instead_of_a_run(of_files, tmp_path, capsys):
    (image, *_) = sorted(of_files[1].rglob("*.jpg"))
    argv = ("timm/resnet10t", image, "--model.pretrained", "false", "--top_k", 2)
    assert len(rows(predict(capsys, *argv).out)) == 2


@pytest.mark.slow
def test_memory_does_not_grow_with_the_number_of_images(digits, small_runs, tmp_path):
    """Measured by the process itself, on many links to a few files."""
    images = sorted(digits.iterdir())
    for i in range(6000):
        name = tmp_path / ("few" if i < 200 else "many") / f"{i:05d}.png"
        name.parent.mkdir(exist_ok=True)
        name.symlink_to(images[i % len(images)])
    program = (
        "import sys, torch; from tools.predict import main; from engine.devices.memory import peak_memory\n"
        "for name in ('few', 'many'):\n"
        "    assert main([sys.argv[1], f'{sys.argv[2]}/{name}', '-o', f'{sys.argv[2]}/{name}.csv', *sys.argv[3:]]) == 0\n"
        "    print(peak_memory(torch.device('cpu')))"
    )
    argv = (small_runs["lenet"], tmp_path, "--dataloader.num_workers", 0, "--batch_size", 64)
    finished = run_command("python", "-c", program, *argv)
    assert finished.returncode == 0, finished.stderr
    _, few, _, many = finished.stdout.splitlines()
    assert len((tmp_path / "many.csv").read_text().splitlines()) == 1 + 5800
    assert float(many) - float(few) < 12  # MiB; the images alone, as floats, would be 17


def test_a_reader_that_closes_the_pipe_is_not_an_error(small_runs, digits):
    command = [sys.executable, "tools/predict.py", small_runs["lenet"], digits, "--top_k", "10"]
    process = subprocess.Popen(command, cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    assert process.stdout.readline() == "filename,class,probability\n"
    process.stdout.close()
    assert (process.wait(timeout=120), process.stderr.read()) == (0, "")


def test_ctrl_c_ends_the_program_and_its_workers(small_runs, digits, tmp_path):
    """The output for so many images doesn't fit into a pipe, so the program is still running when the signal comes."""
    images = sorted(digits.iterdir())
    for i in range(600):
        (tmp_path / f"{i:05d}.png").symlink_to(images[i % len(images)])
    command = [sys.executable, "-u", "tools/predict.py", small_runs["lenet"], tmp_path, "--dataloader.num_workers", "2"]
    process = subprocess.Popen(
        [*command, "--batch_size", "1", "--top_k", "10"],
        cwd=ROOT,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        start_new_session=True,
    )
    for _ in range(12):
        process.stdout.readline()
    os.killpg(process.pid, signal.SIGINT)
    process.stdout.read()
    assert (process.wait(timeout=60), process.stderr.read()) == (130, "interrupted\n")
    for _ in range(100):
        if not has_processes(process.pid):
            return
        time.sleep(0.1)
    pytest.fail("a worker is still running after the program ended")


def has_processes(group):
    try:
        os.killpg(group, 0)
    except ProcessLookupError:
        return False
    return True


@pytest.mark.parametrize(
    ("argv", "code", "expected"),
    [
        (["{tmp}/none.jpg"], 1, "none.jpg: no such image"),
        (["{tmp}/empty"], 1, "empty: no image in this folder (.jpg"),
        (["{tmp}/*.png"], 1, "*.png: no image matches"),
        ([], 2, "IMAGE"),
        (["{image}", "--top_k", "11"], 2, "--top_k 11: "),
        (["{image}", "--top_k", "0"], 2, "--top_k must be at least 1, got 0"),
        (["{image}", "--batch_size", "0"], 2, "--batch_size must be at least 1, got 0"),
        (["{image}", "--data.img_siz", "5"], 2, "did you mean data.img_size?"),
        (["{image}", "-o", "{image}/out.csv"], 1, "out.csv can't be written: "),
    ],
)
def test_a_mistake_is_a_one_line_error(small_runs, digits, tmp_path, capsys, argv, code, expected):
    (tmp_path / "empty").mkdir()
    words = [word.format(tmp=tmp_path, image=digits / "0000.png") for word in argv]
    printed = predict(capsys, small_runs["lenet"], *words, code=code)
    (line,) = printed.err.splitlines()
    assert line.startswith("error: ")
    assert expected in line


def test_a_path_without_a_run_is_a_one_line_error(digits, tmp_path, capsys):
    printed = predict(capsys, tmp_path, digits, code=1)
    assert printed.err == f"error: {tmp_path} is neither a run folder with a checkpoint nor a checkpoint\n"


def test_help_has_examples_and_needs_no_torch():
    check = "import sys; from tools.predict import main\ntry: main(['--help'])\nfinally: assert 'torch' not in sys.modules"
    finished = run_command("python", "-c", check)
    assert finished.returncode == 0, finished.stderr
    assert "python tools/predict.py runs/first photo.jpg" in finished.stdout


def test_masks_of_images_that_differ_in_the_suffix_have_different_names(tmp_path):
    names = ["/a/b/1.jpg", "/a/b/1.png", "/a/c/1.jpg"]
    assert mask_paths(tmp_path, names) == [tmp_path / name for name in ("b/1.jpg.png", "b/1.png.png", "c/1.jpg.png")]
    assert mask_paths(tmp_path, names[1:]) == [tmp_path / name for name in ("b/1.png", "c/1.png")]
