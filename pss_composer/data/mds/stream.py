"""A folder of MDS shards, there or cached from a store: whole, verified, and told in one line where not."""

from __future__ import annotations

import fcntl
import json
import os
import random
import socket
import threading
import weakref
from pathlib import Path
from urllib.parse import urlsplit

import s3transfer.utils
from streaming import Stream
from streaming.base import util
from streaming.base.constant import DEFAULT_TIMEOUT
from streaming.base.format.base.reader import Reader
from streaming.base.hashing import get_hash
from streaming.base.storage import CloudDownloader
from streaming.base.world import World

from pss_composer.errors import InputError, to_line

LOCK_FILE = ".used_by"


class ShardStream(Stream):
    """A Stream of pictures `x` and labels `y` that gives pictures as bytes, and fails in one line that names the shard.

    What comes from the store is held against the hashes of the index; a shard that is not whole is not kept.

    Args:
        folder: Folder of one split: of its shards, or their cache.
        remote: URL of the split's folder in a store; None where the shards are in `folder`.
        download_retry: How often a file is asked for.

    Raises:
        InputError: There are no such shards.
    """

    def __init__(self, folder: Path, *, remote: str | None, download_retry: int) -> None:
        self._connections = threading.local()
        try:
            super().__init__(remote=remote, local=str(folder), split="", download_retry=download_retry if remote else 1,
                             download_timeout=DEFAULT_TIMEOUT, keep_zip=False)
        except Exception as error:  # an unknown scheme, or a store's library that is not installed
            raise InputError(f"data.remote must be a store that streaming reads: {_reason(error, remote)}") from error
        self.folder = folder
        _draw_apart()

    @property
    def _downloader(self) -> CloudDownloader:
        """One for each thread: streaming closes its connection when a download fails, and opens it while in use."""
        if not hasattr(self._connections, "downloader"):
            self._connections.downloader = CloudDownloader.get(self.remote)
        return self._connections.downloader

    @_downloader.setter
    def _downloader(self, downloader: CloudDownloader) -> None:
        self._connections.downloader = downloader

    def get_shards(self, world: World, allow_unsafe_types: bool) -> list[Reader]:
        """The shards that the index names; it is fetched first where it is not there yet."""
        if self.remote is None or (self.folder / "index.json").exists():
            check_index(self.folder)
        try:
            shards = super().get_shards(world, allow_unsafe_types)
        except Exception as error:  # what each store's library raises
            raise InputError(f"data.remote must hold an index.json: {_reason(error, self.remote)}") from error
        self._downloader.clean_up()  # workers are forked from here, and a connection does not survive that
        check_index(self.folder)
        for shard in shards:
            column = shard.column_names.index("x")
            if shard.column_encodings[column] in ("jpeg", "png"):
                shard.column_encodings[column] = "bytes"  # streaming would have PIL open them
        if self.remote is None:
            _check_files(self.folder, shards)
        elif world.is_local_leader:
            _remove_broken_files(self.folder, shards)
        return shards

    def prepare_shard(self, shard: Reader) -> int:
        """Fetch a shard, again if what came does not have the hash of the index."""
        name = shard.file_pairs[0][0].basename
        for _ in range(2):
            try:
                delta = super().prepare_shard(shard)
            except Exception as error:  # what each store's library raises
                key, rule = ("data.path", "keep") if self.remote is None else ("data.remote", "give")
                if self.remote is not None:
                    _remove_files(self.folder, shard)  # a packed one may be there, and not unpack
                raise InputError(f"{key} must {rule} {name}: {_reason(error, self.remote)}") from error
            if _is_whole(self.folder, shard):
                return delta
            _remove_files(self.folder, shard)  # else streaming would find it there the next time, and take it
        reason = _reason("another", self.remote)
        raise InputError(f"data.remote must give {name} with the hash that its index.json names: {reason}")


class CacheLock:
    """Keeps other runs from a cache while this one uses it, until this object or the process ends, however it does.

    streaming counts what is in a cache by what it has fetched itself.

    Args:
        folder: The cache; it is made where it is not there.

    Attributes:
        release: Gives the cache up before that.

    Raises:
        InputError: Another run holds it.
    """

    def __init__(self, folder: Path) -> None:
        try:
            folder.mkdir(parents=True, exist_ok=True)
            file = os.open(folder / LOCK_FILE, os.O_RDWR | os.O_CREAT, 0o666)
        except OSError as error:
            raise InputError(f"data.local must be a folder that can be written, got {str(folder)!r}: {error}") from None
        self.release = weakref.finalize(self, os.close, file)
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            owner = os.read(file, 1000).decode() or "another process"
            self.release()
            message = f"data.local must be a cache for one run at a time, {str(folder)!r} is used by {owner}"
            raise InputError(message) from None
        os.truncate(file, 0)
        os.write(file, f"process {os.getpid()} on {socket.gethostname()}".encode())


def check_index(folder: Path) -> None:
    """The index of a split must name shards with samples, in the columns x and y.

    Raises:
        InputError: It does not.
    """
    index_path = folder / "index.json"
    if not index_path.is_file():
        raise InputError(f"data.path must hold MDS shards, got no index.json in {str(folder)!r}")
    try:
        shards = json.loads(index_path.read_text())["shards"]
        columns = {column for shard in shards for column in shard["column_names"]}
        num_samples = sum(shard["samples"] for shard in shards)
    except (ValueError, KeyError, TypeError):
        message = f"data.path must hold MDS shards, got an index.json that names none in {str(folder)!r}"
        raise InputError(message) from None
    if num_samples == 0:
        raise InputError(f"data.path must hold at least one image, got none in {str(folder)!r}")
    if not {"x", "y"} <= columns:
        raise InputError(f"data.path must hold the columns x and y, got {sorted(columns)} in {str(folder)!r}")


def is_complete(folder: Path) -> bool:
    """Whether a cache holds all of its shards, so that nothing needs to be fetched."""
    try:
        shards = json.loads((folder / "index.json").read_text())["shards"]
        files = [shard["raw_data"] for shard in shards]
        return all((folder / file["basename"]).stat().st_size == file["bytes"] for file in files)
    except (OSError, ValueError, KeyError, TypeError):
        return False


def hide_password(url: str) -> str:
    """The URL without its password, for messages."""
    password = urlsplit(url).password
    return url.replace(f":{password}@", ":***@", 1) if password else url


def _draw_apart() -> None:
    """Let fetching draw the names of unfinished files, and waits, from another generator than training does."""
    util.random = s3transfer.utils.random = random.Random()


def _reason(error: Exception | str, remote: str | None) -> str:
    reason = to_line(error) if isinstance(error, Exception) else error
    if remote is None:
        return reason
    return f"got {reason.replace(remote, hide_password(remote))!r} from {hide_password(remote)}"


def _check_files(folder: Path, shards: list[Reader]) -> None:
    for shard in shards:
        raw, packed = shard.file_pairs[0]
        info = raw if packed is None or (folder / raw.basename).exists() else packed
        path = folder / info.basename
        if not path.exists():
            raise InputError(f"data.path must hold every shard of its index.json, got no {str(path)!r}")
        num_bytes = path.stat().st_size
        if num_bytes != info.bytes:
            raise InputError(
                f"data.path must hold whole shards, got {num_bytes} bytes instead of {info.bytes} in {str(path)!r}"
            )


def _remove_broken_files(folder: Path, shards: list[Reader]) -> None:
    """Remove what a killed run left in its cache: shards of a wrong size, and downloads that did not end."""
    sizes = {info.basename: info.bytes for shard in shards for pair in shard.file_pairs for info in pair if info}
    for path in folder.iterdir():
        if path.name.startswith("shard.") and path.stat().st_size != sizes.get(path.name):
            path.unlink()


def _is_whole(folder: Path, shard: Reader) -> bool:
    """Whether a shard that was fetched has the first of the hashes that the index has of it."""
    info = shard.file_pairs[0][0]
    for algorithm, expected in info.hashes.items():
        return get_hash(algorithm, (folder / info.basename).read_bytes()) == expected
    return True


def _remove_files(folder: Path, shard: Reader) -> None:
    for pair in shard.file_pairs:
        for info in pair:
            if info is not None:
                (folder / info.basename).unlink(missing_ok=True)
