"""Grey images from the IDX files of MNIST and Fashion-MNIST."""

from __future__ import annotations

import gzip
import math
import zlib
from pathlib import Path

import numpy as np
from PIL import Image
from torch.utils.data import Dataset

from pss_composer.data.batches import Sample
from pss_composer.data.randomness import derive_seed
from pss_composer.data.transforms import Transform
from pss_composer.errors import InputError

PREFIXES = {"train": "train", "val": "t10k"}  # split -> how the names of its two files begin
UNSIGNED_BYTE = 8  # the format's number for uint8


class IdxImages(Dataset):
    """Images and labels of IDX files; the augmentation depends on seed, epoch, index and view alone; for
    `EpochSampler`.

    The names are those of http://yann.lecun.com/exdb/mnist: `train-images-idx3-ubyte` and
    `train-labels-idx1-ubyte` for `train`, `t10k-images-idx3-ubyte` and `t10k-labels-idx1-ubyte` for `val`, each as
    it is or with `.gz`. All of a split is held in memory, which the workers of a data loader share.

    Args:
        folder: Folder that holds the files.
        split: `train` or `val`.
        num_classes: Classes that the model tells apart, or None where labels are not used.
        transform: Of a picture and a seed.
        seed: Seeds the transform.

    Raises:
        InputError: A file is missing, broken or no IDX file, there are no images or not as many as labels, or a
            label is not below `num_classes`.
    """

    def __init__(
        self, folder: Path, *, split: str, num_classes: int | None, transform: Transform, seed: int
    ) -> None:
        image_path = _find_file(folder, f"{PREFIXES[split]}-images-idx3-ubyte")
        label_path = _find_file(folder, f"{PREFIXES[split]}-labels-idx1-ubyte")
        self.images = read_idx(image_path, num_dims=3)
        self.labels = read_idx(label_path, num_dims=1)
        if self.images.size == 0:
            raise InputError(f"data.path must hold at least one image, got none in {str(image_path)!r}")
        if len(self.images) != len(self.labels):
            raise InputError(
                f"data.path must hold as many labels as images, got {len(self.labels)} labels in {str(label_path)!r} "
                f"for {len(self.images)} images"
            )
        num_classes_needed = int(self.labels.max()) + 1
        if num_classes is not None and num_classes < num_classes_needed:
            raise InputError(
                f"model.num_classes must be at least {num_classes_needed} for the labels in {str(label_path)!r}, "
                f"got {num_classes}"
            )
        self.transform = transform
        self.seed = seed

    def __len__(self) -> int:
        return len(self.images)

    def __getitem__(self, key: tuple[int, int, int]) -> Sample:
        epoch, index, view = key
        image = self.transform(Image.fromarray(self.images[index]), derive_seed(self.seed, epoch, index, view))
        return image, int(self.labels[index]), []


def read_idx(path: Path, *, num_dims: int) -> np.ndarray:
    """The unsigned bytes of an IDX file.

    torchvision has a reader, but it knows no `.gz` and answers a broken file with a bare assertion.

    Args:
        path: The file; with the suffix `.gz` it is unpacked.
        num_dims: Dimensions that the file must have, 3 for images (N, H, W) and 1 for labels (N,).

    Returns:
        A read-only uint8 array of that many dimensions.

    Raises:
        InputError: The file cannot be read, has another format, or is shorter or longer than its header says.
    """
    try:
        data = gzip.decompress(path.read_bytes()) if path.suffix == ".gz" else path.read_bytes()
    except (OSError, EOFError, zlib.error) as error:
        raise InputError(f"data.path must hold whole IDX files, got {str(path)!r}: {error}") from None
    # the header: two zeros, the type, the number of dimensions, and the size of each as a big-endian uint32
    magic = bytes([0, 0, UNSIGNED_BYTE, num_dims])
    header_size = 4 + 4 * num_dims
    if data[:4] != magic:
        raise InputError(
            f"data.path must hold IDX files of {num_dims}-dimensional uint8, which begin with 0x{magic.hex()}, "
            f"got 0x{data[:4].hex()} in {str(path)!r}"
        )
    shape = [int.from_bytes(data[start:start + 4], "big") for start in range(4, header_size, 4)]
    num_bytes = header_size + math.prod(shape)
    if len(data) != num_bytes:
        raise InputError(
            f"data.path must hold whole IDX files, got {len(data)} bytes instead of {num_bytes} in {str(path)!r}"
        )
    return np.frombuffer(data, dtype=np.uint8, offset=header_size).reshape(shape)


def _find_file(folder: Path, name: str) -> Path:
    for path in (folder / name, folder / f"{name}.gz"):
        if path.is_file():
            return path
    raise InputError(f"data.path must hold a file {name} or {name}.gz, got neither in {str(folder)!r}")
