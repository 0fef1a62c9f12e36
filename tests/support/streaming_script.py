"""The processes of the tests of data.mds, forked from one that has imported everything, which takes seconds.

    python tests/support/streaming_script.py

reads jobs, a JSON object in a line: the name of a function below and its arguments, environment variables and a file
for the output. It prints the process id of each; the exit status goes to the file's name + `.status`.
"""

import atexit
import contextlib
import gc
import http.client
import http.server
import itertools
import json
import os
import signal
import sys
import threading
import time
import traceback
from pathlib import Path

import torch
from streaming.base.dataset import StreamingDataset  # noqa: F401, imported late by what follows

from pss_composer import cli
from pss_composer.data.augmentation.settings import Augmentation
from pss_composer.data.dataspec import build_dataspec
from pss_composer.data.settings import DataSettings
from pss_composer.errors import exit_on_input_error
from pss_composer.training import trainer

TIMEOUT = 120  # seconds


def train(folder, arguments, pause_at):
    """train.py; the labels of each batch go to a file, and before one of them the run waits for the file `go`."""
    folder = Path(folder)
    labels = (folder / f"labels-{os.environ.get('RANK', '0')}.jsonl").open("w", buffering=1)
    batches = itertools.count()

    def build_data(recipe, split, device):
        spec = build(recipe, split, device)
        prepare = spec.batch_transforms

        def record(batch):
            labels.write(json.dumps(batch[1].tolist()) + "\n")
            is_paused = next(batches) == pause_at
            while is_paused and not (folder / "go").exists():
                time.sleep(0.01)
            return prepare(batch)

        if split == "train":
            spec.batch_transforms = record
        return spec

    build, trainer.build_data = trainer.build_data, build_data
    cli.main(["train", *arguments])


def read(folder, settings, num_epochs):
    """Reads labels, and after the first batch waits for the file `go`."""
    folder = Path(folder)
    with exit_on_input_error(debug=False):
        loader = build_dataspec(
            DataSettings("streaming", **settings), Augmentation(is_plain=True), split="train", image_size=16,
            num_classes=40, batch_size=8, seed=3,
        ).dataloader
        epochs = []
        for _ in range(num_epochs):
            epochs.append([])
            for _, labels in loader:
                epochs[-1] += labels.tolist()
                (folder / "started").touch()
                while not (folder / "go").exists():
                    time.sleep(0.01)
    (folder / "labels.json").write_text(json.dumps(epochs))


def proxy(folder, port, target, fail_every):
    """Passes requests on to a server; of every few it fails one, by an answer or by none, in turn.

    Args:
        folder: The file `requests` in it grows by a byte with each request.
        port: To listen at.
        target: Port of the server.
        fail_every: 5 fails each fifth request; None, no request.
    """
    numbers = itertools.count(1)

    class Handler(http.server.BaseHTTPRequestHandler):
        def do_GET(self):
            number = next(numbers)
            with (Path(folder) / "requests").open("a") as file:
                file.write(".")
            if fail_every and number % fail_every == 0:
                if number // fail_every % 2:
                    self.send_error(500)
                return
            server = http.client.HTTPConnection("127.0.0.1", target, timeout=10)
            with contextlib.closing(server):
                server.request(self.command, self.path, headers=dict(self.headers))
                answer = server.getresponse()
                body = answer.read()
            self.send_response(answer.status)
            for key, value in answer.getheaders():
                if key.lower() not in ("connection", "transfer-encoding"):
                    self.send_header(key, value)
            self.end_headers()
            self.wfile.write(body)

        do_HEAD = do_GET

    http.server.ThreadingHTTPServer(("127.0.0.1", port), Handler).serve_forever()


def run(function, arguments):
    """The exit status of a process that ends as Python does, but for its modules, which take seconds."""
    status = 0
    try:
        function(*arguments)
    except SystemExit as error:
        status = 1
        print(error, file=sys.stderr)
    except BaseException:
        status = 2
        traceback.print_exc()
    threading._shutdown()
    atexit._run_exitfuncs()
    sys.stdout.flush()
    return status


def start(job):
    """Runs a job in a session of its own."""
    if os.fork():
        return
    process = os.fork()
    if process == 0:
        os.setsid()
        signal.alarm(TIMEOUT)
        os.dup2(os.open(os.devnull, os.O_RDONLY), 0)
        os.dup2(os.open(job["log"], os.O_WRONLY | os.O_CREAT), 1)
        os.dup2(1, 2)
        os.environ.update(job["environment"])
        os._exit(run(globals()[job["function"]], job["arguments"]))
    print(process, flush=True)
    _, status = os.waitpid(process, 0)
    path = Path(job["log"] + ".status")
    path.with_suffix(".part").write_text(str(os.waitstatus_to_exitcode(status)))
    path.with_suffix(".part").rename(path)
    os._exit(0)


if __name__ == "__main__":
    torch.set_num_threads(1)
    gc.freeze()
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    for line in sys.stdin:
        start(json.loads(line))
        while True:
            try:
                if os.waitpid(-1, os.WNOHANG) == (0, 0):
                    break
            except ChildProcessError:
                break
