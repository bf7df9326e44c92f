import math
from itertools import pairwise

import numpy as np
import pytest
import torch
from sklearn.metrics import accuracy_score, balanced_accuracy_score, confusion_matrix, log_loss, top_k_accuracy_score
from timm.loss import BinaryCrossEntropy, LabelSmoothingCrossEntropy, SoftTargetCrossEntropy
from torch import nn
from torch.nn import functional as F

from engine import load_config
from engine.build import Data, task_kind
from engine.config.errors import ConfigError
from engine.tasks.classification import Classification

CLASSES = tuple("abcdefgh")
LOGITS = torch.randn(50, 8, generator=torch.Generator().manual_seed(0))
TARGETS = torch.randint(0, 8, (50,), generator=torch.Generator().manual_seed(1))


class Gives(nn.Module):
    """A model whose outputs are known."""

    def __init__(self, *outputs):
        super().__init__()
        self.outputs = outputs

    def forward(self, images):
        return self.outputs if len(self.outputs) > 1 else self.outputs[0]


def soft_targets():
    """Rows of probabilities, as mixing gives them."""
    share = torch.rand(50, 1, generator=torch.Generator().manual_seed(2))
    return share * F.one_hot(TARGETS, 8) + (1 - share) * F.one_hot(TARGETS.flip(0), 8)


def smooth(targets, smoothing):
    """As timm's Mixup does, which smooths the labels before it mixes them."""
    return targets * (1 - smoothing) + smoothing / 8


def loss_of(task, targets, *outputs):
    return task.loss_sum(Gives(*outputs or (LOGITS,)), (LOGITS, targets))[0] / len(targets)


def counted(task, logits=LOGITS, targets=TARGETS, ends=(0, 17, 18, 50)):
    """The metric's sums, of batches that end at these samples."""
    metric = task.metric(torch.device("cpu"))
    for begin, end in pairwise(ends):
        metric.update(Gives(logits[begin:end]), (logits[begin:end], targets[begin:end]))
    return metric.sums()


def evaluated(task, *args, **kwargs):
    return task.metric(torch.device("cpu")).compute(counted(task, *args, **kwargs))


def reference_ece(confidence, right):
    """Guo, Pleiss, Sun, Weinberger (2017): On Calibration of Modern Neural Networks, equation 3, with 15 bins."""
    error = 0.0
    for m in range(15):
        inside = (confidence > m / 15) & (confidence <= (m + 1) / 15)
        if inside.any():
            error += inside.sum() / len(right) * abs(right[inside].mean() - confidence[inside].mean())
    return error


def test_auxiliary_heads_are_weighed_and_logged():
    aux1, aux2 = LOGITS.flip(0), LOGITS.roll(1, 0)
    loss, sums = Classification(CLASSES, aux_weight=0.3).loss_sum(Gives(LOGITS, aux1, aux2), (LOGITS, TARGETS))
    parts = [F.cross_entropy(logits, TARGETS, reduction="sum") for logits in (LOGITS, aux1, aux2)]
    torch.testing.assert_close(loss, parts[0] + 0.3 * parts[1] + 0.3 * parts[2])
    torch.testing.assert_close(sums["loss_aux2"], parts[2])


def test_label_smoothing_spreads_its_part_over_all_classes():
    loss, _ = Classification(CLASSES, label_smoothing=0.2).loss_sum(Gives(LOGITS), (LOGITS, TARGETS))
    smooth = 0.8 * F.one_hot(TARGETS, 8) + 0.2 / 8
    torch.testing.assert_close(loss, -(smooth * LOGITS.log_softmax(1)).sum())


def test_soft_targets_are_taken_and_count_as_the_larger_share():
    soft = torch.full((50, 8), 0.05)
    soft[range(50), TARGETS] = 0.65
    loss, sums = Classification(CLASSES).loss_sum(Gives(LOGITS), (LOGITS, soft))
    torch.testing.assert_close(loss, -(soft * LOGITS.log_softmax(1)).sum())
    assert sums["acc@1"] == (LOGITS.argmax(1) == TARGETS).sum()


@pytest.mark.parametrize("smoothing", [0.0, 0.1])
def test_cross_entropy_is_timms(smoothing):
    task = Classification(CLASSES, label_smoothing=smoothing)
    torch.testing.assert_close(loss_of(task, TARGETS), LabelSmoothingCrossEntropy(smoothing)(LOGITS, TARGETS))
    torch.testing.assert_close(loss_of(task, soft_targets()), SoftTargetCrossEntropy()(LOGITS, smooth(soft_targets(), smoothing)))


@pytest.mark.parametrize("threshold", [None, 0.2])
@pytest.mark.parametrize("smoothing", [0.0, 0.1])
def test_bce_is_timms(smoothing, threshold):
    task = Classification(CLASSES, loss="bce", label_smoothing=smoothing, bce_threshold=threshold)
    timms = BinaryCrossEntropy(smoothing=smoothing, target_threshold=threshold)
    torch.testing.assert_close(loss_of(task, TARGETS), timms(LOGITS, TARGETS))
    torch.testing.assert_close(loss_of(task, soft_targets()), timms(LOGITS, smooth(soft_targets(), smoothing)))


def test_a_threshold_makes_full_labels_of_mixed_ones():
    mixed = torch.tensor([[0.7, 0.3, 0.0], [0.9, 0.1, 0.0]])
    logits = torch.randn(2, 3, generator=torch.Generator().manual_seed(3))
    loss, _ = Classification(("a", "b", "c"), loss="bce", bce_threshold=0.2).loss_sum(Gives(logits), (logits, mixed))
    full = torch.tensor([[1.0, 1.0, 0.0], [1.0, 0.0, 0.0]])
    torch.testing.assert_close(loss, F.binary_cross_entropy_with_logits(logits, full, reduction="none").mean(1).sum())


@pytest.mark.parametrize("targets", [TARGETS, soft_targets()], ids=["classes", "mixed"])
def test_auxiliary_heads_have_the_same_kind_of_loss(targets):
    task = Classification(CLASSES, aux_weight=0.5, loss="bce", label_smoothing=0.1)
    main, aux = loss_of(task, targets), loss_of(task, targets, LOGITS.flip(0))
    torch.testing.assert_close(loss_of(task, targets, LOGITS, LOGITS.flip(0)), main + 0.5 * aux)


def test_a_threshold_without_bce_is_warned_of():
    notes = load_config(None, {"train.bce_threshold": 0.2}).notes
    assert any(
        "train.bce_threshold (--train.bce_threshold) has no effect with train.loss cross_entropy" in note for note in notes
    )
    notes = load_config(None, {"train.bce_threshold": 0.2, "train.loss": "bce"}).notes
    assert not any("bce_threshold" in note for note in notes)


@pytest.mark.parametrize("threshold", [0.0, 0.95])
def test_a_threshold_that_makes_all_labels_alike_is_an_error(threshold):
    config = load_config(None, {"train.bce_threshold": threshold, "train.loss": "bce", "train.label_smoothing": 0.1})
    with pytest.raises(ConfigError, match="the same label"):
        task_kind(config).make(config, Data(None, CLASSES, 8, {}, None))


def test_the_config_reaches_the_task():
    said = {"train.loss": "bce", "train.label_smoothing": 0.1, "train.bce_threshold": 0.2, "eval.tta": "flip"}
    config = load_config(None, said)
    task = task_kind(config).make(config, Data(None, CLASSES, 8, {}, None))
    assert (task.loss, task.label_smoothing, task.bce_threshold, task.tta) == ("bce", 0.1, 0.2, "flip")


def test_the_metric_is_scikit_learns():
    task = Classification(CLASSES).with_tables("per_class", "confusion")
    said, predicted = evaluated(task), LOGITS.argmax(1)
    confusion = confusion_matrix(TARGETS, predicted)
    assert said["count"] == 50
    assert said["acc@1"] == accuracy_score(TARGETS, predicted)
    assert said["acc@5"] == top_k_accuracy_score(TARGETS, LOGITS, k=5)
    assert said["balanced_acc"] == balanced_accuracy_score(TARGETS, predicted)
    assert said["confusion"] == confusion.tolist()
    assert said["per_class"] == dict(zip(CLASSES, (confusion.diagonal() / confusion.sum(1)).tolist(), strict=True))
    assert said["loss"] == pytest.approx(log_loss(TARGETS, LOGITS.double().softmax(1), labels=range(8)), rel=1e-6)


@pytest.mark.parametrize("scale", [0.1, 1.0, 5.0, 1000.0])  # from unsure of all to sure of all
@pytest.mark.parametrize("loss", ["cross_entropy", "bce"])
def test_the_calibration_error_is_the_usual_one(loss, scale):
    logits = scale * LOGITS
    confidence = (logits.softmax(1) if loss == "cross_entropy" else logits.sigmoid()).amax(1).double().numpy()
    expected = reference_ece(confidence, (logits.argmax(1) == TARGETS).double().numpy())
    assert evaluated(Classification(CLASSES, loss=loss), logits)["ece"] == pytest.approx(expected, abs=1e-7)


@pytest.mark.parametrize("loss", ["cross_entropy", "bce"])
def test_batches_and_ranks_change_no_bit(loss):
    generator = torch.Generator().manual_seed(4)
    logits, targets = 9 * torch.randn(5000, 8, generator=generator), torch.randint(0, 8, (5000,), generator=generator)
    task = Classification(CLASSES, loss=loss).with_tables("confusion")
    whole = counted(task, logits, targets, (0, 5000))
    assert torch.equal(counted(task, logits, targets, (0, 1, 700, 3333, 5000)), whole)
    on_two_ranks = [counted(task, logits[rank::2], targets[rank::2], (0, 64, 2500)) for rank in (0, 1)]
    assert torch.equal(sum(on_two_ranks), whole)


def test_the_evaluations_loss_is_of_the_same_kind_without_smoothing():
    said = evaluated(Classification(CLASSES, loss="bce", label_smoothing=0.1, bce_threshold=0.2))
    assert said["loss"] == pytest.approx(BinaryCrossEntropy(smoothing=0)(LOGITS, TARGETS).item(), rel=1e-6)
    said = evaluated(Classification(CLASSES, label_smoothing=0.1))
    assert said["loss"] == pytest.approx(F.cross_entropy(LOGITS, TARGETS).item(), rel=1e-6)


def test_a_class_without_samples_is_left_out_of_the_mean():
    here = TARGETS != 3
    said = evaluated(Classification(CLASSES).with_tables("per_class"), LOGITS[here], TARGETS[here], (0, 9, int(here.sum())))
    assert said["per_class"].pop("d") is None
    assert said["balanced_acc"] == np.mean(list(said["per_class"].values()))
    assert math.isfinite(said["ece"])


def test_what_is_logged_is_finite_and_no_table():
    said = evaluated(Classification(CLASSES), LOGITS[:1], TARGETS[:1], (0, 1))
    assert set(said) == {"loss", "acc@1", "acc@5", "balanced_acc", "ece", "count"}
    assert all(type(value) in (int, float) and math.isfinite(value) for value in said.values())


def test_fewer_than_five_classes_are_fine():
    said = evaluated(Classification(("a", "b")).with_tables("confusion"), LOGITS[:, :2], TARGETS % 2)
    assert said["acc@5"] == 1
    assert said["confusion"] == confusion_matrix(TARGETS % 2, LOGITS[:, :2].argmax(1)).tolist()


def test_of_shifted_images_each_counts_an_eighth_and_of_the_others_each_a_quarter():
    generator = torch.Generator().manual_seed(6)
    images, model = torch.randn(50, 1, 4, 6, generator=generator), nn.Sequential(nn.Flatten(), nn.Linear(24, 8))
    nn.init.normal_(model[1].weight, generator=generator)
    rows, columns = [1, 0, 1, 2, 3, 2], [1, 0, 1, 2, 3, 4, 5, 4]  # a margin of one, mirrored at the edge
    framed = images[..., rows, :][..., columns]
    views = {images: 1 / 4, framed[..., :4, :6]: 1 / 8, framed[..., 2:, 2:]: 1 / 8}
    task = Classification(CLASSES, tta="flip_and_shift")
    with torch.no_grad():
        by_hand = sum(weight * (model(view) + model(view[..., [5, 4, 3, 2, 1, 0]])) for view, weight in views.items())
        torch.testing.assert_close(task.logits(model, images), by_hand)
        metric = task.metric(torch.device("cpu"))
        metric.update(model, (images, TARGETS))
    said = metric.compute(metric.sums())
    assert said["acc@1"] == accuracy_score(TARGETS, by_hand.argmax(1))
    assert said["loss"] == pytest.approx(F.cross_entropy(by_hand, TARGETS).item(), rel=1e-5)


def test_flipped_images_are_averaged_in():
    generator = torch.Generator().manual_seed(5)
    images, model = torch.randn(50, 1, 4, 6, generator=generator), nn.Sequential(nn.Flatten(), nn.Linear(24, 8))
    nn.init.normal_(model[1].weight, generator=generator)
    task = Classification(CLASSES, tta="flip")
    metric = task.metric(torch.device("cpu"))
    with torch.no_grad():
        metric.update(model, (images, TARGETS))
        by_hand = (model(images) + model(images[..., [5, 4, 3, 2, 1, 0]])) / 2
    assert torch.equal(metric.sums(), counted(Classification(CLASSES), by_hand))
    assert not torch.equal(metric.sums(), counted(Classification(CLASSES), model(images).detach()))
