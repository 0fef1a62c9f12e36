"""Streaming and its faults: every sample is seen exactly once in an epoch, or one line says why not."""

import contextlib
import errno
import gc
import io
import json
import os
import re
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import threading
import time
from pathlib import Path

import numpy as np
import pytest
import torch
from composer import Trainer
from composer.loggers import InMemoryLogger
from composer.models import ComposerClassifier
from PIL import Image
from support.servers import s3_server, sftp_server
from streaming import MDSWriter
from streaming.base.storage.download import LocalDownloader
from support.launch import launch
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

from support.paths import ROOT
from pss_composer import waiting
from pss_composer.data import Augmentation, StreamingSettings, build_dataspec
from pss_composer.data.prepare.convert import convert_images
from pss_composer.errors import InputError
from pss_composer.training.reading import load_recipe
from pss_composer.training.trainer import build_data
from pss_composer.training.data_wait import DataWaitMonitor

NUM_IMAGES = 40  # five batches of 8
STEP = 6  # of the grey values of two images whose numbers follow each other
SHARD_SIZE = "3kb"  # of source files: four images in each of ten shards
TIMEOUT = 60  # seconds
PLAIN = Augmentation(is_plain=True, mean=[0.0] * 3, std=[1.0] * 3, crop_pct=1.0)
ALL = list(range(NUM_IMAGES))
RECIPE = ["yamls/deit_small_224.yaml", "model.size=tiny", "model.embed_dim=32", "model.depth=1", "model.num_heads=2",
          "model.image_size=32", f"model.num_classes={NUM_IMAGES}", "train_batch_size=8", "eval_batch_size=8",
          "max_duration=2ep", "scheduler.warmup=0ep", "data.num_workers=0", "augmentation.repeats=1",
          "progress_bar=false"]


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


# the data: a picture's grey value and its label are its number


def encode(number):
    file = io.BytesIO()
    Image.new("RGB", (16, 16), (STEP * number,) * 3).save(file, "JPEG")
    return file.getvalue()


def write_source(folder):
    for split in ("train", "val"):
        for number in ALL:
            (folder / split / f"c{number:02}").mkdir(parents=True)
            (folder / split / f"c{number:02}" / "0.JPEG").write_bytes(encode(number))
    return folder


@pytest.fixture(scope="module")
def store(tmp_path_factory):
    """A folder of buckets; the one called `bucket` holds the data in `set`."""
    root = tmp_path_factory.mktemp("store")
    source = write_source(tmp_path_factory.mktemp("source"))
    convert_images(source, str(root / "bucket" / "set"), shard_size=SHARD_SIZE, num_workers=1)
    return root


@pytest.fixture(scope="module")
def data(store):
    return store / "bucket" / "set"


@pytest.fixture
def copied(data, tmp_path):
    """Data that a test may change."""
    return Path(shutil.copytree(data, tmp_path / "copied"))


@pytest.fixture(scope="module")
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


def set_environment(monkeypatch, variables):
    for key, value in variables.items():
        monkeypatch.setenv(key, value)


def build(path, split="train", *, name="streaming", num_workers=0, on_bad_sample="raise", batch_size=8, **streaming):
    return build_dataspec(
        name, split=split, path=str(path), image_size=16, num_classes=NUM_IMAGES, batch_size=batch_size,
        augmentation=PLAIN, streaming=StreamingSettings(**streaming), on_bad_sample=on_bad_sample,
        num_workers=num_workers, seed=3,
    )


def read_epoch(spec):
    """The labels of an epoch's batches, each of which must be that of its picture."""
    batches = []
    for batch in spec.dataloader:
        images, labels = spec.batch_transforms(batch)
        assert (images.mean((1, 2, 3)) * 255 / STEP).round().int().tolist() == labels.tolist()
        batches.append(labels.tolist())
    return batches


def flatten(batches):
    return [label for batch in batches for label in batch]


def read(*arguments, epochs=1, **options):
    """The labels of a new dataset's epochs, batch by batch."""
    spec = build(*arguments, **options)
    try:
        return [batch for _ in range(epochs) for batch in read_epoch(spec)]
    finally:
        shut_down(spec)


def shut_down(spec):
    if spec.dataloader._iterator is not None:
        spec.dataloader._iterator._shutdown_workers()


def assert_each_once(batches, epochs=1):
    assert [len(batch) for batch in batches] == [8] * (5 * epochs)
    for first in range(0, len(batches), 5):
        assert sorted(flatten(batches[first:first + 5])) == ALL


def refuse(*arguments, **options):
    """The one line that reading ends with."""
    with pytest.raises(InputError) as error:
        read(*arguments, **options)
    message = str(error.value)
    assert "\n" not in message
    del error
    time.sleep(0.03)  # the dataset's threads look every 7 ms whether they are to end
    gc.collect()  # the error's frames hold the dataset
    return message


@pytest.fixture(scope="module")
def expected(data):
    """The batches of two epochs of local shards."""
    batches = read(data, epochs=2)
    assert_each_once(batches, epochs=2)
    assert batches[:5] != batches[5:]
    return batches


# processes


class Job:
    """A process that runs a function of tests/streaming_script.py."""

    def __init__(self, server, log, function, arguments, environment):
        self.log, self.status_file = log, Path(f"{log}.status")
        job = {"function": function, "arguments": arguments, "environment": environment, "log": str(log)}
        server.stdin.write(json.dumps(job) + "\n")
        server.stdin.flush()
        self.pid = int(server.stdout.readline())

    def wait(self):
        """Its exit status and output."""
        wait_for(self.status_file)
        return int(self.status_file.read_text()), self.log.read_text()

    def kill(self):
        """With all of its workers, and streaming's memory left behind."""
        with contextlib.suppress(ProcessLookupError):
            os.killpg(self.pid, signal.SIGKILL)

    def find_workers(self):
        children = Path(f"/proc/{self.pid}/task/{self.pid}/children").read_text().split()
        return [int(pid) for pid in children if b"resource_tracker" not in Path(f"/proc/{pid}/cmdline").read_bytes()]


def wait_for(path):
    deadline = time.monotonic() + TIMEOUT / 2
    while not path.exists():
        assert time.monotonic() < deadline, f"no {path}"
        time.sleep(0.01)


@pytest.fixture(scope="module")
def server():
    command = [sys.executable, "tests/streaming_script.py"]
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": ""}
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


def rank_environments(num_ranks):
    """The environment variables of each rank, as the launcher sets them."""
    if num_ranks == 1:
        return [{}]
    port = str(find_port())
    return [{"RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": str(num_ranks), "NODE_RANK": "0",
             "LOCAL_WORLD_SIZE": str(num_ranks), "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port}
            for rank in range(num_ranks)]


def find_port():
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


def wait_well(*jobs):
    for job in jobs:
        status, output = job.wait()
        assert status == 0, output


def read_labels(folder, num_ranks=1):
    """What was trained in each step, over all ranks."""
    ranks = [[json.loads(line) for line in (folder / f"labels-{rank}.jsonl").read_text().splitlines()]
             for rank in range(num_ranks)]
    return [sorted(flatten(labels)) for labels in zip(*ranks, strict=True)]


def wait_for_labels(path, count):
    deadline = time.monotonic() + TIMEOUT / 2
    while not path.exists() or len(path.read_text().splitlines()) < count:
        assert time.monotonic() < deadline, f"no {count} batches"
        time.sleep(0.01)


def read_metrics(folder, name):
    lines = [json.loads(line) for line in (folder / "run" / "metrics.jsonl").read_text().splitlines()]
    return [line[name] for line in lines if name in line]


def assert_one_line(job, *parts):
    """It ended with one line, which has these parts."""
    status, output = job.wait()
    assert status == 1 and "Traceback" not in output, output
    *_, line = output.strip().splitlines()
    assert line.startswith("error: ") and output.count("error: ") == 1, output
    assert all(part in line for part in parts), line


# stores


def test_s3_gives_what_local_shards_give(s3, expected, tmp_path, monkeypatch):
    set_environment(monkeypatch, s3)
    assert read(tmp_path / "two", remote="s3://bucket/set", epochs=2, num_workers=2) == expected
    assert read(tmp_path / "none", remote="s3://bucket/set/", epochs=2) == expected
    # all is there
    assert read(tmp_path / "two", remote="s3://nowhere/set", epochs=2) == expected


def test_sftp_gives_what_local_shards_give(store, expected, tmp_path, monkeypatch):
    with sftp_server(store) as (url, environment):
        set_environment(monkeypatch, environment)
        assert read(tmp_path, remote=f"{url}//bucket/set", epochs=2, num_workers=2) == expected


@pytest.mark.skipif(not Path("/usr/sbin/sshd").exists() or not Path("/usr/lib/openssh/sftp-server").exists(),
                    reason="needs OpenSSH's server")
def test_openssh_gives_what_local_shards_give(store, expected, tmp_path, monkeypatch):
    with openssh_server(tmp_path / "secrets") as (url, environment):
        set_environment(monkeypatch, environment)
        assert read(tmp_path / "cache", remote=f"{url}{store}/bucket/set", epochs=2, num_workers=2) == expected


@contextlib.contextmanager
def openssh_server(folder):
    """Yields the URL of the root folder, and the environment variables that clients need."""
    from paramiko import RSAKey

    folder.mkdir(mode=0o700)
    for name in ("host", "user"):
        RSAKey.generate(2048).write_private_key_file(str(folder / name))
    keys = {name: RSAKey(filename=str(folder / name)) for name in ("host", "user")}
    (folder / "authorized").write_text(f"ssh-rsa {keys['user'].get_base64()}\n")
    port = find_port()
    (folder / "known").write_text(f"[127.0.0.1]:{port} ssh-rsa {keys['host'].get_base64()}\n")
    if os.getuid() == 0:
        Path("/run/sshd").mkdir(exist_ok=True)
    options = {"Port": port, "ListenAddress": "127.0.0.1", "HostKey": folder / "host", "StrictModes": "no",
               "AuthorizedKeysFile": folder / "authorized", "PidFile": "none", "PermitRootLogin": "yes",
               "Subsystem": "sftp /usr/lib/openssh/sftp-server"}
    command = ["/usr/sbin/sshd", "-D", "-e", "-f", "/dev/null"]
    command += [part for key, value in options.items() for part in ("-o", f"{key}={value}")]
    user = subprocess.run(["id", "-un"], capture_output=True, text=True, check=True).stdout.strip()
    with (folder / "log").open("w") as log, subprocess.Popen(command, stderr=log) as process:
        try:
            wait_until(lambda: socket.create_connection(("127.0.0.1", port), timeout=1).close())
            yield f"sftp://{user}@127.0.0.1:{port}", {
                "COMPOSER_SFTP_KNOWN_HOSTS_FILE": str(folder / "known"), "COMPOSER_SFTP_KEY_FILE": str(folder / "user")
            }
        finally:
            process.terminate()


def wait_until(connect):
    deadline = time.monotonic() + TIMEOUT / 2
    while True:
        try:
            return connect()
        except OSError:
            assert time.monotonic() < deadline
            time.sleep(0.05)


# settings


def test_every_key_reaches_streaming(data, tmp_path):
    recipe = load_recipe(RECIPE[0], [
        *RECIPE[1:], "data.path=nowhere", f"data.remote={data}", f"data.local={tmp_path}", "data.cache_limit=50kb",
        "data.predownload=16", "data.download_retry=3", "data.shuffle_algo=py1s", "data.shuffle_block_size=99",
        "data.num_canonical_nodes=2",
    ])
    dataset = build_data(recipe, "train").dataloader.dataset
    stream, = dataset.streams
    assert (stream.remote, stream.local) == (f"{data}/train", f"{tmp_path}/train")
    assert stream.download_retry == 3
    assert dataset.cache_limit == 50 * 1024
    assert (dataset.predownload, dataset.shuffle_algo, dataset.shuffle_block_size) == (16, "py1s", 99)
    assert dataset.num_canonical_nodes == 2
    assert sorted(label for _, label, _ in dataset) == ALL


def test_defaults_reach_streaming(data, tmp_path):
    dataset = build(tmp_path, remote=str(data)).dataloader.dataset
    assert dataset.streams[0].download_retry == 7 and dataset.cache_limit is None
    assert (dataset.predownload, dataset.shuffle_algo, dataset.num_canonical_nodes) == (64, "py1e", 1)


@pytest.mark.parametrize(("options", "message"), [
    ({"remote": "gopher://host/set"}, "data.remote must be a store that streaming reads: got 'Unsupported remote"),
    ({"cache_limit": "12 parsecs"}, "data.cache_limit must fit: .*12 parsecs"),
    ({"cache_limit": "1kb"}, r"data.cache_limit must fit: Minimum cache usage .* \(1024 bytes\)"),
    ({"cache_limit": "9kb"}, r"data.cache_limit must fit: Cache limit \(9216 bytes\) is too low"),
    ({"shuffle_algo": "py3"}, "data.shuffle_algo must be one of py1e, py1br, .*, got 'py3'"),
    ({"predownload": 0}, "data.predownload must be at least 1, got 0"),
    ({"download_retry": 0}, "data.download_retry must be at least 1, got 0"),
    ({"shuffle_block_size": -1}, "data.shuffle_block_size must be at least 1, got -1"),
    ({"num_canonical_nodes": 0}, "data.num_canonical_nodes must be at least 1, got 0"),
    ({"remote": None, "local": "cache"}, "data.local must be null without data.remote, got 'cache'"),
    ({"remote": None, "cache_limit": "1gb"}, "data.cache_limit must be null without data.remote, got '1gb'"),
    ({"name": "folder"}, "data.remote must be null unless data.name=streaming, got '.*' for folder"),
    ({"local": "/dev/null/cache"}, "data.local must be a folder that can be written, got '/dev/null/cache/train'"),
])
def test_bad_settings(options, message, data, tmp_path):
    assert re.match(message, refuse(tmp_path, **({"remote": str(data)} | options)))


def test_a_cache_limit_must_hold_the_index_and_a_shard(copied, tmp_path):
    # an index of many small shards is larger than four of them
    size = max(path.stat().st_size for path in (copied / "train").glob("*.mds"))
    index = copied / "train" / "index.json"
    index.write_text(index.read_text() + " " * 20000)
    limit = index.stat().st_size + size - 1
    message = refuse(tmp_path / "cache", remote=str(copied), cache_limit=f"{limit}b")
    assert message == f"data.cache_limit must fit the index and a shard, {limit + 1} bytes, got {limit}"
    limit += 1
    assert_each_once(read(tmp_path / "cache", remote=str(copied), cache_limit=f"{limit}b", predownload=8))


def test_a_cache_must_have_a_folder(data):
    with pytest.raises(InputError, match=r"data\.local must name a folder that caches data\.remote, got null"):
        build_dataspec("streaming", split="train", image_size=16, num_classes=NUM_IMAGES, batch_size=8,
                       streaming=StreamingSettings(remote=str(data)))


def test_bad_stores(bucket, tmp_path, monkeypatch):
    url, folder = bucket

    def refuse_store(remote):
        message = refuse(tmp_path, remote=remote, download_retry=1)
        assert message.startswith("data.remote must hold an index.json: got ") and message.endswith(f"{remote}/train")
        return message

    assert "404" in refuse_store("s3://no-such-bucket/set") or "not found" in refuse_store("s3://no-such-bucket/set")
    (folder / "train" / "index.json").rename(folder / "index.json")
    assert f"Object {url}/train/index.json.tmp not found" in refuse_store(url) or "not found" in refuse_store(url)
    (folder / "index.json").rename(folder / "train" / "index.json")
    with monkeypatch.context() as patch:
        patch.setenv("AWS_SECRET_ACCESS_KEY", "wrong")
        assert re.search("permission|Forbidden", refuse_store(url))
    with monkeypatch.context() as patch:
        patch.setenv("S3_ENDPOINT_URL", "http://127.0.0.1:1")
        assert "127.0.0.1:1" in refuse_store(url)
    assert_each_once(read(tmp_path, remote=url))


def test_passwords_are_in_no_message(store, tmp_path, monkeypatch, start, train):
    with sftp_server(store) as (url, environment):
        set_environment(monkeypatch, environment)
        host = url.rpartition("@")[2]
        hidden = f"from sftp://user:***@{host}/"
        for bad in (url.replace("secret", "geheim"), url.replace(host, "127.0.0.1:1"), f"{url}//nowhere",
                    url.replace("sftp", "stfp")):
            message = refuse(tmp_path / "cache", remote=bad, download_retry=1)
            assert "secret" not in message and "geheim" not in message and "user:***@127.0.0.1" in message
        job = train(tmp_path / "run", f"data.remote={url.replace('secret', 'geheim')}//bucket/set",
                    f"data.local={tmp_path}/cache", "data.download_retry=1", environment=environment)
        assert_one_line(job, "index.json", hidden)
        assert "geheim" not in job.log.read_text()
        copied = Path(shutil.copytree(store / "bucket", store / "sftp"))
        (copied / "set" / "train" / "shard.00003.mds").unlink()
        message = refuse(tmp_path / "cache", remote=f"{url}//sftp/set", download_retry=1)
        assert "shard.00003.mds" in message and hidden in message
        shutil.rmtree(copied)


# stops


@pytest.fixture(scope="module")
def straight(server, s3, tmp_path_factory):
    """The folder of a run without a stop."""
    folder = tmp_path_factory.mktemp("straight")
    arguments = [*RECIPE, "data.remote=s3://bucket/set", f"data.local={folder}/cache", f"save_folder={folder}/run",
                 "save_interval=3ba"]
    job = Job(server, folder / "log.txt", "train", [str(folder), arguments, None], s3)
    wait_well(job)
    assert_each_once(read_labels(folder), epochs=2)
    return folder


def load_weights(folder):
    return torch.load(folder / "run" / "latest-rank0.pt", weights_only=False)["state"]["model"]


def assert_same_weights(folder, expected):
    weights, expected = load_weights(folder), load_weights(expected)
    assert weights.keys() == expected.keys()
    assert all(torch.equal(weights[name], expected[name]) for name in expected)


@pytest.fixture(scope="module")
def killed(server, s3, tmp_path_factory):
    """Folders of runs on one rank and on two that were killed in their second epoch, after seven batches."""
    folders = []
    for num_ranks in (1, 2):
        folders.append(tmp_path_factory.mktemp(f"killed-{num_ranks}"))
        arguments = [*RECIPE, "data.remote=s3://bucket/set", f"data.local={folders[-1]}/cache", "data.num_workers=2",
                     f"save_folder={folders[-1]}/run", "save_interval=3ba"]
        jobs = [Job(server, folders[-1] / f"log-{rank}.txt", "train", [str(folders[-1]), arguments, 7], s3 | ranks)
                for rank, ranks in enumerate(rank_environments(num_ranks))]
        for rank in range(num_ranks):
            wait_for_labels(folders[-1] / f"labels-{rank}.jsonl", 8)
        for job in jobs:
            job.kill()
        for job in jobs:
            assert job.wait()[0] == -signal.SIGKILL
    return folders


def resume(train, s3, killed, folder, *overrides, num_ranks=1):
    """Goes on with a copy of a run that was killed, from the store and an empty cache."""
    folder.mkdir()
    shutil.copytree(killed / "run", folder / "run")
    text = (folder / "run" / "recipe.yaml").read_text()
    (folder / "run" / "recipe.yaml").write_text(text.replace(str(killed), str(folder)))
    jobs = train(folder, "data.remote=s3://bucket/set", f"data.local={folder}/cache", "save_interval=3ba",
                 "autoresume=true", *overrides, environment=s3, num_ranks=num_ranks)
    wait_well(*(jobs if num_ranks > 1 else [jobs]))
    assert (folder / "cache" / "train" / "index.json").exists()


@pytest.mark.parametrize("num_workers", [0, 2])
def test_a_killed_run_goes_on_bit_for_bit(num_workers, killed, straight, s3, train, tmp_path):
    resume(train, s3, killed[0], tmp_path / "run", f"data.num_workers={num_workers}")
    assert read_labels(tmp_path / "run") == read_labels(straight)[6:]
    assert_same_weights(tmp_path / "run", straight)


@pytest.mark.parametrize("num_ranks", [1, 2])
def test_a_killed_run_goes_on_on_other_ranks(num_ranks, killed, straight, s3, train, tmp_path):
    expected = read_labels(straight)
    assert read_labels(killed[2 - num_ranks], 3 - num_ranks) == expected[:8]
    resume(train, s3, killed[2 - num_ranks], tmp_path / "run", num_ranks=num_ranks)
    assert read_labels(tmp_path / "run", num_ranks) == expected[6:]


# what killed runs leave


def find_memory(number="*"):
    return sorted(path.name for path in Path("/dev/shm").glob(f"{number}_*"))


def find_numbers(folder):
    """The numbers of the datasets that name this cache."""
    return [path.name[:6] for path in Path("/dev/shm").glob("*_locals") if bytes(folder) in path.read_bytes()]


def test_what_a_killed_process_leaves_is_removed_and_that_of_others_not(data, tmp_path, start, expected):
    options = {"split": "train", "image_size": 16, "num_classes": NUM_IMAGES, "batch_size": 8, "seed": 3,
               "num_workers": 2}
    caches = [tmp_path / "killed" / "cache", tmp_path / "alive" / "cache"]
    jobs = [start(cache.parent, "read", options | {"path": str(cache), "streaming": {"remote": str(data)}}, 2)
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


def test_leftovers_in_a_cache_do_no_harm(data, tmp_path, expected):
    cache = tmp_path / "train"
    shutil.copytree(data / "train", cache)
    (cache / ".used_by").write_text("process 1 on another host")
    for path in list(cache.glob("shard.*"))[::2]:
        path.unlink()
    (cache / "shard.00001.mds.AbC123").write_bytes(b"half")
    (cache / "shard.00003.mds.tmp").write_bytes(b"half")
    (cache / "shard.00002.mds").write_bytes((data / "train" / "shard.00002.mds").read_bytes()[:100])
    assert read(tmp_path, remote=str(data), epochs=2, num_workers=2) == expected
    assert {path.name for path in cache.glob("shard.*")} == {path.name for path in (data / "train").glob("shard.*")}
    assert all(path.read_bytes() == (data / "train" / path.name).read_bytes() for path in cache.glob("shard.*"))


# two runs


def test_a_cache_is_for_one_run_until_it_is_complete(data, tmp_path, start, expected):
    options = {"split": "train", "image_size": 16, "num_classes": NUM_IMAGES, "batch_size": 8, "seed": 3,
               "path": str(tmp_path / "cache"), "streaming": {"remote": str(data), "predownload": 8}}
    job = start(tmp_path / "first", "read", options, 2)
    wait_for(tmp_path / "first" / "started")
    message = refuse(tmp_path / "cache", remote=str(data))
    assert message.startswith(f"data.local must be a cache for one run at a time, '{tmp_path}/cache/train' is used by "
                              f"process {job.pid} on ")
    (tmp_path / "first" / "go").touch()
    wait_well(job)
    jobs = [start(tmp_path / name, "read", options, 2) for name in ("second", "third")]
    for name in ("second", "third"):
        wait_for(tmp_path / name / "started")
    assert read(tmp_path / "cache", remote=str(data), epochs=2) == expected
    assert "is used by process" not in refuse(tmp_path / "cache", remote=str(data), cache_limit="3kb")
    for name, job in zip(("second", "third"), jobs, strict=True):
        (tmp_path / name / "go").touch()
        wait_well(job)
        assert json.loads((tmp_path / name / "labels.json").read_text())[1] == flatten(expected[5:])


def test_runs_that_start_together_do_not_meet(data, tmp_path, start, expected):
    options = {"split": "train", "image_size": 16, "num_classes": NUM_IMAGES, "batch_size": 8, "seed": 3}
    jobs = []
    for number in range(6):
        (tmp_path / str(number)).mkdir()
        (tmp_path / str(number) / "go").touch()
        options["path"], options["streaming"] = str(tmp_path / str(number) / "cache"), {"remote": str(data)}
        jobs.append(start(tmp_path / str(number), "read", options, 1))
    wait_well(*jobs)
    for number in range(6):
        assert json.loads((tmp_path / str(number) / "labels.json").read_text()) == [flatten(expected[:5])]


# broken samples


def list_samples(folder):
    """File, place in it, and label of each sample, in the order of the shards."""
    samples = []
    for path in sorted(folder.glob("shard.*.mds")):
        data = path.read_bytes()
        count, *offsets = np.frombuffer(data, np.uint32, 2 + int.from_bytes(data[:4], "little"))
        samples += [(path, place, int.from_bytes(data[offsets[place + 1] - 8:offsets[place + 1]], "little"))
                    for place in range(count)]
    return samples


def break_sample(folder, number, *, label=None):
    """Cut the picture of a sample by half, or give it another label; the size of the shard stays."""
    path, place, old_label = list_samples(folder)[number]
    data = bytearray(path.read_bytes())
    begin, end = np.frombuffer(data, np.uint32, 2, 4 * (1 + place)).tolist()
    if label is None:
        size = (int.from_bytes(data[begin:begin + 4], "little")) // 2
        changed = size.to_bytes(4, "little") + data[begin + 4:begin + 4 + size] + old_label.to_bytes(8, "little")
        data[begin:end] = changed.ljust(end - begin, b"\0")
    else:
        data[end - 8:end] = label.to_bytes(8, "little")
    path.write_bytes(data)
    return f"sample {place} of {path.name} in '{folder}'"


@pytest.mark.parametrize("num_workers", [0, 2])
def test_a_truncated_picture_is_one_line(num_workers, copied):
    name = break_sample(copied / "train", 17)
    message = refuse(copied, num_workers=num_workers)
    assert message.startswith(f"{name} must decode, got ") and "truncated" in message


@pytest.mark.parametrize("num_workers", [0, 2])
def test_a_truncated_picture_in_a_folder_is_one_line(num_workers, tmp_path):
    write_source(tmp_path)
    path = tmp_path / "train" / "c13" / "0.JPEG"
    path.write_bytes(path.read_bytes()[:-50])
    message = refuse(tmp_path, name="folder", num_workers=num_workers)
    assert message.startswith(f"'{path}' must hold an image, got ") and "truncated" in message


def test_train_stops_with_one_line_at_a_truncated_picture(copied, train, tmp_path):
    name = break_sample(copied / "train", 17)
    for num_workers in (0, 2):
        job = train(tmp_path / str(num_workers), f"data.path={copied}", f"data.num_workers={num_workers}")
        assert_one_line(job, f"error: {name} must decode, got ")
        assert not (tmp_path / str(num_workers) / "run").exists()


def replace_labels(batches, replacements):
    return [[replacements.get(label, label) for label in batch] for batch in batches]


@pytest.mark.parametrize("num_workers", [0, 2])
def test_training_replaces_bad_samples(num_workers, copied, expected, caplog):
    labels = [label for *_, label in list_samples(copied / "train")]
    # 3 and 4 by 5, the last one by the first
    names = [break_sample(copied / "train", number) for number in (3, 4, NUM_IMAGES - 1)]
    replacements = {labels[3]: labels[5], labels[4]: labels[5], labels[-1]: labels[0]}
    spec = build(copied, on_bad_sample="skip", num_workers=num_workers)
    for epoch in range(2):
        assert read_epoch(spec) == replace_labels(expected[5 * epoch:5 * epoch + 5], replacements)
        assert spec.dataloader.num_skipped == 4 * (epoch + 1)
    shut_down(spec)
    messages = [record.getMessage() for record in caplog.records if record.levelname == "WARNING"]
    assert all(message.startswith("skipped: sample ") for message in messages)
    assert [sum(name in message for message in messages) for name in names] == [2, 4, 2]


@pytest.mark.parametrize("num_workers", [0, 2])
def test_training_on_a_folder_replaces_bad_samples(num_workers, tmp_path):
    write_source(tmp_path)
    batches = []
    for is_broken in (False, True):
        if is_broken:
            (tmp_path / "train" / "c13" / "0.JPEG").write_bytes(b"no picture")
        spec = build(tmp_path, name="folder", on_bad_sample="skip", num_workers=num_workers)
        batches.append(read_epoch(spec))
        shut_down(spec)
    assert batches[1] == replace_labels(batches[0], {13: 14}) and spec.dataloader.num_skipped == 1


def test_train_counts_and_logs_what_it_skips(copied, train, tmp_path, straight):
    labels = [label for *_, label in list_samples(copied / "train")]
    names = [break_sample(copied / "train", 3), break_sample(copied / "val", 20)]
    job = train(tmp_path / "run", f"data.path={copied}", "data.num_workers=2", "data.on_bad_sample=skip")
    wait_well(job)
    trained = read_labels(tmp_path / "run")
    assert trained == [sorted(batch) for batch in replace_labels(read_labels(straight), {labels[3]: labels[4]})]
    numbers = [number for number, batch in enumerate(read_labels(straight)) if labels[3] in batch]
    assert read_metrics(tmp_path / "run", "loader/skipped") == [
        sum(number <= batch for number in numbers) for batch in range(10)
    ]
    assert all(job.log.read_text().count(f"skipped: {name} must decode") == 2 for name in names)


class Grey(nn.Module):
    """Knows the number of a picture by its grey value, but for number 0."""

    def __init__(self):
        super().__init__()
        self.weight = nn.Parameter(torch.zeros(1))

    def forward(self, images):
        numbers = (images.mean((1, 2, 3)) * 255 / STEP).round().long().clamp(min=1)
        return nn.functional.one_hot(numbers, NUM_IMAGES).float() + self.weight


@pytest.mark.parametrize("num_workers", [0, 2])
@pytest.mark.parametrize("name", ["streaming", "folder"])
@pytest.mark.filterwarnings("ignore:.*optimizer.*:UserWarning")
def test_evaluation_leaves_bad_samples_out(name, num_workers, copied, tmp_path):
    if name == "folder":
        copied = write_source(tmp_path / "source")
        for number in (5, 30):
            (copied / "val" / f"c{number:02}" / "0.JPEG").write_bytes(b"no picture")
    else:
        for number in (5, 30):
            break_sample(copied / "val", number)
    spec = build(copied, "val", name=name, on_bad_sample="skip", num_workers=num_workers)
    trainer = Trainer(model=ComposerClassifier(Grey(), num_classes=NUM_IMAGES), device="cpu", progress_bar=False,
                      optimizers=torch.optim.SGD([nn.Parameter(torch.zeros(1))], lr=1.0))
    trainer.eval(spec)
    assert trainer.state.eval_metrics["eval"]["MulticlassAccuracy"].compute() == pytest.approx(37 / 38)
    assert spec.dataloader.num_skipped == 2
    trainer.close()
    shut_down(spec)


@pytest.mark.parametrize("num_workers", [0, 2])
def test_data_that_is_all_bad_is_one_line(num_workers, copied):
    names = [break_sample(copied / "val", number) for number in range(8, 16)]
    message = refuse(copied, "val", on_bad_sample="skip", num_workers=num_workers)
    assert message.startswith(f"data must hold an image that can be read in every batch, got none: {names[0]} must")
    for number in ALL:
        break_sample(copied / "train", number)
    message = refuse(copied, on_bad_sample="skip", num_workers=num_workers)
    assert message.startswith("data must hold samples that can be read, got 41 bad ones in a row, the last: sample ")


@pytest.mark.parametrize("num_workers", [0, 2])
def test_broken_labels_are_one_line(num_workers, copied):
    break_sample(copied / "train", 8, label=2**40)
    assert refuse(copied, num_workers=num_workers) == f"labels must be in [0, model.num_classes=40), got {2**40}"


@pytest.mark.parametrize("num_workers", [0, 2])
@pytest.mark.parametrize("offset", [0, 9, 2**20, 2**32 - 1])
def test_broken_offsets_are_one_line(offset, num_workers, copied):
    path, place, _ = list_samples(copied / "train")[9]
    data = bytearray(path.read_bytes())
    data[4 * (1 + place):4 * (2 + place)] = offset.to_bytes(4, "little")
    path.write_bytes(data)
    message = refuse(copied, num_workers=num_workers)
    assert re.match(rf"sample ({place}|{place - 1}) of {path.name} in '.*' must (be whole|decode), got ", message)
    spec = build(copied, on_bad_sample="skip", num_workers=num_workers)
    assert [len(labels) for labels in read_epoch(spec)] == [8] * 5 and spec.dataloader.num_skipped >= 1
    shut_down(spec)


def test_labels_that_are_no_numbers_are_one_line(tmp_path):
    with MDSWriter(out=str(tmp_path / "train"), columns={"x": "jpeg", "y": "str"}) as shards:
        for number in ALL:
            shards.write({"x": Image.open(io.BytesIO(encode(number))), "y": f"c{number}"})
    assert re.match(r"sample \d+ of shard.00000.mds in '.*' must be whole, got \"invalid literal", refuse(tmp_path))


# broken shards


def test_local_shards_must_be_there_and_whole(copied, train, tmp_path):
    path = copied / "train" / "shard.00004.mds"
    data = path.read_bytes()
    path.write_bytes(data[:-1])
    assert refuse(copied) == (
        f"data.path must hold whole shards, got {len(data) - 1} bytes instead of {len(data)} in '{path}'"
    )
    path.unlink()
    message = f"data.path must hold every shard of its index.json, got no '{path}'"
    assert refuse(copied) == message
    assert_one_line(train(tmp_path / "run", f"data.path={copied}"), message)


def test_a_local_shard_that_goes_is_one_line(copied):
    spec = build(copied)
    (copied / "train" / "shard.00004.mds").unlink()
    with pytest.raises(InputError, match=r"data\.path must keep shard\.00004\.mds: In the absence of local"):
        read_epoch(spec)


@pytest.mark.parametrize("num_workers", [0, 2])
def test_a_shard_with_another_hash_is_one_line_and_is_not_kept(num_workers, bucket, expected, tmp_path):
    url, folder = bucket
    path = folder / "train" / "shard.00004.mds"
    data = path.read_bytes()
    path.write_bytes(data[:-100] + b"?" + data[-99:])
    assert refuse(tmp_path, remote=url, num_workers=num_workers) == (
        "data.remote must give shard.00004.mds with the hash that its index.json names: "
        f"got 'another' from {url}/train"
    )
    assert not list((tmp_path / "train").glob("shard.00004.mds*"))
    path.write_bytes(data)
    assert read(tmp_path, remote=url, epochs=2, num_workers=num_workers) == expected


@pytest.mark.filterwarnings("ignore:unclosed file:ResourceWarning")  # streaming's
def test_a_packed_shard_that_does_not_unpack_is_one_line_and_is_not_kept(tmp_path):
    remote, cache = tmp_path / "remote", tmp_path / "cache"
    with MDSWriter(out=str(remote / "train"), columns={"x": "jpeg", "y": "int"}, compression="zstd", hashes=["sha1"],
                   size_limit=5000) as shards:
        for number in ALL:
            shards.write({"x": Image.open(io.BytesIO(encode(number))), "y": number})
    path = remote / "train" / "shard.00002.mds.zstd"
    data = path.read_bytes()
    path.write_bytes(b"????" + data[4:])
    message = refuse(cache, remote=str(remote))
    assert message.startswith("data.remote must give shard.00002.mds: got ")
    assert not list((cache / "train").glob("shard.00002.*"))
    path.write_bytes(data)
    assert_each_once(read(cache, remote=str(remote), epochs=2), epochs=2)


@pytest.mark.parametrize("num_workers", [0, 2])
def test_a_shard_that_is_missing_is_one_line(num_workers, bucket, tmp_path):
    url, folder = bucket
    (folder / "train" / "shard.00004.mds").unlink()
    options = {"remote": url, "num_workers": num_workers, "download_retry": 1}
    spec = build(tmp_path, **options)
    for _ in range(2):  # a loader that has failed stays so, and does not hang
        with pytest.raises(InputError) as error:
            read_epoch(spec)
        message = str(error.value)
        assert message.startswith("data.remote must give shard.00004.mds: got ") and f"from {url}/train" in message
    shut_down(spec)


def test_a_shard_that_is_missing_is_one_line_where_two_workers_wait_for_it(copied, tmp_path, monkeypatch):
    fetch = LocalDownloader._download_file_impl

    def fetch_slowly(self, remote, local, timeout):
        time.sleep(0.2)
        fetch(self, remote, local, timeout)

    monkeypatch.setattr(LocalDownloader, "_download_file_impl", fetch_slowly)
    for shard in (0, 3, 7):
        path = copied / "train" / f"shard.0000{shard}.mds"
        path.rename(tmp_path / "shard")
        message = refuse(tmp_path / str(shard), remote=str(copied), num_workers=2, batch_size=1, download_retry=1)
        assert message.startswith(f"data.remote must give {path.name}: got ")
        (tmp_path / "shard").rename(path)


def test_a_shard_that_is_missing_ends_all_ranks(bucket, s3, tmp_path):
    url, folder = bucket
    (folder / "train" / "shard.00004.mds").unlink()
    arguments = [*RECIPE, f"data.remote={url}", f"data.local={tmp_path}/cache", "data.num_workers=1",
                 "data.download_retry=1", f"save_folder={tmp_path}/run"]
    with pytest.raises(AssertionError) as error:
        launch("train.py", *arguments, log=tmp_path / "log.txt", timeout=TIMEOUT - 10)
    assert "no end within" not in str(error.value)
    output = (tmp_path / "log.txt").read_text()
    assert "error: data.remote must give shard.00004.mds: got " in output and "Traceback" not in output


# a store that fails


class Proxy:
    """A process between the tests and an S3 server, as in tests/streaming_script.py."""

    def __init__(self, start, folder, target):
        self.launch, self.folder, self.target = start, folder, target
        self.port = find_port()

    def start(self, fail_every=None):
        self.job = self.launch(self.folder, "proxy", self.port, self.target, fail_every)
        wait_until(lambda: socket.create_connection(("127.0.0.1", self.port), timeout=1).close())

    def stop(self):
        """Nothing listens there any more."""
        self.job.kill()
        self.job.wait()

    def count_requests(self):
        return (self.folder / "requests").stat().st_size


@pytest.fixture
def proxy(s3, start, tmp_path, monkeypatch):
    set_environment(monkeypatch, s3)
    proxy = Proxy(start, tmp_path / "proxy", int(s3["S3_ENDPOINT_URL"].rpartition(":")[2]))
    monkeypatch.setenv("S3_ENDPOINT_URL", f"http://127.0.0.1:{proxy.port}")
    monkeypatch.setenv("AWS_MAX_ATTEMPTS", "1")  # it is streaming that tries again
    return proxy


# the shards are read nearly one after another
SLOWLY = {"remote": "s3://bucket/set", "shuffle_algo": "py1s", "predownload": 4, "batch_size": 2}


def test_a_store_that_fails_a_fifth_of_the_requests(proxy, expected, tmp_path):
    proxy.start(fail_every=5)
    assert read(tmp_path, remote="s3://bucket/set", epochs=2, num_workers=2) == expected
    assert proxy.count_requests() >= 25


@pytest.mark.parametrize("num_workers", [0, 2])
def test_a_store_that_comes_back(num_workers, proxy, tmp_path):
    proxy.start()
    spec = build(tmp_path, num_workers=num_workers, **SLOWLY)
    epoch = iter(spec.dataloader)
    labels = [next(epoch)[1] for _ in range(2)]
    proxy.stop()
    num_requests = proxy.count_requests()
    timer = threading.Timer(1.0, proxy.start)
    timer.start()
    labels += [batch[1] for batch in epoch]
    timer.join()
    assert proxy.count_requests() > num_requests
    shut_down(spec)
    assert sorted(torch.cat(labels).tolist()) == ALL


@pytest.mark.parametrize("num_workers", [0, 2])
def test_a_store_that_does_not_come_back_is_one_line(num_workers, proxy, tmp_path):
    proxy.start()
    spec = build(tmp_path, num_workers=num_workers, download_retry=2, **SLOWLY)
    epoch = iter(spec.dataloader)
    next(epoch)
    proxy.stop()
    with pytest.raises(InputError) as error:
        list(epoch)
    shut_down(spec)
    assert re.match(r"data\.remote must give shard\.0000\d\.mds: got .*127\.0\.0\.1:.* from s3://bucket/set/train$",
                    str(error.value))


# caches


# by default, all is to be fetched in advance, which does not fit
@pytest.mark.parametrize(("num_workers", "predownload"), [(0, 8), (2, 8), (2, None)])
def test_a_cache_that_is_smaller_than_the_data(num_workers, predownload, data, expected, tmp_path):
    sizes = [path.stat().st_size for path in (data / "train").glob("shard.*.mds")]
    index_size = (data / "train" / "index.json").stat().st_size
    limit = index_size + 5 * max(sizes)
    assert limit < index_size + 0.6 * sum(sizes)
    largest, is_done = 0, threading.Event()

    def watch():
        nonlocal largest
        while not is_done.wait(0.002):
            total = 0
            for path in tmp_path.rglob("*.*"):
                with contextlib.suppress(FileNotFoundError):
                    total += path.stat().st_size
            largest = max(largest, total)

    thread = threading.Thread(target=watch)
    thread.start()
    try:
        assert read(tmp_path, remote=str(data), cache_limit=f"{limit}b", predownload=predownload, epochs=2,
                    num_workers=num_workers) == expected
    finally:
        is_done.set()
        thread.join()
    # two threads of each worker may fetch at the same time, and the main one
    assert limit - 2 * max(sizes) < largest <= limit + 3 * max(1, num_workers) * max(sizes)


def test_a_full_disk_is_one_line(data, tmp_path, monkeypatch):
    fetch = LocalDownloader._download_file_impl

    def fetch_to_a_full_disk(self, remote, local, timeout):
        if "shard.00004" in remote:
            Path(local + ".tmp").write_bytes(b"half")
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), local)
        fetch(self, remote, local, timeout)

    with monkeypatch.context() as patch:
        patch.setattr(LocalDownloader, "_download_file_impl", fetch_to_a_full_disk)
        for num_workers in (0, 2):
            message = refuse(tmp_path, remote=str(data), download_retry=1, num_workers=num_workers)
            assert message.startswith("data.remote must give shard.00004.mds: got ")
            assert "No space left on device" in message
    assert_each_once(read(tmp_path, remote=str(data)))


def test_a_full_file_system_is_one_line(s3, tmp_path, monkeypatch):
    set_environment(monkeypatch, s3)
    cache = tmp_path / "cache"
    cache.mkdir()
    if shutil.which("mount") is None or subprocess.run(
        ["mount", "-t", "tmpfs", "-o", "size=24k", "tmpfs", str(cache)], capture_output=True
    ).returncode:
        pytest.skip("needs the right to mount")
    try:
        message = refuse(cache, remote="s3://bucket/set", download_retry=1, num_workers=2)
        assert re.match(r"data\.remote must give shard\.0000\d\.mds: got .*No space left on device", message)
        gc.collect()
    finally:
        subprocess.run(["umount", "-l", str(cache)], check=True)


# a worker that is killed


def test_a_killed_worker_is_one_line_and_the_run_goes_on(s3, train, straight, tmp_path):
    arguments = ["data.remote=s3://bucket/set", f"data.local={tmp_path}/cache", "data.num_workers=2",
                 "save_interval=3ba"]
    job = train(tmp_path, *arguments, environment=s3, pause_at=7)
    wait_for_labels(tmp_path / "labels-0.jsonl", 8)
    assert read_labels(tmp_path) == read_labels(straight)[:8]
    os.kill(job.find_workers()[-1], signal.SIGKILL)
    assert_one_line(job, "data.num_workers must be processes that stay alive, but a DataLoader worker")
    wait_well(train(tmp_path, *arguments, "autoresume=true", environment=s3))
    assert read_labels(tmp_path) == read_labels(straight)[6:]
    assert_same_weights(tmp_path, straight)


# waiting for the loader


class Slow(DataLoader):
    """Takes its time for each batch, and to start with."""

    start = seconds = 0.0

    def __iter__(self):
        time.sleep(self.start)
        for batch in super().__iter__():
            time.sleep(self.seconds)
            yield batch


class Busy(nn.Module):
    def __init__(self):
        super().__init__()
        self.linear = nn.Linear(4, 2)

    def forward(self, images):
        time.sleep(0.03)
        return self.linear(images)


def fit(monkeypatch, *, start=0.0, seconds=0.0):
    """The metrics of three epochs, and their time, with a slow loader of twelve batches."""
    monkeypatch.setattr(waiting, "WINDOW", 10)
    model, logger = ComposerClassifier(Busy(), num_classes=2), InMemoryLogger()
    loader = Slow(TensorDataset(torch.zeros(12, 4), torch.zeros(12, dtype=torch.int64)), batch_size=1)
    loader.start, loader.seconds = start, seconds
    trainer = Trainer(model=model, train_dataloader=loader, max_duration="3ep", loggers=logger, device="cpu",
                      optimizers=torch.optim.SGD(model.parameters(), lr=0.1), callbacks=DataWaitMonitor(),
                      progress_bar=False)
    begin = time.perf_counter()
    trainer.fit()
    duration = time.perf_counter() - begin
    trainer.close()
    return {name: [value for _, value in logger.data[f"loader/{name}"]] for name in ("wait_s", "compute_s")}, duration


def test_a_slow_loader_is_told_once_with_its_figures(monkeypatch, capsys):
    metrics, duration = fit(monkeypatch, start=0.1, seconds=0.02)
    line, = [line for line in capsys.readouterr().out.splitlines() if "data loader limits" in line]
    assert len(metrics["wait_s"]) == len(metrics["compute_s"]) == 36
    assert all(wait >= 0.02 for wait in metrics["wait_s"]) and all(compute >= 0.03 for compute in metrics["compute_s"])
    assert 0.9 * duration < sum(metrics["wait_s"] + metrics["compute_s"]) <= duration
    # of the first ten steps but the very first
    assert metrics["wait_s"][0] >= 0.12
    wait, compute = (sum(metrics[name][1:11]) / 10 for name in ("wait_s", "compute_s"))
    figures = [float(figure) for figure in re.findall(r"\d+\.\d+|\d+(?=%)", line)]
    assert figures == pytest.approx([wait, compute, 100 * wait / (wait + compute), (wait + compute) / compute],
                                    abs=0.51, rel=1e-3)
    assert figures[:2] == pytest.approx([wait, compute], abs=6e-4)
    assert "last 10 steps" in line and "data.num_workers, now 0" in line


def test_a_fast_loader_is_never_told_of(monkeypatch, capsys):
    metrics, _ = fit(monkeypatch)
    assert "data loader" not in capsys.readouterr().out
    assert len(metrics["wait_s"]) == 36


def test_the_first_step_of_an_epoch_does_not_count(monkeypatch, capsys):
    metrics, _ = fit(monkeypatch, start=0.1)
    assert [wait > 0.1 for wait in metrics["wait_s"]] == ([True] + [False] * 11) * 3
    assert "data loader" not in capsys.readouterr().out
