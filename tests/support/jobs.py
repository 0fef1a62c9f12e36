"""Processes of `streaming_script.py`, and what they leave."""

import contextlib
import json
import os
import signal
import socket
import time
from pathlib import Path

from support.shards import NUM_IMAGES, flatten

TIMEOUT = 120  # seconds
RECIPE = ["yamls/deit_small_224.yaml", "model.size=tiny", "model.embed_dim=32", "model.depth=1", "model.num_heads=2",
          "model.image_size=32", f"model.num_classes={NUM_IMAGES}", "train_batch_size=8", "eval_batch_size=8",
          "max_duration=2ep", "scheduler.warmup=0ep", "data.num_workers=0", "augmentation.repeats=1",
          "progress_bar=false"]


class Job:
    """A process that runs a function of tests/support/streaming_script.py."""

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


def wait_until(connect):
    deadline = time.monotonic() + TIMEOUT / 2
    while True:
        try:
            return connect()
        except OSError:
            assert time.monotonic() < deadline
            time.sleep(0.05)


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
