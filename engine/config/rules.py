"""Every check between keys that needs no data: one function per rule, applied in the order of RULES.

A rule raises ConfigError for a contradiction, warns about a key without effect, or settles one key by another.
"""

import math
from collections.abc import Callable
from importlib.util import find_spec
from itertools import pairwise
from pathlib import Path

from engine.config.draft import DEFAULTS, Draft
from engine.config.errors import ConfigError, Origin
from engine.config.schema import SCHEDULES_WITH_AN_END

# The run's length


def one_length(draft: Draft) -> None:
    """Of n_steps and n_epochs, the one of higher origin sets the run's length; of the same origin they contradict each other."""
    steps, epochs = draft.origin("train.n_steps"), draft.origin("train.n_epochs")
    n_steps, n_epochs = draft["train.n_steps"], draft["train.n_epochs"]
    if n_steps is None and n_epochs is None:
        raise ConfigError("train.n_steps or train.n_epochs", "one of the two must be given")
    if n_steps is None or n_epochs is None:
        return
    if steps.rank == epochs.rank:
        problem = f"{n_steps} and train.n_epochs {n_epochs} both set the run's length"
        raise ConfigError(("train.n_steps", "train.n_epochs"), problem, "give one of them")
    used, unused = ("train.n_steps", "train.n_epochs") if steps.rank > epochs.rank else ("train.n_epochs", "train.n_steps")
    draft.notes.append(f"{draft.named(used)} sets the run's length; {draft.named(unused)} is ignored")
    draft[unused] = None


def frequencies_in_epochs(draft: Draft) -> None:
    """A run whose length is given in epochs logs, evaluates and saves once per epoch, unless a key of the same origin differs."""
    if draft["train.n_epochs"] is None:
        return
    for key in ("train.print_freq", "train.save_freq", "train.eval_freq"):
        if draft[key] is not None and draft.origin(key).rank < draft.origin("train.n_epochs").rank:
            draft.notes.append(f"{draft.named(key)} becomes once per epoch, as the run's length is given in epochs")
            draft[key] = None


def t_max_and_length(draft: Draft) -> None:
    """A schedule's end of lower origin than the run's length follows it; of the same origin it must agree with it."""
    t_max, origin = draft["train.sched.t_max"], draft.origin("train.sched.t_max")
    if t_max is None or draft["train.sched.type"] not in SCHEDULES_WITH_AN_END:
        return
    n_steps = draft["train.n_steps"]
    length_key = "train.n_steps" if n_steps is not None else "train.n_epochs"
    length = latest = draft.origin(length_key)
    description = f"{length_key} {draft[length_key]}"
    for key in ("train.sched.cooldown_steps", "train.sched.cooldown_epochs"):
        if draft[key]:
            description += f" less {key} {draft[key]:g}"
            latest = max(latest, draft.origin(key), key=lambda origin: origin.rank)
    in_steps = n_steps is not None and not draft["train.sched.cooldown_epochs"]  # otherwise the length of an epoch is needed
    if in_steps and t_max == n_steps - draft["train.sched.cooldown_steps"]:
        return
    if origin.rank < latest.rank:
        draft.notes.append(
            f"{description} ({latest.name}) sets the schedule's length; {draft.named('train.sched.t_max')} is ignored"
        )
        draft["train.sched.t_max"] = None
    elif in_steps and origin.rank == length.rank and not _is_of_a_run(origin):
        problem = f"{t_max} contradicts {description}"
        raise ConfigError(("train.sched.t_max", length_key), problem, "leave t_max out, or null, to follow the run's length")
    elif in_steps:
        draft.notes.append(f"warning: {draft.named('train.sched.t_max')} differs from {description}; it is kept")


def _is_of_a_run(origin: Origin) -> bool:
    """Whether a value comes from the config.yaml of a run, whose t_max was accepted with a warning when the run started."""
    path = Path(origin.name)
    return path.name == "config.yaml" and (path.parent / "environment.json").is_file()


# The schedule

SCHEDULE_KEYS = {  # and the types that read them
    "t_max": SCHEDULES_WITH_AN_END,
    "eta_min": ("CosineAnnealingLR", "CosineAnnealingWarmRestarts", "LinearLR", "PolynomialLR"),
    "t_0": ("CosineAnnealingWarmRestarts",),
    "t_mult": ("CosineAnnealingWarmRestarts",),
    "milestones": ("MultiStepLR",),
    "step_size": ("StepLR",),
    "gamma": ("MultiStepLR", "StepLR"),
    "power": ("PolynomialLR",),
    "pct_start": ("OneCycleLR",),
    "div_factor": ("OneCycleLR",),
    "final_div_factor": ("OneCycleLR",),
}


def schedule_has_its_keys(draft: Draft) -> None:
    for kind, name in (("MultiStepLR", "milestones"), ("StepLR", "step_size"), ("CosineAnnealingWarmRestarts", "t_0")):
        if draft["train.sched.type"] == kind and not draft[f"train.sched.{name}"]:
            raise ConfigError((f"train.sched.{name}", "train.sched.type"), f"must be given for train.sched.type {kind}")


def milestones_rise(draft: Draft) -> None:
    milestones = draft["train.sched.milestones"]
    rise = all(a < b for a, b in pairwise(milestones))
    if not rise or min(milestones, default=1) < 1:
        raise ConfigError("train.sched.milestones", f"must rise, from 1 on; got {milestones}")


def one_unit_per_phase(draft: Draft) -> None:
    """Warm-up and cool-down are each given in steps or in epochs, not in both."""
    for phase in ("train.sched.warmup", "train.sched.cooldown"):
        if draft[f"{phase}_steps"] and draft[f"{phase}_epochs"]:
            problem = f"{draft[f'{phase}_steps']} and {phase}_epochs {draft[f'{phase}_epochs']:g} both set its length"
            raise ConfigError((f"{phase}_steps", f"{phase}_epochs"), problem, "give one of them")


def one_cycle_warms_up_itself(draft: Draft) -> None:
    for key in ("train.sched.warmup_steps", "train.sched.warmup_epochs"):
        if draft["train.sched.type"] == "OneCycleLR" and draft[key]:
            problem = f"{draft[key]:g} must be 0 for train.sched.type OneCycleLR, which rises by itself"
            raise ConfigError((key, "train.sched.type"), problem, "train.sched.pct_start says for how long")


def phases_fit_the_run(draft: Draft) -> None:
    """Warm-up and cool-down in the unit of the run's length; in the other unit `make_schedule` checks, which knows the epoch."""
    unit = "steps" if draft["train.n_steps"] is not None else "epochs"
    warmup, cooldown = draft[f"train.sched.warmup_{unit}"], draft[f"train.sched.cooldown_{unit}"]
    length = f"train.n_{unit}"
    given = {f"train.sched.warmup_{unit}": warmup, f"train.sched.cooldown_{unit}": cooldown}
    if cooldown and warmup + cooldown > draft[length]:
        raise phases_too_long(given, f"{length} {draft[length]}")


def phases_too_long(given: dict[str, float], run: str) -> ConfigError:
    """Return the error for a cool-down, with its warm-up, that is longer than the run. `given` are the keys, as written.

    A warm-up alone may be longer: a short trial of a long run ends in it.
    """
    first, *others = given = {key: value for key, value in given.items() if value}
    words = " and ".join([f"{given[first]:g}", *(f"{key} {given[key]:g}" for key in others)])
    return ConfigError(tuple(given), f"{words} {'are' if others else 'is'} more than {run}")


def t_max_after_warmup(draft: Draft) -> None:
    check_t_max(
        draft["train.sched.type"], draft["train.sched.t_max"], draft["train.sched.warmup_steps"], "train.sched.warmup_steps"
    )


def check_t_max(kind: str, t_max: int | None, warmup: int, key: str, given: float | None = None) -> None:
    """Raise ConfigError if the warm-up, in updates, leaves nothing of the schedule; `given` is the value of `key`."""
    if kind in SCHEDULES_WITH_AN_END and t_max is not None and warmup >= t_max:
        given = warmup if given is None else given
        problem = f"{t_max} counts from the run's first update, and {key} {given:g} leaves nothing of it"
        raise ConfigError(("train.sched.t_max", key), problem)


def schedule_keys_without_effect(draft: Draft) -> None:
    kind = draft["train.sched.type"]
    for name, kinds in SCHEDULE_KEYS.items():
        if kind not in kinds and not draft.is_default(f"train.sched.{name}"):
            draft.warn(f"train.sched.{name}", f"has no effect with {kind}; it is for {', '.join(kinds)}")
    for phase in ("train.sched.warmup", "train.sched.cooldown"):
        if draft[f"{phase}_lr"] and not draft[f"{phase}_steps"] and not draft[f"{phase}_epochs"]:
            draft.warn(f"{phase}_lr", f"has no effect without {phase}_steps or {phase}_epochs")


def learning_rate_falls(draft: Draft) -> None:
    """Warn where eta_min is above the learning rate, or not above the end of the cool-down."""
    kind, eta_min, cooldown_lr = draft["train.sched.type"], draft["train.sched.eta_min"], draft["train.sched.cooldown_lr"]
    if kind not in SCHEDULE_KEYS["eta_min"]:
        return
    origin = draft.origins.get("train.sched.eta_min")
    name = f"train.sched.eta_min {eta_min:g}" + (f" ({origin.name})" if origin else "")
    scale = draft["train.batch_size"] / draft["train.scale_lr"] if draft["train.scale_lr"] else 1
    if eta_min > draft["train.optim.lr"] * scale:
        draft.notes.append(
            f"warning: {name} is above train.optim.lr {draft['train.optim.lr'] * scale:g}: the learning rate rises"
        )
    cools_down = bool(draft["train.sched.cooldown_steps"] or draft["train.sched.cooldown_epochs"])
    ends_before = cools_down and kind in SCHEDULES_WITH_AN_END and draft["train.sched.t_max"] is None
    if ends_before and eta_min <= cooldown_lr:
        draft.notes.append(
            f"warning: the cool-down begins at {name} and ends at train.sched.cooldown_lr {cooldown_lr:g}: "
            "the learning rate doesn't fall in it"
        )


# Data and augmentation


def ranges(draft: Draft) -> None:
    scale, zoom, std = draft["augment.scale"], draft["augment.zoom"], draft["data.std"]
    if len(scale) != 2 or not 0 < scale[0] <= scale[1] <= 1:
        raise ConfigError("augment.scale", f"expected two numbers, 0 < low <= high <= 1; got {scale}")
    if len(zoom) != 2 or not 0 < zoom[0] <= zoom[1]:
        raise ConfigError("augment.zoom", f"expected two numbers, 0 < low <= high; got {zoom}")
    if min(std or [1]) <= 0:
        raise ConfigError("data.std", f"must be above 0, got {std}")


def as_many_numbers_as_channels(draft: Draft) -> None:
    for key in ("data.mean", "data.std"):
        if draft[key] is not None and len(draft[key]) != draft.dataset.channels:
            raise ConfigError(key, f"{len(draft[key])} numbers; {draft.dataset.name} has {draft.dataset.channels} channels")


def classes_of_the_dataset(draft: Draft) -> None:
    if draft.dataset.n_classes is not None:
        check_n_classes(draft["data.n_classes"], draft.dataset.name, draft.dataset.n_classes)


def check_n_classes(asked: int | None, dataset: str, n_classes: int) -> None:
    if asked is not None and asked != n_classes:
        problem = f"{asked} contradicts {dataset}, which has {n_classes} classes"
        raise ConfigError("data.n_classes", problem, "leave it out, or null, to follow the data")


def whole_repeats(draft: Draft) -> None:
    if draft["train.batch_size"] % draft["augment.repeats"]:
        problem = f"{draft['train.batch_size']} is not a multiple of augment.repeats {draft['augment.repeats']}"
        raise ConfigError(("train.batch_size", "augment.repeats"), problem)


def augmentation_of_files_or_memory(draft: Draft) -> None:
    """Some augmentations exist for images in files only, others for images in memory only."""
    name = draft.dataset.name
    here, other = ("in files", "in memory") if draft.reads_files else ("in memory", "in files")
    for_others = ("cutout", "crop_padding") if draft.reads_files else ("auto", "erasing", "repeats", "zoom")
    for key in (f"augment.{other_name}" for other_name in for_others):
        if draft[key] != DEFAULTS[key]:
            raise ConfigError(key, f"{draft[key]} is for images {other}, and those of {name} are {here}")
    if draft.reads_files and draft["augment.hflip"] == "alternating":
        raise ConfigError("augment.hflip", f"alternating is for images in memory, and those of {name} are in files")
    if draft.reads_files:
        return
    padding = draft.dataset.crop_padding if draft["augment.crop_padding"] is None else draft["augment.crop_padding"]
    if draft["augment.padding_mode"] != "constant" and not padding:
        draft.warn("augment.padding_mode", "has no effect with augment.crop_padding 0")
    for key in ("augment.scale", "augment.crop_pct", "augment.interpolation", "eval.resize"):
        if key in draft.origins and draft[key] != DEFAULTS[key]:
            draft.warn(key, f"has no effect on {name}, which is held in memory")


def files_have_exif_data(draft: Draft) -> None:
    if draft["data.exif_rotate"] and not draft.dataset.in_files:
        draft.warn("data.exif_rotate", f"has no effect on {draft.dataset.name}, which has no image files")


def sizes_grow_to_the_full_size(draft: Draft) -> None:
    first, step = draft["augment.resize_from"], draft["augment.resize_step"]
    if first is None:
        return
    full = draft["data.img_size"] or draft.dataset.img_size
    if first > full:
        raise ConfigError("augment.resize_from", f"{first} is more than data.img_size {full}")
    if (full - first) % step:
        problem = f"{step} doesn't lead from augment.resize_from {first} to data.img_size {full}"
        raise ConfigError("augment.resize_step", problem, f"{math.gcd(full - first, step)} would")


def prefetching_needs_workers(draft: Draft) -> None:
    workers, prefetch = draft.origin("dataloader.num_workers"), draft.origin("dataloader.prefetch_factor")
    is_set_here = "dataloader.prefetch_factor" in draft.origins and prefetch.rank == workers.rank
    if draft["dataloader.num_workers"] == 0 and is_set_here:
        draft.warn("dataloader.prefetch_factor", "has no effect with dataloader.num_workers 0")


# The task

SECTIONS_OF_TASKS = ("segmentation", "detection")


def keys_of_other_tasks(draft: Draft) -> None:
    task = draft["task"]
    if draft["eval.tta"] == "flip_and_shift" and draft.task.targets not in ("classes", "labels"):
        raise ConfigError(("eval.tta", "task"), f"flip_and_shift is for classification, not for task {task}")
    for key, value in draft.values.items():
        section = key.partition(".")[0]
        is_of_another = key in draft.task.other_keys or (section in SECTIONS_OF_TASKS and section != task)
        if is_of_another and value != DEFAULTS[key]:
            problem = f"{value} means nothing for task {task}"
            raise ConfigError((key, "task"), problem, "leave it out, or choose the task that it is for")


# Training


def loss_of_the_task(draft: Draft) -> None:
    """The default of train.loss is the task's own; another task's loss is an error."""
    loss, losses = draft["train.loss"], draft.task.losses
    if not losses or loss in losses:
        return
    if "train.loss" in draft.origins:
        raise ConfigError(("train.loss", "task"), f"{loss} is not for task {draft['task']}", f"it has {', '.join(losses)}")
    draft["train.loss"] = losses[0]


def class_weights_fit_the_loss(draft: Draft) -> None:
    weights = draft["train.class_weights"]
    if weights is not None and draft["train.loss"] == "bce" and draft.task.targets == "classes":
        raise ConfigError(
            ("train.class_weights", "train.loss"), "the loss bce has no class weights", "cross_entropy and focal do"
        )
    if isinstance(weights, list) and (not weights or min(weights) < 0 or max(weights) == 0):
        raise ConfigError("train.class_weights", f"expected numbers from 0 on, not all of them 0; got {weights}")


def one_kind_of_averaging(draft: Draft) -> None:
    if draft["train.ema"] is not None and draft["train.average_last"] is not None:
        problem = (
            f"{draft['train.ema']:g} and train.average_last {draft['train.average_last']:g} are two ways to average the weights"
        )
        raise ConfigError(("train.ema", "train.average_last"), problem, "give one of them")


def learning_rate_of_another_optimizer(draft: Draft) -> None:
    optimizer, rate = draft.origin("train.optim.type"), draft.origin("train.optim.lr")
    if optimizer.rank > rate.rank and draft["train.optim.type"].lower() != "sgd":
        draft.notes.append(
            f"warning: {draft.named('train.optim.lr')} was not chosen for {draft['train.optim.type']} ({optimizer.name}); "
            "--train.optim.lr sets it"
        )


def trackers_are_installed(draft: Draft) -> None:
    for name in draft["tracking.to"]:
        if find_spec(name) is None:
            raise ConfigError("tracking.to", f"{name} is not installed", f"pip install {name}")


AUGMENTATION = (
    "crop_padding",
    "padding_mode",
    "hflip",
    "cutout",
    "scale",
    "zoom",
    "auto",
    "color_jitter",
    "erasing",
    "resize_from",
)


def keys_without_effect(draft: Draft) -> None:
    """Warn about keys that were set and change nothing, because of another key."""
    mixups = (draft["augment.mixup"] > 0) + (draft["augment.cutmix"] > 0)
    no_mixing, no_teacher = "augment.mixup and augment.cutmix 0", "distill.teacher null"
    auto, loss, batch_size = draft["augment.auto"], draft["train.loss"], draft["train.batch_size"]
    has_teacher, grows = draft["distill.teacher"] is not None, draft["augment.resize_from"] is not None
    unused = [
        ("distill.pretrained", not has_teacher, no_teacher),
        ("distill.temperature", not has_teacher, no_teacher),
        ("tracking.project", not draft["tracking.to"], "tracking.to []"),
        ("distill.weight", not has_teacher, no_teacher),
        ("augment.mix_epochs", mixups == 0, no_mixing),
        ("augment.mix_prob", mixups == 0, no_mixing),
        ("augment.mix_switch_prob", mixups < 2, "augment.mixup or augment.cutmix 0"),
        ("augment.auto_magnitude", auto != "randaugment", f"augment.auto {auto or 'null'}; randaugment has one"),
        ("augment.resize_epochs", not grows, "augment.resize_from null"),
        ("augment.resize_step", not grows, "augment.resize_from null"),
        *((f"augment.{name}", not draft["augment.enabled"], "augment.enabled false") for name in AUGMENTATION),
        ("segmentation.output_stride", draft["segmentation.head"] == "hrnet", "segmentation.head hrnet"),
        ("train.sam_adaptive", draft["train.sam"] is None, "train.sam null"),
        ("train.ema_warmup", draft["train.ema"] is None, "train.ema null"),
        ("train.focal_gamma", loss != "focal", f"train.loss {loss}; it is for focal"),
        ("train.bce_threshold", loss != "bce", f"train.loss {loss}; it is for bce"),
        ("train.compile_mode", not draft["train.compile"], "train.compile false"),
        ("train.most_skipped", draft["train.nonfinite"] != "skip", "train.nonfinite stop"),
        ("train.micro_batch_size", draft["train.micro_batch_size"] >= batch_size, f"train.batch_size {batch_size}"),
        ("train.optim.decay_norm_and_bias", draft["train.optim.weight_decay"] == 0, "train.optim.weight_decay 0"),
    ]
    for key, is_unused, why in unused:
        if is_unused and draft[key] != DEFAULTS[key]:
            draft.notes.append(f"warning: {key} ({draft.origin(key).name}) has no effect with {why}")


RULES: tuple[Callable[[Draft], None], ...] = (
    one_length,
    frequencies_in_epochs,
    t_max_and_length,
    schedule_has_its_keys,
    milestones_rise,
    one_unit_per_phase,
    one_cycle_warms_up_itself,
    phases_fit_the_run,
    t_max_after_warmup,
    schedule_keys_without_effect,
    learning_rate_falls,
    ranges,
    as_many_numbers_as_channels,
    classes_of_the_dataset,
    whole_repeats,
    loss_of_the_task,
    class_weights_fit_the_loss,
    one_kind_of_averaging,
    keys_of_other_tasks,
    augmentation_of_files_or_memory,
    files_have_exif_data,
    sizes_grow_to_the_full_size,
    keys_without_effect,
    prefetching_needs_workers,
    learning_rate_of_another_optimizer,
    trackers_are_installed,
)
