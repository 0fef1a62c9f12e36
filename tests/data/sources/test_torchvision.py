"""Images from IDX files: what is read back, the augmentation, files that are wrong, and labels that nobody uses."""

import gzip
import struct

import numpy as np
import pytest
import torch
from PIL import Image

from pss_composer.data import Augmentation, build_dataspec
from pss_composer.data.sources.digits import write_images
from pss_composer.data.idx import IdxImages, read_idx
from pss_composer.errors import InputError

NUM_IMAGES = {"train": 43, "val": 11}
PREFIXES = {"train": "train", "val": "t10k"}
HEIGHT, WIDTH = 9, 7
# at the images' own height and crop_pct 1 the transform is a division by 255 and a crop to a square
EXACT = Augmentation(is_plain=True, mean=[0.0] * 3, std=[1.0] * 3, crop_pct=1.0)


def random_split(split, width=WIDTH):
    rng = np.random.default_rng(NUM_IMAGES[split])
    images = rng.integers(0, 256, (NUM_IMAGES[split], HEIGHT, width), dtype=np.uint8)
    return images, rng.permutation(np.arange(NUM_IMAGES[split], dtype=np.uint8) % 10)


def to_idx(array):
    """The format as http://yann.lecun.com/exdb/mnist describes it."""
    magic = {3: 0x00000803, 1: 0x00000801}[array.ndim]
    return struct.pack(f">{1 + array.ndim}I", magic, *array.shape) + array.tobytes()


def write_file(folder, name, data, is_packed):
    path = folder / f"{name}.gz" if is_packed else folder / name
    path.write_bytes(gzip.compress(data) if is_packed else data)
    return path


def write_split(folder, split, images, labels, *, is_packed=False):
    write_file(folder, f"{PREFIXES[split]}-images-idx3-ubyte", to_idx(images), is_packed)
    write_file(folder, f"{PREFIXES[split]}-labels-idx1-ubyte", to_idx(labels), is_packed)


def build(folder, split="train", **options):
    settings = {"name": "idx", "image_size": 16, "num_classes": 10, "batch_size": 8, "seed": 3}
    return build_dataspec(split=split, path=None if folder is None else str(folder), **(settings | options))


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """Both splits, one packed and one not."""
    path = tmp_path_factory.mktemp("idx")
    write_split(path, "train", *random_split("train"), is_packed=True)
    write_split(path, "val", *random_split("val"))
    return path


def read_batches(spec, epochs=1):
    batches = []
    for epoch in range(epochs):
        spec.dataloader.sampler.set_epoch(epoch)
        batches += list(spec.dataloader)
    if spec.dataloader._iterator is not None:
        spec.dataloader._iterator._shutdown_workers()
    return batches


# what is read


@pytest.mark.parametrize("is_packed", [False, True], ids=["plain", "gz"])
@pytest.mark.parametrize("split", ["train", "val"])
def test_files_are_read_back_bit_for_bit(split, is_packed, tmp_path):
    images, labels = random_split(split)
    write_split(tmp_path, split, images, labels, is_packed=is_packed)
    dataset = IdxImages(tmp_path, split=split, num_classes=10, transform=lambda image, seed: np.asarray(image), seed=0)
    assert len(dataset) == len(images) and dataset.images.dtype == np.uint8
    for index, (image, label) in enumerate(zip(images, labels, strict=True)):
        actual_image, actual_label, _ = dataset[0, index, 0]
        assert np.array_equal(actual_image, image) and actual_label == label and type(actual_label) is int


def test_torchvision_reads_the_same(folder):
    from torchvision.datasets.mnist import read_image_file, read_label_file

    for name, read, num_dims in [("images-idx3", read_image_file, 3), ("labels-idx1", read_label_file, 1)]:
        path = folder / f"t10k-{name}-ubyte"
        assert np.array_equal(read_idx(path, num_dims=num_dims), read(str(path)).numpy())


def test_plain_file_is_read_where_both_are_there(folder, tmp_path):
    images, labels = random_split("val")
    write_split(tmp_path, "val", images, labels)
    write_split(tmp_path, "val", images[:1], labels[:1], is_packed=True)
    assert build(tmp_path, "val").num_samples == NUM_IMAGES["val"]


def test_evaluation_sees_its_own_files_in_order(tmp_path):
    for split in ("train", "val"):
        write_split(tmp_path, split, *random_split(split, width=HEIGHT))
    images, labels = random_split("val", width=HEIGHT)
    spec = build(tmp_path, "val", image_size=HEIGHT, augmentation=EXACT)
    assert spec.num_samples == NUM_IMAGES["val"]
    batches = list(map(spec.batch_transforms, read_batches(spec)))
    expected = torch.from_numpy(images)[:, None].expand(-1, 3, -1, -1) / 255
    assert torch.allclose(torch.cat([images for images, _ in batches]), expected)
    assert torch.cat([labels for _, labels in batches]).tolist() == labels.tolist()


def test_training_sees_every_image_once_in_a_new_order_every_epoch(tmp_path):
    images, labels = random_split("train", width=HEIGHT)
    write_split(tmp_path, "train", images, labels)  # and no val: a split needs its own files alone
    spec = build(tmp_path, image_size=HEIGHT, augmentation=EXACT, batch_size=1)
    expected = {(image.tobytes(), int(label)) for image, label in zip(images, labels, strict=True)}
    epochs = []
    for epoch in range(2):
        spec.dataloader.sampler.set_epoch(epoch)
        epochs.append([((255 * image[0, 0]).round().byte().numpy().tobytes(), int(label))
                       for image, label in map(spec.batch_transforms, spec.dataloader)])
    assert set(epochs[0]) == set(epochs[1]) == expected and len(epochs[0]) == len(epochs[1]) == len(expected)
    assert epochs[0] != epochs[1]
    assert len(build(tmp_path).dataloader) == 5  # batches of 8, without the rest of 3


# augmentation


def test_augmentation_depends_on_seed_epoch_and_index_alone(folder):
    def look(seed, epoch, index):
        return build(folder, seed=seed).dataloader.dataset[epoch, index, 0][0]

    dataset = build(folder).dataloader.dataset
    expected = [dataset[2, index, 0][0] for index in range(5)]
    for index in reversed(range(5)):
        torch.rand(7)  # as other work would between two images
        assert torch.equal(dataset[2, index, 0][0], expected[index])
    assert torch.equal(look(3, 2, 1), expected[1])
    assert not torch.equal(look(3, 1, 1), expected[1])
    assert not torch.equal(look(4, 2, 1), expected[1])

    dataset.images = np.broadcast_to(dataset.images[1], dataset.images.shape)
    assert torch.equal(dataset[2, 1, 0][0], expected[1])
    assert not torch.equal(dataset[2, 0, 0][0], expected[1])


def test_workers_change_nothing(folder):
    expected = read_batches(build(folder), epochs=2)
    actual = read_batches(build(folder, num_workers=2), epochs=2)
    assert len(actual) == len(expected) == 10
    for batch, expected_batch in zip(actual, expected, strict=True):
        assert all(map(torch.equal, batch, expected_batch))


# bad input


def assert_input_error(match, folder, **options):
    with pytest.raises(InputError, match=match) as error:
        build(folder, **options)
    assert "\n" not in str(error.value)


def test_bad_folder(tmp_path):
    assert_input_error(r"^data\.path must name a folder, got null$", None)
    assert_input_error(r"^data\.path must be a folder, got '.*nowhere'", tmp_path / "nowhere")
    assert_input_error(r"did you mean idx\?\), got 'idxs'", tmp_path, name="idxs")


@pytest.mark.parametrize("split", ["train", "val"])
@pytest.mark.parametrize("kind", ["images-idx3", "labels-idx1"])
def test_missing_file(kind, split, folder, tmp_path):
    for path in folder.iterdir():
        if path.name.removesuffix(".gz") != f"{PREFIXES[split]}-{kind}-ubyte":
            (tmp_path / path.name).write_bytes(path.read_bytes())
    name = f"{PREFIXES[split]}-{kind}-ubyte"
    match = rf"^data\.path must hold a file {name} or {name}\.gz, got neither in '{tmp_path}'$"
    assert_input_error(match, tmp_path, split=split)


IMAGES = to_idx(random_split("train")[0])
NOT_WHOLE = r"^data\.path must hold whole IDX files, got "
NOT_IDX = r"^data\.path must hold IDX files of 3-dimensional uint8, which begin with 0x00000803, got "
NUM_BYTES = 16 + 43 * 9 * 7


@pytest.mark.parametrize("is_packed", [False, True], ids=["plain", "gz"])
@pytest.mark.parametrize(("data", "match"), [
    (b"<!DOCTYPE html>", NOT_IDX + "0x3c21444f in '.*/train-images"),
    (gzip.compress(IMAGES), NOT_IDX + "0x1f8b.* in '.*/train-images"),  # packed, and its name says otherwise
    (to_idx(random_split("train")[1]), NOT_IDX + "0x00000801 in '.*/train-images"),
    (b"\0\0\x0d\x03" + IMAGES[4:], NOT_IDX + "0x00000d03 in '.*/train-images"),  # float32
    (b"", NOT_IDX + "0x in '.*/train-images"),
    (IMAGES[:-1], NOT_WHOLE + rf"{NUM_BYTES - 1} bytes instead of {NUM_BYTES} in '.*/train-images"),
    (IMAGES + b"\0", NOT_WHOLE + rf"{NUM_BYTES + 1} bytes instead of {NUM_BYTES} in '.*/train-images"),
    (IMAGES[:9], NOT_WHOLE + r"9 bytes instead of 16 in '.*/train-images"),
    (struct.pack(">4I", 0x803, *3 * [2**32 - 1]), NOT_WHOLE + rf"16 bytes instead of {(2**32 - 1)**3 + 16} in"),
    (struct.pack(">4I", 0x803, 0, 9, 7), r"^data\.path must hold at least one image, got none in '.*/train-images"),
    (to_idx(random_split("train")[0][:42]),
     r"^data\.path must hold as many labels as images, got 43 labels in '.*/train-labels.*' for 42 images$"),
], ids=["no idx", "packed twice", "labels", "float32", "empty", "truncated", "too long", "header", "huge", "no image",
        "one image less"])
def test_bad_image_file(data, match, is_packed, tmp_path):
    write_split(tmp_path, "train", *random_split("train"))
    (tmp_path / "train-images-idx3-ubyte").unlink()
    write_file(tmp_path, "train-images-idx3-ubyte", data, is_packed)
    assert_input_error(match, tmp_path)


PACKED = gzip.compress(IMAGES)


@pytest.mark.parametrize(("data", "reason"), [
    (PACKED[:-100], "Compressed file ended before the end-of-stream marker was reached"),
    (PACKED[:5], "Compressed file ended before the end-of-stream marker was reached"),
    (PACKED[:10] + b"\xff" * 100 + PACKED[110:], "Error -3 while decompressing data: .*"),
    (PACKED[:-8] + b"\0" * 4 + PACKED[-4:], "CRC check failed.*"),
    (IMAGES, r"Not a gzipped file \(b'\\x00\\x00'\)"),
], ids=["truncated", "header", "corrupt", "checksum", "not packed"])
def test_bad_packed_file(data, reason, tmp_path):
    write_split(tmp_path, "train", *random_split("train"))
    (tmp_path / "train-images-idx3-ubyte").rename(tmp_path / "train-images-idx3-ubyte.gz")
    (tmp_path / "train-images-idx3-ubyte.gz").write_bytes(data)
    assert_input_error(NOT_WHOLE + rf"'.*/train-images-idx3-ubyte\.gz': {reason}$", tmp_path)


@pytest.mark.parametrize(("label", "num_classes"), [(10, 10), (255, 255)])
def test_labels_not_below_num_classes(label, num_classes, tmp_path):
    images, labels = random_split("train")
    labels[7] = label
    write_split(tmp_path, "train", images, labels)
    match = (rf"^model\.num_classes must be at least {label + 1} for the labels in '.*/train-labels-idx1-ubyte', "
             rf"got {num_classes}$")
    assert_input_error(match, tmp_path, num_classes=num_classes)
    build(tmp_path, num_classes=label + 1)


# labels that nobody uses


def test_any_label_is_right_without_classes(tmp_path):
    images, labels = random_split("val")
    labels[7] = 255
    write_split(tmp_path, "val", images, labels)
    spec = build(tmp_path, "val", num_classes=None)
    batches = [spec.batch_transforms(batch) for batch in read_batches(spec)]
    assert torch.cat([labels for _, labels in batches]).tolist() == labels.tolist()


@pytest.mark.parametrize("name", ["digits", "folder", "streaming", "synthetic"])
def test_other_sources_check_no_labels_without_classes(name, tmp_path):
    colours = np.zeros((8, 8, 8, 3), dtype=np.uint8)
    if name == "folder":
        for index, image in enumerate(colours):
            (tmp_path / "train" / str(index)).mkdir(parents=True)
            Image.fromarray(image).save(tmp_path / "train" / str(index) / "0.png")
    elif name == "streaming":
        write_images(tmp_path / "train", colours, np.arange(8) - 4)
    spec = build(tmp_path, name=name, num_classes=None, num_samples=8)
    images, labels = spec.batch_transforms(next(iter(spec.dataloader)))
    assert images.shape == (8, 3, 16, 16) and labels.shape == (8,) and labels.dtype == torch.int64
