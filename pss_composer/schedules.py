"""Patch Sampling Schedules: the keep rate ρ as a pure function of training progress.

A schedule is any callable that takes a `Progress` and returns a keep rate in (0, 1]. It holds no counter, so
training that stops and resumes sees the same keep rates, and every rank sees the same one. The schedules of the
paper (McDanel & Huynh 2022, https://arxiv.org/abs/2208.09520) are `Cyclic`, `Linear`, `Cosine` and `Fixed`.

Keep rates round as in the paper's code: on the *drop* rate 1 − ρ, to the nearest multiple of `step`, ties to even. So
ρ may go above the larger of `start` and `end` by at most half a step; the smaller one stays its lower limit.

Keep rates may be given, and returned by functions, as any real number: also as a scalar of NumPy or a tensor with a
single value and no dimension. They are stored as Python floats.
"""

from __future__ import annotations

import math
import numbers
from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import ClassVar

from pss_composer.errors import InputError
from pss_composer.progress import Progress, check_time, parse_time

Schedule = Callable[[Progress], float]


@dataclass(frozen=True)
class Fixed:
    """The same keep rate in every batch.

    Args:
        keep_rate: Share of the tokens to keep, in (0, 1].
    """

    name: ClassVar[str] = "fixed"
    keep_rate: float = 0.6

    def __post_init__(self) -> None:
        object.__setattr__(self, "keep_rate", check_keep_rate(self.keep_rate))

    def __call__(self, progress: Progress) -> float:
        return self.keep_rate


@dataclass(frozen=True)
class Ramp(ABC):
    """What the schedules from `start` to `end` share.

    Args:
        start: Keep rate at the start, above 0.
        end: Keep rate at the end, above 0. Above 1 is the paper's overshoot: ρ is capped at 1, and 1.1 gives ρ = 1.0
            the full share of batches that the other multiples of 0.2 get, where 1.0 gives it half.
        step: 1 − ρ is rounded to multiples of this, in (0, 1]; None does not round. A `start` or `end` that would round
            to a lower keep rate stays what it is: `start=0.2, step=0.3` gives ρ = 0.2, 0.4, 0.7 and 1. One that rounds
            to a higher keep rate does so, as in the paper: `start=0.5, step=0.2` gives 0.6, 0.8 and 1.
        cooldown: Length of the last part of training, a time string in ep, ba, sp or dur.
    """

    start: float = 0.2
    end: float = 1.1
    step: float | None = 0.2
    cooldown: str = "0ep"

    def __post_init__(self) -> None:
        if self.step is not None:
            step = _to_float(self.step)
            if not 0.0 < step <= 1.0:
                raise InputError(f"must be None or a number in (0, 1], got {self.step!r}", key="step")
            object.__setattr__(self, "step", step)
        for name in ("start", "end"):
            value = getattr(self, name)
            number = _to_float(value)
            if not number > 0.0:
                raise InputError(f"must be a keep rate above 0 (above 1 means overshoot), got {value!r}", key=name)
            object.__setattr__(self, name, number)
        check_time(self.cooldown, "cooldown", is_zero_allowed=True)

    def __call__(self, progress: Progress) -> float:
        num_batches = progress.total_batches - progress.num_batches(self.cooldown)
        if num_batches < 0:
            raise InputError(
                f"must be no longer than training, got {self.cooldown!r} in {progress.total_batches} batches",
                key="cooldown",
            )
        drop_rate = self._drop_rate(progress, num_batches, _to_drop_rate(self.start), _to_drop_rate(self.end))
        drop_rate = min(max(drop_rate, 0.0), 1.0)
        if self.step is not None and self.step > 1e-12:  # keep rates have twelve digits
            bins = 1 / self.step
            drop_rate = round(bins * drop_rate) / bins
        return max(round(1.0 - drop_rate, 12), min(self.start, self.end, 1.0))

    @abstractmethod
    def _drop_rate(self, progress: Progress, num_batches: float, start: float, end: float) -> float:
        """The drop rate before it is clamped and rounded.

        Args:
            progress: Progress of training.
            num_batches: Batches before the cooldown.
            start: The drop rate at the start.
            end: The drop rate at the end.
        """


@dataclass(frozen=True)
class Linear(Ramp):
    """From `start` to `end` in a straight line; at `end` in the cooldown. The arguments are those of `Ramp`."""

    name: ClassVar[str] = "linear"

    def _drop_rate(self, progress: Progress, num_batches: float, start: float, end: float) -> float:
        if progress.batch >= num_batches:
            return end
        return _interpolate(start, end, progress.batch / num_batches)


@dataclass(frozen=True)
class Cosine(Ramp):
    """From `start` to `end` along half a cosine; at `end` in the cooldown and in the batch before it.

    The arguments are those of `Ramp`.
    """

    name: ClassVar[str] = "cosine"

    def _drop_rate(self, progress: Progress, num_batches: float, start: float, end: float) -> float:
        if progress.batch >= num_batches - 1:
            return end
        share_left = (1 + math.cos(math.pi * progress.batch / num_batches)) / 2
        return _clamp(end + (start - end) * share_left, start, end)


@dataclass(frozen=True)
class Cyclic(Ramp):
    """From `start` to `end` and back in every period; at ρ = 1 in the cooldown. The paper's schedule.

    The paper writes Cyclic(0.2, 1.0) for what is `Cyclic(start=0.2, end=1.1)` here.

    Args:
        start: Keep rate at both ends of a period, above 0; this and the others are as for `Ramp`.
        end: Keep rate in the middle of a period.
        step: Rounding.
        cooldown: Length of the last part of training.
        period: Length of a cycle, a time string in ep, ba, sp or dur.
    """

    name: ClassVar[str] = "cyclic"
    period: str = "1ep"

    def __post_init__(self) -> None:
        super().__post_init__()
        check_time(self.period, "period")

    def _drop_rate(self, progress: Progress, num_batches: float, start: float, end: float) -> float:
        if progress.batch >= num_batches:
            return 0.0
        period = progress.num_batches(self.period)
        batch = progress.num_elapsed(self.period) % period
        # counted from the nearer end, with one division: so both halves of a cycle round alike
        share = 2 * min(batch, period - batch) / period
        return _interpolate(start, end, share)


@dataclass(frozen=True)
class Piecewise:
    """A keep rate that changes at milestones and stays the same in between.

    Args:
        milestones: Pairs (time, keep rate), the first at 0, like `[("0ep", 0.4), ("20ep", 0.6), ("0.9dur", 1.0)]`.
            Times are time strings in ep, ba, sp or dur, keep rates in (0, 1].
    """

    name: ClassVar[str] = "piecewise"
    milestones: Sequence[tuple[str, float]] = (("0ep", 1.0),)

    def __post_init__(self) -> None:
        rule = "must be pairs of a time string and a keep rate"
        try:
            pairs = [(time, keep_rate) for time, keep_rate in self.milestones]
        except (TypeError, ValueError):
            raise InputError(f"{rule}, got {self.milestones!r}", key="milestones") from None
        for time, _ in pairs:
            check_time(time, "milestones: each time", is_zero_allowed=True)
        milestones = tuple((time, check_keep_rate(rate, "milestones: each keep rate")) for time, rate in pairs)
        if not milestones or parse_time(milestones[0][0])[0] != 0:
            raise InputError(f"{rule}, the first at time 0, got {self.milestones!r}", key="milestones")
        object.__setattr__(self, "milestones", milestones)

    def __call__(self, progress: Progress) -> float:
        starts = [progress.num_batches(time) for time, _ in self.milestones]
        if starts != sorted(starts):
            raise InputError(f"must stand in order of time, got {self.milestones!r}", key="milestones")
        reached = [
            rate for start, (time, rate) in zip(starts, self.milestones, strict=True)
            if start == 0 or start <= progress.num_elapsed(time)
        ]
        return reached[-1]


SCHEDULES: dict[str, type] = {schedule.name: schedule for schedule in (Fixed, Linear, Cosine, Cyclic, Piecewise)}


def keep_rates(
    schedule: Schedule,
    *,
    epochs: int,
    batches_per_epoch: int,
    samples_per_batch: int | None = None,
    samples_per_epoch: int | None = None,
) -> list[float]:
    """The keep rate of every batch of a training run.

    Args:
        schedule: One of the schedules here or any function of a `Progress`.
        epochs: Epochs of the run, at least 1.
        batches_per_epoch: Batches in one epoch, at least 1.
        samples_per_batch: Samples in one full (global) batch, for schedules with times in samples.
        samples_per_epoch: Samples in one epoch, where its last batch is not full.

    Returns:
        `epochs * batches_per_epoch` keep rates in (0, 1].

    Raises:
        InputError: A bad argument, or a schedule that returns no keep rate.
    """
    check_schedule(schedule)
    counts = {"epochs": epochs, "batches_per_epoch": batches_per_epoch, "samples_per_batch": samples_per_batch,
              "samples_per_epoch": samples_per_epoch}
    for key, count in counts.items():
        if count is None and key.startswith("samples"):
            continue
        if not isinstance(count, numbers.Integral) or isinstance(count, bool) or count < 1:
            raise InputError(f"must be a whole number of at least 1, got {count!r}", key=key)
    total = epochs * batches_per_epoch
    return [
        check_keep_rate(
            schedule(Progress(batch, total, batches_per_epoch, samples_per_batch, samples_per_epoch)),
            "the schedule's result",
        )
        for batch in range(total)
    ]


def check_keep_rate(value: object, key: str = "keep_rate") -> float:
    """The value as a float if it is a keep rate, a real number in (0, 1].

    Raises:
        InputError: Outside (0, 1], or not a number.
    """
    number = _to_float(value)
    if not 0.0 < number <= 1.0:
        raise InputError(f"must be a number in (0, 1], got {value!r}", key=key)
    return number


def check_schedule(schedule: object) -> Schedule:
    """The schedule itself, if it can be called with a `Progress`.

    Raises:
        InputError: A class of schedules, or something that cannot be called.
    """
    if callable(schedule) and not isinstance(schedule, type):
        return schedule
    got = repr(schedule)
    if isinstance(schedule, type):
        got = f"the class {schedule.__name__}: an object of it is {schedule.__name__}()"
    raise InputError(f"must be a schedule or a function of training progress, got {got}", key="schedule")


def _to_float(value: object) -> float:
    """A finite real number as a float; NaN stands for everything else."""
    if getattr(value, "shape", None) == ():
        value = value.item()  # type: ignore[attr-defined]    # of NumPy or torch, which are not imported here
    if not isinstance(value, numbers.Real) or isinstance(value, bool):
        return math.nan
    try:
        number = float(value)
    except OverflowError:
        return math.nan
    return number if math.isfinite(number) else math.nan


def _to_drop_rate(keep_rate: float) -> float:
    # 1 − 1.1 is −0.10000000000000009 in floating point, which moves a batch at the edge of a bin
    return round(1.0 - keep_rate, 12)


def _interpolate(start: float, end: float, share: float) -> float:
    return _clamp((1 - share) * start + share * end, start, end)


def _clamp(value: float, start: float, end: float) -> float:
    # floating point errors beyond an end would decide how an end halfway between two multiples of the step rounds
    return min(max(value, min(start, end)), max(start, end))
