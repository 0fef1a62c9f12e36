"""Data sets of torchvision: what is read, and the augmentation."""

import hashlib
import inspect
import pickle

import numpy as np
import pytest
import torch
from support.sources import (
    EXACT,
    NUM_IMAGES,
    assert_same_batches,
    build,
    random_images,
    read_batches,
    read_inputs,
    write_mnist,
    write_pets,
    write_signs,
)
from torchvision import datasets

from pss_composer.data.settings import TORCHVISION_SPLITS
from pss_composer.errors import InputError

SEEDS = {"train": 0, "val": 1}


def read_exactly(path, split, **options):
    """All pixels uint8 (N, 12, 12, 3) and labels, in order."""
    dataset = build("torchvision", path, split, image_size=12, augmentation=EXACT, **options).dataloader.dataset
    samples = [dataset[0, index, 0] for index in range(len(dataset))]
    assert all(type(label) is int and messages == [] for _, label, messages in samples)
    return torch.stack([image for image, _, _ in samples]).numpy(), [label for _, label, _ in samples]


# what is read


@pytest.mark.parametrize("dataset", ["MNIST", "FashionMNIST", "KMNIST"])
@pytest.mark.parametrize("split", ["train", "val"])
def test_grey_images_are_read_back_bit_for_bit_as_rgb(split, dataset, tmp_path):
    write_mnist(tmp_path, dataset=dataset)
    images, labels = random_images(NUM_IMAGES, SEEDS[split])
    actual_images, actual_labels = read_exactly(tmp_path, split, dataset=dataset)
    assert np.array_equal(actual_images, np.repeat(images[..., :1], 3, axis=-1))
    assert actual_labels == labels.tolist()


def write_cifar(folder, monkeypatch):
    """CIFAR-10's pickles, with checksums that torchvision finds right."""
    folder = folder / datasets.CIFAR10.base_folder
    folder.mkdir()

    def write(name, content):
        (folder / name).write_bytes(pickle.dumps(content))
        return [name, hashlib.md5((folder / name).read_bytes()).hexdigest()]

    def write_split(name, seed):
        images, labels = random_images(NUM_IMAGES, seed)
        images = np.pad(images, ((0, 0), (0, 20), (0, 20), (0, 0)))
        return write(name, {"data": images.transpose(0, 3, 1, 2).reshape(len(images), -1), "labels": labels.tolist()})

    monkeypatch.setattr(datasets.CIFAR10, "train_list", [write_split("data_batch_1", 0)])
    monkeypatch.setattr(datasets.CIFAR10, "test_list", [write_split("test_batch", 1)])
    name, checksum = write("batches.meta", {"label_names": [f"class {number}" for number in range(10)]})
    monkeypatch.setattr(datasets.CIFAR10, "meta", {"filename": name, "key": "label_names", "md5": checksum})


@pytest.mark.parametrize("split", ["train", "val"])
def test_colours_are_read_back_bit_for_bit(split, tmp_path, monkeypatch):
    write_cifar(tmp_path, monkeypatch)
    images, labels = random_images(NUM_IMAGES, SEEDS[split])
    dataset = build("torchvision", tmp_path, split, dataset="CIFAR10", image_size=32,
                    augmentation=EXACT).dataloader.dataset
    for index, (image, label) in enumerate(zip(images, labels, strict=True)):
        actual, actual_label, _ = dataset[0, index, 0]
        assert np.array_equal(actual[:12, :12], image) and not actual[12:].any() and actual_label == label
    assert dataset.classes == [f"class {number}" for number in range(10)]


@pytest.mark.parametrize("split", ["train", "val"])
@pytest.mark.parametrize(("dataset", "write"), [("GTSRB", write_signs), ("OxfordIIITPet", write_pets)])
def test_data_sets_with_split_names_are_read_back_bit_for_bit(dataset, write, split, tmp_path):
    write(tmp_path)
    images, labels = random_images(NUM_IMAGES, SEEDS[split])
    actual_images, actual_labels = read_exactly(tmp_path, split, dataset=dataset)
    # class folders are read one after the other
    order = np.argsort(labels, kind="stable") if (dataset, split) == ("GTSRB", "train") else np.arange(NUM_IMAGES)
    assert np.array_equal(actual_images, images[order]) and actual_labels == labels[order].tolist()


def test_evaluation_sees_its_own_files_in_order(paths):
    images, labels = random_images(NUM_IMAGES, seed=1)
    batches = read_inputs(build("torchvision", paths["torchvision"], "val", image_size=12, augmentation=EXACT))
    expected = torch.from_numpy(images[..., 0])[:, None].expand(-1, 3, -1, -1) / 255
    assert torch.allclose(torch.cat([images for images, _ in batches]), expected)
    assert torch.cat([labels for _, labels in batches]).tolist() == labels.tolist()


@pytest.mark.parametrize("dataset", TORCHVISION_SPLITS)
@pytest.mark.parametrize("split", ["train", "val"])
def test_every_data_set_has_its_splits(dataset, split, tmp_path):
    arguments = TORCHVISION_SPLITS[dataset][split == "val"]
    inspect.signature(getattr(datasets, dataset)).bind(tmp_path, download=True, **arguments)
    # it looks for its files, and so takes the name of the split: others are refused as `Unknown value`
    with pytest.raises(InputError, match=f"^path must hold {dataset} as torchvision stores it") as error:
        build("torchvision", tmp_path, split, dataset=dataset)
    assert any(word in str(error.value) for word in ("not found", "not exist", "No such file", "h5py"))
    assert "\n" not in str(error.value) and "Unknown value" not in str(error.value)


# augmentation


def test_augmentation_depends_on_seed_epoch_index_and_view_alone(paths):
    def look(seed, *key):
        return build("torchvision", paths["torchvision"], seed=seed).dataloader.dataset[key][0]

    dataset = build("torchvision", paths["torchvision"]).dataloader.dataset
    expected = [dataset[2, index, 0][0] for index in range(5)]
    for index in reversed(range(5)):
        torch.rand(7)  # as other work would between two images
        assert torch.equal(dataset[2, index, 0][0], expected[index])
    assert torch.equal(look(3, 2, 1, 0), expected[1])
    for other in ((3, 1, 1, 0), (4, 2, 1, 0), (3, 2, 1, 1)):
        assert not torch.equal(look(*other), expected[1])

    dataset.dataset.data = dataset.dataset.data[1].expand(NUM_IMAGES, -1, -1)
    assert torch.equal(dataset[2, 1, 0][0], expected[1])
    assert not torch.equal(dataset[2, 0, 0][0], expected[1])


@pytest.mark.parametrize(("dataset", "write"), [("GTSRB", write_signs), ("FashionMNIST", write_mnist)])
def test_workers_change_nothing(dataset, write, tmp_path):
    write(tmp_path)
    expected = read_batches(build("torchvision", tmp_path, dataset=dataset), epochs=2)
    actual = read_batches(build("torchvision", tmp_path, dataset=dataset, num_workers=2), epochs=2)
    assert len(expected) == 10
    assert_same_batches(actual, expected)
