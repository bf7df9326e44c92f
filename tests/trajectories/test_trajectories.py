"""Training computes what it computed before: the same bits on the same machine, the same curves within a band elsewhere."""

import pytest
import torch

from tests.trajectories import record
from tests.trajectories.bugs import BUGS
from tests.trajectories.curves import deviations, excess, fingerprint, first_outside, rounding_noise, train_curve, widest
from tests.trajectories.recipes import RECIPES

SLOW = ("segmentation", "detection")
ALL = [pytest.param(name, marks=pytest.mark.slow) if name in SLOW else name for name in RECIPES]
HINT = "if that is meant, `make trajectories` records the curves anew"


@pytest.mark.parametrize("name", ALL)
def test_the_first_hundred_updates_are_the_recorded_ones(name, tmp_path):
    recorded = record.read(name)
    curve = train_curve(name, tmp_path)
    outside = first_outside(curve, recorded["curve"], recorded["band"])
    assert outside is None, f"{name} leaves its band at {outside}; {HINT}"
    if record.read("machine") == fingerprint():
        assert curve == recorded["curve"], f"{name} is inside its band, but not bit for bit the same; {HINT}"


@pytest.mark.parametrize("name", RECIPES)
def test_a_reason_for_each_recorded_curve_is_in_the_changelog(name):
    assert record.is_in_changelog(record.read(name)["why"])


@pytest.mark.slow
@pytest.mark.parametrize("bug", BUGS)
def test_a_planted_bug_is_found_by_the_band(bug, tmp_path):
    plant, name = BUGS[bug]
    recorded = record.read(name)
    with plant():
        curve = train_curve(name, tmp_path)
    assert first_outside(curve, recorded["curve"], recorded["band"]) is not None


def test_rounding_noise_stays_inside_the_band_and_is_not_exact(tmp_path):
    recorded = record.read("sam")
    curve = train_curve("sam", tmp_path, noise=1000)
    assert first_outside(curve, recorded["curve"], recorded["band"]) is None
    assert curve != recorded["curve"]


def test_the_band_is_the_largest_deviation_ahead_times_the_margin():
    machines = [{"loss": [0.0] * 30 + [1e-4] * 70}, {"loss": [0.0] * 60 + [1e-3] * 40}]
    (band,) = widest(machines).values()
    assert [band[i] for i in (0, 4, 5, 34, 35, 99)] == [1e-5, 1e-5, 8e-4, 8e-4, 8e-3, 8e-3]


def test_a_curve_outside_of_the_band_is_found_where_it_leaves():
    recorded, band = {"loss": [2.0] * 100, "valid/loss": [1.0] * 10}, {"loss": [1e-3] * 100, "valid/loss": [1e-4] * 10}
    curve = {"loss": [2.0] * 100, "valid/loss": [1.0] * 4 + [1.001] + [1.0] * 5}
    assert first_outside(curve, recorded, band) == "update 50, valid/loss"
    assert excess(curve, recorded, band) == pytest.approx(10)
    assert first_outside({**curve, "valid/loss": [float("nan")] * 10}, recorded, band) == "update 10, valid/loss"
    with pytest.raises(AssertionError, match="values instead of"):
        deviations({"loss": [2.0] * 99}, {"loss": [2.0] * 100})


def test_a_changed_curve_needs_a_line_of_the_changelog(tmp_path, monkeypatch):
    monkeypatch.setattr(record, "CHANGELOG", tmp_path / "CHANGELOG.md")
    record.CHANGELOG.write_text("- SGD's momentum is\n  restored.\n")
    assert record.is_in_changelog("SGD's momentum is restored.")
    assert not record.is_in_changelog("")
    assert not record.is_in_changelog("The momentum of Adam")


def test_the_table_of_differences_names_the_curves_that_need_a_reason():
    recorded = {"curve": {"loss": [1.0], "grad_norm": [1.0]}, "band": {"loss": [1e-3], "grad_norm": [1e-3]}}
    assert record.compare("lenet", {"loss": [1.0005], "grad_norm": [1.0]}, recorded) == (
        "| lenet | 5.0e-04 | 0 | 0 | 50% |",
        False,
    )
    assert record.compare("lenet", {"loss": [1.0], "grad_norm": [1.1]}, recorded)[1]
    assert record.compare("lenet", {"loss": [1.0]}, recorded)[1]
    assert record.compare("new", {"loss": [1.0]}, None)[1]


def test_rounding_noise_changes_weights_by_the_last_bit():
    from engine import build as builder
    from engine import load_config

    config = load_config()
    plain = builder.blank_model(config, "0123456789")
    with rounding_noise(0):
        noisy = builder.blank_model(config, "0123456789")
    pairs = list(zip(plain.parameters(), noisy.parameters(), strict=True))
    assert any(not torch.equal(a, b) for a, b in pairs)
    for a, b in pairs:
        torch.testing.assert_close(a, b, rtol=2.0**-22, atol=0)
