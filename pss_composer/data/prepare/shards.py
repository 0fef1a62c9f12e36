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
from pss_composer.data.prepare.stores import PARTS, RemoteStore, Store
from pss_composer.errors import InputError
from pss_composer.locks import FolderLock

COLUMNS = {"x": "jpeg", "y": "int"}
HASH = "xxh3_64"


@dataclass(frozen=True)
class Settings:
    """What decides about the bytes of the shards.

    Args:
        shortest_side: Larger images are resized to this, in pixels; None leaves all as they are.
        quality: Quality of the JPEGs that are resized, in [1, 100].
        shard_size: Bytes of source files per shard.
    """

    shortest_side: int | None
    quality: int
    shard_size: int


@dataclass
class Job:
    """The conversion of one split, which its worker processes inherit.

    Args:
        store: Where the shards go.
        split: The split.
        shards: The images of every shard.
        settings: How the images are written.
        fingerprint: Identifies the conversion, in every record.
        is_resumed: Some shards may be there already.
        is_strict: The first image that does not decode is an error.
        lock: Keeps other conversions out of the split; None for a remote store.

    Attributes:
        num_done: Images done in every shard.
        is_stopped: The workers shall stop. Both are without a lock, which a worker that is killed would keep.
    """

    store: Store
    split: Split
    shards: list[list[SourceImage]]
    settings: Settings
    fingerprint: str
    is_resumed: bool
    is_strict: bool
    lock: FolderLock | None

    def __post_init__(self) -> None:
        self.num_done = multiprocessing.RawArray(ctypes.c_int64, len(self.shards))
        self.is_stopped = multiprocessing.RawValue(ctypes.c_bool, False)


def run_workers(job: Job, num_workers: int) -> list[dict[str, Any]]:
    """Have all shards written, and return their records in order."""
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


def write_json(store: Store, name: str, value: Any) -> None:
    """Write a small file of the conversion."""
    store.write(name, json.dumps(value, sort_keys=True).encode())


def _show_progress(futures: list[Future], job: Job) -> None:
    """Draw the progress bar until all shards are done or one has failed."""
    pending = set(futures)
    with tqdm(total=len(job.split.images), desc=job.split.name, unit=" images", smoothing=0, disable=None) as bar:
        bar.initial = 0  # a disabled one has no such attribute
        while pending:
            done, pending = wait(pending, timeout=0.5, return_when=FIRST_COMPLETED)
            for record in (future.result() for future in done):
                if record["was_there"]:
                    bar.initial += record["num_images"]  # they say nothing about the speed
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
    job, basename = _job, f"shard.{number:05}.mds"
    images = job.shards[number]
    name, record_name = f"{job.split.name}/{basename}", f"{job.split.name}/{PARTS}/shard.{number:05}.json"
    record = _read_record(job, name, record_name) if job.is_resumed else None
    was_there = record is not None
    if record is None:
        samples, left_out = [], []
        for image in images:
            if job.is_stopped.value:
                return None
            try:
                samples.append({"x": _read_image(job.split.folder, image, job.settings), "y": image.label})
            except BadImage as error:
                left_out.append((image.name, str(error)))
                if job.is_strict:
                    break
            job.num_done[number] += 1
        if not (left_out and job.is_strict):
            entry = job.store.retry(lambda: _store_shard(job, name, samples), f"must take {name}")
            record = {"fingerprint": job.fingerprint, "shard": entry, "left_out": left_out}
            write_json(job.store, record_name, record)
    else:
        left_out = record["left_out"]
        job.num_done[number] = len(images)
    if left_out and job.is_strict:
        image_name, reason = left_out[0]
        raise InputError(f"allows only images that decode, got {job.split.folder / image_name}: {reason}",
                         key="is_strict")
    return record | {"was_there": was_there, "num_images": len(images)}


def _read_record(job: Job, name: str, record_name: str) -> dict[str, Any] | None:
    try:
        record = json.loads(job.store.read(record_name) or b"null")
        if record is None or record["fingerprint"] != job.fingerprint:
            return None
        if record["shard"] is not None and not isinstance(job.store, RemoteStore):  # which does not lose files
            path = job.store.root / name
            if not path.is_file() or path.stat().st_size != record["shard"]["raw_data"]["bytes"]:
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


def _read_image(folder: Path, image: SourceImage, settings: Settings) -> bytes:
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
