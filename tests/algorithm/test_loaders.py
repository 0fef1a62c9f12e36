"""The keep rate of every batch where epochs are not all alike: other loaders, and last batches that are not full."""

from types import SimpleNamespace

import pytest
from composer.core import Time, Timestamp
from composer.utils import dist
from support.keep_rates import BATCH_SIZE, CYCLE
from support.trainers import build_dataloader, build_dataset, build_trainer, logged, train
from torch.utils.data import DataLoader, DistributedSampler, IterableDataset

from pss_composer import PatchSamplingSchedule
from pss_composer.algorithm import read_progress
from pss_composer.schedules import Cyclic, Linear, Piecewise

pytestmark = pytest.mark.filterwarnings("ignore:Cannot split tensor of length 2 into batches of size 4:UserWarning")

FIVE = [0.2, 0.6, 1.0, 1.0, 0.6]  # Cyclic over five batches: 0.8 - 0.9 * (0, 0.4, 0.8, 0.8, 0.4), rounded
TWO_EPOCHS = [0.2, 0.4, 0.4, 0.6, 0.6, 0.8, 0.8, 1.0, *[1.0, 1.0, 0.8, 0.6, 0.4], *[0.2, 0.4, 0.6, 0.8, 1.0]]
SCHEDULES_OF_TWO_LOADERS = {
    "1ep": (Cyclic(), CYCLE + FIVE * 2),
    "2ep": (Cyclic(period="2ep"), TWO_EPOCHS),
    "8ba": (Cyclic(period="8ba"), (CYCLE * 3)[:18]),
    "20sp": (Cyclic(period="20sp"), (FIVE * 4)[:18]),
    "cooldown": (Cyclic(cooldown="1ep"), [1.0] * 8 + FIVE + [1.0] * 5),
    "linear": (Linear(0.1, 1.0, step=None),
               [0.1 + 0.9 * batch / 8 for batch in range(8)] + [0.1 + 0.9 * batch / 18 for batch in range(8, 18)]),
    "piecewise_ep": (Piecewise([("0ep", 0.4), ("2ep", 0.8)]), [0.4] * 13 + [0.8] * 5),
    "piecewise_sp": (Piecewise([("0ep", 0.4), ("52sp", 0.8)]), [0.4] * 13 + [0.8] * 5),
    "piecewise_ba": (Piecewise([("0ep", 0.4), ("13ba", 0.8)]), [0.4] * 13 + [0.8] * 5),
}


@pytest.mark.parametrize("name", SCHEDULES_OF_TWO_LOADERS)
@pytest.mark.parametrize("duration", ["2ep", "10ba", "40sp"])
def test_a_second_fit_with_a_loader_of_another_length(name, duration):
    """An epoch of 8 batches, then two of 5."""
    schedule, expected = SCHEDULES_OF_TWO_LOADERS[name]
    trainer = build_trainer(PatchSamplingSchedule(schedule), max_duration="1ep")
    trainer.fit()
    trainer.fit(train_dataloader=build_dataloader(5 * BATCH_SIZE), duration=duration)
    assert logged(trainer, "pss/keep_rate") == pytest.approx(expected, abs=1e-12)


def test_a_second_fit_with_batches_of_another_size():
    """A cycle of 16 samples is one of 4 batches, and then one of 8."""
    trainer = build_trainer(PatchSamplingSchedule(Cyclic(period="16sp")), max_duration="1ep")
    trainer.fit()
    trainer.fit(train_dataloader=build_dataloader(20, batch_size=2), duration="1ep")
    assert logged(trainer, "pss/keep_rate") == pytest.approx([0.2, 0.6, 1.0, 0.6] * 2 + CYCLE + CYCLE[:2], abs=1e-12)


@pytest.mark.parametrize(("options", "max_duration", "num_batches"), [
    ({}, "140sp", 40),  # 10 epochs of 4 batches, the last of 2 samples
    ({}, "15sp", 5),
    ({"drop_last": True}, "24sp", 6),  # 2 epochs of 3 full batches
    ({"drop_last": True}, "25sp", 7),
])
def test_samples_of_epochs_whose_last_batch_is_not_full(options, max_duration, num_batches):
    algorithm = PatchSamplingSchedule(Linear(0.2, 1.0, step=None))
    trainer = train(algorithm, train_dataloader=build_dataloader(14, **options), max_duration=max_duration)
    expected = [0.2 + 0.8 * batch / num_batches for batch in range(num_batches)]
    assert logged(trainer, "pss/keep_rate") == pytest.approx(expected)


class _Stream(IterableDataset):
    def __iter__(self):
        return iter(build_dataset(14))


class _Sized(_Stream):
    def __len__(self):
        return 14


def _read_total(dataloader, max_duration, dataloader_len=None, **timestamp):
    dataloader_len = len(dataloader) if dataloader_len is None else dataloader_len
    state = SimpleNamespace(dataloader=dataloader, dataloader_len=dataloader_len, timestamp=Timestamp(**timestamp),
                            max_duration=Time.from_timestring(max_duration))
    return read_progress(state).total_batches


def test_samples_of_other_loaders():
    assert _read_total(DataLoader(_Sized(), 4), "28sp") == 8
    assert _read_total(DataLoader(_Sized(), 4, drop_last=True), "24sp") == 6
    assert _read_total(build_dataloader(14), "20sp", dataloader_len=2) == 5  # 8 samples of an epoch, in 2 batches
    # without a length every batch counts as full, but what has been seen is known: 14 samples in 4 batches
    stream = DataLoader(_Stream(), 4)
    state = SimpleNamespace(dataloader=stream, dataloader_len=None, max_duration=Time.from_timestring("28sp"),
                            timestamp=Timestamp(epoch=1, batch=5, sample=18, batch_in_epoch=1, sample_in_epoch=4))
    assert read_progress(state).total_batches == 4 + 4
    # not torch's: a batch size, and no more
    other = SimpleNamespace(batch_size=4)
    assert _read_total(other, "28sp", dataloader_len=4) == 7


def test_samples_of_two_processes(monkeypatch):
    """15 samples, padded to 8 for each process: 3 batches of 3, 3 and 2."""
    monkeypatch.setattr(dist, "get_world_size", lambda: 2)
    dataset = build_dataset(15)
    dataloader = DataLoader(dataset, 3, sampler=DistributedSampler(dataset, num_replicas=2, rank=0))
    assert _read_total(dataloader, "32sp") == 6
    assert _read_total(dataloader, "33sp") == 7


def test_a_run_that_goes_on_with_other_batches_counts_its_epochs():
    """A checkpoint of 2 epochs of 8 batches, resumed on twice as many devices: 4 batches an epoch are left."""
    progress = dict(epoch=2, batch=16, sample=64)
    assert _read_total(build_dataloader(batch_size=8), "4ep", **progress) == 16 + 2 * 4
    assert _read_total(build_dataloader(batch_size=8), "128sp", **progress) == 16 + 2 * 4
    assert _read_total(build_dataloader(batch_size=8), "20ba", **progress) == 20
