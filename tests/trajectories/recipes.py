"""Nine small trainings, one for each part of the engine that changes an update, on data in the formats of real datasets.

Pixels are computed with integers and stored without loss, so that they don't depend on a version of torch or of a JPEG decoder.
"""

import csv
import pickle
import struct
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image
from safetensors.torch import save_file

from models import create_model
from tests.on_disk import write_coco, write_pairs

N_STEPS = 100
COMMON = {"data.verify": False, "data.img_size": None, "dataloader.num_workers": 0}
COMMON |= {"train.print_freq": 1, "train.eval_freq": 10, "train.save_freq": 50}
COMMON |= {"train.sched.type": "CosineAnnealingWarmRestarts", "train.sched.t_0": 60}  # it does not depend on the run's length


@dataclass(frozen=True)
class Recipe:
    """The options of a training, and the function that writes its data and returns the options that name the files."""

    write: Callable[[Path], dict[str, Any]]
    options: dict[str, Any] = field(default_factory=dict)


def pictures(n: int, side: int, channels: int, seed: int, n_classes: int = 10) -> tuple[np.ndarray, np.ndarray]:
    """Return noisy pictures, n x channels x side x side, and their classes. Each class has its own pattern."""
    patterns = np.random.default_rng(1).integers(0, 128, (n_classes, channels, 4, 4))
    random = np.random.default_rng(seed)
    labels = random.integers(0, n_classes, n)
    large = np.kron(patterns[labels], np.ones((side // 4, side // 4), dtype=np.int64))
    return (large + random.integers(0, 128, large.shape)).astype(np.uint8), labels


def write_mnist(root: Path) -> dict[str, Any]:
    folder = root / "MNIST" / "raw"
    folder.mkdir(parents=True)
    for part, n in (("train", 160), ("t10k", 32)):
        images, labels = pictures(n, 28, 1, seed=n)
        for kind, array in (("images-idx3-ubyte", images[:, 0]), ("labels-idx1-ubyte", labels.astype(np.uint8))):
            header = struct.pack(f">HBB{array.ndim}I", 0, 8, array.ndim, *array.shape)
            (folder / f"{part}-{kind}").write_bytes(header + array.tobytes())
    return {"data.name": "MNIST", "data.dataroot": str(root)}


def write_cifar(root: Path) -> dict[str, Any]:
    folder = root / "cifar-10-batches-py"
    folder.mkdir(parents=True)
    for seed, part in enumerate([*(f"data_batch_{i}" for i in range(1, 6)), "test_batch"]):
        images, labels = pictures(32, 32, 3, seed)
        content = {"data": images.reshape(-1, 3072), "labels": labels.tolist()}
        (folder / part).write_bytes(pickle.dumps(content, protocol=2))
    (folder / "batches.meta").write_bytes(pickle.dumps({"label_names": [f"class {i}" for i in range(10)]}, protocol=2))
    return {"data.name": "CIFAR-10", "data.dataroot": str(root)}


def write_cifar_and_teacher(root: Path) -> dict[str, Any]:
    """Also write the weights of a teacher. Its logits are scaled up, since those of an untrained network are all alike."""
    torch.manual_seed(2)
    weights = create_model("lenet", n_classes=10, in_channels=3, img_size=32).state_dict()
    weights["fc3.weight"] *= 30
    save_file(weights, root / "teacher.safetensors")
    return write_cifar(root) | {"distill.pretrained": str(root / "teacher.safetensors")}


def write_labels(root: Path) -> dict[str, Any]:
    """Write PNG files of different sizes and the tables of their labels."""
    for part, n in (("train", 48), ("val", 16)):
        images, labels = pictures(n, 40, 3, seed=n, n_classes=6)
        with (root / f"{part}.csv").open("w", newline="") as file:
            rows = csv.writer(file)
            rows.writerow(("path", "labels"))
            for i, (image, label) in enumerate(zip(images, labels.tolist(), strict=True)):
                name = f"{part}-{i:03d}.png"
                Image.fromarray(image[:, : 40 - i % 8, : 33 + i % 8].transpose(1, 2, 0)).save(root / name)
                rows.writerow((name, f"a{label % 3}|b{label // 3}" if i % 4 else f"a{label % 3}"))
    return {"data.name": "table", "data.dataroot": str(root), "data.label_separator": "|"}


def write_masks(root: Path) -> dict[str, Any]:
    for part, n in (("train", 24), ("val", 4)):
        write_pairs(root / part, n, seed=n, ending=".png")
    return {"data.name": "pairs", "data.dataroot": str(root)}


def write_boxes(root: Path) -> dict[str, Any]:
    write_coco(root / "coco", n_train=12, n_val=2, ending=".png")
    return {"data.name": "cocojson", "data.dataroot": str(root / "coco")}


RESNET = {"model.name": "resnet18", "model.layers": [1, 1, 1, 1]}
# tanh and average pooling: where ReLU and max pooling switch, a rounding error becomes another gradient
LENET = {"model.name": "lenet", "model.classic": True, "train.batch_size": 16, "train.optim.type": "SGD", "train.optim.lr": 0.05}

RECIPES = {
    "lenet": Recipe(
        write_mnist,
        LENET | {"train.micro_batch_size": 6, "train.label_smoothing": 0.1, "train.clip_grad_norm": 1.0, "model.pdrop": 0.2},
    ),
    "resnet18": Recipe(
        write_cifar,
        RESNET
        | {"train.batch_size": 8, "augment.cutout": 8, "train.freeze": ["layer4"], "train.optim.lr": 0.0002}
        | {"train.optim.decay_norm_and_bias": False, "train.optim.weight_decay": 0.05},
    ),
    "vit_tiny": Recipe(
        write_cifar,
        {"model.name": "vit_tiny", "model.width": 32, "model.depth": 3, "model.n_heads": 2, "model.patch_size": 8}
        | {"model.pdrop": 0.1, "train.batch_size": 16, "train.sched.warmup_steps": 20}
        | {"train.optim.type": "AdamW", "train.optim.lr": 0.002, "train.optim.weight_decay": 0.05}
        | {"train.optim.decay_norm_and_bias": False},
    ),
    "mixup_ema": Recipe(write_cifar, LENET | {"augment.mixup": 0.4, "augment.cutmix": 1.0, "train.ema": 0.9}),
    "sam": Recipe(write_mnist, LENET | {"train.sam": 0.1}),
    "distillation": Recipe(
        write_cifar_and_teacher,
        LENET | {"distill.teacher": "lenet", "distill.temperature": 3.0, "data.sampler": "balanced"},
    ),
    "multilabel": Recipe(
        write_labels,
        LENET
        | {"task": "multilabel", "data.img_size": 28, "train.batch_size": 8, "train.class_weights": "balanced"}
        | {"augment.scale": [0.4, 1.0], "augment.color_jitter": 0.2},
    ),
    "segmentation": Recipe(
        write_masks,
        LENET
        | {"task": "segmentation", "segmentation.aux_head": True, "segmentation.dice_weight": 0.5, "data.img_size": 32}
        | {"segmentation.output_stride": None, "augment.color_jitter": 0.2}
        | {"train.batch_size": 8, "train.micro_batch_size": 3, "train.optim.lr": 0.001},
    ),
    "detection": Recipe(
        write_boxes,
        LENET
        | {"task": "detection", "detection.head": "fcos", "detection.width": 64, "detection.n_maps": 2, "data.img_size": 32}
        | {"augment.color_jitter": 0.2, "train.eval_freq": 50, "train.batch_size": 2, "train.optim.lr": 0.0001},
    ),
}
