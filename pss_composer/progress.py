"""Training progress, counted in batches."""

from __future__ import annotations

from collections.abc import Sequence

from composer.core import Time, TimeUnit

UNITS = ("ep", "ba", "sp", "dur")


def check_time(time: str, name: str, units: Sequence[str] = UNITS, *, is_zero_allowed: bool = False) -> None:
    """Check a time string that a user gave.

    Args:
        time: A Composer time string like `1ep`.
        name: The argument's or key's name, for the message.
        units: Units that it may be in.
        is_zero_allowed: Whether it may be of no length.

    Raises:
        ValueError: It is none, is in another unit, or is too short.
    """
    try:
        duration = Time.from_timestring(time)
        is_valid = duration.unit.value in units and (duration.value > 0 or (is_zero_allowed and duration.value == 0))
    except (ValueError, TypeError):
        is_valid = False
    if not is_valid:
        minimum = "of at least 0" if is_zero_allowed else "above 0"
        raise ValueError(f"{name} must be a time string {minimum} in {', '.join(units)} (like '1ep'), got {time!r}")


class Progress(float):
    """The share of training that is done, in [0, 1]: a float that also knows its batches.

    A schedule of one's own may be as short as `lambda progress: 0.2 + 0.8 * progress`.

    Args:
        batch: Batches trained so far, counted from the start of training.
        total_batches: Batches in the whole of training.
        batches_per_epoch: Batches in one epoch; None when the data has no length.
        samples_per_batch: Samples in one (global) batch; None when not known.
    """

    def __new__(
        cls,
        batch: int,
        total_batches: int,
        batches_per_epoch: int | None = None,
        samples_per_batch: int | None = None,
    ) -> Progress:
        # a ragged last batch may make training longer than total_batches by one
        progress = super().__new__(cls, min(batch / total_batches, 1.0))
        progress.batch = batch
        progress.total_batches = total_batches
        progress.batches_per_epoch = batches_per_epoch
        progress.samples_per_batch = samples_per_batch
        return progress

    def num_batches(self, time: str | Time) -> float:
        """How many batches a time string like `1ep`, `500ba`, `4096sp` or `0.1dur` lasts."""
        return count_batches(time, self.batches_per_epoch, self.samples_per_batch, self.total_batches)


def count_batches(
    time: str | Time,
    batches_per_epoch: int | None = None,
    samples_per_batch: int | None = None,
    total_batches: int | None = None,
) -> float:
    """How many batches a length of time lasts; the arguments are those of `Progress`.

    Raises:
        ValueError: A unit of time other than ep, ba, sp, dur, or one whose length in batches is not given.
    """
    time = time if isinstance(time, Time) else Time.from_timestring(time)
    batches_in_unit = {
        TimeUnit.EPOCH: batches_per_epoch,
        TimeUnit.BATCH: 1,
        TimeUnit.SAMPLE: samples_per_batch and 1 / samples_per_batch,
        TimeUnit.DURATION: total_batches,
    }.get(time.unit)
    if time.value == 0:
        return 0  # in any unit, also where '1ep' has no meaning
    if batches_in_unit is None:
        raise ValueError(f"{time.to_timestring()!r} cannot be counted in batches: under a patch sampling schedule, ep "
                         "needs a data loader with a length, sp one with a batch size, and tok, sec or iter never can")
    return time.value * batches_in_unit
