"""Conversion to a store, check-data in stores, and stores that are refused or do not answer."""

import os
import shutil
import signal

import pytest
from streaming.base.storage import S3Uploader
from support.conversion import (
    SHARD_SIZE,
    contents,
    convert,
    files_of,
    flip,
    read_back,
    running,
    wait_for_records,
)
from support.servers import s3_server, sftp_server

from pss_composer.cli import main
from pss_composer.data.prepare import stores
from pss_composer.data.prepare.check import check_data
from pss_composer.errors import InputError


@pytest.fixture
def bucket(tmp_path):
    folder = tmp_path / "served" / "bucket"
    folder.mkdir(parents=True)
    return folder


@pytest.fixture
def s3(bucket, monkeypatch):
    with s3_server(bucket.parent) as environment:
        for key, value in environment.items():
            monkeypatch.setenv(key, value)
        yield


def expect_problems(capsys, url, folder):
    """Break two of the validation shards, and expect check-data to find this."""
    assert check_data(url) == 0
    shard = folder / "val" / "shard.00001.mds"
    shard.write_bytes(flip(shard.read_bytes(), -1))
    (folder / "val" / "shard.00002.mds").unlink()
    capsys.readouterr()
    assert check_data(f"{url}/val") == 2
    _, first, second, last = capsys.readouterr().out.splitlines()
    assert first.startswith("val: shard.00001.mds: must have the xxh3_64 hash ")
    assert (second, last) == ("val: shard.00002.mds: must be there, but is missing", "2 problems")


@pytest.mark.usefixtures("s3")
def test_s3(bucket, source, converted, tmp_path, capsys):
    url, folder = "s3://bucket/deep/out", bucket / "deep" / "out"
    with running("convert", source, url, "--shard-size", SHARD_SIZE, "--workers", 2) as process:
        wait_for_records(folder / "train", 2)
        os.killpg(process.pid, signal.SIGKILL)
    done = {path.name: path.stat().st_mtime_ns for path in (folder / "train").glob("shard.*.mds")}
    recorded = [path.stem + ".mds" for path in (folder / "train" / ".parts").glob("shard.*.json")]
    assert not (folder / "train" / "index.json").exists()
    convert(source, url)
    for name in recorded:
        assert (folder / "train" / name).stat().st_mtime_ns == done[name]
    assert all(contents(folder)[path] == data for path, data in contents(converted).items())
    convert(source, url)
    assert capsys.readouterr().out.splitlines()[-1] == "val: finished already, nothing to do"

    expected = files_of(source, "val")
    assert read_back(tmp_path / "cache", remote=f"{url}/val") == expected
    expect_problems(capsys, url, folder)

    with pytest.raises(InputError, match=r"got train/plan\.json of another one"):
        convert(source, url, shard_size="1mb")
    (folder / "notes.txt").write_text("hello")
    with pytest.raises(InputError, match="^out must hold nothing but train and val, got 'notes.txt' at"):
        convert(source, url)


def test_sftp_is_read(bucket, source, converted, tmp_path, monkeypatch, capsys):
    shutil.copytree(converted, bucket / "out")
    with sftp_server(bucket.parent) as (url, environment):
        for key, value in environment.items():
            monkeypatch.setenv(key, value)
        url += "//bucket/out"
        assert read_back(tmp_path / "cache", remote=f"{url}/val") == files_of(source, "val")
        expect_problems(capsys, url, bucket / "out")


@pytest.mark.parametrize("url", ["sftp://user:secret@host/out", "hf://datasets/owner/name/out", "ftp://host/out"])
def test_stores_that_streaming_does_not_write_to_are_refused(url, source):
    with pytest.raises(SystemExit) as error:
        main(["convert", str(source), url])
    line = error.value.code
    assert line.startswith("error: OUT must be a folder or begin with ") and "\n" not in line
    assert " gs://, " in line and " s3://, " in line and "hf://," not in line and "sftp://," not in line
    assert line.endswith(f"got {url.replace('secret', '***')!r}")


def test_stores_that_streaming_does_not_read_are_refused():
    with pytest.raises(InputError) as error:
        check_data("ftp://user:secret@host/out")
    assert str(error.value).startswith("path must be a folder or a store that streaming reads, "
                                       "got 'ftp://user:***@host/out': Unsupported remote path: ")
    assert "secret" not in str(error.value)


def test_a_remote_that_does_not_answer(source, monkeypatch):
    monkeypatch.setattr(stores, "ATTEMPTS", {"num_attempts": 2, "initial_backoff": 0.01})
    with pytest.raises(InputError) as error:
        check_data("sftp://user:secret@127.0.0.1:1/out")
    assert str(error.value).startswith("path must be readable at sftp://user:***@127.0.0.1:1/out/index.json, got ")
    assert "secret" not in str(error.value) and "\n" not in str(error.value)
    assert str(error.value).endswith("(2 attempts)")

    for key, value in {"S3_ENDPOINT_URL": "http://127.0.0.1:1", "AWS_ACCESS_KEY_ID": "key", "AWS_MAX_ATTEMPTS": "1",
                       "AWS_SECRET_ACCESS_KEY": "secret", "AWS_DEFAULT_REGION": "us-east-1"}.items():
        monkeypatch.setenv(key, value)
    with pytest.raises(InputError) as error:
        convert(source, "s3://bucket/out")
    assert str(error.value).startswith("out must be readable at s3://bucket/out/train/classes.json, got ")
    assert "\n" not in str(error.value) and str(error.value).endswith("(2 attempts)")


@pytest.mark.usefixtures("s3")
def test_a_bucket_that_is_not_there(source, monkeypatch):
    monkeypatch.setattr(stores, "ATTEMPTS", {"num_attempts": 2, "initial_backoff": 0.01})
    with pytest.raises(InputError, match=r"^out must be readable at s3://other/out, got .*404.* \(2 attempts\)$"):
        convert(source, "s3://other/out")


@pytest.mark.usefixtures("s3")
@pytest.mark.parametrize("num_failures", [1, 2])
def test_an_upload_that_fails_is_retried_and_then_reported(num_failures, bucket, copied, converted, monkeypatch):
    monkeypatch.setattr(stores, "ATTEMPTS", {"num_attempts": 2, "initial_backoff": 0.01})
    upload_file, failures = S3Uploader.upload_file, []

    def upload_or_fail(self, filename):
        if filename == "val/plan.json" and len(failures) < num_failures:
            failures.append(filename)
            raise ConnectionError("the line is down")
        upload_file(self, filename)

    monkeypatch.setattr(S3Uploader, "upload_file", upload_or_fail)
    shutil.rmtree(copied / "train")
    if num_failures == 2:
        with pytest.raises(InputError, match=r"^out must take val/plan.json, got the line is down \(2 attempts\)$"):
            convert(copied, "s3://bucket/out")
    convert(copied, "s3://bucket/out")
    assert len(failures) == num_failures
    written, expected = contents(bucket / "out" / "val"), contents(converted / "val")
    assert all(written[path] == data for path, data in expected.items())
