"""Verifies MDS shards of images: files, sizes, hashes, labels and a sample of the images."""

from __future__ import annotations

import json
from collections.abc import Iterator
from typing import Any

import numpy as np
from streaming.base.compression import decompress
from streaming.base.format.mds.encodings import mds_decode
from streaming.base.hashing import get_hash
from tqdm import tqdm

from pss_composer.data.augmentation.decoding import decode_tensor
from pss_composer.data.mds.stream import hide_password
from pss_composer.data.prepare.imagenet import SPLITS
from pss_composer.data.prepare.stores import Store, open_store, with_retries
from pss_composer.errors import InputError, to_line


class BadShard(ValueError):
    """What is wrong with a shard, in one line."""


def check_data(path: str, *, samples_per_shard: int = 8) -> int:
    """Verify every shard and print what the splits hold, then a line per problem and their number.

    Args:
        path: A folder or URL that holds the splits `train` or `val` or both, or one split.
        samples_per_shard: Images to decode, evenly spread over each shard; 0 for none.

    Returns:
        The number of problems.

    Raises:
        InputError: There is no finished split, or the store fails.
    """
    if samples_per_shard < 0:
        raise InputError(f"--samples-per-shard must be at least 0, got {samples_per_shard}")
    store = open_store(path)
    indices = {split: _read(store, split, "index.json") for split in ("", *SPLITS)}
    indices = {split: data for split, data in indices.items() if data is not None}
    if not indices:
        raise InputError(f"PATH must hold an index.json, or one in train or val, got none at {hide_password(path)}")
    num_problems = 0
    for split, data in indices.items():
        name = split or hide_password(path).rstrip("/").rsplit("/", 1)[-1]
        problems = _check_split(store, split, name, data, samples_per_shard)
        for problem in problems:
            print(f"{name}: {problem}")
        num_problems += len(problems)
    store.close()
    print(f"{num_problems:,} problem{'' if num_problems == 1 else 's'}" if num_problems else "no problems")
    return num_problems


def _check_split(store: Store, split: str, name: str, index: bytes, samples_per_shard: int) -> list[str]:
    try:
        shards = _read_index(index)
    except BadShard as error:
        return [str(error)]
    problems = []
    classes = None
    data = _read(store, split, "classes.json")
    if data is not None:
        try:
            classes = [str(class_name) for class_name in json.loads(data)]
        except (ValueError, TypeError):
            problems.append("classes.json: must be a list of names")
    counts: dict[int, int] = {}
    for shard in tqdm(shards, desc=name, unit=" shards", disable=None):
        info = shard["zip_data"] or shard["raw_data"]
        try:
            samples = _read_shard(store, split, shard, info)
            labels = [int(np.frombuffer(sample["y"], np.int64)[0]) for sample in samples]
        except BadShard as error:
            problems.append(f"{info['basename']}: {error}")
            continue
        for number, label in enumerate(labels):
            counts[label] = counts.get(label, 0) + 1
            if label < 0 or (classes is not None and label >= len(classes)):
                rule = "at least 0" if classes is None else f"in [0, {len(classes)})"
                problems.append(f"{info['basename']} sample {number}: label must be {rule}, got {label}")
        encoding = shard["column_encodings"][shard["column_names"].index("x")]
        for number in _spread(len(samples), samples_per_shard):
            try:
                _decode(encoding, samples[number]["x"])
            except Exception as error:  # the decoders of other encodings than JPEG have no common class
                problems.append(f"{info['basename']} sample {number}: {to_line(error)}")
    num_images = sum(counts.values())
    num_bytes = sum((shard["zip_data"] or shard["raw_data"])["bytes"] for shard in shards)
    print(
        f"{name}: {num_images:,} images {_describe_classes(counts, classes)}, in {len(shards):,} shards, "
        f"{num_bytes:,} bytes"
    )
    return problems


def _read(store: Store, split: str, name: str) -> bytes | None:
    path = _join(split, name)
    return with_retries(store, lambda: store.read(path), f"PATH must be readable for {path}")


def _join(split: str, name: str) -> str:
    return f"{split}/{name}" if split else name


def _read_index(data: bytes) -> list[dict[str, Any]]:
    """The shards of an index, with all keys that are used here."""
    try:
        shards = json.loads(data)["shards"]
        for shard in shards:
            columns = dict(zip(shard["column_names"], shard["column_encodings"], strict=True))
            if shard["format"] != "mds" or "x" not in columns or columns["y"] != "int":
                raise BadShard(f"index.json: must name MDS shards with the columns x and y (int), got {columns}")
            for info in (shard["raw_data"], shard["zip_data"] or shard["raw_data"]):
                str(info["basename"]), int(info["bytes"]), dict(info["hashes"])
            int(shard["samples"]), list(shard["column_sizes"])
    except (ValueError, KeyError, TypeError) as error:
        if isinstance(error, BadShard):
            raise
        raise BadShard(f"index.json: must be the index of MDS shards, got a broken one ({error})") from None
    return shards


def _read_shard(store: Store, split: str, shard: dict[str, Any], info: dict[str, Any]) -> list[dict[str, bytes]]:
    """The columns of every sample, as they are encoded."""
    data = _read(store, split, info["basename"])
    if data is None:
        raise BadShard("must be there, but is missing")
    if len(data) != info["bytes"]:
        raise BadShard(f"must have {info['bytes']} bytes, got {len(data)}")
    for algorithm, expected in info["hashes"].items():
        found = get_hash(algorithm, data)
        if found != expected:
            raise BadShard(f"must have the {algorithm} hash {expected}, got {found}")
    if shard["zip_data"]:
        data = decompress(shard["compression"], data)
    try:
        return list(_split_samples(data, shard))
    except BadShard:
        raise
    except ValueError as error:
        raise BadShard(f"must be MDS, got {error}") from None


def _split_samples(data: bytes, shard: dict[str, Any]) -> Iterator[dict[str, bytes]]:
    """MDS: the number of samples, where each begins and the last ends, and then in each the sizes and the values."""
    num_samples = shard["samples"]
    header_size = 4 * (num_samples + 2)
    if len(data) < header_size or int.from_bytes(data[:4], "little") != num_samples:
        raise BadShard(f"must hold the {num_samples} samples of index.json, got {int.from_bytes(data[:4], 'little')}")
    offsets = np.frombuffer(data, np.uint32, num_samples + 1, offset=4).astype(np.int64)
    if offsets[-1] != len(data) or offsets[0] < header_size or np.any(np.diff(offsets) < 0):
        raise BadShard("must be MDS, but its samples overlap or end elsewhere than the file")
    num_sizes = sum(size is None for size in shard["column_sizes"])
    for number, begin in enumerate(offsets[:-1].tolist()):
        sizes = iter(np.frombuffer(data, np.uint32, num_sizes, offset=begin).tolist())
        position = begin + 4 * num_sizes
        sample = {}
        for name, fixed_size in zip(shard["column_names"], shard["column_sizes"], strict=True):
            size = next(sizes) if fixed_size is None else fixed_size
            sample[name] = data[position:position + size]
            position += size
        if position != offsets[number + 1]:
            raise BadShard(f"must be MDS, but the columns of sample {number} do not fill it")
        yield sample


def _spread(num_samples: int, num_chosen: int) -> list[int]:
    if num_samples == 0 or num_chosen == 0:
        return []
    return sorted({round(number) for number in np.linspace(0, num_samples - 1, min(num_samples, num_chosen))})


def _decode(encoding: str, data: bytes) -> None:
    if encoding in ("jpeg", "png"):
        decode_tensor(data)
    else:
        mds_decode(encoding, data)


def _describe_classes(counts: dict[int, int], classes: list[str] | None) -> str:
    names = {label: str(label) for label in counts} | dict(enumerate(classes or ()))
    counts = dict.fromkeys(range(len(classes or ())), 0) | counts
    if not counts:
        return "of no class"
    smallest, largest = (choose(counts, key=counts.__getitem__) for choose in (min, max))
    return (
        f"of {len(counts)} classes (from {counts[smallest]:,} of {names[smallest]} "
        f"to {counts[largest]:,} of {names[largest]})"
    )
