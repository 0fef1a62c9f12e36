"""Reproducible randomness: what happens to a sample depends on seed, epoch and index, never on the worker."""

from __future__ import annotations

import hashlib
import random
from collections.abc import Iterator
from contextlib import contextmanager

import numpy as np
import torch
from composer import Trainer
from composer.utils import reproducibility
from torch.utils.data import DistributedSampler


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


class EpochSampler(DistributedSampler):
    """A DistributedSampler that yields (epoch, index): how else would a persistent worker know the epoch.

    Composer finds it by its base class and sets its epoch.
    """

    def __iter__(self) -> Iterator[tuple[int, int]]:
        return ((self.epoch, index) for index in super().__iter__())


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
