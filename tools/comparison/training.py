"""Train variants: each config with each model and seed, in its own process and run folder."""

import itertools
import os
import shutil
import signal
import sys
import time
from collections import deque
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from subprocess import DEVNULL, STDOUT, Popen
from typing import Any

from tqdm import tqdm

from engine import load_config
from engine.config import yaml12
from engine.config.errors import ConfigError
from engine.config.schema import WITHOUT_EFFECT_ON_WEIGHTS, flatten, to_dict
from tools.comparison.rows import differences
from tools.comparison.runs import expand, is_run, read_run, short_names
from tools.tables import duration, writing

# A finished run that differs only in these keys can replace a new one: keys without effect on the weights, except those that
# change how they are evaluated; and the number of threads, which changes only the order of sums.
WITHOUT_EFFECT_ON_RESULTS = (
    *(key for key in WITHOUT_EFFECT_ON_WEIGHTS if key not in ("train.eval_freq", "eval.")),
    "train.num_threads",
)
MAIN = Path(__file__).resolve().parents[2] / "main.py"
MAX_FOLDER_NAME = 60  # characters
PAUSE = 0.2  # seconds between two checks of the processes
INTERRUPTIONS = (signal.SIGINT, signal.SIGTERM)
END_OF_LOG = 4096  # bytes that are searched for the last line


@dataclass(frozen=True)
class Variant:
    name: str
    config: Path
    overrides: Mapping[str, Any]
    folder: Path  # of its run

    @property
    def log(self) -> Path:
        """Next to the run folder, which a run that fails early removes."""
        return self.folder.with_name(f"{self.name}.log")


def find_configs(words: Sequence[str]) -> list[Path]:
    """Return the configs that paths and globs refer to, each once."""
    found: dict[Path, Path] = {}
    for word in words:
        paths = expand(word)
        if not paths:
            raise ConfigError(f"--train {word}: no config has such a name")
        found |= {path.resolve(): path for path in paths}
    return list(found.values())


def make_variants(
    configs: list[Path], models: Sequence[str | None], seeds: Sequence[int | None], overrides: dict[str, Any], output: Path | None
) -> list[Variant]:
    """Combine configs, models and seeds; None keeps the config's. The same arguments lead to the same run folders."""
    stems = [name.removesuffix(".yaml").replace("/", "-") for name in short_names([config.absolute() for config in configs])]
    if output is None:
        words = [word.replace("/", "-") for word in (*stems, *models) if word]
        folder = "-".join(["compare", *words])
        output = Path("runs", folder if len(folder) <= MAX_FOLDER_NAME else f"compare-{words[0]}-and-{len(words) - 1}-more")
    variants = []
    for (config, name), model, seed in itertools.product(zip(configs, stems, strict=True), models, seeds):
        values = dict(overrides)
        if model is not None:
            name, values["model.name"] = f"{name}-{model.replace('/', '-')}", model
        if seed is not None:
            name, values["seed"] = f"{name}-seed-{seed}", seed
        variants.append(Variant(name, config, values, output / name))
    return variants


def is_done(variant: Variant) -> bool:
    """Return whether the run is complete. Raise ConfigError for a mistake in the config, and for a run with another config."""
    config = load_config(variant.config, variant.overrides)
    if not is_run(variant.folder):
        return False
    run, requested = read_run(variant.folder, variant.name), flatten(to_dict(config))
    if requested["train.precision"] is None:  # the launcher decides, and the run's config has its decision
        requested["train.precision"] = run.config["train.precision"]
    changed = differences([run.config, requested]).items()
    changes = [f"{key} {was}, not {now}" for key, (was, now) in changed if not key.startswith(WITHOUT_EFFECT_ON_RESULTS)]
    if changes:
        problem = f"{variant.folder} was trained with another config: {', '.join(changes)}"
        raise ConfigError(f"{problem}; another -o keeps both, removing it trains it again")
    return run.is_completed


def environments(jobs: int) -> list[dict[str, str]]:
    """Return environment variables for `jobs` simultaneous processes: each has its own device, or its share of the cores."""
    if jobs == 1:
        return [{}]
    import torch

    from datasets.pipeline.cores import usable_cores  # its package imports torch

    slots: list[dict[str, str]] = [{}]
    if torch.cuda.is_available():
        visible = os.environ.get("CUDA_VISIBLE_DEVICES")
        devices = visible.split(",") if visible else [str(i) for i in range(torch.cuda.device_count())]
        slots = [{"CUDA_VISIBLE_DEVICES": device} for device in devices]
    elif not torch.accelerator.is_available():
        slots = [{"OMP_NUM_THREADS": os.environ.get("OMP_NUM_THREADS", str(max(1, usable_cores() // jobs)))}] * jobs
    if jobs > len(slots):
        raise ConfigError(f"--jobs {jobs}: each variant is trained on its own device; found {len(slots)}")
    return slots[:jobs]


class Child:
    """The process of a training."""

    def __init__(self, variant: Variant, environment: Mapping[str, str], plugins: Sequence[str]) -> None:
        options = [f"--{key}={as_option(value)}" for key, value in variant.overrides.items()]
        options += [f"--plugin={file}" for file in plugins]
        command = [sys.executable, str(MAIN), "-c", str(variant.config), "-e", str(variant.folder), "-r", "auto", *options]
        with writing(variant.log, say=False):
            log = variant.log.open("ab")
        with log:  # a new session, as Ctrl-C would reach it twice otherwise: from the terminal, and from us
            env = {**os.environ, **environment}
            self.process = Popen(command, stdin=DEVNULL, stdout=log, stderr=STDOUT, env=env, start_new_session=True)
        self.variant, self.began = variant, time.monotonic()

    def progress(self) -> str:
        """Return the last log line with metrics, without those of the training if it has those of an evaluation."""
        lines = [line for line in _last_lines(self.variant.log) if line.startswith("epoch ")]
        parts = lines[-1].split(" | ") if lines else ["begins"]
        if any(part.startswith("valid ") for part in parts):
            parts = [part for part in parts if not part.startswith("train ")]
        return f"{self.variant.name}  {' | '.join(parts)}"

    def why_not_complete(self) -> str | None:
        """Return why the process ended without a complete run; None if the run is complete."""
        code, folder = self.process.returncode, self.variant.folder
        run = read_run(folder, self.variant.name) if is_run(folder) else None
        if code == 0 and run and run.is_completed:
            return None
        if any(code in (128 + signum, -signum) for signum in INTERRUPTIONS):
            return run.progress if run else "interrupted before its first step"
        line = (_last_lines(self.variant.log) or ["no output"])[-1]
        return f"failed with exit code {code}: {line.removeprefix('error: ')} ({self.variant.log})"


def as_option(value: object) -> str:
    """Write a value as YAML on one line."""
    return yaml12.dump([value]).strip()[1:-1].replace("\n", " ")


def _last_lines(log: Path) -> list[str]:
    with log.open("rb") as file:
        file.seek(max(0, file.seek(0, os.SEEK_END) - END_OF_LOG))
        return [line for line in file.read().decode(errors="replace").splitlines() if line.strip()]


def train_all(variants: list[Variant], slots: list[dict[str, str]], plugins: Sequence[str]) -> tuple[int, dict[str, str]]:
    """Train variants, one at a time in each slot. Return the signal that ended it, or 0, and why variants are not complete.

    A failure doesn't stop the others. A signal is passed on to the running trainings, which save a checkpoint; no other begins.
    """
    waiting = deque(variants)
    children: dict[int, Child] = {}  # by slot
    incomplete: dict[str, str] = {}
    signum = 0
    bars = [tqdm(position=i, bar_format="{desc}", leave=False) for i in range(len(slots))] if sys.stderr.isatty() else []
    with collect_signals() as signals:
        try:
            while children or (waiting and not signum):
                for slot, environment in enumerate(slots):
                    if waiting and slot not in children and not signals and not signum:
                        children[slot] = Child(waiting.popleft(), environment, plugins)
                while signals:
                    signum = signals.popleft()
                    for child in children.values():
                        child.process.send_signal(signum)  # a second signal ends it at once
                for slot, bar in enumerate(bars):
                    text = children[slot].progress()[: shutil.get_terminal_size().columns - 1] if slot in children else ""
                    if text != bar.desc:
                        bar.set_description_str(text)
                time.sleep(PAUSE)
                for slot in [slot for slot, child in children.items() if child.process.poll() is not None]:
                    child = children.pop(slot)
                    name, why = child.variant.name, child.why_not_complete()
                    if why is not None:
                        incomplete[name] = why
                    tqdm.write(f"{name}: {why or f'done in {duration(time.monotonic() - child.began)}'}")
        finally:
            for child in children.values():
                child.process.terminate()
            for child in children.values():
                child.process.wait()
            for bar in bars:
                bar.close()
    return signum, incomplete | {variant.name: "not begun" for variant in waiting}


@contextmanager
def collect_signals() -> Iterator[deque[int]]:
    """Append SIGINT and SIGTERM to a queue instead of handling them."""
    signals: deque[int] = deque()
    before = {signum: signal.signal(signum, lambda signum, frame: signals.append(signum)) for signum in INTERRUPTIONS}
    try:
        yield signals
    finally:
        for signum, handler in before.items():
            signal.signal(signum, handler)
