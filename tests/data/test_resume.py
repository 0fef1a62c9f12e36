"""Training that is stopped and resumed ends in the same weights, whatever the source and the number of workers."""

import pytest
import torch
from composer import Event, Trainer
from composer.models import ComposerClassifier
from composer.utils import reproducibility
from support.sources import IMAGE_SIZE, build, random_images
from torch import nn

from pss_composer.data.augmentation.settings import Augmentation
from pss_composer.data.loader import restore_generators
from pss_composer.data.sources.digits import write_images
from pss_composer.errors import InputError

STOPS = {"between epochs": "ep1-ba5.pt", "within an epoch": "ep1-ba7.pt", "after its last batch": "ep1-ba10.pt"}


def is_time_to_save(state, event):
    # Composer saves once a batch: the end of the first epoch is saved as such, that of the second as a batch
    return event is (Event.EPOCH_CHECKPOINT if state.timestamp.batch == 5 else Event.BATCH_CHECKPOINT)


def train(specs, *, save_folder=None, load_path=None):
    """Two and a half epochs of a linear layer with dropout, which draws from the global generator."""
    reproducibility.seed_all(5)
    module = nn.Sequential(nn.Flatten(), nn.Dropout(0.5), nn.Linear(3 * IMAGE_SIZE**2, 10))
    model = ComposerClassifier(module, num_classes=10)
    trainer = Trainer(
        model=model,
        optimizers=torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9),
        train_dataloader=specs[0],
        eval_dataloader=specs[1],
        max_duration="13ba",
        save_folder=save_folder,
        save_filename="ep{epoch}-ba{batch}.pt",
        save_latest_filename=None,
        save_interval=is_time_to_save,
        load_path=load_path,
        seed=5,
        device="cpu",
        progress_bar=False,
    )
    restore_generators(trainer)
    try:
        trainer.fit()
    finally:
        trainer.close()
        for spec in specs:
            spec.dataloader.close()
    return torch.cat([parameter.flatten() for parameter in model.parameters()]).detach()


def build_both(name, path, **options):
    return [build(name, path, split, **options) for split in ("train", "val")]


# rectangles are erased in all of them: what the device draws must go on as well
@pytest.mark.parametrize(("name", "num_workers", "changes"), [
    *((name, num_workers, {}) for name in ("synthetic", "streaming") for num_workers in (0, 2)),
    ("folder", 0, {}), ("torchvision", 2, {}), ("folder", 0, {"repeats": 3}), ("streaming", 2, {"repeats": 3}),
    ("folder", 2, {"form": "timm"}), ("streaming", 0, {"form": "timm", "repeats": 3}),
])
# Composer, of a run that resumes after the last batch of an epoch: it has nothing left to do there
@pytest.mark.filterwarnings("ignore:No batches were trained:UserWarning")
@pytest.mark.filterwarnings("ignore:The ``compute`` method of metric:UserWarning")
def test_resumed_training_ends_in_the_same_weights(name, num_workers, changes, paths, tmp_path):
    augmentation = Augmentation(random_erasing=0.5, **changes)

    def specs():
        return build_both(name, paths[name], num_workers=num_workers, augmentation=augmentation)

    expected = train(specs(), save_folder=str(tmp_path))
    for stop, checkpoint in STOPS.items():
        assert torch.equal(train(specs(), load_path=str(tmp_path / checkpoint)), expected), stop


@pytest.mark.parametrize("repeats", [1, 3])
def test_resuming_with_other_workers_ends_in_the_same_weights(repeats, paths, tmp_path):
    def specs(**options):
        return build_both("streaming", paths["streaming"], augmentation=Augmentation(repeats=repeats), **options)

    expected = train(specs(), save_folder=str(tmp_path))
    checkpoint = str(tmp_path / STOPS["within an epoch"])
    assert torch.equal(train(specs(num_workers=2), load_path=checkpoint), expected)
    assert not torch.equal(train(specs(seed=4)), expected)


@pytest.mark.parametrize("num_workers", [0, 2])
@pytest.mark.parametrize("label", [10, -1])
def test_a_bad_label_ends_training_in_one_line(label, num_workers, tmp_path):
    images, labels = random_images(16, seed=0)
    labels[11] = label
    for split in ("train", "val"):
        write_images(tmp_path / split, images, labels)
    with pytest.raises(InputError) as error:
        train(build_both("streaming", tmp_path, num_workers=num_workers))
    assert str(error.value) == f"num_classes must fit the labels, which must be in [0, 10), got {label}"
