"""Small images, their conversion to shards, and what the shards then hold."""

import contextlib
import io
import json
import multiprocessing
import os
import signal
import time
from pathlib import Path

import numpy as np
from PIL import Image
from streaming.base.hashing import get_hash
from streaming.vision import StreamingImageNet

from pss_composer.cli import main
from pss_composer.data.mds.shared_memory import choosing_number, free_when_dropped
from pss_composer.data.prepare import shards
from pss_composer.data.prepare.convert import convert_images

CLASSES = ["n01440764", "n01443537", "n02102040"]
SHARD_SIZE = "6kb"
WAIT = 20  # seconds


def encode(image, suffix="JPEG", **options):
    file = io.BytesIO()
    image.save(file, suffix, **options)
    return file.getvalue()


def random_image(rng, size=(24, 18)):
    return Image.fromarray(rng.integers(0, 256, (*size, 3), dtype=np.uint8))


def convert(source, out, **options):
    convert_images(Path(source), str(out), **({"shard_size": SHARD_SIZE, "num_workers": 2} | options))


def truncate(path):
    path.write_bytes(path.read_bytes()[:-200])


def flip(data, position):
    changed = bytearray(data)
    changed[position] ^= 1
    return bytes(changed)


def files_of(source, split):
    """Bytes and label of every image, in the order of the names."""
    return [
        (path.read_bytes(), label)
        for label, name in enumerate(CLASSES)
        for path in sorted((source / split / name).iterdir())
    ]


def read_back(folder, **options):
    """Bytes and label of every image, as streaming reads them."""
    with choosing_number():
        dataset = StreamingImageNet(
            local=str(folder), batch_size=1, transform=lambda image: image.fp.getvalue(), **options
        )
    free_when_dropped(dataset)
    return [dataset[index] for index in range(len(dataset))]


def contents(folder):
    return {path.relative_to(folder): path.read_bytes() for path in Path(folder).rglob("*") if path.is_file()}


def edit_index(folder, change):
    index = json.loads((folder / "index.json").read_text())
    change(index["shards"])
    (folder / "index.json").write_text(json.dumps(index))


def rewrite(folder, number, data):
    """Give a shard other bytes, and the index what fits them."""
    (folder / f"shard.{number:05}.mds").write_bytes(data)

    def change(shards):
        shards[number]["raw_data"] |= {"bytes": len(data), "hashes": {"xxh3_64": get_hash("xxh3_64", data)}}

    edit_index(folder, change)


@contextlib.contextmanager
def running(*arguments):
    """The command line in a process and process group of its own, whose images take their time."""

    def run():
        os.setsid()
        read_image = shards._read_image

        def read_slowly(*arguments):
            time.sleep(0.05)
            return read_image(*arguments)

        shards._read_image = read_slowly
        main([str(argument) for argument in arguments])

    process = multiprocessing.get_context("fork").Process(target=run)
    process.start()
    try:
        yield process
    finally:
        with contextlib.suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGKILL)
        process.join()


def wait_for_records(folder, count):
    """Until a conversion to `folder`, or to the split `folder`, has recorded so many shards."""
    deadline = time.monotonic() + WAIT
    while sum(len(list(Path(folder).glob(f"{split}.parts/shard.*.json"))) for split in ("", "*/")) < count:
        assert time.monotonic() < deadline, f"no {count} shards in {WAIT} s"
        time.sleep(0.01)
