"""What patch sampling is in every training loop: its settings, and a model's keep rate that follows training."""

from __future__ import annotations

from typing import Any

from torch import nn
from torch.utils.data import DataLoader, IterableDataset

from pss_composer.progress import Progress
from pss_composer.sampling import PatchSampler, Sampler, resolve_sampler
from pss_composer.schedules import Cyclic, Schedule, check_keep_rate, check_schedule
from pss_composer.surgery import apply_patch_sampling, find_samplers


class ScheduledPatchSampling:
    """Base of the callbacks of all trainers: they say when, this class does what.

    It holds no model and no counter, so one object serves several trainers.
    """

    def __init__(
        self,
        schedule: Schedule | None = None,
        *,
        sampler: str | Sampler = "magnitude",
        eval_keep_rate: float = 1.0,
    ) -> None:
        """Check the settings.

        Args:
            schedule: Keep rate of each batch: one of `pss_composer.schedules`, or a function of a `schedules.Progress`.
                None is the paper's cycle from 0.2 to 1 and back in every epoch.
            sampler: Which tokens stay: `magnitude` (the paper's), `l2_magnitude`, `random`, or a function of the patch
                tokens `(tokens (B, N, C), k) -> keep_indices (B, k)`.
            eval_keep_rate: Keep rate of evaluation and prediction, in (0, 1].

        Raises:
            ValueError: A bad argument.
        """
        self.schedule = Cyclic() if schedule is None else check_schedule(schedule)
        self.sampler = sampler
        self.eval_keep_rate = check_keep_rate(eval_keep_rate, "eval_keep_rate")
        resolve_sampler(sampler)  # a bad one raises here, not when training starts

    def apply_to(self, model: nn.Module) -> PatchSampler:
        """Put a sampler into a model, or set up the one that is there; it keeps all tokens in training at first."""
        return apply_patch_sampling(model, sampler=self.sampler, eval_keep_rate=self.eval_keep_rate)

    def set_keep_rate(self, model: nn.Module, progress: Progress) -> None:
        """Set the keep rate of the next batch."""
        keep_rate = check_keep_rate(self.schedule(progress), "the schedule's result")
        for patch_sampler in find_samplers(model):
            patch_sampler.keep_rate = keep_rate


def read_metrics(model: nn.Module) -> dict[str, float]:
    """What the trainers log of the last forward pass; no tokens if it ran in copies of the model (`DataParallel`)."""
    metrics: dict[str, float] = {}
    for patch_sampler in find_samplers(model):
        metrics["pss/keep_rate"] = patch_sampler.keep_rate
        if patch_sampler.num_tokens is not None:
            metrics["pss/tokens"] = float(patch_sampler.num_tokens)
    return metrics


def count_samples(loader: object, num_batches: int | None, world_size: int) -> tuple[int | None, int | None]:
    """The samples of a full batch and of an epoch on all ranks; None where the loader does not know them.

    Args:
        loader: What training reads on each rank.
        num_batches: Batches of an epoch; None when the data has no length.
        world_size: How many ranks there are.
    """
    batch_size = getattr(loader, "batch_size", None)
    if batch_size is None:
        return None, None
    samples_per_batch = batch_size * world_size
    if not isinstance(loader, DataLoader) or num_batches is None:
        return samples_per_batch, None
    # an iterable dataset's length is the share of one rank
    samples: Any = loader.dataset if isinstance(loader.dataset, IterableDataset) else loader.sampler
    try:
        return samples_per_batch, min(len(samples) * world_size, num_batches * samples_per_batch)
    except TypeError:
        return samples_per_batch, None
