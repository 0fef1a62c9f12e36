"""Where a step's time goes: waiting for data, or computing."""

from __future__ import annotations

import time
from collections import deque

from composer.core import Callback, State
from composer.loggers import Logger
from composer.utils import dist

WINDOW = 50  # steps
MIN_SHARE = 0.1  # of the time; a run that waits longer is reported as limited by its loader


class DataWaitMonitor(Callback):
    """Logs where the time of each step goes, and reports once if the loader limits the run.

    It logs three numbers in every batch. `loader/wait_s` is how many seconds the step waited for its batch.
    `loader/compute_s` is the seconds from there to the end of the step. `loader/skipped` is the number of bad samples
    that the loader has left out so far, if it counts them. Composer reads the loss at the end of every step. A GPU has
    then finished its work, so it is idle while the step waits for the loader.

    Rank 0 prints the report when waiting has taken a tenth or more of the last `WINDOW` steps. The first step of an
    epoch or of a resumed run, in which workers start, does not count.
    """

    def __init__(self) -> None:
        self._steps: deque[tuple[float, float]] = deque(maxlen=WINDOW)
        self._asked = self._received = 0.0
        self._epoch = -1  # of the last step
        self._has_reported = False

    def before_dataloader(self, state: State, logger: Logger) -> None:
        self._asked = time.perf_counter()

    def after_dataloader(self, state: State, logger: Logger) -> None:
        self._received = time.perf_counter()

    def batch_end(self, state: State, logger: Logger) -> None:
        wait, compute = self._received - self._asked, time.perf_counter() - self._received
        metrics = {"loader/wait_s": wait, "loader/compute_s": compute}
        num_skipped = getattr(state.dataloader, "num_skipped", None)
        if num_skipped is not None:
            metrics["loader/skipped"] = num_skipped
        logger.log_metrics(metrics)
        if state.timestamp.epoch == self._epoch:
            self._steps.append((wait, compute))
        self._epoch = int(state.timestamp.epoch)
        if len(self._steps) == WINDOW and not self._has_reported:
            self._report(state)

    def _report(self, state: State) -> None:
        wait, compute = (sum(seconds) / WINDOW for seconds in zip(*self._steps, strict=True))
        share = wait / (wait + compute)
        if share < MIN_SHARE:
            return
        self._has_reported = True
        if dist.get_global_rank() == 0:
            num_workers = getattr(state.dataloader, "num_workers", 0)
            print(
                f"The data loader limits this run: over the last {WINDOW} steps, a step waited {wait:.3f} s for data "
                f"and computed for {compute:.3f} s; without the waiting, {share:.0%} of the time, it would be "
                f"{(wait + compute) / compute:.2f} times as fast. More workers (data.num_workers, now {num_workers}) "
                "or smaller pictures (convert --shortest-side 256) may help.",
                flush=True,
            )
