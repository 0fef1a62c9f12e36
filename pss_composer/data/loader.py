"""A DataLoader that passes on the errors of its workers, its sampler, and how a run resumes within an epoch."""

from __future__ import annotations

import logging
import signal
from collections.abc import Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

import torch
from composer.utils import reproducibility
from torch import Tensor
from torch.utils.data import DataLoader, Dataset, DistributedSampler

from pss_composer.errors import InputError, to_line

if TYPE_CHECKING:
    from composer import Trainer

log = logging.getLogger(__name__)


@contextmanager
def reporting_dead_worker() -> Iterator[None]:
    """Turn torch's error about a worker that was killed into an `InputError`.

    torch raises it anywhere in the main process, not only where a batch is requested.
    """
    try:
        yield
    except RuntimeError as error:
        if not str(error).startswith("DataLoader worker"):  # torch has no class for it
            raise
        signal.signal(signal.SIGCHLD, signal.SIG_DFL)  # else torch raises it again with every worker that ends now
        raise InputError(f"must be processes that stay alive, but a {to_line(error)}", key="num_workers") from error


class Loader(DataLoader):
    """torch's DataLoader of what `Collate` makes; it yields images and labels, and counts and logs the bad samples.

    Attributes:
        num_skipped: Bad samples so far, over all epochs.

    Raises:
        InputError: When iterated: the error that came in place of a batch.
    """

    num_skipped = 0
    _failure: InputError | None = None

    def close(self) -> None:
        """End the workers; another pass would start new ones.

        torch waits 5 s for each worker of a loader that is left to the garbage collector.
        """
        if self._iterator is not None:
            self._iterator._shutdown_workers()
            self._iterator = None

    def __iter__(self) -> Iterator[tuple[Tensor, Tensor]]:
        if self._failure is not None:
            raise self._failure
        for batch in super().__iter__():
            if isinstance(batch, InputError):
                self._failure = batch
                raise batch
            images, labels, messages = batch
            self.num_skipped += len(messages)
            for message in messages:
                log.warning("skipped: %s", message)
            yield images, labels


class EpochSampler(DistributedSampler):
    """A DistributedSampler that yields (epoch, index, view): a persistent worker would not know the epoch otherwise.

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
