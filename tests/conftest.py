"""What every test needs: one thread (the models are tiny, two processes share two cores in some tests), few files."""

import atexit
import gc
import os
from pathlib import Path

import pytest
import torch
from composer.core import Engine
from torch.distributed.checkpoint import state_dict

os.environ["OMP_NUM_THREADS"] = "1"  # of the processes that tests start
torch.set_num_threads(1)


@pytest.fixture(autouse=True)
def _close_files_in_time():
    """Free what earlier tests have left, before its files are as many as a process may open: 1024 on many systems."""
    yield
    open_files = Path("/proc/self/fd")
    if open_files.is_dir() and sum(1 for _ in open_files.iterdir()) > 400:
        # Composer and torch hold every trainer, with its loaders, to the end of the process
        atexit.unregister(Engine._close)
        state_dict._get_fqns.cache_clear()
        gc.collect()


def pytest_collection_modifyitems(items):
    """The file that starts two processes takes longest: first, so that the other worker has the rest meanwhile."""
    items.sort(key=lambda item: "test_distributed" not in item.nodeid)
