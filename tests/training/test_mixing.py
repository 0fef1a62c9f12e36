"""MixUpCutMix: pixels and labels against arithmetic, the share of CutMix, and training with the rest of Composer."""

import pytest
import torch
from composer import Event, Trainer
from composer.algorithms import LabelSmoothing
from composer.core import DataSpec, State
from composer.devices import DeviceCPU
from composer.loggers import Logger
from composer.models import ComposerClassifier
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

from pss_composer.training.mixing import MixUpCutMix

NUM_CLASSES = 4


def mix(algorithm, images, labels):
    model = ComposerClassifier(nn.Flatten(), num_classes=NUM_CLASSES)
    state = State(model=model, rank_zero_seed=0, run_name="mix", device=DeviceCPU())
    state.batch = [images, labels]
    assert algorithm.match(Event.AFTER_DATALOADER, state)
    algorithm.apply(Event.AFTER_DATALOADER, state, Logger(state))
    return state.batch


def one_image_per_class(size=8):
    """Image i is i everywhere."""
    return torch.arange(4.0).view(4, 1, 1, 1).expand(4, 3, size, size).clone(), torch.arange(4)


def test_mixup_blends_pixels_and_labels_by_the_same_share():
    images, labels = one_image_per_class()
    torch.manual_seed(0)
    mixed, soft_labels = mix(MixUpCutMix(NUM_CLASSES, cutmix_alpha=0), images, labels)
    assert mixed.shape == images.shape and soft_labels.shape == (4, NUM_CLASSES)
    share = soft_labels[1, 1]
    assert 0 < share < 1
    # image i is i everywhere and is mixed with image i − 1, image 0 with image 3
    expected = torch.tensor([3 * (1 - share), 1 - (1 - share), 2 - (1 - share), 3 - (1 - share)])
    torch.testing.assert_close(mixed, expected.view(4, 1, 1, 1).expand_as(mixed))
    torch.testing.assert_close(soft_labels, share * torch.eye(4) + (1 - share) * torch.eye(4).roll(1, 0))


def test_cutmix_pastes_a_rectangle_and_its_share_is_the_label():
    images, labels = one_image_per_class()
    torch.manual_seed(1)
    mixed, soft_labels = mix(MixUpCutMix(NUM_CLASSES, mixup_alpha=0), images, labels)
    for i in range(4):
        is_pasted = mixed[i, 0] == (i - 1) % 4
        rows, columns = is_pasted.any(1).sum(), is_pasted.any(0).sum()
        assert 0 < is_pasted.sum() == rows * columns < 64
        assert (mixed[i, 0][~is_pasted] == i).all()
        assert soft_labels[i, (i - 1) % 4].item() == pytest.approx(is_pasted.float().mean().item())
        assert soft_labels[i].sum().item() == pytest.approx(1)


@pytest.mark.parametrize(("switch_prob", "low", "high"), [(0.0, 0, 0), (0.3, 70, 110), (1.0, 300, 300)])
def test_share_of_cutmix(switch_prob, low, high):
    images, labels = one_image_per_class()
    torch.manual_seed(0)
    algorithm = MixUpCutMix(NUM_CLASSES, switch_prob=switch_prob)
    # mixup with a share in (0, 1) leaves no image as it was, CutMix leaves whole numbers only
    num_cutmix = sum(bool((mixed == mixed.round()).all())
                     for mixed, _ in (mix(algorithm, images, labels) for _ in range(300)))
    assert low <= num_cutmix <= high


def test_draws_come_from_torchs_generator_alone():
    images, labels = one_image_per_class()
    runs = []
    for _ in range(2):
        torch.manual_seed(3)
        algorithm = MixUpCutMix(NUM_CLASSES)
        runs.append([mix(algorithm, images, labels) for _ in range(5)])
    for (images_a, labels_a), (images_b, labels_b) in zip(*runs, strict=True):
        assert torch.equal(images_a, images_b) and torch.equal(labels_a, labels_b)
    assert not torch.equal(runs[0][0][0], runs[0][1][0])


@pytest.mark.parametrize("algorithm", [MixUpCutMix(10), MixUpCutMix(3, mixup_alpha=0, cutmix_alpha=0.5, switch_prob=1)])
def test_repr_rebuilds(algorithm):
    rebuilt = eval(repr(algorithm))
    settings = ("num_classes", "mixup_alpha", "cutmix_alpha", "switch_prob")
    assert all(getattr(rebuilt, name) == getattr(algorithm, name) for name in settings)
    assert repr(rebuilt) == repr(algorithm) and " at 0x" not in repr(algorithm)


@pytest.mark.parametrize(("arguments", "match"), [
    ({"num_classes": 0}, "num_classes must be at least 1, got 0"),
    ({"mixup_alpha": -0.1}, "mixup_alpha must be at least 0 and finite, got -0.1"),
    ({"cutmix_alpha": float("nan")}, "cutmix_alpha must be at least 0 and finite, got nan"),
    ({"mixup_alpha": 0, "cutmix_alpha": 0}, "mixup_alpha or cutmix_alpha must be above 0, got 0 and 0"),
    ({"switch_prob": 1.5}, r"switch_prob must be in \[0, 1\], got 1.5"),
])
def test_bad_arguments(arguments, match):
    with pytest.raises(ValueError, match=match):
        MixUpCutMix(**({"num_classes": 10} | arguments))


class LabelRecorder(ComposerClassifier):
    """A linear classifier that keeps the labels of every loss, and measures nothing in training."""

    def __init__(self):
        super().__init__(nn.Sequential(nn.Flatten(), nn.Linear(48, NUM_CLASSES)), num_classes=NUM_CLASSES)
        self.labels = []

    def loss(self, outputs, batch, *args, **kwargs):
        self.labels.append(batch[1].clone())
        return super().loss(outputs, batch, *args, **kwargs)

    def get_metrics(self, is_train=False):
        return {} if is_train else super().get_metrics(is_train)


def train_recorder(algorithms, microbatch_size):
    torch.manual_seed(0)
    model = LabelRecorder()
    dataset = TensorDataset(torch.randn(16, 3, 4, 4), torch.arange(16) % NUM_CLASSES)
    Trainer(
        model=model,
        train_dataloader=DataSpec(DataLoader(dataset, batch_size=8, generator=torch.Generator())),
        eval_dataloader=DataLoader(dataset, batch_size=8),
        algorithms=algorithms,
        optimizers=torch.optim.SGD(model.parameters(), lr=0.1),
        max_duration="1ep",
        device_train_microbatch_size=microbatch_size,
        seed=7,
        device="cpu",
        progress_bar=False,
    ).fit()
    return torch.cat(model.labels[:16 // microbatch_size]), model.module[1].weight.detach()


def test_the_whole_batch_is_mixed_before_it_is_split():
    # only in a whole batch is image 0 mixed with image 7 and its class 3: here with microbatches of 2
    labels, weight = train_recorder([MixUpCutMix(NUM_CLASSES)], microbatch_size=2)
    expected_labels, expected_weight = train_recorder([MixUpCutMix(NUM_CLASSES)], microbatch_size=8)
    assert torch.equal(labels, expected_labels) and labels.shape == (16, NUM_CLASSES)
    assert ((labels[::8] > 0).nonzero()[:, 1].view(2, 2) == torch.tensor([0, 3])).all()
    torch.testing.assert_close(weight, expected_weight)


# Composer's loss, of a sum of labels that is 1 but for rounding
@pytest.mark.filterwarnings("ignore:Some targets have less than 1 total probability:UserWarning")
def test_label_smoothing_smooths_the_soft_labels():
    plain, _ = train_recorder([MixUpCutMix(NUM_CLASSES)], microbatch_size=4)
    smooth, _ = train_recorder([MixUpCutMix(NUM_CLASSES), LabelSmoothing(0.1)], microbatch_size=4)
    torch.testing.assert_close(smooth, 0.9 * plain + 0.1 / NUM_CLASSES)
