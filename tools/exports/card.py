"""The model card: the model, its use, results and training. It may be shared: names are escaped, paths lose their folders."""

import re
import shlex
from keyword import iskeyword
from pathlib import Path
from typing import Any

from engine.config.errors import RunError
from engine.config.schema import to_dict
from engine.config.yaml12 import dump
from engine.inference.trained import Trained
from engine.run.macs import count
from engine.run.metrics import is_number, read_metrics
from models.loading.files import MalformedFile, read_json
from tools.exports.exportable import Exportable
from tools.tables import code_block, escaped

METRICS = {
    "acc@1": "top-1 accuracy",
    "acc@5": "top-5 accuracy",
    "balanced_acc": "mean accuracy of the classes",
    "ece": "expected calibration error",
    "loss": "loss",
    "count": "images",
}
IN_PATH = r"[^\s,;:=\"'\[\]{}()]"
# an absolute path, one from a home folder, and one out of this folder, with its last part
PRIVATE_PATH = re.compile(rf"(?<![\w./~:-])(?:~[\w-]*/|\.\./|/|[A-Za-z]:[\\/])(?:{IN_PATH}*[\\/])?({IN_PATH}+)")
USE_WITH_TIMM = """```python
import timm
from timm.data import create_transform, resolve_model_data_config

model = timm.create_model("local-dir:FOLDER", pretrained=True).eval()
transform = create_transform(**resolve_model_data_config(model), is_training=False)
```

FOLDER is this folder. From the Hugging Face Hub, use `hf-hub:` and the name of the repository instead of `local-dir:FOLDER`."""


def model_card(trained: Trained, exportable: Exportable, in_timm: bool, *, averaged: bool, license: str | None) -> str:
    name, classes, size = exportable.name, exportable.classes, exportable.img_size
    counted = count(exportable.model, exportable.channels, size)
    preprocessing = exportable.describe()["preprocessing"]
    examples = ", ".join([*map(escaped, classes[:20]), *(["..."] if classes[20:] else [])])
    arguments = [_as_argument(key, value) for key, value in exportable.all_arguments.items()]
    call = ", ".join([repr(name), *arguments, 'pretrained="FOLDER"'])
    front_matter: dict[str, Any] = {"tags": ["image-classification"]}
    if in_timm:
        front_matter = {"tags": ["image-classification", "timm"], "library_name": "timm"}
    sections = [
        f"---\n{dump({**front_matter, **({'license': license} if license else {})})}---",
        f"# {escaped(name)} for {escaped(trained.config.data.name)}",
        f"The model classifies images into {len(classes):,} classes ({examples}). It has {counted.params / 1e6:,.3f} million "
        f"parameters, and needs {counted.macs / 1e6:,.2f} million multiply-adds for an image of {size}x{size}.",
        "## Use",
        USE_WITH_TIMM if in_timm else "timm can't load it: timm has no such network.",
        "With the project that trained it:",
        code_block(f"from models import create_model\n\nmodel = create_model({call}).eval()", "python"),
        f"Preprocessing: resize the image ({preprocessing['colours']}, values from 0 to 1) so that its shorter side has "
        f"{round(size / exportable.crop_pct)} pixels ({exportable.interpolation}, antialiased), crop the middle {size}x{size}, "
        f"and normalize with mean {preprocessing['mean']} and standard deviation {preprocessing['std']}. The output is logits; "
        f"apply {exportable.probabilities} to get probabilities.",
    ]
    if trained.run_dir is None:
        sections += ["## Origin", f"The weights are {escaped(shareable(trained.weights))}."]
    else:
        sections += [*_results(trained, trained.run_dir, averaged=averaged), *_training(trained, trained.run_dir)]
    return "\n\n".join(sections) + "\n"


def _as_argument(name: str, value: Any) -> str:
    return f"{name}={value!r}" if name.isidentifier() and not iskeyword(name) else f"**{ {name: value}!r}"


def _results(trained: Trained, run_dir: Path, *, averaged: bool) -> list[str]:
    """Return a table of the metrics that the training logged for this checkpoint."""
    results, prefixes = _read(run_dir / "results.json"), {"validation": "valid_ema/" if averaged else "valid/"}
    logged = {key: value for line in read_metrics(run_dir) if line["step"] == trained.step for key, value in line.items()}
    if _mapping(results, "best").get("step") == trained.step and not averaged:
        prefixes["test"] = "test/"
        logged |= _mapping(results, "test")
    prefixes = {split: prefix for split, prefix in prefixes.items() if any(prefix + name in logged for name in METRICS)}
    if not prefixes:
        return []
    table = [f"| step {trained.step:,} | {' | '.join(prefixes)} |", f"|---{'|---:' * len(prefixes)}|"]
    for name, label in METRICS.items():
        values = [logged.get(prefix + name) for prefix in prefixes.values()]
        form = {"count": "{:,}", "loss": "{:.4f}"}.get(name, "{:.2%}")
        cells = [form.format(value).replace("%", " %") if is_number(value) else "" for value in values]
        if any(cells):
            table.append(f"| {label} | {' | '.join(cells)} |")
    chosen = trained.config.data.valid_ratio is None
    note = ["No separate validation split: validation is the dataset's test split, on which this checkpoint was chosen."]
    return ["## Results", "\n".join(table), *(note if chosen else [])]


def _training(trained: Trained, run_dir: Path) -> list[str]:
    environment, config = _read(run_dir / "environment.json"), to_dict(trained.config)
    config["data"]["dataroot"] = None  # differs between machines
    packages = ", ".join(f"{name} {version}" for name, version in _mapping(environment, "packages").items() if version)
    command = environment.get("command")
    words = [str(word) for word in command[1:]] if isinstance(command, list) else []
    sections, shared, is_dataroot = ["## Training"], list[str](), False
    for word in words:  # without data.dataroot and private paths
        name, equals, value = word.partition("=")
        was_dataroot, is_dataroot = is_dataroot, name.removeprefix("--") == "data.dataroot" and not equals
        if name.removeprefix("--") != "data.dataroot" and not was_dataroot:
            shared.append(f"{name}={shareable(value)}" if equals else shareable(word))
    if words:
        sections.append(code_block(f"python {shlex.join(shared)}", "sh"))
    device = f"{environment.get('world_size')} x {environment.get('device')}, {environment.get('precision')}"
    description = f"Data: {trained.config.data.name}. Device: {device}. Software: {packages}."
    return [*sections, escaped(description), f"The whole config:\n\n{code_block(dump(shareable(config)), 'yaml')}"]


def shareable(value: Any) -> Any:
    """Shorten private paths in nested values: /home/me/weights.pth becomes .../weights.pth."""
    if isinstance(value, dict):
        return {key: shareable(item) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [shareable(item) for item in value]
    if not isinstance(value, str):
        return value
    if PRIVATE_PATH.match(value):  # the whole text is one, spaces included
        return ".../" + re.split(r"[/\\]", value.rstrip("/\\"))[-1]
    return PRIVATE_PATH.sub(r".../\1", value)


def _mapping(values: dict[str, Any], name: str) -> dict[str, Any]:
    value = values.get(name)
    return value if isinstance(value, dict) else {}


def _read(path: Path) -> dict[str, Any]:
    """Return the content of a JSON file of the run; nothing if the file is missing."""
    if not path.exists():
        return {}
    try:
        value = read_json(path)
        if not isinstance(value, dict):
            raise MalformedFile(path, "it is not a mapping")
    except OSError as error:
        raise RunError(str(error)) from error
    return value
