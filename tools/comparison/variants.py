"""Which trainings a command asks for, and what of each is there already."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from glob import glob, has_magic
from pathlib import Path
from typing import Any

from engine import load_config
from engine.config.errors import ConfigError
from engine.config.schema import flatten, to_dict
from tools.comparison.differences import differences
from tools.comparison.runs import is_run, read_run, short_names

# Keys by which nothing changes that a run reports.
HARMLESS = ("train.print_freq", "train.save_freq", "train.keep_last", "train.profile", "train.timeout", "train.time_limit")
HARMLESS += ("train.num_threads", "dataloader.", "tracking.", "data.dataroot", "data.verify", "data.download")
LONGEST_NAME = 60  # of a folder


@dataclass(frozen=True)
class Variant:
    name: str
    config: Path
    overrides: Mapping[str, Any]
    folder: Path  # of its run

    @property
    def log(self) -> Path:
        """Beside the run, since a run that never begins leaves no folder."""
        return self.folder.with_name(f"{self.name}.log")


def find_configs(words: Sequence[str]) -> list[Path]:
    """Each once; what a glob finds in order."""
    found: dict[Path, Path] = {}
    for word in words:
        path = Path(word).expanduser()
        matches = [Path(match) for match in sorted(glob(str(path)))] if has_magic(word) and not path.exists() else [path]
        if not matches:
            raise ConfigError(f"--train {word}: no config has such a name")
        found |= {match.resolve(): match for match in matches}
    return list(found.values())


def make_variants(
    configs: Sequence[Path], models: Sequence[str], seeds: Sequence[int], overrides: Mapping[str, Any], output: Path | None
) -> list[Variant]:
    """Every config, with every model and every seed where these are given, in a folder that the same command finds again."""
    variants = []
    stems = [name.removesuffix(".yaml").replace("/", "-") for name in short_names([config.absolute() for config in configs])]
    output = output or Path("runs") / _default_output([*stems, *models])
    for config, stem in zip(configs, stems, strict=True):
        for model in models or [None]:
            of_model = {"model.name": model} if model else {}
            for seed in seeds or [None]:
                of_seed = {"seed": seed} if seed is not None else {}
                name = "-".join(
                    [stem, *(model.replace("/", "-") for model in of_model.values()), *(f"seed-{s}" for s in of_seed.values())]
                )
                variants.append(Variant(name, config, {**overrides, **of_model, **of_seed}, output / name))
    return variants


def _default_output(names: Sequence[str]) -> str:
    whole = "-".join(["compare", *(name.replace("/", "-") for name in names)])
    return whole if len(whole) <= LONGEST_NAME else f"compare-{names[0]}-and-{len(names) - 1}-more"


def is_done(variant: Variant) -> bool:
    """Whether its run is complete. A mistake in the config, or a run of another config, is found before anything is trained."""

    config = load_config(variant.config, variant.overrides)
    if not is_run(variant.folder):
        return False
    run, asked = read_run(variant.folder, variant.name), flatten(to_dict(config))
    if asked["train.precision"] is None:  # then the launcher decides, and a run notes what it was
        asked["train.precision"] = run.config["train.precision"]
    changed = {key: two for key, two in differences([run.config, asked]).items() if not key.startswith(HARMLESS)}
    if changed:
        said = ", ".join(f"{key} {was}, not {now}" for key, (was, now) in changed.items())
        raise ConfigError(
            f"{variant.folder} was trained with another config: {said}; another -o keeps both, removing it trains anew"
        )
    return run.is_completed
