"""PSS as a Composer algorithm."""

from __future__ import annotations

import logging
import math
from typing import Any

from composer.core import Algorithm, Event, State
from composer.loggers import Logger
from composer.utils import dist

from pss_composer.progress import Progress, count_batches
from pss_composer.sampling import PatchSampler, Sampler, describe
from pss_composer.schedules import Cyclic, Schedule, check_keep_rate
from pss_composer.surgery import apply_patch_sampling

log = logging.getLogger(__name__)


class PatchSamplingSchedule(Algorithm):
    """Trains a ViT on a varying share of its patch tokens (McDanel & Huynh 2022, https://arxiv.org/abs/2208.09520).

    Runs on `Event.INIT`, where it puts a `PatchSampler` into the model, and on `Event.BATCH_START`, where it sets
    that batch's keep rate; all microbatches of a batch share it. On `Event.BATCH_END` it logs `pss/keep_rate` and
    `pss/tokens`, the tokens of an image that the model's blocks saw (read on `Event.AFTER_FORWARD`). There is nothing
    to save: the keep rate follows from the timestamp alone, so a resumed run goes on where it was, and every rank has
    the same keep rate.

    Args:
        schedule: Keep rate of each batch: one of `pss_composer.schedules`, or a function of a
            `schedules.Progress`. None is the paper's cycle from 0.2 to 1 and back in every epoch.
        sampler: Which tokens stay: `magnitude` (the paper's), `l2_magnitude`, `random`, or a function of the patch
            tokens `(tokens (B, N, C), k) -> keep_indices (B, k)`.
        eval_keep_rate: Keep rate of evaluation and prediction, in (0, 1].

    Raises:
        TypeError: When the trainer starts: a model that is not a supported ViT.
        ValueError: A bad argument; when training starts: a schedule that does not fit the trainer's `max_duration`.

    Example:
        >>> trainer = Trainer(model=model, algorithms=[PatchSamplingSchedule()], ...)
    """

    def __init__(
        self,
        schedule: Schedule | None = None,
        *,
        sampler: str | Sampler = "magnitude",
        eval_keep_rate: float = 1.0,
    ) -> None:
        self.schedule = Cyclic() if schedule is None else schedule
        if not callable(self.schedule):
            raise ValueError(f"schedule must be a schedule or a function of training progress, got {schedule!r}")
        self.sampler = sampler
        self.eval_keep_rate = eval_keep_rate
        PatchSampler(sampler, eval_keep_rate=eval_keep_rate)  # so that a bad argument raises here, not at INIT

    def __repr__(self) -> str:
        return (f"PatchSamplingSchedule(schedule={describe(self.schedule)}, sampler={describe(self.sampler)}, "
                f"eval_keep_rate={self.eval_keep_rate})")

    def match(self, event: Event, state: State) -> bool:
        return event in (Event.INIT, Event.BATCH_START, Event.AFTER_FORWARD, Event.BATCH_END)

    def apply(self, event: Event, state: State, logger: Logger) -> None:
        if event == Event.INIT:
            self._patch_sampler = apply_patch_sampling(
                state.model, sampler=self.sampler, eval_keep_rate=self.eval_keep_rate
            )
            slot = next(name for name, module in state.model.named_modules() if module is self._patch_sampler)
            log.info("Patch sampling in %s: %s", slot, self._patch_sampler)
            logger.log_hyperparameters({"pss/slot": slot, "pss/algorithm": repr(self)})
        elif event == Event.BATCH_START:
            keep_rate = self.schedule(read_progress(state))
            self._patch_sampler.keep_rate = check_keep_rate(keep_rate, "the schedule's result")
        elif event == Event.AFTER_FORWARD:
            # a model may compute its training metrics in another forward pass, in eval mode, before the batch ends
            self._num_tokens = self._patch_sampler.num_tokens
        else:
            metrics: dict[str, Any] = {"pss/keep_rate": self._patch_sampler.keep_rate, "pss/tokens": self._num_tokens}
            # the step at which Composer logs the batch's loss; the timestamp already counts this batch
            logger.log_metrics(metrics, step=int(state.timestamp.batch) - 1)


def read_progress(state: State) -> Progress:
    """Training progress in batches, whatever the unit of `max_duration`.

    Composer's own `state.get_elapsed_duration()` stands still for a whole epoch when `max_duration` is in epochs.

    Raises:
        ValueError: `max_duration` cannot be counted in batches.
    """
    batches_per_epoch = None if state.dataloader_len is None else int(state.dataloader_len)
    batch_size = getattr(state.dataloader, "batch_size", None)
    samples_per_batch = batch_size * dist.get_world_size() if isinstance(batch_size, int) else None
    # training ends with the batch that reaches max_duration
    total_batches = math.ceil(count_batches(state.max_duration.to_timestring(), batches_per_epoch, samples_per_batch))
    return Progress(int(state.timestamp.batch), total_batches, batches_per_epoch, samples_per_batch)
