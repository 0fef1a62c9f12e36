"""Data in stores, and processes that train on them; made once for all files of this folder."""

import gc
import os
import shutil
import signal
import subprocess
import sys
from pathlib import Path

import pytest
from support.jobs import RECIPE, TIMEOUT, Job, rank_environments, read_labels, wait_well
from support.paths import ROOT
from support.servers import s3_server
from support.shards import SHARD_SIZE, assert_each_once, read, set_environment, write_source

from pss_composer.data.prepare.convert import convert_images


@pytest.fixture(autouse=True, scope="module")
def quick_collection():
    """`gc.collect()` is for what the tests make."""
    gc.collect()
    gc.freeze()
    yield
    gc.unfreeze()


@pytest.fixture(autouse=True)
def time_limit():
    """A hang is a failed test."""
    def fail(signal_number, frame):
        pytest.fail(f"no end within {TIMEOUT} s")

    previous = signal.signal(signal.SIGALRM, fail)
    signal.alarm(TIMEOUT)
    yield
    signal.alarm(0)
    signal.signal(signal.SIGALRM, previous)
    gc.collect()  # a dataset holds its cache as long as it is there


@pytest.fixture(scope="session")
def store(tmp_path_factory):
    """A folder of buckets; the one called `bucket` holds the data in `set`."""
    root = tmp_path_factory.mktemp("store")
    source = write_source(tmp_path_factory.mktemp("source"))
    convert_images(source, str(root / "bucket" / "set"), shard_size=SHARD_SIZE, num_workers=1)
    return root


@pytest.fixture(scope="session")
def data(store):
    return store / "bucket" / "set"


@pytest.fixture
def copied(data, tmp_path):
    """Data that a test may change."""
    return Path(shutil.copytree(data, tmp_path / "copied"))


@pytest.fixture(scope="session")
def s3(store):
    """The environment variables of a server of the store."""
    with s3_server(store) as environment:
        yield environment


@pytest.fixture
def bucket(store, s3, tmp_path, monkeypatch):
    """The URL of data in the S3 store that a test may change, and their folder."""
    set_environment(monkeypatch, s3)
    folder = Path(shutil.copytree(store / "bucket" / "set", store / tmp_path.name.replace("_", "-").lower() / "set"))
    yield f"s3://{folder.parent.name}/set", folder
    shutil.rmtree(folder.parent)


@pytest.fixture(scope="session")
def expected(data):
    """The batches of two epochs of local shards."""
    batches = read(data, epochs=2)
    assert_each_once(batches, epochs=2)
    assert batches[:5] != batches[5:]
    return batches


@pytest.fixture(scope="session")
def server():
    command = [sys.executable, "tests/support/streaming_script.py"]
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join((str(ROOT), str(ROOT / "tests"))),
                   "OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": ""}
    with subprocess.Popen(command, cwd=ROOT, env=environment, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True,
                          start_new_session=True) as process:
        yield process
        process.stdin.close()
        process.wait(TIMEOUT)


@pytest.fixture
def start(server, tmp_path):
    """Starts a job in a folder of its own; none outlives the test."""
    jobs = []

    def start(folder, function, *arguments, **environment):
        folder.mkdir(exist_ok=True)
        jobs.append(Job(server, folder / f"log-{len(jobs)}.txt", function, [str(folder), *arguments], environment))
        return jobs[-1]

    yield start
    for job in jobs:
        job.kill()


@pytest.fixture
def train(start):
    """Starts train.py on one rank or more."""
    def train(folder, *overrides, environment=None, num_ranks=1, pause_at=None):
        arguments = [*RECIPE, f"save_folder={folder}/run", *overrides]
        jobs = [start(folder, "train", arguments, pause_at, **(environment or {}), **ranks)
                for ranks in rank_environments(num_ranks)]
        return jobs if num_ranks > 1 else jobs[0]
    return train


@pytest.fixture(scope="session")
def straight(server, s3, tmp_path_factory):
    """The folder of a run without a stop."""
    folder = tmp_path_factory.mktemp("straight")
    arguments = [*RECIPE, "data.remote=s3://bucket/set", f"data.local={folder}/cache", f"save_folder={folder}/run",
                 "save_interval=3ba"]
    job = Job(server, folder / "log.txt", "train", [str(folder), arguments, None], s3)
    wait_well(job)
    assert_each_once(read_labels(folder), epochs=2)
    return folder
