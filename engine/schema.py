"""Every key of a config: its type, its default, its meaning.

The comment behind a key is its documentation. A section with a field `args` is open: keys that the section doesn't name are arguments of
the thing that it builds (a model, an optimizer, a data set) and are checked against its signature.
"""

from dataclasses import dataclass, field
from typing import Any, Literal

Positive = {"above": 0}
NotNegative = {"from": 0}
OneOrMore = {"from": 1}


@dataclass
class DataConfig:
    name: str = "???"  # the data set: digits, MNIST, FashionMNIST, CIFAR-10, CIFAR-100, imagefolder, ImageNet; case and dashes do not matter
    dataroot: str | None = None  # the folder that holds its files; null: ~/data/<name>
    img_size: int | None = field(default=None, metadata=OneOrMore)  # what the model sees; null: the data set's own size
    n_classes: int | None = field(default=None, metadata=OneOrMore)  # null: what the data says; a contradiction is an error
    verify: bool = True  # check the files' published checksums; false reads any set in the same format
    download: bool = True  # fetch what is missing, where the set is published for download
    valid_ratio: float | None = field(
        default=None, metadata={"above": 0, "below": 1}
    )  # this part of the training split is kept for validation; null: validate on the test split
    args: dict[str, Any] = field(default_factory=dict)  # further options of the data set


@dataclass
class AugmentConfig:
    enabled: bool = True  # false: training images are prepared like evaluation images
    crop_padding: int | None = field(
        default=None, metadata=NotNegative
    )  # random crop of the image padded by so many pixels (in-memory sets); null: the data set's own
    padding_mode: Literal["constant", "reflect"] = "constant"  # what the padding is filled with: black, or the mirrored image
    hflip: bool | None = None  # mirror half of the images; null: the data set's own
    scale: list[float] = field(default_factory=lambda: [0.08, 1.0])  # area of the random resized crop (image folders)
    crop_pct: float = field(
        default=0.875, metadata={"above": 0, "to": 1}
    )  # part of the resized image that evaluation sees (image folders)


@dataclass
class DataloaderConfig:
    num_workers: int = field(
        default=4, metadata=NotNegative
    )  # processes that decode images on each device; sets held in memory need none
    pin_memory: bool = True  # page-locked batches, copied faster to a GPU
    prefetch_factor: int = field(default=2, metadata=OneOrMore)  # batches that each worker prepares ahead


@dataclass
class ModelConfig:
    name: str = "???"  # a name that tools/count_macs.py --list prints, or timm/<any timm model>
    pretrained: str | bool = False  # a file of weights; true: the published ones
    args: dict[str, Any] = field(default_factory=dict)  # arguments of the model's constructor, such as first_block


@dataclass
class OptimConfig:
    type: str = "SGD"  # a class of torch.optim, or any optimizer of timm
    lr: float = field(default=0.1, metadata=Positive)
    weight_decay: float = field(default=0.0005, metadata=NotNegative)
    momentum: float = field(default=0.9, metadata=NotNegative)  # for optimizers that have it
    args: dict[str, Any] = field(default_factory=dict)  # further arguments of the optimizer's constructor


@dataclass
class SchedConfig:
    type: Literal["CosineAnnealingLR", "MultiStepLR", "StepLR", "constant"] = "CosineAnnealingLR"
    t_max: int | None = field(
        default=None, metadata=OneOrMore
    )  # updates until the cosine reaches eta_min; null: the run's length
    eta_min: float = field(default=0.0, metadata=NotNegative)  # the cosine's last learning rate
    milestones: list[int] = field(default_factory=list)  # MultiStepLR: the updates after which lr is multiplied by gamma
    step_size: int | None = field(default=None, metadata=OneOrMore)  # StepLR: every so many updates lr is multiplied by gamma
    gamma: float = field(default=0.1, metadata=Positive)
    warmup_steps: int = field(
        default=0, metadata=NotNegative
    )  # updates in which lr rises linearly from warmup_lr, before the schedule
    warmup_epochs: float = field(default=0.0, metadata=NotNegative)  # the same in epochs
    warmup_lr: float = field(default=0.0, metadata=NotNegative)


@dataclass
class TrainConfig:
    n_steps: int | None = field(default=None, metadata=OneOrMore)  # the run's length in updates
    n_epochs: int | None = field(default=None, metadata=OneOrMore)  # the same in epochs
    batch_size: int = field(default=128, metadata=OneOrMore)  # images per update, over all devices together
    micro_batch_size: int = field(default=0, metadata=NotNegative)  # images per forward and device; 0: all at once
    print_freq: int | None = field(default=None, metadata=OneOrMore)  # updates between two log lines; null: once per epoch
    save_freq: int | None = field(default=None, metadata=OneOrMore)  # updates between two checkpoints; null: once per epoch
    eval_freq: int | None = field(default=None, metadata=OneOrMore)  # updates between two evaluations; null: once per epoch
    keep_last: int = field(default=3, metadata={"from": 2})  # checkpoints that are kept, beside the best
    precision: Literal["fp32", "fp16", "bf16"] | None = None  # null: what the launcher says (fp32 without it)
    compile: bool = False  # torch.compile the model
    num_threads: int | None = field(
        default=None, metadata=OneOrMore
    )  # of torch on the CPU, for each process; null: torch's own choice
    optim: OptimConfig = field(default_factory=OptimConfig)
    sched: SchedConfig = field(default_factory=SchedConfig)


@dataclass
class EvalConfig:
    batch_size: int | None = field(
        default=None, metadata=OneOrMore
    )  # images per forward and device; null: as many as a device sees in training


@dataclass
class Config:
    seed: int = field(default=1234, metadata=NotNegative)  # of the initial weights, the order, the augmentation and dropout
    task: Literal["classification"] = "classification"
    data: DataConfig = field(default_factory=DataConfig)
    augment: AugmentConfig = field(default_factory=AugmentConfig)
    dataloader: DataloaderConfig = field(default_factory=DataloaderConfig)
    model: ModelConfig = field(default_factory=ModelConfig)
    train: TrainConfig = field(default_factory=TrainConfig)
    eval: EvalConfig = field(default_factory=EvalConfig)
