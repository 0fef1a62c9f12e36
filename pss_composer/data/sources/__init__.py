"""The sources of images, one module each; a module is imported only when a recipe names it.

The module `NAME` is the source `data.name=NAME`. It has one function, `open_images(request: Request) -> Dataset`. A
map-style dataset takes the keys (epoch, index, view) of `loader.EpochSampler`, as `Pictures` does. An iterable dataset
divides its images among the devices itself, and its attribute `size` is the number of images on all devices. The items
of both are `samples.Sample`.
"""

from __future__ import annotations

import os
from dataclasses import dataclass
from pathlib import Path

from torch import Tensor
from torch.utils.data import Dataset

from pss_composer.data.augmentation.decoding import BadImage
from pss_composer.data.augmentation.transforms import Picture, Transform
from pss_composer.data.samples import BadSample, Sample, load_sample
from pss_composer.data.settings import DataSettings
from pss_composer.errors import InputError
from pss_composer.seeds import derive_seed


@dataclass
class Request:
    """What a source needs to know to open a split.

    Args:
        settings: Settings of the data.
        split: `train` or `val`.
        transform: From a picture (the bytes of a file, or a PIL image) and a seed to a tensor.
        image_size: Height and width that the model sees, in pixels.
        num_classes: Classes that the model distinguishes; None where labels are not used.
        batch_size: Images in the batch of one device.
        repeats: Views of each image that is drawn, as for `loader.EpochSampler`.
        seed: Seeds the order and the transform.
        on_bad_sample: `raise`, `replace` or `leave_out`, as for `samples.load_sample`.
    """

    settings: DataSettings
    split: str
    transform: Transform
    image_size: int
    num_classes: int | None
    batch_size: int
    repeats: int
    seed: int
    on_bad_sample: str

    @property
    def path(self) -> Path:
        """The setting `path`, for the sources that cannot do without it."""
        assert self.settings.path is not None, "DataSettings.check finds this first"
        return Path(self.settings.path)

    def find_folder(self) -> Path:
        """The folder `path`; an `InputError` if it does not exist."""
        if not os.path.isdir(self.path):  # Path.is_dir raises an error if the folder above cannot be entered
            raise InputError(f"must be a folder, got {str(self.path)!r}, which is not one", key="path")
        return self.path

    def find_split(self) -> Path:
        """The folder of the split in `path`; an `InputError` if it does not exist, is empty, or cannot be read."""
        folder = self.find_folder() / self.split
        try:
            is_there = os.path.isdir(folder) and len(os.listdir(folder)) > 0
        except OSError as error:
            raise InputError(f"must hold folders that can be read, got {str(folder)!r}: {error.strerror}",
                             key="path") from error
        if not is_there:
            raise InputError(f"must hold a folder {self.split!r} with images, got none in {str(self.path)!r}",
                             key="path")
        return folder

    def require_classes(self, num_needed: int, owner: str) -> None:
        """Check that the model distinguishes enough classes; nothing is checked where labels are not used.

        Args:
            num_needed: Classes of the data.
            owner: What has them, for the message.

        Raises:
            InputError: The model distinguishes fewer.
        """
        if self.num_classes is not None and self.num_classes < num_needed:
            raise InputError(f"must be at least {num_needed} for {owner}, got {self.num_classes}", key="num_classes")


class Pictures(Dataset):
    """A map-style dataset whose augmentation depends on seed, epoch, index and view alone.

    A subclass defines `__len__`; `read(index)`, which returns a picture and its label; and `name(index)`, which returns
    what messages call the picture.

    Args:
        request: What the source is asked for.
    """

    def __init__(self, request: Request) -> None:
        self.transform = request.transform
        self.seed = request.seed
        self.on_bad_sample = request.on_bad_sample

    def __len__(self) -> int:
        raise NotImplementedError

    def read(self, index: int) -> tuple[Picture, int]:
        raise NotImplementedError

    def name(self, index: int) -> str:
        raise NotImplementedError

    def __getitem__(self, key: tuple[int, int, int]) -> Sample:
        epoch, index, view = key
        seed = derive_seed(self.seed, epoch, index, view)  # a replacement of a bad picture has the same seed
        return load_sample(
            lambda place: self._load(place, seed), index, num_samples=len(self), on_bad_sample=self.on_bad_sample
        )

    def _load(self, index: int, seed: int) -> tuple[Tensor, int]:
        try:
            picture, label = self.read(index)
            return self.transform(picture, seed), label
        except (OSError, BadImage) as error:
            raise BadSample(f"{self.name(index)} must hold an image, got {str(error)!r}") from error
