import pytest
import torch
from scipy.stats import chi2_contingency, chisquare

from datasets.pipeline.order import BalancedOrder, Order


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


class TestBalanced:
    labels = torch.tensor([0] * 70 + [1] * 25 + [3] * 5)[torch.randperm(100, generator=torch.Generator().manual_seed(0))]

    def order(self, **options):
        return BalancedOrder(100, 10, seed=1, labels=self.labels, **options)

    def test_classes_are_equally_frequent(self):
        drawn = self.labels[torch.cat([epoch(self.order(), e) for e in range(20)])]
        counts = drawn.bincount()[[0, 1, 3]]
        assert chisquare(counts.numpy()).pvalue > 0.05

    def test_classes_come_in_random_order(self):
        labels = self.labels[torch.cat([epoch(self.order(), e) for e in range(50)])]
        pairs = torch.zeros(4, 4).index_put_((labels[:-1], labels[1:]), torch.ones(len(labels) - 1), accumulate=True)
        assert chi2_contingency(pairs[[0, 1, 3]][:, [0, 1, 3]].numpy()).pvalue > 0.01

    def test_samples_of_a_class_are_drawn_equally_often_and_none_is_left_out(self):
        drawn = torch.cat([epoch(self.order(), e) for e in range(21)]).bincount(minlength=100)  # 714 of each class
        for label, most_often in ((0, 11), (1, 29), (3, 143)):
            counts = drawn[self.labels == label]
            assert counts.min() >= most_often - 6  # the last draws of each epoch are dropped
            assert counts.max() <= most_often

    def test_it_is_a_function_of_seed_and_epoch_and_of_the_global_batch(self):
        whole = self.order()
        for step in (27, 3):  # a jump, also backwards
            parts = [self.order(rank=rank, world_size=2) for rank in range(2)]
            assert torch.equal(torch.cat([part.samples(step) for part in parts]), whole.samples(step))
            assert torch.equal(torch.cat([part.counters(step) for part in parts]), whole.counters(step))
        assert not torch.equal(epoch(whole, 0), epoch(whole, 1))

    def test_each_draw_of_an_epoch_has_its_own_counter(self):
        order = self.order()
        counters = torch.cat([order.counters(step) for step in range(10)])
        samples = epoch(self.order(), 0)
        assert len(counters.unique()) == 100
        assert len(samples.unique()) < 100
        assert torch.equal(counters % 100, samples)
