"""Worker processes that read and check images and write them as MDS shards, each whole or not at all."""

from __future__ import annotations

import ctypes
import io
import json
import multiprocessing
import os
import signal
import threading
import warnings
from concurrent.futures import FIRST_COMPLETED, Future, ProcessPoolExecutor, wait
from concurrent.futures.process import BrokenProcessPool
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from PIL import Image
from streaming import MDSWriter
from tqdm import tqdm

from pss_composer.data.augmentation.decoding import BadImage, decode_tensor
from pss_composer.data.prepare.imagenet import SourceImage, Split
from pss_composer.data.prepare.settings import ConversionSettings
from pss_composer.data.prepare.stores import PARTS, Store
from pss_composer.errors import InputError
from pss_composer.locks import FolderLock

COLUMNS = {"x": "jpeg", "y": "int"}
HASH = "xxh3_64"


@dataclass
class Job:
    """The conversion of one split, which its worker processes inherit.

    Args:
        store: Where the shards go.
        split: The split.
        shards: The images of every shard.
        settings: How they are written.
        fingerprint: Identifies the conversion, in every record.
        is_resumed: Some shards may be there already.
        lock: Keeps other conversions out of the split; None for a remote store.

    Attributes:
        num_done: Images done in every shard.
        is_stopped: The workers shall stop. Both are without a lock, which a worker that is killed would keep.
    """

    store: Store
    split: Split
    shards: list[list[SourceImage]]
    settings: ConversionSettings
    fingerprint: str
    is_resumed: bool
    lock: FolderLock | None

    def __post_init__(self) -> None:
        self.num_done = multiprocessing.RawArray(ctypes.c_int64, len(self.shards))
        self.is_stopped = multiprocessing.RawValue(ctypes.c_bool, False)


def run_workers(job: Job) -> list[dict[str, Any]]:
    """Have all shards written, and return their records in order.

    Raises:
        InputError: An image cannot be read, or under `is_strict` not decoded, the store fails, or a worker dies.
    """
    num_workers = min(job.settings.num_workers, len(job.shards))
    context = multiprocessing.get_context("fork")  # a worker that starts afresh imports torch for seconds
    with ProcessPoolExecutor(num_workers, context, initializer=_start_worker, initargs=(job,)) as pool:
        try:
            futures = [pool.submit(_write_shard, number) for number in range(len(job.shards))]
            _show_progress(futures, job)
        except BrokenProcessPool:
            raise InputError(
                f"one of {num_workers} worker processes died (killed, or out of memory?): "
                "the same command goes on from here"
            ) from None
        except BaseException:
            job.is_stopped.value = True
            pool.shutdown(cancel_futures=True)
            raise
    return [future.result() for future in futures]


def _show_progress(futures: list[Future], job: Job) -> None:
    """Draw the progress bar until all shards are done, or until one fails."""
    pending = set(futures)
    with tqdm(total=len(job.split.images), desc=job.split.name, unit=" images", smoothing=0, disable=None) as bar:
        bar.initial = 0  # a disabled one has no such attribute
        while pending:
            done, pending = wait(pending, timeout=0.5, return_when=FIRST_COMPLETED)
            for record in (future.result() for future in done):
                bar.initial += record["num_skipped"]  # they say nothing about the speed
                if record["left_out"] and job.settings.is_strict:
                    name, reason = record["left_out"][0]
                    raise InputError(f"allows only images that decode, got {job.split.folder / name}: {reason}",
                                     key="is_strict")
            bar.update(sum(job.num_done) - bar.n)


_job: Job  # of a worker process


def _start_worker(job: Job) -> None:
    global _job
    _job = job
    if job.lock is not None:
        job.lock.release()  # its copy here would outlast a main process that is killed
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C reaches every process, and the main one stops the others
    signal.signal(signal.SIGTERM, signal.SIG_DFL)  # Composer's handler waits for a system call to end
    torch.set_num_threads(1)
    warnings.simplefilter("ignore")  # PIL's, about odd metadata
    threading.Thread(target=_follow_parent, daemon=True).start()


def _follow_parent() -> None:
    # a worker whose parent is killed would wait for its next shard for ever
    multiprocessing.parent_process().join()
    os._exit(1)


def _write_shard(number: int) -> dict[str, Any] | None:
    """Read and check images, write their shard and then its record, and return the record.

    A shard that is already there is left alone. None if the conversion was stopped.
    """
    job, images = _job, _job.shards[number]
    name = f"{job.split.name}/shard.{number:05}.mds"
    record_name = f"{job.split.name}/{PARTS}/shard.{number:05}.json"
    record = _read_record(job, name, record_name) if job.is_resumed else None
    if record is not None:
        job.num_done[number] = len(images)
        return record | {"num_skipped": len(images)}
    samples, left_out = [], []
    for image in images:
        if job.is_stopped.value:
            return None
        try:
            samples.append({"x": _read_image(job.split.folder, image, job.settings), "y": image.label})
        except BadImage as error:
            left_out.append((image.name, str(error)))
        job.num_done[number] += 1
    entry = job.store.retry(lambda: _store_shard(job, name, samples), f"must take {name}")
    record = {"fingerprint": job.fingerprint, "shard": entry, "left_out": left_out}
    job.store.write_json(record_name, record)
    return record | {"num_skipped": 0}


def _read_record(job: Job, name: str, record_name: str) -> dict[str, Any] | None:
    """The record of a shard that is there."""
    try:
        record = json.loads(job.store.read(record_name) or b"null")
        if record is None or record["fingerprint"] != job.fingerprint:
            return None
        entry = record["shard"]
        if entry is not None and not job.store.has_size(name, entry["raw_data"]["bytes"]):
            return None
    except (ValueError, KeyError, TypeError):
        return None  # after a power cut
    return record


def _store_shard(job: Job, name: str, samples: list[dict[str, Any]]) -> dict[str, Any] | None:
    """Write a shard and return its entry of the index; a shard without samples is not written."""
    if not samples:
        return None
    with job.store.open_workspace(job.split.name) as folder:
        file = Path(folder, name)
        # bytes in the place of an image stay as they are
        with MDSWriter(columns=COLUMNS, out=str(file.parent), hashes=[HASH], size_limit=None) as shard:
            for sample in samples:
                shard.write(sample)
        (entry,) = shard.shards
        # the writer numbers its shards from 0
        os.replace(file.with_name(entry["raw_data"]["basename"]), file)
        entry["raw_data"]["basename"] = file.name
        job.store.put(Path(folder), name)
    return entry


def _read_image(folder: Path, image: SourceImage, settings: ConversionSettings) -> bytes:
    """The bytes for the shard of an image that decodes."""
    path = folder / image.name
    try:
        data = path.read_bytes()
    except OSError as error:
        raise InputError(f"must be readable, got {str(path)!r}: {error.strerror}", key="source") from None
    if len(data) != image.size:
        raise InputError(f"must stay as it is, got {len(data)} bytes instead of {image.size} in {path}", key="source")
    pixels = decode_tensor(data)
    height, width = pixels.shape[1:]
    if settings.shortest_side is None or min(height, width) <= settings.shortest_side:
        return data
    # rounded down, as torchvision's Resize does
    scaled = [settings.shortest_side * side // min(height, width) for side in (width, height)]
    picture = Image.fromarray(pixels.permute(1, 2, 0).contiguous().numpy())
    encoded = io.BytesIO()
    picture.resize(scaled, Image.Resampling.BICUBIC).save(encoded, "JPEG", quality=settings.quality)
    return encoded.getvalue()
