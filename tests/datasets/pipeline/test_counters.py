import torch

from datasets.pipeline.counters import below, derive, draws


def test_derived_seeds_differ_in_every_counter_and_are_reproducible():
    seeds = {derive(a, b, c) for a in range(10) for b in range(10) for c in range(10)}
    assert len(seeds) == 1000
    assert derive(1, 2) != derive(2, 1)
    assert all(0 <= seed < 2**63 for seed in seeds)
    assert derive(1234, 1, 0) == derive(1234, 1, 0)


def test_a_draw_depends_on_the_sample_not_on_its_position_in_the_batch():
    samples = torch.tensor([5, 17, 3])
    together = draws(1, 2, samples, 4)
    alone = torch.cat([draws(1, 2, sample.view(1), 4) for sample in samples], dim=1)
    assert torch.equal(together, alone)
    assert not torch.equal(together, draws(1, 3, samples, 4))
    assert not torch.equal(together, draws(2, 2, samples, 4))


def test_draws_are_uniform_and_independent():
    bits = draws(7, 3, torch.arange(100_000), 3)
    uniform = bits.double() / 2**31
    assert bits.min() >= 0
    assert bits.max() < 2**31
    assert torch.allclose(uniform.mean(1), torch.full((3,), 0.5, dtype=torch.float64), atol=0.005)
    assert torch.corrcoef(uniform).sub(torch.eye(3)).abs().max() < 0.015
    next_epoch = draws(7, 4, torch.arange(100_000), 1).double()
    assert abs(torch.corrcoef(torch.stack([bits[0].double(), next_epoch[0]]))[0, 1]) < 0.015
    neighbors = torch.stack([uniform[0, :-1], uniform[0, 1:]])
    assert abs(torch.corrcoef(neighbors)[0, 1]) < 0.015


def test_integers_below_n_are_equally_frequent():
    numbers = below(draws(1, 1, torch.arange(90_000), 1)[0], 9)
    counts = numbers.bincount(minlength=9).double()
    assert len(counts) == 9
    assert ((counts - 10_000) ** 2 / 10_000).sum() < 30  # chi squared, 8 degrees of freedom: 99.98 %
