"""Training progress counted in batches, and lengths of training as time strings like `1ep`."""

from __future__ import annotations

import math
import re
from collections.abc import Mapping, Sequence

from pss_composer.errors import InputError

UNITS = ("ep", "ba", "sp", "dur")  # epochs, batches, samples, and the share of all of training
TIME_STRING = re.compile(r"([-+]?(?:\d+\.?\d*|\.\d+)(?:e[-+]?\d+)?)(ep|ba|sp|dur)", re.IGNORECASE)


def parse_time(time: str) -> tuple[float, str]:
    """The number and the unit of a time string in Composer's notation.

    Args:
        time: Like `1ep`, `500ba`, `1e5sp` or `0.1dur`; all but `dur` take whole numbers.

    Raises:
        ValueError: Not a time string in these units, or no whole number of them.
    """
    match = TIME_STRING.fullmatch(time) if isinstance(time, str) else None
    value, unit = (float(match[1]), match[2].lower()) if match else (math.nan, "")
    if not math.isfinite(value) or (unit != "dur" and not value.is_integer()):
        raise ValueError(f"{time!r} is not a whole number of ep, ba or sp, or a number of dur")
    return value, unit


def check_time(time: str, key: str, units: Sequence[str] = UNITS, *, is_zero_allowed: bool = False) -> None:
    """Check a time string that a user gave.

    Args:
        time: A time string like `1ep`.
        key: The argument's name, for the message.
        units: Units that it may be in.
        is_zero_allowed: Whether its length may be zero.

    Raises:
        InputError: Not a time string, one in another unit, or too short.
    """
    try:
        value, unit = parse_time(time)
        is_valid = unit in units and (value > 0 or (is_zero_allowed and value == 0))
    except ValueError:
        is_valid = False
    if not is_valid:
        minimum = "of at least 0" if is_zero_allowed else "above 0"
        raise InputError(f"must be a time string {minimum} in {', '.join(units)} (like '1ep'), got {time!r}", key=key)


class Progress(float):
    """The share of training that is done, in [0, 1]: a float that also knows its batches.

    A schedule of your own may be as short as `lambda progress: 0.2 + 0.8 * progress`.

    Args:
        batch: Batches trained so far, counted from the start of training.
        total_batches: Batches in the whole of training, at least 1.
        batches_per_epoch: Batches in one epoch; None when the data has no length.
        samples_per_batch: Samples in one full (global) batch; None when it is not known.
        samples_per_epoch: Samples in one epoch, where its last batch may not be full; None when all batches are full.
        epoch_start: When this epoch began, like `{"ep": 1, "ba": 8, "sp": 32}`; None where all epochs are alike.

    Raises:
        InputError: Training has no batches.
    """

    batch: int
    total_batches: int
    batches_per_epoch: int | None
    samples_per_batch: int | None
    samples_per_epoch: int | None
    epoch_start: Mapping[str, int]

    def __new__(
        cls,
        batch: int,
        total_batches: int,
        batches_per_epoch: int | None = None,
        samples_per_batch: int | None = None,
        samples_per_epoch: int | None = None,
        epoch_start: Mapping[str, int] | None = None,
    ) -> Progress:
        if total_batches < 1:
            raise InputError(f"must be at least 1, got {total_batches}", key="total_batches")
        # batches that are not full may make training longer than total_batches
        progress = super().__new__(cls, min(batch / total_batches, 1.0))
        progress.batch = batch
        progress.total_batches = total_batches
        progress.batches_per_epoch = batches_per_epoch
        progress.samples_per_batch = samples_per_batch
        progress.samples_per_epoch = samples_per_epoch
        progress.epoch_start = epoch_start or {}
        return progress

    def num_batches(self, time: str) -> float:
        """How many batches a time string like `1ep`, `500ba`, `4096sp` or `0.1dur` lasts."""
        return count_batches(
            time, self.batches_per_epoch, self.samples_per_batch, self.total_batches, self.samples_per_epoch
        )

    def num_elapsed(self, time: str) -> float:
        """Batches trained so far, to compare with the `num_batches` of this time string.

        In epochs and samples, earlier epochs count as if they had been like this one. So a period of `1ep` begins with
        an epoch also where training goes on with a loader of another length.
        """
        _, unit = parse_time(time)
        if unit not in self.epoch_start:
            return self.batch
        return self.num_batches(f"{self.epoch_start[unit]}{unit}") + self.batch - self.epoch_start["ba"]


def count_batches(
    time: str,
    batches_per_epoch: int | None = None,
    samples_per_batch: int | None = None,
    total_batches: float | None = None,
    samples_per_epoch: int | None = None,
) -> float:
    """How many batches a time string lasts from the start of training; the arguments are those of `Progress`.

    Samples are counted by whole epochs and full batches: with 14 samples in batches of 4, `14sp` lasts 4 batches,
    `140sp` 40, and `18sp` 5. Without `samples_per_epoch` every batch counts as full.

    Raises:
        ValueError: A unit other than ep, ba, sp or dur, or one whose length in batches is not given.
    """
    lengths = {"ep": batches_per_epoch, "ba": 1, "sp": samples_per_batch, "dur": total_batches}
    value, unit = parse_time(time) if TIME_STRING.fullmatch(time) else (math.nan, "")  # Composer has other units, too
    if value == 0:
        return 0  # in any unit, also if an epoch has no length
    length = lengths.get(unit)
    if not length:
        raise ValueError(f"{time!r} cannot be counted in batches: under a patch sampling schedule, ep needs a data "
                         "loader with a length, sp a batch size, and tok, sec and iter cannot be used")
    if unit != "sp":
        return value * length
    if not samples_per_epoch or not batches_per_epoch:
        return value / length
    num_epochs, rest = divmod(value, samples_per_epoch)
    return num_epochs * batches_per_epoch + rest / length
