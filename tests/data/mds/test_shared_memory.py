"""streaming's shared memory: a start takes nobody's, and a dataset that is gone leaves none."""

import gc
import json
import os
import random
import re
import tempfile
import time
from pathlib import Path

import pytest
import s3transfer.utils
from streaming.base import util
from streaming.base.shared import SharedMemory, prefix
from support.jobs import TIMEOUT, wait_for, wait_well
from support.shards import build, flatten, read, read_epoch, set_environment

from pss_composer.data.mds import shared_memory
from pss_composer.data.mds.shared_memory import clean_shared_memory


def find_memory(number):
    return sorted(path.name for path in Path("/dev/shm").glob(f"{number}_*"))


def find_numbers(folder):
    """The numbers of the datasets that name this cache."""
    return [path.name[:6] for path in Path("/dev/shm").glob("*_locals") if bytes(folder) in path.read_bytes()]


@pytest.fixture
def two_jobs(data, tmp_path, start):
    """Two processes in the middle of an epoch, and their caches; the first one is killed."""
    caches = [tmp_path / "killed" / "cache", tmp_path / "alive" / "cache"]
    jobs = [start(cache.parent, "read", {"path": str(cache), "remote": str(data), "num_workers": 2}, 2)
            for cache in caches]
    for cache in caches:
        wait_for(cache.parent / "started")
    jobs[0].kill()
    jobs[0].wait()
    return jobs, caches


def test_a_start_deletes_nothing_and_names_what_is_stale(two_jobs, data, expected, caplog):
    jobs, caches = two_jobs
    (stale,), (alive,) = [find_numbers(cache / "train") for cache in caches]
    files = {number: find_memory(number) for number in (stale, alive)}
    locks = [Path(tempfile.gettempdir(), f"{number}_cache_filelock") for number in (stale, alive)]
    assert all(len(names) >= 6 for names in files.values()) and locks[1].exists()
    locks[0].touch()

    shared_memory._warn_of_stale_memory.cache_clear()
    assert read(caches[0], remote=str(data), epochs=2, num_workers=2) == expected
    message, = [record.getMessage() for record in caplog.records if record.name == shared_memory.__name__]
    assert re.match(r"/dev/shm holds the memory of [1-9]\d* datasets that no process here uses; ", message)
    assert message.endswith(": python -m pss_composer clean-shared-memory")
    assert all(set(find_memory(number)) >= set(files[number]) for number in (stale, alive))
    assert all(lock.exists() for lock in locks)

    (caches[1].parent / "go").touch()
    wait_well(jobs[1])
    epochs = json.loads((caches[1].parent / "labels.json").read_text())
    assert epochs == [flatten(expected[:5]), flatten(expected[5:])]


def test_the_command_removes_what_is_stale_and_not_what_is_in_use(two_jobs, expected, capsys):
    jobs, caches = two_jobs
    (stale,), (alive,) = [find_numbers(cache / "train") for cache in caches]
    names = find_memory(alive)
    lock = Path(tempfile.gettempdir(), f"{stale}_cache_filelock")
    lock.touch()
    clean_shared_memory()
    *lines, summary = capsys.readouterr().out.splitlines()
    assert {f"removed /dev/shm/{stale}_locals", f"removed {lock}"} <= set(lines)
    assert not find_memory(stale) and not lock.exists() and not any(alive in line for line in lines)
    assert re.fullmatch(rf"{len(lines)} files removed, [1-9]\d* are in use", summary)
    assert set(find_memory(alive)) >= set(names)
    (caches[1].parent / "go").touch()
    wait_well(jobs[1])
    epochs = json.loads((caches[1].parent / "labels.json").read_text())
    assert epochs == [flatten(expected[:5]), flatten(expected[5:])]


def find_own_memory():
    """The segments that this process has mapped, and what tells them from later ones of the same name."""
    paths = {Path(path) for path in re.findall(r"/dev/shm/\d{6}_\w+", Path("/proc/self/maps").read_text())}
    return {path: path.stat().st_ino for path in paths if path.exists()}


def is_there(path, inode):
    return path.exists() and path.stat().st_ino == inode


def count_open_files():
    return len(os.listdir("/proc/self/fd"))


@pytest.mark.parametrize("num_workers", [0, 2])
def test_datasets_that_are_dropped_leave_no_memory_and_no_open_files(data, expected, num_workers):
    gc.collect()
    files, memory = None, find_own_memory()
    for _ in range(4):
        spec = build(data, num_workers=num_workers)
        assert read_epoch(spec) == expected[:5]
        loader = spec.dataloader
        next(iter(loader))  # and an epoch that is left
        used = {path: inode for path, inode in find_own_memory().items() if memory.get(path) != inode}
        assert len(used) >= 6
        del spec
        gc.collect()  # it is in a cycle; of a loader in one torch would wait for the workers for seconds
        del loader
        deadline = time.monotonic() + TIMEOUT / 2
        while any(is_there(*segment) for segment in used.items()):  # the threads of an epoch hold it until they end
            assert time.monotonic() < deadline
            time.sleep(0.01)
        assert not [path for path in used if Path(tempfile.gettempdir(), f"{path.name[:6]}_cache_filelock").exists()
                    and not find_memory(path.name[:6])]
        files = files or count_open_files()
    assert count_open_files() < files + 12  # one dataset has twelve


def test_looking_for_a_number_leaves_no_files_open(data):
    specs = [build(data, split) for split in ("train", "val", "train")]  # no lock of theirs is there yet
    files = count_open_files()
    specs.append(build(data))
    assert count_open_files() <= files + 12  # its own twelve, and not twelve of each other one


def test_runs_that_start_together_do_not_meet(data, tmp_path, start, expected):
    jobs = []
    for number in range(6):
        (tmp_path / str(number)).mkdir()
        (tmp_path / str(number) / "go").touch()
        settings = {"path": str(tmp_path / str(number) / "cache"), "remote": str(data), "num_workers": 0}
        jobs.append(start(tmp_path / str(number), "read", settings, 1))
    wait_well(*jobs)
    for number in range(6):
        assert json.loads((tmp_path / str(number) / "labels.json").read_text()) == [flatten(expected[:5])]


def test_nothing_is_replaced_and_fetching_draws_nothing(s3, expected, tmp_path, monkeypatch):
    set_environment(monkeypatch, s3)
    random.seed(5)
    state = random.getstate()
    assert read(tmp_path, remote="s3://bucket/set", epochs=2) == expected
    assert random.getstate() == state
    assert util.random is s3transfer.utils.random is random and prefix.SharedMemory is SharedMemory
