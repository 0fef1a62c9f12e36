"""Images from class folders: order, labels, and folders that are wrong."""

import os

import pytest
import torch
from support.sources import NUM_IMAGES, build, read_batches, write_folder

from pss_composer.data.samples import BadSample
from pss_composer.errors import InputError


def assert_input_error(match, path, split="train", **options):
    with pytest.raises(InputError, match=match) as error:
        build("folder", path, split, **options)
    assert "\n" not in str(error.value)


def test_folder_evaluates_class_by_class(paths):
    spec = build("folder", paths["folder"], "val")
    labels = torch.cat([labels for _, labels in read_batches(spec)])
    assert labels.tolist() == sorted(label % 3 for label in range(NUM_IMAGES))
    assert spec.dataloader.dataset.classes == ["class0", "class1", "class2"]


def test_bad_class_folders(tmp_path):
    (tmp_path / "train" / "cat").mkdir(parents=True)
    assert_input_error("^path must hold a folder of images per class: .*cat", tmp_path)
    write_folder(tmp_path, num_images=6)
    (tmp_path / "train" / "cat").rmdir()
    assert_input_error("^num_classes must be at least 3 for the class folders in '.*train', got 2$", tmp_path,
                       num_classes=2)
    (tmp_path / "val" / "class1").rename(tmp_path / "val" / "klass1")
    assert_input_error("the same class folders in every split, got others in '.*val'", tmp_path, "val")


def test_a_split_without_class_folders(tmp_path):
    (tmp_path / "train").mkdir()
    (tmp_path / "train" / "picture.png").touch()
    assert_input_error("^path must hold a folder of images per class: Couldn't find any class folder in", tmp_path)


def test_a_class_folder_that_cannot_be_read_is_named(tmp_path, monkeypatch):
    write_folder(tmp_path, num_images=6)
    secret = tmp_path / "train" / "class1"
    scan = os.scandir

    def refuse(path):  # to root, every folder is readable
        if str(path) == str(secret):
            raise PermissionError(13, "Permission denied", str(path))
        return scan(path)

    monkeypatch.setattr("os.scandir", refuse)
    assert_input_error(f"^path must hold class folders that can be read, got '{secret}': Permission denied$", tmp_path)


def test_an_image_that_does_not_decode_is_named(tmp_path):
    write_folder(tmp_path, num_images=6)
    path = tmp_path / "val" / "class1" / "001.png"
    path.write_bytes(b"no image")
    with pytest.raises(BadSample) as error:
        read_batches(build("folder", tmp_path, "val"))
    assert str(error.value) == f"{str(path)!r} must hold an image, got 'cannot identify image file'"
