"""Whether one row of a comparison is better than another: the difference of their scores, with its uncertainty.

Seeds and images are crossed random effects, with Satterthwaite's degrees of freedom; docs/tools.md says why.
"""

import itertools
from bisect import bisect_left
from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
from scipy import optimize, stats

from datasets.pipeline.fingerprint import fingerprint_differences
from engine.config.errors import ConfigError, RunError
from engine.run.samples import SampleScores, read_samples, samples_path
from tools.comparison.rows import LEVEL, Row
from tools.comparison.runs import RunRecord

POWER = 0.8
MOST_SEEDS = 100  # that a plan proposes
AS_GOOD_AS_NORMAL = 1e5  # degrees of freedom

Scores = dict[int | None, np.ndarray]  # seed -> the score of each image; NaN where an image has none


@dataclass(frozen=True)
class Estimate:
    """The difference of two groups of runs, A - B, and where its variance comes from."""

    difference: float
    of_runs: tuple[float, float]  # the variance of a run's mean score in A and in B, or that of a pair's difference and 0
    of_images: float  # the variance that more seeds don't reduce
    n_runs: tuple[int, int]
    n_images: int
    only: tuple[int, int] | None = None  # of two runs, right or wrong: the images that only A, only B gets right
    gains: Any = None  # an array: of each image of the first seed; NaN where it has no score

    @property
    def has_seeds(self) -> bool:
        return min(self.n_runs) > 1

    @cached_property
    def error_and_degrees(self) -> tuple[float, float]:
        parts = [(variance / n, n - 1) for variance, n in zip(self.of_runs, self.n_runs, strict=True)]
        parts.append((self.of_images, self.n_images - 1))
        variance = sum(part for part, _ in parts)
        weights = sum(part**2 / degrees for part, degrees in parts if degrees)
        return variance**0.5, min(variance**2 / weights, AS_GOOD_AS_NORMAL) if weights else AS_GOOD_AS_NORMAL

    def interval(self, level: float = LEVEL) -> tuple[float, float]:
        error, degrees = self.error_and_degrees
        margin = stats.t.isf(level / 2, degrees) * error
        return self.difference - margin, self.difference + margin

    @cached_property
    def p(self) -> float:
        """The probability of such a difference, or a larger one, between equal groups. Two single runs: McNemar's exact test."""
        if self.only is not None:
            return float(stats.binomtest(self.only[0], sum(self.only)).pvalue) if any(self.only) else 1.0
        error, degrees = self.error_and_degrees
        return float(2 * stats.t.sf(abs(self.difference) / error, degrees)) if error else float(self.difference == 0)

    @cached_property
    def detectable(self) -> float:
        """The smallest true difference that would be seen with a probability of POWER."""
        error, degrees = self.error_and_degrees
        critical = stats.t.isf(LEVEL / 2, degrees)
        return float(error * optimize.brentq(lambda x: stats.nct.sf(critical, degrees, x) - POWER, 0, 10 * critical))

    @cached_property
    def seeds_to_decide(self) -> int | None:
        """The number of seeds on each side that would see a true difference of this size; None if MOST_SEEDS would not."""
        numbers = range(min(self.n_runs) + 1, MOST_SEEDS + 1) if self.has_seeds else range(0)
        i = bisect_left(numbers, -abs(self.difference), key=lambda n: -replace(self, n_runs=(n, n)).detectable)
        return numbers[i] if i < len(numbers) else None


def estimate(a: np.ndarray, b: np.ndarray) -> Estimate:
    """Compare the scores of two groups, runs x images. With one run on a side, only the images' chance is in the variance."""
    gains, n_runs = a.mean(0) - b.mean(0), (len(a), len(b))
    counts = np.isfinite(gains)
    if (n_images := int(counts.sum())) < 2:
        raise RunError("--verdict: there are fewer than two images to compare")
    a, b, difference = a[:, counts], b[:, counts], float(gains[counts].mean())
    of_images = float(gains[counts].var(ddof=1)) / n_images
    if min(n_runs) == 1:
        is_mcnemar = a.dtype == b.dtype == bool and n_runs == (1, 1)
        only = (int((a & ~b).sum()), int((b & ~a).sum())) if is_mcnemar else None
        return Estimate(difference, (0.0, 0.0), of_images, n_runs, n_images, only, gains)
    of_runs = float(a.mean(1).var(ddof=1)), float(b.mean(1).var(ddof=1))
    return Estimate(difference, of_runs, max(0.0, of_images - _noise(a) - _noise(b)), n_runs, n_images, gains=gains)


def _noise(scores: np.ndarray) -> float:
    """Return the variance of the mean that comes from what a run does on single images, beyond the run and the image."""
    rest = scores - scores.mean(0) - scores.mean(1, keepdims=True) + scores.mean()
    return float(np.square(rest).sum() / ((len(scores) - 1) * (scores.shape[1] - 1)) / scores.size)


def compare_by_seed(a: Scores, b: Scores) -> Estimate:
    """Compare runs in pairs of the same seed, each pair on its own images, as where the seed chooses the split.

    The images of two seeds may be the same ones in part. So their variance is counted as if more seeds brought no new image,
    which is too much where they do.
    """
    pairs = [estimate(a[seed][None], b[seed][None]) for seed in a if seed in b]
    if not pairs:
        raise RunError("--verdict: each seed has its own images here, and two of the rows have no seed in common")
    n, differences = len(pairs), [pair.difference for pair in pairs]
    if n == 1:
        return pairs[0]
    of_images = float(np.mean([pair.of_images for pair in pairs])) * (1 - 1 / n)
    of_pairs, n_images = (float(np.var(differences, ddof=1)), 0.0), min(pair.n_images for pair in pairs)
    return Estimate(float(np.mean(differences)), of_pairs, of_images, (n, n), n_images, gains=pairs[0].gains)


def holm(p_values: Sequence[float]) -> list[float]:
    """Return the p values with Holm's correction: a verdict at 5 % is wrong in at most 5 % of all such lists."""
    order, n = np.argsort(p_values), len(p_values)
    corrected = np.empty(n)
    corrected[order] = np.maximum.accumulate((n - np.arange(n)) * np.asarray(p_values)[order]).clip(max=1)
    return corrected.tolist()


def spent_at(look: int, n_looks: int) -> float:
    """Return the level of one look: the levels of all looks add up to LEVEL, so that all of them together keep it."""
    return LEVEL * (2 * look - 1) / n_looks**2


@dataclass(frozen=True)
class Verdict:
    """Which of two rows is better, or that no difference can be seen."""

    a: Row
    b: Row
    split: str
    metric: str
    estimate: Estimate
    p: float  # with Holm's correction for all pairs
    level: float = LEVEL

    @property
    def is_decided(self) -> bool:
        return self.p <= self.level

    def __str__(self) -> str:
        found, name = self.estimate, f"{self.metric} on {self.split}"
        low, high = (100 * end for end in found.interval(self.level))
        sure = f"{100 * (1 - self.level):.3g} %"
        a, b = self.a.name, self.b.name
        mcnemar = f"; {found.only[0]} images only {a} gets right, {found.only[1]} only {b} (McNemar)" if found.only else ""
        if self.is_decided:
            if found.difference < 0:
                a, b, low, high = b, a, -high, -low
            by = f"{abs(100 * found.difference):.2f} points"
            text = f"{a} is better than {b} by {by} ({sure}: {low:.2f} to {high:.2f}) of {name}"
        else:
            n_a, n_b = found.n_runs
            runs = f"{n_a} seed{'s' if n_a > 1 else ''} each" if n_a == n_b else f"{n_a} and {n_b} seeds"
            text = f"no difference can be seen between {a} and {b} in {name} "
            text += f"({100 * found.difference:+.2f} points, {sure}: {low:.2f} to {high:.2f})"
            text += f"; {runs} could see {100 * found.detectable:.2g} points"
            if (n := found.seeds_to_decide) is not None:
                text += f"; {n - min(found.n_runs)} more seeds would decide if the difference is as large as it seems"
            elif found.has_seeds:
                text += f"; {MOST_SEEDS} seeds would not decide on these images"
        text += mcnemar
        if not found.has_seeds:
            text += "; with one run on a side, the chance of the seeds is unknown, and only that of the images is counted"
        return f"{text} (p {self.p:.2g})"


def judge(rows: Sequence[Row], level: float = LEVEL) -> tuple[list[Row], list[Verdict]]:
    """Return the rows with intervals, and a verdict for each pair: on the test split, or the validation split if some lack it."""
    if len(rows) < 2:
        raise ConfigError("--verdict: give two runs, or two groups of runs that differ in their seed; these are one")
    runs = [run for row in rows for run in row.runs]
    split = "test" if all(run.test is not None for run in runs) else "valid"
    found: dict[Path, SampleScores] = {}
    for run in runs:
        step = run.results.get("best", {}).get("step")
        if step is None:
            raise RunError(f"--verdict: {run.name} is {run.progress} and has no best checkpoint")
        path = samples_path(run.path, split, step)
        try:
            found[run.path] = read_samples(path)
        except OSError as error:
            remedy = f"tools/evaluate.py {run.path} --split {split} adds them"
            raise RunError(f"--verdict: {run.name} has no valid scores of its samples ({path.name}); {remedy}") from error
    scores: list[Scores] = [{run.seed: found[run.path].scores for run in row.runs} for row in rows]
    is_shared = _have_same_data(runs, [*found.values()])

    def compare(a: Scores, b: Scores) -> Estimate:
        return estimate(np.stack([*a.values()]), np.stack([*b.values()])) if is_shared else compare_by_seed(a, b)

    means = [compare(own, {seed: np.zeros_like(one, float) for seed, one in own.items()}).interval() for own in scores]
    rows = [replace(row, interval=(max(0.0, low), min(1.0, high))) for row, (low, high) in zip(rows, means, strict=True)]
    estimates = [compare(a, b) for a, b in itertools.combinations(scores, 2)]
    pairs = zip(itertools.combinations(rows, 2), estimates, holm([one.p for one in estimates]), strict=True)
    return rows, [Verdict(a, b, split, found[runs[0].path].metric, one, p, level) for (a, b), one, p in pairs]


def _have_same_data(runs: Sequence[RunRecord], found: Sequence[SampleScores]) -> bool:
    """Return whether all runs were evaluated on the same images. Raise RunError if runs of the same seed were not."""
    abouts = [{one.split: {**one.data, "images": len(one.scores), "kind of score": one.metric}} for one in found]
    of_seed: dict[int | None, tuple[RunRecord, Any]] = {}
    for run, about in zip(runs, abouts, strict=True):
        first, expected = of_seed.setdefault(run.seed, (run, about))
        if differences := fingerprint_differences(expected, about):
            problem = f"were evaluated on different images or classes: {', '.join(differences)}"
            raise RunError(f"--verdict: {first.name} and {run.name} {problem}")
    return all(about == abouts[0] for about in abouts)
