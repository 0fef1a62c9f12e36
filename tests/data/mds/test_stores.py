"""Stores give what local shards give, or one line says why not."""

import contextlib
import os
import re
import shutil
import socket
import subprocess
import threading
from pathlib import Path

import pytest
import torch
from support.jobs import RECIPE, assert_one_line, find_port, wait_until
from support.servers import sftp_server
from support.shards import ALL, assert_each_once, build, read, refuse, set_environment

from pss_composer.data.mds.stream import ShardStream
from pss_composer.data.settings import DataSettings
from pss_composer.errors import InputError
from pss_composer.training.builders import build_data
from pss_composer.training.reading import load_recipe


def test_s3_gives_what_local_shards_give(bucket, expected, tmp_path, caplog):
    url, folder = bucket
    assert read(tmp_path / "two", remote=url, epochs=2, num_workers=2) == expected
    assert read(tmp_path / "none", remote=f"{url}/", epochs=2) == expected
    assert not [record for record in caplog.records if record.name == ShardStream.__module__]
    (folder / "train" / "index.json").unlink()
    assert read(tmp_path / "two", remote=url, epochs=2) == expected  # from its complete cache
    message, = [record.getMessage() for record in caplog.records if record.name == ShardStream.__module__]
    assert message.startswith("remote must give index.json: got ")
    assert message.endswith(f"{url}/train; read from {tmp_path}/two/train alone, which holds all shards")


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
    ({"remote": "gopher://host/set"}, "remote must be a store that streaming reads: got 'Unsupported remote"),
    ({"cache_limit": "12 parsecs"}, "cache_limit must be a size like 100gb, got '12 parsecs'"),
    ({"cache_limit": "1kb"}, r"cache_limit must be at least 1\d{4}b, .* four shards, got '1kb'"),
    ({"cache_limit": "9kb"}, r"cache_limit must be at least 1\d{4}b, .* four shards, got '9kb'"),
    ({"shuffle_algo": "py3"}, "shuffle_algo must be one of py1e, py1br, .*, got 'py3'"),
    ({"predownload": 0}, "predownload must be at least 1, got 0"),
    ({"download_retry": 0}, "download_retry must be at least 1, got 0"),
    ({"shuffle_block_size": -1}, "shuffle_block_size must be at least 1, got -1"),
    ({"num_canonical_nodes": 0}, "num_canonical_nodes must be at least 1, got 0"),
    ({"remote": None, "local": "cache"}, "local must be null without remote, got 'cache'"),
    ({"remote": None, "cache_limit": "1gb"}, "cache_limit must be null without remote, got '1gb'"),
    ({"name": "folder"}, "remote must be null unless name=streaming, got '.*'"),
    ({"local": "/dev/null/cache"}, "local must be a folder that can be written, got '/dev/null/cache/train'"),
])
def test_bad_settings(options, message, data, tmp_path):
    assert re.match(message, refuse(tmp_path, **({"remote": str(data)} | options)))


def test_a_cache_must_have_a_folder(data):
    error, = DataSettings("streaming", remote=str(data)).check()
    assert (error.key, error.rule) == ("local", "must be a folder that caches remote, got None")


def test_bad_stores(bucket, tmp_path, monkeypatch):
    url, folder = bucket

    def refuse_store(remote):
        message = refuse(tmp_path, remote=remote, download_retry=1)
        assert message.startswith("remote must give index.json: got ") and message.endswith(f"{remote}/train")
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
    spec.dataloader.close()
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
    spec.dataloader.close()
    assert re.match(r"remote must give shard\.0000\d\.mds: got .*127\.0\.0\.1:.* from s3://bucket/set/train$",
                    str(error.value))
