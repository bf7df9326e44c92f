import pytest
import torch

from datasets.pipeline.order import Order


def epoch(order, e):
    return torch.cat([order.samples(step) for step in range(e * order.steps_per_epoch, (e + 1) * order.steps_per_epoch)])


def test_an_epoch_has_every_sample_once_and_drops_the_last_partial_batch():
    order = Order(103, 10, seed=1)
    assert order.steps_per_epoch == 10
    samples = epoch(order, 0)
    assert len(samples) == len(samples.unique()) == 100


def test_the_order_is_a_function_of_seed_and_epoch():
    assert torch.equal(epoch(Order(103, 10, seed=1), 3), epoch(Order(103, 10, seed=1), 3))
    assert not torch.equal(epoch(Order(103, 10, seed=1), 3), epoch(Order(103, 10, seed=1), 4))
    assert not torch.equal(epoch(Order(103, 10, seed=1), 3), epoch(Order(103, 10, seed=2), 3))


def test_a_jump_to_a_step_has_the_same_batch_as_going_through_all_steps():
    walked, jumped = Order(103, 10, seed=1), Order(103, 10, seed=1)
    for step in range(37):
        walked.samples(step)
    assert torch.equal(walked.samples(37), jumped.samples(37))


@pytest.mark.parametrize("world_size", [2, 5])
def test_ranks_share_each_global_batch_without_overlap(world_size):
    whole = Order(103, 10, seed=1)
    parts = [Order(103, 10, seed=1, rank=rank, world_size=world_size) for rank in range(world_size)]
    for step in (0, 7, 25):
        assert torch.equal(torch.cat([part.samples(step) for part in parts]), whole.samples(step))
