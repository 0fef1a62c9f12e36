"""PatchSamplingSchedule in Composer's Trainer: keep rates, resumption, and the algorithms it is combined with.

Expected keep rates are written out by hand: with 8 batches in an epoch the paper's Cyclic(0.2, 1.0) is CYCLE.
"""

import functools
import logging
from collections.abc import Callable
from dataclasses import dataclass, field

import pytest
import torch
from composer import Callback, DataSpec, Trainer
from composer.algorithms import (
    EMA,
    SAM,
    ChannelsLast,
    CutMix,
    GradientClipping,
    LabelSmoothing,
    MixUp,
    StochasticDepth,
)
from composer.algorithms.ema.ema import EMAParameters, compute_ema
from composer.loggers import InMemoryLogger
from composer.models import ComposerClassifier
from composer.utils import dist
from support.models import SMALL, build_model, random_images
from timm.layers import DropPath
from timm.models.beit import Beit
from timm.models.vision_transformer import VisionTransformer
from torch import nn
from torch.utils.data import DataLoader, Dataset, IterableDataset, TensorDataset

import pss_composer.training.ema
from pss_composer import PatchSampler, PatchSamplingSchedule
from pss_composer.models.classifier import ViTClassifier
from pss_composer.schedules import Cosine, Cyclic, Fixed, Linear, Piecewise, keep_rates
from pss_composer.training.mixing import MixUpCutMix

pytestmark = [
    # a checkpoint of an epoch's last batch resumes before that epoch's end: Composer has no batch left for it
    pytest.mark.filterwarnings("ignore:No batches were trained for global rank 0:UserWarning"),
    pytest.mark.filterwarnings("ignore:The ``compute`` method of metric MulticlassAccuracy was called:UserWarning"),
    pytest.mark.filterwarnings("ignore:SAM has known issues of weight mismatch when loading:UserWarning"),
]

BATCH_SIZE = 4
CYCLE = [0.2, 0.4, 0.6, 0.8, 1.0, 0.8, 0.6, 0.4]
# of 64 patches and a class token: 0.2 * 65 = 13, ...
TOKENS = {0.2: 13, 0.4: 26, 0.5: 32, 0.6: 39, 0.8: 52, 1.0: 65}


def build_dataset(num_samples: int = 8 * BATCH_SIZE) -> Dataset:
    labels = torch.randint(7, (num_samples,), generator=torch.Generator().manual_seed(2))
    return TensorDataset(random_images(num_samples), labels)


def build_dataloader(dataset: Dataset | None = None, *, shuffle: bool = True) -> DataLoader:
    dataset = build_dataset() if dataset is None else dataset
    return DataLoader(dataset, BATCH_SIZE, sampler=dist.get_sampler(dataset, shuffle=shuffle))


class TokenRecorder(Callback):
    """Counts, with a hook of its own, the tokens that enter the first block in every forward pass."""

    def __init__(self) -> None:
        self.seen: list[tuple[bool, int]] = []

    def after_load(self, state, logger) -> None:
        vit = next(module for module in state.model.modules() if isinstance(module, VisionTransformer | Beit))
        vit.blocks[0].register_forward_pre_hook(
            lambda block, arguments: self.seen.append((block.training, arguments[0].shape[1]))
        )


def build_trainer(algorithms, *, vit: str | nn.Module = "vit", lr: float = 1e-3, **options) -> Trainer:
    model = ViTClassifier(build_model(vit) if isinstance(vit, str) else vit)
    arguments = dict(
        model=model,
        train_dataloader=build_dataloader(),
        max_duration="2ep",
        algorithms=algorithms,
        optimizers=torch.optim.AdamW(model.parameters(), lr=lr),
        device="cpu",
        seed=17,
        progress_bar=False,
        loggers=InMemoryLogger(),
    )
    return Trainer(**(arguments | options))


def train(*arguments, **options) -> Trainer:
    trainer = build_trainer(*arguments, **options)
    trainer.fit()
    trainer.close()
    return trainer


def logged(trainer: Trainer, name: str) -> list[float]:
    (logger,) = (d for d in trainer.logger.destinations if isinstance(d, InMemoryLogger))
    return [float(value) for _, value in logger.data[name]]


def copy_weights(trainer: Trainer) -> dict[str, torch.Tensor]:
    return {name: value.clone() for name, value in trainer.state.model.state_dict().items()}


@pytest.fixture(autouse=True, scope="module")
def _one_thread():
    """A model this small gains nothing by more, and on a busy machine threads wait for each other."""
    num_threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(num_threads)


# keep rates


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


# what is logged, told and refused


class _HyperparameterRecorder(InMemoryLogger):
    def __init__(self):
        super().__init__()
        self.calls = []

    def log_hyperparameters(self, hyperparameters):
        self.calls.append((hyperparameters, self.state.timestamp.batch.value))


def test_what_was_changed_is_logged_once():
    recorder = _HyperparameterRecorder()
    train(PatchSamplingSchedule(Fixed(0.6)), loggers=recorder, max_duration="2ba")
    calls = [(call, batch) for call, batch in recorder.calls if "pss/slot" in call]
    algorithm = "PatchSamplingSchedule(schedule=Fixed(keep_rate=0.6), sampler='magnitude', eval_keep_rate=1.0)"
    assert calls == [({"pss/slot": "module.patch_drop", "pss/algorithm": algorithm}, 0)]


def test_the_loss_and_the_keep_rate_of_a_batch_are_logged_at_the_same_step():
    class StepRecorder(InMemoryLogger):
        def __init__(self):
            super().__init__()
            self.steps = {}

        def log_metrics(self, metrics, step=None):
            for name in metrics:
                self.steps.setdefault(name, []).append(step)

    recorder = StepRecorder()
    train(PatchSamplingSchedule(), loggers=recorder, max_duration="3ba")
    for name in ("pss/keep_rate", "pss/tokens", "loss/train/total"):
        assert recorder.steps[name] == [0, 1, 2]


@pytest.mark.parametrize("module", [nn.Linear(4, 4), nn.Sequential(nn.Conv2d(3, 4, 3), nn.ReLU())])
def test_a_model_that_is_no_vit(module):
    model = ComposerClassifier(module, num_classes=4)
    with pytest.raises(TypeError, match="no patch sampling slot known for ComposerClassifier .of .*; supported: timm"):
        build_trainer(PatchSamplingSchedule(), model=model, optimizers=torch.optim.SGD(model.parameters(), lr=0.01))


@pytest.mark.parametrize(("arguments", "message"), [
    ({"schedule": 0.5}, "schedule must be a schedule or a function of training progress, got 0.5"),
    ({"schedule": "cyclic"}, "schedule must be a schedule or a function of training progress, got 'cyclic'"),
    ({"sampler": "largest"}, "sampler must be one of magnitude, l2_magnitude, random or a function .*, got 'largest'"),
    ({"sampler": None}, "sampler must be one of .*, got None"),
    ({"eval_keep_rate": 0.0}, r"eval_keep_rate must be a number in \(0, 1\], got 0.0"),
    ({"eval_keep_rate": 1.1}, r"eval_keep_rate must be a number in \(0, 1\], got 1.1"),
    ({"eval_keep_rate": True}, r"eval_keep_rate must be a number in \(0, 1\], got True"),
    ({"eval_keep_rate": "1"}, r"eval_keep_rate must be a number in \(0, 1\], got '1'"),
])
def test_bad_arguments(arguments, message):
    with pytest.raises(ValueError, match=message):
        PatchSamplingSchedule(**arguments)


@pytest.mark.parametrize("result", [0.0, -0.5, 1.25, float("nan"), None, "0.5"])
def test_a_schedule_must_return_a_keep_rate(result):
    def schedule(progress):
        return result if progress.batch == 2 else 0.5

    with pytest.raises(ValueError, match=r"the schedule's result must be a number in \(0, 1\], got "):
        train(PatchSamplingSchedule(schedule))


def keep_half(progress):
    return 0.5


def keep_first(tokens, k):
    return torch.arange(k).expand(len(tokens), -1)


class KeepHalf:
    def __call__(self, *arguments):
        return 0.5


@dataclass
class KeepFixed:
    keep_rate: float

    def __call__(self, progress):
        return self.keep_rate

    def __hash__(self):
        return 0


def _is_the_same(one: PatchSamplingSchedule, other: PatchSamplingSchedule) -> bool:
    return (one.schedule, one.sampler, one.eval_keep_rate) == (other.schedule, other.sampler, other.eval_keep_rate)


@pytest.mark.parametrize("arguments", [
    {}, {"schedule": Linear(0.4, step=None, cooldown="3ba"), "sampler": "random", "eval_keep_rate": 0.8},
    {"schedule": Piecewise([("0ba", 0.5), ("2ba", 1)])}, {"schedule": keep_half}, {"sampler": keep_first},
    {"schedule": KeepFixed(0.3)},
], ids=["default", "linear", "piecewise", "schedule_function", "sampler_function", "schedule_object"])
def test_repr_rebuilds_the_object(arguments):
    algorithm = PatchSamplingSchedule(**arguments)
    assert " at 0x" not in repr(algorithm)
    here = type("module", (), {"keep_half": staticmethod(keep_half), "keep_first": staticmethod(keep_first)})
    package, *names = __name__.split(".")
    for name in reversed(names):
        here = type("module", (), {name: here})
    rebuilt = eval(repr(algorithm), globals() | {package: here})
    assert _is_the_same(rebuilt, algorithm) and repr(rebuilt) == repr(algorithm)


@pytest.mark.parametrize("function", [
    lambda *arguments: 0.5, KeepHalf(), functools.partial(keep_first), KeepHalf().__call__, torch.topk,
], ids=["lambda", "object", "partial", "method", "builtin"])
def test_repr_holds_no_memory_address(function):
    assert " at 0x" not in repr(PatchSamplingSchedule(function, sampler=function))
    assert " at 0x" not in repr(PatchSampler(function))


def test_functions_as_schedule_and_sampler_train_and_resume(tmp_path):
    def build(**options):
        return build_trainer(PatchSamplingSchedule(keep_half, sampler=keep_first), **options)

    straight = build(save_folder=str(tmp_path), save_interval="1ba", max_duration="6ba")
    straight.fit()
    assert logged(straight, "pss/tokens") == [TOKENS[0.5]] * 6
    resumed = build(load_path=str(tmp_path / "ep0-ba3-rank0.pt"), max_duration="6ba")
    resumed.fit()
    torch.testing.assert_close(copy_weights(resumed), copy_weights(straight), atol=0, rtol=0)


# combinations: one table, three tests


@dataclass(frozen=True)
class Setting:
    """A training run under PSS, with what it is combined with."""

    algorithms: Callable[[], list] = list
    sampler: str = "magnitude"
    vit: Callable[[], nn.Module] | str = "vit"
    options: dict = field(default_factory=dict)
    is_resumable: bool = True

    def build_trainer(self, **options) -> Trainer:
        torch.manual_seed(3)
        vit = self.vit if isinstance(self.vit, str) else self.vit()
        algorithms = [PatchSamplingSchedule(Cyclic(), sampler=self.sampler), *self.algorithms()]
        return build_trainer(algorithms, vit=vit, **self.options, **options)


DROP = dict(proj_drop_rate=0.1, attn_drop_rate=0.1, drop_path_rate=0.3)
EVALUATED = {"eval_dataloader": build_dataloader(shuffle=False), "eval_interval": "3ba"}
SETTINGS = {
    "magnitude": Setting(),
    "random": Setting(sampler="random"),
    "random_beit": Setting(sampler="random", vit="beit"),
    "mixup": Setting(lambda: [MixUp()]),
    "cutmix": Setting(lambda: [CutMix()]),
    "mixup_cutmix": Setting(lambda: [MixUpCutMix(7)]),
    "label_smoothing": Setting(lambda: [LabelSmoothing(0.1)]),
    "ema": Setting(lambda: [EMA(half_life="3ba", update_interval="1ba")], options=EVALUATED),
    "own_ema_beit": Setting(lambda: [pss_composer.training.ema.EMA(half_life="3ba")], vit="beit", options=EVALUATED),
    "gradient_clipping": Setting(lambda: [GradientClipping("norm", 0.1)]),
    "channels_last": Setting(lambda: [ChannelsLast()]),
    # Composer's own warning: SAM's optimizer state does not load
    "sam": Setting(lambda: [SAM()], is_resumable=False),
    "drop_path": Setting(vit=lambda: VisionTransformer(**SMALL, drop_path_rate=0.5)),
    "dropout_random": Setting(sampler="random", vit=lambda: VisionTransformer(**SMALL, **DROP)),
    "dropout_beit": Setting(vit=lambda: Beit(**SMALL, **DROP, use_rel_pos_bias=True, init_values=0.1)),
    "accumulation": Setting(options={"device_train_microbatch_size": 1}),
    "everything": Setting(
        lambda: [MixUpCutMix(7), LabelSmoothing(0.1), GradientClipping("norm", 1.0), ChannelsLast(),
                 pss_composer.training.ema.EMA(half_life="3ba")],
        sampler="random", vit=lambda: VisionTransformer(**SMALL, **DROP),
        options={"device_train_microbatch_size": 2, **EVALUATED},
    ),
}
STOPS = [(0, 1), (0, 4), (0, 8), (1, 11), (1, 15)]


@pytest.fixture(scope="module", params=SETTINGS)
def straight(request, tmp_path_factory):
    """A run without a stop, its setting, its folder with a checkpoint of every batch, and its weights at the start."""
    folder = tmp_path_factory.mktemp(request.param)
    setting = SETTINGS[request.param]
    recorder = TokenRecorder()
    trainer = setting.build_trainer(
        save_folder=str(folder), save_interval="1ba", save_num_checkpoints_to_keep=-1, callbacks=recorder
    )
    start = copy_weights(trainer)
    trainer.fit()
    trainer.close()
    return trainer, setting, folder, start, recorder


@pytest.mark.slow
def test_trains(straight):
    trainer, setting, _, start, recorder = straight
    assert logged(trainer, "pss/keep_rate") == pytest.approx(CYCLE * 2, abs=1e-12)
    num_forward = BATCH_SIZE // setting.options.get("device_train_microbatch_size", BATCH_SIZE)
    num_forward *= 2 if any(isinstance(algorithm, SAM) for algorithm in trainer.state.algorithms) else 1
    # all microbatches of a batch see the same number of tokens
    expected = [TOKENS[keep_rate] for keep_rate in CYCLE * 2 for _ in range(num_forward)]
    assert [num_tokens for is_training, num_tokens in recorder.seen if is_training] == expected
    assert {num_tokens for is_training, num_tokens in recorder.seen if not is_training} <= {65}
    losses = logged(trainer, "loss/train/total")
    assert len(losses) == 16 and torch.tensor(losses).isfinite().all()
    end = copy_weights(trainer)
    assert all(end[name].isfinite().all() for name in end)
    assert [name for name in end if torch.equal(start[name], end[name])] == []


@pytest.mark.parametrize(("epoch", "batch"), STOPS)
@pytest.mark.slow
def test_resumes_bit_for_bit(straight, epoch, batch):
    trainer, setting, folder, _, _ = straight
    if not setting.is_resumable:
        pytest.skip("Composer's algorithm does not resume")
    resumed = setting.build_trainer(load_path=str(folder / f"ep{epoch}-ba{batch}-rank0.pt"))
    resumed.fit()
    resumed.close()
    torch.testing.assert_close(copy_weights(resumed), copy_weights(trainer), atol=0, rtol=0)
    for name in ("pss/keep_rate", "pss/tokens", "loss/train/total"):
        assert logged(resumed, name) == logged(trainer, name)[batch:]


@pytest.mark.slow
def test_resumes_from_the_end_of_an_epoch(tmp_path):
    setting = SETTINGS["dropout_random"]
    straight = setting.build_trainer(save_folder=str(tmp_path), save_interval="1ep")
    straight.fit()
    resumed = setting.build_trainer(load_path=str(tmp_path / "ep1-ba8-rank0.pt"))
    resumed.fit()
    torch.testing.assert_close(copy_weights(resumed), copy_weights(straight), atol=0, rtol=0)
    assert logged(resumed, "pss/keep_rate") == pytest.approx(CYCLE, abs=1e-12)


# checkpoints with and without PSS


@pytest.mark.parametrize("name", ["vit", "beit"])
def test_checkpoints_load_with_and_without(name, tmp_path):
    for folder, algorithms in (("pss", [PatchSamplingSchedule(eval_keep_rate=0.6)]), ("plain", [])):
        trainer = train(algorithms, vit=name, max_duration="3ba", save_folder=str(tmp_path / folder))
        weights = copy_weights(trainer)
        checkpoint = tmp_path / folder / "ep0-ba3-rank0.pt"
        loaded = torch.load(checkpoint, weights_only=False)["state"]["model"]
        vit = build_model(name, seed=5)
        vit.load_state_dict({key.removeprefix("module."): value for key, value in loaded.items()}, strict=True)
        for other in ([PatchSamplingSchedule()], []):
            trainer = build_trainer(other, vit=build_model(name, seed=5), load_path=str(checkpoint),
                                    load_weights_only=True, load_strict_model_weights=True)
            torch.testing.assert_close(copy_weights(trainer), weights, atol=0, rtol=0)
            trainer.fit()
            assert trainer.state.timestamp.batch == 16


# gradient accumulation


class _GradientRecorder(Callback):
    def __init__(self):
        self.gradients = []

    def after_train_batch(self, state, logger):
        self.gradients.append([parameter.grad.clone() for parameter in state.model.parameters()])


@pytest.mark.parametrize("name", ["vit", "beit", "beit_shared"])
@pytest.mark.parametrize("microbatch_size", [1, 2, 3])
def test_accumulated_gradients_are_those_of_the_whole_batch(name, microbatch_size):
    whole, accumulated = _GradientRecorder(), _GradientRecorder()
    for recorder, size in ((whole, BATCH_SIZE), (accumulated, microbatch_size)):
        train(PatchSamplingSchedule(), vit=name, lr=0.0, callbacks=recorder, device_train_microbatch_size=size,
              max_duration="1ep")
    assert len(whole.gradients) == len(accumulated.gradients) == 8
    for expected, gradients in zip(whole.gradients, accumulated.gradients, strict=True):
        scale = max(gradient.abs().max() for gradient in expected)
        for one, other in zip(expected, gradients, strict=True):
            torch.testing.assert_close(other / scale, one / scale, atol=1e-6, rtol=0)


# Composer's StochasticDepth and EMA


def test_stochastic_depth_of_composer_leaves_a_vit_alone_and_drop_path_does_its_job(caplog):
    """It replaces ResNet's bottlenecks alone. timm has the same method as drop path."""
    with caplog.at_level(logging.WARNING):
        trainer = train([PatchSamplingSchedule(), StochasticDepth("ResNetBottleneck")])
    assert "No ResNetBottleneck found in model! Algorithm will function as a no-op." in caplog.text
    alone = train(PatchSamplingSchedule())
    torch.testing.assert_close(copy_weights(trainer), copy_weights(alone), atol=0, rtol=0)

    vit = VisionTransformer(**SMALL, drop_path_rate=0.5)
    trainer = build_trainer(PatchSamplingSchedule(Fixed(0.4)), vit=vit)
    dropped = []
    for module in vit.modules():
        if isinstance(module, DropPath):
            module.register_forward_hook(
                lambda module, inputs, output: dropped.append((output == 0).flatten(1).all(dim=1).float().mean())
            )
    trainer.fit()
    # two places in the last block, 16 batches of 4 images, half of which are dropped: 3 standard deviations
    assert len(dropped) == 32 and abs(torch.stack(dropped).mean() - 0.5) < 3 * 0.5 / 128**0.5


def test_ema_leaves_integer_buffers_alone():
    """Composer's moves Beit's relative position indices; if it no longer does, pss_composer.ema may go."""
    model = build_model("beit")
    parameters = EMAParameters(model)
    compute_ema(model, parameters, smoothing=0.9)
    name = "blocks.0.attn.relative_position_index"
    assert not torch.equal(parameters.named_buffers_dict[name], model.get_buffer(name))

    seen = []

    class IndexRecorder(Callback):
        def eval_batch_start(self, state, logger):
            seen.append([buffer.clone() for buffer in state.model.buffers() if not buffer.is_floating_point()])

    ema = pss_composer.training.ema.EMA(half_life=None, smoothing=0.9, update_interval="1ba")
    trainer = build_trainer([PatchSamplingSchedule(), ema], vit="beit", callbacks=IndexRecorder(), **EVALUATED)
    expected = [buffer.clone() for buffer in trainer.state.model.buffers() if not buffer.is_floating_point()]
    trainer.fit()
    assert len(expected) >= 3 and len(seen) == 6 * 8
    assert all(torch.equal(a, b) for buffers in seen for a, b in zip(buffers, expected, strict=True))


@pytest.mark.parametrize("name", ["vit", "beit"])
def test_ema_averages_the_weights(name):
    """Against the average taken by hand."""
    weights = []

    class WeightRecorder(Callback):
        def batch_end(self, state, logger):
            weights.append([parameter.detach().clone() for parameter in state.model.parameters()])

    ema = pss_composer.training.ema.EMA(half_life=None, smoothing=0.75, update_interval="1ba")
    trainer = train([PatchSamplingSchedule(), ema], vit=name, callbacks=WeightRecorder(), max_duration="6ba")
    average = weights[0]
    for new in weights[1:]:
        average = [0.75 * a + 0.25 * w for a, w in zip(average, new, strict=True)]
    names = [parameter_name for parameter_name, _ in trainer.state.model.named_parameters()]
    torch.testing.assert_close(ema.ema_model.named_parameters_dict, dict(zip(names, average, strict=True)))
