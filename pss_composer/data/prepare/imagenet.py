"""Finds the images of an ImageNet-style folder and their labels."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

from torchvision.datasets.folder import IMG_EXTENSIONS

from pss_composer.data.prepare.ground_truth import read_ground_truth
from pss_composer.errors import InputError

SPLITS = ("train", "val")


class SourceImage(NamedTuple):
    """A file below the folder of its split, its size in bytes, and the number of its class."""

    name: str
    size: int
    label: int


@dataclass
class Split:
    """The images of one split.

    Args:
        name: `train` or `val`.
        folder: The names of the images are below.
        classes: Names of the class folders, or WordNet ids, in the order of the labels.
        images: In the order of their names.
        num_ignored: Entries beside the images that have no image's suffix.
    """

    name: str
    folder: Path
    classes: list[str]
    images: list[SourceImage]
    num_ignored: int


def find_splits(source: Path, ground_truth: Path | None, known_classes: dict[str, list[str]]) -> list[Split]:
    """The splits of a folder.

    Args:
        source: Holds `train/CLASS/*` or `val/CLASS/*` or both; or the validation images themselves, which then
            need `ground_truth`.
        ground_truth: File with the class of every validation image, see `read_ground_truth`.
        known_classes: Class names of the splits that are already converted: all must have the same.

    Raises:
        InputError: There are no images, some cannot be read, or their classes do not fit together.
    """
    if not os.path.isdir(source):
        raise InputError(f"must be a folder, got {str(source)!r}", key="source")
    names = [name for name in SPLITS if os.path.isdir(source / name)]
    if ground_truth is not None:
        if names:
            raise InputError(f"needs a flat folder of images, got a folder {names[0]!r} in {str(source)!r}",
                             key="ground_truth")
        return [_find_flat_split(source, ground_truth, known_classes.get("train"))]
    if not names:
        raise InputError(
            "must hold a folder train or val, or be a flat folder of images whose classes a ground truth gives, "
            f"got {str(source)!r}",
            key="source",
        )
    splits = [_find_split(name, source / name) for name in names]
    others = [classes for name, classes in known_classes.items() if name not in names]
    expected = others[0] if others else splits[0].classes
    for split in splits:
        if split.classes != expected:
            # the class number is the place of the name in the alphabet: one name more or less shifts the rest
            odd = sorted(set(split.classes) ^ set(expected))
            raise InputError(
                f"must hold the same class folders in every split, got {len(odd)} that only one of two has, "
                f"like {odd[0]!r}, in {str(split.folder)!r}",
                key="source",
            )
    return splits


def _find_split(name: str, folder: Path) -> Split:
    with _naming_unreadable():
        entries = list(os.scandir(folder))
        classes = sorted(entry.name for entry in entries if entry.is_dir())
    if not classes:
        raise InputError(f"must hold a folder per class in every split, got none in {str(folder)!r}", key="source")
    images, num_ignored = [], len(entries) - len(classes)
    for label, class_name in enumerate(classes):
        found, num_others = _find_images(folder / class_name, label)
        if not found:
            message = f"must hold images of every class, got none in {str(folder / class_name)!r}"
            raise InputError(message, key="source")
        images += [image._replace(name=f"{class_name}/{image.name}") for image in found]
        num_ignored += num_others
    return Split(name, folder, classes, images, num_ignored)


def _find_flat_split(folder: Path, ground_truth: Path, known_classes: list[str] | None) -> Split:
    images, num_ignored = _find_images(folder, label=0)
    if not images:
        raise InputError(f"must hold images for the ground truth, got none in {str(folder)!r}", key="source")
    ids, classes = read_ground_truth(ground_truth, [image.name for image in images])
    if known_classes is not None:
        classes = known_classes
    labels = {name: label for label, name in enumerate(classes)}
    unknown = sorted(set(ids) - set(labels))
    if unknown:
        raise InputError(
            f"must name classes of the training images that are converted already, got {len(unknown)} others, "
            f"like {unknown[0]}",
            key="ground_truth",
        )
    labelled = [image._replace(label=labels[name]) for image, name in zip(images, ids, strict=True)]
    return Split("val", folder, classes, labelled, num_ignored)


def _find_images(folder: Path, label: int) -> tuple[list[SourceImage], int]:
    """The images in a folder in the order of their names, and the number of other entries."""
    with _naming_unreadable():
        entries = list(os.scandir(folder))
        images = sorted(
            SourceImage(entry.name, entry.stat().st_size, label)
            for entry in entries if entry.name.lower().endswith(IMG_EXTENSIONS) and entry.is_file()
        )
    return images, len(entries) - len(images)


@contextmanager
def _naming_unreadable() -> Iterator[None]:
    try:
        yield
    except OSError as error:
        raise InputError(f"must be readable, got {error.filename!r}: {error.strerror}", key="source") from None
