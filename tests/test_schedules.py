"""Schedules against the reference runs, arithmetic by hand, and bad arguments."""

import json
import math
import pickle
from fractions import Fraction
from itertools import groupby

import numpy as np
import pytest
import torch
from support.paths import VECTORS

from pss_composer.progress import count_batches
from pss_composer.schedules import Cosine, Cyclic, Fixed, Linear, Piecewise, Progress, check_schedule, keep_rates

REFERENCE_RUNS = json.loads((VECTORS / "schedules.json").read_text())


def run_lengths(rates):
    return [(rate, len(list(run))) for rate, run in groupby(rates)]


@pytest.mark.parametrize("run", REFERENCE_RUNS, ids=lambda r: "-".join(str(v) for v in list(r.values())[:-1]))
def test_reference_run(run):
    schedule_class = {"cyclic": Cyclic, "linear": Linear, "cosine": Cosine}[run["schedule"]]
    schedule = schedule_class(
        start=1 - run["start_drop"], end=1 - run["end_drop"], step=0.2, cooldown=f"{run['cooldown_epochs']}ep"
    )
    rates = keep_rates(schedule, epochs=run["epochs"], batches_per_epoch=run["batches_per_epoch"])
    runs = run_lengths(rates)
    assert [length for _, length in runs] == [length for _, length in run["keep_rate_runs"]]
    for (rate, _), (expected, _) in zip(runs, run["keep_rate_runs"], strict=True):
        assert rate == pytest.approx(expected, abs=1e-9)


def test_reference_runs_are_all_there():
    assert len(REFERENCE_RUNS) == 60


def test_default_is_the_papers_schedule():
    rates = keep_rates(Cyclic(start=0.2, end=1.1), epochs=4, batches_per_epoch=2502)
    shares = {rate: rates.count(rate) / len(rates) for rate in (0.2, 0.4, 0.6, 0.8, 1.0)}
    assert shares == pytest.approx({0.2: 1 / 9, 0.4: 2 / 9, 0.6: 2 / 9, 0.8: 2 / 9, 1.0: 2 / 9}, abs=1e-3)
    assert sum(rates) / len(rates) == pytest.approx(0.644, abs=1e-3)
    assert Cyclic() == Cyclic(start=0.2, end=1.1, step=0.2, period="1ep", cooldown="0ep")


def test_fixed_needs_no_rounding():
    assert keep_rates(Fixed(0.55), epochs=1, batches_per_epoch=3) == [0.55, 0.55, 0.55]


@pytest.mark.parametrize("period", ["1ep", "8ba", "64sp", "0.25dur"])
def test_a_period_may_be_counted_in_any_unit(period):
    rates = keep_rates(Cyclic(0.2, 1.0, step=None, period=period), epochs=4, batches_per_epoch=8, samples_per_batch=8)
    cycle = [0.2, 0.4, 0.6, 0.8, 1.0, 0.8, 0.6, 0.4]
    assert rates == pytest.approx(cycle * 4)


@pytest.mark.parametrize("cooldown", ["1ep", "8ba", "64sp", "0.25dur"])
def test_cooldown_ends_training_at_one_in_any_unit(cooldown):
    rates = keep_rates(Cyclic(0.2, 0.6, cooldown=cooldown), epochs=4, batches_per_epoch=8, samples_per_batch=8)
    assert rates[-8:] == [1.0] * 8
    assert max(rates[:-8]) == pytest.approx(0.6)


def test_a_step_of_none_does_not_round():
    rates = keep_rates(Linear(0.5, 1.0, step=None), epochs=1, batches_per_epoch=10)
    assert rates == pytest.approx([0.5 + 0.05 * batch for batch in range(10)])


def test_overshoot_is_capped_at_one():
    rates = keep_rates(Linear(0.5, 2.0, step=None), epochs=1, batches_per_epoch=10)
    assert max(rates) == 1.0 and rates[:3] == pytest.approx([0.5, 0.65, 0.8])


def test_piecewise_holds_each_milestone_until_the_next():
    schedule = Piecewise([("0ba", 0.4), ("2ba", 0.6), ("1ep", 0.8), ("0.75dur", 1.0)])
    assert keep_rates(schedule, epochs=2, batches_per_epoch=4) == [0.4, 0.4, 0.6, 0.6, 0.8, 0.8, 1.0, 1.0]


def test_a_function_of_progress_is_a_schedule():
    assert keep_rates(lambda progress: 0.5 + progress / 2, epochs=1, batches_per_epoch=4) == [0.5, 0.625, 0.75, 0.875]
    with pytest.raises(ValueError, match=r"the schedule's result must be a number in \(0, 1\], got 1\.25"):
        keep_rates(lambda progress: 1.0 + progress, epochs=1, batches_per_epoch=4)


@pytest.mark.parametrize(
    ("schedule", "expected"),
    [
        # 0.8 rounds to 0.9 in steps of 0.3, which would be ρ = 0.1
        (Cyclic(start=0.2, step=0.3), [0.2, 0.4, 0.7, 1.0]),
        (Linear(start=1.0, end=0.2, step=0.3), [0.2, 0.4, 0.7, 1.0]),
        (Cosine(start=0.05, step=0.2), [0.05, 0.2, 0.4, 0.6, 0.8, 1.0]),
        (Cyclic(start=0.2, end=0.9, step=1.0), [0.2, 1.0]),
        (Cyclic(start=1e-300, end=1.0, step=None), None),
    ],
)
def test_no_keep_rate_is_below_start_and_end(schedule, expected):
    rates = keep_rates(schedule, epochs=1, batches_per_epoch=400)
    assert min(rates) == min(schedule.start, schedule.end)
    if expected is not None:
        assert sorted(set(rates)) == expected


@pytest.mark.parametrize("schedule_class", [Linear, Cosine, Cyclic])
@pytest.mark.parametrize(("keep_rate", "expected"), [(0.1, 0.2), (0.5, 0.6), (0.6, 0.6), (0.9, 1.0)])
def test_where_start_is_end_every_batch_rounds_alike(schedule_class, keep_rate, expected):
    """0.1 and 0.9 lie halfway between two multiples of 0.2: an error in the last digit would decide."""
    rates = keep_rates(schedule_class(keep_rate, keep_rate, step=0.2), epochs=2, batches_per_epoch=97)
    assert set(rates) == {expected}


@pytest.mark.parametrize("schedule_class", [Linear, Cosine, Cyclic])
def test_a_huge_overshoot_is_at_one_from_the_second_batch(schedule_class):
    for end in (1e300, 1e308):
        rates = keep_rates(schedule_class(0.2, end), epochs=1, batches_per_epoch=9)
        assert set(rates[1:]) == {1.0}


@pytest.mark.parametrize("step", [1e-300, 5e-324])
def test_a_tiny_step_does_not_round(step):
    rates = keep_rates(Linear(0.5, 1.0, step=step), epochs=1, batches_per_epoch=10)
    assert rates == pytest.approx([0.5 + 0.05 * batch for batch in range(10)])


@pytest.mark.parametrize("time", ["1e308ep", "1e308dur", "1e300sp"])
def test_a_huge_period_stays_at_start(time):
    rates = keep_rates(Cyclic(period=time), epochs=2, batches_per_epoch=10, samples_per_batch=4)
    assert set(rates) == {0.2}
    milestones = Piecewise([("0ep", 0.5), (time, 1.0)])
    assert set(keep_rates(milestones, epochs=2, batches_per_epoch=10, samples_per_batch=4)) == {0.5}


NUMBERS = [np.float64(0.5), np.float32(0.5), np.float16(0.5), np.array(0.5), torch.tensor(0.5), Fraction(1, 2),
           torch.tensor(0.5, dtype=torch.bfloat16, requires_grad=True)]


@pytest.mark.parametrize("number", NUMBERS, ids=lambda number: type(number).__name__)
def test_any_real_number_is_a_keep_rate(number):
    schedules = (Fixed(number), Linear(number, number, step=number), Piecewise([("0ep", number)]), lambda _: number)
    for schedule in schedules:
        rates = keep_rates(schedule, epochs=1, batches_per_epoch=2)
        assert rates == [0.5, 0.5] and {type(rate) for rate in rates} == {float}
    assert repr(schedules[0]) == "Fixed(keep_rate=0.5)" and eval(repr(schedules[1])) == schedules[1]
    assert type(Linear(np.int64(1), 1).start) is float and Linear(1, np.int64(1)) == Linear(1.0, 1.0)


@pytest.mark.parametrize("value", [True, np.True_, torch.tensor(True), None, "0.5", 0.5j, torch.tensor(0.5j), [0.5],
                                   np.array([0.5]), torch.tensor([0.5]), math.inf, math.nan, np.float32("nan"),
                                   torch.tensor(math.inf), 10**400, Fixed])
def test_what_is_no_keep_rate(value):
    with pytest.raises(ValueError, match=r"^keep_rate must be a number in \(0, 1\], got "):
        Fixed(value)
    with pytest.raises(ValueError, match=r"^start must be a keep rate above 0 \(above 1 means overshoot\), got "):
        Linear(start=value)
    with pytest.raises(ValueError, match=r"^milestones: each keep rate must be a number in \(0, 1\], got "):
        Piecewise([("0ep", value)])
    with pytest.raises(ValueError, match=r"^the schedule's result must be a number in \(0, 1\], got "):
        keep_rates(lambda _: value, epochs=1, batches_per_epoch=1)
    if value is not None:
        with pytest.raises(ValueError, match=r"^step must be None or a number in \(0, 1\], got "):
            Linear(step=value)


def test_a_class_is_no_schedule():
    for schedule in (Cyclic(), lambda progress: 0.5):
        assert check_schedule(schedule) is schedule
    rule = "schedule must be a schedule or a function of training progress, got "
    with pytest.raises(ValueError, match=rf"^{rule}the class Cyclic: an object of it is Cyclic\(\)$"):
        keep_rates(Cyclic, epochs=1, batches_per_epoch=2)
    for value in (0.5, None, "cyclic"):
        with pytest.raises(ValueError, match=rf"^{rule}{value!r}$"):
            keep_rates(value, epochs=1, batches_per_epoch=2)


@pytest.mark.parametrize("key", ["epochs", "batches_per_epoch", "samples_per_batch", "samples_per_epoch"])
@pytest.mark.parametrize("value", [-1, 0, 2.0, "2", True, math.nan])
def test_keep_rates_needs_counts(key, value):
    counts = {"epochs": 1, "batches_per_epoch": 1}
    with pytest.raises(ValueError, match=rf"^{key} must be a whole number of at least 1, got {value!r}$"):
        keep_rates(Cyclic(), **counts | {key: value})
    assert keep_rates(Cyclic(), **counts | {key: np.int64(1)}) == [0.2]


def test_repr_rebuilds_and_pickles():
    for schedule in (Fixed(0.3), Linear(cooldown="3ba"), Cosine(step=None), Cyclic(period="7ba"),
                     Piecewise([["0ep", 0.5], ["2ep", 1.0]])):
        assert eval(repr(schedule)) == schedule
        assert pickle.loads(pickle.dumps(schedule)) == schedule


@pytest.mark.parametrize(
    ("build", "message"),
    [
        (lambda: Fixed(0.0), r"keep_rate must be a number in \(0, 1\], got 0.0"),
        (lambda: Fixed(1.1), r"keep_rate must be a number in \(0, 1\], got 1.1"),
        (lambda: Fixed("0.5"), r"keep_rate must be a number in \(0, 1\], got '0.5'"),
        (lambda: Fixed(float("nan")), r"keep_rate must be a number in \(0, 1\], got nan"),
        (lambda: Cyclic(start=0.0), r"start must be a keep rate above 0 \(above 1 means overshoot\), got 0.0"),
        (lambda: Linear(end=-0.1), r"end must be a keep rate above 0 \(above 1 means overshoot\), got -0.1"),
        (lambda: Linear(step=0), r"step must be None or a number in \(0, 1\], got 0"),
        (lambda: Cyclic(period="0ep"), r"period must be a time string above 0 in ep, ba, sp, dur .*, got '0ep'"),
        (lambda: Cyclic(period="1tok"), r"period must be a time string above 0 in ep, ba, sp, dur .*, got '1tok'"),
        (lambda: Cyclic(period="infdur"), r"period must be a time string above 0 in ep, ba, sp, dur .*, got 'infdur'"),
        (lambda: Cyclic(cooldown="soon"), r"cooldown must be a time string of at least 0 .*, got 'soon'"),
        (lambda: Cyclic(cooldown=3), r"cooldown must be a time string of at least 0 .*, got 3"),
        (lambda: Piecewise([("1ep", 0.5)]), r"milestones must be pairs .*, the first at time 0, got"),
        (lambda: Piecewise([0.5]), r"milestones must be pairs of a time string and a keep rate, got \[0.5\]"),
        (lambda: Piecewise([("0ep", 2.0)]), r"milestones: each keep rate must be a number in \(0, 1\], got 2.0"),
    ],
)
def test_bad_arguments(build, message):
    with pytest.raises(ValueError, match=message):
        build()


def test_what_only_training_can_tell():
    with pytest.raises(ValueError, match="cooldown must be no longer than training, got '3ep' in 8 batches"):
        keep_rates(Cyclic(cooldown="3ep"), epochs=2, batches_per_epoch=4)
    with pytest.raises(ValueError, match="'64sp' cannot be counted in batches"):
        keep_rates(Cyclic(period="64sp"), epochs=2, batches_per_epoch=4)
    with pytest.raises(ValueError, match="milestones must stand in order of time"):
        keep_rates(Piecewise([("0ep", 0.5), ("9ba", 1.0), ("2ep", 0.7)]), epochs=3, batches_per_epoch=4)


def test_progress_is_the_share_of_training():
    progress = Progress(25, 100, batches_per_epoch=50, samples_per_batch=4)
    assert progress == 0.25
    assert [progress.num_batches(t) for t in ("2ep", "3ba", "8sp", "0.5dur")] == [100, 3, 2, 50]
    with pytest.raises(ValueError, match="total_batches must be at least 1, got 0"):
        Progress(0, 0)


@pytest.mark.parametrize(
    ("time", "expected"),
    [("140sp", 40), ("14sp", 4), ("28sp", 8), ("18sp", 5), ("26sp", 7), ("12sp", 3), ("4sp", 1), ("0sp", 0)],
)
def test_samples_are_counted_by_epochs_and_full_batches(time, expected):
    """14 samples in batches of 4: three full ones and one of two."""
    progress = Progress(0, 40, batches_per_epoch=4, samples_per_batch=4, samples_per_epoch=14)
    assert progress.num_batches(time) == expected


def test_samples_of_the_last_batch_count_as_a_batch():
    assert math.ceil(count_batches("13sp", 4, 4, samples_per_epoch=14)) == 4
    assert math.ceil(count_batches("27sp", 4, 4, samples_per_epoch=14)) == 8
    assert count_batches("525sp", samples_per_batch=75) == 7  # 525 * (1 / 75) is more than 7


def test_a_period_in_samples_is_an_epoch_where_its_last_batch_is_not_full():
    arguments = dict(epochs=5, batches_per_epoch=4, samples_per_batch=4, samples_per_epoch=14)
    by_epoch = keep_rates(Cyclic(0.2, 1.0, step=None, cooldown="1ep"), **arguments)
    by_sample = keep_rates(Cyclic(0.2, 1.0, step=None, period="14sp", cooldown="14sp"), **arguments)
    assert by_sample == by_epoch == pytest.approx([0.2, 0.6, 1.0, 0.6] * 4 + [1.0] * 4)
    assert keep_rates(Piecewise([("0sp", 0.5), ("28sp", 1.0)]), **arguments) == [0.5] * 8 + [1.0] * 12
