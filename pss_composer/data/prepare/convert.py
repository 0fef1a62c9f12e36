"""Converts a folder of images to MDS shards for `StreamingImageNet`; a conversion that was stopped can go on.

The names and sizes of the source files alone decide which image goes into which shard, and a shard is written whole or
not at all. So the shards are the same, byte for byte, with any number of workers and after any number of stops.
"""

from __future__ import annotations

import hashlib
import json
import os
import random
import re
import shutil
from contextlib import closing
from pathlib import Path
from typing import Any

from pss_composer.checks import raise_errors
from pss_composer.data.prepare.imagenet import SPLITS, SourceImage, Split, find_splits
from pss_composer.data.prepare.settings import ConversionSettings
from pss_composer.data.prepare.shards import Job, run_workers
from pss_composer.data.prepare.stores import PARTS, RemoteStore, Store, open_store
from pss_composer.errors import InputError
from pss_composer.locks import FolderLock

FORMAT = 1  # raise it when the same images and options give other shards: old and new shards must not be mixed
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
        out: Folder, or URL of a store that streaming writes to. It is new or empty, or holds the same conversion.
        ground_truth: The classes of validation images without class folders, see `read_ground_truth`.
        shortest_side: Images whose shortest side is longer, in pixels, are resized to it (bicubic) and encoded again
            as JPEG; all others keep their bytes.
        quality: Quality of the JPEGs that are resized, in [1, 100].
        shard_size: Source bytes per shard, like `64mb`.
        num_workers: Number of processes; by default, the number of cores.
        is_strict: Whether an image that does not decode is an error.

    Raises:
        InputError: Bad input; `out` holds something else; or the store fails.
    """
    if num_workers is None:
        num_workers = len(os.sched_getaffinity(0))
    settings = ConversionSettings(shortest_side, quality, shard_size, num_workers, is_strict)
    raise_errors(settings.check())
    with closing(open_store(out, key="out", is_written=True)) as store:
        splits = find_splits(source, ground_truth, _read_classes(store))
        foreign = sorted({*store.list_folder("")} - {*SPLITS})
        if foreign:
            raise InputError(f"must hold nothing but {' and '.join(SPLITS)}, got {foreign[0]!r} at {store.shown}",
                             key="out")
        plans = [_describe_shards(split, settings) for split in splits]
        for split, plan in zip(splits, plans, strict=True):
            _is_finished(store, split.name, plan)  # raises its errors before the first split, which may take hours
        for split, plan in zip(splits, plans, strict=True):
            if _is_finished(store, split.name, plan):
                print(f"{split.name}: finished already, nothing to do")
            else:
                _convert_split(store, split, settings, plan)
            if not isinstance(store, RemoteStore):  # streaming does not remove files there
                shutil.rmtree(store.root / split.name / PARTS, ignore_errors=True)


def plan_shards(split: Split, shard_size: int) -> list[list[SourceImage]]:
    """Divide the images of a split among shards, by their names and sizes alone.

    Args:
        split: Training images are shuffled, validation images stay in the order of their names.
        shard_size: Largest sum of the files of a shard, in bytes; a larger image has a shard of its own.

    Returns:
        The images of every shard.
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
    """The class names of the splits that are converted already."""
    classes = {split: store.read_json(f"{split}/classes.json") for split in SPLITS}
    return {split: names for split, names in classes.items() if names is not None}


def _describe_shards(split: Split, settings: ConversionSettings) -> dict[str, Any]:
    """The options that the bytes of the shards depend on, and a fingerprint of these and of the source files."""
    quality = settings.quality if settings.shortest_side is not None else None
    options = {"shortest_side": settings.shortest_side, "quality": quality, "shard_size": settings.shard_bytes}
    text = json.dumps([FORMAT, split.name, split.classes, split.images, options])
    return {"fingerprint": hashlib.sha256(text.encode()).hexdigest(), **options}


def _is_finished(store: Store, name: str, plan: dict[str, Any]) -> bool:
    """Whether a split is complete.

    Raises:
        InputError: It holds anything but this conversion.
    """
    found = store.read_json(f"{name}/plan.json")
    is_finished = store.read(f"{name}/index.json") is not None
    # if the store cannot list its files, at least the index of another finished conversion is found
    names = store.list_folder(name) or ["index.json"] * is_finished
    foreign = [entry for entry in names if entry != PARTS and (found is None or not OWN_NAMES.fullmatch(entry))]
    if foreign:
        raise InputError(f"must be new or hold this conversion, got a foreign {name}/{foreign[0]}", key="out")
    if found not in (None, plan):
        raise InputError(
            f"must be new or hold this conversion, got {name}/plan.json of another one (of other images or classes, "
            "or with another shortest side, quality or shard size)",
            key="out",
        )
    return is_finished


def _convert_split(store: Store, split: Split, settings: ConversionSettings, plan: dict[str, Any]) -> None:
    lock = None if isinstance(store, RemoteStore) else FolderLock(store.root / split.name / PARTS, key="out")
    try:
        store.write_json(f"{split.name}/plan.json", plan)
        store.write_json(f"{split.name}/classes.json", split.classes)
        if split.num_ignored:
            print(f"{split.name}: {split.num_ignored:,} other files and folders ignored")
        store.close()  # two processes cannot use one connection
        shards = plan_shards(split, settings.shard_bytes)
        records = run_workers(Job(store, split, shards, settings, plan["fingerprint"], lock))
        entries = [record["shard"] for record in records if record["shard"] is not None]
        if not entries:
            name, reason = records[0]["left_out"][0]
            raise InputError(f"must hold images that decode, got none in {split.name}; {name}: {reason}", key="source")
        # written last: a split with an index is complete
        store.write_json(f"{split.name}/index.json", {"version": 2, "shards": entries})
    finally:
        if lock is not None:
            lock.release()

    left_out = sorted(image for record in records for image in record["left_out"])
    for name, reason in left_out:
        print(f"left out: {split.folder / name}: {reason}")
    num_images = sum(entry["samples"] for entry in entries)
    num_shards = f"{len(entries):,} shard{'' if len(entries) == 1 else 's'}"
    print(f"{split.name}: {num_images:,} images of {len(split.classes)} classes in {num_shards}, "
          f"{len(left_out):,} left out")
