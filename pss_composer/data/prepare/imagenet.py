"""Finds the images of an ImageNet-style folder and their labels."""

from __future__ import annotations

import os
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

from torchvision.datasets.folder import is_image_file

from pss_composer.data.prepare.ground_truth import read_ground_truth
from pss_composer.errors import InputError

SPLITS = ("train", "val")


class SourceImage(NamedTuple):
    """The path of a file in the folder of its split, its size in bytes, and the number of its class."""

    name: str
    size: int
    label: int


@dataclass
class Split:
    """The images of one split.

    Args:
        name: `train` or `val`.
        folder: Holds the images; their names are paths relative to it.
        classes: Names of the class folders, or WordNet ids, in the order of the labels.
        images: In the order of their names.
        num_ignored: Other files and folders beside the images.
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
        known_classes: Class names of the splits that are converted already; all splits must have the same.

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
            # the label of a class is its place in the alphabet: one name more or less shifts the others
            odd = sorted(set(split.classes) ^ set(expected))
            raise InputError(
                f"must hold the same class folders in every split, got {len(odd)} that only one of two has, "
                f"like {odd[0]!r}, in {str(split.folder)!r}",
                key="source",
            )
    return splits


def _find_split(name: str, folder: Path) -> Split:
    classes, _, num_entries = _scan(folder)
    if not classes:
        raise InputError(f"must hold a folder per class in every split, got none in {str(folder)!r}", key="source")
    split = Split(name, folder, classes, [], num_entries - len(classes))
    for label, class_name in enumerate(classes):
        _, images, num_entries = _scan(folder / class_name)
        if not images:
            raise InputError(f"must hold images of every class, got none in {str(folder / class_name)!r}", key="source")
        split.images += [SourceImage(f"{class_name}/{image}", size, label) for image, size in images]
        split.num_ignored += num_entries - len(images)
    return split


def _find_flat_split(folder: Path, ground_truth: Path, classes: list[str] | None) -> Split:
    _, images, num_entries = _scan(folder)
    if not images:
        raise InputError(f"must hold images for the ground truth, got none in {str(folder)!r}", key="source")
    ids, own_classes = read_ground_truth(ground_truth, [name for name, _ in images])
    classes = classes or own_classes
    unknown = sorted(set(ids) - set(classes))
    if unknown:
        raise InputError(
            f"must name classes of the training images that are converted already, got {len(unknown)} others, "
            f"like {unknown[0]}",
            key="ground_truth",
        )
    labels = {name: label for label, name in enumerate(classes)}
    labelled = [SourceImage(*image, labels[name]) for image, name in zip(images, ids, strict=True)]
    return Split("val", folder, classes, labelled, num_entries - len(images))


def _scan(folder: Path) -> tuple[list[str], list[tuple[str, int]], int]:
    """Read a folder.

    Returns:
        The sorted names of its sub-folders; names and sizes in bytes of its images, sorted by name; and the number of
        all its entries.
    """
    try:
        entries = sorted(os.scandir(folder), key=lambda entry: entry.name)
        folders = [entry.name for entry in entries if entry.is_dir()]
        files = [entry for entry in entries if is_image_file(entry.name) and entry.is_file()]
        return folders, [(file.name, file.stat().st_size) for file in files], len(entries)
    except OSError as error:
        raise InputError(f"must be readable, got {error.filename!r}: {error.strerror}", key="source") from None
