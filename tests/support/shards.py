"""Forty images as MDS shards, and reading them: a picture's grey value and its label are its number."""

import gc
import io
import time

import numpy as np
import pytest
from PIL import Image

from pss_composer.data.augmentation.settings import Augmentation
from pss_composer.data.dataspec import build_dataspec
from pss_composer.data.settings import DataSettings
from pss_composer.errors import InputError

NUM_IMAGES = 40  # five batches of 8
STEP = 6  # of the grey values of two images whose numbers follow each other
SHARD_SIZE = "3kb"  # of source files: four images in each of ten shards
PLAIN = Augmentation(is_plain=True, mean=[0.0] * 3, std=[1.0] * 3, crop_pct=1.0)
ALL = list(range(NUM_IMAGES))


def encode(number):
    file = io.BytesIO()
    Image.new("RGB", (16, 16), (STEP * number,) * 3).save(file, "JPEG")
    return file.getvalue()


def write_source(folder):
    for split in ("train", "val"):
        for number in ALL:
            (folder / split / f"c{number:02}").mkdir(parents=True)
            (folder / split / f"c{number:02}" / "0.JPEG").write_bytes(encode(number))
    return folder


def set_environment(monkeypatch, variables):
    for key, value in variables.items():
        monkeypatch.setenv(key, value)


def build(path, split="train", *, name="streaming", num_workers=0, batch_size=8, **settings):
    return build_dataspec(
        DataSettings(name, path=str(path), num_workers=num_workers, **settings), PLAIN, split=split, image_size=16,
        num_classes=NUM_IMAGES, batch_size=batch_size, seed=3,
    )


def read_epoch(spec):
    """The labels of an epoch's batches, each of which must be that of its picture."""
    batches = []
    for batch in spec.dataloader:
        images, labels = spec.batch_transforms(batch)
        assert (images.mean((1, 2, 3)) * 255 / STEP).round().int().tolist() == labels.tolist()
        batches.append(labels.tolist())
    return batches


def flatten(batches):
    return [label for batch in batches for label in batch]


def read(*arguments, epochs=1, **options):
    """The labels of a new dataset's epochs, batch by batch."""
    spec = build(*arguments, **options)
    try:
        return [batch for _ in range(epochs) for batch in read_epoch(spec)]
    finally:
        spec.dataloader.close()


def assert_each_once(batches, epochs=1):
    assert [len(batch) for batch in batches] == [8] * (5 * epochs)
    for first in range(0, len(batches), 5):
        assert sorted(flatten(batches[first:first + 5])) == ALL


def refuse(*arguments, **options):
    """The one line that reading ends with."""
    with pytest.raises(InputError) as error:
        read(*arguments, **options)
    message = str(error.value)
    assert "\n" not in message
    del error
    time.sleep(0.03)  # the dataset's threads look every 7 ms whether they are to end
    gc.collect()  # the error's frames hold the dataset
    return message


def list_samples(folder):
    """File, place in it, and label of each sample, in the order of the shards."""
    samples = []
    for path in sorted(folder.glob("shard.*.mds")):
        data = path.read_bytes()
        count, *offsets = np.frombuffer(data, np.uint32, 2 + int.from_bytes(data[:4], "little"))
        samples += [(path, place, int.from_bytes(data[offsets[place + 1] - 8:offsets[place + 1]], "little"))
                    for place in range(count)]
    return samples


def break_sample(folder, number, *, label=None):
    """Cut the picture of a sample by half, or give it another label; the size of the shard stays."""
    path, place, old_label = list_samples(folder)[number]
    data = bytearray(path.read_bytes())
    begin, end = np.frombuffer(data, np.uint32, 2, 4 * (1 + place)).tolist()
    if label is None:
        size = (int.from_bytes(data[begin:begin + 4], "little")) // 2
        changed = size.to_bytes(4, "little") + data[begin + 4:begin + 4 + size] + old_label.to_bytes(8, "little")
        data[begin:end] = changed.ljust(end - begin, b"\0")
    else:
        data[end - 8:end] = label.to_bytes(8, "little")
    path.write_bytes(data)
    return f"sample {place} of {path.name} in '{folder}'"


def replace_labels(batches, replacements):
    return [[replacements.get(label, label) for label in batch] for batch in batches]
