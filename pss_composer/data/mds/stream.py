"""A folder of MDS shards, or a cache of a store's; shards are verified, and every fault is reported as one line."""

from __future__ import annotations

import json
import logging
import shutil
import tempfile
import threading
from collections.abc import Callable
from functools import partial
from pathlib import Path
from time import sleep
from typing import TYPE_CHECKING, Any
from urllib.parse import urlsplit

from composer.utils import dist
from streaming import Stream
from streaming.base.compression import decompress
from streaming.base.hashing import get_hash
from streaming.base.storage import S3Downloader

from pss_composer.errors import InputError, to_line
from pss_composer.locks import FolderLock

if TYPE_CHECKING:
    from streaming.base.format import Reader

ORIGIN_FILE = ".remote"  # in a cache: the URL of its store
UNVERIFIED = "unverified"  # in a cache: folder of the files that are being fetched
TIMEOUT = 60.0  # seconds, for a file
log = logging.getLogger(__name__)


def open_stream(folder: Path, *, remote: str | None, is_limited: bool, download_retry: int) -> ShardStream:
    """A stream of shards that are there or can be fetched; every process of a run calls this.

    A cache must have the same index as its store. If the index cannot be fetched, a complete cache is read without the
    store.

    Args:
        folder: Folder of one split, or its cache.
        remote: URL of the split's folder in a store, or None.
        is_limited: Whether shards will be removed from the cache.
        download_retry: How often a file is requested.

    Raises:
        InputError: Shards are missing; the store is unknown or gives no index; the folder is the cache of another
            store, another run uses it, or it cannot be written.
    """
    if remote is not None:
        stream = ShardStream(folder, remote=remote, download_retry=download_retry)
        if dist.get_local_rank() == 0:
            stream.open_cache(is_limited=is_limited)
        dist.barrier()
        if is_limited or not _is_complete(folder):
            return stream
    _check_files(folder)
    return ShardStream(folder)


class ShardStream(Stream):
    """A Stream of one split, as for `open_stream`.

    A shard from the store gets into the cache only if its hashes are those of the index. If a shard cannot be fetched,
    the reason is kept in `errors`, not raised: streaming fetches in several threads and processes, and the others would
    wait for the one that raised.

    Attributes:
        errors: Rule and key of an `InputError`, by the name of a shard's file.
        lock: Keeps other runs from the cache while this one may fetch; the first process of each machine has it.
    """

    def __init__(self, folder: Path, *, remote: str | None = None, download_retry: int = 1) -> None:
        try:
            super().__init__(remote=remote, local=str(folder), download_retry=download_retry, keep_zip=False)
        except Exception as error:  # whatever a store's library raises
            raise InputError(f"must be a store that streaming reads: {_reason(error, remote)}", key="remote") from error
        if isinstance(self._downloader, S3Downloader):
            self._downloader = _S3Downloader()
        self.folder = folder
        self.errors: dict[str, tuple[str, str]] = {}  # an exception would refer to the frames of its callers
        self.lock: FolderLock | None = None
        self._one_at_a_time = threading.Lock()  # a downloader is not made for several threads

    def prepare_shard(self, shard: Reader) -> int:
        """Fetch or unpack a shard whose file is missing, and return by how many bytes the cache has grown."""
        name = shard.file_pairs[0][0].basename
        with self._one_at_a_time:
            if name in self.errors:
                return 0
            try:
                if self.remote is None:
                    return super().prepare_shard(shard)
                self._retry(partial(self._fetch, shard), name, self.download_retry)
                return shard.get_raw_size()
            except InputError as error:
                self.errors[name] = error.rule, error.key
            except Exception as error:
                self.errors[name] = f"must keep {name} in {str(self.folder)!r}: {to_line(error)}", "path"
        return 0

    def open_cache(self, *, is_limited: bool) -> None:
        """Prepare the folder as the cache of the store, and lock it if this run may fetch.

        Raises:
            InputError: As `open_stream` does.
        """
        path, origin, remote = self.folder / "index.json", self.folder / ORIGIN_FILE, hide_password(str(self.remote))
        is_complete = not is_limited and _is_complete(self.folder)
        try:
            index = self._fetch_index(1 if is_complete else self.download_retry)
        except InputError as error:
            if not is_complete or not origin.is_file() or origin.read_text() != remote:
                raise
            log.warning("%s; read from %s alone, which holds all shards", error, self.folder)
            return
        shards = _read_index(index, "remote", remote)
        if path.exists() and _read_index(path.read_text(), "local", repr(str(self.folder))) != shards:
            raise InputError(f"must be a cache of remote, but {str(path)!r} is another than that of {remote}",
                             key="local")
        if is_complete:
            return
        self.lock = FolderLock(self.folder, key="local")
        origin.write_text(remote)
        path.with_suffix(".part").write_text(index)
        path.with_suffix(".part").replace(path)
        # a killed run or another program may have left unfinished files, and shards of a wrong size
        shutil.rmtree(self.folder / UNVERIFIED, ignore_errors=True)
        sizes = {shard["raw_data"]["basename"]: shard["raw_data"]["bytes"] for shard in shards}
        for path in self.folder.glob("shard.*"):
            if path.stat().st_size != sizes.get(path.name):
                path.unlink()

    def close(self) -> None:
        """Let other runs use the cache."""
        if self.lock is not None:
            self.lock.release()

    def _fetch(self, shard: Reader) -> None:
        raw, packed = shard.file_pairs[0]
        info = packed or raw
        path = self.folder / UNVERIFIED / info.basename
        try:
            self._downloader.download(f"{self.remote}/{info.basename}", str(path), TIMEOUT)
            data = path.read_bytes()
            for algorithm, expected in info.hashes.items():
                if get_hash(algorithm, data) != expected:
                    raise ValueError(f"another {algorithm} than that of the index.json")
            if packed is not None:
                path.write_bytes(decompress(shard.compression, data))
            path.replace(self.folder / raw.basename)
        finally:
            path.unlink(missing_ok=True)  # streaming would take a partial file for a whole one

    def _fetch_index(self, num_attempts: int) -> str:
        with tempfile.TemporaryDirectory() as folder:
            path = Path(folder, "index.json")
            fetch = partial(self._downloader.download, f"{self.remote}/index.json", str(path), TIMEOUT)
            self._retry(fetch, "index.json", num_attempts)
            self._downloader.clean_up()  # workers are forked from here, and a connection does not survive that
            return path.read_text()

    def _retry(self, fetch: Callable[[], None], name: str, num_attempts: int) -> None:
        """Fetch a file, and try again if that fails: up to `num_attempts` times, or twice if the file is broken."""
        for attempt in range(num_attempts):
            try:
                return fetch()
            except Exception as error:  # whatever a store's library raises
                self._downloader.clean_up()
                if attempt + 1 == num_attempts or (attempt == 1 and isinstance(error, ValueError)):
                    raise InputError(f"must give {name}: {_reason(error, self.remote)}", key="remote") from error
                sleep(2**attempt)


class _S3Downloader(S3Downloader):
    """Draws nothing from Python's global generator, from which the main thread may be drawing a transform.

    boto3's `download_file` draws a random name for the unfinished file from it.
    """

    def _create_s3_client(self, unsigned: bool = False, timeout: float = TIMEOUT) -> None:
        super()._create_s3_client(unsigned=unsigned, timeout=timeout)
        self._s3_client.download_file = partial(_download_file, self._s3_client)


def _download_file(client: Any, bucket: str, key: str, path: str, **options: Any) -> None:
    with open(path, "wb") as file:
        client.download_fileobj(bucket, key, file, **options)


def _read_index(text: str, key: str, place: str) -> list[dict[str, Any]]:
    """The entries of the shards in an index.json, which must have at least one sample and the columns x and y."""
    try:
        shards = json.loads(text)["shards"]
        columns = {column for shard in shards for column in shard["column_names"]}
        num_samples = sum(shard["samples"] for shard in shards)
    except (ValueError, KeyError, TypeError):
        raise InputError(f"must hold MDS shards, got an index.json that names none in {place}", key=key) from None
    if num_samples == 0:
        raise InputError(f"must hold at least one image, got none in {place}", key=key)
    if not {"x", "y"} <= columns:
        raise InputError(f"must hold the columns x and y, got {sorted(columns)} in {place}", key=key)
    return shards


def _is_complete(folder: Path) -> bool:
    """Whether a cache holds every shard of its index, so that nothing needs to be fetched."""
    try:
        files = [shard["raw_data"] for shard in json.loads((folder / "index.json").read_text())["shards"]]
        return all((folder / file["basename"]).stat().st_size == file["bytes"] for file in files)
    except (OSError, ValueError, KeyError, TypeError):
        return False


def _check_files(folder: Path) -> None:
    """Check that every shard of the index is there, packed or not, and has the right size."""
    index = folder / "index.json"
    if not index.is_file():
        raise InputError(f"must hold MDS shards, got no index.json in {str(folder)!r}", key="path")
    for shard in _read_index(index.read_text(), "path", repr(str(folder))):
        raw, packed = shard["raw_data"], shard.get("zip_data")
        info = raw if packed is None or (folder / raw["basename"]).exists() else packed
        path = folder / info["basename"]
        if not path.exists():
            raise InputError(f"must hold every shard of its index.json, got no {str(path)!r}", key="path")
        if (size := path.stat().st_size) != info["bytes"]:
            raise InputError(f"must hold whole shards, got {size} bytes instead of {info['bytes']} in {str(path)!r}",
                             key="path")


def _reason(error: Exception, remote: str | None) -> str:
    reason = to_line(error)
    if remote is None:
        return reason
    return f"got {reason.replace(remote, hide_password(remote))!r} from {hide_password(remote)}"


def hide_password(url: str) -> str:
    """The URL without its password, for messages."""
    password = urlsplit(url).password
    return url.replace(f":{password}@", ":***@", 1) if password else url
