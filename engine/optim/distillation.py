"""Learning from a teacher's logits, beside what a task learns from its labels.

Hinton, Vinyals, Dean (2015): Distilling the Knowledge in a Neural Network. https://arxiv.org/abs/1503.02531
"""

from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from engine.config.errors import ConfigError
from engine.tasks import Task


class Distillation:
    """A task with another loss; all else is the task's own. Teacher and student see the same images, mixed ones too."""

    def __init__(self, task: Task, teacher: nn.Module, *, temperature: float, weight: float) -> None:
        self.task, self.teacher, self.temperature, self.teachers_part = task, teacher, temperature, weight

    def __getattr__(self, name: str) -> Any:
        return getattr(self.task, name)

    def loss_sum(self, model: nn.Module, batch: Any) -> tuple[Tensor, dict[str, Tensor]]:
        said = []

        def student(*inputs: Any) -> Any:
            said.append(model(*inputs))
            return said[-1]

        own_loss, sums = self.task.loss_sum(student, batch)
        with torch.no_grad():
            of_teacher = self.teacher(batch[0])
        logits = said[0][0] if isinstance(said[0], tuple) else said[0]  # auxiliary heads learn from the labels alone
        if not isinstance(logits, Tensor) or logits.shape != of_teacher.shape:
            raise ConfigError("distill.teacher gives no logits of the shape of the student's, so it can't teach this task")
        distilled = distillation_loss(logits, of_teacher, self.temperature).sum()
        loss = torch.lerp(own_loss, distilled.to(own_loss.dtype), self.teachers_part)
        return loss, {**sums, "loss": loss, "loss_distill": distilled}


def distillation_loss(student: Tensor, teacher: Tensor, temperature: float) -> Tensor:
    """Of each sample: how far the student's softened distribution is from the teacher's. The square keeps gradients as large as
    those of the labels at every temperature."""
    softened = F.log_softmax(student.float() / temperature, dim=1), F.log_softmax(teacher.float() / temperature, dim=1)
    return temperature**2 * F.kl_div(*softened, reduction="none", log_target=True).sum(1)
