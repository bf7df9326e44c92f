"""From layers of values to one typed, frozen Config: merged, checked, and settled by the rules. Nothing here imports torch.

`resolve` is told by its caller, through a Catalog, which models, datasets, optimizers and tasks exist and what they accept.
"""

import inspect
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, is_dataclass
from pathlib import Path
from typing import Any, Protocol, TypeVar, get_type_hints

from omegaconf import OmegaConf
from omegaconf.errors import OmegaConfBaseException

from engine.config.draft import DatasetFacts, Draft, TaskFacts
from engine.config.errors import ConfigError, Origin, located
from engine.config.interpolation import at, check_references
from engine.config.layers import DEFAULT, Layer
from engine.config.rules import RULES
from engine.config.schema import REQUIRED, Config, flatten, keys, leaves, to_dict
from engine.config.suggestions import nearest, nearest_key
from engine.config.types import as_float, mismatch, out_of_bounds, unusable

SET_BY_ENGINE = ("n_classes", "in_channels", "img_size", "pretrained", "features_only", "out_indices")  # arguments of a model
OPEN_SECTIONS = ("data", "model", "train.optim", "distill")  # their further keys are arguments

T = TypeVar("T")


class Catalog(Protocol):
    """What exists. A name that does not raises ValueError: `unknown model 'x': did you mean y?`."""

    def task(self, name: str) -> TaskFacts: ...

    def dataset(self, name: str, targets: str) -> tuple[DatasetFacts, inspect.Signature]: ...

    def dataset_arguments(self) -> frozenset[str]:
        """The names of all arguments that some dataset accepts."""

    def model(self, name: str) -> inspect.Signature | None:
        """The constructor's signature; None for a timm model, which checks its arguments when it is built."""

    def describes_network(self, argument: str) -> bool:
        """Whether a timm model may get this argument. Others choose weights or files, or are set by the engine."""

    def model_arguments(self) -> frozenset[str]:
        """The names of all arguments that some model accepts."""

    def optimizer(self, name: str) -> inspect.Signature: ...

    def optimizer_arguments(self) -> frozenset[str]: ...


@dataclass(frozen=True)
class ResolvedConfig(Config):
    """A Config with the origin of each value, and notes on the decisions of the rules."""

    origins: dict[str, Origin] = field(default_factory=dict, repr=False)
    notes: tuple[str, ...] = field(default=(), repr=False)

    def origin(self, key: str) -> Origin:
        return self.origins.get(key, DEFAULT)


def resolve(layers: Sequence[Layer], catalog: Catalog) -> ResolvedConfig:
    origins: dict[str, Origin] = {}
    for layer in layers:
        check_values(layer.values, "", layer.origin)
        _check_keys(layer.values, Config, "", layer.origin)
        origins |= dict.fromkeys(flatten(layer.values), layer.origin)
    with located(origins):
        values, arguments = _merged(layers)
        task = _find("task", catalog.task, values["task"])
        dataset, options = _find("data.name", catalog.dataset, values["data.name"], task.targets)
        draft = Draft(values, arguments, origins, task, dataset)
        given = arguments["data"]
        for name in sorted((given.keys() - options.parameters.keys()) & catalog.dataset_arguments()):
            if draft.origin(f"data.{name}").rank < draft.origin("data.name").rank:  # it was written for another dataset
                del given[name]
                draft.warn(f"data.{name}", f"is dropped: {dataset.name} does not take it")
        for rule in RULES:
            rule(draft)
        check_arguments("data", given, options)
        _settle_model_arguments(draft, catalog)
        _settle_optimizer_arguments(draft, catalog)
        _check_teacher(draft, catalog)
    return _frozen(draft)


def _find(key: str, find: Callable[..., T], *names: str) -> T:
    """Look a name up in the catalog. A name that does not exist is an error of the key that holds it."""
    try:
        return find(*names)
    except ValueError as error:
        problem, _, hint = str(error).partition(": ")
        raise ConfigError(key, problem, hint) from error


def check_values(value: Any, path: str, origin: Origin) -> None:
    """Raise ConfigError for a value that no key can hold, such as NaN, and for a key that is not a string."""
    if isinstance(value, Mapping):
        for key, item in value.items():
            if not isinstance(key, str) or unusable(key):
                raise ConfigError(path or "the config", "a key is not a plain word", origin=origin.name)
            check_values(item, f"{path}.{key}" if path else key, origin)
    elif isinstance(value, (list, tuple)):
        for i, item in enumerate(value):
            check_values(item, f"{path}.{i}", origin)
    elif problem := "must be given" if value == REQUIRED else unusable(value):
        raise ConfigError(path, problem, origin=origin.name)


def _check_keys(values: dict[str, Any], section: type, prefix: str, origin: Origin) -> None:
    """Raise ConfigError for a key that the section does not have. A heading with nothing under it is dropped."""
    hints = get_type_hints(section)
    for key, value in list(values.items()):
        path = f"{prefix}{key}"
        if key == "args" or key not in hints:
            if "args" in hints and key != "args":
                continue
            siblings = [name for name in hints if name != "args"]
            raise ConfigError(path, "no such key", nearest_key(path, keys(), siblings), origin.name)
        if is_dataclass(hints[key]):
            if value is None:
                del values[key]
            elif isinstance(value, dict):
                _check_keys(value, hints[key], f"{path}.", origin)
            else:
                raise ConfigError(path, f"is a section, which holds keys; got {value!r}", origin=origin.name)


def _merged(layers: Sequence[Layer]) -> tuple[dict[str, Any], dict[str, dict[str, Any]]]:
    """Return the values of the schema's keys, checked for type and bounds, and the arguments of the open sections."""
    merged = to_dict(Config())
    for layer in layers:
        _overlay(merged, layer.values)
    check_references(merged)
    try:
        values: Any = OmegaConf.to_container(OmegaConf.create(merged), resolve=True)
    except OmegaConfBaseException as error:
        raise ConfigError(getattr(error, "full_key", None) or "the config", str(error).splitlines()[0]) from error
    flat: dict[str, Any] = {}
    for key, hint, bounds in leaves():
        value = at(values, key)
        if value == REQUIRED:
            raise ConfigError(key, "must be given")
        if problem := mismatch(value, hint) or out_of_bounds(value, bounds):
            raise ConfigError(key, problem)
        flat[key] = as_float(value, hint)
    arguments = {}
    for section in OPEN_SECTIONS:
        arguments[section] = {name: value for name, value in at(values, section).items() if f"{section}.{name}" not in flat}
    return flat, arguments


def _overlay(values: dict[str, Any], new: Mapping[str, Any]) -> None:
    """Put `new` over `values`: mappings are merged, anything else is replaced."""
    for key, value in new.items():
        if isinstance(value, Mapping):
            if not isinstance(values.get(key), dict):
                values[key] = {}
            _overlay(values[key], value)
        else:
            values[key] = value


def check_arguments(section: str, given: Mapping[str, Any], signature: inspect.Signature, reserved: Sequence[str] = ()) -> None:
    """Raise ConfigError unless every argument is a parameter, of its annotated type. The caller sets the `reserved` ones."""
    for name, value in given.items():
        parameter = signature.parameters.get(name)
        if parameter is None or name in reserved:
            known = [other for other in signature.parameters if other not in reserved]
            known += [key.removeprefix(f"{section}.") for key in keys() if key.startswith(f"{section}.")]
            hint = nearest(name, known, f"{section}.") or (f"it takes {', '.join(known)}" if known else "")
            raise ConfigError(f"{section}.{name}", "no such argument", hint)
        if parameter.annotation is not inspect.Parameter.empty and not isinstance(parameter.annotation, str):
            problem = mismatch(value, parameter.annotation)
            if problem and value != parameter.default:
                raise ConfigError(f"{section}.{name}", problem)


def _settle_model_arguments(draft: Draft, catalog: Catalog) -> None:
    """Drop arguments that only other models accept, with a warning, so that model.name alone switches between families."""
    given, name = draft.arguments["model"], draft["model.name"]
    signature = _find("model.name", catalog.model, name)
    for argument in list(given):
        if signature is not None:
            is_of_another = argument not in signature.parameters
        else:  # a timm model: an argument in a lower layer than the name was written for another model
            is_of_another = draft.origin(f"model.{argument}").rank < draft.origin("model.name").rank
        if is_of_another and argument in catalog.model_arguments() - set(SET_BY_ENGINE):
            del given[argument]
            draft.warn(f"model.{argument}", f"is dropped: {name} does not take it")
    _check_model_arguments("model", given, signature, catalog)


def _check_model_arguments(section: str, given: Mapping[str, Any], signature: inspect.Signature | None, catalog: Catalog) -> None:
    if signature is not None:
        check_arguments(section, given, signature, SET_BY_ENGINE)
    for name in given if signature is None else ():
        if name in SET_BY_ENGINE or not catalog.describes_network(name):
            problem = "is not an argument of the network, and a config can't set it"
            raise ConfigError(f"{section}.{name}", problem, f"{section}.pretrained names a file of weights")


def _settle_optimizer_arguments(draft: Draft, catalog: Catalog) -> None:
    """Drop arguments that only other optimizers accept, with a warning; one that no optimizer accepts is an error."""
    given, kind = draft.arguments["train.optim"], draft["train.optim.type"]
    signature = _find("train.optim.type", catalog.optimizer, kind)
    for name in ("weight_decay", "momentum", *list(given)):
        in_schema = name not in given
        if name in signature.parameters:
            check_arguments("train.optim", {name: draft[f"train.optim.{name}"] if in_schema else given[name]}, signature)
        elif in_schema or name in catalog.optimizer_arguments():
            given.pop(name, None)
            if f"train.optim.{name}" in draft.origins:
                draft.warn(f"train.optim.{name}", f"is dropped: {kind} does not take it")
        else:
            schema = [key.removeprefix("train.optim.") for key in keys() if key.startswith("train.optim.")]
            hint = nearest(name, [*schema, *signature.parameters, *sorted(catalog.optimizer_arguments())], "train.optim.")
            raise ConfigError(f"train.optim.{name}", "no optimizer takes it", hint)


def _check_teacher(draft: Draft, catalog: Catalog) -> None:
    """A teacher is a run, which has its own config, or a model by name, which needs weights."""
    teacher, given = draft["distill.teacher"], draft.arguments["distill"]
    if teacher is None:
        return
    if Path(teacher).expanduser().exists():
        for name in ("pretrained", *given) if draft["distill.pretrained"] is not False else given:
            raise ConfigError(f"distill.{name}", f"distill.teacher {teacher} is a run of this project, whose config says it")
        return
    try:
        signature = catalog.model(teacher)
    except ValueError as error:
        raise ConfigError("distill.teacher", f"neither a run folder nor a model: {error}") from error
    _check_model_arguments("distill", given, signature, catalog)
    if draft["distill.pretrained"] is False:
        raise ConfigError("distill.teacher", f"{teacher} has learned nothing", "distill.pretrained names its weights")


def _frozen(draft: Draft) -> ResolvedConfig:
    def build(section: type, prefix: str = "") -> dict[str, Any]:
        built: dict[str, Any] = {}
        for name, hint in get_type_hints(section).items():
            make: Any = hint
            if name == "args":
                built["args"] = draft.arguments[prefix.rstrip(".")]
            else:
                built[name] = make(**build(make, f"{prefix}{name}.")) if is_dataclass(hint) else draft[f"{prefix}{name}"]
        return built

    return ResolvedConfig(**build(Config), origins=draft.origins, notes=tuple(draft.notes))
