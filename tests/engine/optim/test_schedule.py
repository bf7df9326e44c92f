import itertools
from dataclasses import replace
from typing import get_args, get_type_hints

import pytest
import torch
from torch.optim import lr_scheduler

from engine import ConfigError
from engine.config.schema import SchedConfig
from engine.optim.schedule import make_schedule

N = 100


def torch_rates(scheduler, lr=0.1):
    optimizer = torch.optim.SGD([torch.nn.Parameter(torch.zeros(1))], lr=lr)
    scheduler = scheduler(optimizer)
    rates = []
    for _ in range(N):
        rates.append(optimizer.param_groups[0]["lr"])
        optimizer.step()
        scheduler.step()
    return rates


def one_cycle(total, **options):
    return lambda o: lr_scheduler.OneCycleLR(o, 0.1, total, **options)


def our_rates(sched, n=N, steps_per_epoch=10, lr=0.1):
    schedule = make_schedule(sched, n, steps_per_epoch)
    return [schedule(step, lr) for step in range(n)]


@pytest.mark.parametrize(
    ("ours", "theirs"),
    [
        (SchedConfig(eta_min=0.001), lambda o: lr_scheduler.CosineAnnealingLR(o, N, 0.001)),
        (SchedConfig(t_max=150), lambda o: lr_scheduler.CosineAnnealingLR(o, 150)),
        (SchedConfig(t_max=60, eta_min=0.01), lambda o: lr_scheduler.CosineAnnealingLR(o, 60, 0.01)),
        (
            SchedConfig(type="CosineAnnealingWarmRestarts", t_0=30, eta_min=0.002),
            lambda o: lr_scheduler.CosineAnnealingWarmRestarts(o, 30, eta_min=0.002),
        ),
        (
            SchedConfig(type="CosineAnnealingWarmRestarts", t_0=7, t_mult=2),
            lambda o: lr_scheduler.CosineAnnealingWarmRestarts(o, 7, 2),
        ),
        (
            SchedConfig(type="CosineAnnealingWarmRestarts", t_0=1, t_mult=3),
            lambda o: lr_scheduler.CosineAnnealingWarmRestarts(o, 1, 3),
        ),
        (SchedConfig(type="MultiStepLR", milestones=[30, 60], gamma=0.2), lambda o: lr_scheduler.MultiStepLR(o, [30, 60], 0.2)),
        (SchedConfig(type="StepLR", step_size=7, gamma=0.9), lambda o: lr_scheduler.StepLR(o, 7, 0.9)),
        (SchedConfig(type="LinearLR"), lambda o: lr_scheduler.LinearLR(o, 1.0, 0.0, N)),
        (SchedConfig(type="LinearLR", t_max=60, eta_min=0.02), lambda o: lr_scheduler.LinearLR(o, 1.0, 0.2, 60)),
        (SchedConfig(type="PolynomialLR"), lambda o: lr_scheduler.PolynomialLR(o, N)),
        (SchedConfig(type="PolynomialLR", power=0.9), lambda o: lr_scheduler.PolynomialLR(o, N, 0.9)),
        (SchedConfig(type="PolynomialLR", power=2.5, t_max=60), lambda o: lr_scheduler.PolynomialLR(o, 60, 2.5)),
        (SchedConfig(type="OneCycleLR"), one_cycle(N)),
        (
            SchedConfig(type="OneCycleLR", pct_start=0.255, div_factor=10, final_div_factor=3, t_max=150),
            one_cycle(150, pct_start=0.255, div_factor=10, final_div_factor=3),
        ),
        (SchedConfig(type="OneCycleLR", pct_start=0.0), one_cycle(N, pct_start=0.0)),
        (SchedConfig(type="constant"), lambda o: lr_scheduler.ConstantLR(o, 1.0)),
    ],
    ids=[
        "cosine",
        "cosine that goes on",
        "cosine that rises again",
        "restarts",
        "longer and longer restarts",
        "restarts from the first update on",
        "milestones",
        "steps",
        "linear",
        "linear, then flat",
        "polynomial as torch has it",
        "polynomial",
        "polynomial, then flat",
        "one cycle",
        "one cycle that goes on",
        "one cycle without a rise",
        "constant",
    ],
)
@pytest.mark.filterwarnings("ignore:Detected call of")  # torch warns about the order of its own calls
def test_learning_rates_match_the_torch_scheduler(ours, theirs):
    assert our_rates(ours) == pytest.approx(torch_rates(theirs), rel=1e-9, abs=1e-15)


def test_polynomial_schedule_decays_to_eta_min():
    rates = our_rates(SchedConfig(type="PolynomialLR", power=0.9, eta_min=0.01))
    assert rates == pytest.approx([0.01 + 0.09 * (1 - step / N) ** 0.9 for step in range(N)])


def test_one_cycle_reaches_its_final_rate_at_t_max_and_stays_there():
    rates = our_rates(SchedConfig(type="OneCycleLR", t_max=60, div_factor=5, final_div_factor=4))
    assert rates[0] == pytest.approx(0.1 / 5)
    assert max(rates) == rates[17] == pytest.approx(0.1)
    assert rates[59:] == pytest.approx([0.1 / 5 / 4] * 41)


def test_warmup_is_linear_and_the_cosine_spans_the_remaining_steps():
    schedule = make_schedule(SchedConfig(warmup_steps=10, warmup_lr=0.01), N, steps_per_epoch=10)
    rates = [schedule(step, 0.1) for step in range(N)]
    rises = [b - a for a, b in itertools.pairwise(rates[:11])]
    assert rises == pytest.approx([rises[0]] * 10)
    assert rates[10] == pytest.approx(0.1)
    assert rates[55] == pytest.approx(0.05)
    assert rates[0] == pytest.approx(0.01 + 0.09 / 11)


def test_warmup_can_be_given_in_epochs():
    in_epochs = make_schedule(SchedConfig(warmup_epochs=1.5), N, steps_per_epoch=10)
    in_steps = make_schedule(SchedConfig(warmup_steps=15), N, steps_per_epoch=10)
    assert [in_epochs(step, 1.0) for step in range(N)] == [in_steps(step, 1.0) for step in range(N)]


ONE_OF_EACH_TYPE = [
    SchedConfig(eta_min=0.02),
    SchedConfig(type="CosineAnnealingWarmRestarts", t_0=17, t_mult=2),
    SchedConfig(type="MultiStepLR", milestones=[30, 60]),
    SchedConfig(type="StepLR", step_size=20, gamma=0.5),
    SchedConfig(type="LinearLR", eta_min=0.02),
    SchedConfig(type="PolynomialLR", power=0.9, eta_min=0.02),
    SchedConfig(type="OneCycleLR"),
    SchedConfig(type="constant"),
]


def test_one_of_each_type_covers_every_schedule():
    assert {sched.type for sched in ONE_OF_EACH_TYPE} == set(get_args(get_type_hints(SchedConfig)["type"]))


@pytest.mark.parametrize("sched", ONE_OF_EACH_TYPE, ids=lambda sched: sched.type)
def test_cooldown_falls_linearly_from_the_current_rate_to_cooldown_lr(sched):
    without_cooldown = make_schedule(replace(sched, t_max=80), 80, steps_per_epoch=10)
    rates = our_rates(replace(sched, cooldown_steps=20, cooldown_lr=0.001))
    assert rates[:80] == [without_cooldown(step, 0.1) for step in range(80)]
    begin = without_cooldown(80, 0.1)
    assert rates[80:] == pytest.approx([begin + (0.001 - begin) * i / 20 for i in range(20)])


@pytest.mark.parametrize("sched", [s for s in ONE_OF_EACH_TYPE if s.type != "OneCycleLR"], ids=lambda sched: sched.type)
def test_rate_does_not_jump_after_warmup_or_before_cooldown(sched):
    smooth = {"MultiStepLR": {"milestones": [30, 60]}, "StepLR": {"step_size": 75}}.get(sched.type, {})
    rates = our_rates(replace(sched, **smooth, warmup_steps=9, cooldown_steps=20))
    assert rates[:10] == pytest.approx([0.1 * (i + 1) / 10 for i in range(10)])
    assert abs(rates[80] - rates[79]) < 0.005
    assert rates[99] == pytest.approx(rates[80] / 20)


@pytest.mark.parametrize("schedule_type", ["CosineAnnealingLR", "LinearLR", "PolynomialLR"])
def test_finite_schedule_spans_the_steps_between_warmup_and_cooldown(schedule_type):
    whole = make_schedule(SchedConfig(type=schedule_type, eta_min=0.01, power=2), 70, steps_per_epoch=10)
    rates = our_rates(SchedConfig(type=schedule_type, eta_min=0.01, power=2, warmup_steps=10, cooldown_steps=20))
    assert rates[10:81] == pytest.approx([whole(step, 0.1) for step in range(71)])
    assert rates[80] == pytest.approx(0.01)


def test_restarts_are_counted_from_the_end_of_warmup():
    rates = our_rates(SchedConfig(type="CosineAnnealingWarmRestarts", t_0=30, warmup_steps=10))
    assert [step for step in range(N) if rates[step] == 0.1] == [10, 40, 70]


def test_cooldown_can_be_given_in_epochs():
    assert our_rates(SchedConfig(cooldown_epochs=1.5, eta_min=0.05)) == our_rates(SchedConfig(cooldown_steps=15, eta_min=0.05))


def test_short_run_can_end_during_warmup():
    assert our_rates(SchedConfig(warmup_epochs=5), n=20) == our_rates(SchedConfig(warmup_epochs=5))[:20]


@pytest.mark.parametrize(
    ("sched", "names"),
    [
        (SchedConfig(warmup_epochs=5, cooldown_steps=51), ["warmup_epochs: 5", "cooldown_steps 51", "100"]),
        (SchedConfig(cooldown_epochs=11), ["cooldown_epochs: 11", "100"]),
        (SchedConfig(t_max=50, warmup_epochs=5), ["t_max: 50", "warmup_epochs 5"]),
    ],
)
def test_conflict_found_from_the_epoch_length_is_a_one_line_error_with_both_keys(sched, names):
    with pytest.raises(ConfigError) as caught:
        make_schedule(sched, N, steps_per_epoch=10)
    assert "\n" not in str(caught.value)
    assert all(name in str(caught.value) for name in names)
