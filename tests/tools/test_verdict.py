"""Verdicts: the statistics against scipy and simulations, and compare.py --verdict on runs."""

import json
import re
import shutil
from dataclasses import replace

import numpy as np
import pytest
from scipy import stats

import tools.compare
from engine import load_config
from engine.config import yaml12
from engine.config.command_line import run_tool
from engine.config.schema import to_dict
from engine.run.samples import SampleScores, read_samples, write_samples
from tests.running import ROOT, run_main
from tools.compare import main
from tools.comparison.verdict import LEVEL, POWER, Estimate, compare_by_seed, estimate, holm, spent_at

DIGITS = ROOT / "configs" / "lenet_digits.yaml"


def compare(*argv, code=0):
    assert run_tool(lambda: main([str(word) for word in argv])) == code


# The estimate


def test_with_images_that_all_runs_score_alike_the_interval_is_welchs():
    random = np.random.default_rng(0)
    a, b = (np.repeat(random.normal(size=(n, 1)), 50, axis=1) for n in (3, 6))
    found, expected = estimate(a, b), stats.ttest_ind(a[:, 0], b[:, 0], equal_var=False)
    assert found.p == pytest.approx(expected.pvalue, rel=1e-9)
    assert found.interval() == pytest.approx(tuple(expected.confidence_interval(1 - LEVEL)), rel=1e-9)


def test_one_run_each_is_the_paired_test_over_images():
    random = np.random.default_rng(1)
    a, b = random.random((1, 40)), random.random((1, 40))
    found, expected = estimate(a, b), stats.ttest_rel(a[0], b[0])
    assert not found.has_seeds
    assert found.p == pytest.approx(expected.pvalue, rel=1e-9)
    assert found.interval() == pytest.approx(tuple(expected.confidence_interval(1 - LEVEL)), rel=1e-9)


def test_one_run_each_of_rights_and_wrongs_is_mcnemars_exact_test():
    a, b = np.zeros((2, 1, 100), bool)
    a[0, :60], b[0, 52:67] = True, True
    found = estimate(a, b)
    assert found.only == (52, 7)
    assert found.p == pytest.approx(stats.binomtest(7, 59).pvalue)
    assert estimate(a, a).p == 1


def test_the_variance_is_unbiased_whatever_causes_it():
    random, differences, variances = np.random.default_rng(2), [], []
    for _ in range(2000):
        own = 0.2 * random.normal(size=(2, 1, 60))
        a, b = (side + 0.05 * random.normal(size=(3, 1)) + 0.3 * random.normal(size=(3, 60)) for side in own)
        found = estimate(a, b)
        differences.append(found.difference)
        variances.append(found.error_and_degrees[0] ** 2)
    assert np.mean(variances) == pytest.approx(np.var(differences), rel=0.1)


def test_equal_scores_are_no_difference():
    a = np.random.default_rng(0).random((3, 20)) < 0.5
    same = estimate(a, a.copy())
    assert same.difference == 0
    assert same.p == 1
    certain = estimate(np.ones((3, 20), bool), np.ones((2, 20), bool))
    assert (certain.p, certain.interval(), certain.detectable) == (1, (0, 0), 0)


def test_images_of_each_seed_alone_are_compared_in_pairs():
    random = np.random.default_rng(3)
    a, b = ([random.random(n) for n in (400, 300, 500)] for _ in range(2))
    found = compare_by_seed(dict(enumerate(a)), dict(enumerate(b)))
    gains = [x.mean() - y.mean() for x, y in zip(a, b, strict=True)]
    assert found.difference == pytest.approx(np.mean(gains))
    error, _ = found.error_and_degrees
    assert error > stats.sem(gains)
    assert compare_by_seed({0: a[0]}, {0: b[0], 1: b[1]}).p == pytest.approx(stats.ttest_rel(a[0], b[0]).pvalue)


def test_missing_scores_are_no_images():
    random = np.random.default_rng(4)
    a, b = random.random((2, 2, 50))
    with_gap = [np.append(scores, np.nan) for scores in a], [np.append(scores, 0.5) for scores in b]
    assert compare_by_seed(*(dict(enumerate(side)) for side in with_gap)).difference == pytest.approx(
        compare_by_seed(dict(enumerate(a)), dict(enumerate(b))).difference
    )


def test_the_detectable_difference_is_seen_with_the_promised_power():
    plan = Estimate(0.0, (0.01**2, 0.01**2), 0.004**2, (4, 4), 5000)
    error, degrees = plan.error_and_degrees
    found = stats.nct.sf(stats.t.isf(LEVEL / 2, degrees), degrees, plan.detectable / error)
    assert found == pytest.approx(POWER, abs=1e-6)


def test_more_seeds_decide_if_the_images_allow_it():
    unclear = Estimate(0.01, (0.01**2, 0.01**2), 0.001**2, (3, 3), 5000)
    n = unclear.seeds_to_decide
    assert n > 3
    assert replace(unclear, n_runs=(n, n)).detectable <= 0.01 < replace(unclear, n_runs=(n - 1, n - 1)).detectable
    assert replace(unclear, of_images=0.01**2).seeds_to_decide is None
    assert replace(unclear, n_runs=(1, 1), of_runs=(0.0, 0.0)).seeds_to_decide is None


@pytest.mark.parametrize(
    ("p_values", "expected"),
    [((0.01, 0.04, 0.03), (0.03, 0.06, 0.06)), ((0.5,), (0.5,)), ((0.9, 0.8), (1, 1)), ((0.02, 0.001), (0.02, 0.002))],
)
def test_holms_correction(p_values, expected):
    assert holm(p_values) == pytest.approx(expected)


def test_all_looks_together_spend_the_level():
    assert sum(spent_at(look, 7) for look in range(1, 8)) == pytest.approx(LEVEL)


# The command


@pytest.fixture(scope="module")
def groups(tmp_path_factory):
    """Runs `a` and `b` of two seeds each, on the same images, whose scores are made up: `a` is better by far."""
    folder = tmp_path_factory.mktemp("groups")
    assert run_main("-e", folder / "a-seed-1", "--train.n_steps", 1, "--data.name", "shapes", "--data.n_train", 64, *SHAPES) == 0
    random = np.random.default_rng(0)
    (path,) = (folder / "a-seed-1" / "samples").iterdir()
    written, config = read_samples(path), (folder / "a-seed-1" / "config.yaml").read_text()
    easy = random.random(len(written.scores)) < 0.5
    for name, seed, chance in (("b", 1, 0.1), ("b", 2, 0.12), ("a", 2, 0.9), ("a", 1, 0.92)):
        run = folder / f"{name}-seed-{seed}"
        if not run.exists():
            shutil.copytree(folder / "a-seed-1", run, symlinks=True)
        changed = re.sub(r"^seed: .*", f"seed: {seed}", config, flags=re.M).replace("momentum: 0.9", f"momentum: 0.{ord(name)}")
        (run / "config.yaml").write_text(changed)
        right = easy | (random.random(len(easy)) < chance)
        write_samples(run, replace(written, scores=right))
    return folder


SHAPES = ("--data.n_test", 200, "--data.img_size", 32, "--train.batch_size", 32, "--train.optim.type", "SGD")


def test_the_verdict_says_who_is_better_and_by_how_much(groups, tmp_path, capsys):
    compare("--verdict", groups, "--csv", tmp_path / "table.csv", "--markdown", tmp_path / "table.md")
    out = capsys.readouterr().out
    (found,) = re.findall(r"^a is better than b by ([\d.]+) points \(95 %: ([\d.]+) to ([\d.]+)\) of acc@1 on valid", out, re.M)
    difference, low, high = map(float, found)
    assert 20 < low < 35 < difference < 50 < high < 70
    assert "95 % interval" in out
    assert "a is better than b" in (tmp_path / "table.md").read_text()
    assert "interval_low" in (tmp_path / "table.csv").read_text().splitlines()[0]


def test_the_order_of_the_runs_does_not_change_the_verdict(groups, capsys):
    words = [groups / f"{name}-seed-{seed}" for name in "ba" for seed in (1, 2)]
    compare("--verdict", *words)
    assert "a is better than b" in capsys.readouterr().out


def test_single_runs_are_judged_on_their_images_alone(groups, capsys):
    compare("--verdict", groups / "a-seed-1", groups / "b-seed-1")
    out = capsys.readouterr().out
    assert "a-seed-1 is better than b-seed-1" in out
    assert "McNemar" in out
    assert "the chance of the seeds is unknown" in out


def test_a_difference_that_is_too_small_comes_with_what_could_be_seen(groups, tmp_path, capsys):
    shutil.copytree(groups, copied := tmp_path / "groups", symlinks=True)
    for seed in (1, 2):
        (path,) = (copied / f"a-seed-{seed}" / "samples").iterdir()
        shutil.copy(path, copied / f"b-seed-{3 - seed}" / "samples")
    compare("--verdict", copied)
    out = capsys.readouterr().out
    assert "no difference can be seen between a and b" in out
    assert re.search(r"2 seeds each could see [\d.]+ points", out)


def test_the_page_shows_which_images_only_one_gets_right(groups, tmp_path, capsys):
    pytest.importorskip("bokeh")
    compare("--verdict", groups, "--html", tmp_path / "page.html", "--mistakes", 3)
    page = (tmp_path / "page.html").read_text()
    section = page[page.index('<section id="verdicts">') : page.index('<section id="mistakes">')]
    assert "a is better than b" in section
    assert "where a is better" in section
    assert 3 <= section.count("data:image/png") <= 6


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ("samples", "has no valid scores of its samples.*tools/evaluate.py .*b-seed-2 --split valid adds them"),
        ("pixels", "were evaluated on different images or classes: valid: other pixels"),
        ("metric", "other kind of score"),
        ("damage", "has no valid scores of its samples"),
        ("results", "has no best checkpoint"),
    ],
)
def test_what_cannot_be_compared_is_named(change, message, groups, tmp_path, capsys):
    shutil.copytree(groups, copied := tmp_path / "groups", symlinks=True)
    run = copied / "b-seed-2"
    (path,) = (run / "samples").iterdir()
    found = read_samples(path)
    if change == "samples":
        path.unlink()
    elif change == "damage":
        path.write_bytes(b"PK")
    elif change == "results":
        (run / "results.json").write_text(json.dumps({"status": "failed", "why": "it diverged", "best": {"step": None}}))
    else:
        changed = {"metric": "image IoU"} if change == "metric" else {"data": {**found.data, "pixels": "other"}}
        write_samples(run, replace(found, **changed))
    compare("--verdict", copied, code=1)
    assert re.search(message, capsys.readouterr().err)


def test_images_that_depend_on_the_seed_need_the_same_seeds(groups, tmp_path, capsys):
    shutil.copytree(groups, copied := tmp_path / "groups", symlinks=True)
    for name in "ab":
        (path,) = (copied / f"{name}-seed-2" / "samples").iterdir()
        found = read_samples(path)
        write_samples(path.parent.parent, replace(found, data={**found.data, "pixels": "other"}))
    compare("--verdict", copied)
    assert re.search("a is better than b|no difference can be seen", capsys.readouterr().out)
    compare("--verdict", copied / "a-seed-1", copied / "b-seed-2", code=1)
    assert "no seed in common" in capsys.readouterr().err


def test_one_row_has_nothing_to_be_compared_with(groups, capsys):
    compare("--verdict", groups / "a-seed-1", groups / "a-seed-2", code=2)
    assert "these are one" in capsys.readouterr().err
    compare("--verdict", "--diff", groups / "a-seed-1", groups / "a-seed-2", code=2)


# Until decided


@pytest.fixture
def made_up(groups, tmp_path, monkeypatch):
    """Configs a and b, whose trainings are copies of a run with made-up scores: argv, the gain of a, and what was trained."""
    gap, trained = [0.0], []

    def train_all(variants, slots, plugins):
        for variant in variants:
            shutil.copytree(groups / "a-seed-1", variant.folder, symlinks=True)
            values = to_dict(load_config(variant.config, {**variant.overrides, "train.precision": "fp32"}))
            (variant.folder / "config.yaml").write_text(yaml12.dump(values))
            random = np.random.default_rng([variant.overrides["seed"], variant.name.startswith("a")])
            chance = 0.7 + gap[0] * variant.name.startswith("a") + 0.02 * random.normal()
            write_samples(variant.folder, SampleScores("valid", 1, "acc@1", random.random(3000) < chance, {"images": 3000}))
            trained.append(variant.name)
        return 0, {}

    monkeypatch.setattr("tools.compare.train_all", train_all)
    for name in ("a", "b"):
        lr = {"a": 0.01, "b": 0.02}[name]
        (tmp_path / f"{name}.yaml").write_text(DIGITS.read_text().replace("lr: 0.01", f"lr: {lr}"))
    argv = ("--train", tmp_path / "a.yaml", tmp_path / "b.yaml", "--until-decided", "-o", tmp_path / "out")
    return argv, gap, trained


def test_a_clear_difference_needs_few_seeds(made_up, capsys):
    argv, gap, trained = made_up
    gap[0] = 0.2
    compare(*argv)
    assert 4 <= len(trained) < 12
    assert len(set(trained)) == len(trained)
    assert "a is better than b" in capsys.readouterr().out.splitlines()[-1]


def test_without_a_difference_it_ends_at_the_last_seed(made_up, capsys):
    argv, _, trained = made_up
    compare(*argv, "--max-seeds", 3)
    assert sorted(trained) == [f"{name}-seed-{seed}" for name in "ab" for seed in (1, 2, 3)]
    assert "3 seeds of each don't decide all pairs" in capsys.readouterr().out


def test_a_failed_training_is_named_and_nothing_is_judged(made_up, monkeypatch, capsys):
    argv, _, _ = made_up
    train_all = tools.compare.train_all

    def one_fails(variants, *rest):
        train_all([variant for variant in variants if variant.name != "b-seed-2"], *rest)
        return 0, {"b-seed-2": "failed: out of memory"}

    monkeypatch.setattr("tools.compare.train_all", one_fails)
    compare(*argv, code=1)
    printed = capsys.readouterr()
    assert "1 of 4 variants are not complete: b-seed-2 failed: out of memory" in printed.err
    assert "difference" not in printed.out


def test_looking_often_decides_between_equals_in_few_cases():
    random, n_looks, wrong = np.random.default_rng(0), 4, 0
    for _ in range(400):
        a, b = (random.normal(size=(n_looks + 1, 1)) + random.normal(size=(n_looks + 1, 30)) for _ in range(2))
        looks = range(1, n_looks + 1)
        wrong += any(estimate(a[: look + 1], b[: look + 1]).p <= spent_at(look, n_looks) for look in looks)
    assert wrong / 400 <= LEVEL + 2 * (LEVEL * (1 - LEVEL) / 400) ** 0.5


@pytest.mark.parametrize(
    ("argv", "message"),
    [
        (("--until-decided",), "give two configs or models"),
        (("--until-decided", "--seeds", "1,2"), "chooses the seeds itself"),
        (("--until-decided", "--max-seeds", "1"), "at least 2"),
        (("--max-seeds", "4"), "is for --until-decided"),
    ],
)
def test_options_that_do_not_fit_together(argv, message, tmp_path, capsys):
    compare("--train", DIGITS, "-o", tmp_path, *argv, code=2)
    assert message in capsys.readouterr().err
