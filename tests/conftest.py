"""What every test needs: one thread (the models are tiny, two processes share two cores in some tests), few files."""

import atexit
import gc
import os
from pathlib import Path

import pytest
import torch
from torch.distributed.checkpoint import state_dict

try:
    from composer.core import Engine
except ImportError:  # make test-versions also tests without Composer
    Engine = None

os.environ["OMP_NUM_THREADS"] = "1"  # of the processes that tests start
torch.set_num_threads(1)


@pytest.fixture(autouse=True)
def _close_files_in_time():
    """Free what earlier tests have left, before its files are as many as a process may open: 1024 on many systems."""
    yield
    open_files = Path("/proc/self/fd")
    if open_files.is_dir() and sum(1 for _ in open_files.iterdir()) > 400:
        # Composer and torch hold every trainer, with its loaders, to the end of the process
        if Engine:
            atexit.unregister(Engine._close)
        state_dict._get_fqns.cache_clear()
        gc.collect()


# files of tests that train, start processes or wait for servers; `make test-quick` leaves them out
SLOW = (
    "training/test_distributed.py", "training/test_data_wait.py", "training/test_recipes.py", "training/test_runs.py",
    "checkpoints/test_export.py", "surgery/test_export.py", "evaluation/test_commands.py",
    "evaluation/test_pictures.py", "models/test_library.py", "algorithm/test_composer_algorithms.py",
    "integrations/test_huggingface.py", "surgery/test_transformers.py", "surgery/test_refusals.py",
    "data/mds/test_cache.py", "data/mds/test_faults.py", "data/mds/test_resume.py", "data/mds/test_shared_memory.py",
    "data/mds/test_stores.py", "data/prepare/test_stops.py", "data/prepare/test_stores.py", "data/test_resume.py",
    "data/test_dataspec.py", "data/augmentation/test_distribution.py", "data/augmentation/test_operations.py",
)
# of the table of families, those that make test-quick tries: one of each mechanism
QUICK_FAMILIES = ("vit", "beit", "beit_shared", "dinov3", "naflex_padded", "torchvision", "open_clip", "hf_vit",
                  "hf_beit_own_bias")


def pytest_collection_modifyitems(items):
    """Mark the slow files, and run first the one that takes longest: the other worker does the rest meanwhile."""
    for item in items:
        is_of_table = item.path.name == "test_families.py"
        if item.path.as_posix().endswith(SLOW) or (is_of_table and item.callspec.params["name"] not in QUICK_FAMILIES):
            item.add_marker(pytest.mark.slow)
    items.sort(key=lambda item: item.path.name != "test_distributed.py")
