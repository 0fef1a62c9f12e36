"""Where shards are stored: a folder of this machine, or a store that streaming reads and writes."""

from __future__ import annotations

import json
import os
import posixpath
import tempfile
import time
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import Any, TypeVar
from urllib.parse import urlsplit

from streaming.base.storage import CloudDownloader, CloudUploader
from streaming.base.storage.upload import UPLOADERS

from pss_composer.data.mds.stream import hide_password
from pss_composer.errors import InputError, to_line

BACKOFFS = (1.0, 2.0, 4.0)  # seconds before each further attempt
PARTS = ".parts"  # folder for unfinished files and for records, in the folder of a split
T = TypeVar("T")


class Store:
    """A folder with files like `train/shard.00000.mds`; a file appears under its name whole or not at all.

    Args:
        url: The folder, which need not be there yet; of `RemoteStore` a URL.
        key: The argument that gives it, for messages.
    """

    def __init__(self, url: str, *, key: str) -> None:
        self.url, self.key, self.root = url, key, Path(url)

    def put(self, folder: Path, name: str) -> None:
        """Move the file `folder/name` here, over what is there. `folder` is one of `open_workspace`."""
        (self.root / name).parent.mkdir(parents=True, exist_ok=True)
        os.replace(folder / name, self.root / name)

    def fetch(self, name: str, folder: Path) -> Path | None:
        """A local file with these bytes, copied to `folder` if need be; None if there is no such file."""
        return self.root / name if (self.root / name).is_file() else None

    def list_folder(self, name: str) -> list[str] | None:
        """The sorted names of files and folders in a folder; None if the store cannot list them."""
        return sorted(os.listdir(self.root / name)) if (self.root / name).exists() else []

    def has_size(self, name: str, num_bytes: int) -> bool:
        """Whether a file that was put here is still whole; after a power cut it may not be."""
        return (self.root / name).is_file() and (self.root / name).stat().st_size == num_bytes

    def open_workspace(self, split: str) -> tempfile.TemporaryDirectory:
        """A temporary folder for what `put` moves to a split."""
        return tempfile.TemporaryDirectory(dir=self.root / split / PARTS)  # a rename does not cross file systems

    def close(self) -> None:
        """End the connection; the next use makes a new one, in whatever process."""
        return

    def read(self, name: str) -> bytes | None:
        """The bytes of a small file; None if it is not there."""
        def read() -> bytes | None:
            with tempfile.TemporaryDirectory() as folder:
                file = self.fetch(name, Path(folder))
                return None if file is None else file.read_bytes()

        return self.retry(read, f"must be readable at {posixpath.join(hide_password(self.url), name)}")

    def write_json(self, name: str, value: Any) -> None:
        """Write a small file."""
        def write() -> None:
            with self.open_workspace(name.split("/")[0]) as folder:
                file = Path(folder, name)
                file.parent.mkdir(parents=True)
                file.write_text(json.dumps(value, sort_keys=True))
                self.put(Path(folder), name)

        self.retry(write, f"must take {name}")

    def retry(self, function: Callable[[], T], rule: str) -> T:
        """Call a function; if it fails, call it again on a new connection, after longer and longer pauses.

        Raises:
            InputError: The last attempt failed, too; `rule` is what this breaks.
        """
        backoffs = iter(BACKOFFS)
        while True:
            try:
                return function()
            except InputError:
                raise
            except Exception as error:  # the libraries of stores have no common class of errors
                backoff = next(backoffs, None)
                if backoff is None:
                    reason = to_line(error).replace(self.url, hide_password(self.url))
                    message = f"{rule}, got {reason} ({len(BACKOFFS) + 1} attempts)"
                    raise InputError(message, key=self.key) from error
                with suppress(Exception):
                    self.close()
            time.sleep(backoff)


class RemoteStore(Store):
    """A folder in a store that streaming's downloaders, and for writing its uploaders, reach."""

    def __init__(self, url: str, *, key: str) -> None:
        super().__init__(url.rstrip("/"), key=key)
        self._downloader = CloudDownloader.get(url)
        self._uploader: Any = None

    def put(self, folder: Path, name: str) -> None:
        uploader = self._connect()
        uploader.local = str(folder)
        uploader.upload_file(name)

    def fetch(self, name: str, folder: Path) -> Path | None:
        file = folder / posixpath.basename(name)
        try:
            self._downloader.download(f"{self.url}/{name}", str(file))
        except Exception as error:
            file.unlink(missing_ok=True)
            if _is_missing(error):
                return None
            raise
        return file

    def list_folder(self, name: str) -> list[str] | None:
        folder = posixpath.join(name, "") if name else ""
        try:
            keys = self._connect().list_objects(folder)
        except NotImplementedError:
            return None
        # keys are full paths within the bucket, of everything below
        prefix = posixpath.join(urlsplit(self.url).path.strip("/"), folder).strip("/") + "/"
        keys = [f"/{key.strip('/')}" for key in keys]
        return sorted({key[key.index(prefix) + len(prefix):].split("/")[0] for key in keys if prefix in key})

    def has_size(self, name: str, num_bytes: int) -> bool:
        return True  # a remote store does not lose what it has taken

    def open_workspace(self, split: str) -> tempfile.TemporaryDirectory:
        return tempfile.TemporaryDirectory(prefix="pss-convert-")

    def close(self) -> None:
        self._downloader.clean_up()
        self._uploader = None

    def _connect(self) -> Any:
        if self._uploader is None:
            with tempfile.TemporaryDirectory() as folder:
                self._uploader = CloudUploader.get((folder, self.url), retry=1)  # `retry` makes the other attempts
        return self._uploader


def open_store(url: str, *, key: str, is_written: bool = False) -> Store:
    """The store of a folder or a URL; nothing is connected yet.

    Raises:
        InputError: `url` is a file, or streaming does not read, or if `is_written` not write, such a URL.
    """
    scheme, hidden = urlsplit(url).scheme, hide_password(url)
    if scheme == "":
        if os.path.exists(url) and not os.path.isdir(url):
            raise InputError(f"must be a folder, got {url!r}", key=key)
        return Store(url, key=key)
    # streaming writes to the top of an hf:// repository, whatever folder the URL names
    writable = sorted({name.split(":")[0] for name in UPLOADERS} - {"", "hf"})
    if is_written and scheme not in writable:
        raise InputError(f"must be a folder or begin with {'://, '.join(writable)}://, got {hidden!r}", key=key)
    try:
        return RemoteStore(url, key=key)
    except Exception as error:  # an unknown scheme, or a store's library that is not installed
        reason = to_line(error).replace(url, hidden)
        raise InputError(f"must be a folder or a store that streaming reads, got {hidden!r}: {reason}",
                         key=key) from error


def _is_missing(error: Exception) -> bool:
    response = getattr(error, "response", None)
    codes = [getattr(error, name, None) for name in ("code", "status", "status_code")]
    if isinstance(response, dict):  # botocore's
        codes.append(response.get("Error", {}).get("Code"))
    return isinstance(error, FileNotFoundError) or any(str(code) in ("404", "NoSuchKey") for code in codes)
