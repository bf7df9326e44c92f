"""Loss, metric and learning rate of one run or several, from their metrics.jsonl."""

from argparse import Namespace
from pathlib import Path
from typing import Any

from engine import load_config
from engine.config.errors import ConfigError, RunError
from engine.plots.curves import draw_curves
from engine.plots.style import new_figure
from engine.run.metrics import read_metrics
from tools.pictures.output import save_pictures
from tools.pictures.subject import short_labels


def run(args: Namespace, overrides: dict[str, Any]) -> None:
    if overrides:
        raise ConfigError(f"--{next(iter(overrides))}: curves show logged metrics, and accept no config key")
    if not 0 <= args.smooth < 1:
        raise ConfigError(f"--smooth must be at least 0 and below 1, got {args.smooth:g}")
    runs = [Path(path).expanduser() for path in args.runs]
    histories = {label: read_history(path) for label, path in zip(short_labels(args.runs), runs, strict=True)}
    title = None
    if len(runs) == 1 and (runs[0] / "config.yaml").is_file():
        config = load_config(runs[0] / "config.yaml")
        title = f"{config.model.name} on {config.data.name}"
    draw_curves(figure := new_figure(show=args.show), histories, x=args.x, smoothing=args.smooth, title=title)
    save_pictures({"curves": figure}, args, runs[0] if len(runs) == 1 else None)


def read_history(run_dir: Path) -> list[dict[str, Any]]:
    path = run_dir / "metrics.jsonl"
    if not path.is_file():
        raise RunError(f"{run_dir} is not a run folder (it has no metrics.jsonl)")
    try:
        history = read_metrics(run_dir)
    except ValueError as error:
        raise RunError(f"{path} is damaged: {error}") from error
    if not history:
        raise RunError(f"{path} is empty: nothing was logged yet")
    return history
