"""Small data for every source, and how the tests read them."""

import struct

import numpy as np
import torch
from PIL import Image

from pss_composer.data.augmentation.settings import Augmentation
from pss_composer.data.dataspec import build_dataspec
from pss_composer.data.loader import EpochSampler
from pss_composer.data.settings import DataSettings
from pss_composer.data.sources.digits import write_images

NUM_IMAGES = 43  # five batches of 8 and a rest
IMAGE_SIZE = 16
# with the images' own size, the transform is a division by 255
EXACT = Augmentation(is_plain=True, mean=[0.0] * 3, std=[1.0] * 3, crop_pct=1.0)
SETTINGS = {"torchvision": {"dataset": "FashionMNIST"}, "synthetic": {"num_samples": NUM_IMAGES}}


def random_images(num_images, seed):
    rng = np.random.default_rng(seed)
    return rng.integers(0, 256, (num_images, 12, 12, 3), dtype=np.uint8), np.arange(num_images) % 3


def write_folder(path, num_images=NUM_IMAGES):
    for seed, split in enumerate(("train", "val")):
        for index, (image, label) in enumerate(zip(*random_images(num_images, seed), strict=True)):
            (path / split / f"class{label}").mkdir(parents=True, exist_ok=True)
            Image.fromarray(image).save(path / split / f"class{label}" / f"{index:03}.png")


def write_shards(path, num_images=NUM_IMAGES):
    for seed, split in enumerate(("train", "val")):
        write_images(path / split, *random_images(num_images, seed))


def to_idx(array):
    """The format as http://yann.lecun.com/exdb/mnist describes it."""
    magic = {3: 0x00000803, 1: 0x00000801}[array.ndim]
    return struct.pack(f">{1 + array.ndim}I", magic, *array.shape) + array.astype(np.uint8).tobytes()


def write_mnist(path, num_images=NUM_IMAGES, dataset="FashionMNIST"):
    """Grey images where torchvision's MNIST and its kin look for them."""
    folder = path / dataset / "raw"
    folder.mkdir(parents=True)
    for seed, prefix in enumerate(("train", "t10k")):
        images, labels = random_images(num_images, seed)
        (folder / f"{prefix}-images-idx3-ubyte").write_bytes(to_idx(images[..., 0]))
        (folder / f"{prefix}-labels-idx1-ubyte").write_bytes(to_idx(labels))
    return folder


def write_signs(folder):
    """GTSRB: class folders for training, a table for evaluation."""
    for split, seed in {"train": 0, "val": 1}.items():
        rows = ["Filename;ClassId"]
        for index, (image, label) in enumerate(zip(*random_images(NUM_IMAGES, seed), strict=True)):
            test_folder = folder / "gtsrb" / "GTSRB" / "Final_Test" / "Images"
            train_folder = folder / "gtsrb" / "GTSRB" / "Training" / f"{label:05}"
            path = (train_folder if split == "train" else test_folder) / f"{index:05}.ppm"
            path.parent.mkdir(parents=True, exist_ok=True)
            Image.fromarray(image).save(path)
            rows.append(f"{path.name};{label}")
        (folder / "gtsrb" / "GT-final_test.csv").write_text("\n".join(rows))


def write_pets(folder):
    """OxfordIIITPet: a list of images for each split, `trainval` and `test`; the labels begin at 1."""
    folder = folder / "oxford-iiit-pet"
    for name in ("images", "annotations"):
        (folder / name).mkdir(parents=True)
    for split, seed in {"trainval": 0, "test": 1}.items():
        rows = []
        for index, (image, label) in enumerate(zip(*random_images(NUM_IMAGES, seed), strict=True)):
            Image.fromarray(image).save(folder / "images" / f"breed{label}_{split}{index}.jpg", "PNG")
            rows.append(f"breed{label}_{split}{index} {label + 1} 1 1")
        (folder / "annotations" / f"{split}.txt").write_text("\n".join(rows))
    return folder


def build(name, path, split="train", *, augmentation=None, num_workers=0, **options):
    """The batches of a source; `options` are data settings or arguments of `build_dataspec`."""
    arguments = {"image_size": IMAGE_SIZE, "num_classes": 10, "batch_size": 8, "seed": 3}
    arguments |= {key: options.pop(key) for key in tuple(options) if key in arguments}
    settings = SETTINGS.get(name, {}) | options
    return build_dataspec(
        DataSettings(name, path=None if path is None else str(path), num_workers=num_workers, **settings),
        augmentation or Augmentation(), split=split, **arguments,
    )


def read_batches(spec, epochs=1):
    """The batches of some epochs, as Composer asks for them."""
    batches = []
    for epoch in range(epochs):
        if isinstance(spec.dataloader.sampler, EpochSampler):
            spec.dataloader.sampler.set_epoch(epoch)
        batches += list(spec.dataloader)
    spec.dataloader.close()  # left to the garbage collector, the workers may end in a fork
    return batches


def read_inputs(spec, epochs=1):
    """The same as the model gets them."""
    return [spec.batch_transforms(batch) for batch in read_batches(spec, epochs)]


def to_rows(images):
    """Each image as a tuple of its values."""
    return [tuple(image.flatten().tolist()) for image in images]


def assert_same_batches(batches, expected):
    assert len(batches) == len(expected)
    for (images, labels), (expected_images, expected_labels) in zip(batches, expected, strict=True):
        assert torch.equal(images, expected_images)
        assert torch.equal(labels, expected_labels)
