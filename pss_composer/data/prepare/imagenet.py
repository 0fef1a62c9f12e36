"""Finds the images of an ImageNet-style folder and their labels."""

from __future__ import annotations

import csv
import os
import re
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

from torchvision.datasets.folder import IMG_EXTENSIONS

from pss_composer.errors import InputError

SPLITS = ("train", "val")
WORDNET_ID = re.compile(r"n\d{8}")


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
        InputError: There are no images, or their classes do not fit together.
    """
    if not source.is_dir():
        raise InputError(f"SRC must be a folder, got {str(source)!r}")
    names = [name for name in SPLITS if (source / name).is_dir()]
    if ground_truth is not None:
        if names:
            raise InputError(f"--ground-truth is for a flat folder of images, got a folder {names[0]!r} in SRC")
        return [_find_flat_split(source, ground_truth, known_classes.get("train"))]
    if not names:
        raise InputError(
            "SRC must hold a folder train or val, or be a flat folder of images with --ground-truth, "
            f"got {str(source)!r}"
        )
    splits = [_find_split(name, source / name) for name in names]
    others = [classes for name, classes in known_classes.items() if name not in names]
    expected = others[0] if others else splits[0].classes
    for split in splits:
        if split.classes != expected:
            # the class number is the place of the name in the alphabet: one name more or less shifts the rest
            odd = sorted(set(split.classes) ^ set(expected))
            raise InputError(
                f"SRC must hold the same class folders in every split, got {len(odd)} that only one of two has, "
                f"like {odd[0]!r}, in {str(split.folder)!r}"
            )
    return splits


def read_ground_truth(path: Path, image_names: list[str]) -> tuple[list[str], list[str]]:
    """The classes of the validation images, in any of three forms.

    The development kit's `ILSVRC2012_validation_ground_truth.txt` has a number from 1 to 1000 per image, whose
    WordNet id stands in the kit's `meta.mat` beside it; other lists have a WordNet id per image; Kaggle's
    `LOC_val_solution.csv` names the image, too.

    Args:
        path: The file.
        image_names: File names, sorted: the order of the lists.

    Returns:
        The WordNet id of every image, and those of all classes, sorted.

    Raises:
        InputError: The file has another form, or does not fit the images.
    """
    try:
        lines = path.read_text().split("\n")
    except (OSError, UnicodeDecodeError) as error:
        raise InputError(f"--ground-truth must be a text file, got {str(path)!r}: {error}") from None
    lines = [line.strip() for line in lines if line.strip()]
    if lines and lines[0].startswith("ImageId"):
        ids = _read_solution(path, lines, image_names)
    else:
        ids = lines
        if len(ids) != len(image_names):
            raise InputError(
                f"--ground-truth must have a line per image, got {len(ids)} lines for {len(image_names)} images"
            )
    if all(line.isdigit() for line in ids):
        numbers = _read_meta(path.with_name("meta.mat"))
        unknown = [line for line in ids if int(line) not in numbers]
        if unknown:
            raise InputError(f"--ground-truth must name classes of meta.mat, got {unknown[0]} in {str(path)!r}")
        return [numbers[int(line)] for line in ids], sorted(numbers.values())
    for line in ids:
        if not WORDNET_ID.fullmatch(line):
            raise InputError(
                "--ground-truth must hold the development kit's numbers or WordNet ids like n01440764, "
                f"got {line!r} in {str(path)!r}"
            )
    return ids, sorted(set(ids))


def _find_split(name: str, folder: Path) -> Split:
    entries = _scan(folder)
    classes = sorted(entry.name for entry in entries if entry.is_dir())
    if not classes:
        raise InputError(f"SRC must hold a folder per class in every split, got none in {str(folder)!r}")
    images, num_ignored = [], len(entries) - len(classes)
    for label, class_name in enumerate(classes):
        found, rest = _find_images(folder / class_name, label)
        if not found:
            raise InputError(f"SRC must hold images of every class, got none in {str(folder / class_name)!r}")
        images += [image._replace(name=f"{class_name}/{image.name}") for image in found]
        num_ignored += rest
    return Split(name, folder, classes, images, num_ignored)


def _find_flat_split(folder: Path, ground_truth: Path, known_classes: list[str] | None) -> Split:
    images, num_ignored = _find_images(folder, label=0)
    if not images:
        raise InputError(f"SRC must hold images for --ground-truth, got none in {str(folder)!r}")
    ids, classes = read_ground_truth(ground_truth, [image.name for image in images])
    if known_classes is not None:
        classes = known_classes
    labels = {name: label for label, name in enumerate(classes)}
    unknown = sorted(set(ids) - set(labels))
    if unknown:
        raise InputError(
            f"--ground-truth must name classes of the training images in OUT, got {len(unknown)} others, "
            f"like {unknown[0]}"
        )
    labelled = [image._replace(label=labels[name]) for image, name in zip(images, ids, strict=True)]
    return Split("val", folder, classes, labelled, num_ignored)


def _find_images(folder: Path, label: int) -> tuple[list[SourceImage], int]:
    images, num_ignored = [], 0
    for entry in _scan(folder):
        if entry.name.lower().endswith(IMG_EXTENSIONS) and entry.is_file():
            images.append(SourceImage(entry.name, entry.stat().st_size, label))
        else:
            num_ignored += 1
    return sorted(images), num_ignored


def _scan(folder: Path) -> list[os.DirEntry]:
    try:
        with os.scandir(folder) as entries:
            return list(entries)
    except OSError as error:
        raise InputError(f"SRC must be readable, got {error}") from None


def _read_solution(path: Path, lines: list[str], image_names: list[str]) -> list[str]:
    rows = list(csv.reader(lines))[1:]
    if not all(len(row) == 2 and row[1].split() for row in rows):
        raise InputError(f"--ground-truth must have the columns ImageId,PredictionString, got others in {str(path)!r}")
    ids = {row[0]: row[1].split()[0] for row in rows}
    stems = [Path(name).stem for name in image_names]
    missing = sorted(set(stems) ^ set(ids))
    if missing:
        raise InputError(
            f"--ground-truth must name the images of SRC, got {len(ids)} names for {len(stems)} images; "
            f"{missing[0]} is in one of them alone"
        )
    return [ids[stem] for stem in stems]


def _read_meta(path: Path) -> dict[int, str]:
    """From the development kit's class numbers to WordNet ids, as torchvision reads them."""
    try:
        from scipy.io import loadmat
    except ImportError:
        message = "--ground-truth of the development kit needs scipy, got none: pip install scipy"
        raise InputError(message) from None
    if not path.is_file():
        raise InputError(f"--ground-truth of the development kit needs meta.mat beside it, got none at {str(path)!r}")
    try:
        synsets = loadmat(path, squeeze_me=True)["synsets"]
        # the rest are the classes above these in WordNet's tree
        return {int(synset[0]): str(synset[1]) for synset in synsets if synset[4] == 0}
    except Exception as error:  # scipy's readers raise many things for broken files
        raise InputError(f"--ground-truth needs the development kit's meta.mat, got {str(path)!r}: {error}") from None
