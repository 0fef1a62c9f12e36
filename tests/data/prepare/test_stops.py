"""Conversions that are stopped, killed, run twice at once, or short of space: the shards are the same in the end."""

import errno
import multiprocessing
import os
import shutil
import signal
import time
from pathlib import Path

import pytest
from support.conversion import SHARD_SIZE, WAIT, contents, convert, running, wait_for_records

from pss_composer.data.prepare import stores
from pss_composer.errors import InputError


def times(folder):
    return {path: path.stat().st_mtime_ns for path in Path(folder).glob("*/shard.*.mds")}


def find_workers(process):
    return [int(pid) for pid in Path(f"/proc/{process.pid}/task/{process.pid}/children").read_text().split()]


def test_a_killed_conversion_goes_on(source, converted, tmp_path):
    out = tmp_path / "out"
    with running("convert", source, out, "--shard-size", SHARD_SIZE, "--workers", 2) as process:
        wait_for_records(out / "train", 2)
        os.killpg(process.pid, signal.SIGKILL)
    done = times(out)
    assert done and not (out / "train" / "index.json").exists()
    convert(source, out)
    assert contents(out) == contents(converted)
    recorded = [path for path in done if times(out)[path] == done[path]]
    assert len(recorded) >= 2


def test_workers_end_with_their_parent(source, tmp_path):
    with running("convert", source, tmp_path / "out", "--shard-size", SHARD_SIZE, "--workers", 3) as process:
        wait_for_records(tmp_path / "out", 1)
        workers = find_workers(process)
        os.kill(process.pid, signal.SIGKILL)
        deadline = time.monotonic() + WAIT
        while any(Path(f"/proc/{pid}/cmdline").exists() and Path(f"/proc/{pid}/cmdline").read_bytes()
                  for pid in workers):
            assert time.monotonic() < deadline
            time.sleep(0.05)
    assert len(workers) == 3


def test_workers_that_outlive_their_parent_do_not_keep_the_folder(source, converted, tmp_path):
    out = tmp_path / "out"
    with running("convert", source, out, "--shard-size", SHARD_SIZE, "--workers", 2) as process:
        wait_for_records(out / "train", 1)
        for worker in find_workers(process):
            os.kill(worker, signal.SIGSTOP)
        os.kill(process.pid, signal.SIGKILL)
        process.join(WAIT)
        convert(source, out)
    assert contents(out) == contents(converted)


def test_two_conversions_do_not_write_at_once(source, converted, tmp_path):
    out = tmp_path / "out"
    with running("convert", source, out, "--shard-size", SHARD_SIZE, "--workers", 1) as process:
        wait_for_records(out / "train", 1)
        os.kill(process.pid, signal.SIGSTOP)  # else it may be at its end before the second one gives up
        message = f"^out must be a folder that nobody else writes to, .*train.* is used by process {process.pid} on "
        with pytest.raises(InputError, match=message):
            convert(source, out)
        os.kill(process.pid, signal.SIGCONT)
        process.join(WAIT)
        assert process.exitcode == 0
    assert contents(out) == contents(converted)


def test_a_file_system_without_locks(source, converted, tmp_path, monkeypatch):
    def flock(file, operation):
        raise OSError(errno.EBADF, "Bad file descriptor")

    monkeypatch.setattr("fcntl.flock", flock)
    convert(source, tmp_path / "out")
    assert contents(tmp_path / "out") == contents(converted)


def test_a_broken_record_or_shard_is_written_again(source, converted, tmp_path):
    out = tmp_path / "out"
    with running("convert", source, out, "--shard-size", SHARD_SIZE, "--workers", 1) as process:
        wait_for_records(out / "train", 4)
        os.killpg(process.pid, signal.SIGKILL)
    (out / "train" / ".parts" / "shard.00000.json").write_text("")
    (out / "train" / "shard.00001.mds").write_bytes(b"short")
    (out / "train" / "shard.00002.mds").unlink()
    convert(source, out)
    assert contents(out) == contents(converted)


def test_ctrl_c_stops_with_a_line(source, converted, tmp_path, capfd):
    out = tmp_path / "out"
    with running("convert", source, out, "--shard-size", SHARD_SIZE, "--workers", 2) as process:
        wait_for_records(out / "train", 1)
        os.killpg(process.pid, signal.SIGINT)
        process.join(WAIT)
        assert process.exitcode == 130
    assert capfd.readouterr().err == "stopped: the same command goes on from here\n"
    convert(source, out)
    assert contents(out) == contents(converted)


def test_a_worker_that_dies_ends_the_conversion_with_a_line(source, tmp_path, capfd):
    with running("convert", source, tmp_path / "out", "--shard-size", SHARD_SIZE, "--workers", 2) as process:
        wait_for_records(tmp_path / "out", 1)
        os.kill(find_workers(process)[0], signal.SIGKILL)
        process.join(WAIT)
        assert process.exitcode == 1
    (line,) = capfd.readouterr().err.splitlines()
    assert line.startswith("error: one of 2 worker processes died (killed, or out of memory?)")


def test_a_finished_conversion_is_left_alone(source, converted, tmp_path, capsys):
    out = Path(shutil.copytree(converted, tmp_path / "out"))
    before = {path: path.stat().st_mtime_ns for path in out.rglob("*")}
    convert(source, out)
    assert {path: path.stat().st_mtime_ns for path in out.rglob("*")} == before
    assert capsys.readouterr().out.splitlines() == [
        "train: finished already, nothing to do", "val: finished already, nothing to do"
    ]


def test_what_is_left_of_a_finished_conversion_goes(source, converted, tmp_path):
    out = Path(shutil.copytree(converted, tmp_path / "out"))
    (out / "val" / ".parts").mkdir()
    (out / "val" / ".parts" / "shard.00000.json").write_text("{}")
    convert(source, out)
    assert contents(out) == contents(converted)


@pytest.mark.parametrize("num_failures", [2, 3])
def test_a_full_disk_is_retried_and_then_reported(num_failures, source, converted, tmp_path, monkeypatch):
    monkeypatch.setattr(stores, "ATTEMPTS", {"num_attempts": 3, "initial_backoff": 0.01})
    put = stores.Store.put
    failures = multiprocessing.RawValue("i", 0)

    def put_or_fail(self, folder, name):
        if name == "train/shard.00002.mds" and failures.value < num_failures:
            failures.value += 1
            raise OSError(errno.ENOSPC, "No space left on device")
        put(self, folder, name)

    monkeypatch.setattr(stores.Store, "put", put_or_fail)
    if num_failures == 3:
        message = r"^out must take train/shard.00002.mds, got .*No space left.*\(3 attempts"
        with pytest.raises(InputError, match=message):
            convert(source, tmp_path / "out")
    convert(source, tmp_path / "out")
    assert failures.value == num_failures
    assert contents(tmp_path / "out") == contents(converted)
