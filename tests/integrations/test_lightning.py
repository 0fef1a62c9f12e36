"""The Lightning callback in Lightning's Trainer. Expected keep rates are written out by hand."""

import lightning
import pytest
import torch
from lightning.pytorch.callbacks import Callback, GradientAccumulationScheduler
from lightning.pytorch.loggers import Logger
from support import lightning_script
from support.keep_rates import BATCH_SIZE, CYCLE, CYCLE_OF_3, CYCLE_OF_4, TOKENS
from support.launch import launch
from support.models import SMALL, build_model, random_images
from timm.models.vision_transformer import VisionTransformer
from torch.nn.functional import cross_entropy
from torch.utils.data import DataLoader, IterableDataset, TensorDataset
from torchvision.models import resnet18

from pss_composer import PatchSampler, apply_patch_sampling
from pss_composer.integrations.lightning import PatchSamplingCallback
from pss_composer.schedules import Cyclic, Fixed, Linear, Piecewise
from pss_composer.surgery import find_samplers

pytestmark = [
    pytest.mark.filterwarnings("ignore:.*does not have many workers"),
    pytest.mark.filterwarnings("ignore:You defined a `validation_step` but have no"),
    # a test of Composer before it in this process leaves a process group
    pytest.mark.filterwarnings("ignore:It is recommended to use `self.log"),
    pytest.mark.filterwarnings("ignore:.*`isinstance.treespec, LeafSpec.` is deprecated"),
]


class Classifier(lightning.LightningModule):
    """A ViT that notes the tokens that enter its first block: (is training, optimizer steps so far, tokens)."""

    def __init__(self, vit=None):
        super().__init__()
        self.vit = vit or build_model("vit")
        self.seen = []

    def forward(self, images):
        blocks = getattr(self.vit, "blocks", None)
        if blocks is None:
            return self.vit(images)
        handle = blocks[0].register_forward_pre_hook(lambda block, arguments: self.seen.append(
            (block.training, self.trainer.global_step, arguments[0].shape[1])))
        logits = self.vit(images)
        handle.remove()
        return logits

    def training_step(self, batch):
        loss = cross_entropy(self(batch[0]), batch[1])
        self.log("loss", loss)
        return loss

    def validation_step(self, batch):
        self.log("val_loss", cross_entropy(self(batch[0]), batch[1]))

    test_step = validation_step

    def predict_step(self, batch):
        return self(batch[0])

    def configure_optimizers(self):
        return torch.optim.AdamW(self.parameters(), lr=1e-3)

    def tokens(self, *, training=True):
        return [tokens for is_training, _, tokens in self.seen if is_training == training]


class MemoryLogger(Logger):
    name = version = None

    def __init__(self):
        super().__init__()
        self.rows = []

    def log_metrics(self, metrics, step=None):
        self.rows.append((step, metrics))

    def log_hyperparams(self, *arguments, **options):
        pass

    def read(self, name):
        return [(step, metrics[name]) for step, metrics in self.rows if name in metrics]


class StatefulLoader(DataLoader):
    """Goes on after the batches that were trained, when training resumes."""

    num_served = 0

    def __iter__(self):
        num_skipped = self.num_served
        for index, batch in enumerate(super().__iter__()):
            if index >= num_skipped:
                self.num_served = (index + 1) % len(self)
                yield batch

    def state_dict(self):
        return {"num_served": self.num_served}

    def load_state_dict(self, state):
        self.num_served = state["num_served"]


def build_loader(num_samples=8 * BATCH_SIZE, loader=DataLoader, **options):
    labels = torch.randint(7, (num_samples,), generator=torch.Generator().manual_seed(2))
    return loader(TensorDataset(random_images(num_samples), labels), batch_size=BATCH_SIZE, **options)


def build_trainer(*callbacks, **options):
    arguments = dict(max_epochs=2, log_every_n_steps=1, logger=False, enable_checkpointing=False, accelerator="cpu",
                     enable_progress_bar=False, enable_model_summary=False, num_sanity_val_steps=0)
    return lightning.Trainer(callbacks=list(callbacks), **arguments | options)


def train(callback=None, model=None, num_samples=8 * BATCH_SIZE, **options):
    """The module after training, and what was logged."""
    model, logger = model or Classifier(), MemoryLogger()
    trainer = build_trainer(callback or PatchSamplingCallback(), logger=logger, **options)
    trainer.fit(model, build_loader(num_samples))
    return model, logger


def count_tokens(keep_rates):
    return [TOKENS[keep_rate] for keep_rate in keep_rates]


def check_left_behind(model):
    (sampler,) = find_samplers(model)
    assert sampler.keep_rate == sampler.eval_keep_rate == 1.0


# keep rates


@pytest.mark.parametrize("period", ["1ep", "8ba", f"{8 * BATCH_SIZE}sp", "0.5dur"])
@pytest.mark.parametrize("length", [{"max_epochs": 2}, {"max_epochs": -1, "max_steps": 16}])
def test_every_step_has_the_papers_keep_rate(period, length):
    model, logger = train(PatchSamplingCallback(Cyclic(period=period)), **length)
    assert model.tokens() == count_tokens(CYCLE * 2)
    assert logger.read("pss/keep_rate") == [(step, pytest.approx(rate)) for step, rate in enumerate(CYCLE * 2)]
    assert logger.read("pss/tokens") == list(enumerate(count_tokens(CYCLE * 2)))
    check_left_behind(model)


def test_the_last_batch_may_be_smaller():
    # 14 samples are 4 batches; 28 samples two epochs
    for time in ("28sp", "2ep", "8ba"):
        schedule = Piecewise([("0ep", 0.2), (time, 1.0)])
        model, _ = train(PatchSamplingCallback(schedule), num_samples=14, max_epochs=3)
        assert model.tokens() == count_tokens([0.2] * 8 + [1.0] * 4)


@pytest.mark.parametrize("accumulation, cycle, sizes", [(2, CYCLE_OF_4, [2, 2, 2, 1]), (3, CYCLE_OF_3, [3, 3, 1])])
def test_all_batches_of_a_step_share_a_keep_rate(accumulation, cycle, sizes):
    # an epoch of 7 batches: the last step of each has one
    model, logger = train(num_samples=7 * BATCH_SIZE, accumulate_grad_batches=accumulation)
    rates = [rate for rate, size in zip(cycle * 2, sizes * 2, strict=True) for _ in range(size)]
    assert model.tokens() == count_tokens(rates)
    assert [step for _, step, _ in model.seen] == [step for step, size in enumerate(sizes * 2) for _ in range(size)]
    assert logger.read("pss/keep_rate") == [(step, pytest.approx(rate)) for step, rate in enumerate(cycle * 2)]


def test_samples_are_counted_through_accumulation():
    # 8 batches of 4 are 4 steps of 8 samples
    schedule = Piecewise([("0ep", 0.2), ("16sp", 0.6), ("32sp", 1.0)])
    model, _ = train(PatchSamplingCallback(schedule), accumulate_grad_batches=2)
    assert model.tokens() == count_tokens([0.2] * 4 + [0.6] * 4 + [1.0] * 8)


def test_the_shorter_of_two_lengths_ends_training():
    callback = PatchSamplingCallback(Piecewise([("0ep", 0.2), ("0.5dur", 1.0)]))
    for length in ({"max_steps": 4}, {"max_epochs": 1, "max_steps": 12, "limit_train_batches": 4}):
        model, _ = train(callback, **length)
        assert model.tokens() == count_tokens([0.2] * 2 + [1.0] * 2)


def test_only_a_part_of_an_epoch_may_be_trained():
    model, _ = train(limit_train_batches=4)
    assert model.tokens() == count_tokens(CYCLE_OF_4 * 2)


def test_data_without_a_length():
    class Stream(IterableDataset):
        def __iter__(self):
            return iter([(image, torch.tensor(3)) for image in random_images(3 * BATCH_SIZE)])

    loader = DataLoader(Stream(), BATCH_SIZE)
    model = Classifier()
    build_trainer(PatchSamplingCallback(Cyclic(period="4ba")), max_epochs=-1, max_steps=8).fit(model, loader)
    assert model.tokens() == count_tokens(CYCLE_OF_4 * 2)
    with pytest.raises(ValueError, match="^'1ep' cannot be counted in batches: .* ep needs a data loader "):
        build_trainer(PatchSamplingCallback(), max_epochs=-1, max_steps=8).fit(model, loader)
    check_left_behind(model)
    with pytest.raises(ValueError, match="^max_steps must be given under patch sampling, or max_epochs and data with a "
                                         "length, got max_steps=-1, max_epochs=2$"):
        build_trainer(PatchSamplingCallback()).fit(model, loader)


@pytest.mark.parametrize("num_samples, cycle", [(8 * BATCH_SIZE, CYCLE), (4 * BATCH_SIZE, CYCLE_OF_4)])
def test_a_second_fit_goes_on_with_its_own_loader(num_samples, cycle):
    model, trainer = Classifier(), build_trainer(PatchSamplingCallback(Piecewise([("0ep", 0.2), ("0.5dur", 1.0)])),
                                                 max_epochs=1)
    trainer.fit(model, build_loader())
    assert model.tokens() == count_tokens([0.2] * 4 + [1.0] * 4)
    trainer.fit_loop.max_epochs = 3
    trainer.fit(model, build_loader(num_samples))
    # 8 + 16 steps in all, or 8 + 8
    num_left = 2 * len(cycle)
    num_small = (8 + num_left) // 2 - 8
    assert model.tokens()[8:] == count_tokens([0.2] * num_small + [1.0] * (num_left - num_small))
    check_left_behind(model)


def test_a_cycle_begins_with_an_epoch_after_epochs_of_another_length():
    model, trainer = Classifier(), build_trainer(PatchSamplingCallback(), max_epochs=1)
    trainer.fit(model, build_loader(3 * BATCH_SIZE))
    trainer.fit_loop.max_epochs = 3
    trainer.fit(model, build_loader())
    assert model.tokens() == count_tokens(CYCLE_OF_3 + CYCLE * 2)


class ManualClassifier(Classifier):
    """Two optimizers, both of which step in every batch, as a GAN's do."""

    def __init__(self):
        super().__init__()
        self.automatic_optimization = False

    def training_step(self, batch):
        for optimizer in self.optimizers():
            optimizer.zero_grad()
            loss = cross_entropy(self(batch[0]), batch[1])
            self.manual_backward(loss)
            optimizer.step()

    def configure_optimizers(self):
        return [torch.optim.SGD(part.parameters(), lr=1e-3) for part in (self.vit.blocks, self.vit.head)]


def test_manual_optimization_counts_batches():
    model, logger = train(model=ManualClassifier())
    assert model.tokens() == [tokens for tokens in count_tokens(CYCLE * 2) for _ in range(2)]
    assert [step for _, step, _ in model.seen] == list(range(32))
    assert logger.read("pss/keep_rate") == [(step, pytest.approx(rate)) for step, rate in enumerate(CYCLE * 2)]
    model, _ = train(PatchSamplingCallback(Piecewise([("0ep", 0.2), ("0.75dur", 1.0)])), model=ManualClassifier())
    assert model.tokens() == count_tokens([0.2] * 24 + [1.0] * 8)
    with pytest.raises(ValueError, match="^max_steps must be -1 under manual optimization, .* got 8$"):
        train(model=model, max_steps=8)


# exact resumption


class SaveEveryBatch(Callback):
    def __init__(self, folder):
        self.folder, self.num_batches = folder, 0

    def on_train_batch_end(self, trainer, pl_module, outputs, batch, batch_idx):
        self.num_batches += 1
        trainer.save_checkpoint(self.folder / f"{self.num_batches}.ckpt")


# with accumulation, in epochs of 8 batches, after a step's last batch: gradients are no part of a checkpoint
@pytest.mark.parametrize("accumulation, stops", [(1, (3, 5, 8, 11)), (3, (3, 6, 8, 14))])
def test_a_run_resumes_bit_for_bit(accumulation, stops, tmp_path):
    def run(folder, **options):
        model = Classifier(build_model("beit"))
        trainer = build_trainer(PatchSamplingCallback(), SaveEveryBatch(folder), accumulate_grad_batches=accumulation)
        trainer.fit(model, build_loader(loader=StatefulLoader), **options)
        return model

    straight = run(tmp_path)
    rates = CYCLE * 2 if accumulation == 1 else [rate for rate in CYCLE_OF_3 for _ in range(3)][:8] * 2
    assert straight.tokens() == count_tokens(rates)
    for stop in stops:
        resumed = run(tmp_path / "resumed", ckpt_path=tmp_path / f"{stop}.ckpt")
        assert resumed.tokens() == count_tokens(rates[stop:])
        weights = straight.state_dict()
        assert all(torch.equal(weights[name], value) for name, value in resumed.state_dict().items())
        checkpoint = torch.load(tmp_path / f"{stop}.ckpt", weights_only=True)
        assert not checkpoint["callbacks"]
        assert checkpoint["state_dict"].keys() == Classifier(build_model("beit")).state_dict().keys()


# logging


def test_the_loggers_get_what_they_get_of_the_loss():
    _, logger = train(log_every_n_steps=3)
    steps = [step for step, _ in logger.read("loss")]
    assert steps == [2, 5, 8, 11, 14]
    assert logger.read("pss/keep_rate") == [(step, pytest.approx((CYCLE * 2)[step])) for step in steps]
    assert logger.read("pss/tokens") == [(step, TOKENS[(CYCLE * 2)[step]]) for step in steps]


def test_a_trainer_that_logs_nothing():
    model = Classifier()
    options = dict.fromkeys(("logger", "enable_checkpointing", "log_every_n_steps", "num_sanity_val_steps"))
    model.log = lambda name, value: None
    build_trainer(PatchSamplingCallback(), barebones=True, **options).fit(model, build_loader())
    assert model.tokens() == count_tokens(CYCLE * 2)


# evaluation, and what is left in the model


def test_evaluation_has_its_own_keep_rate():
    model = Classifier()
    trainer = build_trainer(PatchSamplingCallback(eval_keep_rate=0.4), val_check_interval=3, num_sanity_val_steps=1)
    trainer.fit(model, build_loader(), build_loader(BATCH_SIZE))
    assert model.tokens() == count_tokens(CYCLE * 2)
    # once before training, twice in an epoch
    assert [(step, tokens) for is_training, step, tokens in model.seen if not is_training] == [
        (0, 26), (3, 26), (6, 26), (11, 26), (14, 26)]
    check_left_behind(model)
    for evaluate in (trainer.validate, trainer.test, trainer.predict):
        model.seen.clear()
        evaluate(model, build_loader(BATCH_SIZE), **({} if evaluate == trainer.predict else {"verbose": False}))
        assert model.tokens(training=False) == [26]
        check_left_behind(model)


def test_validation_alone():
    model = Classifier()
    build_trainer(PatchSamplingCallback(eval_keep_rate=0.2)).validate(model, build_loader(BATCH_SIZE), verbose=False)
    assert model.tokens(training=False) == [13]
    check_left_behind(model)


def test_a_later_trainer_sees_every_token():
    model, _ = train(PatchSamplingCallback(Fixed(0.2), eval_keep_rate=0.2))
    model.seen.clear()
    build_trainer(max_epochs=1).fit(model, build_loader(), build_loader(BATCH_SIZE))
    assert model.tokens() == [65] * 8 and model.tokens(training=False) == [65]


@pytest.mark.parametrize("exception", [RuntimeError, KeyboardInterrupt])
def test_an_exception_leaves_no_keep_rate(exception):
    class Failing(Classifier):
        def training_step(self, batch):
            loss = super().training_step(batch)
            if self.trainer.global_step == 2:
                raise exception
            return loss

    model = Failing()
    with pytest.raises(SystemExit if exception is KeyboardInterrupt else exception):
        train(PatchSamplingCallback(eval_keep_rate=0.4), model=model)
    assert model.tokens() == count_tokens(CYCLE[:3])
    check_left_behind(model)


def test_one_object_serves_two_trainers():
    callback, models = PatchSamplingCallback(), [Classifier(), Classifier()]
    for model in models:
        train(callback, model=model)
        assert model.tokens() == count_tokens(CYCLE * 2)
        check_left_behind(model)


# where the ViT comes from


@pytest.mark.parametrize("hook", ["setup", "configure_model"])
def test_a_vit_that_the_module_builds_late(hook):
    class Late(Classifier):
        def __init__(self):
            super().__init__(vit=torch.nn.Identity())

        def setup(self, stage):
            if hook == "setup":
                self.vit = build_model("vit")

        def configure_model(self):
            if hook == "configure_model" and not isinstance(self.vit, VisionTransformer):
                self.vit = build_model("vit")

    model, _ = train(model=Late())
    assert model.tokens() == count_tokens(CYCLE * 2)
    model = Late()
    build_trainer(PatchSamplingCallback(eval_keep_rate=0.2)).validate(model, build_loader(BATCH_SIZE), verbose=False)
    assert model.tokens(training=False) == [13]


def test_a_sampler_of_ones_own_is_taken_over():
    vit = build_model("vit")
    sampler = apply_patch_sampling(vit, sampler="random", eval_keep_rate=0.4)
    model, _ = train(model=Classifier(vit))
    assert find_samplers(model) == [sampler] and sampler.sampler == "magnitude"
    assert model.tokens() == count_tokens(CYCLE * 2)


# errors


def test_models_that_are_refused():
    with pytest.raises(TypeError, match="torchvision's ResNet .*Classifier"):
        train(model=Classifier(resnet18(num_classes=7)))
    two = Classifier()
    two.teacher = VisionTransformer(**SMALL)
    with pytest.raises(TypeError, match="Classifier .* 2 ViTs .vit, teacher.: "):
        train(model=two)
    assert not any(isinstance(module, PatchSampler) for module in two.modules())


def test_callbacks_that_are_refused():
    for callbacks in ([PatchSamplingCallback(), PatchSamplingCallback()], [PatchSamplingCallback()] * 2):
        with pytest.raises(ValueError, match="^callbacks must hold one PatchSamplingCallback, got Patch"):
            build_trainer(*callbacks).fit(Classifier(), build_loader())
    with pytest.raises(ValueError, match="^callbacks must hold PatchSamplingCallback or GradientAcc"):
        build_trainer(PatchSamplingCallback(), GradientAccumulationScheduler({1: 2})).fit(Classifier(), build_loader())


def test_arguments_that_are_refused():
    with pytest.raises(ValueError, match="^schedule must be a schedule or .*, got the class Cyclic"):
        PatchSamplingCallback(Cyclic)
    with pytest.raises(ValueError, match="^schedule must be a schedule or a function of training progress, got 0.5$"):
        PatchSamplingCallback(0.5)
    with pytest.raises(ValueError, match="^sampler must be one of"):
        PatchSamplingCallback(sampler="best")
    with pytest.raises(ValueError, match="^eval_keep_rate must be"):
        PatchSamplingCallback(eval_keep_rate=0)
    with pytest.raises(ValueError, match="^cooldown must be no longer than training, got '3ep' in 16 batches$"):
        train(PatchSamplingCallback(Linear(cooldown="3ep")))
    with pytest.raises(ValueError, match="^the schedule's result must be"):
        train(PatchSamplingCallback(lambda progress: 1.5))


def test_samples_of_a_loader_without_a_batch_size():
    loader = DataLoader(build_loader().dataset, batch_sampler=[[0, 1], [2, 3, 4]])
    with pytest.raises(ValueError, match="^'6sp' cannot be counted in batches: .* sp a batch size"):
        build_trainer(PatchSamplingCallback(Cyclic(period="6sp"))).fit(Classifier(), loader)


# two processes


@pytest.mark.slow
def test_two_processes_equal_one(tmp_path):
    pytest.importorskip("composer", reason="its launcher starts the processes")
    launch("tests/support/lightning_script.py", str(tmp_path), log=tmp_path / "log.txt")
    one, *ranks = lightning_script.train(1), *(torch.load(tmp_path / f"{rank}.pt") for rank in range(2))
    # of 4 steps an epoch, each two batches
    in_training = [(True, tokens) for tokens in count_tokens(CYCLE_OF_4) for _ in range(2)]
    for results in ranks:
        # Lightning splits the two batches of validation among the processes
        assert results["seen"] == [*in_training, (False, 26)] * 2
        for name, value in ranks[0]["weights"].items():
            assert torch.equal(results["weights"][name], value)
            torch.testing.assert_close(value, one["weights"][name], rtol=0, atol=1e-5)
    assert one["seen"] == [*in_training, (False, 26), (False, 26)] * 2
    start = lightning_script.Classifier().state_dict()
    assert max((value - start[name]).abs().max() for name, value in one["weights"].items()) > 1e-2
