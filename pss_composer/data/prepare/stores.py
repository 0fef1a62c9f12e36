"""The places that shards are read from and written to: a folder of this machine, or a store that streaming knows."""

from __future__ import annotations

import json
import os
import posixpath
from collections.abc import Callable
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any, TypeVar
from urllib.parse import urlsplit

from streaming.base.storage import CloudDownloader, CloudUploader
from streaming.base.storage.upload import UPLOADERS
from streaming.base.util import retry

from pss_composer.data.mds.stream import hide_password
from pss_composer.errors import InputError, to_line

ATTEMPTS: dict[str, Any] = {"num_attempts": 4, "initial_backoff": 1.0}  # seconds; the pauses double
PARTS = ".parts"  # folder for unfinished files and for records, in the folder of a split
T = TypeVar("T")


class Store:
    """A folder with files like `train/shard.00000.mds`; a file appears under its name whole or not at all.

    An operation that fails is tried again on a new connection, after longer and longer pauses. If the last attempt
    fails, an `InputError` is raised.

    Args:
        url: The folder, which need not be there yet; for `RemoteStore`, a URL.
        key: The argument that names it, for messages.

    Attributes:
        shown: The URL without its password, for messages.
    """

    def __init__(self, url: str, *, key: str) -> None:
        self.url, self.shown, self.key, self.root = url, hide_password(url), key, Path(url)

    def read(self, name: str) -> bytes | None:
        """The bytes of a file; None if it is not there."""
        return self._retry(lambda: self._read(name), f"must be readable at {posixpath.join(self.shown, name)}")

    def read_json(self, name: str) -> Any:
        """The value in a JSON file; None if the file is not there, or is broken, as it may be after a power cut."""
        data = self.read(name) or b""
        try:
            return json.loads(data)
        except ValueError:
            return None

    def write(self, name: str, fill: Callable[[Path], T]) -> T:
        """Write a file, and replace the one that is there.

        Args:
            name: The file, as a path in this folder.
            fill: Writes the contents into the file that it gets; called again if an attempt fails.

        Returns:
            What `fill` returns.
        """
        def write() -> T:
            with TemporaryDirectory(dir=self._find_workspace(name)) as folder:
                file = Path(folder, name)
                file.parent.mkdir(parents=True)
                result = fill(file)
                self.put(Path(folder), name)
                return result

        return self._retry(write, f"must take {name}")

    def write_json(self, name: str, value: Any) -> None:
        """Write a value as a JSON file."""
        self.write(name, lambda file: file.write_text(json.dumps(value, sort_keys=True)))

    def list_folder(self, name: str) -> list[str]:
        """The sorted names of files and folders in a folder; empty if the store cannot list them."""
        return self._retry(lambda: sorted(self._list(name)), f"must be readable at {self.shown}")

    def has_size(self, name: str, num_bytes: int) -> bool:
        """Whether a file that was written here still has its size; after a power cut it may not."""
        return (self.root / name).is_file() and (self.root / name).stat().st_size == num_bytes

    def put(self, folder: Path, name: str) -> None:
        """Move the file `folder/name` to `name` in this folder."""
        os.replace(folder / name, self.root / name)

    def close(self) -> None:
        """End the connection; the next operation makes a new one, also in another process."""
        return

    def _read(self, name: str) -> bytes | None:
        return (self.root / name).read_bytes() if (self.root / name).is_file() else None

    def _list(self, name: str) -> set[str]:
        return set(os.listdir(self.root / name)) if (self.root / name).exists() else set()

    def _find_workspace(self, name: str) -> Path | None:
        return self.root / name.split("/")[0] / PARTS  # `put` cannot move a file to another file system

    def _retry(self, function: Callable[[], T], rule: str) -> T:
        try:
            return retry(clean_up_fn=self.close, **ATTEMPTS)(function)()
        except Exception as error:  # the libraries of stores have no common class of errors
            reason = to_line(error).replace(self.url, self.shown)
            raise InputError(f"{rule}, got {reason} ({ATTEMPTS['num_attempts']} attempts)", key=self.key) from error


class RemoteStore(Store):
    """A folder in a store, which streaming's downloaders read and its uploaders write."""

    def __init__(self, url: str, *, key: str) -> None:
        super().__init__(url.rstrip("/"), key=key)
        self._downloader = CloudDownloader.get(url)
        self._uploader: Any = None

    def has_size(self, name: str, num_bytes: int) -> bool:
        return True  # a remote store does not lose what it has taken

    def put(self, folder: Path, name: str) -> None:
        uploader = self._connect()
        uploader.local = str(folder)
        uploader.upload_file(name)

    def close(self) -> None:
        self._downloader.clean_up()
        self._uploader = None

    def _read(self, name: str) -> bytes | None:
        with TemporaryDirectory() as folder:
            file = Path(folder, "file")
            try:
                self._downloader.download(f"{self.url}/{name}", str(file))
            except Exception as error:
                if _is_missing(error):
                    return None
                raise
            return file.read_bytes()

    def _list(self, name: str) -> set[str]:
        folder = posixpath.join(name, "") if name else ""
        try:
            keys = self._connect().list_objects(folder)
        except NotImplementedError:
            return set()
        # the keys of all files below the folder, as full paths in the bucket
        prefix = posixpath.join(urlsplit(self.url).path.strip("/"), folder).strip("/") + "/"
        return {f"/{key.strip('/')}".partition(prefix)[2].split("/")[0] for key in keys} - {""}

    def _find_workspace(self, name: str) -> Path | None:
        return None

    def _connect(self) -> Any:
        if self._uploader is None:
            with TemporaryDirectory() as folder:
                self._uploader = CloudUploader.get((folder, self.url), retry=1)  # `_retry` makes the other attempts
        return self._uploader


def open_store(url: str, *, key: str, is_written: bool = False) -> Store:
    """The store of a folder or a URL; this makes no connection yet.

    Args:
        url: A folder, which need not be there yet, or a URL.
        key: The argument that names it, for messages.
        is_written: Whether files will be written to it.

    Raises:
        InputError: `url` is a file, or a URL that streaming cannot read, or cannot write although `is_written`.
    """
    scheme, shown = urlsplit(url).scheme, hide_password(url)
    if scheme == "":
        if os.path.exists(url) and not os.path.isdir(url):
            raise InputError(f"must be a folder, got {url!r}", key=key)
        return Store(url, key=key)
    # streaming writes to the top of an hf:// repository, whatever folder the URL names
    writable = sorted({name.split(":")[0] for name in UPLOADERS} - {"", "hf"})
    if is_written and scheme not in writable:
        raise InputError(f"must be a folder or begin with {'://, '.join(writable)}://, got {shown!r}", key=key)
    try:
        return RemoteStore(url, key=key)
    except Exception as error:  # an unknown scheme, or a store's library that is not installed
        reason = to_line(error).replace(url, shown)
        raise InputError(f"must be a folder or a store that streaming reads, got {shown!r}: {reason}",
                         key=key) from error


def _is_missing(error: Exception) -> bool:
    """Whether an error of a downloader says that there is no such file; each library says it differently."""
    response = getattr(error, "response", None)
    codes = [getattr(error, name, None) for name in ("code", "status", "status_code")]
    if isinstance(response, dict):  # botocore's
        codes.append(response.get("Error", {}).get("Code"))
    return isinstance(error, FileNotFoundError) or any(str(code) in ("404", "NoSuchKey") for code in codes)
