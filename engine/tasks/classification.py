"""One class per image."""

from collections.abc import Sequence

import torch
from torch import Tensor, nn
from torch.nn import functional as F

Batch = tuple[Tensor, Tensor]  # images; class numbers or, where images were mixed, probabilities


class Classification:
    monitor = "acc@1"

    def __init__(self, classes: Sequence[str], aux_weight: float = 0.3, label_smoothing: float = 0.0) -> None:
        self.classes = tuple(classes)
        self.aux_weight, self.label_smoothing = aux_weight, label_smoothing

    def weight(self, batch: Batch) -> int:
        return len(batch[1])

    def loss_sum(self, model: nn.Module, batch: Batch) -> tuple[Tensor, dict[str, Tensor]]:
        images, targets = batch
        outputs = model(images)
        logits, *auxiliary = outputs if isinstance(outputs, tuple) else (outputs,)
        loss = self._loss(logits, targets)
        labels = targets if targets.ndim == 1 else targets.argmax(1)
        sums = {"acc@1": (logits.argmax(1) == labels).sum()}
        for i, aux_logits in enumerate(auxiliary, start=1):
            aux_loss = self._loss(aux_logits, targets)
            sums[f"loss_aux{i}"] = aux_loss
            loss = loss + self.aux_weight * aux_loss
        return loss, {"loss": loss, **sums}

    def _loss(self, logits: Tensor, targets: Tensor) -> Tensor:
        return F.cross_entropy(logits, targets, reduction="sum", label_smoothing=self.label_smoothing)

    def metric(self, device: torch.device) -> "Accuracy":
        return Accuracy(device)

    def predict(self, model: nn.Module, batch: Batch) -> Tensor:
        return model(batch[0]).softmax(1)

    def draw(self, images: Tensor, batch: Batch, predictions: Tensor):
        from engine.figures import draw_classes

        return draw_classes(images, batch[1], predictions, self.classes)


class Accuracy:
    """Loss and accuracy of every sample, counted once."""

    def __init__(self, device: torch.device) -> None:
        dtype = torch.float32 if device.type == "mps" else torch.float64
        self._sums = torch.zeros(4, dtype=dtype, device=device)  # loss, top 1, top 5, samples

    def update(self, model: nn.Module, batch: Batch) -> None:
        images, targets = batch
        logits = model(images)
        best = logits.topk(min(5, logits.shape[1]), dim=1).indices == targets.unsqueeze(1)
        loss = F.cross_entropy(logits, targets, reduction="sum")
        self._sums += torch.stack([loss, best[:, 0].sum(), best.sum(), torch.tensor(len(targets), device=loss.device)])

    def sums(self) -> Tensor:
        return self._sums

    def compute(self, sums: Tensor) -> dict[str, float]:
        loss, top1, top5, count = sums.tolist()
        return {"loss": loss / count, "acc@1": top1 / count, "acc@5": top5 / count, "count": int(count)}
