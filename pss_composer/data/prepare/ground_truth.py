"""Reads the classes of ImageNet's validation images, which are published without class folders."""

from __future__ import annotations

import csv
import io
import re
from pathlib import Path

from pss_composer.errors import InputError

WORDNET_ID = re.compile(r"n\d{8}")


def read_ground_truth(path: Path, image_names: list[str]) -> tuple[list[str], list[str]]:
    """The classes of the validation images, from a file in one of three forms.

    The development kit's `ILSVRC2012_validation_ground_truth.txt` has a class number from 1 to 1000 per image; the
    WordNet ids of these numbers are in the kit's `meta.mat` beside it. Other lists have a WordNet id per image.
    Kaggle's `LOC_val_solution.csv` has the name and the WordNet id of each image.

    Args:
        path: The file.
        image_names: File names, sorted. A file without names must be in the same order.

    Returns:
        The WordNet id of every image, and the sorted WordNet ids of all classes.

    Raises:
        InputError: The file has another form, or does not fit the images.
    """
    try:
        lines = [line.strip() for line in path.read_text().split("\n") if line.strip()]
    except (OSError, UnicodeDecodeError) as error:
        raise _error(f"must be a text file, got {str(path)!r}: {error}") from None
    ids = _read_solution(path, lines, image_names) if lines and lines[0].startswith("ImageId") else lines
    if len(ids) != len(image_names):
        raise _error(f"must have a line per image, got {len(ids)} lines for {len(image_names)} images")
    if all(line.isdecimal() for line in ids):
        numbers = _read_meta(path.with_name("meta.mat"))
        unknown = [line for line in ids if int(line) not in numbers]
        if unknown:
            raise _error(f"must name classes of meta.mat, got {unknown[0]} in {str(path)!r}")
        return [numbers[int(line)] for line in ids], sorted(numbers.values())
    for line in ids:
        if not WORDNET_ID.fullmatch(line):
            raise _error("must hold the development kit's numbers or WordNet ids like n01440764, "
                         f"got {line!r} in {str(path)!r}")
    return ids, sorted(set(ids))


def _read_solution(path: Path, lines: list[str], image_names: list[str]) -> list[str]:
    try:
        ids = {name: prediction.split()[0] for name, prediction in csv.reader(lines[1:])}
    except (ValueError, IndexError):
        raise _error(f"must have the columns ImageId,PredictionString, got others in {str(path)!r}") from None
    stems = [Path(name).stem for name in image_names]
    missing = sorted(set(stems) ^ set(ids))
    if missing:
        raise _error(f"must name the images of the folder, got {len(ids)} names for {len(stems)} images; "
                     f"only one of the two has {missing[0]}")
    return [ids[stem] for stem in stems]


def _read_meta(path: Path) -> dict[int, str]:
    """From the development kit's class numbers to WordNet ids, as torchvision reads them."""
    try:
        from scipy.io import loadmat

        synsets = loadmat(io.BytesIO(path.read_bytes()), squeeze_me=True)["synsets"]
        # only the leaves of WordNet's tree, which have no children, are classes of images
        return {int(synset[0]): str(synset[1]) for synset in synsets if synset[4] == 0}
    except Exception as error:  # scipy is missing, or raises one of many errors for a broken file
        raise _error(f"of the development kit needs meta.mat beside it, got {str(path)!r}: {error}") from None


def _error(rule: str) -> InputError:
    return InputError(rule, key="ground_truth")
