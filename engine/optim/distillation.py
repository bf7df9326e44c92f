"""Learning from a teacher's logits as well as from the labels.

Hinton, Vinyals, Dean (2015): Distilling the Knowledge in a Neural Network. https://arxiv.org/abs/1503.02531
"""

import logging
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator
from torch import Tensor, nn
from torch.nn import functional as F

from engine.config.errors import ConfigError, RunError
from engine.config.schema import DataConfig, DistillConfig
from engine.optim.layers import classifier
from engine.run.checkpoint import InvalidCheckpoint, read_checkpoint
from engine.run.folder import find_checkpoint, read_config
from engine.run.log import millions
from engine.tasks import Task
from models import create_model
from models.loading.pretrained import load_pretrained

log = logging.getLogger(__name__)


class Distillation:
    """A task with another loss, and everything else of the task. Teacher and student see the same images, mixed ones too."""

    def __init__(self, task: Task, teacher: nn.Module, *, temperature: float, weight: float) -> None:
        self.task, self.teacher, self.temperature, self.weight_of_teacher = task, teacher, temperature, weight

    def __getattr__(self, name: str) -> Any:
        return getattr(self.task, name)

    def loss_sum(self, model: nn.Module, batch: Any) -> tuple[Tensor, dict[str, Tensor]]:
        outputs: list[Any] = []

        def student(*inputs: Any) -> Any:
            outputs.append(model(*inputs))
            return outputs[-1]

        own_loss, sums = self.task.loss_sum(student, batch)  # type: ignore[arg-type]  # tasks only call it
        with torch.no_grad():
            expected = self.teacher(batch[0])
        logits = outputs[0][0] if isinstance(outputs[0], tuple) else outputs[0]  # auxiliary heads learn from the labels alone
        if not isinstance(logits, Tensor) or logits.shape != expected.shape:
            raise ConfigError("distill.teacher", "its logits do not have the shape of the student's, so it can't teach this task")
        distilled = distillation_loss(logits, expected, self.temperature).sum()
        loss = torch.lerp(own_loss, distilled.to(own_loss.dtype), self.weight_of_teacher)
        return loss, {**sums, "loss": loss, "loss_distill": distilled}


def distillation_loss(student: Tensor, teacher: Tensor, temperature: float) -> Tensor:
    """Return, for each sample, the divergence of the softened distributions.

    The factor temperature^2 keeps gradients as large as those of the labels at every temperature.
    """
    softened = F.log_softmax(student.float() / temperature, dim=1), F.log_softmax(teacher.float() / temperature, dim=1)
    return temperature**2 * F.kl_div(*softened, reduction="none", log_target=True).sum(1)


# The teacher


def load_teacher(
    distill: DistillConfig, data: DataConfig, sizes: dict[str, Any], accelerator: Accelerator, *, channels_last: bool
) -> nn.Module:
    """Return the teacher in evaluation mode, on the device, in the precision of the training.

    It is a run of this project, or a model by name with weights. `sizes` are n_classes, in_channels and img_size.
    """
    name = str(distill.teacher)
    path = Path(name).expanduser()
    state = torch.get_rng_state()  # the teacher's initial weights must not change the student's
    try:
        if path.exists():
            teacher = _from_run(path, sizes, data)
        else:
            teacher = create_model(name, **sizes, **distill.args)
            _require_same_classes(load_pretrained(teacher, name, distill.pretrained), sizes["n_classes"], data)
    except OSError as error:
        raise RunError(f"distill.pretrained: {error}") from error
    except (ValueError, TypeError) as error:
        raise ConfigError("distill.teacher", f"{name}: {error}") from error
    finally:
        torch.set_rng_state(state)
    teacher.requires_grad_(False).eval()
    teacher.to(accelerator.device)
    if channels_last:
        teacher.to(memory_format=torch.channels_last)
    log.info("the teacher is %s (%s parameters)", name, millions(sum(p.numel() for p in teacher.parameters())))
    return accelerator.prepare_model(teacher, evaluation_mode=True)


def _from_run(path: Path, sizes: dict[str, Any], data: DataConfig) -> nn.Module:
    folder = find_checkpoint(path)
    config = read_config(folder.parent.parent)
    try:
        weights = read_checkpoint(folder).weights
    except InvalidCheckpoint as error:
        raise RunError(f"distill.teacher: {error}") from error
    arguments = {key: value for key, value in config["model"].items() if key not in ("name", "pretrained")}
    teacher = create_model(config["model"]["name"], **sizes, features_only=False, out_indices=None, **arguments)
    _require_same_classes({name: len(weights[name]) for name in classifier(teacher) if name in weights}, sizes["n_classes"], data)
    try:
        teacher.load_state_dict(weights)
    except RuntimeError as error:
        first = str(error).splitlines()[1].strip()
        shape = f"{sizes['in_channels']} channels of {sizes['img_size']}x{sizes['img_size']}"
        raise ValueError(f"its weights don't fit the images of {data.name}, {shape}: {first}") from error
    trained_on = config["data"]
    same_images = trained_on["name"].lower() == data.name.lower()
    if not same_images or any(trained_on[key] != getattr(data, key) for key in ("mean", "std")):
        log.warning("the teacher learned from %s, normalized its way; here it sees %s", trained_on["name"], data.name)
    return teacher


def _require_same_classes(lengths: dict[str, int], n_classes: int, data: DataConfig) -> None:
    """`lengths` are those of the classifier's tensors in the file."""
    other = next((n for n in lengths.values() if n not in (0, n_classes)), None)
    if other is not None:
        problem = f"has {other} classes, and {data.name} has {n_classes}: a teacher for these classes is needed"
        raise ConfigError("distill.teacher", problem)
