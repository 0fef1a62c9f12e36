"""Converts a folder of images to MDS shards for `StreamingImageNet`; a conversion that was stopped can go on.

Which image goes into which shard is planned from the names and sizes of the source files alone, and a shard is
written whole or not at all. So the shards are the same, byte for byte, whatever the number of workers and however
often the conversion was stopped.
"""

from __future__ import annotations

import hashlib
import json
import os
import random
import re
import shutil
from collections.abc import Iterator
from contextlib import closing, contextmanager
from pathlib import Path

from pss_composer.checks import raise_errors
from pss_composer.data.mds.stream import hide_password
from pss_composer.data.prepare.imagenet import SPLITS, SourceImage, Split, find_splits
from pss_composer.data.prepare.settings import ConversionSettings
from pss_composer.data.prepare.shards import Job, run_workers
from pss_composer.data.prepare.stores import PARTS, RemoteStore, Store, open_store
from pss_composer.errors import InputError
from pss_composer.locks import FolderLock

FORMAT = 1  # another number makes other shards of the same images
SHUFFLE_SEED = 0
OWN_NAMES = re.compile(r"\.parts|(plan|classes|index)\.json|shard\.\d{5,}\.mds")


def convert_images(
    source: Path,
    out: str,
    *,
    ground_truth: Path | None = None,
    shortest_side: int | None = None,
    quality: int = 90,
    shard_size: str | int = "64mb",
    num_workers: int | None = None,
    is_strict: bool = False,
) -> None:
    """Convert an ImageNet-style folder to MDS shards in `out/train` and `out/val`, and print what was done.

    Images that do not decode are left out and listed.

    Args:
        source: Holds `train/CLASS/*` or `val/CLASS/*` or both, or the validation images themselves.
        out: Folder or URL of a store that streaming writes to: new, empty, or left by the same conversion.
        ground_truth: The classes of validation images without class folders, see `read_ground_truth`.
        shortest_side: Images whose shortest side is longer, in pixels, are resized to it (bicubic) and encoded again
            as JPEG; all others keep their bytes.
        quality: Quality of the JPEGs that are resized, in [1, 100].
        shard_size: Source bytes per shard, like `64mb`.
        num_workers: Number of processes; as many as cores by default.
        is_strict: The first image that does not decode is an error.

    Raises:
        InputError: Bad input, an `out` that holds something else, or a store that fails.
    """
    if num_workers is None:
        num_workers = len(os.sched_getaffinity(0))
    settings = ConversionSettings(shortest_side, quality, shard_size, num_workers, is_strict)
    raise_errors(settings.check())
    with closing(open_store(out, key="out", is_written=True)) as store:
        splits = find_splits(source, ground_truth, _read_classes(store))
        for name in _list_folder(store, ""):
            if name not in SPLITS:
                raise InputError(f"must hold nothing but {' and '.join(SPLITS)}, got {name!r} at {hide_password(out)}",
                                 key="out")
        unfinished = []
        for split in splits:  # all are checked before the first takes hours
            fingerprint = _fingerprint(split, settings)
            if _find_state(store, split.name, fingerprint) == "finished":
                print(f"{split.name}: finished already, nothing to do")
                _clear_parts(store, split.name)
            else:
                unfinished.append((split, fingerprint))
        for split, fingerprint in unfinished:
            with _open_split(store, split.name) as lock:
                # another conversion may have written here before the lock was free
                is_resumed = _find_state(store, split.name, fingerprint) != "new"
                shards = plan_shards(split, settings.shard_bytes)
                _convert_split(Job(store, split, shards, settings, fingerprint, is_resumed, lock))


def plan_shards(split: Split, shard_size: int) -> list[list[SourceImage]]:
    """The images of every shard, from their names and sizes alone.

    Args:
        split: Training images are shuffled, validation images stay in the order of their names.
        shard_size: Bytes of a shard, at most; a larger image has a shard of its own.
    """
    images = list(split.images)
    if split.name == "train":
        # in the order of their names, a shard would hold one or two classes; training reads a few shards at a time,
        # so its batches would hold few classes, too
        random.Random(SHUFFLE_SEED).shuffle(images)
    shards: list[list[SourceImage]] = []
    num_bytes = 0
    for image in images:
        if not shards or num_bytes + image.size > shard_size:
            shards.append([])
            num_bytes = 0
        shards[-1].append(image)
        num_bytes += image.size
    return shards


def _read_classes(store: Store) -> dict[str, list[str]]:
    files = {split: store.read(f"{split}/classes.json") for split in SPLITS}
    try:
        return {split: list(json.loads(data)) for split, data in files.items() if data is not None}
    except (ValueError, TypeError):
        message = "must hold a list of class names in classes.json, got something else"
        raise InputError(message, key="out") from None


def _list_folder(store: Store, name: str) -> list[str]:
    """The names of files and folders in a folder of the store; none where it cannot list them."""
    return store.retry(lambda: store.list_folder(name), f"must be readable at {hide_password(store.url)}") or []


def _fingerprint(split: Split, settings: ConversionSettings) -> str:
    digest = hashlib.sha256(json.dumps([FORMAT, split.name, split.classes, settings.describe_shards()]).encode())
    for image in split.images:
        digest.update(json.dumps(image).encode())
    return digest.hexdigest()


def _find_state(store: Store, name: str, fingerprint: str) -> str:
    """`new`, `started` or `finished`."""
    plan = store.read(f"{name}/plan.json")
    is_finished = store.read(f"{name}/index.json") is not None
    # where the store cannot list its files, at least the index of a finished conversion is found
    names = _list_folder(store, name) or (["index.json"] if is_finished else [])
    foreign = [entry for entry in names if entry != PARTS and (plan is None or not OWN_NAMES.fullmatch(entry))]
    if foreign:
        raise InputError(f"must be new or hold this conversion, got a foreign {name}/{foreign[0]}", key="out")
    if plan is None:
        return "new"
    try:
        is_same = json.loads(plan)["fingerprint"] == fingerprint
    except (ValueError, KeyError, TypeError):
        is_same = False
    if not is_same:
        raise InputError(
            f"must be new or hold this conversion, got {name}/plan.json of another one (of other images or classes, "
            "or with another shortest side, quality or shard size)",
            key="out",
        )
    return "finished" if is_finished else "started"


@contextmanager
def _open_split(store: Store, name: str) -> Iterator[FolderLock | None]:
    """Keep other conversions on this machine out of a split, and at the end remove what only a conversion needs."""
    if isinstance(store, RemoteStore):
        yield None
        return
    lock = FolderLock(store.root / name / PARTS, key="out")
    try:
        yield lock
        _clear_parts(store, name)
    finally:
        lock.release()


def _clear_parts(store: Store, name: str) -> None:
    if not isinstance(store, RemoteStore):  # streaming does not remove files there
        shutil.rmtree(store.root / name / PARTS, ignore_errors=True)


def _convert_split(job: Job) -> None:
    store, split = job.store, job.split
    if not job.is_resumed:
        plan = {
            "fingerprint": job.fingerprint,
            "source": str(split.folder.resolve()),
            "images": len(split.images),
            "shards": len(job.shards),
            **job.settings.describe_shards(),
        }
        store.write_json(f"{split.name}/plan.json", plan)
    store.write_json(f"{split.name}/classes.json", split.classes)
    if split.num_ignored:
        print(f"{split.name}: {split.num_ignored:,} other files and folders ignored")

    store.close()  # two processes cannot use one connection
    records = run_workers(job)
    entries = [record["shard"] for record in records if record["shard"] is not None]
    if not entries:
        name, reason = records[0]["left_out"][0]
        raise InputError(f"must hold images that decode, got none in {split.name}; {name}: {reason}", key="source")
    # the last file: with it the split is complete
    store.write_json(f"{split.name}/index.json", {"version": 2, "shards": entries})

    left_out = sorted(tuple(image) for record in records for image in record["left_out"])
    for name, reason in left_out:
        print(f"left out: {split.folder / name}: {reason}")
    num_images = sum(entry["samples"] for entry in entries)
    num_shards = f"{len(entries):,} shard{'' if len(entries) == 1 else 's'}"
    print(
        f"{split.name}: {num_images:,} images of {len(split.classes)} classes in {num_shards}, "
        f"{len(left_out):,} left out"
    )
