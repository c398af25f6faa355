"""Random numbers that belong to a sample and not to a process, worker, batch or step."""

from enum import IntEnum

import numpy as np
import torch


class Stream(IntEnum):
    """What numbers are drawn for; streams are independent. The numbers are part of every run: never renumber."""

    NOISE = 0
    TIMESTEP = 1
    CROP = 2
    CAPTION_DROPOUT = 3
    ORDER = 4


def stream_seed(*key: int) -> int:
    """A seed that mixes all the bits of its key, of numbers that are not negative."""
    return int(np.random.SeedSequence(key).generate_state(1, np.uint64)[0])


def sample_generator(seed: int, epoch: int, index: int, stream: Stream) -> torch.Generator:
    """
    The generator of one kind of random numbers for one sample in one epoch.

    Args:
        seed (`int`): Of the run, not negative.
        epoch (`int`): From 0.
        index (`int`): Of the sample in its source.
        stream ([`Stream`]): What is drawn.

    Returns:
        `torch.Generator`: On the CPU, at its start.
    """
    return torch.Generator().manual_seed(stream_seed(seed, epoch, index, stream))
