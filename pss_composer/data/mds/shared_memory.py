"""streaming's shared memory: how datasets get their numbers, and how their memory is freed.

streaming gives a dataset a six-digit number. The names of its shared memory segments (`000000_locals` and others) begin
with the number, and so do those of its lock files in the folder for temporary files.
"""

from __future__ import annotations

import atexit
import fcntl
import functools
import logging
import os
import re
import tempfile
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, nullcontext, suppress
from pathlib import Path
from typing import Any
from weakref import finalize

from composer.utils import dist
from streaming import StreamingDataset
from streaming.base.constant import BARRIER_FILELOCK, CACHE_FILELOCK, SHM_TO_CLEAN
from streaming.base.shared import SharedMemory

SHARED_MEMORY = Path("/dev/shm")
TEMPORARY = Path(tempfile.gettempdir())  # streaming's own choice
LOCKS = (BARRIER_FILELOCK, CACHE_FILELOCK)
NAME = re.compile(rf"(\d{{6}})_({'|'.join((*SHM_TO_CLEAN, *LOCKS))})")
log = logging.getLogger(__name__)


def clean_shared_memory() -> None:
    """Remove streaming's shared memory and locks that no process of this user uses, and print what was removed.

    Do not call this while another container with the same /dev/shm trains: its processes cannot be seen from here, and
    it would lose the memory that it uses.
    """
    with _locked():
        files = [*_find_files(SHARED_MEMORY), *_find_files(TEMPORARY)]
        in_use = _find_numbers_in_use()
        stale = [path for path in files if path.name[:6] not in in_use]
        for path in stale:
            path.unlink(missing_ok=True)
            print(f"removed {path}")
    print(f"{len(stale)} files removed, {len(files) - len(stale)} are in use")


@contextmanager
def choosing_number() -> Iterator[None]:
    """While the block makes a dataset, no other run of this user chooses a number; for every process of a run."""
    with _locked() if dist.get_local_rank() == 0 else nullcontext():
        if dist.get_local_rank() == 0:
            _lock_numbers()
        dist.barrier()
        yield


def _lock_numbers() -> None:
    """Make a lock file for each number of this user that has none; streaming then skips the number.

    Without one, streaming would open the segments of that number to see whether they are there, and leave them open.
    """
    numbers = {path.name[:6] for path in _find_files(SHARED_MEMORY)}
    for number in numbers:
        lock = TEMPORARY / f"{number}_{BARRIER_FILELOCK}"
        if not lock.exists():
            lock.touch()
    if numbers and (stale := numbers - _find_numbers_in_use()):
        _warn_of_stale_memory(len(stale))


@functools.cache  # warn once
def _warn_of_stale_memory(count: int) -> None:
    log.warning("%s holds the memory of %d datasets that no process here uses; if no other container uses it: "
                "python -m pss_composer clean-shared-memory", SHARED_MEMORY, count)


def free_when_dropped(dataset: StreamingDataset) -> None:
    """Free the shared memory of a dataset when nothing refers to the dataset any more.

    streaming keeps it to the end of the process, with twelve open files; many systems allow a process 1024.
    """
    finalize(dataset, _free, vars(dataset), os.getpid())


def _free(attributes: Mapping[str, Any], process: int) -> None:
    if process != os.getpid():  # a worker, which has a copy of the dataset
        return
    for segment in _find_segments(attributes):
        segment.cleanup()
        atexit.unregister(segment.cleanup)  # at the end of the process, another dataset may have the number
        for lock in LOCKS if dist.get_local_rank() == 0 else ():
            (TEMPORARY / f"{segment.shm.name[:6]}_{lock}").unlink(missing_ok=True)


def _find_segments(attributes: Mapping[str, Any]) -> Iterator[SharedMemory]:
    for value in attributes.values():
        if isinstance(value, SharedMemory):
            yield value
        elif type(value).__module__.startswith("streaming.base.shared."):  # an array, a number or a barrier
            yield from _find_segments(vars(value))


def _find_files(folder: Path) -> Iterator[Path]:
    """The segments or locks of this user."""
    for path in folder.iterdir() if folder.is_dir() else ():
        with suppress(FileNotFoundError):  # another run ends
            if NAME.fullmatch(path.name) and path.lstat().st_uid == os.getuid():
                yield path


def _find_numbers_in_use() -> set[str]:
    """The numbers whose memory a process of this user has mapped; every process with a dataset has, until it ends."""
    numbers: set[str] = set()
    for process in Path("/proc").glob("[0-9]*"):
        with suppress(OSError):  # gone in the meantime, or another user's
            maps = (process / "maps").read_text()
            numbers.update(match[1] for match in re.finditer(rf"{SHARED_MEMORY}/{NAME.pattern}", maps))
    return numbers


@contextmanager
def _locked() -> Iterator[None]:
    folder = SHARED_MEMORY if SHARED_MEMORY.is_dir() else TEMPORARY
    with (folder / f"pss_composer.{os.getuid()}.lock").open("w") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        yield
