"""Every key of a config: its type, its default, its bounds, its meaning.

A section with a field `args` is open: its further keys are arguments of a model, an optimizer or a dataset, and are checked
against its signature.
"""

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field, fields, is_dataclass
from typing import Any, Literal, get_type_hints

from engine.config import yaml12

REQUIRED = "???"  # OmegaConf's mark for a key without a default

Precision = Literal["fp32", "tf32", "fp16", "bf16"]


def key(default: Any, meaning: str, **bounds: float) -> Any:
    """Declare a key with its meaning and bounds: above and below exclude the bound, least and most include it."""
    metadata = {"meaning": meaning, "bounds": bounds}
    if isinstance(default, list):
        return field(default_factory=lambda: list(default), metadata=metadata)
    return field(default=default, metadata=metadata)


def open_section(meaning: str) -> Any:
    return field(default_factory=dict, metadata={"meaning": meaning, "bounds": {}})


@dataclass(frozen=True)
class DataConfig:
    name: str = key(REQUIRED, "the dataset, such as CIFAR-10; case and dashes do not matter")
    dataroot: str | None = key(None, "folder of its files; null: ~/data/<name>")
    img_size: int | None = key(None, "height and width of the model's input; null: the dataset's", least=1)
    n_classes: int | None = key(None, "number of classes; null: that of the data; a contradiction is an error", least=1)
    verify: bool = key(True, "check the files against their published checksums; false: read any files in the same format")
    download: bool = key(True, "download missing files, if the dataset is published")
    mean: list[float] | None = key(None, "mean of each channel, from 0 to 1, for normalization; null: the dataset's")
    std: list[float] | None = key(None, "standard deviation of each channel; null: the dataset's")
    exif_rotate: bool = key(
        False, "turn images in files as the camera's EXIF data say; masks and boxes must be those of the turned images"
    )
    valid_ratio: float | None = key(
        None, "share of the training split that is held out for validation; null: validate on the test split", above=0, below=1
    )
    sampler: Literal["shuffled", "balanced"] = key(
        "shuffled", "classification: shuffled: an epoch has every training image once; balanced: every class equally often"
    )
    args: dict[str, Any] = open_section("options of the dataset")


@dataclass(frozen=True)
class AugmentConfig:
    enabled: bool = key(True, "false: prepare training images like evaluation images")
    crop_padding: int | None = key(
        None, "in-memory datasets: padding, in pixels, before a random crop; null: the dataset's", least=0
    )
    padding_mode: Literal["constant", "reflect"] = key("constant", "the padding is black, or the mirrored image")
    hflip: bool | Literal["alternating"] | None = key(
        None, "flip half of the images; alternating (in-memory datasets): flip each image every other epoch; null: the dataset's"
    )
    cutout: int = key(0, "in-memory datasets: side of the square that Cutout masks, in pixels; 0: off", least=0)
    mixup: float = key(0.0, "alpha of mixup (blends two images and their labels); 0: off", least=0)
    cutmix: float = key(0.0, "alpha of CutMix (pastes a box of another image); 0: off", least=0)
    mix_prob: float = key(1.0, "probability of mixing a batch, with mixup or CutMix", above=0, most=1)
    mix_epochs: int | None = key(None, "epochs after which mixing stops; null: never", least=1)
    mix_switch_prob: float = key(0.5, "probability of CutMix instead of mixup, if both are on", least=0, most=1)
    scale: list[float] = key([0.08, 1.0], "image folders: range of the random resized crop's area, as shares of the image")
    crop_pct: float = key(0.875, "image folders: share of the resized image that an evaluation crops", above=0, most=1)
    interpolation: Literal["bilinear", "bicubic"] = key("bilinear", "image folders: interpolation for resizing, antialiased")
    auto: Literal["randaugment", "trivialaugment", "augmix"] | None = key(None, "image folders: augmentation policy; null: none")
    auto_magnitude: int = key(9, "magnitude of randaugment", least=0, most=30)
    color_jitter: float = key(0.0, "largest relative change of brightness, contrast and saturation; 0: off", least=0, most=1)
    erasing: float = key(0.0, "image folders: probability of masking a rectangle (Random Erasing)", least=0, most=1)
    zoom: list[float] = key(
        [0.5, 2.0], "segmentation of files: range of the factor from data.img_size to the image's shorter side before the crop"
    )
    resize_from: int | None = key(
        None, "progressive resizing: height and width of the first epochs' images, which grow to data.img_size", least=1
    )
    resize_epochs: int | None = key(None, "epochs until images have their full size; null: the whole run", least=1)
    resize_step: int = key(16, "sizes in between differ from data.img_size by multiples of this", least=1)
    repeats: int = key(
        1, "image folders: differently augmented copies of each image in a batch; an epoch has as many times more steps", least=1
    )


@dataclass(frozen=True)
class DataloaderConfig:
    num_workers: int | Literal["auto"] = key(
        "auto", "worker processes per device; auto: one per core; in-memory datasets need none", least=0
    )
    pin_memory: bool = key(True, "page-locked memory for batches, for faster copies to a GPU")
    prefetch_factor: int = key(2, "batches that each worker prepares in advance", least=1)


@dataclass(frozen=True)
class ModelConfig:
    name: str = key(REQUIRED, "a name that `tools/count_macs.py --list` prints, or timm/<any timm model>")
    pretrained: str | bool = key(False, "a file of weights to start from; true: the published ones")
    args: dict[str, Any] = open_section("arguments of the model's constructor, such as first_block")


@dataclass(frozen=True)
class OptimConfig:
    type: str = key("SGD", "a class of torch.optim, or any optimizer of timm")
    lr: float = key(0.1, "learning rate", above=0)
    weight_decay: float = key(0.0005, "weight decay", least=0)
    momentum: float = key(0.9, "momentum, for optimizers that have one", least=0)
    decay_norm_and_bias: bool = key(
        True, "false: no weight decay for norms, biases and the model's no_weight_decay(), such as a ViT's pos_embed"
    )
    layer_decay: float | None = key(
        None, "factor from each block's learning rate to that of the block before it; the head has lr", above=0, most=1
    )
    head_lr: float | None = key(None, "learning rate of the classifier; null: lr", above=0)
    bias_lr: float | None = key(None, "learning rate of norms and biases, except the classifier's; null: lr", above=0)
    args: dict[str, Any] = open_section("arguments of the optimizer's constructor, such as betas, fused or foreach")


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
    ] = key("CosineAnnealingLR", "the schedule, named after torch.optim.lr_scheduler and counted in updates")
    t_max: int | None = key(
        None,
        "CosineAnnealingLR, LinearLR, PolynomialLR, OneCycleLR: the update at which the schedule ends, a warm-up included; "
        "null: the run's length without its cool-down. After it the cosine rises again, the others stay constant",
        least=1,
    )
    eta_min: float = key(
        0.0, "CosineAnnealingLR, CosineAnnealingWarmRestarts, LinearLR, PolynomialLR: the learning rate they end at", least=0
    )
    t_0: int | None = key(None, "CosineAnnealingWarmRestarts: updates until the first restart", least=1)
    t_mult: int = key(1, "CosineAnnealingWarmRestarts: ratio of the length of a cycle to that of the one before", least=1)
    milestones: list[int] = key([], "MultiStepLR: the updates after which lr is multiplied by gamma")
    step_size: int | None = key(None, "StepLR: updates between two multiplications of lr by gamma", least=1)
    gamma: float = key(0.1, "MultiStepLR and StepLR: the factor", above=0)
    power: float = key(1.0, "PolynomialLR: 1 is a straight line; 0.9 is usual for segmentation", above=0)
    pct_start: float = key(
        0.3, "OneCycleLR: share of the schedule in which lr rises; the momentum is not cycled", least=0, below=1
    )
    div_factor: float = key(25.0, "OneCycleLR: it begins at lr / div_factor", above=0)
    final_div_factor: float = key(10000.0, "OneCycleLR: it ends at lr / div_factor / final_div_factor", above=0)
    warmup_steps: int = key(0, "updates in which lr rises linearly from warmup_lr at the start", least=0)
    warmup_epochs: float = key(0.0, "the same in epochs", least=0)
    warmup_lr: float = key(0.0, "learning rate at the start of the warm-up", least=0)
    cooldown_steps: int = key(
        0, "the run's last updates, in which lr falls linearly to cooldown_lr from the schedule's value", least=0
    )
    cooldown_epochs: float = key(0.0, "the same in epochs", least=0)
    cooldown_lr: float = key(0.0, "learning rate at the end of the cool-down, one update after the run's last", least=0)


@dataclass(frozen=True)
class TrainConfig:
    n_steps: int | None = key(None, "the run's length in updates", least=1)
    n_epochs: int | None = key(None, "the same in epochs", least=1)
    batch_size: int = key(128, "images per update, over all devices", least=1)
    micro_batch_size: int = key(0, "images per forward and device; 0: all at once", least=0)
    print_freq: int | None = key(None, "updates between two log lines; null: once per epoch", least=1)
    save_freq: int | None = key(None, "updates between two checkpoints; null: once per epoch", least=1)
    eval_freq: int | None = key(None, "updates between two evaluations; null: once per epoch", least=1)
    keep_last: int = key(3, "checkpoints to keep, in addition to the best", least=2)
    precision: Precision | None = key(
        None, "null: the launcher's, otherwise fp32; tf32: fp32 whose products a GPU rounds to 10 bits"
    )
    compile: bool | Literal["regions"] = key(False, "torch.compile the model; regions: each of its blocks alone, equal ones once")
    compile_mode: Literal["default", "reduce-overhead", "max-autotune"] = key("default", "torch.compile's mode")
    grad_checkpointing: bool = key(False, "recompute activations in the backward pass to save memory, for models that support it")
    nonfinite: Literal["stop", "skip"] = key(
        "stop", "on a non-finite loss or gradient, stop the run or skip the update (which waits for the device each step)"
    )
    most_skipped: int = key(10, "updates in a row that train.nonfinite skip may skip before the run stops", least=1)
    channels_last: bool = key(False, "channels_last memory format for weights and feature maps")
    clip_grad_norm: float | None = key(None, "largest norm of the gradients; larger ones are scaled down", above=0)
    clip_grad_value: float | None = key(None, "largest absolute value of a gradient's elements", above=0)
    sam: float | None = key(
        None, "rho of sharpness-aware minimization (0.05 is usual), which doubles the cost of an update", above=0
    )
    sam_adaptive: bool = key(False, "train.sam in units of each weight (ASAM, with a rho about ten times as large)")
    scale_lr: int | None = key(
        None, "the batch size that train.optim.lr is for; lr is scaled in proportion to train.batch_size", least=1
    )
    ema: float | None = key(
        None,
        "decay of an exponential moving average of the weights, evaluated (valid_ema) and saved beside them",
        above=0,
        below=1,
    )
    ema_warmup: bool = key(True, "raise the decay from 0 to train.ema, so that the first weights are soon forgotten")
    average_last: float | None = key(
        None, "instead of train.ema: plain average of the weights over this last share of the run (SWA)", above=0, most=1
    )
    eval_first: bool = key(False, "also evaluate before the first step")
    patience: int | None = key(None, "evaluations without improvement after which the run ends early", least=1)
    time_limit: float | None = key(
        None, "minutes after which the run saves a checkpoint and ends as with SIGTERM; -r continues it", above=0
    )
    timeout: int = key(600, "seconds without an answer from a worker or another rank after which the run ends; 0: never", least=0)
    profile: int = key(0, "updates to record with torch's profiler, after the first 11, into profile/ of the run folder", least=0)
    sync_batchnorm: bool = key(False, "synchronize BatchNorm over all GPUs")
    num_threads: int | None = key(
        None, "torch's CPU threads per process; null: torch's choice, at most one per core that it may use", least=1
    )
    keep_memory: bool = key(
        False,
        "on a CPU (Linux), keep freed memory of any size for the next tensors: with large batches 1.2 to 1.5 times as fast, for "
        "up to 45 % more memory",
    )
    loss: Literal["cross_entropy", "bce", "focal", "asymmetric"] = key(
        "cross_entropy",
        "bce: binary cross-entropy, a yes/no question per class, averaged over classes (the default for multilabel); "
        "focal: weighs the loss by (1 - p)^gamma, where p is the probability of the right answer; asymmetric (multilabel): "
        "focal with a larger gamma for absent classes",
    )
    focal_gamma: float = key(2.0, "gamma of the focal loss; 0 is cross-entropy", least=0)
    class_weights: list[float] | Literal["balanced"] | None = key(
        None,
        "cross_entropy and focal: a factor for the loss of each class, in their order; balanced: inverse to the classes' "
        "frequencies, 1 on average over the training images. multilabel: a factor for images that have the class; balanced: the "
        "number of images without it for each one with it. Evaluations don't use them",
    )
    label_smoothing: float = key(0.0, "share of the label that is spread over all classes", least=0, below=1)
    bce_threshold: float | None = key(
        None,
        "bce: threshold above which a class of a mixed or smoothed label counts as a full yes, otherwise as a no",
        least=0,
        below=1,
    )
    aux_weight: float = key(0.3, "weight of the loss of each auxiliary head, for models that have them", least=0)
    freeze: list[str] = key(
        [], "parts to freeze: trunk (all but the classifier), stem, stage1, ..., or patterns of names, such as layer1.*"
    )
    optim: OptimConfig = field(default_factory=OptimConfig)
    sched: SchedConfig = field(default_factory=SchedConfig)

    @property
    def base_lr(self) -> float:
        """The learning rate that the schedule is applied to: train.optim.lr, scaled to the batch size by train.scale_lr."""
        return self.optim.lr * (self.batch_size / self.scale_lr if self.scale_lr else 1)


@dataclass(frozen=True)
class DistillConfig:
    teacher: str | None = key(None, "the teacher: a run of this project, or a model by name; null: no distillation")
    pretrained: str | bool = key(False, "weights of a teacher by name: a file, or true for the published ones")
    temperature: float = key(4.0, "temperature that softens both distributions", above=0)
    weight: float = key(0.5, "share of the teacher in the loss; the labels have the rest", above=0, most=1)
    args: dict[str, Any] = open_section("arguments of the constructor of a teacher by name, such as first_block")


@dataclass(frozen=True)
class TrackingConfig:
    to: list[Literal["wandb", "mlflow"]] = key([], "trackers, in addition to TensorBoard and metrics.jsonl")
    project: str = key("image-backbones", "project or experiment of the run in these trackers")


@dataclass(frozen=True)
class EvalConfig:
    batch_size: int | None = key(None, "images per forward and device; null: as in training", least=1)
    img_size: int | None = key(None, "height and width of images in evaluations; null: data.img_size", least=1)
    resize: Literal["pillow", "torch"] = key(
        "pillow",
        "image folders: the library that scales images in evaluations; torch takes 40 % less CPU time per image in all, and its "
        "pixels are at most 2 levels from Pillow's (mean below 0.004)",
    )
    tta: Literal["flip", "flip_and_shift"] | None = key(
        None,
        "test-time augmentation; flip: average the logits of each image and its mirror image, at twice the cost; "
        "flip_and_shift (classification): also two shifts by a pixel, with half the weight, at six times the cost",
    )


@dataclass(frozen=True)
class SegmentationConfig:
    head: Literal["fcn", "deeplabv3", "hrnet"] = key(
        "fcn", "the segmentation head, on the last feature map; hrnet: on the last four"
    )
    output_stride: int | None = key(
        8, "fcn, deeplabv3: replace strides beyond it by dilation; null: keep the backbone's strides", least=1
    )
    aux_head: bool = key(False, "in training, a second head on the map before the last, with the loss weight train.aux_weight")
    dice_weight: float = key(0.0, "weight of the Dice loss, which is added to the cross-entropy", least=0)


@dataclass(frozen=True)
class DetectionConfig:
    head: Literal["fcos", "fasterrcnn"] = key("fcos", "the detector, on a feature pyramid")
    n_maps: int | None = key(
        None, "number of the backbone's last feature maps in the pyramid; null: 3 for fcos, 4 for fasterrcnn", least=1
    )
    width: int = key(256, "channels of the pyramid, and of the head of fcos", least=32)
    max_size: int | None = key(
        None, "largest longer side; the shorter one is data.img_size if that fits; null: 5/3 of data.img_size", least=1
    )
    score_threshold: float | None = key(
        None, "lowest score of a detection; null: torchvision's 0.2 for fcos, 0.05 for fasterrcnn", least=0, below=1
    )


@dataclass(frozen=True)
class Config:
    seed: int = key(1234, "seed of initial weights, order, augmentation and dropout", least=0)
    deterministic: bool = key(False, "only deterministic kernels; without it, runs on a GPU may differ in the last bits")
    task: str = key("classification", "classification, multilabel, segmentation, detection, or a task of a plugin")
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
WITHOUT_EFFECT_ON_WEIGHTS: tuple[str, ...] = ("train.print_freq", "train.save_freq", "train.eval_freq", "train.keep_last")
WITHOUT_EFFECT_ON_WEIGHTS += ("train.profile", "train.keep_memory", "dataloader.", "eval.", "tracking.")
WITHOUT_EFFECT_ON_WEIGHTS += ("data.dataroot", "data.verify", "data.download")


def leaves(section: type = Config, prefix: str = "") -> Iterator[tuple[str, Any, Mapping[str, float]]]:
    """Yield every key of the schema, dotted, with its type and its bounds. The open `args` of a section are none."""
    hints = get_type_hints(section)
    for spec in fields(section):
        if is_dataclass(hint := hints[spec.name]):
            yield from leaves(hint, f"{prefix}{spec.name}.")  # type: ignore[arg-type]  # a type hint is a class, not an instance
        elif spec.name != "args":
            yield f"{prefix}{spec.name}", hint, spec.metadata["bounds"]


def keys() -> list[str]:
    """Return every key of the schema, dotted."""
    return [key for key, _, _ in leaves()]


def to_dict(config: Any, section: type = Config) -> dict[str, Any]:
    """Return a config or a section of it as plain values, in the layout of a config file."""
    plain: dict[str, Any] = {}
    for spec in fields(section):
        item = getattr(config, spec.name)
        if spec.name == "args":
            plain.update(item)
        else:
            plain[spec.name] = to_dict(item, type(item)) if is_dataclass(item) else item
    return plain


def to_yaml(config: Config) -> str:
    return yaml12.dump(to_dict(config))


def flatten(values: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    """Turn {"train": {"optim": {"lr": 0.1}}} into {"train.optim.lr": 0.1}."""
    flat: dict[str, Any] = {}
    for key, value in values.items():
        flat |= flatten(value, f"{prefix}{key}.") if isinstance(value, Mapping) and value else {f"{prefix}{key}": value}
    return flat
