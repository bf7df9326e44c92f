import itertools

import pytest
import torch

from engine.schedule import make_schedule
from engine.schema import SchedConfig

N = 100


def of_torch(scheduler, lr=0.1):
    optimizer = torch.optim.SGD([torch.nn.Parameter(torch.zeros(1))], lr=lr)
    scheduler = scheduler(optimizer)
    rates = []
    for _ in range(N):
        rates.append(optimizer.param_groups[0]["lr"])
        optimizer.step()
        scheduler.step()
    return rates


@pytest.mark.parametrize(
    ("ours", "theirs"),
    [
        (SchedConfig(eta_min=0.001), lambda o: torch.optim.lr_scheduler.CosineAnnealingLR(o, N, 0.001)),
        (SchedConfig(t_max=150), lambda o: torch.optim.lr_scheduler.CosineAnnealingLR(o, 150)),
        (
            SchedConfig(type="MultiStepLR", milestones=[30, 60], gamma=0.2),
            lambda o: torch.optim.lr_scheduler.MultiStepLR(o, [30, 60], 0.2),
        ),
        (SchedConfig(type="StepLR", step_size=7, gamma=0.9), lambda o: torch.optim.lr_scheduler.StepLR(o, 7, 0.9)),
        (SchedConfig(type="constant"), lambda o: torch.optim.lr_scheduler.ConstantLR(o, 1.0)),
    ],
    ids=["cosine", "cosine that goes on", "milestones", "steps", "constant"],
)
def test_every_update_has_the_rate_that_torchs_scheduler_gives_it(ours, theirs):
    schedule = make_schedule(ours, N, steps_per_epoch=10)
    assert [schedule(step, 0.1) for step in range(N)] == pytest.approx(of_torch(theirs), rel=1e-9)


def test_a_warm_up_rises_linearly_and_the_cosine_then_takes_what_is_left():
    schedule = make_schedule(SchedConfig(warmup_steps=10, warmup_lr=0.01), N, steps_per_epoch=10)
    rates = [schedule(step, 0.1) for step in range(N)]
    rises = [b - a for a, b in itertools.pairwise(rates[:11])]
    assert rises == pytest.approx([rises[0]] * 10)
    assert rates[10] == pytest.approx(0.1)
    assert rates[55] == pytest.approx(0.05)
    assert rates[0] == pytest.approx(0.01 + 0.09 / 11)


def test_a_warm_up_may_be_given_in_epochs():
    in_epochs = make_schedule(SchedConfig(warmup_epochs=1.5), N, steps_per_epoch=10)
    in_steps = make_schedule(SchedConfig(warmup_steps=15), N, steps_per_epoch=10)
    assert [in_epochs(step, 1.0) for step in range(N)] == [in_steps(step, 1.0) for step in range(N)]
