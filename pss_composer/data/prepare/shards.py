"""Worker processes that read and check images and write them as MDS shards, each whole or not at all."""

from __future__ import annotations

import ctypes
import io
import multiprocessing
import os
import signal
import threading
import warnings
from concurrent.futures import ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

import torch
from streaming import MDSWriter
from torchvision.transforms.v2.functional import InterpolationMode, resize, to_pil_image
from tqdm import tqdm

from pss_composer.data.augmentation.decoding import BadImage, decode_tensor
from pss_composer.data.prepare.imagenet import SourceImage, Split
from pss_composer.data.prepare.settings import ConversionSettings
from pss_composer.data.prepare.stores import PARTS, Store
from pss_composer.errors import InputError
from pss_composer.locks import FolderLock


@dataclass
class Job:
    """The conversion of one split, which forked worker processes inherit.

    Args:
        store: Where the shards go.
        split: The split.
        shards: The images of every shard.
        settings: Options of the conversion.
        fingerprint: Identifies the conversion; every record of a shard has it.
        lock: Keeps other conversions out of the split; None for a remote store.
        is_stopped: Tells the workers to stop. It has no lock, because a worker that is killed would keep it.
    """

    store: Store
    split: Split
    shards: list[list[SourceImage]]
    settings: ConversionSettings
    fingerprint: str
    lock: FolderLock | None
    is_stopped: Any = field(default_factory=lambda: multiprocessing.RawValue(ctypes.c_bool, False))


def run_workers(job: Job) -> list[dict[str, Any]]:
    """Write all shards in worker processes, unless they are there.

    Returns:
        The record of every shard, in order: its `fingerprint`; `shard`, its entry of the index, or None if it has no
        images; and `left_out`, pairs of an image's name and why it does not decode.

    Raises:
        InputError: An image cannot be read; one does not decode, under `is_strict`; the store fails; or a worker dies.
    """
    num_workers = min(job.settings.num_workers, len(job.shards))
    context = multiprocessing.get_context("fork")  # a spawned worker would import torch, which takes seconds
    records = []
    with ProcessPoolExecutor(num_workers, context, initializer=_start_worker, initargs=(job,)) as pool:
        try:
            results = pool.map(_write_shard, range(len(job.shards)))
            for record in tqdm(results, desc=job.split.name, total=len(job.shards), unit=" shards", disable=None):
                if record["left_out"] and job.settings.is_strict:
                    name, reason = record["left_out"][0]
                    raise InputError(f"allows only images that decode, got {job.split.folder / name}: {reason}",
                                     key="is_strict")
                records.append(record)
        except BrokenProcessPool:
            raise InputError(
                f"one of {num_workers} worker processes died (killed, or out of memory?): "
                "the same command goes on from here"
            ) from None
        except BaseException:
            job.is_stopped.value = True
            pool.shutdown(cancel_futures=True)
            raise
    return records


_job: Job  # of a worker process


def _start_worker(job: Job) -> None:
    global _job
    _job = job
    if job.lock is not None:
        job.lock.release()  # else the lock would stay when the main process is killed
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C reaches every process, and the main one stops the others
    signal.signal(signal.SIGTERM, signal.SIG_DFL)  # Composer's handler waits for a system call to end
    torch.set_num_threads(1)
    warnings.simplefilter("ignore")  # PIL's, about odd metadata
    threading.Thread(target=_exit_with_parent, daemon=True).start()


def _exit_with_parent() -> None:
    """End this worker when the main process is killed; it would wait for its next shard for ever."""
    multiprocessing.parent_process().join()
    os._exit(1)


def _write_shard(number: int) -> dict[str, Any]:
    """Write a shard and its record, unless they are there, and return the record; {} if the conversion was stopped."""
    job, split = _job, _job.split.name
    name, record_name = f"{split}/shard.{number:05}.mds", f"{split}/{PARTS}/shard.{number:05}.json"
    record = job.store.read_json(record_name)
    if record is not None and record["fingerprint"] == job.fingerprint:
        entry = record["shard"]
        if entry is None or job.store.has_size(name, entry["raw_data"]["bytes"]):
            return record
    samples, left_out = [], []
    for image in job.shards[number]:
        if job.is_stopped.value:
            return {}
        try:
            samples.append({"x": _read_image(job.split.folder, image, job.settings), "y": image.label})
        except BadImage as error:
            left_out.append([image.name, str(error)])
    entry = job.store.write(name, partial(_write_samples, samples)) if samples else None
    record = {"fingerprint": job.fingerprint, "shard": entry, "left_out": left_out}
    job.store.write_json(record_name, record)
    return record


def _write_samples(samples: list[dict[str, Any]], file: Path) -> dict[str, Any]:
    """Write a shard and return its entry of the index."""
    # bytes in the place of an image stay as they are
    columns = {"x": "jpeg", "y": "int"}
    with MDSWriter(columns=columns, out=str(file.parent), hashes=["xxh3_64"], size_limit=None) as writer:
        for sample in samples:
            writer.write(sample)
    (entry,) = writer.shards
    # the writer numbers its shards from 0
    os.replace(file.with_name(entry["raw_data"]["basename"]), file)
    entry["raw_data"]["basename"] = file.name
    return entry


def _read_image(folder: Path, image: SourceImage, settings: ConversionSettings) -> bytes:
    """The bytes of an image for its shard: those of its file, unless it is resized.

    Raises:
        BadImage: The image does not decode.
        InputError: The file cannot be read, or its size is not the one that the shards were planned with.
    """
    path = folder / image.name
    try:
        data = path.read_bytes()
    except OSError as error:
        raise InputError(f"must be readable, got {str(path)!r}: {error.strerror}", key="source") from None
    if len(data) != image.size:
        raise InputError(f"must stay as it is, got {len(data)} bytes instead of {image.size} in {path}", key="source")
    pixels = decode_tensor(data)
    if settings.shortest_side is None or min(pixels.shape[1:]) <= settings.shortest_side:
        return data
    encoded = io.BytesIO()
    picture = resize(to_pil_image(pixels), [settings.shortest_side], InterpolationMode.BICUBIC)
    picture.save(encoded, "JPEG", quality=settings.quality)
    return encoded.getvalue()
