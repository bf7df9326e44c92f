"""Random numbers from counters: the same (seed, epoch, sample) gives the same numbers, in any order, on any device.

The mixing function is the finalizer of SplitMix64 (Steele, Lea, Flood 2014: Fast Splittable Pseudorandom Number Generators).
"""

import torch
from torch import Tensor

MASK = (1 << 64) - 1
GOLDEN = 0x9E3779B97F4A7C15
MIX_1, MIX_2 = 0xBF58476D1CE4E5B9, 0x94D049BB133111EB


def derive(*counters: int) -> int:
    """Hash several counters to one number of 63 bits, a seed for a generator."""
    state = 0
    for counter in counters:
        state = (state + GOLDEN + counter * MIX_2) & MASK
        state = ((state ^ (state >> 30)) * MIX_1) & MASK
        state = ((state ^ (state >> 27)) * MIX_2) & MASK
        state ^= state >> 31
    return state >> 1


def draws(seed: int, epoch: int, samples: Tensor, n: int) -> Tensor:
    """Draw `n` numbers of 31 bits for each of `samples`, as n x len(samples)."""
    key = _signed(derive(seed, epoch))
    counter = samples * n + torch.arange(n, device=samples.device).unsqueeze(1)
    state = counter * _signed(GOLDEN) + key
    state = (state ^ _shift(state, 30)) * _signed(MIX_1)
    state = (state ^ _shift(state, 27)) * _signed(MIX_2)
    return _shift(state ^ _shift(state, 31), 33)


def below(bits: Tensor, n: int) -> Tensor:
    """Map numbers of 31 bits to integers from 0 to n - 1."""
    return (bits * n) >> 31


def _shift(x: Tensor, by: int) -> Tensor:
    """Shift right logically; torch's own shift is arithmetic."""
    return (x >> by) & ((1 << (64 - by)) - 1)


def _signed(x: int) -> int:
    return x - (1 << 64) if x >= 1 << 63 else x
