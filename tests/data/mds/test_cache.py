"""Caches: of one remote, for one run at a time, within a limit, and on a disk that may be full."""

import contextlib
import errno
import gc
import json
import os
import re
import shutil
import subprocess
import threading
from pathlib import Path

import pytest
from streaming.base.storage.download import LocalDownloader
from support.jobs import assert_one_line, wait_for, wait_well
from support.shards import ALL, NUM_IMAGES, SHARD_SIZE, assert_each_once, encode, flatten, read, refuse, set_environment

from pss_composer.data.mds.stream import ShardStream
from pss_composer.data.prepare.convert import convert_images


def test_a_cache_limit_must_hold_the_index_and_a_shard(copied, tmp_path):
    # an index of many small shards is larger than four of them
    size = max(path.stat().st_size for path in (copied / "train").glob("*.mds"))
    index = copied / "train" / "index.json"
    index.write_text(index.read_text() + " " * 20000)
    limit = index.stat().st_size + size - 1
    message = refuse(tmp_path / "cache", remote=str(copied), cache_limit=f"{limit}b")
    assert message == (f"cache_limit must be at least {limit + 1}b, for the index and a shard and for four shards, "
                       f"got '{limit}b'")
    limit += 1
    assert_each_once(read(tmp_path / "cache", remote=str(copied), cache_limit=f"{limit}b", predownload=8))


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


def test_a_cache_is_for_one_run_until_it_is_complete(data, tmp_path, start, expected):
    settings = {"path": str(tmp_path / "cache"), "remote": str(data), "predownload": 8, "num_workers": 0}
    job = start(tmp_path / "first", "read", settings, 2)
    wait_for(tmp_path / "first" / "started")
    message = refuse(tmp_path / "cache", remote=str(data))
    assert message.startswith(f"local must be a folder that nobody else writes to, '{tmp_path}/cache/train' is used by "
                              f"process {job.pid} on ")
    (tmp_path / "first" / "go").touch()
    wait_well(job)
    jobs = [start(tmp_path / name, "read", settings, 2) for name in ("second", "third")]
    for name in ("second", "third"):
        wait_for(tmp_path / name / "started")
    assert read(tmp_path / "cache", remote=str(data), epochs=2) == expected
    assert "is used by process" not in refuse(tmp_path / "cache", remote=str(data), cache_limit="3kb")
    for name, job in zip(("second", "third"), jobs, strict=True):
        (tmp_path / name / "go").touch()
        wait_well(job)
        assert json.loads((tmp_path / name / "labels.json").read_text())[1] == flatten(expected[5:])


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
            assert message.startswith("remote must give shard.00004.mds: got ")
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
        assert re.match(r"remote must give shard\.0000\d\.mds: got .*No space left on device", message)
        gc.collect()
    finally:
        subprocess.run(["umount", "-l", str(cache)], check=True)


# of one remote


@pytest.fixture
def other(data, tmp_path):
    """Another set: the same pictures, other labels."""
    source = tmp_path / "source"
    for split in ("train", "val"):
        for number in ALL:
            (source / split / f"c{(number + 1) % NUM_IMAGES:02}").mkdir(parents=True)
            (source / split / f"c{(number + 1) % NUM_IMAGES:02}" / "0.JPEG").write_bytes(encode(number))
    convert_images(source, str(tmp_path / "other"), shard_size=SHARD_SIZE, num_workers=1)
    return tmp_path / "other"


@pytest.mark.parametrize("is_complete", [True, False])
@pytest.mark.parametrize("key", ["path", "local"])
def test_a_cache_of_another_remote_is_refused(key, is_complete, data, other, tmp_path):
    cache = Path(shutil.copytree(other, tmp_path / "cache"))
    if not is_complete:
        (cache / "train" / "shard.00003.mds").unlink()
    settings = {"local": str(cache)} if key == "local" else {}
    message = refuse(cache if key == "path" else tmp_path / "nowhere", remote=str(data), **settings)
    assert message == (f"local must be a cache of remote, but '{cache}/train/index.json' is another than that of "
                       f"{data}/train")
    files = {path.name for path in (other / "train").iterdir()} - {"shard.00003.mds"}
    assert files <= {path.name for path in (cache / "train").iterdir()}  # it may be somebody's only copy


def test_train_refuses_the_cache_of_another_remote(data, other, train, tmp_path):
    job = train(tmp_path / "run", f"data.path={other}", f"data.remote={data}")
    assert_one_line(job, f"error: data.local must be a cache of remote, but '{other}/train/index.json' is another")


def test_a_complete_cache_is_read_where_the_store_is_not_reachable(data, expected, tmp_path, caplog):
    remote, cache = shutil.copytree(data, tmp_path / "remote"), tmp_path / "cache"
    read(cache, remote=str(remote))
    shutil.rmtree(remote)
    assert read(cache, remote=str(remote), epochs=2) == expected
    message, = [record.getMessage() for record in caplog.records if record.name == ShardStream.__module__]
    assert message.startswith("remote must give index.json: ") and message.endswith(
        f"; read from {cache}/train alone, which holds all shards"
    )
    # of a store that gives nothing, a cache of another one may be the wrong images
    message = refuse(cache, remote=str(tmp_path / "mistyped"), download_retry=1)
    assert message.startswith("remote must give index.json: ")
    (cache / "train" / "shard.00003.mds").unlink()
    assert refuse(cache, remote=str(remote), download_retry=1).startswith("remote must give index.json: ")
