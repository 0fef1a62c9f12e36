"""Reads checkpoint files without running anything that is in them."""

from __future__ import annotations

import io
import os
import pickle
import re
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch.distributed.checkpoint import CheckpointException, DefaultLoadPlanner, FileSystemReader, load
from torch.distributed.checkpoint.metadata import Metadata
from torch.serialization import add_safe_globals, clear_safe_globals, get_safe_globals

from pss_composer.errors import InputError

# Files hold settings and random states of these classes beside their weights. None of the classes is imported: an
# `Inert` takes the place of each object.
HARMLESS = (
    "yacs.config.CfgNode", "argparse.Namespace",
    "numpy.ndarray", "numpy.dtype", "numpy._core.multiarray._reconstruct", "numpy.core.multiarray._reconstruct",
    "datetime.timedelta", "torch.torch_version.TorchVersion",
)
# torch describes a folder of shards with objects of these classes
SHARD_CLASSES = {
    *(f"torch.distributed.checkpoint.metadata.{name}" for name in (
        "Metadata", "MetadataIndex", "TensorStorageMetadata", "BytesStorageMetadata", "ChunkStorageMetadata",
        "TensorProperties", "StorageMeta", "_MEM_FORMAT_ENCODING")),
    "torch.distributed.checkpoint.filesystem._StorageInfo", "torch.serialization._get_layout", "torch.Size",
    "pathlib.PosixPath", "pathlib._local.PosixPath",
}
LATEST = "latest-rank0.pt"  # Composer's link to a run's last checkpoint: a file, or a folder of shards
LEGACY_MAGIC = b"\x80\x02\x8a\nl\xfc\x9cF\xf9 j\xa8P\x19."  # the first bytes of torch.save before version 1.6
# what torch refused to load; the second form is for DTensor and the like
GLOBAL_NAME = re.compile(r"(?:GLOBAL |^Weights only load failed. ``)([\w.]+)")


def bad_checkpoint(path: str | Path, rule: str, finding: str) -> InputError:
    """An error like `checkpoint must hold a dictionary, vit.pth holds a list`."""
    return InputError(f"{rule}, {path} {finding}", key="checkpoint")


def find_latest(path: str | Path) -> Path:
    """The last checkpoint in a run's folder; any other path itself."""
    latest = Path(path) / LATEST
    return latest if os.path.exists(latest) else Path(path)


def read_file(path: str | Path) -> dict[str, Any]:
    """Read a checkpoint: a file of `torch.save`, a safetensors file, or a folder of shards that Composer wrote.

    The result holds nothing but tensors, containers, numbers and text. Nothing in the file is executed.

    Args:
        path: A file, a folder of shards (with its `.metadata`), or a run's folder, for its last checkpoint.

    Returns:
        The dictionary in the file. For a folder of shards: Composer's weights and algorithms.

    Raises:
        InputError: There is no such file, it has another format or is broken, or it asks for an object of a class that
            is neither torch's nor harmless.
    """
    path = find_latest(path)
    if os.path.isdir(path):
        return _read_shards(path)
    try:
        with path.open("rb") as file:
            start = file.read(16)
    except OSError as error:
        raise bad_checkpoint(path, "must be readable", f"is not: {error.strerror}") from error
    if path.suffix == ".safetensors":
        try:
            return load_file(path)
        except SafetensorError as error:
            raise bad_checkpoint(path, "must be a whole safetensors file", f"cannot be read: {error}") from error
    if not start.startswith((b"PK", LEGACY_MAGIC)):
        raise bad_checkpoint(path, "must be a file of torch.save or safetensors", f"begins with {start!r}")
    contents = _load_pickle(path, path)
    if not isinstance(contents, dict):
        raise bad_checkpoint(path, "must hold a dictionary", f"holds a {type(contents).__name__}")
    return contents


class Inert(dict):
    """Takes the place of an object of a harmless class. It keeps the items of a dictionary and drops the rest."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__()

    def __setstate__(self, state: Any) -> None:
        pass


@contextmanager
def _safe_loading() -> Iterator[None]:
    """Lets torch load tensors and harmless classes alone, whatever torch.distributed or a library has allowed."""
    before = get_safe_globals()
    clear_safe_globals()
    add_safe_globals([(Inert, harmless) for harmless in HARMLESS])
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", UserWarning)  # about such files, and shards without a process group
            yield
    finally:
        clear_safe_globals()
        add_safe_globals(before)


def _load_pickle(source: Any, name: str | Path) -> Any:
    try:
        with _safe_loading():
            return torch.load(source, map_location="cpu", weights_only=True)
    except Exception as error:  # a broken file can fail in any way
        raise _explain(error, "file of torch.save", name) from error


def _explain(error: BaseException, kind: str, name: str | Path) -> InputError:
    """The reason in one line. torch's own message is long and advises to trust the file."""
    if isinstance(error, CheckpointException):
        error, _ = next(iter(error.failures.values()))
    if isinstance(error, InputError):
        return error
    if asked_for := GLOBAL_NAME.search(str(error)):
        return bad_checkpoint(name, "must hold weights and settings alone",
                              f"asks for {asked_for[1]}: refused, and nothing of it was run")
    lines = str(error).split("WeightsUnpickler error: ")[-1].split(" In PyTorch 2.6")[0].splitlines()
    reason = lines[0] if lines else type(error).__name__
    return bad_checkpoint(name, f"must be a whole {kind}", f"cannot be read: {reason}")


def _read_shards(folder: Path) -> dict[str, Any]:
    """The model and the algorithms (with the EMA's averages) in a folder that Composer wrote with sharded state."""
    if not os.path.isfile(folder / ".metadata"):
        raise InputError("must be a file, a folder of shards with a .metadata or a run with a "
                         f"{LATEST}, got {folder}", key="checkpoint")
    try:
        reader, planner = _ShardReader(folder), _ShardPlanner(flatten_state_dict=False, flatten_sharded_tensors=False)
        entries = reader.read_metadata().state_dict_metadata
        model = {name: torch.empty(entry.size, dtype=entry.properties.dtype)
                 for name, entry in entries.items() if name.startswith("state.model.")}
        state = model | {"state.algorithms": None}
        with _safe_loading():
            load(state, storage_reader=reader, planner=planner, no_dist=True)
    except (Exception, CheckpointException) as error:  # torch derives CheckpointException from BaseException
        raise _explain(error, "folder of shards", folder) from error
    model = {name.removeprefix("state.model."): tensor for name, tensor in model.items()}
    return {"state": {"model": model, "algorithms": state["state.algorithms"]}}


class _ShardUnpickler(pickle.Unpickler):
    def find_class(self, module: str, name: str) -> Any:
        is_dtype = module == "torch" and isinstance(getattr(torch, name, None), torch.dtype)
        if f"{module}.{name}" not in SHARD_CLASSES and not is_dtype:
            raise pickle.UnpicklingError(f"GLOBAL {module}.{name}")
        return super().find_class(module, name)


class _ShardReader(FileSystemReader):
    """Reads the metadata safely; torch's own method would run what is in it."""

    def read_metadata(self) -> Metadata:
        with (Path(self.path) / ".metadata").open("rb") as file:
            return _ShardUnpickler(file).load()


class _ShardPlanner(DefaultLoadPlanner):
    """Reads objects that are not tensors safely; torch's own method would run what is in them."""

    def load_bytes(self, read_item: Any, value: io.BytesIO) -> None:
        name = read_item.dest_index.fqn
        self.state_dict[name] = _load_pickle(value, name)
