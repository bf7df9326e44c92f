"""Knowledge distillation: a student trained on a teacher's logits."""

import math

import numpy as np
import pytest
import torch
from scipy.special import log_softmax, softmax

from engine import load_config
from engine.build import build
from engine.devices.accelerator import make_accelerator
from engine.optim.distillation import distillation_loss
from engine.train import train_batches
from models import create_model
from tests.faults.campaign import SMALL
from tests.running import metrics, results, run_main, weights

pytestmark = pytest.mark.usefixtures("plugins_of_this_module")

SHAPES = (*SMALL, "--data.name", "shapes", "--data.img_size", 32, "--data.n_test", 2000, "--data.difficulty", 0)


@pytest.fixture(scope="module")
def teacher(tmp_path_factory):
    run = tmp_path_factory.mktemp("runs") / "teacher"
    assert run_main("-e", run, *SMALL, "--train.n_steps", 40) == 0
    return run


def test_loss_per_sample_is_the_scaled_kl_divergence():
    random = np.random.default_rng(0)
    student, teacher = random.normal(0, 3, (5, 7)), random.normal(0, 3, (5, 7))
    expected = []
    for s, t in zip(student / 4, teacher / 4, strict=True):
        expected.append(4**2 * float(np.sum(softmax(t) * (log_softmax(t) - log_softmax(s)))))
    ours = distillation_loss(torch.from_numpy(student), torch.from_numpy(teacher), temperature=4.0)
    assert ours.tolist() == pytest.approx(expected, rel=1e-5)
    assert distillation_loss(torch.ones(2, 3), torch.zeros(2, 3), 2.0).tolist() == pytest.approx([0, 0], abs=1e-6)


@pytest.mark.parametrize("weight", [0.3, 1.0])
def test_loss_is_the_weighted_sum_of_teacher_and_label_losses(teacher, weight):
    options = {"train.n_steps": 2, "train.num_threads": 1}
    plain_config = load_config(None, options)
    plain = build(plain_config, make_accelerator(plain_config.train, deterministic=plain_config.deterministic))
    config = load_config(None, {**options, "distill.teacher": str(teacher), "distill.temperature": 2.0, "distill.weight": weight})
    run = build(config, make_accelerator(config.train, deterministic=config.deterministic))
    batch = next(train_batches(run, 0))
    label_loss = plain.task.loss_sum(plain.model, batch)[0].item()
    assert all(torch.equal(a, b) for a, b in zip(run.model.parameters(), plain.model.parameters(), strict=True))
    loss, sums = run.task.loss_sum(run.model, batch)
    teacher_model = create_model("lenet", n_classes=10, in_channels=1, img_size=28)
    teacher_model.load_state_dict(weights(teacher, "best"))
    teacher_loss = distillation_loss(run.model(batch[0]), teacher_model(batch[0]), 2.0).sum().item()
    assert sums["loss_distill"].item() == pytest.approx(teacher_loss, rel=1e-5)
    assert loss.item() == pytest.approx((1 - weight) * label_loss + weight * teacher_loss, rel=1e-5)


def test_student_trains_and_evaluates_and_its_checkpoint_excludes_the_teacher(teacher, tmp_path):
    run = tmp_path / "student"
    argv = ("-e", run, *SMALL, "--train.n_steps", 20, "--train.print_freq", 10, "--distill.teacher", teacher)
    assert run_main(*argv, "--augment.mixup", 0.5) == 0
    assert weights(run).keys() == create_model("lenet").state_dict().keys()
    assert all(math.isfinite(line["train/loss_distill"]) for line in metrics(run))
    assert "valid/acc@1" in results(run)["best"] | results(run)["last"]


def test_named_teacher_accepts_a_weights_file_and_model_arguments(tmp_path):
    model = create_model("resnet18", n_classes=10, in_channels=1, img_size=28, first_block="cifar10", layers=(1, 1, 1, 1))
    torch.save(model.state_dict(), tmp_path / "weights.pth")
    teacher = ("--distill.teacher", "resnet18", "--distill.first_block", "cifar10", "--distill.layers", "[1,1,1,1]")
    argv = ("-e", tmp_path / "run", *SMALL, "--train.n_steps", 2, *teacher, "--distill.pretrained", tmp_path / "weights.pth")
    assert run_main(*argv) == 0


def test_timm_model_can_be_the_teacher(tmp_path):
    import timm

    torch.save(timm.create_model("test_resnet", num_classes=10, in_chans=1).state_dict(), tmp_path / "weights.pth")
    argv = ("-e", tmp_path / "run", *SMALL, "--train.n_steps", 2, "--distill.teacher", "timm/test_resnet")
    assert run_main(*argv, "--distill.pretrained", tmp_path / "weights.pth") == 0


class TestBadInput:
    @pytest.mark.parametrize(
        ("argv", "fragments"),
        [
            (("nowhere",), ["distill.teacher", "neither a run folder nor a model", "nowhere"]),
            (("resnet18",), ["has learned nothing", "distill.pretrained"]),
            (("resnet18", "--distill.widht", 3), ["distill.widht", "no such argument"]),
            (("TEACHER", "--distill.layers", "[1]"), ["distill.layers", "is a run of this project"]),
            (("TEACHER", "--distill.weight", 1.5), ["distill.weight", "at most 1"]),
            (("TEACHER", "--data.name", "shapes", "--data.n_train", 64), ["distill.teacher", "don't fit", "conv1.weight"]),
        ],
    )
    def test_is_a_one_line_error_before_training(self, teacher, tmp_path, capsys, argv, fragments):
        argv = [teacher if word == "TEACHER" else word for word in argv]
        assert run_main("-e", tmp_path / "run", *SMALL, "--distill.teacher", *argv) == 2
        line = capsys.readouterr().err.strip()
        assert len(line.splitlines()) == 1
        assert all(fragment in line for fragment in fragments), line
        assert not (tmp_path / "run").exists()

    @pytest.mark.parametrize("as_run", [False, True])
    def test_teacher_with_another_number_of_classes_is_an_error_with_both_numbers(self, tmp_path, capsys, as_run):
        if as_run:
            teacher_argv = (tmp_path / "teacher",)
            argv = ("--data.name", "shapes", "--data.n_train", 64, "--train.batch_size", 32, "--train.n_steps", 1)
            assert (
                run_main("-e", teacher_argv[0], *SMALL, "--plugin", _three_classes(tmp_path), *argv, "--data.name", "three") == 0
            )
            teacher_argv += ("--plugin", _three_classes(tmp_path))
        else:
            model = create_model("lenet", n_classes=3, in_channels=1, img_size=28)
            torch.save(model.state_dict(), tmp_path / "weights.pth")
            teacher_argv = ("lenet", "--distill.pretrained", tmp_path / "weights.pth")
        capsys.readouterr()
        assert run_main("-e", tmp_path / "run", *SMALL, "--distill.teacher", *teacher_argv) == 2
        line = capsys.readouterr().err.strip()
        assert "has 3 classes, and digits has 10" in line

    def test_distillation_settings_without_a_teacher_are_a_warning(self):
        notes = load_config(None, {"distill.temperature": 2.0}).notes
        assert any("distill.temperature" in note and "no effect" in note for note in notes)


def _three_classes(folder):
    path = folder / "three.py"
    path.write_text(
        "import torch\n"
        "from datasets.pipeline.splits import DatasetSpec, Images, Loaded\n"
        "def load(source, *, n_train: int = 64):\n"
        "    split = Images(torch.zeros(64, 1, 28, 28, dtype=torch.uint8), torch.arange(64) % 3)\n"
        "    return Loaded(split, split, ('a', 'b', 'c'))\n"
        "DATASETS = [DatasetSpec('three', load, channels=1, img_size=28, mean=(0.5,), std=(0.5,))]\n"
    )
    return path


@pytest.mark.slow
def test_distillation_improves_the_student(tmp_path):
    """LeNet trained on 300 shapes, with a small ResNet trained on 3,000 as its teacher."""
    assert run_main("-c", "configs/resnet18_shapes.yaml", "-e", tmp_path / "teacher", *SHAPES, *TEACHER) == 0
    distill_options = ("--distill.teacher", tmp_path / "teacher", "--distill.weight", 0.7, "--distill.temperature", 2)
    for name, options in (("alone", ()), ("taught", distill_options)):
        assert run_main("-c", "configs/lenet_shapes.yaml", "-e", tmp_path / name, *SHAPES, *STUDENT, *options) == 0
    teacher, alone, taught = (results(tmp_path / name)["last"]["valid/acc@1"] for name in ("teacher", "alone", "taught"))
    assert teacher > taught > alone + 0.02


TEACHER = ("--data.n_train", 3000, "--model.layers", "[1,1,1,1]", "--train.n_epochs", 5, "--train.batch_size", 64)
STUDENT = ("--data.n_train", 300, "--train.n_epochs", 100, "--train.batch_size", 50, "--train.eval_freq", 600)
