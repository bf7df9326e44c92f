"""The order of the samples, a function of the seed and the step. A jump to any step needs no state."""

from dataclasses import dataclass, field
from typing import ClassVar

import torch
from torch import Tensor

from datasets.pipeline.counters import derive

ORDER, BALANCED = 1, 9  # separate these uses of the seed from others


@dataclass
class Order:
    """A shuffled order for each epoch, cut into global batches; the last partial one is dropped."""

    n_samples: int
    batch_size: int  # over all ranks together
    seed: int
    rank: int = 0
    world_size: int = 1
    device: torch.device | str = "cpu"
    repeats_samples: ClassVar[bool] = False  # within an epoch

    def __post_init__(self) -> None:
        self.steps_per_epoch = self.n_samples // self.batch_size
        self._epoch = -1
        self._samples = self._counters = torch.empty(0, dtype=torch.int64)

    def epoch(self, step: int) -> int:
        return step // self.steps_per_epoch

    def samples(self, step: int) -> Tensor:
        """Return the indices of this rank's part of the global batch."""
        return self._of_step(step)[0]

    def counters(self, step: int) -> Tensor:
        """Return a number for each of `samples` that no other draw of this epoch has. Random augmentation depends on it."""
        return self._of_step(step)[1]

    def _of_step(self, step: int) -> tuple[Tensor, Tensor]:
        if self._epoch != self.epoch(step):
            self._epoch = self.epoch(step)
            self._samples, self._counters = (drawn.to(self.device) for drawn in self._drawn(self._epoch))
        per_rank = self.batch_size // self.world_size
        first = step % self.steps_per_epoch * self.batch_size + self.rank * per_rank
        return self._samples[first : first + per_rank], self._counters[first : first + per_rank]

    def _drawn(self, epoch: int) -> tuple[Tensor, Tensor]:
        """Return the samples of an epoch and their counters."""
        samples = _permutation(self.n_samples, self.seed, ORDER, epoch)
        return samples, samples


@dataclass
class BalancedOrder(Order):
    """An order in which every class is equally frequent. An epoch has as many samples as without balancing.

    A class goes through its samples in a shuffled order, then in another one, and so on across epochs. So a sample of a class is
    drawn as often as the others, and every sample is drawn in the end, also those of a class that is larger than its share.
    """

    repeats_samples: ClassVar[bool] = True
    labels: Tensor = field(default_factory=lambda: torch.empty(0, dtype=torch.int64))

    def _drawn(self, epoch: int) -> tuple[Tensor, Tensor]:
        classes, counts = self.labels.unique(return_counts=True)
        members = self.labels.argsort(stable=True).split(counts.tolist())
        n_slots = -(-self.n_samples // len(classes))  # for each class
        samples, counters = [], []
        for label, of_class in zip(classes.tolist(), members, strict=True):
            slots = torch.arange(epoch * n_slots, (epoch + 1) * n_slots)
            rounds, places = slots // len(of_class), slots % len(of_class)
            parts = []
            for number in range(int(rounds[0]), int(rounds[-1]) + 1):
                shuffled = of_class[_permutation(len(of_class), self.seed, BALANCED, label, number)]
                parts.append(shuffled[places[rounds == number]])
            drawn = torch.cat(parts)
            samples.append(drawn)
            counters.append(drawn + self.n_samples * (rounds - rounds[0]))
        shuffled = _permutation(n_slots * len(classes), self.seed, ORDER, epoch)[: self.n_samples]
        return torch.cat(samples)[shuffled], torch.cat(counters)[shuffled]


def _permutation(n: int, *counters: int) -> Tensor:
    return torch.randperm(n, generator=torch.Generator().manual_seed(derive(*counters)))
