"""Where shards lie: a folder of this machine, a bucket that streaming can write to, or a folder behind SFTP."""

from __future__ import annotations

import contextlib
import logging
import os
import posixpath
import shutil
import tempfile
import time
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

from pss_composer.data.mds.stream import hide_password
from pss_composer.errors import InputError, to_line

BACKOFFS = (1.0, 2.0, 4.0)  # seconds before each further attempt


class Store(ABC):
    """Files under names like `train/shard.00000.mds`; a file appears under its name whole or not at all.

    A failure raises what the store's client raises, and the clients have no common class: see `with_retries`.
    """

    @abstractmethod
    def put(self, file: Path, name: str) -> None:
        """Moves a file of this machine to a name, over what stands there; after a failure it is where it was."""

    @abstractmethod
    def get(self, name: str, file: Path) -> bool:
        """Copies what stands under a name to a new file; False if there is nothing."""

    @abstractmethod
    def list_folder(self, name: str) -> list[str] | None:
        """The names of files and folders in a folder, none if it is not there; None where the store cannot tell."""

    def close(self) -> None:
        """Ends the connection; the next use makes a new one, in whatever process."""
        return

    def read(self, name: str) -> bytes | None:
        """The bytes of a small file; None if it is not there."""
        with self.open_copy(name) as file:
            return None if file is None else file.read_bytes()

    def write(self, name: str, data: bytes) -> None:
        """Writes a small file."""
        with tempfile.TemporaryDirectory() as folder:
            file = Path(folder, "file")
            file.write_bytes(data)
            self.put(file, name)

    @contextlib.contextmanager
    def open_copy(self, name: str) -> Iterator[Path | None]:
        """A file of this machine with the bytes under a name, while the block runs; None if there is nothing."""
        with tempfile.TemporaryDirectory() as folder:
            file = Path(folder, posixpath.basename(name))
            yield file if self.get(name, file) else None


class LocalStore(Store):
    """A folder, which need not be there yet.

    Args:
        root: The folder.
    """

    def __init__(self, root: Path) -> None:
        self.root = root

    def put(self, file: Path, name: str) -> None:
        path = self.root / name
        path.parent.mkdir(parents=True, exist_ok=True)
        os.replace(file, path)

    def get(self, name: str, file: Path) -> bool:
        if not (self.root / name).is_file():
            return False
        shutil.copyfile(self.root / name, file)
        return True

    def list_folder(self, name: str) -> list[str]:
        return sorted(os.listdir(self.root / name)) if (self.root / name).exists() else []

    def write(self, name: str, data: bytes) -> None:
        # beside its place, for a rename does not cross file systems
        file = self.root / _name_part(name)
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_bytes(data)
        os.replace(file, self.root / name)

    @contextlib.contextmanager
    def open_copy(self, name: str) -> Iterator[Path | None]:
        path = self.root / name
        yield path if path.is_file() else None


class CloudStore(Store):
    """What streaming's own uploaders and downloaders reach: `s3://`, `gs://`, `oci://`, `azure://`, `hf://`, ...

    Args:
        url: The folder.
    """

    def __init__(self, url: str) -> None:
        self.url = url.rstrip("/")
        self.upload_url, self.prefix = self.url, ""
        if url.startswith("hf://"):
            # streaming uploads to the top of the repository, whatever folder the URL names
            parts = self.url.split("/")
            self.upload_url, self.prefix = "/".join(parts[:5]) + "/", "/".join(parts[5:])
        self._uploader: Any = None
        self._downloader: Any = None

    def put(self, file: Path, name: str) -> None:
        uploader = self._connect()
        name = posixpath.join(self.prefix, name)
        # an uploader wants the file under its remote name in a folder, and may delete what it has uploaded
        with tempfile.TemporaryDirectory(dir=file.parent) as folder:
            staged = Path(folder, name)
            staged.parent.mkdir(parents=True, exist_ok=True)
            os.replace(file, staged)
            uploader.local = folder
            try:
                uploader.upload_file(name)
            except BaseException:
                os.replace(staged, file)
                raise

    def get(self, name: str, file: Path) -> bool:
        from streaming.base.storage.download import CloudDownloader

        if self._downloader is None:
            self._downloader = CloudDownloader.get(self.url)
        try:
            self._downloader.download(f"{self.url}/{name}", str(file))
        except Exception as error:
            file.unlink(missing_ok=True)
            if _is_missing(error):
                return False
            raise
        return True

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

    def close(self) -> None:
        if self._downloader is not None:
            self._downloader.clean_up()
        self._uploader = self._downloader = None

    def _connect(self) -> Any:
        from streaming.base.storage.upload import CloudUploader

        if self._uploader is None:
            with tempfile.TemporaryDirectory() as folder:
                # one attempt: `with_retries` makes the others
                self._uploader = CloudUploader.get((folder, self.upload_url), retry=1)
        return self._uploader


class SftpStore(Store):
    """A folder behind SFTP, by the conventions of streaming's `SFTPDownloader`; streaming cannot write there.

    Args:
        url: `sftp://user[:password]@host[:port]/path`. The environment variables `COMPOSER_SFTP_KEY_FILE` and
            `COMPOSER_SFTP_KNOWN_HOSTS_FILE` name the files of the private key and of the known hosts.
    """

    def __init__(self, url: str) -> None:
        self.url = urlsplit(url)
        self._ssh: Any = None
        self._sftp: Any = None

    def put(self, file: Path, name: str) -> None:
        sftp = self._connect()
        path, part = self._path(name), self._path(_name_part(name))
        self._make_folder(posixpath.dirname(path))
        sftp.put(str(file), part)  # compares the sizes, too
        sftp.posix_rename(part, path)
        file.unlink()

    def get(self, name: str, file: Path) -> bool:
        sftp = self._connect()
        try:
            sftp.stat(self._path(name))
        except FileNotFoundError:
            return False
        sftp.get(self._path(name), str(file))
        return True

    def list_folder(self, name: str) -> list[str]:
        sftp = self._connect()
        try:
            return sorted(sftp.listdir(self._path(name)))
        except FileNotFoundError:
            return []

    def close(self) -> None:
        if self._ssh is not None:
            self._ssh.close()
        self._ssh = self._sftp = None

    def _connect(self) -> Any:
        if self._sftp is None:
            from paramiko import SSHClient

            # its thread would print the tracebacks of failures that the caller gets as exceptions
            logging.getLogger("paramiko").setLevel(logging.CRITICAL)
            self._ssh = SSHClient()
            self._ssh.load_system_host_keys(os.environ.get("COMPOSER_SFTP_KNOWN_HOSTS_FILE"))
            self._ssh.connect(
                hostname=self.url.hostname,
                port=self.url.port or 22,
                username=self.url.username,
                password=self.url.password,
                key_filename=os.environ.get("COMPOSER_SFTP_KEY_FILE"),
            )
            self._sftp = self._ssh.open_sftp()
        return self._sftp

    def _path(self, name: str) -> str:
        return posixpath.join(self.url.path or "/", name).rstrip("/") or "/"

    def _make_folder(self, path: str) -> None:
        try:
            self._sftp.stat(path)
        except FileNotFoundError:
            self._make_folder(posixpath.dirname(path))
            # another worker may be first; if the folder is missing for another reason, the upload says so
            with contextlib.suppress(OSError):
                self._sftp.mkdir(path)


def open_store(url: str) -> Store:
    """The store of a folder or a URL; nothing is connected yet.

    Raises:
        InputError: The URL has a scheme that neither streaming nor this project writes to.
    """
    scheme = urlsplit(url).scheme
    if scheme == "":
        return LocalStore(Path(url))
    if scheme == "sftp":
        if not urlsplit(url).hostname:
            raise InputError(f"OUT must be sftp://user@host/path, got {hide_password(url)!r}")
        return SftpStore(url)
    from streaming.base.storage.upload import UPLOADERS

    if scheme not in UPLOADERS:
        schemes = sorted({name.split(":")[0] for name in UPLOADERS if name} | {"sftp"})
        raise InputError(f"a remote must begin with {'://, '.join(schemes)}://, got {url!r}")
    return CloudStore(url)


def with_retries(store: Store, function: Callable[[], Any], rule: str) -> Any:
    """What a function on a store returns; it is called again after a failure, with longer and longer pauses.

    Args:
        store: Makes a new connection for every attempt but the first.
        function: Can be called again after a failure.
        rule: What the failure breaks, the beginning of the message.

    Raises:
        InputError: The last attempt failed, too.
    """
    for backoff in (*BACKOFFS, None):
        try:
            return function()
        except InputError:
            raise
        except Exception as error:
            if backoff is None:
                raise InputError(f"{rule}, got {to_line(error)} ({len(BACKOFFS) + 1} attempts)") from error
            # the connection may be what is broken
            with contextlib.suppress(Exception):
                store.close()
        time.sleep(backoff)


def _is_missing(error: Exception) -> bool:
    if isinstance(error, FileNotFoundError):
        return True
    response = getattr(error, "response", None)
    codes = [getattr(error, name, None) for name in ("code", "status", "status_code")]
    if isinstance(response, dict):  # botocore's
        codes.append(response.get("Error", {}).get("Code"))
    return any(str(code) in ("404", "NoSuchKey") for code in codes)


def _name_part(name: str) -> str:
    folder, basename = posixpath.split(name)
    # always the same, so that those of a conversion that was killed are written over
    return posixpath.join(folder, f".{basename}.part")
