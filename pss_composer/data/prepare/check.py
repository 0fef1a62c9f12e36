"""Verifies MDS shards of images: files, sizes, hashes, labels and a sample of the images."""

from __future__ import annotations

import json
from collections import Counter
from contextlib import closing

import numpy as np
from tqdm import tqdm

from pss_composer.data.mds.shard_file import decode_image, read_index, read_shard
from pss_composer.data.prepare.imagenet import SPLITS
from pss_composer.data.prepare.stores import Store, open_store
from pss_composer.errors import InputError, to_line


def check_data(path: str, *, samples_per_shard: int = 8) -> int:
    """Verify every shard; print what each split holds and one line per problem, then the number of problems.

    Args:
        path: A folder or URL that holds `train` or `val` or both, or the shards of one split.
        samples_per_shard: Images to decode, evenly spread over each shard; 0 for none.

    Returns:
        The number of problems.

    Raises:
        InputError: There is no finished split, or the store fails.
    """
    if samples_per_shard < 0:
        raise InputError(f"must be at least 0, got {samples_per_shard}", key="samples_per_shard")
    num_problems = 0
    with closing(open_store(path, key="path")) as store:
        folders = ["", *(f"{split}/" for split in SPLITS)]
        indices = {folder: index for folder in folders if (index := store.read(f"{folder}index.json")) is not None}
        if not indices:
            message = f"must hold an index.json, or one in train or val, got none at {store.shown}"
            raise InputError(message, key="path")
        for folder, index in indices.items():
            name = folder.strip("/") or store.shown.rstrip("/").rsplit("/", 1)[-1]
            problems = _check_split(store, folder, name, index, samples_per_shard)
            for problem in problems:
                print(f"{name}: {problem}")
            num_problems += len(problems)
    print(f"{num_problems:,} problem{'' if num_problems == 1 else 's'}" if num_problems else "no problems")
    return num_problems


def _check_split(store: Store, folder: str, name: str, index: bytes, samples_per_shard: int) -> list[str]:
    """Print what a split holds, and return its problems."""
    try:
        shards = read_index(index)
    except ValueError as error:
        return [f"index.json: {error}"]
    problems, classes = [], None
    counts: Counter[int] = Counter()
    data = store.read(f"{folder}classes.json")
    if data is not None:
        try:
            classes = [str(class_name) for class_name in json.loads(data)]
        except (ValueError, TypeError):
            problems.append("classes.json: must be a list of names")
    for shard in tqdm(shards, desc=name, unit=" shards", disable=None):
        basename = (shard.zip_data or shard.raw_data).basename
        data = store.read(f"{folder}{basename}")
        if data is None:
            problems.append(f"{basename}: must be there, but is missing")
            continue
        try:
            samples = read_shard(shard, data)
        except Exception as error:  # the libraries that unpack have no common class of errors
            problems.append(f"{basename}: {to_line(error)}")
            continue
        for number, (_, label) in enumerate(samples):
            counts[label] += 1
            if label < 0 or (classes is not None and label >= len(classes)):
                rule = "at least 0" if classes is None else f"in [0, {len(classes)})"
                problems.append(f"{basename} sample {number}: label must be {rule}, got {label}")
        num_decoded = min(len(samples), samples_per_shard)
        for number in np.linspace(0, len(samples) - 1, num_decoded).round().astype(int):
            try:
                decode_image(shard, samples[number][0])
            except Exception as error:  # the decoders have no common class of errors either
                problems.append(f"{basename} sample {number}: {to_line(error)}")
    num_bytes = sum((shard.zip_data or shard.raw_data).bytes for shard in shards)
    print(f"{name}: {counts.total():,} images {_describe_classes(counts, classes)}, in {len(shards):,} shards, "
          f"{num_bytes:,} bytes")
    return problems


def _describe_classes(counts: Counter[int], classes: list[str] | None) -> str:
    """How many classes there are, with the smallest and the largest; classes without images count, too.

    Args:
        counts: Number of images by label.
        classes: Names of the classes in the order of their labels, if there is a `classes.json`.
    """
    names = dict(enumerate(classes or ()))
    numbers = dict.fromkeys(names, 0) | counts
    if not numbers:
        return "of no class"
    smallest, largest = (choose(numbers, key=numbers.__getitem__) for choose in (min, max))
    return (f"of {len(numbers)} classes (from {numbers[smallest]:,} of {names.get(smallest, smallest)} "
            f"to {numbers[largest]:,} of {names.get(largest, largest)})")
