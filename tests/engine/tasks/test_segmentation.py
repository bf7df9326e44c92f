"""Segmentation with the same engine: loss, metric and runs."""

import json

import numpy as np
import pytest
import torch
from PIL import Image
from sklearn.metrics import accuracy_score, balanced_accuracy_score, confusion_matrix, jaccard_score
from torch import nn
from torch.nn import functional as F

from datasets.pipeline.masks import IGNORED, fitted
from engine import load_config
from engine.build import build
from engine.config.command_line import run_tool
from engine.devices.accelerator import make_accelerator
from engine.plots.overlays import write_mask
from engine.tasks.segmentation import Segmentation, dice_loss
from tests import on_disk
from tests.faults.children import AtStep, train
from tests.running import (
    ROOT,
    assert_same_weights,
    metrics,
    results,
    run_main,
    untimed,
    weights,
)
from tools.evaluate import main as evaluate

CLASSES = tuple("abcde")
GENERATOR = torch.Generator().manual_seed(0)
LOGITS = 3 * torch.randn(6, 5, 16, 16, generator=GENERATOR)
MASKS = torch.randint(0, 5, (6, 16, 16), generator=GENERATOR).to(torch.uint8)
MASKS[:, :3] = IGNORED
MASKS[0, :12] = IGNORED
VALID = MASKS != IGNORED


class ConstantModel(nn.Module):
    """A network that returns fixed outputs."""

    def __init__(self, *outputs):
        super().__init__()
        self.outputs = outputs

    def forward(self, images):
        return self.outputs if len(self.outputs) > 1 else self.outputs[0]


def compute_metric(task, batches, join=sum):
    """The metric of batches of (logits, masks), each on a separate rank."""
    sums = []
    for logits, masks in batches:
        metric = task.metric(torch.device("cpu"))
        metric.update(ConstantModel(logits), (torch.zeros(len(logits), 3, *logits.shape[-2:]), masks))
        sums.append(metric.sums())
    return task.metric(torch.device("cpu")).compute(join(sums))


class TestMetric:
    def test_matches_scikit_learn(self):
        task = Segmentation(CLASSES).with_tables("per_class", "confusion")
        result = compute_metric(task, [(LOGITS, MASKS)])
        true, predicted = MASKS[VALID].numpy(), LOGITS.argmax(1)[VALID].numpy()
        assert result["mIoU"] == pytest.approx(jaccard_score(true, predicted, average="macro"), abs=1e-12)
        assert list(result["per_class"].values()) == pytest.approx(jaccard_score(true, predicted, average=None), abs=1e-12)
        assert result["pixel_acc"] == accuracy_score(true, predicted)
        assert result["mean_acc"] == pytest.approx(balanced_accuracy_score(true, predicted), abs=1e-12)
        assert result["confusion"] == confusion_matrix(true, predicted).tolist()
        assert result["count"] == int(VALID.sum())
        expected = F.cross_entropy(LOGITS, MASKS.long(), ignore_index=IGNORED)
        assert result["loss"] == pytest.approx(expected.item(), rel=1e-6)

    def test_is_identical_for_any_ranks_and_batches(self):
        whole = compute_metric(Segmentation(CLASSES), [(LOGITS, MASKS)])
        parts = compute_metric(
            Segmentation(CLASSES), [(LOGITS[:1], MASKS[:1]), (LOGITS[1:4], MASKS[1:4]), (LOGITS[4:], MASKS[4:])]
        )
        assert parts.pop("loss") == pytest.approx(whole.pop("loss"), rel=1e-6)
        assert parts == whole

    def test_each_image_has_its_own_iou(self):
        task = Segmentation(CLASSES).with_tables("samples")
        halves = [(LOGITS[:2], MASKS[:2]), (LOGITS[2:], MASKS[2:])]
        join = lambda sums: [part for of_rank in sums for part in of_rank]  # noqa: E731
        result = compute_metric(task, halves, join)
        metric, scores = result.pop("samples")
        assert metric == "image IoU"
        predicted = LOGITS.argmax(1)
        expected = [
            jaccard_score(mask[valid].numpy(), classes[valid].numpy(), average="macro")
            for mask, classes, valid in zip(MASKS, predicted, VALID, strict=True)
        ]
        assert scores.tolist() == pytest.approx(expected, abs=1e-12)
        assert result == compute_metric(Segmentation(CLASSES), halves)

    def test_class_absent_from_masks_and_predictions_is_excluded(self):
        logits, masks = LOGITS.clone(), MASKS.clone()
        logits[:, 3] = -99
        masks[masks == 3] = 1
        result = compute_metric(Segmentation(CLASSES).with_tables("per_class"), [(logits, masks)])
        assert result["per_class"].pop("d") is None
        assert result["mIoU"] == np.mean(list(result["per_class"].values()))

    def test_masks_are_evaluated_at_full_size_without_padding(self):
        masks = [torch.randint(0, 5, size, generator=GENERATOR).to(torch.uint8) for size in ((40, 20), (9, 16))]
        true, predicted = [], []
        for logits, mask in zip(LOGITS, masks, strict=False):
            height, width = fitted(*mask.shape, 16)
            part = logits[None, :, :height, :width]
            full_size = part if (height, width) == mask.shape else F.interpolate(part, mask.shape, mode="bilinear")
            true.append(mask.flatten())
            predicted.append(full_size.argmax(1).flatten())
        result = compute_metric(Segmentation(CLASSES), [(LOGITS[:2], masks)])
        assert result["count"] == 40 * 20 + 9 * 16
        assert result["mIoU"] == pytest.approx(jaccard_score(torch.cat(true), torch.cat(predicted), average="macro"), abs=1e-12)

    def test_flip_averages_the_logits_of_flipped_images(self):
        class Sum(nn.Module):
            def forward(self, images):
                return torch.cat([images.cumsum(-1), images[:, :2]], dim=1)

        images, task = torch.randn(2, 3, 8, 8, generator=GENERATOR), Segmentation(CLASSES, tta="flip")
        expected = (Sum()(images) + Sum()(images.flip(-1)).flip(-1)) / 2
        assert torch.equal(task.logits(Sum(), images), expected)
        prediction = task.predict(Sum(), (images, torch.zeros(2, 8, 8, dtype=torch.uint8)))
        assert torch.equal(torch.stack(prediction), expected.argmax(1).to(torch.uint8))

    def test_no_valid_pixel_is_an_error(self):
        with pytest.raises(ValueError, match="these masks have no valid pixel"):
            compute_metric(Segmentation(CLASSES), [(LOGITS, torch.full_like(MASKS, IGNORED))])


class TestLoss:
    def test_is_the_mean_cross_entropy_of_valid_pixels_plus_the_auxiliary_loss(self):
        task, other = Segmentation(CLASSES, aux_weight=0.4), LOGITS.flip(0)
        loss, sums = task.loss_sum(ConstantModel(LOGITS, other), (LOGITS, MASKS))
        main, auxiliary = (F.cross_entropy(logits, MASKS.long(), ignore_index=IGNORED) for logits in (LOGITS, other))
        weight = task.weight((LOGITS, MASKS))
        assert weight == VALID.sum()
        torch.testing.assert_close(loss / weight, main + 0.4 * auxiliary)
        torch.testing.assert_close(sums["loss_aux1"] / weight, auxiliary)
        assert sums["pixel_acc"] == (LOGITS.argmax(1) == MASKS)[VALID].sum()

    def test_dice_loss_is_one_minus_the_overlap_of_probabilities_and_mask(self):
        p, expected = LOGITS.double().softmax(1).numpy(), 0.0
        for i in range(6):
            valid, overlaps = VALID[i].numpy(), []
            for c in range(5):
                in_class = MASKS[i].numpy()[valid] == c
                overlaps.append((2 * p[i, c][valid][in_class].sum() + 1) / (p[i, c][valid].sum() + in_class.sum() + 1))
            expected += (1 - np.mean(overlaps)) * valid.sum()
        assert dice_loss(LOGITS, MASKS.long()).item() == pytest.approx(expected, rel=1e-5)
        plain, with_dice = (
            Segmentation(CLASSES, dice_weight=w).loss_sum(ConstantModel(LOGITS), (LOGITS, MASKS))[0] for w in (0.0, 2.0)
        )
        assert (with_dice - plain).item() == pytest.approx(2 * expected, rel=1e-4)

    def test_dice_loss_is_zero_for_a_perfect_prediction_and_near_one_for_a_wrong_one(self):
        perfect = 100 * F.one_hot(MASKS.clamp(max=4).long(), 5).permute(0, 3, 1, 2).float()
        assert dice_loss(perfect, MASKS.long()).item() == pytest.approx(0, abs=1e-3)
        assert dice_loss(perfect.roll(1, dims=1), MASKS.long()) / VALID.sum() > 0.9

    @pytest.mark.parametrize("dice_weight", [0.0, 1.0])
    def test_batch_without_valid_pixels_has_zero_loss_and_zero_gradient(self, dice_weight):
        logits, nothing = LOGITS.clone().requires_grad_(), torch.full_like(MASKS, IGNORED)
        task = Segmentation(CLASSES, dice_weight=dice_weight)
        loss, _ = task.loss_sum(ConstantModel(logits), (logits, nothing))
        (loss / task.weight((logits, nothing))).backward()
        assert loss == logits.grad.abs().max() == 0


# Runs. Images don't affect each other: VGG has no BatchNorm and, without its head, no dropout; the head's BatchNorm is frozen.

SMALL = ("--task", "segmentation", "--data.name", "shapes", "--data.n_train", 32, "--data.n_test", 12, "--data.img_size", 32)
SMALL += ("--data.max_objects", 1, "--train.n_steps", 6, "--train.batch_size", 8, "--train.n_epochs", "null")
SMALL += ("--train.print_freq", 2, "--train.eval_freq", 3, "--train.save_freq", 3, "--train.num_threads", 1)
INDEPENDENT_IMAGES = (*SMALL, "--model.name", "vgg11", "--segmentation.head", "hrnet", "--train.freeze", "[classifier.1]")
INDEPENDENT_IMAGES += ("--augment.crop_padding", 12, "--train.optim.lr", 0.01, "--segmentation.dice_weight", 0.5)


def evaluate_output(capsys, *argv):
    capsys.readouterr()
    assert run_tool(lambda: evaluate([str(word) for word in argv])) == 0
    lines = capsys.readouterr().out.splitlines()
    return "\n".join(line for line in lines if not line.startswith("no separate validation split"))


@pytest.fixture(scope="module")
def one_batch(tmp_path_factory):
    run = tmp_path_factory.mktemp("runs") / "one"
    assert run_main("-e", run, *INDEPENDENT_IMAGES) == 0
    return run


@pytest.mark.slow
def test_micro_batches_of_any_size_match_the_whole_batch(one_batch, tmp_path):
    """Padded crops have different numbers of valid pixels, so a mean of means would give a different loss."""
    run = tmp_path / "run"
    assert run_main("-e", run, *INDEPENDENT_IMAGES, "--train.micro_batch_size", 3) == 0  # 3 + 3 + 2
    for line, reference in zip(metrics(run), metrics(one_batch), strict=True):
        for name in {"train/loss", "train/pixel_acc", "train/grad_norm"} & line.keys():
            assert line[name] == pytest.approx(reference[name], rel=1e-4), name
    last, reference = weights(run), weights(one_batch)
    assert all(torch.allclose(value, reference[name], rtol=1e-3, atol=1e-5) for name, value in last.items())


@pytest.mark.slow
def test_two_ranks_match_one_rank_in_training_and_evaluation(one_batch, tmp_path, capsys):
    run = tmp_path / "run"
    ended = train(run, *INDEPENDENT_IMAGES, ranks=2)
    assert ended.codes == [0, 0], ended.output
    assert json.loads((run / "environment.json").read_text())["world_size"] == 2
    for line, reference in zip(metrics(run), metrics(one_batch), strict=True):
        for name in {"train/loss", "train/grad_norm"} & line.keys():
            assert line[name] == pytest.approx(reference[name], rel=1e-4), name
    evaluated = json.loads(evaluate_output(capsys, run / "ckpt" / "latest", "--json"))
    last = results(run)["last"]
    assert all(last[f"valid/{name}"] == evaluated[name] for name in ("mIoU", "pixel_acc", "mean_acc", "count"))
    assert last["valid/loss"] == pytest.approx(evaluated["loss"], rel=1e-6)


def test_run_writes_metrics_log_and_figures(one_batch):
    lines = [line for line in metrics(one_batch) if "valid/mIoU" in line]
    assert [line["step"] for line in lines] == [3, 6]
    assert all(0 < line["valid/mIoU"] < line["valid/pixel_acc"] < 1 for line in lines)
    assert results(one_batch)["best"]["valid/mIoU"] == max(line["valid/mIoU"] for line in lines)
    assert results(one_batch)["macs"] > 1e6
    log = (one_batch / "output.log").read_text()
    assert f"valid loss {lines[1]['valid/loss']:.4g} mIoU {100 * lines[1]['valid/mIoU']:.2f} %" in log
    assert "best valid mIoU" in log
    assert "shapes (32 images, 11 classes, 32x32)" in log
    for name in ("curves", "predictions"):
        assert (one_batch / "figures" / f"{name}.png").stat().st_size > 10_000


RECIPE = (*SMALL, "--model.name", "resnet18", "--model.layers", "[1,1,1,1]", "--segmentation.aux_head", "true")
RECIPE += ("--augment.color_jitter", 0.3, "--augment.crop_padding", 4, "--train.ema", 0.9, "--train.clip_grad_norm", 1.0)
RECIPE += ("--train.optim.type", "AdamW", "--train.optim.lr", 0.001, "--train.optim.layer_decay", 0.8, "--train.freeze", "[stem]")
RECIPE += ("--train.sched.type", "PolynomialLR", "--train.precision", "bf16", "--train.micro_batch_size", 4, "--eval.tta", "flip")


def test_resumed_run_is_bit_exact(tmp_path):
    assert train(tmp_path / "whole", *RECIPE).codes == [0]
    assert train(tmp_path / "parts", *RECIPE, fault=AtStep(3, "SIGTERM")).codes == [143]
    assert train(tmp_path / "parts", "-r", "latest").codes == [0]
    assert_same_weights(weights(tmp_path / "whole"), weights(tmp_path / "parts"))
    whole, parts = (untimed(metrics(tmp_path / name)) for name in ("whole", "parts"))
    assert whole == parts
    assert "valid_ema/mIoU" in whole[-1]


@pytest.fixture(scope="module")
def pairs(tmp_path_factory):
    root = tmp_path_factory.mktemp("data")
    for part, n in (("train", 8), ("val", 3)):
        on_disk.write_pairs(root / part, n=n)
    return root


FILES = ("--task", "segmentation", "--data.name", "pairs", "--data.img_size", 32, "--train.n_steps", 4, "--train.batch_size", 4)
FILES += ("--train.n_epochs", "null", "--model.name", "resnet18", "--model.layers", "[1,1,1,1]", "--train.num_threads", 1)


def test_image_mask_pairs_train_with_any_number_of_workers_and_evaluate_at_full_size(pairs, tmp_path):
    for workers in (0, 2):
        argv = ("--data.dataroot", pairs, "--dataloader.num_workers", workers, "--augment.color_jitter", 0.2)
        assert run_main("-e", tmp_path / str(workers), *FILES, *argv, "--segmentation.head", "deeplabv3") == 0
    assert_same_weights(weights(tmp_path / "0"), weights(tmp_path / "2"))
    masks = [np.array(Image.open(path)) for path in (pairs / "val" / "masks").glob("*.png")]
    assert results(tmp_path / "0")["last"]["valid/count"] == sum(int((mask != IGNORED).sum()) for mask in masks)
    assert (tmp_path / "0" / "figures" / "predictions.png").is_file()


@pytest.mark.parametrize(
    ("argv", "fragments"),
    [
        (("--augment.mixup", 0.2), ["augment.mixup: 0.2", "task segmentation"]),
        (("--train.label_smoothing", 0.1), ["train.label_smoothing: 0.1", "task segmentation"]),
        (("--augment.cutout", 4), ["augment.cutout: 4", "task segmentation"]),
        (("--augment.zoom", "[1,2]"), ["augment.zoom: [1.0, 2.0]", "in files", "in memory"]),
        (("--augment.zoom", "[2,1]"), ["augment.zoom", "low <= high"]),
        (("--segmentation.head", "unet"), ["segmentation.head", "fcn or deeplabv3 or hrnet"]),
        (("--segmentation.heads", "fcn"), ["segmentation.heads", "did you mean segmentation.head"]),
        (("--task", "segmentatoin"), ["task", "did you mean segmentation"]),
        (("--task", "classification", "--segmentation.head", "hrnet"), ["segmentation.head: hrnet", "task classification"]),
        (("--task", "classification"), ["data.max_objects"]),
        (("--data.name", "digits"), ["data.name", "digits gives classes, not masks"]),
        (("--data.n_classes", 10), ["data.n_classes: 10", "11 classes"]),
        (("--model.name", "lenet", "--segmentation.head", "hrnet"), ["lenet", "reads 4 feature maps", "has 2"]),
        (("--model.name", "vgg11", "--segmentation.output_stride", 4), ["vgg11", "output_stride 4", "can't be dilated"]),
        (("--segmentation.output_stride", 0), ["segmentation.output_stride", "at least 1"]),
        (("--data.max_objects", 9), ["images of 48x48 and more with 9 objects"]),
    ],
)
def test_conflicting_options_are_a_one_line_error_before_training(tmp_path, argv, fragments, capsys):
    assert run_main("-e", tmp_path / "run", *SMALL, "--model.name", "resnet18", *argv) == 2
    line = capsys.readouterr().err.strip()
    assert len(line.splitlines()) == 1
    assert all(fragment in line for fragment in fragments), line
    assert not (tmp_path / "run").exists()


def test_invalid_mask_is_an_error_before_training(pairs, tmp_path, capsys):
    for part in ("train", "val"):
        on_disk.write_pairs(tmp_path / part, n=5)
    wrong = tmp_path / "val" / "masks" / "0001.png"
    mask = np.array(Image.open(wrong))
    mask[-1, -1] = 50
    Image.fromarray(mask).save(wrong)
    assert run_main("-e", tmp_path / "run", *FILES, "--data.dataroot", tmp_path, "--data.n_classes", 3) == 1
    message = capsys.readouterr().err.strip()
    assert message.startswith(f"error: {wrong}: the label 50 is out of range; there are 3 classes")
    assert not (tmp_path / "run").exists()


def test_output_stride_for_a_head_without_one_is_a_warning():
    options = {"task": "segmentation", "data.name": "shapes", "model.name": "resnet18", "segmentation.output_stride": 16}
    assert not load_config(None, options).notes
    (note,) = load_config(None, options | {"segmentation.head": "hrnet"}).notes
    assert "segmentation.output_stride (--segmentation.output_stride) has no effect with segmentation.head hrnet" in note


def test_config_is_passed_to_the_network_and_the_task():
    options = {"segmentation.head": "deeplabv3", "segmentation.output_stride": 16, "segmentation.aux_head": True}
    options |= {"segmentation.dice_weight": 0.5, "train.aux_weight": 0.4, "eval.tta": "flip", "model.name": "resnet18"}
    config = load_config(None, [*map(str, SMALL), *(f"--{key}={value}" for key, value in options.items())])
    run = build(config, make_accelerator(config.train, deterministic=config.deterministic))
    assert run.model.feature_info.reduction() == [16, 16]
    assert run.model.classifier[0].convs[1][0].dilation == (6, 6)
    assert (run.task.aux_weight, run.task.dice_weight, run.task.tta) == (0.4, 0.5, "flip")
    assert [name for name, _ in run.model.named_children()] == ["backbone", "classifier", "aux_classifier"]


def test_prediction_is_written_as_a_palette_png_of_class_indices(tmp_path):
    write_mask(MASKS[1], tmp_path / "mask.png")
    picture = Image.open(tmp_path / "mask.png")
    assert picture.mode == "P"
    assert np.array_equal(np.array(picture), MASKS[1].numpy())
    colors = {tuple(color) for color in np.array(picture.convert("RGB")).reshape(-1, 3).tolist()}
    assert len(colors) == 6


def test_evaluate_prints_per_class_iou(one_batch, capsys):
    head, *rows = evaluate_output(capsys, one_batch, "--per_class").splitlines()
    assert f"mIoU {100 * results(one_batch)['best']['valid/mIoU']:.2f} %" in head
    assert len(rows) == 11
    assert rows[0].split()[0] == "background"


@pytest.mark.slow
@pytest.mark.timeout(1200)
def test_resnet18_learns_to_segment_shapes(tmp_path):
    """A part of the config's training; docs/results.md has the whole."""
    short = ("--data.n_train", 1000, "--data.n_test", 100, "--train.n_epochs", 2, "--train.num_threads", 1)
    config = ROOT / "configs" / "segmentation_resnet18_shapes.yaml"
    assert run_main("-c", config, "-e", tmp_path / "run", *short) == 0
    assert results(tmp_path / "run")["best"]["valid/mIoU"] >= 0.2
