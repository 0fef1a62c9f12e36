"""Reads whole shards with streaming's own reader, after checking every number in them."""

from __future__ import annotations

import json
from copy import copy
from itertools import pairwise
from typing import Any

import numpy as np
from streaming.base.compression import decompress
from streaming.base.format.mds.encodings import mds_decode
from streaming.base.format.mds.reader import MDSReader
from streaming.base.hashing import get_hash

from pss_composer.data.augmentation.decoding import decode_tensor
from pss_composer.errors import to_line


def read_index(data: bytes) -> list[MDSReader]:
    """The shards that an `index.json` names, in the columns x and y (int).

    Raises:
        ValueError: The index is broken, or names other shards.
    """
    try:
        shards = [MDSReader.from_json("", None, shard) for shard in json.loads(data)["shards"]]
        for shard in shards:
            shard.validate(allow_unsafe_types=False)
            columns = dict(zip(shard.column_names, shard.column_encodings, strict=True))
            if "x" not in columns or columns.get("y") != "int":
                raise ValueError(f"the columns must be x and y (int), got {columns}")
    except (ValueError, KeyError, TypeError) as error:
        raise ValueError(f"must be the index of MDS shards, got a broken one ({to_line(error)})") from None
    return shards


def read_shard(shard: MDSReader, data: bytes) -> list[tuple[bytes, int]]:
    """The encoded picture x and the label y of every sample.

    Args:
        shard: Its entry in the index.
        data: Its file, as it is stored.

    Raises:
        ValueError: The file has another size or hash than the index says, or is not an MDS shard.
        Exception: The file cannot be unpacked; the class depends on the library of the compression.
    """
    info = shard.zip_data or shard.raw_data
    if len(data) != info.bytes:
        raise ValueError(f"must have {info.bytes} bytes, got {len(data)}")
    for algorithm, expected in info.hashes.items():
        found = get_hash(algorithm, data)
        if found != expected:
            raise ValueError(f"must have the {algorithm} hash {expected}, got {found}")
    if shard.zip_data:
        data = decompress(shard.compression, data)
    num_samples = int.from_bytes(data[:4], "little")
    if num_samples != shard.samples:
        raise ValueError(f"must hold the {shard.samples} samples of index.json, got {num_samples}")
    offsets = np.frombuffer(data, np.uint32, num_samples + 1, offset=4).astype(np.int64)
    if offsets[0] < 4 * (num_samples + 2) or np.any(np.diff(offsets) < 0) or offsets[-1] != len(data):
        raise ValueError("must be MDS, but its samples overlap or end elsewhere than the file")
    reader = copy(shard)
    reader.column_encodings = ["bytes"] * len(shard.column_names)  # the reader leaves the values as they are stored
    num_variable = sum(not size for size in shard.column_sizes)
    samples = []
    for number, (begin, end) in enumerate(pairwise(offsets.tolist())):
        sample = reader.decode_sample(data[begin:end])
        if sum(map(len, sample.values())) + 4 * num_variable != end - begin:
            raise ValueError(f"must be MDS, but the columns of sample {number} do not fill it")
        samples.append((sample["x"], mds_decode("int", sample["y"])))
    return samples


def decode_image(shard: MDSReader, data: bytes) -> Any:
    """The decoded column x of a sample; the class of an error depends on the encoding."""
    encoding = shard.column_encodings[shard.column_names.index("x")]
    # streaming's decoder of JPEG and PNG files leaves the pixels to PIL, until they are used
    return decode_tensor(data) if encoding in ("jpeg", "png") else mds_decode(encoding, data)
