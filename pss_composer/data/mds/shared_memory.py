"""What streaming leaves in shared memory: of runs that were killed, and of datasets that are no longer used."""

from __future__ import annotations

import atexit
import fcntl
import os
import re
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext, suppress
from pathlib import Path
from weakref import finalize

from composer.utils import dist
from streaming import StreamingDataset
from streaming.base.constant import BARRIER_FILELOCK, CACHE_FILELOCK, SHM_TO_CLEAN
from streaming.base.shared import SharedArray, SharedBarrier, SharedMemory, SharedScalar, prefix

SHARED_MEMORY = Path("/dev/shm")
LOCKS = (BARRIER_FILELOCK, CACHE_FILELOCK)
NAME = re.compile(rf"(\d{{6}})_({'|'.join((*SHM_TO_CLEAN, *LOCKS))})")  # the dataset's number, and the use


def remove_stale_segments() -> None:
    """Remove streaming's shared memory, and the locks in the folder for temporary files, of datasets that are no more.

    A dataset whose process was killed keeps its number and its cache folder, and streaming refuses a second one on that
    folder. streaming's own `clean_stale_shared_memory` also takes the memory of other runs that are alive.
    """
    if not SHARED_MEMORY.is_dir():
        return
    with _locked():
        leftovers = {}  # path -> number
        for folder in (SHARED_MEMORY, Path(tempfile.gettempdir())):
            for path in folder.iterdir():
                match = NAME.fullmatch(path.name)
                with suppress(FileNotFoundError):  # another run ends
                    if match and path.lstat().st_uid == os.getuid():
                        leftovers[path] = match[1]
        if leftovers:
            in_use = _find_numbers_in_use()
            for path, number in leftovers.items():
                if number not in in_use:
                    path.unlink(missing_ok=True)


def free_when_dropped(dataset: StreamingDataset) -> list[SharedMemory]:
    """Have the shared memory of a dataset freed as soon as nothing refers to the dataset any more.

    streaming keeps it to the end of the process, with six open files, of which many systems allow a process 1024.

    Returns:
        What is freed then; a segment that is made later may be appended.
    """
    segments = _find_segments(dataset)
    finalize(dataset, _free, segments, os.getpid()).atexit = False  # streaming's own do it there
    return segments


def _find_segments(dataset: StreamingDataset) -> list[SharedMemory]:
    """The shared memory that a dataset uses."""
    segments = []
    for value in vars(dataset).values():
        if isinstance(value, SharedBarrier):
            value = value._arr
        elif isinstance(value, SharedScalar):
            value = value.arr
        segment = value.shm if isinstance(value, SharedArray) else value
        if isinstance(segment, SharedMemory):
            segments.append(segment)
    return segments


def _free(segments: list[SharedMemory], process: int) -> None:
    if process == os.getpid():  # a worker has a copy of the dataset
        for segment in segments:
            segment.cleanup()
            atexit.unregister(segment.cleanup)  # another dataset may have the number by then


@contextmanager
def taking_a_number() -> Iterator[None]:
    """One run after another: streaming looks for a number that is free, and takes it a moment later.

    For every process of a run around what makes a dataset; the others wait for the first one of their machine.
    streaming looks by opening six files of each dataset that there is, and leaves them open; here they are closed.
    """
    with _locked() if dist.get_local_rank() == 0 else nullcontext():
        dist.barrier()
        prefix.SharedMemory = _open_segment
        try:
            yield
        finally:
            prefix.SharedMemory = SharedMemory


def _open_segment(name: str, create: bool, size: int = 0) -> SharedMemory:
    return SharedMemory(name, create, size, auto_cleanup=create)


@contextmanager
def _locked() -> Iterator[None]:
    with Path(tempfile.gettempdir(), f"pss_composer.{os.getuid()}.lock").open("w") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        yield


def _find_numbers_in_use() -> set[str]:
    """The numbers of the datasets that a process of this user has mapped; it has from its first segment to its end."""
    numbers = set()
    for process in Path("/proc").glob("[0-9]*"):
        try:
            maps = (process / "maps").read_text()
        except OSError:  # gone in the meantime, or another user's
            continue
        numbers.update(match[1] for match in re.finditer(rf"{SHARED_MEMORY}/{NAME.pattern}", maps))
    return numbers
