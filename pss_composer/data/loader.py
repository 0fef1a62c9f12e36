"""A DataLoader that tells in one line what went wrong in a worker, and counts what was skipped."""

from __future__ import annotations

import logging
import signal
from collections.abc import Iterator
from contextlib import contextmanager

from torch import Tensor
from torch.utils.data import DataLoader

from pss_composer.errors import InputError, to_line

log = logging.getLogger(__name__)


@contextmanager
def name_dead_worker() -> Iterator[None]:
    """Turns torch's error about a worker that was killed into an `InputError`.

    torch raises it wherever the main process is when it hears of it, not only where a batch is asked for.
    """
    try:
        yield
    except RuntimeError as error:
        if not str(error).startswith("DataLoader worker"):
            raise
        signal.signal(signal.SIGCHLD, signal.SIG_DFL)  # else torch raises it again with every worker that ends now
        raise InputError(f"data.num_workers must be processes that stay alive, but a {to_line(error)}") from error


class Loader(DataLoader):
    """torch's DataLoader of what `Collate` makes; it yields images and labels, and counts and logs the bad samples.

    Attributes:
        num_skipped: Bad samples so far, over all epochs.

    Raises:
        InputError: When iterated: a sample or shard is broken, in the worker's own words.
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
            raise self._failure  # the other workers would wait for the one that has failed
        try:
            for images, labels, messages in super().__iter__():
                self.num_skipped += len(messages)
                for message in messages:
                    log.warning("skipped: %s", message)
                yield images, labels
        except InputError as error:
            # torch puts the worker's traceback into the message, which ends with that of the error itself
            message = str(error).rpartition(f"{type(error).__name__}: ")[2].strip()
            self._failure = type(error)(message)
            raise self._failure from error
