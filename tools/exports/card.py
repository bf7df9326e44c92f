"""The model card: what the model is, how to load it, its results, and how it was trained."""

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
USE_WITH_TIMM = """```python
import timm
from timm.data import create_transform, resolve_model_data_config

model = timm.create_model("local-dir:FOLDER", pretrained=True).eval()
transform = create_transform(**resolve_model_data_config(model), is_training=False)
```

FOLDER is this folder. From the Hugging Face Hub, use `hf-hub:` and the name of the repository instead of `local-dir:FOLDER`."""


def model_card(trained: Trained, exportable: Exportable, *, averaged: bool, license: str | None, in_timm: bool) -> str:
    name, classes, size = exportable.name, exportable.classes, exportable.img_size
    counted = count(exportable.model, exportable.channels, size)
    preprocessing, examples = exportable.describe()["preprocessing"], ", ".join(classes[:20]) + (", ..." if classes[20:] else "")
    arguments = ", ".join(f"{key}={value!r}" for key, value in exportable.all_arguments.items())
    front_matter = ["tags:", "- image-classification", *(["- timm", "library_name: timm"] if in_timm else [])]
    front_matter += [f"license: {license}"] if license else []
    sections = [
        "\n".join(["---", *front_matter, "---"]),
        f"# {name} for {trained.config.data.name}",
        f"The model classifies images into {len(classes):,} classes ({examples}). It has {counted.params / 1e6:,.3f} million "
        f"parameters, and needs {counted.macs / 1e6:,.2f} million multiply-adds for an image of {size}x{size}.",
        "## Use",
        USE_WITH_TIMM if in_timm else "timm can't load it: timm has no such network.",
        "With the project that trained it:",
        f"```python\nfrom models import create_model\n\n"
        f'model = create_model({name!r}, {arguments}, pretrained="FOLDER").eval()\n```',
        f"Preprocessing: resize the image ({preprocessing['colours']}, values from 0 to 1) so that its shorter side has "
        f"{round(size / exportable.crop_pct)} pixels ({exportable.interpolation}, antialiased), crop the middle {size}x{size}, "
        f"and normalize with mean {preprocessing['mean']} and standard deviation {preprocessing['std']}. The output is logits; "
        f"apply {exportable.probabilities} to get probabilities.",
    ]
    if trained.run_dir is None:
        sections += ["## Origin", f"The weights are {trained.weights}."]
    else:
        sections += [*_results(trained, trained.run_dir, averaged=averaged), *_training(trained, trained.run_dir)]
    return "\n\n".join(sections) + "\n"


def _results(trained: Trained, run_dir: Path, *, averaged: bool) -> list[str]:
    """Return a table of the metrics that the training logged for this checkpoint."""
    results, prefixes = _read_json(run_dir / "results.json"), {"validation": "valid_ema/" if averaged else "valid/"}
    logged = {key: value for line in read_metrics(run_dir) if line["step"] == trained.step for key, value in line.items()}
    if results.get("best", {}).get("step") == trained.step and not averaged:
        prefixes["test"] = "test/"
        logged |= results["test"]
    prefixes = {split: prefix for split, prefix in prefixes.items() if any(prefix + name in logged for name in METRICS)}
    if not prefixes:
        return []
    table = [f"| step {trained.step:,} | {' | '.join(prefixes)} |", f"|---{'|---:' * len(prefixes)}|"]
    for name, label in METRICS.items():
        values = [logged.get(prefix + name) for prefix in prefixes.values()]
        form = {"count": "{:,}", "loss": "{:.4f}"}.get(name, "{:.2%}")
        cells = ["" if value is None else form.format(value).replace("%", " %") for value in values]
        if any(cells):
            table.append(f"| {label} | {' | '.join(cells)} |")
    chosen = trained.config.data.valid_ratio is None
    note = ["No separate validation split: validation is the dataset's test split, on which this checkpoint was chosen."]
    return ["## Results", "\n".join(table), *(note if chosen else [])]


def _training(trained: Trained, run_dir: Path) -> list[str]:
    environment, config = _read_json(run_dir / "environment.json"), to_dict(trained.config)
    config["data"]["dataroot"] = None  # differs between machines
    packages = ", ".join(f"{name} {version}" for name, version in environment["packages"].items() if version)
    return [
        "## Training",
        f"```sh\npython {shlex.join(environment['command'][1:])}\n```",
        f"Data: {trained.config.data.name}. Device: {environment['world_size']} x {environment['device']}, "
        f"{environment['precision']}. Software: {packages}.",
        f"The whole config:\n\n```yaml\n{dump(config)}```",
    ]


def _read_json(path: Path) -> dict[str, Any]:
    return json.loads(path.read_text()) if path.is_file() else {}
