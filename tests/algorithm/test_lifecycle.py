"""On and off: a trainer gives a model back with keep rates of 1, and one algorithm serves several trainers."""

import copy
import gc
import itertools

import pytest
import torch
from composer import Callback, Evaluator
from support.keep_rates import CYCLE, TOKENS
from support.models import build_model
from support.trainers import TokenRecorder, build_dataloader, build_trainer, find_vit, logged, train

from pss_composer import PatchSampler, PatchSamplingSchedule, apply_patch_sampling, remove_patch_sampling
from pss_composer.models.classifier import ViTClassifier
from pss_composer.schedules import Cyclic, Fixed
from pss_composer.surgery import find_samplers

numbers = itertools.count()
EVALUATION = dict(eval_dataloader=build_dataloader(shuffle=False), eval_interval="100ep")


def build_classifier(name="vit"):
    return ViTClassifier(build_model(name))


def keep_rates(model):
    (sampler,) = find_samplers(model)
    return sampler.keep_rate, sampler.eval_keep_rate


def count_tokens(trainer):
    """Tokens of every pass of a `fit` of two batches and of an `eval`, by a hook that is removed again."""
    seen = []
    handle = find_vit(trainer.state.model).blocks[0].register_forward_pre_hook(
        lambda block, arguments: seen.append((block.training, arguments[0].shape[1]))
    )
    trainer.fit(duration="2ba")
    label = f"evaluation {next(numbers)}"  # Composer warns of a label that comes again
    trainer.eval(Evaluator(label=label, dataloader=build_dataloader(shuffle=False)), subset_num_batches=1)
    handle.remove()
    return seen


def see_all(model):
    """Whether a trainer without PSS sees every token in training and evaluation."""
    trainer = build_trainer([], model=model)
    seen = count_tokens(trainer)
    trainer.close()
    return seen == [(True, TOKENS[1.0])] * 2 + [(False, TOKENS[1.0])]


class Stop(Callback):
    def __init__(self, error):
        self.error = error

    def after_forward(self, state, logger):
        if state.timestamp.batch == 2:
            raise self.error


@pytest.mark.parametrize("name", ["vit", "beit"])
def test_fit_and_the_trainers_end_leave_no_keep_rate(name):
    model = build_classifier(name)
    trainer = build_trainer(PatchSamplingSchedule(eval_keep_rate=0.5), model=model, max_duration="3ba")
    assert keep_rates(model) == (1.0, 0.5)
    trainer.fit()
    assert logged(trainer, "pss/keep_rate") == CYCLE[:3]
    assert keep_rates(model) == (1.0, 0.5)
    trainer.close()
    assert keep_rates(model) == (1.0, 1.0)
    assert see_all(model)


def test_evaluation_after_fit_and_a_second_fit():
    trainer = build_trainer(PatchSamplingSchedule(eval_keep_rate=0.5), max_duration="3ba", **EVALUATION)
    trainer.fit()
    recorder = TokenRecorder()
    recorder.after_load(trainer.state, None)
    trainer.eval()
    assert recorder.seen == [(False, TOKENS[0.5])] * 8
    recorder.seen.clear()
    trainer.fit(duration="2ba")
    assert recorder.seen[:2] == [(True, TOKENS[0.8]), (True, TOKENS[1.0])]
    assert set(recorder.seen[2:]) == {(False, TOKENS[0.5])}
    recorder.seen.clear()
    trainer.predict(build_dataloader(shuffle=False), subset_num_batches=1)
    assert recorder.seen == [(False, TOKENS[0.5])]


@pytest.mark.parametrize("error", [RuntimeError("stop"), KeyboardInterrupt()], ids=["error", "interrupt"])
@pytest.mark.parametrize("way", ["close", "collect"])
def test_a_fit_that_is_stopped(error, way):
    model = build_classifier()
    trainer = build_trainer(PatchSamplingSchedule(eval_keep_rate=0.5), model=model, callbacks=Stop(error))
    with pytest.raises(type(error)) as caught:
        trainer.fit()
    assert keep_rates(model) == (0.6, 0.5)
    if way == "close":
        trainer.close()
    else:
        caught.value.__traceback__ = None
        del trainer, caught, error
        gc.collect()
    assert keep_rates(model) == (1.0, 1.0)
    assert see_all(model)


def test_a_trainer_that_fails_to_start():
    model = build_classifier()
    with pytest.raises(FileNotFoundError):
        build_trainer(PatchSamplingSchedule(eval_keep_rate=0.5), model=model, load_path="missing.pt")
    assert keep_rates(model) == (1.0, 1.0)


@pytest.mark.parametrize("way", ["close", "collect"])
def test_an_old_trainer_that_ends_late_leaves_the_new_one_alone(way):
    model = build_classifier()
    old = build_trainer(PatchSamplingSchedule(Fixed(0.2), eval_keep_rate=0.4), model=model, max_duration="2ba")
    old.fit()

    class EndOld(Callback):
        def after_dataloader(self, state, logger):
            nonlocal old
            if old is not None and way == "close":
                old.close()
            old = None
            gc.collect()

    recorder = TokenRecorder()
    new = build_trainer(PatchSamplingSchedule(Fixed(0.6), eval_keep_rate=0.8), model=model, max_duration="2ba",
                        callbacks=[EndOld(), recorder], **EVALUATION)
    new.fit()
    assert recorder.seen == [(True, TOKENS[0.6])] * 2 + [(False, TOKENS[0.8])] * 8
    assert keep_rates(model) == (1.0, 0.8)
    new.close()
    assert keep_rates(model) == (1.0, 1.0)


def test_an_old_trainer_that_ends_late_leaves_nothing_to_one_without():
    model = build_classifier()
    old = build_trainer(PatchSamplingSchedule(eval_keep_rate=0.5), model=model, max_duration="2ba")
    old.fit()
    new = build_trainer([], model=model)
    del old
    gc.collect()
    assert {num_tokens for _, num_tokens in count_tokens(new)} == {TOKENS[1.0]}


def test_trainers_take_turns_with_one_model():
    model = build_classifier()
    one = build_trainer(PatchSamplingSchedule(Fixed(0.2), eval_keep_rate=0.4), model=model, max_duration="2ba")
    two = build_trainer(PatchSamplingSchedule(Fixed(0.6), eval_keep_rate=0.8), model=model, max_duration="2ba")
    for trainer, keep_rate, eval_keep_rate in ((one, 0.2, 0.4), (two, 0.6, 0.8), (one, 0.2, 0.4)):
        seen = count_tokens(trainer)
        assert seen == [(True, TOKENS[keep_rate])] * 2 + [(False, TOKENS[eval_keep_rate])]
    two.predict(build_dataloader(), subset_num_batches=1)
    assert keep_rates(model) == (1.0, 0.8)


def test_one_object_serves_two_trainers():
    algorithm = PatchSamplingSchedule(Cyclic(), eval_keep_rate=0.5)
    first = train(algorithm, max_duration="1ep")
    one, two = (build_trainer(algorithm, vit=name, max_duration="3ba") for name in ("vit", "beit"))
    one.fit()
    two.fit()
    one.fit(duration="5ba")
    two.fit(duration="5ba")
    for trainer in (first, one, two):
        assert logged(trainer, "pss/keep_rate") == CYCLE
        assert logged(trainer, "pss/tokens") == [TOKENS[keep_rate] for keep_rate in CYCLE]
    one.close()
    assert (keep_rates(one.state.model), keep_rates(two.state.model)) == ((1.0, 1.0), (1.0, 0.5))


def test_a_setting_of_the_users_own_lives_as_long_as_the_trainer():
    trainer = build_trainer(PatchSamplingSchedule(), max_duration="2ba", **EVALUATION)
    (sampler,) = find_samplers(trainer.state.model)
    sampler.eval_keep_rate = 0.5
    trainer.fit()
    trainer.eval()
    assert sampler.num_tokens == TOKENS[0.5]


def test_two_of_them_are_refused():
    model = build_classifier()
    algorithms = [PatchSamplingSchedule(Fixed(0.2)), PatchSamplingSchedule(Fixed(0.4), sampler="random")]
    with pytest.raises(ValueError, match="algorithms must hold one PatchSamplingSchedule at most, got .*Fixed.*0.2"):
        build_trainer(algorithms, model=model)
    assert not find_samplers(model)


@pytest.mark.parametrize("name", ["vit", "beit", "beit_shared"])
def test_removed_after_training(name):
    model = build_classifier(name)
    trainer = build_trainer(PatchSamplingSchedule(eval_keep_rate=0.5), model=model, max_duration="3ba")
    trainer.fit()
    untouched = build_classifier(name)
    untouched.load_state_dict(model.state_dict())
    remove_patch_sampling(model)
    images = torch.randn(2, 3, 32, 32)
    assert torch.equal(model.eval()((images, None)), untouched.eval()((images, None)))
    assert not find_samplers(model)
    recorder = TokenRecorder()
    recorder.after_load(trainer.state, None)
    trainer.eval(build_dataloader())
    assert set(recorder.seen) == {(False, TOKENS[1.0])}
    trainer.fit(duration="1ba")  # the algorithm is still there
    assert recorder.seen[-1] == (True, TOKENS[0.8])
    trainer.close()


def test_a_copy_of_the_model_is_nobodys():
    trainer = build_trainer(PatchSamplingSchedule(eval_keep_rate=0.5), max_duration="2ba")
    trainer.fit()
    twin = copy.deepcopy(find_vit(trainer.state.model))
    trainer.close()
    assert keep_rates(twin) == (1.0, 0.5)
    assert keep_rates(trainer.state.model) == (1.0, 1.0)


def test_a_model_with_a_sampler_of_its_own():
    model = build_classifier()
    sampler = apply_patch_sampling(model, sampler="random", keep_rate=0.2, eval_keep_rate=0.4)
    trainer = train(PatchSamplingSchedule(Fixed(0.6)), model=model, max_duration="2ba")
    assert logged(trainer, "pss/tokens") == [TOKENS[0.6]] * 2
    assert (sampler.sampler, *keep_rates(model)) == ("magnitude", 1.0, 1.0)


@pytest.mark.parametrize("name", ["vit", "beit", "beit_shared"])
def test_removed_from_modules_with_a_class_on_top(name):
    """As torch's FSDP2 puts one on every module that it shards."""
    class Sharded:
        pass

    models = build_model(name), build_model(name)
    apply_patch_sampling(models[0])
    for model in models:
        for module in model.modules():
            if not isinstance(module, PatchSampler):
                module.__class__ = type(f"Sharded{type(module).__name__}", (Sharded, type(module)), {"tag": 7})
    remove_patch_sampling(models[0])
    removed, untouched = ([(path, type(module).__name__, type(module).__mro__[1:], type(module).tag)
                           for path, module in model.named_modules() if path != "patch_drop"] for model in models)
    assert removed == untouched
