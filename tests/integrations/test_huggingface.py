"""The Hugging Face Trainer's callback, under transformers 4.57 and 5. Expected keep rates are written out by hand."""

import json

import pytest
import torch
from support.keep_rates import BATCH_SIZE, CYCLE, CYCLE_OF_3, CYCLE_OF_4, TOKENS
from support.models import SMALL, build_model, random_images
from timm.models.vision_transformer import VisionTransformer
from torch import nn
from torch.nn.functional import cross_entropy
from torch.utils.data import Dataset, IterableDataset
from torchvision.models import resnet18
from transformers import Trainer, TrainerCallback, TrainingArguments, ViTConfig, ViTForImageClassification

from pss_composer import remove_patch_sampling
from pss_composer.integrations.transformers import PatchSamplingCallback
from pss_composer.schedules import Cyclic, Fixed, Linear, Piecewise
from pss_composer.surgery import find_samplers


class Classifier(nn.Module):
    """A ViT as the Trainer wants it; notes the tokens that enter its first block in every forward pass."""

    def __init__(self, vit=None):
        super().__init__()
        self.vit = vit or build_model("vit")
        self.seen = []

    def forward(self, pixel_values, labels):
        handle = find_first_block(self.vit).register_forward_pre_hook(
            lambda block, arguments: self.seen.append((block.training, arguments[0].shape[1])))
        logits = self.vit(pixel_values)
        logits = getattr(logits, "logits", logits)
        handle.remove()
        return {"loss": cross_entropy(logits, labels), "logits": logits}

    def tokens(self, *, training=True):
        return [tokens for is_training, tokens in self.seen if is_training == training]


def find_first_block(vit):
    return vit.blocks[0] if hasattr(vit, "blocks") else next(
        module for module in vit.modules() if isinstance(module, nn.ModuleList))[0]


def build_hf_vit():
    torch.manual_seed(0)
    return ViTForImageClassification(ViTConfig(
        image_size=32, patch_size=4, hidden_size=32, num_hidden_layers=2, num_attention_heads=4, intermediate_size=64,
        num_labels=7, hidden_dropout_prob=0.1))


class Images(Dataset):
    def __init__(self, num_samples=8 * BATCH_SIZE):
        self.images = random_images(num_samples)
        self.labels = torch.randint(7, (num_samples,), generator=torch.Generator().manual_seed(2))

    def __len__(self):
        return len(self.labels)

    def __getitem__(self, index):
        return {"pixel_values": self.images[index], "labels": self.labels[index]}


class Stream(IterableDataset):
    def __iter__(self):
        images = Images()
        return (images[index] for index in range(len(images)))


class Notes(TrainerCallback):
    """What callbacks behind PSS get to log."""

    def __init__(self):
        self.logs = []

    def on_log(self, args, state, control, logs, **_):
        self.logs.append(logs)


@pytest.fixture
def build(tmp_path):
    """Builds a trainer."""
    def build(*callbacks, model=None, data=None, model_init=None, eval_dataset=None, **options):
        arguments = dict(output_dir=tmp_path, num_train_epochs=2, per_device_train_batch_size=BATCH_SIZE, seed=3,
                         per_device_eval_batch_size=BATCH_SIZE, logging_steps=1, save_strategy="no", report_to="none",
                         use_cpu=True, disable_tqdm=True, dataloader_pin_memory=False)
        return Trainer(
            model=None if model_init else model or Classifier(),
            args=TrainingArguments(**arguments | options),
            train_dataset=Images() if data is None else data,
            eval_dataset=eval_dataset,
            model_init=model_init,
            callbacks=list(callbacks),
        )
    return build


@pytest.fixture
def train(build):
    """Trains, and returns the trainer."""
    def train(callback=None, *others, **options):
        trainer = build(callback or PatchSamplingCallback(), *others, **options)
        trainer.train()
        return trainer
    return train


def logged(trainer, name="pss/keep_rate"):
    return [(row["step"], row[name]) for row in trainer.state.log_history if name in row]


def expected_rates(cycle):
    return [(step, pytest.approx(rate)) for step, rate in enumerate(cycle, start=1)]


def count_tokens(keep_rates):
    return [TOKENS[keep_rate] for keep_rate in keep_rates]


# keep rates


@pytest.mark.parametrize("length", [{}, {"max_steps": 16}])
@pytest.mark.parametrize("period", ["1ep", "8ba", f"{8 * BATCH_SIZE}sp", "0.5dur"])
def test_every_step_has_the_papers_keep_rate(train, period, length):
    trainer = train(PatchSamplingCallback(Cyclic(period=period)), **length)
    assert trainer.model.tokens() == count_tokens(CYCLE * 2)
    assert logged(trainer) == expected_rates(CYCLE * 2)
    assert logged(trainer, "pss/tokens") == list(enumerate(count_tokens(CYCLE * 2), start=1))
    (sampler,) = find_samplers(trainer.model)
    assert sampler.keep_rate == 1.0


def test_the_last_batch_may_be_smaller(train):
    # 14 samples are 4 batches; 28 samples two epochs
    for time in ("28sp", "2ep", "8ba"):
        schedule = Piecewise([("0ep", 0.2), (time, 1.0)])
        trainer = train(PatchSamplingCallback(schedule), data=Images(14), num_train_epochs=3)
        assert trainer.model.tokens() == count_tokens([0.2] * 8 + [1.0] * 4)
    # without it an epoch has 12 samples
    schedule = Piecewise([("0ep", 0.2), ("24sp", 1.0)])
    trainer = train(PatchSamplingCallback(schedule), data=Images(14), num_train_epochs=3, dataloader_drop_last=True)
    assert trainer.model.tokens() == count_tokens([0.2] * 6 + [1.0] * 3)


@pytest.mark.parametrize("accumulation, cycle, sizes", [(2, CYCLE_OF_4, [2, 2, 2, 1]), (3, CYCLE_OF_3, [3, 3, 1])])
def test_all_batches_of_a_step_share_a_keep_rate(train, accumulation, cycle, sizes):
    # an epoch of 7 batches: the last step of each has one
    trainer = train(data=Images(7 * BATCH_SIZE), gradient_accumulation_steps=accumulation)
    rates = [rate for rate, size in zip(cycle * 2, sizes * 2, strict=True) for _ in range(size)]
    assert trainer.model.tokens() == count_tokens(rates)
    assert logged(trainer) == expected_rates(cycle * 2)


def test_samples_are_counted_through_accumulation(train):
    # 8 batches of 4 are 4 steps of 8 samples
    schedule = Piecewise([("0ep", 0.2), ("16sp", 0.6), ("32sp", 1.0)])
    trainer = train(PatchSamplingCallback(schedule), gradient_accumulation_steps=2)
    assert trainer.model.tokens() == count_tokens([0.2] * 4 + [0.6] * 4 + [1.0] * 8)


def test_data_without_a_length(build, train):
    trainer = train(PatchSamplingCallback(Cyclic(period="4ba")), data=Stream(), max_steps=8)
    assert trainer.model.tokens() == count_tokens(CYCLE_OF_4 * 2)
    with pytest.raises(ValueError, match="^'1ep' cannot be counted in batches: .* ep needs a data loader "):
        train(data=Stream(), max_steps=8)
    # the library's own message
    with pytest.raises(ValueError, match="max_steps"):
        build(PatchSamplingCallback(), data=Stream())


def test_training_again_starts_again(train):
    trainer = train()
    trainer.train()
    assert trainer.model.tokens() == count_tokens(CYCLE * 4)


# exact resumption


@pytest.mark.parametrize("accumulation, stops", [(1, (3, 8, 11)), (3, (2, 3, 4))])
def test_a_run_resumes_bit_for_bit(train, build, tmp_path, accumulation, stops):
    # everything is random: dropout, the order of the data, the sampler
    def start():
        return build(PatchSamplingCallback(sampler="random"), model=Classifier(build_hf_vit()), save_strategy="steps",
                     save_steps=1, gradient_accumulation_steps=accumulation, output_dir=tmp_path / "straight")

    straight = start()
    straight.train()
    assert logged(straight) == expected_rates(CYCLE * 2 if accumulation == 1 else CYCLE_OF_3 * 2)
    for stop in stops:
        checkpoint = tmp_path / "straight" / f"checkpoint-{stop}"
        resumed = start()
        resumed.args.save_strategy = "no"
        resumed.train(resume_from_checkpoint=str(checkpoint))
        num_left = {1: 16 - stop, 3: 16 - 8 * (stop // 3) - 3 * (stop % 3)}[accumulation]
        assert resumed.model.tokens() == straight.model.tokens()[-num_left:]
        assert resumed.state.log_history[:-1] == straight.state.log_history[:-1]
        weights = straight.model.state_dict()
        assert all(torch.equal(weights[name], value) for name, value in resumed.model.state_dict().items())
        state = json.loads((checkpoint / "trainer_state.json").read_text())
        assert not any("PatchSampling" in name for name in state["stateful_callbacks"])
    assert weights.keys() == Classifier(build_hf_vit()).state_dict().keys()


# logging


def test_losses_are_logged_with_the_keep_rate_of_their_last_step(train):
    notes = Notes()
    trainer = train(PatchSamplingCallback(eval_keep_rate=0.2), notes, logging_steps=3, eval_dataset=Images(4),
                    eval_strategy="steps", eval_steps=1)
    steps = [3, 6, 9, 12, 15]
    assert [row["step"] for row in trainer.state.log_history if "loss" in row] == steps
    assert logged(trainer) == [(step, pytest.approx((CYCLE * 2)[step - 1])) for step in steps]
    assert logged(trainer, "pss/tokens") == [(step, TOKENS[(CYCLE * 2)[step - 1]]) for step in steps]
    later = [logs for logs in notes.logs if "loss" in logs]
    assert [logs["pss/tokens"] for logs in later] == [tokens for _, tokens in logged(trainer, "pss/tokens")]
    assert not any("pss/tokens" in logs for logs in notes.logs if "loss" not in logs)


def test_the_log_at_an_epochs_end_is_not_that_of_the_evaluation_before_it(train):
    trainer = train(PatchSamplingCallback(eval_keep_rate=0.2), logging_strategy="epoch", eval_dataset=Images(4),
                    eval_strategy="steps", eval_steps=1)
    assert logged(trainer, "pss/tokens") == [(8, TOKENS[0.4]), (16, TOKENS[0.4])]


# evaluation, and what is left in the model


def test_evaluation_has_its_own_keep_rate(train):
    trainer = train(PatchSamplingCallback(eval_keep_rate=0.4), eval_dataset=Images(4), eval_strategy="epoch")
    assert trainer.model.tokens() == count_tokens(CYCLE * 2)
    assert trainer.model.tokens(training=False) == [26, 26]
    trainer.evaluate()
    trainer.predict(Images(4))
    assert trainer.model.tokens(training=False) == [26] * 4


def test_evaluation_alone(build):
    trainer = build(PatchSamplingCallback(eval_keep_rate=0.2), eval_dataset=Images(4))
    trainer.evaluate()
    assert trainer.model.seen == [(False, 13)]


def test_a_later_trainer_sees_every_token(train, build):
    trainer = train(PatchSamplingCallback(Fixed(0.2)), num_train_epochs=1)
    model = trainer.model
    model.seen.clear()
    build(model=model, num_train_epochs=1).train()
    assert model.tokens() == [65] * 8
    # this one's evaluation, or an exception, may leave a keep rate
    later = train(PatchSamplingCallback(eval_keep_rate=0.2), model=model)
    remove_patch_sampling(model)
    model.seen.clear()
    later.evaluate(Images(4))
    assert model.seen == [(False, 65)] and not find_samplers(model)


def test_training_after_an_exception_starts_well(build, train):
    class Failing(TrainerCallback):
        def on_step_end(self, args, state, control, **_):
            if state.global_step == 3:
                raise RuntimeError("stop")

    model = Classifier()
    with pytest.raises(RuntimeError, match="^stop$"):
        train(PatchSamplingCallback(), Failing(), model=model)
    model.seen.clear()
    train(model=model)
    assert model.tokens() == count_tokens(CYCLE * 2)


def test_one_object_serves_two_trainers(build):
    callback, models = PatchSamplingCallback(), [Classifier(), Classifier()]
    trainers = [build(callback, model=model) for model in models]
    for trainer in trainers:
        trainer.train()
        assert trainer.model.tokens() == count_tokens(CYCLE * 2)
        assert logged(trainer) == expected_rates(CYCLE * 2)


# where the ViT comes from


def test_a_vit_of_the_library(train):
    model = Classifier(build_hf_vit())
    train(model=model)
    assert model.tokens() == count_tokens(CYCLE * 2)


def test_a_callback_that_is_added_late(build):
    trainer = build()
    trainer.add_callback(PatchSamplingCallback())
    trainer.train()
    assert trainer.model.tokens() == count_tokens(CYCLE * 2)


def test_a_model_that_is_built_again(train):
    models = []
    trainer = train(model_init=lambda: models.append(Classifier()) or models[-1])
    assert len(models) == 2 and trainer.model is models[-1]
    assert trainer.model.tokens() == count_tokens(CYCLE * 2)


# errors


def test_models_that_are_refused(build):
    class Convolutional(nn.Module):
        def __init__(self):
            super().__init__()
            self.net = resnet18(num_classes=7)

    with pytest.raises(TypeError, match="torchvision's ResNet .*Convolutional"):
        build(PatchSamplingCallback(), model=Convolutional())
    two = Classifier()
    two.teacher = VisionTransformer(**SMALL)
    with pytest.raises(TypeError, match="Classifier .* 2 ViTs .vit, teacher.: "):
        build(PatchSamplingCallback(), model=two)


def test_a_second_callback_is_refused(build):
    message = "^callbacks must hold one PatchSamplingCallback, got two$"
    with pytest.raises(ValueError, match=message):
        build(PatchSamplingCallback(), PatchSamplingCallback())
    trainer = build(PatchSamplingCallback())
    trainer.add_callback(PatchSamplingCallback())
    with pytest.raises(ValueError, match=message):
        trainer.train()
    trainer.pop_callback(PatchSamplingCallback)
    trainer.train()
    assert trainer.model.tokens() == count_tokens(CYCLE * 2)


def test_arguments_that_are_refused(train):
    with pytest.raises(ValueError, match="^schedule must be a schedule or .*, got the class Cyclic"):
        PatchSamplingCallback(Cyclic)
    with pytest.raises(ValueError, match="^sampler must be one of"):
        PatchSamplingCallback(sampler="best")
    with pytest.raises(ValueError, match="^eval_keep_rate must be"):
        PatchSamplingCallback(eval_keep_rate=0)
    with pytest.raises(ValueError, match="^cooldown must be no longer than training, got '3ep' in 16 batches$"):
        train(PatchSamplingCallback(Linear(cooldown="3ep")))
    with pytest.raises(ValueError, match="^the schedule's result must be"):
        train(PatchSamplingCallback(lambda progress: 1.5))
