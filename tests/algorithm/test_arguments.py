"""PatchSamplingSchedule's arguments: what is refused, what its repr and its logs say."""

import copy
import functools
import pickle
from dataclasses import dataclass

import pytest
import torch
from composer.loggers import InMemoryLogger
from composer.models import ComposerClassifier
from support.keep_rates import TOKENS
from support.trainers import build_trainer, copy_weights, logged, train
from torch import nn

from pss_composer import PatchSampler, PatchSamplingSchedule
from pss_composer.schedules import Cyclic, Fixed, Linear, Piecewise


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
    with pytest.raises(TypeError, match="cannot drop patch tokens in .*ComposerClassifier"):
        build_trainer(PatchSamplingSchedule(), model=model, optimizers=torch.optim.SGD(model.parameters(), lr=0.01))


@pytest.mark.parametrize(("arguments", "message"), [
    ({"schedule": 0.5}, "schedule must be a schedule or a function of training progress, got 0.5"),
    ({"schedule": "cyclic"}, "schedule must be a schedule or a function of training progress, got 'cyclic'"),
    ({"schedule": Cyclic}, "schedule must be a schedule .* got the class Cyclic: an object of it is Cyclic()"),
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


@pytest.mark.parametrize("duplicate", [copy.deepcopy, lambda algorithm: pickle.loads(pickle.dumps(algorithm))])
def test_training_leaves_no_trace_in_the_object(duplicate):
    algorithm = PatchSamplingSchedule(KeepFixed(0.5), sampler=keep_first, eval_keep_rate=0.8)
    before = dict(vars(algorithm))
    train(algorithm, max_duration="2ba")
    assert vars(algorithm) == before
    twin = duplicate(algorithm)
    assert repr(twin) == repr(algorithm) and (twin.eval_keep_rate, twin.schedule.keep_rate) == (0.8, 0.5)
    assert logged(train(twin, max_duration="2ba"), "pss/tokens") == [TOKENS[0.5]] * 2


def test_functions_as_schedule_and_sampler_train_and_resume(tmp_path):
    def build(**options):
        return build_trainer(PatchSamplingSchedule(keep_half, sampler=keep_first), **options)

    straight = build(save_folder=str(tmp_path), save_interval="1ba", max_duration="6ba")
    straight.fit()
    assert logged(straight, "pss/tokens") == [TOKENS[0.5]] * 6
    resumed = build(load_path=str(tmp_path / "ep0-ba3-rank0.pt"), max_duration="6ba")
    resumed.fit()
    torch.testing.assert_close(copy_weights(resumed), copy_weights(straight), atol=0, rtol=0)
