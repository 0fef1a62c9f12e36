"""Images from a folder with one sub-folder per class."""

from __future__ import annotations

from pathlib import Path

from torch import Tensor
from torchvision.datasets import ImageFolder
from torchvision.datasets.folder import find_classes

from pss_composer.data.augmentation.decoding import BadImage
from pss_composer.seeds import derive_seed
from pss_composer.data.augmentation.transforms import Transform
from pss_composer.data.samples import BadSample, Sample, load_sample
from pss_composer.data.sources import Request
from pss_composer.errors import InputError


def open_images(request: Request) -> FolderImages:
    """The class folders in the folder of the split."""
    return FolderImages(
        request.find_split(),
        num_classes=request.num_classes,
        transform=request.transform,
        seed=request.seed,
        on_bad_sample=request.on_bad_sample,
    )


class FolderImages(ImageFolder):
    """An ImageFolder whose augmentation depends on seed, epoch, index and view alone; for `EpochSampler`.

    Args:
        folder: Folder of one split, with a sub-folder per class.
        num_classes: Classes that the model tells apart, or None where labels are not used.
        transform: Of a picture and a seed.
        seed: Seeds the transform.
        on_bad_sample: `raise`, `replace` or `leave_out`, as for `load_sample`.

    Raises:
        InputError: A class without images, more classes than `num_classes`, or a split whose classes are not
            those of its neighbour `train`.
    """

    def __init__(
        self, folder: Path, *, num_classes: int | None, transform: Transform, seed: int, on_bad_sample: str
    ) -> None:
        try:
            super().__init__(str(folder), transform=transform)
        except FileNotFoundError as error:
            reason = " ".join(str(error).split())
            raise InputError(f"must hold a folder of images per class: {reason}", key="path") from None
        if num_classes is not None and len(self.classes) > num_classes:
            raise InputError(
                f"must be at least the {len(self.classes)} classes in {str(folder)!r}, got {num_classes}",
                key="num_classes",
            )
        # the class number is the place of the name in the alphabet: one name more or less shifts the rest
        train_folder = folder.parent / "train"
        if train_folder.is_dir() and find_classes(str(train_folder))[0] != self.classes:
            raise InputError(
                f"must hold the same class folders in every split, got others in {str(folder)!r}", key="path"
            )
        self.seed = seed
        self.on_bad_sample = on_bad_sample

    def __getitem__(self, key: tuple[int, int, int]) -> Sample:
        epoch, index, view = key
        seed = derive_seed(self.seed, epoch, index, view)
        return load_sample(
            lambda index: self._load(index, seed), index, num_samples=len(self), on_bad_sample=self.on_bad_sample
        )

    def _load(self, index: int, seed: int) -> tuple[Tensor, int]:
        path, label = self.samples[index]
        try:
            return self.transform(Path(path).read_bytes(), seed), label
        except (OSError, BadImage) as error:
            raise BadSample(f"{path!r} must hold an image, got {str(error)!r}") from error
