"""Batches of every source: shapes, order, randomness, and bad input that all sources share."""

import random
import subprocess
import sys

import numpy as np
import pytest
import torch
from composer.utils import reproducibility
from support.sources import (
    EXACT,
    IMAGE_SIZE,
    NUM_IMAGES,
    assert_same_batches,
    build,
    random_images,
    read_batches,
    read_inputs,
    to_rows,
    write_shards,
)

from pss_composer.checks import name_keys
from pss_composer.data.augmentation.settings import Augmentation
from pss_composer.data.sources.digits import write_images
from pss_composer.errors import InputError

ALL = ("synthetic", "folder", "streaming", "torchvision")


@pytest.mark.parametrize("name", ALL)
def test_training_drops_the_rest_and_evaluation_keeps_it(name, paths):
    train, val = build(name, paths[name]), build(name, paths[name], "val")
    train_sizes = [len(labels) for _, labels in train.dataloader]
    assert train_sizes == [8] * 5 and len(train.dataloader) == 5
    batches = read_inputs(val)
    assert [len(labels) for _, labels in batches] == [8] * 5 + [3] and len(val.dataloader) == 6
    images, labels = batches[0]
    assert images.shape == (8, 3, IMAGE_SIZE, IMAGE_SIZE) and images.dtype == torch.float32
    assert labels.shape == (8,) and labels.dtype == torch.int64
    assert train.num_samples == val.num_samples == NUM_IMAGES
    assert [len(part) for part, _ in val.split_batch(batches[-1], 2)] == [2, 1]


def test_streaming_evaluates_every_image_in_order_as_torchvision_would(paths):
    images, labels = random_images(NUM_IMAGES, seed=1)
    batches = read_inputs(build("streaming", paths["streaming"], "val", image_size=12, augmentation=EXACT,
                                num_workers=2))
    expected = torch.from_numpy(images).permute(0, 3, 1, 2) / 255
    torch.testing.assert_close(torch.cat([images for images, _ in batches]), expected)
    assert torch.cat([labels for _, labels in batches]).tolist() == labels.tolist()


@pytest.mark.parametrize("name", ["folder", "streaming", "torchvision"])
def test_training_sees_every_image_once_in_a_new_order_and_look_every_epoch(name, paths):
    spec = build(name, paths[name], augmentation=Augmentation(is_plain=True), batch_size=1)
    images = torch.cat([images for images, _ in read_inputs(spec, epochs=2)])
    assert len(images) == 2 * NUM_IMAGES
    first, second = images[:NUM_IMAGES], images[NUM_IMAGES:]
    assert not torch.equal(first, second)
    assert len(set(to_rows(first))) == NUM_IMAGES and set(to_rows(first)) == set(to_rows(second))

    spec = build(name, paths[name], batch_size=1)
    looks = {row for images, _ in read_inputs(spec, epochs=2) for row in to_rows(images)}
    assert len(looks) > 1.9 * NUM_IMAGES


@pytest.mark.parametrize("augmentation", [Augmentation(), Augmentation(repeats=3), Augmentation(form="timm")],
                         ids=["fast", "repeats", "timm"])
@pytest.mark.parametrize("name", ALL)
def test_workers_change_nothing_and_global_generators_are_left_alone(name, augmentation, paths):
    reproducibility.seed_all(1)
    states = random.getstate(), np.random.get_state()[1].copy(), torch.get_rng_state()
    expected = read_batches(build(name, paths[name], augmentation=augmentation), epochs=3)
    actual = read_batches(build(name, paths[name], augmentation=augmentation, num_workers=2), epochs=3)
    assert_same_batches(actual, expected)
    assert random.getstate() == states[0]
    assert (np.random.get_state()[1] == states[1]).all()
    assert torch.equal(torch.get_rng_state(), states[2])


# labels


@pytest.mark.parametrize("num_workers", [0, 2])
@pytest.mark.parametrize("label", [10, -1])
def test_bad_label_is_one_line_even_from_a_worker(label, num_workers, tmp_path):
    images, labels = random_images(16, seed=0)
    labels[11] = label
    write_images(tmp_path / "val", images, labels)
    spec = build("streaming", tmp_path, "val", num_workers=num_workers)
    batches = iter(spec.dataloader)
    spec.batch_transforms(next(batches))  # the batch before the bad one is good
    with pytest.raises(InputError) as error, name_keys(lambda key: f"model.{key}"):
        spec.batch_transforms(next(batches))
    assert str(error.value) == f"model.num_classes must fit the labels, which must be in [0, 10), got {label}"
    spec.dataloader.close()


@pytest.mark.parametrize("name", ["digits", *ALL])
def test_no_labels_are_checked_without_classes(name, paths, tmp_path):
    path = paths.get(name, tmp_path / "digits")
    if name == "streaming":
        path = tmp_path
        write_images(path / "train", np.zeros((8, 8, 8, 3), np.uint8), np.arange(8) - 4)
    spec = build(name, path, num_classes=None)
    images, labels = spec.batch_transforms(next(iter(spec.dataloader)))
    assert images.shape == (8, 3, 16, 16) and labels.shape == (8,) and labels.dtype == torch.int64


# bad input


def assert_input_error(match, name, path, **options):
    with pytest.raises(InputError, match=match) as error:
        build(name, path, **options)
    assert "\n" not in str(error.value)


def test_bad_arguments(paths):
    assert_input_error("^batch_size must be at least 1 on every device, got 0$", "synthetic", None, batch_size=0)
    assert_input_error("^split must be train or val, got 'test'$", "synthetic", None, split="test")
    # the settings are checked before the data are looked for
    assert_input_error(r"^num_workers must be in \[0, 1024\], got 99999$", "folder", "nowhere", num_workers=99999)
    bad = Augmentation(hflip=2.0)
    assert_input_error("^hflip must be a probability", "folder", "nowhere", augmentation=bad)


@pytest.mark.parametrize("name", ALL)
def test_batch_larger_than_the_data(name, paths):
    match = "^batch_size must be at most the 43 training images, got 44$"
    assert_input_error(match, name, paths[name], batch_size=44)
    assert len(build(name, paths[name], "val", batch_size=44).dataloader) == 1


@pytest.mark.parametrize("name", ["folder", "streaming"])
def test_bad_folders(name, tmp_path):
    assert_input_error("^path must be a folder, got None", name, None)
    assert_input_error("^path must be a folder, got '.*nowhere'", name, tmp_path / "nowhere")
    assert_input_error("^path must hold a folder 'train' with images, got none in ", name, tmp_path)
    (tmp_path / "train").mkdir()
    assert_input_error("^path must hold a folder 'train' with images, got none in ", name, tmp_path)
    assert [entry.name for entry in tmp_path.iterdir()] == ["train"]


def test_a_split_that_cannot_be_read_is_one_line(tmp_path, monkeypatch):
    write_shards(tmp_path, num_images=8)

    def refuse(path):
        raise PermissionError(13, "Permission denied", str(path))

    with monkeypatch.context() as patch:  # to root, every folder is readable
        patch.setattr("os.listdir", refuse)
        assert_input_error("^path must hold folders that can be read, got '.*/train': Permission denied$", "streaming",
                           tmp_path)


def test_import_needs_no_optional_library_and_settings_no_torch():
    # composer itself imports scikit-learn and matplotlib where they are installed
    code = ("import sys; import pss_composer.data.settings, pss_composer.data.augmentation.settings; "
            "slow = {'torch', 'timm', 'composer', 'streaming', 'torchvision'} & set(sys.modules); "
            "import composer, timm; before = set(sys.modules); import pss_composer.data.dataspec; "
            "print(slow, {m.partition('.')[0] for m in set(sys.modules) - before})")
    output = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout
    assert output.startswith("set() {") and "pss_composer" in output
    assert not any(name in output for name in ("streaming", "sklearn", "matplotlib"))
