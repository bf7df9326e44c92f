"""How often verdicts are right: simulated comparisons whose truth is known, and real ones of runs that differ only in their seed.

    python -m tests.verdicts --data ~/data/MNIST --runs runs/same

Without --data, only simulations: two minutes on one core. With it, also 24 runs of LeNet on a part of MNIST, kept in --runs: four
minutes. The tables go to docs/measured/verdicts.md, the figures to docs/measured/verdicts.json.
"""

import argparse
import json
import sys
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from scipy import stats

from engine.run.samples import read_samples
from tests.running import ROOT, results, run_main
from tools.comparison.verdict import LEVEL, estimate, holm, spent_at

N_COMPARISONS, EFFECTS = 10_000, (0.3, 1.0, 3.0)  # in points
OUTPUT = ROOT / "docs" / "measured"
N_RUNS, GROUP, N_SAME = 24, 3, 200  # of real runs: all, in a group, comparisons
PLUGIN = """
from dataclasses import replace
import torch
from datasets.mnist import load
from datasets.pipeline.splits import DatasetSpec

def part(source):
    whole = load(source, fashion=False)
    return replace(whole, train=whole.train.subset(torch.arange(3000)))

DATASETS = [DatasetSpec("MNIST-3000", part, channels=1, img_size=28, mean=(0.1307,), std=(0.3081,), n_classes=10)]
"""
TRAINING = ("--data.name", "MNIST-3000", "--train.n_steps", 300, "--train.eval_freq", 300, "--train.print_freq", 300)
TRAINING += ("--train.batch_size", 32, "--train.optim.type", "Adam", "--train.optim.lr", 0.003)
TRAINING += ("--train.num_threads", 1, "--data.verify", "false", "--eval.batch_size", 1000)


@dataclass(frozen=True)
class Setting:
    """Runs of each side, test images, and the deviation of a seed's accuracy in points on each side."""

    n_runs: tuple[int, int]
    n_images: int
    seeds: tuple[float, float]

    def cells(self) -> list[str]:
        seeds = " and ".join(f"{value:g}" for value in dict.fromkeys(self.seeds))
        return [f"{self.n_runs[0]} and {self.n_runs[1]}", f"{self.n_images:,}", f"{seeds} points"]


SETTINGS = [
    Setting((2, 2), 2000, (0.3, 0.3)),
    Setting((3, 3), 2000, (0.3, 0.3)),
    Setting((3, 3), 10_000, (0.15, 0.3)),
    Setting((3, 5), 2000, (0.5, 0.5)),
    Setting((3, 5), 10_000, (0.15, 0.15)),
    Setting((5, 5), 2000, (0.3, 0.6)),
    Setting((5, 5), 10_000, (0.3, 0.3)),
    Setting((5, 5), 500, (0.1, 0.1)),
    Setting((8, 8), 2000, (0.5, 0.5)),
    Setting((8, 8), 10_000, (0.15, 0.15)),
]
# A run is right in an image if its skill + the image's ease + the model's own ease + noise > 0, all normal. An image is hard or
# easy for all runs alike: most mistakes are shared, as in trained networks.
SKILL, EASE, OWN = 3.5, 2.0, 0.6  # noise has a deviation of 1
SPREAD = (EASE**2 + OWN**2 + 1) ** 0.5


def simulate(random: np.random.Generator, setting: Setting, effect: float) -> tuple[np.ndarray, np.ndarray]:
    """Return the rights and wrongs of both sides, whose true accuracies differ by `effect` points."""
    accuracy = stats.norm.cdf(SKILL / SPREAD)
    per_point = 0.01 * SPREAD / stats.norm.pdf(SKILL / SPREAD)  # the skill that a point of accuracy takes
    ease, sides = EASE * random.standard_normal(setting.n_images, np.float32), []
    for n, deviation, gain in zip(setting.n_runs, setting.seeds, (effect, 0.0), strict=True):
        of_seeds = deviation * per_point
        skill = stats.norm.ppf(accuracy + gain / 100) * (SPREAD**2 + of_seeds**2) ** 0.5
        own = ease + OWN * random.standard_normal(setting.n_images, np.float32)
        seeds = of_seeds * random.standard_normal((n, 1), np.float32)
        sides.append(own + seeds + random.standard_normal((n, setting.n_images), np.float32) > -skill)
    return sides[0], sides[1]


def simulated(random: np.random.Generator, n: int) -> dict[str, Any]:
    """Return coverage and false verdicts of `n` comparisons of equals, by setting and in all, and the power for true effects."""
    rows, each = [], n // len(SETTINGS)
    for setting in SETTINGS:
        found = [estimate(*simulate(random, setting, 0.0)) for _ in range(each)]
        rows.append(
            {
                "setting": setting.cells(),
                "n": each,
                "coverage": _share(low <= 0 <= high for low, high in (one.interval() for one in found)),
                "false": _share(one.p <= LEVEL for one in found),
                "detectable": float(np.median([one.detectable for one in found])),
                "power": {effect: _power(random, setting, effect, each) for effect in EFFECTS},
            }
        )
        print(rows[-1], file=sys.stderr)
    return {"n": n, "coverage": _mean(rows, "coverage"), "false": _mean(rows, "false"), "settings": rows}


def _power(random: np.random.Generator, setting: Setting, effect: float, n: int) -> float:
    return _share(estimate(*simulate(random, setting, effect)).p <= LEVEL for _ in range(n))


def _share(outcomes: Iterable[bool]) -> float:
    return float(np.mean([*outcomes]))


def _mean(rows: list[dict[str, Any]], name: str) -> float:
    return float(np.mean([row[name] for row in rows]))


def sequential(random: np.random.Generator, n: int, n_looks: int = 7) -> dict[str, Any]:
    """Return how often --until-decided decides, and after how many seeds: between equals, and at a difference of a point."""
    setting, stops = Setting((n_looks + 1, n_looks + 1), 2000, (0.3, 0.3)), []
    for effect in (0.0, 1.0):
        stops.append([_stop(*simulate(random, setting, effect), n_looks) for _ in range(n)])
    decided = [_share(stop is not None for stop in of_effect) for of_effect in stops]
    seeds = [float(np.mean([stop or n_looks + 1 for stop in of_effect])) for of_effect in stops]
    return {"n": n, "decided": decided, "seeds": seeds}


def _stop(a: np.ndarray, b: np.ndarray, n_looks: int) -> int | None:
    looks = range(1, n_looks + 1)
    return next((k + 1 for k in looks if estimate(a[: k + 1], b[: k + 1]).p <= spent_at(k, n_looks)), None)


def families(random: np.random.Generator, n: int) -> float:
    """Return how often Holm's correction finds any difference in the six pairs of four equal groups."""
    setting = Setting((3, 3), 2000, (0.3, 0.3))
    wrong = 0
    for _ in range(n):
        groups = [side for _ in range(2) for side in simulate(random, setting, 0.0)]
        pairs = [estimate(groups[i], groups[j]).p for i in range(4) for j in range(i)]
        wrong += min(holm(pairs)) <= LEVEL
    return wrong / n


def same_runs(data: Path, folder: Path) -> list[np.ndarray]:
    """Train runs that differ only in their seed, and return what each got right in the test split."""
    folder.mkdir(parents=True, exist_ok=True)
    plugin = folder / "part_of_mnist.py"
    plugin.write_text(PLUGIN)
    scores = []
    for seed in range(1, N_RUNS + 1):
        run = folder / f"seed-{seed}"
        if not (run / "results.json").exists():
            argv = ("-e", run, "--plugin", plugin, "--data.dataroot", data, "--seed", seed, *TRAINING)
            assert run_main(*argv) == 0, f"{run} failed"
        scores.append(read_samples(run / "samples" / f"valid-{results(run)['best']['step']}.npz").scores)
    return scores


def real(random: np.random.Generator, scores: list[np.ndarray]) -> dict[str, Any]:
    """Compare groups of the same training. Each shuffle of the runs gives comparisons without a common run."""
    found = []
    while len(found) < N_SAME:
        order = random.permutation(len(scores)).reshape(-1, 2, GROUP)
        found += [estimate(*(np.stack([scores[i] for i in group]) for group in pair)) for pair in order]
    false = sum(one.p <= LEVEL for one in found[:N_SAME])
    accuracies = [100 * one.mean() for one in scores]
    return {
        "runs": len(scores),
        "comparisons": N_SAME,
        "false": int(false),
        "p": float(stats.binomtest(int(false), N_SAME, LEVEL).pvalue),
        "accuracy": float(np.mean(accuracies)),
        "deviation": float(np.std(accuracies, ddof=1)),
        "detectable": float(np.median([one.detectable for one in found])),
    }


PAGE = """# How often verdicts are right

Made by `python -m tests.verdicts`. Each simulated comparison has new images and seeds. Most mistakes are shared by all runs, as
in trained networks. The last columns say how often a true difference of so many points is seen.

| seeds | test images | a seed's deviation | interval covers | false verdicts | could see | 0.3 points | 1 point | 3 points |
| ---: | ---: | ---: | ---: | ---: | ---: | ---: | ---: | ---: |
{rows}

{n:,} comparisons of equals in all: the 95 % interval covers the truth in {coverage:.2f} %, and {false:.2f} % of the verdicts are
false.

- `--until-decided --max-seeds 8`, a seed's deviation 0.3 points, 2,000 images: {wrong:.1f} % of {n_sequences:,} comparisons of
  equals are decided. With a difference of a point {decided:.0f} % are, after {seeds:.1f} seeds of each on average.
- Four equal trainings in six pairs with Holm's correction: any false verdict in {families:.1f} % of {n_sequences:,} cases.
"""
REAL = """- {runs} runs of LeNet on 3,000 images of MNIST that differ only in their seed: {accuracy:.2f} ± {deviation:.2f} % of
  10,000 test images are right. Of {comparisons} comparisons of groups of three, {false} verdicts are false; 5 % are expected
  (binomial p {p:.2f}). Three seeds each could see {detectable:.2f} points.
"""


def as_page(measured: dict[str, Any]) -> str:
    whole, looks, rows = measured["simulated"], measured["until decided"], []
    for row in whole["settings"]:
        shares = [f"{100 * share:.1f} %" for share in (row["coverage"], row["false"])]
        power = [f"{100 * share:.0f} %" for share in row["power"].values()]
        seen = f"{100 * row['detectable']:.2f} points"
        rows.append(f"| {' | '.join([*row['setting'], *shares, seen, *power])} |")
    page = PAGE.format(
        rows="\n".join(rows),
        n=whole["n"],
        coverage=100 * whole["coverage"],
        false=100 * whole["false"],
        n_sequences=looks["n"],
        wrong=100 * looks["decided"][0],
        decided=100 * looks["decided"][1],
        seeds=looks["seeds"][1],
        families=100 * measured["families"],
    )
    same = measured["same training"]
    return page + (REAL.format(**{**same, "detectable": 100 * same["detectable"]}) if same else "")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--n", type=int, default=N_COMPARISONS, help="simulated comparisons")
    parser.add_argument("--data", type=Path, help="the folder of MNIST, for real comparisons")
    parser.add_argument("--runs", type=Path, default=Path("runs/same"), help="where the real runs are kept")
    parser.add_argument("--output", type=Path, default=OUTPUT)
    args = parser.parse_args()
    random = np.random.default_rng(0)
    measured = {
        "same training": real(np.random.default_rng(1), same_runs(args.data, args.runs)) if args.data else None,
        "simulated": simulated(random, args.n),
        "until decided": sequential(random, args.n // 10),
        "families": families(random, args.n // 10),
    }
    (args.output / "verdicts.json").write_text(json.dumps(measured, indent=1) + "\n")
    (args.output / "verdicts.md").write_text(page := as_page(measured))
    print(page)


if __name__ == "__main__":
    main()
