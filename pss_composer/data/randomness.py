"""Reproducible randomness: what happens to a sample depends on seed, epoch and index, never on the worker."""

from __future__ import annotations

import hashlib
import random
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import numpy as np
import torch
from composer import Trainer
from composer.utils import reproducibility
from torch.utils.data import Dataset, DistributedSampler


def derive_seed(*parts: int | str) -> int:
    """A seed in [0, 2**63) for these parts, the same in every process and unlike that of its neighbours."""
    digest = hashlib.blake2b("/".join(map(str, parts)).encode(), digest_size=8).digest()
    return int.from_bytes(digest, "big") >> 1


@contextmanager
def seeded(seed: int) -> Iterator[None]:
    """Seed Python's, NumPy's and torch's CPU generators inside the block, and put them back afterwards.

    timm's transforms draw from all three. Putting them back keeps a data loader without workers, which runs
    in the main process, from disturbing the generators that training draws from.

    Args:
        seed: In [0, 2**64).
    """
    python_state, numpy_state = random.getstate(), np.random.get_state()
    torch_state = torch.default_generator.get_state()
    random.seed(seed)
    np.random.seed(seed % 2**32)
    torch.default_generator.manual_seed(seed)  # torch.manual_seed would reseed the GPU's generators, too
    try:
        yield
    finally:
        random.setstate(python_state)
        np.random.set_state(numpy_state)
        torch.default_generator.set_state(torch_state)


@contextmanager
def seeded_python(seed: int) -> Iterator[None]:
    """The same for Python's generator alone, which takes a tenth of the time.

    Args:
        seed: At least 0.
    """
    state = random.getstate()
    random.seed(seed)
    try:
        yield
    finally:
        random.setstate(state)


class EpochSampler(DistributedSampler):
    """A DistributedSampler that yields (epoch, index, view): how else would a persistent worker know the epoch.

    Composer finds it by its base class and sets its epoch.

    Args:
        dataset: With a length.
        repeats: Views of each image that is drawn; one after the other, and so on several devices where there are
            several. An epoch is as long as with one.
        **options: Of DistributedSampler.
    """

    def __init__(self, dataset: Dataset, *, repeats: int = 1, **options: Any) -> None:
        super().__init__(dataset, **options)
        self.repeats = repeats

    def __iter__(self) -> Iterator[tuple[int, int, int]]:
        order = torch.arange(len(self.dataset))
        if self.shuffle:
            order = torch.randperm(len(order), generator=torch.Generator().manual_seed(self.seed + self.epoch))
        for place in range(self.rank, self.total_size, self.num_replicas):
            # where the devices cannot share evenly, some see an image of the beginning again
            yield self.epoch, int(order[place // self.repeats % len(order)]), place % self.repeats


def restore_generators(trainer: Trainer) -> None:
    """Restore the random generators of a resumed run where Composer 0.32 leaves it out; call it before `fit`.

    Composer restores them at the start of an epoch, or while it spins past the batches already seen. A
    StreamingDataset finds its place without spinning, so within an epoch the state would stay unused, and
    everything random in the model would run differently than without the stop.

    Args:
        trainer: A Trainer that may have loaded a checkpoint; any other is left alone.
    """
    state = trainer.state
    is_unspun = "train" in state.dataset_resumption and state.timestamp.batch_in_epoch.value > 0
    if is_unspun and trainer._rng_state is not None:
        reproducibility.load_rng_state(trainer._rng_state)
        trainer._rng_state = None
