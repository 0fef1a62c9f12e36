"""Converts a folder of images to MDS shards for `StreamingImageNet`; stopped, it goes on where it stopped.

Which image goes into which shard is planned from the names and sizes of the source files alone, and a shard is
written whole or not at all. So the shards are the same, byte for byte, whatever the number of workers and however
often the conversion was stopped.
"""

from __future__ import annotations

import contextlib
import ctypes
import fcntl
import hashlib
import json
import multiprocessing
import os
import random
import re
import shutil
import tempfile
import time
from collections.abc import Iterator
from dataclasses import asdict
from pathlib import Path

from streaming.base.util import bytes_to_int

from pss_composer.data.mds.stream import hide_password
from pss_composer.data.prepare.imagenet import SPLITS, SourceImage, Split, find_splits
from pss_composer.data.prepare.shards import Job, Settings, run_workers, write_json
from pss_composer.data.prepare.stores import LocalStore, Store, open_store, with_retries
from pss_composer.errors import InputError

FORMAT = 1  # another number makes other shards of the same images
SHUFFLE_SEED = 0
MAX_SHARD_SIZE = 2**30  # MDS counts bytes with 32 bits
OWN_NAMES = re.compile(r"\.parts|(\.?(plan|classes|index)\.json|\.?shard\.\d{5,}\.mds)(\.part)?")
LOCK_WAIT = 5  # s


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
        out: Folder or URL: new, empty, or left by the same conversion.
        ground_truth: The classes of validation images without class folders, see `read_ground_truth`.
        shortest_side: Images whose shortest side is longer are resized to it (bicubic) and encoded again as JPEG;
            all others keep their bytes.
        quality: Of the JPEGs that are resized.
        shard_size: Source bytes per shard, like `64mb`.
        num_workers: Processes; as many as cores by default.
        is_strict: The first image that does not decode is an error.

    Raises:
        InputError: Bad input, an `out` that holds something else, or a store that fails.
    """
    settings = _check_settings(shortest_side, quality, shard_size)
    if num_workers is None:
        num_workers = len(os.sched_getaffinity(0))
    if num_workers < 1:
        raise InputError(f"--workers must be at least 1, got {num_workers}")
    store = open_store(out)
    if isinstance(store, LocalStore) and store.root.exists() and not store.root.is_dir():
        raise InputError(f"OUT must be a folder, got {out!r}")
    readable = f"OUT must be readable at {hide_password(out)}"
    splits = find_splits(source, ground_truth, with_retries(store, lambda: _read_classes(store), readable))
    names = with_retries(store, lambda: store.list_folder(""), readable)
    for name in names or ():
        if name not in SPLITS:
            raise InputError(f"OUT must hold nothing but {' and '.join(SPLITS)}, got {name!r} at {hide_password(out)}")
    fingerprints = [_fingerprint(split, settings) for split in splits]
    # of all splits, before the first takes hours
    states = [
        with_retries(store, lambda i=i: _find_state(store, splits[i].name, fingerprints[i]), readable)
        for i in range(len(splits))
    ]
    for split, fingerprint, state in zip(splits, fingerprints, states, strict=True):
        if state == "finished":
            print(f"{split.name}: finished already, nothing to do")
            if isinstance(store, LocalStore):
                shutil.rmtree(store.root / split.name / ".parts", ignore_errors=True)
        else:
            _convert_split(store, split, settings, fingerprint, state == "started", num_workers, is_strict)
    store.close()


def plan_shards(split: Split, shard_size: int) -> list[list[SourceImage]]:
    """The images of every shard, from their names and sizes alone.

    Args:
        split: Training images are shuffled, validation images stay in the order of their names.
        shard_size: Bytes of a shard, at most; a larger image has a shard of its own.
    """
    images = list(split.images)
    if split.name == "train":
        # in the order of their names, a shard would hold one or two classes, and while training reads a few shards
        # at a time, even shuffled, its batches would hold few classes, too
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


def _check_settings(shortest_side: int | None, quality: int, shard_size: str | int) -> Settings:
    if shortest_side is not None and shortest_side < 1:
        raise InputError(f"--shortest-side must be at least 1 pixel, got {shortest_side}")
    if not 1 <= quality <= 100:
        raise InputError(f"--quality must be in [1, 100], got {quality}")
    try:
        num_bytes = bytes_to_int(shard_size)
    except ValueError:
        raise InputError(f"--shard-size must be a number of bytes like 64mb, got {shard_size!r}") from None
    if not 1 <= num_bytes <= MAX_SHARD_SIZE:
        raise InputError(f"--shard-size must be in [1, 1gb], got {shard_size!r}")
    return Settings(shortest_side, 0 if shortest_side is None else quality, num_bytes)


def _read_classes(store: Store) -> dict[str, list[str]]:
    files = {split: store.read(f"{split}/classes.json") for split in SPLITS}
    try:
        return {split: list(json.loads(data)) for split, data in files.items() if data is not None}
    except (ValueError, TypeError):
        raise InputError("OUT must hold a list of class names in classes.json, got something else") from None


def _fingerprint(split: Split, settings: Settings) -> str:
    digest = hashlib.sha256(json.dumps([FORMAT, split.name, split.classes, asdict(settings)]).encode())
    for image in split.images:
        digest.update(json.dumps(image).encode())
    return digest.hexdigest()


def _find_state(store: Store, name: str, fingerprint: str) -> str:
    """`new`, `started` or `finished`."""
    plan = store.read(f"{name}/plan.json")
    is_finished = store.read(f"{name}/index.json") is not None
    # where the store cannot list its files, at least the index of a finished conversion is found
    names = store.list_folder(name) or (["index.json"] if is_finished else [])
    if plan is None:
        foreign = [entry for entry in names if entry not in (".parts", ".plan.json.part")]
    else:
        foreign = [entry for entry in names if not OWN_NAMES.fullmatch(entry)]
    if foreign:
        raise InputError(f"OUT must be new or hold this conversion, got a foreign {name}/{foreign[0]}")
    if plan is None:
        return "new"
    try:
        is_same = json.loads(plan)["fingerprint"] == fingerprint
    except (ValueError, KeyError, TypeError):
        is_same = False
    if not is_same:
        raise InputError(
            f"OUT must be new or hold this conversion, got {name}/plan.json of another one (other images, classes, "
            "--shortest-side, --quality or --shard-size)"
        )
    return "finished" if is_finished else "started"


def _convert_split(
    store: Store,
    split: Split,
    settings: Settings,
    fingerprint: str,
    is_resumed: bool,
    num_workers: int,
    is_strict: bool,
) -> None:
    shards = plan_shards(split, settings.shard_size)
    plan = {
        "fingerprint": fingerprint,
        "source": str(split.folder.resolve()),
        "images": len(split.images),
        "shards": len(shards),
        **asdict(settings),
    }
    if not is_resumed:
        write_json(store, f"{split.name}/plan.json", plan)
    write_json(store, f"{split.name}/classes.json", split.classes)
    if split.num_ignored:
        print(f"{split.name}: {split.num_ignored:,} other files and folders ignored")

    with _open_workspace(store, split.name) as workspace:
        job = Job(
            store=store,
            split=split,
            settings=settings,
            fingerprint=fingerprint,
            is_resumed=is_resumed,
            is_strict=is_strict,
            workspace=workspace,
            num_done=multiprocessing.RawArray(ctypes.c_int64, len(shards)),
            is_stopped=multiprocessing.RawValue(ctypes.c_bool, False),
        )
        store.close()  # a connection does not survive being used by two processes
        records = run_workers(job, shards, min(num_workers, len(shards)))
        entries = [record["shard"] for record in records if record["shard"] is not None]
        if not entries:
            name, reason = records[0]["left_out"][0]
            raise InputError(f"SRC must hold images that decode, got none in {split.name}; {name}: {reason}")
        # the last file: with it the shards are a whole
        write_json(store, f"{split.name}/index.json", {"version": 2, "shards": entries})

    left_out = sorted(tuple(image) for record in records for image in record["left_out"])
    for name, reason in left_out:
        print(f"left out: {split.folder / name}: {reason}")
    num_images = sum(entry["samples"] for entry in entries)
    num_shards = f"{len(entries):,} shard{'' if len(entries) == 1 else 's'}"
    print(
        f"{split.name}: {num_images:,} images of {len(split.classes)} classes in {num_shards}, "
        f"{len(left_out):,} left out"
    )


@contextlib.contextmanager
def _open_workspace(store: Store, name: str) -> Iterator[Path]:
    """A folder for unfinished shards: of a folder within it, for a rename does not cross file systems."""
    if isinstance(store, LocalStore):
        workspace = store.root / name / ".parts"
        with _locked(workspace.parent):
            workspace.mkdir(exist_ok=True)
            yield workspace
            shutil.rmtree(workspace)
    else:
        with tempfile.TemporaryDirectory(prefix="pss-convert-") as folder:
            yield Path(folder)


@contextlib.contextmanager
def _locked(folder: Path) -> Iterator[None]:
    """Keep other conversions on this machine out of a folder, until the workers have ended, too."""
    handle = os.open(folder, os.O_RDONLY)
    try:
        for seconds_left in reversed(range(LOCK_WAIT)):
            try:
                fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
                break
            except BlockingIOError:  # also by workers whose conversion was killed a moment ago
                if not seconds_left:
                    raise InputError(f"OUT must be written by one conversion at a time, another one writes to "
                                     f"{str(folder)!r}") from None
                time.sleep(1)
            except OSError:  # a file system that cannot lock folders, such as NFS
                break
        yield
    finally:
        os.close(handle)
