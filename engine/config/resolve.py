"""From YAML files and command-line options to a checked `Config`, every value with its origin.

base YAML < config YAML < command line; later ones win, key by key. Nothing here imports torch.
"""

import types
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import MISSING, dataclass, field, fields, is_dataclass
from difflib import get_close_matches
from functools import reduce
from operator import ge, gt, le, lt
from pathlib import Path
from typing import Any, Literal, Union, get_args, get_origin, get_type_hints

from omegaconf import OmegaConf
from omegaconf.errors import OmegaConfBaseException

from engine.config import yaml12
from engine.config.errors import ConfigError
from engine.config.schema import REQUIRED, Config
from engine.optim.schedule import FOLLOW_THE_LENGTH, base_lr, expect_t_max_after_warmup, expect_to_fit

DEFAULT_CONFIG = Path(__file__).resolve().parents[2] / "configs" / "lenet_digits.yaml"
MAX_BYTES = 1_000_000
COMMAND_LINE = 1_000_000  # its rank, above that of any file


@dataclass(frozen=True)
class Origin:
    """Where a value came from; a higher rank wins over a lower one."""

    rank: int
    name: str


DEFAULT = Origin(0, "the default")


@dataclass
class Layer:
    origin: Origin
    values: dict[str, Any]


@dataclass
class LoadedConfig(Config):
    """A Config that knows the origin of its values, and what was decided while it was put together."""

    origins: dict[str, Origin] = field(default_factory=dict, repr=False)
    notes: list[str] = field(default_factory=list, repr=False)

    def origin(self, key: str) -> Origin:
        return self.origins.get(key, DEFAULT)


def load_config(path: str | Path | None = None, overrides: Mapping[str, Any] | Sequence[str] = ()) -> LoadedConfig:
    """The config at `path` (LeNet on digits without one), with `overrides` on top of it.

    Overrides are a mapping, {"train.optim.lr": 0.01}, or options as on a command line, ["--train.optim.lr", "0.01"].
    """
    from engine.config.command_line import parse_overrides

    layers = _read_with_bases(Path(path) if path is not None else DEFAULT_CONFIG)
    if not isinstance(overrides, Mapping):
        overrides = parse_overrides(overrides)
    for key, value in overrides.items():
        layers.append(Layer(Origin(COMMAND_LINE, f"--{key}"), _nest(key, value)))
    return resolve(layers)


def to_dict(config: Config) -> dict[str, Any]:
    """The config as plain values, in the layout of a config file."""
    return _plain(config, Config)


def to_yaml(config: Config) -> str:
    return yaml12.dump(to_dict(config))


def flatten(values: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    """{"train.optim.lr": 0.1} from {"train": {"optim": {"lr": 0.1}}}."""
    flat: dict[str, Any] = {}
    for key, value in values.items():
        flat |= flatten(value, f"{prefix}{key}.") if isinstance(value, Mapping) and value else {f"{prefix}{key}": value}
    return flat


def keys() -> list[str]:
    """Every key of the schema, dotted."""
    return [key for key, _ in _schema_fields(Config)]


def resolve(layers: Sequence[Layer]) -> LoadedConfig:
    origins: dict[str, Origin] = {}
    for layer in layers:
        _expect_known_keys(layer)
        origins |= dict.fromkeys(flatten(layer.values), layer.origin)
    try:
        merged = OmegaConf.merge(to_dict(Config()), *(layer.values for layer in layers))
        values = OmegaConf.to_container(merged, resolve=True)
    except OmegaConfBaseException as error:
        key = getattr(error, "full_key", None) or "the config"
        raise ConfigError(f"{key}: {str(error).splitlines()[0]}{_of(origins.get(key))}") from error
    config = _build(LoadedConfig, values, "", origins)
    config.origins = origins
    _settle_length(config)
    _check_together(config)
    return config


# --- reading ---


def _read_with_bases(path: Path) -> list[Layer]:
    files: list[tuple[Path, dict[str, Any]]] = []
    _collect(path.expanduser(), files, parents=())
    return [Layer(Origin(rank, str(file)), values) for rank, (file, values) in enumerate(files, start=1)]


def _collect(path: Path, files: list[tuple[Path, dict[str, Any]]], parents: tuple[Path, ...]) -> None:
    if path.resolve() in parents:
        raise ConfigError(f"{path} is its own base, by way of {parents[-1]}")
    values = _read(path, asked_by=parents[-1] if parents else None)
    bases = values.pop("base", None) or []
    bases = [bases] if isinstance(bases, str) else bases
    if not isinstance(bases, list) or not all(isinstance(base, str) for base in bases):
        raise ConfigError(f"base: expected a file name or a list of them ({path})")
    for base in bases:
        _collect(path.parent / base, files, (*parents, path.resolve()))
    files.append((path, values))


def _read(path: Path, asked_by: Path | None) -> dict[str, Any]:
    try:
        with path.open("rb") as file:
            raw = file.read(MAX_BYTES + 1)
        if len(raw) > MAX_BYTES:
            raise ConfigError(f"{path} is larger than a config can be ({MAX_BYTES:,} bytes)")
        values = yaml12.parse(raw.decode())
    except FileNotFoundError:
        near = get_close_matches(path.name, [p.name for p in path.parent.glob("*.yaml")], n=1)
        hint = f"; did you mean {path.parent / near[0]}?" if near else ""
        raise ConfigError(f"{path}: no such config{f' (the base of {asked_by})' if asked_by else ''}{hint}") from None
    except OSError as error:
        raise ConfigError(f"{path} can't be read: {error.strerror}") from error
    except ValueError as error:  # bad YAML, or bytes that are no text
        raise ConfigError(f"{path}: {error}") from error
    if values is None:
        return {}
    if not isinstance(values, dict) or not all(isinstance(key, str) for key in values):
        raise ConfigError(f"{path}: a config is a mapping of keys to values")
    return values


def _nest(key: str, value: Any) -> dict[str, Any]:
    for part in reversed(key.split(".")):
        value = {part: value}
    return value


# --- the schema ---


def _schema_fields(section: type, prefix: str = "") -> Iterator[tuple[str, Any]]:
    for name, hint in get_type_hints(section).items():
        if is_dataclass(hint):
            yield from _schema_fields(hint, f"{prefix}{name}.")
        elif name != "args":
            yield f"{prefix}{name}", hint


def _expect_known_keys(layer: Layer) -> None:
    _expect_known(layer.values, Config, "", layer.origin)


def _expect_known(values: dict[str, Any], section: type, prefix: str, origin: Origin) -> None:
    hints = get_type_hints(section)
    for key, value in list(values.items()):
        path = f"{prefix}{key}"
        if key == "args" or key not in hints:
            if "args" in hints and key != "args":
                continue
            raise ConfigError(f"{path}: no such key ({origin.name}){did_you_mean(path, keys(), list(hints))}")
        if is_dataclass(hints[key]):
            if value is None:
                del values[key]  # a heading with nothing under it
            elif isinstance(value, dict):
                _expect_known(value, hints[key], f"{path}.", origin)
            else:
                raise ConfigError(f"{path}: is a section, with keys of its own; got {value!r} ({origin.name})")


def did_you_mean(path: str, known: Sequence[str], siblings: Sequence[str] = ()) -> str:
    """'; did you mean ...?' with the nearest of `known`, or nothing."""
    parent, _, last = path.rpartition(".")
    near = get_close_matches(last, [name for name in siblings if name != "args"], n=1)
    found = f"{parent}.{near[0]}".lstrip(".") if near else None
    if found is None:
        same = [key for key in known if key.rpartition(".")[2] == last]
        close = get_close_matches(path, known, n=1) or get_close_matches(last, [key.rpartition(".")[2] for key in known], n=1)
        found = (same or [key for key in known if close and (key == close[0] or key.endswith(f".{close[0]}"))] or [None])[0]
    return f"; did you mean {found}?" if found else ""


def _build(section: type, values: dict[str, Any], prefix: str, origins: dict[str, Origin]) -> Any:
    hints = get_type_hints(section)
    built: dict[str, Any] = {}
    for spec in fields(section):
        if section is LoadedConfig and spec.name in ("origins", "notes"):
            continue
        path, hint = f"{prefix}{spec.name}", hints[spec.name]
        if spec.name == "args":
            built["args"] = {key: value for key, value in values.items() if key not in hints}
        elif is_dataclass(hint):
            built[spec.name] = _build(hint, values[spec.name], f"{path}.", origins)
        else:
            value = values[spec.name]
            if value == REQUIRED:
                raise ConfigError(f"{path}: must be given")
            problem = mismatch(value, hint) or _out_of_range(value, spec.metadata["bounds"])
            if problem:
                raise ConfigError(f"{path}: {problem}{_of(origins.get(path))}")
            built[spec.name] = _as_float(value, hint)
    return section(**built)


def mismatch(value: Any, hint: Any) -> str | None:
    """What is wrong with `value` as a `hint`; None if nothing is. Numbers are not strings and true is not 1."""
    if _fits(value, hint):
        return None
    return f"expected {_describe(hint)}, got {_as_written(value)}"


def _fits(value: Any, hint: Any) -> bool:
    if hint is Any:
        return True
    origin = get_origin(hint)
    if origin in (Union, types.UnionType):
        return any(_fits(value, option) for option in get_args(hint))
    if origin is Literal:
        return any(value == option and type(value) is type(option) for option in get_args(hint))
    if origin in (list, tuple, Sequence):
        of = get_args(hint)[0] if get_args(hint) else Any
        return isinstance(value, (list, tuple)) and all(_fits(item, of) for item in value)
    if origin is dict:
        return isinstance(value, dict)
    if hint is float:
        return isinstance(value, (int, float)) and not isinstance(value, bool)
    if hint is int:
        return isinstance(value, int) and not isinstance(value, bool)
    return isinstance(value, hint if isinstance(hint, type) else object)


def _as_float(value: Any, hint: Any) -> Any:
    """An int that stands where a float is meant, as a float."""
    options = get_args(hint) if get_origin(hint) in (Union, types.UnionType) else (hint,)
    if isinstance(value, int) and not isinstance(value, bool) and float in options and int not in options:
        return float(value)
    if isinstance(value, list) and get_origin(hint) is list:
        return [_as_float(item, get_args(hint)[0]) for item in value]
    return value


def _describe(hint: Any) -> str:
    origin = get_origin(hint)
    if origin in (Union, types.UnionType):
        said = [_describe(option) for option in get_args(hint)]
        return " or ".join(option for option in said if not option.startswith("<"))  # a Tensor can't stand in a YAML
    if origin is Literal:
        return " or ".join(str(option) for option in get_args(hint))
    if origin in (list, tuple, Sequence):
        return f"a list of {_describe(get_args(hint)[0])}s".replace("a list of a ", "a list of ").replace("of an ", "of ")
    names = {float: "a number", int: "a whole number", str: "a string", bool: "true or false", type(None): "null"}
    return names.get(hint, str(hint))


def _out_of_range(value: Any, bounds: Mapping[str, float]) -> str | None:
    if value is None or isinstance(value, str):
        return None
    tests = {"above": ("above", gt), "least": ("at least", ge), "below": ("below", lt), "most": ("at most", le)}
    for kind, bound in bounds.items():
        words, holds = tests[kind]
        if not holds(value, bound):
            return f"must be {words} {bound}, got {value}"
    return None


def _as_written(value: Any) -> str:
    words = {None: "null", True: "true", False: "false"}
    return words[value] if value is None or isinstance(value, bool) else repr(value)


def _plain(value: Any, section: type) -> dict[str, Any]:
    plain: dict[str, Any] = {}
    for spec in fields(section):
        item = getattr(value, spec.name)
        if spec.name == "args":
            plain.update(item)
        else:
            plain[spec.name] = _plain(item, type(item)) if is_dataclass(item) else item
    return plain


def _of(origin: Origin | None) -> str:
    return f" ({origin.name})" if origin else ""


# --- keys that belong together ---


def _settle_length(config: LoadedConfig) -> None:
    """Where two keys say how long the run is, the one of the higher origin wins."""
    train = config.train
    steps, epochs = config.origin("train.n_steps"), config.origin("train.n_epochs")
    if train.n_steps is None and train.n_epochs is None:
        raise ConfigError("train.n_steps or train.n_epochs: one of the two must be given")
    if train.n_steps is not None and train.n_epochs is not None:
        if steps.rank == epochs.rank:
            raise ConfigError(
                f"train.n_steps {train.n_steps} and train.n_epochs {train.n_epochs} both say how long the run is; "
                f"give one of them ({steps.name}, {epochs.name})"
            )
        wins, loses = ("n_steps", "n_epochs") if steps.rank > epochs.rank else ("n_epochs", "n_steps")
        config.notes.append(
            f"train.{wins} {getattr(train, wins)} ({max(steps, epochs, key=lambda o: o.rank).name}) sets the run's length; "
            f"train.{loses} {getattr(train, loses)} ({min(steps, epochs, key=lambda o: o.rank).name}) is left out"
        )
        setattr(train, loses, None)
    if train.n_epochs is not None:
        for key in ("print_freq", "save_freq", "eval_freq"):  # a run counted in epochs reports by epochs
            origin = config.origin(f"train.{key}")
            if getattr(train, key) is not None and origin.rank < epochs.rank:
                config.notes.append(
                    f"train.{key} {getattr(train, key)} ({origin.name}) becomes once per epoch, as the run is counted in epochs"
                )
                setattr(train, key, None)
    _settle_t_max(config, epochs if train.n_epochs is not None else steps)


def _settle_t_max(config: LoadedConfig, length: Origin) -> None:
    train, sched, origin = config.train, config.train.sched, config.origin("train.sched.t_max")
    if sched.t_max is None or sched.type not in FOLLOW_THE_LENGTH:
        return
    said = f"train.n_steps {train.n_steps}" if train.n_steps is not None else f"train.n_epochs {train.n_epochs}"
    latest = length
    for name in ("cooldown_steps", "cooldown_epochs"):
        if getattr(sched, name):
            said += f" less train.sched.{name} {getattr(sched, name):g}"
            latest = max(length, config.origin(f"train.sched.{name}"), key=lambda o: o.rank)
    is_in_steps = train.n_steps is not None and not sched.cooldown_epochs  # else only the data say how many these are
    if is_in_steps and sched.t_max == train.n_steps - sched.cooldown_steps:
        return
    if origin.rank < latest.rank:
        config.notes.append(
            f"{said} ({latest.name}) sets the schedule's length; "
            f"train.sched.t_max {sched.t_max} ({origin.name}) is left out and follows it"
        )
        sched.t_max = None
    elif origin.rank == length.rank and is_in_steps and not _is_of_a_run(origin):
        raise ConfigError(
            f"train.sched.t_max {sched.t_max} contradicts {said} ({origin.name}, {length.name}); "
            "leave t_max out, or null, to follow the run's length"
        )
    elif is_in_steps:
        config.notes.append(f"warning: train.sched.t_max {sched.t_max} ({origin.name}) differs from {said}; it is kept")


def _is_of_a_run(origin: Origin) -> bool:
    """A run's own config is settled: what was kept with a warning when it began stays kept."""
    path = Path(origin.name)
    return path.name == "config.yaml" and (path.parent / "environment.json").is_file()


AUGMENTATION = ("crop_padding", "padding_mode", "hflip", "cutout", "scale", "zoom", "auto", "color_jitter", "erasing")
AUGMENTATION += ("resize_from",)

SCHEDULE_KEYS = {  # and the types that they are for
    "t_max": FOLLOW_THE_LENGTH,
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


def _check_together(config: LoadedConfig) -> None:
    """Values that are each possible, but not with each other."""
    train = config.train
    _check_schedule(config)
    if len(config.augment.scale) != 2 or not 0 < config.augment.scale[0] <= config.augment.scale[1] <= 1:
        raise ConfigError(f"augment.scale: two numbers, 0 < low <= high <= 1; got {config.augment.scale}")
    if len(config.augment.zoom) != 2 or not 0 < config.augment.zoom[0] <= config.augment.zoom[1]:
        raise ConfigError(f"augment.zoom: two numbers, 0 < low <= high; got {config.augment.zoom}")
    if min(config.data.std or [1]) <= 0:
        raise ConfigError(f"data.std: must be above 0, got {config.data.std}")
    if train.batch_size % config.augment.repeats:
        raise ConfigError(f"train.batch_size {train.batch_size} doesn't divide by augment.repeats {config.augment.repeats}")
    if train.ema is not None and train.average_last is not None:
        raise ConfigError(
            f"train.ema {train.ema:g} ({config.origin('train.ema').name}) and train.average_last {train.average_last:g} "
            f"({config.origin('train.average_last').name}) are two ways to average the weights; give one of them"
        )
    _warn_of_idle_keys(config)
    optim, lr = config.origin("train.optim.type"), config.origin("train.optim.lr")
    if optim.rank > lr.rank and train.optim.type.lower() != "sgd":
        config.notes.append(
            f"warning: train.optim.lr {train.optim.lr:g} ({lr.name}) was not chosen for {train.optim.type} ({optim.name}); "
            "--train.optim.lr sets it"
        )


def _warn_of_idle_keys(config: LoadedConfig) -> None:
    """Keys that were set and change nothing, since another one doesn't let them."""
    train, augment = config.train, config.augment
    n_mixings = (augment.mixup > 0) + (augment.cutmix > 0)
    without_effect = [
        ("distill.pretrained", config.distill.teacher is None, "distill.teacher null"),
        ("distill.temperature", config.distill.teacher is None, "distill.teacher null"),
        ("tracking.project", not config.tracking.to, "tracking.to []"),
        ("distill.weight", config.distill.teacher is None, "distill.teacher null"),
        ("augment.mix_epochs", n_mixings == 0, "augment.mixup and augment.cutmix 0"),
        ("augment.mix_prob", n_mixings == 0, "augment.mixup and augment.cutmix 0"),
        ("augment.mix_switch_prob", n_mixings < 2, "augment.mixup or augment.cutmix 0"),
        ("augment.auto_magnitude", augment.auto != "randaugment", f"augment.auto {augment.auto or 'null'}; randaugment has one"),
        ("augment.resize_epochs", augment.resize_from is None, "augment.resize_from null"),
        ("augment.resize_step", augment.resize_from is None, "augment.resize_from null"),
        *((f"augment.{name}", not augment.enabled, "augment.enabled false") for name in AUGMENTATION),
        ("segmentation.output_stride", config.segmentation.head == "hrnet", "segmentation.head hrnet"),
        ("train.sam_adaptive", train.sam is None, "train.sam null"),
        ("train.ema_warmup", train.ema is None, "train.ema null"),
        ("train.bce_threshold", train.loss != "bce", f"train.loss {train.loss}; it is for bce"),
        ("train.compile_mode", not train.compile, "train.compile false"),
        ("train.most_skipped", train.nonfinite != "skip", "train.nonfinite stop"),
        ("train.micro_batch_size", train.micro_batch_size >= train.batch_size, f"train.batch_size {train.batch_size}"),
        ("train.optim.decay_norm_and_bias", train.optim.weight_decay == 0, "train.optim.weight_decay 0"),
    ]
    for name, is_idle, why in without_effect:
        *sections, last = name.split(".")
        section = reduce(getattr, sections, config)
        if is_idle and getattr(section, last) != _default(section, last):
            config.notes.append(f"warning: {name} ({config.origin(name).name}) has no effect with {why}")


def _check_schedule(config: LoadedConfig) -> None:
    train, sched = config.train, config.train.sched
    for kind, name in (("MultiStepLR", "milestones"), ("StepLR", "step_size"), ("CosineAnnealingWarmRestarts", "t_0")):
        if sched.type == kind and not getattr(sched, name):
            raise ConfigError(f"train.sched.{name}: must be given for train.sched.type {kind}{_of_key(config, 'type')}")
    if any(a >= b for a, b in zip(sched.milestones, sched.milestones[1:], strict=False)) or min(sched.milestones, default=1) < 1:
        raise ConfigError(f"train.sched.milestones: must rise, from 1 on; got {sched.milestones}{_of_key(config, 'milestones')}")
    for phase in ("warmup", "cooldown"):
        if getattr(sched, f"{phase}_steps") and getattr(sched, f"{phase}_epochs"):
            raise ConfigError(f"train.sched.{phase}_steps and train.sched.{phase}_epochs say the same thing; give one of them")
    for name in ("warmup_steps", "warmup_epochs"):
        if sched.type == "OneCycleLR" and getattr(sched, name):
            raise ConfigError(
                f"train.sched.{name} {getattr(sched, name):g}{_of_key(config, name)} must be 0 for train.sched.type OneCycleLR"
                f"{_of_key(config, 'type')}, which rises by itself: train.sched.pct_start says for how long"
            )
    if train.n_steps is not None:  # a length in the other unit is found to be too long when the data are there
        expect_to_fit(sched, sched.warmup_steps, sched.cooldown_steps, train.n_steps, f"train.n_steps {train.n_steps}")
    else:
        expect_to_fit(sched, sched.warmup_epochs, sched.cooldown_epochs, train.n_epochs, f"train.n_epochs {train.n_epochs}")
    expect_t_max_after_warmup(sched, sched.warmup_steps)
    _warn_of_schedule(config)


def _warn_of_schedule(config: LoadedConfig) -> None:
    sched, lr = config.train.sched, base_lr(config.train)
    for name, kinds in SCHEDULE_KEYS.items():
        if sched.type not in kinds and getattr(sched, name) not in (None, [], _default(sched, name)):
            said = f"train.sched.{name}{_of_key(config, name)} has no effect with {sched.type}"
            config.notes.append(f"warning: {said}; it is for {', '.join(kinds)}")
    has_cooldown = bool(sched.cooldown_steps or sched.cooldown_epochs)
    for phase, is_there in (("warmup", bool(sched.warmup_steps or sched.warmup_epochs)), ("cooldown", has_cooldown)):
        if getattr(sched, f"{phase}_lr") and not is_there:
            said = f"train.sched.{phase}_lr{_of_key(config, f'{phase}_lr')} has no effect"
            config.notes.append(f"warning: {said} without train.sched.{phase}_steps or train.sched.{phase}_epochs")
    if sched.type not in SCHEDULE_KEYS["eta_min"]:
        return
    eta_min = f"train.sched.eta_min {sched.eta_min:g}{_of_key(config, 'eta_min')}"
    if sched.eta_min > lr:
        config.notes.append(f"warning: {eta_min} is above train.optim.lr {lr:g}: the learning rate rises")
    ends_before_cooldown = has_cooldown and sched.type in FOLLOW_THE_LENGTH and sched.t_max is None
    if ends_before_cooldown and sched.eta_min <= sched.cooldown_lr:
        config.notes.append(
            f"warning: the cool-down begins at {eta_min} and ends at train.sched.cooldown_lr {sched.cooldown_lr:g}: "
            "the learning rate doesn't fall in it"
        )


def _of_key(config: LoadedConfig, name: str) -> str:
    return _of(config.origins.get(f"train.sched.{name}"))


def _default(section: Any, name: str) -> Any:
    spec = next(spec for spec in fields(section) if spec.name == name)
    return spec.default if spec.default is not MISSING else spec.default_factory()
