"""Files, labels and downloads of torchvision's data sets that are wrong, and downloads that are right."""

import gzip
import hashlib
import io
import struct
import urllib.error
import urllib.request

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
    to_idx,
    write_mnist,
    write_pets,
    write_signs,
)
from torchvision import datasets

from pss_composer.data.samples import BadSample
from pss_composer.errors import InputError

PREFIXES = {"train": "train", "val": "t10k"}


def assert_input_error(match, path, split="train", **options):
    with pytest.raises(InputError, match=match) as error:
        build("torchvision", path, split, **options)
    assert "\n" not in str(error.value)
    return error.value


def test_bad_folder(tmp_path):
    assert_input_error("^path must be a folder, got None$", None)
    assert_input_error("^path must be a folder, got '.*nowhere', which is not one$", tmp_path / "nowhere")


@pytest.mark.parametrize("split", ["train", "val"])
@pytest.mark.parametrize("kind", ["images-idx3", "labels-idx1"])
def test_missing_file(kind, split, tmp_path):
    folder = write_mnist(tmp_path)
    (folder / f"{PREFIXES[split]}-{kind}-ubyte").unlink()
    match = r"^path must hold FashionMNIST as torchvision stores it \(or set download=true\), got "
    assert assert_input_error(match + f"'{tmp_path}': RuntimeError: Dataset not found", tmp_path, split).key == "path"


IMAGES = to_idx(random_images(NUM_IMAGES, 0)[0][..., 0])
LABELS = to_idx(random_images(NUM_IMAGES, 0)[1])


@pytest.mark.parametrize("download", [False, True])
@pytest.mark.parametrize("data", [
    b"<!DOCTYPE html>", gzip.compress(IMAGES), LABELS, b"\0\0\x0d\x03" + IMAGES[4:], b"", IMAGES[:-1], IMAGES + b"\0",
    IMAGES[:9], struct.pack(">4I", 0x803, *3 * [2**32 - 1]), struct.pack(">4I", 0x803, 0, 9, 7),
], ids=["no idx", "packed", "labels", "float32", "empty", "truncated", "too long", "header", "huge", "no image"])
def test_bad_image_file(data, download, tmp_path):
    (write_mnist(tmp_path) / "train-images-idx3-ubyte").write_bytes(data)
    # with all files there, there is nothing to download
    match = "^download must get FashionMNIST into " if download else "^path must hold FashionMNIST as torchvision "
    error = assert_input_error(match, tmp_path, download=download)
    assert f"{str(tmp_path)!r}" in str(error) and error.key == ("download" if download else "path")


def test_not_as_many_labels_as_images(tmp_path):
    images, _ = random_images(NUM_IMAGES, 0)
    (write_mnist(tmp_path) / "train-images-idx3-ubyte").write_bytes(to_idx(images[:42, ..., 0]))
    title = f"FashionMNIST in '{tmp_path}'"
    match = f"^path must hold as many labels as images, got 43 labels for the 42 images of {title}$"
    assert_input_error(match, tmp_path)


def test_no_images(tmp_path):
    (write_pets(tmp_path) / "annotations" / "test.txt").write_text("")
    match = f"^path must hold at least one image, got none of OxfordIIITPet in '{tmp_path}'$"
    assert_input_error(match, tmp_path, "val", dataset="OxfordIIITPet")


@pytest.mark.parametrize("num_workers", [0, 2])
def test_a_picture_that_does_not_decode(num_workers, tmp_path, caplog):
    folder = write_pets(tmp_path)
    images, _ = random_images(NUM_IMAGES, 0)
    (folder / "images" / "breed2_trainval5.jpg").write_bytes(b"no picture")
    (folder / "images" / "breed2_test5.jpg").unlink()
    options = {"dataset": "OxfordIIITPet", "num_workers": num_workers, "image_size": 12, "augmentation": EXACT}
    for split, reason in (("train", "UnidentifiedImageError: cannot identify"), ("val", "FileNotFoundError: ")):
        spec = build("torchvision", tmp_path, split, batch_size=43, **options)
        with pytest.raises(BadSample) as error:
            read_batches(spec)
        spec.dataloader.close()
        start = f"image 5 of OxfordIIITPet in {str(tmp_path)!r} must hold an image, got "
        assert str(error.value).startswith(start) and reason in str(error.value) and "\n" not in str(error.value)
    for split, num_left in (("train", 43), ("val", 42)):
        spec = build("torchvision", tmp_path, split, batch_size=43, on_bad_sample="skip", **options)
        (pixels, _), = read_batches(spec)
        assert len(pixels) == num_left and spec.dataloader.num_skipped == 1
        if split == "train":  # the next one is there in its place
            assert sum(np.array_equal(image, images[6]) for image in pixels.numpy()) == 2
    assert caplog.text.count("skipped: image 5 of OxfordIIITPet") == 2


# labels


@pytest.mark.parametrize(("label", "num_classes"), [(10, 10), (255, 255)])
def test_labels_not_below_num_classes(label, num_classes, tmp_path):
    folder = write_mnist(tmp_path)
    labels = random_images(NUM_IMAGES, 0)[1]
    labels[7] = label
    (folder / "train-labels-idx1-ubyte").write_bytes(to_idx(labels))
    title = f"FashionMNIST in '{tmp_path}'"
    match = f"^num_classes must be at least {label + 1} for the labels of {title}, got {num_classes}$"
    assert assert_input_error(match, tmp_path, num_classes=num_classes).key == "num_classes"
    build("torchvision", tmp_path, num_classes=label + 1)


@pytest.mark.parametrize(("dataset", "write", "num_classes"), [
    ("FashionMNIST", write_mnist, 10),  # it names ten classes, though the labels here are below three
    ("GTSRB", write_signs, 3),  # it names none
    ("OxfordIIITPet", write_pets, 3),
])
def test_too_few_classes(dataset, write, num_classes, tmp_path):
    write(tmp_path)
    assert_input_error(f"^num_classes must be at least {num_classes} for the labels of {dataset} in ", tmp_path,
                       dataset=dataset, num_classes=num_classes - 1)
    build("torchvision", tmp_path, dataset=dataset, num_classes=num_classes)


def test_any_label_is_right_without_classes(tmp_path):
    folder = write_mnist(tmp_path)
    labels = random_images(NUM_IMAGES, 1)[1]
    labels[7] = 255
    (folder / "t10k-labels-idx1-ubyte").write_bytes(to_idx(labels))
    batches = read_inputs(build("torchvision", tmp_path, "val", num_classes=None))
    assert torch.cat([labels for _, labels in batches]).tolist() == labels.tolist()


# download


@pytest.fixture
def server(tmp_path, monkeypatch):
    """The files of Fashion-MNIST in a network of its own: a folder, packed as on its servers."""
    folder = write_mnist(tmp_path / "server")
    resources = []
    for path in sorted(folder.iterdir()):
        path.with_name(f"{path.name}.gz").write_bytes(gzip.compress(path.read_bytes()))
        resources.append((f"{path.name}.gz", hashlib.md5((folder / f"{path.name}.gz").read_bytes()).hexdigest()))
    monkeypatch.setattr(datasets.FashionMNIST, "resources", resources)

    def open_url(request):
        path = folder / request.full_url.rpartition("/")[2]
        if not path.exists():
            raise urllib.error.URLError("no route to host")
        response = io.BytesIO(path.read_bytes())
        response.url, response.length = request.full_url, path.stat().st_size
        return response

    monkeypatch.setattr(urllib.request, "urlopen", open_url)
    return folder


def test_download(server, tmp_path, paths):
    expected = read_batches(build("torchvision", paths["torchvision"]))
    for _ in range(2):
        assert_same_batches(read_batches(build("torchvision", tmp_path / "new", download=True)), expected)
        for path in server.iterdir():
            path.unlink()  # what is there is not downloaded again
    assert_same_batches(read_batches(build("torchvision", tmp_path / "new")), expected)


def test_packed_files_are_unpacked_without_a_network(server, tmp_path, paths):
    raw = tmp_path / "data" / "FashionMNIST" / "raw"
    raw.mkdir(parents=True)
    for path in server.glob("*.gz"):
        path.rename(raw / path.name)
    assert_input_error("^path must hold FashionMNIST as torchvision stores it", tmp_path / "data")
    expected = read_batches(build("torchvision", paths["torchvision"]))
    assert_same_batches(read_batches(build("torchvision", tmp_path / "data", download=True)), expected)


def test_bad_downloads(server, tmp_path):
    match = "^download must get FashionMNIST into "
    assert_input_error(match + "'/proc/data', got FileNotFoundError", "/proc/data", download=True)
    (server / "train-labels-idx1-ubyte.gz").write_bytes(b"cut off")
    error = assert_input_error(match + ".*File not found or corrupted", tmp_path / "new", download=True)
    assert error.key == "download"
    (server / "t10k-labels-idx1-ubyte.gz").unlink()
    assert_input_error(match + ".*no route to host", tmp_path / "other", download=True)
