"""Every key of a config: its type, its default, its meaning.

A section with a field `args` is open: keys that it doesn't name are arguments of the thing that it builds (a model, an optimizer,
a data set), and are checked against its signature.
"""

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field, fields, is_dataclass
from typing import Any, Literal, get_type_hints

from engine.config import yaml12

REQUIRED = "???"  # stands where there is no default

Precision = Literal["fp32", "tf32", "fp16", "bf16"]


def key(default: Any, meaning: str, **bounds: float) -> Any:
    """A key with its meaning and its bounds: above and below exclude the bound, least and most include it."""
    metadata = {"meaning": meaning, "bounds": bounds}
    if isinstance(default, list):
        return field(default_factory=lambda: list(default), metadata=metadata)
    return field(default=default, metadata=metadata)


def further(meaning: str) -> Any:
    return field(default_factory=dict, metadata={"meaning": meaning, "bounds": {}})


@dataclass(frozen=True)
class DataConfig:
    name: str = key(REQUIRED, "the data set, such as CIFAR-10; case and dashes do not matter")
    dataroot: str | None = key(None, "the folder of its files; null: ~/data/<name>")
    img_size: int | None = key(None, "height and width of what the model sees; null: the data set's own", least=1)
    n_classes: int | None = key(None, "null: what the data says; a contradiction is an error", least=1)
    verify: bool = key(True, "check the files' published checksums; false reads any set in the same format")
    download: bool = key(True, "fetch what is missing, where the set is published for download")
    mean: list[float] | None = key(None, "of each channel, from 0 to 1, which images are normalized by; null: the data set's own")
    std: list[float] | None = key(None, "likewise the standard deviation")
    valid_ratio: float | None = key(
        None, "this part of the training split is kept for validation; null: validate on the test split", above=0, below=1
    )
    args: dict[str, Any] = further("options of the data set")


@dataclass(frozen=True)
class AugmentConfig:
    enabled: bool = key(True, "false: training images are prepared like evaluation images")
    crop_padding: int | None = key(
        None, "in-memory sets: random crop of the image padded by so many pixels; null: the data set's own", least=0
    )
    padding_mode: Literal["constant", "reflect"] = key("constant", "what the padding holds: black, or the mirrored image")
    hflip: bool | Literal["alternating"] | None = key(
        None, "mirror half of the images; alternating (in-memory sets): each one every other epoch; null: the data set's own"
    )
    cutout: int = key(0, "in-memory sets: side of a square that is blotted out, in pixels; 0: off", least=0)
    mixup: float = key(0.0, "alpha of mixup, which blends two images and their labels; 0: off", least=0)
    cutmix: float = key(0.0, "alpha of CutMix, which pastes a box of another image; 0: off", least=0)
    mix_prob: float = key(1.0, "of mixing a batch, where mixup or cutmix is on", above=0, most=1)
    mix_epochs: int | None = key(None, "mixing stops after so many epochs; null: it never does", least=1)
    mix_switch_prob: float = key(0.5, "of CutMix instead of mixup, where both are on", least=0, most=1)
    scale: list[float] = key([0.08, 1.0], "image folders: area of the random resized crop, as parts of the image")
    crop_pct: float = key(0.875, "image folders: the part of the resized image that evaluation sees", above=0, most=1)
    interpolation: Literal["bilinear", "bicubic"] = key("bilinear", "image folders: how images are resized, with antialias")
    auto: Literal["randaugment", "trivialaugment", "augmix"] | None = key(None, "image folders: random distortions; null: none")
    auto_magnitude: int = key(9, "strength of randaugment", least=0, most=30)
    color_jitter: float = key(0.0, "brightness, contrast and saturation change by up to this part; 0: off", least=0, most=1)
    erasing: float = key(0.0, "image folders: probability that a rectangle is blotted out (Random Erasing)", least=0, most=1)
    zoom: list[float] = key(
        [0.5, 2.0],
        "segmentation of files: before the crop, the shorter side becomes data.img_size times a factor from low to high",
    )
    resize_from: int | None = key(
        None, "progressive resizing: training begins with images of this height and width, which grow to data.img_size", least=1
    )
    resize_epochs: int | None = key(None, "epochs until they have grown; null: the whole run", least=1)
    resize_step: int = key(16, "sizes in between differ from data.img_size by a multiple of this", least=1)
    repeats: int = key(
        1, "image folders: each batch holds so many differently augmented copies of an image; an epoch is longer by it", least=1
    )


@dataclass(frozen=True)
class DataloaderConfig:
    num_workers: int | Literal["auto"] = key(
        "auto", "processes that decode images, for each device; auto: one per core; sets held in memory need none", least=0
    )
    pin_memory: bool = key(True, "page-locked batches, copied faster to a GPU")
    prefetch_factor: int = key(2, "batches that each worker prepares ahead", least=1)


@dataclass(frozen=True)
class ModelConfig:
    name: str = key(REQUIRED, "a name that `tools/count_macs.py --list` prints, or timm/<any timm model>")
    pretrained: str | bool = key(False, "a file of weights to start from; true: the published ones")
    args: dict[str, Any] = further("arguments of the model's constructor, such as first_block")


@dataclass(frozen=True)
class OptimConfig:
    type: str = key("SGD", "a class of torch.optim, or any optimizer of timm")
    lr: float = key(0.1, "learning rate", above=0)
    weight_decay: float = key(0.0005, "pull of the weights towards zero", least=0)
    momentum: float = key(0.9, "for optimizers that have it", least=0)
    decay_norm_and_bias: bool = key(
        True, "false: weight_decay spares norms, biases and what the model's no_weight_decay() names, such as a ViT's pos_embed"
    )
    layer_decay: float | None = key(
        None, "lr of each block is so many times that of the next; the head has lr itself, the stem the least", above=0, most=1
    )
    head_lr: float | None = key(None, "learning rate of the classifier; null: lr", above=0)
    bias_lr: float | None = key(None, "learning rate of norms and biases, all but the classifier's; null: lr", above=0)
    args: dict[str, Any] = further("arguments of the optimizer's constructor, such as betas, fused or foreach")


@dataclass(frozen=True)
class SchedConfig:
    type: Literal[
        "CosineAnnealingLR",
        "MultiStepLR",
        "StepLR",
        "CosineAnnealingWarmRestarts",
        "LinearLR",
        "PolynomialLR",
        "OneCycleLR",
        "constant",
    ] = key("CosineAnnealingLR", "how lr changes; named after the classes of torch.optim.lr_scheduler, and counted in updates")
    t_max: int | None = key(
        None,
        "CosineAnnealingLR, LinearLR, PolynomialLR, OneCycleLR: the update at which the schedule ends, a warm-up included; "
        "null: the run's length without its cool-down. Beyond it the cosine rises again, the others stay where they are",
        least=1,
    )
    eta_min: float = key(
        0.0, "CosineAnnealingLR, CosineAnnealingWarmRestarts, LinearLR, PolynomialLR: the learning rate they end at", least=0
    )
    t_0: int | None = key(None, "CosineAnnealingWarmRestarts: updates until the first restart", least=1)
    t_mult: int = key(1, "CosineAnnealingWarmRestarts: each cycle is so many times as long as the one before", least=1)
    milestones: list[int] = key([], "MultiStepLR: the updates after which lr is multiplied by gamma")
    step_size: int | None = key(None, "StepLR: every so many updates lr is multiplied by gamma", least=1)
    gamma: float = key(0.1, "MultiStepLR and StepLR: the factor", above=0)
    power: float = key(1.0, "PolynomialLR: 1 is a straight line; 0.9 is usual for segmentation", above=0)
    pct_start: float = key(
        0.3, "OneCycleLR: the part of the schedule in which lr rises; torch's cycle of the momentum is left out", least=0, below=1
    )
    div_factor: float = key(25.0, "OneCycleLR: it begins at lr / div_factor", above=0)
    final_div_factor: float = key(10000.0, "OneCycleLR: it ends at lr / div_factor / final_div_factor", above=0)
    warmup_steps: int = key(0, "updates in which lr first rises linearly from warmup_lr", least=0)
    warmup_epochs: float = key(0.0, "the same in epochs", least=0)
    warmup_lr: float = key(0.0, "where the warm-up begins", least=0)
    cooldown_steps: int = key(
        0, "the run's last updates, in which lr falls linearly to cooldown_lr from where the schedule stands then", least=0
    )
    cooldown_epochs: float = key(0.0, "the same in epochs", least=0)
    cooldown_lr: float = key(0.0, "where the cool-down ends, one update after the run's last", least=0)


@dataclass(frozen=True)
class TrainConfig:
    n_steps: int | None = key(None, "the run's length in updates", least=1)
    n_epochs: int | None = key(None, "the same in epochs", least=1)
    batch_size: int = key(128, "images per update, over all devices together", least=1)
    micro_batch_size: int = key(0, "images per forward and device; 0: all at once", least=0)
    print_freq: int | None = key(None, "updates between two log lines; null: once per epoch", least=1)
    save_freq: int | None = key(None, "updates between two checkpoints; null: once per epoch", least=1)
    eval_freq: int | None = key(None, "updates between two evaluations; null: once per epoch", least=1)
    keep_last: int = key(3, "checkpoints that are kept, beside the best", least=2)
    precision: Precision | None = key(
        None, "null: what the launcher says, fp32 without it; tf32: fp32 whose products a GPU rounds to 10 bits"
    )
    compile: bool = key(False, "torch.compile the model")
    compile_mode: Literal["default", "reduce-overhead", "max-autotune"] = key("default", "torch.compile's mode")
    grad_checkpointing: bool = key(
        False, "compute activations again in the backward pass, for less memory, where a model offers it"
    )
    nonfinite: Literal["stop", "skip"] = key(
        "stop",
        "a loss or gradient that is no number: stop the run, or leave out the update, which waits for the device each step",
    )
    most_skipped: int = key(10, "updates in a row that train.nonfinite skip leaves out before the run stops", least=1)
    channels_last: bool = key(False, "keep weights and feature maps with the channels last in memory")
    clip_grad_norm: float | None = key(None, "gradients whose norm is larger are scaled down to it", above=0)
    clip_grad_value: float | None = key(None, "no element of a gradient is further from zero", above=0)
    sam: float | None = key(
        None,
        "sharpness-aware minimization: gradients are taken so far up the slope (rho; 0.05 is usual), which doubles their cost",
        above=0,
    )
    sam_adaptive: bool = key(False, "train.sam in units of each weight (ASAM, where rho is about ten times as large)")
    scale_lr: int | None = key(
        None, "train.optim.lr is for batches of so many images, and is scaled in proportion to train.batch_size", least=1
    )
    ema: float | None = key(
        None,
        "decay of an exponential moving average of the weights, evaluated (valid_ema) and saved beside them",
        above=0,
        below=1,
    )
    ema_warmup: bool = key(True, "the decay rises to train.ema from 0, so that the first weights are soon forgotten")
    average_last: float | None = key(
        None, "instead of train.ema: the plain average of the weights over this last part of the run (SWA)", above=0, most=1
    )
    eval_first: bool = key(False, "evaluate before the first step too")
    patience: int | None = key(None, "evaluations without a better one after which the run ends early", least=1)
    time_limit: float | None = key(None, "minutes after which the run saves and ends as by SIGTERM; -r continues it", above=0)
    timeout: int = key(600, "seconds after which a worker, or another rank, that doesn't answer ends the run; 0: never", least=0)
    profile: int = key(
        0,
        "so many updates are recorded by torch's profiler, into profile/ of the run's folder; the first 11 are not",
        least=0,
    )
    sync_batchnorm: bool = key(False, "BatchNorm normalizes by the batch of all GPUs together, not by each one's part")
    num_threads: int | None = key(None, "of torch on the CPU, for each process; null: torch's own choice", least=1)
    loss: Literal["cross_entropy", "bce"] = key(
        "cross_entropy", "bce: each class is its own yes/no question (binary cross entropy, the mean over the classes)"
    )
    label_smoothing: float = key(0.0, "this part of the label is spread over all classes", least=0, below=1)
    bce_threshold: float | None = key(
        None,
        "bce: a class whose part in a mixed or smoothed label is above this counts as a full yes, else as a no",
        least=0,
        below=1,
    )
    aux_weight: float = key(0.3, "weight of the loss of each auxiliary head, where a model has them", least=0)
    freeze: list[str] = key(
        [],
        "what isn't trained: trunk (all but the classifier), stem, stage1, ..., or patterns of names, such as layer1.*",
    )
    optim: OptimConfig = field(default_factory=OptimConfig)
    sched: SchedConfig = field(default_factory=SchedConfig)

    @property
    def base_lr(self) -> float:
        """The learning rate that the schedule is applied to: train.optim.lr, scaled to the batch size by train.scale_lr."""
        return self.optim.lr * (self.batch_size / self.scale_lr if self.scale_lr else 1)


@dataclass(frozen=True)
class DistillConfig:
    teacher: str | None = key(None, "what a student learns from: a run of this project, or a model by name; null: labels alone")
    pretrained: str | bool = key(False, "of a teacher by name: a file of its weights; true: the published ones")
    temperature: float = key(4.0, "softens both distributions before they are compared", above=0)
    weight: float = key(0.5, "the teacher's part of the loss; the labels have the rest", above=0, most=1)
    args: dict[str, Any] = further("arguments of the constructor of a teacher by name, such as first_block")


@dataclass(frozen=True)
class TrackingConfig:
    to: list[Literal["wandb", "mlflow"]] = key([], "where metrics go beside TensorBoard and metrics.jsonl")
    project: str = key("image-backbones", "the project, or experiment, that the run is part of there")


@dataclass(frozen=True)
class EvalConfig:
    batch_size: int | None = key(None, "images per forward and device; null: as many as a device sees in training", least=1)
    img_size: int | None = key(None, "height and width of what is evaluated; null: data.img_size", least=1)
    tta: Literal["flip", "flip_and_shift"] | None = key(
        None,
        "flip: the logits of each image and of its mirrored image are averaged, which doubles the cost of an evaluation; "
        "flip_and_shift: with them those of two shifts by a pixel, with half the weight, at six times the cost (classification)",
    )


@dataclass(frozen=True)
class SegmentationConfig:
    head: Literal["fcn", "deeplabv3", "hrnet"] = key("fcn", "on the last feature map; hrnet: on the last four")
    output_stride: int | None = key(
        8, "fcn, deeplabv3: strides beyond it are replaced by dilation; null: the backbone's own strides", least=1
    )
    aux_head: bool = key(False, "in training, a second head on the map before the last; train.aux_weight weighs its loss")
    dice_weight: float = key(0.0, "weight of the Dice loss beside the cross-entropy, which has 1", least=0)


@dataclass(frozen=True)
class DetectionConfig:
    head: Literal["fcos", "fasterrcnn"] = key("fcos", "the detector, on a feature pyramid")
    n_maps: int | None = key(
        None, "feature maps of the backbone below the pyramid, counted from the last; null: 3 for fcos, 4 for fasterrcnn", least=1
    )
    width: int = key(256, "channels of the pyramid, and of the head of fcos", least=32)
    max_size: int | None = key(
        None, "data.img_size is an image's shorter side, unless the longer one became more than this; null: 5/3 of it", least=1
    )
    score_threshold: float | None = key(
        None,
        "what has a lower score isn't found; null: torchvision's 0.2 for fcos, 0.05 for fasterrcnn",
        least=0,
        below=1,
    )


@dataclass(frozen=True)
class Config:
    seed: int = key(1234, "of the initial weights, the order, the augmentation and dropout", least=0)
    deterministic: bool = key(
        False, "only kernels that give the same bits each time; without it that isn't promised on a GPU, nor for another one"
    )
    task: str = key("classification", "what is learned: classification, segmentation, detection, or a task of a plugin")
    data: DataConfig = field(default_factory=DataConfig)
    augment: AugmentConfig = field(default_factory=AugmentConfig)
    dataloader: DataloaderConfig = field(default_factory=DataloaderConfig)
    model: ModelConfig = field(default_factory=ModelConfig)
    train: TrainConfig = field(default_factory=TrainConfig)
    distill: DistillConfig = field(default_factory=DistillConfig)
    tracking: TrackingConfig = field(default_factory=TrackingConfig)
    eval: EvalConfig = field(default_factory=EvalConfig)
    segmentation: SegmentationConfig = field(default_factory=SegmentationConfig)
    detection: DetectionConfig = field(default_factory=DetectionConfig)


# Schedules with an end, which t_max sets.
SCHEDULES_WITH_AN_END = ("CosineAnnealingLR", "LinearLR", "PolynomialLR", "OneCycleLR")

# A resumed run that differs in these keys alone still ends with the same weights.
WITHOUT_EFFECT_ON_WEIGHTS: tuple[str, ...] = (
    "train.print_freq",
    "train.save_freq",
    "train.eval_freq",
    "train.keep_last",
    "train.profile",
)
WITHOUT_EFFECT_ON_WEIGHTS += ("dataloader.", "eval.", "tracking.", "data.dataroot", "data.verify", "data.download")


def leaves(section: type = Config, prefix: str = "") -> Iterator[tuple[str, Any]]:
    """Yield every key of the schema, dotted, with its type. The open `args` of a section are none."""
    for name, hint in get_type_hints(section).items():
        if is_dataclass(hint):
            yield from leaves(hint, f"{prefix}{name}.")  # type: ignore[arg-type]  # a type hint is a class, not an instance
        elif name != "args":
            yield f"{prefix}{name}", hint


def keys() -> list[str]:
    """Return every key of the schema, dotted."""
    return [key for key, _ in leaves()]


def to_dict(config: Config) -> dict[str, Any]:
    """Return the config as plain values, in the layout of a config file."""
    return _plain(config, Config)


def _plain(value: Any, section: type) -> dict[str, Any]:
    plain: dict[str, Any] = {}
    for spec in fields(section):
        item = getattr(value, spec.name)
        if spec.name == "args":
            plain.update(item)
        else:
            plain[spec.name] = _plain(item, type(item)) if is_dataclass(item) else item
    return plain


def to_yaml(config: Config) -> str:
    return yaml12.dump(to_dict(config))


def flatten(values: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    """Turn {"train": {"optim": {"lr": 0.1}}} into {"train.optim.lr": 0.1}."""
    flat: dict[str, Any] = {}
    for key, value in values.items():
        flat |= flatten(value, f"{prefix}{key}.") if isinstance(value, Mapping) and value else {f"{prefix}{key}": value}
    return flat
