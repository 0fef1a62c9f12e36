"""PatchSamplingSchedule in Composer's Trainer: the keep rate of every batch, in training and evaluation."""


import pytest
import torch
from composer import Callback, DataSpec
from support.keep_rates import BATCH_SIZE, CYCLE, TOKENS
from support.models import build_model
from support.trainers import TokenRecorder, build_dataloader, build_dataset, build_trainer, copy_weights, logged, train
from torch.utils.data import DataLoader, IterableDataset

from pss_composer import PatchSamplingSchedule
from pss_composer.models.classifier import ViTClassifier
from pss_composer.schedules import Cosine, Cyclic, Fixed, Linear, Piecewise, keep_rates
from pss_composer.surgery import find_samplers


@pytest.mark.parametrize("max_duration", ["2ep", "16ba", f"{16 * BATCH_SIZE}sp"])
@pytest.mark.parametrize("period", ["1ep", "8ba", f"{8 * BATCH_SIZE}sp", "0.5dur"])
def test_every_batch_has_the_papers_keep_rate(max_duration, period):
    recorder = TokenRecorder()
    schedule = Cyclic(period=period)
    trainer = train(PatchSamplingSchedule(schedule), max_duration=max_duration, callbacks=recorder)
    assert logged(trainer, "pss/keep_rate") == pytest.approx(CYCLE * 2, abs=1e-12)
    assert logged(trainer, "pss/tokens") == [TOKENS[keep_rate] for keep_rate in CYCLE * 2]
    assert recorder.seen == [(True, TOKENS[keep_rate]) for keep_rate in CYCLE * 2]


@pytest.mark.parametrize("max_duration", ["2ep", "16ba", f"{16 * BATCH_SIZE}sp"])
@pytest.mark.parametrize("cooldown", ["1ep", "8ba", f"{8 * BATCH_SIZE}sp", "0.5dur"])
def test_the_cooldown_ends_training_at_one(max_duration, cooldown):
    trainer = train(PatchSamplingSchedule(Cyclic(cooldown=cooldown)), max_duration=max_duration)
    assert logged(trainer, "pss/keep_rate") == pytest.approx(CYCLE + [1.0] * 8, abs=1e-12)


@pytest.mark.parametrize("schedule", [
    Fixed(0.5), Linear(0.2, 1.0), Cosine(1.0, 0.4, step=None, cooldown="3ba"), Cyclic(0.6, 1.4, step=0.1, period="5ba"),
    Piecewise([("0ep", 0.4), ("3ba", 0.6), ("0.5dur", 0.8), ("60sp", 1.0)]), lambda progress: 0.3 + progress / 2,
], ids=["fixed", "linear", "cosine", "cyclic", "piecewise", "function"])
def test_the_trainer_follows_keep_rates(schedule):
    trainer = train(PatchSamplingSchedule(schedule))
    expected = keep_rates(schedule, epochs=2, batches_per_epoch=8, samples_per_batch=BATCH_SIZE)
    assert logged(trainer, "pss/keep_rate") == expected


@pytest.mark.parametrize("max_duration", ["13ba", f"{13 * BATCH_SIZE}sp", f"{13 * BATCH_SIZE - 1}sp"])
def test_training_that_ends_within_an_epoch(max_duration):
    algorithm = PatchSamplingSchedule(Linear(0.2, 0.2 + 13 * 0.05, step=None))
    trainer = train(algorithm, max_duration=max_duration)
    assert logged(trainer, "pss/keep_rate") == pytest.approx([0.2 + 0.05 * batch for batch in range(13)])


def test_part_of_an_epoch_is_an_epoch():
    trainer = train(PatchSamplingSchedule(Cyclic(0.2, 1.0, step=None)), train_subset_num_batches=4)
    assert logged(trainer, "pss/keep_rate") == pytest.approx([0.2, 0.6, 1.0, 0.6] * 2)


def test_a_second_fit_goes_on_counting():
    trainer = build_trainer(PatchSamplingSchedule(Cyclic()), max_duration="1ep")
    trainer.fit()
    trainer.fit(duration="1ep")
    assert logged(trainer, "pss/keep_rate") == pytest.approx(CYCLE * 2, abs=1e-12)


class _Stream(IterableDataset):
    def __iter__(self):
        return iter(build_dataset())


def test_data_without_a_length():
    algorithm = PatchSamplingSchedule(Cyclic(period="8ba"))
    dataloader = DataLoader(_Stream(), BATCH_SIZE)
    trainer = train(algorithm, train_dataloader=dataloader, max_duration="16ba")
    assert logged(trainer, "pss/keep_rate") == pytest.approx(CYCLE * 2, abs=1e-12)
    with pytest.raises(ValueError, match="'1ep' cannot be counted in batches"):
        train(PatchSamplingSchedule(), train_dataloader=dataloader, max_duration="16ba")


@pytest.mark.parametrize("max_duration", ["3iter", "100tok"])
def test_a_max_duration_without_batches_is_told(max_duration):
    num_tokens = {"get_num_tokens_in_batch": lambda batch: 10}
    with pytest.raises(ValueError, match=f"'{max_duration}' cannot be counted in batches: under a patch sampling sch"):
        train(PatchSamplingSchedule(), train_dataloader=DataSpec(build_dataloader(), **num_tokens),
              max_duration=max_duration)


# evaluation and prediction


@pytest.mark.parametrize("eval_keep_rate", [1.0, 0.5])
def test_evaluation_and_prediction_see_eval_keep_rate_and_training_goes_on(eval_keep_rate):
    recorder = TokenRecorder()
    algorithm = PatchSamplingSchedule(eval_keep_rate=eval_keep_rate)
    evaluation = build_dataloader(shuffle=False)
    trainer = build_trainer(algorithm, callbacks=recorder, eval_dataloader=evaluation, eval_interval="3ba")
    trainer.fit()
    expected = []
    for batch, keep_rate in enumerate(CYCLE * 2, start=1):
        expected.append((True, TOKENS[keep_rate]))
        if batch % 3 == 0 or batch == 16:
            expected += [(False, TOKENS[eval_keep_rate])] * 8
    assert recorder.seen == expected
    assert logged(trainer, "pss/tokens") == [TOKENS[keep_rate] for keep_rate in CYCLE * 2]
    alone = train(PatchSamplingSchedule())
    torch.testing.assert_close(copy_weights(trainer), copy_weights(alone), atol=0, rtol=0)

    recorder.seen.clear()
    trainer.predict(evaluation)
    assert recorder.seen == [(False, TOKENS[eval_keep_rate])] * 8
    assert trainer.state.model.training


class _ForgetfulClassifier(ViTClassifier):
    """Computes its training metrics in a forward pass of their own, in eval mode."""

    def eval_forward(self, batch, outputs=None):
        return self(batch)


def test_the_tokens_of_training_are_logged_when_metrics_take_another_forward_pass():
    model = _ForgetfulClassifier(build_model("vit"))
    trainer = train(PatchSamplingSchedule(), model=model, optimizers=torch.optim.SGD(model.parameters(), lr=0.01))
    assert logged(trainer, "pss/tokens") == [TOKENS[keep_rate] for keep_rate in CYCLE * 2]


# batches in an event's and in a loader's eyes


def test_the_keep_rate_is_set_before_the_batch_is_transformed_and_all_its_passes_share_it():
    """Read by a callback where the batch begins, and at the end of the last of three microbatches."""
    seen = []

    class Reader(Callback):
        def _read(self, state, logger):
            (sampler,) = find_samplers(state.model)
            seen.append((int(state.timestamp.batch), sampler.keep_rate))

        after_dataloader = batch_start = after_train_batch = _read

    train(PatchSamplingSchedule(), callbacks=Reader(), device_train_microbatch_size=2)
    assert seen == [(batch, keep_rate) for batch, keep_rate in enumerate(CYCLE * 2) for _ in range(3)]


@pytest.mark.filterwarnings("ignore:CUDA out of memory or excessive memory allocation:RuntimeWarning")
def test_a_batch_that_ran_out_of_memory_is_trained_again_at_its_keep_rate():
    """Composer's automatic microbatching, which a CPU does not have by itself."""
    class SmallMachine(ViTClassifier):
        def forward(self, batch):
            if len(batch[0]) > 2 and find_samplers(self)[0].keep_rate > 0.5:
                raise RuntimeError("CUDA out of memory")
            return super().forward(batch)

    recorder = TokenRecorder()
    trainer = build_trainer(PatchSamplingSchedule(), model=SmallMachine(build_model("vit")), callbacks=recorder,
                            device_train_microbatch_size=BATCH_SIZE, max_duration="1ep")
    trainer.state.auto_microbatching = True
    trainer.fit()
    # the third batch is the first that does not fit; from then on there are two microbatches
    expected = [TOKENS[keep_rate] for batch, keep_rate in enumerate(CYCLE) for _ in range(1 if batch < 2 else 2)]
    assert [num_tokens for _, num_tokens in recorder.seen] == expected
    assert logged(trainer, "pss/keep_rate") == CYCLE
    assert logged(trainer, "pss/tokens") == [TOKENS[keep_rate] for keep_rate in CYCLE]
