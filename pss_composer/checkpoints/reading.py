"""Reads checkpoint files without running anything that is in them."""

from __future__ import annotations

import io
import pickle
import re
import warnings
import zipfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from torch.distributed.checkpoint import CheckpointException, DefaultLoadPlanner, FileSystemReader, load
from torch.distributed.checkpoint.metadata import Metadata, StorageMeta, TensorStorageMetadata
from torch.serialization import add_safe_globals, clear_safe_globals, get_safe_globals

from pss_composer.errors import InputError

# What the published files hold beside weights, and the random states of Composer's. None of these classes is
# imported: an empty stand-in takes the place of their objects.
HARMLESS = (
    "yacs.config.CfgNode", "argparse.Namespace",
    "numpy.ndarray", "numpy.dtype", "numpy._core.multiarray._reconstruct", "numpy.core.multiarray._reconstruct",
    "datetime.timedelta", "torch.torch_version.TorchVersion",
)
# what torch's own description of a sharded checkpoint is made of
SHARD_CLASSES = {
    *(f"torch.distributed.checkpoint.metadata.{name}" for name in (
        "Metadata", "MetadataIndex", "TensorStorageMetadata", "BytesStorageMetadata", "ChunkStorageMetadata",
        "TensorProperties", "StorageMeta", "_MEM_FORMAT_ENCODING")),
    "torch.distributed.checkpoint.filesystem._StorageInfo", "torch.serialization._get_layout", "torch.Size",
    "pathlib.PosixPath", "pathlib._local.PosixPath",
}
LATEST = "latest-rank0.pt"  # Composer's link to a run's last checkpoint, a file or a folder of shards
LEGACY_MAGIC = b"\x80\x02\x8a\nl\xfc\x9cF\xf9 j\xa8P\x19."  # how torch.save began its files before version 1.6
GLOBAL_NAME = re.compile(r"(?:GLOBAL |^Weights only load failed. ``)([\w.]+)")  # the latter for DTensor and its like


def read_file(path: str | Path) -> dict[str, Any]:
    """What is in a checkpoint: a file of `torch.save` or safetensors, or Composer's folder of shards.

    Only tensors, containers, numbers and text come out of it; nothing in it is executed.

    Args:
        path: A file, a folder of shards with its `.metadata`, or the folder of a run: its last checkpoint then.

    Returns:
        The dictionary of the file, its tensors in memory that is mapped from it where the format allows. Of a folder of
        shards, Composer's weights and algorithms.

    Raises:
        InputError: No such file, another kind of file, a broken one, or one that asks for more than the above.
    """
    path = Path(path)
    try:
        path = find_latest(path)
        if path.is_dir():
            return _read_shards(path)
        if not path.is_file():
            raise InputError(f"checkpoint must be a file, no such file: {path}")
        with path.open("rb") as file:
            start = file.read(16)
    except OSError as error:
        raise InputError(f"checkpoint must be a file that can be read, {path} cannot: {error.strerror}") from error
    if path.suffix == ".safetensors" or start[8:9] == b"{":
        return _read_safetensors(path)
    is_zip = zipfile.is_zipfile(path)
    if not is_zip and not start.startswith(LEGACY_MAGIC):
        if start.startswith(b"PK"):
            raise InputError(f"checkpoint must be a whole file, {path} ends too early")
        raise InputError(f"checkpoint must be a file of torch.save or safetensors, {path} begins with {start!r}")
    contents = _load_pickle(path, str(path), mmap=is_zip and _is_stored(path))
    if not isinstance(contents, dict):
        raise InputError(f"checkpoint must hold a dictionary, {path} holds a {type(contents).__name__}")
    return contents


def find_latest(path: str | Path) -> Path:
    """The last checkpoint of a run's folder; any other path itself."""
    latest = Path(path) / LATEST
    return latest if latest.exists() else Path(path)


def _is_stored(path: Path) -> bool:
    """Whether nothing in a zip file is compressed; torch would take compressed bytes for numbers if it mapped them."""
    try:
        with zipfile.ZipFile(path) as file:
            return all(entry.compress_type == zipfile.ZIP_STORED for entry in file.infolist())
    except zipfile.BadZipFile:
        return False


class Inert(dict):
    """Stands in for an object of a harmless class; keeps the items of a dictionary and drops the rest."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__()

    def __setstate__(self, state: Any) -> None:
        pass


@contextmanager
def _harmless_globals() -> Iterator[None]:
    """Lets torch make the stand-ins, and nothing that torch or any library has allowed beside its tensors."""
    before = get_safe_globals()
    clear_safe_globals()
    add_safe_globals([(Inert, harmless) for harmless in HARMLESS])
    try:
        yield
    finally:
        clear_safe_globals()
        add_safe_globals(before)


def _load_pickle(source: Any, name: str, *, mmap: bool = False) -> Any:
    try:
        with _harmless_globals(), warnings.catch_warnings():
            warnings.simplefilter("ignore", UserWarning)  # torch warns of pickles that it may refuse
            return torch.load(source, map_location="cpu", weights_only=True, mmap=mmap)
    # a broken file can fail in any way
    except Exception as error:
        raise _explain(error, "file of torch.save", name) from error


def _explain(error: BaseException, kind: str, name: str) -> InputError:
    """One line for what torch says at length, with advice that is none for a file of unknown origin."""
    if isinstance(error, CheckpointException):
        error, _ = next(iter(error.failures.values()))
    if isinstance(error, InputError):
        return error
    asked_for = GLOBAL_NAME.search(str(error))
    if asked_for:
        return InputError(f"checkpoint must hold weights and settings alone, {name} asks for {asked_for[1]}: refused, "
                          "and nothing of it was run")
    lines = str(error).split("WeightsUnpickler error: ")[-1].split(" In PyTorch 2.6")[0].splitlines()
    reason = lines[0] if lines else type(error).__name__
    return InputError(f"checkpoint must be a whole {kind}, {name} cannot be read: {reason}")


def _read_safetensors(path: Path) -> dict[str, Any]:
    try:
        with safe_open(path, framework="pt") as file:
            return {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
    except SafetensorError as error:
        raise InputError(f"checkpoint must be a whole safetensors file, {path} cannot be read: {error}") from error


def _read_shards(folder: Path) -> dict[str, Any]:
    """The model and the algorithms (the EMA's averages) of a folder that Composer wrote with sharded state."""
    if not (folder / ".metadata").is_file():
        raise InputError("checkpoint must be a file, a folder of shards with a .metadata or a run with a "
                         f"{LATEST}, got {folder}")
    try:
        reader, planner = _ShardReader(folder), _ShardPlanner()
        entries = reader.read_metadata().state_dict_metadata
        model = {
            name: torch.empty(entry.size, dtype=entry.properties.dtype)
            for name, entry in entries.items()
            if name.startswith("state.model.") and isinstance(entry, TensorStorageMetadata)
        }
        objects = {name: None for name in entries if name == "state.algorithms"}
        with _harmless_globals(), warnings.catch_warnings():
            warnings.simplefilter("ignore", UserWarning)  # torch warns that no process group is there
            load({**model, **objects}, storage_reader=reader, planner=planner, no_dist=True)
    # torch's own for what fails in a shard is no Exception
    except (Exception, CheckpointException) as error:
        raise _explain(error, "folder of shards", str(folder)) from error
    model = {name.removeprefix("state.model."): tensor for name, tensor in model.items()}
    return {"state": {"model": model, "algorithms": planner.objects.get("state.algorithms", [])}}


class _ShardUnpickler(pickle.Unpickler):
    def find_class(self, module: str, name: str) -> Any:
        is_dtype = module == "torch" and isinstance(getattr(torch, name, None), torch.dtype)
        if f"{module}.{name}" not in SHARD_CLASSES and not is_dtype:
            raise InputError("checkpoint must hold weights and settings alone, its .metadata asks for "
                             f"{module}.{name}: refused, and nothing of it was run")
        return super().find_class(module, name)


class _ShardReader(FileSystemReader):
    """torch's, whose own reading of the metadata would run what is in it."""

    def read_metadata(self) -> Metadata:
        with (Path(self.path) / ".metadata").open("rb") as file:
            metadata = _ShardUnpickler(file).load()
        metadata.storage_meta = metadata.storage_meta or StorageMeta()
        metadata.storage_meta.load_id = self.load_id
        return metadata


class _ShardPlanner(DefaultLoadPlanner):
    """torch's, whose own reading of what is no tensor would run what is in it; such objects end up in `objects`."""

    def __init__(self) -> None:
        super().__init__()
        self.objects: dict[str, Any] = {}

    def load_bytes(self, read_item: Any, value: io.BytesIO) -> None:
        name = read_item.dest_index.fqn
        self.objects[name] = _load_pickle(value, name)
