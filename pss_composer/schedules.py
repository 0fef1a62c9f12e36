"""Patch Sampling Schedules: the keep rate ρ as a pure function of training progress.

A schedule is any callable that takes a `Progress` and returns a keep rate in (0, 1]. It holds no counter, so
training that stops and resumes sees the same keep rates, and every rank sees the same one. The schedules of the
paper (McDanel & Huynh 2022, https://arxiv.org/abs/2208.09520) are `Cyclic`, `Linear`, `Cosine` and `Fixed`.

Keep rates round as in the paper's code: on the *drop* rate 1 − ρ, to the nearest multiple of `step`, ties to even.
"""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import ClassVar

from pss_composer.errors import InputError
from pss_composer.progress import Progress, check_time, parse_time

Schedule = Callable[[Progress], float]


def check_keep_rate(value: float, key: str = "keep_rate") -> float:
    """The value itself if it is a keep rate, a number in (0, 1].

    Raises:
        InputError: Outside (0, 1], or not a number.
    """
    if not _is_number(value) or not 0.0 < value <= 1.0:
        raise InputError(f"must be a number in (0, 1], got {value!r}", key=key)
    return value


def _is_number(value: object) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value)


def _drop_rate(keep_rate: float) -> float:
    # 1 − 1.1 is −0.10000000000000009 in floating point, which moves a batch at the edge of a bin
    return round(1.0 - keep_rate, 12)


def _to_keep_rate(drop_rate: float, step: float | None) -> float:
    """The keep rate for an unrounded drop rate: clamped to [0, 1], rounded to multiples of `step`."""
    drop_rate = min(max(drop_rate, 0.0), 1.0)
    if step is not None:
        bins = 1 / step
        drop_rate = round(bins * drop_rate) / bins
    return round(1.0 - drop_rate, 12)


def _interpolate(start: float, end: float, share: float) -> float:
    return (1 - share) * start + share * end


@dataclass(frozen=True)
class Fixed:
    """The same keep rate in every batch.

    Args:
        keep_rate: Share of the tokens to keep, in (0, 1].
    """

    name: ClassVar[str] = "fixed"
    keep_rate: float = 0.6

    def __post_init__(self) -> None:
        check_keep_rate(self.keep_rate)

    def __call__(self, progress: Progress) -> float:
        return self.keep_rate


@dataclass(frozen=True)
class Ramp(ABC):
    """What the schedules from `start` to `end` share.

    Args:
        start: Keep rate at the start, above 0.
        end: Keep rate at the end, above 0. Above 1 is the paper's overshoot: ρ is capped at 1, and 1.1 gives ρ = 1.0
            the full share of batches that the other multiples of 0.2 get, where 1.0 gives it half.
        step: 1 − ρ is rounded to multiples of this; None does not round.
        cooldown: Length of the last part of training, a time string in ep, ba, sp or dur.
    """

    start: float = 0.2
    end: float = 1.1
    step: float | None = 0.2
    cooldown: str = "0ep"

    def __post_init__(self) -> None:
        if self.step is not None and (not _is_number(self.step) or not 0.0 < self.step <= 1.0):
            raise InputError(f"must be None or a number in (0, 1], got {self.step!r}", key="step")
        for name in ("start", "end"):
            value = getattr(self, name)
            if not _is_number(value) or value <= 0.0:
                raise InputError(f"must be a keep rate above 0 (above 1 means overshoot), got {value!r}", key=name)
            if _to_keep_rate(_drop_rate(value), self.step) <= 0.0:
                raise InputError(f"must not round to 0 at step={self.step}, got {value!r}", key=name)
        check_time(self.cooldown, "cooldown", is_zero_allowed=True)

    def __call__(self, progress: Progress) -> float:
        return _to_keep_rate(self._unrounded_drop_rate(progress), self.step)

    @abstractmethod
    def _unrounded_drop_rate(self, progress: Progress) -> float:
        """The drop rate before clamping and rounding."""

    def _ramp_batches(self, progress: Progress) -> float:
        """Batches before the cooldown."""
        batches = progress.total_batches - progress.num_batches(self.cooldown)
        if batches < 0:
            raise InputError(
                f"must be no longer than training, got {self.cooldown!r} in {progress.total_batches} batches",
                key="cooldown",
            )
        return batches


@dataclass(frozen=True)
class Linear(Ramp):
    """From `start` to `end` in a straight line; at `end` in the cooldown. The arguments are those of `Ramp`."""

    name: ClassVar[str] = "linear"

    def _unrounded_drop_rate(self, progress: Progress) -> float:
        start, end = _drop_rate(self.start), _drop_rate(self.end)
        ramp_batches = self._ramp_batches(progress)
        if progress.batch >= ramp_batches:
            return end
        return _interpolate(start, end, progress.batch / ramp_batches)


@dataclass(frozen=True)
class Cosine(Ramp):
    """From `start` to `end` along half a cosine; at `end` in the cooldown and in the batch before it.

    The arguments are those of `Ramp`.
    """

    name: ClassVar[str] = "cosine"

    def _unrounded_drop_rate(self, progress: Progress) -> float:
        start, end = _drop_rate(self.start), _drop_rate(self.end)
        ramp_batches = self._ramp_batches(progress)
        if progress.batch >= ramp_batches - 1:
            return end
        return end + (start - end) * (1 + math.cos(math.pi * progress.batch / ramp_batches)) / 2


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

    def _unrounded_drop_rate(self, progress: Progress) -> float:
        if progress.batch >= self._ramp_batches(progress):
            return 0.0
        period = progress.num_batches(self.period)
        batch = progress.batch % period
        # counted from the nearer end, with one division: so both halves of a cycle round alike
        share = 2 * min(batch, period - batch) / period
        return _interpolate(_drop_rate(self.start), _drop_rate(self.end), share)


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
            milestones = tuple((time, keep_rate) for time, keep_rate in self.milestones)
        except (TypeError, ValueError):
            raise InputError(f"{rule}, got {self.milestones!r}", key="milestones") from None
        for time, keep_rate in milestones:
            check_time(time, "milestones: each time", is_zero_allowed=True)
            check_keep_rate(keep_rate, "milestones: each keep rate")
        if not milestones or parse_time(milestones[0][0])[0] != 0:
            raise InputError(f"{rule}, the first at time 0, got {self.milestones!r}", key="milestones")
        object.__setattr__(self, "milestones", milestones)

    def __call__(self, progress: Progress) -> float:
        starts = [progress.num_batches(time) for time, _ in self.milestones]
        if starts != sorted(starts):
            raise InputError(f"must stand in order of time, got {self.milestones!r}", key="milestones")
        return [rate for start, (_, rate) in zip(starts, self.milestones, strict=True) if start <= progress.batch][-1]


SCHEDULES: dict[str, type] = {schedule.name: schedule for schedule in (Fixed, Linear, Cosine, Cyclic, Piecewise)}


def keep_rates(
    schedule: Schedule, *, epochs: int, batches_per_epoch: int, samples_per_batch: int | None = None
) -> list[float]:
    """The keep rate of every batch of a training run.

    Args:
        schedule: One of the schedules here or any function of a `Progress`.
        epochs: Epochs of the run.
        batches_per_epoch: Batches in one epoch.
        samples_per_batch: Samples in one (global) batch, for schedules with times in samples.

    Returns:
        `epochs * batches_per_epoch` keep rates in (0, 1].
    """
    total = epochs * batches_per_epoch
    return [
        check_keep_rate(schedule(Progress(batch, total, batches_per_epoch, samples_per_batch)), "the schedule's result")
        for batch in range(total)
    ]
