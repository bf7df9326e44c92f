"""Detection with the same engine: metric and runs."""

import contextlib
import io
import json
from itertools import pairwise

import numpy as np
import pytest
import torch
from pycocotools.coco import COCO
from pycocotools.cocoeval import COCOeval
from torch import nn

from datasets.pipeline.boxes import as_target
from engine import load_config
from engine.build import build
from engine.config.command_line import run_tool
from engine.devices.accelerator import make_accelerator
from engine.tasks.detection import Detection, learned_from
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

CLASSES = ("background", "a", "b", "N/A", "c")
LABELS = np.array([1, 2, 4])


def boxes(random, n):
    corner, size = random.uniform(0, 150, (n, 2)), random.uniform(4, 120, (n, 2))
    return np.concatenate([corner, corner + size], axis=1)


def scenes(n=30, seed=0):
    """Random targets, with crowds and one empty image, and predictions, most near a target and some elsewhere."""
    random, targets, predictions = np.random.default_rng(seed), [], []
    for i in range(n):
        true_boxes = boxes(random, 0 if i == 3 else random.integers(1, 9))
        rows = np.column_stack(
            [true_boxes, random.choice(LABELS, len(true_boxes)), random.random(len(true_boxes)) < 0.15, 0.8 * _area(true_boxes)]
        )
        targets.append(as_target(torch.from_numpy(rows)))
        near = true_boxes + random.normal(0, 5, true_boxes.shape)
        found = np.concatenate([near, boxes(random, 3)])
        labels = np.concatenate([np.where(random.random(len(true_boxes)) < 0.8, rows[:, 4], 1), random.choice(LABELS, 3)])
        scores = torch.from_numpy(random.random(len(found)))
        predictions.append(
            {"boxes": torch.from_numpy(found).float(), "labels": torch.from_numpy(labels).long(), "scores": scores.float()}
        )
    return predictions, targets


def _area(corners):
    return (corners[:, 2] - corners[:, 0]) * (corners[:, 3] - corners[:, 1])


class FixedDetector(nn.Module):
    """A detector with fixed predictions: the first pixel of an image is the index of its prediction."""

    def __init__(self, predictions):
        super().__init__()
        self.predictions, self.calls = predictions, []

    def forward(self, images):
        self.calls.append(len({image.shape for image in images}))
        return [self.predictions[int(image[0, 0, 0])] for image in images]


def indexed_images(n):
    """Images of two alternating sizes, filled with their index."""
    return [torch.full((3, 8 + i % 2, 8), float(i)) for i in range(n)]


def metric_sums(predictions, targets, ends, task=None):
    metric, images = (task or Detection(CLASSES)).metric(torch.device("cpu")), indexed_images(len(targets))
    for begin, end in pairwise(ends):
        metric.update(FixedDetector(predictions), (images[begin:end], targets[begin:end]))
    return metric.sums()


def coco_reference(predictions, targets):
    """A pycocotools evaluation, with its twelve COCO metrics."""
    truth = {
        "images": [{"id": i} for i in range(len(targets))],
        "categories": [{"id": int(c)} for c in LABELS],
        "annotations": [],
    }
    for i, target in enumerate(targets):
        for (x, y, right, bottom), label, crowd, area in zip(
            *(target[k].tolist() for k in ("boxes", "labels", "iscrowd", "area")), strict=True
        ):
            one = {"id": len(truth["annotations"]) + 1, "image_id": i, "bbox": [x, y, right - x, bottom - y]}
            truth["annotations"].append({**one, "category_id": label, "iscrowd": int(crowd), "area": area})
    found = [entry for i, prediction in enumerate(predictions) for entry in Detection(CLASSES).entries(prediction, i)]
    with contextlib.redirect_stdout(io.StringIO()):
        coco = COCO()
        coco.dataset = truth
        coco.createIndex()
        evaluation = COCOeval(coco, coco.loadRes(found), "bbox")
        evaluation.evaluate()
        evaluation.accumulate()
        evaluation.summarize()
    return evaluation


class TestMetric:
    @pytest.mark.parametrize("seed", [0, 1, 2])
    def test_matches_pycocotools(self, seed):
        predictions, targets = scenes(seed=seed)
        task = Detection(CLASSES).with_tables("per_class")
        result = task.metric(torch.device("cpu")).compute(metric_sums(predictions, targets, (0, 30), task))
        reference = coco_reference(predictions, targets)
        mean, at_50, at_75, _, _, _, _, _, recall, *_ = reference.stats
        assert 0.05 < mean < 0.9
        assert result["mAP"] == pytest.approx(mean, abs=1e-6)
        assert result["mAP@50"] == pytest.approx(at_50, abs=1e-6)
        assert result["mAP@75"] == pytest.approx(at_75, abs=1e-6)
        assert result["mAR@100"] == pytest.approx(recall, abs=1e-6)
        assert result["count"] == 30
        precision = reference.eval["precision"][:, :, :, 0, 2]  # overlap, recall, class
        class_precision = [float(precision[:, :, k][precision[:, :, k] > -1].mean()) for k in range(3)]
        assert list(result["per_class"]) == ["a", "b", "c"]
        assert list(result["per_class"].values()) == pytest.approx(class_precision, abs=1e-6)

    def test_is_bit_identical_for_any_batches_and_ranks(self):
        predictions, targets = scenes()
        metric = Detection(CLASSES).metric(torch.device("cpu"))
        whole = metric.compute(metric_sums(predictions, targets, (0, 30)))
        assert metric.compute(metric_sums(predictions, targets, (0, 1, 8, 30))) == whole
        ranks = metric_sums(predictions, targets, (0, 7, 15)) + metric_sums(predictions, targets, (0, 15, 30))[15:]
        assert metric.compute(ranks) == whole

    def test_the_precision_of_each_image_of_one_class_is_nearly_that_of_pycocotools(self):
        predictions, targets = scenes(n=12)
        targets = [{name: value[~target["iscrowd"]] for name, value in target.items()} for target in targets]
        for labels in (part["labels"] for part in (*predictions, *targets)):
            labels[:] = 1
        task = Detection(CLASSES).with_tables("samples")
        metric, scores = task.metric(torch.device("cpu")).compute(metric_sums(predictions, targets, (0, 12), task))["samples"]
        assert metric == "image AP"
        for i, (score, pair) in enumerate(zip(scores.tolist(), zip(predictions, targets, strict=True), strict=True)):
            if len(pair[1]["boxes"]) == 0:
                assert np.isnan(score)
                continue
            alone = Detection(CLASSES).metric(torch.device("cpu")).compute([pair])
            assert score == pytest.approx(alone["mAP"], abs=0.01), i  # which samples the curve at 101 recalls

    def test_images_are_batched_by_size_and_predictions_keep_their_order(self):
        predictions, targets = scenes()
        model = FixedDetector(predictions)
        found = Detection(CLASSES).predict(model, (indexed_images(9), targets[:9]))
        assert all(a is b for a, b in zip(found, predictions[:9], strict=True))
        assert model.calls == [1, 1]

    def test_no_predictions_and_no_targets_are_supported(self):
        nothing = {"boxes": torch.zeros(0, 4), "labels": torch.zeros(0, dtype=torch.int64), "scores": torch.zeros(0)}
        _, targets = scenes()
        task = Detection(CLASSES).with_tables("per_class")
        result = task.metric(torch.device("cpu")).compute(metric_sums([nothing] * 30, targets, (0, 30), task))
        assert result["mAP"] == 0
        result = task.metric(torch.device("cpu")).compute(metric_sums([nothing] * 30, targets[3:4], (0, 1), task))
        assert set(result["per_class"].values()) == {None}


def test_crowd_boxes_are_excluded_from_training():
    rows = torch.tensor([[0, 0, 5, 5, 1, 0, 25], [1, 1, 9, 9, 2, 1, 64.0]])
    assert learned_from(as_target(rows))["boxes"].tolist() == [[0, 0, 5, 5]]
    assert learned_from(as_target(rows))["labels"].tolist() == [1]


def test_entries_have_the_coco_results_format():
    prediction = {"boxes": torch.tensor([[1.0, 2, 11, 22]]), "labels": torch.tensor([4]), "scores": torch.tensor([0.5])}
    entry = {"image_id": 17, "category_id": 4, "bbox": [1, 2, 10, 20], "score": 0.5}
    assert Detection(CLASSES).entries(prediction, 17) == [entry]


# Runs

SMALL = ("--task", "detection", "--data.name", "shapes", "--data.n_train", 32, "--data.n_test", 12, "--data.img_size", 32)
SMALL += ("--data.max_objects", 1, "--model.name", "resnet18", "--model.layers", "[1,1,1,1]", "--detection.width", 64)
SMALL += ("--train.n_steps", 6, "--train.batch_size", 4, "--train.n_epochs", "null", "--train.optim.type", "AdamW")
SMALL += ("--train.print_freq", 2, "--train.eval_freq", 3, "--train.save_freq", 3, "--train.num_threads", 1)
SMALL += ("--train.optim.lr", 0.001, "--detection.score_threshold", 0.01)


@pytest.fixture(scope="module", params=["fcos", "fasterrcnn"])
def trained(request, tmp_path_factory):
    run = tmp_path_factory.mktemp("runs") / request.param
    assert run_main("-e", run, *SMALL, "--detection.head", request.param) == 0
    return run


def test_run_writes_metrics_log_and_figures(trained):
    lines = [line for line in metrics(trained) if "valid/mAP" in line]
    assert [line["step"] for line in lines] == [3, 6]
    assert all(0 <= line["valid/mAP"] <= line["valid/mAP@50"] <= 1 and line["valid/count"] == 12 for line in lines)
    parts = [line for line in metrics(trained) if "train/loss" in line]
    for line in parts:
        losses = [value for name, value in line.items() if name.startswith("train/loss_")]
        assert len(losses) == (3 if trained.name == "fcos" else 4)
        assert line["train/loss"] == pytest.approx(sum(losses), rel=1e-5)
    assert results(trained)["macs"] > 1e6
    log = (trained / "output.log").read_text()
    assert f"valid mAP {100 * lines[1]['valid/mAP']:.2f} % mAP@50" in log
    assert "best valid mAP" in log
    for name in ("curves", "predictions"):
        assert (trained / "figures" / f"{name}.png").stat().st_size > 10_000


@pytest.mark.slow
def test_two_ranks_report_the_map_that_one_rank_computes(tmp_path, capsys):
    run = tmp_path / "run"
    ended = train(run, *SMALL, ranks=2)
    assert ended.codes == [0, 0], ended.output
    assert json.loads((run / "environment.json").read_text())["world_size"] == 2
    capsys.readouterr()
    assert run_tool(lambda: evaluate([str(run / "ckpt" / "latest"), "--json"])) == 0
    evaluated = json.loads(capsys.readouterr().out.splitlines()[-1])
    last = results(run)["last"]
    assert last["valid/count"] == 12
    assert all(last[f"valid/{name}"] == evaluated[name] for name in ("mAP", "mAP@50", "mAP@75", "mAR@100"))


FEATURES = ("--augment.color_jitter", 0.3, "--train.ema", 0.9, "--train.micro_batch_size", 2, "--train.freeze", "[stem]")
FEATURES += ("--train.clip_grad_norm", 1.0, "--data.max_objects", 2)


@pytest.mark.slow  # the one of masks, which shares the code, is not
@pytest.mark.parametrize(("head", "precision"), [("fcos", "fp32"), ("fasterrcnn", "bf16")])
def test_resumed_run_is_bit_exact(head, precision, tmp_path):
    argv = (*SMALL, *FEATURES, "--detection.head", head, "--train.precision", precision)
    assert train(tmp_path / "whole", *argv).codes == [0]
    assert train(tmp_path / "parts", *argv, fault=AtStep(3, "SIGTERM")).codes == [143]
    assert train(tmp_path / "parts", "-r", "latest").codes == [0]
    assert_same_weights(weights(tmp_path / "whole"), weights(tmp_path / "parts"))
    assert untimed(metrics(tmp_path / "whole")) == untimed(metrics(tmp_path / "parts"))


@pytest.fixture(scope="module")
def coco(tmp_path_factory):
    return on_disk.write_coco(tmp_path_factory.mktemp("coco"), n_train=8)


FILES = ("--task", "detection", "--data.name", "cocojson", "--data.img_size", 32, "--model.name", "resnet18")
FILES += ("--model.layers", "[1,1,1,1]", "--detection.width", 64, "--train.n_steps", 4, "--train.batch_size", 4)
FILES += ("--train.n_epochs", "null", "--train.num_threads", 1, "--train.optim.lr", 0.001)


def test_images_of_different_sizes_train_the_same_with_any_number_of_workers(coco, tmp_path):
    for workers in (0, 2):
        argv = ("--data.dataroot", coco, "--dataloader.num_workers", workers, "--augment.color_jitter", 0.2)
        assert run_main("-e", tmp_path / str(workers), *FILES, *argv) == 0
    assert_same_weights(weights(tmp_path / "0"), weights(tmp_path / "2"))
    assert results(tmp_path / "0")["last"]["valid/count"] == 3
    assert (tmp_path / "0" / "figures" / "predictions.png").is_file()


@pytest.mark.parametrize(
    ("argv", "fragments"),
    [
        (("--augment.mixup", 0.2), ["augment.mixup: 0.2", "task detection"]),
        (("--eval.tta", "flip"), ["eval.tta: flip", "task detection"]),
        (("--eval.img_size", 64), ["eval.img_size: 64", "task detection"]),
        (("--eval.resize", "torch"), ["eval.resize: torch", "task detection"]),
        (("--augment.crop_padding", 4), ["augment.crop_padding: 4", "task detection"]),
        (("--segmentation.head", "hrnet"), ["segmentation.head: hrnet", "task detection"]),
        (("--detection.head", "yolo"), ["detection.head", "fcos or fasterrcnn"]),
        (("--detection.n_maps", 9), ["resnet18", "built on 9 feature maps", "has 5"]),
        (("--detection.width", 3), ["detection.width", "at least 32"]),
        (("--detection.width", 100), ["resnet18", "width 100", "64, 96, 128"]),
        (("--data.name", "pairs"), ["pairs gives masks, not boxes"]),
        (("--data.name", "digits"), ["digits gives classes, not boxes"]),
        (("--task", "classification", "--detection.width", 64), ["detection.", "task classification"]),
    ],
)
def test_conflicting_options_are_a_one_line_error_before_training(tmp_path, argv, fragments, capsys):
    assert run_main("-e", tmp_path / "run", *SMALL, *argv) == 2
    line = capsys.readouterr().err.strip()
    assert len(line.splitlines()) == 1
    assert all(fragment in line for fragment in fragments), line
    assert not (tmp_path / "run").exists()


def test_invalid_annotation_is_an_error_before_training(tmp_path, capsys):
    root = on_disk.write_coco(tmp_path / "set")
    path = root / "annotations" / "val.json"
    content = json.loads(path.read_text())
    content["annotations"][0]["bbox"] = [5, 5, 10, 0]
    path.write_text(json.dumps(content))
    assert run_main("-e", tmp_path / "run", *FILES, "--data.dataroot", root) == 1
    assert capsys.readouterr().err.startswith(f"error: {path}: annotation 1 has a box without an area, [5, 5, 10, 0]")
    assert not (tmp_path / "run").exists()


def test_config_is_passed_to_the_network():
    options = {"detection.head": "fasterrcnn", "detection.max_size": 50, "data.std": [0.2, 0.3, 0.4], "detection.n_maps": 3}
    config = load_config(None, [*map(str, SMALL), *(f"--{key}={value}" for key, value in options.items())])
    network = build(config, make_accelerator(config.train, deterministic=config.deterministic)).model
    assert (network.transform.min_size, network.transform.max_size) == ((32,), 50)
    assert network.transform.image_std == [0.2, 0.3, 0.4]
    assert network.backbone.strides == [8, 16, 32, 64]
    assert network.roi_heads.score_thresh == 0.01
    assert network.roi_heads.box_predictor.cls_score.out_features == 11


def test_evaluate_prints_per_class_precision(trained, capsys):
    capsys.readouterr()
    assert run_tool(lambda: evaluate([str(trained), "--per_class"])) == 0
    head, *rows = capsys.readouterr().out.splitlines()[1:]
    assert f"mAP {100 * results(trained)['best']['valid/mAP']:.2f} %" in head
    assert len(rows) == 10


@pytest.mark.slow
@pytest.mark.timeout(1200)
def test_resnet18_learns_to_find_shapes(tmp_path):
    """A part of the config's training; docs/results.md has the whole."""
    short = ("--data.n_train", 800, "--data.n_test", 100, "--train.n_epochs", 3, "--train.num_threads", 1)
    config = ROOT / "configs" / "detection_resnet18_shapes.yaml"
    assert run_main("-c", config, "-e", tmp_path / "run", *short) == 0
    assert results(tmp_path / "run")["best"]["valid/mAP@50"] >= 0.08
