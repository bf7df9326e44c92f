"""The model card: what a model is, how it is loaded, what it reached, and how it was trained."""

import json
import shlex
from pathlib import Path
from typing import Any

from engine.config.schema import to_dict
from engine.config.yaml12 import dump
from engine.inference.trained import Trained
from engine.run.macs import count
from engine.run.metrics import read_metrics
from tools.exports.exportable import Exportable

METRICS = {
    "acc@1": "top-1 accuracy",
    "acc@5": "top-5 accuracy",
    "balanced_acc": "mean accuracy of the classes",
    "ece": "expected calibration error",
    "loss": "loss",
    "count": "images",
}


def model_card(trained: Trained, exportable: Exportable, *, averaged: bool, license: str | None, in_timm: bool) -> str:
    sections = [
        _front_matter(license, in_timm=in_timm),
        f"# {exportable.name} for {trained.config.data.name}",
        _network(exportable),
        "## Use",
        _with_timm() if in_timm else "timm can't load it: it has no network of this kind.",
        _with_this_project(exportable),
        _preparation(exportable),
    ]
    if trained.run_dir is None:
        sections += ["## Origin", f"The weights are {trained.weights}."]
    else:
        sections += [*_results(trained, averaged=averaged), *_training(trained, trained.run_dir)]
    return "\n\n".join(sections) + "\n"


def _front_matter(license: str | None, *, in_timm: bool) -> str:
    lines = ["tags:", "- image-classification", *(["- timm", "library_name: timm"] if in_timm else [])]
    return "\n".join(["---", *lines, *([f"license: {license}"] if license else []), "---"])


def _network(exportable: Exportable) -> str:
    counted = count(exportable.model, exportable.channels, exportable.img_size)
    size, n_classes = exportable.img_size, len(exportable.classes)
    shown = ", ".join(exportable.classes[:20]) + (", ..." if n_classes > 20 else "")
    return (
        f"It sorts images into {n_classes:,} classes ({shown}). It has {counted.params / 1e6:,.3f} million parameters and needs "
        f"{counted.macs / 1e6:,.2f} million multiply-adds for an image of {size}x{size}."
    )


def _with_timm() -> str:
    return """```python
import timm
from timm.data import create_transform, resolve_model_data_config

model = timm.create_model("local-dir:FOLDER", pretrained=True).eval()
transform = create_transform(**resolve_model_data_config(model), is_training=False)
```

FOLDER is this folder; on the Hugging Face Hub, `hf-hub:` and the name of its repository take the place of `local-dir:FOLDER`."""


def _with_this_project(exportable: Exportable) -> str:
    given = {
        "n_classes": len(exportable.classes),
        "in_channels": exportable.channels,
        "img_size": exportable.built_for,
        **exportable.arguments,
    }
    arguments = ", ".join(f"{key}={value!r}" for key, value in given.items())
    return f"""With the project that trained it:

```python
from models import create_model

model = create_model({exportable.name!r}, {arguments}, pretrained="FOLDER").eval()
```"""


def _preparation(exportable: Exportable) -> str:
    about, size = exportable.describe()["preprocessing"], exportable.img_size
    shorter_side = round(size / exportable.crop_pct)
    return (
        f"An image ({about['colours']}, values from 0 to 1) is scaled so that its shorter side has {shorter_side} pixels "
        f"({exportable.interpolation}, antialiased), cropped to the middle {size}x{size}, and normalized with mean "
        f"{about['mean']} and standard deviation {about['std']}. The output is logits; {exportable.probabilities} makes "
        "probabilities of them."
    )


def _results(trained: Trained, *, averaged: bool) -> list[str]:
    """As the training logged them for this checkpoint."""
    parts = {"validation": "valid_ema/" if averaged else "valid/"}
    logged = {key: value for line in read_metrics(trained.run_dir) if line["step"] == trained.step for key, value in line.items()}
    best = _read(trained.run_dir / "results.json").get("best", {})
    if best.get("step") == trained.step and not averaged:
        parts["test"] = "test/"
        logged |= _read(trained.run_dir / "results.json")["test"]
    measured = {
        part: {name: logged[prefix + name] for name in METRICS if prefix + name in logged} for part, prefix in parts.items()
    }
    measured = {part: values for part, values in measured.items() if values}
    if not measured:
        return []
    head = f"| step {trained.step:,} | {' | '.join(measured)} |\n|---{'|---:' * len(measured)}|"
    rows = [
        f"| {said} | {' | '.join(_say(name, values[name]) if name in values else '' for values in measured.values())} |"
        for name, said in METRICS.items()
        if any(name in values for values in measured.values())
    ]
    chosen = trained.config.data.valid_ratio is None
    note = ["Validation is the data set's test split: this checkpoint was chosen on it."] if chosen else []
    return ["## Results", "\n".join([head, *rows]), *note]


def _say(name: str, value: float) -> str:
    if name == "count":
        return f"{value:,}"
    return f"{value:.4f}" if name == "loss" else f"{100 * value:.2f} %"


def _training(trained: Trained, run_dir: Path) -> list[str]:
    environment = _read(run_dir / "environment.json")
    config = to_dict(trained.config)
    config["data"]["dataroot"] = None  # of one machine
    packages = ", ".join(f"{name} {version}" for name, version in environment["packages"].items() if version)
    return [
        "## Training",
        f"```sh\npython {shlex.join(environment['command'][1:])}\n```",
        f"Data: {trained.config.data.name}. Device: {environment['world_size']} x {environment['device']}, "
        f"{environment['precision']}. Software: {packages}.",
        f"The whole config:\n\n```yaml\n{dump(config)}```",
    ]


def _read(path: Path) -> dict[str, Any]:
    return json.loads(path.read_text()) if path.is_file() else {}
