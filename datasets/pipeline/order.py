"""The order of the samples, a function of the seed and the step. A jump to any step needs no state."""

from dataclasses import dataclass

import torch
from torch import Tensor

from datasets.pipeline.counters import derive

ORDER = 1  # separates this use of the seed from others


@dataclass
class Order:
    """A shuffled order for each epoch, cut into global batches; the last partial one is dropped."""

    n_samples: int
    batch_size: int  # over all ranks together
    seed: int
    rank: int = 0
    world_size: int = 1
    device: torch.device | str = "cpu"

    def __post_init__(self) -> None:
        self.steps_per_epoch = self.n_samples // self.batch_size
        self._epoch = -1
        self._shuffled = torch.empty(0, dtype=torch.int64)

    def epoch(self, step: int) -> int:
        return step // self.steps_per_epoch

    def samples(self, step: int) -> Tensor:
        """Return the indices of this rank's part of the global batch."""
        if self.epoch(step) != self._epoch:
            self._epoch = self.epoch(step)
            generator = torch.Generator().manual_seed(derive(self.seed, ORDER, self._epoch))
            self._shuffled = torch.randperm(self.n_samples, generator=generator).to(self.device)
        per_rank = self.batch_size // self.world_size
        first = step % self.steps_per_epoch * self.batch_size + self.rank * per_rank
        return self._shuffled[first : first + per_rank]
