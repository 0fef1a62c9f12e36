"""The 1,797 handwritten digits that come with scikit-learn, as MDS shards: real images without a download."""

from __future__ import annotations

import os
import tempfile
from pathlib import Path

import numpy as np
from composer.utils import dist
from PIL import Image
from streaming import MDSWriter

from pss_composer.data.mds.dataset import StreamingImages
from pss_composer.data.sources import Request
from pss_composer.data.sources.streaming import open_shards
from pss_composer.errors import InputError

NUM_CLASSES = 10
HELD_OUT = 5  # every fifth image is held out for evaluation


def open_images(request: Request) -> StreamingImages:
    """The shards of a split, written first if they are not there."""
    request.require_classes(NUM_CLASSES, "digits")
    prepare_digits(request.path)
    return open_shards(request, request.find_split(), remote=None)


def prepare_digits(path: Path) -> None:
    """Write the digits as MDS folders `path/train` (1,437 images) and `path/val` (360), unless they are there.

    The folder appears whole or not at all: it is written beside its place and then renamed. On each machine, the
    first process writes it and the others wait.

    Args:
        path: Folder that does not exist yet, is empty, or holds the digits.

    Raises:
        InputError: The folder holds something else or cannot be written, or scikit-learn is missing.
    """
    try:
        # look for the digits last: another run may write them after this one saw that the folder is not empty
        if os.path.lexists(path) and not (path.is_dir() and (not any(path.iterdir()) or _has_digits(path))):
            raise InputError(f"must be a new or empty folder, or hold the digits, got {str(path)!r}", key="path")
        if dist.get_local_rank() == 0 and not _has_digits(path):
            _write_digits(path, *_load_digits())
    except OSError as error:
        raise InputError(f"must be a folder that can be written, got {str(path)!r}: {error.strerror}",
                         key="path") from error
    with dist.local_rank_zero_download_and_wait(str(path / "val" / "index.json")):
        pass


def write_images(folder: Path, images: np.ndarray, labels: np.ndarray) -> None:
    """Write one split as MDS shards with lossless images, in the columns of streaming's `StreamingImageNet`.

    Args:
        folder: Folder that does not exist yet.
        images: Grey values (N, H, W) or RGB values (N, H, W, 3), uint8.
        labels: Class numbers (N,).
    """
    with MDSWriter(out=str(folder), columns={"x": "pil", "y": "int"}) as shards:
        for image, label in zip(images, labels, strict=True):
            shards.write({"x": Image.fromarray(image), "y": int(label)})


def _write_digits(path: Path, images: np.ndarray, labels: np.ndarray) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=path.parent, prefix=f".{path.name}-") as workspace:
        folder = Path(workspace) / path.name
        is_held_out = np.arange(len(images)) % HELD_OUT == 0
        write_images(folder / "train", images[~is_held_out], labels[~is_held_out])
        write_images(folder / "val", images[is_held_out], labels[is_held_out])
        try:
            os.replace(folder, path)
        except OSError:
            # another run wrote the same digits first
            if not _has_digits(path):
                raise


def _has_digits(path: Path) -> bool:
    return all((path / split / "index.json").is_file() for split in ("train", "val"))


def _load_digits() -> tuple[np.ndarray, np.ndarray]:
    """Grey values (1797, 8, 8) in [0, 255] as uint8, and labels (1797,)."""
    try:
        from sklearn.datasets import load_digits
    except ImportError:
        raise InputError("must not be digits without scikit-learn: pip install scikit-learn",
                         key="name") from None
    digits = load_digits()
    return np.rint(digits.images * (255 / 16)).astype(np.uint8), digits.target
