"""streaming's shared memory: nobody's is taken, and nothing of a dataset that is gone stays."""

import gc
import json
import os
import tempfile
import time
from pathlib import Path

import pytest
from support.jobs import TIMEOUT, wait_for, wait_well
from support.shards import build, flatten, read, read_epoch


def find_memory(number="*"):
    return sorted(path.name for path in Path("/dev/shm").glob(f"{number}_*"))


def find_numbers(folder):
    """The numbers of the datasets that name this cache."""
    return [path.name[:6] for path in Path("/dev/shm").glob("*_locals") if bytes(folder) in path.read_bytes()]


def test_what_a_killed_process_leaves_is_removed_and_that_of_others_not(data, tmp_path, start, expected):
    caches = [tmp_path / "killed" / "cache", tmp_path / "alive" / "cache"]
    jobs = [start(cache.parent, "read", {"path": str(cache), "remote": str(data), "num_workers": 2}, 2)
            for cache in caches]
    for cache in caches:
        wait_for(cache.parent / "started")
    (stale,), (alive,) = [find_numbers(cache / "train") for cache in caches]
    files = find_memory(alive)
    locks = [Path(tempfile.gettempdir(), f"{number}_cache_filelock") for number in (stale, alive)]
    assert len(files) >= 6 and locks[1].exists()
    jobs[0].kill()
    jobs[0].wait()
    assert find_numbers(caches[0] / "train") == [stale]
    locks[0].touch()

    assert read(caches[0], remote=str(data), epochs=2, num_workers=2) == expected
    assert set(find_memory(alive)) >= set(files) and locks[1].exists()
    (caches[1].parent / "go").touch()
    wait_well(jobs[1])
    epochs = json.loads((caches[1].parent / "labels.json").read_text())
    assert epochs == [flatten(expected[:5]), flatten(expected[5:])]


def count_open_files():
    return len(os.listdir("/proc/self/fd"))


@pytest.mark.parametrize("num_workers", [0, 2])
def test_datasets_that_are_dropped_leave_no_memory_and_no_open_files(data, expected, num_workers):
    gc.collect()
    files, memory = None, set(find_memory())
    for _ in range(4):
        spec = build(data, num_workers=num_workers)
        assert read_epoch(spec) == expected[:5]
        loader = spec.dataloader
        next(iter(loader))  # and an epoch that is left
        del spec
        gc.collect()  # it is in a cycle; of a loader in one torch would wait for the workers for seconds
        del loader
        deadline = time.monotonic() + TIMEOUT / 2
        while not set(find_memory()) <= memory:  # the threads of an epoch hold it until they end
            assert time.monotonic() < deadline
            time.sleep(0.01)
        files = files or count_open_files()
    assert count_open_files() < files + 6  # one dataset has six, and opens six of every other


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
