"""Reads whole shards with streaming's own reader, but trusts no number in them."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
from streaming.base.compression import decompress
from streaming.base.format.mds.encodings import mds_decode
from streaming.base.format.mds.reader import MDSReader
from streaming.base.hashing import get_hash

from pss_composer.errors import to_line


class BadShard(ValueError):
    """What is wrong with a shard or an index, in one line."""


def read_index(data: bytes) -> list[MDSReader]:
    """The shards that an `index.json` names, in the columns x and y (int).

    Raises:
        BadShard: The index is broken, or names other shards.
    """
    try:
        shards = [MDSReader.from_json("", None, shard) for shard in json.loads(data)["shards"]]
        for shard in shards:
            shard.validate(allow_unsafe_types=False)
            columns = dict(zip(shard.column_names, shard.column_encodings, strict=True))
            if "x" not in columns or columns.get("y") != "int":
                raise BadShard(f"must name MDS shards with the columns x and y (int), got {columns}")
            for info in (shard.raw_data, shard.zip_data or shard.raw_data):
                str(info.basename), int(info.bytes), dict(info.hashes)
            int(shard.samples), list(shard.column_sizes)
    except BadShard:
        raise
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise BadShard(f"must be the index of MDS shards, got a broken one ({to_line(error)})") from None
    return shards


def find_decoder(shard: MDSReader, decode: Callable[[bytes], Any]) -> Callable[[bytes], Any]:
    """What decodes the column x: `decode` if it holds JPEG or PNG files."""
    encoding = shard.column_encodings[shard.column_names.index("x")]
    return decode if encoding in ("jpeg", "png") else lambda data: mds_decode(encoding, data)


def read_shard(shard: MDSReader, file: Path, workspace: Path) -> list[tuple[bytes, int]]:
    """The encoded picture x and the label y of every sample.

    Args:
        shard: Its entry in the index.
        file: The file of the shard, as it is stored.
        workspace: Folder for the file if it has to be unpacked.

    Raises:
        BadShard: The file has another size or hash than the index says, or is not such a shard.
    """
    info = shard.zip_data or shard.raw_data
    data = file.read_bytes()
    if len(data) != info.bytes:
        raise BadShard(f"must have {info.bytes} bytes, got {len(data)}")
    try:
        for algorithm, expected in info.hashes.items():
            found = get_hash(algorithm, data)
            if found != expected:
                raise BadShard(f"must have the {algorithm} hash {expected}, got {found}")
        if shard.zip_data:
            data, file = _unpack(shard.compression, data), workspace / "unpacked.mds"
            file.write_bytes(data)
        shard.dirname, shard.raw_data.basename = str(file.parent), file.name
        return list(_read_samples(shard, data))
    except BadShard:
        raise
    except (ValueError, IndexError) as error:
        raise BadShard(f"must be MDS, got {to_line(error)}") from None


def _unpack(compression: str, data: bytes) -> bytes:
    try:
        return decompress(compression, data)
    except Exception as error:  # the libraries have no common class
        raise BadShard(f"must unpack, got {to_line(error)}") from None


def _read_samples(shard: MDSReader, data: bytes) -> Iterator[tuple[bytes, int]]:
    num_samples = int.from_bytes(data[:4], "little")
    if num_samples != shard.samples:
        raise BadShard(f"must hold the {shard.samples} samples of index.json, got {num_samples}")
    offsets = np.frombuffer(data, np.uint32, num_samples + 1, offset=4).astype(np.int64)
    sizes = np.diff(offsets)
    if offsets[-1] != len(data) or offsets[0] < 4 * (num_samples + 2) or np.any(sizes < 0):
        raise BadShard("must be MDS, but its samples overlap or end elsewhere than the file")
    shard.column_encodings = ["bytes"] * len(shard.column_names)  # the reader leaves the values as they are stored
    num_variable = sum(not size for size in shard.column_sizes)
    for number, size in enumerate(sizes):
        sample = shard[number]
        if sum(map(len, sample.values())) + 4 * num_variable != size:
            raise BadShard(f"must be MDS, but the columns of sample {number} do not fill it")
        yield sample["x"], mds_decode("int", sample["y"])
