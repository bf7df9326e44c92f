import math
from itertools import pairwise

import numpy as np
import pytest
import torch
from sklearn.metrics import accuracy_score, balanced_accuracy_score, confusion_matrix, log_loss, top_k_accuracy_score
from sklearn.utils.class_weight import compute_class_weight
from timm.loss import BinaryCrossEntropy, LabelSmoothingCrossEntropy, SoftTargetCrossEntropy
from torch import nn
from torch.nn import functional as F
from torchvision.ops import sigmoid_focal_loss

from engine import load_config
from engine.build import Data, task_kind
from engine.config.errors import ConfigError
from engine.tasks.classification import Classification, focal_loss, inverse_frequencies

CLASSES = tuple("abcdefgh")
LOGITS = torch.randn(50, 8, generator=torch.Generator().manual_seed(0))
TARGETS = torch.randint(0, 8, (50,), generator=torch.Generator().manual_seed(1))


class ConstantModel(nn.Module):
    """A model that returns fixed outputs."""

    def __init__(self, *outputs):
        super().__init__()
        self.outputs = outputs

    def forward(self, images):
        return self.outputs if len(self.outputs) > 1 else self.outputs[0]


def soft_targets():
    """Rows of probabilities, as mixup and CutMix produce them."""
    share = torch.rand(50, 1, generator=torch.Generator().manual_seed(2))
    return share * F.one_hot(TARGETS, 8) + (1 - share) * F.one_hot(TARGETS.flip(0), 8)


def smooth(targets, smoothing):
    """Smooth as timm's Mixup does, which smooths labels before it mixes them."""
    return targets * (1 - smoothing) + smoothing / 8


def loss_of(task, targets, *outputs):
    return task.loss_sum(ConstantModel(*outputs or (LOGITS,)), (LOGITS, targets))[0] / len(targets)


def metric_sums(task, logits=LOGITS, targets=TARGETS, ends=(0, 17, 18, 50)):
    """The metric's sums over batches that end at the sample indices `ends`."""
    metric = task.metric(torch.device("cpu"))
    for begin, end in pairwise(ends):
        metric.update(ConstantModel(logits[begin:end]), (logits[begin:end], targets[begin:end]))
    return metric.sums()


def compute_metric(task, *args, **kwargs):
    return task.metric(torch.device("cpu")).compute(metric_sums(task, *args, **kwargs))


def reference_ece(confidence, correct):
    """Guo, Pleiss, Sun, Weinberger (2017): On Calibration of Modern Neural Networks, equation 3, with 15 bins."""
    error = 0.0
    for m in range(15):
        inside = (confidence > m / 15) & (confidence <= (m + 1) / 15)
        if inside.any():
            error += inside.sum() / len(correct) * abs(correct[inside].mean() - confidence[inside].mean())
    return error


def test_auxiliary_losses_are_weighted_and_logged():
    aux1, aux2 = LOGITS.flip(0), LOGITS.roll(1, 0)
    loss, sums = Classification(CLASSES, aux_weight=0.3).loss_sum(ConstantModel(LOGITS, aux1, aux2), (LOGITS, TARGETS))
    parts = [F.cross_entropy(logits, TARGETS, reduction="sum") for logits in (LOGITS, aux1, aux2)]
    torch.testing.assert_close(loss, parts[0] + 0.3 * parts[1] + 0.3 * parts[2])
    torch.testing.assert_close(sums["loss_aux2"], parts[2])


def test_label_smoothing_is_spread_over_all_classes():
    loss, _ = Classification(CLASSES, label_smoothing=0.2).loss_sum(ConstantModel(LOGITS), (LOGITS, TARGETS))
    smooth = 0.8 * F.one_hot(TARGETS, 8) + 0.2 / 8
    torch.testing.assert_close(loss, -(smooth * LOGITS.log_softmax(1)).sum())


def test_soft_targets_are_supported_and_accuracy_uses_their_largest_class():
    soft = torch.full((50, 8), 0.05)
    soft[range(50), TARGETS] = 0.65
    loss, sums = Classification(CLASSES).loss_sum(ConstantModel(LOGITS), (LOGITS, soft))
    torch.testing.assert_close(loss, -(soft * LOGITS.log_softmax(1)).sum())
    assert sums["acc@1"] == (LOGITS.argmax(1) == TARGETS).sum()


@pytest.mark.parametrize("smoothing", [0.0, 0.1])
def test_cross_entropy_matches_timm(smoothing):
    task = Classification(CLASSES, label_smoothing=smoothing)
    torch.testing.assert_close(loss_of(task, TARGETS), LabelSmoothingCrossEntropy(smoothing)(LOGITS, TARGETS))
    torch.testing.assert_close(loss_of(task, soft_targets()), SoftTargetCrossEntropy()(LOGITS, smooth(soft_targets(), smoothing)))


@pytest.mark.parametrize("threshold", [None, 0.2])
@pytest.mark.parametrize("smoothing", [0.0, 0.1])
def test_bce_matches_timm(smoothing, threshold):
    task = Classification(CLASSES, loss="bce", label_smoothing=smoothing, bce_threshold=threshold)
    timm_loss = BinaryCrossEntropy(smoothing=smoothing, target_threshold=threshold)
    torch.testing.assert_close(loss_of(task, TARGETS), timm_loss(LOGITS, TARGETS))
    torch.testing.assert_close(loss_of(task, soft_targets()), timm_loss(LOGITS, smooth(soft_targets(), smoothing)))


def test_bce_threshold_binarizes_mixed_labels():
    mixed = torch.tensor([[0.7, 0.3, 0.0], [0.9, 0.1, 0.0]])
    logits = torch.randn(2, 3, generator=torch.Generator().manual_seed(3))
    loss, _ = Classification(("a", "b", "c"), loss="bce", bce_threshold=0.2).loss_sum(ConstantModel(logits), (logits, mixed))
    full = torch.tensor([[1.0, 1.0, 0.0], [1.0, 0.0, 0.0]])
    torch.testing.assert_close(loss, F.binary_cross_entropy_with_logits(logits, full, reduction="none").mean(1).sum())


@pytest.mark.parametrize("targets", [TARGETS, soft_targets()], ids=["classes", "mixed"])
def test_auxiliary_heads_use_the_same_loss_function(targets):
    task = Classification(CLASSES, aux_weight=0.5, loss="bce", label_smoothing=0.1)
    main, aux = loss_of(task, targets), loss_of(task, targets, LOGITS.flip(0))
    torch.testing.assert_close(loss_of(task, targets, LOGITS, LOGITS.flip(0)), main + 0.5 * aux)


def test_bce_threshold_without_bce_is_a_warning():
    notes = load_config(None, {"train.bce_threshold": 0.2}).notes
    assert any(
        "train.bce_threshold (--train.bce_threshold) has no effect with train.loss cross_entropy" in note for note in notes
    )
    notes = load_config(None, {"train.bce_threshold": 0.2, "train.loss": "bce"}).notes
    assert not any("bce_threshold" in note for note in notes)


@pytest.mark.parametrize("threshold", [0.0, 0.95])
def test_bce_threshold_that_makes_all_labels_equal_is_an_error(threshold):
    config = load_config(None, {"train.bce_threshold": threshold, "train.loss": "bce", "train.label_smoothing": 0.1})
    with pytest.raises(ConfigError, match="the same label"):
        task_kind(config).make(config, Data(None, CLASSES, 8, {}, None))


def test_config_is_passed_to_the_task():
    options = {"train.loss": "bce", "train.label_smoothing": 0.1, "train.bce_threshold": 0.2, "eval.tta": "flip"}
    config = load_config(None, options)
    task = task_kind(config).make(config, Data(None, CLASSES, 8, {}, None))
    assert (task.loss, task.label_smoothing, task.bce_threshold, task.tta) == ("bce", 0.1, 0.2, "flip")


def test_metric_matches_scikit_learn():
    task = Classification(CLASSES).with_tables("per_class", "confusion")
    result, predicted = compute_metric(task), LOGITS.argmax(1)
    confusion = confusion_matrix(TARGETS, predicted)
    assert result["count"] == 50
    assert result["acc@1"] == accuracy_score(TARGETS, predicted)
    assert result["acc@5"] == top_k_accuracy_score(TARGETS, LOGITS, k=5)
    assert result["balanced_acc"] == balanced_accuracy_score(TARGETS, predicted)
    assert result["confusion"] == confusion.tolist()
    assert result["per_class"] == dict(zip(CLASSES, (confusion.diagonal() / confusion.sum(1)).tolist(), strict=True))
    assert result["loss"] == pytest.approx(log_loss(TARGETS, LOGITS.double().softmax(1), labels=range(8)), rel=1e-6)


@pytest.mark.parametrize("scale", [0.1, 1.0, 5.0, 1000.0])  # from uncertain to certain predictions
@pytest.mark.parametrize("loss", ["cross_entropy", "bce"])
def test_calibration_error_matches_the_reference(loss, scale):
    logits = scale * LOGITS
    confidence = (logits.softmax(1) if loss == "cross_entropy" else logits.sigmoid()).amax(1).double().numpy()
    expected = reference_ece(confidence, (logits.argmax(1) == TARGETS).double().numpy())
    assert compute_metric(Classification(CLASSES, loss=loss), logits)["ece"] == pytest.approx(expected, abs=1e-7)


@pytest.mark.parametrize("loss", ["cross_entropy", "bce"])
def test_metric_is_bit_identical_for_any_batches_and_ranks(loss):
    generator = torch.Generator().manual_seed(4)
    logits, targets = 9 * torch.randn(5000, 8, generator=generator), torch.randint(0, 8, (5000,), generator=generator)
    task = Classification(CLASSES, loss=loss).with_tables("confusion")
    whole = metric_sums(task, logits, targets, (0, 5000))
    assert torch.equal(metric_sums(task, logits, targets, (0, 1, 700, 3333, 5000)), whole)
    on_two_ranks = [metric_sums(task, logits[rank::2], targets[rank::2], (0, 64, 2500)) for rank in (0, 1)]
    assert torch.equal(sum(on_two_ranks), whole)


def test_evaluation_uses_the_training_loss_without_smoothing():
    result = compute_metric(Classification(CLASSES, loss="bce", label_smoothing=0.1, bce_threshold=0.2))
    assert result["loss"] == pytest.approx(BinaryCrossEntropy(smoothing=0)(LOGITS, TARGETS).item(), rel=1e-6)
    result = compute_metric(Classification(CLASSES, label_smoothing=0.1))
    assert result["loss"] == pytest.approx(F.cross_entropy(LOGITS, TARGETS).item(), rel=1e-6)


def test_class_without_samples_is_excluded_from_the_mean():
    present = TARGETS != 3
    result = compute_metric(
        Classification(CLASSES).with_tables("per_class"), LOGITS[present], TARGETS[present], (0, 9, int(present.sum()))
    )
    assert result["per_class"].pop("d") is None
    assert result["balanced_acc"] == np.mean(list(result["per_class"].values()))
    assert math.isfinite(result["ece"])


def test_logged_metrics_are_finite_scalars():
    result = compute_metric(Classification(CLASSES), LOGITS[:1], TARGETS[:1], (0, 1))
    assert set(result) == {"loss", "acc@1", "acc@5", "balanced_acc", "ece", "count"}
    assert all(type(value) in (int, float) and math.isfinite(value) for value in result.values())


def test_top5_accuracy_works_with_fewer_than_five_classes():
    result = compute_metric(Classification(("a", "b")).with_tables("confusion"), LOGITS[:, :2], TARGETS % 2)
    assert result["acc@5"] == 1
    assert result["confusion"] == confusion_matrix(TARGETS % 2, LOGITS[:, :2].argmax(1)).tolist()


def test_flip_and_shift_weights_shifted_views_an_eighth_and_others_a_quarter():
    generator = torch.Generator().manual_seed(6)
    images, model = torch.randn(50, 1, 4, 6, generator=generator), nn.Sequential(nn.Flatten(), nn.Linear(24, 8))
    nn.init.normal_(model[1].weight, generator=generator)
    rows, columns = [1, 0, 1, 2, 3, 2], [1, 0, 1, 2, 3, 4, 5, 4]  # reflection padding by one pixel
    padded = images[..., rows, :][..., columns]
    views = {images: 1 / 4, padded[..., :4, :6]: 1 / 8, padded[..., 2:, 2:]: 1 / 8}
    task = Classification(CLASSES, tta="flip_and_shift")
    with torch.no_grad():
        expected = sum(weight * (model(view) + model(view[..., [5, 4, 3, 2, 1, 0]])) for view, weight in views.items())
        torch.testing.assert_close(task.logits(model, images), expected)
        metric = task.metric(torch.device("cpu"))
        metric.update(model, (images, TARGETS))
    result = metric.compute(metric.sums())
    assert result["acc@1"] == accuracy_score(TARGETS, expected.argmax(1))
    assert result["loss"] == pytest.approx(F.cross_entropy(expected, TARGETS).item(), rel=1e-5)


def test_flip_averages_the_logits_of_flipped_images():
    generator = torch.Generator().manual_seed(5)
    images, model = torch.randn(50, 1, 4, 6, generator=generator), nn.Sequential(nn.Flatten(), nn.Linear(24, 8))
    nn.init.normal_(model[1].weight, generator=generator)
    task = Classification(CLASSES, tta="flip")
    metric = task.metric(torch.device("cpu"))
    with torch.no_grad():
        metric.update(model, (images, TARGETS))
        expected = (model(images) + model(images[..., [5, 4, 3, 2, 1, 0]])) / 2
    assert torch.equal(metric.sums(), metric_sums(Classification(CLASSES), expected))
    assert not torch.equal(metric.sums(), metric_sums(Classification(CLASSES), model(images).detach()))


class TestImbalance:
    @pytest.mark.parametrize("smoothing", [0.0, 0.1])
    def test_class_weights_are_those_of_torch(self, smoothing):
        weights = torch.arange(1.0, 9)
        task = Classification(CLASSES, class_weights=weights, label_smoothing=smoothing)
        loss, _ = task.loss_sum(ConstantModel(LOGITS), (torch.zeros(50, 1), TARGETS))
        expected = F.cross_entropy(LOGITS, TARGETS, weights, reduction="sum", label_smoothing=smoothing)
        assert loss == pytest.approx(float(expected))

    def test_balanced_weights_are_those_of_scikit_learn_and_1_on_average(self):
        labels = torch.tensor([0] * 6 + [1] * 3 + [2])
        weights = inverse_frequencies(labels, 3)
        expected = compute_class_weight("balanced", classes=np.arange(3), y=labels.numpy())
        assert weights.tolist() == pytest.approx(expected.tolist())
        assert weights[labels].mean() == pytest.approx(1)

    def test_focal_loss_is_its_formula(self):
        p = LOGITS.softmax(1)[torch.arange(50), TARGETS]
        loss, _ = Classification(CLASSES, loss="focal", focal_gamma=1.5).loss_sum(ConstantModel(LOGITS), (None, TARGETS))
        assert loss == pytest.approx(float(((1 - p) ** 1.5 * -p.log()).sum()))

    def test_focal_loss_of_two_classes_is_that_of_torchvision(self):
        logits, labels = torch.randn(20, generator=torch.Generator().manual_seed(3)), TARGETS[:20] % 2
        ours = focal_loss(torch.stack([torch.zeros(20), logits], 1), labels, gamma=2.0)  # softmax of 0 and x is sigmoid of x
        assert ours.sum() == pytest.approx(float(sigmoid_focal_loss(logits, labels.float(), alpha=-1, gamma=2, reduction="sum")))

    @pytest.mark.parametrize("targets", [TARGETS, soft_targets()], ids=["classes", "mixed"])
    def test_focal_loss_with_gamma_0_is_cross_entropy(self, targets):
        weights = torch.arange(1.0, 9)
        ours = focal_loss(LOGITS, targets, 0.0, 0.1, weights)
        torch.testing.assert_close(ours, F.cross_entropy(LOGITS, targets, weights, reduction="none", label_smoothing=0.1))

    def test_an_evaluation_counts_the_loss_without_class_weights(self):
        metric = Classification(CLASSES, class_weights=torch.arange(1.0, 9)).metric(torch.device("cpu"))
        metric.update(ConstantModel(LOGITS), (torch.zeros(50, 1), TARGETS))
        assert metric.compute(metric.sums())["loss"] == pytest.approx(float(F.cross_entropy(LOGITS, TARGETS)), abs=1e-6)
