import pytest
import torch
from sklearn.metrics import accuracy_score, log_loss, top_k_accuracy_score
from torch import nn
from torch.nn import functional as F

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


def test_the_metric_is_scikit_learns():
    metric = Classification(CLASSES).metric(torch.device("cpu"))
    for part in (slice(0, 17), slice(17, 18), slice(18, 50)):
        metric.update(Gives(LOGITS[part]), (LOGITS[part], TARGETS[part]))
    said = metric.compute(metric.sums())
    assert said["count"] == 50
    assert said["acc@1"] == pytest.approx(accuracy_score(TARGETS, LOGITS.argmax(1)))
    assert said["acc@5"] == pytest.approx(top_k_accuracy_score(TARGETS, LOGITS, k=5))
    assert said["loss"] == pytest.approx(log_loss(TARGETS, LOGITS.double().softmax(1), labels=range(8)), rel=1e-5)


def test_fewer_than_five_classes_are_fine():
    metric = Classification(("a", "b")).metric(torch.device("cpu"))
    metric.update(Gives(LOGITS[:, :2]), (LOGITS, TARGETS % 2))
    assert metric.compute(metric.sums())["acc@5"] == 1
