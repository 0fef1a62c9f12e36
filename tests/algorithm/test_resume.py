"""PatchSamplingSchedule resumes bit for bit, with what else this package trains with; checkpoints with and without it.

Composer's own algorithms are in test_composer_algorithms.py.
"""

import logging
from collections.abc import Callable
from dataclasses import dataclass, field

import pytest
import torch
from composer import Callback, Trainer
from composer.algorithms import ChannelsLast, GradientClipping, LabelSmoothing, StochasticDepth
from composer.algorithms.ema.ema import EMAParameters, compute_ema
from support.keep_rates import BATCH_SIZE, CYCLE, TOKENS
from support.models import SMALL, build_model
from support.trainers import TokenRecorder, build_dataloader, build_trainer, copy_weights, logged, train
from timm.layers import DropPath
from timm.models.beit import Beit
from timm.models.vision_transformer import VisionTransformer
from torch import nn

import pss_composer.training.ema
from pss_composer import PatchSamplingSchedule
from pss_composer.schedules import Cyclic, Fixed
from pss_composer.training.mixing import MixUpCutMix

pytestmark = [
    # a checkpoint of an epoch's last batch resumes before that epoch's end: Composer has no batch left for it
    pytest.mark.filterwarnings("ignore:No batches were trained for global rank 0:UserWarning"),
    pytest.mark.filterwarnings("ignore:The ``compute`` method of metric MulticlassAccuracy was called:UserWarning"),
]


@dataclass(frozen=True)
class Setting:
    """A training run under PSS, with what it is combined with."""

    algorithms: Callable[[], list] = list
    sampler: str = "magnitude"
    vit: Callable[[], nn.Module] | str = "vit"
    options: dict = field(default_factory=dict)

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
    "mixup_cutmix": Setting(lambda: [MixUpCutMix(7)]),
    "own_ema_beit": Setting(lambda: [pss_composer.training.ema.EMA(half_life="3ba")], vit="beit", options=EVALUATED),
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


@pytest.mark.filterwarnings("error")
def test_a_checkpoint_without_the_callback_resumes(tmp_path):
    """Of a release whose algorithm logged itself; Composer would warn of a callback that the checkpoint misses."""
    straight = train(PatchSamplingSchedule(), save_folder=str(tmp_path), save_interval="1ba", max_duration="6ba")
    checkpoint = tmp_path / "ep0-ba3-rank0.pt"
    contents = torch.load(checkpoint, weights_only=False)
    del contents["state"]["callbacks"]["SamplerOwner"]
    torch.save(contents, checkpoint)
    resumed = train(PatchSamplingSchedule(), load_path=str(checkpoint), max_duration="6ba")
    torch.testing.assert_close(copy_weights(resumed), copy_weights(straight), atol=0, rtol=0)


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
    assert len(expected) >= 2 and len(seen) == 6 * 8
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
