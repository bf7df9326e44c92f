import json
import math

import numpy as np
import pytest
import torch
from sklearn.metrics import (
    average_precision_score,
    f1_score,
    label_ranking_average_precision_score,
    multilabel_confusion_matrix,
)
from timm.loss import AsymmetricLossMultiLabel
from torch.nn import functional as F
from torchmetrics.classification import MultilabelAveragePrecision, MultilabelF1Score
from torchvision.ops import sigmoid_focal_loss

from datasets.shapes import CLASSES as SHAPES
from engine.inference.trained import load_trained
from engine.tasks.multilabel import MultiLabel, absent_per_present, best_threshold
from tests.engine.tasks.test_classification import ConstantModel
from tests.running import assert_same_weights, metrics, results, run_main, weights

CLASSES = tuple("abcde")
LOGITS = torch.randn(60, 5, generator=torch.Generator().manual_seed(0))
TARGETS = (torch.rand(60, 5, generator=torch.Generator().manual_seed(1)) < 0.3).to(torch.uint8)
BATCH = (torch.zeros(60, 1), TARGETS)
SMALL = ("--task", "multilabel", "--data.name", "shapes", "--data.n_train", 96, "--data.n_test", 40, "--train.batch_size", 32)
SMALL += ("--train.n_steps", 6, "--train.save_freq", 2, "--train.num_threads", 1)


def evaluated(task, *parts):
    metric = task.metric(torch.device("cpu"))
    for first, last in parts or [(0, 60)]:
        metric.update(ConstantModel(LOGITS[first:last]), (BATCH[0][first:last], TARGETS[first:last]))
    return metric.compute(metric.sums())


def test_metrics_are_those_of_torchmetrics_and_scikit_learn():
    found, scores = evaluated(MultiLabel(CLASSES)), LOGITS.sigmoid()
    truth, predicted = TARGETS.numpy(), (scores >= 0.5).numpy()
    assert found["mAP"] == pytest.approx(float(MultilabelAveragePrecision(5)(scores, TARGETS.int())), abs=1e-6)
    assert found["mAP"] == pytest.approx(average_precision_score(truth, scores.numpy()), abs=1e-6)
    for average in ("micro", "macro"):
        name = f"f1_{average}"
        assert found[name] == pytest.approx(float(MultilabelF1Score(5, average=average)(scores, TARGETS.int())), abs=1e-6)
        assert found[name] == pytest.approx(f1_score(truth, predicted, average=average), abs=1e-6)
    assert found["loss"] == pytest.approx(float(F.binary_cross_entropy_with_logits(LOGITS, TARGETS.float())), abs=1e-6)
    assert found["count"] == 60


def test_metrics_do_not_depend_on_the_division_into_batches():
    whole, parts = evaluated(MultiLabel(CLASSES)), evaluated(MultiLabel(CLASSES), (0, 7), (7, 40), (40, 60))
    assert whole.pop("loss") == pytest.approx(parts.pop("loss"))
    assert whole == parts


def test_a_class_without_an_image_does_not_count(monkeypatch):
    monkeypatch.setitem(globals(), "TARGETS", TARGETS * torch.tensor([1, 0, 1, 1, 1], dtype=torch.uint8))
    found = evaluated(MultiLabel(CLASSES).with_tables("per_class"))
    assert found["per_class"]["b"] is None
    assert found["mAP"] == pytest.approx(np.mean([value for value in found["per_class"].values() if value is not None]))


def test_a_single_class_that_occurs_is_enough(monkeypatch):
    monkeypatch.setitem(globals(), "TARGETS", TARGETS * torch.tensor([0, 0, 1, 0, 0], dtype=torch.uint8))
    expected = average_precision_score(TARGETS[:, 2].numpy(), LOGITS[:, 2].sigmoid().numpy())
    assert evaluated(MultiLabel(CLASSES))["mAP"] == pytest.approx(expected, abs=1e-6)


def test_the_tables_count_per_class():
    found = evaluated(MultiLabel(CLASSES).with_tables("per_class", "confusion"))
    expected = multilabel_confusion_matrix(TARGETS.numpy(), (LOGITS >= 0).numpy())
    assert [found["confusion"][name] for name in CLASSES] == expected.tolist()
    precisions = average_precision_score(TARGETS.numpy(), LOGITS.sigmoid().numpy(), average=None)
    assert list(found["per_class"].values()) == pytest.approx(precisions.tolist(), abs=1e-6)


def test_each_image_has_the_precision_of_its_ranking():
    metric, scores = evaluated(MultiLabel(CLASSES).with_tables("samples"), (0, 7), (7, 60))["samples"]
    has_label = TARGETS.sum(1) > 0
    assert metric == "image AP"
    assert torch.equal(scores.isnan(), ~has_label)
    expected = label_ranking_average_precision_score(TARGETS[has_label].numpy(), LOGITS[has_label].numpy())
    assert float(scores[has_label].mean()) == pytest.approx(expected, abs=1e-6)


def test_the_best_threshold_has_the_highest_f1():
    scores, truth = LOGITS[:, 0].sigmoid(), TARGETS[:, 0]
    best = best_threshold(scores, truth)
    reached = f1_score(truth, scores >= best)
    assert reached == pytest.approx(max(f1_score(truth, scores >= threshold) for threshold in scores))


def test_thresholds_of_the_classes_decide_what_is_present():
    task = MultiLabel(CLASSES)
    before = evaluated(task.with_tables("thresholds"))
    task.set_thresholds(before["thresholds"])
    assert evaluated(task)["f1_macro"] > before["f1_macro"]
    assert evaluated(task)["mAP"] == before["mAP"]


class TestLosses:
    def loss(self, **options):
        return float(MultiLabel(CLASSES, **options).loss_sum(ConstantModel(LOGITS), BATCH)[0])

    def test_bce_with_weights_of_the_positives(self):
        weights = torch.arange(1.0, 6)
        expected = F.binary_cross_entropy_with_logits(LOGITS, TARGETS.float(), pos_weight=weights) * 60
        assert self.loss(positive_weights=weights) == pytest.approx(float(expected), rel=1e-6)

    def test_focal(self):
        expected = sigmoid_focal_loss(LOGITS, TARGETS.float(), alpha=-1, gamma=1.5, reduction="mean") * 60
        assert self.loss(loss="focal", focal_gamma=1.5) == pytest.approx(float(expected), rel=1e-6)

    def test_asymmetric_is_that_of_timm_averaged_over_classes(self):
        expected = AsymmetricLossMultiLabel()(LOGITS, TARGETS.float()) / 5
        assert self.loss(loss="asymmetric") == pytest.approx(float(expected), rel=1e-6)

    @pytest.mark.parametrize("loss", ["bce", "focal", "asymmetric"])
    def test_it_has_a_gradient_that_lowers_it(self, loss):
        logits = LOGITS.clone().requires_grad_()
        task = MultiLabel(CLASSES, loss=loss)
        before = task.loss_sum(ConstantModel(logits), BATCH)[0]
        before.backward()
        assert task.loss_sum(ConstantModel(logits - 0.1 * logits.grad), BATCH)[0] < before

    def test_balanced_weights_are_the_images_without_a_class_for_each_one_with_it(self):
        n_with = TARGETS.sum(0, dtype=torch.float32)
        assert torch.equal(absent_per_present(TARGETS, 5), (60 - n_with) / n_with)


def test_a_run_learns_and_resumes_bit_exactly(tmp_path, capsys):
    argv = (*SMALL, "--augment.mixup", 0.2, "--train.class_weights", "balanced", "--train.loss", "focal")
    assert run_main("-e", tmp_path / "whole", *argv) == 0
    assert run_main("-e", tmp_path / "cut", *argv) == 0
    assert run_main("-r", tmp_path / "cut" / "ckpt" / "step-000004") == 0
    assert_same_weights(weights(tmp_path / "whole"), weights(tmp_path / "cut"))
    assert (tmp_path / "whole" / "figures" / "predictions.png").is_file()
    last = metrics(tmp_path / "whole")[-1]
    assert all(math.isfinite(last[f"valid/{name}"]) for name in ("loss", "mAP", "f1_micro", "f1_macro"))
    assert results(tmp_path / "whole")["monitor"] == "mAP"


def test_the_validation_split_chooses_thresholds_for_the_test_and_for_tools(tmp_path):
    assert run_main("-e", tmp_path / "run", *SMALL, "--data.valid_ratio", 0.4) == 0
    chosen = json.loads((tmp_path / "run" / "thresholds.json").read_text())
    assert chosen.keys() <= set(SHAPES)
    trained = load_trained(tmp_path / "run", {})
    assert dict(zip(SHAPES, trained.task.thresholds.tolist(), strict=True)) == pytest.approx(dict.fromkeys(SHAPES, 0.5) | chosen)
    test = trained.evaluate("test")
    assert results(tmp_path / "run")["test"] == pytest.approx({f"test/{name}": value for name, value in test.items()})
    trained.task.set_thresholds({})
    assert trained.evaluate("test")["f1_micro"] != test["f1_micro"]


@pytest.mark.parametrize(
    ("argv", "fragments"),
    [
        (("--train.loss", "cross_entropy"), ["train.loss", "cross_entropy", "multilabel", "bce, focal, asymmetric"]),
        (("--data.sampler", "balanced"), ["data.sampler", "multilabel"]),
        (("--train.class_weights", "balanced", "--train.loss", "asymmetric"), ["train.class_weights", "asymmetric"]),
        (("--data.name", "digits"), ["digits", "labels"]),
        (("--train.label_smoothing", 0.1), ["train.label_smoothing", "multilabel"]),
    ],
)
def test_a_key_that_does_not_fit_is_a_one_line_error(argv, fragments, tmp_path, capsys):
    assert run_main("-e", tmp_path / "run", *SMALL, *argv) == 2
    line = capsys.readouterr().err.strip()
    assert len(line.splitlines()) == 1
    assert all(fragment in line for fragment in fragments), line
