"""Verifies MDS shards of images: files, sizes, hashes, labels and a sample of the images."""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import closing
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import numpy as np
from streaming.base.compression import decompress
from streaming.base.format.mds.encodings import mds_decode
from streaming.base.format.mds.reader import MDSReader
from streaming.base.hashing import get_hash
from tqdm import tqdm

from pss_composer.data.augmentation.decoding import decode_tensor
from pss_composer.data.mds.stream import hide_password
from pss_composer.data.prepare.imagenet import SPLITS
from pss_composer.data.prepare.stores import Store, open_store
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
        raise InputError(f"must be at least 0, got {samples_per_shard}", key="samples_per_shard")
    hidden, num_problems = hide_password(path), 0
    with closing(open_store(path, key="path")) as store:
        indices = {folder: store.read(f"{folder}index.json") for folder in ("", *(f"{split}/" for split in SPLITS))}
        indices = {folder: index for folder, index in indices.items() if index is not None}
        if not indices:
            raise InputError(f"must hold an index.json, or one in train or val, got none at {hidden}", key="path")
        for folder, index in indices.items():
            name = folder.strip("/") or hidden.rstrip("/").rsplit("/", 1)[-1]
            problems = _check_split(store, folder, name, index, samples_per_shard)
            for problem in problems:
                print(f"{name}: {problem}")
            num_problems += len(problems)
    print(f"{num_problems:,} problem{'' if num_problems == 1 else 's'}" if num_problems else "no problems")
    return num_problems


def _check_split(store: Store, folder: str, name: str, index: bytes, samples_per_shard: int) -> list[str]:
    """Print what a split holds, and return its problems."""
    try:
        shards = _read_index(index)
    except BadShard as error:
        return [str(error)]
    problems, classes, counts = [], None, Counter()
    data = store.read(f"{folder}classes.json")
    if data is not None:
        try:
            classes = [str(class_name) for class_name in json.loads(data)]
        except (ValueError, TypeError):
            problems.append("classes.json: must be a list of names")
    for shard in tqdm(shards, desc=name, unit=" shards", disable=None):
        basename = (shard.zip_data or shard.raw_data).basename
        decode = _find_decoder(shard)
        try:
            samples = _read_shard(store, folder, shard)
        except BadShard as error:
            problems.append(f"{basename}: {error}")
            continue
        for number, (_, label) in enumerate(samples):
            counts[label] += 1
            if label < 0 or (classes is not None and label >= len(classes)):
                rule = "at least 0" if classes is None else f"in [0, {len(classes)})"
                problems.append(f"{basename} sample {number}: label must be {rule}, got {label}")
        for number in _spread(len(samples), samples_per_shard):
            try:
                decode(samples[number][0])
            except Exception as error:  # the decoders of other encodings than JPEG have no common class
                problems.append(f"{basename} sample {number}: {to_line(error)}")
    num_bytes = sum((shard.zip_data or shard.raw_data).bytes for shard in shards)
    print(f"{name}: {counts.total():,} images {_describe_classes(counts, classes)}, in {len(shards):,} shards, "
          f"{num_bytes:,} bytes")
    return problems


def _read_index(data: bytes) -> list[MDSReader]:
    try:
        shards = [MDSReader.from_json("", None, shard) for shard in json.loads(data)["shards"]]
        for shard in shards:
            shard.validate(allow_unsafe_types=False)
            columns = dict(zip(shard.column_names, shard.column_encodings, strict=True))
            if "x" not in columns or columns.get("y") != "int":
                raise BadShard(f"index.json: must name MDS shards with the columns x and y (int), got {columns}")
            for info in (shard.raw_data, shard.zip_data or shard.raw_data):
                str(info.basename), int(info.bytes), dict(info.hashes)
            int(shard.samples), list(shard.column_sizes)
    except BadShard:
        raise
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        message = f"index.json: must be the index of MDS shards, got a broken one ({to_line(error)})"
        raise BadShard(message) from None
    return shards


def _find_decoder(shard: MDSReader) -> Callable[[bytes], Any]:
    encoding = shard.column_encodings[shard.column_names.index("x")]
    return decode_tensor if encoding in ("jpeg", "png") else lambda data: mds_decode(encoding, data)


def _read_shard(store: Store, folder: str, shard: MDSReader) -> list[tuple[bytes, int]]:
    """The encoded picture and the label of every sample."""
    info = shard.zip_data or shard.raw_data
    with TemporaryDirectory() as workspace:
        name = f"{folder}{info.basename}"
        file = store.retry(lambda: store.fetch(name, Path(workspace)), f"must be readable for {name}")
        if file is None:
            raise BadShard("must be there, but is missing")
        data = file.read_bytes()
        if len(data) != info.bytes:
            raise BadShard(f"must have {info.bytes} bytes, got {len(data)}")
        for algorithm, expected in info.hashes.items():
            found = get_hash(algorithm, data)
            if found != expected:
                raise BadShard(f"must have the {algorithm} hash {expected}, got {found}")
        if shard.zip_data:
            data, file = decompress(shard.compression, data), Path(workspace, "raw")
            file.write_bytes(data)
        shard.dirname, shard.raw_data.basename = str(file.parent), file.name
        try:
            return list(_read_samples(shard, data))
        except (ValueError, IndexError) as error:
            raise error if isinstance(error, BadShard) else BadShard(f"must be MDS, got {to_line(error)}") from None


def _read_samples(shard: MDSReader, data: bytes) -> Iterator[tuple[bytes, int]]:
    """Read with streaming's reader, which trusts the numbers in the file."""
    num_samples = int.from_bytes(data[:4], "little")
    if num_samples != shard.samples:
        raise BadShard(f"must hold the {shard.samples} samples of index.json, got {num_samples}")
    offsets = np.frombuffer(data, np.uint32, num_samples + 1, offset=4).astype(np.int64)
    sizes = np.diff(offsets)
    if offsets[-1] != len(data) or offsets[0] < 4 * (num_samples + 2) or np.any(sizes < 0):
        raise BadShard("must be MDS, but its samples overlap or end elsewhere than the file")
    shard.column_encodings = ["bytes"] * len(shard.column_names)
    num_variable = sum(not size for size in shard.column_sizes)
    for number, size in enumerate(sizes):
        sample = shard[number]
        if sum(map(len, sample.values())) + 4 * num_variable != size:
            raise BadShard(f"must be MDS, but the columns of sample {number} do not fill it")
        yield sample["x"], int(mds_decode("int", sample["y"]))


def _spread(num_samples: int, num_chosen: int) -> list[int]:
    if num_samples == 0 or num_chosen == 0:
        return []
    return sorted({round(number) for number in np.linspace(0, num_samples - 1, min(num_samples, num_chosen))})


def _describe_classes(counts: Counter[int], classes: list[str] | None) -> str:
    names = {label: str(label) for label in counts} | dict(enumerate(classes or ()))
    counts = dict.fromkeys(range(len(classes or ())), 0) | counts
    if not counts:
        return "of no class"
    smallest, largest = (choose(counts, key=counts.__getitem__) for choose in (min, max))
    return (
        f"of {len(counts)} classes (from {counts[smallest]:,} of {names[smallest]} "
        f"to {counts[largest]:,} of {names[largest]})"
    )
