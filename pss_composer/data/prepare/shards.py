"""Worker processes that read and check images and write them as MDS shards, each whole or not at all."""

from __future__ import annotations

import io
import json
import multiprocessing
import os
import signal
import tempfile
import threading
import warnings
from collections.abc import Sequence
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
from pss_composer.data.prepare.stores import LocalStore, Store, with_retries
from pss_composer.errors import InputError

HASH = "xxh3_64"


@dataclass(frozen=True)
class Settings:
    """What decides about the bytes of the shards.

    Args:
        shortest_side: Larger images are resized to this, in pixels; None leaves all as they are.
        quality: Of the JPEGs that are resized, in [1, 100].
        shard_size: Bytes of source files per shard.
    """

    shortest_side: int | None
    quality: int
    shard_size: int


@dataclass
class Job:
    """What the worker processes of one split share.

    Args:
        store: Of all splits.
        split: The split.
        settings: How the images are written.
        fingerprint: Of the plan, in every record.
        is_resumed: Shards may already be there.
        is_strict: The first image that does not decode is an error.
        workspace: Folder for unfinished shards.
        num_done: Images done in every shard.
        is_stopped: The workers shall stop. Both without a lock, which a worker that is killed would keep.
    """

    store: Store
    split: Split
    settings: Settings
    fingerprint: str
    is_resumed: bool
    is_strict: bool
    workspace: Path
    num_done: Any
    is_stopped: Any


def run_workers(job: Job, shards: list[list[SourceImage]], num_workers: int) -> list[dict[str, Any]]:
    """Has the shards of a split written, and returns their records in order."""
    context = multiprocessing.get_context("fork")  # a worker that starts afresh imports torch for seconds
    with ProcessPoolExecutor(num_workers, context, initializer=_start_worker, initargs=(job,)) as pool:
        try:
            futures = [pool.submit(_write_shard, number, images) for number, images in enumerate(shards)]
            _follow(futures, job)
        except BrokenProcessPool:
            raise InputError(
                f"a worker process of --workers {num_workers} died (killed, or out of memory?): "
                "the same command goes on from here"
            ) from None
        except BaseException:
            job.is_stopped.value = True
            pool.shutdown(cancel_futures=True)
            raise
    return [future.result() for future in futures]


def _follow(futures: list[Future], job: Job) -> None:
    """Draws the progress bar until all shards are done or one has failed."""
    pending = set(futures)
    num_images = len(job.split.images)
    with tqdm(total=num_images, desc=job.split.name, unit=" images", smoothing=0, disable=None) as bar:
        bar.initial = 0  # which a disabled one lacks
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
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C reaches every process, and the main one tells the others
    signal.signal(signal.SIGTERM, signal.SIG_DFL)  # Composer's handler waits for a system call to end
    torch.set_num_threads(1)
    warnings.simplefilter("ignore")  # PIL's, about odd metadata
    threading.Thread(target=_follow_parent, daemon=True).start()


def _follow_parent() -> None:
    # a worker whose parent is killed would wait for its next shard for ever
    multiprocessing.parent_process().join()
    os._exit(1)


def _write_shard(number: int, images: Sequence[SourceImage]) -> dict[str, Any] | None:
    """Reads and checks images, writes their shard and then its record, and returns the record.

    A shard that is already there is left alone. None if the conversion was stopped.
    """
    job = _job
    basename = f"shard.{number:05}.mds"
    name, record_name = f"{job.split.name}/{basename}", f"{job.split.name}/.parts/shard.{number:05}.json"
    record = None
    if job.is_resumed:
        rule = f"OUT must be readable for {record_name}"
        record = with_retries(job.store, lambda: _read_record(job, name, record_name), rule)
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
            entry = with_retries(job.store, lambda: _store_shard(job, name, samples), f"OUT must take {name}")
            record = {"fingerprint": job.fingerprint, "shard": entry, "left_out": left_out}
            write_json(job.store, record_name, record)
    else:
        left_out = record["left_out"]
        job.num_done[number] = len(images)
    if left_out and job.is_strict:
        image_name, reason = left_out[0]
        raise InputError(f"--strict: SRC must hold whole images, got {job.split.folder / image_name}: {reason}")
    return record | {"was_there": was_there, "num_images": len(images)}


def _read_record(job: Job, name: str, record_name: str) -> dict[str, Any] | None:
    data = job.store.read(record_name)
    try:
        record = json.loads(data or b"null")
        if record is None or record["fingerprint"] != job.fingerprint:
            return None
        if isinstance(job.store, LocalStore) and record["shard"] is not None:
            path = job.store.root / name
            if not path.is_file() or path.stat().st_size != record["shard"]["raw_data"]["bytes"]:
                return None
    except (ValueError, KeyError, TypeError):
        return None  # after a power cut
    return record


def _store_shard(job: Job, name: str, samples: list[dict[str, Any]]) -> dict[str, Any] | None:
    """Writes a shard and returns its entry of the index; a shard without samples is not written."""
    if not samples:
        return None
    with tempfile.TemporaryDirectory(dir=job.workspace) as folder:
        shard = _ShardWriter(Path(name).name, folder)
        with shard:
            for sample in samples:
                shard.write(sample)
        job.store.put(Path(folder, shard.basename), name)
    return shard.shards[0]


class _ShardWriter(MDSWriter):
    """Writes one shard under a given name. Bytes in the place of an image stay as they are."""

    def __init__(self, basename: str, folder: str) -> None:
        super().__init__(columns={"x": "jpeg", "y": "int"}, out=folder, hashes=[HASH], size_limit=None)
        self.basename = basename

    def _name_next_shard(self, extension: str | None = None) -> tuple[str, str | None]:
        return self.basename, None


def _read_image(folder: Path, image: SourceImage, settings: Settings) -> bytes:
    """The bytes for the shard of an image that decodes."""
    try:
        data = (folder / image.name).read_bytes()
    except OSError as error:
        raise InputError(f"SRC must be readable, got {error}") from None
    if len(data) != image.size:
        raise InputError(
            f"SRC must stay as it is, got {len(data)} bytes instead of {image.size} in {folder / image.name}"
        )
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


def write_json(store: Store, name: str, value: Any) -> None:
    """Writes a small file of the conversion."""
    data = json.dumps(value, sort_keys=True).encode()
    with_retries(store, lambda: store.write(name, data), f"OUT must take {name}")
